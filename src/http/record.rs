//! One request as operators see it: its id, one line on the log and one trace when it is over. Says what was asked and
//! answered only where `--log-content` has kept it.
//!
//! [`observe`] is the outermost middleware; `http/progress.rs` fills in what only it knows.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
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

use super::{GENERATING, PROBES, state::AppState};
use crate::telemetry::{GenerationRecord, Metrics, RequestStart, RequestTrace, Stage, StageRun, Trail};

/// The id of a request, in both directions.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longer ids of clients are replaced.
const MAX_ID_BYTES: usize = 128;
/// Logged when the client left before it had a response (nginx's number).
const CLIENT_LEFT: u16 = 499;

/// A request from its arrival to the last byte of its reply; told of when the last owner drops it.
#[derive(Debug)]
pub struct RequestRecord {
    /// The request's id, as the client knows it.
    pub id: String,
    /// When its header had arrived.
    pub arrival: Instant,
    /// Its stages so far.
    pub(super) trail: Trail,
    pub(super) metrics: Metrics,
    method: &'static str,
    route: String,
    /// 0: no response yet.
    status: AtomicU16,
    generation: Mutex<Option<GenerationRecord>>,
    trace: Option<RequestTrace>,
    span: Span,
}

impl RequestRecord {
    /// Says what happened to a generation; the last word counts.
    pub fn set_generation(&self, generation: GenerationRecord) {
        *self.generation.lock().unwrap_or_else(PoisonError::into_inner) = Some(generation);
    }

    /// What tells others to which trace they belong.
    pub fn trace_headers(&self) -> HeaderMap {
        self.trace.as_ref().map(RequestTrace::headers).unwrap_or_default()
    }

    fn log(&self, status: u16, stages: &[StageRun], generation: Option<&GenerationRecord>) {
        let seconds = self.arrival.elapsed().as_secs_f64();
        let (method, route) = (self.method, self.route.as_str());
        let Some(g) = generation else {
            if PROBES.contains(&route) {
                tracing::debug!(method, route, status, seconds, "finished");
            } else {
                tracing::info!(method, route, status, seconds, "finished");
            }
            return;
        };
        let spent = |stage| spent(stages, stage);
        tracing::info!(
            method,
            route,
            status,
            seconds,
            outcome = g.outcome.name(),
            detail = g.detail,
            stream = g.stream,
            choices = g.num_choices,
            fetch_seconds = spent(Stage::Fetch),
            decode_wait_seconds = spent(Stage::DecodeWait),
            probe_seconds = spent(Stage::Probe),
            decode_seconds = spent(Stage::Decode),
            resize_seconds = spent(Stage::Resize),
            prompt_seconds = spent(Stage::Prompt),
            queue_seconds = spent(Stage::Queue),
            encode_seconds = spent(Stage::Encode),
            prefill_seconds = spent(Stage::Prefill),
            generate_seconds = spent(Stage::Generate),
            first_token_seconds = g.first_token.map(|since| since.as_secs_f64()),
            first_answer_token_seconds = g.first_answer_token.map(|since| since.as_secs_f64()),
            num_frames = g.num_frames,
            prompt_tokens = g.tokens.prompt,
            cached_tokens = g.tokens.cached,
            video_tokens = g.tokens.video,
            completion_tokens = g.tokens.completion,
            reasoning_tokens = g.tokens.reasoning,
            prompt = g.content.as_ref().map(|content| content.prompt.as_str()),
            replies = g.content.as_ref().map(|content| tracing::field::debug(&content.replies)),
            "finished"
        );
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        let status = match self.status.load(Ordering::Relaxed) {
            0 => CLIENT_LEFT,
            status => status,
        };
        self.metrics.http_request(self.method, &self.route, status);
        let generation = self.generation.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let stages = self.trail.runs();
        self.span.in_scope(|| self.log(status, &stages, generation.as_ref()));
        if let Some(trace) = self.trace.take() {
            trace.end(status, &stages, generation.as_ref());
        }
    }
}

/// All runs of a stage together (a request may have several videos); `None`: it was not in it.
fn spent(stages: &[StageRun], stage: Stage) -> Option<f64> {
    let runs = stages.iter().filter(|run| run.stage == stage);
    runs.map(|run| run.spent.as_secs_f64()).reduce(|sum, spent| sum + spent)
}

/// Gives every request an id, a span and a record, and every response the id.
pub async fn observe(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let id_text = id.to_str().unwrap_or_default();
    let span = tracing::info_span!("request", id = id_text, trace_id = tracing::field::Empty);
    let trace = begin_trace(&state, &request);
    if let Some(trace) = &trace {
        span.record("trace_id", trace.trace_id());
    }
    state.metrics().http_began();
    let record = Arc::new(RequestRecord {
        id: id_text.to_owned(),
        arrival: Instant::now(),
        trail: Trail::new(state.metrics().clone()),
        metrics: state.metrics().clone(),
        method: known_method(request.method()),
        route: route(&request).into(),
        status: AtomicU16::new(0),
        generation: Mutex::new(None),
        trace,
        span: span.clone(),
    });
    request.extensions_mut().insert(record.clone());
    let mut response = next.run(request).instrument(span).await;
    record.status.store(response.status().as_u16(), Ordering::Relaxed);
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

fn route(request: &Request) -> &str {
    request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str)
}

fn begin_trace(state: &AppState, request: &Request) -> Option<RequestTrace> {
    let route = route(request);
    if PROBES.contains(&route) {
        return None;
    }
    let operation = match route {
        super::COMPLETIONS => Some("text_completion"),
        route => GENERATING.contains(&route).then_some("chat"),
    };
    state.traces().begin(RequestStart {
        method: known_method(request.method()),
        path: request.uri().path(),
        headers: request.headers(),
        route,
        operation,
        is_secure: state.access().tls.is_some(),
    })
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
