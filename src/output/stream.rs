//! One reply, from token ids to events.
//!
//! Driven by `http/generation.rs` and the commands, for streamed and unary replies alike: bytes, text, stop strings, tags,
//! segments. The work a token costs does not grow with the reply. It never decides that a reply is over but for a stop
//! string.

use std::sync::Arc;

use super::{
    Ending, OutputEvent, ScoredToken, Segment, WatchedLetters,
    answer::AnswerFinder,
    detokenizer::Detokenizer,
    segmenter::{Found, Segmenter, Tag, TagScanner, Verbatim},
    stop_matcher::StopMatcher,
    token_places::TokenPlaces,
};
use crate::{
    prompt::Tokenizer,
    scheduler::{StopReason, TokenId, TokenLogprobs},
};

/// Turns the tokens of one reply into events.
#[derive(Debug)]
pub struct OutputAssembler {
    tokenizer: Arc<Tokenizer>,
    detokenizer: Detokenizer,
    stops: StopMatcher,
    scanner: TagScanner,
    segmenter: Segmenter,
    places: TokenPlaces,
    answer: AnswerFinder,
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
            places: TokenPlaces::default(),
            answer: AnswerFinder::default(),
            raw,
            completion_tokens: 0,
            finished: false,
        }
    }

    /// Passes a guided answer on as it is.
    #[must_use]
    pub fn verbatim(self, verbatim: Verbatim) -> Self {
        OutputAssembler { segmenter: Segmenter::new(verbatim), ..self }
    }

    /// Also reads the log probabilities of these letters where the answer begins, if the tokens bring them.
    #[must_use]
    pub fn watching(self, letters: Option<WatchedLetters>) -> Self {
        OutputAssembler { answer: AnswerFinder::watching(letters), ..self }
    }

    /// Takes the next token. Gives at most a few deltas, none of them empty, each of one segment; nothing once
    /// [`Self::stopped`].
    pub fn push(&mut self, token_id: TokenId) -> Vec<OutputEvent> {
        self.push_scored(token_id, None)
    }

    /// As [`Self::push`], of a token with its log probabilities.
    pub fn push_scored(&mut self, id: TokenId, logprobs: Option<Box<TokenLogprobs>>) -> Vec<OutputEvent> {
        let tokenizer = self.tokenizer.clone();
        self.push_bytes(id, tokenizer.token_bytes(id).unwrap_or_default(), logprobs)
    }

    /// Returns the number of thinking tokens so far. Tokens whose text is held back are counted
    /// when it is passed on.
    pub fn num_reasoning_tokens(&self) -> usize {
        self.places.num_reasoning
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
        self.places.finish(self.segmenter.segment() == Segment::Think);
        events.push(OutputEvent::Finished(Ending {
            reason,
            reasoning_tokens: self.places.num_reasoning,
            completion_tokens: self.completion_tokens,
            tokens: self.places.take_placed(),
            answer: self.answer.finish(),
        }));
        events
    }

    fn push_bytes(
        &mut self,
        id: TokenId,
        bytes: &[u8],
        logprobs: Option<Box<TokenLogprobs>>,
    ) -> Vec<OutputEvent> {
        let mut events = Vec::new();
        if self.stopped() || self.finished {
            return events;
        }
        let (mut text, mut passed) = (String::new(), String::new());
        self.detokenizer.push(bytes, &mut text);
        self.stops.push(&text, &mut passed);
        self.completion_tokens += 1;
        self.places.push(id, text.len(), logprobs);
        self.pass(&passed, &mut events);
        events
    }

    /// Text that no stop string can take back.
    fn pass(&mut self, text: &str, events: &mut Vec<OutputEvent>) {
        let mut scanner = std::mem::take(&mut self.scanner);
        scanner.push(text, |found| self.segment(&found, events));
        self.scanner = scanner;
        if self.raw && !text.is_empty() {
            let tokens = self.places.take_placed();
            events.push(OutputEvent::Delta { segment: Segment::Plain, text: text.to_owned(), tokens });
        }
    }

    fn segment(&mut self, found: &Found<'_>, events: &mut Vec<OutputEvent>) {
        let closes = *found == Found::Tag(Tag::ThinkClose) && !self.segmenter.in_verbatim();
        let delta = self.segmenter.push(found);
        let in_thinking = self.segmenter.segment() == Segment::Think;
        self.answer.see(found, in_thinking, &self.places);
        self.places.resolve(found.num_bytes(), in_thinking || closes);
        let Some((segment, text)) = delta.filter(|_| !self.raw) else { return };
        add_delta(events, segment, text, self.places.take_placed());
    }
}

/// Deltas of one segment that come together are one.
fn add_delta(events: &mut Vec<OutputEvent>, segment: Segment, text: String, tokens: Vec<ScoredToken>) {
    match events.last_mut() {
        Some(OutputEvent::Delta { segment: last, text: longer, tokens: more }) if *last == segment => {
            longer.push_str(&text);
            more.extend(tokens);
        }
        _ => events.push(OutputEvent::Delta { segment, text, tokens }),
    }
}

#[cfg(test)]
mod tests;
