//! Every metric of the server: the only place that knows their names.
//!
//! Called by `http` and `engine` through the methods of [`Metrics`]; read by `GET /metrics`. Never blocks.
//! The `vllm:` names are those which Kubernetes' inference gateway reads with no configuration.

use std::{sync::Arc, time::Duration};

use prometheus::{
    Counter, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    Opts, Registry, TextEncoder, core::Collector,
};

/// What a step of the engine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepKind {
    Encode,
    Prefill,
    Decode,
}

/// A stage of a request before the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Fetch,
    Probe,
    Decode,
    Resize,
    Prompt,
}

/// How many tokens of a finished request were of which kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TokenCounts {
    pub prompt: usize,
    /// Of the prompt: taken from the prefix cache.
    pub cached: usize,
    /// Of the prompt: visual tokens.
    pub video: usize,
    pub completion: usize,
    /// Of the completion: thinking.
    pub reasoning: usize,
}

/// All metrics of one server; cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    gateway: Gateway,
    time_to_first_token: Histogram,
    inter_token: Histogram,
    queue: Histogram,
    request: HistogramVec,
    stage: HistogramVec,
    step_size: HistogramVec,
    tokens: IntCounterVec,
    video_seconds: Counter,
    video_frames: IntCounter,
    media_errors: IntCounterVec,
    rejections: IntCounterVec,
    http_requests: IntCounterVec,
    cache_queries: IntCounterVec,
    cache_hits: IntCounterVec,
    kv_event_batches: IntCounterVec,
}

/// What the inference gateway reads, under vLLM's names.
#[derive(Debug)]
struct Gateway {
    running: IntGauge,
    waiting: IntGauge,
    kv_usage: Gauge,
    cache_config: GaugeVec,
}

impl Gateway {
    fn new(r: &Registry, model_name: &str) -> Self {
        let opts = |name, help| Opts::new(name, help).const_label("model_name", model_name);
        let count = |name, help| register(r, IntGauge::with_opts(opts(name, help)));
        let cache_config = opts("vllm:cache_config_info", "Shape of the KV cache.");
        Gateway {
            running: count("vllm:num_requests_running", "Sequences in the engine's steps."),
            waiting: count("vllm:num_requests_waiting", "Sequences waiting for a place."),
            kv_usage: register(
                r,
                Gauge::with_opts(opts("vllm:kv_cache_usage_perc", "KV blocks held by sequences, 0..1.")),
            ),
            cache_config: register(r, GaugeVec::new(cache_config, &["block_size", "num_gpu_blocks"])),
        }
    }
}

const SECONDS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0];
const STEP_SIZES: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

/// Registers one metric. Names and labels are constants: a refusal is a bug.
fn register<C: Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<C>) -> C {
    let metric = metric.expect("metric name or label is invalid: this is a bug");
    registry.register(Box::new(metric.clone())).expect("metric is registered twice: this is a bug");
    metric
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    register(registry, IntCounterVec::new(Opts::new(name, help), labels))
}

fn histogram(name: &str, help: &str, buckets: &[f64]) -> HistogramOpts {
    HistogramOpts::new(name, help).buckets(buckets.to_vec())
}

impl Metrics {
    /// A fresh set; the gateway's metrics carry `model_name`.
    pub fn new(model_name: &str) -> Self {
        let registry = Registry::new();
        let r = &registry;
        let seconds = |name, help| register(r, Histogram::with_opts(histogram(name, help, &SECONDS)));
        let seconds_by =
            |name, help, label| register(r, HistogramVec::new(histogram(name, help, &SECONDS), &[label]));
        Metrics(Arc::new(Inner {
            gateway: Gateway::new(r, model_name),
            time_to_first_token: seconds(
                "tinyllava_time_to_first_token_seconds",
                "From the request's arrival to its first token.",
            ),
            inter_token: seconds(
                "tinyllava_inter_token_latency_seconds",
                "Between two tokens of a sequence.",
            ),
            queue: seconds("tinyllava_queue_seconds", "From the engine's queue to the first step."),
            request: seconds_by("tinyllava_request_seconds", "Whole generation requests.", "outcome"),
            stage: seconds_by("tinyllava_stage_seconds", "One run of one stage.", "stage"),
            step_size: register(
                r,
                HistogramVec::new(
                    histogram(
                        "tinyllava_step_size",
                        "Frames encoded, prompt tokens prefilled or sequences decoded in a step.",
                        &STEP_SIZES,
                    ),
                    &["kind"],
                ),
            ),
            tokens: counters(r, "tinyllava_tokens_total", "Tokens of finished requests.", &["kind"]),
            video_seconds: register(
                r,
                Counter::new("tinyllava_video_seconds_total", "Length of the videos asked about."),
            ),
            video_frames: register(
                r,
                IntCounter::new("tinyllava_video_frames_total", "Frames given to the model."),
            ),
            media_errors: counters(r, "tinyllava_media_errors_total", "Unusable videos.", &["reason"]),
            rejections: counters(
                r,
                "tinyllava_rejections_total",
                "Requests refused at admission.",
                &["reason"],
            ),
            http_requests: counters(
                r,
                "tinyllava_http_requests_total",
                "Finished HTTP requests.",
                &["method", "route", "status"],
            ),
            cache_queries: counters(r, "tinyllava_cache_queries_total", "Asked of a cache.", &["cache"]),
            cache_hits: counters(r, "tinyllava_cache_hits_total", "Found in a cache.", &["cache"]),
            kv_event_batches: counters(
                r,
                "tinyllava_kv_event_batches_total",
                "Batches of KV events for routers.",
                &["outcome"],
            ),
            registry,
        }))
    }

    /// Sequences in the engine's steps.
    pub fn set_running(&self, sequences: usize) {
        self.0.gateway.running.set(sequences as i64);
    }

    /// Sequences that wait for admission.
    pub fn set_waiting(&self, sequences: usize) {
        self.0.gateway.waiting.set(sequences as i64);
    }

    /// Share of KV blocks held by sequences, 0..=1 (blocks kept only for reuse are free).
    pub fn set_kv_usage(&self, share: f64) {
        self.0.gateway.kv_usage.set(share);
    }

    /// The shape of the KV cache, once known.
    pub fn set_cache_config(&self, block_size: usize, num_blocks: usize) {
        let labels = [&block_size.to_string(), &num_blocks.to_string()];
        self.0.gateway.cache_config.with_label_values(&labels.map(String::as_str)).set(1.0);
    }

    /// The part of an engine step that was of one kind: how long it took, and its size
    /// (frames to encode, prompt tokens to prefill, sequences to decode).
    pub fn step(&self, kind: StepKind, seconds: f64, size: usize) {
        let name = match kind {
            StepKind::Encode => "encode",
            StepKind::Prefill => "prefill",
            StepKind::Decode => "decode_step",
        };
        self.observe_stage(name, seconds);
        self.0.step_size.with_label_values(&[name]).observe(size as f64);
    }

    /// A step that ran both prefill and decodes.
    pub fn mixed_step(&self, seconds: f64, prefill_tokens: usize, decodes: usize) {
        self.observe_stage("mixed_step", seconds);
        for (name, size) in [("prefill", prefill_tokens), ("decode_step", decodes)] {
            self.0.step_size.with_label_values(&[name]).observe(size as f64);
        }
    }

    /// What was asked of the prefix cache (tokens) and what it had.
    pub fn prefix_cache(&self, queries: u64, hits: u64) {
        self.cache("prefix", queries, hits);
    }

    /// What was asked of the encoder cache (videos) and what it had.
    pub fn encoder_cache(&self, queries: u64, hits: u64) {
        self.cache("encoder", queries, hits);
    }

    fn cache(&self, name: &str, queries: u64, hits: u64) {
        self.0.cache_queries.with_label_values(&[name]).inc_by(queries);
        self.0.cache_hits.with_label_values(&[name]).inc_by(hits);
    }

    /// A batch of KV events was "published" or "dropped".
    pub fn kv_event_batch(&self, outcome: &str) {
        self.0.kv_event_batches.with_label_values(&[outcome]).inc();
    }

    /// One stage of one request.
    pub fn stage(&self, stage: Stage, seconds: f64) {
        let name = match stage {
            Stage::Fetch => "fetch",
            Stage::Probe => "probe",
            Stage::Decode => "decode",
            Stage::Resize => "resize",
            Stage::Prompt => "prompt",
        };
        self.observe_stage(name, seconds);
    }

    /// A video passed the media stage: its length and the frames given to the model.
    pub fn video(&self, seconds: f64, frames: usize) {
        if seconds.is_finite() && seconds > 0.0 {
            self.0.video_seconds.inc_by(seconds);
        }
        self.0.video_frames.inc_by(frames as u64);
    }

    /// A video could not be used.
    pub fn media_error(&self, reason: &str) {
        self.0.media_errors.with_label_values(&[reason]).inc();
    }

    /// A request was refused before any work.
    pub fn rejection(&self, reason: &str) {
        self.0.rejections.with_label_values(&[reason]).inc();
    }

    /// A sequence got into its first step after `waited`.
    pub fn started(&self, waited: Duration) {
        self.0.queue.observe(waited.as_secs_f64());
    }

    /// The first token of a request came.
    pub fn first_token(&self, since_arrival: Duration) {
        self.0.time_to_first_token.observe(since_arrival.as_secs_f64());
    }

    /// A further token came.
    pub fn next_token(&self, since_last: Duration) {
        self.0.inter_token.observe(since_last.as_secs_f64());
    }

    /// A generation request ended.
    pub fn generation(&self, outcome: &str, took: Duration, counts: TokenCounts) {
        self.0.request.with_label_values(&[outcome]).observe(took.as_secs_f64());
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

    /// An HTTP request ended. `route` is the router's pattern, never the path itself.
    pub fn http_request(&self, method: &str, route: &str, status: u16) {
        self.0.http_requests.with_label_values(&[method, route, &status.to_string()]).inc();
    }

    /// Everything, in Prometheus' text format.
    pub fn render(&self) -> String {
        TextEncoder::new()
            .encode_to_string(&self.0.registry.gather())
            .expect("metrics are valid text: this is a bug")
    }

    fn observe_stage(&self, name: &str, seconds: f64) {
        self.0.stage.with_label_values(&[name]).observe(seconds);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_reads_its_names_without_configuration() {
        let metrics = Metrics::new("nano");
        metrics.set_running(2);
        metrics.set_waiting(1);
        metrics.set_kv_usage(0.25);
        metrics.set_cache_config(16, 100);
        let text = metrics.render();
        for line in [
            "vllm:num_requests_running{model_name=\"nano\"} 2",
            "vllm:num_requests_waiting{model_name=\"nano\"} 1",
            "vllm:kv_cache_usage_perc{model_name=\"nano\"} 0.25",
            "vllm:cache_config_info{block_size=\"16\",model_name=\"nano\",num_gpu_blocks=\"100\"} 1",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }

    #[test]
    fn own_metrics_count_by_label() {
        let metrics = Metrics::new("nano");
        metrics.step(StepKind::Decode, 0.01, 3);
        metrics.prefix_cache(10, 4);
        metrics.media_error("refused");
        metrics.generation(
            "completed",
            Duration::from_secs(1),
            TokenCounts { completion: 7, ..Default::default() },
        );
        let text = metrics.render();
        for line in [
            "tinyllava_step_size_sum{kind=\"decode_step\"} 3",
            "tinyllava_cache_hits_total{cache=\"prefix\"} 4",
            "tinyllava_media_errors_total{reason=\"refused\"} 1",
            "tinyllava_tokens_total{kind=\"completion\"} 7",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }

    #[test]
    fn two_servers_of_one_process_do_not_share_numbers() {
        let (one, other) = (Metrics::new("a"), Metrics::new("b"));
        one.set_running(5);
        assert!(other.render().contains("vllm:num_requests_running{model_name=\"b\"} 0"));
    }
}
