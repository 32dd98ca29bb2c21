//! Runs a step's work on the model: plan to flat arrays, arrays to logits, logits to tokens.
//!
//! Owned by the worker's thread. Decides nothing: the plan says what runs.

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::Device;
use rayon::iter::{IntoParallelIterator, IntoParallelRefIterator, ParallelIterator};

use super::{
    ahead::{Ahead, Started, StartedRow},
    encoder_cache::EncoderCache,
    guidance::{Allowed, Guide},
    handle::VideoInput,
    logits::{Choosing, Logits, Needed, Row},
    logprobs, sampler,
};
use crate::{
    model::{
        self, KvPool, ModelError, Result, SequenceInput, StepInput, Tap, Tensor, VideoLanguageModel,
        VisualRows,
        device::{Readback, is_device_failure},
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
    ahead: Ahead,
    readback: Readback,
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
        let (encoder, ahead, readback) = Default::default();
        Runner { model, pool, encoder, ahead, readback, num_token_ids, tap }
    }

    /// Forgets a video's encoded tokens.
    pub fn drop_video(&mut self, digest: &VideoDigest) {
        self.encoder.drop_video(digest);
    }

    /// Features of the frames of each work; `next` are those that follow. Keeps nothing.
    pub fn encode(
        &mut self,
        works: &[EncodeWork],
        next: &[EncodeWork],
        requests: &dyn Requests,
    ) -> Result<Vec<Tensor>> {
        let frames = |work: &EncodeWork| {
            let video = &requests.videos(work.sequence)[work.video];
            (&video.frames, work.frames.clone())
        };
        let [videos, next] = [works, next].map(|works| works.iter().map(frames).collect::<Vec<_>>());
        self.model.encode_videos(&videos, &next, self.tap.as_mut())
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
        let Some(logits) = self.logits(works, scheduler, requests)? else { return Ok(Vec::new()) };
        if self.tap.is_watching() {
            self.tap.tensor("logits_last", None, &logits.to_device(&Device::Cpu)?);
        }
        let sampling: Vec<&ComputeWork> = works.iter().filter(|work| work.samples).collect();
        let (logits, started) = if self.model.runs_ahead() {
            let needed = |work: &&ComputeWork| needed(work, scheduler, requests);
            let needed: Vec<Needed> = sampling.par_iter().map(needed).collect();
            let readback = &mut self.readback;
            let choosing = Choosing::start(&logits, self.num_token_ids, needed, readback)?;
            let started = match choosing.token_ids() {
                Some(ids) => self.start_next(works, ids, scheduler, requests)?,
                None => None,
            };
            (choosing.finish(&mut self.readback)?, started)
        } else {
            (Logits::whole(&logits, self.num_token_ids)?, None)
        };
        if let Some((next, next_logits)) = started {
            let token_of = |row| if let Row::Token(token) = logits.row(row) { Some(token) } else { None };
            let rows = next.into_iter().map(|(row, work)| StartedRow {
                sequence: work.sequence,
                position: work.positions.start,
                token: token_of(row),
            });
            self.ahead.keep(Started { rows: rows.zip(0..).collect(), logits: next_logits });
        }
        let sample = |index: usize| sample(logits.row(index), sampling[index], scheduler, requests);
        (0..sampling.len()).into_par_iter().map(sample).collect()
    }

    /// The logits of the works that sample, `[works, vocab]`; none where none does.
    fn logits(
        &mut self,
        works: &[ComputeWork],
        scheduler: &Scheduler,
        requests: &dyn Requests,
    ) -> Result<Option<Tensor>> {
        let Some(started) = self.ahead.take() else { return self.forward(works, scheduler, requests) };
        let rows: Vec<Option<usize>> = works.iter().map(|work| started.row_of(work, scheduler)).collect();
        let rest = works.iter().zip(&rows).filter(|(_, row)| row.is_none());
        let rest: Vec<ComputeWork> = rest.map(|(work, _)| work.clone()).collect();
        if rest.len() == works.len() {
            return self.forward(works, scheduler, requests);
        }
        let others = if rest.is_empty() { None } else { self.forward(&rest, scheduler, requests)? };
        let sampling: Vec<_> =
            works.iter().zip(rows).filter(|(work, _)| work.samples).map(|(_, row)| row).collect();
        started.merge(&sampling, others).map(Some)
    }

    fn forward(
        &mut self,
        works: &[ComputeWork],
        scheduler: &Scheduler,
        requests: &dyn Requests,
    ) -> Result<Option<Tensor>> {
        let input = self.step_input(works, scheduler, requests)?;
        let logits = self.model.forward(&input, &mut self.pool, self.tap.as_mut())?;
        Ok((!input.logit_rows.is_empty()).then_some(logits))
    }

    /// Starts what is most probably the next step, if it is of nothing but the next tokens of all sequences that run: `ids` `[works]` has the
    /// tokens of `works`. Returns its works, each with the row of `works` it follows, and its logits.
    fn start_next(
        &mut self,
        works: &[ComputeWork],
        ids: &Tensor,
        scheduler: &Scheduler,
        requests: &dyn Requests,
    ) -> Result<Option<(Vec<(usize, ComputeWork)>, Tensor)>> {
        let is_all = works.len() == scheduler.num_running() && works.iter().all(|work| work.samples);
        if !is_all || self.tap.is_watching() || !self.ahead.is_worth_while() {
            return Ok(None);
        }
        // A sequence that ends with its longest completion has no room for more.
        let goes_on =
            |work: &ComputeWork| num_left(planned(scheduler, work), requests.sampling(work.sequence)) > 1;
        let follow = |work: &ComputeWork| ComputeWork {
            positions: work.positions.end..work.positions.end + 1,
            ..work.clone()
        };
        let next: Vec<(usize, ComputeWork)> = works
            .iter()
            .enumerate()
            .filter(|(_, work)| goes_on(work))
            .map(|(row, work)| (row, follow(work)))
            .collect();
        if next.is_empty() {
            return Ok(None);
        }
        let next_works: Vec<ComputeWork> = next.iter().map(|(_, work)| work.clone()).collect();
        let mut input = self.step_input(&next_works, scheduler, requests)?;
        input.ids_on_device = Some(if next.len() == works.len() {
            ids.clone()
        } else {
            let rows: Vec<u32> = next.iter().map(|&(row, _)| row as u32).collect();
            ids.index_select(&Tensor::from_vec(rows, next.len(), ids.device())?, 0)?
        });
        match self.model.forward(&input, &mut self.pool, self.tap.as_mut()) {
            Ok(logits) => Ok(Some((next, logits))),
            Err(error) if is_device_failure(&error) => Err(error),
            // It fails again when it is planned, and then those who planned it know what to do.
            Err(_) => Ok(None),
        }
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
                // Of a step that is started ahead, the host does not know it yet.
                input.token_ids.push(sequence.token_ids().get(position).copied().unwrap_or(0));
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

/// What a device must give of the logits of a work.
fn needed(work: &ComputeWork, scheduler: &Scheduler, requests: &dyn Requests) -> Needed {
    let (sequence, params) = (planned(scheduler, work), requests.sampling(work.sequence));
    let is_free =
        |guide: &Mutex<Guide>| locked(guide).is_free(sequence.completion(), num_left(sequence, params));
    let is_plain = !logprobs::is_asked_for(params) && requests.guide(work.sequence).is_none_or(is_free);
    let tokens = sequence.token_ids();
    let draw = sampler::draw_on_device(params, tokens.len());
    if is_plain && (params.temperature <= 0.0 || draw.is_some()) {
        Needed::Token(sampler::adjustments(params, tokens, sequence.num_prompt_tokens()), draw)
    } else {
        Needed::All
    }
}

/// The token that follows a sequence.
fn sample(
    row: Row<'_>,
    work: &ComputeWork,
    scheduler: &Scheduler,
    requests: &dyn Requests,
) -> Result<Sampled> {
    let (sequence, params) = (planned(scheduler, work), requests.sampling(work.sequence));
    let (tokens, num_prompt) = (sequence.token_ids(), sequence.num_prompt_tokens());
    let plain = |token| Sampled { token, logprobs: None };
    let row = match row {
        Row::Logits(row) => row,
        Row::Adjusted(row) => return Ok(plain(sampler::sample_adjusted(row, params, tokens.len()))),
        Row::Token(token) => return Ok(plain(token)),
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
    Ok(Sampled { token, logprobs: logprobs::report(row, params, token) })
}
