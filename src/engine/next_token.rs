//! The next token of one sequence: what a device is told to choose it by, and what it is in the end.
//!
//! Called by the runner, for all sequences of a step at once.

use std::{
    cell::Cell,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{
    guidance::{Allowed, Guide},
    logits::Row,
    logprobs, sampler,
};
use crate::{
    model::{ModelError, Result, device::Choice},
    scheduler::{SamplingParams, TokenId, TokenLogprobs, sequence::Sequence},
};

/// The next token of a sequence, and what its request asked to know of the choice.
#[derive(Debug)]
pub struct Sampled {
    pub token: TokenId,
    pub logprobs: Option<Box<TokenLogprobs>>,
}

/// What decides on the next token of a sequence, beside its logits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asker<'a> {
    pub sequence: &'a Sequence,
    pub params: &'a SamplingParams,
    pub guide: Option<&'a Mutex<Guide>>,
}

impl<'a> Asker<'a> {
    /// Tokens that may come.
    pub(super) fn num_left(&self) -> usize {
        self.params.max_tokens - self.sequence.completion().len()
    }

    /// How a device chooses the token among the ids below `num_ids`; none where all logits are needed.
    pub(super) fn choice(&self, num_ids: usize) -> Option<Choice> {
        let Asker { sequence, params, .. } = self;
        let tokens = sequence.token_ids();
        let draw = sampler::draw_on_device(params, tokens.len());
        if logprobs::is_asked_for(params) || (params.temperature > 0.0 && draw.is_none()) {
            return None;
        }
        let num_words = num_ids.div_ceil(32);
        let mask = match self
            .guide
            .map(locked)
            .as_mut()
            .map(|guide| guide.ask(sequence.completion(), self.num_left()))
        {
            None | Some(Allowed::All) => None,
            Some(Allowed::Mask(mask) | Allowed::MaskAgain(mask)) => {
                Some(mask.as_slice().get(..num_words)?.to_vec())
            }
            Some(Allowed::Only(token)) => {
                let mut mask = vec![0; num_words];
                *mask.get_mut(token as usize / 32)? |= 1 << (token % 32);
                return Some(Choice { mask: Some(mask), ..Choice::default() });
            }
        };
        let adjustments = sampler::adjustments(params, tokens, sequence.num_prompt_tokens());
        Some(Choice { adjustments, mask, draw })
    }

    /// The token by what there is of its logits; none where the device has chosen one that may not come, and all of them are needed.
    ///
    /// # Errors
    /// When none of them is a number above minus infinity.
    pub(super) fn sample(&self, row: Row<'_>) -> Result<Option<Sampled>> {
        let Asker { sequence, params, .. } = self;
        let (tokens, num_prompt) = (sequence.token_ids(), sequence.num_prompt_tokens());
        let plain = |token| Sampled { token, logprobs: None };
        match row {
            Row::Nothing => Err(ModelError::Msg("the model produced no finite logit".into())),
            Row::Token(chosen) => {
                // The first question is the one by which the device has chosen. Any other it has not heard.
                let (num_asked, is_decided) = (Cell::new(0), Cell::new(true));
                let token = self.guided(|allowed| {
                    let token = if let Allowed::Only(token) = allowed { token } else { chosen };
                    is_decided.set(
                        is_decided.get() && (num_asked.get() == 0 || matches!(allowed, Allowed::Only(_))),
                    );
                    num_asked.set(num_asked.get() + 1);
                    token
                });
                Ok(is_decided.get().then(|| plain(token)))
            }
            Row::Adjusted(row) => {
                let sample =
                    |allowed: Allowed<'_>| sampler::sample_adjusted(row, params, tokens.len(), allowed);
                Ok(Some(plain(self.guided(sample))))
            }
            Row::Logits(row) => {
                let sample = |allowed: Allowed<'_>| sampler::sample(row, params, tokens, num_prompt, allowed);
                let token = self.guided(sample);
                Ok(Some(Sampled { token, logprobs: logprobs::report(row, params, token) }))
            }
        }
    }

    fn guided(&self, sample: impl Fn(Allowed<'_>) -> TokenId) -> TokenId {
        match self.guide {
            None => sample(Allowed::All),
            Some(guide) => locked(guide).choose(self.sequence.completion(), self.num_left(), sample),
        }
    }
}

fn locked(guide: &Mutex<Guide>) -> MutexGuard<'_, Guide> {
    guide.lock().unwrap_or_else(PoisonError::into_inner)
}
