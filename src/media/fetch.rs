//! Downloads videos and pictures from clients' URLs.
//!
//! Called by `source.rs`. Must never connect to an address that was not checked: names are resolved by our own
//! resolver, whose checked answers are the ones connected to (there is no second look-up that could differ), and
//! redirects are followed by hand with every check again. Proxies and credentials are never used.

use std::{
    error::Error,
    fmt,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, TryStreamExt, stream};

use reqwest::{
    Client, Response,
    dns::{Addrs, Name, Resolve, Resolving},
    header::{ACCEPT_ENCODING, HeaderMap, LOCATION},
    redirect::Policy,
};
use tokio::io::{AsyncWriteExt, BufWriter};
use url::{Host, Url};

use super::{
    MediaError,
    address::is_global,
    inflate::{Coding, inflate},
};
use crate::config::MediaConfig;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest URL that is looked at.
const MAX_URL_BYTES: usize = 8192;
const WRITE_BUFFER_BYTES: usize = 256 << 10;
/// Pictures of one list downloaded at the same time.
const MAX_CONCURRENT_PICTURES: usize = 4;

/// Fetches videos under the server's policy.
#[derive(Debug, Clone)]
pub struct Fetcher {
    client: Client,
    allow_remote_urls: bool,
    allow_private_addresses: bool,
    max_video_bytes: usize,
    max_redirects: usize,
    timeout: Duration,
}

impl Fetcher {
    pub fn new(config: &MediaConfig) -> Result<Self, MediaError> {
        let resolver = CheckedResolver { allow_private_addresses: config.allow_private_addresses };
        let client = Client::builder()
            .dns_resolver(Arc::new(resolver))
            .redirect(Policy::none())
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT)
            .user_agent(concat!("tinyllava-server/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| MediaError::Internal(format!("the HTTP client could not be made: {error}")))?;
        Ok(Fetcher {
            client,
            allow_remote_urls: config.allow_remote_urls,
            allow_private_addresses: config.allow_private_addresses,
            max_video_bytes: config.max_video_bytes,
            max_redirects: config.max_redirects,
            timeout: config.fetch_timeout,
        })
    }

    /// Downloads each URL into the (empty) file beside it: one video, or the pictures of a list, which share the limits
    /// of one. `headers` go with every request.
    pub async fn fetch<P: AsRef<Path>>(
        &self,
        downloads: Vec<(Url, P)>,
        headers: &HeaderMap,
    ) -> Result<(), MediaError> {
        let stored = Arc::new(AtomicUsize::new(0));
        let all = stream::iter(downloads)
            .map(Ok)
            .try_for_each_concurrent(MAX_CONCURRENT_PICTURES, async |(url, target)| {
                self.fetch_one(url, target.as_ref(), headers, &stored).await
            });
        tokio::time::timeout(self.timeout, all).await.unwrap_or_else(|_| {
            let seconds = self.timeout.as_secs();
            Err(MediaError::FetchFailed(format!(
                "downloading the video took longer than {seconds} s; upload it instead"
            )))
        })
    }

    /// `stored`: bytes of all downloads that are one for the limits.
    async fn fetch_one(
        &self,
        mut url: Url,
        target: &Path,
        headers: &HeaderMap,
        stored: &Arc<AtomicUsize>,
    ) -> Result<(), MediaError> {
        for _ in 0..=self.max_redirects {
            self.check(&url)?;
            let request = self.client.get(url.clone()).headers(headers.clone());
            // Compressing a video gains nothing.
            let request = request.header(ACCEPT_ENCODING, "identity");
            let response = request.send().await.map_err(failed)?;
            if response.status().is_redirection() {
                url = redirect_target(&url, &response)?;
                continue;
            }
            if !response.status().is_success() {
                return Err(MediaError::FetchFailed(format!(
                    "the video's server answered {}; check the URL",
                    response.status()
                )));
            }
            return self.store(response, target, stored).await;
        }
        Err(MediaError::FetchFailed(format!(
            "the video's URL redirects more than {} times; give the final URL",
            self.max_redirects
        )))
    }

    /// What can be refused without a look-up. Hosts written as addresses never reach the resolver.
    fn check(&self, url: &Url) -> Result<(), MediaError> {
        if !self.allow_remote_urls {
            return Err(refused(
                "this server does not fetch URLs; upload the video or send it as a `data:` URL",
            ));
        }
        if !matches!(url.scheme(), "http" | "https") {
            return Err(refused(
                "the video's URL leads to something other than http or https; send it directly",
            ));
        }
        if url.as_str().len() > MAX_URL_BYTES {
            return Err(refused("the video's URL is too long; use a shorter one"));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(refused(
                "URLs with a user name or password are not fetched; remove them from the URL",
            ));
        }
        let address = match url.host() {
            Some(Host::Ipv4(address)) => IpAddr::from(address),
            Some(Host::Ipv6(address)) => IpAddr::from(address),
            Some(Host::Domain(_)) => return Ok(()),
            None => return Err(refused("the video's URL names no host; give a full URL")),
        };
        if self.allow_private_addresses || is_global(address) { Ok(()) } else { Err(private_address()) }
    }

    /// Streams the body to disk, within the size limit, and undoes its coding.
    async fn store(
        &self,
        response: Response,
        target: &Path,
        stored: &Arc<AtomicUsize>,
    ) -> Result<(), MediaError> {
        let coding = Coding::of(response.headers())?;
        if coding == Coding::Identity {
            let file = tokio::fs::OpenOptions::new().write(true).open(target).await;
            self.copy(response, file.map_err(|error| disk_failed(&error))?, stored).await?;
            return Ok(());
        }
        let compressed = blocking(|| tempfile::tempfile().map_err(|error| disk_failed(&error))).await?;
        let compressed = self.copy(response, compressed.into(), stored).await?.into_std().await;
        let (target, stored, max_video_bytes) = (target.to_owned(), stored.clone(), self.max_video_bytes);
        blocking(move || inflate(coding, compressed, &target, &stored, max_video_bytes)).await
    }

    /// Writes the body to `file` as it comes.
    async fn copy(
        &self,
        mut response: Response,
        file: tokio::fs::File,
        stored: &AtomicUsize,
    ) -> Result<tokio::fs::File, MediaError> {
        let max_video_bytes = self.max_video_bytes;
        let too_large = || MediaError::TooManyBytes { max_video_bytes };
        if response.content_length().is_some_and(|length| length > max_video_bytes as u64) {
            return Err(too_large());
        }
        let mut file = BufWriter::with_capacity(WRITE_BUFFER_BYTES, file);
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            let before = stored.fetch_add(chunk.len(), Ordering::Relaxed);
            if before + chunk.len() > max_video_bytes {
                return Err(too_large());
            }
            file.write_all(&chunk).await.map_err(|error| disk_failed(&error))?;
        }
        file.flush().await.map_err(|error| disk_failed(&error))?;
        Ok(file.into_inner())
    }
}

/// Runs on the blocking pool.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, MediaError> + Send + 'static,
) -> Result<T, MediaError> {
    tokio::task::spawn_blocking(work).await.expect("storing downloads does not panic: this is a bug")
}

fn redirect_target(from: &Url, response: &Response) -> Result<Url, MediaError> {
    response
        .headers()
        .get(LOCATION)
        .and_then(|location| location.to_str().ok())
        .and_then(|location| from.join(location).ok())
        .ok_or_else(|| {
            MediaError::FetchFailed("the video's server redirects to nowhere; check the URL".into())
        })
}

/// A download failed: by our own resolver's refusal, or upstream. Details stay in the log, for they would tell a
/// client about the network behind the server. The URL stays out of the log: its query may be a key.
fn failed(error: reqwest::Error) -> MediaError {
    let mut cause = error.source();
    while let Some(inner) = cause {
        if inner.is::<PrivateAddress>() {
            return private_address();
        }
        cause = inner.source();
    }
    let error = error.without_url();
    tracing::info!(%error, "download failed");
    let what = if error.is_connect() { "its server could not be reached" } else { "the transfer broke off" };
    MediaError::FetchFailed(format!(
        "the video could not be downloaded: {what}; check the URL or upload the video"
    ))
}

fn disk_failed(error: &std::io::Error) -> MediaError {
    tracing::error!(%error, "storing a download failed");
    MediaError::Internal("the video could not be stored; try again later".into())
}

fn refused(message: &str) -> MediaError {
    MediaError::Refused { param: "video_url", message: message.into() }
}

fn private_address() -> MediaError {
    refused("the video's URL leads to an address that is not public; upload the video instead")
}

/// Resolves names and refuses those with any address that is not public.
#[derive(Debug)]
struct CheckedResolver {
    allow_private_addresses: bool,
}

impl Resolve for CheckedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let allow_private_addresses = self.allow_private_addresses;
        Box::pin(async move {
            // Port 0: the client fills in the URL's own.
            let addresses: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            if !allow_private_addresses && !addresses.iter().all(|address| is_global(address.ip())) {
                return Err(Box::new(PrivateAddress) as Box<dyn Error + Send + Sync>);
            }
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

#[derive(Debug)]
struct PrivateAddress;

impl fmt::Display for PrivateAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name resolves to an address that is not public")
    }
}

impl Error for PrivateAddress {}
