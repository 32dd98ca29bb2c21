//! The network for devices, run on a CPU by the engine that serves: against the recorded numbers, and against the CPU
//! kernels. On a GPU `tinyllava check` does the same.

use candle_core::{DType, Device, Tensor};
use tinyllava::model::{
    FrameBatch, KvDType, KvPool, SequenceInput, StepInput, VideoLanguageModel, VisualRows,
    checkpoint::{Checkpoint, ModelSpec},
    config::ModelConfig,
    device::DeviceModel,
    layers::{Bits, WeightFormat},
    quantised::write_quantised,
    tinyllava::TinyLlava,
    weights::{StoredDType, Weights},
};

const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 64;

/// A part of one sequence to compute.
struct Part<'a> {
    tokens: &'a [u32],
    /// First position.
    start: usize,
    /// Block table of the whole sequence.
    blocks: &'a [u32],
}

/// Runs the parts in one step; returns the logits of each part's last row.
fn step(model: &mut dyn VideoLanguageModel, pool: &mut KvPool, parts: &[Part<'_>]) -> Vec<Vec<f32>> {
    let mut input = StepInput::default();
    for part in parts {
        let (first_row, first_block) = (input.token_ids.len(), input.block_tables.len());
        let context_len = part.start + part.tokens.len();
        input.token_ids.extend(part.tokens);
        for position in part.start..context_len {
            input.positions.push(position as u32);
            let block = part.blocks[position / BLOCK_SIZE] as usize;
            input.slot_mapping.push(block * BLOCK_SIZE + position % BLOCK_SIZE);
        }
        input.block_tables.extend(&part.blocks[..context_len.div_ceil(BLOCK_SIZE)]);
        input.logit_rows.push(input.token_ids.len() - 1);
        let rows = first_row..input.token_ids.len();
        let blocks = first_block..input.block_tables.len();
        input.sequences.push(SequenceInput { rows, context_len, blocks });
    }
    model.forward(&input, pool, &mut ()).unwrap().to_vec2::<f32>().unwrap()
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Root of the mean square of a difference, relative to the spread of what is expected.
fn relative_error(got: &[f32], expected: &[f32]) -> f32 {
    let mean = expected.iter().sum::<f32>() / expected.len() as f32;
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
    let error = square(&mut got.iter().zip(expected).map(|(a, b)| a - b));
    (error / square(&mut expected.iter().map(|x| x - mean))).sqrt()
}

/// Sizes that the golden checkpoints do not have: odd heads, uneven chunks, an own head.
fn config() -> ModelConfig {
    let mut config = ModelConfig::tiny_test();
    config.text.num_attention_heads = 6;
    config.text.num_key_value_heads = 2;
    config.text.hidden_size = 96;
    config.text.num_hidden_layers = 3;
    config.text.tie_word_embeddings = false;
    config.connector.hidden_size = 96;
    config
}

fn models(dtype: DType) -> (DeviceModel, TinyLlava, ModelConfig) {
    let config = config();
    let weights = Weights::synthetic(&config, 5);
    let cpu = TinyLlava::load(&weights, &config, WeightFormat::Float(StoredDType::F32)).unwrap();
    (DeviceModel::load(&weights, &config, (&Device::Cpu, dtype), None).unwrap(), cpu, config)
}

fn tokens(len: usize, seed: usize, config: &ModelConfig) -> Vec<u32> {
    (0..len).map(|i| ((i * 31 + seed * 7) % config.text.vocab_size) as u32).collect()
}

#[test]
fn the_device_network_gives_the_logits_of_the_cpu_kernels_whole_chunked_batched_and_after_a_hit() {
    let (mut device, mut cpu, config) = models(DType::F32);
    let prompt = tokens(75, 1, &config);
    let blocks: Vec<u32> = (0..5).map(|i| (i * 11 + 3) % 40).collect();
    let whole = |model: &mut dyn VideoLanguageModel| {
        let mut pool = model.new_pool(KvDType::F32, NUM_BLOCKS, BLOCK_SIZE).unwrap();
        step(model, &mut pool, &[Part { tokens: &prompt, start: 0, blocks: &blocks }]).remove(0)
    };
    let expected = whole(&mut cpu);
    assert!(difference(&whole(&mut device), &expected) < 1e-4);

    // In chunks, each beside two sequences that decode and another prompt.
    let mut pool = device.new_pool(KvDType::F32, NUM_BLOCKS, BLOCK_SIZE).unwrap();
    let others: Vec<Vec<u32>> = (2..5).map(|seed| tokens(20, seed, &config)).collect();
    let tables: Vec<Vec<u32>> = (0..3).map(|i| vec![50 + 2 * i, 51 + 2 * i]).collect();
    let mut last = vec![];
    for (turn, range) in [0..30, 30..31, 31..75].into_iter().enumerate() {
        let mut parts = vec![];
        if turn > 0 {
            for i in 0..2 {
                parts.push(Part { tokens: &others[i][19..], start: 19, blocks: &tables[i] });
            }
        } else {
            for i in 0..2 {
                parts.push(Part { tokens: &others[i], start: 0, blocks: &tables[i] });
            }
        }
        parts.push(Part { tokens: &prompt[range.clone()], start: range.start, blocks: &blocks });
        parts.push(Part { tokens: &others[2], start: 0, blocks: &tables[2] });
        last = step(&mut device, &mut pool, &parts).remove(2);
    }
    assert!(difference(&last, &expected) < 1e-4, "chunked beside others");

    // Another sequence that takes over the first blocks, as after a prefix hit.
    let reused = [blocks[0], blocks[1], blocks[2], blocks[3], 63];
    let rest = Part { tokens: &prompt[64..], start: 64, blocks: &reused };
    assert!(difference(&step(&mut device, &mut pool, &[rest])[0], &expected) < 1e-4, "after a hit");
}

#[test]
fn decoding_many_sequences_together_gives_what_each_gives_alone() {
    let (mut device, _, config) = models(DType::F32);
    let prompts: Vec<Vec<u32>> = (0..4).map(|seed| tokens(10 + 9 * seed, seed, &config)).collect();
    let tables: Vec<Vec<u32>> = (0..4).map(|i| vec![4 * i + 2, 4 * i, 4 * i + 1]).collect();
    let next: Vec<u32> = (0..4).map(|i| i * 3 + 1).collect();
    let prefill = |model: &mut DeviceModel, pool: &mut KvPool| {
        for (prompt, blocks) in prompts.iter().zip(&tables) {
            step(model, pool, &[Part { tokens: prompt, start: 0, blocks }]);
        }
    };
    let part = |i: usize| Part { tokens: &next[i..=i], start: prompts[i].len(), blocks: &tables[i] };
    let mut pool = device.new_pool(KvDType::F32, NUM_BLOCKS, BLOCK_SIZE).unwrap();
    prefill(&mut device, &mut pool);
    let together = step(&mut device, &mut pool, &(0..4).map(part).collect::<Vec<_>>());
    for (i, together) in together.iter().enumerate() {
        assert!(difference(&step(&mut device, &mut pool, &[part(i)])[0], together) < 1e-5, "{i}");
    }
}

#[test]
fn frames_are_encoded_as_the_cpu_kernels_do_together_and_one_by_one() {
    let (mut device, mut cpu, config) = models(DType::F32);
    let size = config.vision.image_size;
    let rgb: Vec<u8> = (0..5 * size * size * 3).map(|i| (i * 7919 / 13) as u8).collect();
    let frames = FrameBatch { rgb: rgb.into(), size };
    let expected = cpu.encode_frames(&frames, 0..5, &mut ()).unwrap();
    let together = device.encode_frames(&frames, 0..5, &mut ()).unwrap();
    let single: Vec<Tensor> =
        (0..5).map(|i| device.encode_frames(&frames, i..i + 1, &mut ()).unwrap()).collect();
    let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let close = |got: &Tensor, expected: &Tensor| {
        let error = relative_error(&flat(got), &flat(expected));
        assert!(error < 1e-5, "{error:e}");
    };
    close(&together, &expected);
    close(&Tensor::cat(&single, 0).unwrap(), &expected);
    // Frames of several videos, as one step may have them.
    let parts = [(&frames, 3..5), (&frames, 0..1), (&frames, 1..3)];
    // What is announced is copied ahead, and used if it comes: part of it, in another order, or nothing.
    let others = [(&frames, 0..1), (&frames, 2..4)];
    for (videos, next) in
        [(&parts[..], &parts[1..]), (&parts[1..], &others[..]), (&parts[..1], &[]), (&parts[..], &[])]
    {
        let encoded = device.encode_videos(videos, next, &mut ()).unwrap();
        assert_eq!(encoded.len(), videos.len());
        for (got, (_, range)) in encoded.iter().zip(videos) {
            let patches = expected.dim(0).unwrap() / 5;
            close(got, &expected.narrow(0, range.start * patches, range.len() * patches).unwrap());
        }
    }
    // Five frames over the groups: chunks of two lengths.
    close(&device.connect(&together, &mut ()).unwrap(), &cpu.connect(&expected, &mut ()).unwrap());
}

#[test]
fn visual_embeddings_stand_where_the_step_says() {
    let (mut device, mut cpu, config) = models(DType::F32);
    let (hidden, rows) = (config.text.hidden_size, 8);
    let values: Vec<f32> = (0..rows * hidden).map(|i| (i as f32 * 0.1).sin()).collect();
    let mut ids = tokens(20, 3, &config);
    ids[4..12].fill(tinyllava::model::VISUAL_TOKEN);
    let input = StepInput {
        token_ids: ids,
        positions: (0..20).collect(),
        slot_mapping: (0..20).collect(),
        block_tables: vec![0, 1],
        sequences: vec![SequenceInput { rows: 0..20, context_len: 20, blocks: 0..2 }],
        visuals: vec![VisualRows {
            rows: 4..12,
            embeddings: Tensor::from_vec(values, (rows, hidden), &Device::Cpu).unwrap(),
        }],
        logit_rows: vec![19, 11],
        ids_on_device: None,
    };
    let run = |model: &mut dyn VideoLanguageModel| {
        let mut pool = model.new_pool(KvDType::F32, NUM_BLOCKS, BLOCK_SIZE).unwrap();
        model.forward(&input, &mut pool, &mut ()).unwrap().to_vec2::<f32>().unwrap()
    };
    let (got, expected) = (run(&mut device), run(&mut cpu));
    assert!(got.iter().zip(&expected).all(|(a, b)| difference(a, b) < 1e-4));
}

#[test]
fn f16_stays_near_f32() {
    let (mut half, mut cpu, config) = models(DType::F16);
    let prompt = tokens(40, 2, &config);
    let blocks = [7, 3, 9];
    let run = |model: &mut dyn VideoLanguageModel| {
        let mut pool = model.new_pool(KvDType::F32, NUM_BLOCKS, BLOCK_SIZE).unwrap();
        step(model, &mut pool, &[Part { tokens: &prompt[..39], start: 0, blocks: &blocks }]);
        step(model, &mut pool, &[Part { tokens: &prompt[39..], start: 39, blocks: &blocks }]).remove(0)
    };
    let error = relative_error(&run(&mut half), &run(&mut cpu));
    assert!(error < 0.01, "{error}");
}

#[test]
fn quantised_weights_stay_near_the_floats_they_were_made_of_whole_and_chunked() {
    let mut config = config();
    config.text.intermediate_size = 64;
    let weights = Weights::synthetic(&config, 5);
    let place = (&Device::Cpu, DType::F32);
    let load = |quant| DeviceModel::load(&weights, &config, place, quant).unwrap();
    let prompt = tokens(75, 1, &config);
    let blocks = [7, 3, 9, 1, 30];
    let run = |model: &mut DeviceModel, cuts: &[usize]| {
        let mut pool = model.new_pool(KvDType::F32, NUM_BLOCKS, BLOCK_SIZE).unwrap();
        let mut last = vec![];
        for cut in cuts.windows(2) {
            let part = Part { tokens: &prompt[cut[0]..cut[1]], start: cut[0], blocks: &blocks };
            last = step(model, &mut pool, &[part]).remove(0);
        }
        last
    };
    let mut floats = load(None);
    let expected = run(&mut floats, &[0, 75]);
    let mut sizes = vec![floats.decode_bytes()];
    for (bits, most) in [(Bits::Eight, 0.1), (Bits::Four, 0.8)] {
        let mut quantised = load(Some(bits));
        // Rows in one product as floats; in passes of 8; and both.
        for cuts in [&[0, 75][..], &[0, 20, 40, 60, 75], &[0, 1, 40, 75]] {
            let error = relative_error(&run(&mut quantised, cuts), &expected);
            println!("{bits:?} {cuts:?}: relative error of the logits {error:.4}");
            assert!(error < most, "{bits:?} {cuts:?}: {error}");
        }
        sizes.push(quantised.decode_bytes());
    }
    // 34 and 18 bytes for 32 weights, the head in 8 bits in both.
    assert_eq!(sizes[1], sizes[0] / 4 / 32 * 34);
    assert!(sizes[2] < sizes[1] && sizes[2] > sizes[0] / 4 / 32 * 18);
}

#[test]
fn what_cannot_be_quantised_on_a_device_is_one_sentence() {
    let config = config();
    let place = (&Device::Cpu, DType::F32);
    let odd = Weights::synthetic(&config, 5);
    let error = DeviceModel::load(&odd, &config, place, Some(Bits::Eight)).unwrap_err().to_string();
    assert!(error.contains("down_proj") && error.contains("--device cpu"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("nano-q8");
    let nano = Checkpoint::open(&ModelSpec::Nano).unwrap();
    write_quantised(&nano, Bits::Eight, &out, &mut |_| ()).unwrap();
    let made = Checkpoint::open_directory("made".into(), &out).unwrap();
    let error = DeviceModel::load(&made.weights, &made.config, place, None).unwrap_err().to_string();
    assert!(error.contains("quantised to q8 already") && error.contains("--device cpu"), "{error}");
}

#[test]
fn a_cache_of_the_other_kind_is_refused() {
    let (mut device, mut cpu, _) = models(DType::F32);
    let (mut mine, mut other) =
        (device.new_pool(KvDType::F32, 2, 16).unwrap(), cpu.new_pool(KvDType::F32, 2, 16).unwrap());
    let input = StepInput::default();
    assert!(device.forward(&input, &mut other, &mut ()).unwrap_err().to_string().contains("this is a bug"));
    assert!(cpu.forward(&input, &mut mine, &mut ()).unwrap_err().to_string().contains("this is a bug"));
    // Half of the width, half of the bytes.
    let weights = Weights::synthetic(&config(), 5);
    let half = DeviceModel::load(&weights, &config(), (&Device::Cpu, DType::F16), None).unwrap();
    assert_eq!(2 * half.block_bytes(KvDType::F32, 16), device.block_bytes(KvDType::F32, 16));
}
