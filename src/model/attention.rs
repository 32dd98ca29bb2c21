//! Attention of the networks: over a whole sequence at once (tower, connector) and over the paged cache (decoder).
//!
//! Cuts the work into tiles of queries and runs them on all threads; the arithmetic is in `kernels/`.

use rayon::prelude::*;

use super::{
    KvCache, StepInput,
    kernels::{
        SharedOutput,
        attention::{KeyValueTiles, PackedKeyValues, QUERY_ROWS, Queries, TILE, attend},
    },
    kv_cache::LayerCache,
};

/// Sizes of a multi-head attention.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub num_heads: usize,
    /// Fewer than `num_heads` where neighbouring query heads share keys and values.
    pub num_kv_heads: usize,
    pub head_dim: usize,
}

impl Heads {
    /// Width of all query heads.
    pub fn width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    fn scale(&self) -> f32 {
        (self.head_dim as f64).powf(-0.5) as f32
    }
}

/// Every query sees every key. `queries` `[m, heads x dim]`, `keys` and `values` `[n, heads x dim]`; gives `[m, heads x dim]`.
pub fn full_attention(queries: &[f32], keys: &[f32], values: &[f32], heads: Heads) -> Vec<f32> {
    let width = heads.width();
    let (num_queries, num_keys) = (queries.len() / width, keys.len() / width);
    let packed = PackedKeyValues::pack(keys, values, num_keys, heads.num_heads, heads.head_dim);
    let mut out = vec![0.0; queries.len()];
    let output = SharedOutput::new(&mut out);
    let tiles_a_head = num_queries.div_ceil(QUERY_ROWS);
    (0..heads.num_heads * tiles_a_head).into_par_iter().for_each(|task| {
        let (head, tile) = (task / tiles_a_head, task % tiles_a_head);
        let tokens = tile * QUERY_ROWS..((tile + 1) * QUERY_ROWS).min(num_queries);
        let offsets: Vec<usize> = tokens.map(|token| token * width + head * heads.head_dim).collect();
        let visible = vec![num_keys; offsets.len()];
        run_tile(queries, &output, &offsets, &visible, heads, &packed.head(head));
    });
    out
}

/// Writes the step's keys and values, `[rows, kv_heads x dim]` each, to their slots.
pub fn write_cache(
    cache: &mut LayerCache,
    input: &StepInput,
    keys: &[f32],
    values: &[f32],
    layout: CacheLayout,
) {
    let CacheLayout { block_size, num_kv_heads, head_dim } = layout;
    for (row, &slot) in input.slot_mapping.iter().enumerate() {
        let (block, token) = (slot / block_size, slot % block_size);
        for head in 0..num_kv_heads {
            let from = (row * num_kv_heads + head) * head_dim;
            let to = (block * num_kv_heads + head) * head_dim * block_size;
            for (i, &key) in keys[from..from + head_dim].iter().enumerate() {
                cache.keys[to + i * block_size + token] = key;
            }
            cache.values[to + token * head_dim..][..head_dim].copy_from_slice(&values[from..from + head_dim]);
        }
    }
}

/// Sizes of a cache block.
#[derive(Debug, Clone, Copy)]
pub struct CacheLayout {
    pub block_size: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
}

impl CacheLayout {
    /// Of `cache`.
    pub fn of(cache: &KvCache) -> Self {
        CacheLayout {
            block_size: cache.block_size,
            num_kv_heads: cache.num_kv_heads,
            head_dim: cache.head_dim,
        }
    }
}

/// Causal attention of a step's rows over the paged cache, prefill and decode alike: the row at position `p` of its
/// sequence sees positions `[0, p]` through its block table. `queries` `[rows, heads x dim]`, and so the result.
pub fn paged_attention(
    queries: &[f32],
    cache: &LayerCache,
    input: &StepInput,
    heads: Heads,
    layout: CacheLayout,
) -> Vec<f32> {
    let group = heads.num_heads / heads.num_kv_heads;
    // One task: a tile of (row, query head) pairs of one sequence that share a KV head.
    let mut tasks: Vec<(usize, usize, std::ops::Range<usize>)> = Vec::new();
    for (index, sequence) in input.sequences.iter().enumerate() {
        let num_pairs = sequence.rows.len() * group;
        for kv_head in 0..heads.num_kv_heads {
            let starts = (0..num_pairs).step_by(QUERY_ROWS);
            tasks.extend(starts.map(|start| (index, kv_head, start..(start + QUERY_ROWS).min(num_pairs))));
        }
    }
    let mut out = vec![0.0; queries.len()];
    let output = SharedOutput::new(&mut out);
    let run = |(index, kv_head, pairs): (usize, usize, std::ops::Range<usize>)| {
        let sequence = &input.sequences[index];
        let row_of = |pair: usize| sequence.rows.start + pair / group;
        let offset = |pair| row_of(pair) * heads.width() + (kv_head * group + pair % group) * heads.head_dim;
        let offsets: Vec<usize> = pairs.clone().map(offset).collect();
        let visible: Vec<usize> = pairs.map(|pair| input.positions[row_of(pair)] as usize + 1).collect();
        let blocks = &input.block_tables[sequence.blocks.clone()];
        run_tile(queries, &output, &offsets, &visible, heads, &PagedHead { cache, blocks, kv_head, layout });
    };
    if tasks.len() == 1 {
        tasks.into_iter().for_each(run)
    } else {
        tasks.into_par_iter().for_each(run)
    }
    out
}

/// Attends for the queries at `offsets`; their results go to the same offsets of `output`.
fn run_tile<T: KeyValueTiles>(
    queries: &[f32],
    output: &SharedOutput<'_>,
    offsets: &[usize],
    visible: &[usize],
    heads: Heads,
    tiles: &T,
) {
    let rows: Vec<&[f32]> = offsets.iter().map(|&offset| &queries[offset..offset + heads.head_dim]).collect();
    // SAFETY: each (row, head) belongs to one tile, so no two slices overlap.
    let slice = |&offset: &usize| unsafe { output.slice(offset, heads.head_dim) };
    let mut out: Vec<&mut [f32]> = offsets.iter().map(slice).collect();
    attend(Queries { queries: &rows, visible, tiles, scale: heads.scale(), out: &mut out });
}

/// One KV head of a sequence, seen through its block table.
struct PagedHead<'a> {
    cache: &'a LayerCache,
    blocks: &'a [u32],
    kv_head: usize,
    layout: CacheLayout,
}

impl PagedHead<'_> {
    /// Start of the block that holds `tile`, and the tile's first token in it.
    #[inline(always)]
    fn place(&self, tile: usize) -> (usize, usize) {
        let CacheLayout { block_size, num_kv_heads, head_dim } = self.layout;
        let (block, token) = (self.blocks[tile * TILE / block_size] as usize, tile * TILE % block_size);
        ((block * num_kv_heads + self.kv_head) * head_dim * block_size, token)
    }
}

impl KeyValueTiles for PagedHead<'_> {
    #[inline(always)]
    fn keys(&self, tile: usize) -> (&[f32], usize) {
        let (start, token) = self.place(tile);
        (&self.cache.keys[start + token..], self.layout.block_size)
    }

    #[inline(always)]
    fn values(&self, tile: usize) -> &[f32] {
        let (start, token) = self.place(tile);
        &self.cache.values[start + token * self.layout.head_dim..][..TILE * self.layout.head_dim]
    }

    #[inline(always)]
    fn value_width(&self) -> usize {
        self.layout.head_dim
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::SequenceInput, *};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn paged_attention_equals_the_plain_one(
            kv_heads in 1..3usize, group in 1..5usize, tiles in 1..4usize, lens in prop::collection::vec((1..90usize, 1..40usize), 1..4),
            block_size in prop_oneof![Just(16usize), Just(32)], seed in 1..u32::MAX,
        ) {
            let head_dim = tiles * 16;
            let heads = Heads { num_heads: kv_heads * group, num_kv_heads: kv_heads, head_dim };
            let layout = CacheLayout { block_size, num_kv_heads: kv_heads, head_dim };
            let mut state = seed;
            let mut next = || { state ^= state << 13; state ^= state >> 17; state ^= state << 5; (state >> 8) as f32 / 8e6 - 1.0 };
            let num_blocks = 32;
            // Slots that no token was written to hold what must never be read.
            let fill = vec![f32::NAN; num_blocks * block_size * kv_heads * head_dim];
            let mut cache = LayerCache { keys: fill.clone(), values: fill };
            let mut input = StepInput::default();
            let (mut queries, mut expected) = (vec![], vec![]);
            for (n, &(context, asked)) in lens.iter().enumerate() {
                let width = kv_heads * head_dim;
                let keys: Vec<f32> = (0..context * width).map(|_| next()).collect();
                let values: Vec<f32> = (0..context * width).map(|_| next()).collect();
                let blocks: Vec<u32> = (0..context.div_ceil(block_size)).map(|i| (num_blocks - 1 - n * 8 - i) as u32).collect();
                let slot = |position: usize| blocks[position / block_size] as usize * block_size + position % block_size;
                let write = StepInput { slot_mapping: (0..context).map(slot).collect(), ..StepInput::default() };
                write_cache(&mut cache, &write, &keys, &values, layout);
                let first_row = input.positions.len();
                for position in context.saturating_sub(asked)..context {
                    input.positions.push(position as u32);
                    for head in 0..heads.num_heads {
                        let query: Vec<f32> = (0..head_dim).map(|_| next()).collect();
                        let at = |token: usize| token * width + head / group * head_dim;
                        let dot = |token| keys[at(token)..].iter().zip(&query).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>();
                        let weights: Vec<f64> = (0..=position).map(|token| (dot(token) * f64::from(heads.scale())).exp()).collect();
                        let total: f64 = weights.iter().sum();
                        expected.extend((0..head_dim).map(|i| {
                            weights.iter().enumerate().map(|(token, w)| w * f64::from(values[at(token) + i])).sum::<f64>() / total
                        }));
                        queries.extend(query);
                    }
                }
                let first_block = input.block_tables.len();
                input.block_tables.extend(blocks);
                let rows = first_row..input.positions.len();
                input.sequences.push(SequenceInput { rows, context_len: context, blocks: first_block..input.block_tables.len() });
            }
            let got = paged_attention(&queries, &cache, &input, heads, layout);
            for (got, expected) in got.iter().zip(expected) {
                prop_assert!((f64::from(*got) - expected).abs() < 2e-5, "{got} {expected}");
            }
        }
    }
}
