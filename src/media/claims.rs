//! Reads from a file's structure whether it is encrypted, and how many bytes it should have.
//!
//! Called by `probe.rs`, on the blocking pool, before anything is decoded. Reads headers and a few
//! blocks, never the whole file. A claimed duration is no claim here: recorders write it before
//! they know it. Must never report an unreadable structure as a fault: decoding decides then.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

use super::{
    MediaError,
    container::Container,
    mp4_boxes::{BoxHead, Span},
};

/// Elements looked at on one level: a recording of many hours has one every second.
const MAX_ELEMENTS: usize = 200_000;
/// Bytes read at once.
const BLOCK_BYTES: u64 = 64 << 10;
/// Shorter runs of zeros at the end of a stated length are content.
const MIN_EMPTY_BYTES: u64 = 1024;
/// Zeros after the content of a file without a stated length are padding below these bounds: bytes,
/// and one part in so many of the file. Longer runs are space that a downloader reserved.
const MIN_RESERVED_BYTES: u64 = 32 << 10;
const MIN_RESERVED_PART: u64 = 20;
/// A RIFF size from here on was never filled in, or does not fit its field.
const MAX_RIFF_BYTES: u64 = 0x7fff_0000;
/// Places of a transport stream at which its packets are looked at.
const TS_PLACES: u64 = 4;
/// Bytes before the boxes of a sample description: version, flags and the number of entries.
const DESCRIPTIONS_HEADER_BYTES: u64 = 8;

/// Claims of a file's structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileClaims {
    /// Decoding needs a key.
    pub encrypted: bool,
    /// Bytes that the content should have: more than the file's length if it is cut off, fewer if
    /// other bytes follow the content.
    pub promised_bytes: u64,
    /// Bytes up to the end of its content: downloaders reserve the whole length and leave zeros
    /// where nothing arrived.
    pub present_bytes: u64,
}

impl FileClaims {
    /// Opens a file and reads its claims on the blocking pool.
    ///
    /// # Errors
    /// When the video is encrypted.
    pub async fn open(file: &Path, container: Container) -> Result<(File, Self), MediaError> {
        let file = file.to_owned();
        let read = tokio::task::spawn_blocking(move || {
            let file = File::open(file)?;
            let claims = FileClaims::read(&file, container);
            Ok::<_, std::io::Error>((file, claims))
        });
        let read = read.await.expect("reading a file does not panic: this is a bug");
        let (file, claims) = read.map_err(|error| {
            tracing::error!(%error, "a video file vanished");
            MediaError::Internal("the video file could not be read; try again".into())
        })?;
        if claims.encrypted {
            return Err(MediaError::Unsupported(
                "the video is encrypted (DRM) and cannot be decoded; send it without encryption".into(),
            ));
        }
        Ok((file, claims))
    }

    /// Reads the claims of `file`. Blocks.
    pub fn read(file: &File, container: Container) -> Self {
        let len = file.metadata().map_or(0, |metadata| metadata.len());
        let Layout { encrypted, end } = match container {
            Container::Mp4 | Container::Mov => mp4_layout(file, len),
            Container::Matroska | Container::WebM => matroska_layout(file, len),
            Container::Avi => Layout { encrypted: false, end: riff_end(file, len) },
            Container::MpegTs => Layout { encrypted: is_scrambled(file, len), end: None },
            Container::Flv => Layout { encrypted: false, end: flv_size(file) },
            Container::Asf => Layout { encrypted: false, end: asf_size(file) },
            _ => Layout { encrypted: false, end: None },
        };
        let end = end.unwrap_or_else(|| {
            let content = content_end(file, len);
            if is_reserved(content, len) { len } else { content }
        });
        let present_bytes = content_end(file, end.min(len));
        FileClaims { encrypted, promised_bytes: end, present_bytes }
    }

    /// Returns true if bytes are missing.
    pub fn is_short(&self) -> bool {
        self.present_bytes < self.promised_bytes
    }
}

/// Findings of one container's headers.
struct Layout {
    encrypted: bool,
    /// Stated end of the content, past the file's end in a truncated file; `None` if not stated.
    end: Option<u64>,
}

/// Returns true if the zeros from `content` to the end of a file are space for what did not arrive.
fn is_reserved(content: u64, len: u64) -> bool {
    content == 0 || len - content >= MIN_RESERVED_BYTES.max(len / MIN_RESERVED_PART)
}

/// Returns the start of the zeros that fill the file up to `end`, or `end` if they are few.
fn content_end(file: &File, end: u64) -> u64 {
    let mut block = vec![0; BLOCK_BYTES as usize];
    let mut last_content = |from: u64, to: u64| {
        let block = &mut block[..(to - from) as usize];
        let read = file.read_exact_at(block, from).is_ok();
        let found = block.iter().rposition(|&byte| byte != 0);
        if read { found.map(|at| from + at as u64 + 1) } else { Some(to) }
    };
    // Steps double: a file of zeros costs no more reads than one without.
    let (mut to, mut stride) = (end, BLOCK_BYTES);
    while to > 0 {
        let from = to.saturating_sub(BLOCK_BYTES);
        if let Some(content) = last_content(from, to) {
            return refined(end, content, &mut last_content);
        }
        to = from.min(end.saturating_sub(stride));
        stride *= 2;
    }
    refined(end, 0, &mut last_content)
}

/// Finds the end of the content between `content` and `end` by bisection.
fn refined(end: u64, content: u64, last_content: &mut impl FnMut(u64, u64) -> Option<u64>) -> u64 {
    let (mut low, mut high) = (content, end);
    while high.saturating_sub(low) > BLOCK_BYTES {
        let middle = low + (high - low) / 2;
        match last_content(middle - BLOCK_BYTES.min(middle), middle) {
            Some(content) if content > low => low = content,
            // Zeros up to the middle, as far as one block tells.
            _ => high = middle,
        }
    }
    let found = last_content(low, high).unwrap_or(low);
    if end - found < MIN_EMPTY_BYTES { end } else { found }
}

fn mp4_layout(file: &File, len: u64) -> Layout {
    let (mut at, mut end) = (0, 0);
    let mut movie = None;
    for _ in 0..MAX_ELEMENTS {
        if at >= len {
            break;
        }
        let Some(BoxHead { kind, len: size, header }) = BoxHead::read(file, at, len) else { break };
        let Some(next) = at.checked_add(size).filter(|_| size >= header) else { break };
        // Bytes after the last box look like a box of any length: only known ones may be cut off.
        let is_name = kind.iter().all(|&byte| byte == 0xa9 || (b' '..=b'~').contains(&byte));
        if !is_name || next > len && !matches!(&kind, b"moov" | b"mdat" | b"moof") {
            break;
        }
        if &kind == b"moov" {
            movie = Some(Span { start: at + header, end: next.min(len) });
        }
        if !matches!(&kind, b"free" | b"skip" | b"wide") {
            end = next;
        }
        at = next;
    }
    let encrypted = movie.and_then(|movie| is_encrypted_movie(file, &movie)).unwrap_or(false);
    if at < len && is_reserved(content_end(file, len), len) {
        end = len;
    }
    Layout { encrypted, end: Some(end).filter(|&end| end > 0) }
}

/// Returns true if all sample descriptions of all video tracks are of encrypted samples.
fn is_encrypted_movie(file: &File, movie: &Span) -> Option<bool> {
    let mut kinds = Vec::new();
    for media in movie.video_media(file)? {
        let descriptions = media.only(file, b"minf")?.only(file, b"stbl")?.only(file, b"stsd")?;
        let entries = descriptions.after(DESCRIPTIONS_HEADER_BYTES)?.boxes(file)?;
        kinds.extend(entries.into_iter().map(|(kind, _)| kind));
    }
    // ISO/IEC 14496-12, 8.12, and the older scheme of a shop.
    Some(!kinds.is_empty() && kinds.iter().all(|kind| matches!(kind, b"encv" | b"drmi")))
}

/// An element of EBML (RFC 8794): id, start of its content, and its end unless that is unknown.
#[derive(Debug, Clone, Copy)]
struct Element {
    id: u64,
    start: u64,
    end: Option<u64>,
}

const SEGMENT: u64 = 0x1853_8067;
const CLUSTER: u64 = 0x1f43_b675;
const TRACKS: u64 = 0x1654_ae6b;
const TRACK_ENTRY: u64 = 0xae;
const TRACK_TYPE: u64 = 0x83;
const CONTENT_ENCODINGS: u64 = 0x6d80;
const CONTENT_ENCODING: u64 = 0x6240;
const CONTENT_ENCRYPTION: u64 = 0x5035;
const VIDEO_TRACK: u8 = 1;

impl Element {
    fn at(file: &File, at: u64) -> Option<Self> {
        let mut head = [0; 12];
        let mut filled = 0;
        while filled < head.len() {
            match file.read_at(&mut head[filled..], at + filled as u64).ok()? {
                0 => break,
                read => filled += read,
            }
        }
        let head = &head[..filled];
        let id_bytes = head.first()?.leading_zeros() as usize + 1;
        let id = head.get(..id_bytes.min(4))?.iter().fold(0, |id, &byte| id << 8 | u64::from(byte));
        let size = head.get(id_bytes..)?;
        let size_bytes = size.first()?.leading_zeros() as usize + 1;
        let (first, rest) = size.get(..size_bytes).filter(|_| size_bytes <= 8)?.split_first()?;
        let first = u64::from(*first) & ((1 << (8 - size_bytes)) - 1);
        let value = rest.iter().fold(first, |value, &byte| value << 8 | u64::from(byte));
        let unknown = value == (1 << (7 * size_bytes)) - 1;
        let start = at + (id_bytes + size_bytes) as u64;
        let end = if unknown { None } else { Some(start.checked_add(value)?) };
        (id_bytes <= 4).then_some(Element { id, start, end })
    }

    /// The elements inside, of one whose end is known.
    fn children(&self, file: &File) -> Vec<Element> {
        let mut children = Vec::new();
        let mut at = self.start;
        while let Some(end) = self.end.filter(|&end| at < end)
            && let Some(child) = Element::at(file, at)
            && let Some(next) = child.end.filter(|&next| next <= end && children.len() < 1000)
        {
            children.push(child);
            at = next;
        }
        children
    }

    fn child(&self, file: &File, id: u64) -> Option<Element> {
        self.children(file).into_iter().find(|child| child.id == id)
    }
}

fn matroska_layout(file: &File, len: u64) -> Layout {
    let mut layout = Layout { encrypted: false, end: None };
    let head = Element::at(file, 0);
    let Some(segment) = head.and_then(|head| Element::at(file, head.end?)).filter(|e| e.id == SEGMENT) else {
        return layout;
    };
    layout.end = segment.end;
    let mut at = segment.start;
    for _ in 0..MAX_ELEMENTS {
        let Some(element) = Element::at(file, at).filter(|_| at < len) else { break };
        if element.id == TRACKS {
            layout.encrypted = has_encrypted_video(file, &element);
        }
        // A segment of unknown length promises as much as the parts that it began.
        let Some(end) = element.end.filter(|_| segment.end.is_none() || element.id != CLUSTER) else { break };
        if segment.end.is_none() && end > len {
            layout.end = Some(end);
        }
        at = end;
    }
    layout
}

fn has_encrypted_video(file: &File, tracks: &Element) -> bool {
    let is_video = |track: &Element| {
        let mut kind = [0];
        let field = track.child(file, TRACK_TYPE);
        field.is_some_and(|field| file.read_exact_at(&mut kind, field.start).is_ok())
            && kind[0] == VIDEO_TRACK
    };
    let is_encrypted = |track: &Element| {
        let encodings = track.child(file, CONTENT_ENCODINGS);
        let encodings = encodings.map_or(Vec::new(), |encodings| encodings.children(file));
        let mut encodings = encodings.into_iter().filter(|encoding| encoding.id == CONTENT_ENCODING);
        encodings.any(|encoding| encoding.child(file, CONTENT_ENCRYPTION).is_some())
    };
    let tracks = tracks.children(file).into_iter().filter(|track| track.id == TRACK_ENTRY);
    let videos: Vec<Element> = tracks.filter(is_video).collect();
    !videos.is_empty() && videos.iter().all(is_encrypted)
}

/// Returns the end of the last RIFF chunk of an AVI file (large files have several).
fn riff_end(file: &File, len: u64) -> Option<u64> {
    let mut at = 0;
    for _ in 0..MAX_ELEMENTS {
        let mut head = [0; 8];
        if at >= len || file.read_exact_at(&mut head, at).is_err() || &head[..4] != b"RIFF" {
            break;
        }
        let size = u64::from(u32::from_le_bytes([head[4], head[5], head[6], head[7]]));
        if size == 0 || size >= MAX_RIFF_BYTES {
            return None;
        }
        at += 8 + size + size % 2;
    }
    Some(at).filter(|&end| end > 0)
}

/// Returns the file size in the metadata of an FLV file, if its recorder filled it in.
fn flv_size(file: &File) -> Option<u64> {
    const KEY: &[u8] = b"\x00\x08filesize\x00";
    let mut head = vec![0; 4096];
    let filled = file.read_at(&mut head, 0).ok()?;
    let at = head[..filled].windows(KEY.len()).position(|window| window == KEY)? + KEY.len();
    let size = f64::from_be_bytes(head.get(at..at + 8)?.try_into().ok()?);
    (1.0..1e15).contains(&size).then_some(size as u64)
}

/// Returns the file size in the file properties of an ASF file (Advanced Systems Format, 3.2).
fn asf_size(file: &File) -> Option<u64> {
    const PROPERTIES: [u8; 16] =
        [0xa1, 0xdc, 0xab, 0x8c, 0x47, 0xa9, 0xcf, 0x11, 0x8e, 0xe4, 0x00, 0xc0, 0x0c, 0x20, 0x53, 0x65];
    let mut head = vec![0; 4096];
    let filled = file.read_at(&mut head, 0).ok()?;
    let at = head[..filled].windows(16).position(|window| window == PROPERTIES)?;
    // The object's size and the id of the file stand between.
    let size = u64::from_le_bytes(head.get(at + 40..at + 48)?.try_into().ok()?);
    (size > 0).then_some(size)
}

/// Returns true if most program packets of a transport stream are scrambled (ISO/IEC 13818-1,
/// 2.4.3.3).
fn is_scrambled(file: &File, len: u64) -> bool {
    let (mut clear, mut scrambled) = (0, 0);
    let mut block = vec![0; BLOCK_BYTES as usize];
    for place in 0..TS_PLACES {
        let Ok(filled) = file.read_at(&mut block, len / TS_PLACES * place) else { return false };
        for packet in ts_packets(&block[..filled]) {
            let pid = (u16::from(packet[1]) << 8 | u16::from(packet[2])) & 0x1fff;
            let has_payload = packet[3] & 0x10 != 0;
            // Tables and empty packets are never scrambled.
            if has_payload && (0x20..0x1fff).contains(&pid) {
                match packet[3] >> 6 {
                    2 | 3 => scrambled += 1,
                    _ => clear += 1,
                }
            }
        }
    }
    scrambled > clear
}

/// Iterates over the packets in a block of bytes, from the first sync byte on.
fn ts_packets(block: &[u8]) -> impl Iterator<Item = &[u8]> {
    let in_sync =
        |start: usize, stride: usize| (0..4).all(|packet| block.get(start + packet * stride) == Some(&b'G'));
    let layouts =
        [188, 192, 204].into_iter().flat_map(|stride| (0..stride).map(move |start| (start, stride)));
    let found = layouts.into_iter().find(|&(start, stride)| in_sync(start, stride));
    let (start, stride) = found.unwrap_or((block.len(), 188));
    block[start..].chunks(stride).filter(|packet| packet.len() >= 4 && packet[0] == b'G')
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn claims(bytes: &[u8], container: Container) -> (u64, u64) {
        let claims = FileClaims::read(&file(bytes), container);
        assert!(!claims.encrypted);
        (claims.promised_bytes, claims.present_bytes)
    }

    #[test]
    fn zeros_at_the_end_did_not_arrive() {
        for (content, zeros, is_reserved) in [
            (200_000, 9_000_000, true),
            (1, 64 << 10, true),
            (70_000, 70_000, true),
            // Padding.
            (2_000_000, 90_000, false),
            (70_000, 2000, false),
            (10, 5000, false),
            (9_000, 0, false),
        ] {
            let mut bytes = vec![1; content];
            bytes.resize(content + zeros, 0);
            let promised = if is_reserved { bytes.len() } else { content };
            let expected = (promised as u64, content as u64);
            assert_eq!(claims(&bytes, Container::Gif), expected, "{content} {zeros}");
        }
        let padded = [vec![1; 3000], vec![0; 1000]].concat();
        assert_eq!(claims(&padded, Container::Gif), (4000, 4000));
        assert_eq!(claims(&[0; 5000], Container::Gif), (5000, 0));
    }

    #[test]
    fn structures_that_go_past_the_end_promise_more() {
        let mp4 = [b"\0\0\0\x10ftypisom\0\0\0\0", &b"\0\0\x10\0mdat"[..], &[7; 100]].concat();
        assert_eq!(claims(&mp4, Container::Mp4), (16 + 4096, 124));
        let freed = [b"\0\0\0\x10ftypisom\0\0\0\0", &b"\0\0\x10\0free"[..], &[0; 4088]].concat();
        assert_eq!(claims(&freed, Container::Mp4), (16, 16), "free space is no content");
        let avi = [b"RIFF\x00\x10\0\0AVI ", &[7; 100][..]].concat();
        assert_eq!(claims(&avi, Container::Avi), (8 + 4096, 112));
        let live = [b"RIFF\0\0\0\0AVI ", &[7; 100][..]].concat();
        assert_eq!(claims(&live, Container::Avi), (112, 112));
        let known = [b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\x50\0", &[7; 100][..]].concat();
        assert_eq!(claims(&known, Container::WebM), (11 + 4096, 111));
        let head = b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\xff";
        let cluster = [&b"\x1f\x43\xb6\x75\x41\0"[..], &[7; 256]].concat();
        let broken_off = [head, &cluster[..], &cluster[..100]].concat();
        assert_eq!(claims(&broken_off, Container::WebM), (10 + 2 * 262, 10 + 262 + 100));
    }

    #[test]
    fn matroska_tracks_say_that_they_are_encrypted() {
        let element = |id: &[u8], content: &[u8]| [id, &[0x40, content.len() as u8], content].concat();
        let encryption = element(&[0x62, 0x40], &element(&[0x50, 0x35], b"\x47\xe1\x81\x05"));
        let compression = element(&[0x62, 0x40], &element(&[0x50, 0x34], b"\x42\x54\x81\x03"));
        let track = |kind: u8, encoding: &[u8]| {
            let fields = [element(&[0x83], &[kind]), element(&[0x6d, 0x80], encoding)].concat();
            element(&[0xae], &fields)
        };
        let encrypted = |tracks: &[Vec<u8>]| {
            let segment = element(&[0x16, 0x54, 0xae, 0x6b], &tracks.concat());
            let head = b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\xff";
            let bytes = [&head[..], &segment, b"\x1f\x43\xb6\x75\xff"].concat();
            FileClaims::read(&file(&bytes), Container::WebM).encrypted
        };
        assert!(encrypted(&[track(1, &encryption)]));
        assert!(encrypted(&[track(2, &compression), track(1, &encryption)]));
        assert!(!encrypted(&[track(1, &compression)]), "compressed headers are common");
        assert!(!encrypted(&[track(2, &encryption), track(1, &[])]), "sound is not looked at");
    }

    #[test]
    fn scrambled_transport_streams_are_encrypted() {
        for stride in [188, 192] {
            let stream = |control: u8| {
                let mut packet = vec![7; stride];
                let head = stride - 188;
                packet[head..head + 4].copy_from_slice(&[b'G', 1, 0, 0x10 | control << 6]);
                let mut table = vec![7; stride];
                table[head..head + 4].copy_from_slice(b"G\x40\0\x10");
                FileClaims::read(&file(&[packet, table].concat().repeat(2000)), Container::MpegTs).encrypted
            };
            assert_eq!([0, 2, 3].map(stream), [false, true, true], "{stride}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            use Container::*;
            for (container, head) in [
                (Mp4, &b"\0\0\x02\0moov"[..]), (WebM, b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\xff"),
                (WebM, b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\xff\x16\x54\xae\x6b\x41\0"),
                (Avi, b"RIFF"), (MpegTs, &b"G"[..]), (Gif, b""),
            ] {
                let claims = FileClaims::read(&file(&[head, &bytes].concat()), container);
                prop_assert!(claims.present_bytes <= claims.promised_bytes.max(1));
            }
        }
    }
}
