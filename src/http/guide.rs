//! What steers the replies of one model: grammars, and the words that end its thinking.
//!
//! Made when the model is loaded; asked by `http/pipeline.rs` for each request, on the blocking pool.

use std::sync::{Mutex, PoisonError};

use llguidance::TokenParser;

use super::validate::{Guided, InvalidRequest, ValidRequest};
use crate::{
    engine::{AnswerGuide, EndThinking, Guide, GuideTokens, ThinkingGuide},
    output::Verbatim,
    prompt::{
        Constraint, Grammar, GrammarCompiler, PromptError, Tokenizer,
        template::{THINK_CLOSING, THINK_OPENING},
    },
    scheduler::TokenId,
};

/// What follows an answer after thinking.
const ANSWER_CLOSE: &[u8] = b"</answer>";

/// See the module.
#[derive(Debug)]
pub struct Guides {
    compiler: GrammarCompiler,
    tokens: GuideTokens,
    head: Head,
    opening: Vec<TokenId>,
    closing: Vec<TokenId>,
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
            compiler,
            tokens,
            head: Head(Mutex::new(head)),
            opening: tokenizer.encode(THINK_OPENING)?,
            closing: tokenizer.encode(THINK_CLOSING)?,
        })
    }

    /// The guide of a request, if it needs one: `end` may end its thinking.
    ///
    /// # Errors
    /// When no grammar can be made of what the answer must be; names the field it came from.
    pub fn guide(&self, request: &ValidRequest, end: &EndThinking) -> Result<Option<Guide>, InvalidRequest> {
        let answer =
            request.guided.as_ref().map(|guided| self.answer(guided, request.thinks())).transpose()?;
        let thinking = request.thinks().then(|| self.thinking(request.thinking_budget, end));
        if thinking.is_none() && answer.is_none() {
            return Ok(None);
        }
        let param = request.guided.as_ref().map_or("", |guided| guided.param.as_str());
        let guide = Guide::new(thinking, answer);
        guide.map(Some).map_err(|error| InvalidRequest::field(param, format!("{param}: {error}")))
    }

    fn answer(&self, guided: &Guided, thinking: bool) -> Result<AnswerGuide, InvalidRequest> {
        let Guided { constraint, param } = guided;
        let Grammar { parser, probe } = self
            .compiler
            .compile(constraint, thinking)
            .map_err(|error| InvalidRequest::field(param, format!("{param}: {error}")))?;
        let num_reserved = match constraint {
            Constraint::Choice(choices) => choices.iter().map(|choice| self.num_tokens(choice)).max(),
            _ => None,
        };
        Ok(AnswerGuide { tokens: self.tokens.clone(), parser, probe, ends_at_once: thinking, num_reserved })
    }

    fn thinking(&self, budget: Option<usize>, end: &EndThinking) -> ThinkingGuide {
        let head = self.head.0.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        let (opening, closing) = (self.opening.clone(), self.closing.clone());
        ThinkingGuide { head, opening, closing, budget, end: end.clone() }
    }

    fn num_tokens(&self, choice: &str) -> usize {
        self.tokens.trie.greedy_tokenize(&[choice.as_bytes(), ANSWER_CLOSE].concat()).len()
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
