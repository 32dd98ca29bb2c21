//! Animated WebP, PNG and GIF are videos in every kind of part; transparent pixels are composited
//! on white.

use std::{io::Cursor, path::Path, process::Command, sync::Arc};

use base64::{Engine, engine::general_purpose::STANDARD};
use image::{DynamicImage, ExtendedColorType, ImageFormat, RgbaImage};
use tinyllava::{
    config::MediaConfig,
    media::{
        FrameSampling, MediaError, MediaLoader, VideoFrames, VideoSource, frame_sampling::spread, pixels,
    },
};

use crate::media_clips::{Clip, SIZE, loader, loader_with, numbers};

/// Reads a trial file.
fn trial(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/trials").join(name)).unwrap()
}

fn data_url(kind: &str, bytes: &[u8]) -> String {
    format!("data:{kind};base64,{}", STANDARD.encode(bytes))
}

fn picture(bytes: &[u8]) -> VideoSource {
    VideoSource::Image(data_url("image/png", bytes))
}

async fn load(loader: &MediaLoader, source: VideoSource) -> Result<Arc<VideoFrames>, MediaError> {
    loader.load(source, FrameSampling::default()).await
}

/// Reads the number in each frame of a trial file: 5 x 4 cells, of which the last four are a check.
fn trial_numbers(frames: &VideoFrames) -> Vec<usize> {
    let side = frames.size;
    let number = |frame: &[u8]| {
        let white = |cell: usize| {
            let (x, y) = ((cell % 5 * 2 + 1) * side / 10, (cell / 5 * 2 + 1) * side / 8);
            usize::from(frame[(y * side + x) * 3] > 128)
        };
        let number: usize = (0..16).map(|cell| white(cell) << cell).sum();
        let check: usize = (0..4).map(|bit| white(16 + bit) << bit).sum();
        let nibbles = (0..4).fold(0, |sum, nibble| sum ^ (number >> (nibble * 4)));
        assert_eq!(check, !nibbles & 15, "an unreadable frame");
        number
    };
    frames.rgb.chunks_exact(side * side * 3).map(number).collect()
}

/// Returns `bytes` as every kind of source.
fn sources(bytes: &[u8]) -> Vec<VideoSource> {
    let mut upload = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut upload, bytes).unwrap();
    vec![
        VideoSource::Image(data_url("image/webp", bytes)),
        VideoSource::Image(data_url("image/png", bytes)),
        VideoSource::Url(data_url("video/webp", bytes)),
        VideoSource::Base64(STANDARD.encode(bytes)),
        VideoSource::Bytes(bytes.to_vec().into()),
        VideoSource::TempFile(upload),
    ]
}

#[tokio::test]
async fn animated_webp_is_a_video_whatever_it_is_sent_as() {
    let (loader, bytes) = (loader(), trial("animation.webp"));
    for source in sources(&bytes) {
        let name = format!("{source:.40?}");
        let frames = load(&loader, source).await.unwrap();
        assert_eq!(trial_numbers(&frames), spread(50, 16), "{name}");
        let info = &frames.info;
        assert_eq!((info.source_frames, info.container.as_str(), info.codec.as_str()), (50, "webp", "webp"));
        assert_eq!((info.width, info.height), (160, 128));
        assert_eq!(info.sampled_indices, spread(50, 16));
        assert!((info.duration.unwrap() - 2.0).abs() < 1e-9, "{info:?}");
        let times: Vec<f64> = spread(50, 16).into_iter().map(|index| index as f64 * 0.04).collect();
        assert!(info.sampled_timestamps.iter().zip(times).all(|(a, b)| (a - b).abs() < 1e-9), "{info:?}");
    }
    let at_rate = FrameSampling { fps: Some(5.0), start: Some(1.0), ..FrameSampling::default() };
    let frames = loader.load(picture(&bytes), at_rate).await.unwrap();
    assert_eq!(trial_numbers(&frames), [25, 30, 35, 40, 45]);
}

#[tokio::test]
async fn every_animation_that_ffmpeg_writes_is_a_video() {
    let directory = tempfile::tempdir().unwrap();
    for (name, options, container) in [
        ("a.webp", "-c:v libwebp_anim -lossless 1 -pix_fmt bgra", "webp"),
        ("lossy.webp", "-c:v libwebp_anim -quality 90 -pix_fmt yuv420p", "webp"),
        ("a.png", "-f apng -plays 0", "apng"),
        ("rgba.png", "-f apng -pix_fmt rgba", "apng"),
        ("palette.png", "-f apng -pix_fmt pal8", "apng"),
        ("a.gif", "-pix_fmt rgb8", "gif"),
    ] {
        let bytes = std::fs::read(Clip::default().encode(directory.path(), name, options)).unwrap();
        for source in [picture(&bytes), VideoSource::Url(data_url("video/mp4", &bytes))] {
            let frames = load(&loader(), source).await.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(numbers(&frames), spread(97, 16), "{name}");
            assert_eq!((frames.info.source_frames, &*frames.info.container), (97, container), "{name}");
            assert!((frames.info.duration.unwrap() - 97.0 / 25.0).abs() < 0.02, "{name}: {:?}", frames.info);
        }
    }
}

#[tokio::test]
async fn animations_of_one_frame_are_stills() {
    let directory = tempfile::tempdir().unwrap();
    let clip = Clip { frames: 1, ..Clip::default() };
    for (name, options, container) in [
        ("a.webp", "-c:v libwebp_anim -lossless 1", "image"),
        ("a.png", "-f apng", "image"),
        ("a.gif", "-pix_fmt rgb8", "gif"),
    ] {
        let bytes = std::fs::read(clip.encode(directory.path(), name, options)).unwrap();
        let frames = load(&loader(), picture(&bytes)).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((numbers(&frames), &*frames.info.container), (vec![0; 16], container), "{name}");
    }
}

#[tokio::test]
async fn an_animation_is_no_frame_of_a_list() {
    let still = trial("disc_on_nothing.png");
    let animation = trial("animation.webp");
    let urls = vec![data_url("image/png", &still), data_url("image/webp", &animation)];
    let error = load(&loader(), VideoSource::Frames(urls)).await.unwrap_err();
    let MediaError::Unsupported(message) = error else { panic!("{error}") };
    assert!(message.starts_with("frame 1 of the list: this is an animated webp"), "{message}");
    assert!(message.contains("video_url"), "{message}");
}

#[tokio::test]
async fn animations_that_are_cut_off_or_too_large_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let limited = |more: MediaConfig| loader_with(MediaConfig { max_frame_pixels: 96 * 64, ..more });
    for (name, options) in [("a.webp", "-c:v libwebp_anim -lossless 1"), ("a.png", "-f apng")] {
        let bytes = std::fs::read(Clip::default().encode(directory.path(), name, options)).unwrap();
        assert!(load(&limited(MediaConfig::default()), picture(&bytes)).await.is_ok(), "{name}");
        for kept in [bytes.len() - 40, bytes.len() / 2, 200] {
            let error = load(&loader(), picture(&bytes[..kept])).await.unwrap_err();
            assert!(
                matches!(&error, MediaError::Undecodable(m) if m.contains("cut off")),
                "{name} {kept}: {error}"
            );
        }
        let few = limited(MediaConfig { max_animation_frames: 96, ..MediaConfig::default() });
        let error = load(&few, picture(&bytes)).await.unwrap_err();
        assert!(
            matches!(&error, MediaError::Undecodable(m) if m.contains("more than 96 frames")),
            "{name}: {error}"
        );
        let small = loader_with(MediaConfig { max_frame_pixels: 96 * 64 - 1, ..MediaConfig::default() });
        let error = load(&small, picture(&bytes)).await.unwrap_err();
        assert!(matches!(&error, MediaError::Undecodable(m) if m.contains("too large")), "{name}: {error}");
        // Damaged frames are an error, too.
        let mut damaged = bytes.clone();
        damaged[bytes.len() / 2..][..200].fill(0x55);
        let error = load(&loader(), picture(&damaged)).await.unwrap_err();
        assert!(matches!(error, MediaError::Undecodable(_)), "{name}: {error}");
    }
    let deep = Clip::default().encode(directory.path(), "deep.png", "-f apng -pix_fmt rgb48be");
    let error = load(&loader(), picture(&std::fs::read(deep).unwrap())).await.unwrap_err();
    assert!(matches!(&error, MediaError::Unsupported(m) if m.contains("8 bits")), "{error}");
}

/// Returns the one frame of a picture.
async fn pixels_of(bytes: &[u8]) -> Vec<u8> {
    let once = FrameSampling { num_frames: Some(1), ..FrameSampling::default() };
    loader().load(picture(bytes), once).await.unwrap().rgb.to_vec()
}

/// Composites `picture` on white and resizes it.
fn seen_on_white(picture: &RgbaImage) -> Vec<u8> {
    let over = |level: u8, alpha: u8| {
        let (level, alpha) = (f64::from(level), f64::from(alpha) / 255.0);
        (level * alpha + 255.0 * (1.0 - alpha)).round() as u8
    };
    let rgb: Vec<u8> =
        picture.pixels().flat_map(|p| [over(p[0], p[3]), over(p[1], p[3]), over(p[2], p[3])]).collect();
    pixels::resize(&rgb, picture.height() as usize, picture.width() as usize, SIZE)
}

#[tokio::test]
async fn transparent_pictures_are_seen_on_white() {
    for name in ["disc_on_nothing.png", "hidden_colour.png"] {
        let bytes = trial(name);
        let rgba = image::load_from_memory(&bytes).unwrap().into_rgba8();
        assert!(rgba.pixels().any(|pixel| pixel[3] < 255), "{name}");
        assert_eq!(pixels_of(&bytes).await, seen_on_white(&rgba), "{name}");
    }
}

#[tokio::test]
async fn every_kind_of_transparency_is_seen_on_white() {
    let rgba =
        RgbaImage::from_fn(60, 40, |x, y| image::Rgba([x as u8 * 4, y as u8 * 6, 90, (x * 255 / 59) as u8]));
    let gray = RgbaImage::from_fn(60, 40, |x, y| {
        let level = (x + y) as u8 * 2;
        image::Rgba([level, level, level, (y * 255 / 39) as u8])
    });
    let encode = |picture: DynamicImage, format| {
        let mut bytes = Cursor::new(vec![]);
        picture.write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    };
    let of = |picture: &RgbaImage| DynamicImage::ImageRgba8(picture.clone());
    for (name, bytes, expected) in [
        ("rgba", encode(of(&rgba), ImageFormat::Png), &rgba),
        ("rgba of 16 bits", encode(of(&rgba).into_rgba16().into(), ImageFormat::Png), &rgba),
        ("webp", encode(of(&rgba), ImageFormat::WebP), &rgba),
        ("gray and alpha", encode(of(&gray).into_luma_alpha8().into(), ImageFormat::Png), &gray),
        ("gray and alpha of 16 bits", encode(of(&gray).into_luma_alpha16().into(), ImageFormat::Png), &gray),
    ] {
        let close =
            pixels_of(&bytes).await.iter().zip(seen_on_white(expected)).all(|(a, b)| a.abs_diff(b) <= 1);
        assert!(close, "{name}");
    }
    let bytes = palette_png();
    let expected = image::load_from_memory(&bytes).unwrap();
    assert_eq!(ExtendedColorType::from(expected.color()), ExtendedColorType::Rgba8);
    assert_eq!(pixels_of(&bytes).await, seen_on_white(&expected.into_rgba8()), "a palette with transparency");
}

/// Makes a still image whose palette has transparent colors.
fn palette_png() -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("palette.png");
    let status = Command::new("ffmpeg")
        .args(["-loglevel", "error", "-f", "lavfi", "-i", "testsrc=size=64x48:rate=25:duration=0.04"])
        .arg("-vf")
        .arg(
            "format=rgba,geq=r='r(X,Y)':g='g(X,Y)':b='b(X,Y)':a='255*gt(X,30)',split[a][b];[a]palettegen[p];\
             [b][p]paletteuse",
        )
        .args(["-frames:v", "1"])
        .arg(&path)
        .status()
        .unwrap();
    assert!(status.success());
    std::fs::read(path).unwrap()
}

#[tokio::test]
async fn transparent_animations_are_seen_on_white() {
    let directory = tempfile::tempdir().unwrap();
    // A black bar moves over a transparent background: the columns it leaves are white again.
    for (name, options) in [
        ("a.webp", "-c:v libwebp_anim -lossless 1 -pix_fmt bgra"),
        ("a.png", "-f apng -pix_fmt rgba"),
        ("a.gif", "-vf split[a][b];[a]palettegen=reserve_transparent=1[p];[b][p]paletteuse"),
    ] {
        let path = directory.path().join(name);
        let mut command = Command::new("ffmpeg");
        command.args(["-loglevel", "error", "-f", "lavfi", "-i"]);
        command.arg(
            "color=black:size=96x96:rate=10:duration=0.6,format=rgba,geq=r=0:g=0:b=0:a='255*between(X,N*16,N*16+15)'",
        );
        if let Some(graph) = options.strip_prefix("-vf ") {
            command.args(["-vf", graph]);
        } else {
            command.args(options.split_whitespace());
        }
        assert!(command.args(["-frames:v", "6"]).arg(&path).status().unwrap().success(), "{name}");
        let all = FrameSampling { num_frames: Some(6), ..FrameSampling::default() };
        let frames = loader().load(picture(&std::fs::read(&path).unwrap()), all).await.unwrap();
        assert_eq!(frames.info.source_frames, 6, "{name}");
        for (number, frame) in frames.rgb.chunks_exact(SIZE * SIZE * 3).enumerate() {
            let middle_row = &frame[SIZE / 2 * SIZE * 3..][..SIZE * 3];
            for (x, pixel) in middle_row.chunks_exact(3).enumerate() {
                let expected = if x / 16 == number { 0 } else { 255 };
                assert_eq!(pixel, [expected; 3], "{name}: frame {number} at {x}");
            }
        }
    }
}
