//! Our own kernels, `kernels/fused.cu`: a residual sum with the norm that follows, and SwiGLU.
//!
//! Called by [`super::super::ops`], whose plain operations are their reference and stand in where NVRTC is not installed. How
//! the kernels of that file are had is here too; the others of them are called by `rope.rs` and `quant.rs`.

use std::sync::OnceLock;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp3, DType, Layout, Shape,
    backend::BackendStorage,
    cuda::{
        CudaDType, WrapErr,
        cudarc::{
            driver::{CudaSlice, CudaView, DeviceRepr, LaunchConfig, PushKernelArg},
            nvrtc,
        },
    },
};
use half::{bf16, f16};

use super::super::super::{ModelError, Result, Tensor};

const SOURCE: &str = include_str!("kernels/fused.cu");
pub(super) const MODULE: &str = "fused_kernels";
/// Threads of a block; whole warps, 32 at most.
pub(super) const THREADS: u32 = 256;

/// The kernels for any card, compiled once a process; none where that is not possible.
pub(super) fn ptx() -> Option<&'static str> {
    static PTX: OnceLock<Option<String>> = OnceLock::new();
    let compile = || match compiled() {
        Ok(ptx) => Some(ptx),
        Err(reason) => {
            tracing::warn!(reason, "no kernels of our own: candle's operations are used, which are slower");
            None
        }
    };
    PTX.get_or_init(compile).as_deref()
}

/// Whether the kernels can be had.
pub fn are_there() -> bool {
    ptx().is_some()
}

fn compiled() -> std::result::Result<String, String> {
    match nvrtc::compile_ptx(SOURCE) {
        Ok(ptx) => Ok(ptx.to_src()),
        // Without its library, asking it for a message about that would not end well.
        Err(nvrtc::CompileError::CompileError { log, .. }) => Err(log.to_string_lossy().into_owned()),
        Err(_) => Err("libnvrtc is not installed".into()),
    }
}

/// `x + delta` and its norm; none where the kernels cannot be had.
pub fn add_rms_norm(
    x: &Tensor,
    delta: &Tensor,
    weight: &Tensor,
    eps: f64,
) -> Result<Option<(Tensor, Tensor)>> {
    let Some(ptx) = ptx() else { return Ok(None) };
    let op = AddRmsNorm { ptx, eps: eps as f32 };
    let both = x.contiguous()?.apply_op3_no_bwd(&delta.contiguous()?, weight, &op)?;
    Ok(Some((both.get(0)?, both.get(1)?)))
}

/// `silu(gate) x up`; none where the kernels cannot be had.
pub fn silu_mul(x: &Tensor) -> Result<Option<Tensor>> {
    let Some(ptx) = ptx() else { return Ok(None) };
    x.contiguous()?.apply_op1_no_bwd(&SiluMul { ptx }).map(Some)
}

/// Rows and width of contiguous elements, as the kernels count them.
fn rows(layout: &Layout) -> Result<(u32, u32)> {
    let width = layout.dims().last().copied().unwrap_or(0).max(1);
    let count =
        |n: usize| u32::try_from(n).map_err(|_| ModelError::Msg("too many rows: this is a bug".into()));
    Ok((count(layout.shape().elem_count() / width)?, count(width)?))
}

pub(super) fn view<'a, T: CudaDType + DeviceRepr>(
    storage: &'a CudaStorage,
    layout: &Layout,
) -> Result<CudaView<'a, T>> {
    Ok(storage.as_cuda_slice::<T>()?.slice(layout.start_offset()..))
}

pub(super) fn on_cpu<T>() -> Result<T> {
    Err(ModelError::Msg("a kernel of CUDA on a CPU: this is a bug".into()))
}

struct AddRmsNorm {
    ptx: &'static str,
    eps: f32,
}

impl AddRmsNorm {
    fn launch<T: CudaDType + DeviceRepr>(
        &self,
        [x, delta, weight]: [(&CudaStorage, &Layout); 3],
    ) -> Result<CudaSlice<T>> {
        let device = x.0.device.clone();
        let (num_rows, width) = rows(x.1)?;
        let name = format!("add_rms_norm_{}", x.0.dtype().as_str());
        let function = device.get_or_load_custom_func(&name, MODULE, self.ptx)?;
        // SAFETY: the kernel writes all of it.
        let out = unsafe { device.alloc::<T>(2 * x.1.shape().elem_count()) }?;
        let (x, delta, weight) =
            (view::<T>(x.0, x.1)?, view::<T>(delta.0, delta.1)?, view::<T>(weight.0, weight.1)?);
        let config =
            LaunchConfig { grid_dim: (num_rows, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        let mut arguments = function.builder();
        arguments.arg(&x).arg(&delta).arg(&weight).arg(&out).arg(&num_rows).arg(&width).arg(&self.eps);
        // SAFETY: the arguments are those of the kernel; each row of `x`, `delta` and of both halves of `out`, and
        // `weight`, have `width` elements.
        unsafe { arguments.launch(config) }.w()?;
        Ok(out)
    }
}

impl CustomOp3 for AddRmsNorm {
    fn name(&self) -> &'static str {
        "add_rms_norm"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        on_cpu()
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        delta: &CudaStorage,
        delta_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let width = x_layout.dims().last().copied().unwrap_or(0);
        if x_layout.dims() != delta_layout.dims() || weight_layout.dims() != [width] {
            candle_core::bail!("a sum of rows of different widths: this is a bug");
        }
        let (all, device) =
            ([(x, x_layout), (delta, delta_layout), (weight, weight_layout)], x.device.clone());
        let out = match x.dtype() {
            DType::F32 => CudaStorage::wrap_cuda_slice(self.launch::<f32>(all)?, device),
            DType::F16 => CudaStorage::wrap_cuda_slice(self.launch::<f16>(all)?, device),
            DType::BF16 => CudaStorage::wrap_cuda_slice(self.launch::<bf16>(all)?, device),
            other => candle_core::bail!("add_rms_norm in {other:?} is not supported: this is a bug"),
        };
        let dims: Vec<usize> = std::iter::once(2).chain(x_layout.dims().iter().copied()).collect();
        Ok((out, dims.into()))
    }
}

struct SiluMul {
    ptx: &'static str,
}

impl SiluMul {
    fn launch<T: CudaDType + DeviceRepr>(&self, x: &CudaStorage, layout: &Layout) -> Result<CudaSlice<T>> {
        let device = x.device.clone();
        let (num_rows, both) = rows(layout)?;
        let (width, elements) = (both / 2, layout.shape().elem_count() / 2);
        let name = format!("silu_mul_{}", x.dtype().as_str());
        let function = device.get_or_load_custom_func(&name, MODULE, self.ptx)?;
        // SAFETY: the kernel writes all of it.
        let out = unsafe { device.alloc::<T>(elements) }?;
        let x = view::<T>(x, layout)?;
        let blocks = u32::try_from(elements.div_ceil(THREADS as usize))
            .map_err(|_| ModelError::Msg("too many elements: this is a bug".into()))?;
        let config =
            LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        let mut arguments = function.builder();
        arguments.arg(&x).arg(&out).arg(&num_rows).arg(&width);
        // SAFETY: the arguments are those of the kernel, which looks at the number of elements.
        unsafe { arguments.launch(config) }.w()?;
        Ok(out)
    }
}

impl CustomOp1 for SiluMul {
    fn name(&self) -> &'static str {
        "silu_mul"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        on_cpu()
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let device = x.device.clone();
        let out = match x.dtype() {
            DType::F32 => CudaStorage::wrap_cuda_slice(self.launch::<f32>(x, layout)?, device),
            DType::F16 => CudaStorage::wrap_cuda_slice(self.launch::<f16>(x, layout)?, device),
            DType::BF16 => CudaStorage::wrap_cuda_slice(self.launch::<bf16>(x, layout)?, device),
            other => candle_core::bail!("silu_mul in {other:?} is not supported: this is a bug"),
        };
        let mut dims = layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last /= 2;
        }
        Ok((out, dims.into()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::{super::super::ops, *};

    #[test]
    fn the_kernels_compile_where_nvrtc_is_installed() {
        match compiled() {
            Ok(ptx) => {
                let products =
                    ["q8", "q4"].map(|block| [1, 2, 4, 8].map(|rows| format!("quant_rows_{block}_{rows}")));
                let others = ["add_rms_norm", "silu_mul", "rope_and_cache"].map(str::to_owned);
                for name in products.concat().iter().chain(&others) {
                    for kind in ["f32", "f16", "bf16"] {
                        assert!(ptx.contains(&format!(".entry {name}_{kind}(")), "{name}_{kind}");
                    }
                }
            }
            Err(reason) if reason.contains("not installed") => println!("skipped: {reason}"),
            Err(reason) => panic!("{reason}"),
        }
    }

    #[test]
    fn the_kernels_agree_with_the_plain_operations_where_there_is_a_gpu() {
        if super::super::num_devices() == 0 {
            return println!("skipped: no GPU");
        }
        let gpu = Device::new_cuda(0).unwrap();
        let noise = |len: usize, seed: usize| (0..len).map(move |i| ((i * 37 + seed) as f32 * 0.013).sin());
        let tensor = |rows: usize, width: usize, seed| {
            let values: Vec<f32> = noise(rows * width, seed).collect();
            Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap()
        };
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
            let (x, delta) = (tensor(5, 2050, 1), tensor(5, 2050, 2));
            let weight = tensor(1, 2050, 3).squeeze(0).unwrap();
            let there = |x: &Tensor| x.to_dtype(dtype).unwrap().to_device(&gpu).unwrap();
            let close = |got: &Tensor, expected: &Tensor| {
                let got = got.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
                let off = (got - expected).unwrap().abs().unwrap().max_all().unwrap();
                let off = off.to_scalar::<f32>().unwrap();
                assert!(off < tolerance, "{dtype:?}: {off}");
            };
            let (sum, normed) =
                add_rms_norm(&there(&x), &there(&delta), &there(&weight), 1e-6).unwrap().unwrap();
            let (plain_sum, plain_normed) = ops::add_rms_norm(&x, &delta, &weight, 1e-6).unwrap();
            close(&sum, &plain_sum);
            close(&normed, &plain_normed);
            close(&silu_mul(&there(&x)).unwrap().unwrap(), &ops::silu_mul(&x).unwrap());
        }
    }
}
