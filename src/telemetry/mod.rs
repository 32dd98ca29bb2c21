//! Metrics, traces, logs, and events for routers.
//!
//! Called by everyone but [`crate::scheduler`]. Never knows what a prompt or an answer says, unless `--log-content` asks.

mod collector;
pub mod engine;
mod generation;
pub mod kv_events;
pub mod metrics;
mod traces;
pub mod tracing;
mod trail;

pub use engine::EngineMetrics;
pub use generation::{ContentRecord, GenerationRecord, Outcome, TokenCounts};
pub use kv_events::{Endpoint, InvalidEndpoint, KvEventPublisher, KvEventsFormat, KvEventsTarget};
pub use metrics::Metrics;
pub use traces::{RequestStart, RequestTrace, Traces, TracesError};
pub use trail::{PieceTimer, Stage, StageRun, Trail};
