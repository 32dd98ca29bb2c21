//! How many replies are wanted, and what is told of their tokens and answers.
//!
//! Called by `validate`.

use super::{InvalidRequest, Limits};
use crate::{config::ReasoningField, http::types::ChatRequest, output::Options, prompt::Conversation};

/// What is wanted of the choices.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ValidChoices {
    /// At least 1.
    pub count: usize,
    /// Whether the tokens' log probabilities are shown.
    pub logprobs: bool,
    /// Whether the probabilities of the options are shown, A to D where the question has none.
    pub answer_logprobs: bool,
    /// Whether the choices vote.
    pub vote: bool,
    /// The options of the last question.
    pub options: Option<Options>,
    /// The answers are held to a structure, so that each is a ballot as it stands.
    pub is_guided: bool,
    /// Name of the field that holds the thinking.
    pub reasoning_field: ReasoningField,
}

/// `temperature` is the one that holds, the default included.
pub fn validate(
    request: &ChatRequest,
    conversation: &Conversation,
    temperature: f32,
    limits: Limits<'_>,
) -> Result<ValidChoices, InvalidRequest> {
    let count = count(request, limits)?;
    let vote = request.vote.unwrap_or(false);
    if vote && count == 1 {
        return Err(InvalidRequest::field("vote", "one choice cannot vote; send \"n\" of 2 or more with it"));
    }
    if vote && temperature <= 0.0 {
        let message = "at temperature 0 all choices are the same, and a vote says nothing; send a higher one";
        return Err(InvalidRequest::field("temperature", message));
    }
    let question = conversation.turns.last().map_or("", |turn| &turn.user);
    Ok(ValidChoices {
        count,
        logprobs: request.logprobs.unwrap_or(false),
        answer_logprobs: request.answer_logprobs.unwrap_or(false),
        vote,
        options: Options::of_question(question),
        is_guided: false,
        reasoning_field: reasoning_field(request, limits)?,
    })
}

fn count(request: &ChatRequest, limits: Limits<'_>) -> Result<usize, InvalidRequest> {
    let engine = &limits.config.engine;
    // More could never be in the queue at once.
    let queue = engine.max_running_sequences + engine.max_waiting_sequences;
    let (max, flag) = match limits.config.max_choices {
        max if max > queue => (queue, "--max-running and --max-waiting"),
        max => (max, "--max-n"),
    };
    let n = request.n.unwrap_or(1);
    let Some(count) = usize::try_from(n).ok().filter(|count| (1..=max).contains(count)) else {
        let message = format!("n is {n}, but must be from 1 to {max}, the limit of this server ({flag})");
        return Err(InvalidRequest::field("n", message));
    };
    match request.best_of {
        Some(best_of) if best_of != n => {
            let message =
                format!("best_of is {best_of}, but must be n, which is {n}: all choices are returned");
            Err(InvalidRequest::field("best_of", message))
        }
        _ => Ok(count),
    }
}

/// The field that the request names, or the server's own choice.
fn reasoning_field(request: &ChatRequest, limits: Limits<'_>) -> Result<ReasoningField, InvalidRequest> {
    let Some(name) = &request.reasoning_field else { return Ok(limits.config.reasoning_field) };
    name.parse().map_err(|expected| {
        InvalidRequest::field("reasoning_field", format!("reasoning_field must be one of {expected}"))
    })
}

/// How many tokens are reported beside each chosen one; `None` when log probabilities are not asked for.
pub fn top_logprobs(request: &ChatRequest, limits: Limits<'_>) -> Result<Option<usize>, InvalidRequest> {
    let max = limits.config.max_top_logprobs;
    let top = request.top_logprobs.unwrap_or(0);
    let Some(top) = usize::try_from(top).ok().filter(|&top| top <= max) else {
        let message = format!("top_logprobs is {top}, but must be from 0 to {max}");
        return Err(InvalidRequest::field("top_logprobs", message));
    };
    if top > 0 && request.logprobs != Some(true) {
        return Err(InvalidRequest::field("top_logprobs", "top_logprobs needs \"logprobs\": true"));
    }
    Ok((request.logprobs == Some(true)).then_some(top))
}
