//! What the model itself thought of a step's tokens: log probabilities before penalties, bias and temperature.
//!
//! Called by the runner, for the sequences that ask for it. A pure function of the logits.

use crate::scheduler::{SamplingParams, TokenId, TokenLogprobs};

/// Whether `params` asks for any log probability.
pub fn is_asked_for(params: &SamplingParams) -> bool {
    params.top_logprobs.is_some() || !params.watched.is_empty()
}

/// Log probabilities of the `chosen` token and of those that `params` asks for; `None` when it asks
/// for none. `logits` holds the ids that may be sampled; `others`, which no tokenizer knows, have
/// their part in the distribution too.
pub fn report(
    logits: &[f32],
    others: &[f32],
    params: &SamplingParams,
    chosen: TokenId,
) -> Option<Box<TokenLogprobs>> {
    if !is_asked_for(params) {
        return None;
    }
    let all = || logits.iter().chain(others).copied();
    let largest = all().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = all().map(|logit| f64::from(logit - largest).exp()).filter(|e| !e.is_nan()).sum();
    let log_sum = f64::from(largest) + sum.ln();
    let logprob = |id: TokenId| {
        logits.get(id as usize).map_or(f32::NEG_INFINITY, |&logit| (f64::from(logit) - log_sum) as f32)
    };
    let top = most_probable(logits, params.top_logprobs.unwrap_or(0));
    Some(Box::new(TokenLogprobs {
        chosen: logprob(chosen),
        top: top.into_iter().map(|id| (id, logprob(id))).collect(),
        watched: params.watched.iter().map(|&id| logprob(id)).collect(),
    }))
}

/// The `count` largest, the largest first; of equal ones the lowest id.
fn most_probable(logits: &[f32], count: usize) -> Vec<TokenId> {
    let mut top: Vec<(TokenId, f32)> = Vec::with_capacity(count + 1);
    for (id, &logit) in logits.iter().enumerate() {
        let is_less = top.len() == count && top.last().is_none_or(|&(_, least)| logit <= least);
        if is_less || logit.is_nan() {
            continue;
        }
        let place = top.partition_point(|&(_, other)| other >= logit);
        top.insert(place, (id as TokenId, logit));
        top.truncate(count);
    }
    top.into_iter().map(|(id, _)| id).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn asking(top_logprobs: Option<usize>, watched: Vec<TokenId>) -> SamplingParams {
        SamplingParams { top_logprobs, watched, ..SamplingParams::greedy(1) }
    }

    #[test]
    fn nothing_is_reported_that_is_not_asked_for() {
        assert!(report(&[1.0, 2.0], &[], &asking(None, vec![]), 1).is_none());
        let only_chosen = report(&[0.0, 0.0], &[], &asking(Some(0), vec![]), 1).expect("asked for");
        assert!((only_chosen.chosen - 0.5f32.ln()).abs() < 1e-6);
        assert!(only_chosen.top.is_empty() && only_chosen.watched.is_empty());
    }

    #[test]
    fn temperature_and_bias_do_not_matter() {
        let params = asking(Some(2), vec![2]);
        let hot = SamplingParams { temperature: 2.0, logit_bias: vec![(0, 50.0)], ..params.clone() };
        let logits = [1.0, 3.0, 2.0];
        assert_eq!(report(&logits, &[], &params, 0), report(&logits, &[], &hot, 0));
    }

    #[test]
    fn ids_that_no_tokenizer_knows_have_their_part_in_the_distribution() {
        let whole = report(&[1.0, 2.0, 0.5], &[], &asking(Some(1), vec![]), 1).unwrap();
        let known = report(&[1.0, 2.0], &[0.5], &asking(Some(1), vec![]), 1).unwrap();
        assert_eq!(whole, known);
        assert_eq!(report(&[1.0], &[9.0], &asking(Some(2), vec![]), 0).unwrap().top.len(), 1);
    }

    #[test]
    fn impossible_ids_have_no_probability() {
        let reported =
            report(&[f32::NEG_INFINITY, 0.0, f32::NAN], &[], &asking(Some(2), vec![0, 7]), 1).unwrap();
        assert_eq!(reported.top[0], (1, 0.0));
        assert_eq!(reported.watched, [f32::NEG_INFINITY; 2]);
    }

    proptest! {
        #[test]
        fn all_probabilities_together_are_one(logits in prop::collection::vec(-30.0f32..30.0, 1..300), chosen: prop::sample::Index) {
            let chosen = chosen.index(logits.len()) as TokenId;
            let all = report(&logits, &[], &asking(Some(logits.len()), vec![chosen]), chosen).unwrap();
            let total: f64 = all.top.iter().map(|(_, logprob)| f64::from(*logprob).exp()).sum();
            prop_assert!((total - 1.0).abs() < 1e-4, "{}", total);
            prop_assert!(all.top.is_sorted_by(|a, b| a.1 >= b.1));
            prop_assert_eq!(all.watched[0], all.chosen);
            let few = report(&logits, &[], &asking(Some(3), vec![]), chosen).unwrap();
            prop_assert_eq!(&few.top[..], &all.top[..logits.len().min(3)]);
        }
    }
}
