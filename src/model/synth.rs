//! Random checkpoints: the same weights in memory ([`super::weights::Weights::synthetic`]) and on disk.
//!
//! Called by `cli/synth.rs` and by the loader of `synth:` models. Every element is a function of (seed, tensor name,
//! position), so any part can be made alone, in any order, on any thread.

use std::path::Path;

use half::bf16;
use rayon::prelude::*;
use serde_json::{Value, json};

pub use super::checkpoint_writer::WriteError;
use super::{
    checkpoint::GenerationConfig,
    checkpoint_writer::{CheckpointWriter, MAX_SHARD_BYTES, Planned, pretty, split},
    config::ModelConfig,
    embedded,
    layout::TensorSpec,
};

/// Bytes made, then written, at a time: what a checkpoint of any size needs of memory.
const CHUNK_BYTES: usize = 16 << 20;

/// Elements of one parallel task.
const ELEMENTS_A_TASK: usize = 1 << 16;
/// Standard deviation of a sum of four uniform 16-bit numbers: sqrt(4 (2^32 - 1) / 12).
const SUM_DEVIATION: f32 = 37_837.227;
/// Its mean: 4 (2^16 - 1) / 2.
const SUM_MEAN: i32 = 131_070;

/// The random numbers of one tensor.
#[derive(Debug, Clone, Copy)]
pub struct Noise {
    key: u64,
    mean: f32,
    deviation: f32,
}

impl Noise {
    /// Scales that keep activations near one in every layer: norms about 1, biases small, and matrices by the
    /// square root of the elements each output sums over.
    pub(super) fn of(seed: u64, name: &str, shape: &[usize]) -> Self {
        let (mean, deviation) = match shape {
            [_] if name.ends_with("bias") => (0.0, 0.02),
            [_] => (1.0, 0.05),
            _ => (0.0, (shape[1..].iter().product::<usize>() as f32).sqrt().recip()),
        };
        // FNV-1a over the name, started by the seed.
        let start = mix(seed) ^ 0xcbf2_9ce4_8422_2325;
        let hash =
            name.bytes().fold(start, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        Noise { key: mix(hash), mean, deviation }
    }

    /// Writes elements `first..` as little-endian bf16. Integer arithmetic up to the last multiplication, so that
    /// every machine makes the same bytes.
    pub(super) fn fill(&self, first: usize, out: &mut [u8]) {
        let scale = self.deviation / SUM_DEVIATION;
        for (position, bytes) in (first as u64..).zip(out.as_chunks_mut::<2>().0) {
            let bits = mix(self.key.wrapping_add(position.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            let sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
            // Four uniform numbers are close enough to a normal one, and need no logarithm.
            let value = self.mean + (sum as i32 - SUM_MEAN) as f32 * scale;
            *bytes = bf16::from_f32(value).to_le_bytes();
        }
    }

    /// [`Noise::fill`] on all threads.
    fn fill_parallel(&self, first: usize, out: &mut [u8]) {
        out.par_chunks_mut(2 * ELEMENTS_A_TASK)
            .enumerate()
            .for_each(|(task, out)| self.fill(first + task * ELEMENTS_A_TASK, out));
    }
}

/// The finaliser of SplitMix64: every bit of the input moves every bit of the output.
fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// All bytes of one random tensor.
pub(super) fn tensor_bytes(seed: u64, name: &str, shape: &[usize]) -> Vec<u8> {
    let mut bytes = vec![0; 2 * shape.iter().product::<usize>()];
    Noise::of(seed, name, shape).fill_parallel(0, &mut bytes);
    bytes
}

/// Bytes of all tensors of a synthetic checkpoint, the unused ones included.
pub fn num_bytes(config: &ModelConfig) -> u64 {
    2 * config.num_parameters()
}

/// Writes a random bf16 checkpoint in the published layout, with the embedded model's tokenizer, to a directory that
/// does not exist or is empty. `on_written` is told the bytes of tensors as they are written, [`num_bytes`] in all.
/// After an error nothing is left behind.
pub fn write_checkpoint(
    config: &ModelConfig,
    seed: u64,
    out: &Path,
    on_written: &mut dyn FnMut(u64),
) -> Result<(), WriteError> {
    write_split(config, seed, out, MAX_SHARD_BYTES, on_written)
}

fn write_split(
    config: &ModelConfig,
    seed: u64,
    out: &Path,
    max_shard_bytes: u64,
    on_written: &mut dyn FnMut(u64),
) -> Result<(), WriteError> {
    let writer = CheckpointWriter::new(out, num_bytes(config))?;
    let mut chunk = vec![0; CHUNK_BYTES];
    writer.weights(&shards(config, max_shard_bytes), &json!({"format": "pt"}), |tensor, sink| {
        let noise = Noise::of(seed, &tensor.name, &tensor.shape);
        let num_bytes = tensor.num_bytes as usize;
        for start in (0..num_bytes).step_by(CHUNK_BYTES) {
            let part = &mut chunk[..CHUNK_BYTES.min(num_bytes - start)];
            noise.fill_parallel(start / 2, part);
            sink.write(part)?;
            on_written(part.len() as u64);
        }
        Ok::<_, WriteError>(())
    })?;
    for (name, bytes) in embedded::TOKENIZER_FILES {
        writer.small(name, bytes)?;
    }
    writer.small("generation_config.json", embedded::GENERATION_CONFIG.as_bytes())?;
    writer.small("config.json", pretty(&config_json(config)).as_bytes())?;
    writer.finish()
}

/// The `config.json` of a synthetic checkpoint: replies end as the embedded tokenizer says.
pub(super) fn config_json(config: &ModelConfig) -> Value {
    config.to_json(GenerationConfig::embedded().eos_token_ids[0])
}

fn shards(config: &ModelConfig, max_shard_bytes: u64) -> Vec<Vec<Planned>> {
    let planned = |spec: TensorSpec| {
        let num_bytes = 2 * spec.num_elements() as u64;
        Planned { name: spec.name, dtype: "BF16", shape: spec.shape, num_bytes }
    };
    split(config.tensors().into_iter().map(planned).collect(), max_shard_bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{
        super::{presets::Preset, shards::SINGLE_FILE, weights::Weights},
        *,
    };

    fn write(config: &ModelConfig, max_shard_bytes: u64) -> (tempfile::TempDir, u64) {
        let dir = tempfile::tempdir().unwrap();
        let mut total = 0;
        write_split(config, 5, &dir.path().join("out"), max_shard_bytes, &mut |bytes| total += bytes)
            .unwrap();
        (dir, total)
    }

    #[test]
    fn a_written_checkpoint_opens_and_equals_the_one_in_memory() {
        let config = ModelConfig::preset(Preset::Nano);
        for max_shard_bytes in [MAX_SHARD_BYTES, num_bytes(&config) / 3] {
            let (dir, written) = write(&config, max_shard_bytes);
            let out = dir.path().join("out");
            assert_eq!(out.join(SINGLE_FILE).exists(), max_shard_bytes == MAX_SHARD_BYTES);
            assert_eq!(written, num_bytes(&config));
            let text = fs::read_to_string(out.join("config.json")).unwrap();
            assert_eq!(ModelConfig::from_json(&text).unwrap(), config);
            let stored = Weights::open(&out, &config).unwrap();
            let memory = Weights::synthetic(&config, 5);
            for spec in config.tensors() {
                let (a, b) = (stored.get(&spec.name).unwrap(), memory.get(&spec.name).unwrap());
                assert!(a.dtype == b.dtype && a.data == b.data, "{} differs", spec.name);
            }
        }
    }

    #[test]
    fn a_tensor_is_the_same_in_one_piece_and_in_many() {
        let noise = Noise::of(3, "a.weight", &[300, 1000]);
        let whole = tensor_bytes(3, "a.weight", &[300, 1000]);
        for (start, end) in [(0, 7), (7, 65_537), (131_000, 300_000)] {
            let mut part = vec![0; 2 * (end - start)];
            noise.fill_parallel(start, &mut part);
            assert!(part == whole[2 * start..2 * end], "elements {start}..{end} differ");
        }
    }

    #[test]
    fn r1_is_two_shards_like_the_published_checkpoint() {
        let shards = shards(&ModelConfig::preset(Preset::R1), MAX_SHARD_BYTES);
        assert_eq!(shards.len(), 2);
        assert!(shards[0].iter().map(|tensor| tensor.num_bytes).sum::<u64>() <= MAX_SHARD_BYTES);
    }

    #[test]
    fn a_directory_with_something_in_it_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("mine.txt"), "mine").unwrap();
        let error = write_checkpoint(&ModelConfig::tiny_test(), 0, dir.path(), &mut |_| ()).unwrap_err();
        assert!(error.to_string().contains("is not empty"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_error_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        // While it is written, somebody else takes its place.
        let mut clash = |_| fs::create_dir_all(out.join("theirs")).unwrap();
        let error = write_checkpoint(&ModelConfig::tiny_test(), 0, &out, &mut clash).unwrap_err();
        assert!(error.to_string().contains("out cannot be written"), "{error}");
        assert!(fs::read_dir(&out).unwrap().all(|entry| entry.unwrap().file_name() == "theirs"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
