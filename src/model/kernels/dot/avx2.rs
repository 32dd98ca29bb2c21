//! The products of a tile with AVX2.
//!
//! Called by `dot.rs` where a CPU has no AVX-512 with VNNI.

use std::arch::x86_64::*;

use super::{Bits, GROUP, QUADS, Tile, WIDTH, Work};

/// Products of as many quads of 4-bit weights fit 16 bits, two to a sum: 8 * 2 * 15 * 127.
const SHORT_QUADS: usize = 8;

/// # Safety
/// The CPU must have AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn multiply(work: &Work<'_>, tile: &mut Tile) {
    let mut row = 0;
    while row < work.num_rows {
        // SAFETY: the caller's promise; the rows are inside `work`.
        unsafe {
            match (work.bits, work.num_rows - row) {
                (Bits::Eight, 1) => rows_of_panel::<1, true>(work, row, tile),
                (Bits::Eight, _) => rows_of_panel::<2, true>(work, row, tile),
                (Bits::Four, 1) => rows_of_panel::<1, false>(work, row, tile),
                (Bits::Four, _) => rows_of_panel::<2, false>(work, row, tile),
            }
        }
        row += 2;
    }
}

/// Vectors of eight columns in a panel.
const VECTORS: usize = WIDTH / 8;

/// `ROWS` rows from `first` times the panel. All columns at once, so that weights are read in the order they lie in.
///
/// # Safety
/// As [`multiply`]; `first + ROWS` rows must be in `work`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows_of_panel<const ROWS: usize, const EIGHT: bool>(
    work: &Work<'_>,
    first: usize,
    tile: &mut Tile,
) {
    let groups = work.groups;
    let (record_bytes, weight_bytes) = (work.bits.record_bytes(), work.bits.weight_bytes());
    let mut acc = [[_mm256_setzero_ps(); ROWS]; VECTORS];
    // SAFETY: as in `avx512_rows`: `Work` was cut so that every pointer below stays inside it.
    unsafe {
        let rows: [*const i32; ROWS] =
            std::array::from_fn(|row| work.values.as_ptr().add((first + row) * groups * GROUP).cast());
        for group in 0..groups {
            let record = work.records.as_ptr().add(group * record_bytes);
            let values = rows.map(|row| row.add(group * QUADS));
            let ints = if EIGHT { ints_of_8(record, values) } else { ints_of_4(record, values) };
            for (vector, (acc, ints)) in acc.iter_mut().zip(ints).enumerate() {
                let halves: *const __m128i = record.add(weight_bytes + vector * 16).cast();
                let scales = _mm256_cvtph_ps(_mm_loadu_si128(halves));
                for row in 0..ROWS {
                    let at = (first + row) * groups + group;
                    let scale = _mm256_set1_ps(*work.scales.get_unchecked(at));
                    let ints = _mm256_cvtepi32_ps(ints[row]);
                    acc[row] = _mm256_fmadd_ps(ints, _mm256_mul_ps(scales, scale), acc[row]);
                    if !EIGHT {
                        let least = _mm256_cvtph_ps(_mm_loadu_si128(halves.byte_add(2 * WIDTH)));
                        let sum = _mm256_set1_ps(*work.sums.get_unchecked(at) as f32);
                        acc[row] = _mm256_fmadd_ps(least, _mm256_mul_ps(sum, scale), acc[row]);
                    }
                }
            }
        }
        for (vector, acc) in acc.into_iter().enumerate() {
            for (row, acc) in acc.into_iter().enumerate() {
                _mm256_storeu_ps(tile.sums[first + row].as_mut_ptr().add(vector * 8), acc);
            }
        }
    }
}

/// Integer sums of one group of 8-bit weights.
///
/// # Safety
/// The CPU must have AVX2; `record` must be one of 8 bits, and each of `values` have the quads of a group.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn ints_of_8<const ROWS: usize>(
    record: *const u8,
    values: [*const i32; ROWS],
) -> [[__m256i; ROWS]; VECTORS] {
    let (ones, sign) = (_mm256_set1_epi16(1), _mm256_set1_epi8(-128));
    let mut ints = [[_mm256_setzero_si256(); ROWS]; VECTORS];
    for quad in 0..QUADS {
        // SAFETY: the caller's promise: a record has `QUADS` lines of `VECTORS` vectors.
        unsafe {
            let line = record.add(quad * WIDTH * 4).cast::<__m256i>();
            let values = broadcast(&values, quad);
            for (vector, ints) in ints.iter_mut().enumerate() {
                // Signed: the instruction multiplies unsigned with signed, and adds two products in 16 bits, which
                // holds 2 * 127 * 127 but not 2 * 255 * 127.
                let weights = _mm256_xor_si256(_mm256_loadu_si256(line.add(vector)), sign);
                let size = _mm256_abs_epi8(weights);
                for (ints, values) in ints.iter_mut().zip(values) {
                    let pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(values, weights));
                    *ints = _mm256_add_epi32(*ints, _mm256_madd_epi16(pairs, ones));
                }
            }
        }
    }
    ints
}

/// Integer sums of one group of 4-bit weights.
///
/// # Safety
/// As [`ints_of_8`], of 4 bits.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn ints_of_4<const ROWS: usize>(
    record: *const u8,
    values: [*const i32; ROWS],
) -> [[__m256i; ROWS]; VECTORS] {
    let (ones, low_half) = (_mm256_set1_epi16(1), _mm256_set1_epi8(15));
    let mut ints = [[_mm256_setzero_si256(); ROWS]; VECTORS];
    for part in 0..QUADS / SHORT_QUADS {
        let mut shorts = [[_mm256_setzero_si256(); ROWS]; VECTORS];
        for line in part * SHORT_QUADS / 2..(part + 1) * SHORT_QUADS / 2 {
            // SAFETY: the caller's promise: a record has `QUADS / 2` lines of `VECTORS` vectors.
            unsafe {
                let (even, odd) = (broadcast(&values, 2 * line), broadcast(&values, 2 * line + 1));
                let line = record.add(line * WIDTH * 4).cast::<__m256i>();
                for (vector, shorts) in shorts.iter_mut().enumerate() {
                    let stored = _mm256_loadu_si256(line.add(vector));
                    let low = _mm256_and_si256(stored, low_half);
                    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(stored), low_half);
                    for (row, shorts) in shorts.iter_mut().enumerate() {
                        let low = _mm256_maddubs_epi16(low, even[row]);
                        let high = _mm256_maddubs_epi16(high, odd[row]);
                        *shorts = _mm256_add_epi16(*shorts, _mm256_add_epi16(low, high));
                    }
                }
            }
        }
        for (ints, shorts) in ints.as_flattened_mut().iter_mut().zip(shorts.as_flattened()) {
            *ints = _mm256_add_epi32(*ints, _mm256_madd_epi16(*shorts, ones));
        }
    }
    ints
}

/// The four values at `index` of each row, in every lane.
///
/// # Safety
/// The CPU must have AVX2; `index` must be inside the rows.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn broadcast<const ROWS: usize>(rows: &[*const i32; ROWS], index: usize) -> [__m256i; ROWS] {
    // SAFETY: the caller's promise.
    rows.map(|row| _mm256_set1_epi32(unsafe { row.add(index).read_unaligned() }))
}
