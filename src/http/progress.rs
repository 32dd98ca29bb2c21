//! How far a chat request got: its deadline, its times and counts. Reports them once, however it ends.
//!
//! Made by [`super::pipeline`], carried along by [`super::generation::Generation`]. Never decides anything.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    error::ApiError,
    record::{GenerationRecord, RequestRecord},
};
use crate::{
    media::VideoFrames,
    shutdown::WorkGuard,
    telemetry::{
        Metrics,
        metrics::{Stage, TokenCounts},
    },
};

/// When a request must be over.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    at: tokio::time::Instant,
    timeout: Duration,
}

impl Deadline {
    /// `timeout` after `arrival`.
    pub fn new(arrival: Instant, timeout: Duration) -> Self {
        Deadline { at: tokio::time::Instant::from_std(arrival) + timeout, timeout }
    }

    /// The outcome of `work`, if it comes in time.
    ///
    /// # Errors
    /// [`ApiError::DeadlineExceeded`]; `work` is dropped.
    pub async fn bound<T>(self, work: impl Future<Output = T>) -> Result<T, ApiError> {
        tokio::time::timeout_at(self.at, work)
            .await
            .map_err(|_| ApiError::DeadlineExceeded { seconds: self.timeout.as_secs_f64() })
    }
}

/// See the module. A progress that is dropped before it has an end was left by its client.
#[derive(Debug)]
pub struct Progress {
    generation: GenerationRecord,
    submitted: Option<Instant>,
    deadline: Deadline,
    metrics: Metrics,
    record: Arc<RequestRecord>,
    /// A shutdown waits for it.
    _work: WorkGuard,
}

impl Progress {
    /// At the arrival of the request.
    pub fn new(record: Arc<RequestRecord>, metrics: Metrics, timeout: Duration, work: WorkGuard) -> Self {
        Progress {
            generation: GenerationRecord { outcome: "client_left", ..GenerationRecord::default() },
            submitted: None,
            deadline: Deadline::new(record.arrival, timeout),
            metrics,
            record,
            _work: work,
        }
    }

    /// The client wants it sooner than the server's own limit.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.deadline = Deadline::new(self.record.arrival, timeout);
    }

    /// When the request must be over.
    pub fn deadline(&self) -> Deadline {
        self.deadline
    }

    /// What is known of the token counts.
    pub fn tokens(&self) -> TokenCounts {
        self.generation.tokens
    }

    /// Whether the client asked for a stream.
    pub fn set_stream(&mut self, stream: bool) {
        self.generation.stream = stream;
    }

    /// A video was fetched and decoded (or found in the cache); `took`: with the others, at the same time.
    pub fn video_loaded(&mut self, frames: &VideoFrames, took: Duration) {
        self.generation.media_seconds = Some(took.as_secs_f64());
        self.generation.num_frames += frames.info.num_frames;
        let timings = &frames.timings;
        self.metrics.stage(Stage::Fetch, timings.fetch_seconds);
        let stages = [
            (Stage::Probe, timings.probe_seconds),
            (Stage::Decode, timings.decode_seconds),
            (Stage::Resize, timings.resize_seconds),
        ];
        // Frames from the cache took no time in these stages, for they were not in them.
        for (stage, seconds) in stages.into_iter().filter(|(_, seconds)| *seconds > 0.0) {
            self.metrics.stage(stage, seconds);
        }
        self.metrics.video(frames.info.duration.unwrap_or(0.0), frames.info.num_frames);
    }

    /// The prompt was rendered and tokenised.
    pub fn prompt_built(&mut self, prompt_tokens: usize, video_tokens: usize, took: Duration) {
        self.generation.prompt_seconds = Some(took.as_secs_f64());
        self.generation.tokens.prompt = prompt_tokens;
        self.generation.tokens.video = video_tokens;
        self.metrics.stage(Stage::Prompt, took.as_secs_f64());
    }

    /// The sequence is with the engine.
    pub fn submitted(&mut self) {
        self.submitted = Some(Instant::now());
    }

    /// The engine admitted the sequence.
    pub fn started(&mut self, cached_tokens: usize) {
        self.generation.tokens.cached = cached_tokens;
        if let Some(submitted) = self.submitted {
            let waited = submitted.elapsed();
            self.generation.queue_seconds = Some(waited.as_secs_f64());
            self.metrics.started(waited);
        }
    }

    /// A token came; `last` is when the one before it in the same choice did.
    pub fn token(&mut self, last: Option<Instant>, now: Instant) {
        self.generation.tokens.completion += 1;
        if let Some(last) = last {
            self.metrics.next_token(now - last);
        } else if self.generation.first_token_seconds.is_none() {
            let since_arrival = now - self.record.arrival;
            self.generation.first_token_seconds = Some(since_arrival.as_secs_f64());
            self.metrics.first_token(since_arrival);
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
        self.generation.outcome = "completed";
    }

    /// The request ended with `error`.
    pub fn ended_by(&mut self, error: &ApiError) {
        self.generation.outcome = if error.status().is_server_error() { "failed" } else { "refused" };
        self.generation.detail = error.code();
        if let ApiError::Media(error) | ApiError::Video { error, .. } = error {
            self.metrics.media_error(error.reason());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        let generation = std::mem::take(&mut self.generation);
        self.metrics.generation(generation.outcome, self.record.arrival.elapsed(), generation.tokens);
        self.record.set_generation(generation);
    }
}
