//! The commands of the binary.

<<<<<<< HEAD
pub mod synth;
=======
pub mod ask;
pub mod bench;
pub mod chat_client;
pub mod sse_client;
>>>>>>> text
