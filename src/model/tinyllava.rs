//! TinyLLaVA-Video: tower, connector and decoder as one model the engine can run.

use super::{
    FrameBatch, KvCache, KvPool, ModelError, ModelShape, Result, StepInput, Tap, Tensor, VideoLanguageModel,
    config::ModelConfig,
    kernels::attention::TILE,
    kv_cache::KvDType,
    layers::{Loader, WeightFormat},
    qwen2::Decoder,
    resampler::Resampler,
    siglip::VisionTower,
    weights::Weights,
};

/// The whole family: R1, ColdStart, SFT and TinyLLaVA-Video differ in their weights and sizes only.
#[derive(Debug)]
pub struct TinyLlava {
    shape: ModelShape,
    vision_tower: VisionTower,
    connector: Resampler,
    language_model: Decoder,
}

impl TinyLlava {
    /// Reads all weights, to be kept as `format`.
    ///
    /// # Errors
    /// When a tensor cannot be read, or the sizes do not suit the CPU kernels.
    pub fn load(weights: &Weights, config: &ModelConfig, format: WeightFormat) -> Result<Self> {
        let head_dim = config.text.head_dim();
        if !head_dim.is_multiple_of(TILE) {
            candle_core::bail!(
                "heads of {head_dim} are not supported: the width of a head must be a multiple of {TILE}"
            );
        }
        weights.check_format(format).map_err(ModelError::wrap)?;
        let loader = Loader::new(weights, format);
        let vision = loader.pp("vision_tower._vision_tower.vision_model");
        Ok(TinyLlava {
            vision_tower: VisionTower::load(&vision, &config.vision)?,
            connector: Resampler::load(&loader.pp("connector._connector"), &config.connector)?,
            language_model: Decoder::load(&loader.pp("language_model"), &config.text, config.context)?,
            shape: shape(config),
        })
    }

    /// Bytes of weights that one decode step reads, however many sequences it holds.
    pub fn decode_bytes(&self) -> usize {
        self.language_model.num_bytes()
    }
}

/// The sizes the engine plans with.
pub fn shape(config: &ModelConfig) -> ModelShape {
    ModelShape {
        vocab_size: config.text.vocab_size,
        hidden_size: config.text.hidden_size,
        context: config.context,
        image_size: config.vision.image_size,
        visual_tokens: config.connector.num_queries,
        num_frames: config.num_frames,
        num_layers: config.text.num_hidden_layers,
        num_kv_heads: config.text.num_key_value_heads,
        head_dim: config.text.head_dim(),
    }
}

impl VideoLanguageModel for TinyLlava {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn block_bytes(&self, kept: KvDType, block_size: usize) -> usize {
        KvCache::block_bytes(&self.shape, kept, block_size)
    }

    fn new_pool(&self, kept: KvDType, num_blocks: usize, block_size: usize) -> Result<KvPool> {
        Ok(KvPool::Host(KvCache::new(&self.shape, kept, num_blocks, block_size)))
    }

    fn encode_frames(
        &mut self,
        frames: &FrameBatch,
        range: std::ops::Range<usize>,
        tap: &mut dyn Tap,
    ) -> Result<Tensor> {
        self.vision_tower.forward(frames, range, tap)
    }

    fn connect(&mut self, features: &Tensor, tap: &mut dyn Tap) -> Result<Tensor> {
        self.connector.forward(features, tap)
    }

    fn forward(&mut self, input: &StepInput, pool: &mut KvPool, tap: &mut dyn Tap) -> Result<Tensor> {
        self.language_model.forward(input, pool.host_mut()?, tap)
    }
}
