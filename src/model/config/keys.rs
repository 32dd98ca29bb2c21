//! Lists every key of a `config.json` that may stand there without being read, by section.
//!
//! Used by [`super`] after it has read a section. A key in no list is an error: it may change
//! what the model computes, and a server that ignored it would give wrong replies silently.
//! Covers the classes of transformers 4.40 to 5.24 (`PretrainedConfig`, `Qwen2Config`,
//! `SiglipVisionConfig`) and the original's `TinyLlavaConfig`. Never reads a value for the
//! network.

use serde_json::Value;

use super::{ConfigError, section::Section};

/// The values of a key that do not change the computation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Harmless {
    Always,
    /// Only at `false`.
    False,
    /// Only at `true`.
    True,
    /// Only at 1.
    One,
    /// Only at null, "", [] or {}.
    Empty,
}

use Harmless::{Always, Empty, False, One, True};

impl Harmless {
    fn allows(self, value: &Value) -> bool {
        match self {
            Always => true,
            False => *value == Value::Bool(false),
            True => *value == Value::Bool(true),
            One => value.as_f64() == Some(1.0),
            Empty => match value {
                Value::String(text) => text.is_empty(),
                Value::Array(items) => items.is_empty(),
                Value::Object(map) => map.is_empty(),
                _ => false,
            },
        }
    }

    fn supported(self) -> &'static str {
        match self {
            Always => "any value",
            False => "false",
            True => "true",
            One => "1",
            Empty => "null",
        }
    }
}

type Keys = &'static [(&'static str, Harmless)];

/// The known keys of one section: keys that [`super`] reads, and harmless ones.
pub(super) struct KnownKeys {
    pub read: &'static [&'static str],
    pub harmless: Keys,
}

/// Keys of the top level that are read.
const ROOT_READ: &[&str] = &[
    "model_type",
    "text_config",
    "vision_config",
    "connector_type",
    "group",
    "num_queries",
    "num_resampler_layers",
    "hidden_size",
    "vision_hidden_size",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "image_aspect_ratio",
    "image_token_index",
    "tokenizer_model_max_length",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
];

/// Harmless keys of the top level: names, paths, tokenizer settings (the tokenizer's files are read
/// instead), training settings.
const ROOT_HARMLESS: Keys = &[
    ("cache_dir", Always),
    ("ignore_index", Always),
    ("image_grid_pinpoints", Always),
    ("llm_model_name_or_path", Always),
    ("max_sequence_length", Always),
    ("mm_use_im_patch_token", False),
    ("mm_use_im_start_end", False),
    ("pad_token", Always),
    // Read by other connectors of the original only.
    ("resampler_hidden_size", Always),
    // The original reads the field of `text_config`.
    ("tie_word_embeddings", Always),
    ("tokenizer_name_or_path", Always),
    ("tokenizer_padding_side", Always),
    ("tokenizer_use_fast", Always),
    ("tune_mm_mlp_adapter", Always),
    ("tune_type_connector", Always),
    ("tune_type_llm", Always),
    ("tune_type_vision_tower", Always),
    ("tune_vision_tower_from_layer", Always),
    ("vision_model_name_or_path", Always),
    ("vision_model_name_or_path2", Always),
    // The original sets it from `text_config`.
    ("vocab_size", Always),
];

/// Keys of `text_config` that are read.
const TEXT_READ: &[&str] = &[
    "model_type",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "layer_types",
    "tie_word_embeddings",
    "use_sliding_window",
    "use_mrope",
];

/// Harmless keys of `text_config`.
const TEXT_HARMLESS: Keys = &[
    // Qwen2 has biases for q, k and v, and for no other matrix.
    ("attention_bias", True),
    ("qkv_bias", True),
    ("mlp_bias", False),
    ("attention_dropout", Always),
    ("hidden_dropout", Always),
    ("is_causal", True),
    // Read by the original only with `use_sliding_window`, which must be false.
    ("max_window_layers", Always),
    ("sliding_window", Always),
    ("partial_rotary_factor", One),
];

/// Keys of `vision_config` that are read.
const VISION_READ: &[&str] = &[
    "model_type",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "layer_norm_eps",
];

/// Harmless keys of `vision_config`.
const VISION_HARMLESS: Keys = &[
    ("attention_dropout", Always),
    ("dropout", Always),
    ("hidden_dropout", Always),
    ("initializer_factor", Always),
    ("model_name_or_path", Always),
    ("model_name_or_path2", Always),
    // Parts after the layer that features are taken from.
    ("projection_dim", Always),
    ("vision_use_head", Always),
    ("tie_word_embeddings", Always),
];

/// Harmless keys of any section: fields of transformers' base class.
const COMMON: Keys = &[
    ("_attn_implementation", Always),
    ("_attn_implementation_autoset", Always),
    ("_attn_implementation_internal", Always),
    ("_commit_hash", Always),
    ("_experts_implementation", Always),
    ("_experts_implementation_internal", Always),
    ("_flash_attn_2_enabled", Always),
    ("_name_or_path", Always),
    ("add_cross_attention", False),
    ("architectures", Always),
    ("attn_implementation", Always),
    ("auto_map", Always),
    ("bos_token_id", Always),
    ("chunk_size_feed_forward", Always),
    ("cross_attention_hidden_size", Empty),
    ("decoder_start_token_id", Always),
    ("dtype", Always),
    ("eos_token_id", Always),
    ("finetuning_task", Always),
    ("gradient_checkpointing", Always),
    ("id2label", Always),
    ("initializer_range", Always),
    ("is_decoder", Always),
    ("is_encoder_decoder", False),
    ("label2id", Always),
    ("name_or_path", Always),
    ("num_labels", Always),
    ("output_attentions", Always),
    ("output_hidden_states", Always),
    ("pad_token_id", Always),
    ("per_layer_config", Empty),
    ("prefix", Always),
    ("problem_type", Always),
    ("pruned_heads", Empty),
    ("quantization_config", Empty),
    ("return_dict", Always),
    ("sep_token_id", Always),
    ("task_specific_params", Always),
    ("tf_legacy_loss", Always),
    ("tie_encoder_decoder", False),
    ("tokenizer_class", Always),
    ("torch_dtype", Always),
    ("torchscript", Always),
    ("transformers_version", Always),
    ("use_bfloat16", Always),
    ("use_cache", Always),
];

/// Harmless keys of any section: generation defaults. The server reads them from
/// `generation_config.json` only, as transformers 5 does.
const GENERATION: &[&str] = &[
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "suppress_tokens",
    "target_lookbehind",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
];

pub(super) const ROOT: KnownKeys = KnownKeys { read: ROOT_READ, harmless: ROOT_HARMLESS };
pub(super) const TEXT: KnownKeys = KnownKeys { read: TEXT_READ, harmless: TEXT_HARMLESS };
pub(super) const VISION: KnownKeys = KnownKeys { read: VISION_READ, harmless: VISION_HARMLESS };

impl KnownKeys {
    /// Checks every key of `section`.
    ///
    /// # Errors
    /// Names the first key that is unknown, or whose value is not harmless. A null always is.
    pub fn check(&self, section: &Section<'_>) -> Result<(), ConfigError> {
        for (key, value) in section.map {
            if value.is_null() || self.read.contains(&key.as_str()) || GENERATION.contains(&key.as_str()) {
                continue;
            }
            let known = self.harmless.iter().chain(COMMON).find(|(known, _)| known == key);
            match known {
                Some((_, harmless)) if harmless.allows(value) => {}
                Some((_, harmless)) => return Err(section.unsupported(key, harmless.supported())),
                None => return Err(section.unknown(key)),
            }
        }
        Ok(())
    }
}
