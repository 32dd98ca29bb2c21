//! From the wire form of a request to a [`ValidRequest`], which nobody checks again.
//!
//! Called by the handlers. Pure: no clock, no randomness, no input but its arguments.

mod choices;
mod clips;
mod fields;
mod foreign_fields;
mod guided;
mod messages;
mod parts;
mod sampling;
mod stream;
mod tools;
mod video;

pub use choices::ValidChoices;
pub use foreign_fields::{Accepted, ForeignField, IN_MESSAGES, IN_PARTS, TOP_LEVEL};
pub use guided::Guided;
pub use stream::StreamExtras;

use std::{sync::Arc, time::Duration};

use tempfile::NamedTempFile;

pub use fields::{check_beside, check_top_level};

use super::{
    json_fault::JsonFault,
    state::Loaded,
    types::{ChatRequest, Extra},
};
use crate::{
    config::Config,
    media::{FrameSampling, VideoSource},
    prompt::{Conversation, Instruction},
    scheduler::{SamplingParams, TokenId},
};

/// A request that can be served, but for what only later stages can know (the video, the prompt's length).
#[derive(Debug)]
pub struct ValidRequest {
    /// Prompts without template, in place of a conversation, which is then empty. Each has `n`
    /// choices.
    pub raw_prompts: Vec<RawPrompt>,
    /// The reply ends as soon as the prompt is computed.
    pub prompt_only: bool,
    /// Each video's place is in the turn that counts it.
    pub conversation: Conversation,
    /// In the order of their places.
    pub videos: Vec<ValidVideo>,
    /// Cached work is shared with requests of the same one only.
    pub cache_salt: Option<Arc<str>>,
    /// From the arrival to the last token; `None`: the server's own.
    pub timeout: Option<Duration>,
    pub sampling: ValidSampling,
    pub choices: ValidChoices,
    pub stop_strings: Vec<String>,
    /// How the last question is to be answered.
    pub instruction: Instruction,
    /// Most tokens of thinking.
    pub thinking_budget: Option<usize>,
    /// What the answer must be.
    pub guided: Option<Guided>,
    pub reasoning: Reasoning,
    pub stream: bool,
    pub stream_extras: StreamExtras,
}

/// A prompt without template.
#[derive(Debug)]
pub enum RawPrompt {
    Text(String),
    Tokens(Vec<TokenId>),
}

impl ValidRequest {
    /// Returns how many replies there are in all.
    pub fn num_sequences(&self) -> usize {
        self.choices.count * self.raw_prompts.len().max(1)
    }

    /// Returns the names of the functions one of which the answer calls; empty when it calls none.
    pub fn functions(&self) -> Vec<String> {
        self.guided.as_ref().map(Guided::functions).unwrap_or_default()
    }

    /// Whether the model is asked to think before it answers.
    pub fn thinks(&self) -> bool {
        self.instruction == Instruction::Think
    }
}

/// One video of a request.
#[derive(Debug)]
pub struct ValidVideo {
    /// Where it is in the request, as in `messages[0].content[1].video_url`.
    pub path: String,
    /// Where its knobs are.
    pub knobs_path: String,
    pub source: VideoSource,
    pub sampling: FrameSampling,
}

/// How to sample; what is `None` is decided when the request runs.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidSampling {
    /// `seed`, `max_tokens` and `watched` of it stand for nothing.
    pub params: SamplingParams,
    /// `None`: a random one.
    pub seed: Option<u64>,
    /// `None`: the server's default, as far as the context reaches.
    pub max_tokens: Option<usize>,
}

/// What becomes of the thinking in the reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reasoning {
    /// In fields of its own.
    #[default]
    Separate,
    /// Left out.
    Hidden,
    /// In the content, tags and all.
    Raw,
}

/// What a request is measured against.
#[derive(Debug, Clone, Copy)]
pub struct Limits<'a> {
    pub config: &'a Config,
    pub model_id: &'a str,
    /// Sampling of a request that says nothing.
    pub default_sampling: &'a SamplingParams,
    /// Token ids are below it.
    pub vocab_size: usize,
    /// Whether a request that does not say is asked to think.
    pub thinks: bool,
}

impl<'a> Limits<'a> {
    /// Of a server with this model.
    pub fn new(config: &'a Config, loaded: &'a Loaded) -> Self {
        Limits {
            config,
            model_id: &loaded.model.id,
            default_sampling: &loaded.model.default_sampling,
            vocab_size: loaded.tokenizer.vocab_size(),
            thinks: loaded.model.thinks,
        }
    }
}

/// Why a request is refused; one sentence for the client.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidRequest {
    /// `param` is the path of the field, as in `messages[0].content`.
    #[error("{message}")]
    Field { param: String, message: String },
    #[error("the model \"{asked}\" does not exist here; this server has \"{served}\"")]
    UnknownModel { asked: String, served: String },
}

impl InvalidRequest {
    pub(super) fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        InvalidRequest::Field { param: param.into(), message: message.into() }
    }
}

impl From<JsonFault> for InvalidRequest {
    fn from(JsonFault { param, message }: JsonFault) -> Self {
        InvalidRequest::Field { param: param.unwrap_or_default(), message }
    }
}

/// Checks everything that the request alone decides. `upload` is the video part of a multipart body.
///
/// # Errors
/// The first fault found, with the field it is in.
pub fn validate(
    mut request: ChatRequest,
    upload: Option<NamedTempFile>,
    limits: Limits<'_>,
) -> Result<ValidRequest, InvalidRequest> {
    check_model(request.model.as_deref(), limits.model_id)?;
    check_top_level(&request.extra)?;
    let stream_extras = stream::validate(&request)?;
    let instruction = instruction(&request, limits.thinks)?;
    let thinking_budget = guided::thinking_budget(&request)?;
    let guided = guided::validate(&request, limits.config)?;
    let reasoning = reasoning(&request)?;
    if reasoning == Reasoning::Raw && guided.as_ref().is_some_and(|guided| !guided.functions().is_empty()) {
        let message =
            "a call of a function is told apart from the thinking; leave out reasoning_format \"none\"";
        return Err(InvalidRequest::field("reasoning_format", message));
    }
    let stop_strings = sampling::stop_strings(&request, limits.config)?;
    let sampling = sampling::validate(&request, limits)?;
    let cache_salt = cache_salt(request.cache_salt.take())?;
    let timeout = timeout(request.timeout, limits.config.request_timeout)?;
    let messages = std::mem::take(&mut request.messages);
    let as_stills = video::as_stills(request.media_io_kwargs.as_ref(), limits.config);
    let (conversation, parts) = messages::validate(messages, upload.is_some(), as_stills, limits.config)?;
    let mut choices = choices::validate(&request, &conversation, sampling.params.temperature, limits)?;
    choices.is_guided = guided.is_some();
    let videos = video::validate(parts, upload, request.media_io_kwargs, limits.config)?;
    Ok(ValidRequest {
        raw_prompts: vec![],
        prompt_only: false,
        conversation,
        videos,
        cache_salt,
        timeout,
        sampling,
        choices,
        stop_strings,
        instruction,
        thinking_budget,
        guided,
        reasoning,
        stream: request.stream.unwrap_or(false),
        stream_extras,
    })
}

/// Checks a request that brings its prompts as they are, as [`validate`] does: without messages,
/// and tags stay text.
///
/// # Errors
/// The first fault found, with the field it is in.
pub fn validate_raw(
    mut request: ChatRequest,
    prompts: Vec<RawPrompt>,
    limits: Limits<'_>,
) -> Result<ValidRequest, InvalidRequest> {
    check_model(request.model.as_deref(), limits.model_id)?;
    check_top_level(&request.extra)?;
    let (conversation, sampling) = (Conversation::default(), sampling::validate(&request, limits)?);
    Ok(ValidRequest {
        raw_prompts: prompts,
        prompt_only: false,
        videos: vec![],
        cache_salt: cache_salt(request.cache_salt.take())?,
        timeout: timeout(request.timeout, limits.config.request_timeout)?,
        choices: choices::validate(&request, &conversation, sampling.params.temperature, limits)?,
        stop_strings: sampling::stop_strings(&request, limits.config)?,
        instruction: Instruction::AsAsked,
        thinking_budget: None,
        guided: guided::validate(&request, limits.config)?,
        reasoning: Reasoning::Raw,
        stream: request.stream.unwrap_or(false),
        stream_extras: stream::validate(&request)?,
        conversation,
        sampling,
    })
}

/// No model means the one there is.
///
/// # Errors
/// When another one is asked for.
pub fn check_model(asked: Option<&str>, served: &str) -> Result<(), InvalidRequest> {
    match asked {
        Some(asked) if asked != served => {
            Err(InvalidRequest::UnknownModel { asked: shorten(asked), served: served.into() })
        }
        _ => Ok(()),
    }
}

fn cache_salt(salt: Option<String>) -> Result<Option<Arc<str>>, InvalidRequest> {
    const MAX_SALT_BYTES: usize = 128;
    match salt {
        Some(salt) if salt.is_empty() || salt.len() > MAX_SALT_BYTES => {
            let message = format!("cache_salt must have 1 to {MAX_SALT_BYTES} bytes");
            Err(InvalidRequest::field("cache_salt", message))
        }
        salt => Ok(salt.map(Into::into)),
    }
}

/// A longer time than the server's own is refused rather than cut: nobody shall count on it.
fn timeout(seconds: Option<f64>, longest: Duration) -> Result<Option<Duration>, InvalidRequest> {
    let Some(seconds) = seconds else { return Ok(None) };
    if !(seconds > 0.0 && seconds <= longest.as_secs_f64()) {
        let message = format!(
            "timeout is {seconds:?} s, but must be greater than 0 and at most {} s, the server's own limit",
            longest.as_secs_f64()
        );
        return Err(InvalidRequest::field("timeout", message));
    }
    Ok(Some(Duration::from_secs_f64(seconds)))
}

/// The efforts but `none` are one and the same to this model. `thinks`: what happens when the request does not say.
fn instruction(request: &ChatRequest, thinks: bool) -> Result<Instruction, InvalidRequest> {
    let by_effort = match request.reasoning_effort.as_deref() {
        None => None,
        Some("none") => Some(false),
        Some("minimal" | "low" | "medium" | "high" | "xhigh" | "max") => Some(true),
        Some(_) => {
            let message = "reasoning_effort must be one of none, minimal, low, medium, high, xhigh, max";
            return Err(InvalidRequest::field("reasoning_effort", message));
        }
    };
    let by_template = match &request.chat_template_kwargs {
        None => None,
        Some(kwargs) => {
            refuse_unknown(&kwargs.extra, "chat_template_kwargs", &["enable_thinking"])?;
            kwargs.enable_thinking
        }
    };
    match (by_effort, by_template) {
        (Some(effort), Some(template)) if effort != template => Err(InvalidRequest::field(
            "chat_template_kwargs.enable_thinking",
            "enable_thinking and reasoning_effort contradict each other; send one of them",
        )),
        (effort, template) => Ok(match effort.or(template) {
            Some(true) => Instruction::Think,
            Some(false) => Instruction::OptionOnly,
            None if thinks => Instruction::Think,
            None => Instruction::AsAsked,
        }),
    }
}

fn reasoning(request: &ChatRequest) -> Result<Reasoning, InvalidRequest> {
    let format = match request.reasoning_format.as_deref() {
        None | Some("auto" | "parsed" | "deepseek") => Reasoning::Separate,
        Some("hidden") => Reasoning::Hidden,
        Some("none") => Reasoning::Raw,
        Some(_) => {
            let message = "reasoning_format must be one of none (tags stay in the content), parsed, hidden";
            return Err(InvalidRequest::field("reasoning_format", message));
        }
    };
    match (format, request.include_reasoning) {
        (Reasoning::Raw, Some(false)) => Err(InvalidRequest::field(
            "include_reasoning",
            "\"include_reasoning\": false and \"reasoning_format\": \"none\" contradict each other; send one",
        )),
        (_, Some(false)) => Ok(Reasoning::Hidden),
        (format, _) => Ok(format),
    }
}

/// Fields of a structure that has no place for others.
pub fn refuse_unknown(extra: &Extra, path: &str, known: &[&str]) -> Result<(), InvalidRequest> {
    match extra.iter().find(|(_, value)| !value.is_null()) {
        None => Ok(()),
        Some((name, _)) => {
            let name = shorten(name);
            let known = known.join(", ");
            Err(InvalidRequest::field(
                format!("{path}.{name}"),
                format!("unknown field \"{name}\" in {path}; known are {known}"),
            ))
        }
    }
}

/// Client text that is repeated in an error: long enough to recognise, never a whole body.
pub fn shorten(text: &str) -> String {
    const MAX_CHARS: usize = 64;
    shorten_to(MAX_CHARS, text)
}

/// The first `max_chars` characters of `text`, with a mark where it goes on.
pub fn shorten_to(max_chars: usize, text: &str) -> String {
    match text.char_indices().nth(max_chars) {
        None => text.into(),
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

#[cfg(test)]
mod tests;
