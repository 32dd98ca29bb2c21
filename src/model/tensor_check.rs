//! Compares the tensors in a checkpoint's files with the tensors that its config requires.
//!
//! Called by [`super::weights`] when it opens a checkpoint. Recognizes additional tensors:
//! buffers of old versions, a redundant head of a tied model, a LoRA adapter. Never reads the
//! data of a tensor.

use std::collections::HashMap;

use super::{
    layout::{EMBEDDINGS, HEAD, TensorSpec},
    weights::{Encoding, Entry, Found, WeightsError},
};

/// Name suffixes of buffers that older versions of transformers saved; all follow from the config.
const UNUSED_BUFFERS: [&str; 6] = [
    "position_ids",
    "rotary_emb.inv_freq",
    "rotary_emb.original_inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "masked_bias",
];

/// Name parts of tensors that peft adds.
const ADAPTER_PARTS: [&str; 4] = [".lora_", ".base_layer.", ".modules_to_save.", "base_model.model."];

/// A complete set of tensors with the right shapes and types.
pub(super) struct Checked {
    pub tensors: HashMap<String, Entry>,
    /// A stored head of a model whose config ties the head to the embeddings.
    pub tied_head: Option<TiedHead>,
}

/// A redundant head, which must equal the embeddings.
pub(super) struct TiedHead {
    /// For errors.
    pub file_name: String,
    pub entry: Entry,
}

/// Returns whether a tensor is a buffer that the network never reads.
pub(super) fn is_unused_buffer(name: &str, shape: &[usize]) -> bool {
    let ends_with = |last: &str| {
        let before = name.strip_suffix(last);
        before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
    };
    // A causal mask, not a bias: `[1, 1, positions, positions]`.
    let is_mask = ends_with("attn.bias") || ends_with("self_attn.bias");
    UNUSED_BUFFERS.into_iter().any(ends_with) || (is_mask && matches!(shape, [1, 1, _, _]))
}

/// Compares the tensors found with `specs`. `home` returns the file to name for a missing tensor.
pub(super) fn check(
    specs: &[TensorSpec],
    mut found: Vec<Found>,
    home: impl Fn(&str) -> String,
) -> Result<Checked, WeightsError> {
    let by_name: HashMap<&str, &TensorSpec> = specs.iter().map(|spec| (spec.name.as_str(), spec)).collect();
    if !by_name.contains_key(HEAD) {
        name_embeddings(&mut found);
    }
    let mut checked = Checked { tensors: HashMap::with_capacity(found.len()), tied_head: None };
    for tensor in found {
        let name = tensor.name.clone();
        if let Some(spec) = by_name.get(name.as_str()) {
            checked.tensors.insert(name, entry(spec, tensor)?);
        } else if name == HEAD {
            // No spec: the head is tied to the embeddings, so it has their shape.
            let file_name = tensor.file_name.clone();
            let entry = entry(by_name[EMBEDDINGS], tensor)?;
            checked.tied_head = Some(TiedHead { file_name, entry });
        } else if ADAPTER_PARTS.into_iter().any(|part| name.contains(part)) {
            return Err(WeightsError::AdapterTensor { file: tensor.file_name, tensor: name });
        } else if !is_unused_buffer(&name, &tensor.shape) {
            return Err(WeightsError::Extra { file: tensor.file_name, tensor: name });
        }
    }
    let is_missing = |spec: &&TensorSpec| spec.required && !checked.tensors.contains_key(&spec.name);
    let mut missing = specs.iter().filter(is_missing);
    match missing.next() {
        None => Ok(checked),
        Some(first) => Err(WeightsError::Missing {
            file: home(&first.name),
            tensor: first.name.clone(),
            others: missing.count(),
        }),
    }
}

/// Renames a tied head that is stored instead of the embeddings.
///
/// Files hold shared tensors once, under either name.
fn name_embeddings(found: &mut [Found]) {
    if found.iter().any(|tensor| tensor.name == EMBEDDINGS) {
        return;
    }
    if let Some(head) = found.iter_mut().find(|tensor| tensor.name == HEAD) {
        head.name = EMBEDDINGS.into();
    }
}

fn entry(spec: &TensorSpec, found: Found) -> Result<Entry, WeightsError> {
    let Found { name, file_name, shape, encoding, file, range } = found;
    let expected = spec.stored_shape();
    if shape != expected {
        return Err(WeightsError::Shape { file: file_name, tensor: name, found: shape, expected });
    }
    let of_panels = |encoding: &Encoding| *encoding == Encoding::Panels;
    let encoding = match encoding {
        Ok(encoding) if of_panels(&encoding) == spec.panels.is_some() => Ok(encoding),
        Ok(Encoding::Panels) => Err("U8".to_owned()),
        Ok(Encoding::Floats(dtype)) => Err(dtype.name().to_owned()),
        Err(found) => Err(found),
    };
    let encoding = encoding.map_err(|found| {
        let expected = if spec.panels.is_some() { "U8 is" } else { "F32, F16 and BF16 are" };
        WeightsError::DType { file: file_name, tensor: name, found, expected }
    })?;
    let num_bytes = match encoding {
        Encoding::Floats(dtype) => (spec.num_elements() * dtype.num_bytes()) as u64,
        Encoding::Panels => range.len() as u64,
    };
    Ok(Entry { shape: spec.shape.clone(), encoding, role: spec.role, num_bytes, file, range })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_old_versions_are_told_from_weights() {
        for name in [
            "position_ids",
            "vision_tower._vision_tower.vision_model.embeddings.position_ids",
            "language_model.model.layers.3.self_attn.rotary_emb.inv_freq",
            "language_model.model.rotary_emb.inv_freq",
            "language_model.model.layers.0.self_attn.masked_bias",
        ] {
            assert!(is_unused_buffer(name, &[1, 8]), "{name}");
        }
        let mask = "language_model.model.layers.0.self_attn.bias";
        assert!(is_unused_buffer(mask, &[1, 1, 64, 64]) && !is_unused_buffer(mask, &[64]));
        for name in ["language_model.model.my_position_ids", "connector.inv_freq", "connector.bias", ""] {
            assert!(!is_unused_buffer(name, &[1, 8]), "{name}");
        }
    }
}
