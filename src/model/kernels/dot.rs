//! Integer dot products of a tile: some rows of 8-bit activations times one panel of quantised weights; and the rounding of
//! those activations.
//!
//! Called by `kernels/quant.rs` only. One function for each instruction set, chosen at run time; all give the same bits.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use std::ops::Range;

use half::f16;

#[cfg(target_arch = "x86_64")]
use super::amx::Tiles;
use super::{
    panels::{Bits, GROUP, WIDTH},
    quant::{QuantMatrix, QuantRows},
};

/// Four inputs that one instruction multiplies.
const QUADS: usize = GROUP / 4;

/// Fewer are multiplied faster by vectors.
#[cfg(target_arch = "x86_64")]
const MIN_AMX_ROWS: usize = 4;

/// The sums of some rows and the columns of a panel.
#[derive(Debug, Default)]
pub(super) struct Tile {
    pub sums: [[f32; WIDTH]; Tile::MAX_ROWS],
}

impl Tile {
    /// Of the instruction set with the largest tiles.
    pub const MAX_ROWS: usize = 32;
}

/// What the products are computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InstructionSet {
    /// Intel's tile unit, with AVX-512 to scale its sums.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// AVX-512 with VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// AVX2 with F16C and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// Whatever the compiler makes of plain Rust.
    Portable,
}

impl InstructionSet {
    /// The fastest this CPU has for `num_rows` rows; what it has is asked for once.
    #[inline]
    pub fn for_rows(num_rows: usize) -> Self {
        #[cfg(target_arch = "x86_64")]
        if num_rows >= MIN_AMX_ROWS && super::amx::is_available() {
            return InstructionSet::Amx;
        }
        let _ = num_rows;
        InstructionSet::of_this_cpu()
    }

    /// Rows whose activations lie beside each other, group by group: those that one instruction reads.
    pub fn rows_together(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Amx => super::amx::ROWS,
            _ => 1,
        }
    }

    /// Rows of its tiles, a multiple of [`Self::rows_together`].
    pub fn tile_rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Amx => Tile::MAX_ROWS,
            // Six rows of two vectors fill the registers.
            _ => 6,
        }
    }

    /// What the activations of a block of rows may take of a core's second-level cache, bytes. Processors with tiles have
    /// 2 MiB of it.
    pub fn block_bytes(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Amx => 1 << 20,
            _ => 256 << 10,
        }
    }

    /// The fastest this CPU has for few rows.
    #[inline]
    fn of_this_cpu() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let has_avx512 = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
            if has_avx512 && is_x86_feature_detected!("avx512vnni") {
                return InstructionSet::Avx512Vnni;
            }
            let has_avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if has_avx2 && is_x86_feature_detected!("f16c") {
                return InstructionSet::Avx2;
            }
        }
        InstructionSet::Portable
    }

    /// Rounds one group of activations to 8 bits by its largest value; gives its scale and the sum of its values.
    #[inline]
    pub fn quantise(self, x: &[f32; GROUP], values: &mut [i8; GROUP]) -> (f32, i32) {
        match self {
            // SAFETY: this value exists only where the CPU has these instructions.
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512Vnni | InstructionSet::Amx => unsafe { avx512::quantise(x, values) },
            _ => quantise(x, values),
        }
    }
}

/// Multiplies tiles of up to [`InstructionSet::tile_rows`] rows on one thread.
pub(super) struct Multiplier {
    instructions: InstructionSet,
    /// Of all its products.
    num_rows: usize,
    #[cfg(target_arch = "x86_64")]
    _tiles: Option<Tiles>,
}

impl Multiplier {
    /// For products of `num_rows` rows in all.
    ///
    /// # Safety
    /// A thread has one at a time, and runs nothing else while it has: no code that holds one enters rayon.
    pub unsafe fn new(instructions: InstructionSet, num_rows: usize) -> Self {
        Multiplier {
            instructions,
            num_rows,
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this value exists only where the CPU has these instructions; otherwise the caller's promise.
            _tiles: (instructions == InstructionSet::Amx).then(|| unsafe { amx::tiles(num_rows) }),
        }
    }

    /// `rows` times panel `panel`, into the first rows of `tile`.
    #[inline]
    pub fn multiply(
        &self,
        matrix: &QuantMatrix,
        rows: &QuantRows,
        panel: usize,
        range: Range<usize>,
        tile: &mut Tile,
    ) {
        let work = Work::new(matrix, rows, panel, range);
        let most = self.num_rows.min(self.instructions.tile_rows());
        let fits = work.num_rows <= most && rows.instructions == self.instructions;
        assert!(fits, "a tile of another shape: this is a bug");
        match self.instructions {
            // SAFETY: this value exists only where the CPU has these instructions.
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Amx => unsafe {
                // With one tile of rows a panel is used once.
                amx::multiply(&work, tile, self.num_rows <= self.instructions.tile_rows());
            },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512Vnni => unsafe { avx512::multiply(&work, tile) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2 => unsafe { avx2::multiply(&work, tile) },
            InstructionSet::Portable => portable(&work, tile),
        }
    }
}

/// A tile's operands.
struct Work<'a> {
    bits: Bits,
    num_rows: usize,
    groups: usize,
    /// `[groups, record]`
    records: &'a [u8],
    /// `[rows / together, groups, together, 64]`; `rows` is rounded up to those that lie together.
    values: &'a [i8],
    /// `[rows / together, groups, together]`
    scales: &'a [f32],
    /// `[rows / together, groups, together]`
    sums: &'a [i32],
}

impl<'a> Work<'a> {
    /// Cuts out what the tile reads: from here on every index is inside by construction.
    #[inline]
    fn new(matrix: &'a QuantMatrix, rows: &'a QuantRows, panel: usize, range: Range<usize>) -> Self {
        let groups = matrix.num_groups();
        assert!(!range.is_empty(), "a tile without rows: this is a bug");
        let together = rows.instructions.rows_together();
        assert!(range.start.is_multiple_of(together), "a tile that begins within another: this is a bug");
        let whole = range.start * groups..range.end.next_multiple_of(together) * groups;
        Work {
            bits: matrix.bits,
            num_rows: range.len(),
            groups,
            records: matrix.panel(panel).0,
            values: &rows.values[whole.start * GROUP..whole.end * GROUP],
            scales: &rows.scales[whole.clone()],
            sums: &rows.sums[whole],
        }
    }
}

/// Levels on either side of zero.
const LEVELS: f32 = 127.0;

fn quantise(x: &[f32; GROUP], values: &mut [i8; GROUP]) -> (f32, i32) {
    // Adding 1.5 * 2^23 rounds to an integer, to the even one of two, and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LANES: usize = 8;
    let mut lanes = [0.0f32; LANES];
    for chunk in x.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            let value = chunk[lane].abs();
            lanes[lane] = if value > lanes[lane] { value } else { lanes[lane] };
        }
    }
    let largest = lanes.into_iter().fold(0.0, f32::max);
    let inverse = if largest > 0.0 { LEVELS / largest } else { 0.0 };
    for (value, x) in values.iter_mut().zip(x) {
        *value = (x * inverse + ROUND).to_bits() as i8;
    }
    (largest / LEVELS, values.iter().map(|&value| i32::from(value)).sum())
}

/// The definition the others are tested against.
fn portable(work: &Work<'_>, tile: &mut Tile) {
    for row in 0..work.num_rows {
        let mut acc = [0.0f32; WIDTH];
        for (group, record) in work.records.chunks_exact(work.bits.record_bytes()).enumerate() {
            let at = row * work.groups + group;
            let values = &work.values[at * GROUP..][..GROUP];
            let mut ints = [0i32; WIDTH];
            let (weights, halves) = record.split_at(work.bits.weight_bytes());
            for (quad, values) in values.chunks_exact(4).enumerate() {
                let (line, shift, mask) = match work.bits {
                    Bits::Eight => (quad, 0, 255),
                    Bits::Four => (quad / 2, quad % 2 * 4, 15),
                };
                let line = &weights[line * WIDTH * 4..][..WIDTH * 4];
                for (int, weights) in ints.iter_mut().zip(line.chunks_exact(4)) {
                    for (weight, value) in weights.iter().zip(values) {
                        *int += i32::from(weight >> shift & mask) * i32::from(*value);
                    }
                }
            }
            let half =
                |column: usize| f16::from_le_bytes([halves[2 * column], halves[2 * column + 1]]).to_f32();
            let (scale, sum) = (work.scales[at], work.sums[at]);
            for (column, acc) in acc.iter_mut().enumerate() {
                match work.bits {
                    Bits::Eight => {
                        *acc = ((ints[column] - 128 * sum) as f32).mul_add(half(column) * scale, *acc);
                    }
                    Bits::Four => {
                        *acc = (ints[column] as f32).mul_add(half(column) * scale, *acc);
                        *acc = half(WIDTH + column).mul_add(sum as f32 * scale, *acc);
                    }
                }
            }
        }
        tile.sums[row] = acc;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::panels::QuantPanels, *};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(80))]

        #[test]
        fn every_instruction_set_gives_the_same_bits(
            rows in 1..=2 * Tile::MAX_ROWS, k in 1..300usize, n in 1..70usize, four: bool, seed in 1..u32::MAX, loud in 0.1f32..300.0,
        ) {
            let mut state = seed;
            let mut next = || { state ^= state << 13; state ^= state >> 17; state ^= state << 5; (state >> 8) as f32 / 8e6 - 1.0 };
            let weights: Vec<f32> = (0..n * k).map(|_| next()).collect();
            let x: Vec<f32> = (0..rows * k).map(|_| next() * loud).collect();
            let bits = if four { Bits::Four } else { Bits::Eight };
            let panels = QuantPanels::pack(n, k, bits, |index, start, part| {
                part.copy_from_slice(&weights[index * k + start..][..part.len()]);
            });
            let matrix = QuantMatrix::stack(vec![panels.unwrap()]);
            for x in x.as_chunks::<GROUP>().0 {
                let run = |set: InstructionSet| {
                    let mut values = [0; GROUP];
                    (set.quantise(x, &mut values), values)
                };
                prop_assert_eq!(run(InstructionSet::for_rows(rows)), run(InstructionSet::Portable));
            }
            for panel in 0..n.div_ceil(WIDTH) {
                let run = |set: InstructionSet| {
                    let quantised = QuantRows::new(&x, k, set);
                    // SAFETY: dropped before the next one is made.
                    let multiplier = unsafe { Multiplier::new(set, rows) };
                    let mut sums = Vec::new();
                    for first in (0..rows).step_by(set.tile_rows()) {
                        let range = first..(first + set.tile_rows()).min(rows);
                        let mut tile = Tile::default();
                        multiplier.multiply(&matrix, &quantised, panel, range.clone(), &mut tile);
                        sums.extend_from_slice(&tile.sums[..range.len()]);
                    }
                    sums.as_flattened().iter().map(|sum| sum.to_bits()).collect::<Vec<_>>()
                };
                let expected = run(InstructionSet::Portable);
                for set in available() {
                    prop_assert_eq!(&run(set), &expected, "{:?}", set);
                }
            }
        }
    }

    fn available() -> Vec<InstructionSet> {
        let mut available = vec![InstructionSet::for_rows(1), InstructionSet::for_rows(Tile::MAX_ROWS)];
        #[cfg(target_arch = "x86_64")]
        if available[0] == InstructionSet::Avx512Vnni {
            available.push(InstructionSet::Avx2);
        }
        available.dedup();
        available
    }
}
