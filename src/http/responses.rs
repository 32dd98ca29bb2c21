//! The wire form of replies.
//!
//! Filled by `http/chat.rs`, `http/sse.rs` and `http/probes.rs`. Says nothing that is not in `openapi.yaml`.

use serde::Serialize;
use utoipa::ToSchema;

use super::{
    choices::{AnswerScores, Logprobs, Vote},
    state::ModelCard,
    tool_calls::{ToolCall, ToolCallDelta},
};
use crate::{config::ReasoningField, media::VideoInfo, output::Segment, telemetry::TokenCounts};

/// What all chunks of a reply, and the whole reply, have in common.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ReplyHead {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
}

/// The unary reply.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    #[serde(flatten)]
    pub head: ReplyHead,
    pub choices: Vec<Choice>,
    pub usage: Usage,
    #[serde(flatten)]
    pub videos: Videos,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vote: Option<Vote>,
}

/// What was sampled: `video` of one, `videos` of several, in the order of the request.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct Videos {
    #[serde(skip_serializing_if = "Option::is_none")]
    video: Option<VideoInfo>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    videos: Vec<VideoInfo>,
}

impl From<Vec<VideoInfo>> for Videos {
    fn from(mut videos: Vec<VideoInfo>) -> Self {
        match videos.len() {
            1 => Videos { video: videos.pop(), videos },
            _ => Videos { video: None, videos },
        }
    }
}

#[derive(Debug, Serialize, ToSchema)]
pub struct Choice {
    pub index: usize,
    pub message: ReplyMessage,
    pub logprobs: Option<Logprobs>,
    pub finish_reason: &'static str,
    #[serde(flatten)]
    pub answer: Option<AnswerScores>,
}

/// `reasoning` and `reasoning_content` hold the same text: clients read one or the other.
/// `reasoning_field` selects one of them.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReplyMessage {
    pub role: &'static str,
    /// Null where a function is called.
    pub content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// The call that the request asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<[ToolCall; 1]>,
    pub refusal: Option<()>,
}

/// One event of a stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct Chunk<'a> {
    #[serde(flatten)]
    pub head: &'a ReplyHead,
    /// Empty in the chunks of the vote and of usage.
    pub choices: Vec<ChunkChoice<'a>>,
    /// The last chunk has it with `include_usage`; every chunk has the usage so far with
    /// `continuous_usage_stats`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// In the first chunk.
    #[serde(flatten)]
    pub videos: Videos,
    /// In a chunk of its own, when all choices have ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vote: Option<Vote>,
    /// Random text with `include_obfuscation`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub obfuscation: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
pub struct ChunkChoice<'a> {
    pub index: usize,
    pub delta: Delta<'a>,
    pub logprobs: Option<Logprobs>,
    pub finish_reason: Option<&'static str>,
    /// With the finish reason.
    #[serde(flatten)]
    pub answer: Option<AnswerScores>,
}

impl<'a> ChunkChoice<'a> {
    /// Only text.
    pub fn of(index: usize, delta: Delta<'a>) -> Self {
        ChunkChoice { index, delta, logprobs: None, finish_reason: None, answer: None }
    }
}

/// Thinking, content, or a piece of a call, never two of them.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub segment: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<[ToolCallDelta; 1]>,
}

impl<'a> Delta<'a> {
    /// The first one of a stream.
    pub fn role() -> Self {
        Delta { role: Some("assistant"), content: Some(""), ..Delta::default() }
    }

    /// A piece of a call.
    pub fn call(piece: ToolCallDelta) -> Self {
        Delta { tool_calls: Some([piece]), segment: Some("answer"), ..Delta::default() }
    }

    /// More text; thinking in `field`. Text without tags is answer.
    pub fn text(segment: Segment, text: &'a str, field: ReasoningField) -> Self {
        match segment {
            Segment::Think => {
                let (reasoning_content, reasoning) = field.place(text);
                Delta { reasoning_content, reasoning, segment: Some("think"), ..Delta::default() }
            }
            Segment::Answer | Segment::Plain => {
                Delta { content: Some(text), segment: Some("answer"), ..Delta::default() }
            }
        }
    }
}

/// What a request cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptTokensDetails,
    pub completion_tokens_details: CompletionTokensDetails,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    pub cached_tokens: usize,
    pub video_tokens: usize,
    pub multimodal_tokens: MultimodalTokens,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct MultimodalTokens {
    pub video: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct CompletionTokensDetails {
    pub reasoning_tokens: usize,
}

impl From<TokenCounts> for Usage {
    fn from(tokens: TokenCounts) -> Self {
        Usage {
            prompt_tokens: tokens.prompt,
            completion_tokens: tokens.completion,
            total_tokens: tokens.prompt + tokens.completion,
            prompt_tokens_details: PromptTokensDetails {
                cached_tokens: tokens.cached,
                video_tokens: tokens.video,
                multimodal_tokens: MultimodalTokens { video: tokens.video },
            },
            completion_tokens_details: CompletionTokensDetails { reasoning_tokens: tokens.reasoning },
        }
    }
}

/// `GET /v1/models`
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList {
    pub object: &'static str,
    pub data: [Model; 1],
}

/// `GET /v1/models/{id}`
#[derive(Debug, Serialize, ToSchema)]
pub struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    max_model_len: usize,
    architecture: Architecture,
}

#[derive(Debug, Serialize, ToSchema)]
struct Architecture {
    input_modalities: [&'static str; 3],
    output_modalities: [&'static str; 1],
}

impl From<&ModelCard> for Model {
    fn from(card: &ModelCard) -> Self {
        Model {
            id: card.id.clone(),
            object: "model",
            created: card.created,
            owned_by: "tinyllava",
            max_model_len: card.max_model_len,
            architecture: Architecture {
                input_modalities: ["text", "video", "image"],
                output_modalities: ["text"],
            },
        }
    }
}
