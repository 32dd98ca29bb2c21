//! Every limit and setting of the server, with its unit in its name.
//!
//! Built by `cli/serve.rs` from the command line, or from [`Default`] in tests; read by everyone, changed by nobody.

mod hwaccel;
mod reasoning_field;
pub mod request_limits;
mod stores;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use axum::http::HeaderValue;
use url::Url;

pub use hwaccel::HwAccel;
pub use reasoning_field::ReasoningField;
pub use stores::{FilesConfig, NamedMediaConfig};

/// Most threads that serve connections: they only pass tokens on, and leave the cores to the model.
pub const MAX_ASYNC_THREADS: usize = 4;

/// Settings of the HTTP server and of everything behind it but the model.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Where to answer `/metrics` instead of there, without TLS.
    pub metrics_listen: Option<SocketAddr>,
    /// Origins of web pages that may call the server, as browsers send them, or `*`; none: no page of another origin.
    pub cors_origins: Vec<HeaderValue>,
    /// The name clients call the model by.
    pub served_model_name: String,
    /// Longest body of a JSON or multipart request.
    pub max_body_bytes: usize,
    /// A whole request, from its first byte to its last token.
    pub request_timeout: Duration,
    /// Connections held at the same time; further ones wait in the kernel's backlog.
    pub max_connections: usize,
    /// Bodies of all requests that are being received or decoded, together (memory for JSON, disk for uploads).
    pub max_inflight_body_bytes: usize,
    /// Wall clock for the TLS handshake and for the header of a request, and longest idle time between two requests.
    pub header_read_timeout: Duration,
    /// Longest pause within a body.
    pub body_idle_timeout: Duration,
    /// Longest time a client may leave what it was sent unread.
    pub write_stall_timeout: Duration,
    /// How often an idle stream carries a comment.
    pub keep_alive_interval: Duration,
    /// How long new work is taken on after SIGTERM, while `/ready` says no already.
    pub drain_delay: Duration,
    /// How long running streams may go on after that.
    pub drain_timeout: Duration,
    /// Completion length when the request names none (bounded by what the context leaves).
    pub default_max_tokens: usize,
    /// Most stop strings a request, and the longest of them.
    pub max_stop_strings: usize,
    pub max_stop_string_bytes: usize,
    /// Most values in a JSON body (lists, objects and what they hold): parsed, each takes far more memory than its text.
    pub max_json_values: usize,
    /// Most replies to one request (`n`).
    pub max_choices: usize,
    /// Name of the field that holds the thinking of a chat reply, when the request does not say.
    pub reasoning_field: ReasoningField,
    /// Most tokens that are reported beside each chosen one (`top_logprobs`).
    pub max_top_logprobs: usize,
    /// Most messages a conversation.
    pub max_messages: usize,
    /// Most content parts a message.
    pub max_content_parts: usize,
    /// Longest text of a conversation, all messages together.
    pub max_text_bytes: usize,
    /// Most entries of `logit_bias` and of `stop_token_ids`.
    pub max_token_list: usize,
    /// Longest schema, grammar or regular expression for the answer, and all choices together.
    pub max_guide_bytes: usize,
    /// Most choices for the answer.
    pub max_guide_choices: usize,
    /// Grammars that are compiled at the same time; further ones wait.
    pub max_concurrent_grammars: usize,
    /// Most videos per message. Chat clients resend earlier messages, which count for themselves.
    pub max_videos_per_request: usize,
    /// Most videos per request, all messages together.
    pub max_videos_per_conversation: usize,
    /// Treats consecutive pictures as separate still images, unless the request says otherwise.
    pub images_as_stills: bool,
    /// Whether the log tells what was asked and answered, and how much of each.
    pub log_content: bool,
    pub max_logged_text_bytes: usize,
    pub traces: TracesConfig,
    pub responses: ResponsesConfig,
    pub media: MediaConfig,
    pub engine: EngineConfig,
    pub kv_events: KvEventsConfig,
}

/// Limits of the events that tell routers what is in the KV cache.
#[derive(Debug, Clone)]
pub struct KvEventsConfig {
    /// Batches on their way from the engine to the socket; more are dropped.
    pub max_queued_batches: usize,
    /// Batches kept for routers that missed some, and their bytes.
    pub max_replay_batches: usize,
    pub max_replay_bytes: usize,
    /// Longest time for one answer of a replay.
    pub replay_timeout: Duration,
}

/// Limits of the responses that are kept to be read again and continued.
#[derive(Debug, Clone)]
pub struct ResponsesConfig {
    /// Most responses; the oldest go first.
    pub max_responses: usize,
    /// Memory of all of them.
    pub max_bytes: usize,
    /// Longest conversation that is kept with its response (one with a video in base64 is longer).
    pub max_conversation_bytes: usize,
    /// How long a response is kept.
    pub max_age: Duration,
}

/// Where traces go, and how many may wait to be sent.
#[derive(Debug, Clone)]
pub struct TracesConfig {
    /// Base URL of the collector (OTLP over HTTP); none: there are no traces.
    pub endpoint: Option<Url>,
    /// Share of the traces that begin here; those of a caller are its own decision.
    pub sample_ratio: f64,
    /// Spans that wait; further ones are lost.
    pub max_queued_spans: usize,
    /// Spans sent at once.
    pub max_batch_spans: usize,
    /// Longest time a span waits for others.
    pub batch_delay: Duration,
    /// Wall clock for sending a batch.
    pub export_timeout: Duration,
    /// Longest time that the end of the server waits for the last spans.
    pub shutdown_timeout: Duration,
}

/// Limits of the media stage: what a video may cost.
#[derive(Debug, Clone)]
pub struct MediaConfig {
    /// Frames a video is sampled to when the request does not say (the model's own number).
    pub num_frames: usize,
    /// Frames a second instead, for models that were trained so.
    pub default_fps: Option<f64>,
    /// Most frames a request may ask for.
    pub max_frames: usize,
    /// Largest video file.
    pub max_video_bytes: usize,
    /// Longest video.
    pub max_video_seconds: f64,
    /// Largest side of a frame, pixels.
    pub max_frame_side: usize,
    /// Most pixels of a frame.
    pub max_frame_pixels: usize,
    /// Most packets of a video stream that are looked at.
    pub max_video_packets: usize,
    /// Most frames of an animated picture.
    pub max_animation_frames: usize,
    /// Most pixels per frame of an animated picture: its decoder holds several copies of a frame.
    pub max_animation_frame_pixels: usize,
    /// Least share of a video's frames (a picture's rows) that must be decodable, 0 to 1.
    pub min_decoded_share: f64,
    /// Wall clock for probing and decoding one video.
    pub decode_timeout: Duration,
    /// Wall clock for downloading one video.
    pub fetch_timeout: Duration,
    /// Downloaded videos on disk at the same time, from the first byte until they are decoded; further ones wait.
    pub max_concurrent_fetches: usize,
    /// Most redirects of one download.
    pub max_redirects: usize,
    /// Decoder processes running at the same time.
    pub max_concurrent_decodes: usize,
    /// Address space of one decoder process; of one that uses a GPU it is not limited, for its driver maps what it likes.
    pub max_decoder_memory_bytes: usize,
    /// What decodes beside the processor.
    pub hwaccel: HwAccel,
    /// Memory for sampled frames of recent videos.
    pub frame_cache_bytes: usize,
    /// Directory that `file:` URLs may point into; none: they are refused.
    pub allowed_media_dir: Option<PathBuf>,
    /// Whether `http(s)` URLs are fetched at all.
    pub allow_remote_urls: bool,
    /// Whether URLs may resolve to private, loopback or link-local addresses (tests, closed networks).
    pub allow_private_addresses: bool,
    /// The ffmpeg binary; none: found on PATH.
    pub ffmpeg_path: Option<PathBuf>,
    pub files: FilesConfig,
    pub named_media: NamedMediaConfig,
}

/// Limits of the engine.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Tokens a KV block.
    pub block_size: usize,
    /// Memory of the KV cache.
    pub kv_cache_bytes: usize,
    /// Whether it keeps keys and values in 16 bits, not in 32.
    pub kv_cache_in_16_bits: bool,
    /// Sequences in a step.
    pub max_running_sequences: usize,
    /// Sequences waiting for a place in a step (requests still fetching or decoding included), for all engines together.
    pub max_waiting_sequences: usize,
    /// Prompt tokens computed in one step; 0: as many as a CPU should.
    pub max_prefill_tokens: usize,
    /// Frames encoded in one step; 0: two of 384 x 384, or as many smaller ones as have the same pixels.
    pub max_encode_frames: usize,
    /// Videos whose encoded tokens are kept.
    pub max_cached_videos: usize,
    /// Most tokens of prompt and completion together; 0: the checkpoint's own.
    pub max_context_tokens: usize,
    /// Whether prompts share blocks.
    pub prefix_cache: bool,
    /// Threads for this engine's steps only, which then never see another device than its own; 0: those of the process.
    pub own_threads: usize,
}

/// Pixels encoded in one step unless the configuration says: two frames of the published model, and enough rows for
/// the kernels where frames are small.
const ENCODE_STEP_PIXELS: usize = 2 * 384 * 384;

impl EngineConfig {
    /// Prompt tokens that are computed in one step, on a CPU 512 unless the configuration says.
    pub fn prefill_tokens_a_step(&self) -> usize {
        if self.max_prefill_tokens == 0 { 512 } else { self.max_prefill_tokens }
    }

    /// Frames of `image_size` x `image_size` pixels that are encoded in one step.
    pub fn encode_frames_a_step(&self, image_size: usize) -> usize {
        match self.max_encode_frames {
            0 => (ENCODE_STEP_PIXELS / image_size.pow(2).max(1)).max(1),
            frames => frames,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: ([127, 0, 0, 1], 8000).into(),
            metrics_listen: None,
            cors_origins: vec![],
            served_model_name: "tinyllava".into(),
            max_body_bytes: 256 << 20,
            request_timeout: Duration::from_secs(600),
            max_connections: 1024,
            max_inflight_body_bytes: 1 << 30,
            header_read_timeout: Duration::from_secs(30),
            body_idle_timeout: Duration::from_secs(30),
            write_stall_timeout: Duration::from_secs(60),
            keep_alive_interval: Duration::from_secs(5),
            drain_delay: Duration::ZERO,
            drain_timeout: Duration::from_secs(30),
            default_max_tokens: 1024,
            max_stop_strings: 4,
            max_stop_string_bytes: 256,
            max_json_values: 20_000,
            max_choices: 8,
            reasoning_field: ReasoningField::Both,
            max_top_logprobs: 20,
            max_messages: 128,
            max_content_parts: 256,
            max_text_bytes: 128 << 10,
            max_token_list: 1024,
            max_guide_bytes: 64 << 10,
            max_guide_choices: 256,
            max_concurrent_grammars: 2,
            max_videos_per_request: 1,
            max_videos_per_conversation: 16,
            images_as_stills: false,
            log_content: false,
            max_logged_text_bytes: 64 << 10,
            traces: TracesConfig::default(),
            responses: ResponsesConfig::default(),
            media: MediaConfig::default(),
            engine: EngineConfig::default(),
            kv_events: KvEventsConfig::default(),
        }
    }
}

impl Default for KvEventsConfig {
    fn default() -> Self {
        KvEventsConfig {
            max_queued_batches: 4096,
            max_replay_batches: 10_000,
            max_replay_bytes: 32 << 20,
            replay_timeout: Duration::from_secs(5),
        }
    }
}

impl Default for TracesConfig {
    fn default() -> Self {
        TracesConfig {
            endpoint: None,
            sample_ratio: 1.0,
            max_queued_spans: 4096,
            max_batch_spans: 512,
            batch_delay: Duration::from_secs(2),
            export_timeout: Duration::from_secs(5),
            shutdown_timeout: Duration::from_secs(3),
        }
    }
}

impl Default for ResponsesConfig {
    fn default() -> Self {
        ResponsesConfig {
            max_responses: 1000,
            max_bytes: 64 << 20,
            max_conversation_bytes: 256 << 10,
            max_age: Duration::from_secs(24 * 3600),
        }
    }
}

impl Default for MediaConfig {
    fn default() -> Self {
        MediaConfig {
            num_frames: 16,
            default_fps: None,
            max_frames: 64,
            max_video_bytes: 128 << 20,
            max_video_seconds: 3.0 * 3600.0,
            max_frame_side: 8192,
            max_frame_pixels: 8192 * 4320,
            max_video_packets: 2_000_000,
            max_animation_frames: 10_000,
            max_animation_frame_pixels: 4096 * 2304,
            min_decoded_share: 0.5,
            decode_timeout: Duration::from_secs(60),
            fetch_timeout: Duration::from_secs(60),
            max_concurrent_fetches: 8,
            max_redirects: 3,
            max_concurrent_decodes: 4,
            max_decoder_memory_bytes: 4 << 30,
            hwaccel: HwAccel::None,
            frame_cache_bytes: 256 << 20,
            allowed_media_dir: None,
            allow_remote_urls: true,
            allow_private_addresses: false,
            ffmpeg_path: None,
            files: FilesConfig::default(),
            named_media: NamedMediaConfig::default(),
        }
    }
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            block_size: 16,
            kv_cache_bytes: 1 << 30,
            kv_cache_in_16_bits: false,
            max_running_sequences: 64,
            max_waiting_sequences: 128,
            max_prefill_tokens: 0,
            max_encode_frames: 0,
            max_cached_videos: 32,
            max_context_tokens: 0,
            prefix_cache: true,
            own_threads: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_frames_are_encoded_more_at_a_time() {
        let auto = EngineConfig::default();
        let frames = [384, 112, 56, 512, 4096].map(|size| auto.encode_frames_a_step(size));
        assert_eq!(frames, [2, 23, 94, 1, 1]);
        assert_eq!(EngineConfig { max_encode_frames: 5, ..auto }.encode_frames_a_step(56), 5);
    }
}
