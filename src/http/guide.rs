//! What steers the replies of one model: grammars, and the words that end its thinking.
//!
//! Made when the model is loaded; asked by `http/pipeline.rs` for each request.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
};

use llguidance::TokenParser;
use tokio::sync::oneshot;
use toktrie::SimpleVob;

use super::{
    error::ApiError,
    state::{AppState, Loaded},
    validate::{Guided, InvalidRequest, ValidRequest},
};
use crate::{
    engine::{AnswerGuide, EndThinking, Guide, GuideTokens, ThinkingGuide},
    output::Verbatim,
    prompt::{
        Constraint, Grammar, GrammarCompiler, PromptError, Tokenizer,
        template::{TAG_END, THINK_CLOSING, THINK_OPENING},
    },
    scheduler::TokenId,
};

/// What follows an answer after thinking.
const ANSWER_CLOSE: &[u8] = b"</answer>";
/// Of a thread that compiles a grammar: about 4 KB a rule, for as many rules as `max_guide_bytes` can hold. Only what is
/// used takes memory.
const COMPILE_STACK_BYTES: usize = 128 << 20;

/// See the module.
#[derive(Debug)]
pub struct Guides {
    compiler: GrammarCompiler,
    tokens: GuideTokens,
    head: Head,
    opening: Vec<TokenId>,
    closing: Vec<TokenId>,
    after_closing: Arc<SimpleVob>,
}

/// A compiled parser that each sequence gets a copy of.
struct Head(Mutex<TokenParser>);

impl std::fmt::Debug for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Head")
    }
}

impl Guides {
    /// For the model whose replies end with `end_token_ids`. Takes some tenths of a second for a large vocabulary.
    ///
    /// # Errors
    /// [`PromptError::Load`] when the vocabulary cannot be used for grammars.
    pub fn new(tokenizer: &Tokenizer, end_token_ids: &[TokenId]) -> Result<Self, PromptError> {
        let compiler = GrammarCompiler::new(tokenizer)?;
        let head = compiler.head().map_err(|error| PromptError::Load(error.to_string()))?;
        let mut end_token_ids = end_token_ids.to_vec();
        end_token_ids.push(tokenizer.end_of_text());
        end_token_ids.retain(|&id| id < compiler.end());
        let tokens = GuideTokens { trie: compiler.trie().clone(), end: compiler.end(), end_token_ids };
        Ok(Guides {
            after_closing: Arc::new(tokens.after_tag(TAG_END.as_bytes())),
            compiler,
            tokens,
            head: Head(Mutex::new(head)),
            opening: tokenizer.encode(THINK_OPENING)?,
            closing: tokenizer.encode(THINK_CLOSING)?,
        })
    }

    fn guide(&self, wanted: &Wanted, end: &EndThinking) -> Result<Option<Guide>, InvalidRequest> {
        let Wanted { guided, thinks, budget } = wanted;
        let answer = guided.as_ref().map(|guided| self.answer(guided, *thinks)).transpose()?;
        let thinking = thinks.then(|| self.thinking(*budget, end));
        if thinking.is_none() && answer.is_none() {
            return Ok(None);
        }
        let param = guided.as_ref().map_or("", |guided| guided.param.as_str());
        let guide = Guide::new(thinking, answer);
        guide.map(Some).map_err(|error| InvalidRequest::field(param, format!("{param}: {error}")))
    }

    fn answer(&self, guided: &Guided, thinking: bool) -> Result<AnswerGuide, InvalidRequest> {
        let Guided { constraint, param } = guided;
        let Grammar { parser, probe, search } = self
            .compiler
            .compile(constraint, thinking)
            .map_err(|error| InvalidRequest::field(param, format!("{param}: {error}")))?;
        let num_reserved = match constraint {
            Constraint::Choice(choices) => choices.iter().map(|choice| self.num_tokens(choice)).max(),
            _ => None,
        };
        Ok(AnswerGuide {
            tokens: self.tokens.clone(),
            parser,
            probe,
            search,
            ends_at_once: thinking,
            num_reserved,
        })
    }

    fn thinking(&self, budget: Option<usize>, end: &EndThinking) -> ThinkingGuide {
        let head = self.head.0.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        let (opening, closing) = (self.opening.clone(), self.closing.clone());
        ThinkingGuide {
            head,
            opening,
            closing,
            after_closing: self.after_closing.clone(),
            budget,
            end: end.clone(),
        }
    }

    fn num_tokens(&self, choice: &str) -> usize {
        self.tokens.trie.greedy_tokenize(&[choice.as_bytes(), ANSWER_CLOSE].concat()).len()
    }
}

/// What a request wants of its guide.
struct Wanted {
    guided: Option<Guided>,
    thinks: bool,
    budget: Option<usize>,
}

/// The guide of a request, if it needs one: `end` may end its thinking. A grammar is compiled on a thread of its own, in
/// one of the places that `state` has for that: it may take long, and the compiler recurses along the client's rules.
///
/// # Errors
/// When no grammar can be made of what the answer must be; names the field it came from.
pub async fn make(
    state: &AppState,
    loaded: &Arc<Loaded>,
    request: &ValidRequest,
    end: &EndThinking,
) -> Result<Option<Guide>, ApiError> {
    let wanted =
        Wanted { guided: request.guided.clone(), thinks: request.thinks(), budget: request.thinking_budget };
    let Some(guided) = &request.guided else { return Ok(loaded.guides.guide(&wanted, end)?) };
    let place = state.grammar_places().clone().acquire_owned().await;
    let (loaded, end, (sender, made)) = (loaded.clone(), end.clone(), oneshot::channel());
    let compile = move || {
        // Held to the end, also when the client has left.
        let _place = place;
        let made = catch_unwind(AssertUnwindSafe(|| loaded.guides.guide(&wanted, &end)));
        // Nobody waits any more: the client has left.
        let _ = sender.send(made);
    };
    let thread = std::thread::Builder::new().name("grammar".into()).stack_size(COMPILE_STACK_BYTES);
    thread.spawn(compile).map_err(|error| ApiError::Internal(format!("no thread for a grammar: {error}")))?;
    match made.await {
        Ok(Ok(made)) => Ok(made?),
        _ => {
            let message =
                format!("{} cannot be made into a grammar here; write it in a simpler way", guided.param);
            Err(InvalidRequest::field(&guided.param, message).into())
        }
    }
}

/// What of a reply the client gets as it is.
pub fn verbatim(request: &ValidRequest) -> Verbatim {
    match (&request.guided, request.thinks()) {
        (None, _) => Verbatim::Nothing,
        (Some(_), true) => Verbatim::Answer,
        (Some(_), false) => Verbatim::Reply,
    }
}

/// Refuses a reply that could not even be the shortest there is.
///
/// # Errors
/// Names `max_tokens`.
pub fn check_room(guide: Option<&Guide>, max_tokens: usize) -> Result<(), InvalidRequest> {
    match guide.map_or(0, Guide::min_tokens) {
        needed if needed > max_tokens => {
            let message = format!(
                "a reply of this form takes at least {needed} tokens, but only {max_tokens} may come; ask for more"
            );
            Err(InvalidRequest::field("max_tokens", message))
        }
        _ => Ok(()),
    }
}
