//! The one video of a request: where it comes from and how its frames are sampled.
//!
//! Called by `validate`. Checks form and ranges; whether a URL may be fetched is for [`crate::media`] to say.

use tempfile::NamedTempFile;

use super::{InvalidRequest, ValidVideo, messages::VideoPart, refuse_unknown, shorten};
use crate::{
    config::{Config, MediaConfig},
    http::types::{MediaIoKwargs, SamplingKnobs},
    media::{FrameSampling, VideoSource},
};

/// Where the knobs of the whole request are.
const TOP_LEVEL: &str = "media_io_kwargs.video";
/// Longest URL that is not `data:` (which the body limit bounds).
const MAX_URL_BYTES: usize = 8 << 10;
/// Longest scheme of a URL that is known.
const MAX_SCHEME_BYTES: usize = 5;
/// Longest `uuid` of a video. It is accepted, but frames are cached by their content only.
const MAX_UUID_BYTES: usize = 256;
/// Most frames a second that can be asked for.
const MAX_FPS: f64 = 1000.0;

/// Brings together the video part, the upload and the top-level knobs.
pub fn validate(
    part: Option<VideoPart>,
    upload: Option<NamedTempFile>,
    top_level: Option<MediaIoKwargs>,
    config: &Config,
) -> Result<Option<ValidVideo>, InvalidRequest> {
    let top_level = match top_level {
        None => None,
        Some(kwargs) => {
            refuse_unknown(&kwargs.extra, "media_io_kwargs", &["video"])?;
            kwargs.video.map(|knobs| check(TOP_LEVEL, &knobs, &config.media)).transpose()?
        }
    }
    .unwrap_or_default();
    // Where the knobs of the video itself are.
    let own_path = part.as_ref().map(|part| format!("{}.video_url", part.path)).unwrap_or_default();
    let (source, own) = match (part, upload) {
        (None, None) => return Ok(None),
        (None, Some(file)) => (VideoSource::TempFile(file), FrameSampling::default()),
        (Some(mut part), upload) => {
            let knobs = part.video.take_knobs();
            if part.video.uuid.is_some_and(|uuid| uuid.len() > MAX_UUID_BYTES) {
                let message = format!("uuid is longer than {MAX_UUID_BYTES} bytes");
                return Err(InvalidRequest::field(format!("{own_path}.uuid"), message));
            }
            let own = check(&own_path, &knobs, &config.media)?;
            (source(&own_path, part.video.url, upload)?, own)
        }
    };
    Ok(Some(ValidVideo { source, sampling: merge(&own_path, own, top_level)? }))
}

fn source(
    path: &str,
    url: Option<String>,
    upload: Option<NamedTempFile>,
) -> Result<VideoSource, InvalidRequest> {
    let param = format!("{path}.url");
    match (url, upload) {
        (Some(_), Some(_)) => Err(InvalidRequest::field(
            param,
            "there are two sources for one video: this URL and the uploaded part \"video\"; send one",
        )),
        (None, Some(file)) => Ok(VideoSource::TempFile(file)),
        (None, None) => Err(InvalidRequest::field(param, "the video has no URL")),
        (Some(url), None) => check_url(param, url).map(VideoSource::Url),
    }
}

/// Scheme and length only.
fn check_url(param: String, url: String) -> Result<String, InvalidRequest> {
    // Not `split_once`: what is sent here may be megabytes without a colon.
    let start = &url.as_bytes()[..url.len().min(MAX_SCHEME_BYTES + 1)];
    let scheme = start.iter().position(|byte| *byte == b':').map(|end| url[..end].to_ascii_lowercase());
    match scheme.as_deref() {
        Some("data") => Ok(url),
        Some("http" | "https" | "file") if url.len() <= MAX_URL_BYTES => Ok(url),
        Some("http" | "https" | "file") => {
            Err(InvalidRequest::field(param, format!("the URL is longer than {MAX_URL_BYTES} bytes")))
        }
        _ => {
            let start = shorten(&url);
            let message = format!("\"{start}\" is no https:, http:, data: or file: URL");
            Err(InvalidRequest::field(param, message))
        }
    }
}

/// Ranges of the knobs in one place of the request.
fn check(path: &str, knobs: &SamplingKnobs, media: &MediaConfig) -> Result<FrameSampling, InvalidRequest> {
    refuse_unknown(&knobs.extra, path, &["num_frames", "fps", "max_frames", "start", "end"])?;
    let fault = |name: &str, message: String| InvalidRequest::field(format!("{path}.{name}"), message);
    let frames = |name: &str, value: Option<i64>| match value.map(usize::try_from) {
        None => Ok(None),
        Some(Ok(frames)) if (1..=media.max_frames).contains(&frames) => Ok(Some(frames)),
        Some(_) => Err(fault(name, format!("{name} must be from 1 to {}", media.max_frames))),
    };
    let sampling = FrameSampling {
        num_frames: frames("num_frames", knobs.num_frames)?,
        fps: knobs.fps,
        max_frames: frames("max_frames", knobs.max_frames)?,
        start: knobs.start,
        end: knobs.end,
    };
    if sampling.fps.is_some_and(|fps| !(fps > 0.0 && fps <= MAX_FPS)) {
        return Err(fault("fps", format!("fps must be greater than 0 and at most {MAX_FPS}")));
    }
    for (name, time) in [("start", sampling.start), ("end", sampling.end)] {
        if time.is_some_and(|time| !(0.0..=media.max_video_seconds).contains(&time)) {
            return Err(fault(name, format!("{name} must be from 0 to {} seconds", media.max_video_seconds)));
        }
    }
    if let (Some(start), Some(end)) = (sampling.start, sampling.end)
        && start >= end
    {
        return Err(fault("end", format!("end ({end}) must be after start ({start})")));
    }
    Ok(sampling)
}

/// The part's knobs and the top-level ones may complete each other, never contradict.
fn merge(
    own_path: &str,
    own: FrameSampling,
    top_level: FrameSampling,
) -> Result<FrameSampling, InvalidRequest> {
    let fault = |name: &str, is_own: bool, message: String| {
        let path = if is_own { own_path } else { TOP_LEVEL };
        Err(InvalidRequest::field(format!("{path}.{name}"), message))
    };
    let merged = FrameSampling {
        num_frames: same("num_frames", own.num_frames, top_level.num_frames)?,
        fps: same("fps", own.fps, top_level.fps)?,
        max_frames: same("max_frames", own.max_frames, top_level.max_frames)?,
        start: same("start", own.start, top_level.start)?,
        end: same("end", own.end, top_level.end)?,
    };
    if merged.num_frames.is_some() && merged.fps.is_some() {
        let message = "num_frames and fps contradict each other; send one of them";
        return fault("fps", own.fps.is_some(), message.into());
    }
    if merged.num_frames.is_some() && merged.max_frames.is_some() {
        let message = "max_frames bounds what fps gives and contradicts num_frames; send one of them";
        return fault("max_frames", own.max_frames.is_some(), message.into());
    }
    if merged.max_frames.is_some() && merged.fps.is_none() {
        let message = "max_frames bounds what fps gives; send fps with it, or num_frames instead";
        return fault("max_frames", own.max_frames.is_some(), message.into());
    }
    if let (Some(start), Some(end)) = (merged.start, merged.end)
        && start >= end
    {
        return fault("end", own.end.is_some(), format!("end ({end}) must be after start ({start})"));
    }
    Ok(merged)
}

fn same<T: PartialEq + std::fmt::Display>(
    name: &str,
    own: Option<T>,
    top_level: Option<T>,
) -> Result<Option<T>, InvalidRequest> {
    match (own, top_level) {
        (Some(own), Some(top)) if own != top => Err(InvalidRequest::field(
            format!("{TOP_LEVEL}.{name}"),
            format!("{name} is {own} in video_url but {top} in media_io_kwargs; send one of them"),
        )),
        (own, top) => Ok(own.or(top)),
    }
}
