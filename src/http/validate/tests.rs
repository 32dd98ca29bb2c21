//! What is accepted, what is refused, and that the fault is named.

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn with_upload(request: Value, upload: bool) -> Result<ValidRequest, InvalidRequest> {
    let config = Config::default();
    let default_sampling = SamplingParams::greedy(1);
    let limits = Limits {
        config: &config,
        model_id: "nano",
        default_sampling: &default_sampling,
        vocab_size: 257,
        thinks: true,
    };
    let request = serde_json::from_value(request).expect("the test's request has the right types");
    validate(request, upload.then(|| NamedTempFile::new().unwrap()), limits)
}

fn check(request: Value) -> Result<ValidRequest, InvalidRequest> {
    with_upload(request, false)
}

/// A request of one user message with `content`, and `more` fields.
fn request(content: Value, more: Value) -> Value {
    let mut request = json!({"messages": [{"role": "user", "content": content}]});
    request.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
    request
}

/// The field an error names.
fn param(result: Result<ValidRequest, InvalidRequest>) -> String {
    match result.expect_err("must be refused") {
        InvalidRequest::Field { param, message } => {
            assert!(!message.is_empty() && !message.ends_with('.'), "{message}");
            param
        }
        InvalidRequest::UnknownModel { .. } => "model".into(),
    }
}

fn video(object: Value) -> Value {
    json!([{"type": "text", "text": "What?"}, {"type": "video_url", "video_url": object}])
}

const URL: &str = "https://example.org/a.mp4";

#[test]
fn plain_text_is_a_turn_with_defaults() {
    let valid = check(request(json!("Hi"), json!({"model": "nano"}))).unwrap();
    assert_eq!(valid.conversation.turns.len(), 1);
    assert_eq!(valid.conversation.turns[0].user, "Hi");
    assert!(valid.video.is_none() && !valid.stream);
    assert_eq!(valid.instruction, Instruction::Think);
    assert_eq!(valid.sampling.max_tokens, None);
    assert_eq!(valid.reasoning, Reasoning::Separate);
}

#[test]
fn every_form_of_a_video_url_means_the_same() {
    for part in [json!(URL), json!({"url": URL}), json!({"url": URL, "uuid": "7"})] {
        let valid = check(request(video(part), json!({}))).unwrap();
        assert_eq!(valid.conversation.turns[0].num_videos, 1);
        assert_eq!(valid.conversation.turns[0].user, "What?");
        assert!(matches!(valid.video.unwrap().source, VideoSource::Url(url) if url == URL));
    }
}

#[test]
fn turns_alternate_after_an_optional_system_message() {
    let messages = json!([
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": video(json!(URL))},
        {"role": "assistant", "content": "B", "reasoning_content": "hm", "refusal": null, "tool_calls": []},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}, {"type": "text", "text": "Why?"}]},
    ]);
    let conversation = check(json!({"messages": messages})).unwrap().conversation;
    assert_eq!(conversation.system.as_deref(), Some("Be brief."));
    let turn = |user: &str, num_videos, assistant: Option<&str>| crate::prompt::Turn {
        user: user.into(),
        num_videos,
        assistant: assistant.map(Into::into),
    };
    assert_eq!(conversation.turns, [turn("What?", 1, Some("B")), turn("Sure?\nWhy?", 0, None)]);
}

#[test]
fn roles_out_of_order_are_refused() {
    let message = |role: &str| json!({"role": role, "content": "x"});
    for (roles, fault) in [
        (vec![], "messages"),
        (vec!["assistant"], "messages[0].role"),
        (vec!["system"], "messages"),
        (vec!["system", "system", "user"], "messages[1].role"),
        (vec!["user", "system"], "messages[1].role"),
        (vec!["user", "user"], "messages[1].role"),
        (vec!["user", "assistant"], "messages"),
        (vec!["user", "assistant", "assistant"], "messages[2].role"),
        (vec!["user", "tool"], "messages[1].role"),
        (vec!["robot"], "messages[0].role"),
    ] {
        let messages: Vec<Value> = roles.iter().map(|role| message(role)).collect();
        assert_eq!(param(check(json!({"messages": messages}))), fault, "{roles:?}");
    }
}

#[test]
fn each_fault_names_its_field() {
    for (more, fault) in [
        (json!({"temperature": 2.5}), "temperature"),
        (json!({"temperature": -0.1}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"min_p": 1.1}), "min_p"),
        (json!({"repetition_penalty": 0}), "repetition_penalty"),
        (json!({"frequency_penalty": 3}), "frequency_penalty"),
        (json!({"presence_penalty": -3}), "presence_penalty"),
        (json!({"logit_bias": {"a": 1}}), "logit_bias"),
        (json!({"logit_bias": {"257": 1}}), "logit_bias"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias"),
        (json!({"seed": 1.5}), "seed"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 1, "max_completion_tokens": 2}), "max_completion_tokens"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
        (json!({"stop": ""}), "stop"),
        (json!({"stop_token_ids": [257]}), "stop_token_ids"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options"),
        (json!({"stream": true, "stream_options": {"x": 1}}), "stream_options.x"),
        (json!({"reasoning_effort": "huge"}), "reasoning_effort"),
        (json!({"reasoning_format": "xml"}), "reasoning_format"),
        (json!({"reasoning_format": "none", "include_reasoning": false}), "include_reasoning"),
        (json!({"chat_template_kwargs": {"x": 1}}), "chat_template_kwargs.x"),
        (
            json!({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": true}}),
            "chat_template_kwargs.enable_thinking",
        ),
        (json!({"media_io_kwargs": {"image": {}}}), "media_io_kwargs.image"),
        (json!({"media_io_kwargs": {"video": {"backend": "x"}}}), "media_io_kwargs.video.backend"),
        (json!({"model": "other"}), "model"),
        (json!({"temprature": 1}), "temprature"),
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"n": 0}), "n"),
        (json!({"n": 9}), "n"),
        (json!({"n": 2, "best_of": 3}), "best_of"),
        (json!({"best_of": 2}), "best_of"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"vote": true, "temperature": 1}), "vote"),
        (json!({"vote": true, "n": 3}), "temperature"),
        (json!({"vote": true, "n": 3, "temperature": 0}), "temperature"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type"),
        (json!({"thinking_token_budget": 1, "max_thinking_tokens": 2}), "max_thinking_tokens"),
    ] {
        assert_eq!(param(check(request(json!("Hi"), more.clone()))), fault, "{more}");
    }
}

#[test]
fn each_fault_of_a_part_names_its_path() {
    let content = "messages[0].content";
    for (part, fault) in [
        (json!({"type": "image_url", "image_url": {"url": "https://a/b.png"}}), "[0].type"),
        (json!({"type": "text"}), "[0].text"),
        (json!({"type": "text", "text": "x", "odd": 1}), "[0].odd"),
        (json!({"type": "video_url"}), "[0].video_url.url"),
        (json!({"type": "video_url", "video_url": "ftp://a/b"}), "[0].video_url.url"),
        (json!({"type": "video_url", "video_url": "/etc/passwd"}), "[0].video_url.url"),
        (json!({"type": "video_url", "video_url": {"url": URL, "odd": 1}}), "[0].video_url.odd"),
        (json!({"type": "video_url", "video_url": {"url": URL, "fps": 0}}), "[0].video_url.fps"),
        (
            json!({"type": "video_url", "video_url": {"url": URL, "num_frames": 0}}),
            "[0].video_url.num_frames",
        ),
        (
            json!({"type": "video_url", "video_url": {"url": URL, "num_frames": 65}}),
            "[0].video_url.num_frames",
        ),
        (json!({"type": "video_url", "video_url": {"url": URL, "start": 2, "end": 1}}), "[0].video_url.end"),
        (json!({"type": "video_url", "video_url": {"url": URL, "start": -1}}), "[0].video_url.start"),
    ] {
        assert_eq!(param(check(request(json!([part]), json!({})))), format!("{content}{fault}"), "{part}");
    }
    let two = json!([{"type": "video_url", "video_url": URL}, {"type": "video_url", "video_url": URL}]);
    assert_eq!(param(check(request(two, json!({})))), "messages[0].content[1]");
}

#[test]
fn knobs_of_two_places_complete_or_contradict_each_other() {
    let ask = |own: Value, top: Value| {
        let mut part = json!({"url": URL});
        part.as_object_mut().unwrap().extend(own.as_object().cloned().unwrap());
        check(request(video(part), json!({"media_io_kwargs": {"video": top}})))
    };
    let own = "messages[0].content[1].video_url";
    let sampling = ask(json!({"fps": 2.0}), json!({"max_frames": 8})).unwrap().video.unwrap().sampling;
    assert_eq!((sampling.fps, sampling.max_frames), (Some(2.0), Some(8)));
    assert!(ask(json!({"num_frames": 8}), json!({"num_frames": 8})).is_ok());
    assert_eq!(
        param(ask(json!({"num_frames": 8}), json!({"num_frames": 4}))),
        "media_io_kwargs.video.num_frames"
    );
    assert_eq!(param(ask(json!({"num_frames": 8}), json!({"fps": 1}))), "media_io_kwargs.video.fps");
    assert_eq!(param(ask(json!({"num_frames": 8, "max_frames": 9}), json!({}))), format!("{own}.max_frames"));
    assert_eq!(param(ask(json!({"max_frames": 9}), json!({}))), format!("{own}.max_frames"));
    assert_eq!(param(ask(json!({}), json!({"max_frames": 9}))), "media_io_kwargs.video.max_frames");
    assert_eq!(param(ask(json!({"end": 1.0}), json!({"start": 2.0}))), format!("{own}.end"));
}

#[test]
fn text_is_counted_over_all_parts_and_messages() {
    let max_text_bytes = Config::default().max_text_bytes;
    let of = |num_bytes: usize| json!({"type": "text", "text": "x".repeat(num_bytes)});
    let half = max_text_bytes / 2;
    assert!(check(request(json!([of(half), of(half - 1)]), json!({}))).is_ok(), "and a newline between");
    assert_eq!(param(check(request(json!([of(half), of(half)]), json!({})))), "messages");
    assert!(check(request(json!("x".repeat(max_text_bytes)), json!({}))).is_ok());
    assert_eq!(param(check(request(json!("x".repeat(max_text_bytes + 1)), json!({})))), "messages");
}

#[test]
fn only_the_start_of_a_url_is_looked_at_for_its_scheme() {
    for known in ["data:video/mp4;base64,", "HTTPS://a/b", "file:a", "http://a"] {
        assert!(check(request(video(json!(known)), json!({}))).is_ok(), "{known}");
    }
    let long = format!("{}:", "é".repeat(1 << 20));
    for unknown in ["", "http", "éé:", "s3://a", "https2://a", &long] {
        let fault = param(check(request(video(json!(unknown)), json!({}))));
        assert_eq!(fault, "messages[0].content[1].video_url.url", "{unknown:.20}");
    }
}

#[test]
fn an_upload_is_the_video_of_the_last_turn_or_of_the_part_without_url() {
    let valid = with_upload(request(json!("What?"), json!({})), true).unwrap();
    assert_eq!(valid.conversation.turns[0].num_videos, 1);
    assert!(matches!(valid.video.unwrap().source, VideoSource::TempFile(_)));

    let marked = request(video(json!({"num_frames": 8})), json!({}));
    let found = with_upload(marked, true).unwrap().video.unwrap();
    assert_eq!(found.sampling.num_frames, Some(8));
    assert!(matches!(found.source, VideoSource::TempFile(_)));

    let both = with_upload(request(video(json!(URL)), json!({})), true);
    assert_eq!(param(both), "messages[0].content[1].video_url.url");
    assert!(with_upload(request(json!(""), json!({})), true).is_ok(), "a video alone is a question");
    assert_eq!(param(check(request(json!(" "), json!({})))), "messages");
}

#[test]
fn what_asks_for_nothing_is_let_through() {
    let more = json!({
        "n": 1, "best_of": 1, "vote": false, "answer_logprobs": false, "tools": [], "tool_choice": "auto", "logprobs": false, "top_logprobs": 0, "user": "me",
        "response_format": {"type": "text"}, "store": true, "metadata": {"a": "b"}, "service_tier": "auto",
        "parallel_tool_calls": true, "modalities": ["text"], "unheard_of": null,
    });
    assert!(check(request(json!("Hi"), more)).is_ok());
}

#[test]
fn choices_are_counted_and_the_options_of_the_question_found() {
    let more =
        json!({"n": 8, "best_of": 8, "vote": true, "temperature": 0.5, "logprobs": true, "top_logprobs": 20});
    let valid = check(request(json!("Which?\nA. this\nB. that"), more)).unwrap();
    let options = crate::output::Options::of_question("A. x\nB. y");
    assert!(options.is_some());
    let choices = ValidChoices { count: 8, logprobs: true, answer_logprobs: false, vote: true, options };
    assert_eq!(valid.choices, choices);
    assert_eq!(valid.sampling.params.top_logprobs, Some(20));
    let plain = check(request(json!("Hi"), json!({"answer_logprobs": true}))).unwrap();
    let choices = ValidChoices { count: 1, answer_logprobs: true, ..ValidChoices::default() };
    assert_eq!((plain.choices, plain.sampling.params.top_logprobs), (choices, None));
}

#[test]
fn thinking_can_be_hidden_kept_raw_or_not_asked_for() {
    let ask = |more: Value| check(request(json!("Hi"), more)).unwrap();
    assert_eq!(ask(json!({"include_reasoning": false})).reasoning, Reasoning::Hidden);
    assert_eq!(ask(json!({"reasoning_format": "none"})).reasoning, Reasoning::Raw);
    assert_eq!(ask(json!({"reasoning_effort": "none"})).instruction, Instruction::OptionOnly);
    let off = json!({"chat_template_kwargs": {"enable_thinking": false}});
    assert_eq!(ask(off).instruction, Instruction::OptionOnly);
    assert_eq!(ask(json!({"reasoning_effort": "low"})).instruction, Instruction::Think);
}

#[test]
fn long_client_text_is_cut_in_errors() {
    let InvalidRequest::Field { message, .. } =
        check(request(video(json!("x".repeat(100_000))), json!({}))).unwrap_err()
    else {
        panic!("a field is at fault")
    };
    assert!(message.len() < 400, "{} bytes", message.len());
}

#[test]
fn the_lists_of_fields_do_not_overlap() {
    let all: Vec<&str> = HARMLESS.iter().chain(&fields::NOT_YET).copied().collect();
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
}

proptest! {
    /// Whatever the numbers are, what comes out is in range.
    #[test]
    fn valid_sampling_is_in_range(
        temperature in proptest::option::of(-1.0..3.0f64), top_p in proptest::option::of(-0.5..1.5f64),
        top_k in proptest::option::of(-3i64..100), min_p in proptest::option::of(-0.5..1.5f64),
        repetition in proptest::option::of(-1.0..12.0f64), seed in any::<i64>(), max_tokens in 0u64..10,
    ) {
        let more = json!({"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p,
            "repetition_penalty": repetition, "seed": seed, "max_tokens": max_tokens});
        if let Ok(valid) = check(request(json!("Hi"), more)) {
            let p = &valid.sampling.params;
            prop_assert!((0.0..=2.0).contains(&p.temperature));
            prop_assert!(p.top_p > 0.0 && p.top_p <= 1.0);
            prop_assert!((0.0..=1.0).contains(&p.min_p));
            prop_assert!(p.repetition_penalty > 0.0);
            prop_assert_eq!(valid.sampling.seed, Some(seed as u64));
            prop_assert_eq!(valid.sampling.max_tokens, Some(max_tokens as usize));
        } else {
            let in_range = |value: Option<f64>, low, high| value.is_none_or(|v| v >= low && v <= high);
            prop_assert!(!(in_range(temperature, 0.0, 2.0) && in_range(top_p, 1e-9, 1.0) && in_range(min_p, 0.0, 1.0)
                && in_range(repetition, 0.01, 10.0) && top_k.is_none_or(|k| k >= -1) && max_tokens > 0));
        }
    }

    /// Any order of roles is either refused or gives turns that all but the last have a reply.
    #[test]
    fn a_valid_conversation_ends_with_a_question(
        roles in proptest::collection::vec(prop_oneof![Just("system"), Just("user"), Just("assistant")], 0..8),
    ) {
        let messages: Vec<Value> = roles.iter().map(|role| json!({"role": role, "content": "x"})).collect();
        if let Ok(valid) = check(json!({"messages": messages})) {
            let (last, before) = valid.conversation.turns.split_last().expect("one turn at least");
            prop_assert!(last.assistant.is_none());
            prop_assert!(before.iter().all(|turn| turn.assistant.is_some()));
            let num_system = usize::from(valid.conversation.system.is_some());
            prop_assert_eq!(num_system + before.len() * 2 + 1, roles.len());
        }
    }

    /// No JSON of the right outer form makes validation panic.
    #[test]
    fn any_knobs_are_accepted_or_refused(
        num_frames in proptest::option::of(any::<i64>()), fps in proptest::option::of(any::<f64>()),
        max_frames in proptest::option::of(any::<i64>()), start in proptest::option::of(any::<f64>()),
        end in proptest::option::of(any::<f64>()),
    ) {
        let part = json!({"url": URL, "num_frames": num_frames, "fps": fps, "max_frames": max_frames,
            "start": start, "end": end});
        if let Ok(valid) = check(request(video(part), json!({}))) {
            let sampling = valid.video.expect("there is one").sampling;
            prop_assert!(sampling.num_frames.is_none_or(|n| (1..=64).contains(&n)));
            prop_assert!(sampling.fps.is_none_or(|fps| fps > 0.0 && sampling.num_frames.is_none()));
            prop_assert!(sampling.start.zip(sampling.end).is_none_or(|(start, end)| start < end));
        }
    }
}
