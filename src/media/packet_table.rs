//! A video's packets, and from them the cheapest way to its sampled frames. Pure: no files, no processes.
//!
//! Made by `probe.rs`, read by `decode.rs`. What it says about frames is a prediction (hidden frames, damaged
//! packets and leading pictures make the decoder disagree): `decode.rs` must check every frame against the decoder.

use super::frame_sampling::Timeline;

/// Starting a process costs about as much as decoding this many pixels (measured: 65 ms against 420 Mpixel/s of H.264
/// on one thread).
const PROCESS_START_PIXELS: usize = 27_000_000;
/// Demuxers that seek by decoding time go this far (3/23 s) ahead of what they are asked, to be sure.
const SEEK_BACKOFF_SECONDS: f64 = 0.14;
/// Transport streams have no index: decoding starts at any packet this long before the keyframe.
const UNINDEXED_LEAD_SECONDS: f64 = 0.5;
/// Longest duration of a last frame that is believed, unless another frame is as long.
const MAX_LAST_FRAME_SECONDS: f64 = 10.0;
/// Frames beyond the plan that a decoder may go through before the plan counts as failed.
const OVERRUN_SLACK: usize = 64;

/// One packet of the video stream; times in units of the time base.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Packet {
    pub pts: Option<i64>,
    pub dts: Option<i64>,
    pub duration: i64,
    /// Decoding may start here.
    pub key: bool,
    /// Decoded but never shown (before an edit list's start).
    pub discard: bool,
    /// Where it lies in the file, if in one piece: position and length, bytes.
    pub place: Option<(u64, usize)>,
}

/// The packets in file (decoding) order, and the frames they make in display order.
#[derive(Debug)]
pub struct PacketTable {
    packets: Vec<Packet>,
    /// (numerator, denominator) of a time unit in seconds.
    time_base: (u32, u32),
    /// Frames a second, where times are missing.
    nominal_rate: f64,
    /// Shown frames in display order: (pts, position in `packets`). None: times are missing, doubled or unusable.
    display: Option<Vec<(i64, usize)>>,
    /// Usable starting points: positions of shown keyframes, ascending.
    keys: Vec<usize>,
    /// Container time that players show as 0, seconds; none: the time of the first frame.
    zero: Option<f64>,
}

/// One run of the decoder: from a keyframe to the last frame wanted of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Segment {
    /// Where to seek; none: the start of the file.
    pub seek_seconds: Option<f64>,
    /// The keyframe's pts: from it on, every frame that the decoder gives must be one of `expected`.
    pub from_pts: i64,
    /// Wanted pts, ascending.
    pub wanted: Vec<i64>,
    /// Every frame from `from_pts` to the last one wanted.
    pub expected: Vec<i64>,
    /// Decoding more frames than this means that the seek landed elsewhere.
    pub max_decoded: usize,
    key_position: usize,
    end_position: usize,
}

/// A group of pictures with frames that are wanted.
#[derive(Debug)]
pub struct NeededGroup<'a> {
    /// From its keyframe to the last frame wanted, in decoding order.
    pub packets: &'a [Packet],
    /// Wanted pts, ascending.
    pub wanted: Vec<i64>,
}

impl PacketTable {
    /// `nominal_rate` is in frames a second.
    pub fn new(
        mut packets: Vec<Packet>,
        time_base: (u32, u32),
        nominal_rate: f64,
        has_b_frames: bool,
    ) -> Self {
        // AVI stores decoding times only; without reordering they are the display times.
        if !has_b_frames && packets.iter().all(|packet| packet.pts.is_none()) {
            packets.iter_mut().for_each(|packet| packet.pts = packet.dts);
        }
        let display = display_order(&packets);
        let usable = |packet: &Packet| packet.key && !packet.discard && packet.pts.is_some();
        let keys = (0..packets.len()).filter(|&position| usable(&packets[position])).collect();
        PacketTable { packets, time_base, nominal_rate, display, keys, zero: None }
    }

    /// Sets the start of the file: `container_start` is the earliest start of all streams, seconds,
    /// from where players count. A negative start is audio encoder priming, which players drop.
    pub fn starting_at(mut self, container_start: Option<f64>) -> Self {
        // Without a pts on the first packet (AVI with B-frames), the clock of decoded frames is a guess.
        let is_timed = self.packets.first().is_some_and(|packet| packet.pts.is_some());
        self.zero = container_start.filter(|_| is_timed).map(|start| start.max(0.0));
        self
    }

    /// Frames that will be shown.
    pub fn num_shown(&self) -> usize {
        self.packets.iter().filter(|packet| !packet.discard).count()
    }

    /// When the frames are shown, as far as the packets tell.
    pub fn timeline(&self) -> Timeline {
        match &self.display {
            Some(display) => self.timeline_of(display.iter().map(|&(pts, _)| pts).collect()),
            None => self.nominal_timeline(self.num_shown()),
        }
    }

    /// The timeline of frames that were really decoded.
    pub fn decoded_timeline(&self, decoded: &[Option<i64>]) -> Timeline {
        let times: Option<Vec<i64>> = decoded.iter().copied().collect();
        match times {
            Some(times) if !times.is_empty() && times.is_sorted_by(|a, b| a < b) => self.timeline_of(times),
            _ => self.nominal_timeline(decoded.len()),
        }
    }

    fn timeline_of(&self, pts: Vec<i64>) -> Timeline {
        let Some(&first) = pts.first() else { return self.nominal_timeline(0) };
        let last_seconds = self.last_frame_seconds(&pts);
        let offset = self.offset(first);
        let times: Vec<f64> =
            pts.iter().map(|&pts| offset + self.seconds((pts as i128 - first as i128) as f64)).collect();
        let duration = times[times.len() - 1] + last_seconds;
        Timeline { times, duration }
    }

    /// Returns the duration of the last of the frames at `pts` (not empty), seconds. Some demuxers
    /// stretch it to the duration that the container claims: a value far above that of every other
    /// frame is not used.
    fn last_frame_seconds(&self, pts: &[i64]) -> f64 {
        let last = pts.last().copied();
        let stored =
            self.packets.iter().find(|packet| packet.pts == last).map_or(0, |packet| packet.duration);
        let stored = self.seconds(stored as f64);
        let gaps = pts.windows(2).map(|pair| (pair[1] as i128 - pair[0] as i128) as f64);
        let longest = gaps.fold(0.0, f64::max);
        let bound = self.seconds(longest).max(MAX_LAST_FRAME_SECONDS);
        if stored > 0.0 && stored <= bound { stored } else { 1.0 / self.nominal_rate }
    }

    fn nominal_timeline(&self, frames: usize) -> Timeline {
        let offset =
            self.packets.iter().find_map(|packet| packet.pts).map_or(0.0, |first| self.offset(first));
        let times = (0..frames).map(|index| offset + index as f64 / self.nominal_rate).collect();
        Timeline { times, duration: offset + frames as f64 / self.nominal_rate }
    }

    /// Returns the seconds from the file's start, as players count, to its first frame.
    fn offset(&self, first_pts: i64) -> f64 {
        self.zero.map_or(0.0, |zero| (self.seconds(first_pts as f64) - zero).max(0.0))
    }

    fn seconds(&self, units: f64) -> f64 {
        units * f64::from(self.time_base.0) / f64::from(self.time_base.1)
    }

    /// A way to the frames at display indices `wanted` (ascending, distinct) that is clearly cheaper than decoding
    /// everything, if there is one. `indexed`: the container knows where its keyframes are.
    pub fn seek_plan(&self, wanted: &[usize], pixels: usize, indexed: bool) -> Option<Vec<Segment>> {
        let display = self.display.as_ref()?;
        let process_start = (PROCESS_START_PIXELS / pixels.max(1)).clamp(4, 400);
        let mut segments: Vec<Segment> = Vec::new();
        for &index in wanted {
            let &(pts, position) = display.get(index)?;
            let key = self.key_before(position, pts)?;
            match segments.last_mut() {
                // Decoding on costs no more than starting anew.
                Some(last) if key <= last.end_position + process_start => {
                    last.wanted.push(pts);
                    last.end_position = last.end_position.max(position);
                }
                _ => segments.push(Segment {
                    seek_seconds: None,
                    from_pts: self.packets[key].pts?,
                    wanted: vec![pts],
                    expected: Vec::new(),
                    max_decoded: 0,
                    key_position: key,
                    end_position: position,
                }),
            }
        }
        let cost = |s: &Segment| s.end_position.saturating_sub(s.key_position) + 1 + process_start;
        let total: usize = segments.iter().map(cost).sum();
        let whole = self.packets.len() + process_start;
        // Processes side by side do the same work in less time than the threads of one decoder (a sixth, measured).
        let worth = if segments.len() > 1 { whole } else { whole * 8 / 10 };
        if total > worth {
            return None;
        }
        let longest_gop = self.longest_gop();
        for segment in &mut segments {
            segment.seek_seconds = self.seek_seconds(segment.key_position, indexed);
            let last = *segment.wanted.last()?;
            let from = display.partition_point(|&(pts, _)| pts < segment.from_pts);
            let to = display.partition_point(|&(pts, _)| pts <= last);
            segment.expected = display[from..to].iter().map(|&(pts, _)| pts).collect();
            segment.max_decoded = segment.expected.len() + longest_gop + OVERRUN_SLACK;
        }
        Some(segments)
    }

    /// The groups that hold the frames at display indices `wanted` (ascending, distinct); none where frames cannot be told
    /// by their packets.
    pub fn needed_groups(&self, wanted: &[usize]) -> Option<Vec<NeededGroup<'_>>> {
        let display = self.display.as_ref()?;
        // (keyframe, last packet, wanted pts)
        let mut groups: Vec<(usize, usize, Vec<i64>)> = Vec::new();
        for &index in wanted {
            let &(pts, position) = display.get(index)?;
            let key = self.key_before(position, pts)?;
            match groups.last_mut() {
                Some((_, end, wanted)) if key <= *end => {
                    *end = position.max(*end);
                    wanted.push(pts);
                }
                _ => groups.push((key, position, vec![pts])),
            }
        }
        let group = |(key, end, wanted)| NeededGroup { packets: &self.packets[key..=end], wanted };
        Some(groups.into_iter().map(group).collect())
    }

    /// The last keyframe from which the frame can be decoded: pictures that lead a keyframe (shown before it,
    /// stored after it) need the one before.
    fn key_before(&self, position: usize, pts: i64) -> Option<usize> {
        let behind = self.keys.partition_point(|&key| key <= position);
        self.keys[..behind].iter().rev().copied().find(|&key| self.packets[key].pts <= Some(pts))
    }

    /// A time that makes demuxers land on this keyframe, whether their index is by decoding or by display time.
    fn seek_seconds(&self, key: usize, indexed: bool) -> Option<f64> {
        if key == self.keys[0] {
            return None;
        }
        let packet = &self.packets[key];
        let pts = packet.pts? as f64;
        if !indexed {
            let target = self.seconds(packet.dts.map_or(pts, |dts| dts as f64)) - UNINDEXED_LEAD_SECONDS;
            let start = self.packets[0].dts.or(self.packets[0].pts)? as f64;
            return (target > self.seconds(start)).then_some(target);
        }
        let next = self.keys.get(self.keys.partition_point(|&other| other <= key));
        let room = match next.and_then(|&next| self.packets[next].dts.or(self.packets[next].pts)) {
            Some(next) => (self.seconds(next as f64 - pts) / 2.0).max(0.0),
            None => SEEK_BACKOFF_SECONDS,
        };
        let target = self.seconds(pts) + room.min(SEEK_BACKOFF_SECONDS);
        (target > 0.0).then_some(target)
    }

    fn longest_gop(&self) -> usize {
        let ends = self.keys.iter().skip(1).copied().chain([self.packets.len()]);
        self.keys.iter().zip(ends).map(|(&key, end)| end - key).max().unwrap_or(0)
    }
}

/// Shown frames by pts, if every one has a pts of its own and decoding can start at the first packet.
fn display_order(packets: &[Packet]) -> Option<Vec<(i64, usize)>> {
    let mut display = Vec::with_capacity(packets.len());
    for (position, packet) in packets.iter().enumerate() {
        let pts = packet.pts?;
        if !packet.discard {
            display.push((pts, position));
        }
    }
    // Pictures before the first keyframe, in either order, are dropped by some decoders.
    let start = packets.first().filter(|packet| packet.key)?.pts?;
    display.sort_unstable();
    let distinct = display.windows(2).all(|pair| pair[0].0 < pair[1].0);
    (distinct && display.first()?.0 >= start).then_some(display)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A stream of closed GOPs with two B-frames between references, 40 ms a frame, in decoding order.
    fn stream(gops: usize, gop_frames: usize) -> Vec<Packet> {
        let mut packets = Vec::new();
        for gop in 0..gops {
            for (order, shown) in decoding_order(gop_frames).into_iter().enumerate() {
                let base = (gop * gop_frames) as i64;
                packets.push(Packet {
                    pts: Some((base + shown as i64) * 40 + 80),
                    dts: Some((base + order as i64) * 40),
                    duration: 40,
                    key: order == 0,
                    ..Packet::default()
                });
            }
        }
        packets
    }

    /// 0, 3, 1, 2, 6, 4, 5, ...
    fn decoding_order(frames: usize) -> Vec<usize> {
        let mut order = vec![0];
        let mut reference = 0;
        while reference + 1 < frames {
            let next = (reference + 3).min(frames - 1);
            order.push(next);
            order.extend(reference + 1..next);
            reference = next;
        }
        order
    }

    fn table(packets: Vec<Packet>) -> PacketTable {
        PacketTable::new(packets, (1, 1000), 25.0, true)
    }

    #[test]
    fn timeline_is_in_display_order_and_starts_at_zero() {
        let timeline = table(stream(2, 10)).timeline();
        assert_eq!(timeline.times.len(), 20);
        assert!(timeline.times.iter().enumerate().all(|(i, &t)| (t - i as f64 * 0.04).abs() < 1e-9));
        assert!((timeline.duration - 0.8).abs() < 1e-9);
    }

    #[test]
    fn a_last_frame_that_is_stretched_to_the_claimed_length_is_not_believed() {
        let duration = |last: i64| {
            let mut packets = stream(2, 10);
            packets.iter_mut().find(|packet| packet.pts == Some(19 * 40 + 80)).unwrap().duration = last;
            table(packets).timeline().duration
        };
        assert!((duration(5000) - 5.76).abs() < 1e-9, "a picture held at the end");
        assert!((duration(40_000_000) - 0.8).abs() < 1e-9);
    }

    #[test]
    fn far_samples_get_a_segment_each_and_near_ones_share() {
        let table = table(stream(40, 250));
        let plan = table.seek_plan(&[10, 20, 5010, 9999], 640 * 360, true).unwrap();
        let wanted: Vec<_> = plan.iter().map(|segment| segment.wanted.len()).collect();
        assert_eq!(wanted, [2, 1, 1]);
        assert_eq!(plan[0].seek_seconds, None);
        assert_eq!(plan[1].from_pts, 5000 * 40 + 80);
        assert_eq!(plan[1].expected.len(), 11);
    }

    #[test]
    fn short_videos_are_decoded_whole() {
        let indices: Vec<usize> = (0..16).map(|i| i * 16).collect();
        assert_eq!(table(stream(1, 250)).seek_plan(&indices, 640 * 360, true), None);
        assert_eq!(table(stream(2, 125)).seek_plan(&indices, 640 * 360, true), None);
    }

    #[test]
    fn leading_pictures_are_reached_from_the_keyframe_before() {
        let mut packets = stream(40, 250);
        // The second packet of GOP 20 is shown just before its keyframe, as in an open GOP.
        let key_pts = packets[5000].pts.unwrap();
        packets[5001].pts = Some(key_pts - 20);
        let table = table(packets);
        let display = table.display.as_ref().unwrap();
        let leading = display.iter().position(|&(pts, _)| pts == key_pts - 20).unwrap();
        let plan = table.seek_plan(&[leading], 640 * 360, true).unwrap();
        assert_eq!(plan[0].from_pts, table.packets[4750].pts.unwrap());
    }

    #[test]
    fn doubtful_times_give_no_plan() {
        let broken = |change: fn(&mut Vec<Packet>)| {
            let mut packets = stream(40, 250);
            change(&mut packets);
            table(packets).seek_plan(&[5000], 640 * 360, true)
        };
        assert!(broken(|_| ()).is_some());
        assert_eq!(broken(|packets| packets[7].pts = None), None);
        assert_eq!(broken(|packets| packets[7].pts = packets[8].pts), None);
        assert_eq!(broken(|packets| packets[0].key = false), None);
        assert_eq!(broken(|packets| packets[1].pts = Some(-1)), None);
    }

    #[test]
    fn decoding_times_stand_in_only_without_reordering() {
        let mut packets = stream(2, 10);
        packets.iter_mut().for_each(|packet| packet.pts = None);
        assert!(PacketTable::new(packets.clone(), (1, 1000), 25.0, true).display.is_none());
        assert!(PacketTable::new(packets, (1, 1000), 25.0, false).display.is_some());
    }

    #[test]
    fn needed_groups_begin_with_their_keyframe_and_end_with_the_last_frame_wanted() {
        let table = table(stream(4, 10));
        let groups = table.needed_groups(&[1, 2, 29]).unwrap();
        let ends: Vec<_> = groups.iter().map(|group| (group.packets[0].pts, group.packets.len())).collect();
        // Display 2 is decoded fourth; 29 is the last reference of its group.
        assert_eq!(ends, [(Some(80), 4), (Some(20 * 40 + 80), 8)]);
        assert_eq!(groups[0].wanted, [120, 160]);
        assert!(table.needed_groups(&[40]).is_none());
    }

    proptest! {
        #[test]
        fn needed_groups_hold_every_wanted_frame(
            gops in 1usize..20, gop_frames in 1usize..30, picks in proptest::collection::btree_set(0usize..600, 1..20),
        ) {
            let table = table(stream(gops, gop_frames));
            let wanted: std::collections::BTreeSet<usize> =
                picks.iter().map(|pick| pick % (gops * gop_frames)).collect();
            let wanted: Vec<usize> = wanted.into_iter().collect();
            let groups = table.needed_groups(&wanted).unwrap();
            let display = table.display.as_ref().unwrap();
            let found: Vec<i64> = groups.iter().flat_map(|group| group.wanted.clone()).collect();
            let expected: Vec<i64> = wanted.iter().map(|&index| display[index].0).collect();
            prop_assert_eq!(found, expected);
            for NeededGroup { packets, wanted } in &groups {
                prop_assert!(packets[0].key && packets.len() <= gop_frames);
                prop_assert!(wanted.contains(&packets[packets.len() - 1].pts.unwrap()) || wanted.len() > 1);
                prop_assert!(wanted.iter().all(|&pts| packets.iter().any(|packet| packet.pts == Some(pts))));
            }
        }

        #[test]
        fn a_plan_reaches_every_wanted_frame_in_order(
            gops in 1usize..60, gop_frames in 1usize..60, pixels in 1000usize..2_000_000,
            picks in proptest::collection::btree_set(0usize..3600, 1..20), indexed: bool,
        ) {
            let table = table(stream(gops, gop_frames));
            let total = gops * gop_frames;
            let wanted: std::collections::BTreeSet<usize> = picks.iter().map(|pick| pick % total).collect();
            let wanted: Vec<usize> = wanted.into_iter().collect();
            if let Some(plan) = table.seek_plan(&wanted, pixels, indexed) {
                let display = table.display.as_ref().unwrap();
                let planned: Vec<i64> = plan.iter().flat_map(|segment| segment.wanted.clone()).collect();
                let expected: Vec<i64> = wanted.iter().map(|&index| display[index].0).collect();
                prop_assert_eq!(planned, expected);
                let decoded: usize = plan.iter().map(|segment| segment.expected.len()).sum();
                prop_assert!(decoded < total);
                for segment in &plan {
                    prop_assert!(segment.wanted.iter().all(|pts| segment.expected.contains(pts)));
                    prop_assert_eq!(segment.expected[0], segment.from_pts);
                }
            }
        }
    }
}
