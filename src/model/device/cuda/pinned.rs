//! Host memory that the device writes by itself, while the host does something else.
//!
//! Used by [`super::super::readback`].

use candle_core::cuda::cudarc::driver::{CudaEvent, PinnedHostSlice, result, sys::CUevent_flags};

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
    numbers: PinnedHostSlice<u32>,
    written: CudaEvent,
}

impl Pinned {
    /// With room for `tensor`: what there is, or a new one.
    pub fn with_room<'a>(own: &'a mut Option<Self>, tensor: &Tensor) -> Result<&'a mut Self> {
        let len = tensor.elem_count();
        let pinned = match own.take().filter(|pinned| pinned.numbers.len() >= len) {
            Some(pinned) => pinned,
            None => {
                let context = tensor.device().as_cuda_device()?.cuda_stream().context().clone();
                let len = len.next_power_of_two().max(LEAST);
                // SAFETY: any bits are a number.
                let numbers = unsafe { context.alloc_pinned_with_flags(len, 0) }.map_err(failure)?;
                // The host waits for it without sleeping.
                let flags = Some(CUevent_flags::CU_EVENT_DISABLE_TIMING);
                Pinned { numbers, written: context.new_event(flags).map_err(failure)? }
            }
        };
        Ok(own.insert(pinned))
    }

    /// Starts to copy `tensor`, which must be whole, in u32, no larger than the room, and live until [`Self::finish`].
    pub fn start(&mut self, tensor: &Tensor) -> Result<()> {
        let len = tensor.elem_count();
        ensure(tensor.is_contiguous() && len <= self.numbers.len(), "numbers for which there is no room")?;
        let stream = tensor.device().as_cuda_device()?.cuda_stream();
        stream.context().bind_to_thread().map_err(failure)?;
        let numbers = &mut self.numbers.as_mut_slice().map_err(failure)?[..len];
        // SAFETY: there is room; whoever frees it waits for the event before.
        unsafe { result::memcpy_dtoh_async(numbers, start_of(tensor)?, stream.cu_stream()) }
            .map_err(failure)?;
        self.written.record(&stream).map_err(failure)
    }

    /// Waits for `len` numbers of what was started last.
    pub fn finish(&mut self, len: usize) -> Result<Vec<u32>> {
        self.written.synchronize().map_err(failure)?;
        Ok(self.numbers.as_slice().map_err(failure)?[..len].to_vec())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // Of a device that has failed nothing is written any more.
        let _ = self.written.synchronize();
    }
}
