//! One request on the log: its id, and one line when it is over. Never says what was asked or answered.
//!
//! [`observe`] is the outermost middleware; `http/pipeline.rs` fills in what only it knows.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, Ordering},
    },
    time::Instant,
};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue},
    middleware::Next,
    response::Response,
};
use tracing::{Instrument, Span};

use super::state::AppState;
use crate::telemetry::{Metrics, metrics::TokenCounts};

/// The id of a request, in both directions.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longer ids of clients are replaced.
const MAX_ID_BYTES: usize = 128;
/// Logged when the client left before it had a response (nginx's number).
const CLIENT_LEFT: u16 = 499;

/// A request from its arrival to the last byte of its reply; logged when the last owner drops it.
#[derive(Debug)]
pub struct RequestRecord {
    /// The request's id, as the client knows it.
    pub id: String,
    /// When its header had arrived.
    pub arrival: Instant,
    method: String,
    route: String,
    /// 0: no response yet.
    status: AtomicU16,
    generation: Mutex<Option<GenerationRecord>>,
    metrics: Metrics,
    span: Span,
}

/// What happened to a chat request; times in seconds, `None` where it did not get that far.
#[derive(Debug, Clone, Default)]
pub struct GenerationRecord {
    /// completed, refused, failed or client_left
    pub outcome: &'static str,
    /// The error's code, or the finish reason.
    pub detail: &'static str,
    pub stream: bool,
    pub media_seconds: Option<f64>,
    pub prompt_seconds: Option<f64>,
    pub queue_seconds: Option<f64>,
    pub first_token_seconds: Option<f64>,
    pub num_frames: usize,
    pub tokens: TokenCounts,
}

impl RequestRecord {
    /// Says what happened to a generation; the last word counts.
    pub fn set_generation(&self, generation: GenerationRecord) {
        *self.generation.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(generation);
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let status = match self.status.load(Ordering::Relaxed) {
            0 => CLIENT_LEFT,
            status => status,
        };
        self.metrics.http_request(&self.method, &self.route, status);
        let seconds = self.arrival.elapsed().as_secs_f64();
        let (method, route) = (self.method.as_str(), self.route.as_str());
        let generation = self.generation.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        self.span.in_scope(|| match generation {
            None if [super::CHAT_COMPLETIONS, super::COMPLETIONS, super::RESPONSES].contains(&route) => {
                tracing::info!(method, route, status, seconds, "finished")
            }
            // Probes come every few seconds.
            None => tracing::debug!(method, route, status, seconds, "finished"),
            Some(g) => tracing::info!(
                method,
                route,
                status,
                seconds,
                outcome = g.outcome,
                detail = g.detail,
                stream = g.stream,
                media_seconds = g.media_seconds,
                prompt_seconds = g.prompt_seconds,
                queue_seconds = g.queue_seconds,
                first_token_seconds = g.first_token_seconds,
                num_frames = g.num_frames,
                prompt_tokens = g.tokens.prompt,
                cached_tokens = g.tokens.cached,
                video_tokens = g.tokens.video,
                completion_tokens = g.tokens.completion,
                reasoning_tokens = g.tokens.reasoning,
                "finished"
            ),
        });
    }
}

/// Gives every request an id, a span and a record, and every response the id.
pub async fn observe(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let span = tracing::info_span!("request", id = %id.to_str().unwrap_or_default());
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str);
    let record = Arc::new(RequestRecord {
        id: id.to_str().unwrap_or_default().to_owned(),
        arrival: Instant::now(),
        method: known_method(request.method()).into(),
        route: route.into(),
        status: AtomicU16::new(0),
        generation: Mutex::new(None),
        metrics: state.metrics().clone(),
        span: span.clone(),
    });
    request.extensions_mut().insert(record.clone());
    let mut response = next.run(request).instrument(span).await;
    record.status.store(response.status().as_u16(), Ordering::Relaxed);
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// A label with few values, whatever clients invent.
fn known_method(method: &axum::http::Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

/// The client's id if it is harmless in logs and headers, or a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let harmless = |id: &&HeaderValue| {
        let bytes = id.as_bytes();
        (1..=MAX_ID_BYTES).contains(&bytes.len())
            && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:/".contains(byte))
    };
    headers.get(REQUEST_ID).filter(harmless).cloned().unwrap_or_else(|| {
        HeaderValue::from_str(&uuid::Uuid::new_v4().to_string())
            .expect("a UUID is a header value: this is a bug")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id_for(sent: &str) -> String {
        let headers = HeaderMap::from_iter([(REQUEST_ID, HeaderValue::from_str(sent).unwrap())]);
        request_id(&headers).to_str().unwrap().into()
    }

    #[test]
    fn harmless_ids_are_kept_and_others_replaced() {
        assert_eq!(id_for("trace:42/a_b.c-d"), "trace:42/a_b.c-d");
        for sent in ["", "a b", "x\"y", &"a".repeat(MAX_ID_BYTES + 1)] {
            let made = id_for(sent);
            assert!(uuid::Uuid::parse_str(&made).is_ok(), "{sent:?} became {made:?}");
        }
    }
}
