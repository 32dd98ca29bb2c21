//! What lanes of a warp do together: shuffles, votes, products of small matrices.

use super::{
    super::{
        matrix,
        ptx::{Operand, Shuffle, Vote},
    },
    Access, Block, Instruction, LANES, Op, Result, Row, Warp,
    execute::read,
    lanes, lanes_where,
};

/// Bytes of a row of a matrix that `ldmatrix` reads.
const ROW_BYTES: usize = 16;

impl Block<'_> {
    pub(super) fn execute_together(
        &mut self,
        warp: &mut Warp<'_>,
        instruction: &Instruction,
        active: u32,
    ) -> Result<()> {
        match &instruction.op {
            Op::AwaitLanes(members) => self.meet(warp, *members, active)?,
            Op::Shuffle { to, is_valid, of, by, clamp, members, mode } => {
                self.meet(warp, *members, active)?;
                let (row, by, clamp) = (self.row(warp, *of), self.row(warp, *by), self.row(warp, *clamp));
                let (mut out, mut valid) = (row, [0; LANES]);
                for lane in lanes(active) {
                    let from = source(lane, by[lane] as usize & 31, clamp[lane] as usize, *mode);
                    let is_there = |from: &usize| active >> from & 1 == 1;
                    if from.is_some_and(|from| !is_there(&from)) {
                        return Err(format!("lane {lane} asks lane {from:?}, which is not there"));
                    }
                    out[lane] = row[from.unwrap_or(lane)];
                    valid[lane] = u64::from(from.is_some());
                }
                warp.put(*to, out, active);
                if let Some(to) = is_valid {
                    warp.put(*to, valid, active);
                }
            }
            Op::Vote { to, of, members, mode } => {
                self.meet(warp, *members, active)?;
                let row = self.row(warp, *of);
                let yes = lanes_where(active, |lane| row[lane] & 1 == 1);
                let value = match mode {
                    Vote::Ballot => yes,
                    Vote::Any => u32::from(yes != 0),
                    Vote::All => u32::from(yes == active),
                };
                warp.put(*to, [u64::from(value); LANES], active);
            }
            Op::Multiply { to, a, b, c, is_bf16 } => {
                whole(active)?;
                let rows = |of: &[_]| -> Vec<Row> { of.iter().map(|of| self.row(warp, *of)).collect() };
                let (a, b, c) = (rows(a), rows(b), rows(c));
                for (to, row) in to.iter().zip(matrix::multiply(&a, &b, &c, *is_bf16)) {
                    warp.put(*to, row, active);
                }
            }
            Op::LoadMatrices { to, from, is_transposed } => {
                whole(active)?;
                let base = self.row(warp, from.base);
                for (number, to) in to.iter().enumerate() {
                    let mut elements = [[0u16; 8]; 8];
                    for (row, elements) in elements.iter_mut().enumerate() {
                        let lane = number * 8 + row;
                        let pointer =
                            self.pointer(warp, lane, (*from, base[lane]), ROW_BYTES, Access::Read)?;
                        for (i, element) in elements.iter_mut().enumerate() {
                            // SAFETY: the row has 8 of them.
                            *element = unsafe { read(pointer.add(2 * i), 2) } as u16;
                        }
                    }
                    warp.put(*to, matrix::spread(&elements, *is_transposed), active);
                }
            }
            _ => {}
        }
        Ok(())
    }
}

impl Block<'_> {
    /// An error unless the lanes that are here are those that say they work together.
    fn meet(&self, warp: &Warp<'_>, members: Operand, active: u32) -> Result<()> {
        let members = self.row(warp, members);
        match lanes(active).all(|lane| members[lane] as u32 & warp.alive == active) {
            true => Ok(()),
            false => Err(format!("only lanes {active:#x} reach what they do with others")),
        }
    }
}

fn whole(active: u32) -> Result<()> {
    match active {
        u32::MAX => Ok(()),
        _ => Err(format!("only lanes {active:#x} reach what is for a whole warp")),
    }
}

/// The lane from which a lane takes its value, if there is one. `clamp` holds the last lane, or the first one where values go up, and
/// above it what lanes of a segment have in common.
fn source(lane: usize, by: usize, clamp: usize, mode: Shuffle) -> Option<usize> {
    let (clamp, segment) = (clamp & 31, clamp >> 8 & 31);
    let first = lane & segment;
    let last = first | clamp & !segment;
    match mode {
        Shuffle::Butterfly => Some(lane ^ by).filter(|&from| from <= last),
        Shuffle::Down => Some(lane + by).filter(|&from| from <= last),
        Shuffle::Up => lane.checked_sub(by).filter(|&from| from >= last),
        Shuffle::Index => Some(first | by & !segment).filter(|&from| from <= last),
    }
}
