//! From token ids to text, stop strings and think/answer events.
//!
//! Called by `http/generation.rs` and the commands; pure state machines, one for streaming and unary replies.

use crate::scheduler::StopReason;

mod detokenizer;
mod reply;
mod segmenter;
mod stop_matcher;
mod stream;

pub use reply::{Reply, collect};
pub use segmenter::Verbatim;
pub use stream::OutputAssembler;

/// Which part of the reply a piece of text belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Segment {
    Think,
    /// Inside the answer tags.
    Answer,
    /// A reply without tags.
    Plain,
}

/// What a client is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputEvent {
    /// More text of one segment; never empty.
    Delta { segment: Segment, text: String },
    /// The end: why, and how many tokens belonged to the thinking (tags included) and in all.
    Finished { reason: StopReason, reasoning_tokens: usize, completion_tokens: usize },
}
