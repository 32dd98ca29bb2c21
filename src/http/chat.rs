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
    choices::ChoiceView,
    error::ApiError,
    generation::{Generation, finish_reason_of},
    openapi::Refused,
    pipeline::{self, Begun},
    record::RequestRecord,
    responses::{ChatCompletion, Choice, Chunk, ReplyHead, ReplyMessage},
    sse,
    state::{AppState, Loaded},
    tool_calls::CallReader,
    types::{ChatForm, ChatRequest},
    validate::{self, Limits, StreamExtras, ValidRequest},
};
use crate::{
    config::Config,
    output::{Answer, Reply},
    scheduler::StopReason,
};

/// What the reply looks like.
pub struct Shape {
    stream: bool,
    pub extras: StreamExtras,
    pub view: ChoiceView,
    /// Functions one of which the answer calls; empty: the answer is text.
    pub functions: Vec<String>,
    /// Choices that think before they answer.
    num_thinking: usize,
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
            of thinking (`reasoning_content` and `reasoning`, the same text, or the one that `reasoning_field` names), then deltas of \
            `content`, or of `tool_calls` if `tool_choice` asks for a call, then a chunk with \
            `finish_reason`, with `stream_options.include_usage` one with `usage`, and `data: [DONE]`. Chunks of several \
            choices mix; each has the index of its own, and with `vote` a chunk without choices follows the last of them. Comments keep the \
            connection alive while the video is fetched and decoded. An error after the first byte is an event with \
            `error`, and the end of the stream.",
            content((ChatCompletion = "application/json"), (Chunk = "text/event-stream"))),
        Refused))]
pub async fn completions(
    State(state): State<AppState>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let begun = pipeline::begin(&state, record.clone(), request, check).await?;
    let Begun { loaded, preparing, end_thinking, shape } = begun;
    let object = if shape.stream { "chat.completion.chunk" } else { "chat.completion" };
    let head = reply_head(&loaded, "chatcmpl", object);
    let running = state.chats().enter([&head.id, &record.id], end_thinking, shape.num_thinking);
    let preparing = preparing.map_ok(|generation| generation.listed(running)).boxed();
    if !shape.stream {
        return Ok(Json(fold(preparing.await?, head, &shape).await?).into_response());
    }
    let interval = state.config().keep_alive_interval;
    let preparing = pipeline::settle(preparing, interval).await?;
    Ok(sse::reply(preparing, head, shape, interval))
}

/// From bytes to a valid request.
fn check(
    json: &Bytes,
    upload: Option<NamedTempFile>,
    config: &Config,
    loaded: &Loaded,
) -> Result<(ValidRequest, Shape), ApiError> {
    let request: ChatRequest = body::parse(json, config.max_json_values)?;
    let valid = validate::validate(request, upload, Limits::new(config, loaded))?;
    let view = ChoiceView { wanted: valid.choices.clone(), tokenizer: loaded.tokenizer.clone() };
    let num_thinking = if valid.thinks() { valid.choices.count } else { 0 };
    let functions = valid.functions();
    let shape = Shape { stream: valid.stream, extras: valid.stream_extras, view, functions, num_thinking };
    Ok((valid, shape))
}

/// A new reply, of now.
pub fn reply_head(loaded: &Loaded, id_prefix: &str, object: &'static str) -> ReplyHead {
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    ReplyHead {
        id: format!("{id_prefix}-{}", uuid::Uuid::new_v4().simple()),
        object,
        created,
        model: loaded.model.id.clone(),
    }
}

/// The unary reply: the same events as a stream's, put together. The winner of a vote comes first.
async fn fold(
    mut generation: Generation,
    head: ReplyHead,
    shape: &Shape,
) -> Result<ChatCompletion, ApiError> {
    let mut replies = vec![Reply::default(); generation.num_choices()];
    while let Some((index, event)) = generation.next().await? {
        replies[index].add(event);
    }
    let answers: Vec<Answer> = replies.iter().map(|reply| reply.answer.clone()).collect();
    let vote = shape.view.vote(&answers);
    let choices = replies.into_iter().enumerate().map(|(index, reply)| choice(index, reply, shape));
    let mut choices: Vec<Choice> = choices.collect();
    if let Some(winner) = vote.as_ref().and_then(|vote| vote.winner) {
        choices[..=winner].rotate_right(1);
    }
    let (usage, videos) = (generation.counts().into(), std::mem::take(&mut generation.videos).into());
    Ok(ChatCompletion { head, choices, usage, videos, vote })
}

fn choice(index: usize, reply: Reply, shape: &Shape) -> Choice {
    let Shape { view, functions, .. } = shape;
    let thinking = (!reply.think.is_empty()).then_some(reply.think);
    let (reasoning_content, reasoning) =
        thinking.map(|text| view.wanted.reasoning_field.place(text)).unwrap_or_default();
    let is_whole = reply.reason == StopReason::EndOfSequence;
    let call = CallReader::read(functions, &reply.content, is_whole);
    let finish_reason = finish_reason_of(reply.reason, call.is_some());
    let message = ReplyMessage {
        role: "assistant",
        content: functions.is_empty().then_some(reply.content),
        reasoning_content,
        reasoning,
        tool_calls: call.map(|call| [call]),
        refusal: None,
    };
    Choice {
        index,
        message,
        logprobs: view.logprobs(&reply.tokens),
        finish_reason,
        answer: view.answer_scores(&reply.answer),
    }
}
