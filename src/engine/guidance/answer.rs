//! The grammar of one reply: which tokens may follow, and that its end is always within reach.
//!
//! Owned by [`super::Guide`]. The invariant: an end of the reply is known that fits the tokens left. A token after which
//! there would be none is not taken; the next token of the known end is taken instead.

use std::sync::Arc;

use llguidance::TokenParser;
use toktrie::{SimpleVob, TokTrie};

use super::{
    Allowed, AnswerGuide,
    completion::{self, FEW_BYTES, MANY_BYTES},
};
use crate::scheduler::TokenId;

/// The tokens of a model, as grammars see them.
#[derive(Clone)]
pub struct GuideTokens {
    /// Bytes of each token. The last one is [`GuideTokens::end`]; special tokens have none.
    pub trie: Arc<TokTrie>,
    /// Stands for the end of a reply in grammars; no token of the model.
    pub end: TokenId,
    /// What the model ends a reply with.
    pub end_token_ids: Vec<TokenId>,
}

impl std::fmt::Debug for GuideTokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GuideTokens({})", self.end)
    }
}

impl GuideTokens {
    /// Tokens that end a tag with `tag_end` and begin what stands in it; the end alone where there are none, as in a
    /// vocabulary of bytes.
    pub fn after_tag(&self, tag_end: &[u8]) -> SimpleVob {
        let mut allowed = self.trie.alloc_token_set();
        let begins_text = |id: &TokenId| {
            let first = self.trie.token(*id).strip_prefix(tag_end).and_then(<[u8]>::first);
            first.is_some_and(|first| !first.is_ascii_whitespace() && !first.is_ascii_punctuation())
        };
        (0..self.end).filter(begins_text).for_each(|id| allowed.allow_token(id));
        if allowed.is_zero() {
            self.trie.greedy_tokenize(tag_end).first().into_iter().for_each(|&id| allowed.allow_token(id));
        }
        allowed
    }

    /// How grammars spell the end of a reply.
    fn end_bytes(&self) -> Vec<u8> {
        [&[TokTrie::SPECIAL_TOKEN_MARKER], format!("[{}]", self.end).as_bytes()].concat()
    }

    /// Few tokens with exactly these bytes.
    fn tokenize(&self, bytes: &[u8]) -> Option<Vec<TokenId>> {
        let tokens = self.trie.greedy_tokenize(bytes);
        let num_bytes: usize = tokens.iter().map(|&token| self.trie.token_len(token)).sum();
        (num_bytes == bytes.len()).then_some(tokens)
    }

    fn bytes(&self, tokens: &[TokenId]) -> Vec<u8> {
        tokens.iter().flat_map(|&token| self.trie.token(token)).copied().collect()
    }
}

/// Tokens that the way from amid a tag to the answer may take at most: every byte one of its own.
const TAGS: usize = 32;

pub(super) struct Answer {
    tokens: GuideTokens,
    end_bytes: Vec<u8>,
    /// Computes the masks.
    parser: TokenParser,
    /// Answers "what if".
    probe: TokenParser,
    /// The reply ends where its grammar can, as at a closing tag; otherwise the model decides.
    ends_at_once: bool,
    /// An end of the reply from here.
    plan: Option<Vec<TokenId>>,
    /// The plan if this token comes next.
    next: Option<(TokenId, Vec<TokenId>)>,
    /// Tokens of a shortest reply.
    num_shortest: usize,
    /// What was asked last, with so many tokens left.
    asked: Option<(usize, Asked)>,
}

/// What comes first where a token is to be chosen.
#[derive(Debug, Clone)]
struct Asked {
    /// The next token of the known end, and how many there are.
    planned: Option<(TokenId, usize)>,
    /// None where the end must be followed, or nothing is known.
    mask: Option<SimpleVob>,
}

impl Asked {
    fn allowed(&self) -> Allowed<'_> {
        match (&self.mask, self.planned) {
            (Some(mask), _) => Allowed::Mask(mask),
            (None, Some((token, _))) => Allowed::Only(token),
            (None, None) => Allowed::All,
        }
    }
}

impl Answer {
    /// `None` when no end of the grammar can be found.
    pub(super) fn new(guide: AnswerGuide) -> Option<Self> {
        let AnswerGuide { tokens, parser, probe, mut search, ends_at_once, .. } = guide;
        let end_bytes = tokens.end_bytes();
        let plan = completion::shortest(&mut search, &[], &end_bytes, MANY_BYTES)?;
        let plan = tokens.tokenize(&plan)?;
        let num_shortest = plan.len();
        let plan = Some(plan);
        let (next, asked) = (None, None);
        Some(Answer { tokens, end_bytes, parser, probe, ends_at_once, plan, next, num_shortest, asked })
    }

    /// For another sequence of the same request.
    pub(super) fn for_another(&self) -> Self {
        Answer {
            tokens: self.tokens.clone(),
            end_bytes: self.end_bytes.clone(),
            parser: self.parser.deep_clone(),
            probe: self.probe.deep_clone(),
            plan: self.plan.clone(),
            next: self.next.clone(),
            asked: self.asked.clone(),
            ..*self
        }
    }

    pub(super) fn num_shortest(&self) -> usize {
        self.num_shortest
    }

    /// Whether so many tokens are left that the way to the answer need not be looked at yet.
    pub(super) fn is_far(&self, num_left: usize) -> bool {
        num_left > self.num_shortest + TAGS
    }

    /// What [`Answer::choose`] asks for first.
    pub(super) fn ask(&mut self, num_left: usize) -> Allowed<'_> {
        let asked = self.take_asked(num_left);
        self.asked.insert((num_left, asked)).1.allowed()
    }

    fn take_asked(&mut self, num_left: usize) -> Asked {
        if let Some((_, asked)) = self.asked.take_if(|(of, _)| *of == num_left) {
            return asked;
        }
        if self.plan.is_none() {
            self.plan = self.end_after(&[]);
        }
        let planned = self.plan.as_ref().map(|plan| match plan.first() {
            Some(&token) => (token, plan.len()),
            None => (self.tokens.end_token_ids[0], 0),
        });
        let fits = planned.is_none_or(|(_, len)| len < num_left);
        Asked { planned, mask: if fits { self.mask() } else { None } }
    }

    /// The next token of `num_left`, where nearly every token may come: the mask is computed only if one comes that may not.
    pub(super) fn choose_freely<S: Copy + Into<TokenId>>(
        &mut self,
        num_left: usize,
        sample: impl Fn(Allowed<'_>) -> S,
    ) -> S {
        let sampled = sample(Allowed::All);
        let bytes = self.tokens.trie.token(sampled.into());
        if !bytes.is_empty() && completion::can_follow(&mut self.probe, bytes) {
            return sampled;
        }
        self.choose(num_left, |allowed| {
            sample(match allowed {
                Allowed::Mask(mask) => Allowed::MaskAgain(mask),
                other => other,
            })
        })
    }

    /// The next token of `num_left`.
    pub(super) fn choose<S: Copy + Into<TokenId>>(
        &mut self,
        num_left: usize,
        sample: impl Fn(Allowed<'_>) -> S,
    ) -> S {
        let asked = self.take_asked(num_left);
        let sampled = sample(asked.allowed());
        let is_known = matches!(asked.allowed(), Allowed::Only(_));
        let chosen =
            if is_known { sampled } else { self.within_reach(sampled, asked.planned, num_left, sample) };
        // Whoever asks again gets the same answer.
        self.asked = Some((num_left, asked));
        chosen
    }

    /// `sampled`, unless no end were within reach after it: then the next token of the known end.
    fn within_reach<S: Copy + Into<TokenId>>(
        &mut self,
        sampled: S,
        planned: Option<(TokenId, usize)>,
        num_left: usize,
        sample: impl Fn(Allowed<'_>) -> S,
    ) -> S {
        let token = sampled.into();
        if self.tokens.end_token_ids.contains(&token) {
            return sampled;
        }
        match (self.plan_after(token, num_left - 1), planned) {
            (Some(plan), _) => {
                self.next = Some((token, plan));
                sampled
            }
            (None, Some((token, _))) => sample(Allowed::Only(token)),
            (None, None) => sampled,
        }
    }

    /// Takes in the token that was chosen; tells whether the reply is complete with it.
    pub(super) fn advance(&mut self, token: TokenId) -> bool {
        self.asked = None;
        self.heal();
        // An error shows in the next mask, which then is missing: the plan is followed.
        let _ = self.parser.consume_token(token);
        let _ = self.probe.consume_token(token);
        self.plan = match (self.next.take(), self.plan.take()) {
            (Some((expected, plan)), _) if expected == token => Some(plan),
            (_, Some(plan)) if plan.first() == Some(&token) => Some(plan[1..].to_vec()),
            _ => None,
        };
        completion::can_follow(&mut self.probe, &self.end_bytes)
            && (self.ends_at_once || !completion::goes_on(&mut self.probe, &self.end_bytes))
    }

    /// `None` when the grammar became too much for the parser.
    fn mask(&mut self) -> Option<SimpleVob> {
        let mut mask = self.parser.compute_mask().ok()?;
        if mask.is_allowed(self.tokens.end) {
            self.tokens.end_token_ids.iter().for_each(|&end| mask.allow_token(end));
        }
        Some(mask)
    }

    /// An end of at most `room` tokens after `token`.
    fn plan_after(&mut self, token: TokenId, room: usize) -> Option<Vec<TokenId>> {
        if let Some(plan) = &self.plan {
            if plan.first() == Some(&token) {
                return Some(plan[1..].to_vec());
            }
            // Most tokens are a part of the known end, or leave it as it is.
            let (bytes, known) = (self.tokens.trie.token(token), self.tokens.bytes(plan));
            let rest = match known.strip_prefix(bytes) {
                Some(rest) => Some(rest),
                None => {
                    let whole = [bytes, &known, &self.end_bytes].concat();
                    completion::can_follow(&mut self.probe, &whole).then_some(known.as_slice())
                }
            };
            let plan = rest.and_then(|rest| self.tokens.tokenize(rest)).filter(|plan| plan.len() <= room);
            if plan.is_some() {
                return plan;
            }
        }
        let trie = self.tokens.trie.clone();
        self.end_after(trie.token(token)).filter(|plan| plan.len() <= room)
    }

    /// A shortest end after `bytes`.
    fn end_after(&mut self, bytes: &[u8]) -> Option<Vec<TokenId>> {
        let end = completion::shortest(&mut self.probe, bytes, &self.end_bytes, FEW_BYTES);
        self.heal();
        self.tokens.tokenize(&end?)
    }

    /// A question may have been too much for the parser that was asked. The other one, at the same place, never heard it.
    fn heal(&mut self) {
        if self.probe.parser.get_error().is_some() {
            self.probe = self.parser.deep_clone();
        }
    }
}
