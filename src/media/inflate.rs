//! Undoes the content coding of a download.
//!
//! Called by `fetch.rs`, on the blocking pool. Downloads ask for no coding, but some servers
//! compress all that they send. Must never write more than the limit of a video, however small the
//! compressed data is.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufReader, BufWriter, Read, Seek, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use flate2::bufread::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use reqwest::header::{CONTENT_ENCODING, HeaderMap};

use super::{MediaError, local_file::disk_failed};

const BUFFER_BYTES: usize = 64 << 10;
/// Characters of an unknown coding that are repeated.
const MAX_NAME_CHARS: usize = 40;

/// The content coding of a download.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    Identity,
    Gzip,
    /// With the header of zlib or without: servers disagree.
    Deflate,
}

impl Coding {
    /// The coding that a response declares.
    ///
    /// # Errors
    /// A coding that is not read here, or several.
    pub fn of(headers: &HeaderMap) -> Result<Self, MediaError> {
        let values = headers.get_all(CONTENT_ENCODING).iter();
        let names = values.flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
        let names = names.map(|name| String::from_utf8_lossy(name).trim().to_ascii_lowercase());
        let mut names = names.filter(|name| !name.is_empty() && name != "identity");
        let first = names.next();
        if names.next().is_some() {
            return Err(fetch_failed("compressed it several times; serve the file as it is"));
        }
        match first.as_deref() {
            None => Ok(Coding::Identity),
            Some("gzip" | "x-gzip") => Ok(Coding::Gzip),
            Some("deflate") => Ok(Coding::Deflate),
            Some(other) => {
                let name: String = other.chars().take(MAX_NAME_CHARS).collect();
                let name = name.escape_default();
                Err(fetch_failed(&format!(
                    "compressed it as \"{name}\", which is not read here; serve the file as it is or in gzip"
                )))
            }
        }
    }
}

/// Decompresses `compressed` into the existing file `target`. `stored` counts the bytes of all
/// downloads that share the limit of one video: the decompressed bytes replace the compressed ones
/// in it.
///
/// # Errors
/// When the result is over the limit, or the data is damaged.
pub fn inflate(
    coding: Coding,
    mut compressed: File,
    target: &Path,
    stored: &Arc<AtomicUsize>,
    max_video_bytes: usize,
) -> Result<(), MediaError> {
    let failed = |error: io::Error| disk_failed(&error);
    let num_compressed = usize::try_from(compressed.stream_position().map_err(failed)?).unwrap_or(usize::MAX);
    compressed.rewind().map_err(failed)?;
    stored.fetch_sub(num_compressed, Ordering::Relaxed);
    // Not created: a request that was dropped has removed it.
    let target = OpenOptions::new().write(true).open(target).map_err(failed)?;
    let mut target = BufWriter::with_capacity(BUFFER_BYTES, target);
    let mut plain = decoder(coding, BufReader::with_capacity(BUFFER_BYTES, compressed)).map_err(failed)?;
    let mut chunk = vec![0; BUFFER_BYTES];
    loop {
        let read = plain.read(&mut chunk).map_err(|error| {
            tracing::info!(%error, ?coding, "inflating a download failed");
            fetch_failed("sent compressed data that is damaged or incomplete; serve the file as it is")
        })?;
        if read == 0 {
            return target.flush().map_err(failed);
        }
        if stored.fetch_add(read, Ordering::Relaxed) + read > max_video_bytes {
            return Err(MediaError::TooManyBytes { max_video_bytes });
        }
        target.write_all(&chunk[..read]).map_err(failed)?;
    }
}

fn decoder(coding: Coding, mut input: BufReader<File>) -> io::Result<Box<dyn Read>> {
    let mut start = [0; 2];
    let num_start = input.read(&mut start)?;
    input.rewind()?;
    // RFC 1950: the method 8 and a check of both bytes.
    let is_zlib = num_start == 2
        && start[0] & 0x0f == 8
        && (u32::from(start[0]) * 256 + u32::from(start[1])).is_multiple_of(31);
    Ok(match coding {
        Coding::Identity => Box::new(input),
        Coding::Gzip => Box::new(MultiGzDecoder::new(input)),
        Coding::Deflate if is_zlib => Box::new(ZlibDecoder::new(input)),
        Coding::Deflate => Box::new(DeflateDecoder::new(input)),
    })
}

fn fetch_failed(what: &str) -> MediaError {
    MediaError::FetchFailed(format!("the video's server {what}"))
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    fn coding(values: &[&'static str]) -> Result<Coding, MediaError> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(CONTENT_ENCODING, HeaderValue::from_static(value));
        }
        Coding::of(&headers)
    }

    #[test]
    fn one_known_coding_is_read() {
        for (values, expected) in [
            (&[][..], Coding::Identity),
            (&[""], Coding::Identity),
            (&["identity"], Coding::Identity),
            (&["gzip"], Coding::Gzip),
            (&["X-GZip"], Coding::Gzip),
            (&["identity, gzip"], Coding::Gzip),
            (&["deflate"], Coding::Deflate),
        ] {
            assert_eq!(coding(values).unwrap(), expected, "{values:?}");
        }
        for values in [&["br"][..], &["zstd"], &["gzip, gzip"], &["gzip", "deflate"], &["gzip;q=1"]] {
            assert!(matches!(coding(values), Err(MediaError::FetchFailed(_))), "{values:?}");
        }
    }
}
