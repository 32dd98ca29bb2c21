//! Checks of fields that have no type of their own, against the tables of `foreign_fields.rs`.
//!
//! Called by `validate` and by the endpoints that translate their requests to chat requests. Never
//! lets a field through that could change the reply: a field is in a table at this value, or the
//! request is refused.

use serde_json::Value;

use super::{
    InvalidRequest,
    foreign_fields::{Accepted, ForeignField, IN_MESSAGES, IN_PARTS, TOP_LEVEL},
    shorten,
};
use crate::http::types::Extra;

/// Refuses top-level fields that are unknown or ask for something that is not done here.
///
/// # Errors
/// The first such field.
pub fn check_top_level(extra: &Extra) -> Result<(), InvalidRequest> {
    check_beside(extra, &[])
}

/// Refuses top-level fields as [`check_top_level`] does, except the fields `own` of the endpoint.
///
/// # Errors
/// The first field that is neither one of `own` nor accepted by the table.
pub fn check_beside(extra: &Extra, own: &[&str]) -> Result<(), InvalidRequest> {
    for (name, value) in extra {
        if value.is_null() || own.contains(&name.as_str()) {
            continue;
        }
        let Some(field) = find(TOP_LEVEL, name) else {
            let name = shorten(name);
            let message = format!("unknown field \"{name}\" on this endpoint; remove it");
            return Err(InvalidRequest::field(name, message));
        };
        if !field.accepts(value) && !field.is_idle(extra) {
            return Err(InvalidRequest::field(name, field.refusal()));
        }
    }
    Ok(())
}

/// Refuses fields of a message that are neither empty nor accepted by the table.
///
/// # Errors
/// The first such field; `path` is the message's.
pub fn check_message(path: &str, extra: &Extra) -> Result<(), InvalidRequest> {
    for (name, value) in extra {
        let message = match find(IN_MESSAGES, name) {
            _ if is_empty(value) => continue,
            Some(field) if field.accepts(value) => continue,
            Some(field) => field.refusal(),
            None => format!("unknown field \"{}\" in a message; send role and content only", shorten(name)),
        };
        return Err(InvalidRequest::field(format!("{path}.{}", shorten(name)), message));
    }
    Ok(())
}

/// Removes the fields of a content part that have no effect.
pub fn remove_ignored_of_part(extra: &mut Extra) {
    extra.retain(|name, _| find(IN_PARTS, name).is_none());
}

fn find(table: &'static [ForeignField], name: &str) -> Option<&'static ForeignField> {
    table.iter().find(|field| field.name == name)
}

impl ForeignField {
    /// Returns the values other than `null` at which the field changes nothing; `None`: all values.
    pub fn values(&self) -> Option<Vec<Value>> {
        match self.accepted {
            Accepted::Any => None,
            Accepted::Only(texts) | Accepted::UnlessTools(texts) => {
                let parse =
                    |text: &&str| serde_json::from_str(text).expect("the tables hold JSON: this is a bug");
                Some(texts.iter().map(parse).collect())
            }
        }
    }

    fn accepts(&self, value: &Value) -> bool {
        value.is_null()
            || self.values().is_none_or(|values| values.iter().any(|accepted| is_same(accepted, value)))
    }

    /// Returns true if the request chooses no tool, so that lists of tools are unused.
    fn is_idle(&self, request: &Extra) -> bool {
        let unused = |choice: &str| request.get(choice).is_some_and(|value| value == "none");
        matches!(self.accepted, Accepted::UnlessTools(_))
            && (unused("tool_choice") || unused("function_call"))
    }

    fn refusal(&self) -> String {
        let ForeignField { name, otherwise, .. } = self;
        match self.accepted {
            Accepted::Only(texts) | Accepted::UnlessTools(texts) if !texts.is_empty() => {
                format!("\"{name}\" must be {} or left out: {otherwise}", texts.join(" or "))
            }
            _ => format!("\"{name}\" must be left out: {otherwise}"),
        }
    }
}

/// Equality of JSON values, of numbers by their value.
fn is_same(accepted: &Value, value: &Value) -> bool {
    match (accepted, value) {
        // The numbers of the tables are small: f64 holds them exactly.
        (Value::Number(accepted), Value::Number(value)) => accepted.as_f64() == value.as_f64(),
        (accepted, value) => accepted == value,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests;
