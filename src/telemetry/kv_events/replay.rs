//! Keeps recent batches and sends them again to a router that has missed some.
//!
//! Started by [`super`]. A request is `[empty, first sequence number]`. Each answer is
//! `[empty, topic, sequence number, payload]`; the last one has an empty topic, number -1 and an
//! empty payload, as in vLLM 0.26 and later. With [`KvEventsFormat::Array`] answers have no topic
//! frame, as in older versions. Must never hold up the sending of new batches.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use zeromq::{RouterSocket, SocketRecv, SocketSend, ZmqError, ZmqMessage};

use super::KvEventsFormat;
use crate::config::KvEventsConfig;

/// After a failure, so that it is not met again at once.
pub(super) const PAUSE: Duration = Duration::from_millis(200);
const END: [u8; 8] = (-1i64).to_be_bytes();

/// The last batches; cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Kept(Arc<Mutex<Batches>>);

#[derive(Debug)]
struct Batches {
    batches: VecDeque<(u64, Bytes)>,
    num_bytes: usize,
    max_batches: usize,
    max_bytes: usize,
}

impl Kept {
    pub(super) fn new(limits: &KvEventsConfig) -> Self {
        Kept(Arc::new(Mutex::new(Batches {
            batches: VecDeque::new(),
            num_bytes: 0,
            max_batches: limits.max_replay_batches,
            max_bytes: limits.max_replay_bytes,
        })))
    }

    /// Keeps a batch; the oldest go when there are too many.
    pub(super) fn push(&self, sequence: u64, payload: Bytes) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.num_bytes += payload.len();
        kept.batches.push_back((sequence, payload));
        while kept.batches.len() > kept.max_batches || kept.num_bytes > kept.max_bytes {
            let Some((_, oldest)) = kept.batches.pop_front() else { break };
            kept.num_bytes -= oldest.len();
        }
    }

    fn since(&self, first: u64) -> Vec<(u64, Bytes)> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.batches.iter().filter(|(sequence, _)| *sequence >= first).cloned().collect()
    }
}

/// The replay service of one server.
pub(super) struct Replay {
    pub kept: Kept,
    pub topic: Bytes,
    pub format: KvEventsFormat,
    /// Limit of one answer: a router that does not read it must not keep others waiting.
    pub timeout: Duration,
}

impl Replay {
    /// Answers requests one after the other. Never completes.
    pub(super) async fn answer_all(self, mut socket: RouterSocket) {
        loop {
            let request = match socket.recv().await {
                Ok(request) => request.into_vec(),
                Err(error) => {
                    tracing::debug!(%error, "cannot read a request for KV events");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let [router, _, first] = &request[..] else { continue };
            let Ok(first) = <[u8; 8]>::try_from(&first[..]) else { continue };
            let answer = self.answer(&mut socket, router, u64::from_be_bytes(first));
            if let Ok(Err(error)) = tokio::time::timeout(self.timeout, answer).await {
                tracing::debug!(%error, "cannot answer a request for KV events");
            }
        }
    }

    async fn answer(&self, socket: &mut RouterSocket, router: &Bytes, first: u64) -> Result<(), ZmqError> {
        for (sequence, payload) in self.kept.since(first) {
            let frames = self.frames(&self.topic, sequence.to_be_bytes(), payload);
            socket.send(message(router, frames)).await?;
        }
        let end = self.frames(&Bytes::new(), END, Bytes::new());
        socket.send(message(router, end)).await
    }

    /// Returns the frames of one answer after the empty one.
    fn frames(&self, topic: &Bytes, sequence: [u8; 8], payload: Bytes) -> Vec<Bytes> {
        let sequence = Bytes::copy_from_slice(&sequence);
        match self.format {
            KvEventsFormat::Map => vec![topic.clone(), sequence, payload],
            KvEventsFormat::Array => vec![sequence, payload],
        }
    }
}

fn message(router: &Bytes, frames: Vec<Bytes>) -> ZmqMessage {
    let mut message = vec![router.clone(), Bytes::new()];
    message.extend(frames);
    ZmqMessage::try_from(message).expect("a message of four frames is empty: this is a bug")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_batches_go_first_by_number_and_by_bytes() {
        let limits =
            KvEventsConfig { max_replay_batches: 3, max_replay_bytes: 10, ..KvEventsConfig::default() };
        let kept = Kept::new(&limits);
        (0..5).for_each(|sequence| kept.push(sequence, Bytes::from_static(b"ab")));
        let numbers = |first| kept.since(first).into_iter().map(|(sequence, _)| sequence).collect::<Vec<_>>();
        assert_eq!((numbers(0), numbers(4)), (vec![2, 3, 4], vec![4]));
        kept.push(5, Bytes::from_static(b"abcdefghi"));
        assert_eq!(numbers(0), [5]);
    }

    fn replay(format: KvEventsFormat) -> Replay {
        let kept = Kept::new(&KvEventsConfig::default());
        Replay { kept, topic: "kv@pod@nano".into(), format, timeout: Duration::from_secs(1) }
    }

    #[test]
    fn answers_have_the_frames_of_live_messages() {
        let replay = replay(KvEventsFormat::Map);
        let frames = replay.frames(&replay.topic, 7u64.to_be_bytes(), Bytes::from_static(b"batch"));
        assert_eq!(frames, [&b"kv@pod@nano"[..], &[0, 0, 0, 0, 0, 0, 0, 7], b"batch"]);
        let end = replay.frames(&Bytes::new(), END, Bytes::new());
        assert_eq!(end, [&b""[..], &[0xff; 8], b""]);
    }

    #[test]
    fn answers_of_the_older_form_have_no_topic() {
        let replay = replay(KvEventsFormat::Array);
        let frames = replay.frames(&replay.topic, 7u64.to_be_bytes(), Bytes::from_static(b"batch"));
        assert_eq!(frames, [&[0, 0, 0, 0, 0, 0, 0, 7][..], b"batch"]);
    }
}
