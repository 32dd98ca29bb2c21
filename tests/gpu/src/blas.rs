//! cuBLAS: products of matrices, whose columns lie together, in f32, f16 and bf16, summed in f32.
#![allow(non_snake_case, clippy::missing_safety_doc, clippy::too_many_arguments)]

use std::{
    ffi::{c_int, c_uint, c_void},
    sync::Arc,
};

use half::{bf16, f16};
use rayon::prelude::*;

use super::{
    block::{read, write},
    device::device,
    graph::{Node, State},
};

pub const SUCCESS: c_int = 0;
pub const NOT_SUPPORTED: c_int = 15;

/// A handle is where the number of its stream stands.
type Handle = *mut usize;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasCreate_v2(handle: *mut Handle) -> c_int {
    // SAFETY: the caller has a place for it.
    unsafe { handle.write(Box::into_raw(Box::new(0))) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasDestroy_v2(handle: Handle) -> c_int {
    // SAFETY: it is from `cublasCreate_v2`.
    drop(unsafe { Box::from_raw(handle) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasSetStream_v2(handle: Handle, stream: usize) -> c_int {
    // SAFETY: as above.
    unsafe { handle.write(stream) };
    SUCCESS
}

#[derive(Debug, Clone, Copy)]
pub enum Kind {
    F32,
    F16,
    Bf16,
}

impl Kind {
    /// `cudaDataType`
    pub fn of(number: c_uint) -> Option<Kind> {
        match number {
            0 => Some(Kind::F32),
            2 => Some(Kind::F16),
            14 => Some(Kind::Bf16),
            _ => None,
        }
    }

    pub fn bytes(self) -> usize {
        if let Kind::F32 = self { 4 } else { 2 }
    }

    pub fn wide(self, bits: u64) -> f32 {
        match self {
            Kind::F32 => f32::from_bits(bits as u32),
            Kind::F16 => f16::from_bits(bits as u16).to_f32(),
            Kind::Bf16 => bf16::from_bits(bits as u16).to_f32(),
        }
    }

    pub fn narrow(self, x: f32) -> u64 {
        match self {
            Kind::F32 => u64::from(x.to_bits()),
            Kind::F16 => u64::from(f16::from_f32(x).to_bits()),
            Kind::Bf16 => u64::from(bf16::from_f32(x).to_bits()),
        }
    }
}

/// A matrix in memory: `at`, elements from a column to the next, and from a matrix of the batch to the next.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    pub at: u64,
    pub kind: Kind,
    pub stride: usize,
    pub of_batch: i64,
}

impl Matrix {
    /// The one of this number in the batch, if `columns` of `rows` elements are there.
    pub fn of(self, number: usize, rows: usize, columns: usize, state: &State) -> Result<Matrix, String> {
        let at = self.at.wrapping_add_signed(self.of_batch * number as i64 * self.kind.bytes() as i64);
        let len = if rows * columns == 0 { 0 } else { (columns - 1) * self.stride + rows };
        state
            .memory
            .check(at, len * self.kind.bytes())
            .map_err(|why| format!("a product's matrix: {why}"))?;
        Ok(Matrix { at, ..self })
    }

    /// Writes `element` of every row and column there; [`Matrix::of`] must have been asked.
    pub fn fill(self, [rows, columns]: [usize; 2], element: impl Fn(usize, usize) -> f32 + Sync) {
        (0..columns).into_par_iter().for_each(|column| {
            for row in 0..rows {
                let bits = self.kind.narrow(element(row, column));
                // SAFETY: `of` made sure of it; each element is written once.
                unsafe { write(self.place(row, column), self.kind.bytes(), bits) };
            }
        });
    }

    pub fn place(self, row: usize, column: usize) -> *mut u8 {
        (self.at as usize + (column * self.stride + row) * self.kind.bytes()) as *mut u8
    }

    /// Its rows, one after the other, or its columns.
    pub fn load(self, rows: usize, columns: usize, by_columns: bool) -> Vec<f32> {
        let mut all = vec![0.0; rows * columns];
        let len = if by_columns { rows } else { columns };
        all.par_chunks_mut(len.max(1)).enumerate().for_each(|(i, line)| {
            for (j, x) in line.iter_mut().enumerate() {
                let place = if by_columns { self.place(j, i) } else { self.place(i, j) };
                // SAFETY: `of` made sure of them all.
                *x = self.kind.wide(unsafe { read(place, self.kind.bytes()) });
            }
        });
        all
    }
}

pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    let ((xs, x_rest), (ys, y_rest)) = (x.as_chunks::<16>(), y.as_chunks::<16>());
    let mut sums = [0.0; 16];
    for (x, y) in xs.iter().zip(ys) {
        for (sum, (x, y)) in sums.iter_mut().zip(x.iter().zip(y)) {
            *sum += x * y;
        }
    }
    sums.iter().sum::<f32>() + x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum::<f32>()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cublasGemmStridedBatchedEx(
    handle: Handle,
    transposes_a: c_uint,
    transposes_b: c_uint,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: *const c_void,
    a: u64,
    a_kind: c_uint,
    lda: c_int,
    stride_a: i64,
    b: u64,
    b_kind: c_uint,
    ldb: c_int,
    stride_b: i64,
    beta: *const c_void,
    c: u64,
    c_kind: c_uint,
    ldc: c_int,
    stride_c: i64,
    batch: c_int,
    _sums: c_uint,
    _algorithm: c_int,
) -> c_int {
    // SAFETY: where sums are f32, so are both; the handle is one of ours.
    let (alpha, beta, stream) =
        unsafe { (alpha.cast::<f32>().read(), beta.cast::<f32>().read(), handle.read()) };
    let kinds = [a_kind, b_kind, c_kind].map(Kind::of);
    let ([Some(a_kind), Some(b_kind), Some(c_kind)], true) = (kinds, beta == 0.0) else {
        eprintln!("gpu: a product of types or with a sum that is not known here");
        return NOT_SUPPORTED;
    };
    let [m, n, k, lda, ldb, ldc] = [m, n, k, lda, ldb, ldc].map(|size| size as usize);
    let a = Matrix { at: a, kind: a_kind, stride: lda, of_batch: stride_a };
    let b = Matrix { at: b, kind: b_kind, stride: ldb, of_batch: stride_b };
    let c = Matrix { at: c, kind: c_kind, stride: ldc, of_batch: stride_c };
    let work = move |state: &mut State| {
        state.unfinished.begin(false);
        for number in 0..batch as usize {
            let ((a_rows, a_columns), (b_rows, b_columns)) = (
                if transposes_a == 0 { (m, k) } else { (k, m) },
                if transposes_b == 0 { (k, n) } else { (n, k) },
            );
            let left = a.of(number, a_rows, a_columns, state)?.load(a_rows, a_columns, transposes_a != 0);
            let right = b.of(number, b_rows, b_columns, state)?.load(b_rows, b_columns, transposes_b == 0);
            let out = c.of(number, m, n, state)?;
            out.fill([m, n], |row, column| alpha * dot(&left[row * k..][..k], &right[column * k..][..k]));
        }
        Ok(())
    };
    device().enqueue(stream, Node::Kernel(Arc::new(work)))
}
