//! What the server says about itself: probes, models, metrics, request ids, and `openapi.yaml` against the router.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tinyllava::{http::openapi, model::fake::FakeModel};

use crate::http_setup::*;

#[test]
fn every_route_is_documented_and_every_documented_path_exists() {
    let document = openapi::document();
    assert_eq!(document["openapi"], "3.1.0");
    let documented: BTreeSet<(String, String)> = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, methods)| {
            methods.as_object().unwrap().keys().map(|method| (method.to_uppercase(), path.clone()))
        })
        .collect();
    let routed: BTreeSet<(String, String)> = tinyllava::http::route_list()
        .into_iter()
        .map(|(method, path)| (method.to_string(), path.replace("{*", "{")))
        .collect();
    assert_eq!(documented, routed);
}

#[test]
fn openapi_yaml_is_what_the_types_say() {
    let file = std::fs::read_to_string("openapi.yaml").unwrap();
    assert!(file == openapi::yaml(), "openapi.yaml is not up to date: run `make openapi`");
}

#[test]
fn every_reference_of_the_document_leads_somewhere() {
    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                found.extend(map.get("$ref").and_then(Value::as_str).map(str::to_owned));
                map.values().for_each(|value| references(value, found));
            }
            Value::Array(list) => list.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }
    let document = openapi::document();
    let mut found = vec![];
    references(&document, &mut found);
    assert!(found.len() > 20);
    for reference in found {
        let pointer = reference.strip_prefix('#').expect("all references are local");
        assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
    }
}

/// The properties of a schema and of all its parts.
fn properties(document: &Value, schema: &Value, found: &mut BTreeSet<String>) {
    if let Some(reference) = schema["$ref"].as_str() {
        properties(document, document.pointer(reference.strip_prefix('#').unwrap()).unwrap(), found);
    }
    let parts = ["allOf", "oneOf"].into_iter().flat_map(|kind| schema[kind].as_array().into_iter().flatten());
    parts.for_each(|part| properties(document, part, found));
    found.extend(schema["properties"].as_object().into_iter().flat_map(|object| object.keys().cloned()));
}

/// The keys of a reply are exactly what the document says (`videos` is there in place of `video`
/// when there are several, `tool_calls` where a call was asked for).
#[tokio::test]
async fn replies_have_the_documented_fields() {
    let document = openapi::document();
    let server = simple_server().await;
    let everything =
        json!({"n": 2, "temperature": 0.1, "vote": true, "logprobs": true, "answer_logprobs": true});
    let reply = server.ask(&about(&clip_url(), everything)).await;
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let call = server.ask(&request(json!("What?"), json!({"tools": tools, "tool_choice": "required"}))).await;
    let call = &call["choices"][0]["message"]["tool_calls"][0];
    let model = success(server.get(&format!("/v1/models/{MODEL}")).send().await.unwrap()).await;
    for (schema, value) in [
        ("ChatCompletion", &reply),
        ("Choice", &reply["choices"][0]),
        ("Logprobs", &reply["choices"][0]["logprobs"]),
        ("TokenLogprob", &reply["choices"][0]["logprobs"]["content"][0]),
        ("Vote", &reply["vote"]),
        ("ReplyMessage", &reply["choices"][0]["message"]),
        ("ToolCall", call),
        ("CalledFunction", &call["function"]),
        ("Usage", &reply["usage"]),
        ("VideoInfo", &reply["video"]),
        ("Model", &model),
    ] {
        let got: BTreeSet<String> = value.as_object().unwrap().keys().cloned().collect();
        let mut documented = BTreeSet::new();
        properties(&document, &document["components"]["schemas"][schema], &mut documented);
        documented.remove("videos");
        documented.remove("tool_calls");
        assert_eq!(got, documented, "{schema}");
    }
}

#[tokio::test]
async fn the_document_is_served_as_json() {
    let server = simple_server().await;
    let document = success(server.get("/openapi.json").send().await.unwrap()).await;
    assert_eq!(document, openapi::document());
}

#[tokio::test]
async fn models_lists_the_one_that_is_served() {
    let server = simple_server().await;
    let list = success(server.get("/v1/models").send().await.unwrap()).await;
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], MODEL);
    assert_eq!(list["data"][0]["max_model_len"], 4096);
    assert_eq!(list["data"][0]["architecture"]["input_modalities"], json!(["text", "video", "image"]));
    let one = success(server.get(&format!("/v1/models/{MODEL}")).send().await.unwrap()).await;
    assert_eq!(one, list["data"][0]);
    let (status, refused) = error(server.get("/v1/models/a/b").send().await.unwrap()).await;
    assert_eq!((status, &refused["code"]), (404, &json!("model_not_found")));
}

#[tokio::test]
async fn probes_answer_while_the_model_loads_and_requests_are_told_to_wait() {
    let state = state(config());
    let server = serve(state.clone()).await;
    assert_eq!(success(server.get("/health").send().await.unwrap()).await["status"], "ok");
    let version = success(server.get("/version").send().await.unwrap()).await;
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    for asked in
        [server.get("/ready"), server.get("/v1/models"), server.post(&request(json!("Hi"), json!({})))]
    {
        let (status, refused) = error(asked.send().await.unwrap()).await;
        assert_eq!((status, &refused["code"]), (503, &json!("loading")));
    }
    assert_eq!(server.metric("tinyllava_rejections_total{reason=\"loading\"}").await, 1.0);
    load(&state, FakeModel::saying(REPLY));
    assert_eq!(success(server.get("/ready").send().await.unwrap()).await["status"], "ready");
    assert_eq!(server.ask(&request(json!("Hi"), json!({}))).await["choices"][0]["message"]["content"], "C");
}

#[tokio::test]
async fn unknown_paths_and_methods_are_answered_in_the_same_form() {
    let server = simple_server().await;
    let (status, refused) = error(server.get("/v2/nothing").send().await.unwrap()).await;
    assert_eq!((status, &refused["code"]), (404, &json!("not_found")));
    let (status, refused) = error(server.get("/v1/models/%FF").send().await.unwrap()).await;
    assert_eq!((status, &refused["code"]), (404, &json!("not_found")));
    let response = server.get(CHAT).send().await.unwrap();
    assert_eq!(response.headers()["allow"], "POST");
    let (status, refused) = error(response).await;
    assert_eq!((status, &refused["code"]), (405, &json!("method_not_allowed")));
    assert_eq!(
        server
            .metric("tinyllava_http_requests_total{method=\"GET\",route=\"unmatched\",status=\"404\"}")
            .await,
        1.0
    );
}

#[tokio::test]
async fn every_response_carries_the_request_id() {
    let server = simple_server().await;
    let sent = server.get("/health").header("x-request-id", "trace-1").send().await.unwrap();
    assert_eq!(sent.headers()["x-request-id"], "trace-1");
    let made = server.get("/nothing").send().await.unwrap();
    assert!(made.headers()["x-request-id"].len() >= 32);
    let mut body = request(json!("Hi"), json!({}));
    body["stream"] = true.into();
    let streamed = server.post(&body).header("x-request-id", "a b").send().await.unwrap();
    assert_ne!(streamed.headers()["x-request-id"], "a b");
}

#[tokio::test]
async fn metrics_count_what_happened() {
    let server = simple_server().await;
    server.ask(&about(&clip_url(), json!({}))).await;
    server.ask(&about(&clip_url(), json!({}))).await;
    server.until_idle().await;
    for (name, value) in [
        ("tinyllava_tokens_total{kind=\"completion\"}", 2.0 * REPLY.len() as f64),
        ("tinyllava_tokens_total{kind=\"video\"}", 16.0),
        ("tinyllava_time_to_first_token_seconds_count", 2.0),
        ("tinyllava_queue_seconds_count", 2.0),
        ("tinyllava_request_seconds_count{outcome=\"completed\"}", 2.0),
        ("tinyllava_stage_seconds_count{stage=\"prompt\"}", 2.0),
        // The second time the frames come from the cache.
        ("tinyllava_stage_seconds_count{stage=\"fetch\"}", 2.0),
        ("tinyllava_stage_seconds_count{stage=\"probe\"}", 1.0),
        ("tinyllava_stage_seconds_count{stage=\"decode\"}", 1.0),
        ("tinyllava_stage_seconds_count{stage=\"resize\"}", 1.0),
        ("tinyllava_step_size_sum{kind=\"encode\"}", 4.0),
        ("tinyllava_video_frames_total", 8.0),
        // The second time the prefix cache has the video's blocks: its encoder output is not asked for.
        ("tinyllava_cache_queries_total{cache=\"encoder\"}", 1.0),
        ("tinyllava_http_requests_total{method=\"POST\",route=\"/v1/chat/completions\",status=\"200\"}", 2.0),
    ] {
        assert_eq!(server.metric(name).await, value, "{name}");
    }
    assert!(server.metric("tinyllava_cache_hits_total{cache=\"prefix\"}").await > 0.0);
    let gaps = server.metric("tinyllava_inter_token_latency_seconds_count").await;
    assert_eq!(gaps, 2.0 * (REPLY.len() as f64 - 1.0));
}
