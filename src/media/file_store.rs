//! The files that clients upload: which there are, how long they stay, and that they never take too much of the disk.
//!
//! Called by `http/files.rs` and, for the videos of requests, by `source.rs`. Every method waits for the disk: call
//! it on the blocking pool. A file that a request has begun to read stays readable when it is deleted meanwhile.

mod directory;

use std::{
    collections::HashMap,
    fs::File,
    io::Write,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::{NamedTempFile, TempPath};

use self::directory::Directory;
use crate::config::MediaConfig;

const ID_PREFIX: &str = "file-";
/// Longest id after its prefix.
const MAX_ID_CHARS: usize = 64;

/// What is known of a file. Also the form in which it is remembered on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    pub id: String,
    /// The client's own; never used as a path.
    pub filename: String,
    pub purpose: String,
    pub num_bytes: u64,
    /// Unix times, milliseconds.
    pub created_ms: u64,
    pub expires_ms: u64,
    /// SHA-256 of the bytes, which are stored once however many files have them.
    pub content_hash: [u8; 32],
}

/// What the client says of a file it has uploaded.
#[derive(Debug)]
pub struct FileLabel {
    pub filename: String,
    pub purpose: String,
    /// `None`: as long as the store keeps files.
    pub lifetime: Option<Duration>,
}

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum FileStoreError {
    #[error("there is no file \"{id}\"; it was never uploaded here, was deleted, or has expired")]
    NotFound { id: String },
    #[error("the file is larger than the limit of {max_file_bytes} bytes; send a shorter or smaller video")]
    TooLarge { max_file_bytes: u64 },
    #[error(
        "the files on this server may take {max_bytes} bytes together; delete some that you no longer need"
    )]
    Full { max_bytes: u64 },
    #[error("this server keeps at most {max_files} files; delete some that you no longer need")]
    TooMany { max_files: usize },
    #[error("files are kept at most {max_seconds} s here; ask for an earlier expiry")]
    LifetimeTooLong { max_seconds: u64 },
    #[error("another server keeps its files in {}; choose another --files-dir", .0.display())]
    InUse(PathBuf),
    #[error("{what}: {cause}")]
    Disk { what: String, cause: std::io::Error },
}

impl FileStoreError {
    pub fn disk(what: &str) -> impl FnOnce(std::io::Error) -> Self {
        move |cause| FileStoreError::Disk { what: what.into(), cause }
    }
}

/// See the module.
#[derive(Debug)]
pub struct FileStore {
    max_file_bytes: u64,
    max_bytes: u64,
    max_files: usize,
    max_age: Duration,
    shelf: Mutex<Shelf>,
}

/// What is on the disk. Whoever changes that holds the lock while doing so.
#[derive(Debug, Default)]
struct Shelf {
    /// `None` until the first upload when no directory was named.
    directory: Option<Arc<Directory>>,
    files: HashMap<String, FileRecord>,
    /// Uploads on their way.
    num_uploads: usize,
    upload_bytes: u64,
}

impl FileStore {
    /// The store of `config.files`, with the files an earlier server left there. Damaged ones are forgotten.
    ///
    /// # Errors
    /// When the directory cannot be used, or another server uses it.
    pub fn open(config: &MediaConfig) -> Result<Arc<Self>, FileStoreError> {
        let mut shelf = Shelf::default();
        if let Some(path) = &config.files.dir {
            let (directory, records) = Directory::open(path)?;
            shelf.directory = Some(Arc::new(directory));
            shelf.files = records.into_iter().map(|record| (record.id.clone(), record)).collect();
        }
        Ok(Arc::new(FileStore {
            max_file_bytes: config.max_video_bytes as u64,
            max_bytes: config.files.max_bytes,
            max_files: config.files.max_files,
            max_age: config.files.max_age,
            shelf: Mutex::new(shelf),
        }))
    }

    /// Begins an upload.
    ///
    /// # Errors
    /// When there are too many files already.
    pub fn begin(self: &Arc<Self>) -> Result<Upload, FileStoreError> {
        let mut shelf = self.shelf();
        if shelf.files.len() + shelf.num_uploads >= self.max_files {
            return Err(FileStoreError::TooMany { max_files: self.max_files });
        }
        let directory = match &shelf.directory {
            Some(directory) => directory.clone(),
            None => shelf.directory.insert(Arc::new(Directory::temporary()?)).clone(),
        };
        let file = directory.new_file().map_err(FileStoreError::disk("cannot make a file"))?;
        shelf.num_uploads += 1;
        drop(shelf);
        Ok(Upload {
            file,
            hash: Sha256::new(),
            directory,
            share: Share { store: self.clone(), num_bytes: 0 },
        })
    }

    /// All files, oldest first.
    pub fn list(&self) -> Vec<FileRecord> {
        let mut records: Vec<FileRecord> = self.shelf().files.values().cloned().collect();
        records.sort_by(|a, b| (a.created_ms, &a.id).cmp(&(b.created_ms, &b.id)));
        records
    }

    /// One file.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn get(&self, id: &str) -> Result<FileRecord, FileStoreError> {
        self.shelf().find(id).cloned()
    }

    /// One file, open for reading.
    ///
    /// # Errors
    /// When there is no such file, or it cannot be opened.
    pub fn read(&self, id: &str) -> Result<(FileRecord, File), FileStoreError> {
        let shelf = self.shelf();
        let record = shelf.find(id)?;
        let file = shelf.directory()?.open_blob(&record.content_hash);
        Ok((record.clone(), file.map_err(FileStoreError::disk("cannot open a stored file"))?))
    }

    /// One file under a name of its own, which goes when it is dropped: for programs that open it by its path.
    ///
    /// # Errors
    /// When there is no such file, or it cannot be given a second name.
    pub fn borrow(&self, id: &str) -> Result<(FileRecord, TempPath), FileStoreError> {
        let shelf = self.shelf();
        let record = shelf.find(id)?;
        let link = shelf.directory()?.link_blob(&record.content_hash);
        Ok((record.clone(), link.map_err(FileStoreError::disk("cannot link a stored file"))?))
    }

    /// Forgets a file, and its bytes if no other file has the same.
    ///
    /// # Errors
    /// When there is no such file, or the disk refuses.
    pub fn delete(&self, id: &str) -> Result<(), FileStoreError> {
        self.shelf().remove(id)
    }

    /// Forgets what is too old. Every other method does so as well; this one is for times in which nobody asks.
    pub fn remove_expired(&self) {
        drop(self.shelf());
    }

    /// The shelf, without what is too old.
    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        shelf.remove_expired(now_ms());
        shelf
    }
}

impl Shelf {
    fn find(&self, id: &str) -> Result<&FileRecord, FileStoreError> {
        self.files.get(id).ok_or_else(|| {
            // What a client sends is repeated only as far as it may be an id.
            let id = id.chars().take(ID_PREFIX.len() + MAX_ID_CHARS).collect();
            FileStoreError::NotFound { id }
        })
    }

    /// Where the files are, if there are any.
    fn directory(&self) -> Result<&Directory, FileStoreError> {
        let missing = || std::io::Error::other("files without a directory: this is a bug");
        self.directory.as_deref().ok_or_else(missing).map_err(FileStoreError::disk("no directory"))
    }

    fn remove(&mut self, id: &str) -> Result<(), FileStoreError> {
        let hash = self.find(id)?.content_hash;
        let directory = self.directory()?;
        directory.remove_record(id).map_err(FileStoreError::disk("cannot delete a file"))?;
        self.files.remove(id);
        self.remove_unused(&hash);
        Ok(())
    }

    /// Removes what was written of a file that is not to be.
    fn undo(&self, record: &FileRecord) {
        if let Some(Err(error)) = self.directory.as_ref().map(|directory| directory.remove_record(&record.id))
        {
            tracing::warn!(%error, id = record.id, "the record of a failed upload could not be removed");
        }
        self.remove_unused(&record.content_hash);
    }

    /// Removes bytes that no file has.
    fn remove_unused(&self, hash: &[u8; 32]) {
        let is_used = self.files.values().any(|record| record.content_hash == *hash);
        let removed =
            self.directory.as_ref().filter(|_| !is_used).map(|directory| directory.remove_blob(hash));
        if let Some(Err(error)) = removed {
            // The next server that opens the directory removes them.
            tracing::warn!(%error, "the bytes of a deleted file could not be removed");
        }
    }

    fn remove_expired(&mut self, now_ms: u64) {
        let expired = self.files.values().filter(|record| record.expires_ms <= now_ms);
        let expired: Vec<String> = expired.map(|record| record.id.clone()).collect();
        for id in expired {
            if let Err(error) = self.remove(&id) {
                tracing::warn!(%error, id, "an expired file could not be removed");
            }
        }
    }

    /// Bytes on the disk: what several files share counts once.
    fn num_bytes(&self) -> u64 {
        let blobs: HashMap<_, _> = self.files.values().map(|r| (r.content_hash, r.num_bytes)).collect();
        blobs.values().sum::<u64>() + self.upload_bytes
    }
}

/// A file on its way to the store; removed when dropped before [`Upload::finish`].
#[derive(Debug)]
pub struct Upload {
    file: NamedTempFile,
    hash: Sha256,
    directory: Arc<Directory>,
    share: Share,
}

/// The part of the store's limits that an upload holds.
#[derive(Debug)]
struct Share {
    store: Arc<FileStore>,
    num_bytes: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut shelf = self.store.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        shelf.num_uploads -= 1;
        shelf.upload_bytes -= self.num_bytes;
    }
}

impl Upload {
    /// Appends `bytes`; expected in pieces of about a megabyte.
    ///
    /// # Errors
    /// When the file becomes too large, the store is full, or the disk refuses.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FileStoreError> {
        let store = &self.share.store;
        let more = bytes.len() as u64;
        if self.share.num_bytes + more > store.max_file_bytes {
            return Err(FileStoreError::TooLarge { max_file_bytes: store.max_file_bytes });
        }
        let mut shelf = store.shelf();
        if shelf.num_bytes() + more > store.max_bytes {
            return Err(FileStoreError::Full { max_bytes: store.max_bytes });
        }
        shelf.upload_bytes += more;
        drop(shelf);
        self.share.num_bytes += more;
        self.hash.update(bytes);
        self.file.write_all(bytes).map_err(FileStoreError::disk("cannot store an upload"))
    }

    /// How much has come.
    pub fn num_bytes(&self) -> u64 {
        self.share.num_bytes
    }

    /// Makes a file of it, which is on the disk for good when this returns.
    ///
    /// # Errors
    /// When it is to be kept for too long, or the disk refuses.
    pub fn finish(self, label: FileLabel) -> Result<FileRecord, FileStoreError> {
        let Upload { file, hash, directory, share } = self;
        let store = share.store.clone();
        let lifetime = label.lifetime.unwrap_or(store.max_age);
        if lifetime > store.max_age {
            return Err(FileStoreError::LifetimeTooLong { max_seconds: store.max_age.as_secs() });
        }
        // The slow part, before the lock is taken.
        file.as_file().sync_all().map_err(FileStoreError::disk("cannot store an upload"))?;
        let created_ms = now_ms();
        let record = FileRecord {
            id: format!("{ID_PREFIX}{}", uuid::Uuid::new_v4().simple()),
            filename: label.filename,
            purpose: label.purpose,
            num_bytes: share.num_bytes,
            created_ms,
            expires_ms: created_ms.saturating_add(u64::try_from(lifetime.as_millis()).unwrap_or(u64::MAX)),
            content_hash: hash.finalize().into(),
        };
        let mut shelf = store.shelf();
        // The bytes first: a record always has them, whenever the machine stops.
        let kept =
            directory.put_blob(file, &record.content_hash).and_then(|()| directory.put_record(&record));
        kept.inspect_err(|_| shelf.undo(&record)).map_err(FileStoreError::disk("cannot store an upload"))?;
        shelf.files.insert(record.id.clone(), record.clone());
        drop(shelf);
        Ok(record)
    }
}

/// Whether `id` has the form of this store's ids.
fn is_id(id: &str) -> bool {
    id.strip_prefix(ID_PREFIX).is_some_and(|rest| {
        (1..=MAX_ID_CHARS).contains(&rest.len())
            && rest.bytes().all(|byte| byte.is_ascii_digit() || byte.is_ascii_lowercase())
    })
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
