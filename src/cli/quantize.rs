//! `tinyllava quantize`: writes a quantised checkpoint, which then starts at once.
//!
//! Called by `main` with its arguments; prints to stderr only.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};

use super::start::{download, progress_bar, use_threads};
use crate::model::{
    checkpoint::{Checkpoint, ModelSpec},
    layers::Bits,
    quantised,
    variant::Variant,
};

/// Writes a quantised checkpoint.
#[derive(Debug, Args)]
pub struct QuantizeArgs {
    /// What to quantise: nano, synth:PRESET, a checkpoint directory, or a Hugging Face repository.
    #[arg(long, env = "TINYLLAVA_MODEL")]
    pub model: ModelSpec,
    /// To 8 bits, or to 4 (the decoder's; the rest to 8).
    #[arg(long, value_enum, default_value_t = QuantizeTo::Q8)]
    pub quant: QuantizeTo,
    /// Directory to write; must not exist or be empty.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Threads to quantise with [default: all cores].
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
}

/// How many bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QuantizeTo {
    Q8,
    Q4,
}

impl From<QuantizeTo> for Bits {
    fn from(to: QuantizeTo) -> Bits {
        match to {
            QuantizeTo::Q8 => Bits::Eight,
            QuantizeTo::Q4 => Bits::Four,
        }
    }
}

/// Downloads what has to be, and writes the checkpoint.
///
/// # Errors
/// One sentence: a bad checkpoint, a directory that is not empty, a full disk.
pub async fn quantize(args: QuantizeArgs) -> Result<()> {
    use_threads(args.threads);
    download(&args.model).await?;
    tokio::task::spawn_blocking(move || write(&args)).await?
}

fn write(args: &QuantizeArgs) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let (bits, bar) = (args.quant.into(), progress_bar(&format!("quantising {}", args.model)));
    bar.set_length(quantised::num_bytes(&checkpoint, bits)?);
    quantised::write_quantised(&checkpoint, bits, &args.out, &mut |bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    let size = indicatif::DecimalBytes(bar.position());
    eprintln!("{}: {size} in {:.1} s", args.out.display(), bar.elapsed().as_secs_f64());
    // The variant is known by the directory's name.
    let (source, made) = (Variant::of(&args.model), Variant::of(&ModelSpec::Directory(args.out.clone())));
    if let Some(variant) = source.filter(|_| made != source) {
        eprintln!("serve it with --variant {variant}, or name the directory {}", variant.repository());
    }
    Ok(())
}
