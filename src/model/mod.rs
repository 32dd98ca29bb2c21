//! The network: from pixels and token ids to logits.
//!
//! Called by [`crate::engine`]. Imports candle and its own kernels only.

use std::sync::Arc;

/// Frames of one video at the model's input size, 8-bit RGB.
#[derive(Clone, PartialEq, Eq)]
pub struct FrameBatch {
    /// `[num_frames, size, size, 3]`, row-major.
    pub rgb: Arc<[u8]>,
    /// Side of the square, pixels.
    pub size: usize,
}

impl FrameBatch {
    /// How many frames there are.
    pub fn num_frames(&self) -> usize {
        self.rgb.len() / (self.size * self.size * 3).max(1)
    }
}

impl std::fmt::Debug for FrameBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FrameBatch({} frames of {}x{})", self.num_frames(), self.size, self.size)
    }
}

pub mod checkpoint;
pub mod config;
pub mod embedded;
mod folders;
pub mod hub;
pub mod layout;
pub mod presets;
mod shards;
pub mod synth;
pub mod weights;
