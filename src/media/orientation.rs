//! Turns the display matrix of a video into ffmpeg filters.
//!
//! Called by `probe.rs`. Must never turn a picture by anything but quarter turns and mirrors.

use std::fs::File;

use super::{
    container::Container,
    mp4_boxes::{Matrix, display_matrix},
    streams::Stream,
};

/// Filters of ffmpeg that turn a stored picture for display, applied to sampled frames only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Orientation {
    pub filters: &'static [&'static str],
    pub swaps_sides: bool,
}

impl Orientation {
    /// From the display matrix `[a b u; c d v; x y w]`, row by row. Anything but quarter turns and
    /// mirrors is ignored.
    fn from_matrix(&[a, b, _, c, d, ..]: &Matrix) -> Self {
        let filters: &[&str] = match (a.signum(), b.signum(), c.signum(), d.signum()) {
            (-1, 0, 0, 1) => &["hflip"],
            (1, 0, 0, -1) => &["vflip"],
            (-1, 0, 0, -1) => &["hflip", "vflip"],
            (0, 1, -1, 0) => &["transpose=clock"],
            (0, -1, 1, 0) => &["transpose=cclock"],
            (0, 1, 1, 0) => &["transpose=cclock_flip"],
            (0, -1, -1, 0) => &["transpose=clock_flip"],
            _ => &[],
        };
        Orientation { filters, swaps_sides: filters.iter().any(|filter| filter.starts_with("transpose")) }
    }

    /// Converts the angle that ffmpeg prints, which does not tell mirrors.
    fn from_degrees(degrees: f64) -> Self {
        let filters: &[&str] = match degrees.round() as i64 {
            -90 | 270 => &["transpose=clock"],
            90 | -270 => &["transpose=cclock"],
            180 | -180 => &["hflip", "vflip"],
            _ => &[],
        };
        Orientation { filters, swaps_sides: filters.len() == 1 }
    }

    /// Reads the display matrix of an MP4 or MOV file, or uses the printed angle. Blocks.
    pub fn find(file: &File, container: Container, stream: &Stream) -> Self {
        let Some(degrees) = stream.rotation_degrees else { return Orientation::default() };
        let matrix = match (container, stream.id) {
            (Container::Mp4 | Container::Mov, Some(id)) => display_matrix(file, id),
            _ => None,
        };
        match matrix {
            Some(matrix) => Orientation::from_matrix(&matrix),
            None => Orientation::from_degrees(degrees),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quarter_turns_and_mirrors_become_filters() {
        let one = 65536;
        let filters = |a, b, c, d| Orientation::from_matrix(&[a, b, 0, c, d, 0, 0, 0, 1 << 30]).filters;
        assert_eq!(filters(one, 0, 0, one), [""; 0]);
        assert_eq!(filters(0, one, -one, 0), ["transpose=clock"]);
        assert_eq!(filters(0, -one, one, 0), ["transpose=cclock"]);
        assert_eq!(filters(-one, 0, 0, -one), ["hflip", "vflip"]);
        assert_eq!(filters(-one, 0, 0, one), ["hflip"]);
        assert_eq!(filters(46341, 46341, -46341, 46341), [""; 0]);
    }

    #[test]
    fn a_turn_told_in_degrees_is_the_same_turn() {
        let filters = |degrees| Orientation::from_degrees(degrees).filters;
        assert_eq!(filters(-90.0), ["transpose=clock"]);
        assert_eq!(filters(90.0), ["transpose=cclock"]);
        assert_eq!(filters(-180.0), ["hflip", "vflip"]);
        assert_eq!(filters(0.0), [""; 0]);
        assert!(Orientation::from_degrees(90.0).swaps_sides && !Orientation::from_degrees(180.0).swaps_sides);
    }
}
