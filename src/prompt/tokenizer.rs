//! The checkpoint's tokenizer: text to ids, ids to bytes.
//!
//! Called by [`super::template`] (encode) and [`crate::output`] (bytes of a token). Encoding takes up to some
//! milliseconds: run it on the blocking pool. It must never turn text into a special token.

use std::{collections::HashMap, path::Path};

use super::{PromptError, tokenizer_files};

/// Longest text that is tokenised at once. More than any context holds, and little enough that the split pattern's
/// backtracking stays bounded on text without spaces.
pub const MAX_TEXT_BYTES: usize = 256 << 10;

/// Text to ids and ids to bytes.
pub struct Tokenizer {
    encoder: Encoder,
    /// Bytes of every id; `None` for special ids and holes.
    token_bytes: Vec<Option<Box<[u8]>>>,
    /// Ids of the special tokens, by content.
    special: HashMap<String, u32>,
    end_of_text: u32,
}

enum Encoder {
    Bpe(Box<tokenizers::Tokenizer>),
    Bytes,
}

impl Tokenizer {
    /// From `tokenizer.json`, or else from `vocab.json` + `merges.txt` (+ `added_tokens.json`, `tokenizer_config.json`).
    ///
    /// # Errors
    /// [`PromptError::Load`], with the file's name, when one is missing or is not what it should be.
    pub fn load(dir: &Path) -> Result<Self, PromptError> {
        let config = tokenizer_files::read_optional(dir, "tokenizer_config.json")?;
        if let Some(json) = tokenizer_files::read_optional(dir, "tokenizer.json")? {
            return Self::from_tokenizer_json(&json, config.as_deref());
        }
        let vocab = tokenizer_files::read_required(dir, "vocab.json")?;
        let merges = tokenizer_files::read_required(dir, "merges.txt")?;
        let added = tokenizer_files::read_optional(dir, "added_tokens.json")?;
        Self::from_files(&vocab, &merges, added.as_deref(), config.as_deref())
    }

    /// From the contents of the slow tokenizer's files, as published.
    ///
    /// # Errors
    /// [`PromptError::Load`] as for [`Self::load`].
    pub fn from_files(
        vocab: &[u8],
        merges: &[u8],
        added_tokens: Option<&[u8]>,
        tokenizer_config: Option<&[u8]>,
    ) -> Result<Self, PromptError> {
        let bpe = tokenizer_files::from_vocab_and_merges(vocab, merges, added_tokens, tokenizer_config)?;
        Self::from_bpe(bpe, tokenizer_config)
    }

    /// From the contents of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`PromptError::Load`] as for [`Self::load`].
    pub fn from_tokenizer_json(json: &[u8], tokenizer_config: Option<&[u8]>) -> Result<Self, PromptError> {
        let bpe = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|error| PromptError::Load(format!("tokenizer.json: {error}")))?;
        Self::from_bpe(bpe, tokenizer_config)
    }

    fn from_bpe(
        mut bpe: tokenizers::Tokenizer,
        tokenizer_config: Option<&[u8]>,
    ) -> Result<Self, PromptError> {
        // What a user types is text, also when it reads like a special token.
        bpe.set_encode_special_tokens(true);
        // Some files ask for truncation or padding; a prompt is neither cut nor filled up.
        bpe.with_truncation(None).map_err(|error| PromptError::Load(error.to_string()))?;
        bpe.with_padding(None);
        let (token_bytes, special) = tokenizer_files::token_tables(&bpe)?;
        let name = tokenizer_files::end_of_text(tokenizer_config)?;
        let end_of_text = bpe
            .token_to_id(&name)
            .ok_or_else(|| PromptError::Load(format!("the end token {name} is not in the vocabulary")))?;
        Ok(Tokenizer { encoder: Encoder::Bpe(Box::new(bpe)), token_bytes, special, end_of_text })
    }

    /// One token a byte (ids 0..=255) and 256 = end of sequence: for tests without weights.
    pub fn bytes() -> Self {
        let mut token_bytes: Vec<_> = (0..=u8::MAX).map(|byte| Some(Box::from([byte]))).collect();
        token_bytes.push(None);
        let special = HashMap::from([(tokenizer_files::DEFAULT_END_OF_TEXT.to_owned(), 256)]);
        Tokenizer { encoder: Encoder::Bytes, token_bytes, special, end_of_text: 256 }
    }

    /// Ids of `text`; never a special token, whatever the text says, and no begin token.
    ///
    /// # Errors
    /// [`PromptError::TextTooLong`] above [`MAX_TEXT_BYTES`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, PromptError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(PromptError::TextTooLong { num_bytes: text.len(), max_bytes: MAX_TEXT_BYTES });
        }
        match &self.encoder {
            Encoder::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Encoder::Bpe(bpe) => {
                let encoding = bpe
                    .encode_fast(text, false)
                    .map_err(|error| PromptError::Tokenizer(error.to_string()))?;
                Ok(encoding.get_ids().to_vec())
            }
        }
    }

    /// The bytes of one token (possibly a part of a character); `None` for special or unknown ids.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.token_bytes.get(id as usize)?.as_deref()
    }

    /// The bytes of one token, or what a special token is called; `None` for unknown ids.
    pub fn bytes_or_name(&self, id: u32) -> Option<&[u8]> {
        let name =
            || self.special.iter().find(|(_, special)| **special == id).map(|(name, _)| name.as_bytes());
        self.token_bytes(id).or_else(name)
    }

    /// As [`Self::decode`], with special tokens by their names.
    pub fn decode_named(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().filter_map(|&id| self.bytes_or_name(id)).flatten().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The text of `ids`: special and unknown ids are left out, invalid UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().filter_map(|&id| self.token_bytes(id)).flatten().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Ids 0..vocab_size exist; higher ones of the model's head must never be sampled.
    pub fn vocab_size(&self) -> usize {
        self.token_bytes.len()
    }

    /// The id of `<|endoftext|>` (from tokenizer_config's `eos_token`).
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// The id of a special token such as `<|im_end|>`; `None` when the checkpoint has no such token.
    pub fn special_token(&self, content: &str) -> Option<u32> {
        self.special.get(content).copied()
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({} tokens)", self.vocab_size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_their_own_ids() {
        let tokenizer = Tokenizer::bytes();
        assert_eq!(tokenizer.encode("aé").unwrap(), [97, 0xc3, 0xa9]);
        assert_eq!(tokenizer.decode(&[97, 0xc3, 0xa9, 256, 999]), "aé");
        assert_eq!((tokenizer.vocab_size(), tokenizer.end_of_text()), (257, 256));
        assert_eq!(tokenizer.token_bytes(256), None);
        assert_eq!(tokenizer.special_token("<|endoftext|>"), Some(256));
        assert_eq!(tokenizer.decode_named(&[97, 256, 999]), "a<|endoftext|>");
    }

    #[test]
    fn text_over_the_limit_is_refused() {
        let text = "a".repeat(MAX_TEXT_BYTES + 1);
        let error = Tokenizer::bytes().encode(&text).unwrap_err();
        assert!(matches!(error, PromptError::TextTooLong { num_bytes, .. } if num_bytes == text.len()));
        assert!(Tokenizer::bytes().encode(&text[1..]).is_ok());
    }
}
