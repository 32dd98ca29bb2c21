//! From the engine's step reports to metrics, and from changes of its cache to events for routers.
//!
//! Given to the engine by `cli/serve.rs`; called on the engine thread before and after each step.

use prometheus::IntGauge;

use super::{
    kv_events::KvEventPublisher,
    metrics::{Metrics, StepKind},
};
use crate::{
    engine::{StepObserver, StepReport},
    scheduler::{
        SchedulerStats,
        cache_events::{BlockHash, CacheEvent},
    },
};

/// Turns the engine's running totals into counters.
#[derive(Debug)]
pub struct EngineMetrics {
    metrics: Metrics,
    sequences: IntGauge,
    last: SchedulerStats,
    kv_events: Option<KvEventPublisher>,
}

impl EngineMetrics {
    /// An observer of the engine of this number.
    pub fn new(metrics: Metrics, engine: usize) -> Self {
        let sequences = metrics.engine_sequences(engine);
        EngineMetrics { metrics, sequences, last: SchedulerStats::default(), kv_events: None }
    }

    /// The same, and it also publishes what is cached.
    pub fn publishing(self, kv_events: Option<KvEventPublisher>) -> Self {
        EngineMetrics { kv_events, ..self }
    }

    fn tell(&mut self, now: &SchedulerStats) {
        let last = std::mem::replace(&mut self.last, *now);
        self.metrics.engine_changed(&last, now);
        self.sequences.set((now.num_running + now.num_waiting) as i64);
        self.metrics.prefix_cache(
            now.prefix.queried_tokens - last.prefix.queried_tokens,
            now.prefix.hit_tokens - last.prefix.hit_tokens,
        );
        self.metrics
            .encoder_cache(now.encoder_queries - last.encoder_queries, now.encoder_hits - last.encoder_hits);
    }
}

impl StepObserver for EngineMetrics {
    fn before_step(&mut self, now: &SchedulerStats) {
        self.tell(now);
    }

    fn step(&mut self, report: &StepReport) {
        self.tell(&report.stats);
        if report.num_encoded_frames > 0 {
            self.metrics.step(StepKind::Encode, report.encode_seconds, report.num_encoded_frames);
        }
        // Decodes and prefill run together: a mixed step counts as the longer kind.
        // A step that does both has a time of its own; the sizes are told apart in any case.
        match (report.num_prefill_tokens, report.num_decodes) {
            (0, 0) => {}
            (prefill, 0) => self.metrics.step(StepKind::Prefill, report.compute_seconds, prefill),
            (0, decodes) => self.metrics.step(StepKind::Decode, report.compute_seconds, decodes),
            (prefill, decodes) => self.metrics.mixed_step(report.compute_seconds, prefill, decodes),
        }
    }

    fn cache_event_seed(&self) -> Option<BlockHash> {
        self.kv_events.as_ref().map(KvEventPublisher::seed)
    }

    fn cache_changed(&mut self, events: Vec<CacheEvent>) {
        if let Some(kv_events) = &self.kv_events {
            kv_events.publish(events);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_in_a_step_is_seen_before_it_ends() {
        let metrics = Metrics::new("m");
        let mut observer = EngineMetrics::new(metrics.clone(), 0);
        observer.before_step(&SchedulerStats { num_running: 2, num_waiting: 1, ..SchedulerStats::default() });
        let text = metrics.render();
        for line in
            ["vllm:num_requests_running{model_name=\"m\"} 2", "vllm:num_requests_waiting{model_name=\"m\"} 1"]
        {
            assert!(text.contains(line), "{text}");
        }
    }
}
