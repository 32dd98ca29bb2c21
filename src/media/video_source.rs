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

impl VideoSource {
    /// Returns true if it only names what was sent before.
    pub fn was_sent_before(&self) -> bool {
        matches!(self, VideoSource::Named { source: None, .. })
    }

    /// Returns true if the client sampled its frames.
    pub fn is_frame_list(&self) -> bool {
        match self {
            VideoSource::Frames(_) => true,
            VideoSource::Url(url) | VideoSource::Image(url) => is_picture_list(url),
            VideoSource::Named { source: Some(source), .. } => source.is_frame_list(),
            _ => false,
        }
    }
}
