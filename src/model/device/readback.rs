//! What the host wants to know of a step, on its way to host memory while the device goes on with what was started after it.
//!
//! Owned by the engine's runner.

use super::super::{Result, Tensor};

/// One tensor at a time.
#[derive(Debug, Default)]
pub struct Readback {
    #[cfg(feature = "cuda")]
    pinned: Option<super::cuda::pinned::Pinned>,
    under_way: Option<Tensor>,
}

impl Readback {
    /// Starts to copy `tensor`, in u32, as soon as it is there. Does not wait.
    ///
    /// # Errors
    /// When the device fails.
    pub fn start(&mut self, tensor: &Tensor) -> Result<()> {
        #[cfg(feature = "cuda")]
        if tensor.device().is_cuda() {
            super::cuda::pinned::Pinned::with_room(&mut self.pinned, tensor)?.start(tensor)?;
        }
        self.under_way = Some(tensor.clone());
        Ok(())
    }

    /// Waits for what was started last, and for nothing that was started after it.
    ///
    /// # Errors
    /// When the device fails, or nothing was started.
    pub fn finish(&mut self) -> Result<Vec<u32>> {
        let Some(tensor) = self.under_way.take() else {
            candle_core::bail!("nothing was read: this is a bug")
        };
        #[cfg(feature = "cuda")]
        if let Some(pinned) = self.pinned.as_mut().filter(|_| tensor.device().is_cuda()) {
            return pinned.finish(tensor.elem_count());
        }
        tensor.flatten_all()?.to_vec1()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn reads_what_was_started_last(device: &Device) {
        let mut readback = Readback::default();
        for len in [3u32, 5000, 2] {
            let rows: Vec<u32> = (0..2 * len).map(|i| i * i).collect();
            let tensor = Tensor::from_slice(&rows, (2, len as usize), device).unwrap();
            readback.start(&tensor).unwrap();
            assert_eq!(readback.finish().unwrap(), rows);
            assert!(readback.finish().is_err());
        }
    }

    #[test]
    fn what_was_started_last_is_read() {
        reads_what_was_started_last(&Device::Cpu);
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn it_is_read_where_there_is_a_gpu() {
        if let Some(gpu) = super::super::cuda::testing::gpu() {
            reads_what_was_started_last(&gpu);
        }
    }
}
