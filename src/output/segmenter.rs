//! Splits a reply at its tags into thinking and answer.
//!
//! Called by [`super::stream`]. The tags are ordinary text of several tokens and may be cut at any byte, so this is a
//! state machine over characters: however its text is cut, the segments are the same.
//!
//! A tag never reaches a segment. What stands where:
//!
//! - before the first tag: [`Segment::Plain`];
//! - after `<think>`: [`Segment::Think`], until `</think>` or, when that is forgotten, `<answer>`;
//! - after any other tag: [`Segment::Answer`]. So text between `</think>` and `<answer>`, and after `</answer>`, belongs
//!   to the answer: nothing is swallowed. A stray `</answer>` in the thinking is dropped and the thinking goes on.
//!
//! A guided answer is passed on to the byte: inside it only the `</answer>` that ends the reply is a tag ([`Verbatim`]).
//!
//! Otherwise white space beside a tag and at both ends of the reply is dropped. Where a channel (thinking; or plain text and
//! answer) goes on after a tag, its two stretches are joined by one line end.

use super::Segment;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tag {
    ThinkOpen,
    ThinkClose,
    AnswerOpen,
    AnswerClose,
}

const TAGS: [(&str, Tag); 4] = [
    ("<think>", Tag::ThinkOpen),
    ("</think>", Tag::ThinkClose),
    ("<answer>", Tag::AnswerOpen),
    ("</answer>", Tag::AnswerClose),
];

impl Tag {
    /// Returns the tag as the model writes it.
    pub(super) fn text(self) -> &'static str {
        TAGS.iter().find(|(_, tag)| *tag == self).map_or("", |(text, _)| text)
    }
}

/// Text and tags, in their order, never empty.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found<'a> {
    Text(&'a str),
    Tag(Tag),
}

impl Found<'_> {
    /// Bytes of the reply it stands for.
    pub(super) fn num_bytes(&self) -> usize {
        match self {
            Found::Text(text) => text.len(),
            Found::Tag(tag) => tag.text().len(),
        }
    }
}

/// Finds tags in a growing text.
#[derive(Debug, Default)]
pub(super) struct TagScanner {
    /// The beginning of what may become a tag.
    held: String,
}

impl TagScanner {
    /// Passes on what `text` makes certain.
    pub(super) fn push(&mut self, mut text: &str, mut found: impl FnMut(Found<'_>)) {
        while let Some(character) = text.chars().next() {
            if self.held.is_empty() && character != '<' {
                let (before, rest) = text.split_at(text.find('<').unwrap_or(text.len()));
                found(Found::Text(before));
                text = rest;
                continue;
            }
            self.held.push(character);
            if let Some((_, tag)) = TAGS.iter().find(|(tag, _)| *tag == self.held) {
                found(Found::Tag(*tag));
                self.held.clear();
            } else if !TAGS.iter().any(|(tag, _)| tag.starts_with(&self.held)) {
                // No tag after all. The last character may begin the next one: it is looked at again.
                self.held.pop();
                found(Found::Text(&self.held));
                self.held.clear();
                continue;
            }
            text = &text[character.len_utf8()..];
        }
    }

    /// The end of the text: half a tag is text, unless the reply was cut off, perhaps in the middle of that tag.
    pub(super) fn finish(&mut self, cut_off: bool, mut found: impl FnMut(Found<'_>)) {
        if !self.held.is_empty() && !cut_off {
            found(Found::Text(&self.held));
        }
        self.held.clear();
    }
}

/// What of a reply is passed on as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Verbatim {
    #[default]
    Nothing,
    /// What stands between `<answer>` and the last `</answer>`.
    Answer,
    /// Everything after the one space that a reply begins with.
    Reply,
}

/// Gives each stretch of text its segment, and trims it.
#[derive(Debug)]
pub(super) struct Segmenter {
    segment: Segment,
    /// Nothing but white space since the last tag, or since the beginning.
    at_edge: bool,
    /// White space that is dropped if a tag or the end follows.
    spaces: String,
    /// Whether there was thinking already; whether there was plain text or answer.
    has_think: bool,
    has_content: bool,
    verbatim: Verbatim,
    /// Inside what is passed on as it is.
    in_verbatim: bool,
    /// A `</answer>` that is text if anything follows.
    held_close: bool,
}

impl Default for Segmenter {
    fn default() -> Self {
        Segmenter {
            segment: Segment::Plain,
            at_edge: true,
            spaces: String::new(),
            has_think: false,
            has_content: false,
            verbatim: Verbatim::Nothing,
            in_verbatim: false,
            held_close: false,
        }
    }
}

impl Segmenter {
    pub(super) fn new(verbatim: Verbatim) -> Self {
        Segmenter { verbatim, in_verbatim: verbatim == Verbatim::Reply, ..Segmenter::default() }
    }

    /// Whether tags are text now.
    pub(super) fn in_verbatim(&self) -> bool {
        self.in_verbatim
    }

    /// The segment that text would belong to now.
    pub(super) fn segment(&self) -> Segment {
        self.segment
    }

    /// Takes the next text or tag; gives the text that is certain to be shown, if any.
    pub(super) fn push(&mut self, found: &Found<'_>) -> Option<(Segment, String)> {
        if self.in_verbatim {
            let text = self.verbatim(found);
            return (!text.is_empty()).then_some((self.segment, text));
        }
        match found {
            Found::Text(text) => self.text(text).map(|delta| (self.segment, delta)),
            Found::Tag(tag) => {
                self.segment = match (tag, self.segment) {
                    (Tag::ThinkOpen, _) | (Tag::AnswerClose, Segment::Think) => Segment::Think,
                    _ => Segment::Answer,
                };
                self.spaces.clear();
                self.at_edge = true;
                self.in_verbatim = self.verbatim == Verbatim::Answer && *tag == Tag::AnswerOpen;
                None
            }
        }
    }

    fn verbatim(&mut self, found: &Found<'_>) -> String {
        let mut text = String::new();
        if std::mem::take(&mut self.held_close) {
            text.push_str(Tag::AnswerClose.text());
        }
        match found {
            Found::Text(more) => text.push_str(more),
            Found::Tag(Tag::AnswerClose) if self.verbatim == Verbatim::Answer => self.held_close = true,
            Found::Tag(tag) => text.push_str(tag.text()),
        }
        let at_start = self.verbatim == Verbatim::Reply && std::mem::take(&mut self.at_edge);
        match text.strip_prefix(' ') {
            Some(rest) if at_start => rest.to_owned(),
            _ => text,
        }
    }

    fn text(&mut self, text: &str) -> Option<String> {
        let text = if self.at_edge { text.trim_start() } else { text };
        let shown = text.trim_end();
        let mut delta = String::new();
        if !shown.is_empty() {
            delta = std::mem::take(&mut self.spaces);
            let has_text =
                if self.segment == Segment::Think { &mut self.has_think } else { &mut self.has_content };
            if self.at_edge && *has_text {
                delta.push('\n');
            }
            delta.push_str(shown);
            *has_text = true;
            self.at_edge = false;
        }
        self.spaces.push_str(&text[shown.len()..]);
        (!delta.is_empty()).then_some(delta)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every found text and tag, pushed one character at a time or at once.
    fn scan(text: &str, by_character: bool) -> Vec<String> {
        let (mut scanner, mut found) = (TagScanner::default(), Vec::new());
        let mut note = |item: Found<'_>| {
            found.push(match item {
                Found::Text(text) => text.to_owned(),
                Found::Tag(tag) => format!("{tag:?}"),
            });
        };
        if by_character {
            text.chars().for_each(|c| scanner.push(c.encode_utf8(&mut [0; 4]), &mut note));
        } else {
            scanner.push(text, &mut note);
        }
        scanner.finish(false, &mut note);
        found
    }

    #[test]
    fn tags_are_found_among_what_looks_like_them() {
        let text = "<<think></thin</think>a<answer></answer><Think>";
        let expected =
            ["<", "ThinkOpen", "</thin", "ThinkClose", "a", "AnswerOpen", "AnswerClose", "<", "Think>"];
        assert_eq!(scan(text, false), expected);
        assert_eq!(scan(text, true)[..7], expected[..7]);
        assert_eq!(scan(text, true).concat(), expected.concat());
    }

    #[test]
    fn text_is_held_back_only_inside_a_possible_tag() {
        let (mut scanner, mut found) = (TagScanner::default(), String::new());
        let mut push = |scanner: &mut TagScanner, text: &str| {
            scanner.push(text, |item| {
                if let Found::Text(text) = item {
                    found.push_str(text);
                }
            });
            found.clone()
        };
        assert_eq!(push(&mut scanner, "1 <"), "1 ");
        assert_eq!(push(&mut scanner, " 2 </a"), "1 < 2 ");
        assert_eq!(push(&mut scanner, "b>"), "1 < 2 </ab>");
    }

    #[test]
    fn half_a_tag_at_the_end_is_text_unless_the_reply_was_cut_off() {
        for (cut_off, expected) in [(false, Some("</thi".to_owned())), (true, None)] {
            let (mut scanner, mut rest) = (TagScanner::default(), None);
            scanner.push("</thi", |_| panic!("not certain yet"));
            scanner.finish(cut_off, |item| {
                rest = if let Found::Text(text) = item { Some(text.to_owned()) } else { None };
            });
            assert_eq!(rest, expected);
        }
    }

    #[test]
    fn a_verbatim_answer_keeps_everything_but_its_last_closing_tag() {
        let answer = " {\"a\": \"</answer><think>\"} \n";
        for (verbatim, reply, expected) in [
            (Verbatim::Answer, format!(" <think> x </think> <answer>{answer}</answer>"), answer.to_owned()),
            (Verbatim::Reply, format!(" {answer}</answer>"), format!("{answer}</answer>")),
            (Verbatim::Reply, "A".to_owned(), "A".to_owned()),
        ] {
            let (mut scanner, mut segmenter) = (TagScanner::default(), Segmenter::new(verbatim));
            let mut content = String::new();
            let mut note = |found: Found<'_>| match segmenter.push(&found) {
                Some((Segment::Answer | Segment::Plain, text)) => content.push_str(&text),
                Some((Segment::Think, text)) => assert_eq!(text, "x"),
                None => {}
            };
            reply.chars().for_each(|c| scanner.push(c.encode_utf8(&mut [0; 4]), &mut note));
            scanner.finish(false, &mut note);
            assert_eq!(content, expected);
        }
    }

    #[test]
    fn white_space_waits_for_text() {
        let mut segmenter = Segmenter::default();
        let mut push = |found: Found<'_>| segmenter.push(&found);
        assert_eq!(push(Found::Text(" \n")), None);
        assert_eq!(push(Found::Text("a ")), Some((Segment::Plain, "a".into())));
        assert_eq!(push(Found::Text("\n")), None);
        assert_eq!(push(Found::Text(" b")), Some((Segment::Plain, " \n b".into())));
        assert_eq!(push(Found::Text("  ")), None);
        assert_eq!(push(Found::Tag(Tag::ThinkOpen)), None);
        assert_eq!(push(Found::Text(" c")), Some((Segment::Think, "c".into())));
        assert_eq!(push(Found::Tag(Tag::AnswerOpen)), None);
        assert_eq!(push(Found::Text("d")), Some((Segment::Answer, "\nd".into())));
    }
}
