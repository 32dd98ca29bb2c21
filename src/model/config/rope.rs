//! Reads the rotary positions of the decoder: theta, wherever a version of transformers keeps it, and the layer types.
//!
//! Used by [`super`] alone. Up to 4.57 transformers writes `rope_theta` and `rope_scaling`, from 5.0 on
//! `rope_parameters`, which for some models has an object for each layer type. Never guesses: two different values are an
//! error, and so is every kind of rotary positions but the plain one.

use serde_json::Value;

use super::{ConfigError, section::Section};

/// Theta of the decoder's class, where no field says one.
const DEFAULT_THETA: f64 = 10_000.0;

/// The only layer type there is.
const FULL_ATTENTION: &str = "full_attention";

/// A theta, and the full name of the field that says so.
type Said = (String, f64);

/// Returns the one theta that all fields agree on.
///
/// The original ignores such fields at the top level, so they may only repeat what `text` says.
pub(super) fn theta(root: &Section<'_>, text: &Section<'_>) -> Result<f64, ConfigError> {
    let (mut said, mut repeated) = (Vec::new(), Vec::new());
    collect(text, &mut said)?;
    if said.is_empty() && text.map.contains_key("rope_theta") {
        return Err(text.mistyped("rope_theta", &Value::Null, "a positive number"));
    }
    let default = ("the default of `text_config.rope_theta`".to_owned(), DEFAULT_THETA);
    let (name, theta) = said.first().cloned().unwrap_or(default);
    collect(root, &mut repeated)?;
    for (other, value) in said.iter().chain(&repeated) {
        if *value != theta {
            return Err(ConfigError::Inconsistent(format!("`{other}` is {value} but {name} is {theta}")));
        }
    }
    Ok(theta)
}

fn collect(section: &Section<'_>, said: &mut Vec<Said>) -> Result<(), ConfigError> {
    push_theta(section, said)?;
    for field in ["rope_parameters", "rope_scaling"] {
        if section.get(field).is_some() {
            parameters(&section.section(field)?, said)?;
        }
    }
    Ok(())
}

/// Reads an object of rotary parameters, or an object of those by layer type.
fn parameters(rope: &Section<'_>, said: &mut Vec<Said>) -> Result<(), ConfigError> {
    // The type first: it explains the other fields.
    for field in ["rope_type", "type"] {
        rope.only_str(field, "default")?;
    }
    push_theta(rope, said)?;
    for (field, value) in rope.map {
        match field.as_str() {
            "rope_type" | "type" | "rope_theta" => {}
            FULL_ATTENTION if !value.is_null() => parameters(&rope.section(field)?, said)?,
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

fn push_theta(section: &Section<'_>, said: &mut Vec<Said>) -> Result<(), ConfigError> {
    const FIELD: &str = "rope_theta";
    if section.get(FIELD).is_some() {
        let name = format!("`{}`", section.full_name(FIELD));
        said.push((name, section.positive(FIELD, DEFAULT_THETA)?));
    }
    Ok(())
}

/// Checks that `layer_types`, if any, gives all layers full attention.
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
