//! Runs ffmpeg once over a video: the command, the frames that come out, and the log.
//!
//! Called by `decode.rs`, which plans the passes and judges what they gave. Must never hold more
//! than two source-size frames of a run, and never leave a process behind.

use std::sync::Arc;

use futures_util::future::{BoxFuture, OptionFuture};
use tokio::{io::AsyncReadExt, process::ChildStdout, task::JoinHandle};

use super::{
    MediaError,
    container::Container,
    decode::Decoder,
    decode_log::{DecodeLog, SHOWINFO},
    ffmpeg::{Manner, Tools, finish, pipe_failed, read_lines},
    packet_feed::Feed,
    probe::file_url,
};

/// Messages of ffmpeg where no GPU can be used at all.
const NO_GPU: [&str; 2] = ["Device creation failed", "No device available for decoder"];
/// Pixel format of all videos that go to a GPU: see `Probe::fits_gpu`.
const GPU_PIXEL_FORMAT: &str = "format=yuv420p";
/// `eq(...)` terms of a select expression; every one is evaluated for every decoded frame.
pub type Terms = Vec<String>;

/// Input of one run.
pub enum Input {
    File { seek_seconds: Option<f64> },
    Fed(Arc<Feed>),
}

/// One run of ffmpeg.
pub struct Pass {
    pub input: Input,
    pub threads: usize,
    pub select: Terms,
    /// Decoding more frames than this is a failure.
    pub max_decoded: usize,
    /// Stop once all selected frames are out.
    pub stop_early: bool,
}

/// Output of one run.
pub struct PassOutput {
    /// Mapped frames, in the order that they came out.
    pub frames: Vec<Vec<u8>>,
    /// More frames came out than were wanted.
    pub surplus: bool,
    pub log: DecodeLog,
    /// ffmpeg exited with status 0.
    succeeded: bool,
}

impl PassOutput {
    /// Returns true if ffmpeg got as far as decoding.
    pub fn tells_of_the_video(&self) -> bool {
        self.succeeded || !self.log.decoded.is_empty() || self.log.damages() > 0
    }

    /// Returns the frames if their pts are `wanted` and the decoder reported no damage.
    pub fn exactly(self, wanted: &[i64]) -> Option<Vec<Vec<u8>>> {
        let given = self.log.selected.iter().take(self.frames.len());
        let given = given.map(|position| position.and_then(|position| self.log.decoded[position]));
        let exact = !self.surplus && self.log.damages() == 0 && given.eq(wanted.iter().copied().map(Some));
        exact.then_some(self.frames)
    }
}

impl Decoder<'_> {
    /// Runs ffmpeg, on the GPU if there is one for this; none if the run went over `max_decoded`.
    pub async fn run(&self, pass: Pass) -> Result<Option<PassOutput>, MediaError> {
        if let Some(gpu) = self.tools.gpu().filter(|_| self.probe.fits_gpu()) {
            let wanted = pass.select.len();
            match self.run_boxed(&pass, Some(gpu)).await {
                Ok(Some(output)) if output.succeeded && output.frames.len() == wanted => {
                    return Ok(Some(output));
                }
                _ => {
                    tracing::info!(codec = self.probe.codec, "not decoded by the GPU; the processor does it")
                }
            }
        }
        match self.run_boxed(&pass, None).await? {
            Some(output) if output.log.is_old_ffmpeg => {
                self.tools.give_up_fps_mode();
                self.run_boxed(&pass, None).await
            }
            output => Ok(output),
        }
    }

    /// Runs ffmpeg once. Boxed, so that the state of a run is not part of every caller's future.
    fn run_boxed<'a>(
        &'a self,
        pass: &'a Pass,
        gpu: Option<usize>,
    ) -> BoxFuture<'a, Result<Option<PassOutput>, MediaError>> {
        Box::pin(self.run_once(pass, gpu))
    }

    async fn run_once(&self, pass: &Pass, gpu: Option<usize>) -> Result<Option<PassOutput>, MediaError> {
        let wanted = pass.select.len();
        let fed = match &pass.input {
            Input::Fed(feed) => Some(feed.clone()),
            Input::File { .. } => None,
        };
        let manner = Manner { fed: fed.is_some(), on_gpu: gpu.is_some() };
        let running = self.tools.start_as(self.command(pass, gpu)?, manner)?;
        let feeding = fed.zip(running.stdin).map(|(feed, stdin)| feed.give_to(stdin));
        let feeding = async { OptionFuture::from(feeding).await.unwrap_or(Ok(())) };
        let mut account = DecodeLog::default();
        let frames = self.read_frames(running.stdout, wanted);
        let log = read_lines(running.stderr, |line| {
            if !account.take(line) {
                if gpu.is_some() && NO_GPU.iter().any(|sign| line.contains(sign)) {
                    self.tools.give_up_gpu(line);
                }
                tracing::trace!(line, "ffmpeg");
            }
            // Any error stops the pass; this one never leaves `run`.
            if account.decoded.len() > pass.max_decoded { Err(overrun()) } else { Ok(()) }
        });
        let output = tokio::try_join!(frames, log, feeding);
        self.trail.decoded_frames(account.decoded.len());
        let ((frames, surplus), (), ()) = match output {
            Ok(output) => output,
            Err(_) if account.decoded.len() > pass.max_decoded => return Ok(None),
            Err(error) => return Err(error),
        };
        let succeeded = finish(running.child).await?.success();
        Ok(Some(PassOutput { frames, surplus, log: account, succeeded }))
    }

    fn command(&self, pass: &Pass, gpu: Option<usize>) -> Result<std::process::Command, MediaError> {
        let (width, height) = (self.probe.width, self.probe.height);
        let mut command = self.tools.ffmpeg(pass.threads)?;
        // Every line counts, also one that says the same as the line before.
        command.args(["-loglevel", "repeat+level+info"]);
        // Frames that cannot be right (decoding began too late for them) must not come out at all.
        command.args(["-flags", "-output_corrupt", "-noautorotate", "-copyts"]);
        // Filters that were rebuilt for another size or format would restart their frame count.
        command.args(["-reinit_filter", "0"]);
        if let Some(gpu) = gpu {
            Tools::accelerate(&mut command, gpu);
        }
        match &pass.input {
            Input::Fed(_) => {
                command.args(["-f", Container::Matroska.demuxer(), "-i", "pipe:0"]);
            }
            Input::File { seek_seconds } => {
                if let Some(seconds) = seek_seconds {
                    // Absolute and inexact: `select` picks the frames, by the times the container
                    // gives them.
                    command.args(["-seek_timestamp", "1", "-noaccurate_seek", "-ss"]);
                    command.arg(format!("{seconds:.6}"));
                }
                command.args(["-f", self.probe.container.demuxer(), "-i"]).arg(file_url(self.file));
            }
        }
        let select = format!("select='{}'", pass.select.join("+"));
        // A stream may change its size midway: the pipe's frames may not.
        let scale = format!("scale={width}:{height}:flags=bilinear");
        let mut filters = vec![SHOWINFO, &select, SHOWINFO];
        if gpu.is_some() {
            // A GPU's pictures have their colors interleaved. Put apart, they take the same way to
            // RGB as others.
            filters.push(GPU_PIXEL_FORMAT);
        }
        let orientation = self.probe.orientation;
        let (stored_width, stored_height) =
            if orientation.swaps_sides { (height, width) } else { (width, height) };
        let stored = format!("scale={stored_width}:{stored_height}:flags=bilinear");
        if !orientation.filters.is_empty() {
            // Filters that turn pictures take every one for as large as the first. Does nothing to
            // those that are.
            filters.push(&stored);
        }
        filters.extend(orientation.filters);
        filters.extend([scale.as_str(), "format=rgb24"]);
        // A feed has one stream.
        let stream = if matches!(pass.input, Input::Fed(_)) { 0 } else { self.probe.stream_index };
        command.args(["-map", &format!("0:{stream}"), "-an", "-sn", "-dn", "-vf", &filters.join(",")]);
        if pass.stop_early {
            command.args(["-frames:v", &pass.select.len().to_string()]);
        }
        command.args(self.tools.passthrough()).args(["-f", "rawvideo", "pipe:1"]);
        Ok(command)
    }

    /// Reads frames and maps each while the next one is read: `wanted` ones, and whether there were
    /// more (dropped, for the log to come to its end). Takes the pipe, so that a decoder with more
    /// to say fails instead of waiting for a reader.
    async fn read_frames(
        &self,
        mut stdout: ChildStdout,
        wanted: usize,
    ) -> Result<(Vec<Vec<u8>>, bool), MediaError> {
        let frame_bytes = self.probe.width * self.probe.height * 3;
        let mut frames = Vec::with_capacity(wanted);
        let mut mapping: Option<JoinHandle<Vec<u8>>> = None;
        loop {
            let frame = read_frame(&mut stdout, frame_bytes).await?;
            if let Some(mapping) = mapping.take() {
                frames.push(mapping.await.expect("frames are mapped without panics: this is a bug"));
            }
            match frame {
                Some(frame) if frames.len() < wanted => mapping = Some(self.map.start(frame)),
                Some(_) => {
                    let dropped = tokio::io::copy(&mut stdout, &mut tokio::io::sink()).await;
                    dropped.map_err(|error| pipe_failed(&error))?;
                    return Ok((frames, true));
                }
                None => return Ok((frames, false)),
            }
        }
    }
}

/// One whole frame; none at the end of the output (a started frame is dropped: the pass is then
/// short of one).
async fn read_frame(stdout: &mut ChildStdout, bytes: usize) -> Result<Option<Vec<u8>>, MediaError> {
    let mut frame = Vec::with_capacity(bytes);
    let mut rest = stdout.take(bytes as u64);
    while frame.len() < bytes {
        if rest.read_buf(&mut frame).await.map_err(|error| pipe_failed(&error))? == 0 {
            return Ok(None);
        }
    }
    Ok(Some(frame))
}

fn overrun() -> MediaError {
    MediaError::Internal("the decoder went past its plan: this is a bug".into())
}
