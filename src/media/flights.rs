//! Work that several requests ask for at the same time, done once.
//!
//! Called by `source.rs` for downloads. Nothing is kept beyond the work: what is asked for after it ended starts it
//! anew, for a URL's content may have changed. Whoever leaves leaves it to the others; the last one to leave kills it.

use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};

use super::MediaError;

type Work<T> = BoxFuture<'static, Result<T, MediaError>>;

/// Running work by what it is for. As many entries at most as there are requests that wait.
pub struct Flights<K, T> {
    running: Arc<Mutex<HashMap<K, WeakShared<Work<T>>>>>,
}

impl<K, T> Clone for Flights<K, T> {
    fn clone(&self) -> Self {
        Flights { running: self.running.clone() }
    }
}

impl<K, T> Default for Flights<K, T> {
    fn default() -> Self {
        Flights { running: Arc::default() }
    }
}

impl<K, T> fmt::Debug for Flights<K, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Flights")
    }
}

impl<K: Eq + Hash, T: Clone> Flights<K, T> {
    /// The outcome of the work for `key`: of that which runs, or of `start`.
    pub async fn join(&self, key: K, start: impl FnOnce() -> Work<T>) -> Result<T, MediaError> {
        self.flight(key, start).await
    }

    fn flight(&self, key: K, start: impl FnOnce() -> Work<T>) -> Shared<Work<T>> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|_, flight| flight.upgrade().is_some());
        if let Some(flight) = running.get(&key).and_then(WeakShared::upgrade) {
            return flight;
        }
        let flight = start().shared();
        running.extend(flight.downgrade().map(|weak| (key, weak)));
        flight
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::pin,
        sync::atomic::{AtomicUsize, Ordering},
    };

    use futures_util::poll;
    use tokio::sync::Notify;

    use super::*;

    /// Counts starts and ends of works that end when they are told to.
    #[derive(Default)]
    struct Counted {
        started: AtomicUsize,
        dropped: AtomicUsize,
        go: Notify,
    }

    struct CountDrop(Arc<Counted>);

    impl Drop for CountDrop {
        fn drop(&mut self) {
            self.0.dropped.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Counted {
        fn work(self: &Arc<Self>) -> Work<usize> {
            let counted = self.clone();
            async move {
                let guard = CountDrop(counted.clone());
                let number = counted.started.fetch_add(1, Ordering::SeqCst);
                counted.go.notified().await;
                drop(guard);
                Ok(number)
            }
            .boxed()
        }
    }

    #[tokio::test]
    async fn work_outlives_who_started_it_and_ends_with_the_last_who_waits() {
        let (flights, counted) = (Flights::default(), Arc::new(Counted::default()));
        let join = || Box::pin(flights.join("a", || counted.work()));
        let (mut first, mut second) = (join(), join());
        assert!(poll!(&mut first).is_pending() && poll!(&mut second).is_pending());
        drop(first);
        counted.go.notify_one();
        assert_eq!(second.await.unwrap(), 0, "the second one goes on with the work of the first");
        let mut third = join();
        assert!(poll!(&mut third).is_pending(), "what has ended is done again");
        assert_eq!(counted.started.load(Ordering::SeqCst), 2);
        drop(third);
        assert_eq!(counted.dropped.load(Ordering::SeqCst), 2, "nobody waits: the work is dropped");
    }

    #[tokio::test]
    async fn other_keys_are_other_works() {
        let (flights, counted) = (Flights::default(), Arc::new(Counted::default()));
        let mut first = pin!(flights.join("a", || counted.work()));
        let mut second = pin!(flights.join("b", || counted.work()));
        assert!(poll!(&mut first).is_pending() && poll!(&mut second).is_pending());
        assert_eq!(counted.started.load(Ordering::SeqCst), 2);
        assert!(flights.running.lock().unwrap().len() == 2);
    }
}
