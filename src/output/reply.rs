//! A whole reply, folded from its events.
//!
//! Used by `http` for unary replies and by the commands: the one generation path is the stream.

use super::{OutputEvent, Segment};
use crate::scheduler::StopReason;

/// A whole reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Text of the think segment, without tags.
    pub think: String,
    /// Text of the answer segment, without tags, or a reply without tags.
    pub content: String,
    /// Why it ended; aborted as long as it has not.
    pub reason: StopReason,
    /// Tokens of the thinking, tags included.
    pub reasoning_tokens: usize,
    /// Tokens in all.
    pub completion_tokens: usize,
}

impl Default for Reply {
    fn default() -> Self {
        Reply {
            think: String::new(),
            content: String::new(),
            reason: StopReason::Aborted,
            reasoning_tokens: 0,
            completion_tokens: 0,
        }
    }
}

impl Reply {
    /// Takes the next event.
    pub fn add(&mut self, event: OutputEvent) {
        match event {
            OutputEvent::Delta { segment: Segment::Think, text } => self.think.push_str(&text),
            OutputEvent::Delta { segment: Segment::Answer | Segment::Plain, text } => {
                self.content.push_str(&text)
            }
            OutputEvent::Finished { reason, reasoning_tokens, completion_tokens } => {
                self.reason = reason;
                self.reasoning_tokens = reasoning_tokens;
                self.completion_tokens = completion_tokens;
            }
        }
    }
}

/// Folds the events of one reply.
pub fn collect(events: impl IntoIterator<Item = OutputEvent>) -> Reply {
    let mut reply = Reply::default();
    events.into_iter().for_each(|event| reply.add(event));
    reply
}
