//! Limits of what the media stage keeps on disk for later requests.
//!
//! Part of `config.rs`.

use std::{path::PathBuf, time::Duration};

/// Limits of the files that clients upload to keep.
#[derive(Debug, Clone)]
pub struct FilesConfig {
    /// Directory of the files; `None`: a temporary directory that goes with the server.
    pub dir: Option<PathBuf>,
    /// Bytes of all of them (of one: `max_video_bytes`).
    pub max_bytes: u64,
    /// Most files.
    pub max_files: usize,
    /// Age at which a file is removed.
    pub max_age: Duration,
}

/// Limits of the media that clients send with a `uuid`. It is kept among the temporary files.
#[derive(Debug, Clone)]
pub struct NamedMediaConfig {
    /// Disk space for all of it; 0 keeps none.
    pub max_bytes: u64,
    /// Most names.
    pub max_entries: usize,
    /// Time that media is kept after its last use.
    pub max_idle: Duration,
}

impl Default for FilesConfig {
    fn default() -> Self {
        FilesConfig {
            dir: None,
            max_bytes: 4 << 30,
            max_files: 1000,
            max_age: Duration::from_secs(24 * 3600),
        }
    }
}

impl Default for NamedMediaConfig {
    fn default() -> Self {
        NamedMediaConfig { max_bytes: 1 << 30, max_entries: 10_000, max_idle: Duration::from_secs(24 * 3600) }
    }
}
