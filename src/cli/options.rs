//! Command line options that several commands share, and what they become.

use std::path::PathBuf;

use clap::{
    Args, ValueEnum,
    builder::{PossibleValuesParser, TypedValueParser},
};

use crate::{
    config::{EngineConfig, HwAccel, MediaConfig, ReasoningField},
    model::{
        checkpoint::ModelSpec,
        layers::{Bits, WeightFormat},
        placement::Placement,
        variant::Variant,
        weights::{StoredDType, Weights},
    },
};

/// Which model to run, and with how much of the machine.
#[derive(Debug, Clone, Args)]
pub struct ModelOptions {
    /// nano (embedded), synth:PRESET (random weights), a checkpoint directory, or a Hugging Face repository
    /// (org/name, or org/name@revision).
    #[arg(long, default_value = "nano", env = "TINYLLAVA_MODEL")]
    pub model: ModelSpec,
    /// Where it runs: auto (a GPU, where this binary can use one), cpu, or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value_t = Placement::Auto, env = "TINYLLAVA_DEVICE")]
    pub device: Placement,
    /// Which published model it is trained like: frame sampling and thinking by default [default: by the repository's or
    /// directory's name].
    #[arg(long, value_name = "VARIANT", value_parser = variant_parser())]
    pub variant: Option<Variant>,
    /// What weights are kept as where they are not quantised; "auto": as they are stored. Arithmetic is then f32. On a
    /// GPU also what is computed in; "auto": bf16, or f16 before compute capability 8.
    #[arg(long, value_enum, default_value_t = DType::Auto)]
    pub dtype: DType,
    /// Quantise the weights while loading: to 8 bits, or to 4 (the decoder's; the rest to 8). "auto": as a quantised
    /// checkpoint is, else q8, or none when --dtype says what to keep or the model runs on a GPU.
    #[arg(long, value_enum, default_value_t = Quant::Auto)]
    pub quant: Quant,
    /// Threads for the model [default: the cores this process may use, by affinity and CPU quota].
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Memory for the KV cache, MiB [default: 1024; on a GPU what --gpu-memory-utilization leaves].
    #[arg(long, value_name = "MIB")]
    pub kv_cache_mib: Option<usize>,
    /// Share of a GPU's memory to use, for weights and KV cache; the rest is for a step's own tensors.
    #[arg(long, value_name = "SHARE", default_value_t = 0.9, value_parser = share)]
    pub gpu_memory_utilization: f64,
    /// What the KV cache keeps keys and values as. "auto": f16 when the weights are quantised, else f32.
    #[arg(long, value_enum, default_value_t = KvCacheDType::Auto)]
    pub kv_cache_dtype: KvCacheDType,
    /// Longest prompt and reply together, tokens [default: the checkpoint's].
    #[arg(long, value_name = "N")]
    pub max_model_len: Option<usize>,
    /// The ffmpeg program [default: the one on PATH].
    #[arg(long, value_name = "FILE", conflicts_with = "download_ffmpeg")]
    pub ffmpeg: Option<PathBuf>,
    /// Let a GPU decode videos: none, or cuda:N (NVDEC, by an ffmpeg that can use it). What it cannot decode, the processor
    /// does.
    #[arg(long, value_name = "HWACCEL", default_value_t = HwAccel::None, env = "TINYLLAVA_HWACCEL")]
    pub hwaccel: HwAccel,
    /// Fetch ffmpeg when it is not installed.
    #[arg(long)]
    pub download_ffmpeg: bool,
}

/// Element type of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DType {
    Auto,
    F32,
    Bf16,
    F16,
}

/// Quantisation of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Quant {
    Auto,
    None,
    Q8,
    Q4,
}

impl Quant {
    /// How many bits, where they are said.
    pub fn bits(self) -> Option<Bits> {
        match self {
            Quant::Auto | Quant::None => None,
            Quant::Q8 => Some(Bits::Eight),
            Quant::Q4 => Some(Bits::Four),
        }
    }
}

/// Element type of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvCacheDType {
    Auto,
    F32,
    F16,
}

/// For the CPU.
const DEFAULT_KV_CACHE_MIB: usize = 1024;

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| "give a number above 0 and up to 1".into())
}

fn variant_parser() -> impl TypedValueParser<Value = Variant> {
    PossibleValuesParser::new(Variant::ALL.map(Variant::name))
        .map(|name| name.parse().expect("a possible value is a variant: this is a bug"))
}

pub(super) fn reasoning_field_parser() -> impl TypedValueParser<Value = ReasoningField> {
    PossibleValuesParser::new(ReasoningField::ALL.map(ReasoningField::name))
        .map(|name| name.parse().expect("a possible value is a field: this is a bug"))
}

impl ModelOptions {
    /// What matrices are kept as.
    pub fn weight_format(&self, weights: &Weights) -> WeightFormat {
        let floats = match self.dtype {
            DType::Auto => WeightFormat::AsStored,
            DType::F32 => WeightFormat::Float(StoredDType::F32),
            DType::Bf16 => WeightFormat::Float(StoredDType::Bf16),
            DType::F16 => WeightFormat::Float(StoredDType::F16),
        };
        match self.quant {
            // As they are stored; else 8 bits: measured to answer as many of nano's 500 questions right as floats do, in
            // other words once.
            Quant::Auto if self.dtype == DType::Auto => {
                WeightFormat::Quant(weights.quantised().unwrap_or(Bits::Eight))
            }
            Quant::Q8 => WeightFormat::Quant(Bits::Eight),
            Quant::Q4 => WeightFormat::Quant(Bits::Four),
            Quant::Auto | Quant::None => floats,
        }
    }

    /// Whether matrices are quantised, to however many bits.
    pub fn quantises(&self) -> bool {
        match self.quant {
            Quant::Auto => self.dtype == DType::Auto,
            Quant::None => false,
            Quant::Q8 | Quant::Q4 => true,
        }
    }

    /// The published model this one is trained like, if it is known.
    pub fn variant(&self) -> Option<Variant> {
        self.variant.or_else(|| Variant::of(&self.model))
    }

    /// Whether a question that does not say is to be thought about: unknown models are taken for R1's kind.
    pub fn thinks(&self) -> bool {
        self.variant().is_none_or(Variant::thinks)
    }

    /// `engine` with what was said on the command line.
    pub fn engine(&self, engine: EngineConfig) -> EngineConfig {
        EngineConfig {
            kv_cache_bytes: self.kv_cache_mib.unwrap_or(DEFAULT_KV_CACHE_MIB) << 20,
            kv_cache_in_16_bits: match self.kv_cache_dtype {
                // Measured to change a word in 2 of nano's 500 replies, and no answer.
                KvCacheDType::Auto => self.quantises(),
                KvCacheDType::F32 => false,
                KvCacheDType::F16 => true,
            },
            max_context_tokens: self.max_model_len.unwrap_or(0),
            ..engine
        }
    }

    /// `media` with what was said on the command line.
    pub fn media(&self, media: MediaConfig) -> MediaConfig {
        MediaConfig {
            ffmpeg_path: self.ffmpeg.clone(),
            hwaccel: self.hwaccel,
            default_fps: self.variant().and_then(Variant::fps),
            ..media
        }
    }
}
