//! Operations that are one kernel on CUDA and several tensor operations elsewhere. Both must agree.
//!
//! Called by the layers of this folder. Norms and softmax are taken in f32 whatever the type of their input.

use candle_core::{D, DType, Device};

use super::{
    super::{Result, Tensor},
    exchange::Exchange,
};

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

/// `x W^T` of `x` `[rows, in]` and `weight` `[out, in]`, and what [`finish_rows`] does to it, where that is one operation.
pub fn finished_product(
    x: &Tensor,
    weight: &Tensor,
    (bias, residual): (Option<&Tensor>, Option<&Tensor>),
    gelu: bool,
) -> Result<Option<Tensor>> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() && (bias.is_some() || residual.is_some() || gelu) {
        return super::cuda::blas::product(x, weight, super::cuda::blas::Finish { bias, residual, gelu });
    }
    let _ = (x, weight, bias, residual, gelu);
    Ok(None)
}

/// These rows of `x`, in this order; `x` itself where they are all of them in theirs.
pub fn select_rows(x: &Tensor, rows: &[usize]) -> Result<Tensor> {
    if rows.iter().copied().eq(0..x.dim(0)?) {
        return Ok(x.clone());
    }
    let index: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
    x.index_select(&Tensor::from_vec(index, rows.len(), x.device())?, 0)
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

/// How a token is drawn: among the `top_k` largest logits, 0 for all, of those among the most probable that make up `top_p`, of those
/// among what is no less than `min_p` times as probable as the most probable, at the share `random` in `[0, 1)` of their sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Above 0.
    pub temperature: f32,
    /// [`FEW`] at most.
    pub top_k: usize,
    pub top_p: f32,
    pub min_p: f32,
    pub random: f64,
}

/// How many of the largest logits of a row are looked at to draw from it, at least.
pub const FEW: usize = 256;

/// How the token of a row is chosen: after the adjustments, of which an id has one at most, among the ids that a mask allows, a bit each,
/// the first of the largest logits, or one that is drawn.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Choice {
    pub adjustments: Vec<Adjustment>,
    pub mask: Option<Vec<u32>>,
    pub draw: Option<Draw>,
}

/// What [`choose`] gives.
#[derive(Debug)]
pub struct Chosen {
    /// `[rows, vocab]`, adjusted and without what masks do not allow.
    pub logits: Tensor,
    /// `[2, rows]` in u32: ids and the bits of their logits. These are minus infinity where no logit is larger, and no number where the largest
    /// logits do not decide what is drawn; the ids are those of tokens even then.
    pub tokens: Tensor,
}

/// Chooses the tokens of the rows of `logits` `[rows, vocab]` in f32 among the first `num_ids`: as they are where no choice is said. On a
/// device the logits are changed where they lie, and nobody waits for it.
pub fn choose(
    logits: &Tensor,
    num_ids: usize,
    choices: &[Option<Choice>],
    exchange: &mut Exchange,
) -> Result<Chosen> {
    let of_rows = choices.iter().enumerate().filter_map(|(row, choice)| Some((row, choice.as_ref()?)));
    let known = |one: &&Adjustment| (one.id as usize) < num_ids;
    let adjustments = of_rows
        .clone()
        .flat_map(|(row, choice)| choice.adjustments.iter().filter(known).map(move |&one| (row, one)));
    let logits = adjust(logits, &adjustments.collect::<Vec<_>>(), exchange)?;
    let masks = of_rows.filter_map(|(row, choice)| Some((row, choice.mask.as_deref()?)));
    let logits = forbid(&logits, num_ids, &masks.collect::<Vec<_>>(), exchange)?;
    let draws: Vec<_> = choices.iter().map(|choice| choice.as_ref().and_then(|choice| choice.draw)).collect();
    let tokens = tokens(&logits, num_ids, &draws)?;
    Ok(Chosen { logits, tokens })
}

/// `logits` `[rows, vocab]` in f32, adjusted, an id of a row at most once; on a device in their own place.
pub fn adjust(logits: &Tensor, of_rows: &[(usize, Adjustment)], exchange: &mut Exchange) -> Result<Tensor> {
    if of_rows.is_empty() {
        return Ok(logits.clone());
    }
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda()
        && let Some(adjusted) = super::cuda::fused::adjust(logits, of_rows, exchange)?
    {
        return Ok(adjusted);
    }
    let _ = exchange;
    let (mut rows, dims) = (logits.to_vec2::<f32>()?, logits.dims());
    of_rows.iter().for_each(|(row, adjustment)| adjustment.apply(&mut rows[*row]));
    Tensor::from_vec(rows.concat(), dims, logits.device())
}

/// `logits` `[rows, vocab]` in f32, minus infinity where an id below `num_ids` has no bit in the mask of its row; on a device in their own
/// place.
pub fn forbid(
    logits: &Tensor,
    num_ids: usize,
    masks: &[(usize, &[u32])],
    exchange: &mut Exchange,
) -> Result<Tensor> {
    let has_bits = |&(_, mask): &(usize, &[u32])| mask.len() == num_ids.div_ceil(32);
    if !masks.iter().all(has_bits) {
        candle_core::bail!("a mask of another vocabulary: this is a bug");
    }
    if masks.is_empty() {
        return Ok(logits.clone());
    }
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda()
        && let Some(masked) = super::cuda::fused::forbid(logits, num_ids, masks, exchange)?
    {
        return Ok(masked);
    }
    let _ = exchange;
    let (mut rows, dims) = (logits.to_vec2::<f32>()?, logits.dims());
    for &(row, mask) in masks {
        let is_forbidden = |id: &usize| mask[id / 32] >> (id % 32) & 1 == 0;
        (0..num_ids).filter(is_forbidden).for_each(|id| rows[row][id] = f32::NEG_INFINITY);
    }
    Tensor::from_vec(rows.concat(), dims, logits.device())
}

/// Of each row of `logits` `[rows, vocab]` in f32 the first of the largest of the first `num_ids`, or one that is drawn: as [`Chosen`] has them.
fn tokens(logits: &Tensor, num_ids: usize, draws: &[Option<Draw>]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda()
        && let Some(chosen) = super::cuda::fused::tokens(logits, num_ids, draws)?
    {
        return Ok(chosen);
    }
    // Without kernels nothing is drawn here.
    let largest = |(row, draw): (Vec<f32>, &Option<Draw>)| {
        let better = |best: (u32, f32), (id, &logit)| if logit > best.1 { (id, logit) } else { best };
        let (id, logit) = (0u32..).zip(&row).fold((0, f32::NEG_INFINITY), better);
        (id, if draw.is_some() { f32::NAN } else { logit }.to_bits())
    };
    let rows = logits.narrow(1, 0, num_ids)?.to_vec2::<f32>()?;
    let (ids, bits): (Vec<u32>, Vec<u32>) = rows.into_iter().zip(draws).map(largest).unzip();
    Tensor::from_vec([ids, bits].concat(), (2, draws.len()), logits.device())
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
