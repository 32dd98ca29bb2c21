//! `/v1/completions` over sockets: raw text in, raw text out.

use serde_json::{Value, json};

use crate::http_setup::*;

const COMPLETIONS: &str = "/v1/completions";
/// The scripted model goes on after these words only.
const PROMPT: &str = "Go on. ASSISTANT:";

async fn complete(server: &Server, more: Value) -> Value {
    success(server.send_json(COMPLETIONS, &with(more)).await).await
}

/// A request with [`PROMPT`] and `more`.
fn with(more: Value) -> Value {
    let mut request = json!({"prompt": PROMPT, "max_tokens": 200});
    request.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
    request
}

fn texts(chunks: &[&Value], index: usize) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    let own = choices.filter(|choice| choice["index"] == index);
    own.map(|choice| choice["text"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_text_goes_on_without_template_and_tags_are_text() {
    let server = simple_server().await;
    let reply = complete(&server, json!({"model": MODEL})).await;
    assert_eq!(reply["object"], "text_completion");
    assert!(reply["id"].as_str().unwrap().starts_with("cmpl-"));
    assert_eq!(
        reply["choices"],
        json!([{"index": 0, "text": REPLY, "logprobs": null, "finish_reason": "stop"}])
    );
    assert_eq!(reply["usage"]["prompt_tokens"], PROMPT.len());
    assert_eq!(reply["usage"]["completion_tokens"], REPLY.len());
    let ids: Vec<u8> = PROMPT.bytes().collect();
    for prompt in [json!(ids), json!([PROMPT]), json!([ids])] {
        assert_eq!(complete(&server, json!({"prompt": prompt})).await["choices"], reply["choices"]);
    }
    let short = complete(&server, json!({"max_tokens": null})).await;
    assert_eq!(short["choices"][0]["text"], REPLY[..16]);
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    let stopped = complete(&server, json!({"stop": "</think>"})).await;
    assert_eq!(stopped["choices"][0]["text"], "<think>The person bends.");
}

#[tokio::test]
async fn a_stream_tells_the_same_text_for_each_choice() {
    let server = simple_server().await;
    for more in [json!({}), json!({"n": 2, "echo": true}), json!({"n": 2, "logprobs": 2})] {
        let unary = complete(&server, more.clone()).await;
        let mut body = with(more);
        body["stream"] = true.into();
        body["stream_options"] = json!({"include_usage": true});
        let events = Events::of(server.send_json(COMPLETIONS, &body).await).rest().await;
        let chunks = chunks(&events);
        assert!(chunks.iter().all(|chunk| chunk["object"] == "text_completion"));
        for choice in unary["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            assert_eq!(texts(&chunks, index), choice["text"].as_str().unwrap());
        }
        assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], unary["usage"]["completion_tokens"]);
    }
    let echoed = complete(&server, json!({"echo": true, "prompt": [PROMPT.as_bytes()]})).await;
    assert_eq!(echoed["choices"][0]["text"], format!("{PROMPT}{REPLY}"));
}

#[tokio::test]
async fn log_probabilities_have_the_legacy_shape() {
    let server = simple_server().await;
    let reply = complete(&server, json!({"logprobs": 2})).await;
    let logprobs = &reply["choices"][0]["logprobs"];
    let list = |name: &str| logprobs[name].as_array().unwrap().clone();
    let tokens: String = list("tokens").iter().map(|token| token.as_str().unwrap()).collect();
    assert!(tokens.starts_with(REPLY), "{tokens}");
    for name in ["token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(list(name).len(), list("tokens").len());
    }
    assert_eq!(list("text_offset")[..3], [json!(0), json!(1), json!(2)]);
    let top = list("top_logprobs")[0].as_object().unwrap().clone();
    assert_eq!(top.len(), 2);
    assert_eq!(top["<"], list("token_logprobs")[0]);
}

#[tokio::test]
async fn faults_name_their_field() {
    let server = simple_server().await;
    for (more, param) in [
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": ["a", "b"]}), "prompt"),
        (json!({"prompt": [[[1]]]}), "prompt"),
        (json!({"prompt": [["a"]]}), "prompt"),
        (json!({"prompt": [257]}), "prompt"),
        (json!({"prompt": [-1]}), "prompt"),
        (json!({"prompt": "x".repeat((128 << 10) + 1)}), "prompt"),
        (json!({"suffix": "a"}), "suffix"),
        (json!({"messages": []}), "messages"),
        (json!({"vote": true}), "vote"),
        (json!({"logprobs": 6}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"logprobs": 1, "echo": true}), "logprobs"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"temperature": 3}), "temperature"),
        (json!({"seed": []}), "seed"),
        (json!({"n": 2, "best_of": 3}), "best_of"),
    ] {
        let (status, refused) = error(server.send_json(COMPLETIONS, &with(more)).await).await;
        assert_eq!((status, &refused["param"]), (400, &json!(param)), "{refused}");
    }
    let (status, refused) =
        error(server.send_json(COMPLETIONS, &with(json!({"max_tokens": 100_000}))).await).await;
    assert_eq!((status, &refused["code"]), (400, &json!("context_length_exceeded")));
    assert_eq!(error(server.send_json(COMPLETIONS, &with(json!({"model": "x"}))).await).await.0, 404);
    let upload = server.send_form(COMPLETIONS, form(&with(json!({})), clip_bytes())).await;
    assert_eq!(error(upload).await.0, 400);
}
