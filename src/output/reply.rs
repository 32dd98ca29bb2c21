//! A whole reply, folded from its events.
//!
//! Used by `http` for unary replies and by the commands: the one generation path is the stream.

use super::{Answer, Ending, OutputEvent, ScoredToken, Segment};
use crate::scheduler::StopReason;

/// A whole reply.
#[derive(Debug, Clone, PartialEq)]
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
    /// All tokens with their log probabilities, if they were asked for.
    pub tokens: Vec<ScoredToken>,
    pub answer: Answer,
}

impl Default for Reply {
    fn default() -> Self {
        Reply {
            think: String::new(),
            content: String::new(),
            reason: StopReason::Aborted,
            reasoning_tokens: 0,
            completion_tokens: 0,
            tokens: Vec::new(),
            answer: Answer::default(),
        }
    }
}

impl Reply {
    /// Takes the next event.
    pub fn add(&mut self, event: OutputEvent) {
        match event {
            OutputEvent::Delta { segment, text, tokens } => {
                match segment {
                    Segment::Think => self.think.push_str(&text),
                    Segment::Answer | Segment::Plain => self.content.push_str(&text),
                }
                self.tokens.extend(tokens);
            }
            OutputEvent::Finished(Ending { reason, reasoning_tokens, completion_tokens, tokens, answer }) => {
                self.reason = reason;
                self.reasoning_tokens = reasoning_tokens;
                self.completion_tokens = completion_tokens;
                self.tokens.extend(tokens);
                self.answer = answer;
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
