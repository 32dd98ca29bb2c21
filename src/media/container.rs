//! Containers by the first bytes of a file: which demuxer reads it, or why none does.
//!
//! Called by `probe.rs` and `decode.rs`. Must never leave the choice to ffmpeg, whose guess
//! includes playlists: a file that begins like none of these is refused without starting a
//! process.

use image::ImageFormat;

use super::MediaError;

/// Advice that ends every refusal: the command that makes an accepted file of any video.
pub const HOW_TO_CONVERT: &str = "convert it with `ffmpeg -i input -c:v libx264 -pix_fmt yuv420p output.mp4`";
/// Bytes that tell a file's container: enough for several packets of a transport stream.
pub const HEAD_BYTES: usize = 2048;
/// Bytes between two sync bytes of a transport stream: plain, with timestamps, with error
/// correction.
const TS_PACKET_BYTES: [usize; 3] = [188, 192, 204];
/// Consecutive sync bytes that identify a transport stream.
const TS_SYNC_BYTES: usize = 5;

/// Known containers that are not accepted: offset, first bytes, name.
const REFUSED: [(usize, &[u8], &str); 18] = [
    (0, b"\x06\x0e\x2b\x34", "an MXF file"),
    (0, b".RMF", "a RealMedia file"),
    (0, b"\xb7\xd8\x00\x20\x37\x49\xda\x11", "a WTV recording"),
    (0, b"DKIF", "an IVF file"),
    (0, b"YUV4MPEG2", "a Y4M file"),
    (0, b"nut/multimedia container", "a NUT file"),
    (0, b"FWS", "a Flash animation"),
    (0, b"CWS", "a Flash animation"),
    (8, b"AMV ", "an AMV file"),
    (0, b"\0\0\x01\xb3", "a raw MPEG-1 or MPEG-2 video stream"),
    (0, b"\0\0\x01\xb0", "a raw MPEG-4 video stream"),
    (0, b"\0\0\0\x01", "a raw H.264 or H.265 video stream"),
    (0, b"\0\0\x01\x67", "a raw H.264 video stream"),
    (0, b"\0\0\x01\x40", "a raw H.265 video stream"),
    (0, b"\x1f\x07\x00", "a raw DV stream"),
    (0, b"#EXTM3U", "a playlist, which names other files"),
    (0, b"<MPD", "a playlist, which names other files"),
    (4, b"styp", "one segment of a stream, without its beginning"),
];

/// Sound files: offset, first bytes.
const SOUND: [(usize, &[u8]); 4] = [(0, b"ID3"), (0, b"fLaC"), (8, b"WAVE"), (0, b"\xff\xfb")];

/// An accepted container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    Mp4,
    Mov,
    Matroska,
    WebM,
    Avi,
    Gif,
    MpegTs,
    MpegPs,
    Asf,
    Flv,
    Ogg,
}

impl Container {
    /// Recognizes the first [`HEAD_BYTES`] of a file, or all of a shorter one.
    ///
    /// # Errors
    /// The message names the file's format, if known, and says what to do.
    pub fn sniff(head: &[u8]) -> Result<Self, MediaError> {
        Self::known(head).ok_or_else(|| MediaError::Unsupported(refusal(head)))
    }

    fn known(head: &[u8]) -> Option<Self> {
        let at = |offset: usize, bytes: &[u8]| begins(head, offset, bytes);
        if at(4, b"ftypqt  ") {
            Some(Container::Mov)
        } else if at(4, b"ftyp") {
            Some(Container::Mp4)
        } else if [b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"].iter().any(|tag| at(4, *tag)) {
            // QuickTime files older than the `ftyp` atom.
            Some(Container::Mov)
        } else if at(0, b"\x1a\x45\xdf\xa3") {
            let webm = head.windows(4).take(64).any(|word| word == b"webm");
            Some(if webm { Container::WebM } else { Container::Matroska })
        } else if at(0, b"RIFF") && at(8, b"AVI ") {
            Some(Container::Avi)
        } else if at(0, b"GIF87a") || at(0, b"GIF89a") {
            Some(Container::Gif)
        } else if at(0, b"\0\0\x01\xba") {
            Some(Container::MpegPs)
        } else if at(0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11") {
            Some(Container::Asf)
        } else if at(0, b"FLV\x01") {
            Some(Container::Flv)
        } else if at(0, b"OggS") {
            Some(Container::Ogg)
        } else if is_transport_stream(head) {
            Some(Container::MpegTs)
        } else {
            None
        }
    }

    /// ffmpeg's name of the demuxer.
    pub fn demuxer(self) -> &'static str {
        match self {
            Container::Mp4 | Container::Mov => "mov",
            Container::Matroska | Container::WebM => "matroska",
            Container::Avi => "avi",
            Container::Gif => "gif",
            Container::MpegTs => "mpegts",
            Container::MpegPs => "mpeg",
            Container::Asf => "asf",
            Container::Flv => "flv",
            Container::Ogg => "ogg",
        }
    }

    /// Short name for replies.
    pub fn name(self) -> &'static str {
        match self {
            Container::Mp4 => "mp4",
            Container::Mov => "mov",
            Container::Matroska => "mkv",
            Container::WebM => "webm",
            Container::Avi => "avi",
            Container::Gif => "gif",
            Container::MpegTs => "ts",
            Container::MpegPs => "mpg",
            Container::Asf => "wmv",
            Container::Flv => "flv",
            Container::Ogg => "ogv",
        }
    }

    /// Returns true if decoding may start at any keyframe. A GIF's pictures are patches on the one
    /// before, whatever its packets claim; the others have no reliable index or timestamps.
    pub fn seeks(self) -> bool {
        !matches!(self, Container::Gif | Container::MpegPs | Container::Asf | Container::Flv | Container::Ogg)
    }
}

fn begins(head: &[u8], offset: usize, bytes: &[u8]) -> bool {
    head[offset.min(head.len())..].starts_with(bytes)
}

/// Returns true for a transport stream, which may start anywhere in a packet. A short head must
/// have a sync byte at the start of each packet.
fn is_transport_stream(head: &[u8]) -> bool {
    let at = |offset: usize| begins(head, offset, b"G");
    if at(0) && at(188) || at(4) && at(196) {
        return true;
    }
    TS_PACKET_BYTES.iter().any(|packet| {
        (0..head.len()).any(|start| (0..TS_SYNC_BYTES).all(|number| at(start + number * packet)))
    })
}

fn refusal(head: &[u8]) -> String {
    if let Ok(ImageFormat::Jpeg | ImageFormat::Png | ImageFormat::WebP) = image::guess_format(head) {
        return "this is a picture, not a video; send it as an image_url part".into();
    }
    if SOUND.iter().any(|(offset, bytes)| begins(head, *offset, bytes)) {
        return "this is a sound file; send a video".into();
    }
    let found = REFUSED.iter().find(|(offset, bytes, _)| begins(head, *offset, bytes));
    match found {
        Some((.., name)) => format!("this is {name}, which is not accepted; {HOW_TO_CONVERT}"),
        None => format!(
            "this is not a video file that is accepted; send mp4, mov, mkv, webm, avi, gif, ts, mpg, wmv, flv or ogv, or \
             {HOW_TO_CONVERT}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_known_by_their_first_bytes() {
        let mut ts = vec![0u8; 256];
        (ts[0], ts[188]) = (b'G', b'G');
        let cases: [(&[u8], Option<Container>); 14] = [
            (b"\0\0\0\x20ftypisom....", Some(Container::Mp4)),
            (b"\0\0\0\x14ftypqt  ....", Some(Container::Mov)),
            (b"\0\0\0\x08wide\0\0\0\0mdat", Some(Container::Mov)),
            (b"\x1a\x45\xdf\xa3\x9fB\x86\x81\x01B\x82\x84webmB", Some(Container::WebM)),
            (b"\x1a\x45\xdf\xa3\x9fB\x86\x81\x01B\x82\x88matroska", Some(Container::Matroska)),
            (b"RIFF\0\0\0\0AVI LIST", Some(Container::Avi)),
            (b"GIF89a\x10\0", Some(Container::Gif)),
            (&ts, Some(Container::MpegTs)),
            (b"\0\0\x01\xba\x44\0\x04", Some(Container::MpegPs)),
            (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9", Some(Container::Asf)),
            (b"FLV\x01\x05\0\0\0\x09", Some(Container::Flv)),
            (b"OggS\0\x02\0\0", Some(Container::Ogg)),
            (b"#EXTM3U\n#EXT-X-VERSION:3\n", None),
            (b"ffconcat version 1.0\nfile /etc/passwd\n", None),
        ];
        for (head, expected) in cases {
            assert_eq!(Container::known(head), expected, "{:?}", String::from_utf8_lossy(head));
        }
        for length in 0..12 {
            let _ = Container::known(&ts[..length]);
        }
    }

    #[test]
    fn a_transport_stream_is_known_from_any_byte_on() {
        for packet in TS_PACKET_BYTES {
            for start in 0..packet {
                let mut head = vec![0xffu8; HEAD_BYTES];
                head.iter_mut().skip(start).step_by(packet).for_each(|byte| *byte = b'G');
                assert_eq!(Container::known(&head), Some(Container::MpegTs), "{packet} {start}");
                head[start + packet] = 0;
                assert_eq!(
                    Container::known(&head),
                    Some(Container::MpegTs),
                    "{packet} {start}: one is damaged"
                );
            }
        }
        let mut few = vec![0xffu8; HEAD_BYTES];
        few.iter_mut().skip(9).step_by(188).take(TS_SYNC_BYTES - 1).for_each(|byte| *byte = b'G');
        assert_eq!(Container::known(&few), None);
    }

    #[test]
    fn what_is_refused_is_named_with_the_line_that_converts_it() {
        for (head, name) in [
            (&b"\x06\x0e\x2b\x34\x02\x05\x01\x01"[..], "an MXF file"),
            (b"\0\0\0\x01\x67\x64\0\x1f", "a raw H.264 or H.265 video stream"),
            (b"\0\0\x01\xb3\x0a\0", "a raw MPEG-1 or MPEG-2 video stream"),
            (b".RMF\0\0", "a RealMedia file"),
        ] {
            let message = Container::sniff(head).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(HOW_TO_CONVERT), "{message}");
        }
        let message = Container::sniff(b"hello").unwrap_err().to_string();
        assert!(message.contains("mkv") && message.contains(HOW_TO_CONVERT), "{message}");
        let message = Container::sniff(b"RIFF\0\0\0\0WAVEfmt ").unwrap_err().to_string();
        assert!(message.contains("sound file"), "{message}");
        let message = Container::sniff(b"\xff\xd8\xff\xe0\0\x10JFIF\0").unwrap_err().to_string();
        assert!(message.contains("image_url"), "{message}");
    }
}
