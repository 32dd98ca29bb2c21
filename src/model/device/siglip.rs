//! The SigLIP vision tower on a device. See [`super::super::siglip`] for what it is.
//!
//! Called by [`super`]. Frames arrive as bytes and become pixel values there.

use candle_core::DType;

use super::{
    super::{Result, Tap, Tensor, config::SiglipConfig, siglip::byte_values},
    attention::attend,
    layers::{LayerNorm, Linear, Loader, show},
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
    num_heads: usize,
}

/// Patch embedding and all encoder layers but the last: the features are `hidden_states[-2]`.
#[derive(Debug)]
pub struct VisionTower {
    config: SiglipConfig,
    patch_embedding: Linear,
    /// `[patches, hidden]`
    position_embedding: Tensor,
    layers: Vec<Layer>,
    /// `[256]` in f32: the pixel value of each byte.
    byte_values: Tensor,
}

impl VisionTower {
    /// From `vision_tower._vision_tower.vision_model`.
    pub fn load(loader: &Loader<'_>, config: &SiglipConfig) -> Result<Self> {
        let embeddings = loader.pp("embeddings");
        let layers = loader.pp("encoder").pp("layers");
        let num_layers = config.num_hidden_layers - 1;
        Ok(VisionTower {
            patch_embedding: Linear::load(&embeddings.pp("patch_embedding"), true)?,
            position_embedding: embeddings.pp("position_embedding").tensor("weight")?,
            layers: (0..num_layers).map(|i| Layer::load(&layers.pp(i), config)).collect::<Result<_>>()?,
            byte_values: Tensor::new(&byte_values(), loader.device)?,
            config: config.clone(),
        })
    }

    /// Features of frames, whose `bytes` are `[frames x size x size x 3]` in u8: `[frames x (patches - 1), hidden]`. The first patch of
    /// each frame is dropped.
    pub fn forward(&self, bytes: &Tensor, tap: &mut dyn Tap) -> Result<Tensor> {
        let pixel_values = self.pixel_values(bytes)?;
        show(tap, "pixel_values", None, &pixel_values)?;
        let mut x = self.embed(&pixel_values)?;
        show(tap, "vision_hidden", Some(0), &x.flatten_to(1)?)?;
        // Sums are taken together with the norm that follows, which is the next layer's.
        let mut normed = self.layers.first().map(|first| first.layer_norm1.forward(&x)).transpose()?;
        for (index, layer) in self.layers.iter().enumerate() {
            let next = self.layers.get(index + 1).map(|next| &next.layer_norm1);
            if let Some(own) = normed {
                (x, normed) = layer.forward(&x, &own, next)?;
            }
            show(tap, "vision_hidden", Some(index + 1), &x.flatten_to(1)?)?;
        }
        x.narrow(1, 1, self.config.num_patches() - 1)?.flatten_to(1)
    }

    /// Normalised pixels `[frames, 3, size, size]` in f32: only bytes travel to the device.
    fn pixel_values(&self, bytes: &Tensor) -> Result<Tensor> {
        let size = self.config.image_size;
        let count = bytes.elem_count() / (size * size * 3);
        // Not by the bytes themselves: the largest index of a type stands for nothing, and gives 0.
        let values = self.byte_values.index_select(&bytes.to_dtype(DType::U32)?, 0)?;
        values.reshape((count, size, size, 3))?.permute((0, 3, 1, 2))
    }

    /// The convolution as a product over unfolded patches, plus the positions: `[frames, patches, hidden]`.
    fn embed(&self, pixel_values: &Tensor) -> Result<Tensor> {
        let (count, channels, _, _) = pixel_values.dims4()?;
        let patch = self.config.patch_size;
        let side = self.config.image_size / patch;
        // Pixels beyond the last whole patch are not looked at.
        let whole = pixel_values.narrow(2, 0, side * patch)?.narrow(3, 0, side * patch)?;
        let unfolded = whole.reshape(vec![count, channels, side, patch, side, patch])?;
        let unfolded = unfolded.permute([0, 2, 4, 1, 3, 5].as_slice())?;
        let unfolded = unfolded.reshape((count, side * side, channels * patch * patch))?;
        let embedded = self.patch_embedding.forward(&unfolded.to_dtype(self.position_embedding.dtype())?)?;
        embedded.broadcast_add(&self.position_embedding)
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
            num_heads: config.num_attention_heads,
        })
    }

    /// `x` `[frames, patches, hidden]`, and its first norm; patches attend within their frame. Gives the layer's output, and its norm by
    /// `next`.
    fn forward(
        &self,
        x: &Tensor,
        normed: &Tensor,
        next: Option<&LayerNorm>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (count, patches, hidden) = x.dims3()?;
        let qkv = self.qkv_proj.forward(normed)?;
        let qkv = qkv.reshape((count, patches, 3, self.num_heads, hidden / self.num_heads))?;
        // `[frames, heads, patches, head_dim]`
        let part = |index: usize| qkv.narrow(2, index, 1)?.squeeze(2)?.transpose(1, 2);
        let attended = attend(&part(0)?, &part(1)?, &part(2)?)?;
        let attended = attended.transpose(1, 2)?.reshape((count, patches, hidden))?;
        let (x, normed) = self.layer_norm2.add_forward(&self.out_proj, &attended, x)?;
        let inner = self.fc1.forward_gelu(&normed)?;
        match next {
            Some(next) => next.add_forward(&self.fc2, &inner, &x).map(|(x, normed)| (x, Some(normed))),
            None => Ok((self.fc2.forward_add(&inner, &x)?, None)),
        }
    }
}
