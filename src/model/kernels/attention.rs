//! Attention over keys and values that lie in tiles of 16 tokens: blocks of the paged cache, or a packed sequence.
//!
//! Streaming softmax: the score matrix is never written whole. A query's arithmetic runs over its keys in ascending
//! order with fixed boundaries, so its result does not depend on which other queries are computed beside it.

use std::ops::Range;

use half::f16;
use pulp::{Arch, Simd, WithSimd};

use super::activation::exp;

/// Tokens of a tile.
pub const TILE: usize = 16;
/// Queries that share one pass over the keys: with two vectors each, they fill the registers.
pub const QUERY_ROWS: usize = 6;
/// Tiles between two updates of the running maximum.
const TILES_A_ROUND: usize = 8;
const ROUND: usize = TILE * TILES_A_ROUND;
/// Lanes of the reductions.
const LANES: usize = 16;

/// What keys and values are stored as; arithmetic is always f32.
pub trait Element: Copy + Send + Sync {
    /// Rounds to what is stored.
    fn narrow(x: f32) -> Self;

    /// As many vectors as [`TILE`] elements fill.
    fn widen<S: Simd, const VECTORS: usize>(stored: &[Self]) -> [S::f32s; VECTORS];
}

impl Element for f32 {
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn widen<S: Simd, const VECTORS: usize>(stored: &[f32]) -> [S::f32s; VECTORS] {
        let (vectors, _) = S::as_simd_f32s(stored);
        std::array::from_fn(|v| vectors[v])
    }
}

/// The bits of an f16. A plain integer, because memory for those comes zeroed from the kernel, untouched.
impl Element for u16 {
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        // What is too large stays finite.
        let largest = f16::MAX.to_f32();
        f16::from_f32(x.clamp(-largest, largest)).to_bits()
    }

    #[inline(always)]
    fn widen<S: Simd, const VECTORS: usize>(stored: &[u16]) -> [S::f32s; VECTORS] {
        // Exponent and fraction in their new places are an f32 that is too small by 2^112; no bit is lost.
        const GROW: f32 = f32::from_bits((127 + 112) << 23);
        let stored = &stored[..TILE];
        let wide: [f32; TILE] = std::array::from_fn(|lane| {
            let bits = i32::from(stored[lane] as i16) << 13;
            f32::from_bits(bits as u32 & 0x8fff_e000) * GROW
        });
        let (vectors, _) = S::as_simd_f32s(&wide);
        std::array::from_fn(|v| vectors[v])
    }
}

/// Where keys and values lie.
pub trait KeyValueTiles: Sync {
    /// What they are stored as.
    type Element: Element;

    /// Keys of a tile and the distance of its rows: element `(i, token)` of `[head_dim, 16]` is at `i * stride + token`.
    fn keys(&self, tile: usize) -> (&[Self::Element], usize);
    /// Values of a tile, `[16, padded head_dim]`.
    fn values(&self, tile: usize) -> &[Self::Element];
    /// Width of a row of values, a multiple of 16.
    fn value_width(&self) -> usize;
}

/// Up to [`QUERY_ROWS`] queries against the same keys.
#[derive(Debug)]
pub struct Queries<'a, T> {
    /// Each `[head_dim]`.
    pub queries: &'a [&'a [f32]],
    /// How many keys each of them sees, at least 1.
    pub visible: &'a [usize],
    pub tiles: &'a T,
    pub scale: f32,
}

impl<T: KeyValueTiles> Queries<'_, T> {
    /// Keys that any of them sees.
    pub fn num_keys(&self) -> usize {
        self.visible.iter().copied().max().unwrap_or(0)
    }

    /// Attends to the visible ones of `keys`, which begin with a tile.
    pub fn gather(&self, keys: Range<usize>) -> Gathered {
        debug_assert!(keys.start.is_multiple_of(TILE) && self.visible.iter().all(|&visible| visible > 0));
        Arch::new().dispatch(Gather { queries: self, keys })
    }
}

/// What some queries have of a range of keys: a softmax that can go on.
#[derive(Debug)]
pub struct Gathered {
    /// Largest score of each query.
    largest: [f32; QUERY_ROWS],
    /// Sum of its `e^(score - largest)`.
    total: [f32; QUERY_ROWS],
    /// Values with those weights, `[rows, width]`.
    sums: Vec<f32>,
    width: usize,
}

impl Gathered {
    fn new(num_rows: usize, width: usize) -> Self {
        // The least number, not infinity: the difference of two infinities is none.
        let largest = [f32::MIN; QUERY_ROWS];
        Gathered { largest, total: [0.0; QUERY_ROWS], sums: vec![0.0; num_rows * width], width }
    }

    /// Together with the keys behind these.
    pub fn and(mut self, behind: Gathered) -> Gathered {
        let rows = self.sums.chunks_exact_mut(self.width).zip(behind.sums.chunks_exact(self.width));
        for (row, (sums, more)) in rows.enumerate() {
            if behind.total[row] == 0.0 {
                // It sees none of them: not even the sign of a zero may change.
                continue;
            }
            let largest = self.largest[row].max(behind.largest[row]);
            let (keep, take) = (exp(self.largest[row] - largest), exp(behind.largest[row] - largest));
            for (sum, more) in sums.iter_mut().zip(more) {
                *sum = *sum * keep + more * take;
            }
            self.total[row] = self.total[row] * keep + behind.total[row] * take;
            self.largest[row] = largest;
        }
        self
    }

    /// The mean values, `[head_dim]` for each query.
    pub fn write(&self, out: &mut [&mut [f32]]) {
        for ((out, sums), total) in out.iter_mut().zip(self.sums.chunks_exact(self.width)).zip(self.total) {
            let scale = 1.0 / total;
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = sum * scale;
            }
        }
    }
}

struct Gather<'a, 'q, T> {
    queries: &'a Queries<'q, T>,
    keys: Range<usize>,
}

impl<T: KeyValueTiles> WithSimd for Gather<'_, '_, T> {
    type Output = Gathered;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Gathered {
        match TILE / S::F32_LANES {
            1 => self.by_rows::<S, 1>(simd),
            2 => self.by_rows::<S, 2>(simd),
            4 => self.by_rows::<S, 4>(simd),
            _ => self.by_rows::<S, 16>(simd),
        }
    }
}

impl<T: KeyValueTiles> Gather<'_, '_, T> {
    #[inline(always)]
    fn by_rows<S: Simd, const VECTORS: usize>(self, simd: S) -> Gathered {
        match self.queries.queries.len() {
            1 => self.run::<S, VECTORS, 1>(simd),
            2 => self.run::<S, VECTORS, 2>(simd),
            3 => self.run::<S, VECTORS, 3>(simd),
            4 => self.run::<S, VECTORS, 4>(simd),
            5 => self.run::<S, VECTORS, 5>(simd),
            _ => self.run::<S, VECTORS, QUERY_ROWS>(simd),
        }
    }

    #[inline(always)]
    fn run<S: Simd, const VECTORS: usize, const ROWS: usize>(self, simd: S) -> Gathered {
        let Queries { queries: rows, visible, tiles, .. } = self.queries;
        // Transposed, so that one pointer reaches all rows.
        let mut queries = vec![[0.0; ROWS]; rows[0].len()];
        for (i, values) in queries.iter_mut().enumerate() {
            *values = std::array::from_fn(|row| rows[row][i]);
        }
        let width = tiles.value_width();
        let mut gathered = Gathered::new(ROWS, width);
        let Gathered { largest, total, sums, .. } = &mut gathered;
        for start in self.keys.clone().step_by(ROUND) {
            let end = self.keys.end.min(start + ROUND);
            let mut weights = [[f32::NEG_INFINITY; ROUND]; ROWS];
            for tile in start / TILE..end.div_ceil(TILE) {
                let offset = tile * TILE - start;
                self.scores::<S, VECTORS, ROWS>(simd, &queries, tile, offset, &mut weights);
            }
            for row in 0..ROWS {
                let seen = visible[row].saturating_sub(start).min(ROUND);
                weights[row][seen..].fill(f32::NEG_INFINITY);
                let before = largest[row];
                largest[row] = maximum(&weights[row]).max(before);
                total[row] =
                    total[row] * exp(before - largest[row]) + exponentials(&mut weights[row], largest[row]);
                if before != largest[row] && start > self.keys.start {
                    let shrink = exp(before - largest[row]);
                    sums[row * width..][..width].iter_mut().for_each(|x| *x *= shrink);
                }
            }
            self.add_values::<S, VECTORS, ROWS>(simd, start..end, &weights, sums);
        }
        gathered
    }

    /// Scaled scores of one tile.
    #[inline(always)]
    fn scores<S: Simd, const VECTORS: usize, const ROWS: usize>(
        &self,
        simd: S,
        queries: &[[f32; ROWS]],
        tile: usize,
        offset: usize,
        weights: &mut [[f32; ROUND]; ROWS],
    ) {
        let (keys, stride) = self.queries.tiles.keys(tile);
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
        for (i, queries) in queries.iter().enumerate() {
            let keys = T::Element::widen::<S, VECTORS>(&keys[i * stride..][..TILE]);
            for row in 0..ROWS {
                let query = simd.splat_f32s(queries[row]);
                for v in 0..VECTORS {
                    sums[row][v] = simd.mul_add_e_f32s(query, keys[v], sums[row][v]);
                }
            }
        }
        let scale = simd.splat_f32s(self.queries.scale);
        for row in 0..ROWS {
            let (out, _) = S::as_mut_simd_f32s(&mut weights[row][offset..offset + TILE]);
            for v in 0..VECTORS {
                out[v] = simd.mul_f32s(sums[row][v], scale);
            }
        }
    }

    /// Adds the weighted values of the keys `range`, key after key.
    #[inline(always)]
    fn add_values<S: Simd, const VECTORS: usize, const ROWS: usize>(
        &self,
        simd: S,
        range: Range<usize>,
        weights: &[[f32; ROUND]; ROWS],
        sums: &mut [f32],
    ) {
        let width = self.queries.tiles.value_width();
        for column in (0..width).step_by(TILE) {
            let mut acc = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
            for row in 0..ROWS {
                let (from, _) = S::as_simd_f32s(&sums[row * width + column..][..TILE]);
                acc[row].copy_from_slice(from);
            }
            for tile in range.start / TILE..range.end.div_ceil(TILE) {
                let values = self.queries.tiles.values(tile);
                let offset = tile * TILE - range.start;
                // Keys behind the last one may hold anything, even NaN: never touch them.
                for token in 0..TILE.min(range.end - tile * TILE) {
                    let values = T::Element::widen::<S, VECTORS>(&values[token * width + column..][..TILE]);
                    for row in 0..ROWS {
                        let weight = simd.splat_f32s(weights[row][offset + token]);
                        for v in 0..VECTORS {
                            acc[row][v] = simd.mul_add_e_f32s(weight, values[v], acc[row][v]);
                        }
                    }
                }
            }
            for row in 0..ROWS {
                let (to, _) = S::as_mut_simd_f32s(&mut sums[row * width + column..][..TILE]);
                to.copy_from_slice(&acc[row]);
            }
        }
    }
}

#[inline(always)]
fn maximum(values: &[f32; ROUND]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in values.chunks_exact(LANES) {
        for lane in 0..LANES {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
        }
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// Turns scores into `e^(score - largest)`; returns their sum.
#[inline(always)]
fn exponentials(values: &mut [f32; ROUND], largest: f32) -> f32 {
    // A loop of its own, or the compiler does not turn it into vector code.
    for value in values.iter_mut() {
        *value = exp(*value - largest);
    }
    let mut lanes = [0.0f32; LANES];
    for chunk in values.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            lanes[lane] += chunk[lane];
        }
    }
    lanes.into_iter().sum()
}

/// Keys and values of one head packed into tiles: for attention outside the cache.
#[derive(Debug)]
pub struct PackedKeyValues {
    /// `[tiles, head_dim, 16]`
    keys: Vec<f32>,
    /// `[tiles, 16, value_width]`
    values: Vec<f32>,
    head_dim: usize,
    value_width: usize,
}

impl PackedKeyValues {
    /// `token` gives the key and the value of a token, `[head_dim]` each.
    pub fn pack<'a>(
        num_tokens: usize,
        head_dim: usize,
        token: impl Fn(usize) -> (&'a [f32], &'a [f32]),
    ) -> Self {
        let (num_tiles, value_width) = (num_tokens.div_ceil(TILE), head_dim.next_multiple_of(TILE));
        let mut packed = PackedKeyValues {
            keys: vec![0.0; num_tiles * head_dim * TILE],
            values: vec![0.0; num_tiles * TILE * value_width],
            head_dim,
            value_width,
        };
        let tiles = packed.keys.chunks_exact_mut(head_dim * TILE).enumerate();
        for (tile, keys) in tiles {
            for column in 0..TILE.min(num_tokens - tile * TILE) {
                let (key, value) = token(tile * TILE + column);
                keys.iter_mut().skip(column).step_by(TILE).zip(key).for_each(|(to, key)| *to = *key);
                packed.values[(tile * TILE + column) * value_width..][..head_dim].copy_from_slice(value);
            }
        }
        packed
    }
}

impl KeyValueTiles for PackedKeyValues {
    type Element = f32;

    #[inline(always)]
    fn keys(&self, tile: usize) -> (&[f32], usize) {
        let len = self.head_dim * TILE;
        (&self.keys[tile * len..][..len], TILE)
    }

    #[inline(always)]
    fn values(&self, tile: usize) -> &[f32] {
        let len = self.value_width * TILE;
        &self.values[tile * len..][..len]
    }

    #[inline(always)]
    fn value_width(&self) -> usize {
        self.value_width
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(query: &[f32], keys: &[f32], values: &[f32], visible: usize, scale: f32) -> Vec<f64> {
        let dim = query.len();
        let dot =
            |key: &[f32]| key.iter().zip(query).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let scores: Vec<f64> =
            keys.chunks(dim).take(visible).map(|key| dot(key) * f64::from(scale)).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        let column = |i: usize| {
            values.chunks(dim).zip(&weights).map(|(v, w)| f64::from(v[i]) * w).sum::<f64>() / total
        };
        (0..dim).map(column).collect()
    }

    fn run(queries: &[&[f32]], visible: &[usize], tiles: &PackedKeyValues, scale: f32) -> Vec<Vec<f32>> {
        let mut out = vec![vec![f32::NAN; queries[0].len()]; queries.len()];
        let mut rows: Vec<&mut [f32]> = out.iter_mut().map(Vec::as_mut_slice).collect();
        let queries = Queries { queries, visible, tiles, scale };
        queries.gather(0..queries.num_keys()).write(&mut rows);
        out
    }

    struct Widened<'a>(&'a [u16]);

    impl WithSimd for Widened<'_> {
        type Output = Vec<f32>;

        fn with_simd<S: Simd>(self, _: S) -> Vec<f32> {
            let tiles = self.0.chunks_exact(TILE);
            match TILE / S::F32_LANES {
                1 => tiles
                    .flat_map(|tile| pulp::bytemuck::cast_slice(&u16::widen::<S, 1>(tile)).to_vec())
                    .collect(),
                2 => tiles
                    .flat_map(|tile| pulp::bytemuck::cast_slice(&u16::widen::<S, 2>(tile)).to_vec())
                    .collect(),
                4 => tiles
                    .flat_map(|tile| pulp::bytemuck::cast_slice(&u16::widen::<S, 4>(tile)).to_vec())
                    .collect(),
                _ => tiles
                    .flat_map(|tile| pulp::bytemuck::cast_slice(&u16::widen::<S, 16>(tile)).to_vec())
                    .collect(),
            }
        }
    }

    #[test]
    fn every_finite_number_of_16_bits_is_widened_exactly() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let wide = Arch::new().dispatch(Widened(&all));
        assert_eq!(wide.len(), all.len());
        for (bits, wide) in all.into_iter().zip(wide) {
            let expected = f16::from_bits(bits);
            assert!(
                !expected.is_finite() || wide.to_bits() == expected.to_f32().to_bits(),
                "{bits:#x}: {wide}"
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(80))]

        #[test]
        fn tiled_attention_equals_the_plain_one_and_ignores_its_neighbours(
            num_keys in 1..400usize, dim in 1..40usize, rows in 1..=QUERY_ROWS, seed in 1..u32::MAX,
        ) {
            let mut state = seed;
            let mut next = || { state ^= state << 13; state ^= state >> 17; state ^= state << 5; (state >> 8) as f32 / 8e6 - 1.0 };
            let keys: Vec<f32> = (0..num_keys * dim).map(|_| next() * 3.0).collect();
            let values: Vec<f32> = (0..num_keys * dim).map(|_| next()).collect();
            let queries: Vec<Vec<f32>> = (0..rows).map(|_| (0..dim).map(|_| next()).collect()).collect();
            let visible: Vec<usize> = (0..rows).map(|row| (num_keys * (row + 1) / rows).max(1)).collect();
            let head = PackedKeyValues::pack(num_keys, dim, |token| (&keys[token * dim..][..dim], &values[token * dim..][..dim]));
            let rows: Vec<&[f32]> = queries.iter().map(Vec::as_slice).collect();
            let together = run(&rows, &visible, &head, 0.7);
            for (row, query) in rows.iter().enumerate() {
                let expected = plain(query, &keys, &values, visible[row], 0.7);
                for (got, expected) in together[row].iter().zip(expected) {
                    prop_assert!((f64::from(*got) - expected).abs() < 1e-5);
                }
                prop_assert_eq!(&run(&[query], &[visible[row]], &head, 0.7)[0], &together[row], "not batch-invariant");
            }
        }
    }
}
