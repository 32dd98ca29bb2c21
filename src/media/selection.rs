//! Selects the frames of a still image, an animation or a list of pictures.
//!
//! Called by `mod.rs` and `picture_loader.rs`. Must stay pure: no files, no clock. All follow the
//! rules of
//! `frame_sampling.rs`. Lists do too: the client sampled them, but rarely to the number of frames
//! that the model was trained on.

use super::{
    FrameSampling, MediaError,
    frame_sampling::{Applied, Sampling, Timeline},
};
use crate::config::MediaConfig;

/// The selected pictures, and the description of the selection for the reply.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    /// Number of pictures to select from.
    pub source_frames: usize,
    /// Selected pictures, ascending.
    pub indices: Vec<usize>,
    pub applied: Applied,
    /// Seconds; `None` for a list without times.
    pub duration: Option<f64>,
    /// Presentation time of each of `indices`, seconds; empty if `duration` is `None`.
    pub times: Vec<f64>,
    /// Every effective parameter, for the digest.
    pub digest_bytes: Vec<u8>,
}

/// Pictures that the client sampled itself.
#[derive(Debug, Clone, Copy)]
pub struct PictureList<'a> {
    pub num_pictures: usize,
    /// Presentation times, seconds, ascending; `None`: derived from `fps` of the request, if any.
    pub timestamps: Option<&'a [f64]>,
}

impl Selection {
    /// Samples a still image as a video of one frame, which the model's own number repeats, as the
    /// original repeats the frames of a short video.
    pub fn of_still(sampling: &Sampling) -> Result<Self, MediaError> {
        let timeline = Timeline { times: vec![0.0], duration: 0.0 };
        Selection::of_timeline(b"still", sampling, &timeline)
    }

    /// Samples an animation as a video.
    pub fn of_animation(sampling: &Sampling, timeline: &Timeline) -> Result<Self, MediaError> {
        Selection::of_timeline(b"animation", sampling, timeline)
    }

    /// Spreads a list to the model's number of frames, or to the number that the request asks for.
    /// `fps` is the rate at which the client sampled the list. `start` and `end` need it, or
    /// timestamps.
    pub fn of_list(
        request: FrameSampling,
        list: PictureList<'_>,
        config: &MediaConfig,
    ) -> Result<Self, MediaError> {
        let FrameSampling { fps, max_frames, start, end, .. } = request;
        let known = list.timeline(fps)?;
        for (param, time) in [("start", start), ("end", end)] {
            if time.is_some() && known.is_none() {
                let message = format!(
                    "`{param}` needs the times of the list's frames; send `fps`, the rate they were sampled at, or \
                     `timestamps`"
                );
                return Err(MediaError::Refused { param, message });
            }
        }
        let mut sampling =
            Sampling::resolve(FrameSampling { fps: None, max_frames: None, ..request }, config)?;
        if let Some(max_frames) = max_frames {
            sampling = sampling.bounded(max_frames);
        }
        // Frames without times are taken as sampled at the model's own rate.
        let rate = config.default_fps.unwrap_or(1.0);
        let timeline = known.clone().unwrap_or_else(|| constant_rate(list.num_pictures, rate));
        let mut selection = Selection::of_timeline(b"list", &sampling, &timeline)?;
        selection.applied = Applied { fps, max_frames, start, end };
        if known.is_none() {
            (selection.duration, selection.times) = (None, Vec::new());
        }
        // The reply depends on the times.
        selection.digest_bytes.extend(selection.times.iter().flat_map(|time| time.to_bits().to_le_bytes()));
        Ok(selection)
    }

    fn of_timeline(kind: &[u8], sampling: &Sampling, timeline: &Timeline) -> Result<Self, MediaError> {
        let indices = sampling.indices(timeline)?;
        Ok(Selection {
            source_frames: timeline.times.len(),
            applied: sampling.applied(),
            duration: Some(timeline.duration),
            times: indices.iter().map(|&index| timeline.times[index]).collect(),
            digest_bytes: [kind, &sampling.digest_bytes()].concat(),
            indices,
        })
    }
}

impl PictureList<'_> {
    /// Returns `None` if the times of the pictures are unknown.
    fn timeline(&self, fps: Option<f64>) -> Result<Option<Timeline>, MediaError> {
        let Some(timestamps) = self.timestamps else {
            return Ok(fps.map(|fps| constant_rate(self.num_pictures, fps)));
        };
        if timestamps.len() != self.num_pictures {
            return Err(MediaError::Refused {
                param: "timestamps",
                message: format!(
                    "there are {} timestamps for {} pictures; send one for each",
                    timestamps.len(),
                    self.num_pictures
                ),
            });
        }
        let (first, last) = (timestamps.first().copied(), timestamps.last().copied());
        let (first, last) = (first.unwrap_or_default(), last.unwrap_or_default());
        // The last picture lasts as long as the others on average.
        let each = (last - first) / self.num_pictures.saturating_sub(1).max(1) as f64;
        Ok(Some(Timeline { times: timestamps.to_vec(), duration: last + each }))
    }
}

fn constant_rate(num_pictures: usize, fps: f64) -> Timeline {
    let times = (0..num_pictures).map(|i| i as f64 / fps).collect();
    Timeline { times, duration: num_pictures as f64 / fps }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none() -> FrameSampling {
        FrameSampling::default()
    }

    fn trained_at_one_fps() -> MediaConfig {
        MediaConfig { default_fps: Some(1.0), ..MediaConfig::default() }
    }

    #[test]
    fn a_still_is_repeated_to_the_models_number_unless_told_otherwise() {
        let config = MediaConfig::default();
        let still = |request| Selection::of_still(&Sampling::resolve(request, &config).unwrap());
        let indices = |request| still(request).unwrap().indices;
        assert_eq!(indices(none()), [0; 16]);
        assert_eq!(indices(FrameSampling { num_frames: Some(5), ..none() }), [0]);
        assert_eq!(indices(FrameSampling { fps: Some(2.0), ..none() }), [0]);
        let late = still(FrameSampling { start: Some(1.0), ..none() });
        assert!(matches!(late, Err(MediaError::Refused { param: "start", .. })));
    }

    fn list(request: FrameSampling, num_pictures: usize) -> Result<Selection, MediaError> {
        let list = PictureList { num_pictures, timestamps: None };
        Selection::of_list(request, list, &MediaConfig::default())
    }

    #[test]
    fn a_list_is_spread_to_the_models_number_unless_told_otherwise() {
        use crate::media::frame_sampling::spread;
        for num_pictures in [1, 8, 16, 17, 32, 64] {
            let plain = list(none(), num_pictures).unwrap();
            assert_eq!(plain.indices, spread(num_pictures, 16), "{num_pictures}");
            assert_eq!((plain.source_frames, plain.duration, plain.times), (num_pictures, None, vec![]));
        }
        let ask = |request, num_pictures| list(request, num_pictures).unwrap().indices;
        let number = |n| FrameSampling { num_frames: Some(n), ..none() };
        assert_eq!(ask(number(4), 32), spread(32, 4));
        assert_eq!(ask(number(32), 32), spread(32, 32));
        assert_eq!(ask(number(64), 5), [0, 1, 2, 3, 4], "each once");
        assert_eq!(ask(number(16), 5), spread(5, 16), "the model's own number");
        let bound = |n| FrameSampling { max_frames: Some(n), ..none() };
        assert_eq!(ask(bound(3), 32), spread(32, 3));
        assert_eq!(ask(bound(20), 32), spread(32, 16));
        assert_eq!(ask(FrameSampling { num_frames: Some(8), ..bound(3) }, 32), spread(32, 3));
    }

    #[test]
    fn a_list_of_known_times_is_cut_by_time() {
        let timed = FrameSampling { fps: Some(2.0), num_frames: Some(4), ..none() };
        let selection = list(timed, 4).unwrap();
        assert_eq!((selection.duration, selection.times), (Some(2.0), vec![0.0, 0.5, 1.0, 1.5]));
        let window = FrameSampling { start: Some(1.0), end: Some(2.0), ..timed };
        assert_eq!(list(window, 8).unwrap().indices, [2, 3]);
        let timestamps = [1.0, 1.5, 4.0, 7.0];
        let listed = PictureList { num_pictures: 4, timestamps: Some(&timestamps) };
        let window = FrameSampling { start: Some(1.2), num_frames: Some(9), ..none() };
        let selection = Selection::of_list(window, listed, &MediaConfig::default()).unwrap();
        assert_eq!((selection.indices, selection.times), (vec![1, 2, 3], vec![1.5, 4.0, 7.0]));
        assert_eq!(selection.duration, Some(9.0));
        for (request, fault) in [
            (FrameSampling { start: Some(0.0), ..none() }, "start"),
            (FrameSampling { end: Some(1.0), ..none() }, "end"),
            (FrameSampling { start: Some(2.0), fps: Some(2.0), ..none() }, "start"),
            (FrameSampling { num_frames: Some(65), ..none() }, "num_frames"),
        ] {
            let error = list(request, 4).unwrap_err();
            assert!(matches!(error, MediaError::Refused { param, .. } if param == fault), "{error:?}");
        }
        let short = PictureList { num_pictures: 3, timestamps: Some(&timestamps) };
        let error = Selection::of_list(none(), short, &MediaConfig::default()).unwrap_err();
        assert!(matches!(error, MediaError::Refused { param: "timestamps", .. }), "{error:?}");
    }

    #[test]
    fn a_model_of_one_frame_a_second_gets_a_list_at_its_rate() {
        let config = trained_at_one_fps();
        let ask = |fps, num_pictures| {
            let list = PictureList { num_pictures, timestamps: None };
            Selection::of_list(FrameSampling { fps, ..none() }, list, &config).unwrap().indices
        };
        assert_eq!(ask(None, 20), (0..20).collect::<Vec<_>>(), "as sampled at the model's rate");
        assert_eq!(ask(Some(4.0), 20), [0, 4, 9, 14, 19], "5 s");
        assert_eq!(ask(Some(0.5), 3), [0, 0, 0, 1, 1, 2], "6 s");
    }

    #[test]
    fn lists_of_other_times_have_other_digests() {
        let digest = |fps| list(FrameSampling { fps, ..none() }, 4).unwrap().digest_bytes;
        assert_ne!(digest(None), digest(Some(1.0)));
        assert_ne!(digest(Some(2.0)), digest(Some(1.0)));
    }
}
