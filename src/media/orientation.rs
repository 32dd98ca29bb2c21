//! Turns the display matrix of a video into ffmpeg filters.
//!
//! Called by `probe.rs`. Pure. Must never turn a picture by anything but quarter turns and mirrors.

/// Filters of ffmpeg that turn a stored picture for display, applied to sampled frames only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Orientation {
    pub filters: &'static [&'static str],
    pub swaps_sides: bool,
}

impl Orientation {
    /// From the display matrix `[a b u; c d v; x y w]`, row by row. Anything but quarter turns and
    /// mirrors is ignored.
    pub fn from_matrix(matrix: &[i64]) -> Self {
        let &[a, b, _, c, d, ..] = matrix else { return Orientation::default() };
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
}
