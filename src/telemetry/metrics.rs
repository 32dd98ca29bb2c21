//! Every metric of the server: the only place that knows their names.
//!
//! Made once a server; counted through the methods in `recording.rs`, read by `GET /metrics`. Never blocks.
//! The `vllm:` names are those which Kubernetes' inference gateway reads with no configuration. Label values that are
//! known exist from the start, at zero: an alert on the first error of a kind would otherwise not see it.
//! `docs/metrics.md` says what each means; a test holds the two together.

mod recording;

use std::sync::Arc;

use prometheus::{
    Counter, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, core::Collector, process_collector::ProcessCollector,
};

use super::Outcome;
pub use recording::{ServerState, StepKind};

/// Seconds of each stage; `tinyllava bench` reads it back.
pub const STAGE_SECONDS: &str = "tinyllava_stage_seconds";

/// All metrics of one server; cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    gateway: Gateway,
    state: State,
    latency: Latency,
    media: Media,
    steps: Steps,
    tokens: IntCounterVec,
    rejections: IntCounterVec,
    http_requests: IntCounterVec,
    http_in_flight: IntGauge,
    cache_queries: IntCounterVec,
    cache_hits: IntCounterVec,
    kv_event_batches: IntCounterVec,
    engine_sequences: IntGaugeVec,
}

/// What the inference gateway reads, under vLLM's names.
#[derive(Debug)]
struct Gateway {
    running: IntGauge,
    waiting: IntGauge,
    kv_usage: Gauge,
    cache_config: GaugeVec,
}

/// Whether the server can work, and its KV cache.
#[derive(Debug)]
struct State {
    model_loaded: IntGauge,
    ready: IntGauge,
    draining: IntGauge,
    kv_blocks: IntGaugeVec,
}

/// What a client waits for.
#[derive(Debug)]
struct Latency {
    first_token: Histogram,
    first_answer_token: Histogram,
    inter_token: Histogram,
    queue: Histogram,
    request: HistogramVec,
}

/// Everything before the engine.
#[derive(Debug)]
struct Media {
    stage: HistogramVec,
    seconds: Counter,
    frames: IntCounter,
    decoded_frames: IntCounter,
    errors: IntCounterVec,
    decoders: IntGaugeVec,
    decoder_places: IntGauge,
}

/// Steps of the engine; the handles are at hand, for there may be hundreds a second.
#[derive(Debug)]
struct Steps {
    encode: Histogram,
    prefill: Histogram,
    decode: Histogram,
    mixed: Histogram,
    encode_size: Histogram,
    prefill_size: Histogram,
    decode_size: Histogram,
}

/// From a token on a GPU to a whole request on a CPU.
const SECONDS: [f64; 19] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
    300.0, 600.0,
];
const STEP_SIZES: [f64; 13] =
    [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0];

/// Why requests are refused at admission: the codes of the errors with status 429 and 503.
pub const REJECTIONS: [&str; 5] = ["queue_full", "too_many_uploads", "loading", "draining", "engine_failed"];
/// Why videos are unusable: the reasons of `media`'s errors.
pub const MEDIA_ERRORS: [&str; 7] =
    ["refused", "fetch_failed", "too_many_bytes", "unsupported", "undecodable", "decode_timeout", "internal"];
const MEDIA_STAGES: [&str; 6] = ["fetch", "decode_wait", "probe", "decode", "resize", "prompt"];
const CACHES: [&str; 3] = ["frames", "encoder", "prefix"];
const TOKEN_KINDS: [&str; 5] = ["prompt", "cached", "video", "completion", "reasoning"];

/// Registers one metric. Names and labels are constants: a refusal is a bug.
fn register<C: Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<C>) -> C {
    let metric = metric.expect("metric name or label is invalid: this is a bug");
    registry.register(Box::new(metric.clone())).expect("metric is registered twice: this is a bug");
    metric
}

fn gauge(r: &Registry, name: &str, help: &str) -> IntGauge {
    register(r, IntGauge::new(name, help))
}

fn gauges(r: &Registry, name: &str, help: &str, label: &str, values: &[&str]) -> IntGaugeVec {
    let gauges = register(r, IntGaugeVec::new(Opts::new(name, help), &[label]));
    values.iter().for_each(|value| gauges.with_label_values(&[value]).set(0));
    gauges
}

fn counter(r: &Registry, name: &str, help: &str) -> IntCounter {
    register(r, IntCounter::new(name, help))
}

fn counters(r: &Registry, name: &str, help: &str, label: &str, values: &[&str]) -> IntCounterVec {
    let counters = register(r, IntCounterVec::new(Opts::new(name, help), &[label]));
    values.iter().for_each(|value| counters.with_label_values(&[value]).inc_by(0));
    counters
}

fn seconds(r: &Registry, name: &str, help: &str) -> Histogram {
    register(r, Histogram::with_opts(HistogramOpts::new(name, help).buckets(SECONDS.to_vec())))
}

fn histograms(r: &Registry, opts: HistogramOpts, label: &str, values: &[&str]) -> HistogramVec {
    let histograms = register(r, HistogramVec::new(opts, &[label]));
    values.iter().for_each(|value| drop(histograms.with_label_values(&[value])));
    histograms
}

impl Gateway {
    fn new(r: &Registry, model_name: &str) -> Self {
        let opts = |name, help| Opts::new(name, help).const_label("model_name", model_name);
        let count = |name, help| register(r, IntGauge::with_opts(opts(name, help)));
        let kv_usage = opts("vllm:kv_cache_usage_perc", "KV blocks held by sequences, 0..1.");
        let cache_config = opts("vllm:cache_config_info", "Shape of the KV cache.");
        Gateway {
            running: count("vllm:num_requests_running", "Sequences in the engine's steps."),
            waiting: count("vllm:num_requests_waiting", "Sequences waiting for a place."),
            kv_usage: register(r, Gauge::with_opts(kv_usage)),
            cache_config: register(r, GaugeVec::new(cache_config, &["block_size", "num_gpu_blocks"])),
        }
    }
}

impl State {
    fn new(r: &Registry, model_name: &str) -> Self {
        let info = Opts::new("tinyllava_build_info", "Version of the server and the model it serves.")
            .const_label("version", env!("CARGO_PKG_VERSION"))
            .const_label("model_name", model_name);
        register(r, IntGauge::with_opts(info)).set(1);
        State {
            model_loaded: gauge(r, "tinyllava_model_loaded", "1 once the model is loaded."),
            ready: gauge(r, "tinyllava_ready", "1 while new requests are taken on."),
            draining: gauge(r, "tinyllava_draining", "1 from the request to stop on."),
            kv_blocks: gauges(
                r,
                "tinyllava_kv_blocks",
                "Blocks of the KV cache: held by sequences, kept for the next prompt that begins like it, or free.",
                "state",
                &["used", "cached", "free"],
            ),
        }
    }
}

impl Latency {
    fn new(r: &Registry) -> Self {
        let request =
            HistogramOpts::new("tinyllava_request_seconds", "Whole generation requests, by how they ended.");
        Latency {
            first_token: seconds(
                r,
                "tinyllava_time_to_first_token_seconds",
                "From the request's arrival to its first token.",
            ),
            first_answer_token: seconds(
                r,
                "tinyllava_time_to_first_answer_token_seconds",
                "From the request's arrival to the first token of its answer, after the thinking.",
            ),
            inter_token: seconds(
                r,
                "tinyllava_inter_token_latency_seconds",
                "Between two tokens of a sequence.",
            ),
            queue: seconds(r, "tinyllava_queue_seconds", "From the engine's queue to the first step."),
            request: histograms(
                r,
                request.buckets(SECONDS.to_vec()),
                "outcome",
                &Outcome::ALL.map(Outcome::name),
            ),
        }
    }
}

impl Media {
    /// `stage` is shared with the engine's steps.
    fn new(r: &Registry, stage: HistogramVec) -> Self {
        Media {
            stage,
            seconds: register(
                r,
                Counter::new("tinyllava_video_seconds_total", "Length of the videos asked about."),
            ),
            frames: counter(r, "tinyllava_video_frames_total", "Frames given to the model."),
            decoded_frames: counter(
                r,
                "tinyllava_video_frames_decoded_total",
                "Frames that decoders had to decode to get at those.",
            ),
            errors: counters(
                r,
                "tinyllava_media_errors_total",
                "Requests that ended because of their video.",
                "reason",
                &MEDIA_ERRORS,
            ),
            decoders: gauges(
                r,
                "tinyllava_decoders",
                "Decoder processes that run, and videos that wait for one.",
                "state",
                &["running", "waiting"],
            ),
            decoder_places: gauge(
                r,
                "tinyllava_decoder_places",
                "Decoder processes that may run at the same time.",
            ),
        }
    }
}

impl Steps {
    fn new(r: &Registry, stage: &HistogramVec) -> Self {
        let opts = HistogramOpts::new(
            "tinyllava_step_size",
            "Frames encoded, prompt tokens prefilled or sequences decoded in a step.",
        );
        let sizes = histograms(r, opts.buckets(STEP_SIZES.to_vec()), "kind", &[]);
        let (stage, size) =
            (|name| stage.with_label_values(&[name]), |kind| sizes.with_label_values(&[kind]));
        Steps {
            encode: stage("encode"),
            prefill: stage("prefill"),
            decode: stage("decode_step"),
            mixed: stage("mixed_step"),
            encode_size: size("encode"),
            prefill_size: size("prefill"),
            decode_size: size("decode_step"),
        }
    }
}

impl Metrics {
    /// A fresh set; the gateway's metrics carry `model_name`.
    pub fn new(model_name: &str) -> Self {
        let registry = Registry::new();
        let r = &registry;
        r.register(Box::new(ProcessCollector::for_self()))
            .expect("a registry has one process: this is a bug");
        let stage = HistogramOpts::new(STAGE_SECONDS, "One run of one stage.");
        let stage = histograms(r, stage.buckets(SECONDS.to_vec()), "stage", &MEDIA_STAGES);
        let http_requests = Opts::new("tinyllava_http_requests_total", "Finished HTTP requests.");
        Metrics(Arc::new(Inner {
            gateway: Gateway::new(r, model_name),
            state: State::new(r, model_name),
            latency: Latency::new(r),
            steps: Steps::new(r, &stage),
            media: Media::new(r, stage),
            tokens: counters(
                r,
                "tinyllava_tokens_total",
                "Tokens of finished requests.",
                "kind",
                &TOKEN_KINDS,
            ),
            rejections: counters(
                r,
                "tinyllava_rejections_total",
                "Requests refused at admission.",
                "reason",
                &REJECTIONS,
            ),
            http_requests: register(r, IntCounterVec::new(http_requests, &["method", "route", "status"])),
            http_in_flight: gauge(
                r,
                "tinyllava_http_requests_in_flight",
                "HTTP requests whose reply is not over.",
            ),
            cache_queries: counters(
                r,
                "tinyllava_cache_queries_total",
                "Asked of a cache: prompt tokens of prefix, videos of the others.",
                "cache",
                &CACHES,
            ),
            cache_hits: counters(
                r,
                "tinyllava_cache_hits_total",
                "Found in a cache, in the same units.",
                "cache",
                &CACHES,
            ),
            kv_event_batches: counters(
                r,
                "tinyllava_kv_event_batches_total",
                "Batches of KV events for routers.",
                "outcome",
                &["published", "dropped"],
            ),
            engine_sequences: gauges(
                r,
                "tinyllava_engine_sequences",
                "Sequences of each engine, running or waiting; engines are numbered as --devices lists them.",
                "engine",
                &["0"],
            ),
            registry,
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        scheduler::SchedulerStats,
        telemetry::{Stage, TokenCounts},
    };

    fn assert_lines(metrics: &Metrics, lines: &[&str]) {
        let text = metrics.render();
        for line in lines {
            assert!(text.lines().any(|have| have == *line), "{line} is missing in\n{text}");
        }
    }

    #[test]
    fn gateway_reads_its_names_without_configuration_and_engines_add_up() {
        let metrics = Metrics::new("nano");
        metrics.set_cache_config(16, 100);
        let of_engine = |num_running, num_waiting, num_used_blocks, num_cached_blocks| SchedulerStats {
            num_running,
            num_waiting,
            num_used_blocks,
            num_cached_blocks,
            ..SchedulerStats::default()
        };
        let (one, other) = (of_engine(2, 3, 40, 5), of_engine(1, 1, 15, 5));
        metrics.engine_changed(&SchedulerStats::default(), &one);
        metrics.engine_changed(&SchedulerStats::default(), &other);
        metrics.engine_changed(&one, &of_engine(1, 0, 10, 0));
        assert_lines(
            &metrics,
            &[
                "vllm:num_requests_running{model_name=\"nano\"} 2",
                "vllm:num_requests_waiting{model_name=\"nano\"} 1",
                "vllm:kv_cache_usage_perc{model_name=\"nano\"} 0.25",
                "vllm:cache_config_info{block_size=\"16\",model_name=\"nano\",num_gpu_blocks=\"100\"} 1",
                "tinyllava_kv_blocks{state=\"free\"} 70",
            ],
        );
    }

    #[test]
    fn own_metrics_count_by_label() {
        let metrics = Metrics::new("nano");
        metrics.step(StepKind::Decode, 0.01, 3);
        metrics.prefix_cache(10, 4);
        metrics.media_error("refused");
        metrics.stage(Stage::DecodeWait, Duration::from_secs(400));
        let counts = TokenCounts { completion: 7, ..Default::default() };
        metrics.generation(Outcome::Completed, Duration::from_secs(1), counts);
        assert_lines(
            &metrics,
            &[
                "tinyllava_step_size_sum{kind=\"decode_step\"} 3",
                "tinyllava_cache_hits_total{cache=\"prefix\"} 4",
                "tinyllava_media_errors_total{reason=\"refused\"} 1",
                "tinyllava_tokens_total{kind=\"completion\"} 7",
                "tinyllava_stage_seconds_bucket{stage=\"decode_wait\",le=\"600\"} 1",
                "tinyllava_stage_seconds_bucket{stage=\"decode_wait\",le=\"300\"} 0",
            ],
        );
    }

    #[test]
    fn what_an_alert_waits_for_is_there_before_it_happens() {
        assert_lines(
            &Metrics::new("m"),
            &[
                "tinyllava_rejections_total{reason=\"queue_full\"} 0",
                "tinyllava_media_errors_total{reason=\"decode_timeout\"} 0",
                "tinyllava_request_seconds_count{outcome=\"failed\"} 0",
                "tinyllava_step_size_count{kind=\"decode_step\"} 0",
                "tinyllava_cache_queries_total{cache=\"frames\"} 0",
                "tinyllava_ready 0",
            ],
        );
    }

    #[test]
    fn the_process_tells_of_its_memory_and_files() {
        let text = Metrics::new("m").render();
        for name in ["process_resident_memory_bytes ", "process_open_fds ", "process_start_time_seconds "] {
            let value = text.lines().find_map(|line| line.strip_prefix(name)).expect(name);
            assert!(value.parse::<f64>().unwrap() > 0.0, "{name}{value}");
        }
    }

    #[test]
    fn two_servers_of_one_process_do_not_share_numbers() {
        let (one, other) = (Metrics::new("a"), Metrics::new("b"));
        one.engine_changed(
            &SchedulerStats::default(),
            &SchedulerStats { num_running: 5, ..SchedulerStats::default() },
        );
        assert!(other.render().contains("vllm:num_requests_running{model_name=\"b\"} 0"));
    }
}
