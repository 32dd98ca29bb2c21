//! The file store's directory: what lies where, written so that a crash never leaves half a file.
//!
//! Called by `file_store.rs` under its lock. Paths are made of hashes and of ids that were made here, never of what a
//! client sends.
//!
//! ```text
//! lock                 held by the server that uses the directory
//! blobs/<SHA-256>      the bytes, once for all files that have them
//! records/<id>.json    one a file
//! uploads/             what is on its way, and second names of files in use; emptied at start
//! ```

use std::{
    collections::HashSet,
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use tempfile::{Builder, NamedTempFile, TempDir, TempPath};

use super::{FileRecord, FileStoreError, is_id};

/// Longest record that is read.
const MAX_RECORD_BYTES: u64 = 64 << 10;
/// What the names in `uploads` begin with.
const UPLOAD_PREFIX: &str = "upload-";

/// See the module.
#[derive(Debug)]
pub struct Directory {
    blobs: PathBuf,
    records: PathBuf,
    uploads: PathBuf,
    /// Dropped after the paths are no longer used.
    _lock: File,
    _temporary: Option<TempDir>,
}

impl Directory {
    /// Takes `path` for this server, and reads what is there.
    ///
    /// # Errors
    /// When it cannot be made or read, or belongs to a running server.
    pub fn open(path: &Path) -> Result<(Self, Vec<FileRecord>), FileStoreError> {
        let failed =
            |cause| FileStoreError::Disk { what: format!("cannot keep files in {}", path.display()), cause };
        let directory = Self::create(path, None).map_err(failed)?;
        match directory._lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(FileStoreError::InUse(path.into())),
            Err(TryLockError::Error(cause)) => return Err(failed(cause)),
        }
        let records = directory.clean().map_err(failed)?;
        Ok((directory, records))
    }

    /// A new directory that goes with the server.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn temporary() -> Result<Self, FileStoreError> {
        let made = Builder::new().prefix("tinyllava-files-").tempdir().and_then(|temporary| {
            let path = temporary.path().canonicalize()?;
            Self::create(&path, Some(temporary))
        });
        made.map_err(FileStoreError::disk("cannot make a directory for uploads"))
    }

    fn create(path: &Path, temporary: Option<TempDir>) -> io::Result<Self> {
        let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
        make(path)?;
        // Absolute, so that no working directory can change what it names.
        let path = path.canonicalize()?;
        let [blobs, records, uploads] = ["blobs", "records", "uploads"].map(|name| path.join(name));
        [&blobs, &records, &uploads].into_iter().try_for_each(|path| make(path))?;
        let mut options = OpenOptions::new();
        let lock = options.create(true).append(true).mode(0o600).open(path.join("lock"))?;
        Ok(Directory { blobs, records, uploads, _lock: lock, _temporary: temporary })
    }

    /// Removes what a crash has left and what is damaged; gives the records that are whole.
    fn clean(&self) -> io::Result<Vec<FileRecord>> {
        for entry in fs::read_dir(&self.uploads)? {
            let path = entry?.path();
            if name_of(&path).is_some_and(|name| name.starts_with(UPLOAD_PREFIX)) {
                fs::remove_file(path)?;
            }
        }
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.records)? {
            let path = entry?.path();
            // Whatever else lies there is the operator's own.
            if !name_of(&path).and_then(|name| name.strip_suffix(".json")).is_some_and(is_id) {
                continue;
            }
            match self.read_record(&path) {
                Ok(record) => records.push(record),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    tracing::warn!(path = %path.display(), %error, "forgetting a damaged file");
                    fs::remove_file(&path)?;
                }
                // It may be whole: no reason to forget it, or its bytes below.
                Err(error) => return Err(error),
            }
        }
        let known: HashSet<String> = records.iter().map(|record| hex(&record.content_hash)).collect();
        for entry in fs::read_dir(&self.blobs)? {
            let path = entry?.path();
            let is_blob = |name: &str| name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
            if name_of(&path).is_some_and(|name| is_blob(name) && !known.contains(name)) {
                fs::remove_file(path)?;
            }
        }
        Ok(records)
    }

    fn read_record(&self, path: &Path) -> io::Result<FileRecord> {
        let damaged = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why);
        let mut json = Vec::new();
        File::open(path)?.take(MAX_RECORD_BYTES).read_to_end(&mut json)?;
        let record: FileRecord =
            serde_json::from_slice(&json).map_err(|error| damaged(&error.to_string()))?;
        if !is_id(&record.id) || path != self.record(&record.id) {
            return Err(damaged("its name is not its id"));
        }
        match fs::metadata(self.blob(&record.content_hash)) {
            Ok(blob) if blob.len() == record.num_bytes => Ok(record),
            Ok(_) => Err(damaged("its bytes are not all there")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(damaged("its bytes are gone")),
            Err(error) => Err(error),
        }
    }

    /// A file to write an upload to, removed when dropped.
    pub fn new_file(&self) -> io::Result<NamedTempFile> {
        Builder::new().prefix(UPLOAD_PREFIX).tempfile_in(&self.uploads)
    }

    /// Keeps a file whose content is on the disk already.
    pub fn put_blob(&self, file: NamedTempFile, hash: &[u8; 32]) -> io::Result<()> {
        let blob = self.blob(hash);
        if !blob.exists() {
            file.persist(blob).map_err(|error| error.error)?;
            sync_directory(&self.blobs)?;
        }
        Ok(())
    }

    /// Writes a record.
    pub fn put_record(&self, record: &FileRecord) -> io::Result<()> {
        let mut file = self.new_file()?;
        file.write_all(&serde_json::to_vec(record)?)?;
        file.as_file().sync_all()?;
        file.persist(self.record(&record.id)).map_err(|error| error.error)?;
        sync_directory(&self.records)
    }

    pub fn open_blob(&self, hash: &[u8; 32]) -> io::Result<File> {
        File::open(self.blob(hash))
    }

    /// A second name for the same bytes, removed when dropped.
    pub fn link_blob(&self, hash: &[u8; 32]) -> io::Result<TempPath> {
        let blob = self.blob(hash);
        let link = |name: &Path| fs::hard_link(&blob, name);
        Ok(Builder::new().prefix(UPLOAD_PREFIX).make_in(&self.uploads, link)?.into_temp_path())
    }

    /// Removes bytes; those that are gone already are fine.
    pub fn remove_blob(&self, hash: &[u8; 32]) -> io::Result<()> {
        remove(&self.blob(hash))
    }

    /// Removes a record; one that is gone already is fine.
    pub fn remove_record(&self, id: &str) -> io::Result<()> {
        remove(&self.record(id))
    }

    fn blob(&self, hash: &[u8; 32]) -> PathBuf {
        self.blobs.join(hex(hash))
    }

    fn record(&self, id: &str) -> PathBuf {
        self.records.join(format!("{id}.json"))
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn name_of(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

/// A new name in a directory is on the disk only when the directory is.
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn hex(hash: &[u8; 32]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}
