//! Options of `serve` for routers that want to know what is in the KV cache.

use anyhow::Context;
use clap::Args;

use crate::{
    http::AppState,
    telemetry::{Endpoint, KvEventPublisher, KvEventsTarget},
};

/// Whether and where KV events are published.
#[derive(Debug, Args)]
pub struct KvEventsOptions {
    /// Publish which prompt blocks are cached, as vLLM does over ZeroMQ: tcp://*:5557 listens for routers,
    /// tcp://HOST:PORT connects to one.
    #[arg(long, value_name = "ENDPOINT", conflicts_with = "no_prefix_cache")]
    kv_events_endpoint: Option<Endpoint>,
    /// Topic of these messages [default: kv@HOSTNAME@MODEL].
    #[arg(long, value_name = "TOPIC", requires = "kv_events_endpoint")]
    kv_events_topic: Option<String>,
    /// Where routers ask for messages they missed, such as tcp://*:5558.
    #[arg(long, value_name = "ENDPOINT", requires = "kv_events_endpoint", value_parser = listening)]
    kv_events_replay_endpoint: Option<Endpoint>,
}

fn listening(text: &str) -> Result<Endpoint, String> {
    match text.parse().map_err(|error: crate::telemetry::InvalidEndpoint| error.to_string())? {
        endpoint @ Endpoint::Listen(_) => Ok(endpoint),
        Endpoint::Connect(_) => Err("routers connect to this endpoint: use tcp://*:PORT".into()),
    }
}

impl KvEventsOptions {
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
            None => format!("kv@{}@{model}", host_name()?),
        };
        tracing::info!(topic, "publishing KV events");
        let target =
            KvEventsTarget { endpoint, replay: self.kv_events_replay_endpoint.clone(), topic, model };
        Ok(Some(KvEventPublisher::start(target, &config.kv_events, state.metrics().clone()).await?))
    }
}

/// In a pod, the pod's name.
fn host_name() -> anyhow::Result<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")
        .context("cannot tell the name of this host; set --kv-events-topic")?;
    Ok(name.trim().into())
}
