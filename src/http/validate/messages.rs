//! From wire messages to a conversation of turns, and the videos found on the way.
//!
//! Called by `validate`. The template has one system text, and turns of a user's text and a reply.
//! So consecutive messages of one role are joined by a newline, as the text parts of one message
//! are. All system and developer messages become the one system text, at any position. The
//! thinking of an earlier reply (`reasoning_content`) is left out of the prompt: the template's
//! finished turns hold the answer alone.

use super::{
    InvalidRequest, fields,
    parts::{self, Part, VideoPart},
    shorten,
};
use crate::{
    config::Config,
    http::types::{ContentPart, Message, TextOr},
    prompt::{Conversation, Turn},
};

/// Checks roles, parts and sizes. With `upload`, a request without a video part gets it in its last turn.
pub fn validate(
    messages: Vec<Message>,
    upload: bool,
    config: &Config,
) -> Result<(Conversation, Vec<VideoPart>), InvalidRequest> {
    if messages.is_empty() || messages.len() > config.max_messages {
        let message =
            format!("messages has {} entries, but must have 1 to {}", messages.len(), config.max_messages);
        return Err(InvalidRequest::field("messages", message));
    }
    let mut builder = Builder::default();
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
}

impl Builder {
    fn push(&mut self, path: &str, message: Message, config: &Config) -> Result<(), InvalidRequest> {
        fields::check_message(path, &message.extra)?;
        let before = self.videos.len();
        let text = match message.content {
            // A reply that was cut off within its thinking has no answer.
            None if message.role == "assistant" => String::new(),
            content => self.content(path, content, config)?,
        };
        let num_videos = self.videos.len() - before;
        let turns = &mut self.conversation.turns;
        let role = message.role.as_str();
        if num_videos > 0 && role != "user" {
            return Err(InvalidRequest::field(
                format!("{path}.content"),
                "a video must be in a user message",
            ));
        }
        let refused = |message| Err(InvalidRequest::field(format!("{path}.role"), message));
        let mut num_newlines = 0;
        match role {
            "system" | "developer" => match &mut self.conversation.system {
                Some(system) => num_newlines = join(system, &text),
                system => *system = Some(text),
            },
            "user" => match turns.last_mut() {
                Some(turn @ Turn { assistant: None, .. }) => {
                    num_newlines = join(&mut turn.user, &text);
                    turn.num_videos += num_videos;
                }
                _ => turns.push(Turn { user: text, num_videos, assistant: None }),
            },
            "assistant" => match turns.last_mut() {
                Some(Turn { assistant: Some(reply), .. }) => num_newlines = join(reply, &text),
                Some(turn) => turn.assistant = Some(text),
                // A greeting, before the user's first message.
                None => turns.push(Turn { assistant: Some(text), ..Turn::default() }),
            },
            "tool" | "function" => return refused("tools are not supported yet".into()),
            _ => {
                let role = shorten(role);
                return refused(format!("unknown role \"{role}\"; use system, developer, user or assistant"));
            }
        }
        self.count(num_newlines, config)
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
                let mut texts = Vec::new();
                for (i, part) in parts.into_iter().enumerate() {
                    let text = self.part(format!("{path}[{i}]"), part, config)?;
                    // One more for the newline.
                    self.count(
                        text.as_ref().map_or(0, |text| text.len() + usize::from(!texts.is_empty())),
                        config,
                    )?;
                    texts.extend(text);
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

    /// The text of a part, if it is one of text.
    fn part(
        &mut self,
        path: String,
        part: ContentPart,
        config: &Config,
    ) -> Result<Option<String>, InvalidRequest> {
        match parts::read(&path, part)? {
            Part::Text(text) => Ok(Some(text)),
            Part::Video(video) if self.videos.len() < config.max_videos_per_request => {
                self.videos.push(video);
                Ok(None)
            }
            Part::Video(_) => Err(InvalidRequest::field(path, too_many_videos(config))),
        }
    }

    fn finish(
        mut self,
        upload: bool,
        config: &Config,
    ) -> Result<(Conversation, Vec<VideoPart>), InvalidRequest> {
        let Some(last) = self.conversation.turns.last_mut().filter(|turn| turn.assistant.is_none()) else {
            let message = "the last message must be the user's: the reply is always a new message; remove the one after it";
            return Err(InvalidRequest::field("messages", message));
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
        "this server accepts at most {} videos and pictures in a request (--max-videos-per-request), of all \
         messages together; send fewer",
        config.max_videos_per_request
    )
}

/// Appends the text of another message of the same role on a new line. Returns the number of
/// newlines added.
fn join(text: &mut String, more: &str) -> usize {
    let num_newlines = usize::from(!text.is_empty() && !more.is_empty());
    if num_newlines > 0 {
        text.push('\n');
    }
    text.push_str(more);
    num_newlines
}
