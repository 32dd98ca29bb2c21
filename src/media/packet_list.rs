//! The packets of a stream, parsed from the output of ffmpeg's `framecrc` muxer.
//!
//! Called by `probe.rs`. A line of that muxer has one free field besides the packet's number, size
//! and flags. So ffmpeg copies the stream three times, and a bitstream filter puts another
//! property of the packet into that field of each copy. ffprobe prints all properties at once, but
//! opens a decoder for every stream of the file and exits if one is not allowed. Must never keep
//! more packets than the limit.

use super::{MediaError, packet_table::Packet};

/// Decoding time of each copy's first packet; the next ones count up from here. Muxers change
/// decoding times that are out of order or after the display time, so these numbers are far below
/// zero.
const FIRST_NUMBER: i64 = -1_000_000_000_000_000;
/// Bitstream filters of the three copies: display time, decoding time, position in the file.
pub const PRINT_PACKETS: [&str; 3] =
    ["setts=pts=PTS:dts=N-1e15", "setts=pts=DTS:dts=N-1e15", "setts=pts=POS:dts=N-1e15"];
/// libavutil's `AV_NOPTS_VALUE`.
const NONE: i64 = i64::MIN;
/// libavcodec's packet flags.
const KEY: u32 = 1;
const DISCARD: u32 = 4;

/// The collected output of one run.
#[derive(Debug, Default)]
pub struct PacketList {
    max_packets: usize,
    pub packets: Vec<Packet>,
    /// Packets of each copied stream.
    pub counts: Vec<usize>,
    /// (numerator, denominator) of a time unit in seconds.
    pub time_base: Option<(u32, u32)>,
    /// Stored width and height of the pictures, pixels; 0 if unknown.
    pub size: (usize, usize),
    /// Frames are stored in another order than shown: a decoding time is no substitute for a
    /// missing display time.
    pub reorders: bool,
}

/// A line `0, -999999999999999, 80, 40, 38, 0x08bb0eb0, F=0x0`: copy, number, free field, duration,
/// bytes, checksum, flags.
struct Line {
    copy: usize,
    number: i64,
    value: i64,
    duration: i64,
    bytes: usize,
    flags: u32,
}

impl PacketList {
    pub fn new(max_packets: usize) -> Self {
        PacketList { max_packets, ..PacketList::default() }
    }

    /// Takes a line of the output.
    ///
    /// # Errors
    /// When there are more packets than are accepted.
    pub fn take(&mut self, line: &str) -> Result<(), MediaError> {
        if let Some(header) = line.strip_prefix('#') {
            self.take_header(header);
        } else if let Some(line) = Line::parse(line) {
            if self.counts.len() <= line.copy {
                self.counts.resize(line.copy + 1, 0);
            }
            self.counts[line.copy] += 1;
            if self.counts[line.copy] > self.max_packets {
                return Err(MediaError::Undecodable(format!(
                    "the video has more than {} frames; send a shorter one",
                    self.max_packets
                )));
            }
            self.take_packet(&line);
        }
        Ok(())
    }

    fn take_header(&mut self, header: &str) {
        match header.split_once(" 0: ") {
            Some(("tb", value)) => self.time_base = fraction(value),
            Some(("dimensions", value)) => {
                let (width, height) = value.split_once('x').unwrap_or_default();
                self.size = (width.parse().unwrap_or(0), height.parse().unwrap_or(0));
            }
            _ => {}
        }
    }

    fn take_packet(&mut self, line: &Line) {
        let Some(number) = line.number.checked_sub(FIRST_NUMBER).and_then(|n| usize::try_from(n).ok()) else {
            return;
        };
        if number == self.packets.len() && number < self.max_packets {
            self.packets.push(Packet::default());
        }
        let Some(packet) = self.packets.get_mut(number) else { return };
        match line.copy {
            // Without reordering, the muxer replaces a missing display time by the decoding time.
            0 if line.value == NONE => self.reorders = true,
            0 if line.value == line.number => {}
            0 => packet.pts = Some(line.value),
            1 => packet.dts = (line.value != NONE && line.value != line.number).then_some(line.value),
            2 => packet.place = u64::try_from(line.value).ok().map(|position| (position, line.bytes)),
            _ => {}
        }
        packet.duration = line.duration;
        packet.key = line.flags & KEY != 0;
        packet.discard = line.flags & DISCARD != 0;
    }
}

impl Line {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split(',').map(str::trim);
        let copy = fields.next()?.parse().ok().filter(|copy| *copy < 100)?;
        let (number, value) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let (duration, bytes) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        // Only flags other than those of a plain keyframe are printed.
        let flags = fields.find_map(|field| field.strip_prefix("F=0x"));
        let flags = flags.map_or(Some(KEY), |flags| u32::from_str_radix(flags, 16).ok())?;
        Some(Line { copy, number, value, duration, bytes, flags })
    }
}

/// `1/25` -> (1, 25); none if either is 0.
fn fraction(text: &str) -> Option<(u32, u32)> {
    let (numerator, denominator) = text.split_once('/')?;
    let (n, d) = (numerator.parse().ok()?, denominator.parse().ok()?);
    (n > 0 && d > 0).then_some((n, d))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(lines: &[&str]) -> PacketList {
        let mut list = PacketList::new(100);
        lines.iter().for_each(|line| list.take(line).unwrap());
        list
    }

    #[test]
    fn packets_are_put_together_from_three_copies() {
        let list = list(&[
            "#software: Lavf59.27.100",
            "#tb 0: 1/12800",
            "#codec_id 0: h264",
            "#dimensions 0: 64x36",
            "#dimensions 1: 1x1",
            "0, -1000000000000000,        512,      512,       99, 0x01d9059c, F=0x5, S=1,        1",
            "1, -1000000000000000,       -512,      512,       99, 0x01d9059c, F=0x5",
            "2, -1000000000000000,         48,      512,       99, 0x01d9059c, F=0x5",
            "0, -999999999999999, -9223372036854775808, 0, 7, 0x08bb0eb0, F=0x0",
            "2, -999999999999999, -1, 0, 7, 0x08bb0eb0, F=0x0",
            "1, -999999999999999, 0, 0, 7, 0x08bb0eb0, F=0x0",
            "0, -999999999999998, 1024, 512, 7, 0x08bb0eb0",
        ]);
        let first = Packet {
            pts: Some(512),
            dts: Some(-512),
            duration: 512,
            key: true,
            discard: true,
            place: Some((48, 99)),
        };
        let second = Packet { dts: Some(0), ..Packet::default() };
        let third = Packet { pts: Some(1024), duration: 512, key: true, ..Packet::default() };
        assert_eq!(list.packets, [first, second, third]);
        assert_eq!((list.time_base, list.size, list.reorders), (Some((1, 12800)), (64, 36), true));
        assert_eq!(list.counts, [3, 2, 2]);
    }

    #[test]
    fn a_missing_time_that_the_muxer_filled_in_is_missing_still() {
        let list = list(&[
            "0, -1000000000000000, -1000000000000000, 1, 9, 0x1",
            "1, -1000000000000000, 4, 1, 9, 0x1",
        ]);
        assert_eq!((list.packets[0].pts, list.packets[0].dts), (None, Some(4)));
        assert!(!list.reorders, "decoding times are display times");
    }

    #[test]
    fn packets_beyond_the_limit_are_refused() {
        let mut list = PacketList::new(1);
        list.take("0, -1000000000000000, 0, 1, 9, 0x1").unwrap();
        let error = list.take("0, -999999999999999, 0, 1, 9, 0x1").unwrap_err();
        assert!(error.to_string().contains("more than 1 frames"));
    }

    proptest! {
        #[test]
        fn any_line_is_read_without_harm(lines in proptest::collection::vec("[0-9#FSxtb=,: -]{0,80}", 0..20)) {
            let mut list = PacketList::new(3);
            for line in &lines {
                let _ = list.take(line);
            }
            prop_assert!(list.packets.len() <= 3 && list.counts.len() <= 100);
        }
    }
}
