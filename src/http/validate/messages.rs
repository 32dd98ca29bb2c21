//! From wire messages to a conversation of turns, and the videos found on the way.
//!
//! Called by `validate`. The template has one system text, and turns of a user's text and a reply.
//! So consecutive messages of one role are joined by a newline, as the text parts of one message
//! are. All system and developer messages become the one system text, at any position. The
//! thinking of an earlier reply (`reasoning_content`) is left out of the prompt: the template's
//! finished turns hold the answer alone.

use super::{
    InvalidRequest, clips, fields,
    parts::{self, Part, VideoPart},
    shorten,
    tools::{self, Origin},
};
use crate::{
    config::Config,
    http::types::{ContentPart, Message, TextOr},
    prompt::{Conversation, Turn},
};

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
    /// The last message was the result of a call.
    after_result: bool,
    as_stills: bool,
}

impl Builder {
    fn push(&mut self, path: &str, mut message: Message, config: &Config) -> Result<(), InvalidRequest> {
        let origin = tools::as_text(path, &mut message)?;
        fields::check_message(path, &message.extra)?;
        let before = self.videos.len();
        let text = match message.content {
            // A reply that was cut off within its thinking has no answer.
            None if message.role == "assistant" => String::new(),
            content => self.content(path, content, config)?,
        };
        let num_videos = self.videos.len() - before;
        let role = message.role.as_str();
        let after_result = std::mem::replace(&mut self.after_result, origin == Origin::Result);
        let turns = &mut self.conversation.turns;
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
                None | Some(Turn { assistant: None, .. }) if origin == Origin::Result && !after_result => {
                    let message = "the result of a call must follow the assistant's message with the call";
                    return refused(message.into());
                }
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
            _ => {
                let role = shorten(role);
                return refused(format!(
                    "unknown role \"{role}\"; use system, developer, user, assistant or tool"
                ));
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
            let message = match self.conversation.turns.is_empty() {
                true => "there is no message of the user; add one",
                false => {
                    "the last message must be the user's: the reply is always a new message; remove the one after it"
                }
            };
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
        "this server accepts at most {} videos in a message (--max-videos-per-request), where consecutive pictures are \
         one video and a single picture is one too; send fewer",
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
