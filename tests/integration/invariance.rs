//! The same bits however a sequence is computed, for random models, lengths, cuts and neighbours.

use proptest::prelude::*;
use tinyllava::model::{
    KvPool, SequenceInput, StepInput, Tensor, VideoLanguageModel,
    config::ModelConfig,
    kv_cache::KvDType,
    layers::{Bits, WeightFormat},
    tinyllava::TinyLlava,
    weights::{StoredDType, Weights},
};

const NUM_BLOCKS: usize = 64;

/// A part of one sequence to compute.
#[derive(Debug, Clone)]
struct Part {
    tokens: Vec<u32>,
    /// First position.
    start: usize,
    /// Block table of the whole sequence.
    blocks: Vec<u32>,
}

/// Runs the parts in one step; returns the logits of each part's last row.
fn step(model: &mut TinyLlava, pool: &mut KvPool, parts: &[Part]) -> Vec<Vec<f32>> {
    let mut input = StepInput::default();
    let block_size = pool.block_size();
    for part in parts {
        let (first_row, first_block) = (input.token_ids.len(), input.block_tables.len());
        input.token_ids.extend(&part.tokens);
        for position in part.start..part.start + part.tokens.len() {
            input.positions.push(position as u32);
            let block = part.blocks[position / block_size] as usize;
            input.slot_mapping.push(block * block_size + position % block_size);
        }
        input.block_tables.extend(&part.blocks);
        let rows = first_row..input.token_ids.len();
        input.logit_rows.push(rows.end - 1);
        let context_len = part.start + part.tokens.len();
        input.sequences.push(SequenceInput {
            rows,
            context_len,
            blocks: first_block..input.block_tables.len(),
        });
    }
    let logits: Tensor = model.forward(&input, pool, &mut ()).unwrap();
    logits.to_vec2::<f32>().unwrap()
}

/// A model of random sizes with random weights.
fn model(
    heads: usize,
    group: usize,
    layers: usize,
    seed: u64,
    format: WeightFormat,
) -> (TinyLlava, ModelConfig) {
    let mut config = ModelConfig::tiny_test();
    config.text.num_attention_heads = heads * group;
    config.text.num_key_value_heads = heads;
    config.text.hidden_size = heads * group * 16;
    config.text.num_hidden_layers = layers;
    config.connector.hidden_size = config.text.hidden_size;
    let weights = Weights::synthetic(&config, seed);
    (TinyLlava::load(&weights, &config, format).unwrap(), config)
}

const FORMATS: [WeightFormat; 4] = [
    WeightFormat::Float(StoredDType::F32),
    WeightFormat::Float(StoredDType::F16),
    WeightFormat::Quant(Bits::Eight),
    WeightFormat::Quant(Bits::Four),
];

/// Blocks in an order of their own, some of them shared by nobody.
fn block_table(len: usize, block_size: usize, seed: u32) -> Vec<u32> {
    let mut blocks: Vec<u32> = (0..NUM_BLOCKS as u32).collect();
    blocks.sort_by_key(|block| (block.wrapping_add(seed)).wrapping_mul(2_654_435_761));
    blocks.truncate(len.div_ceil(block_size));
    blocks
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn chunks_batches_and_reused_prefixes_give_the_same_bits_as_one_run(
        shape in (1..3usize, 1..5usize, 1..3usize, any::<u64>()),
        len in 2..150usize,
        cuts in prop::collection::vec(1..150usize, 0..6),
        others in prop::collection::vec(1..60usize, 0..5),
        block_size in prop_oneof![Just(16usize), Just(32)],
        format in prop::sample::select(FORMATS.to_vec()),
        kept in prop_oneof![Just(KvDType::F32), Just(KvDType::F16)],
    ) {
        let (heads, group, layers, seed) = shape;
        let (mut model, config) = model(heads, group, layers, seed, format);
        let tokens: Vec<u32> = (0..len).map(|i| (i * 31 + seed as usize % 97) as u32 % config.text.vocab_size as u32).collect();
        let new_cache = |model: &TinyLlava| model.new_pool(kept, NUM_BLOCKS * 2, block_size).unwrap();
        let blocks = block_table(len, block_size, seed as u32);

        let mut cache = new_cache(&model);
        let whole = Part { tokens: tokens.clone(), start: 0, blocks: blocks.clone() };
        let expected = step(&mut model, &mut cache, &[whole])[0].clone();

        // In chunks, with other sequences beside each of them.
        let mut cache = new_cache(&model);
        let mut ends: Vec<usize> = cuts.into_iter().filter(|&cut| cut < len).chain([len]).collect();
        ends.sort_unstable();
        ends.dedup();
        let mut start = 0;
        let mut last = vec![];
        for end in ends {
            let mine = Part { tokens: tokens[start..end].to_vec(), start, blocks: blocks.clone() };
            let mut parts = vec![mine];
            for (n, &other) in others.iter().enumerate() {
                let elsewhere = (0..other.div_ceil(block_size)).map(|i| (NUM_BLOCKS + n * 8 + i) as u32).collect();
                parts.insert(n % 2, Part { tokens: vec![n as u32 + 1; other], start: 0, blocks: elsewhere });
            }
            let place = parts.iter().position(|part| part.blocks == blocks).unwrap();
            last = step(&mut model, &mut cache, &parts)[place].clone();
            start = end;
        }
        prop_assert_eq!(&last, &expected, "chunked beside others");

        // Another sequence that takes over the first blocks, as after a prefix hit.
        let hit = (len - 1) / block_size * block_size;
        let mut reused = blocks[..hit / block_size].to_vec();
        reused.extend((hit / block_size..len.div_ceil(block_size)).map(|i| (NUM_BLOCKS + 40 + i) as u32));
        let rest = Part { tokens: tokens[hit..].to_vec(), start: hit, blocks: reused };
        prop_assert_eq!(&step(&mut model, &mut cache, &[rest])[0], &expected, "after a prefix hit");
    }
}
