//! Log probabilities of a prompt's own tokens, step by step.
//!
//! Used by the runner for the sequences that ask for it. The logits of a step are looked at and
//! dropped: how many there are at once is the scheduler's limit (`max_scored_tokens`).

use std::ops::Range;

use rayon::iter::{IndexedParallelIterator, IntoParallelIterator, IntoParallelRefIterator, ParallelIterator};

use super::{logprobs, runner::Requests};
use crate::{
    model::{ModelError, Result, Tensor},
    scheduler::{ComputeWork, Scheduler, SequenceId, TokenId, TokenLogprobs},
};

/// A token of a prompt whose probability a row of the step's logits gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ScoredToken {
    pub sequence: SequenceId,
    /// Position of the token; the row is that of the token before it.
    pub position: usize,
    pub token: TokenId,
}

/// The log probabilities of one prompt token.
#[derive(Debug)]
pub(super) struct PromptScore {
    pub sequence: SequenceId,
    pub position: usize,
    pub logprobs: Box<TokenLogprobs>,
}

/// Returns the positions of `work` whose logits say how probable the prompt's next token was.
pub(super) fn positions(work: &ComputeWork, scheduler: &Scheduler, requests: &dyn Requests) -> Range<usize> {
    let start = work.positions.start;
    let num_prompt = scheduler.sequence(work.sequence).map_or(0, |sequence| sequence.num_prompt_tokens());
    if !requests.sampling(work.sequence).scores_prompt {
        return start..start;
    }
    // The last token of the prompt is followed by the first one of the completion.
    start..work.positions.end.min(num_prompt.saturating_sub(1)).max(start)
}

/// Returns the scores of `tokens`, of which each has a row of `logits` `[tokens, vocab]`; ids below
/// `num_ids` exist.
///
/// # Errors
/// When a row has no finite logit.
pub(super) fn scores(
    logits: &Tensor,
    num_ids: usize,
    tokens: Vec<ScoredToken>,
    requests: &dyn Requests,
) -> Result<Vec<PromptScore>> {
    let rows = logits.to_vec2::<f32>()?;
    if rows.par_iter().any(|row| !row[..num_ids].iter().any(|logit| logit.is_finite())) {
        return Err(ModelError::Msg("the model produced no finite logit".into()));
    }
    let scored = tokens.into_par_iter().zip(&rows).filter_map(|(token, row)| {
        let ScoredToken { sequence, position, token } = token;
        let (logits, others) = row.split_at(num_ids);
        let logprobs = logprobs::report(logits, others, requests.sampling(sequence), token)?;
        Some(PromptScore { sequence, position, logprobs })
    });
    Ok(scored.collect())
}
