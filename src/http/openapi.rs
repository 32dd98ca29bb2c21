//! The published contract: made of the wire types and the handlers' own descriptions, so that it cannot lag behind them.
//!
//! `GET /openapi.json`, `tinyllava openapi` and the file `openapi.yaml` are the same document; tests hold it against
//! the router's list of routes and the file against it.

mod examples;
pub(super) mod parts;
mod responses;

use std::sync::LazyLock;

use axum::{
    http::header,
    response::{IntoResponse, Response},
};
use serde_json::Value;
use utoipa::{Modify, OpenApi, openapi::OpenApi as Document};

pub use examples::VIDEO_URL as EXAMPLE_VIDEO_URL;
pub use responses::{NotReady, NotRunning, Refused};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "tinyllava-server",
        description = "An inference server for TinyLLaVA-Video-R1 and its family, in the format of OpenAI's API: ask a question \
            about a video, read the thinking and the answer as they come.\n\n\
            Every response carries `x-request-id`: the client's own if it sent one of at most 128 characters out of \
            letters, digits and `-_.:/`, or else a new one. The same id is on the server's log lines.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    security((), ("bearer" = [])),
    servers((url = "http://127.0.0.1:8000")),
    tags((name = "chat"), (name = "completions"), (name = "responses"), (name = "files"), (name = "models"), (name = "operating")),
    paths(
        super::chat::completions,
        super::completions::create,
        super::responses_api::create,
        super::responses_api::get,
        super::responses_api::delete,
        super::files::create,
        super::files::list,
        super::files::get,
        super::files::delete,
        super::files::content,
        super::tokenize::tokenize,
        super::tokenize::detokenize,
        super::running::end_thinking,
        super::probes::models,
        super::probes::model,
        super::probes::health,
        super::probes::ready,
        super::probes::metrics,
        super::probes::version,
        json,
    ),
    components(schemas(
        super::types::ContentPart,
        super::types::ImageUrl,
        super::types::InputVideo,
        super::types::ListedFrame,
        super::types::VideoUrl,
    )),
    modifiers(&Finish),
)]
struct Api;

/// What the macros cannot say.
struct Finish;

impl Modify for Finish {
    fn modify(&self, document: &mut Document) {
        document.info.version = env!("CARGO_PKG_VERSION").into();
        for path in document.paths.paths.values_mut() {
            let operations = [&mut path.get, &mut path.post, &mut path.delete];
            for operation in operations.into_iter().flatten() {
                // What follows is the handler's own documentation; the summary and the responses say it here.
                operation.description = None;
            }
        }
        parts::finish(document);
        responses::finish(document);
        examples::finish(document);
    }
}

/// The document as a value.
pub fn document() -> Value {
    serde_json::to_value(Api::openapi()).expect("the document is JSON: this is a bug")
}

/// The document as `openapi.yaml` has it.
pub fn yaml() -> String {
    let head =
        "# Made by `tinyllava openapi`, from the types in src/http. Change those, then run `make openapi`.\n";
    let document = Api::openapi().to_yaml().expect("the document is YAML: this is a bug");
    format!("{head}{document}")
}

static JSON: LazyLock<String> = LazyLock::new(|| document().to_string());

/// `GET /openapi.json`
#[utoipa::path(get, path = "/openapi.json", tag = "operating", summary = "This document",
    responses((status = 200, description = "This document as JSON.", body = Value)))]
pub async fn json() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], JSON.as_str()).into_response()
}
