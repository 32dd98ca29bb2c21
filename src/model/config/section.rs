//! Typed access to one object of a `config.json`, whose errors carry the full name of the field.
//!
//! Used by [`super`] alone. Knows no field of its own.

use serde_json::{Map, Value};

use super::{ConfigError, MAX_DIMENSION};

/// One object of the config, whose errors carry the full name of the field.
pub(super) struct Section<'a> {
    pub prefix: String,
    pub map: &'a Map<String, Value>,
}

impl<'a> Section<'a> {
    /// A field left out and a `null` are the same to the original.
    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// Returns the name of a field with the names of the objects that hold it.
    pub fn full_name(&self, field: &str) -> String {
        let field = shortened(field.into());
        if self.prefix.is_empty() { field } else { format!("{}.{field}", self.prefix) }
    }

    pub fn missing(&self, field: &str) -> ConfigError {
        ConfigError::Missing { field: self.full_name(field) }
    }

    pub fn mistyped(&self, field: &str, found: &Value, expected: impl Into<String>) -> ConfigError {
        ConfigError::Type { field: self.full_name(field), found: shown(found), expected: expected.into() }
    }

    pub fn unsupported(&self, field: &str, supported: &str) -> ConfigError {
        let found = self.get(field).map_or_else(|| "missing".into(), shown);
        ConfigError::Unsupported { field: self.full_name(field), found, supported: supported.into() }
    }

    /// The error for one value of a list.
    pub fn unsupported_value(&self, field: &str, found: &Value, supported: &str) -> ConfigError {
        let (field, supported) = (self.full_name(field), supported.into());
        ConfigError::Unsupported { field, found: shown(found), supported }
    }

    pub fn unknown(&self, field: &str) -> ConfigError {
        let found = self.get(field).map_or_else(|| "null".into(), shown);
        ConfigError::Unknown { field: self.full_name(field), found }
    }

    pub fn only(&self, ok: bool, field: &str, supported: &str) -> Result<(), ConfigError> {
        if ok { Ok(()) } else { Err(self.unsupported(field, supported)) }
    }

    pub fn only_str(&self, field: &str, supported: &str) -> Result<(), ConfigError> {
        self.only(self.string(field)?.is_none_or(|found| found == supported), field, supported)
    }

    pub fn section(&self, field: &str) -> Result<Section<'a>, ConfigError> {
        let value = self.get(field).ok_or_else(|| self.missing(field))?;
        let map = value.as_object().ok_or_else(|| self.mistyped(field, value, "an object"))?;
        Ok(Section { prefix: self.full_name(field), map })
    }

    /// A count or width in `1..=MAX_DIMENSION`; without `default` the field must be there.
    pub fn dimension(&self, field: &str, default: Option<usize>) -> Result<usize, ConfigError> {
        self.bounded(field, default, MAX_DIMENSION)
    }

    /// A whole number in `1..=max`.
    pub fn bounded(&self, field: &str, default: Option<usize>, max: usize) -> Result<usize, ConfigError> {
        let Some(value) = self.get(field) else {
            return default.ok_or_else(|| self.missing(field));
        };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
        number
            .filter(|n| (1..=max).contains(n))
            .ok_or_else(|| self.mistyped(field, value, format!("a whole number between 1 and {max}")))
    }

    pub fn integer(&self, field: &str) -> Result<Option<i64>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_i64().map(Some).ok_or_else(|| self.mistyped(field, value, "a whole number"))
    }

    /// A positive number. Null is an error: the original would compute with it, not with the
    /// default.
    pub fn positive(&self, field: &str, default: f64) -> Result<f64, ConfigError> {
        let Some(value) = self.map.get(field) else { return Ok(default) };
        let number = value.as_f64().filter(|n| n.is_finite() && *n > 0.0);
        number.ok_or_else(|| self.mistyped(field, value, "a positive number"))
    }

    pub fn flag(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.mistyped(field, value, "true or false"))
    }

    pub fn string(&self, field: &str) -> Result<Option<&'a str>, ConfigError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.mistyped(field, value, "a string"))
    }
}

/// A value short enough for a sentence.
fn shown(value: &Value) -> String {
    shortened(value.to_string())
}

fn shortened(text: String) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
