//! `/v1/responses` over sockets: items and events, what is kept, and conversations that go on about the same video.

use serde_json::{Value, json};
use tinyllava::model::fake::FakeModel;

use crate::http_setup::*;

const RESPONSES: &str = "/v1/responses";

async fn respond(server: &Server, body: Value) -> Value {
    success(server.send_json(RESPONSES, &body).await).await
}

/// The events of a stream, whose form is checked: names, numbers, and no event after the last.
async fn stream(server: &Server, mut body: Value) -> Vec<Value> {
    body["stream"] = true.into();
    let response = server.send_json(RESPONSES, &body).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let text = response.text().await.unwrap();
    let mut events = vec![];
    for group in text.split("\n\n").filter(|group| !group.is_empty() && !group.starts_with(':')) {
        let (name, data) = group.split_once('\n').unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(name.strip_prefix("event: ").unwrap(), data["type"], "{group}");
        assert_eq!(data["sequence_number"], events.len());
        events.push(data);
    }
    events
}

fn kinds(events: &[Value]) -> Vec<&str> {
    let mut kinds: Vec<&str> = events
        .iter()
        .map(|event| event["type"].as_str().unwrap().strip_prefix("response.").unwrap())
        .collect();
    kinds.dedup();
    kinds
}

/// A response without what is never the same twice.
fn comparable(mut response: Value) -> Value {
    for field in ["id", "created_at"] {
        response[field] = Value::Null;
    }
    response["output"].as_array_mut().unwrap().iter_mut().for_each(|item| item["id"] = Value::Null);
    response["usage"]["input_tokens_details"]["cached_tokens"] = Value::Null;
    response
}

fn about_clip(question: &str) -> Value {
    json!([{"role": "user", "content": [
        {"type": "input_text", "text": question},
        {"type": "input_file", "file_data": clip_url(), "filename": "clip.mp4"},
    ]}])
}

#[tokio::test]
async fn a_response_has_an_item_of_thinking_and_one_of_answer() {
    let server = simple_server().await;
    let response =
        respond(&server, json!({"model": MODEL, "input": about_clip("What?"), "metadata": {"a": "b"}})).await;
    assert!(response["id"].as_str().unwrap().starts_with("resp_"));
    assert_eq!(response["object"], "response");
    assert_eq!(response["status"], "completed");
    assert_eq!(response["metadata"], json!({"a": "b"}));
    let [thinking, answer] = &response["output"].as_array().unwrap()[..] else { panic!("{response}") };
    assert_eq!(thinking["type"], "reasoning");
    assert_eq!(thinking["summary"], json!([{"type": "summary_text", "text": "The person bends."}]));
    assert_eq!(thinking["content"][0]["text"], "The person bends.");
    assert_eq!(
        answer["content"],
        json!([{"type": "output_text", "text": "C", "annotations": [], "logprobs": []}])
    );
    let usage = &response["usage"];
    assert_eq!(usage["output_tokens"], REPLY.len());
    assert_eq!(usage["output_tokens_details"]["reasoning_tokens"], REPLY.find("<answer>").unwrap());
    assert_eq!(usage["input_tokens_details"]["video_tokens"], 8);
    assert_eq!(response["video"]["source_frames"], 20);
    let chat = server.ask(&about(&clip_url(), json!({}))).await;
    assert_eq!(usage["input_tokens"], chat["usage"]["prompt_tokens"]);
}

#[tokio::test]
async fn a_stream_tells_what_the_unary_response_holds() {
    let server = simple_server().await;
    let body = json!({"input": about_clip("What?"), "instructions": "Be brief."});
    let events = stream(&server, body.clone()).await;
    assert_eq!(
        kinds(&events),
        [
            "created",
            "in_progress",
            "output_item.added",
            "reasoning_summary_part.added",
            "reasoning_summary_text.delta",
            "reasoning_summary_text.done",
            "reasoning_summary_part.done",
            "output_item.done",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "completed",
        ]
    );
    let whole = &events.last().unwrap()["response"];
    assert_eq!(comparable(whole.clone()), comparable(respond(&server, body).await));
    let deltas = |kind: &str| -> String {
        let deltas = events.iter().filter(|event| event["type"] == kind);
        deltas.map(|event| event["delta"].as_str().unwrap()).collect()
    };
    assert_eq!(deltas("response.reasoning_summary_text.delta"), "The person bends.");
    assert_eq!(deltas("response.output_text.delta"), "C");
    let items = events.iter().filter(|event| event["type"] == "response.output_item.done");
    let items: Vec<&Value> = items.map(|event| &event["item"]).collect();
    assert_eq!(json!(items), whole["output"]);
    for event in &events {
        if let Some(id) = event["item_id"].as_str() {
            let index = event["output_index"].as_u64().unwrap() as usize;
            assert_eq!(whole["output"][index]["id"], id);
        }
    }
    assert_eq!(events[0]["response"]["id"], whole["id"]);
    assert_eq!(events[0]["response"]["status"], "in_progress");
}

#[tokio::test]
async fn log_probabilities_of_the_answer_are_there_if_they_are_included() {
    let server = simple_server().await;
    let body = json!({"input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let response = respond(&server, body.clone()).await;
    let logprobs = response["output"][1]["content"][0]["logprobs"].as_array().unwrap();
    let text: String = logprobs.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert!(
        text.starts_with("<answer>C</answer>"),
        "no token of the thinking, every one of the answer: {text}"
    );
    assert_eq!(logprobs[0]["top_logprobs"].as_array().unwrap().len(), 2);
    assert_eq!(response["top_logprobs"], 2);
    let events = stream(&server, body).await;
    let done = events
        .iter()
        .find(|event| event["type"] == "response.output_item.done" && event["output_index"] == 1);
    assert_eq!(done.unwrap()["item"]["content"], response["output"][1]["content"]);
}

#[tokio::test]
async fn a_response_cut_off_is_incomplete() {
    let server = simple_server().await;
    let body = json!({"input": "Hi", "max_output_tokens": 14});
    let response = respond(&server, body.clone()).await;
    assert_eq!(response["status"], "incomplete");
    assert_eq!(response["incomplete_details"], json!({"reason": "max_output_tokens"}));
    assert_eq!(response["output"][0]["type"], "reasoning");
    assert_eq!(response["output"][0]["status"], "incomplete");
    assert_eq!(response["output"].as_array().unwrap().len(), 1);
    let events = stream(&server, body).await;
    assert_eq!(events.last().unwrap()["type"], "response.incomplete");
}

#[tokio::test]
async fn a_response_is_read_again_continued_and_deleted() {
    let server = simple_server().await;
    let first = respond(&server, json!({"input": about_clip("What?")})).await;
    let path = format!("{RESPONSES}/{}", first["id"].as_str().unwrap());
    assert_eq!(success(server.get(&path).send().await.unwrap()).await, first);
    let next = json!({"input": "Why?", "previous_response_id": first["id"]});
    let second = respond(&server, next.clone()).await;
    assert_eq!(second["previous_response_id"], first["id"]);
    assert_eq!(second["usage"]["input_tokens_details"]["video_tokens"], 8);
    assert!(second["usage"]["input_tokens_details"]["cached_tokens"].as_u64().unwrap() > 8);
    // The video is neither decoded nor encoded again.
    assert_eq!(server.metric("tinyllava_stage_seconds_count{stage=\"decode\"}").await, 1.0);
    assert_eq!(server.metric("tinyllava_step_size_sum{kind=\"encode\"}").await, 4.0);
    // And it goes on from the second one, streamed.
    let third = stream(&server, json!({"input": "Sure?", "previous_response_id": second["id"]})).await;
    let third = &third.last().unwrap()["response"];
    assert!(third["usage"]["input_tokens"].as_u64() > second["usage"]["input_tokens"].as_u64());
    let kept = server.get(&format!("{RESPONSES}/{}", third["id"].as_str().unwrap()));
    assert_eq!(success(kept.send().await.unwrap()).await, *third);
    let deleted = success(server.delete(&path).await).await;
    assert_eq!(deleted, json!({"id": first["id"], "object": "response", "deleted": true}));
    for gone in [server.delete(&path).await, server.get(&path).send().await.unwrap()] {
        let (status, refused) = error(gone).await;
        assert_eq!((status, &refused["code"]), (404, &json!("response_not_found")));
    }
    let (status, refused) = error(server.send_json(RESPONSES, &next).await).await;
    assert_eq!((status, &refused["param"]), (400, &json!("previous_response_id")));
}

#[tokio::test]
async fn large_videos_are_kept_by_name_only() {
    let mut config = config();
    config.responses.max_conversation_bytes = 1000;
    let server = server(config, FakeModel::saying(REPLY)).await;
    let inline = respond(&server, json!({"input": about_clip("What?")})).await;
    let next = json!({"input": "Why?", "previous_response_id": inline["id"]});
    let (status, refused) = error(server.send_json(RESPONSES, &next).await).await;
    assert_eq!((status, &refused["param"]), (400, &json!("previous_response_id")));
    assert!(refused["message"].as_str().unwrap().contains("/v1/files"), "{refused}");
    let part = reqwest::multipart::Part::bytes(clip_bytes()).file_name("clip.mp4");
    let form = reqwest::multipart::Form::new().text("purpose", "user_data").part("file", part);
    let file = success(server.send_form("/v1/files", form).await).await;
    let content =
        json!([{"type": "input_file", "file_id": file["id"]}, {"type": "input_text", "text": "What?"}]);
    let named = respond(&server, json!({"input": [{"role": "user", "content": content}]})).await;
    let next = json!({"input": "Why?", "previous_response_id": named["id"]});
    assert_eq!(respond(&server, next).await["usage"]["input_tokens_details"]["video_tokens"], 8);
}

#[tokio::test]
async fn what_is_not_stored_is_not_kept() {
    let server = simple_server().await;
    let response = respond(&server, json!({"input": "Hi", "store": false})).await;
    assert_eq!(response["store"], false);
    let path = format!("{RESPONSES}/{}", response["id"].as_str().unwrap());
    assert_eq!(error(server.get(&path).send().await.unwrap()).await.0, 404);
}

#[tokio::test]
async fn faults_are_answered_in_the_usual_form_and_later_ones_end_the_stream() {
    let server = simple_server().await;
    let bad_video = json!([{"role": "user", "content": [{"type": "input_video", "video_url": "data:video/mp4;base64,AAAA"}]}]);
    for (body, status, param) in [
        (json!({"input": "Hi", "model": "other"}), 404, json!("model")),
        (json!({"input": "Hi", "odd": 1}), 400, json!("odd")),
        (json!({"input": bad_video}), 415, json!("input[0].content[0].video_url")),
        (json!({"input": "Hi", "max_output_tokens": 100_000}), 400, json!("input")),
        (
            json!({"input": "Hi", "max_output_tokens": 1, "guided_choice": ["left", "right"]}),
            400,
            json!("max_output_tokens"),
        ),
    ] {
        let (got, refused) = error(server.send_json(RESPONSES, &body).await).await;
        assert_eq!((got, &refused["param"]), (status, &param), "{refused}");
    }
    let bytes = server.send_form(RESPONSES, form(&json!({"input": "Hi"}), clip_bytes())).await;
    assert_eq!(error(bytes).await.0, 400);
    let (status, refused) =
        error(server.get(&format!("{RESPONSES}/resp_0?stream=true")).send().await.unwrap()).await;
    assert_eq!((status, &refused["param"]), (400, &json!("query")));
    let mut model = FakeModel::saying(REPLY);
    model.poison = Some(u32::from(b'C'));
    let broken = crate::http_setup::server(config(), model).await;
    let events = stream(&broken, json!({"input": "Hi"})).await;
    let last = events.last().unwrap();
    assert_eq!(last["type"], "response.failed");
    assert_eq!(last["response"]["status"], "failed");
    assert_eq!(last["response"]["error"]["code"], "internal_error");
    assert!(last["response"]["error"]["message"].as_str().unwrap().contains("x-request-id"));
}
