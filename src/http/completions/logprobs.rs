//! Log probabilities in the form of `/v1/completions`: lists of texts and numbers.
//!
//! Used by `completions.rs` for the tokens of prompts and replies. Scores of a whole prompt take
//! long to write: for them the caller chooses the thread.

use std::{collections::BTreeMap, sync::Arc};

use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    http::choices::speakable,
    prompt::Tokenizer,
    scheduler::{TokenId, TokenLogprobs},
};

/// Lists with one entry a token: its text, its log probability, those of the most probable tokens
/// and of itself, and the position of its first character in the text.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct TextLogprobs {
    tokens: Vec<String>,
    /// Null for the first token of a prompt, which follows nothing.
    token_logprobs: Vec<Option<f32>>,
    /// Null for the first token of a prompt.
    top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    text_offset: Vec<usize>,
}

impl TextLogprobs {
    /// Appends what came later.
    pub fn extend(&mut self, more: TextLogprobs) {
        self.tokens.extend(more.tokens);
        self.token_logprobs.extend(more.token_logprobs);
        self.top_logprobs.extend(more.top_logprobs);
        self.text_offset.extend(more.text_offset);
    }

    /// Moves the tokens behind `num_chars` characters.
    pub fn shifted(mut self, num_chars: usize) -> Self {
        self.text_offset.iter_mut().for_each(|offset| *offset += num_chars);
        self
    }
}

/// Turns tokens and their scores into [`TextLogprobs`].
#[derive(Debug)]
pub struct TextScorer(pub Arc<Tokenizer>);

impl TextScorer {
    /// Returns the scores of `tokens`, which stand at the character `offset` of the text; moves it
    /// behind them.
    pub fn score<'a>(
        &self,
        tokens: impl IntoIterator<Item = (TokenId, Option<&'a TokenLogprobs>)>,
        offset: &mut usize,
    ) -> TextLogprobs {
        let mut shown = TextLogprobs::default();
        for (id, logprobs) in tokens {
            let text = self.0.decode_named(&[id]);
            shown.token_logprobs.push(logprobs.map(|logprobs| speakable(logprobs.chosen)));
            shown.top_logprobs.push(logprobs.map(|logprobs| self.top(&text, logprobs)));
            // A token may be a part of a character: all of its tokens stand where it begins.
            let bytes = self.0.bytes_or_name(id).unwrap_or_default();
            let goes_on = bytes.first().is_some_and(|&byte| is_continuation(byte));
            shown.text_offset.push(offset.saturating_sub(usize::from(goes_on)));
            *offset += bytes.iter().filter(|&&byte| !is_continuation(byte)).count();
            shown.tokens.push(text);
        }
        shown
    }

    /// Returns the most probable tokens by their text; of tokens with the same text, such as parts
    /// of characters, the most probable one counts.
    fn top(&self, chosen: &str, logprobs: &TokenLogprobs) -> BTreeMap<String, f32> {
        let mut top = BTreeMap::new();
        for &(id, logprob) in &logprobs.top {
            top.entry(self.0.decode_named(&[id])).or_insert(speakable(logprob));
        }
        top.entry(chosen.to_owned()).or_insert(speakable(logprobs.chosen));
        top
    }
}

/// Returns true for the second and later bytes of a character in UTF-8.
fn is_continuation(byte: u8) -> bool {
    byte & 0b1100_0000 == 0b1000_0000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_probable_of_equal_texts_is_shown_and_the_chosen_token_always() {
        let scorer = TextScorer(Arc::new(Tokenizer::bytes()));
        let logprobs = TokenLogprobs {
            chosen: -3.0,
            top: vec![(0xc3, -0.5), (0xc4, -1.0), (u32::from(b'x'), f32::NEG_INFINITY)],
            watched: vec![],
        };
        let mut offset = 5;
        let shown = scorer.score([(u32::from(b'a'), None), (u32::from(b'b'), Some(&logprobs))], &mut offset);
        assert_eq!((shown.tokens, shown.text_offset, offset), (vec!["a".into(), "b".into()], vec![5, 6], 7));
        assert_eq!(shown.token_logprobs, [None, Some(-3.0)]);
        let expected =
            [("\u{fffd}", -0.5), ("b", -3.0), ("x", -9999.0)].map(|(text, l)| (text.to_owned(), l));
        assert_eq!(shown.top_logprobs, [None, Some(expected.into())]);
    }

    #[test]
    fn tokens_of_one_character_share_its_offset() {
        let scorer = TextScorer(Arc::new(Tokenizer::bytes()));
        let ids = "h\u{e9}\u{8996} x".bytes().map(|byte| (u32::from(byte), None));
        let mut offset = 0;
        let shown = scorer.score(ids, &mut offset);
        assert_eq!((shown.text_offset, offset), (vec![0, 1, 1, 2, 2, 2, 3, 4], 5));
    }
}
