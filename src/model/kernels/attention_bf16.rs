//! Attention over a whole head with operands rounded to bf16, for CPUs that multiply those (AVX-512 BF16, AMX).
//!
//! Called by `model/attention.rs` where weights are quantised anyway; sums and softmax are f32. A query's arithmetic does
//! not depend on which other queries are computed beside it.

#[cfg(target_arch = "x86_64")]
mod amx;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use pulp::Arch;

use super::{activation::exp, amx as tile_unit, attention::QUERY_ROWS};

/// Keys of a tile: one vector.
const TILE: usize = 16;
/// Pairs of neighbours in a row of the tile unit.
const PAIRS: usize = tile_unit::ROW_BYTES / 4;
/// Upper bound of [`rows_at_once`].
pub const MAX_ROWS: usize = tile_unit::ROWS;
/// Columns of values that are summed beside each other on the tile unit.
const MAX_SUMS: usize = 5 * TILE;

/// What multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    Vectors,
    Tiles,
}

impl Unit {
    fn of_this_cpu() -> Self {
        if tile_unit::is_available() { Unit::Tiles } else { Unit::Vectors }
    }

    fn rows_at_once(self) -> usize {
        match self {
            Unit::Vectors => QUERY_ROWS,
            Unit::Tiles => tile_unit::ROWS,
        }
    }
}

/// Queries that share one pass over the keys.
pub fn rows_at_once() -> usize {
    Unit::of_this_cpu().rows_at_once()
}

/// Whether this CPU has the instructions.
pub fn is_available() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        false
    }
}

/// Keys and values of one head. A `u32` holds two bf16 that are multiplied together, the first in the low half.
#[derive(Debug)]
pub struct Bf16KeyValues {
    unit: Unit,
    /// `[tiles, dim pairs, 16 keys]`; an even number of tiles.
    keys: Vec<u32>,
    /// `[key pairs, value_width]`
    values: Vec<u32>,
    num_keys: usize,
    num_tiles: usize,
    dim_pairs: usize,
    value_width: usize,
}

/// Memory that is used again for the next queries.
#[derive(Debug, Default)]
pub struct Scratch {
    /// `[rows, keys of all tiles]`
    scores: Vec<f32>,
    /// `[rows, key pairs]`
    weights: Vec<u32>,
    /// `[dim pairs, rows]`; on tiles `[dim pairs / 16, 16 rows, 16]`
    queries: Vec<u32>,
}

/// Rounds to bf16, to the even one of two.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16
}

/// Two neighbours as one operand.
#[inline(always)]
fn pair(low: f32, high: f32) -> u32 {
    rounded(low) | rounded(high) << 16
}

/// `x` times `scale`, two neighbours an operand; an odd one is filled up with zero.
#[inline(always)]
fn write_pairs(x: &[f32], scale: f32, to: &mut [u32]) {
    let (pairs, rest) = x.as_chunks::<2>();
    to.iter_mut().zip(pairs).for_each(|(to, x)| *to = pair(x[0] * scale, x[1] * scale));
    rest.iter().for_each(|x| to[pairs.len()] = pair(x * scale, 0.0));
}

impl Bf16KeyValues {
    /// `token` gives the key and the value of a token, `[head_dim]` each.
    pub fn pack<'a>(
        num_keys: usize,
        head_dim: usize,
        token: impl Fn(usize) -> (&'a [f32], &'a [f32]),
    ) -> Self {
        Arch::new().dispatch(
            #[inline(always)]
            || Bf16KeyValues::pack_for(Unit::of_this_cpu(), num_keys, head_dim, token),
        )
    }

    #[inline(always)]
    fn pack_for<'a>(
        unit: Unit,
        num_keys: usize,
        head_dim: usize,
        token: impl Fn(usize) -> (&'a [f32], &'a [f32]),
    ) -> Self {
        let num_tiles = num_keys.div_ceil(TILE).next_multiple_of(2);
        let dim_pairs = match unit {
            Unit::Vectors => head_dim.div_ceil(2),
            // Filled up with zeros.
            Unit::Tiles => head_dim.div_ceil(2).next_multiple_of(PAIRS),
        };
        let value_width = head_dim.next_multiple_of(TILE);
        let mut packed = Bf16KeyValues {
            unit,
            keys: vec![0; num_tiles * dim_pairs * TILE],
            values: vec![0; num_tiles * TILE / 2 * value_width],
            num_keys,
            num_tiles,
            dim_pairs,
            value_width,
        };
        // The keys of a tile as they come, `[16 keys, dim pairs]`.
        let mut rows = vec![0; TILE * dim_pairs];
        for (index, tile) in packed.keys.chunks_exact_mut(dim_pairs * TILE).enumerate() {
            for (key, row) in rows.chunks_exact_mut(dim_pairs).enumerate() {
                if index * TILE + key < num_keys {
                    let (key, _) = token(index * TILE + key);
                    write_pairs(key, 1.0, row);
                } else {
                    row.fill(0);
                }
            }
            for (i, line) in tile.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
                *line = std::array::from_fn(|key| rows[key * dim_pairs + i]);
            }
        }
        let nothing = vec![0.0; head_dim];
        let value = |index: usize| if index < num_keys { token(index).1 } else { &nothing };
        for (index, row) in packed.values.chunks_exact_mut(value_width).take(num_keys.div_ceil(2)).enumerate()
        {
            let (low, high) = (value(2 * index), value(2 * index + 1));
            row.iter_mut().zip(low.iter().zip(high)).for_each(|(to, (&low, &high))| *to = pair(low, high));
        }
        packed
    }

    /// `out[r] = softmax(scale * q[r] K^T) V` for up to [`rows_at_once`] queries, over all keys.
    pub fn attend(&self, queries: &[&[f32]], scale: f32, scratch: &mut Scratch, out: &mut [&mut [f32]]) {
        assert!(is_available(), "this CPU does not multiply bf16: this is a bug");
        let rows = self.unit.rows_at_once();
        assert!((1..=rows).contains(&queries.len()) && queries.len() == out.len());
        // On tiles, sums of values take the place of the scores.
        scratch.scores.resize(rows * (self.num_tiles * TILE).max(MAX_SUMS), 0.0);
        scratch.weights.resize(rows * self.num_tiles * TILE / 2, 0);
        Arch::new().dispatch(
            #[inline(always)]
            || self.pack_queries(queries, scale, &mut scratch.queries),
        );
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instructions were asked for above; the tile unit was, where it is chosen.
        unsafe {
            match (self.unit, queries.len()) {
                (Unit::Tiles, _) => self.run_on_tiles(scratch, out),
                (_, 1) => self.run::<1>(scratch, out),
                (_, 2) => self.run::<2>(scratch, out),
                (_, 3) => self.run::<3>(scratch, out),
                (_, 4) => self.run::<4>(scratch, out),
                (_, 5) => self.run::<5>(scratch, out),
                _ => self.run::<QUERY_ROWS>(scratch, out),
            }
        }
    }

    /// Queries times the scale, as [`Scratch::queries`] has them.
    #[inline(always)]
    fn pack_queries(&self, queries: &[&[f32]], scale: f32, to: &mut Vec<u32>) {
        to.clear();
        match self.unit {
            Unit::Vectors => {
                let mut row = vec![0; self.dim_pairs];
                to.resize(queries.len() * self.dim_pairs, 0);
                for (index, query) in queries.iter().enumerate() {
                    write_pairs(query, scale, &mut row);
                    let places = to[index..].iter_mut().step_by(queries.len());
                    places.zip(&row).for_each(|(to, pair)| *to = *pair);
                }
            }
            Unit::Tiles => {
                // e^x is 2^(x log2(e)).
                let scale = scale * std::f32::consts::LOG2_E;
                to.resize(MAX_ROWS * self.dim_pairs, 0);
                for (row, query) in queries.iter().enumerate() {
                    for (part, x) in query.chunks(2 * PAIRS).enumerate() {
                        write_pairs(x, scale, &mut to[(part * MAX_ROWS + row) * PAIRS..][..PAIRS]);
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Bf16KeyValues {
    /// # Safety
    /// The CPU must have AVX-512 F, BW and BF16; `scratch` must be sized for `ROWS` rows.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn run<const ROWS: usize>(&self, scratch: &mut Scratch, out: &mut [&mut [f32]]) {
        let stride = self.num_tiles * TILE;
        for tiles in 0..self.num_tiles / 2 {
            // SAFETY: the caller's promise.
            unsafe { self.scores::<ROWS>(2 * tiles, scratch) };
        }
        let mut factors = [0.0f32; ROWS];
        for (row, factor) in factors.iter_mut().enumerate() {
            let scores = &mut scratch.scores[row * stride..][..stride];
            scores[self.num_keys..].fill(f32::NEG_INFINITY);
            *factor = 1.0 / softmax_weights(scores);
            let weights = &mut scratch.weights[row * stride / 2..][..stride / 2];
            for (to, scores) in weights.iter_mut().zip(scores.as_chunks::<2>().0) {
                *to = pair(scores[0], scores[1]);
            }
        }
        let mut column = 0;
        while column < self.value_width {
            // SAFETY: the caller's promise.
            unsafe {
                if column + 2 * TILE <= self.value_width {
                    self.values::<ROWS, 2>(column, scratch, &factors, out);
                    column += 2 * TILE;
                } else {
                    self.values::<ROWS, 1>(column, scratch, &factors, out);
                    column += TILE;
                }
            }
        }
    }

    /// Scores of two neighbouring tiles.
    ///
    /// # Safety
    /// As [`Self::run`]; `tile + 1` must be a tile.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn scores<const ROWS: usize>(&self, tile: usize, scratch: &mut Scratch) {
        let stride = self.num_tiles * TILE;
        let mut acc = [[_mm512_setzero_ps(); 2]; ROWS];
        // SAFETY: both tiles are inside `keys`, `queries` holds `dim_pairs * ROWS`, `scores` at least `ROWS * stride`.
        unsafe {
            let left = self.keys.as_ptr().add(tile * self.dim_pairs * TILE);
            let right = left.add(self.dim_pairs * TILE);
            let queries = scratch.queries.as_ptr();
            for i in 0..self.dim_pairs {
                let (left, right) = (load(left.add(i * TILE)), load(right.add(i * TILE)));
                for (row, acc) in acc.iter_mut().enumerate() {
                    let query = broadcast(queries.add(i * ROWS + row));
                    acc[0] = _mm512_dpbf16_ps(acc[0], left, query);
                    acc[1] = _mm512_dpbf16_ps(acc[1], right, query);
                }
            }
            for (row, acc) in acc.iter().enumerate() {
                let to = scratch.scores.as_mut_ptr().add(row * stride + tile * TILE);
                _mm512_storeu_ps(to, acc[0]);
                _mm512_storeu_ps(to.add(TILE), acc[1]);
            }
        }
    }

    /// `16 * VECTORS` columns of the results.
    ///
    /// # Safety
    /// As [`Self::run`]; the columns must be inside `value_width`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn values<const ROWS: usize, const VECTORS: usize>(
        &self,
        column: usize,
        scratch: &Scratch,
        factors: &[f32; ROWS],
        out: &mut [&mut [f32]],
    ) {
        let key_pairs = self.num_tiles * TILE / 2;
        let mut acc = [[_mm512_setzero_ps(); VECTORS]; ROWS];
        // SAFETY: `values` is `[key_pairs, value_width]`, `weights` at least `[ROWS, key_pairs]`.
        unsafe {
            let (values, weights) = (self.values.as_ptr().add(column), scratch.weights.as_ptr());
            for i in 0..key_pairs {
                let row = values.add(i * self.value_width);
                let values: [__m512bh; VECTORS] = std::array::from_fn(|v| load(row.add(v * TILE)));
                for (row, acc) in acc.iter_mut().enumerate() {
                    let weight = broadcast(weights.add(row * key_pairs + i));
                    for v in 0..VECTORS {
                        acc[v] = _mm512_dpbf16_ps(acc[v], values[v], weight);
                    }
                }
            }
        }
        for ((acc, factor), out) in acc.iter().zip(factors).zip(out) {
            for (v, acc) in acc.iter().enumerate() {
                let mut lanes = [0.0f32; TILE];
                // SAFETY: `lanes` is one vector.
                unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), _mm512_mul_ps(*acc, _mm512_set1_ps(*factor))) };
                // The last vector may reach beyond the head.
                out.iter_mut().skip(column + v * TILE).zip(lanes).for_each(|(out, lane)| *out = lane);
            }
        }
    }
}

/// # Safety
/// 16 elements must be readable.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn load(from: *const u32) -> __m512bh {
    // SAFETY: the caller's promise; both types are 64 bytes without invalid values.
    unsafe { std::mem::transmute(_mm512_loadu_si512(from.cast())) }
}

/// # Safety
/// One element must be readable.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn broadcast(from: *const u32) -> __m512bh {
    // SAFETY: as in `load`.
    unsafe { std::mem::transmute(_mm512_set1_epi32(*from as i32)) }
}

/// Turns scores into `e^(score - largest)`; returns their sum.
#[inline(always)]
fn softmax_weights(scores: &mut [f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; TILE];
    for chunk in scores.as_chunks::<TILE>().0 {
        for lane in 0..TILE {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
        }
    }
    let largest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    for score in scores.iter_mut() {
        *score = exp(*score - largest);
    }
    let mut lanes = [0.0; TILE];
    for chunk in scores.as_chunks::<TILE>().0 {
        for lane in 0..TILE {
            lanes[lane] += chunk[lane];
        }
    }
    lanes.into_iter().sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::attention::{PackedKeyValues, Queries},
        *,
    };

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn bf16_attention_is_close_to_the_exact_one_and_ignores_its_neighbours(
            num_keys in 1..200usize, dim in 1..90usize, rows in 1..=MAX_ROWS, seed in 1..u32::MAX,
        ) {
            if !is_available() {
                return Ok(());
            }
            let mut state = seed;
            let mut next = || { state ^= state << 13; state ^= state >> 17; state ^= state << 5; (state >> 8) as f32 / 8e6 - 1.0 };
            let keys: Vec<f32> = (0..num_keys * dim).map(|_| next()).collect();
            let values: Vec<f32> = (0..num_keys * dim).map(|_| next()).collect();
            let queries: Vec<Vec<f32>> = (0..rows).map(|_| (0..dim).map(|_| next()).collect()).collect();
            let token = |token: usize| (&keys[token * dim..][..dim], &values[token * dim..][..dim]);
            let scale = (dim as f32).sqrt().recip();
            let tiles = &PackedKeyValues::pack(num_keys, dim, token);
            let exact = |query: &[f32]| {
                let mut out = vec![f32::NAN; dim];
                let queries = Queries { queries: &[query], visible: &[num_keys], tiles, scale };
                queries.gather(0..num_keys).write(&mut [&mut out]);
                out
            };
            let mut units = vec![Unit::Vectors, Unit::of_this_cpu()];
            units.dedup();
            // Whatever it holds of other queries must not matter.
            let mut scratch = Scratch::default();
            for unit in units {
                let packed = Bf16KeyValues::pack_for(unit, num_keys, dim, token);
                let mut run = |rows: &[&[f32]]| {
                    let mut out = vec![vec![f32::NAN; dim]; rows.len()];
                    let mut rows_out: Vec<&mut [f32]> = out.iter_mut().map(Vec::as_mut_slice).collect();
                    packed.attend(rows, scale, &mut scratch, &mut rows_out);
                    out
                };
                let rows: Vec<&[f32]> = queries.iter().map(Vec::as_slice).take(unit.rows_at_once()).collect();
                let together = run(&rows);
                for (row, query) in rows.iter().enumerate() {
                    for (got, expected) in together[row].iter().zip(&exact(query)) {
                        prop_assert!((got - expected).abs() < 0.02, "{} {}", got, expected);
                    }
                    prop_assert_eq!(&run(&[query])[0], &together[row], "not batch-invariant");
                }
            }
        }
    }
}
