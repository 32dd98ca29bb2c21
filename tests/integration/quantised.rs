//! Quantised checkpoints: the same bits as quantising at load, and one clear error for whatever is wrong with them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tempfile::TempDir;
use tinyllava::model::{
    FrameBatch, SequenceInput, StepInput, VISUAL_TOKEN, VideoLanguageModel, VisualRows,
    checkpoint::{Checkpoint, ModelSpec},
    config::ModelConfig,
    kv_cache::KvDType,
    layers::{Bits, WeightFormat},
    quantised::write_quantised,
    synth::write_checkpoint,
    tinyllava::TinyLlava,
    weights::StoredDType,
};

use super::checkpoint_damage::edit;
use super::checkpoint_open::{SINGLE, golden, open};

const BOTH: [Bits; 2] = [Bits::Eight, Bits::Four];

/// Features, visual tokens, and the logits of every row of a prompt with a video in it, as bits.
pub fn everything(checkpoint: &Checkpoint, format: WeightFormat) -> Vec<u32> {
    everything_of(&mut TinyLlava::load(&checkpoint.weights, &checkpoint.config, format).unwrap())
}

/// The same of a model that is loaded.
pub fn everything_of(model: &mut dyn VideoLanguageModel) -> Vec<u32> {
    let shape = model.shape().clone();
    let num_bytes = shape.num_frames * shape.image_size * shape.image_size * 3;
    let rgb: Vec<u8> = (0..num_bytes).map(|i| (i * i / 7 % 251) as u8).collect();
    let frames = FrameBatch { rgb: rgb.into(), size: shape.image_size };
    let features = model.encode_frames(&frames, 0..shape.num_frames, &mut ()).unwrap();
    let embeddings = model.connect(&features, &mut ()).unwrap();
    let len = shape.visual_tokens + 20;
    let mut token_ids: Vec<u32> = (0..len).map(|i| (i * 37 % shape.vocab_size) as u32).collect();
    let rows = 4..4 + shape.visual_tokens;
    token_ids[rows.clone()].fill(VISUAL_TOKEN);
    let (block_size, num_blocks) = (16, len.div_ceil(16));
    let input = StepInput {
        token_ids,
        positions: (0..len as u32).collect(),
        slot_mapping: (0..len).collect(),
        block_tables: (0..num_blocks as u32).collect(),
        sequences: vec![SequenceInput { rows: 0..len, context_len: len, blocks: 0..num_blocks }],
        visuals: vec![VisualRows { rows, embeddings: embeddings.clone() }],
        logit_rows: (0..len).collect(),
        ids_on_device: None,
    };
    let mut pool = model.new_pool(KvDType::F32, num_blocks, block_size).unwrap();
    let logits = model.forward(&input, &mut pool, &mut ()).unwrap();
    let all = [features, embeddings, logits].map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    all.concat().into_iter().map(f32::to_bits).collect()
}

fn quantised(source: &Checkpoint, bits: Bits) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("made");
    write_quantised(source, bits, &out, &mut |_| ()).unwrap();
    (dir, out)
}

/// A random checkpoint whose head is not its embeddings.
fn untied() -> TempDir {
    let mut config = ModelConfig::tiny_test();
    config.text.tie_word_embeddings = false;
    (config.text.num_attention_heads, config.text.num_key_value_heads) = (2, 1);
    let dir = tempfile::tempdir().unwrap();
    write_checkpoint(&config, 3, dir.path(), &mut |_| ()).unwrap();
    dir
}

#[test]
fn every_number_has_the_bits_of_quantising_at_load() {
    let untied = untied();
    let sources = [
        open(&golden("tiny")).unwrap(),
        Checkpoint::open(&ModelSpec::Nano).unwrap(),
        open(untied.path()).unwrap(),
    ];
    for source in &sources {
        for bits in BOTH {
            let (_dir, out) = quantised(source, bits);
            let made = open(&out).unwrap();
            let expected = everything(source, WeightFormat::Quant(bits));
            assert!(everything(&made, WeightFormat::Quant(bits)) == expected, "{} {bits:?}", source.id);
        }
    }
}

#[test]
fn it_outlives_the_checkpoint_it_was_made_from_and_its_own_files() {
    let source = open(&golden("tiny")).unwrap();
    let expected = everything(&source, WeightFormat::Quant(Bits::Eight));
    let (dir, out) = quantised(&source, Bits::Eight);
    let made = open(&out).unwrap();
    dir.close().unwrap();
    assert!(everything(&made, WeightFormat::Quant(Bits::Eight)) == expected);
}

/// What is done to a quantised copy of the golden checkpoint, and what its one error must say.
type Damage = (&'static str, fn(&Path), &'static [&'static str]);

const DAMAGES: &[Damage] = &[
    (
        "another version",
        |file| edit(file, |header, _| header["__metadata__"]["version"] = "7".into()),
        &["version 7", "reads version 1", "tinyllava quantize"],
    ),
    (
        "unknown quantisation",
        |file| edit(file, |header, _| header["__metadata__"]["quant"] = "q2".into()),
        &["quantised to \"q2\""],
    ),
    (
        "said to be in fewer bits than it is",
        |file| edit(file, |header, _| header["__metadata__"]["quant"] = "q4".into()),
        &["has shape", "2112", "1152"],
    ),
    (
        "said to be an ordinary one",
        |file| edit(file, |header, _| header["__metadata__"]["format"] = "pt".into()),
        &["has shape", "config.json asks for"],
    ),
    (
        "cut short",
        |file| {
            let len = fs::metadata(file).unwrap().len();
            fs::File::options().write(true).open(file).unwrap().set_len(len / 2).unwrap();
        },
        &["truncated"],
    ),
    (
        "panels of another shape",
        |file| {
            edit(file, |header, _| {
                let shape = &mut header["language_model.model.layers.0.mlp.up_proj.weight"]["shape"];
                let [panels, groups] = [&shape[0], &shape[1]].map(|x| x.as_u64().unwrap());
                *shape = vec![groups, panels, 2112].into();
            });
        },
        &["layers.0.mlp.up_proj.weight", "has shape", "config.json asks for"],
    ),
    (
        "floats called panels",
        |file| {
            edit(file, |header, _| {
                let norm = &mut header["language_model.model.norm.weight"];
                let bytes =
                    norm["data_offsets"][1].as_u64().unwrap() - norm["data_offsets"][0].as_u64().unwrap();
                norm["dtype"] = "U8".into();
                norm["shape"] = vec![bytes].into();
            });
        },
        &["model.norm.weight", "has shape"],
    ),
];

#[test]
fn every_damage_has_its_one_clear_error() {
    let (_dir, out) = quantised(&open(&golden("tiny")).unwrap(), Bits::Eight);
    let file = out.join(SINGLE);
    let whole = fs::read(&file).unwrap();
    for (what, damage, expected) in DAMAGES {
        damage(&file);
        let error = open(&out).expect_err(what);
        for part in [SINGLE].iter().chain(*expected) {
            assert!(error.contains(part), "{what}: {part:?} is not in {error:?}");
        }
        assert!(!error.contains('\n'), "{what}: more than a sentence: {error:?}");
        fs::remove_file(&file).unwrap();
        fs::write(&file, &whole).unwrap();
    }
    open(&out).unwrap();
}

#[test]
fn weights_that_are_no_numbers_are_refused_in_every_form() {
    for (tensor, position) in [
        ("language_model.model.layers.1.mlp.down_proj.weight", 5),
        ("vision_tower._vision_tower.vision_model.encoder.layers.0.layer_norm1.bias", 2),
        ("language_model.model.embed_tokens.weight", 700),
        ("language_model.lm_head.weight", 701),
        ("connector._connector.latents", 0),
    ] {
        let dir = untied();
        edit(&dir.path().join(SINGLE), |header, data| {
            let start = header[tensor]["data_offsets"][0].as_u64().unwrap() as usize + 2 * position;
            data[start..start + 2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
        });
        let checkpoint = open(dir.path()).unwrap();
        for format in [
            WeightFormat::Quant(Bits::Eight),
            WeightFormat::Quant(Bits::Four),
            WeightFormat::AsStored,
            WeightFormat::Float(StoredDType::F32),
        ] {
            let error = TinyLlava::load(&checkpoint.weights, &checkpoint.config, format).unwrap_err();
            // Where backtraces are asked for, one follows.
            let error = error.to_string().lines().next().unwrap().to_owned();
            assert!(error.contains(tensor) && error.contains("NaN"), "{format:?}: {error}");
        }
        let out = dir.path().join("out");
        let error = write_quantised(&checkpoint, Bits::Eight, &out, &mut |_| ()).unwrap_err().to_string();
        assert!(error.contains(tensor) && error.contains("NaN"), "{error}");
        let left = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(left.into_iter().all(|name| !name.to_str().unwrap().contains("out")), "something is left");
    }
}
