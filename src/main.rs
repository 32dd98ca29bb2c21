//! The `tinyllava` binary: see [`tinyllava::cli`].

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match tinyllava::cli::run(tinyllava::cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line: the chain of causes, without a backtrace.
            eprintln!("tinyllava: {error:#}");
            ExitCode::FAILURE
        }
    }
}
