//! Products of quantised weights (`kernels/panels.rs`) and activations that are rounded to 8 bits at each product.
//!
//! Both are cut along the inputs into groups of [`GROUP`] with a scale each. A product is a sum over groups, in
//! ascending order, of an exact integer sum times both scales: the same bits for one row or a thousand, and for every
//! instruction set of `kernels/dot.rs`.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    MIN_PARALLEL_WORK, NewOutput,
    dot::{InstructionSet, Multiplier, Tile},
    filled,
    panels::{Bits, GROUP, QuantPanels, WIDTH},
    prefetch_output, write_sums,
};

/// A quantised weight matrix `[n, k]`: stored matrices of the same inputs, below each other.
#[derive(Debug)]
pub struct QuantMatrix {
    pub(super) bits: Bits,
    parts: Vec<QuantPanels>,
    /// Outputs.
    n: usize,
    /// Inputs.
    k: usize,
}

impl QuantMatrix {
    /// Puts matrices below each other. Each keeps panels of its own, so that what is stored can be taken as it is.
    ///
    /// # Panics
    /// When there is none, or they differ in inputs or bits.
    pub fn stack(parts: Vec<QuantPanels>) -> Self {
        let (bits, k) = (parts[0].bits, parts[0].num_inputs());
        let fit = parts.iter().all(|part| part.bits == bits && part.num_inputs() == k);
        assert!(fit, "matrices that do not belong together: this is a bug");
        QuantMatrix { bits, n: parts.iter().map(QuantPanels::num_outputs).sum(), k, parts }
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
        self.parts.iter().map(|part| part.bytes().len()).sum()
    }

    fn num_panels(&self) -> usize {
        self.parts.iter().map(QuantPanels::num_panels).sum()
    }

    /// All records of a panel, `[groups, record]`, and the outputs it stands for.
    pub(super) fn panel(&self, mut index: usize) -> (&[u8], Range<usize>) {
        let mut start = 0;
        for part in &self.parts {
            let end = start + part.num_outputs();
            if index < part.num_panels() {
                let first = start + index * WIDTH;
                return (part.panel(index), first..(first + WIDTH).min(end));
            }
            index -= part.num_panels();
            start = end;
        }
        panic!("a panel beyond the matrix: this is a bug")
    }

    /// `x` `[m, k]` times the transposed matrix, plus `bias` `[n]`: `[m, n]`.
    pub fn multiply(&self, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
        let m = x.len() / self.k;
        assert_eq!(x.len(), m * self.k, "an input of another width: this is a bug");
        let instructions = InstructionSet::for_rows(m);
        let rows = QuantRows::new(x, self.k, instructions);
        let is_small = m * self.n * self.k < MIN_PARALLEL_WORK * 4;
        let num_panels = self.num_panels();
        // Several tasks a thread, so that a slow one does not hold up the rest.
        let num_groups = if is_small { 1 } else { (rayon::current_num_threads() * 4).min(num_panels) };
        let tile_rows = instructions.tile_rows();
        let rows_a_block = (instructions.block_bytes() / self.k).clamp(2 * tile_rows, 16 * tile_rows)
            / tile_rows
            * tile_rows;
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
        // SAFETY: the only one until this block is done, which waits for nothing.
        let multiplier = unsafe { Multiplier::new(rows.instructions, block.len()) };
        let tile_rows = rows.instructions.tile_rows();
        let mut tile = Tile::default();
        for panel in panels {
            let (_, columns) = self.panel(panel);
            let bias = bias.map(|bias| &bias[columns.clone()]);
            for first in block.clone().step_by(tile_rows) {
                let range = first..(first + tile_rows).min(block.end);
                // SAFETY: tasks have disjoint rows or panels, within a task each tile is visited once, and no two of a
                // row's slices live at once.
                let out = |row| unsafe { output.slice(row * self.n + columns.start, columns.len()) };
                range.clone().for_each(|row| prefetch_output(out(row)));
                multiplier.multiply(self, rows, panel, range.clone(), &mut tile);
                range.zip(&tile.sums).for_each(|(row, sums)| write_sums(out(row), sums, bias));
            }
        }
    }
}

/// Activations `[m, k]` in 8 bits. As many rows as an instruction reads lie together, group by group; `m` is rounded up to
/// them.
#[derive(Debug)]
pub(super) struct QuantRows {
    /// What reads them.
    pub instructions: InstructionSet,
    /// `[m / together, groups, together, 64]`, zero beyond `k`.
    pub values: Vec<i8>,
    /// `[m / together, groups, together]`
    pub scales: Vec<f32>,
    /// The same: the sum of a group's values.
    pub sums: Vec<i32>,
}

/// Rows of activations that lie together, and where their values, scales and sums go.
type RowParts<'a> = (&'a [f32], (&'a mut [i8], (&'a mut [f32], &'a mut [i32])));

impl QuantRows {
    /// Each group of each row by its largest value, as `instructions` read it.
    pub fn new(x: &[f32], k: usize, instructions: InstructionSet) -> Self {
        let (together, groups) = (instructions.rows_together(), k.div_ceil(GROUP));
        let len = (x.len() / k).next_multiple_of(together) * groups;
        let mut rows = QuantRows {
            instructions,
            values: vec![0; len * GROUP],
            scales: vec![0.0; len],
            sums: vec![0; len],
        };
        let work = |(x, (values, (scales, sums))): RowParts<'_>| {
            let values = values.as_chunks_mut::<GROUP>().0;
            for (row, x) in x.chunks(k).enumerate() {
                let (whole, rest) = x.as_chunks::<GROUP>();
                let mut last = [0.0; GROUP];
                last[..rest.len()].copy_from_slice(rest);
                let last = (!rest.is_empty()).then_some(&last);
                for (group, x) in whole.iter().chain(last).enumerate() {
                    let at = group * together + row;
                    (scales[at], sums[at]) = instructions.quantise(x, &mut values[at]);
                }
            }
        };
        let part = groups * together;
        if x.len() < MIN_PARALLEL_WORK {
            let rest = rows.scales.chunks_mut(part).zip(rows.sums.chunks_mut(part));
            x.chunks(together * k).zip(rows.values.chunks_mut(part * GROUP).zip(rest)).for_each(work);
        } else {
            let rest = rows.scales.par_chunks_mut(part).zip(rows.sums.par_chunks_mut(part));
            x.par_chunks(together * k).zip(rows.values.par_chunks_mut(part * GROUP).zip(rest)).for_each(work);
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::gemm::PackedMatrix, *};

    fn values(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed | 1;
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    fn packed(weights: &[f32], n: usize, k: usize, bits: Bits) -> QuantMatrix {
        // In two parts where that is possible, so that both are met.
        let cut = n / 3;
        let rows = [0..cut, cut..n].into_iter().filter(|rows| !rows.is_empty());
        let part = |rows: Range<usize>| {
            let read = |row: usize, start: usize, part: &mut [f32]| {
                part.copy_from_slice(&weights[(rows.start + row) * k + start..][..part.len()]);
            };
            QuantPanels::pack(rows.len(), k, bits, read).unwrap()
        };
        QuantMatrix::stack(rows.map(part).collect())
    }

    /// Distance of `got` from `expected`, relative to the length of `expected`.
    fn distance(got: &[f32], expected: &[f32]) -> f32 {
        let off: f32 = got.iter().zip(expected).map(|(a, b)| (a - b) * (a - b)).sum();
        (off / expected.iter().map(|b| b * b).sum::<f32>()).sqrt()
    }

    proptest! {
            #![proptest_config(ProptestConfig::with_cases(40))]

            #[test]
            fn products_are_those_of_the_rounded_rows(m in 1..20usize, n in 1..90usize, k in 1..200usize, four: bool, seed: u32) {
                let (w, x, bias) = (values(n * k, seed), values(m * k, !seed), values(n, seed ^ 5));
                let matrix = packed(&w, n, k, if four { Bits::Four } else { Bits::Eight });
                let mut rounded = vec![0.0; n * k];
    let parts = matrix.parts.iter();
                let stored = parts.flat_map(|part| (0..part.num_outputs()).map(move |row| (part, row)));
                rounded.chunks_mut(k).zip(stored).for_each(|(out, (part, row))| part.copy_row(row, out));
                let rows = QuantRows::new(&x, k, InstructionSet::for_rows(1));
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
        let exact = PackedMatrix::pack::<f32>(n, k, |row, out| out.copy_from_slice(&w[row * k..][..k]))
            .unwrap()
            .multiply(&x, None);
        let off = |bits| distance(&packed(&w, n, k, bits).multiply(&x, None), &exact);
        assert!(off(Bits::Eight) < 0.01, "{}", off(Bits::Eight));
        assert!(off(Bits::Four) < 0.08, "{}", off(Bits::Four));
    }
}
