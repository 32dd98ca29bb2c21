//! The building blocks of the networks, each with its `load` from a checkpoint.
//!
//! Called by the networks of [`crate::model`]. On a CPU they run the kernels of `kernels/` on f32 activations,
//! with weights in the dtype they are stored in.

use candle_core::{CpuStorage, Device, Storage};
use half::{bf16, f16};

use super::{
    ModelError, Result, Tensor,
    kernels::{activation, gemm::PackedMatrix},
    weights::{StoredDType, StoredTensor, Weights},
};

/// A place in a checkpoint: `loader.pp("layers").pp(3)` stands for the tensors below `layers.3.`.
#[derive(Debug, Clone)]
pub struct Loader<'a> {
    weights: &'a Weights,
    path: String,
    /// What weights are kept as; as stored when `None`.
    dtype: Option<StoredDType>,
}

impl<'a> Loader<'a> {
    /// The root of a checkpoint.
    pub fn new(weights: &'a Weights, dtype: Option<StoredDType>) -> Self {
        Loader { weights, path: String::new(), dtype }
    }

    /// One level down.
    pub fn pp(&self, name: impl std::fmt::Display) -> Self {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) };
        Loader { path, ..self.clone() }
    }

    fn stored(&self, name: &str) -> Result<StoredTensor<'a>> {
        self.weights.get(&self.pp(name).path).map_err(ModelError::wrap)
    }

    /// A small tensor as f32, row-major.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.stored(name)?.to_f32())
    }

    /// A matrix `[n, k]`; trailing dimensions (a convolution's) count as one.
    pub fn matrix(&self, name: &str) -> Result<PackedMatrix> {
        let tensor = self.stored(name)?;
        let (n, k) = (tensor.shape[0], tensor.shape[1..].iter().product());
        Ok(match self.dtype.unwrap_or(tensor.dtype) {
            StoredDType::F32 => PackedMatrix::pack::<f32>(&tensor.to_f32(), n, k),
            StoredDType::Bf16 => PackedMatrix::pack::<bf16>(&tensor.to_bf16(), n, k),
            StoredDType::F16 => PackedMatrix::pack::<f16>(&tensor.to_f16(), n, k),
        })
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

/// `[rows, width]` from its elements.
pub fn rows(values: Vec<f32>, width: usize) -> Result<Tensor> {
    let num_rows = values.len() / width;
    Tensor::from_vec(values, (num_rows, width), &Device::Cpu)
}

/// `y = x W^T + b`.
#[derive(Debug)]
pub struct Linear {
    weight: PackedMatrix,
    bias: Option<Vec<f32>>,
}

impl Linear {
    /// `weight` and, where the layer has one, `bias`.
    pub fn load(loader: &Loader<'_>, has_bias: bool) -> Result<Self> {
        let bias = has_bias.then(|| loader.vector("bias")).transpose()?;
        Ok(Linear { weight: loader.matrix("weight")?, bias })
    }

    /// `[rows, in]` to `[rows, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let product = with_slice(x, |x| self.forward_slice(x))?;
        rows(product, self.weight.num_outputs())
    }

    /// The same on slices.
    pub fn forward_slice(&self, x: &[f32]) -> Vec<f32> {
        self.weight.multiply(x, self.bias.as_deref())
    }

    /// The weight `[out, in]`.
    pub fn weight(&self) -> &PackedMatrix {
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
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let normed =
            with_slice(x, |x| activation::layer_norm(x.to_vec(), &self.weight, &self.bias, self.eps))?;
        rows(normed, self.weight.len())
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
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let normed = with_slice(x, |x| activation::rms_norm(x.to_vec(), &self.weight, self.eps))?;
        rows(normed, self.weight.len())
    }
}
