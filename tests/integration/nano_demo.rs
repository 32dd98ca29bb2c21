//! The embedded model on its clips: real mp4 files through the running server to right answers.

use std::process::Command;

use serde_json::Value;

use crate::server_process::Server;

/// Clip, question and right answer.
fn questions(folder: &str) -> Vec<(String, String, String)> {
    let text = std::fs::read_to_string(format!("models/nano/{folder}/questions.json")).unwrap();
    let entries: Vec<Value> = serde_json::from_str(&text).unwrap();
    let field = |entry: &Value, name: &str| entry[name].as_str().unwrap().to_string();
    let entry = |entry: &Value| {
        let clip = format!("models/nano/{folder}/{}", field(entry, "video"));
        (clip, field(entry, "question"), field(entry, "answer"))
    };
    entries.iter().map(entry).collect()
}

fn ask(server: &Server, clip: &str, question: &str) -> Value {
    let run = Command::new(env!("CARGO_BIN_EXE_tinyllava"))
        .args(["ask", clip, question, "--server", &server.url, "--json", "--temperature", "0"])
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    serde_json::from_slice(&run.stdout).unwrap()
}

#[test]
fn demo_and_sample_clips_are_answered_right_alone_together_again_and_in_every_format() {
    let (demo, sample) = (questions("demo"), questions("sample"));
    assert!(demo.len() >= 4 && sample.len() == 30);
    let questions = [demo, sample].concat();
    for format in [["--quant", "auto"], ["--quant", "none"], ["--dtype", "f32"], ["--dtype", "bf16"]] {
        let server = Server::start(&format);
        let mut alone = vec![];
        for (clip, question, answer) in &questions {
            let reply = ask(&server, clip, question);
            assert_eq!(reply["answer"], *answer, "{format:?}, {clip}: {reply}");
            assert!(!reply["reasoning"].as_str().unwrap().is_empty(), "{reply}");
            alone.push(reply);
        }
        // Many at once, and none for the first time: batched, and prompts from the prefix cache.
        for (asked, alone) in questions.chunks(8).zip(alone.chunks(8)) {
            let again: Vec<Value> = std::thread::scope(|scope| {
                let asked =
                    asked.iter().map(|(clip, question, _)| scope.spawn(|| ask(&server, clip, question)));
                let asked: Vec<_> = asked.collect();
                asked.into_iter().map(|reply| reply.join().unwrap()).collect()
            });
            for (reply, alone) in again.iter().zip(alone) {
                assert_eq!((&reply["reasoning"], &reply["answer"]), (&alone["reasoning"], &alone["answer"]));
            }
        }
    }
}
