//! Opening checkpoint directories: each layout opens, and random damage never panics.

use std::{
    fs,
    path::{Path, PathBuf},
};

use proptest::prelude::*;
use tempfile::TempDir;
use tinyllava::model::{
    checkpoint::{Checkpoint, ModelSpec, TokenizerFiles},
    config::ModelConfig,
    presets::Preset,
    synth::write_checkpoint,
    weights::{StoredDType, Weights},
};

use super::checkpoint_damage::{edit, edit_json};

pub const SINGLE: &str = "model.safetensors";

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A copy of a golden checkpoint, to be damaged.
pub fn copy_of(name: &str) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    copy_dir(&golden(name), copy.path());
    copy
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_dir(&path, &target)
        } else {
            fs::copy(&path, target).unwrap();
        }
    }
}

pub fn open(dir: &Path) -> Result<Checkpoint, String> {
    let spec = ModelSpec::parse(dir.to_str().unwrap()).unwrap();
    Checkpoint::open(&spec).map_err(|error| error.to_string())
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

pub fn add_tokenizer(dir: &Path) {
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
            .map(|i| half::bf16::from_f64(((31 * i + spec.name.len()) % 97) as f64 / 97.0 - 0.5).to_f32())
            .collect::<Vec<_>>();
        assert_eq!(tensor.to_f32(), recomputed, "{}", spec.name);
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
