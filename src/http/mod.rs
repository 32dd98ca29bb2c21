//! The HTTP side: router, limits and handlers.
//!
//! Called by `cli/serve.rs` and tests. `pipeline.rs` is the only file that knows the whole way of a request; wire
//! types stay in this module, and so do status codes (`error.rs`).

mod auth;
mod body;
mod chat;
mod choices;
mod completions;
mod compression;
pub mod cors;
mod error;
mod files;
mod generation;
mod guide;
mod json_fault;
mod multipart;
pub mod openapi;
mod pipeline;
mod probes;
mod progress;
mod record;
mod responses;
mod responses_api;
mod route_hint;
mod running;
mod server;
mod sse;
mod state;
mod text_or;
pub mod tls;
mod tokenize;
mod tool_calls;
mod types;
mod validate;

use axum::{
    Router,
    body::Body,
    extract::{DefaultBodyLimit, MatchedPath},
    http::{Method, Uri},
    middleware,
    response::{IntoResponse, Response},
    routing::{MethodRouter, delete, get, post},
};
use tower::util::option_layer;
use tower_http::{catch_panic::CatchPanicLayer, timeout::RequestBodyTimeoutLayer};

use self::route_hint::RouteTable;

pub use auth::ApiKey;
pub use error::ApiError;
pub use guide::Guides;
pub use server::{run, run_metrics};
pub use state::{Access, AppState, Loaded, ModelCard};

/// The routes that generate.
const CHAT_COMPLETIONS: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const RESPONSES: &str = "/v1/responses";
const GENERATING: [&str; 3] = [CHAT_COMPLETIONS, COMPLETIONS, RESPONSES];
/// The route that may have a port of its own.
const METRICS: &str = "/metrics";
const HEALTH: &str = "/health";
const READY: &str = "/ready";
/// What machines ask every few seconds: neither logged nor traced.
const PROBES: [&str; 3] = [HEALTH, READY, METRICS];

/// Every route: what the router is built of and `openapi.yaml` is held against.
fn routes() -> Vec<(Method, &'static str, MethodRouter<AppState>)> {
    vec![
        (Method::POST, CHAT_COMPLETIONS, post(chat::completions)),
        (Method::POST, COMPLETIONS, post(completions::create)),
        (Method::POST, RESPONSES, post(responses_api::create)),
        (Method::GET, "/v1/responses/{id}", get(responses_api::get)),
        (Method::DELETE, "/v1/responses/{id}", delete(responses_api::delete)),
        (Method::POST, "/v1/files", post(files::create)),
        (Method::GET, "/v1/files", get(files::list)),
        (Method::GET, "/v1/files/{id}", get(files::get)),
        (Method::DELETE, "/v1/files/{id}", delete(files::delete)),
        (Method::GET, "/v1/files/{id}/content", get(files::content)),
        (Method::POST, "/tokenize", post(tokenize::tokenize)),
        (Method::POST, "/detokenize", post(tokenize::detokenize)),
        (Method::POST, "/v1/chat/completions/{id}/end_thinking", post(running::end_thinking)),
        (Method::GET, "/v1/models", get(probes::models)),
        (Method::GET, "/v1/models/{*id}", get(probes::model)),
        (Method::GET, HEALTH, get(probes::health)),
        (Method::GET, READY, get(probes::ready)),
        (Method::GET, METRICS, get(probes::metrics)),
        (Method::GET, "/version", get(probes::version)),
        (Method::GET, "/openapi.json", get(openapi::json)),
    ]
}

/// Method and path of every route.
pub fn route_list() -> Vec<(Method, &'static str)> {
    routes().into_iter().map(|(method, path, _)| (method, path)).collect()
}

/// The whole service; without the metrics where they have a port of their own.
fn router(state: AppState) -> Router {
    let apart = state.config().metrics_listen.is_some();
    router_of(state, |path| !(apart && path == METRICS))
}

/// What answers at the port of the metrics.
fn metrics_router(state: AppState) -> Router {
    router_of(state, |path| path == METRICS)
}

fn router_of(state: AppState, is_here: impl Fn(&str) -> bool) -> Router {
    let here: Vec<_> = routes().into_iter().filter(|(_, path, _)| is_here(path)).collect();
    let table = RouteTable::new(here.iter().map(|(method, path, _)| (method.clone(), *path)));
    let router =
        here.into_iter().fold(Router::new(), |router, (_, path, handler)| router.route(path, handler));
    with_limits(router, table, state)
}

/// What stands around every route: request ids and logs, browsers, gzip, panics, keys, body limits, answers to unknown
/// paths. The last layer is the outermost: a refusal for its key is readable in a browser and has an id.
fn with_limits(routes: Router<AppState>, table: RouteTable, state: AppState) -> Router {
    let config = state.config();
    let methods = table.clone();
    routes
        .fallback(async move |method: Method, uri: Uri| table.unknown_path(&method, uri.path()))
        .method_not_allowed_fallback(async move |method: Method, path: MatchedPath| {
            methods.wrong_method(&method, path.as_str())
        })
        .layer(DefaultBodyLimit::max(config.max_body_bytes))
        .layer(RequestBodyTimeoutLayer::new(config.body_idle_timeout))
        .layer(middleware::from_fn_with_state(state.clone(), auth::require_key))
        .layer(CatchPanicLayer::custom(answer_panic))
        .layer(compression::layer())
        .layer(option_layer(cors::layer(&config.cors_origins)))
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
        let app = with_limits(routes, RouteTable::new([]), state.clone());
        let request = Request::get("/broken").header("x-request-id", "7").body(Body::empty()).unwrap();
        let response = app.oneshot(request).await.unwrap();
        assert_eq!(response.status(), 500);
        assert_eq!(response.headers()["x-request-id"], "7");
        let body = to_bytes(response.into_body(), 10_000).await.unwrap();
        let body = String::from_utf8(body.to_vec()).unwrap();
        assert!(body.contains("internal_error") && !body.contains("secret"), "{body}");
        let counted = "tinyllava_http_requests_total{method=\"GET\",route=\"/broken\",status=\"500\"} 1";
        assert!(state.render_metrics().contains(counted));
    }
}
