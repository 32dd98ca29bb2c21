//! Which frames of a video the model sees. Pure: no files, no clock.
//!
//! Called by `mod.rs` with the video's timeline. Must give the original implementation's exact indices: another
//! rounding shows the model other frames than the ones its published scores were made with.
//!
//! The model was trained on a fixed number of frames (or frames per second), so a video with fewer
//! frames repeats some, as the original does. A number or a rate that the client asks for gives
//! each frame at most once: a short video then gives fewer frames, not an error.
//!
//! A number of frames is spread by index, as in the original. A rate that the client asks for
//! selects by time: the frames on screen every `1 / fps` seconds.

use super::{FrameSampling, MediaError};
use crate::config::MediaConfig;

/// Container time bases round durations (Matroska to 1 ms): this much may be missing from a whole second.
const DURATION_TOLERANCE_SECONDS: f64 = 1e-3;
/// The same for the time of one frame: half of 1 ms, plus a margin.
const TIME_TOLERANCE_SECONDS: f64 = 6e-4;

/// When the frames of a video are shown, in display order.
#[derive(Debug, Clone, PartialEq)]
pub struct Timeline {
    /// Seconds from the file's start, as players count; non-decreasing. The first one is greater
    /// than 0 if the audio starts before the video.
    pub times: Vec<f64>,
    /// Seconds from the file's start to the end of the last frame.
    pub duration: f64,
}

impl Timeline {
    /// Returns the presentation time of the first frame.
    fn first(&self) -> f64 {
        self.times.first().copied().unwrap_or(0.0)
    }
}

/// A checked [`FrameSampling`]: what will be done, with the server's own settings filled in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    pub count: FrameCount,
    /// Seconds from the file's start.
    pub start: Option<f64>,
    pub end: Option<f64>,
}

/// How many frames.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FrameCount {
    /// Exactly this many, repeating frames of a short video: the model's own number.
    Trained(usize),
    /// This many per second of video, spread by index and repeated as above: the model's own rate.
    TrainedRate { fps: f64, max_frames: usize },
    /// This many, or all frames if there are fewer.
    AtMost(usize),
    /// The frames on screen every `1 / fps` seconds, each at most once.
    PerSecond { fps: f64, max_frames: usize },
}

/// The knobs that took effect, for the reply.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Applied {
    pub fps: Option<f64>,
    pub max_frames: Option<usize>,
    pub start: Option<f64>,
    pub end: Option<f64>,
}

impl Sampling {
    /// The knobs that take effect.
    pub fn applied(&self) -> Applied {
        let (fps, max_frames) = match self.count {
            FrameCount::PerSecond { fps, max_frames } | FrameCount::TrainedRate { fps, max_frames } => {
                (Some(fps), Some(max_frames))
            }
            FrameCount::Trained(_) | FrameCount::AtMost(_) => (None, None),
        };
        Applied { fps, max_frames, start: self.start, end: self.end }
    }

    /// Checks a request's wishes. Conflicts and values out of range name the field.
    pub fn resolve(request: FrameSampling, config: &MediaConfig) -> Result<Self, MediaError> {
        let count = match (request.num_frames, request.fps) {
            (Some(_), Some(_)) => {
                return Err(refused("fps", "give either `num_frames` or `fps`, not both".into()));
            }
            (_, None) if request.max_frames.is_some() => {
                return Err(refused(
                    "max_frames",
                    "`max_frames` bounds `fps`; give `fps` with it, or `num_frames` instead".into(),
                ));
            }
            (None, None) => match config.default_fps {
                None => FrameCount::Trained(config.num_frames),
                Some(fps) => FrameCount::TrainedRate { fps, max_frames: config.max_frames },
            },
            (Some(n), None) => {
                check_count("num_frames", n, config.max_frames)?;
                // The model's own number means the same whether it is written out or not.
                if n == config.num_frames { FrameCount::Trained(n) } else { FrameCount::AtMost(n) }
            }
            (None, Some(fps)) => {
                if !(fps.is_finite() && fps > 0.0) {
                    return Err(refused("fps", "`fps` must be a number greater than 0".into()));
                }
                let max_frames = request.max_frames.unwrap_or(config.max_frames);
                check_count("max_frames", max_frames, config.max_frames)?;
                FrameCount::PerSecond { fps, max_frames }
            }
        };
        for (param, seconds) in [("start", request.start), ("end", request.end)] {
            if seconds.is_some_and(|s| !s.is_finite() || s < 0.0) {
                return Err(refused(param, format!("`{param}` must be a number of seconds, 0 or more")));
            }
        }
        if let Some(end) = request.end
            && end <= request.start.unwrap_or(0.0)
        {
            return Err(refused("end", "`end` must lie after `start`".into()));
        }
        Ok(Sampling { count, start: request.start, end: request.end })
    }

    /// Returns the same sampling with at most `max_frames` frames.
    pub fn bounded(self, max_frames: usize) -> Self {
        let count = match self.count {
            FrameCount::Trained(n) if n <= max_frames => FrameCount::Trained(n),
            FrameCount::Trained(n) | FrameCount::AtMost(n) => FrameCount::AtMost(n.min(max_frames)),
            FrameCount::TrainedRate { fps, max_frames: own } => {
                FrameCount::TrainedRate { fps, max_frames: own.min(max_frames) }
            }
            FrameCount::PerSecond { fps, max_frames: own } => {
                FrameCount::PerSecond { fps, max_frames: own.min(max_frames) }
            }
        };
        Sampling { count, ..self }
    }

    /// Returns the display indices of the sampled frames, ascending. Fails if no frame is shown
    /// between
    /// `start` and `end`.
    pub fn indices(&self, timeline: &Timeline) -> Result<Vec<usize>, MediaError> {
        let (first, total) = self.window(timeline)?;
        let n = match self.count {
            FrameCount::Trained(n) => n,
            FrameCount::AtMost(n) => n.min(total),
            FrameCount::TrainedRate { fps, max_frames } => {
                let start = self.start.unwrap_or(0.0).max(timeline.first());
                let seconds = self.end.unwrap_or(f64::INFINITY).min(timeline.duration) - start;
                let wanted = ((seconds + DURATION_TOLERANCE_SECONDS) * fps) as usize;
                wanted.max(1).min(max_frames)
            }
            FrameCount::PerSecond { fps, max_frames } => return Ok(self.by_time(timeline, fps, max_frames)),
        };
        Ok(spread(total, n).into_iter().map(|index| first + index).collect())
    }

    /// Returns the frames on screen at `start + k / fps` for `k` = 0, 1, …; `start` defaults to the
    /// first frame's time. More than `max_frames` of them are reduced to those at `max_frames`
    /// evenly spread ticks. Costs `O(max_frames log n)` for `n` frames.
    fn by_time(&self, timeline: &Timeline, fps: f64, max_frames: usize) -> Vec<usize> {
        let times = &timeline.times;
        let start = self.start.unwrap_or_else(|| timeline.first());
        let end = self.end.unwrap_or(f64::INFINITY).min(timeline.duration);
        let on_screen = |tick: f64| {
            let time = start + tick / fps + TIME_TOLERANCE_SECONDS;
            times.partition_point(|&shown| shown <= time).saturating_sub(1)
        };
        // Returns the first tick at or after `time`.
        let tick_at = |time: f64| ((time - TIME_TOLERANCE_SECONDS - start) * fps).ceil().max(0.0);
        let num_ticks = tick_at(end).max(1.0);
        let (mut indices, mut tick) = (Vec::new(), 0.0);
        while tick < num_ticks && indices.len() <= max_frames {
            let index = on_screen(tick);
            if indices.last() != Some(&index) {
                indices.push(index);
            }
            // Skips the ticks at which this frame is still on screen.
            let Some(&next_shown) = times.get(index + 1) else { break };
            tick = tick_at(next_shown).max(tick + 1.0);
        }
        if indices.len() > max_frames {
            let ticks = spread(num_ticks as usize, max_frames);
            indices = ticks.into_iter().map(|tick| on_screen(tick as f64)).collect();
            indices.dedup();
        }
        indices
    }

    /// First frame of the window `[start, end)`, and how many it has (at least 1).
    fn window(&self, timeline: &Timeline) -> Result<(usize, usize), MediaError> {
        let times = &timeline.times;
        let start = self.start.unwrap_or(0.0);
        if start >= timeline.duration && start > 0.0 {
            return Err(refused(
                "start",
                format!("`start` is {start} s, but the video lasts {:.3} s", timeline.duration),
            ));
        }
        let first_shown = timeline.first();
        if let Some(end) = self.end.filter(|&end| end <= first_shown) {
            return Err(refused(
                "end",
                format!(
                    "`end` is {end} s, but the first frame is shown at {first_shown:.3} s; ask for a later part"
                ),
            ));
        }
        let first = times.partition_point(|&t| t < start);
        let end = self.end.map_or(times.len(), |end| times.partition_point(|&t| t < end));
        if first < end {
            return Ok((first, end - first));
        }
        // No frame begins inside: the one on screen at `start` is what a viewer would see.
        Ok((first.saturating_sub(1), 1))
    }

    /// Every effective parameter, for the digest. Equal bytes mean equal sampling of equal videos.
    pub fn digest_bytes(&self) -> Vec<u8> {
        let (kind, a, b) = match self.count {
            FrameCount::Trained(n) => (0u8, n as u64, 0),
            FrameCount::AtMost(n) => (1, n as u64, 0),
            FrameCount::PerSecond { fps, max_frames } => (2, fps.to_bits(), max_frames as u64),
            FrameCount::TrainedRate { fps, max_frames } => (3, fps.to_bits(), max_frames as u64),
        };
        let mut bytes = vec![kind];
        for number in [a, b] {
            bytes.extend(number.to_le_bytes());
        }
        for seconds in [self.start, self.end] {
            // -1 is not a time, so it can stand for none.
            bytes.extend(seconds.unwrap_or(-1.0).to_bits().to_le_bytes());
        }
        bytes
    }
}

/// `n` indices spread over `total` frames: `floor(i * (total - 1) / (n - 1))`, the last forced to `total - 1`.
/// With `n` greater than `total` indices repeat.
pub fn spread(total: usize, n: usize) -> Vec<usize> {
    assert!(total > 0 && n > 0, "nothing to sample: this is a bug");
    if n == 1 {
        return vec![0];
    }
    // The step is rounded to f64 before the product, as in the original: it decides some floors.
    let step = (total - 1) as f64 / (n - 1) as f64;
    let mut indices: Vec<usize> = (0..n).map(|i| (i as f64 * step) as usize).collect();
    indices[n - 1] = total - 1;
    indices
}

fn check_count(param: &'static str, n: usize, max_frames: usize) -> Result<(), MediaError> {
    if n == 0 || n > max_frames {
        return Err(refused(param, format!("`{param}` must be between 1 and {max_frames}")));
    }
    Ok(())
}

fn refused(param: &'static str, message: String) -> MediaError {
    MediaError::Refused { param, message }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn constant_rate(total: usize, fps: f64) -> Timeline {
        Timeline { times: (0..total).map(|i| i as f64 / fps).collect(), duration: total as f64 / fps }
    }

    fn resolve(request: FrameSampling) -> Result<Sampling, &'static str> {
        Sampling::resolve(request, &MediaConfig::default()).map_err(|error| match error {
            MediaError::Refused { param, .. } => param,
            other => panic!("{other}"),
        })
    }

    #[test]
    fn indices_equal_the_original_implementation() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/sampling_cases.json");
        let cases: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let cases: Vec<(usize, usize, Vec<usize>)> =
            serde_json::from_value(cases["linspace"].clone()).unwrap();
        assert!(cases.len() > 20);
        for (total, n, expected) in cases {
            assert_eq!(spread(total, n), expected, "{n} of {total}");
        }
    }

    #[test]
    fn short_videos_repeat_frames_for_the_models_number_only() {
        let short = constant_rate(5, 25.0);
        let default = resolve(FrameSampling::default()).unwrap();
        assert_eq!(default.indices(&short).unwrap(), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4]);
        let written_out = resolve(FrameSampling { num_frames: Some(16), ..Default::default() }).unwrap();
        assert_eq!(written_out, default);
        let asked = resolve(FrameSampling { num_frames: Some(20), ..Default::default() }).unwrap();
        assert_eq!(asked.indices(&short).unwrap(), [0, 1, 2, 3, 4]);
    }

    fn at_rate(fps: f64, max_frames: Option<usize>) -> Sampling {
        resolve(FrameSampling { fps: Some(fps), max_frames, ..Default::default() }).unwrap()
    }

    /// The sampling of a model that was trained at one frame per second.
    fn trained_at_one_fps() -> Sampling {
        let config = MediaConfig { default_fps: Some(1.0), ..MediaConfig::default() };
        Sampling::resolve(FrameSampling::default(), &config).unwrap()
    }

    #[test]
    fn the_models_own_rate_counts_whole_seconds_and_spreads_by_index() {
        let sampling = trained_at_one_fps();
        for (total, n) in [(250, 10), (249, 9), (3, 1), (25 * 64, 64), (25 * 600, 64)] {
            assert_eq!(sampling.indices(&constant_rate(total, 25.0)).unwrap(), spread(total, n), "{total}");
        }
        // The original repeats frames that are 4 s apart.
        assert_eq!(sampling.indices(&constant_rate(2, 0.25)).unwrap(), [0, 0, 0, 0, 0, 0, 0, 1]);
        // Audio before the first frame does not count.
        let mut late = constant_rate(100, 25.0);
        late.times.iter_mut().for_each(|time| *time += 3.0);
        late.duration += 3.0;
        assert_eq!(sampling.indices(&late).unwrap(), spread(100, 4));
    }

    #[test]
    fn an_asked_rate_takes_the_frames_on_screen_at_each_tick() {
        let sampling = at_rate(1.0, None);
        let every_second: Vec<usize> = (0..10).map(|second| second * 25).collect();
        assert_eq!(sampling.indices(&constant_rate(250, 25.0)).unwrap(), every_second);
        assert_eq!(sampling.indices(&constant_rate(249, 25.0)).unwrap(), every_second);
        assert_eq!(sampling.indices(&constant_rate(3, 25.0)).unwrap(), [0]);
        // At 29.97 frames a second, frame 30 comes 1 ms after the first second.
        let ntsc = sampling.indices(&constant_rate(300, 30000.0 / 1001.0)).unwrap();
        assert_eq!(ntsc, [0, 29, 59, 89, 119, 149, 179, 209, 239, 269, 299]);
        // A rate above that of the video gives each frame once.
        assert_eq!(at_rate(50.0, None).indices(&constant_rate(5, 25.0)).unwrap(), [0, 1, 2, 3, 4]);
        let bounded = at_rate(2.0, Some(8)).indices(&constant_rate(2500, 25.0)).unwrap();
        let ticks = spread(200, 8);
        assert_eq!(bounded, ticks.into_iter().map(|tick| tick * 25 / 2).collect::<Vec<_>>());
        assert_eq!(at_rate(1000.0, Some(1)).indices(&constant_rate(2500, 25.0)).unwrap(), [0]);
    }

    #[test]
    fn an_asked_rate_is_one_of_time_where_frames_come_in_bursts() {
        // 200 frames in 2 s, then one every 2 s until 40 s.
        let mut times: Vec<f64> = (0..200).map(|i| f64::from(i) / 100.0).collect();
        times.extend((1..=19).map(|i| 2.0 * f64::from(i)));
        let burst = Timeline { times, duration: 40.0 };
        let expected: Vec<usize> = [0, 100].into_iter().chain(200..219).collect();
        assert_eq!(at_rate(1.0, None).indices(&burst).unwrap(), expected);
        // A bound spreads the frames over time, not over the burst.
        let few = at_rate(100.0, Some(8)).indices(&burst).unwrap();
        assert_eq!(few[0], 0);
        assert!(few.len() == 8 && few[1] > 200 && few[7] == 218, "{few:?}");
    }

    #[test]
    fn times_count_from_the_files_start() {
        let mut late = constant_rate(100, 25.0);
        late.times.iter_mut().for_each(|time| *time += 3.0);
        late.duration += 3.0;
        let window = |start, end| FrameSampling { start, end, num_frames: Some(4), ..Default::default() };
        let indices = |request| resolve(request).unwrap().indices(&late);
        assert_eq!(indices(window(Some(6.5), None)).unwrap(), [88, 91, 95, 99]);
        assert_eq!(indices(window(None, Some(4.0))).unwrap(), spread(25, 4));
        let before = indices(window(Some(1.0), Some(2.0))).unwrap_err();
        assert!(matches!(before, MediaError::Refused { param: "end", .. }), "{before}");
        assert_eq!(at_rate(1.0, None).indices(&late).unwrap(), [0, 25, 50, 75]);
        let from = FrameSampling { fps: Some(2.0), start: Some(6.25), ..Default::default() };
        assert_eq!(indices(from).unwrap(), [81, 93]);
    }

    #[test]
    fn a_window_holds_the_frames_that_begin_in_it() {
        let video = constant_rate(100, 10.0);
        let window = |start, end| FrameSampling { num_frames: Some(4), start, end, ..Default::default() };
        let indices = |start, end| resolve(window(start, end)).unwrap().indices(&video);
        assert_eq!(indices(Some(2.0), Some(3.0)).unwrap(), [20, 23, 26, 29]);
        assert_eq!(indices(None, Some(0.4)).unwrap(), [0, 1, 2, 3]);
        assert_eq!(indices(Some(9.85), None).unwrap(), [99]);
        assert_eq!(indices(Some(2.01), Some(2.05)).unwrap(), [20]);
        let behind = indices(Some(10.0), None).unwrap_err();
        assert!(matches!(behind, MediaError::Refused { param: "start", .. }));
    }

    #[test]
    fn conflicts_name_the_field() {
        let none = FrameSampling::default();
        let cases = [
            (FrameSampling { num_frames: Some(4), fps: Some(1.0), ..none }, "fps"),
            (FrameSampling { max_frames: Some(4), ..none }, "max_frames"),
            (FrameSampling { num_frames: Some(4), max_frames: Some(4), ..none }, "max_frames"),
            (FrameSampling { num_frames: Some(0), ..none }, "num_frames"),
            (FrameSampling { num_frames: Some(65), ..none }, "num_frames"),
            (FrameSampling { fps: Some(0.0), ..none }, "fps"),
            (FrameSampling { fps: Some(f64::NAN), ..none }, "fps"),
            (FrameSampling { fps: Some(1.0), max_frames: Some(1000), ..none }, "max_frames"),
            (FrameSampling { start: Some(-1.0), ..none }, "start"),
            (FrameSampling { end: Some(f64::INFINITY), ..none }, "end"),
            (FrameSampling { end: Some(0.0), ..none }, "end"),
            (FrameSampling { start: Some(2.0), end: Some(2.0), ..none }, "end"),
        ];
        for (request, param) in cases {
            assert_eq!(resolve(request).unwrap_err(), param, "{request:?}");
        }
    }

    proptest! {
        #[test]
        fn indices_ascend_and_span_the_video(total in 1usize..100_000, n in 2usize..65) {
            let indices = spread(total, n);
            prop_assert_eq!(indices.len(), n);
            prop_assert!(indices.is_sorted());
            prop_assert_eq!((indices[0], indices[n - 1]), (0, total - 1));
        }

        #[test]
        fn sampled_frames_stay_inside_the_window(
            total in 1usize..3000, fps in 1.0f64..60.0, start in 0.0f64..20.0, length in 0.01f64..20.0,
            rate in proptest::option::of(0.1f64..90.0), n in 1usize..65,
        ) {
            let video = constant_rate(total, fps);
            let request = FrameSampling {
                num_frames: rate.is_none().then_some(n), fps: rate, max_frames: None,
                start: Some(start), end: Some(start + length),
            };
            match resolve(request).unwrap().indices(&video) {
                Ok(indices) => {
                    prop_assert!(!indices.is_empty() && indices.len() <= 64);
                    prop_assert!(indices.is_sorted());
                    for &index in &indices {
                        let shown_until = video.times.get(index + 1).copied().unwrap_or(video.duration);
                        prop_assert!(video.times[index] < start + length && shown_until >= start - 1e-9);
                    }
                }
                Err(_) => prop_assert!(start >= video.duration),
            }
        }
    }
}
