//! One content part: its text, or where its video comes from.
//!
//! Called by `messages.rs`. Every form that clients of the big servers send ends in the same [`VideoSource`].

use serde_json::Value;

use super::{InvalidRequest, fields, refuse_unknown, shorten};
use crate::{
    http::types::{
        ContentPart, FilePart, ImageUrl, InputVideo, ListedFrame, SamplingKnobs, TextOr, VideoUrl,
    },
    media::VideoSource,
};

/// Longest URL that is not `data:` (which the body limit bounds).
const MAX_URL_BYTES: usize = 8 << 10;
/// Longest scheme of a URL that is known.
const MAX_SCHEME_BYTES: usize = 5;
/// Bytes of a text that may be a URL or base64 in which a colon is looked for.
const MAX_ANY_SCHEME_BYTES: usize = 32;
/// Longest `uuid` of a part.
const MAX_UUID_BYTES: usize = 256;
/// Longest `file_id`.
const MAX_FILE_ID_BYTES: usize = 128;

/// What a part is.
#[derive(Debug)]
pub enum Part {
    Text(String),
    Video(VideoPart),
}

/// A video or a still, and where it stood.
#[derive(Debug)]
pub struct VideoPart {
    /// As in `messages[0].content[1].video_url`.
    pub path: String,
    /// The field that names the source, or would.
    pub source_path: String,
    /// `None`: the upload, or what was sent under `uuid` before.
    pub source: Option<VideoSource>,
    /// The client's name for it.
    pub uuid: Option<String>,
    /// Knobs and the paths of the objects they are in.
    pub knobs: Vec<(String, SamplingKnobs)>,
    /// Presentation times of the frames of a list, and the path of their field.
    pub timestamps: Option<(String, Vec<f64>)>,
    /// True for consecutive pictures of a message.
    pub is_clip: bool,
}

/// Reads a part of any known form.
pub fn read(path: &str, mut part: ContentPart) -> Result<Part, InvalidRequest> {
    take_text(&mut part);
    check_one_source(path, &part)?;
    let mut beside = part.take_knobs();
    fields::remove_ignored_of_part(&mut beside.extra);
    let mut timestamps = part.timestamps.take().map(|times| (format!("{path}.timestamps"), times));
    let kind = part.kind.as_str();
    if kind == "text" {
        refuse_unknown(&beside.extra, path, &["type", "text"])?;
        refuse_knobs(path, kind, &beside, timestamps.is_some())?;
        let missing = || InvalidRequest::field(format!("{path}.text"), "the part has no text");
        return part.text.map(Part::Text).ok_or_else(missing);
    }
    let mut uuid = Uuid::default();
    uuid.add(path, part.uuid.take())?;
    let own = format!("{path}.{kind}");
    let mut knobs = vec![];
    let (source_path, source) = match kind {
        "video_url" => {
            let mut video = match part.video_url {
                None => VideoUrl::default(),
                Some(TextOr::Text(url)) => VideoUrl { url: Some(url), ..VideoUrl::default() },
                Some(TextOr::Other(video)) => video,
            };
            let in_it = video.take_knobs();
            if let Some(times) = video.timestamps.take() {
                if timestamps.is_some() {
                    let message = "timestamps are sent twice; send them once";
                    return Err(InvalidRequest::field(format!("{path}.timestamps"), message));
                }
                timestamps = Some((format!("{own}.timestamps"), times));
            }
            refuse_unknown(
                &in_it.extra,
                &own,
                &["url", "uuid", "num_frames", "fps", "max_frames", "start", "end"],
            )?;
            uuid.add(&own, video.uuid)?;
            knobs.push((own.clone(), in_it));
            let source_path = format!("{own}.url");
            let source = video.url.map(|url| check_url(&source_path, url)).transpose()?.map(VideoSource::Url);
            (source_path, source)
        }
        "input_video" => part
            .input_video
            .map_or_else(|| Ok((own.clone(), None)), |video| input_video(&own, video, &mut uuid))?,
        "video" => (own.clone(), part.video.map(|video| qwen_video(&own, video)).transpose()?),
        "file" => part.file.map_or_else(|| Ok((own.clone(), None)), |file| self::file(&own, file))?,
        "image_url" => {
            refuse_knobs(path, kind, &beside, timestamps.is_some())?;
            let url = part.image_url.map(|image| image_url(&own, image, &mut uuid)).transpose()?.flatten();
            if url.is_none() && uuid.0.is_none() {
                return Err(InvalidRequest::field(format!("{own}.url"), "the picture has no URL"));
            }
            (format!("{own}.url"), url.map(VideoSource::Image))
        }
        kind => return Err(unknown_kind(path, kind)),
    };
    refuse_unknown(
        &beside.extra,
        path,
        &["type", kind, "uuid", "num_frames", "fps", "max_frames", "start", "end"],
    )?;
    knobs.push((path.to_owned(), beside));
    let uuid = uuid.0;
    Ok(Part::Video(VideoPart { path: own, source_path, source, uuid, knobs, timestamps, is_clip: false }))
}

fn unknown_kind(path: &str, kind: &str) -> InvalidRequest {
    let message = match kind {
        "input_audio" | "audio_url" | "audio" => {
            "the model cannot hear; leave sound out and send what was said as text".to_owned()
        }
        kind => format!(
            "content parts of type \"{}\" are not supported; use text, video_url, input_video, video, file or \
             image_url",
            shorten(kind)
        ),
    };
    InvalidRequest::field(format!("{path}.type"), message)
}

/// The client's name for a part: a field of the part or of the object that holds the source.
#[derive(Default)]
struct Uuid(Option<String>);

impl Uuid {
    fn add(&mut self, path: &str, uuid: Option<String>) -> Result<(), InvalidRequest> {
        let Some(uuid) = uuid else { return Ok(()) };
        let fault = |message: String| Err(InvalidRequest::field(format!("{path}.uuid"), message));
        if !(1..=MAX_UUID_BYTES).contains(&uuid.len()) {
            return fault(format!("uuid must have 1 to {MAX_UUID_BYTES} bytes"));
        }
        if self.0.as_ref().is_some_and(|other| *other != uuid) {
            return fault("there are two different uuids for one part; send one".into());
        }
        self.0 = Some(uuid);
        Ok(())
    }
}

/// Turns the other parts with text, those of `/v1/responses` and refusals, into parts of type
/// `text`.
fn take_text(part: &mut ContentPart) {
    match part.kind.as_str() {
        "input_text" | "output_text" => part.kind = "text".into(),
        "refusal" => {
            let Some(Value::String(refusal)) = part.extra.shift_remove("refusal") else { return };
            part.text.get_or_insert(refusal);
            part.kind = "text".into();
        }
        _ => {}
    }
}

/// Only the field of the part's own type may be there.
fn check_one_source(path: &str, part: &ContentPart) -> Result<(), InvalidRequest> {
    let fields = [
        ("text", part.text.is_some()),
        ("video_url", part.video_url.is_some()),
        ("input_video", part.input_video.is_some()),
        ("video", part.video.is_some()),
        ("file", part.file.is_some()),
        ("image_url", part.image_url.is_some()),
    ];
    match fields.iter().find(|(name, there)| *there && *name != part.kind) {
        None => Ok(()),
        Some((name, _)) => {
            let kind = shorten(&part.kind);
            let message =
                format!("a part of type \"{kind}\" cannot have the field \"{name}\"; send a part for each");
            Err(InvalidRequest::field(format!("{path}.{name}"), message))
        }
    }
}

fn refuse_knobs(
    path: &str,
    kind: &str,
    knobs: &SamplingKnobs,
    has_timestamps: bool,
) -> Result<(), InvalidRequest> {
    let SamplingKnobs { num_frames, fps, max_frames, start, end, .. } = knobs;
    let there = [
        ("num_frames", num_frames.is_some()),
        ("fps", fps.is_some()),
        ("max_frames", max_frames.is_some()),
        ("start", start.is_some()),
        ("end", end.is_some()),
        ("timestamps", has_timestamps),
    ];
    match there.iter().find(|(_, there)| *there) {
        None => Ok(()),
        Some((name, _)) => Err(InvalidRequest::field(
            format!("{path}.{name}"),
            format!("a part of type \"{kind}\" has no frames to sample; remove {name}"),
        )),
    }
}

type Sourced = (String, Option<VideoSource>);

fn input_video(path: &str, video: TextOr<InputVideo>, uuid: &mut Uuid) -> Result<Sourced, InvalidRequest> {
    let video = match video {
        TextOr::Text(text) => return Ok((path.to_owned(), Some(url_or_bytes(path, text)?))),
        TextOr::Other(video) => video,
    };
    refuse_unknown(&video.extra, path, &["url", "data", "format", "uuid"])?;
    uuid.add(path, video.uuid)?;
    match (video.url, video.data) {
        (Some(_), Some(_)) => Err(two_sources(format!("{path}.data"), "url", "data")),
        (Some(url), None) => {
            let path = format!("{path}.url");
            Ok((path.clone(), Some(VideoSource::Url(check_url(&path, url)?))))
        }
        (None, Some(data)) => Ok((format!("{path}.data"), Some(bytes(data)))),
        (None, None) => Ok((path.to_owned(), None)),
    }
}

fn qwen_video(path: &str, video: TextOr<Vec<TextOr<ListedFrame>>>) -> Result<VideoSource, InvalidRequest> {
    match video {
        TextOr::Text(url) => check_url(path, url).map(VideoSource::Url),
        TextOr::Other(urls) if urls.is_empty() => {
            Err(InvalidRequest::field(path, "the list has no frames; send the URL of each"))
        }
        TextOr::Other(frames) => {
            let frames = frames.into_iter().enumerate();
            let urls = frames.map(|(i, frame)| listed_frame(&format!("{path}[{i}]"), frame));
            Ok(VideoSource::Frames(urls.collect::<Result<_, _>>()?))
        }
    }
}

/// Returns the URL of a frame in a list.
fn listed_frame(path: &str, frame: TextOr<ListedFrame>) -> Result<String, InvalidRequest> {
    let frame = match frame {
        TextOr::Text(url) => return check_url(path, url),
        TextOr::Other(frame) => frame,
    };
    refuse_unknown(&frame.extra, path, &["type", "image_url"])?;
    if frame.kind.is_some_and(|kind| kind != "image_url") {
        let message = "a frame of a list must be a URL or a part of type image_url";
        return Err(InvalidRequest::field(format!("{path}.type"), message));
    }
    let own = format!("{path}.image_url");
    let mut uuid = Uuid::default();
    let url = frame.image_url.map(|image| image_url(&own, image, &mut uuid)).transpose()?.flatten();
    if uuid.0.is_some() {
        let message =
            "a frame of a list has no uuid; give one to the part, or send the frames as image_url parts";
        return Err(InvalidRequest::field(format!("{own}.uuid"), message));
    }
    url.ok_or_else(|| InvalidRequest::field(&own, "the frame has no picture; send its URL"))
}

fn file(path: &str, file: FilePart) -> Result<Sourced, InvalidRequest> {
    refuse_unknown(&file.extra, path, &["file_id", "file_data", "filename"])?;
    match (file.file_id, file.file_data) {
        (Some(_), Some(_)) => Err(two_sources(format!("{path}.file_data"), "file_id", "file_data")),
        (Some(id), None) if id.is_empty() || id.len() > MAX_FILE_ID_BYTES => Err(InvalidRequest::field(
            format!("{path}.file_id"),
            "this is no id of a file; send one that POST /v1/files gave",
        )),
        (Some(id), None) => Ok((format!("{path}.file_id"), Some(VideoSource::FileId(id)))),
        (None, Some(data)) => Ok((format!("{path}.file_data"), Some(bytes(data)))),
        (None, None) => Ok((path.to_owned(), None)),
    }
}

fn image_url(path: &str, image: TextOr<ImageUrl>, uuid: &mut Uuid) -> Result<Option<String>, InvalidRequest> {
    let url = match image {
        TextOr::Text(url) => Some(url),
        TextOr::Other(image) => {
            refuse_unknown(&image.extra, path, &["url", "detail", "uuid"])?;
            if image.detail.is_some_and(|detail| !matches!(detail.as_str(), "auto" | "low" | "high")) {
                return Err(InvalidRequest::field(
                    format!("{path}.detail"),
                    "detail must be auto, low or high",
                ));
            }
            uuid.add(path, image.uuid)?;
            image.url
        }
    };
    url.map(|url| check_url(&format!("{path}.url"), url)).transpose()
}

/// A URL of any scheme, or bare base64, which has no colon.
fn url_or_bytes(path: &str, text: String) -> Result<VideoSource, InvalidRequest> {
    let start = &text.as_bytes()[..text.len().min(MAX_ANY_SCHEME_BYTES)];
    if start.contains(&b':') { check_url(path, text).map(VideoSource::Url) } else { Ok(bytes(text)) }
}

/// Bare base64, or a `data:` URL.
fn bytes(data: String) -> VideoSource {
    match data.get(..MAX_SCHEME_BYTES) {
        Some(scheme) if scheme.eq_ignore_ascii_case("data:") => VideoSource::Url(data),
        _ => VideoSource::Base64(data),
    }
}

fn two_sources(path: String, one: &str, other: &str) -> InvalidRequest {
    InvalidRequest::field(path, format!("there are two sources for one video, {one} and {other}; send one"))
}

/// Scheme and length only. Whether a URL may be fetched is for [`crate::media`] to say.
fn check_url(param: &str, url: String) -> Result<String, InvalidRequest> {
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
