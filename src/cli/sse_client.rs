//! Reads server-sent events from a response body.
//!
//! Called by [`super::chat_client`]. Bounded: a server that sends an endless line costs a limited amount of memory.

use bytes::Bytes;
use futures_util::{Stream, StreamExt};

/// Longest event, its field names included.
pub const MAX_EVENT_BYTES: usize = 8 << 20;

/// Why no further event could be read.
#[derive(Debug, thiserror::Error)]
pub enum SseError {
    #[error("the server sent an event of more than {MAX_EVENT_BYTES} bytes")]
    EventTooLong,
    #[error("the server sent text that is not UTF-8")]
    NotUtf8,
    #[error("the connection broke off: {0}")]
    Transport(String),
}

/// Splits a byte stream into the data of its events. Comments and fields other than `data` are passed over.
#[derive(Debug, Default)]
pub struct SseParser {
    line: Vec<u8>,
    data: Option<String>,
    /// The last line ended with `\r`: a `\n` right after it belongs to the same line end.
    after_return: bool,
    has_lines: bool,
}

impl SseParser {
    /// Takes the next bytes, cut anywhere, and appends the data of every event they complete.
    ///
    /// # Errors
    /// When an event is too long or not UTF-8; the stream cannot be read any further then.
    pub fn push(&mut self, mut bytes: &[u8], events: &mut Vec<String>) -> Result<(), SseError> {
        while let Some(&first) = bytes.first() {
            if std::mem::take(&mut self.after_return) && first == b'\n' {
                bytes = &bytes[1..];
                continue;
            }
            let end = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
            let text = &bytes[..end.unwrap_or(bytes.len())];
            if self.line.len() + self.data.as_ref().map_or(0, String::len) + text.len() > MAX_EVENT_BYTES {
                return Err(SseError::EventTooLong);
            }
            self.line.extend_from_slice(text);
            let Some(end) = end else { break };
            self.after_return = bytes[end] == b'\r';
            bytes = &bytes[end + 1..];
            events.extend(self.end_line()?);
        }
        Ok(())
    }

    /// An empty line ends an event.
    fn end_line(&mut self) -> Result<Option<String>, SseError> {
        let line = std::mem::take(&mut self.line);
        let mut line = std::str::from_utf8(&line).map_err(|_| SseError::NotUtf8)?;
        if !std::mem::replace(&mut self.has_lines, true) {
            line = line.strip_prefix('\u{feff}').unwrap_or(line);
        }
        if line.is_empty() {
            return Ok(self.data.take());
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        if field == "data" {
            let value = value.strip_prefix(' ').unwrap_or(value);
            match &mut self.data {
                Some(data) => data.extend(["\n", value]),
                None => self.data = Some(value.to_owned()),
            }
        }
        Ok(None)
    }
}

/// The events of a body. An event that the end of the body cuts off is dropped.
#[derive(Debug)]
pub struct SseReader<S> {
    body: S,
    parser: SseParser,
    events: std::collections::VecDeque<String>,
}

impl<S, E> SseReader<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    E: std::error::Error,
{
    /// Over a body's chunks.
    pub fn new(body: S) -> Self {
        SseReader { body, parser: SseParser::default(), events: std::collections::VecDeque::new() }
    }

    /// The data of the next event; `None` at the end of the body.
    ///
    /// # Errors
    /// When the connection breaks off or the body is no event stream.
    pub async fn next(&mut self) -> Result<Option<String>, SseError> {
        while self.events.is_empty() {
            let Some(chunk) = self.body.next().await else { return Ok(None) };
            let chunk = chunk.map_err(|error| SseError::Transport(innermost(&error)))?;
            let mut events = Vec::new();
            self.parser.push(&chunk, &mut events)?;
            self.events.extend(events);
        }
        Ok(self.events.pop_front())
    }
}

/// The message at the bottom of an error, which says what happened.
pub(super) fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SCRIPT: &str = "\u{feff}: welcome\n\ndata: {\"a\":1}\n\n: keep-alive\r\n\r\nevent: x\rdata:two\r\rdata: é\n\
        data\ndata:  3\n\nretry: 5\n\ndata:\n\ndata: [DONE]\r\n\r\ndata: cut off\n";
    const EVENTS: [&str; 5] = ["{\"a\":1}", "two", "é\n\n 3", "", "[DONE]"];

    fn parse<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<String> {
        let (mut parser, mut events) = (SseParser::default(), Vec::new());
        for piece in pieces {
            parser.push(piece, &mut events).unwrap();
        }
        events
    }

    #[test]
    fn a_cut_at_any_byte_gives_the_same_events() {
        for at in 0..=SCRIPT.len() {
            let (head, tail) = SCRIPT.as_bytes().split_at(at);
            assert_eq!(parse([head, tail]), EVENTS, "cut at {at}");
        }
        assert_eq!(parse(SCRIPT.as_bytes().chunks(1)), EVENTS);
    }

    #[test]
    fn an_endless_line_or_event_is_refused() {
        let chunk = vec![b'x'; 1 << 20];
        let (mut parser, mut events) = (SseParser::default(), Vec::new());
        let result = (0..9).try_for_each(|_| parser.push(&chunk, &mut events));
        assert!(matches!(result, Err(SseError::EventTooLong)));
        let line = [b"data: ", chunk.as_slice(), b"\n"].concat();
        let mut parser = SseParser::default();
        let result = (0..9).try_for_each(|_| parser.push(&line, &mut events));
        assert!(matches!(result, Err(SseError::EventTooLong)));
        assert!(events.is_empty());
    }

    #[test]
    fn bytes_that_are_no_text_are_refused() {
        let result = SseParser::default().push(b"data: \xff\n\n", &mut Vec::new());
        assert!(matches!(result, Err(SseError::NotUtf8)));
    }

    proptest! {
        #[test]
        fn any_data_comes_through_any_cut(
            lines in proptest::collection::vec("[^\r\n]{0,8}", 1..5),
            size in 1usize..16,
        ) {
            let data = lines.join("\n");
            let script: String = lines.iter().map(|line| format!("data: {line}\r\n")).collect();
            prop_assert_eq!(parse(format!("{script}\r\n").as_bytes().chunks(size)), [data]);
        }
    }
}
