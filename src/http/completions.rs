//! `POST /v1/completions`: the model goes on with a text as it is, without template, tags or videos.
//!
//! Handler of the router. The request goes the way of chat requests (`http/pipeline.rs`) and shares their checks.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tempfile::NamedTempFile;
use utoipa::ToSchema;

use super::{
    body::{self, BodyError},
    chat::reply_head,
    choices::speakable,
    error::ApiError,
    generation::{Generation, finish_reason},
    json_fault::JsonFault,
    openapi::Refused,
    pipeline::{self, Begun, Preparing},
    record::RequestRecord,
    responses::{ReplyHead, Usage},
    sse::{self, EventSink},
    state::{AppState, Loaded},
    types::{ChatRequest, Extra},
    validate::{self, HARMLESS, InvalidRequest, Limits, RawPrompt, ValidRequest, shorten},
};
use crate::{
    config::Config,
    output::{OutputEvent, ScoredToken},
    prompt::Tokenizer,
};

/// Fields that mean the same in chat requests.
const AS_IN_CHAT: [&str; 18] = [
    "best_of",
    "cache_salt",
    "frequency_penalty",
    "ignore_eos",
    "logit_bias",
    "min_p",
    "model",
    "n",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "stream",
    "stream_options",
    "temperature",
    "timeout",
    "top_k",
];
/// OpenAI's.
const DEFAULT_MAX_TOKENS: u64 = 16;
const MAX_LOGPROBS: u64 = 5;

/// Body of `POST /v1/completions`. Fields of chat requests that say how to sample are accepted too.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CompletionRequest {
    /// A text, its token ids, or a list of one of either.
    prompt: Option<Value>,
    /// 16 if left out.
    #[schema(minimum = 1)]
    max_tokens: Option<u64>,
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f64>,
    /// Whether the prompt comes before the text.
    echo: Option<bool>,
    /// Log probabilities of the tokens, and of so many of the most probable ones beside each.
    #[schema(minimum = 0, maximum = 5)]
    logprobs: Option<u64>,
    #[serde(flatten)]
    #[schema(ignore)]
    extra: Extra,
}

/// The unary reply, and a chunk of a stream.
#[derive(Debug, Serialize, ToSchema)]
pub struct TextCompletion {
    #[serde(flatten)]
    head: ReplyHead,
    /// Empty in the chunk of usage.
    choices: Vec<TextChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
struct TextChoice {
    index: usize,
    text: String,
    logprobs: Option<TextLogprobs>,
    /// stop or length; null while there is more to come.
    finish_reason: Option<&'static str>,
}

/// Of each token: its text, its log probability, the most probable ones, and its first character in the text.
#[derive(Debug, Default, Serialize, ToSchema)]
struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<BTreeMap<String, f32>>,
    text_offset: Vec<usize>,
}

/// What the reply looks like.
struct Shape {
    stream: bool,
    include_usage: bool,
    /// Comes before the text of each choice.
    echo: Option<String>,
    logprobs: bool,
    tokenizer: Arc<Tokenizer>,
}

/// The handler.
///
/// # Errors
/// Everything that goes wrong before the first byte of the reply.
#[utoipa::path(post, path = "/v1/completions", tag = "completions", operation_id = "createCompletion",
    summary = "Go on with a text, without template, tags or videos",
    request_body = CompletionRequest,
    responses(
        (status = 200, description = "The text. With `\"stream\": true` server-sent events of the same form, and `data: [DONE]`.",
            content((TextCompletion = "application/json"), (TextCompletion = "text/event-stream"))),
        Refused))]
pub async fn create(
    State(state): State<AppState>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let Begun { loaded, preparing, shape, .. } = pipeline::begin(&state, record, request, check).await?;
    let head = reply_head(&loaded, "cmpl", "text_completion");
    if !shape.stream {
        return Ok(Json(fold(preparing.await?, head, &shape).await?).into_response());
    }
    let interval = state.config().keep_alive_interval;
    let preparing = pipeline::settle(preparing, interval).await?;
    Ok(sse::respond(interval, |events| write(events, preparing, head, shape)))
}

/// From bytes to a valid request.
fn check(
    json: &Bytes,
    upload: Option<NamedTempFile>,
    config: &Config,
    loaded: &Loaded,
) -> Result<(ValidRequest, Shape), ApiError> {
    if upload.is_some() {
        let message = "this endpoint takes no video; ask /v1/chat/completions about it".into();
        return Err(BodyError::Part { param: "video", message }.into());
    }
    // A whole context of token ids is a fair prompt.
    let max_values = config.max_json_values + loaded.model.max_model_len;
    let mut request: CompletionRequest = body::parse(json, max_values)?;
    let limits = Limits::new(config, loaded);
    let prompt = prompt(request.prompt.take(), limits)?;
    let echo = request.echo.unwrap_or(false);
    let logprobs = request.logprobs;
    if logprobs.is_some_and(|logprobs| logprobs > MAX_LOGPROBS) {
        let message = format!("logprobs must be from 0 to {MAX_LOGPROBS}");
        return Err(InvalidRequest::field("logprobs", message).into());
    }
    if echo && logprobs.is_some() {
        let message = "log probabilities of the prompt are not computed; send echo or logprobs";
        return Err(InvalidRequest::field("logprobs", message).into());
    }
    let echo = echo.then(|| match &prompt {
        RawPrompt::Text(text) => text.clone(),
        RawPrompt::Tokens(ids) => loaded.tokenizer.decode_named(ids),
    });
    let chat: ChatRequest = serde_path_to_error::deserialize(Value::Object(to_chat(request)?))
        .map_err(|error| InvalidRequest::from(JsonFault::new(error)))?;
    let valid = validate::validate_raw(chat, prompt, limits)?;
    let shape = Shape {
        stream: valid.stream,
        include_usage: valid.include_usage,
        echo,
        logprobs: logprobs.is_some(),
        tokenizer: loaded.tokenizer.clone(),
    };
    Ok((valid, shape))
}

/// The same request to the chat endpoint, but for its prompt.
fn to_chat(request: CompletionRequest) -> Result<Map<String, Value>, InvalidRequest> {
    let mut chat = Map::new();
    for (name, value) in request.extra {
        if AS_IN_CHAT.contains(&name.as_str()) {
            chat.insert(name, value);
        } else if !value.is_null() && !HARMLESS.contains(&name.as_str()) {
            let name = shorten(&name);
            let message = format!("\"{name}\" is unknown or not supported here; remove it");
            return Err(InvalidRequest::field(name, message));
        }
    }
    chat.insert("messages".into(), Value::Array(vec![]));
    chat.insert("max_tokens".into(), request.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS).into());
    chat.insert("top_p".into(), request.top_p.into());
    chat.insert("logprobs".into(), request.logprobs.is_some().into());
    chat.insert("top_logprobs".into(), request.logprobs.into());
    Ok(chat)
}

fn prompt(prompt: Option<Value>, limits: Limits<'_>) -> Result<RawPrompt, InvalidRequest> {
    let fault = |message: String| Err(InvalidRequest::field("prompt", message));
    match prompt {
        Some(Value::String(text)) if text.is_empty() => fault("the prompt is empty; send a text".into()),
        Some(Value::String(text)) if text.len() > limits.config.max_text_bytes => {
            fault(format!("the prompt has more than {} bytes of text", limits.config.max_text_bytes))
        }
        Some(Value::String(text)) => Ok(RawPrompt::Text(text)),
        Some(Value::Array(mut list)) if list.len() == 1 && !list[0].is_number() => {
            let inner = list.pop();
            if inner
                .as_ref()
                .is_some_and(|inner| inner.as_array().is_some_and(|ids| !ids.iter().all(Value::is_number)))
            {
                return fault("the prompt must be a text, token ids, or a list of one of either".into());
            }
            self::prompt(inner, limits)
        }
        Some(Value::Array(list)) if !list.is_empty() && list.iter().all(Value::is_number) => {
            let id = |id: &Value| id.as_u64().filter(|id| *id < limits.vocab_size as u64);
            match list.iter().map(|value| id(value).and_then(|id| id.try_into().ok())).collect() {
                Some(ids) => Ok(RawPrompt::Tokens(ids)),
                None => {
                    fault(format!("the prompt has a number that is no token id below {}", limits.vocab_size))
                }
            }
        }
        Some(Value::Array(list)) if list.len() > 1 => {
            fault("only one prompt per request is supported; send several requests".into())
        }
        _ => fault("the prompt must be a text, token ids, or a list of one of either".into()),
    }
}

impl Shape {
    /// `offset`: characters of the text so far.
    fn logprobs(&self, tokens: &[ScoredToken], offset: &mut usize) -> Option<TextLogprobs> {
        if !self.logprobs {
            return None;
        }
        let mut shown = TextLogprobs::default();
        for token in tokens {
            let text = self.tokenizer.decode_named(&[token.id]);
            let top = token.logprobs.top.iter();
            let top = top.map(|&(id, logprob)| (self.tokenizer.decode_named(&[id]), speakable(logprob)));
            shown.top_logprobs.push(top.collect());
            shown.token_logprobs.push(speakable(token.logprobs.chosen));
            shown.text_offset.push(*offset);
            *offset += text.chars().count();
            shown.tokens.push(text);
        }
        Some(shown)
    }

    /// What an event adds to its choice.
    fn choice(&self, index: usize, event: OutputEvent, offset: &mut usize) -> TextChoice {
        match event {
            OutputEvent::Delta { text, tokens, .. } => {
                let logprobs = self.logprobs(&tokens, offset);
                TextChoice { index, text, logprobs, ..TextChoice::default() }
            }
            OutputEvent::Finished(ending) => {
                let finish_reason = Some(finish_reason(ending.reason));
                let logprobs = self.logprobs(&ending.tokens, offset);
                TextChoice { index, logprobs, finish_reason, ..TextChoice::default() }
            }
        }
    }
}

impl TextChoice {
    /// Appends what came later.
    fn add(&mut self, more: TextChoice) {
        self.text.push_str(&more.text);
        self.finish_reason = more.finish_reason;
        if let Some(more) = more.logprobs {
            let shown = self.logprobs.get_or_insert_default();
            shown.tokens.extend(more.tokens);
            shown.token_logprobs.extend(more.token_logprobs);
            shown.top_logprobs.extend(more.top_logprobs);
            shown.text_offset.extend(more.text_offset);
        }
    }
}

/// The unary reply: the same pieces as a stream's, put together.
async fn fold(
    mut generation: Generation,
    head: ReplyHead,
    shape: &Shape,
) -> Result<TextCompletion, ApiError> {
    let text = shape.echo.clone().unwrap_or_default();
    let begun = |index| TextChoice { index, text: text.clone(), ..TextChoice::default() };
    let mut choices: Vec<TextChoice> = (0..generation.num_choices()).map(begun).collect();
    let mut offsets = vec![0; choices.len()];
    while let Some((index, event)) = generation.next().await? {
        choices[index].add(shape.choice(index, event, &mut offsets[index]));
    }
    Ok(TextCompletion { head, choices, usage: Some(generation.counts().into()) })
}

/// The stream.
async fn write(
    events: EventSink,
    preparing: Preparing,
    head: ReplyHead,
    shape: Shape,
) -> Result<(), ApiError> {
    let mut generation = preparing.await?;
    let chunk = |choices| TextCompletion { head: head.clone(), choices, usage: None };
    let mut offsets = vec![0; generation.num_choices()];
    if let Some(text) = &shape.echo {
        for index in 0..generation.num_choices() {
            let choice = TextChoice { index, text: text.clone(), ..TextChoice::default() };
            events.send(&chunk(vec![choice])).await;
        }
    }
    while let Some((index, event)) = generation.next().await? {
        events.send(&chunk(vec![shape.choice(index, event, &mut offsets[index])])).await;
    }
    if shape.include_usage {
        let usage = Some(generation.counts().into());
        events.send(&TextCompletion { usage, ..chunk(vec![]) }).await;
    }
    events.send_done().await;
    Ok(())
}
