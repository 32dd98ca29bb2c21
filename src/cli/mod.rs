//! The commands of the binary.
//!
//! Called by `main`. Every failure is one sentence and a non-zero exit.

mod access;
pub mod ask;
pub mod bench;
pub mod chat_client;
pub mod check;
pub mod doctor;
pub mod health;
mod kv_events;
mod observing;
mod options;
pub mod quantize;
pub mod serve;
pub mod sse_client;
mod start;
pub mod synth;
mod target;
pub mod trace;

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};

use crate::{
    config::{MAX_ASYNC_THREADS, MediaConfig},
    media::{FrameSampling, MediaLoader},
    telemetry::tracing as logs,
};

/// Serves TinyLLaVA-Video-R1: ask a question about a video, watch the model think and answer.
#[derive(Debug, Parser)]
#[command(name = "tinyllava", version)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the HTTP server.
    Serve(Box<serve::ServeArgs>),
    /// Ask one question about one video.
    Ask(Box<AskCommand>),
    /// Measure a running server, the engine alone, or the frame sampling.
    Bench(Box<BenchCommand>),
    /// Write a random checkpoint of a given size in the published layout.
    Synth(synth::SynthArgs),
    /// Write a quantised checkpoint, which then starts at once.
    Quantize(quantize::QuantizeArgs),
    /// Write the tensors the model computes for one request.
    Trace(Box<trace::TraceArgs>),
    /// Check this machine for `serve` with the same flags, and say what to fix: exit code 0 or 1.
    Doctor(Box<doctor::DoctorArgs>),
    /// Hold a device's numbers against the CPU kernels' and against recorded ones: exit code 0 or 1.
    Check(Box<check::CheckArgs>),
    /// Ask a running server how it is: exit code 0 or 1, for health checks.
    Health(health::HealthArgs),
    /// Print the description of the HTTP API, as openapi.yaml has it.
    Openapi,
}

#[derive(Debug, Args)]
struct AskCommand {
    #[command(flatten)]
    ask: ask::AskArgs,
    #[command(flatten)]
    model: options::ModelOptions,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct BenchCommand {
    #[command(subcommand)]
    what: Option<BenchSubcommand>,
    #[command(flatten)]
    load: Option<bench::BenchArgs>,
}

#[derive(Debug, Subcommand)]
enum BenchSubcommand {
    /// Time the engine alone: encode a video, prefill a prompt, decode batches.
    Engine(Box<bench::engine::EngineArgs>),
    /// Time the sampling of 16 frames against decoding the whole file.
    Frames {
        /// Video files.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
}

/// Runs the command; the error is one sentence.
///
/// # Errors
/// Whatever the command fails with.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(cores.min(MAX_ASYNC_THREADS))
        .enable_all()
        .build()?;
    let outcome = run_on(&runtime, cli);
    // Whatever still runs on the blocking pool (a model being loaded) must not hold up the end.
    runtime.shutdown_background();
    outcome
}

fn run_on(runtime: &tokio::runtime::Runtime, cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Serve(args) => {
            logs::init(args.observing.log_format, "info");
            runtime.block_on(serve::serve(*args))
        }
        Command::Ask(command) => {
            logs::init(logs::LogFormat::Pretty, "warn");
            runtime.block_on(ask_command(*command))
        }
        Command::Bench(command) => {
            logs::init(logs::LogFormat::Pretty, "warn");
            runtime.block_on(bench_command(*command))
        }
        Command::Synth(args) => synth::run(&args),
        Command::Quantize(args) => {
            logs::init(logs::LogFormat::Pretty, "warn");
            runtime.block_on(quantize::quantize(args))
        }
        Command::Doctor(args) => {
            logs::init(logs::LogFormat::Pretty, "error");
            runtime.block_on(doctor::doctor(*args))
        }
        Command::Check(args) => {
            logs::init(logs::LogFormat::Pretty, "warn");
            check::check(&args)
        }
        Command::Health(args) => runtime.block_on(health::health(&args)),
        Command::Openapi => print_openapi(),
        Command::Trace(args) => {
            logs::init(logs::LogFormat::Pretty, "warn");
            runtime.block_on(trace::trace(*args))
        }
    }
}

async fn ask_command(command: AskCommand) -> anyhow::Result<()> {
    match &command.ask.server {
        Some(server) => ask::ask(server, &command.ask).await,
        None => {
            serve::with_private_server(&command.model, command.ask.timeout_s, async |server| {
                ask::ask(&server, &command.ask).await
            })
            .await
        }
    }
}

async fn bench_command(command: BenchCommand) -> anyhow::Result<()> {
    match (command.what, command.load) {
        (Some(BenchSubcommand::Engine(args)), _) => bench::engine::bench_engine(&args).await,
        (Some(BenchSubcommand::Frames { files }), _) => bench_frames(&files).await,
        (None, Some(load)) => bench::bench(&load).await,
        (None, None) => anyhow::bail!("nothing to measure: give --url or a subcommand"),
    }
}

#[expect(clippy::print_stdout, reason = "the command's output")]
fn print_openapi() -> anyhow::Result<()> {
    print!("{}", crate::http::openapi::yaml());
    Ok(())
}

/// A table of both ways to sample, one row a file.
#[expect(clippy::print_stdout, reason = "the command's output")]
async fn bench_frames(files: &[PathBuf]) -> anyhow::Result<()> {
    // Decoding all of a long video takes what it takes.
    let config = MediaConfig {
        max_video_bytes: usize::MAX,
        decode_timeout: Duration::from_secs(3600),
        ..MediaConfig::default()
    };
    let media = MediaLoader::new(config, 384)?;
    println!(
        "{:<28} {:>9} {:>8} {:>9} {:>9} {:>11} {:>6}  way",
        "file", "seconds", "frames", "probe ms", "sample ms", "whole ms", "ratio"
    );
    for file in files {
        let result = media.benchmark(file, FrameSampling::default()).await?;
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let sampled = result.probe + result.chosen;
        println!(
            "{:<28} {:>9.1} {:>8} {:>9.0} {:>9.0} {:>11.0} {:>6.2}  {:?}",
            file.file_name().unwrap_or_default().display(),
            result.duration,
            result.source_frames,
            ms(result.probe),
            ms(result.chosen),
            ms(result.probe + result.whole_file),
            (result.probe + result.whole_file).as_secs_f64() / sampled.as_secs_f64(),
            result.way,
        );
    }
    Ok(())
}
