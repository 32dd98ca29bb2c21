//! What host and device say to each other while the device goes on with what it was told before.
//!
//! Owned by whoever has something to say: the engine's runner, and the model's [`super::uploads`].

use candle_core::Device;

use super::super::{Result, Tensor};

/// See the module.
#[derive(Debug, Default)]
pub struct Exchange {
    #[cfg(feature = "cuda")]
    beside: Option<super::cuda::SecondStream>,
    #[cfg(feature = "cuda")]
    pinned: Option<super::cuda::pinned::Pinned>,
    under_way: Option<Tensor>,
    held: Vec<Tensor>,
}

impl Exchange {
    /// `bytes` on the device, `[n]` in u8, whatever that does meanwhile: the host waits for the copy alone. What is told to read them must be
    /// followed by [`Self::hold`].
    ///
    /// # Errors
    /// When the device fails.
    pub fn send(&mut self, bytes: &[u8], device: &Device) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if device.is_cuda() {
            let beside = match self.beside.take() {
                Some(beside) => beside,
                None => super::cuda::SecondStream::new(device)?,
            };
            return self.beside.insert(beside).copied(bytes);
        }
        Tensor::from_slice(bytes, bytes.len(), device)
    }

    /// Keeps what was sent until the device has read it.
    pub fn hold(&mut self, sent: Tensor) {
        self.held.push(sent);
    }

    /// The device has done all that it was told before.
    pub fn release(&mut self) {
        self.held.clear();
    }

    /// Starts to read `tensor`, in u32, as soon as it is there. Does not wait; what was being read before is forgotten.
    ///
    /// # Errors
    /// When the device fails.
    pub fn start_reading(&mut self, tensor: &Tensor) -> Result<()> {
        #[cfg(feature = "cuda")]
        if tensor.device().is_cuda() {
            super::cuda::pinned::Pinned::with_room(&mut self.pinned, tensor)?.start(tensor)?;
        }
        self.under_way = Some(tensor.clone());
        Ok(())
    }

    /// Waits for what is being read, and for nothing that the device was told after it.
    ///
    /// # Errors
    /// When the device fails, or nothing is being read.
    pub fn finish_reading(&mut self) -> Result<Vec<u32>> {
        let Some(tensor) = self.under_way.take() else {
            candle_core::bail!("nothing is being read: this is a bug")
        };
        let read = self.read(&tensor)?;
        // It came after all that reads what was sent.
        self.release();
        Ok(read)
    }

    fn read(&mut self, tensor: &Tensor) -> Result<Vec<u32>> {
        #[cfg(feature = "cuda")]
        if let Some(pinned) = self.pinned.as_mut().filter(|_| tensor.device().is_cuda()) {
            return pinned.finish(tensor.elem_count());
        }
        tensor.flatten_all()?.to_vec1()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    fn exchanges(device: &Device) {
        let mut exchange = Exchange::default();
        for len in [3u32, 5000, 2] {
            let bytes: Vec<u8> = (0..2 * len).map(|i| (i * i) as u8).collect();
            let sent = exchange.send(&bytes, device).unwrap();
            let tensor = sent.to_dtype(DType::U32).unwrap().reshape((2, len as usize)).unwrap();
            let rows: Vec<u32> = bytes.into_iter().map(u32::from).collect();
            exchange.start_reading(&tensor).unwrap();
            assert_eq!(exchange.finish_reading().unwrap(), rows);
            assert!(exchange.finish_reading().is_err());
        }
    }

    #[test]
    fn what_is_sent_is_what_is_read() {
        exchanges(&Device::Cpu);
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn what_is_sent_there_is_what_is_read_where_there_is_a_gpu() {
        if let Some(gpu) = super::super::cuda::testing::gpu() {
            exchanges(&gpu);
        }
    }
}
