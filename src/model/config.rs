//! The checkpoint's `config.json`, with the defaults its authors leave out.
//!
//! Read by everything in [`crate::model`]; field names are the checkpoint's own. A value the network does not
//! implement is refused here: nothing after this file asks again. Never opens a path a config names.

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
        let root = Section { prefix: "", map };
        root.only_str("model_type", "tinyllava")?;
        let vision = vision_config(&root.section("vision_config")?)?;
        let text = text_config(&root.section("text_config")?)?;
        let connector = connector_config(&root, &vision, &text)?;
        // A tokenizer without a length of its own says 10^30.
        let max_length = root.positive("tokenizer_model_max_length", 2048.0)? as usize;
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
    Ok(config)
}

fn text_config(section: &Section) -> Result<Qwen2Config, ConfigError> {
    section.only_str("model_type", "qwen2")?;
    section.only_str("hidden_act", "silu")?;
    section.only(!section.flag("use_sliding_window", false)?, "use_sliding_window", "false")?;
    section.only(!section.flag("use_mrope", false)?, "use_mrope", "false")?;
    for field in ["rope_scaling", "quantization_config"] {
        section.only(section.get(field).is_none(), field, "null")?;
    }
    let config = Qwen2Config {
        hidden_size: section.dimension("hidden_size", Some(4096))?,
        intermediate_size: section.dimension("intermediate_size", Some(22016))?,
        num_hidden_layers: section.bounded("num_hidden_layers", Some(32), MAX_LAYERS)?,
        num_attention_heads: section.dimension("num_attention_heads", Some(32))?,
        num_key_value_heads: section.dimension("num_key_value_heads", Some(32))?,
        vocab_size: section.dimension("vocab_size", Some(151_936))?,
        max_position_embeddings: section.dimension("max_position_embeddings", Some(32_768))?,
        rms_norm_eps: section.positive("rms_norm_eps", 1e-6)?,
        rope_theta: section.positive("rope_theta", 10_000.0)?,
        tie_word_embeddings: section.flag("tie_word_embeddings", false)?,
    };
    let head_dim = section.dimension("head_dim", Some(config.head_dim().max(1)))?;
    section.only(head_dim == config.head_dim(), "head_dim", "hidden_size / num_attention_heads")?;
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
    root.only_str("image_aspect_ratio", "square")?;
    root.only(root.integer("image_token_index")?.is_none_or(|i| i == -200), "image_token_index", "-200")?;
    root.only(root.get("quantization_config").is_none(), "quantization_config", "null")?;
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
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const TINY: &str = include_str!("../../tests/golden/tiny/config.json");

    /// The golden config with one field, by JSON pointer, replaced; `null` is the same as leaving it out.
    fn with(pointer: &str, value: Value) -> Result<ModelConfig, ConfigError> {
        let mut root: Value = serde_json::from_str(TINY).unwrap();
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        root.pointer_mut(parent).unwrap()[field] = value;
        ModelConfig::from_json(&root.to_string())
    }

    #[test]
    fn the_golden_config_reads_with_class_defaults() {
        let config = ModelConfig::from_json(TINY).unwrap();
        assert_eq!((config.context, config.num_frames), (3072, 4));
        assert_eq!((config.vision.num_patches(), config.vision.num_channels), (16, 3));
        assert_eq!(
            (config.text.rms_norm_eps, config.text.rope_theta, config.text.head_dim()),
            (1e-6, 1e6, 16)
        );
        assert_eq!((config.connector.kind, config.connector.group), (ConnectorKind::Group, 4));
    }

    #[test]
    fn left_out_values_are_the_class_defaults() {
        let text = json!({
            "connector_type": "naiveresampler", "num_queries": 512, "num_resampler_layers": 3,
            "text_config": {}, "vision_config": {},
        });
        let config = ModelConfig::from_json(&text.to_string()).unwrap();
        let (vision, text) = (&config.vision, &config.text);
        assert_eq!((vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers), (768, 3072, 12));
        assert_eq!((vision.image_size, vision.patch_size, vision.layer_norm_eps), (224, 16, 1e-6));
        assert_eq!((text.hidden_size, text.intermediate_size, text.num_hidden_layers), (4096, 22_016, 32));
        assert_eq!((text.vocab_size, text.rope_theta, text.tie_word_embeddings), (151_936, 1e4, false));
        assert_eq!((config.connector.group, config.num_frames, config.context), (1, 16, 2048));
    }

    #[test]
    fn a_tokenizer_without_a_length_leaves_the_positions_of_the_decoder() {
        assert_eq!(with("/tokenizer_model_max_length", json!(1e30)).unwrap().context, 32_768);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (pointer, value) in [
            ("/connector_type", json!("mlp2x_gelu")),
            ("/connector_type", json!(null)),
            ("/vision_feature_layer", json!(-1)),
            ("/vision_feature_select_strategy", json!("cls_patch")),
            ("/image_aspect_ratio", json!("pad")),
            ("/image_token_index", json!(32_000)),
            ("/model_type", json!("llava")),
            ("/quantization_config", json!({"bits": 4})),
            ("/group", json!(null)),
            ("/group", json!(3)),
            ("/num_queries", json!("many")),
            ("/hidden_size", json!(65)),
            ("/vision_hidden_size", json!(65)),
            ("/tokenizer_model_max_length", json!(-1)),
            ("/text_config", json!(null)),
            ("/text_config/model_type", json!("llama")),
            ("/text_config/hidden_act", json!("gelu")),
            ("/text_config/use_sliding_window", json!(true)),
            ("/text_config/rope_scaling", json!({"type": "yarn"})),
            ("/text_config/num_attention_heads", json!(5)),
            ("/text_config/num_attention_heads", json!(0)),
            ("/text_config/num_key_value_heads", json!(3)),
            ("/text_config/head_dim", json!(32)),
            ("/text_config/num_hidden_layers", json!(1e9)),
            ("/text_config/rope_theta", json!(0)),
            ("/text_config/tie_word_embeddings", json!("yes")),
            ("/vision_config", json!([])),
            ("/vision_config/model_type", json!("clip_vision_model")),
            ("/vision_config/hidden_act", json!("quick_gelu")),
            ("/vision_config/num_channels", json!(1)),
            ("/vision_config/num_attention_heads", json!(7)),
            ("/vision_config/patch_size", json!(64)),
        ] {
            let error = with(pointer, value.clone()).expect_err(pointer).to_string();
            let field = pointer.rsplit('/').next().unwrap();
            assert!(
                error.starts_with("config.json") && error.contains(field),
                "{pointer} = {value}: {error}"
            );
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-3i64..40).prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[a-z_]{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(2, 8, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                prop::collection::btree_map("[a-z]{1,4}", inner, 0..3)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn mutated_configs_never_panic(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any_json()), 1..4),
            removed in prop::collection::vec(any::<prop::sample::Index>(), 0..3),
        ) {
            let mut root: Value = serde_json::from_str(TINY).unwrap();
            for (index, value) in edits {
                let part = match index.index(3) { 0 => "", 1 => "/text_config", _ => "/vision_config" };
                if let Some(map) = root.pointer_mut(part).and_then(Value::as_object_mut) && !map.is_empty() {
                    let key = map.keys().nth(index.index(map.len())).unwrap().clone();
                    map.insert(key, value);
                }
            }
            for index in removed {
                let map = root.as_object_mut().unwrap();
                let key = map.keys().nth(index.index(map.len())).unwrap().clone();
                map.remove(&key);
            }
            if let Ok(config) = ModelConfig::from_json(&root.to_string()) {
                // What is accepted can be counted and divided without overflow.
                prop_assert!(config.num_parameters() > 0);
                prop_assert_eq!(config.text.head_dim() * config.text.num_attention_heads, config.text.hidden_size);
            }
        }

        #[test]
        fn mutilated_text_never_panics(cut in 0..TINY.trim_end().len(), byte in any::<u8>()) {
            let mut bytes = TINY.as_bytes().to_vec();
            bytes[cut] = byte;
            let text = String::from_utf8_lossy(&bytes);
            let _ = ModelConfig::from_json(&text);
            prop_assert!(ModelConfig::from_json(&TINY[..cut]).is_err());
        }
    }
}
