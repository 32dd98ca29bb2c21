//! What operators and clients ask about the server itself: life, readiness, metrics, version, models.
//!
//! Handlers of the router. Must answer at once whatever the engine does.

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::header,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use super::{
    error::ApiError,
    responses::{Model, ModelList},
    state::AppState,
    validate::InvalidRequest,
};

/// `GET /health`: the process lives.
pub async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// `GET /ready`: a request sent now would be taken on.
///
/// # Errors
/// 503 while loading or draining, and when the engine has stopped.
pub async fn ready(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    state.ready()?;
    Ok(Json(json!({"status": "ready"})))
}

/// `GET /version`
pub async fn version() -> Json<Value> {
    Json(json!({"name": env!("CARGO_PKG_NAME"), "version": env!("CARGO_PKG_VERSION")}))
}

/// `GET /metrics`
pub async fn metrics(State(state): State<AppState>) -> Response {
    let content_type = (header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8");
    ([content_type], state.metrics().render()).into_response()
}

/// `GET /v1/models`
///
/// # Errors
/// 503 while loading.
pub async fn models(State(state): State<AppState>) -> Result<Json<ModelList>, ApiError> {
    let loaded = state.loaded()?;
    Ok(Json(ModelList { object: "list", data: [Model::from(&loaded.model)] }))
}

/// `GET /v1/models/{id}`; an id may have slashes, as repositories of models do.
///
/// # Errors
/// 404 for another model, 503 while loading.
pub async fn model(
    State(state): State<AppState>,
    asked: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    // No route has a path that is no UTF-8.
    let Path(asked) = asked.map_err(|_| ApiError::NoSuchRoute)?;
    let loaded = state.loaded()?;
    let served = &loaded.model.id;
    if asked != *served {
        return Err(InvalidRequest::UnknownModel { asked, served: served.clone() }.into());
    }
    Ok(Json(Model::from(&loaded.model)))
}
