//! What runs in the next step: a state machine without clock, randomness, tensors or async.
//!
//! Called by [`crate::engine`] only. Imports `std` only (enforced by a test).

pub mod sampling_params;

pub use sampling_params::SamplingParams;

/// A token of the model's vocabulary.
pub type TokenId = u32;

/// Content address of a sampled video: bytes, every effective sampling parameter, preprocessing version.
pub type VideoDigest = [u8; 32];

/// The id that stands in a prompt for one visual token. No vocabulary reaches it.
pub const VISUAL_TOKEN: TokenId = TokenId::MAX;

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// The model produced one of its end tokens (or one of the request's stop token ids).
    EndOfSequence,
    /// A stop string of the request appeared (decided on the output side).
    StopString,
    /// The completion reached its maximum number of tokens.
    Length,
    /// The client left or the server is stopping.
    Aborted,
}
