//! `tinyllava bench frames FILE`: what sampling costs against decoding a whole video.
//!
//! Called by the command line. Must never serve anything: it prints one table row a file and ends.

use std::{path::Path, time::Duration};

use anyhow::Context;

use crate::{
    config::MediaConfig,
    media::{FrameSampling, MediaLoader, Way},
};

/// Side of the frames of the published model, pixels.
const IMAGE_SIZE: usize = 384;
/// Runs of each way; the fastest counts (the slower ones measure the rest of the machine).
const RUNS: usize = 3;
/// A benchmark may take its time: hours of video in a whole decode.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// Samples the model's number of frames of `file` both ways and prints a row of a Markdown table.
#[expect(clippy::print_stdout, reason = "the table is this command's output")]
pub async fn run(file: &Path) -> anyhow::Result<()> {
    let config =
        MediaConfig { max_video_bytes: usize::MAX, decode_timeout: TIMEOUT, ..MediaConfig::default() };
    let loader = MediaLoader::new(config, IMAGE_SIZE)?;
    loader.check_tools()?;
    let mut best = None;
    for _ in 0..RUNS {
        let run = loader.benchmark(file, FrameSampling::default()).await;
        let run = run.with_context(|| format!("{} cannot be sampled", file.display()))?;
        let best = best.get_or_insert(run);
        best.probe = best.probe.min(run.probe);
        best.chosen = best.chosen.min(run.chosen);
        best.whole_file = best.whole_file.min(run.whole_file);
    }
    let best = best.context("no run was made")?;
    let way = match best.way {
        Way::Seeks { passes } => format!("{passes} seeks"),
        Way::WholeFile { .. } => "whole file".into(),
    };
    let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy();
    println!("| file | video | frames | probe | sampling | way | full decode | faster |");
    println!("|---|---|---|---|---|---|---|---|");
    println!(
        "| {name} | {:.0} s | {} | {:.2} s | {:.2} s | {way} | {:.2} s | {:.1}x |",
        best.duration,
        best.source_frames,
        best.probe.as_secs_f64(),
        best.chosen.as_secs_f64(),
        best.whole_file.as_secs_f64(),
        best.whole_file.as_secs_f64() / best.chosen.as_secs_f64(),
    );
    Ok(())
}
