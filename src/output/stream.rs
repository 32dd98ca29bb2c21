//! One reply, from token ids to events.
//!
//! Driven by `http/generation.rs` and the commands, for streamed and unary replies alike: bytes, text, stop strings, tags,
//! segments. The work a token costs does not grow with the reply. It never decides that a reply is over but for a stop
//! string.

use std::{collections::VecDeque, sync::Arc};

use super::{
    OutputEvent, Segment,
    detokenizer::Detokenizer,
    segmenter::{Found, Segmenter, Tag, TagScanner, Verbatim},
    stop_matcher::StopMatcher,
};
use crate::{
    prompt::Tokenizer,
    scheduler::{StopReason, TokenId},
};

/// Turns the tokens of one reply into events.
#[derive(Debug)]
pub struct OutputAssembler {
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    scanner: TagScanner,
    segmenter: Segmenter,
    reasoning: ReasoningMeter,
    /// Everything is plain text, tags included.
    raw: bool,
    completion_tokens: usize,
    finished: bool,
}

impl OutputAssembler {
    /// For one reply. `raw` (`reasoning_format: "none"`) leaves the text as the model wrote it, tags and white space
    /// included, all of it [`Segment::Plain`].
    pub fn new(tokenizer: Arc<Tokenizer>, stop_strings: Vec<String>, raw: bool) -> Self {
        OutputAssembler {
            tokenizer,
            detokenizer: Detokenizer::default(),
            stops: StopMatcher::new(&stop_strings),
            scanner: TagScanner::default(),
            segmenter: Segmenter::default(),
            reasoning: ReasoningMeter::default(),
            raw,
            completion_tokens: 0,
            finished: false,
        }
    }

    /// Passes a guided answer on as it is.
    pub fn verbatim(mut self, verbatim: Verbatim) -> Self {
        self.segmenter = Segmenter::new(verbatim);
        self
    }

    /// Takes the next token. Gives at most a few deltas, none of them empty, each of one segment; nothing once
    /// [`Self::stopped`].
    pub fn push(&mut self, token_id: TokenId) -> Vec<OutputEvent> {
        let tokenizer = self.tokenizer.clone();
        self.push_bytes(tokenizer.token_bytes(token_id).unwrap_or_default())
    }

    /// Whether a stop string has appeared: the caller then drops the engine's stream and calls [`Self::finish`].
    pub fn stopped(&self) -> bool {
        self.stops.matched()
    }

    /// The end of the reply: gives what was held back, then [`OutputEvent::Finished`]. The reason is
    /// [`StopReason::StopString`] whenever a stop string appeared. Nothing follows; a second call gives nothing.
    pub fn finish(&mut self, reason: StopReason) -> Vec<OutputEvent> {
        let mut events = Vec::new();
        if std::mem::replace(&mut self.finished, true) {
            return events;
        }
        let (mut text, mut passed) = (String::new(), String::new());
        if !self.stopped() {
            self.detokenizer.finish(&mut text);
            self.stops.push(&text, &mut passed);
            self.stops.finish(&mut passed);
        }
        self.pass(&passed, &mut events);
        let reason = if self.stopped() { StopReason::StopString } else { reason };
        // Where the whole reply is passed on as it is, nothing waits for the rest of a tag.
        let cut_off = matches!(reason, StopReason::Length | StopReason::Aborted)
            && !(self.segmenter.in_verbatim() && self.segmenter.segment() == Segment::Plain);
        let mut scanner = std::mem::take(&mut self.scanner);
        scanner.finish(cut_off, |found| self.segment(&found, &mut events));
        self.reasoning.finish(self.segmenter.segment() == Segment::Think);
        events.push(OutputEvent::Finished {
            reason,
            reasoning_tokens: self.reasoning.tokens,
            completion_tokens: self.completion_tokens,
        });
        events
    }

    fn push_bytes(&mut self, bytes: &[u8]) -> Vec<OutputEvent> {
        let mut events = Vec::new();
        if self.stopped() || self.finished {
            return events;
        }
        let (mut text, mut passed) = (String::new(), String::new());
        self.detokenizer.push(bytes, &mut text);
        self.stops.push(&text, &mut passed);
        self.completion_tokens += 1;
        self.reasoning.token(text.len());
        self.pass(&passed, &mut events);
        events
    }

    /// Text that no stop string can take back.
    fn pass(&mut self, text: &str, events: &mut Vec<OutputEvent>) {
        if self.raw && !text.is_empty() {
            events.push(OutputEvent::Delta { segment: Segment::Plain, text: text.to_owned() });
        }
        let mut scanner = std::mem::take(&mut self.scanner);
        scanner.push(text, |found| self.segment(&found, events));
        self.scanner = scanner;
    }

    fn segment(&mut self, found: &Found<'_>, events: &mut Vec<OutputEvent>) {
        let closes = *found == Found::Tag(Tag::ThinkClose) && !self.segmenter.in_verbatim();
        let delta = self.segmenter.push(found);
        let thinking = self.segmenter.segment() == Segment::Think || closes;
        self.reasoning.resolve(found.num_bytes(), thinking);
        let Some((segment, text)) = delta.filter(|_| !self.raw) else { return };
        match events.last_mut() {
            Some(OutputEvent::Delta { segment: last, text: longer }) if *last == segment => {
                longer.push_str(&text)
            }
            _ => events.push(OutputEvent::Delta { segment, text }),
        }
    }
}

/// Counts the tokens of the thinking, tags included. A token counts where its last byte stands.
#[derive(Debug, Default)]
struct ReasoningMeter {
    /// Where the tokens end in the text, as long as it is open what stands there.
    ends: VecDeque<usize>,
    num_bytes: usize,
    resolved_bytes: usize,
    tokens: usize,
}

impl ReasoningMeter {
    /// The next token brought this much text.
    fn token(&mut self, num_bytes: usize) {
        self.num_bytes += num_bytes;
        self.ends.push_back(self.num_bytes);
    }

    /// The next bytes of the text belong to the thinking, or not.
    fn resolve(&mut self, num_bytes: usize, thinking: bool) {
        self.resolved_bytes += num_bytes;
        while self.ends.front().is_some_and(|&end| end <= self.resolved_bytes) {
            self.ends.pop_front();
            self.tokens += usize::from(thinking);
        }
    }

    /// The rest was cut off where it was.
    fn finish(&mut self, thinking: bool) {
        self.tokens += if thinking { self.ends.len() } else { 0 };
        self.ends.clear();
    }
}

#[cfg(test)]
mod tests;
