//! Times of frames from their time stamps, also where the stamps are not quite in order.
//!
//! Called by `packet_table.rs`. Pure. Stamps that do not decrease are kept as they are. A stamp
//! that is missing or falls out of the order is replaced from its neighbors, and a clock that
//! restarts goes on one frame after the frame before: a fault changes times at its own place only.
//! Must never read a claimed length: only the stamps of frames count.

use super::frame_sampling::Timeline;

/// A last frame may be shown for this long, or as long as any other: some demuxers stretch it to
/// the claimed length of the file.
const MAX_LAST_FRAME_SECONDS: f64 = 10.0;

/// Seconds between two frames that mean a restart where clocks may jump: ffmpeg and players use the
/// same bound.
const MAX_GAP_SECONDS: f64 = 10.0;

/// Unit and rate of a stream's time stamps.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    /// (numerator, denominator) of a time unit in seconds.
    pub time_base: (u32, u32),
    /// Frames a second, for frames without neighbors that tell it.
    pub nominal_rate: f64,
    /// The container's clock may jump forward without a pause in the video, as in transport
    /// streams.
    pub may_jump: bool,
    /// Earliest start of all streams of the file, seconds: players count from there. `None`: the
    /// first frame is the start. A negative start is priming of sound, which players drop.
    pub file_start: Option<f64>,
}

impl Clock {
    /// Converts time units to seconds.
    pub fn seconds(&self, units: f64) -> f64 {
        units * f64::from(self.time_base.0) / f64::from(self.time_base.1)
    }

    /// Returns the times of frames with these stamps, in display order. `last_duration` is in
    /// units, 0 if unknown.
    pub fn timeline(&self, pts: &[Option<i64>], last_duration: i64) -> Timeline {
        let known = without_outliers(pts);
        let step = self.usual_step(&known);
        let Some(stamps) = self.repaired(&known, step) else {
            let times = (0..pts.len()).map(|index| index as f64 / self.nominal_rate).collect();
            return Timeline { times, duration: pts.len() as f64 / self.nominal_rate };
        };
        let first = stamps[0];
        let offset =
            self.file_start.map_or(0.0, |start| (self.seconds(first as f64) - start.max(0.0)).max(0.0));
        let mut times = Vec::with_capacity(stamps.len());
        let mut longest_gap = 0.0_f64;
        for (index, &stamp) in stamps.iter().enumerate() {
            times.push(offset + self.seconds((stamp - first) as f64));
            if index > 0 {
                longest_gap = longest_gap.max(times[index] - times[index - 1]);
            }
        }
        let stored = self.seconds(last_duration as f64);
        let is_credible = stored > 0.0 && stored <= longest_gap.max(MAX_LAST_FRAME_SECONDS);
        let last = if is_credible { stored } else { 1.0 / self.nominal_rate };
        let duration = times[times.len() - 1] + last;
        Timeline { times, duration }
    }

    /// Returns the median step between frames in units, or the step of the nominal rate.
    fn usual_step(&self, pts: &[Option<i64>]) -> i128 {
        let pairs = pts.windows(2).filter_map(|pair| Some(i128::from(pair[1]?) - i128::from(pair[0]?)));
        let mut steps: Vec<i128> = pairs.filter(|&step| step > 0).collect();
        if steps.is_empty() {
            return (1.0 / (self.nominal_rate * self.seconds(1.0))).round().max(1.0) as i128;
        }
        let middle = steps.len() / 2;
        *steps.select_nth_unstable(middle).1
    }

    /// Returns one stamp per frame, non-decreasing; `None` if no frame has a stamp.
    fn repaired(&self, pts: &[Option<i64>], step: i128) -> Option<Vec<i128>> {
        let first_known = pts.iter().position(Option::is_some)?;
        let max_gap = match self.may_jump {
            true => (MAX_GAP_SECONDS / self.seconds(1.0)) as i128,
            false => i128::MAX,
        };
        let mut repaired: Vec<i128> = Vec::with_capacity(pts.len());
        let start = i128::from(pts[first_known]?);
        repaired.extend((0..first_known).map(|index| start - step * (first_known - index) as i128));
        // Added to every stamp since the last restart.
        let mut shift = 0;
        let mut missing = 0;
        for stamp in &pts[first_known..] {
            let Some(stamp) = *stamp else {
                missing += 1;
                continue;
            };
            let frames = missing + 1;
            let mut time = i128::from(stamp) + shift;
            if let Some(&before) = repaired.last()
                && (time < before || time - before > max_gap.max(step * 2 * frames))
            {
                let expected = before + step * frames;
                shift += expected - time;
                time = expected;
            }
            let before = repaired.last().copied().unwrap_or(time);
            repaired.extend((1..=missing).map(|index| before + (time - before) * index / frames));
            repaired.push(time);
            missing = 0;
        }
        let last = *repaired.last()?;
        repaired.extend((1..=missing).map(|index| last + step * index));
        Some(repaired)
    }
}

/// Removes the stamps of single frames that break an order which continues after them.
fn without_outliers(pts: &[Option<i64>]) -> Vec<Option<i64>> {
    let mut kept = pts.to_vec();
    let known: Vec<(usize, i64)> =
        pts.iter().enumerate().filter_map(|(index, stamp)| Some((index, (*stamp)?))).collect();
    for (at, pair) in known.windows(2).enumerate() {
        let ((early, before), (late, stamp)) = (pair[0], pair[1]);
        if stamp >= before {
            continue;
        }
        let after = known.get(at + 2).map(|&(_, stamp)| stamp);
        let earlier = at.checked_sub(1).map(|at| known[at].1);
        if after.is_some_and(|after| after >= before) {
            kept[late] = None;
        } else if earlier.is_some_and(|earlier| stamp >= earlier) {
            kept[early] = None;
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn times(pts: &[Option<i64>], may_jump: bool) -> Vec<f64> {
        let clock = Clock { time_base: (1, 1000), nominal_rate: 25.0, may_jump, file_start: None };
        let timeline = clock.timeline(pts, 0);
        assert_eq!(timeline.times.len(), pts.len());
        timeline.times.iter().map(|seconds| (seconds * 1000.0).round()).collect()
    }

    fn known(pts: &[i64]) -> Vec<Option<i64>> {
        pts.iter().copied().map(Some).collect()
    }

    #[test]
    fn equal_times_and_pauses_stay_as_they_are() {
        let pts = known(&[80, 120, 120, 160, 5160, 65_160]);
        assert_eq!(times(&pts, false), [0.0, 40.0, 40.0, 80.0, 5080.0, 65_080.0]);
    }

    #[test]
    fn a_restarted_clock_goes_on_one_frame_later() {
        let pts = known(&[1000, 1040, 1080, 0, 40, 80, 3080]);
        assert_eq!(times(&pts, false), [0.0, 40.0, 80.0, 120.0, 160.0, 200.0, 3200.0]);
        let pts = known(&[1000, 1040, 1080, 800, 840, 880]);
        assert_eq!(times(&pts, false), [0.0, 40.0, 80.0, 120.0, 160.0, 200.0]);
    }

    #[test]
    fn a_clock_that_may_jump_is_repaired_there() {
        let pts = known(&[0, 40, 3_600_000, 3_600_040]);
        assert_eq!(times(&pts, true), [0.0, 40.0, 80.0, 120.0]);
        assert_eq!(times(&pts, false), [0.0, 40.0, 3_600_000.0, 3_600_040.0]);
        assert_eq!(times(&known(&[0, 40, 9040, 9080]), true), [0.0, 40.0, 9040.0, 9080.0]);
    }

    #[test]
    fn missing_times_are_filled_from_their_neighbors() {
        let pts = [None, Some(40), Some(80), None, None, Some(500), None];
        assert_eq!(times(&pts, false), [0.0, 40.0, 80.0, 220.0, 360.0, 500.0, 540.0]);
        assert_eq!(times(&[None, None], false), [0.0, 40.0]);
    }

    #[test]
    fn one_frame_out_of_order_moves_no_other() {
        let expected = [0.0, 40.0, 80.0, 120.0, 160.0];
        assert_eq!(times(&known(&[0, 40, 9_999_999, 120, 160]), false), expected);
        assert_eq!(times(&known(&[0, 40, 3, 120, 160]), false), expected);
    }

    proptest! {
        #[test]
        fn any_stamps_give_times_in_order(
            pts in proptest::collection::vec(proptest::option::of(any::<i64>()), 1..60), may_jump: bool,
        ) {
            let clock = Clock { time_base: (1, 90_000), nominal_rate: 25.0, may_jump, file_start: None };
            let timeline = clock.timeline(&pts, 0);
            prop_assert_eq!(timeline.times.len(), pts.len());
            prop_assert!(timeline.times.is_sorted() && timeline.times.iter().all(|time| time.is_finite()));
            prop_assert!(timeline.duration >= timeline.times[pts.len() - 1]);
        }

        #[test]
        fn stamps_in_order_are_kept(
            mut pts in proptest::collection::vec(0i64..1_000_000, 1..60),
        ) {
            pts.sort_unstable();
            let first = pts[0];
            let expected: Vec<f64> = pts.iter().map(|pts| (pts - first) as f64).collect();
            prop_assert_eq!(times(&known(&pts), false), expected);
        }
    }
}
