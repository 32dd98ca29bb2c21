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

use futures_util::{StreamExt, stream};
use tokio::task::JoinHandle;

use super::{
    MediaError,
    completeness::Completeness,
    container::Container,
    decode_log::DecodeLog,
    decode_pass::{Input, Pass, PassOutput, Terms},
    ffmpeg::Tools,
    frame_sampling::{Sampling, Timeline},
    packet_feed::Feed,
    packet_table::{PacketTable, SeenFrame, Segment},
    places::DecoderPlaces,
    probe::Probe,
};
use crate::telemetry::Trail;

/// Memory for source-size frames of all passes of one video; a pass holds two (one arrives, one is mapped).
const MAX_PASS_FRAMES_BYTES: usize = 256 << 20;
/// What is done with each frame `[height, width, 3]` as it arrives, on the blocking pool.
#[derive(Clone)]
pub struct FrameMap(Arc<dyn Fn(Vec<u8>) -> Vec<u8> + Send + Sync>);

impl FrameMap {
    pub fn new(map: impl Fn(Vec<u8>) -> Vec<u8> + Send + Sync + 'static) -> Self {
        FrameMap(Arc::new(map))
    }

    pub fn start(&self, frame: Vec<u8>) -> JoinHandle<Vec<u8>> {
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
        let parts_missing = !self.probe.completeness.is_whole();
        // The frames that the packets promise, then those that the first pass saw.
        let mut seen: Option<Vec<SeenFrame>> = None;
        for passes in 1..=2 {
            let indices = sampling.indices(&timeline)?;
            let wanted = distinct(&indices);
            let picked = wanted.clone();
            let pick = move |packets: &PacketTable| {
                select_terms(&seen.unwrap_or_else(|| packets.promised_frames()), &picked)
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
            let account = move |packets: &PacketTable| {
                let seen = packets.seen_frames(&decoded, parts_missing);
                let stamps: Vec<Option<i64>> = seen.iter().map(|frame| frame.pts).collect();
                (Arc::new(packets.timeline_of(&stamps)), seen)
            };
            let (seen_timeline, seen_frames) = self.on_packets(account).await;
            timeline = seen_timeline;
            let given = wanted.iter().map(|&index| seen_frames.get(index).map(|frame| frame.number));
            let exact = frames.len() == wanted.len() && !surplus && given.eq(selected);
            if exact && sampling.indices(&timeline)? == indices {
                let way = Way::WholeFile { passes };
                return Ok(Decoded { timeline, indices, frames, way, completeness });
            }
            seen = Some(seen_frames);
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
        let (file, wanted, track) = (self.file.to_owned(), distinct(indices), self.probe.track_id?);
        self.on_packets(move |packets| Feed::plan(File::open(file).ok()?, track, packets, &wanted)).await
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
        if !self.probe.container.seeks() {
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
}

/// Picks the frames at positions `wanted` (ascending) of `seen` by their pts; by their number in
/// the decoder's output if another frame has the same pts.
fn select_terms(seen: &[SeenFrame], wanted: &[usize]) -> Terms {
    let pts = |index: &usize| seen.get(*index).and_then(|frame| frame.pts);
    let mut uses: BTreeMap<i64, usize> = wanted.iter().filter_map(pts).map(|pts| (pts, 0)).collect();
    for pts in seen.iter().filter_map(|frame| frame.pts) {
        if let Some(uses) = uses.get_mut(&pts) {
            *uses += 1;
        }
    }
    let term = |index: &usize| match pts(index) {
        Some(pts) if uses.get(&pts) == Some(&1) => format!("eq(pts,{pts})"),
        _ => format!("eq(n,{})", seen.get(*index).map_or(*index, |frame| frame.number)),
    };
    wanted.iter().map(term).collect()
}

/// Passes that may hold frames of so many bytes at the same time, at least one.
fn most_passes(frame_bytes: usize) -> usize {
    (MAX_PASS_FRAMES_BYTES / (2 * frame_bytes).max(1)).max(1)
}

fn distinct(indices: &[usize]) -> Vec<usize> {
    let mut distinct = indices.to_vec();
    distinct.dedup();
    distinct
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
        let frame = |(index, &pts)| SeenFrame { number: index + 100, pts };
        let seen: Vec<SeenFrame> = stamps.iter().enumerate().map(frame).collect();
        let terms = select_terms(&seen, &[0, 2, 3, 4]);
        assert_eq!(terms, ["eq(pts,-40)", "eq(n,102)", "eq(n,103)", "eq(n,104)"]);
    }
}
