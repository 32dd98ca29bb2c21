//! The arithmetic of the CPU path: matrix products, attention, activations.
//!
//! Called by the layers only. Every kernel is *batch-invariant*: each output element is a fixed sequence of
//! operations on its own inputs, whatever else is computed beside it, so a request gives the same bits alone, in a
//! batch, in chunks and after a prefix-cache hit. `pulp` chooses the instruction set at run time.

pub mod activation;
pub mod attention;
mod dot;
pub mod gemm;
pub mod matrix;
pub mod quant;

use std::marker::PhantomData;

/// Below this many multiplications a kernel runs on the calling thread: waking others costs more.
const MIN_PARALLEL_WORK: usize = 64 * 1024;

/// A buffer that several threads write disjoint parts of.
pub(super) struct SharedOutput<'a> {
    start: *mut f32,
    len: usize,
    _buffer: PhantomData<&'a mut [f32]>,
}

// SAFETY: `slice` hands out parts; its callers never ask for overlapping ones.
unsafe impl Sync for SharedOutput<'_> {}

impl<'a> SharedOutput<'a> {
    pub(super) fn new(buffer: &'a mut [f32]) -> Self {
        SharedOutput { start: buffer.as_mut_ptr(), len: buffer.len(), _buffer: PhantomData }
    }

    /// Elements `[offset, offset + len)`.
    ///
    /// # Safety
    /// No other live slice may overlap it.
    pub(super) unsafe fn slice(&self, offset: usize, len: usize) -> &'a mut [f32] {
        assert!(offset + len <= self.len, "a kernel writes outside its output: this is a bug");
        // SAFETY: inside the buffer by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), len) }
    }
}
