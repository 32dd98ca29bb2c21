//! When the thinking of a sequence ends: by its budget, on demand, or early enough for the answer.
//!
//! Owned by [`super::Guide`]. Costs nothing until the thinking is due: only then the tokens so far are looked at.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use llguidance::TokenParser;
use toktrie::SimpleVob;

use crate::scheduler::TokenId;

/// "Answer now": set from outside, seen by every sequence of a request at its next step.
#[derive(Debug, Clone, Default)]
pub struct EndThinking(Arc<AtomicBool>);

impl EndThinking {
    /// Asks for the end of the thinking. It stays asked for.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// How the thinking of one sequence is watched and closed.
pub struct ThinkingGuide {
    /// Accepts a reply from its beginning to the tag that opens the answer, and no further.
    pub head: TokenParser,
    /// What begins a reply.
    pub opening: Vec<TokenId>,
    /// What closes the thinking and opens the answer.
    pub closing: Vec<TokenId>,
    /// What may follow the closing: tokens that begin with the end of its tag.
    pub after_closing: Arc<SimpleVob>,
    /// Most tokens before the closing.
    pub budget: Option<usize>,
    pub end: EndThinking,
}

impl std::fmt::Debug for ThinkingGuide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ThinkingGuide").field("budget", &self.budget).finish_non_exhaustive()
    }
}

pub(super) struct Thinking {
    guide: ThinkingGuide,
    /// Tokens the head has taken in.
    num_seen: usize,
    is_over: bool,
}

impl Thinking {
    pub(super) fn new(guide: ThinkingGuide) -> Self {
        Thinking { guide, num_seen: 0, is_over: false }
    }

    /// For another sequence of the same request.
    pub(super) fn for_another(&self) -> Self {
        let guide = ThinkingGuide {
            head: self.guide.head.deep_clone(),
            opening: self.guide.opening.clone(),
            closing: self.guide.closing.clone(),
            after_closing: self.guide.after_closing.clone(),
            budget: self.guide.budget,
            end: self.guide.end.clone(),
        };
        Thinking { guide, ..*self }
    }

    /// Whether the budget is spent or the end was asked for.
    pub(super) fn is_due(&self, num_tokens: usize) -> bool {
        !self.is_over
            && (self.guide.end.is_requested() || self.guide.budget.is_some_and(|budget| num_tokens >= budget))
    }

    /// Whether the answer has not begun after `completion`, which only grows from call to call.
    pub(super) fn is_open(&mut self, completion: &[TokenId]) -> bool {
        for &token in completion.get(self.num_seen..).unwrap_or_default() {
            let taken = !self.is_over && self.guide.head.consume_token(token).is_ok();
            // The head is complete with the tag that opens the answer, and a token may reach beyond it.
            self.is_over |= !taken || self.guide.head.is_accepting();
        }
        self.num_seen = completion.len();
        !self.is_over
    }

    pub(super) fn num_closing(&self) -> usize {
        self.guide.opening.len() + self.guide.closing.len() + 1 /* the end of the tag */
    }

    pub(super) fn after_closing(&self) -> &SimpleVob {
        &self.guide.after_closing
    }

    /// What closes the thinking after `completion`; `None` when it is over, or when this is no place for it: amid a
    /// character or a tag.
    pub(super) fn closing(&mut self, completion: &[TokenId]) -> Option<Vec<TokenId>> {
        if !self.is_open(completion) {
            return None;
        }
        let from_start = [self.guide.opening.as_slice(), &self.guide.closing].concat();
        let mut fits = |phrase: &[TokenId]| {
            self.guide.head.validate_tokens_raw(phrase).is_ok_and(|taken| taken == phrase.len())
        };
        if fits(&self.guide.closing.clone()) {
            Some(self.guide.closing.clone())
        } else if fits(&from_start) {
            Some(from_start)
        } else {
            None
        }
    }
}
