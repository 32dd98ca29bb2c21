//! From wire messages to a conversation of turns, and the videos found on the way.
//!
//! Called by `validate`. Roles must come as: system (optional), then user and assistant in turn, user last. What an
//! assistant's earlier reply thought (`reasoning_content`) is let through and left out of the prompt: the template's
//! finished turns hold the answer alone.

use super::{
    InvalidRequest, clips,
    parts::{self, Part, VideoPart},
    shorten,
};
use crate::{
    config::Config,
    http::types::{ContentPart, Extra, Message, TextOr},
    prompt::{Conversation, Turn},
};

/// Fields of a message that clients echo back or send along without effect on the prompt.
pub const HARMLESS: [&str; 7] =
    ["annotations", "name", "reasoning", "reasoning_content", "refusal", "segment", "reasoning_details"];

/// Checks roles, parts and sizes. With `upload`, a request without a video part gets the upload in
/// its last turn. `as_stills` keeps consecutive pictures separate.
pub fn validate(
    messages: Vec<Message>,
    upload: bool,
    as_stills: bool,
    config: &Config,
) -> Result<(Conversation, Vec<VideoPart>), InvalidRequest> {
    if messages.is_empty() || messages.len() > config.max_messages {
        let message =
            format!("messages has {} entries, but must have 1 to {}", messages.len(), config.max_messages);
        return Err(InvalidRequest::field("messages", message));
    }
    let mut builder = Builder { as_stills, ..Builder::default() };
    for (i, message) in messages.into_iter().enumerate() {
        builder.push(&format!("messages[{i}]"), message, config)?;
    }
    builder.finish(upload, config)
}

#[derive(Default)]
struct Builder {
    conversation: Conversation,
    videos: Vec<VideoPart>,
    text_bytes: usize,
    as_stills: bool,
}

impl Builder {
    fn push(&mut self, path: &str, message: Message, config: &Config) -> Result<(), InvalidRequest> {
        check_message_fields(path, &message.extra)?;
        let before = self.videos.len();
        let text = self.content(path, message.content, config)?;
        let num_videos = self.videos.len() - before;
        let turns = &mut self.conversation.turns;
        let role = message.role.as_str();
        if num_videos > 0 && role != "user" {
            return Err(InvalidRequest::field(
                format!("{path}.content"),
                "a video must be in a user message",
            ));
        }
        let out_of_order = |message| Err(InvalidRequest::field(format!("{path}.role"), message));
        match (role, turns.last_mut()) {
            ("system" | "developer", None) => match &mut self.conversation.system {
                None => self.conversation.system = Some(text),
                Some(_) => return out_of_order("there is more than one system message; join them"),
            },
            ("system" | "developer", Some(_)) => {
                return out_of_order("the system message must be the first one");
            }
            ("user", Some(Turn { assistant: None, .. })) => {
                return out_of_order("two user messages follow each other; join them");
            }
            ("user", _) => {
                turns.push(Turn { user: text, num_videos, assistant: None });
            }
            ("assistant", Some(turn)) if turn.assistant.is_none() => turn.assistant = Some(text),
            ("assistant", _) => return out_of_order("an assistant message must follow a user message"),
            ("tool" | "function", _) => return out_of_order("tools are not supported yet"),
            _ => {
                let message =
                    format!("unknown role \"{}\"; use system, developer, user or assistant", shorten(role));
                return Err(InvalidRequest::field(format!("{path}.role"), message));
            }
        }
        Ok(())
    }

    /// The text of a message, its parts joined by newlines; a video part is kept aside.
    fn content(
        &mut self,
        path: &str,
        content: Option<TextOr<Vec<ContentPart>>>,
        config: &Config,
    ) -> Result<String, InvalidRequest> {
        let path = format!("{path}.content");
        let text = match content {
            None => return Err(InvalidRequest::field(path, "the message has no content")),
            Some(TextOr::Text(text)) => {
                self.count(text.len(), config)?;
                text
            }
            Some(TextOr::Other(parts)) if parts.len() > config.max_content_parts => {
                let message = format!(
                    "content has {} parts, but at most {} are allowed",
                    parts.len(),
                    config.max_content_parts
                );
                return Err(InvalidRequest::field(path, message));
            }
            Some(TextOr::Other(parts)) => {
                let mut read = Vec::with_capacity(parts.len());
                for (i, part) in parts.into_iter().enumerate() {
                    let path = format!("{path}[{i}]");
                    let part = parts::read(&path, part)?;
                    read.push((path, part));
                }
                if !self.as_stills {
                    read = clips::join(read, config.media.max_frames)?;
                }
                let mut texts = Vec::new();
                let before = self.videos.len();
                for (path, part) in read {
                    match part {
                        Part::Text(text) => {
                            // One more for the newline.
                            self.count(text.len() + usize::from(!texts.is_empty()), config)?;
                            texts.push(text);
                        }
                        Part::Video(video) => self.video(path, video, before, config)?,
                    }
                }
                texts.join("\n")
            }
        };
        Ok(text)
    }

    /// Counts text before it is copied together.
    fn count(&mut self, num_bytes: usize, config: &Config) -> Result<(), InvalidRequest> {
        self.text_bytes += num_bytes;
        if self.text_bytes > config.max_text_bytes {
            let message = format!("the messages have more than {} bytes of text", config.max_text_bytes);
            return Err(InvalidRequest::field("messages", message));
        }
        Ok(())
    }

    /// Stores the video of the part at `path`. `before` counts the videos of earlier messages.
    fn video(
        &mut self,
        path: String,
        video: VideoPart,
        before: usize,
        config: &Config,
    ) -> Result<(), InvalidRequest> {
        if self.videos.len() - before >= config.max_videos_per_request {
            return Err(InvalidRequest::field(path, too_many_videos(config)));
        }
        if self.videos.len() >= config.max_videos_per_conversation {
            let message = format!(
                "this server accepts at most {} videos in a conversation (--max-videos-per-conversation); leave out \
                 earlier ones",
                config.max_videos_per_conversation
            );
            return Err(InvalidRequest::field(path, message));
        }
        self.videos.push(video);
        Ok(())
    }

    fn finish(
        mut self,
        upload: bool,
        config: &Config,
    ) -> Result<(Conversation, Vec<VideoPart>), InvalidRequest> {
        let Some(last) = self.conversation.turns.last_mut().filter(|turn| turn.assistant.is_none()) else {
            return Err(InvalidRequest::field("messages", "the last message must be the user's"));
        };
        // An upload without a place of its own stands in the last turn.
        if upload && self.videos.is_empty() {
            if config.max_videos_per_request == 0 {
                return Err(InvalidRequest::field("video", too_many_videos(config)));
            }
            last.num_videos = 1;
        }
        if last.user.trim().is_empty() && self.conversation.turns.iter().all(|turn| turn.num_videos == 0) {
            return Err(InvalidRequest::field(
                "messages",
                "the last message is empty; send a question or a video",
            ));
        }
        Ok((self.conversation, self.videos))
    }
}

fn too_many_videos(config: &Config) -> String {
    format!(
        "this server accepts at most {} videos in a message (--max-videos-per-request), where consecutive pictures are \
         one video and a single picture is one too; send fewer",
        config.max_videos_per_request
    )
}

fn check_message_fields(path: &str, extra: &Extra) -> Result<(), InvalidRequest> {
    for (name, value) in extra {
        let empty = value.is_null() || value.as_array().is_some_and(Vec::is_empty);
        if empty || HARMLESS.contains(&name.as_str()) {
            continue;
        }
        let name = shorten(name);
        let message = match name.as_str() {
            "tool_calls" | "tool_call_id" | "function_call" => "tools are not supported yet".into(),
            "audio" => "audio is not supported".into(),
            _ => format!("unknown field \"{name}\" in a message; known are role, content, name"),
        };
        return Err(InvalidRequest::field(format!("{path}.{name}"), message));
    }
    Ok(())
}
