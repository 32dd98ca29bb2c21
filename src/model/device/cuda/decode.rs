//! A decode step of few sequences, which is bound by reading the weights: five kernels a layer, each of which reads ahead what does not
//! depend on the one before it.
//!
//! Called by [`super::super::qwen2`], whose operations one by one are its reference and stand in wherever [`Few::of`] gives none.

use candle_core::DType;

use super::{
    super::{
        super::{ModelError, Result, Tensor},
        DeviceCache,
        attention::PagedAttention,
        qwen2::Decoder,
        step::{Decodes, Step},
    },
    flash::{self, Workspace},
    launch::{
        Argument, Grid, Source, address, count, ensure, fresh, start_of, start_or_none, tensor_kernels,
    },
    num_multiprocessors,
    rope::Unturned,
};

/// Most sequences of a step: the columns of the tensor cores' products.
const MAX_SEQUENCES: usize = 8;
/// Inputs of a product come in chunks of so many, its outputs in tiles of at most so many.
const CHUNK: usize = 32;
const TILE: usize = 16;
/// Shared memory of a block, without asking for more.
const SHARED_BYTES: usize = 40 << 10;

/// A step that [`Few::forward`] can compute.
#[derive(Debug)]
pub struct Few<'a> {
    decoder: &'a Decoder,
    decodes: &'a Decodes,
    step: &'a Step,
    counters: &'a Tensor,
    kernels: &'static Source,
    multiprocessors: u32,
}

/// What a product is taken of.
#[derive(Clone, Copy)]
enum Of<'a> {
    /// `[rows, in]`
    Rows(&'a Tensor),
    /// The norm by a weight of `x`, or of `x + delta`, which is kept in `sum`; all `[rows, in]`.
    Normed { x: &'a Tensor, delta: Option<(&'a Tensor, &'a Tensor)>, norm: (&'a Tensor, f64) },
}

impl<'a> Few<'a> {
    /// None where the step is not of few sequences with a row each, or the device or the model is not one the kernels know.
    pub fn of(decoder: &'a Decoder, step: &'a Step, paged: &'a dyn PagedAttention) -> Result<Option<Self>> {
        let (Some(decodes), Some(counters)) = (&step.decodes, paged.counters()) else { return Ok(None) };
        let embeddings = &decoder.embed_tokens;
        let Some(kernels) = tensor_kernels(embeddings.device(), embeddings.dtype()) else { return Ok(None) };
        let rows = decodes.len();
        let config = &decoder.config;
        let group = config.num_attention_heads / config.num_key_value_heads;
        let matrices = decoder.layers.iter().flat_map(|layer| layer.matrices()).chain([&decoder.lm_head]);
        let fits = rows <= MAX_SEQUENCES
            && (step.prefills.is_empty() && step.logit_rows.is_none())
            && flash::knows(config.head_dim(), group)
            && rows * (config.hidden_size + 8) * 2 <= SHARED_BYTES
            && matrices.map(|linear| linear.floats()).all(|matrix| {
                matrix.is_some_and(|matrix| {
                    matrix.is_contiguous()
                        && matrix.dims()[0].is_multiple_of(TILE)
                        && matrix.dims()[1].is_multiple_of(CHUNK)
                })
            });
        if !fits {
            return Ok(None);
        }
        let multiprocessors = num_multiprocessors(embeddings.device())?.unsigned_abs();
        Ok(Some(Few { decoder, decodes, step, counters, kernels, multiprocessors }))
    }

    /// Writes the step to the cache; returns the logits of all rows, `[rows, vocab]` in the model's type.
    pub fn forward(&self, cache: &DeviceCache) -> Result<Tensor> {
        let Decoder { config, layers, embed_tokens, norm, lm_head, cos, sin } = self.decoder;
        let (rows, hidden, dim) = (self.decodes.len(), config.hidden_size, config.head_dim());
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (dtype, device) = (embed_tokens.dtype(), embed_tokens.device());
        // All memory is taken before the first kernel and given back after the last: what is between kernels keeps the next one from
        // beginning early.
        let tensor = |width: usize| fresh(&[rows, width], dtype, device);
        let (embedded, mut sum, mut other_sum, delta) =
            (tensor(hidden)?, tensor(hidden)?, tensor(hidden)?, tensor(hidden)?);
        let qkv = fresh(&[rows, heads + 2 * kv_heads, dim], dtype, device)?;
        let attended = fresh(&[rows, heads, dim], dtype, device)?;
        let inner = tensor(config.intermediate_size)?;
        let logits = tensor(config.vocab_size)?;
        let len = flash::scratch_len(self.decodes.longest(), rows, kv_heads, dim);
        let scratch = fresh(&[len], DType::F32, device)?;
        let workspace = Workspace { kernels: self.kernels, counters: self.counters, scratch: &scratch };

        self.look_up(embed_tokens, &self.step.token_ids, &embedded)?;
        let mut x = embedded;
        for (index, layer) in layers.iter().enumerate() {
            let own_delta = (index > 0).then_some((&delta, &sum));
            let of = Of::Normed { x: &x, delta: own_delta, norm: layer.input_layernorm.parts() };
            self.product(layer.qkv_proj.floats(), of, false, &qkv)?;
            if index > 0 {
                std::mem::swap(&mut x, &mut sum);
                std::mem::swap(&mut sum, &mut other_sum);
            }
            let unturned =
                Unturned { bias: layer.qkv_proj.bias(), turn: (cos, sin), slots: &self.step.slots };
            flash::decode(workspace, &qkv, Some(unturned), &cache.layers[index], self.decodes, &attended)?;
            self.product(layer.o_proj.floats(), Of::Rows(&attended.flatten_from(1)?), false, &delta)?;
            let norm = layer.post_attention_layernorm.parts();
            let of = Of::Normed { x: &x, delta: Some((&delta, &sum)), norm };
            self.product(layer.gate_up_proj.floats(), of, true, &inner)?;
            std::mem::swap(&mut x, &mut sum);
            std::mem::swap(&mut sum, &mut other_sum);
            self.product(layer.down_proj.floats(), Of::Rows(&inner), false, &delta)?;
        }
        let own_delta = (!layers.is_empty()).then_some((&delta, &sum));
        let of = Of::Normed { x: &x, delta: own_delta, norm: norm.parts() };
        self.product(lm_head.floats(), of, false, &logits)?;
        Ok(logits)
    }

    /// `out` `[rows, width]`: rows of `table` `[n, width]`.
    fn look_up(&self, table: &Tensor, ids: &Tensor, out: &Tensor) -> Result<()> {
        // Sixteen bytes at a time.
        let width = table.dim(1)? / 8;
        ensure(
            table.is_contiguous() && table.layout().start_offset().is_multiple_of(8),
            "rows of a table that is not whole",
        )?;
        let arguments = [address(table)?, address(ids)?, address(out)?, count(width)?.into()];
        let grid = Grid { begins_early: true, ..Grid::rows(count(out.dim(0)?)?, 256) };
        // SAFETY: ids are those of tokens that there are.
        unsafe { self.kernels.launch("look_up", out, grid, &arguments) }
    }

    /// `out` of `weight` `[outputs, inputs]`; of gates and ups `silu(gate) x up` where `is_gated`.
    fn product(&self, weight: Option<&Tensor>, of: Of<'_>, is_gated: bool, out: &Tensor) -> Result<()> {
        let Some(weight) = weight else { return ensure(false, "a product of quantised weights") };
        let (outputs, inputs) = weight.dims2()?;
        let rows = out.dim(0)?;
        let (x, delta, norm, sum, eps) = match of {
            Of::Rows(x) => (x, None, None, None, 0.0),
            Of::Normed { x, delta, norm: (norm, eps) } => {
                (x, delta.map(|both| both.0), Some(norm), delta.map(|both| both.1), eps as f32)
            }
        };
        let width = if is_gated { outputs / 2 } else { outputs };
        let rows_fit = |x: &Tensor| x.dims() == [rows, inputs] && x.is_contiguous();
        let fits = rows_fit(x)
            && [delta, sum].into_iter().flatten().all(rows_fit)
            && norm.is_none_or(|norm| norm.dims() == [inputs])
            && out.elem_count() == rows * width;
        ensure(fits, "a product of other rows")?;
        let words =
            |low: usize, high: u32| Ok::<_, ModelError>(u64::from(count(low)?) | u64::from(high) << 32);
        let product = Argument::Longs(vec![
            start_of(weight)?,
            start_of(x)?,
            start_of(out)?,
            start_or_none(delta)?,
            start_or_none(norm)?,
            start_or_none(sum)?,
            words(rows, count(outputs)?)?,
            words(inputs, eps.to_bits())?,
        ]);
        // Products without a norm have half as many blocks, of twice as many warps: most have few outputs.
        let (name, warps, tile) = match (norm, is_gated) {
            (None, _) => ("product", 16, TILE),
            (Some(_), false) => ("normed_product", 8, TILE),
            (Some(_), true) => ("normed_gated_product", 8, TILE / 2),
        };
        let most = self.multiprocessors * 16 / warps;
        let shared_bytes = if norm.is_some() { count(rows * (inputs + 8) * 2)? } else { 0 };
        let grid = Grid {
            shared_bytes,
            begins_early: true,
            ..Grid::rows(count(width / tile)?.min(most), warps * 32)
        };
        let name = super::fused::named(name, out);
        // SAFETY: sizes are those of the tensors, and multiples of what the kernels take at a time.
        unsafe { self.kernels.launch(&name, out, grid, &[product]) }
    }
}
