//! What a response gives back as it was sent, and how long that may be: it is held until long after the body is gone.
//!
//! Used by `request.rs`. What chat requests have too is limited where those are checked.

use serde_json::{Map, Value};

use super::request::TextOptions;
use crate::http::{
    types::Extra,
    validate::{InvalidRequest, refuse_unknown},
};

const MAX_USER_BYTES: usize = 512;
const MAX_METADATA: usize = 16;
const MAX_METADATA_KEY_CHARS: usize = 64;
const MAX_METADATA_VALUE_CHARS: usize = 512;
const MAX_TOOLS_BYTES: usize = 64 << 10;
const MAX_FORMAT_NAME_CHARS: usize = 64;
const MAX_FORMAT_DESCRIPTION_CHARS: usize = 1024;
const VERBOSITIES: [&str; 3] = ["low", "medium", "high"];

/// # Errors
/// When it is too long.
pub fn check_user(user: &str) -> Result<(), InvalidRequest> {
    if user.len() > MAX_USER_BYTES {
        let message = format!("user must have at most {MAX_USER_BYTES} bytes; send a shorter one");
        return Err(InvalidRequest::field("user", message));
    }
    Ok(())
}

/// # Errors
/// When there is too much of it, or what is no text.
pub fn check_metadata(metadata: &Map<String, Value>) -> Result<(), InvalidRequest> {
    let is_short = |(key, value): (&String, &Value)| {
        has_at_most(key, MAX_METADATA_KEY_CHARS)
            && value.as_str().is_some_and(|text| has_at_most(text, MAX_METADATA_VALUE_CHARS))
    };
    if metadata.len() > MAX_METADATA || !metadata.iter().all(is_short) {
        let message = format!(
            "metadata must be at most {MAX_METADATA} texts of at most {MAX_METADATA_VALUE_CHARS} characters, with names of at \
             most {MAX_METADATA_KEY_CHARS}"
        );
        return Err(InvalidRequest::field("metadata", message));
    }
    Ok(())
}

/// # Errors
/// Names the field that is unknown, too long, or not one of those there are.
pub fn check_text(text: &TextOptions) -> Result<(), InvalidRequest> {
    refuse_unknown(&text.extra, "text", &["format", "verbosity"])?;
    if text.verbosity.as_deref().is_some_and(|verbosity| !VERBOSITIES.contains(&verbosity)) {
        let message = format!("verbosity must be one of {}", VERBOSITIES.join(", "));
        return Err(InvalidRequest::field("text.verbosity", message));
    }
    let format = text.format.iter().flatten();
    for (name, value) in format {
        let max_chars = match name.as_str() {
            "name" => MAX_FORMAT_NAME_CHARS,
            "description" => MAX_FORMAT_DESCRIPTION_CHARS,
            _ => continue,
        };
        if value.as_str().is_some_and(|text| !has_at_most(text, max_chars)) {
            let path = format!("text.format.{name}");
            let message = format!("{path} must have at most {max_chars} characters; send a shorter one");
            return Err(InvalidRequest::field(path, message));
        }
    }
    Ok(())
}

/// # Errors
/// When `tools` and `tool_choice` are too long.
pub fn check_tools(extra: &Extra) -> Result<(), InvalidRequest> {
    for name in ["tools", "tool_choice"] {
        let num_bytes = extra.get(name).map_or(0, |value| value.to_string().len());
        if num_bytes > MAX_TOOLS_BYTES {
            let message = format!(
                "{name} has {num_bytes} bytes, but at most {MAX_TOOLS_BYTES} are allowed; send fewer or shorter ones"
            );
            return Err(InvalidRequest::field(name, message));
        }
    }
    Ok(())
}

fn has_at_most(text: &str, max_chars: usize) -> bool {
    text.chars().nth(max_chars).is_none()
}
