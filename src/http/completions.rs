//! `POST /v1/completions`: the model goes on with a text as it is, without template, tags or videos.
//!
//! Handler of the router. Requests take the path of chat requests (`pipeline.rs`) and share their
//! checks.

mod logprobs;
mod stream;

use std::sync::Arc;

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tempfile::NamedTempFile;
use tokio::task::spawn_blocking;
use utoipa::ToSchema;

use self::logprobs::{TextLogprobs, TextScorer};
use super::{
    body::{self, BodyError},
    chat::reply_head,
    error::ApiError,
    generation::{Generation, finish_reason},
    json_fault::JsonFault,
    openapi::Refused,
    pipeline::{self, Begun},
    record::RequestRecord,
    responses::{ReplyHead, Usage},
    sse,
    state::{AppState, Loaded},
    types::{ChatRequest, Extra},
    validate::{self, InvalidRequest, Limits, RawPrompt, StreamExtras, ValidRequest},
};
use crate::{
    config::{Config, request_limits::MAX_PROMPTS},
    engine::PromptToken,
    output::{OutputEvent, ScoredToken},
};

/// Fields that mean the same in chat requests.
const AS_IN_CHAT: [&str; 19] = [
    "best_of",
    "cache_salt",
    "frequency_penalty",
    "ignore_eos",
    "logit_bias",
    "min_p",
    "min_tokens",
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
/// Tokens of a prompt that a chunk of a stream tells of: scores of more would take over a
/// millisecond to write.
const PROMPT_TOKENS_A_CHUNK: usize = 64;
/// Whole contexts of token ids that a request may hold.
const MAX_CONTEXTS: usize = 8;

/// Body of `POST /v1/completions`. Fields of chat requests that say how to sample are accepted too.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CompletionRequest {
    /// A text, its token ids, or a list of up to 64 of either. The choices of each prompt follow
    /// those of the one before.
    prompt: Option<Value>,
    /// 16 if left out. 0 needs `echo`: the reply is then the prompt.
    #[schema(minimum = 0)]
    max_tokens: Option<u64>,
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f64>,
    /// Whether the prompt comes before the text.
    echo: Option<bool>,
    /// Log probabilities of the tokens, and of this many of the most probable ones at each place.
    /// With `echo` the prompt's tokens come first (null for the very first), and the end token, if
    /// the model ended the reply, comes last.
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
    /// In a stream as in one of chat completions.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    /// Random text with `include_obfuscation`.
    #[serde(skip_serializing_if = "Option::is_none")]
    obfuscation: Option<String>,
}

#[derive(Debug, Default, Serialize, ToSchema)]
struct TextChoice {
    index: usize,
    text: String,
    logprobs: Option<TextLogprobs>,
    /// stop or length; null while there is more to come.
    finish_reason: Option<&'static str>,
}

/// What the reply looks like.
struct Shape {
    stream: bool,
    extras: StreamExtras,
    /// Texts of the prompts, if they come before those of the choices.
    echo: Vec<String>,
    choices_per_prompt: usize,
    /// If log probabilities are wanted.
    scorer: Option<TextScorer>,
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
        return fold(preparing.await?, head, shape).await;
    }
    let interval = state.config().keep_alive_interval;
    let preparing = pipeline::settle(preparing, interval).await?;
    Ok(sse::respond(interval, |events| stream::write(events, preparing, head, shape)))
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
    let max_values = config.max_json_values + MAX_CONTEXTS * loaded.model.max_model_len;
    let mut request: CompletionRequest = body::parse(json, max_values)?;
    let limits = Limits::new(config, loaded);
    let prompts = prompts(request.prompt.take(), limits)?;
    let echo = request.echo.unwrap_or(false);
    let logprobs = request.logprobs;
    if logprobs.is_some_and(|logprobs| logprobs > MAX_LOGPROBS) {
        let message = format!("logprobs must be from 0 to {MAX_LOGPROBS}");
        return Err(InvalidRequest::field("logprobs", message).into());
    }
    let prompt_only = echo && request.max_tokens == Some(0);
    if prompt_only {
        // The engine knows no sequence without completion: one token is asked for and not waited
        // for.
        request.max_tokens = Some(1);
    }
    let text = |prompt: &RawPrompt| match prompt {
        RawPrompt::Text(text) => text.clone(),
        RawPrompt::Tokens(ids) => loaded.tokenizer.decode_named(ids),
    };
    let echo: Vec<String> = if echo { prompts.iter().map(text).collect() } else { vec![] };
    let chat: ChatRequest = serde_path_to_error::deserialize(Value::Object(to_chat(request)?))
        .map_err(|error| InvalidRequest::from(JsonFault::new(error)))?;
    let mut valid = validate::validate_raw(chat, prompts, limits)?;
    check_num_sequences(valid.num_sequences(), config)?;
    valid.prompt_only = prompt_only;
    valid.sampling.params.scores_prompt = logprobs.is_some() && !echo.is_empty();
    let shape = Shape {
        stream: valid.stream,
        extras: valid.stream_extras,
        echo,
        choices_per_prompt: valid.choices.count,
        scorer: logprobs.map(|_| TextScorer(loaded.tokenizer.clone())),
    };
    Ok((valid, shape))
}

/// More could never be in the queue at once.
fn check_num_sequences(num_sequences: usize, config: &Config) -> Result<(), InvalidRequest> {
    let max = config.engine.max_running_sequences + config.engine.max_waiting_sequences;
    if num_sequences > max {
        let message = format!(
            "the prompts and \"n\" ask for {num_sequences} replies, but at most {max} fit this server; send fewer prompts"
        );
        return Err(InvalidRequest::field("prompt", message));
    }
    Ok(())
}

/// The same request to the chat endpoint, but for its prompt.
fn to_chat(request: CompletionRequest) -> Result<Map<String, Value>, InvalidRequest> {
    validate::check_beside(&request.extra, &AS_IN_CHAT)?;
    let mut chat = request.extra;
    chat.retain(|name, _| AS_IN_CHAT.contains(&name.as_str()));
    chat.insert("messages".into(), Value::Array(vec![]));
    chat.insert("max_tokens".into(), request.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS).into());
    chat.insert("top_p".into(), request.top_p.into());
    chat.insert("logprobs".into(), request.logprobs.is_some().into());
    chat.insert("top_logprobs".into(), request.logprobs.into());
    Ok(chat)
}

/// One prompt, or a list of several.
fn prompts(prompt: Option<Value>, limits: Limits<'_>) -> Result<Vec<RawPrompt>, InvalidRequest> {
    let fault = |message: String| Err(InvalidRequest::field("prompt", message));
    let list = match prompt {
        Some(Value::Array(list)) if list.is_empty() => return fault(NO_PROMPT.into()),
        Some(Value::Array(list)) if !list.iter().all(Value::is_number) => list,
        one => vec![one.unwrap_or_default()],
    };
    if list.len() > MAX_PROMPTS {
        return fault(format!("there are {} prompts, but at most {MAX_PROMPTS} are allowed", list.len()));
    }
    let num_bytes: usize = list.iter().filter_map(Value::as_str).map(str::len).sum();
    if num_bytes > limits.config.max_text_bytes {
        return fault(format!("the prompt has more than {} bytes of text", limits.config.max_text_bytes));
    }
    let prompts = list.into_iter().map(|one| raw_prompt(one, limits));
    prompts.collect::<Result<_, _>>().or_else(fault)
}

const NO_PROMPT: &str = "the prompt must be a text, token ids, or a list of either";

fn raw_prompt(prompt: Value, limits: Limits<'_>) -> Result<RawPrompt, String> {
    match prompt {
        Value::String(text) if text.is_empty() => Err("the prompt is empty; send a text".into()),
        Value::String(text) => Ok(RawPrompt::Text(text)),
        Value::Array(list) if !list.is_empty() && list.iter().all(Value::is_number) => {
            let id = |id: &Value| id.as_u64().filter(|id| *id < limits.vocab_size as u64);
            let ids = list.iter().map(|value| id(value).and_then(|id| id.try_into().ok()));
            let ids: Option<Vec<_>> = ids.collect();
            let unknown =
                || format!("the prompt has a number that is no token id below {}", limits.vocab_size);
            ids.map(RawPrompt::Tokens).ok_or_else(unknown)
        }
        _ => Err(NO_PROMPT.into()),
    }
}

impl Shape {
    /// `offset`: characters of the text so far.
    fn logprobs(&self, tokens: &[ScoredToken], offset: &mut usize) -> Option<TextLogprobs> {
        let tokens = tokens.iter().map(|token| (token.id, Some(&*token.logprobs)));
        self.scorer.as_ref().map(|scorer| scorer.score(tokens, offset))
    }

    /// Scores of tokens of a prompt.
    fn prompt_logprobs(&self, tokens: &[PromptToken], offset: &mut usize) -> Option<TextLogprobs> {
        let tokens = tokens.iter().map(|token| (token.id, token.logprobs.as_deref()));
        self.scorer.as_ref().map(|scorer| scorer.score(tokens, offset))
    }

    /// Returns the text of the prompt that precedes a choice, if it is echoed.
    fn echo(&self, index: usize) -> String {
        self.echo.get(index / self.choices_per_prompt).cloned().unwrap_or_default()
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
            self.logprobs.get_or_insert_default().extend(more);
        }
    }

    /// Puts the scores of the prompt before those of the completion.
    fn score_prompt(&mut self, shape: &Shape, prompt: &[PromptToken]) {
        let mut num_chars = 0;
        if let Some(mut all) = shape.prompt_logprobs(prompt, &mut num_chars) {
            all.extend(self.logprobs.take().unwrap_or_default().shifted(num_chars));
            self.logprobs = Some(all);
        }
    }
}

/// The unary reply: the same pieces as a stream's, put together.
async fn fold(mut generation: Generation, head: ReplyHead, shape: Shape) -> Result<Response, ApiError> {
    let begun = |index| TextChoice { index, text: shape.echo(index), ..TextChoice::default() };
    let mut choices: Vec<TextChoice> = (0..generation.num_choices()).map(begun).collect();
    let mut offsets = vec![0; choices.len()];
    while let Some((index, event)) = generation.next().await? {
        choices[index].add(shape.choice(index, event, &mut offsets[index]));
    }
    let usage = Some(generation.counts().into());
    let prompts: Vec<_> = (0..choices.len()).map(|index| generation.take_prompt(index)).collect();
    if prompts.iter().all(Vec::is_empty) {
        return Ok(Json(TextCompletion { head, choices, usage, obfuscation: None }).into_response());
    }
    // The scores of a whole prompt are too much for a thread that serves others.
    let written = spawn_blocking(move || {
        for (choice, prompt) in choices.iter_mut().zip(&prompts) {
            choice.score_prompt(&shape, prompt);
        }
        Json(TextCompletion { head, choices, usage, obfuscation: None }).into_response()
    });
    written.await.map_err(|error| ApiError::Internal(format!("writing a prompt's scores: {error}")))
}
