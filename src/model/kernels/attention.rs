//! Attention over keys and values that lie in tiles of 16 tokens: blocks of the paged cache, or a packed sequence.
//!
//! Streaming softmax: the score matrix is never written whole. A query's arithmetic runs over its keys in ascending
//! order with fixed boundaries, so its result does not depend on which other queries are computed beside it.

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

/// Where keys and values lie.
pub trait KeyValueTiles: Sync {
    /// Keys of a tile and the distance of its rows: element `(i, token)` of `[head_dim, 16]` is at `i * stride + token`.
    fn keys(&self, tile: usize) -> (&[f32], usize);
    /// Values of a tile, `[16, padded head_dim]`.
    fn values(&self, tile: usize) -> &[f32];
    /// Width of a row of values, a multiple of 16.
    fn value_width(&self) -> usize;
}

/// Up to [`QUERY_ROWS`] queries against the same keys.
pub struct Queries<'a, 'o, T> {
    /// Each `[head_dim]`.
    pub queries: &'a [&'a [f32]],
    /// How many keys each of them sees, at least 1.
    pub visible: &'a [usize],
    pub tiles: &'a T,
    pub scale: f32,
    /// Each `[head_dim]`, written.
    pub out: &'a mut [&'o mut [f32]],
}

/// `out[r] = softmax(scale * q[r] K^T) V` over the first `visible[r]` keys.
pub fn attend<T: KeyValueTiles>(work: Queries<'_, '_, T>) {
    debug_assert!(work.visible.iter().all(|&visible| visible > 0));
    Arch::new().dispatch(work);
}

impl<T: KeyValueTiles> WithSimd for Queries<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match TILE / S::F32_LANES {
            1 => self.by_rows::<S, 1>(simd),
            2 => self.by_rows::<S, 2>(simd),
            4 => self.by_rows::<S, 4>(simd),
            _ => self.by_rows::<S, 16>(simd),
        }
    }
}

impl<T: KeyValueTiles> Queries<'_, '_, T> {
    #[inline(always)]
    fn by_rows<S: Simd, const VECTORS: usize>(self, simd: S) {
        match self.queries.len() {
            1 => self.run::<S, VECTORS, 1>(simd),
            2 => self.run::<S, VECTORS, 2>(simd),
            3 => self.run::<S, VECTORS, 3>(simd),
            4 => self.run::<S, VECTORS, 4>(simd),
            5 => self.run::<S, VECTORS, 5>(simd),
            _ => self.run::<S, VECTORS, QUERY_ROWS>(simd),
        }
    }

    #[inline(always)]
    fn run<S: Simd, const VECTORS: usize, const ROWS: usize>(self, simd: S) {
        let head_dim = self.queries[0].len();
        // Transposed, so that one pointer reaches all rows.
        let mut queries = vec![[0.0; ROWS]; head_dim];
        for (i, values) in queries.iter_mut().enumerate() {
            *values = std::array::from_fn(|row| self.queries[row][i]);
        }
        let num_keys = self.visible.iter().copied().max().unwrap_or(0);
        let width = self.tiles.value_width();
        let mut sums = vec![0.0f32; ROWS * width];
        let (mut largest, mut total) = ([f32::NEG_INFINITY; ROWS], [0.0f32; ROWS]);
        let mut start = 0;
        while start < num_keys {
            let end = num_keys.min(start + ROUND);
            let mut weights = [[f32::NEG_INFINITY; ROUND]; ROWS];
            for tile in start / TILE..end.div_ceil(TILE) {
                let offset = tile * TILE - start;
                self.scores::<S, VECTORS, ROWS>(simd, &queries, tile, offset, &mut weights);
            }
            for row in 0..ROWS {
                let seen = self.visible[row].saturating_sub(start).min(ROUND);
                weights[row][seen..].fill(f32::NEG_INFINITY);
                let before = largest[row];
                largest[row] = maximum(&weights[row]).max(before);
                total[row] =
                    total[row] * exp(before - largest[row]) + exponentials(&mut weights[row], largest[row]);
                if before != largest[row] && start > 0 {
                    let shrink = exp(before - largest[row]);
                    sums[row * width..][..width].iter_mut().for_each(|x| *x *= shrink);
                }
            }
            self.add_values::<S, VECTORS, ROWS>(simd, start..end, &weights, &mut sums);
            start = end;
        }
        for row in 0..ROWS {
            let scale = 1.0 / total[row];
            for (out, sum) in self.out[row].iter_mut().zip(&sums[row * width..]) {
                *out = sum * scale;
            }
        }
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
        let (keys, stride) = self.tiles.keys(tile);
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
        for (i, queries) in queries.iter().enumerate() {
            let (keys, _) = S::as_simd_f32s(&keys[i * stride..][..TILE]);
            for row in 0..ROWS {
                let query = simd.splat_f32s(queries[row]);
                for v in 0..VECTORS {
                    sums[row][v] = simd.mul_add_e_f32s(query, keys[v], sums[row][v]);
                }
            }
        }
        let scale = simd.splat_f32s(self.scale);
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
        range: std::ops::Range<usize>,
        weights: &[[f32; ROUND]; ROWS],
        sums: &mut [f32],
    ) {
        let width = self.tiles.value_width();
        for column in (0..width).step_by(TILE) {
            let mut acc = [[simd.splat_f32s(0.0); VECTORS]; ROWS];
            for row in 0..ROWS {
                let (from, _) = S::as_simd_f32s(&sums[row * width + column..][..TILE]);
                acc[row].copy_from_slice(from);
            }
            for tile in range.start / TILE..range.end.div_ceil(TILE) {
                let values = self.tiles.values(tile);
                let offset = tile * TILE - range.start;
                // Keys behind the last one may hold anything, even NaN: never touch them.
                for token in 0..TILE.min(range.end - tile * TILE) {
                    let (values, _) = S::as_simd_f32s(&values[token * width + column..][..TILE]);
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
        attend(Queries { queries, visible, tiles, scale, out: &mut rows });
        out
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
