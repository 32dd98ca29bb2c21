//! What steers a sequence besides its sampling: the grammar of its reply, and the end of its thinking.
//!
//! Made on the blocking pool by `http/guide.rs`, asked by the runner before each token and told of it by the worker after.
//! Knows tokens and grammars only. A sequence without guide pays nothing.

mod answer;
mod completion;
#[cfg(test)]
pub(super) mod tests;
mod thinking;

use std::collections::VecDeque;

use llguidance::TokenParser;
use toktrie::SimpleVob;

use crate::scheduler::TokenId;
use answer::Answer;
pub use answer::GuideTokens;
use thinking::Thinking;
pub use thinking::{EndThinking, ThinkingGuide};

/// Tokens left when the thinking is closed at the latest, beyond what closing and answer take: the place may be amid a
/// character.
const SLACK: usize = 4;

/// Most tokens kept for an answer whose length is open; less where a quarter of all is less.
const MAX_SHARE: usize = 256;

/// What the sampler may choose.
#[derive(Debug, Clone, Copy)]
pub enum Allowed<'a> {
    All,
    /// The tokens whose bits are set. At least one is.
    Mask(&'a SimpleVob),
    /// The same after a free choice that may not stand: drawn anew, or what was refused would decide the outcome.
    MaskAgain(&'a SimpleVob),
    Only(TokenId),
}

/// The grammar of a reply.
pub struct AnswerGuide {
    pub tokens: GuideTokens,
    /// Accepts whole replies, up to [`GuideTokens::end`].
    pub parser: TokenParser,
    /// The same again, with a lexer of its own: a search can never use up what the masks may cost.
    pub probe: TokenParser,
    /// And again, with more patience: for the one search before the reply begins.
    pub search: TokenParser,
    /// Whether the reply is over where the grammar may end.
    pub ends_at_once: bool,
    /// Tokens of the longest answer, to be kept for it when the thinking is closed; `None`: a share of all.
    pub num_reserved: Option<usize>,
}

impl std::fmt::Debug for AnswerGuide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AnswerGuide").field("num_reserved", &self.num_reserved).finish_non_exhaustive()
    }
}

/// Steers one sequence.
pub struct Guide {
    thinking: Option<Thinking>,
    answer: Option<Answer>,
    num_reserved: Option<usize>,
    /// What comes next, whatever the model says.
    forced: VecDeque<TokenId>,
    /// After that, the end of the closing's tag.
    ends_tag: bool,
}

/// What comes next.
enum Next<'a> {
    Forced(TokenId),
    Any,
    /// What may follow the closing of the thinking.
    AfterClosing(&'a SimpleVob),
    /// Nearly any token, as long as the answer is far.
    OfThinking(&'a mut Answer),
    OfGrammar(&'a mut Answer),
}

/// No end of a grammar could be found.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("no reply that satisfies it could be found")]
pub struct NoEnd;

impl Guide {
    /// With `thinking` the reply begins with it; with `answer` the whole reply follows a grammar.
    ///
    /// # Errors
    /// When no reply of the grammar can be found with bounded effort.
    pub fn new(thinking: Option<ThinkingGuide>, answer: Option<AnswerGuide>) -> Result<Self, NoEnd> {
        let num_reserved = answer.as_ref().and_then(|answer| answer.num_reserved);
        let answer = answer.map(|answer| Answer::new(answer).ok_or(NoEnd));
        let thinking = thinking.map(Thinking::new);
        Ok(Guide {
            thinking,
            answer: answer.transpose()?,
            num_reserved,
            forced: VecDeque::new(),
            ends_tag: false,
        })
    }

    /// Tokens of the shortest whole reply there is.
    pub fn min_tokens(&self) -> usize {
        self.answer.as_ref().map_or(0, Answer::num_shortest)
    }

    /// Chooses the token after `completion` by what `sample` says of it; `num_left` tokens may come, this one included.
    /// Called twice at the same place, it says the same.
    pub fn choose<S: Copy + Into<TokenId>>(
        &mut self,
        completion: &[TokenId],
        num_left: usize,
        sample: impl Fn(Allowed<'_>) -> S,
    ) -> S {
        match self.next(completion, num_left) {
            Next::Forced(token) => sample(Allowed::Only(token)),
            Next::Any => sample(Allowed::All),
            Next::AfterClosing(mask) => sample(Allowed::Mask(mask)),
            Next::OfThinking(answer) => answer.choose_freely(num_left, sample),
            Next::OfGrammar(answer) => answer.choose(num_left, sample),
        }
    }

    /// What [`Guide::choose`] will ask `sample` for first, unless the end of the thinking is demanded meanwhile: then only for a token that
    /// is known.
    pub fn ask(&mut self, completion: &[TokenId], num_left: usize) -> Allowed<'_> {
        match self.next(completion, num_left) {
            Next::Forced(token) => Allowed::Only(token),
            Next::Any | Next::OfThinking(_) => Allowed::All,
            Next::AfterClosing(mask) => Allowed::Mask(mask),
            Next::OfGrammar(answer) => answer.ask(num_left),
        }
    }

    fn next(&mut self, completion: &[TokenId], num_left: usize) -> Next<'_> {
        let is_thinking = self.close_in_time(completion, num_left);
        if let Some(&token) = self.forced.front() {
            return Next::Forced(token);
        }
        match &mut self.answer {
            // A grammar knows itself what ends the tag.
            None => match &self.thinking {
                Some(thinking) if self.ends_tag => Next::AfterClosing(thinking.after_closing()),
                _ => Next::Any,
            },
            Some(answer) => match is_thinking && answer.is_far(num_left) {
                true => Next::OfThinking(answer),
                false => Next::OfGrammar(answer),
            },
        }
    }

    /// The token that was chosen; tells whether the reply is complete with it.
    pub fn advance(&mut self, token: TokenId) -> bool {
        match self.forced.front() {
            Some(&forced) if forced == token => drop(self.forced.pop_front()),
            Some(_) => {}
            None => self.ends_tag = false,
        }
        self.answer.as_mut().is_some_and(|answer| answer.advance(token))
    }

    /// Decides on closing the thinking; tells whether it goes on.
    fn close_in_time(&mut self, completion: &[TokenId], num_left: usize) -> bool {
        let Some(thinking) = &mut self.thinking else { return false };
        let due = thinking.is_due(completion.len());
        let Some(answer) = &self.answer else {
            if due && self.forced.is_empty() {
                self.forced.extend(thinking.closing(completion).unwrap_or_default());
                self.ends_tag |= !self.forced.is_empty();
            }
            return true;
        };
        let share = MAX_SHARE.min((completion.len() + num_left) / 4);
        let num_reserved = self.num_reserved.unwrap_or(share).max(answer.num_shortest());
        let must_close = num_left <= thinking.num_closing() + num_reserved + SLACK;
        if (due || must_close) && self.forced.is_empty() {
            let closing = thinking.closing(completion);
            let fits = |closing: &Vec<TokenId>| closing.len() + answer.num_shortest() <= num_left;
            self.forced.extend(closing.filter(fits).unwrap_or_default());
        }
        thinking.is_open(completion)
    }
}

impl Clone for Guide {
    /// For another sequence of the same request: nothing of the state is shared.
    fn clone(&self) -> Self {
        Guide {
            thinking: self.thinking.as_ref().map(Thinking::for_another),
            answer: self.answer.as_ref().map(Answer::for_another),
            num_reserved: self.num_reserved,
            forced: self.forced.clone(),
            ends_tag: self.ends_tag,
        }
    }
}

impl std::fmt::Debug for Guide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (thinking, answer) = (self.thinking.is_some(), self.answer.is_some());
        f.debug_struct("Guide").field("thinking", &thinking).field("answer", &answer).finish_non_exhaustive()
    }
}
