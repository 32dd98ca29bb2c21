//! Receives the body of a chat request: JSON, or multipart with the JSON in `request` and a file in `video`.
//!
//! Called by `http/chat.rs`. Every byte is counted before it is kept; an upload goes to disk as it comes.

use std::{error::Error, sync::Arc};

use axum::{
    body::Body,
    extract::{FromRequest, Multipart, Request, multipart::Field},
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

use super::{error::ApiError, state::AppState};
use crate::{config::Config, media::MediaError};

/// JSON longer than this is parsed on the blocking pool (parsing runs at hundreds of MB a second).
const INLINE_JSON_BYTES: usize = 64 << 10;
/// The upload is written in pieces of this size: each one is a trip to the blocking pool.
const WRITE_BUFFER_BYTES: usize = 1 << 20;

/// Why a body could not be received.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// `param` is the path of the faulty field, if it got that far.
    #[error("{message}")]
    Json { param: Option<String>, message: String },
    #[error("{message}")]
    Part { param: &'static str, message: String },
    #[error("the body could not be read: {0}")]
    Malformed(String),
    #[error("no byte of the body came for {seconds} s; send it faster")]
    Slow { seconds: u64 },
    #[error("the body is larger than the limit of {max_body_bytes} bytes; send a smaller video")]
    TooLarge { max_body_bytes: usize },
    #[error(
        "the content type must be application/json, or multipart/form-data with the parts \"request\" and \"video\""
    )]
    ContentType,
    #[error("compressed bodies are not supported; send it without content-encoding")]
    ContentEncoding,
    #[error("the server is receiving too many large requests; try again in a moment")]
    TooManyBytesInFlight,
    #[error("the upload could not be stored: {0}")]
    Disk(#[from] std::io::Error),
}

/// A received body.
#[derive(Debug)]
pub struct Received<T> {
    /// The JSON.
    pub request: T,
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
    fn new(state: &AppState) -> Self {
        Budget {
            kib: state.body_kib().clone(),
            held: None,
            bytes: 0,
            max_bytes: state.config().max_body_bytes,
        }
    }

    /// Counts `more` bytes before they are kept.
    fn grow(&mut self, more: usize) -> Result<(), BodyError> {
        self.bytes += more;
        if self.bytes > self.max_bytes {
            return Err(BodyError::TooLarge { max_body_bytes: self.max_bytes });
        }
        let held = self.held.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let missing = self.bytes.div_ceil(1024).saturating_sub(held);
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

/// Receives the body of `request` and parses its JSON.
///
/// # Errors
/// Every fault of the transport and of the form; what the JSON says is checked by `http/validate`.
pub async fn receive<T>(state: &AppState, request: Request) -> Result<Received<T>, ApiError>
where
    T: DeserializeOwned + Send + 'static,
{
    let headers = request.headers();
    if headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        return Err(BodyError::ContentEncoding.into());
    }
    let mut budget = Budget::new(state);
    if content_length(headers).is_some_and(|length| length > budget.max_bytes) {
        return Err(BodyError::TooLarge { max_body_bytes: budget.max_bytes }.into());
    }
    let (json, upload) = match media_type(headers).as_deref() {
        Some("application/json") => {
            (collect(request.into_body().into_data_stream(), &mut budget, state.config()).await?, None)
        }
        Some("multipart/form-data") => receive_parts(request, &mut budget, state.config()).await?,
        _ => return Err(BodyError::ContentType.into()),
    };
    let request = parse(json).await?;
    Ok(Received { request, upload, budget })
}

fn content_length(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The content type without its parameters.
fn media_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

async fn collect<E: Into<axum::BoxError>>(
    stream: impl Stream<Item = Result<Bytes, E>>,
    budget: &mut Budget,
    config: &Config,
) -> Result<Bytes, BodyError> {
    let mut stream = std::pin::pin!(stream);
    let mut body = BytesMut::new();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|error| transport(error.into(), config))?;
        budget.grow(chunk.len())?;
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

async fn parse<T: DeserializeOwned + Send + 'static>(json: Bytes) -> Result<T, ApiError> {
    if json.len() <= INLINE_JSON_BYTES {
        return Ok(parse_now(&json)?);
    }
    let parsed = spawn_blocking(move || parse_now(&json)).await;
    Ok(parsed.map_err(|error| ApiError::Internal(format!("parsing the body: {error}")))??)
}

fn parse_now<T: DeserializeOwned>(json: &[u8]) -> Result<T, BodyError> {
    let mut reader = serde_json::Deserializer::from_slice(json);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let in_field = path != "." && !error.inner().is_syntax() && !error.inner().is_eof();
        let cause = error.into_inner();
        if in_field {
            BodyError::Json { message: format!("{path}: {cause}"), param: Some(path) }
        } else {
            BodyError::Json { message: format!("the request is not valid: {cause}"), param: None }
        }
    })?;
    reader.end().map_err(|error| BodyError::Json {
        message: format!("the request goes on after its JSON object: {error}"),
        param: None,
    })?;
    Ok(value)
}

async fn receive_parts(
    request: Request<Body>,
    budget: &mut Budget,
    config: &Config,
) -> Result<(Bytes, Option<NamedTempFile>), ApiError> {
    let mut parts = Multipart::from_request(request, &())
        .await
        .map_err(|error| BodyError::Malformed(error.body_text()))?;
    let (mut json, mut upload) = (None, None);
    while let Some(part) = parts.next_field().await.map_err(|error| transport(error.into(), config))? {
        let twice = |param| {
            let message = format!("the part \"{param}\" came twice; send it once");
            Err(BodyError::Part { param, message }.into())
        };
        match part.name() {
            Some("request") if json.is_some() => return twice("request"),
            Some("request") => json = Some(collect(part, budget, config).await?),
            Some("video") if upload.is_some() => return twice("video"),
            Some("video") => upload = Some(store(part, budget, config).await?),
            name => {
                let name: String = name.unwrap_or_default().chars().take(64).collect();
                let message = format!(
                    "unknown part \"{name}\"; the parts are \"request\" (JSON) and \"video\" (a file)"
                );
                return Err(BodyError::Part { param: "request", message }.into());
            }
        }
    }
    let missing = "the part \"request\" with the JSON of the request is missing; add it";
    let json = json.ok_or(BodyError::Part { param: "request", message: missing.into() })?;
    Ok((json, upload))
}

/// Writes an upload to a temporary file, which goes when it is dropped.
async fn store(mut part: Field<'_>, budget: &mut Budget, config: &Config) -> Result<NamedTempFile, ApiError> {
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
    while let Some(chunk) = part.chunk().await.map_err(|error| transport(error.into(), config))? {
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
fn transport(error: axum::BoxError, config: &Config) -> BodyError {
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
        Some(error) => BodyError::Malformed(error.body_text()),
        None => BodyError::Malformed(error.to_string()),
    }
}
