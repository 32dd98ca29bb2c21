//! A video or a picture on disk, with the hash of its bytes.
//!
//! Made by `source.rs`, on the blocking pool; read by the decoders. Must never keep a file longer
//! than its last clone.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use sha2::{Digest, Sha256};
use tempfile::TempPath;
use tokio::sync::OwnedSemaphorePermit;

use super::MediaError;

const HASH_CHUNK_BYTES: usize = 1 << 20;

/// See the module. A temporary file is removed with its last clone.
#[derive(Debug, Clone)]
pub struct LocalFile {
    path: PathBuf,
    /// SHA-256 of the file's bytes.
    pub content_hash: [u8; 32],
    pub num_bytes: usize,
    temporary: Option<Arc<TempPath>>,
    /// A download's share of the disk, given back after the file is removed.
    _fetch_place: Option<Arc<OwnedSemaphorePermit>>,
}

/// A file that was opened and hashed.
#[derive(Debug)]
pub struct Hashed {
    pub content_hash: [u8; 32],
    pub num_bytes: usize,
}

impl LocalFile {
    pub fn new(path: PathBuf, hashed: Hashed, temporary: Option<TempPath>) -> Self {
        let Hashed { content_hash, num_bytes } = hashed;
        let temporary = temporary.map(Arc::new);
        LocalFile { path, content_hash, num_bytes, temporary, _fetch_place: None }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns true if the file is the server's own copy, which never changes.
    pub fn is_temporary(&self) -> bool {
        self.temporary.is_some()
    }

    /// The same file with its share of the downloads' disk.
    pub fn with_fetch_place(self, place: Arc<OwnedSemaphorePermit>) -> Self {
        LocalFile { _fetch_place: Some(place), ..self }
    }

    /// The same file for keeping: it holds no share of the downloads' disk.
    pub fn without_fetch_place(&self) -> Self {
        LocalFile { _fetch_place: None, ..self.clone() }
    }
}

/// Reads a whole file of at most `max_bytes`.
///
/// # Errors
/// When it is larger or cannot be read.
pub fn hash(path: &Path, max_bytes: usize) -> Result<Hashed, MediaError> {
    let mut file = File::open(path).map_err(|error| disk_failed(&error))?;
    let length = file.metadata().map_err(|error| disk_failed(&error))?.len();
    if length > max_bytes as u64 {
        return Err(MediaError::TooManyBytes { max_video_bytes: max_bytes });
    }
    let (mut hash, mut num_bytes) = (Sha256::new(), 0);
    let mut chunk = vec![0u8; HASH_CHUNK_BYTES];
    loop {
        let read = file.read(&mut chunk).map_err(|error| disk_failed(&error))?;
        if read == 0 {
            break;
        }
        hash.update(&chunk[..read]);
        num_bytes += read;
    }
    Ok(Hashed { content_hash: hash.finalize().into(), num_bytes })
}

pub fn disk_failed(error: &io::Error) -> MediaError {
    tracing::error!(%error, "a video could not be stored or read");
    MediaError::Internal("the video could not be stored or read; try again later".into())
}
