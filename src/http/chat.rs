//! `POST /v1/chat/completions`: reads the wire form of a chat request and shapes the reply.
//!
//! Everything in between is [`super::pipeline`], which other endpoints go through as well. The unary reply is a fold over
//! the events that a stream sends.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use tempfile::NamedTempFile;

use super::{
    body,
    error::ApiError,
    generation::{Generation, finish_reason},
    openapi::Refused,
    pipeline::{self, Begun},
    record::RequestRecord,
    responses::{ChatCompletion, Choice, Chunk, ReplyHead, ReplyMessage},
    sse,
    state::{AppState, Loaded},
    types::{ChatForm, ChatRequest},
    validate::{self, Limits, ValidRequest},
};
use crate::output::Reply;

/// What the reply looks like.
struct Shape {
    stream: bool,
    /// Whether a stream ends with a chunk of usage.
    include_usage: bool,
    num_choices: usize,
}

/// The handler.
///
/// # Errors
/// Everything that goes wrong before the first byte of the reply.
#[utoipa::path(post, path = "/v1/chat/completions", tag = "chat", operation_id = "createChatCompletion",
    summary = "Answer a conversation, with videos in it",
    request_body(content((ChatRequest = "application/json"), (ChatForm = "multipart/form-data"))),
    responses(
        (status = 200, description = "The reply. With `\"stream\": true` server-sent events: first a delta with the role, then deltas \
            of thinking (`reasoning_content` and `reasoning`, the same text), then deltas of `content`, then a chunk with \
            `finish_reason`, with `stream_options.include_usage` one with `usage`, and `data: [DONE]`. Comments keep the \
            connection alive while the video is fetched and decoded. An error after the first byte is an event with \
            `error`, and the end of the stream.",
            content((ChatCompletion = "application/json"), (Chunk = "text/event-stream"))),
        Refused))]
pub async fn completions(
    State(state): State<AppState>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let Begun { loaded, preparing, shape } = pipeline::begin(&state, record, request, check).await?;
    let head = reply_head(&loaded, shape.stream);
    if !shape.stream {
        return Ok(Json(fold(preparing.await?, head, shape).await?).into_response());
    }
    let interval = state.config().keep_alive_interval;
    let preparing = pipeline::settle(preparing, interval).await?;
    Ok(sse::reply(preparing, head, shape.include_usage, interval))
}

/// From bytes to a valid request.
fn check(
    json: &Bytes,
    upload: Option<NamedTempFile>,
    limits: Limits<'_>,
) -> Result<(ValidRequest, Shape), ApiError> {
    let request: ChatRequest = body::parse(json, limits.config.max_json_values)?;
    let valid = validate::validate(request, upload, limits)?;
    let shape = Shape { stream: valid.stream, include_usage: valid.include_usage, num_choices: 1 };
    Ok((valid, shape))
}

fn reply_head(loaded: &Loaded, stream: bool) -> ReplyHead {
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    ReplyHead {
        id: format!("chatcmpl-{}", uuid::Uuid::new_v4().simple()),
        object: if stream { "chat.completion.chunk" } else { "chat.completion" },
        created,
        model: loaded.model.id.clone(),
    }
}

/// The unary reply: the same events as a stream's, put together.
async fn fold(mut generation: Generation, head: ReplyHead, shape: Shape) -> Result<ChatCompletion, ApiError> {
    let mut replies = vec![Reply::default(); shape.num_choices];
    while let Some((index, event)) = generation.next().await? {
        replies[index].add(event);
    }
    Ok(ChatCompletion {
        head,
        choices: replies.into_iter().enumerate().map(choice).collect(),
        usage: generation.counts().into(),
        videos: std::mem::take(&mut generation.videos).into(),
    })
}

fn choice((index, reply): (usize, Reply)) -> Choice {
    let reasoning = (!reply.think.is_empty()).then_some(reply.think);
    let message = ReplyMessage {
        role: "assistant",
        content: reply.content,
        reasoning_content: reasoning.clone(),
        reasoning,
        refusal: None,
    };
    Choice { index, message, logprobs: None, finish_reason: finish_reason(reply.reason) }
}
