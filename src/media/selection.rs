//! Which pictures of a still, an animation or a list the model sees.
//!
//! Called by `mod.rs`. Pure: no files, no clock. All of them are sampled by the rules of `frame_sampling.rs`: a list has
//! been sampled by its sender already, but of another number of frames than the model was trained with.

use super::{
    FrameSampling, MediaError,
    frame_sampling::{Applied, Sampling, Timeline},
};
use crate::config::MediaConfig;

/// A checked wish for frames out of pictures.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    /// How many pictures there are.
    pub source_frames: usize,
    /// Of the pictures, ascending.
    pub indices: Vec<usize>,
    pub applied: Applied,
    /// Seconds; `None`: a list whose times nobody said.
    pub duration: Option<f64>,
    /// When each of `indices` is shown, seconds; empty as `duration` is unknown.
    pub times: Vec<f64>,
    /// Every effective parameter, for the digest.
    pub digest_bytes: Vec<u8>,
}

/// Pictures that the client sampled itself.
#[derive(Debug, Clone, Copy)]
pub struct PictureList<'a> {
    pub num_pictures: usize,
    /// Seconds, one for each picture, ascending; `None`: as `fps` of the request says, if it does.
    pub timestamps: Option<&'a [f64]>,
}

impl Selection {
    /// A still is sampled as a video of one frame: the model's own number repeats it, as the original repeats the frames
    /// of a short video.
    pub fn of_still(sampling: &Sampling) -> Result<Self, MediaError> {
        let timeline = Timeline { times: vec![0.0], duration: 0.0 };
        Selection::of_timeline(b"still", sampling, &timeline)
    }

    /// An animation is sampled as a video.
    pub fn of_animation(sampling: &Sampling, timeline: &Timeline) -> Result<Self, MediaError> {
        Selection::of_timeline(b"animation", sampling, timeline)
    }

    /// A list is spread to the model's number, or to what the request asks for. `fps` is the rate that the list itself was
    /// sampled at; with it, or with timestamps, `start` and `end` have a meaning.
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
        let mut sampling = Sampling::resolve(FrameSampling { fps: None, max_frames: None, ..request }, config)?;
        if let Some(max_frames) = max_frames {
            sampling = sampling.bounded(max_frames);
        }
        // Frames without times count as sampled at the model's own rate.
        let rate = config.default_fps.unwrap_or(1.0);
        let timeline = known.clone().unwrap_or_else(|| constant_rate(list.num_pictures, rate));
        let mut selection = Selection::of_timeline(b"list", &sampling, &timeline)?;
        selection.applied = Applied { fps, max_frames, start, end };
        if known.is_none() {
            (selection.duration, selection.times) = (None, Vec::new());
        }
        // The times that are told are part of the reply.
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
    /// `None`: nobody said when the pictures are shown.
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
        // The last one is shown as long as the others are on average.
        let each = (last - first) / self.num_pictures.saturating_sub(1).max(1) as f64;
        Ok(Some(Timeline { times: timestamps.to_vec(), duration: last + each }))
    }
}

fn constant_rate(num_pictures: usize, fps: f64) -> Timeline {
    let times = (0..num_pictures).map(|i| i as f64 / fps).collect();
    Timeline { times, duration: num_pictures as f64 / fps }
}
