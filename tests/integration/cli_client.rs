//! `ask` and `bench` against small servers of every temper, over real sockets.

#![allow(clippy::unwrap_used)]

use std::{
    io::Write,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::Multipart,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use clap::Parser;
use serde_json::{Value, json};
use tinyllava::cli::{
    ask::{AskArgs, ask_into},
    bench::{BenchArgs, bench_into},
};
use url::Url;

#[derive(Parser)]
enum Cli {
    Ask(AskArgs),
    Bench(BenchArgs),
}

async fn serve(router: Router) -> Url {
    let models = || async { Json(json!({"object": "list", "data": [{"id": "tiny"}]})) };
    let router = router.route("/v1/models", get(models));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}").parse().unwrap()
}

/// A server whose every reply has this body, sent in chunks of `size` bytes. It reads the request first: one that
/// answers too early may be heard or not.
async fn scripted(script: &'static str, size: usize) -> Url {
    let reply = move |_: Bytes| async move {
        let chunks: Vec<_> =
            script.as_bytes().chunks(size).map(|chunk| Ok::<_, String>(Bytes::from(chunk))).collect();
        let body = Body::from_stream(tokio_stream::iter(chunks));
        ([("content-type", "text/event-stream")], body)
    };
    let steps = Arc::new(AtomicUsize::new(0));
    let metrics = move || async move {
        let count = steps.fetch_add(1, Ordering::Relaxed);
        format!(
            "tinyllava_stage_seconds_sum{{stage=\"decode_step\"}} {count}\ntinyllava_stage_seconds_count{{stage=\"decode_step\"}} {count}\n"
        )
    };
    serve(Router::new().route("/v1/chat/completions", post(reply)).route("/metrics", get(metrics))).await
}

const REPLY: &str = concat!(
    ": waiting\n\n",
    "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
    "data: {\"choices\":[{\"delta\":{\"reasoning_content\":\"He bends.\",\"reasoning\":\"He bends.\"}}]}\n\n",
    ": keep-alive\n\n",
    "data: {\"choices\":[{\"delta\":{\"content\":\"C. pick\"}}]}\n\n",
    "data: {\"choices\":[{\"delta\":{\"content\":\" up é\"}}]}\n\n",
    "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n",
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":7,\"total_tokens\":16,\
        \"completion_tokens_details\":{\"reasoning_tokens\":4}}}\n\n",
    "data: [DONE]\n\n",
);

fn clip() -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".mp4").tempfile().unwrap();
    file.write_all(b"\0\0\0\x08ftyp").unwrap();
    file
}

async fn run_ask(server: &Url, options: &[&str], color: bool) -> anyhow::Result<String> {
    let clip = clip();
    let path = clip.path().to_str().unwrap();
    let Cli::Ask(args) = Cli::parse_from(["cli", "ask", path, "What?"].iter().chain(options)) else {
        unreachable!()
    };
    let mut out = Vec::new();
    ask_into(server, &args, &mut out, color).await?;
    Ok(String::from_utf8(out).unwrap())
}

async fn run_bench(server: &Url, options: &[&str]) -> (String, anyhow::Result<()>) {
    let url = server.as_str();
    let Cli::Bench(args) = Cli::parse_from(["cli", "bench", "--url", url].iter().chain(options)) else {
        unreachable!()
    };
    let mut out = Vec::new();
    let result = bench_into(&args, &mut out).await;
    (String::from_utf8(out).unwrap(), result)
}

#[tokio::test]
async fn ask_prints_the_thinking_and_the_answer_however_they_arrive() {
    for size in [1, 7, 4096] {
        let server = scripted(REPLY, size).await;
        let out = run_ask(&server, &[], false).await.unwrap();
        assert!(out.starts_with("He bends.\n\nC. pick up é\n\n7 tokens, 4 of them thinking"), "{out}");
    }
    let out = run_ask(&scripted(REPLY, 64).await, &[], true).await.unwrap();
    assert!(
        out.starts_with("\x1b[0m\x1b[2mHe bends.\x1b[0m\x1b[1m\n\nC. pick up é\x1b[0m\n\n7 tokens"),
        "{out}"
    );
}

#[tokio::test]
async fn ask_prints_one_json_object() {
    let out = run_ask(&scripted(REPLY, 64).await, &["--json"], true).await.unwrap();
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&json["reasoning"], &json["answer"]), (&json!("He bends."), &json!("C. pick up é")));
    assert_eq!((&json["usage"]["completion_tokens"], &json["finish_reason"]), (&json!(7), &json!("stop")));
}

#[tokio::test]
async fn ask_sends_the_file_beside_the_request() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let notes = seen.clone();
    let reply = move |mut form: Multipart| async move {
        while let Some(field) = form.next_field().await.unwrap() {
            let name = field.name().unwrap().to_owned();
            let bytes = field.bytes().await.unwrap();
            notes.lock().unwrap().push((name, bytes));
        }
        REPLY
    };
    let server = serve(Router::new().route("/v1/chat/completions", post(reply))).await;
    run_ask(&server, &["--seed", "7"], false).await.unwrap();
    let seen = seen.lock().unwrap();
    assert_eq!((seen[0].0.as_str(), seen[1].0.as_str(), seen.len()), ("request", "video", 2));
    assert_eq!(&seen[1].1[..], b"\0\0\0\x08ftyp");
    let request: Value = serde_json::from_slice(&seen[0].1).unwrap();
    assert_eq!(
        (&request["model"], &request["seed"], &request["stream"]),
        (&json!("tiny"), &json!(7), &json!(true))
    );
}

#[tokio::test]
async fn every_failure_is_one_sentence() {
    let sentence = async |server: Url| run_ask(&server, &[], false).await.unwrap_err().to_string();
    let broken = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\ndata: {\"error\":{\"message\":\"no memory\"}}\n\n";
    assert_eq!(sentence(scripted(broken, 9).await).await, "the server broke off: no memory");
    let silent = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n";
    assert_eq!(sentence(scripted(silent, 9).await).await, "the connection ended before the reply did");
    let html = sentence(scripted("data: <html>\n\n", 9).await).await;
    assert!(html.starts_with("the server sent something that is no chat completion"), "{html}");
    let refuse = |_: Bytes| async { refusal() };
    let refusing = serve(Router::new().route("/v1/chat/completions", post(refuse))).await;
    let refused = sentence(refusing).await;
    assert_eq!(refused, "the server answered 429 Too Many Requests: the queue is full; try again in 1 s");
    let rude = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let rude_url = format!("http://{}", rude.local_addr().unwrap()).parse().unwrap();
    tokio::spawn(async move { while rude.accept().await.is_ok() {} });
    let hung_up = sentence(rude_url).await;
    assert!(hung_up.contains("hung up without an answer"), "{hung_up}");
    // No test can be given a port this low.
    let unreachable = sentence("http://127.0.0.1:1".parse().unwrap()).await;
    assert!(unreachable.starts_with("cannot reach http://127.0.0.1:1/: "), "{unreachable}");
    assert_eq!(unreachable.lines().count(), 1);
}

fn refusal() -> Response {
    let body = json!({"error": {"message": "the queue is full; try again in 1 s", "type": "overloaded"}});
    (StatusCode::TOO_MANY_REQUESTS, Json(body)).into_response()
}

#[tokio::test]
async fn a_missing_video_is_named_before_anything_is_sent() {
    let Cli::Ask(args) = Cli::parse_from(["cli", "ask", "no-such-clip.mp4", "What?"]) else { unreachable!() };
    let nowhere = "http://127.0.0.1:9".parse().unwrap();
    let error = ask_into(&nowhere, &args, &mut Vec::new(), false).await.unwrap_err().to_string();
    assert_eq!(error, "cannot open the video no-such-clip.mp4");
}

#[tokio::test]
async fn bench_prints_a_row_a_level_and_writes_the_numbers() {
    let server = scripted(REPLY, 64).await;
    let (clip, report) = (clip(), tempfile::NamedTempFile::new().unwrap());
    let paths = [&clip, &report].map(|file| file.path().to_str().unwrap().to_owned());
    let options = ["--concurrency", "1,4", "--num-requests", "6", "--video", &paths[0], "--distinct-videos"];
    let (table, result) = run_bench(&server, &[&options[..], &["--json", &paths[1]]].concat()).await;
    result.unwrap();
    let rows: Vec<Vec<&str>> = rows_of(&table);
    assert_eq!(rows.len(), 2);
    assert_eq!((&rows[0][..3], &rows[1][..3]), (&["1", "6", "0"][..], &["4", "6", "0"][..]));
    let json: Value = serde_json::from_slice(&std::fs::read(&paths[1]).unwrap()).unwrap();
    assert_eq!(json["levels"][1]["completion_tokens"], 42);
    assert_eq!(
        (&json["settings"]["model"], &json["settings"]["distinct_videos"]),
        (&json!("tiny"), &json!(true))
    );
}

/// Rows under the header, without the lines of details.
fn rows_of(table: &str) -> Vec<Vec<&str>> {
    let rows = table.lines().skip(2).filter(|line| line.matches('|').count() == 3);
    rows.map(|row| row.split_whitespace().collect()).collect()
}

#[tokio::test]
async fn bench_sends_at_a_rate_whatever_is_running_and_says_what_was_good_enough() {
    let server = scripted(REPLY, 64).await;
    let report = tempfile::NamedTempFile::new().unwrap();
    let options = ["--request-rate", "200", "--num-requests", "12", "--max-tokens", "3..40", "--warmup", "2"];
    let goodput = ["--goodput", "ttft:60s,e2e:60s", "--json", report.path().to_str().unwrap()];
    let (table, result) = run_bench(&server, &[&options[..], &goodput[..]].concat()).await;
    result.unwrap();
    assert_eq!(rows_of(&table)[0][..3], ["200/s", "12", "0"]);
    assert!(table.contains("goodput: 12 of 12 requests"), "{table}");
    let json: Value = serde_json::from_slice(&std::fs::read(report.path()).unwrap()).unwrap();
    let level = &json["levels"][0];
    assert_eq!((&level["request_rate"], &level["good"]), (&json!(200.0), &json!(12)));
    assert!(level["first_answer_token_s"]["median"].as_f64().unwrap() > 0.0, "{level}");
    // The server's own account of its work.
    assert!(level["server_stages"]["decode_step"]["count"] == 1.0, "{level}");
    assert_eq!(json["settings"]["max_tokens"], "3..40");
}

#[tokio::test]
async fn bench_counts_failures_and_fails() {
    let served = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let reply = move |_: Bytes| async move {
        // The warm-up and the first request succeed.
        if served.fetch_add(1, std::sync::atomic::Ordering::SeqCst) < 2 {
            REPLY.into_response()
        } else {
            refusal()
        }
    };
    let server = serve(Router::new().route("/v1/chat/completions", post(reply))).await;
    let (table, result) = run_bench(&server, &["--concurrency", "1", "--num-requests", "3"]).await;
    let row: Vec<&str> = table.lines().nth(2).unwrap().split_whitespace().collect();
    assert_eq!(&row[..3], ["1", "1", "2"]);
    let error = result.unwrap_err().to_string();
    assert!(error.starts_with("2 requests failed; the first: the server answered 429"), "{error}");
}

#[tokio::test]
async fn bench_stops_at_a_failing_warm_up() {
    let refuse = |_: Bytes| async { refusal() };
    let server = serve(Router::new().route("/v1/chat/completions", post(refuse))).await;
    let (table, result) = run_bench(&server, &[]).await;
    assert!(table.is_empty());
    assert!(
        format!("{:#}", result.unwrap_err()).starts_with("a warm-up request failed: the server answered 429")
    );
}
