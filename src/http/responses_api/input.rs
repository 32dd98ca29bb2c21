//! From the input of a response to the messages of a chat request.
//!
//! Called by `request.rs`. Only the form is changed here; what the messages say is checked where those of chat requests
//! are.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::http::{
    types::{Extra, TextOr},
    validate::{InvalidRequest, shorten},
};

/// What may stand beside role and content of a message that was an output before.
const IGNORED: [&str; 3] = ["id", "status", "phase"];
/// How the frames of a video are sampled, and its name.
const KNOBS: [&str; 6] = ["num_frames", "fps", "max_frames", "start", "end", "uuid"];

/// One item of the input: a message, or the thinking of an earlier response.
#[derive(Debug, Deserialize, ToSchema)]
pub struct InputItem {
    /// message (or none), function_call, function_call_output, or reasoning, which the model is not
    /// shown again.
    #[serde(rename = "type")]
    kind: Option<String>,
    /// user, assistant, system or developer.
    role: Option<String>,
    /// Text, or a list of input_text, input_image, input_file, input_video, output_text, and whatever the content of a
    /// chat message may have.
    #[schema(value_type = Option<Value>)]
    content: Option<TextOr<Vec<Map<String, Value>>>>,
    #[serde(flatten)]
    #[schema(ignore)]
    extra: Extra,
}

/// Messages of a chat request, and where in this request each was.
#[derive(Debug, Default)]
pub struct Messages {
    pub list: Vec<Value>,
    pub origins: Vec<String>,
}

impl Messages {
    pub fn push(&mut self, message: Value, origin: impl Into<String>) {
        self.list.push(message);
        self.origins.push(origin.into());
    }

    /// Puts `instructions` first: as the system message, or before the text of the one that is there.
    pub fn instruct(&mut self, instructions: &str) {
        let first =
            self.list.first_mut().filter(|first| first["role"] == "system" || first["role"] == "developer");
        match first.map(|message| &mut message["content"]) {
            Some(Value::String(text)) => prepend(text, instructions),
            // Into its first part, so that the places of the parts stay those that were sent.
            Some(Value::Array(parts)) => match parts.first_mut().and_then(|part| part.get_mut("text")) {
                Some(Value::String(text)) => prepend(text, instructions),
                _ => parts.push(json!({"type": "text", "text": instructions})),
            },
            // Without content it is refused.
            Some(_) => {}
            None => {
                self.list.insert(0, json!({"role": "system", "content": instructions}));
                self.origins.insert(0, "instructions".into());
            }
        }
    }

    /// Appends what the client asks.
    ///
    /// # Errors
    /// Items that are not supported.
    pub fn push_input(&mut self, input: TextOr<Vec<InputItem>>) -> Result<(), InvalidRequest> {
        match input {
            TextOr::Text(text) => self.push(json!({"role": "user", "content": text}), "input"),
            TextOr::Other(items) => {
                for (i, item) in items.into_iter().enumerate() {
                    let path = format!("input[{i}]");
                    if let Some(message) = message(&path, item)? {
                        self.push(message, path);
                    }
                }
            }
        }
        Ok(())
    }
}

fn prepend(text: &mut String, instructions: &str) {
    text.insert_str(0, &format!("{instructions}\n"));
}

fn message(path: &str, item: InputItem) -> Result<Option<Value>, InvalidRequest> {
    match item.kind.as_deref() {
        None | Some("message") => {}
        Some("reasoning") => return Ok(None),
        Some("function_call") => return call(path, &item.extra).map(Some),
        Some("function_call_output") => return call_output(path, item.extra).map(Some),
        Some("item_reference") => {
            let message = "items are not kept by themselves; send the item itself, or previous_response_id";
            return Err(InvalidRequest::field(format!("{path}.type"), message));
        }
        Some(kind) => {
            let kind = shorten(kind);
            let message = format!(
                "items of type \"{kind}\" are not supported; use message, function_call, function_call_output or reasoning"
            );
            return Err(InvalidRequest::field(format!("{path}.type"), message));
        }
    }
    let Some(role) = item.role else {
        return Err(InvalidRequest::field(format!("{path}.role"), "the message has no role"));
    };
    let content = match item.content {
        None => Value::Null,
        Some(TextOr::Text(text)) => text.into(),
        Some(TextOr::Other(parts)) => {
            let parts = parts.into_iter().enumerate();
            let parts = parts.map(|(i, part)| content_part(&format!("{path}.content[{i}]"), part));
            parts.collect::<Result<Vec<_>, _>>()?.into()
        }
    };
    let mut message = item.extra;
    IGNORED.iter().for_each(|name| drop(message.shift_remove(*name)));
    message.insert("role".into(), role.into());
    message.insert("content".into(), content);
    Ok(Some(message.into()))
}

/// A call of an earlier response, which belongs to the assistant's message.
fn call(path: &str, item: &Extra) -> Result<Value, InvalidRequest> {
    let Some(arguments) = item.get("arguments").and_then(Value::as_str) else {
        let message = "a function_call needs its arguments, a text of JSON";
        return Err(InvalidRequest::field(format!("{path}.arguments"), message));
    };
    let call = json!({"function": {"name": item.get("name"), "arguments": arguments}});
    Ok(json!({"role": "assistant", "tool_calls": [call]}))
}

/// The result of a call: a text, or content parts.
fn call_output(path: &str, mut item: Extra) -> Result<Value, InvalidRequest> {
    let content = match item.shift_remove("output") {
        Some(Value::String(text)) => Value::String(text),
        Some(Value::Array(parts)) => {
            let mut content = Vec::new();
            for (i, part) in parts.into_iter().enumerate() {
                let path = format!("{path}.output[{i}]");
                let Value::Object(part) = part else {
                    return Err(InvalidRequest::field(path, "a part of an output must be an object"));
                };
                content.push(content_part(&path, part)?);
            }
            content.into()
        }
        _ => {
            let message = "a function_call_output needs its output, a text or a list of parts";
            return Err(InvalidRequest::field(format!("{path}.output"), message));
        }
    };
    Ok(json!({"role": "tool", "content": content}))
}

/// A content part in the form of a chat message. What has no meaning stays, and is refused with its name there.
fn content_part(path: &str, mut part: Map<String, Value>) -> Result<Value, InvalidRequest> {
    let kind = part.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
    match kind.as_str() {
        "input_text" => rename(&mut part, "text"),
        "output_text" => {
            rename(&mut part, "text");
            part.shift_remove("annotations");
            part.shift_remove("logprobs");
        }
        "input_image" => {
            part.shift_remove("detail");
            one_source(path, &part, ["image_url", "file_id"])?;
            if part.contains_key("image_url") { rename(&mut part, "image_url") } else { file(&mut part) }
        }
        "input_file" => {
            part.shift_remove("detail");
            one_source(path, &part, ["file_id", "file_data", "file_url"])?;
            match part.shift_remove("file_url") {
                Some(url) => {
                    rename(&mut part, "video_url");
                    part.shift_remove("filename");
                    part.insert("video_url".into(), url);
                }
                None => file(&mut part),
            }
        }
        // The other form, with `input_video`, is that of chat messages already.
        "input_video" if part.contains_key("video_url") => video(&mut part),
        _ => {}
    }
    Ok(part.into())
}

fn rename(part: &mut Map<String, Value>, kind: &str) {
    part.insert("type".into(), kind.into());
}

/// Moves what names a file into `file`.
fn file(part: &mut Map<String, Value>) {
    rename(part, "file");
    let named = ["file_id", "file_data", "filename"].into_iter();
    let file: Map<_, _> =
        named.filter_map(|name| part.shift_remove(name).map(|value| (name.to_owned(), value))).collect();
    part.insert("file".into(), file.into());
}

/// Moves the knobs into `video_url`.
fn video(part: &mut Map<String, Value>) {
    rename(part, "video_url");
    let mut object = match part.shift_remove("video_url") {
        Some(Value::Object(object)) => object,
        url => Map::from_iter(url.map(|url| ("url".to_owned(), url))),
    };
    for name in KNOBS {
        if let Some(value) = part.shift_remove(name) {
            object.insert(name.into(), value);
        }
    }
    part.insert("video_url".into(), object.into());
}

/// Null is the same as absent.
fn one_source<const N: usize>(
    path: &str,
    part: &Map<String, Value>,
    names: [&str; N],
) -> Result<(), InvalidRequest> {
    let given = names.iter().filter(|name| part.get(**name).is_some_and(|value| !value.is_null()));
    if given.count() > 1 {
        let message =
            format!("there is more than one source for this part; send one of {}", names.join(", "));
        return Err(InvalidRequest::field(path, message));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(input: Value) -> Result<Messages, InvalidRequest> {
        let mut messages = Messages::default();
        messages.push_input(serde_json::from_value(input).unwrap())?;
        Ok(messages)
    }

    fn part(part: Value) -> Value {
        let input = json!([{"role": "user", "content": [part]}]);
        messages(input).unwrap().list[0]["content"][0].clone()
    }

    #[test]
    fn text_is_one_message_of_the_user() {
        let messages = messages(json!("Hi")).unwrap();
        assert_eq!(messages.list, [json!({"role": "user", "content": "Hi"})]);
        assert_eq!(messages.origins, ["input"]);
    }

    #[test]
    fn instructions_and_a_system_message_are_one() {
        for (content, joined) in [
            (json!("b"), json!("a\nb")),
            (json!([{"type": "input_text", "text": "b"}]), json!([{"type": "text", "text": "a\nb"}])),
        ] {
            let input = json!([{"role": "developer", "content": content}, {"role": "user", "content": "Hi"}]);
            let mut messages = messages(input).unwrap();
            messages.instruct("a");
            assert_eq!(messages.list[0], json!({"role": "developer", "content": joined}));
            assert_eq!(messages.origins, ["input[0]", "input[1]"]);
        }
        let mut messages = messages(json!("Hi")).unwrap();
        messages.instruct("a");
        assert_eq!(messages.list[0], json!({"role": "system", "content": "a"}));
        assert_eq!(messages.origins, ["instructions", "input"]);
    }

    #[test]
    fn output_items_go_back_in_and_thinking_is_left_out() {
        let input = json!([
            {"role": "user", "content": "Hi"},
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
            {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
             "content": [{"type": "output_text", "text": "C", "annotations": [], "logprobs": []}]},
            {"role": "user", "content": "Why?"},
        ]);
        let messages = messages(input).unwrap();
        let answer = json!({"role": "assistant", "content": [{"type": "text", "text": "C"}]});
        assert_eq!(messages.list[1], answer);
        assert_eq!(messages.origins, ["input[0]", "input[2]", "input[3]"]);
    }

    #[test]
    fn parts_take_the_form_of_chat_messages() {
        for (own, chat) in [
            (json!({"type": "input_text", "text": "a"}), json!({"type": "text", "text": "a"})),
            (
                json!({"type": "input_image", "image_url": "u", "detail": "auto"}),
                json!({"type": "image_url", "image_url": "u"}),
            ),
            (
                json!({"type": "input_image", "file_id": "file-1"}),
                json!({"type": "file", "file": {"file_id": "file-1"}}),
            ),
            (
                json!({"type": "input_file", "file_data": "d", "filename": "a.mp4"}),
                json!({"type": "file", "file": {"file_data": "d", "filename": "a.mp4"}}),
            ),
            (
                json!({"type": "input_file", "file_url": "u", "filename": "a.mp4"}),
                json!({"type": "video_url", "video_url": "u"}),
            ),
            (
                json!({"type": "input_video", "video_url": "u", "fps": 2}),
                json!({"type": "video_url", "video_url": {"url": "u", "fps": 2}}),
            ),
            (
                json!({"type": "input_video", "video_url": {"url": "u"}, "odd": 1}),
                json!({"type": "video_url", "odd": 1, "video_url": {"url": "u"}}),
            ),
            (
                json!({"type": "input_video", "input_video": {"url": "u"}}),
                json!({"type": "input_video", "input_video": {"url": "u"}}),
            ),
            (json!({"type": "video_url", "video_url": "u"}), json!({"type": "video_url", "video_url": "u"})),
        ] {
            assert_eq!(part(own.clone()), chat, "{own}");
        }
    }

    #[test]
    fn what_cannot_be_a_message_is_refused_with_its_place() {
        for (item, param) in [
            (json!({"type": "function_call_output"}), "input[0].output"),
            (json!({"type": "function_call_output", "output": [1]}), "input[0].output[0]"),
            (json!({"type": "function_call", "name": "f", "arguments": {}}), "input[0].arguments"),
            (json!({"type": "item_reference", "id": "msg_1"}), "input[0].type"),
            (json!({"content": "Hi"}), "input[0].role"),
            (
                json!({"role": "user", "content": [{"type": "input_file", "file_id": "a", "file_url": "b"}]}),
                "input[0].content[0]",
            ),
        ] {
            let refused = messages(json!([item])).unwrap_err();
            assert!(matches!(&refused, InvalidRequest::Field { param: p, .. } if p == param), "{refused:?}");
        }
    }
}
