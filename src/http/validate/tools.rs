//! Tools: which function the answer must call, and calls of an earlier conversation as text.
//!
//! Called by `guided` and `messages`. The model was not trained to choose whether to call a
//! function: a call is an answer in the form of the function's parameters, so it must be asked for.
//! The model is not shown the tools.

use serde_json::{Map, Value, json};

use super::{Guided, InvalidRequest, refuse_unknown, shorten};
use crate::{
    http::types::{ChatRequest, ContentPart, Extra, Message, TextOr},
    prompt::{Constraint, Function},
};

/// OpenAI allows 64 characters.
const MAX_NAME_BYTES: usize = 128;

/// Returns what the answer must be so that it calls a function; `None` when it calls none.
///
/// # Errors
/// Tools among which the model would have to choose whether to call any, and faults of `tools` and
/// `tool_choice`.
pub(super) fn forced(request: &ChatRequest) -> Result<Option<Guided>, InvalidRequest> {
    let choice = match &request.tool_choice {
        None | Some(Value::Null) => ToolChoice::Auto,
        Some(choice) => tool_choice(choice)?,
    };
    let tools = match &request.tools {
        None | Some(Value::Null) => &vec![],
        Some(Value::Array(tools)) => tools,
        Some(_) => return Err(InvalidRequest::field("tools", "tools must be a list of functions")),
    };
    let allowed: Vec<&str> = match choice {
        ToolChoice::None => return Ok(None),
        ToolChoice::Auto if tools.is_empty() => return Ok(None),
        ToolChoice::Auto => {
            let message = "the model cannot choose whether to call a function; send tool_choice \"required\" or the \
                           function's name, or \"none\"";
            let is_given = request.tool_choice.as_ref().is_some_and(|choice| !choice.is_null());
            return Err(InvalidRequest::field(if is_given { "tool_choice" } else { "tools" }, message));
        }
        ToolChoice::Required => vec![],
        ToolChoice::Of(names) => names,
    };
    if tools.is_empty() {
        return Err(InvalidRequest::field(
            "tools",
            "tool_choice asks for a function, but there are no tools",
        ));
    }
    let named: Vec<Named> =
        tools.iter().enumerate().map(|(i, tool)| function(i, tool)).collect::<Result<_, _>>()?;
    for name in &allowed {
        if !named.iter().any(|function| function.name == *name) {
            let message = format!("tool_choice names \"{}\", which is not among the tools", shorten(name));
            return Err(InvalidRequest::field("tool_choice", message));
        }
    }
    let chosen = named.into_iter().filter(|function| allowed.is_empty() || allowed.contains(&function.name));
    calls(chosen.collect()).map(Some)
}

/// The meaning of `tool_choice`.
enum ToolChoice<'a> {
    Auto,
    None,
    /// One of all.
    Required,
    /// One of these.
    Of(Vec<&'a str>),
}

/// A function of `tools`, and where its parameters are.
struct Named<'a> {
    name: &'a str,
    parameters: Option<&'a Value>,
    path: String,
}

fn tool_choice(choice: &Value) -> Result<ToolChoice<'_>, InvalidRequest> {
    let message = "tool_choice must be \"none\", \"required\" or an object with the name of a function";
    let fault = || InvalidRequest::field("tool_choice", message);
    match choice {
        Value::String(choice) => match choice.as_str() {
            "auto" => Ok(ToolChoice::Auto),
            "none" => Ok(ToolChoice::None),
            "required" | "any" => Ok(ToolChoice::Required),
            _ => Err(fault()),
        },
        Value::Object(choice) => match choice.get("type").and_then(Value::as_str) {
            None | Some("function") => Ok(ToolChoice::Of(vec![name_in(choice).ok_or_else(fault)?])),
            Some("allowed_tools") => allowed_tools(choice).ok_or_else(fault),
            Some(_) => Err(fault()),
        },
        _ => Err(fault()),
    }
}

/// Returns the name of a function: in the object `function` as chat requests have it, or next to
/// the type as responses have it.
fn name_in(object: &Map<String, Value>) -> Option<&str> {
    object.get("function").unwrap_or(&Value::Null).get("name").or_else(|| object.get("name"))?.as_str()
}

/// `mode` and `tools`, in an object of their own or not.
fn allowed_tools(choice: &Map<String, Value>) -> Option<ToolChoice<'_>> {
    let choice = choice.get("allowed_tools").and_then(Value::as_object).unwrap_or(choice);
    let tools = choice.get("tools")?.as_array()?.iter();
    let names: Option<Vec<&str>> = tools.map(|tool| name_in(tool.as_object()?)).collect();
    match choice.get("mode")?.as_str()? {
        "auto" => Some(ToolChoice::Auto),
        "required" => names.filter(|names| !names.is_empty()).map(ToolChoice::Of),
        _ => None,
    }
}

fn function(index: usize, tool: &Value) -> Result<Named<'_>, InvalidRequest> {
    let path = format!("tools[{index}]");
    let kind = tool.get("type").and_then(Value::as_str);
    let Some(tool) = tool.as_object().filter(|_| matches!(kind, None | Some("function"))) else {
        let message = format!("{path} is no function; the answer can only be made to call functions");
        return Err(InvalidRequest::field(path, message));
    };
    const IN_FUNCTION: [&str; 4] = ["name", "description", "parameters", "strict"];
    let (path, function) = match tool.get("function") {
        Some(Value::Object(function)) => {
            refuse_others(tool, &path, &["type", "function", "cache_control"])?;
            (format!("{path}.function"), function)
        }
        Some(_) => {
            return Err(InvalidRequest::field(format!("{path}.function"), "function must be an object"));
        }
        None => (path, tool),
    };
    refuse_others(function, &path, &[&IN_FUNCTION[..], &["type", "cache_control"]].concat())?;
    let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        let message = format!("the name of a function must have 1 to {MAX_NAME_BYTES} bytes");
        return Err(InvalidRequest::field(format!("{path}.name"), message));
    }
    let parameters = function.get("parameters").filter(|parameters| !parameters.is_null());
    Ok(Named { name, parameters, path: format!("{path}.parameters") })
}

/// Refuses fields that are neither null nor among `known`.
fn refuse_others(object: &Map<String, Value>, path: &str, known: &[&str]) -> Result<(), InvalidRequest> {
    let mut others = object.clone();
    others.retain(|name, _| !known.contains(&name.as_str()));
    refuse_unknown(&others, path, known)
}

fn calls(functions: Vec<Named<'_>>) -> Result<Guided, InvalidRequest> {
    let mut names: Vec<&str> = functions.iter().map(|function| function.name).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        let message = format!("there are two functions called \"{}\"; rename one", shorten(pair[0]));
        return Err(InvalidRequest::field("tools", message));
    }
    let param = match functions.as_slice() {
        [one] => one.path.clone(),
        _ => "tools".to_owned(),
    };
    let mut called = Vec::new();
    for Named { name, parameters, path } in functions {
        let parameters = match parameters {
            None => json!({"type": "object", "properties": {}}),
            Some(Value::Object(schema)) if schema.is_empty() => json!({"type": "object"}),
            Some(Value::Object(schema)) => Value::Object(schema.clone()),
            Some(_) => {
                return Err(InvalidRequest::field(path, "parameters must be a JSON schema, an object"));
            }
        };
        called.push(Function { name: name.to_owned(), parameters: without_others(parameters) });
    }
    Ok(Guided { constraint: Constraint::Calls(called), param })
}

/// Closes a list of parameters: a function has no others, unless the schema allows them.
fn without_others(mut schema: Value) -> Value {
    const OPEN: [&str; 9] = [
        "additionalProperties",
        "allOf",
        "anyOf",
        "oneOf",
        "not",
        "if",
        "$ref",
        "patternProperties",
        "unevaluatedProperties",
    ];
    if let Some(object) = schema.as_object_mut()
        && object.contains_key("properties")
        && !OPEN.iter().any(|key| object.contains_key(*key))
    {
        object.insert("additionalProperties".into(), false.into());
    }
    schema
}

/// The kind of a message before it became text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Text,
    /// A call of a function.
    Call,
    /// The result of a call.
    Result,
}

/// Makes plain text of a call or of the result of one: the call becomes the assistant's text, its
/// arguments, and the result the user's.
///
/// # Errors
/// Calls without arguments.
pub(super) fn as_text(path: &str, message: &mut Message) -> Result<Origin, InvalidRequest> {
    match message.role.as_str() {
        "tool" | "function" => {
            message.role = "user".into();
            message.extra.shift_remove("tool_call_id");
            message.content.get_or_insert_with(|| TextOr::Text(String::new()));
            Ok(Origin::Result)
        }
        "assistant" => {
            let calls = take_calls(path, &mut message.extra)?;
            if calls.is_empty() {
                return Ok(Origin::Text);
            }
            let calls = calls.join("\n");
            match &mut message.content {
                Some(TextOr::Text(text)) if !text.is_empty() => *text = format!("{text}\n{calls}"),
                Some(TextOr::Other(parts)) => {
                    let part =
                        ContentPart { kind: "text".into(), text: Some(calls), ..ContentPart::default() };
                    parts.push(part);
                }
                _ => message.content = Some(TextOr::Text(calls)),
            }
            Ok(Origin::Call)
        }
        _ => Ok(Origin::Text),
    }
}

/// The arguments of each call.
fn take_calls(path: &str, extra: &mut Extra) -> Result<Vec<String>, InvalidRequest> {
    let mut calls = Vec::new();
    if let Some(Value::Array(list)) = extra.get("tool_calls") {
        for (i, call) in list.iter().enumerate() {
            let function = call.get("function").unwrap_or(&Value::Null);
            calls.push(arguments(&format!("{path}.tool_calls[{i}].function"), function)?);
        }
        extra.shift_remove("tool_calls");
    }
    if let Some(call @ Value::Object(_)) = extra.get("function_call") {
        calls.push(arguments(&format!("{path}.function_call"), call)?);
        extra.shift_remove("function_call");
    }
    Ok(calls)
}

fn arguments(path: &str, function: &Value) -> Result<String, InvalidRequest> {
    match function.get("arguments") {
        Some(Value::String(arguments)) => Ok(arguments.clone()),
        Some(arguments @ Value::Object(_)) => Ok(arguments.to_string()),
        _ => {
            let path = format!("{path}.arguments");
            Err(InvalidRequest::field(path, "a call needs its arguments, a text of JSON"))
        }
    }
}
