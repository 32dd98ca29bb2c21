//! The binary itself: what its commands print, write and exit with.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Output},
};

use candle_core::{DType, Device, Tensor};

use crate::server_process::Server;

fn tinyllava(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tinyllava")).args(arguments).output().unwrap()
}

fn golden_field(name: &str) -> String {
    let golden = std::fs::read_to_string("tests/golden/tiny/golden.json").unwrap();
    serde_json::from_str::<serde_json::Value>(&golden).unwrap()[name].as_str().unwrap().to_string()
}

/// A short clip of a red square, encoded for real.
fn clip(dir: &Path) -> String {
    let file = dir.join("red.mp4").to_str().unwrap().to_string();
    let square = "color=white:s=160x120:r=12:d=2[b];color=red:s=40x40:r=12:d=2[s];[b][s]overlay=60:40";
    let made = Command::new("ffmpeg")
        .args(["-loglevel", "error", "-y", "-filter_complex", square, "-pix_fmt", "yuv420p", &file])
        .status()
        .unwrap();
    assert!(made.success());
    file
}

#[test]
fn trace_writes_what_the_original_computed() {
    let dir = tempfile::tempdir().unwrap();
    for (name, prompt) in [("tiny", golden_field("query")), ("tiny_bf16_sharded", golden_field("prompt"))] {
        let out = dir.path().join(format!("{name}.safetensors"));
        let checkpoint = format!("tests/golden/{name}");
        let frames = format!("{checkpoint}/golden.safetensors");
        let arguments = [
            "trace",
            "--model",
            &checkpoint,
            "--frames",
            &frames,
            "--prompt",
            &prompt,
            "--out",
            out.to_str().unwrap(),
        ];
        let run = tinyllava(&arguments);
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let traced = candle_core::safetensors::load(&out, &Device::Cpu).unwrap();
        let golden = candle_core::safetensors::load(&frames, &Device::Cpu).unwrap();
        assert_eq!(traced.len(), 10);
        for (tensor, tolerance) in [
            ("frames_u8", 0.0),
            ("resized_u8", 0.0),
            ("pixel_values", 0.0),
            ("vision_features", 2e-5),
            ("connector_no_pos", 2e-5),
            ("connector_out", 2e-5),
            ("input_ids", 0.0),
            ("inputs_embeds", 2e-5),
            ("logits_last", 1e-4),
            ("greedy_ids", 0.0),
        ] {
            assert_eq!(traced[tensor].dims(), golden[tensor].dims(), "{tensor}");
            let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
            let difference = (flat(&traced[tensor]) - flat(&golden[tensor])).unwrap().abs().unwrap();
            let largest = difference.max(0).unwrap().to_scalar::<f64>().unwrap();
            assert!(largest <= tolerance, "{name}: {tensor} differs by {largest:e}");
        }
    }
}

#[test]
fn trace_of_a_video_holds_its_frames() {
    let dir = tempfile::tempdir().unwrap();
    let (video, out) = (clip(dir.path()), dir.path().join("t.safetensors"));
    let out = out.to_str().unwrap();
    let run =
        tinyllava(&["trace", "--video", &video, "--prompt", "What?", "--max-tokens", "2", "--out", out]);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let traced = candle_core::safetensors::load(out, &Device::Cpu).unwrap();
    assert_eq!(traced["frames_u8"].dims(), [16, 120, 160, 3]);
    assert_eq!(traced["resized_u8"].dims(), [16, 64, 64, 3]);
    assert_eq!(traced["greedy_ids"].dims(), [2]);
}

#[test]
fn ask_answers_in_process_about_a_real_video() {
    let dir = tempfile::tempdir().unwrap();
    let video = clip(dir.path());
    let run = tinyllava(&["ask", &video, "What colour is the shape?\nA. green\nB. blue\nC. red", "--json"]);
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let reply: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(reply["answer"], "C", "{reply}");
    assert!(!reply["reasoning"].as_str().unwrap().is_empty());
    assert_eq!(reply["video"]["source_frames"], 24);
}

#[test]
fn every_failure_is_one_sentence_and_a_non_zero_exit() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("notes.mp4");
    std::fs::write(&text, "no video at all").unwrap();
    let (text, empty) = (text.to_str().unwrap(), dir.path().to_str().unwrap());
    for (arguments, said) in [
        (vec!["ask", "no-such.mp4", "What?"], "cannot open the video no-such.mp4"),
        (vec!["ask", text, "What?"], "not a video file"),
        (vec!["ask", text, "What?", "--server", "http://127.0.0.1:1"], "127.0.0.1:1"),
        (vec!["serve", "--model", empty, "--port", "0"], "config.json"),
        (vec!["serve", "--devices", "cuda:0,cpu,cuda:0"], "names cuda:0 twice"),
        (vec!["serve", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1:8000"),
        (vec!["trace", "--frames", text, "--prompt", "What?", "--out", "x"], "cannot read"),
        (vec!["synth", "--preset", "nano", "--out", "tests"], "tests"),
        (vec!["quantize", "--model", "nano", "--out", "tests"], "tests is not empty"),
    ] {
        let run = tinyllava(&arguments);
        let stderr = String::from_utf8_lossy(&run.stderr);
        let sentences: Vec<&str> = stderr.lines().filter(|line| line.starts_with("tinyllava: ")).collect();
        assert!(!run.status.success(), "{arguments:?}");
        assert!(sentences.len() == 1 && sentences[0].contains(said), "{arguments:?}: {stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

#[test]
fn a_quantised_checkpoint_answers_as_the_original_and_takes_no_other_format() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("nano-q8");
    let out = out.to_str().unwrap();
    let made = tinyllava(&["quantize", "--model", "nano", "--out", out]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let ask = |model: &str| {
        let run = tinyllava(&["ask", "models/nano/demo/direction.mp4", "What moves?", "--model", model]);
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let said = String::from_utf8(run.stdout).unwrap();
        // Times follow.
        said.split(" · ").next().unwrap().to_owned()
    };
    assert_eq!(ask(out), ask("nano"));
    for wrong in [["--quant", "none"], ["--quant", "q4"], ["--dtype", "f32"]] {
        for command in ["serve", "doctor"] {
            let run = tinyllava(&[&[command, "--port", "0", "--model", out], &wrong[..]].concat());
            let said = String::from_utf8_lossy(if command == "serve" { &run.stderr } else { &run.stdout });
            assert!(!run.status.success() && said.contains("quantised to q8 already"), "{wrong:?}: {said}");
        }
    }
    let doctor = tinyllava(&["doctor", "--port", "0", "--model", out]);
    let said = String::from_utf8_lossy(&doctor.stdout);
    assert!(doctor.status.success() && said.contains("million parameters in q8"), "{said}");
}

#[test]
fn sigterm_lets_running_replies_end_and_exits_zero() {
    let mut server = Server::start(&[]);
    let request = r#"{"model":"nano","stream":true,"ignore_eos":true,"max_tokens":400,
        "messages":[{"role":"user","content":"Hello?"}]}"#;
    let mut client = server.post("id-1", request);
    let mut reply = BufReader::new(client.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(reply.next().unwrap().starts_with("data: "), "the stream has begun");
    server.terminate();
    let rest: Vec<String> = reply.filter(|line| !line.is_empty()).collect();
    assert_eq!(rest.last().map(String::as_str), Some("data: [DONE]"));
    assert!(rest.iter().any(|line| line.contains(r#""finish_reason":"length""#)));
    assert!(client.wait().unwrap().success());
    assert!(server.process.wait().unwrap().success());
}

#[test]
fn a_finished_request_is_one_log_line_with_its_id_and_without_its_words() {
    let server = Server::start(&["--log-format", "json"]);
    for (id, more) in [("id-1", ""), ("id-2", r#","temperature":9"#)] {
        let question = r#"[{"role":"user","content":"a secret question"}]"#;
        let request =
            format!(r#"{{"model":"nano","max_tokens":3,"ignore_eos":true,"messages":{question}{more}}}"#);
        assert!(server.post(id, &request).wait_with_output().unwrap().status.success());
    }
    let log = server.stop();
    assert!(!log.iter().any(|line| line.contains("secret")), "{log:?}");
    let lines = log.iter().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let finished: Vec<_> = lines.filter(|line| line["message"] == "finished").collect();
    let [good, bad] = &finished[..] else { panic!("{finished:?}") };
    assert_eq!(
        (&good["span"]["id"], &good["status"], &good["outcome"]),
        (&"id-1".into(), &200.into(), &"completed".into())
    );
    assert_eq!((&good["completion_tokens"], &good["detail"]), (&3.into(), &"length".into()));
    assert!(good["first_token_seconds"].is_number() && good["queue_seconds"].is_number());
    assert_eq!(
        (&bad["span"]["id"], &bad["status"], &bad["outcome"]),
        (&"id-2".into(), &400.into(), &"refused".into())
    );
}

#[test]
fn sigterm_while_the_model_loads_ends_the_process() {
    let mut server = Command::new(env!("CARGO_BIN_EXE_tinyllava"))
        .args(["serve", "--model", "synth:mid", "--port", "0"])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(server.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(log.any(|line| line.contains("loading the model")));
    assert!(Command::new("kill").args(["-TERM", &server.id().to_string()]).status().unwrap().success());
    let rest: Vec<String> = log.collect();
    assert!(server.wait().unwrap().success());
    assert!(!rest.iter().any(|line| line.contains("model loaded")), "it waited for the model: {rest:?}");
}
