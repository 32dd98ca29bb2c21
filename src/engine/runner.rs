//! Runs a step's work on the model: plan to flat arrays, arrays to logits, logits to tokens.
//!
//! Owned by the worker's thread. Decides nothing: the plan says what runs.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::Device;
use rayon::iter::{IntoParallelIterator, IntoParallelRefIterator, ParallelIterator};

use super::{
    encoder_cache::EncoderCache,
    guidance::{Allowed, Guide},
    handle::VideoInput,
    logits::{Logits, Needed, Row},
    logprobs, sampler,
};
use crate::{
    model::{
        self, KvPool, ModelError, Result, SequenceInput, StepInput, Tap, Tensor, VideoLanguageModel,
        VisualRows,
    },
    scheduler::{
        self, ComputeWork, EncodeWork, SamplingParams, Scheduler, SequenceId, TokenId, TokenLogprobs,
        VideoDigest, sequence::Sequence,
    },
};

// The scheduler imports nothing and the model not the scheduler: here both names of the placeholder meet.
const _: () = assert!(model::VISUAL_TOKEN == scheduler::VISUAL_TOKEN);

/// Where the runner finds what a request brought along.
pub trait Requests: Sync {
    /// Parameters of a sequence.
    fn sampling(&self, id: SequenceId) -> &SamplingParams;
    /// Videos of a sequence.
    fn videos(&self, id: SequenceId) -> &[VideoInput];
    /// What steers a sequence, if anything does. Only the step that runs the sequence locks it.
    fn guide(&self, id: SequenceId) -> Option<&Mutex<Guide>>;
}

/// The next token of a sequence, and what its request asked to know of the choice.
#[derive(Debug)]
pub struct Sampled {
    pub token: TokenId,
    pub logprobs: Option<Box<TokenLogprobs>>,
}

/// Model, cache and encoded videos.
pub struct Runner {
    model: Box<dyn VideoLanguageModel>,
    pool: KvPool,
    encoder: EncoderCache,
    /// Ids the tokenizer knows: `[0, n)`.
    num_token_ids: usize,
    tap: Box<dyn Tap>,
}

impl std::fmt::Debug for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").field("shape", self.model.shape()).finish_non_exhaustive()
    }
}

impl Runner {
    /// `num_token_ids`: ids the tokenizer knows; higher ones are never sampled. `tap` sees intermediate tensors.
    pub fn new(
        model: Box<dyn VideoLanguageModel>,
        pool: KvPool,
        num_token_ids: usize,
        tap: Box<dyn Tap>,
    ) -> Self {
        let num_token_ids = num_token_ids.min(model.shape().vocab_size);
        Runner { model, pool, encoder: EncoderCache::default(), num_token_ids, tap }
    }

    /// Forgets a video's encoded tokens.
    pub fn drop_video(&mut self, digest: &VideoDigest) {
        self.encoder.drop_video(digest);
    }

    /// Features of the frames of each work. Keeps nothing.
    pub fn encode(&mut self, works: &[EncodeWork], requests: &dyn Requests) -> Result<Vec<Tensor>> {
        let video = |work: &EncodeWork| &requests.videos(work.sequence)[work.video];
        let videos: Vec<_> = works.iter().map(|work| (&video(work).frames, work.frames.clone())).collect();
        self.model.encode_videos(&videos, self.tap.as_mut())
    }

    /// Keeps what [`Runner::encode`] gave for a work; with a video's last frames runs the connector.
    pub fn connect(&mut self, work: &EncodeWork, features: Tensor) -> Result<()> {
        self.encoder.push(work.digest, features);
        if work.is_last {
            let features = self.encoder.take_features(&work.digest)?;
            self.tap.tensor("vision_features", None, &features);
            let visual_tokens = self.model.connect(&features, self.tap.as_mut())?;
            self.tap.tensor("connector_out", None, &visual_tokens);
            self.encoder.finish(work.digest, visual_tokens);
        }
        Ok(())
    }

    /// Runs tokens through the decoder; returns one token for each work that samples, in order.
    pub fn compute(
        &mut self,
        works: &[ComputeWork],
        scheduler: &Scheduler,
        requests: &dyn Requests,
    ) -> Result<Vec<Sampled>> {
        let input = self.step_input(works, scheduler, requests)?;
        let logits = self.model.forward(&input, &mut self.pool, self.tap.as_mut())?;
        if input.logit_rows.is_empty() {
            return Ok(Vec::new());
        }
        if self.tap.is_watching() {
            self.tap.tensor("logits_last", None, &logits.to_device(&Device::Cpu)?);
        }
        let sampling: Vec<&ComputeWork> = works.iter().filter(|work| work.samples).collect();
        let is_here = logits.device().is_cpu();
        let needed = |work: &&ComputeWork| {
            let params = requests.sampling(work.sequence);
            let sequence = planned(scheduler, work);
            let is_free = |guide: &Mutex<Guide>| {
                let (completion, num_left) = (sequence.completion(), num_left(sequence, params));
                locked(guide).is_free(completion, num_left)
            };
            if is_here || logprobs::is_asked_for(params) || !requests.guide(work.sequence).is_none_or(is_free)
            {
                return Needed::All;
            }
            let adjustments =
                || sampler::adjustments(params, sequence.token_ids(), sequence.num_prompt_tokens());
            match params.temperature <= 0.0 {
                true => Needed::Largest(adjustments()),
                false if sampler::needs_few(params) => Needed::Few(params.temperature, adjustments()),
                false => Needed::All,
            }
        };
        let needed: Vec<Needed> = sampling.par_iter().map(needed).collect();
        let mut logits = Logits::fetch(&logits, self.num_token_ids, &needed)?;
        let sample = |logits: &Logits, index: usize| {
            let work = sampling[index];
            sample(logits.row(index), work, scheduler, requests)
        };
        let mut sampled: Vec<Option<Sampled>> =
            (0..sampling.len()).into_par_iter().map(|index| sample(&logits, index)).collect::<Result<_>>()?;
        let undecided: Vec<usize> = (0..sampled.len()).filter(|&index| sampled[index].is_none()).collect();
        logits.fetch_whole(&undecided)?;
        let again = |&index: &usize| Ok((index, sample(&logits, index)?));
        for (index, token) in undecided.par_iter().map(again).collect::<Result<Vec<_>>>()? {
            sampled[index] = token;
        }
        let decided = |token: Option<_>| token.expect("all logits decide no token: this is a bug");
        Ok(sampled.into_iter().map(decided).collect())
    }

    fn step_input(
        &self,
        works: &[ComputeWork],
        scheduler: &Scheduler,
        requests: &dyn Requests,
    ) -> Result<StepInput> {
        let block_size = self.pool.block_size();
        let mut input = StepInput::default();
        for work in works {
            let sequence =
                scheduler.sequence(work.sequence).expect("a planned sequence is unknown: this is a bug");
            let first_row = input.token_ids.len();
            let first_block = input.block_tables.len();
            let num_blocks = work.positions.end.div_ceil(block_size);
            input.block_tables.extend(&sequence.blocks()[..num_blocks]);
            for position in work.positions.clone() {
                input.token_ids.push(sequence.token_ids()[position]);
                input.positions.push(position as u32);
                let block = sequence.blocks()[position / block_size] as usize;
                input.slot_mapping.push(block * block_size + position % block_size);
            }
            for video in requests.videos(work.sequence) {
                let start = video.span.start.max(work.positions.start);
                let end = video.span.end.min(work.positions.end);
                if start < end {
                    let tokens = self.encoder.visual_tokens(&video.digest);
                    let tokens = tokens.expect("visual tokens before their video is encoded: this is a bug");
                    let row = first_row + start - work.positions.start;
                    let embeddings = tokens.narrow(0, start - video.span.start, end - start)?;
                    input.visuals.push(VisualRows { rows: row..row + end - start, embeddings });
                }
            }
            let rows = first_row..input.token_ids.len();
            if work.samples {
                input.logit_rows.push(rows.end - 1);
            }
            let blocks = first_block..input.block_tables.len();
            input.sequences.push(SequenceInput { rows, context_len: work.positions.end, blocks });
        }
        Ok(input)
    }
}

fn planned<'a>(scheduler: &'a Scheduler, work: &ComputeWork) -> &'a Sequence {
    scheduler.sequence(work.sequence).expect("a planned sequence is unknown: this is a bug")
}

fn locked(guide: &Mutex<Guide>) -> MutexGuard<'_, Guide> {
    guide.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tokens that may come.
fn num_left(sequence: &Sequence, params: &SamplingParams) -> usize {
    params.max_tokens - sequence.completion().len()
}

/// The token that follows a sequence; none where the few largest logits do not decide it.
fn sample(
    row: Row<'_>,
    work: &ComputeWork,
    scheduler: &Scheduler,
    requests: &dyn Requests,
) -> Result<Option<Sampled>> {
    let (sequence, params) = (planned(scheduler, work), requests.sampling(work.sequence));
    let (tokens, num_prompt) = (sequence.token_ids(), sequence.num_prompt_tokens());
    let plain = |token| Some(Sampled { token, logprobs: None });
    let row = match row {
        Row::Logits(row) => row,
        Row::Adjusted(row) => return Ok(plain(sampler::sample_adjusted(row, params, tokens.len()))),
        Row::Few(few) => return Ok(sampler::sample_few(few, params, tokens.len()).and_then(plain)),
        Row::Largest(token) => return Ok(plain(token)),
        Row::Nothing => return Err(ModelError::Msg("the model produced no finite logit".into())),
    };
    let sample = |allowed: Allowed<'_>| sampler::sample(row, params, tokens, num_prompt, allowed);
    let token = match requests.guide(work.sequence) {
        None => sample(Allowed::All),
        Some(guide) => {
            let completion = sequence.completion();
            locked(guide).choose(completion, num_left(sequence, params), sample)
        }
    };
    Ok(Some(Sampled { token, logprobs: logprobs::report(row, params, token) }))
}
