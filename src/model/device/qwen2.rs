//! The Qwen2 decoder on a device, over a paged cache there.
//!
//! Called by [`super`]. See [`super::super::qwen2`] for what it is.

use candle_core::{DType, Device};

use super::{
    super::{Result, Tap, Tensor, VisualRows, config::Qwen2Config, layers::Bits, qwen2::rotary_tables},
    DeviceCache,
    attention::{PagedAttention, Projected, Rotary, attend_step},
    layers::{Linear, Loader, RmsNorm, show},
    ops,
    step::Step,
};

/// One of the decoder's.
#[derive(Debug)]
pub struct Layer {
    pub input_layernorm: RmsNorm,
    /// `[q | k | v]`
    pub qkv_proj: Linear,
    pub o_proj: Linear,
    pub post_attention_layernorm: RmsNorm,
    /// `[gate | up]`
    pub gate_up_proj: Linear,
    pub down_proj: Linear,
}

/// The language model with its head.
#[derive(Debug)]
pub struct Decoder {
    pub config: Qwen2Config,
    /// `[vocab, hidden]`, always floats: rows are looked up.
    pub embed_tokens: Tensor,
    pub layers: Vec<Layer>,
    pub norm: RmsNorm,
    /// The embeddings themselves where both are tied and not quantised.
    pub lm_head: Linear,
    /// `[context, head_dim / 2]` each, as [`ops::rotate`] wants them.
    pub cos: Tensor,
    pub sin: Tensor,
}

impl Decoder {
    /// From `language_model`; positions up to `context`. Where the layers are quantised the head is, to 8 bits.
    pub fn load(loader: &Loader<'_>, config: &Qwen2Config, context: usize) -> Result<Self> {
        let model = loader.pp("model");
        let layers = model.pp("layers");
        let embeddings = model.pp("embed_tokens");
        let embed_tokens = embeddings.tensor("weight")?;
        let lm_head = match (loader.quant, config.tie_word_embeddings) {
            (None, true) => Linear::of(embed_tokens.clone()),
            (quant, is_tied) => {
                let head = if is_tied { embeddings } else { loader.pp("lm_head") };
                Linear::load(&head.quantised(quant.map(|_| Bits::Eight)), false)?
            }
        };
        let (cos, sin) = rotary_tables(config.head_dim(), config.rope_theta, context);
        let kind = ops::rotary_dtype(loader.device, loader.dtype);
        let table = |values| {
            Tensor::from_vec(values, (context, config.head_dim() / 2), loader.device)?.to_dtype(kind)
        };
        Ok(Decoder {
            embed_tokens,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::load(&layers.pp(i), config))
                .collect::<Result<_>>()?,
            norm: RmsNorm::load(&model.pp("norm"), config.rms_norm_eps)?,
            lm_head,
            cos: table(cos)?,
            sin: table(sin)?,
            config: config.clone(),
        })
    }

    /// Writes the step to the cache; returns the logits of its `logit_rows`, `[logit_rows, vocab]` in the model's type.
    pub fn forward(
        &self,
        visuals: &[VisualRows],
        step: &Step,
        (paged, cache): (&dyn PagedAttention, &DeviceCache),
        tap: &mut dyn Tap,
    ) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if !tap.is_watching()
            && visuals.is_empty()
            && let Some(few) = super::cuda::decode::Few::of(self, step, paged)?
        {
            return few.forward(cache);
        }
        let mut x = self.embed(visuals, step)?;
        show(tap, "inputs_embeds", None, &x)?;
        let rotary = Rotary::new(self.cos.clone(), self.sin.clone());
        // What the layer before has yet to add: sums are taken together with the norm that follows.
        let mut delta: Option<Tensor> = None;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed;
            (x, normed) = match &delta {
                None => (x.clone(), layer.input_layernorm.forward(&x)?),
                Some(delta) => layer.input_layernorm.add_forward(&x, delta)?,
            };
            show(tap, "llm_hidden", Some(index), &x)?;
            let projected = self.project(layer, &normed)?;
            let attended = attend_step(paged, &cache.layers[index], &projected, &rotary, step)?;
            let attended = layer.o_proj.forward(&attended.flatten_from(1)?)?;
            let normed;
            (x, normed) = layer.post_attention_layernorm.add_forward(&x, &attended)?;
            let inner = ops::silu_mul(&layer.gate_up_proj.forward(&normed)?)?;
            delta = Some(layer.down_proj.forward(&inner)?);
        }
        if let Some(delta) = delta {
            x = (x + delta)?;
        }
        self.logits(&x, step, tap)
    }

    /// The same with all matrices as floats.
    pub fn unpacked(self, device: &Device, dtype: DType) -> Result<Self> {
        let linear = |linear: Linear| linear.unpacked(device, dtype);
        let layer = |layer: Layer| {
            Ok(Layer {
                qkv_proj: linear(layer.qkv_proj)?,
                o_proj: linear(layer.o_proj)?,
                gate_up_proj: linear(layer.gate_up_proj)?,
                down_proj: linear(layer.down_proj)?,
                ..layer
            })
        };
        let layers = self.layers.into_iter().map(layer).collect::<Result<_>>()?;
        Ok(Decoder { layers, lm_head: linear(self.lm_head)?, ..self })
    }

    /// Bytes of all matrices a step reads.
    pub fn num_bytes(&self) -> usize {
        let layer = |layer: &Layer| layer.matrices().map(Linear::num_bytes).iter().sum::<usize>();
        self.lm_head.num_bytes() + self.layers.iter().map(layer).sum::<usize>()
    }

    /// `[rows, hidden]`: embeddings of the tokens, and the visual ones where they stand.
    fn embed(&self, visuals: &[VisualRows], step: &Step) -> Result<Tensor> {
        let embedded = ops::gather_rows(&self.embed_tokens, &step.token_ids)?;
        for visual in visuals {
            embedded.slice_set(&visual.embeddings.contiguous()?, 0, visual.rows.start)?;
        }
        Ok(embedded)
    }

    /// Queries, keys and values of normed rows `[rows, hidden]`.
    fn project(&self, layer: &Layer, normed: &Tensor) -> Result<Projected> {
        let (num_heads, num_kv_heads) = (self.config.num_attention_heads, self.config.num_key_value_heads);
        let qkv = layer.qkv_proj.product(normed)?;
        let qkv = qkv.reshape((qkv.dim(0)?, num_heads + 2 * num_kv_heads, self.config.head_dim()))?;
        Ok(Projected { qkv, bias: layer.qkv_proj.bias().cloned(), num_heads, num_kv_heads })
    }

    /// The last norm and the head, for the wanted rows only.
    fn logits(&self, x: &Tensor, step: &Step, tap: &mut dyn Tap) -> Result<Tensor> {
        let wanted = match &step.logit_rows {
            None => x.clone(),
            Some(rows) if rows.dim(0)? == 0 => {
                return Tensor::zeros((0, self.config.vocab_size), DType::F32, &Device::Cpu);
            }
            Some(rows) => ops::gather_rows(x, rows)?,
        };
        let normed = self.norm.forward(&wanted)?;
        show(tap, "llm_last_hidden", None, &normed)?;
        self.lm_head.forward(&normed)
    }
}

impl Layer {
    /// What a step reads most of.
    pub fn matrices(&self) -> [&Linear; 4] {
        [&self.qkv_proj, &self.o_proj, &self.gate_up_proj, &self.down_proj]
    }

    fn load(loader: &Loader<'_>, config: &Qwen2Config) -> Result<Self> {
        let (attention, mlp) = (loader.pp("self_attn"), loader.pp("mlp"));
        let norm = |name: &str| RmsNorm::load(&loader.pp(name), config.rms_norm_eps);
        let qkv = ["q_proj", "k_proj", "v_proj"].map(|name| attention.pp(name));
        Ok(Layer {
            input_layernorm: norm("input_layernorm")?,
            qkv_proj: Linear::load_stacked(&qkv, true)?,
            o_proj: Linear::load(&attention.pp("o_proj"), false)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            gate_up_proj: Linear::load_stacked(&["gate_proj", "up_proj"].map(|name| mlp.pp(name)), false)?,
            down_proj: Linear::load(&mlp.pp("down_proj"), false)?,
        })
    }
}
