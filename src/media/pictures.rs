//! Stills, and frames that the client sampled itself: pictures in place of a video.
//!
//! Called by `mod.rs`, on the blocking pool. The `image` crate decodes them in-process: safe code, three formats, chosen
//! by the first bytes alone, and sizes are checked before anything of that size is allocated.
//!
//! A list was sampled by its sender: it is used as it is, never sampled again. A still is a video of one frame, so by
//! default it is repeated to the model's own number of frames, as the original repeats those of a short video.

use std::{
    fs,
    io::Cursor,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, RgbImage, metadata::Orientation};

use super::{
    FrameSampling, MediaError,
    frame_sampling::{Applied, Sampling, Timeline},
    pixels::Resizer,
    source::LocalFile,
    truncated_pictures::{Truncated, rows_share},
};
use crate::{config::MediaConfig, telemetry::PieceTimer};

/// Most bytes of a pixel in a decoder (16 bits in four channels).
const MAX_PIXEL_BYTES: usize = 8;

/// A checked wish for frames out of pictures.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    /// Of the pictures, ascending.
    pub indices: Vec<usize>,
    pub applied: Applied,
    /// Seconds; `None`: a list whose rate nobody said.
    pub duration: Option<f64>,
    /// When each of `indices` is shown, seconds; empty as `duration` is unknown.
    pub times: Vec<f64>,
    /// Every effective parameter, for the digest.
    pub digest_bytes: Vec<u8>,
}

impl Selection {
    /// A still is sampled as a video of one frame.
    pub fn of_still(request: FrameSampling, config: &MediaConfig) -> Result<Self, MediaError> {
        let sampling = Sampling::resolve(request, config)?;
        let indices = sampling.indices(&Timeline { times: vec![0.0], duration: 0.0 })?;
        let times = vec![0.0; indices.len()];
        let digest_bytes = [&b"still"[..], &sampling.digest_bytes()].concat();
        Ok(Selection { indices, applied: sampling.applied(), duration: Some(0.0), times, digest_bytes })
    }

    /// A list is taken whole. `fps` is the rate it was sampled at; bounds that the list keeps anyway are fine.
    pub fn of_list(request: FrameSampling, num_pictures: usize) -> Result<Self, MediaError> {
        let refused = |param, message| Err(MediaError::Refused { param, message });
        let FrameSampling { num_frames, fps, max_frames, start, end } = request;
        for (param, bound) in [("num_frames", num_frames), ("max_frames", max_frames)] {
            if bound.is_some_and(|bound| bound < num_pictures) {
                return refused(
                    param,
                    format!(
                        "`{param}` is less than the {num_pictures} frames of the list, which is not sampled again; \
                         send fewer frames or leave it out"
                    ),
                );
            }
        }
        for (param, time) in [("start", start), ("end", end)] {
            if time.is_some() {
                return refused(
                    param,
                    format!(
                        "a list of frames is not cut; leave `{param}` out and send the frames that count"
                    ),
                );
            }
        }
        // What is not known is no rate.
        let rate = fps.unwrap_or(-1.0).to_bits().to_le_bytes();
        Ok(Selection {
            digest_bytes: [&b"list"[..], &rate].concat(),
            indices: (0..num_pictures).collect(),
            applied: Applied { fps, ..Applied::default() },
            duration: fps.map(|fps| num_pictures as f64 / fps),
            times: fps.map_or(Vec::new(), |fps| (0..num_pictures).map(|i| i as f64 / fps).collect()),
        })
    }
}

/// Pictures at the model's input size.
#[derive(Debug)]
pub struct Pictures {
    /// `[size, size, 3]` each, RGB.
    pub frames: Vec<Vec<u8>>,
    /// Of the first one, as displayed, pixels.
    pub width: usize,
    pub height: usize,
    /// The first one's format.
    pub codec: &'static str,
    /// Share of the rows of all pictures that arrived, 0 to 1.
    pub decoded_share: f64,
    pub resizing: PieceTimer,
}

/// Tells work on the blocking pool that nobody waits for it.
#[derive(Debug, Default)]
pub struct CancelOnDrop(pub Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Decodes and resizes one after the other, until `cancelled`.
pub fn decode(
    files: &[LocalFile],
    image_size: usize,
    config: &MediaConfig,
    cancelled: &AtomicBool,
) -> Result<Pictures, MediaError> {
    let mut pictures = Pictures {
        frames: vec![],
        width: 0,
        height: 0,
        codec: "",
        decoded_share: 0.0,
        resizing: PieceTimer::default(),
    };
    let mut resizer: Option<(u32, u32, Resizer)> = None;
    for (number, file) in files.iter().enumerate() {
        if cancelled.load(Ordering::Relaxed) {
            // Nobody waits for it.
            return Err(MediaError::Internal("decoding pictures was cancelled".into()));
        }
        let (picture, codec, share) =
            read(file, config).map_err(|error| named(error, number, files.len()))?;
        pictures.decoded_share += share;
        let started = Instant::now();
        let (width, height) = picture.dimensions();
        if number == 0 {
            (pictures.width, pictures.height, pictures.codec) = (width as usize, height as usize, codec);
        }
        let resizer = match &resizer {
            Some((w, h, resizer)) if (*w, *h) == (width, height) => resizer,
            _ => {
                &resizer.insert((width, height, Resizer::new(width as usize, height as usize, image_size))).2
            }
        };
        pictures.frames.push(resizer.resize(picture.as_raw()));
        pictures.resizing.piece(started);
    }
    pictures.decoded_share /= files.len().max(1) as f64;
    Ok(pictures)
}

/// The format that the first bytes of a file tell, if it is one that is accepted, and its name.
pub fn format(bytes: &[u8]) -> Option<(ImageFormat, &'static str)> {
    match image::guess_format(bytes).ok()? {
        ImageFormat::Jpeg => Some((ImageFormat::Jpeg, "jpeg")),
        ImageFormat::Png => Some((ImageFormat::Png, "png")),
        ImageFormat::WebP => Some((ImageFormat::WebP, "webp")),
        _ => None,
    }
}

/// A picture as a viewer would see it, turned as its metadata says, without transparency; its
/// format; and the share of its rows that arrived.
fn read(file: &LocalFile, config: &MediaConfig) -> Result<(RgbImage, &'static str, f64), MediaError> {
    let bytes = fs::read(file.path()).map_err(|error| {
        tracing::error!(%error, "a picture's file vanished");
        MediaError::Internal("the picture could not be read; try again".into())
    })?;
    let Some((format, codec)) = format(&bytes) else {
        return Err(MediaError::Unsupported(
            "this is not a picture that is accepted; send jpeg, png or webp".into(),
        ));
    };
    let mut limits = Limits::no_limits();
    let max_side = u32::try_from(config.max_frame_side).unwrap_or(u32::MAX);
    (limits.max_image_width, limits.max_image_height) = (Some(max_side), Some(max_side));
    limits.max_alloc = Some((config.max_frame_pixels * MAX_PIXEL_BYTES) as u64);
    let truncated = Truncated::find(&bytes, format);
    let data = truncated.as_ref().map_or(&bytes[..], |truncated| truncated.arrived);
    let mut reader = ImageReader::with_format(Cursor::new(data), format);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(|error| damaged(&error, config))?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 || width as usize * height as usize > config.max_frame_pixels {
        return Err(too_large(config));
    }
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut picture = DynamicImage::from_decoder(decoder).map_err(|error| damaged(&error, config))?;
    let rows_share = truncated.map_or(1.0, |_| rows_share(&picture.to_rgb8()));
    if rows_share < config.min_decoded_share {
        return Err(MediaError::Undecodable(format!(
            "only {:.0} % of the picture arrived; send the whole picture",
            rows_share * 100.0
        )));
    }
    picture.apply_orientation(orientation);
    Ok((picture.into_rgb8(), codec, rows_share))
}

fn damaged(error: &image::ImageError, config: &MediaConfig) -> MediaError {
    if matches!(error, image::ImageError::Limits(_)) {
        return too_large(config);
    }
    tracing::debug!(%error, "a picture cannot be decoded");
    MediaError::Undecodable(
        "the picture is damaged or incomplete; check that it can be viewed and send it again".into(),
    )
}

fn too_large(config: &MediaConfig) -> MediaError {
    MediaError::Undecodable(format!(
        "the picture is too large; at most {} pixels a side and {} in all are accepted",
        config.max_frame_side, config.max_frame_pixels
    ))
}

/// Says which picture of a list is at fault.
fn named(error: MediaError, number: usize, num_pictures: usize) -> MediaError {
    let text = |message: String| format!("frame {number} of the list: {message}");
    match error {
        MediaError::Unsupported(message) if num_pictures > 1 => MediaError::Unsupported(text(message)),
        MediaError::Undecodable(message) if num_pictures > 1 => MediaError::Undecodable(text(message)),
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none() -> FrameSampling {
        FrameSampling::default()
    }

    #[test]
    fn a_still_is_repeated_to_the_models_number_unless_told_otherwise() {
        let config = MediaConfig::default();
        let still = |request| Selection::of_still(request, &config).unwrap().indices;
        assert_eq!(still(none()), [0; 16]);
        assert_eq!(still(FrameSampling { num_frames: Some(5), ..none() }), [0]);
        assert_eq!(still(FrameSampling { fps: Some(2.0), ..none() }), [0]);
        let late = Selection::of_still(FrameSampling { start: Some(1.0), ..none() }, &config);
        assert!(matches!(late, Err(MediaError::Refused { param: "start", .. })));
    }

    #[test]
    fn a_list_is_taken_whole_or_refused() {
        let list = |request| Selection::of_list(request, 4);
        let plain = list(none()).unwrap();
        assert_eq!((plain.indices, plain.duration, plain.times), (vec![0, 1, 2, 3], None, vec![]));
        let timed = list(FrameSampling { fps: Some(2.0), num_frames: Some(4), ..none() }).unwrap();
        assert_eq!((timed.duration, timed.times), (Some(2.0), vec![0.0, 0.5, 1.0, 1.5]));
        for (request, fault) in [
            (FrameSampling { num_frames: Some(3), ..none() }, "num_frames"),
            (FrameSampling { max_frames: Some(3), ..none() }, "max_frames"),
            (FrameSampling { start: Some(0.0), ..none() }, "start"),
            (FrameSampling { end: Some(1.0), ..none() }, "end"),
        ] {
            let error = list(request).unwrap_err();
            assert!(matches!(error, MediaError::Refused { param, .. } if param == fault), "{error:?}");
        }
    }
}
