//! The videos of a request: which of them is the upload, and how their frames are sampled.
//!
//! Called by `validate`. The knobs of one video may stand in three places: in its object, beside it in the part, and
//! in `media_io_kwargs` for all videos. They complete each other and never contradict.

use std::fmt::Display;

use tempfile::NamedTempFile;

use super::{InvalidRequest, ValidVideo, parts::VideoPart, refuse_unknown};
use crate::{
    config::{Config, MediaConfig},
    http::types::{ImageKnobs, MediaIoKwargs, SamplingKnobs},
    media::{FrameSampling, VideoSource},
};

/// Where the knobs of the whole request are.
const TOP_LEVEL: &str = "media_io_kwargs.video";
/// Path of the settings for pictures.
const PICTURES: &str = "media_io_kwargs.image";
/// The part of a multipart body with the video.
const UPLOAD: &str = "video";
/// Most frames a second that can be asked for.
const MAX_FPS: f64 = 1000.0;

/// How many frames, as vLLM's clients say it.
#[derive(Debug, Clone, Copy, PartialEq)]
enum NumFrames {
    /// -1
    All,
    Count(usize),
}

/// Knobs in range.
#[derive(Debug, Clone, Copy, Default)]
struct Knobs {
    num_frames: Option<NumFrames>,
    fps: Option<f64>,
    max_frames: Option<usize>,
    start: Option<f64>,
    end: Option<f64>,
}

/// Knobs and the path of the object they are in.
type Placed = (String, Knobs);

/// Returns true if consecutive pictures are separate still images.
pub fn as_stills(top_level: Option<&MediaIoKwargs>, config: &Config) -> bool {
    let as_video = top_level.and_then(|kwargs| kwargs.image.as_ref()).and_then(|image| image.as_video);
    as_video.map_or(config.images_as_stills, |as_video| !as_video)
}

/// Brings together the video parts, the upload and the top-level knobs.
pub fn validate(
    parts: Vec<VideoPart>,
    upload: Option<NamedTempFile>,
    top_level: Option<MediaIoKwargs>,
    config: &Config,
) -> Result<Vec<ValidVideo>, InvalidRequest> {
    let (media, is_apart) = (&config.media, as_stills(top_level.as_ref(), config));
    let mut for_all: Vec<Placed> = vec![];
    let mut pictures = ImageKnobs::default();
    if let Some(kwargs) = top_level {
        refuse_unknown(&kwargs.extra, "media_io_kwargs", &["video", "image"])?;
        if let Some(image) = kwargs.image {
            refuse_unknown(&image.extra, PICTURES, &["as_video", "fps", "timestamps"])?;
            pictures = image;
        }
        if let Some(knobs) = kwargs.video {
            refuse_unknown(&knobs.extra, TOP_LEVEL, &["num_frames", "fps", "max_frames", "start", "end"])?;
            for_all.push((TOP_LEVEL.into(), check(TOP_LEVEL, &knobs, media)?));
        }
    }
    if parts.is_empty() {
        let sampled = |file| valid(UPLOAD.into(), VideoSource::TempFile(file), for_all, media);
        return Ok(upload.map(sampled).transpose()?.into_iter().collect());
    }
    let unplaced = parts.iter().find(|_| upload.is_some() && parts.iter().all(|part| part.source.is_some()));
    if let Some(part) = unplaced {
        return Err(InvalidRequest::field(
            &part.source_path,
            "there are two sources for one video: this one and the uploaded part \"video\"; send one, or mark the \
             place of the upload with a video_url part without url",
        ));
    }
    // A named part without source may mean what was sent before: the upload prefers one without
    // name.
    let is_open = |part: &VideoPart| part.source.is_none();
    let place = parts.iter().position(|part| is_open(part) && part.uuid.is_none());
    let place = place.or_else(|| parts.iter().position(is_open));
    let mut upload = upload.map(VideoSource::TempFile);
    check_pictures(&pictures, &parts, is_apart)?;
    let mut times = PictureTimes::of(&pictures, &parts);
    let mut videos = Vec::with_capacity(parts.len());
    for (i, part) in parts.into_iter().enumerate() {
        let source = part.source.or_else(|| if place == Some(i) { upload.take() } else { None });
        let mut places: Vec<Placed> = vec![];
        for (path, knobs) in part.knobs {
            let checked = check(&path, &knobs, media)?;
            places.push((path, checked));
        }
        places.extend(for_all.iter().cloned());
        let mut timestamps = part.timestamps;
        if part.is_clip {
            if pictures.fps.is_some() || pictures.timestamps.is_some() {
                take_rate_of_pictures(pictures.fps, &mut places, media)?;
            }
            timestamps = times.take(num_frames(source.as_ref()));
        }
        let mut source = match part.uuid {
            Some(uuid) => VideoSource::Named { uuid, source: source.map(Box::new) },
            None => source.ok_or_else(|| {
                InvalidRequest::field(&part.source_path, "the video has no source; send its URL")
            })?,
        };
        if let Some((path, times)) = timestamps {
            let has_rate = places.iter().any(|(_, knobs)| knobs.fps.is_some());
            source = timed(&path, times, source, has_rate, media)?;
        }
        videos.push(valid(part.path, source, places, media)?);
    }
    Ok(videos)
}

/// Returns the fault of settings for pictures that have no effect on these parts.
fn check_pictures(pictures: &ImageKnobs, parts: &[VideoPart], is_apart: bool) -> Result<(), InvalidRequest> {
    let fault = |name: &str, message: &str| Err(InvalidRequest::field(format!("{PICTURES}.{name}"), message));
    if pictures.fps.is_some() && pictures.timestamps.is_some() {
        return fault(
            "timestamps",
            "fps and timestamps both say when the pictures are shown; send one of them",
        );
    }
    let has_clip = parts.iter().any(|part| part.is_clip);
    if pictures.timestamps.is_some() && !has_clip {
        let message = match is_apart {
            true => "separate pictures have no times; remove timestamps, or send \"as_video\": true",
            false => {
                "timestamps are those of two or more pictures in a row, and the request has none; remove them"
            }
        };
        return fault("timestamps", message);
    }
    let has_picture = parts.iter().any(|part| matches!(part.source, Some(VideoSource::Image(_))));
    if pictures.fps.is_some() && is_apart && has_picture {
        return fault("fps", "separate pictures have no rate; remove fps, or send \"as_video\": true");
    }
    Ok(())
}

/// Times of the pictures of a request, handed out clip by clip.
struct PictureTimes<'a> {
    /// Times that no clip has taken.
    rest: Option<&'a [f64]>,
    /// One list for all clips together; otherwise each clip takes the same list.
    is_shared: bool,
}

impl<'a> PictureTimes<'a> {
    /// Times for all pictures of `parts` are shared among the clips, others are for each.
    fn of(pictures: &'a ImageKnobs, parts: &[VideoPart]) -> Self {
        let rest = pictures.timestamps.as_deref();
        let clips = parts.iter().filter(|part| part.is_clip);
        let num_pictures: usize = clips.map(|part| num_frames(part.source.as_ref())).sum();
        PictureTimes { rest, is_shared: rest.is_some_and(|times| times.len() == num_pictures) }
    }

    fn take(&mut self, num_frames: usize) -> Option<(String, Vec<f64>)> {
        let times = self.rest?;
        let mut taken = times;
        if self.is_shared {
            let (own, rest) = times.split_at(num_frames.min(times.len()));
            (taken, self.rest) = (own, Some(rest));
        }
        Some((format!("{PICTURES}.timestamps"), taken.to_vec()))
    }
}

/// Returns the number of frames of a list by its URLs; 0 for other sources.
fn num_frames(source: Option<&VideoSource>) -> usize {
    match source {
        Some(VideoSource::Frames(urls)) => urls.len(),
        Some(VideoSource::Pictures(pictures)) => pictures.len(),
        _ => 0,
    }
}

/// Replaces the rate of videos in `places` by the rate of pictures.
fn take_rate_of_pictures(
    fps: Option<f64>,
    places: &mut Vec<Placed>,
    media: &MediaConfig,
) -> Result<(), InvalidRequest> {
    places.iter_mut().for_each(|(_, knobs)| knobs.fps = None);
    let rate = check(PICTURES, &SamplingKnobs { fps, ..SamplingKnobs::default() }, media)?;
    places.push((PICTURES.into(), rate));
    Ok(())
}

/// Attaches presentation times to a list of frames.
fn timed(
    path: &str,
    times: Vec<f64>,
    source: VideoSource,
    has_rate: bool,
    media: &MediaConfig,
) -> Result<VideoSource, InvalidRequest> {
    let fault = |message: String| Err(InvalidRequest::field(path, message));
    if !source.is_frame_list() {
        return fault("timestamps are those of a list of frames; a video has its own".into());
    }
    if has_rate {
        return fault("fps and timestamps both say when the frames are shown; send one of them".into());
    }
    let num_frames = match num_frames(Some(&source)) {
        // The server counts the pictures of the URL when it reads them.
        0 => times.len(),
        num_frames => num_frames,
    };
    if times.len() != num_frames {
        return fault(format!(
            "there are {} timestamps for {num_frames} frames; send one for each, or for each picture of the request, \
             or the frames and their timestamps in a part of type video",
            times.len()
        ));
    }
    if !times.iter().all(|time| (0.0..=media.max_video_seconds).contains(time)) || !times.is_sorted() {
        return fault(format!("timestamps must be ascending seconds from 0 to {}", media.max_video_seconds));
    }
    Ok(VideoSource::Timed(Box::new(source), times))
}

fn valid(
    path: String,
    source: VideoSource,
    places: Vec<Placed>,
    media: &MediaConfig,
) -> Result<ValidVideo, InvalidRequest> {
    let has_any = |(_, k): &&Placed| {
        k.num_frames.is_some()
            || k.fps.is_some()
            || k.max_frames.is_some()
            || k.start.is_some()
            || k.end.is_some()
    };
    let knobs_path = places.iter().find(has_any).map_or_else(|| path.clone(), |(path, _)| path.clone());
    let sampling = merge(&places, source.is_frame_list(), media)?;
    Ok(ValidVideo { path, knobs_path, source, sampling })
}

/// Ranges of the knobs in one place of the request. As vLLM's clients mean it, -1 is all frames, or no rate.
fn check(path: &str, knobs: &SamplingKnobs, media: &MediaConfig) -> Result<Knobs, InvalidRequest> {
    let fault = |name: &str, message: String| InvalidRequest::field(format!("{path}.{name}"), message);
    let frames = |name: &str, value: Option<i64>| match value.map(usize::try_from) {
        None => Ok(None),
        Some(Ok(frames)) if (1..=media.max_frames).contains(&frames) => Ok(Some(frames)),
        Some(_) => Err(fault(name, format!("{name} must be from 1 to {}", media.max_frames))),
    };
    let checked = Knobs {
        num_frames: match knobs.num_frames {
            Some(-1) => Some(NumFrames::All),
            asked => frames("num_frames", asked)?.map(NumFrames::Count),
        },
        fps: knobs.fps.filter(|fps| *fps != -1.0),
        max_frames: frames("max_frames", knobs.max_frames)?,
        start: knobs.start,
        end: knobs.end,
    };
    if checked.fps.is_some_and(|fps| !(fps > 0.0 && fps <= MAX_FPS)) {
        return Err(fault("fps", format!("fps must be greater than 0 and at most {MAX_FPS}")));
    }
    for (name, time) in [("start", checked.start), ("end", checked.end)] {
        if time.is_some_and(|time| !(0.0..=media.max_video_seconds).contains(&time)) {
            return Err(fault(name, format!("{name} must be from 0 to {} seconds", media.max_video_seconds)));
        }
    }
    Ok(checked)
}

/// One sampling out of all places. The rate of a list of frames is what it was sampled at, and contradicts nothing.
fn merge(places: &[Placed], is_list: bool, media: &MediaConfig) -> Result<FrameSampling, InvalidRequest> {
    let fps = same("fps", places, |knobs| knobs.fps)?;
    let mut max_frames = same("max_frames", places, |knobs| knobs.max_frames)?;
    let num_frames = match same("num_frames", places, |knobs| knobs.num_frames)? {
        Some(NumFrames::Count(count)) => Some(count),
        // All frames, as many as the bounds allow.
        Some(NumFrames::All) if fps.is_none() || is_list => {
            Some(max_frames.take().unwrap_or(media.max_frames))
        }
        Some(NumFrames::All) | None => None,
    };
    let start = same("start", places, |knobs| knobs.start)?;
    let end = same("end", places, |knobs| knobs.end)?;
    let fault = |name: &str, has: fn(&Knobs) -> bool, message: String| {
        let place = places.iter().find(|(_, knobs)| has(knobs));
        let path = place.map_or(TOP_LEVEL, |(path, _)| path);
        Err(InvalidRequest::field(format!("{path}.{name}"), message))
    };
    if num_frames.is_some() && fps.is_some() && !is_list {
        let message = "num_frames and fps contradict each other; send one of them";
        return fault("fps", |knobs| knobs.fps.is_some(), message.into());
    }
    if num_frames.is_some() && max_frames.is_some() && !is_list {
        let message = "max_frames bounds what fps gives and contradicts num_frames; send one of them";
        return fault("max_frames", |knobs| knobs.max_frames.is_some(), message.into());
    }
    if max_frames.is_some() && fps.is_none() && !is_list {
        let message = "max_frames bounds what fps gives; send fps with it, or num_frames instead";
        return fault("max_frames", |knobs| knobs.max_frames.is_some(), message.into());
    }
    if let (Some(start), Some(end)) = (start, end)
        && start >= end
    {
        let message = format!("end ({end}) must be after start ({start})");
        return fault("end", |knobs| knobs.end.is_some(), message);
    }
    Ok(FrameSampling { num_frames, fps, max_frames, start, end })
}

/// The value of a knob, the same in all places that have it.
fn same<T: PartialEq + Copy + Display>(
    name: &str,
    places: &[Placed],
    knob: impl Fn(&Knobs) -> Option<T>,
) -> Result<Option<T>, InvalidRequest> {
    let mut values = places.iter().filter_map(|(path, knobs)| Some((path, knob(knobs)?)));
    let Some((first_path, first)) = values.next() else { return Ok(None) };
    match values.find(|(_, value)| *value != first) {
        None => Ok(Some(first)),
        Some((path, value)) => Err(InvalidRequest::field(
            format!("{path}.{name}"),
            format!("{name} is {first} in {first_path} but {value} in {path}; send one of them"),
        )),
    }
}

impl Display for NumFrames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NumFrames::All => f.write_str("-1"),
            NumFrames::Count(count) => count.fmt(f),
        }
    }
}
