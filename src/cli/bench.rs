//! `tinyllava bench`: closed-loop load against any OpenAI-compatible server.
//!
//! As many clients as the concurrency says, each sending its next request when the last one has ended. Times are taken
//! on the client's side, so they hold the network and the server's queue as well. It never changes the server.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use url::Url;
use uuid::Uuid;

use super::chat_client::{ChatClient, ChatError};
use report::Level;

pub mod engine;
mod report;

/// Largest video that is sent; it travels as base64 inside every request.
const MAX_VIDEO_BYTES: u64 = 64 << 20;

/// Requests a client of a level, when `--num-requests` is not given.
const DEFAULT_REQUESTS_PER_CLIENT: usize = 4;

/// Seed of the first request; the next ones count up, so that every run sends the same.
const FIRST_SEED: u64 = 1000;

/// What load to make.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchArgs {
    /// The server, with or without /v1.
    #[arg(long, value_name = "URL")]
    pub url: Url,
    /// Requests at the same time; several levels run one after the other.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,8,32", value_parser = at_least_one)]
    pub concurrency: Vec<usize>,
    /// Requests a level [default: 4 a client].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub num_requests: Option<usize>,
    /// A video that every request is about; without it the requests are text only.
    #[arg(long, value_name = "FILE")]
    pub video: Option<PathBuf>,
    /// Give every request a video of its own bytes (mp4 or mov), so that no cache helps the server.
    #[arg(long, requires = "video")]
    pub distinct_videos: bool,
    /// The question.
    #[arg(long, value_name = "TEXT", default_value = "What happens here? Tell it step by step.")]
    pub prompt: String,
    /// Longest reply, tokens.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one)]
    pub max_tokens: usize,
    /// Let every reply have its full length.
    #[arg(long)]
    pub ignore_eos: bool,
    /// 0 always takes the likeliest token [default: the server's own].
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// The model's name [default: the first that the server lists].
    #[arg(long = "model-name", value_name = "NAME")]
    pub model_name: Option<String>,
    /// Key of the server.
    #[arg(long, value_name = "KEY", env = "TINYLLAVA_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Longest time for one request, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout_s: u64,
    /// Write every number to this file as well.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.trim().parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

/// Runs every level and prints one row for each to standard output.
///
/// # Errors
/// When the server cannot be reached, or any request failed: the table is printed all the same.
pub async fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    bench_into(args, &mut std::io::stdout()).await
}

/// [`bench()`], printing to `out`.
pub async fn bench_into(args: &BenchArgs, out: &mut impl std::io::Write) -> anyhow::Result<()> {
    let client = ChatClient::new(&args.url, args.api_key.clone(), Duration::from_secs(args.timeout_s))?;
    let model = match &args.model_name {
        Some(name) => name.clone(),
        None => client.first_model().await?,
    };
    let requests = Arc::new(Requests::new(args, model)?);
    run_one(&client, &requests, 0).await.context("the warm-up request failed")?;
    writeln!(out, "{}", report::HEADER)?;
    let mut levels = Vec::new();
    for &concurrency in &args.concurrency {
        let num_requests = args.num_requests.unwrap_or(DEFAULT_REQUESTS_PER_CLIENT * concurrency);
        let level = run_level(&client, &requests, concurrency, num_requests).await?;
        writeln!(out, "{}", level.row())?;
        out.flush()?;
        levels.push(level);
    }
    if let Some(path) = &args.json {
        let results: Vec<Value> = levels.iter().map(Level::to_json).collect();
        let report = json!({"settings": settings(args, &requests.model), "levels": results});
        std::fs::write(path, format!("{report:#}\n"))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let failures: Vec<&String> = levels.iter().flat_map(|level| &level.failures).collect();
    if let Some(first) = failures.first() {
        bail!("{} requests failed; the first: {first}", failures.len());
    }
    Ok(())
}

fn settings(args: &BenchArgs, model: &str) -> Value {
    json!({
        "model": model,
        "video": args.video.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy()),
        "distinct_videos": args.distinct_videos,
        "prompt": args.prompt,
        "max_tokens": args.max_tokens,
        "ignore_eos": args.ignore_eos,
        "temperature": args.temperature,
        "first_seed": FIRST_SEED,
    })
}

async fn run_level(
    client: &ChatClient,
    requests: &Arc<Requests>,
    concurrency: usize,
    num_requests: usize,
) -> anyhow::Result<Level> {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} requests ({elapsed})");
    let style = style.expect("the bar's template is valid: this is a bug");
    let bar = ProgressBar::new(num_requests as u64).with_style(style);
    let next = Arc::new(AtomicUsize::new(0));
    let started = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..concurrency.min(num_requests) {
        let (client, requests, next, bar) = (client.clone(), requests.clone(), next.clone(), bar.clone());
        clients.spawn(async move {
            let mut results = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= num_requests {
                    return results;
                }
                results.push(run_one(&client, &requests, index).await);
                bar.inc(1);
            }
        });
    }
    let mut results = Vec::new();
    while let Some(finished) = clients.join_next().await {
        results.extend(finished.context("a client of the benchmark died: this is a bug")?);
    }
    bar.finish_and_clear();
    Ok(Level::new(concurrency, started.elapsed(), results))
}

/// Times of one successful request.
#[derive(Debug, Clone, Default, PartialEq)]
struct Timing {
    first_token: Duration,
    /// Between one piece of text and the next.
    gaps: Vec<Duration>,
    total: Duration,
    prompt_tokens: usize,
    completion_tokens: usize,
}

async fn run_one(client: &ChatClient, requests: &Arc<Requests>, index: usize) -> Result<Timing, ChatError> {
    let requests = requests.clone();
    // A video is encoded as base64: not on the threads that take the times of other requests.
    let body = tokio::task::spawn_blocking(move || requests.body(index));
    let body = body.await.expect("making a body does not panic: this is a bug");
    let started = Instant::now();
    let mut stream = client.post_json(body).await?;
    let (mut timing, mut pieces) = (Timing::default(), 0);
    let mut last = Duration::ZERO;
    while let Some(chunk) = stream.next().await? {
        let now = started.elapsed();
        if chunk.has_text() {
            match pieces {
                0 => timing.first_token = now,
                _ => timing.gaps.push(now - last),
            }
            pieces += 1;
            last = now;
        }
        if let Some(usage) = chunk.usage {
            timing.prompt_tokens = usage.prompt_tokens;
            timing.completion_tokens = usage.completion_tokens;
        }
    }
    timing.total = started.elapsed();
    if pieces == 0 {
        timing.first_token = timing.total;
    }
    // A server that counts no tokens sends about one a chunk.
    if timing.completion_tokens == 0 {
        timing.completion_tokens = pieces;
    }
    Ok(timing)
}

/// Makes the bodies of the requests: the same ones in every run, but for videos that are to be distinct.
#[derive(Debug)]
struct Requests {
    args: BenchArgs,
    model: String,
    video: Option<Vec<u8>>,
    mime: &'static str,
}

impl Requests {
    fn new(args: &BenchArgs, model: String) -> anyhow::Result<Self> {
        let video = args.video.as_deref().map(|path| read_video(path, args.distinct_videos)).transpose()?;
        let extension = args.video.as_deref().and_then(Path::extension).unwrap_or_default();
        let mime = match extension.to_ascii_lowercase().to_str() {
            Some("webm") => "video/webm",
            Some("mkv") => "video/x-matroska",
            Some("mov") => "video/quicktime",
            Some("avi") => "video/x-msvideo",
            Some("gif") => "image/gif",
            Some("ts") => "video/mp2t",
            _ => "video/mp4",
        };
        Ok(Requests { args: args.clone(), model, video, mime })
    }

    fn body(&self, index: usize) -> Vec<u8> {
        let mut content = vec![json!({"type": "text", "text": self.args.prompt})];
        if let Some(video) = &self.video {
            let mut video = video.clone();
            if self.args.distinct_videos {
                // A box to be skipped, at the end: the same pictures in bytes that no server has seen before.
                video.extend([&[0, 0, 0, 24], &b"free"[..], Uuid::new_v4().as_bytes()].concat());
            }
            let url = format!("data:{};base64,{}", self.mime, STANDARD.encode(video));
            content.insert(0, json!({"type": "video_url", "video_url": {"url": url}}));
        }
        let mut request = json!({
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.args.max_tokens,
            "seed": FIRST_SEED + index as u64,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        if self.args.ignore_eos {
            request["ignore_eos"] = json!(true);
        }
        if let Some(temperature) = self.args.temperature {
            request["temperature"] = json!(temperature);
        }
        request.to_string().into_bytes()
    }
}

fn read_video(path: &Path, distinct: bool) -> anyhow::Result<Vec<u8>> {
    let failed = || format!("cannot read the video {}", path.display());
    let num_bytes = std::fs::metadata(path).with_context(failed)?.len();
    ensure!(num_bytes <= MAX_VIDEO_BYTES, "{}: more than {MAX_VIDEO_BYTES} bytes", failed());
    let video = std::fs::read(path).with_context(failed)?;
    let is_mp4 = video.get(4..8) == Some(b"ftyp");
    ensure!(
        !distinct || is_mp4,
        "--distinct-videos needs an mp4 or mov file, and {} is none",
        path.display()
    );
    Ok(video)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        bench: BenchArgs,
    }

    fn args(options: &[&str]) -> Result<BenchArgs, clap::Error> {
        let cli = Cli::try_parse_from(["bench", "--url", "http://localhost:1"].iter().chain(options))?;
        Ok(cli.bench)
    }

    #[test]
    fn levels_are_a_list() {
        assert_eq!(args(&[]).unwrap().concurrency, [1, 8, 32]);
        assert_eq!(args(&["--concurrency", "2, 4"]).unwrap().concurrency, [2, 4]);
        assert!(args(&["--concurrency", "0"]).is_err());
        assert!(args(&["--distinct-videos"]).is_err());
    }

    #[test]
    fn bodies_differ_in_seed_and_if_asked_in_the_bytes_of_the_video() {
        let file = tempfile::Builder::new().suffix(".mov").tempfile().unwrap();
        std::fs::write(file.path(), b"\0\0\0\x08ftyp").unwrap();
        let path = file.path().to_str().unwrap();
        let body = |options: &[&str], index| -> Value {
            let requests = Requests::new(&args(options).unwrap(), "m".into()).unwrap();
            serde_json::from_slice(&requests.body(index)).unwrap()
        };
        let same = |index| body(&["--video", path], index);
        assert_eq!((&same(0)["seed"], &same(3)["seed"]), (&json!(1000), &json!(1003)));
        assert_eq!(same(0)["messages"], same(1)["messages"]);
        let url = |index| {
            let body = body(&["--video", path, "--distinct-videos"], index);
            body["messages"][0]["content"][0]["video_url"]["url"].as_str().unwrap().to_owned()
        };
        let (first, second) = (url(0), url(1));
        assert_ne!(first, second);
        assert_ne!(first, url(0), "levels and runs must not share videos");
        let base64 = first.strip_prefix("data:video/quicktime;base64,").unwrap();
        let bytes = STANDARD.decode(base64).unwrap();
        assert_eq!((&bytes[..16], bytes.len()), (&b"\0\0\0\x08ftyp\0\0\0\x18free"[..], 32));
        let text_only = body(&["--ignore-eos", "--temperature", "0"], 0);
        assert_eq!(text_only["messages"][0]["content"].as_array().unwrap().len(), 1);
        assert_eq!((&text_only["ignore_eos"], text_only["temperature"].as_f64()), (&json!(true), Some(0.0)));
    }

    #[test]
    fn a_video_that_cannot_be_made_distinct_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"GIF89a__").unwrap();
        let options = ["--video", file.path().to_str().unwrap(), "--distinct-videos"];
        let error = Requests::new(&args(&options).unwrap(), "m".into()).unwrap_err().to_string();
        assert!(error.contains("needs an mp4"), "{error}");
    }
}
