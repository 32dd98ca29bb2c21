//! The engine: one thread a device that schedules and runs steps, and the handle through which requests reach it.
//!
//! Called by `http` (the handle) and `cli`. Speaks integers only: no text, JSON or HTTP.

mod ahead;
mod encoder_cache;
mod failure;
mod fleet;
pub mod guidance;
pub mod handle;
mod limits;
mod logits;
pub mod logprobs;
mod next_token;
pub mod observer;
mod prompt_scores;
mod request_table;
pub mod runner;
pub mod sampler;
pub mod worker;

pub use guidance::{AnswerGuide, EndThinking, Guide, GuideTokens, NoEnd, ThinkingGuide};
pub use handle::{
    EngineHandle, EngineLimits, EngineStatus, NewSequence, Permit, PromptTimes, PromptToken, ReserveError,
    SubmitError, TokenEvent, TokenStream, VideoInput,
};
pub use observer::{StepObserver, StepReport};
pub use worker::{EngineOptions, EngineThread, start};
