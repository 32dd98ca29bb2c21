//! The item of output that is a call of a function, and the events that tell of it.
//!
//! Used by `output.rs` where the answer was made to be a call.

use super::{
    objects::{At, Item, Payload, Status},
    output::Told,
};

/// The call as far as it has come.
#[derive(Debug)]
pub struct OpenCall {
    id: String,
    call_id: String,
    name: String,
    arguments: String,
}

impl OpenCall {
    /// A call that has no arguments yet.
    pub fn new(call_id: String, name: String) -> Self {
        let id = format!("fc_{}", uuid::Uuid::new_v4().simple());
        OpenCall { id, call_id, name, arguments: String::new() }
    }

    /// Announces it.
    pub fn begin(&self, output_index: usize) -> Told {
        ("response.output_item.added", Payload::Item { output_index, item: self.item(Status::InProgress) })
    }

    /// Takes more arguments.
    pub fn push(&mut self, output_index: usize, more: String) -> Told {
        self.arguments.push_str(&more);
        let at = self.at(output_index);
        ("response.function_call_arguments.delta", Payload::Delta { at, delta: more, logprobs: None })
    }

    /// Ends it; returns the whole item too.
    pub fn end(self, output_index: usize, status: Status) -> ([Told; 2], Item) {
        let (at, item) = (self.at(output_index), self.item(status));
        let OpenCall { name, arguments, .. } = self;
        let told = [
            ("response.function_call_arguments.done", Payload::Arguments { at, name, arguments }),
            ("response.output_item.done", Payload::Item { output_index, item: item.clone() }),
        ];
        (told, item)
    }

    fn at(&self, output_index: usize) -> At {
        At { item_id: self.id.clone(), output_index, summary_index: None, content_index: None }
    }

    fn item(&self, status: Status) -> Item {
        let OpenCall { id, call_id, name, arguments } = self;
        let (id, call_id) = (id.clone(), call_id.clone());
        Item::FunctionCall { id, status, call_id, name: name.clone(), arguments: arguments.clone() }
    }
}
