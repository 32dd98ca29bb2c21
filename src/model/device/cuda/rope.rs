//! Our own kernel `rope_and_cache`: bias, rotary positions, and keys and values to the paged cache, in one launch a layer.
//!
//! Called by [`super::paged`], whose several steps are its reference and stand in where NVRTC is not installed.

use candle_core::DType;

use super::{
    super::{
        super::{Result, Tensor},
        attention::{LayerCache, Projected, Rotary},
        step::Step,
    },
    fused::{THREADS, named},
    launch::{FUSED, Grid, address, address_or_none, count, ensure, fresh},
    paged::is_laid_out,
};

/// What is to be done to rows as a product gave them, before they attend.
#[derive(Debug, Clone, Copy)]
pub struct Unturned<'a> {
    /// `[heads x dim]`, of all heads: queries, keys, values.
    pub bias: Option<&'a Tensor>,
    /// Cosines and sines, `[context, dim / 2]` each.
    pub turn: (&'a Tensor, &'a Tensor),
    /// `[rows]` in i64: where keys and values go.
    pub slots: &'a Tensor,
}

impl Unturned<'_> {
    /// Whether it can be done to rows of this shape and type.
    pub fn fits(&self, (rows, heads, dim): (usize, usize, usize), dtype: DType) -> Result<bool> {
        let (cos, sin) = self.turn;
        Ok(self.bias.is_none_or(|bias| bias.dims() == [heads * dim] && bias.dtype() == dtype)
            && dim.is_multiple_of(2)
            && (cos.dim(1)? == dim / 2 && sin.dims() == cos.dims())
            && [cos, sin].iter().all(|table| table.dtype() == dtype && table.is_contiguous())
            && (self.slots.dims(), self.slots.dtype()) == (&[rows], DType::I64))
    }
}

/// Adds the bias, turns queries and keys, and writes keys and values to `cache` where the step says. Gives all of them,
/// `[rows, heads + 2 kv_heads, head_dim]`; none where the kernel cannot be had.
pub fn rope_and_cache(
    projected: &Projected,
    cache: &LayerCache,
    rotary: &Rotary,
    step: &Step,
) -> Result<Option<Tensor>> {
    if !FUSED.is_there(projected.qkv.dtype()) {
        return Ok(None);
    }
    let qkv = projected.qkv.contiguous()?;
    let (rows, heads, dim) = qkv.dims3()?;
    let unturned =
        Unturned { bias: projected.bias.as_ref(), turn: (&rotary.cos, &rotary.sin), slots: &step.slots };
    let fits = heads == projected.num_heads + 2 * projected.num_kv_heads
        && (step.positions.dims(), step.positions.dtype()) == (&[rows], DType::U32)
        && unturned.fits((rows, heads, dim), qkv.dtype())?
        && is_laid_out(cache, projected.num_kv_heads, dim, qkv.dtype())?;
    ensure(fits, "rows that do not fit their cache")?;
    let out = fresh(qkv.dims(), qkv.dtype(), qkv.device())?;
    let arguments = [
        address(&qkv)?,
        address_or_none(projected.bias.as_ref())?,
        address(&rotary.cos)?,
        address(&rotary.sin)?,
        address(&step.positions)?,
        address(&step.slots)?,
        address(&out)?,
        address(&cache.keys)?,
        address(&cache.values)?,
        count(projected.num_heads)?.into(),
        count(projected.num_kv_heads)?.into(),
        count(dim)?.into(),
        count(cache.values.dim(3)?)?.into(),
    ];
    // SAFETY: sizes are as they were found to be. Positions and slots are the scheduler's, which has no others than those of the
    // context and of the cache.
    unsafe {
        FUSED.launch(&named("rope_and_cache", &qkv), &qkv, Grid::rows(count(rows)?, THREADS), &arguments)
    }?;
    Ok(Some(out))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::{
        super::{super::rope_reference::Sizes, testing},
        *,
    };

    #[test]
    fn the_kernel_agrees_with_plain_loops_where_there_is_a_gpu() {
        let Some(gpu) = testing::gpu() else { return };
        let (rows, num_heads, num_kv_heads, dim, block_size, num_blocks) = (5, 6, 2, 64, 16, 4);
        let heads = num_heads + 2 * num_kv_heads;
        let noise = |len: usize, seed: usize| -> Vec<f32> {
            (0..len).map(|i| ((i * 37 + seed) as f32 * 0.013).sin()).collect()
        };
        let (qkv, bias) = (noise(rows * heads * dim, 1), noise(heads * dim, 4));
        let (cos, sin) = (noise(9 * dim / 2, 2), noise(9 * dim / 2, 3));
        let (positions, slots) = ([8u32, 0, 3, 3, 1], [17i64, 63, -1, 0, 40]);
        let biased: Vec<f32> = qkv.iter().zip(bias.iter().cycle()).map(|(x, bias)| x + bias).collect();
        let of_rows =
            |table: &[f32]| positions.map(|at| table[at as usize * dim / 2..][..dim / 2].to_vec()).concat();
        for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F16, 4e-3), (DType::BF16, 4e-2)] {
            let vector = 16 / dtype.size_in_bytes();
            let sizes = Sizes { num_heads, num_kv_heads, dim, block_size, vector };
            let expected =
                sizes.rope_and_cache(&biased, (&of_rows(&cos), &of_rows(&sin)), &slots, num_blocks);
            let there = |x: &[f32], dims: &[usize]| {
                Tensor::from_slice(x, dims, &gpu).unwrap().to_dtype(dtype).unwrap()
            };
            let side = |dims: &[usize]| Tensor::zeros(dims, dtype, &gpu).unwrap();
            let cache = LayerCache {
                keys: side(&[num_blocks, num_kv_heads, dim / vector, block_size, vector]),
                values: side(&[num_blocks, num_kv_heads, dim, block_size]),
            };
            let projected = Projected {
                qkv: there(&qkv, &[rows, heads, dim]),
                bias: Some(there(&bias, &[heads * dim])),
                num_heads,
                num_kv_heads,
            };
            let rotary = Rotary::new(there(&cos, &[9, dim / 2]), there(&sin, &[9, dim / 2]));
            let step = Step {
                positions: Tensor::new(&positions, &gpu).unwrap(),
                slots: Tensor::new(&slots, &gpu).unwrap(),
                token_ids: Tensor::new(&positions, &gpu).unwrap(),
                logit_rows: None,
                decodes: None,
                prefills: vec![],
            };
            let all = rope_and_cache(&projected, &cache, &rotary, &step).unwrap().unwrap();
            let turned = all.narrow(1, 0, num_heads + num_kv_heads).unwrap();
            for (got, expected) in [
                (&turned, &expected.turned),
                (&cache.keys, &expected.keys),
                (&cache.values, &expected.values),
            ] {
                let expected = Tensor::from_slice(expected, got.dims(), &Device::Cpu).unwrap();
                testing::assert_close(got, &expected, tolerance, &format!("{dtype:?}"));
            }
        }
    }
}
