//! From the events of a generation to items of output, and to the events that tell of them.
//!
//! Used by `mod.rs` for streams and unary responses alike: both have the same items.

use super::objects::{At, Item, Part, Payload, Status};
use crate::{
    output::{OutputEvent, Segment},
    scheduler::StopReason,
};

/// Type and payload of an event that is to be numbered.
pub type Told = (&'static str, Payload);

/// The output as far as it has come.
#[derive(Debug)]
pub struct Output {
    /// Items that are whole.
    items: Vec<Item>,
    open: Option<OpenItem>,
    /// Why it ended; aborted as long as it has not.
    reason: StopReason,
}

impl Default for Output {
    fn default() -> Self {
        Output { items: vec![], open: None, reason: StopReason::Aborted }
    }
}

/// The item that grows.
#[derive(Debug)]
struct OpenItem {
    id: String,
    thinks: bool,
    text: String,
}

impl Output {
    /// Takes the next event; gives what there is to tell of it.
    pub fn take(&mut self, event: OutputEvent) -> Vec<Told> {
        match event {
            OutputEvent::Delta { segment, text, .. } => self.push(segment, text),
            OutputEvent::Finished { reason, .. } => {
                self.reason = reason;
                self.close(if reason == StopReason::Length { Status::Incomplete } else { Status::Completed })
            }
        }
    }

    /// Why the output ended.
    pub fn reason(&self) -> StopReason {
        self.reason
    }

    fn push(&mut self, segment: Segment, text: String) -> Vec<Told> {
        let thinks = segment == Segment::Think;
        let mut told = vec![];
        if self.open.as_ref().is_some_and(|open| open.thinks != thinks) {
            told.extend(self.close(Status::Completed));
        }
        let at = self.items.len();
        let open = self.open.get_or_insert_with(|| {
            let open = OpenItem::new(thinks);
            told.extend(open.begin(at));
            open
        });
        open.text.push_str(&text);
        let kind =
            if thinks { "response.reasoning_summary_text.delta" } else { "response.output_text.delta" };
        told.push((kind, Payload::Delta { at: open.at(at), delta: text, logprobs: open.logprobs() }));
        told
    }

    /// The end of the output; the last item is as whole as `status` says.
    fn close(&mut self, status: Status) -> Vec<Told> {
        let Some(open) = self.open.take() else { return vec![] };
        let output_index = self.items.len();
        let (told, item) = open.end(output_index, status);
        self.items.push(item);
        told
    }

    /// All items that are whole, and the text of the answer.
    pub fn into_items(self) -> (Vec<Item>, String) {
        let texts = self.items.iter().filter_map(|item| match item {
            Item::Message { content, .. } => Some(content),
            Item::Reasoning { .. } => None,
        });
        let texts = texts.flatten().filter_map(|part| match part {
            Part::OutputText { text, .. } => Some(text.as_str()),
            Part::SummaryText { .. } | Part::ReasoningText { .. } => None,
        });
        let answer = texts.collect();
        (self.items, answer)
    }
}

impl OpenItem {
    fn new(thinks: bool) -> Self {
        let prefix = if thinks { "rs" } else { "msg" };
        OpenItem { id: format!("{prefix}_{}", uuid::Uuid::new_v4().simple()), thinks, text: String::new() }
    }

    /// Where the item's one text is.
    fn at(&self, output_index: usize) -> At {
        let (summary_index, content_index) = if self.thinks { (Some(0), None) } else { (None, Some(0)) };
        At { item_id: self.id.clone(), output_index, summary_index, content_index }
    }

    /// OpenAI's events have them for the answer only.
    fn logprobs(&self) -> Option<Vec<serde_json::Value>> {
        (!self.thinks).then(Vec::new)
    }

    fn part(&self, text: String) -> Part {
        if self.thinks { Part::SummaryText { text } } else { Part::output_text(text) }
    }

    /// The item with `text`, or as it is announced, without any.
    fn item(&self, text: Option<String>, status: Status) -> Item {
        let id = self.id.clone();
        let parts = |text: Option<String>, part: fn(String) -> Part| text.into_iter().map(part).collect();
        if self.thinks {
            Item::Reasoning {
                id,
                status,
                summary: parts(text.clone(), |text| Part::SummaryText { text }),
                content: parts(text, |text| Part::ReasoningText { text }),
                encrypted_content: None,
            }
        } else {
            Item::Message { id, status, role: "assistant", content: parts(text, Part::output_text) }
        }
    }

    fn begin(&self, output_index: usize) -> [Told; 2] {
        let part_added =
            if self.thinks { "response.reasoning_summary_part.added" } else { "response.content_part.added" };
        let item = self.item(None, Status::InProgress);
        [
            ("response.output_item.added", Payload::Item { output_index, item }),
            (part_added, Payload::Part { at: self.at(output_index), part: self.part(String::new()) }),
        ]
    }

    fn end(self, output_index: usize, status: Status) -> (Vec<Told>, Item) {
        let (text_done, part_done) = if self.thinks {
            ("response.reasoning_summary_text.done", "response.reasoning_summary_part.done")
        } else {
            ("response.output_text.done", "response.content_part.done")
        };
        let at = self.at(output_index);
        let item = self.item(Some(self.text.clone()), status);
        let text = self.text.clone();
        let told = vec![
            (text_done, Payload::Text { at: at.clone(), text, logprobs: self.logprobs() }),
            (part_done, Payload::Part { at, part: self.part(self.text.clone()) }),
            ("response.output_item.done", Payload::Item { output_index, item: item.clone() }),
        ];
        (told, item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(told: &[Told]) -> Vec<&str> {
        told.iter().map(|(kind, _)| kind.strip_prefix("response.").unwrap()).collect()
    }

    #[test]
    fn an_item_is_announced_grows_and_is_told_whole() {
        let mut output = Output::default();
        let told = output.push(Segment::Think, "a".into());
        assert_eq!(
            kinds(&told),
            ["output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta"]
        );
        assert_eq!(kinds(&output.push(Segment::Think, "b".into())), ["reasoning_summary_text.delta"]);
        let told = output.push(Segment::Answer, "C".into());
        let expected = [
            "reasoning_summary_text.done",
            "reasoning_summary_part.done",
            "output_item.done",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
        ];
        assert_eq!(kinds(&told), expected);
        let told = output.close(Status::Incomplete);
        assert_eq!(kinds(&told), ["output_text.done", "content_part.done", "output_item.done"]);
        let (items, answer) = output.into_items();
        assert_eq!(answer, "C");
        let json = serde_json::to_value(&items).unwrap();
        assert_eq!(json[0]["summary"][0]["text"], "ab");
        assert_eq!(json[0]["content"][0]["type"], "reasoning_text");
        assert_eq!(json[0]["status"], "completed");
        assert_eq!(json[1]["content"][0]["text"], "C");
        assert_eq!(json[1]["status"], "incomplete");
    }

    #[test]
    fn no_text_is_no_item() {
        let mut output = Output::default();
        assert!(output.close(Status::Completed).is_empty());
        assert!(output.into_items().0.is_empty());
    }
}
