//! Our own kernel `quant_rows`: up to eight rows times a matrix in blocks, in one launch and without rounding the rows.
//!
//! Called by [`super::super::quant`]; candle's kernels, six launches a product, stand in where NVRTC is not installed. The
//! kernel looks at no size: all of them are checked here.

use candle_core::quantized::{GgmlDType, QTensor};

use super::{
    super::super::{Result, Tensor},
    fused::{THREADS, named},
    launch::{Argument, FUSED, Grid, address, count, ensure, fresh},
};

/// Threads of a warp, which computes an output.
const WARP: u32 = 32;

/// `x W^T` of `x` `[rows, in]`, eight rows at most, and `weight` `[out, in]`; none where the kernels cannot be had.
pub fn multiply(x: &Tensor, weight: &QTensor) -> Result<Option<Tensor>> {
    if !FUSED.is_there(x.dtype()) {
        return Ok(None);
    }
    let (rows, width) = x.dims2()?;
    let (outputs, inputs) = weight.shape().dims2()?;
    let block = match weight.dtype() {
        GgmlDType::Q8_0 => "q8",
        GgmlDType::Q4_0 => "q4",
        GgmlDType::Q4K => "q4k",
        other => candle_core::bail!("weights in {other:?} are not supported: this is a bug"),
    };
    let at_once = match rows {
        1 | 2 => rows,
        3 | 4 => 4,
        5..=8 => 8,
        _ => candle_core::bail!("{rows} rows at once are not supported: this is a bug"),
    };
    let x = x.contiguous()?;
    let is_whole = inputs.is_multiple_of(weight.dtype().block_size());
    ensure(width == inputs && is_whole, "rows of another width than the weights")?;
    // Elements are read in fours.
    ensure(x.layout().start_offset().is_multiple_of(4), "rows that are not aligned")?;
    let out = fresh(&[rows, outputs], x.dtype(), x.device())?;
    let arguments = [
        Argument::Address(weight.device_ptr()?.addr() as u64),
        address(&x)?,
        address(&out)?,
        count(rows)?.into(),
        count(outputs)?.into(),
        count(inputs)?.into(),
    ];
    let (name, blocks) = (format!("quant_rows_{block}_{at_once}"), count(outputs)?.div_ceil(THREADS / WARP));
    // SAFETY: the sizes are those of the tensors, and `weight` outlives the call: its memory is freed in the same stream.
    unsafe { FUSED.launch(&named(&name, &x), &x, Grid::rows(blocks, THREADS), &arguments) }?;
    Ok(Some(out))
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::{super::testing, *};

    #[test]
    fn the_kernel_agrees_with_the_floats_of_the_weights_where_there_is_a_gpu() {
        let Some(gpu) = testing::gpu() else { return };
        let kinds = [(GgmlDType::Q8_0, 96), (GgmlDType::Q4_0, 96), (GgmlDType::Q4K, 768)];
        for (block, inputs) in kinds {
            agrees(&gpu, block, 46, inputs);
        }
    }

    fn agrees(gpu: &Device, block: GgmlDType, outputs: usize, inputs: usize) {
        let noise = |rows: usize, seed: usize| {
            let values = (0..rows * inputs).map(|i| ((i * 37 + seed) as f32 * 0.7).sin());
            Tensor::from_vec(values.collect::<Vec<_>>(), (rows, inputs), &Device::Cpu).unwrap()
        };
        let host = QTensor::quantize(&noise(outputs, 1), block).unwrap();
        let there = QTensor::quantize_onto(&noise(outputs, 1), block, gpu).unwrap();
        let floats = host.dequantize(&Device::Cpu).unwrap();
        for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F16, 2e-2), (DType::BF16, 2e-1)] {
            for rows in 1..=8 {
                let x = noise(rows, 2);
                let expected = x.matmul(&floats.t().unwrap()).unwrap();
                let x = x.to_device(gpu).unwrap().to_dtype(dtype).unwrap();
                let got = multiply(&x, &there).unwrap().unwrap();
                let what = format!("{block:?} {dtype:?} {rows} rows");
                // Sums of more products are larger.
                testing::assert_close(&got, &expected, tolerance * inputs as f32 / 96.0, &what);
            }
        }
    }
}
