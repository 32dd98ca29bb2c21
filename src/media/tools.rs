//! For the commands: whether there is an ffmpeg, frames of local files at their own size, how long sampling takes.
//!
//! Called by `cli`, never for a request.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use super::{
    Caller, FrameSampling, MediaError, MediaLoader, VideoInfo, VideoSource, Way,
    decode::{Decoded, FrameMap},
    ffmpeg::Tools,
    frame_sampling::Sampling,
    local_file::LocalFile,
    probe,
    video_info::video_info,
};
use crate::{
    config::{HwAccel, MediaConfig},
    telemetry::{PieceTimer, Trail},
};

/// Most memory for frames at source size.
const MAX_SOURCE_FRAMES_BYTES: usize = 2 << 30;

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

/// Checks that ffmpeg is installed; the error says how to install it.
///
/// # Errors
/// When it is missing.
pub fn check_tools(config: &MediaConfig) -> Result<(), MediaError> {
    Tools::new(config).ffmpeg_path().map(|_| ())
}

/// Starts ffmpeg under the limits of decoders, with nothing to decode.
///
/// # Errors
/// When it does not start or fails; the text says what it or `prlimit` said.
pub async fn check_limits(config: &MediaConfig) -> Result<(), String> {
    let mut command = Tools::new(config).ffmpeg_alone().map_err(|error| error.to_string())?;
    let output = tokio::time::timeout(config.decode_timeout, command.output()).await;
    let output = output.map_err(|_| "it did not end in time")?.map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(match said.lines().next() {
        Some(line) => line.to_owned(),
        None => output.status.to_string(),
    })
}

impl MediaLoader {
    /// Whether the GPU that is to decode can still be used, as far as was tried; none: no GPU is to decode.
    pub fn gpu_decodes(&self) -> Option<bool> {
        (self.config.hwaccel != HwAccel::None).then(|| self.tools.gpu().is_some())
    }

    /// Sampled frames of a local file at its own size.
    pub async fn source_frames(
        &self,
        file: &Path,
        sampling: FrameSampling,
    ) -> Result<SourceFrames, MediaError> {
        let sampling = Sampling::resolve(sampling, &self.config)?;
        let video = self.local_file(file).await?;
        let work = async {
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
            let info = video_info(&probe, &decoded, &sampling);
            Ok(SourceFrames { rgb: decoded.frames.concat(), info })
        };
        self.bounded(work, &Trail::default()).await
    }

    /// Samples a local file the way requests are, and again by decoding everything.
    pub async fn benchmark(
        &self,
        file: &Path,
        sampling: FrameSampling,
    ) -> Result<SamplingBenchmark, MediaError> {
        let sampling = Sampling::resolve(sampling, &self.config)?;
        let video = self.local_file(file).await?;
        let _place = self.places.take().await;
        let started = Instant::now();
        let probe = probe::probe(&self.tools, video.path(), &self.config).await?;
        let probed = started.elapsed();
        let decoder = self.decoder(&video, &probe, self.resizing(&probe, &PieceTimer::default()));
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

    async fn local_file(&self, file: &Path) -> Result<LocalFile, MediaError> {
        let source = VideoSource::LocalFile(file.to_owned());
        let mut fetched = self.sources.read(source, &Caller::default()).await?;
        Ok(fetched.files.pop().expect("a file is one file: this is a bug"))
    }
}
