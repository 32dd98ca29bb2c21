//! ffmpeg, and whether it decodes every codec the server takes, in the way requests are decoded.
//!
//! Called by `doctor`. Has ffmpeg itself encode a tiny clip a codec, then samples it through [`MediaLoader`]: same
//! arguments, same limits.

use std::{path::Path, process::Stdio, time::Duration};

use tokio::{process::Command, time::timeout};

use super::Finding;
use crate::{
    cli::options::ModelOptions,
    config::{FilesConfig, MediaConfig},
    media::{
        FrameSampling, MediaError, MediaLoader, check_limits, check_tools,
        ffmpeg::{ALLOWED_CODECS, ffmpeg_path, find_on_path},
    },
};

/// Wall clock for making one clip or telling a version.
const LONGEST_RUN: Duration = Duration::from_secs(20);
/// Side of a frame the clips are resized to: any will do.
const IMAGE_SIZE: usize = 64;

pub async fn check(options: &ModelOptions, config: &MediaConfig) -> Vec<Finding> {
    if let Err(error) = check_tools(config) {
        let found = "ffmpeg is missing";
        return vec![if options.download_ffmpeg {
            Finding::warning("ffmpeg", found, "`serve` downloads it first, as --download-ffmpeg says")
        } else {
            Finding::problem("ffmpeg", found, error.to_string())
        }];
    }
    let ffmpeg = match ffmpeg_path(config) {
        Ok(ffmpeg) => ffmpeg,
        Err(error) => return vec![Finding::problem("ffmpeg", error.to_string(), "install ffmpeg")],
    };
    let mut findings = vec![version(&ffmpeg).await];
    if findings[0].fix.is_none() {
        findings.extend(codecs(&ffmpeg, config).await);
    }
    if findings[0].fix.is_none() {
        findings.push(limits(config).await);
    }
    findings
}

async fn version(ffmpeg: &Path) -> Finding {
    let first_line = run(ffmpeg, &["-hide_banner", "-version"]).await.map(|text| {
        let line = text.lines().next().unwrap_or_default();
        line.split(" Copyright").next().unwrap_or_default().to_owned()
    });
    match first_line {
        Some(line) => Finding::ok("ffmpeg", format!("{line}, at {}", ffmpeg.display())),
        None => {
            Finding::problem("ffmpeg", format!("{} does not run", ffmpeg.display()), "install ffmpeg again")
        }
    }
}

async fn limits(config: &MediaConfig) -> Finding {
    if find_on_path("prlimit").is_some() {
        return match check_limits(config).await {
            Ok(()) => Finding::ok("decoder limits", "memory, processor time, open files and wall clock"),
            Err(error) => Finding::problem(
                "decoder limits",
                format!("ffmpeg does not start under prlimit, and so no video is decoded: {error}"),
                "let the server call prlimit, or install util-linux again",
            ),
        };
    }
    Finding::warning(
        "decoder limits",
        "only the wall clock: prlimit is missing",
        "install util-linux, so that no video can take all memory",
    )
}

/// What can make a clip of a codec: encoder, and the options that make it quick.
fn encoder(codec: &str) -> (&str, &[&str]) {
    match codec {
        "h264" => ("libx264", &["-preset", "ultrafast"]),
        "hevc" => ("libx265", &["-preset", "ultrafast", "-x265-params", "log-level=none"]),
        "vp8" => ("libvpx", &["-deadline", "realtime"]),
        "vp9" => ("libvpx-vp9", &["-deadline", "realtime"]),
        "av1" => ("libaom-av1", &["-cpu-used", "8"]),
        "mpeg1video" => ("mpeg1video", &["-r", "25"]),
        "h263" => ("h263", &["-s", "128x96"]),
        "flv1" => ("flv", &[]),
        "msmpeg4v3" => ("msmpeg4", &[]),
        "theora" => ("libtheora", &[]),
        "dnxhd" => ("dnxhd", &["-profile:v", "dnxhr_lb", "-s", "256x128"]),
        other => (other, &[]),
    }
}

async fn codecs(ffmpeg: &Path, config: &MediaConfig) -> Vec<Finding> {
    let made = tempfile::tempdir().map_err(|error| error.to_string());
    // Its own temporary files: a running server may hold the configured directory.
    let config = MediaConfig { files: FilesConfig::default(), ..config.clone() };
    let loader = MediaLoader::new(config, IMAGE_SIZE).map_err(|error| error.to_string());
    let (dir, loader) = match (made, loader) {
        (Ok(dir), Ok(loader)) => (dir, loader),
        (Err(error), _) | (_, Err(error)) => {
            let found = format!("could not be tried: {error}");
            return vec![Finding::problem("codecs", found, "make TMPDIR writable")];
        }
    };
    let (mut decoded, mut failed, mut untried, mut first_error) = (vec![], vec![], vec![], None);
    for codec in ALLOWED_CODECS {
        let clip = dir.path().join(if codec == "gif" { "clip.gif" } else { "clip.mkv" });
        if !make_clip(ffmpeg, codec, &clip).await {
            untried.push(codec);
            continue;
        }
        match loader.source_frames(&clip, FrameSampling::default()).await {
            Ok(_) => decoded.push(codec),
            Err(error) => {
                failed.push(codec);
                first_error.get_or_insert(error);
            }
        }
    }
    let mut findings = vec![told(&decoded, &failed, &untried, first_error.as_ref())];
    if let Some(works) = loader.gpu_decodes() {
        findings.push(hwaccel(works));
    }
    findings
}

fn hwaccel(works: bool) -> Finding {
    if works {
        return Finding::ok("hwaccel", "ffmpeg can use the GPU");
    }
    Finding::warning(
        "hwaccel",
        "ffmpeg cannot use the GPU; the processor decodes videos",
        "install the NVIDIA driver with its video library, or leave --hwaccel out",
    )
}

fn told(decoded: &[&str], failed: &[&str], untried: &[&str], first_error: Option<&MediaError>) -> Finding {
    let names = |codecs: &[&str]| codecs.join(", ");
    if let Some(error) = first_error {
        let found = format!("not decoded: {} ({error})", names(failed));
        return if decoded.is_empty() {
            Finding::problem(
                "codecs",
                found,
                "no video can be decoded: correct the decoder limits, or install another ffmpeg",
            )
        } else {
            let fix = "videos of these codecs are refused: install an ffmpeg with their decoders";
            Finding::warning("codecs", found, fix)
        };
    }
    if decoded.is_empty() {
        return Finding::warning(
            "codecs",
            "none was tried, for this ffmpeg cannot encode any",
            "send a video, to see whether it is decoded",
        );
    }
    let mut found = format!("decoded a clip: {}", names(decoded));
    if !untried.is_empty() {
        found += &format!("; not tried, for this ffmpeg cannot encode them: {}", names(untried));
    }
    Finding::ok("codecs", found)
}

/// Whether this ffmpeg could make it.
async fn make_clip(ffmpeg: &Path, codec: &str, clip: &Path) -> bool {
    let (encoder, options) = encoder(codec);
    let mut arguments =
        vec!["-loglevel", "error", "-y", "-f", "lavfi", "-i", "testsrc=s=64x64:r=8:d=1", "-c:v", encoder];
    arguments.extend(options);
    match codec {
        "gif" => {}
        "mjpeg" => arguments.extend(["-pix_fmt", "yuvj420p"]),
        "prores" => arguments.extend(["-pix_fmt", "yuv422p10"]),
        "dnxhd" => arguments.extend(["-pix_fmt", "yuv422p"]),
        _ => arguments.extend(["-pix_fmt", "yuv420p"]),
    }
    let Some(path) = clip.to_str() else { return false };
    arguments.push(path);
    run(ffmpeg, &arguments).await.is_some()
}

/// Standard output of a run that succeeded in time.
async fn run(program: &Path, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let output = timeout(LONGEST_RUN, command.output()).await.ok()?.ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}
