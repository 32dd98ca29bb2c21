//! The one table from errors to status codes, and the form in which a client reads them.
//!
//! Every other module of the crate has its own error type; here each of their variants gets a status.
//! Called by the handlers (as a response) and by `http/sse.rs` (inside a stream that has begun).

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    auth::AuthError,
    body::BodyError,
    validate::{InvalidRequest, shorten_to},
};
use crate::{
    engine::{ReserveError, SubmitError},
    media::{FileStoreError, MediaError},
    prompt::PromptError,
};

/// Anything that ends a request without the reply it asked for.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error(transparent)]
    Invalid(#[from] InvalidRequest),
    #[error(transparent)]
    Auth(#[from] AuthError),
    #[error(transparent)]
    Body(#[from] BodyError),
    #[error(transparent)]
    Media(#[from] MediaError),
    /// One of the request's videos; `param` is the path of what is at fault.
    #[error("{error}")]
    Video { param: String, error: MediaError },
    /// An error whose field has another name in this endpoint.
    #[error("{error}")]
    Renamed { param: &'static str, error: Box<ApiError> },
    #[error(transparent)]
    Files(#[from] FileStoreError),
    #[error(transparent)]
    Prompt(#[from] PromptError),
    #[error(transparent)]
    Reserve(#[from] ReserveError),
    #[error(transparent)]
    Submit(#[from] SubmitError),
    #[error("the model is still being loaded; try again in a moment")]
    Loading,
    #[error("the server is shutting down; send the request to another one or try again in a moment")]
    Draining,
    #[error("the engine has stopped; the server must be restarted")]
    EngineStopped,
    #[error("the request took longer than {seconds} s; ask for fewer tokens or send a shorter video")]
    DeadlineExceeded { seconds: f64 },
    #[error("there is no response \"{id}\"; it was not stored, was deleted, or is too old")]
    UnknownResponse { id: String },
    #[error("no route for this path; see /openapi.json")]
    NoSuchRoute,
    /// No route either; the message names the one that may have been meant.
    #[error("{0}")]
    UnknownRoute(String),
    #[error("no such chat completion is running; it may be over")]
    NoSuchChat,
    #[error("the chat completion has begun its answer; it thinks no more")]
    ThinksNoMore,
    #[error("{0}")]
    MethodNotAllowed(String),
    /// The text is for the log.
    #[error("{0}")]
    Internal(String),
}

/// One row of the table.
#[derive(Debug)]
struct Row {
    status: StatusCode,
    /// `error.type`
    kind: &'static str,
    /// `error.code`
    code: Option<&'static str>,
    param: Option<String>,
    retry_after: Option<Duration>,
}

/// What the generating endpoints answer in the ordinary course of things: counted from zero.
pub const USUAL_STATUSES: [u16; 9] = [200, 400, 401, 413, 422, 429, 500, 503, 504];
/// Longest message and longest path of a field. Every place that repeats input shortens it much
/// more; these limits are for texts of libraries.
const MAX_MESSAGE_CHARS: usize = 500;
const MAX_PARAM_CHARS: usize = 200;
const RETRY_SOON: Duration = Duration::from_secs(1);
/// Loading, draining: another try at once would meet the same.
const RETRY_LATER: Duration = Duration::from_secs(5);

impl Row {
    fn new(status: StatusCode, kind: &'static str, code: &'static str) -> Self {
        Row { status, kind, code: Some(code), param: None, retry_after: None }
    }

    fn bad(status: StatusCode, code: Option<&'static str>) -> Self {
        Row { status, kind: "invalid_request_error", code, param: None, retry_after: None }
    }

    fn unavailable(code: &'static str) -> Self {
        Row::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", code).retry(RETRY_LATER)
    }

    fn internal() -> Self {
        Row::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "internal_error")
    }

    fn param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    fn retry(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }
}

impl ApiError {
    /// The table.
    fn row(&self) -> Row {
        use StatusCode as S;
        match self {
            ApiError::Invalid(InvalidRequest::Field { param, .. }) => {
                Row::bad(S::BAD_REQUEST, None).param(param)
            }
            ApiError::Invalid(InvalidRequest::UnknownModel { .. }) => {
                Row::bad(S::NOT_FOUND, Some("model_not_found")).param("model")
            }
            ApiError::Auth(_) => Row::bad(S::UNAUTHORIZED, Some("invalid_api_key")),
            ApiError::Body(error) => body_row(error),
            ApiError::Media(error) => media_row(error),
            ApiError::Files(error) => files_row(error),
            ApiError::Video { param, error } => media_row(error).param(param),
            ApiError::Renamed { param, error } => {
                let row = error.row();
                if row.param.is_some() { row.param(*param) } else { row }
            }
            ApiError::Prompt(error) => match error {
                PromptError::Empty | PromptError::MissingReply | PromptError::TextTooLong { .. } => {
                    Row::bad(S::BAD_REQUEST, None).param("messages")
                }
                PromptError::Tokenizer(_) | PromptError::Load(_) => Row::internal(),
            },
            ApiError::Reserve(ReserveError::QueueFull { retry_after, .. }) => {
                Row::new(S::TOO_MANY_REQUESTS, "rate_limit_error", "queue_full").retry(*retry_after)
            }
            ApiError::Submit(error) => match error {
                SubmitError::ContextLengthExceeded { .. } => {
                    Row::bad(S::BAD_REQUEST, Some("context_length_exceeded")).param("messages")
                }
                SubmitError::KvCacheTooSmall { .. } => {
                    Row::bad(S::BAD_REQUEST, Some("kv_cache_too_small")).param("max_tokens")
                }
                SubmitError::Invalid(_) => Row::internal(),
                SubmitError::Stopped => Row::unavailable("engine_failed"),
            },
            ApiError::Loading => Row::unavailable("loading"),
            ApiError::Draining => Row::unavailable("draining"),
            ApiError::Reserve(ReserveError::Stopped) | ApiError::EngineStopped => {
                Row::unavailable("engine_failed")
            }
            ApiError::DeadlineExceeded { .. } => {
                Row::new(S::GATEWAY_TIMEOUT, "timeout_error", "deadline_exceeded")
            }
            ApiError::UnknownResponse { .. } => {
                Row::bad(S::NOT_FOUND, Some("response_not_found")).param("id")
            }
            ApiError::NoSuchRoute | ApiError::UnknownRoute(_) => Row::bad(S::NOT_FOUND, Some("not_found")),
            ApiError::NoSuchChat => Row::bad(S::NOT_FOUND, Some("chat_completion_not_found")).param("id"),
            ApiError::ThinksNoMore => Row::bad(S::CONFLICT, Some("thinking_is_over")).param("id"),
            ApiError::MethodNotAllowed(_) => Row::bad(S::METHOD_NOT_ALLOWED, Some("method_not_allowed")),
            ApiError::Internal(_) => Row::internal(),
        }
    }

    /// What the response will have.
    pub fn status(&self) -> StatusCode {
        self.row().status
    }

    /// Short label for metrics and logs.
    pub fn code(&self) -> &'static str {
        self.row().code.unwrap_or("invalid_request")
    }

    /// Whether the server refused to take the request on at all.
    pub fn is_rejection(&self) -> bool {
        matches!(self.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
    }

    /// What a client reads, where that is not a response of its own; logs what is withheld.
    pub fn code_and_message(&self) -> (&'static str, String) {
        (self.code(), self.to_wire().error.message)
    }

    /// `{"error":{…}}`; logs what is withheld from the client.
    pub fn to_wire(&self) -> WireError {
        let Row { status, kind, code, param, .. } = self.row();
        let message = if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(error = %self, "internal error");
            "the server made a mistake; its log has the details under the id in x-request-id".into()
        } else {
            shorten_to(MAX_MESSAGE_CHARS, &self.to_string())
        };
        let param = param.map(|param| shorten_to(MAX_PARAM_CHARS, &param));
        WireError { error: WireErrorBody { message, kind, param, code } }
    }
}

fn body_row(error: &BodyError) -> Row {
    use StatusCode as S;
    match error {
        BodyError::Json { param, .. } => Row { param: param.clone(), ..Row::bad(S::BAD_REQUEST, None) },
        BodyError::TooManyValues { .. } => Row::bad(S::BAD_REQUEST, Some("too_many_json_values")),
        BodyError::Part { param, .. } => Row::bad(S::BAD_REQUEST, None).param(*param),
        BodyError::Malformed(_) => Row::bad(S::BAD_REQUEST, Some("malformed_body")),
        BodyError::Slow { .. } => Row::bad(S::REQUEST_TIMEOUT, Some("body_timeout")),
        BodyError::TooLarge { .. } => Row::bad(S::PAYLOAD_TOO_LARGE, Some("body_too_large")),
        BodyError::ContentType { .. } | BodyError::ContentEncoding => {
            Row::bad(S::UNSUPPORTED_MEDIA_TYPE, Some("unsupported_content_type"))
        }
        BodyError::TooManyBytesInFlight => {
            Row::new(S::TOO_MANY_REQUESTS, "rate_limit_error", "too_many_uploads").retry(RETRY_SOON)
        }
        BodyError::Disk(_) => Row::internal(),
    }
}

fn media_row(error: &MediaError) -> Row {
    use StatusCode as S;
    match error {
        MediaError::Refused { param, .. } => Row::bad(S::BAD_REQUEST, Some("video_refused")).param(*param),
        MediaError::NotFound { .. } => Row::bad(S::NOT_FOUND, Some("media_not_found")),
        MediaError::FetchFailed(_) => Row::bad(S::UNPROCESSABLE_ENTITY, Some("video_fetch_failed")),
        MediaError::TooManyBytes { .. } => Row::bad(S::PAYLOAD_TOO_LARGE, Some("video_too_large")),
        MediaError::Unsupported(_) => Row::bad(S::UNSUPPORTED_MEDIA_TYPE, Some("video_unsupported")),
        MediaError::Undecodable(_) => Row::bad(S::UNPROCESSABLE_ENTITY, Some("video_undecodable")),
        MediaError::DecodeTimeout { .. } => Row::bad(S::UNPROCESSABLE_ENTITY, Some("video_decode_timeout")),
        MediaError::Internal(_) => Row::internal(),
    }
}

fn files_row(error: &FileStoreError) -> Row {
    use StatusCode as S;
    match error {
        FileStoreError::NotFound { .. } => Row::bad(S::NOT_FOUND, Some("file_not_found")).param("id"),
        FileStoreError::TooLarge { .. } => {
            Row::bad(S::PAYLOAD_TOO_LARGE, Some("file_too_large")).param("file")
        }
        FileStoreError::Full { .. } | FileStoreError::TooMany { .. } => {
            Row::bad(S::PAYLOAD_TOO_LARGE, Some("files_full")).param("file")
        }
        FileStoreError::LifetimeTooLong { .. } => {
            Row::bad(S::BAD_REQUEST, None).param("expires_after[seconds]")
        }
        FileStoreError::InUse(_) | FileStoreError::Disk { .. } => Row::internal(),
    }
}

/// An error as the client reads it.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Error)]
pub struct WireError {
    #[schema(inline)]
    error: WireErrorBody,
}

#[derive(Debug, Serialize, ToSchema)]
struct WireErrorBody {
    message: String,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Row { status, retry_after, .. } = self.row();
        let mut response = (status, Json(self.to_wire())).into_response();
        if let Some(after) = retry_after {
            let seconds = HeaderValue::from(after.as_secs().max(1));
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Status, code and whether the client is told when to try again.
    fn row(error: impl Into<ApiError>) -> (u16, &'static str, bool) {
        let row = error.into().row();
        (row.status.as_u16(), row.code.unwrap_or_default(), row.retry_after.is_some())
    }

    fn text() -> String {
        "something".into()
    }

    #[test]
    fn faults_of_the_request_are_4xx() {
        let too_long = SubmitError::ContextLengthExceeded { prompt_tokens: 9, max_tokens: 9, context: 9 };
        assert_eq!(row(InvalidRequest::field("stop", "bad")), (400, "", false));
        assert_eq!(row(PromptError::Empty), (400, "", false));
        assert_eq!(row(PromptError::MissingReply), (400, "", false));
        assert_eq!(row(PromptError::TextTooLong { num_bytes: 2, max_bytes: 1 }), (400, "", false));
        assert_eq!(row(too_long), (400, "context_length_exceeded", false));
        assert_eq!(
            row(SubmitError::KvCacheTooSmall { needed: 2, total: 1 }),
            (400, "kv_cache_too_small", false)
        );
        assert_eq!(
            row(InvalidRequest::UnknownModel { asked: text(), served: text() }),
            (404, "model_not_found", false)
        );
        assert_eq!(row(ApiError::NoSuchChat), (404, "chat_completion_not_found", false));
        assert_eq!(row(ApiError::ThinksNoMore), (409, "thinking_is_over", false));
        assert_eq!(row(AuthError::Missing), (401, "invalid_api_key", false));
        assert_eq!(row(AuthError::Unknown), (401, "invalid_api_key", false));
        assert_eq!(row(ApiError::UnknownResponse { id: text() }), (404, "response_not_found", false));
        assert_eq!(row(ApiError::NoSuchRoute), (404, "not_found", false));
        assert_eq!(row(ApiError::UnknownRoute(text())), (404, "not_found", false));
        assert_eq!(row(ApiError::MethodNotAllowed(text())), (405, "method_not_allowed", false));
        assert_eq!(row(BodyError::Slow { seconds: 1 }), (408, "body_timeout", false));
        assert_eq!(row(BodyError::TooLarge { max_body_bytes: 1 }), (413, "body_too_large", false));
        assert_eq!(
            row(BodyError::TooManyValues { max_json_values: 1 }),
            (400, "too_many_json_values", false)
        );
        assert_eq!(
            row(BodyError::ContentType { expected: "application/json" }),
            (415, "unsupported_content_type", false)
        );
    }

    #[test]
    fn a_renamed_error_keeps_all_but_the_name_of_its_field() {
        let renamed = |error| ApiError::Renamed { param: "input", error: Box::new(error) };
        let too_long = SubmitError::ContextLengthExceeded { prompt_tokens: 9, max_tokens: 9, context: 9 };
        let error = renamed(too_long.into());
        assert_eq!(error.row().param.as_deref(), Some("input"));
        assert_eq!(row(error), (400, "context_length_exceeded", false));
        let internal = renamed(ApiError::Internal("secret".into()));
        assert!(!internal.to_string().is_empty() && internal.row().param.is_none());
        assert_eq!(row(internal), (500, "internal_error", false));
    }

    #[test]
    fn faults_of_the_video_have_a_status_each() {
        let refused = MediaError::Refused { param: "video_url", message: text() };
        assert_eq!(row(refused), (400, "video_refused", false));
        assert_eq!(row(MediaError::NotFound { uuid: text() }), (404, "media_not_found", false));
        assert_eq!(row(MediaError::TooManyBytes { max_video_bytes: 1 }), (413, "video_too_large", false));
        assert_eq!(row(MediaError::Unsupported(text())), (415, "video_unsupported", false));
        assert_eq!(row(MediaError::FetchFailed(text())), (422, "video_fetch_failed", false));
        assert_eq!(row(MediaError::Undecodable(text())), (422, "video_undecodable", false));
        assert_eq!(row(MediaError::DecodeTimeout { seconds: 1 }), (422, "video_decode_timeout", false));
    }

    #[test]
    fn faults_of_stored_files_are_4xx() {
        assert_eq!(row(FileStoreError::NotFound { id: text() }), (404, "file_not_found", false));
        assert_eq!(row(FileStoreError::TooLarge { max_file_bytes: 1 }), (413, "file_too_large", false));
        assert_eq!(row(FileStoreError::Full { max_bytes: 1 }), (413, "files_full", false));
        assert_eq!(row(FileStoreError::TooMany { max_files: 1 }), (413, "files_full", false));
        assert_eq!(row(FileStoreError::LifetimeTooLong { max_seconds: 1 }), (400, "", false));
    }

    #[test]
    fn a_server_that_cannot_now_says_when_to_try_again() {
        let full = ReserveError::QueueFull { num_taken: 1, wanted: 1, retry_after: RETRY_SOON };
        assert_eq!(row(full), (429, "queue_full", true));
        assert_eq!(row(BodyError::TooManyBytesInFlight), (429, "too_many_uploads", true));
        assert_eq!(row(ApiError::Loading), (503, "loading", true));
        assert_eq!(row(ApiError::Draining), (503, "draining", true));
        assert_eq!(row(ApiError::EngineStopped), (503, "engine_failed", true));
        assert_eq!(row(ReserveError::Stopped), (503, "engine_failed", true));
        assert_eq!(row(SubmitError::Stopped), (503, "engine_failed", true));
        assert_eq!(row(ApiError::DeadlineExceeded { seconds: 1.0 }), (504, "deadline_exceeded", false));
    }

    #[test]
    fn what_only_the_log_may_know_is_withheld() {
        let errors: [ApiError; 8] = [
            ApiError::Internal("secret".into()),
            MediaError::Internal("secret".into()).into(),
            PromptError::Tokenizer("secret".into()).into(),
            PromptError::Load("secret".into()).into(),
            SubmitError::Invalid("secret".into()).into(),
            BodyError::Disk(std::io::Error::other("secret")).into(),
            FileStoreError::InUse("/secret".into()).into(),
            FileStoreError::Disk { what: text(), cause: std::io::Error::other("secret") }.into(),
        ];
        for error in errors {
            let wire = serde_json::to_string(&error.to_wire()).unwrap();
            assert!(!wire.contains("secret"), "{wire}");
            assert_eq!(row(error), (500, "internal_error", false));
        }
    }
}
