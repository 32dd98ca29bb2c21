//! The wire form of `POST /v1/responses`, and its translation to that of a chat request.
//!
//! Called by `mod.rs` through the pipeline. What both have in common is checked where chat requests are; faults found
//! there are named as the client knows them.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tempfile::NamedTempFile;
use utoipa::ToSchema;

use super::{
    echo,
    input::{InputItem, Messages},
    names::{Origins, response_format},
    objects::{ReasoningEcho, ResponseObject, Status},
    store::{KeptConversation, ResponseStore},
};
use crate::http::{
    body,
    error::ApiError,
    json_fault::JsonFault,
    responses::Videos,
    types::{ChatRequest, Extra, TextOr},
    validate::{self, InvalidRequest, Limits, ValidChoices, ValidRequest, refuse_unknown, shorten},
};

/// Fields of chat requests that mean the same here.
const AS_IN_CHAT: [&str; 26] = [
    "cache_salt",
    "chat_template_kwargs",
    "frequency_penalty",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "ignore_eos",
    "include_reasoning",
    "logit_bias",
    "max_thinking_tokens",
    "media_io_kwargs",
    "min_p",
    "min_tokens",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "structured_outputs",
    "thinking_token_budget",
    "timeout",
    "tool_choice",
    "tools",
    "top_k",
    "top_logprobs",
];
/// Includes the log probabilities of the answer's tokens.
const LOGPROBS: &str = "message.output_text.logprobs";
/// What may be included, because there is none of it or it is there anyway.
const INCLUDABLE: [&str; 7] = [
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
];

/// Body of `POST /v1/responses`. Fields of chat requests that say how to sample, think and read videos are accepted too.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ResponsesRequest {
    /// The served model; may be left out.
    model: Option<String>,
    /// A text, or a list of messages.
    #[schema(value_type = Value)]
    input: Option<TextOr<Vec<InputItem>>>,
    /// The system message; it does not stay for the responses that continue this one.
    instructions: Option<String>,
    /// Continues that response: its conversation, videos included, comes before `input`.
    previous_response_id: Option<String>,
    /// Whether the response can be read again and continued; true if left out.
    store: Option<bool>,
    stream: Option<bool>,
    stream_options: Option<ResponsesStreamOptions>,
    #[schema(minimum = 1)]
    max_output_tokens: Option<u64>,
    #[schema(minimum = 0, maximum = 2)]
    temperature: Option<f64>,
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f64>,
    reasoning: Option<ReasoningOptions>,
    text: Option<TextOptions>,
    include: Option<Vec<String>>,
    /// Returned with the response: up to 16 texts of up to 512 characters, with names of up to 64.
    metadata: Option<Map<String, Value>>,
    /// Returned with the response: up to 512 bytes.
    user: Option<String>,
    #[serde(flatten)]
    #[schema(ignore)]
    extra: Extra,
}

#[derive(Debug, Deserialize, ToSchema)]
pub struct ResponsesStreamOptions {
    /// Pads text events with random text in `obfuscation`, so that their sizes do not reveal the
    /// length of the text.
    include_obfuscation: Option<bool>,
    /// Without effect: the last event always has the usage.
    #[serde(rename = "include_usage")]
    _include_usage: Option<bool>,
    /// Only false: only the last event has the usage.
    continuous_usage_stats: Option<bool>,
    #[serde(flatten)]
    #[schema(ignore)]
    extra: Extra,
}

#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct ReasoningOptions {
    /// As `reasoning_effort` of chat requests.
    effort: Option<String>,
    /// auto, concise or detailed; the summary is the thinking itself in any case.
    summary: Option<String>,
    /// The same, as it was called before.
    generate_summary: Option<String>,
    #[serde(flatten)]
    #[schema(ignore)]
    extra: Extra,
}

#[derive(Debug, Deserialize, ToSchema)]
pub struct TextOptions {
    /// As `response_format` of chat requests, a `json_schema` without the object of that name around it.
    #[schema(value_type = Option<Value>)]
    pub format: Option<Map<String, Value>>,
    /// Without effect: low, medium or high.
    pub verbosity: Option<String>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub extra: Extra,
}

/// What the endpoint must know to answer.
#[derive(Debug)]
pub struct Shape {
    pub stream: bool,
    /// True if text events are padded.
    pub obfuscation: bool,
    /// The response as it is before there is any output.
    pub object: ResponseObject,
    /// What is wanted of the one choice.
    pub choices: ValidChoices,
    /// Functions one of which the answer calls; empty: the answer is text.
    pub functions: Vec<String>,
    /// What to keep with it; `None`: it is not to be kept.
    pub kept: Option<KeptConversation>,
}

/// From the JSON of a body to what is to be generated.
///
/// # Errors
/// The first fault found, with the field it is in.
pub fn check(
    json: &Bytes,
    upload: Option<NamedTempFile>,
    limits: Limits<'_>,
    store: &ResponseStore,
) -> Result<(ValidRequest, Shape), ApiError> {
    if upload.is_some() {
        let message = "this endpoint takes no uploads; send the file to /v1/files and name it by its id";
        return Err(InvalidRequest::field("video", message).into());
    }
    let mut request: ResponsesRequest = body::parse(json, limits.config.max_json_values)?;
    request.check_own()?;
    let mut messages = request.previous(store)?;
    let input = request.input.take();
    let missing =
        || InvalidRequest::field("input", "the request has no input; send a text or a list of messages");
    messages.push_input(input.ok_or_else(missing)?)?;
    let is_kept = request.store.unwrap_or(true);
    let kept = is_kept.then(|| keep(&messages.list, limits.config.responses.max_conversation_bytes));
    if let Some(instructions) = &request.instructions {
        messages.instruct(instructions);
    }
    let Messages { list, origins } = messages;
    let origins = Origins(origins);
    let tools = ToolsEcho {
        tools: request.extra.get("tools").and_then(Value::as_array).cloned().unwrap_or_default(),
        tool_choice: request.extra.get("tool_choice").filter(|choice| !choice.is_null()).cloned(),
    };
    let chat = Value::Object(request.chat_with(list));
    let chat: ChatRequest = serde_path_to_error::deserialize(chat)
        .map_err(|error| origins.fault(JsonFault::new(error).into()))?;
    let mut valid = validate::validate(chat, None, limits).map_err(|error| origins.fault(error))?;
    for video in &mut valid.videos {
        video.path = origins.path(&video.path);
        video.knobs_path = origins.path(&video.knobs_path);
    }
    if let Some(guided) = &mut valid.guided {
        guided.param = origins.path(&guided.param);
    }
    let obfuscation = request.stream_options.as_ref().and_then(|options| options.include_obfuscation);
    let object = tools.put_into(request.into_object(&valid, limits.model_id, is_kept));
    let (stream, choices, functions) = (valid.stream, valid.choices.clone(), valid.functions());
    let shape = Shape { stream, obfuscation: obfuscation.unwrap_or(false), object, choices, functions, kept };
    Ok((valid, shape))
}

/// The request's tools, which the response repeats.
struct ToolsEcho {
    tools: Vec<Value>,
    tool_choice: Option<Value>,
}

impl ToolsEcho {
    fn put_into(self, object: ResponseObject) -> ResponseObject {
        let tool_choice = self.tool_choice.unwrap_or(object.tool_choice);
        ResponseObject { tools: self.tools, tool_choice, ..object }
    }
}

/// What is kept of a conversation: its messages, unless they are too large.
fn keep(messages: &[Value], max_bytes: usize) -> KeptConversation {
    // Counted first: a video in base64 is not written out only to be thrown away.
    let num_bytes = messages.iter().map(text_bytes).sum();
    if num_bytes > max_bytes {
        return KeptConversation::TooLarge { num_bytes };
    }
    let messages = Value::Array(messages.to_vec()).to_string();
    KeptConversation::Whole { messages, reply: String::new() }
}

fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(list) => list.iter().map(text_bytes).sum(),
        Value::Object(map) => map.iter().map(|(name, value)| name.len() + text_bytes(value)).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
    }
}

impl ResponsesRequest {
    /// The conversation that is continued.
    fn previous(&self, store: &ResponseStore) -> Result<Messages, InvalidRequest> {
        let mut messages = Messages::default();
        let Some(id) = &self.previous_response_id else { return Ok(messages) };
        let fault = |message| InvalidRequest::field("previous_response_id", message);
        let response = store.get(id).ok_or_else(|| {
            let id = shorten(id);
            fault(format!(
                "there is no response \"{id}\": it was not stored, was deleted or is too old; send the whole conversation \
                 as input"
            ))
        })?;
        match &response.conversation {
            KeptConversation::TooLarge { num_bytes } => Err(fault(format!(
                "the conversation of that response has {num_bytes} bytes, too many to be kept; upload its video to \
                 /v1/files and name it by its id, or send the whole conversation as input"
            ))),
            KeptConversation::Whole { messages: list, reply } => {
                let list: Vec<Value> =
                    serde_json::from_str(list).expect("kept messages are JSON: this is a bug");
                list.into_iter().for_each(|message| messages.push(message, "previous_response_id"));
                messages.push(json!({"role": "assistant", "content": reply}), "previous_response_id");
                Ok(messages)
            }
        }
    }

    /// Fields that chat requests do not have.
    fn check_own(&self) -> Result<(), InvalidRequest> {
        if self.extra.get("max_tokens").is_some_and(|value| !value.is_null()) {
            let message = "max_tokens is called max_output_tokens here; rename it";
            return Err(InvalidRequest::field("max_output_tokens", message));
        }
        validate::check_beside(&self.extra, &AS_IN_CHAT)?;
        if let Some(options) = &self.stream_options {
            refuse_unknown(&options.extra, "stream_options", &["include_obfuscation", "include_usage"])?;
            if options.continuous_usage_stats == Some(true) {
                let message =
                    "only the last event has the usage; send false or leave continuous_usage_stats out";
                return Err(InvalidRequest::field("stream_options.continuous_usage_stats", message));
            }
        }
        if let Some(reasoning) = &self.reasoning {
            refuse_unknown(&reasoning.extra, "reasoning", &["effort", "summary"])?;
            let summary = reasoning.summary.as_ref().or(reasoning.generate_summary.as_ref());
            if summary.is_some_and(|summary| !["auto", "concise", "detailed"].contains(&summary.as_str())) {
                let message = "summary must be one of auto, concise, detailed";
                return Err(InvalidRequest::field("reasoning.summary", message));
            }
        }
        if let Some(text) = &self.text {
            echo::check_text(text)?;
        }
        echo::check_tools(&self.extra)?;
        let include = self
            .include
            .iter()
            .flatten()
            .find(|name| *name != LOGPROBS && !INCLUDABLE.contains(&name.as_str()));
        if let Some(name) = include {
            let message = format!("\"{}\" cannot be included; leave it out", shorten(name));
            return Err(InvalidRequest::field("include", message));
        }
        self.user.as_deref().map_or(Ok(()), echo::check_user)?;
        self.metadata.as_ref().map_or(Ok(()), echo::check_metadata)
    }

    /// The same request to the chat endpoint.
    fn chat_with(&mut self, messages: Vec<Value>) -> Map<String, Value> {
        let mut chat: Map<String, Value> = std::mem::take(&mut self.extra)
            .into_iter()
            .filter(|(name, _)| AS_IN_CHAT.contains(&name.as_str()))
            .collect();
        let top_logprobs = chat.get("top_logprobs").and_then(Value::as_u64).unwrap_or(0);
        let logprobs = top_logprobs > 0 || self.include.iter().flatten().any(|name| name == LOGPROBS);
        let format = self.text.as_ref().and_then(|text| text.format.clone()).map(response_format);
        let effort = self.reasoning.as_ref().and_then(|reasoning| reasoning.effort.clone());
        for (name, value) in [
            ("messages", Value::Array(messages)),
            ("model", json!(self.model)),
            ("stream", json!(self.stream)),
            ("temperature", json!(self.temperature)),
            ("top_p", json!(self.top_p)),
            ("max_completion_tokens", json!(self.max_output_tokens)),
            ("logprobs", json!(logprobs)),
            ("reasoning_effort", json!(effort)),
            ("response_format", json!(format)),
        ] {
            chat.insert(name.into(), value);
        }
        chat
    }

    /// The response before there is any output. Id and time are the handler's to fill in.
    fn into_object(self, valid: &ValidRequest, model_id: &str, store: bool) -> ResponseObject {
        let reasoning = self.reasoning.unwrap_or_default();
        let text = self.text.map(|text| {
            let format = text.format.map_or_else(|| json!({"type": "text"}), Value::Object);
            json!({"format": format, "verbosity": text.verbosity.as_deref().unwrap_or("medium")})
        });
        ResponseObject {
            id: String::new(),
            object: "response",
            created_at: 0,
            status: Status::InProgress,
            background: false,
            error: None,
            incomplete_details: None,
            instructions: self.instructions,
            max_output_tokens: self.max_output_tokens,
            max_tool_calls: None,
            metadata: self.metadata.unwrap_or_default(),
            model: model_id.into(),
            output: vec![],
            parallel_tool_calls: true,
            previous_response_id: self.previous_response_id,
            reasoning: ReasoningEcho {
                effort: reasoning.effort,
                summary: reasoning.summary.or(reasoning.generate_summary),
            },
            service_tier: "default",
            store,
            temperature: valid.sampling.params.temperature,
            text: text.unwrap_or_else(|| json!({"format": {"type": "text"}, "verbosity": "medium"})),
            tool_choice: "auto".into(),
            tools: vec![],
            top_logprobs: valid.sampling.params.top_logprobs.unwrap_or(0),
            top_p: valid.sampling.params.top_p,
            truncation: "disabled",
            usage: None,
            user: self.user,
            videos: Videos::default(),
        }
    }
}

#[cfg(test)]
mod tests;
