//! Logits to the next token.
//!
//! Called by the runner. A pure function of the logits, the sequence's own tokens, its parameters and the position:
//! the random number depends on seed and position alone, so a request gives the same text in any batch.

use std::collections::HashMap;

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};

use toktrie::SimpleVob;

use super::guidance::Allowed;
use crate::{
    model::device::{Adjustment, Draw, FEW},
    scheduler::{SamplingParams, TokenId, VISUAL_TOKEN},
};

/// Chooses the token that follows `tokens` (prompt and completion; the completion starts at `num_prompt_tokens`).
/// `logits` holds the ids that may be sampled, and no others; `allowed` narrows them down.
pub fn sample(
    logits: &[f32],
    params: &SamplingParams,
    tokens: &[TokenId],
    num_prompt_tokens: usize,
    allowed: Allowed<'_>,
) -> TokenId {
    let adjustments = adjustments(params, tokens, num_prompt_tokens);
    if adjustments.is_empty() || matches!(allowed, Allowed::Only(_)) {
        return sample_adjusted(logits, params, tokens.len(), allowed);
    }
    let mut adjusted = logits.to_vec();
    adjustments.into_iter().for_each(|adjustment| adjustment.apply(&mut adjusted));
    sample_adjusted(&adjusted, params, tokens.len(), allowed)
}

/// [`sample`] of logits that are adjusted already, for the token at `position`.
pub fn sample_adjusted(
    logits: &[f32],
    params: &SamplingParams,
    position: usize,
    allowed: Allowed<'_>,
) -> TokenId {
    let random = |seed| unit_random(seed, position);
    let masked = |mask| {
        let mut masked = logits.to_vec();
        forbid(&mut masked, mask);
        masked
    };
    match allowed {
        Allowed::Only(token) => token,
        Allowed::All => choose(logits, params, random(params.seed)),
        Allowed::Mask(mask) => choose(&masked(mask), params, random(params.seed)),
        Allowed::MaskAgain(mask) => choose(&masked(mask), params, random(!params.seed)),
    }
}

fn choose(logits: &[f32], params: &SamplingParams, random: f64) -> TokenId {
    if params.temperature <= 0.0 { argmax(logits) } else { draw(candidates(logits, params), random) }
}

/// How a device draws the token at `position`, if it can: its largest logits are most probably all that these parameters need.
pub fn draw_on_device(params: &SamplingParams, position: usize) -> Option<Draw> {
    let SamplingParams { temperature, top_k, top_p, min_p, seed, .. } = *params;
    let fits = temperature > 0.0 && top_k <= FEW;
    fits.then(|| Draw { temperature, top_k, top_p, min_p, random: unit_random(seed, position) })
}

/// Penalties and bias, and what keeps ending ids from coming too early; one for each id that has
/// any.
pub fn adjustments(params: &SamplingParams, tokens: &[TokenId], num_prompt_tokens: usize) -> Vec<Adjustment> {
    let penalises =
        params.repetition_penalty != 1.0 || params.frequency_penalty != 0.0 || params.presence_penalty != 0.0;
    let mut of_ids: HashMap<TokenId, Adjustment> = HashMap::new();
    if penalises {
        // Every id of the sequence, and how often it stands in the completion.
        let mut counts: HashMap<TokenId, f32> = HashMap::new();
        for (position, &id) in tokens.iter().enumerate().filter(|&(_, &id)| id != VISUAL_TOKEN) {
            *counts.entry(id).or_default() += if position < num_prompt_tokens { 0.0 } else { 1.0 };
        }
        counts.retain(|_, count| *count > 0.0 || params.repetition_penalty != 1.0);
        of_ids.extend(counts.into_iter().map(|(id, count)| {
            let penalty = count * params.frequency_penalty + count.min(1.0) * params.presence_penalty;
            (id, Adjustment { id, factor: params.repetition_penalty, shift: -penalty })
        }));
    }
    for &(id, bias) in &params.logit_bias {
        of_ids.entry(id).or_insert(Adjustment { id, factor: 1.0, shift: 0.0 }).shift += bias;
    }
    if tokens.len() - num_prompt_tokens < params.min_tokens {
        let never = |id| Adjustment { id, factor: 1.0, shift: f32::NEG_INFINITY };
        of_ids.extend(params.ending_ids.iter().map(|&id| (id, never(id))));
    }
    of_ids.into_values().collect()
}

/// Leaves only what `mask` allows; if the model has ruled all of that out, the first of it.
fn forbid(logits: &mut [f32], mask: &SimpleVob) {
    mask.iter_unset_entries(|id| {
        if let Some(logit) = logits.get_mut(id) {
            *logit = f32::NEG_INFINITY;
        }
    });
    if !logits.iter().any(|logit| logit.is_finite())
        && let Some(logit) = mask.first_bit_set().and_then(|id| logits.get_mut(id))
    {
        *logit = 0.0;
    }
}

/// The first of the largest; NaN never wins.
fn argmax(logits: &[f32]) -> TokenId {
    const PART: usize = 1024;
    let mut best = (0, f32::NEG_INFINITY);
    for (index, part) in logits.chunks(PART).enumerate() {
        let value = largest(part);
        if value > best.1 {
            best = (index, value);
        }
    }
    let start = best.0 * PART;
    let place = logits[start..].iter().position(|&logit| logit == best.1 && logit > f32::NEG_INFINITY);
    place.map_or(0, |place| (start + place) as TokenId)
}

/// The largest that is a number, lane by lane: one after the other takes ten times as long.
fn largest(logits: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = logits.as_chunks::<16>();
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in chunks {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, logit);
        }
    }
    lanes.into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, larger)
}

/// Tokens that may be drawn with their unnormalised probabilities, after temperature, top-k, top-p and min-p.
fn candidates(logits: &[f32], params: &SamplingParams) -> Vec<(TokenId, f32)> {
    let largest = largest(logits);
    let floor = if params.top_k > 0 && params.top_k < logits.len() {
        nth_largest(logits, params.top_k)
    } else {
        f32::NEG_INFINITY
    };
    // What min-p is going to drop needs no weight, unless top-p asks for the sum of all: with room for rounding.
    let widest = if params.top_p < 1.0 { f32::INFINITY } else { 0.01 - params.min_p.ln() };
    let weight = |logit: f32| ((logit - largest) / params.temperature).exp();
    let is_kept = |logit: f32| logit >= floor && largest - logit <= widest * params.temperature;
    let kept = logits.iter().enumerate().filter(|&(_, &logit)| is_kept(logit));
    let mut kept: Vec<(TokenId, f32)> = kept.map(|(id, &logit)| (id as TokenId, weight(logit))).collect();
    if params.top_p < 1.0 {
        let wanted = f64::from(params.top_p) * total(&kept);
        keep_until(&mut kept, wanted);
    }
    // The largest weight is 1 by construction.
    kept.retain(|&(_, weight)| weight >= params.min_p && weight > 0.0);
    if kept.is_empty() {
        kept.push((argmax(logits), 1.0));
    }
    kept
}

/// Keeps the `n` largest of those seen so far among a few more; most logits are looked at once.
fn nth_largest(logits: &[f32], n: usize) -> f32 {
    let descending = |a: &f32, b: &f32| b.total_cmp(a);
    let mut best = Vec::with_capacity(2 * n);
    // The last one in the order.
    let mut floor = f32::from_bits(u32::MAX);
    for &logit in logits {
        if best.len() < n || logit.total_cmp(&floor).is_gt() {
            best.push(logit);
            if best.len() == 2 * n {
                floor = *best.select_nth_unstable_by(n - 1, descending).1;
                best.truncate(n);
            }
        }
    }
    *best.select_nth_unstable_by(n - 1, descending).1
}

/// Keeps the most probable tokens, in their order, until their weights reach `wanted`.
fn keep_until(kept: &mut Vec<(TokenId, f32)>, wanted: f64) {
    /// Of the most probable token's weight. Few tokens have more, and seldom are others needed.
    const LIKELY: f32 = 1.0 / 1024.0;
    let mut likely: Vec<(TokenId, f32)> =
        kept.iter().copied().filter(|&(_, weight)| weight >= LIKELY).collect();
    if keep_first(&mut likely, wanted) {
        *kept = likely;
    } else {
        keep_first(kept, wanted);
    }
}

/// [`keep_until`] by sorting no more than it must. Says whether they reach it.
fn keep_first(kept: &mut Vec<(TokenId, f32)>, wanted: f64) -> bool {
    let by_weight = |a: &(TokenId, f32), b: &(TokenId, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let mut head = 256;
    loop {
        head = head.min(kept.len());
        if head < kept.len() {
            kept.select_nth_unstable_by(head - 1, by_weight);
        }
        kept[..head].sort_unstable_by(by_weight);
        let mut sum = 0.0;
        let enough = kept[..head].iter().position(|&(_, weight)| {
            sum += f64::from(weight);
            sum >= wanted
        });
        match enough {
            Some(last) => {
                kept.truncate(last + 1);
                return true;
            }
            None if head == kept.len() => return false,
            None => head *= 8,
        }
    }
}

fn total(weights: &[(TokenId, f32)]) -> f64 {
    weights.iter().map(|&(_, weight)| f64::from(weight)).sum()
}

/// The token at which the sum of weights, the largest first, reaches the share `random` of all.
fn draw(mut candidates: Vec<(TokenId, f32)>, random: f64) -> TokenId {
    let wanted = random * total(&candidates);
    keep_until(&mut candidates, wanted);
    candidates.last().expect("there is always a candidate: this is a bug").0
}

/// A number in `[0, 1)` that depends on seed and position alone.
fn unit_random(seed: u64, position: usize) -> f64 {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(position as u64);
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn params(temperature: f32) -> SamplingParams {
        SamplingParams { temperature, ..SamplingParams::greedy(1) }
    }

    fn counts(logits: &[f32], params: &SamplingParams, draws: u64) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        for seed in 0..draws {
            counts[sample(logits, &SamplingParams { seed, ..params.clone() }, &[0], 1, Allowed::All)
                as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(sample(&[0.0, 3.0, 3.0, f32::NAN], &params(0.0), &[0], 1, Allowed::All), 1);
    }

    #[test]
    fn the_frequencies_follow_the_probabilities() {
        let counts = counts(&[0.0, 1.0, 2.0], &params(1.0), 20_000);
        for (count, expected) in counts.iter().zip([0.0900, 0.2447, 0.6652]) {
            assert!((*count as f64 / 20_000.0 - expected).abs() < 0.015, "{counts:?}");
        }
    }

    #[test]
    fn top_k_top_p_and_min_p_cut_the_tail() {
        let logits = [4.0, 3.0, 2.0, 1.0, 0.0];
        let drawn =
            |params: SamplingParams| counts(&logits, &params, 2_000).iter().filter(|&&n| n > 0).count();
        assert_eq!(drawn(SamplingParams { top_k: 2, ..params(5.0) }), 2);
        assert_eq!(drawn(SamplingParams { top_p: 0.85, ..params(1.0) }), 2);
        assert_eq!(drawn(SamplingParams { min_p: 0.3, ..params(1.0) }), 2);
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn what_is_drawn_is_what_all_logits_give_or_nothing_where_there_is_a_gpu() {
        use candle_core::Tensor;

        use crate::model::device::{Choice, Exchange, choose, cuda::testing};

        let Some(gpu) = testing::gpu() else { return };
        const VOCAB: usize = 3000;
        const IDS: usize = 2900;
        let noise = |i: usize| ((i * 37) as f32 * 0.7).sin();
        // Peaked, spread, nearly flat, and flat; many that are equal; few that are above minus infinity; one that is no number; none that is one.
        let kinds: [&dyn Fn(usize) -> f32; 8] = [
            &|i| noise(i) * 30.0,
            &|i| noise(i) * 6.0,
            &|i| noise(i) * 0.1,
            &|_| 1.0,
            &|i| (noise(i) * 200.0).round() / 20.0,
            &|i| if i % 500 == 3 { noise(i) * 3.0 } else { f32::NEG_INFINITY },
            &|i| if i == 77 { f32::NAN } else { noise(i) },
            &|_| f32::NEG_INFINITY,
        ];
        let all = [
            params(1.0),
            params(0.4),
            SamplingParams { top_k: 1, ..params(1.0) },
            SamplingParams { top_k: 40, ..params(1.3) },
            SamplingParams { top_p: 0.9, ..params(1.0) },
            SamplingParams { top_p: 0.02, min_p: 0.5, ..params(1.0) },
            SamplingParams { min_p: 0.1, ..params(2.0) },
            SamplingParams { top_k: FEW, top_p: 0.7, min_p: 0.01, ..params(0.8) },
            SamplingParams { top_p: 0.95, top_k: 20, ..params(0.6) },
            params(0.0),
        ];
        let mut num_drawn = vec![0; kinds.len()];
        for seed in 0..6 {
            for (number, params) in all.iter().enumerate() {
                let params = SamplingParams { seed, ..params.clone() };
                let rows: Vec<Vec<f32>> = kinds.iter().map(|logit| (0..VOCAB).map(logit).collect()).collect();
                let logits = Tensor::new(rows.clone(), &gpu).unwrap();
                // All rows but one as this request wants them, which is as greedy ones want it.
                let draws: Vec<_> = (0..rows.len())
                    .map(|row| draw_on_device(&params, row).filter(|_| row != number % rows.len()))
                    .collect();
                let choices: Vec<_> =
                    draws.iter().map(|&draw| Some(Choice { draw, ..Choice::default() })).collect();
                let chosen = choose(&logits, IDS, &choices, &mut Exchange::default()).unwrap();
                let chosen = chosen.tokens.to_vec2::<u32>().unwrap();
                for (row, logits) in rows.iter().enumerate() {
                    let (id, logit) = (chosen[0][row], f32::from_bits(chosen[1][row]));
                    let context = format!("row {row} of seed {seed} by {params:?}");
                    assert!((id as usize) < IDS, "{context}: {id}");
                    if logit > f32::NEG_INFINITY {
                        let greedy = SamplingParams::greedy(1);
                        let params = if draws[row].is_some() { &params } else { &greedy };
                        assert_eq!(
                            id,
                            sample_adjusted(&logits[..IDS], params, row, Allowed::All),
                            "{context}"
                        );
                        assert_eq!(logit, logits[id as usize], "{context}");
                        num_drawn[row] += usize::from(draws[row].is_some());
                    } else {
                        // Nothing to choose from, or it is not decided.
                        assert_eq!(logit.is_nan(), row != 7, "{context}: {logit}");
                    }
                }
            }
        }
        let most = all.len() * 6;
        assert!([0, 1, 4, 5].iter().all(|&row| num_drawn[row] > most / 2), "{num_drawn:?}");
        assert!((1..most / 2).contains(&num_drawn[2]), "{num_drawn:?}");
        assert_eq!([3, 6, 7].map(|row| num_drawn[row]), [0; 3]);
    }

    #[test]
    fn penalties_and_bias_move_the_choice() {
        let logits = [2.0, 1.9, 0.0];
        let with = |params: SamplingParams| sample(&logits, &params, &[1, 0], 1, Allowed::All);
        assert_eq!(with(params(0.0)), 0);
        assert_eq!(with(SamplingParams { frequency_penalty: 0.2, ..params(0.0) }), 1);
        assert_eq!(with(SamplingParams { presence_penalty: 0.2, ..params(0.0) }), 1);
        assert_eq!(with(SamplingParams { logit_bias: vec![(2, 100.0)], ..params(0.0) }), 2);
        let repeats_only_first = SamplingParams { repetition_penalty: 4.0, ..params(0.0) };
        assert_eq!(sample(&logits, &repeats_only_first, &[0, 0], 1, Allowed::All), 1);
    }

    #[test]
    fn what_is_not_allowed_is_never_chosen() {
        let logits = [4.0, 3.0, f32::NAN, 1.0, f32::NEG_INFINITY];
        let mut mask = SimpleVob::alloc(6);
        let with =
            |mask: &SimpleVob, params: &SamplingParams| sample(&logits, params, &[0], 1, Allowed::Mask(mask));
        for id in [1, 3, 5] {
            mask.allow_token(id);
        }
        assert_eq!(with(&mask, &params(0.0)), 1);
        for seed in 0..200 {
            let params = SamplingParams { seed, top_k: 3, top_p: 0.9, ..params(2.0) };
            assert!([1, 3].contains(&with(&mask, &params)));
        }
        assert_eq!(sample(&logits, &params(1.0), &[0], 1, Allowed::Only(4)), 4);
        let mut ruled_out = SimpleVob::alloc(6);
        ruled_out.allow_token(4);
        assert_eq!((with(&ruled_out, &params(0.0)), with(&ruled_out, &params(1.0))), (4, 4));
    }

    /// The candidates as one would write them down, all sorted.
    fn plain_candidates(logits: &[f32], params: &SamplingParams) -> Vec<(TokenId, f32)> {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sorted = logits.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let has_top_k = params.top_k > 0 && params.top_k < logits.len();
        let floor = if has_top_k { sorted[params.top_k - 1] } else { f32::NEG_INFINITY };
        let mut kept: Vec<(TokenId, f32)> = (0..)
            .zip(logits)
            .filter(|&(_, &logit)| logit >= floor)
            .map(|(id, &logit)| (id, ((logit - largest) / params.temperature).exp()))
            .collect();
        if params.top_p < 1.0 {
            let wanted = f64::from(params.top_p) * total(&kept);
            kept.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let mut sum = 0.0;
            let enough = kept.iter().position(|&(_, weight)| {
                sum += f64::from(weight);
                sum >= wanted
            });
            kept.truncate(enough.map_or(kept.len(), |last| last + 1));
        }
        kept.retain(|&(_, weight)| weight >= params.min_p && weight > 0.0);
        if kept.is_empty() { vec![(plain_argmax(logits), 1.0)] } else { kept }
    }

    fn plain_argmax(logits: &[f32]) -> TokenId {
        let better = |best: (TokenId, f32), (id, &logit)| if logit > best.1 { (id, logit) } else { best };
        (0..).zip(logits).fold((0, f32::NEG_INFINITY), better).0
    }

    /// Logits of a vocabulary: spread, often equal, some of them no numbers.
    fn any_logits() -> impl Strategy<Value = Vec<f32>> {
        let odd = prop_oneof![Just(f32::NAN), Just(f32::NEG_INFINITY), Just(0.0), Just(-0.0)];
        let logit = prop_oneof![20 => -1.0f32..1.0, 5 => (-8..8i8).prop_map(f32::from), 1 => odd];
        (prop::collection::vec(logit, 1..3000), 0.01f32..40.0).prop_map(|(mut logits, spread)| {
            logits.iter_mut().for_each(|logit| *logit *= spread);
            logits
        })
    }

    proptest! {
        #[test]
        fn candidates_are_those_of_the_plain_way(
            logits in any_logits(), temperature in 0.1f32..3.0, top_k in prop_oneof![Just(0usize), 1..60usize, 1..3000usize],
            top_p in prop_oneof![Just(1.0f32), 0.01f32..1.0, Just(0.9999)], min_p in prop_oneof![Just(0.0f32), 0.0f32..0.5],
        ) {
            let params = SamplingParams { top_k, top_p, min_p, ..params(temperature) };
            prop_assert_eq!(candidates(&logits, &params), plain_candidates(&logits, &params));
            prop_assert_eq!(argmax(&logits), plain_argmax(&logits));
        }
    }

    proptest! {
        #[test]
        fn the_same_seed_and_position_give_the_same_token(
            logits in prop::collection::vec(-9.0f32..9.0, 2..400), seed: u64, top_k in 0..50usize, top_p in 0.05f32..1.0,
        ) {
            let params = SamplingParams { seed, top_k, top_p, ..params(0.8) };
            let token = sample(&logits, &params, &[1, 0, 1], 1, Allowed::All);
            prop_assert_eq!(token, sample(&logits, &params, &[1, 0, 1], 1, Allowed::All));
            prop_assert!((token as usize) < logits.len());
        }

        #[test]
        fn top_p_keeps_the_smallest_sufficient_set(logits in prop::collection::vec(-9.0f32..9.0, 1..3000), top_p in 0.05f32..0.999) {
            let kept = candidates(&logits, &SamplingParams { top_p, ..params(1.0) });
            let total: f64 = candidates(&logits, &params(1.0)).iter().map(|c| f64::from(c.1)).sum();
            let mass: f64 = kept.iter().map(|c| f64::from(c.1)).sum();
            let least = kept.iter().map(|c| f64::from(c.1)).fold(f64::INFINITY, f64::min);
            prop_assert!(mass / total >= f64::from(top_p) - 1e-4);
            prop_assert!((mass - least) / total <= f64::from(top_p) + 1e-4);
        }
    }
}
