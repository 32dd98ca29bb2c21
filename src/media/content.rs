//! Detects from a file's bytes how to decode it: still images and animated pictures in-process,
//! videos with ffmpeg.
//!
//! Called by `picture_loader.rs` and, for the pictures of a list, `pictures.rs`. Reads only chunk
//! headers. Must never trust the media type that a client names: chat clients send videos as
//! pictures and animations as videos.

use std::{
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
};

use image::ImageFormat;

use super::{
    MediaError,
    container::{Container, HEAD_BYTES},
    frame_sampling::Timeline,
    local_file::LocalFile,
    pictures,
};
use crate::config::MediaConfig;

/// Most chunks read per picture; cameras and editors write a few thousand at most.
const MAX_CHUNKS: usize = 1 << 20;
/// Bytes read per chunk: the fields that describe a frame.
const CHUNK_HEAD_BYTES: usize = 26;
/// Browsers show frames with a delay of up to 10 ms for 100 ms.
const SHORTEST_DELAY_SECONDS: f64 = 0.01;
const DEFAULT_DELAY_SECONDS: f64 = 0.1;
/// Brands of still images in an MP4 container.
const PICTURE_BRANDS: [&[u8; 4]; 8] =
    [b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"];

/// The kind of a file.
#[derive(Debug)]
pub enum Content {
    Still,
    Animation(Animation),
    /// A container that ffmpeg may open.
    Video,
    Unknown,
}

/// An animated picture of several frames.
#[derive(Debug, Clone)]
pub struct Animation {
    pub format: ImageFormat,
    /// Presentation times of its frames, read from its chunks.
    pub timeline: Timeline,
}

impl Animation {
    /// Returns the usual name of the format.
    pub fn name(&self) -> &'static str {
        if self.format == ImageFormat::Png { "apng" } else { "webp" }
    }
}

/// Detects the kind of `file`. Runs on the blocking pool.
///
/// # Errors
/// A truncated animation, an animation with too many frames, and a HEIC or AVIF picture.
pub fn of(file: &LocalFile, config: &MediaConfig) -> Result<Content, MediaError> {
    let unreadable = |error: io::Error| {
        tracing::error!(%error, "a media file vanished");
        MediaError::Internal("the file could not be read; try again".into())
    };
    let mut reader = File::open(file.path()).map_err(unreadable)?;
    let mut head = Vec::with_capacity(HEAD_BYTES);
    reader.by_ref().take(HEAD_BYTES as u64).read_to_end(&mut head).map_err(unreadable)?;
    if head.get(4..8) == Some(b"ftyp") && PICTURE_BRANDS.iter().any(|brand| head.get(8..12) == Some(*brand)) {
        return Err(MediaError::Unsupported(
            "HEIC and AVIF pictures are not accepted; send jpeg, png or webp".into(),
        ));
    }
    let Some((format, _)) = pictures::format(&head) else {
        return Ok(if Container::sniff(&head).is_ok() { Content::Video } else { Content::Unknown });
    };
    let delays = Chunks::open(reader, format)
        .and_then(|chunks| chunks.map_or(Ok(None), |chunks| chunks.delays(config)));
    match delays.map_err(unreadable)? {
        None => Ok(Content::Still),
        Some(Delays::Whole(delays)) if delays.len() > 1 => {
            Ok(Content::Animation(Animation { format, timeline: timeline(&delays) }))
        }
        Some(Delays::Whole(_)) => Ok(Content::Still),
        Some(Delays::CutOff) => Err(MediaError::Undecodable(
            "the animated picture is cut off; send it again, whole, or send its frames as pictures".into(),
        )),
        Some(Delays::TooMany) => Err(MediaError::Undecodable(format!(
            "the animated picture has more than {} frames; send it as mp4 or webm",
            config.max_animation_frames
        ))),
    }
}

/// Builds the timeline of frames with these delays (seconds).
fn timeline(delays: &[f64]) -> Timeline {
    let (mut times, mut duration) = (Vec::with_capacity(delays.len()), 0.0);
    for &delay in delays {
        times.push(duration);
        duration += if delay <= SHORTEST_DELAY_SECONDS { DEFAULT_DELAY_SECONDS } else { delay };
    }
    Timeline { times, duration }
}

/// Delays of the frames of an animated picture, seconds.
enum Delays {
    Whole(Vec<f64>),
    CutOff,
    TooMany,
}

/// The chunks of a PNG or WebP file.
struct Chunks {
    reader: BufReader<File>,
    is_png: bool,
    position: u64,
    /// Length of the file.
    num_bytes: u64,
}

/// The header and first bytes of a chunk.
struct Chunk {
    kind: [u8; 4],
    head: [u8; CHUNK_HEAD_BYTES],
    /// False if the file ends inside the chunk.
    is_whole: bool,
}

impl Chunks {
    /// Returns none for a format without chunks (a still image).
    fn open(file: File, format: ImageFormat) -> io::Result<Option<Self>> {
        let (is_png, position) = match format {
            ImageFormat::Png => (true, 8),
            ImageFormat::WebP => (false, 12),
            _ => return Ok(None),
        };
        let num_bytes = file.metadata()?.len();
        Ok(Some(Chunks { reader: BufReader::new(file), is_png, position, num_bytes }))
    }

    /// Returns none at the end of the file.
    fn next(&mut self) -> io::Result<Option<Chunk>> {
        let mut header = [0u8; 8];
        if self.position + header.len() as u64 > self.num_bytes {
            return Ok(None);
        }
        // Seeks within the buffer where possible: most chunks are small.
        let ahead = self.position as i64 - self.reader.stream_position()? as i64;
        self.reader.seek_relative(ahead)?;
        self.reader.read_exact(&mut header)?;
        let [a, b, c, d, e, f, g, h] = header;
        let (kind, length) = if self.is_png {
            ([e, f, g, h], u64::from(u32::from_be_bytes([a, b, c, d])))
        } else {
            ([a, b, c, d], u64::from(u32::from_le_bytes([e, f, g, h])))
        };
        let start = self.position + header.len() as u64;
        // PNG appends a checksum; WebP aligns chunks to even offsets.
        self.position = start + if self.is_png { length + 4 } else { length + length % 2 };
        let mut head = [0u8; CHUNK_HEAD_BYTES];
        let there = length.min(CHUNK_HEAD_BYTES as u64).min(self.num_bytes - start);
        self.reader.read_exact(&mut head[..there as usize])?;
        Ok(Some(Chunk { kind, head, is_whole: start + length <= self.num_bytes }))
    }

    /// Returns none for a still image.
    fn delays(mut self, config: &MediaConfig) -> io::Result<Option<Delays>> {
        let mut delays = Vec::new();
        // The number of frames in PNG; 0 in WebP, which does not announce it.
        let mut announced: Option<usize> = None;
        let mut has_end = false;
        for _ in 0..MAX_CHUNKS {
            let Some(Chunk { kind, head, is_whole }) = self.next()? else { break };
            match &kind {
                b"VP8X" if head[0] & 2 != 0 => announced = Some(0),
                b"acTL" => {
                    announced = Some(u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize)
                }
                // A still image: its pixels come before any animation chunk.
                b"VP8X" | b"VP8 " | b"VP8L" | b"IDAT" if announced.is_none() => return Ok(None),
                b"ANMF" if is_whole => delays.push(webp_delay(&head)),
                b"fcTL" if is_whole => delays.push(png_delay(&head)),
                b"IEND" => {
                    has_end = true;
                    break;
                }
                _ => {}
            }
            if !is_whole {
                return Ok(Some(Delays::CutOff));
            }
            if delays.len() > config.max_animation_frames {
                return Ok(Some(Delays::TooMany));
            }
        }
        let Some(announced) = announced else { return Ok(None) };
        let is_whole =
            if self.is_png { has_end && delays.len() >= announced } else { self.is_as_long_as_it_says()? };
        if !is_whole {
            return Ok(Some(Delays::CutOff));
        }
        if self.is_png {
            delays.truncate(announced);
        }
        Ok(Some(Delays::Whole(delays)))
    }

    /// Returns true if a WebP file has the length that its header announces.
    fn is_as_long_as_it_says(&mut self) -> io::Result<bool> {
        let mut size = [0u8; 4];
        self.reader.seek(SeekFrom::Start(4))?;
        self.reader.read_exact(&mut size)?;
        // The size excludes the first 8 bytes; the last byte of padding may be missing.
        Ok(u64::from(u32::from_le_bytes(size)) + 8 <= self.num_bytes + 1)
    }
}

/// Reads the delay of an `ANMF` chunk, seconds (stored as 24 bits of milliseconds).
fn webp_delay(head: &[u8; CHUNK_HEAD_BYTES]) -> f64 {
    f64::from(u32::from_le_bytes([head[12], head[13], head[14], 0])) / 1000.0
}

/// Reads the delay of an `fcTL` chunk, seconds (a fraction; a denominator of 0 stands for 100).
fn png_delay(head: &[u8; CHUNK_HEAD_BYTES]) -> f64 {
    let numerator = u16::from_be_bytes([head[20], head[21]]);
    let denominator = u16::from_be_bytes([head[22], head[23]]);
    f64::from(numerator) / if denominator == 0 { 100.0 } else { f64::from(denominator) }
}
