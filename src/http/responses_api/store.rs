//! Responses that were given, for a while: to be read again, and to be continued by `previous_response_id`.
//!
//! Called by the handlers of `/v1/responses`. In memory, bounded in number, bytes and age: the oldest go first. What is
//! kept of a conversation are texts and the names of videos, never large bodies.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use crate::config::ResponsesConfig;

/// One response may take this part of the memory, so that none makes all others go.
const MAX_SHARE: usize = 8;

/// A response that is kept.
#[derive(Debug)]
pub struct KeptResponse {
    /// The response object, JSON.
    pub object: String,
    pub conversation: KeptConversation,
}

/// What a response was given to.
#[derive(Debug)]
pub enum KeptConversation {
    /// The messages, a JSON list as in a chat request, without the reply to them; and that reply.
    Whole { messages: String, reply: String },
    /// It held so many bytes, more than are kept.
    TooLarge { num_bytes: usize },
}

impl KeptResponse {
    fn num_bytes(&self) -> usize {
        self.object.len()
            + match &self.conversation {
                KeptConversation::Whole { messages, reply } => messages.len() + reply.len(),
                KeptConversation::TooLarge { .. } => 0,
            }
    }
}

/// See the module.
#[derive(Debug)]
pub struct ResponseStore {
    max_responses: usize,
    max_bytes: usize,
    max_age: Duration,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    responses: HashMap<String, Arc<KeptResponse>>,
    /// Ids from the oldest to the newest.
    by_age: VecDeque<(Instant, String)>,
    num_bytes: usize,
}

impl ResponseStore {
    pub fn new(config: &ResponsesConfig) -> Self {
        ResponseStore {
            max_responses: config.max_responses,
            max_bytes: config.max_bytes,
            max_age: config.max_age,
            kept: Mutex::default(),
        }
    }

    /// Keeps a response; the oldest make room for it. Whether it is kept: one that takes more than its share is not.
    pub fn put(&self, id: String, response: KeptResponse) -> bool {
        if self.max_responses == 0 || response.num_bytes() > self.max_bytes / MAX_SHARE {
            return false;
        }
        let now = Instant::now();
        self.with(now, |kept| {
            kept.num_bytes += response.num_bytes();
            kept.responses.insert(id.clone(), Arc::new(response));
            kept.by_age.push_back((now, id));
            while kept.by_age.len() > self.max_responses || kept.num_bytes > self.max_bytes {
                kept.remove_oldest();
            }
        });
        true
    }

    /// A response, if it is kept.
    pub fn get(&self, id: &str) -> Option<Arc<KeptResponse>> {
        self.with(Instant::now(), |kept| kept.responses.get(id).cloned())
    }

    /// Forgets a response; whether it was kept.
    pub fn delete(&self, id: &str) -> bool {
        self.with(Instant::now(), |kept| {
            kept.by_age.retain(|(_, other)| other != id);
            kept.remove(id)
        })
    }

    /// Runs `work` on what is not too old.
    fn with<T>(&self, now: Instant, work: impl FnOnce(&mut Kept) -> T) -> T {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        while kept.by_age.front().is_some_and(|(since, _)| now.duration_since(*since) >= self.max_age) {
            kept.remove_oldest();
        }
        work(&mut kept)
    }
}

impl Kept {
    fn remove_oldest(&mut self) {
        if let Some((_, id)) = self.by_age.pop_front() {
            self.remove(&id);
        }
    }

    fn remove(&mut self, id: &str) -> bool {
        let removed = self.responses.remove(id);
        self.num_bytes -= removed.as_ref().map_or(0, |response| response.num_bytes());
        removed.is_some()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn response(num_bytes: usize) -> KeptResponse {
        KeptResponse {
            object: "x".repeat(num_bytes),
            conversation: KeptConversation::TooLarge { num_bytes: 9 },
        }
    }

    fn store(max_responses: usize, max_bytes: usize, max_age: Duration) -> ResponseStore {
        ResponseStore::new(&ResponsesConfig {
            max_responses,
            max_bytes,
            max_age,
            ..ResponsesConfig::default()
        })
    }

    #[test]
    fn the_oldest_go_when_there_is_no_room() {
        let few = store(2, 800, Duration::MAX);
        for id in ["a", "b", "c"] {
            assert!(few.put(id.into(), response(1)));
        }
        assert!(few.get("a").is_none() && few.get("b").is_some() && few.get("c").is_some());
        let small = store(99, 80, Duration::MAX);
        for n in 0..9 {
            assert!(small.put(n.to_string(), response(10)));
        }
        assert!(small.get("0").is_none() && small.get("1").is_some() && small.get("8").is_some());
    }

    #[test]
    fn a_response_that_takes_more_than_its_share_is_not_kept() {
        let store = store(9, 80, Duration::MAX);
        assert!(store.put("a".into(), response(10)));
        assert!(!store.put("b".into(), response(11)));
        assert!(store.get("a").is_some() && store.get("b").is_none() && !store.delete("b"));
    }

    #[test]
    fn old_responses_are_forgotten() {
        let store = store(9, 800, Duration::from_secs(100));
        store.put("a".into(), response(1));
        let now = Instant::now();
        assert!(store.with(now, |kept| kept.responses.contains_key("a")));
        assert!(!store.with(now + Duration::from_secs(101), |kept| kept.responses.contains_key("a")));
    }

    proptest! {
        /// The count of bytes is always that of what is there, and within its limit.
        #[test]
        fn bytes_are_counted_right(steps in proptest::collection::vec((0usize..6, 0usize..14, any::<bool>()), 0..60)) {
            let store = store(12, 88, Duration::MAX);
            for (n, (id, num_bytes, delete)) in steps.into_iter().enumerate() {
                if delete {
                    store.delete(&format!("{}", n.saturating_sub(id)));
                } else {
                    store.put(n.to_string(), response(num_bytes));
                }
                let kept = store.kept.lock().unwrap();
                let num_bytes: usize = kept.responses.values().map(|response| response.num_bytes()).sum();
                prop_assert_eq!(num_bytes, kept.num_bytes);
                prop_assert_eq!(kept.responses.len(), kept.by_age.len());
                prop_assert!(kept.num_bytes <= 88 && kept.responses.len() <= 12);
            }
        }
    }
}
