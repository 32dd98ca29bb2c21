//! The wire form of responses: the object, its items, and the events of a stream.
//!
//! Filled by `mod.rs` and `output.rs`.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::{
    http::{choices::TokenLogprob, responses::Videos},
    telemetry::TokenCounts,
};

/// `POST /v1/responses`. Fields of OpenAI's object that can have one value only here are there for its clients.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ResponseObject {
    pub id: String,
    pub object: &'static str,
    pub created_at: u64,
    pub status: Status,
    pub background: bool,
    pub error: Option<ResponseError>,
    pub incomplete_details: Option<IncompleteDetails>,
    pub instructions: Option<String>,
    pub max_output_tokens: Option<u64>,
    pub max_tool_calls: Option<u64>,
    /// As it was sent.
    pub metadata: Map<String, Value>,
    pub model: String,
    pub output: Vec<Item>,
    pub parallel_tool_calls: bool,
    pub previous_response_id: Option<String>,
    pub reasoning: ReasoningEcho,
    pub service_tier: &'static str,
    /// Whether it can be read again and continued.
    pub store: bool,
    pub temperature: f32,
    /// As it was sent.
    pub text: Value,
    /// The request's `tool_choice`, unchanged.
    pub tool_choice: Value,
    /// The request's `tools`, unchanged.
    pub tools: Vec<Value>,
    pub top_logprobs: usize,
    pub top_p: f32,
    pub truncation: &'static str,
    pub usage: Option<ResponseUsage>,
    pub user: Option<String>,
    #[serde(flatten)]
    pub videos: Videos,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    InProgress,
    Completed,
    Incomplete,
    Failed,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ResponseError {
    pub code: &'static str,
    pub message: String,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct IncompleteDetails {
    pub reason: &'static str,
}

/// What was asked of the thinking. The summary is always the thinking itself.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct ReasoningEcho {
    pub effort: Option<String>,
    pub summary: Option<String>,
}

/// What a response cost.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ResponseUsage {
    pub input_tokens: usize,
    pub input_tokens_details: InputTokensDetails,
    pub output_tokens: usize,
    pub output_tokens_details: OutputTokensDetails,
    pub total_tokens: usize,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct InputTokensDetails {
    pub cached_tokens: usize,
    pub video_tokens: usize,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct OutputTokensDetails {
    pub reasoning_tokens: usize,
}

impl From<TokenCounts> for ResponseUsage {
    fn from(tokens: TokenCounts) -> Self {
        ResponseUsage {
            input_tokens: tokens.prompt,
            input_tokens_details: InputTokensDetails {
                cached_tokens: tokens.cached,
                video_tokens: tokens.video,
            },
            output_tokens: tokens.completion,
            output_tokens_details: OutputTokensDetails { reasoning_tokens: tokens.reasoning },
            total_tokens: tokens.prompt + tokens.completion,
        }
    }
}

/// A part of the output: thinking, the answer, or the call that it is.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Item {
    /// `summary` and `content` hold the same text: clients read one or the other.
    Reasoning {
        id: String,
        status: Status,
        summary: Vec<Part>,
        content: Vec<Part>,
        encrypted_content: Option<()>,
    },
    Message {
        id: String,
        status: Status,
        role: &'static str,
        content: Vec<Part>,
    },
    FunctionCall {
        id: String,
        status: Status,
        call_id: String,
        name: String,
        /// JSON
        arguments: String,
    },
}

/// A text of an item.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[expect(clippy::enum_variant_names, reason = "the names of the wire")]
pub enum Part {
    SummaryText {
        text: String,
    },
    ReasoningText {
        text: String,
    },
    /// `logprobs` are there if they are included.
    OutputText {
        text: String,
        annotations: Vec<Value>,
        logprobs: Vec<TokenLogprob>,
    },
}

/// An event of a stream; `sequence_number` counts them.
#[derive(Debug, Serialize, ToSchema)]
pub struct StreamEvent {
    /// As in `response.output_text.delta`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub sequence_number: usize,
    #[serde(flatten)]
    pub payload: Payload,
    /// Random text in events of text, with `include_obfuscation`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub obfuscation: Option<String>,
}

/// What an event tells, by its type.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Payload {
    Response {
        response: Box<ResponseObject>,
    },
    Item {
        output_index: usize,
        item: Item,
    },
    Part {
        #[serde(flatten)]
        at: At,
        part: Part,
    },
    Delta {
        #[serde(flatten)]
        at: At,
        delta: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        logprobs: Option<Vec<TokenLogprob>>,
    },
    Arguments {
        #[serde(flatten)]
        at: At,
        name: String,
        arguments: String,
    },
    Text {
        #[serde(flatten)]
        at: At,
        text: String,
        #[serde(skip_serializing_if = "Option::is_none")]
        logprobs: Option<Vec<TokenLogprob>>,
    },
}

/// Where in the output something belongs.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct At {
    pub item_id: String,
    pub output_index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub summary_index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_index: Option<usize>,
}

/// The answer to a deletion.
#[derive(Debug, Serialize, ToSchema)]
pub struct ResponseDeleted {
    pub id: String,
    pub object: &'static str,
    pub deleted: bool,
}
