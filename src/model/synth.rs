//! Random checkpoints: the same weights in memory ([`super::weights::Weights::synthetic`]) and on disk.
//!
//! Called by `cli/synth.rs` and by the loader of `synth:` models. Every element is a function of (seed, tensor name,
//! position), so any part can be made alone, in any order, on any thread.

use half::bf16;
use rayon::prelude::*;

/// Elements of one parallel task.
const ELEMENTS_A_TASK: usize = 1 << 16;
/// Standard deviation of a sum of four uniform 16-bit numbers: sqrt(4 (2^32 - 1) / 12).
const SUM_DEVIATION: f32 = 37_837.227;
/// Its mean: 4 (2^16 - 1) / 2.
const SUM_MEAN: i32 = 131_070;

/// The random numbers of one tensor.
#[derive(Debug, Clone, Copy)]
struct Noise {
    key: u64,
    mean: f32,
    deviation: f32,
}

impl Noise {
    /// Scales that keep activations near one in every layer: norms about 1, biases small, and matrices by the
    /// square root of the elements each output sums over.
    fn of(seed: u64, name: &str, shape: &[usize]) -> Self {
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
    fn fill(&self, first: usize, out: &mut [u8]) {
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
