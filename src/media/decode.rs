//! Runs ffmpeg so that exactly the sampled frames come out of it, and checks that they are the right ones.
//!
//! Called by `mod.rs`. Three ways: one pass that is fed with nothing but the packets needed
//! (`packet_feed.rs`), short passes that seek near each sample and pick by display time, or one
//! pass over the whole file. The decoder logs every frame that it decodes and every frame that it
//! gives out (`decode_log.rs`); a pass whose log is not what the packet table promised is thrown
//! away and the whole file is decoded instead. Must never hold more than a few source-size frames,
//! and never trust a frame that was not checked.
//!
//! Color goes to RGB as decord does it, which made the frames that the model was trained on:
//! swscale with `bilinear`, range and matrix as tagged, BT.601 if untagged. Frames of another size
//! or pixel format than the first go the same way, to the first one's size.

use std::{collections::BTreeMap, fs::File, path::Path, sync::Arc};

use futures_util::{StreamExt, future::OptionFuture, stream};
use tokio::{io::AsyncReadExt, process::ChildStdout, task::JoinHandle};

use super::{
    MediaError,
    completeness::Completeness,
    decode_log::{DecodeLog, SHOWINFO},
    ffmpeg::{Manner, Tools, finish, pipe_failed, read_lines},
    frame_sampling::{Sampling, Timeline},
    packet_feed::Feed,
    packet_table::{PacketTable, Segment},
    places::DecoderPlaces,
    probe::{Container, Probe, file_url},
};
use crate::telemetry::Trail;

/// What ffmpeg says where no GPU can be used at all.
const NO_GPU: [&str; 2] = ["Device creation failed", "No device available for decoder"];
/// Of all videos that go to a GPU: see [`Probe::fits_gpu`].
const GPU_PIXEL_FORMAT: &str = "format=yuv420p";
/// Memory for source-size frames of all passes of one video; a pass holds two (one arrives, one is mapped).
const MAX_PASS_FRAMES_BYTES: usize = 256 << 20;
/// `eq(...)` terms of a select expression; every one is evaluated for every decoded frame.
type Terms = Vec<String>;

/// What is done with each frame `[height, width, 3]` as it arrives, on the blocking pool.
#[derive(Clone)]
pub struct FrameMap(Arc<dyn Fn(Vec<u8>) -> Vec<u8> + Send + Sync>);

impl FrameMap {
    pub fn new(map: impl Fn(Vec<u8>) -> Vec<u8> + Send + Sync + 'static) -> Self {
        FrameMap(Arc::new(map))
    }

    fn start(&self, frame: Vec<u8>) -> JoinHandle<Vec<u8>> {
        let map = self.0.clone();
        tokio::task::spawn_blocking(move || map(frame))
    }
}

/// Which way was taken, for logs and benchmarks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// One process got these packets and no others.
    NeededPackets {
        packets: usize,
    },
    Seeks {
        passes: usize,
    },
    WholeFile {
        passes: usize,
    },
}

/// The sampled frames.
#[derive(Debug)]
pub struct Decoded {
    /// Of the frames that the video has, by the decoder's or (seeking) the packets' account.
    pub timeline: Arc<Timeline>,
    /// Sampled display indices, ascending, possibly repeated.
    pub indices: Vec<usize>,
    /// One mapped frame for each distinct index, in order.
    pub frames: Vec<Vec<u8>>,
    pub way: Way,
    /// Promised frames, and those decoded without faults.
    pub completeness: Completeness,
}

/// Decodes one probed file.
pub struct Decoder<'a> {
    pub tools: &'a Tools,
    pub file: &'a Path,
    pub probe: &'a Probe,
    pub map: FrameMap,
    /// Places for processes. The caller holds one, for the first; further ones are taken only if free, so that no
    /// decoder ever waits while it holds a place.
    pub places: &'a DecoderPlaces,
    /// Counts what is decoded.
    pub trail: Trail,
    /// Least share of the frames that must be decodable, 0 to 1.
    pub min_decoded_share: f64,
}

/// What a run of ffmpeg reads.
enum Input {
    File { seek_seconds: Option<f64> },
    Fed(Arc<Feed>),
}

/// One run of ffmpeg.
struct Pass {
    input: Input,
    threads: usize,
    select: Terms,
    /// Decoding more frames than this is a failure.
    max_decoded: usize,
    /// Stop once all selected frames are out.
    stop_early: bool,
}

/// What one run gave.
struct PassOutput {
    /// Mapped frames, in the order that they came out.
    frames: Vec<Vec<u8>>,
    /// More frames came out than were wanted.
    surplus: bool,
    log: DecodeLog,
    /// ffmpeg exited with status 0.
    succeeded: bool,
}

impl PassOutput {
    /// Returns true if ffmpeg got as far as decoding.
    fn tells_of_the_video(&self) -> bool {
        self.succeeded || !self.log.decoded.is_empty() || self.log.damages() > 0
    }

    /// Returns the frames if their pts are `wanted` and the decoder reported no damage.
    fn exactly(self, wanted: &[i64]) -> Option<Vec<Vec<u8>>> {
        let given = self.log.selected.iter().take(self.frames.len());
        let given = given.map(|position| position.and_then(|position| self.log.decoded[position]));
        let exact = !self.surplus && self.log.damages() == 0 && given.eq(wanted.iter().copied().map(Some));
        exact.then_some(self.frames)
    }
}

impl Decoder<'_> {
    /// The frames that `sampling` asks for, by the cheapest way that is exact.
    pub async fn sample(&self, sampling: &Sampling) -> Result<Decoded, MediaError> {
        let timeline = self.probe.timeline.clone();
        let indices = sampling.indices(&timeline)?;
        let completeness = self.probe.completeness;
        if let Some(feed) = self.feed_plan(&indices).await {
            let way = Way::NeededPackets { packets: feed.num_packets() };
            if let Some(frames) = self.decode_fed(feed).await? {
                return Ok(Decoded { timeline, indices, frames, way, completeness });
            }
            tracing::info!("feeding the needed packets was not exact; decoding the whole video");
        } else if let Some(segments) = self.seek_plan(&indices).await {
            let way = Way::Seeks { passes: segments.len() };
            if let Some(frames) = self.decode_segments(segments).await? {
                return Ok(Decoded { timeline, indices, frames, way, completeness });
            }
            tracing::info!(codec = self.probe.codec, "seeking was not exact; decoding the whole video");
        }
        self.sample_whole_file(sampling).await
    }

    /// The same frames by decoding everything.
    pub async fn sample_whole_file(&self, sampling: &Sampling) -> Result<Decoded, MediaError> {
        let mut timeline = self.probe.timeline.clone();
        // Stamps of the frames in display order: what the packets promise, then what the first pass
        // saw.
        let mut stamps: Option<Vec<Option<i64>>> = None;
        for passes in 1..=2 {
            let indices = sampling.indices(&timeline)?;
            let wanted = distinct(&indices);
            let picked = wanted.clone();
            let pick = move |packets: &PacketTable| {
                select_terms(stamps.as_deref().unwrap_or(packets.shown()), &picked)
            };
            let pass = Pass {
                input: Input::File { seek_seconds: None },
                threads: self.tools.threads,
                select: self.on_packets(pick).await,
                max_decoded: usize::MAX,
                stop_early: false,
            };
            let output = self.run(pass).await?.filter(PassOutput::tells_of_the_video);
            let Some(PassOutput { frames, surplus, log, .. }) = output else { break };
            let completeness = self.probe.completeness.after_decoding(&log);
            completeness.check(self.min_decoded_share)?;
            let DecodeLog { decoded, selected, .. } = log;
            let seen = move |packets: &PacketTable| (Arc::new(packets.decoded_timeline(&decoded)), decoded);
            let (seen_timeline, decoded) = self.on_packets(seen).await;
            let exact = frames.len() == wanted.len()
                && !surplus
                && selected.iter().copied().eq(wanted.iter().copied().map(Some));
            timeline = seen_timeline;
            if exact && sampling.indices(&timeline)? == indices {
                let way = Way::WholeFile { passes };
                return Ok(Decoded { timeline, indices, frames, way, completeness });
            }
            stamps = Some(decoded);
        }
        Err(MediaError::Undecodable(
            "the video could not be decoded; check that it plays and send it again".into(),
        ))
    }

    async fn feed_plan(&self, indices: &[usize]) -> Option<Feed> {
        let can_be_told_apart =
            matches!(self.probe.container, Container::Mp4 | Container::Mov) && self.probe.codec == "h264";
        if !can_be_told_apart {
            return None;
        }
        let (file, wanted) = (self.file.to_owned(), distinct(indices));
        self.on_packets(move |packets| Feed::plan(File::open(file).ok()?, packets, &wanted)).await
    }

    /// The wanted frames of `feed`; none unless exactly the fed frames came out.
    async fn decode_fed(&self, feed: Feed) -> Result<Option<Vec<Vec<u8>>>, MediaError> {
        let feed = Arc::new(feed);
        let pass = Pass {
            input: Input::Fed(feed.clone()),
            threads: self.tools.threads,
            select: feed.wanted.iter().map(|time| format!("eq(pts,{time})")).collect(),
            max_decoded: feed.num_packets(),
            stop_early: true,
        };
        let Some(output) = self.run(pass).await? else { return Ok(None) };
        let times = 0..=feed.wanted.last().map_or(0, |&last| last as i64);
        let seen = output.log.decoded.iter().copied().take_while(|&time| time <= Some(*times.end()));
        let as_planned = seen.eq(times.clone().map(Some));
        let wanted: Vec<i64> = feed.wanted.iter().map(|&time| time as i64).collect();
        Ok(output.exactly(&wanted).filter(|_| as_planned))
    }

    async fn seek_plan(&self, indices: &[usize]) -> Option<Vec<Segment>> {
        // Pictures of a GIF are patches on the one before, whatever its packets claim.
        if self.probe.container == Container::Gif {
            return None;
        }
        let indexed = self.probe.container != Container::MpegTs;
        let pixels = self.probe.width * self.probe.height;
        let wanted = distinct(indices);
        self.on_packets(move |packets| packets.seek_plan(&wanted, pixels, indexed)).await
    }

    /// Does `work` on the blocking pool: there may be millions of packets.
    async fn on_packets<T: Send + 'static>(
        &self,
        work: impl FnOnce(&PacketTable) -> T + Send + 'static,
    ) -> T {
        let packets = self.probe.packets.clone();
        let work = tokio::task::spawn_blocking(move || work(&packets));
        work.await.expect("reading packets does not panic: this is a bug")
    }

    /// Frames of all segments in order; none if any pass was not exactly as promised.
    async fn decode_segments(&self, segments: Vec<Segment>) -> Result<Option<Vec<Vec<u8>>>, MediaError> {
        let most = most_passes(self.probe.width * self.probe.height * 3).min(self.tools.threads);
        let mut further = Vec::new();
        while further.len() + 1 < most.min(segments.len())
            && let Some(place) = self.places.try_take()
        {
            further.push(place);
        }
        let at_once = further.len() + 1;
        // Segments run side by side: frame threads within one would only add work.
        let threads = if segments.len() == 1 { self.tools.threads } else { 1 };
        let parts = stream::iter(segments).map(|segment| self.decode_segment(segment, threads));
        let mut parts = parts.buffered(at_once);
        let mut frames = Vec::new();
        while let Some(part) = parts.next().await {
            // Returning drops the passes still running, and so kills them.
            let Some(part) = part? else { return Ok(None) };
            frames.extend(part);
        }
        Ok(Some(frames))
    }

    async fn decode_segment(
        &self,
        segment: Segment,
        threads: usize,
    ) -> Result<Option<Vec<Vec<u8>>>, MediaError> {
        let pass = Pass {
            input: Input::File { seek_seconds: segment.seek_seconds },
            threads,
            select: segment.wanted.iter().map(|pts| format!("eq(pts,{pts})")).collect(),
            max_decoded: segment.max_decoded,
            stop_early: true,
        };
        let Some(output) = self.run(pass).await? else { return Ok(None) };
        let last = segment.wanted.last().copied();
        let seen = output.log.decoded.iter().filter(|&&pts| pts >= Some(segment.from_pts) && pts <= last);
        let as_planned = seen.copied().eq(segment.expected.iter().copied().map(Some));
        Ok(output.exactly(&segment.wanted).filter(|_| as_planned))
    }

    /// Runs ffmpeg, on the GPU if there is one for this; none if the run went over `max_decoded`.
    async fn run(&self, pass: Pass) -> Result<Option<PassOutput>, MediaError> {
        if let Some(gpu) = self.tools.gpu().filter(|_| self.probe.fits_gpu()) {
            let wanted = pass.select.len();
            match self.run_once(&pass, Some(gpu)).await {
                Ok(Some(output)) if output.succeeded && output.frames.len() == wanted => {
                    return Ok(Some(output));
                }
                _ => {
                    tracing::info!(codec = self.probe.codec, "not decoded by the GPU; the processor does it")
                }
            }
        }
        match self.run_once(&pass, None).await? {
            Some(output) if output.log.is_old_ffmpeg => {
                self.tools.give_up_fps_mode();
                self.run_once(&pass, None).await
            }
            output => Ok(output),
        }
    }

    async fn run_once(&self, pass: &Pass, gpu: Option<usize>) -> Result<Option<PassOutput>, MediaError> {
        let wanted = pass.select.len();
        let fed = match &pass.input {
            Input::Fed(feed) => Some(feed.clone()),
            Input::File { .. } => None,
        };
        let manner = Manner { fed: fed.is_some(), on_gpu: gpu.is_some() };
        let running = self.tools.start_as(self.command(pass, gpu)?, manner)?;
        let feeding = fed.zip(running.stdin).map(|(feed, stdin)| feed.give_to(stdin));
        let feeding = async { OptionFuture::from(feeding).await.unwrap_or(Ok(())) };
        let mut account = DecodeLog::default();
        let frames = self.read_frames(running.stdout, wanted);
        let log = read_lines(running.stderr, |line| {
            if !account.take(line) {
                if gpu.is_some() && NO_GPU.iter().any(|sign| line.contains(sign)) {
                    self.tools.give_up_gpu(line);
                }
                tracing::trace!(line, "ffmpeg");
            }
            // Any error stops the pass; this one never leaves `run`.
            if account.decoded.len() > pass.max_decoded { Err(overrun()) } else { Ok(()) }
        });
        let output = tokio::try_join!(frames, log, feeding);
        self.trail.decoded_frames(account.decoded.len());
        let ((frames, surplus), (), ()) = match output {
            Ok(output) => output,
            Err(_) if account.decoded.len() > pass.max_decoded => return Ok(None),
            Err(error) => return Err(error),
        };
        let succeeded = finish(running.child).await?.success();
        Ok(Some(PassOutput { frames, surplus, log: account, succeeded }))
    }

    fn command(&self, pass: &Pass, gpu: Option<usize>) -> Result<std::process::Command, MediaError> {
        let (width, height) = (self.probe.width, self.probe.height);
        let mut command = self.tools.ffmpeg(pass.threads)?;
        // Every line counts, also one that says the same as the line before.
        command.args(["-loglevel", "repeat+level+info"]);
        // Frames that cannot be right (decoding began too late for them) must not come out at all.
        command.args(["-flags", "-output_corrupt", "-noautorotate", "-copyts"]);
        // Filters that were rebuilt for another size or format would restart their frame count.
        command.args(["-reinit_filter", "0"]);
        if let Some(gpu) = gpu {
            Tools::accelerate(&mut command, gpu);
        }
        match &pass.input {
            Input::Fed(_) => {
                command.args(["-f", Container::Matroska.demuxer(), "-i", "pipe:0"]);
            }
            Input::File { seek_seconds } => {
                if let Some(seconds) = seek_seconds {
                    // Absolute and inexact: `select` picks the frames, by the times the container gives them.
                    command.args(["-seek_timestamp", "1", "-noaccurate_seek", "-ss"]);
                    command.arg(format!("{seconds:.6}"));
                }
                command.args(["-f", self.probe.container.demuxer(), "-i"]).arg(file_url(self.file));
            }
        }
        let select = format!("select='{}'", pass.select.join("+"));
        // A stream may change its size midway: the pipe's frames may not.
        let scale = format!("scale={width}:{height}:flags=bilinear");
        let mut filters = vec![SHOWINFO, &select, SHOWINFO];
        if gpu.is_some() {
            // A GPU's pictures have their colors interleaved. Put apart, they take the same way to
            // RGB as others.
            filters.push(GPU_PIXEL_FORMAT);
        }
        let orientation = self.probe.orientation;
        let (stored_width, stored_height) =
            if orientation.swaps_sides { (height, width) } else { (width, height) };
        let stored = format!("scale={stored_width}:{stored_height}:flags=bilinear");
        if !orientation.filters.is_empty() {
            // Filters that turn pictures take every one for as large as the first. Does nothing to
            // those that are.
            filters.push(&stored);
        }
        filters.extend(orientation.filters);
        filters.extend([scale.as_str(), "format=rgb24"]);
        command.args(["-map", "0:V:0", "-an", "-sn", "-dn", "-vf", &filters.join(",")]);
        if pass.stop_early {
            command.args(["-frames:v", &pass.select.len().to_string()]);
        }
        command.args(self.tools.passthrough()).args(["-f", "rawvideo", "pipe:1"]);
        Ok(command)
    }

    /// Reads frames and maps each while the next one is read: `wanted` ones, and whether there were
    /// more (dropped, for the log to come to its end). Takes the pipe, so that a decoder with more
    /// to say fails instead of waiting for a reader.
    async fn read_frames(
        &self,
        mut stdout: ChildStdout,
        wanted: usize,
    ) -> Result<(Vec<Vec<u8>>, bool), MediaError> {
        let frame_bytes = self.probe.width * self.probe.height * 3;
        let mut frames = Vec::with_capacity(wanted);
        let mut mapping: Option<JoinHandle<Vec<u8>>> = None;
        loop {
            let frame = read_frame(&mut stdout, frame_bytes).await?;
            if let Some(mapping) = mapping.take() {
                frames.push(mapping.await.expect("frames are mapped without panics: this is a bug"));
            }
            match frame {
                Some(frame) if frames.len() < wanted => mapping = Some(self.map.start(frame)),
                Some(_) => {
                    let dropped = tokio::io::copy(&mut stdout, &mut tokio::io::sink()).await;
                    dropped.map_err(|error| pipe_failed(&error))?;
                    return Ok((frames, true));
                }
                None => return Ok((frames, false)),
            }
        }
    }
}

/// Picks the frames at positions `wanted` (ascending) of `stamps` by their pts; by their number
/// where they have none of their own.
fn select_terms(stamps: &[Option<i64>], wanted: &[usize]) -> Terms {
    let stamp = |index: &usize| stamps.get(*index).copied().flatten();
    let mut uses: BTreeMap<i64, usize> = wanted.iter().filter_map(stamp).map(|pts| (pts, 0)).collect();
    for pts in stamps.iter().flatten() {
        if let Some(uses) = uses.get_mut(pts) {
            *uses += 1;
        }
    }
    let term = |index: &usize| match stamp(index) {
        Some(pts) if uses.get(&pts) == Some(&1) => format!("eq(pts,{pts})"),
        _ => format!("eq(n,{index})"),
    };
    wanted.iter().map(term).collect()
}

/// Passes that may hold frames of so many bytes at the same time, at least one.
fn most_passes(frame_bytes: usize) -> usize {
    (MAX_PASS_FRAMES_BYTES / (2 * frame_bytes).max(1)).max(1)
}

/// One whole frame; none at the end of the output (a started frame is dropped: the pass is then short of one).
async fn read_frame(stdout: &mut ChildStdout, bytes: usize) -> Result<Option<Vec<u8>>, MediaError> {
    let mut frame = Vec::with_capacity(bytes);
    let mut rest = stdout.take(bytes as u64);
    while frame.len() < bytes {
        if rest.read_buf(&mut frame).await.map_err(|error| pipe_failed(&error))? == 0 {
            return Ok(None);
        }
    }
    Ok(Some(frame))
}

fn distinct(indices: &[usize]) -> Vec<usize> {
    let mut distinct = indices.to_vec();
    distinct.dedup();
    distinct
}

fn overrun() -> MediaError {
    MediaError::Internal("the decoder went past its plan: this is a bug".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_frames_are_decoded_one_pass_at_a_time() {
        assert!(most_passes(1920 * 1080 * 3) > 16);
        assert_eq!(most_passes(3840 * 2160 * 3), 5);
        assert_eq!(most_passes(8192 * 4320 * 3), 1);
        assert_eq!(most_passes(usize::MAX / 2), 1);
    }

    #[test]
    fn frames_are_picked_by_time_where_that_tells_them_apart() {
        let stamps = [Some(-40), Some(0), Some(40), Some(40), None];
        let terms = select_terms(&stamps, &[0, 2, 3, 4, 9]);
        assert_eq!(terms, ["eq(pts,-40)", "eq(n,2)", "eq(n,3)", "eq(n,4)", "eq(n,9)"]);
    }
}
