//! From a video source to frames at the model's input size.
//!
//! Called by `http/pipeline.rs` and the commands. Never decodes in-process: ffmpeg runs as a limited, killable child.

mod address;
mod caller;
mod claims;
mod clock;
mod completeness;
mod container;
mod content;
mod data_url;
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
mod inflate;
mod local_file;
mod mp4_boxes;
mod named_media;
mod orientation;
mod packet_feed;
mod packet_list;
mod packet_table;
mod picture_loader;
mod pictures;
pub mod pixels;
mod places;
mod probe;
mod sandbox;
mod selection;
mod source;
mod streams;
mod tools;
mod truncated_pictures;
mod video_info;
mod video_source;

use std::{sync::Arc, time::Instant};

use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::sync::OwnedSemaphorePermit;
use utoipa::ToSchema;

use self::{
    content::Content,
    decode::{Decoder, FrameMap},
    ffmpeg::Tools,
    frame_cache::FrameCache,
    frame_sampling::Sampling,
    local_file::LocalFile,
    pictures::PictureSource,
    pixels::Resizer,
    places::DecoderPlaces,
    probe::Probe,
    selection::{PictureList, Selection},
    source::{Fetched, SourceReader},
    video_info::video_info,
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
    video_source::{Picture, VideoSource},
};

/// Goes into every digest: changes whenever the same video would give other pixels.
const PREPROCESSING_VERSION: u32 = 2;

/// What a request asks of the sampling; `None` = the server's own.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct FrameSampling {
    pub num_frames: Option<usize>,
    /// Frames a second of video; excludes `num_frames`.
    pub fps: Option<f64>,
    /// Upper bound with `fps`.
    pub max_frames: Option<usize>,
    /// Start and end of the window, seconds from the file's start.
    pub start: Option<f64>,
    pub end: Option<f64>,
}

/// What was sampled, for the reply's `video` object.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct VideoInfo {
    /// Frames of the video stream that are sampled from, or pictures of a list.
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
    /// Seconds from the file's start to the end of its last frame; null for a list of frames
    /// without times.
    pub duration: Option<f64>,
    /// Displayed size (after rotation), pixels; for a list, that of its first sampled frame.
    pub width: usize,
    pub height: usize,
    /// Container name; "image" for a still image, "frames" for a list, "webp" or "apng" for an
    /// animation.
    pub container: String,
    pub codec: String,
    /// Kinds of the file's streams that the model does not get, each once: "audio", "subtitle",
    /// "data", "attachment", "picture" (a cover), "video" (another rendition).
    pub ignored_streams: Vec<String>,
    /// How many frames the model saw.
    pub num_frames: usize,
    /// The rate asked for, frames a second; of a list: its own. `None` where a number of frames was asked for.
    pub fps: Option<f64>,
    /// What bounded the frames that `fps` gave.
    pub max_frames: Option<usize>,
    /// The window, seconds from the file's start; null if not asked for.
    pub start: Option<f64>,
    pub end: Option<f64>,
    /// Sampled frames, in display order; short videos and lists repeat indices.
    pub sampled_indices: Vec<usize>,
    /// Presentation times of these frames, seconds from the file's start, as players count; empty
    /// if unknown.
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
        let (source, timestamps) = match source {
            VideoSource::Timed(list, timestamps) => (*list, Some(timestamps)),
            source => (source, None),
        };
        let is_picture_part = matches!(source, VideoSource::Image(_));
        if !source.is_frame_list() {
            // A fault of the request is found before anything is downloaded.
            Sampling::resolve(sampling, &self.config)?;
        }
        let fetched = self.fetched(source, caller).await?;
        let frames = if fetched.is_list {
            let list = PictureList { num_pictures: fetched.files.len(), timestamps: timestamps.as_deref() };
            let selection = Selection::of_list(sampling, list, &self.config)?;
            let pictures = PictureSource::List(fetched.files.clone());
            Box::pin(self.load_pictures(pictures, selection, caller)).await?
        } else {
            Box::pin(self.load_file(&fetched.files[0], is_picture_part, sampling, caller)).await?
        };
        self.sources.keep(fetched, caller).await?;
        Ok(frames)
    }

    /// Loads the frames of one file: a still, an animation or a video, as its bytes say.
    /// `is_picture_part` decides how an unknown file is refused.
    async fn load_file(
        &self,
        file: &LocalFile,
        is_picture_part: bool,
        sampling: FrameSampling,
        caller: &Caller,
    ) -> Result<Arc<VideoFrames>, MediaError> {
        let sampling = Sampling::resolve(sampling, &self.config)?;
        match self.content(file).await? {
            Content::Animation(animation) => {
                let selection = Selection::of_animation(&sampling, &animation.timeline)?;
                self.load_pictures(PictureSource::Animation(file.clone(), animation), selection, caller).await
            }
            Content::Still => {
                let selection = Selection::of_still(&sampling)?;
                self.load_pictures(PictureSource::Still(file.clone()), selection, caller).await
            }
            Content::Unknown if is_picture_part => Err(pictures::unsupported()),
            Content::Video | Content::Unknown => {
                let files = std::slice::from_ref(file);
                let digest = self.digest(files, &sampling.digest_bytes(), &caller.salt);
                let load = self.decode(file, &sampling, digest, &caller.trail);
                self.cached(digest, load, &caller.trail).await
            }
        }
    }

    /// Deletes media with a `uuid` that was not used for a long time. Waits for the disk.
    pub fn remove_idle(&self) {
        self.sources.named().remove_idle();
    }

    /// Who works and who waits in this stage, now.
    pub fn decoders(&self) -> DecoderLoad {
        self.places.load()
    }

    async fn fetched(&self, source: VideoSource, caller: &Caller) -> Result<Fetched, MediaError> {
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
