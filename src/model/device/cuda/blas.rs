//! Products of many rows that cuBLASLt finishes before it writes them: with a bias, GELU by tanh, or a residual.
//!
//! Called by [`super::super::ops`]; a product, and a kernel for what follows it, stand in where this cannot be had. It is tried before it is
//! used: [`prepare`].

use std::{
    ffi::c_void,
    ptr,
    sync::atomic::{AtomicBool, Ordering},
};

use candle_core::{
    DType, Device,
    cuda::cudarc::cublaslt::{
        result::{self, CublasError},
        sys::{
            self, cublasComputeType_t, cublasLtEpilogue_t, cublasLtMatmulDescAttributes_t as Attribute,
            cublasLtMatmulPreferenceAttributes_t as Preference, cudaDataType_t,
        },
    },
};

use super::{
    super::{
        super::{Result, Tensor},
        is_switched_off, ops,
    },
    launch::{ensure, fresh, start_of, start_or_none},
};

/// What cuBLASLt may use for itself, as NVIDIA recommends it for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Everything begins at a multiple of so many bytes.
const ALIGNMENT: u32 = 16;
/// Set to 0, products are finished by kernels of our own.
const VARIABLE: &str = "TINYLLAVA_CUDA_EPILOGUES";

/// What it has shown, for f16 and for bf16.
static TRIALS: [Trial; 2] = [const { Trial::new() }; 2];

/// Whether it has once computed what it should, and whether it has once, on any card, not done so.
#[derive(Debug)]
struct Trial {
    is_passed: AtomicBool,
    is_failed: AtomicBool,
}

impl Trial {
    const fn new() -> Self {
        Trial { is_passed: AtomicBool::new(false), is_failed: AtomicBool::new(false) }
    }

    fn of(dtype: DType) -> Option<&'static Self> {
        match dtype {
            DType::F16 => Some(&TRIALS[0]),
            DType::BF16 => Some(&TRIALS[1]),
            _ => None,
        }
    }

    fn is_good(&self) -> bool {
        self.is_passed.load(Ordering::Relaxed) && !self.is_failed.load(Ordering::Relaxed)
    }

    fn fail(&self, reason: &str) {
        if !self.is_failed.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                reason,
                "cuBLASLt does not finish products: kernels of our own do, which takes longer"
            );
        }
    }
}

/// What follows a product.
#[derive(Debug, Clone, Copy, Default)]
pub struct Finish<'a> {
    /// `[out]`
    pub bias: Option<&'a Tensor>,
    /// `[rows, out]`; not with `gelu`.
    pub residual: Option<&'a Tensor>,
    pub gelu: bool,
}

/// Tries it with a small product, for a type that models compute in. If what comes is not what should, it is not there from then on.
///
/// # Errors
/// When the device fails.
pub fn prepare(device: &Device, dtype: DType) -> Result<()> {
    let Some(trial) = Trial::of(dtype).filter(|_| !is_switched_off(VARIABLE)) else { return Ok(()) };
    let noise = |rows, columns, seed| noise(rows, columns, seed)?.to_dtype(dtype)?.to_device(device);
    let (x, weight) = (noise(40, 64, 1)?, noise(48, 64, 2)?);
    let (bias, residual) = (noise(1, 48, 3)?.squeeze(0)?, noise(40, 48, 4)?);
    let values = |y: &Tensor| y.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    for (bias, residual, gelu) in [
        (Some(&bias), None, false),
        (Some(&bias), Some(&residual), false),
        (Some(&bias), None, true),
        (None, Some(&residual), false),
        (None, None, true),
    ] {
        let own = values(&ops::finish_rows(&x.matmul(&weight.t()?)?, bias, residual, gelu)?)?;
        match finished(&x, &weight, Finish { bias, residual, gelu })? {
            Ok(got) => {
                let is_right = |(got, own): (&f32, f32)| (got - own).abs() <= 0.02 * own.abs().max(1.0);
                if !values(&got)?.iter().zip(own).all(is_right) {
                    trial.fail("it computes something else");
                }
            }
            Err(error) => trial.fail(&error.to_string()),
        }
    }
    trial.is_passed.store(true, Ordering::Relaxed);
    Ok(())
}

/// Something to multiply, `[rows, columns]` in f32.
fn noise(rows: usize, columns: usize, seed: usize) -> Result<Tensor> {
    let values: Vec<f32> = (0..rows * columns).map(|i| ((i * 37 + seed * 101) as f32 * 0.7).sin()).collect();
    Tensor::from_vec(values, (rows, columns), &Device::Cpu)
}

/// `x W^T` of `x` `[rows, in]` and `weight` `[out, in]`, finished: `[rows, out]`. None where that cannot be had.
pub fn product(x: &Tensor, weight: &Tensor, finish: Finish<'_>) -> Result<Option<Tensor>> {
    let Some(trial) = Trial::of(x.dtype()).filter(|trial| trial.is_good()) else { return Ok(None) };
    let is_whole = |n: usize| (n * x.dtype().size_in_bytes()).is_multiple_of(ALIGNMENT as usize);
    if !is_whole(weight.dim(1)?) || !is_whole(weight.dim(0)?) {
        return Ok(None);
    }
    for tensor in [Some(x), Some(weight), finish.bias, finish.residual].into_iter().flatten() {
        if !tensor.is_contiguous() || !start_of(tensor)?.is_multiple_of(u64::from(ALIGNMENT)) {
            return Ok(None);
        }
    }
    match finished(x, weight, finish)? {
        Ok(y) => Ok(Some(y)),
        // Of these sizes.
        Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
        Err(error) => {
            trial.fail(&error.to_string());
            Ok(None)
        }
    }
}

/// The product, or what cuBLASLt says of it.
fn finished(
    x: &Tensor,
    weight: &Tensor,
    finish: Finish<'_>,
) -> Result<std::result::Result<Tensor, CublasError>> {
    let ((rows, inputs), (outputs, width)) = (x.dims2()?, weight.dims2()?);
    let of_type = |y: &Tensor| y.dtype() == x.dtype() && y.is_contiguous();
    let fits = (inputs == width && of_type(x) && of_type(weight))
        && finish.bias.is_none_or(|bias| of_type(bias) && bias.dims() == [outputs])
        && finish
            .residual
            .is_none_or(|other| of_type(other) && other.dims() == [rows, outputs] && !finish.gelu);
    ensure(fits, "a product of other rows")?;
    let kind = if x.dtype() == DType::F16 { cudaDataType_t::CUDA_R_16F } else { cudaDataType_t::CUDA_R_16BF };
    let (y, workspace) =
        (fresh(&[rows, outputs], x.dtype(), x.device())?, fresh(&[WORKSPACE_BYTES], DType::U8, x.device())?);
    let device = x.device().as_cuda_device()?;
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().map_err(super::failure)?;
    let blas = device.cublas_handle();
    let call = Call {
        // One stands for the other: https://docs.nvidia.com/cuda/cublas/#cublaslthandle-t
        handle: blas.handle().cast(),
        stream: stream.cu_stream().cast(),
        // Matrices are by columns there, and ours by rows: all are turned. `[x, weight, what is added, y]`
        places: [start_of(x)?, start_of(weight)?, start_or_none(finish.residual)?, start_of(&y)?],
        bias: start_or_none(finish.bias)?,
        workspace: start_of(&workspace)?,
        gelu: finish.gelu,
        sizes: [rows, inputs, outputs].map(|size| size as u64),
        kind,
    };
    // SAFETY: all places are those of tensors of these sizes, which live until the stream has come by.
    Ok(unsafe { call.run() }.map(|()| y))
}

struct Call {
    handle: sys::cublasLtHandle_t,
    stream: sys::cudaStream_t,
    places: [u64; 4],
    bias: u64,
    workspace: u64,
    gelu: bool,
    sizes: [u64; 3],
    kind: cudaDataType_t,
}

impl Call {
    /// # Safety
    /// What is at the places must be of these sizes.
    unsafe fn run(&self) -> std::result::Result<(), CublasError> {
        let [rows, inputs, outputs] = self.sizes;
        let layout = |rows, columns| Layout::new(self.kind, rows, columns);
        let (of_x, of_weight, of_y) =
            (layout(inputs, rows)?, layout(inputs, outputs)?, layout(outputs, rows)?);
        let description = Description::new()?;
        description.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &1i32)?;
        let epilogue = match (self.bias != 0, self.gelu) {
            (false, false) => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
            (true, false) => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            (false, true) => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU,
            (true, true) => cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU_BIAS,
        };
        description.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        if self.bias != 0 {
            description.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &self.bias)?;
        }
        let wish = Wish::new()?;
        wish.set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
        for which in [
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            wish.set(which, &ALIGNMENT)?;
        }
        let pointer = |place: u64| ptr::without_provenance_mut::<c_void>(place as usize);
        let [x, weight, residual, y] = self.places.map(pointer);
        // Without a residual nothing is added, and what is there not read.
        let alpha = 1f32;
        let (beta, added) = if residual.is_null() { (0f32, y) } else { (1f32, residual) };
        // SAFETY: all handles are alive; the caller's.
        unsafe {
            let found = result::get_matmul_algo_heuristic(
                self.handle,
                description.0,
                of_weight.0,
                of_x.0,
                of_y.0,
                of_y.0,
                wish.0,
            )?;
            result::matmul(
                self.handle,
                description.0,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                weight,
                of_weight.0,
                x,
                of_x.0,
                added,
                of_y.0,
                y,
                of_y.0,
                &raw const found.algo,
                pointer(self.workspace),
                WORKSPACE_BYTES,
                self.stream,
            )
        }
    }
}

/// How a matrix lies, column by column.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(kind: cudaDataType_t, rows: u64, columns: u64) -> std::result::Result<Self, CublasError> {
        result::create_matrix_layout(kind, rows, columns, rows as i64).map(Layout)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: nobody has it any more.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// What is computed. Sums are f32.
struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new() -> std::result::Result<Self, CublasError> {
        let sums = cublasComputeType_t::CUBLAS_COMPUTE_32F;
        result::create_matmul_desc(sums, cudaDataType_t::CUDA_R_32F).map(Description)
    }

    fn set<T>(&self, attribute: Attribute, value: &T) -> std::result::Result<(), CublasError> {
        // SAFETY: the value is copied.
        unsafe {
            result::set_matmul_desc_attribute(self.0, attribute, ptr::from_ref(value).cast(), size_of::<T>())
        }
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: nobody has it any more.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// What an algorithm may use, and may rely on.
struct Wish(sys::cublasLtMatmulPreference_t);

impl Wish {
    fn new() -> std::result::Result<Self, CublasError> {
        result::create_matmul_pref().map(Wish)
    }

    fn set<T>(&self, attribute: Preference, value: &T) -> std::result::Result<(), CublasError> {
        // SAFETY: the value is copied.
        unsafe {
            result::set_matmul_pref_attribute(self.0, attribute, ptr::from_ref(value).cast(), size_of::<T>())
        }
    }
}

impl Drop for Wish {
    fn drop(&mut self) {
        // SAFETY: nobody has it any more.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing, *};

    #[test]
    fn finished_products_are_those_of_the_plain_operations_where_there_is_a_gpu() {
        let Some(gpu) = testing::gpu() else { return };
        let noise = |rows, columns, seed| noise(rows, columns, seed).unwrap();
        for (dtype, tolerance) in [(DType::F16, 5e-2), (DType::BF16, 0.3)] {
            prepare(&gpu, dtype).unwrap();
            for (rows, inputs, outputs) in [(70, 64, 136), (1, 8, 8), (33, 96, 24)] {
                let there = |x: &Tensor| x.to_dtype(dtype).unwrap().to_device(&gpu).unwrap();
                let (x, weight) = (noise(rows, inputs, 1), noise(outputs, inputs, 2));
                let (bias, residual) = (noise(1, outputs, 3).squeeze(0).unwrap(), noise(rows, outputs, 4));
                let plain = x.matmul(&weight.t().unwrap()).unwrap();
                let [x, weight, own_bias, own_residual] = [&x, &weight, &bias, &residual].map(there);
                for (has_bias, has_residual, gelu) in [
                    (true, false, false),
                    (true, true, false),
                    (false, true, false),
                    (true, false, true),
                    (false, false, true),
                ] {
                    let (bias, residual) = (has_bias.then_some(&bias), has_residual.then_some(&residual));
                    let expected = ops::finish_rows(&plain, bias, residual, gelu).unwrap();
                    let finish = Finish {
                        bias: has_bias.then_some(&own_bias),
                        residual: has_residual.then_some(&own_residual),
                        gelu,
                    };
                    let got = product(&x, &weight, finish).unwrap().unwrap();
                    let what =
                        format!("{dtype:?} {rows} x {inputs} x {outputs} {has_bias} {has_residual} {gelu}");
                    testing::assert_close(&got, &expected, tolerance, &what);
                }
            }
            // Rows that do not begin where they must.
            let odd = noise(4, 64, 1).to_dtype(dtype).unwrap().to_device(&gpu).unwrap();
            let weight = noise(12, 64, 2).to_dtype(dtype).unwrap().to_device(&gpu).unwrap();
            assert!(product(&odd, &weight, Finish { gelu: true, ..Finish::default() }).unwrap().is_none());
        }
    }
}
