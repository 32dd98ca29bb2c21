//! Each kind of damage to a checkpoint gives its one clear error, which names the file and the tensor.

use std::{fs, path::Path};

use serde_json::{Value, json};

use super::{
    checkpoint_forms::{PICKLE, PICKLE_INDEX, with_pickle_shards},
    checkpoint_open::{SINGLE, add_tokenizer, copy_of, open},
};

const LATENTS: &str = "connector._connector.latents";
const INDEX: &str = "model.safetensors.index.json";
const SECOND_SHARD: &str = "model-00002-of-00005.safetensors";

/// Header and data of a safetensors file.
pub fn parts(path: &Path) -> (serde_json::Map<String, Value>, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let header_end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..header_end]).unwrap(), bytes[header_end..].to_vec())
}

/// Writes a safetensors file with `edit` applied to its header and data.
pub fn edit(path: &Path, edit: impl FnOnce(&mut serde_json::Map<String, Value>, &mut Vec<u8>)) {
    let (mut header, mut data) = parts(path);
    edit(&mut header, &mut data);
    let text = Value::Object(header).to_string();
    let prefix = (text.len() as u64).to_le_bytes();
    fs::write(path, [&prefix[..], text.as_bytes(), &data].concat()).unwrap();
}

/// Adds a tensor of four bytes at the end.
fn append(header: &mut serde_json::Map<String, Value>, data: &mut Vec<u8>, name: &str) {
    let range = [data.len(), data.len() + 4];
    header.insert(name.into(), json!({"dtype": "F32", "shape": [1], "data_offsets": range}));
    data.extend([0; 4]);
}

pub fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn truncate(path: &Path, len: u64) {
    fs::File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

/// What is done to a copy of a golden checkpoint, and what its one error must say.
type Damage = (&'static str, &'static str, fn(&Path), &'static [&'static str]);

const DAMAGES: &[Damage] = &[
    (
        "truncated file",
        "tiny",
        |dir| truncate(&dir.join(SINGLE), 3_000_000),
        &[SINGLE, "truncated", "layers.1.self_attn.q_proj.weight"],
    ),
    ("empty file", "tiny", |dir| truncate(&dir.join(SINGLE), 0), &[SINGLE, "0 bytes"]),
    (
        "file cut in the header",
        "tiny",
        |dir| truncate(&dir.join(SINGLE), 100),
        &[SINGLE, "longer than the file"],
    ),
    (
        "bytes after the last tensor",
        "tiny",
        |dir| edit(&dir.join(SINGLE), |_, data| data.extend([0; 8])),
        &[SINGLE, "bytes follow"],
    ),
    (
        "huge header size",
        "tiny",
        |dir| {
            let mut bytes = fs::read(dir.join(SINGLE)).unwrap();
            bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
            fs::write(dir.join(SINGLE), bytes).unwrap();
        },
        &[SINGLE, "larger than 100 MB"],
    ),
    (
        "garbage header",
        "tiny",
        |dir| {
            let mut bytes = fs::read(dir.join(SINGLE)).unwrap();
            bytes[8..200].fill(b'x');
            fs::write(dir.join(SINGLE), bytes).unwrap();
        },
        &[SINGLE, "not a valid safetensors file"],
    ),
    (
        "missing tensor",
        "tiny",
        |dir| {
            edit(&dir.join(SINGLE), |header, data| {
                // The first one: everything after it moves down.
                header.remove(LATENTS);
                data.drain(..1024);
                for (_, tensor) in header.iter_mut().filter(|(name, _)| !name.starts_with("__")) {
                    for offset in tensor["data_offsets"].as_array_mut().unwrap() {
                        *offset = json!(offset.as_u64().unwrap() - 1024);
                    }
                }
            })
        },
        &[SINGLE, LATENTS, "is missing"],
    ),
    (
        "extra tensor",
        "tiny",
        |dir| edit(&dir.join(SINGLE), |header, data| append(header, data, "connector.extra")),
        &[SINGLE, "connector.extra", "not part of this model"],
    ),
    (
        "wrong shape",
        "tiny",
        |dir| edit(&dir.join(SINGLE), |header, _| header[LATENTS]["shape"] = json!([64, 4])),
        &[SINGLE, LATENTS, "[64, 4]", "[4, 64]"],
    ),
    (
        "shape and bytes differ",
        "tiny",
        |dir| edit(&dir.join(SINGLE), |header, _| header[LATENTS]["shape"] = json!([4, 65])),
        &[SINGLE, "not a valid safetensors file"],
    ),
    (
        "overflowing shape",
        "tiny",
        |dir| edit(&dir.join(SINGLE), |header, _| header[LATENTS]["shape"] = json!([u64::MAX, 64])),
        &[SINGLE, "not a valid safetensors file"],
    ),
    (
        "integer tensor",
        "tiny",
        |dir| edit(&dir.join(SINGLE), |header, _| header[LATENTS]["dtype"] = json!("I32")),
        &[SINGLE, LATENTS, "I32", "BF16"],
    ),
    (
        "overlapping tensors",
        "tiny",
        |dir| edit(&dir.join(SINGLE), |header, _| header[LATENTS]["data_offsets"] = json!([4, 1028])),
        &[SINGLE, "not a valid safetensors file"],
    ),
    (
        "config of another model",
        "tiny",
        |dir| edit_json(&dir.join("config.json"), |config| config["num_queries"] = json!(32)),
        &[SINGLE, LATENTS, "[4, 64]", "[8, 64]"],
    ),
    (
        "unsupported config",
        "tiny",
        |dir| edit_json(&dir.join("config.json"), |config| config["connector_type"] = json!("mlp")),
        &["config.json", "connector_type", "groupresampler"],
    ),
    (
        "key that is not known",
        "tiny",
        |dir| edit_json(&dir.join("config.json"), |config| config["text_config"]["qk_norm"] = json!(true)),
        &["config.json", "`text_config.qk_norm` is true", "remove it"],
    ),
    (
        "rotary positions of another kind",
        "tiny",
        |dir| {
            edit_json(&dir.join("config.json"), |config| {
                config["text_config"]["rope_parameters"] = json!({"rope_type": "yarn", "rope_theta": 1e6});
            });
        },
        &["config.json", "rope_parameters.rope_type` is \"yarn\"", "default"],
    ),
    ("no config", "tiny", |dir| fs::remove_file(dir.join("config.json")).unwrap(), &["has no config.json"]),
    (
        "config is not JSON",
        "tiny",
        |dir| fs::write(dir.join("config.json"), "{").unwrap(),
        &["config.json is not valid JSON"],
    ),
    (
        "generation config is not valid",
        "tiny",
        |dir| fs::write(dir.join("generation_config.json"), r#"{"temperature": "warm"}"#).unwrap(),
        &["generation_config.json", "temperature"],
    ),
    ("no weights", "tiny", |dir| fs::remove_file(dir.join(SINGLE)).unwrap(), &["holds no weights"]),
    (
        "no tokenizer",
        "tiny",
        |dir| {
            fs::remove_file(dir.join("tokenizer.json")).unwrap();
            fs::remove_file(dir.join("merges.txt")).unwrap();
        },
        &["has no tokenizer", "merges.txt"],
    ),
    (
        "truncated shard",
        "tiny_bf16_sharded",
        |dir| truncate(&dir.join(SECOND_SHARD), 300_000),
        &[SECOND_SHARD, "truncated", "vision_model.head.mlp.fc1.weight"],
    ),
    (
        "missing shard",
        "tiny_bf16_sharded",
        |dir| fs::remove_file(dir.join(SECOND_SHARD)).unwrap(),
        &[INDEX, SECOND_SHARD, LATENTS, "does not exist"],
    ),
    (
        "tensor missing from its shard",
        "tiny_bf16_sharded",
        |dir| {
            edit_json(&dir.join(INDEX), |index| index["weight_map"]["connector.more"] = json!(SECOND_SHARD))
        },
        &[SECOND_SHARD, "connector.more", "is missing"],
    ),
    (
        "tensor missing from the index",
        "tiny_bf16_sharded",
        |dir| {
            edit_json(&dir.join(INDEX), |index| {
                index["weight_map"].as_object_mut().unwrap().remove(LATENTS).unwrap();
            })
        },
        &[SECOND_SHARD, LATENTS, "not part of this model"],
    ),
    (
        "one tensor in two shards",
        "tiny_bf16_sharded",
        |dir| {
            edit(&dir.join("model-00003-of-00005.safetensors"), |header, data| append(header, data, LATENTS))
        },
        &["model-00003-of-00005.safetensors", LATENTS],
    ),
    (
        "index outside the directory",
        "tiny_bf16_sharded",
        |dir| {
            edit_json(&dir.join(INDEX), |index| index["weight_map"][LATENTS] = json!("../model.safetensors"))
        },
        &[INDEX, LATENTS, "../model.safetensors", "not a file name"],
    ),
    (
        "index to an absolute path",
        "tiny_bf16_sharded",
        |dir| edit_json(&dir.join(INDEX), |index| index["weight_map"][LATENTS] = json!("/etc/passwd")),
        &[INDEX, LATENTS, "/etc/passwd", "not a file name"],
    ),
    (
        "index to the parent",
        "tiny_bf16_sharded",
        |dir| edit_json(&dir.join(INDEX), |index| index["weight_map"][LATENTS] = json!("..")),
        &[INDEX, LATENTS, "not a file name"],
    ),
    (
        "index is not an index",
        "tiny_bf16_sharded",
        |dir| fs::write(dir.join(INDEX), r#"{"weight_map": 3}"#).unwrap(),
        &[INDEX, "not a valid index"],
    ),
    (
        "empty index",
        "tiny_bf16_sharded",
        |dir| fs::write(dir.join(INDEX), r#"{"weight_map": {}}"#).unwrap(),
        &[INDEX, "lists no tensor"],
    ),
    (
        "damaged pickle",
        "tiny_folders",
        |dir| truncate(&dir.join("connector/pytorch_model.bin"), 1000),
        &["connector/pytorch_model.bin", "not a readable PyTorch file"],
    ),
    (
        "missing pickle",
        "tiny_folders",
        |dir| fs::remove_file(dir.join("vision_tower/pytorch_model.bin")).unwrap(),
        &["vision_tower/pytorch_model.bin", "cannot be read"],
    ),
    (
        "folders of another model",
        "tiny_folders",
        |dir| edit_json(&dir.join("config.json"), |config| config["num_resampler_layers"] = json!(2)),
        &["connector/pytorch_model.bin", "connector._connector.layers.1", "is missing", "more"],
    ),
];

#[test]
fn every_damage_has_its_one_clear_error() {
    for (what, checkpoint, damage, expected) in DAMAGES {
        let dir = copy_of(checkpoint);
        if *checkpoint == "tiny_folders" {
            add_tokenizer(dir.path());
        }
        open(dir.path()).unwrap_or_else(|error| panic!("{what}: the undamaged copy fails: {error}"));
        damage(dir.path());
        let error = open(dir.path()).expect_err(what);
        for part in *expected {
            assert!(error.contains(part), "{what}: {part:?} is not in {error:?}");
        }
        assert!(!error.contains('\n'), "{what}: more than a sentence: {error:?}");
    }
}

const SECOND_PICKLE: &str = "pytorch_model-00002-of-00002.bin";

/// Damage to the golden checkpoint in PyTorch shards, and parts of the resulting error.
type PickleDamage = (&'static str, fn(&Path), &'static [&'static str]);

const PICKLE_DAMAGES: &[PickleDamage] = &[
    (
        "truncated shard",
        |dir| truncate(&dir.join(SECOND_PICKLE), 100_000),
        &[SECOND_PICKLE, "not a readable PyTorch file"],
    ),
    (
        "empty shard",
        |dir| truncate(&dir.join(SECOND_PICKLE), 0),
        &[SECOND_PICKLE, "not a readable PyTorch file"],
    ),
    (
        "a file of torch before 1.6",
        |dir| fs::write(dir.join(PICKLE), b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.").unwrap(),
        &[PICKLE, "load it with torch and save it again"],
    ),
    (
        "missing shard",
        |dir| fs::remove_file(dir.join(SECOND_PICKLE)).unwrap(),
        &[PICKLE_INDEX, SECOND_PICKLE, "does not exist"],
    ),
    (
        "tensor missing from its shard",
        |dir| {
            let more = |index: &mut Value| index["weight_map"]["connector.more"] = json!(SECOND_PICKLE);
            edit_json(&dir.join(PICKLE_INDEX), more);
        },
        &[SECOND_PICKLE, "connector.more", "is missing"],
    ),
    (
        "tensor missing from the index",
        |dir| {
            edit_json(&dir.join(PICKLE_INDEX), |index| {
                index["weight_map"].as_object_mut().unwrap().remove(LATENTS).unwrap();
            });
        },
        &["pytorch_model-00001-of-00002.bin", LATENTS, "not part of this model"],
    ),
    (
        "index outside the directory",
        |dir| {
            let outside = |index: &mut Value| index["weight_map"][LATENTS] = json!("../pytorch_model.bin");
            edit_json(&dir.join(PICKLE_INDEX), outside);
        },
        &[PICKLE_INDEX, LATENTS, "not a file name"],
    ),
    (
        "config of another model",
        |dir| edit_json(&dir.join("config.json"), |config| config["num_queries"] = json!(32)),
        &["pytorch_model-00001-of-00002.bin", LATENTS, "[4, 64]", "[8, 64]"],
    ),
    (
        "config of a larger model",
        |dir| edit_json(&dir.join("config.json"), |config| config["num_resampler_layers"] = json!(4)),
        &[PICKLE_INDEX, "connector._connector.layers.3", "is missing", "more"],
    ),
];

#[test]
fn every_damage_to_pytorch_files_has_its_one_clear_error() {
    for (what, damage, expected) in PICKLE_DAMAGES {
        let dir = with_pickle_shards();
        open(dir.path()).unwrap_or_else(|error| panic!("{what}: the undamaged copy fails: {error}"));
        damage(dir.path());
        let error = open(dir.path()).expect_err(what);
        for part in *expected {
            assert!(error.contains(part), "{what}: {part:?} is not in {error:?}");
        }
        assert!(!error.contains('\n'), "{what}: more than a sentence: {error:?}");
    }
}
