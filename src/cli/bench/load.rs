//! Sends the requests of a level and takes their times.
//!
//! Called by [`super`]. What is sent is `requests.rs`' work, when it is sent `plan.rs`'.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::{sync::Semaphore, task::JoinSet, time::Instant};

use super::{
    BenchArgs, plan,
    report::Level,
    requests::{FIRST_SEED, Requests},
};
use crate::cli::chat_client::{ChatClient, ChatError};

/// Requests a client of a level, when `--num-requests` is not given.
const DEFAULT_REQUESTS_PER_CLIENT: usize = 4;
/// Length of a level of a rate, when `--num-requests` is not given, seconds.
const DEFAULT_OPEN_SECONDS: f64 = 30.0;

/// How requests follow one another.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Load {
    /// So many clients, each with one request at a time.
    Closed(usize),
    /// So many requests a second.
    Open(f64),
}

impl Load {
    /// What the command line asks for.
    pub(super) fn levels(args: &BenchArgs) -> Vec<Load> {
        match args.request_rate.is_empty() {
            true => args.concurrency.iter().map(|&clients| Load::Closed(clients)).collect(),
            false => args.request_rate.iter().map(|&rate| Load::Open(rate)).collect(),
        }
    }

    fn default_requests(self) -> usize {
        match self {
            Load::Closed(clients) => DEFAULT_REQUESTS_PER_CLIENT * clients,
            Load::Open(rate) => ((rate * DEFAULT_OPEN_SECONDS) as usize).max(1),
        }
    }
}

/// Times of one successful request.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Timing {
    pub(super) first_token: Duration,
    /// The first text outside the thinking; `None` when there was none.
    pub(super) first_answer: Option<Duration>,
    /// Between one piece of text and the next.
    pub(super) gaps: Vec<Duration>,
    pub(super) total: Duration,
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
}

impl Timing {
    /// Time of an output token after the first; none for a reply of one.
    pub(super) fn output_token(&self) -> Option<Duration> {
        let later = self.completion_tokens.checked_sub(1).filter(|&later| later > 0)?;
        Some(self.total.saturating_sub(self.first_token) / u32::try_from(later).unwrap_or(u32::MAX))
    }
}

/// Runs one level.
///
/// # Errors
/// When a client of the benchmark itself dies; requests that fail are counted.
pub(super) async fn run_level(
    client: &ChatClient,
    requests: &Arc<Requests>,
    load: Load,
    args: &BenchArgs,
) -> anyhow::Result<Level> {
    let num_requests = args.num_requests.unwrap_or(load.default_requests());
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} requests ({elapsed})");
    let style = style.expect("the bar's template is valid: this is a bug");
    let bar = ProgressBar::new(num_requests as u64).with_style(style);
    let started = Instant::now();
    let mut clients = match load {
        Load::Closed(clients) => closed(client, requests, clients.min(num_requests), num_requests, &bar),
        Load::Open(rate) => {
            let arrivals = plan::arrivals(FIRST_SEED, rate, num_requests);
            open(client, requests, arrivals, args.max_inflight, &bar)
        }
    };
    let mut results = Vec::new();
    while let Some(finished) = clients.join_next().await {
        results.extend(finished.context("a client of the benchmark died: this is a bug")?);
    }
    bar.finish_and_clear();
    Ok(Level::new(load, started.elapsed(), results))
}

type Results = Vec<Result<Timing, ChatError>>;

fn closed(
    client: &ChatClient,
    requests: &Arc<Requests>,
    num_clients: usize,
    num_requests: usize,
    bar: &ProgressBar,
) -> JoinSet<Results> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for _ in 0..num_clients {
        let (client, requests, next, bar) = (client.clone(), requests.clone(), next.clone(), bar.clone());
        clients.spawn(async move {
            let mut results = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= num_requests {
                    return results;
                }
                results.push(run_one(&client, &requests, index, None).await);
                bar.inc(1);
            }
        });
    }
    clients
}

fn open(
    client: &ChatClient,
    requests: &Arc<Requests>,
    arrivals: Vec<Duration>,
    max_inflight: usize,
    bar: &ProgressBar,
) -> JoinSet<Results> {
    let (places, started) = (Arc::new(Semaphore::new(max_inflight)), Instant::now());
    let mut clients = JoinSet::new();
    for (index, arrival) in arrivals.into_iter().enumerate() {
        let (client, requests, places, bar) = (client.clone(), requests.clone(), places.clone(), bar.clone());
        clients.spawn(async move {
            let planned = started + arrival;
            tokio::time::sleep_until(planned).await;
            let _place = places.acquire().await.expect("it is never closed: this is a bug");
            let result = run_one(&client, &requests, index, Some(planned)).await;
            bar.inc(1);
            vec![result]
        });
    }
    clients
}

/// One request; its times count from when it was `planned`, or else from when it is sent.
pub(super) async fn run_one(
    client: &ChatClient,
    requests: &Arc<Requests>,
    index: usize,
    planned: Option<Instant>,
) -> Result<Timing, ChatError> {
    let (requests, making) = (requests.clone(), Instant::now());
    // A video is encoded as base64: not on the threads that take the times of other requests.
    let body = tokio::task::spawn_blocking(move || requests.body(index));
    let body = body.await.expect("making a body does not panic: this is a bug");
    // The making is ours, not the server's.
    let started = planned.map_or_else(Instant::now, |planned| planned + making.elapsed());
    let mut stream = client.post_json(body).await?;
    let (mut timing, mut pieces) = (Timing::default(), 0);
    let mut last = Duration::ZERO;
    while let Some(chunk) = stream.next().await? {
        let now = started.elapsed();
        if chunk.has_text() {
            match pieces {
                0 => timing.first_token = now,
                _ => timing.gaps.push(now.saturating_sub(last)),
            }
            pieces += 1;
            last = now;
        }
        if !chunk.content.is_empty() {
            timing.first_answer.get_or_insert(now);
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
