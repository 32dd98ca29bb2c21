//! Several choices of one request: one encode and one prefill, log probabilities, votes, confidence.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};
use tinyllava::model::fake::FakeModel;

use crate::http_setup::*;

const SHAPES: &str = "Which shape is the yellow object?\nA. cross\nB. square\nC. triangle\nD. star";

fn merged(mut body: Value, more: &Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
    body
}

/// What a stream says of each choice, in the form of a unary reply's choices.
struct Streamed {
    choices: Vec<Value>,
    vote: Value,
    usage: Value,
}

async fn streamed(server: &Server, body: &Value, count: usize) -> Streamed {
    let body = merged(body.clone(), &json!({"stream": true, "stream_options": {"include_usage": true}}));
    let events = Events::of(server.post(&body).send().await.unwrap()).rest().await;
    let empty =
        |index| json!({"index": index, "content": "", "reasoning": "", "logprobs": [], "finish": null});
    let mut streamed =
        Streamed { choices: (0..count).map(empty).collect(), vote: Value::Null, usage: Value::Null };
    for chunk in chunks(&events) {
        if chunk["choices"] == json!([]) {
            assert!(streamed.choices.iter().all(|choice| choice["finish"].is_string()), "before the end");
            assert!(streamed.usage.is_null(), "usage is the last chunk");
            streamed.vote = chunk.get("vote").cloned().unwrap_or(streamed.vote);
            streamed.usage = chunk["usage"].clone();
            continue;
        }
        let wire = &chunk["choices"][0];
        let choice = &mut streamed.choices[wire["index"].as_u64().unwrap() as usize];
        assert!(choice["finish"].is_null(), "a choice goes on after its end");
        for field in ["content", "reasoning"] {
            let longer =
                choice[field].as_str().unwrap().to_owned() + wire["delta"][field].as_str().unwrap_or("");
            choice[field] = longer.into();
        }
        let tokens = wire["logprobs"]["content"].as_array().cloned().unwrap_or_default();
        choice["logprobs"].as_array_mut().unwrap().extend(tokens);
        choice["finish"] = wire["finish_reason"].clone();
        choice["scores"] = wire["answer_logprobs"].clone();
    }
    streamed
}

/// The choices of a unary reply in the order of their indices, in the same form.
fn by_index(reply: &Value) -> Vec<Value> {
    let mut choices: Vec<Value> = reply["choices"].as_array().unwrap().clone();
    choices.sort_by_key(|choice| choice["index"].as_u64());
    let flat = |choice: &Value| {
        json!({
            "index": choice["index"],
            "content": choice["message"]["content"],
            "reasoning": choice["message"]["reasoning"].as_str().unwrap_or(""),
            "logprobs": choice["logprobs"]["content"].as_array().cloned().unwrap_or_default(),
            "finish": choice["finish_reason"],
            "scores": choice["answer_logprobs"],
        })
    };
    choices.iter().map(flat).collect()
}

#[tokio::test]
async fn four_choices_cost_one_encode_and_one_prefill() {
    for prefix_cache in [true, false] {
        let mut config = config();
        config.engine.prefix_cache = prefix_cache;
        let block_size = config.engine.block_size as u64;
        let server = nano_server(config).await;
        let more = json!({"n": 4, "temperature": 1, "seed": 5});
        let reply = server.ask(&demo("shape.mp4", SHAPES, more)).await;
        server.until_idle().await;
        let indices: Vec<u64> = reply["choices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|choice| choice["index"].as_u64().unwrap())
            .collect();
        assert_eq!(indices, [0, 1, 2, 3]);
        let prompt = reply["usage"]["prompt_tokens"].as_u64().unwrap();
        let tail = (prompt - 1) % block_size + 1;
        assert_eq!(server.metric("tinyllava_step_size_sum{kind=\"encode\"}").await, 16.0);
        let prefilled = server.metric("tinyllava_step_size_sum{kind=\"prefill\"}").await;
        assert_eq!(
            prefilled,
            (prompt + 3 * tail) as f64,
            "each sibling computes only the last partial block"
        );
        assert_eq!(server.metric("tinyllava_tokens_total{kind=\"prompt\"}").await, prompt as f64);
        let completion = reply["usage"]["completion_tokens"].as_u64().unwrap();
        assert_eq!(server.metric("tinyllava_tokens_total{kind=\"completion\"}").await, completion as f64);
        assert_eq!(server.metric("tinyllava_request_seconds_count{outcome=\"completed\"}").await, 1.0);
        assert_eq!(server.metric("tinyllava_time_to_first_token_seconds_count").await, 1.0);
    }
}

#[tokio::test]
async fn a_stream_and_a_unary_reply_of_several_choices_say_the_same() {
    let server = nano_server(config()).await;
    for more in [
        json!({}),
        json!({"logprobs": true, "top_logprobs": 2, "answer_logprobs": true, "vote": true}),
        json!({"logprobs": true, "stop": "shape", "max_tokens": 60}),
        json!({"logprobs": true, "include_reasoning": false}),
        json!({"logprobs": true, "reasoning_format": "none", "vote": true, "answer_logprobs": true}),
    ] {
        let sampling = json!({"n": 3, "temperature": 1.2, "seed": 11});
        let body = demo("shape.mp4", SHAPES, merged(sampling, &more));
        let unary = server.ask(&body).await;
        let stream = streamed(&server, &body, 3).await;
        assert_eq!(stream.choices, by_index(&unary), "{more}");
        assert_eq!(stream.vote, unary.get("vote").cloned().unwrap_or(Value::Null));
        for field in ["prompt_tokens", "completion_tokens", "total_tokens", "completion_tokens_details"] {
            assert_eq!(stream.usage[field], unary["usage"][field], "{more}");
        }
        if more["logprobs"] == true {
            let shown: usize =
                stream.choices.iter().map(|choice| choice["logprobs"].as_array().unwrap().len()).sum();
            let usage = &unary["usage"];
            let hidden = if more["include_reasoning"] == false {
                &usage["completion_tokens_details"]["reasoning_tokens"]
            } else {
                &json!(0)
            };
            let expected = usage["completion_tokens"].as_u64().unwrap() - hidden.as_u64().unwrap();
            assert_eq!(shown as u64, expected, "one entry a token: {more}");
        }
    }
}

#[tokio::test]
async fn choice_zero_is_the_reply_to_the_same_seed_alone_and_the_others_differ() {
    let server = nano_server(config()).await;
    let ask = async |n: u64| {
        server
            .ask(&demo(
                "count.mp4",
                "How many objects?\nA. 2\nB. 4",
                json!({"n": n, "temperature": 2.0, "seed": 3}),
            ))
            .await
    };
    let (alone, several) = (ask(1).await, ask(5).await);
    assert_eq!(several["choices"][0]["message"], alone["choices"][0]["message"]);
    assert_eq!(several["choices"], ask(5).await["choices"], "the same seed gives the same text");
    let texts: Vec<String> =
        several["choices"].as_array().unwrap().iter().map(|choice| choice["message"].to_string()).collect();
    assert!(texts.iter().any(|text| *text != texts[0]), "{texts:?}");
}

#[tokio::test]
async fn log_probabilities_have_the_form_of_openai() {
    let server = nano_server(config()).await;
    let more = json!({"logprobs": true, "top_logprobs": 3, "reasoning_format": "none"});
    let reply = server.ask(&demo("shape.mp4", SHAPES, more)).await;
    let choice = &reply["choices"][0];
    assert_eq!(choice["logprobs"]["refusal"], Value::Null);
    let tokens = choice["logprobs"]["content"].as_array().unwrap();
    let mut bytes = vec![];
    for token in tokens {
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        // Greedy: the chosen token is the most probable one.
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&token["token"], &token["logprob"]));
        assert!(top.is_sorted_by(|a, b| a["logprob"].as_f64() >= b["logprob"].as_f64()));
        let total: f64 = top.iter().map(|token| token["logprob"].as_f64().unwrap().exp()).sum();
        assert!(total <= 1.0 + 1e-5, "{total}");
        bytes.extend(token["bytes"].as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8));
    }
    assert_eq!(String::from_utf8(bytes).unwrap(), choice["message"]["content"].as_str().unwrap());
}

#[tokio::test]
async fn the_greedy_answer_is_the_most_probable_option() {
    let server = nano_server(config()).await;
    let questions = std::fs::read_to_string("models/nano/demo/questions.json").unwrap();
    for entry in serde_json::from_str::<Vec<Value>>(&questions).unwrap() {
        let question = entry["question"].as_str().unwrap();
        let more = json!({"answer_logprobs": true});
        let reply = server.ask(&demo(entry["video"].as_str().unwrap(), question, more)).await;
        let choice = &reply["choices"][0];
        let scores: BTreeMap<String, f64> =
            serde_json::from_value(choice["answer_logprobs"].clone()).unwrap();
        let confidence: BTreeMap<String, f64> =
            serde_json::from_value(choice["answer_confidence"].clone()).unwrap();
        assert_eq!(scores.len(), question.lines().count() - 1, "one for each option of {question}");
        let total: f64 = scores.values().map(|logprob| logprob.exp()).sum();
        assert!(total <= 1.0 + 1e-5 && total > 0.5, "{scores:?}");
        assert!((confidence.values().sum::<f64>() - 1.0).abs() < 1e-5, "{confidence:?}");
        let best = scores.iter().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
        assert!(choice["message"]["content"].as_str().unwrap().starts_with(best), "{choice}");
        assert!(choice["logprobs"].is_null(), "only the answer's were asked for");
    }
}

#[tokio::test]
async fn a_reply_without_answer_has_null_scores_and_no_vote() {
    let server = server(config(), FakeModel::saying("<think>still thinking")).await;
    let more = json!({"n": 2, "temperature": 0.1, "vote": true, "answer_logprobs": true});
    let reply = server.ask(&request(json!("What?"), more)).await;
    for choice in reply["choices"].as_array().unwrap() {
        assert_eq!((&choice["answer_logprobs"], &choice["answer_confidence"]), (&Value::Null, &Value::Null));
        assert!(choice.as_object().unwrap().contains_key("answer_logprobs"));
    }
    assert_eq!(reply["vote"], json!({"answer": null, "agreement": 0.0, "counts": {}, "winner": null}));
}

#[tokio::test]
async fn the_winner_of_a_vote_comes_first() {
    let server = nano_server(config()).await;
    let mut winners = vec![];
    for seed in 0..6 {
        let more = json!({"n": 5, "vote": true, "temperature": 2, "seed": seed});
        let reply = server.ask(&demo("shape.mp4", SHAPES, more)).await;
        let (vote, choices) = (&reply["vote"], reply["choices"].as_array().unwrap());
        let counts: BTreeMap<String, u64> = serde_json::from_value(vote["counts"].clone()).unwrap();
        assert!(counts.values().sum::<u64>() <= 5);
        let Some(answer) = vote["answer"].as_str() else { continue };
        assert_eq!(counts[answer], *counts.values().max().unwrap());
        assert!((vote["agreement"].as_f64().unwrap() - counts[answer] as f64 / 5.0).abs() < 1e-9);
        assert_eq!(choices[0]["index"], vote["winner"]);
        let first = choices[0]["message"]["content"].as_str().unwrap();
        assert!(first.to_ascii_uppercase().contains(answer), "{first}");
        let rest: Vec<u64> = choices[1..].iter().map(|choice| choice["index"].as_u64().unwrap()).collect();
        assert!(rest.is_sorted(), "{rest:?}");
        winners.push(vote["winner"].as_u64().unwrap());
    }
    assert!(!winners.is_empty());
}

#[tokio::test]
async fn hidden_and_raw_thinking_hold_for_every_choice() {
    let server = simple_server().await;
    let ask = async |more: Value| {
        let reply = server.ask(&request(json!("What?"), merged(json!({"n": 2}), &more))).await;
        reply["choices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|choice| choice["message"].clone())
            .collect::<Vec<_>>()
    };
    for message in ask(json!({"include_reasoning": false})).await {
        assert!(message["content"] == "C" && message.get("reasoning").is_none(), "{message}");
    }
    for message in ask(json!({"reasoning_format": "none"})).await {
        assert_eq!(message["content"], REPLY);
    }
}

#[tokio::test]
async fn places_for_all_choices_are_taken_at_once_and_given_back_when_the_client_leaves() {
    let mut config = config();
    config.engine.max_running_sequences = 2;
    config.engine.max_waiting_sequences = 3;
    let server = server(config, slow_model(&"word ".repeat(300), Duration::from_millis(5))).await;
    let ask =
        |n: u64, stream: bool| server.post(&request(json!("Hi"), json!({"n": n, "stream": stream}))).send();
    let mut events = Events::of(ask(4, true).await.unwrap());
    for _ in 0..8 {
        assert!(matches!(events.next().await, Some(Event::Data(_))));
    }
    let (status, refused) = error(ask(2, false).await.unwrap()).await;
    assert_eq!((status, &refused["code"]), (429, &json!("queue_full")));
    let (status, refused) = error(ask(6, false).await.unwrap()).await;
    assert_eq!((status, &refused["param"]), (400, &json!("n")), "more than the queue ever holds");
    drop(events);
    server.until_idle().await;
    let all = request(json!("Hi"), json!({"n": 5, "max_tokens": 2}));
    let reply = server.ask(&all).await;
    assert_eq!(
        reply["usage"]["completion_tokens"], 10,
        "more than run at once are served one after the other"
    );
}

#[tokio::test]
async fn one_failing_choice_ends_the_request_and_frees_the_others() {
    let mut model = FakeModel::saying("abc~def");
    model.poison = Some(u32::from(b'~'));
    let server = server(config(), model).await;
    let (status, refused) =
        error(server.post(&request(json!("Hi"), json!({"n": 3}))).send().await.unwrap()).await;
    assert_eq!((status, &refused["code"]), (500, &json!("internal_error")));
    server.until_idle().await;
}
