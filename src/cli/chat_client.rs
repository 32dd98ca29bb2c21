//! A client of any OpenAI-compatible chat server, as far as `ask` and `bench` need one.
//!
//! Streams only. It never retries: what failed is told.

use std::{pin::Pin, time::Duration};

use bytes::Bytes;
use futures_util::Stream;
use reqwest::{RequestBuilder, Response, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use url::{Host, Url};

use super::sse_client::{SseError, SseReader, innermost};

/// How long a server may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Most of an error's body that is read.
const MAX_ERROR_BYTES: usize = 64 << 10;
/// Longest text of metrics that is read.
const MAX_METRICS_BYTES: usize = 4 << 20;

/// Why a request failed, as one sentence.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    #[error("cannot reach {url}: {message}")]
    Unreachable { url: String, message: String },
    #[error("{url} hung up without an answer ({message}); it may be busy, or the video too large for it")]
    HungUp { url: String, message: String },
    #[error("no answer from {url} within the time limit; raise --timeout-s if the server is slow")]
    Timeout { url: String },
    #[error("the server answered {status}: {message}")]
    Status { status: StatusCode, message: String },
    #[error("the server broke off: {0}")]
    Server(String),
    #[error("the server sent something that is no chat completion: {0}")]
    BadChunk(String),
    #[error("the connection ended before the reply did")]
    Ended,
    #[error(transparent)]
    Sse(#[from] SseError),
}

/// What a request cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    #[serde(default)]
    pub prompt_tokens: usize,
    #[serde(default)]
    pub completion_tokens: usize,
    #[serde(default, alias = "completion_tokens_details", deserialize_with = "reasoning_tokens")]
    pub reasoning_tokens: usize,
}

fn reasoning_tokens<'de, D: serde::Deserializer<'de>>(details: D) -> Result<usize, D::Error> {
    let details = Value::deserialize(details)?;
    Ok(details.get("reasoning_tokens").and_then(Value::as_u64).unwrap_or(0) as usize)
}

/// One event of a reply; what it does not bring is empty.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChatChunk {
    /// `reasoning_content`, or `reasoning`.
    pub think: String,
    pub content: String,
    pub finish_reason: Option<String>,
    pub usage: Option<Usage>,
    /// Which frames of the video were used (this server only).
    pub video: Option<Value>,
}

impl ChatChunk {
    /// Whether it brings text.
    pub fn has_text(&self) -> bool {
        !self.think.is_empty() || !self.content.is_empty()
    }
}

/// A server and how to talk to it.
#[derive(Debug, Clone)]
pub struct ChatClient {
    http: reqwest::Client,
    base: Url,
    api_key: Option<String>,
    timeout: Duration,
}

impl ChatClient {
    /// For the server at `base`, with or without `/v1`; `timeout` bounds each whole request.
    pub fn new(base: &Url, api_key: Option<String>, timeout: Duration) -> Result<Self, ChatError> {
        let mut builder = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none());
        if is_loopback(base) {
            // A proxy set for the outside world cannot reach this machine's own server.
            builder = builder.no_proxy();
        }
        let unreachable = |message| ChatError::Unreachable { url: base.to_string(), message };
        let http = builder.build().map_err(|error| unreachable(innermost(&error)))?;
        if base.cannot_be_a_base() {
            return Err(unreachable("not an http URL".into()));
        }
        Ok(ChatClient { http, base: base.clone(), api_key, timeout })
    }

    /// The name of the first model that the server lists.
    pub async fn first_model(&self) -> Result<String, ChatError> {
        let response = self.send(self.http.get(self.endpoint("models"))).await?;
        let body = read_bounded(response, MAX_ERROR_BYTES).await;
        let models: Value =
            serde_json::from_slice(&body).map_err(|error| ChatError::BadChunk(error.to_string()))?;
        let name = models["data"][0]["id"].as_str();
        name.map(str::to_owned).ok_or_else(|| ChatError::BadChunk("an empty list of models".into()))
    }

    /// What the server's `/metrics` says; `None` where there is no such thing.
    pub async fn metrics(&self) -> Option<String> {
        let mut url = self.base.clone();
        url.set_path("/metrics");
        let response = self.send(self.http.get(url)).await.ok()?;
        String::from_utf8(read_bounded(response, MAX_METRICS_BYTES).await).ok()
    }

    /// Posts a JSON request; the reply streams.
    pub async fn post_json(&self, body: Vec<u8>) -> Result<ChatStream, ChatError> {
        let request = self.http.post(self.endpoint("chat/completions"));
        self.stream(request.header("content-type", "application/json").body(body)).await
    }

    /// Posts a multipart request; the reply streams.
    pub async fn post_form(&self, form: reqwest::multipart::Form) -> Result<ChatStream, ChatError> {
        self.stream(self.http.post(self.endpoint("chat/completions")).multipart(form)).await
    }

    async fn stream(&self, request: RequestBuilder) -> Result<ChatStream, ChatError> {
        let response = self.send(request.header("accept", "text/event-stream")).await?;
        Ok(ChatStream { events: SseReader::new(Box::pin(response.bytes_stream())) })
    }

    fn endpoint(&self, path: &str) -> Url {
        let mut url = self.base.clone();
        let base = url.path().trim_end_matches('/').to_owned();
        let base = base.strip_suffix("/v1").unwrap_or(&base);
        url.set_path(&format!("{base}/v1/{path}"));
        url
    }

    async fn send(&self, mut request: RequestBuilder) -> Result<Response, ChatError> {
        if let Some(key) = &self.api_key {
            request = request.bearer_auth(key);
        }
        let response = request.timeout(self.timeout).send().await.map_err(|error| {
            let (url, message) = (self.base.to_string(), innermost(&error));
            // Connecting has a limit of its own, and is no slow answer.
            if error.is_connect() {
                ChatError::Unreachable { url, message }
            } else if error.is_timeout() {
                ChatError::Timeout { url }
            } else {
                ChatError::HungUp { url, message }
            }
        })?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = read_bounded(response, MAX_ERROR_BYTES).await;
        Err(ChatError::Status { status, message: error_message(&body) })
    }
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// The beginning of a body; what cannot be read is left out.
async fn read_bounded(mut response: Response, max_bytes: usize) -> Vec<u8> {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        let room = max_bytes - body.len();
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if body.len() == max_bytes {
            break;
        }
    }
    body
}

/// The sentence in an error's body, in the forms servers of this field send.
fn error_message(body: &[u8]) -> String {
    let json: Value = serde_json::from_slice(body).unwrap_or_default();
    let places = [&json["error"]["message"], &json["error"], &json["message"], &json["detail"]];
    match places.into_iter().find_map(Value::as_str) {
        Some(message) => message.to_owned(),
        None if body.is_empty() => "no explanation".to_owned(),
        None => String::from_utf8_lossy(body).chars().take(300).collect(),
    }
}

type Body = Pin<Box<dyn Stream<Item = Result<Bytes, reqwest::Error>> + Send>>;

/// A reply as it comes. Dropping it hangs up.
pub struct ChatStream {
    events: SseReader<Body>,
}

impl std::fmt::Debug for ChatStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ChatStream")
    }
}

impl ChatStream {
    /// The next chunk; `None` after `[DONE]`.
    ///
    /// # Errors
    /// When the server sends an error, hangs up before `[DONE]`, or takes too long.
    pub async fn next(&mut self) -> Result<Option<ChatChunk>, ChatError> {
        match self.events.next().await?.ok_or(ChatError::Ended)?.trim() {
            "[DONE]" => Ok(None),
            data => parse_chunk(data).map(Some),
        }
    }
}

#[derive(Deserialize)]
struct WireChunk {
    #[serde(default)]
    choices: Vec<WireChoice>,
    usage: Option<Usage>,
    video: Option<Value>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct WireChoice {
    #[serde(default)]
    delta: WireDelta,
    finish_reason: Option<String>,
}

#[derive(Deserialize, Default)]
struct WireDelta {
    content: Option<String>,
    reasoning_content: Option<String>,
    reasoning: Option<String>,
}

fn parse_chunk(data: &str) -> Result<ChatChunk, ChatError> {
    let bad = |error: serde_json::Error| ChatError::BadChunk(error.to_string());
    let wire: WireChunk = serde_json::from_str(data).map_err(bad)?;
    if wire.error.is_some() {
        return Err(ChatError::Server(error_message(data.as_bytes())));
    }
    let mut chunk = ChatChunk { usage: wire.usage, video: wire.video, ..ChatChunk::default() };
    if let Some(choice) = wire.choices.into_iter().next() {
        // Both names carry the same text.
        chunk.think = choice.delta.reasoning_content.or(choice.delta.reasoning).unwrap_or_default();
        chunk.content = choice.delta.content.unwrap_or_default();
        chunk.finish_reason = choice.finish_reason;
    }
    Ok(chunk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_of_every_server_are_read() {
        let ours = r#"{"id":"x","choices":[{"index":0,"delta":{"reasoning_content":"a","reasoning":"a","segment":"think"},"finish_reason":null}]}"#;
        assert_eq!(parse_chunk(ours).unwrap().think, "a");
        let vllm = r#"{"choices":[{"delta":{"reasoning":"b"}}],"usage":null}"#;
        assert_eq!(parse_chunk(vllm).unwrap().think, "b");
        let last = r#"{"choices":[{"delta":{"content":""},"finish_reason":"stop"}]}"#;
        let last = parse_chunk(last).unwrap();
        assert_eq!((last.has_text(), last.finish_reason.as_deref()), (false, Some("stop")));
        let usage = r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5,"total_tokens":8,"completion_tokens_details":{"reasoning_tokens":2}}}"#;
        let expected = Usage { prompt_tokens: 3, completion_tokens: 5, reasoning_tokens: 2 };
        assert_eq!(parse_chunk(usage).unwrap().usage, Some(expected));
        let plain = r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5,"completion_tokens_details":null}}"#;
        assert_eq!(parse_chunk(plain).unwrap().usage.unwrap().reasoning_tokens, 0);
    }

    #[test]
    fn an_error_chunk_is_an_error() {
        let error = parse_chunk(r#"{"error":{"message":"out of luck","code":500}}"#).unwrap_err();
        assert_eq!(error.to_string(), "the server broke off: out of luck");
        assert!(matches!(parse_chunk("nonsense"), Err(ChatError::BadChunk(_))));
    }

    #[test]
    fn error_bodies_of_every_server_are_read() {
        for body in [
            r#"{"error":{"message":"no"}}"#,
            r#"{"error":"no"}"#,
            r#"{"message":"no"}"#,
            r#"{"detail":"no"}"#,
            "no",
        ] {
            assert_eq!(error_message(body.as_bytes()), "no");
        }
        assert_eq!(error_message(b""), "no explanation");
    }

    #[test]
    fn the_base_may_have_v1_or_not() {
        for base in ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"] {
            let client = ChatClient::new(&base.parse().unwrap(), None, CONNECT_TIMEOUT).unwrap();
            assert_eq!(client.endpoint("models").as_str(), "http://h:1/v1/models");
        }
        let client = ChatClient::new(&"http://h/a/v1".parse().unwrap(), None, CONNECT_TIMEOUT).unwrap();
        assert_eq!(client.endpoint("models").as_str(), "http://h/a/v1/models");
    }
}
