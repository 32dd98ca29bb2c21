//! `/v1/completions` over sockets: raw text in, raw text out.

use serde_json::{Value, json};
use tinyllava::model::fake::FakeModel;

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
        (json!({"prompt": ["a", ""]}), "prompt"),
        (json!({"prompt": ["a", [1], 2]}), "prompt"),
        (json!({"prompt": vec!["a"; 65]}), "prompt"),
        (json!({"prompt": vec!["a"; 25], "n": 8, "temperature": 1}), "prompt"),
        (json!({"prompt": ["x".repeat(128 << 10), "x"]}), "prompt"),
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
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 0, "echo": false, "logprobs": 1}), "max_tokens"),
        (json!({"min_tokens": 201}), "min_tokens"),
        (json!({"min_tokens": -1}), "min_tokens"),
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

/// A model whose next token is a function of all tokens before it, and that function.
fn reading_model() -> (FakeModel, impl Fn(&[u32]) -> u32) {
    let mut model = FakeModel::saying("");
    model.reads_all = true;
    let next = |tokens: &[u32]| tokens.iter().fold(7, |hash, token| (hash * 31 + token) % u32::from(b'z'));
    (model, next)
}

/// Log probability of the fake model's next token, and of any other.
fn logprobs_of_fake() -> (f64, f64) {
    let log_sum = (10f64.exp() + 256.0).ln();
    (10.0 - log_sum, -log_sum)
}

fn assert_close(got: &Value, expected: f64) {
    assert!((got.as_f64().unwrap() - expected).abs() < 1e-5, "{got} is not {expected}");
}

#[tokio::test]
async fn echo_with_logprobs_scores_every_token_of_the_prompt() {
    for max_prefill_tokens in [1, 7, 512] {
        let (model, next) = reading_model();
        let mut config = config();
        config.engine.max_prefill_tokens = max_prefill_tokens;
        let server = server(config, model).await;
        // Longer than a step may score, and than a block: what the model would say, but for each
        // tenth token.
        let mut prompt = vec![65u32];
        while prompt.len() < 150 {
            let next = next(&prompt);
            prompt.push(if prompt.len() % 10 == 0 { (next + 1) % 122 } else { next });
        }
        let body = json!({"prompt": prompt, "echo": true, "logprobs": 1, "max_tokens": 1, "temperature": 0});
        let (likely, unlikely) = logprobs_of_fake();
        for _ in 0..2 {
            let reply = success(server.send_json(COMPLETIONS, &body).await).await;
            let choice = &reply["choices"][0];
            let list = |name: &str| choice["logprobs"][name].as_array().unwrap().clone();
            let (scores, top) = (list("token_logprobs"), list("top_logprobs"));
            assert_eq!([list("tokens").len(), scores.len(), top.len(), list("text_offset").len()], [151; 4]);
            assert!(scores[0].is_null() && top[0].is_null());
            for i in 1..150 {
                let is_next = i % 10 != 0;
                assert_close(&scores[i], if is_next { likely } else { unlikely });
                let best = top[i]
                    .as_object()
                    .unwrap()
                    .values()
                    .map(|l| l.as_f64().unwrap())
                    .fold(f64::MIN, f64::max);
                assert_eq!(
                    scores[i].as_f64() == Some(best),
                    is_next,
                    "lm-eval compares the two for equality"
                );
            }
            assert_eq!(
                list("tokens").iter().map(|t| t.as_str().unwrap()).collect::<String>(),
                choice["text"].as_str().unwrap()
            );
            assert_eq!(choice["finish_reason"], "length");
            assert_eq!(reply["usage"]["completion_tokens"], 1);
            assert_eq!(reply["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
        }
        // A request without scores finds the blocks in the cache.
        let more = json!({"prompt": prompt, "max_tokens": 1, "temperature": 0});
        let reply = success(server.send_json(COMPLETIONS, &more).await).await;
        assert!(reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() >= 128, "{reply}");
        server.until_idle().await;
    }
}

#[tokio::test]
async fn scores_of_a_completion_and_of_the_same_text_as_prompt_are_equal() {
    let server = simple_server().await;
    let own = complete(&server, json!({"logprobs": 3})).await["choices"][0]["logprobs"].clone();
    let text = format!("{PROMPT}{REPLY}");
    let body = json!({"prompt": text, "echo": true, "logprobs": 3, "max_tokens": 0});
    let reply = complete(&server, body.clone()).await;
    let choice = &reply["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(text), &json!("length")));
    assert_eq!(reply["usage"]["completion_tokens"], 0);
    let rest = |name: &str, from: usize| choice["logprobs"][name].as_array().unwrap()[from..].to_vec();
    for name in ["tokens", "token_logprobs", "top_logprobs"] {
        assert_eq!(json!(rest(name, PROMPT.len())), own[name], "{name}");
    }
    assert_eq!(rest("text_offset", 0), (0..text.len()).map(|i| json!(i)).collect::<Vec<_>>());
    // The same as a stream, in chunks.
    let mut body = with(body);
    body["stream"] = true.into();
    let events = Events::of(server.send_json(COMPLETIONS, &body).await).rest().await;
    let chunks = chunks(&events);
    assert_eq!(texts(&chunks, 0), text);
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let lists = chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"][name].as_array());
        assert_eq!(json!(lists.flatten().collect::<Vec<_>>()), choice["logprobs"][name], "{name}");
    }
}

#[tokio::test]
async fn the_token_that_ends_the_reply_is_scored_with_an_echo() {
    let server = simple_server().await;
    // The model has said all it says: the one token it may add is its end.
    let text = format!("{PROMPT}{REPLY}");
    for (echo, tokens) in [(true, text.len() + 1), (false, 0)] {
        let body = json!({"prompt": text, "echo": echo, "logprobs": 1, "max_tokens": 1});
        let reply = complete(&server, body).await;
        let choice = &reply["choices"][0];
        assert_eq!(choice["logprobs"]["tokens"].as_array().map_or(0, Vec::len), tokens, "{reply}");
        assert_eq!(
            (&choice["finish_reason"], &reply["usage"]["completion_tokens"]),
            (&json!("stop"), &json!(0))
        );
        if echo {
            assert_eq!(choice["logprobs"]["tokens"][text.len()], "<|endoftext|>");
            assert_close(&choice["logprobs"]["token_logprobs"][text.len()], logprobs_of_fake().0);
            assert_eq!(choice["text"], text);
        }
    }
}

#[tokio::test]
async fn several_prompts_have_choices_of_their_own_in_order() {
    let server = simple_server().await;
    let prompts =
        json!(["One ASSISTANT:", [84, 119, 111, 32, 65, 83, 83, 73, 83, 84, 65, 78, 84, 58], "3 ASSISTANT:"]);
    let body = json!({"prompt": prompts, "n": 2, "echo": true, "logprobs": 1, "max_tokens": 7});
    let reply = complete(&server, body.clone()).await;
    let choices = reply["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 6);
    for (index, choice) in choices.iter().enumerate() {
        let prompt = ["One ASSISTANT:", "Two ASSISTANT:", "3 ASSISTANT:"][index / 2];
        assert_eq!((&choice["index"], &choice["text"]), (&json!(index), &json!(format!("{prompt}<think>"))));
        assert_eq!(choice["logprobs"]["tokens"].as_array().unwrap().len(), prompt.len() + 7);
    }
    assert_eq!(reply["usage"]["prompt_tokens"], 14 + 14 + 12);
    assert_eq!(reply["usage"]["completion_tokens"], 6 * 7);
    let mut body = with(body);
    body["stream"] = true.into();
    let events = Events::of(server.send_json(COMPLETIONS, &body).await).rest().await;
    let chunks = chunks(&events);
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(json!(texts(&chunks, index)), choice["text"]);
    }
    let one = complete(&server, json!({"prompt": ["3 ASSISTANT:"], "max_tokens": 3})).await;
    assert_eq!(one["choices"][0]["text"], "<th");
    server.until_idle().await;
}
