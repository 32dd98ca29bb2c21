//! What is told to the metrics, and by whom.
//!
//! `http` tells of requests, `media` of videos (through [`crate::telemetry::Trail`]), the engine of its steps. Every
//! method returns at once.

use std::time::Duration;

use prometheus::{IntGauge, TextEncoder};

use super::Metrics;
use crate::{
    scheduler::SchedulerStats,
    telemetry::{Outcome, Stage, TokenCounts},
};

/// What a step of the engine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepKind {
    Encode,
    Prefill,
    Decode,
}

/// What can be read off a server at any time, and is when its metrics are.
#[derive(Debug, Clone, Copy, Default)]
pub struct ServerState {
    pub model_loaded: bool,
    pub ready: bool,
    pub draining: bool,
    /// Decoder processes, videos that wait for one, and most at the same time.
    pub running_decoders: usize,
    pub waiting_decoders: usize,
    pub decoder_places: usize,
}

/// The engine.
impl Metrics {
    /// What one engine holds has changed; engines add up.
    pub fn engine_changed(&self, last: &SchedulerStats, now: &SchedulerStats) {
        let add = |gauge: &IntGauge, last: usize, now: usize| gauge.add(now as i64 - last as i64);
        let (gateway, blocks) = (&self.0.gateway, |state| self.0.state.kv_blocks.with_label_values(&[state]));
        add(&gateway.running, last.num_running, now.num_running);
        add(&gateway.waiting, last.num_waiting, now.num_waiting);
        let taken = |stats: &SchedulerStats| stats.num_used_blocks + stats.num_cached_blocks;
        add(&blocks("used"), last.num_used_blocks, now.num_used_blocks);
        add(&blocks("cached"), last.num_cached_blocks, now.num_cached_blocks);
        add(&blocks("free"), taken(now), taken(last));
    }

    /// Sequences of one engine, running and waiting.
    pub fn engine_sequences(&self, engine: usize) -> IntGauge {
        self.0.engine_sequences.with_label_values(&[&engine.to_string()])
    }

    /// The shape of the KV caches, once known: tokens a block, and the blocks of all engines.
    pub fn set_cache_config(&self, block_size: usize, num_blocks: usize) {
        let labels = [&block_size.to_string(), &num_blocks.to_string()];
        self.0.gateway.cache_config.with_label_values(&labels.map(String::as_str)).set(1.0);
        self.0.state.kv_blocks.with_label_values(&["free"]).set(num_blocks as i64);
    }

    /// A step, or the part of it that was of one kind: how long it took, and its size (frames to encode, prompt tokens
    /// to prefill, sequences to decode).
    pub fn step(&self, kind: StepKind, seconds: f64, size: usize) {
        let steps = &self.0.steps;
        let (time, sizes) = match kind {
            StepKind::Encode => (&steps.encode, &steps.encode_size),
            StepKind::Prefill => (&steps.prefill, &steps.prefill_size),
            StepKind::Decode => (&steps.decode, &steps.decode_size),
        };
        time.observe(seconds);
        sizes.observe(size as f64);
    }

    /// A step that ran both prefill and decodes.
    pub fn mixed_step(&self, seconds: f64, prefill_tokens: usize, decodes: usize) {
        let steps = &self.0.steps;
        steps.mixed.observe(seconds);
        steps.prefill_size.observe(prefill_tokens as f64);
        steps.decode_size.observe(decodes as f64);
    }

    /// What was asked of the prefix cache (tokens) and what it had.
    pub fn prefix_cache(&self, queries: u64, hits: u64) {
        self.cache("prefix", queries, hits);
    }

    /// What was asked of the encoder cache (videos) and what it had.
    pub fn encoder_cache(&self, queries: u64, hits: u64) {
        self.cache("encoder", queries, hits);
    }

    /// A batch of KV events was "published" or "dropped".
    pub fn kv_event_batch(&self, outcome: &str) {
        self.0.kv_event_batches.with_label_values(&[outcome]).inc();
    }

    fn cache(&self, name: &str, queries: u64, hits: u64) {
        if queries > 0 {
            self.0.cache_queries.with_label_values(&[name]).inc_by(queries);
            self.0.cache_hits.with_label_values(&[name]).inc_by(hits);
        }
    }
}

/// The media stage.
impl Metrics {
    /// A stage of a request has ended well. Stages within the engine are counted by its steps.
    pub fn stage(&self, stage: Stage, spent: Duration) {
        let name = match stage {
            Stage::Fetch => "fetch",
            Stage::DecodeWait => "decode_wait",
            Stage::Probe => "probe",
            Stage::Decode => "decode",
            Stage::Resize => "resize",
            Stage::Prompt => "prompt",
            Stage::Queue => return self.0.latency.queue.observe(spent.as_secs_f64()),
            Stage::Encode | Stage::Prefill | Stage::Generate => return,
        };
        self.0.media.stage.with_label_values(&[name]).observe(spent.as_secs_f64());
    }

    /// A video passed the media stage: its length and the frames given to the model.
    pub fn video(&self, seconds: f64, frames: usize) {
        if seconds.is_finite() && seconds > 0.0 {
            self.0.media.seconds.inc_by(seconds);
        }
        self.0.media.frames.inc_by(frames as u64);
    }

    /// Frames that came out of a decoder.
    pub fn decoded_frames(&self, frames: usize) {
        self.0.media.decoded_frames.inc_by(frames as u64);
    }

    /// Frames of a video were asked for; `hit`: no decoder was needed.
    pub fn frame_cache(&self, hit: bool) {
        self.cache("frames", 1, u64::from(hit));
    }

    /// A video could not be used.
    pub fn media_error(&self, reason: &str) {
        self.0.media.errors.with_label_values(&[reason]).inc();
    }
}

/// Requests.
impl Metrics {
    /// A request was refused before any work.
    pub fn rejection(&self, reason: &str) {
        self.0.rejections.with_label_values(&[reason]).inc();
    }

    /// The first token of a request came.
    pub fn first_token(&self, since_arrival: Duration) {
        self.0.latency.first_token.observe(since_arrival.as_secs_f64());
    }

    /// The first token of a request's answer came.
    pub fn first_answer_token(&self, since_arrival: Duration) {
        self.0.latency.first_answer_token.observe(since_arrival.as_secs_f64());
    }

    /// A further token came.
    pub fn next_token(&self, since_last: Duration) {
        self.0.latency.inter_token.observe(since_last.as_secs_f64());
    }

    /// A generation request ended.
    pub fn generation(&self, outcome: Outcome, took: Duration, counts: TokenCounts) {
        self.0.latency.request.with_label_values(&[outcome.name()]).observe(took.as_secs_f64());
        let kinds = [
            ("prompt", counts.prompt),
            ("cached", counts.cached),
            ("video", counts.video),
            ("completion", counts.completion),
            ("reasoning", counts.reasoning),
        ];
        for (kind, count) in kinds {
            self.0.tokens.with_label_values(&[kind]).inc_by(count as u64);
        }
    }

    /// Responses of these kinds will come: they are counted from zero.
    pub fn expect_responses(&self, method: &str, route: &str, statuses: &[u16]) {
        for status in statuses {
            self.0.http_requests.with_label_values(&[method, route, &status.to_string()]).inc_by(0);
        }
    }

    /// An HTTP request came.
    pub fn http_began(&self) {
        self.0.http_in_flight.inc();
    }

    /// One that came is over. `route` is the router's pattern, never the path itself.
    pub fn http_request(&self, method: &str, route: &str, status: u16) {
        self.0.http_in_flight.dec();
        self.0.http_requests.with_label_values(&[method, route, &status.to_string()]).inc();
    }

    /// As of now.
    pub fn set_state(&self, now: ServerState) {
        let state = &self.0.state;
        state.model_loaded.set(i64::from(now.model_loaded));
        state.ready.set(i64::from(now.ready));
        state.draining.set(i64::from(now.draining));
        let decoders = &self.0.media.decoders;
        decoders.with_label_values(&["running"]).set(now.running_decoders as i64);
        decoders.with_label_values(&["waiting"]).set(now.waiting_decoders as i64);
        self.0.media.decoder_places.set(now.decoder_places as i64);
    }

    /// Everything, in Prometheus' text format.
    pub fn render(&self) -> String {
        let blocks = |state| self.0.state.kv_blocks.with_label_values(&[state]).get();
        let (used, idle) = (blocks("used"), blocks("cached") + blocks("free"));
        self.0.gateway.kv_usage.set(used as f64 / (used + idle).max(1) as f64);
        TextEncoder::new()
            .encode_to_string(&self.0.registry.gather())
            .expect("metrics are valid text: this is a bug")
    }
}
