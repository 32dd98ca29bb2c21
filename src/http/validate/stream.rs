//! What the events of a stream carry beside the text of the reply.
//!
//! Called by `validate`.

use super::{InvalidRequest, refuse_unknown};
use crate::http::types::{ChatRequest, StreamOptions};

/// Checked `stream_options`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamExtras {
    /// Whether a chunk of usage comes last.
    pub usage: bool,
    /// Whether every chunk has the usage so far.
    pub running_usage: bool,
    /// Whether chunks are padded, so that their sizes do not tell how long their text is.
    pub obfuscation: bool,
}

/// Options that ask for nothing may also stand in a request without a stream: routers write them out.
pub fn validate(request: &ChatRequest) -> Result<StreamExtras, InvalidRequest> {
    let Some(options) = &request.stream_options else { return Ok(StreamExtras::default()) };
    let StreamOptions { include_usage, continuous_usage_stats, include_obfuscation, extra } = options;
    refuse_unknown(
        extra,
        "stream_options",
        &["include_usage", "continuous_usage_stats", "include_obfuscation"],
    )?;
    let extras = StreamExtras {
        usage: include_usage.unwrap_or(false),
        running_usage: continuous_usage_stats.unwrap_or(false),
        obfuscation: include_obfuscation.unwrap_or(false),
    };
    if request.stream != Some(true) && extras != StreamExtras::default() {
        return Err(InvalidRequest::field("stream_options", "stream_options needs \"stream\": true"));
    }
    Ok(extras)
}
