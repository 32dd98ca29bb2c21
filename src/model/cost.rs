//! What a piece of work costs: multiplications and bytes, from the sizes alone.
//!
//! Called by `tinyllava bench engine` for its roofline. Counts matrix products and attention; everything else is small.

use super::config::ModelConfig;

/// Two operations for each multiplication and its addition.
const OPS: f64 = 2.0;

impl ModelConfig {
    /// Operations to encode a video of `num_frames`, tower and connector.
    pub fn encode_ops(&self, num_frames: usize) -> f64 {
        let vision = &self.vision;
        let (patches, hidden) = (vision.num_patches() as f64, vision.hidden_size as f64);
        let layers = (vision.num_hidden_layers - 1) as f64;
        let patch_len = (vision.num_channels * vision.patch_size * vision.patch_size) as f64;
        let layer = 4.0 * hidden * hidden + 2.0 * hidden * vision.intermediate_size as f64;
        // Scores and weighted values.
        let attention = 2.0 * patches * hidden;
        let frame = patches * (patch_len * hidden + layers * (layer + attention));
        OPS * (num_frames as f64 * frame + self.connect_products(num_frames))
    }

    fn connect_products(&self, num_frames: usize) -> f64 {
        let connector = &self.connector;
        let (dim, inner) = (connector.hidden_size as f64, super::layout::RESAMPLER_INNER as f64);
        let features = (num_frames * (self.vision.num_patches() - 1)) as f64;
        let queries = connector.num_queries as f64;
        let seen = features / connector.group as f64 + queries / connector.group as f64;
        let key_values = (features + queries) * dim * 2.0 * inner;
        let latents = queries * (2.0 * dim * inner + 2.0 * dim * 4.0 * dim + 2.0 * seen * inner);
        features * connector.vision_hidden_size as f64 * dim
            + connector.num_resampler_layers as f64 * (key_values + latents)
    }

    /// Weights of the decoder's layers, without embeddings and head.
    fn layer_weights(&self) -> f64 {
        let text = &self.text;
        let (hidden, dim) = (text.hidden_size as f64, text.head_dim() as f64);
        let key_value = text.num_key_value_heads as f64 * dim;
        let query = text.num_attention_heads as f64 * dim;
        let layer = hidden * (2.0 * query + 2.0 * key_value + 3.0 * text.intermediate_size as f64);
        text.num_hidden_layers as f64 * layer
    }

    /// Operations to compute `tokens` of a prompt from its start, and the logits of the last.
    pub fn prefill_ops(&self, tokens: usize) -> f64 {
        let n = tokens as f64;
        // Each token sees half of the others on average.
        OPS * (n * self.layer_weights() + self.head_weights() + n * self.attention_products(n / 2.0))
    }

    /// Operations of one decode step of `batch` sequences that have `context` tokens each.
    pub fn decode_ops(&self, batch: usize, context: usize) -> f64 {
        let products = self.layer_weights() + self.head_weights() + self.attention_products(context as f64);
        OPS * batch as f64 * products
    }

    fn head_weights(&self) -> f64 {
        (self.text.vocab_size * self.text.hidden_size) as f64
    }

    fn attention_products(&self, seen: f64) -> f64 {
        let text = &self.text;
        2.0 * seen * (text.num_hidden_layers * text.num_attention_heads * text.head_dim()) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::{super::presets::Preset, *};

    #[test]
    fn the_published_model_reads_each_weight_once_a_token() {
        let config = ModelConfig::preset(Preset::R1);
        // 3,085,938,688 parameters of the decoder, nearly all of them in matrices.
        let weights = config.layer_weights() + config.head_weights();
        assert!((weights / 3_085_938_688.0 - 1.0).abs() < 1e-3, "{weights}");
        assert!((config.decode_ops(1, 0) / (2.0 * weights) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn encoding_is_dominated_by_the_tower() {
        let config = ModelConfig::preset(Preset::R1);
        // 26 layers of 15.2 million weights over 16 x 729 patches, attention over 729 keys, and the connector.
        let tower = 2.0 * 16.0 * 729.0 * 26.0 * (15.2e6 + 2.0 * 729.0 * 1152.0);
        let total = config.encode_ops(16);
        assert!(tower < total && total < 1.06 * tower, "{total} {tower}");
    }
}
