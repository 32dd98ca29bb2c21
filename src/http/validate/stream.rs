//! Checks of `stream_options`: usage and padding in the events of a stream.
//!
//! Called by `validate`.

use super::{InvalidRequest, refuse_unknown};
use crate::http::types::{ChatRequest, StreamOptions};

/// Checked `stream_options`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamExtras {
    /// Sends a last chunk of usage.
    pub usage: bool,
    /// Sends the usage so far with every chunk.
    pub running_usage: bool,
    /// Pads chunks, so that their sizes do not reveal the length of their text.
    pub obfuscation: bool,
}

/// Checks the options. Routers also send options that ask for nothing in requests without a stream:
/// these pass.
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
