//! Streams over a real socket: order and form of the chunks, keep-alives, errors after the first byte.

use std::time::Duration;

use serde_json::{Value, json};
use tinyllava::model::fake::FakeModel;

use crate::http_setup::*;

fn streamed(mut body: Value, more: Value) -> Value {
    body["stream"] = true.into();
    body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
    body
}

async fn events(server: &Server, body: &Value) -> Vec<Event> {
    Events::of(server.post(body).send().await.unwrap()).rest().await
}

#[tokio::test]
async fn chunks_come_in_order_role_thinking_answer_finish_usage() {
    let server = simple_server().await;
    let more = json!({"stream_options": {"include_usage": true}});
    let events = events(&server, &streamed(about(&clip_url(), json!({})), more)).await;
    let chunks = chunks(&events);
    let first = chunks[0];
    assert_eq!(first["object"], "chat.completion.chunk");
    assert_eq!(first["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(first["video"]["source_frames"], 20);
    let (usage, middle) = chunks[1..].split_last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], REPLY.len());
    let (finish, deltas) = middle.split_last().unwrap();
    assert_eq!(finish["choices"][0]["delta"], json!({}));
    assert_eq!(finish["choices"][0]["finish_reason"], "stop");
    let mut answering = false;
    for chunk in deltas {
        assert_eq!((&chunk["id"], &chunk["created"]), (&first["id"], &first["created"]));
        assert_eq!(chunk["choices"][0]["finish_reason"], Value::Null);
        assert!(chunk.get("usage").is_none());
        let delta = &chunk["choices"][0]["delta"];
        match delta["segment"].as_str().unwrap() {
            "think" => {
                assert!(!answering, "thinking after the answer began");
                assert_eq!(delta["reasoning"], delta["reasoning_content"]);
                assert!(!delta["reasoning"].as_str().unwrap().is_empty() && delta.get("content").is_none());
            }
            "answer" => {
                answering = true;
                assert!(!delta["content"].as_str().unwrap().is_empty());
                assert!(delta.get("reasoning").is_none() && delta.get("reasoning_content").is_none());
            }
            other => panic!("segment {other}"),
        }
    }
    assert_eq!(text_of(&chunks, "reasoning_content"), "The person bends.");
    assert_eq!(text_of(&chunks, "content"), "C");
}

#[tokio::test]
async fn a_stream_and_a_unary_reply_say_the_same() {
    let replies = [
        REPLY,
        "no tags at all",
        "<think>cut off in the middle of the th",
        "<think>über 🙂 <b>x</b></think>\n<answer>ß</answer> tail",
        "<answer>only</answer>",
    ];
    for said in replies {
        let server = server(config(), FakeModel::saying(said)).await;
        for more in [
            json!({}),
            json!({"stop": ["x", "nl"]}),
            json!({"max_tokens": 9}),
            json!({"reasoning_format": "none"}),
        ] {
            let body = request(json!("What?"), more);
            let unary = server.ask(&body).await;
            let usage = json!({"stream_options": {"include_usage": true}});
            let events = events(&server, &streamed(body, usage)).await;
            let chunks = chunks(&events);
            let message = &unary["choices"][0]["message"];
            assert_eq!(text_of(&chunks, "content"), message["content"].as_str().unwrap(), "{said}");
            let reasoning = message["reasoning_content"].as_str().unwrap_or_default();
            assert_eq!(text_of(&chunks, "reasoning_content"), reasoning, "{said}");
            let finish = chunks[chunks.len() - 2];
            assert_eq!(finish["choices"][0]["finish_reason"], unary["choices"][0]["finish_reason"]);
            for field in ["completion_tokens", "prompt_tokens", "completion_tokens_details"] {
                assert_eq!(chunks[chunks.len() - 1]["usage"][field], unary["usage"][field], "{said}");
            }
        }
    }
}

#[tokio::test]
async fn hidden_thinking_never_reaches_a_stream() {
    let server = simple_server().await;
    let body = streamed(request(json!("What?"), json!({})), json!({"include_reasoning": false}));
    let events = events(&server, &body).await;
    let chunks = chunks(&events);
    assert_eq!(text_of(&chunks, "content"), "C");
    assert!(chunks.iter().all(|chunk| chunk["choices"][0]["delta"].get("reasoning_content").is_none()));
}

#[tokio::test]
async fn comments_keep_a_stream_alive_while_a_slow_video_comes() {
    let mut config = config();
    config.keep_alive_interval = Duration::from_millis(50);
    let server = server(config, FakeModel::saying(REPLY)).await;
    let host = VideoHost::start(clip_bytes(), Some(Duration::from_millis(600))).await;
    let response = server.post(&streamed(about(&host.url, json!({})), json!({}))).send().await.unwrap();
    let mut events = Events::of(response);
    let mut comments = 0;
    let first = loop {
        match events.next().await.unwrap() {
            Event::Comment(text) => {
                assert_eq!(text, "keep-alive");
                comments += 1;
            }
            other => break other,
        }
    };
    assert!(comments >= 2, "{comments} comments");
    let Event::Data(first) = first else { panic!("{first:?}") };
    assert_eq!(first["choices"][0]["delta"]["role"], "assistant");
    let rest = events.rest().await;
    assert_eq!(text_of(&chunks(&rest), "content"), "C");
}

#[tokio::test]
async fn an_error_after_the_first_byte_is_the_last_event() {
    let mut config = config();
    config.keep_alive_interval = Duration::from_millis(50);
    let server = server(config, FakeModel::saying(REPLY)).await;
    let host =
        VideoHost::start(b"no video at all, but long enough".to_vec(), Some(Duration::from_millis(300)))
            .await;
    let events = events(&server, &streamed(about(&host.url, json!({})), json!({}))).await;
    let [Event::Data(last)] = &events[..] else { panic!("{events:?}") };
    assert_eq!(last["error"]["type"], "invalid_request_error");
    assert!(last["error"]["code"].as_str().unwrap().starts_with("video_"), "{last}");
}

#[tokio::test]
async fn a_failing_step_ends_its_stream_with_an_error() {
    let mut model = FakeModel::saying("abc~def");
    model.poison = Some(u32::from(b'~'));
    let server = server(config(), model).await;
    let events = events(&server, &streamed(request(json!("Hi"), json!({})), json!({}))).await;
    let (Some(Event::Data(last)), before) =
        events.split_last().map(|(last, before)| (Some(last), before)).unwrap()
    else {
        panic!("{events:?}")
    };
    assert_eq!(last["error"]["code"], "internal_error");
    assert!(!before.is_empty());
    server.until_idle().await;
}

#[tokio::test]
async fn the_deadline_ends_a_stream_with_an_error() {
    let mut config = config();
    config.request_timeout = Duration::from_millis(400);
    let server = server(config, slow_model(&"word ".repeat(100), Duration::from_millis(20))).await;
    let events = events(&server, &streamed(request(json!("Hi"), json!({})), json!({}))).await;
    let Some(Event::Data(last)) = events.last() else { panic!("{events:?}") };
    assert_eq!(last["error"]["code"], "deadline_exceeded");
    server.until_idle().await;
}
