//! Attention of the networks: over a whole sequence at once (tower, connector) and over the paged cache (decoder).
//!
//! Cuts the work into tiles of queries and runs them on all threads; the arithmetic is in `kernels/`.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    KvCache, StepInput,
    kernels::{
        SharedOutput,
        attention::{Element, Gathered, KeyValueTiles, PackedKeyValues, QUERY_ROWS, Queries, TILE},
        attention_bf16::{self, Bf16KeyValues, MAX_ROWS, Scratch, rows_at_once},
    },
    kv_cache::{LayerCache, Pages},
};

/// Keys that are attended to in one go. Longer contexts are the sum of as many ranges in this order, whether one thread
/// computes them or many: so a result depends on the context alone.
const RANGE: usize = 512;

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

/// Rows with the heads of queries, keys or values somewhere in them: head `h` of row `r` starts at
/// `r * stride + offset + h * head_dim`.
#[derive(Debug, Clone, Copy)]
pub struct Projected<'a> {
    pub rows: &'a [f32],
    pub stride: usize,
    pub offset: usize,
}

impl<'a> Projected<'a> {
    /// The part of `[rows, stride]` that starts at `offset`.
    pub fn new(rows: &'a [f32], stride: usize, offset: usize) -> Self {
        Projected { rows, stride, offset }
    }

    fn num_rows(&self) -> usize {
        self.rows.len() / self.stride
    }

    /// One head of one row.
    fn head(&self, row: usize, head: usize, head_dim: usize) -> &'a [f32] {
        &self.rows[row * self.stride + self.offset + head * head_dim..][..head_dim]
    }
}

/// An attention in which every query sees every key of its batch.
#[derive(Debug, Clone, Copy)]
pub struct FullAttention<'a> {
    pub queries: Projected<'a>,
    pub keys: Projected<'a>,
    pub values: Projected<'a>,
    /// The rows of the batches lie behind one another, each with as many as the others.
    pub num_batches: usize,
    pub heads: Heads,
    /// Whether operands may be rounded to bf16 where the CPU is faster with them.
    pub may_round: bool,
}

impl FullAttention<'_> {
    /// `[rows, heads x dim]`.
    pub fn run(self) -> Vec<f32> {
        let width = self.heads.width();
        let (num_queries, num_heads) =
            (self.queries.num_rows() / self.num_batches, self.num_batches * self.heads.num_heads);
        let mut out = vec![0.0; self.num_batches * num_queries * width];
        let output = SharedOutput::new(&mut out);
        let rounds = self.may_round && attention_bf16::is_available();
        // The keys of a head are packed by each of the tasks that share them.
        let tasks_a_head = (rayon::current_num_threads() * 2).div_ceil(num_heads);
        let rows = if rounds { rows_at_once() } else { QUERY_ROWS };
        let queries_a_task = num_queries.div_ceil(tasks_a_head).max(1).next_multiple_of(rows);
        let tasks_a_head = num_queries.div_ceil(queries_a_task);
        (0..num_heads * tasks_a_head).into_par_iter().for_each(|task| {
            let (place, part) = (task / tasks_a_head, task % tasks_a_head);
            let queries = part * queries_a_task..((part + 1) * queries_a_task).min(num_queries);
            let (batch, head) = (place / self.heads.num_heads, place % self.heads.num_heads);
            match rounds {
                true => self.head_in_bf16(batch, head, queries, &output),
                false => self.head(batch, head, queries, &output),
            }
        });
        out
    }

    /// Key and value of a token of a batch.
    fn key_value<'s>(&'s self, batch: usize, head: usize) -> impl Fn(usize) -> (&'s [f32], &'s [f32]) {
        let (num_keys, dim) = (self.num_keys(), self.heads.head_dim);
        move |token| {
            let row = batch * num_keys + token;
            (self.keys.head(row, head, dim), self.values.head(row, head, dim))
        }
    }

    fn num_keys(&self) -> usize {
        self.keys.num_rows() / self.num_batches
    }

    /// Some queries of one head, `rows` at a time: each with the offset its result goes to, and how many keys it sees.
    fn tiles(
        &self,
        batch: usize,
        head: usize,
        queries: Range<usize>,
        rows: usize,
    ) -> impl Iterator<Item = impl Iterator<Item = (&[f32], usize, usize)>> {
        let (width, dim) = (self.heads.width(), self.heads.head_dim);
        let (first_row, num_keys) = (batch * self.queries.num_rows() / self.num_batches, self.num_keys());
        let end = queries.end;
        queries.step_by(rows).map(move |start| {
            (start..(start + rows).min(end)).map(move |query| {
                let row = first_row + query;
                (self.queries.head(row, head, dim), row * width + head * dim, num_keys)
            })
        })
    }

    fn head(&self, batch: usize, head: usize, queries: Range<usize>, output: &SharedOutput<'_>) {
        let token = self.key_value(batch, head);
        let packed = PackedKeyValues::pack(self.num_keys(), self.heads.head_dim, token);
        for places in self.tiles(batch, head, queries, QUERY_ROWS) {
            run_tile(places, output, self.heads, |queries, visible, out| {
                let queries = Queries { queries, visible, tiles: &packed, scale: self.heads.scale() };
                queries.gather(0..queries.num_keys()).write(out);
            });
        }
    }

    fn head_in_bf16(&self, batch: usize, head: usize, queries: Range<usize>, output: &SharedOutput<'_>) {
        let token = self.key_value(batch, head);
        let packed = Bf16KeyValues::pack(self.num_keys(), self.heads.head_dim, token);
        let mut scratch = Scratch::default();
        for places in self.tiles(batch, head, queries, rows_at_once()) {
            run_tile(places, output, self.heads, |queries, _, out| {
                packed.attend(queries, self.heads.scale(), &mut scratch, out);
            });
        }
    }
}

/// Writes the step's keys and values to their slots, rounded to what the cache keeps.
pub fn write_cache(
    cache: &mut LayerCache,
    input: &StepInput,
    keys: Projected<'_>,
    values: Projected<'_>,
    layout: CacheLayout,
) {
    match cache {
        LayerCache::F32(pages) => write_pages(pages, input, keys, values, layout),
        LayerCache::F16(pages) => write_pages(pages, input, keys, values, layout),
    }
}

fn write_pages<T: Element>(
    pages: &mut Pages<T>,
    input: &StepInput,
    keys: Projected<'_>,
    values: Projected<'_>,
    layout: CacheLayout,
) {
    let CacheLayout { block_size, num_kv_heads, head_dim } = layout;
    for (row, &slot) in input.slot_mapping.iter().enumerate() {
        let (block, token) = (slot / block_size, slot % block_size);
        for head in 0..num_kv_heads {
            let to = (block * num_kv_heads + head) * head_dim * block_size;
            let places = pages.keys[to + token..].iter_mut().step_by(block_size);
            places.zip(keys.head(row, head, head_dim)).for_each(|(to, &key)| *to = T::narrow(key));
            let places = pages.values[to + token * head_dim..].iter_mut();
            places.zip(values.head(row, head, head_dim)).for_each(|(to, &value)| *to = T::narrow(value));
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
/// sequence sees positions `[0, p]` through its block table. Gives `[rows, heads x dim]`.
pub fn paged_attention(
    queries: Projected<'_>,
    cache: &LayerCache,
    input: &StepInput,
    heads: Heads,
    layout: CacheLayout,
) -> Vec<f32> {
    match cache {
        LayerCache::F32(pages) => PagedAttention { queries, pages, input, heads, layout }.run(),
        LayerCache::F16(pages) => PagedAttention { queries, pages, input, heads, layout }.run(),
    }
}

struct PagedAttention<'a, T> {
    queries: Projected<'a>,
    pages: &'a Pages<T>,
    input: &'a StepInput,
    heads: Heads,
    layout: CacheLayout,
}

/// A tile of (row, query head) pairs of one sequence that share a KV head.
struct Task {
    sequence: usize,
    kv_head: usize,
    pairs: Range<usize>,
}

impl<T: Element> PagedAttention<'_, T> {
    fn run(&self) -> Vec<f32> {
        let tasks = self.tasks();
        let mut out = vec![0.0; self.queries.num_rows() * self.heads.width()];
        let output = SharedOutput::new(&mut out);
        let few = tasks.len() < rayon::current_num_threads();
        let run = |task: Task| self.tile(task, few, &output);
        if tasks.len() == 1 {
            tasks.into_iter().for_each(run)
        } else {
            tasks.into_par_iter().for_each(run)
        }
        out
    }

    /// Query heads that share a KV head.
    fn group(&self) -> usize {
        self.heads.num_heads / self.heads.num_kv_heads
    }

    fn tasks(&self) -> Vec<Task> {
        let mut tasks = Vec::new();
        for (index, sequence) in self.input.sequences.iter().enumerate() {
            let num_pairs = sequence.rows.len() * self.group();
            // As equal as can be, 8 as 4 and 4: a tile of two rows does not keep a multiplier busy.
            let num_tiles = num_pairs.div_ceil(QUERY_ROWS);
            let border = |tile: usize| tile * num_pairs / num_tiles;
            for kv_head in 0..self.heads.num_kv_heads {
                tasks.extend((0..num_tiles).map(|tile| Task {
                    sequence: index,
                    kv_head,
                    pairs: border(tile)..border(tile + 1),
                }));
            }
        }
        tasks
    }

    /// `spread`: there are threads for the ranges of its keys as well.
    fn tile(&self, task: Task, spread: bool, output: &SharedOutput<'_>) {
        let (heads, group) = (self.heads, self.group());
        let sequence = &self.input.sequences[task.sequence];
        let places = task.pairs.map(|pair| {
            let (row, head) = (sequence.rows.start + pair / group, task.kv_head * group + pair % group);
            let visible = self.input.positions[row] as usize + 1;
            let query = self.queries.head(row, head, heads.head_dim);
            (query, row * heads.width() + head * heads.head_dim, visible)
        });
        let blocks = &self.input.block_tables[sequence.blocks.clone()];
        let tiles = &PagedHead { pages: self.pages, blocks, kv_head: task.kv_head, layout: self.layout };
        run_tile(places, output, heads, |queries, visible, out| {
            let queries = Queries { queries, visible, tiles, scale: heads.scale() };
            gather_ranges(&queries, spread).write(out);
        });
    }
}

/// All keys of `queries`, range after range.
fn gather_ranges<T: KeyValueTiles>(queries: &Queries<'_, T>, spread: bool) -> Gathered {
    let num_keys = queries.num_keys();
    let gather = |range: usize| queries.gather(range * RANGE..((range + 1) * RANGE).min(num_keys));
    let ranges = 0..num_keys.div_ceil(RANGE);
    let gathered = if spread && ranges.len() > 1 {
        let parts: Vec<Gathered> = ranges.into_par_iter().map(gather).collect();
        parts.into_iter().reduce(Gathered::and)
    } else {
        ranges.map(gather).reduce(Gathered::and)
    };
    gathered.expect("a query sees itself: this is a bug")
}

/// Attends for a few queries; `places`: each with the offset its result goes to, and how many keys it sees.
fn run_tile<'q>(
    places: impl Iterator<Item = (&'q [f32], usize, usize)>,
    output: &SharedOutput<'_>,
    heads: Heads,
    attend: impl FnOnce(&[&[f32]], &[usize], &mut [&mut [f32]]),
) {
    let mut rows = [&[][..]; MAX_ROWS];
    let mut visible = [0; MAX_ROWS];
    let mut out: [&mut [f32]; MAX_ROWS] = Default::default();
    let mut len = 0;
    for (query, offset, sees) in places {
        (rows[len], visible[len]) = (query, sees);
        // SAFETY: each (row, head) belongs to one tile, so no two slices overlap.
        out[len] = unsafe { output.slice(offset, heads.head_dim) };
        len += 1;
    }
    attend(&rows[..len], &visible[..len], &mut out[..len]);
}

/// One KV head of a sequence, seen through its block table.
struct PagedHead<'a, T> {
    pages: &'a Pages<T>,
    blocks: &'a [u32],
    kv_head: usize,
    layout: CacheLayout,
}

impl<T> PagedHead<'_, T> {
    /// Start of the block that holds `tile`, and the tile's first token in it.
    #[inline(always)]
    fn place(&self, tile: usize) -> (usize, usize) {
        let CacheLayout { block_size, num_kv_heads, head_dim } = self.layout;
        let (block, token) = (self.blocks[tile * TILE / block_size] as usize, tile * TILE % block_size);
        ((block * num_kv_heads + self.kv_head) * head_dim * block_size, token)
    }
}

impl<T: Element> KeyValueTiles for PagedHead<'_, T> {
    type Element = T;

    #[inline(always)]
    fn keys(&self, tile: usize) -> (&[T], usize) {
        let (start, token) = self.place(tile);
        (&self.pages.keys[start + token..], self.layout.block_size)
    }

    #[inline(always)]
    fn values(&self, tile: usize) -> &[T] {
        let (start, token) = self.place(tile);
        &self.pages.values[start + token * self.layout.head_dim..][..TILE * self.layout.head_dim]
    }

    #[inline(always)]
    fn value_width(&self) -> usize {
        self.layout.head_dim
    }
}

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::{super::SequenceInput, *};

    /// Numbers in [-1, 1) that look random.
    fn numbers(seed: u32) -> impl FnMut() -> f32 {
        let mut state = seed;
        move || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        }
    }

    /// A cache of `len` elements whose slots hold what must never be read.
    fn dirty_cache(len: usize, in_16_bits: bool) -> LayerCache {
        match in_16_bits {
            true => LayerCache::F16(Pages::new(len, u16::MAX)),
            false => LayerCache::F32(Pages::new(len, f32::NAN)),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn paged_attention_equals_the_plain_one(
            kv_heads in 1..3usize, group in 1..5usize, tiles in 1..4usize, lens in prop::collection::vec((1..90usize, 1..40usize), 1..4),
            block_size in prop_oneof![Just(16usize), Just(32)], in_16_bits: bool, seed in 1..u32::MAX,
        ) {
            let head_dim = tiles * 16;
            let heads = Heads { num_heads: kv_heads * group, num_kv_heads: kv_heads, head_dim };
            let layout = CacheLayout { block_size, num_kv_heads: kv_heads, head_dim };
            let mut next = numbers(seed);
            let num_blocks = 32;
            let mut cache = dirty_cache(num_blocks * block_size * kv_heads * head_dim, in_16_bits);
            let kept = |x: f32| if in_16_bits { f16::from_f32(x).to_f32() } else { x };
            let mut input = StepInput::default();
            let (mut queries, mut expected) = (vec![], vec![]);
            for (n, &(context, asked)) in lens.iter().enumerate() {
                let width = kv_heads * head_dim;
                let keys: Vec<f32> = (0..context * width).map(|_| next()).collect();
                let values: Vec<f32> = (0..context * width).map(|_| next()).collect();
                let blocks: Vec<u32> = (0..context.div_ceil(block_size)).map(|i| (num_blocks - 1 - n * 8 - i) as u32).collect();
                let slot = |position: usize| blocks[position / block_size] as usize * block_size + position % block_size;
                let write = StepInput { slot_mapping: (0..context).map(slot).collect(), ..StepInput::default() };
                write_cache(&mut cache, &write, Projected::new(&keys, width, 0), Projected::new(&values, width, 0), layout);
                let first_row = input.positions.len();
                for position in context.saturating_sub(asked)..context {
                    input.positions.push(position as u32);
                    for head in 0..heads.num_heads {
                        let query: Vec<f32> = (0..head_dim).map(|_| next()).collect();
                        let at = |token: usize| token * width + head / group * head_dim;
                        let dot = |token| keys[at(token)..].iter().zip(&query).map(|(k, q)| f64::from(kept(*k)) * f64::from(*q)).sum::<f64>();
                        let weights: Vec<f64> = (0..=position).map(|token| (dot(token) * f64::from(heads.scale())).exp()).collect();
                        let total: f64 = weights.iter().sum();
                        expected.extend((0..head_dim).map(|i| {
                            weights.iter().enumerate().map(|(token, w)| w * f64::from(kept(values[at(token) + i]))).sum::<f64>() / total
                        }));
                        queries.extend(query);
                    }
                }
                let first_block = input.block_tables.len();
                input.block_tables.extend(blocks);
                let rows = first_row..input.positions.len();
                input.sequences.push(SequenceInput { rows, context_len: context, blocks: first_block..input.block_tables.len() });
            }
            let queries = Projected::new(&queries, heads.width(), 0);
            let got = paged_attention(queries, &cache, &input, heads, layout);
            for (got, expected) in got.iter().zip(expected) {
                prop_assert!((f64::from(*got) - expected).abs() < 2e-5, "{got} {expected}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        #[test]
        fn a_long_context_gives_the_same_bits_alone_or_with_others_on_any_number_of_threads(
            context in RANGE - 8..3 * RANGE + 60, group in 1..9usize, in_16_bits: bool, seed in 1..u32::MAX,
        ) {
            const HEAD_DIM: usize = 16;
            let heads = Heads { num_heads: group, num_kv_heads: 1, head_dim: HEAD_DIM };
            let layout = CacheLayout { block_size: 16, num_kv_heads: 1, head_dim: HEAD_DIM };
            let mut next = numbers(seed);
            let blocks: Vec<u32> = (0..context.div_ceil(16) as u32).rev().collect();
            let slot = |position: usize| blocks[position / 16] as usize * 16 + position % 16;
            let mut cache = dirty_cache(blocks.len() * 16 * HEAD_DIM, in_16_bits);
            let mut random = |len: usize| -> Vec<f32> { (0..len * HEAD_DIM).map(|_| next() * 4.0).collect() };
            let (keys, values) = (random(context), random(context));
            let write = StepInput { slot_mapping: (0..context).map(slot).collect(), ..StepInput::default() };
            write_cache(&mut cache, &write, Projected::new(&keys, HEAD_DIM, 0), Projected::new(&values, HEAD_DIM, 0), layout);
            let step = |positions: Range<usize>| StepInput {
                sequences: vec![SequenceInput { rows: 0..positions.len(), context_len: positions.end, blocks: 0..blocks.len() }],
                positions: positions.map(|position| position as u32).collect(),
                block_tables: blocks.clone(),
                ..StepInput::default()
            };
            // The rows around the first border among them, and the last one.
            let first = RANGE - 10;
            let queries = random((context - first) * group);
            let attend = |positions: Range<usize>, threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let rows = &queries[(positions.start - first) * heads.width()..(positions.end - first) * heads.width()];
                let queries = Projected::new(rows, heads.width(), 0);
                pool.install(|| paged_attention(queries, &cache, &step(positions), heads, layout))
            };
            let together = attend(first..context, 2);
            for position in (first..first + 20).filter(|&position| position < context).chain([context - 1]) {
                let expected = &together[(position - first) * heads.width()..][..heads.width()];
                for threads in [1, 9] {
                    prop_assert_eq!(&attend(position..position + 1, threads)[..], expected, "position {} on {} threads", position, threads);
                }
            }
        }
    }

    #[test]
    fn what_16_bits_cannot_hold_is_kept_as_the_largest_they_can() {
        for (x, kept) in [
            (1e9, 65504.0),
            (-1e9, -65504.0),
            (65504.0, 65504.0),
            (6e-8, 5.960_464_5e-8),
            (-0.0, -0.0),
            (0.3, 0.300_048_83),
        ] {
            assert_eq!(
                f16::from_bits(<u16 as Element>::narrow(x)).to_f32().to_bits(),
                f32::to_bits(kept),
                "{x}"
            );
        }
    }
}
