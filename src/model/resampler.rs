//! The connector: a video's patch features to a fixed number of visual tokens.
//!
//! Called by [`super::tinyllava`] once a video's frames are all encoded. Two kinds with the same tensors: the group
//! resampler works on consecutive chunks of features that do not see each other, the naive one on all at once.

use half::f16;

use super::{
    Result, Tap, Tensor,
    attention::{Heads, full_attention},
    config::{ConnectorConfig, ConnectorKind},
    kernels::activation::gelu_erf_in_place,
    layers::{LayerNorm, Linear, Loader, rows, with_slice},
    layout::RESAMPLER_INNER,
};

const LAYER_NORM_EPS: f64 = 1e-5;
/// 8 heads of 64, whatever the model's width.
const HEADS: Heads = Heads { num_heads: 8, num_kv_heads: 8, head_dim: RESAMPLER_INNER / 8 };

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
}

impl Resampler {
    /// From `connector._connector`.
    pub fn load(loader: &Loader<'_>, config: &ConnectorConfig) -> Result<Self> {
        let layers = loader.pp("layers");
        Ok(Resampler {
            linear: Linear::load(&loader.pp("linear"), true)?,
            latents: rows(loader.vector("latents")?, config.hidden_size)?,
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
        tap.tensor("connector_linear", None, &media);
        let num_features = media.dim(0)?;
        match self.config.kind {
            ConnectorKind::Naive => {
                let positions = position_table(num_features, self.config.hidden_size)?;
                let out = self.resample(&(media + positions)?, 0, tap)?;
                tap.tensor("connector_no_pos", None, &out);
                Ok(out)
            }
            ConnectorKind::Group => {
                let mut start = 0;
                let mut chunks = Vec::new();
                for group in 0..self.config.group {
                    let len = chunk_len(num_features, self.config.group, group);
                    chunks.push(self.resample(&media.narrow(0, start, len)?, group, tap)?);
                    start += len;
                }
                let out = Tensor::cat(&chunks, 0)?;
                tap.tensor("connector_no_pos", None, &out);
                out + position_table(self.config.num_queries, self.config.hidden_size)?
            }
        }
    }

    /// One chunk of features through all layers: `[queries a chunk, dim]`.
    fn resample(&self, media: &Tensor, group: usize, tap: &mut dyn Tap) -> Result<Tensor> {
        let mut latents = self.latents.clone();
        for (index, layer) in self.layers.iter().enumerate() {
            let attended = layer.attend(media, &latents)?;
            latents = (&attended + &latents)?;
            let fed = layer.feed_forward(&latents)?;
            latents = (&fed + &latents)?;
            if group == 0 && index == 0 {
                tap.tensor("connector_g0_l0_attn_out", None, &attended);
                tap.tensor("connector_g0_l0_ff_out", None, &fed);
                tap.tensor("connector_g0_l0_latents", None, &latents);
            }
        }
        self.norm.forward(&latents)
    }
}

/// Features of chunk `index` when `total` are split into `groups`: the first ones get one more.
fn chunk_len(total: usize, groups: usize, index: usize) -> usize {
    total / groups + usize::from(index < total % groups)
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

    /// Latents look at the media and at themselves.
    fn attend(&self, media: &Tensor, latents: &Tensor) -> Result<Tensor> {
        let latents = self.norm_latents.forward(latents)?;
        let queries = with_slice(&latents, |x| self.to_q.forward_slice(x))?;
        let context = Tensor::cat(&[&self.norm_media.forward(media)?, &latents], 0)?;
        let key_values = self.to_kv.forward(&context)?;
        let half = |index| key_values.narrow(1, index * RESAMPLER_INNER, RESAMPLER_INNER);
        let attended = with_slice(&half(0)?, |keys| {
            with_slice(&half(1)?, |values| full_attention(&queries, keys, values, HEADS))
        })??;
        self.to_out.forward(&rows(attended, RESAMPLER_INNER)?)
    }

    fn feed_forward(&self, latents: &Tensor) -> Result<Tensor> {
        let mut inner =
            with_slice(&self.feed_forward_norm.forward(latents)?, |x| self.feed_forward_in.forward_slice(x))?;
        gelu_erf_in_place(&mut inner);
        rows(self.feed_forward_out.forward_slice(&inner), self.feed_forward_out.weight().num_outputs())
    }
}

/// Sinusoidal positions `[num_positions, dim]`, rounded to f16 as the original stores them.
fn position_table(num_positions: usize, dim: usize) -> Result<Tensor> {
    let step = (-(10_000f64.ln()) / dim as f64) as f32;
    let frequencies: Vec<f32> =
        (0..dim.div_ceil(2)).map(|k| f64::from((2 * k) as f32 * step).exp() as f32).collect();
    let value = |position: usize, column: usize| {
        let angle = f64::from(position as f32 * frequencies[column / 2]);
        let value = if column.is_multiple_of(2) { angle.sin() } else { angle.cos() };
        f16::from_f32(value as f32).to_f32()
    };
    let table = (0..num_positions * dim).map(|i| value(i / dim, i % dim)).collect();
    rows(table, dim)
}

#[cfg(test)]
mod tests {
    use super::{
        super::{config::ModelConfig, weights::Weights},
        *,
    };

    #[test]
    fn position_tables_equal_the_recorded_ones() {
        let recorded = candle_core::safetensors::load(
            "tests/golden/pos_tables_f16.safetensors",
            &candle_core::Device::Cpu,
        )
        .unwrap();
        for (name, positions, dim) in [("pos_16x64", 16, 64), ("pos_7x10", 7, 10)] {
            let expected =
                recorded[name].to_dtype(candle_core::DType::F32).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(position_table(positions, dim).unwrap().to_vec2::<f32>().unwrap(), expected, "{name}");
        }
    }

    #[test]
    fn the_naive_kind_sees_all_features_at_once_and_adds_positions_before() {
        let mut config = ModelConfig::tiny_test();
        let group = config.connector.clone();
        config.connector = ConnectorConfig { kind: ConnectorKind::Naive, group: 1, ..group };
        let weights = Weights::synthetic(&config, 3);
        let loader = Loader::new(&weights, None).pp("connector._connector");
        let resampler = Resampler::load(&loader, &config.connector).unwrap();
        let width = config.connector.vision_hidden_size;
        let features = rows((0..30 * width).map(|i| (i as f32 * 0.37).sin()).collect(), width).unwrap();
        let out = resampler.forward(&features, &mut ()).unwrap();
        assert_eq!(out.dims(), [config.connector.num_queries, config.connector.hidden_size]);
        // The same weights as one group, on features that carry their positions, without positions at the end.
        let media = resampler.linear.forward(&features).unwrap();
        let placed = (media + position_table(30, config.connector.hidden_size).unwrap()).unwrap();
        let expected = resampler.resample(&placed, 0, &mut ()).unwrap();
        assert_eq!(out.to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap());
        // Order matters only through the positions.
        let reversed = features
            .index_select(&Tensor::arange_step(29i64, -1, -1, &candle_core::Device::Cpu).unwrap(), 0)
            .unwrap();
        let turned = resampler.forward(&reversed, &mut ()).unwrap();
        assert_ne!(out.to_vec2::<f32>().unwrap(), turned.to_vec2::<f32>().unwrap());
    }

    #[test]
    fn uneven_features_go_to_the_first_chunks() {
        let lens: Vec<usize> = (0..4).map(|index| chunk_len(75, 4, index)).collect();
        assert_eq!(lens, [19, 19, 19, 18]);
    }
}
