//! The checkpoint that is part of the binary: `models/nano`.
//!
//! Read by [`super::checkpoint`] (`--model nano`) and [`super::synth`] (its tokenizer serves every synthetic
//! checkpoint). Holds bytes only; parsing is its callers' work.

/// `config.json`.
pub const CONFIG: &str = include_str!("../../models/nano/config.json");
/// `generation_config.json`.
pub const GENERATION_CONFIG: &str = include_str!("../../models/nano/generation_config.json");

/// The slow tokenizer files, by file name.
pub const TOKENIZER_FILES: [(&str, &[u8]); 5] = [
    ("vocab.json", include_bytes!("../../models/nano/vocab.json")),
    ("merges.txt", include_bytes!("../../models/nano/merges.txt")),
    ("tokenizer_config.json", include_bytes!("../../models/nano/tokenizer_config.json")),
    ("special_tokens_map.json", include_bytes!("../../models/nano/special_tokens_map.json")),
    ("added_tokens.json", include_bytes!("../../models/nano/added_tokens.json")),
];

/// `model.safetensors`.
pub const WEIGHTS: &[u8] = include_bytes!("../../models/nano/model.safetensors");
