//! What operators and clients ask about the server itself: life, readiness, metrics, version, models.
//!
//! Handlers of the router. Must answer at once whatever the engine does.

use axum::{
    Json,
    extract::{Path, State, rejection::PathRejection},
    http::header,
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    error::ApiError,
    openapi::NotReady,
    responses::{Model, ModelList},
    state::AppState,
    validate::{InvalidRequest, shorten},
};

/// What a probe says.
#[derive(Debug, Serialize, ToSchema)]
pub struct Status {
    status: &'static str,
}

/// Which server this is.
#[derive(Debug, Serialize, ToSchema)]
pub struct Version {
    name: &'static str,
    version: &'static str,
}

/// `GET /health`: the process lives.
#[utoipa::path(get, path = "/health", tag = "operating", summary = "The process lives",
    responses((status = 200, description = "It does.", body = Status)))]
pub async fn health() -> Json<Status> {
    Json(Status { status: "ok" })
}

/// `GET /ready`: requests should be sent here. Says no as soon as the server is asked to stop, while what comes within
/// `drain_delay` is still taken on: balancers need a while to notice.
///
/// # Errors
/// 503 while loading or draining, and when the engine has stopped.
#[utoipa::path(get, path = "/ready", tag = "operating", summary = "A request sent now would be taken on",
    responses((status = 200, description = "It would.", body = Status), NotReady))]
pub async fn ready(State(state): State<AppState>) -> Result<Json<Status>, ApiError> {
    state.ready()?;
    if state.drain().is_announced() {
        return Err(ApiError::Draining);
    }
    Ok(Json(Status { status: "ready" }))
}

/// `GET /version`
#[utoipa::path(get, path = "/version", tag = "operating", summary = "Name and version of the server",
    responses((status = 200, description = "Name and version.", body = Version)))]
pub async fn version() -> Json<Version> {
    Json(Version { name: env!("CARGO_PKG_NAME"), version: env!("CARGO_PKG_VERSION") })
}

/// `GET /metrics`
#[utoipa::path(get, path = "/metrics", tag = "operating", summary = "Metrics for Prometheus",
    responses((status = 200, description = "Prometheus' text format.", body = String, content_type = "text/plain")))]
pub async fn metrics(State(state): State<AppState>) -> Response {
    let content_type = (header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8");
    ([content_type], state.render_metrics()).into_response()
}

/// `GET /v1/models`
///
/// # Errors
/// 503 while loading.
#[utoipa::path(get, path = "/v1/models", tag = "models", operation_id = "listModels", summary = "The model that is served",
    responses((status = 200, description = "A list of one.", body = ModelList), NotReady))]
pub async fn models(State(state): State<AppState>) -> Result<Json<ModelList>, ApiError> {
    let loaded = state.loaded()?;
    Ok(Json(ModelList { object: "list", data: [Model::from(&loaded.model)] }))
}

/// `GET /v1/models/{id}`; an id may have slashes, as repositories of models do.
///
/// # Errors
/// 404 for another model, 503 while loading.
#[utoipa::path(get, path = "/v1/models/{id}", tag = "models", operation_id = "getModel", summary = "One model by its id",
    params(("id" = String, Path, description = "May contain slashes.")),
    responses((status = 200, description = "The model.", body = Model), NotReady))]
pub async fn model(
    State(state): State<AppState>,
    asked: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    // No route has a path that is no UTF-8.
    let Path(asked) = asked.map_err(|_| ApiError::NoSuchRoute)?;
    let loaded = state.loaded()?;
    let served = &loaded.model.id;
    if asked != *served {
        return Err(InvalidRequest::UnknownModel { asked: shorten(&asked), served: served.clone() }.into());
    }
    Ok(Json(Model::from(&loaded.model)))
}
