//! `/v1/files`: uploads that later requests name by their ids, in the shapes of OpenAI's API.
//!
//! Handlers of the router. Bytes go to the store as they come and from it as they are read: never a whole file in
//! memory.

use std::time::{Duration, Instant};

use axum::{
    Json,
    body::Body,
    extract::{
        Path, Query, Request, State,
        multipart::Field,
        rejection::{PathRejection, QueryRejection},
    },
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::BytesMut;
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tokio_util::io::ReaderStream;
use utoipa::ToSchema;

use super::{
    body::{BodyError, Budget, MULTIPART, WRITE_BUFFER_BYTES, media_type},
    error::ApiError,
    multipart::{self, Parts},
    openapi::{NotReady, Refused},
    progress::Deadline,
    state::AppState,
    validate::InvalidRequest,
};
use crate::{
    config::Config,
    media::{FileLabel, FileRecord, FileStore, Upload},
};

/// What OpenAI's clients may say of an upload; it makes no difference here.
const PURPOSES: [&str; 6] = ["assistants", "batch", "evals", "fine-tune", "user_data", "vision"];
const ANCHOR: &str = "expires_after[anchor]";
const SECONDS: &str = "expires_after[seconds]";
const MAX_TEXT_BYTES: usize = 64;
const MAX_FILENAME_BYTES: usize = 255;
/// Longest page of a list.
const MAX_PAGE: usize = 10_000;
/// How often old files are looked for when nobody asks for any.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);

/// A file as clients see it.
#[derive(Debug, Serialize, ToSchema)]
pub struct FileObject {
    id: String,
    object: &'static str,
    bytes: u64,
    created_at: u64,
    expires_at: u64,
    filename: String,
    purpose: String,
    /// Deprecated by OpenAI, but their clients still ask for it.
    status: &'static str,
}

impl From<FileRecord> for FileObject {
    fn from(record: FileRecord) -> Self {
        FileObject {
            id: record.id,
            object: "file",
            bytes: record.num_bytes,
            created_at: record.created_ms / 1000,
            expires_at: record.expires_ms / 1000,
            filename: record.filename,
            purpose: record.purpose,
            status: "processed",
        }
    }
}

/// A page of files.
#[derive(Debug, Serialize, ToSchema)]
pub struct FileList {
    object: &'static str,
    data: Vec<FileObject>,
    first_id: Option<String>,
    last_id: Option<String>,
    has_more: bool,
}

/// The answer to a deletion.
#[derive(Debug, Serialize, ToSchema)]
pub struct FileDeleted {
    id: String,
    object: &'static str,
    deleted: bool,
}

/// Which files to list.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    purpose: Option<String>,
    limit: Option<usize>,
    order: Option<Order>,
    after: Option<String>,
}

/// An upload; read part by part, this is its description.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "for the document only")]
pub struct FileForm {
    /// The file.
    #[schema(value_type = String, format = Binary)]
    file: (),
    /// assistants, batch, evals, fine-tune, user_data or vision; it makes no difference.
    purpose: String,
    /// created_at
    #[schema(rename = "expires_after[anchor]")]
    anchor: Option<String>,
    /// How long to keep the file; at most, and by default, as long as the server keeps files.
    #[schema(rename = "expires_after[seconds]", minimum = 1)]
    seconds: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Order {
    Asc,
    Desc,
}

/// `POST /v1/files`
///
/// # Errors
/// Faults of the transport and of the form; a file that is too large; a full store.
#[utoipa::path(post, path = "/v1/files", tag = "files", operation_id = "createFile",
    summary = "Upload a file that later requests name by its id",
    request_body(content = FileForm, content_type = "multipart/form-data"),
    responses((status = 200, description = "The file.", body = FileObject), Refused))]
pub async fn create(State(state): State<AppState>, request: Request) -> Result<Json<FileObject>, ApiError> {
    let work = state.begin_work()?;
    let loaded = state.ready()?;
    let deadline = Deadline::new(Instant::now(), state.config().request_timeout, work.cut_off());
    let record = deadline.bound(receive(&state, loaded.media.files(), request)).await??;
    Ok(Json(record.into()))
}

/// `GET /v1/files`
///
/// # Errors
/// Faults of the query.
#[utoipa::path(get, path = "/v1/files", tag = "files", operation_id = "listFiles", summary = "The files there are, newest first",
    params(
        ("purpose" = Option<String>, Query),
        ("limit" = Option<usize>, Query, minimum = 1, maximum = 10_000),
        ("order" = inline(Option<Order>), Query, description = "By the time of the upload; desc if left out."),
        ("after" = Option<String>, Query, description = "Begin after the file with this id.")),
    responses((status = 200, description = "A page of files.", body = FileList), Refused))]
pub async fn list(
    State(state): State<AppState>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Json<FileList>, ApiError> {
    let Query(query) = query.map_err(|_| {
        let message = "the query has a field that is unknown or of another type; known are purpose (text), limit (a whole \
                       number), order (asc or desc) and after (the id of a file)";
        InvalidRequest::field("query", message)
    })?;
    let limit = query.limit.unwrap_or(MAX_PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(InvalidRequest::field("limit", format!("limit must be from 1 to {MAX_PAGE}")).into());
    }
    with_store(&state, move |files| page(files.list(), &query, limit)).await?
}

/// `GET /v1/files/{id}`
///
/// # Errors
/// 404 when there is no such file.
#[utoipa::path(get, path = "/v1/files/{id}", tag = "files", operation_id = "getFile", summary = "One file by its id",
    params(("id" = String, Path)),
    responses((status = 200, description = "The file.", body = FileObject), NotReady))]
pub async fn get(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<FileObject>, ApiError> {
    let id = checked(id)?;
    let record = with_store(&state, move |files| files.get(&id)).await??;
    Ok(Json(record.into()))
}

/// `DELETE /v1/files/{id}`
///
/// # Errors
/// 404 when there is no such file.
#[utoipa::path(delete, path = "/v1/files/{id}", tag = "files", operation_id = "deleteFile", summary = "Forget a file",
    params(("id" = String, Path)),
    responses((status = 200, description = "It is gone; requests that have begun to read it go on.", body = FileDeleted), NotReady))]
pub async fn delete(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<FileDeleted>, ApiError> {
    let id = checked(id)?;
    let id = with_store(&state, move |files| files.delete(&id).map(|()| id)).await??;
    Ok(Json(FileDeleted { id, object: "file", deleted: true }))
}

/// `GET /v1/files/{id}/content`
///
/// # Errors
/// 404 when there is no such file.
#[utoipa::path(get, path = "/v1/files/{id}/content", tag = "files", operation_id = "getFileContent",
    summary = "The bytes of a file", params(("id" = String, Path)),
    responses((status = 200, description = "The bytes.", content_type = "application/octet-stream"), NotReady))]
pub async fn content(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let id = checked(id)?;
    let (record, file) = with_store(&state, move |files| files.read(&id)).await??;
    let stream = ReaderStream::with_capacity(tokio::fs::File::from_std(file), WRITE_BUFFER_BYTES);
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (header::CONTENT_LENGTH, record.num_bytes.into()),
        // A browser must not take what somebody uploaded for a page of this server.
        (HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff")),
    ];
    Ok((headers, Body::from_stream(stream)).into_response())
}

/// Removes expired files also when nobody asks for any. Never completes.
pub async fn sweep(state: AppState) {
    loop {
        tokio::time::sleep(SWEEP_INTERVAL).await;
        // An error means that the model is loading: then there are no files yet.
        let _ = with_store(&state, |files| files.remove_expired()).await;
        if let Ok(loaded) = state.loaded() {
            let _ = blocking(move || loaded.media.remove_idle()).await;
        }
    }
}

/// No file has an id that is no UTF-8.
fn checked(id: Result<Path<String>, PathRejection>) -> Result<String, ApiError> {
    id.map(|Path(id)| id).map_err(|_| ApiError::NoSuchRoute)
}

/// Runs `work` on the blocking pool.
async fn with_store<T: Send + 'static>(
    state: &AppState,
    work: impl FnOnce(&FileStore) -> T + Send + 'static,
) -> Result<T, ApiError> {
    let files = state.loaded()?.media.files().clone();
    blocking(move || work(&files)).await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    let done = spawn_blocking(work).await;
    done.map_err(|error| ApiError::Internal(format!("using the file store: {error}")))
}

/// The part of `records`, oldest first, that is asked for.
fn page(mut records: Vec<FileRecord>, query: &ListQuery, limit: usize) -> Result<Json<FileList>, ApiError> {
    if query.order != Some(Order::Asc) {
        records.reverse();
    }
    let start = match &query.after {
        None => 0,
        Some(after) => match records.iter().position(|record| record.id == *after) {
            Some(position) => position + 1,
            None => {
                return Err(
                    InvalidRequest::field("after", "after names no file; use an id of the list").into()
                );
            }
        },
    };
    let asked = |record: &FileRecord| query.purpose.as_ref().is_none_or(|asked| *asked == record.purpose);
    let mut rest = records.drain(start..).filter(asked);
    let data: Vec<FileObject> = rest.by_ref().take(limit).map(FileObject::from).collect();
    let id = |file: Option<&FileObject>| file.map(|file| file.id.clone());
    let (first_id, last_id) = (id(data.first()), id(data.last()));
    Ok(Json(FileList { object: "list", data, first_id, last_id, has_more: rest.next().is_some() }))
}

/// The parts of an upload, in any order.
#[derive(Default)]
struct Form {
    upload: Option<(Upload, String)>,
    purpose: Option<String>,
    anchor: Option<String>,
    seconds: Option<String>,
}

async fn receive(
    state: &AppState,
    files: &std::sync::Arc<FileStore>,
    request: Request,
) -> Result<FileRecord, ApiError> {
    let mut budget = Budget::open(state, request.headers())?;
    if media_type(request.headers()).as_deref() != Some(MULTIPART) {
        let expected = "multipart/form-data with the parts \"file\" and \"purpose\"";
        return Err(BodyError::ContentType { expected }.into());
    }
    let config = state.config();
    let mut parts = Parts::open(request, config).await?;
    let mut form = Form::default();
    while let Some(part) = parts.next().await? {
        let (place, param) = match part.name() {
            Some("file") if form.upload.is_some() => return Err(multipart::twice("file").into()),
            Some("file") => {
                let filename = filename(&part)?;
                let upload = blocking({
                    let files = files.clone();
                    move || files.begin()
                })
                .await??;
                form.upload = Some((store(upload, part, &mut budget, config).await?, filename));
                continue;
            }
            Some("purpose") => (&mut form.purpose, "purpose"),
            Some(ANCHOR) => (&mut form.anchor, ANCHOR),
            Some(SECONDS) => (&mut form.seconds, SECONDS),
            name => {
                let known = "the parts are \"file\", \"purpose\" and \"expires_after\"";
                return Err(multipart::unknown("file", name, known).into());
            }
        };
        let text = multipart::text(part, param, MAX_TEXT_BYTES, &mut budget, config).await?;
        if place.replace(text).is_some() {
            return Err(multipart::twice(param).into());
        }
    }
    parts.finish(&mut budget).await?;
    let (upload, label) = form.check()?;
    Ok(blocking(move || upload.finish(label)).await??)
}

fn filename(part: &Field<'_>) -> Result<String, BodyError> {
    match part.file_name() {
        Some(name) if name.len() > MAX_FILENAME_BYTES => {
            let message = format!("the name of the file is longer than {MAX_FILENAME_BYTES} bytes");
            Err(BodyError::Part { param: "file", message })
        }
        name => Ok(name.filter(|name| !name.is_empty()).unwrap_or("upload").into()),
    }
}

/// Writes a part to the store in large pieces: each one is a trip to the blocking pool.
async fn store(
    mut upload: Upload,
    part: Field<'_>,
    budget: &mut Budget,
    config: &Config,
) -> Result<Upload, ApiError> {
    let mut chunks = std::pin::pin!(multipart::chunks(part, config));
    let mut buffer = BytesMut::with_capacity(WRITE_BUFFER_BYTES);
    loop {
        let chunk = chunks.next().await.transpose()?;
        if let Some(chunk) = &chunk {
            budget.grow(chunk.len())?;
            buffer.extend_from_slice(chunk);
        }
        if buffer.len() >= WRITE_BUFFER_BYTES || chunk.is_none() {
            let piece = buffer.split().freeze();
            upload = blocking(move || upload.write(&piece).map(|()| upload)).await??;
        }
        if chunk.is_none() {
            return Ok(upload);
        }
    }
}

impl Form {
    fn check(self) -> Result<(Upload, FileLabel), ApiError> {
        let fault = |param: &'static str, message: String| BodyError::Part { param, message };
        let (upload, filename) = self.upload.ok_or_else(|| {
            fault("file", "the part \"file\" is missing; add it (curl: -F file=@FILE)".into())
        })?;
        if upload.num_bytes() == 0 {
            return Err(fault("file", "the file is empty; send one with content".into()).into());
        }
        let purpose = self
            .purpose
            .filter(|purpose| PURPOSES.contains(&purpose.as_str()))
            .ok_or_else(|| fault("purpose", format!("purpose must be one of {}", PURPOSES.join(", "))))?;
        if self.anchor.is_some_and(|anchor| anchor != "created_at") {
            return Err(fault(ANCHOR, "expires_after[anchor] must be created_at".into()).into());
        }
        let lifetime = match self.seconds.map(|seconds| seconds.parse::<u64>()) {
            None => None,
            Some(Ok(seconds)) if seconds > 0 => Some(Duration::from_secs(seconds)),
            Some(_) => {
                let message = "expires_after[seconds] must be a whole number of seconds, at least 1";
                return Err(fault(SECONDS, message.into()).into());
            }
        };
        Ok((upload, FileLabel { filename, purpose, lifetime }))
    }
}
