//! A hub on the loopback that behaves, or misbehaves, as a test asks; large files come from a second origin.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path as UrlPath, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use bytes::Bytes;
use serde_json::json;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tinyllava::model::hub::{Hub, HubConfig, HubError, Repo};
use tokio::net::TcpListener;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const SHARD: &str = "model-00002-of-00005.safetensors";

/// How the hub misbehaves.
#[derive(Default)]
pub struct Mischief {
    /// Break the connection after so many bytes of weights, this often.
    pub cut_after: usize,
    pub num_cuts: usize,
    /// Instead of breaking, fall silent.
    pub stall: bool,
    /// Ignore `Range` and send the whole file.
    pub ignore_range: bool,
    /// Change a byte of the shard.
    pub damage: bool,
    /// Accept only this token.
    pub token: Option<&'static str>,
}

#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
}

pub struct FakeHub {
    files: BTreeMap<String, Bytes>,
    pub mischief: Mutex<Mischief>,
    requests: Mutex<Vec<Request>>,
    /// Where large files are redirected to: another port, so another origin.
    cdn: Mutex<String>,
}

/// A running hub, its CDN, and a cache for one test.
pub struct Setup {
    pub hub: Arc<FakeHub>,
    pub endpoint: String,
    pub cache: TempDir,
    pub servers: Vec<tokio::task::JoinHandle<()>>,
}

impl Setup {
    pub async fn new(mischief: Mischief) -> Self {
        Self::with_files_of(&golden(), mischief).await
    }

    /// A hub whose repository holds the files of a directory.
    pub async fn with_files_of(dir: &Path, mischief: Mischief) -> Self {
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            files.insert(name, Bytes::from(std::fs::read(&path).unwrap()));
        }
        files.insert("README.md".into(), Bytes::from_static(b"not needed"));
        let hub = Arc::new(FakeHub {
            files,
            mischief: Mutex::new(mischief),
            requests: Mutex::default(),
            cdn: Mutex::default(),
        });
        let api = Router::new()
            .route("/api/models/{owner}/{name}/revision/{revision}", get(list))
            .route("/{owner}/{name}/resolve/{commit}/{file}", get(resolve))
            .with_state(Arc::clone(&hub));
        let cdn = Router::new().route("/cdn/{file}", get(serve_cdn)).with_state(Arc::clone(&hub));
        let (endpoint, api) = serve(api).await;
        let (cdn_url, cdn) = serve(cdn).await;
        *hub.cdn.lock().unwrap() = cdn_url;
        Setup { hub, endpoint, cache: tempfile::tempdir().unwrap(), servers: vec![api, cdn] }
    }

    pub fn client(&self, token: Option<&str>) -> Hub {
        Hub::new(HubConfig {
            endpoint: self.endpoint.clone(),
            token: token.map(Into::into),
            cache_dir: self.cache.path().to_owned(),
            offline: false,
        })
    }

    pub async fn download(&self, repo: &str) -> Result<PathBuf, HubError> {
        self.client(None).download(&Repo::parse(repo).unwrap(), &|_| ()).await
    }

    pub fn stop(&self) {
        self.servers.iter().for_each(|server| server.abort());
    }

    /// Requests whose path holds `part`, since the last call.
    pub fn take_requests(&self, part: &str) -> Vec<Request> {
        let mut requests = std::mem::take(&mut *self.hub.requests.lock().unwrap());
        requests.retain(|request| request.path.contains(part));
        requests
    }
}

pub fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny_bf16_sharded")
}

async fn serve(router: Router) -> (String, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (url, tokio::spawn(async move { axum::serve(listener, router).await.unwrap() }))
}

impl FakeHub {
    fn record(&self, path: String, headers: &HeaderMap) {
        let text = |name| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
        let request = Request { path, range: text(header::RANGE), token: text(header::AUTHORIZATION) };
        self.requests.lock().unwrap().push(request);
    }

    /// The answer to who may not read.
    fn refuse(&self, headers: &HeaderMap) -> Option<Response> {
        let token = self.mischief.lock().unwrap().token?;
        let expected = format!("Bearer {token}");
        match headers.get(header::AUTHORIZATION) {
            Some(found) if found.to_str().unwrap() == expected => None,
            Some(_) => Some(StatusCode::FORBIDDEN.into_response()),
            None => Some(StatusCode::UNAUTHORIZED.into_response()),
        }
    }
}

async fn list(
    State(hub): State<Arc<FakeHub>>,
    UrlPath((owner, name, revision)): UrlPath<(String, String, String)>,
    headers: HeaderMap,
) -> Response {
    hub.record(format!("list {revision}"), &headers);
    if let Some(refusal) = hub.refuse(&headers) {
        return refusal;
    }
    // The same files, whatever the names of the family and of users.
    let known =
        (owner.as_str(), name.as_str()) == ("org", "tiny") || ["Zhang199", "me"].contains(&owner.as_str());
    if !known || !["main", "v1", COMMIT].contains(&revision.as_str()) {
        return StatusCode::NOT_FOUND.into_response();
    }
    let siblings = hub.files.iter().map(|(name, bytes)| {
        let sha256 = format!("{:x}", Sha256::digest(bytes));
        let mut file = json!({"rfilename": name, "size": bytes.len(), "blobId": &sha256[..40]});
        if name.ends_with(".safetensors") {
            file["lfs"] = json!({"sha256": sha256, "size": bytes.len(), "pointerSize": 135});
        }
        file
    });
    Json(json!({"id": format!("{owner}/{name}"), "sha": COMMIT, "siblings": siblings.collect::<Vec<_>>()}))
        .into_response()
}

async fn resolve(
    State(hub): State<Arc<FakeHub>>,
    UrlPath((_, _, commit, file)): UrlPath<(String, String, String, String)>,
    headers: HeaderMap,
) -> Response {
    hub.record(format!("resolve {commit} {file}"), &headers);
    if let Some(refusal) = hub.refuse(&headers) {
        return refusal;
    }
    if file.ends_with(".safetensors") {
        let location = format!("{}/cdn/{file}", hub.cdn.lock().unwrap());
        return (StatusCode::FOUND, [(header::LOCATION, location)]).into_response();
    }
    content(&hub, &file, &headers)
}

async fn serve_cdn(
    State(hub): State<Arc<FakeHub>>,
    UrlPath(file): UrlPath<String>,
    headers: HeaderMap,
) -> Response {
    hub.record(format!("cdn {file}"), &headers);
    content(&hub, &file, &headers)
}

fn content(hub: &FakeHub, file: &str, headers: &HeaderMap) -> Response {
    let mut mischief = hub.mischief.lock().unwrap();
    let mut bytes = hub.files[file].to_vec();
    if mischief.damage && file == SHARD {
        bytes[100_000] ^= 1;
    }
    let range = headers.get(header::RANGE).filter(|_| !mischief.ignore_range);
    let start = range.map_or(0, |range| {
        let text = range.to_str().unwrap();
        text.strip_prefix("bytes=").unwrap().strip_suffix('-').unwrap().parse::<usize>().unwrap()
    });
    if start > bytes.len() {
        return StatusCode::RANGE_NOT_SATISFIABLE.into_response();
    }
    let total = bytes.len();
    let rest = Bytes::from(bytes.split_off(start));
    let mut response = if mischief.num_cuts > 0 && file == SHARD && rest.len() > mischief.cut_after {
        mischief.num_cuts -= 1;
        let (part, stall) = (rest.slice(..mischief.cut_after), mischief.stall);
        let stream = futures_util::stream::unfold(Some(part), move |part| async move {
            match part {
                Some(part) => Some((Ok(part), None)),
                None if stall => std::future::pending().await,
                None => {
                    // Let the first part leave before the connection breaks.
                    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    Some((Err(std::io::Error::other("the connection is cut")), None))
                }
            }
        });
        let mut response = Body::from_stream(stream).into_response();
        response.headers_mut().insert(header::CONTENT_LENGTH, rest.len().into());
        response
    } else {
        rest.into_response()
    };
    if range.is_some() {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let value = format!("bytes {start}-{}/{total}", total - 1);
        response.headers_mut().insert(header::CONTENT_RANGE, value.parse().unwrap());
    }
    response
}
