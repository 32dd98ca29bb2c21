//! A video's packets, and from them the cheapest way to its sampled frames. Pure: no files, no processes.
//!
//! Made by `probe.rs`, read by `decode.rs`. What it says about frames is a prediction (hidden frames, damaged
//! packets and leading pictures make the decoder disagree): `decode.rs` must check every frame against the decoder.

use std::collections::HashSet;

use super::{clock::Clock, frame_sampling::Timeline};

/// Starting a process costs about as much as decoding this many pixels (measured: 65 ms against 420 Mpixel/s of H.264
/// on one thread).
const PROCESS_START_PIXELS: usize = 27_000_000;
/// Demuxers that seek by decoding time go this far (3/23 s) ahead of what they are asked, to be sure.
const SEEK_BACKOFF_SECONDS: f64 = 0.14;
/// Transport streams have no index: decoding starts at any packet this long before the keyframe.
const UNINDEXED_LEAD_SECONDS: f64 = 0.5;
/// Frames beyond the plan that a decoder may go through before the plan counts as failed.
const OVERRUN_SLACK: usize = 64;
/// Most places between a frame's positions in decoding and in display order: twice what H.264 and
/// HEVC allow.
const MAX_REORDERING: usize = 32;

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
    clock: Clock,
    /// Stamps of the shown frames in display order, as far as packets tell that order.
    shown: Vec<Option<i64>>,
    /// Shown frames in display order: (pts, position in `packets`). None: times are missing or
    /// unusable.
    display: Option<Vec<(i64, usize)>>,
    /// Usable starting points: positions of shown keyframes, ascending.
    keys: Vec<usize>,
}

/// A frame of the decoder's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeenFrame {
    /// Position in the output.
    pub number: usize,
    pub pts: Option<i64>,
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
    /// Finds the display order of `packets`, given in decoding order.
    pub fn new(mut packets: Vec<Packet>, clock: Clock, has_b_frames: bool) -> Self {
        // AVI stores decoding times only; without reordering they are the display times.
        if !has_b_frames && packets.iter().all(|packet| packet.pts.is_none()) {
            packets.iter_mut().for_each(|packet| packet.pts = packet.dts);
        }
        let order = display_order(&packets);
        let display = order.usable_display(&packets);
        let usable = |packet: &Packet| packet.key && !packet.discard && packet.pts.is_some();
        let keys = (0..packets.len()).filter(|&position| usable(&packets[position])).collect();
        PacketTable { packets, clock, shown: order.stamps, display, keys }
    }

    /// Returns the frames that the packets promise, in display order.
    pub fn promised_frames(&self) -> Vec<SeenFrame> {
        self.shown.iter().enumerate().map(|(number, &pts)| SeenFrame { number, pts }).collect()
    }

    /// Returns the decoded frames that may be sampled, in display order. With `parts_missing` those
    /// are the frames of known packets: a packet that is cut off gives a frame with a part of its
    /// picture.
    pub fn seen_frames(&self, decoded: &[Option<i64>], parts_missing: bool) -> Vec<SeenFrame> {
        let seen = decoded.iter().enumerate().map(|(number, &pts)| SeenFrame { number, pts });
        let known: HashSet<Option<i64>> = match parts_missing {
            true => self.shown.iter().copied().collect(),
            false => HashSet::new(),
        };
        let of_known: Vec<SeenFrame> = seen.clone().filter(|frame| known.contains(&frame.pts)).collect();
        // A decoder with other times than the container tells nothing of packets.
        if of_known.len() * 2 > decoded.len() { of_known } else { seen.collect() }
    }

    /// Returns the times at which frames are shown, as far as the packets tell.
    pub fn timeline(&self) -> Timeline {
        self.timeline_of(&self.shown)
    }

    /// Returns the timeline of frames with these stamps, in display order.
    pub fn timeline_of(&self, stamps: &[Option<i64>]) -> Timeline {
        let last = stamps.last().copied().flatten();
        let stored = self.packets.iter().find(|packet| packet.pts == last && last.is_some());
        self.clock.timeline(stamps, stored.map_or(0, |packet| packet.duration))
    }

    fn seconds(&self, units: f64) -> f64 {
        self.clock.seconds(units)
    }

    /// A way to the frames at display indices `wanted` (ascending, distinct) that is clearly cheaper than decoding
    /// everything, if there is one. `indexed`: the container knows where its keyframes are.
    pub fn seek_plan(&self, wanted: &[usize], pixels: usize, indexed: bool) -> Option<Vec<Segment>> {
        let display = self.display.as_ref()?;
        let process_start = (PROCESS_START_PIXELS / pixels.max(1)).clamp(4, 400);
        let mut segments: Vec<Segment> = Vec::new();
        for &index in wanted {
            let (pts, position) = only_of_its_time(display, index)?;
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
            let (pts, position) = only_of_its_time(display, index)?;
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

/// The shown frame at a display index, if no other has its pts: frames are picked by pts.
fn only_of_its_time(display: &[(i64, usize)], index: usize) -> Option<(i64, usize)> {
    let &(pts, position) = display.get(index)?;
    let same = |neighbor: Option<usize>| neighbor.and_then(|at| display.get(at)).is_some_and(|f| f.0 == pts);
    (!same(index.checked_sub(1)) && !same(index.checked_add(1))).then_some((pts, position))
}

/// Shown packets in display order.
struct DisplayOrder {
    /// Positions among the packets.
    positions: Vec<usize>,
    /// None: missing, or so far from its neighbors' that it cannot be right.
    stamps: Vec<Option<i64>>,
    /// No decoding time goes back, and no pts is far from those of its neighbors in the file.
    plain: bool,
}

impl DisplayOrder {
    /// (pts, position in `packets`), if every frame has a usable pts and decoding can start at the
    /// first packet.
    fn usable_display(&self, packets: &[Packet]) -> Option<Vec<(i64, usize)>> {
        // Pictures before the first keyframe, in either order, are dropped by some decoders.
        let start = packets.first().filter(|packet| packet.key)?.pts?;
        if !self.plain || packets.iter().any(|packet| packet.pts.is_none()) {
            return None;
        }
        let pairs = self.stamps.iter().zip(&self.positions);
        let display: Vec<(i64, usize)> =
            pairs.map(|(stamp, &position)| Some(((*stamp)?, position))).collect::<Option<_>>()?;
        (display.first()?.0 >= start).then_some(display)
    }
}

/// Sorts shown packets by pts, between one restart of the clock and the next. A pts that moves its
/// frame far away is wrong.
fn display_order(packets: &[Packet]) -> DisplayOrder {
    let mut stamps: Vec<Option<i64>> = packets.iter().map(|packet| packet.pts).collect();
    let (mut positions, restarts) = sorted_by_stamp(packets, &stamps);
    let far = moved_far(&positions);
    let plain = restarts == 0 && far.is_empty();
    if !far.is_empty() {
        far.into_iter().for_each(|position| stamps[position] = None);
        (positions, _) = sorted_by_stamp(packets, &stamps);
    }
    let stamps = positions.iter().map(|&position| stamps[position]).collect();
    DisplayOrder { positions, stamps, plain }
}

/// Returns the sorted `positions` that are farther from their place in the file than reordering
/// explains.
fn moved_far(positions: &[usize]) -> Vec<usize> {
    let mut in_file = positions.to_vec();
    in_file.sort_unstable();
    let place = |position: &usize| in_file.binary_search(position).unwrap_or(0);
    let ranked = positions.iter().enumerate();
    let far = ranked.filter(|(rank, position)| rank.abs_diff(place(position)) > MAX_REORDERING);
    far.map(|(_, &position)| position).collect()
}

/// Positions of shown packets in display order, and how often the decoding times go back.
fn sorted_by_stamp(packets: &[Packet], stamps: &[Option<i64>]) -> (Vec<usize>, usize) {
    // (restarts of the clock before it, pts or a stand-in, position)
    let mut keyed: Vec<(usize, i64, usize)> = Vec::with_capacity(packets.len());
    let (mut restarts, mut last_dts, mut last_stamp) = (0, None, i64::MIN);
    for (position, packet) in packets.iter().enumerate() {
        if packet.dts.is_some() {
            restarts += usize::from(packet.dts < last_dts);
            last_dts = packet.dts;
        }
        last_stamp = stamps[position].or(packet.dts).unwrap_or(last_stamp);
        if !packet.discard {
            keyed.push((restarts, last_stamp, position));
        }
    }
    keyed.sort_unstable();
    (keyed.into_iter().map(|(_, _, position)| position).collect(), restarts)
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

    const CLOCK: Clock =
        Clock { time_base: (1, 1000), nominal_rate: 25.0, may_jump: false, file_start: None };

    fn table(packets: Vec<Packet>) -> PacketTable {
        PacketTable::new(packets, CLOCK, true)
    }

    #[test]
    fn timeline_is_in_display_order_and_starts_at_zero() {
        let timeline = table(stream(2, 10)).timeline();
        assert_eq!(timeline.times.len(), 20);
        assert!(timeline.times.iter().enumerate().all(|(i, &t)| (t - i as f64 * 0.04).abs() < 1e-9));
        assert!((timeline.duration - 0.8).abs() < 1e-9);
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
        assert_eq!(
            broken(|packets| packets[5001].pts = packets[5000].pts),
            None,
            "two frames of the time wanted"
        );
        assert_eq!(broken(|packets| packets[5000].pts = Some(i64::MAX)), None);
        assert!(
            broken(|packets| packets[7].pts = packets[8].pts).is_some(),
            "two frames of a time elsewhere"
        );
        assert_eq!(broken(|packets| packets[0].key = false), None);
        assert_eq!(broken(|packets| packets[1].pts = Some(-1)), None);
    }

    #[test]
    fn times_that_repeat_or_restart_are_repaired_at_their_place() {
        let seconds = |packets: Vec<Packet>| table(packets).timeline();
        let plain = seconds(stream(4, 50));
        let mut doubled = stream(4, 50);
        doubled[100].pts = doubled[100].pts.map(|pts| pts - 40);
        let times = seconds(doubled).times;
        let changed: Vec<usize> = (0..200).filter(|&index| times[index] != plain.times[index]).collect();
        assert_eq!((changed, times[100]), (vec![100], times[99]));
        for restart in [0, 3000] {
            let mut packets = stream(4, 50);
            for packet in &mut packets[100..] {
                packet.pts = packet.pts.map(|pts| pts - 4000 + restart);
                packet.dts = packet.dts.map(|dts| dts - 4000 + restart);
            }
            let repaired = seconds(packets);
            assert_eq!(repaired.times.len(), 200);
            assert!(repaired.times.iter().zip(&plain.times).all(|(a, b)| (a - b).abs() < 1e-9), "{restart}");
        }
        let mut spike = stream(4, 50);
        spike[103].pts = Some(1 << 50);
        spike[153].pts = None;
        let repaired = seconds(spike);
        assert!(repaired.times.iter().zip(&plain.times).all(|(a, b)| (a - b).abs() < 0.081), "{repaired:?}");
        assert!((repaired.duration - 8.0).abs() < 1e-9);
    }

    #[test]
    fn frames_of_packets_that_are_cut_off_are_not_sampled() {
        let table = table(stream(1, 10));
        let decoded: Vec<Option<i64>> = (0..11).map(|frame| Some(frame * 40 + 80)).collect();
        let numbers = |decoded: &[Option<i64>], parts_missing| {
            let seen = table.seen_frames(decoded, parts_missing);
            seen.iter().map(|frame| frame.number).collect::<Vec<_>>()
        };
        assert_eq!(numbers(&decoded, true), (0..10).collect::<Vec<_>>());
        assert_eq!(numbers(&decoded, false), (0..11).collect::<Vec<_>>());
        assert_eq!(
            numbers(&[None; 11], true),
            (0..11).collect::<Vec<_>>(),
            "other times than the container's"
        );
    }

    #[test]
    fn decoding_times_stand_in_only_without_reordering() {
        let mut packets = stream(2, 10);
        packets.iter_mut().for_each(|packet| packet.pts = None);
        assert!(PacketTable::new(packets.clone(), CLOCK, true).display.is_none());
        assert!(PacketTable::new(packets, CLOCK, false).display.is_some());
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
