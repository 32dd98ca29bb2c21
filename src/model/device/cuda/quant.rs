//! Our own kernel `quant_rows`: up to eight rows times a matrix in blocks, in one launch and without rounding the rows.
//!
//! Called by [`super::super::quant`]; candle's kernels, six launches a product, stand in where NVRTC is not installed. The
//! kernel looks at no size: all of them are checked here.

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Layout, Shape,
    backend::BackendStorage,
    cuda::{
        CudaDType, WrapErr,
        cudarc::driver::{CudaSlice, DeviceRepr, LaunchConfig, PushKernelArg},
    },
    quantized::{GgmlDType, QTensor},
};
use half::{bf16, f16};

use super::{
    super::super::{ModelError, Result, Tensor},
    fused::{MODULE, THREADS, on_cpu, ptx, view},
};

/// Threads of a warp, which computes an output.
const WARP: u32 = 32;
/// Weights of a block.
const BLOCK: usize = 32;

/// `x W^T` of `x` `[rows, in]`, eight rows at most, and `weight` `[out, in]`; none where the kernels cannot be had.
pub fn multiply(x: &Tensor, weight: &QTensor) -> Result<Option<Tensor>> {
    let Some(ptx) = ptx() else { return Ok(None) };
    let (rows, width) = x.dims2()?;
    let (outputs, inputs) = weight.shape().dims2()?;
    let block = match weight.dtype() {
        GgmlDType::Q8_0 => "q8",
        GgmlDType::Q4_0 => "q4",
        other => candle_core::bail!("weights in {other:?} are not supported: this is a bug"),
    };
    let count = match rows {
        1 | 2 => rows,
        3 | 4 => 4,
        5..=8 => 8,
        _ => candle_core::bail!("{rows} rows at once are not supported: this is a bug"),
    };
    if width != inputs || !inputs.is_multiple_of(BLOCK) {
        candle_core::bail!("rows of {width} elements for {inputs} inputs: this is a bug");
    }
    let op = QuantRows { ptx, weight, name: format!("quant_rows_{block}_{count}"), outputs };
    x.contiguous()?.apply_op1_no_bwd(&op).map(Some)
}

struct QuantRows<'a> {
    ptx: &'static str,
    weight: &'a QTensor,
    name: String,
    outputs: usize,
}

impl QuantRows<'_> {
    fn launch<T: CudaDType + DeviceRepr>(
        &self,
        x: &CudaStorage,
        layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let device = x.device.clone();
        let (rows, inputs) = layout.shape().dims2()?;
        // Elements are read in fours.
        if !layout.start_offset().is_multiple_of(4) {
            candle_core::bail!("rows that are not aligned: this is a bug");
        }
        let name = format!("{}_{}", self.name, x.dtype().as_str());
        let function = device.get_or_load_custom_func(&name, MODULE, self.ptx)?;
        let shape = Shape::from((rows, self.outputs));
        // SAFETY: the kernel writes all of it.
        let out: CudaSlice<T> = unsafe { device.alloc::<T>(shape.elem_count()) }?;
        let x = view::<T>(x, layout)?;
        let weight = self.weight.device_ptr()?.addr() as u64;
        let count =
            |n: usize| u32::try_from(n).map_err(|_| ModelError::Msg("too many rows: this is a bug".into()));
        let (rows, outputs, inputs) = (count(rows)?, count(self.outputs)?, count(inputs)?);
        let config = LaunchConfig {
            grid_dim: (outputs.div_ceil(THREADS / WARP), 1, 1),
            block_dim: (THREADS, 1, 1),
            shared_mem_bytes: 0,
        };
        let mut arguments = function.builder();
        arguments.arg(&weight).arg(&x).arg(&out).arg(&rows).arg(&outputs).arg(&inputs);
        // SAFETY: the arguments are those of the kernel: `weight` lives as long as `self`, on the stream that all of candle's
        // work for this device is in, and the sizes are those of the tensors.
        unsafe { arguments.launch(config) }.w()?;
        Ok((CudaStorage::wrap_cuda_slice(out, device), shape))
    }
}

impl CustomOp1 for QuantRows<'_> {
    fn name(&self) -> &'static str {
        "quant_rows"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        on_cpu()
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        match x.dtype() {
            DType::F32 => self.launch::<f32>(x, layout),
            DType::F16 => self.launch::<f16>(x, layout),
            DType::BF16 => self.launch::<bf16>(x, layout),
            other => candle_core::bail!("quant_rows in {other:?} is not supported: this is a bug"),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn the_kernel_agrees_with_the_floats_of_the_weights_where_there_is_a_gpu() {
        if super::super::num_devices() == 0 {
            return println!("skipped: no GPU");
        }
        let gpu = Device::new_cuda(0).unwrap();
        let (outputs, inputs) = (46, 96);
        let noise = |rows: usize, seed: usize| {
            let values = (0..rows * inputs).map(|i| ((i * 37 + seed) as f32 * 0.7).sin());
            Tensor::from_vec(values.collect::<Vec<_>>(), (rows, inputs), &Device::Cpu).unwrap()
        };
        for block in [GgmlDType::Q8_0, GgmlDType::Q4_0] {
            let host = QTensor::quantize(&noise(outputs, 1), block).unwrap();
            let there = QTensor::quantize_onto(&noise(outputs, 1), block, &gpu).unwrap();
            let floats = host.dequantize(&Device::Cpu).unwrap();
            for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F16, 2e-2), (DType::BF16, 2e-1)] {
                for rows in 1..=8 {
                    let x = noise(rows, 2);
                    let expected = x.matmul(&floats.t().unwrap()).unwrap();
                    let x = x.to_device(&gpu).unwrap().to_dtype(dtype).unwrap();
                    let got = multiply(&x, &there).unwrap().unwrap();
                    let got = got.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
                    let off = (got - expected).unwrap().abs().unwrap().max_all().unwrap();
                    let off = off.to_scalar::<f32>().unwrap();
                    assert!(off < tolerance, "{block:?} {dtype:?} {rows} rows: {off}");
                }
            }
        }
    }
}
