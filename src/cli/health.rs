//! `tinyllava health`: asks a running server how it is, for a container's health check.
//!
//! Called by the container engine every few seconds, so that the image needs no curl. Exits with 0 or 1; must never
//! wait longer than its time.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use url::Url;

/// Whom to ask, and what.
#[derive(Debug, Args)]
pub struct HealthArgs {
    /// Where the server is.
    #[arg(long, value_name = "URL", env = "TINYLLAVA_HEALTH_URL")]
    url: Option<Url>,
    /// Its port on this machine, when there is no --url.
    #[arg(long, default_value_t = 8000, env = "TINYLLAVA_PORT")]
    port: u16,
    /// Ask /ready (a request would be taken on) instead of /health (the process lives).
    #[arg(long)]
    ready: bool,
    /// Accept any certificate: a server rarely has one for the address of its own machine.
    #[arg(long)]
    insecure: bool,
    /// Longest wait for the answer, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 3)]
    timeout: u64,
}

/// Succeeds when the server does.
///
/// # Errors
/// When it does not answer in time, or not with success.
pub async fn health(args: &HealthArgs) -> anyhow::Result<()> {
    let base = match &args.url {
        Some(url) => url.clone(),
        None => Url::parse(&format!("http://127.0.0.1:{}", args.port))?,
    };
    let path = if args.ready { "/ready" } else { "/health" };
    let url = base.join(path).with_context(|| format!("{base} is not the address of a server"))?;
    let client = reqwest::Client::builder()
        .timeout(Duration::from_secs(args.timeout))
        .no_proxy()
        .danger_accept_invalid_certs(args.insecure)
        .build()?;
    let answer = client.get(url.clone()).send().await.with_context(|| format!("{url} does not answer"))?;
    if !answer.status().is_success() {
        bail!("{url} answers {}", answer.status());
    }
    Ok(())
}
