//! The Qwen2 decoder over the paged cache.
//!
//! Called by [`super::tinyllava`]. Prefill and decode are the same computation: rows of several sequences, each at
//! its own position.

use super::{
    KvCache, Result, StepInput, Tap, Tensor, VISUAL_TOKEN,
    attention::{CacheLayout, Heads, paged_attention, write_cache},
    config::Qwen2Config,
    kernels::activation::silu_mul,
    layers::{Linear, Loader, RmsNorm, rows, with_slice},
};

#[derive(Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    post_attention_layernorm: RmsNorm,
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

/// The language model with its head.
#[derive(Debug)]
pub struct Decoder {
    config: Qwen2Config,
    /// Embeddings, and the head as well where both are tied.
    embed_tokens: Linear,
    layers: Vec<Layer>,
    norm: RmsNorm,
    lm_head: Option<Linear>,
    rotary: Rotary,
}

impl Decoder {
    /// From `language_model`; positions up to `context`.
    pub fn load(loader: &Loader<'_>, config: &Qwen2Config, context: usize) -> Result<Self> {
        let model = loader.pp("model");
        let layers = model.pp("layers");
        let lm_head =
            (!config.tie_word_embeddings).then(|| Linear::load(&loader.pp("lm_head"), false)).transpose()?;
        Ok(Decoder {
            embed_tokens: Linear::load(&model.pp("embed_tokens"), false)?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::load(&layers.pp(i), config))
                .collect::<Result<_>>()?,
            norm: RmsNorm::load(&model.pp("norm"), config.rms_norm_eps)?,
            lm_head,
            rotary: Rotary::new(config.head_dim(), config.rope_theta, context),
            config: config.clone(),
        })
    }

    /// Writes the step to `cache`; returns the logits of its `logit_rows`, `[logit_rows, vocab]`.
    pub fn forward(&self, input: &StepInput, cache: &mut KvCache, tap: &mut dyn Tap) -> Result<Tensor> {
        let mut x = self.embed(input)?;
        tap.tensor("inputs_embeds", None, &x);
        let layout = CacheLayout::of(cache);
        for (index, layer) in self.layers.iter().enumerate() {
            tap.tensor("llm_hidden", Some(index), &x);
            let normed = layer.input_layernorm.forward(&x)?;
            let attended = with_slice(&normed, |x| {
                let (mut q, mut k) = (layer.q_proj.forward_slice(x), layer.k_proj.forward_slice(x));
                let v = layer.v_proj.forward_slice(x);
                self.rotary.apply(&mut q, &input.positions, self.config.num_attention_heads);
                self.rotary.apply(&mut k, &input.positions, self.config.num_key_value_heads);
                write_cache(&mut cache.layers[index], input, &k, &v, layout);
                paged_attention(&q, &cache.layers[index], input, self.heads(), layout)
            })?;
            x = (x + rows(layer.o_proj.forward_slice(&attended), self.config.hidden_size)?)?;
            x = (&x + layer.mlp(&layer.post_attention_layernorm.forward(&x)?)?)?;
        }
        self.logits(&x, &input.logit_rows, tap)
    }

    fn heads(&self) -> Heads {
        Heads {
            num_heads: self.config.num_attention_heads,
            num_kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim(),
        }
    }

    /// `[rows, hidden]`: embeddings of the tokens, and the visual ones where they stand.
    fn embed(&self, input: &StepInput) -> Result<Tensor> {
        let hidden = self.config.hidden_size;
        let mut embedded = vec![0.0; input.token_ids.len() * hidden];
        for (row, &id) in embedded.chunks_mut(hidden).zip(&input.token_ids) {
            if id != VISUAL_TOKEN {
                self.embed_tokens.weight().copy_row(id as usize, row);
            }
        }
        for visual in &input.visuals {
            let place = visual.rows.start * hidden..visual.rows.end * hidden;
            with_slice(&visual.embeddings, |x| embedded[place].copy_from_slice(x))?;
        }
        rows(embedded, hidden)
    }

    /// The last norm and the head, for the wanted rows only.
    fn logits(&self, x: &Tensor, wanted: &[usize], tap: &mut dyn Tap) -> Result<Tensor> {
        let hidden = self.config.hidden_size;
        let picked = with_slice(x, |x| {
            wanted.iter().flat_map(|&row| &x[row * hidden..][..hidden]).copied().collect()
        })?;
        let normed = self.norm.forward(&rows(picked, hidden)?)?;
        tap.tensor("llm_last_hidden", None, &normed);
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens).forward(&normed)
    }
}

impl Layer {
    fn load(loader: &Loader<'_>, config: &Qwen2Config) -> Result<Self> {
        let (attention, mlp) = (loader.pp("self_attn"), loader.pp("mlp"));
        Ok(Layer {
            input_layernorm: RmsNorm::load(&loader.pp("input_layernorm"), config.rms_norm_eps)?,
            q_proj: Linear::load(&attention.pp("q_proj"), true)?,
            k_proj: Linear::load(&attention.pp("k_proj"), true)?,
            v_proj: Linear::load(&attention.pp("v_proj"), true)?,
            o_proj: Linear::load(&attention.pp("o_proj"), false)?,
            post_attention_layernorm: RmsNorm::load(
                &loader.pp("post_attention_layernorm"),
                config.rms_norm_eps,
            )?,
            gate_proj: Linear::load(&mlp.pp("gate_proj"), false)?,
            up_proj: Linear::load(&mlp.pp("up_proj"), false)?,
            down_proj: Linear::load(&mlp.pp("down_proj"), false)?,
        })
    }

    fn mlp(&self, x: &Tensor) -> Result<Tensor> {
        let inner =
            with_slice(x, |x| silu_mul(self.gate_proj.forward_slice(x), &self.up_proj.forward_slice(x)))?;
        rows(self.down_proj.forward_slice(&inner), self.down_proj.weight().num_outputs())
    }
}

/// Rotary positions by halves: element `i` turns with element `i + dim / 2`.
#[derive(Debug)]
struct Rotary {
    /// `[context, dim / 2]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    head_dim: usize,
}

impl Rotary {
    fn new(head_dim: usize, theta: f64, context: usize) -> Self {
        let half = head_dim / 2;
        let exponent = |i: usize| (2 * i) as f32 / head_dim as f32;
        let inverse: Vec<f32> =
            (0..half).map(|i| 1.0 / (theta.powf(f64::from(exponent(i))) as f32)).collect();
        let angles =
            || (0..context).flat_map(|position| inverse.iter().map(move |inverse| position as f32 * inverse));
        // Through f64: the accuracy of f32 functions differs between platforms.
        let cos = angles().map(|angle| f64::from(angle).cos() as f32).collect();
        let sin = angles().map(|angle| f64::from(angle).sin() as f32).collect();
        Rotary { cos, sin, head_dim }
    }

    /// Turns `[rows, heads x dim]` by the rows' positions.
    fn apply(&self, x: &mut [f32], positions: &[u32], num_heads: usize) {
        let half = self.head_dim / 2;
        for (row, &position) in x.chunks_mut(num_heads * self.head_dim).zip(positions) {
            let (cos, sin) = (
                &self.cos[position as usize * half..][..half],
                &self.sin[position as usize * half..][..half],
            );
            for head in row.chunks_mut(self.head_dim) {
                let (low, high) = head.split_at_mut(half);
                for i in 0..half {
                    let (a, b) = (low[i], high[i]);
                    low[i] = a * cos[i] - b * sin[i];
                    high[i] = b * cos[i] + a * sin[i];
                }
            }
        }
    }
}
