//! Reads the rotary position embedding (RoPE) and the layer types of the decoder.
//!
//! Used by [`super`] alone. transformers 4 writes `rope_theta` and `rope_scaling`; transformers
//! 5 writes `rope_parameters`, for some models with an object per layer type. Never guesses: two
//! different values of theta are an error, and so is every RoPE type except the default one.

use serde_json::Value;

use super::{ConfigError, section::Section};

/// Default of `Qwen2Config`, used if no field gives theta.
const DEFAULT_THETA: f64 = 10_000.0;

/// The only supported layer type.
const FULL_ATTENTION: &str = "full_attention";

/// The full name of a field, in backticks, and the theta in it.
type FoundTheta = (String, f64);

/// Returns the theta that all fields agree on.
///
/// The original ignores these fields at the top level, so there they may only repeat the value
/// of `text`.
pub(super) fn theta(root: &Section<'_>, text: &Section<'_>) -> Result<f64, ConfigError> {
    let (mut found, mut repeated) = (Vec::new(), Vec::new());
    collect(text, &mut found)?;
    if found.is_empty() && text.map.contains_key("rope_theta") {
        return Err(text.mistyped("rope_theta", &Value::Null, "a positive number"));
    }
    let default = ("the default of `text_config.rope_theta`".to_owned(), DEFAULT_THETA);
    let (name, theta) = found.first().cloned().unwrap_or(default);
    collect(root, &mut repeated)?;
    for (other, value) in found.iter().chain(&repeated) {
        if *value != theta {
            return Err(ConfigError::Inconsistent(format!("{other} is {value} but {name} is {theta}")));
        }
    }
    Ok(theta)
}

fn collect(section: &Section<'_>, found: &mut Vec<FoundTheta>) -> Result<(), ConfigError> {
    push_theta(section, found)?;
    for field in ["rope_parameters", "rope_scaling"] {
        if section.get(field).is_some() {
            parameters(&section.section(field)?, found)?;
        }
    }
    Ok(())
}

/// Reads an object of RoPE parameters, or an object with one such object per layer type.
fn parameters(rope: &Section<'_>, found: &mut Vec<FoundTheta>) -> Result<(), ConfigError> {
    // The type comes first: it explains the other fields, so the error should name it.
    for field in ["rope_type", "type"] {
        rope.only_str(field, "default")?;
    }
    push_theta(rope, found)?;
    for (field, value) in rope.map {
        match field.as_str() {
            "rope_type" | "type" | "rope_theta" => {}
            FULL_ATTENTION if !value.is_null() => parameters(&rope.section(field)?, found)?,
            "factor" | "attention_factor" | "partial_rotary_factor" => {
                rope.only(value.is_null() || value.as_f64() == Some(1.0), field, "1")?;
            }
            _ if value.is_null() => {}
            _ if value.is_object() => return Err(rope.unsupported(field, FULL_ATTENTION)),
            _ => return Err(rope.unknown(field)),
        }
    }
    Ok(())
}

fn push_theta(section: &Section<'_>, found: &mut Vec<FoundTheta>) -> Result<(), ConfigError> {
    const FIELD: &str = "rope_theta";
    if section.get(FIELD).is_some() {
        let name = format!("`{}`", section.full_name(FIELD));
        found.push((name, section.positive(FIELD, DEFAULT_THETA)?));
    }
    Ok(())
}

/// Checks that `layer_types`, if present, lists full attention for every layer.
pub(super) fn check_layer_types(text: &Section<'_>, num_layers: usize) -> Result<(), ConfigError> {
    const FIELD: &str = "layer_types";
    let Some(value) = text.get(FIELD) else { return Ok(()) };
    let types = value.as_array().ok_or_else(|| text.mistyped(FIELD, value, "a list of layer types"))?;
    if let Some(other) = types.iter().find(|layer| **layer != FULL_ATTENTION) {
        return Err(text.unsupported_value(FIELD, other, FULL_ATTENTION));
    }
    if types.len() != num_layers {
        return Err(ConfigError::Inconsistent(format!(
            "`text_config.{FIELD}` has {} entries but `text_config.num_hidden_layers` is {num_layers}",
            types.len()
        )));
    }
    Ok(())
}
