//! Examples of the document: requests that are sent as they stand here, by a test, to the embedded model.
//!
//! Called by `mod.rs`. The video is the embedded model's demo clip in that test, whatever the URL says.

use serde_json::{Value, json};
use utoipa::openapi::{OpenApi, RefOr, example::ExampleBuilder};

/// Where examples have their video.
pub const VIDEO_URL: &str = "https://example.org/direction.mp4";
const QUESTION: &str = "In what direction is the red object moving?\nA. up\nB. down";

/// What a stream looks like.
pub const STREAM: &str = concat!(
    "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1764000000,\"model\":\"nano\",\"choices\":[{\"index\":0,",
    "\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n",
    "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1764000000,\"model\":\"nano\",\"choices\":[{\"index\":0,",
    "\"delta\":{\"reasoning_content\":\"The video shows\",\"reasoning\":\"The video shows\",\"segment\":\"think\"},\"logprobs\":null,",
    "\"finish_reason\":null}]}\n\n",
    "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1764000000,\"model\":\"nano\",\"choices\":[{\"index\":0,",
    "\"delta\":{\"content\":\"A\",\"segment\":\"answer\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n",
    "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1764000000,\"model\":\"nano\",\"choices\":[{\"index\":0,",
    "\"delta\":{},\"logprobs\":null,\"finish_reason\":\"stop\"}]}\n\n",
    "data: [DONE]\n\n",
);

/// Path, name, what it shows, and the body.
fn requests() -> Vec<(&'static str, &'static str, &'static str, Value)> {
    let chat = "/v1/chat/completions";
    let part = json!({"type": "video_url", "video_url": {"url": VIDEO_URL, "num_frames": 16}});
    let messages = json!([{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]);
    let item = json!([{"role": "user", "content": [
        {"type": "input_video", "video_url": VIDEO_URL}, {"type": "input_text", "text": QUESTION}]}]);
    let ask = |more: Value| {
        let mut request = json!({"model": "nano", "messages": messages});
        request.as_object_mut().into_iter().for_each(|request| {
            request.extend(more.as_object().cloned().unwrap_or_default());
        });
        request
    };
    vec![
        (chat, "question", "A question about a video", ask(json!({}))),
        (
            chat,
            "stream",
            "The same as a stream",
            ask(json!({"stream": true, "stream_options": {"include_usage": true}})),
        ),
        (
            chat,
            "vote",
            "Five lines of thought on one video, and the majority of their answers",
            ask(json!({"n": 5, "vote": true, "temperature": 0.8, "seed": 1, "answer_logprobs": true})),
        ),
        (
            chat,
            "guided",
            "An answer out of a list, after at most 100 tokens of thinking",
            ask(json!({"structured_outputs": {"choice": ["A", "B"]}, "thinking_token_budget": 100})),
        ),
        (
            chat,
            "schema",
            "An answer in JSON",
            ask(
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": {
                "type": "object", "properties": {"option": {"enum": ["A", "B"]}}, "required": ["option"], "additionalProperties": false}}}}),
            ),
        ),
        (
            "/v1/completions",
            "text",
            "Going on with a text",
            json!({"model": "nano", "prompt": "The video shows a red", "max_tokens": 8, "temperature": 0}),
        ),
        ("/v1/responses", "question", "A question about a video", json!({"model": "nano", "input": item})),
        ("/tokenize", "text", "A text", json!({"prompt": "What moves?", "return_token_strs": true})),
        ("/detokenize", "tokens", "Token ids", json!({"tokens": [10, 20, 30]})),
    ]
}

/// Adds them.
pub(super) fn finish(document: &mut OpenApi) {
    for (path, name, summary, value) in requests() {
        let operation = document.paths.paths.get_mut(path).and_then(|path| path.post.as_mut());
        let body = operation.and_then(|operation| operation.request_body.as_mut());
        let Some(RefOr::T(body)) = body else {
            unreachable!("an example is of an operation with a body: this is a bug")
        };
        let Some(RefOr::T(content)) = body.content.get_mut("application/json") else {
            unreachable!("an example is of an operation with a JSON body: this is a bug")
        };
        let example = ExampleBuilder::new().summary(summary).value(Some(value)).build();
        content.examples.insert(name.into(), RefOr::T(example));
    }
    let chat = document.paths.paths.get_mut("/v1/chat/completions").and_then(|path| path.post.as_mut());
    if let Some(RefOr::T(reply)) = chat.and_then(|chat| chat.responses.responses.get_mut("200"))
        && let Some(RefOr::T(stream)) = reply.content.get_mut("text/event-stream")
    {
        stream.example = Some(STREAM.into());
    }
}
