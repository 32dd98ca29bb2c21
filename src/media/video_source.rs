//! Where the video of a request comes from.
//!
//! Made by `http/validate`, read by `source.rs`. What a source may be is decided there, by the server's policy.

use std::path::PathBuf;

use bytes::Bytes;

use super::data_url::is_picture_list;

/// Where a video comes from. `http` has checked the form, this module checks the policy.
#[derive(Debug)]
pub enum VideoSource {
    /// `https:`, `http:`, `file:` or `data:`; `data:video/jpeg;base64,<picture>,<picture>,…` is a list of frames. A video or a
    /// picture: its first bytes say which.
    Url(String),
    /// Frames that the client sampled itself, in order, by URL. `fps` of their sampling is their own rate.
    Frames(Vec<String>),
    /// As [`VideoSource::Url`], from a part for pictures: a still is a video of one frame.
    Image(String),
    /// The bytes in base64.
    Base64(String),
    /// The bytes themselves (decoded base64, small uploads).
    Bytes(Bytes),
    /// An upload already on disk; removed when dropped.
    TempFile(tempfile::NamedTempFile),
    /// A file of the store, by its id.
    FileId(String),
    /// Media that the client calls `uuid`: `source`, which is kept under that name, or what was kept before.
    Named { uuid: String, source: Option<Box<VideoSource>> },
    /// A local file named by the operator on the command line (never by a client).
    LocalFile(PathBuf),
}

impl VideoSource {
    /// Whether it is the name of what an earlier request sent.
    pub fn was_sent_before(&self) -> bool {
        matches!(self, VideoSource::Named { source: None, .. })
    }

    /// Whether its frames were sampled by the client.
    pub fn is_frame_list(&self) -> bool {
        match self {
            VideoSource::Frames(_) => true,
            VideoSource::Url(url) | VideoSource::Image(url) => is_picture_list(url),
            VideoSource::Named { source: Some(source), .. } => source.is_frame_list(),
            _ => false,
        }
    }
}
