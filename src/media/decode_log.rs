//! Parses the log of a decoder process: frames decoded, frames written, packets lost.
//!
//! Called by `decode.rs`, line by line. The log identifies frames: a filter's own frame count
//! restarts when ffmpeg rebuilds the filter graph. Must never keep more of a line than a number.

/// ffmpeg's filter that logs every decoded frame; the first of a chain and the one behind `select`.
pub const SHOWINFO: &str = "showinfo=checksum=0";
const DECODED: &str = "[Parsed_showinfo_0";
const SELECTED: &str = "[Parsed_showinfo_2";
/// One line for each packet that gave an error instead of a frame (4.4 to 6.0, then 6.1 and later).
const LOST_PACKET: [&str; 3] =
    ["Error while decoding stream", "Error submitting packet to decoder", "Decoding error:"];
/// One line for each frame in which the decoder replaced what it could not decode.
const CONCEALED_FRAME: &str = "corrupt decoded frame";
/// HEVC: a picture that is predicted from one that is not there.
const MISSING_REFERENCE: &str = "Could not find ref with POC";

/// ffmpeg before 5.1, which decodes nothing then.
const NO_FPS_MODE: &str = "Unrecognized option 'fps_mode'";

/// The account of one pass.
#[derive(Debug, Default)]
pub struct DecodeLog {
    /// pts of every frame decoded, in display order.
    pub decoded: Vec<Option<i64>>,
    /// Positions in `decoded` of the frames given out, in their order; `None`: a frame that was not
    /// decoded.
    pub selected: Vec<Option<usize>>,
    /// Nothing was done: ffmpeg does not know the option `-fps_mode`.
    pub is_old_ffmpeg: bool,
    lost_packets: usize,
    concealed_frames: usize,
    reference_missing: bool,
}

impl DecodeLog {
    /// Takes one line. Returns whether it tells of a frame.
    pub fn take(&mut self, line: &str) -> bool {
        if let Some(pts) = pts_of(line, DECODED) {
            self.concealed_frames += usize::from(std::mem::take(&mut self.reference_missing));
            self.decoded.push(pts);
        } else if let Some(pts) = pts_of(line, SELECTED) {
            self.selected.push(self.position_of(pts));
        } else if line.starts_with(DECODED) || line.starts_with(SELECTED) {
            return true;
        } else {
            self.is_old_ffmpeg |= line.contains(NO_FPS_MODE);
            self.lost_packets += usize::from(LOST_PACKET.iter().any(|sign| line.contains(sign)));
            self.concealed_frames += usize::from(line.contains(CONCEALED_FRAME));
            self.reference_missing |= line.contains(MISSING_REFERENCE);
            return false;
        }
        true
    }

    /// Returns the number of packets without a frame plus frames with concealed parts.
    pub fn damages(&self) -> usize {
        self.lost_packets + self.concealed_frames
    }

    /// Returns the number of frames decoded without concealment.
    pub fn num_whole(&self) -> usize {
        self.decoded.len().saturating_sub(self.concealed_frames)
    }

    /// Returns the last decoded frame with this pts that was not given out yet: `select` logs it
    /// right after.
    fn position_of(&self, pts: Option<i64>) -> Option<usize> {
        let from = self.selected.last().map_or(Some(0), |last| last.map(|last| last + 1))?;
        let later = self.decoded.get(from..)?;
        later.iter().rposition(|&decoded| decoded == pts).map(|position| from + position)
    }
}

/// The pts in a line of `showinfo`: `… n:   0 pts:   512 pts_time:0.04 …` (`pts:NOPTS` if it has
/// none).
fn pts_of(line: &str, filter: &str) -> Option<Option<i64>> {
    let (head, rest) = line.strip_prefix(filter)?.split_once(" pts:")?;
    head.contains(" n:").then(|| rest.split_whitespace().next().and_then(|pts| pts.parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(lines: &[&str]) -> DecodeLog {
        let mut log = DecodeLog::default();
        lines.iter().for_each(|line| _ = log.take(line));
        log
    }

    fn shown(filter: usize, n: usize, pts: &str) -> String {
        format!("[Parsed_showinfo_{filter} @ 0x5623] [info] n: {n:3} pts:{pts:>7} pts_time:-0.04 fmt:yuv420p")
    }

    #[test]
    fn frames_are_told_apart_by_their_pts_and_place() {
        let lines = [
            shown(0, 0, "-512"),
            shown(0, 1, "40"),
            shown(2, 0, "40"),
            // The filters were rebuilt.
            shown(0, 0, "40"),
            shown(2, 0, "40"),
            shown(0, 1, "NOPTS"),
            shown(2, 1, "NOPTS"),
            shown(2, 2, "80"),
        ];
        let log = log(&lines.each_ref().map(String::as_str));
        assert_eq!(log.decoded, [Some(-512), Some(40), Some(40), None]);
        assert_eq!(log.selected, [Some(1), Some(2), Some(3), None]);
    }

    #[test]
    fn only_the_lines_of_frames_tell_frames() {
        let log = log(&[
            "[Parsed_showinfo_0 @ 0x5623] [info] config in time_base: 1/1000",
            "[h264 @ 0x5] [error] n: 1 pts: 2",
            "[info] Stream #0:0: Video: h264, yuv420p, 160x128",
        ]);
        assert_eq!((log.decoded.len(), log.selected.len(), log.damages()), (0, 0, 0));
    }

    #[test]
    fn lost_packets_and_concealed_frames_are_counted_in_the_words_of_every_version() {
        let missing = "[hevc @ 0x5] [error] Could not find ref with POC 12";
        let log = log(&[
            "[error] Error while decoding stream #0:0: Invalid data found when processing input",
            "[vist#0:0/h264 @ 0x5] [error] Error submitting packet to decoder: Invalid data found",
            "[vist#0:0/h264 @ 0x5] [dec:h264 @ 0x6] [error] Decoding error: Invalid data found",
            "[warning] file:a.mp4: corrupt decoded frame in stream 0",
            &shown(0, 0, "0"),
            "[dec:h264 @ 0x6] [warning] corrupt decoded frame",
            &shown(0, 1, "40"),
            missing,
            missing,
            &shown(0, 2, "80"),
            &shown(0, 3, "120"),
        ]);
        assert_eq!((log.damages(), log.num_whole()), (6, 1));
    }
}
