//! `POST /tokenize` and `POST /detokenize`, in the shapes of vLLM: what a prompt will cost, before it is sent.
//!
//! Handlers of the router. A video counts as the visual tokens that every video becomes; it is not fetched for that.

use axum::{
    Json,
    extract::{Request, State},
};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use utoipa::ToSchema;

use super::{
    body::{self, Received},
    error::ApiError,
    openapi::Refused,
    state::{AppState, Loaded},
    types::{ChatRequest, ChatTemplateKwargs, Extra, Message},
    validate::{self, InvalidRequest, Limits},
};
use crate::{
    config::Config,
    prompt::{self, Tokenizer},
    scheduler::{TokenId, VISUAL_TOKEN},
};

/// How a visual token is written, as in the family's checkpoints (`image_token_index`).
const WIRE_VISUAL_TOKEN: i64 = -200;
/// What stands for it in text.
const VISUAL_TEXT: &str = "<image>";

/// Body of `POST /tokenize`: a text as it is, or a conversation in the model's template.
#[derive(Debug, Deserialize, ToSchema)]
pub struct TokenizeRequest {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    /// Makes no difference: the tokenizer adds none.
    #[serde(rename = "add_special_tokens")]
    _add_special_tokens: Option<bool>,
    /// Whether the text of each token is wanted as well.
    return_token_strs: Option<bool>,
    /// Only true: the template always ends with the beginning of the reply.
    add_generation_prompt: Option<bool>,
    /// Only false.
    continue_final_message: Option<bool>,
    reasoning_effort: Option<String>,
    chat_template_kwargs: Option<ChatTemplateKwargs>,
    #[serde(flatten)]
    #[schema(ignore)]
    extra: Extra,
}

/// Answer of `POST /tokenize`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Tokenized {
    count: usize,
    max_model_len: usize,
    /// Visual tokens are -200.
    tokens: Vec<i64>,
    /// The text of each; what is no whole character shows as U+FFFD.
    token_strs: Option<Vec<String>>,
}

/// Body of `POST /detokenize`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct DetokenizeRequest {
    model: Option<String>,
    tokens: Vec<i64>,
    #[serde(flatten)]
    #[schema(ignore)]
    extra: Extra,
}

/// Answer of `POST /detokenize`.
#[derive(Debug, Serialize, ToSchema)]
pub struct Detokenized {
    prompt: String,
}

/// `POST /tokenize`
///
/// # Errors
/// Faults of the body.
#[utoipa::path(post, path = "/tokenize", tag = "models", operation_id = "tokenize",
    summary = "The tokens of a text, or of a conversation in the model's template",
    request_body = TokenizeRequest,
    responses((status = 200, description = "The tokens. A video is not fetched: it has as many as every video, all -200.",
        body = Tokenized), Refused))]
pub async fn tokenize(State(state): State<AppState>, request: Request) -> Result<Json<Tokenized>, ApiError> {
    answer(state, request, |received, config, loaded| {
        let request: TokenizeRequest = body::parse(&received.json, config.max_json_values)?;
        let with_texts = request.return_token_strs.unwrap_or(false);
        let ids = token_ids(request, config, loaded)?;
        Ok(Tokenized {
            count: ids.len(),
            max_model_len: loaded.model.max_model_len,
            token_strs: with_texts.then(|| ids.iter().map(|id| text_of(&loaded.tokenizer, &[*id])).collect()),
            tokens: ids.into_iter().map(to_wire).collect(),
        })
    })
    .await
}

/// `POST /detokenize`
///
/// # Errors
/// Faults of the body; ids that the tokenizer does not have.
#[utoipa::path(post, path = "/detokenize", tag = "models", operation_id = "detokenize", summary = "The text of tokens",
    request_body = DetokenizeRequest,
    responses((status = 200, description = "The text; special tokens by their names, visual ones as <image>.",
        body = Detokenized), Refused))]
pub async fn detokenize(
    State(state): State<AppState>,
    request: Request,
) -> Result<Json<Detokenized>, ApiError> {
    answer(state, request, |received, config, loaded| {
        // A whole context is a fair question.
        let max_values = config.max_json_values + loaded.model.max_model_len;
        let request: DetokenizeRequest = body::parse(&received.json, max_values)?;
        validate::check_model(request.model.as_deref(), &loaded.model.id)?;
        validate::check_top_level(&request.extra)?;
        let ids = request.tokens.into_iter().enumerate().map(|(i, id)| from_wire(&loaded.tokenizer, i, id));
        let ids = ids.collect::<Result<Vec<_>, _>>()?;
        Ok(Detokenized { prompt: text_of(&loaded.tokenizer, &ids) })
    })
    .await
}

/// Receives a body and runs `work` on it, on the blocking pool.
async fn answer<T: Send + 'static>(
    state: AppState,
    request: Request,
    work: impl FnOnce(Received, &Config, &Loaded) -> Result<T, ApiError> + Send + 'static,
) -> Result<Json<T>, ApiError> {
    let loaded = state.loaded()?;
    let received = body::receive_json(&state, request).await?;
    let done = spawn_blocking(move || work(received, state.config(), &loaded)).await;
    done.map_err(|error| ApiError::Internal(format!("tokenising: {error}")))?.map(Json)
}

fn token_ids(request: TokenizeRequest, config: &Config, loaded: &Loaded) -> Result<Vec<TokenId>, ApiError> {
    validate::check_top_level(&request.extra)?;
    match (request.prompt, request.messages) {
        (Some(text), None) => {
            validate::check_model(request.model.as_deref(), &loaded.model.id)?;
            if text.len() > config.max_text_bytes {
                let message = format!("the prompt has more than {} bytes of text", config.max_text_bytes);
                return Err(InvalidRequest::field("prompt", message).into());
            }
            Ok(loaded.tokenizer.encode(&text)?)
        }
        (None, Some(messages)) => {
            if request.add_generation_prompt == Some(false) || request.continue_final_message == Some(true) {
                let message =
                    "the template always ends with the beginning of the reply; leave this field out";
                return Err(InvalidRequest::field("add_generation_prompt", message).into());
            }
            let chat = ChatRequest {
                model: request.model,
                messages,
                reasoning_effort: request.reasoning_effort,
                chat_template_kwargs: request.chat_template_kwargs,
                ..ChatRequest::default()
            };
            let valid = validate::validate(chat, None, Limits::new(config, loaded))?;
            let num_visual_tokens = loaded.engine.limits().visual_tokens;
            let conversation = prompt::instructed(valid.conversation, valid.instruction);
            Ok(prompt::build(&conversation, &loaded.tokenizer, num_visual_tokens)?.token_ids)
        }
        _ => Err(InvalidRequest::field("prompt", "send either prompt or messages").into()),
    }
}

fn to_wire(id: TokenId) -> i64 {
    if id == VISUAL_TOKEN { WIRE_VISUAL_TOKEN } else { i64::from(id) }
}

fn from_wire(tokenizer: &Tokenizer, position: usize, id: i64) -> Result<TokenId, InvalidRequest> {
    match TokenId::try_from(id) {
        _ if id == WIRE_VISUAL_TOKEN => Ok(VISUAL_TOKEN),
        Ok(token) if (token as usize) < tokenizer.vocab_size() => Ok(token),
        _ => {
            let message = format!("{id} is no token id below {}", tokenizer.vocab_size());
            Err(InvalidRequest::field(format!("tokens[{position}]"), message))
        }
    }
}

/// The text of `ids`, special tokens and videos by their names.
fn text_of(tokenizer: &Tokenizer, ids: &[TokenId]) -> String {
    let stretches = ids.split_inclusive(|id| *id == VISUAL_TOKEN);
    let texts = stretches.map(|stretch| match stretch.split_last() {
        Some((&VISUAL_TOKEN, text)) => tokenizer.decode_named(text) + VISUAL_TEXT,
        _ => tokenizer.decode_named(stretch),
    });
    texts.collect()
}
