//! Turns a [`VideoSource`] into local files that can be decoded, under the server's policy.
//!
//! Called by `mod.rs`. Must never open a path that a client named outside `allowed_media_dir`, and never decode
//! base64 whose size was not checked first. A URL that several requests want at the same time is downloaded once.

mod names;

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use futures_util::FutureExt;
use reqwest::header::HeaderMap;
use tempfile::{NamedTempFile, TempPath};
use tokio::sync::Semaphore;
use url::Url;

use super::{
    Caller, FileStore, FileStoreError, Hold, MediaError, Salt, VideoSource,
    data_url::{Base64, DecodeError, data_of, is_data_url, is_picture_list},
    fetch::Fetcher,
    flights::Flights,
    local_file::{Hashed, LocalFile, disk_failed, hash},
    named_media::{Media, NamedMedia},
};
use crate::config::MediaConfig;

/// The files of a source.
#[derive(Debug)]
pub struct Fetched {
    /// One, or the pictures of a list in order.
    pub files: Vec<LocalFile>,
    /// True if the client sampled the frames itself.
    pub is_list: bool,
    /// Media to keep once it was decoded, each with its `uuid`.
    to_keep: Vec<(String, Media)>,
}

/// Gets videos to disk.
#[derive(Debug, Clone)]
pub struct SourceReader {
    fetcher: Fetcher,
    files: Arc<FileStore>,
    named: Arc<NamedMedia>,
    /// Downloads that run, by salt and URLs.
    flights: Flights<(Salt, Vec<Url>), Vec<LocalFile>>,
    /// One for each download that is running or waits on disk to be decoded.
    fetch_places: Arc<Semaphore>,
    max_video_bytes: usize,
    max_frames: usize,
    allowed_media_dir: Option<PathBuf>,
}

/// Where one file comes from.
enum Origin {
    /// A `data:` URL.
    Data(String),
    File(Url),
    Remote(Url),
}

impl SourceReader {
    pub fn new(config: &MediaConfig, files: Arc<FileStore>) -> Result<Self, MediaError> {
        Ok(SourceReader {
            fetcher: Fetcher::new(config)?,
            files,
            named: Arc::new(NamedMedia::new(&config.named_media)),
            flights: Flights::default(),
            fetch_places: Arc::new(Semaphore::new(config.max_concurrent_fetches.max(1))),
            max_video_bytes: config.max_video_bytes,
            max_frames: config.max_frames,
            allowed_media_dir: config.allowed_media_dir.clone(),
        })
    }

    /// Returns the files of `source`, hashed. Pictures of a list share the limits of one video.
    pub async fn read(&self, source: VideoSource, caller: &Caller) -> Result<Fetched, MediaError> {
        let (uuid, source) = match source {
            VideoSource::Named { uuid, source: None } => return self.recall(uuid, caller).await,
            VideoSource::Pictures(pictures) => return self.read_pictures(pictures, caller).await,
            VideoSource::Named { uuid, source: Some(source) } => (Some(uuid), *source),
            source => (None, source),
        };
        let is_list = source.is_frame_list();
        let file_id = if let VideoSource::FileId(id) = &source { Some(id.clone()) } else { None };
        let files = self.read_plain(source, caller).await?;
        let to_keep = uuid.map(|uuid| {
            let files = files.iter().map(LocalFile::without_fetch_place).collect();
            (uuid, file_id.map_or(Media::Files { files, is_list }, Media::FileId))
        });
        Ok(Fetched { files, is_list, to_keep: to_keep.into_iter().collect() })
    }

    /// Returns the files of a source that has no name.
    async fn read_plain(&self, source: VideoSource, caller: &Caller) -> Result<Vec<LocalFile>, MediaError> {
        let (this, hold) = (self.clone(), caller.hold.clone());
        match source {
            VideoSource::Url(list) | VideoSource::Image(list) if is_picture_list(&list) => {
                holding(hold, move || this.joined(&list)).await
            }
            VideoSource::Url(url) | VideoSource::Image(url) => self.read_urls(vec![url], caller).await,
            VideoSource::Frames(urls) => {
                self.check_num_pictures(urls.len())?;
                self.read_urls(urls, caller).await
            }
            VideoSource::Base64(text) => {
                one(hold, move || this.decoded(Base64 { text: &text, is_escaped: false })).await
            }
            VideoSource::Bytes(bytes) => one(hold, move || this.store(&bytes)).await,
            VideoSource::TempFile(file) => one(hold, move || this.temporary(file.into_temp_path())).await,
            VideoSource::LocalFile(path) => one(hold, move || this.operators_file(&path)).await,
            VideoSource::FileId(id) => {
                one(hold, move || this.stored_file(&id).map_err(unreadable)?.ok_or_else(|| this.too_large()))
                    .await
            }
            VideoSource::Named { .. } | VideoSource::Pictures(_) | VideoSource::Timed(..) => {
                Err(MediaError::Internal("names and times stand around a plain source: this is a bug".into()))
            }
        }
    }

    async fn read_urls(&self, urls: Vec<String>, caller: &Caller) -> Result<Vec<LocalFile>, MediaError> {
        let origins: Vec<Origin> = urls.into_iter().map(origin).collect::<Result<_, _>>()?;
        let remote = origins.iter().filter_map(|origin| match origin {
            Origin::Remote(url) => Some(url.clone()),
            Origin::Data(_) | Origin::File(_) => None,
        });
        let fetched = self.fetch(remote.collect(), caller).await?;
        if fetched.len() == origins.len() {
            return Ok(fetched);
        }
        let this = self.clone();
        holding(caller.hold.clone(), move || {
            let mut fetched = fetched.into_iter();
            this.within_limit(origins.into_iter().map(|origin| match origin {
                Origin::Data(url) => this.decoded(Base64 { text: data_of(&url)?, is_escaped: true }),
                Origin::File(url) => this.clients_file(&url),
                Origin::Remote(_) => Ok(fetched.next().expect("every URL was fetched: this is a bug")),
            }))
        })
        .await
    }

    /// Downloads `urls`, together with whoever wants the same ones just now.
    async fn fetch(&self, urls: Vec<Url>, caller: &Caller) -> Result<Vec<LocalFile>, MediaError> {
        if urls.is_empty() {
            return Ok(Vec::new());
        }
        let (this, own_urls, headers) = (self.clone(), urls.clone(), caller.headers.clone());
        let download = || async move { this.download(own_urls, headers).await }.boxed();
        self.flights.join((caller.salt.clone(), urls), download).await
    }

    async fn download(&self, urls: Vec<Url>, headers: HeaderMap) -> Result<Vec<LocalFile>, MediaError> {
        let place = self.fetch_places.clone().acquire_owned().await;
        let place = Arc::new(place.expect("the semaphore is never closed: this is a bug"));
        let num_files = urls.len();
        let targets: Vec<TempPath> = blocking(move || {
            let make = || NamedTempFile::new().map(NamedTempFile::into_temp_path);
            (0..num_files).map(|_| make().map_err(|error| disk_failed(&error))).collect()
        })
        .await?;
        let downloads = urls.into_iter().zip(targets.iter().map(|target| target.to_path_buf()));
        self.fetcher.fetch(downloads.collect(), &headers).await?;
        let this = self.clone();
        blocking(move || {
            let placed = |file: LocalFile| file.with_fetch_place(place.clone());
            targets.into_iter().map(|target| this.temporary(target).map(placed)).collect()
        })
        .await
    }

    /// The pictures of `data:video/jpeg;base64,<picture>,<picture>,…`.
    fn joined(&self, url: &str) -> Result<Vec<LocalFile>, MediaError> {
        let pictures = data_of(url)?;
        self.check_num_pictures(pictures.split(',').count())?;
        let pictures = pictures.split(',').map(|text| self.decoded(Base64 { text, is_escaped: true }));
        self.within_limit(pictures)
    }

    fn check_num_pictures(&self, num_pictures: usize) -> Result<(), MediaError> {
        if (1..=self.max_frames).contains(&num_pictures) {
            return Ok(());
        }
        Err(refused(format!(
            "the list has {num_pictures} frames, but must have 1 to {}; send fewer",
            self.max_frames
        )))
    }

    /// Stops as soon as they are too large together.
    fn within_limit(
        &self,
        files: impl Iterator<Item = Result<LocalFile, MediaError>>,
    ) -> Result<Vec<LocalFile>, MediaError> {
        let mut num_bytes = 0;
        files
            .map(|file| {
                let file = file?;
                num_bytes += file.num_bytes;
                if num_bytes > self.max_video_bytes { Err(self.too_large()) } else { Ok(file) }
            })
            .collect()
    }

    /// A temporary file of what `text` holds.
    fn decoded(&self, text: Base64<'_>) -> Result<LocalFile, MediaError> {
        let mut file = NamedTempFile::new().map_err(|error| disk_failed(&error))?;
        text.decode_to(&mut file, self.max_video_bytes).map_err(|error| match error {
            DecodeError::TooLarge => self.too_large(),
            DecodeError::NotBase64(message) => refused(message),
            DecodeError::Disk(error) => disk_failed(&error),
        })?;
        self.temporary(file.into_temp_path())
    }

    /// A file named by a client: only inside the allowed directory, whatever links and dots say.
    fn clients_file(&self, url: &Url) -> Result<LocalFile, MediaError> {
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
    fn operators_file(&self, path: &Path) -> Result<LocalFile, MediaError> {
        let refused = |why: String| MediaError::Refused { param: "video", message: why };
        let canonical = path
            .canonicalize()
            .map_err(|error| refused(format!("{} cannot be read: {error}", path.display())))?;
        if !canonical.is_file() {
            return Err(refused(format!("{} is not a file; name a video file", path.display())));
        }
        self.hashed(canonical, None)
    }

    /// Returns a file of the store, neither copied nor hashed again. `None` if the limit of a video
    /// is lower now.
    fn stored_file(&self, id: &str) -> Result<Option<LocalFile>, FileStoreError> {
        let (record, link) = self.files.borrow(id)?;
        let num_bytes = usize::try_from(record.num_bytes).unwrap_or(usize::MAX);
        if num_bytes > self.max_video_bytes {
            return Ok(None);
        }
        let hashed = Hashed { content_hash: record.content_hash, num_bytes };
        Ok(Some(LocalFile::new(link.to_path_buf(), hashed, Some(link))))
    }

    fn store(&self, bytes: &[u8]) -> Result<LocalFile, MediaError> {
        if bytes.len() > self.max_video_bytes {
            return Err(self.too_large());
        }
        let mut file = NamedTempFile::new().map_err(|error| disk_failed(&error))?;
        file.write_all(bytes).map_err(|error| disk_failed(&error))?;
        self.temporary(file.into_temp_path())
    }

    fn temporary(&self, file: TempPath) -> Result<LocalFile, MediaError> {
        // Absolute, so that no working directory can change what it names.
        let path = file.canonicalize().map_err(|error| disk_failed(&error))?;
        self.hashed(path, Some(file))
    }

    fn hashed(&self, path: PathBuf, temporary: Option<TempPath>) -> Result<LocalFile, MediaError> {
        let hashed = hash(&path, self.max_video_bytes)?;
        Ok(LocalFile::new(path, hashed, temporary))
    }

    fn too_large(&self) -> MediaError {
        MediaError::TooManyBytes { max_video_bytes: self.max_video_bytes }
    }
}

fn origin(url: String) -> Result<Origin, MediaError> {
    if is_data_url(&url) {
        return Ok(Origin::Data(url));
    }
    let url = Url::parse(&url)
        .map_err(|_| refused("this is not a URL; give an http(s), file or data URL".into()))?;
    match url.scheme() {
        "http" | "https" => Ok(Origin::Remote(url)),
        "file" => Ok(Origin::File(url)),
        scheme => Err(refused(format!(
            "URLs beginning with `{scheme}:` are not read; give an http(s), file or data URL"
        ))),
    }
}

/// Gets one file on the blocking pool.
async fn one(
    hold: Hold,
    work: impl FnOnce() -> Result<LocalFile, MediaError> + Send + 'static,
) -> Result<Vec<LocalFile>, MediaError> {
    holding(hold, move || Ok(vec![work()?])).await
}

/// Runs on the blocking pool. What `work` has is gone before `hold` is, even if nobody waits any more.
async fn holding<T: Send + 'static>(
    hold: Hold,
    work: impl FnOnce() -> Result<T, MediaError> + Send + 'static,
) -> Result<T, MediaError> {
    blocking(move || {
        let done = work();
        drop(hold);
        done
    })
    .await
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

fn unreadable(error: FileStoreError) -> MediaError {
    if matches!(error, FileStoreError::NotFound { .. }) {
        return MediaError::Refused { param: "file_id", message: error.to_string() };
    }
    tracing::error!(%error, "a stored file could not be read");
    MediaError::Internal("the file could not be read; try again later".into())
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::*;

    fn reader(max_video_bytes: usize) -> SourceReader {
        let config = MediaConfig { max_video_bytes, ..MediaConfig::default() };
        SourceReader::new(&config, FileStore::open(&config).unwrap()).unwrap()
    }

    async fn read(max_video_bytes: usize, url: &str) -> Result<Vec<u8>, MediaError> {
        let fetched = reader(max_video_bytes).read(VideoSource::Url(url.into()), &Caller::default()).await?;
        Ok(fetched.files.iter().flat_map(|file| std::fs::read(file.path()).unwrap()).collect())
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
    async fn what_is_held_lasts_as_long_as_the_source_whoever_waits() {
        let held: Arc<dyn Send + Sync> = Arc::new(());
        let (started, has_started) = std::sync::mpsc::channel();
        let (go_on, may_go_on) = std::sync::mpsc::channel::<()>();
        let (done, is_done) = std::sync::mpsc::channel::<()>();
        let work = holding(Some(held.clone()), move || {
            let _done = done;
            started.send(()).unwrap();
            may_go_on.recv().unwrap();
            Ok(())
        });
        let waiting = tokio::spawn(work);
        tokio::task::spawn_blocking(move || has_started.recv().unwrap()).await.unwrap();
        waiting.abort();
        assert!(waiting.await.unwrap_err().is_cancelled());
        assert_eq!(Arc::strong_count(&held), 2, "the client has left, its bytes have not");
        go_on.send(()).unwrap();
        tokio::task::spawn_blocking(move || is_done.recv().unwrap_err()).await.unwrap();
        while Arc::strong_count(&held) > 1 {
            tokio::task::yield_now().await;
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
            "data:video/jpeg,aa,bb",
            "data:video/webm;codecs=vp8,opus,aGVsbG8=",
            "data:video/jpeg;base64,aa,!!",
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
        let fetched = reader(100).read(VideoSource::Bytes("hello".into()), &Caller::default()).await.unwrap();
        let files = fetched.files;
        let [video] = &files[..] else { panic!("one file is expected") };
        let path = video.path().to_owned();
        assert!(path.exists());
        assert_eq!(video.content_hash, <[u8; 32]>::from(Sha256::digest(b"hello")));
        let clone = files.clone();
        drop(files);
        assert!(path.exists());
        drop(clone);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_list_shares_the_limits_of_one_video() {
        let list = "data:video/jpeg;base64,aGVsbG8=,d29ybGQ";
        assert_eq!(read(10, list).await.unwrap(), b"helloworld");
        assert!(matches!(read(9, list).await, Err(MediaError::TooManyBytes { .. })));
        let urls = |n: usize| VideoSource::Frames(vec!["data:;base64,aGVsbG8=".into(); n]);
        assert_eq!(reader(1000).read(urls(64), &Caller::default()).await.unwrap().files.len(), 64);
        assert!(matches!(
            reader(100).read(urls(64), &Caller::default()).await,
            Err(MediaError::TooManyBytes { .. })
        ));
        for n in [0, 65] {
            assert!(matches!(
                reader(1000).read(urls(n), &Caller::default()).await,
                Err(MediaError::Refused { .. })
            ));
        }
        let long = format!("data:video/jpeg;base64,{}", "aa,".repeat(64));
        assert!(matches!(read(1000, &long).await, Err(MediaError::Refused { .. })));
    }
}
