//! What this machine can do: the other half of a roofline.
//!
//! Called by `tinyllava bench engine`, and by `tinyllava doctor`.

use std::{hint::black_box, time::Instant};

use rayon::prelude::*;

use super::{
    kernels::{amx, gemm::PackedMatrix, matrix::Matrix, panels::QuantPanels, quant::QuantMatrix},
    layers::WeightFormat,
    weights::StoredDType,
};

/// Size of the product: both sides, and rows.
const SIDE: usize = 2048;
const ROWS: usize = 384;
/// Memory that is read: far more than the caches hold.
const READ_BYTES: usize = 1 << 30;
/// Each measurement is the best of as many.
const REPEATS: usize = 5;

/// Whether the kernels use a processor's tile unit (Intel's AMX).
pub fn has_tile_unit() -> bool {
    amx::is_available()
}

/// Operations a second of a large matrix product with weights kept as `format`, on all threads of the kernels.
pub fn product_ops_per_second(format: WeightFormat) -> f64 {
    let weights: Vec<f32> = (0..SIDE * SIDE).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
    let x = &weights[..ROWS * SIDE];
    let part = |row: usize, start: usize, out: &mut [f32]| {
        out.copy_from_slice(&weights[row * SIDE + start..][..out.len()]);
    };
    let row = |row: usize, out: &mut [f32]| part(row, 0, out);
    let finite = "these weights are finite: this is a bug";
    let matrix = match format {
        WeightFormat::Quant(bits) => {
            let panels = QuantPanels::pack(SIDE, SIDE, bits, part).expect(finite);
            Matrix::Quant(QuantMatrix::stack(vec![panels]))
        }
        WeightFormat::Float(StoredDType::F32) => {
            Matrix::Float(PackedMatrix::pack::<f32>(SIDE, SIDE, row).expect(finite))
        }
        // Either half type is widened to f32 on the way.
        _ => Matrix::Float(PackedMatrix::pack::<half::bf16>(SIDE, SIDE, row).expect(finite)),
    };
    2.0 * (ROWS * SIDE * SIDE) as f64 / best(|| drop(black_box(matrix.multiply(x, None))))
}

/// Bytes a second that all threads together read from memory.
pub fn read_bytes_per_second() -> f64 {
    let memory = vec![1u64; READ_BYTES / 8];
    let chunk = memory.len().div_ceil(rayon::current_num_threads());
    let sum = |part: &[u64]| part.iter().fold(0u64, |sum, x| sum.wrapping_add(*x));
    READ_BYTES as f64
        / best(|| {
            black_box(memory.par_chunks(chunk).map(sum).sum::<u64>());
        })
}

/// Seconds of the fastest run.
fn best(mut run: impl FnMut()) -> f64 {
    let time = |_| {
        let started = Instant::now();
        run();
        started.elapsed().as_secs_f64()
    };
    (0..REPEATS).map(time).fold(f64::INFINITY, f64::min)
}
