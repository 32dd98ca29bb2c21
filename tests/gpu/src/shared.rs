//! Shared memory of a block, and who was at each of its bytes since the last barrier.

use super::memory::UNWRITTEN;

/// No warp.
const NOBODY: u8 = u8::MAX;
/// More than one.
const MANY: u8 = u8::MAX - 1;

#[derive(Debug)]
pub struct Shared {
    bytes: Vec<u8>,
    visits: Vec<Visit>,
    /// Barriers so far.
    epoch: u32,
}

/// The warps that were last at a byte; of earlier epochs they are of no account.
#[derive(Debug, Clone, Copy)]
struct Visit {
    epoch: u32,
    writer: u8,
    reader: u8,
    adder: u8,
}

/// What a warp does with bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    /// Beside others that do the same.
    Atomic,
}

impl Shared {
    pub fn new(len: usize) -> Self {
        let visit = Visit { epoch: 0, writer: NOBODY, reader: NOBODY, adder: NOBODY };
        Shared { bytes: vec![UNWRITTEN; len], visits: vec![visit; len], epoch: 1 }
    }

    /// All warps have met.
    pub fn begin_epoch(&mut self) {
        self.epoch += 1;
    }

    /// Where these bytes are.
    ///
    /// # Errors
    /// When there are none, or another warp is at one of them.
    pub fn pointer(&mut self, at: usize, bytes: usize, warp: u8, access: Access) -> Result<*mut u8, String> {
        if at.checked_add(bytes).is_none_or(|end| end > self.bytes.len()) {
            return Err(format!("{bytes} bytes at {at} of {} shared ones", self.bytes.len()));
        }
        for (i, visit) in self.visits[at..at + bytes].iter_mut().enumerate() {
            if visit.epoch != self.epoch {
                *visit = Visit { epoch: self.epoch, writer: NOBODY, reader: NOBODY, adder: NOBODY };
            }
            let is_others = |who: u8| who != NOBODY && who != warp;
            let clashes = match access {
                Access::Read => is_others(visit.writer) || is_others(visit.adder),
                Access::Write => [visit.writer, visit.reader, visit.adder].into_iter().any(is_others),
                Access::Atomic => is_others(visit.writer) || is_others(visit.reader),
            };
            if clashes {
                return Err(format!(
                    "warp {warp} and another are both at shared byte {}: {access:?}",
                    at + i
                ));
            }
            match access {
                Access::Read => visit.reader = if is_others(visit.reader) { MANY } else { warp },
                Access::Write => visit.writer = warp,
                Access::Atomic => visit.adder = if is_others(visit.adder) { MANY } else { warp },
            }
        }
        Ok(self.bytes[at..].as_mut_ptr())
    }
}
