//! The checkpoint's `config.json`, with the defaults its authors leave out.
//!
//! Read by everything in [`crate::model`]; field names are the checkpoint's own. Refuses values
//! that the network does not implement, and keys that are not known (`config/keys.rs`): nothing
//! after this file asks again. Never opens a path a config names.

mod keys;
mod rope;
mod section;

use serde_json::Value;
use thiserror::Error;

use section::Section;

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
    /// Most tokens of prompt and completion (`tokenizer_model_max_length`, and never more than the decoder's positions).
    pub context: usize,
    /// Frames a video is sampled to when the request does not say. No config says it: one frame a group is what the
    /// group resamplers are trained with, 16 the others.
    pub num_frames: usize,
}

/// What is wrong with a `config.json`: one sentence that names the field.
#[derive(Debug, Error, PartialEq)]
pub enum ConfigError {
    #[error("config.json is not valid JSON: {0}")]
    Json(String),
    #[error("config.json: `{field}` is missing")]
    Missing { field: String },
    #[error("config.json: `{field}` is {found}, expected {expected}")]
    Type { field: String, found: String, expected: String },
    #[error("config.json: `{field}` is {found}, only {supported} is supported")]
    Unsupported { field: String, found: String, supported: String },
    #[error(
        "config.json: `{field}` is {found}, which this server does not know and which may change what the model computes; \
         if it does not, remove it from config.json"
    )]
    Unknown { field: String, found: String },
    #[error("config.json: {0}")]
    Inconsistent(String),
}

/// Frames of a video where the connector does not fix them.
const DEFAULT_NUM_FRAMES: usize = 16;
/// No width or count of a config is larger, so that the elements of a tensor can be counted in 64 bits.
const MAX_DIMENSION: usize = 1 << 22;
/// Most layers of a part.
const MAX_LAYERS: usize = 1024;
/// Largest side of a picture, pixels.
const MAX_SIDE: usize = 4096;

impl ModelConfig {
    /// From the text of a published `config.json`.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let root: Value = serde_json::from_str(text).map_err(|e| ConfigError::Json(e.to_string()))?;
        let map = root.as_object().ok_or_else(|| ConfigError::Json("not an object".into()))?;
        let root = Section { prefix: String::new(), map };
        root.only_str("model_type", "tinyllava")?;
        let vision = vision_config(&root.section("vision_config")?)?;
        let text = text_config(&root, &root.section("text_config")?)?;
        let connector = connector_config(&root, &vision, &text)?;
        keys::ROOT.check(&root)?;
        let max_length = match root.map.get("tokenizer_model_max_length") {
            // Null: the original does not truncate.
            Some(Value::Null) => usize::MAX,
            // A tokenizer without a length limit gives 10^30.
            _ => root.positive("tokenizer_model_max_length", 2048.0)? as usize,
        };
        let config = ModelConfig {
            num_frames: match connector.kind {
                ConnectorKind::Group => connector.group,
                ConnectorKind::Naive => DEFAULT_NUM_FRAMES,
            },
            context: max_length.clamp(1, text.max_position_embeddings),
            vision,
            connector,
            text,
        };
        config.check()?;
        Ok(config)
    }

    /// What the shapes of one part ask of another.
    fn check(&self) -> Result<(), ConfigError> {
        let (vision, connector, text) = (&self.vision, &self.connector, &self.text);
        let holds =
            |ok: bool, sentence: String| if ok { Ok(()) } else { Err(ConfigError::Inconsistent(sentence)) };
        let divides = |what: &str, n: usize, by: &str, d: usize| {
            holds(n.is_multiple_of(d), format!("`{what}` ({n}) is not a multiple of `{by}` ({d})"))
        };
        divides(
            "vision_config.hidden_size",
            vision.hidden_size,
            "vision_config.num_attention_heads",
            vision.num_attention_heads,
        )?;
        divides(
            "text_config.hidden_size",
            text.hidden_size,
            "text_config.num_attention_heads",
            text.num_attention_heads,
        )?;
        divides(
            "text_config.num_attention_heads",
            text.num_attention_heads,
            "text_config.num_key_value_heads",
            text.num_key_value_heads,
        )?;
        divides("num_queries", connector.num_queries, "group", connector.group)?;
        holds(
            text.head_dim().is_multiple_of(2),
            format!(
                "the head width of `text_config` ({}) is odd: rotary positions need an even one",
                text.head_dim()
            ),
        )?;
        holds(
            connector.hidden_size.is_multiple_of(2),
            format!(
                "`hidden_size` ({}) is odd: sinusoidal positions need an even one",
                connector.hidden_size
            ),
        )?;
        // The first patch of every frame is dropped, so one patch would leave nothing.
        holds(
            vision.patch_size <= vision.image_size && vision.num_patches() >= 2,
            format!(
                "`vision_config.image_size` ({}) holds fewer than two patches of `vision_config.patch_size` ({})",
                vision.image_size, vision.patch_size
            ),
        )
    }
}

fn vision_config(section: &Section) -> Result<SiglipConfig, ConfigError> {
    section.only_str("model_type", "siglip_vision_model")?;
    section.only_str("hidden_act", "gelu_pytorch_tanh")?;
    let config = SiglipConfig {
        hidden_size: section.dimension("hidden_size", Some(768))?,
        intermediate_size: section.dimension("intermediate_size", Some(3072))?,
        num_hidden_layers: section.bounded("num_hidden_layers", Some(12), MAX_LAYERS)?,
        num_attention_heads: section.dimension("num_attention_heads", Some(12))?,
        num_channels: section.dimension("num_channels", Some(3))?,
        image_size: section.bounded("image_size", Some(224), MAX_SIDE)?,
        patch_size: section.bounded("patch_size", Some(16), MAX_SIDE)?,
        layer_norm_eps: section.positive("layer_norm_eps", 1e-6)?,
    };
    section.only(config.num_channels == 3, "num_channels", "3")?;
    keys::VISION.check(section)?;
    Ok(config)
}

fn text_config(root: &Section, section: &Section) -> Result<Qwen2Config, ConfigError> {
    section.only_str("model_type", "qwen2")?;
    section.only_str("hidden_act", "silu")?;
    section.only(!section.flag("use_sliding_window", false)?, "use_sliding_window", "false")?;
    section.only(!section.flag("use_mrope", false)?, "use_mrope", "false")?;
    let num_attention_heads = section.dimension("num_attention_heads", Some(32))?;
    // A null is not the default here: it means a head of keys and values for each head of queries.
    let no_groups = section.map.get("num_key_value_heads").is_some_and(Value::is_null);
    let default_heads = if no_groups { num_attention_heads } else { 32 };
    let config = Qwen2Config {
        hidden_size: section.dimension("hidden_size", Some(4096))?,
        intermediate_size: section.dimension("intermediate_size", Some(22016))?,
        num_hidden_layers: section.bounded("num_hidden_layers", Some(32), MAX_LAYERS)?,
        num_attention_heads,
        num_key_value_heads: section.dimension("num_key_value_heads", Some(default_heads))?,
        vocab_size: section.dimension("vocab_size", Some(151_936))?,
        max_position_embeddings: section.dimension("max_position_embeddings", Some(32_768))?,
        rms_norm_eps: section.positive("rms_norm_eps", 1e-6)?,
        rope_theta: rope::theta(root, section)?,
        tie_word_embeddings: section.flag("tie_word_embeddings", false)?,
    };
    let head_dim = section.dimension("head_dim", Some(config.head_dim().max(1)))?;
    section.only(head_dim == config.head_dim(), "head_dim", "hidden_size / num_attention_heads")?;
    rope::check_layer_types(section, config.num_hidden_layers)?;
    keys::TEXT.check(section)?;
    Ok(config)
}

fn connector_config(
    root: &Section,
    vision: &SiglipConfig,
    text: &Qwen2Config,
) -> Result<ConnectorConfig, ConfigError> {
    let kind = match root.string("connector_type")? {
        Some("groupresampler") => ConnectorKind::Group,
        Some("naiveresampler") => ConnectorKind::Naive,
        Some(_) => return Err(root.unsupported("connector_type", "groupresampler or naiveresampler")),
        None => return Err(root.missing("connector_type")),
    };
    root.only(root.integer("vision_feature_layer")?.is_none_or(|l| l == -2), "vision_feature_layer", "-2")?;
    root.only_str("vision_feature_select_strategy", "patch")?;
    // The original pads pictures that it takes from files, and never a frame of a video.
    let is_known = root.string("image_aspect_ratio")?.is_none_or(|ratio| ["square", "pad"].contains(&ratio));
    root.only(is_known, "image_aspect_ratio", "square or pad")?;
    root.only(root.integer("image_token_index")?.is_none_or(|i| i == -200), "image_token_index", "-200")?;
    for (field, width, of) in [
        ("hidden_size", text.hidden_size, "text_config.hidden_size"),
        ("vision_hidden_size", vision.hidden_size, "vision_config.hidden_size"),
    ] {
        let found = root.dimension(field, Some(width))?;
        if found != width {
            return Err(ConfigError::Inconsistent(format!("`{field}` is {found} but `{of}` is {width}")));
        }
    }
    Ok(ConnectorConfig {
        kind,
        vision_hidden_size: vision.hidden_size,
        hidden_size: text.hidden_size,
        group: if kind == ConnectorKind::Group { root.dimension("group", None)? } else { 1 },
        num_queries: root.dimension("num_queries", None)?,
        num_resampler_layers: root.bounded("num_resampler_layers", None, MAX_LAYERS)?,
    })
}

#[cfg(test)]
mod tests;
