//! Batches a router has missed: kept for a while, and sent again to who asks.
//!
//! A request is `[empty, first sequence number]`; the answers are `[empty, sequence number, payload]`, the last of them
//! with number -1 and no payload. Must never hold up the sending of new batches.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use zeromq::{RouterSocket, SocketRecv, SocketSend, ZmqError, ZmqMessage};

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

/// Never completes.
pub(super) async fn answer_all(mut socket: RouterSocket, kept: Kept, timeout: Duration) {
    loop {
        let request = match socket.recv().await {
            Ok(request) => request.into_vec(),
            Err(error) => {
                tracing::debug!(%error, "cannot read a request for KV events");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let [who, _, first] = &request[..] else { continue };
        let Ok(first) = <[u8; 8]>::try_from(&first[..]) else { continue };
        let batches = kept.since(u64::from_be_bytes(first));
        // Who does not read its answer must not keep others waiting.
        let answer = tokio::time::timeout(timeout, answer(&mut socket, who, batches));
        if let Ok(Err(error)) = answer.await {
            tracing::debug!(%error, "cannot answer a request for KV events");
        }
    }
}

async fn answer(socket: &mut RouterSocket, who: &Bytes, batches: Vec<(u64, Bytes)>) -> Result<(), ZmqError> {
    let batches = batches.into_iter().map(|(sequence, payload)| (sequence.to_be_bytes(), payload));
    for (sequence, payload) in batches.chain([(END, Bytes::new())]) {
        let frames = vec![who.clone(), Bytes::new(), Bytes::copy_from_slice(&sequence), payload];
        let message = ZmqMessage::try_from(frames).expect("a message of four frames is empty: this is a bug");
        socket.send(message).await?;
    }
    Ok(())
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
}
