//! Tests over real threads, sockets, processes and files, in one crate: each extra one links the tensor library again.

mod engine;
mod prompt_golden;
