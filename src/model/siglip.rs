//! The SigLIP vision tower, up to the features the connector reads.
//!
//! Called by [`super::tinyllava`]. Frames are independent of each other: any number of them runs together.

use rayon::prelude::*;

use super::{
    FrameBatch, Result, Tap, Tensor,
    attention::{FullAttention, Heads, Projected},
    config::SiglipConfig,
    kernels::activation::gelu_tanh_in_place,
    layers::{LayerNorm, Linear, Loader, rows, show, with_slice},
};

#[derive(Debug)]
struct Layer {
    layer_norm1: LayerNorm,
    /// `[q | k | v]`
    qkv_proj: Linear,
    out_proj: Linear,
    layer_norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

/// Patch embedding and all encoder layers but the last: the features are `hidden_states[-2]`.
#[derive(Debug)]
pub struct VisionTower {
    config: SiglipConfig,
    patch_embedding: Linear,
    /// `[patches, hidden]`
    position_embedding: Vec<f32>,
    layers: Vec<Layer>,
    /// The pixel value of each byte.
    pixel_values: [f32; 256],
}

/// The pixel value of each byte: rescaled in f64, then normalised in f32.
pub fn byte_values() -> [f32; 256] {
    std::array::from_fn(|byte| {
        let rescaled = (byte as f64 * 0.003_921_568_627_450_98) as f32;
        (rescaled - 0.5) / 0.5
    })
}

impl VisionTower {
    /// From `vision_tower._vision_tower.vision_model`.
    pub fn load(loader: &Loader<'_>, config: &SiglipConfig) -> Result<Self> {
        let embeddings = loader.pp("embeddings");
        let layers = loader.pp("encoder").pp("layers");
        let num_layers = config.num_hidden_layers - 1;
        Ok(VisionTower {
            patch_embedding: Linear::load(&embeddings.pp("patch_embedding"), true)?,
            position_embedding: embeddings.pp("position_embedding").vector("weight")?,
            layers: (0..num_layers).map(|i| Layer::load(&layers.pp(i), config)).collect::<Result<_>>()?,
            pixel_values: byte_values(),
            config: config.clone(),
        })
    }

    /// Normalised pixels of some frames, `[frames, 3, size, size]`.
    pub fn pixel_values(&self, frames: &[u8]) -> Result<Tensor> {
        let size = self.config.image_size;
        let pixels = size * size;
        let mut values = vec![0.0; frames.len()];
        values.par_chunks_mut(3 * pixels).zip(frames.par_chunks(3 * pixels)).for_each(|(planes, frame)| {
            for (i, &byte) in frame.iter().enumerate() {
                planes[i % 3 * pixels + i / 3] = self.pixel_values[usize::from(byte)];
            }
        });
        Tensor::from_vec(values, (frames.len() / (3 * pixels), 3, size, size), &candle_core::Device::Cpu)
    }

    /// Features of some frames: `[frames x (patches - 1), hidden]`. The first patch of each frame is dropped: the
    /// strategy "patch" was made for towers with a class token, and the model was trained so.
    pub fn forward(
        &self,
        frames: &FrameBatch,
        range: std::ops::Range<usize>,
        tap: &mut dyn Tap,
    ) -> Result<Tensor> {
        let (patches, hidden) = (self.config.num_patches(), self.config.hidden_size);
        let pixel_values = self.pixel_values(frames.frames(range.clone()))?;
        tap.tensor("pixel_values", None, &pixel_values);
        let mut x = self.embed(&pixel_values, range.len())?;
        show(tap, "vision_hidden", Some(0), &x, hidden)?;
        for (index, layer) in self.layers.iter().enumerate() {
            layer.forward(&mut x, range.len(), self.heads());
            show(tap, "vision_hidden", Some(index + 1), &x, hidden)?;
        }
        let frames = x.chunks(patches * hidden);
        rows(frames.flat_map(|frame| &frame[hidden..]).copied().collect(), hidden)
    }

    fn heads(&self) -> Heads {
        let num_heads = self.config.num_attention_heads;
        Heads { num_heads, num_kv_heads: num_heads, head_dim: self.config.hidden_size / num_heads }
    }

    /// The convolution as a product over unfolded patches, plus the positions: `[frames x patches, hidden]`.
    fn embed(&self, pixel_values: &Tensor, num_frames: usize) -> Result<Vec<f32>> {
        let (size, patch) = (self.config.image_size, self.config.patch_size);
        let side = size / patch;
        let patch_len = 3 * patch * patch;
        let mut unfolded = vec![0.0; num_frames * side * side * patch_len];
        with_slice(pixel_values, |pixels| {
            unfolded.par_chunks_mut(patch_len).enumerate().for_each(|(index, out)| {
                let (frame, row, column) = (index / (side * side), index / side % side, index % side);
                for (line, out) in out.chunks_mut(patch).enumerate() {
                    let (channel, y) = (line / patch, row * patch + line % patch);
                    let from = ((frame * 3 + channel) * size + y) * size + column * patch;
                    out.copy_from_slice(&pixels[from..from + patch]);
                }
            });
        })?;
        let mut embedded = self.patch_embedding.forward(&unfolded);
        embedded.par_chunks_mut(self.position_embedding.len()).for_each(|frame| {
            frame.iter_mut().zip(&self.position_embedding).for_each(|(x, position)| *x += position);
        });
        Ok(embedded)
    }
}

impl Layer {
    fn load(loader: &Loader<'_>, config: &SiglipConfig) -> Result<Self> {
        let (attention, mlp) = (loader.pp("self_attn"), loader.pp("mlp"));
        Ok(Layer {
            layer_norm1: LayerNorm::load(&loader.pp("layer_norm1"), config.layer_norm_eps)?,
            qkv_proj: Linear::load_stacked(
                &["q_proj", "k_proj", "v_proj"].map(|name| attention.pp(name)),
                true,
            )?,
            out_proj: Linear::load(&attention.pp("out_proj"), true)?,
            layer_norm2: LayerNorm::load(&loader.pp("layer_norm2"), config.layer_norm_eps)?,
            fc1: Linear::load(&mlp.pp("fc1"), true)?,
            fc2: Linear::load(&mlp.pp("fc2"), true)?,
        })
    }

    /// `x` `[frames x patches, hidden]`; patches attend within their frame.
    fn forward(&self, x: &mut [f32], num_frames: usize, heads: Heads) {
        let width = heads.width();
        let qkv = self.qkv_proj.forward(&self.layer_norm1.forward(x));
        let part = |index: usize| Projected::new(&qkv, 3 * width, index * width);
        let attended = FullAttention {
            queries: part(0),
            keys: part(1),
            values: part(2),
            num_batches: num_frames,
            heads,
            may_round: self.qkv_proj.weight().is_quantised(),
        };
        self.out_proj.forward_add(&attended.run(), x);
        let mut inner = self.fc1.forward(&self.layer_norm2.forward(x));
        gelu_tanh_in_place(&mut inner);
        self.fc2.forward_add(&inner, x);
    }
}
