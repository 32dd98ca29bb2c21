//! One reply, from token ids to events.
//!
//! Driven by `http/generation.rs` and the commands, for streamed and unary replies alike: bytes,
//! text, tags, stop strings, segments. The work a token costs does not grow with the reply. It
//! never decides that a reply is over but for a stop string.
//!
//! Stop strings are looked for in the content: the thinking and a guided answer are never cut. In a
//! raw reply they are looked for in all of the text.

use std::sync::Arc;

use super::{
    Ending, OutputEvent, ScoredToken, Segment, WatchedLetters,
    answer::AnswerFinder,
    content_stops::ContentStops,
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
    stops: Stops,
    scanner: TagScanner,
    segmenter: Segmenter,
    places: TokenPlaces,
    answer: AnswerFinder,
    /// Everything is plain text, tags included.
    raw: bool,
    /// No stop string ends the reply before it has so many tokens.
    min_tokens: usize,
    completion_tokens: usize,
    /// The token the model ended the reply with, if its log probabilities are wanted.
    end_token: Option<ScoredToken>,
    finished: bool,
}

/// The part of a reply in which stop strings are looked for.
#[derive(Debug)]
enum Stops {
    /// In all of the text, before it is scanned for tags.
    Text(StopMatcher),
    Content(ContentStops),
    /// A guided answer is whole: its grammar says where it ends.
    Nowhere,
}

impl Stops {
    fn matched(&self) -> bool {
        match self {
            Stops::Text(matcher) => matcher.matched(),
            Stops::Content(stops) => stops.matched(),
            Stops::Nowhere => false,
        }
    }

    fn arm(&mut self, is_armed: bool) {
        match self {
            Stops::Text(matcher) => matcher.arm(is_armed),
            Stops::Content(stops) => stops.arm(is_armed),
            Stops::Nowhere => {}
        }
    }
}

impl OutputAssembler {
    /// For one reply. `raw` (`reasoning_format: "none"`) leaves the text as the model wrote it, tags and white space
    /// included, all of it [`Segment::Plain`].
    pub fn new(tokenizer: Arc<Tokenizer>, stop_strings: Vec<String>, raw: bool) -> Self {
        let matcher = StopMatcher::new(&stop_strings);
        let stops = if raw { Stops::Text(matcher) } else { Stops::Content(ContentStops::new(matcher)) };
        OutputAssembler {
            tokenizer,
            detokenizer: Detokenizer::default(),
            stops,
            scanner: TagScanner::default(),
            segmenter: Segmenter::default(),
            places: TokenPlaces::default(),
            answer: AnswerFinder::default(),
            raw,
            min_tokens: 0,
            completion_tokens: 0,
            end_token: None,
            finished: false,
        }
    }

    /// Passes a guided answer on as it is; stop strings do not cut it, unless the reply is raw.
    #[must_use]
    pub fn verbatim(self, verbatim: Verbatim) -> Self {
        let stops = match self.stops {
            Stops::Content(_) if verbatim != Verbatim::Nothing => Stops::Nowhere,
            stops => stops,
        };
        OutputAssembler { segmenter: Segmenter::new(verbatim), stops, ..self }
    }

    /// Ignores stop strings that are complete before the reply has `min_tokens` tokens.
    #[must_use]
    pub fn min_tokens(self, min_tokens: usize) -> Self {
        OutputAssembler { min_tokens, ..self }
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

    /// Takes the log probabilities of the token that ended the reply. The token is no part of the
    /// text and is not counted.
    pub fn push_end(&mut self, id: TokenId, logprobs: Box<TokenLogprobs>) {
        self.end_token = Some(ScoredToken { id, logprobs, thinking: false });
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
        if !self.stopped() {
            let mut text = String::new();
            self.detokenizer.finish(&mut text);
            self.push_text(&text, &mut events);
        }
        // Where the whole reply is passed on as it is, nothing waits for the rest of a tag.
        let cut_off = matches!(reason, StopReason::Length | StopReason::Aborted)
            && !(self.segmenter.in_verbatim() && self.segmenter.segment() == Segment::Plain);
        self.flush(cut_off, &mut events);
        let reason = if self.stopped() { StopReason::StopString } else { reason };
        self.places.finish(self.segmenter.segment() == Segment::Think);
        let mut tokens = self.places.take_placed();
        tokens.extend(self.end_token.take());
        events.push(OutputEvent::Finished(Ending {
            reason,
            reasoning_tokens: self.places.num_reasoning,
            completion_tokens: self.completion_tokens,
            tokens,
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
        let mut text = String::new();
        self.detokenizer.push(bytes, &mut text);
        self.completion_tokens += 1;
        self.stops.arm(self.completion_tokens >= self.min_tokens);
        self.places.push(id, text.len(), logprobs);
        self.push_text(&text, &mut events);
        events
    }

    fn push_text(&mut self, text: &str, events: &mut Vec<OutputEvent>) {
        match &mut self.stops {
            Stops::Text(matcher) => {
                let mut passed = String::new();
                matcher.push(text, &mut passed);
                self.scan(&passed, events);
            }
            Stops::Content(_) | Stops::Nowhere => self.scan(text, events),
        }
    }

    /// Gives what stop matcher and scanner hold back at the end of the reply.
    fn flush(&mut self, cut_off: bool, events: &mut Vec<OutputEvent>) {
        let mut passed = String::new();
        if let Stops::Text(matcher) = &mut self.stops {
            matcher.finish(&mut passed);
        }
        self.scan(&passed, events);
        let mut scanner = std::mem::take(&mut self.scanner);
        scanner.finish(cut_off, |found| self.find(&found, events));
        if let Stops::Content(stops) = &mut self.stops {
            let mut passed = String::new();
            stops.finish(&mut passed);
            self.segment_text(&passed, events);
        }
    }

    /// Looks for tags in text; in a raw reply no stop string can take it back any more.
    fn scan(&mut self, text: &str, events: &mut Vec<OutputEvent>) {
        let mut scanner = std::mem::take(&mut self.scanner);
        scanner.push(text, |found| self.find(&found, events));
        self.scanner = scanner;
        if self.raw && !text.is_empty() {
            let tokens = self.places.take_placed();
            events.push(OutputEvent::Delta { segment: Segment::Plain, text: text.to_owned(), tokens });
        }
    }

    /// Takes what the scanner found; text of the content waits until no stop string can take it
    /// back.
    fn find(&mut self, found: &Found<'_>, events: &mut Vec<OutputEvent>) {
        let stops = match &mut self.stops {
            Stops::Content(stops) if stops.matched() => return,
            Stops::Content(stops) if self.segmenter.segment() != Segment::Think => stops,
            _ => return self.segment(found, events),
        };
        let mut passed = String::new();
        match found {
            Found::Text(text) => stops.text(text, &mut passed),
            Found::Tag(tag) => stops.tag(*tag, &mut passed),
        }
        let stopped = stops.matched();
        self.segment_text(&passed, events);
        if matches!(found, Found::Tag(_)) && !stopped {
            self.segment(found, events);
        }
    }

    fn segment_text(&mut self, text: &str, events: &mut Vec<OutputEvent>) {
        if !text.is_empty() {
            self.segment(&Found::Text(text), events);
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
