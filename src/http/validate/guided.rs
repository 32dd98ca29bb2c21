//! What the answer must be, and how long the model may think about it.
//!
//! Called by `validate`. OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_…` fields come to
//! one [`Guided`]. Whether a grammar can be made of it is found out later, by `http/guide.rs`.

use serde_json::{Map, Value, json};

use super::{InvalidRequest, shorten, tools};
use crate::{config::Config, http::types::ChatRequest, prompt::Constraint};

/// A constraint, and the field it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct Guided {
    pub constraint: Constraint,
    pub param: String,
}

impl Guided {
    /// Returns the names of the functions one of which the answer calls.
    pub fn functions(&self) -> Vec<String> {
        match &self.constraint {
            Constraint::Calls(functions) => functions.iter().map(|function| function.name.clone()).collect(),
            _ => Vec::new(),
        }
    }
}

/// The one constraint of a request, if there is any.
pub fn validate(request: &ChatRequest, config: &Config) -> Result<Option<Guided>, InvalidRequest> {
    let sources = [
        ("response_format", &request.response_format),
        ("structured_outputs", &request.structured_outputs),
        ("guided_choice", &request.guided_choice),
        ("guided_regex", &request.guided_regex),
        ("guided_json", &request.guided_json),
        ("guided_grammar", &request.guided_grammar),
    ];
    let mut found: Option<Guided> = None;
    for (name, value) in sources {
        let Some(value) = value.as_ref().filter(|value| !value.is_null()) else { continue };
        let guided = match name {
            "response_format" => response_format(value)?,
            "structured_outputs" => Some(structured_outputs(value, config)?),
            _ => Some(one(name, name.trim_start_matches("guided_"), value, config)?),
        };
        if let (Some(first), Some(second)) = (&found, &guided) {
            let message = format!("{} and {name} both say what the answer must be; send one", first.param);
            return Err(InvalidRequest::field(&second.param, message));
        }
        found = found.or(guided);
    }
    if let Some(calls) = tools::forced(request)? {
        if let Some(first) = &found {
            let message =
                format!("{} and tool_choice both say what the answer must be; send one", first.param);
            return Err(InvalidRequest::field("tool_choice", message));
        }
        found = Some(calls);
    }
    if let Some(guided) = &found {
        check_size(guided, config)?;
        if request.ignore_eos == Some(true) {
            let message =
                "ignore_eos asks for a reply without end, but a guided answer has one; send one of them";
            return Err(InvalidRequest::field("ignore_eos", message));
        }
    }
    Ok(found)
}

/// Most tokens of thinking.
pub fn thinking_budget(request: &ChatRequest) -> Result<Option<usize>, InvalidRequest> {
    let budget = match (request.thinking_token_budget, request.max_thinking_tokens) {
        (Some(budget), Some(other)) if budget != other => {
            let message = format!(
                "thinking_token_budget is {budget} but max_thinking_tokens is {other}; send one of them"
            );
            return Err(InvalidRequest::field("max_thinking_tokens", message));
        }
        (budget, other) => budget.or(other),
    };
    // More than any context holds is no limit.
    Ok(budget.map(|budget| usize::try_from(budget).unwrap_or(usize::MAX)))
}

fn object<'a>(value: &'a Value, param: &str) -> Result<&'a Map<String, Value>, InvalidRequest> {
    value.as_object().ok_or_else(|| InvalidRequest::field(param, format!("{param} must be an object")))
}

fn refuse_others(object: &Map<String, Value>, path: &str, known: &[&str]) -> Result<(), InvalidRequest> {
    let others = object.iter().filter(|(name, _)| !known.contains(&name.as_str()));
    super::refuse_unknown(&others.map(|(name, value)| (name.clone(), value.clone())).collect(), path, known)
}

fn response_format(value: &Value) -> Result<Option<Guided>, InvalidRequest> {
    let format = object(value, "response_format")?;
    refuse_others(format, "response_format", &["type", "json_schema"])?;
    let schema = format.get("json_schema").filter(|schema| !schema.is_null());
    let kind = format.get("type").and_then(Value::as_str);
    match (kind, schema) {
        (Some("text"), None) => Ok(None),
        (Some("json_object"), None) => {
            Ok(Some(Guided { constraint: any_object(), param: "response_format".into() }))
        }
        (Some("json_schema"), Some(schema)) => json_schema(schema).map(Some),
        (Some("json_schema"), None) => Err(InvalidRequest::field(
            "response_format.json_schema",
            "a response_format of type json_schema needs json_schema.schema",
        )),
        (Some("text" | "json_object"), Some(_)) => Err(InvalidRequest::field(
            "response_format.json_schema",
            "json_schema needs \"type\": \"json_schema\"",
        )),
        _ => Err(InvalidRequest::field(
            "response_format.type",
            "response_format.type must be one of text, json_object, json_schema",
        )),
    }
}

/// `strict` changes nothing: the schema is kept to in any case. `name` and `description` are for people.
fn json_schema(value: &Value) -> Result<Guided, InvalidRequest> {
    const PATH: &str = "response_format.json_schema";
    let format = object(value, PATH)?;
    refuse_others(format, PATH, &["name", "description", "schema", "strict"])?;
    for (name, fits) in [
        ("name", Value::is_string as fn(&Value) -> bool),
        ("description", Value::is_string),
        ("strict", Value::is_boolean),
    ] {
        if format.get(name).is_some_and(|value| !value.is_null() && !fits(value)) {
            let kind = if name == "strict" { "true or false" } else { "text" };
            return Err(InvalidRequest::field(format!("{PATH}.{name}"), format!("{name} must be {kind}")));
        }
    }
    let param = format!("{PATH}.schema");
    match format.get("schema").filter(|schema| !schema.is_null()) {
        Some(schema) => Ok(Guided { constraint: Constraint::Json(schema.clone()), param }),
        None => Err(InvalidRequest::field(param, "json_schema needs a schema")),
    }
}

fn structured_outputs(value: &Value, config: &Config) -> Result<Guided, InvalidRequest> {
    const KINDS: [&str; 5] = ["choice", "regex", "json", "grammar", "json_object"];
    let outputs = object(value, "structured_outputs")?;
    refuse_others(outputs, "structured_outputs", &KINDS)?;
    // As a client's library writes what was not asked for.
    let asked = |(_, value): &(&String, &Value)| !value.is_null() && *value != &Value::Bool(false);
    let mut kinds = outputs.iter().filter(asked);
    match (kinds.next(), kinds.next()) {
        (Some((kind, value)), None) => one(&format!("structured_outputs.{kind}"), kind, value, config),
        _ => Err(InvalidRequest::field(
            "structured_outputs",
            format!("structured_outputs needs exactly one of {}", KINDS.join(", ")),
        )),
    }
}

fn any_object() -> Constraint {
    Constraint::Json(json!({"type": "object"}))
}

fn one(param: &str, kind: &str, value: &Value, config: &Config) -> Result<Guided, InvalidRequest> {
    let fault = |message: &str| Err(InvalidRequest::field(param, message));
    let constraint = match (kind, value) {
        ("choice", Value::Array(choices)) => {
            let texts = choices.iter().map(|choice| choice.as_str().filter(|choice| !choice.is_empty()));
            match texts.map(|text| text.map(str::to_owned)).collect::<Option<Vec<_>>>() {
                Some(choices) if !choices.is_empty() => Constraint::Choice(choices),
                _ => return fault("choices must be a list of texts, none of them empty"),
            }
        }
        ("choice", _) => return fault("choices must be a list of texts"),
        ("regex", Value::String(regex)) => Constraint::Regex(without_anchors(regex).to_owned()),
        ("regex", _) => return fault("a regular expression must be a text"),
        ("grammar", Value::String(grammar)) => Constraint::Grammar(grammar.clone()),
        ("grammar", _) => return fault("a grammar must be a text, in Lark's notation"),
        // Before anything is made of it: a text counts as one value, whatever is in it.
        ("json", Value::String(text)) if text.len() > config.max_guide_bytes => {
            return fault(&too_large(param, text.len(), config));
        }
        ("json", Value::String(text)) => match serde_json::from_str(text) {
            Ok(schema) => Constraint::Json(schema),
            Err(error) => {
                return fault(&format!("the JSON schema is not JSON: {}", shorten(&error.to_string())));
            }
        },
        ("json", schema) => Constraint::Json(schema.clone()),
        ("json_object", Value::Bool(true)) => any_object(),
        _ => return fault("json_object must be true or false"),
    };
    Ok(Guided { constraint, param: param.to_owned() })
}

/// The whole answer is matched anyway.
fn without_anchors(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    match regex.strip_suffix('$') {
        Some(rest) if (rest.len() - rest.trim_end_matches('\\').len()).is_multiple_of(2) => rest,
        _ => regex,
    }
}

fn check_size(guided: &Guided, config: &Config) -> Result<(), InvalidRequest> {
    let num_bytes = match &guided.constraint {
        Constraint::Choice(choices) if choices.len() > config.max_guide_choices => {
            let (num, max) = (choices.len(), config.max_guide_choices);
            let message = format!("there are {num} choices, but at most {max} are allowed");
            return Err(InvalidRequest::field(&guided.param, message));
        }
        Constraint::Calls(functions) if functions.len() > config.max_guide_choices => {
            let (num, max) = (functions.len(), config.max_guide_choices);
            let message = format!("there are {num} functions to choose from, but at most {max} are allowed");
            return Err(InvalidRequest::field(&guided.param, message));
        }
        Constraint::Choice(choices) => choices.iter().map(String::len).sum(),
        Constraint::Regex(text) | Constraint::Grammar(text) => text.len(),
        Constraint::Json(schema) => schema.to_string().len(),
        Constraint::Calls(functions) => {
            functions.iter().map(|function| function.name.len() + function.parameters.to_string().len()).sum()
        }
    };
    if num_bytes > config.max_guide_bytes {
        return Err(InvalidRequest::field(&guided.param, too_large(&guided.param, num_bytes, config)));
    }
    Ok(())
}

fn too_large(param: &str, num_bytes: usize, config: &Config) -> String {
    format!("{param} has {num_bytes} bytes, but at most {} are allowed", config.max_guide_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(more: Value) -> Result<Option<Guided>, InvalidRequest> {
        let mut request = json!({"messages": []});
        request.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
        let request = serde_json::from_value(request).unwrap();
        validate(&request, &Config { max_guide_bytes: 100, max_guide_choices: 3, ..Config::default() })
    }

    #[test]
    fn every_way_to_say_it_means_the_same() {
        let choice = Constraint::Choice(vec!["A".into(), "B".into()]);
        let schema = json!({"type": "integer"});
        for (more, constraint) in [
            (
                json!({"structured_outputs": {"choice": ["A", "B"], "json": null, "json_object": false}}),
                &choice,
            ),
            (json!({"guided_choice": ["A", "B"]}), &choice),
            (
                json!({"guided_regex": "a+", "response_format": {"type": "text"}}),
                &Constraint::Regex("a+".into()),
            ),
            (json!({"structured_outputs": {"regex": "^a+$"}}), &Constraint::Regex("a+".into())),
            (json!({"guided_regex": "a\\$"}), &Constraint::Regex("a\\$".into())),
            (json!({"guided_json": schema}), &Constraint::Json(schema.clone())),
            (json!({"guided_json": schema.to_string()}), &Constraint::Json(schema.clone())),
            (json!({"structured_outputs": {"json": schema}}), &Constraint::Json(schema.clone())),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema}}}),
                &Constraint::Json(schema.clone()),
            ),
            (json!({"response_format": {"type": "json_object"}}), &any_object()),
            (json!({"structured_outputs": {"json_object": true}}), &any_object()),
            (json!({"guided_grammar": "start: \"a\""}), &Constraint::Grammar("start: \"a\"".into())),
        ] {
            let guided = check(more.clone()).unwrap().unwrap_or_else(|| panic!("{more}"));
            assert_eq!(&guided.constraint, constraint, "{more}");
        }
        assert_eq!(check(json!({"response_format": {"type": "text"}, "guided_json": null})), Ok(None));
    }

    #[test]
    fn faults_are_named_by_their_path() {
        for (more, expected) in [
            (json!({"response_format": "json"}), "response_format"),
            (json!({"response_format": {"type": "xml"}}), "response_format.type"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
            (json!({"response_format": {"type": "text", "json_schema": {}}}), "response_format.json_schema"),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}),
                "response_format.json_schema.schema",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "odd": 1}}}),
                "response_format.json_schema.odd",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}}),
                "response_format.json_schema.strict",
            ),
            (json!({"structured_outputs": {}}), "structured_outputs"),
            (json!({"structured_outputs": {"choice": ["A"], "regex": "a"}}), "structured_outputs"),
            (json!({"structured_outputs": {"structural_tag": "x"}}), "structured_outputs.structural_tag"),
            (json!({"structured_outputs": {"choice": []}}), "structured_outputs.choice"),
            (json!({"guided_choice": ["A", ""]}), "guided_choice"),
            (json!({"guided_choice": ["A", 1]}), "guided_choice"),
            (json!({"guided_choice": ["A", "B", "C", "D"]}), "guided_choice"),
            (json!({"guided_choice": ["A".repeat(101)]}), "guided_choice"),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"guided_regex": ["a"]}), "guided_regex"),
            (json!({"guided_grammar": {}}), "guided_grammar"),
            (json!({"guided_regex": "a", "guided_choice": ["A"]}), "guided_regex"),
            (
                json!({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}),
                "structured_outputs.regex",
            ),
            (json!({"guided_regex": "a", "ignore_eos": true}), "ignore_eos"),
        ] {
            match check(more.clone()) {
                Err(InvalidRequest::Field { param, message }) => {
                    assert_eq!(param, expected, "{more}: {message}");
                    assert!(message.len() > 10 && !message.ends_with('.'), "{message}");
                }
                other => panic!("{more}: {other:?}"),
            }
        }
    }
}
