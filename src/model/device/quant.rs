//! Matrices of the decoder in 8 or 4 bits on a device: blocks of 32 weights with a scale each, as ggml has them. In 4 bits, where rows
//! allow that, eight such blocks together, whose weights have a least one, too (Q4_K): in as many bits that rounds a seventh less.
//!
//! Called by `layers.rs`, and by `cli` for what fits. The products are candle's or our own; their kernels for CUDA
//! look at no size: what they cannot do is refused by [`check`], before a weight is read. Tower and connector stay floats: they run
//! once a video, and all 8 or 4 bits spare is memory traffic.

use std::borrow::Cow;

use candle_core::{
    DType, Device,
    quantized::{
        GgmlDType, GgmlType, QStorage, QTensor,
        k_quants::{BlockQ4_0, BlockQ4K, BlockQ8_0},
    },
};
use half::f16;
use rayon::prelude::*;
use thiserror::Error;

use super::{
    super::{
        ModelError, Result, Tensor,
        config::ModelConfig,
        layers::Bits,
        layout::{EMBEDDINGS, HEAD, Role, TensorSpec},
        stored::StoredTensor,
        weights::{Weights, WeightsError},
    },
    layers::Loader,
};

/// Weights of a scale.
const BLOCK: usize = 32;
/// Rows that are multiplied with the weights as they lie, reading them once.
const ROWS_A_PASS: usize = 8;
/// Up to as many rows passes read less memory than weights that are made floats, written and read again.
const MAX_ROWS_IN_PASSES: usize = 32;
/// Matrices of more elements (heads) are never made floats: that would take gigabytes, for a moment.
const MAX_ELEMENTS_AS_FLOATS: usize = 1 << 27;

/// Why the weights cannot be quantised on a device: one sentence that says what to do.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum QuantError {
    #[error(
        "the weights are quantised to {bits} already, in the form of the CPU's kernels, which a GPU does not read: give the \
         checkpoint they were made from with --quant {bits}, or --device cpu", bits = .0.name()
    )]
    Stored(Bits),
    #[error(
        "tensor {tensor} has rows of {inputs} weights, which blocks of {BLOCK} do not divide: leave out --quant on a GPU, or \
         give --device cpu"
    )]
    Inputs { tensor: String, inputs: usize },
    #[error(
        "tensor {tensor} has an odd number of rows ({outputs}), and rows are multiplied in pairs: leave out --quant on a GPU, \
         or give --device cpu"
    )]
    Outputs { tensor: String, outputs: usize },
}

/// Whether a device can run these weights, quantised when they are read (`None`: not quantised).
///
/// # Errors
/// One sentence, when it cannot.
pub fn check(
    weights: &Weights,
    config: &ModelConfig,
    quant: Option<Bits>,
) -> std::result::Result<(), QuantError> {
    if let Some(bits) = weights.quantised() {
        return Err(QuantError::Stored(bits));
    }
    let Some(quant) = quant else { return Ok(()) };
    for spec in config.tensors().into_iter().filter(|spec| bits_of(spec, config, quant).is_some()) {
        let (outputs, inputs) = spec.matrix();
        if !inputs.is_multiple_of(BLOCK) {
            return Err(QuantError::Inputs { tensor: spec.name, inputs });
        }
        if !outputs.is_multiple_of(2) {
            return Err(QuantError::Outputs { tensor: spec.name, outputs });
        }
    }
    Ok(())
}

/// Bytes of all weights on a device that computes in `dtype`.
pub fn weight_bytes(config: &ModelConfig, dtype: DType, quant: Option<Bits>) -> u64 {
    let tensors = config.tensors().into_iter().filter(|spec| spec.required);
    let bytes = tensors.map(|spec| {
        let floats = spec.num_elements() * dtype.size_in_bytes();
        let quantised =
            quant.and_then(|asked| bits_of(&spec, config, asked)).map(|bits| num_bytes(bits, &spec));
        // Rows of the embeddings are looked up; the head that is made of them lies beside them.
        let table = if spec.name == EMBEDDINGS { floats } else { 0 };
        quantised.map_or(floats, |matrix| matrix + table) as u64
    });
    bytes.sum()
}

/// What a matrix is kept in where the model is quantised to `asked`; `None`: floats.
fn bits_of(spec: &TensorSpec, config: &ModelConfig, asked: Bits) -> Option<Bits> {
    let head = if config.text.tie_word_embeddings { EMBEDDINGS } else { HEAD };
    match spec.role {
        Role::Matrix { least: Bits::Four } => Some(asked),
        _ => (spec.name == head).then_some(Bits::Eight),
    }
}

/// Whether products of few rows round those as well: candle's do, our kernel does not.
pub fn rounds_rows(device: &Device) -> bool {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return !super::cuda::launch::FUSED.is_there(DType::F32);
    }
    let _ = device;
    true
}

fn num_bytes(bits: Bits, spec: &TensorSpec) -> usize {
    let kind = kind(bits, spec.matrix().1);
    spec.num_elements() / kind.block_size() * kind.type_size()
}

/// What rows of so many weights are kept in.
fn kind(bits: Bits, inputs: usize) -> GgmlDType {
    match bits {
        Bits::Eight => GgmlDType::Q8_0,
        Bits::Four if inputs.is_multiple_of(BlockQ4K::BLCK_SIZE) => GgmlDType::Q4K,
        Bits::Four => GgmlDType::Q4_0,
    }
}

/// A matrix `[out, in]` in blocks.
#[derive(Debug)]
pub struct QuantMatrix(QTensor);

impl QuantMatrix {
    /// The matrices `weight` of `places` below each other, quantised on the host: only blocks travel.
    pub fn load(places: &[Loader<'_>], bits: Bits) -> Result<Self> {
        let parts = places.iter().map(|place| Ok((place.path("weight"), place.stored("weight")?)));
        let parts = parts.collect::<Result<Vec<_>>>()?;
        let k: usize = parts[0].1.shape[1..].iter().product();
        let n: usize = parts.iter().map(|(_, part)| part.shape[0]).sum();
        let kind = kind(bits, k);
        let host = QTensor::new(quantised(&parts, k, kind)?, (n, k))?;
        let device = places[0].device;
        if device.is_cpu() {
            return Ok(QuantMatrix(host));
        }
        let bytes = host.data()?;
        // Borrowed: candle would read what is owned after it has dropped it. Behind the last row it puts zeros.
        let storage = QStorage::from_data(Cow::Borrowed(&bytes), device, kind)?;
        QTensor::new(storage, (n, k)).map(QuantMatrix)
    }

    /// `x W^T` of contiguous `x` `[rows, in]`: `[rows, out]` in the type of `x`. For many rows the weights become floats.
    pub fn multiply(&self, x: &Tensor) -> Result<Tensor> {
        let rows = x.dim(0)?;
        if rows <= ROWS_A_PASS {
            return self.pass(x);
        }
        if rows <= MAX_ROWS_IN_PASSES || self.0.shape().elem_count() > MAX_ELEMENTS_AS_FLOATS {
            let starts = (0..rows).step_by(ROWS_A_PASS);
            let passes = starts.map(|start| self.pass(&x.narrow(0, start, ROWS_A_PASS.min(rows - start))?));
            return Tensor::cat(&passes.collect::<Result<Vec<_>>>()?, 0);
        }
        x.matmul(&self.floats(x.device(), x.dtype())?.t()?)
    }

    /// The product of [`ROWS_A_PASS`] rows at most. candle's rounds them to 8 bits, in groups of 32 elements.
    fn pass(&self, x: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda()
            && let Some(y) = super::cuda::quant::multiply(x, &self.0)?
        {
            return Ok(y);
        }
        x.to_dtype(DType::F32)?.contiguous()?.apply_op1_no_bwd(&self.0)?.to_dtype(x.dtype())
    }

    /// The weights as floats, `[out, in]`.
    pub fn floats(&self, device: &Device, dtype: DType) -> Result<Tensor> {
        match dtype {
            DType::F32 => self.0.dequantize(device),
            _ => self.0.dequantize_f16(device)?.to_dtype(dtype),
        }
    }

    /// Bytes it takes.
    pub fn num_bytes(&self) -> usize {
        self.0.storage_size_in_bytes()
    }
}

/// Rows of `k` weights each as blocks of this kind.
fn quantised(parts: &[(String, StoredTensor)], k: usize, kind: GgmlDType) -> Result<QStorage> {
    Ok(QStorage::Cpu(match kind {
        GgmlDType::Q4K => Box::new(blocks::<BlockQ4K>(parts, k)?),
        GgmlDType::Q4_0 => Box::new(blocks::<BlockQ4_0>(parts, k)?),
        _ => Box::new(blocks::<BlockQ8_0>(parts, k)?),
    }))
}

/// Rows of `k` weights each as blocks, on all cores.
fn blocks<T: GgmlType>(parts: &[(String, StoredTensor)], k: usize) -> Result<Vec<T>> {
    let len = parts.iter().map(|(_, part)| part.shape[0]).sum::<usize>() * k / T::BLCK_SIZE;
    let mut all = vec![T::zeros(); len];
    let mut rest = all.as_mut_slice();
    for (name, part) in parts {
        let own;
        (own, rest) = rest.split_at_mut(part.shape[0] * k / T::BLCK_SIZE);
        let rows = own.par_chunks_mut(k / T::BLCK_SIZE).enumerate();
        rows.try_for_each_init(
            || vec![0.0; k],
            |values, (row, out)| {
                part.copy_f32(row * k, values);
                // As floats of 16 bits they must not become infinite. A NaN is no number below anything.
                if !values.iter().all(|x| x.abs() <= f16::MAX.to_f32()) {
                    return Err(WeightsError::NotFinite { tensor: name.clone(), row });
                }
                T::from_float(values, out);
                Ok(())
            },
        )
        .map_err(ModelError::wrap)?;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::{
        super::super::{presets::Preset, trial::relative_error, weights::StoredDType},
        *,
    };

    fn noise(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 37 + seed * 101) as f32 * 0.7).sin() * (1.0 + (i % 7) as f32)).collect()
    }

    fn stored(n: usize, k: usize, values: &[f32]) -> (String, StoredTensor) {
        let data = values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>().into();
        ("w".into(), StoredTensor { dtype: StoredDType::F32, shape: vec![n, k], data })
    }

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn few_rows_and_many_give_the_product_with_the_rounded_weights() {
        let n = 46;
        for (bits, k, expected, most) in [
            (Bits::Eight, 96, GgmlDType::Q8_0, 0.006),
            (Bits::Eight, 512, GgmlDType::Q8_0, 0.006),
            (Bits::Four, 96, GgmlDType::Q4_0, 0.1),
            (Bits::Four, 512, GgmlDType::Q4K, 0.085),
        ] {
            let weight = noise(n * k, 1);
            let parts = [stored(20, k, &weight[..20 * k]), stored(26, k, &weight[20 * k..])];
            let kind = kind(bits, k);
            assert_eq!(kind, expected);
            let matrix = QuantMatrix(QTensor::new(quantised(&parts, k, kind).unwrap(), (n, k)).unwrap());
            let floats = matrix.floats(&Device::Cpu, DType::F32).unwrap();
            let rounding = relative_error(&values(&floats), &weight);
            assert!(rounding < most, "{rounding}");
            for (rows, most) in [(1, 0.01), (8, 0.01), (21, 0.01), (32, 0.01), (33, 1e-6)] {
                let x = Tensor::from_vec(noise(rows * k, 2), (rows, k), &Device::Cpu).unwrap();
                let expected = values(&x.matmul(&floats.t().unwrap()).unwrap());
                let error = relative_error(&values(&matrix.multiply(&x).unwrap()), &expected);
                assert!(error < most, "{rows} rows: {error}");
                let half = x.to_dtype(DType::F16).unwrap();
                let product = matrix.multiply(&half).unwrap();
                assert_eq!((product.dtype(), product.dims()), (DType::F16, &[rows, n][..]));
                let error = relative_error(&values(&product), &expected);
                assert!(error < 0.01, "{rows} rows in f16: {error}");
            }
        }
    }

    #[test]
    fn weights_that_are_no_numbers_are_named() {
        for bad in [f32::NAN, f32::INFINITY, 70_000.0] {
            let mut weight = noise(4 * 32, 1);
            weight[70] = bad;
            let error = blocks::<BlockQ8_0>(&[stored(4, 32, &weight)], 32).unwrap_err().to_string();
            assert!(error.contains("tensor w: row 2"), "{error}");
        }
    }

    #[test]
    fn what_the_kernels_cannot_do_is_refused_before_a_weight_is_read() {
        let refused = |config: &ModelConfig| {
            let weights = Weights::synthetic(config, 1);
            assert_eq!(check(&weights, config, None), Ok(()));
            check(&weights, config, Some(Bits::Four)).unwrap_err().to_string()
        };
        let mut config = ModelConfig::tiny_test();
        let error = refused(&config);
        assert!(
            error.contains("down_proj.weight has rows of 48 weights") && error.contains("--quant"),
            "{error}"
        );
        config.text.intermediate_size = 64;
        config.text.vocab_size = 287;
        let error = refused(&config);
        assert!(error.contains("embed_tokens.weight has an odd number of rows (287)"), "{error}");
        for preset in Preset::ALL {
            let config = ModelConfig::preset(preset);
            for bits in [Bits::Eight, Bits::Four] {
                assert_eq!(check(&Weights::synthetic(&config, 1), &config, Some(bits)), Ok(()), "{preset:?}");
            }
        }
    }

    #[test]
    fn the_published_model_takes_two_thirds_in_8_bits_and_half_in_4() {
        let config = ModelConfig::preset(Preset::R1);
        let gigabytes = |quant| format!("{:.2}", weight_bytes(&config, DType::BF16, quant) as f64 / 1e9);
        assert_eq!([None, Some(Bits::Eight), Some(Bits::Four)].map(gigabytes), ["7.20", "4.93", "3.54"]);
    }
}
