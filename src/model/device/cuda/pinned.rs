//! Host memory that the device writes by itself, while the host does something else.
//!
//! Used by [`super::super::exchange`].

use std::{ptr::NonNull, slice};

use candle_core::cuda::cudarc::driver::{CudaEvent, result, sys::CUevent_flags};

use super::{
    super::super::{Result, Tensor},
    failure,
    launch::{ensure, start_of},
};

/// Least numbers there is room for.
const LEAST: usize = 1024;

/// Room for numbers, and when they are there.
#[derive(Debug)]
pub struct Pinned {
    numbers: NonNull<u32>,
    len: usize,
    written: CudaEvent,
}

// SAFETY: the driver's host memory is any thread's; whoever owns this is the only one to look at it.
unsafe impl Send for Pinned {}

impl Pinned {
    /// With room for `tensor`: what there is, or a new one.
    pub fn with_room<'a>(own: &'a mut Option<Self>, tensor: &Tensor) -> Result<&'a mut Self> {
        let len = tensor.elem_count();
        let pinned = match own.take().filter(|pinned| pinned.len >= len) {
            Some(pinned) => pinned,
            None => {
                let len = len.next_power_of_two().max(LEAST);
                let context = tensor.device().as_cuda_device()?.cuda_stream().context().clone();
                // The host waits for it without sleeping.
                let flags = Some(CUevent_flags::CU_EVENT_DISABLE_TIMING);
                let written = context.new_event(flags).map_err(failure)?;
                // SAFETY: nobody reads it before it is written, here.
                let numbers = unsafe { result::malloc_host(len * size_of::<u32>(), 0) }.map_err(failure)?;
                let Some(numbers) = NonNull::new(numbers.cast::<u32>()) else {
                    candle_core::bail!("the driver has no memory of the host: this is a bug")
                };
                // SAFETY: there is room for as many.
                unsafe { numbers.write_bytes(0, len) };
                Pinned { numbers, len, written }
            }
        };
        Ok(own.insert(pinned))
    }

    /// Starts to copy `tensor`, which must be whole, in u32, no larger than the room, and live until [`Self::finish`].
    pub fn start(&mut self, tensor: &Tensor) -> Result<()> {
        let len = tensor.elem_count();
        ensure(tensor.is_contiguous() && len <= self.len, "numbers for which there is no room")?;
        let stream = tensor.device().as_cuda_device()?.cuda_stream();
        stream.context().bind_to_thread().map_err(failure)?;
        // SAFETY: there is room; it is not given back, nor read, before the event.
        unsafe {
            let numbers = slice::from_raw_parts_mut(self.numbers.as_ptr(), len);
            result::memcpy_dtoh_async(numbers, start_of(tensor)?, stream.cu_stream())
        }
        .map_err(failure)?;
        self.written.record(&stream).map_err(failure)
    }

    /// Waits for `len` numbers of what was started last.
    pub fn finish(&mut self, len: usize) -> Result<Vec<u32>> {
        ensure(len <= self.len, "more numbers than there is room for")?;
        self.written.synchronize().map_err(failure)?;
        // SAFETY: there are as many, and the device has written what was started.
        Ok(unsafe { slice::from_raw_parts(self.numbers.as_ptr(), len) }.to_vec())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // Of a device that has failed nothing is written any more.
        let _ = self.written.synchronize();
        // SAFETY: the driver gave it, and nobody writes or reads it any more.
        let _ = unsafe { result::free_host(self.numbers.as_ptr().cast()) };
    }
}
