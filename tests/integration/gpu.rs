//! The program on a GPU: `scripts/test-cuda.sh` has one that the processor plays (`tests/gpu`), which sees what a card would not. Without
//! any the tests say so and pass.

use std::process::{Command, Output};

use candle_core::DType;
use serde_json::{Value, json};
use tinyllava::model::{
    config::ModelConfig,
    device::{DeviceModel, cuda},
    layers::WeightFormat,
    tinyllava::TinyLlava,
    trial::{self, Case, relative_error},
    weights::{StoredDType, Weights},
};

use crate::{http_setup::demo, server_process::Server};

const GOLDEN: &str = "golden.safetensors";

/// Whether there is a GPU, of which `is_played` asks for more than a card can do.
#[expect(clippy::print_stdout, reason = "a test that does not run should say so")]
fn is_there(is_played: bool) -> bool {
    let there = cuda::num_devices() > 0
        && (!is_played || cuda::name(&cuda::open(0).unwrap()).unwrap().contains("played"));
    if !there {
        println!("skipped: no GPU");
    }
    there
}

/// `tinyllava check` on the GPU. What it says is shown where it fails.
fn check(environment: &[(&str, &str)], more: &[&str]) -> Output {
    let output = Command::new(env!("CARGO_BIN_EXE_tinyllava"))
        .args(["check", "--device", "cuda:0"])
        .args(more)
        .env("GPU_COUNTS", "1")
        .envs(environment.iter().copied())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
    output
}

/// How often each kernel was called.
fn calls(output: &Output, kernel: &str) -> u64 {
    let lines = String::from_utf8_lossy(&output.stderr).into_owned();
    let count =
        |line: &str| line.strip_prefix("gpu: ")?.strip_suffix(kernel)?.strip_suffix(" x ")?.parse().ok();
    lines.lines().find_map(count).unwrap_or(0)
}

fn answer(server: &Server, request: &Value) -> Value {
    let reply = server.post("of-a-test", &request.to_string()).wait_with_output().unwrap();
    serde_json::from_slice(&reply.stdout).unwrap()
}

fn text(reply: &Value) -> (String, String) {
    let message = &reply["choices"][0]["message"];
    let part = |name: &str| message[name].as_str().unwrap_or_default().to_owned();
    assert!(!part("reasoning_content").is_empty(), "{reply}");
    (part("reasoning_content"), part("content"))
}

fn question(clip: &str, more: Value) -> Value {
    let mut request = demo(&format!("{clip}.mp4"), "What happens in the video?", more);
    (request["model"], request["max_tokens"]) = (json!("nano"), json!(40));
    request
}

#[test]
fn recorded_models_agree_on_a_gpu_in_every_type() {
    if is_there(false) {
        for (name, types) in [("tiny", "f32,bf16,f16"), ("tiny_bf16_sharded", "bf16")] {
            let model = format!("tests/golden/{name}");
            check(&[], &["--types", types, "--model", &model, "--golden", &format!("{model}/{GOLDEN}")]);
        }
    }
}

#[test]
fn quantised_models_agree_on_a_gpu() {
    if is_there(false) {
        // Its widest rows are as long as the blocks that four bits are kept in.
        check(&[], &["--types", "bf16", "--quant", "q4", "--model", "nano"]);
        for quant in ["q8", "q4"] {
            let model = "tests/golden/tiny";
            check(
                &[],
                &[
                    "--types",
                    "f16",
                    "--quant",
                    quant,
                    "--model",
                    model,
                    "--golden",
                    &format!("{model}/{GOLDEN}"),
                ],
            );
        }
    }
}

#[test]
fn all_widths_of_heads_and_sizes_of_groups_agree_on_a_gpu() {
    if !is_there(false) {
        return;
    }
    let gpu = cuda::open(0).unwrap();
    for (width, heads, kv_heads) in [(32, 8, 1), (64, 7, 1), (80, 4, 2), (128, 3, 3), (128, 8, 1)] {
        let mut config = ModelConfig::tiny_test();
        (config.text.num_attention_heads, config.text.num_key_value_heads) = (heads, kv_heads);
        (config.text.hidden_size, config.text.intermediate_size) = (width * heads, 96);
        config.connector.hidden_size = config.text.hidden_size;
        let weights = Weights::synthetic(&config, 5);
        let mut cpu = TinyLlava::load(&weights, &config, WeightFormat::Float(StoredDType::F32)).unwrap();
        // Contexts of several parts.
        let case = Case::made_up(&cpu, 200, 4);
        let expected = trial::run(&mut cpu, &case).unwrap().whole.concat();
        for (dtype, tolerance) in [(DType::F16, 0.01), (DType::BF16, 0.06)] {
            let mut model = DeviceModel::load(&weights, &config, (&gpu, dtype), None).unwrap();
            let got = trial::run(&mut model, &case).unwrap();
            for logits in [got.whole, got.chunked, got.beside_others, got.after_a_hit] {
                let error = relative_error(&logits.concat(), &expected);
                assert!(error < tolerance, "heads of {width}, {heads} and {kv_heads}, {dtype:?}: {error}");
            }
        }
    }
}

#[test]
fn nano_agrees_by_our_own_kernels_recorded_and_started_one_by_one() {
    if is_there(true) {
        let nano = ["--model", "nano", "--types", "bf16,f16"];
        let by_graph = check(&[], &nano);
        let one_by_one = check(&[("TINYLLAVA_CUDA_GRAPHS", "0")], &nano);
        for kernel in ["attend_{}_32", "attend_fresh_{}_32", "normed_gated_product_{}", "rope_and_cache_{}"] {
            for output in [&by_graph, &one_by_one] {
                for kind in ["bf16", "f16"] {
                    assert_ne!(calls(output, &kernel.replace("{}", kind)), 0, "{kernel} {kind}");
                }
            }
        }
        // Of a recording each kernel is called once, however often it is started.
        let layers = |output| calls(output, "attend_fresh_bf16_32");
        assert!(layers(&by_graph) < layers(&one_by_one));
        // What follows the tower's products is done with them.
        let apart = check(&[("TINYLLAVA_CUDA_EPILOGUES", "0")], &["--model", "nano", "--types", "bf16"]);
        let finishing = |output| calls(output, "finish_rows_bf16_wide");
        assert!(finishing(&by_graph) < finishing(&apart));
    }
}

#[test]
fn where_steps_cannot_be_recorded_their_kernels_are_started_one_by_one() {
    if is_there(true) {
        let one_by_one = check(&[("TINYLLAVA_CUDA_GRAPHS", "0")], &["--model", "nano", "--types", "bf16"]);
        let refused = check(&[("GPU_CANNOT_RECORD", "1")], &["--model", "nano", "--types", "bf16"]);
        let calls = |kernel| (calls(&one_by_one, kernel), calls(&refused, kernel));
        let (attend, attend_refused) = calls("attend_fresh_bf16_32");
        assert_eq!(attend_refused, attend);
        // The first kernel of a step is called once more, for the recording, and that is where it ends.
        let (look_up, look_up_refused) = calls("look_up");
        assert_eq!(look_up_refused, look_up + 1);
    }
}

#[test]
fn a_card_before_ampere_computes_by_other_operations() {
    if is_there(true) {
        let output = check(&[("GPU_CAPABILITY", "75")], &["--model", "nano", "--types", "f16"]);
        assert_eq!((calls(&output, "attend_f16_32"), calls(&output, "attend_fresh_f16_32")), (0, 0));
        assert_ne!(calls(&output, "softmax_f32"), 0);
    }
}

#[test]
fn a_server_on_a_gpu_says_what_one_on_the_processor_says() {
    if !is_there(false) {
        return;
    }
    let on_cpu = Server::start(&["--device", "cpu", "--quant", "none"]);
    let on_gpu = Server::start(&["--device", "cuda:0"]);
    let greedy = |clip: &str| question(clip, json!({"temperature": 0}));
    let expected: Vec<_> =
        ["direction", "count", "shape"].map(|clip| text(&answer(&on_cpu, &greedy(clip)))).into();
    for (clip, expected) in ["direction", "count", "shape"].iter().zip(&expected) {
        assert_eq!(text(&answer(&on_gpu, &greedy(clip))), *expected);
    }
    // More at once than the kernels for few sequences take. What is summed in another order may be said otherwise.
    let many: Vec<_> = (0..12)
        .map(|i| on_gpu.post("one-of-many", &greedy(["direction", "count", "shape"][i % 3]).to_string()))
        .collect();
    let replies = many
        .into_iter()
        .map(|reply| text(&serde_json::from_slice(&reply.wait_with_output().unwrap().stdout).unwrap()));
    let num_equal = replies.enumerate().filter(|(i, reply)| *reply == expected[i % 3]).count();
    assert!(num_equal >= 9, "{num_equal} of 12");
    on_gpu.stop();
}

#[test]
fn what_a_gpu_finds_of_the_logits_is_what_all_of_them_would_give() {
    if !is_there(false) {
        return;
    }
    let server = Server::start_in(&[("GPU_COUNTS", "1")], &["--device", "cuda:0"]);
    for (seed, more) in [
        json!({}),
        json!({"top_k": 5}),
        json!({"top_p": 0.8}),
        json!({"min_p": 0.1}),
        json!({"top_p": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.5}),
        json!({"temperature": 0, "frequency_penalty": 0.5}),
        json!({"top_k": 20, "logit_bias": {"20": 3.0}}),
    ]
    .into_iter()
    .enumerate()
    {
        let mut request = question("order", json!({"temperature": 1.4, "seed": seed}));
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let few = text(&answer(&server, &request));
        // Log probabilities need whole rows.
        request["logprobs"] = json!(true);
        assert_eq!(few, text(&answer(&server, &request)), "{more}");
    }
    for (seed, more) in [
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "of-a-test", "schema": {
            "type": "object", "properties": {"sure": {"type": "boolean"}, "letter": {"enum": ["A", "B", "C"]}},
            "required": ["letter", "sure"], "additionalProperties": false}}}}),
        json!({"guided_choice": ["left", "right", "none of them"], "repetition_penalty": 1.2}),
        json!({"guided_regex": "[a-z]{3} [0-9]{2}", "temperature": 0}),
    ]
    .into_iter()
    .enumerate()
    {
        let mut request = question("order", json!({"temperature": 0.9, "seed": seed, "max_tokens": 60}));
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let masked = text(&answer(&server, &request));
        request["logprobs"] = json!(true);
        assert_eq!(masked, text(&answer(&server, &request)), "{more}");
    }
    let log = server.stop();
    for kernel in ["draw_f32", "largest_f32", "adjust_f32", "forbid_f32"] {
        assert!(
            !is_there(true) || log.iter().any(|line| line.ends_with(&format!(" x {kernel}"))),
            "{kernel}"
        );
    }
}

#[test]
fn the_next_step_is_started_before_the_tokens_of_this_one_are_waited_for() {
    if !is_there(true) {
        return;
    }
    let server = Server::start_in(&[("GPU_TRACE", "1")], &["--device", "cuda:0"]);
    for temperature in [0.0, 0.7] {
        text(&answer(&server, &question("direction", json!({"temperature": temperature}))));
    }
    let log = server.stop();
    let calls = ["cuGraphLaunch", "cuEventSynchronize", "largest_f32"];
    let letter = |line: &String| {
        let call = line.strip_prefix("gpu: ")?.split(' ').next()?;
        calls.iter().position(|one| *one == call).map(|place| ["G", "W", "L"][place])
    };
    let order: String = log.iter().filter_map(letter).collect();
    // Chosen, the next one started, waited for, again and again.
    assert!(order.matches("LGWLGW").count() > 20, "{order}");
}

#[test]
fn two_gpus_answer_behind_one_server() {
    if !is_there(true) {
        return;
    }
    let server = Server::start_in(&[("GPU_COUNT", "2")], &["--devices", "cuda:0,cuda:1"]);
    let requests = ["direction", "count"].map(|clip| question(clip, json!({"temperature": 0})));
    let first = requests.each_ref().map(|request| text(&answer(&server, request)));
    assert_eq!(requests.each_ref().map(|request| text(&answer(&server, request))), first);
    server.stop();
}

#[test]
fn a_lost_gpu_fails_what_runs_and_ends_the_server() {
    if !is_there(true) {
        return;
    }
    let mut server = Server::start_in(&[("GPU_FAILS_AFTER", "400")], &["--device", "cuda:0"]);
    let reply = answer(&server, &question("direction", json!({"temperature": 0})));
    assert_eq!(reply["error"]["code"], "internal_error");
    server.until_logged("the device has failed; the engine stops");
    assert_eq!(server.process.wait().unwrap().code(), Some(1));
}

#[test]
fn a_gpu_that_is_too_small_is_said_at_the_start() {
    if !is_there(true) {
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_tinyllava"))
        .args(["serve", "--port", "0", "--device", "cuda:0"])
        .env("GPU_MIB", "3")
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("the GPU has no memory left: --quant q8"), "{said}");
}
