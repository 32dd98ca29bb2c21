//! What is accepted, what is refused and by which name, and how a conversation goes on.

use super::*;
use crate::{
    config::{Config, ResponsesConfig},
    http::responses_api::store::KeptResponse,
    prompt::Instruction,
    scheduler::SamplingParams,
};

fn checked(request: &Value, store: &ResponseStore) -> Result<(ValidRequest, Shape), ApiError> {
    let responses = ResponsesConfig { max_conversation_bytes: 1000, ..ResponsesConfig::default() };
    let config = Config { responses, ..Config::default() };
    let default_sampling = SamplingParams::greedy(1);
    let limits = Limits {
        config: &config,
        model_id: "nano",
        default_sampling: &default_sampling,
        vocab_size: 257,
        thinks: true,
    };
    check(&Bytes::from(request.to_string()), None, limits, store)
}

fn store() -> ResponseStore {
    ResponseStore::new(&ResponsesConfig::default())
}

fn accepted(request: Value) -> (ValidRequest, Shape) {
    checked(&request, &store()).unwrap_or_else(|error| panic!("{request}: {error}"))
}

/// The field an error names.
fn param(request: Value) -> String {
    match checked(&request, &store()).expect_err("must be refused") {
        ApiError::Invalid(InvalidRequest::Field { param, message }) => {
            assert!(!message.is_empty() && !message.ends_with('.'), "{message}");
            param
        }
        ApiError::Body(body::BodyError::Json { param, .. }) => param.unwrap_or_default(),
        other => panic!("{other:?}"),
    }
}

/// `{"input": "Hi"}` and `more`.
fn with(more: Value) -> Value {
    let mut request = json!({"input": "Hi"});
    request.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
    request
}

#[test]
fn a_request_becomes_what_it_means_to_the_chat_endpoint() {
    let (valid, shape) = accepted(json!({
        "model": "nano", "instructions": "Be brief.", "max_output_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3,
        "reasoning": {"effort": "none", "summary": "auto"}, "stream": true, "metadata": {"a": "b"}, "user": "me",
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
    }));
    assert_eq!(valid.conversation.system.as_deref(), Some("Be brief."));
    assert_eq!(valid.conversation.turns[0].user, "Hi");
    assert_eq!(valid.sampling.max_tokens, Some(7));
    assert_eq!(valid.sampling.seed, Some(3));
    assert_eq!(valid.instruction, Instruction::OptionOnly);
    assert!(shape.stream);
    let object = shape.object;
    assert_eq!((object.temperature, object.top_p), (0.5, 0.9));
    assert_eq!(object.max_output_tokens, Some(7));
    assert_eq!(object.metadata["a"], "b");
    assert_eq!(object.reasoning.summary.as_deref(), Some("auto"));
    let Some(KeptConversation::Whole { messages, .. }) = shape.kept else { panic!("{:?}", shape.kept) };
    assert!(messages.contains("Hi") && !messages.contains("brief"), "instructions do not stay: {messages}");
    assert!(accepted(with(json!({"store": false}))).1.kept.is_none());
}

#[test]
fn what_asks_for_nothing_is_let_through() {
    accepted(with(json!({
        "background": false, "tools": [], "tool_choice": "auto", "truncation": "disabled", "parallel_tool_calls": true,
        "service_tier": "auto", "max_tool_calls": null, "conversation": null, "top_logprobs": 0,
        "text": {"format": {"type": "text"}, "verbosity": "low"}, "include": ["reasoning.encrypted_content"],
        "stream_options": {"include_obfuscation": false, "include_usage": true, "continuous_usage_stats": false},
        "prompt_cache_key": "k", "safety_identifier": "s", "priority": 0, "request_id": "r", "n": 1,
    })));
}

#[test]
fn faults_are_named_as_the_client_knows_them() {
    for (request, name) in [
        (json!({}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": 5}), "input"),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]}),
            "input[0].content[0].text",
        ),
        (
            json!({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}),
            "input[0].content[0].text",
        ),
        (json!({"input": [{"role": "robot", "content": "Hi"}]}), "input[0].role"),
        (with(json!({"max_tokens": 5})), "max_output_tokens"),
        (with(json!({"max_output_tokens": 0})), "max_output_tokens"),
        (with(json!({"temperature": 3})), "temperature"),
        (with(json!({"reasoning": {"effort": "huge"}})), "reasoning.effort"),
        (with(json!({"reasoning": {"summary": "long"}})), "reasoning.summary"),
        (with(json!({"reasoning": {"odd": 1}})), "reasoning.odd"),
        (with(json!({"text": {"odd": 1}})), "text.odd"),
        (with(json!({"include": ["odd"]})), "include"),
        (with(json!({"metadata": {"a": 1}})), "metadata"),
        (with(json!({"metadata": {"a": "x".repeat(513)}})), "metadata"),
        (with(json!({"metadata": {"k".repeat(65): "x"}})), "metadata"),
        (with(json!({"user": "x".repeat(513)})), "user"),
        (with(json!({"text": {"verbosity": "x"}})), "text.verbosity"),
        (with(json!({"text": {"format": {"name": "x".repeat(65)}}})), "text.format.name"),
        (with(json!({"text": {"format": {"description": "x".repeat(1025)}}})), "text.format.description"),
        (with(json!({"messages": []})), "messages"),
        (with(json!({"n": 2})), "n"),
        (with(json!({"background": true})), "background"),
        (with(json!({"tools": [{"type": "function"}]})), "tools"),
        (with(json!({"seed": "x"})), "seed"),
        (
            with(json!({"stream_options": {"continuous_usage_stats": true}})),
            "stream_options.continuous_usage_stats",
        ),
        (with(json!({"previous_response_id": "resp_0"})), "previous_response_id"),
    ] {
        assert_eq!(param(request.clone()), name, "{request}");
    }
}

#[test]
fn a_conversation_goes_on_with_its_reply() {
    let store = store();
    let url = json!({"type": "input_file", "file_url": "https://example.org/a.mp4"});
    let first =
        json!({"input": [{"role": "user", "content": [url, {"type": "input_text", "text": "What?"}]}]});
    let (_, shape) = checked(&first, &store).unwrap();
    let Some(KeptConversation::Whole { messages, .. }) = shape.kept else { panic!("{:?}", shape.kept) };
    let conversation = KeptConversation::Whole { messages, reply: "C".into() };
    store.put("resp_1".into(), KeptResponse { object: "{}".into(), conversation });
    let second = json!({"input": "Why?", "previous_response_id": "resp_1", "instructions": "Be brief."});
    let (valid, shape) = checked(&second, &store).unwrap();
    let turns = &valid.conversation.turns;
    assert_eq!((turns[0].user.as_str(), turns[0].assistant.as_deref()), ("What?", Some("C")));
    assert_eq!((turns[0].num_videos, turns[1].user.as_str()), (1, "Why?"));
    assert_eq!(valid.videos.len(), 1);
    assert_eq!(shape.object.previous_response_id.as_deref(), Some("resp_1"));
    let Some(KeptConversation::Whole { messages, .. }) = shape.kept else { panic!("{:?}", shape.kept) };
    assert!(messages.contains("a.mp4") && messages.contains("Why?"));
}

#[test]
fn instructions_come_before_the_system_message_that_is_there() {
    let store = store();
    let first = json!({"input": [{"role": "system", "content": "b"}, {"role": "user", "content": "Hi"}], "instructions": "a"});
    let (valid, shape) = checked(&first, &store).unwrap();
    assert_eq!(valid.conversation.system.as_deref(), Some("a\nb"));
    let Some(KeptConversation::Whole { messages, .. }) = shape.kept else { panic!("{:?}", shape.kept) };
    let conversation = KeptConversation::Whole { messages, reply: "C".into() };
    store.put("resp_1".into(), KeptResponse { object: "{}".into(), conversation });
    let second = json!({"input": "Why?", "previous_response_id": "resp_1", "instructions": "c"});
    let (valid, _) = checked(&second, &store).unwrap();
    assert_eq!(valid.conversation.system.as_deref(), Some("c\nb"));
}

#[test]
fn a_large_conversation_is_not_kept_and_cannot_go_on() {
    let store = store();
    let (_, shape) = checked(&json!({"input": "x".repeat(1001)}), &store).unwrap();
    let conversation = shape.kept.unwrap();
    assert!(matches!(conversation, KeptConversation::TooLarge { num_bytes } if num_bytes > 1000));
    store.put("resp_1".into(), KeptResponse { object: "{}".into(), conversation });
    let refused = checked(&with(json!({"previous_response_id": "resp_1"})), &store).unwrap_err();
    assert!(refused.to_string().contains("/v1/files"), "{refused}");
}
