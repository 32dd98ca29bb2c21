//! From a video source to frames at the model's input size.
//!
//! Called by `http/pipeline.rs` and the commands. Never decodes in-process: ffmpeg runs as a limited, killable child.

mod address;
mod decode;
mod fetch;
pub mod ffmpeg;
mod frame_cache;
pub mod frame_sampling;
mod packet_table;
pub mod pixels;
mod probe;
mod sandbox;
mod source;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, SemaphorePermit};
use utoipa::ToSchema;

use self::{
    decode::{Decoded, Decoder, FrameMap},
    ffmpeg::Tools,
    frame_cache::FrameCache,
    frame_sampling::Sampling,
    pixels::Resizer,
    probe::Probe,
    source::{LocalVideo, SourceReader},
};
use crate::config::MediaConfig;

pub use self::decode::Way;

/// Goes into every digest: changes whenever the same video would give other pixels.
const PREPROCESSING_VERSION: u32 = 1;
/// Most memory for frames at source size (only tools ask for those).
const MAX_SOURCE_FRAMES_BYTES: usize = 2 << 30;

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
    LocalFile(PathBuf),
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
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
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
#[derive(Debug, Clone, thiserror::Error)]
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

/// Sampled frames at the source's size, for tools.
#[derive(Debug)]
pub struct SourceFrames {
    /// `[distinct sampled frames, height, width, 3]`, RGB; `info` has the indices, repeats included.
    pub rgb: Vec<u8>,
    pub info: VideoInfo,
}

/// Timings of one video sampled in both ways, for benchmarks.
#[derive(Debug, Clone, Copy)]
pub struct SamplingBenchmark {
    pub probe: Duration,
    /// The way that is taken for requests.
    pub chosen: Duration,
    pub way: Way,
    /// Decoding every frame.
    pub whole_file: Duration,
    pub source_frames: usize,
    /// Seconds.
    pub duration: f64,
}

/// The media stage: fetch, probe, sample, decode, resize, cache.
#[derive(Debug, Clone)]
pub struct MediaLoader {
    config: Arc<MediaConfig>,
    image_size: usize,
    tools: Tools,
    sources: SourceReader,
    cache: FrameCache,
    /// One for each decoder process.
    places: Arc<Semaphore>,
}

impl MediaLoader {
    /// A loader whose frames have `image_size` x `image_size` pixels. Does not need ffmpeg yet: see
    /// [`MediaLoader::check_tools`].
    pub fn new(config: MediaConfig, image_size: usize) -> Result<Self, MediaError> {
        Ok(MediaLoader {
            image_size,
            tools: Tools::new(&config),
            sources: SourceReader::new(&config)?,
            cache: FrameCache::new(config.frame_cache_bytes),
            places: Arc::new(Semaphore::new(config.max_concurrent_decodes.max(1))),
            config: Arc::new(config),
        })
    }

    /// Whether ffmpeg and ffprobe are there; the error says how to get them.
    pub fn check_tools(&self) -> Result<(), MediaError> {
        self.tools.check()
    }

    /// Frames of one video. Dropping the future kills the download and the decoder.
    pub async fn load(
        &self,
        source: VideoSource,
        sampling: FrameSampling,
    ) -> Result<Arc<VideoFrames>, MediaError> {
        let sampling = Sampling::resolve(sampling, &self.config)?;
        let started = Instant::now();
        let video = self.sources.read(source).await?;
        let fetch_seconds = started.elapsed().as_secs_f64();
        let digest = self.digest(&video, &sampling);
        let load = async {
            let frames = self.decode(&video, &sampling, digest).await?;
            Ok(Arc::new(frames))
        };
        let (frames, fresh) = self.cache.get_or_load(digest, load).await?;
        // The pixels are shared; only the account of the time is this request's own.
        let spent = if fresh { frames.timings } else { MediaTimings::default() };
        Ok(Arc::new(VideoFrames {
            timings: MediaTimings { fetch_seconds, ..spent },
            ..VideoFrames::clone(&frames)
        }))
    }

    /// Sampled frames of a local file at its own size.
    pub async fn source_frames(
        &self,
        file: &Path,
        sampling: FrameSampling,
    ) -> Result<SourceFrames, MediaError> {
        let sampling = Sampling::resolve(sampling, &self.config)?;
        let video = self.sources.read(VideoSource::LocalFile(file.to_owned())).await?;
        self.bounded(async {
            let probe = probe::probe(&self.tools, video.path(), &self.config).await?;
            let frames = sampling.indices(&probe.timeline)?.len();
            if frames.saturating_mul(probe.width * probe.height * 3) > MAX_SOURCE_FRAMES_BYTES {
                return Err(MediaError::Undecodable(
                    "the frames are too large to hold at their own size; ask for fewer".into(),
                ));
            }
            let map = FrameMap::new(|frame| frame);
            let decoder = self.decoder(&video, &probe, map);
            let decoded = decoder.sample(&sampling).await?;
            let info = video_info(&probe, &decoded);
            Ok(SourceFrames { rgb: decoded.frames.concat(), info })
        })
        .await
    }

    /// Samples a local file the way requests are, and again by decoding everything.
    pub async fn benchmark(
        &self,
        file: &Path,
        sampling: FrameSampling,
    ) -> Result<SamplingBenchmark, MediaError> {
        let sampling = Sampling::resolve(sampling, &self.config)?;
        let video = self.sources.read(VideoSource::LocalFile(file.to_owned())).await?;
        let _place = self.place().await;
        let started = Instant::now();
        let probe = probe::probe(&self.tools, video.path(), &self.config).await?;
        let probed = started.elapsed();
        let decoder = self.decoder(&video, &probe, self.resizing(&probe));
        let started = Instant::now();
        let Decoded { way, timeline, frames, .. } = decoder.sample(&sampling).await?;
        let chosen = started.elapsed();
        let started = Instant::now();
        let all = decoder.sample_whole_file(&sampling).await?;
        let whole_file = started.elapsed();
        if all.frames != frames {
            return Err(MediaError::Internal("both ways must give the same frames: this is a bug".into()));
        }
        let (source_frames, duration) = (timeline.times.len(), timeline.duration);
        Ok(SamplingBenchmark { probe: probed, chosen, way, whole_file, source_frames, duration })
    }

    /// Probe, decode and resize: everything that a cached video skips.
    async fn decode(
        &self,
        video: &LocalVideo,
        sampling: &Sampling,
        digest: [u8; 32],
    ) -> Result<VideoFrames, MediaError> {
        self.bounded(async {
            let started = Instant::now();
            let probe = probe::probe(&self.tools, video.path(), &self.config).await?;
            let probe_seconds = started.elapsed().as_secs_f64();
            let map = self.resizing(&probe);
            let decoder = self.decoder(video, &probe, map.clone());
            let started = Instant::now();
            let decoded = decoder.sample(sampling).await?;
            let timings = MediaTimings {
                fetch_seconds: 0.0,
                probe_seconds,
                decode_seconds: started.elapsed().as_secs_f64(),
                resize_seconds: map.elapsed().as_secs_f64(),
            };
            tracing::debug!(way = ?decoded.way, ?timings, "frames sampled");
            let info = video_info(&probe, &decoded);
            Ok(VideoFrames { rgb: repeated(&decoded), size: self.image_size, info, digest, timings })
        })
        .await
    }

    /// The right to run one process at a time.
    async fn place(&self) -> SemaphorePermit<'_> {
        self.places.acquire().await.expect("the semaphore is never closed: this is a bug")
    }

    /// To be used by who has a place.
    fn decoder<'a>(&'a self, video: &'a LocalVideo, probe: &'a Probe, map: FrameMap) -> Decoder<'a> {
        Decoder { tools: &self.tools, file: video.path(), probe, map, places: &self.places }
    }

    /// Waits for a place among the decoders, then gives `work` its time.
    async fn bounded<T>(&self, work: impl Future<Output = Result<T, MediaError>>) -> Result<T, MediaError> {
        let _place = self.place().await;
        let timeout = self.config.decode_timeout;
        tokio::time::timeout(timeout, work)
            .await
            .unwrap_or_else(|_| Err(MediaError::DecodeTimeout { seconds: timeout.as_secs() }))
    }

    fn resizing(&self, probe: &Probe) -> FrameMap {
        let resizer = Resizer::new(probe.width, probe.height, self.image_size);
        FrameMap::new(move |frame| resizer.resize(&frame))
    }

    fn digest(&self, video: &LocalVideo, sampling: &Sampling) -> [u8; 32] {
        Sha256::new()
            .chain_update(PREPROCESSING_VERSION.to_le_bytes())
            .chain_update((self.image_size as u64).to_le_bytes())
            .chain_update(video.content_hash)
            .chain_update(sampling.digest_bytes())
            .finalize()
            .into()
    }
}

/// Frames of repeated indices, repeated: `[indices, size, size, 3]`.
fn repeated(decoded: &Decoded) -> Arc<[u8]> {
    let mut rgb = Vec::new();
    let mut frame = 0;
    for (position, index) in decoded.indices.iter().enumerate() {
        if position > 0 && decoded.indices[position - 1] != *index {
            frame += 1;
        }
        rgb.extend_from_slice(&decoded.frames[frame]);
    }
    rgb.into()
}

fn video_info(probe: &Probe, decoded: &Decoded) -> VideoInfo {
    let timeline = &decoded.timeline;
    VideoInfo {
        source_frames: timeline.times.len(),
        duration: timeline.duration,
        width: probe.width,
        height: probe.height,
        container: probe.container.name().to_owned(),
        codec: probe.codec.clone(),
        sampled_timestamps: decoded.indices.iter().map(|&index| timeline.times[index]).collect(),
        sampled_indices: decoded.indices.clone(),
    }
}
