//! The parts of a multipart body, read one after the other and to the end.
//!
//! Used by `http/body.rs` and `http/files.rs`, which count what they keep.

use std::{
    future::poll_fn,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use axum::{
    body::{Body, BodyDataStream},
    extract::{FromRequest, Multipart, Request, multipart::Field},
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};

use super::body::{BodyError, Budget, collect, transport};
use crate::config::Config;

/// See the module.
#[derive(Debug)]
pub struct Parts<'a> {
    reader: Multipart,
    /// What the reader has not taken yet.
    body: Arc<Mutex<BodyDataStream>>,
    config: &'a Config,
}

impl<'a> Parts<'a> {
    /// Begins to read.
    ///
    /// # Errors
    /// When the head of the request names no boundary.
    pub async fn open(request: Request, config: &'a Config) -> Result<Self, BodyError> {
        let (head, body) = request.into_parts();
        let body = Arc::new(Mutex::new(body.into_data_stream()));
        let rest = body.clone();
        let read = stream::poll_fn(move |context| poll(&rest, context));
        let reader = Multipart::from_request(Request::from_parts(head, Body::from_stream(read)), &())
            .await
            .map_err(|error| BodyError::malformed(&error.body_text()))?;
        Ok(Parts { reader, body, config })
    }

    /// The next part.
    ///
    /// # Errors
    /// Faults of the transport and of the form.
    pub async fn next(&mut self) -> Result<Option<Field<'_>>, BodyError> {
        let config = self.config;
        self.reader.next_field().await.map_err(|error| transport(error.into(), config))
    }

    /// Reads what comes after the last part. Only a body read to its end lets the connection see that its client has
    /// left.
    ///
    /// # Errors
    /// Faults of the transport.
    pub async fn finish(self, budget: &mut Budget) -> Result<(), BodyError> {
        drop(self.reader);
        while let Some(chunk) = poll_fn(|context| poll(&self.body, context)).await {
            budget.grow(chunk.map_err(|error| transport(error.into(), self.config))?.len())?;
        }
        Ok(())
    }
}

/// The bytes of a part as they come.
pub fn chunks<'a>(part: Field<'a>, config: &'a Config) -> impl Stream<Item = Result<Bytes, BodyError>> + 'a {
    part.map(move |chunk| chunk.map_err(|error| transport(error.into(), config)))
}

/// A short text.
///
/// # Errors
/// When it is longer than `max_bytes` or no UTF-8.
pub async fn text(
    part: Field<'_>,
    param: &'static str,
    max_bytes: usize,
    budget: &mut Budget,
    config: &Config,
) -> Result<String, BodyError> {
    let limited = chunks(part, config).scan(0, |num_bytes, chunk| {
        *num_bytes += chunk.as_ref().map_or(0, Bytes::len);
        let is_long = *num_bytes > max_bytes;
        let message = || format!("the part \"{param}\" is longer than {max_bytes} bytes");
        let chunk = if is_long { Err(BodyError::Part { param, message: message() }) } else { chunk };
        std::future::ready(Some(chunk))
    });
    let bytes = collect(limited, 0, budget).await?;
    String::from_utf8(bytes.to_vec()).map_err(|_| {
        let message = format!("the part \"{param}\" is not UTF-8 text");
        BodyError::Part { param, message }
    })
}

/// A part that may come once came again.
pub fn twice(param: &'static str) -> BodyError {
    BodyError::Part { param, message: format!("the part \"{param}\" came twice; send it once") }
}

/// A part that has no meaning here; `known` says which have.
pub fn unknown(param: &'static str, name: Option<&str>, known: &str) -> BodyError {
    let name: String = name.unwrap_or_default().chars().take(64).collect();
    BodyError::Part { param, message: format!("unknown part \"{name}\"; {known}") }
}

/// The next bytes of a body that the multipart reader shares with what drains it afterwards.
fn poll(body: &Mutex<BodyDataStream>, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, axum::Error>>> {
    body.lock().unwrap_or_else(PoisonError::into_inner).poll_next_unpin(context)
}
