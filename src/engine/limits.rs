//! What fits: from the model's sizes and the configured memory to the limits of an engine.
//!
//! Called once, when the engine starts.

use super::handle::EngineLimits;
use crate::{
    config::EngineConfig,
    model::{KvDType, VideoLanguageModel},
};

/// Blocks and context for `model` under `config`; no blocks when there is no room for one.
pub(super) fn engine_limits(model: &dyn VideoLanguageModel, config: &EngineConfig) -> EngineLimits {
    let shape = model.shape();
    let block_bytes = model.block_bytes(KvDType::new(config.kv_cache_in_16_bits), config.block_size);
    let asked = if config.max_context_tokens == 0 { shape.context } else { config.max_context_tokens };
    // More than every running sequence can hold is never used.
    let context = asked.min(shape.context).max(1);
    let most_useful = (config.max_running_sequences * 2) * context.div_ceil(config.block_size);
    let num_blocks = (config.kv_cache_bytes / block_bytes).min(most_useful);
    let fits = num_blocks * config.block_size;
    if fits < context {
        tracing::warn!(
            context,
            fits,
            "the KV cache holds less than the context; requests are limited to what fits"
        );
    }
    EngineLimits {
        context: context.min(fits),
        num_blocks,
        block_size: config.block_size,
        max_running: config.max_running_sequences,
        max_waiting: config.max_waiting_sequences,
        visual_tokens: shape.visual_tokens,
        max_videos: config.max_cached_videos,
        image_size: shape.image_size,
    }
}
