//! The commands of the binary.

pub mod ask;
pub mod bench;
pub mod chat_client;
pub mod sse_client;
pub mod synth;
