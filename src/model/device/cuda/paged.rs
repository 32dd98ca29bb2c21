//! Paged attention by the kernels of `mistralrs-paged-attn`.
//!
//! They end the process, or compute nothing, where they are called with what they do not know: every condition is
//! checked before, by [`Kernels::fit`] when a model is loaded and by `checked` at each cache. Their `copy_blocks`
//! and `swap_blocks` are never used.

use candle_core::{DType, Device};
use mistralrs_paged_attn::{flash_attn_sinks_varlen, paged_attention, reshape_and_cache};

use super::{
    super::{
        super::{ModelShape, Result, Tensor},
        attention::{LayerCache, PagedAttention, Projected, Turn, attend_causally, turned},
        step::{Decodes, Prefill, Step},
    },
    rope::rope_and_cache,
};

/// Widths of a head the kernels were compiled for.
const HEAD_DIMS: [usize; 8] = [64, 80, 96, 112, 128, 192, 256, 512];
/// Blocks they were compiled for; with others they compute nothing.
const BLOCK_SIZES: [usize; 3] = [8, 16, 32];
/// Bytes of a cache element's vector: keys of one head lie in pieces of as many.
const VECTOR_BYTES: usize = 16;
/// Longest context: the scores of a sequence stand in 48 KiB of shared memory, next to little else.
const MAX_CONTEXT: usize = 8192;
/// Softcapping that does nothing.
const NO_CAP: f32 = 1.0;
/// A window that is none.
const NO_WINDOW: usize = 0;

/// Widths of a head that [`flash_attn_sinks_varlen`] was compiled for.
const FLASH_HEAD_DIMS: [usize; 7] = [64, 80, 96, 112, 128, 192, 256];
/// Set to 1, prompts attend by that kernel, which keeps no scores. Off until a GPU has shown it right.
const FLASH_VARIABLE: &str = "TINYLLAVA_FLASH_PREFILL";

/// Keys `[blocks, kv_heads, head_dim / x, block_size, x]`, values `[blocks, kv_heads, head_dim, block_size]`.
#[derive(Debug)]
pub struct Kernels {
    flash_prefill: bool,
}

impl Kernels {
    /// As the environment asks for them.
    pub fn from_env() -> Self {
        let flash_prefill = std::env::var(FLASH_VARIABLE).is_ok_and(|value| value == "1");
        if flash_prefill {
            tracing::info!("{FLASH_VARIABLE} is set: prompts attend without a matrix of scores");
        }
        Kernels { flash_prefill }
    }

    /// Whether the kernels know a model of these sizes.
    pub fn fit(shape: &ModelShape) -> bool {
        HEAD_DIMS.contains(&shape.head_dim) && shape.context <= MAX_CONTEXT
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

/// `x` `[rows, heads, dim]` as the kernels read it: rows may lie apart, the heads of a row may not.
fn whole_rows(x: &Tensor) -> Result<Tensor> {
    let dim = x.dim(2)?;
    if x.stride()[1..] == [dim, 1] { Ok(x.clone()) } else { x.contiguous() }
}

/// Whether [`flash_attn_sinks_varlen`] knows these sizes: it counts elements in 32 bits, and tiles of 8 rows in 16.
fn flash_fits(queries: &Tensor, keys: &Tensor, values: &Tensor) -> Result<bool> {
    let (rows, num_heads, dim) = queries.dims3()?;
    let (context_len, num_kv_heads, key_dim) = keys.dims3()?;
    let dtype = queries.dtype();
    Ok(FLASH_HEAD_DIMS.contains(&dim)
        && key_dim == dim
        && values.dims() == keys.dims()
        && (keys.dtype(), values.dtype()) == (dtype, dtype)
        && matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
        && num_heads.is_multiple_of(num_kv_heads)
        && rows > 0
        && rows <= context_len
        && rows.div_ceil(8) <= u16::MAX.into()
        && queries.elem_count() <= i32::MAX as usize
        && keys.elem_count() <= i32::MAX as usize)
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

    fn turn_and_write(
        &self,
        cache: &LayerCache,
        projected: &Projected,
        turn: &Turn,
        step: &Step,
    ) -> Result<Tensor> {
        if let Some(turned) = rope_and_cache(projected, cache, turn, &step.slots)? {
            return Ok(turned);
        }
        let (turned, keys) = turned(projected, turn)?;
        self.write(cache, &keys, &projected.values()?, step)?;
        Ok(turned)
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
        if !(self.flash_prefill && flash_fits(queries, keys, values)?) {
            return attend_causally(queries, keys, values, prefill.mask.as_ref());
        }
        let scale = 1.0 / (queries.dim(2)? as f32).sqrt();
        // Of one sequence: `[1, heads, rows, head_dim]`. Its last row sees the last key, and no window narrows that.
        let queries = queries.transpose(0, 1)?.unsqueeze(0)?;
        let (of_queries, of_keys) = (prefill.bounds.narrow(0, 0, 2)?, prefill.bounds.narrow(0, 2, 2)?);
        let attended =
            flash_attn_sinks_varlen(&queries, keys, values, None, &of_queries, &of_keys, scale, NO_WINDOW)?;
        attended.squeeze(0)?.transpose(0, 1)
    }

    fn decode(&self, queries: &Tensor, cache: &LayerCache, decodes: &Decodes) -> Result<Tensor> {
        let queries = whole_rows(queries)?;
        let scale = 1.0 / (queries.dim(2)? as f32).sqrt();
        let longest = decodes.context_lens.iter().copied().max().unwrap_or(0);
        paged_attention(
            &queries,
            None,
            None,
            &cache.keys,
            &cache.values,
            &decodes.block_tables.contiguous()?,
            &decodes.lens,
            None,
            longest,
            scale,
            NO_CAP,
            None,
        )
    }
}
