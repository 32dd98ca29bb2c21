//! The checkpoint's `config.json`, with the defaults its authors leave out, and the presets of synthetic checkpoints.
//!
//! Read by everything in [`crate::model`]; field names are the checkpoint's own.

/// SigLIP vision tower.
#[derive(Debug, Clone, PartialEq)]
pub struct SiglipConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_channels: usize,
    /// Side of the square input, pixels.
    pub image_size: usize,
    pub patch_size: usize,
    pub layer_norm_eps: f64,
}

impl SiglipConfig {
    /// Patches of one frame.
    pub fn num_patches(&self) -> usize {
        (self.image_size / self.patch_size).pow(2)
    }
}

/// Which connector, by `connector_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectorKind {
    /// `groupresampler`
    Group,
    /// `naiveresampler`
    Naive,
}

/// The resampler between tower and language model.
#[derive(Debug, Clone, PartialEq)]
pub struct ConnectorConfig {
    pub kind: ConnectorKind,
    /// Width of the tower's features.
    pub vision_hidden_size: usize,
    /// Width of the language model (`dim` in model.md).
    pub hidden_size: usize,
    /// Chunks of features (1 for the naive kind).
    pub group: usize,
    pub num_queries: usize,
    pub num_resampler_layers: usize,
}

/// Qwen2 decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Qwen2Config {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub tie_word_embeddings: bool,
}

impl Qwen2Config {
    /// Width of one head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }
}

/// The whole model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub vision: SiglipConfig,
    pub connector: ConnectorConfig,
    pub text: Qwen2Config,
    /// Most tokens of prompt and completion (`tokenizer_model_max_length`).
    pub context: usize,
    /// Frames a video is sampled to when the request does not say.
    pub num_frames: usize,
}
