//! The published contract: `openapi.yaml`, as it is and as JSON.
//!
//! A test holds it against the router's own list of routes.

use std::sync::LazyLock;

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use serde_json::Value;

/// The document as it was written.
pub const YAML: &str = include_str!("../../openapi.yaml");

static JSON: LazyLock<String> = LazyLock::new(|| document().to_string());

/// The document as a value.
pub fn document() -> Value {
    serde_saphyr::from_str(YAML).expect("openapi.yaml is checked by a test: this is a bug")
}

/// `GET /openapi.json`
pub async fn json() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], JSON.as_str()).into_response()
}
