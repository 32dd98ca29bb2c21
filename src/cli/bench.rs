//! `tinyllava bench`: load against any OpenAI-compatible server.
//!
//! In a closed loop (`--concurrency`) each client sends its next request when the last one has ended; in an open loop
//! (`--request-rate`) requests come when they come, however many are still running. Times are taken on the client's side,
//! so they hold the network and the server's queue as well. It never changes the server.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use serde_json::{Value, json};
use url::Url;

use super::chat_client::ChatClient;
use goodput::Goodput;
use load::{Load, run_level, run_one};
use plan::{Lengths, request_rate};
use requests::{FIRST_SEED, Requests};

pub mod engine;
mod goodput;
mod load;
mod plan;
mod report;
mod requests;
mod stages;

/// What load to make.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchArgs {
    /// The server, with or without /v1.
    #[arg(long, value_name = "URL")]
    pub url: Url,
    /// Requests at the same time; several levels run one after the other.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,8,32", value_parser = at_least_one)]
    pub concurrency: Vec<usize>,
    /// Instead: requests a second, at random moments (Poisson) that are the same in every run; several levels run one after
    /// the other.
    #[arg(long, value_name = "R,…", value_delimiter = ',', value_parser = request_rate, conflicts_with = "concurrency")]
    pub request_rate: Vec<f64>,
    /// Most requests at the same time with --request-rate; later ones wait, and their waiting counts.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = at_least_one)]
    pub max_inflight: usize,
    /// Requests before the first level, one after the other, which do not count.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub warmup: usize,
    /// Requests a level [default: 4 a client, or 30 seconds of a rate].
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub num_requests: Option<usize>,
    /// A video that the requests are about; several (repeat it) take turns; without any the requests are text only.
    #[arg(long, value_name = "FILE")]
    pub video: Vec<PathBuf>,
    /// Give every request a video of its own bytes (mp4 or mov), so that no cache helps the server.
    #[arg(long, requires = "video")]
    pub distinct_videos: bool,
    /// The question.
    #[arg(long, value_name = "TEXT", default_value = "What happens here? Tell it step by step.")]
    pub prompt: String,
    /// Longest reply, tokens; LOW..HIGH draws it for each request, the same in every run.
    #[arg(long, value_name = "N", default_value = "64")]
    pub max_tokens: Lengths,
    /// Count the requests that kept these limits, of ttft (first token), tpot (an output token) and e2e (the whole):
    /// ttft:500ms,tpot:50ms,e2e:10s.
    #[arg(long, value_name = "LIMITS")]
    pub goodput: Option<Goodput>,
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
    for index in 0..args.warmup {
        run_one(&client, &requests, index, None).await.context("a warm-up request failed")?;
    }
    writeln!(out, "{}", report::HEADER)?;
    let mut levels = Vec::new();
    for load in Load::levels(args) {
        let before = client.metrics().await;
        let mut level = run_level(&client, &requests, load, args).await?;
        let stages = before.zip(client.metrics().await);
        level.stages =
            stages.map(|(before, after)| stages::difference(&stages::read(&before), &stages::read(&after)));
        writeln!(out, "{}", level.row())?;
        level.details(args.goodput.as_ref()).iter().try_for_each(|line| writeln!(out, "{line}"))?;
        out.flush()?;
        levels.push(level);
    }
    if let Some(path) = &args.json {
        let results: Vec<Value> = levels.iter().map(|level| level.to_json(args.goodput.as_ref())).collect();
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
        "videos": args.video.iter().filter_map(|path| path.file_name()).map(|name| name.to_string_lossy()).collect::<Vec<_>>(),
        "distinct_videos": args.distinct_videos,
        "prompt": args.prompt,
        "max_tokens": args.max_tokens.to_string(),
        "max_inflight": args.max_inflight,
        "warmup": args.warmup,
        "ignore_eos": args.ignore_eos,
        "temperature": args.temperature,
        "first_seed": FIRST_SEED,
    })
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

    pub(super) fn args(options: &[&str]) -> Result<BenchArgs, clap::Error> {
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
    fn an_open_loop_takes_the_place_of_the_closed_one() {
        assert_eq!(args(&["--request-rate", "0.5,4"]).unwrap().request_rate, [0.5, 4.0]);
        assert!(args(&["--request-rate", "1", "--concurrency", "2"]).is_err());
        assert!(args(&["--max-tokens", "9..3"]).is_err());
    }
}
