//! Finds, starts and stops the ffmpeg processes.
//!
//! Called by `probe.rs` and `decode.rs`, and by the commands to check or download the tools. Must never decode
//! in-process, never leave a child behind (a dropped [`Running`] kills it) and never keep a child's output unbounded.

use std::{
    io,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use ffmpeg_sidecar::{
    command::FfmpegCommand,
    download::{
        FfmpegDownloadProgressEvent, download_ffmpeg_package_with_progress, ffmpeg_download_url,
        unpack_ffmpeg,
    },
    paths::{sidecar_dir, sidecar_path},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, ChildStderr, ChildStdin, ChildStdout},
};

use super::{
    MediaError,
    sandbox::{Sandbox, kill_first},
};
use crate::config::{HwAccel, MediaConfig};

/// Demuxers that may open a video (ffmpeg's names); playlists and scripts, which open other files, are not among them.
const ALLOWED_DEMUXERS: &str = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,asf,flv,ogg";
/// Decoders that may run (ffmpeg's names; AV1 has several). No other is ever opened, whatever other
/// streams a file has.
const VIDEO_DECODERS: &str = "h264,hevc,vp8,vp9,av1,libdav1d,libaom-av1,mpeg4,mpeg2video,mjpeg,gif,mpeg1video,h263,flv,\
    msmpeg4v1,msmpeg4v2,msmpeg4,wmv1,wmv2,wmv3,vc1,theora,prores,dnxhd";
/// The same as ffmpeg names the codecs, for people too.
pub const ALLOWED_CODECS: [&str; 22] = [
    "h264",
    "hevc",
    "vp8",
    "vp9",
    "av1",
    "mpeg4",
    "mpeg2video",
    "mjpeg",
    "gif",
    "mpeg1video",
    "h263",
    "flv1",
    "msmpeg4v1",
    "msmpeg4v2",
    "msmpeg4v3",
    "wmv1",
    "wmv2",
    "wmv3",
    "vc1",
    "theora",
    "prores",
    "dnxhd",
];
/// Longer lines of a child's output are cut: no field that is read is near this.
const MAX_LINE_BYTES: usize = 4096;

/// Where the tools are, and what limits they run under.
#[derive(Debug, Clone)]
pub struct Tools {
    ffmpeg: Option<PathBuf>,
    max_frame_pixels: usize,
    pub threads: usize,
    sandbox: Sandbox,
    hwaccel: HwAccel,
    gpu_failed: Arc<AtomicBool>,
    has_no_fps_mode: Arc<AtomicBool>,
}

impl Tools {
    /// Nothing is looked for yet: a server without ffmpeg still answers text.
    pub fn new(config: &MediaConfig) -> Self {
        // More threads than this hardly help one decoder, and several decoders run at the same time.
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
        Tools {
            ffmpeg: config.ffmpeg_path.clone(),
            max_frame_pixels: config.max_frame_pixels,
            threads,
            sandbox: Sandbox::new(config.max_decoder_memory_bytes, config.decode_timeout, threads),
            hwaccel: config.hwaccel,
            gpu_failed: Arc::default(),
            has_no_fps_mode: Arc::default(),
        }
    }

    /// Finds ffmpeg; the error says how to install it.
    pub fn ffmpeg_path(&self) -> Result<PathBuf, MediaError> {
        find_ffmpeg(self.ffmpeg.as_deref(), sidecar_path().ok())
    }

    /// An `ffmpeg` whose next argument is an input option; it logs `[level] message` lines.
    pub fn ffmpeg(&self, threads: usize) -> Result<Command, MediaError> {
        let mut command = FfmpegCommand::new_with_path(self.ffmpeg_path()?);
        command.hide_banner().args(["-nostdin", "-nostats", "-threads", &threads.to_string()]);
        let mut command = Command::from(command);
        self.guard_input(&mut command);
        Ok(command)
    }

    /// An `ffmpeg` that only tells its version, limited as decoders are.
    pub fn ffmpeg_alone(&self) -> Result<tokio::process::Command, MediaError> {
        let mut command = Command::new(self.ffmpeg_path()?);
        command.args(["-hide_banner", "-version"]);
        Ok(self.sandbox.wrap(command, false))
    }

    /// What an input may make the tools open, allocate and run.
    fn guard_input(&self, command: &mut Command) {
        command
            .args(["-protocol_whitelist", "file,pipe", "-format_whitelist", ALLOWED_DEMUXERS])
            .args(["-codec_whitelist", VIDEO_DECODERS])
            .arg("-max_pixels")
            .arg(self.max_frame_pixels.to_string());
    }

    /// Lets the GPU decode the input that comes next. Frames come back to the processor's memory.
    pub fn accelerate(command: &mut Command, gpu: usize) {
        command.args(["-hwaccel", "cuda", "-hwaccel_device", &gpu.to_string()]);
    }

    /// Output options that give every frame out once, in the words of this ffmpeg.
    pub fn passthrough(&self) -> [&'static str; 2] {
        let old = self.has_no_fps_mode.load(Ordering::Relaxed);
        [if old { "-vsync" } else { "-fps_mode" }, "passthrough"]
    }

    /// Remembers that this ffmpeg is older than 5.1, which brought the option `-fps_mode`.
    pub fn give_up_fps_mode(&self) {
        self.has_no_fps_mode.store(true, Ordering::Relaxed);
    }

    /// The GPU that decodes, unless it was found that it cannot.
    pub fn gpu(&self) -> Option<usize> {
        match self.hwaccel {
            HwAccel::Cuda(gpu) if !self.gpu_failed.load(Ordering::Relaxed) => Some(gpu),
            _ => None,
        }
    }

    /// There is no such GPU, or ffmpeg cannot use it: from now on the processor decodes.
    pub fn give_up_gpu(&self, why: &str) {
        if !self.gpu_failed.swap(true, Ordering::Relaxed) {
            tracing::warn!(why, hwaccel = %self.hwaccel, "ffmpeg cannot use the GPU; the processor decodes videos");
        }
    }

    /// Starts a command made by this, limited. It reads nothing.
    pub fn start(&self, command: Command) -> Result<Running, MediaError> {
        self.start_as(command, Manner::default())
    }

    /// As [`Tools::start`], as `manner` says.
    pub fn start_as(&self, command: Command, manner: Manner) -> Result<Running, MediaError> {
        tracing::debug!(?command, "starting");
        let mut command = self.sandbox.wrap(command, manner.on_gpu);
        if manner.fed {
            command.stdin(Stdio::piped());
        }
        let mut child = command.spawn().map_err(|error| {
            tracing::error!(%error, "decoder did not start");
            MediaError::Internal("the video decoder could not be started; try again later".into())
        })?;
        if let Some(id) = child.id() {
            kill_first(id);
        }
        let stdout = child.stdout.take().expect("stdout is piped: this is a bug");
        let stderr = child.stderr.take().expect("stderr is piped: this is a bug");
        let stdin = child.stdin.take();
        Ok(Running { child, stdin, stdout, stderr })
    }
}

/// How a child runs, besides its command.
#[derive(Debug, Clone, Copy, Default)]
pub struct Manner {
    /// It gets a pipe to read from.
    pub fed: bool,
    /// It uses a GPU.
    pub on_gpu: bool,
}

/// A child at work. Dropping it kills the process.
#[derive(Debug)]
pub struct Running {
    pub child: Child,
    /// Of one that is fed.
    pub stdin: Option<ChildStdin>,
    pub stdout: ChildStdout,
    pub stderr: ChildStderr,
}

/// Waits for a child whose output was read to its end. Being killed (by a limit) is an error of its own.
pub async fn finish(mut child: Child) -> Result<ExitStatus, MediaError> {
    let status = child.wait().await.map_err(|error| pipe_failed(&error))?;
    if status.code().is_none() {
        tracing::warn!(%status, "decoder was killed");
        return Err(MediaError::Undecodable(
            "the decoder ran over its memory or processor time; send a shorter or smaller video".into(),
        ));
    }
    Ok(status)
}

/// Reads a child's output line by line, until its end or until `on_line` fails. Memory is bounded by one line.
pub async fn read_lines<R: AsyncRead + Unpin>(
    mut reader: R,
    mut on_line: impl FnMut(&str) -> Result<(), MediaError>,
) -> Result<(), MediaError> {
    let mut chunk = vec![0u8; 16 << 10];
    let mut line = Vec::with_capacity(256);
    loop {
        let read = reader.read(&mut chunk).await.map_err(|error| pipe_failed(&error))?;
        if read == 0 {
            return if line.is_empty() { Ok(()) } else { on_line(&String::from_utf8_lossy(&line)) };
        }
        for piece in chunk[..read].split_inclusive(|&byte| byte == b'\n') {
            let room = MAX_LINE_BYTES - line.len();
            line.extend_from_slice(&piece[..piece.len().min(room)]);
            if piece.ends_with(b"\n") {
                on_line(String::from_utf8_lossy(&line).trim_end())?;
                line.clear();
            }
        }
    }
}

/// Reading from a child failed: the machine's fault, not the video's.
pub fn pipe_failed(error: &io::Error) -> MediaError {
    tracing::error!(%error, "reading from the decoder failed");
    MediaError::Internal("reading from the video decoder failed; try again later".into())
}

fn find_ffmpeg(configured: Option<&Path>, beside_us: Option<PathBuf>) -> Result<PathBuf, MediaError> {
    let found = match configured {
        Some(path) => path.is_file().then(|| path.to_owned()),
        None => beside_us.filter(|path| path.is_file()).or_else(|| find_on_path("ffmpeg")),
    };
    found.ok_or_else(|| {
        let place = configured.map_or("on PATH".into(), |path| format!("at {}", path.display()));
        MediaError::Internal(format!(
            "ffmpeg was not found {place}: install it (`apt-get install ffmpeg`) or start the server with \
             `--download-ffmpeg`"
        ))
    })
}

/// Finds ffmpeg, for commands that report it.
///
/// # Errors
/// When it is missing.
pub fn ffmpeg_path(config: &MediaConfig) -> Result<PathBuf, MediaError> {
    Tools::new(config).ffmpeg_path()
}

/// The first file of that name in the directories of `PATH`.
pub fn find_on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file())
}

/// Downloads ffmpeg into the directory of this executable. Blocks; `progress` gets the bytes so
/// far and the total (0: unknown).
pub fn download_ffmpeg(progress: impl Fn(u64, u64)) -> Result<(), MediaError> {
    let download = || {
        let directory = sidecar_dir()?;
        let archive = download_ffmpeg_package_with_progress(ffmpeg_download_url()?, &directory, |event| {
            if let FfmpegDownloadProgressEvent::Downloading { total_bytes, downloaded_bytes } = event {
                progress(downloaded_bytes, total_bytes);
            }
        })?;
        unpack_ffmpeg(&archive, &directory)
    };
    download().map_err(|error| {
        MediaError::Internal(format!(
            "ffmpeg could not be downloaded ({error:#}): install it with `apt-get install ffmpeg`"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_tool_says_how_to_get_it() {
        let missing = MediaConfig { ffmpeg_path: Some("/nowhere/ffmpeg".into()), ..Default::default() };
        let message = Tools::new(&missing).ffmpeg_path().unwrap_err().to_string();
        for part in ["/nowhere/ffmpeg", "apt-get install ffmpeg", "start the server with `--download-ffmpeg`"]
        {
            assert!(message.contains(part), "{message}");
        }
    }

    #[tokio::test]
    async fn lines_are_cut_and_counted_whatever_the_chunks() {
        let text = format!("one\n{}\n\nlast", "x".repeat(100_000));
        let mut lines = Vec::new();
        read_lines(text.as_bytes(), |line| {
            lines.push(line.len());
            Ok(())
        })
        .await
        .unwrap();
        assert_eq!(lines, [3, MAX_LINE_BYTES, 0, 4]);
    }
}
