//! The arithmetic of the CPU path: matrix products, attention, activations.
//!
//! Called by the layers only. Every kernel is *batch-invariant*: each output element is a fixed sequence of
//! operations on its own inputs, whatever else is computed beside it, so a request gives the same bits alone, in a
//! batch, in chunks and after a prefix-cache hit. `pulp` chooses the instruction set at run time.

pub mod activation;
pub mod amx;
pub mod attention;
pub mod attention_bf16;
mod dot;
pub mod gemm;
pub mod matrix;
pub mod panels;
pub mod quant;

use std::{marker::PhantomData, mem::MaybeUninit};

/// Below this many multiplications a kernel runs on the calling thread: waking others costs more.
const MIN_PARALLEL_WORK: usize = 64 * 1024;

/// A buffer that several threads write disjoint parts of.
pub(super) struct SharedOutput<'a, T = f32> {
    start: *mut T,
    len: usize,
    _buffer: PhantomData<&'a mut [T]>,
}

// SAFETY: `slice` hands out parts; its callers never ask for overlapping ones.
unsafe impl<T: Send> Sync for SharedOutput<'_, T> {}

impl<'a, T> SharedOutput<'a, T> {
    pub(super) fn new(buffer: &'a mut [T]) -> Self {
        SharedOutput { start: buffer.as_mut_ptr(), len: buffer.len(), _buffer: PhantomData }
    }

    /// Elements `[offset, offset + len)`.
    ///
    /// # Safety
    /// No other live slice may overlap it.
    pub(super) unsafe fn slice(&self, offset: usize, len: usize) -> &'a mut [T] {
        assert!(offset + len <= self.len, "a kernel writes outside its output: this is a bug");
        // SAFETY: inside the buffer by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), len) }
    }
}

/// Where a product goes: memory that was never written.
type NewOutput<'a> = SharedOutput<'a, MaybeUninit<f32>>;

/// A buffer that `fill` writes whole; large ones are not zeroed first, which would cost as much as a product with few
/// inputs.
///
/// # Safety
/// `fill` must write every element.
unsafe fn filled(len: usize, fill: impl FnOnce(&NewOutput<'_>)) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    fill(&SharedOutput::new(&mut values.spare_capacity_mut()[..len]));
    // SAFETY: written by the caller's promise.
    unsafe { values.set_len(len) };
    values
}

/// Where [`prefetch`] fetches to: a level of the cache, as the instruction has it.
const FIRST_LEVEL: i32 = 3;
#[cfg(target_arch = "x86_64")]
const SECOND_LEVEL: i32 = 2;

/// Fetches memory that will be used soon, a line after the other from `start` on.
#[inline(always)]
fn prefetch<const LEVEL: i32>(start: *const u8, num_bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..num_bytes).step_by(64) {
        // SAFETY: a prefetch of what is no memory does nothing.
        unsafe { std::arch::x86_64::_mm_prefetch::<LEVEL>(start.wrapping_add(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, num_bytes);
}

/// Fetches memory that will be written soon. Stores wait for their memory one after the other, and all that comes after
/// them waits with them.
#[inline(always)]
fn prefetch_output(out: &[MaybeUninit<f32>]) {
    prefetch::<FIRST_LEVEL>(out.as_ptr().cast(), size_of_val(out));
}

/// `sums`, as many as `out` has place for, plus `bias` where there is one.
#[inline(always)]
fn write_sums(out: &mut [MaybeUninit<f32>], sums: &[f32], bias: Option<&[f32]>) {
    match bias {
        Some(bias) => {
            for ((out, sum), bias) in out.iter_mut().zip(sums).zip(bias) {
                out.write(sum + bias);
            }
        }
        None => {
            out.write_copy_of_slice(&sums[..out.len()]);
        }
    }
}
