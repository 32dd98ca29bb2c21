//! Tests over real threads, sockets, processes and files, in one crate: each extra one links the tensor library again.

#![allow(clippy::unwrap_used, reason = "a failed setup is a failed test, in helpers too")]

mod checkpoint_damage;
mod checkpoint_open;
mod engine;
mod hub_download;
mod hub_fake;
mod prompt_golden;
