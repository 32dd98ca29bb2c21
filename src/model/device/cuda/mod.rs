//! What only CUDA has: kernels, and the facts of a GPU.
//!
//! Compiled with the feature `cuda` only. A GPU that fails answers every later call with an error: the engine stops then.

pub mod fused;
pub mod paged;
pub mod quant;
mod rope;

use candle_core::{
    DType, Device,
    cuda::cudarc::driver::{CudaContext, result, sys::CUdevice_attribute},
};

use super::super::{ModelError, Result};

/// First generation that computes in bf16.
const BF16_SINCE: i32 = 8;

/// How many GPUs the driver shows; 0 where there is no driver.
pub fn num_devices() -> usize {
    CudaContext::device_count().map_or(0, |count| usize::try_from(count).unwrap_or(0))
}

/// What a GPU computes in by default: bf16, or f16 where it does not know that.
pub fn native_dtype(device: &Device) -> Result<DType> {
    let stream = device.as_cuda_device()?.cuda_stream();
    let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
    let major = stream.context().attribute(attribute).map_err(|error| ModelError::Cuda(Box::new(error)))?;
    Ok(if major >= BF16_SINCE { DType::BF16 } else { DType::F16 })
}

/// Name of a GPU, for people.
pub fn name(device: &Device) -> Result<String> {
    let stream = device.as_cuda_device()?.cuda_stream();
    stream.context().name().map_err(|error| ModelError::Cuda(Box::new(error)))
}

/// Free bytes and all bytes of a GPU.
pub fn memory(device: &Device) -> Result<(usize, usize)> {
    let stream = device.as_cuda_device()?.cuda_stream();
    let cuda = |error| ModelError::Cuda(Box::new(error));
    stream.context().bind_to_thread().map_err(cuda)?;
    result::mem_get_info().map_err(cuda)
}
