//! Bytes of tokens to text, one token at a time.
//!
//! Called by [`super::stream`]. A token may end inside a character: its bytes wait for the rest.

/// Holds back the bytes of an unfinished character, at most three.
#[derive(Debug, Default)]
pub(super) struct Detokenizer {
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Appends to `text` what `bytes` complete; invalid bytes become U+FFFD.
    pub(super) fn push(&mut self, bytes: &[u8], text: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut chunks = self.pending.utf8_chunks().peekable();
        let mut unfinished = 0;
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            if chunk.invalid().is_empty() {
                continue;
            }
            if chunks.peek().is_none() && may_continue(chunk.invalid()) {
                unfinished = chunk.invalid().len();
            } else {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - unfinished);
    }

    /// The end of the text: an unfinished character becomes U+FFFD.
    pub(super) fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            self.pending.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Whether more bytes could make a character of these.
fn may_continue(bytes: &[u8]) -> bool {
    // `error_len` is `None` exactly when the input ended too early.
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(bytes: &[u8], size: usize) -> String {
        let (mut detokenizer, mut text) = (Detokenizer::default(), String::new());
        for piece in bytes.chunks(size) {
            detokenizer.push(piece, &mut text);
            assert!(detokenizer.pending.len() <= 3);
        }
        detokenizer.finish(&mut text);
        text
    }

    #[test]
    fn a_character_appears_with_its_last_byte() {
        let (mut detokenizer, mut text) = (Detokenizer::default(), String::new());
        for (byte, expected) in "é😀".bytes().zip(["", "é", "é", "é", "é", "é😀"]) {
            detokenizer.push(&[byte], &mut text);
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn an_invalid_byte_is_replaced_at_once() {
        let (mut detokenizer, mut text) = (Detokenizer::default(), String::new());
        detokenizer.push(&[0xf0, 0x9f, b'a', 0xff], &mut text);
        assert_eq!(text, "\u{fffd}a\u{fffd}");
        assert!(detokenizer.pending.is_empty());
    }

    #[test]
    fn an_unfinished_character_is_replaced_at_the_end() {
        assert_eq!(pieces(&[b'a', 0xf0, 0x9f, 0x98], 1), "a\u{fffd}");
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_text(
            bytes in proptest::collection::vec(prop_oneof![any::<u8>(), 0x80u8..=0xff], 0..40),
            text in ".{0,12}",
            size in 1usize..8,
        ) {
            let bytes = [bytes.as_slice(), text.as_bytes(), bytes.as_slice()].concat();
            prop_assert_eq!(pieces(&bytes, size), String::from_utf8_lossy(&bytes));
        }
    }
}
