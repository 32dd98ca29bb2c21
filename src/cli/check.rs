//! `tinyllava check`: whether the network on a device computes what it should.
//!
//! Runs one request in all the ways the engine may run it, on the device, and holds the numbers against the CPU kernels' in
//! f32 (with `--quant`, against the same network on the CPU with floats that were rounded alike), and against recorded ones where
//! a file has them. Calls [`trial`]; never the engine.

use std::{collections::HashMap, path::PathBuf};

use anyhow::{Context, anyhow, bail, ensure};
use candle_core::{DType, Device, Tensor};

use super::options::ModelOptions;
use crate::model::{
    FrameBatch, VISUAL_TOKEN, VideoLanguageModel,
    checkpoint::Checkpoint,
    device::{DeviceModel, quant},
    layers::{Bits, WeightFormat},
    placement,
    tinyllava::TinyLlava,
    trial::{self, Case, Outcome, relative_error},
    weights::StoredDType,
};

/// Text of the made-up prompt, and tokens after it.
const TEXT_TOKENS: usize = 63;
const COMPLETION: usize = 4;
/// The line of logits that the original computed.
const RECORDED_LOGITS: &str = "logits, recorded";
/// Most that logits may differ where the rows of small products are rounded to 8 bits: measured to be half of it.
const ROUNDED_ROWS_TOLERANCE: f64 = 0.05;

/// What to check.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    #[command(flatten)]
    model: ModelOptions,
    /// What to compute in, one after the other.
    #[arg(long, value_name = "TYPE,…", value_delimiter = ',', default_value = "f32,bf16,f16")]
    types: Vec<ComputeType>,
    /// Recorded tensors of the same checkpoint (`golden.safetensors`): its request is run instead of a made-up one.
    #[arg(long, value_name = "FILE")]
    golden: Option<PathBuf>,
}

/// A type of the arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum ComputeType {
    F32,
    Bf16,
    F16,
}

impl ComputeType {
    fn dtype(self) -> DType {
        match self {
            ComputeType::F32 => DType::F32,
            ComputeType::Bf16 => DType::BF16,
            ComputeType::F16 => DType::F16,
        }
    }

    /// Most that numbers may differ, relative to their spread: random checkpoints amplify what is rounded.
    fn tolerance(self) -> f64 {
        match self {
            ComputeType::F32 => 1e-4,
            ComputeType::F16 => 0.01,
            // Eight times the rounding of f16, which is measured to err by 0.003 at most.
            ComputeType::Bf16 => 0.06,
        }
    }
}

/// Runs the checks and prints a line each.
///
/// # Errors
/// When the model cannot be loaded, or a number is off.
#[expect(clippy::print_stdout, reason = "the command's output")]
pub fn check(args: &CheckArgs) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&args.model.model)?;
    let device = args.model.device.open()?.unwrap_or(Device::Cpu);
    let bits = args.model.quant.bits();
    let mut reference =
        reference(&checkpoint, bits).map_err(|error| anyhow!("cannot load {}: {error}", checkpoint.id))?;
    let golden = args.golden.as_ref().map(Golden::read).transpose()?;
    let case = match &golden {
        Some(golden) => golden.case()?,
        None => Case::made_up(reference.as_ref(), TEXT_TOKENS, COMPLETION),
    };
    let expected = trial::run(reference.as_mut(), &case).context("the CPU kernels failed")?;
    let weights = bits.map(|bits| format!(", weights in {}", bits.name())).unwrap_or_default();
    println!("{} on {}{weights}", checkpoint.id, placement::name(&device)?);
    println!("{:<6} {:<44} {:>10} {:>10}", "type", "", "error", "allowed");
    let mut num_wrong = 0;
    for kind in &args.types {
        if device.is_cpu() && *kind == ComputeType::Bf16 {
            println!("{:<6} not on a CPU", "bf16");
            continue;
        }
        let place = (&device, kind.dtype());
        let mut model = DeviceModel::load(&checkpoint.weights, &checkpoint.config, place, bits)
            .map_err(|error| anyhow!("cannot load {}: {error}", checkpoint.id))?;
        let got = trial::run(&mut model, &case).context("the device failed")?;
        let mut lines = compare(&got, &expected)?;
        if let Some(golden) = &golden {
            lines.extend(golden.compare(&got)?);
        }
        for (what, error) in lines {
            let allowed = allowed(what, *kind, bits, &device);
            let is_wrong = !error.is_finite() || error > allowed;
            num_wrong += usize::from(is_wrong);
            let name = kind.dtype().as_str();
            let verdict = if is_wrong { "  WRONG" } else { "" };
            println!("{name:<6} {what:<44} {error:>10.2e} {allowed:>10.0e}{verdict}");
        }
    }
    ensure!(num_wrong == 0, "{num_wrong} numbers are off: do not serve from this device");
    Ok(())
}

/// What computes what should come out: the CPU kernels in f32, or the network for devices with weights that are rounded alike.
fn reference(
    checkpoint: &Checkpoint,
    bits: Option<Bits>,
) -> crate::model::Result<Box<dyn VideoLanguageModel>> {
    let (weights, config) = (&checkpoint.weights, &checkpoint.config);
    Ok(match bits {
        None => Box::new(TinyLlava::load(weights, config, WeightFormat::Float(StoredDType::F32))?),
        Some(_) => {
            Box::new(DeviceModel::load(weights, config, (&Device::Cpu, DType::F32), bits)?.unpacked()?)
        }
    })
}

/// Most that a line's numbers may differ, relative to their spread.
fn allowed(what: &str, kind: ComputeType, bits: Option<Bits>, device: &Device) -> f64 {
    match bits {
        Some(bits) if what == RECORDED_LOGITS => match bits {
            // What quantising the weights of the recorded random checkpoints does to them.
            Bits::Eight => 0.1,
            Bits::Four => 0.8,
        },
        Some(_) if what.starts_with("logits") && quant::rounds_rows(device) => {
            kind.tolerance().max(ROUNDED_ROWS_TOLERANCE)
        }
        _ => kind.tolerance(),
    }
}

fn values(tensor: &Tensor) -> anyhow::Result<Vec<f32>> {
    Ok(tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?)
}

/// Against the CPU kernels.
fn compare(got: &Outcome, expected: &Outcome) -> anyhow::Result<Vec<(&'static str, f64)>> {
    let tensors = |a: &Tensor, b: &Tensor| anyhow::Ok(relative_error(&values(a)?, &values(b)?));
    let logits = |got: &[Vec<f32>]| relative_error(&got.concat(), &expected.whole.concat());
    Ok(vec![
        ("tower", tensors(&got.features, &expected.features)?),
        ("connector", tensors(&got.visual_tokens, &expected.visual_tokens)?),
        ("logits, prompt at once and decoded", logits(&got.whole)),
        ("logits, prompt in chunks", logits(&got.chunked)),
        ("logits, beside other sequences", logits(&got.beside_others)),
        ("logits, after a prefix hit", logits(&got.after_a_hit)),
    ])
}

/// Tensors recorded from the original.
struct Golden(HashMap<String, Tensor>);

impl Golden {
    fn read(path: &PathBuf) -> anyhow::Result<Self> {
        let tensors = candle_core::safetensors::load(path, &Device::Cpu);
        Ok(Golden(tensors.with_context(|| format!("cannot read {}", path.display()))?))
    }

    fn tensor(&self, name: &str) -> anyhow::Result<&Tensor> {
        self.0.get(name).with_context(|| format!("the recorded tensors have no {name}"))
    }

    fn ids(&self, name: &str) -> anyhow::Result<Vec<i64>> {
        Ok(self.tensor(name)?.flatten_all()?.to_vec1::<i64>()?)
    }

    /// The recorded request; -200 stands for the video.
    fn case(&self) -> anyhow::Result<Case> {
        let ids = self.ids("input_ids")?;
        let place = ids.iter().position(|&id| id < 0).context("the recorded prompt has no video")?;
        let visual_tokens = self.tensor("connector_out")?.dims().iter().rev().nth(1).copied();
        let visual_tokens = visual_tokens.context("connector_out has no rows")?;
        let mut token_ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        token_ids.splice(place..=place, std::iter::repeat_n(VISUAL_TOKEN, visual_tokens));
        let frames = self.tensor("resized_u8")?;
        let [_, size, _, 3] = *frames.dims() else {
            bail!("resized_u8 is not [frames, size, size, 3]");
        };
        let completion: Vec<u32> = self.ids("greedy_ids")?.iter().map(|&id| id as u32).collect();
        // The last token's own logits were not recorded.
        let completion = completion[..completion.len().saturating_sub(1)].to_vec();
        let rgb = frames.flatten_all()?.to_vec1::<u8>()?;
        Ok(Case { token_ids, frames: FrameBatch { rgb: rgb.into(), size }, completion })
    }

    fn compare(&self, got: &Outcome) -> anyhow::Result<Vec<(&'static str, f64)>> {
        let error = |got: &[f32], name: &str| {
            let recorded = values(self.tensor(name)?)?;
            ensure!(got.len() == recorded.len(), "{name} was recorded for another model");
            Ok(relative_error(got, &recorded))
        };
        Ok(vec![
            ("tower, recorded", error(&values(&got.features)?, "vision_features")?),
            ("connector, recorded", error(&values(&got.visual_tokens)?, "connector_out")?),
            (RECORDED_LOGITS, error(&got.whole.concat(), "greedy_scores")?),
        ])
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        check: CheckArgs,
    }

    fn run(arguments: &[&str]) -> anyhow::Result<()> {
        let fixed = ["check", "--device", "cpu", "--types", "f32,bf16,f16"];
        check(&Cli::parse_from(fixed.iter().chain(arguments)).check)
    }

    #[test]
    fn a_cpu_passes_for_the_embedded_model_and_for_recorded_ones() {
        run(&["--model", "nano"]).unwrap();
        for name in ["tiny", "tiny_bf16_sharded"] {
            let dir = format!("tests/golden/{name}");
            run(&["--model", &dir, "--golden", &format!("{dir}/golden.safetensors")]).unwrap();
        }
    }

    #[test]
    fn a_cpu_passes_with_quantised_weights() {
        for quant in ["q8", "q4"] {
            run(&["--model", "nano", "--quant", quant]).unwrap();
            let dir = "tests/golden/tiny";
            let golden = format!("{dir}/golden.safetensors");
            run(&["--model", dir, "--golden", &golden, "--quant", quant]).unwrap();
        }
    }

    #[test]
    fn recorded_tensors_of_another_model_are_refused() {
        let error =
            run(&["--model", "tests/golden/tiny", "--golden", "tests/golden/pos_tables_f16.safetensors"]);
        assert!(error.unwrap_err().to_string().contains("no input_ids"));
    }
}
