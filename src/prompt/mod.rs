//! From a conversation to token ids with the places of its visual tokens.
//!
//! Called by `http/chat.rs` and the commands, on the blocking pool. Knows nothing of pixels or models.

use std::ops::Range;

pub mod tokenizer;

pub use tokenizer::Tokenizer;

/// One user turn and, unless it is the last, the assistant's reply to it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Turn {
    /// The user's text, without any placeholder.
    pub user: String,
    /// How many videos stand in this turn (0 or 1 for now).
    pub num_videos: usize,
    /// The reply to it; `None` for the turn to be answered.
    pub assistant: Option<String>,
}

/// A conversation to be answered. The last turn has no reply.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Conversation {
    /// Replaces the template's system text.
    pub system: Option<String>,
    pub turns: Vec<Turn>,
}

/// A tokenised conversation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Prompt {
    /// Visual tokens are [`crate::scheduler::VISUAL_TOKEN`].
    pub token_ids: Vec<u32>,
    /// Where each video's visual tokens stand.
    pub video_spans: Vec<Range<usize>>,
}

/// Why no prompt could be made.
#[derive(Debug, thiserror::Error)]
pub enum PromptError {
    #[error("the conversation has no user message to answer; send one")]
    Empty,
    #[error("the tokenizer failed on the text: {0}")]
    Tokenizer(String),
    #[error("cannot read the tokenizer: {0}")]
    Load(String),
}

/// Renders and tokenises `conversation` by the template `qwen2_base`, with `num_visual_tokens` a video.
pub fn build(
    _conversation: &Conversation,
    _tokenizer: &Tokenizer,
    _num_visual_tokens: usize,
) -> Result<Prompt, PromptError> {
    todo!()
}
