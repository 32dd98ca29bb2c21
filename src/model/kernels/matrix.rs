//! A weight matrix in whichever form it is kept.
//!
//! Called by the layers only; the arithmetic is in `kernels/gemm.rs` and `kernels/quant.rs`.

use super::{gemm::PackedMatrix, quant::QuantMatrix};

/// `[outputs, inputs]`
#[derive(Debug)]
pub enum Matrix {
    /// As floats; products are exact to f32's rounding.
    Float(PackedMatrix),
    /// In 8 or 4 bits.
    Quant(QuantMatrix),
}

impl Matrix {
    /// Rows of the matrix.
    pub fn num_outputs(&self) -> usize {
        match self {
            Matrix::Float(matrix) => matrix.num_outputs(),
            Matrix::Quant(matrix) => matrix.num_outputs(),
        }
    }

    /// Whether products are rounded to 8 bits on their way.
    pub fn is_quantised(&self) -> bool {
        matches!(self, Matrix::Quant(_))
    }

    /// Memory it takes, bytes.
    pub fn num_bytes(&self) -> usize {
        match self {
            Matrix::Float(matrix) => matrix.num_bytes(),
            Matrix::Quant(matrix) => matrix.num_bytes(),
        }
    }

    /// `x` `[rows, inputs]` times the transposed matrix, plus `bias` `[outputs]`: `[rows, outputs]`.
    pub fn multiply(&self, x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
        match self {
            Matrix::Float(matrix) => matrix.multiply(x, bias),
            Matrix::Quant(matrix) => matrix.multiply(x, bias),
        }
    }
}
