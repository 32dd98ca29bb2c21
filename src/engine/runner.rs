//! Runs a step's work on the model: plan to flat arrays, arrays to logits, logits to tokens.
//!
//! Owned by the worker's thread. Decides nothing: the plan says what runs.

use std::sync::Mutex;

use candle_core::Device;
use rayon::iter::{IndexedParallelIterator, IntoParallelRefIterator, ParallelIterator};

use super::{
    ahead::{Ahead, Started, StartedRow},
    encoder_cache::EncoderCache,
    guidance::Guide,
    handle::VideoInput,
    logits::{Choosing, Logits, Row},
    next_token::{NextToken, Sampled},
    prompt_scores::{self, PromptScore, ScoredToken},
};
use crate::{
    model::{
        self, KvPool, ModelError, Result, SequenceInput, StepInput, Tap, Tensor, VideoLanguageModel,
        VisualRows,
        device::{Choice, Exchange, is_device_failure, select_rows},
    },
    scheduler::{self, ComputeWork, EncodeWork, SamplingParams, Scheduler, SequenceId, VideoDigest},
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

/// Model, cache and encoded videos.
pub struct Runner {
    model: Box<dyn VideoLanguageModel>,
    pool: KvPool,
    encoder: EncoderCache,
    ahead: Ahead,
    exchange: Exchange,
    /// Log probabilities of the prompt tokens that the last step computed.
    prompt_scores: Vec<PromptScore>,
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
        let (encoder, exchange, prompt_scores) = Default::default();
        let ahead = Ahead::from_env();
        Runner { model, pool, encoder, ahead, exchange, prompt_scores, num_token_ids, tap }
    }

    /// Nothing runs: what was started for it is given back.
    pub fn rest(&mut self) {
        self.ahead.take();
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
        self.prompt_scores.clear();
        let Some(logits) = self.logits(works, scheduler, requests)? else { return Ok(Vec::new()) };
        if self.tap.is_watching() {
            self.tap.tensor("logits_last", None, &logits.to_device(&Device::Cpu)?);
        }
        let sampling: Vec<&ComputeWork> = works.iter().filter(|work| work.samples).collect();
        if !self.model.runs_ahead() {
            let logits = Logits::whole(&logits, self.num_token_ids)?;
            return sample(&logits, &sampling, scheduler, requests)?.into_iter().map(decided).collect();
        }
        let choice = |work: &&ComputeWork| next_token(work, scheduler, requests).choice(self.num_token_ids);
        let choices: Vec<Option<Choice>> = sampling.par_iter().map(choice).collect();
        let choosing = Choosing::start(&logits, self.num_token_ids, choices, &mut self.exchange)?;
        let next = match choosing.token_ids() {
            Some(ids) => self.start_next(works, ids, scheduler, requests)?,
            None => None,
        };
        let mut logits = choosing.finish(&mut self.exchange)?;
        let mut sampled = sample(&logits, &sampling, scheduler, requests)?;
        let undecided: Vec<usize> = (0..sampled.len()).filter(|&row| sampled[row].is_none()).collect();
        if let Some((rows, next_logits)) = next {
            let started = |row: usize| StartedRow {
                sequence: sampling[row].sequence,
                position: sampling[row].positions.end,
                token: match (logits.row(row), &sampled[row]) {
                    (Row::Token(chosen), Some(sampled)) if chosen == sampled.token => Some(chosen),
                    _ => None,
                },
            };
            let rows = rows.into_iter().map(started).zip(0..).collect();
            self.ahead.keep(Started { rows, logits: next_logits });
        }
        logits.fetch_whole(&undecided)?;
        for row in undecided {
            sampled[row] = next_token(sampling[row], scheduler, requests).sample(logits.row(row))?;
        }
        sampled.into_iter().map(decided).collect()
    }

    /// Takes the scores of the prompt tokens that the last [`Runner::compute`] ran, as far as
    /// requests ask for them.
    pub(super) fn take_prompt_scores(&mut self) -> Vec<PromptScore> {
        std::mem::take(&mut self.prompt_scores)
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
        let (input, scored) = self.step_input(works, scheduler, requests)?;
        let logits = self.model.forward(&input, &mut self.pool, self.tap.as_mut())?;
        let num_sampled = input.logit_rows.len() - scored.len();
        if scored.is_empty() {
            return Ok((num_sampled > 0).then_some(logits));
        }
        let rows = logits.narrow(0, num_sampled, scored.len())?;
        self.prompt_scores.extend(prompt_scores::scores(&rows, self.num_token_ids, scored, requests)?);
        (num_sampled > 0).then(|| logits.narrow(0, 0, num_sampled)).transpose()
    }

    /// Starts what is most probably the next step, if it is of nothing but the next tokens of all sequences that run: `ids` `[works]` has the
    /// tokens of `works`. Returns the rows of `works` that go on, and their next logits.
    fn start_next(
        &mut self,
        works: &[ComputeWork],
        ids: &Tensor,
        scheduler: &Scheduler,
        requests: &dyn Requests,
    ) -> Result<Option<(Vec<usize>, Tensor)>> {
        let is_all = works.len() == scheduler.num_running() && works.iter().all(|work| work.samples);
        if !is_all || self.tap.is_watching() || !self.ahead.may_start() {
            return Ok(None);
        }
        // A sequence that ends with its longest completion has no room for more.
        let goes_on = |&row: &usize| next_token(&works[row], scheduler, requests).num_left() > 1;
        let rows: Vec<usize> = (0..works.len()).filter(goes_on).collect();
        if rows.is_empty() {
            return Ok(None);
        }
        let follow = |&row: &usize| ComputeWork {
            positions: works[row].positions.end..works[row].positions.end + 1,
            ..works[row].clone()
        };
        let next: Vec<ComputeWork> = rows.iter().map(follow).collect();
        let (mut input, _) = self.step_input(&next, scheduler, requests)?;
        input.ids_on_device = Some(select_rows(ids, &rows)?);
        match self.model.forward(&input, &mut self.pool, self.tap.as_mut()) {
            Ok(logits) => Ok(Some((rows, logits))),
            Err(error) if is_device_failure(&error) => Err(error),
            // It fails again when it is planned, and then those who planned it know what to do.
            Err(_) => Ok(None),
        }
    }

    /// `works` as flat arrays; after the rows that sample, `logit_rows` has one for each of the
    /// prompt tokens to be scored.
    fn step_input(
        &self,
        works: &[ComputeWork],
        scheduler: &Scheduler,
        requests: &dyn Requests,
    ) -> Result<(StepInput, Vec<ScoredToken>)> {
        let block_size = self.pool.block_size();
        let mut input = StepInput::default();
        let (mut scored, mut scored_rows) = (Vec::new(), Vec::new());
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
            for position in prompt_scores::positions(work, scheduler, requests) {
                scored_rows.push(first_row + position - work.positions.start);
                let (sequence, token) = (work.sequence, sequence.token_ids()[position + 1]);
                scored.push(ScoredToken { sequence, position: position + 1, token });
            }
            let rows = first_row..input.token_ids.len();
            if work.samples {
                input.logit_rows.push(rows.end - 1);
            }
            let blocks = first_block..input.block_tables.len();
            input.sequences.push(SequenceInput { rows, context_len: work.positions.end, blocks });
        }
        input.logit_rows.extend(scored_rows);
        Ok((input, scored))
    }
}

/// The tokens of works that sample, by what there is of their logits, where that decides them.
fn sample(
    logits: &Logits,
    works: &[&ComputeWork],
    scheduler: &Scheduler,
    requests: &dyn Requests,
) -> Result<Vec<Option<Sampled>>> {
    let rows = works.par_iter().enumerate();
    rows.map(|(row, work)| next_token(work, scheduler, requests).sample(logits.row(row))).collect()
}

fn decided(sampled: Option<Sampled>) -> Result<Sampled> {
    sampled.ok_or_else(|| ModelError::Msg("all logits decide no token: this is a bug".into()))
}

fn next_token<'a>(work: &ComputeWork, scheduler: &'a Scheduler, requests: &'a dyn Requests) -> NextToken<'a> {
    NextToken {
        sequence: scheduler.sequence(work.sequence).expect("a planned sequence is unknown: this is a bug"),
        params: requests.sampling(work.sequence),
        guide: requests.guide(work.sequence),
    }
}
