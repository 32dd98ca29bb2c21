//! From the command line to the GPU a model runs on, if it runs on one.
//!
//! Called by `start.rs`, `check.rs` and `doctor`. Refuses flags that are for the CPU kernels only.

use anyhow::{Context, bail};
use candle_core::Device;

use super::options::{DType, KvCacheDType, ModelOptions};
use crate::{
    config::EngineConfig,
    model::{layers::Bits, placement},
};

/// Frames encoded in one step unless the command line says: a whole video.
const ENCODE_FRAMES: usize = 16;
/// Prompt tokens computed in one step unless the command line says: most prompts at once.
const PREFILL_TOKENS: usize = 2048;

/// A device and what the model computes in there.
#[derive(Debug, Clone)]
pub struct Target {
    pub device: Device,
    pub dtype: candle_core::DType,
    /// What the decoder's matrices are quantised to; only where the command line says so.
    pub quant: Option<Bits>,
}

impl Target {
    /// The GPU of `--device`; none is the CPU.
    ///
    /// # Errors
    /// When it cannot be used, or with flags that have no meaning there.
    pub fn of(options: &ModelOptions) -> anyhow::Result<Option<Target>> {
        let Some(device) = options.device.open()? else {
            return Ok(None);
        };
        if options.kv_cache_dtype != KvCacheDType::Auto {
            bail!(
                "--kv-cache-dtype is for the CPU (a GPU keeps keys and values as --dtype says): leave it out"
            );
        }
        let dtype = match options.dtype {
            DType::Auto => {
                placement::native_dtype(&device).context("cannot ask the GPU what it computes in")?
            }
            DType::F32 => candle_core::DType::F32,
            DType::Bf16 => candle_core::DType::BF16,
            DType::F16 => candle_core::DType::F16,
        };
        Ok(Some(Target { device, dtype, quant: options.quant.bits() }))
    }

    /// Name, type and quantisation, for people.
    pub fn describe(&self) -> anyhow::Result<String> {
        let quant = self.quant.map(|bits| format!(", weights in {}", bits.name())).unwrap_or_default();
        Ok(format!("{} in {}{quant}", placement::name(&self.device)?, self.dtype.as_str()))
    }

    /// `config` for a device that holds the weights already: the cache takes what they leave.
    ///
    /// # Errors
    /// When the driver does not answer.
    pub fn engine(&self, options: &ModelOptions, config: EngineConfig) -> anyhow::Result<EngineConfig> {
        let mut config = config;
        if config.max_encode_frames == 0 {
            config.max_encode_frames = ENCODE_FRAMES;
        }
        if config.max_prefill_tokens == 0 {
            config.max_prefill_tokens = PREFILL_TOKENS;
        }
        if options.kv_cache_mib.is_none()
            && let Some(bytes) = placement::cache_bytes(&self.device, options.gpu_memory_utilization)
                .context("cannot ask the GPU for its free memory")?
        {
            config.kv_cache_bytes = bytes;
        }
        Ok(config)
    }
}
