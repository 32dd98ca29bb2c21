//! The building blocks of the networks, each with its `load` from a checkpoint.
//!
//! Called by the networks of [`crate::model`]. On a CPU they run the kernels of `kernels/` on f32 activations,
//! with weights in the dtype they are stored in.

use candle_core::{CpuStorage, Device, Storage};
use half::{bf16, f16};

use super::{
    ModelError, Result, Tap, Tensor,
    kernels::{activation, gemm::PackedMatrix, matrix::Matrix, panels::QuantPanels, quant::QuantMatrix},
    quantised::quantise,
    weights::{Rows, StoredDType, StoredTensor, Weights, WeightsError},
};

pub use super::kernels::panels::Bits;

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

    /// Whether there is a tensor of this name here.
    pub fn contains(&self, name: &str) -> bool {
        self.weights.contains(&self.pp(name).path)
    }

    /// A small tensor as f32, row-major.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let path = self.pp(name).path;
        let values = self.weights.get(&path).map_err(ModelError::wrap)?.to_f32();
        match values.iter().position(|x| !x.is_finite()) {
            None => Ok(values),
            Some(row) => Err(ModelError::wrap(WeightsError::NotFinite { tensor: path, row })),
        }
    }

    /// The tensor `weight` as rows to be looked up. `is_checked`: its values are read elsewhere, as a matrix; those of a
    /// quantised checkpoint were when it was written.
    pub fn table(&self, is_checked: bool) -> Result<Rows> {
        let path = self.pp("weight").path;
        let rows = self.weights.rows(&path).map_err(ModelError::wrap)?;
        if let Rows::Stored(tensor) = &rows
            && !(is_checked || self.weights.quantised().is_some())
            && let Some(at) = tensor.first_not_finite()
        {
            let row = at / tensor.shape[1..].iter().product::<usize>();
            return Err(ModelError::wrap(WeightsError::NotFinite { tensor: path, row }));
        }
        self.weights.release(&path);
        Ok(rows)
    }

    /// The matrices `weight` of `places` as one, below each other. All have the same number of inputs; trailing dimensions
    /// (a convolution's) count as one.
    fn matrix(places: &[Loader<'a>]) -> Result<Matrix> {
        match places[0].format {
            WeightFormat::Quant(bits) => {
                let parts = places.iter().map(|place| place.panels(bits)).collect::<Result<_>>()?;
                Ok(Matrix::Quant(QuantMatrix::stack(parts)))
            }
            WeightFormat::Float(dtype) => Loader::floats(places, Some(dtype)),
            WeightFormat::AsStored => Loader::floats(places, None),
        }
    }

    /// The matrix `weight`, mapped if it is stored quantised, else made.
    fn panels(&self, asked: Bits) -> Result<QuantPanels> {
        let path = self.pp("weight").path;
        if let Some(stored) = self.weights.panels(&path).map_err(ModelError::wrap)? {
            return Ok(stored);
        }
        quantise(self.weights, &path, asked).map_err(ModelError::wrap)
    }

    fn floats(places: &[Loader<'a>], dtype: Option<StoredDType>) -> Result<Matrix> {
        let paths: Vec<String> = places.iter().map(|place| place.pp("weight").path).collect();
        let weights = places[0].weights;
        let parts = paths.iter().map(|path| weights.get(path)).map(|part| part.map_err(ModelError::wrap));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let k = parts[0].shape[1..].iter().product();
        let n = parts.iter().map(|part| part.shape[0]).sum();
        let read = |row: usize, out: &mut [f32]| {
            let (part, row) = find_row(&parts, row);
            parts[part].copy_f32(row * k, out);
        };
        let packed = match dtype.unwrap_or(parts[0].dtype) {
            StoredDType::F32 => PackedMatrix::pack::<f32>(n, k, read),
            StoredDType::Bf16 => PackedMatrix::pack::<bf16>(n, k, read),
            StoredDType::F16 => PackedMatrix::pack::<f16>(n, k, read),
        };
        paths.iter().for_each(|path| weights.release(path));
        packed.map(Matrix::Float).map_err(|row| {
            let (part, row) = find_row(&parts, row);
            ModelError::wrap(WeightsError::NotFinite { tensor: paths[part].clone(), row })
        })
    }
}

/// Which of several matrices that stand below each other has row `row`, and which of its own that is.
fn find_row(parts: &[StoredTensor], mut row: usize) -> (usize, usize) {
    for (index, part) in parts.iter().enumerate() {
        match row.checked_sub(part.shape[0]) {
            None => return (index, row),
            Some(below) => row = below,
        }
    }
    panic!("a row beyond the matrix: this is a bug")
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
