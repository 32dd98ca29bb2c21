//! The building blocks of the networks on a device, each with its `load` from a checkpoint.
//!
//! Called by the networks of this folder.

use candle_core::{DType, Device};

use super::{
    super::{
        ModelError, Result, Tap, Tensor,
        layers::Bits,
        stored::StoredTensor,
        weights::{StoredDType, Weights},
    },
    ops,
    quant::QuantMatrix,
};

/// A place in a checkpoint, and where its tensors go: `loader.pp("layers").pp(3)` stands for those below `layers.3.`.
#[derive(Debug, Clone)]
pub struct Loader<'a> {
    weights: &'a Weights,
    path: String,
    pub device: &'a Device,
    pub dtype: DType,
    /// What the matrices below are quantised to.
    pub quant: Option<Bits>,
}

impl<'a> Loader<'a> {
    /// The root of a checkpoint.
    pub fn new(weights: &'a Weights, device: &'a Device, dtype: DType) -> Self {
        Loader { weights, path: String::new(), device, dtype, quant: None }
    }

    /// The same place, its matrices quantised to `quant`.
    pub fn quantised(&self, quant: Option<Bits>) -> Self {
        Loader { quant, ..self.clone() }
    }

    /// One level down.
    pub fn pp(&self, name: impl std::fmt::Display) -> Self {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) };
        Loader { path, ..self.clone() }
    }

    /// The full name of a tensor here.
    pub fn path(&self, name: &str) -> String {
        self.pp(name).path
    }

    /// A tensor as it is stored, on the host.
    pub fn stored(&self, name: &str) -> Result<StoredTensor> {
        self.weights.get(&self.path(name)).map_err(ModelError::wrap)
    }

    /// A tensor, moved to the device and converted there.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let stored = self.stored(name)?;
        let dtype = match stored.dtype {
            StoredDType::F32 => DType::F32,
            StoredDType::F16 => DType::F16,
            StoredDType::Bf16 => DType::BF16,
        };
        Tensor::from_raw_buffer(&stored.data, dtype, &stored.shape, self.device)?.to_dtype(self.dtype)
    }
}

/// Shows a tensor to `tap`, in f32 and in host memory.
pub fn show(tap: &mut dyn Tap, name: &'static str, index: Option<usize>, x: &Tensor) -> Result<()> {
    if tap.is_watching() {
        tap.tensor(name, index, &x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?);
    }
    Ok(())
}

/// A matrix `[out, in]`.
#[derive(Debug)]
enum Matrix {
    Floats(Tensor),
    Quant(QuantMatrix),
}

/// `y = x W^T + b`.
#[derive(Debug)]
pub struct Linear {
    weight: Matrix,
    bias: Option<Tensor>,
}

impl Linear {
    /// `weight` and, where the layer has one, `bias`. Trailing dimensions (a convolution's) count as one.
    pub fn load(loader: &Loader<'_>, has_bias: bool) -> Result<Self> {
        Linear::load_stacked(std::slice::from_ref(loader), has_bias)
    }

    /// Several layers of the same input as one; their outputs stand beside each other.
    pub fn load_stacked(loaders: &[Loader<'_>], has_bias: bool) -> Result<Self> {
        let stacked = |name: &str| match loaders {
            [one] => one.tensor(name),
            several => {
                let parts = several.iter().map(|place| place.tensor(name)).collect::<Result<Vec<_>>>()?;
                Tensor::cat(&parts, 0)
            }
        };
        let weight = match loaders[0].quant {
            None => Matrix::Floats(stacked("weight")?.flatten_from(1)?),
            Some(bits) => Matrix::Quant(QuantMatrix::load(loaders, bits)?),
        };
        Ok(Linear { weight, bias: has_bias.then(|| stacked("bias")).transpose()? })
    }

    /// Without bias, of a matrix `[out, in]` that is there already.
    pub fn of(weight: Tensor) -> Self {
        Linear { weight: Matrix::Floats(weight), bias: None }
    }

    /// `[…, in]` to `[…, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.finished(x, None, false)
    }

    /// [`Linear::forward`], and `residual` added.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.finished(x, Some(residual), false)
    }

    /// [`Linear::forward`], and GELU by tanh of it.
    pub fn forward_gelu(&self, x: &Tensor) -> Result<Tensor> {
        self.finished(x, None, true)
    }

    fn finished(&self, x: &Tensor, residual: Option<&Tensor>, gelu: bool) -> Result<Tensor> {
        match self.finished_at_once(x, residual, gelu)? {
            Some(y) => Ok(y),
            None => ops::finish_rows(&self.product(x)?, self.bias(), residual, gelu),
        }
    }

    /// The product and what follows in one, where the device has that.
    fn finished_at_once(&self, x: &Tensor, residual: Option<&Tensor>, gelu: bool) -> Result<Option<Tensor>> {
        let Matrix::Floats(weight) = &self.weight else { return Ok(None) };
        let residual = residual.map(by_rows).transpose()?;
        let y = ops::finished_product(&by_rows(x)?, weight, (self.bias(), residual.as_ref()), gelu)?;
        y.map(|y| like(&y, x)).transpose()
    }

    /// `x W^T`, without the bias.
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        let rows = by_rows(x)?;
        let y = match &self.weight {
            Matrix::Floats(weight) => rows.matmul(&weight.t()?)?,
            Matrix::Quant(weight) => weight.multiply(&rows)?,
        };
        like(&y, x)
    }

    /// The weight `[out, in]`, unless it is quantised.
    #[cfg(feature = "cuda")]
    pub fn floats(&self) -> Option<&Tensor> {
        match &self.weight {
            Matrix::Floats(weight) => Some(weight),
            Matrix::Quant(_) => None,
        }
    }

    /// `[out]`
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The same with floats of `dtype`, which are the weights as they are rounded now.
    pub fn unpacked(self, device: &Device, dtype: DType) -> Result<Self> {
        let weight = match self.weight {
            Matrix::Quant(weight) => Matrix::Floats(weight.floats(device, dtype)?),
            floats => floats,
        };
        Ok(Linear { weight, ..self })
    }

    /// Bytes of the weight.
    pub fn num_bytes(&self) -> usize {
        match &self.weight {
            Matrix::Floats(weight) => weight.elem_count() * weight.dtype().size_in_bytes(),
            Matrix::Quant(weight) => weight.num_bytes(),
        }
    }
}

/// `[…, width]` as `[rows, width]`: one product over all rows, not one a batch.
fn by_rows(x: &Tensor) -> Result<Tensor> {
    x.flatten_to(x.rank() - 2)?.contiguous()
}

/// The rows `y` `[rows, out]` as those of `x` `[…, in]` stand: `[…, out]`.
fn like(y: &Tensor, x: &Tensor) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    dims.pop();
    dims.push(y.dim(1)?);
    y.reshape(dims)
}

/// LayerNorm with weight and bias.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// `weight` and `bias`.
    pub fn load(loader: &Loader<'_>, eps: f64) -> Result<Self> {
        Ok(LayerNorm { weight: loader.tensor("weight")?, bias: loader.tensor("bias")?, eps })
    }

    /// Over the last dimension.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::add_layer_norm(x, (None, None), (&self.weight, &self.bias), self.eps).map(|both| both.1)
    }

    /// What `linear` makes of `x`, `residual` added; and its norm.
    pub fn add_forward(&self, linear: &Linear, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        if let Some(sum) = linear.finished_at_once(x, Some(residual), false)? {
            let normed = self.forward(&sum)?;
            return Ok((sum, normed));
        }
        let added = (linear.bias(), Some(residual));
        ops::add_layer_norm(&linear.product(x)?, added, (&self.weight, &self.bias), self.eps)
    }
}

/// RMSNorm with weight.
#[derive(Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// `weight`.
    pub fn load(loader: &Loader<'_>, eps: f64) -> Result<Self> {
        Ok(RmsNorm { weight: loader.tensor("weight")?, eps })
    }

    /// Over the last dimension.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm(x, &self.weight, self.eps)
    }

    /// The weight, and what keeps the root from zero.
    #[cfg(feature = "cuda")]
    pub fn parts(&self) -> (&Tensor, f64) {
        (&self.weight, self.eps)
    }

    /// `x + delta`, and its norm.
    pub fn add_forward(&self, x: &Tensor, delta: &Tensor) -> Result<(Tensor, Tensor)> {
        ops::add_rms_norm(x, delta, &self.weight, self.eps)
    }
}
