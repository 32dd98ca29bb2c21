//! Encoded videos: features while the tower works through the frames, visual tokens once the connector has run.
//!
//! Owned by the runner. What is kept and what is dropped is the scheduler's decision.

use std::collections::HashMap;

use crate::{
    model::{Result, Tensor},
    scheduler::VideoDigest,
};

#[derive(Debug, Default)]
pub(super) struct EncoderCache {
    /// Features of the frames so far, one tensor `[frames x patches, vision_hidden]` an encode call.
    partial: HashMap<VideoDigest, Vec<Tensor>>,
    /// `[visual_tokens, hidden]`
    done: HashMap<VideoDigest, Tensor>,
}

impl EncoderCache {
    pub(super) fn drop_video(&mut self, digest: &VideoDigest) {
        self.partial.remove(digest);
        self.done.remove(digest);
    }

    pub(super) fn push(&mut self, digest: VideoDigest, features: Tensor) {
        self.partial.entry(digest).or_default().push(features);
    }

    /// All features of a video, `[all frames x patches, vision_hidden]`; they are kept no longer.
    pub(super) fn take_features(&mut self, digest: &VideoDigest) -> Result<Tensor> {
        Tensor::cat(&self.partial.remove(digest).unwrap_or_default(), 0)
    }

    pub(super) fn finish(&mut self, digest: VideoDigest, visual_tokens: Tensor) {
        self.done.insert(digest, visual_tokens);
    }

    pub(super) fn visual_tokens(&self, digest: &VideoDigest) -> Option<&Tensor> {
        self.done.get(digest)
    }
}
