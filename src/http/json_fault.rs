//! Turns serde's errors into one sentence for the client, in the words of JSON.
//!
//! Called by `body.rs`, `completions.rs` and `responses_api/request.rs` for values of a wrong type,
//! and by `types.rs` for the name of an expected type. Must never repeat more than a few words of
//! the input, nor name a Rust type: the sentence leaves out a type without an entry in
//! [`expected_words`].

use serde::{
    Deserialize,
    de::value::{self, UnitDeserializer},
};
use serde_path_to_error::{Path, Segment};

use super::validate::{shorten, shorten_to};

/// Longest path that is named, characters. A path holds at most one name that is the client's own.
const MAX_PATH_CHARS: usize = 160;
/// Longest sentence taken from an error that has no known form, characters.
const MAX_OTHER_CHARS: usize = 120;

/// A fault of the JSON of a request.
#[derive(Debug, PartialEq, Eq)]
pub struct JsonFault {
    /// Path of the faulty field, if the error is in one.
    pub param: Option<String>,
    pub message: String,
}

impl JsonFault {
    /// Describes what `serde_path_to_error` found.
    pub fn new(error: serde_path_to_error::Error<serde_json::Error>) -> Self {
        let path = readable(error.path());
        let cause = error.into_inner();
        let text = cause.to_string();
        if cause.is_syntax() || cause.is_eof() {
            let message = format!("the request is not valid JSON: {}", shorten_to(MAX_OTHER_CHARS, &text));
            return JsonFault { param: None, message };
        }
        let text = without_position(&text, &cause);
        if let Some(name) = quoted(text, "missing field `") {
            let param = if path.is_empty() { name } else { format!("{path}.{name}") };
            let message = format!("the field \"{param}\" is missing; add it");
            return JsonFault { param: Some(param), message };
        }
        let subject = if path.is_empty() { "the request" } else { path.as_str() };
        let message = sentence(subject, text);
        JsonFault { param: (!path.is_empty()).then_some(path), message }
    }
}

/// The name in backticks after `prefix`, if `text` is nothing else.
fn quoted(text: &str, prefix: &str) -> Option<String> {
    Some(shorten(text.strip_prefix(prefix)?.strip_suffix('`')?))
}

/// Translates the text of a serde error about `subject`.
fn sentence(subject: &str, text: &str) -> String {
    let is_kind = ["invalid type: ", "invalid value: ", "invalid length "];
    if let Some(rest) = is_kind.iter().find_map(|prefix| text.strip_prefix(prefix)) {
        // From the end: what was found is the client's and may hold these words too.
        let (found, expected) = rest.rsplit_once(", expected ").unwrap_or((rest, ""));
        return match expected_words(expected) {
            Some(expected) => format!("{subject} must be {expected}, but is {}", found_words(found)),
            None => format!("{subject} has the wrong form: it is {}", found_words(found)),
        };
    }
    if let Some(name) = quoted(text, "duplicate field `") {
        return format!("{subject} has the field \"{name}\" twice; send it once");
    }
    for prefix in ["unknown variant `", "unknown field `"] {
        if let Some((found, known)) =
            text.strip_prefix(prefix).and_then(|rest| rest.rsplit_once("`, expected "))
        {
            let known = known.trim_start_matches("one of ").replace('`', "");
            let found = shorten(found);
            return format!(
                "{subject} has \"{found}\", but known are {}",
                shorten_to(MAX_OTHER_CHARS, &known)
            );
        }
    }
    format!("{subject} is not valid: {}", shorten_to(MAX_OTHER_CHARS, text))
}

/// A value as serde's errors show it, by its kind and, where it is short, itself.
fn found_words(found: &str) -> String {
    let in_backticks = || found.split('`').nth(1).map(shorten).unwrap_or_default();
    if let Some(text) = found.strip_prefix("string ") {
        let text = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
        return format!("the text \"{}\"", shorten(text));
    }
    match found.split([' ', '`']).next().unwrap_or_default() {
        "boolean" => in_backticks(),
        "integer" | "floating" => format!("the number {}", in_backticks()),
        "sequence" => "a list".into(),
        "map" => "an object".into(),
        "null" | "unit" | "Option" => "null".into(),
        number if number.bytes().all(|byte| byte.is_ascii_digit()) => {
            format!("a list of {}", shorten(number))
        }
        _ => "something else".into(),
    }
}

/// Returns the JSON name of a Rust type, from the text in which its deserializer says what it
/// expects. `None` for a type that has no entry here.
pub fn expected_words(expected: &str) -> Option<String> {
    let words = match expected {
        "a string" | "string" | "str" | "a borrowed string" | "a character" | "char" => "text",
        "a boolean" | "bool" => "true or false",
        "u8" | "u16" | "u32" | "u64" | "u128" | "usize" => "a whole number, 0 or more",
        "i8" | "i16" | "i32" | "i64" | "i128" | "isize" => "a whole number",
        "f32" | "f64" | "a JSON number" | "a number" => "a number",
        "a sequence" | "a list" => "a list",
        "a map" | "an object" => "an object",
        "any valid JSON value" => "JSON",
        _ if expected.starts_with("struct ") => "an object",
        _ if expected.starts_with("text or ") => expected,
        _ => return None,
    };
    Some(words.to_owned())
}

/// Returns the JSON name of `T`, which is a list or an object.
pub fn expected_of<'de, T: Deserialize<'de>>() -> String {
    // A deserializer that is given nothing says what it expects.
    let nothing = UnitDeserializer::<value::Error>::new();
    let error = T::deserialize(nothing).err().map(|error| error.to_string()).unwrap_or_default();
    let expected = error.rsplit_once(", expected ").and_then(|(_, expected)| expected_words(expected));
    expected.unwrap_or_else(|| "an object".into())
}

/// The text of `error` without the place in the body: the field's path says it better.
fn without_position<'a>(text: &'a str, error: &serde_json::Error) -> &'a str {
    let position = format!(" at line {} column {}", error.line(), error.column());
    text.strip_suffix(&position).unwrap_or(text)
}

/// The path in the form `messages[0].content`; empty at the top.
fn readable(path: &Path) -> String {
    let mut text = String::new();
    for segment in path {
        let name = match segment {
            Segment::Seq { index } => {
                text.push_str(&format!("[{index}]"));
                continue;
            }
            Segment::Map { key: name } | Segment::Enum { variant: name } => shorten(name),
            Segment::Unknown => continue,
        };
        if !text.is_empty() {
            text.push('.');
        }
        text.push_str(&name);
    }
    shorten_to(MAX_PATH_CHARS, &text)
}

#[cfg(test)]
mod tests {
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    use super::*;

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only the errors are looked at")]
    struct Sample {
        text: Option<String>,
        yes: Option<bool>,
        count: Option<usize>,
        index: Option<i64>,
        ratio: Option<f64>,
        list: Option<Vec<u64>>,
        inner: Option<Box<Sample>>,
        names: Option<std::collections::BTreeMap<String, f64>>,
        kind: Option<Kind>,
        address: Option<std::net::IpAddr>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        Asc,
        Desc,
    }

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only the errors are looked at")]
    struct Strict {
        needed: Vec<Needed>,
    }

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only the errors are looked at")]
    struct Needed {
        role: String,
    }

    fn fault<T: DeserializeOwned + std::fmt::Debug>(json: &str) -> JsonFault {
        let mut reader = serde_json::Deserializer::from_str(json);
        JsonFault::new(serde_path_to_error::deserialize::<_, T>(&mut reader).unwrap_err())
    }

    #[test]
    fn wrong_types_are_told_in_the_words_of_json() {
        for (field, value, message) in [
            ("text", json!(5), "text must be text, but is the number 5"),
            ("text", json!([1]), "text must be text, but is a list"),
            ("yes", json!("so"), "yes must be true or false, but is the text \"so\""),
            ("count", json!(-1), "count must be a whole number, 0 or more, but is the number -1"),
            ("count", json!(1.5), "count must be a whole number, 0 or more, but is the number 1.5"),
            ("index", json!(true), "index must be a whole number, but is true"),
            (
                "ratio",
                json!("hot, expected f64"),
                "ratio must be a number, but is the text \"hot, expected f64\"",
            ),
            ("list", json!({"a": 1}), "list must be a list, but is an object"),
            ("list", json!([1, null]), "list[1] must be a whole number, 0 or more, but is null"),
            ("inner", json!("x"), "inner must be an object, but is the text \"x\""),
            ("inner", json!({"ratio": []}), "inner.ratio must be a number, but is a list"),
            ("names", json!({"k": "v"}), "names.k must be a number, but is the text \"v\""),
            ("kind", json!("up"), "kind has \"up\", but known are asc or desc"),
        ] {
            let found = fault::<Sample>(&json!({field: value}).to_string());
            assert_eq!(found.message, message);
            assert!(found.param.is_some_and(|param| param.starts_with(field)), "{message}");
        }
        let top = fault::<Sample>("\"Hi\"");
        assert_eq!(top.message, "the request must be an object, but is the text \"Hi\"");
        assert_eq!(top.param, None);
    }

    #[test]
    fn missing_and_repeated_fields_are_named() {
        let missing = fault::<Strict>("{}");
        assert_eq!(missing.param.as_deref(), Some("needed"));
        assert_eq!(missing.message, "the field \"needed\" is missing; add it");
        let inner = fault::<Strict>(r#"{"needed":[{"role":"a"},{}]}"#);
        assert_eq!(inner.param.as_deref(), Some("needed[1].role"));
        let twice = fault::<Strict>(r#"{"needed":[],"needed":[]}"#);
        assert!(twice.message.contains("\"needed\" twice"), "{}", twice.message);
    }

    #[test]
    fn faults_of_the_form_say_where_they_are() {
        let broken = fault::<Value>("{\"a\": }");
        let message = "the request is not valid JSON: expected value at line 1 column 7";
        assert_eq!(broken, JsonFault { param: None, message: message.into() });
    }

    #[test]
    fn nothing_long_is_repeated() {
        let long = "x".repeat(1 << 20);
        for json in [
            json!({"ratio": long}),
            json!({"kind": long}),
            json!({"inner": long}),
            json!({"names": {long.as_str(): "v"}}),
            json!({"address": long}),
            json!(long),
        ] {
            let JsonFault { param, message } = fault::<Sample>(&json.to_string());
            assert!(message.chars().filter(|c| *c == 'x').count() <= 130, "{message}");
            assert!(message.len() < 400 && param.is_none_or(|param| param.len() < 200), "{message}");
        }
    }

    #[test]
    fn types_that_nobody_listed_are_not_named() {
        let found = fault::<Sample>(r#"{"address": 5}"#);
        assert_eq!(found.message, "address has the wrong form: it is the number 5");
        assert_eq!(
            sentence("a", "invalid type: map, expected tuple struct Vec"),
            "a has the wrong form: it is an object"
        );
        assert_eq!(expected_words("alloc::string::String"), None);
    }
}
