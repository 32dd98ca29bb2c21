//! How a quantised matrix is stored: groups of weights with a scale each, in panels, in the order the products read them.
//!
//! Made while a model loads, or mapped from a file that [`crate::model::quantised`] wrote: the same bytes. Multiplied with
//! by `kernels/quant.rs`. Whoever changes what a byte means gives [`VERSION`] a new number.

use std::{io, ops::Range};

use bytes::Bytes;
use half::f16;
use memmap2::MmapMut;
use pulp::Arch;
use rayon::prelude::*;
use thiserror::Error;

/// Of the layout below; files say theirs.
pub const VERSION: u32 = 1;
/// Inputs that share a scale.
pub const GROUP: usize = 64;
/// Output columns of a panel.
pub const WIDTH: usize = 32;
/// Records start at multiples of this, a line of the cache, where the panels do.
pub const ALIGNMENT: usize = 64;
/// Groups of a row that are read at a time: their records stay in the first-level cache until all columns are there.
const GROUPS_AT_ONCE: usize = 8;

/// How many bits a weight takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bits {
    /// `scale * (q - 128)`: 8.25 bits a weight with its scale.
    Eight,
    /// `scale * q + least`: 4.5 bits a weight with its scale and least value.
    Four,
}

impl Bits {
    /// Bytes of one group of a panel: the weights `[16 quads, 32 columns, 4 inputs]` (4 bits: two quads share a byte, the
    /// first in the low half), then 32 scales in f16, then, with 4 bits, 32 least values in f16.
    pub const fn record_bytes(self) -> usize {
        match self {
            Bits::Eight => GROUP * WIDTH + 2 * WIDTH,
            Bits::Four => GROUP * WIDTH / 2 + 4 * WIDTH,
        }
    }

    /// Bytes of the weights of a record.
    pub const fn weight_bytes(self) -> usize {
        match self {
            Bits::Eight => GROUP * WIDTH,
            Bits::Four => GROUP * WIDTH / 2,
        }
    }

    /// `[panels, groups, record]` of a matrix `[n, k]`, bytes.
    pub const fn shape(self, n: usize, k: usize) -> [usize; 3] {
        [n.div_ceil(WIDTH), k.div_ceil(GROUP), self.record_bytes()]
    }

    /// As on the command line and in files.
    pub const fn name(self) -> &'static str {
        match self {
            Bits::Eight => "q8",
            Bits::Four => "q4",
        }
    }
}

const _: () = assert!(
    Bits::Eight.record_bytes().is_multiple_of(ALIGNMENT)
        && Bits::Four.record_bytes().is_multiple_of(ALIGNMENT)
);

/// Why a matrix cannot be quantised.
#[derive(Debug, Error)]
pub enum PackError {
    #[error("row {row} holds a weight that is NaN, infinite or too large to be quantised")]
    Value { row: usize },
    #[error("no memory for its {num_bytes} bytes: {source}")]
    Memory { num_bytes: usize, source: io::Error },
}

/// A quantised matrix `[n, k]`.
pub struct QuantPanels {
    pub(super) bits: Bits,
    /// [`Bits::shape`]; columns and inputs beyond the matrix are zero weights.
    records: Bytes,
    /// Outputs.
    n: usize,
    /// Inputs.
    k: usize,
}

impl std::fmt::Debug for QuantPanels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QuantPanels[{}, {}; {:?}]", self.n, self.k, self.bits)
    }
}

impl QuantPanels {
    /// Quantises a matrix; `read` copies a part of a row, from a column on. `read` should be inlined: it runs once for a few
    /// hundred weights.
    ///
    /// # Errors
    /// When a weight has no place in the format, or there is no memory.
    pub fn pack(
        n: usize,
        k: usize,
        bits: Bits,
        read: impl Fn(usize, usize, &mut [f32]) + Sync,
    ) -> Result<Self, PackError> {
        let [num_panels, groups, record_bytes] = bits.shape(n, k);
        let panel_bytes = groups * record_bytes;
        let mut records = new_pages(num_panels * panel_bytes)?;
        records.par_chunks_mut(panel_bytes.max(1)).enumerate().try_for_each(|(panel, records)| {
            let rows = panel * WIDTH..((panel + 1) * WIDTH).min(n);
            Arch::new().dispatch(
                #[inline(always)]
                || pack_panel(records, rows, k, bits, &read),
            )
        })?;
        Ok(QuantPanels { bits, records: Bytes::from_owner(records), n, k })
    }

    /// Panels that exist, of [`Bits::shape`].
    ///
    /// # Panics
    /// When there are more or fewer bytes.
    pub fn from_bytes(n: usize, k: usize, bits: Bits, records: Bytes) -> Self {
        let num_bytes: usize = bits.shape(n, k).iter().product();
        assert_eq!(records.len(), num_bytes, "panels of another size: this is a bug");
        QuantPanels { bits, records, n, k }
    }

    /// Outputs.
    pub fn num_outputs(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn num_inputs(&self) -> usize {
        self.k
    }

    /// All of it, as it is stored.
    pub fn bytes(&self) -> &Bytes {
        &self.records
    }

    pub(super) fn num_panels(&self) -> usize {
        self.n.div_ceil(WIDTH)
    }

    /// All records of a panel, `[groups, record]`.
    pub(super) fn panel(&self, index: usize) -> &[u8] {
        let panel_bytes = self.k.div_ceil(GROUP) * self.bits.record_bytes();
        &self.records[index * panel_bytes..][..panel_bytes]
    }

    /// Row `index`, `[k]`, as it is used in products.
    #[cfg(test)]
    pub(super) fn copy_row(&self, index: usize, row: &mut [f32]) {
        let panel = self.panel(index / WIDTH).chunks_exact(self.bits.record_bytes());
        for (values, record) in row.chunks_mut(GROUP).zip(panel) {
            read_column(record, index % WIDTH, values, self.bits);
        }
    }
}

/// Zeroed memory straight from the system, large pages where it has some: a decode step walks over all weights, and would
/// otherwise look up every fourth kilobyte. It goes back to the system when the model does.
fn new_pages(num_bytes: usize) -> Result<MmapMut, PackError> {
    let map = MmapMut::map_anon(num_bytes).map_err(|source| PackError::Memory { num_bytes, source })?;
    // A system without large pages says so; then small ones do.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(map)
}

/// Quantises the rows of one panel, which is all zeros before.
#[inline(always)]
fn pack_panel(
    records: &mut [u8],
    rows: Range<usize>,
    k: usize,
    bits: Bits,
    read: &impl Fn(usize, usize, &mut [f32]),
) -> Result<(), PackError> {
    let blocks = records.chunks_mut(GROUPS_AT_ONCE * bits.record_bytes());
    for (start, records) in (0..k).step_by(GROUPS_AT_ONCE * GROUP).zip(blocks) {
        for column in 0..WIDTH {
            let row = rows.start + column;
            let mut values = [[0.0; GROUP]; GROUPS_AT_ONCE];
            if row < rows.end {
                let len = (k - start).min(GROUPS_AT_ONCE * GROUP);
                read(row, start, &mut values.as_flattened_mut()[..len]);
            }
            for (record, values) in records.chunks_exact_mut(bits.record_bytes()).zip(&values) {
                if !write_column(record, column, values, bits) {
                    return Err(PackError::Value { row });
                }
            }
        }
    }
    Ok(())
}

/// Where weight `(column, input)` of a record lies: its byte, and whether in the high half of it.
#[cfg(test)]
fn place(column: usize, input: usize, bits: Bits) -> (usize, bool) {
    let (quad, lane) = (input / 4, input % 4);
    match bits {
        Bits::Eight => ((quad * WIDTH + column) * 4 + lane, false),
        Bits::Four => ((quad / 2 * WIDTH + column) * 4 + lane, quad % 2 == 1),
    }
}

/// Quantises one group of one output's weights; false if one of them, or their scale, is not finite.
#[inline(always)]
fn write_column(record: &mut [u8], column: usize, values: &[f32; GROUP], bits: Bits) -> bool {
    // Without their signs, floats are ordered as their bits are, with infinity and NaN above all numbers.
    let largest = values.iter().fold(0, |most: u32, x| most.max(x.to_bits() & 0x7fff_ffff));
    let (scale, least) = match bits {
        Bits::Eight => (f32::from_bits(largest) / 127.0, 0.0),
        Bits::Four => range_of_four_bits(values),
    };
    // What is multiplied with is what is stored.
    let (scale, least) = (f16::from_f32(scale), f16::from_f32(least));
    let steps = steps(values, scale.to_f32(), least.to_f32(), bits);
    let quads = steps.as_chunks::<4>().0;
    let (places, halves) = record.split_at_mut(bits.weight_bytes());
    let lines = places.as_chunks_mut::<{ 4 * WIDTH }>().0;
    match bits {
        Bits::Eight => {
            for (line, quad) in lines.iter_mut().zip(quads) {
                line[4 * column..][..4].copy_from_slice(quad);
            }
        }
        Bits::Four => {
            for (line, [low, high]) in lines.iter_mut().zip(quads.as_chunks::<2>().0) {
                let both = std::array::from_fn::<u8, 4, _>(|lane| low[lane] | high[lane] << 4);
                line[4 * column..][..4].copy_from_slice(&both);
            }
            halves[2 * (WIDTH + column)..][..2].copy_from_slice(&least.to_le_bytes());
        }
    }
    halves[2 * column..][..2].copy_from_slice(&scale.to_le_bytes());
    largest < f32::INFINITY.to_bits() && scale.is_finite() && least.is_finite()
}

/// The stored number of each weight.
#[inline(always)]
fn steps(values: &[f32; GROUP], scale: f32, least: f32, bits: Bits) -> [u8; GROUP] {
    let (lowest, highest, zero) = match bits {
        Bits::Eight => (-127.0, 127.0, 128),
        Bits::Four => (0.0, 15.0, 0),
    };
    let inverse = inverse(scale);
    let mut steps = [0; GROUP];
    for (step, value) in steps.iter_mut().zip(values) {
        // The integer is in the low bits of the sum.
        let sum = ((value - least) * inverse).clamp(lowest, highest) + ROUND;
        *step = (sum.to_bits() as u8).wrapping_add(zero);
    }
    steps
}

/// Adding 1.5 * 2^23 rounds to an integer, to the even one of two.
const ROUND: f32 = 12_582_912.0;

#[inline(always)]
fn inverse(scale: f32) -> f32 {
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

#[cfg(test)]
fn read_column(record: &[u8], column: usize, values: &mut [f32], bits: Bits) {
    let half = |at: usize| f16::from_le_bytes([record[at], record[at + 1]]).to_f32();
    let scales = bits.weight_bytes() + 2 * column;
    for (input, value) in values.iter_mut().enumerate() {
        let (at, high) = place(column, input, bits);
        *value = match bits {
            Bits::Eight => half(scales) * (f32::from(record[at]) - 128.0),
            Bits::Four => {
                let steps = if high { record[at] >> 4 } else { record[at] & 15 };
                half(scales) * f32::from(steps) + half(scales + 2 * WIDTH)
            }
        };
    }
}

/// Scale and least value of the 16 levels that fit `values` best: the whole range, or a narrower one that gives up on the
/// extremes, whichever has the smaller squared error.
#[inline(always)]
fn range_of_four_bits(values: &[f32; GROUP]) -> (f32, f32) {
    const LANES: usize = 16;
    let low = values.iter().copied().fold(f32::INFINITY, f32::min);
    let high = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut best = (0.0, 0.0);
    let mut smallest = f32::INFINITY;
    for step in 0..10 {
        let cut = (high - low) * step as f32 * 0.02;
        let (scale, least) = ((high - low - 2.0 * cut) / 15.0, low + cut);
        let inverse = inverse(scale);
        let mut errors = [0.0f32; LANES];
        for chunk in values.as_chunks::<LANES>().0 {
            for (error, x) in errors.iter_mut().zip(chunk) {
                let step = (x - least) * inverse + ROUND - ROUND;
                let off = step.clamp(0.0, 15.0) * scale + least - x;
                *error += off * off;
            }
        }
        let error = errors.iter().sum();
        if error < smallest {
            (best, smallest) = ((scale, least), error);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packed(weights: &[f32], n: usize, k: usize, bits: Bits) -> Result<QuantPanels, PackError> {
        QuantPanels::pack(n, k, bits, |row, start, part| {
            part.copy_from_slice(&weights[row * k + start..][..part.len()]);
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn rows_come_back_within_half_a_step(n in 1..90usize, k in 1..1200usize, four: bool, seed: u32) {
            let mut state = seed | 1;
            let mut next = || { state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223); (state >> 8) as f32 / (1 << 24) as f32 - 0.5 };
            let w: Vec<f32> = (0..n * k).map(|_| next()).collect();
            let bits = if four { Bits::Four } else { Bits::Eight };
            let panels = packed(&w, n, k, bits).unwrap();
            let mut row = vec![0.0; k];
            for (index, expected) in w.chunks(k).enumerate() {
                panels.copy_row(index, &mut row);
                // Four bits may give up on the extremes: up to 18 % of the range on either side.
                let most = if four { 0.2 } else { 0.51 * 0.5 / 127.0 };
                prop_assert!(row.iter().zip(expected).all(|(a, b)| (a - b).abs() <= most));
            }
            let again = QuantPanels::from_bytes(n, k, bits, panels.bytes().clone());
            prop_assert_eq!(again.panel(again.num_panels() - 1), panels.panel(panels.num_panels() - 1));
        }

        #[test]
        fn what_is_no_number_is_found_wherever_it_stands(
            n in 1..70usize, k in 1..700usize, place: prop::sample::Index, four: bool,
            bad in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN, 1e30]),
        ) {
            let mut w = vec![0.25; n * k];
            let at = place.index(w.len());
            w[at] = bad;
            let error = packed(&w, n, k, if four { Bits::Four } else { Bits::Eight }).unwrap_err();
            prop_assert!(matches!(error, PackError::Value { row } if row == at / k), "{}", error);
        }
    }
}
