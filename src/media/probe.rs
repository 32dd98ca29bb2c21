//! Looks into a video file before anything is decoded: what it is, how large, and when its frames are shown.
//!
//! Called by `mod.rs`. Must never let ffmpeg guess the container (its guess would include playlists): the file's
//! first bytes choose the demuxer, and a file that begins like none of them is refused without starting a process.

use std::{fs::File, io::Read, path::Path, sync::Arc};

use image::ImageFormat;

use super::{
    MediaError,
    claims::FileClaims,
    clock::Clock,
    completeness::{Completeness, Source},
    ffmpeg::{ALLOWED_CODECS, Tools, finish, read_lines},
    frame_sampling::Timeline,
    orientation::Orientation,
    packet_table::{Packet, PacketTable},
};
use crate::config::MediaConfig;

/// What ffprobe is asked for. Packets come first, then the stream, then the container.
const ENTRIES: &str = "packet=pts,dts,duration,size,pos,flags\
    :stream=codec_name,pix_fmt,width,height,time_base,avg_frame_rate,r_frame_rate,has_b_frames,nb_frames\
    :stream_side_data=displaymatrix:format=duration";

/// Containers by their first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    Mp4,
    Mov,
    Matroska,
    WebM,
    Avi,
    Gif,
    MpegTs,
}

impl Container {
    /// From the first bytes of a file (64 are enough).
    fn sniff(head: &[u8]) -> Option<Self> {
        let at = |offset: usize, bytes: &[u8]| head[offset.min(head.len())..].starts_with(bytes);
        if at(4, b"ftypqt  ") {
            Some(Container::Mov)
        } else if at(4, b"ftyp") {
            Some(Container::Mp4)
        } else if [b"moov", b"mdat", b"wide", b"free", b"skip"].iter().any(|tag| at(4, *tag)) {
            // QuickTime files older than the `ftyp` atom.
            Some(Container::Mov)
        } else if at(0, b"\x1a\x45\xdf\xa3") {
            let webm = head.windows(4).any(|word| word == b"webm");
            Some(if webm { Container::WebM } else { Container::Matroska })
        } else if at(0, b"RIFF") && at(8, b"AVI ") {
            Some(Container::Avi)
        } else if at(0, b"GIF87a") || at(0, b"GIF89a") {
            Some(Container::Gif)
        } else if at(0, b"G") && at(188, b"G") || at(4, b"G") && at(196, b"G") {
            // A sync byte each 188 bytes, or 192 with the time stamps of recorders.
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
        }
    }

    /// As people call it.
    pub fn name(self) -> &'static str {
        match self {
            Container::Mp4 => "mp4",
            Container::Mov => "mov",
            Container::Matroska => "mkv",
            Container::WebM => "webm",
            Container::Avi => "avi",
            Container::Gif => "gif",
            Container::MpegTs => "ts",
        }
    }
}

/// What is known of a video before decoding it.
#[derive(Debug)]
pub struct Probe {
    pub container: Container,
    pub codec: String,
    /// ffmpeg's name of it.
    pixel_format: String,
    /// Displayed size, pixels (the stored size turned by `orientation`).
    pub width: usize,
    pub height: usize,
    pub orientation: Orientation,
    /// Shared with the blocking pool: anything that walks through it takes long.
    pub packets: Arc<PacketTable>,
    /// As the packets tell it.
    pub timeline: Arc<Timeline>,
    /// Promised and present frames, by the packets and the file's length.
    pub completeness: Completeness,
}

impl Probe {
    /// Whether a GPU gives the very frames that the processor gives: it has 8 bits and half the resolution of colours, in
    /// the range of television.
    pub fn fits_gpu(&self) -> bool {
        const CODECS: [&str; 7] = ["h264", "hevc", "vp8", "vp9", "av1", "mpeg2video", "mpeg4"];
        self.pixel_format == "yuv420p" && CODECS.contains(&self.codec.as_str())
    }
}

/// Probes `file`. The errors are the client's: not a video, not allowed, damaged, too long or too large.
pub async fn probe(tools: &Tools, file: &Path, config: &MediaConfig) -> Result<Probe, MediaError> {
    let container = sniff_file(file).await?;
    let (opened, claims) = FileClaims::open(file, container).await?;
    let mut command = tools.ffprobe()?;
    command
        .args(["-f", container.demuxer(), "-select_streams", "V:0", "-show_entries", ENTRIES])
        .args(["-of", "compact"])
        .arg(file_url(file));
    let running = tools.start(command)?;
    let mut report = Report { max_packets: config.max_video_packets, ..Report::default() };
    let mut complaints = Complaints::default();
    tokio::try_join!(
        read_lines(running.stdout, |line| report.take(line)),
        read_lines(running.stderr, |line| {
            complaints.take(line);
            Ok(())
        })
    )?;
    let status = finish(running.child).await?;
    complaints.judge(config)?;
    if !status.success() {
        return Err(damaged());
    }
    let config = config.clone();
    // Sorting a long video's packets takes up to 100 ms.
    let check = tokio::task::spawn_blocking(move || {
        report.check(&Source { file: &opened, container, claims }, &config)
    });
    check.await.expect("checking a report does not panic: this is a bug")
}

/// An input name that ffmpeg cannot take for an option or another protocol.
pub fn file_url(file: &Path) -> std::ffi::OsString {
    let mut url = std::ffi::OsString::from("file:");
    url.push(file);
    url
}

async fn sniff_file(file: &Path) -> Result<Container, MediaError> {
    let file = file.to_owned();
    let read = tokio::task::spawn_blocking(move || {
        let mut head = Vec::with_capacity(256);
        File::open(file)?.take(256).read_to_end(&mut head)?;
        Ok::<_, std::io::Error>(head)
    });
    let head = read.await.expect("reading a file does not panic: this is a bug").map_err(|error| {
        tracing::error!(%error, "a video file vanished");
        MediaError::Internal("the video file could not be read; try again".into())
    })?;
    Container::sniff(&head).ok_or_else(|| {
        let message = match image::guess_format(&head) {
            Ok(ImageFormat::Jpeg | ImageFormat::Png | ImageFormat::WebP) => {
                "this is a picture, not a video; send it as an image_url part"
            }
            _ => "this is not a video file that is accepted; send mp4, mov, mkv, webm, avi, gif or ts",
        };
        MediaError::Unsupported(message.into())
    })
}

fn damaged() -> MediaError {
    MediaError::Undecodable(
        "the video file is damaged or incomplete; check that it plays and send it again".into(),
    )
}

/// ffprobe's error lines that say what is wrong with a file.
#[derive(Debug, Default)]
struct Complaints {
    container_refused: bool,
    /// The first codec that is not on the list: of the video or of another stream.
    codec_refused: Option<String>,
    too_many_pixels: bool,
}

impl Complaints {
    fn take(&mut self, line: &str) {
        tracing::debug!(line, "ffprobe");
        self.too_many_pixels |= line.contains("exceeds specified max pixel count");
        self.container_refused |= line.contains("Format not on whitelist");
        if let Some((_, rest)) = line.split_once("Codec (")
            && let Some((codec, _)) = rest.split_once(") not on whitelist")
        {
            self.codec_refused.get_or_insert_with(|| codec.to_owned());
        }
    }

    fn judge(&self, config: &MediaConfig) -> Result<(), MediaError> {
        if self.too_many_pixels {
            return Err(too_large(config));
        }
        if let Some(codec) = &self.codec_refused {
            return Err(codec_refused(codec));
        }
        if self.container_refused {
            return Err(MediaError::Unsupported("this container is not accepted; send mp4 or webm".into()));
        }
        Ok(())
    }
}

fn codec_refused(codec: &str) -> MediaError {
    let allowed = ALLOWED_CODECS.join(", ");
    MediaError::Unsupported(format!(
        "the file's codec {codec} is not accepted; send video as one of {allowed}"
    ))
}

fn too_large(config: &MediaConfig) -> MediaError {
    MediaError::Undecodable(format!(
        "the video's frames are too large: at most {} pixels a side and {} in all are accepted",
        config.max_frame_side, config.max_frame_pixels
    ))
}

/// ffprobe's output, collected.
#[derive(Debug, Default)]
struct Report {
    max_packets: usize,
    packets: Vec<Packet>,
    codec: Option<String>,
    pixel_format: String,
    width: usize,
    height: usize,
    time_base: Option<(u32, u32)>,
    frame_rates: Vec<f64>,
    has_b_frames: bool,
    /// By the container's header.
    claimed_frames: Option<usize>,
    matrix: Vec<i64>,
    /// Seconds, as the container claims.
    duration: Option<f64>,
}

impl Report {
    fn take(&mut self, line: &str) -> Result<(), MediaError> {
        if let Some(fields) = line.strip_prefix("packet|") {
            if self.packets.len() == self.max_packets {
                return Err(MediaError::Undecodable(format!(
                    "the video has more than {} frames; send a shorter one",
                    self.max_packets
                )));
            }
            self.packets.push(packet(fields));
        } else if let Some(fields) = line.strip_prefix("stream|") {
            for (key, value) in pairs(fields) {
                self.take_stream_field(key, value);
            }
            if let Some((_, row)) = fields.split_once("displaymatrix=") {
                self.take_matrix_row(row);
            }
        } else if let Some(fields) = line.strip_prefix("format|") {
            self.duration =
                pairs(fields).find(|(key, _)| *key == "duration").and_then(|(_, v)| v.parse().ok());
        } else if line.starts_with("0000000") {
            self.take_matrix_row(line);
        }
        Ok(())
    }

    fn take_stream_field(&mut self, key: &str, value: &str) {
        match key {
            "codec_name" => self.codec = Some(value.to_owned()),
            "pix_fmt" => self.pixel_format = value.to_owned(),
            "width" => self.width = value.parse().unwrap_or(0),
            "height" => self.height = value.parse().unwrap_or(0),
            "nb_frames" => self.claimed_frames = value.parse().ok(),
            "has_b_frames" => self.has_b_frames = value != "0",
            "time_base" => self.time_base = fraction(value),
            "avg_frame_rate" | "r_frame_rate" => {
                self.frame_rates.extend(fraction(value).map(|(n, d)| f64::from(n) / f64::from(d)));
            }
            _ => {}
        }
    }

    /// A row of the display matrix, `00000001:  0  65536  0`; in some versions the rows come with `\n` written out.
    fn take_matrix_row(&mut self, text: &str) {
        for row in text.split("\\n") {
            if let Some((_, numbers)) = row.split_once(':') {
                let numbers = numbers.split(|c: char| c != '-' && !c.is_ascii_digit());
                self.matrix.extend(numbers.filter_map(|number| number.parse::<i64>().ok()).take(3));
            }
        }
    }

    fn check(mut self, source: &Source<'_>, config: &MediaConfig) -> Result<Probe, MediaError> {
        let Some(codec) = self.codec else {
            return Err(MediaError::Undecodable("the file has no video stream; send a video".into()));
        };
        if !ALLOWED_CODECS.contains(&codec.as_str()) {
            return Err(codec_refused(&codec));
        }
        let (Some(time_base), 1.., 1..) = (self.time_base, self.width, self.height) else {
            return Err(damaged());
        };
        let pixels = self.width.saturating_mul(self.height);
        if self.width.max(self.height) > config.max_frame_side || pixels > config.max_frame_pixels {
            return Err(too_large(config));
        }
        if self.packets.is_empty() {
            return Err(damaged());
        }
        // The average is what players count by; files without one have a base rate at least.
        let rate = self.frame_rates.iter().copied().find(|rate| (0.01..1000.0).contains(rate));
        let completeness = Completeness::of_packets(&mut self.packets, self.claimed_frames, source);
        completeness.check(config.min_decoded_share)?;
        let container = source.container;
        let may_jump = container == Container::MpegTs;
        let clock = Clock { time_base, nominal_rate: rate.unwrap_or(25.0), may_jump };
        let packets = PacketTable::new(self.packets, clock, self.has_b_frames);
        let timeline = packets.timeline();
        let seconds = timeline.duration.max(self.duration.unwrap_or(0.0));
        if seconds > config.max_video_seconds {
            return Err(MediaError::Undecodable(format!(
                "the video lasts {seconds:.0} s; at most {:.0} s are accepted",
                config.max_video_seconds
            )));
        }
        let orientation = Orientation::from_matrix(&self.matrix);
        let (mut width, mut height) = (self.width, self.height);
        if orientation.swaps_sides {
            (width, height) = (height, width);
        }
        let (packets, timeline, pixel_format) = (Arc::new(packets), Arc::new(timeline), self.pixel_format);
        Ok(Probe {
            container,
            codec,
            pixel_format,
            width,
            height,
            orientation,
            packets,
            timeline,
            completeness,
        })
    }
}

/// `key=value` fields of ffprobe's compact writer.
fn pairs(fields: &str) -> impl Iterator<Item = (&str, &str)> {
    fields.split('|').filter_map(|field| field.split_once('='))
}

/// `25/1` -> (25, 1); none if either is 0.
fn fraction(text: &str) -> Option<(u32, u32)> {
    let (numerator, denominator) = text.split_once('/')?;
    let (n, d) = (numerator.parse().ok()?, denominator.parse().ok()?);
    (n > 0 && d > 0).then_some((n, d))
}

fn packet(fields: &str) -> Packet {
    let mut packet = Packet::default();
    let (mut position, mut len) = (None, None);
    for (key, value) in pairs(fields) {
        match key {
            "pts" => packet.pts = value.parse().ok(),
            "dts" => packet.dts = value.parse().ok(),
            "duration" => packet.duration = value.parse().unwrap_or(0),
            "pos" => position = value.parse().ok(),
            "size" => len = value.parse().ok(),
            "flags" => {
                packet.key = value.contains('K');
                packet.discard = value.contains('D');
            }
            _ => {}
        }
    }
    packet.place = position.zip(len);
    packet
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn containers_are_known_by_their_first_bytes() {
        let mut ts = vec![0u8; 256];
        (ts[0], ts[188]) = (b'G', b'G');
        let cases: [(&[u8], Option<Container>); 10] = [
            (b"\0\0\0\x20ftypisom....", Some(Container::Mp4)),
            (b"\0\0\0\x14ftypqt  ....", Some(Container::Mov)),
            (b"\0\0\0\x08wide\0\0\0\0mdat", Some(Container::Mov)),
            (b"\x1a\x45\xdf\xa3\x9fB\x86\x81\x01B\x82\x84webmB", Some(Container::WebM)),
            (b"\x1a\x45\xdf\xa3\x9fB\x86\x81\x01B\x82\x88matroska", Some(Container::Matroska)),
            (b"RIFF\0\0\0\0AVI LIST", Some(Container::Avi)),
            (b"GIF89a\x10\0", Some(Container::Gif)),
            (&ts, Some(Container::MpegTs)),
            (b"#EXTM3U\n#EXT-X-VERSION:3\n", None),
            (b"ffconcat version 1.0\nfile /etc/passwd\n", None),
        ];
        for (head, expected) in cases {
            assert_eq!(Container::sniff(head), expected, "{:?}", String::from_utf8_lossy(head));
        }
        for length in 0..12 {
            Container::sniff(&ts[..length]);
        }
    }

    #[test]
    fn ffprobe_output_is_read_field_by_field() {
        let mut report = Report { max_packets: 2, ..Report::default() };
        for line in [
            "packet|pts=512|dts=-512|duration=512|size=99|pos=48|flags=KD_|side_data|",
            "packet|pts=N/A|dts=0|duration=N/A|size=99|pos=N/A|flags=__",
            "",
            "program|stream|codec_name=wrong",
            "stream|codec_name=h264|width=64|height=36|time_base=1/12800|avg_frame_rate=0/0|r_frame_rate=25/1\
             |has_b_frames=2|side_data|displaymatrix=",
            "00000000:            0       65536           0",
            "00000001:       -65536           0           0",
            "00000002:            0           0  1073741824",
            "",
            "format|duration=10.5",
        ] {
            report.take(line).unwrap();
        }
        let first = Packet {
            pts: Some(512),
            dts: Some(-512),
            duration: 512,
            key: true,
            discard: true,
            place: Some((48, 99)),
        };
        assert_eq!(report.packets, [first, Packet { dts: Some(0), ..Packet::default() }]);
        assert_eq!(report.matrix[..5], [0, 65536, 0, -65536, 0]);
        assert_eq!((report.duration, report.has_b_frames), (Some(10.5), true));
        assert_eq!(report.frame_rates, [25.0]);
        assert!(report.take("packet|pts=3").is_err());
        let claims = FileClaims { encrypted: false, promised_bytes: 300, present_bytes: 300 };
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 300]).unwrap();
        let source = Source { file: &file, container: Container::Mp4, claims };
        let probe = report.check(&source, &MediaConfig::default()).unwrap();
        assert_eq!((probe.width, probe.height, probe.codec.as_str()), (36, 64, "h264"));
    }
}
