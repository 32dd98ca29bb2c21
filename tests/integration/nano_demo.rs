//! The embedded model on its demo clips: real mp4 files through the running server to right answers.

use std::process::Command;

use serde_json::Value;

use crate::server_process::Server;

/// Clip, question and right answer.
fn questions() -> Vec<(String, String, String)> {
    let text = std::fs::read_to_string("models/nano/demo/questions.json").unwrap();
    let entries: Vec<Value> = serde_json::from_str(&text).unwrap();
    let field = |entry: &Value, name: &str| entry[name].as_str().unwrap().to_string();
    let entry = |entry: &Value| {
        let clip = format!("models/nano/demo/{}", field(entry, "video"));
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
fn demo_clips_are_answered_right_alone_together_again_and_in_every_dtype() {
    let questions = questions();
    assert!(questions.len() >= 4);
    let mut first: Vec<Value> = vec![];
    for dtype in ["auto", "f32", "bf16"] {
        let server = Server::start(&["--dtype", dtype]);
        for (clip, question, answer) in &questions {
            let reply = ask(&server, clip, question);
            assert_eq!(reply["answer"], *answer, "{dtype}, {clip}: {reply}");
            assert!(!reply["reasoning"].as_str().unwrap().is_empty(), "{reply}");
            first.push(reply);
        }
        // All at once, twice: batched, encoded once, prompts from the prefix cache.
        let again: Vec<Value> = std::thread::scope(|scope| {
            let asked = questions.iter().chain(&questions);
            let asked: Vec<_> =
                asked.map(|(clip, question, _)| scope.spawn(|| ask(&server, clip, question))).collect();
            asked.into_iter().map(|reply| reply.join().unwrap()).collect()
        });
        let alone = &first[first.len() - questions.len()..];
        for (reply, alone) in again.iter().zip(alone.iter().chain(alone)) {
            assert_eq!((&reply["reasoning"], &reply["answer"]), (&alone["reasoning"], &alone["answer"]));
        }
    }
}
