//! The HTTP side: router, limits and handlers.
//!
//! Called by `cli/serve.rs` and tests. `pipeline.rs` is the only file that knows the whole way of a request; wire
//! types stay in this module, and so do status codes (`error.rs`).

mod body;
mod chat;
mod choices;
mod error;
mod generation;
mod guide;
pub mod openapi;
mod pipeline;
mod probes;
mod progress;
mod record;
mod responses;
mod running;
mod server;
mod sse;
mod state;
mod types;
mod validate;

use axum::{
    Router,
    body::Body,
    extract::DefaultBodyLimit,
    http::Method,
    middleware,
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use tower_http::{catch_panic::CatchPanicLayer, timeout::RequestBodyTimeoutLayer};

pub use error::ApiError;
pub use guide::Guides;
pub use server::run;
pub use state::{AppState, Loaded, ModelCard};

/// The route whose requests are logged one by one.
const CHAT_COMPLETIONS: &str = "/v1/chat/completions";

/// Every route: what the router is built of and `openapi.yaml` is held against.
fn routes() -> Vec<(Method, &'static str, MethodRouter<AppState>)> {
    vec![
        (Method::POST, CHAT_COMPLETIONS, post(chat::completions)),
        (Method::POST, "/v1/chat/completions/{id}/end_thinking", post(running::end_thinking)),
        (Method::GET, "/v1/models", get(probes::models)),
        (Method::GET, "/v1/models/{*id}", get(probes::model)),
        (Method::GET, "/health", get(probes::health)),
        (Method::GET, "/ready", get(probes::ready)),
        (Method::GET, "/metrics", get(probes::metrics)),
        (Method::GET, "/version", get(probes::version)),
        (Method::GET, "/openapi.json", get(openapi::json)),
    ]
}

/// Method and path of every route.
pub fn route_list() -> Vec<(Method, &'static str)> {
    routes().into_iter().map(|(method, path, _)| (method, path)).collect()
}

/// The whole service.
pub fn router(state: AppState) -> Router {
    let routes =
        routes().into_iter().fold(Router::new(), |router, (_, path, handler)| router.route(path, handler));
    with_limits(routes, state)
}

/// What stands around every route: request ids and logs, panics, body limits, answers to unknown paths.
fn with_limits(routes: Router<AppState>, state: AppState) -> Router {
    let config = state.config();
    routes
        .fallback(async || ApiError::NoSuchRoute)
        .method_not_allowed_fallback(async || ApiError::MethodNotAllowed)
        .layer(DefaultBodyLimit::max(config.max_body_bytes))
        .layer(RequestBodyTimeoutLayer::new(config.body_idle_timeout))
        .layer(CatchPanicLayer::custom(answer_panic))
        .layer(middleware::from_fn_with_state(state.clone(), record::observe))
        .with_state(state)
}

/// The panic itself has been logged by the panic hook; here it gets the request's id.
fn answer_panic(payload: Box<dyn std::any::Any + Send>) -> Response<Body> {
    let text = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("of an unknown kind");
    ApiError::Internal(format!("a panic: {text}")).into_response()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use axum::{body::to_bytes, http::Request};
    use tower::ServiceExt;

    use super::*;
    use crate::{config::Config, telemetry::Metrics};

    #[tokio::test]
    async fn a_panic_is_a_withheld_500_with_the_request_id() {
        let routes = Router::new().route("/broken", get(async || -> &'static str { panic!("a secret") }));
        let state = AppState::new(Arc::new(Config::default()), Metrics::new("m"));
        let app = with_limits(routes, state.clone());
        let request = Request::get("/broken").header("x-request-id", "7").body(Body::empty()).unwrap();
        let response = app.oneshot(request).await.unwrap();
        assert_eq!(response.status(), 500);
        assert_eq!(response.headers()["x-request-id"], "7");
        let body = to_bytes(response.into_body(), 10_000).await.unwrap();
        let body = String::from_utf8(body.to_vec()).unwrap();
        assert!(body.contains("internal_error") && !body.contains("secret"), "{body}");
        let counted = "tinyllava_http_requests_total{method=\"GET\",route=\"/broken\",status=\"500\"} 1";
        assert!(state.metrics().render().contains(counted));
    }
}
