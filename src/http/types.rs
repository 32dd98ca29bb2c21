//! The wire form of a request: what JSON may look like, before anything is checked.
//!
//! Read by `http/body.rs`, turned into a `ValidRequest` by `http/validate`. No other module sees these types.
//! Fields that are not listed land in `extra`, where validation decides: without effect at this
//! value, or refused.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Number, Value};
use utoipa::ToSchema;

use super::openapi::parts;
pub use super::text_or::TextOr;

/// Fields without a place of their own.
pub type Extra = Map<String, Value>;

/// Body of `POST /v1/chat/completions`.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct ChatRequest {
    /// The served model; may be left out.
    pub model: Option<String>,
    /// Roles are system, developer, user and assistant. The last message that is not a system or
    /// developer message must be the user's. Consecutive messages of one role are joined by a
    /// newline; all system and developer messages become one system text.
    #[schema(min_items = 1, max_items = 128)]
    pub messages: Vec<Message>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    /// 0 is greedy.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f64>,
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// -1 and 0 mean no limit.
    #[schema(minimum = -1)]
    pub top_k: Option<i64>,
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f64>,
    #[schema(minimum = 0.01, maximum = 10)]
    pub repetition_penalty: Option<f64>,
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f64>,
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f64>,
    /// Token id (as text, for JSON keys are text) to bias.
    pub logit_bias: Option<BTreeMap<String, f64>>,
    /// The same seed gives the same text.
    #[schema(value_type = Option<i64>)]
    pub seed: Option<Number>,
    #[schema(minimum = 1)]
    pub max_tokens: Option<u64>,
    /// The same as `max_tokens`.
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<u64>,
    /// Neither an end token nor a stop string ends the reply before it has so many tokens; at most
    /// `max_tokens`. A guided answer ends with its grammar all the same.
    pub min_tokens: Option<u64>,
    #[schema(schema_with = parts::stop, required = false)]
    pub stop: Option<TextOr<Vec<String>>>,
    /// Tokens that end the reply wherever they come, in the thinking too.
    pub stop_token_ids: Option<Vec<u64>>,
    pub ignore_eos: Option<bool>,
    /// text, json_object, or json_schema with `json_schema.schema`: what the answer must be. The thinking stays free.
    #[schema(value_type = Option<Object>)]
    pub response_format: Option<Value>,
    /// Exactly one of `choice` (a list of texts), `regex`, `json` (a schema), `grammar` (Lark's notation), `json_object`.
    #[schema(value_type = Option<Object>)]
    pub structured_outputs: Option<Value>,
    /// The same as `structured_outputs.choice`.
    #[schema(value_type = Option<Vec<String>>)]
    pub guided_choice: Option<Value>,
    /// The same as `structured_outputs.regex`.
    #[schema(value_type = Option<String>)]
    pub guided_regex: Option<Value>,
    /// The same as `structured_outputs.json`; a schema, or its text.
    pub guided_json: Option<Value>,
    /// The same as `structured_outputs.grammar`.
    #[schema(value_type = Option<String>)]
    pub guided_grammar: Option<Value>,
    /// Functions, as OpenAI's. The answer can be made to call one of them; the model is not shown
    /// them, and cannot choose whether to call any.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Value>,
    /// none; required, for a call of one of the functions; or an object with the name of the
    /// function to call. Needed with `tools`, for auto is refused.
    pub tool_choice: Option<Value>,
    /// After so many tokens of thinking the model is made to answer.
    pub thinking_token_budget: Option<u64>,
    /// The same as `thinking_token_budget`.
    pub max_thinking_tokens: Option<u64>,
    /// Replies on one prompt, which is computed once. Choice 0 is the reply to the same seed alone.
    /// The maximum is the server's `--max-n`, 8 by default.
    #[schema(minimum = 1)]
    pub n: Option<u64>,
    /// Must equal `n`: all choices are returned.
    pub best_of: Option<u64>,
    /// Log probabilities of all tokens of the reply, those of the thinking and the tags included unless the thinking is hidden:
    /// of the model's own distribution, before penalties, bias and temperature.
    pub logprobs: Option<bool>,
    /// The most probable tokens beside each of the reply's; needs `logprobs`.
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<u64>,
    /// Tells of each choice how probable every option letter was where the answer began. The options are lines of the last
    /// message that begin with "A.", "A:", "A)" or "(A)", or else A to D.
    pub answer_logprobs: Option<bool>,
    /// Takes the majority of the answers of `n` choices: by letter when the question has options, else by the text.
    pub vote: Option<bool>,
    /// false leaves the thinking out of the reply.
    pub include_reasoning: Option<bool>,
    #[schema(schema_with = parts::reasoning_format, required = false)]
    pub reasoning_format: Option<String>,
    #[schema(schema_with = parts::reasoning_field, required = false)]
    pub reasoning_field: Option<String>,
    #[schema(schema_with = parts::reasoning_effort, required = false)]
    pub reasoning_effort: Option<String>,
    pub chat_template_kwargs: Option<ChatTemplateKwargs>,
    pub media_io_kwargs: Option<MediaIoKwargs>,
    /// Requests share cached work only with those of the same salt.
    #[schema(min_length = 1, max_length = 128)]
    pub cache_salt: Option<String>,
    /// Seconds from the request's arrival to its last token; at most the server's own limit.
    #[schema(exclusive_minimum = 0)]
    pub timeout: Option<f64>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub extra: Extra,
}

/// The same request as `multipart/form-data`; read by `http/body.rs`, this is its description.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "for the document only")]
pub struct ChatForm {
    /// The JSON. Its video part may be left out: the video then belongs to the last message.
    request: ChatRequest,
    /// The video file.
    #[schema(value_type = Option<String>, format = Binary)]
    video: Option<Vec<u8>>,
}

#[derive(Debug, Deserialize, ToSchema)]
pub struct StreamOptions {
    /// Sends a last chunk with `usage` and without choices.
    pub include_usage: Option<bool>,
    /// Sends `usage` with every chunk: the tokens so far, of all choices together.
    pub continuous_usage_stats: Option<bool>,
    /// Pads every chunk with random text in `obfuscation`, so that the size of a chunk does not
    /// reveal the length of its text.
    pub include_obfuscation: Option<bool>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub extra: Extra,
}

#[derive(Debug, Deserialize, ToSchema)]
pub struct ChatTemplateKwargs {
    pub enable_thinking: Option<bool>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub extra: Extra,
}

/// What clients of vLLM and LMDeploy send through `extra_body`.
#[derive(Debug, Deserialize, ToSchema)]
pub struct MediaIoKwargs {
    pub video: Option<SamplingKnobs>,
    pub image: Option<ImageKnobs>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub extra: Extra,
}

/// Settings for pictures. Two or more consecutive pictures of a message are the frames of one
/// video.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct ImageKnobs {
    /// false treats each picture as a separate still image.
    pub as_video: Option<bool>,
    /// Rate at which the client sampled the pictures, frames per second.
    #[schema(exclusive_minimum = 0)]
    pub fps: Option<f64>,
    /// Presentation time of each picture, seconds, ascending; excludes `fps`.
    pub timestamps: Option<Vec<f64>>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub extra: Extra,
}

#[derive(Debug, Deserialize, ToSchema)]
pub struct Message {
    #[schema(schema_with = parts::role)]
    pub role: String,
    #[serde(default, deserialize_with = "text_or_parts")]
    #[schema(schema_with = parts::content, required = false)]
    pub content: Option<TextOr<Vec<ContentPart>>>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub extra: Extra,
}

/// Reads the content of a message. OpenAI's examples send text parts as bare strings.
fn text_or_parts<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<TextOr<Vec<ContentPart>>>, D::Error> {
    let content: Option<TextOr<Vec<TextOr<ContentPart>>>> = Option::deserialize(deserializer)?;
    let part = |part| match part {
        TextOr::Text(text) => ContentPart { kind: "text".into(), text: Some(text), ..ContentPart::default() },
        TextOr::Other(part) => part,
    };
    Ok(match content {
        None => None,
        Some(TextOr::Text(text)) => Some(TextOr::Text(text)),
        Some(TextOr::Other(parts)) => Some(TextOr::Other(parts.into_iter().map(part).collect())),
    })
}

/// One part of a message's content; `type` says which one of the fields up to `image_url` must be there.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct ContentPart {
    #[serde(rename = "type")]
    #[schema(schema_with = parts::part_type)]
    pub kind: String,
    pub text: Option<String>,
    #[schema(schema_with = parts::video_url, required = false)]
    pub video_url: Option<TextOr<VideoUrl>>,
    /// llama.cpp's: a URL, bare base64, or an object with either.
    #[schema(schema_with = parts::input_video, required = false)]
    pub input_video: Option<TextOr<InputVideo>>,
    /// Qwen's: a URL, or the URLs of frames.
    #[schema(schema_with = parts::url_or_frames, required = false)]
    pub video: Option<TextOr<Vec<TextOr<ListedFrame>>>>,
    /// OpenAI's.
    pub file: Option<FilePart>,
    /// A picture. Consecutive pictures are the frames of one video (see `media_io_kwargs.image`);
    /// a single picture is a still image. A video or GIF is known by its first bytes.
    #[schema(schema_with = parts::image_url, required = false)]
    pub image_url: Option<TextOr<ImageUrl>>,
    /// The client's own name for this video or picture. A later request with the same API key and
    /// `cache_salt` may send the name without the content. A name stands for what was sent under it
    /// last.
    #[schema(min_length = 1, max_length = 256)]
    pub uuid: Option<String>,
    // Qwen's clients send the knobs beside the video.
    pub num_frames: Option<i64>,
    pub fps: Option<f64>,
    pub max_frames: Option<i64>,
    pub start: Option<f64>,
    pub end: Option<f64>,
    /// Presentation time of each frame of a list, seconds, ascending; excludes `fps`.
    pub timestamps: Option<Vec<f64>>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub extra: Extra,
}

/// A frame of a list, as an object that holds its URL.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ListedFrame {
    /// image_url, or omitted.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    #[schema(schema_with = parts::image_url)]
    pub image_url: Option<TextOr<ImageUrl>>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub extra: Extra,
}

/// A video and, in the same object, how its frames are sampled.
// The knobs are listed again and not flattened: a flattened structure loses the path of a fault.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct VideoUrl {
    /// May be left out when the video comes as a part of a multipart body, or was sent under this
    /// `uuid` before.
    pub url: Option<String>,
    /// The same as `uuid` of the part.
    #[schema(min_length = 1, max_length = 256)]
    pub uuid: Option<String>,
    pub num_frames: Option<i64>,
    pub fps: Option<f64>,
    pub max_frames: Option<i64>,
    pub start: Option<f64>,
    pub end: Option<f64>,
    /// Presentation time of each frame of a list, seconds, ascending; excludes `fps`.
    pub timestamps: Option<Vec<f64>>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub extra: Extra,
}

impl VideoUrl {
    /// The knobs in the object; the fields without a place go with them.
    pub fn take_knobs(&mut self) -> SamplingKnobs {
        let extra = std::mem::take(&mut self.extra);
        let VideoUrl { num_frames, fps, max_frames, start, end, .. } = *self;
        SamplingKnobs { num_frames, fps, max_frames, start, end, extra }
    }
}

impl ContentPart {
    /// The knobs beside the video; the fields without a place go with them.
    pub fn take_knobs(&mut self) -> SamplingKnobs {
        let extra = std::mem::take(&mut self.extra);
        let ContentPart { num_frames, fps, max_frames, start, end, .. } = *self;
        SamplingKnobs { num_frames, fps, max_frames, start, end, extra }
    }
}

/// A video by its URL or as bare base64.
#[derive(Debug, Deserialize, ToSchema)]
pub struct InputVideo {
    pub url: Option<String>,
    /// Bare base64, or a `data:` URL.
    pub data: Option<String>,
    /// Without effect, as in `mp4`: containers are known by their bytes.
    #[expect(dead_code, reason = "containers are known by their bytes, whatever the client calls them")]
    pub format: Option<String>,
    /// The same as `uuid` of the part.
    #[schema(min_length = 1, max_length = 256)]
    pub uuid: Option<String>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub extra: Extra,
}

/// A video that was uploaded before, or the video itself.
#[derive(Debug, Deserialize, ToSchema)]
pub struct FilePart {
    pub file_id: Option<String>,
    /// A `data:` URL or bare base64.
    pub file_data: Option<String>,
    #[expect(dead_code, reason = "containers are known by their bytes, whatever the file is called")]
    pub filename: Option<String>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub extra: Extra,
}

/// A still.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ImageUrl {
    /// May be left out when the picture was sent before under this `uuid`.
    pub url: Option<String>,
    /// The same as `uuid` of the part.
    #[schema(min_length = 1, max_length = 256)]
    pub uuid: Option<String>,
    /// auto, low or high: one and the same here, for the model has one input size.
    pub detail: Option<String>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub extra: Extra,
}

/// How frames are sampled.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct SamplingKnobs {
    pub num_frames: Option<i64>,
    pub fps: Option<f64>,
    pub max_frames: Option<i64>,
    pub start: Option<f64>,
    pub end: Option<f64>,
    #[serde(flatten)]
    #[schema(ignore)]
    pub extra: Extra,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<ChatRequest, String> {
        let mut reader = serde_json::Deserializer::from_str(json);
        serde_path_to_error::deserialize(&mut reader).map_err(|e| format!("{}: {}", e.path(), e.inner()))
    }

    #[test]
    fn a_video_url_is_text_or_an_object() {
        let request = parse(
            r#"{"messages":[{"role":"user","content":[
                {"type":"video_url","video_url":"https://a/b.mp4"},
                {"type":"video_url","video_url":{"url":"https://a/c.mp4","fps":2,"odd":1}}]}]}"#,
        )
        .unwrap();
        let Some(TextOr::Other(parts)) = &request.messages[0].content else { panic!("parts expected") };
        assert!(matches!(&parts[0].video_url, Some(TextOr::Text(url)) if url == "https://a/b.mp4"));
        let Some(TextOr::Other(object)) = &parts[1].video_url else { panic!("object expected") };
        assert_eq!(object.url.as_deref(), Some("https://a/c.mp4"));
        assert_eq!(object.fps, Some(2.0));
        assert!(object.extra.contains_key("odd"));
    }

    #[test]
    fn a_fault_is_named_by_its_path() {
        let error =
            parse(r#"{"messages":[{"role":"user","content":"hi"}],"temperature":"hot"}"#).unwrap_err();
        assert!(error.starts_with("temperature: invalid type: string \"hot\""), "{error}");
        let error =
            parse(r#"{"messages":[{"role":"user","content":[{"type":"text","text":5}]}]}"#).unwrap_err();
        assert!(error.starts_with("messages[0].content[0].text: "), "{error}");
    }

    #[test]
    fn null_is_the_same_as_absent() {
        let request = parse(r#"{"messages":[],"temperature":null,"stop":null,"video":null}"#).unwrap();
        assert!(request.temperature.is_none() && request.stop.is_none());
        assert!(request.extra.contains_key("video"));
    }
}
