//! From a video source to frames at the model's input size.
//!
//! Called by `http/pipeline.rs` and the commands. Never decodes in-process: ffmpeg runs as a limited, killable child.

mod address;
mod caller;
mod claims;
mod clock;
mod completeness;
mod decode;
mod decode_log;
mod decode_pass;
mod error;
mod fetch;
pub mod ffmpeg;
mod file_store;
mod flights;
mod frame_cache;
pub mod frame_sampling;
mod mp4_boxes;
mod orientation;
mod packet_feed;
mod packet_table;
mod pictures;
pub mod pixels;
mod places;
mod probe;
mod sandbox;
mod source;
mod tools;
mod truncated_pictures;
mod video_info;

use std::{path::PathBuf, sync::Arc, time::Instant};

use bytes::Bytes;
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::sync::OwnedSemaphorePermit;
use utoipa::ToSchema;

use self::{
    decode::{Decoder, FrameMap},
    ffmpeg::Tools,
    frame_cache::FrameCache,
    frame_sampling::Sampling,
    pictures::{CancelOnDrop, Pictures, Selection},
    pixels::Resizer,
    places::DecoderPlaces,
    probe::Probe,
    source::{LocalFile, SourceReader, is_picture_list},
    video_info::{applied, video_info},
};
use crate::{
    config::MediaConfig,
    telemetry::{PieceTimer, Stage, Trail},
};

pub use self::{
    caller::{Caller, Hold, Salt},
    decode::Way,
    error::MediaError,
    file_store::{FileLabel, FileRecord, FileStore, FileStoreError, Upload},
    places::DecoderLoad,
    tools::{SamplingBenchmark, SourceFrames, check_limits, check_tools},
};

/// Goes into every digest: changes whenever the same video would give other pixels.
const PREPROCESSING_VERSION: u32 = 2;

/// Where a video comes from. `http` has checked the form, this module checks the policy.
#[derive(Debug)]
pub enum VideoSource {
    /// `https:`, `http:`, `file:` or `data:`; `data:video/jpeg;base64,<picture>,<picture>,…` is a list of frames.
    Url(String),
    /// Frames that the client sampled itself, in order, by URL. `fps` of their sampling is their own rate.
    Frames(Vec<String>),
    /// A still, by URL: a video of one frame.
    Image(String),
    /// The bytes in base64.
    Base64(String),
    /// The bytes themselves (decoded base64, small uploads).
    Bytes(Bytes),
    /// An upload already on disk; removed when dropped.
    TempFile(tempfile::NamedTempFile),
    /// A file of the store, by its id.
    FileId(String),
    /// A local file named by the operator on the command line (never by a client).
    LocalFile(PathBuf),
}

impl VideoSource {
    /// Whether its frames were sampled by the client.
    pub fn is_frame_list(&self) -> bool {
        match self {
            VideoSource::Frames(_) => true,
            VideoSource::Url(url) => is_picture_list(url),
            _ => false,
        }
    }
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
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct VideoInfo {
    /// Frames of the source's video stream that frames are sampled from.
    pub source_frames: usize,
    /// Frames that the source promises. More than `decoded_frames` where a part of it did not
    /// arrive or is damaged; then an estimate by bytes in containers that do not count their
    /// frames.
    pub promised_frames: usize,
    /// Frames that can be decoded whole, as far as is known: a damaged frame that was not needed
    /// may not be noticed.
    pub decoded_frames: usize,
    /// Share of the promised content that can be decoded, 0 to 1: frames of a video, rows of
    /// pictures. Requests below one half are refused.
    pub decoded_share: f64,
    /// Seconds; unknown of a list of frames whose rate was not said.
    pub duration: Option<f64>,
    /// Displayed size (after rotation), pixels; of a list: its first frame's.
    pub width: usize,
    pub height: usize,
    /// "image" of a still, "frames" of a list.
    pub container: String,
    pub codec: String,
    /// How many frames the model saw.
    pub num_frames: usize,
    /// The rate asked for, frames a second; of a list: its own. `None` where a number of frames was asked for.
    pub fps: Option<f64>,
    /// What bounded the frames that `fps` gave.
    pub max_frames: Option<usize>,
    /// The part looked at, seconds; `None`: from the start, to the end.
    pub start: Option<f64>,
    pub end: Option<f64>,
    /// Sampled frames, in display order; short videos repeat indices.
    pub sampled_indices: Vec<usize>,
    /// Their presentation times from the video's start, seconds; empty where they are unknown.
    pub sampled_timestamps: Vec<f64>,
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
}

/// The media stage: fetch, probe, sample, decode, resize, cache.
#[derive(Debug, Clone)]
pub struct MediaLoader {
    config: Arc<MediaConfig>,
    image_size: usize,
    tools: Tools,
    files: Arc<FileStore>,
    sources: SourceReader,
    cache: FrameCache,
    /// One for each decoder process.
    places: DecoderPlaces,
}

impl MediaLoader {
    /// A loader whose frames have `image_size` x `image_size` pixels. Does not need ffmpeg yet: see [`check_tools`].
    /// Opens the file store, which takes a moment when it holds many files.
    ///
    /// # Errors
    /// When the file store's directory cannot be used.
    pub fn new(config: MediaConfig, image_size: usize) -> Result<Self, MediaError> {
        let files = FileStore::open(&config).map_err(|error| MediaError::Internal(error.to_string()))?;
        Ok(MediaLoader {
            image_size,
            tools: Tools::new(&config),
            sources: SourceReader::new(&config, files.clone())?,
            files,
            cache: FrameCache::new(config.frame_cache_bytes),
            places: DecoderPlaces::new(config.max_concurrent_decodes),
            config: Arc::new(config),
        })
    }

    /// The files that requests may name by their ids.
    pub fn files(&self) -> &Arc<FileStore> {
        &self.files
    }

    /// Frames of one video. Dropping the future kills the download and the decoder, unless others wait for them too.
    pub async fn load(
        &self,
        source: VideoSource,
        sampling: FrameSampling,
    ) -> Result<Arc<VideoFrames>, MediaError> {
        self.load_for(source, sampling, &Caller::default()).await
    }

    /// As [`MediaLoader::load`], sharing work with callers of the same salt only: no client can tell by the time that it
    /// takes what others have sent.
    pub async fn load_for(
        &self,
        source: VideoSource,
        sampling: FrameSampling,
        caller: &Caller,
    ) -> Result<Arc<VideoFrames>, MediaError> {
        let (is_list, is_still) = (source.is_frame_list(), self.sources.is_still(&source).await?);
        if is_list || is_still {
            let still = is_still.then(|| Selection::of_still(sampling, &self.config)).transpose()?;
            let files = self.fetched(source, caller).await?;
            let selection = still.map_or_else(|| Selection::of_list(sampling, files.len()), Ok)?;
            let digest = self.digest(&files, &selection.digest_bytes, &caller.salt);
            let load = self.decode_pictures(files, selection, is_list, digest, &caller.trail);
            return self.cached(digest, load, &caller.trail).await;
        }
        let sampling = Sampling::resolve(sampling, &self.config)?;
        let files = self.fetched(source, caller).await?;
        let digest = self.digest(&files, &sampling.digest_bytes(), &caller.salt);
        let load = self.decode(&files[0], &sampling, digest, &caller.trail);
        self.cached(digest, load, &caller.trail).await
    }

    /// Who works and who waits in this stage, now.
    pub fn decoders(&self) -> DecoderLoad {
        self.places.load()
    }

    async fn fetched(&self, source: VideoSource, caller: &Caller) -> Result<Vec<LocalFile>, MediaError> {
        caller.trail.time(Stage::Fetch, self.sources.read(source, caller)).await
    }

    /// The frames of `digest`, from the cache or by `load`.
    async fn cached(
        &self,
        digest: [u8; 32],
        load: impl Future<Output = Result<VideoFrames, MediaError>>,
        trail: &Trail,
    ) -> Result<Arc<VideoFrames>, MediaError> {
        let (frames, fresh) =
            self.cache.get_or_load(digest, Box::pin(async { load.await.map(Arc::new) })).await?;
        trail.frame_cache(!fresh);
        Ok(frames)
    }

    /// Decodes and resizes pictures on the blocking pool, among the decoders of videos and within their time.
    async fn decode_pictures(
        &self,
        files: Vec<LocalFile>,
        selection: Selection,
        is_list: bool,
        digest: [u8; 32],
        trail: &Trail,
    ) -> Result<VideoFrames, MediaError> {
        let place = self.place(trail).await?;
        let guard = CancelOnDrop::default();
        let (cancelled, config, size) = (guard.0.clone(), self.config.clone(), self.image_size);
        let work = tokio::task::spawn_blocking(move || {
            // Given back when the work has really ended, whoever still waits for it.
            let _place = place;
            pictures::decode(&files, size, &config, &cancelled)
        });
        let timeout = self.config.decode_timeout;
        let decode = async {
            let decoded = tokio::time::timeout(timeout, work).await;
            let decoded = decoded.map_err(|_| MediaError::DecodeTimeout { seconds: timeout.as_secs() })?;
            decoded.map_err(|error| {
                tracing::error!(%error, "decoding pictures failed");
                MediaError::Undecodable("a picture could not be decoded; send it in another format".into())
            })?
        };
        let decoded = trail.time(Stage::Decode, decode).await?;
        let Pictures { frames, width, height, codec, decoded_share, resizing } = decoded;
        trail.decoded_frames(frames.len());
        resizing.run(Stage::Resize).into_iter().for_each(|run| trail.push(run));
        let info = VideoInfo {
            source_frames: frames.len(),
            promised_frames: frames.len(),
            decoded_frames: frames.len(),
            decoded_share,
            duration: selection.duration,
            width,
            height,
            container: if is_list { "frames" } else { "image" }.into(),
            codec: codec.into(),
            sampled_timestamps: selection.times,
            ..applied(selection.applied, selection.indices)
        };
        let rgb = repeated(&frames, &info.sampled_indices);
        Ok(VideoFrames { rgb, size, info, digest })
    }

    /// Probe, decode and resize: everything that a cached video skips.
    async fn decode(
        &self,
        video: &LocalFile,
        sampling: &Sampling,
        digest: [u8; 32],
        trail: &Trail,
    ) -> Result<VideoFrames, MediaError> {
        let work = async {
            let probe = probe::probe(&self.tools, video.path(), &self.config);
            let probe = trail.time(Stage::Probe, probe).await?;
            let resizing = PieceTimer::default();
            let mut decoder = self.decoder(video, &probe, self.resizing(&probe, &resizing));
            decoder.trail = trail.clone();
            let decoded = trail.time(Stage::Decode, decoder.sample(sampling)).await?;
            resizing.run(Stage::Resize).into_iter().for_each(|run| trail.push(run));
            tracing::debug!(way = ?decoded.way, "frames sampled");
            let info = video_info(&probe, &decoded, sampling);
            let rgb = repeated(&decoded.frames, &decoded.indices);
            Ok(VideoFrames { rgb, size: self.image_size, info, digest })
        };
        self.bounded(work, trail).await
    }

    /// The right to run one process at a time.
    async fn place(&self, trail: &Trail) -> Result<OwnedSemaphorePermit, MediaError> {
        trail.time(Stage::DecodeWait, async { Ok(self.places.take().await) }).await
    }

    /// To be used by who has a place.
    fn decoder<'a>(&'a self, video: &'a LocalFile, probe: &'a Probe, map: FrameMap) -> Decoder<'a> {
        let (tools, places) = (&self.tools, &self.places);
        let min_decoded_share = self.config.min_decoded_share;
        Decoder { tools, file: video.path(), probe, map, places, trail: Trail::default(), min_decoded_share }
    }

    /// Waits for a place among the decoders, then gives `work` its time.
    async fn bounded<T>(
        &self,
        work: impl Future<Output = Result<T, MediaError>>,
        trail: &Trail,
    ) -> Result<T, MediaError> {
        let _place = self.place(trail).await?;
        let timeout = self.config.decode_timeout;
        tokio::time::timeout(timeout, work)
            .await
            .unwrap_or_else(|_| Err(MediaError::DecodeTimeout { seconds: timeout.as_secs() }))
    }

    fn resizing(&self, probe: &Probe, timer: &PieceTimer) -> FrameMap {
        let resizer = Resizer::new(probe.width, probe.height, self.image_size);
        let timer = timer.clone();
        FrameMap::new(move |frame| {
            let started = Instant::now();
            let resized = resizer.resize(&frame);
            timer.piece(started);
            resized
        })
    }

    /// `sampling`: every effective parameter.
    fn digest(&self, files: &[LocalFile], sampling: &[u8], salt: &Salt) -> [u8; 32] {
        let mut hash = Sha256::new()
            .chain_update(PREPROCESSING_VERSION.to_le_bytes())
            .chain_update((self.image_size as u64).to_le_bytes())
            .chain_update((files.len() as u64).to_le_bytes());
        files.iter().for_each(|file| hash.update(file.content_hash));
        // Every part but the last has a known length: no two inputs are the same bytes.
        hash.update((sampling.len() as u64).to_le_bytes());
        hash.update(sampling);
        if let Some(salt) = salt {
            hash.update([1]);
            hash.update(salt.as_bytes());
        }
        hash.finalize().into()
    }
}

/// One frame for each of the (ascending) `indices`, repeated as they are: `[indices, size, size, 3]`. `frames` are
/// the distinct ones.
fn repeated(frames: &[Vec<u8>], indices: &[usize]) -> Arc<[u8]> {
    let mut rgb = Vec::new();
    let mut frame = 0;
    for (position, index) in indices.iter().enumerate() {
        if position > 0 && indices[position - 1] != *index {
            frame += 1;
        }
        rgb.extend_from_slice(&frames[frame]);
    }
    rgb.into()
}
