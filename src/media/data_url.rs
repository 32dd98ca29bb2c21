//! Reads `data:` URLs and base64 in the forms that clients send.
//!
//! Called by `source.rs`, on the blocking pool. Must never hold decoded data as a whole, nor decode
//! text before its size is checked.

use std::io::{self, Write};

use base64::{Engine, engine::general_purpose::STANDARD_NO_PAD};

use super::MediaError;

/// Longest part of a `data:` URL before its data: a media type with parameters.
const MAX_HEADER_BYTES: usize = 1024;
/// Base64 characters that are decoded at a time; a multiple of four.
const CHUNK_CHARS: usize = 64 << 10;
const SCHEME: &str = "data:";

/// Data in base64.
#[derive(Debug, Clone, Copy)]
pub struct Base64<'a> {
    pub text: &'a str,
    /// True if `%2B` stands for `+`, as in URLs.
    pub is_escaped: bool,
}

/// Returns true if `url` is a list of frames: `data:video/jpeg;base64,<picture>,<picture>,…`.
pub fn is_picture_list(url: &str) -> bool {
    const START: &str = "data:video/jpeg;";
    url.get(..START.len()).is_some_and(|start| start.eq_ignore_ascii_case(START))
}

/// Returns true if `url` is a `data:` URL.
pub fn is_data_url(url: &str) -> bool {
    url.get(..SCHEME.len()).is_some_and(|scheme| scheme.eq_ignore_ascii_case(SCHEME))
}

/// Returns the data of `data:<type>;base64,<data>`. Parameters of the type may hold commas, as in
/// the URLs of browsers' recorders (`video/webm;codecs=vp8,opus`): the data begins after
/// `;base64,`.
///
/// # Errors
/// When the URL has no `;base64,`.
pub fn data_of(url: &str) -> Result<&str, MediaError> {
    let header = &url.as_bytes()[..url.len().min(MAX_HEADER_BYTES)];
    let semicolons = header.iter().enumerate().filter(|(_, byte)| **byte == b';');
    let start = semicolons.into_iter().find_map(|(at, _)| after_marker(header, at + 1));
    // The byte before is a comma: this is the start of a character.
    start
        .map(|start| &url[start..])
        .ok_or_else(|| refused("this data URL is not in base64; write data:video/mp4;base64,<data>".into()))
}

/// Returns the start of the data if `base64,` is at `at`, with or without spaces around the word.
fn after_marker(header: &[u8], at: usize) -> Option<usize> {
    const WORD: &[u8] = b"base64";
    let skip_spaces = |at: usize| at + header[at..].iter().take_while(|byte| **byte == b' ').count();
    let word = skip_spaces(at);
    let end = word + WORD.len();
    if !header.get(word..end)?.eq_ignore_ascii_case(WORD) {
        return None;
    }
    let comma = skip_spaces(end);
    (*header.get(comma)? == b',').then_some(comma + 1)
}

impl<'a> Base64<'a> {
    /// Writes the decoded bytes to `out`. Skips line breaks, spaces and tabs, reads both alphabets,
    /// and needs no padding.
    ///
    /// # Errors
    /// More than `max_bytes`, found before anything is decoded; what is not base64; those of `out`.
    pub fn decode_to(self, out: &mut impl Write, max_bytes: usize) -> Result<(), DecodeError> {
        // The quick bound first: most texts have nothing that is skipped.
        let bound = max_bytes.saturating_add(2);
        if self.text.len() / 4 * 3 > bound && self.num_chars() / 4 * 3 > bound {
            return Err(DecodeError::TooLarge);
        }
        let mut decoder = Decoder { chars: Vec::new(), decoded: Vec::new(), out, room: max_bytes };
        let mut num_padding = 0;
        for (at, byte) in self.chars() {
            match byte {
                b'=' if num_padding < 2 => num_padding += 1,
                _ if num_padding > 0 => return Err(not_base64(at)),
                b'-' => decoder.push(b'+')?,
                b'_' => decoder.push(b'/')?,
                b'+' | b'/' | b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' => decoder.push(byte)?,
                _ => return Err(not_base64(at)),
            }
        }
        decoder.flush()
    }

    fn num_chars(self) -> usize {
        self.chars().filter(|(_, byte)| *byte != b'=').count()
    }

    fn chars(self) -> Chars<'a> {
        Chars { text: self, at: 0 }
    }
}

/// The characters of a text that count, each with its place.
struct Chars<'a> {
    text: Base64<'a>,
    at: usize,
}

impl Iterator for Chars<'_> {
    type Item = (usize, u8);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let at = self.at;
            let mut byte = *self.text.text.as_bytes().get(at)?;
            self.at += 1;
            // A broken escape stays what it is, which is no base64.
            if byte == b'%'
                && self.text.is_escaped
                && let Some(escaped) = unescaped(self.text.text, at)
            {
                byte = escaped;
                self.at += 2;
            }
            if !matches!(byte, b' ' | b'\t' | b'\r' | b'\n' | b'\x0c') {
                return Some((at, byte));
            }
        }
    }
}

/// The byte that `%2B` at `at` stands for.
fn unescaped(text: &str, at: usize) -> Option<u8> {
    let digits = text.get(at + 1..at + 3)?;
    let are_digits = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    are_digits.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

fn not_base64(at: usize) -> DecodeError {
    DecodeError::NotBase64(format!(
        "the data is not base64 at its character {at}; encode the whole file again"
    ))
}

fn refused(message: String) -> MediaError {
    MediaError::Refused { param: "video_url", message }
}

/// An error of decoding base64.
#[derive(Debug)]
pub enum DecodeError {
    TooLarge,
    NotBase64(String),
    Disk(io::Error),
}

/// Decodes and writes chunk by chunk.
struct Decoder<'a, W> {
    chars: Vec<u8>,
    decoded: Vec<u8>,
    out: &'a mut W,
    /// Bytes that may still come.
    room: usize,
}

impl<W: Write> Decoder<'_, W> {
    fn push(&mut self, char: u8) -> Result<(), DecodeError> {
        self.chars.push(char);
        if self.chars.len() == CHUNK_CHARS { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), DecodeError> {
        self.decoded.clear();
        STANDARD_NO_PAD.decode_vec(&self.chars, &mut self.decoded).map_err(|_| {
            let message = "the data ends in the middle of a base64 group; encode the whole file again";
            DecodeError::NotBase64(message.into())
        })?;
        self.chars.clear();
        self.room = self.room.checked_sub(self.decoded.len()).ok_or(DecodeError::TooLarge)?;
        self.out.write_all(&self.decoded).map_err(DecodeError::Disk)
    }
}

#[cfg(test)]
mod tests {
    use base64::engine::general_purpose::{STANDARD, URL_SAFE};
    use proptest::prelude::*;

    use super::*;

    fn decode(text: &str, is_escaped: bool, max_bytes: usize) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        match (Base64 { text, is_escaped }).decode_to(&mut bytes, max_bytes) {
            Ok(()) => Ok(bytes),
            Err(DecodeError::TooLarge) => Err("too large".into()),
            Err(DecodeError::NotBase64(message)) => Err(message),
            Err(DecodeError::Disk(error)) => panic!("{error}"),
        }
    }

    #[test]
    fn data_begins_after_the_marker_whatever_the_parameters_hold() {
        for url in [
            "data:video/mp4;base64,aGk",
            "data:;base64,aGk",
            "DATA:VIDEO/MP4;BASE64,aGk",
            "data:video/webm;codecs=vp8,opus;base64,aGk",
            "data:video/webm;codecs=\"vp8, opus\";base64,aGk",
            "data:video/mp4;codecs=avc1.42E01E,mp4a.40.2;base64,aGk",
            "data:video/mp4;name=a,b.mp4;charset=utf-8; base64 ,aGk",
        ] {
            assert_eq!(data_of(url).unwrap(), "aGk", "{url}");
        }
        let far = format!("data:video/mp4;{};base64,aGk", "é=;".repeat(2000));
        for url in [
            "data:",
            "data:video/mp4,aGk",
            "data:video/mp4;base64",
            "data:a;base64aGk",
            "data:base64,aGk",
            &far,
        ] {
            assert!(matches!(data_of(url), Err(MediaError::Refused { .. })), "{url:.40}");
        }
    }

    #[test]
    fn folded_and_url_safe_text_is_read() {
        let bytes: Vec<u8> = (0..=255).cycle().take(1000).collect();
        let standard = STANDARD.encode(&bytes);
        let safe = URL_SAFE.encode(&bytes);
        let folded = |text: &str, end: &str| {
            let lines = text.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).unwrap());
            lines.collect::<Vec<_>>().join(end)
        };
        for text in [
            standard.clone(),
            standard.trim_end_matches('=').to_owned(),
            safe.clone(),
            safe.trim_end_matches('=').to_owned(),
            folded(&standard, "\r\n"),
            folded(&safe, "\n") + "\n",
            folded(&standard, "\n\t "),
            format!(" {standard} "),
        ] {
            assert_eq!(decode(&text, false, 1000).unwrap(), bytes, "{text:.90}");
            let escaped =
                text.replace('+', "%2B").replace('/', "%2f").replace('=', "%3D").replace('\n', "%0A");
            assert_eq!(decode(&escaped, true, 1000).unwrap(), bytes, "{escaped:.90}");
        }
    }

    #[test]
    fn other_text_is_refused() {
        for text in ["!!!!", "aGk?", "a", "aGkaG", "aG=k", "aGk=aGk=", "aGk===", "aGü", "aG%6B", "aG,k"] {
            assert!(decode(text, false, 100).unwrap_err().contains("base64"), "{text}");
        }
        for text in ["aG%", "aG%6", "aG%zz", "aG%+1", "%C3%BC", "aG%é"] {
            assert!(decode(text, true, 100).unwrap_err().contains("base64"), "{text}");
        }
    }

    #[test]
    fn the_size_is_known_before_anything_is_decoded() {
        // Not base64 at all: only a check of the length can answer so.
        assert_eq!(decode(&"!".repeat(4000), false, 100).unwrap_err(), "too large");
        assert_eq!(decode("aGVsbG8=", false, 4).unwrap_err(), "too large");
        assert_eq!(decode("aGVsbG8=", false, 5).unwrap(), b"hello");
        let spaced = format!("{}aGVsbG8={}", " ".repeat(5000), "\r\n".repeat(5000));
        assert_eq!(decode(&spaced, false, 5).unwrap(), b"hello");
    }

    proptest! {
        #[test]
        fn decoding_undoes_encoding(
            bytes in prop::collection::vec(any::<u8>(), 0..300), fold in 1usize..80, is_safe in any::<bool>(), is_padded in any::<bool>(),
        ) {
            let mut text = if is_safe { URL_SAFE.encode(&bytes) } else { STANDARD.encode(&bytes) };
            if !is_padded {
                text = text.trim_end_matches('=').to_owned();
            }
            let lines: Vec<&str> = text.as_bytes().chunks(fold).map(|line| std::str::from_utf8(line).unwrap()).collect();
            prop_assert_eq!(decode(&lines.join("\r\n"), false, 300).unwrap(), bytes);
        }

        #[test]
        fn any_text_is_decoded_or_refused(text in "\\PC{0,40}", is_escaped in any::<bool>()) {
            let _ = decode(&text, is_escaped, 20);
            let _ = data_of(&text);
        }
    }
}
