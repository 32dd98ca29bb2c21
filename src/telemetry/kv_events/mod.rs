//! Tells routers which blocks the KV cache holds: vLLM's KV events, over ZeroMQ.
//!
//! Started by `cli/kv_events.rs`; hears of changes from [`super::EngineMetrics`] on the engine threads, and sends from a
//! task of its own. Must never hold up the engine: what does not fit into the queue is dropped and counted, and the
//! sequence number shows the gap.

mod endpoint;
mod replay;
mod union;
mod wire;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::sync::mpsc;
use zeromq::{PubSocket, RouterSocket, Socket, SocketEvent, SocketOptions, SocketSend, ZmqError, ZmqMessage};

pub use endpoint::{Endpoint, InvalidEndpoint};
use replay::{Kept, Replay};
use union::Union;
pub use wire::KvEventsFormat;

use super::metrics::Metrics;
use crate::{
    config::KvEventsConfig,
    scheduler::cache_events::{BlockHash, CacheEvent, seed_of},
};

/// For one try to reach a router.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Time for the router's subscription to arrive after the connection: the socket cannot tell, and what
/// is sent before is lost.
const SUBSCRIPTION_PAUSE: Duration = Duration::from_secs(1);

/// Where events go.
#[derive(Debug, Clone)]
pub struct KvEventsTarget {
    pub endpoint: Endpoint,
    /// Where batches that were missed can be asked for.
    pub replay: Option<SocketAddr>,
    /// The first frame of every message; routers read server and model from it.
    pub topic: String,
    pub format: KvEventsFormat,
    /// The model's name: hashes of different models differ.
    pub model: String,
}

/// Why no events can be sent.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for KV events: {source}; choose another {flag}")]
pub struct CannotListen {
    address: SocketAddr,
    flag: &'static str,
    source: Box<ZmqError>,
}

/// Changes of one step, on their way to the socket.
#[derive(Debug)]
struct Batch {
    sequence: u64,
    unix_seconds: f64,
    events: Vec<CacheEvent>,
}

/// The engines' end; each has a clone.
#[derive(Debug, Clone)]
pub struct KvEventPublisher {
    seed: BlockHash,
    outgoing: Arc<Mutex<Outgoing>>,
    queue: mpsc::Sender<Batch>,
    metrics: Metrics,
}

/// What the engines tell of together.
#[derive(Debug)]
struct Outgoing {
    held: Union,
    next_sequence: u64,
}

impl KvEventPublisher {
    /// Opens the sockets and starts to send. The first batch says that nothing is cached.
    ///
    /// # Errors
    /// When an address cannot be listened on.
    pub async fn start(
        target: KvEventsTarget,
        limits: &KvEventsConfig,
        metrics: Metrics,
    ) -> Result<Self, CannotListen> {
        let mut options = SocketOptions::default();
        options.connect_timeout(CONNECT_TIMEOUT);
        let mut socket = PubSocket::with_options(options);
        let connect_to = match target.endpoint {
            Endpoint::Connect(address) => Some(address),
            Endpoint::Listen(address) => {
                listen(&mut socket, address, "--kv-events-endpoint").await?;
                None
            }
        };
        let kept = Kept::new(limits);
        let topic = Bytes::from(target.topic);
        if let Some(address) = target.replay {
            let mut router = RouterSocket::new();
            listen(&mut router, address, "--kv-events-replay-endpoint").await?;
            let replay = Replay {
                kept: kept.clone(),
                topic: topic.clone(),
                format: target.format,
                timeout: limits.replay_timeout,
            };
            tokio::spawn(replay.answer_all(router));
        }
        let (queue, batches) = mpsc::channel(limits.max_queued_batches.max(1));
        let format = target.format;
        let sender = Sender { socket, connect_to, topic, format, kept, metrics: metrics.clone() };
        tokio::spawn(sender.run(batches));
        let outgoing = Arc::new(Mutex::new(Outgoing { held: Union::default(), next_sequence: 1 }));
        Ok(KvEventPublisher { seed: seed_of(&target.model), outgoing, queue, metrics })
    }

    /// Where hashes begin.
    pub fn seed(&self) -> BlockHash {
        self.seed
    }

    /// Hands over the changes of a step of one engine. Waits for nothing but other engines that do the same.
    pub fn publish(&self, events: Vec<CacheEvent>) {
        // Until it is queued: numbers go out in their order.
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        let events = outgoing.held.changes(events);
        if events.is_empty() {
            return;
        }
        let batch = Batch { sequence: outgoing.next_sequence, unix_seconds: unix_seconds(), events };
        outgoing.next_sequence += 1;
        if self.queue.try_send(batch).is_err() {
            self.metrics.kv_event_batch("dropped");
        }
    }
}

async fn listen(
    socket: &mut impl Socket,
    address: SocketAddr,
    flag: &'static str,
) -> Result<(), CannotListen> {
    let bound = socket.bind(&format!("tcp://{address}")).await;
    let bound = bound.map_err(|source| CannotListen { address, flag, source: Box::new(source) })?;
    tracing::info!(%bound, "KV events");
    if !address.ip().is_loopback() {
        tracing::warn!(
            "whoever reaches {address} is told the tokens of all prompts and replies without a cache_salt: \
             keep it in a private network, or listen on one interface ({flag} bind:tcp://ADDRESS:PORT)"
        );
    }
    Ok(())
}

fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// The socket's end.
struct Sender {
    socket: PubSocket,
    /// Whom to connect to, again and again; none: subscribers connect to us.
    connect_to: Option<String>,
    topic: Bytes,
    format: KvEventsFormat,
    kept: Kept,
    metrics: Metrics,
}

impl Sender {
    /// Ends with the engines.
    async fn run(mut self, mut batches: mpsc::Receiver<Batch>) {
        let mut connections = self.socket.monitor();
        if !self.connect(&batches).await {
            return;
        }
        self.send(0, self.format.cleared(unix_seconds())).await;
        loop {
            tokio::select! {
                batch = batches.recv() => match batch {
                    Some(batch) => {
                        let payload = self.format.changed(batch.unix_seconds, &batch.events);
                        self.send(batch.sequence, payload).await;
                    }
                    None => return,
                },
                Some(event) = connections.next() => if matches!(event, SocketEvent::Disconnected(_)) && !self.connect(&batches).await {
                    return;
                },
            }
        }
    }

    /// Waits until the router is there; false: the engine has ended meanwhile. Batches wait in the queue, and are
    /// dropped when it is full.
    async fn connect(&mut self, batches: &mpsc::Receiver<Batch>) -> bool {
        let Some(address) = &self.connect_to else { return true };
        let mut was_told = false;
        while let Err(error) = self.socket.connect(address).await {
            if batches.is_closed() {
                return false;
            }
            if was_told {
                tracing::debug!(%error, address, "still cannot connect to send KV events");
            } else {
                tracing::warn!(%error, address, "cannot connect to send KV events; trying again until it works");
                was_told = true;
            }
            tokio::time::sleep(replay::PAUSE).await;
        }
        tokio::time::sleep(SUBSCRIPTION_PAUSE).await;
        true
    }

    async fn send(&mut self, sequence: u64, payload: Vec<u8>) {
        let payload = Bytes::from(payload);
        self.kept.push(sequence, payload.clone());
        let frames = vec![self.topic.clone(), Bytes::copy_from_slice(&sequence.to_be_bytes()), payload];
        let message =
            ZmqMessage::try_from(frames).expect("a message of three frames is empty: this is a bug");
        match self.socket.send(message).await {
            Ok(()) => self.metrics.kv_event_batch("published"),
            Err(error) => {
                tracing::warn!(%error, "KV events were lost");
                self.metrics.kv_event_batch("dropped");
            }
        }
    }
}
