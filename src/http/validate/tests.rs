//! What is accepted, what is refused, and that the fault is named.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

mod conversations;

fn with_upload(request: Value, upload: bool) -> Result<ValidRequest, InvalidRequest> {
    with_config(request, upload, &Config::default())
}

fn with_config(request: Value, upload: bool, config: &Config) -> Result<ValidRequest, InvalidRequest> {
    let default_sampling = SamplingParams::greedy(1);
    let limits = Limits {
        config,
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

/// The one video of a request that has one.
fn only(valid: ValidRequest) -> ValidVideo {
    let [video] = <[ValidVideo; 1]>::try_from(valid.videos).expect("one video");
    video
}

const URL: &str = "https://example.org/a.mp4";

#[test]
fn plain_text_is_a_turn_with_defaults() {
    let valid = check(request(json!("Hi"), json!({"model": "nano"}))).unwrap();
    assert_eq!(valid.conversation.turns.len(), 1);
    assert_eq!(valid.conversation.turns[0].user, "Hi");
    assert!(valid.videos.is_empty() && !valid.stream);
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
        let source = match only(valid).source {
            VideoSource::Named { uuid, source: Some(source) } if uuid == "7" => *source,
            source => source,
        };
        assert!(matches!(source, VideoSource::Url(url) if url == URL));
    }
}

#[test]
fn a_uuid_is_kept_with_its_source_and_stands_for_it_alone() {
    let named = |uuid: &str, source: &str| format!("Named {{ uuid: {uuid:?}, source: {source} }}");
    for (part, source) in [
        (
            json!({"type": "video_url", "video_url": URL, "uuid": "a"}),
            named("a", &format!("Some(Url({URL:?}))")),
        ),
        (
            json!({"type": "image_url", "image_url": URL, "uuid": "a"}),
            named("a", &format!("Some(Image({URL:?}))")),
        ),
        (json!({"type": "video_url", "uuid": "a"}), named("a", "None")),
        (json!({"type": "video_url", "video_url": null, "uuid": "a"}), named("a", "None")),
        (json!({"type": "video_url", "video_url": {"uuid": "a"}}), named("a", "None")),
        (json!({"type": "image_url", "image_url": {"uuid": "a"}, "uuid": "a"}), named("a", "None")),
        (json!({"type": "image_url", "image_url": {}, "uuid": "a"}), named("a", "None")),
        (json!({"type": "input_video", "input_video": {"uuid": "a"}}), named("a", "None")),
        (json!({"type": "video", "uuid": "a"}), named("a", "None")),
    ] {
        let video = only(check(request(json!([part]), json!({}))).unwrap());
        assert_eq!(format!("{:?}", video.source), source);
    }
}

#[test]
fn every_form_of_a_part_becomes_its_source() {
    let data = "data:video/mp4;base64,aa";
    for (part, source) in [
        (json!({"type": "video", "video": URL}), format!("Url({URL:?})")),
        (json!({"type": "video", "video": [URL, data]}), format!("Frames([{URL:?}, {data:?}])")),
        (
            json!({"type": "video", "video": [
                {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}, data, {"image_url": URL},
            ]}),
            format!("Frames([{URL:?}, {data:?}, {URL:?}])"),
        ),
        (
            json!({"type": "video", "video": [URL, data], "timestamps": [0.5, 2]}),
            format!("Timed(Frames([{URL:?}, {data:?}]), [0.5, 2.0])"),
        ),
        (json!({"type": "input_video", "input_video": {"url": URL}}), format!("Url({URL:?})")),
        (json!({"type": "input_video", "input_video": {"data": "aa"}}), "Base64(\"aa\")".into()),
        (json!({"type": "input_video", "input_video": {"data": data}}), format!("Url({data:?})")),
        (json!({"type": "input_video", "input_video": URL}), format!("Url({URL:?})")),
        (json!({"type": "input_video", "input_video": data}), format!("Url({data:?})")),
        (json!({"type": "input_video", "input_video": "aa"}), "Base64(\"aa\")".into()),
        (
            json!({"type": "input_video", "input_video": {"data": "aa", "format": "mp4"}}),
            "Base64(\"aa\")".into(),
        ),
        (
            json!({"type": "input_video", "input_video": {"url": URL, "format": null}}),
            format!("Url({URL:?})"),
        ),
        (json!({"type": "file", "file": {"file_id": "file-1"}}), "FileId(\"file-1\")".into()),
        (json!({"type": "file", "file": {"file_data": data, "filename": "a.mp4"}}), format!("Url({data:?})")),
        (json!({"type": "image_url", "image_url": URL}), format!("Image({URL:?})")),
        (json!({"type": "image_url", "image_url": {"url": URL, "detail": "low"}}), format!("Image({URL:?})")),
    ] {
        let video = only(check(request(json!([part]), json!({}))).unwrap());
        assert_eq!(format!("{:?}", video.source), source);
        assert_eq!(video.path, format!("messages[0].content[0].{}", part["type"].as_str().unwrap()));
        assert_eq!(video.sampling, FrameSampling::default());
    }
}

#[test]
fn knobs_stand_beside_a_video_too_and_minus_one_is_all_frames() {
    let sampling = |part: Value, top: Value| {
        let more = json!({"media_io_kwargs": {"video": top}});
        check(request(json!([part]), more)).map(|valid| only(valid).sampling)
    };
    let plain = json!({"type": "video", "video": URL});
    let beside =
        sampling(json!({"type": "video", "video": URL, "fps": 2.0, "max_frames": 8}), json!({})).unwrap();
    assert_eq!((beside.fps, beside.max_frames), (Some(2.0), Some(8)));
    let all = sampling(plain.clone(), json!({"num_frames": -1})).unwrap();
    assert_eq!(all, FrameSampling { num_frames: Some(64), ..FrameSampling::default() });
    let all = sampling(plain.clone(), json!({"num_frames": -1, "fps": -1})).unwrap();
    assert_eq!(all.num_frames, Some(64));
    let rate = sampling(plain.clone(), json!({"num_frames": -1, "fps": 3})).unwrap();
    assert_eq!((rate.num_frames, rate.fps), (None, Some(3.0)));
    let bounded = sampling(plain, json!({"num_frames": -1, "max_frames": 5})).unwrap();
    assert_eq!((bounded.num_frames, bounded.max_frames), (Some(5), None));
    // The rate of a list is its own: a number of frames beside it is a bound that it keeps or not.
    let list = json!({"type": "video", "video": [URL, URL], "fps": 2.0});
    let list = sampling(list, json!({"num_frames": 2})).unwrap();
    assert_eq!((list.num_frames, list.fps), (Some(2), Some(2.0)));
}

#[test]
fn several_videos_are_taken_in_order_up_to_the_limit() {
    let config = Config { max_videos_per_request: 3, ..Config::default() };
    let part = |n: usize| json!({"type": "video_url", "video_url": {"url": format!("https://a/{n}"), "num_frames": n}});
    let messages = |parts: [Vec<usize>; 2]| {
        let [first, last] = parts.map(|numbers| numbers.into_iter().map(part).collect::<Vec<_>>());
        json!({"messages": [{"role": "user", "content": first}, {"role": "assistant", "content": "B"},
            {"role": "user", "content": last}], "media_io_kwargs": {"video": {"start": 1.0}}})
    };
    let valid = with_config(messages([vec![1, 2], vec![3]]), false, &config).unwrap();
    let nums: Vec<_> = valid.videos.iter().map(|video| video.sampling.num_frames.unwrap()).collect();
    assert_eq!(nums, [1, 2, 3]);
    assert!(valid.videos.iter().all(|video| video.sampling.start == Some(1.0)));
    assert_eq!(valid.conversation.turns.iter().map(|turn| turn.num_videos).collect::<Vec<_>>(), [2, 1]);
    let refused = with_config(messages([vec![1, 2], vec![1, 2, 3, 4]]), false, &config).unwrap_err();
    let InvalidRequest::Field { param: at, message } = refused else { panic!("{refused:?}") };
    assert_eq!(at, "messages[2].content[3]");
    assert!(message.contains("at most 3") && message.contains("--max-videos-per-request"), "{message}");
    // Earlier messages do not count for the last one's limit, but there is one for all.
    let history = messages([vec![1, 2, 3], vec![4, 5, 6]]);
    assert_eq!(with_config(history.clone(), false, &config).unwrap().videos.len(), 6);
    let bounded = Config { max_videos_per_conversation: 5, ..config.clone() };
    let refused = with_config(history, false, &bounded).unwrap_err();
    let InvalidRequest::Field { param: at, message } = refused else { panic!("{refused:?}") };
    assert_eq!(at, "messages[2].content[2]");
    assert!(message.contains("at most 5") && message.contains("--max-videos-per-conversation"), "{message}");

    // The upload takes the place of the part without a source, and needs one beside other videos.
    let marked = json!([part(1), {"type": "video_url"}]);
    let valid = with_config(request(marked, json!({})), true, &config).unwrap();
    assert!(matches!(valid.videos[1].source, VideoSource::TempFile(_)));
    let unplaced = with_config(request(json!([part(1)]), json!({})), true, &config);
    assert_eq!(param(unplaced), "messages[0].content[0].video_url.url");
    let twice = json!([{"type": "video_url"}, {"type": "video_url"}]);
    let twice = with_config(request(twice, json!({})), true, &config);
    assert_eq!(param(twice), "messages[0].content[1].video_url.url");
    let none = Config { max_videos_per_request: 0, ..Config::default() };
    assert_eq!(param(with_config(request(json!("x"), json!({})), true, &none)), "video");
}

#[test]
fn salt_and_timeout_have_their_limits() {
    let ask = |more: Value| check(request(json!("Hi"), more));
    let valid = ask(json!({"cache_salt": "me", "timeout": 1.5})).unwrap();
    assert_eq!(valid.cache_salt.as_deref(), Some("me"));
    assert_eq!(valid.timeout, Some(Duration::from_millis(1500)));
    for (more, fault) in [
        (json!({"cache_salt": ""}), "cache_salt"),
        (json!({"cache_salt": "x".repeat(129)}), "cache_salt"),
        (json!({"timeout": 0}), "timeout"),
        (json!({"timeout": -1}), "timeout"),
        (json!({"timeout": 600.5}), "timeout"),
    ] {
        assert_eq!(param(ask(more)), fault);
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
fn a_conversation_must_end_with_a_known_role_that_is_the_users() {
    let message = |role: &str| json!({"role": role, "content": "x"});
    for (roles, fault) in [
        (vec![], "messages"),
        (vec!["assistant"], "messages"),
        (vec!["system"], "messages"),
        (vec!["user", "assistant"], "messages"),
        (vec!["user", "assistant", "assistant"], "messages"),
        (vec!["user", "assistant", "system"], "messages"),
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
        (json!({"media_io_kwargs": {"audio": {}}}), "media_io_kwargs.audio"),
        (json!({"media_io_kwargs": {"image": {"size": 1}}}), "media_io_kwargs.image.size"),
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
        (json!({"type": "input_audio", "input_audio": {"data": "aa"}}), "[0].type"),
        (json!({"type": "text", "text": "x", "video_url": URL}), "[0].video_url"),
        (json!({"type": "text", "text": "x", "fps": 1}), "[0].fps"),
        (json!({"type": "video_url", "video_url": URL, "video": URL}), "[0].video"),
        (json!({"type": "video_url", "video_url": URL, "odd": 1}), "[0].odd"),
        (
            json!({"type": "video_url", "video_url": {"url": URL, "uuid": "x".repeat(257)}}),
            "[0].video_url.uuid",
        ),
        (json!({"type": "video_url", "video_url": {"url": URL, "fps": 1}, "fps": 2}), "[0].fps"),
        (json!({"type": "video_url", "video_url": {"uuid": "a"}, "uuid": "b"}), "[0].video_url.uuid"),
        (json!({"type": "video_url", "uuid": ""}), "[0].uuid"),
        (json!({"type": "image_url", "image_url": {}}), "[0].image_url.url"),
        (json!({"type": "audio_url", "audio_url": {"url": URL}}), "[0].type"),
        (json!({"type": "input_video", "input_video": "ftp://a/b"}), "[0].input_video"),
        (json!({"type": "input_video"}), "[0].input_video"),
        (json!({"type": "input_video", "input_video": {"data": "aa", "url": URL}}), "[0].input_video.data"),
        (json!({"type": "input_video", "input_video": {"url": "x"}}), "[0].input_video.url"),
        (json!({"type": "input_video", "input_video": {"data": "aa", "odd": 1}}), "[0].input_video.odd"),
        (json!({"type": "video", "video": []}), "[0].video"),
        (json!({"type": "video", "video": [URL, "x"]}), "[0].video[1]"),
        (json!({"type": "video", "video": "x"}), "[0].video"),
        (json!({"type": "video", "video": [{"type": "text", "text": "x"}]}), "[0].video[0].text"),
        (json!({"type": "video", "video": [{"type": "video_url", "image_url": URL}]}), "[0].video[0].type"),
        (json!({"type": "video", "video": [URL, {"type": "image_url"}]}), "[0].video[1].image_url"),
        (json!({"type": "video", "video": [{"image_url": {"url": "x"}}]}), "[0].video[0].image_url.url"),
        (json!({"type": "video", "video": [URL, URL], "timestamps": [1]}), "[0].timestamps"),
        (json!({"type": "video", "video": [URL, URL], "timestamps": [2, 1]}), "[0].timestamps"),
        (json!({"type": "video", "video": [URL, URL], "timestamps": [0, 1e9]}), "[0].timestamps"),
        (json!({"type": "video", "video": [URL, URL], "timestamps": [0, 1], "fps": 1}), "[0].timestamps"),
        (json!({"type": "video", "video": URL, "timestamps": [0]}), "[0].timestamps"),
        (json!({"type": "image_url", "image_url": URL, "timestamps": [0]}), "[0].timestamps"),
        (json!({"type": "file", "file": {}}), "[0].file"),
        (json!({"type": "file", "file": {"file_id": ""}}), "[0].file.file_id"),
        (json!({"type": "file", "file": {"file_id": "file-1", "file_data": "aa"}}), "[0].file.file_data"),
        (json!({"type": "file", "file": {"file_id": "file-1", "odd": 1}}), "[0].file.odd"),
        (json!({"type": "image_url"}), "[0].image_url.url"),
        (json!({"type": "image_url", "image_url": {"url": "x"}}), "[0].image_url.url"),
        (json!({"type": "image_url", "image_url": {"url": URL, "detail": "odd"}}), "[0].image_url.detail"),
        (json!({"type": "image_url", "image_url": URL, "num_frames": 1}), "[0].num_frames"),
        (json!({"type": "text"}), "[0].text"),
        (json!({"type": "text", "text": "x", "odd": 1, "cache_control": {"type": "ephemeral"}}), "[0].odd"),
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
    let sampling = only(ask(json!({"fps": 2.0}), json!({"max_frames": 8})).unwrap()).sampling;
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
    assert!(matches!(only(valid).source, VideoSource::TempFile(_)));

    let marked = request(video(json!({"num_frames": 8})), json!({}));
    let found = only(with_upload(marked, true).unwrap());
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
        "parallel_tool_calls": true, "modalities": ["text"], "unheard_of": null, "reasoning_effort": "max",
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
    let choices = ValidChoices { count: 8, logprobs: true, vote: true, options, ..ValidChoices::default() };
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
            // Each message is a line of the text that it belongs to.
            let conversation = &valid.conversation;
            let lines = |text: &str| text.lines().count();
            let system = conversation.system.as_deref().map_or(0, lines);
            let of_turn = |turn: &crate::prompt::Turn| {
                lines(&turn.user) + turn.assistant.as_deref().map_or(0, lines)
            };
            let turns: usize = conversation.turns.iter().map(of_turn).sum();
            prop_assert_eq!(system + turns, roles.len());
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
            let sampling = only(valid).sampling;
            prop_assert!(sampling.num_frames.is_none_or(|n| (1..=64).contains(&n)));
            prop_assert!(sampling.fps.is_none_or(|fps| fps > 0.0 && sampling.num_frames.is_none()));
            prop_assert!(sampling.start.zip(sampling.end).is_none_or(|(start, end)| start < end));
        }
    }
}
