//! Tests over real threads, sockets, processes and files, in one crate: each extra one links the tensor library again.

mod checkpoint_open;
mod cli_client;
mod engine;
mod output_golden;
mod prompt_golden;
