//! Finds stop strings in the content of a reply, never in its thinking.
//!
//! Used by [`super::stream`] between the tag scanner and the segmenter. White space at the edges of
//! a stretch is no content. Of the tags only an `</answer>` that follows content is compared with
//! stop strings: the answer ends there.

use super::{segmenter::Tag, stop_matcher::StopMatcher};

/// A stop matcher of one reply that is given its content only, stretch by stretch.
#[derive(Debug)]
pub(super) struct ContentStops {
    matcher: StopMatcher,
    /// Nothing but white space since the last tag, or since the beginning.
    at_edge: bool,
    has_content: bool,
}

impl ContentStops {
    pub(super) fn new(matcher: StopMatcher) -> Self {
        ContentStops { matcher, at_edge: true, has_content: false }
    }

    /// Returns whether a stop string has appeared.
    pub(super) fn matched(&self) -> bool {
        self.matcher.matched()
    }

    /// Sets whether stop strings count from now on.
    pub(super) fn arm(&mut self, is_armed: bool) {
        self.matcher.arm(is_armed);
    }

    /// Takes text outside the thinking; appends to `passed` what is certainly before any stop
    /// string.
    pub(super) fn text(&mut self, text: &str, passed: &mut String) {
        let mut content = text;
        if self.at_edge {
            content = text.trim_start();
            passed.push_str(&text[..text.len() - content.len()]);
            if content.is_empty() {
                return;
            }
            self.at_edge = false;
            // The segmenter joins two stretches by a line end.
            if std::mem::replace(&mut self.has_content, true) && self.matcher.stops_at("\n") {
                self.matcher.stop();
                return;
            }
        }
        self.matcher.push(content, passed);
    }

    /// Takes a tag outside the thinking, which ends the stretch; appends to `passed` the text
    /// before it. When the tag completes a stop string, the reply ends before the tag.
    pub(super) fn tag(&mut self, tag: Tag, passed: &mut String) {
        let held = self.matcher.held().to_owned();
        if tag == Tag::AnswerClose && self.has_content {
            let mut before = String::new();
            self.matcher.push(tag.text(), &mut before);
            if self.matched() {
                before.truncate(held.len());
                passed.push_str(&before);
                return;
            }
        }
        passed.push_str(&held);
        self.matcher.restart();
        self.at_edge = true;
    }

    /// Takes the end of the text: what was held back is no stop string.
    pub(super) fn finish(&mut self, passed: &mut String) {
        self.matcher.finish(passed);
    }
}
