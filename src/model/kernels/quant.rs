//! Weights of 8 or 4 bits, packed once at load, times activations that are rounded to 8 bits at each product.
//!
//! Both are cut along the inputs into groups of [`GROUP`] with a scale each. A product is a sum over groups, in
//! ascending order, of an exact integer sum times both scales: the same bits for one row or a thousand, and for every
//! instruction set of `kernels/dot.rs`.

use std::ops::Range;

use half::f16;
use pulp::Arch;
use rayon::prelude::*;

use super::{
    MIN_PARALLEL_WORK, NewOutput,
    dot::{InstructionSet, Tile},
    filled, write_sums,
};

/// Inputs that share a scale.
pub const GROUP: usize = 64;
/// Output columns of a panel.
pub const WIDTH: usize = 32;
/// Activations of a block of rows take no more than this of a core's second-level cache, bytes.
const BLOCK_BYTES: usize = 256 << 10;

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
}

/// A line of the cache; records are made of whole ones, and loads never cross two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

const LINE: usize = 64;
const _: () = assert!(
    Bits::Eight.record_bytes().is_multiple_of(LINE) && Bits::Four.record_bytes().is_multiple_of(LINE)
);

/// A quantised weight matrix `[n, k]`.
pub struct QuantMatrix {
    pub(super) bits: Bits,
    /// `[panels, groups, record]`, see [`Bits::record_bytes`]; columns and inputs beyond the matrix are zero weights.
    records: Vec<Line>,
    /// Outputs.
    n: usize,
    /// Inputs.
    k: usize,
}

impl std::fmt::Debug for QuantMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QuantMatrix[{}, {}; {:?}]", self.n, self.k, self.bits)
    }
}

impl QuantMatrix {
    /// Quantises a matrix `[n, k]`; `read` copies a row of it.
    pub fn pack(n: usize, k: usize, bits: Bits, read: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let panel_bytes = k.div_ceil(GROUP) * bits.record_bytes();
        let mut lines = vec![Line([0; LINE]); n.div_ceil(WIDTH) * panel_bytes / LINE];
        lines.par_chunks_mut((panel_bytes / LINE).max(1)).enumerate().for_each(|(panel, lines)| {
            let records = bytes_mut(lines);
            // Padded to whole groups; rows beyond the matrix are zero.
            let mut row = vec![0.0; k.next_multiple_of(GROUP)];
            for column in 0..WIDTH {
                match panel * WIDTH + column {
                    index if index < n => read(index, &mut row[..k]),
                    _ => row.fill(0.0),
                }
                let groups = row.as_chunks::<GROUP>().0.iter();
                Arch::new().dispatch(|| {
                    for (record, values) in records.chunks_exact_mut(bits.record_bytes()).zip(groups) {
                        write_column(record, column, values, bits);
                    }
                });
            }
        });
        QuantMatrix { bits, records: lines, n, k }
    }

    /// Outputs.
    pub fn num_outputs(&self) -> usize {
        self.n
    }

    /// Groups of inputs.
    pub(super) fn num_groups(&self) -> usize {
        self.k.div_ceil(GROUP)
    }

    /// Memory it takes, bytes.
    pub fn num_bytes(&self) -> usize {
        size_of_val(&self.records[..])
    }

    /// All records of a panel, `[groups, record]`.
    pub(super) fn panel(&self, index: usize) -> &[u8] {
        let lines = self.num_groups() * self.bits.record_bytes() / LINE;
        bytes(&self.records[index * lines..][..lines])
    }

    /// Row `index` of the matrix, `[k]`, as it is used in products.
    pub fn copy_row(&self, index: usize, row: &mut [f32]) {
        let record_bytes = self.bits.record_bytes();
        let panel = self.panel(index / WIDTH);
        for (values, record) in row.chunks_mut(GROUP).zip(panel.chunks_exact(record_bytes)) {
            read_column(record, index % WIDTH, values, self.bits);
        }
    }

    /// `x` `[m, k]` times the transposed matrix, plus `bias` `[n]`: `[m, n]`.
    pub fn multiply(&self, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
        let m = x.len() / self.k;
        assert_eq!(x.len(), m * self.k, "an input of another width: this is a bug");
        let rows = QuantRows::new(x, self.k);
        let is_small = m * self.n * self.k < MIN_PARALLEL_WORK * 4;
        let num_panels = self.n.div_ceil(WIDTH);
        // Several tasks a thread, so that a slow one does not hold up the rest.
        let num_groups = if is_small { 1 } else { (rayon::current_num_threads() * 4).min(num_panels) };
        let rows_a_block = (BLOCK_BYTES / self.k).clamp(2 * Tile::MAX_ROWS, 16 * Tile::MAX_ROWS)
            / Tile::MAX_ROWS
            * Tile::MAX_ROWS;
        let fill = |output: &NewOutput<'_>| {
            let run = |task: usize| {
                let (block, group) = (task / num_groups, task % num_groups);
                let panels = group * num_panels / num_groups..(group + 1) * num_panels / num_groups;
                let block = block * rows_a_block..((block + 1) * rows_a_block).min(m);
                self.block(&rows, block, panels, bias, output);
            };
            let tasks = 0..m.div_ceil(rows_a_block) * num_groups;
            if is_small { tasks.for_each(run) } else { tasks.into_par_iter().for_each(run) }
        };
        // SAFETY: the tasks cover all blocks of rows and all panels.
        unsafe { filled(m * self.n, fill) }
    }

    /// A block of rows times a range of panels.
    fn block(
        &self,
        rows: &QuantRows,
        block: Range<usize>,
        panels: Range<usize>,
        bias: Option<&[f32]>,
        output: &NewOutput<'_>,
    ) {
        let instructions = InstructionSet::of_this_cpu();
        let mut tile = Tile::default();
        for panel in panels {
            let columns = panel * WIDTH..((panel + 1) * WIDTH).min(self.n);
            let bias = bias.map(|bias| &bias[columns.clone()]);
            let mut first = block.start;
            while first < block.end {
                let num_rows = (block.end - first).min(Tile::MAX_ROWS);
                instructions.multiply(self, rows, panel, first..first + num_rows, &mut tile);
                for (row, sums) in tile.sums[..num_rows].iter().enumerate() {
                    // SAFETY: tasks have disjoint rows or panels, and within a task each tile is visited once.
                    let out = unsafe { output.slice((first + row) * self.n + columns.start, columns.len()) };
                    write_sums(out, sums, bias);
                }
                first += num_rows;
            }
        }
    }
}

fn bytes(lines: &[Line]) -> &[u8] {
    // SAFETY: a line is 64 bytes without padding, and bytes have no alignment.
    unsafe { std::slice::from_raw_parts(lines.as_ptr().cast(), size_of_val(lines)) }
}

fn bytes_mut(lines: &mut [Line]) -> &mut [u8] {
    // SAFETY: as above; any bytes are a line.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), size_of_val(lines)) }
}

/// Where weight `(column, input)` of a record lies: its byte, and whether in the high half of it.
fn place(column: usize, input: usize, bits: Bits) -> (usize, bool) {
    let (quad, lane) = (input / 4, input % 4);
    match bits {
        Bits::Eight => ((quad * WIDTH + column) * 4 + lane, false),
        Bits::Four => ((quad / 2 * WIDTH + column) * 4 + lane, quad % 2 == 1),
    }
}

/// Quantises one group of one output's weights.
#[inline(always)]
fn write_column(record: &mut [u8], column: usize, values: &[f32; GROUP], bits: Bits) {
    let (scale, least) = match bits {
        Bits::Eight => (values.iter().fold(0.0, |most: f32, x| most.max(x.abs())) / 127.0, 0.0),
        Bits::Four => range_of_four_bits(values),
    };
    // What is multiplied with is what is stored.
    let (scale, least) = (f16::from_f32(scale), f16::from_f32(least));
    let mut steps = [0.0; GROUP];
    let inverse = inverse(scale.to_f32());
    for (step, value) in steps.iter_mut().zip(values) {
        *step = rounded((value - least.to_f32()) * inverse);
    }
    for (input, step) in steps.iter().enumerate() {
        let (at, high) = place(column, input, bits);
        match bits {
            Bits::Eight => record[at] = (step.clamp(-127.0, 127.0) as i32 + 128) as u8,
            Bits::Four => record[at] |= (step.clamp(0.0, 15.0) as u8) << if high { 4 } else { 0 },
        }
    }
    let scales = bits.weight_bytes() + 2 * column;
    record[scales..scales + 2].copy_from_slice(&scale.to_le_bytes());
    if bits == Bits::Four {
        let at = scales + 2 * WIDTH;
        record[at..at + 2].copy_from_slice(&least.to_le_bytes());
    }
}

/// To an integer, to the even one of two; for less than 2^22. A function call in the standard library.
#[inline(always)]
fn rounded(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    x + ROUND - ROUND
}

#[inline(always)]
fn inverse(scale: f32) -> f32 {
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

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
                let off = rounded((x - least) * inverse).clamp(0.0, 15.0) * scale + least - x;
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

/// Activations `[m, k]` in 8 bits.
#[derive(Debug)]
pub struct QuantRows {
    /// `[m, groups, 64]`, zero beyond `k`.
    pub values: Vec<i8>,
    /// `[m, groups]`
    pub scales: Vec<f32>,
    /// `[m, groups]`: the sum of a group's values.
    pub sums: Vec<i32>,
}

impl QuantRows {
    /// Each group of each row by its largest value.
    pub fn new(x: &[f32], k: usize) -> Self {
        let (m, groups) = (x.len() / k, k.div_ceil(GROUP));
        let mut rows = QuantRows {
            values: vec![0; m * groups * GROUP],
            scales: vec![0.0; m * groups],
            sums: vec![0; m * groups],
        };
        let instructions = InstructionSet::of_this_cpu();
        let work = |(((x, values), scales), sums): (((&[f32], &mut [i8]), &mut [f32]), &mut [i32])| {
            let (whole, rest) = x.as_chunks::<GROUP>();
            let places = values.as_chunks_mut::<GROUP>().0.iter_mut().zip(scales.iter_mut().zip(sums));
            let mut last = [0.0; GROUP];
            last[..rest.len()].copy_from_slice(rest);
            for (x, (values, (scale, sum))) in whole.iter().chain([&last]).zip(places) {
                (*scale, *sum) = instructions.quantise(x, values);
            }
        };
        if x.len() < MIN_PARALLEL_WORK {
            let values = rows.values.chunks_mut(groups * GROUP);
            let rest = rows.scales.chunks_mut(groups).zip(rows.sums.chunks_mut(groups));
            let parts = x.chunks(k).zip(values).zip(rest);
            parts.map(|((x, values), (scales, sums))| (((x, values), scales), sums)).for_each(work);
        } else {
            x.par_chunks(k)
                .zip(rows.values.par_chunks_mut(groups * GROUP))
                .zip(rows.scales.par_chunks_mut(groups))
                .zip(rows.sums.par_chunks_mut(groups))
                .for_each(work);
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn values(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed | 1;
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    fn packed(weights: &[f32], n: usize, k: usize, bits: Bits) -> QuantMatrix {
        QuantMatrix::pack(n, k, bits, |index, row| row.copy_from_slice(&weights[index * k..][..k]))
    }

    /// Distance of `got` from `expected`, relative to the length of `expected`.
    fn distance(got: &[f32], expected: &[f32]) -> f32 {
        let off: f32 = got.iter().zip(expected).map(|(a, b)| (a - b) * (a - b)).sum();
        (off / expected.iter().map(|b| b * b).sum::<f32>()).sqrt()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn rows_come_back_within_half_a_step(n in 1..90usize, k in 1..200usize, four: bool, seed: u32) {
            let w = values(n * k, seed);
            let (bits, step) = if four { (Bits::Four, 1.0 / 15.0) } else { (Bits::Eight, 0.5 / 127.0) };
            let matrix = packed(&w, n, k, bits);
            let mut row = vec![0.0; k];
            for (index, expected) in w.chunks(k).enumerate() {
                matrix.copy_row(index, &mut row);
                // Four bits may give up on the extremes: up to 18 % of the range on either side.
                let most = if four { 0.2 } else { 0.51 * step };
                prop_assert!(row.iter().zip(expected).all(|(a, b)| (a - b).abs() <= most));
            }
        }

        #[test]
        fn products_are_those_of_the_rounded_rows(m in 1..20usize, n in 1..90usize, k in 1..200usize, four: bool, seed: u32) {
            let (w, x, bias) = (values(n * k, seed), values(m * k, !seed), values(n, seed ^ 5));
            let matrix = packed(&w, n, k, if four { Bits::Four } else { Bits::Eight });
            let mut rounded = vec![0.0; n * k];
            rounded.chunks_mut(k).enumerate().for_each(|(index, row)| matrix.copy_row(index, row));
            let rows = QuantRows::new(&x, k);
            let groups = k.div_ceil(GROUP);
            let got = matrix.multiply(&x, Some(&bias));
            for row in 0..m {
                let x = |i: usize| f64::from(rows.values[row * groups * GROUP + i]) * f64::from(rows.scales[row * groups + i / GROUP]);
                for column in 0..n {
                    let sum: f64 = (0..k).map(|i| x(i) * f64::from(rounded[column * k + i])).sum();
                    let expected = sum + f64::from(bias[column]);
                    prop_assert!((f64::from(got[row * n + column]) - expected).abs() < 2e-5, "{expected}");
                }
            }
        }

        #[test]
        fn a_row_gives_the_same_bits_in_any_batch(m in 1..70usize, n in 1..300usize, k in 1..200usize, four: bool, seed: u32) {
            let (w, x) = (values(n * k, seed), values(m * k, !seed));
            let matrix = packed(&w, n, k, if four { Bits::Four } else { Bits::Eight });
            let together = matrix.multiply(&x, None);
            for (row, expected) in x.chunks(k).zip(together.chunks(n)) {
                prop_assert_eq!(&matrix.multiply(row, None)[..], expected);
            }
        }
    }

    #[test]
    fn products_stay_close_to_the_exact_ones() {
        let (m, n, k) = (9, 64, 1024);
        let (w, x) = (values(n * k, 1), values(m * k, 2));
        let exact = super::super::gemm::PackedMatrix::pack(&w, n, k).multiply(&x, None);
        let off = |bits| distance(&packed(&w, n, k, bits).multiply(&x, None), &exact);
        assert!(off(Bits::Eight) < 0.01, "{}", off(Bits::Eight));
        assert!(off(Bits::Four) < 0.08, "{}", off(Bits::Four));
    }
}
