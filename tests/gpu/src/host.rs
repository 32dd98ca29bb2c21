//! Memory of the host that the device writes by itself: what is copied there is there once somebody has waited for it, and no number before.

use std::collections::HashMap;

use super::memory::{Memory, UNWRITTEN};

#[derive(Debug, Default)]
pub struct Host {
    memory: Memory,
    under_way: Vec<Copy>,
    /// How many copies each stream had begun when an event was put into it.
    events: HashMap<usize, (usize, u64)>,
    num_begun: u64,
}

#[derive(Debug)]
struct Copy {
    stream: usize,
    number: u64,
    to: u64,
    bytes: Vec<u8>,
}

impl Host {
    pub fn allocate(&mut self, bytes: usize) -> u64 {
        self.memory.allocate(bytes)
    }

    /// Gives a piece back, if it is one that nobody writes any more.
    pub fn free(&mut self, at: u64) -> bool {
        let Some((start, end)) = self.memory.piece(at) else { return false };
        self.under_way.iter().all(|copy| !(start..end).contains(&copy.to)) && self.memory.free(at)
    }

    /// Whether so many bytes from here are the device's to write.
    pub fn has(&self, at: u64, bytes: usize) -> bool {
        self.memory.piece(at).is_some() && self.memory.check(at, bytes).is_ok()
    }

    /// Begins to copy `bytes` there.
    pub fn begin(&mut self, stream: usize, to: u64, bytes: Vec<u8>) {
        // SAFETY: `has` has said that they are there.
        unsafe { std::ptr::write_bytes(to as *mut u8, UNWRITTEN, bytes.len()) };
        self.num_begun += 1;
        self.under_way.push(Copy { stream, number: self.num_begun, to, bytes });
    }

    pub fn record(&mut self, event: usize, stream: usize) {
        self.events.insert(event, (stream, self.num_begun));
    }

    pub fn await_event(&mut self, event: usize) {
        if let Some(&(stream, number)) = self.events.get(&event) {
            self.land(|copy| copy.stream == stream && copy.number <= number);
        }
    }

    pub fn await_stream(&mut self, stream: usize) {
        self.land(|copy| copy.stream == stream);
    }

    fn land(&mut self, has_landed: impl Fn(&Copy) -> bool) {
        for copy in self.under_way.extract_if(.., |copy| has_landed(copy)) {
            // SAFETY: `has` has said that they are there, and `free` that nobody gave them back.
            unsafe { std::ptr::copy(copy.bytes.as_ptr(), copy.to as *mut u8, copy.bytes.len()) };
        }
    }
}
