//! Kernels that may begin before those before them have ended (programmatic dependent launch), and what those may still be writing.

use std::collections::HashSet;

/// Bytes that count as one place.
const GRAIN: u64 = 4;

/// What kernels write that may not have ended when the next one begins.
#[derive(Debug, Default)]
pub struct Unfinished {
    places: HashSet<u64>,
    /// The last kernel let the next one begin.
    lets_begin: bool,
}

impl Unfinished {
    /// A kernel or a copy begins. Unless both it and the one before agreed on it, everything before has ended.
    pub fn begin(&mut self, is_early: bool) {
        if !(is_early && self.lets_begin) {
            self.places.clear();
        }
        self.lets_begin = false;
    }

    /// A kernel that let the next one begin has these writes.
    pub fn end(&mut self, writes: impl IntoIterator<Item = u64>) {
        self.lets_begin = true;
        self.places.extend(writes);
    }

    /// Whether one of these bytes may still be written.
    pub fn holds(&self, at: u64, bytes: usize) -> bool {
        !self.places.is_empty() && places(at, bytes).any(|place| self.places.contains(&place))
    }
}

/// The places of these bytes.
pub fn places(at: u64, bytes: usize) -> impl Iterator<Item = u64> {
    at / GRAIN..=(at + bytes as u64 - 1) / GRAIN
}
