//! One file from the hub to the cache: resumed where it broke off, retried, checked, then moved to its place.
//!
//! Used by [`super`] alone. Never leaves a wrong file under a blob's name.

use std::{
    error::Error,
    fs::{File, OpenOptions, TryLockError},
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use reqwest::{Response, StatusCode, header};
use sha2::{Digest, Sha256};
use tokio::io::AsyncWriteExt;

use super::{Hub, HubError, RemoteFile, Repo};

/// Attempts without a single new byte before a download is given up.
const MAX_ATTEMPTS: u32 = 4;
/// Doubled after each such attempt.
const FIRST_BACKOFF: Duration = Duration::from_millis(250);
/// How often to look whether another process has finished the same file.
const LOCK_POLL: Duration = Duration::from_millis(250);

/// How far a download is.
#[derive(Debug, Clone, Copy)]
pub struct HubProgress<'a> {
    /// The file being downloaded.
    pub file: &'a str,
    /// Bytes of all files that are there, and how many there will be.
    pub done_bytes: u64,
    pub total_bytes: u64,
}

impl Hub {
    /// Brings one file into the cache unless it is there. `on_bytes` is told how much of it is here.
    pub(super) async fn fetch(
        &self,
        repo: &Repo,
        commit: &str,
        file: &RemoteFile,
        on_bytes: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), HubError> {
        let blob = self.cache.blob(&repo.id, &file.blob_name(commit));
        if is_whole(&blob, file.size) {
            return Ok(());
        }
        let mut partial = blob.clone().into_os_string();
        partial.push(".incomplete");
        let partial = PathBuf::from(partial);
        let io_error = |source| HubError::Io { path: partial.clone(), source };
        std::fs::create_dir_all(blob.parent().expect("inside the cache: this is a bug")).map_err(io_error)?;
        let lock = lock(&partial).await.map_err(io_error)?;
        // Another process may have finished it while we waited: then the partial file is our own, and empty.
        if is_whole(&blob, file.size) {
            let _ = std::fs::remove_file(&partial);
            return Ok(());
        }
        let target = tokio::fs::File::from_std(lock.try_clone().map_err(io_error)?);
        let mut transfer = Transfer { hub: self, repo, file, commit, target, path: &partial, received: 0 };
        transfer.run(on_bytes).await?;
        let (path, expected) = (partial.clone(), file.clone());
        let checked = tokio::task::spawn_blocking(move || check(&path, &expected)).await;
        let checked = checked.expect("checking does not panic: this is a bug").map_err(io_error)?;
        if let Err(reason) = checked {
            std::fs::remove_file(&partial).map_err(io_error)?;
            return Err(HubError::Damaged { repo: repo.clone(), file: file.name.clone(), reason });
        }
        std::fs::rename(&partial, &blob).map_err(io_error)
    }
}

fn is_whole(blob: &Path, size: Option<u64>) -> bool {
    blob.metadata().is_ok_and(|found| size.is_none_or(|size| found.len() == size))
}

/// Opens the partial file for this process alone; waits for another one that is downloading the same.
async fn lock(path: &Path) -> io::Result<File> {
    loop {
        let file = OpenOptions::new().read(true).append(true).create(true).open(path)?;
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_POLL).await,
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
}

/// A download under way.
struct Transfer<'a> {
    hub: &'a Hub,
    repo: &'a Repo,
    file: &'a RemoteFile,
    commit: &'a str,
    /// Appends.
    target: tokio::fs::File,
    path: &'a PathBuf,
    received: u64,
}

impl Transfer<'_> {
    async fn run(&mut self, on_bytes: &(dyn Fn(u64) + Send + Sync)) -> Result<(), HubError> {
        self.received = self.target.metadata().await.map_err(|e| self.io_error(e))?.len();
        // Without a size nobody can tell whether the part that is here is of the same file.
        if self.file.size.is_none_or(|size| self.received > size) {
            self.restart().await?;
        }
        let mut attempt = 0;
        while self.file.size.is_none_or(|size| self.received < size) {
            let before = self.received;
            let Err(reason) = self.attempt(on_bytes).await? else { break };
            attempt = if self.received > before { 0 } else { attempt + 1 };
            if attempt == MAX_ATTEMPTS {
                return Err(HubError::Interrupted {
                    repo: self.repo.clone(),
                    file: self.file.name.clone(),
                    received: self.received,
                    size: self.file.size.unwrap_or(0),
                    reason,
                });
            }
            tokio::time::sleep(FIRST_BACKOFF * 2u32.pow(attempt)).await;
        }
        self.target.sync_data().await.map_err(|e| self.io_error(e))
    }

    /// One request for what is missing. The inner error is one that may pass: the network's.
    async fn attempt(
        &mut self,
        on_bytes: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<Result<(), String>, HubError> {
        let url = format!(
            "{}/{}/resolve/{}/{}",
            self.hub.config.endpoint, self.repo.id, self.commit, self.file.name
        );
        let request = self.hub.get(&url).header(header::RANGE, format!("bytes={}-", self.received));
        let response = match request.send().await {
            Ok(response) => response,
            Err(error) => return Ok(Err(root_cause(&error))),
        };
        match response.status().as_u16() {
            status @ 500.. => return Ok(Err(format!("status {status}"))),
            404 => {
                let (repo, file) = (self.repo.clone(), self.file.name.clone());
                return Err(HubError::NoFile { repo, file });
            }
            // The range starts beyond the end of the file.
            416 => {
                self.restart().await?;
                return Ok(Err("the part that is here does not fit".into()));
            }
            _ => {}
        }
        let mut response = self.hub.accept(self.repo, &url, response)?;
        if !continues_at(&response, self.received) {
            self.restart().await?;
            if response.status() == StatusCode::PARTIAL_CONTENT {
                return Ok(Err("a part was sent that was not asked for".into()));
            }
        }
        loop {
            match response.chunk().await {
                Err(error) => return Ok(Err(root_cause(&error))),
                Ok(None) => break,
                Ok(Some(chunk)) => {
                    self.target.write_all(&chunk).await.map_err(|e| self.io_error(e))?;
                    self.received += chunk.len() as u64;
                    on_bytes(self.received);
                }
            }
        }
        self.target.flush().await.map_err(|e| self.io_error(e))?;
        let short = self.file.size.is_some_and(|size| self.received < size);
        Ok(if short { Err("the connection ended early".into()) } else { Ok(()) })
    }

    async fn restart(&mut self) -> Result<(), HubError> {
        self.target.set_len(0).await.map_err(|e| self.io_error(e))?;
        self.received = 0;
        Ok(())
    }

    fn io_error(&self, source: io::Error) -> HubError {
        HubError::Io { path: self.path.clone(), source }
    }
}

/// Whether the body goes on at byte `offset` of the file: a server may send the whole file instead.
fn continues_at(response: &Response, offset: u64) -> bool {
    let partial = response.status() == StatusCode::PARTIAL_CONTENT;
    if !partial {
        return offset == 0;
    }
    let range = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let start = range.and_then(|range| range.strip_prefix("bytes ")?.split('-').next()?.parse::<u64>().ok());
    start == Some(offset)
}

/// Compares size and, where the hub tells it, SHA-256; the inner error says what differs. Blocking.
fn check(path: &Path, expected: &RemoteFile) -> io::Result<Result<(), String>> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    if let Some(size) = expected.size.filter(|size| *size != len) {
        return Ok(Err(format!("{len} bytes instead of {size}")));
    }
    let Some(sha256) = expected.lfs.as_ref().and_then(|lfs| lfs.sha256.as_ref()) else { return Ok(Ok(())) };
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    let found = format!("{:x}", hash.finalize());
    Ok(if found.eq_ignore_ascii_case(sha256) { Ok(()) } else { Err("its SHA-256 differs".into()) })
}

/// The innermost error: `connection refused` rather than `error sending request`.
pub(super) fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}
