//! Attention on a device: whole matrices for prefill, tower and connector; a paged cache for decoding.
//!
//! Called by the networks of this folder. [`Gathered`] is the reference, in plain tensor operations: it runs
//! everywhere and for any sizes. Where CUDA's kernels fit the model, [`choose`] takes those.

use candle_core::{D, DType, Device};

use super::{
    super::{ModelShape, Result, Tensor},
    ops,
    step::{Decodes, Prefill, Step},
};

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
    pub num_heads: usize,
    pub num_kv_heads: usize,
}

impl Projected {
    /// Queries and keys, `[rows, heads + kv_heads, head_dim]`: what turns with the position.
    pub fn turning(&self) -> Result<Tensor> {
        self.qkv.narrow(1, 0, self.num_heads + self.num_kv_heads)
    }

    /// `[rows, kv_heads, head_dim]`
    pub fn values(&self) -> Result<Tensor> {
        self.qkv.narrow(1, self.num_heads + self.num_kv_heads, self.num_kv_heads)
    }
}

/// Cosines and sines of the rows' positions, `[rows, head_dim / 2]` each.
pub type Turn = (Tensor, Tensor);

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

    /// Turns queries and keys, and puts keys and values where the step says. Gives both turned,
    /// `[rows, heads + kv_heads, head_dim]`.
    fn turn_and_write(
        &self,
        cache: &LayerCache,
        projected: &Projected,
        turn: &Turn,
        step: &Step,
    ) -> Result<Tensor> {
        let (turned, keys) = turned(projected, turn)?;
        self.write(cache, &keys, &projected.values()?, step)?;
        Ok(turned)
    }

    /// All keys and values of one sequence, `[context_len, kv_heads, head_dim]` each.
    fn read(&self, cache: &LayerCache, blocks: &Tensor, context_len: usize) -> Result<(Tensor, Tensor)>;

    /// `queries` `[sequences, heads, head_dim]`, each the last token of its sequence, to the same shape.
    fn decode(&self, queries: &Tensor, cache: &LayerCache, decodes: &Decodes) -> Result<Tensor>;
}

/// The fastest that fits the model on this device.
pub fn choose(device: &Device, shape: &ModelShape) -> Box<dyn PagedAttention> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() && super::cuda::paged::Kernels::fit(shape) {
        return Box::new(super::cuda::paged::Kernels);
    }
    tracing::debug!(?device, shape.head_dim, "attention by gathering blocks");
    Box::new(Gathered)
}

/// `queries` `[batch, heads, m, d]` over `keys` and `values` `[batch, heads, n, d]`: `[batch, heads, m, d]`. `mask`
/// `[rows, n]` in f32 is added to the scores, to each of the `m / rows` groups of queries. Scores are scaled and their
/// softmax is taken in f32.
pub fn attend(queries: &Tensor, keys: &Tensor, values: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
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
/// `[context_len, kv_heads, d]`; consecutive query heads share a KV head. Gives `[rows, heads, d]`.
pub fn attend_causally(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    let (rows, num_heads, dim) = queries.dims3()?;
    let num_kv_heads = keys.dim(1)?;
    let group = num_heads / num_kv_heads;
    let q = queries.reshape((rows, num_kv_heads, group, dim))?.permute((1, 2, 0, 3))?;
    let q = q.reshape((1, num_kv_heads, group * rows, dim))?;
    let side = |x: &Tensor| x.transpose(0, 1)?.contiguous()?.unsqueeze(0);
    let attended = attend(&q, &side(keys)?, &side(values)?, mask)?;
    let attended = attended.reshape((num_kv_heads, group, rows, dim))?.permute((2, 0, 1, 3))?;
    attended.reshape((rows, num_heads, dim))
}

/// Queries and keys turned, `[rows, heads + kv_heads, head_dim]`, and the keys of them.
pub fn turned(projected: &Projected, (cos, sin): &Turn) -> Result<(Tensor, Tensor)> {
    let turned = ops::rotate(&projected.turning()?, cos, sin)?;
    let keys = turned.narrow(1, projected.num_heads, projected.num_kv_heads)?;
    Ok((turned, keys))
}

/// All rows of a step, in order, `[rows, heads, head_dim]`: the decodes together, then each prompt.
pub fn attend_step(
    paged: &dyn PagedAttention,
    cache: &LayerCache,
    projected: &Projected,
    turn: &Turn,
    step: &Step,
) -> Result<Tensor> {
    let turned = paged.turn_and_write(cache, projected, turn, step)?;
    let queries = turned.narrow(1, 0, projected.num_heads)?;
    let keys = turned.narrow(1, projected.num_heads, projected.num_kv_heads)?;
    let values = projected.values()?;
    let mut parts = Vec::with_capacity(1 + step.prefills.len());
    if let Some(decodes) = &step.decodes {
        parts.push(paged.decode(&queries.narrow(0, 0, decodes.len())?, cache, decodes)?);
    }
    for Prefill { rows, context_len, blocks, mask } in &step.prefills {
        let own = |x: &Tensor| x.narrow(0, rows.start, rows.len());
        // What the cache has from before must be read; where all is here it need not be.
        let (keys, values) = match *context_len == rows.len() {
            true => (own(&keys)?, own(&values)?),
            false => paged.read(cache, blocks, *context_len)?,
        };
        parts.push(attend_causally(&own(&queries)?, &keys, &values, mask.as_ref())?);
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
        let projected = Projected { qkv: noise((10, 8, dim), 4), num_heads, num_kv_heads };
        let table = |seed| noise((1, 10, dim / 2), seed).squeeze(0).unwrap();
        let turn = (table(5), table(6));
        let turned = Gathered.turn_and_write(&cache, &projected, &turn, &step).unwrap();
        let (keys, fresh) = Gathered.read(&cache, &step.prefills[0].blocks, 10).unwrap();

        let sizes = rope_reference::Sizes { num_heads, num_kv_heads, dim, block_size, vector: 4 };
        let (cos, sin) = (values(&turn.0), values(&turn.1));
        let slots: Vec<i64> = slots.into_iter().map(|slot| slot as i64).collect();
        let plain = sizes.rope_and_cache(&values(&projected.qkv), (&cos, &sin), &slots, 4);
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
