//! From a video source to frames at the model's input size.
//!
//! Called by `http/chat.rs` and the commands. Never decodes in-process: ffmpeg runs as a limited, killable child.

use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;

use crate::config::MediaConfig;

/// Where a video comes from. `http` has checked the form, this module checks the policy.
#[derive(Debug)]
pub enum VideoSource {
    /// `https:`, `http:`, `file:` or `data:`.
    Url(String),
    /// The bytes themselves (decoded base64, small uploads).
    Bytes(Bytes),
    /// An upload already on disk; removed when dropped.
    TempFile(tempfile::NamedTempFile),
    /// A local file named by the operator on the command line (never by a client).
    LocalFile(std::path::PathBuf),
}

/// What a request asks of the sampling; `None` = the server's own.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct FrameSampling {
    pub num_frames: Option<usize>,
    /// Frames a second of video; excludes `num_frames`.
    pub fps: Option<f64>,
    /// Upper bound with `fps`.
    pub max_frames: Option<usize>,
    /// Start and end of the part looked at, seconds.
    pub start: Option<f64>,
    pub end: Option<f64>,
}

/// What was sampled, for the reply's `video` object.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VideoInfo {
    /// Frames of the source's video stream.
    pub source_frames: usize,
    /// Seconds.
    pub duration: f64,
    /// Displayed size (after rotation), pixels.
    pub width: usize,
    pub height: usize,
    pub container: String,
    pub codec: String,
    /// Sampled frames, in display order; short videos repeat indices.
    pub sampled_indices: Vec<usize>,
    /// Their presentation times from the video's start, seconds.
    pub sampled_timestamps: Vec<f64>,
}

/// How long the stages took.
#[derive(Debug, Clone, Copy, Default)]
pub struct MediaTimings {
    pub fetch_seconds: f64,
    pub probe_seconds: f64,
    pub decode_seconds: f64,
    pub resize_seconds: f64,
}

/// Sampled frames, resized to the model's input.
#[derive(Debug, Clone)]
pub struct VideoFrames {
    /// `[num_frames, size, size, 3]`, RGB.
    pub rgb: Arc<[u8]>,
    pub size: usize,
    pub info: VideoInfo,
    /// Of the file's bytes, every effective sampling parameter, the size and the preprocessing version.
    pub digest: [u8; 32],
    pub timings: MediaTimings,
}

/// Why a video could not be used. Every message is one sentence for the client that says what to do.
/// `http/error.rs` maps the variants to status codes.
#[derive(Debug, thiserror::Error)]
pub enum MediaError {
    /// 400: the URL or sampling is refused by policy or form; `param` names the field.
    #[error("{message}")]
    Refused { param: &'static str, message: String },
    /// 422: the download failed upstream.
    #[error("{0}")]
    FetchFailed(String),
    /// 413.
    #[error("the video is larger than the limit of {max_video_bytes} bytes; send a shorter or smaller one")]
    TooManyBytes { max_video_bytes: usize },
    /// 415: not an allowed container or codec.
    #[error("{0}")]
    Unsupported(String),
    /// 422: undecodable, no video stream, too long, too large.
    #[error("{0}")]
    Undecodable(String),
    /// 422: the decoder ran over its time.
    #[error("decoding took longer than {seconds} s; send a shorter or smaller video")]
    DecodeTimeout { seconds: u64 },
    /// 500: ffmpeg is missing or could not start, the disk is full...
    #[error("{0}")]
    Internal(String),
}

impl MediaError {
    /// Short label for the error metric.
    pub fn reason(&self) -> &'static str {
        match self {
            MediaError::Refused { .. } => "refused",
            MediaError::FetchFailed(_) => "fetch_failed",
            MediaError::TooManyBytes { .. } => "too_many_bytes",
            MediaError::Unsupported(_) => "unsupported",
            MediaError::Undecodable(_) => "undecodable",
            MediaError::DecodeTimeout { .. } => "decode_timeout",
            MediaError::Internal(_) => "internal",
        }
    }
}

/// The media stage: fetch, probe, sample, decode, resize, cache.
#[derive(Debug, Clone)]
pub struct MediaLoader {
    _config: Arc<MediaConfig>,
    _image_size: usize,
}

impl MediaLoader {
    /// A loader whose frames have `image_size` x `image_size` pixels.
    pub fn new(config: MediaConfig, image_size: usize) -> Result<Self, MediaError> {
        Ok(MediaLoader { _config: Arc::new(config), _image_size: image_size })
    }

    /// Frames of one video. Dropping the future kills the download and the decoder.
    pub async fn load(
        &self,
        _source: VideoSource,
        _sampling: FrameSampling,
    ) -> Result<Arc<VideoFrames>, MediaError> {
        todo!()
    }
}
