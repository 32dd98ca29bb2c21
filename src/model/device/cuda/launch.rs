//! How our own kernels are compiled and called.
//!
//! Used by the operations of this folder. The kernels look at no size: whoever calls one checks all of them.

use std::{
    ffi::c_void,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use candle_core::{
    DType, Device, Storage, WithDType,
    backend::BackendStorage,
    cuda::{
        CudaDType, CudaStorage,
        cudarc::{
            driver::{
                DevicePtr, DeviceRepr, result,
                sys::{self, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig},
            },
            nvrtc,
        },
    },
};
use half::{bf16, f16};

use super::super::super::{ModelError, Result, Tensor};

/// Norms, activations, rotary positions, quantised products: for any card.
pub static FUSED: Source = Source::new("fused_kernels", include_str!("kernels/fused.cu"), None);
/// What becomes of logits: adjusted, masked, the largest, drawn.
pub static LARGEST: Source = Source::new("largest_kernel", include_str!("kernels/largest.cu"), None);
const TENSOR_CODE: &str = concat!(
    include_str!("kernels/tensor_cores.cu"),
    include_str!("kernels/attention.cu"),
    include_str!("kernels/products.cu")
);
static AMPERE: Source = Source::new("tensor_kernels", TENSOR_CODE, Some("compute_80"));
/// The same, whose kernels may begin before the one before them has ended.
static HOPPER: Source = Source::new("tensor_kernels", TENSOR_CODE, Some("compute_90"));

/// Attention and small products in `dtype` by tensor cores; none where the device or the type has none, or they cannot be compiled.
pub fn tensor_kernels(device: &Device, dtype: DType) -> Option<&'static Source> {
    if !device.is_cuda() || !matches!(dtype, DType::F16 | DType::BF16) {
        return None;
    }
    let source = match super::generation(device).ok()? {
        ..super::AMPERE => return None,
        super::AMPERE => &AMPERE,
        _ => &HOPPER,
    };
    source.is_there(dtype).then_some(source)
}

/// Compiles what a model of this type needs, and loads it onto the device. It takes seconds: better before a server is ready than in its
/// first request. What cannot be had is not there from now on.
///
/// # Errors
/// When the device fails.
pub fn prepare(device: &Device, dtype: DType) -> Result<()> {
    FUSED.load(device, dtype, &format!("gather_rows_{}", dtype.as_str()))?;
    LARGEST.load(device, DType::F32, "largest_f32")?;
    if let Some(source) = tensor_kernels(device, dtype) {
        source.load(device, dtype, "look_up")?;
    }
    super::blas::prepare(device, dtype)
}

/// A file of kernels, compiled for a type once a process.
#[derive(Debug)]
pub struct Source {
    module: &'static str,
    code: &'static str,
    /// What it is compiled for: any card that the compiler knows, or one of these and later.
    arch: Option<&'static str>,
    /// For f32, f16, bf16.
    ptx: [OnceLock<Option<String>>; 3],
    /// Those that the driver refused.
    is_refused: [AtomicBool; 3],
}

/// How a kernel is spread over the device.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    pub blocks: (u32, u32, u32),
    /// Of a block.
    pub threads: u32,
    /// Of a block, beside what the kernel says itself.
    pub shared_bytes: u32,
    /// The kernel waits itself for the one before it.
    pub begins_early: bool,
}

impl Grid {
    /// Blocks in one dimension.
    pub fn rows(blocks: u32, threads: u32) -> Self {
        Grid::of((blocks, 1, 1), threads)
    }

    /// So many blocks of so many threads.
    pub fn of(blocks: (u32, u32, u32), threads: u32) -> Self {
        Grid { blocks, threads, shared_bytes: 0, begins_early: false }
    }
}

impl Source {
    const fn new(module: &'static str, code: &'static str, arch: Option<&'static str>) -> Self {
        Source {
            module,
            code,
            arch,
            ptx: [const { OnceLock::new() }; 3],
            is_refused: [const { AtomicBool::new(false) }; 3],
        }
    }

    /// Whether its kernels for this type can be had: NVRTC must be installed.
    pub fn is_there(&self, dtype: DType) -> bool {
        self.ptx(dtype).is_some()
    }

    fn ptx(&self, dtype: DType) -> Option<&str> {
        let compile = || match self.compiled(dtype) {
            Ok(ptx) => Some(ptx),
            Err(reason) => {
                let kernels = self.module;
                tracing::warn!(
                    reason,
                    kernels,
                    "no kernels of our own: other operations stand in, which are slower"
                );
                None
            }
        };
        let number = number_and_define(dtype)?.0;
        let is_refused = self.is_refused[number].load(Ordering::Relaxed);
        self.ptx[number].get_or_init(compile).as_deref().filter(|_| !is_refused)
    }

    /// Has the driver translate the kernels of this type, of which `kernel` is one. A newer NVRTC may write what an older driver cannot read.
    fn load(&self, device: &Device, dtype: DType, kernel: &str) -> Result<()> {
        let (Some(ptx), Some((number, _))) = (self.ptx(dtype), number_and_define(dtype)) else {
            return Ok(());
        };
        if let Err(error) =
            device.as_cuda_device()?.get_or_load_custom_func(kernel, &self.module_of(dtype), ptx)
        {
            let kernels = self.module;
            tracing::warn!(%error, kernels, "the driver refuses our kernels: other operations stand in, which are slower");
            self.is_refused[number].store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn module_of(&self, dtype: DType) -> String {
        format!("{}_{}", self.module, dtype.as_str())
    }

    /// Its PTX for this type, or why there is none.
    pub(super) fn compiled(&self, dtype: DType) -> std::result::Result<String, String> {
        // Functions that do not say where they run, lambdas among them, run on the device.
        let options = ["-default-device"].into_iter().chain(number_and_define(dtype).map(|both| both.1));
        let options = nvrtc::CompileOptions {
            arch: self.arch,
            options: options.map(str::to_owned).collect(),
            ..Default::default()
        };
        match nvrtc::compile_ptx_with_opts(self.code, options) {
            Ok(ptx) => Ok(ptx.to_src()),
            // Without its library, asking it for a message about that would not end well.
            Err(nvrtc::CompileError::CompileError { log, .. }) => Err(log.to_string_lossy().into_owned()),
            Err(_) => Err("libnvrtc is not installed".into()),
        }
    }

    /// Calls the kernel `name` on the device of `like`, in whose type it computes.
    ///
    /// # Safety
    /// The arguments must be those of the kernel, and what they point to as large as it takes it to be.
    pub unsafe fn launch(&self, name: &str, like: &Tensor, grid: Grid, arguments: &[Argument]) -> Result<()> {
        let Some(ptx) = self.ptx(like.dtype()) else { return bug("a kernel that could not be compiled") };
        let device = like.device().as_cuda_device()?;
        let function = device.get_or_load_custom_func(name, &self.module_of(like.dtype()), ptx)?;
        let stream = device.cuda_stream();
        stream.context().bind_to_thread().map_err(super::failure)?;
        let mut early = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let begins_early = grid.begins_early && std::ptr::eq(self, &raw const HOPPER);
        let config = CUlaunchConfig {
            gridDimX: grid.blocks.0,
            gridDimY: grid.blocks.1,
            gridDimZ: grid.blocks.2,
            blockDimX: grid.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: grid.shared_bytes,
            hStream: stream.cu_stream(),
            attrs: &raw mut early,
            numAttrs: begins_early.into(),
        };
        let mut pointers: Vec<*mut c_void> = arguments.iter().map(Argument::pointer).collect();
        // SAFETY: the arguments are the caller's; all that is pointed to lives until the call returns, which copies it.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function.cu_function(),
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(super::failure)
    }
}

/// Number of a type, and what the sources are told of it.
fn number_and_define(dtype: DType) -> Option<(usize, &'static str)> {
    match dtype {
        DType::F32 => Some((0, "-DONLY=32")),
        DType::F16 => Some((1, "-DONLY=16")),
        DType::BF16 => Some((2, "-DONLY=0")),
        _ => None,
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
    /// A structure of addresses, and of words in pairs.
    Longs(Vec<u64>),
}

impl Argument {
    /// Where the driver finds it. How many words a structure has it knows from the kernel.
    fn pointer(&self) -> *mut c_void {
        match self {
            Argument::Address(address) => std::ptr::from_ref(address).cast_mut().cast(),
            Argument::Number(number) => std::ptr::from_ref(number).cast_mut().cast(),
            Argument::Real(real) => std::ptr::from_ref(real).cast_mut().cast(),
            Argument::Words(words) => words.as_ptr().cast_mut().cast(),
            Argument::Longs(longs) => longs.as_ptr().cast_mut().cast(),
        }
    }
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

/// Where the first element of `x` is, as an argument.
pub fn address(x: &Tensor) -> Result<Argument> {
    start_of(x).map(Argument::Address)
}

/// Where the first element of `x` is. Good for as long as `x` lives.
pub fn start_of(x: &Tensor) -> Result<u64> {
    fn start<T: CudaDType + DeviceRepr>(storage: &CudaStorage) -> Result<u64> {
        Ok(storage.as_cuda_slice::<T>()?.device_ptr(&storage.device().cuda_stream()).0)
    }
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { return bug("a kernel of CUDA on a CPU") };
    let start = match x.dtype() {
        DType::F32 => start::<f32>(storage),
        DType::F16 => start::<f16>(storage),
        DType::BF16 => start::<bf16>(storage),
        DType::U8 => start::<u8>(storage),
        DType::U32 => start::<u32>(storage),
        DType::I64 => start::<i64>(storage),
        other => candle_core::bail!("a kernel over {other:?}: this is a bug"),
    }?;
    Ok(start + (layout.start_offset() * x.dtype().size_in_bytes()) as u64)
}

/// [`start_of`], or that of nothing: 0.
pub fn start_or_none(x: Option<&Tensor>) -> Result<u64> {
    x.map_or(Ok(0), start_of)
}

/// [`address`], or that of nothing.
pub fn address_or_none(x: Option<&Tensor>) -> Result<Argument> {
    start_or_none(x).map(Argument::Address)
}

/// A tensor that a kernel is about to write, all of it.
pub fn fresh(dims: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    // SAFETY: nobody reads it before the kernel has run: all that computes is in one stream.
    unsafe { Tensor::empty(dims, dtype, device) }
}

/// Puts `values` where the elements of `x` are, after all that reads them now. Of more than 64 KB the host may wait for that.
pub fn overwrite<T: WithDType + DeviceRepr>(x: &Tensor, values: &[T]) -> Result<()> {
    let fits = x.dtype() == T::DTYPE && x.is_contiguous() && x.elem_count() == values.len();
    ensure(fits, "values of another tensor")?;
    let stream = x.device().as_cuda_device()?.cuda_stream();
    stream.context().bind_to_thread().map_err(super::failure)?;
    // SAFETY: `x` has as many elements; the driver keeps a copy of what lies in ordinary host memory before it returns.
    unsafe { result::memcpy_htod_async(start_of(x)?, values, stream.cu_stream()) }.map_err(super::failure)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_has(source: &Source, dtype: DType, kernels: &[String]) {
        match source.compiled(dtype) {
            Ok(ptx) => kernels
                .iter()
                .for_each(|name| assert!(ptx.contains(&format!(".entry {name}(")), "{name} in {dtype:?}")),
            Err(reason) if reason.contains("not installed") => println!("skipped: {reason}"),
            Err(reason) => panic!("{reason}"),
        }
    }

    #[test]
    fn the_kernels_compile_for_every_type_where_nvrtc_is_installed() {
        assert_has(
            &LARGEST,
            DType::F32,
            &["largest", "draw", "adjust", "forbid"].map(|name| format!("{name}_f32")),
        );
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let kind = dtype.as_str();
            let products = ["q8", "q4", "q4k"]
                .map(|block| [1, 2, 4, 8].map(|rows| format!("quant_rows_{block}_{rows}_{kind}")));
            let mut names = products.concat();
            names.extend(["gather_rows", "rope_and_cache"].map(|name| format!("{name}_{kind}")));
            for name in ["add_rms_norm", "layer_norm", "silu_mul", "finish_rows"] {
                names.extend([format!("{name}_{kind}"), format!("{name}_{kind}_wide")]);
            }
            assert_has(&FUSED, dtype, &names);
        }
        for dtype in [DType::F16, DType::BF16] {
            let kind = dtype.as_str();
            let mut names = vec!["look_up".to_owned()];
            names.extend(
                ["product", "normed_product", "normed_gated_product"].map(|name| format!("{name}_{kind}")),
            );
            for name in ["attend", "attend_paged", "attend_fresh"] {
                names.extend([32, 64, 80, 128].map(|width| format!("{name}_{kind}_{width}")));
            }
            assert_has(&AMPERE, dtype, &names);
            assert_has(&HOPPER, dtype, &names);
        }
    }
}
