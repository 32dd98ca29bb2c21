//! The wire form of a request: what JSON may look like, before anything is checked.
//!
//! Read by `http/body.rs`, turned into a `ValidRequest` by `http/validate`. No other module sees these types.
//! Fields that are not listed land in `extra`, where validation decides: harmless, not built yet, or unknown.

use std::{collections::BTreeMap, fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor, value},
};
use serde_json::{Map, Number, Value};

/// Fields without a place of their own.
pub type Extra = Map<String, Value>;

/// Body of `POST /v1/chat/completions`.
#[derive(Debug, Deserialize)]
pub struct ChatRequest {
    pub model: Option<String>,
    pub messages: Vec<Message>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub presence_penalty: Option<f64>,
    /// Token id (as text, for JSON keys are text) to bias.
    pub logit_bias: Option<BTreeMap<String, f64>>,
    pub seed: Option<Number>,
    pub max_tokens: Option<u64>,
    pub max_completion_tokens: Option<u64>,
    pub stop: Option<TextOr<Vec<String>>>,
    pub stop_token_ids: Option<Vec<u64>>,
    pub ignore_eos: Option<bool>,
    pub response_format: Option<Value>,
    pub structured_outputs: Option<Value>,
    pub guided_choice: Option<Value>,
    pub guided_regex: Option<Value>,
    pub guided_json: Option<Value>,
    pub guided_grammar: Option<Value>,
    pub thinking_token_budget: Option<u64>,
    pub max_thinking_tokens: Option<u64>,
    pub n: Option<u64>,
    pub best_of: Option<u64>,
    pub logprobs: Option<bool>,
    pub top_logprobs: Option<u64>,
    /// Our own: the probability of each option letter where the answer begins.
    pub answer_logprobs: Option<bool>,
    /// Our own: the majority of the choices' answers.
    pub vote: Option<bool>,
    pub include_reasoning: Option<bool>,
    pub reasoning_format: Option<String>,
    pub reasoning_effort: Option<String>,
    pub chat_template_kwargs: Option<ChatTemplateKwargs>,
    pub media_io_kwargs: Option<MediaIoKwargs>,
    #[serde(flatten)]
    pub extra: Extra,
}

#[derive(Debug, Deserialize)]
pub struct StreamOptions {
    pub include_usage: Option<bool>,
    #[serde(flatten)]
    pub extra: Extra,
}

#[derive(Debug, Deserialize)]
pub struct ChatTemplateKwargs {
    pub enable_thinking: Option<bool>,
    #[serde(flatten)]
    pub extra: Extra,
}

/// What clients of vLLM and LMDeploy send through `extra_body`.
#[derive(Debug, Deserialize)]
pub struct MediaIoKwargs {
    pub video: Option<SamplingKnobs>,
    #[serde(flatten)]
    pub extra: Extra,
}

#[derive(Debug, Deserialize)]
pub struct Message {
    pub role: String,
    pub content: Option<TextOr<Vec<ContentPart>>>,
    #[serde(flatten)]
    pub extra: Extra,
}

/// One part of a message's content; `kind` says which of the fields must be there.
#[derive(Debug, Deserialize)]
pub struct ContentPart {
    #[serde(rename = "type")]
    pub kind: String,
    pub text: Option<String>,
    pub video_url: Option<TextOr<VideoUrl>>,
    pub uuid: Option<String>,
    #[serde(flatten)]
    pub extra: Extra,
}

/// A video and, in the same object, how its frames are sampled.
// The knobs are listed again and not flattened: a flattened structure loses the path of a fault.
#[derive(Debug, Default, Deserialize)]
pub struct VideoUrl {
    /// May be left out when the video comes as a part of a multipart body.
    pub url: Option<String>,
    pub uuid: Option<String>,
    pub num_frames: Option<i64>,
    pub fps: Option<f64>,
    pub max_frames: Option<i64>,
    pub start: Option<f64>,
    pub end: Option<f64>,
    #[serde(flatten)]
    pub extra: Extra,
}

impl VideoUrl {
    /// Moves the knobs out.
    pub fn take_knobs(&mut self) -> SamplingKnobs {
        SamplingKnobs {
            num_frames: self.num_frames,
            fps: self.fps,
            max_frames: self.max_frames,
            start: self.start,
            end: self.end,
            extra: std::mem::take(&mut self.extra),
        }
    }
}

/// How frames are sampled.
#[derive(Debug, Default, Deserialize)]
pub struct SamplingKnobs {
    pub num_frames: Option<i64>,
    pub fps: Option<f64>,
    pub max_frames: Option<i64>,
    pub start: Option<f64>,
    pub end: Option<f64>,
    #[serde(flatten)]
    pub extra: Extra,
}

/// Plain text, or the structure `T`.
#[derive(Debug)]
pub enum TextOr<T> {
    Text(String),
    Other(T),
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for TextOr<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrVisitor(PhantomData))
    }
}

/// By hand and not `untagged`, whose errors name neither the field nor the fault.
struct TextOrVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for TextOrVisitor<T> {
    type Value = TextOr<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text or a structure")
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(TextOr::Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Self::Value, E> {
        Ok(TextOr::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
        T::deserialize(value::SeqAccessDeserializer::new(list)).map(TextOr::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        T::deserialize(value::MapAccessDeserializer::new(map)).map(TextOr::Other)
    }
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
