//! `POST /v1/chat/completions`: every way to bring a video, the unary reply, and every row of the error table.

use std::time::Duration;

use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use tinyllava::model::fake::FakeModel;

use crate::http_setup::*;

#[tokio::test]
async fn a_unary_reply_has_thinking_answer_and_usage() {
    let server = simple_server().await;
    let reply = server.ask(&request(json!("What?"), json!({}))).await;
    assert_eq!(reply["object"], "chat.completion");
    assert_eq!(reply["model"], MODEL);
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    assert_eq!(choice["message"]["content"], "C");
    assert_eq!(choice["message"]["reasoning_content"], "The person bends.");
    assert_eq!(choice["message"]["reasoning"], choice["message"]["reasoning_content"]);
    assert_eq!(choice["finish_reason"], "stop");
    let usage = &reply["usage"];
    assert_eq!(usage["completion_tokens"], REPLY.len());
    assert_eq!(
        usage["total_tokens"].as_u64().unwrap(),
        usage["prompt_tokens"].as_u64().unwrap() + REPLY.len() as u64
    );
    assert_eq!(usage["prompt_tokens_details"]["video_tokens"], 0);
    let thinking = usage["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap();
    assert!((1..REPLY.len() as u64).contains(&thinking), "{usage}");
    assert!(reply.get("video").is_none());
}

#[tokio::test]
async fn a_video_comes_as_data_url_remote_url_or_upload() {
    let server = simple_server().await;
    let host = VideoHost::start(clip_bytes(), Some(Duration::ZERO)).await;
    let question = request(json!("What?"), json!({}));
    let replies = [
        server.ask(&about(&clip_url(), json!({}))).await,
        server.ask(&about(&host.url, json!({}))).await,
        success(server.upload(form(&question, clip_bytes())).send().await.unwrap()).await,
    ];
    for reply in &replies {
        assert_eq!(reply["choices"][0]["message"]["content"], "C");
        let details = &reply["usage"]["prompt_tokens_details"];
        assert_eq!(details["video_tokens"], 8);
        assert_eq!(details["multimodal_tokens"]["video"], 8);
        assert_eq!(reply["video"], replies[0]["video"]);
    }
    assert_eq!(replies[0]["video"]["source_frames"], 20);
    assert_eq!(replies[0]["video"]["sampled_indices"], json!([0, 6, 12, 19]));
    let cached = |reply: &Value| reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert_eq!(cached(&replies[0]), 0);
    assert!(cached(&replies[1]) > 0, "the same video and question share blocks");
    assert_eq!(host.hits(), 1);
}

#[tokio::test]
async fn parts_may_come_in_either_order_and_the_json_may_mark_the_place() {
    let server = simple_server().await;
    let marked = request(json!([{"type": "video_url", "video_url": {"num_frames": 2}}]), json!({}));
    let form = Form::new()
        .part("video", Part::bytes(clip_bytes()).file_name("clip.mp4"))
        .part("request", Part::text(marked.to_string()));
    let reply = success(server.upload(form).send().await.unwrap()).await;
    assert_eq!(reply["video"]["sampled_indices"], json!([0, 19]));
}

#[tokio::test]
async fn a_local_file_is_read_only_where_the_operator_allows() {
    let mut config = config();
    let url = format!("file://{}", clip().display());
    let server = simple_server().await;
    let (status, refused) = error(server.post(&about(&url, json!({}))).send().await.unwrap()).await;
    assert_eq!((status, &refused["code"]), (400, &json!("video_refused")));
    config.media.allowed_media_dir = clip().parent().map(Into::into);
    let server = self::server(config, FakeModel::saying(REPLY)).await;
    assert_eq!(server.ask(&about(&url, json!({}))).await["video"]["source_frames"], 20);
}

#[tokio::test]
async fn thinking_is_separate_hidden_or_raw() {
    let server = simple_server().await;
    let ask =
        async |more: Value| server.ask(&request(json!("What?"), more)).await["choices"][0]["message"].clone();
    let hidden = ask(json!({"include_reasoning": false})).await;
    assert_eq!(hidden["content"], "C");
    assert!(hidden.get("reasoning_content").is_none() && hidden.get("reasoning").is_none());
    let raw = ask(json!({"reasoning_format": "none"})).await;
    assert_eq!(raw["content"], REPLY);
    assert!(raw.get("reasoning_content").is_none());
}

#[tokio::test]
async fn limits_of_the_completion_are_kept() {
    let server = simple_server().await;
    let ask = async |more: Value| server.ask(&request(json!("What?"), more)).await;
    let cut = ask(json!({"max_tokens": 12})).await;
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
    assert_eq!(cut["choices"][0]["message"]["content"], "");
    assert_eq!(cut["choices"][0]["message"]["reasoning_content"], "The p");
    assert_eq!(cut["usage"]["completion_tokens"], 12);
    let stopped = ask(json!({"stop": ["person", "C"]})).await;
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    assert_eq!(stopped["choices"][0]["message"]["reasoning_content"], "The person bends.");
    assert_eq!(stopped["choices"][0]["message"]["content"], "");
    assert_eq!(stopped["usage"]["completion_tokens"], REPLY.find("</answer>").unwrap());
    server.until_idle().await;
}

#[tokio::test]
async fn the_last_message_asks_for_thinking_unless_told_otherwise() {
    let echo = std::sync::Arc::new(|prompt: &[u32]| prompt.to_vec());
    let server = server(config(), FakeModel::new("ASSISTANT:", echo)).await;
    let ask = async |more: Value| {
        let reply = server.ask(&request(json!("Why?"), more)).await;
        reply["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    let raw = "reasoning_format";
    assert!(ask(json!({raw: "none"})).await.contains("Why?\nOutput the thinking process in <think>"));
    let plain = ask(json!({raw: "none", "reasoning_effort": "none"})).await;
    assert!(plain.contains("Why?\n") && !plain.contains("<think>"), "{plain}");
}

#[tokio::test]
async fn every_row_of_the_error_table_has_its_status() {
    let mut config = config();
    config.media.max_video_bytes = clip_bytes().len();
    config.max_body_bytes = 1 << 20;
    let server = server(config, FakeModel::saying(REPLY)).await;
    let unreachable = "http://127.0.0.1:9/clip.mp4";
    let not_video = "data:video/mp4;base64,aGVsbG8gd29ybGQsIHRoaXMgaXMgbm8gdmlkZW8=";
    let long = "x".repeat(5000);
    for (body, status, code, param) in [
        (request(json!("Hi"), json!({"temperature": 9})), 400, Value::Null, json!("temperature")),
        (request(json!("Hi"), json!({"odd": 9})), 400, Value::Null, json!("odd")),
        (request(json!("Hi"), json!({"temperature": "hot"})), 400, Value::Null, json!("temperature")),
        (json!({"model": MODEL}), 400, Value::Null, json!("messages")),
        (request(json!("Hi"), json!({"model": "other"})), 404, json!("model_not_found"), json!("model")),
        (request(json!(long), json!({})), 400, json!("context_length_exceeded"), json!("messages")),
        (
            request(json!("Hi"), json!({"max_tokens": 100_000})),
            400,
            json!("context_length_exceeded"),
            json!("messages"),
        ),
        (
            about(unreachable, json!({})),
            422,
            json!("video_fetch_failed"),
            json!("messages[0].content[1].video_url"),
        ),
    ] {
        for stream in [false, true] {
            let mut body = body.clone();
            body["stream"] = stream.into();
            let (got, refused) = error(server.post(&body).send().await.unwrap()).await;
            assert_eq!((got, &refused["code"], &refused["param"]), (status, &code, &param), "{refused}");
        }
    }
    let (status, refused) = error(server.post(&about(not_video, json!({}))).send().await.unwrap()).await;
    assert!([415, 422].contains(&status), "{refused}");
    let (status, refused) =
        error(server.post(&request(json!("x".repeat(2 << 20)), json!({}))).send().await.unwrap()).await;
    assert_eq!((status, &refused["code"]), (413, &json!("body_too_large")));
    let mut too_long = clip_bytes();
    too_long.push(0);
    let upload = server.upload(form(&request(json!("What?"), json!({})), too_long));
    let (status, refused) = error(upload.send().await.unwrap()).await;
    assert_eq!((status, &refused["code"]), (413, &json!("video_too_large")));
    server.until_idle().await;
    assert_eq!(server.metric("tinyllava_media_errors_total{reason=\"fetch_failed\"}").await, 2.0);
}

#[tokio::test]
async fn bodies_of_the_wrong_form_are_refused() {
    let server = simple_server().await;
    let url = format!("{}{CHAT}", server.url);
    let post = || server.client.post(&url);
    let json_type = "application/json";
    for (sent, status) in [
        (post().body("{}"), 415),
        (post().header("content-type", "text/plain").body("{}"), 415),
        (post().header("content-type", json_type).header("content-encoding", "gzip").body("{}"), 415),
        (post().header("content-type", json_type).body("{"), 400),
        (post().header("content-type", json_type).body(""), 400),
        (post().header("content-type", json_type).body("{\"messages\":[]} x"), 400),
        (post().header("content-type", "multipart/form-data").body("x"), 400),
        (post().header("content-type", "multipart/form-data; boundary=x").body("--x\r\nnonsense"), 400),
        (post().multipart(Form::new().text("odd", "1")), 400),
        (post().multipart(Form::new().text("request", "{")), 400),
        (post().multipart(Form::new().part("video", Part::bytes(vec![1]))), 400),
        (post().multipart(Form::new().text("request", "{}").text("request", "{}")), 400),
        (post().multipart(Form::new().part("video", Part::bytes(vec![]))), 400),
    ] {
        let (got, refused) = error(sent.send().await.unwrap()).await;
        assert_eq!(got, status, "{refused}");
    }
    let both = form(&about(&clip_url(), json!({})), clip_bytes());
    let (status, refused) = error(server.upload(both).send().await.unwrap()).await;
    assert_eq!((status, refused["param"].as_str().unwrap()), (400, "messages[0].content[1].video_url.url"));
}

#[tokio::test]
async fn a_failing_step_is_a_withheld_500_and_the_server_lives_on() {
    let mut model = FakeModel::saying(REPLY);
    model.poison = Some(u32::from(b'~'));
    let server = server(config(), model).await;
    let (status, refused) = error(server.post(&request(json!("~"), json!({}))).send().await.unwrap()).await;
    assert_eq!((status, &refused["code"]), (500, &json!("internal_error")));
    assert!(!refused["message"].as_str().unwrap().contains("poison"));
    assert_eq!(server.ask(&request(json!("Hi"), json!({}))).await["choices"][0]["message"]["content"], "C");
    server.until_idle().await;
}

#[tokio::test]
async fn the_deadline_ends_a_unary_request_with_504() {
    let mut config = config();
    config.request_timeout = Duration::from_millis(300);
    let server = server(config, slow_model(REPLY, Duration::from_millis(50))).await;
    let (status, refused) = error(server.post(&request(json!("Hi"), json!({}))).send().await.unwrap()).await;
    assert_eq!((status, &refused["code"]), (504, &json!("deadline_exceeded")));
    let host = VideoHost::start(vec![], None).await;
    let (status, _) = error(server.post(&about(&host.url, json!({}))).send().await.unwrap()).await;
    assert_eq!(status, 504);
    server.until_idle().await;
}
