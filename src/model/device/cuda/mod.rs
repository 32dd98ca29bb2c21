//! What only CUDA has: kernels, and the facts of a GPU.
//!
//! Compiled with the feature `cuda` only. A GPU that fails answers every later call with an error: the engine stops then.

pub mod blas;
pub mod decode;
pub mod flash;
pub mod fused;
pub mod graph;
pub mod launch;
pub mod paged;
pub mod pinned;
pub mod quant;
mod rope;

use std::sync::Arc;

use candle_core::{
    CudaDevice, DType, Device, Storage,
    cuda::{
        CudaStorage,
        cudarc::driver::{
            CudaContext, CudaStream, DriverError, result,
            sys::{CUdevice_attribute, CUmemPool_attribute, CUmemoryPool},
        },
    },
    op::BackpropOp,
};

use super::super::{ModelError, Result, Tensor};

/// First generation that computes in bf16, and whose tensor cores our kernels are written for.
const AMPERE: i32 = 8;

/// How many GPUs the driver shows; 0 where there is no driver.
pub fn num_devices() -> usize {
    CudaContext::device_count().map_or(0, |count| usize::try_from(count).unwrap_or(0))
}

/// Opens a GPU. All of its work but a [`SecondStream`]'s copies is in one stream of its own: steps can be recorded there ([`graph`]), and no
/// tensor needs events that tell when it was last used.
///
/// # Errors
/// When there is no such GPU, or its driver fails.
pub fn open(ordinal: usize) -> Result<Device> {
    let device = CudaDevice::new_with_stream(ordinal)?;
    // SAFETY: what the second stream copies is waited for before the first reads it, and kept until it has.
    unsafe { device.disable_event_tracking() };
    let device = Device::Cuda(device);
    if let Some(pool) = pool(&device)? {
        // Memory that was freed is kept for the next tensor: else the driver takes it away whenever somebody waits.
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        let mut everything = u64::MAX;
        // SAFETY: the attribute is a number of 64 bits.
        unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut everything).cast()) }
            .map_err(failure)?;
        // A second stream's memory does not wait for what the first has given back, but not done with yet.
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES;
        let mut no = 0i32;
        // SAFETY: the attribute is a number of 32 bits.
        unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut no).cast()) }.map_err(failure)?;
    }
    Ok(device)
}

/// A stream beside that of all other work.
#[derive(Debug)]
pub struct SecondStream {
    stream: Arc<CudaStream>,
    device: CudaDevice,
}

impl SecondStream {
    /// Of this device.
    pub fn new(device: &Device) -> Result<Self> {
        let device = device.as_cuda_device()?.clone();
        let stream = device.cuda_stream().context().new_stream().map_err(failure)?;
        Ok(SecondStream { stream, device })
    }

    /// A copy of `bytes` on the device, which is there at once, whatever that does meanwhile. It is given back in this stream: until the
    /// other has read it, it must be kept.
    pub fn copied(&self, bytes: &[u8]) -> Result<Tensor> {
        let slice = self.stream.clone_htod(bytes).map_err(failure)?;
        self.stream.synchronize().map_err(failure)?;
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, self.device.clone()));
        Ok(Tensor::from_storage(storage, bytes.len(), BackpropOp::none(), false))
    }
}

/// Where the device's tensors come from, if it can do that.
fn pool(device: &Device) -> Result<Option<CUmemoryPool>> {
    if attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? == 0 {
        return Ok(None);
    }
    let stream = device.as_cuda_device()?.cuda_stream();
    stream.context().bind_to_thread().map_err(failure)?;
    // SAFETY: the device is one that the driver gave.
    unsafe { result::device::get_default_mem_pool(stream.context().cu_device()) }.map(Some).map_err(failure)
}

/// What a GPU computes in by default: bf16, or f16 where it does not know that.
pub fn native_dtype(device: &Device) -> Result<DType> {
    Ok(if generation(device)? >= AMPERE { DType::BF16 } else { DType::F16 })
}

fn generation(device: &Device) -> Result<i32> {
    attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
}

fn attribute(device: &Device, attribute: CUdevice_attribute) -> Result<i32> {
    device.as_cuda_device()?.cuda_stream().context().attribute(attribute).map_err(failure)
}

/// How many of its blocks a GPU runs at once, if they are large.
pub fn num_multiprocessors(device: &Device) -> Result<i32> {
    attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
}

/// Name of a GPU, for people.
pub fn name(device: &Device) -> Result<String> {
    let stream = device.as_cuda_device()?.cuda_stream();
    stream.context().name().map_err(failure)
}

/// Free bytes and all bytes of a GPU.
pub fn memory(device: &Device) -> Result<(usize, usize)> {
    // What loading left behind is free, too.
    device.synchronize()?;
    if let Some(pool) = pool(device)? {
        // SAFETY: the pool is the device's own.
        unsafe { result::mem_pool::trim_to(pool, 0) }.map_err(failure)?;
    }
    result::mem_get_info().map_err(failure)
}

fn failure(error: DriverError) -> ModelError {
    ModelError::Cuda(Box::new(error))
}

/// For the tests of this folder.
#[cfg(test)]
pub(crate) mod testing {
    use candle_core::{DType, Device, Tensor};

    /// The first GPU. Without one a test says so and passes.
    pub fn gpu() -> Option<Device> {
        if super::num_devices() == 0 {
            println!("skipped: no GPU");
            return None;
        }
        Some(super::open(0).unwrap())
    }

    /// Every element is a number, and no further from the expected one.
    pub fn assert_close(got: &Tensor, expected: &Tensor, tolerance: f32, what: &str) {
        assert_eq!(got.dims(), expected.dims(), "{what}");
        let values = |x: &Tensor| {
            let x = x.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
            x.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        for (index, (got, expected)) in values(got).into_iter().zip(values(expected)).enumerate() {
            assert!((got - expected).abs() < tolerance, "{what}: {got} is not {expected} at {index}");
        }
    }
}
