//! The model's files by their headers, and the memory it and its caches will take.
//!
//! Called by `doctor`. Reads configs, headers and tables of contents. Of the weights it reads
//! only a stored head of a tied model, to compare it with the embeddings. Never uses the
//! network.

use std::path::Path;

use super::{Finding, memory};
use crate::{
    cli::{options::ModelOptions, target::Target},
    config::Config,
    model::{
        KvCache, ModelShape,
        checkpoint::{Checkpoint, CheckpointError, ModelSpec},
        device::quant,
        hub::{HubConfig, HubError},
        kv_cache::KvDType,
        layers::{Bits, WeightFormat},
        placement, tinyllava,
    },
};

/// `models`: the same on each device, at least one.
pub fn check(models: &[ModelOptions], config: &Config) -> Vec<Finding> {
    let options = &models[0];
    let checkpoint = match Checkpoint::open(&options.model) {
        Ok(checkpoint) => checkpoint,
        Err(CheckpointError::Hub(HubError::NotDownloaded { repo })) => {
            let found = format!("{repo} is not on this machine");
            let hub = HubConfig::from_variables(|name| std::env::var(name).ok());
            if hub.is_ok_and(|hub| hub.offline) {
                let fix =
                    "HF_HUB_OFFLINE forbids to download it: unset it, or mount a directory with the model";
                return vec![Finding::problem("model", found, fix)];
            }
            let fix =
                "`serve` downloads it first; start it once with the network, or mount a directory with it";
            return vec![Finding::warning("model", found, fix)];
        }
        Err(error) => return vec![Finding::problem("model", error.to_string(), fix_of(&options.model))],
    };
    let shape = tinyllava::shape(&checkpoint.config);
    let weights = &checkpoint.weights;
    let format = options.weight_format(weights);
    let targets: Vec<_> = models.iter().map(Target::of).collect();
    let opened = targets.iter().filter_map(|target| target.as_ref().ok());
    let mut refusals = opened.filter_map(|target| refused(&checkpoint, target.as_ref(), format));
    if let Some(problem) = refusals.next() {
        return vec![problem];
    }
    let stored = weights.quantised().map_or(weights.dtype().name(), Bits::name);
    let found = format!(
        "{}: {:.1} million parameters in {stored}, all tensors there with the right shapes",
        checkpoint.id,
        checkpoint.config.num_parameters() as f64 / 1e6,
    );
    let mut findings = vec![Finding::ok("model", found)];
    let mut num_on_cpu = 0;
    for (options, target) in models.iter().zip(targets) {
        match target {
            Ok(None) => num_on_cpu += 1,
            Ok(Some(target)) => {
                let bytes = quant::weight_bytes(&checkpoint.config, target.dtype, target.quant);
                findings.push(on_device(&target, options, bytes));
            }
            Err(error) => {
                let fix = "give --device cpu, or the flags the message names";
                findings.push(Finding::problem("device", error.to_string(), fix));
            }
        }
    }
    if num_on_cpu == 0 {
        return findings;
    }
    findings.push(kv_cache(&shape, config));
    let an_engine = kv_bytes(&shape, config) + encoder_cache_bytes(&shape, config);
    findings.extend(memory::available_bytes(Path::new("/")).map(|available| {
        let caches = num_on_cpu * an_engine + config.media.frame_cache_bytes as u64;
        fits(num_on_cpu * weights.kept_bytes(format), caches, available)
    }));
    findings
}

/// Whether the weights and something more fit a GPU.
fn on_device(target: &Target, options: &ModelOptions, weights_bytes: u64) -> Finding {
    let described = target.describe().unwrap_or_else(|error| error.to_string());
    match placement::cache_bytes(&target.device, options.gpu_memory_utilization) {
        Ok(Some(room)) if (room as u64) <= weights_bytes => {
            let found = format!("{described}: {} MiB for {} MiB of weights", room >> 20, weights_bytes >> 20);
            let fix = match target.quant {
                None => {
                    "the model does not fit: free the GPU, raise --gpu-memory-utilization, or give --quant q8 or q4"
                }
                Some(_) => {
                    "the model does not fit: free the GPU, raise --gpu-memory-utilization, or take a larger one"
                }
            };
            Finding::problem("device", found, fix)
        }
        Ok(_) => Finding::ok("device", format!("{described}, {} MiB of weights", weights_bytes >> 20)),
        Err(error) => Finding::problem("device", error.to_string(), "see what nvidia-smi says"),
    }
}

/// What keeps these weights from being kept as asked, on the device or, where there is none, by the CPU kernels.
fn refused(checkpoint: &Checkpoint, target: Option<&Target>, format: WeightFormat) -> Option<Finding> {
    let (weights, config) = (&checkpoint.weights, &checkpoint.config);
    let problem = |error: String, fix: &str| Some(Finding::problem("model", error, fix));
    match target {
        Some(target) => match quant::check(weights, config, target.quant) {
            Ok(()) => None,
            Err(error) => problem(error.to_string(), "`serve` would say the same"),
        },
        None => match weights.check_format(format) {
            Ok(()) => None,
            Err(error) => problem(error.to_string(), "leave out --quant and --dtype"),
        },
    }
}

fn fix_of(model: &ModelSpec) -> &'static str {
    match model {
        ModelSpec::Hub(_) => "delete its folder under HF_HOME and download it again",
        _ => "copy the checkpoint again, or give another --model",
    }
}

/// The engine takes no more blocks than all its sequences can fill.
fn kv_bytes(shape: &ModelShape, config: &Config) -> u64 {
    let engine = &config.engine;
    let block_bytes = block_bytes(shape, config) as u64;
    let most_useful =
        engine.max_running_sequences as u64 * 2 * context(shape, config).div_ceil(engine.block_size as u64);
    (engine.kv_cache_bytes as u64).min(most_useful.saturating_mul(block_bytes))
}

fn block_bytes(shape: &ModelShape, config: &Config) -> usize {
    let dtype = KvDType::new(config.engine.kv_cache_in_16_bits);
    KvCache::block_bytes(shape, dtype, config.engine.block_size)
}

fn context(shape: &ModelShape, config: &Config) -> u64 {
    let asked = config.engine.max_context_tokens;
    (if asked == 0 { shape.context } else { asked.min(shape.context) }) as u64
}

/// Encoded videos are kept in f32.
fn encoder_cache_bytes(shape: &ModelShape, config: &Config) -> u64 {
    (config.engine.max_cached_videos * shape.visual_tokens * shape.hidden_size * size_of::<f32>()) as u64
}

fn kv_cache(shape: &ModelShape, config: &Config) -> Finding {
    let block = config.engine.block_size;
    let token_bytes = block_bytes(shape, config) / block;
    let tokens = config.engine.kv_cache_bytes / (token_bytes * block) * block;
    let context = context(shape, config);
    let found = format!("{tokens} tokens of {token_bytes} bytes; one request may take {context}");
    let needed = (context * token_bytes as u64).div_ceil(1 << 20);
    if tokens == 0 {
        return Finding::problem(
            "kv cache",
            "no room for one block",
            format!("give --kv-cache-mib {needed}"),
        );
    }
    if (tokens as u64) < context {
        let fix =
            format!("longer requests are refused: give --kv-cache-mib {needed}, or a lower --max-model-len");
        return Finding::warning("kv cache", found, fix);
    }
    Finding::ok("kv cache", found)
}

fn fits(weights: u64, caches: u64, available: u64) -> Finding {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let found = format!(
        "{} MiB for weights and {} MiB for caches, of {} MiB available",
        mib(weights),
        mib(caches),
        mib(available)
    );
    if weights > available {
        let fix = "the model does not fit: use --quant q4, or a machine or memory limit with more";
        return Finding::problem("memory", found, fix);
    }
    if weights.saturating_add(caches) > available {
        // Pages of caches are taken when they are first written.
        let fix = "the server starts, but is killed when its caches fill: lower --kv-cache-mib, or give it more memory";
        return Finding::warning("memory", found, fix);
    }
    Finding::ok("memory", found)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::{super::Level, *};
    use crate::model::{
        config::ModelConfig,
        presets::Preset,
        quantised::write_quantised,
        weights::{StoredDType, Weights},
    };

    #[test]
    fn a_token_of_the_published_model_takes_36_kib_of_cache_in_16_bits() {
        let shape = tinyllava::shape(&ModelConfig::preset(Preset::R1));
        assert_eq!(KvCache::block_bytes(&shape, KvDType::F16, 16) / 16, 36_864);
        assert_eq!(KvCache::block_bytes(&shape, KvDType::F32, 16) / 16, 2 * 36_864);
    }

    #[test]
    fn weights_must_fit_and_caches_should() {
        for (weights, caches, level) in [
            (60, 40, Level::Ok),
            (60, 41, Level::Warning),
            (101, 0, Level::Problem),
            (1, u64::MAX, Level::Warning),
        ] {
            assert_eq!(fits(weights, caches, 100).level, level, "{weights} {caches}");
        }
    }

    #[test]
    fn a_cache_below_a_block_is_a_problem_and_below_the_context_a_warning() {
        let shape = tinyllava::shape(&ModelConfig::preset(Preset::R1));
        let level = |mib: usize| {
            let mut config = Config::default();
            config.engine.kv_cache_bytes = mib << 20;
            kv_cache(&shape, &config).level
        };
        assert_eq!([level(1), level(64), level(1 << 20)], [Level::Problem, Level::Warning, Level::Ok]);
    }

    #[test]
    fn what_a_gpu_does_not_read_is_said_first() {
        let dir = tempfile::tempdir().unwrap();
        let (nano, out) = (Checkpoint::open(&ModelSpec::Nano).unwrap(), dir.path().join("nano-q8"));
        write_quantised(&nano, Bits::Eight, &out, &mut |_| ()).unwrap();
        let made = Checkpoint::open_directory("made".into(), &out).unwrap();
        let gpu = |quant| Target { device: Device::Cpu, dtype: DType::F32, quant };
        let format = WeightFormat::Quant(Bits::Eight);
        for quant in [None, Some(Bits::Eight)] {
            let problem = refused(&made, Some(&gpu(quant)), format).unwrap();
            assert!(problem.level == Level::Problem && problem.found.contains("--quant q8"), "{problem:?}");
            assert_eq!(refused(&nano, Some(&gpu(quant)), format), None);
        }
        assert_eq!(refused(&made, None, format), None);
        assert!(refused(&made, None, WeightFormat::AsStored).is_some());
    }

    #[test]
    fn another_format_takes_another_size() {
        let config = ModelConfig::preset(Preset::R1);
        let weights = Weights::synthetic(&config, 0);
        let bytes = |format| weights.kept_bytes(format);
        let stored = bytes(WeightFormat::AsStored);
        // All but the vectors, which are f32 in either.
        assert!(2 * stored - bytes(WeightFormat::Float(StoredDType::F32)) < stored / 500);
        let (eight, four) = (bytes(WeightFormat::Quant(Bits::Eight)), bytes(WeightFormat::Quant(Bits::Four)));
        assert!(eight > stored / 2 && eight < stored * 6 / 10, "{eight} of {stored}");
        assert!(four > stored / 4 && four < stored / 2, "{four} of {stored}");
    }
}
