//! From the events of a generation to items of output, and to the events that tell of them.
//!
//! Used by `mod.rs` for streams and unary responses alike: both have the same items.

use super::{
    call::OpenCall,
    objects::{At, Item, Part, Payload, Status},
};
use crate::{
    http::{
        choices::{ChoiceView, TokenLogprob},
        tool_calls::{CallPiece, CallReader},
    },
    output::{OutputEvent, ScoredToken, Segment},
    scheduler::StopReason,
};

/// Type and payload of an event that is to be numbered.
pub type Told = (&'static str, Payload);

/// The output as far as it has come.
#[derive(Debug)]
pub struct Output {
    view: ChoiceView,
    /// Items that are whole.
    items: Vec<Item>,
    open: Option<OpenItem>,
    /// If the answer is a call.
    reader: Option<CallReader>,
    open_call: Option<OpenCall>,
    /// Why it ended; aborted as long as it has not.
    reason: StopReason,
}

/// The item that grows.
#[derive(Debug)]
struct OpenItem {
    id: String,
    thinks: bool,
    text: String,
    /// Of the answer's tokens, tags included.
    logprobs: Vec<TokenLogprob>,
}

impl Output {
    /// `view` knows whether log probabilities are wanted; the answer calls one of `functions`, if
    /// there are any.
    pub fn new(view: ChoiceView, functions: Vec<String>) -> Self {
        let reader = (!functions.is_empty()).then(|| CallReader::new(functions));
        Output { view, items: vec![], open: None, reader, open_call: None, reason: StopReason::Aborted }
    }

    /// Takes the next event; gives what there is to tell of it.
    pub fn take(&mut self, event: OutputEvent) -> Vec<Told> {
        match event {
            OutputEvent::Delta { segment, text, .. }
                if segment != Segment::Think && self.reader.is_some() =>
            {
                let pieces = self.reader.as_mut().map(|reader| reader.push(&text)).unwrap_or_default();
                pieces.into_iter().flat_map(|piece| self.push_call(piece)).collect()
            }
            OutputEvent::Delta { segment, text, tokens } => self.push(segment, text, &tokens),
            OutputEvent::Finished(ending) => {
                self.reason = ending.reason;
                let logprobs = self.logprobs(&ending.tokens);
                if let Some(open) = self.open.as_mut().filter(|open| !open.thinks) {
                    open.logprobs.extend(logprobs);
                }
                let is_cut = ending.reason == StopReason::Length;
                let is_whole = ending.reason == StopReason::EndOfSequence;
                let rest = self.reader.as_mut().and_then(|reader| reader.finish(is_whole));
                let mut told = rest.map(|piece| self.push_call(piece)).unwrap_or_default();
                told.extend(self.close(if is_cut { Status::Incomplete } else { Status::Completed }));
                told
            }
        }
    }

    /// Why the output ended.
    pub fn reason(&self) -> StopReason {
        self.reason
    }

    /// All items that are whole, and the text of the answer: of a call its arguments.
    pub fn into_items(self) -> (Vec<Item>, String) {
        let mut answer = String::new();
        for item in &self.items {
            match item {
                Item::Message { content, .. } => {
                    for part in content {
                        if let Part::OutputText { text, .. } = part {
                            answer.push_str(text);
                        }
                    }
                }
                Item::FunctionCall { arguments, .. } => answer.push_str(arguments),
                Item::Reasoning { .. } => {}
            }
        }
        (self.items, answer)
    }

    fn push_call(&mut self, piece: CallPiece) -> Vec<Told> {
        match (piece, &mut self.open_call) {
            (CallPiece::Begin { id, name }, _) => {
                let mut told = self.close(Status::Completed);
                let call = OpenCall::new(id, name);
                told.push(call.begin(self.items.len()));
                self.open_call = Some(call);
                told
            }
            (CallPiece::Arguments(more), Some(call)) => vec![call.push(self.items.len(), more)],
            (CallPiece::Arguments(_), None) => vec![],
        }
    }

    fn push(&mut self, segment: Segment, text: String, tokens: &[ScoredToken]) -> Vec<Told> {
        let thinks = segment == Segment::Think;
        let mut told = vec![];
        if self.open.as_ref().is_some_and(|open| open.thinks != thinks) {
            told.extend(self.close(Status::Completed));
        }
        let (output_index, logprobs) = (self.items.len(), self.logprobs(tokens));
        let open = self.open.get_or_insert_with(|| {
            let open = OpenItem::new(thinks);
            told.extend(open.begin(output_index));
            open
        });
        open.text.push_str(&text);
        let at = open.at(output_index);
        let kind =
            if thinks { "response.reasoning_summary_text.delta" } else { "response.output_text.delta" };
        // OpenAI's events have them for the answer only.
        let logprobs = (!thinks).then(|| {
            open.logprobs.extend_from_slice(&logprobs);
            logprobs
        });
        told.push((kind, Payload::Delta { at, delta: text, logprobs }));
        told
    }

    /// Of the tokens that do not belong to the thinking, if they are wanted.
    fn logprobs(&self, tokens: &[ScoredToken]) -> Vec<TokenLogprob> {
        let shown = tokens.iter().filter(|token| self.view.wanted.logprobs && !token.thinking);
        shown.map(|token| self.view.token_logprob(token)).collect()
    }

    /// The end of an item, which is as whole as `status` says.
    fn close(&mut self, status: Status) -> Vec<Told> {
        if let Some(call) = self.open_call.take() {
            let (told, item) = call.end(self.items.len(), status);
            self.items.push(item);
            return told.into();
        }
        let Some(open) = self.open.take() else { return vec![] };
        let (told, item) = open.end(self.items.len(), status);
        self.items.push(item);
        told.into()
    }
}

impl OpenItem {
    fn new(thinks: bool) -> Self {
        let prefix = if thinks { "rs" } else { "msg" };
        let id = format!("{prefix}_{}", uuid::Uuid::new_v4().simple());
        OpenItem { id, thinks, text: String::new(), logprobs: vec![] }
    }

    /// Where the item's one text is.
    fn at(&self, output_index: usize) -> At {
        let (summary_index, content_index) = if self.thinks { (Some(0), None) } else { (None, Some(0)) };
        At { item_id: self.id.clone(), output_index, summary_index, content_index }
    }

    /// The text as a part.
    fn part(&self) -> Part {
        let text = self.text.clone();
        if self.thinks {
            Part::SummaryText { text }
        } else {
            Part::OutputText { text, annotations: vec![], logprobs: self.logprobs.clone() }
        }
    }

    /// The item with `parts`, which are none when it is announced.
    fn item(&self, parts: Vec<Part>, status: Status) -> Item {
        let id = self.id.clone();
        if !self.thinks {
            return Item::Message { id, status, role: "assistant", content: parts };
        }
        let content = parts.iter().map(|_| Part::ReasoningText { text: self.text.clone() }).collect();
        Item::Reasoning { id, status, summary: parts, content, encrypted_content: None }
    }

    fn begin(&self, output_index: usize) -> [Told; 2] {
        let kind =
            if self.thinks { "response.reasoning_summary_part.added" } else { "response.content_part.added" };
        let item = self.item(vec![], Status::InProgress);
        [
            ("response.output_item.added", Payload::Item { output_index, item }),
            (kind, Payload::Part { at: self.at(output_index), part: self.part() }),
        ]
    }

    fn end(self, output_index: usize, status: Status) -> ([Told; 3], Item) {
        let (text_done, part_done) = if self.thinks {
            ("response.reasoning_summary_text.done", "response.reasoning_summary_part.done")
        } else {
            ("response.output_text.done", "response.content_part.done")
        };
        let at = self.at(output_index);
        let part = self.part();
        let item = self.item(vec![part.clone()], status);
        let logprobs = (!self.thinks).then_some(self.logprobs);
        let told = [
            (text_done, Payload::Text { at: at.clone(), text: self.text, logprobs }),
            (part_done, Payload::Part { at, part }),
            ("response.output_item.done", Payload::Item { output_index, item: item.clone() }),
        ];
        (told, item)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{http::validate::ValidChoices, prompt::Tokenizer};

    fn output() -> Output {
        let wanted = ValidChoices { count: 1, ..ValidChoices::default() };
        Output::new(ChoiceView { wanted, tokenizer: Arc::new(Tokenizer::bytes()) }, vec![])
    }

    fn kinds(told: &[Told]) -> Vec<&str> {
        told.iter().map(|(kind, _)| kind.strip_prefix("response.").unwrap()).collect()
    }

    #[test]
    fn an_item_is_announced_grows_and_is_told_whole() {
        let mut output = output();
        let told = output.push(Segment::Think, "a".into(), &[]);
        assert_eq!(
            kinds(&told),
            ["output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta"]
        );
        assert_eq!(kinds(&output.push(Segment::Think, "b".into(), &[])), ["reasoning_summary_text.delta"]);
        let told = output.push(Segment::Answer, "C".into(), &[]);
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
        let mut output = output();
        assert!(output.close(Status::Completed).is_empty());
        assert!(output.into_items().0.is_empty());
    }
}
