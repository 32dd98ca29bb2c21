//! The connector: a video's patch features to a fixed number of visual tokens.
//!
//! Called by [`super::tinyllava`] once a video's frames are all encoded. Two kinds with the same tensors: the group
//! resampler works on consecutive chunks of features that do not see each other, the naive one on all at once.

use half::f16;

use super::{
    Result, Tap, Tensor,
    attention::{FullAttention, Heads, Projected},
    config::{ConnectorConfig, ConnectorKind},
    kernels::activation::{add, gelu_erf_in_place},
    layers::{LayerNorm, Linear, Loader, rows, show, with_slice},
    layout::RESAMPLER_INNER,
};

/// Of every norm of the connector.
pub const LAYER_NORM_EPS: f64 = 1e-5;
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
    latents: Vec<f32>,
    layers: Vec<Layer>,
    norm: LayerNorm,
}

impl Resampler {
    /// From `connector._connector`.
    pub fn load(loader: &Loader<'_>, config: &ConnectorConfig) -> Result<Self> {
        let layers = loader.pp("layers");
        Ok(Resampler {
            linear: Linear::load(&loader.pp("linear"), true)?,
            latents: loader.vector("latents")?,
            layers: (0..config.num_resampler_layers)
                .map(|i| Layer::load(&layers.pp(i)))
                .collect::<Result<_>>()?,
            norm: LayerNorm::load(&loader.pp("norm"), LAYER_NORM_EPS)?,
            config: config.clone(),
        })
    }

    /// `features` `[n, vision_hidden]` to `[num_queries, dim]`.
    pub fn forward(&self, features: &Tensor, tap: &mut dyn Tap) -> Result<Tensor> {
        let dim = self.config.hidden_size;
        let mut media = with_slice(features, |x| self.linear.forward(x))?;
        show(tap, "connector_linear", None, &media, dim)?;
        let num_features = media.len() / dim;
        match self.config.kind {
            ConnectorKind::Naive => {
                add(&mut media, &position_table(num_features, dim));
                let out = self.resample(&media, &[num_features], tap)?;
                show(tap, "connector_no_pos", None, &out, dim)?;
                rows(out, dim)
            }
            ConnectorKind::Group => {
                let groups = 0..self.config.group;
                let chunks: Vec<usize> =
                    groups.map(|index| chunk_len(num_features, self.config.group, index)).collect();
                let mut out = self.resample(&media, &chunks, tap)?;
                show(tap, "connector_no_pos", None, &out, dim)?;
                add(&mut out, &position_table(self.config.num_queries, dim));
                rows(out, dim)
            }
        }
    }

    /// Chunks of features, of these lengths, through all layers: `[chunks x queries a chunk, dim]`. Each has latents of its
    /// own and does not see the others.
    fn resample(&self, media: &[f32], chunks: &[usize], tap: &mut dyn Tap) -> Result<Vec<f32>> {
        let dim = self.config.hidden_size;
        let mut latents = self.latents.repeat(chunks.len());
        for (index, layer) in self.layers.iter().enumerate() {
            let attended = layer.attend(media, chunks, &latents);
            add(&mut latents, &attended);
            let fed = layer.feed_forward(&latents);
            add(&mut latents, &fed);
            if index == 0 {
                let first = ..self.latents.len();
                show(tap, "connector_g0_l0_attn_out", None, &attended[first], dim)?;
                show(tap, "connector_g0_l0_ff_out", None, &fed[first], dim)?;
                show(tap, "connector_g0_l0_latents", None, &latents[first], dim)?;
            }
        }
        Ok(self.norm.forward(&latents))
    }
}

/// Features of chunk `index` when `total` are split into `groups`: the first ones get one more.
pub fn chunk_len(total: usize, groups: usize, index: usize) -> usize {
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

    /// The latents of each chunk look at its media and at themselves.
    fn attend(&self, media: &[f32], chunks: &[usize], latents: &[f32]) -> Vec<f32> {
        let latents = self.norm_latents.forward(latents);
        let queries = self.to_q.forward(&latents);
        let media = self.norm_media.forward(media);
        let (num_latents, num_media) = (latents.len() / chunks.len(), media.len());
        let dim = num_media / chunks.iter().sum::<usize>();
        // What each chunk sees, chunk after chunk.
        let mut context = Vec::with_capacity(num_media + latents.len());
        let mut left = &media[..];
        for (chunk, latents) in chunks.iter().zip(latents.chunks(num_latents)) {
            let (seen, rest) = left.split_at(chunk * dim);
            context.extend_from_slice(seen);
            context.extend_from_slice(latents);
            left = rest;
        }
        let key_values = self.to_kv.forward(&context);
        let mut attended = Vec::with_capacity(queries.len());
        let (mut queries, mut key_values) = (&queries[..], &key_values[..]);
        // Neighbours of the same length run together.
        for alike in chunks.chunk_by(|a, b| a == b) {
            let own_queries = alike.len() * num_latents / dim * RESAMPLER_INNER;
            let own_keys = alike.len() * (alike[0] + num_latents / dim) * 2 * RESAMPLER_INNER;
            let (these, rest) = queries.split_at(own_queries);
            let (seen, later) = key_values.split_at(own_keys);
            (queries, key_values) = (rest, later);
            let half = |index| Projected::new(seen, 2 * RESAMPLER_INNER, index * RESAMPLER_INNER);
            let attention = FullAttention {
                queries: Projected::new(these, RESAMPLER_INNER, 0),
                keys: half(0),
                values: half(1),
                num_batches: alike.len(),
                heads: HEADS,
                may_round: self.to_kv.weight().is_quantised(),
            };
            attended.extend(attention.run());
        }
        self.to_out.forward(&attended)
    }

    fn feed_forward(&self, latents: &[f32]) -> Vec<f32> {
        let mut inner = self.feed_forward_in.forward(&self.feed_forward_norm.forward(latents));
        gelu_erf_in_place(&mut inner);
        self.feed_forward_out.forward(&inner)
    }
}

/// Sinusoidal positions `[num_positions, dim]`, rounded to f16 as the original stores them.
pub fn position_table(num_positions: usize, dim: usize) -> Vec<f32> {
    let step = (-(10_000f64.ln()) / dim as f64) as f32;
    let frequencies: Vec<f32> =
        (0..dim.div_ceil(2)).map(|k| f64::from((2 * k) as f32 * step).exp() as f32).collect();
    let value = |position: usize, column: usize| {
        let angle = f64::from(position as f32 * frequencies[column / 2]);
        let value = if column.is_multiple_of(2) { angle.sin() } else { angle.cos() };
        f16::from_f32(value as f32).to_f32()
    };
    (0..num_positions * dim).map(|i| value(i / dim, i % dim)).collect()
}

#[cfg(test)]
mod tests {
    use super::{
        super::{config::ModelConfig, layers::WeightFormat, weights::Weights},
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
            assert_eq!(position_table(positions, dim), expected.concat(), "{name}");
        }
    }

    #[test]
    fn the_naive_kind_sees_all_features_at_once_and_adds_positions_before() {
        let mut config = ModelConfig::tiny_test();
        let group = config.connector.clone();
        config.connector = ConnectorConfig { kind: ConnectorKind::Naive, group: 1, ..group };
        let weights = Weights::synthetic(&config, 3);
        let loader = Loader::new(&weights, WeightFormat::AsStored).pp("connector._connector");
        let resampler = Resampler::load(&loader, &config.connector).unwrap();
        let width = config.connector.vision_hidden_size;
        let features = rows((0..30 * width).map(|i| (i as f32 * 0.37).sin()).collect(), width).unwrap();
        let out = resampler.forward(&features, &mut ()).unwrap();
        assert_eq!(out.dims(), [config.connector.num_queries, config.connector.hidden_size]);
        // The same weights as one group, on features that carry their positions, without positions at the end.
        let mut placed = with_slice(&features, |x| resampler.linear.forward(x)).unwrap();
        add(&mut placed, &position_table(30, config.connector.hidden_size));
        let expected = resampler.resample(&placed, &[30], &mut ()).unwrap();
        assert_eq!(out.to_vec2::<f32>().unwrap().concat(), expected);
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
