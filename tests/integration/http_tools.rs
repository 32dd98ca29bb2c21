//! Calls of functions that a request asks for, over sockets: unary and streamed, in chat requests
//! and responses, and what conversations with calls in them become.

use serde_json::{Value, json};
use tinyllava::model::fake::FakeModel;

use crate::http_setup::*;

const RESPONSES: &str = "/v1/responses";
const TURNS: &str = r#"<think>It turns.</think><answer>{"way": "left", "degrees": 90}</answer>"#;
const ARGUMENTS: &str = r#"{"way": "left", "degrees": 90}"#;

fn parameters() -> Value {
    json!({"type": "object", "properties": {"way": {"$ref": "#/$defs/Way"}, "degrees": {"type": "integer"}},
        "required": ["way", "degrees"], "$defs": {"Way": {"enum": ["left", "right"], "type": "string"}}})
}

fn turn() -> Value {
    json!({"type": "function", "function": {"name": "turn", "description": "Turns.", "strict": true, "parameters": parameters()}})
}

fn stop() -> Value {
    let way = json!({"type": "object", "properties": {"way": {"$ref": "#/$defs/Way"}}, "required": ["way"],
        "$defs": {"Way": {"enum": ["up", "down"]}}});
    json!({"type": "function", "function": {"name": "stop", "parameters": way}})
}

fn named(name: &str) -> Value {
    json!({"type": "function", "function": {"name": name}})
}

fn asked(tools: Value, choice: Value, more: Value) -> Value {
    let mut body = request(json!("Which way?"), json!({"tools": tools, "tool_choice": choice}));
    body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
    body
}

/// Name and arguments of the call of a unary choice, whose form is checked.
fn call_of(choice: &Value) -> (String, String) {
    let message = &choice["message"];
    assert!(message["content"].is_null() && message.as_object().unwrap().contains_key("content"), "{choice}");
    assert_eq!(choice["finish_reason"], "tool_calls");
    let [call] = &message["tool_calls"].as_array().unwrap()[..] else { panic!("{choice}") };
    assert!(call["id"].as_str().unwrap().starts_with("call_") && call["type"] == "function");
    let text = |name: &str| call["function"][name].as_str().unwrap().to_owned();
    (text("name"), text("arguments"))
}

/// The same of a stream, and its thinking.
async fn streamed_call(server: &Server, body: &Value, index: usize) -> (String, String, String) {
    let mut body = body.clone();
    body["stream"] = true.into();
    let events = Events::of(server.post(&body).send().await.unwrap()).rest().await;
    let chunks = chunks(&events);
    let own: Vec<&Value> =
        chunks.iter().map(|chunk| &chunk["choices"][0]).filter(|choice| choice["index"] == index).collect();
    assert_eq!(own[0]["delta"], json!({"role": "assistant"}));
    let deltas = own.iter().filter_map(|choice| choice["delta"]["tool_calls"].as_array());
    let deltas: Vec<&Value> = deltas.map(|list| &list[0]).collect();
    assert!(deltas.iter().all(|delta| delta["index"] == 0));
    assert!(deltas[0]["id"].as_str().unwrap().starts_with("call_") && deltas[0]["type"] == "function");
    assert_eq!(deltas[0]["function"]["arguments"], "");
    assert!(deltas.len() > 2 && deltas[1..].iter().all(|delta| delta["id"].is_null()));
    assert!(own.iter().all(|choice| choice["delta"]["content"].is_null()));
    let reasons: Vec<&str> = own.iter().filter_map(|choice| choice["finish_reason"].as_str()).collect();
    assert_eq!(reasons, ["tool_calls"]);
    let arguments = deltas.iter().map(|delta| delta["function"]["arguments"].as_str().unwrap());
    let thinking = own.iter().filter_map(|choice| choice["delta"]["reasoning_content"].as_str());
    let name = deltas[0]["function"]["name"].as_str().unwrap().to_owned();
    (name, arguments.collect(), thinking.collect())
}

#[tokio::test]
async fn a_forced_function_is_called_with_arguments_of_its_schema() {
    let server = server(config(), FakeModel::saying(TURNS)).await;
    let two = json!([stop(), turn()]);
    for (tools, choice) in [
        (json!([turn()]), named("turn")),
        (json!([turn()]), json!("required")),
        (two.clone(), named("turn")),
        (two.clone(), json!({"type": "function", "name": "turn"})),
        (
            two,
            json!({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("turn")]}}),
        ),
        // The form of responses.
        (json!([{"type": "function", "name": "turn", "parameters": parameters()}]), json!("required")),
    ] {
        let more = json!({"parallel_tool_calls": false});
        let body = asked(tools, choice.clone(), more);
        let reply = server.ask(&body).await;
        assert_eq!(call_of(&reply["choices"][0]), ("turn".into(), ARGUMENTS.into()), "{choice}");
        assert_eq!(reply["choices"][0]["message"]["reasoning_content"], "It turns.");
        let (name, arguments, thinking) = streamed_call(&server, &body, 0).await;
        assert_eq!((name.as_str(), arguments.as_str(), thinking.as_str()), ("turn", ARGUMENTS, "It turns."));
    }
    server.until_idle().await;
}

#[tokio::test]
async fn a_call_of_one_of_several_functions_names_it() {
    let said = r#"<think>a</think><answer>{"name": "stop", "arguments": {"way": "up"}}</answer>"#;
    let server = server(config(), FakeModel::saying(said)).await;
    let body = asked(json!([turn(), stop()]), json!("required"), json!({}));
    let reply = server.ask(&body).await;
    assert_eq!(call_of(&reply["choices"][0]), ("stop".into(), "{\"way\": \"up\"}".into()));
    let (name, arguments, _) = streamed_call(&server, &body, 0).await;
    assert_eq!((name.as_str(), arguments.as_str()), ("stop", "{\"way\": \"up\"}"));
}

#[tokio::test]
async fn a_model_that_says_anything_still_calls_the_function() {
    let server = &nano_server(config()).await;
    let is_turn = |arguments: &str| {
        let value: Value = serde_json::from_str(arguments).unwrap_or_else(|_| panic!("{arguments}"));
        let object = value.as_object().unwrap();
        object.len() == 2
            && ["left", "right"].contains(&value["way"].as_str().unwrap())
            && value["degrees"].is_i64()
    };
    for more in [
        json!({"reasoning_effort": "none"}),
        json!({"max_tokens": 60, "stop": ["\"", "."]}),
        json!({"thinking_token_budget": 3, "n": 2, "vote": true, "logprobs": true}),
    ] {
        let mut body = asked(json!([turn()]), json!("required"), json!({"seed": 3, "temperature": 1.0}));
        body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
        let reply = server.ask(&body).await;
        let choices = reply["choices"].as_array().unwrap();
        for choice in choices {
            let (name, arguments) = call_of(choice);
            assert!(name == "turn" && is_turn(&arguments), "{more}: {reply}");
            let (_, streamed, _) =
                streamed_call(server, &body, choice["index"].as_u64().unwrap() as usize).await;
            assert_eq!(streamed, arguments, "{more}");
        }
        assert_eq!(choices[0]["logprobs"].is_null(), more["logprobs"].is_null());
        if more["vote"] == true {
            // Arguments count by their value, however they are spaced.
            let value = |text: &str| serde_json::from_str::<Value>(text).unwrap();
            let answer = reply["vote"]["answer"].as_str().unwrap();
            assert_eq!(value(answer), value(&call_of(&choices[0]).1));
        }
    }
    let sampled = json!({"seed": 3, "temperature": 1.0, "reasoning_effort": "none"});
    let several = asked(json!([turn(), stop()]), json!("required"), sampled.clone());
    let (name, arguments) = call_of(&server.ask(&several).await["choices"][0]);
    assert!(name == "turn" && is_turn(&arguments) || name == "stop", "{name} {arguments}");
    // No parameters are an empty object, and no others than those that are listed come.
    let bare = json!([{"type": "function", "function": {"name": "go"}}]);
    let reply = server.ask(&asked(bare, named("go"), sampled)).await;
    let arguments: Value = serde_json::from_str(&call_of(&reply["choices"][0]).1).unwrap();
    assert_eq!(arguments, json!({}));
}

#[tokio::test]
async fn tools_that_nothing_is_asked_of_have_no_effect() {
    let server = simple_server().await;
    for (tools, choice) in [
        (json!([turn()]), json!("none")),
        (json!([{"type": "web_search"}, 3]), json!("none")),
        (json!([]), json!("auto")),
        (json!(null), json!("none")),
        (json!(null), json!(null)),
    ] {
        let reply = server.ask(&asked(tools, choice, json!({}))).await;
        assert_eq!(reply["choices"][0]["message"]["content"], "C");
        assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    }
}

#[tokio::test]
async fn faults_of_tools_name_their_field() {
    let server = simple_server().await;
    let with_schema =
        |schema: Value| json!([{"type": "function", "function": {"name": "f", "parameters": schema}}]);
    for (tools, choice, more, param) in [
        (json!([turn()]), json!("auto"), json!({}), "tool_choice"),
        (json!([turn()]), json!(null), json!({}), "tools"),
        (
            json!([turn()]),
            json!({"type": "allowed_tools", "mode": "auto", "tools": [named("turn")]}),
            json!({}),
            "tool_choice",
        ),
        (json!([turn()]), named("go"), json!({}), "tool_choice"),
        (json!([turn()]), json!("sometimes"), json!({}), "tool_choice"),
        (json!([turn()]), json!({"type": "tool", "name": "turn"}), json!({}), "tool_choice"),
        (json!([turn()]), json!({"type": "function"}), json!({}), "tool_choice"),
        (json!([]), json!("required"), json!({}), "tools"),
        (json!(null), named("turn"), json!({}), "tools"),
        (json!({}), json!("required"), json!({}), "tools"),
        (json!([turn(), turn()]), json!("required"), json!({}), "tools"),
        (json!([turn(), {"type": "web_search"}]), json!("required"), json!({}), "tools[1]"),
        (json!([{"type": "function", "function": "f"}]), json!("required"), json!({}), "tools[0].function"),
        (
            json!([{"type": "function", "function": {}}]),
            json!("required"),
            json!({}),
            "tools[0].function.name",
        ),
        (with_schema(json!("s")), json!("required"), json!({}), "tools[0].function.parameters"),
        (with_schema(json!({"type": "thing"})), json!("required"), json!({}), "tools[0].function.parameters"),
        (
            with_schema(json!({"enum": ["x".repeat(70_000)]})),
            json!("required"),
            json!({}),
            "tools[0].function.parameters",
        ),
        (
            json!([turn()]),
            json!("required"),
            json!({"response_format": {"type": "json_object"}}),
            "tool_choice",
        ),
        (json!([turn()]), json!("required"), json!({"reasoning_format": "none"}), "reasoning_format"),
        (json!([turn()]), json!("required"), json!({"ignore_eos": true}), "ignore_eos"),
        (json!([turn()]), json!("required"), json!({"max_tokens": 5}), "max_tokens"),
    ] {
        let response = server.post(&asked(tools.clone(), choice.clone(), more)).send().await.unwrap();
        let (status, refused) = error(response).await;
        assert_eq!(
            (status, refused["param"].as_str()),
            (400, Some(param)),
            "{tools:.60} {choice}: {refused}"
        );
    }
}

/// The prompt of a conversation, as text.
async fn prompt_of(server: &Server, messages: &Value) -> String {
    let tokens = server.send_json("/tokenize", &json!({"messages": messages})).await;
    let tokens = success(tokens).await["tokens"].clone();
    let text = success(server.send_json("/detokenize", &json!({"tokens": tokens})).await).await;
    text["prompt"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn calls_and_their_results_are_text_of_the_conversation() {
    let server = server(config(), FakeModel::saying(TURNS)).await;
    let call = |arguments: &str| json!({"id": "call_1", "type": "function", "function": {"name": "turn", "arguments": arguments}});
    let first = json!({"role": "user", "content": "Which way?"});
    for (messages, plain) in [
        // A retry.
        (
            json!([first, {"role": "assistant", "content": null, "tool_calls": [call("{\"way\": \"up\"}")]},
                {"role": "tool", "tool_call_id": "call_1", "name": "turn", "content": "No such way."}]),
            json!([first, {"role": "assistant", "content": "{\"way\": \"up\"}"}, {"role": "user", "content": "No such way."}]),
        ),
        // Two calls and their results, then a question.
        (
            json!([first, {"role": "assistant", "content": "So:", "tool_calls": [call("{}"), call("[1]")]},
                {"role": "tool", "tool_call_id": "call_1", "content": "One."},
                {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "Two."}]},
                {"role": "user", "content": "Why?"}]),
            json!([first, {"role": "assistant", "content": "So:\n{}\n[1]"}, {"role": "user", "content": "One.\nTwo.\nWhy?"}]),
        ),
        // The older form.
        (
            json!([first, {"role": "assistant", "content": "", "function_call": {"name": "turn", "arguments": "{}"}},
                {"role": "function", "name": "turn", "content": null}, {"role": "user", "content": "Why?"}]),
            json!([first, {"role": "assistant", "content": "{}"}, {"role": "user", "content": "Why?"}]),
        ),
    ] {
        assert_eq!(prompt_of(&server, &messages).await, prompt_of(&server, &plain).await, "{messages}");
        let body = json!({"messages": messages, "tools": [turn()], "tool_choice": "required"});
        assert_eq!(call_of(&server.ask(&body).await["choices"][0]).1, ARGUMENTS);
    }
    for (message, param) in [
        (
            json!({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}),
            "messages[1].tool_calls[0].function.arguments",
        ),
        (json!({"role": "assistant", "tool_calls": [3]}), "messages[1].tool_calls[0].function.arguments"),
        (json!({"role": "user", "content": "a", "tool_calls": [call("{}")]}), "messages[1].tool_calls"),
    ] {
        let body = json!({"messages": [first, message, first]});
        let (status, refused) = error(server.post(&body).send().await.unwrap()).await;
        assert_eq!((status, &refused["param"]), (400, &json!(param)), "{refused}");
    }
}

#[tokio::test]
async fn a_response_has_an_item_of_the_call_and_goes_on_after_it() {
    let server = server(config(), FakeModel::saying(TURNS)).await;
    let tool = json!({"type": "function", "name": "turn", "strict": true, "parameters": parameters()});
    let choice = json!({"type": "function", "name": "turn"});
    let body = json!({"input": "Which way?", "tools": [tool], "tool_choice": choice});
    let response = success(server.send_json(RESPONSES, &body).await).await;
    assert_eq!((&response["tools"], &response["tool_choice"]), (&json!([tool]), &choice));
    let [thinking, call] = &response["output"].as_array().unwrap()[..] else { panic!("{response}") };
    assert_eq!(thinking["summary"][0]["text"], "It turns.");
    assert!(
        call["id"].as_str().unwrap().starts_with("fc_")
            && call["call_id"].as_str().unwrap().starts_with("call_")
    );
    let shown = [&call["type"], &call["name"], &call["arguments"], &call["status"]];
    assert_eq!(shown.map(|value| value.as_str().unwrap()), ["function_call", "turn", ARGUMENTS, "completed"]);

    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    let text = server.send_json(RESPONSES, &streamed).await.text().await.unwrap();
    let events: Vec<Value> = text
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).unwrap())
        .collect();
    let of =
        |kind: &'static str| events.iter().filter(move |event| event["type"] == format!("response.{kind}"));
    let added: Vec<&Value> = of("output_item.added").collect();
    assert_eq!((added.len(), &added[1]["item"]["arguments"]), (2, &json!("")));
    let deltas: Vec<&Value> = of("function_call_arguments.delta").collect();
    assert_eq!(deltas.iter().map(|event| event["delta"].as_str().unwrap()).collect::<String>(), ARGUMENTS);
    assert!(
        deltas.iter().all(|event| event["output_index"] == 1 && event["item_id"] == added[1]["item"]["id"])
    );
    assert_eq!(of("function_call_arguments.done").next().unwrap()["arguments"], ARGUMENTS);
    let done: Vec<&Value> = of("output_item.done").map(|event| &event["item"]).collect();
    assert_eq!(json!(done), events.last().unwrap()["response"]["output"]);
    assert!(of("output_text.delta").next().is_none());

    // The result of the call, after the stored response and with the whole conversation.
    let output = json!({"type": "function_call_output", "call_id": call["call_id"], "output": "Turned."});
    let next = json!({"previous_response_id": response["id"], "input": [output]});
    let after = success(server.send_json(RESPONSES, &next).await).await;
    let whole = json!({"input": [{"role": "user", "content": "Which way?"}, thinking, call, output]});
    let again = success(server.send_json(RESPONSES, &whole).await).await;
    assert_eq!(after["usage"]["input_tokens"], again["usage"]["input_tokens"]);
    assert!(after["usage"]["input_tokens"].as_u64() > response["usage"]["input_tokens"].as_u64());
    for (more, param) in [
        (json!({"tools": [tool]}), "tools"),
        (json!({"input": [output]}), "input[0].role"),
        (
            json!({"tools": [{"type": "function", "name": "f", "parameters": {"type": "thing"}}], "tool_choice": "required"}),
            "tools[0].parameters",
        ),
        (
            json!({"tools": [{"type": "function", "name": "x".repeat(70_000)}], "tool_choice": "none"}),
            "tools",
        ),
    ] {
        let mut body = json!({"input": "a"});
        body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
        let (status, refused) = error(server.send_json(RESPONSES, &body).await).await;
        assert_eq!((status, &refused["param"]), (400, &json!(param)), "{refused}");
    }
}

#[tokio::test]
async fn an_unknown_field_of_a_tool_is_refused_with_its_name() {
    let server = simple_server().await;
    for (tool, param) in [
        (json!({"type": "function", "function": {"name": "f"}, "zz": 1}), "tools[0].zz"),
        (json!({"type": "function", "function": {"name": "f", "zz": 1}}), "tools[0].function.zz"),
    ] {
        let more = json!({"tools": [tool], "tool_choice": "required"});
        let (status, error) = error(server.post(&request(json!("What?"), more)).send().await.unwrap()).await;
        assert_eq!((status, error["param"].as_str()), (400, Some(param)), "{error}");
    }
}
