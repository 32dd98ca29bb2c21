//! Our own kernel `rope_and_cache`: rotary positions, and keys and values to the paged cache, in one launch a layer.
//!
//! Called by [`super::paged`], whose two steps are its reference and stand in where NVRTC is not installed. The kernel looks at
//! no size: all of them are checked here.

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, DType, Layout, Shape, Storage,
    backend::BackendStorage,
    cuda::{
        CudaDType, WrapErr,
        cudarc::driver::{CudaSlice, DeviceRepr, LaunchConfig, PushKernelArg},
    },
};
use half::{bf16, f16};

use super::{
    super::{
        super::{ModelError, Result, Tensor},
        attention::{LayerCache, Projected, Turn},
    },
    fused::{MODULE, THREADS, on_cpu, ptx, view},
};

/// Turns queries and keys, and writes keys and values to `cache` at `slots` `[rows]` in i64. Gives both turned,
/// `[rows, heads + kv_heads, head_dim]`; none where the kernels cannot be had.
pub fn rope_and_cache(
    projected: &Projected,
    cache: &LayerCache,
    (cos, sin): &Turn,
    slots: &Tensor,
) -> Result<Option<Tensor>> {
    let Some(ptx) = ptx() else { return Ok(None) };
    let qkv = projected.qkv.contiguous()?;
    let op = RopeAndCache {
        ptx,
        num_heads: projected.num_heads,
        num_kv_heads: projected.num_kv_heads,
        cos: cos.contiguous()?,
        sin: sin.contiguous()?,
        slots: slots.contiguous()?,
        cache: cache.clone(),
    };
    op.check(&qkv)?;
    qkv.apply_op1_no_bwd(&op).map(Some)
}

struct RopeAndCache {
    ptx: &'static str,
    num_heads: usize,
    num_kv_heads: usize,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    cache: LayerCache,
}

impl RopeAndCache {
    fn check(&self, qkv: &Tensor) -> Result<()> {
        let (rows, heads, dim) = qkv.dims3()?;
        let (_, kv_heads, pieces, block_size, x) = self.cache.keys.dims5()?;
        let dtype = qkv.dtype();
        let tensors = [&self.cos, &self.sin, &self.cache.keys, &self.cache.values];
        let fits = heads == self.num_heads + 2 * self.num_kv_heads
            && self.cos.dims() == [rows, dim / 2]
            && self.sin.dims() == [rows, dim / 2]
            && self.slots.dims() == [rows]
            && self.slots.dtype() == DType::I64
            && kv_heads == self.num_kv_heads
            && dim.is_multiple_of(2)
            && pieces * x == dim
            && x * dtype.size_in_bytes() == 16
            && self.cache.values.dims()[1..] == [kv_heads, dim, block_size]
            && self.cache.values.dim(0)? == self.cache.keys.dim(0)?
            && tensors.iter().all(|x| x.dtype() == dtype)
            && self.cache.keys.is_contiguous()
            && self.cache.values.is_contiguous();
        if fits { Ok(()) } else { candle_core::bail!("rows that do not fit their cache: this is a bug") }
    }

    fn launch<T: CudaDType + DeviceRepr>(
        &self,
        qkv: &CudaStorage,
        layout: &Layout,
    ) -> Result<(CudaSlice<T>, Shape)> {
        let (rows, _, dim) = layout.shape().dims3()?;
        let count =
            |n: usize| u32::try_from(n).map_err(|_| ModelError::Msg("too many rows: this is a bug".into()));
        let device = qkv.device.clone();
        let name = format!("rope_and_cache_{}", qkv.dtype().as_str());
        let function = device.get_or_load_custom_func(&name, MODULE, self.ptx)?;
        let shape = Shape::from((rows, self.num_heads + self.num_kv_heads, dim));
        // SAFETY: the kernel writes all of it.
        let out = unsafe { device.alloc::<T>(shape.elem_count()) }?;
        let guards =
            [&self.cos, &self.sin, &self.cache.keys, &self.cache.values].map(Tensor::storage_and_layout);
        let [cos, sin, keys, values] = &guards;
        let (slots, slots_layout) = self.slots.storage_and_layout();
        let slots = view::<i64>(on_cuda(&slots)?, slots_layout)?;
        let qkv = view::<T>(qkv, layout)?;
        let (cos, sin) = (view::<T>(on_cuda(&cos.0)?, cos.1)?, view::<T>(on_cuda(&sin.0)?, sin.1)?);
        let (keys, values) =
            (view::<T>(on_cuda(&keys.0)?, keys.1)?, view::<T>(on_cuda(&values.0)?, values.1)?);
        let block_size = count(self.cache.values.dim(3)?)?;
        let (heads, kv_heads, dim) = (count(self.num_heads)?, count(self.num_kv_heads)?, count(dim)?);
        let config =
            LaunchConfig { grid_dim: (count(rows)?, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        let mut arguments = function.builder();
        arguments.arg(&qkv).arg(&cos).arg(&sin).arg(&slots).arg(&out).arg(&keys).arg(&values);
        arguments.arg(&heads).arg(&kv_heads).arg(&dim).arg(&block_size);
        // SAFETY: the arguments are those of the kernel, and their sizes are as `check` found them. Slots are the
        // scheduler's, which has no others than those of the cache.
        unsafe { arguments.launch(config) }.w()?;
        Ok((out, shape))
    }
}

fn on_cuda(storage: &Storage) -> Result<&CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => on_cpu(),
    }
}

impl CustomOp1 for RopeAndCache {
    fn name(&self) -> &'static str {
        "rope_and_cache"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        on_cpu()
    }

    fn cuda_fwd(&self, qkv: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        fn wrap<T: CudaDType>(
            (out, shape): (CudaSlice<T>, Shape),
            qkv: &CudaStorage,
        ) -> (CudaStorage, Shape) {
            (CudaStorage::wrap_cuda_slice(out, qkv.device.clone()), shape)
        }
        Ok(match qkv.dtype() {
            DType::F32 => wrap(self.launch::<f32>(qkv, layout)?, qkv),
            DType::F16 => wrap(self.launch::<f16>(qkv, layout)?, qkv),
            DType::BF16 => wrap(self.launch::<bf16>(qkv, layout)?, qkv),
            other => candle_core::bail!("rope_and_cache in {other:?} is not supported: this is a bug"),
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::{super::super::rope_reference::Sizes, *};

    #[test]
    fn the_kernel_agrees_with_plain_loops_where_there_is_a_gpu() {
        if super::super::num_devices() == 0 {
            return println!("skipped: no GPU");
        }
        let gpu = Device::new_cuda(0).unwrap();
        let (rows, num_heads, num_kv_heads, dim, block_size, num_blocks) = (5, 6, 2, 64, 16, 4);
        let noise = |len: usize, seed: usize| -> Vec<f32> {
            (0..len).map(|i| ((i * 37 + seed) as f32 * 0.013).sin()).collect()
        };
        let qkv = noise(rows * (num_heads + 2 * num_kv_heads) * dim, 1);
        let (cos, sin) = (noise(rows * dim / 2, 2), noise(rows * dim / 2, 3));
        let slots: Vec<i64> = vec![17, 63, -1, 0, 40];
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 2e-3), (DType::BF16, 2e-2)] {
            let vector = 16 / dtype.size_in_bytes();
            let sizes = Sizes { num_heads, num_kv_heads, dim, block_size, vector };
            let expected = sizes.rope_and_cache(&qkv, (&cos, &sin), &slots, num_blocks);
            let there = |x: &[f32], dims: &[usize]| {
                Tensor::from_slice(x, dims, &gpu).unwrap().to_dtype(dtype).unwrap()
            };
            let side = |dims: &[usize]| Tensor::zeros(dims, dtype, &gpu).unwrap();
            let cache = LayerCache {
                keys: side(&[num_blocks, num_kv_heads, dim / vector, block_size, vector]),
                values: side(&[num_blocks, num_kv_heads, dim, block_size]),
            };
            let projected = Projected {
                qkv: there(&qkv, &[rows, num_heads + 2 * num_kv_heads, dim]),
                num_heads,
                num_kv_heads,
            };
            let turn = (there(&cos, &[rows, dim / 2]), there(&sin, &[rows, dim / 2]));
            let slots = Tensor::new(slots.as_slice(), &gpu).unwrap();
            let turned = rope_and_cache(&projected, &cache, &turn, &slots).unwrap().unwrap();
            for (got, expected) in [
                (&turned, &expected.turned),
                (&cache.keys, &expected.keys),
                (&cache.values, &expected.values),
            ] {
                let got = got.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
                let got = got.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                let off = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(off < tolerance, "{dtype:?}: {off}");
            }
        }
    }
}
