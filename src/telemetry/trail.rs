//! What a request went through: when each of its stages ran, and what came of it.
//!
//! Begun by `http/record.rs`, handed along to `media`; read once, for the log line and the spans. Metrics of a stage are
//! counted as soon as it ends. Never decides anything.

use std::{
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::Metrics;

/// A stage of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The video comes to disk: download, base64, look-up.
    Fetch,
    /// Waiting for a place among the decoders.
    DecodeWait,
    /// Listing a video's streams and packets.
    Probe,
    /// ffmpeg, or the picture decoder.
    Decode,
    /// To the model's input size; runs beside the decoder.
    Resize,
    /// Rendering and tokenising.
    Prompt,
    /// With the engine, not admitted yet.
    Queue,
    /// From the first frame encoded for this request to the last.
    Encode,
    /// From the first prompt token computed to the first token of the reply.
    Prefill,
    /// From the first token to the end.
    Generate,
}

/// One run of one stage.
#[derive(Debug, Clone, Copy)]
pub struct StageRun {
    pub stage: Stage,
    pub started: Instant,
    pub ended: Instant,
    /// Work in it, over all threads: `ended - started`, unless it ran piece by piece.
    pub spent: Duration,
    /// It ended by an error, or because the client left.
    pub failed: bool,
}

impl StageRun {
    /// All of the time between the two was spent on it.
    pub fn new(stage: Stage, started: Instant, ended: Instant) -> Self {
        let spent = ended.saturating_duration_since(started);
        StageRun { stage, started, ended, spent, failed: false }
    }
}

/// See the module. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Trail(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    metrics: Option<Metrics>,
    /// A handful for each video and for the request itself, and both are bounded.
    runs: Mutex<Vec<StageRun>>,
}

impl Trail {
    /// One that is counted. (The default is for the commands and tests.)
    pub fn new(metrics: Metrics) -> Self {
        Trail(Arc::new(Inner { metrics: Some(metrics), runs: Mutex::default() }))
    }

    /// Runs `work` as `stage`. Dropped before its end, it counts as failed.
    pub async fn time<T, E>(&self, stage: Stage, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let mut running = Running { trail: self, stage, started: Instant::now(), failed: true };
        let outcome = work.await;
        running.failed = outcome.is_err();
        outcome
    }

    /// A stage that has ended.
    pub fn push(&self, run: StageRun) {
        if let Some(metrics) = self.0.metrics.as_ref().filter(|_| !run.failed) {
            metrics.stage(run.stage, run.spent);
        }
        self.0.runs.lock().unwrap_or_else(PoisonError::into_inner).push(run);
    }

    /// The decoder put out so many frames, wanted or not.
    pub fn decoded_frames(&self, frames: usize) {
        if let Some(metrics) = &self.0.metrics {
            metrics.decoded_frames(frames);
        }
    }

    /// Whether the frames of a video were known.
    pub fn frame_cache(&self, hit: bool) {
        if let Some(metrics) = &self.0.metrics {
            metrics.frame_cache(hit);
        }
    }

    /// All that have ended, in that order.
    pub fn runs(&self) -> Vec<StageRun> {
        self.0.runs.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A stage at work.
struct Running<'a> {
    trail: &'a Trail,
    stage: Stage,
    started: Instant,
    failed: bool,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let run = StageRun::new(self.stage, self.started, Instant::now());
        self.trail.push(StageRun { failed: self.failed, ..run });
    }
}

/// Adds up a stage that runs piece by piece, on any thread.
#[derive(Debug, Clone, Default)]
pub struct PieceTimer(Arc<Mutex<Option<(Instant, Instant, Duration)>>>);

impl PieceTimer {
    /// A piece that began at `started` ends now.
    pub fn piece(&self, started: Instant) {
        let now = Instant::now();
        let mut sum = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, _, spent) = sum.unwrap_or((started, now, Duration::ZERO));
        *sum = Some((first.min(started), now, spent + (now - started)));
    }

    /// All pieces so far as one run; `None` if there are none.
    pub fn run(&self, stage: Stage) -> Option<StageRun> {
        let sum = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        sum.map(|(first, last, spent)| StageRun { spent, ..StageRun::new(stage, first, last) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stage_ends_well_by_an_error_or_by_being_dropped() {
        let trail = Trail::default();
        trail.time(Stage::Fetch, async { Ok::<_, ()>(()) }).await.unwrap();
        trail.time(Stage::Probe, async { Err::<(), _>(()) }).await.unwrap_err();
        let mut dropped = Box::pin(trail.time(Stage::Decode, std::future::pending::<Result<(), ()>>()));
        assert!(futures_util::poll!(&mut dropped).is_pending());
        drop(dropped);
        let runs: Vec<_> = trail.runs().iter().map(|run| (run.stage, run.failed)).collect();
        assert_eq!(runs, [(Stage::Fetch, false), (Stage::Probe, true), (Stage::Decode, true)]);
    }

    #[test]
    fn pieces_add_up_and_their_run_spans_all_of_them() {
        let timer = PieceTimer::default();
        assert!(timer.run(Stage::Resize).is_none());
        let start = Instant::now();
        timer.piece(start);
        timer.piece(start);
        let run = timer.run(Stage::Resize).unwrap();
        assert_eq!(run.started, start);
        assert!(run.spent >= run.ended - run.started, "two pieces ran side by side");
    }
}
