//! Looks into a video file before anything is decoded: what it is, how large, and when its frames are shown.
//!
//! Called by `mod.rs`. ffmpeg lists the file's streams and copies the packets of the video,
//! printing their properties. It opens the decoders on the list only: other streams may have any
//! codec. Must never let ffmpeg guess the container: `container.rs` chooses the demuxer.

use std::{fs::File, io::Read, path::Path, sync::Arc};

use super::{
    MediaError,
    claims::FileClaims,
    clock::Clock,
    completeness::{Completeness, Source},
    container::{Container, HEAD_BYTES, HOW_TO_CONVERT},
    ffmpeg::{ALLOWED_CODECS, Tools, finish, read_lines},
    frame_sampling::Timeline,
    mp4_boxes::sample_count,
    orientation::Orientation,
    packet_list::{PRINT_PACKETS, PacketList},
    packet_table::{Packet, PacketTable},
    streams::{Stream, StreamList},
};
use crate::config::MediaConfig;

/// Most video streams of one file whose frames are counted.
const MAX_RENDITIONS: usize = 16;

/// What is known of a video before decoding it.
#[derive(Debug)]
pub struct Probe {
    pub container: Container,
    pub codec: String,
    /// ffmpeg's index of the video stream.
    pub stream_index: usize,
    /// The container's id of the video stream: in MP4 and MOV the track id.
    pub track_id: Option<u32>,
    /// Kinds of the other streams, each once.
    pub ignored_streams: Vec<String>,
    /// ffmpeg's name of the pixel format.
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
    let prober = Prober { tools, file, container, config };
    let mut listing = prober.list(&["0:V:0".to_owned()], &PRINT_PACKETS).await?;
    if listing.streams.streams.is_empty() {
        listing.complaints.judge()?;
        return Err(damaged());
    }
    let stream = prober.choose(&listing.streams).await?;
    refuse_codec(&stream)?;
    if listing.streams.first_video().map(|first| first.index) != Some(stream.index) {
        listing = prober.list(&[format!("0:{}", stream.index)], &PRINT_PACKETS).await?;
    }
    listing.complaints.judge()?;
    if !listing.succeeded {
        return Err(damaged());
    }
    let config = config.clone();
    // Sorting a long video's packets takes up to 100 ms.
    let check = tokio::task::spawn_blocking(move || {
        listing.check(&stream, &Source { file: &opened, container, claims }, &config)
    });
    check.await.expect("checking a listing does not panic: this is a bug")
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
        let mut head = Vec::with_capacity(HEAD_BYTES);
        File::open(file)?.take(HEAD_BYTES as u64).read_to_end(&mut head)?;
        Ok::<_, std::io::Error>(head)
    });
    let head = read.await.expect("reading a file does not panic: this is a bug").map_err(|error| {
        tracing::error!(%error, "a video file vanished");
        MediaError::Internal("the video file could not be read; try again".into())
    })?;
    Container::sniff(&head)
}

/// Runs of ffmpeg on one file that decode nothing.
struct Prober<'a> {
    tools: &'a Tools,
    file: &'a Path,
    container: Container,
    config: &'a MediaConfig,
}

/// The result of such a run.
#[derive(Debug, Default)]
struct Listing {
    streams: StreamList,
    packets: PacketList,
    complaints: Complaints,
    succeeded: bool,
}

impl Prober<'_> {
    /// Lists all streams and copies `streams` (ffmpeg's stream specifiers), each once per filter.
    async fn list(&self, streams: &[String], filters: &[&str]) -> Result<Listing, MediaError> {
        let mut command = self.tools.ffmpeg(1)?;
        command.arg("-copyts").args(["-f", self.container.demuxer(), "-i"]).arg(file_url(self.file));
        for stream in streams {
            for _ in 0..filters.len().max(1) {
                command.args(["-map", stream]);
            }
        }
        // The decoder sees packets before the first keyframe too. Times keep the container's unit.
        command.args(["-c", "copy", "-copyinkf", "-copytb", "1"]);
        for (output, filter) in filters.iter().enumerate() {
            command.args([&format!("-bsf:{output}"), *filter]);
        }
        command.args(["-flush_packets", "0", "-f", "framecrc", "pipe:1"]);
        let running = self.tools.start(command)?;
        let mut packets = PacketList::new(self.config.max_video_packets);
        let (mut list, mut complaints) = (StreamList::default(), Complaints::default());
        tokio::try_join!(
            read_lines(running.stdout, |line| packets.take(line)),
            read_lines(running.stderr, |line| {
                complaints.take(line);
                if !list.take(line) {
                    return Ok(());
                }
                match list.candidates()[..] {
                    // Ends the run early if the file is refused.
                    [only] => refuse_codec(only),
                    _ => Ok(()),
                }
            })
        )?;
        let succeeded = finish(running.child).await?.success();
        Ok(Listing { streams: list, packets, complaints, succeeded })
    }

    /// Chooses the video stream. If there are several, counts their frames first.
    async fn choose(&self, streams: &StreamList) -> Result<Stream, MediaError> {
        let candidates = streams.candidates();
        let mut frames = Vec::new();
        if candidates.len() > 1 {
            let copied = candidates.iter().take(MAX_RENDITIONS);
            let names: Vec<String> = copied.map(|stream| format!("0:{}", stream.index)).collect();
            frames = self.list(&names, &[]).await?.packets.counts;
        }
        let position = |index| candidates.iter().position(|stream| stream.index == index);
        let count = |index| position(index).and_then(|position| frames.get(position).copied()).unwrap_or(0);
        streams
            .best(count)
            .cloned()
            .ok_or_else(|| MediaError::Undecodable("the file has no video stream; send a video".into()))
    }
}

fn damaged() -> MediaError {
    MediaError::Undecodable(
        "the video file is damaged or incomplete; check that it plays and send it again".into(),
    )
}

fn refuse_codec(stream: &Stream) -> Result<(), MediaError> {
    if ALLOWED_CODECS.contains(&stream.codec.as_str()) {
        return Ok(());
    }
    let name = match &stream.tag {
        Some(tag) if stream.codec == "none" => format!("{tag:?}"),
        _ => stream.codec.clone(),
    };
    let name: String = name.chars().take(40).collect();
    Err(MediaError::Unsupported(format!("the video's codec {name} is not accepted; {HOW_TO_CONVERT}")))
}

/// ffmpeg's lines that say what is wrong with a file.
#[derive(Debug, Default)]
struct Complaints {
    container_refused: bool,
    too_many_pixels: bool,
}

impl Complaints {
    fn take(&mut self, line: &str) {
        tracing::trace!(line, "ffmpeg");
        self.too_many_pixels |= line.contains("exceeds specified max pixel count");
        self.container_refused |= line.contains("Format not on whitelist");
    }

    fn judge(&self) -> Result<(), MediaError> {
        if self.container_refused {
            return Err(MediaError::Unsupported("this container is not accepted; send mp4 or webm".into()));
        }
        Ok(())
    }
}

fn too_large(config: &MediaConfig) -> MediaError {
    MediaError::Undecodable(format!(
        "the video's frames are too large: at most {} pixels a side and {} in all are accepted",
        config.max_frame_side, config.max_frame_pixels
    ))
}

impl Listing {
    /// Checks the limits and builds the packet table. Blocks.
    fn check(self, stream: &Stream, source: &Source<'_>, config: &MediaConfig) -> Result<Probe, MediaError> {
        let Listing { streams, mut packets, complaints, .. } = self;
        let (width, height) = packets.size;
        let (Some(time_base), 1.., 1..) = (packets.time_base, width, height) else {
            return Err(if complaints.too_many_pixels { too_large(config) } else { damaged() });
        };
        if width.max(height) > config.max_frame_side || width.saturating_mul(height) > config.max_frame_pixels
        {
            return Err(too_large(config));
        }
        if packets.packets.is_empty() {
            return Err(damaged());
        }
        let claimed_frames = stream.id.and_then(|id| sample_count(source.file, id));
        let completeness = Completeness::of_packets(&mut packets.packets, claimed_frames, source);
        completeness.check(config.min_decoded_share)?;
        // Without a pts on the first packet (AVI with B-frames), the clock of decoded frames is a
        // guess.
        let is_timed = packets.packets.first().is_some_and(|packet| packet.pts.is_some());
        let stated = stream.frame_rate.filter(|rate| (0.01..1000.0).contains(rate));
        let counted = decoding_rate(&packets.packets, time_base).filter(|_| !is_timed);
        let clock = Clock {
            time_base,
            nominal_rate: counted.or(stated).unwrap_or(25.0),
            may_jump: source.container == Container::MpegTs,
            file_start: streams.start_seconds.filter(|_| is_timed),
        };
        let table = PacketTable::new(packets.packets, clock, packets.reorders);
        let timeline = table.timeline();
        if timeline.duration > config.max_video_seconds {
            return Err(MediaError::Undecodable(format!(
                "the video lasts {:.0} s; at most {:.0} s are accepted",
                timeline.duration, config.max_video_seconds
            )));
        }
        let orientation = Orientation::find(source.file, source.container, stream);
        let (width, height) = if orientation.swaps_sides { (height, width) } else { (width, height) };
        let start = streams.start_seconds;
        tracing::debug!(stream = stream.index, start, codec = stream.codec, "probed");
        Ok(Probe {
            container: source.container,
            codec: stream.codec.clone(),
            stream_index: stream.index,
            track_id: stream.id,
            ignored_streams: streams.others(stream.index),
            pixel_format: stream.pixel_format.clone(),
            width,
            height,
            orientation,
            packets: Arc::new(table),
            timeline: Arc::new(timeline),
            completeness,
        })
    }
}

/// Returns the frames per second by the decoding times of the packets.
fn decoding_rate(packets: &[Packet], time_base: (u32, u32)) -> Option<f64> {
    let (first, last) = (packets.first()?.dts?, packets.last()?.dts?);
    let seconds = (last as f64 - first as f64) * f64::from(time_base.0) / f64::from(time_base.1);
    let rate = (packets.len() - 1) as f64 / seconds;
    (0.01..1000.0).contains(&rate).then_some(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_codec_that_is_not_accepted_is_named_with_the_line_that_converts_it() {
        let refused = |codec: &str, tag: Option<&str>| {
            let stream = Stream { codec: codec.into(), tag: tag.map(str::to_owned), ..Stream::default() };
            refuse_codec(&stream).unwrap_err().to_string()
        };
        for (message, name) in [
            (refused("ffv1", Some("FFV1")), "codec ffv1 "),
            (refused("none", Some("DIVF")), "codec \"DIVF\" "),
        ] {
            assert!(message.contains(name) && message.contains("ffmpeg -i input"), "{message}");
        }
        assert!(refused(&"x".repeat(5000), None).len() < 300);
    }
}
