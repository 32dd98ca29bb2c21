//! How our own kernels are compiled and called.
//!
//! Used by the operations of this folder. The kernels look at no size: whoever calls one checks all of them.

use std::sync::OnceLock;

use candle_core::{
    DType, Device, Storage,
    backend::BackendStorage,
    cuda::{
        CudaDType, CudaStorage, WrapErr,
        cudarc::{
            driver::{DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg},
            nvrtc,
        },
    },
};
use half::{bf16, f16};

use super::super::super::{ModelError, Result, Tensor};

/// Norms, activations, rotary positions, quantised products.
pub static FUSED: Source = Source::new("fused_kernels", include_str!("kernels/fused.cu"), None);
/// Attention by tensor cores, for cards that [`super::has_tensor_cores`].
pub static ATTENTION: Source =
    Source::new("attention_kernels", include_str!("kernels/attention.cu"), Some("compute_80"));

/// A file of kernels, compiled once a process when it is first needed.
#[derive(Debug)]
pub struct Source {
    module: &'static str,
    code: &'static str,
    /// What it is compiled for: any card that the compiler knows, or one of these and later.
    arch: Option<&'static str>,
    ptx: OnceLock<Option<String>>,
}

impl Source {
    const fn new(module: &'static str, code: &'static str, arch: Option<&'static str>) -> Self {
        Source { module, code, arch, ptx: OnceLock::new() }
    }

    /// Whether its kernels can be had: NVRTC must be installed.
    pub fn is_there(&self) -> bool {
        self.ptx().is_some()
    }

    fn ptx(&self) -> Option<&str> {
        let compile = || match self.compiled() {
            Ok(ptx) => Some(ptx),
            Err(reason) => {
                let kernels = self.module;
                tracing::warn!(reason, kernels, "no kernels of our own: other operations stand in, which are slower");
                None
            }
        };
        self.ptx.get_or_init(compile).as_deref()
    }

    /// Its PTX, or why there is none.
    pub(super) fn compiled(&self) -> std::result::Result<String, String> {
        let options = nvrtc::CompileOptions { arch: self.arch, ..Default::default() };
        match nvrtc::compile_ptx_with_opts(self.code, options) {
            Ok(ptx) => Ok(ptx.to_src()),
            // Without its library, asking it for a message about that would not end well.
            Err(nvrtc::CompileError::CompileError { log, .. }) => Err(log.to_string_lossy().into_owned()),
            Err(_) => Err("libnvrtc is not installed".into()),
        }
    }

    /// Calls the kernel `name` on the device of `like`, with blocks of `threads` threads.
    ///
    /// # Safety
    /// The arguments must be those of the kernel, and what they point to as large as it takes it to be.
    pub unsafe fn launch(
        &self,
        name: &str,
        like: &Tensor,
        grid: (u32, u32, u32),
        threads: u32,
        arguments: &[Argument],
    ) -> Result<()> {
        let Some(ptx) = self.ptx() else { return bug("a kernel that could not be compiled") };
        let function = like.device().as_cuda_device()?.get_or_load_custom_func(name, self.module, ptx)?;
        let config = LaunchConfig { grid_dim: grid, block_dim: (threads, 1, 1), shared_mem_bytes: 0 };
        let mut builder = function.builder();
        for argument in arguments {
            match argument {
                Argument::Address(address) => builder.arg(address),
                Argument::Number(number) => builder.arg(number),
                Argument::Real(real) => builder.arg(real),
                // The driver knows how many of them the kernel takes.
                Argument::Words(words) => builder.arg(&words[0]),
            };
        }
        // SAFETY: the caller's.
        unsafe { builder.launch(config) }.w()?;
        Ok(())
    }
}

/// What a kernel is called with.
#[derive(Debug)]
pub enum Argument {
    /// In the device's memory; 0 for none.
    Address(u64),
    Number(u32),
    Real(f32),
    /// A structure of words.
    Words(Vec<u32>),
}

impl From<u32> for Argument {
    fn from(number: u32) -> Self {
        Argument::Number(number)
    }
}

impl From<f32> for Argument {
    fn from(real: f32) -> Self {
        Argument::Real(real)
    }
}

/// Where the first element of `x` is. Good for as long as `x` lives.
pub fn address(x: &Tensor) -> Result<Argument> {
    fn start<T: CudaDType + DeviceRepr>(storage: &CudaStorage) -> Result<u64> {
        Ok(storage.as_cuda_slice::<T>()?.device_ptr(&storage.device().cuda_stream()).0)
    }
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { return bug("a kernel of CUDA on a CPU") };
    let start = match x.dtype() {
        DType::F32 => start::<f32>(storage),
        DType::F16 => start::<f16>(storage),
        DType::BF16 => start::<bf16>(storage),
        DType::U32 => start::<u32>(storage),
        DType::I64 => start::<i64>(storage),
        other => candle_core::bail!("a kernel over {other:?}: this is a bug"),
    }?;
    Ok(Argument::Address(start + (layout.start_offset() * x.dtype().size_in_bytes()) as u64))
}

/// [`address`], or that of nothing.
pub fn address_or_none(x: Option<&Tensor>) -> Result<Argument> {
    x.map_or(Ok(Argument::Address(0)), address)
}

/// A tensor that a kernel is about to write, all of it.
pub fn fresh(dims: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: nobody reads it before the kernel has run: all of a device's work is in one stream.
    unsafe { Tensor::empty(dims, dtype, device) }
}

/// A size as the kernels count.
pub fn count(n: usize) -> Result<u32> {
    u32::try_from(n).or_else(|_| bug("a size beyond 32 bits"))
}

/// Unless `is_right`, an error.
pub fn ensure(is_right: bool, what: &str) -> Result<()> {
    if is_right { Ok(()) } else { bug(what) }
}

fn bug<T>(what: &str) -> Result<T> {
    Err(ModelError::Msg(format!("{what}: this is a bug")))
}
