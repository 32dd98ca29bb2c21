//! The log of the binary: one line a request, with the times of its stages, and nothing that users said or showed.

use std::time::Duration;

use serde_json::{Value, json};

use crate::{
    http_setup::{VideoHost, clip_bytes, form},
    server_process::Server,
};

/// What a log must never have, unless asked.
const SECRETS: [&str; 5] =
    ["secret-question", "secret-answer", "secret-key", "secret-password", "AAAAIGZ0eXA"];

/// A question about `url` whose answer is known.
fn question(url: &str) -> String {
    json!({
        "model": "nano", "reasoning_effort": "none", "structured_outputs": {"choice": ["secret-answer"]},
        "messages": [{"role": "user", "content": [
            {"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "secret-question?"}
        ]}]
    })
    .to_string()
}

/// Asks in every way that touches a video, and gives all the server logged.
async fn log_of(
    environment: &'static [(&'static str, &'static str)],
    more: &'static [&'static str],
) -> Vec<String> {
    let host = VideoHost::start(clip_bytes(), Some(Duration::ZERO)).await;
    let address = host.url.strip_prefix("http://").unwrap().to_owned();
    let asked = tokio::task::spawn_blocking(move || {
        let mut arguments = vec!["--log-format", "json", "--allow-private-addresses"];
        arguments.extend(more);
        let server = Server::start_in(environment, &arguments);
        let ask = |id: &str, url: String| {
            let reply = server.post(id, &question(&url)).wait_with_output().unwrap();
            String::from_utf8(reply.stdout).unwrap()
        };
        assert!(ask("good", format!("http://{address}?sig=secret-key")).contains("secret-answer"));
        assert!(
            ask("gone", "http://127.0.0.1:1/clip.mp4?sig=secret-key".into()).contains("video_fetch_failed")
        );
        assert!(ask("named", format!("http://ann:secret-password@{address}")).contains("video_refused"));
        // The beginning of a real file, in base64.
        assert!(ask("data", "data:video/mp4;base64,AAAAIGZ0eXBpc29t".into()).contains("error"));
        let mut log = server.before.clone();
        log.extend(server.stop());
        log
    });
    asked.await.unwrap()
}

fn finished(log: &[String]) -> Vec<Value> {
    let lines =
        log.iter().map(|line| serde_json::from_str::<Value>(line).unwrap_or_else(|_| panic!("{line}")));
    lines.filter(|line| line["message"] == "finished").collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_one_line_with_the_times_of_its_stages() {
    let log = log_of(&[], &[]).await;
    for line in &log {
        assert!(!SECRETS.iter().any(|secret| line.contains(secret)), "{line}");
    }
    let lines = finished(&log);
    let ids: Vec<_> = lines.iter().map(|line| line["span"]["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["good", "gone", "named", "data"]);
    let good = &lines[0];
    for stage in [
        "fetch",
        "decode_wait",
        "probe",
        "decode",
        "resize",
        "prompt",
        "queue",
        "encode",
        "prefill",
        "generate",
        "first_token",
        "first_answer_token",
    ] {
        assert!(
            good[format!("{stage}_seconds")].as_f64().is_some_and(|seconds| seconds >= 0.0),
            "{stage}: {good}"
        );
    }
    assert!(good["seconds"].as_f64() >= good["first_token_seconds"].as_f64());
    let facts = [&good["outcome"], &good["detail"], &good["stream"], &good["choices"], &good["num_frames"]];
    assert_eq!(facts, [&json!("completed"), &json!("stop"), &json!(false), &json!(1), &json!(16)]);
    assert!(good["video_tokens"].as_u64() < good["prompt_tokens"].as_u64());
    let gone = &lines[1];
    assert_eq!((&gone["status"], &gone["detail"]), (&json!(422), &json!("video_fetch_failed")));
    assert!(gone["fetch_seconds"].is_number() && gone.get("decode_seconds").is_none(), "{gone}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn not_even_the_most_talkative_log_tells_what_was_said() {
    for line in log_of(&[("RUST_LOG", "trace")], &[]).await {
        assert!(!SECRETS.iter().any(|secret| line.contains(secret)), "{line}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prompts_and_replies_are_logged_when_the_operator_asks_and_is_warned() {
    let log = log_of(&[], &["--log-content"]).await;
    let warned = log.iter().filter(|line| line.contains("WARN") && line.contains("--log-content")).count();
    assert_eq!(warned, 1, "{log:?}");
    let lines = finished(&log);
    assert_eq!(lines.len(), 4);
    let good = &lines[0];
    let prompt = good["prompt"].as_str().unwrap();
    assert!(prompt.starts_with("A chat between") && prompt.contains("secret-question?"), "{prompt}");
    assert_eq!(good["replies"], "[\"secret-answer\"]");
    assert!(!log.iter().any(|line| line.contains("secret-key") || line.contains("secret-password")));
}

#[tokio::test]
async fn an_upload_is_logged_without_its_name() {
    let body = form(&json!({}), clip_bytes());
    let server = tokio::task::spawn_blocking(|| Server::start(&[])).await.unwrap();
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let response =
        client.post(format!("{}/v1/chat/completions", server.url)).multipart(body).send().await.unwrap();
    assert_eq!(response.status(), 400);
    let log = tokio::task::spawn_blocking(move || server.stop()).await.unwrap();
    assert_eq!(log.iter().filter(|line| line.contains("finished")).count(), 1, "{log:?}");
    assert!(!log.iter().any(|line| line.contains("clip.mp4")), "{log:?}");
}
