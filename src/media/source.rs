//! Turns a [`VideoSource`] into a local file that ffmpeg can open, under the server's policy.
//!
//! Called by `mod.rs`. Must never open a path that a client named outside `allowed_media_dir`, and never decode
//! base64 whose size was not checked first.

use std::{
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use base64::{
    Engine, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use sha2::{Digest, Sha256};
use tempfile::{NamedTempFile, TempPath};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use url::Url;

use super::{FileStore, FileStoreError, MediaError, VideoSource, fetch::Fetcher};
use crate::config::MediaConfig;

/// Clients disagree about `=` at the end.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);
const HASH_CHUNK_BYTES: usize = 1 << 20;

/// A video on disk; a temporary one is removed when dropped.
#[derive(Debug)]
pub struct LocalVideo {
    path: PathBuf,
    /// SHA-256 of the file's bytes.
    pub content_hash: [u8; 32],
    _temporary: Option<TempPath>,
    /// Of a download: its share of the disk, given back after the file is removed.
    _fetch_place: Option<OwnedSemaphorePermit>,
}

impl LocalVideo {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Gets videos to disk.
#[derive(Debug, Clone)]
pub struct SourceReader {
    fetcher: Fetcher,
    files: Arc<FileStore>,
    /// One for each download that is running or waits on disk to be decoded.
    fetch_places: Arc<Semaphore>,
    max_video_bytes: usize,
    allowed_media_dir: Option<PathBuf>,
}

impl SourceReader {
    pub fn new(config: &MediaConfig, files: Arc<FileStore>) -> Result<Self, MediaError> {
        Ok(SourceReader {
            fetcher: Fetcher::new(config)?,
            files,
            fetch_places: Arc::new(Semaphore::new(config.max_concurrent_fetches.max(1))),
            max_video_bytes: config.max_video_bytes,
            allowed_media_dir: config.allowed_media_dir.clone(),
        })
    }

    /// The source as a file, with the hash of its content.
    pub async fn read(&self, source: VideoSource) -> Result<LocalVideo, MediaError> {
        let this = self.clone();
        match source {
            VideoSource::Url(url)
                if url.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:")) =>
            {
                blocking(move || this.store(&this.decode_data_url(&url)?)).await
            }
            VideoSource::Url(url) => self.read_url(&url).await,
            VideoSource::Bytes(bytes) => blocking(move || this.store(&bytes)).await,
            VideoSource::TempFile(file) => blocking(move || this.temporary(file)).await,
            VideoSource::FileId(id) => blocking(move || this.stored_file(&id)).await,
            VideoSource::LocalFile(path) => blocking(move || this.operators_file(&path)).await,
        }
    }

    async fn read_url(&self, url: &str) -> Result<LocalVideo, MediaError> {
        let url = Url::parse(url)
            .map_err(|_| refused("this is not a URL; give an http(s), file or data URL".into()))?;
        let this = self.clone();
        match url.scheme() {
            "http" | "https" => {
                let place = self.fetch_places.clone().acquire_owned().await;
                let place = place.expect("the semaphore is never closed: this is a bug");
                let file = blocking(|| NamedTempFile::new().map_err(|error| disk_failed(&error))).await?;
                self.fetcher.fetch(url, file.path()).await?;
                let video = blocking(move || this.temporary(file)).await?;
                Ok(LocalVideo { _fetch_place: Some(place), ..video })
            }
            "file" => blocking(move || this.clients_file(&url)).await,
            scheme => Err(refused(format!(
                "URLs beginning with `{scheme}:` are not read; give an http(s), file or data URL"
            ))),
        }
    }

    /// The bytes of `data:<type>;base64,<text>`.
    fn decode_data_url(&self, url: &str) -> Result<Vec<u8>, MediaError> {
        let Some((header, text)) = url.split_once(',') else {
            return Err(refused("this data URL has no comma; write data:video/mp4;base64,<data>".into()));
        };
        let header = header.to_ascii_lowercase();
        // Frames that the client sampled itself, comma-separated pictures, would be taken here.
        if header.starts_with("data:video/jpeg") || header.starts_with("data:image/jpeg") {
            return Err(refused("pictures in place of a video are not supported; send a video file".into()));
        }
        if !header.ends_with(";base64") {
            return Err(refused("data URLs must be base64; write data:video/mp4;base64,<data>".into()));
        }
        let text = text.trim_ascii();
        if text.len() / 4 * 3 > self.max_video_bytes.saturating_add(2) {
            return Err(self.too_large());
        }
        BASE64.decode(text).map_err(|error| refused(format!("the data URL is not valid base64 ({error})")))
    }

    /// A file named by a client: only inside the allowed directory, whatever links and dots say.
    fn clients_file(&self, url: &Url) -> Result<LocalVideo, MediaError> {
        let Some(allowed) = &self.allowed_media_dir else {
            return Err(refused("file URLs are not read by this server; upload the video".into()));
        };
        // One answer for what is missing and what is forbidden: a client must not learn which files exist.
        let outside = || refused("the file URL names no video inside the allowed media directory".into());
        let path = url.to_file_path().map_err(|()| outside())?;
        let (path, allowed) = match (path.canonicalize(), allowed.canonicalize()) {
            (Ok(path), Ok(allowed)) => (path, allowed),
            _ => return Err(outside()),
        };
        if !path.starts_with(&allowed) || !path.is_file() {
            return Err(outside());
        }
        self.hashed(path, None).map_err(|error| match error {
            MediaError::Internal(_) => outside(),
            other => other,
        })
    }

    /// A file named on the command line.
    fn operators_file(&self, path: &Path) -> Result<LocalVideo, MediaError> {
        let refused = |why: String| MediaError::Refused { param: "video", message: why };
        let canonical = path
            .canonicalize()
            .map_err(|error| refused(format!("{} cannot be read: {error}", path.display())))?;
        if !canonical.is_file() {
            return Err(refused(format!("{} is not a file; name a video file", path.display())));
        }
        self.hashed(canonical, None)
    }

    /// A file of the store: neither copied nor hashed again.
    fn stored_file(&self, id: &str) -> Result<LocalVideo, MediaError> {
        let (record, link) = self.files.borrow(id).map_err(|error| match error {
            FileStoreError::NotFound { .. } => {
                MediaError::Refused { param: "file_id", message: error.to_string() }
            }
            other => {
                tracing::error!(error = %other, "a stored file could not be read");
                MediaError::Internal("the file could not be read; try again later".into())
            }
        })?;
        Ok(LocalVideo {
            path: link.to_path_buf(),
            content_hash: record.content_hash,
            _temporary: Some(link),
            _fetch_place: None,
        })
    }

    fn store(&self, bytes: &[u8]) -> Result<LocalVideo, MediaError> {
        if bytes.len() > self.max_video_bytes {
            return Err(self.too_large());
        }
        let mut file = NamedTempFile::new().map_err(|error| disk_failed(&error))?;
        file.write_all(bytes).map_err(|error| disk_failed(&error))?;
        self.temporary(file)
    }

    fn temporary(&self, file: NamedTempFile) -> Result<LocalVideo, MediaError> {
        // Absolute, so that no working directory can change what it names.
        let path = file.path().canonicalize().map_err(|error| disk_failed(&error))?;
        self.hashed(path, Some(file))
    }

    fn hashed(&self, path: PathBuf, temporary: Option<NamedTempFile>) -> Result<LocalVideo, MediaError> {
        let mut file = File::open(&path).map_err(|error| disk_failed(&error))?;
        let length = file.metadata().map_err(|error| disk_failed(&error))?.len();
        if length > self.max_video_bytes as u64 {
            return Err(self.too_large());
        }
        let mut hash = Sha256::new();
        let mut chunk = vec![0u8; HASH_CHUNK_BYTES];
        loop {
            let read = file.read(&mut chunk).map_err(|error| disk_failed(&error))?;
            if read == 0 {
                break;
            }
            hash.update(&chunk[..read]);
        }
        Ok(LocalVideo {
            path,
            content_hash: hash.finalize().into(),
            _temporary: temporary.map(NamedTempFile::into_temp_path),
            _fetch_place: None,
        })
    }

    fn too_large(&self) -> MediaError {
        MediaError::TooManyBytes { max_video_bytes: self.max_video_bytes }
    }
}

/// Runs on the blocking pool.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, MediaError> + Send + 'static,
) -> Result<T, MediaError> {
    tokio::task::spawn_blocking(work).await.expect("reading sources does not panic: this is a bug")
}

fn refused(message: String) -> MediaError {
    MediaError::Refused { param: "video_url", message }
}

fn disk_failed(error: &std::io::Error) -> MediaError {
    tracing::error!(%error, "a video could not be stored or read");
    MediaError::Internal("the video could not be stored or read; try again later".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(max_video_bytes: usize) -> SourceReader {
        let config = MediaConfig { max_video_bytes, ..MediaConfig::default() };
        SourceReader::new(&config, FileStore::open(&config).unwrap()).unwrap()
    }

    async fn read(max_video_bytes: usize, url: &str) -> Result<Vec<u8>, MediaError> {
        let video = reader(max_video_bytes).read(VideoSource::Url(url.into())).await?;
        Ok(std::fs::read(video.path()).unwrap())
    }

    #[tokio::test]
    async fn data_urls_are_decoded_with_and_without_padding() {
        for url in
            ["data:video/mp4;base64,aGVsbG8=", "DATA:;base64,aGVsbG8", "data:video/mp4;x=1;base64, aGVsbG8= "]
        {
            assert_eq!(read(5, url).await.unwrap(), b"hello", "{url}");
        }
    }

    #[tokio::test]
    async fn large_data_urls_are_refused_before_decoding() {
        // Not base64 at all: only a check of the length can answer so.
        let url = format!("data:video/mp4;base64,{}", "!".repeat(4000));
        assert!(matches!(read(100, &url).await, Err(MediaError::TooManyBytes { max_video_bytes: 100 })));
        assert!(matches!(read(4, "data:;base64,aGVsbG8=").await, Err(MediaError::TooManyBytes { .. })));
    }

    #[tokio::test]
    async fn other_forms_are_refused() {
        for url in [
            "data:video/mp4,hello",
            "data:video/mp4;base64",
            "data:;base64,!!!!",
            "data:video/jpeg;base64,aa,bb",
            "ftp://example.org/a.mp4",
            "concat:a|b",
            "not a url",
            "file:///etc/passwd",
        ] {
            let result = read(1000, url).await;
            assert!(
                matches!(result, Err(MediaError::Refused { param: "video_url", .. })),
                "{url}: {result:?}"
            );
        }
    }

    #[tokio::test]
    async fn temporary_files_go_with_their_video() {
        let video = reader(100).read(VideoSource::Bytes("hello".into())).await.unwrap();
        let path = video.path().to_owned();
        assert!(path.exists());
        assert_eq!(video.content_hash, <[u8; 32]>::from(Sha256::digest(b"hello")));
        drop(video);
        assert!(!path.exists());
    }
}
