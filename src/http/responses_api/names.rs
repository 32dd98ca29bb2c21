//! What is called otherwise here than in chat requests, and the way back for faults that are found there.
//!
//! Used by `request.rs`.

use serde_json::{Map, Value, json};

use crate::{
    engine::SubmitError,
    http::{error::ApiError, validate::InvalidRequest},
};

/// Chat's names and those of this endpoint; longer ones first.
const RENAMED: [(&str, &str); 4] = [
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("reasoning_effort", "reasoning.effort"),
    ("max_completion_tokens", "max_output_tokens"),
];

/// Where each message of the chat request was in this one.
#[derive(Debug)]
pub struct Origins(pub Vec<String>);

impl Origins {
    /// A fault of the chat request, in the terms of this one.
    pub fn fault(&self, error: InvalidRequest) -> InvalidRequest {
        let InvalidRequest::Field { param, mut message } = error else { return error };
        if let Some((chat, origin, _)) = self.find(&param) {
            message = message.replace(chat, origin);
        }
        for (chat, own) in RENAMED {
            message = message.replace(chat, own);
        }
        InvalidRequest::Field { param: self.path(&param), message }
    }

    /// A path in the chat request, in this one.
    pub fn path(&self, chat: &str) -> String {
        if let Some((_, origin, rest)) = self.find(chat) {
            // What is inside a text or a kept conversation has no path in this request.
            return if origin.ends_with(']') { format!("{origin}{rest}") } else { origin.into() };
        }
        if chat == "messages" {
            return "input".into();
        }
        let renamed = RENAMED.iter().find_map(|(chats, own)| {
            let rest = chat.strip_prefix(chats)?;
            (rest.is_empty() || rest.starts_with('.')).then(|| format!("{own}{rest}"))
        });
        renamed.unwrap_or_else(|| chat.into())
    }

    /// The message a path leads into: as chat requests name it, as it was sent, and the rest of the path.
    fn find<'a>(&'a self, path: &'a str) -> Option<(&'a str, &'a str, &'a str)> {
        let index = path.strip_prefix("messages[")?.split_once(']')?.0;
        let origin = self.0.get(index.parse::<usize>().ok()?)?;
        let (chat, rest) = path.split_at("messages[]".len() + index.len());
        Some((chat, origin, rest))
    }
}

/// A fault found after the request was checked, when nobody knows any more which endpoint it came to.
pub fn late_fault(error: ApiError) -> ApiError {
    let param = match &error {
        ApiError::Prompt(_) | ApiError::Submit(SubmitError::ContextLengthExceeded { .. }) => "input",
        ApiError::Submit(SubmitError::KvCacheTooSmall { .. }) => "max_output_tokens",
        ApiError::Invalid(InvalidRequest::Field { param, .. }) if param == "max_tokens" => {
            "max_output_tokens"
        }
        _ => return error,
    };
    ApiError::Renamed { param, error: Box::new(error) }
}

/// OpenAI's two endpoints differ in where a schema is.
pub fn response_format(mut format: Map<String, Value>) -> Value {
    if format.get("type").is_none_or(|kind| kind != "json_schema") {
        return format.into();
    }
    format.shift_remove("type");
    json!({"type": "json_schema", "json_schema": format})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt::PromptError;

    #[test]
    fn late_faults_have_the_names_of_this_endpoint() {
        let too_long = SubmitError::ContextLengthExceeded { prompt_tokens: 9, max_tokens: 9, context: 9 };
        let faults: [(ApiError, &str); 4] = [
            (PromptError::Empty.into(), "input"),
            (too_long.into(), "input"),
            (SubmitError::KvCacheTooSmall { needed: 2, total: 1 }.into(), "max_output_tokens"),
            (InvalidRequest::field("max_tokens", "no room").into(), "max_output_tokens"),
        ];
        for (error, own) in faults {
            let named = late_fault(error);
            assert!(matches!(named, ApiError::Renamed { param, .. } if param == own), "{named:?}");
        }
        assert!(matches!(late_fault(ApiError::Draining), ApiError::Draining));
    }

    #[test]
    fn paths_lead_back_to_what_was_sent() {
        let origins = Origins(["instructions", "input[0]", "input[2]"].map(String::from).into());
        for (chat, own) in [
            ("messages[2].content[1].video_url.url", "input[2].content[1].video_url.url"),
            ("messages[0].content", "instructions"),
            ("messages", "input"),
            ("max_completion_tokens", "max_output_tokens"),
            ("response_format.json_schema.schema", "text.format.schema"),
            ("response_format.type", "text.format.type"),
            ("reasoning_effort", "reasoning.effort"),
            ("temperature", "temperature"),
            ("messages[9].role", "messages[9].role"),
        ] {
            assert_eq!(origins.path(chat), own);
        }
        let fault = InvalidRequest::field("messages[1].odd", "unknown field \"odd\" in messages[1]");
        let expected = InvalidRequest::field("input[0].odd", "unknown field \"odd\" in input[0]");
        assert_eq!(origins.fault(fault), expected);
    }
}
