//! Decodes still images, animated pictures, and frames that the client sampled itself.
//!
//! Called by `mod.rs`, on the blocking pool. The `image` crate decodes them in-process: safe code, three formats, chosen
//! by the first bytes alone, and sizes are checked before anything of that size is allocated. It
//! must never hold more than one frame of an animation at source size. Transparent pixels are
//! composited on white.
//!
//! `selection.rs` chooses the frames.

use std::{
    fs,
    io::Cursor,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use image::{
    AnimationDecoder, ColorType, DynamicImage, Frames, ImageDecoder, ImageFormat, ImageReader, Limits,
    RgbImage, Rgba,
    codecs::{png::PngDecoder, webp::WebPDecoder},
    metadata::Orientation,
};

use super::{
    MediaError,
    container::{Container, HEAD_BYTES},
    content::{self, Animation, Content},
    local_file::LocalFile,
    pixels::Resizer,
    truncated_pictures::{self, Truncated},
};
use crate::{config::MediaConfig, telemetry::PieceTimer};

/// Most bytes of a pixel in a decoder (16 bits in four channels).
const MAX_PIXEL_BYTES: usize = 8;
/// Most bytes per pixel of an animation: two canvases, the stored frame, and the frame as RGBA.
const MAX_ANIMATION_PIXEL_BYTES: usize = 20;

/// Background of transparent pixels.
const WHITE: Rgba<u8> = Rgba([255; 4]);

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

/// The files that pictures come from.
#[derive(Debug)]
pub enum PictureSource {
    Still(LocalFile),
    /// Frames that the client sampled itself.
    List(Vec<LocalFile>),
    Animation(LocalFile, Animation),
}

impl PictureSource {
    pub fn files(&self) -> &[LocalFile] {
        match self {
            PictureSource::Still(file) | PictureSource::Animation(file, _) => std::slice::from_ref(file),
            PictureSource::List(files) => files,
        }
    }

    /// Returns the container name for the reply.
    pub fn container(&self) -> &'static str {
        match self {
            PictureSource::Still(_) => "image",
            PictureSource::List(_) => "frames",
            PictureSource::Animation(_, animation) => animation.name(),
        }
    }
}

/// A decoded still image.
struct Still {
    picture: RgbImage,
    codec: &'static str,
    /// Share of its rows that arrived, 0 to 1.
    rows_share: f64,
}

/// A decoder of pictures, one after the other.
#[derive(Debug)]
pub struct PictureDecoder {
    pub image_size: usize,
    pub config: Arc<MediaConfig>,
    /// Stops the work between two pictures.
    pub cancelled: Arc<AtomicBool>,
}

impl PictureDecoder {
    /// Returns the pictures `wanted` (ascending, distinct) of `source`, resized.
    ///
    /// # Errors
    /// A picture that is damaged, too large or of another format, and an animation in a list.
    pub fn decode(&self, source: &PictureSource, wanted: &[usize]) -> Result<Pictures, MediaError> {
        let mut collector = Collector::new(self.image_size);
        if let PictureSource::Animation(file, animation) = source {
            self.read_frames(file, animation, wanted, &mut collector)?;
            collector.pictures.decoded_share = 1.0;
            return Ok(collector.pictures);
        }
        let files = source.files();
        for &number in wanted {
            self.check_cancelled()?;
            let read = self.read(&files[number]);
            let Still { picture, codec, rows_share } =
                read.map_err(|error| named(error, number, files.len()))?;
            collector.pictures.decoded_share += rows_share / wanted.len() as f64;
            collector.push(&picture, codec);
        }
        Ok(collector.pictures)
    }

    /// Decodes a still image as viewers show it: rotated by its metadata, on white.
    fn read(&self, file: &LocalFile) -> Result<Still, MediaError> {
        let bytes = read_file(file)?;
        let Some((format, codec)) = format(&bytes) else {
            return Err(match Container::sniff(&bytes[..bytes.len().min(HEAD_BYTES)]) {
                Ok(container) => MediaError::Unsupported(format!(
                    "this is a {}, not a picture; send it apart from the pictures, as a video_url part",
                    container.name()
                )),
                Err(_) => unsupported(),
            });
        };
        if let Content::Animation(animation) = content::of(file, &self.config)? {
            return Err(MediaError::Unsupported(format!(
                "this is an animated {}, not a picture; send it by itself, as a video_url part, or send its frames \
                 as pictures",
                animation.name()
            )));
        }
        let truncated = Truncated::find(&bytes, format);
        let data = truncated.as_ref().map_or(&bytes[..], |truncated| truncated.arrived);
        let mut reader = ImageReader::with_format(Cursor::new(data), format);
        reader.limits(self.limits(self.config.max_frame_pixels * MAX_PIXEL_BYTES));
        let mut decoder = reader.into_decoder().map_err(|error| damaged(&error, &self.config))?;
        self.check_size(decoder.dimensions(), self.config.max_frame_pixels)?;
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        let decoded = truncated_pictures::decode(decoder, format);
        let (picture, share) = decoded.map_err(|error| damaged(&error, &self.config))?;
        let rows_share = match truncated {
            None => share,
            Some(truncated) => truncated.share(&picture.to_rgb8()).ok_or_else(|| {
                MediaError::Undecodable("the picture is cut off; send the whole picture".into())
            })?,
        };
        if rows_share < self.config.min_decoded_share {
            return Err(MediaError::Undecodable(format!(
                "only {:.0} % of the picture arrived; send the whole picture",
                rows_share * 100.0
            )));
        }
        let mut picture = on_white(picture);
        picture.apply_orientation(orientation);
        Ok(Still { picture: picture.into_rgb8(), codec, rows_share })
    }

    /// Decodes an animation up to the last frame wanted: each frame may be a patch of the previous
    /// one.
    fn read_frames(
        &self,
        file: &LocalFile,
        animation: &Animation,
        wanted: &[usize],
        collector: &mut Collector,
    ) -> Result<(), MediaError> {
        let bytes = read_file(file)?;
        let (frames, orientation) = match animation.format {
            ImageFormat::Png => self.png_frames(&bytes),
            _ => self.webp_frames(&bytes),
        }?;
        let mut rest = wanted.iter().peekable();
        for (number, frame) in frames.enumerate() {
            self.check_cancelled()?;
            let frame = frame.map_err(|error| damaged(&error, &self.config))?;
            if rest.next_if_eq(&&number).is_some() {
                let mut picture = on_white(DynamicImage::ImageRgba8(frame.into_buffer()));
                picture.apply_orientation(orientation);
                collector.push(&picture.into_rgb8(), animation.name());
            }
            if rest.peek().is_none() {
                return Ok(());
            }
        }
        Err(MediaError::Undecodable(
            "the animated picture has fewer frames than it says; send it as mp4 or webm".into(),
        ))
    }

    fn png_frames<'a>(&self, bytes: &'a [u8]) -> Result<(Frames<'a>, Orientation), MediaError> {
        let max_bytes = self.max_animation_pixels() * MAX_ANIMATION_PIXEL_BYTES;
        let decoder = PngDecoder::with_limits(Cursor::new(bytes), self.limits(max_bytes));
        let mut decoder = decoder.map_err(|error| damaged(&error, &self.config))?;
        self.check_size(decoder.dimensions(), self.max_animation_pixels())?;
        if !matches!(
            decoder.color_type(),
            ColorType::L8 | ColorType::La8 | ColorType::Rgb8 | ColorType::Rgba8
        ) {
            return Err(MediaError::Unsupported(
                "animated png of 16 bits is not accepted; send it with 8 bits, or as mp4 or webm".into(),
            ));
        }
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        let decoder = decoder.apng().map_err(|error| damaged(&error, &self.config))?;
        Ok((decoder.into_frames(), orientation))
    }

    fn webp_frames<'a>(&self, bytes: &'a [u8]) -> Result<(Frames<'a>, Orientation), MediaError> {
        let decoder = WebPDecoder::new(Cursor::new(bytes));
        let mut decoder = decoder.map_err(|error| damaged(&error, &self.config))?;
        self.check_size(decoder.dimensions(), self.max_animation_pixels())?;
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        // Without a background the decoder does not clear disposed frames.
        decoder.set_background_color(WHITE).map_err(|error| damaged(&error, &self.config))?;
        Ok((decoder.into_frames(), orientation))
    }

    fn check_cancelled(&self) -> Result<(), MediaError> {
        if self.cancelled.load(Ordering::Relaxed) {
            // Nobody waits for it.
            return Err(MediaError::Internal("decoding pictures was cancelled".into()));
        }
        Ok(())
    }

    fn max_animation_pixels(&self) -> usize {
        self.config.max_animation_frame_pixels.min(self.config.max_frame_pixels)
    }

    fn check_size(&self, (width, height): (u32, u32), max_pixels: usize) -> Result<(), MediaError> {
        let (width, height) = (width as usize, height as usize);
        let too_long = width.max(height) > self.config.max_frame_side;
        if width == 0 || height == 0 || too_long || width * height > max_pixels {
            return Err(too_large(&self.config, max_pixels));
        }
        Ok(())
    }

    /// `max_bytes`: of everything that a decoder holds.
    fn limits(&self, max_bytes: usize) -> Limits {
        let mut limits = Limits::no_limits();
        let max_side = u32::try_from(self.config.max_frame_side).unwrap_or(u32::MAX);
        (limits.max_image_width, limits.max_image_height) = (Some(max_side), Some(max_side));
        limits.max_alloc = Some(max_bytes as u64);
        limits
    }
}

/// Collects pictures of any size, resized to the model's.
struct Collector {
    pictures: Pictures,
    image_size: usize,
    /// Resizer for the size of the last picture.
    resizer: Option<(u32, u32, Resizer)>,
}

impl Collector {
    fn new(image_size: usize) -> Self {
        let pictures = Pictures {
            resizing: PieceTimer::default(),
            frames: vec![],
            width: 0,
            height: 0,
            codec: "",
            decoded_share: 0.0,
        };
        Collector { pictures, image_size, resizer: None }
    }

    fn push(&mut self, picture: &RgbImage, codec: &'static str) {
        let started = Instant::now();
        let (width, height) = picture.dimensions();
        let pictures = &mut self.pictures;
        if pictures.frames.is_empty() {
            (pictures.width, pictures.height, pictures.codec) = (width as usize, height as usize, codec);
        }
        let resizer = match &self.resizer {
            Some((w, h, resizer)) if (*w, *h) == (width, height) => resizer,
            _ => {
                let resizer = Resizer::new(width as usize, height as usize, self.image_size);
                &self.resizer.insert((width, height, resizer)).2
            }
        };
        pictures.frames.push(resizer.resize(picture.as_raw()));
        pictures.resizing.piece(started);
    }
}

/// Composites `picture` on white.
fn on_white(picture: DynamicImage) -> DynamicImage {
    let color = picture.color();
    if !color.has_alpha() {
        return picture;
    }
    if color.bytes_per_pixel() == color.channel_count() {
        let mut picture = picture.into_rgba8();
        picture.pixels_mut().for_each(|Rgba([red, green, blue, alpha])| {
            let (part, rest) = (u32::from(*alpha), 255 - u32::from(*alpha));
            for level in [red, green, blue] {
                *level = ((u32::from(*level) * part + 255 * rest + 127) / 255) as u8;
            }
            *alpha = 255;
        });
        return picture.into();
    }
    let mut picture = picture.into_rgba16();
    picture.pixels_mut().for_each(|Rgba([red, green, blue, alpha])| {
        let (part, rest) = (u64::from(*alpha), 65_535 - u64::from(*alpha));
        for level in [red, green, blue] {
            *level = ((u64::from(*level) * part + 65_535 * rest + 32_767) / 65_535) as u16;
        }
        *alpha = u16::MAX;
    });
    picture.into()
}

/// Reads a picture's file.
fn read_file(file: &LocalFile) -> Result<Vec<u8>, MediaError> {
    fs::read(file.path()).map_err(|error| {
        tracing::error!(%error, "a picture's file vanished");
        MediaError::Internal("the picture could not be read; try again".into())
    })
}

/// The error for a file that is neither a picture nor a video.
pub fn unsupported() -> MediaError {
    MediaError::Unsupported("this is not a picture that is accepted; send jpeg, png or webp".into())
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

fn damaged(error: &image::ImageError, config: &MediaConfig) -> MediaError {
    if matches!(error, image::ImageError::Limits(_)) {
        return too_large(config, config.max_frame_pixels);
    }
    tracing::debug!(%error, "a picture cannot be decoded");
    MediaError::Undecodable(
        "the picture is damaged or incomplete; check that it can be viewed and send it again".into(),
    )
}

fn too_large(config: &MediaConfig, max_pixels: usize) -> MediaError {
    MediaError::Undecodable(format!(
        "the picture is too large; at most {} pixels a side and {max_pixels} in all are accepted",
        config.max_frame_side
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
