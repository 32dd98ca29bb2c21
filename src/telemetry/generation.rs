//! What became of a generation: the facts that its log line, its span and the metrics tell.
//!
//! Filled in by `http/progress.rs`.

use std::time::Duration;

/// How many tokens of a finished request were of which kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TokenCounts {
    pub prompt: usize,
    /// Of the prompt: taken from the prefix cache.
    pub cached: usize,
    /// Of the prompt: visual tokens.
    pub video: usize,
    pub completion: usize,
    /// Of the completion: thinking.
    pub reasoning: usize,
}

/// How a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Outcome {
    Completed,
    /// The request was at fault, or there was no room for it.
    Refused,
    /// The server was at fault.
    Failed,
    /// Before there was any other end.
    #[default]
    ClientLeft,
}

impl Outcome {
    pub const ALL: [Outcome; 4] =
        [Outcome::Completed, Outcome::Refused, Outcome::Failed, Outcome::ClientLeft];

    /// On logs, spans and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Completed => "completed",
            Outcome::Refused => "refused",
            Outcome::Failed => "failed",
            Outcome::ClientLeft => "client_left",
        }
    }
}

/// See the module. `None` where it did not get that far.
#[derive(Debug, Clone, Default)]
pub struct GenerationRecord {
    pub outcome: Outcome,
    /// The error's code, or the finish reason.
    pub detail: &'static str,
    pub stream: bool,
    /// Since the request's arrival.
    pub first_token: Option<Duration>,
    pub first_answer_token: Option<Duration>,
    pub num_frames: usize,
    pub num_choices: usize,
    pub tokens: TokenCounts,
    /// Only with `--log-content`.
    pub content: Option<ContentRecord>,
}

/// What was asked and answered. Exists only when the operator wants it on the log.
#[derive(Debug, Clone, Default)]
pub struct ContentRecord {
    pub prompt: String,
    /// One for each choice.
    pub replies: Vec<String>,
}

impl ContentRecord {
    /// Appends to the reply of a choice, up to `max_bytes`.
    pub fn reply(&mut self, choice: usize, text: &str, max_bytes: usize) {
        if self.replies.len() <= choice {
            self.replies.resize(choice + 1, String::new());
        }
        let reply = &mut self.replies[choice];
        let room = max_bytes.saturating_sub(reply.len());
        reply.push_str(&text[..text.floor_char_boundary(room)]);
    }
}
