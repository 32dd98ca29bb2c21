//! `/tokenize` and `/detokenize` over sockets: they count what a chat request would count, and go both ways.

use serde_json::{Value, json};

use crate::http_setup::*;

async fn tokenize(server: &Server, body: Value) -> Value {
    success(server.send_json("/tokenize", &body).await).await
}

async fn detokenize(server: &Server, tokens: &Value) -> String {
    let reply = success(server.send_json("/detokenize", &json!({"tokens": tokens})).await).await;
    reply["prompt"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn text_becomes_tokens_and_tokens_text() {
    let server = simple_server().await;
    let body =
        json!({"model": MODEL, "prompt": "aé", "add_special_tokens": false, "return_token_strs": true});
    let reply = tokenize(&server, body).await;
    assert_eq!(
        reply,
        json!({"count": 3, "max_model_len": 4096, "tokens": [97, 195, 169], "token_strs": ["a", "\u{fffd}", "\u{fffd}"]})
    );
    assert_eq!(detokenize(&server, &reply["tokens"]).await, "aé");
    assert_eq!(tokenize(&server, json!({"prompt": ""})).await["count"], 0);
}

#[tokio::test]
async fn a_conversation_costs_what_the_chat_request_counts() {
    let server = simple_server().await;
    for body in [
        request(json!("Hi"), json!({})),
        // Never fetched: there is no such host.
        about("https://example.invalid/a.mp4", json!({})),
        about(&clip_url(), json!({"reasoning_effort": "none"})),
    ] {
        let reply = tokenize(&server, body.clone()).await;
        let tokens = reply["tokens"].as_array().unwrap();
        assert_eq!(reply["count"], tokens.len());
        assert_eq!(reply["token_strs"], Value::Null);
        let num_visual = tokens.iter().filter(|token| **token == -200).count();
        let has_video = body["messages"][0]["content"].is_array();
        assert_eq!(num_visual, if has_video { 8 } else { 0 });
        if !body.to_string().contains("invalid") {
            assert_eq!(server.ask(&body).await["usage"]["prompt_tokens"], reply["count"]);
        }
        let text = detokenize(&server, &reply["tokens"]).await;
        assert!(text.ends_with(" ASSISTANT:"), "{text}");
        assert_eq!(text.matches("<image>").count(), num_visual);
    }
}

#[tokio::test]
async fn special_tokens_show_their_names() {
    let server = simple_server().await;
    assert_eq!(detokenize(&server, &json!([72, 256, 105, -200])).await, "H<|endoftext|>i<image>");
    let whole_context = json!(vec![97; 30_000]);
    let mut config = config();
    config.max_json_values = 26_500;
    let narrow = crate::http_setup::server(config, tinyllava::model::fake::FakeModel::saying(REPLY)).await;
    assert_eq!(detokenize(&narrow, &whole_context).await.len(), 30_000);
}

#[tokio::test]
async fn faults_name_their_field() {
    let server = simple_server().await;
    let long = "x".repeat((128 << 10) + 1);
    let messages = json!([{"role": "user", "content": "Hi"}]);
    for (path, body, param) in [
        ("/tokenize", json!({}), json!("prompt")),
        ("/tokenize", json!({"prompt": "a", "messages": messages}), json!("prompt")),
        ("/tokenize", json!({"prompt": long}), json!("prompt")),
        ("/tokenize", json!({"prompt": "a", "odd": 1}), json!("odd")),
        ("/tokenize", json!({"prompt": 5}), json!("prompt")),
        (
            "/tokenize",
            json!({"messages": messages, "add_generation_prompt": false}),
            json!("add_generation_prompt"),
        ),
        ("/tokenize", json!({"messages": [{"role": "user"}]}), json!("messages[0].content")),
        ("/detokenize", json!({}), json!("tokens")),
        ("/detokenize", json!({"tokens": [1, 257]}), json!("tokens[1]")),
        ("/detokenize", json!({"tokens": [-1]}), json!("tokens[0]")),
        ("/detokenize", json!({"tokens": ["a"]}), json!("tokens[0]")),
    ] {
        let (status, refused) = error(server.send_json(path, &body).await).await;
        assert_eq!((status, &refused["param"]), (400, &param), "{path} {refused}");
    }
    for path in ["/tokenize", "/detokenize"] {
        let what = if path == "/tokenize" { ("prompt", json!("a")) } else { ("tokens", json!([])) };
        let body = json!({"model": "other", what.0: what.1});
        assert_eq!(error(server.send_json(path, &body).await).await.0, 404);
        let bare = server.client.post(format!("{}{path}", server.url)).body("x").send().await.unwrap();
        assert_eq!(error(bare).await.0, 415);
    }
}
