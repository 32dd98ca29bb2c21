//! Operations that are one kernel on CUDA and several tensor operations elsewhere. Both must agree.
//!
//! Called by the layers of this folder. Norms and softmax are taken in f32 whatever the type of their input.

use candle_core::{D, DType, Device};

use super::super::{Result, Tensor};

/// `x / rms(x) x weight` over the last dimension.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return candle_nn::ops::rms_norm(&x.contiguous()?, weight, eps as f32);
    }
    let wide = x.to_dtype(DType::F32)?;
    let mean = wide.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = wide.broadcast_div(&(mean + eps)?.sqrt()?)?;
    normed.broadcast_mul(&weight.to_dtype(DType::F32)?)?.to_dtype(x.dtype())
}

/// `x + delta`, and the [`rms_norm`] of it.
pub fn add_rms_norm(x: &Tensor, delta: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda()
        && let Some(both) = super::cuda::fused::add_rms_norm(x, delta, weight, eps)?
    {
        return Ok(both);
    }
    let sum = (x + delta)?;
    let normed = rms_norm(&sum, weight, eps)?;
    Ok((sum, normed))
}

/// `x + bias + residual`, and its norm, `(y - mean) / deviation x weight + shift` over the last dimension; of `x` itself without both.
pub fn add_layer_norm(
    x: &Tensor,
    (bias, residual): (Option<&Tensor>, Option<&Tensor>),
    (weight, shift): (&Tensor, &Tensor),
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        if let Some(both) = super::cuda::fused::add_layer_norm(x, (bias, residual), (weight, shift), eps)? {
            return Ok(both);
        }
        let sum = finish_rows(x, bias, residual, false)?.contiguous()?;
        let normed = candle_nn::ops::layer_norm(&sum, weight, shift, eps as f32)?;
        return Ok((sum, normed));
    }
    let sum = finish_rows(x, bias, residual, false)?;
    let wide = sum.to_dtype(DType::F32)?;
    let centred = wide.broadcast_sub(&wide.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centred.broadcast_div(&(variance + eps)?.sqrt()?)?;
    let scaled = normed.broadcast_mul(&weight.to_dtype(DType::F32)?)?;
    let shifted = scaled.broadcast_add(&shift.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?;
    Ok((sum, shifted))
}

/// Over the last dimension.
pub fn softmax(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return candle_nn::ops::softmax_last_dim(&x.contiguous()?);
    }
    let powers = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)
}

/// `[…, 2 width]`, gate then up, to `silu(gate) x up`.
pub fn silu_mul(x: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda()
        && let Some(y) = super::cuda::fused::silu_mul(x)?
    {
        return Ok(y);
    }
    let width = x.dim(D::Minus1)? / 2;
    let (gate, up) = (x.narrow(D::Minus1, 0, width)?, x.narrow(D::Minus1, width, width)?);
    gate.silu()? * up
}

/// The rows of `table` `[n, width]` that `ids` `[rows]` in u32 name: `[rows, width]`.
pub fn gather_rows(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if table.device().is_cuda()
        && let Some(rows) = super::cuda::fused::gather_rows(table, ids)?
    {
        return Ok(rows);
    }
    table.index_select(ids, 0)
}

/// What a layer does to its product `x` `[…, width]`: adds `bias` `[width]`, then `residual` of the shape of `x`; or takes GELU by
/// tanh of it.
pub fn finish_rows(
    x: &Tensor,
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    gelu: bool,
) -> Result<Tensor> {
    if bias.is_none() && residual.is_none() && !gelu {
        return Ok(x.clone());
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda()
        && let Some(y) = super::cuda::fused::finish_rows(x, bias, residual, gelu)?
    {
        return Ok(y);
    }
    let mut y = x.clone();
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    if let Some(residual) = residual {
        y = (residual + y)?;
    }
    // candle's `gelu` is the one by tanh.
    if gelu { y.gelu() } else { Ok(y) }
}

/// Of each row of `logits` `[rows, vocab]` in f32 the largest of the first `num_ids`: its id and itself.
pub fn largest(logits: &Tensor, num_ids: usize) -> Result<Vec<(u32, f32)>> {
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda()
        && let Some(found) = super::cuda::fused::largest(logits, num_ids)?
    {
        let found = found.to_vec2::<u32>()?;
        return Ok(found.iter().map(|row| (row[0], f32::from_bits(row[1]))).collect());
    }
    let allowed = logits.narrow(1, 0, num_ids)?.contiguous()?;
    let (ids, largest) = (allowed.argmax(1)?.to_vec1()?, allowed.max(1)?.to_vec1()?);
    Ok(ids.into_iter().zip(largest).collect())
}

/// What is to be done to the logit of an id: divided by `factor` if it is positive, else multiplied; then `shift` is added.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adjustment {
    pub id: u32,
    pub factor: f32,
    pub shift: f32,
}

impl Adjustment {
    /// Does it, if `logits` have the id.
    pub fn apply(self, logits: &mut [f32]) {
        if let Some(logit) = logits.get_mut(self.id as usize) {
            *logit = if *logit > 0.0 { *logit / self.factor } else { *logit * self.factor } + self.shift;
        }
    }
}

/// `logits` `[rows, vocab]` in f32, adjusted, an id of a row at most once; on a device perhaps in their own place.
pub fn adjust(logits: &Tensor, of_rows: &[(usize, Adjustment)]) -> Result<Tensor> {
    if of_rows.is_empty() {
        return Ok(logits.clone());
    }
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda()
        && let Some(adjusted) = super::cuda::fused::adjust(logits, of_rows)?
    {
        return Ok(adjusted);
    }
    let (mut rows, dims) = (logits.to_vec2::<f32>()?, logits.dims());
    of_rows.iter().for_each(|(row, adjustment)| adjustment.apply(&mut rows[*row]));
    Tensor::from_vec(rows.concat(), dims, logits.device())
}

/// Ids and logits, ids ascending, and the sum of `exp((logit - largest) / temperature)` over all ids.
pub type Candidates = (Vec<(u32, f32)>, f32);

/// Of each row of `logits` `[rows, vocab]` in f32 all of the first `num_ids` that are no smaller than the smallest of what is given, the
/// `few` largest among them, and the sum at its temperature; none of a row for which that cannot be said.
pub fn few_largest(
    logits: &Tensor,
    num_ids: usize,
    few: usize,
    temperatures: &[f32],
) -> Result<Vec<Option<Candidates>>> {
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda() {
        let Some(found) = super::cuda::fused::few_largest(logits, num_ids, few, temperatures)? else {
            return Ok(vec![None; logits.dim(0)?]);
        };
        let candidates = |row: Vec<u32>| {
            let pairs = row[2..].as_chunks::<2>().0.get(..row[0] as usize)?;
            let mut pairs: Vec<(u32, f32)> =
                pairs.iter().map(|&[id, bits]| (id, f32::from_bits(bits))).collect();
            pairs.sort_unstable_by_key(|pair| pair.0);
            Some((pairs, f32::from_bits(row[1])))
        };
        return Ok(found.to_vec2::<u32>()?.into_iter().map(candidates).collect());
    }
    let rows = logits.narrow(1, 0, num_ids)?.to_vec2::<f32>()?;
    let candidates = |(row, temperature): (Vec<f32>, &f32)| {
        if row.iter().any(|logit| logit.is_nan()) {
            return None;
        }
        let mut sorted = row.clone();
        sorted.sort_unstable_by(|a, b| b.total_cmp(a));
        let least = sorted.get(few - 1).copied().unwrap_or(f32::NEG_INFINITY);
        let total = row.iter().map(|logit| ((logit - sorted[0]) / temperature).exp()).sum();
        let kept = (0u32..).zip(row).filter(|&(_, logit)| logit >= least && logit > f32::NEG_INFINITY);
        Some((kept.collect(), total))
    };
    Ok(rows.into_iter().zip(temperatures).map(candidates).collect())
}

/// What [`rotate`] wants its cosines and sines in, for an `x` of type `dtype`.
pub fn rotary_dtype(device: &Device, dtype: DType) -> DType {
    if device.is_cuda() { dtype } else { DType::F32 }
}

/// Turns `x` `[rows, heads, dim]`: element `i` with element `i + dim / 2`, by `cos` and `sin` `[rows, dim / 2]`.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return candle_nn::rotary_emb::rope_thd(&x.contiguous()?.unsqueeze(0)?, cos, sin)?.squeeze(0);
    }
    let half = x.dim(D::Minus1)? / 2;
    let wide = x.to_dtype(DType::F32)?;
    let (low, high) = (wide.narrow(D::Minus1, 0, half)?, wide.narrow(D::Minus1, half, half)?);
    let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
    let turned_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
    let turned_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
    Tensor::cat(&[turned_low, turned_high], D::Minus1)?.to_dtype(x.dtype())
}
