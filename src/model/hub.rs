//! Downloads checkpoints of a Hugging Face hub into the cache all its tools share.
//!
//! Called by `cli` before a model is opened. Takes only the files a checkpoint needs, goes on where an earlier
//! download broke off, checks sizes and checksums, and works without network from a complete cache. Dropping the
//! future stops the download; what has arrived is kept.

mod cache;
mod settings;
mod transfer;

use std::{fmt, path::PathBuf, time::Duration};

use reqwest::{Client, Response, StatusCode};
use serde::Deserialize;
use thiserror::Error;

use super::{pytorch_pickle, shards, weights::ADAPTER_FILES};
use cache::Cache;
pub use settings::HubConfig;
pub use transfer::HubProgress;

/// What [`Hub::download`] reports to.
pub type OnProgress<'a> = &'a (dyn Fn(HubProgress<'_>) + Send + Sync);

/// Largest list of a repository's files.
const MAX_LISTING_BYTES: usize = 8 << 20;
/// Largest file that is not weights; a `tokenizer.json` is some 10 MB.
const MAX_SMALL_FILE_BYTES: u64 = 64 << 20;
/// Silence after which a connection counts as lost.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Files a checkpoint may have beside its weights.
pub(super) const SMALL_FILES: [&str; 10] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "language_model/config.json",
    "vision_tower/config.json",
];

/// A repository and, if pinned, a branch, tag or commit of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repo {
    /// `org/name`
    pub id: String,
    pub revision: Option<String>,
}

impl Repo {
    /// From `org/name` or `org/name@revision`; `None` if it is neither.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, revision) = match text.split_once('@') {
            Some((id, revision)) => (id, Some(revision.to_owned())),
            None => (text, None),
        };
        let (owner, name) = id.split_once('/')?;
        // Also what keeps both safe as parts of a path: no separator, no `..`.
        let plain = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !part.is_empty() && part.len() <= 96 && part.chars().all(allowed) && !part.starts_with('.')
        };
        let revision_plain = revision.as_deref().is_none_or(|revision| revision.split('/').all(plain));
        (plain(owner) && plain(name) && revision_plain).then(|| Repo { id: id.into(), revision })
    }

    fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.revision {
            Some(revision) => write!(f, "{}@{revision}", self.id),
            None => f.write_str(&self.id),
        }
    }
}

/// Why a repository cannot be had: one sentence.
#[derive(Debug, Error)]
pub enum HubError {
    #[error("{repo} is private, gated or does not exist: set HF_TOKEN to a token that may read it")]
    NeedsToken { repo: Repo },
    #[error(
        "the token in HF_TOKEN may not read {repo}: accept its terms on {endpoint}, or use another token"
    )]
    Forbidden { repo: Repo, endpoint: String },
    #[error("{endpoint} has no repository {repo}, or not this revision of it")]
    NotFound { repo: Repo, endpoint: String },
    #[error("{repo} has no file {file}")]
    NoFile { repo: Repo, file: String },
    #[error(
        "{repo} holds no weights this program reads: expected model.safetensors or pytorch_model.bin, shards of one of \
         them, or the folders language_model, vision_tower and connector with a pytorch_model.bin each"
    )]
    NoWeights { repo: Repo },
    #[error(
        "{repo} holds a LoRA adapter ({file}), which its weights do not contain: merge it into them first (peft: \
         `merge_and_unload`, then `save_pretrained`), and serve the directory with the result"
    )]
    Adapter { repo: Repo, file: String },
    #[error(
        "{endpoint} cannot be reached ({reason}) and {repo} is not in the cache: check the network or HF_ENDPOINT"
    )]
    Unreachable { repo: Repo, endpoint: String, reason: String },
    #[error("{repo} is not in the cache: download it first, without HF_HUB_OFFLINE")]
    NotDownloaded { repo: Repo },
    #[error("{url} answered {status}")]
    Status { url: String, status: StatusCode },
    #[error("{url} answered what a hub does not: {reason}")]
    Answer { url: String, reason: String },
    #[error(
        "{repo}: the download of {file} broke off at {received} of {size} bytes ({reason}): run again to go on from there"
    )]
    Interrupted { repo: Repo, file: String, received: u64, size: u64, reason: String },
    #[error("{repo}: {file} arrived damaged ({reason}) and was thrown away: run again")]
    Damaged { repo: Repo, file: String, reason: String },
    #[error("no cache directory: set HF_HOME")]
    NoCache,
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
}

/// A hub and its cache.
#[derive(Debug)]
pub struct Hub {
    config: HubConfig,
    cache: Cache,
    client: Client,
}

/// A revision's commit and files, as the hub lists them.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<RemoteFile>,
}

/// One file of a repository.
#[derive(Debug, Clone, Deserialize)]
struct RemoteFile {
    #[serde(rename = "rfilename")]
    name: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    /// Large files only.
    lfs: Option<LargeFile>,
}

#[derive(Debug, Clone, Deserialize)]
struct LargeFile {
    sha256: Option<String>,
}

impl Hub {
    /// With the settings of the environment.
    pub fn from_env() -> Result<Self, HubError> {
        Ok(Self::new(HubConfig::from_variables(|name| std::env::var(name).ok())?))
    }

    /// With given settings.
    pub fn new(config: HubConfig) -> Self {
        let client = Client::builder()
            .user_agent(concat!("tinyllava-server/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .build()
            .expect("constant settings: this is a bug");
        Hub { cache: Cache::new(config.cache_dir.clone()), config, client }
    }

    /// The directory of a repository that has been downloaded completely; no network.
    pub fn cached(&self, repo: &Repo) -> Option<PathBuf> {
        self.cache.snapshot(&repo.id, repo.revision())
    }

    /// Brings the checkpoint of `repo` into the cache, as far as it is not there, and returns its directory.
    pub async fn download(&self, repo: &Repo, on_progress: OnProgress<'_>) -> Result<PathBuf, HubError> {
        let cached = self.cached(repo);
        if let Some(dir) = &cached
            && (self.config.offline || cache::is_commit(repo.revision()))
        {
            return Ok(dir.clone());
        }
        if self.config.offline {
            return Err(HubError::NotDownloaded { repo: repo.clone() });
        }
        let listing = match (self.list(repo).await, cached) {
            (Err(HubError::Unreachable { reason, .. }), Some(dir)) => {
                tracing::warn!(%repo, reason, "hub unreachable, serving the cached revision");
                return Ok(dir);
            }
            (listing, _) => listing?,
        };
        let files = wanted(repo, listing.siblings)?;
        let total_bytes = files.iter().filter_map(|file| file.size).sum();
        let mut done_bytes = 0;
        for file in &files {
            let progress = |received: u64| {
                let done_bytes = done_bytes + received;
                on_progress(HubProgress { file: &file.name, done_bytes, total_bytes });
            };
            self.fetch(repo, &listing.sha, file, &progress).await?;
            progress(file.size.unwrap_or(0));
            done_bytes += file.size.unwrap_or(0);
        }
        self.cache.link(&repo.id, repo.revision(), &listing.sha, &files)
    }

    /// Asks the hub for the commit and the files of a revision.
    async fn list(&self, repo: &Repo) -> Result<Listing, HubError> {
        let revision = repo.revision().replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}?blobs=true", self.config.endpoint, repo.id);
        let unreachable = |error: reqwest::Error| HubError::Unreachable {
            repo: repo.clone(),
            endpoint: self.config.endpoint.clone(),
            reason: transfer::root_cause(&error),
        };
        let response = self.get(&url).send().await.map_err(unreachable)?;
        let mut response = self.accept(repo, &url, response)?;
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(unreachable)? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_LISTING_BYTES {
                let reason = format!("a list of files longer than {MAX_LISTING_BYTES} bytes");
                return Err(HubError::Answer { url, reason });
            }
        }
        let listing: Result<Listing, _> = serde_json::from_slice(&body);
        match listing {
            Ok(listing) if cache::is_commit(&listing.sha) => Ok(listing),
            Ok(listing) => Err(HubError::Answer { url, reason: format!("{:?} as a commit", listing.sha) }),
            Err(error) => Err(HubError::Answer { url, reason: error.to_string() }),
        }
    }

    fn get(&self, url: &str) -> reqwest::RequestBuilder {
        let request = self.client.get(url);
        // The client drops this header when it is redirected to another host.
        match &self.config.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// An answer that is not a success, as a sentence.
    fn accept(&self, repo: &Repo, url: &str, response: Response) -> Result<Response, HubError> {
        let (repo, endpoint) = (repo.clone(), self.config.endpoint.clone());
        let status = response.status();
        match status.as_u16() {
            200..300 => Ok(response),
            401 | 403 if self.config.token.is_none() => Err(HubError::NeedsToken { repo }),
            401 | 403 => Err(HubError::Forbidden { repo, endpoint }),
            404 => Err(HubError::NotFound { repo, endpoint }),
            _ => Err(HubError::Status { url: url.into(), status }),
        }
    }
}

/// The files of a repository that make a checkpoint: weights of one layout, and the small ones.
fn wanted(repo: &Repo, files: Vec<RemoteFile>) -> Result<Vec<RemoteFile>, HubError> {
    let has = |name: &str| files.iter().any(|file| file.name == name);
    if !has("config.json") {
        return Err(HubError::NoFile { repo: repo.clone(), file: "config.json".into() });
    }
    if let Some(file) = ADAPTER_FILES.into_iter().find(|file| has(file)) {
        return Err(HubError::Adapter { repo: repo.clone(), file: file.into() });
    }
    // The order in which `Weights::open` looks for them.
    let layouts: [(&[&str], Shards); 5] = [
        (&[shards::SINGLE_FILE], None),
        (&[shards::INDEX_FILE], Some(("model-", ".safetensors"))),
        (&[pytorch_pickle::SINGLE_FILE], None),
        (&[pytorch_pickle::INDEX_FILE], Some(("pytorch_model-", ".bin"))),
        (&pytorch_pickle::FOLDER_FILES, None),
    ];
    let layout = layouts.into_iter().find(|(names, _)| names.iter().all(|name| has(name)));
    let Some((names, shards)) = layout else {
        return Err(HubError::NoWeights { repo: repo.clone() });
    };
    let is_weights =
        |name: &str| names.contains(&name) || shards.is_some_and(|(start, end)| is_shard(name, start, end));
    let is_small = |file: &RemoteFile| {
        SMALL_FILES.contains(&file.name.as_str()) && file.size.is_none_or(|size| size <= MAX_SMALL_FILE_BYTES)
    };
    Ok(files.iter().filter(|file| is_small(file) || is_weights(&file.name)).cloned().collect())
}

/// The start and the end of a layout's shard names.
type Shards = Option<(&'static str, &'static str)>;

/// `model-00001-of-00002.safetensors`: the only other names taken from a hub.
fn is_shard(name: &str, start: &str, end: &str) -> bool {
    let middle = name.strip_prefix(start).and_then(|rest| rest.strip_suffix(end));
    let numbers = middle.and_then(|middle| middle.split_once("-of-"));
    let number = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    numbers.is_some_and(|(n, m)| number(n) && number(m))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_name_is_never_a_path() {
        let pinned = Repo::parse("org/my.model-1@refs/pr/3").unwrap();
        assert_eq!((pinned.id.as_str(), pinned.revision()), ("org/my.model-1", "refs/pr/3"));
        assert_eq!(Repo::parse("org/name").unwrap().revision(), "main");
        for text in
            ["name", "../name", "org/..", "a/b/c", "/b", "a/", "a/b@", "a/b@../../x", "a/b@x//y", "a b/c"]
        {
            assert_eq!(Repo::parse(text), None, "{text}");
        }
    }

    /// Returns the files that are downloaded from a repository with files of these names.
    fn names(names: &[&str]) -> Result<Vec<String>, HubError> {
        let file =
            |name: &&str| RemoteFile { name: name.to_string(), size: Some(1), blob_id: None, lfs: None };
        let wanted = wanted(&Repo::parse("a/b").unwrap(), names.iter().map(file).collect());
        wanted.map(|files| files.into_iter().map(|file| file.name).collect())
    }

    #[test]
    fn only_the_files_of_one_layout_are_taken() {
        let sharded = names(&[
            "README.md",
            "config.json",
            "vocab.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model-0000x-of-00002.safetensors",
            "../model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "optimizer.bin",
            "language_model/pytorch_model.bin",
        ]);
        let expected = [
            "config.json",
            "vocab.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        ];
        assert_eq!(sharded.unwrap(), expected);
        let folders = ["config.json", "language_model/pytorch_model.bin", "vision_tower/pytorch_model.bin"];
        assert!(matches!(names(&folders), Err(HubError::NoWeights { .. })));
        let all: Vec<_> = folders.into_iter().chain(["connector/pytorch_model.bin"]).collect();
        assert_eq!(names(&all).unwrap(), all);
        assert!(matches!(names(&["model.safetensors"]), Err(HubError::NoFile { .. })));
    }

    #[test]
    fn pickles_are_taken_where_there_is_nothing_safer() {
        let index = ["config.json", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"];
        assert_eq!(names(&index).unwrap(), index);
        let both =
            ["config.json", "pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "training_args.bin"];
        assert_eq!(names(&both).unwrap(), both[..2]);
        assert_eq!(
            names(&[&both[..], &["model.safetensors"]].concat()).unwrap(),
            [both[0], "model.safetensors"]
        );
        let folder = "language_model/pytorch_model.bin";
        assert_eq!(names(&[&both[..], &[folder]].concat()).unwrap(), both[..2]);
    }

    #[test]
    fn a_repository_with_an_adapter_is_refused_before_its_download() {
        for file in ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"] {
            let error = names(&["config.json", "model.safetensors", file]).unwrap_err().to_string();
            assert!(error.contains("a/b holds a LoRA adapter") && error.contains(file), "{error}");
        }
    }
}
