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
use futures_util::{FutureExt, TryFutureExt};
use tempfile::NamedTempFile;

use super::{
    body,
    error::ApiError,
    generation::{Generation, finish_reason},
    pipeline::{self, Begun},
    record::RequestRecord,
    responses::{ChatCompletion, Choice, ReplyHead, ReplyMessage},
    sse,
    state::{AppState, Loaded},
    types::ChatRequest,
    validate::{self, Limits, ValidRequest},
};
use crate::output::Reply;

/// What the reply looks like.
struct Shape {
    stream: bool,
    /// Whether a stream ends with a chunk of usage.
    include_usage: bool,
    num_choices: usize,
    thinking: bool,
}

/// The handler.
///
/// # Errors
/// Everything that goes wrong before the first byte of the reply.
pub async fn completions(
    State(state): State<AppState>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let begun = pipeline::begin(&state, record.clone(), request, check).await?;
    let Begun { loaded, preparing, end_thinking, shape } = begun;
    let head = reply_head(&loaded, shape.stream);
    let num_thinking = if shape.thinking { shape.num_choices } else { 0 };
    let running = state.chats().enter([&head.id, &record.id], end_thinking, num_thinking);
    let preparing = preparing.map_ok(|generation| generation.listed(running)).boxed();
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
    let shape = Shape {
        stream: valid.stream,
        include_usage: valid.include_usage,
        num_choices: 1,
        thinking: valid.thinking,
    };
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
        video: generation.video.take(),
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
