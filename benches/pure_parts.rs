//! `cargo bench --bench pure_parts`: what runs for every token or step beside the model's products.
//!
//! Times only; that the results are right is for the tests. End to end: `tinyllava bench`; the model: `tinyllava bench engine`.

use std::{hint::black_box, sync::Arc};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use tinyllava::{
    engine::{guidance::Allowed, logprobs, sampler},
    media::pixels::Resizer,
    model::{
        KvCache, ModelShape, SequenceInput, StepInput,
        attention::{CacheLayout, Heads, Projected, paged_attention, write_cache},
        config::ModelConfig,
        kv_cache::KvDType,
        presets::Preset,
        tinyllava::shape,
    },
    output::OutputAssembler,
    prompt::Tokenizer,
    scheduler::{SamplingParams, Scheduler, SchedulerLimits, SequenceSpec},
};

/// Ids of the published model.
const VOCABULARY: usize = 151_936;
const BLOCK_SIZE: usize = 16;
/// A question about a video.
const PROMPT: usize = 600;

/// Logits about as a language model has them: a bell, and a few far above it.
fn logits() -> Vec<f32> {
    let mut state = 1u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0
    };
    let mut logits: Vec<f32> =
        (0..VOCABULARY).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 3.0 - 9.0).collect();
    (0..40).for_each(|i| logits[i * 3_001] = 12.0 - i as f32 * 0.25);
    logits
}

fn sampling(c: &mut Criterion) {
    let logits = logits();
    let tokens: Vec<u32> = (0..PROMPT as u32 + 200).map(|i| i * 97 % 20_000).collect();
    let greedy = SamplingParams::greedy(1);
    let sampled = SamplingParams { temperature: 0.7, seed: 5, ..greedy.clone() };
    let penalised = SamplingParams { repetition_penalty: 1.05, frequency_penalty: 0.1, ..greedy.clone() };
    let cases = [
        ("greedy", greedy.clone()),
        ("greedy with penalties", penalised.clone()),
        ("temperature", sampled.clone()),
        ("top-p 0.9", SamplingParams { top_p: 0.9, ..sampled.clone() }),
        ("top-k 50", SamplingParams { top_k: 50, ..sampled.clone() }),
        ("min-p 0.05", SamplingParams { min_p: 0.05, ..sampled }),
        // What the published generation_config.json of Qwen2.5 asks for.
        (
            "top-k 20, top-p 0.8, penalty",
            SamplingParams { temperature: 0.7, top_k: 20, top_p: 0.8, ..penalised },
        ),
    ];
    let mut group = c.benchmark_group("sampler, 151,936 ids");
    for (name, params) in cases {
        group.bench_function(name, |b| {
            b.iter(|| sampler::sample(black_box(&logits), &params, &tokens, PROMPT, Allowed::All));
        });
    }
    let reporting = SamplingParams { top_logprobs: Some(5), ..greedy };
    group.bench_function("5 log probabilities", |b| {
        b.iter(|| logprobs::report(black_box(&logits), &[], &reporting, 7));
    });
    group.finish();
}

fn scheduler(num_blocks: usize) -> Scheduler {
    Scheduler::new(SchedulerLimits {
        block_size: BLOCK_SIZE,
        num_blocks,
        max_running_sequences: 64,
        max_prefill_tokens: 1 << 20,
        max_scored_tokens: 3,
        max_encode_frames: 2,
        max_cached_videos: 8,
        prefix_cache: true,
        end_token_ids: vec![],
    })
}

fn sequence(first: u32, max_tokens: usize) -> SequenceSpec {
    SequenceSpec {
        token_ids: (0..PROMPT as u32).map(|i| first + i * 31 % 997).collect(),
        spans: vec![],
        cache_salt: None,
        max_tokens,
        ignore_eos: true,
        stop_token_ids: vec![],
        scores_prompt: false,
    }
}

/// Plans a step and takes in a token for each of its sequences.
fn step(scheduler: &mut Scheduler) -> usize {
    let plan = scheduler.schedule();
    let sampled = vec![1; plan.compute.iter().filter(|work| work.samples).count()];
    scheduler.complete(&plan, &sampled).len()
}

fn scheduling(c: &mut Criterion) {
    c.bench_function("scheduler: 100 steps of 64 running sequences", |b| {
        let new = || {
            let mut scheduler = scheduler(64 * 1_000);
            for i in 0..64 {
                scheduler.add(sequence(i * 1_000, 4_096));
            }
            step(&mut scheduler);
            scheduler
        };
        b.iter_batched_ref(
            new,
            |scheduler| (0..100).map(|_| step(scheduler)).sum::<usize>(),
            BatchSize::LargeInput,
        );
    });
    for (name, known) in [("known", true), ("new", false)] {
        c.bench_function(&format!("prefix cache: a request of 600 {name} tokens, from queue to end"), |b| {
            let mut scheduler = scheduler(1_000);
            let mut first = 0;
            b.iter(|| {
                first = if known { 0 } else { first + 1 };
                scheduler.add(sequence(first, 1));
                step(&mut scheduler)
            });
        });
    }
}

fn output(c: &mut Criterion) {
    let text = "<think>The ball rolls from the left to the right – and stops.</think> <answer>B</answer>";
    c.bench_function("output: a short reply to events, byte by byte", |b| {
        let tokenizer = Arc::new(Tokenizer::bytes());
        b.iter_batched_ref(
            || OutputAssembler::new(tokenizer.clone(), vec!["\n\n".into()], false),
            |assembler| text.bytes().map(|byte| assembler.push(byte.into()).len()).sum::<usize>(),
            BatchSize::SmallInput,
        );
    });
}

fn frames(c: &mut Criterion) {
    let frame: Vec<u8> = (0..1280 * 720 * 3).map(|i| (i * 7 % 251) as u8).collect();
    let resizer = Resizer::new(1280, 720, 384);
    c.bench_function("a frame of 1280 x 720 to 384 x 384", |b| b.iter(|| resizer.resize(black_box(&frame))));
}

/// Attention of one layer of the published model, a row for each of `batch` sequences.
fn attention(c: &mut Criterion) {
    let model: ModelShape = ModelShape { num_layers: 1, ..shape(&ModelConfig::preset(Preset::R1)) };
    let heads = Heads { num_heads: 16, num_kv_heads: model.num_kv_heads, head_dim: model.head_dim };
    let mut group = c.benchmark_group("attention of a decode step, one layer of R1");
    for (batch, context) in [(1, 600), (1, 3_000), (8, 600), (8, 3_000)] {
        let blocks = context / BLOCK_SIZE + 1;
        let input = StepInput {
            positions: vec![context as u32 - 1; batch],
            block_tables: (0..(batch * blocks) as u32).collect(),
            sequences: (0..batch)
                .map(|i| SequenceInput {
                    rows: i..i + 1,
                    context_len: context,
                    blocks: i * blocks..(i + 1) * blocks,
                })
                .collect(),
            ..StepInput::default()
        };
        let width = model.num_kv_heads * model.head_dim;
        let all =
            StepInput { slot_mapping: (0..batch * blocks * BLOCK_SIZE).collect(), ..StepInput::default() };
        let rows: Vec<f32> =
            (0..batch * blocks * BLOCK_SIZE * width).map(|i| (i % 17) as f32 / 17.0).collect();
        let queries: Vec<f32> = (0..batch * heads.width()).map(|i| (i % 13) as f32 / 13.0).collect();
        for dtype in [KvDType::F32, KvDType::F16] {
            let mut cache = KvCache::new(&model, dtype, batch * blocks, BLOCK_SIZE);
            let layout = CacheLayout::of(&cache);
            // Memory that was never written is one page of zeros, and too fast to read.
            write_cache(
                &mut cache.layers[0],
                &all,
                Projected::new(&rows, width, 0),
                Projected::new(&rows, width, 0),
                layout,
            );
            group.bench_function(format!("{batch} x {context} tokens in {dtype:?}"), |b| {
                let queries = Projected::new(&queries, heads.width(), 0);
                b.iter(|| paged_attention(queries, &cache.layers[0], &input, heads, layout));
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = parts;
    config = Criterion::default().sample_size(30).measurement_time(std::time::Duration::from_secs(2));
    targets = sampling, scheduling, output, frames, attention
}
criterion_main!(parts);
