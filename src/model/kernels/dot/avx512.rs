//! The products of a tile with AVX-512, and the rounding of activations.
//!
//! Called by `dot.rs` where a CPU has VNNI; the tile unit's rows are rounded here, too.

use std::arch::x86_64::*;

use super::{
    super::{SECOND_LEVEL, prefetch},
    Bits, GROUP, LEVELS, QUADS, Tile, WIDTH, Work,
};

/// Fetches what lies a few records ahead of `part`: memory gives more to those who ask early.
#[inline(always)]
pub(super) fn prefetch_ahead(part: *const u8, num_bytes: usize) {
    const AHEAD: usize = 16 << 10;
    prefetch::<SECOND_LEVEL>(part.wrapping_add(AHEAD), num_bytes);
}

/// As the plain function, four vectors at a time.
///
/// # Safety
/// The CPU must have AVX-512 F.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn quantise(x: &[f32; GROUP], values: &mut [i8; GROUP]) -> (f32, i32) {
    // SAFETY: both arrays hold four times 16 elements.
    let x: [__m512; 4] = std::array::from_fn(|i| unsafe { _mm512_loadu_ps(x.as_ptr().add(16 * i)) });
    let larger = |a, b| _mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b));
    let largest = _mm512_reduce_max_ps(_mm512_max_ps(larger(x[0], x[1]), larger(x[2], x[3])));
    let inverse = if largest > 0.0 { LEVELS / largest } else { 0.0 };
    let mut sum = _mm512_setzero_si512();
    for (i, x) in x.into_iter().enumerate() {
        let rounded = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse)));
        sum = _mm512_add_epi32(sum, rounded);
        // SAFETY: as above.
        unsafe { _mm_storeu_si128(values.as_mut_ptr().add(16 * i).cast(), _mm512_cvtepi32_epi8(rounded)) };
    }
    (largest / LEVELS, _mm512_reduce_add_epi32(sum))
}

/// # Safety
/// The CPU must have AVX-512 F, BW and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn multiply(work: &Work<'_>, tile: &mut Tile) {
    macro_rules! by_rows {
        ($($rows:literal),*) => {
            match (work.bits, work.num_rows) {
                $(
                    // SAFETY: the caller's promise.
                    (Bits::Eight, $rows) => unsafe { rows_of_panel::<$rows, true>(work, tile) },
                    // SAFETY: the caller's promise.
                    (Bits::Four, $rows) => unsafe { rows_of_panel::<$rows, false>(work, tile) },
                )*
                _ => unreachable!("a tile has at most six rows: this is a bug"),
            }
        };
    }
    by_rows!(1, 2, 3, 4, 5, 6);
}

/// `EIGHT`: 8 bits; otherwise 4.
///
/// # Safety
/// As [`multiply`], with `ROWS` rows in `work`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn rows_of_panel<const ROWS: usize, const EIGHT: bool>(work: &Work<'_>, tile: &mut Tile) {
    let groups = work.groups;
    let bits = const { if EIGHT { Bits::Eight } else { Bits::Four } };
    let (record_bytes, weight_bytes) = (bits.record_bytes(), bits.weight_bytes());
    // More rows are bound by the multiplier. Lines are fetched one by one, for few can be under way at a time.
    let is_memory_bound = ROWS <= 3;
    let mut acc = [[_mm512_setzero_ps(); 2]; ROWS];
    // SAFETY: `Work::new` cut all slices to `groups` groups and `num_rows` rows; every pointer below stays inside
    // them: `groups` records, of each row `groups` times 64 values, and `groups` scales and sums.
    unsafe {
        let rows: [*const i32; ROWS] =
            std::array::from_fn(|row| work.values.as_ptr().add(row * groups * GROUP).cast());
        let low_half = _mm512_set1_epi8(15);
        for group in 0..groups {
            let record = work.records.as_ptr().add(group * record_bytes);
            let mut ints: [[__m512i; 2]; ROWS] = std::array::from_fn(|row| {
                let sum = if EIGHT { -128 * *work.sums.get_unchecked(row * groups + group) } else { 0 };
                [_mm512_set1_epi32(sum); 2]
            });
            let mut step = |quad: usize, left: __m512i, right: __m512i| {
                for row in 0..ROWS {
                    let values = _mm512_set1_epi32(rows[row].add(group * QUADS + quad).read_unaligned());
                    ints[row][0] = _mm512_dpbusd_epi32(ints[row][0], left, values);
                    ints[row][1] = _mm512_dpbusd_epi32(ints[row][1], right, values);
                }
            };
            if EIGHT {
                for quad in 0..QUADS {
                    let line = record.add(quad * WIDTH * 4);
                    if is_memory_bound {
                        prefetch_ahead(line, 4 * WIDTH);
                    }
                    step(quad, _mm512_loadu_si512(line.cast()), _mm512_loadu_si512(line.add(64).cast()));
                }
            } else {
                for pair in 0..QUADS / 2 {
                    let line = record.add(pair * WIDTH * 4);
                    if is_memory_bound {
                        prefetch_ahead(line, 4 * WIDTH);
                    }
                    let (left, right) =
                        (_mm512_loadu_si512(line.cast()), _mm512_loadu_si512(line.add(64).cast()));
                    let low = |x| _mm512_and_si512(x, low_half);
                    let high = |x| _mm512_and_si512(_mm512_srli_epi16::<4>(x), low_half);
                    step(2 * pair, low(left), low(right));
                    step(2 * pair + 1, high(left), high(right));
                }
            }
            let halves: *const __m256i = record.add(weight_bytes).cast();
            if is_memory_bound {
                prefetch_ahead(halves.cast(), record_bytes - weight_bytes);
            }
            let half = |index: usize| _mm512_cvtph_ps(_mm256_loadu_si256(halves.add(index)));
            for row in 0..ROWS {
                let scale = _mm512_set1_ps(*work.scales.get_unchecked(row * groups + group));
                for side in 0..2 {
                    let ints = _mm512_cvtepi32_ps(ints[row][side]);
                    acc[row][side] = _mm512_fmadd_ps(ints, _mm512_mul_ps(half(side), scale), acc[row][side]);
                    if !EIGHT {
                        let sum = *work.sums.get_unchecked(row * groups + group) as f32;
                        let sum = _mm512_mul_ps(_mm512_set1_ps(sum), scale);
                        acc[row][side] = _mm512_fmadd_ps(half(2 + side), sum, acc[row][side]);
                    }
                }
            }
        }
        for (acc, sums) in acc.iter().zip(&mut tile.sums) {
            _mm512_storeu_ps(sums.as_mut_ptr(), acc[0]);
            _mm512_storeu_ps(sums.as_mut_ptr().add(16), acc[1]);
        }
    }
}
