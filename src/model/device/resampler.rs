//! The connector on a device. See [`super::super::resampler`] for what it is.
//!
//! Called by [`super`] once a video's frames are all encoded.

use std::sync::{Mutex, PoisonError};

use super::{
    super::{
        Result, Tap, Tensor,
        config::{ConnectorConfig, ConnectorKind},
        layout::RESAMPLER_INNER,
        resampler::{LAYER_NORM_EPS, chunk_len, position_table},
    },
    attention::attend,
    layers::{LayerNorm, Linear, Loader, show},
};

/// 8 heads of 64, whatever the model's width.
const NUM_HEADS: usize = 8;

#[derive(Debug)]
struct Layer {
    norm_media: LayerNorm,
    norm_latents: LayerNorm,
    to_q: Linear,
    /// Keys, then values.
    to_kv: Linear,
    to_out: Linear,
    feed_forward_norm: LayerNorm,
    feed_forward_in: Linear,
    feed_forward_out: Linear,
}

/// Group or naive resampler.
#[derive(Debug)]
pub struct Resampler {
    config: ConnectorConfig,
    linear: Linear,
    /// `[queries a chunk, dim]`
    latents: Tensor,
    layers: Vec<Layer>,
    norm: LayerNorm,
    /// The longest table of positions so far, `[count, dim]`.
    positions: Mutex<Tensor>,
}

impl Resampler {
    /// From `connector._connector`.
    pub fn load(loader: &Loader<'_>, config: &ConnectorConfig) -> Result<Self> {
        let layers = loader.pp("layers");
        let latents = loader.tensor("latents")?;
        Ok(Resampler {
            positions: Mutex::new(latents.narrow(0, 0, 0)?),
            linear: Linear::load(&loader.pp("linear"), true)?,
            latents,
            layers: (0..config.num_resampler_layers)
                .map(|i| Layer::load(&layers.pp(i)))
                .collect::<Result<_>>()?,
            norm: LayerNorm::load(&loader.pp("norm"), LAYER_NORM_EPS)?,
            config: config.clone(),
        })
    }

    /// `features` `[n, vision_hidden]` to `[num_queries, dim]`.
    pub fn forward(&self, features: &Tensor, tap: &mut dyn Tap) -> Result<Tensor> {
        let media = self.linear.forward(features)?;
        show(tap, "connector_linear", None, &media)?;
        let num_features = media.dim(0)?;
        match self.config.kind {
            ConnectorKind::Naive => {
                let placed = (media + self.positions(num_features)?)?;
                let out = self.resample(&placed.unsqueeze(0)?, tap)?;
                show(tap, "connector_no_pos", None, &out)?;
                Ok(out)
            }
            ConnectorKind::Group => {
                let out = self.chunks(&media, tap)?;
                show(tap, "connector_no_pos", None, &out)?;
                out + self.positions(self.config.num_queries)?
            }
        }
    }

    /// Chunks of equal length run together; there are at most two lengths, the longer one first.
    fn chunks(&self, media: &Tensor, tap: &mut dyn Tap) -> Result<Tensor> {
        let (total, dim) = media.dims2()?;
        let groups = self.config.group;
        let lens: Vec<usize> = (0..groups).map(|index| chunk_len(total, groups, index)).collect();
        let (mut start, mut parts) = (0, Vec::new());
        for alike in lens.chunk_by(|a, b| a == b) {
            let (count, len) = (alike.len(), alike[0]);
            let part = media.narrow(0, start, count * len)?.reshape((count, len, dim))?;
            parts.push(if start == 0 { self.resample(&part, tap)? } else { self.resample(&part, &mut ())? });
            start += count * len;
        }
        Tensor::cat(&parts, 0)
    }

    /// Chunks of features `[chunks, len, dim]` through all layers: `[chunks x queries a chunk, dim]`. Each has latents of
    /// its own and does not see the others.
    fn resample(&self, media: &Tensor, tap: &mut dyn Tap) -> Result<Tensor> {
        let mut latents = self.latents.unsqueeze(0)?.repeat((media.dim(0)?, 1, 1))?;
        for (index, layer) in self.layers.iter().enumerate() {
            let attended = layer.attend(media, &latents)?;
            latents = (latents + &attended)?;
            let fed = layer.feed_forward(&latents)?;
            latents = (latents + &fed)?;
            if index == 0 {
                show(tap, "connector_g0_l0_attn_out", None, &attended.get(0)?)?;
                show(tap, "connector_g0_l0_ff_out", None, &fed.get(0)?)?;
                show(tap, "connector_g0_l0_latents", None, &latents.get(0)?)?;
            }
        }
        self.norm.forward(&latents)?.flatten_to(1)
    }

    /// `[count, dim]`. The table is kept: to compute it takes a CPU half as long as all else takes a GPU.
    fn positions(&self, count: usize) -> Result<Tensor> {
        let mut kept = self.positions.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.dim(0)? < count {
            let dim = self.config.hidden_size;
            let table = Tensor::from_vec(position_table(count, dim), (count, dim), self.latents.device())?;
            *kept = table.to_dtype(self.latents.dtype())?;
        }
        kept.narrow(0, 0, count)
    }
}

impl Layer {
    fn load(loader: &Loader<'_>) -> Result<Self> {
        let (attention, feed_forward) = (loader.pp(0), loader.pp(1));
        Ok(Layer {
            norm_media: LayerNorm::load(&attention.pp("norm_media"), LAYER_NORM_EPS)?,
            norm_latents: LayerNorm::load(&attention.pp("norm_latents"), LAYER_NORM_EPS)?,
            to_q: Linear::load(&attention.pp("to_q"), false)?,
            to_kv: Linear::load(&attention.pp("to_kv"), false)?,
            to_out: Linear::load(&attention.pp("to_out"), false)?,
            feed_forward_norm: LayerNorm::load(&feed_forward.pp(0), LAYER_NORM_EPS)?,
            feed_forward_in: Linear::load(&feed_forward.pp(1), false)?,
            feed_forward_out: Linear::load(&feed_forward.pp(3), false)?,
        })
    }

    /// The latents of each chunk look at its media and at themselves.
    fn attend(&self, media: &Tensor, latents: &Tensor) -> Result<Tensor> {
        let latents = self.norm_latents.forward(latents)?;
        let queries = self.to_q.forward(&latents)?;
        let context = Tensor::cat(&[&self.norm_media.forward(media)?, &latents], 1)?;
        let key_values = self.to_kv.forward(&context)?;
        let keys = heads(&key_values.narrow(2, 0, RESAMPLER_INNER)?)?;
        let values = heads(&key_values.narrow(2, RESAMPLER_INNER, RESAMPLER_INNER)?)?;
        let attended = attend(&heads(&queries)?, &keys, &values)?;
        self.to_out.forward(&attended.transpose(1, 2)?.flatten_from(2)?)
    }

    fn feed_forward(&self, latents: &Tensor) -> Result<Tensor> {
        let inner = self.feed_forward_in.forward(&self.feed_forward_norm.forward(latents)?)?;
        self.feed_forward_out.forward(&inner.gelu_erf()?)
    }
}

/// `[chunks, n, heads x head_dim]` to `[chunks, heads, n, head_dim]`.
fn heads(x: &Tensor) -> Result<Tensor> {
    let (chunks, n, width) = x.dims3()?;
    x.reshape((chunks, n, NUM_HEADS, width / NUM_HEADS))?.transpose(1, 2)
}
