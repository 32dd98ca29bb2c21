//! The checkpoint's tokenizer.

use std::path::Path;

use super::PromptError;

/// Text to ids and ids to bytes.
#[derive(Debug)]
pub struct Tokenizer {}

impl Tokenizer {
    /// From `tokenizer.json`, or else from `vocab.json` + `merges.txt` (+ `added_tokens.json`, `tokenizer_config.json`).
    pub fn load(_dir: &Path) -> Result<Self, PromptError> {
        todo!()
    }

    /// One token a byte (ids 0..=255) and 256 = end of sequence: for tests without weights.
    pub fn bytes() -> Self {
        todo!()
    }

    /// Ids of `text`; never a special token, whatever the text says, and no begin token.
    pub fn encode(&self, _text: &str) -> Result<Vec<u32>, PromptError> {
        todo!()
    }

    /// The bytes of one token (possibly a part of a character); `None` for special or unknown ids.
    pub fn token_bytes(&self, _id: u32) -> Option<&[u8]> {
        todo!()
    }

    /// Ids 0..vocab_size exist; higher ones of the model's head must never be sampled.
    pub fn vocab_size(&self) -> usize {
        todo!()
    }

    /// The id of `<|endoftext|>` (from tokenizer_config's `eos_token`).
    pub fn end_of_text(&self) -> u32 {
        todo!()
    }
}
