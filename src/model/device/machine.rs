//! What a device can do: the other half of a roofline.
//!
//! Called by `tinyllava bench engine` only.

use std::time::Instant;

use candle_core::{DType, Device};

use super::super::{Result, Tensor};

/// Each measurement is the best of as many, after a warm-up.
const REPEATS: usize = 5;

/// Operations a second of a product of two `side` x `side` matrices.
///
/// # Errors
/// When the device fails.
pub fn product_ops_per_second(device: &Device, dtype: DType, side: usize) -> Result<f64> {
    // Not of ones: bits that never change take less power, and a GPU is faster then.
    let x = Tensor::rand(-1f32, 1f32, (side, side), device)?.to_dtype(dtype)?;
    let y = x.t()?;
    Ok(2.0 * (side as f64).powi(3) / best(device, || x.matmul(&y).map(drop))?)
}

/// Bytes a second that a copy of `num_bytes` within the device's memory reads and writes.
///
/// # Errors
/// When the device fails.
pub fn copy_bytes_per_second(device: &Device, num_bytes: usize) -> Result<f64> {
    let x = Tensor::zeros(num_bytes, DType::U8, device)?;
    Ok(2.0 * num_bytes as f64 / best(device, || x.copy().map(drop))?)
}

/// Seconds of the fastest run.
fn best(device: &Device, mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..=REPEATS {
        device.synchronize()?;
        let started = Instant::now();
        run()?;
        device.synchronize()?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_and_copies_take_time() {
        let ops = product_ops_per_second(&Device::Cpu, DType::F32, 64).unwrap();
        let bytes = copy_bytes_per_second(&Device::Cpu, 1 << 16).unwrap();
        assert!(ops.is_finite() && ops > 0.0 && bytes.is_finite() && bytes > 0.0);
    }
}
