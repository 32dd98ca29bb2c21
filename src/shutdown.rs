//! Graceful drain: when to stop, who still works, and waiting for them.
//!
//! [`requested`] is called by `cli/serve.rs`, [`Drain`] by `http`. Only a second signal ends the process from here.

use std::{future::Future, time::Duration};

use futures_util::FutureExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

/// Signals this soon after the first one mean the same.
const SAME_WISH: Duration = Duration::from_millis(500);

/// Completes at the first SIGTERM or SIGINT. A second signal ends the process at once.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn requested() -> std::io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!(signal = name, "shutting down: finishing running requests, refusing new ones");
        tokio::spawn(async move {
            // Some send a signal to the process and then to its group: that is one wish.
            tokio::time::sleep(SAME_WISH).await;
            while terminate.recv().now_or_never().is_some() || interrupt.recv().now_or_never().is_some() {}
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::warn!("second signal: exiting at once");
            std::process::exit(130);
        });
    })
}

/// Whether the server is leaving, whether new work is refused, and how much old work is left. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Drain {
    announced: CancellationToken,
    began: CancellationToken,
    cut_off: CancellationToken,
    work: TaskTracker,
}

/// A request that a drain waits for; over when dropped.
#[derive(Debug)]
pub struct WorkGuard {
    cut_off: CancellationToken,
    _token: TaskTrackerToken,
}

impl WorkGuard {
    /// Cancelled when the drain waits no longer.
    pub fn cut_off(&self) -> CancellationToken {
        self.cut_off.clone()
    }
}

impl Drain {
    /// The server will leave: balancers should send no more, but what they still send is taken on.
    pub fn announce(&self) {
        self.announced.cancel();
    }

    /// Whether [`Drain::announce`] or [`Drain::begin`] was called.
    pub fn is_announced(&self) -> bool {
        self.announced.is_cancelled()
    }

    /// From now on [`Drain::enter`] refuses.
    pub fn begin(&self) {
        // In this order: who is told that the server is leaving without a delay is refused from then on.
        self.began.cancel();
        self.work.close();
        self.announce();
    }

    /// Whether [`Drain::begin`] was called.
    pub fn is_draining(&self) -> bool {
        self.began.is_cancelled()
    }

    /// Starts a piece of work; `None` while draining.
    pub fn enter(&self) -> Option<WorkGuard> {
        // The token first: between a check and the token, `idle` could otherwise see no work.
        let guard = WorkGuard { cut_off: self.cut_off.clone(), _token: self.work.token() };
        (!self.is_draining()).then_some(guard)
    }

    /// The drain waits no longer: what still runs ends with an error that its client can read.
    pub fn cut_off(&self) {
        self.cut_off.cancel();
    }

    /// Completes when draining has begun and no work is left.
    pub async fn idle(&self) {
        self.work.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn drain_refuses_new_work_and_waits_for_old() {
        let drain = Drain::default();
        let old = drain.enter().expect("not draining");
        drain.announce();
        assert!(drain.is_announced() && drain.enter().is_some(), "the announcement refused work");
        drain.begin();
        assert!(drain.enter().is_none());
        let cut_off = old.cut_off();
        assert!(!cut_off.is_cancelled());
        drain.cut_off();
        assert!(cut_off.is_cancelled());
        let idle = drain.idle();
        tokio::pin!(idle);
        assert!(futures_util::poll!(&mut idle).is_pending());
        drop(old);
        idle.await;
    }
}
