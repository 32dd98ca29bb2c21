//! Where each token of a reply stands: in the thinking or not, and with which delta its log probabilities go out.
//!
//! Used by [`super::stream`]. Text is held back while it may become a tag or a stop string; so are its tokens. A token
//! counts where its last byte stands.

use std::collections::VecDeque;

use super::ScoredToken;
use crate::scheduler::{TokenId, TokenLogprobs};

/// A token whose place is not certain yet.
#[derive(Debug)]
pub(super) struct OpenToken {
    /// The bytes `[start, end)` of the reply came with it.
    pub start: usize,
    pub end: usize,
    id: TokenId,
    pub logprobs: Option<Box<TokenLogprobs>>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct TokenPlaces {
    open: VecDeque<OpenToken>,
    num_bytes: usize,
    /// Bytes of the reply whose segment is known.
    resolved_bytes: usize,
    /// Tokens of the thinking, tags included.
    pub num_reasoning: usize,
    /// With a certain place, not handed out yet.
    placed: Vec<ScoredToken>,
}

impl TokenPlaces {
    /// The next token brought this much text.
    pub(super) fn push(&mut self, id: TokenId, num_bytes: usize, logprobs: Option<Box<TokenLogprobs>>) {
        let start = self.num_bytes;
        self.num_bytes += num_bytes;
        self.open.push_back(OpenToken { start, end: self.num_bytes, id, logprobs });
    }

    /// Where the text begins whose segment is not known yet.
    pub(super) fn resolved_bytes(&self) -> usize {
        self.resolved_bytes
    }

    /// The token that brought the byte at `position`, if that is not resolved yet.
    pub(super) fn at(&self, position: usize) -> Option<&OpenToken> {
        self.open.iter().find(|token| position < token.end)
    }

    /// The next bytes of the text belong to the thinking, or not.
    pub(super) fn resolve(&mut self, num_bytes: usize, thinking: bool) {
        self.resolved_bytes += num_bytes;
        while self.open.front().is_some_and(|token| token.end <= self.resolved_bytes)
            && let Some(token) = self.open.pop_front()
        {
            self.place(token, thinking);
        }
    }

    /// The rest was cut off where it was.
    pub(super) fn finish(&mut self, thinking: bool) {
        while let Some(token) = self.open.pop_front() {
            self.place(token, thinking);
        }
    }

    /// Scored tokens that have found their place since the last call.
    pub(super) fn take_placed(&mut self) -> Vec<ScoredToken> {
        std::mem::take(&mut self.placed)
    }

    fn place(&mut self, token: OpenToken, thinking: bool) {
        self.num_reasoning += usize::from(thinking);
        if let Some(logprobs) = token.logprobs {
            self.placed.push(ScoredToken { id: token.id, logprobs, thinking });
        }
    }
}
