//! `y = x W^T + b` with weights packed once at load, in the dtype they are stored in.
//!
//! Weights are kept as panels of neighbouring output columns, `[panels][k][columns]`, so that one pass over a panel
//! gives a tile of outputs in registers. Each output is one chain of fused multiply-adds over `k` in ascending order:
//! the same bits for one row or a thousand.

use half::{bf16, f16, slice::HalfFloatSliceExt};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{FIRST_LEVEL, MIN_PARALLEL_WORK, NewOutput, filled, prefetch, prefetch_output, write_sums};

/// Vectors a panel is wide.
const PANEL_VECTORS: usize = 2;
/// Rows of a register tile: with two vectors each, twelve accumulators and room for the operands in 16 registers, or twice
/// as many in 32.
const fn tile_rows<S: Simd>() -> usize {
    if S::F32_LANES == 16 { 12 } else { 6 }
}
/// What is fetched of a panel before it is read: it comes from the second-level cache, and too late otherwise.
const PREFETCH_BYTES: usize = 1 << 10;
/// Rows that share one pass over a panel.
const BLOCK_ROWS: usize = 48;

/// Packed elements; arithmetic is always f32.
#[derive(Debug)]
pub enum Panels {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

/// A weight matrix `[n, k]`.
pub struct PackedMatrix {
    panels: Panels,
    /// Outputs.
    n: usize,
    /// Inputs.
    k: usize,
    /// Columns a panel.
    width: usize,
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix[{}, {}]", self.n, self.k)
    }
}

/// An element type weights may be kept in.
pub trait StoredFloat: Copy + Default + Send + Sync {
    /// Rounded, if it must be.
    fn of(value: f32) -> Self;

    /// False also for what is too large for the type.
    fn is_finite(self) -> bool;

    /// As the panels of a matrix.
    fn wrap(packed: Vec<Self>) -> Panels;
}

macro_rules! stored_float {
    ($float:ty, $variant:ident, $of:expr) => {
        impl StoredFloat for $float {
            fn of(value: f32) -> Self {
                $of(value)
            }

            fn is_finite(self) -> bool {
                <$float>::is_finite(self)
            }

            fn wrap(packed: Vec<Self>) -> Panels {
                Panels::$variant(packed)
            }
        }
    };
}

stored_float!(f32, F32, std::convert::identity);
stored_float!(bf16, Bf16, bf16::from_f32);
stored_float!(f16, F16, f16::from_f32);

impl PackedMatrix {
    /// Packs a matrix `[n, k]`; `read` copies a row of it. The error is the row of a value that is not finite.
    pub fn pack<T: StoredFloat>(
        n: usize,
        k: usize,
        read: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<Self, usize> {
        let width = Arch::new().dispatch(PanelWidth);
        let mut packed = vec![T::default(); n.div_ceil(width) * k * width];
        packed.par_chunks_mut((k * width).max(1)).enumerate().try_for_each(|(index, panel)| {
            let mut row = vec![0.0; k];
            for column in 0..width.min(n - index * width) {
                read(index * width + column, &mut row);
                let kept = row.iter().map(|&value| T::of(value));
                let places = panel[column..].iter_mut().step_by(width);
                let all_finite = places.zip(kept).fold(true, |all, (place, value)| {
                    *place = value;
                    all & value.is_finite()
                });
                if !all_finite {
                    return Err(index * width + column);
                }
            }
            Ok(())
        })?;
        Ok(PackedMatrix { panels: T::wrap(packed), n, k, width })
    }

    /// Outputs.
    pub fn num_outputs(&self) -> usize {
        self.n
    }

    /// Memory it takes, bytes.
    pub fn num_bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(w) => size_of_val(&w[..]),
            Panels::Bf16(w) => size_of_val(&w[..]),
            Panels::F16(w) => size_of_val(&w[..]),
        }
    }

    /// `x` `[m, k]` times the transposed matrix, plus `bias` `[n]`: `[m, n]`.
    pub fn multiply(&self, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
        let m = x.len() / self.k;
        assert_eq!(x.len(), m * self.k, "an input of another width: this is a bug");
        let num_panels = self.n.div_ceil(self.width);
        let is_small = m * self.n * self.k < MIN_PARALLEL_WORK;
        // Several tasks a thread, so that a slow one does not hold up the rest.
        let num_groups = if is_small { 1 } else { (rayon::current_num_threads() * 4).min(num_panels) };
        let fill = |output: &NewOutput<'_>| {
            let run = |task: usize| {
                let (block, group) = (task / num_groups, task % num_groups);
                let panels = group * num_panels / num_groups..(group + 1) * num_panels / num_groups;
                let rows = block * BLOCK_ROWS..((block + 1) * BLOCK_ROWS).min(m);
                Arch::new().dispatch(BlockProduct { matrix: self, x, bias, rows, panels, output });
            };
            let tasks = 0..m.div_ceil(BLOCK_ROWS) * num_groups;
            if is_small { tasks.for_each(run) } else { tasks.into_par_iter().for_each(run) }
        };
        // SAFETY: the tasks cover all blocks of rows and all panels.
        unsafe { filled(m * self.n, fill) }
    }

    /// One panel as f32, `[k, width]`; `scratch` is used when it is stored otherwise.
    #[inline(always)]
    fn panel<'a>(&'a self, index: usize, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        let range = index * self.k * self.width..(index + 1) * self.k * self.width;
        match &self.panels {
            Panels::F32(w) => &w[range],
            Panels::Bf16(w) => {
                scratch.resize(range.len(), 0.0);
                for (wide, narrow) in scratch.iter_mut().zip(&w[range]) {
                    *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
                }
                scratch
            }
            Panels::F16(w) => {
                scratch.resize(range.len(), 0.0);
                w[range].convert_to_f32_slice(scratch);
                scratch
            }
        }
    }
}

struct PanelWidth;

impl WithSimd for PanelWidth {
    type Output = usize;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> usize {
        PANEL_VECTORS * S::F32_LANES
    }
}

/// A block of rows times a group of panels.
struct BlockProduct<'a> {
    matrix: &'a PackedMatrix,
    x: &'a [f32],
    bias: Option<&'a [f32]>,
    rows: std::ops::Range<usize>,
    panels: std::ops::Range<usize>,
    output: &'a NewOutput<'a>,
}

impl WithSimd for BlockProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let mut scratch = Vec::new();
        for index in self.panels.clone() {
            let panel = self.matrix.panel(index, &mut scratch);
            let (vectors, _) = S::as_simd_f32s(panel);
            let mut row = self.rows.start;
            while row < self.rows.end {
                macro_rules! by_rows {
                    ($($rows:literal),*) => {
                        match (self.rows.end - row).min(tile_rows::<S>()) {
                            $($rows => self.tile::<S, $rows>(simd, vectors, row, index),)*
                            _ => unreachable!("a tile of another size: this is a bug"),
                        }
                    };
                }
                by_rows!(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12);
                row += tile_rows::<S>();
            }
        }
    }
}

impl BlockProduct<'_> {
    /// `ROWS` rows from `first_row` times one panel.
    #[inline(always)]
    fn tile<S: Simd, const ROWS: usize>(&self, simd: S, panel: &[S::f32s], first_row: usize, index: usize) {
        let (k, n, width) = (self.matrix.k, self.matrix.n, self.matrix.width);
        let rows: [&[f32]; ROWS] = std::array::from_fn(|row| &self.x[(first_row + row) * k..][..k]);
        let num_columns = width.min(n - index * width);
        // SAFETY: tasks have disjoint rows or columns, within a task each tile is visited once, and no two of a row's
        // slices live at once.
        let out = |row| unsafe { self.output.slice((first_row + row) * n + index * width, num_columns) };
        (0..ROWS).for_each(|row| prefetch_output(out(row)));
        let mut sums = [[simd.splat_f32s(0.0); PANEL_VECTORS]; ROWS];
        for (i, weights) in panel.chunks_exact(PANEL_VECTORS).enumerate().take(k) {
            prefetch::<FIRST_LEVEL>(
                weights.as_ptr().cast::<u8>().wrapping_add(PREFETCH_BYTES),
                size_of_val(weights),
            );
            for row in 0..ROWS {
                let value = simd.splat_f32s(rows[row][i]);
                for v in 0..PANEL_VECTORS {
                    sums[row][v] = simd.mul_add_e_f32s(value, weights[v], sums[row][v]);
                }
            }
        }
        let bias = self.bias.map(|bias| &bias[index * width..][..num_columns]);
        for (row, sums) in sums.iter().enumerate() {
            write_sums(out(row), bytemuck_cast(sums), bias);
        }
    }
}

/// Vectors as the floats they hold.
#[inline(always)]
fn bytemuck_cast<V: pulp::bytemuck::NoUninit>(vectors: &[V]) -> &[f32] {
    pulp::bytemuck::cast_slice(vectors)
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

    fn packed<T: StoredFloat>(w: &[f32], n: usize, k: usize) -> PackedMatrix {
        PackedMatrix::pack::<T>(n, k, |row, out| out.copy_from_slice(&w[row * k..][..k])).unwrap()
    }

    fn plain(x: &[f32], w: &[f32], bias: &[f32], k: usize) -> Vec<f64> {
        let dot = |row: &[f32], column: &[f32]| {
            row.iter().zip(column).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
        };
        x.chunks(k)
            .flat_map(|row| {
                w.chunks(k).zip(bias).map(move |(column, bias)| dot(row, column) + f64::from(*bias))
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn products_equal_the_plain_sum(m in 1..70usize, n in 1..90usize, k in 1..70usize, seed: u32) {
            let (x, w, bias) = (values(m * k, seed), values(n * k, seed ^ 1), values(n, seed ^ 2));
            let product = packed::<f32>(&w, n, k).multiply(&x, Some(&bias));
            for (got, expected) in product.iter().zip(plain(&x, &w, &bias, k)) {
                prop_assert!((f64::from(*got) - expected).abs() < 1e-5, "{got} {expected}");
            }
        }

        #[test]
        fn a_row_gives_the_same_bits_in_any_batch(m in 1..70usize, n in 1..300usize, k in 1..70usize, seed: u32) {
            let (x, w) = (values(m * k, seed), values(n * k, seed ^ 1));
            let matrix = packed::<bf16>(&w, n, k);
            let together = matrix.multiply(&x, None);
            for (row, expected) in x.chunks(k).zip(together.chunks(n)) {
                prop_assert_eq!(&matrix.multiply(row, None)[..], expected);
            }
        }
    }

    #[test]
    fn what_is_not_finite_once_it_is_kept_is_found() {
        let pack = |value: f32| {
            let read = |row: usize, out: &mut [f32]| out.fill(if row == 70 { value } else { 1.0 });
            let (wide, narrow) =
                (PackedMatrix::pack::<bf16>(80, 3, read), PackedMatrix::pack::<f16>(80, 3, read));
            (wide.err(), narrow.err())
        };
        assert_eq!(pack(1e4), (None, None));
        assert_eq!(pack(1e6), (None, Some(70)));
        assert_eq!(pack(f32::NAN), (Some(70), Some(70)));
    }
}
