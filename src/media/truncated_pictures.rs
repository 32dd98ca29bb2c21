//! Finds out how much of a picture arrived.
//!
//! Called by `pictures.rs`. The JPEG decoder fills what is missing and reports no error, the PNG
//! decoder fails after the rows that arrived, and the WebP decoder gives no rows. Pure. Must never
//! take a whole picture for a part of one.

use image::{
    ColorType, DynamicImage, GrayAlphaImage, GrayImage, ImageDecoder, ImageError, ImageFormat, ImageResult,
    RgbImage, RgbaImage,
};

/// A picture without its end.
#[derive(Debug)]
pub struct Truncated<'a> {
    /// Its bytes up to the zeros that stand for what did not arrive.
    pub arrived: &'a [u8],
    /// Bytes of the file, those zeros included.
    reserved_bytes: usize,
}

impl<'a> Truncated<'a> {
    /// None: the picture is whole, or its decoder reports what is missing.
    pub fn find(bytes: &'a [u8], format: ImageFormat) -> Option<Self> {
        if format != ImageFormat::Jpeg || jpeg_has_end(bytes) {
            return None;
        }
        let content = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        Some(Truncated { arrived: &bytes[..content], reserved_bytes: bytes.len() })
    }

    /// Returns the share, 0 to 1, of the decoded `picture` that arrived. `None` for a progressive JPEG
    /// of unknown length: each of its scans covers all rows.
    pub fn share(&self, picture: &RgbImage) -> Option<f64> {
        if !is_progressive(self.arrived) {
            return Some(rows_share(picture));
        }
        let is_reserved = self.reserved_bytes > self.arrived.len();
        is_reserved.then(|| self.arrived.len() as f64 / self.reserved_bytes as f64)
    }
}

/// Returns true if the frame header of a JPEG is that of a progressive one (ITU-T T.81, B.2.2).
fn is_progressive(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(&[0xff, marker, high, low]) = bytes.get(at..at + 4) {
        match marker {
            0xc2 | 0xc6 | 0xca | 0xce => return true,
            0xc0..=0xcf if !matches!(marker, 0xc4 | 0xc8 | 0xcc) => return false,
            // Fill bytes come before a marker.
            0xff => at += 1,
            _ => at += 2 + usize::from(u16::from_be_bytes([high, low])),
        }
    }
    false
}

/// Decodes a picture and returns the share of its rows that arrived, 0 to 1. In a damaged 8-bit PNG
/// the rows after the damage are zero.
///
/// # Errors
/// Errors of the decoder, if it gives no rows.
pub fn decode(decoder: impl ImageDecoder, format: ImageFormat) -> ImageResult<(DynamicImage, f64)> {
    let ((width, height), color) = (decoder.dimensions(), decoder.color_type());
    let has_bytes = matches!(color, ColorType::L8 | ColorType::La8 | ColorType::Rgb8 | ColorType::Rgba8);
    if format != ImageFormat::Png || !has_bytes {
        return Ok((DynamicImage::from_decoder(decoder)?, 1.0));
    }
    let mut bytes = vec![0; usize::try_from(decoder.total_bytes()).unwrap_or(usize::MAX)];
    let damage = decoder.read_image(&mut bytes).err();
    let mut share = 1.0;
    if let Some(error) = damage {
        let row_bytes = width as usize * usize::from(color.bytes_per_pixel());
        let rows = bytes.chunks_exact(row_bytes.max(1)).rev();
        let missing = rows.take_while(|row| row.iter().all(|&byte| byte == 0)).count();
        share = 1.0 - missing as f64 / f64::from(height.max(1));
        let tells_of_rows = matches!(error, ImageError::IoError(_) | ImageError::Decoding(_));
        if !tells_of_rows || missing == height as usize {
            return Err(error);
        }
    }
    let picture = match color {
        ColorType::L8 => GrayImage::from_raw(width, height, bytes).map(DynamicImage::from),
        ColorType::La8 => GrayAlphaImage::from_raw(width, height, bytes).map(DynamicImage::from),
        ColorType::Rgb8 => RgbImage::from_raw(width, height, bytes).map(DynamicImage::from),
        _ => RgbaImage::from_raw(width, height, bytes).map(DynamicImage::from),
    };
    Ok((picture.expect("the decoder filled a buffer of its own size: this is a bug"), share))
}

/// Returns true if the markers of a JPEG lead to its end (ITU-T T.81, B.1): previews inside of
/// segments have ends of their own.
fn jpeg_has_end(bytes: &[u8]) -> bool {
    let mut at = 2;
    while let Some(offset) = bytes.get(at..).and_then(|rest| rest.iter().position(|&byte| byte == 0xff)) {
        at += offset + 1;
        match bytes.get(at) {
            None => return false,
            Some(0xd9) => return true,
            // Stuffed bytes, restarts and standalone markers; fill bytes come before a marker.
            Some(0x00 | 0x01 | 0xd0..=0xd8) => at += 1,
            Some(0xff) => {}
            Some(_) => {
                let Some(&[high, low]) = bytes.get(at + 1..at + 3) else { return false };
                at += 1 + usize::from(u16::from_be_bytes([high, low]));
            }
        }
    }
    false
}

/// Returns the share of a truncated picture's rows that arrived, at least coarsely: decoders repeat
/// one row for all that are missing.
fn rows_share(picture: &RgbImage) -> f64 {
    let row_bytes = picture.width() as usize * 3;
    let mut rows = picture.as_raw().chunks_exact(row_bytes.max(1)).rev();
    let Some(last) = rows.next() else { return 0.0 };
    let missing = 1 + rows.take_while(|row| *row == last).count();
    1.0 - missing as f64 / f64::from(picture.height().max(1))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// A picture without two equal rows.
    fn jpeg(options: &str) -> Vec<u8> {
        let mut ffmpeg = Command::new("ffmpeg");
        ffmpeg.args(["-loglevel", "error", "-f", "lavfi", "-i", "mandelbrot=size=320x240", "-frames:v", "1"]);
        ffmpeg.args(options.split_whitespace()).args(["-f", "mjpeg", "-"]);
        ffmpeg.output().unwrap().stdout
    }

    fn share(bytes: &[u8]) -> Option<f64> {
        let truncated = Truncated::find(bytes, ImageFormat::Jpeg)?;
        let picture = image::load_from_memory_with_format(truncated.arrived, ImageFormat::Jpeg);
        picture.map_or(Some(0.0), |picture| truncated.share(&picture.into_rgb8()))
    }

    #[test]
    fn missing_rows_of_a_jpeg_are_counted() {
        for options in ["-pix_fmt yuvj420p", "-pix_fmt yuvj444p -huffman default", "-pix_fmt yuvj422p -q:v 1"]
        {
            let whole = jpeg(options);
            assert_eq!(share(&whole), None, "{options}");
            let garbage_behind = [&whole[..], &[0; 500], b"more"].concat();
            assert_eq!(share(&garbage_behind), None, "{options}");
            let mut last: f64 = 1.0;
            for percent in [95, 80, 60, 40, 20, 5] {
                let cut = &whole[..whole.len() * percent / 100];
                let found = share(cut).unwrap();
                assert!((found - percent as f64 / 100.0).abs() < 0.2, "{options} {percent}: {found}");
                assert!(found <= last && found < 1.0, "{options} {percent}: {found} after {last}");
                let reserved = [cut, &vec![0; whole.len() - cut.len()]].concat();
                assert!((share(&reserved).unwrap() - found).abs() < 0.01, "{options} {percent}");
                last = found;
            }
            assert!(last < 0.2, "{options}: {last}");
        }
    }

    #[test]
    fn a_part_of_a_progressive_jpeg_has_a_share_only_if_the_length_is_known() {
        // A frame header of a progressive JPEG after a table, and a scan without an end.
        let quantization = [&[0xff, 0xd8, 0xff, 0xdb, 0, 67][..], &[1; 65]].concat();
        let progressive = [&quantization[..], &[0xff, 0xc2, 0, 8], &[8; 300]].concat();
        let baseline = [&quantization[..], &[0xff, 0xc0, 0, 8], &[8; 300]].concat();
        let picture = RgbImage::from_fn(2, 4, |_, y| image::Rgb([y.min(2) as u8; 3]));
        let share = |bytes: &[u8]| Truncated::find(bytes, ImageFormat::Jpeg).unwrap().share(&picture);
        assert_eq!(share(&progressive), None);
        let reserved = [&progressive[..], &vec![0; progressive.len()]].concat();
        assert_eq!(share(&reserved), Some(0.5));
        assert_eq!(share(&baseline), Some(0.5), "the last two rows are the same");
    }
}
