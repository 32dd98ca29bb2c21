//! Attention on a device: whole matrices for prefill, tower and connector; a paged cache for decoding.
//!
//! Called by the networks of this folder. [`Gathered`] is the reference, in plain tensor operations: it runs
//! everywhere and for any sizes. Where CUDA's kernels fit the model, [`choose`] takes those.

use std::cell::OnceCell;

use candle_core::{D, DType, Device};

use super::{
    super::{ModelShape, Result, Tensor, config::Qwen2Config},
    ops,
    step::{Decodes, Prefill, Step},
};

/// Most bytes of scores at a time; what is made of them takes thrice as much again. Three frames of R1's tower, and 512 rows of
/// a prompt over a whole context: large enough that the products are no smaller than a GPU likes.
const MAX_SCORE_BYTES: usize = 128 << 20;

/// Keys and values of one layer, laid out as the [`PagedAttention`] that made it wants them.
#[derive(Debug, Clone)]
pub struct LayerCache {
    pub keys: Tensor,
    pub values: Tensor,
}

/// Queries, keys and values of a step's rows, as one product gave them.
#[derive(Debug)]
pub struct Projected {
    /// `[rows, heads + 2 kv_heads, head_dim]`: queries, keys, values; contiguous.
    pub qkv: Tensor,
    /// `[(heads + 2 kv_heads) x head_dim]`, to be added yet.
    pub bias: Option<Tensor>,
    pub num_heads: usize,
    pub num_kv_heads: usize,
}

/// Rows that can attend: queries and keys are turned.
#[derive(Debug)]
pub struct Rows {
    /// `[rows, heads, head_dim]`
    pub queries: Tensor,
    /// `[rows, kv_heads, head_dim]`
    pub keys: Tensor,
    /// `[rows, kv_heads, head_dim]`
    pub values: Tensor,
}

impl Rows {
    /// Of one tensor that has all three, `[rows, heads + 2 kv_heads, head_dim]`.
    pub fn of(all: &Tensor, projected: &Projected) -> Result<Self> {
        let Projected { num_heads, num_kv_heads, .. } = *projected;
        Ok(Rows {
            queries: all.narrow(1, 0, num_heads)?,
            keys: all.narrow(1, num_heads, num_kv_heads)?,
            values: all.narrow(1, num_heads + num_kv_heads, num_kv_heads)?,
        })
    }
}

/// Cosines and sines of all positions, `[context, head_dim / 2]` each.
#[derive(Debug)]
pub struct Rotary {
    pub cos: Tensor,
    pub sin: Tensor,
    of_rows: OnceCell<(Tensor, Tensor)>,
}

impl Rotary {
    /// For the layers of one step.
    pub fn new(cos: Tensor, sin: Tensor) -> Self {
        Rotary { cos, sin, of_rows: OnceCell::new() }
    }

    /// Those of the step's rows, `[rows, head_dim / 2]` each; looked up once a step.
    fn of_rows(&self, step: &Step) -> Result<&(Tensor, Tensor)> {
        if let Some(rows) = self.of_rows.get() {
            return Ok(rows);
        }
        let rows = |table: &Tensor| table.index_select(&step.positions, 0);
        let rows = (rows(&self.cos)?, rows(&self.sin)?);
        Ok(self.of_rows.get_or_init(|| rows))
    }
}

/// A paged cache, and attention of one query a sequence over it.
pub trait PagedAttention: std::fmt::Debug + Send + Sync {
    /// An empty cache of one layer.
    fn new_layer(
        &self,
        shape: &ModelShape,
        num_blocks: usize,
        block_size: usize,
        kind: (DType, &Device),
    ) -> Result<LayerCache>;

    /// Puts `keys` and `values`, `[rows, kv_heads, head_dim]`, where the step says.
    fn write(&self, cache: &LayerCache, keys: &Tensor, values: &Tensor, step: &Step) -> Result<()>;

    /// What [`turn_and_write`] does, at once; none where that is not possible.
    fn turn_and_write_at_once(
        &self,
        _cache: &LayerCache,
        _projected: &Projected,
        _rotary: &Rotary,
        _step: &Step,
    ) -> Result<Option<Rows>> {
        Ok(None)
    }

    /// All keys and values of one sequence, `[context_len, kv_heads, head_dim]` each.
    fn read(&self, cache: &LayerCache, blocks: &Tensor, context_len: usize) -> Result<(Tensor, Tensor)>;

    /// Attention of one prompt's rows, as [`attend_causally`] has it.
    fn prefill(&self, queries: &Tensor, keys: &Tensor, values: &Tensor, prefill: &Prefill) -> Result<Tensor> {
        attend_causally(queries, keys, values, prefill.mask()?.as_ref())
    }

    /// `queries` `[sequences, heads, head_dim]`, each the last token of its sequence, to the same shape.
    fn decode(&self, queries: &Tensor, cache: &LayerCache, decodes: &Decodes) -> Result<Tensor>;

    /// What the kernels of CUDA count with, where this is by them.
    #[cfg(feature = "cuda")]
    fn counters(&self) -> Option<&Tensor> {
        None
    }

    /// Whether a step of decodes copies nothing from the host, and so may be recorded.
    #[cfg(feature = "cuda")]
    fn can_be_recorded(&self) -> bool {
        false
    }
}

/// The fastest that fits the model on this device.
///
/// # Errors
/// When the device fails.
pub fn choose(
    (device, dtype): (&Device, DType),
    config: &Qwen2Config,
    context: usize,
) -> Result<Box<dyn PagedAttention>> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() && super::cuda::paged::Kernels::fit((device, dtype), config, context) {
        return Ok(Box::new(super::cuda::paged::Kernels::new(device, dtype)?));
    }
    tracing::debug!(?device, ?dtype, head_dim = config.head_dim(), context, "attention by gathering blocks");
    Ok(Box::new(Gathered))
}

/// `queries` `[batch, heads, m, d]` over `keys` and `values` `[batch, heads, n, d]`: `[batch, heads, m, d]`. Scores are scaled and their
/// softmax is taken in f32. Where there are scores at all, it is as much of the batch at a time as [`MAX_SCORE_BYTES`] hold, one at least.
pub fn attend(queries: &Tensor, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if queries.device().is_cuda()
        && let Some(attended) = super::cuda::flash::attend(queries, keys, values, false)?
    {
        return Ok(attended);
    }
    let (batch, heads, m, _) = queries.dims4()?;
    let at_once = fitting(heads * m * keys.dim(2)?, MAX_SCORE_BYTES);
    in_parts(batch, at_once, 0, |start, len| {
        let part = |x: &Tensor| x.narrow(0, start, len)?.contiguous();
        attend_at_once(&part(queries)?, &part(keys)?, &part(values)?, None)
    })
}

/// How many pieces of so many scores each `max_bytes` hold, one at least.
fn fitting(scores: usize, max_bytes: usize) -> usize {
    (max_bytes / (scores * size_of::<f32>()).max(1)).max(1)
}

/// What `compute` gives for each part of `0..len`, by its start and length, joined along `dim`.
fn in_parts(
    len: usize,
    at_once: usize,
    dim: usize,
    compute: impl Fn(usize, usize) -> Result<Tensor>,
) -> Result<Tensor> {
    if len <= at_once {
        return compute(0, len);
    }
    let parts = (0..len).step_by(at_once).map(|start| compute(start, at_once.min(len - start)));
    Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, dim)
}

fn attend_at_once(queries: &Tensor, keys: &Tensor, values: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let scale = 1.0 / (queries.dim(D::Minus1)? as f64).sqrt();
    let scores = queries.matmul(&keys.t()?)?.to_dtype(DType::F32)?;
    let mut scores = (scores * scale)?;
    if let Some(mask) = mask {
        let (batch, heads, m, n) = scores.dims4()?;
        let rows = mask.dim(0)?;
        let grouped = scores.reshape((batch, heads, m / rows, rows, n))?;
        scores = grouped.broadcast_add(mask)?.reshape((batch, heads, m, n))?;
    }
    ops::softmax(&scores)?.to_dtype(values.dtype())?.matmul(values)
}

/// Attention of a prompt's rows. `queries` `[rows, heads, d]`; `keys` and `values` of the whole sequence,
/// `[context_len, kv_heads, d]`; consecutive query heads share a KV head. Gives `[rows, heads, d]`. As many rows at a time as
/// [`MAX_SCORE_BYTES`] hold: the whole matrix of scores is never there.
pub fn attend_causally(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    attend_within(queries, (keys, values), mask, MAX_SCORE_BYTES)
}

fn attend_within(
    queries: &Tensor,
    (keys, values): (&Tensor, &Tensor),
    mask: Option<&Tensor>,
    max_score_bytes: usize,
) -> Result<Tensor> {
    let (rows, num_heads, dim) = queries.dims3()?;
    let (context_len, num_kv_heads, _) = keys.dims3()?;
    let group = num_heads / num_kv_heads;
    let side = |x: &Tensor| x.transpose(0, 1)?.contiguous()?.unsqueeze(0);
    let (keys, values) = (side(keys)?, side(values)?);
    in_parts(rows, fitting(num_heads * context_len, max_score_bytes), 0, |start, rows| {
        let q = queries.narrow(0, start, rows)?.reshape((rows, num_kv_heads, group, dim))?;
        let q = q.permute((1, 2, 0, 3))?.reshape((1, num_kv_heads, group * rows, dim))?;
        let mask = mask.map(|mask| mask.narrow(0, start, rows)).transpose()?;
        let attended = attend_at_once(&q, &keys, &values, mask.as_ref())?;
        let attended = attended.reshape((num_kv_heads, group, rows, dim))?.permute((2, 0, 1, 3))?;
        attended.reshape((rows, num_heads, dim))
    })
}

/// Adds the bias, turns queries and keys, and puts keys and values where the step says.
fn turn_and_write(
    paged: &dyn PagedAttention,
    cache: &LayerCache,
    projected: &Projected,
    rotary: &Rotary,
    step: &Step,
) -> Result<Rows> {
    if let Some(rows) = paged.turn_and_write_at_once(cache, projected, rotary, step)? {
        return Ok(rows);
    }
    let (cos, sin) = rotary.of_rows(step)?;
    let qkv = match &projected.bias {
        Some(bias) => projected.qkv.broadcast_add(&bias.reshape(&projected.qkv.dims()[1..])?)?,
        None => projected.qkv.clone(),
    };
    let Rows { queries, keys, values } = Rows::of(&qkv, projected)?;
    let rows =
        Rows { queries: ops::rotate(&queries, cos, sin)?, keys: ops::rotate(&keys, cos, sin)?, values };
    paged.write(cache, &rows.keys, &rows.values, step)?;
    Ok(rows)
}

/// All rows of a step, in order, `[rows, heads, head_dim]`: the decodes together, then each prompt.
pub fn attend_step(
    paged: &dyn PagedAttention,
    cache: &LayerCache,
    projected: &Projected,
    rotary: &Rotary,
    step: &Step,
) -> Result<Tensor> {
    let Rows { queries, keys, values } = turn_and_write(paged, cache, projected, rotary, step)?;
    let mut parts = Vec::with_capacity(1 + step.prefills.len());
    if let Some(decodes) = &step.decodes {
        parts.push(paged.decode(&queries.narrow(0, 0, decodes.len())?, cache, decodes)?);
    }
    for prefill in &step.prefills {
        let Prefill { rows, context_len, blocks, .. } = prefill;
        let own = |x: &Tensor| x.narrow(0, rows.start, rows.len());
        // What the cache has from before must be read; where all is here it need not be.
        let (keys, values) = match *context_len == rows.len() {
            true => (own(&keys)?, own(&values)?),
            false => paged.read(cache, blocks, *context_len)?,
        };
        parts.push(paged.prefill(&own(&queries)?, &keys, &values, prefill)?);
    }
    match parts.as_slice() {
        [one] => Ok(one.clone()),
        several => Tensor::cat(several, 0),
    }
}

/// The reference: blocks are gathered to one matrix, sequence after sequence. Both sides of a layer are
/// `[num_blocks, block_size, kv_heads, head_dim]`.
#[derive(Debug)]
pub struct Gathered;

impl PagedAttention for Gathered {
    fn new_layer(
        &self,
        shape: &ModelShape,
        num_blocks: usize,
        block_size: usize,
        (dtype, device): (DType, &Device),
    ) -> Result<LayerCache> {
        let dims = (num_blocks, block_size, shape.num_kv_heads, shape.head_dim);
        let side = || Tensor::zeros(dims, dtype, device);
        Ok(LayerCache { keys: side()?, values: side()? })
    }

    fn write(&self, cache: &LayerCache, keys: &Tensor, values: &Tensor, step: &Step) -> Result<()> {
        for (side, fresh) in [(&cache.keys, keys), (&cache.values, values)] {
            let slots = side.flatten_to(1)?.flatten_from(1)?;
            let fresh = fresh.contiguous()?.flatten_from(1)?;
            let index = step.slots.unsqueeze(1)?.broadcast_as(fresh.shape())?.contiguous()?;
            slots.scatter_set(&index, &fresh, 0)?;
        }
        Ok(())
    }

    fn read(&self, cache: &LayerCache, blocks: &Tensor, context_len: usize) -> Result<(Tensor, Tensor)> {
        let side = |x: &Tensor| x.index_select(blocks, 0)?.flatten_to(1)?.narrow(0, 0, context_len);
        Ok((side(&cache.keys)?, side(&cache.values)?))
    }

    fn decode(&self, queries: &Tensor, cache: &LayerCache, decodes: &Decodes) -> Result<Tensor> {
        let one = |index: usize| {
            let (keys, values) = self.read(cache, &decodes.blocks_of(index)?, decodes.context_lens[index])?;
            attend_causally(&queries.narrow(0, index, 1)?, &keys, &values, None)
        };
        Tensor::cat(&(0..decodes.len()).map(one).collect::<Result<Vec<_>>>()?, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            super::{SequenceInput, StepInput, config::ModelConfig, tinyllava},
            rope_reference,
        },
        *,
    };

    fn noise(dims: (usize, usize, usize), seed: usize) -> Tensor {
        let len = dims.0 * dims.1 * dims.2;
        let values: Vec<f32> = (0..len).map(|i| ((i * 37 + seed * 101) as f32 * 0.013).sin()).collect();
        Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
    }

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn attention_is_the_weighted_mean_by_its_definition() {
        let (q, k, v) = (noise((3, 4, 8), 1), noise((5, 2, 8), 2), noise((5, 2, 8), 3));
        let got = values(&attend_causally(&q, &k, &v, None).unwrap());
        let (q, k, v) = (values(&q), values(&k), values(&v));
        for (row, head) in (0..3).flat_map(|row| (0..4).map(move |head| (row, head))) {
            let kv = head / 2;
            let query = &q[(row * 4 + head) * 8..][..8];
            let dot = |key: usize| (0..8).map(|i| query[i] * k[(key * 2 + kv) * 8 + i]).sum::<f32>();
            let weights: Vec<f32> = (0..5).map(|key| (dot(key) / 8f32.sqrt()).exp()).collect();
            let total: f32 = weights.iter().sum();
            for i in 0..8 {
                let mean: f32 = (0..5).map(|key| weights[key] / total * v[(key * 2 + kv) * 8 + i]).sum();
                assert!((got[(row * 4 + head) * 8 + i] - mean).abs() < 1e-5, "{row} {head} {i}");
            }
        }
    }

    #[test]
    fn scores_in_parts_give_what_the_whole_matrix_gives() {
        let (q, k, v) = (noise((37, 4, 8), 1), noise((50, 2, 8), 2), noise((50, 2, 8), 3));
        // Rows at the end of the context, each of which sees what is before it.
        let mask = (0..37)
            .flat_map(|row| (0..50).map(move |key| if key > row + 13 { f32::NEG_INFINITY } else { 0.0 }));
        let mask = Tensor::from_vec(mask.collect::<Vec<_>>(), (37, 50), &Device::Cpu).unwrap();
        let within = |bytes| values(&attend_within(&q, (&k, &v), Some(&mask), bytes).unwrap());
        let whole = within(usize::MAX);
        assert_eq!(whole, values(&attend_causally(&q, &k, &v, Some(&mask)).unwrap()));
        // No room for a row; for one; for five of 800 bytes each; for all but one.
        for bytes in [0, 800, 4000, 36 * 800] {
            let off = within(bytes).iter().zip(&whole).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-6, "{bytes} bytes: {off:e}");
        }
        assert_eq!([fitting(200, 4000), fitting(200, 0), fitting(0, 10)], [5, 1, 10]);
    }

    #[test]
    fn a_batch_in_parts_is_the_batch() {
        let x = noise((10, 3, 4), 1);
        for at_once in [1, 3, 10, 11] {
            let lens = std::cell::RefCell::new(vec![]);
            let joined = in_parts(10, at_once, 0, |start, len| {
                lens.borrow_mut().push(len);
                x.narrow(0, start, len)
            });
            assert_eq!(values(&joined.unwrap()), values(&x));
            assert!(lens.into_inner().iter().all(|&len| len <= at_once));
        }
    }

    #[test]
    fn plain_loops_turn_and_write_what_the_operations_do() {
        let (num_heads, num_kv_heads, dim, block_size) = (4, 2, 16, 8);
        let config = ModelConfig::tiny_test();
        let shape = ModelShape { num_kv_heads, head_dim: dim, ..tinyllava::shape(&config) };
        let cache = Gathered.new_layer(&shape, 4, block_size, (DType::F32, &Device::Cpu)).unwrap();
        let slots: Vec<usize> = (24..32).chain(8..10).collect();
        let input = StepInput {
            token_ids: vec![0; 10],
            positions: (5..15).collect(),
            slot_mapping: slots.clone(),
            block_tables: vec![3, 1],
            sequences: vec![SequenceInput { rows: 0..10, context_len: 10, blocks: 0..2 }],
            ..StepInput::default()
        };
        let step = Step::new(&input, block_size, &Device::Cpu).unwrap();
        let (qkv, bias) = (noise((10, 8, dim), 4), noise((1, 8, dim), 7));
        let biased = values(&qkv.broadcast_add(&bias).unwrap());
        let bias = Some(bias.flatten_all().unwrap());
        let projected = Projected { qkv, bias, num_heads, num_kv_heads };
        let table = |seed| noise((1, 20, dim / 2), seed).squeeze(0).unwrap();
        let rotary = Rotary::new(table(5), table(6));
        let rows = turn_and_write(&Gathered, &cache, &projected, &rotary, &step).unwrap();
        let turned = Tensor::cat(&[rows.queries, rows.keys], 1).unwrap();
        let (keys, fresh) = Gathered.read(&cache, &step.prefills[0].blocks, 10).unwrap();

        let sizes = rope_reference::Sizes { num_heads, num_kv_heads, dim, block_size, vector: 4 };
        let (cos, sin) = rotary.of_rows(&step).unwrap();
        let (cos, sin) = (values(cos), values(sin));
        let slots: Vec<i64> = slots.into_iter().map(|slot| slot as i64).collect();
        let plain = sizes.rope_and_cache(&biased, (&cos, &sin), &slots, 4);
        assert_eq!(plain.turned, values(&turned));
        assert_eq!(sizes.keys_at(&plain.keys, &slots), values(&keys));
        assert_eq!(sizes.values_at(&plain.values, &slots), values(&fresh));
    }

    #[test]
    fn what_is_written_to_slots_is_read_through_the_block_table() {
        let shape = tinyllava::shape(&ModelConfig::tiny_test());
        let dims = (10, shape.num_kv_heads, shape.head_dim);
        let cache = Gathered.new_layer(&shape, 4, 8, (DType::F32, &Device::Cpu)).unwrap();
        let (keys, fresh) = (noise(dims, 1), noise(dims, 2));
        // Ten tokens: block 3, then block 1.
        let input = StepInput {
            token_ids: vec![0; 10],
            positions: (0..10).collect(),
            slot_mapping: (24..32).chain(8..10).collect(),
            block_tables: vec![3, 1],
            sequences: vec![SequenceInput { rows: 0..10, context_len: 10, blocks: 0..2 }],
            ..StepInput::default()
        };
        let step = Step::new(&input, 8, &Device::Cpu).unwrap();
        Gathered.write(&cache, &keys, &fresh, &step).unwrap();
        let (k, v) = Gathered.read(&cache, &step.prefills[0].blocks, 10).unwrap();
        assert_eq!((values(&k), values(&v)), (values(&keys), values(&fresh)));
    }
}
