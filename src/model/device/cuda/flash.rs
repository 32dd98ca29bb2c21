//! Our own kernels of `kernels/attention.cu`: attention by tensor cores, which keeps no matrix of scores.
//!
//! Called by [`super::super::attention`] for whole matrices, and by [`super::paged`] and [`super::decode`] for decoding. They are for f16 and
//! bf16, and for cards that have tensor cores for both; the plain operations are their reference and stand in elsewhere.

use std::f32::consts::LOG2_E;

use candle_core::{DType, Device};

use super::{
    super::{
        super::{Result, Tensor},
        attention::LayerCache,
        step::Decodes,
    },
    launch::{Argument, Grid, Source, address, count, ensure, fresh, start_or_none, tensor_kernels},
    paged::is_laid_out,
    rope::Unturned,
};

/// Threads of a block.
const THREADS: u32 = 128;
/// Queries of a block; twice as many of narrow heads.
const TILE: usize = 64;
/// Widths of a head the kernels are compiled for; those of whole matrices take narrower ones too.
const WIDTHS: [usize; 4] = [32, 64, 80, 128];
/// Elements that are read at once: 16 bytes.
const VECTOR: usize = 8;
/// Most query heads that share a KV head.
pub const MAX_GROUP: usize = 8;
/// Tokens that a block's warps take at a time.
const PART: usize = 64;
/// Blocks that a step is cut into where its sequences are fewer: enough for any card to be busy.
const BLOCKS: usize = 512;
/// Most parts of a context.
const MAX_PARTS: usize = 128;
/// Most sequences times KV heads of a step.
pub const MAX_COUNTERS: usize = 1 << 14;

/// `queries` `[batch, heads, m, d]` over `keys` and `values` `[batch, kv_heads, n, d]`, to `[batch, heads, m, d]`; where
/// `is_causal` the last query sees the last key, and each one before it one key less. Consecutive heads share a KV head. None where
/// the kernels do not know the type or the width.
pub fn attend(queries: &Tensor, keys: &Tensor, values: &Tensor, is_causal: bool) -> Result<Option<Tensor>> {
    let ((batch, heads, m, d), (_, kv_heads, n, _)) = (queries.dims4()?, keys.dims4()?);
    let dtype = queries.dtype();
    let Some(width) = WIDTHS.into_iter().find(|&width| width >= d) else { return Ok(None) };
    let Some(kernels) = tensor_kernels(queries.device(), dtype).filter(|_| d.is_multiple_of(VECTOR)) else {
        return Ok(None);
    };
    let fits = keys.dims() == [batch, kv_heads, n, d]
        && values.dims() == keys.dims()
        && (keys.dtype(), values.dtype()) == (dtype, dtype)
        && heads.is_multiple_of(kv_heads)
        && (m > 0 && n > 0)
        && (!is_causal || m <= n);
    ensure(fits, "queries that do not fit their keys")?;
    let (queries, keys, values) = (aligned(queries)?, aligned(keys)?, aligned(values)?);
    // As the product that follows wants it: `[batch, m, heads, d]`.
    let out = fresh(&[batch, m, heads, d], dtype, queries.device())?;
    let turned = out.transpose(1, 2)?;
    let mut sizes = vec![];
    for x in [&queries, &keys, &values, &turned] {
        for &stride in &x.stride()[..3] {
            sizes.push(count(stride)?);
        }
    }
    for size in [m, n, d, heads / kv_heads, usize::from(is_causal)] {
        sizes.push(count(size)?);
    }
    sizes.push(scale(d).to_bits());
    let arguments =
        [address(&queries)?, address(&keys)?, address(&values)?, address(&out)?, Argument::Words(sizes)];
    let tile = if width < 128 { 2 * TILE } else { TILE };
    let grid = (count(m.div_ceil(tile))?, count(heads)?, count(batch)?);
    let name = format!("attend_{}_{width}", dtype.as_str());
    // SAFETY: sizes and strides are those of the tensors; pieces of 16 bytes are aligned.
    unsafe { kernels.launch(&name, &queries, Grid::of(grid, THREADS), &arguments) }?;
    Ok(Some(turned))
}

/// `x` as the kernel reads it: an element's neighbours beside it, and pieces of 16 bytes where such can be.
fn aligned(x: &Tensor) -> Result<Tensor> {
    let strides = x.stride();
    let fits = strides[3] == 1
        && strides[..3].iter().all(|stride| stride.is_multiple_of(VECTOR))
        && x.layout().start_offset().is_multiple_of(VECTOR);
    if fits { Ok(x.clone()) } else { x.force_contiguous() }
}

/// What scores are multiplied with before they are powers of two.
fn scale(d: usize) -> f32 {
    LOG2_E / (d as f32).sqrt()
}

/// What counts the parts of a sequence that are done: 0 between steps.
pub fn counters(device: &Device) -> Result<Tensor> {
    Tensor::zeros(MAX_COUNTERS, DType::U32, device)
}

/// Whether [`decode`] knows a model of these sizes.
pub fn knows(head_dim: usize, group: usize) -> bool {
    WIDTHS.contains(&head_dim) && group <= MAX_GROUP
}

/// What [`decode`] works with.
#[derive(Debug, Clone, Copy)]
pub struct Workspace<'a> {
    pub kernels: &'static Source,
    /// As [`counters`] makes them.
    pub counters: &'a Tensor,
    /// [`scratch_len`] elements in f32.
    pub scratch: &'a Tensor,
}

/// One query a sequence over a cache as [`super::paged`] lays it out, to `out` `[sequences, heads, d]`. `queries` are whole rows of that
/// shape; where they are `unturned`, rows of `[heads + 2 kv_heads, d]`: then keys and values are put into the cache first.
pub fn decode(
    Workspace { kernels, counters, scratch }: Workspace<'_>,
    queries: &Tensor,
    unturned: Option<Unturned<'_>>,
    cache: &LayerCache,
    decodes: &Decodes,
    out: &Tensor,
) -> Result<()> {
    let (sequences, heads, d) = out.dims3()?;
    let (_, kv_heads, _, block_size, _) = cache.keys.dims5()?;
    let dtype = queries.dtype();
    let group = heads / kv_heads;
    let longest = decodes.longest();
    let (partition, parts) = parts(longest, sequences * kv_heads);
    let of_row = if unturned.is_some() { heads + 2 * kv_heads } else { heads };
    let fits = knows(d, group)
        && group * kv_heads == heads
        && dtype.size_in_bytes() == 2
        && sequences * kv_heads <= MAX_COUNTERS
        && block_size.is_multiple_of(4)
        && queries.dims() == [sequences, of_row, d]
        && queries.stride()[1..] == [d, 1]
        && queries.stride()[0].is_multiple_of(4)
        && queries.layout().start_offset().is_multiple_of(4)
        && (out.dtype() == dtype && out.is_contiguous())
        && is_laid_out(cache, kv_heads, d, dtype)?
        && decodes.block_tables.dim(0)? == sequences
        && decodes.block_tables.is_contiguous()
        && decodes.block_tables.dim(1)? * block_size >= longest
        && decodes.lens.dims() == [sequences]
        && scratch.elem_count() >= scratch_len(longest, sequences, kv_heads, d);
    ensure(fits, "queries that do not fit their cache")?;
    let mut sizes = vec![];
    let columns = decodes.block_tables.dim(1)?;
    for size in [queries.stride()[0], kv_heads, group, columns, block_size, partition, parts] {
        sizes.push(count(size)?);
    }
    sizes.push(scale(d).to_bits());
    let (name, fresh) = match unturned {
        None => ("attend_paged", vec![0; 6]),
        Some(unturned) => {
            ensure(unturned.fits((sequences, of_row, d), dtype)?, "rows that cannot be turned")?;
            let Unturned { bias, turn: (cos, sin), slots } = unturned;
            let places = [bias, Some(cos), Some(sin), Some(slots), Some(&cache.keys), Some(&cache.values)];
            ("attend_fresh", places.into_iter().map(start_or_none).collect::<Result<_>>()?)
        }
    };
    let arguments = [
        address(queries)?,
        address(&cache.keys)?,
        address(&cache.values)?,
        address(&decodes.block_tables)?,
        address(&decodes.lens)?,
        address(out)?,
        address(scratch)?,
        address(counters)?,
        Argument::Words(sizes),
        Argument::Longs(fresh),
    ];
    let blocks = (count(parts)?, count(kv_heads)?, count(sequences)?);
    let grid = Grid { begins_early: unturned.is_some(), ..Grid::of(blocks, THREADS) };
    let name = format!("{name}_{}_{d}", dtype.as_str());
    // SAFETY: sizes are those of the tensors. Lengths are the scheduler's: no longer than `longest`, at least 1, and each
    // sequence's table names blocks of the cache for all of it.
    unsafe { kernels.launch(&name, queries, grid, &arguments) }
}

/// Elements that [`decode`] needs to put the parts of long contexts together.
pub fn scratch_len(longest: usize, sequences: usize, kv_heads: usize, d: usize) -> usize {
    match parts(longest, sequences * kv_heads) {
        (_, 1) => 1,
        (_, parts) => sequences * kv_heads * parts * MAX_GROUP * (d + 4),
    }
}

/// Tokens of a part and how many parts the longest context has, for `rows` sequences times KV heads.
fn parts(longest: usize, rows: usize) -> (usize, usize) {
    let longest = longest.max(1);
    let wanted = (BLOCKS / rows.max(1)).clamp(1, longest.div_ceil(PART).min(MAX_PARTS));
    let partition = longest.div_ceil(wanted).next_multiple_of(PART);
    (partition, longest.div_ceil(partition))
}

#[cfg(test)]
mod tests {
    use super::{
        super::{super::attention, testing},
        *,
    };

    #[test]
    fn parts_cover_the_longest_context() {
        for (longest, rows) in
            [(1, 2), (64, 2), (65, 2), (640, 2), (640, 256), (8192, 2), (32_768, 2), (8192, 1024)]
        {
            let (partition, parts) = parts(longest, rows);
            assert!(partition.is_multiple_of(PART) && partition * parts >= longest, "{longest} {rows}");
            assert!(partition * (parts - 1) < longest, "{longest} {rows}");
            assert!(parts <= MAX_PARTS && (parts == 1 || parts * rows <= BLOCKS), "{longest} {rows}");
        }
    }

    #[test]
    fn the_kernel_agrees_with_the_plain_operations_where_there_is_a_gpu() {
        let Some(gpu) = testing::gpu() else { return };
        let noise = |dims: [usize; 4], seed: usize| {
            let len = dims.iter().product::<usize>();
            let values: Vec<f32> = (0..len).map(|i| ((i * 37 + seed * 101) as f32 * 0.013).sin()).collect();
            Tensor::from_vec(values, dims.to_vec(), &Device::Cpu).unwrap()
        };
        for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
            let sizes = [(3, 4, 70, 130, 72), (1, 2, 5, 7, 128), (2, 8, 64, 64, 64), (1, 3, 133, 140, 24)];
            for ((batch, heads, m, n, d), is_causal) in
                sizes.into_iter().flat_map(|sizes| [(sizes, false), (sizes, true)])
            {
                let (q, k, v) = (
                    noise([batch, heads, m, d], 1),
                    noise([batch, heads, n, d], 2),
                    noise([batch, heads, n, d], 3),
                );
                let of_row = |row: usize| {
                    let seen = if is_causal { n - m + row + 1 } else { n };
                    let (k, v) = (k.narrow(2, 0, seen).unwrap(), v.narrow(2, 0, seen).unwrap());
                    attention::attend(&q.narrow(2, row, 1).unwrap(), &k, &v).unwrap()
                };
                let expected = Tensor::cat(&(0..m).map(of_row).collect::<Vec<_>>(), 2).unwrap();
                let there = |x: &Tensor| x.to_dtype(dtype).unwrap().to_device(&gpu).unwrap();
                let got = attend(&there(&q), &there(&k), &there(&v), is_causal).unwrap().unwrap();
                testing::assert_close(&got, &expected, tolerance, &format!("{dtype:?} {m} {n} {d}"));
            }
        }
    }
}
