//! Parity with the numbers recorded from the original implementation, through the engine that serves.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex},
};

use candle_core::{DType, Device, Tensor};
use tinyllava::{
    config::EngineConfig,
    engine::{
        EngineHandle, EngineOptions, NewSequence, PromptToken, StepObserver, StepReport, TokenEvent,
        VideoInput,
    },
    model::{
        FrameBatch, Tap, VISUAL_TOKEN, VideoLanguageModel,
        config::ModelConfig,
        device::DeviceModel,
        layers::{Bits, WeightFormat},
        tinyllava::TinyLlava,
        weights::{StoredDType, Weights},
    },
    scheduler::SamplingParams,
};

/// Everything the model computed, by name; several calls of the same name one after another.
#[derive(Clone, Default)]
struct Recording(Arc<Mutex<HashMap<String, Vec<Tensor>>>>);

impl Tap for Recording {
    fn tensor(&mut self, name: &'static str, index: Option<usize>, tensor: &Tensor) {
        let name = index.map_or(name.to_string(), |index| format!("{name}_{index}"));
        self.0.lock().unwrap().entry(name).or_default().push(tensor.clone());
    }
}

impl Recording {
    fn first(&self, name: &str) -> Tensor {
        self.0.lock().unwrap()[name][0].clone()
    }

    /// All rows of the calls that held the prompt.
    fn rows(&self, name: &str, num_rows: usize) -> Tensor {
        let all = Tensor::cat(&self.0.lock().unwrap()[name], 0).unwrap();
        all.narrow(0, 0, num_rows).unwrap()
    }
}

struct Checkpoint {
    golden: HashMap<String, Tensor>,
    end: u32,
    dir: String,
}

#[derive(Clone, Copy, Default)]
struct Hits(u64);

#[derive(Clone, Default)]
struct Observer(Arc<Mutex<Hits>>);

impl StepObserver for Observer {
    fn step(&mut self, report: &StepReport) {
        self.0.lock().unwrap().0 = report.stats.prefix.hit_tokens;
    }
}

fn checkpoint(name: &str) -> Checkpoint {
    let dir = format!("tests/golden/{name}");
    let golden = candle_core::safetensors::load(format!("{dir}/golden.safetensors"), &Device::Cpu).unwrap();
    Checkpoint { golden, end: 597, dir }
}

impl Checkpoint {
    fn open(&self) -> (Weights, ModelConfig) {
        let text = std::fs::read_to_string(format!("{}/config.json", self.dir)).unwrap();
        let config = ModelConfig::from_json(&text).unwrap();
        (Weights::open(Path::new(&self.dir), &config).unwrap(), config)
    }

    fn start(&self, config: EngineConfig, format: WeightFormat) -> (EngineHandle, Recording, Observer) {
        let (weights, model_config) = self.open();
        self.start_model(config, Box::new(TinyLlava::load(&weights, &model_config, format).unwrap()))
    }

    fn start_model(
        &self,
        config: EngineConfig,
        model: Box<dyn VideoLanguageModel>,
    ) -> (EngineHandle, Recording, Observer) {
        let (recording, observer) = (Recording::default(), Observer::default());
        let options = EngineOptions {
            config,
            num_token_ids: 600,
            end_token_ids: vec![self.end],
            observer: Box::new(observer.clone()),
            tap: Box::new(recording.clone()),
        };
        (tinyllava::engine::start(model, options).unwrap().0, recording, observer)
    }

    /// The recorded request: prompt with the video at the place of -200.
    fn request(&self) -> NewSequence {
        let ids = self.golden["input_ids"].to_vec1::<i64>().unwrap();
        let at = ids.iter().position(|&id| id == -200).unwrap();
        let mut token_ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        token_ids.splice(at..at + 1, [VISUAL_TOKEN; 16]);
        let frames = self.golden["resized_u8"].flatten_all().unwrap().to_vec1::<u8>().unwrap();
        let frames = FrameBatch { rgb: frames.into(), size: 56 };
        let videos = vec![VideoInput { span: at..at + 16, digest: [1; 32], frames }];
        NewSequence {
            token_ids,
            videos,
            cache_salt: None,
            sampling: SamplingParams { ignore_eos: true, ..SamplingParams::greedy(24) },
            guide: None,
        }
    }

    fn greedy_ids(&self) -> Vec<u32> {
        self.golden["greedy_ids"].to_vec1::<i64>().unwrap().iter().map(|&id| id as u32).collect()
    }

    fn assert_close(&self, name: &str, got: &Tensor, tolerance: f64) {
        let expected = &self.golden[name];
        assert_eq!(got.elem_count(), expected.elem_count(), "{name}: {:?} {:?}", got.dims(), expected.dims());
        let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
        let difference =
            (flat(got) - flat(expected)).unwrap().abs().unwrap().max(0).unwrap().to_scalar::<f64>().unwrap();
        assert!(difference <= tolerance, "{name} differs by {difference:e}");
    }

    /// Error of the prompt's logits, relative to their own spread.
    fn error_of(&self, logits: &Tensor) -> f64 {
        let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
        let (got, expected) = (flat(logits), flat(&self.golden["logits_last"]));
        let length = |x: Tensor| x.sqr().unwrap().mean_all().unwrap().to_scalar::<f64>().unwrap().sqrt();
        let centred = expected.broadcast_sub(&expected.mean_all().unwrap()).unwrap();
        length((got - &expected).unwrap()) / length(centred)
    }
}

async fn run(handle: &EngineHandle, sequence: NewSequence) -> Vec<u32> {
    let mut stream = handle.reserve().unwrap().submit(sequence).unwrap();
    let mut ids = vec![];
    loop {
        match stream.next().await.expect("the engine lives") {
            TokenEvent::Started { .. }
            | TokenEvent::PromptComputed(_)
            | TokenEvent::PromptScored(_)
            | TokenEvent::EndToken { .. } => {}
            TokenEvent::Token { id, .. } => ids.push(id),
            TokenEvent::Finished(_) => return ids,
            TokenEvent::Failed(error) => panic!("{error}"),
        }
    }
}

/// Scores of the tokens of a prompt.
async fn scores(handle: &EngineHandle, sequence: NewSequence) -> Vec<PromptToken> {
    let mut stream = handle.reserve().unwrap().submit(sequence).unwrap();
    let mut prompt = vec![];
    loop {
        match stream.next().await.expect("the engine lives") {
            TokenEvent::PromptScored(tokens) => prompt = tokens,
            TokenEvent::Finished(_) => return prompt,
            TokenEvent::Failed(error) => panic!("{error}"),
            _ => {}
        }
    }
}

/// Scores are of the original's distribution: here of the tokens it chose itself, which follow the
/// prompt.
#[tokio::test]
async fn scores_of_a_prompt_are_those_of_the_original_in_any_chunks() {
    let checkpoint = checkpoint("tiny");
    let logits = checkpoint.golden["greedy_scores"].to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap();
    let ids = checkpoint.greedy_ids();
    let mut first: Option<Vec<PromptToken>> = None;
    for max_prefill_tokens in [1, 7, 4096] {
        let config = EngineConfig { max_prefill_tokens, max_encode_frames: 64, ..EngineConfig::default() };
        let (engine, _, observer) = checkpoint.start(config, WeightFormat::Float(StoredDType::F32));
        let mut sequence = checkpoint.request();
        sequence.token_ids.extend(&ids);
        sequence.sampling =
            SamplingParams { top_logprobs: Some(3), scores_prompt: true, ..SamplingParams::greedy(1) };
        for _ in 0..2 {
            let prompt = scores(&engine, sequence.clone()).await;
            assert_eq!(prompt.iter().map(|token| token.id).collect::<Vec<_>>(), sequence.token_ids);
            assert!(prompt[0].logprobs.is_none() && prompt[1..].iter().all(|token| token.logprobs.is_some()));
            for (row, token) in logits.iter().zip(&prompt[prompt.len() - ids.len()..]) {
                let (id, got) = (token.id as usize, token.logprobs.as_ref().unwrap());
                let largest = row.iter().copied().fold(f64::MIN, f64::max);
                let log_sum = largest + row.iter().map(|logit| (logit - largest).exp()).sum::<f64>().ln();
                assert!((f64::from(got.chosen) - (row[id] - log_sum)).abs() < 1e-4, "{id}: {got:?}");
                assert_eq!(
                    (got.top.len(), got.top[0]),
                    (3, (token.id, got.chosen)),
                    "the original is greedy"
                );
            }
            // Kernels are batch-invariant, so the bits are the same however the prompt is cut.
            assert_eq!(first.get_or_insert_with(|| prompt.clone()), &prompt, "{max_prefill_tokens}");
        }
        assert_eq!(observer.0.lock().unwrap().0, 0, "what the cache holds has no logits");
    }
}

fn whole() -> EngineConfig {
    EngineConfig { max_prefill_tokens: 4096, max_encode_frames: 64, ..EngineConfig::default() }
}

fn chunked() -> EngineConfig {
    EngineConfig { max_prefill_tokens: 7, max_encode_frames: 1, ..EngineConfig::default() }
}

async fn assert_parity(name: &str, config: EngineConfig) {
    let checkpoint = checkpoint(name);
    let (engine, seen, _) = checkpoint.start(config, WeightFormat::Float(StoredDType::F32));
    assert_parity_of(&checkpoint, engine, seen).await;
}

async fn assert_parity_of(checkpoint: &Checkpoint, engine: EngineHandle, seen: Recording) {
    let ids = run(&engine, checkpoint.request()).await;
    checkpoint.assert_close("pixel_values", &seen.rows("pixel_values", 4), 0.0);
    for layer in 0..3 {
        checkpoint.assert_close(
            &format!("vision_hidden_{layer}"),
            &seen.rows(&format!("vision_hidden_{layer}"), 64),
            2e-5,
        );
    }
    checkpoint.assert_close("vision_features", &seen.first("vision_features"), 2e-5);
    for name in ["linear", "g0_l0_attn_out", "g0_l0_ff_out", "g0_l0_latents", "no_pos", "out"] {
        checkpoint.assert_close(
            &format!("connector_{name}"),
            &seen.first(&format!("connector_{name}")),
            2e-5,
        );
    }
    checkpoint.assert_close("inputs_embeds", &seen.rows("inputs_embeds", 214), 2e-5);
    for layer in 0..3 {
        checkpoint.assert_close(
            &format!("llm_hidden_{layer}"),
            &seen.rows(&format!("llm_hidden_{layer}"), 214),
            1e-4,
        );
    }
    let logits: Vec<Tensor> =
        seen.0.lock().unwrap()["logits_last"].iter().filter(|t| t.dims()[0] > 0).cloned().collect();
    checkpoint.assert_close("logits_last", &logits[0], 1e-4);
    checkpoint.assert_close("logits_last_f64", &logits[0], 1e-4);
    checkpoint.assert_close("greedy_scores", &Tensor::cat(&logits, 0).unwrap(), 1e-4);
    assert_eq!(ids, checkpoint.greedy_ids());
}

#[tokio::test]
async fn every_tensor_equals_the_original() {
    assert_parity("tiny", whole()).await;
}

#[tokio::test]
async fn every_tensor_equals_the_original_for_bf16_shards() {
    assert_parity("tiny_bf16_sharded", whole()).await;
}

#[tokio::test]
async fn every_tensor_equals_the_original_in_chunks() {
    assert_parity("tiny", chunked()).await;
}

/// The network that runs on GPUs, here on a CPU.
#[tokio::test]
async fn every_tensor_of_the_device_network_equals_the_original_whole_and_in_chunks() {
    for (name, config) in [("tiny", whole()), ("tiny_bf16_sharded", whole()), ("tiny", chunked())] {
        let checkpoint = checkpoint(name);
        let (weights, model_config) = checkpoint.open();
        let model = DeviceModel::load(&weights, &model_config, (&Device::Cpu, DType::F32), None).unwrap();
        let (engine, seen, _) = checkpoint.start_model(config, Box::new(model));
        assert_parity_of(&checkpoint, engine, seen).await;
    }
}

#[tokio::test]
async fn weights_kept_in_their_16_bits_give_the_same_bits_as_widened_ones() {
    let checkpoint = checkpoint("tiny_bf16_sharded");
    let mut logits = vec![];
    for format in [WeightFormat::AsStored, WeightFormat::Float(StoredDType::F32)] {
        let (engine, seen, _) = checkpoint.start(whole(), format);
        assert_eq!(run(&engine, checkpoint.request()).await, checkpoint.greedy_ids());
        logits.push(seen.first("logits_last").to_vec2::<f32>().unwrap());
    }
    assert_eq!(logits[0], logits[1]);
}

/// These checkpoints are random, and amplify what is rounded.
#[tokio::test]
async fn quantised_weights_stay_near_the_original() {
    for (name, format, most) in [
        ("tiny", WeightFormat::Quant(Bits::Eight), 0.1),
        ("tiny_bf16_sharded", WeightFormat::Quant(Bits::Eight), 0.1),
        ("tiny", WeightFormat::Quant(Bits::Four), 0.8),
        ("tiny_bf16_sharded", WeightFormat::Quant(Bits::Four), 0.8),
    ] {
        let error = error_of_logits(name, whole(), format).await;
        println!("{name} {format:?}: relative error of the logits {error:.4}");
        assert!(error < most, "{name} {format:?}: {error}");
    }
}

/// As above, with the blocks and the products of a device.
#[tokio::test]
async fn quantised_weights_on_a_device_stay_near_the_original() {
    for (name, quant, most) in [
        ("tiny", Bits::Eight, 0.1),
        ("tiny_bf16_sharded", Bits::Eight, 0.1),
        ("tiny", Bits::Four, 0.8),
        ("tiny_bf16_sharded", Bits::Four, 0.8),
    ] {
        for config in [whole(), chunked()] {
            let checkpoint = checkpoint(name);
            let (weights, model_config) = checkpoint.open();
            let place = (&Device::Cpu, DType::F32);
            let model = DeviceModel::load(&weights, &model_config, place, Some(quant)).unwrap();
            let (engine, seen, _) = checkpoint.start_model(config, Box::new(model));
            run(&engine, checkpoint.request()).await;
            // The first call that gave any.
            let logits = seen.0.lock().unwrap()["logits_last"].iter().find(|t| t.dims()[0] > 0).cloned();
            let error = checkpoint.error_of(&logits.unwrap());
            println!("{name} {quant:?} on a device: relative error of the logits {error:.4}");
            assert!(error < most, "{name} {quant:?}: {error}");
        }
    }
}

#[tokio::test]
async fn keys_and_values_in_16_bits_stay_near_the_original() {
    for name in ["tiny", "tiny_bf16_sharded"] {
        let config = EngineConfig { kv_cache_in_16_bits: true, ..whole() };
        let error = error_of_logits(name, config, WeightFormat::Float(StoredDType::F32)).await;
        println!("{name}, keys and values in 16 bits: relative error of the logits {error:.6}");
        assert!(error < 0.01, "{name}: {error}");
    }
}

/// Of the first logits, relative to their own spread.
async fn error_of_logits(name: &str, config: EngineConfig, format: WeightFormat) -> f64 {
    let checkpoint = checkpoint(name);
    let (engine, seen, _) = checkpoint.start(config, format);
    run(&engine, checkpoint.request()).await;
    checkpoint.error_of(&seen.first("logits_last"))
}

/// The request among others: other prompts, lengths and a video of its own, all sampling.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_gives_the_same_tokens_in_a_batch_in_chunks_and_after_a_prefix_hit() {
    for kv_cache_in_16_bits in [false, true] {
        assert_same_tokens_beside_others(|config| EngineConfig { kv_cache_in_16_bits, ..config }).await;
    }
}

async fn assert_same_tokens_beside_others(with_cache: impl Fn(EngineConfig) -> EngineConfig) {
    let checkpoint = checkpoint("tiny");
    let sampled = |seed| {
        let mut request = checkpoint.request();
        request.sampling = SamplingParams { temperature: 1.0, top_k: 50, seed, ..request.sampling };
        request
    };
    let alone = {
        let config = with_cache(EngineConfig { prefix_cache: false, ..whole() });
        let (engine, _, _) = checkpoint.start(config, WeightFormat::AsStored);
        let mut replies = vec![];
        for seed in 0..4 {
            replies.push(run(&engine, sampled(seed)).await);
        }
        replies.push(run(&engine, checkpoint.request()).await);
        replies
    };
    for config in [whole(), chunked()].map(&with_cache) {
        let (engine, _, observer) = checkpoint.start(config, WeightFormat::AsStored);
        let others: Vec<_> = (0..12)
            .map(|n| {
                let mut other = sampled(100 + n as u64);
                other.videos[0].digest = [n % 3; 32];
                other.sampling.max_tokens = 5 + 3 * usize::from(n);
                other.token_ids[0] = u32::from(n);
                let engine = engine.clone();
                tokio::spawn(async move { run(&engine, other).await })
            })
            .collect();
        let (a, b, c, d) = tokio::join!(
            run(&engine, sampled(0)),
            run(&engine, sampled(1)),
            run(&engine, sampled(2)),
            run(&engine, checkpoint.request())
        );
        assert_eq!([&a, &b, &c], [&alone[0], &alone[1], &alone[2]]);
        assert_eq!(d, alone[4]);
        for other in others {
            other.await.unwrap();
        }
        // Everything of the prompt but its last block is known by now.
        let before = observer.0.lock().unwrap().0;
        assert_eq!(run(&engine, sampled(3)).await, alone[3]);
        assert!(observer.0.lock().unwrap().0 - before >= 208, "no prefix hit");
    }
}
