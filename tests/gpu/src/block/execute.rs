//! What one instruction does to a warp: registers and memory.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::{
    super::{
        memory::UNWRITTEN,
        ptx::{Operand, Special},
    },
    Access, Address, Block, Copy, Instruction, LANES, Op, Result, Row, Space, Warp, lanes,
};

impl Warp<'_> {
    /// Of these lanes.
    pub(super) fn put(&mut self, to: u32, row: Row, active: u32) {
        let register = &mut self.registers[to as usize];
        if active == u32::MAX {
            *register = row;
        } else {
            lanes(active).for_each(|lane| register[lane] = row[lane]);
        }
    }
}

const NOTHING: Row = [0; LANES];

/// The lowest bits.
fn low(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

impl Block<'_> {
    pub(super) fn row(&self, warp: &Warp<'_>, operand: Operand) -> Row {
        match operand {
            Operand::Register(register) => warp.registers[register as usize],
            Operand::Value(value) => [value; LANES],
            Operand::Special(special) => std::array::from_fn(|lane| {
                let thread = u32::from(warp.number) * LANES as u32 + lane as u32;
                let [x, y, _] = self.launch.threads;
                u64::from(match special {
                    Special::Thread(0) => thread % x,
                    Special::Thread(1) => thread / x % y,
                    Special::Thread(_) => thread / x / y,
                    Special::Threads(axis) => self.launch.threads[axis as usize],
                    Special::Block(axis) => self.index[axis as usize],
                    Special::Blocks(axis) => self.launch.blocks[axis as usize],
                    Special::Lane => lane as u32,
                })
            }),
        }
    }

    /// [`Block::row`] where it lies, or in `made`.
    fn look<'a>(&self, warp: &'a Warp<'_>, operand: Operand, made: &'a mut Row) -> &'a Row {
        match operand {
            Operand::Register(register) => &warp.registers[register as usize],
            Operand::Value(0) => &NOTHING,
            other => {
                *made = self.row(warp, other);
                made
            }
        }
    }

    pub(super) fn execute(
        &mut self,
        warp: &mut Warp<'_>,
        instruction: &Instruction,
        active: u32,
    ) -> Result<()> {
        match &instruction.op {
            Op::Lanewise { to, of, function } => {
                let mut made = [NOTHING; 3];
                let [x, y, z] = &mut made;
                let (a, b, c) =
                    (self.look(warp, of[0], x), self.look(warp, of[1], y), self.look(warp, of[2], z));
                let row = function(a, b, c);
                warp.put(*to, row, active);
            }
            Op::Split { to, of, bits } => {
                let row = self.row(warp, *of);
                for (i, to) in (0u32..).zip(to).filter_map(|(i, to)| Some((i, (*to)?))) {
                    warp.put(to, row.map(|x| x >> (bits * i) & low(*bits)), active);
                }
            }
            Op::Join { to, of, bits } => {
                let mut row = [0; LANES];
                for (i, of) in (0u32..).zip(of) {
                    let part = self.row(warp, *of);
                    row = std::array::from_fn(|lane| row[lane] | (part[lane] & low(*bits)) << (bits * i));
                }
                warp.put(*to, row, active);
            }
            Op::Select { to, of, by } => {
                let ([a, b], by) = (of.map(|of| self.row(warp, of)), self.row(warp, *by));
                let row = std::array::from_fn(|lane| if by[lane] & 1 == 1 { a[lane] } else { b[lane] });
                warp.put(*to, row, active);
            }
            Op::Load { to, from, bytes, sign_bits } => {
                let base = self.row(warp, from.base);
                for lane in lanes(active) {
                    let all = bytes * to.len();
                    let pointer = self.pointer(warp, lane, (*from, base[lane]), all, Access::Read)?;
                    for (i, to) in to.iter().enumerate() {
                        // SAFETY: `pointer` looked at all of them.
                        let value = unsafe { read(pointer.add(i * bytes), *bytes) };
                        let unused = 64 - 8 * *bytes as u32;
                        let signed = |bits| ((value << unused) as i64 >> unused) as u64 & low(bits);
                        let value = sign_bits.map_or(value, signed);
                        warp.registers[*to as usize][lane] = value;
                    }
                }
            }
            Op::Store { of, to, bytes } => {
                let base = self.row(warp, to.base);
                let rows: Vec<Row> = of.iter().map(|of| self.row(warp, *of)).collect();
                for lane in lanes(active) {
                    let all = bytes * of.len();
                    let pointer = self.pointer(warp, lane, (*to, base[lane]), all, Access::Write)?;
                    for (i, row) in rows.iter().enumerate() {
                        // SAFETY: as above; nobody else writes there, or no order is promised.
                        unsafe { write(pointer.add(i * bytes), *bytes, row[lane]) };
                    }
                }
            }
            Op::Atomic { .. } => self.atomic(warp, instruction, active)?,
            Op::CopyAsync { to, from, bytes, of } => {
                let (target, source, of) =
                    (self.row(warp, to.base), self.row(warp, from.base), self.row(warp, *of));
                for lane in lanes(active) {
                    // Until it was waited for, no number is there.
                    let place = self.pointer(warp, lane, (*to, target[lane]), *bytes, Access::Write)?;
                    // SAFETY: as above.
                    unsafe { place.write_bytes(UNWRITTEN, *bytes) };
                    let mut copy =
                        Copy { to: target[lane].wrapping_add_signed(to.offset), bytes: vec![0; *bytes] };
                    let count = (of[lane] as usize).min(*bytes);
                    if count > 0 {
                        let pointer = self.pointer(warp, lane, (*from, source[lane]), count, Access::Read)?;
                        // SAFETY: as above.
                        unsafe { copy.bytes.as_mut_ptr().copy_from(pointer, count) };
                    }
                    warp.copies.last_mut().expect("one group is open").push(copy);
                }
            }
            Op::CommitCopies => warp.copies.push(vec![]),
            Op::AwaitCopies(left) => {
                let closed = warp.copies.len() - 1;
                let landed: Vec<Copy> = warp.copies.drain(..closed - closed.min(*left)).flatten().collect();
                let at = Address { base: Operand::Value(0), offset: 0, space: Space::Shared };
                for copy in landed {
                    let pointer = self.pointer(warp, 0, (at, copy.to), copy.bytes.len(), Access::Write)?;
                    // SAFETY: as above.
                    unsafe { pointer.copy_from(copy.bytes.as_ptr(), copy.bytes.len()) };
                }
            }
            Op::AwaitPrevious => warp.has_waited = true,
            Op::Fail => return Err("the kernel gives up".into()),
            Op::Nothing | Op::Branch(_) | Op::Exit | Op::Barrier => {}
            Op::AwaitLanes(_)
            | Op::Shuffle { .. }
            | Op::Vote { .. }
            | Op::Multiply { .. }
            | Op::LoadMatrices { .. } => {
                self.execute_together(warp, instruction, active)?;
            }
        }
        Ok(())
    }

    fn atomic(&mut self, warp: &mut Warp<'_>, instruction: &Instruction, active: u32) -> Result<()> {
        let Op::Atomic { to, at, bytes, of, function } = &instruction.op else { return Ok(()) };
        let (base, [a, b]) = (self.row(warp, at.base), of.map(|of| self.row(warp, of)));
        for lane in lanes(active) {
            let pointer = self.pointer(warp, lane, (*at, base[lane]), *bytes, Access::Atomic)?;
            let next = |old: u64| match function {
                Some(function) => function(&[old; LANES], &[a[lane]; LANES], &[0; LANES])[0],
                None if old == a[lane] => b[lane],
                None => old,
            };
            let order = Ordering::SeqCst;
            // SAFETY: the pointer is to so many bytes, and aligned to them.
            let old = unsafe {
                match bytes {
                    4 => AtomicU32::from_ptr(pointer.cast())
                        .fetch_update(order, order, |old| Some(next(u64::from(old)) as u32))
                        .ok()
                        .map(u64::from),
                    8 => AtomicU64::from_ptr(pointer.cast())
                        .fetch_update(order, order, |old| Some(next(old)))
                        .ok(),
                    _ => return Err(format!("an atomic of {bytes} bytes")),
                }
            };
            if let (Some(to), Some(old)) = (to, old) {
                warp.registers[*to as usize][lane] = old;
            }
        }
        Ok(())
    }
}

/// # Safety
/// There are so many bytes: 1, 2, 4 or 8.
pub unsafe fn read(from: *const u8, bytes: usize) -> u64 {
    let mut value = [0; 8];
    // SAFETY: the caller's.
    unsafe { value.as_mut_ptr().copy_from(from, bytes) };
    u64::from_le_bytes(value)
}

/// # Safety
/// As for [`read`].
pub unsafe fn write(to: *mut u8, bytes: usize, value: u64) {
    // SAFETY: the caller's.
    unsafe { to.copy_from(value.to_le_bytes().as_ptr(), bytes) };
}
