//! The products of a tile on Intel's tile unit (AMX): 16 rows times 16 columns over a whole group in one instruction.
//!
//! Called by `dot.rs` where several rows are multiplied at once. A record's weights lie as the unit reads them: a row of a
//! tile is a quad of inputs, four bytes for each of 16 columns.

use std::{
    arch::{asm, x86_64::*},
    mem::MaybeUninit,
};

use super::{
    super::amx::{ROWS, Tiles},
    Bits, GROUP, QUADS, Tile, WIDTH, Work,
    avx512::prefetch_ahead,
};

/// Groups whose integer sums are made before they are scaled: they stay in the first-level cache.
const GROUPS_AT_ONCE: usize = 4;

/// Bytes from a quad of a record to the next, and from a row of sums to the next.
const LINE: usize = 4 * WIDTH;

/// Integer sums of some groups, `[groups, rows, columns]`.
type Ints = [[[__m512i; 2]; Tile::MAX_ROWS]; GROUPS_AT_ONCE];

/// The weights of a group, each in a byte of its own: `[quads, columns, 4 inputs]`.
type Unpacked = [[__m512i; 2]; QUADS];

/// The tiles for products of `num_rows` rows in all: sums (above left, above right, below left, below right), activations
/// (above, below), weights (left, right). Rows lie 16 together, so there are 16 to read wherever there are as many in all.
///
/// # Safety
/// As [`Tiles::new`].
pub(super) unsafe fn tiles(num_rows: usize) -> Tiles {
    let (rows, quads) = (num_rows.min(ROWS) as u8, QUADS as u8);
    // SAFETY: the caller's promise.
    unsafe { Tiles::new([rows, rows, rows, rows, rows, rows, quads, quads]) }
}

/// `from_memory`: the panel is used once, so nothing of it is in the caches.
///
/// # Safety
/// The unit must be available, with [`tiles`] of at least as many rows, and the CPU have AVX-512 F and BW.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn multiply(work: &Work<'_>, tile: &mut Tile, from_memory: bool) {
    let mut ints = MaybeUninit::<Ints>::uninit();
    let mut unpacked = MaybeUninit::<Unpacked>::uninit();
    let record_bytes = work.bits.record_bytes();
    // From 16 rows of a group to the next 16.
    let below = work.groups * ROWS * GROUP;
    // SAFETY: the caller's promise. `Work::new` cut all slices to `groups` records and, of `num_rows` rows rounded up to
    // 16, `groups` times 64 values; `ints` has place for the rows of all tiles, and each group's sums are written before
    // they are read.
    unsafe {
        for first in (0..work.groups).step_by(GROUPS_AT_ONCE) {
            let groups = first..(first + GROUPS_AT_ONCE).min(work.groups);
            for (place, group) in groups.clone().enumerate() {
                let record = work.records.as_ptr().add(group * record_bytes);
                if from_memory {
                    prefetch_ahead(record, record_bytes / 2);
                }
                let weights = match work.bits {
                    Bits::Eight => record,
                    Bits::Four => unpack(record, unpacked.as_mut_ptr()),
                };
                let values = work.values.as_ptr().add(group * ROWS * GROUP);
                let to = (&raw mut (*ints.as_mut_ptr())[place]).cast::<i32>();
                if work.num_rows > ROWS {
                    both_halves(values, values.add(below), weights, to);
                } else {
                    upper_half(values, weights, to);
                }
                if from_memory {
                    prefetch_ahead(record.add(record_bytes / 2), record_bytes / 2);
                }
            }
            let ints = ints.as_ptr().cast::<i32>();
            match (work.bits, groups.len() == GROUPS_AT_ONCE) {
                (Bits::Eight, true) => scale::<GROUPS_AT_ONCE, true>(work, first, ints, tile),
                (Bits::Four, true) => scale::<GROUPS_AT_ONCE, false>(work, first, ints, tile),
                (bits, false) => {
                    for group in groups {
                        let ints = ints.add((group - first) * Tile::MAX_ROWS * WIDTH);
                        match bits {
                            Bits::Eight => scale::<1, true>(work, group, ints, tile),
                            Bits::Four => scale::<1, false>(work, group, ints, tile),
                        }
                    }
                }
            }
        }
    }
}

/// Up to 16 rows of a group times its weights.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
unsafe fn upper_half(values: *const i8, weights: *const u8, to: *mut i32) {
    // SAFETY: the caller's promise. The compiler uses no tiles, so nothing of its own is lost.
    unsafe {
        asm!(
            "tileloadd tmm4, [{values} + {row}]",
            "tileloadd tmm6, [{weights} + {line}]",
            "tilezero tmm0",
            "tdpbsud tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{weights} + {line} + 64]",
            "tilezero tmm1",
            "tdpbsud tmm1, tmm4, tmm7",
            "tilestored [{to} + {line}], tmm0",
            "tilestored [{to} + {line} + 64], tmm1",
            values = in(reg) values, row = in(reg) GROUP, weights = in(reg) weights, line = in(reg) LINE,
            to = in(reg) to,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags),
        );
    }
}

/// 17 to 32 rows of a group times its weights.
///
/// # Safety
/// As [`multiply`].
#[inline(always)]
unsafe fn both_halves(upper: *const i8, lower: *const i8, weights: *const u8, to: *mut i32) {
    // SAFETY: as in `upper_half`.
    unsafe {
        asm!(
            "tileloadd tmm6, [{weights} + {line}]",
            "tileloadd tmm4, [{upper} + {row}]",
            "tilezero tmm0",
            "tdpbsud tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{weights} + {line} + 64]",
            "tilezero tmm1",
            "tdpbsud tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{lower} + {row}]",
            "tilezero tmm2",
            "tdpbsud tmm2, tmm5, tmm6",
            "tilezero tmm3",
            "tdpbsud tmm3, tmm5, tmm7",
            "tilestored [{to} + {line}], tmm0",
            "tilestored [{to} + {line} + 64], tmm1",
            "tilestored [{to} + {line} + {below}], tmm2",
            "tilestored [{to} + {line} + {below} + 64], tmm3",
            upper = in(reg) upper, lower = in(reg) lower, row = in(reg) GROUP,
            weights = in(reg) weights, line = in(reg) LINE, to = in(reg) to, below = const ROWS * LINE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
            out("tmm7") _,
            options(nostack, preserves_flags),
        );
    }
}

/// 4-bit weights, each in a byte.
///
/// # Safety
/// As [`multiply`]; `record` must be one of 4 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn unpack(record: *const u8, to: *mut Unpacked) -> *const u8 {
    let low_half = _mm512_set1_epi8(15);
    // SAFETY: the caller's promise: 8 lines of two vectors are read, 16 written.
    unsafe {
        let to = to.cast::<__m512i>();
        for pair in 0..QUADS / 2 {
            for side in 0..2 {
                let both = _mm512_loadu_si512(record.cast::<__m512i>().add(2 * pair + side));
                _mm512_store_si512(to.add(4 * pair + side), _mm512_and_si512(both, low_half));
                let high = _mm512_and_si512(_mm512_srli_epi16::<4>(both), low_half);
                _mm512_store_si512(to.add(4 * pair + 2 + side), high);
            }
        }
        to.cast()
    }
}

/// Adds `GROUPS` groups from `first` on to the sums of all rows: the operations of the other instruction sets, in their
/// order. `EIGHT`: 8 bits; otherwise 4.
///
/// # Safety
/// As [`multiply`]; `ints` must hold the sums of these groups.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn scale<const GROUPS: usize, const EIGHT: bool>(
    work: &Work<'_>,
    first: usize,
    ints: *const i32,
    tile: &mut Tile,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let halves = |group: usize, vector: usize| {
            let record = work.records.as_ptr().add((first + group) * work.bits.record_bytes());
            let halves: *const __m256i = record.add(work.bits.weight_bytes()).cast();
            _mm512_cvtph_ps(_mm256_loadu_si256(halves.add(vector)))
        };
        let scales: [[__m512; 2]; GROUPS] =
            std::array::from_fn(|group| std::array::from_fn(|side| halves(group, side)));
        let least: [[__m512; 2]; GROUPS] = std::array::from_fn(|group| {
            std::array::from_fn(|side| if EIGHT { _mm512_setzero_ps() } else { halves(group, 2 + side) })
        });
        for (row, sums) in tile.sums[..work.num_rows].iter_mut().enumerate() {
            let to = sums.as_mut_ptr();
            let mut acc = match first {
                0 => [_mm512_setzero_ps(); 2],
                _ => [_mm512_loadu_ps(to), _mm512_loadu_ps(to.add(16))],
            };
            let start = (row / ROWS * work.groups + first) * ROWS + row % ROWS;
            for group in 0..GROUPS {
                let at = start + group * ROWS;
                let (factor, sum) = (*work.scales.get_unchecked(at), *work.sums.get_unchecked(at));
                let factor = _mm512_set1_ps(factor);
                let ints = ints.add((group * Tile::MAX_ROWS + row) * WIDTH);
                for side in 0..2 {
                    let mut ints = _mm512_loadu_si512(ints.add(16 * side).cast());
                    if EIGHT {
                        ints = _mm512_sub_epi32(ints, _mm512_set1_epi32(128 * sum));
                    }
                    let scale = _mm512_mul_ps(scales[group][side], factor);
                    acc[side] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints), scale, acc[side]);
                    if !EIGHT {
                        let sum = _mm512_mul_ps(_mm512_set1_ps(sum as f32), factor);
                        acc[side] = _mm512_fmadd_ps(least[group][side], sum, acc[side]);
                    }
                }
            }
            _mm512_storeu_ps(to, acc[0]);
            _mm512_storeu_ps(to.add(16), acc[1]);
        }
    }
}
