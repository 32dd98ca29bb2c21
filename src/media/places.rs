//! Places for decoders: how many run at once, and who waits for one.
//!
//! Owned by the loader of `mod.rs`; `decode.rs` takes further ones where they are free.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// See the module. Cheap to clone.
#[derive(Debug, Clone)]
pub struct DecoderPlaces {
    places: Arc<Semaphore>,
    num_places: usize,
    num_waiting: Arc<AtomicUsize>,
}

/// A moment's look at the decoders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecoderLoad {
    /// Decoders at work.
    pub running: usize,
    /// Videos that wait for one.
    pub waiting: usize,
    /// Most decoders at the same time.
    pub places: usize,
}

impl DecoderPlaces {
    /// At least one.
    pub fn new(num_places: usize) -> Self {
        let num_places = num_places.max(1);
        DecoderPlaces {
            places: Arc::new(Semaphore::new(num_places)),
            num_places,
            num_waiting: Arc::default(),
        }
    }

    /// The right to run one decoder; first come, first served.
    pub async fn take(&self) -> OwnedSemaphorePermit {
        let _waiting = Waiting::new(&self.num_waiting);
        let place = self.places.clone().acquire_owned().await;
        place.expect("the semaphore is never closed: this is a bug")
    }

    /// As [`DecoderPlaces::take`], if there is a place now.
    pub fn try_take(&self) -> Option<OwnedSemaphorePermit> {
        self.places.clone().try_acquire_owned().ok()
    }

    /// As of now.
    pub fn load(&self) -> DecoderLoad {
        DecoderLoad {
            running: self.num_places - self.places.available_permits(),
            waiting: self.num_waiting.load(Ordering::Relaxed),
            places: self.num_places,
        }
    }
}

/// Counted as long as it lives.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Waiting(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_waits_and_who_works_is_known() {
        let places = DecoderPlaces::new(1);
        let first = places.take().await;
        let mut second = Box::pin(places.take());
        assert!(futures_util::poll!(&mut second).is_pending());
        assert!(places.try_take().is_none());
        assert_eq!(places.load(), DecoderLoad { running: 1, waiting: 1, places: 1 });
        drop(second);
        drop(first);
        assert_eq!(places.load(), DecoderLoad { running: 0, waiting: 0, places: 1 });
    }
}
