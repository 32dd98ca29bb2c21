//! Tests of joined messages, stream options, the number of replies and the field of the thinking.
//!
//! Unit tests of `validate`, with the helpers of `tests.rs`.

use super::*;

#[test]
fn consecutive_messages_of_one_role_are_joined_and_videos_keep_their_order() {
    let config = Config { max_videos_per_request: 3, ..Config::default() };
    let part = |n: usize| json!({"type": "video_url", "video_url": {"url": format!("https://a/{n}")}});
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": [part(1)]},
        {"role": "user", "content": "What?"},
        {"role": "user", "content": ""},
        {"role": "user", "content": [part(2), {"type": "text", "text": "And this?"}]},
        {"role": "assistant", "content": null},
        {"role": "assistant", "content": "B"},
        {"role": "assistant"},
        {"role": "system", "content": "Be sure."},
        {"role": "assistant", "content": "I think."},
        {"role": "user", "content": [part(3), {"type": "text", "text": "Why?"}]},
        {"role": "system", "content": "Be quick."},
    ]);
    let valid = with_config(json!({"messages": messages}), false, &config).unwrap();
    assert_eq!(valid.conversation.system.as_deref(), Some("Be brief.\nBe kind.\nBe sure.\nBe quick."));
    let turn = |user: &str, num_videos, assistant: Option<&str>| crate::prompt::Turn {
        user: user.into(),
        num_videos,
        assistant: assistant.map(Into::into),
    };
    let turns = [
        turn("", 0, Some("Hello.")),
        turn("What?\nAnd this?", 2, Some("B\nI think.")),
        turn("Why?", 1, None),
    ];
    assert_eq!(valid.conversation.turns, turns);
    let paths: Vec<&str> = valid.videos.iter().map(|video| video.path.as_str()).collect();
    let expected = [3, 6, 12].map(|i| format!("messages[{i}].content[0].video_url"));
    assert_eq!(paths, expected);
}

#[test]
fn only_an_assistant_message_may_have_no_content() {
    let ask = |role: &str| {
        let empty = json!({"role": role, "content": null});
        check(
            json!({"messages": [{"role": "user", "content": "Hi"}, empty, {"role": "user", "content": "Hi"}]}),
        )
    };
    assert!(ask("assistant").is_ok());
    for role in ["user", "system", "developer"] {
        assert_eq!(param(ask(role)), "messages[1].content");
    }
}

#[test]
fn newlines_between_joined_messages_count_as_text() {
    let half = "x".repeat(Config::default().max_text_bytes / 2);
    let ask = |second: &str| {
        let messages = [&half[..], second].map(|text| json!({"role": "user", "content": text}));
        check(json!({"messages": messages}))
    };
    assert!(ask(&half[1..]).is_ok());
    assert_eq!(param(ask(&half)), "messages");
}

#[test]
fn options_of_a_stream_that_ask_for_nothing_need_no_stream() {
    let ask = |more: Value| check(request(json!("Hi"), more)).map(|valid| valid.stream_extras);
    let nothing =
        json!({"include_usage": false, "continuous_usage_stats": false, "include_obfuscation": false});
    for options in [Value::Null, json!({}), nothing] {
        assert_eq!(ask(json!({"stream_options": options})), Ok(StreamExtras::default()));
    }
    let all = json!({"include_usage": true, "continuous_usage_stats": true, "include_obfuscation": true});
    let extras = StreamExtras { usage: true, running_usage: true, obfuscation: true };
    assert_eq!(ask(json!({"stream": true, "stream_options": all})), Ok(extras));
    for name in ["include_usage", "continuous_usage_stats", "include_obfuscation"] {
        let asked = check(request(json!("Hi"), json!({"stream_options": {name: true}})));
        assert_eq!(param(asked), "stream_options");
    }
}

#[test]
fn more_replies_than_the_flag_allows_are_refused_with_the_flag() {
    let ask = |n: u64, config: &Config| with_config(request(json!("Hi"), json!({"n": n})), false, config);
    let config = Config { max_choices: 40, ..Config::default() };
    assert_eq!(ask(40, &config).unwrap().choices.count, 40);
    for (n, config, flag) in [
        (41, config.clone(), "--max-n"),
        (9, Config::default(), "--max-n"),
        (193, Config { max_choices: 1000, ..Config::default() }, "--max-running"),
    ] {
        let Err(InvalidRequest::Field { param, message }) = ask(n, &config) else { panic!("{n}") };
        assert_eq!(param, "n");
        assert!(message.contains(&format!("to {}", n - 1)) && message.contains(flag), "{message}");
    }
}

#[test]
fn the_request_names_the_field_of_the_thinking_or_the_server_does() {
    use crate::config::ReasoningField;
    let config = Config { reasoning_field: ReasoningField::Reasoning, ..Config::default() };
    let ask = |more: Value, config: &Config| {
        with_config(request(json!("Hi"), more), false, config).map(|valid| valid.choices.reasoning_field)
    };
    assert_eq!(ask(json!({}), &Config::default()), Ok(ReasoningField::Both));
    assert_eq!(ask(json!({}), &config), Ok(ReasoningField::Reasoning));
    for field in ReasoningField::ALL {
        assert_eq!(ask(json!({"reasoning_field": field.name()}), &config), Ok(field));
    }
    assert_eq!(param(check(request(json!("Hi"), json!({"reasoning_field": "none"})))), "reasoning_field");
}
