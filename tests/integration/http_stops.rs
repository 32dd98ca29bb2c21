//! The end of a reply, over sockets: stop strings cut the answer and never the thinking;
//! `min_tokens` keeps the end away.

use serde_json::{Value, json};
use tinyllava::model::fake::FakeModel;

use crate::http_setup::*;

const THINKING: &str = "One. Two.\n\nThree.";
const SAID: &str = "<think>One. Two.\n\nThree.</think>\n<answer>\nB. four\nfive.</answer> six";
const WHOLE: &str = "B. four\nfive.\nsix";

fn with(more: Value) -> Value {
    request(json!("What?"), more)
}

/// Reasoning, content and finish reason of a choice.
fn told(choice: &Value) -> (String, String, String) {
    let message = &choice["message"];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    (text(&message["reasoning_content"]), text(&message["content"]), text(&choice["finish_reason"]))
}

/// The same of a stream.
async fn streamed(server: &Server, body: &Value) -> (String, String, String) {
    let mut body = body.clone();
    body["stream"] = true.into();
    let events = Events::of(server.post(&body).send().await.unwrap()).rest().await;
    let chunks = chunks(&events);
    let reason = chunks.iter().find_map(|chunk| chunk["choices"][0]["finish_reason"].as_str()).unwrap();
    (text_of(&chunks, "reasoning_content"), text_of(&chunks, "content"), reason.into())
}

#[tokio::test]
async fn stop_strings_cut_the_answer_and_never_the_thinking() {
    let server = server(config(), FakeModel::saying(SAID)).await;
    for (stop, content, tokens) in [
        (json!("."), "B", Some("B.")),
        (json!(["\n"]), "B. four", Some("B. four\n")),
        (json!(["\n\n", "Three"]), WHOLE, None),
        (json!(["</answer>"]), "B. four\nfive.", Some("</answer>")),
        (json!(["<"]), "B. four\nfive.", Some("</answer>")),
        (json!(["</think>", "<think>", "<answer>"]), WHOLE, None),
        (json!(["never", "six", "e."]), "B. four\nfiv", Some("five.")),
    ] {
        let body = with(json!({"stop": stop}));
        let reply = server.ask(&body).await;
        let expected = (THINKING.to_owned(), content.to_owned(), "stop".to_owned());
        assert_eq!(told(&reply["choices"][0]), expected, "{stop}");
        assert_eq!(streamed(&server, &body).await, expected, "{stop}");
        let answer = SAID.find("<answer>").unwrap();
        let end = tokens.map_or(SAID.len(), |last| answer + SAID[answer..].find(last).unwrap() + last.len());
        assert_eq!(reply["usage"]["completion_tokens"], end, "{stop}");
        let reasoning = SAID.find("</think>").unwrap() + "</think>".len();
        assert_eq!(reply["usage"]["completion_tokens_details"]["reasoning_tokens"], reasoning);
    }
    // Raw text and completions are cut wherever it stands.
    let raw = server.ask(&with(json!({"stop": ["."], "reasoning_format": "none"}))).await;
    assert_eq!(raw["choices"][0]["message"]["content"], "<think>One");
    let prompt = json!({"prompt": "ASSISTANT:", "stop": ["."], "max_tokens": 100});
    let completion = success(server.send_json("/v1/completions", &prompt).await).await;
    assert_eq!(completion["choices"][0]["text"], "<think>One");
    // Hidden thinking is no answer either.
    let hidden = server.ask(&with(json!({"stop": ["."], "include_reasoning": false}))).await;
    assert_eq!(told(&hidden["choices"][0]), (String::new(), "B".into(), "stop".into()));
    server.until_idle().await;
}

#[tokio::test]
async fn a_reply_that_only_thinks_or_has_no_tags() {
    let thinks = server(config(), FakeModel::saying("<think>One. Two. ")).await;
    let reply = thinks.ask(&with(json!({"stop": ["."]}))).await;
    assert_eq!(told(&reply["choices"][0]), ("One. Two.".into(), String::new(), "stop".into()));
    let plain = server(config(), FakeModel::saying(" It turns. Left.")).await;
    let body = with(json!({"stop": [".", "Left"]}));
    let expected = (String::new(), "It turns".to_owned(), "stop".to_owned());
    assert_eq!(told(&plain.ask(&body).await["choices"][0]), expected);
    assert_eq!(streamed(&plain, &body).await, expected);
}

#[tokio::test]
async fn guides_votes_scores_and_responses_have_their_answer_with_a_stop_string() {
    let server =
        server(config(), FakeModel::saying("<think>One. Two.</think><answer>B. four</answer>")).await;
    // A guided answer is whole, also where the stop string is a part of it.
    for (guide, content) in [
        (json!({"guided_choice": ["A", "B"]}), "B"),
        (json!({"guided_choice": ["A. x", "B. four"]}), "B. four"),
        (json!({"structured_outputs": {"regex": "[AB]\\. [a-z]{4}"}}), "B. four"),
    ] {
        let mut body = with(guide.clone());
        body["stop"] = json!([".", "f"]);
        let reply = server.ask(&body).await;
        let expected = ("One. Two.".to_owned(), content.to_owned(), "stop".to_owned());
        assert_eq!(told(&reply["choices"][0]), expected, "{guide}");
        assert_eq!(streamed(&server, &body).await, expected, "{guide}");
    }
    let vote = json!({"stop": ["."], "n": 4, "vote": true, "temperature": 1.0, "top_k": 1});
    let reply = server.ask(&with(vote)).await;
    assert_eq!(reply["vote"], json!({"answer": "B", "agreement": 1.0, "counts": {"B": 4}, "winner": 0}));
    let question = json!("Which?\nA. one\nB. two");
    let scored = server.ask(&request(question, json!({"stop": ["."], "answer_logprobs": true}))).await;
    assert!(scored["choices"][0]["answer_confidence"]["B"].as_f64().unwrap() > 0.9, "{scored}");
    let body = json!({"input": "What?", "stop": ["."]});
    let response = success(server.send_json("/v1/responses", &body).await).await;
    assert_eq!(response["output"][0]["summary"][0]["text"], "One. Two.");
    assert_eq!(response["output"][1]["content"][0]["text"], "B");
    assert_eq!(response["status"], "completed");
}

#[tokio::test]
async fn stop_strings_and_a_thinking_budget_work_together() {
    let server = nano_server(config()).await;
    let body = request(
        json!("Which way does the circle move?\nA. left\nB. right\nC. up"),
        json!({"seed": 7, "temperature": 1.0, "thinking_token_budget": 5, "stop": ["."], "guided_choice": ["A", "B"]}),
    );
    let (reasoning, content, reason) = told(&server.ask(&body).await["choices"][0]);
    assert!(reasoning.ends_with("I have to answer now."), "{reasoning}");
    assert!(["A", "B"].contains(&content.as_str()) && reason == "stop", "{content} {reason}");
}

#[tokio::test]
async fn no_reply_is_shorter_than_its_fewest_tokens() {
    for ahead in [false, true] {
        let mut model = FakeModel::saying("<think>a</think>");
        model.runs_ahead = ahead;
        let server = server(config(), model).await;
        let thinking = "<think>a</think>".len();
        let num = |reply: &Value| reply["usage"]["completion_tokens"].as_u64().unwrap() as usize;
        assert_eq!(num(&server.ask(&with(json!({}))).await), thinking);
        for min_tokens in [0, 16, 17, 30] {
            let more = json!({"min_tokens": min_tokens, "max_tokens": 40});
            let reply = server.ask(&with(more.clone())).await;
            assert_eq!(num(&reply), min_tokens.max(thinking), "{reply}");
            assert_eq!(reply["choices"][0]["finish_reason"], "stop");
            let mut completion = more.clone();
            completion["prompt"] = "ASSISTANT:".into();
            let completion = success(server.send_json("/v1/completions", &completion).await).await;
            assert_eq!(num(&completion), min_tokens.max(thinking));
            let body = json!({"input": "What?", "min_tokens": min_tokens, "max_output_tokens": 40});
            let response = success(server.send_json("/v1/responses", &body).await).await;
            assert_eq!(response["usage"]["output_tokens"], min_tokens.max(thinking));
        }
        // As many as may come at all.
        let all = server.ask(&with(json!({"min_tokens": 20, "max_tokens": 20}))).await;
        assert_eq!((num(&all), &all["choices"][0]["finish_reason"]), (20, &json!("length")));
        // More than the server gives to requests that do not say.
        let more = server.ask(&with(json!({"min_tokens": 1500}))).await;
        assert_eq!(num(&more), 1500);
        server.until_idle().await;
    }
}

#[tokio::test]
async fn stop_strings_and_stop_tokens_wait_for_the_fewest_tokens() {
    let server = server(config(), FakeModel::saying("<answer>a.b.c.d.</answer>")).await;
    let content = async |more: Value| {
        let reply = server.ask(&with(more)).await;
        reply["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
    };
    assert_eq!(content(json!({"stop": ["."]})).await, "a");
    assert_eq!(content(json!({"stop": ["."], "min_tokens": 12, "max_tokens": 40})).await, "a.b");
    assert_eq!(content(json!({"stop": ["."], "min_tokens": 13, "max_tokens": 40})).await, "a.b.c");
    // An id that must not come is not sampled: the first of the other tokens is, the byte 0.
    let ids = json!({"stop_token_ids": [46], "min_tokens": 11, "max_tokens": 11});
    assert_eq!(content(ids).await, "a\u{0}b");
    assert_eq!(content(json!({"stop_token_ids": [46], "min_tokens": 9, "max_tokens": 40})).await, "a");
    // A grammar that is finished ends the reply.
    let guided =
        json!({"guided_choice": ["a.b"], "reasoning_effort": "none", "min_tokens": 30, "max_tokens": 40});
    assert_eq!(content(guided).await, "a.b");
    for (more, param) in [
        (json!({"min_tokens": 5, "max_tokens": 4}), "min_tokens"),
        (json!({"min_tokens": -1}), "min_tokens"),
        (json!({"min_tokens": 1.5}), "min_tokens"),
        (json!({"min_tokens": u64::MAX}), "min_tokens"),
    ] {
        let (status, refused) = error(server.post(&with(more.clone())).send().await.unwrap()).await;
        assert_eq!((status, &refused["param"]), (400, &json!(param)), "{more}: {refused}");
    }
    let too_many = server.post(&with(json!({"min_tokens": 100_000}))).send().await.unwrap();
    assert_eq!(error(too_many).await.1["code"], "context_length_exceeded");
}
