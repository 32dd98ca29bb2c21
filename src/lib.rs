//! `tinyllava`: an inference server for TinyLLaVA-Video-R1 and its family.
//!
//! # Layout
//!
//! The modules are the path a request takes, in order:
//! [`http`] → [`media`] → [`prompt`] → [`scheduler`] → [`engine`] → [`model`] → [`output`];
//! beside it stand [`telemetry`] (metrics, logs), [`config`] (every limit) and [`cli`] (the commands).
//! `ARCHITECTURE.md` tells the way of one request file by file.

pub mod cli;
pub mod config;
pub mod engine;
pub mod http;
pub mod media;
pub mod model;
pub mod output;
pub mod prompt;
pub mod scheduler;
pub mod shutdown;
pub mod telemetry;
