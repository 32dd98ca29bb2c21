//! Receives the body of a request: JSON, or multipart with the JSON in `request` and a file in `video`.
//!
//! Called by the handlers. Every byte is counted before it is kept; an upload goes to disk as it comes.

use std::{error::Error, sync::Arc};

use axum::{
    extract::{Request, multipart::Field},
    http::{HeaderMap, header},
};
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use serde::de::DeserializeOwned;
use tempfile::NamedTempFile;
use tokio::{
    io::{AsyncWriteExt, BufWriter},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::spawn_blocking,
};

use super::{
    error::ApiError,
    json_fault::JsonFault,
    multipart::{self, Parts},
    state::AppState,
    validate::shorten_to,
};
use crate::{config::Config, media::MediaError};

const JSON: &str = "application/json";
pub const MULTIPART: &str = "multipart/form-data";
/// JSON longer than this is parsed and checked on the blocking pool (parsing runs at hundreds of MB a second).
const INLINE_JSON_BYTES: usize = 64 << 10;
/// What every request may send without a share in the bytes in flight: large uploads never shut out questions of
/// plain text. The number of connections bounds these bytes.
const FREE_BYTES: usize = 64 << 10;
/// The upload is written in pieces of this size: each one is a trip to the blocking pool.
pub const WRITE_BUFFER_BYTES: usize = 1 << 20;

/// Why a body could not be received.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// `param` is the path of the faulty field, if it got that far.
    #[error("{message}")]
    Json { param: Option<String>, message: String },
    #[error(
        "the JSON of the request has more than {max_json_values} values; send fewer messages, parts or fields"
    )]
    TooManyValues { max_json_values: usize },
    #[error("{message}")]
    Part { param: &'static str, message: String },
    #[error("the body could not be read: {0}")]
    Malformed(String),
    #[error("no byte of the body came for {seconds} s; send it faster")]
    Slow { seconds: u64 },
    #[error("the body is larger than the limit of {max_body_bytes} bytes; send a smaller video")]
    TooLarge { max_body_bytes: usize },
    #[error("the content type must be {expected}")]
    ContentType { expected: &'static str },
    #[error("compressed bodies are not supported; send it without content-encoding")]
    ContentEncoding,
    #[error("the server is receiving too many large requests; try again in a moment")]
    TooManyBytesInFlight,
    #[error("the upload could not be stored: {0}")]
    Disk(#[from] std::io::Error),
}

impl BodyError {
    /// `cause` is a library's text, which may repeat what it has read.
    pub fn malformed(cause: &str) -> Self {
        const MAX_CAUSE_CHARS: usize = 120;
        BodyError::Malformed(shorten_to(MAX_CAUSE_CHARS, cause))
    }
}

impl From<JsonFault> for BodyError {
    fn from(JsonFault { param, message }: JsonFault) -> Self {
        BodyError::Json { param, message }
    }
}

/// A received body.
#[derive(Debug)]
pub struct Received {
    /// For [`check`].
    pub json: Bytes,
    /// The file of a multipart body.
    pub upload: Option<NamedTempFile>,
    /// Counts against the bytes in flight as long as what was received is kept.
    pub budget: Budget,
}

/// The share of one request in `max_inflight_body_bytes`.
#[derive(Debug)]
pub struct Budget {
    kib: Arc<Semaphore>,
    held: Option<OwnedSemaphorePermit>,
    bytes: usize,
    max_bytes: usize,
}

impl Budget {
    /// For the request with these headers.
    ///
    /// # Errors
    /// When they say that the body cannot be received.
    pub fn open(state: &AppState, headers: &HeaderMap) -> Result<Self, BodyError> {
        if headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
            return Err(BodyError::ContentEncoding);
        }
        let budget = Budget::new(state);
        match content_length(headers) {
            Some(length) if length > budget.max_bytes => {
                Err(BodyError::TooLarge { max_body_bytes: budget.max_bytes })
            }
            _ => Ok(budget),
        }
    }

    fn new(state: &AppState) -> Self {
        Budget {
            kib: state.body_kib().clone(),
            held: None,
            bytes: 0,
            max_bytes: state.config().max_body_bytes,
        }
    }

    /// Counts `more` bytes before they are kept.
    ///
    /// # Errors
    /// When this request, or all together, have too many.
    pub fn grow(&mut self, more: usize) -> Result<(), BodyError> {
        self.bytes += more;
        if self.bytes > self.max_bytes {
            return Err(BodyError::TooLarge { max_body_bytes: self.max_bytes });
        }
        let held = self.held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let counted = self.bytes.saturating_sub(FREE_BYTES);
        let missing = counted.div_ceil(1024).saturating_sub(held);
        if missing > 0 {
            let missing = u32::try_from(missing).map_err(|_| BodyError::TooManyBytesInFlight)?;
            let permit = self
                .kib
                .clone()
                .try_acquire_many_owned(missing)
                .map_err(|_| BodyError::TooManyBytesInFlight)?;
            match &mut self.held {
                Some(held) => held.merge(permit),
                None => self.held = Some(permit),
            }
        }
        Ok(())
    }
}

/// Receives the body of `request`, JSON or multipart.
///
/// # Errors
/// Every fault of the transport and of the form; the JSON is not looked at.
pub async fn receive(state: &AppState, request: Request) -> Result<Received, ApiError> {
    let mut budget = Budget::open(state, request.headers())?;
    let (json, upload) = match media_type(request.headers()).as_deref() {
        Some(JSON) => (collect_body(request, &mut budget, state.config()).await?, None),
        Some(MULTIPART) => receive_parts(request, &mut budget, state.config()).await?,
        _ => {
            let expected =
                "application/json, or multipart/form-data with the parts \"request\" and \"video\"";
            return Err(BodyError::ContentType { expected }.into());
        }
    };
    Ok(Received { json, upload, budget })
}

/// Receives the body of `request`, which must be JSON.
///
/// # Errors
/// As [`receive`].
pub async fn receive_json(state: &AppState, request: Request) -> Result<Received, ApiError> {
    let mut budget = Budget::open(state, request.headers())?;
    if media_type(request.headers()).as_deref() != Some(JSON) {
        return Err(BodyError::ContentType { expected: JSON }.into());
    }
    let json = collect_body(request, &mut budget, state.config()).await?;
    Ok(Received { json, upload: None, budget })
}

async fn collect_body(request: Request, budget: &mut Budget, config: &Config) -> Result<Bytes, BodyError> {
    // Growing to some hundred megabytes by doubling would copy them all, on this thread. Memory is taken as it is written to,
    // so that a length that is not true costs nothing.
    let length = content_length(request.headers()).unwrap_or(0);
    let body = request.into_body().into_data_stream();
    let chunks = body.map(|chunk| chunk.map_err(|error| transport(error.into(), config)));
    collect(chunks, length, budget).await
}

fn content_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The content type without its parameters.
pub fn media_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

/// Puts the chunks of `stream` together. `length`: how many bytes they are said to have, 0 if nobody did.
///
/// # Errors
/// Those of the stream and of the budget.
pub async fn collect(
    stream: impl Stream<Item = Result<Bytes, BodyError>>,
    length: usize,
    budget: &mut Budget,
) -> Result<Bytes, BodyError> {
    let mut stream = std::pin::pin!(stream);
    let mut body = BytesMut::with_capacity(length.min(budget.max_bytes));
    while let Some(chunk) = stream.next().await {
        let chunk = chunk?;
        budget.grow(chunk.len())?;
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

/// Runs `work` on a received body, on the blocking pool if its JSON is large. What `work` holds, and with it the
/// budget, goes there too: a client that leaves cannot free it before the memory is free.
///
/// # Errors
/// Those of `work`.
pub async fn check<T: Send + 'static>(
    received: Received,
    work: impl FnOnce(Received) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if received.json.len() <= INLINE_JSON_BYTES {
        return work(received);
    }
    let checked = spawn_blocking(move || work(received)).await;
    checked.map_err(|error| ApiError::Internal(format!("checking the body: {error}")))?
}

/// Refuses JSON of many values before anything is made of it. Whether it is JSON at all is for the parser to say.
fn check_num_values(json: &[u8], max_json_values: usize) -> Result<(), BodyError> {
    let (mut bytes, mut num_values) = (json.iter(), 1);
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => skip_string(&mut bytes),
            b',' | b':' | b'[' | b'{' => num_values += 1,
            _ => {}
        }
        if num_values > max_json_values {
            return Err(BodyError::TooManyValues { max_json_values });
        }
    }
    Ok(())
}

/// Goes past the quote that ends a string.
fn skip_string(bytes: &mut std::slice::Iter<'_, u8>) {
    while let Some(byte) = bytes.next() {
        match byte {
            b'"' => return,
            b'\\' => drop(bytes.next()),
            _ => {}
        }
    }
}

/// Parses the JSON of a body.
///
/// # Errors
/// More than `max_json_values` values, faults of the JSON, fields of a wrong type.
pub fn parse<T: DeserializeOwned>(json: &[u8], max_json_values: usize) -> Result<T, BodyError> {
    check_num_values(json, max_json_values)?;
    let mut reader = serde_json::Deserializer::from_slice(json);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(JsonFault::new)?;
    reader.end().map_err(|error| BodyError::Json {
        message: format!("the request goes on after its JSON object: {error}"),
        param: None,
    })?;
    Ok(value)
}

async fn receive_parts(
    request: Request,
    budget: &mut Budget,
    config: &Config,
) -> Result<(Bytes, Option<NamedTempFile>), ApiError> {
    let mut parts = Parts::open(request, config).await?;
    let (mut json, mut upload) = (None, None);
    while let Some(part) = parts.next().await? {
        match part.name() {
            Some("request") if json.is_some() => return Err(multipart::twice("request").into()),
            Some("request") => json = Some(collect(multipart::chunks(part, config), 0, budget).await?),
            Some("video") if upload.is_some() => return Err(multipart::twice("video").into()),
            Some("video") => upload = Some(store(part, budget, config).await?),
            name => {
                let known = "the parts are \"request\" (JSON) and \"video\" (a file)";
                return Err(multipart::unknown("request", name, known).into());
            }
        }
    }
    parts.finish(budget).await?;
    let missing = "the part \"request\" with the JSON of the request is missing; add it";
    let json = json.ok_or(BodyError::Part { param: "request", message: missing.into() })?;
    Ok((json, upload))
}

/// Writes an upload to a temporary file, which goes when it is dropped.
async fn store(part: Field<'_>, budget: &mut Budget, config: &Config) -> Result<NamedTempFile, ApiError> {
    let max_video_bytes = config.media.max_video_bytes;
    let (file, copy) = spawn_blocking(|| {
        let file = NamedTempFile::new()?;
        let copy = file.reopen()?;
        Ok::<_, std::io::Error>((file, copy))
    })
    .await
    .map_err(|error| ApiError::Internal(format!("making a temporary file: {error}")))?
    .map_err(BodyError::Disk)?;
    let mut writer = BufWriter::with_capacity(WRITE_BUFFER_BYTES, tokio::fs::File::from_std(copy));
    let mut num_bytes = 0;
    let mut chunks = std::pin::pin!(multipart::chunks(part, config));
    while let Some(chunk) = chunks.next().await.transpose()? {
        num_bytes += chunk.len();
        if num_bytes > max_video_bytes {
            return Err(MediaError::TooManyBytes { max_video_bytes }.into());
        }
        budget.grow(chunk.len())?;
        writer.write_all(&chunk).await.map_err(BodyError::Disk)?;
    }
    writer.flush().await.map_err(BodyError::Disk)?;
    if num_bytes == 0 {
        let message = "the part \"video\" is empty; send the file itself (curl: -F video=@FILE)".into();
        return Err(BodyError::Part { param: "video", message }.into());
    }
    Ok(file)
}

/// What went wrong between the client and here.
pub fn transport(error: axum::BoxError, config: &Config) -> BodyError {
    let mut cause: Option<&(dyn Error + 'static)> = Some(error.as_ref());
    while let Some(inner) = cause {
        if inner.is::<tower_http::timeout::TimeoutError>() {
            return BodyError::Slow { seconds: config.body_idle_timeout.as_secs() };
        }
        cause = inner.source();
    }
    match error.downcast_ref::<axum::extract::multipart::MultipartError>() {
        Some(error) if error.status() == axum::http::StatusCode::PAYLOAD_TOO_LARGE => {
            BodyError::TooLarge { max_body_bytes: config.max_body_bytes }
        }
        Some(error) => BodyError::malformed(&error.body_text()),
        None => BodyError::malformed(&error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::telemetry::Metrics;

    #[test]
    fn values_are_counted_outside_strings_only() {
        let request = json!({"a": [1, "x,:[{", "\\\"[,,,", {"b": null}], "c": []}).to_string();
        // Keys count as values: 1 + 3 openers + 3 colons + 4 commas + 1 opener of the empty list.
        assert!(check_num_values(request.as_bytes(), 12).is_ok());
        let refused = check_num_values(request.as_bytes(), 11).unwrap_err();
        assert!(matches!(refused, BodyError::TooManyValues { max_json_values: 11 }));
        for broken in ["\"", "\"\\", "[\"\\\"", ""] {
            assert!(check_num_values(broken.as_bytes(), 10).is_ok(), "{broken}");
            assert!(parse::<Value>(broken.as_bytes(), 10).is_err(), "{broken}");
        }
    }

    #[test]
    fn full_budgets_leave_room_for_small_requests() {
        let limit = 256 << 10;
        let config = Config { max_body_bytes: limit, max_inflight_body_bytes: limit, ..Config::default() };
        let state = AppState::new(Arc::new(config), Metrics::new("m"));
        let [mut first, mut second, mut small] = [(); 3].map(|()| Budget::new(&state));
        first.grow(limit).unwrap();
        second.grow(FREE_BYTES * 2).unwrap();
        assert!(matches!(second.grow(1), Err(BodyError::TooManyBytesInFlight)));
        small.grow(FREE_BYTES).unwrap();
        assert!(matches!(small.grow(1), Err(BodyError::TooManyBytesInFlight)));
        drop(first);
        small.grow(1).unwrap();
    }
}
