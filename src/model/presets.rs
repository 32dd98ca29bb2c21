//! Named sizes of the model, and a config's way back to the published `config.json`.
//!
//! Used by [`super::synth`], [`super::checkpoint`] and tests. Never touches files.

use std::{fmt, str::FromStr};

use serde_json::{Map, Value, json};

use super::{
    config::{ConnectorConfig, ConnectorKind, ModelConfig, Qwen2Config, SiglipConfig},
    embedded,
};

/// A size of synthetic checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preset {
    /// The embedded model's.
    Nano,
    /// 14.9 million parameters.
    Small,
    /// SigLIP base and Qwen2.5-0.5B.
    Mid,
    /// TinyLLaVA-Video-R1 as published: 3.6 billion parameters.
    R1,
}

impl Preset {
    /// All of them, smallest first.
    pub const ALL: [Preset; 4] = [Preset::Nano, Preset::Small, Preset::Mid, Preset::R1];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Preset::Nano => "nano",
            Preset::Small => "small",
            Preset::Mid => "mid",
            Preset::R1 => "r1",
        }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No preset has this name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no preset {0:?}: choose nano, small, mid or r1")]
pub struct UnknownPreset(pub String);

impl FromStr for Preset {
    type Err = UnknownPreset;

    fn from_str(name: &str) -> Result<Self, UnknownPreset> {
        Preset::ALL.into_iter().find(|preset| preset.name() == name).ok_or_else(|| UnknownPreset(name.into()))
    }
}

impl ModelConfig {
    /// The config of a preset.
    pub fn preset(preset: Preset) -> Self {
        match preset {
            Preset::Nano => {
                ModelConfig::from_json(embedded::CONFIG).expect("the embedded config is valid: this is a bug")
            }
            Preset::Small => {
                assemble(siglip([288, 1076, 6, 4], 112, 14), 128, qwen2([256, 704, 6, 8, 2], 2048))
            }
            Preset::Mid => {
                assemble(siglip([768, 3072, 12, 12], 224, 16), 256, qwen2([896, 4864, 24, 14, 2], 151_936))
            }
            Preset::R1 => assemble(
                siglip([1152, 4304, 27, 16], 384, 14),
                512,
                qwen2([2048, 11_008, 36, 16, 2], 151_936),
            ),
        }
    }

    /// A model so small that a test runs it whole: 4 frames of 16 x 16 pixels, 16 patches each, 8 visual tokens;
    /// its vocabulary has room for the byte tokenizer.
    pub fn tiny_test() -> Self {
        let mut config = assemble(siglip([24, 40, 3, 2], 16, 4), 8, qwen2([32, 48, 2, 4, 2], 288));
        config.connector.group = 4;
        config.connector.num_resampler_layers = 2;
        config.num_frames = 4;
        config.context = 512;
        config
    }

    /// The published `config.json`: text and vision sections leave out what equals the class default.
    /// `eos_token_id` is the tokenizer's end of text.
    pub fn to_json(&self, eos_token_id: u32) -> Value {
        let connector_type = match self.connector.kind {
            ConnectorKind::Group => "groupresampler",
            ConnectorKind::Naive => "naiveresampler",
        };
        let mut root = json!({
            "architectures": ["TinyLlavaForConditionalGeneration"],
            "cache_dir": null,
            "connector_type": connector_type,
            "group": self.connector.group,
            "hidden_size": self.connector.hidden_size,
            "ignore_index": -100,
            "image_aspect_ratio": "square",
            "image_token_index": -200,
            "llm_model_name_or_path": "synthetic-qwen2",
            "model_type": "tinyllava",
            "num_queries": self.connector.num_queries,
            "num_resampler_layers": self.connector.num_resampler_layers,
            "pad_token": "<|endoftext|>",
            "text_config": text_json(&self.text, eos_token_id),
            "tokenizer_model_max_length": self.context,
            "tokenizer_name_or_path": "synthetic-qwen2",
            "tokenizer_padding_side": "right",
            "tokenizer_use_fast": false,
            "torch_dtype": "bfloat16",
            "use_cache": true,
            "vision_config": vision_json(&self.vision),
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "patch",
            "vision_hidden_size": self.vision.hidden_size,
            "vision_model_name_or_path": "synthetic-siglip",
            "vocab_size": self.text.vocab_size,
        });
        if self.connector.kind == ConnectorKind::Naive {
            root.as_object_mut().expect("made as an object: this is a bug").remove("group");
        }
        root
    }
}

fn text_json(config: &Qwen2Config, eos_token_id: u32) -> Value {
    let mut map = Map::new();
    map.insert("architectures".into(), json!(["Qwen2ForCausalLM"]));
    map.insert("bos_token_id".into(), eos_token_id.into());
    map.insert("eos_token_id".into(), eos_token_id.into());
    map.insert("model_type".into(), "qwen2".into());
    let mut put = |field: &str, value: Value, default: Value| {
        if value != default {
            map.insert(field.into(), value);
        }
    };
    put("hidden_size", config.hidden_size.into(), 4096.into());
    put("intermediate_size", config.intermediate_size.into(), 22016.into());
    put("max_position_embeddings", config.max_position_embeddings.into(), 32768.into());
    put("num_attention_heads", config.num_attention_heads.into(), 32.into());
    put("num_hidden_layers", config.num_hidden_layers.into(), 32.into());
    put("num_key_value_heads", config.num_key_value_heads.into(), 32.into());
    put("rms_norm_eps", config.rms_norm_eps.into(), 1e-6.into());
    put("rope_theta", config.rope_theta.into(), 10_000.0.into());
    put("tie_word_embeddings", config.tie_word_embeddings.into(), false.into());
    put("vocab_size", config.vocab_size.into(), 151_936.into());
    map.insert("torch_dtype".into(), "bfloat16".into());
    map.insert("use_sliding_window".into(), false.into());
    map.into()
}

fn vision_json(config: &SiglipConfig) -> Value {
    let mut map = Map::new();
    map.insert("model_type".into(), "siglip_vision_model".into());
    let mut put = |field: &str, value: Value, default: Value| {
        if value != default {
            map.insert(field.into(), value);
        }
    };
    put("hidden_size", config.hidden_size.into(), 768.into());
    put("image_size", config.image_size.into(), 224.into());
    put("intermediate_size", config.intermediate_size.into(), 3072.into());
    put("layer_norm_eps", config.layer_norm_eps.into(), 1e-6.into());
    put("num_attention_heads", config.num_attention_heads.into(), 12.into());
    put("num_hidden_layers", config.num_hidden_layers.into(), 12.into());
    put("patch_size", config.patch_size.into(), 16.into());
    map.into()
}

/// `[hidden, intermediate, layers, heads]`, image side, patch side.
fn siglip(
    [hidden_size, intermediate_size, num_hidden_layers, num_attention_heads]: [usize; 4],
    image_size: usize,
    patch_size: usize,
) -> SiglipConfig {
    SiglipConfig {
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_channels: 3,
        image_size,
        patch_size,
        layer_norm_eps: 1e-6,
    }
}

/// `[hidden, intermediate, layers, heads, KV heads]`, vocabulary.
fn qwen2(
    [hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads]: [usize; 5],
    vocab_size: usize,
) -> Qwen2Config {
    Qwen2Config {
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        vocab_size,
        max_position_embeddings: 32_768,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        tie_word_embeddings: true,
    }
}

/// The published proportions: group 16, 16 frames, 3 resampler layers, context 3072.
fn assemble(vision: SiglipConfig, num_queries: usize, text: Qwen2Config) -> ModelConfig {
    let connector = ConnectorConfig {
        kind: ConnectorKind::Group,
        vision_hidden_size: vision.hidden_size,
        hidden_size: text.hidden_size,
        group: 16,
        num_queries,
        num_resampler_layers: 3,
    };
    ModelConfig { vision, connector, text, context: 3072, num_frames: 16 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_survives_its_json() {
        let mut naive = ModelConfig::tiny_test();
        naive.connector.kind = ConnectorKind::Naive;
        naive.connector.group = 1;
        naive.num_frames = 16;
        let presets = Preset::ALL.map(ModelConfig::preset);
        for config in presets.into_iter().chain([ModelConfig::tiny_test(), naive]) {
            let text = config.to_json(7).to_string();
            assert_eq!(ModelConfig::from_json(&text).unwrap(), config);
        }
    }

    #[test]
    fn json_leaves_out_class_defaults() {
        let json = ModelConfig::preset(Preset::Mid).to_json(7);
        // SigLIP base is the class default, all but nothing.
        assert_eq!(json["vision_config"], json!({"model_type": "siglip_vision_model"}));
        assert!(json["text_config"].get("vocab_size").is_none());
        assert_eq!(json["text_config"]["rope_theta"], json!(1e6));
    }

    #[test]
    fn small_has_its_advertised_size() {
        let millions = ModelConfig::preset(Preset::Small).num_parameters() as f64 / 1e6;
        assert_eq!(format!("{millions:.1}"), "14.9");
    }

    #[test]
    fn names_parse_back() {
        for preset in Preset::ALL {
            assert_eq!(preset.name().parse(), Ok(preset));
        }
        assert!("huge".parse::<Preset>().is_err());
    }
}
