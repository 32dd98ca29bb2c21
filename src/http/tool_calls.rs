//! Calls of functions: from the text of an answer to the call that it is, piece by piece.
//!
//! Used by `http/chat.rs`, `http/sse.rs` and `http/responses_api` where the answer was made to be a
//! call ([`crate::prompt::Constraint::Calls`]). Knows that form only; it never guesses at free
//! text.

use serde::Serialize;
use utoipa::ToSchema;

use crate::prompt::call_prefix;

/// A call of a function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct ToolCall {
    pub id: String,
    /// function
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub function: CalledFunction,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct CalledFunction {
    pub name: String,
    /// JSON
    pub arguments: String,
}

/// A piece of a call in a stream: first id, type and name, then the arguments bit by bit.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ToolCallDelta {
    /// There is one call in a reply.
    pub index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    pub function: CalledFunctionDelta,
}

#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct CalledFunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    pub arguments: String,
}

/// A part of a call, as the answer's text reveals it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallPiece {
    /// The function is known. Comes once, before any arguments.
    Begin { id: String, name: String },
    /// More of the arguments, never empty.
    Arguments(String),
}

impl From<CallPiece> for ToolCallDelta {
    fn from(piece: CallPiece) -> Self {
        let (id, name, arguments) = match piece {
            CallPiece::Begin { id, name } => (Some(id), Some(name), String::new()),
            CallPiece::Arguments(arguments) => (None, None, arguments),
        };
        let kind = id.is_some().then_some("function");
        ToolCallDelta { index: 0, id, kind, function: CalledFunctionDelta { name, arguments } }
    }
}

/// Reads the answer of one choice.
#[derive(Debug, Clone)]
pub struct CallReader {
    functions: Vec<String>,
    /// Text whose meaning is open: the beginning of a call, or the brace that may end it.
    held: String,
    has_begun: bool,
}

impl CallReader {
    /// For an answer that calls one of `functions`, of which there is at least one.
    pub fn new(functions: Vec<String>) -> Self {
        CallReader { functions, held: String::new(), has_begun: false }
    }

    /// Returns whether it is known which function is called.
    pub fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// Takes more text of the answer.
    pub fn push(&mut self, text: &str) -> Vec<CallPiece> {
        let mut pieces = Vec::new();
        self.held.push_str(text);
        if !self.has_begun {
            let Some((name, prefix_bytes)) = self.called() else { return pieces };
            self.has_begun = true;
            self.held.drain(..prefix_bytes);
            let id = format!("call_{}", uuid::Uuid::new_v4().simple());
            pieces.push(CallPiece::Begin { id, name });
        }
        let keep = usize::from(self.is_wrapped() && self.held.ends_with('}'));
        let arguments: String = self.held.drain(..self.held.len() - keep).collect();
        if !arguments.is_empty() {
            pieces.push(CallPiece::Arguments(arguments));
        }
        pieces
    }

    /// Takes the end of the answer. What is held back of a whole one is the brace around a call.
    pub fn finish(&mut self, is_whole: bool) -> Option<CallPiece> {
        let held = std::mem::take(&mut self.held);
        (self.has_begun && !is_whole && !held.is_empty()).then_some(CallPiece::Arguments(held))
    }

    /// Returns the call that a whole answer is.
    pub fn read(functions: &[String], answer: &str, is_whole: bool) -> Option<ToolCall> {
        let mut reader = CallReader::new(functions.to_vec());
        let mut pieces = reader.push(answer);
        pieces.extend(reader.finish(is_whole));
        let mut call = None;
        for piece in pieces {
            match (piece, &mut call) {
                (CallPiece::Begin { id, name }, call) => {
                    let function = CalledFunction { name, arguments: String::new() };
                    *call = Some(ToolCall { id, kind: "function", function });
                }
                (CallPiece::Arguments(more), Some(call)) => call.function.arguments.push_str(&more),
                (CallPiece::Arguments(_), None) => {}
            }
        }
        call
    }

    /// Returns whether the answer names its function: with a single function it holds the arguments
    /// only.
    fn is_wrapped(&self) -> bool {
        self.functions.len() > 1
    }

    /// The function that is called, and how much of the text says so.
    fn called(&self) -> Option<(String, usize)> {
        if !self.is_wrapped() {
            return self.functions.first().filter(|_| !self.held.is_empty()).map(|name| (name.clone(), 0));
        }
        let called = |name: &&String| self.held.starts_with(&call_prefix(name));
        self.functions.iter().find(called).map(|name| (name.clone(), call_prefix(name).len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    /// Name and arguments of an answer that comes in pieces of `size` characters.
    fn pieces(functions: &[&str], answer: &str, size: usize, is_whole: bool) -> (Option<String>, String) {
        let mut reader = CallReader::new(names(functions));
        let characters: Vec<char> = answer.chars().collect();
        let mut all = vec![];
        for piece in characters.chunks(size) {
            all.extend(reader.push(&piece.iter().collect::<String>()));
        }
        all.extend(reader.finish(is_whole));
        let (mut called, mut arguments) = (None, String::new());
        for (i, piece) in all.into_iter().enumerate() {
            match piece {
                CallPiece::Begin { id, name } => {
                    assert!(i == 0 && id.starts_with("call_") && id.len() > 20);
                    called = Some(name);
                }
                CallPiece::Arguments(more) => {
                    assert!(called.is_some() && !more.is_empty());
                    arguments.push_str(&more);
                }
            }
        }
        (called, arguments)
    }

    #[test]
    fn any_cut_gives_the_same_call() {
        let arguments = "{\"a\": {\"b\": \"}}é\"}}";
        let wrapped = format!("{{\"name\": \"turn \\\"x\\\"\", \"arguments\": {arguments}}}");
        for size in 1..40 {
            assert_eq!(pieces(&["turn"], arguments, size, true), (Some("turn".into()), arguments.into()));
            let functions = ["turn", "turn \"x\""];
            assert_eq!(
                pieces(&functions, &wrapped, size, true),
                (Some("turn \"x\"".into()), arguments.into())
            );
            let cut = wrapped.strip_suffix('}').unwrap();
            assert_eq!(pieces(&functions, cut, size, false).1, arguments);
            assert_eq!(pieces(&functions, &wrapped[..12], size, false), (None, String::new()));
        }
        let call = CallReader::read(&names(&["turn", "turn \"x\""]), &wrapped, true).unwrap();
        assert_eq!(
            (call.function.name.as_str(), call.function.arguments.as_str()),
            ("turn \"x\"", arguments)
        );
    }

    #[test]
    fn no_answer_is_no_call() {
        assert_eq!(CallReader::read(&names(&["turn"]), "", false), None);
        let delta = ToolCallDelta::from(CallPiece::Begin { id: "call_1".into(), name: "turn".into() });
        let expected = serde_json::json!({"index": 0, "id": "call_1", "type": "function",
            "function": {"name": "turn", "arguments": ""}});
        assert_eq!(serde_json::to_value(delta).unwrap(), expected);
        let more = ToolCallDelta::from(CallPiece::Arguments("{".into()));
        let expected = serde_json::json!({"index": 0, "function": {"arguments": "{"}});
        assert_eq!(serde_json::to_value(more).unwrap(), expected);
    }
}
