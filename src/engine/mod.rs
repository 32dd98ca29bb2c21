//! The engine: one thread that schedules and runs steps, and the handle through which requests reach it.
//!
//! Called by `http` (the handle) and `cli`. Speaks integers only: no text, JSON or HTTP.

pub mod handle;

pub use handle::{
    EngineHandle, EngineStatus, NewSequence, Permit, ReserveError, SubmitError, TokenEvent, TokenStream,
    VideoInput,
};
