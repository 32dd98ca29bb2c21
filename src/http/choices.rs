//! What a chat reply shows of its choices beside their text: log probabilities, confidence, the vote.
//!
//! Used by `http/chat.rs` and `http/sse.rs`, so that streams and unary replies show the same.

use std::{collections::BTreeMap, sync::Arc};

use serde::Serialize;
use utoipa::ToSchema;

use super::validate::ValidChoices;
use crate::{
    output::{Answer, ScoredToken},
    prompt::Tokenizer,
    scheduler::TokenId,
};

/// What stands for minus infinity, which JSON cannot say; as in OpenAI's replies.
const NO_PROBABILITY: f32 = -9999.0;

/// Turns what the choices bring along into its wire form, as far as the request asked for it.
#[derive(Debug)]
pub struct ChoiceView {
    pub wanted: ValidChoices,
    pub tokenizer: Arc<Tokenizer>,
}

/// `logprobs` of a choice or of a chunk.
#[derive(Debug, Serialize, ToSchema)]
pub struct Logprobs {
    content: Vec<TokenLogprob>,
    refusal: Option<()>,
}

/// A token of the reply.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TokenLogprob {
    #[serde(flatten)]
    chosen: TokenScore,
    top_logprobs: Vec<TokenScore>,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
struct TokenScore {
    /// Invalid UTF-8 is shown as U+FFFD.
    token: String,
    logprob: f32,
    /// Exact; `None` for ids without bytes.
    bytes: Option<Vec<u8>>,
}

/// How probable each option was where the answer begins; both null when the reply has no such place.
#[derive(Debug, Serialize, ToSchema)]
pub struct AnswerScores {
    /// Natural logarithms of the model's own probabilities.
    answer_logprobs: Option<BTreeMap<char, f32>>,
    /// The same probabilities, divided by their sum.
    answer_confidence: Option<BTreeMap<char, f32>>,
}

/// What most of the choices answer.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
pub struct Vote {
    /// `None` when no choice has an answer.
    answer: Option<String>,
    /// Share of all choices that gave this answer.
    agreement: f64,
    counts: BTreeMap<String, usize>,
    /// The first choice with this answer.
    pub winner: Option<usize>,
}

impl ChoiceView {
    /// `None` when nobody asked, or there is no token to tell of.
    pub fn logprobs(&self, tokens: &[ScoredToken]) -> Option<Logprobs> {
        let content = || tokens.iter().map(|token| self.token_logprob(token)).collect();
        let shown = self.wanted.logprobs && !tokens.is_empty();
        shown.then(|| Logprobs { content: content(), refusal: None })
    }

    /// One token, whoever asked.
    pub fn token_logprob(&self, token: &ScoredToken) -> TokenLogprob {
        TokenLogprob {
            chosen: self.score(token.id, token.logprobs.chosen),
            top_logprobs: token.logprobs.top.iter().map(|&(id, logprob)| self.score(id, logprob)).collect(),
        }
    }

    /// `None` when nobody asked.
    pub fn answer_scores(&self, answer: &Answer) -> Option<AnswerScores> {
        if !self.wanted.answer_logprobs {
            return None;
        }
        let Some(logprobs) = &answer.option_logprobs else {
            return Some(AnswerScores { answer_logprobs: None, answer_confidence: None });
        };
        let total: f32 = logprobs.iter().map(|(_, logprob)| logprob.exp()).sum();
        let confidence = logprobs.iter().map(|&(letter, logprob)| (letter, logprob.exp() / total));
        Some(AnswerScores {
            answer_confidence: (total > 0.0).then(|| confidence.collect()),
            answer_logprobs: Some(logprobs.iter().map(|&(letter, l)| (letter, speakable(l))).collect()),
        })
    }

    /// The vote of the choices' answers, in the order of their indices; `None` when nobody asked.
    pub fn vote(&self, answers: &[Answer]) -> Option<Vote> {
        let chosen = || answers.iter().map(|answer| self.ballot(answer)).collect();
        self.wanted.vote.then(chosen).map(Vote::count)
    }

    /// Returns the vote of an answer: the letter of an option, or its text. JSON counts by value,
    /// whatever its spacing.
    fn ballot(&self, answer: &Answer) -> Option<String> {
        if !self.wanted.is_guided {
            return answer.chosen(self.wanted.options.as_ref());
        }
        let text = answer.chosen(None)?;
        match serde_json::from_str::<serde_json::Value>(&text) {
            Ok(value) => Some(value.to_string()),
            Err(_) => Some(text),
        }
    }

    fn score(&self, id: TokenId, logprob: f32) -> TokenScore {
        let bytes = self.tokenizer.bytes_or_name(id);
        TokenScore {
            token: bytes.map(String::from_utf8_lossy).unwrap_or_default().into_owned(),
            logprob: speakable(logprob),
            bytes: bytes.map(<[u8]>::to_vec),
        }
    }
}

impl Vote {
    /// Choices without an answer do not vote; of equally many votes those with the lowest index count.
    fn count(answers: Vec<Option<String>>) -> Self {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        answers.iter().flatten().for_each(|answer| *counts.entry(answer.clone()).or_default() += 1);
        let most = counts.values().copied().max().unwrap_or(0);
        let has_most = |answer: &Option<String>| answer.as_ref().is_some_and(|answer| counts[answer] == most);
        let winner = answers.iter().position(has_most);
        Vote {
            answer: winner.and_then(|winner| answers[winner].clone()),
            agreement: most as f64 / answers.len() as f64,
            counts,
            winner,
        }
    }
}

/// `logprob` as far as JSON can say it.
pub fn speakable(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { NO_PROBABILITY }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{output::Options, scheduler::TokenLogprobs};

    fn view(wanted: ValidChoices) -> ChoiceView {
        ChoiceView { wanted, tokenizer: Arc::new(Tokenizer::bytes()) }
    }

    fn vote(answers: &[Option<&str>]) -> serde_json::Value {
        let answers = answers.iter().map(|answer| answer.map(str::to_owned)).collect();
        serde_json::to_value(Vote::count(answers)).unwrap()
    }

    #[test]
    fn the_majority_wins_and_ties_go_to_the_lowest_index() {
        assert_eq!(
            vote(&[Some("B"), None, Some("C"), Some("C")]),
            json!({"answer": "C", "agreement": 0.5, "counts": {"B": 1, "C": 2}, "winner": 2})
        );
        assert_eq!(vote(&[None, Some("D"), Some("A")])["winner"], 1);
        assert_eq!(
            vote(&[None, None]),
            json!({"answer": null, "agreement": 0.0, "counts": {}, "winner": null})
        );
    }

    #[test]
    fn answers_vote_by_letter_when_the_question_has_options_else_by_text() {
        let answer = |text: &str| Answer { text: Some(text.into()), is_tagged: true, option_logprobs: None };
        let answers = [answer("C. pick up"), answer("c"), answer("(B)")];
        let wanted =
            ValidChoices { vote: true, options: Some(Options::default()), ..ValidChoices::default() };
        assert_eq!(
            view(wanted.clone()).vote(&answers).unwrap().counts,
            [("B".into(), 1), ("C".into(), 2)].into()
        );
        let by_text = view(ValidChoices { options: None, ..wanted.clone() });
        assert_eq!(by_text.vote(&answers).unwrap().counts.len(), 3);
        assert!(view(ValidChoices { vote: false, ..wanted.clone() }).vote(&answers).is_none());
        // What an answer was held to is its vote, whatever the options of the question.
        let guided = view(ValidChoices { is_guided: true, ..wanted });
        let held = [answer("up"), answer("up"), answer("down")];
        assert_eq!(guided.vote(&held).unwrap().counts, [("up".into(), 2), ("down".into(), 1)].into());
        let json = [answer("{\"object\":\"red\"}"), answer("{ \"object\" :\n \"red\" }")];
        assert_eq!(guided.vote(&json).unwrap().agreement, 1.0);
    }

    #[test]
    fn tokens_are_shown_lossily_and_their_bytes_exactly() {
        let logprobs = TokenLogprobs {
            chosen: -0.5,
            top: vec![(0xc3, -0.5), (256, f32::NEG_INFINITY)],
            watched: vec![],
        };
        let token = ScoredToken { id: 0xc3, logprobs: Box::new(logprobs), thinking: false };
        let shown =
            view(ValidChoices { logprobs: true, ..ValidChoices::default() }).logprobs(&[token]).unwrap();
        let score = json!({"token": "\u{fffd}", "logprob": -0.5, "bytes": [0xc3]});
        let mut expected = score.clone();
        expected["top_logprobs"] =
            json!([score, {"token": "<|endoftext|>", "logprob": -9999.0, "bytes": b"<|endoftext|>"}]);
        assert_eq!(serde_json::to_value(shown).unwrap(), json!({"content": [expected], "refusal": null}));
    }

    #[test]
    fn confidence_is_the_options_probability_among_each_other() {
        let shown = view(ValidChoices { answer_logprobs: true, ..ValidChoices::default() });
        let option_logprobs =
            Some(vec![('A', 0.125f32.ln()), ('B', 0.375f32.ln()), ('C', f32::NEG_INFINITY)]);
        let scores = shown.answer_scores(&Answer { option_logprobs, ..Answer::default() }).unwrap();
        assert_eq!(scores.answer_confidence.unwrap(), [('A', 0.25), ('B', 0.75), ('C', 0.0)].into());
        assert_eq!(scores.answer_logprobs.unwrap()[&'C'], NO_PROBABILITY);
        let none = serde_json::to_value(shown.answer_scores(&Answer::default())).unwrap();
        assert_eq!(none, json!({"answer_logprobs": null, "answer_confidence": null}));
    }
}
