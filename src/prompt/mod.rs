//! From a conversation to token ids with the places of its visual tokens.
//!
//! Called by `http/pipeline.rs` and the commands, on the blocking pool. Knows nothing of pixels or models.

use std::ops::Range;

pub mod grammar;
pub mod template;
pub mod tokenizer;
mod tokenizer_files;

pub use grammar::{Constraint, Function, Grammar, GrammarCompiler, GrammarError, call_prefix};
pub use template::{Instruction, with_instruction};
pub use tokenizer::Tokenizer;

use crate::scheduler::VISUAL_TOKEN;
use template::Piece;
use tokenizer::MAX_TEXT_BYTES;

/// One user turn and, unless it is the last, the assistant's reply to it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Turn {
    /// The user's text, without any placeholder.
    pub user: String,
    /// How many videos stand in this turn, before its text.
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
    #[error("every user message but the last needs the assistant's reply to it; join consecutive ones")]
    MissingReply,
    #[error("the text has {num_bytes} bytes, but at most {max_bytes} are accepted; send a shorter one")]
    TextTooLong { num_bytes: usize, max_bytes: usize },
    #[error("the tokenizer failed on the text: {0}")]
    Tokenizer(String),
    #[error("cannot read the tokenizer: {0}")]
    Load(String),
}

/// `conversation` with `instruction` at the end of its last turn.
pub fn instructed(mut conversation: Conversation, instruction: Instruction) -> Conversation {
    if let Some(last) = conversation.turns.last_mut() {
        last.user = instruction.add_to(&last.user);
    }
    conversation
}

/// Renders and tokenises `conversation` by the template `qwen2_base`, with `num_visual_tokens` a video.
///
/// # Errors
/// When the conversation does not end with a question, lacks a reply in between, or is too long to be tokenised.
pub fn build(
    conversation: &Conversation,
    tokenizer: &Tokenizer,
    num_visual_tokens: usize,
) -> Result<Prompt, PromptError> {
    let pieces = template::pieces(conversation)?;
    let num_bytes =
        pieces.iter().map(|piece| if let Piece::Text(text) = piece { text.len() } else { 0 }).sum();
    if num_bytes > MAX_TEXT_BYTES {
        return Err(PromptError::TextTooLong { num_bytes, max_bytes: MAX_TEXT_BYTES });
    }
    let mut prompt = Prompt::default();
    for piece in pieces {
        let start = prompt.token_ids.len();
        match piece {
            Piece::Text(text) => prompt.token_ids.extend(tokenizer.encode(&text)?),
            Piece::EndOfText => prompt.token_ids.push(tokenizer.end_of_text()),
            Piece::Video => {
                prompt.token_ids.extend(std::iter::repeat_n(VISUAL_TOKEN, num_visual_tokens));
                prompt.video_spans.push(start..start + num_visual_tokens);
            }
        }
    }
    Ok(prompt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_cover_exactly_the_visual_tokens() {
        let turn = Turn { user: "<image>?".into(), num_videos: 1, assistant: Some("Yes.".into()) };
        let last = Turn { assistant: None, ..turn.clone() };
        let conversation = Conversation { system: None, turns: vec![turn, last] };
        let prompt = build(&conversation, &Tokenizer::bytes(), 5).expect("a prompt");
        let covered: Vec<usize> = prompt.video_spans.iter().cloned().flatten().collect();
        let visual: Vec<usize> =
            (0..prompt.token_ids.len()).filter(|&i| prompt.token_ids[i] == VISUAL_TOKEN).collect();
        assert_eq!(prompt.video_spans.len(), 2);
        assert_eq!((covered.len(), covered), (10, visual));
        assert_eq!(prompt.token_ids.iter().filter(|&&id| id == 256).count(), 1);
    }

    #[test]
    fn a_long_conversation_is_refused_as_a_whole() {
        let turn = |assistant| Turn { user: "a".repeat(MAX_TEXT_BYTES / 2), num_videos: 0, assistant };
        let conversation = Conversation { system: None, turns: vec![turn(Some(String::new())), turn(None)] };
        let error = build(&conversation, &Tokenizer::bytes(), 1).expect_err("too long");
        assert!(matches!(error, PromptError::TextTooLong { .. }));
    }
}
