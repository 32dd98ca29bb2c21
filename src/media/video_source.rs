//! The sources of videos and pictures in a request.
//!
//! Made by `http/validate`, which has checked the form; `source.rs` checks the policy. Never opens
//! anything.

use std::path::PathBuf;

use bytes::Bytes;

use super::data_url::is_picture_list;

/// A source of one video, picture or list of frames.
#[derive(Debug)]
pub enum VideoSource {
    /// `https:`, `http:`, `file:` or `data:`. A video or a picture, as its first bytes say;
    /// `data:video/jpeg;base64,<picture>,<picture>,…` is a list of frames.
    Url(String),
    /// Frames that the client sampled itself, in order, by URL. `fps` of their sampling is their
    /// rate.
    Frames(Vec<String>),
    /// Frames that the client sampled itself, in order, some of them with a name.
    Pictures(Vec<Picture>),
    /// A list of frames with the presentation time of each: seconds, ascending.
    Timed(Box<VideoSource>, Vec<f64>),
    /// The same as [`VideoSource::Url`], from a part for pictures. A still is a video of one frame.
    Image(String),
    /// The bytes in base64.
    Base64(String),
    /// The bytes themselves (decoded base64, small uploads).
    Bytes(Bytes),
    /// An upload already on disk; removed when dropped.
    TempFile(tempfile::NamedTempFile),
    /// A file of the store, by its id.
    FileId(String),
    /// `source`, to be kept under the client's name `uuid`; without it, what was kept under that
    /// name.
    Named { uuid: String, source: Option<Box<VideoSource>> },
    /// A local file named by the operator on the command line (never by a client).
    LocalFile(PathBuf),
}

/// One frame of a list: a URL, whose picture is kept under `uuid` if there is one, or a `uuid`
/// alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    pub url: Option<String>,
    pub uuid: Option<String>,
}

impl VideoSource {
    /// Returns true if it, or a picture of it, only names what was sent before.
    pub fn was_sent_before(&self) -> bool {
        match self {
            VideoSource::Named { source, .. } => source.is_none(),
            VideoSource::Pictures(pictures) => pictures.iter().any(|picture| picture.url.is_none()),
            VideoSource::Timed(list, _) => list.was_sent_before(),
            _ => false,
        }
    }

    /// Returns true if the client sampled its frames.
    pub fn is_frame_list(&self) -> bool {
        match self {
            VideoSource::Frames(_) | VideoSource::Pictures(_) | VideoSource::Timed(..) => true,
            VideoSource::Url(url) | VideoSource::Image(url) => is_picture_list(url),
            VideoSource::Named { source: Some(source), .. } => source.is_frame_list(),
            _ => false,
        }
    }
}
