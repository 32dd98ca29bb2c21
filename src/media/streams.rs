//! The streams of a file, parsed from ffmpeg's log, and the choice of the video stream.
//!
//! Called by `probe.rs`. Pure: no files, no processes. Must never refuse a file for a stream that
//! is not chosen.

/// Most streams that are kept, as in ffmpeg.
const MAX_STREAMS: usize = 1000;
/// Streams of at least this many frames count as equal in this respect.
const ENOUGH_FRAMES: usize = 5;
/// Dispositions of video streams that are not videos: covers, previews, layers of another stream.
const NOT_VIDEO: [&str; 4] = ["(attached pic)", "(still image)", "(timed thumbnails)", "(dependent)"];

/// One stream of a file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stream {
    /// ffmpeg's index.
    pub index: usize,
    /// The container's id, if it has ids: in MP4 and MOV the track id.
    pub id: Option<u32>,
    /// "video", "audio", "subtitle", "data", "attachment".
    pub kind: String,
    pub codec: String,
    /// The container's name of the codec (FourCC).
    pub tag: Option<String>,
    pub pixel_format: String,
    /// Stored size, pixels; 0 if unknown.
    pub width: usize,
    pub height: usize,
    /// Average or, where there is none, base rate, frames a second.
    pub frame_rate: Option<f64>,
    /// Bit rate stated by the container; 0 if unknown.
    pub kilobits_per_second: u64,
    /// Rotation for display, degrees counterclockwise.
    pub rotation_degrees: Option<f64>,
    /// An attached picture, which ffmpeg's specifier `V` leaves out.
    pub is_attached: bool,
    /// One of [`NOT_VIDEO`].
    pub is_picture: bool,
    pub is_default: bool,
    pub is_for_impaired: bool,
}

/// The header of ffmpeg's log.
#[derive(Debug, Default)]
pub struct StreamList {
    pub streams: Vec<Stream>,
    /// The file's start time, seconds.
    pub start_seconds: Option<f64>,
    is_complete: bool,
    is_listing: bool,
    /// Position in `streams` of the last stream listed.
    current: Option<usize>,
}

impl StreamList {
    /// Takes a line of ffmpeg's log. Returns true once, when all streams are listed.
    pub fn take(&mut self, line: &str) -> bool {
        let line = line.strip_prefix("[info] ").unwrap_or(line);
        let ends = line.starts_with("Output #0") || line.starts_with("Stream mapping");
        if self.is_listing && ends {
            (self.is_listing, self.is_complete) = (false, true);
            return true;
        }
        if line.starts_with("Input #0") {
            self.is_listing = !self.is_complete;
        } else if self.is_listing {
            self.take_detail(line.trim_start());
        }
        false
    }

    fn take_detail(&mut self, line: &str) {
        if let Some(stream) = Stream::parse(line) {
            // Of several programs, each lists the streams that they share.
            self.current = self.streams.iter().position(|known| known.index == stream.index);
            if self.current.is_none() && self.streams.len() < MAX_STREAMS {
                self.current = Some(self.streams.len());
                self.streams.push(stream);
            }
        } else if let Some(rest) = line.strip_prefix("displaymatrix: rotation of ") {
            let degrees = rest.split(' ').next().and_then(|degrees| degrees.parse().ok());
            if let Some(current) = self.current {
                self.streams[current].rotation_degrees = degrees;
            }
        } else if line.starts_with("Duration: ")
            && let Some((_, rest)) = line.split_once(", start: ")
        {
            self.start_seconds = rest.split(',').next().and_then(|seconds| seconds.parse().ok());
        }
    }

    /// Returns the streams that can be the video.
    pub fn candidates(&self) -> Vec<&Stream> {
        self.streams.iter().filter(|stream| stream.kind == "video" && !stream.is_picture).collect()
    }

    /// Returns the stream that ffmpeg's specifier `0:V:0` selects.
    pub fn first_video(&self) -> Option<&Stream> {
        self.streams.iter().find(|stream| stream.kind == "video" && !stream.is_attached)
    }

    /// Chooses the video as libavformat's `av_find_best_stream` does, which players and decord
    /// use: the default stream, then one of several frames, then the one of the highest bit rate.
    /// Among equals it chooses, as ffmpeg does, the largest, then the first. `frames` returns the
    /// number of frames of the stream of an index.
    pub fn best(&self, frames: impl Fn(usize) -> usize) -> Option<&Stream> {
        let mut best = None;
        let mut best_rank = None;
        for stream in self.candidates() {
            let rank = Some((
                usize::from(!stream.is_for_impaired) + usize::from(stream.is_default),
                frames(stream.index).min(ENOUGH_FRAMES),
                stream.kilobits_per_second,
                stream.width.saturating_mul(stream.height),
            ));
            if rank > best_rank {
                (best, best_rank) = (Some(stream), rank);
            }
        }
        best
    }

    /// Returns the kinds of all streams but `chosen`, each once, in the file's order.
    pub fn others(&self, chosen: usize) -> Vec<String> {
        let mut kinds = Vec::new();
        for stream in self.streams.iter().filter(|stream| stream.index != chosen) {
            let kind = if stream.is_picture { "picture" } else { &stream.kind };
            if !kinds.iter().any(|known| known == kind) {
                kinds.push(kind.to_owned());
            }
        }
        kinds
    }
}

impl Stream {
    /// Parses `Stream #0:1[0x2](und): Video: h264 (High) (avc1 / 0x31637661), yuv420p(tv, bt709),
    /// 320x256 [SAR 1:1 DAR 5:4], 14 kb/s, 25 fps, 25 tbr, 12800 tbn (default)`.
    fn parse(line: &str) -> Option<Self> {
        let rest = line.strip_prefix("Stream #0:")?;
        let index_digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let index = rest[..index_digits].parse().ok()?;
        let (names, rest) = rest[index_digits..].split_once(": ")?;
        let id = names.strip_prefix("[0x").and_then(|id| u32::from_str_radix(id.split(']').next()?, 16).ok());
        let (kind, description) = rest.split_once(": ")?;
        let parts = split_outside_brackets(description);
        let codec_part = parts.first()?;
        let mut stream = Stream {
            index,
            id,
            kind: kind.to_lowercase(),
            codec: codec_part.split(' ').next()?.to_owned(),
            tag: codec_part.rsplit_once('(').and_then(|(_, tag)| Some(tag.split_once(" / 0x")?.0.to_owned())),
            is_attached: description.contains(NOT_VIDEO[0]),
            is_picture: NOT_VIDEO.iter().any(|word| description.contains(word)),
            is_default: description.contains("(default)"),
            is_for_impaired: description.contains("(visual impaired)")
                || description.contains("(hearing impaired)"),
            ..Stream::default()
        };
        if let Some(format) = parts.get(1) {
            stream.pixel_format = format.split('(').next()?.to_owned();
        }
        for part in &parts[1..] {
            stream.take_part(part);
        }
        Some(stream)
    }

    fn take_part(&mut self, part: &str) {
        if let Some(rate) = part.strip_suffix(" kb/s") {
            self.kilobits_per_second = rate.parse().unwrap_or(0);
        } else if let Some(rate) = part.strip_suffix(" fps") {
            self.frame_rate = frame_rate(rate);
        } else if let Some(rate) = part.strip_suffix(" tbr") {
            self.frame_rate = self.frame_rate.or(frame_rate(rate));
        } else if self.width == 0
            && let Some((width, rest)) = part.split_once('x')
            && let (Ok(width), Ok(height)) =
                (width.parse(), rest.split(' ').next().unwrap_or_default().parse())
        {
            (self.width, self.height) = (width, height);
        }
    }
}

/// Splits at commas outside of brackets.
fn split_outside_brackets(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0usize, 0);
    for (position, byte) in text.bytes().enumerate() {
        match byte {
            b'(' | b'[' => depth += 1,
            b')' | b']' => depth = depth.saturating_sub(1),
            b',' if depth == 0 => {
                parts.push(text[start..position].trim());
                start = position + 1;
            }
            _ => {}
        }
    }
    parts.push(text[start..].trim());
    parts
}

/// Parses a rate that ffmpeg prints with at most two decimals, or in thousands. NTSC rates
/// (30000/1001 and the like) get their exact value.
fn frame_rate(text: &str) -> Option<f64> {
    let rate: f64 = match text.strip_suffix('k') {
        Some(thousands) => thousands.parse::<f64>().ok()? * 1000.0,
        None => text.parse().ok()?,
    };
    let ntsc = (rate.round() * 1000.0) / 1001.0;
    let exact = if rate != rate.round() && (ntsc - rate).abs() <= 0.0051 { ntsc } else { rate };
    (exact > 0.0).then_some(exact)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(lines: &[&str]) -> StreamList {
        let mut list = StreamList::default();
        for line in ["[info] Input #0, matroska,webm, from 'file:a':"].iter().chain(lines) {
            assert!(!list.take(line));
        }
        assert!(list.take("[info] Output #0, framecrc, to 'pipe:1':"));
        assert!(!list.take("[info] Stream mapping:"));
        list.take("[info]   Stream #0:0: Video: none, 1x1, 25 fps, 25 tbr, 1k tbn");
        list
    }

    #[test]
    fn streams_are_read_from_the_log_of_every_version() {
        let list = list(&[
            "[info]   Duration: 00:00:03.68, start: 1.800000, bitrate: 66 kb/s",
            "[info]   Program 1 ",
            "[info]   Stream #0:0[0x100](und): Video: h264 (High) (avc1 / 0x31637661), yuv420p(tv, bt709, progressive), \
             320x256 [SAR 1:1 DAR 5:4], 14 kb/s, 29.97 fps, 25 tbr, 90k tbn (default)",
            "[info]     Side data:",
            "[info]       displaymatrix: rotation of -90.00 degrees",
            "[info]   Stream #0:1(eng): Audio: truehd, 48000 Hz, stereo, s32 (24 bit) (default)",
            "[info]   Stream #0:2[0x3]: Video: none (DIVF / 0x46564944), none, 64x48, 25 tbr, 1k tbn, 50 tbc",
            "[info]   Stream #0:3: Video: png, rgb24(pc), 600x600, 90k tbr, 90k tbn (attached pic)",
            "[info]   Program 2 ",
            "[info]   Stream #0:0[0x100](und): Video: h264 (High), yuv420p, 320x256, 25 fps, 25 tbr, 90k tbn",
            "[info]   Stream #0:4: Subtitle: dvb_teletext ([6][0][0][0] / 0x0006)",
        ]);
        assert_eq!(list.start_seconds, Some(1.8));
        assert_eq!(list.streams.len(), 5);
        let video = &list.streams[0];
        assert_eq!((video.index, video.id, video.codec.as_str()), (0, Some(0x100), "h264"));
        assert_eq!((video.pixel_format.as_str(), video.width, video.height), ("yuv420p", 320, 256));
        assert_eq!((video.kilobits_per_second, video.rotation_degrees), (14, Some(-90.0)));
        assert_eq!(video.frame_rate, Some(30000.0 / 1001.0));
        let unknown = &list.streams[2];
        assert_eq!((unknown.codec.as_str(), unknown.tag.as_deref()), ("none", Some("DIVF")));
        assert_eq!((unknown.width, unknown.frame_rate), (64, Some(25.0)));
        let candidates: Vec<usize> = list.candidates().iter().map(|stream| stream.index).collect();
        assert_eq!(candidates, [0, 2]);
        assert_eq!(list.others(0), ["audio", "video", "picture", "subtitle"]);
    }

    #[test]
    fn the_best_video_is_the_default_then_the_moving_then_the_richest_then_the_largest() {
        let best = |streams: [&str; 2], frames: [usize; 2]| {
            let lines = [0, 1]
                .map(|index| format!("[info]   Stream #0:{index}: Video: h264, yuv420p, {}", streams[index]));
            list(&[&lines[0], &lines[1]]).best(|index| frames[index]).unwrap().index
        };
        let many = [100, 100];
        let (small, large) = ("80x64, 25 fps, 1k tbn", "320x256, 25 fps, 1k tbn");
        assert_eq!(best([small, large], many), 1);
        assert_eq!(best([small, small], many), 0, "the first among equals");
        assert_eq!(best(["80x64, 25 fps, 1k tbn (default)", large], many), 0);
        assert_eq!(best([large, small], [1, 100]), 1, "a picture of one frame");
        assert_eq!(best([large, small], [6, 100]), 0);
        assert_eq!(best(["80x64, 90 kb/s, 1k tbn", "320x256, 80 kb/s, 1k tbn"], many), 0);
        assert_eq!(best(["80x64, 25 fps, 1k tbn (visual impaired)", small], many), 1);
        assert_eq!(best(["320x256, 1k tbn (default) (still image)", small], many), 1);
        assert!(list(&["[info]   Stream #0:0: Video: png, 8x8 (attached pic)"]).best(|_| 9).is_none());
    }

    #[test]
    fn printed_rates_are_those_meant() {
        for (text, rate) in [("23.98", 24000.0 / 1001.0), ("59.94", 60000.0 / 1001.0), ("12.50", 12.5)] {
            assert_eq!(frame_rate(text), Some(rate), "{text}");
        }
        assert_eq!((frame_rate("1k"), frame_rate("25"), frame_rate("0")), (Some(1000.0), Some(25.0), None));
    }

    proptest! {
        #[test]
        fn any_line_is_read_without_harm(line in "(Stream #0:)?.{0,200}") {
            let mut list = StreamList::default();
            let huge = format!("Stream #0:4: Video: h264, {0}x{0}", usize::MAX);
            for line in ["Input #0", &line, &format!("[info]   Stream #0:3: {line}"), &huge] {
                list.take(line);
            }
            list.best(|index| index);
        }
    }
}
