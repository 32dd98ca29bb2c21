//! What a reply answered, and how probable each option was at that place.
//!
//! Used by [`super::stream`] while a reply grows, and by `http` for votes. The answer is the text of the first answer
//! tags, or all text outside the thinking when there are none.

use super::{
    options::{Options, WatchedLetters},
    segmenter::{Found, Tag},
    token_places::TokenPlaces,
};

/// The answer of a finished reply.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Answer {
    /// Trimmed; `None` when there is nothing but thinking.
    pub text: Option<String>,
    /// Whether it stood in answer tags.
    pub is_tagged: bool,
    /// Natural logarithms of the options' probabilities where the answer begins; `None` when nobody asked, or when there
    /// is no such place.
    pub option_logprobs: Option<Vec<(char, f32)>>,
}

impl Answer {
    /// What it counts as in a vote: the letter of one of `options`, or its text when the question has none.
    pub fn chosen(&self, options: Option<&Options>) -> Option<String> {
        let text = self.text.as_deref()?;
        match options {
            Some(options) => options.letter_of(text, self.is_tagged).map(String::from),
            None => Some(text.to_owned()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Place {
    /// No answer tag has come yet.
    #[default]
    Before,
    Inside,
    /// The first answer is complete.
    After,
}

/// Follows a reply to its answer.
#[derive(Debug, Default)]
pub(super) struct AnswerFinder {
    watched: Option<WatchedLetters>,
    place: Place,
    /// Text outside the thinking and before any answer tag; then text of the first answer.
    text: String,
    /// Where the stretch of text began that is being read, bytes of the reply.
    stretch_start: usize,
    option_logprobs: Option<Vec<(char, f32)>>,
}

impl AnswerFinder {
    /// Also reads the probabilities of these letters.
    pub(super) fn watching(watched: Option<WatchedLetters>) -> Self {
        AnswerFinder { watched, ..AnswerFinder::default() }
    }

    /// Takes the next piece of the reply; `thinking` tells where a text stands. `tokens` are not resolved past it.
    pub(super) fn see(&mut self, found: &Found<'_>, thinking: bool, tokens: &TokenPlaces) {
        match found {
            Found::Tag(tag) => {
                self.stretch_start = tokens.resolved_bytes() + found.num_bytes();
                self.tag(*tag, thinking);
            }
            Found::Text(text) if !thinking && self.place != Place::After => {
                if self.text.trim().is_empty()
                    && let Some((offset, _)) = text.char_indices().find(|(_, c)| !c.is_whitespace())
                {
                    self.read_options(tokens.resolved_bytes() + offset, tokens);
                }
                self.text.push_str(text);
            }
            Found::Text(_) => {}
        }
    }

    fn tag(&mut self, tag: Tag, thinking: bool) {
        match (tag, self.place) {
            (Tag::AnswerOpen, Place::Before) => {
                self.place = Place::Inside;
                self.text.clear();
                self.option_logprobs = None;
            }
            (Tag::AnswerClose, Place::Inside) if !thinking => self.place = Place::After,
            // The stretches of a reply are lines.
            (_, Place::Before | Place::Inside) if !self.text.trim().is_empty() => self.text.push('\n'),
            _ => {}
        }
    }

    /// The answer begins at `position`, in one of `tokens`.
    fn read_options(&mut self, position: usize, tokens: &TokenPlaces) {
        let (Some(watched), Some(token)) = (&self.watched, tokens.at(position)) else { return };
        let tag_bytes = self.stretch_start.saturating_sub(token.start);
        if let Some(logprobs) = &token.logprobs {
            self.option_logprobs = watched.option_logprobs(&logprobs.watched, tag_bytes);
        }
    }

    /// The end of the reply.
    pub(super) fn finish(&mut self) -> Answer {
        let text = Some(self.text.trim()).filter(|text| !text.is_empty()).map(str::to_owned);
        Answer { text, is_tagged: self.place != Place::Before, option_logprobs: self.option_logprobs.take() }
    }
}
