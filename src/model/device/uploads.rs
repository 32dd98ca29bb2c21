//! Frames on their way to the device: those of the next videos travel while it encodes these.
//!
//! Owned by [`super::DeviceModel`].

use std::ops::Range;

use candle_core::Device;

use super::{
    super::{FrameBatch, Result, Tensor},
    exchange::Exchange,
};

/// Some frames of a video.
pub type Frames<'a> = (&'a FrameBatch, Range<usize>);

/// See the module.
#[derive(Debug)]
pub struct Uploads {
    device: Device,
    exchange: Exchange,
    uploaded: Vec<Uploaded>,
}

/// Frames that are there before they are asked for.
#[derive(Debug)]
struct Uploaded {
    frames: FrameBatch,
    range: Range<usize>,
    /// `[len x size x size x 3]` in u8.
    bytes: Tensor,
}

impl Uploads {
    /// None yet.
    pub fn new(device: &Device) -> Self {
        Uploads { device: device.clone(), exchange: Exchange::default(), uploaded: vec![] }
    }

    /// The bytes of these frames behind one another, `[frames x size x size x 3]` in u8. What else was copied ahead is forgotten.
    pub fn bytes(&mut self, videos: &[Frames<'_>]) -> Result<Tensor> {
        let uploaded = std::mem::take(&mut self.uploaded);
        let mut parts = Vec::with_capacity(videos.len());
        for (frames, range) in videos {
            let is_it = |one: &&Uploaded| one.frames.is_same(frames) && one.range == *range;
            if let Some(there) = uploaded.iter().find(is_it) {
                self.exchange.hold(there.bytes.clone());
                parts.push(there.bytes.clone());
            } else {
                let bytes = frames.frames(range.clone());
                parts.push(Tensor::from_slice(bytes, bytes.len(), &self.device)?);
            }
        }
        Tensor::cat(&parts, 0)
    }

    /// Copies these frames while the device does what it was told before.
    pub fn start(&mut self, videos: &[Frames<'_>]) -> Result<()> {
        self.uploaded.clear();
        for (frames, range) in videos {
            let bytes = self.exchange.send(frames.frames(range.clone()), &self.device)?;
            self.uploaded.push(Uploaded { frames: (*frames).clone(), range: range.clone(), bytes });
        }
        Ok(())
    }

    /// The device has done all that it was told.
    pub fn release(&mut self) {
        self.exchange.release();
    }
}
