//! Opening checkpoint directories: each layout opens, each kind of damage gives its one clear error.

use std::{
    fs,
    path::{Path, PathBuf},
};

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;
use tinyllava::model::{
    checkpoint::{Checkpoint, ModelSpec, TokenizerFiles},
    config::ModelConfig,
    presets::Preset,
    synth::write_checkpoint,
    weights::{StoredDType, Weights},
};

const LATENTS: &str = "connector._connector.latents";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SECOND_SHARD: &str = "model-00002-of-00005.safetensors";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A copy of a golden checkpoint, to be damaged.
fn copy_of(name: &str) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    copy_dir(&golden(name), copy.path());
    copy
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() { copy_dir(&path, &target) } else { drop(fs::copy(&path, target).unwrap()) }
    }
}

fn open(dir: &Path) -> Result<Checkpoint, String> {
    let spec = ModelSpec::parse(dir.to_str().unwrap()).unwrap();
    Checkpoint::open(&spec).map_err(|error| error.to_string())
}

/// Header and data of a safetensors file.
fn parts(path: &Path) -> (serde_json::Map<String, Value>, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let header_end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..header_end]).unwrap(), bytes[header_end..].to_vec())
}

/// Writes a safetensors file with `edit` applied to its header and data.
fn edit(path: &Path, edit: impl FnOnce(&mut serde_json::Map<String, Value>, &mut Vec<u8>)) {
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

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn truncate(path: &Path, len: u64) {
    fs::File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

#[test]
fn both_golden_checkpoints_open() {
    for (name, dtype) in [("tiny", StoredDType::F32), ("tiny_bf16_sharded", StoredDType::Bf16)] {
        let checkpoint = open(&golden(name)).unwrap();
        assert_eq!(checkpoint.id, name);
        assert_eq!(checkpoint.weights.dtype(), dtype);
        assert_eq!(checkpoint.generation.eos_token_ids, [597]);
        assert_eq!(checkpoint.tokenizer, TokenizerFiles::Directory(golden(name)));
    }
}

#[test]
fn a_written_synthetic_checkpoint_opens_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig::preset(Preset::Nano);
    write_checkpoint(&config, 9, dir.path(), &mut |_| ()).unwrap();
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(checkpoint.config, config);
    assert!(checkpoint.tokenizer.read("merges.txt").unwrap().is_some());
}

#[test]
fn unused_tensors_may_be_missing() {
    let dir = copy_of("tiny");
    // The last tensors of the file, so that no gap is left.
    edit(&dir.path().join(SINGLE), |header, data| {
        let names = ["head.probe", "post_layernorm.bias", "post_layernorm.weight"];
        let names = names.map(|name| format!("vision_tower._vision_tower.vision_model.{name}"));
        let start = header[&names[0]]["data_offsets"][0].as_u64().unwrap() as usize;
        data.truncate(start);
        names.iter().for_each(|name| drop(header.remove(name)));
    });
    let weights = open(dir.path()).unwrap().weights;
    assert!(!weights.contains("vision_tower._vision_tower.vision_model.head.probe"));
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

fn add_tokenizer(dir: &Path) {
    for name in ["vocab.json", "merges.txt"] {
        fs::copy(golden("tiny").join(name), dir.join(name)).unwrap();
    }
}

#[test]
fn folders_of_pickles_hold_what_the_training_recipe_saved() {
    let dir = copy_of("tiny_folders");
    add_tokenizer(dir.path());
    let checkpoint = open(dir.path()).unwrap();
    assert_eq!(checkpoint.weights.dtype(), StoredDType::Bf16);
    for spec in checkpoint.config.tensors() {
        let Ok(tensor) = checkpoint.weights.get(&spec.name) else {
            assert!(!spec.required, "{} is missing", spec.name);
            continue;
        };
        let recomputed = (0..spec.num_elements())
            .map(|i| half::bf16::from_f64(((31 * i + spec.name.len()) % 97) as f64 / 97.0 - 0.5))
            .collect::<Vec<_>>();
        assert_eq!(tensor.to_bf16(), recomputed, "{}", spec.name);
    }
}

#[test]
fn folders_may_keep_the_configs_of_their_parts() {
    let dir = copy_of("tiny_folders");
    add_tokenizer(dir.path());
    let expected = open(dir.path()).unwrap().config;
    edit_json(&dir.path().join("config.json"), |config| {
        for (section, folder) in [("text_config", "language_model"), ("vision_config", "vision_tower")] {
            let part = config.as_object_mut().unwrap().remove(section).unwrap();
            fs::write(dir.path().join(folder).join("config.json"), part.to_string()).unwrap();
        }
    });
    assert_eq!(open(dir.path()).unwrap().config, expected);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Random damage to a header is refused or harmless, and never a panic or a read outside the file.
    #[test]
    fn a_mutilated_header_never_panics(position in 0usize..17_536, byte: u8, cut in prop::option::of(0usize..20_000)) {
        let config = ModelConfig::from_json(&fs::read_to_string(golden("tiny/config.json")).unwrap()).unwrap();
        let mut bytes = fs::read(golden("tiny").join(SINGLE)).unwrap();
        bytes[position] = byte;
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(SINGLE), bytes).unwrap();
        if let Ok(weights) = Weights::open(dir.path(), &config) {
            for spec in config.tensors().iter().filter(|spec| spec.required) {
                prop_assert_eq!(weights.get(&spec.name).unwrap().to_f32().len(), spec.num_elements());
            }
        }
    }

    #[test]
    fn a_mutilated_pickle_never_panics(position in 0usize..6000, byte: u8) {
        let dir = copy_of("tiny_folders");
        let config = ModelConfig::from_json(&fs::read_to_string(dir.path().join("config.json")).unwrap()).unwrap();
        let path = dir.path().join("language_model/pytorch_model.bin");
        let mut bytes = fs::read(&path).unwrap();
        let position = position % bytes.len();
        bytes[position] = byte;
        fs::write(&path, bytes).unwrap();
        if let Ok(weights) = Weights::open(dir.path(), &config) {
            for spec in config.tensors().iter().filter(|spec| spec.required) {
                // A checksum of the archive may fail only now.
                if let Ok(tensor) = weights.get(&spec.name) {
                    prop_assert_eq!(tensor.to_f32().len(), spec.num_elements());
                }
            }
        }
    }
}
