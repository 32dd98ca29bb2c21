//! Fields of other servers' requests over sockets: bodies that routers serialize again, replies that
//! clients send back, joined messages, the field of the thinking, and `stream_options`.

use serde_json::{Value, json};
use tinyllava::{
    config::{Config, ReasoningField},
    model::fake::FakeModel,
};

use crate::{http_setup::*, server_process};

const COMPLETIONS: &str = "/v1/completions";
const RESPONSES: &str = "/v1/responses";
const QUESTION: &str = "What? ASSISTANT:";

/// `body` and the fields of `more`.
fn merged(mut body: Value, more: &Value) -> Value {
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// The fields that sglang-router 0.3.2 and vllm-router 0.1.17 add to chat and completion requests.
fn of_routers() -> Value {
    json!({
        "stream": false, "no_stop_trim": false, "ignore_eos": false, "skip_special_tokens": true,
        "return_hidden_states": false, "logprobs": false, "continue_final_message": false, "separate_reasoning": true,
        "stream_reasoning": true, "include_reasoning": true, "return_routed_experts": false, "use_raw_prompt": false,
        "rid": "router-1", "priority": 0
    })
}

/// The defaults of SGLang's own chat request.
fn of_sglang() -> Value {
    serde_json::from_str(
        r#"{
        "frequency_penalty": 0.0, "logit_bias": null, "logprobs": false, "top_logprobs": null, "max_tokens": null,
        "max_completion_tokens": null, "n": 1, "presence_penalty": 0.0, "response_format": null, "seed": null,
        "stop": null, "stream": false, "stream_options": null, "temperature": null, "top_p": null, "user": null,
        "tools": null, "tool_choice": "none", "parallel_tool_calls": true, "return_hidden_states": false,
        "return_routed_experts": false, "routed_experts_start_len": 0, "return_cached_tokens_details": false,
        "return_prompt_token_ids": false, "return_token_ids": false, "return_meta_info": false,
        "reasoning_effort": null, "task": null, "top_k": null, "min_p": null, "min_tokens": 0, "regex": null,
        "ebnf": null, "repetition_penalty": null, "stop_token_ids": null, "stop_regex": null, "no_stop_trim": false,
        "ignore_eos": false, "continue_final_message": false, "skip_special_tokens": true, "lora_path": null,
        "session_id": null, "session_params": null, "separate_reasoning": true, "stream_reasoning": true,
        "chat_template_kwargs": null, "max_dynamic_patch": null, "min_dynamic_patch": null,
        "use_audio_in_video": false, "images_config": null, "custom_logit_processor": null, "custom_params": null,
        "input_ids": null, "rid": null, "extra_key": null, "cache_salt": null, "ngram_corpus_id": null,
        "priority": null, "bootstrap_host": null, "bootstrap_port": null, "bootstrap_room": null,
        "routed_dp_rank": null, "disagg_prefill_dp_rank": null, "data_parallel_rank": null
    }"#,
    )
    .unwrap()
}

/// The defaults of vLLM's own requests that are alike in chat and completions.
fn of_vllm() -> Value {
    serde_json::from_str(
        r#"{
        "frequency_penalty": null, "logit_bias": null, "n": 1, "presence_penalty": null, "seed": null, "stop": [],
        "stream": false, "stream_options": null, "temperature": null, "top_p": null, "user": null,
        "use_beam_search": false, "top_k": null, "min_p": null, "repetition_penalty": null, "watermarking": null,
        "length_penalty": 1.0, "stop_token_ids": [], "include_stop_str_in_output": false, "ignore_eos": false,
        "min_tokens": 0, "skip_special_tokens": true, "spaces_between_special_tokens": true,
        "truncate_prompt_tokens": null, "truncation_side": null, "prompt_logprobs": null, "logprob_token_ids": null,
        "allowed_token_ids": null, "bad_words": [], "echo": false, "response_format": null,
        "structured_outputs": null, "priority": 0, "request_id": "6f7c", "session_id": null,
        "return_tokens_as_token_ids": null, "return_token_ids": null, "routed_experts_prompt_start": 0,
        "return_token_offsets": false, "return_mm_kwargs": true, "cache_salt": null, "kv_transfer_params": null,
        "ec_transfer_params": null, "vllm_xargs": null, "repetition_detection": null, "stream_interval": null,
        "thinking_token_budget": null
    }"#,
    )
    .unwrap()
}

fn of_vllm_chat() -> Value {
    merged(
        of_vllm(),
        &json!({
            "logprobs": false, "top_logprobs": 0, "max_tokens": null, "max_completion_tokens": null, "tools": null,
            "tool_choice": "none", "reasoning_effort": null, "include_reasoning": true, "parallel_tool_calls": true,
            "add_generation_prompt": true, "continue_final_message": false, "add_special_tokens": false,
            "documents": null, "chat_template": null, "chat_template_kwargs": null, "media_io_kwargs": null,
            "mm_processor_kwargs": null, "return_prompt_text": null
        }),
    )
}

/// The defaults of the responses requests of vLLM, SGLang, vllm-router and smg.
fn of_responses() -> [Value; 3] {
    let common = json!({
        "background": false, "parallel_tool_calls": true, "service_tier": "auto", "store": true, "stream": false,
        "tool_choice": "auto", "tools": [], "top_logprobs": 0, "truncation": "disabled", "request_id": "resp_1",
        "priority": 0
    });
    let sampling = json!({"frequency_penalty": 0.0, "presence_penalty": 0.0, "top_k": -1, "min_p": 0.0,
        "repetition_penalty": 1.0});
    let vllm = json!({
        "include": null, "instructions": null, "logit_bias": null, "prompt": null, "skip_special_tokens": true,
        "include_stop_str_in_output": false, "prompt_cache_key": null, "mm_processor_kwargs": null,
        "cache_salt": null, "enable_response_messages": false, "previous_input_messages": null,
        "previous_response": null, "structured_outputs": null, "repetition_penalty": null, "seed": null, "stop": [],
        "ignore_eos": false, "vllm_xargs": null
    });
    let smg = json!({"model": MODEL, "store": true, "stream": false, "temperature": 1.0, "priority": 0});
    [merged(common.clone(), &sampling), merged(common, &vllm), merged(smg, &sampling)]
}

#[tokio::test]
async fn bodies_with_the_defaults_of_routers_and_servers_get_the_same_reply() {
    let server = simple_server().await;
    let chat = request(json!("What?"), json!({}));
    let plain = server.ask(&chat).await;
    let annotated = json!({"echo": false, "add_generation_prompt": true, "tool_choice": "none", "tools": []});
    for more in [of_routers(), merged(of_routers(), &annotated), of_sglang(), of_vllm_chat()] {
        let reply = server.ask(&merged(chat.clone(), &more)).await;
        assert_eq!(reply["choices"], plain["choices"], "{more}");
    }
    let text = json!({"prompt": QUESTION, "max_tokens": 60});
    let plain = success(server.send_json(COMPLETIONS, &text).await).await;
    let mut of_routers = of_routers();
    // A number here, and absent in what routers send.
    of_routers.as_object_mut().unwrap().shift_remove("logprobs");
    let of_router = merged(of_routers, &json!({"echo": false}));
    let of_vllm =
        merged(of_vllm(), &json!({"add_special_tokens": true, "suffix": null, "prompt_embeds": null}));
    for more in [of_router, of_vllm] {
        let reply = success(server.send_json(COMPLETIONS, &merged(text.clone(), &more)).await).await;
        assert_eq!(reply["choices"], plain["choices"], "{more}");
    }
    for more in of_responses() {
        // The scripted model says its reply for certain only when it is greedy.
        let greedy = merged(more.clone(), &json!({"temperature": 0}));
        let body = merged(json!({"input": "What?"}), &greedy);
        let response = success(server.send_json(RESPONSES, &body).await).await;
        assert_eq!(response["output"][1]["content"][0]["text"], "C", "{more}");
    }
}

#[tokio::test]
async fn other_values_are_refused_with_the_reason_on_every_endpoint() {
    let server = simple_server().await;
    let bodies = [
        (CHAT, request(json!("What?"), json!({}))),
        (COMPLETIONS, json!({"prompt": QUESTION})),
        (RESPONSES, json!({"input": "What?"})),
    ];
    for (field, value, reason) in [
        ("priority", json!(1), "arrival"),
        ("length_penalty", json!(0.5), "beam search"),
        ("skip_special_tokens", json!(false), "special tokens"),
        ("bad_words", json!(["no"]), "logit_bias"),
        ("return_token_ids", json!(true), "logprobs"),
        ("separate_reasoning", json!(false), "reasoning_format"),
        ("lora_path", json!("adapter"), "adapters"),
        ("unheard_of", json!(0), "unknown field"),
    ] {
        for (path, body) in &bodies {
            let asked = merged(body.clone(), &json!({field: value}));
            let (status, refused) = error(server.send_json(path, &asked).await).await;
            assert_eq!((status, &refused["param"]), (400, &json!(field)), "{path}: {refused}");
            assert!(refused["message"].as_str().unwrap().contains(reason), "{path}: {refused}");
        }
    }
}

#[tokio::test]
async fn a_reply_goes_back_with_all_the_fields_a_client_keeps_for_it() {
    let server = simple_server().await;
    let conversation = |question: Value, reply: Value| json!({"messages": [question, reply, {"role": "user", "content": "Sure?"}]});
    let bare = conversation(
        json!({"role": "user", "content": "What?"}),
        json!({"role": "assistant", "content": "C"}),
    );
    let plain = server.ask(&bare).await;
    let question = json!({"role": "user", "name": "me", "id": "msg_1", "content": [
        {"type": "text", "text": "What?", "cache_control": {"type": "ephemeral"}, "annotations": []}]});
    for reply in [
        // The form in which LiteLLM dumps a message.
        json!({"role": "assistant", "content": "C", "tool_calls": null, "function_call": null, "audio": null,
            "images": [], "annotations": null, "reasoning_content": "Hm.", "thinking_blocks": null,
            "provider_specific_fields": {"reasoning": "Hm.", "refusal": null}}),
        // The form in which OpenAI's SDK does.
        json!({"role": "assistant", "content": "C", "refusal": null, "annotations": [], "audio": null,
            "function_call": null, "tool_calls": [], "reasoning": "Hm.", "reasoning_content": "Hm."}),
        json!({"role": "assistant", "id": "1", "content": [{"type": "text", "text": "C", "annotations": [],
            "cache_control": null}], "metadata": {}, "parsed": null, "files": [], "suffix": ""}),
    ] {
        let told = server.ask(&conversation(question.clone(), reply)).await;
        assert_eq!(told["usage"]["prompt_tokens"], plain["usage"]["prompt_tokens"]);
        assert_eq!(told["choices"], plain["choices"]);
    }
}

#[tokio::test]
async fn messages_of_one_role_are_the_same_prompt_as_one_message() {
    let server = simple_server().await;
    let video = json!({"type": "video_url", "video_url": clip_url()});
    let text = |text: &str| json!({"type": "text", "text": text});
    let message = |role: &str, content: Value| json!({"role": role, "content": content});
    let joined = json!([
        message("system", json!("Be brief.\nBe kind.")),
        message("user", json!([video, text("What?"), text("And why?")])),
        message("assistant", json!("C\nBecause.")),
        message("user", json!("Sure?")),
    ]);
    let apart = json!([
        message("system", json!("Be brief.")),
        message("user", json!([video])),
        message("user", json!("What?")),
        message("user", json!([text("And why?")])),
        message("assistant", json!("C")),
        message("assistant", Value::Null),
        message("assistant", json!("Because.")),
        message("developer", json!("Be kind.")),
        message("user", json!("Sure?")),
    ]);
    let first = server.ask(&json!({"messages": joined})).await;
    let second = server.ask(&json!({"messages": apart})).await;
    assert_eq!((&second["choices"], &second["video"]), (&first["choices"], &first["video"]));
    let usage = |reply: &Value, field: &str| reply["usage"][field].as_u64().unwrap();
    assert_eq!(usage(&second, "prompt_tokens"), usage(&first, "prompt_tokens"));
    // The same tokens: all whole blocks of the first prompt are found again.
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert!(cached + 16 >= usage(&first, "prompt_tokens"), "{}", second["usage"]);
    let greeting = json!([message("assistant", json!("Hello.")), message("user", json!("What?"))]);
    assert_eq!(server.ask(&json!({"messages": greeting})).await["choices"][0]["message"]["content"], "C");
    let prefilled = json!([message("user", json!("What?")), message("assistant", json!("It is"))]);
    let refused = server.post(&json!({"messages": prefilled})).send().await.unwrap();
    assert_eq!(error(refused).await.1["param"], "messages");
}

/// Names of the thinking's fields in a message or delta.
fn thinking_fields(value: &Value) -> Vec<&str> {
    let names = ["reasoning_content", "reasoning"];
    names.into_iter().filter(|name| value.get(name).is_some()).collect()
}

#[tokio::test]
async fn thinking_comes_in_the_field_that_is_asked_for_unary_and_streamed() {
    let both = &["reasoning_content", "reasoning"][..];
    for (server_field, asked, fields) in [
        (ReasoningField::Both, Value::Null, both),
        (ReasoningField::Both, json!("reasoning"), &["reasoning"]),
        (ReasoningField::Both, json!("reasoning_content"), &["reasoning_content"]),
        (ReasoningField::Reasoning, Value::Null, &["reasoning"]),
        (ReasoningField::ReasoningContent, Value::Null, &["reasoning_content"]),
        (ReasoningField::ReasoningContent, json!("both"), both),
    ] {
        let server =
            server(Config { reasoning_field: server_field, ..config() }, FakeModel::saying(REPLY)).await;
        let body = request(json!("What?"), json!({"reasoning_field": asked}));
        let message = &server.ask(&body).await["choices"][0]["message"];
        assert_eq!(thinking_fields(message), fields);
        assert!(fields.iter().all(|field| message[field] == "The person bends."), "{message}");
        let streamed = merged(body, &json!({"stream": true}));
        let events = Events::of(server.post(&streamed).send().await.unwrap()).rest().await;
        let chunks = chunks(&events);
        let thinking = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]);
        for delta in thinking.filter(|delta| delta["segment"] == "think") {
            assert_eq!(thinking_fields(delta), fields);
        }
        for field in fields {
            assert_eq!(text_of(&chunks, field), "The person bends.");
        }
        assert_eq!(text_of(&chunks, "content"), "C");
    }
}

#[tokio::test]
async fn flags_and_the_environment_set_the_field_of_the_thinking_and_the_most_replies() {
    let start = || {
        server_process::Server::start_in(&[("TINYLLAVA_REASONING_FIELD", "reasoning")], &["--max-n", "12"])
    };
    let server = tokio::task::spawn_blocking(start).await.unwrap();
    let url = format!("{}{CHAT}", server.url);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let ask = async |n: u64| {
        let body = json!({"n": n, "max_tokens": 12, "temperature": 0, "messages": [{"role": "user", "content": "What?"}]});
        client.post(&url).json(&body).send().await.unwrap()
    };
    let reply = success(ask(12).await).await;
    assert_eq!(reply["choices"].as_array().unwrap().len(), 12);
    assert_eq!(thinking_fields(&reply["choices"][11]["message"]), ["reasoning"]);
    let (status, refused) = error(ask(13).await).await;
    assert_eq!((status, &refused["param"]), (400, &json!("n")));
    assert!(refused["message"].as_str().unwrap().contains("from 1 to 12"), "{refused}");
}

#[tokio::test]
async fn every_chunk_has_the_usage_so_far_with_continuous_usage_stats() {
    let server = simple_server().await;
    let options =
        json!({"stream": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true}});
    let bodies = [
        (CHAT, request(json!("What?"), json!({"n": 2}))),
        (COMPLETIONS, json!({"prompt": QUESTION, "max_tokens": 60})),
    ];
    for (path, body) in bodies {
        let unary = success(server.send_json(path, &body).await).await;
        let events = Events::of(server.send_json(path, &merged(body, &options)).await).rest().await;
        let chunks = chunks(&events);
        let count = |chunk: &Value, pointer: &str| chunk["usage"].pointer(pointer).unwrap().as_u64().unwrap();
        for pointer in ["/completion_tokens", "/completion_tokens_details/reasoning_tokens", "/total_tokens"]
        {
            let counts: Vec<u64> = chunks.iter().map(|chunk| count(chunk, pointer)).collect();
            assert!(counts.is_sorted(), "{path} {pointer}: {counts:?}");
            assert_eq!(counts[counts.len() - 1], count(&unary, pointer), "{path} {pointer}");
        }
        assert!(chunks.iter().all(|chunk| count(chunk, "/prompt_tokens") == count(&unary, "/prompt_tokens")));
        let texts = chunks.iter().filter(|chunk| chunk["choices"] != json!([]));
        let mut completion: Vec<u64> = texts.map(|chunk| count(chunk, "/completion_tokens")).collect();
        completion.dedup();
        assert!(completion.len() > 10, "the count grows with the text: {completion:?}");
        assert_eq!(chunks.last().unwrap()["choices"], json!([]));
    }
    // Thinking counts as it comes, not only when its choice is over.
    let streamed = merged(request(json!("What?"), json!({})), &options);
    let events = Events::of(server.post(&streamed).send().await.unwrap()).rest().await;
    let chunks = chunks(&events);
    let answer = chunks.iter().find(|chunk| chunk["choices"][0]["delta"]["segment"] == "answer").unwrap();
    let counted = answer["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap();
    assert!(counted >= "The person bends.".len() as u64, "{answer}");
    let only = json!({"stream": true, "stream_options": {"continuous_usage_stats": true}});
    let streamed = merged(request(json!("What?"), json!({})), &only);
    let events = Events::of(server.post(&streamed).send().await.unwrap()).rest().await;
    assert!(
        self::chunks(&events).iter().all(|chunk| chunk["choices"] != json!([])),
        "no chunk without choices"
    );
}

#[tokio::test]
async fn obfuscated_events_have_sizes_that_do_not_tell_their_text() {
    let server = simple_server().await;
    let options = json!({"stream": true, "stream_options": {"include_obfuscation": true}});
    let bodies = [
        (CHAT, request(json!("What?"), json!({"logprobs": true}))),
        (COMPLETIONS, json!({"prompt": QUESTION, "max_tokens": 60})),
    ];
    for (path, body) in bodies {
        let events = Events::of(server.send_json(path, &merged(body.clone(), &options)).await).rest().await;
        let chunks = chunks(&events);
        let sizes: Vec<usize> = chunks.iter().map(|chunk| chunk.to_string().len() % 64).collect();
        assert!(chunks.len() > 10 && sizes.iter().all(|size| *size == sizes[0]), "{path}: {sizes:?}");
        assert!(chunks.iter().all(|chunk| !chunk["obfuscation"].as_str().unwrap().is_empty()));
        let plain = merged(body, &json!({"stream": true, "stream_options": {"include_obfuscation": false}}));
        let events = Events::of(server.send_json(path, &plain).await).rest().await;
        assert!(self::chunks(&events).iter().all(|chunk| chunk.get("obfuscation").is_none()));
    }
    let text =
        server.send_json(RESPONSES, &merged(json!({"input": "What?"}), &options)).await.text().await.unwrap();
    let events = text.split("\n\n").filter_map(|group| group.split_once("data: "));
    let events: Vec<Value> = events.map(|(_, data)| serde_json::from_str(data).unwrap()).collect();
    let (deltas, others): (Vec<&Value>, Vec<&Value>) =
        events.iter().partition(|event| event.get("delta").is_some());
    assert!(deltas.len() > 5 && others.iter().all(|event| event.get("obfuscation").is_none()));
    let sizes: Vec<usize> = deltas.iter().map(|event| event.to_string().len() % 64).collect();
    assert!(sizes.iter().all(|size| *size == sizes[0]), "{sizes:?}");
}

#[tokio::test]
async fn responses_take_the_stream_options_of_chat_that_ask_for_what_they_do() {
    let server = simple_server().await;
    for options in [Value::Null, json!({}), json!({"include_usage": true, "continuous_usage_stats": false})] {
        let body = json!({"input": "What?", "stream": true, "stream_options": options});
        let text = server.send_json(RESPONSES, &body).await.text().await.unwrap();
        let last = text.trim_end().rsplit("data: ").next().unwrap();
        let last: Value = serde_json::from_str(last).unwrap();
        assert_eq!(last["type"], "response.completed");
        assert!(last["response"]["usage"]["output_tokens"].as_u64().unwrap() > 0, "{last}");
    }
    let body = json!({"input": "What?", "stream": true, "stream_options": {"continuous_usage_stats": true}});
    let (status, refused) = error(server.send_json(RESPONSES, &body).await).await;
    assert_eq!((status, &refused["param"]), (400, &json!("stream_options.continuous_usage_stats")));
}
