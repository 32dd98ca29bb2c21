//! Every tensor of the published layout: full name and shape, from the config alone.
//!
//! Read by [`super::weights`] (what a checkpoint must hold) and [`super::synth`] (what a random one is made of).
//! Never looks at files.

use super::{
    config::{ConnectorConfig, ModelConfig, Qwen2Config, SiglipConfig},
    kernels::panels::Bits,
};

/// What the network does with a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Reads it as floats: norms, biases, positions, latents, the table of embeddings.
    Floats,
    /// Multiplies with it, and bears no fewer bits than `least`: the decoder's layers bear 4, all others suffer.
    Matrix { least: Bits },
}

impl Role {
    /// How many bits the tensor is kept in when the model is quantised to `asked`; `None`: it is not a matrix.
    pub fn bits(self, asked: Bits) -> Option<Bits> {
        match self {
            Role::Floats => None,
            Role::Matrix { least: Bits::Four } => Some(asked),
            Role::Matrix { least: Bits::Eight } => Some(Bits::Eight),
        }
    }
}

/// One tensor of the published layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Full name, with the prefix of its part.
    pub name: String,
    pub shape: Vec<usize>,
    pub role: Role,
    /// `Some`: it is stored as the panels of `kernels/panels.rs`.
    pub panels: Option<Bits>,
    /// False for what published files hold but the network never reads: it may be missing, but not mis-shaped.
    pub required: bool,
}

impl TensorSpec {
    /// How many elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Outputs and inputs of a matrix: trailing dimensions (a convolution's) count as one.
    pub fn matrix(&self) -> (usize, usize) {
        (self.shape[0], self.shape[1..].iter().product())
    }

    /// The shape its file tells.
    pub fn stored_shape(&self) -> Vec<usize> {
        let (n, k) = self.matrix();
        self.panels.map_or_else(|| self.shape.clone(), |bits| bits.shape(n, k).to_vec())
    }
}

/// The token embeddings, and the head of models that have none of its own.
pub const EMBEDDINGS: &str = "language_model.model.embed_tokens.weight";
/// The head. Quantised checkpoints always have one, beside embeddings that stay floats.
pub const HEAD: &str = "language_model.lm_head.weight";

/// Prefix of the language model's tensors.
pub const TEXT_PREFIX: &str = "language_model.";
/// Prefix of the vision tower's tensors.
pub const VISION_PREFIX: &str = "vision_tower._vision_tower.";
/// Prefix of the connector's tensors.
pub const CONNECTOR_PREFIX: &str = "connector._connector.";

/// Width of all heads of the resampler together: 8 heads of 64, whatever the model's width.
pub const RESAMPLER_INNER: usize = 8 * 64;

impl ModelConfig {
    /// Every tensor of the published layout: language model, vision tower, connector, in the order of the network.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut list = TensorList::default();
        list.part(TEXT_PREFIX, |list| text_tensors(list, &self.text));
        list.part(VISION_PREFIX, |list| vision_tensors(list, &self.vision));
        list.part(CONNECTOR_PREFIX, |list| connector_tensors(list, &self.connector));
        list.tensors
    }

    /// Every tensor of a checkpoint that `tinyllava quantize` writes: what the network reads, matrices as panels.
    pub fn quantised_tensors(&self, bits: Bits) -> Vec<TensorSpec> {
        let mut tensors = self.tensors();
        tensors.retain(|spec| spec.required);
        let embeddings = tensors.iter().find(|spec| spec.name == EMBEDDINGS).cloned();
        if let Some(spec) = embeddings.filter(|_| self.text.tie_word_embeddings) {
            let role = Role::Matrix { least: Bits::Eight };
            tensors.push(TensorSpec { name: HEAD.into(), role, ..spec });
        }
        for spec in &mut tensors {
            spec.panels = spec.role.bits(bits);
        }
        tensors
    }

    /// Elements of all tensors of the published layout.
    pub fn num_parameters(&self) -> u64 {
        self.tensors().iter().map(|tensor| tensor.num_elements() as u64).sum()
    }
}

fn text_tensors(list: &mut TensorList, config: &Qwen2Config) {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let key_value = config.num_key_value_heads * config.head_dim();
    list.add("model.embed_tokens.weight", &[config.vocab_size, hidden]);
    for layer in 0..config.num_hidden_layers {
        list.part(&format!("model.layers.{layer}."), |list| {
            list.least = Bits::Four;
            list.linear("self_attn.q_proj", hidden, hidden);
            list.linear("self_attn.k_proj", key_value, hidden);
            list.linear("self_attn.v_proj", key_value, hidden);
            list.matrix("self_attn.o_proj.weight", &[hidden, hidden]);
            list.matrix("mlp.gate_proj.weight", &[inner, hidden]);
            list.matrix("mlp.up_proj.weight", &[inner, hidden]);
            list.matrix("mlp.down_proj.weight", &[hidden, inner]);
            list.least = Bits::Eight;
            list.add("input_layernorm.weight", &[hidden]);
            list.add("post_attention_layernorm.weight", &[hidden]);
        });
    }
    list.add("model.norm.weight", &[hidden]);
    if !config.tie_word_embeddings {
        list.matrix("lm_head.weight", &[config.vocab_size, hidden]);
    }
}

fn vision_tensors(list: &mut TensorList, config: &SiglipConfig) {
    let (hidden, inner, patch) = (config.hidden_size, config.intermediate_size, config.patch_size);
    list.part("vision_model.", |list| {
        list.matrix("embeddings.patch_embedding.weight", &[hidden, config.num_channels, patch, patch]);
        list.add("embeddings.patch_embedding.bias", &[hidden]);
        list.add("embeddings.position_embedding.weight", &[config.num_patches(), hidden]);
        for layer in 0..config.num_hidden_layers {
            // The features are what enters the last layer, so the last layer itself never runs.
            list.required = layer + 1 < config.num_hidden_layers;
            list.part(&format!("encoder.layers.{layer}."), |list| {
                for projection in ["k_proj", "v_proj", "q_proj", "out_proj"] {
                    list.linear(&format!("self_attn.{projection}"), hidden, hidden);
                }
                list.norm("layer_norm1", hidden);
                list.linear("mlp.fc1", inner, hidden);
                list.linear("mlp.fc2", hidden, inner);
                list.norm("layer_norm2", hidden);
            });
        }
        list.required = false;
        list.norm("post_layernorm", hidden);
        list.add("head.probe", &[1, 1, hidden]);
        list.matrix("head.attention.in_proj_weight", &[3 * hidden, hidden]);
        list.add("head.attention.in_proj_bias", &[3 * hidden]);
        list.linear("head.attention.out_proj", hidden, hidden);
        list.norm("head.layernorm", hidden);
        list.linear("head.mlp.fc1", inner, hidden);
        list.linear("head.mlp.fc2", hidden, inner);
        list.required = true;
    });
}

fn connector_tensors(list: &mut TensorList, config: &ConnectorConfig) {
    let dim = config.hidden_size;
    list.add("latents", &[config.num_queries / config.group, dim]);
    list.linear("linear", dim, config.vision_hidden_size);
    for layer in 0..config.num_resampler_layers {
        list.part(&format!("layers.{layer}."), |list| {
            list.norm("0.norm_media", dim);
            list.norm("0.norm_latents", dim);
            list.matrix("0.to_q.weight", &[RESAMPLER_INNER, dim]);
            list.matrix("0.to_kv.weight", &[2 * RESAMPLER_INNER, dim]);
            list.matrix("0.to_out.weight", &[dim, RESAMPLER_INNER]);
            list.norm("1.0", dim);
            list.matrix("1.1.weight", &[4 * dim, dim]);
            list.matrix("1.3.weight", &[dim, 4 * dim]);
        });
    }
    list.norm("norm", dim);
}

/// Collects tensors under a growing and shrinking prefix.
struct TensorList {
    prefix: String,
    required: bool,
    /// Of matrices.
    least: Bits,
    tensors: Vec<TensorSpec>,
}

impl Default for TensorList {
    fn default() -> Self {
        TensorList { prefix: String::new(), required: true, least: Bits::Eight, tensors: Vec::new() }
    }
}

impl TensorList {
    fn part(&mut self, prefix: &str, fill: impl FnOnce(&mut Self)) {
        let len = self.prefix.len();
        self.prefix.push_str(prefix);
        fill(self);
        self.prefix.truncate(len);
    }

    fn add(&mut self, name: &str, shape: &[usize]) {
        self.push(name, shape, Role::Floats);
    }

    fn matrix(&mut self, name: &str, shape: &[usize]) {
        self.push(name, shape, Role::Matrix { least: self.least });
    }

    fn push(&mut self, name: &str, shape: &[usize], role: Role) {
        let (name, shape) = (format!("{}{name}", self.prefix), shape.to_vec());
        self.tensors.push(TensorSpec { name, shape, role, panels: None, required: self.required });
    }

    fn linear(&mut self, name: &str, rows: usize, columns: usize) {
        self.matrix(&format!("{name}.weight"), &[rows, columns]);
        self.add(&format!("{name}.bias"), &[rows]);
    }

    fn norm(&mut self, name: &str, width: usize) {
        self.add(&format!("{name}.weight"), &[width]);
        self.add(&format!("{name}.bias"), &[width]);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::presets::Preset;
    use super::*;

    fn parameters(config: &ModelConfig, prefix: &str) -> usize {
        let tensors = config.tensors();
        tensors.iter().filter(|t| t.name.starts_with(prefix)).map(TensorSpec::num_elements).sum()
    }

    #[test]
    fn r1_has_the_published_number_of_tensors_and_parameters() {
        let config = ModelConfig::preset(Preset::R1);
        assert_eq!(config.tensors().len(), 920);
        assert_eq!(config.num_parameters(), 3_629_878_336);
        assert_eq!(parameters(&config, VISION_PREFIX), 428_225_600);
        assert_eq!(parameters(&config, CONNECTOR_PREFIX), 115_714_048);
        assert_eq!(parameters(&config, TEXT_PREFIX), 3_085_938_688);
    }

    #[test]
    fn names_are_unique_and_the_unused_are_not_required() {
        let config = ModelConfig::preset(Preset::R1);
        let tensors = config.tensors();
        assert_eq!(tensors.iter().map(|t| &t.name).collect::<HashSet<_>>().len(), tensors.len());
        for tensor in &tensors {
            let unused =
                ["layers.26.", "post_layernorm", ".head."].iter().any(|part| tensor.name.contains(part))
                    && tensor.name.starts_with(VISION_PREFIX);
            assert_eq!(tensor.required, !unused, "{}", tensor.name);
        }
    }

    #[test]
    fn quantised_checkpoints_have_panels_of_all_matrices_and_a_head() {
        let config = ModelConfig::preset(Preset::R1);
        for bits in [Bits::Eight, Bits::Four] {
            let tensors = config.quantised_tensors(bits);
            let of = |name: &str| tensors.iter().find(|t| t.name == name).unwrap();
            assert_eq!((of(EMBEDDINGS).panels, of(HEAD).panels), (None, Some(Bits::Eight)));
            assert_eq!(of("language_model.model.layers.3.self_attn.k_proj.weight").panels, Some(bits));
            let matrices = tensors.iter().filter(|t| t.panels.is_some());
            let in_panels: usize = matrices.map(TensorSpec::num_elements).sum();
            // 3.63 billion less the last layer and the head of the tower, all but some vectors.
            assert!((3_590_000_000..3_610_000_000).contains(&in_panels), "{in_panels}");
            assert!(tensors.iter().all(|t| t.required));
        }
    }

    #[test]
    fn an_untied_head_is_required() {
        let mut config = ModelConfig::tiny_test();
        let is_head = |t: &TensorSpec| t.name == "language_model.lm_head.weight" && t.required;
        assert!(!config.tensors().iter().any(is_head));
        config.text.tie_word_embeddings = false;
        assert!(config.tensors().iter().any(is_head));
    }
}
