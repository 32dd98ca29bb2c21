//! Attention over a paged cache on CUDA.
//!
//! By our own kernels ([`super::flash`], [`super::rope`]) where they know the model, else by those of `mistralrs-paged-attn`, in whose layout
//! the cache is. These end the process, or compute nothing, where they are called with what they do not know: every
//! condition is checked before, by [`Kernels::fit`] when a model is loaded and by `checked` at each cache. Their
//! `copy_blocks` and `swap_blocks` are never used.

use candle_core::{DType, Device};
use mistralrs_paged_attn::{paged_attention, reshape_and_cache};

use super::{
    super::{
        super::{ModelShape, Result, Tensor, config::Qwen2Config},
        attention::{LayerCache, PagedAttention, Projected, Rotary, Rows, attend_causally},
        step::{Decodes, Prefill, Step},
    },
    flash::{self, Workspace},
    launch::{FUSED, ensure, fresh, tensor_kernels},
    rope::rope_and_cache,
};

/// Widths of a head that crate's kernels were compiled for.
const HEAD_DIMS: [usize; 8] = [64, 80, 96, 112, 128, 192, 256, 512];
/// Blocks they were compiled for; with others they compute nothing.
const BLOCK_SIZES: [usize; 3] = [8, 16, 32];
/// Bytes of a cache element's vector: keys of one head lie in pieces of as many.
const VECTOR_BYTES: usize = 16;
/// Longest context: the scores of a sequence stand in 48 KiB of shared memory, next to little else.
const MAX_CONTEXT: usize = 8192;
/// Softcapping that does nothing.
const NO_CAP: f32 = 1.0;

/// Keys `[blocks, kv_heads, head_dim / x, block_size, x]`, values `[blocks, kv_heads, head_dim, block_size]`.
#[derive(Debug)]
pub struct Kernels {
    counters: Tensor,
    dtype: DType,
    has_pool: bool,
}

impl Kernels {
    /// For caches of this type on this device.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(device: &Device, dtype: DType) -> Result<Self> {
        let has_pool = super::pool(device)?.is_some();
        Ok(Kernels { counters: flash::counters(device)?, dtype, has_pool })
    }

    /// Whether there are kernels for a model of these sizes.
    pub fn fit((device, dtype): (&Device, DType), config: &Qwen2Config, context: usize) -> bool {
        let (dim, group) = (config.head_dim(), config.num_attention_heads / config.num_key_value_heads);
        let is_known = flash::knows(dim, group) && tensor_kernels(device, dtype).is_some();
        context <= MAX_CONTEXT && (is_known || HEAD_DIMS.contains(&dim))
    }
}

fn checked(dtype: DType, block_size: usize) -> Result<usize> {
    if !BLOCK_SIZES.contains(&block_size) {
        candle_core::bail!("blocks of {block_size} tokens are not supported on a GPU: use 8, 16 or 32");
    }
    if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
        candle_core::bail!("a cache in {dtype:?} is not supported on a GPU: use f32, f16 or bf16");
    }
    Ok(VECTOR_BYTES / dtype.size_in_bytes())
}

/// Whether `cache` is as [`Kernels`] lays it out, for a model of these sizes.
pub(super) fn is_laid_out(cache: &LayerCache, kv_heads: usize, dim: usize, dtype: DType) -> Result<bool> {
    let (num_blocks, _, _, block_size, x) = cache.keys.dims5()?;
    Ok(x * dtype.size_in_bytes() == VECTOR_BYTES
        && cache.keys.dims() == [num_blocks, kv_heads, dim / x, block_size, x]
        && dim.is_multiple_of(x)
        && cache.values.dims() == [num_blocks, kv_heads, dim, block_size]
        && [&cache.keys, &cache.values].iter().all(|side| side.dtype() == dtype && side.is_contiguous()))
}

/// `x` `[rows, heads, dim]` as the kernels read it: rows may lie apart, the heads of a row may not.
fn whole_rows(x: &Tensor) -> Result<Tensor> {
    let dim = x.dim(2)?;
    if x.stride()[1..] == [dim, 1] { Ok(x.clone()) } else { x.contiguous() }
}

impl PagedAttention for Kernels {
    fn new_layer(
        &self,
        shape: &ModelShape,
        num_blocks: usize,
        block_size: usize,
        (dtype, device): (DType, &Device),
    ) -> Result<LayerCache> {
        let x = checked(dtype, block_size)?;
        let (heads, dim) = (shape.num_kv_heads, shape.head_dim);
        Ok(LayerCache {
            keys: Tensor::zeros((num_blocks, heads, dim / x, block_size, x), dtype, device)?,
            values: Tensor::zeros((num_blocks, heads, dim, block_size), dtype, device)?,
        })
    }

    fn write(&self, cache: &LayerCache, keys: &Tensor, values: &Tensor, step: &Step) -> Result<()> {
        let (keys, values) = (whole_rows(keys)?, whole_rows(values)?);
        reshape_and_cache(&keys, &values, None, None, &cache.keys, &cache.values, &step.slots)
    }

    fn turn_and_write_at_once(
        &self,
        cache: &LayerCache,
        projected: &Projected,
        rotary: &Rotary,
        step: &Step,
    ) -> Result<Option<Rows>> {
        let all = rope_and_cache(projected, cache, rotary, step)?;
        all.map(|all| Rows::of(&all, projected)).transpose()
    }

    fn read(&self, cache: &LayerCache, blocks: &Tensor, context_len: usize) -> Result<(Tensor, Tensor)> {
        let (_, heads, dim, block_size) = cache.values.dims4()?;
        let keys = cache.keys.index_select(blocks, 0)?.permute((0, 3, 1, 2, 4))?;
        let values = cache.values.index_select(blocks, 0)?.permute((0, 3, 1, 2))?;
        let side = |x: Tensor| {
            let slots = blocks.dim(0)? * block_size;
            x.contiguous()?.reshape((slots, heads, dim))?.narrow(0, 0, context_len)
        };
        Ok((side(keys)?, side(values)?))
    }

    fn prefill(&self, queries: &Tensor, keys: &Tensor, values: &Tensor, prefill: &Prefill) -> Result<Tensor> {
        // Of one sequence: `[1, heads, rows, head_dim]`.
        let side = |x: &Tensor| x.transpose(0, 1)?.unsqueeze(0);
        match flash::attend(&side(queries)?, &side(keys)?, &side(values)?, true)? {
            Some(attended) => attended.squeeze(0)?.transpose(0, 1),
            None => attend_causally(queries, keys, values, prefill.mask()?.as_ref()),
        }
    }

    fn decode(&self, queries: &Tensor, cache: &LayerCache, decodes: &Decodes) -> Result<Tensor> {
        let queries = whole_rows(queries)?;
        let (_, heads, dim) = queries.dims3()?;
        let kv_heads = cache.values.dim(1)?;
        if flash::knows(dim, heads / kv_heads)
            && decodes.len() * kv_heads <= flash::MAX_COUNTERS
            && let Some(kernels) = tensor_kernels(queries.device(), queries.dtype())
        {
            let out = fresh(queries.dims(), queries.dtype(), queries.device())?;
            let len = flash::scratch_len(decodes.longest(), decodes.len(), kv_heads, dim);
            let scratch = fresh(&[len], DType::F32, queries.device())?;
            let workspace = Workspace { kernels, counters: &self.counters, scratch: &scratch };
            flash::decode(workspace, &queries, None, cache, decodes, &out)?;
            return Ok(out);
        }
        ensure(HEAD_DIMS.contains(&dim), "heads of a width that no kernel knows")?;
        let scale = 1.0 / (dim as f32).sqrt();
        paged_attention(
            &queries,
            None,
            None,
            &cache.keys,
            &cache.values,
            &decodes.block_tables.contiguous()?,
            &decodes.lens,
            None,
            decodes.longest(),
            scale,
            NO_CAP,
            None,
        )
    }

    fn counters(&self) -> Option<&Tensor> {
        Some(&self.counters)
    }

    fn can_be_recorded(&self) -> bool {
        // Without a pool of memory, what a step takes would be gone when it is started again.
        self.has_pool && FUSED.is_there(self.dtype)
    }
}
