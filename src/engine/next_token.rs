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
pub(super) struct NextToken<'a> {
    pub sequence: &'a Sequence,
    pub params: &'a SamplingParams,
    pub guide: Option<&'a Mutex<Guide>>,
}

impl NextToken<'_> {
    /// Tokens that may come.
    pub(super) fn num_left(&self) -> usize {
        self.params.max_tokens - self.sequence.completion().len()
    }

    /// How a device chooses the token among the ids below `num_ids`; none where all logits are needed.
    pub(super) fn choice(&self, num_ids: usize) -> Option<Choice> {
        let NextToken { sequence, params, .. } = self;
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
        let NextToken { sequence, params, .. } = self;
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
            Row::Logits { logits, others } => {
                let sample =
                    |allowed: Allowed<'_>| sampler::sample(logits, params, tokens, num_prompt, allowed);
                let token = self.guided(sample);
                Ok(Some(Sampled { token, logprobs: logprobs::report(logits, others, params, token) }))
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

#[cfg(test)]
mod tests {
    use super::{
        super::guidance::{EndThinking, tests::Setup},
        *,
    };
    use crate::{
        prompt::{Constraint, template::THINK_CLOSING},
        scheduler::{Scheduler, SchedulerLimits, SequenceId, SequenceSpec},
    };

    /// Ids of the byte tokenizer, of which the last ends.
    const NUM_IDS: usize = 257;
    const END: TokenId = 256;

    /// A sequence that has got `completion`.
    fn said(completion: &str) -> (Scheduler, SequenceId) {
        let mut scheduler = Scheduler::new(SchedulerLimits {
            block_size: 16,
            num_blocks: 64,
            max_running_sequences: 1,
            max_prefill_tokens: 16,
            max_scored_tokens: 3,
            max_encode_frames: 1,
            max_cached_videos: 1,
            prefix_cache: false,
            end_token_ids: vec![END],
        });
        let id = scheduler.add(SequenceSpec {
            token_ids: vec![1, 2],
            spans: vec![],
            cache_salt: None,
            max_tokens: 300,
            ignore_eos: false,
            stop_token_ids: vec![],
            scores_prompt: false,
        });
        for byte in completion.bytes() {
            let plan = scheduler.schedule();
            scheduler.complete(&plan, &[byte.into()]);
        }
        (scheduler, id)
    }

    /// Logits of which these are the largest, the first of them most.
    fn logits(best: &[TokenId]) -> Vec<f32> {
        let mut logits = vec![0.0; NUM_IDS];
        best.iter().zip([9.0, 8.0, 7.0]).for_each(|(&id, logit)| logits[id as usize] = logit);
        logits
    }

    fn choices() -> Constraint {
        Constraint::Choice(vec!["A".into(), "B".into()])
    }

    #[test]
    fn a_token_that_the_grammar_refuses_is_chosen_again_from_all_logits() {
        let (setup, params) = (Setup::bytes(), SamplingParams::greedy(300));
        let (scheduler, id) = said("");
        let guides = [(); 3].map(|()| Mutex::new(setup.guide(&choices(), true, None)));
        let [next, other, third] = guides.each_ref().map(|guide| NextToken {
            sequence: scheduler.sequence(id).unwrap(),
            params: &params,
            guide: Some(guide),
        });
        // As long as the answer is far, any token may come, but none that ends.
        assert_eq!(next.choice(NUM_IDS), Some(Choice::default()));
        assert!(next.sample(Row::Token(END)).unwrap().is_none());
        let logits = logits(&[END, b'}'.into(), b'<'.into()]);
        let token = next.sample(Row::Adjusted(&logits)).unwrap().unwrap().token;
        assert_eq!(token, other.sample(Row::Logits { logits: &logits, others: &[] }).unwrap().unwrap().token);
        assert_eq!(token, u32::from(b'<'));
        assert_eq!(third.sample(Row::Token(token)).unwrap().unwrap().token, token);
    }

    #[test]
    fn a_device_is_told_what_the_grammar_allows() {
        let (setup, params) = (Setup::bytes(), SamplingParams::greedy(300));
        let (scheduler, id) = said(" ");
        let guide = Mutex::new(setup.guide(&choices(), false, None));
        guide.lock().unwrap().advance(b' '.into());
        let sequence = scheduler.sequence(id).unwrap();
        let next = NextToken { sequence, params: &params, guide: Some(&guide) };
        let mask = next.choice(NUM_IDS).unwrap().mask.unwrap();
        let allowed: Vec<usize> = (0..NUM_IDS).filter(|id| mask[id / 32] >> (id % 32) & 1 == 1).collect();
        assert_eq!(allowed, [b'A', b'B'].map(usize::from));
        assert_eq!(next.sample(Row::Token(b'B'.into())).unwrap().unwrap().token, u32::from(b'B'));
    }

    #[test]
    fn an_end_of_the_thinking_that_is_demanded_meanwhile_is_followed() {
        let (setup, params, end) = (Setup::bytes(), SamplingParams::greedy(300), EndThinking::default());
        let (scheduler, id) = said(" <think>so");
        let guide = Mutex::new(Guide::new(Some(setup.thinking(None, end.clone())), None).unwrap());
        let sequence = scheduler.sequence(id).unwrap();
        let next = NextToken { sequence, params: &params, guide: Some(&guide) };
        assert_eq!(next.choice(NUM_IDS), Some(Choice::default()));
        end.request();
        let token = next.sample(Row::Token(b'x'.into())).unwrap().unwrap().token;
        assert_eq!(token, u32::from(THINK_CLOSING.as_bytes()[0]));
        // From then on the device is told.
        let mask = next.choice(NUM_IDS).unwrap().mask.unwrap();
        assert_eq!(mask.iter().map(|word| word.count_ones()).sum::<u32>(), 1);
        assert_eq!(mask[token as usize / 32], 1 << (token % 32));
    }

    #[test]
    fn what_a_device_cannot_choose_is_asked_for_whole() {
        let (scheduler, id) = said("");
        let sequence = scheduler.sequence(id).unwrap();
        let choice = |params: &SamplingParams| NextToken { sequence, params, guide: None }.choice(NUM_IDS);
        let greedy = SamplingParams::greedy(300);
        let drawn = SamplingParams { temperature: 0.8, top_k: 256, ..greedy.clone() };
        assert!(choice(&greedy).unwrap().draw.is_none());
        assert!(choice(&drawn).unwrap().draw.is_some());
        assert_eq!(choice(&SamplingParams { top_k: 257, ..drawn.clone() }), None);
        assert_eq!(choice(&SamplingParams { top_logprobs: Some(0), ..greedy }), None);
        assert_eq!(choice(&SamplingParams { watched: vec![3], ..drawn }), None);
    }
}
