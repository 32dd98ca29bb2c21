//! Who hears what a step did: counts for the metrics, and changes of the prefix cache for routers.
//!
//! Called by [`super::worker`] on the engine thread; implemented by `telemetry`. Must return at once.

use crate::scheduler::{
    SchedulerStats,
    cache_events::{BlockHash, CacheEvent},
};

/// What a step did, for the metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepReport {
    /// After the step.
    pub stats: SchedulerStats,
    /// Blocks of the cache.
    pub num_blocks: usize,
    pub num_encoded_frames: usize,
    pub num_prefill_tokens: usize,
    pub num_decodes: usize,
    /// Seconds of the step's encoding and of its decoder run.
    pub encode_seconds: f64,
    pub compute_seconds: f64,
}

/// Hears of every step, on the engine thread: must return at once.
pub trait StepObserver: Send {
    /// Called after each step, and when the last sequence has gone.
    fn step(&mut self, report: &StepReport);

    /// Called before the work of a step: a step may take long, or never end.
    fn before_step(&mut self, _: &SchedulerStats) {}

    /// Where hashes of cached blocks begin; none: it does not want to hear of them.
    fn cache_event_seed(&self) -> Option<BlockHash> {
        None
    }

    /// Called after a step that changed the prefix cache, if there is a seed.
    fn cache_changed(&mut self, _: Vec<CacheEvent>) {}
}

/// Hears nothing.
impl StepObserver for () {
    fn step(&mut self, _: &StepReport) {}
}
