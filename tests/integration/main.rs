//! Tests over real threads, sockets, processes and files, in one crate: each extra one links the tensor library again.

#![allow(clippy::unwrap_used, reason = "a failed setup is a failed test, in helpers too")]

mod architecture;
mod checkpoint_damage;
mod checkpoint_open;
mod cli_access;
mod cli_client;
mod cli_commands;
mod cli_doctor;
mod deploy_metrics;
mod deployment;
mod device;
mod engine;
mod golden;
#[cfg(feature = "cuda")]
mod gpu;
mod guided_output;
mod http_access;
mod http_chat;
mod http_choices;
mod http_completions;
mod http_contract;
mod http_examples;
mod http_files;
mod http_fleet;
mod http_limits;
mod http_logs;
mod http_metrics;
mod http_requests;
mod http_responses;
mod http_setup;
mod http_tls;
mod http_tokenize;
mod http_traces;
mod hub_download;
mod hub_fake;
mod invariance;
mod media_changes;
mod media_clips;
mod media_frames;
mod media_incomplete;
mod media_limits;
mod media_pictures;
mod media_seeking;
mod media_sources;
mod nano_demo;
mod nano_endpoints;
mod output_golden;
mod prompt_golden;
mod quantised;
mod server_process;
mod sse_disconnects;
mod sse_stream;
mod variants;
