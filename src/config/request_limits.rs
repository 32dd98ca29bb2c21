//! Limits of a single request that no flag changes.
//!
//! Used by `http` and `engine`.

/// Prompts in one request to `/v1/completions`.
pub const MAX_PROMPTS: usize = 64;

/// Prompt tokens in one step whose logits are all wanted (`echo` with `logprobs`). Each takes a row
/// of the vocabulary's size, 600 KB.
pub const MAX_SCORED_TOKENS: usize = 64;
