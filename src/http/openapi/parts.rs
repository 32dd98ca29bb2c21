//! Schemas that no derive can make: text or a structure, and which fields a request may have.
//!
//! Called by the wire types' attributes and by `mod.rs`.

use serde_json::Value;
use utoipa::openapi::{
    Array, Object, OneOfBuilder, OpenApi, Ref, RefOr, Schema, Type,
    schema::{AdditionalProperties, ArrayBuilder, ObjectBuilder, SchemaType},
};

use crate::{
    config::{Config, ReasoningField},
    http::validate::{Accepted, ForeignField, IN_MESSAGES, IN_PARTS, TOP_LEVEL},
};

/// Requests and what is in them: an unknown field is refused.
const CLOSED: [&str; 18] = [
    "ResponsesStreamOptions",
    "ReasoningOptions",
    "TextOptions",
    "ChatRequest",
    "TokenizeRequest",
    "DetokenizeRequest",
    "StreamOptions",
    "ChatTemplateKwargs",
    "MediaIoKwargs",
    "ImageKnobs",
    "ListedFrame",
    "Message",
    "ContentPart",
    "VideoUrl",
    "InputVideo",
    "FilePart",
    "ImageUrl",
    "SamplingKnobs",
];

/// `additionalProperties: false` where it holds, and the fields that are let through without effect.
pub(super) fn finish(document: &mut OpenApi) {
    let Some(components) = &mut document.components else { return };
    for name in CLOSED {
        if let Some(RefOr::T(Schema::Object(object))) = components.schemas.get_mut(name) {
            object.additional_properties = Some(Box::new(AdditionalProperties::FreeForm(false)));
        }
    }
    for (name, fields) in [("ChatRequest", TOP_LEVEL), ("Message", IN_MESSAGES), ("ContentPart", IN_PARTS)] {
        let Some(RefOr::T(Schema::Object(object))) = components.schemas.get_mut(name) else { continue };
        for field in fields {
            let Some(schema) = foreign(field) else { continue };
            object.properties.entry(field.name.into()).or_insert_with(|| schema.into());
        }
    }
    if let Some(RefOr::T(Schema::Object(message))) = components.schemas.get_mut("Message") {
        for (field, text) in CALLS {
            let any = Object::builder().schema_type(SchemaType::AnyValue).description(Some(text)).build();
            message.properties.insert(field.into(), any.into());
        }
    }
}

/// Fields of messages for function calls and their results.
const CALLS: [(&str, &str); 3] = [
    ("tool_calls", "Calls of an assistant's message: their arguments become its text."),
    ("tool_call_id", "The call that a message of the role tool is the result of; without effect."),
    ("function_call", "A call in OpenAI's older form."),
];

/// A field of other servers at the values that are accepted; `None`: at none but null.
fn foreign(field: &ForeignField) -> Option<Schema> {
    let any = Object::builder().schema_type(SchemaType::AnyValue);
    let any = match (field.accepted, field.values()) {
        (Accepted::UnlessTools(_), _) => any.description(Some(
            "Accepted with `\"tool_choice\": \"none\"` or empty, without effect on the reply.",
        )),
        (_, None) => any.description(Some("Accepted, without effect on the reply.")),
        (_, Some(values)) if values.is_empty() => return None,
        (_, Some(mut values)) => {
            values.push(Value::Null);
            any.description(Some("Without effect; other values are refused.")).enum_values(Some(values))
        }
    };
    Some(any.build().into())
}

/// One of these texts.
fn one_of(texts: &[&str]) -> Schema {
    string().enum_values(Some(texts.iter().copied())).build().into()
}

/// `messages[].role`
pub fn role() -> Schema {
    one_of(&["system", "developer", "user", "assistant", "tool"])
}

/// `messages[].content[].type`
pub fn part_type() -> Schema {
    one_of(&["text", "video_url", "input_video", "video", "file", "image_url"])
}

/// `reasoning_effort`
pub fn reasoning_effort() -> Schema {
    let text = "none asks for the answer without thinking; the others are one and the same.";
    let efforts = one_of(&["none", "minimal", "low", "medium", "high", "xhigh", "max"]);
    OneOfBuilder::new().description(Some(text)).item(efforts).item(null()).build().into()
}

/// `reasoning_format`
pub fn reasoning_format() -> Schema {
    let text = "auto, parsed, deepseek: thinking in fields of its own; hidden: left out; none: text as it is, tags and all, in the \
                content.";
    let formats = one_of(&["auto", "parsed", "deepseek", "hidden", "none"]);
    OneOfBuilder::new().description(Some(text)).item(formats).item(null()).build().into()
}

/// `reasoning_field`
pub fn reasoning_field() -> Schema {
    let text = "The field that holds the thinking: reasoning_content, reasoning, or both with the same text. The server's own \
                choice if left out (--reasoning-field, which is both unless the operator sets it).";
    let fields = one_of(&ReasoningField::ALL.map(ReasoningField::name));
    OneOfBuilder::new().description(Some(text)).item(fields).item(null()).build().into()
}

fn string() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::String)
}

fn null() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::Null)
}

/// `messages[].content`
pub fn content() -> Schema {
    let text = string().description(Some("Shorthand for a part of type text."));
    let part = OneOfBuilder::new().item(text).item(Ref::from_schema_name("ContentPart"));
    let max_parts = Config::default().max_content_parts;
    let list: Array = ArrayBuilder::new().items(part).max_items(Some(max_parts)).build();
    OneOfBuilder::new().item(string()).item(list).build().into()
}

fn url() -> ObjectBuilder {
    string().description(Some("https:, http:, data: or, where the operator allows it, file:"))
}

/// A URL, or an object that holds it.
pub fn video_url() -> Schema {
    OneOfBuilder::new().item(url()).item(Ref::from_schema_name("VideoUrl")).build().into()
}

/// A URL, or an object that holds it.
pub fn image_url() -> Schema {
    OneOfBuilder::new().item(url()).item(Ref::from_schema_name("ImageUrl")).build().into()
}

/// A URL or bare base64, or an object that holds either.
pub fn input_video() -> Schema {
    let text = string().description(Some("A URL as in `video_url`, or the video in base64"));
    OneOfBuilder::new().item(text).item(Ref::from_schema_name("InputVideo")).build().into()
}

/// A URL, or those of the frames that the client sampled itself.
pub fn url_or_frames() -> Schema {
    let max_frames = Config::default().media.max_frames;
    let frame = OneOfBuilder::new().item(url()).item(Ref::from_schema_name("ListedFrame"));
    let frames = ArrayBuilder::new().items(frame).min_items(Some(1)).max_items(Some(max_frames));
    OneOfBuilder::new().item(url()).item(frames).build().into()
}

/// `stop`
pub fn stop() -> Schema {
    let config = Config::default();
    let text = || string().min_length(Some(1)).max_length(Some(config.max_stop_string_bytes));
    let list = ArrayBuilder::new().items(text()).max_items(Some(config.max_stop_strings));
    OneOfBuilder::new()
        .description(Some("Texts that end the answer; they are not part of it. They never cut the thinking or a guided answer. Where tags are \
             text (reasoning_format none, completions) they end it anywhere."))
        .item(text())
        .item(list)
        .item(null())
        .build()
        .into()
}
