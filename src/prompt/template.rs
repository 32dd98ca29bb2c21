//! The template `qwen2_base`: what stands around the words of a conversation.
//!
//! Called by [`super::build`]; `http/pipeline.rs` and the commands call the two `with_…` functions. It must render byte
//! for byte what the model was trained on, and never read a placeholder or a special token out of a user's text.

use super::{Conversation, PromptError, Turn};

/// The system text of the template.
const SYSTEM: &str = "A chat between a curious user and an artificial intelligence assistant. \
     The assistant gives helpful, detailed, and polite answers to the user's questions.";

/// Asks for the reasoning that the model was trained to write.
pub const THINK_INSTRUCTION: &str =
    "Output the thinking process in <think> </think> and final answer (option) in <answer> </answer> tags.";

/// Asks for the option alone, as the family's models before reinforcement learning were asked.
pub const OPTION_ONLY_INSTRUCTION: &str = "Answer with the option's letter from the given choices directly.";

/// Placeholder of a video in rendered prompts, and in the texts of the original.
const PLACEHOLDER: &str = "<image>";

/// How a reply that thinks begins.
pub const THINK_OPENING: &str = " <think>";

/// Ends a thinking that has no more time, in the model's own voice, and opens the answer but for [`TAG_END`]: a model
/// writes the end of the tag and the first letter of its answer as one token, and knows no answer after another.
pub const THINK_CLOSING: &str = " I have to answer now. </think> <answer";

/// What the token after [`THINK_CLOSING`] begins with.
pub const TAG_END: &str = ">";

/// What the last question of a conversation is asked to be answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instruction {
    /// Thinking and answer, each in its tags.
    Think,
    /// The option alone.
    OptionOnly,
    /// What the question itself says.
    AsAsked,
}

impl Instruction {
    /// `text` with the instruction, unless it has it already.
    pub fn add_to(self, text: &str) -> String {
        match self {
            Instruction::Think => with_instruction(text),
            Instruction::OptionOnly => with_option_only(text),
            Instruction::AsAsked => text.to_owned(),
        }
    }
}

/// `text` with the reasoning instruction on a line of its own, unless it already asks for both tags.
pub fn with_instruction(text: &str) -> String {
    if text.contains("<think>") && text.contains("<answer>") {
        return text.to_owned();
    }
    append_line(text, THINK_INSTRUCTION)
}

/// `text` with the instruction to answer without thinking, unless it already has it.
pub fn with_option_only(text: &str) -> String {
    if text.contains(OPTION_ONLY_INSTRUCTION) {
        return text.to_owned();
    }
    append_line(text, OPTION_ONLY_INSTRUCTION)
}

fn append_line(text: &str, line: &str) -> String {
    match text.trim_end() {
        "" => line.to_owned(),
        text => format!("{text}\n{line}"),
    }
}

/// A stretch of the prompt that is tokenised by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    Text(String),
    /// The visual tokens of one video.
    Video,
    /// The end token, after a finished reply.
    EndOfText,
}

/// The prompt as readable text, with `<image>` for a video and `<|endoftext|>` for the end token.
///
/// # Errors
/// As [`super::build`].
pub fn render(conversation: &Conversation) -> Result<String, PromptError> {
    let pieces = pieces(conversation)?;
    Ok(pieces
        .iter()
        .map(|piece| match piece {
            Piece::Text(text) => text.as_str(),
            Piece::Video => PLACEHOLDER,
            Piece::EndOfText => "<|endoftext|>",
        })
        .collect())
}

/// Splits the rendered conversation where the original splits it before tokenising: at videos and end tokens.
pub(super) fn pieces(conversation: &Conversation) -> Result<Vec<Piece>, PromptError> {
    let (last, finished) = conversation.turns.split_last().ok_or(PromptError::Empty)?;
    if last.assistant.is_some() {
        return Err(PromptError::Empty);
    }
    let mut pieces = Vec::new();
    let mut text = match conversation.system.as_deref().map(trim) {
        None => format!("{SYSTEM} "),
        Some("") => String::new(),
        Some(system) => format!("{system} "),
    };
    for turn in finished {
        let reply = turn.assistant.as_deref().ok_or(PromptError::MissingReply)?;
        push_user(turn, &mut text, &mut pieces);
        text.push(' ');
        text.push_str(reply);
        pieces.extend([Piece::Text(std::mem::take(&mut text)), Piece::EndOfText]);
    }
    push_user(last, &mut text, &mut pieces);
    pieces.push(Piece::Text(text));
    Ok(pieces)
}

/// Renders "USER: … ASSISTANT:". A video comes first in its turn, whatever the client's order. The
/// question follows on the next line, without typed placeholders and stripped, as in the original.
/// A question without a video stays unchanged: the original would read a typed placeholder as a
/// video.
fn push_user(turn: &Turn, text: &mut String, pieces: &mut Vec<Piece>) {
    text.push_str("USER: ");
    if turn.num_videos == 0 {
        text.push_str(&turn.user);
    } else {
        pieces.push(Piece::Text(std::mem::take(text)));
        pieces.extend(std::iter::repeat_n(Piece::Video, turn.num_videos));
        let question = turn.user.replace(PLACEHOLDER, "");
        let question = trim(&question);
        if !question.is_empty() {
            text.push('\n');
            text.push_str(question);
        }
    }
    text.push_str(" ASSISTANT:");
}

/// Python's `str.strip`, which also takes the four separator controls.
fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(text: &str, num_videos: usize) -> Turn {
        Turn { user: text.into(), num_videos, assistant: None }
    }

    fn rendered(conversation: &Conversation) -> String {
        render(conversation).unwrap()
    }

    #[test]
    fn an_empty_question_leaves_the_video_alone() {
        let conversation = Conversation { system: None, turns: vec![user(" \n\u{1f}", 1)] };
        assert_eq!(rendered(&conversation), format!("{SYSTEM} USER: <image> ASSISTANT:"));
    }

    #[test]
    fn a_question_without_video_is_left_as_it_is() {
        let conversation = Conversation { system: Some("Be brief.".into()), turns: vec![user(" Hi \n", 0)] };
        assert_eq!(rendered(&conversation), "Be brief. USER:  Hi \n ASSISTANT:");
    }

    #[test]
    fn an_empty_system_text_leaves_nothing() {
        let conversation = Conversation { system: Some(" ".into()), turns: vec![user("Hi", 0)] };
        assert_eq!(rendered(&conversation), "USER: Hi ASSISTANT:");
    }

    #[test]
    fn a_typed_placeholder_is_removed_beside_a_video_and_never_becomes_one() {
        for (typed, num_videos, left) in [
            ("What <image> is <|endoftext|> it?", 1, "\nWhat  is <|endoftext|> it?"),
            ("<image>\nWhat?", 1, "\nWhat?"),
            ("What?\n<image> <image>", 2, "\nWhat?"),
            ("<image>", 1, ""),
            // One pass, as in the original: a placeholder that results stays text.
            ("<im<image>age> it", 1, "\n<image> it"),
            ("What <image> is it?", 0, "What <image> is it?"),
        ] {
            let conversation =
                Conversation { system: Some(String::new()), turns: vec![user(typed, num_videos)] };
            let mut expected = vec![Piece::Text("USER: ".into())];
            expected.extend(vec![Piece::Video; num_videos]);
            expected.push(Piece::Text(format!("{left} ASSISTANT:")));
            if num_videos == 0 {
                expected = vec![Piece::Text(format!("USER: {left} ASSISTANT:"))];
            }
            assert_eq!(pieces(&conversation).unwrap(), expected, "{typed}");
        }
    }

    #[test]
    fn a_video_may_come_in_a_later_turn() {
        let first = Turn { assistant: Some("Hello.".into()), ..user("Hi", 0) };
        let conversation = Conversation { system: Some(String::new()), turns: vec![first, user("Look", 1)] };
        let expected = "USER: Hi ASSISTANT: Hello.<|endoftext|>USER: <image>\nLook ASSISTANT:";
        assert_eq!(rendered(&conversation), expected);
    }

    #[test]
    fn a_conversation_ends_with_a_question() {
        let finished = Turn { assistant: Some("Hello.".into()), ..user("Hi", 0) };
        let turns = |turns: &[&Turn]| {
            let turns = turns.iter().map(|&turn| turn.clone()).collect();
            pieces(&Conversation { system: None, turns })
        };
        assert!(matches!(turns(&[]), Err(PromptError::Empty)));
        assert!(matches!(turns(&[&finished]), Err(PromptError::Empty)));
        let open = user("Hi", 0);
        assert!(matches!(turns(&[&open, &open]), Err(PromptError::MissingReply)));
    }

    #[test]
    fn the_instruction_is_appended_once() {
        let asked = with_instruction("What?\n");
        assert_eq!(asked, format!("What?\n{THINK_INSTRUCTION}"));
        assert_eq!(with_instruction(&asked), asked);
        assert_eq!(with_instruction(" \n"), THINK_INSTRUCTION);
        assert_eq!(
            with_instruction("What does <think> mean?"),
            format!("What does <think> mean?\n{THINK_INSTRUCTION}")
        );
        let own = "Reason in <think></think>, then answer in <answer></answer>.";
        assert_eq!(with_instruction(own), own);
    }

    #[test]
    fn the_option_only_instruction_is_appended_once() {
        let asked = with_option_only("What?");
        assert_eq!(asked, format!("What?\n{OPTION_ONLY_INSTRUCTION}"));
        assert_eq!(with_option_only(&asked), asked);
    }
}
