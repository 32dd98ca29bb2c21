//! What every refusal looks like in the document: one component a status, the same table for all operations.
//!
//! The handlers' attributes name [`Refused`] or [`NotReady`]. The statuses themselves are `http/error.rs`'s affair.

use std::collections::BTreeMap;

use utoipa::{
    IntoResponses, PartialSchema,
    openapi::{
        ContentBuilder, Header, HeaderBuilder, ObjectBuilder, OpenApi, Ref, RefOr, Response, ResponseBuilder,
        Type,
        security::{HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

use crate::http::error::WireError;

/// Status, name of the component, and when it comes.
const TABLE: [(&str, &str, &str); 13] = [
    (
        "400",
        "BadRequest",
        "Malformed JSON or multipart, a bad or unknown field (named in `param`), two sources for one video, a URL that policy \
         refuses (`video_refused`), or a prompt and completion beyond the context (`context_length_exceeded`).",
    ),
    ("401", "Unauthorized", "No or a wrong API key (`invalid_api_key`)."),
    (
        "404",
        "NotFound",
        "Unknown model (`model_not_found`), file (`file_not_found`), `uuid` of a video or picture (`media_not_found`), response \
         (`response_not_found`), running chat (`chat_completion_not_found`) or path (`not_found`, with the route that may have \
         been meant).",
    ),
    ("405", "MethodNotAllowed", "The path does not take this method (`method_not_allowed`)."),
    ("408", "BodyTimeout", "The body came too slowly (`body_timeout`)."),
    ("409", "Conflict", "The chat completion has begun its answer (`thinking_is_over`)."),
    (
        "413",
        "TooLarge",
        "The body (`body_too_large`), the video (`video_too_large`) or the file (`file_too_large`) is over its limit, or \
         there is no room for more files (`files_full`).",
    ),
    (
        "415",
        "Unsupported",
        "Not JSON or multipart (`unsupported_content_type`), or no video format that is allowed (`video_unsupported`).",
    ),
    (
        "422",
        "Unprocessable",
        "The video could not be downloaded (`video_fetch_failed`), decoded, is too long or too large (`video_undecodable`), \
         or took too long to decode (`video_decode_timeout`).",
    ),
    (
        "429",
        "Busy",
        "The queue is full (`queue_full`), or too many bodies are being received (`too_many_uploads`).",
    ),
    (
        "500",
        "Internal",
        "A mistake of the server; the message is withheld, the log has it under the request id.",
    ),
    (
        "503",
        "Unavailable",
        "The model is loading (`loading`), the server stops (`draining`), or its engine failed (`engine_failed`).",
    ),
    ("504", "Deadline", "The request took longer than allowed (`deadline_exceeded`)."),
];

/// All of them: for operations that take work on.
#[derive(Debug)]
pub struct Refused;

/// Of operations that only tell.
#[derive(Debug)]
pub struct NotReady;

impl IntoResponses for Refused {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        TABLE.iter().filter(|(status, ..)| *status != "409").map(reference).collect()
    }
}

/// Of operations on something that runs.
#[derive(Debug)]
pub struct NotRunning;

impl IntoResponses for NotRunning {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let few = ["401", "404", "409", "500"];
        TABLE.iter().filter(|(status, ..)| few.contains(status)).map(reference).collect()
    }
}

impl IntoResponses for NotReady {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let few = ["401", "404", "500", "503"];
        TABLE.iter().filter(|(status, ..)| few.contains(status)).map(reference).collect()
    }
}

fn reference((status, name, _): &(&str, &str, &str)) -> (String, RefOr<Response>) {
    ((*status).into(), Ref::from_response_name(*name).into())
}

/// Adds the components that the references lead to.
pub(super) fn finish(document: &mut OpenApi) {
    let components = document.components.get_or_insert_default();
    components.schemas.insert("Error".into(), WireError::schema());
    let bearer = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("Where the operator has set keys; not for the probes, /version and this document."))
        .build();
    components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
    for (status, name, description) in TABLE {
        let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Error"))).build();
        let mut response =
            ResponseBuilder::new().description(description).content("application/json", content);
        if ["429", "503"].contains(&status) {
            response = response.header("Retry-After", retry_after());
        }
        components.responses.insert(name.into(), response.build().into());
    }
}

fn retry_after() -> Header {
    let seconds = ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(1));
    HeaderBuilder::new()
        .schema(Some(seconds))
        .description(Some("Seconds until another try makes sense."))
        .build()
}
