//! Options of `serve` for routers that want to know what is in the KV cache.

use std::net::SocketAddr;

use anyhow::Context;
use clap::{Args, ValueEnum};

use crate::{
    http::AppState,
    telemetry::{Endpoint, KvEventPublisher, KvEventsFormat, KvEventsTarget},
};

/// Whether and where KV events are published.
#[derive(Debug, Args)]
pub struct KvEventsOptions {
    /// Publish which prompt blocks are cached, as vLLM does over ZeroMQ: tcp://*:5557 listens for routers,
    /// bind:tcp://127.0.0.1:5557 on one interface only, tcp://HOST:PORT connects to one.
    #[arg(long, value_name = "ENDPOINT", conflicts_with = "no_prefix_cache")]
    kv_events_endpoint: Option<Endpoint>,
    /// Topic of these messages [default: kv@POD_IP@MODEL, or kv@HOSTNAME@MODEL].
    #[arg(long, value_name = "TOPIC", requires = "kv_events_endpoint")]
    kv_events_topic: Option<String>,
    /// Where routers ask for messages they missed, such as tcp://*:5558.
    #[arg(long, value_name = "ENDPOINT", requires = "kv_events_endpoint", value_parser = listening)]
    kv_events_replay_endpoint: Option<SocketAddr>,
    /// Form of the events: map as vLLM 0.26 and later sends them, array as older versions.
    #[arg(long, value_name = "FORM", requires = "kv_events_endpoint", default_value = "map")]
    kv_events_format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Map,
    Array,
}

impl From<Format> for KvEventsFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Map => KvEventsFormat::Map,
            Format::Array => KvEventsFormat::Array,
        }
    }
}

fn listening(text: &str) -> Result<SocketAddr, String> {
    match text.parse().map_err(|error: crate::telemetry::InvalidEndpoint| error.to_string())? {
        Endpoint::Listen(address) => Ok(address),
        Endpoint::Connect(_) => {
            Err("routers connect to this endpoint: use tcp://*:PORT or bind:tcp://ADDRESS:PORT".into())
        }
    }
}

impl KvEventsOptions {
    /// The addresses it would listen on, and the flag of each.
    pub fn listeners(&self) -> impl Iterator<Item = (&'static str, SocketAddr)> {
        let events = self.kv_events_endpoint.as_ref().and_then(Endpoint::listens_on);
        let events = events.map(|address| ("--kv-events-endpoint", address));
        let replay = self.kv_events_replay_endpoint.map(|address| ("--kv-events-replay-endpoint", address));
        events.into_iter().chain(replay)
    }

    /// Starts to publish, if asked to.
    ///
    /// # Errors
    /// When an address cannot be listened on.
    pub async fn start(&self, state: &AppState) -> anyhow::Result<Option<KvEventPublisher>> {
        let Some(endpoint) = self.kv_events_endpoint.clone() else { return Ok(None) };
        let config = state.config();
        let model = config.served_model_name.clone();
        let topic = match &self.kv_events_topic {
            Some(topic) => topic.clone(),
            None => format!("kv@{}@{model}", server_name()?),
        };
        tracing::info!(topic, "publishing KV events");
        let target = KvEventsTarget {
            endpoint,
            replay: self.kv_events_replay_endpoint,
            topic,
            format: self.kv_events_format.into(),
            model,
        };
        Ok(Some(KvEventPublisher::start(target, &config.kv_events, state.metrics().clone()).await?))
    }
}

/// Routers tell servers apart by it: in a pod its address, where POD_IP says it, as llm-d expects; else the host's name.
fn server_name() -> anyhow::Result<String> {
    if let Some(address) = std::env::var("POD_IP").ok().filter(|address| !address.is_empty()) {
        return Ok(address);
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .context("cannot tell the name of this host; set --kv-events-topic")?;
    Ok(name.trim().into())
}
