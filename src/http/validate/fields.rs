//! Which top-level fields beyond those of [`super::super::types::ChatRequest`] are let through.
//!
//! Called by `validate`. A field is never silently ignored unless it cannot matter.

use serde_json::Value;

use super::{InvalidRequest, shorten};
use crate::http::types::Extra;

/// Sent by OpenAI's own clients; without effect on the reply's text.
pub const HARMLESS: [&str; 9] = [
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
];

/// Known to clients of this field, not built here: fine as long as they ask for nothing.
pub(super) const NOT_YET: [&str; 12] = [
    "audio",
    "function_call",
    "functions",
    "min_tokens",
    "mm_processor_kwargs",
    "modalities",
    "prediction",
    "prompt_logprobs",
    "tool_choice",
    "tools",
    "use_beam_search",
    "web_search_options",
];

/// Refuses what is unknown or not built yet.
///
/// # Errors
/// The first such field.
pub fn check_top_level(extra: &Extra) -> Result<(), InvalidRequest> {
    for (name, value) in extra {
        if HARMLESS.contains(&name.as_str()) || value.is_null() {
            continue;
        }
        if !NOT_YET.contains(&name.as_str()) {
            let name = shorten(name);
            return Err(InvalidRequest::field(&name, format!("unknown field \"{name}\"; remove it")));
        }
        if !asks_for_nothing(name, value) {
            let message = format!("\"{name}\" is not supported yet; remove it");
            return Err(InvalidRequest::field(name, message));
        }
    }
    Ok(())
}

/// Whether `value` is what the field means when it is left out.
fn asks_for_nothing(name: &str, value: &Value) -> bool {
    match (name, value) {
        ("min_tokens" | "prompt_logprobs", Value::Number(n)) => n.as_u64() == Some(0),
        ("tool_choice" | "function_call", Value::String(choice)) => choice == "none" || choice == "auto",
        ("modalities", Value::Array(kinds)) => kinds.iter().all(|kind| kind == "text"),
        (_, Value::Bool(asked)) => !asked,
        (_, Value::Array(list)) => list.is_empty(),
        (_, Value::Object(map)) => map.is_empty(),
        _ => false,
    }
}
