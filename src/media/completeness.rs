//! The one rule for media of which a part is missing: below `MediaConfig::min_decoded_share` they
//! are refused, above it the reply says how much was promised and how much could be decoded.
//!
//! Called by `probe.rs` (what did not arrive, by the packet table and the file's length),
//! `decode.rs` (what the decoder could not decode) and `pictures.rs` (rows of a picture). Must
//! never count a frame that the decoder only guessed.

use std::{fs::File, os::unix::fs::FileExt};

use super::{
    MediaError, claims::FileClaims, container::Container, decode_log::DecodeLog, packet_table::Packet,
};

/// Bytes at the beginning of a packet; no codec has a packet that begins with so many zeros.
const PACKET_HEAD_BYTES: usize = 16;
/// Transport streams cut packets into pieces: bytes before and behind a packet at most, and one
/// byte in so many within it.
const TS_HEADER_BYTES: usize = 400;
const TS_OVERHEAD: usize = 40;
/// Packets looked at before all of them are: what did not arrive is rarely less than a thousandth.
const SAMPLED_PACKETS: usize = 1024;

/// Frames that a video promises, and those of them that can be decoded as far as is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Completeness {
    pub promised: usize,
    pub decoded: usize,
}

impl Completeness {
    /// Drops the packets of `packets` that did not arrive. `claimed_frames`: by the container's
    /// header. Blocks.
    pub fn of_packets(packets: &mut Vec<Packet>, claimed_frames: Option<usize>, source: &Source<'_>) -> Self {
        let shown = |packets: &[Packet]| packets.iter().filter(|packet| !packet.discard).count();
        let listed = shown(packets);
        let hidden = packets.len() - listed;
        source.drop_missing(packets);
        let decoded = shown(packets);
        let has_count = matches!(source.container, Container::Mp4 | Container::Mov | Container::Avi);
        let claimed = claimed_frames.filter(|_| has_count);
        let promised = match claimed {
            _ if !source.claims.is_short() => listed,
            Some(claimed) => claimed.saturating_sub(hidden).max(listed),
            // Bytes are all that is known of the rest.
            None => {
                let FileClaims { promised_bytes, present_bytes, .. } = source.claims;
                let frames = decoded as u128 * u128::from(promised_bytes) / u128::from(present_bytes.max(1));
                usize::try_from(frames).unwrap_or(usize::MAX).max(listed)
            }
        };
        Completeness { promised, decoded }
    }

    /// Returns the completeness after a decoder has processed all packets.
    pub fn after_decoding(self, log: &DecodeLog) -> Self {
        let (fed, whole) = (self.decoded, log.num_whole());
        let without_frame = fed.max(log.decoded.len()) - whole;
        // Some packets have no frame of their own (second fields, frames that are only referred
        // to), but never more than every other one. Otherwise only what the decoder complained
        // about is lost.
        let lost = if whole * 2 + 1 < fed { without_frame } else { log.damages().min(without_frame) };
        let promised = (self.promised - fed + whole + lost).min(self.promised.max(whole));
        Completeness { promised, decoded: whole }
    }

    /// Returns true if nothing is known to be missing.
    pub fn is_whole(self) -> bool {
        self.decoded >= self.promised
    }

    /// Returns the share of the promised frames that can be decoded, 0 to 1.
    pub fn share(self) -> f64 {
        if self.promised == 0 { 0.0 } else { self.decoded as f64 / self.promised as f64 }
    }

    /// Checks the share.
    ///
    /// # Errors
    /// When less than `min_share` can be decoded.
    pub fn check(self, min_share: f64) -> Result<(), MediaError> {
        if self.decoded > 0 && self.share() >= min_share {
            return Ok(());
        }
        let decodable = match self.decoded {
            0 => "none".to_owned(),
            decoded => format!("only {decoded}"),
        };
        Err(MediaError::Undecodable(format!(
            "{decodable} of {} frames of the video can be decoded; send the whole video, undamaged and not encrypted",
            self.promised
        )))
    }
}

/// The file that packets were read from.
#[derive(Debug)]
pub struct Source<'a> {
    pub file: &'a File,
    pub container: Container,
    pub claims: FileClaims,
}

impl Source<'_> {
    fn drop_missing(&self, packets: &mut Vec<Packet>) {
        if !matches!(self.container, Container::Mp4 | Container::Mov) {
            // No index: packets that demuxers find have arrived, but the last one may be cut off.
            if self.claims.is_short() && packets.last().is_some_and(|packet| self.reaches_the_end(packet)) {
                packets.pop();
            }
            return;
        }
        let stride = packets.len() / SAMPLED_PACKETS + 1;
        let all_there = packets.iter().rev().step_by(stride).all(|packet| self.has_arrived(packet));
        if !all_there {
            packets.retain(|packet| self.has_arrived(packet));
        }
    }

    fn reaches_the_end(&self, packet: &Packet) -> bool {
        let Some((position, len)) = packet.place else { return false };
        let slack = match self.container {
            Container::MpegTs => TS_HEADER_BYTES + len / TS_OVERHEAD,
            // The demuxer cuts the packet to the file's end.
            Container::Avi => 1,
            _ => 0,
        };
        position.saturating_add((len + slack) as u64) > self.claims.present_bytes
    }

    fn has_arrived(&self, packet: &Packet) -> bool {
        let Some((position, len)) = packet.place else { return true };
        let present = self.claims.present_bytes;
        let end = position.saturating_add(len as u64);
        // Demuxers cut the last packet of a file that is cut off.
        if end > present || end == present && self.claims.is_short() {
            return false;
        }
        let mut head = [0; PACKET_HEAD_BYTES];
        let head = &mut head[..len.min(PACKET_HEAD_BYTES)];
        self.file.read_exact_at(head, position).is_ok()
            && (len < PACKET_HEAD_BYTES || head.iter().any(|&byte| byte != 0))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn log(frames: usize, lines: &[(&str, usize)]) -> DecodeLog {
        let mut log = DecodeLog::default();
        for &(line, times) in lines {
            (0..times).for_each(|_| _ = log.take(line));
        }
        for frame in 0..frames {
            log.take(&format!("[Parsed_showinfo_0 @ 0x1] [info] n:{frame} pts:{frame} pts_time:0"));
        }
        log
    }

    const LOST: &str = "[error] Error while decoding stream #0:0: Invalid data found";
    const CONCEALED: &str = "[warning] corrupt decoded frame";

    #[test]
    fn lost_and_concealed_frames_are_not_decoded() {
        let all = Completeness { promised: 100, decoded: 100 };
        let after = |frames, lines: &[(&str, usize)]| all.after_decoding(&log(frames, lines));
        let told = |promised, decoded| Completeness { promised, decoded };
        assert_eq!(after(100, &[]), told(100, 100));
        assert_eq!(after(90, &[(LOST, 10)]), told(100, 90));
        assert_eq!(after(100, &[(CONCEALED, 97)]), told(100, 3));
        assert_eq!(after(2, &[(LOST, 91), (CONCEALED, 2)]), told(100, 0));
        assert_eq!(after(4, &[]), told(100, 4), "encrypted, and nobody complains");
        assert_eq!(after(93, &[]), told(93, 93), "hidden frames");
        assert_eq!(after(50, &[]), told(50, 50), "a packet for each field");
        assert_eq!(after(120, &[]), told(120, 120), "more frames than packets");
        let cut = Completeness { promised: 100, decoded: 70 };
        assert_eq!(cut.after_decoding(&log(69, &[(LOST, 1)])), told(100, 69));
    }

    #[test]
    fn the_share_decides_and_the_error_tells_it() {
        let check = |promised, decoded| Completeness { promised, decoded }.check(0.5);
        assert!(check(100, 50).is_ok() && check(1, 1).is_ok());
        let message = check(100, 3).unwrap_err().to_string();
        assert!(message.starts_with("only 3 of 100 frames of the video can be decoded; "), "{message}");
        assert!(check(100, 0).unwrap_err().to_string().starts_with("none of 100 frames"));
        assert!(check(0, 0).is_err());
    }

    #[test]
    fn packets_that_did_not_arrive_are_promised_and_dropped() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 700]).unwrap();
        file.write_all(&[0; 300]).unwrap();
        let packet = |position: u64| Packet { place: Some((position, 100)), ..Packet::default() };
        let survey = |container, claimed, promised_bytes, present_bytes| {
            let mut packets: Vec<Packet> = (0..10).map(|number| packet(number * 100)).collect();
            let claims = FileClaims { encrypted: false, promised_bytes, present_bytes };
            let told =
                Completeness::of_packets(&mut packets, claimed, &Source { file: &file, container, claims });
            (told.promised, told.decoded, packets.len())
        };
        assert_eq!(survey(Container::Mp4, None, 1000, 1000), (10, 7, 7), "zeros in place of packets");
        assert_eq!(survey(Container::Mp4, Some(40), 4000, 700), (40, 6, 6), "the last one may be cut");
        assert_eq!(survey(Container::Avi, Some(40), 4000, 1000), (40, 9, 9));
        assert_eq!(survey(Container::Avi, Some(40), 4000, 2000), (40, 10, 10));
        assert_eq!(survey(Container::Avi, Some(40), 1000, 1000), (10, 10, 10), "no byte is missing");
        assert_eq!(survey(Container::WebM, None, 2100, 1500), (14, 10, 10), "by its bytes");
        assert_eq!(survey(Container::WebM, None, 1509, 1500), (10, 10, 10), "an index is no frame");
    }
}
