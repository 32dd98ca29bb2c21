//! The Qwen2 decoder over the paged cache.
//!
//! Called by [`super::tinyllava`]. Prefill and decode are the same computation: rows of several sequences, each at
//! its own position.

use super::{
    KvCache, Result, StepInput, Tap, Tensor, VISUAL_TOKEN,
    attention::{CacheLayout, Heads, Projected, paged_attention, write_cache},
    config::Qwen2Config,
    kernels::activation::silu_mul,
    layers::{Linear, Loader, RmsNorm, rows, show, with_slice},
    weights::Rows,
};

#[derive(Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    /// `[q | k | v]`
    qkv_proj: Linear,
    o_proj: Linear,
    post_attention_layernorm: RmsNorm,
    /// `[gate | up]`
    gate_up_proj: Linear,
    down_proj: Linear,
}

/// The language model with its head.
#[derive(Debug)]
pub struct Decoder {
    config: Qwen2Config,
    embed_tokens: Rows,
    layers: Vec<Layer>,
    norm: RmsNorm,
    /// Made of the embeddings where both are tied.
    lm_head: Linear,
    rotary: Rotary,
}

impl Decoder {
    /// From `language_model`; positions up to `context`.
    pub fn load(loader: &Loader<'_>, config: &Qwen2Config, context: usize) -> Result<Self> {
        let model = loader.pp("model");
        let layers = model.pp("layers");
        let (own_head, embeddings) = (loader.pp("lm_head"), model.pp("embed_tokens"));
        let is_tied = !own_head.contains("weight");
        Ok(Decoder {
            lm_head: Linear::load(if is_tied { &embeddings } else { &own_head }, false)?,
            embed_tokens: embeddings.table(config.tie_word_embeddings)?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::load(&layers.pp(i), config))
                .collect::<Result<_>>()?,
            norm: RmsNorm::load(&model.pp("norm"), config.rms_norm_eps)?,
            rotary: Rotary::new(config.head_dim(), config.rope_theta, context),
            config: config.clone(),
        })
    }

    /// Writes the step to `cache`; returns the logits of its `logit_rows`, `[logit_rows, vocab]`.
    pub fn forward(&self, input: &StepInput, cache: &mut KvCache, tap: &mut dyn Tap) -> Result<Tensor> {
        let hidden = self.config.hidden_size;
        let mut x = self.embed(input)?;
        show(tap, "inputs_embeds", None, &x, hidden)?;
        let layout = CacheLayout::of(cache);
        let (heads, kv_width) = (self.heads(), layout.num_kv_heads * layout.head_dim);
        let stride = heads.width() + 2 * kv_width;
        for (index, layer) in self.layers.iter().enumerate() {
            show(tap, "llm_hidden", Some(index), &x, hidden)?;
            let mut qkv = layer.qkv_proj.forward(&layer.input_layernorm.forward(&x));
            self.rotary.apply(&mut qkv, stride, &input.positions, heads.num_heads + heads.num_kv_heads);
            let part = |offset| Projected::new(&qkv, stride, offset);
            let (keys, values) = (part(heads.width()), part(heads.width() + kv_width));
            write_cache(&mut cache.layers[index], input, keys, values, layout);
            let attended = paged_attention(part(0), &cache.layers[index], input, heads, layout);
            layer.o_proj.forward_add(&attended, &mut x);
            let inner = layer.gate_up_proj.forward(&layer.post_attention_layernorm.forward(&x));
            layer.down_proj.forward_add(&silu_mul(&inner, self.config.intermediate_size), &mut x);
        }
        self.logits(&x, &input.logit_rows, tap)
    }

    /// Bytes of all matrices a step reads.
    pub fn num_bytes(&self) -> usize {
        let layer = |layer: &Layer| {
            let matrices = [&layer.qkv_proj, &layer.o_proj, &layer.gate_up_proj, &layer.down_proj];
            matrices.map(|linear| linear.weight().num_bytes()).iter().sum::<usize>()
        };
        self.lm_head.weight().num_bytes() + self.layers.iter().map(layer).sum::<usize>()
    }

    fn heads(&self) -> Heads {
        Heads {
            num_heads: self.config.num_attention_heads,
            num_kv_heads: self.config.num_key_value_heads,
            head_dim: self.config.head_dim(),
        }
    }

    /// `[rows, hidden]`: embeddings of the tokens, and the visual ones where they stand.
    fn embed(&self, input: &StepInput) -> Result<Vec<f32>> {
        let hidden = self.config.hidden_size;
        let mut embedded = vec![0.0; input.token_ids.len() * hidden];
        for (row, &id) in embedded.chunks_mut(hidden).zip(&input.token_ids) {
            if id != VISUAL_TOKEN {
                self.embed_tokens.copy_row(id as usize, row);
            }
        }
        for visual in &input.visuals {
            let place = visual.rows.start * hidden..visual.rows.end * hidden;
            with_slice(&visual.embeddings, |x| embedded[place].copy_from_slice(x))?;
        }
        Ok(embedded)
    }

    /// The last norm and the head, for the wanted rows only.
    fn logits(&self, x: &[f32], wanted: &[usize], tap: &mut dyn Tap) -> Result<Tensor> {
        let hidden = self.config.hidden_size;
        let picked: Vec<f32> = wanted.iter().flat_map(|&row| &x[row * hidden..][..hidden]).copied().collect();
        let normed = self.norm.forward(&picked);
        show(tap, "llm_last_hidden", None, &normed, hidden)?;
        rows(self.lm_head.forward(&normed), self.config.vocab_size)
    }
}

impl Layer {
    fn load(loader: &Loader<'_>, config: &Qwen2Config) -> Result<Self> {
        let (attention, mlp) = (loader.pp("self_attn"), loader.pp("mlp"));
        Ok(Layer {
            input_layernorm: RmsNorm::load(&loader.pp("input_layernorm"), config.rms_norm_eps)?,
            qkv_proj: Linear::load_stacked(
                &["q_proj", "k_proj", "v_proj"].map(|name| attention.pp(name)),
                true,
            )?,
            o_proj: Linear::load(&attention.pp("o_proj"), false)?,
            post_attention_layernorm: RmsNorm::load(
                &loader.pp("post_attention_layernorm"),
                config.rms_norm_eps,
            )?,
            gate_up_proj: Linear::load_stacked(&["gate_proj", "up_proj"].map(|name| mlp.pp(name)), false)?,
            down_proj: Linear::load(&mlp.pp("down_proj"), false)?,
        })
    }
}

/// Cosine and sine of every position, `[context, head_dim / 2]` each.
pub fn rotary_tables(head_dim: usize, theta: f64, context: usize) -> (Vec<f32>, Vec<f32>) {
    let half = head_dim / 2;
    let exponent = |i: usize| (2 * i) as f32 / head_dim as f32;
    let inverse: Vec<f32> = (0..half).map(|i| 1.0 / (theta.powf(f64::from(exponent(i))) as f32)).collect();
    let angles =
        || (0..context).flat_map(|position| inverse.iter().map(move |inverse| position as f32 * inverse));
    // Through f64: the accuracy of f32 functions differs between platforms.
    let cos = angles().map(|angle| f64::from(angle).cos() as f32).collect();
    let sin = angles().map(|angle| f64::from(angle).sin() as f32).collect();
    (cos, sin)
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
        let (cos, sin) = rotary_tables(head_dim, theta, context);
        Rotary { cos, sin, head_dim }
    }

    /// Turns the first `num_heads` heads of `[rows, stride]` by the rows' positions.
    fn apply(&self, x: &mut [f32], stride: usize, positions: &[u32], num_heads: usize) {
        let half = self.head_dim / 2;
        for (row, &position) in x.chunks_mut(stride).zip(positions) {
            let (cos, sin) = (
                &self.cos[position as usize * half..][..half],
                &self.sin[position as usize * half..][..half],
            );
            for head in row[..num_heads * self.head_dim].chunks_mut(self.head_dim) {
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
