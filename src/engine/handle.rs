//! Crossing 1 and 2: how a request enters the engine and how its tokens come back.
//!
//! Called by `http/pipeline.rs` and the commands. Never blocks.

use std::{
    ops::Range,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::future::select_all;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::{
    fleet::{Fleet, Member, Presence},
    guidance::Guide,
};
use crate::{
    model::FrameBatch,
    scheduler::{SamplingParams, StopReason, TokenId, TokenLogprobs, VideoDigest},
};

/// One video of a sequence.
#[derive(Debug, Clone)]
pub struct VideoInput {
    /// Where its visual tokens stand in `NewSequence::token_ids` (each of them [`crate::scheduler::VISUAL_TOKEN`]).
    pub span: Range<usize>,
    /// Content address of the frames.
    pub digest: VideoDigest,
    /// The pixels, resized to the model's input size.
    pub frames: FrameBatch,
}

/// What the engine needs to know of a request.
#[derive(Debug, Clone)]
pub struct NewSequence {
    /// The whole prompt; visual tokens are [`crate::scheduler::VISUAL_TOKEN`].
    pub token_ids: Vec<TokenId>,
    /// Its videos, in the order of their spans.
    pub videos: Vec<VideoInput>,
    /// Cached blocks are shared with sequences of the same one only.
    pub cache_salt: Option<Arc<str>>,
    /// How to sample the completion.
    pub sampling: SamplingParams,
    /// What the reply must be, and when its thinking ends.
    pub guide: Option<Guide>,
}

/// A token of a prompt, with its log probabilities; the first one has none, for nothing is before
/// it.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptToken {
    pub id: TokenId,
    pub logprobs: Option<Box<TokenLogprobs>>,
}

/// What comes back, one a channel message.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenEvent {
    /// The sequence was admitted; `cached_tokens` of its prompt came from the prefix cache.
    Started { cached_tokens: usize },
    /// All tokens of the prompt, where they were to be scored; comes with the last of its steps.
    PromptScored(Vec<PromptToken>),
    /// The prompt is computed; the first token follows.
    PromptComputed(PromptTimes),
    /// The next token of the completion (end tokens are not sent); log probabilities where they were asked for.
    Token { id: TokenId, logprobs: Option<Box<TokenLogprobs>> },
    /// The token that ends the sequence, which is no part of the completion; sent only where the
    /// prompt was scored.
    EndToken { id: TokenId, logprobs: Box<TokenLogprobs> },
    /// The end; nothing follows.
    Finished(StopReason),
    /// The step that held this sequence failed; nothing follows. The text is for the log.
    Failed(String),
}

/// When the engine worked on a prompt. Steps work on other sequences too, and between them there may be some without this
/// one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PromptTimes {
    /// First and last encoding of its frames; none where they were encoded already, or for another sequence.
    pub encode: Option<(Instant, Instant)>,
    /// From the first step with prompt tokens to the end of the last; none if siblings computed all of it.
    pub prefill: Option<(Instant, Instant)>,
}

impl PromptTimes {
    pub(super) fn encoded(&mut self, start: Instant) {
        let begun = self.encode.map_or(start, |(first, _)| first);
        self.encode = Some((begun, Instant::now()));
    }

    pub(super) fn prefilling(&mut self, start: Instant) {
        self.prefill.get_or_insert((start, start));
    }

    pub(super) fn finished(mut self) -> Self {
        self.prefill = self.prefill.map(|(first, _)| (first, Instant::now()));
        self
    }
}

/// The tokens of one sequence. Dropping it is the only way to cancel.
#[derive(Debug)]
pub struct TokenStream {
    pub(super) events: mpsc::Receiver<TokenEvent>,
}

impl TokenStream {
    /// The next event; `None` when the engine is gone.
    pub async fn next(&mut self) -> Option<TokenEvent> {
        self.events.recv().await
    }

    /// As [`TokenStream::next`], for who listens to several.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<TokenEvent>> {
        self.events.poll_recv(context)
    }
}

/// The engine's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineStatus {
    /// Steps run.
    Ready,
    /// The thread ended; no sequence will be served any more.
    Failed,
}

/// Why no place could be reserved.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// There are not enough free places.
    #[error(
        "the server already holds {num_taken} requests and has no room for {wanted} more; try again in {} s",
        retry_after.as_secs()
    )]
    QueueFull { num_taken: usize, wanted: usize, retry_after: Duration },
    /// The engine thread is gone.
    #[error("the engine has stopped")]
    Stopped,
}

/// Why a sequence was refused.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// Prompt and completion do not fit.
    #[error(
        "the prompt has {prompt_tokens} tokens and up to {max_tokens} more were asked for, but the context holds {context}"
    )]
    ContextLengthExceeded { prompt_tokens: usize, max_tokens: usize, context: usize },
    /// An engine's KV cache as a whole is too small for it.
    #[error("the request needs {needed} KV cache blocks, but the cache has {total}")]
    KvCacheTooSmall { needed: usize, total: usize },
    /// The frames do not fit the model.
    #[error("invalid sequence: {0}")]
    Invalid(String),
    /// The engine thread is gone.
    #[error("the engine has stopped")]
    Stopped,
}

/// One sequence of a message to the engine thread; the message is all siblings.
#[derive(Debug)]
pub(super) struct Submission {
    pub sequence: NewSequence,
    pub events: mpsc::Sender<TokenEvent>,
    pub place: Place,
}

/// Given back when the engine has forgotten the sequence: first at the engine, for a free place must find one with room.
#[derive(Debug)]
pub(super) struct Place {
    _at_engine: Presence,
    _in_queue: OwnedSemaphorePermit,
}

/// What the handle must know of an engine to refuse early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineLimits {
    /// Most tokens of prompt and completion together.
    pub context: usize,
    /// Blocks of the KV cache.
    pub num_blocks: usize,
    /// Tokens a block.
    pub block_size: usize,
    /// Sequences in a step.
    pub max_running: usize,
    /// Sequences that wait.
    pub max_waiting: usize,
    /// Visual tokens a video becomes.
    pub visual_tokens: usize,
    /// Most videos a sequence.
    pub max_videos: usize,
    /// Side of the model's square input, pixels.
    pub image_size: usize,
}

/// The way into the engines of a server, one a device; cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineHandle {
    places: Arc<Semaphore>,
    fleet: Arc<Fleet>,
}

impl EngineHandle {
    pub(super) fn new(members: Vec<Member>) -> Self {
        let fleet = Fleet::new(members);
        EngineHandle { places: Arc::new(Semaphore::new(fleet.num_places())), fleet: Arc::new(fleet) }
    }

    /// One handle for all engines of `handles`, which run the same model and have no requests yet. From now on one queue
    /// is before them, and each request is placed where its video is or where least is to do.
    pub fn joined(handles: Vec<EngineHandle>) -> Self {
        EngineHandle::new(handles.iter().flat_map(|handle| handle.fleet.members.clone()).collect())
    }

    /// Takes a place in the queue, before anything is downloaded or decoded.
    ///
    /// # Errors
    /// As [`EngineHandle::reserve_many`].
    pub fn reserve(&self) -> Result<Permit, ReserveError> {
        self.reserve_many(1)
    }

    /// Takes places for `wanted` siblings, all or none.
    ///
    /// # Errors
    /// When fewer are free, or an engine has stopped.
    pub fn reserve_many(&self, wanted: usize) -> Result<Permit, ReserveError> {
        if self.status() == EngineStatus::Failed {
            return Err(ReserveError::Stopped);
        }
        let num_permits = u32::try_from(wanted).unwrap_or(u32::MAX);
        let places =
            self.places.clone().try_acquire_many_owned(num_permits).map_err(|_| ReserveError::QueueFull {
                num_taken: self.fleet.num_places() - self.places.available_permits(),
                wanted,
                retry_after: Duration::from_secs(1),
            })?;
        Ok(Permit { places, engine: self.clone() })
    }

    /// The engines' life, now: one that failed is the end of all.
    pub fn status(&self) -> EngineStatus {
        let failed = |member: &Member| *member.status.borrow() == EngineStatus::Failed;
        if self.fleet.members.iter().any(failed) { EngineStatus::Failed } else { EngineStatus::Ready }
    }

    /// Completes when an engine thread is gone.
    pub async fn stopped(&self) {
        let ends = self.fleet.members.iter().map(|member| {
            let mut status = member.status.clone();
            // An error means that the thread is gone without a word.
            Box::pin(async move { drop(status.wait_for(|status| *status == EngineStatus::Failed).await) })
        });
        select_all(ends).await;
    }

    /// What fits every engine.
    pub fn limits(&self) -> EngineLimits {
        self.fleet.limits
    }

    /// Blocks of all KV caches together.
    pub fn num_blocks(&self) -> usize {
        self.fleet.members.iter().map(|member| member.limits.num_blocks).sum()
    }
}

/// Places in the queue; given back when dropped, or each when the engine is done with the sequence made of it.
#[derive(Debug)]
pub struct Permit {
    places: OwnedSemaphorePermit,
    engine: EngineHandle,
}

impl Permit {
    /// Hands the sequence to the engine.
    ///
    /// # Errors
    /// When it can never run: longer than the context or the whole KV cache, or frames of a wrong size.
    pub fn submit(self, sequence: NewSequence) -> Result<TokenStream, SubmitError> {
        let stream = self.submit_siblings(vec![sequence])?.pop();
        Ok(stream.expect("one stream for one sequence: this is a bug"))
    }

    /// Hands over sequences on one and the same prompt, which is computed once for all of them. Gives their streams in
    /// the same order; there must be a place for each.
    ///
    /// # Errors
    /// As [`Permit::submit`]; then none of them runs.
    pub fn submit_siblings(self, sequences: Vec<NewSequence>) -> Result<Vec<TokenStream>, SubmitError> {
        self.submit_groups(vec![sequences])
    }

    /// Hands over several groups of siblings, and gives the streams of all in the same order.
    ///
    /// # Errors
    /// As [`Permit::submit`]; then none of them runs.
    pub fn submit_groups(mut self, groups: Vec<Vec<NewSequence>>) -> Result<Vec<TokenStream>, SubmitError> {
        let limits = self.engine.fleet.limits;
        groups.iter().flatten().try_for_each(|sequence| limits.check(sequence))?;
        let mut streams = Vec::new();
        for group in groups {
            streams.extend(self.submit_group(group)?);
        }
        Ok(streams)
    }

    fn submit_group(&mut self, sequences: Vec<NewSequence>) -> Result<Vec<TokenStream>, SubmitError> {
        let fleet = &self.engine.fleet;
        let (member, presences) = fleet.place(&sequences);
        let (mut siblings, mut streams) = (Vec::new(), Vec::new());
        for (sequence, presence) in sequences.into_iter().zip(presences) {
            let in_queue = self.places.split(1).expect("more sequences than places: this is a bug");
            let place = Place { _at_engine: presence, _in_queue: in_queue };
            // Room for every event the sequence can produce: the engine never waits for a slow client.
            let (sender, events) = mpsc::channel(
                sequence.sampling.max_tokens + 5, /* started, prompt computed and scored, end token, finished */
            );
            siblings.push(Submission { sequence, events: sender, place });
            streams.push(TokenStream { events });
        }
        member.submissions.try_send(siblings).map_err(|_| SubmitError::Stopped)?;
        Ok(streams)
    }
}

impl EngineLimits {
    /// Sequences an engine has room for.
    pub(super) fn max_sequences(&self) -> usize {
        self.max_running + self.max_waiting
    }

    /// What fits two engines on one model, whichever of them it comes to.
    pub(super) fn of_both(self, other: EngineLimits) -> EngineLimits {
        EngineLimits {
            context: self.context.min(other.context),
            num_blocks: self.num_blocks.min(other.num_blocks),
            ..self
        }
    }

    /// Whether `sequence` can ever run.
    fn check(&self, sequence: &NewSequence) -> Result<(), SubmitError> {
        let prompt_tokens = sequence.token_ids.len();
        let max_tokens = sequence.sampling.max_tokens;
        if prompt_tokens == 0 || max_tokens == 0 {
            return Err(SubmitError::Invalid("an empty prompt or completion".into()));
        }
        if prompt_tokens + max_tokens > self.context {
            return Err(SubmitError::ContextLengthExceeded {
                prompt_tokens,
                max_tokens,
                context: self.context,
            });
        }
        let needed = (prompt_tokens + max_tokens).div_ceil(self.block_size);
        if needed > self.num_blocks {
            return Err(SubmitError::KvCacheTooSmall { needed, total: self.num_blocks });
        }
        if sequence.videos.len() > self.max_videos {
            return Err(SubmitError::Invalid("more videos than the encoder cache holds".into()));
        }
        for video in &sequence.videos {
            let span_fits = video.span.end <= prompt_tokens && video.span.len() == self.visual_tokens;
            let frames_fit = video.frames.size == self.image_size && video.frames.num_frames() > 0;
            if !span_fits || !frames_fit {
                return Err(SubmitError::Invalid("the video does not fit the model's input".into()));
            }
        }
        Ok(())
    }
}
