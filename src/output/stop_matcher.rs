//! Finds the first stop string in a growing text.
//!
//! Called by [`super::stream`]. Text passes through as soon as no stop string can begin in it; what follows a match,
//! and the match itself, never passes.

/// One Knuth-Morris-Pratt automaton a stop string, so that each byte is looked at once.
#[derive(Debug)]
pub(super) struct StopMatcher {
    needles: Vec<Needle>,
    /// Text that may be the beginning of a stop string.
    held: String,
    matched: bool,
    /// Stop strings count now. One that is complete earlier does not; one that only begins earlier
    /// does.
    is_armed: bool,
}

#[derive(Debug)]
struct Needle {
    bytes: Box<[u8]>,
    /// `border[i]`: length of the longest proper prefix of `bytes[..=i]` that also ends it.
    border: Box<[usize]>,
    /// How many bytes of it the text ends with.
    state: usize,
}

impl Needle {
    fn new(stop: &str) -> Self {
        let bytes: Box<[u8]> = stop.as_bytes().into();
        let mut border = vec![0; bytes.len()];
        let mut len = 0;
        for i in 1..bytes.len() {
            while len > 0 && bytes[i] != bytes[len] {
                len = border[len - 1];
            }
            len += usize::from(bytes[i] == bytes[len]);
            border[i] = len;
        }
        Needle { bytes, border: border.into(), state: 0 }
    }

    /// Whether the text ends with the whole string, now that `byte` has come.
    fn advance(&mut self, byte: u8) -> bool {
        while self.state > 0 && byte != self.bytes[self.state] {
            self.state = self.border[self.state - 1];
        }
        self.state += usize::from(byte == self.bytes[self.state]);
        self.state == self.bytes.len()
    }
}

impl StopMatcher {
    /// Empty strings are ignored.
    pub(super) fn new(stop_strings: &[String]) -> Self {
        let needles =
            stop_strings.iter().filter(|stop| !stop.is_empty()).map(|stop| Needle::new(stop)).collect();
        StopMatcher { needles, held: String::new(), matched: false, is_armed: true }
    }

    /// Sets whether stop strings count from now on.
    pub(super) fn arm(&mut self, is_armed: bool) {
        self.is_armed = is_armed;
    }

    /// Returns the text that may be the beginning of a stop string.
    pub(super) fn held(&self) -> &str {
        &self.held
    }

    /// Returns whether `text` as a whole is a stop string that counts now.
    pub(super) fn stops_at(&self, text: &str) -> bool {
        self.is_armed && self.needles.iter().any(|needle| &*needle.bytes == text.as_bytes())
    }

    /// Treats the end of the text so far as a stop string.
    pub(super) fn stop(&mut self) {
        self.held.clear();
        self.matched = true;
    }

    /// Forgets the text so far: no stop string begins in it.
    pub(super) fn restart(&mut self) {
        self.held.clear();
        self.needles.iter_mut().for_each(|needle| needle.state = 0);
    }

    /// Whether a stop string has appeared.
    pub(super) fn matched(&self) -> bool {
        self.matched
    }

    /// Appends to `passed` what is certainly before any stop string. Of several stop strings the one that is complete
    /// first counts; of those that are complete together, the longest.
    pub(super) fn push(&mut self, text: &str, passed: &mut String) {
        if self.matched {
            return;
        }
        let start = self.held.len();
        self.held.push_str(text);
        for (i, byte) in text.bytes().enumerate() {
            let mut longest = None;
            // Every automaton has to see the byte.
            for needle in &mut self.needles {
                if needle.advance(byte) {
                    longest = longest.max(Some(needle.bytes.len()));
                    needle.state = needle.border[needle.bytes.len() - 1];
                }
            }
            if let Some(len) = longest.filter(|_| self.is_armed) {
                passed.push_str(&self.held[..start + i + 1 - len]);
                self.stop();
                return;
            }
        }
        // A stop string's first byte is a character's first byte, so this is a character boundary.
        let keep = self.needles.iter().map(|needle| needle.state).max().unwrap_or(0);
        let free = self.held.len() - keep;
        passed.push_str(&self.held[..free]);
        self.held.drain(..free);
    }

    /// The end of the text: what was held back is no stop string.
    pub(super) fn finish(&mut self, passed: &mut String) {
        passed.push_str(&self.held);
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stops(stops: &[&str]) -> Vec<String> {
        stops.iter().map(|&stop| stop.to_owned()).collect()
    }

    /// Pushed in pieces of `size` characters; also whether a stop string appeared.
    fn run(stop_strings: &[String], text: &str, size: usize) -> (String, bool) {
        let (mut matcher, mut passed) = (StopMatcher::new(stop_strings), String::new());
        let characters: Vec<char> = text.chars().collect();
        for piece in characters.chunks(size) {
            matcher.push(&piece.iter().collect::<String>(), &mut passed);
        }
        matcher.finish(&mut passed);
        (passed, matcher.matched())
    }

    /// The definition: the shortest beginning of the text that ends with a stop string, without the longest such.
    fn expected(stop_strings: &[String], text: &str) -> (String, bool) {
        for (i, character) in text.char_indices() {
            let head = &text[..i + character.len_utf8()];
            let longest =
                stop_strings.iter().filter(|s| !s.is_empty() && head.ends_with(*s)).map(String::len).max();
            if let Some(len) = longest {
                return (head[..head.len() - len].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    #[test]
    fn text_is_held_back_only_while_a_stop_string_may_follow() {
        let (mut matcher, mut passed) = (StopMatcher::new(&stops(&["aab", "END"])), String::new());
        for (piece, expected) in [("xE", "x"), ("N", "x"), ("Ea", "xENE"), ("aa", "xENEa"), ("c", "xENEaaac")]
        {
            matcher.push(piece, &mut passed);
            assert_eq!(passed, expected);
        }
        matcher.push("aab more", &mut passed);
        assert!(matcher.matched());
        matcher.push("never seen", &mut passed);
        matcher.finish(&mut passed);
        assert_eq!(passed, "xENEaaac");
    }

    #[test]
    fn the_stop_string_that_is_complete_first_counts() {
        assert_eq!(run(&stops(&["abcd", "bc"]), "xabcd", 5), ("xa".into(), true));
        assert_eq!(run(&stops(&["bc", "abc"]), "xabcd", 1), ("x".into(), true));
    }

    #[test]
    fn a_beginning_of_a_stop_string_at_the_end_is_text() {
        assert_eq!(run(&stops(&["stop"]), "do not sto", 1), ("do not sto".into(), false));
    }

    #[test]
    fn empty_stop_strings_never_match() {
        assert_eq!(run(&stops(&[""]), "text", 1), ("text".into(), false));
    }

    proptest! {
        #[test]
        fn any_cut_finds_the_first_stop_string(
            stop_strings in proptest::collection::vec("[abé]{0,4}", 0..4),
            text in "[abé]{0,24}",
            size in 1usize..8,
        ) {
            prop_assert_eq!(run(&stop_strings, &text, size), expected(&stop_strings, &text));
        }
    }
}
