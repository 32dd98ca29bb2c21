//! The same attention on Intel's tile unit (AMX), 16 queries at a time.

use std::arch::{asm, x86_64::*};

use super::{
    super::amx::{ROW_BYTES, ROWS, Tiles},
    Bf16KeyValues, MAX_SUMS, PAIRS, Scratch, TILE,
};

/// Score of keys that only fill a tile. Finite, for `exp2` would take infinity from infinity.
const MASKED: f32 = f32::MIN / 2.0;
/// Tiles of sums beside each other: those that queries and values leave.
const COLUMN_TILES: usize = MAX_SUMS / TILE;

impl Bf16KeyValues {
    /// `out[r] = softmax(q[r] K^T) V` for up to 16 queries. `scratch.queries` holds them as pairs, `[dim pairs / 16, 16
    /// queries, 16]`, multiplied with log2(e) and the scale.
    ///
    /// # Safety
    /// The unit must be available, and the CPU have AVX-512 F, BW and BF16; `scratch` must be sized for 16 rows and
    /// [`MAX_SUMS`].
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) unsafe fn run_on_tiles(&self, scratch: &mut Scratch, out: &mut [&mut [f32]]) {
        let num_keys = self.num_tiles * TILE;
        let mut factors = [0.0; ROWS];
        // SAFETY: the caller's promise; the pointers stay inside what they were made from, as the loops' bounds say.
        unsafe {
            let _tiles = Tiles::new([ROWS as u8; 8]);
            let (scores, weights) = (scratch.scores.as_mut_ptr(), scratch.weights.as_mut_ptr());
            for key_tile in (0..self.num_tiles).step_by(2) {
                self.scores_of_two(key_tile, scratch.queries.as_ptr(), scores.add(key_tile * TILE));
            }
            for (row, factor) in factors[..out.len()].iter_mut().enumerate() {
                let scores = scores.add(row * num_keys);
                for key in self.num_keys..num_keys {
                    scores.add(key).write(MASKED);
                }
                *factor = 1.0 / softmax_weights(scores, num_keys, weights.add(row * num_keys / 2).cast());
            }
            for first in (0..self.value_width / TILE).step_by(COLUMN_TILES) {
                let columns = (self.value_width / TILE - first).min(COLUMN_TILES);
                self.weighted_values(first * TILE, columns, weights, scores);
                // The scores are not needed any more.
                for (row, out) in out.iter_mut().enumerate() {
                    for column in 0..columns {
                        let factor = _mm512_set1_ps(factors[row]);
                        let from = scores.add((row * COLUMN_TILES + column) * TILE);
                        let lanes = _mm512_mul_ps(_mm512_loadu_ps(from), factor);
                        // The last vector may reach beyond the head.
                        let at = (first + column) * TILE;
                        let len = out.len().saturating_sub(at).min(TILE);
                        let mask = ((1u32 << len) - 1) as __mmask16;
                        _mm512_mask_storeu_ps(out.as_mut_ptr().wrapping_add(at), mask, lanes);
                    }
                }
            }
        }
    }

    /// Scores of 16 queries and the keys of two neighbouring tiles, to rows of as many floats as there are keys.
    ///
    /// # Safety
    /// As [`Self::run_on_tiles`]; `key_tile + 1` must exist, and `to` have place.
    #[inline(always)]
    unsafe fn scores_of_two(&self, key_tile: usize, queries: *const u32, to: *mut f32) {
        // SAFETY: the caller's promise. The compiler uses no tiles: what one block leaves there, the next one finds.
        unsafe {
            let left = self.keys.as_ptr().add(key_tile * self.dim_pairs * TILE);
            let right = left.add(self.dim_pairs * TILE);
            asm!("tilezero tmm0", "tilezero tmm1", options(nomem, nostack, preserves_flags));
            for part in 0..self.dim_pairs / PAIRS {
                let at = part * PAIRS * TILE;
                asm!(
                    "tileloadd tmm4, [{queries} + {row}]",
                    "tileloadd tmm6, [{left} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{right} + {row}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    queries = in(reg) queries.add(at), left = in(reg) left.add(at), right = in(reg) right.add(at),
                    row = in(reg) ROW_BYTES,
                    options(nostack, preserves_flags, readonly),
                );
            }
            asm!(
                "tilestored [{to} + {row}], tmm0",
                "tilestored [{to} + {row} + 64], tmm1",
                to = in(reg) to, row = in(reg) self.num_tiles * TILE * 4,
                options(nostack, preserves_flags),
            );
        }
    }

    /// The values' `columns` vectors from column `first` on, summed with the weights: `[16 queries, 5 vectors]` to `to`.
    ///
    /// # Safety
    /// As [`Self::run_on_tiles`]; there must be as many columns, at most 5.
    #[inline(always)]
    unsafe fn weighted_values(&self, first: usize, columns: usize, weights: *const u32, to: *mut f32) {
        let (weights_row, values_row) = (self.num_tiles * TILE * 2, self.value_width * 4);
        macro_rules! for_each_column {
            ($do:ident) => {
                $do!(0, "tmm0", "tmm6");
                $do!(1, "tmm1", "tmm7");
                $do!(2, "tmm2", "tmm6");
                $do!(3, "tmm3", "tmm7");
                $do!(4, "tmm4", "tmm6");
            };
        }
        macro_rules! zero {
            ($column:literal, $sums:literal, $_values:literal) => {
                asm!(concat!("tilezero ", $sums), options(nomem, nostack, preserves_flags));
            };
        }
        // SAFETY: as in `scores_of_two`.
        unsafe {
            for_each_column!(zero);
            for part in 0..self.num_tiles / 2 {
                let values = self.values.as_ptr().add(part * TILE * self.value_width + first);
                asm!(
                    "tileloadd tmm5, [{weights} + {row}]",
                    weights = in(reg) weights.add(part * PAIRS), row = in(reg) weights_row,
                    options(nostack, preserves_flags, readonly),
                );
                macro_rules! multiply {
                    ($column:literal, $sums:literal, $values:literal) => {
                        if $column < columns {
                            asm!(
                                concat!("tileloadd ", $values, ", [{values} + {row}]"),
                                concat!("tdpbf16ps ", $sums, ", tmm5, ", $values),
                                values = in(reg) values.add($column * TILE), row = in(reg) values_row,
                                options(nostack, preserves_flags, readonly),
                            );
                        }
                    };
                }
                for_each_column!(multiply);
            }
            macro_rules! store {
                ($column:literal, $sums:literal, $_values:literal) => {
                    asm!(
                        concat!("tilestored [{to} + {row}], ", $sums),
                        to = in(reg) to.add($column * TILE), row = in(reg) COLUMN_TILES * ROW_BYTES,
                        options(nostack, preserves_flags),
                    );
                };
            }
            for_each_column!(store);
        }
    }
}

/// Writes `2^(score - largest)` in bf16 to `to`; returns the sum. `len` is a multiple of 32.
///
/// # Safety
/// The CPU must have AVX-512 F and BF16; `len` elements must be there to read and to write, one of them finite.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn softmax_weights(scores: *const f32, len: usize, to: *mut u16) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let mut largest = [_mm512_set1_ps(f32::NEG_INFINITY); 2];
        for at in (0..len).step_by(2 * TILE) {
            largest[0] = _mm512_max_ps(largest[0], _mm512_loadu_ps(scores.add(at)));
            largest[1] = _mm512_max_ps(largest[1], _mm512_loadu_ps(scores.add(at + TILE)));
        }
        let largest = _mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(largest[0], largest[1])));
        let mut sums = [_mm512_setzero_ps(); 2];
        for at in (0..len).step_by(2 * TILE) {
            let low = exp2(_mm512_sub_ps(_mm512_loadu_ps(scores.add(at)), largest));
            let high = exp2(_mm512_sub_ps(_mm512_loadu_ps(scores.add(at + TILE)), largest));
            sums = [_mm512_add_ps(sums[0], low), _mm512_add_ps(sums[1], high)];
            let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(to.add(at).cast(), rounded);
        }
        _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]))
    }
}

/// `2^x` for `x` up to 0, with a relative error below 3e-6: a polynomial on either side of the nearest integer (a
/// least-squares fit at Chebyshev's points). What is below the least float becomes 0.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp2(x: __m512) -> __m512 {
    let whole = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
    let rest = _mm512_sub_ps(x, whole);
    let mut sum = _mm512_set1_ps(COEFFICIENTS[0]);
    for coefficient in &COEFFICIENTS[1..] {
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(*coefficient));
    }
    _mm512_scalef_ps(sum, whole)
}

/// Of the fourth power first.
const COEFFICIENTS: [f32; 5] = [0.009_560_51, 0.055_917_04, 0.240_249_81, 0.693_121_97, 0.999_999_17];
