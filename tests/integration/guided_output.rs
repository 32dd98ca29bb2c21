//! Guided replies and the end of the thinking, over real sockets: by the embedded model where the words matter, by the
//! scripted one where the order of events does.

use std::time::Duration;

use serde_json::{Value, json};

use crate::http_setup::*;

/// The last words of a thinking that was ended.
const LAST_WORDS: &str = "I have to answer now.";
const QUESTION: &str = "Which way does the circle move?\nA. left\nB. right\nC. up";

fn asked(more: Value) -> Value {
    let mut body = request(json!(QUESTION), json!({"seed": 7, "temperature": 1.0}));
    body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
    body
}

fn with(mut body: Value, more: &Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
    body
}

/// Content and reasoning of a stream, and its reason to finish.
async fn streamed(server: &Server, body: &Value) -> (String, String, String) {
    let body = with(body.clone(), &json!({"stream": true}));
    let events = Events::of(server.post(&body).send().await.unwrap()).rest().await;
    let chunks = chunks(&events);
    let reason = chunks.iter().find_map(|chunk| chunk["choices"][0]["finish_reason"].as_str()).unwrap();
    (text_of(&chunks, "content"), text_of(&chunks, "reasoning_content"), reason.into())
}

fn schema() -> Value {
    json!({"type": "object", "properties": {"letter": {"enum": ["A", "B", "C"]}, "why": {"type": "string", "maxLength": 40},
        "sure": {"type": "boolean"}}, "required": ["letter", "why", "sure"], "additionalProperties": false})
}

fn is_of_schema(text: &str) -> bool {
    let Ok(value) = serde_json::from_str::<Value>(text) else { return false };
    ["A", "B", "C"].contains(&value["letter"].as_str().unwrap_or_default())
        && value["why"].is_string()
        && value["sure"].is_boolean()
        && value.as_object().unwrap().len() == 3
}

type Fits = fn(&str) -> bool;

/// Every kind of guide, and what its content must satisfy.
fn guides() -> Vec<(Value, Fits)> {
    let is_object: Fits = |text| serde_json::from_str::<Value>(text).is_ok_and(|value| value.is_object());
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "reply", "strict": true, "schema": schema()}});
    vec![
        (json!({"structured_outputs": {"choice": ["left", "right", "up </answer> or <down>"]}}), |text| {
            ["left", "right", "up </answer> or <down>"].contains(&text)
        }),
        (json!({"guided_regex": "[A-C](, because [a-z ]{3,12})?"}), |text| {
            text.starts_with(['A', 'B', 'C']) && (text.len() == 1 || text[1..].starts_with(", because "))
        }),
        (json!({"response_format": format}), is_of_schema),
        (json!({"response_format": {"type": "json_object"}}), is_object),
        (
            json!({"structured_outputs": {"grammar": "start: (\"circle\" | \"square\") (\" \" WAY)+\nWAY: /left|right|up/"}}),
            |text| {
                let mut words = text.split(' ');
                ["circle", "square"].contains(&words.next().unwrap())
                    && words.clone().count() > 0
                    && words.all(|word| ["left", "right", "up"].contains(&word))
            },
        ),
    ]
}

#[tokio::test]
async fn every_guide_holds_with_and_without_thinking_streamed_and_unary() {
    let server = &nano_server(config()).await;
    for (guide, fits) in guides() {
        for thinking in [json!({}), json!({"reasoning_effort": "none"})] {
            let body = with(asked(guide.clone()), &thinking);
            let unary = server.ask(&body).await;
            let message = &unary["choices"][0]["message"];
            let content = message["content"].as_str().unwrap();
            assert!(fits(content), "{guide}, {thinking}: {unary}");
            let reasoning = message["reasoning_content"].as_str().unwrap_or_default();
            assert_eq!(reasoning.is_empty(), thinking != json!({}), "{unary}");
            let finish = unary["choices"][0]["finish_reason"].as_str().unwrap();
            assert_eq!(streamed(server, &body).await, (content.into(), reasoning.into(), finish.into()));
        }
        let raw = server.ask(&with(asked(guide.clone()), &json!({"reasoning_format": "none"}))).await;
        let content = raw["choices"][0]["message"]["content"].as_str().unwrap();
        let (thinking, answer) = content.split_once("<answer>").unwrap_or_else(|| panic!("{raw}"));
        assert!(thinking.trim_start().starts_with("<think>"), "{raw}");
        assert!(answer.strip_suffix("</answer>").is_some_and(fits), "{raw}");
    }
}

#[tokio::test]
async fn a_tight_budget_still_gives_a_whole_answer_or_is_refused() {
    let server = &nano_server(config()).await;
    for (guide, fits) in guides() {
        let mut shortest = 0;
        for max_tokens in [1, 4, 16, 24, 32, 48, 64, 96, 200] {
            let body = with(asked(guide.clone()), &json!({"max_tokens": max_tokens}));
            let response = server.post(&body).send().await.unwrap();
            if response.status() == 400 {
                let (_, refused) = error(response).await;
                assert_eq!((&refused["param"], shortest), (&json!("max_tokens"), 0), "{refused}");
                continue;
            }
            let reply = success(response).await;
            shortest = if shortest == 0 { max_tokens } else { shortest };
            assert!(
                fits(reply["choices"][0]["message"]["content"].as_str().unwrap()),
                "{max_tokens}: {reply}"
            );
            assert_eq!(reply["choices"][0]["finish_reason"], "stop", "{max_tokens}: {reply}");
            assert!(reply["usage"]["completion_tokens"].as_u64().unwrap() <= max_tokens);
        }
        assert!((4..=96).contains(&shortest), "{guide}: {shortest} tokens");
    }
}

#[tokio::test]
async fn a_thinking_budget_ends_the_thinking_with_its_last_words() {
    let server = &nano_server(config()).await;
    let choice = json!({"guided_choice": ["A", "B", "C"]});
    for guide in [json!({}), choice] {
        let free = server.ask(&asked(guide.clone())).await;
        let thought = free["choices"][0]["message"]["reasoning"].as_str().unwrap().to_owned();
        for (name, budget) in
            [("thinking_token_budget", 0), ("max_thinking_tokens", 5), ("thinking_token_budget", 900)]
        {
            let body = with(asked(guide.clone()), &json!({name: budget}));
            let reply = server.ask(&body).await;
            let message = &reply["choices"][0]["message"];
            let reasoning = message["reasoning"].as_str().unwrap();
            let num_reasoning =
                reply["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap();
            let is_guided = guide != json!({});
            assert!(!is_guided || !message["content"].as_str().unwrap().is_empty(), "{reply}");
            if budget == 900 {
                assert_eq!(reasoning, thought, "not reached: nothing changes");
                continue;
            }
            assert!(reasoning.ends_with(LAST_WORDS), "{reply}");
            assert_eq!(reasoning == LAST_WORDS, budget == 0, "{reply}");
            assert!((budget..budget + 60).contains(&num_reasoning), "{reply}");
            let (content, streamed_reasoning, _) = streamed(server, &body).await;
            assert_eq!(
                (content.as_str(), streamed_reasoning.as_str()),
                (message["content"].as_str().unwrap(), reasoning)
            );
        }
    }
}

#[tokio::test]
async fn many_guided_requests_at_once_do_not_disturb_each_other() {
    let server = &nano_server(config()).await;
    let guides = guides();
    let ask = async |index: usize| {
        let (guide, fits) = &guides[index % guides.len()];
        let body = with(asked(guide.clone()), &json!({"seed": index, "max_tokens": 150}));
        let reply = server.ask(&body).await;
        assert!(fits(reply["choices"][0]["message"]["content"].as_str().unwrap()), "{guide}: {reply}");
        reply["choices"].clone()
    };
    let together = futures_util::future::join_all((0..16).map(ask)).await;
    assert_eq!(ask(3).await, together[3], "alone it says the same");
}

#[tokio::test]
async fn each_of_several_choices_is_guided_by_itself() {
    let server = &nano_server(config()).await;
    let (guide, fits) = &guides()[2];
    let reply = server.ask(&with(asked(guide.clone()), &json!({"n": 3, "thinking_token_budget": 9}))).await;
    let contents: Vec<&str> =
        (0..3).map(|index| reply["choices"][index]["message"]["content"].as_str().unwrap()).collect();
    assert!(contents.iter().all(|content| fits(content)), "{reply}");
    assert!(contents.windows(2).any(|pair| pair[0] != pair[1]), "they go their own ways: {reply}");
}

#[tokio::test]
async fn what_is_no_guide_is_a_400_and_does_no_harm() {
    let server = simple_server().await;
    for (more, param) in [
        (json!({"guided_regex": "(["}), "guided_regex"),
        (json!({"guided_regex": "((a{900}){900}){900}"}), "guided_regex"),
        (json!({"structured_outputs": {"grammar": "start: what"}}), "structured_outputs.grammar"),
        (json!({"guided_grammar": "start: /.+/"}), "guided_grammar"),
        (json!({"guided_json": {"type": "thing"}}), "guided_json"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object", "properties": 1}}}}),
            "response_format.json_schema.schema",
        ),
        (json!({"guided_choice": ["A"], "response_format": {"type": "json_object"}}), "guided_choice"),
        (json!({"guided_choice": ["A"], "max_tokens": 10}), "max_tokens"),
        (json!({"guided_choice": ["A"], "ignore_eos": true}), "ignore_eos"),
        (json!({"thinking_token_budget": 3, "max_thinking_tokens": 4}), "max_thinking_tokens"),
    ] {
        let response = server.post(&request(json!("What?"), more.clone())).send().await.unwrap();
        let (status, refused) = error(response).await;
        assert_eq!((status, refused["param"].as_str()), (400, Some(param)), "{more}: {refused}");
        assert!(!refused["message"].as_str().unwrap().contains('\n'), "{refused}");
    }
    let reply = server.ask(&request(json!("What?"), json!({"guided_choice": ["C", "D"]}))).await;
    assert_eq!(reply["choices"][0]["message"]["content"], "C");
    assert_eq!(reply["choices"][0]["message"]["reasoning"], "The person bends.");
    server.until_idle().await;
}

/// Tells the chat `id` to answer; status and body.
async fn end_thinking(server: &Server, id: &str) -> reqwest::Response {
    server.client.post(format!("{}{CHAT}/{id}/end_thinking", server.url)).send().await.unwrap()
}

/// Reads up to the first delta of a segment.
async fn until_segment(events: &mut Events, segment: &str) -> Vec<Event> {
    let mut before = vec![];
    loop {
        let event = events.next().await.expect("the segment comes");
        let is_there =
            matches!(&event, Event::Data(data) if data["choices"][0]["delta"]["segment"] == segment);
        before.push(event);
        if is_there {
            return before;
        }
    }
}

#[tokio::test]
async fn a_running_chat_can_be_told_to_answer() {
    let said = format!("<think>{}</think><answer>", "thinking ".repeat(400));
    for (by_request_id, guide) in [(false, json!({"guided_choice": ["A", "B"]})), (true, json!({}))] {
        let server = server(config(), slow_model(&said, Duration::from_millis(2))).await;
        let body = with(request(json!("What?"), json!({"stream": true, "max_tokens": 400})), &guide);
        let sent = server.post(&body).header("x-request-id", "mine-1").send().await.unwrap();
        let mut events = Events::of(sent);
        let mut all = until_segment(&mut events, "think").await;
        let Event::Data(first) = &all[0] else { panic!("{all:?}") };
        let id = if by_request_id { "mine-1".to_owned() } else { first["id"].as_str().unwrap().to_owned() };
        let ended = success(end_thinking(&server, &id).await).await;
        assert_eq!(ended, json!({"id": id, "object": "chat.completion.end_thinking", "accepted": true}));
        all.extend(until_segment(&mut events, "answer").await);
        if by_request_id {
            let (status, refused) = error(end_thinking(&server, &id).await).await;
            assert_eq!((status, &refused["code"]), (409, &json!("thinking_is_over")));
        }
        all.extend(events.rest().await);
        all.retain(|event| !matches!(event, Event::Comment(_)));
        let chunks = chunks(&all);
        let reasoning = text_of(&chunks, "reasoning_content");
        assert!(reasoning.starts_with('t') && reasoning.ends_with(LAST_WORDS), "{reasoning}");
        if !by_request_id {
            assert_eq!(text_of(&chunks, "content"), "A");
        }
        let (status, refused) = error(end_thinking(&server, &id).await).await;
        assert_eq!((status, &refused["code"]), (404, &json!("chat_completion_not_found")));
        server.until_idle().await;
    }
}

/// Rules that call each other, or conditions in each other, as deep as a grammar may be large.
fn deep_grammars() -> Vec<String> {
    let names: Vec<String> = (0..4000).map(|n| format!("r{n}")).collect();
    let chain: Vec<String> = names.windows(2).map(|pair| format!("{}: {}", pair[0], pair[1])).collect();
    let terminals = chain.join("\n").to_uppercase();
    let conditions = format!("start: \"a\" %if {}true{}", "not(".repeat(9000), ")".repeat(9000));
    vec![
        format!("start: r0\n{}\nr3999: \"a\"", chain.join("\n")),
        format!("start: R0\n{terminals}\nR3999: \"a\""),
        conditions,
    ]
}

#[tokio::test]
async fn no_grammar_takes_the_server_down() {
    let server = nano_server(config()).await;
    let mut hostile: Vec<Value> =
        deep_grammars().iter().map(|grammar| json!({"structured_outputs": {"grammar": grammar}})).collect();
    for lexeme in ["a[lazy]: /.*e/", "a[suffix=\"e\"]: /.*/", "a[stop=\"x\"]: /.*/"] {
        hostile.push(json!({"structured_outputs": {"grammar": format!("start: a \"!\"\n{lexeme}")}}));
    }
    hostile.push(json!({"guided_json": format!("[{}0]", "0,".repeat(1 << 20))}));
    let refs: Vec<String> =
        (0..1000).map(|n| format!("\"d{n}\": {{\"$ref\": \"#/$defs/d{}\"}}", n + 1)).collect();
    let schema = format!(
        "{{\"$ref\": \"#/$defs/d0\", \"$defs\": {{{}, \"d1000\": {{\"type\": \"null\"}}}}}}",
        refs.join(",")
    );
    hostile.push(json!({"guided_json": schema}));
    for more in hostile {
        let response = server.post(&with(asked(json!({"max_tokens": 60})), &more)).send().await.unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        assert!(status == 200 || status == 400, "{more:.80}: {status} {text}");
        assert!(!text.contains("panic"), "{text}");
    }
    // And it still serves, guided and not.
    let reply = server.ask(&asked(json!({"guided_choice": ["A", "B"], "max_tokens": 200}))).await;
    assert!(["A", "B"].contains(&reply["choices"][0]["message"]["content"].as_str().unwrap()), "{reply}");
}
