//! The structures that pass between scheduler and engine: what to run, and what came of it.

use std::ops::Range;

use super::{SequenceId, StopReason, TokenId, VideoDigest};

/// Frames of one video to encode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodeWork {
    /// The sequence that holds the pixels.
    pub sequence: SequenceId,
    /// Which of its videos.
    pub video: usize,
    pub digest: VideoDigest,
    pub frames: Range<usize>,
    /// Whether the video is complete after these frames, so that the connector can run.
    pub is_last: bool,
}

/// Tokens of one sequence to run through the decoder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ComputeWork {
    pub sequence: SequenceId,
    /// Positions `[a, b)` of the sequence; all before `a` are in the cache.
    pub positions: Range<usize>,
    /// Whether the logits of the last position give a new token.
    pub samples: bool,
}

/// One step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Sequences admitted just now, with how many of their prompt tokens the prefix cache held.
    pub admitted: Vec<(SequenceId, usize)>,
    /// Videos whose encoded tokens must be dropped, before anything is encoded.
    pub drop_videos: Vec<VideoDigest>,
    pub encode: Vec<EncodeWork>,
    /// What is encoded in the step after it, if nothing else comes and no sequence ends.
    pub next_encode: Vec<EncodeWork>,
    /// Decodes first, then prefill chunks.
    pub compute: Vec<ComputeWork>,
    /// How many of `compute` are decodes.
    pub num_decodes: usize,
}

impl StepPlan {
    /// Whether the step does nothing.
    pub fn is_empty(&self) -> bool {
        self.encode.is_empty() && self.compute.is_empty()
    }
}

/// What a client has to hear of its sequence after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceUpdate {
    pub sequence: SequenceId,
    /// The new token; none when it was an end token.
    pub token: Option<TokenId>,
    pub finished: Option<StopReason>,
}
