//! How the next token is chosen: ranges and defaults.
//!
//! Called by `validate`.

use serde_json::Number;

use super::{InvalidRequest, Limits, ValidSampling, choices, shorten};
use crate::{
    config::Config,
    http::types::{ChatRequest, TextOr},
    scheduler::{SamplingParams, TokenId},
};

/// Sampling of `request` over the model's defaults.
pub fn validate(request: &ChatRequest, limits: Limits<'_>) -> Result<ValidSampling, InvalidRequest> {
    let default = limits.default_sampling;
    let max_tokens = max_tokens(request)?;
    let params = SamplingParams {
        temperature: range("temperature", request.temperature, 0.0..=2.0, default.temperature)?,
        top_k: top_k(request.top_k, default.top_k)?,
        top_p: top_p(request.top_p, default.top_p)?,
        min_p: range("min_p", request.min_p, 0.0..=1.0, default.min_p)?,
        repetition_penalty: range(
            "repetition_penalty",
            request.repetition_penalty,
            0.01..=10.0,
            default.repetition_penalty,
        )?,
        frequency_penalty: range(
            "frequency_penalty",
            request.frequency_penalty,
            -2.0..=2.0,
            default.frequency_penalty,
        )?,
        presence_penalty: range(
            "presence_penalty",
            request.presence_penalty,
            -2.0..=2.0,
            default.presence_penalty,
        )?,
        logit_bias: logit_bias(request, limits)?,
        seed: 0,
        max_tokens: 0,
        min_tokens: min_tokens(request.min_tokens, max_tokens)?,
        ignore_eos: request.ignore_eos.unwrap_or(default.ignore_eos),
        stop_token_ids: stop_token_ids(request, limits)?,
        ending_ids: Vec::new(),
        top_logprobs: choices::top_logprobs(request, limits)?,
        scores_prompt: false,
        watched: Vec::new(),
    };
    Ok(ValidSampling { params, seed: request.seed.as_ref().map(seed).transpose()?, max_tokens })
}

fn range(
    name: &str,
    value: Option<f64>,
    allowed: std::ops::RangeInclusive<f64>,
    default: f32,
) -> Result<f32, InvalidRequest> {
    match value {
        None => Ok(default),
        Some(value) if allowed.contains(&value) => Ok(value as f32),
        Some(value) => Err(InvalidRequest::field(
            name,
            format!("{name} is {value:?}, but must be from {} to {}", allowed.start(), allowed.end()),
        )),
    }
}

fn top_p(value: Option<f64>, default: f32) -> Result<f32, InvalidRequest> {
    if value == Some(0.0) {
        return Err(InvalidRequest::field("top_p", "top_p must be greater than 0"));
    }
    range("top_p", value, 0.0..=1.0, default)
}

/// -1 and 0 both mean no limit.
fn top_k(value: Option<i64>, default: usize) -> Result<usize, InvalidRequest> {
    match value {
        None => Ok(default),
        Some(-1) => Ok(0),
        Some(k) => usize::try_from(k).map_err(|_| {
            InvalidRequest::field("top_k", format!("top_k is {k}, but must be -1 (no limit) or at least 0"))
        }),
    }
}

/// Any 64-bit integer, negative ones included: only equality counts.
fn seed(seed: &Number) -> Result<u64, InvalidRequest> {
    seed.as_u64()
        .or_else(|| seed.as_i64().map(|negative| negative as u64))
        .ok_or_else(|| InvalidRequest::field("seed", "seed must be a 64-bit integer"))
}

fn max_tokens(request: &ChatRequest) -> Result<Option<usize>, InvalidRequest> {
    let (name, value) = match (request.max_tokens, request.max_completion_tokens) {
        (None, None) => return Ok(None),
        (Some(old), Some(new)) if old != new => {
            let message = format!("max_tokens is {old} but max_completion_tokens is {new}; send one of them");
            return Err(InvalidRequest::field("max_completion_tokens", message));
        }
        (_, Some(value)) => ("max_completion_tokens", value),
        (Some(value), None) => ("max_tokens", value),
    };
    match usize::try_from(value) {
        // The upper end is the context's affair; this keeps sums with it far from overflow.
        Ok(tokens) if (1..=u32::MAX as usize).contains(&tokens) => Ok(Some(tokens)),
        _ => Err(InvalidRequest::field(
            name,
            format!("{name} is {value}, but must be at least 1 and fit the context"),
        )),
    }
}

fn min_tokens(asked: Option<u64>, max_tokens: Option<usize>) -> Result<usize, InvalidRequest> {
    let min = asked.unwrap_or(0);
    match (usize::try_from(min), max_tokens) {
        (Ok(tokens), max) if tokens <= max.unwrap_or(u32::MAX as usize) => Ok(tokens),
        (_, Some(max)) => {
            let message =
                format!("min_tokens is {min}, but must be at most {max}, the most tokens asked for");
            Err(InvalidRequest::field("min_tokens", message))
        }
        (_, None) => {
            let message = format!("min_tokens is {min}, but must fit the context");
            Err(InvalidRequest::field("min_tokens", message))
        }
    }
}

fn logit_bias(request: &ChatRequest, limits: Limits<'_>) -> Result<Vec<(TokenId, f32)>, InvalidRequest> {
    let Some(biases) = &request.logit_bias else { return Ok(limits.default_sampling.logit_bias.clone()) };
    let fault = |message| Err(InvalidRequest::field("logit_bias", message));
    let max = limits.config.max_token_list;
    if biases.len() > max {
        return fault(format!("logit_bias has {} entries, but at most {max} are allowed", biases.len()));
    }
    let mut pairs = Vec::with_capacity(biases.len());
    for (id, bias) in biases {
        let Some(token) = id.parse().ok().filter(|token| (*token as usize) < limits.vocab_size) else {
            return fault(format!(
                "logit_bias has the key \"{}\", which is no token id below {}",
                shorten(id),
                limits.vocab_size
            ));
        };
        if !(-100.0..=100.0).contains(bias) {
            return fault(format!("logit_bias of token {token} is {bias:?}, but must be from -100 to 100"));
        }
        pairs.push((token, *bias as f32));
    }
    Ok(pairs)
}

fn stop_token_ids(request: &ChatRequest, limits: Limits<'_>) -> Result<Vec<TokenId>, InvalidRequest> {
    let Some(ids) = &request.stop_token_ids else {
        return Ok(limits.default_sampling.stop_token_ids.clone());
    };
    let fault = |message| InvalidRequest::field("stop_token_ids", message);
    let max = limits.config.max_token_list;
    if ids.len() > max {
        return Err(fault(format!(
            "stop_token_ids has {} entries, but at most {max} are allowed",
            ids.len()
        )));
    }
    ids.iter()
        .map(|id| match TokenId::try_from(*id) {
            Ok(token) if (token as usize) < limits.vocab_size => Ok(token),
            _ => Err(fault(format!("{id} is no token id below {}", limits.vocab_size))),
        })
        .collect()
}

/// Texts that end the completion.
pub fn stop_strings(request: &ChatRequest, config: &Config) -> Result<Vec<String>, InvalidRequest> {
    let stop = match &request.stop {
        None => return Ok(Vec::new()),
        Some(TextOr::Text(one)) => std::slice::from_ref(one),
        Some(TextOr::Other(many)) => many,
    };
    let fault = |message| Err(InvalidRequest::field("stop", message));
    if stop.len() > config.max_stop_strings {
        return fault(format!(
            "stop has {} texts, but at most {} are allowed",
            stop.len(),
            config.max_stop_strings
        ));
    }
    if stop.iter().any(String::is_empty) {
        return fault("stop holds an empty text, which would end every reply at once".into());
    }
    if stop.iter().any(|text| text.len() > config.max_stop_string_bytes) {
        return fault(format!("a text of stop is longer than {} bytes", config.max_stop_string_bytes));
    }
    Ok(stop.to_vec())
}
