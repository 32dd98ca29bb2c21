//! The memory of the device, which is the process's. What of it the program has is known here.

use std::{
    alloc::{Layout, alloc, dealloc, handle_alloc_error},
    collections::BTreeMap,
};

/// As CUDA aligns it.
const ALIGN: usize = 256;
/// What memory holds that nobody has written: no number in any floating type.
pub const UNWRITTEN: u8 = 0xff;

#[derive(Debug, Default)]
pub struct Memory {
    pieces: BTreeMap<u64, Piece>,
    used: usize,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    bytes: usize,
    is_live: bool,
}

impl Memory {
    pub fn used(&self) -> usize {
        self.used
    }

    pub fn allocate(&mut self, bytes: usize) -> u64 {
        // SAFETY: the layout's size is not 0.
        let at = unsafe { alloc(layout(bytes)) } as u64;
        if at == 0 {
            handle_alloc_error(layout(bytes));
        }
        self.pieces.insert(at, Piece { bytes, is_live: true });
        self.used += bytes;
        self.forget(at);
        at
    }

    /// Gives a piece back, if it is one.
    pub fn free(&mut self, at: u64) -> bool {
        let Some(piece) = self.pieces.remove(&at) else { return false };
        self.used -= piece.bytes;
        // SAFETY: it is from `allocate`, with this layout.
        unsafe { dealloc(at as *mut u8, layout(piece.bytes)) };
        true
    }

    /// Whether anybody may look at a piece that a graph keeps. What it held is forgotten.
    pub fn set_live(&mut self, at: u64, is_live: bool) {
        if let Some(piece) = self.pieces.get_mut(&at) {
            piece.is_live = is_live;
        }
        self.forget(at);
    }

    fn forget(&self, at: u64) {
        if let Some(piece) = self.pieces.get(&at) {
            // SAFETY: the piece is ours.
            unsafe { std::ptr::write_bytes(at as *mut u8, UNWRITTEN, piece.bytes) };
        }
    }

    /// Where the live piece that holds this address begins and ends.
    pub fn piece(&self, at: u64) -> Option<(u64, u64)> {
        let (&start, piece) = self.pieces.range(..=at).next_back()?;
        let end = start + piece.bytes as u64;
        (piece.is_live && at < end).then_some((start, end))
    }

    /// An error unless a live piece holds so many bytes from here.
    pub fn check(&self, at: u64, bytes: usize) -> Result<(), String> {
        if bytes == 0 || self.piece(at).is_some_and(|(_, end)| at + bytes as u64 <= end) {
            return Ok(());
        }
        Err(format!("{bytes} bytes at {at:#x} are not in {:#x?}", self.piece(at)))
    }
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes.max(1), ALIGN).expect("a size that a machine can have")
}
