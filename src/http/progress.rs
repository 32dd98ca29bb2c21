//! How far a chat request got: its deadline, its times and counts. Reports them once, however it ends.
//!
//! Made by [`super::pipeline`], carried along by [`super::generation::Generation`]. Never decides anything.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;

use super::{auth::ClientKey, error::ApiError, record::RequestRecord};
use crate::{
    config::Config,
    engine::PromptTimes,
    media::{Caller, Hold, Salt, VideoFrames},
    shutdown::WorkGuard,
    telemetry::{ContentRecord, GenerationRecord, Outcome, Stage, StageRun, TokenCounts},
};

/// When a request must be over: at a moment, or when the server leaves for good.
#[derive(Debug, Clone)]
pub struct Deadline {
    at: tokio::time::Instant,
    timeout: Duration,
    cut_off: CancellationToken,
}

impl Deadline {
    /// `timeout` after `arrival`, or with `cut_off`.
    pub fn new(arrival: Instant, timeout: Duration, cut_off: CancellationToken) -> Self {
        Deadline { at: tokio::time::Instant::from_std(arrival) + timeout, timeout, cut_off }
    }

    /// The outcome of `work`, if it comes in time.
    ///
    /// # Errors
    /// [`ApiError::DeadlineExceeded`], or [`ApiError::Draining`]; `work` is dropped.
    pub async fn bound<T>(&self, work: impl Future<Output = T>) -> Result<T, ApiError> {
        tokio::select! {
            biased;
            done = tokio::time::timeout_at(self.at, work) => {
                done.map_err(|_| ApiError::DeadlineExceeded { seconds: self.timeout.as_secs_f64() })
            }
            () = self.cut_off.cancelled() => Err(ApiError::Draining),
        }
    }
}

/// Where in the engine a request is, and since when.
#[derive(Debug, Clone, Copy)]
enum Phase {
    Before,
    Queued(Instant),
    Prefilling(Instant),
    Generating(Instant),
}

/// See the module. A progress that is dropped before it has an end was left by its client.
#[derive(Debug)]
pub struct Progress {
    generation: GenerationRecord,
    phase: Phase,
    deadline: Deadline,
    deadline_is_the_clients: bool,
    /// How much of what is said goes on the log; `None`: nothing.
    max_logged_bytes: Option<usize>,
    record: Arc<RequestRecord>,
    /// A shutdown waits for it.
    work: WorkGuard,
}

impl Progress {
    /// At the arrival of the request.
    pub fn new(record: Arc<RequestRecord>, config: &Config, work: WorkGuard) -> Self {
        Progress {
            generation: GenerationRecord::default(),
            phase: Phase::Before,
            deadline: Deadline::new(record.arrival, config.request_timeout, work.cut_off()),
            deadline_is_the_clients: false,
            max_logged_bytes: config.log_content.then_some(config.max_logged_text_bytes),
            record,
            work,
        }
    }

    /// The client wants it sooner than the server's own limit.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.deadline = Deadline::new(self.record.arrival, timeout, self.work.cut_off());
        self.deadline_is_the_clients = true;
    }

    /// When the request must be over.
    pub fn deadline(&self) -> Deadline {
        self.deadline.clone()
    }

    /// What is known of the token counts.
    pub fn tokens(&self) -> TokenCounts {
        self.generation.tokens
    }

    /// What the client asked for.
    pub fn asked(&mut self, stream: bool, num_choices: usize) {
        self.generation.stream = stream;
        self.generation.num_choices = num_choices;
    }

    /// For whom the videos of this request are loaded.
    pub fn caller(&self, salt: Salt, client: Option<ClientKey>, hold: Hold) -> Caller {
        let (headers, trail) = (self.record.trace_headers(), self.record.trail.clone());
        Caller { salt, client: client.map(|ClientKey(digest)| digest), hold, headers, trail }
    }

    /// A video was fetched and decoded, or found in the cache.
    pub fn video_loaded(&mut self, frames: &VideoFrames) {
        self.generation.num_frames += frames.info.num_frames;
        self.record.metrics.video(frames.info.duration.unwrap_or(0.0), frames.info.num_frames);
    }

    /// The prompt was rendered and tokenised, since `started`.
    pub fn prompt_built(&mut self, prompt_tokens: usize, video_tokens: usize, started: Instant) {
        self.generation.tokens.prompt = prompt_tokens;
        self.generation.tokens.video = video_tokens;
        self.ended(Stage::Prompt, started);
    }

    /// Whether the log is to have the prompt.
    pub fn logs_content(&self) -> bool {
        self.max_logged_bytes.is_some()
    }

    /// What the model is asked, for the log.
    pub fn prompt_is(&mut self, mut prompt: String) {
        if let Some(max_bytes) = self.max_logged_bytes {
            prompt.truncate(prompt.floor_char_boundary(max_bytes));
            self.generation.content.get_or_insert_default().prompt = prompt;
        }
    }

    /// A choice says more, for the log.
    pub fn said(&mut self, choice: usize, text: &str) {
        if let Some(max_bytes) = self.max_logged_bytes {
            let content: &mut ContentRecord = self.generation.content.get_or_insert_default();
            content.reply(choice, text, max_bytes);
        }
    }

    /// The sequences are with the engine.
    pub fn submitted(&mut self) {
        self.phase = Phase::Queued(Instant::now());
    }

    /// The engine admitted the first sequence of a prompt.
    pub fn started(&mut self, cached_tokens: usize) {
        self.generation.tokens.cached += cached_tokens;
        if let Phase::Queued(since) = self.phase {
            self.ended(Stage::Queue, since);
            self.phase = Phase::Prefilling(Instant::now());
        }
    }

    /// The first sequence's prompt is computed.
    pub fn prompt_computed(&mut self, times: PromptTimes) {
        let stages = [(Stage::Encode, times.encode), (Stage::Prefill, times.prefill)];
        for (stage, times) in stages {
            if let Some((started, ended)) = times {
                self.record.trail.push(StageRun::new(stage, started, ended));
            }
        }
        self.phase = Phase::Generating(Instant::now());
    }

    /// A token came; `last` is when the one before it in the same choice did.
    pub fn token(&mut self, last: Option<Instant>, now: Instant) {
        self.generation.tokens.completion += 1;
        if let Some(last) = last {
            self.record.metrics.next_token(now - last);
        } else if self.generation.first_token.is_none() {
            let since_arrival = now - self.record.arrival;
            self.generation.first_token = Some(since_arrival);
            self.record.metrics.first_token(since_arrival);
        }
    }

    /// Text of an answer came, not of the thinking before it.
    pub fn answers(&mut self) {
        if self.generation.first_answer_token.is_none() {
            let since_arrival = self.record.arrival.elapsed();
            self.generation.first_answer_token = Some(since_arrival);
            self.record.metrics.first_answer_token(since_arrival);
        }
    }

    /// One choice is whole. Of several, one that was cut off is the one to tell of.
    pub fn choice_completed(&mut self, finish_reason: &'static str, reasoning_tokens: usize) {
        self.generation.tokens.reasoning += reasoning_tokens;
        if self.generation.detail.is_empty() || finish_reason == "length" {
            self.generation.detail = finish_reason;
        }
    }

    /// The reply is whole.
    pub fn completed(&mut self) {
        self.generation.outcome = Outcome::Completed;
    }

    /// The request ended with `error`.
    pub fn ended_by(&mut self, error: &ApiError) {
        let at_fault = match error {
            // Whoever is refused while the server drains never gets here: this one was cut off.
            ApiError::Draining => true,
            ApiError::Loading => false,
            ApiError::DeadlineExceeded { .. } => !self.deadline_is_the_clients,
            other => other.status().is_server_error(),
        };
        self.generation.outcome = if at_fault { Outcome::Failed } else { Outcome::Refused };
        self.generation.detail = error.code();
        if let ApiError::Media(error) | ApiError::Video { error, .. } = error {
            self.record.metrics.media_error(error.reason());
        }
    }

    fn ended(&self, stage: Stage, started: Instant) {
        self.record.trail.push(StageRun::new(stage, started, Instant::now()));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.generation.outcome = Outcome::Failed;
            self.generation.detail = "internal_error";
        }
        let unfinished = match self.phase {
            Phase::Before => None,
            Phase::Queued(since) => Some((Stage::Queue, since)),
            Phase::Prefilling(since) => Some((Stage::Prefill, since)),
            Phase::Generating(since) => Some((Stage::Generate, since)),
        };
        if let Some((stage, since)) = unfinished {
            let run = StageRun::new(stage, since, Instant::now());
            let failed = self.generation.outcome != Outcome::Completed;
            self.record.trail.push(StageRun { failed, ..run });
        }
        let generation = std::mem::take(&mut self.generation);
        let took = self.record.arrival.elapsed();
        self.record.metrics.generation(generation.outcome, took, generation.tokens);
        self.record.set_generation(generation);
    }
}
