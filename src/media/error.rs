//! Why a video could not be used.
//!
//! The errors of the whole media stage. Nothing here knows of HTTP.

/// Why a video could not be used. Every message is one sentence for the client that says what to do.
/// `http/error.rs` maps the variants to status codes.
#[derive(Debug, Clone, thiserror::Error)]
pub enum MediaError {
    /// 400: the URL or sampling is refused by policy or form; `param` names the field.
    #[error("{message}")]
    Refused { param: &'static str, message: String },
    /// 404: no media has this name, for this key and salt.
    #[error(
        "no media is kept under the uuid \"{uuid}\" (any more); send it again together with its URL or data"
    )]
    NotFound { uuid: String },
    /// 422: the download failed upstream.
    #[error("{0}")]
    FetchFailed(String),
    /// 413.
    #[error("the video is larger than the limit of {max_video_bytes} bytes; send a shorter or smaller one")]
    TooManyBytes { max_video_bytes: usize },
    /// 415: not an allowed container or codec.
    #[error("{0}")]
    Unsupported(String),
    /// 422: undecodable, no video stream, too long, too large.
    #[error("{0}")]
    Undecodable(String),
    /// 422: the decoder ran over its time.
    #[error("decoding took longer than {seconds} s; send a shorter or smaller video")]
    DecodeTimeout { seconds: u64 },
    /// 500: ffmpeg is missing or could not start, the disk is full...
    #[error("{0}")]
    Internal(String),
}

impl MediaError {
    /// Short label for the error metric.
    pub fn reason(&self) -> &'static str {
        match self {
            MediaError::Refused { .. } => "refused",
            MediaError::NotFound { .. } => "not_found",
            MediaError::FetchFailed(_) => "fetch_failed",
            MediaError::TooManyBytes { .. } => "too_many_bytes",
            MediaError::Unsupported(_) => "unsupported",
            MediaError::Undecodable(_) => "undecodable",
            MediaError::DecodeTimeout { .. } => "decode_timeout",
            MediaError::Internal(_) => "internal",
        }
    }
}
