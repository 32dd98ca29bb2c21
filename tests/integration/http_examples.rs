//! Every example of the document is sent as it stands there, to the embedded model.

use serde_json::{Value, json};
use tinyllava::http::openapi;

use crate::http_setup::*;

/// `value` with the demo clip in place of the examples' URL.
fn with_clip(value: &Value) -> Value {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let clip = STANDARD.encode(std::fs::read("models/nano/demo/direction.mp4").unwrap());
    let text =
        value.to_string().replace(openapi::EXAMPLE_VIDEO_URL, &format!("data:video/mp4;base64,{clip}"));
    serde_json::from_str(&text).unwrap()
}

#[tokio::test]
async fn every_example_of_a_request_is_answered() {
    let server = nano_server(config()).await;
    let document = openapi::document();
    let mut answered = vec![];
    for (path, methods) in document["paths"].as_object().unwrap() {
        let examples = &methods["post"]["requestBody"]["content"]["application/json"]["examples"];
        for (name, example) in examples.as_object().into_iter().flatten() {
            let mut body = with_clip(&example["value"]);
            body.as_object_mut().unwrap().entry("model").and_modify(|model| *model = json!(MODEL));
            let response = server.send_json(path, &body).await;
            let status = response.status();
            let text = response.text().await.unwrap();
            assert_eq!(status, 200, "{path} {name}: {text}");
            if body["stream"] == true {
                assert!(text.ends_with("data: [DONE]\n\n") && text.contains("\"usage\""), "{name}: {text}");
            } else {
                check(name, &serde_json::from_str(&text).unwrap());
            }
            answered.push(format!("{path} {name}"));
        }
    }
    assert_eq!(answered.len(), 9, "{answered:?}");
}

/// What the examples promise.
fn check(name: &str, reply: &Value) {
    let content = || reply["choices"][0]["message"]["content"].as_str().unwrap();
    match name {
        "question" if reply["object"] == "response" => assert_eq!(reply["status"], "completed"),
        "question" | "guided" => assert_eq!(content(), "A"),
        "vote" => {
            assert_eq!(reply["choices"].as_array().unwrap().len(), 5);
            assert_eq!(reply["vote"]["answer"], "A");
            assert!(reply["choices"][0]["answer_confidence"]["A"].as_f64().unwrap() > 0.5);
        }
        "schema" => {
            let answer: Value = serde_json::from_str(content()).unwrap();
            assert!(answer["option"] == "A" || answer["option"] == "B", "{answer}");
        }
        _ => {}
    }
}

#[test]
fn the_example_of_a_stream_has_the_documented_form() {
    let document = openapi::document();
    let chat = &document["paths"]["/v1/chat/completions"]["post"];
    let stream = chat["responses"]["200"]["content"]["text/event-stream"]["example"].as_str().unwrap();
    let (events, done) = stream.rsplit_once("data: [DONE]").unwrap();
    assert_eq!(done, "\n\n");
    let events: Vec<Value> = events
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .map(|e| serde_json::from_str(e).unwrap())
        .collect();
    let delta = |event: &Value, field: &str| !event["choices"][0]["delta"][field].is_null();
    assert!(delta(&events[0], "role"));
    assert!(delta(&events[1], "reasoning_content") && !delta(&events[1], "content"));
    assert!(delta(&events[2], "content") && !delta(&events[2], "reasoning_content"));
    assert_eq!(events[3]["choices"][0]["finish_reason"], "stop");
}
