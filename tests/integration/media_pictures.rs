//! Pictures in place of a video: frames that the client sampled itself, and stills. And downloads, which happen once.

use std::{io::Cursor, path::Path, sync::Arc, time::Duration};

use axum::{Router, routing::get};
use base64::{Engine, engine::general_purpose::STANDARD};
use image::{ImageFormat, RgbImage};
use tinyllava::{
    config::MediaConfig,
    media::{Caller, FrameSampling, MediaError, MediaLoader, VideoFrames, VideoSource, pixels},
};
use tokio::net::TcpListener;

use crate::{
    http_setup::VideoHost,
    media_clips::{Clip, SIZE, loader_with, numbers},
};

fn encoded(width: u32, height: u32, rgb: Vec<u8>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(vec![]);
    RgbImage::from_raw(width, height, rgb).unwrap().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A picture of many colours.
fn picture(width: u32, height: u32, format: ImageFormat) -> Vec<u8> {
    let rgb = (0..width * height * 3).map(|i| (i * 31 % 251) as u8).collect();
    encoded(width, height, rgb, format)
}

fn data_url(bytes: &[u8]) -> String {
    format!("data:image/png;base64,{}", STANDARD.encode(bytes))
}

fn sampling(num_frames: usize) -> FrameSampling {
    FrameSampling { num_frames: Some(num_frames), ..FrameSampling::default() }
}

async fn load(config: &MediaConfig, source: VideoSource) -> Result<Arc<VideoFrames>, MediaError> {
    loader_with(config.clone()).load(source, FrameSampling::default()).await
}

/// The frames that the server itself would sample, as PNG files.
async fn sampled_frames(loader: &MediaLoader, clip: &Path, num_frames: usize) -> Vec<Vec<u8>> {
    let frames = loader.source_frames(clip, sampling(num_frames)).await.unwrap();
    let (width, height) = (frames.info.width, frames.info.height);
    let pictures = frames.rgb.chunks_exact(width * height * 3);
    pictures.map(|rgb| encoded(width as u32, height as u32, rgb.to_vec(), ImageFormat::Png)).collect()
}

/// Serves each picture under its number.
async fn serve(pictures: &[Vec<u8>]) -> String {
    let route = |app: Router, (number, bytes): (usize, Vec<u8>)| {
        app.route(&format!("/{number}.png"), get(move || async move { bytes }))
    };
    let app = pictures.iter().cloned().enumerate().fold(Router::new(), route);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async { axum::serve(listener, app).await });
    url
}

#[tokio::test]
async fn frames_sampled_by_the_client_are_the_frames_of_the_video() {
    let directory = tempfile::tempdir().unwrap();
    let clip = Clip::default().encode(directory.path(), "clip.mp4", "-c:v libx264 -pix_fmt yuv420p");
    let config = MediaConfig {
        allow_private_addresses: true,
        allowed_media_dir: Some(directory.path().into()),
        ..MediaConfig::default()
    };
    let loader = loader_with(config);
    let video = loader.load(VideoSource::LocalFile(clip.clone()), sampling(7)).await.unwrap();
    let pictures = sampled_frames(&loader, &clip, 7).await;
    let host = serve(&pictures).await;
    let texts: Vec<String> = pictures.iter().map(|bytes| STANDARD.encode(bytes)).collect();
    let mut mixed: Vec<String> = (0..7).map(|number| format!("{host}/{number}.png")).collect();
    mixed[2] = data_url(&pictures[2]);
    let third = directory.path().join("3.png");
    std::fs::write(&third, &pictures[3]).unwrap();
    mixed[3] = format!("file://{}", third.display());
    let lists = [
        VideoSource::Frames(pictures.iter().map(|bytes| data_url(bytes)).collect()),
        VideoSource::Url(format!("data:video/jpeg;base64,{}", texts.join(","))),
        VideoSource::Frames((0..7).map(|number| format!("{host}/{number}.png")).collect()),
        VideoSource::Frames(mixed),
    ];
    let mut digests = std::collections::HashSet::new();
    for list in lists {
        let frames = loader.load(list, sampling(7)).await.unwrap();
        assert!(frames.rgb == video.rgb, "other pixels");
        assert_eq!(numbers(&frames), video.info.sampled_indices);
        assert_eq!((frames.info.container.as_str(), frames.info.codec.as_str()), ("frames", "png"));
        assert_eq!((frames.info.duration, frames.info.num_frames), (None, 7));
        digests.insert(frames.digest);
    }
    assert_eq!(digests.len(), 1, "the same frames are the same video");
    let reversed: Vec<String> = pictures.iter().rev().map(|bytes| data_url(bytes)).collect();
    let timed = FrameSampling { fps: Some(2.0), ..sampling(7) };
    let reversed = loader.load(VideoSource::Frames(reversed), timed).await.unwrap();
    assert!(!digests.contains(&reversed.digest), "the order counts");
    assert_eq!((reversed.info.duration, reversed.info.fps), (Some(3.5), Some(2.0)));
    assert_eq!(reversed.info.sampled_timestamps, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]);
}

#[tokio::test]
async fn a_still_is_a_video_of_one_frame() {
    let config = MediaConfig::default();
    for (format, codec) in
        [(ImageFormat::Png, "png"), (ImageFormat::WebP, "webp"), (ImageFormat::Jpeg, "jpeg")]
    {
        let bytes = picture(50, 40, format);
        let rgb = image::load_from_memory(&bytes).unwrap().into_rgb8();
        let expected = pixels::resize(rgb.as_raw(), 40, 50, SIZE);
        let still = load(&config, VideoSource::Image(data_url(&bytes))).await.unwrap();
        assert!(still.rgb.chunks_exact(expected.len()).all(|frame| frame == expected), "{codec}");
        assert_eq!(still.info.sampled_indices, [0; 16], "as the frames of a short video");
        assert_eq!((still.info.container.as_str(), still.info.codec.as_str()), ("image", codec));
        assert_eq!((still.info.width, still.info.height, still.info.duration), (50, 40, Some(0.0)));
        let once = loader_with(config.clone()).load(VideoSource::Image(data_url(&bytes)), sampling(1)).await;
        assert_eq!(once.unwrap().rgb[..], expected);
    }
}

#[tokio::test]
async fn a_picture_is_turned_as_its_camera_was() {
    let jpeg = picture(50, 40, ImageFormat::Jpeg);
    // Orientation 6: a quarter turn clockwise.
    let tiff = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
    let mut turned = jpeg[..2].to_vec();
    turned.extend([0xff, 0xe1, 0, tiff.len() as u8 + 2]);
    turned.extend(tiff);
    turned.extend(&jpeg[2..]);
    let info =
        load(&MediaConfig::default(), VideoSource::Image(data_url(&turned))).await.unwrap().info.clone();
    assert_eq!((info.width, info.height), (40, 50));
}

#[tokio::test]
async fn what_is_no_picture_or_too_large_is_refused() {
    let config = MediaConfig {
        max_frame_side: 100,
        max_frame_pixels: 5000,
        max_video_bytes: 50_000,
        ..MediaConfig::default()
    };
    let still = async |bytes: &[u8]| load(&config, VideoSource::Image(data_url(bytes))).await;
    let png = |width, height| picture(width, height, ImageFormat::Png);
    assert!(still(&png(100, 50)).await.is_ok());
    for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP] {
        for (width, height) in [(101, 1), (1, 101), (80, 80)] {
            let error = still(&picture(width, height, format)).await.unwrap_err();
            assert!(matches!(&error, MediaError::Undecodable(m) if m.contains("too large")), "{error}");
        }
        let error = still(&picture(60, 60, format)[..40]).await.unwrap_err();
        assert!(matches!(error, MediaError::Undecodable(_)), "{format:?}: {error}");
    }
    for bytes in [&b"BM"[..], b"", b"<svg/>", b"\0\0\0\x20ftypheic", b"\0\0\0\x20ftypavif"] {
        let error = still(bytes).await.unwrap_err();
        assert!(
            matches!(&error, MediaError::Unsupported(m) if m.contains("send jpeg, png or webp")),
            "{error}"
        );
    }
    // A video sent as a picture is decoded as a video.
    for bytes in [&b"GIF89a\x10\0\x10\0"[..], b"\0\0\0\x20ftypisom"] {
        let error = still(bytes).await.unwrap_err();
        assert!(matches!(error, MediaError::Undecodable(_)), "{error}");
    }
    let large = vec![0; 60_000];
    assert!(matches!(still(&large).await, Err(MediaError::TooManyBytes { .. })));
    let good = png(40, 40);
    let list = VideoSource::Frames(vec![data_url(&good), data_url(b"BM")]);
    let error = load(&config, list).await.unwrap_err();
    assert!(matches!(&error, MediaError::Unsupported(m) if m.starts_with("frame 1 of the list")), "{error}");
}

#[tokio::test]
async fn requests_for_one_url_at_the_same_time_share_its_download() {
    let directory = tempfile::tempdir().unwrap();
    let clip = Clip::default().encode(directory.path(), "clip.mp4", "-c:v libx264 -pix_fmt yuv420p");
    let host = VideoHost::start(std::fs::read(clip).unwrap(), Some(Duration::from_millis(300))).await;
    let loader = loader_with(MediaConfig { allow_private_addresses: true, ..MediaConfig::default() });
    let load = |salt: Option<&str>| {
        let source = VideoSource::Url(host.url.clone());
        let caller = Caller { salt: salt.map(Into::into), ..Caller::default() };
        let loader = &loader;
        async move { loader.load_for(source, FrameSampling::default(), &caller).await }
    };
    let mut first = Box::pin(load(None));
    assert!(futures_util::poll!(&mut first).is_pending());
    let mut others: Vec<_> = (0..4).map(|_| Box::pin(load(None))).collect();
    for other in &mut others {
        assert!(futures_util::poll!(other).is_pending());
    }
    // Who began the download leaves; it goes on for the others.
    drop(first);
    let frames = futures_util::future::join_all(others).await;
    assert_eq!(host.hits(), 1);
    let digests: Vec<_> = frames.into_iter().map(|frames| frames.unwrap().digest).collect();
    assert!(digests.iter().all(|digest| *digest == digests[0]));
    // What is behind a URL may have changed: it is fetched again, and decoded only if it has.
    let again = load(None).await.unwrap();
    assert_eq!((host.hits(), again.digest), (2, digests[0]));
    let (a, b) = tokio::join!(load(Some("a")), load(Some("b")));
    assert_eq!(host.hits(), 4, "other salts share nothing");
    assert_ne!(a.unwrap().digest, b.unwrap().digest);
}
