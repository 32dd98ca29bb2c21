//! Fills the reply's `video` object.
//!
//! Called by `mod.rs` and `tools.rs` after sampling. Pure. Must never state more than was checked.

use super::{
    VideoInfo,
    decode::Decoded,
    frame_sampling::{Applied, Sampling},
    probe::Probe,
};

/// Describes a sampled video.
pub fn video_info(probe: &Probe, decoded: &Decoded, sampling: &Sampling) -> VideoInfo {
    let timeline = &decoded.timeline;
    VideoInfo {
        source_frames: timeline.times.len(),
        promised_frames: decoded.completeness.promised,
        decoded_frames: decoded.completeness.decoded,
        decoded_share: decoded.completeness.share(),
        duration: Some(timeline.duration),
        width: probe.width,
        height: probe.height,
        container: probe.container.name().to_owned(),
        codec: probe.codec.clone(),
        ignored_streams: probe.ignored_streams.clone(),
        sampled_timestamps: decoded.indices.iter().map(|&index| timeline.times[index]).collect(),
        ..applied(sampling.applied(), decoded.indices.clone())
    }
}

/// Describes the sampling alone.
pub fn applied(applied: Applied, sampled_indices: Vec<usize>) -> VideoInfo {
    let Applied { fps, max_frames, start, end } = applied;
    let num_frames = sampled_indices.len();
    VideoInfo { num_frames, fps, max_frames, start, end, sampled_indices, ..VideoInfo::default() }
}
