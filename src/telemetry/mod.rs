//! Metrics and logs.
//!
//! Called by everyone but [`crate::scheduler`]. Never knows what a prompt or an answer says.

pub mod engine;
pub mod metrics;
pub mod tracing;

pub use engine::EngineMetrics;
pub use metrics::Metrics;
