//! A kernel's launch: a block after the other on each core, the warps of a block by turns.
//!
//! Lanes of a warp that stand at the same instruction execute it together. Those that are furthest behind go first, so that lanes that went
//! different ways meet again. A warp runs until all of it stands at a barrier.

mod execute;
mod warp_ops;

use rayon::prelude::*;

pub use execute::{read, write};

use super::{
    early::{Unfinished, places},
    graph::State,
    memory::{Memory, UNWRITTEN},
    ptx::{Address, Instruction, Kernel, LOCAL, Op, Result, SHARED, Space},
    shared::{Access, Shared},
};

pub const LANES: usize = 32;
/// A register of all lanes: bits, of narrow types the lowest.
pub type Row = [u64; LANES];

pub struct Launch<'a> {
    pub kernel: &'a Kernel,
    pub blocks: [u32; 3],
    pub threads: [u32; 3],
    pub dynamic_shared: usize,
    pub params: &'a [u8],
    /// It may begin before the one before it has ended.
    pub is_early: bool,
}

/// # Errors
/// What the kernel did wrong, and where.
pub fn run(launch: &Launch<'_>, state: &mut State) -> Result<()> {
    let kernel = launch.kernel;
    let threads: u32 = launch.threads.iter().product();
    if threads == 0 || threads > kernel.max_threads.unwrap_or(1024) {
        return Err(format!("{} cannot have {threads} threads a block", kernel.name));
    }
    state.unfinished.begin(launch.is_early);
    let State { memory, unfinished } = &*state;
    let [x, y, z] = launch.blocks.map(u64::from);
    let block = |registers: &mut Vec<Vec<Row>>, i: u64| {
        let index = [i % x, i / x % y, i / x / y].map(|axis| axis as u32);
        let mut block = Block {
            launch,
            index,
            shared: Shared::new(kernel.shared_bytes + launch.dynamic_shared),
            memory,
            seen: (0, 0),
            unfinished,
            writes: vec![],
        };
        let has_waited = block
            .run(threads, registers)
            .map_err(|why| format!("{}, block {index:?}: {why}", kernel.name))?;
        Ok((block.writes, has_waited))
    };
    let blocks = (0..x * y * z).into_par_iter();
    let writes = blocks.map_init(Vec::new, block).collect::<Result<Vec<_>>>()?;
    if !writes.iter().any(|(_, has_waited)| *has_waited) {
        return Err(format!("{} may end before those before it: it does not wait for them", kernel.name));
    }
    if kernel.lets_next_begin {
        state.unfinished.end(writes.into_iter().flat_map(|(writes, _)| writes));
    }
    Ok(())
}

struct Block<'a> {
    launch: &'a Launch<'a>,
    index: [u32; 3],
    shared: Shared,
    memory: &'a Memory,
    /// The piece of memory last looked at.
    seen: (u64, u64),
    unfinished: &'a Unfinished,
    /// Places written, where the next kernel may begin before this one has ended.
    writes: Vec<u64>,
}

struct Warp<'a> {
    number: u8,
    registers: &'a mut Vec<Row>,
    pc: [usize; LANES],
    alive: u32,
    is_at_barrier: bool,
    /// It has waited for the kernel before.
    has_waited: bool,
    local: Vec<u8>,
    /// Groups of asynchronous copies on their way; the last one is open.
    copies: Vec<Vec<Copy>>,
}

/// Bytes that will be in shared memory.
struct Copy {
    to: u64,
    bytes: Vec<u8>,
}

fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    (0..LANES).filter(move |lane| mask >> lane & 1 == 1)
}

/// Those of `mask` for which `holds`.
fn lanes_where(mask: u32, holds: impl Fn(usize) -> bool) -> u32 {
    lanes(mask).filter(|&lane| holds(lane)).fold(0, |all, lane| all | 1 << lane)
}

impl Block<'_> {
    /// Tells whether a warp has waited for the kernel before. `registers` are those of another block: a kernel that looks at one
    /// that it has not written may find anything.
    fn run(&mut self, threads: u32, registers: &mut Vec<Vec<Row>>) -> Result<bool> {
        let kernel = self.launch.kernel;
        let num_warps = threads.div_ceil(LANES as u32);
        registers.resize_with(num_warps as usize, || vec![[0; LANES]; kernel.num_registers]);
        let warp = |(number, registers): (u32, _)| Warp {
            number: number as u8,
            registers,
            pc: [0; LANES],
            alive: u32::MAX >> (LANES as u32 - (threads - number * LANES as u32).min(LANES as u32)),
            is_at_barrier: false,
            has_waited: !self.launch.is_early,
            local: vec![UNWRITTEN; kernel.local_bytes * LANES],
            copies: vec![vec![]],
        };
        let mut warps: Vec<Warp<'_>> = (0..num_warps).zip(registers).map(warp).collect();
        while warps.iter().any(|warp| warp.alive != 0) {
            for warp in warps.iter_mut().filter(|warp| warp.alive != 0) {
                warp.is_at_barrier = false;
                self.run_warp(warp)?;
            }
            self.shared.begin_epoch();
        }
        Ok(warps.iter().any(|warp| warp.has_waited))
    }

    fn run_warp(&mut self, warp: &mut Warp) -> Result<()> {
        while warp.alive != 0 && !warp.is_at_barrier {
            let at = lanes(warp.alive).map(|lane| warp.pc[lane]).min().unwrap_or(0);
            let mask = lanes_where(warp.alive, |lane| warp.pc[lane] == at);
            let others = lanes(warp.alive & !mask).map(|lane| warp.pc[lane]).min().unwrap_or(usize::MAX);
            self.run_lanes(warp, mask, at, others)?;
        }
        Ok(())
    }

    /// These lanes, from the instruction at which they stand until they part, or come to where others are.
    fn run_lanes(&mut self, warp: &mut Warp<'_>, mask: u32, mut at: usize, others: usize) -> Result<()> {
        let kernel = self.launch.kernel;
        loop {
            let instruction = &kernel.instructions[at];
            let active = match instruction.guard {
                None => mask,
                Some((register, is_negated)) => {
                    let row = &warp.registers[register as usize];
                    lanes_where(mask, |lane| (row[lane] & 1 == 1) != is_negated)
                }
            };
            let mut parts = at + 1 >= others;
            match instruction.op {
                _ if active == 0 => {}
                Op::Branch(to) => {
                    lanes(mask).for_each(|lane| warp.pc[lane] = at + 1);
                    lanes(active).for_each(|lane| warp.pc[lane] = to);
                    return Ok(());
                }
                Op::Exit => {
                    warp.alive &= !active;
                    parts = true;
                }
                Op::Barrier if active == warp.alive => {
                    warp.is_at_barrier = true;
                    parts = true;
                }
                Op::Barrier => return Err(format!("line {at}: not all lanes of a warp reach this barrier")),
                _ => {
                    let say = |why| format!("line {at} `{}`: {why}", instruction.text);
                    self.execute(warp, instruction, active).map_err(say)?;
                }
            }
            at += 1;
            if parts {
                lanes(mask).for_each(|lane| warp.pc[lane] = at);
                return Ok(());
            }
        }
    }

    /// Where a lane's address is in the process.
    fn pointer(
        &mut self,
        warp: &mut Warp<'_>,
        lane: usize,
        (address, base): (Address, u64),
        bytes: usize,
        access: Access,
    ) -> Result<*mut u8> {
        let at = base.wrapping_add_signed(address.offset);
        let (space, at) = match address.space {
            Space::Generic | Space::Shared if (SHARED..LOCAL).contains(&at) => (Space::Shared, at - SHARED),
            Space::Generic if at >= LOCAL => (Space::Local, at - LOCAL),
            Space::Generic => (Space::Global, at),
            space => (space, at),
        };
        if !at.is_multiple_of(bytes as u64) {
            return Err(format!("lane {lane}: {space:?} address {at:#x} of {bytes} bytes is not aligned"));
        }
        let outside = |len: usize| Err(format!("lane {lane}: {bytes} bytes at {at} of {len} in {space:?}"));
        match space {
            Space::Shared => self.shared.pointer(at as usize, bytes, warp.number, access),
            Space::Local => {
                let own = self.launch.kernel.local_bytes;
                match warp.local.chunks_mut(own.max(1)).nth(lane).and_then(|own| own.get_mut(at as usize..)) {
                    Some(place) if place.len() >= bytes => Ok(place.as_mut_ptr()),
                    _ => outside(own),
                }
            }
            Space::Param => match self.launch.params.get(at as usize..at as usize + bytes) {
                Some(place) => Ok(place.as_ptr().cast_mut()),
                None => outside(self.launch.params.len()),
            },
            Space::Global | Space::Generic => self.global(warp, at, bytes, access),
        }
    }

    fn global(&mut self, warp: &Warp<'_>, at: u64, bytes: usize, access: Access) -> Result<*mut u8> {
        let holds = |(start, end): (u64, u64)| start <= at && at + bytes as u64 <= end;
        if !holds(self.seen) {
            self.memory.check(at, bytes)?;
            self.seen = self.memory.piece(at).unwrap_or_default();
        }
        if !warp.has_waited && (access != Access::Read || self.unfinished.holds(at, bytes)) {
            return Err(format!(
                "{access:?} of {at:#x} before the kernel waited for those that may be at it still"
            ));
        }
        if access != Access::Read && self.launch.kernel.lets_next_begin {
            self.writes.extend(places(at, bytes));
        }
        Ok(at as *mut u8)
    }
}
