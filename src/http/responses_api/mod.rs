//! `/v1/responses`: OpenAI's newer form of the same questions, with a memory of what was answered.
//!
//! Handlers of the router. A request is translated to a chat request and goes the same way (`http/pipeline.rs`); here
//! its output is told in items and events, and kept for a while.

mod call;
mod echo;
mod input;
mod names;
mod objects;
mod output;
mod request;
mod store;

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    Extension, Json,
    extract::{Path, RawQuery, Request, State, rejection::PathRejection},
    http::header,
    response::{IntoResponse, Response},
};
use futures_util::{FutureExt, TryFutureExt};

pub use objects::{ResponseDeleted, ResponseObject, StreamEvent};
pub use request::ResponsesRequest;
pub use store::ResponseStore;

use self::{
    objects::{IncompleteDetails, Payload, ResponseError, Status},
    output::{Output, Told},
    request::Shape,
    store::{KeptConversation, KeptResponse},
};
use super::{
    choices::ChoiceView,
    error::ApiError,
    generation::Generation,
    openapi::{NotReady, Refused},
    pipeline::{self, Begun, Preparing},
    record::RequestRecord,
    sse::{self, EventSink},
    state::AppState,
    validate::{InvalidRequest, Limits},
};
use crate::scheduler::StopReason;

/// `POST /v1/responses`
///
/// # Errors
/// Everything that goes wrong before the first byte of the reply.
#[utoipa::path(post, path = "/v1/responses", tag = "responses", operation_id = "createResponse",
    summary = "Answer a conversation, in OpenAI's form of responses",
    request_body = ResponsesRequest,
    responses(
        (status = 200, description = "The response: an item of `reasoning` (the thinking, as summary and as content) and an item \
            of `message` (the answer) or of `function_call`, if `tool_choice` asks for one. With `\"stream\": true` server-sent events from `response.created` to \
            `response.completed`, `response.incomplete` or `response.failed`.",
            content((ResponseObject = "application/json"), (StreamEvent = "text/event-stream"))),
        Refused))]
pub async fn create(
    State(state): State<AppState>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let store = state.responses().clone();
    let begun = pipeline::begin(&state, record, request, move |json, upload, config, loaded| {
        request::check(json, upload, Limits::new(config, loaded), &store)
    });
    let Begun { preparing, loaded, mut shape, .. } = begun.await.map_err(names::late_fault)?;
    let preparing = preparing.map_err(names::late_fault).boxed();
    shape.object.id = format!("resp_{}", uuid::Uuid::new_v4().simple());
    let created = SystemTime::now().duration_since(UNIX_EPOCH);
    shape.object.created_at = created.map_or(0, |since| since.as_secs());
    let view = ChoiceView { wanted: shape.choices.clone(), tokenizer: loaded.tokenizer.clone() };
    let output = Output::new(view, std::mem::take(&mut shape.functions));
    let store = state.responses().clone();
    if !shape.stream {
        return Ok(Json(fold(preparing.await?, output, shape, &store).await?).into_response());
    }
    let interval = state.config().keep_alive_interval;
    let preparing = pipeline::settle(preparing, interval).await?;
    Ok(sse::respond(interval, |events| {
        Writer { events, num_events: 0, obfuscation: shape.obfuscation }
            .write(preparing, output, shape, store)
    }))
}

/// `GET /v1/responses/{id}`
///
/// # Errors
/// 404 when there is no such response; 400 for a stream of it.
#[utoipa::path(get, path = "/v1/responses/{id}", tag = "responses", operation_id = "getResponse",
    summary = "A response that was stored", params(("id" = String, Path)),
    responses((status = 200, description = "The response.", body = ResponseObject), Refused))]
pub async fn get(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    if query.is_some_and(|query| !query.is_empty()) {
        let message = "a stored response is given whole, and never as a stream; leave the query out";
        return Err(InvalidRequest::field("query", message).into());
    }
    let Path(id) = id.map_err(|_| ApiError::NoSuchRoute)?;
    let kept = state.responses().get(&id).ok_or_else(|| unknown(&id))?;
    Ok(([(header::CONTENT_TYPE, "application/json")], kept.object.clone()).into_response())
}

/// `DELETE /v1/responses/{id}`
///
/// # Errors
/// 404 when there is no such response.
#[utoipa::path(delete, path = "/v1/responses/{id}", tag = "responses", operation_id = "deleteResponse",
    summary = "Forget a response", params(("id" = String, Path)),
    responses((status = 200, description = "It is gone.", body = ResponseDeleted), NotReady))]
pub async fn delete(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<ResponseDeleted>, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::NoSuchRoute)?;
    if !state.responses().delete(&id) {
        return Err(unknown(&id));
    }
    Ok(Json(ResponseDeleted { id, object: "response", deleted: true }))
}

fn unknown(id: &str) -> ApiError {
    ApiError::UnknownResponse { id: id.chars().take(64).collect() }
}

/// The unary reply: the same events as a stream's, put together.
async fn fold(
    mut generation: Generation,
    mut output: Output,
    shape: Shape,
    store: &ResponseStore,
) -> Result<ResponseObject, ApiError> {
    while let Some((_, event)) = generation.next().await? {
        output.take(event);
    }
    Ok(finish(output, &mut generation, shape, store))
}

/// The whole response, which is kept if it was asked for.
fn finish(
    output: Output,
    generation: &mut Generation,
    shape: Shape,
    store: &ResponseStore,
) -> ResponseObject {
    let Shape { mut object, kept, .. } = shape;
    let is_cut = output.reason() == StopReason::Length;
    object.status = if is_cut { Status::Incomplete } else { Status::Completed };
    object.incomplete_details = is_cut.then_some(IncompleteDetails { reason: "max_output_tokens" });
    object.usage = Some(generation.counts().into());
    object.videos = std::mem::take(&mut generation.videos).into();
    let (items, answer) = output.into_items();
    object.output = items;
    if let Some(mut conversation) = kept {
        if let KeptConversation::Whole { reply, .. } = &mut conversation {
            *reply = answer;
        }
        let json = serde_json::to_string(&object).expect("wire types are JSON: this is a bug");
        // Said as it is when there is no room for one so large.
        object.store = store.put(object.id.clone(), KeptResponse { object: json, conversation });
    }
    object
}

/// Numbers events and sends them.
struct Writer {
    events: EventSink,
    num_events: usize,
    obfuscation: bool,
}

impl Writer {
    async fn write(
        mut self,
        preparing: Preparing,
        output: Output,
        shape: Shape,
        store: Arc<ResponseStore>,
    ) -> Result<(), ApiError> {
        let mut failed = shape.object.clone();
        if let Err(error) = self.write_all(preparing, output, shape, &store).await {
            let (code, message) = error.code_and_message();
            failed.status = Status::Failed;
            failed.error = Some(ResponseError { code, message });
            self.send("response.failed", Payload::Response { response: Box::new(failed) }).await;
        }
        Ok(())
    }

    async fn write_all(
        &mut self,
        preparing: Preparing,
        mut output: Output,
        shape: Shape,
        store: &ResponseStore,
    ) -> Result<(), ApiError> {
        for kind in ["response.created", "response.in_progress"] {
            self.send(kind, Payload::Response { response: Box::new(shape.object.clone()) }).await;
        }
        let mut generation = preparing.await?;
        while let Some((_, event)) = generation.next().await? {
            self.send_all(output.take(event)).await;
        }
        let object = finish(output, &mut generation, shape, store);
        let is_whole = object.status == Status::Completed;
        let kind = if is_whole { "response.completed" } else { "response.incomplete" };
        self.send(kind, Payload::Response { response: Box::new(object) }).await;
        Ok(())
    }

    async fn send_all(&mut self, told: Vec<Told>) {
        for (kind, payload) in told {
            self.send(kind, payload).await;
        }
    }

    async fn send(&mut self, kind: &'static str, payload: Payload) {
        let mut event = StreamEvent { kind, sequence_number: self.num_events, payload, obfuscation: None };
        if self.obfuscation && matches!(event.payload, Payload::Delta { .. }) {
            event.obfuscation = Some(sse::padding(&event));
        }
        self.num_events += 1;
        self.events.send_named(kind, &event).await;
    }
}
