//! Tests that every form of one checkpoint gives the same bits: configs re-saved by other
//! versions of transformers, PyTorch files, a redundant head, buffers of old versions.

use std::{collections::BTreeMap, fs, path::Path};

use candle_core::{DType, Device};
use serde_json::json;
use tempfile::TempDir;
use tinyllava::model::{
    checkpoint::Checkpoint,
    device::DeviceModel,
    layers::{Bits, WeightFormat},
    layout::{EMBEDDINGS, HEAD},
    quantised::write_quantised,
};

use super::{
    checkpoint_damage::{edit, edit_json, parts},
    checkpoint_open::{SINGLE, copy_of, golden, open},
    pickle_writer::{Pickled, write_pickle},
    quantised::{everything, everything_of},
};

pub const PICKLE: &str = "pytorch_model.bin";
pub const PICKLE_INDEX: &str = "pytorch_model.bin.index.json";
const FORMATS: [WeightFormat; 2] = [WeightFormat::AsStored, WeightFormat::Quant(Bits::Eight)];

/// Returns features, embeddings and logits of the CPU network in floats and quantized, and of the
/// network for devices.
fn bits(checkpoint: &Checkpoint) -> Vec<Vec<u32>> {
    let weights = &checkpoint.weights;
    let mut device =
        DeviceModel::load(weights, &checkpoint.config, (&Device::Cpu, DType::F32), None).unwrap();
    let mut all: Vec<_> = FORMATS.map(|format| everything(checkpoint, format)).into();
    all.push(everything_of(&mut device));
    all
}

fn assert_same_bits(dir: &Path, what: &str) {
    let (made, expected) = (open(dir).unwrap(), open(&golden("tiny")).unwrap());
    assert!(!made.weights.contains(HEAD), "{what}: the head is the embeddings");
    assert_eq!(made.weights.num_bytes(), expected.weights.num_bytes(), "{what}");
    assert!(bits(&made) == bits(&expected), "{what}: other numbers than the golden checkpoint's");
}

/// The tensors of the golden checkpoint, as a pickle has them.
fn golden_tensors() -> Vec<Pickled> {
    let (header, data) = parts(&golden("tiny").join(SINGLE));
    let tensors = header.iter().filter(|(name, _)| !name.starts_with("__"));
    let pickled = tensors.map(|(name, tensor)| {
        let range = [0, 1].map(|i| tensor["data_offsets"][i].as_u64().unwrap() as usize);
        let shape = tensor["shape"].as_array().unwrap();
        Pickled {
            key: name.clone(),
            storage: "FloatStorage",
            shape: shape.iter().map(|n| n.as_u64().unwrap() as usize).collect(),
            bytes: data[range[0]..range[1]].to_vec(),
            shares: None,
        }
    });
    pickled.collect()
}

/// Additional tensors of state dicts: the tied head, which shares the embeddings' storage, and
/// buffers.
fn tied_head_and_buffers() -> Vec<Pickled> {
    let embeddings = golden_tensors().into_iter().find(|tensor| tensor.key == EMBEDDINGS).unwrap();
    let head = Pickled { key: HEAD.into(), shares: Some(EMBEDDINGS.into()), ..embeddings };
    let buffer = |key: &str, storage, num_bytes: usize| Pickled {
        key: key.into(),
        storage,
        shape: vec![1, 16],
        bytes: vec![1; 16 * num_bytes],
        shares: None,
    };
    vec![
        head,
        buffer("vision_tower._vision_tower.vision_model.embeddings.position_ids", "LongStorage", 8),
        buffer("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", "FloatStorage", 4),
        buffer("language_model.model.layers.0.self_attn.masked_bias", "FloatStorage", 4),
    ]
}

/// A copy of the golden checkpoint with one PyTorch file instead of safetensors.
pub fn with_pickle(tensors: &[Pickled]) -> TempDir {
    let dir = copy_of("tiny");
    fs::remove_file(dir.path().join(SINGLE)).unwrap();
    write_pickle(&dir.path().join(PICKLE), tensors);
    dir
}

/// The same with two shards and their index.
pub fn with_pickle_shards() -> TempDir {
    let mut tensors = golden_tensors();
    tensors.extend(tied_head_and_buffers());
    let dir = with_pickle(&tensors);
    fs::remove_file(dir.path().join(PICKLE)).unwrap();
    // Storages are shared within a file only.
    let head = tensors.iter_mut().find(|tensor| tensor.key == HEAD).unwrap();
    head.shares = None;
    let (first, second) = tensors.split_at(tensors.len() / 2);
    assert!(first.iter().any(|tensor| tensor.key == EMBEDDINGS) && second.iter().any(|t| t.key == HEAD));
    let mut weight_map = BTreeMap::new();
    for (number, part) in [first, second].into_iter().enumerate() {
        let name = format!("pytorch_model-0000{}-of-00002.bin", number + 1);
        write_pickle(&dir.path().join(&name), part);
        weight_map.extend(part.iter().map(|tensor| (tensor.key.clone(), name.clone())));
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    fs::write(dir.path().join(PICKLE_INDEX), index.to_string()).unwrap();
    dir
}

#[test]
fn configs_saved_by_every_version_of_transformers_give_the_same_bits() {
    for version in ["4.40.2", "4.49.0", "4.57.6", "5.24.0"] {
        let dir = copy_of("tiny");
        let saved = golden("configs").join(format!("{version}.json"));
        fs::copy(saved, dir.path().join("config.json")).unwrap();
        assert_same_bits(dir.path(), version);
    }
}

#[test]
fn a_config_that_asks_for_padded_pictures_gives_the_same_bits() {
    let dir = copy_of("tiny");
    edit_json(&dir.path().join("config.json"), |config| config["image_aspect_ratio"] = json!("pad"));
    assert_same_bits(dir.path(), "pad");
}

#[test]
fn pytorch_files_at_the_root_give_the_same_bits() {
    let plain = golden_tensors();
    assert_same_bits(with_pickle(&plain).path(), "one file");
    let more = [plain, tied_head_and_buffers()].concat();
    assert_same_bits(with_pickle(&more).path(), "with the tied head and buffers");
    assert_same_bits(with_pickle_shards().path(), "shards");
}

#[test]
fn quantize_writes_the_same_file_from_pytorch_files_as_from_safetensors() {
    for dir in [with_pickle(&[golden_tensors(), tied_head_and_buffers()].concat()), with_pickle_shards()] {
        let out = dir.path().join("made");
        write_quantised(&open(dir.path()).unwrap(), Bits::Four, &out, &mut |_| ()).unwrap();
        let expected = dir.path().join("expected");
        write_quantised(&open(&golden("tiny")).unwrap(), Bits::Four, &expected, &mut |_| ()).unwrap();
        assert!(fs::read(out.join(SINGLE)).unwrap() == fs::read(expected.join(SINGLE)).unwrap());
    }
}

#[test]
fn safetensors_win_over_pytorch_files_and_those_over_folders() {
    let dir = copy_of("tiny");
    fs::write(dir.path().join(PICKLE), "not read").unwrap();
    assert_same_bits(dir.path(), "both");
    let dir = with_pickle(&golden_tensors());
    fs::create_dir(dir.path().join("connector")).unwrap();
    fs::write(dir.path().join("connector").join(PICKLE), "not read").unwrap();
    assert_same_bits(dir.path(), "with a folder");
}

/// Adds a tensor with the bytes of another to a safetensors file.
fn repeat(dir: &Path, of: &str, name: &str) {
    edit(&dir.join(SINGLE), |header, data| {
        let mut tensor = header[of].clone();
        let range = [0, 1].map(|i| tensor["data_offsets"][i].as_u64().unwrap() as usize);
        let bytes = data[range[0]..range[1]].to_vec();
        tensor["data_offsets"] = json!([data.len(), data.len() + bytes.len()]);
        data.extend(bytes);
        header.insert(name.into(), tensor);
    });
}

#[test]
fn a_head_that_repeats_the_embeddings_changes_nothing() {
    let dir = copy_of("tiny");
    repeat(dir.path(), EMBEDDINGS, HEAD);
    assert_same_bits(dir.path(), "a head beside the embeddings");
    let dir = copy_of("tiny");
    edit(&dir.path().join(SINGLE), |header, _| {
        let embeddings = header.remove(EMBEDDINGS).unwrap();
        header.insert(HEAD.into(), embeddings);
    });
    assert_same_bits(dir.path(), "a head instead of the embeddings");
}

#[test]
fn a_tied_head_that_differs_in_one_bit_is_refused() {
    let dir = copy_of("tiny");
    repeat(dir.path(), EMBEDDINGS, HEAD);
    edit(&dir.path().join(SINGLE), |_, data| *data.last_mut().unwrap() ^= 1);
    let mut pickled = [golden_tensors(), tied_head_and_buffers()].concat();
    let head = pickled.iter_mut().find(|tensor| tensor.key == HEAD).unwrap();
    head.shares = None;
    head.bytes[1000] ^= 1;
    for (dir, file) in [(dir, SINGLE), (with_pickle(&pickled), PICKLE)] {
        let error = open(dir.path()).unwrap_err();
        for part in [file, HEAD, "differs from", EMBEDDINGS, "tie_word_embeddings"] {
            assert!(error.contains(part), "{part} is not in {error}");
        }
        // Follow the error's advice: the model then has a separate head.
        edit_json(&dir.path().join("config.json"), |config| {
            config["text_config"]["tie_word_embeddings"] = json!(false);
        });
        let untied = open(dir.path()).unwrap();
        assert!(untied.weights.contains(HEAD));
        let tied = open(&golden("tiny")).unwrap();
        assert!(everything(&untied, FORMATS[0]) != everything(&tied, FORMATS[0]), "the head is not used");
    }
}

#[test]
fn buffers_of_old_versions_are_not_read() {
    let dir = copy_of("tiny");
    edit(&dir.path().join(SINGLE), |header, data| {
        for (name, dtype, num_bytes) in [
            ("vision_tower._vision_tower.vision_model.embeddings.position_ids", "I64", 8),
            ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", "F32", 4),
            ("language_model.model.rotary_emb.inv_freq", "F16", 2),
            ("language_model.model.layers.1.self_attn.masked_bias", "BOOL", 1),
        ] {
            let range = [data.len(), data.len() + 16 * num_bytes];
            header.insert(name.into(), json!({"dtype": dtype, "shape": [1, 16], "data_offsets": range}));
            data.extend(vec![1; 16 * num_bytes]);
        }
    });
    assert_same_bits(dir.path(), "buffers");
}

#[test]
fn a_lora_adapter_is_refused_and_not_ignored() {
    for file in ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"] {
        for checkpoint in ["tiny", "tiny_bf16_sharded"] {
            let dir = copy_of(checkpoint);
            fs::write(dir.path().join(file), "{}").unwrap();
            let error = open(dir.path()).unwrap_err();
            let says = [file, "is a LoRA adapter", "merge_and_unload"];
            assert!(says.iter().all(|part| error.contains(part)), "{error}");
        }
    }
    for name in [
        "language_model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "language_model.model.layers.0.self_attn.q_proj.base_layer.weight",
    ] {
        let dir = copy_of("tiny");
        repeat(dir.path(), EMBEDDINGS, name);
        let error = open(dir.path()).unwrap_err();
        assert!(error.contains(name) && error.contains("part of a LoRA adapter"), "{error}");
    }
}
