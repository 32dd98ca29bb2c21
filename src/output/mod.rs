//! From token ids to text, stop strings and think/answer events.
//!
//! Called by `http/generation.rs` and the commands; pure state machines, one for streaming and unary replies.

use crate::scheduler::{StopReason, TokenId, TokenLogprobs};

mod answer;
mod content_stops;
mod detokenizer;
mod options;
mod reply;
mod segmenter;
mod stop_matcher;
mod stream;
mod token_places;

pub use answer::Answer;
pub use options::{Options, WatchedLetters};
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

/// A token of the reply with its log probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredToken {
    pub id: TokenId,
    pub logprobs: Box<TokenLogprobs>,
    /// Whether it belongs to the thinking, tags included.
    pub thinking: bool,
}

/// What a client is told.
#[derive(Debug, Clone, PartialEq)]
pub enum OutputEvent {
    /// More text of one segment, never empty; with the scored tokens that have become certain since the last event.
    Delta { segment: Segment, text: String, tokens: Vec<ScoredToken> },
    /// The end.
    Finished(Ending),
}

/// How a reply ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Ending {
    pub reason: StopReason,
    /// Tokens of the thinking, tags included.
    pub reasoning_tokens: usize,
    /// Tokens in all.
    pub completion_tokens: usize,
    /// Scored tokens that went with no delta.
    pub tokens: Vec<ScoredToken>,
    pub answer: Answer,
}
