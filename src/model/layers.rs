//! The building blocks of the networks, each with its `load` from a checkpoint.
//!
//! Called by the networks of [`crate::model`]. On a CPU they run the kernels of `kernels/` on f32 activations,
//! with weights in the dtype they are stored in.

use candle_core::{CpuStorage, Device, Storage};
use half::{bf16, f16};

use super::{
    ModelError, Result, Tap, Tensor,
    kernels::{activation, gemm::PackedMatrix, matrix::Matrix, quant::QuantMatrix},
    weights::{StoredDType, StoredTensor, Weights},
};

pub use super::kernels::quant::Bits;

/// What the matrices of a network are kept as. Vectors (norms, biases) are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightFormat {
    /// Floats, as the checkpoint has them.
    #[default]
    AsStored,
    /// Floats of this type.
    Float(StoredDType),
    /// Quantised when they are read.
    Quant(Bits),
}

impl WeightFormat {
    /// For what suffers from 4 bits: the tower, the connector and the head.
    pub fn at_least_8_bits(self) -> Self {
        match self {
            WeightFormat::Quant(Bits::Four) => WeightFormat::Quant(Bits::Eight),
            other => other,
        }
    }
}

/// A place in a checkpoint: `loader.pp("layers").pp(3)` stands for the tensors below `layers.3.`.
#[derive(Debug, Clone)]
pub struct Loader<'a> {
    weights: &'a Weights,
    path: String,
    format: WeightFormat,
}

impl<'a> Loader<'a> {
    /// The root of a checkpoint.
    pub fn new(weights: &'a Weights, format: WeightFormat) -> Self {
        Loader { weights, path: String::new(), format }
    }

    /// One level down.
    pub fn pp(&self, name: impl std::fmt::Display) -> Self {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) };
        Loader { path, ..self.clone() }
    }

    /// The same place, its matrices kept in at least 8 bits.
    pub fn at_least_8_bits(&self) -> Self {
        Loader { format: self.format.at_least_8_bits(), ..self.clone() }
    }

    fn stored(&self, name: &str) -> Result<StoredTensor<'a>> {
        self.weights.get(&self.pp(name).path).map_err(ModelError::wrap)
    }

    /// A small tensor as f32, row-major.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.stored(name)?.to_f32())
    }

    /// The matrices `weight` of `places` as one, below each other. All have the same number of inputs; trailing dimensions
    /// (a convolution's) count as one.
    fn matrix(places: &[Loader<'a>]) -> Result<Matrix> {
        let parts: Vec<StoredTensor<'a>> =
            places.iter().map(|place| place.stored("weight")).collect::<Result<_>>()?;
        let k = parts[0].shape[1..].iter().product();
        let n = parts.iter().map(|part| part.shape[0]).sum();
        let dtype = match places[0].format {
            WeightFormat::Quant(bits) => {
                return Ok(Matrix::Quant(QuantMatrix::pack(n, k, bits, |row, out| {
                    copy_row(&parts, row, out)
                })));
            }
            WeightFormat::Float(dtype) => dtype,
            WeightFormat::AsStored => parts[0].dtype,
        };
        Ok(Matrix::Float(match dtype {
            StoredDType::F32 => PackedMatrix::pack::<f32>(&stacked(&parts, |part| part.to_f32()), n, k),
            StoredDType::Bf16 => PackedMatrix::pack::<bf16>(&stacked(&parts, |part| part.to_bf16()), n, k),
            StoredDType::F16 => PackedMatrix::pack::<f16>(&stacked(&parts, |part| part.to_f16()), n, k),
        }))
    }
}

fn stacked<T: Clone>(parts: &[StoredTensor<'_>], convert: impl Fn(&StoredTensor<'_>) -> Vec<T>) -> Vec<T> {
    match parts {
        [one] => convert(one),
        several => several.iter().map(convert).collect::<Vec<_>>().concat(),
    }
}

/// Row `row` of matrices that stand below each other.
fn copy_row(parts: &[StoredTensor<'_>], mut row: usize, out: &mut [f32]) {
    for part in parts {
        match row.checked_sub(part.shape[0]) {
            None => return part.copy_f32(row * out.len(), out),
            Some(below) => row = below,
        }
    }
}

/// The elements of a contiguous f32 tensor in host memory.
pub fn with_slice<T>(x: &Tensor, read: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => {
            Ok(read(&values[layout.start_offset()..][..layout.shape().elem_count()]))
        }
        _ => Err(ModelError::Msg("expected an f32 tensor in host memory: this is a bug".into())),
    }
}

/// Shows rows of `width` to `tap`.
pub fn show(
    tap: &mut dyn Tap,
    name: &'static str,
    index: Option<usize>,
    x: &[f32],
    width: usize,
) -> Result<()> {
    if tap.is_watching() {
        tap.tensor(name, index, &rows(x.to_vec(), width)?);
    }
    Ok(())
}

/// `[rows, width]` from its elements.
pub fn rows(values: Vec<f32>, width: usize) -> Result<Tensor> {
    let num_rows = values.len() / width;
    Tensor::from_vec(values, (num_rows, width), &Device::Cpu)
}

/// `y = x W^T + b`.
#[derive(Debug)]
pub struct Linear {
    weight: Matrix,
    bias: Option<Vec<f32>>,
}

impl Linear {
    /// `weight` and, where the layer has one, `bias`.
    pub fn load(loader: &Loader<'_>, has_bias: bool) -> Result<Self> {
        Linear::load_stacked(std::slice::from_ref(loader), has_bias)
    }

    /// Several layers of the same input as one; their outputs stand beside each other.
    pub fn load_stacked(loaders: &[Loader<'_>], has_bias: bool) -> Result<Self> {
        let biases = || loaders.iter().map(|loader| loader.vector("bias")).collect::<Result<Vec<_>>>();
        let bias = has_bias.then(biases).transpose()?.map(|biases| biases.concat());
        Ok(Linear { weight: Loader::matrix(loaders)?, bias })
    }

    /// `[rows, in]` to `[rows, out]`.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        self.weight.multiply(x, self.bias.as_deref())
    }

    /// Adds the layer's output for `x` to `residual`, `[rows, out]`.
    pub fn forward_add(&self, x: &[f32], residual: &mut [f32]) {
        activation::add(residual, &self.forward(x));
    }

    /// The weight `[out, in]`.
    pub fn weight(&self) -> &Matrix {
        &self.weight
    }
}

/// LayerNorm with weight and bias.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    eps: f32,
}

impl LayerNorm {
    /// `weight` and `bias`.
    pub fn load(loader: &Loader<'_>, eps: f64) -> Result<Self> {
        Ok(LayerNorm { weight: loader.vector("weight")?, bias: loader.vector("bias")?, eps: eps as f32 })
    }

    /// Over the last dimension of `[rows, width]`.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        activation::layer_norm(x, &self.weight, &self.bias, self.eps)
    }
}

/// RMSNorm with weight.
#[derive(Debug)]
pub struct RmsNorm {
    weight: Vec<f32>,
    eps: f32,
}

impl RmsNorm {
    /// `weight`.
    pub fn load(loader: &Loader<'_>, eps: f64) -> Result<Self> {
        Ok(RmsNorm { weight: loader.vector("weight")?, eps: eps as f32 })
    }

    /// Over the last dimension of `[rows, width]`.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        activation::rms_norm(x, &self.weight, self.eps)
    }
}
