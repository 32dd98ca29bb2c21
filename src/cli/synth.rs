//! `tinyllava synth`: writes a random checkpoint of a given size in the published layout.
//!
//! Called by `main` with its arguments; prints to stderr only.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::model::{config::ModelConfig, presets::Preset, synth};

/// Writes a random checkpoint of a given size in the published layout.
#[derive(Debug, Args)]
pub struct SynthArgs {
    /// Size: nano, small (14.9M parameters), mid (0.6B) or r1 (3.6B, 7.3 GB, as published)
    #[arg(long)]
    pub preset: Preset,
    /// Directory to write; must not exist or be empty
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// The same seed gives the same bytes
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Writes the checkpoint; the error is one sentence.
pub fn run(args: &SynthArgs) -> Result<()> {
    let config = ModelConfig::preset(args.preset);
    let bar = ProgressBar::new(synth::num_bytes(&config)).with_style(
        ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}")
            .expect("a constant template: this is a bug")
            .progress_chars("=> "),
    );
    bar.set_message(format!("writing {}", args.preset));
    synth::write_checkpoint(&config, args.seed, &args.out, &mut |bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    eprintln!(
        "{}: {} parameters, {} in {:.1} s",
        args.out.display(),
        config.num_parameters(),
        indicatif::DecimalBytes(synth::num_bytes(&config)),
        bar.elapsed().as_secs_f64(),
    );
    Ok(())
}
