//! Tests of the values at which fields pass, and of the tables in `docs/fields.md`.

use std::{collections::BTreeSet, fmt::Write};

use serde_json::json;

use super::*;

/// Checks a request with this one field.
fn check(name: &str, value: Value) -> Result<(), InvalidRequest> {
    check_top_level(&Extra::from_iter([(name.to_owned(), value)]))
}

fn refusal(outcome: Result<(), InvalidRequest>) -> (String, String) {
    let Err(InvalidRequest::Field { param, message }) = outcome else { panic!("{outcome:?}") };
    (param, message)
}

#[test]
fn every_field_passes_at_the_values_that_change_nothing_and_at_no_other() {
    for field in TOP_LEVEL {
        assert_eq!(check(field.name, Value::Null), Ok(()), "{}", field.name);
        let Some(values) = field.values() else {
            assert_eq!(check(field.name, json!({"any": [1]})), Ok(()), "{}", field.name);
            continue;
        };
        for value in values {
            assert_eq!(check(field.name, value.clone()), Ok(()), "{}: {value}", field.name);
        }
        for value in [json!(7.5), json!("seven"), json!([7]), json!({"seven": 7})] {
            let (param, message) = refusal(check(field.name, value));
            assert_eq!(param, field.name);
            assert!(message.contains(field.otherwise) && message.contains("left out: "), "{message}");
            assert!(
                message.starts_with(&format!("\"{param}\" must be ")) && message.len() < 200,
                "{message}"
            );
        }
    }
}

#[test]
fn numbers_are_compared_by_value() {
    for (name, value) in
        [("length_penalty", json!(1)), ("length_penalty", json!(1.0)), ("priority", json!(0.0))]
    {
        assert_eq!(check(name, value), Ok(()));
    }
    for (name, value) in [
        ("length_penalty", json!(1.5)),
        ("length_penalty", json!("1")),
        ("length_penalty", json!(true)),
        ("priority", json!(1)),
        ("priority", json!(-1)),
        ("priority", json!(false)),
        ("skip_special_tokens", json!(false)),
        ("skip_special_tokens", json!(1)),
        ("bad_words", json!([""])),
    ] {
        assert_eq!(refusal(check(name, value)).0, name);
    }
}

#[test]
fn tools_are_ignored_when_the_request_chooses_none() {
    let tool = json!([{"type": "function", "function": {"name": "f"}}]);
    for (choice, tools) in [("tool_choice", "tools"), ("function_call", "functions")] {
        let ask = |choice_value: Value| {
            let fields = [(choice.to_owned(), choice_value), (tools.to_owned(), tool.clone())];
            check_top_level(&Extra::from_iter(fields))
        };
        assert_eq!(ask(json!("none")), Ok(()));
        let (param, message) = refusal(ask(json!("auto")));
        assert_eq!(param, tools);
        assert!(message.contains("\"tool_choice\": \"none\""), "{message}");
    }
    assert_eq!(refusal(check("tools", tool)).0, "tools");
}

#[test]
fn unknown_fields_are_refused_even_when_they_are_empty() {
    for value in [json!(1), json!(""), json!([]), json!({}), json!(false)] {
        let (param, message) = refusal(check("temprature", value));
        assert_eq!(param, "temprature");
        assert!(message.contains("unknown field \"temprature\""), "{message}");
    }
    assert_eq!(check("temprature", Value::Null), Ok(()));
    let (param, message) = refusal(check(&"x".repeat(1 << 20), json!(1)));
    assert!(param.len() < 200 && message.len() < 200);
}

#[test]
fn an_endpoint_reads_its_own_fields_before_the_table() {
    let extra = Extra::from_iter([("n".to_owned(), json!(3)), ("suffix".to_owned(), json!(""))]);
    assert_eq!(check_beside(&extra, &["n"]), Ok(()));
    assert_eq!(refusal(check_beside(&extra, &[])).0, "n");
}

#[test]
fn messages_may_carry_what_clients_echo() {
    let ask = |name: &str, value: Value| {
        check_message("messages[2]", &Extra::from_iter([(name.to_owned(), value)]))
    };
    for (name, value) in [
        ("id", json!("msg_1")),
        ("name", json!("me")),
        ("cache_control", json!({"type": "ephemeral"})),
        ("provider_specific_fields", json!({"refusal": null, "segment": "answer"})),
        ("thinking_blocks", json!([{"type": "thinking", "thinking": "Hm."}])),
        ("audio", Value::Null),
        ("function_call", Value::Null),
        ("tool_calls", json!([])),
        ("prefix", json!(false)),
        ("unheard_of", Value::Null),
        ("unheard_of", json!("")),
        ("unheard_of", json!([])),
        ("unheard_of", json!({})),
    ] {
        assert_eq!(ask(name, value.clone()), Ok(()), "{name}: {value}");
    }
    for (name, value) in [
        ("tool_calls", json!([{"id": "call_1"}])),
        ("audio", json!({"id": "audio_1"})),
        ("prefix", json!(true)),
        ("unheard_of", json!(0)),
        ("unheard_of", json!(false)),
        ("unheard_of", json!("x")),
    ] {
        assert_eq!(refusal(ask(name, value.clone())).0, format!("messages[2].{name}"), "{value}");
    }
}

#[test]
fn names_are_sorted_and_stand_once_in_a_table() {
    for table in [TOP_LEVEL, IN_MESSAGES, IN_PARTS] {
        let names: BTreeSet<&str> = table.iter().map(|field| field.name).collect();
        assert_eq!(names.len(), table.len());
        let (any, some): (Vec<&ForeignField>, Vec<&ForeignField>) =
            table.iter().partition(|field| field.values().is_none());
        assert!(any.is_sorted_by_key(|field| field.name) && some.is_sorted_by_key(|field| field.name));
    }
}

/// Returns a table in the form of `docs/fields.md`.
fn markdown(table: &[ForeignField]) -> String {
    let mut text = "| field | accepted | other values |\n|---|---|---|\n".to_owned();
    for field in table {
        let accepted = match field.accepted {
            Accepted::Any => "any value".to_owned(),
            Accepted::Only([]) => "`null`".to_owned(),
            Accepted::Only(values) => format!("`{}`", values.join("`, `")),
            Accepted::UnlessTools(values) => {
                format!("`{}`, any with `\"tool_choice\": \"none\"`", values.join("`, `"))
            }
        };
        let _ = writeln!(text, "| `{}` | {accepted} | {} |", field.name, field.otherwise);
    }
    text
}

#[test]
fn the_document_shows_these_tables() {
    let document = std::fs::read_to_string("docs/fields.md").unwrap();
    for table in [TOP_LEVEL, IN_MESSAGES, IN_PARTS] {
        let expected = markdown(table);
        assert!(document.contains(&expected), "docs/fields.md must have this table:\n{expected}");
    }
    assert_eq!(
        document.matches("\n|---|---|---|\n").count(),
        3,
        "docs/fields.md has a table that is not in the code"
    );
}
