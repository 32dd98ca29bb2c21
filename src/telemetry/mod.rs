//! Metrics, logs, and events for routers.
//!
//! Called by everyone but [`crate::scheduler`]. Never knows what a prompt or an answer says.

pub mod engine;
pub mod kv_events;
pub mod metrics;
pub mod tracing;

pub use engine::EngineMetrics;
pub use kv_events::{Endpoint, InvalidEndpoint, KvEventPublisher, KvEventsTarget};
pub use metrics::Metrics;
