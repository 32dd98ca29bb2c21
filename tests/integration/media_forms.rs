//! One video in all forms that clients and servers give it. The first bytes of a file say what it
//! is.

use std::{
    io::{Cursor, Write},
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::Path,
    http::HeaderMap,
    response::{IntoResponse, Response},
    routing::get,
};
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use flate2::{
    Compression,
    write::{DeflateEncoder, GzEncoder, ZlibEncoder},
};
use futures_util::{StreamExt, stream};
use tempfile::TempDir;
use tinyllava::{
    config::MediaConfig,
    media::{FileLabel, FrameSampling, MediaError, MediaLoader, Picture, VideoFrames, VideoSource},
};

use crate::media_clips::{Clip, loader_with, numbers};

fn encoded(name: &str, options: &str) -> Vec<u8> {
    let directory = TempDir::new().unwrap();
    std::fs::read(Clip { frames: 20, fps: "10", ..Clip::default() }.encode(directory.path(), name, options))
        .unwrap()
}

fn mp4() -> Vec<u8> {
    encoded("clip.mp4", "-c:v libx264 -preset superfast -pix_fmt yuv420p")
}

fn png() -> Vec<u8> {
    let mut bytes = Cursor::new(vec![]);
    let picture = image::RgbImage::from_fn(40, 30, |x, y| image::Rgb([(x * 6) as u8, (y * 8) as u8, 90]));
    picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn folded(text: &str, end: &str) -> String {
    let lines = text.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).unwrap());
    lines.collect::<Vec<_>>().join(end)
}

async fn load(loader: &MediaLoader, source: VideoSource) -> Result<Arc<VideoFrames>, MediaError> {
    loader.load(source, FrameSampling { num_frames: Some(4), ..FrameSampling::default() }).await
}

#[tokio::test]
async fn every_spelling_of_base64_gives_the_same_frames() {
    let (loader, bytes) = (loader_with(MediaConfig::default()), mp4());
    let (standard, safe) = (STANDARD.encode(&bytes), URL_SAFE_NO_PAD.encode(&bytes));
    let url = |header: &str, data: &str| VideoSource::Url(format!("{header}{data}"));
    let escaped = standard.replace('+', "%2B").replace('/', "%2F").replace('=', "%3D");
    let plain = load(&loader, VideoSource::Bytes(bytes.into())).await.unwrap();
    assert_eq!(numbers(&plain), plain.info.sampled_indices);
    for source in [
        url("data:video/mp4;base64,", &standard),
        url("data:;base64,", &standard),
        url("data:video/webm;codecs=vp8,opus;base64,", &standard),
        url("data:video/x-matroska;codecs=\"avc1, opus\";base64,", &standard),
        url("DATA:Video/MP4;BASE64,", &folded(&standard, "\r\n")),
        url("data:video/mp4;base64,", &safe),
        url("data:video/mp4;base64,", &escaped),
        url("data:application/octet-stream;base64,", &folded(&safe, "%0D%0A")),
        VideoSource::Image(format!("data:video/mp4;base64,{standard}")),
        VideoSource::Image(format!("data:image/png;base64,{standard}")),
        VideoSource::Base64(folded(&standard, "\r\n\t ")),
        VideoSource::Base64(folded(&safe, "\n")),
    ] {
        let name: String = format!("{source:?}").chars().take(70).collect();
        let frames = load(&loader, source).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((frames.digest, &frames.rgb), (plain.digest, &plain.rgb), "{name}");
    }
}

#[tokio::test]
async fn folded_pictures_of_a_list_are_pictures() {
    let (loader, picture) = (loader_with(MediaConfig::default()), png());
    let (standard, safe) = (STANDARD.encode(&picture), URL_SAFE_NO_PAD.encode(&picture));
    let frames =
        [standard.clone(), safe, folded(&standard, "\r\n")].map(|text| format!("data:;base64,{text}"));
    let list = loader.load(VideoSource::Frames(frames.to_vec()), FrameSampling::default()).await.unwrap();
    let joined = frames.map(|url| url.replace("data:;base64,", "")).join(",");
    for head in ["data:video/jpeg;base64,", "data:video/jpeg;name=a,b;base64,"] {
        for source in
            [VideoSource::Url(format!("{head}{joined}")), VideoSource::Image(format!("{head}{joined}"))]
        {
            let frames = loader.load(source, FrameSampling::default()).await.unwrap();
            assert_eq!((&frames.info, frames.digest), (&list.info, list.digest), "{head}");
        }
    }
    assert_eq!(list.info.container, "frames");
}

#[tokio::test]
async fn pictures_of_a_list_have_names_of_their_own() {
    let pictures = [10, 20, 30].map(|shade| {
        let mut bytes = Cursor::new(vec![]);
        let picture = image::RgbImage::from_pixel(40, 30, image::Rgb([shade; 3]));
        picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    });
    let [a, b, c] = pictures.clone();
    let address = serve(&[("a", a), ("b", b), ("c", c)]).await.0;
    let config = MediaConfig {
        allow_private_addresses: true,
        max_concurrent_fetches: 1,
        max_video_bytes: 40 * pictures[0].len(),
        ..MediaConfig::default()
    };
    let loader = loader_with(config);
    let list = async |pictures: &[(Option<&str>, Option<&str>)]| {
        let picture = |(url, uuid): &(Option<&str>, Option<&str>)| Picture {
            url: url.map(|name| format!("http://{address}/{name}")),
            uuid: uuid.map(Into::into),
        };
        let pictures_len = pictures.len();
        let pictures = VideoSource::Pictures(pictures.iter().map(picture).collect());
        // As many as there are: each picture is a frame.
        let all = FrameSampling { num_frames: Some(pictures_len), ..FrameSampling::default() };
        loader.load(pictures, all).await
    };
    let missing = list(&[(Some("a"), None), (None, Some("1"))]).await.unwrap_err();
    assert!(matches!(&missing, MediaError::NotFound { uuid } if uuid == "1"), "{missing:?}");
    let sent = list(&[(Some("a"), Some("1")), (Some("b"), None), (Some("c"), Some("3"))]).await.unwrap();
    let again = list(&[(None, Some("1")), (Some("b"), None), (None, Some("3"))]).await.unwrap();
    assert_eq!((again.digest, &again.rgb), (sent.digest, &sent.rgb));
    let turned = list(&[(None, Some("3")), (None, Some("1"))]).await.unwrap();
    let frame = sent.rgb.len() / 3;
    assert_eq!(turned.rgb[..frame], sent.rgb[2 * frame..]);
    assert_eq!(turned.rgb[frame..2 * frame], sent.rgb[..frame]);
    let many = list(&[(None, Some("1")); 41]).await.unwrap_err();
    assert!(matches!(many, MediaError::TooManyBytes { .. }), "{many:?}");
}

#[tokio::test]
async fn first_bytes_say_what_a_file_is_and_not_the_part_it_came_in() {
    let gif = encoded("clip.gif", "-vf format=gray");
    let (video, picture) = (mp4(), png());
    let address =
        serve(&[("clip.png", video.clone()), ("a.mp4", picture.clone()), ("b", gif.clone())]).await.0;
    let config = MediaConfig { allow_private_addresses: true, ..MediaConfig::default() };
    let loader = loader_with(config);
    let stored = |bytes: &[u8]| {
        let mut upload = loader.files().begin().unwrap();
        upload.write(bytes).unwrap();
        let label = FileLabel { filename: "a.bin".into(), purpose: "user_data".into(), lifetime: None };
        VideoSource::FileId(upload.finish(label).unwrap().id)
    };
    let data = |bytes: &[u8]| format!("data:image/gif;base64,{}", STANDARD.encode(bytes));
    let http = |name: &str| format!("http://{address}/{name}");
    for (bytes, name, container) in
        [(&video, "clip.png", "mp4"), (&picture, "a.mp4", "image"), (&gif, "b", "gif")]
    {
        let mut digests = std::collections::HashSet::new();
        for source in [
            VideoSource::Url(data(bytes)),
            VideoSource::Image(data(bytes)),
            VideoSource::Url(http(name)),
            VideoSource::Image(http(name)),
            VideoSource::Base64(STANDARD.encode(bytes)),
            VideoSource::Bytes(bytes.clone().into()),
            stored(bytes),
        ] {
            let what: String = format!("{source:?}").chars().take(50).collect();
            let frames = load(&loader, source).await.unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(frames.info.container.starts_with(container), "{what}: {}", frames.info.container);
            let num_frames = if container == "image" { 1 } else { 20 };
            assert_eq!(frames.info.source_frames, num_frames, "{what}");
            if container != "image" {
                assert_eq!(numbers(&frames), frames.info.sampled_indices, "{what}");
            }
            digests.insert(frames.digest);
        }
        assert_eq!(digests.len(), 1, "{name}");
    }
}

/// A host of files, and what it was asked with.
type Asked = Arc<Mutex<Vec<Option<String>>>>;

async fn serve(files: &[(&'static str, Vec<u8>)]) -> (SocketAddr, Asked) {
    let files: Vec<_> = files.iter().map(|(name, bytes)| (*name, Bytes::from(bytes.clone()))).collect();
    let asked = Asked::default();
    let seen = asked.clone();
    let handler = move |Path(path): Path<String>, headers: HeaderMap| async move {
        let accepted = headers.get("accept-encoding").map(|value| value.to_str().unwrap().to_owned());
        seen.lock().unwrap().push(accepted);
        // The coding is the first part of the path, if there is one.
        let (coding, name) = path.split_once('/').unwrap_or(("", &path));
        let (_, bytes) = files.iter().find(|(known, _)| *known == name).unwrap();
        answer(coding, bytes.clone())
    };
    let app = Router::new().route("/{*path}", get(handler));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    (address, asked)
}

fn answer(coding: &str, bytes: Bytes) -> Response {
    let coded =
        |coding: &'static str, bytes: Vec<u8>| ([("content-encoding", coding)], bytes).into_response();
    match coding {
        "gzip" => coded("gzip", gzip(&bytes)),
        "GZip" => coded("X-GZip", gzip(&bytes)),
        "members" => {
            let (first, second) = bytes.split_at(bytes.len() / 2);
            coded("gzip", [gzip(first), gzip(second)].concat())
        }
        "zlib" => {
            let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(&bytes).unwrap();
            coded("deflate", encoder.finish().unwrap())
        }
        "deflate" => {
            let mut encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(&bytes).unwrap();
            coded("deflate", encoder.finish().unwrap())
        }
        "identity" => coded("identity", bytes.to_vec()),
        "broken" => coded("gzip", gzip(&bytes)[..bytes.len() / 2].to_vec()),
        "lie" => coded("gzip", bytes.to_vec()),
        "br" => coded("br", bytes.to_vec()),
        "twice" => coded("gzip, gzip", gzip(&gzip(&bytes))),
        // Nothing, compressed, without an end.
        "endless" => {
            let nothing = Bytes::from(gzip(b"").repeat(1000));
            let chunks = stream::repeat(nothing).map(Ok::<_, std::io::Error>);
            ([("content-encoding", "gzip")], Body::from_stream(chunks)).into_response()
        }
        _ => bytes.into_response(),
    }
}

#[tokio::test]
async fn compressed_downloads_are_the_files_that_were_compressed() {
    let bytes = mp4();
    let (address, asked) = serve(&[("a", bytes), ("p", png())]).await;
    let loader = loader_with(MediaConfig { allow_private_addresses: true, ..MediaConfig::default() });
    let get = async |path: &str| load(&loader, VideoSource::Url(format!("http://{address}/{path}"))).await;
    let plain = get("a").await.unwrap();
    for coding in ["gzip", "GZip", "members", "zlib", "deflate", "identity"] {
        let frames = get(&format!("{coding}/a")).await.unwrap_or_else(|error| panic!("{coding}: {error}"));
        assert_eq!(frames.digest, plain.digest, "{coding}");
    }
    let pictures = ["gzip/p", "p", "zlib/p"].map(|path| format!("http://{address}/{path}"));
    let list = loader.load(VideoSource::Frames(pictures.to_vec()), FrameSampling::default()).await.unwrap();
    assert_eq!(list.info.source_frames, 3);
    for (coding, part) in
        [("broken", "damaged"), ("lie", "damaged"), ("br", "\"br\""), ("twice", "several times")]
    {
        let error = get(&format!("{coding}/a")).await.unwrap_err();
        assert!(matches!(&error, MediaError::FetchFailed(m) if m.contains(part)), "{coding}: {error:?}");
    }
    let asked = asked.lock().unwrap();
    assert!(
        asked.len() > 10 && asked.iter().all(|accepted| accepted.as_deref() == Some("identity")),
        "{asked:?}"
    );
}

#[tokio::test]
async fn the_size_limit_holds_for_what_is_inflated_and_for_the_wire() {
    let (address, _) = serve(&[("zeros", vec![0; 50 << 20]), ("p", vec![0; 30_000])]).await;
    let config =
        MediaConfig { allow_private_addresses: true, max_video_bytes: 100_000, ..MediaConfig::default() };
    let loader = loader_with(config);
    let url = |path: &str| format!("http://{address}/{path}");
    for path in ["gzip/zeros", "zlib/zeros", "deflate/zeros", "endless/zeros"] {
        let error = load(&loader, VideoSource::Url(url(path))).await.unwrap_err();
        assert!(matches!(error, MediaError::TooManyBytes { max_video_bytes: 100_000 }), "{path}: {error:?}");
    }
    // Pictures of a list share the limit, as they are and not as they were sent.
    let four = VideoSource::Frames(vec![url("gzip/p"); 4]);
    let error = loader.load(four, FrameSampling::default()).await.unwrap_err();
    assert!(matches!(error, MediaError::TooManyBytes { .. }), "{error:?}");
    let three = VideoSource::Frames(vec![url("gzip/p"); 3]);
    let error = loader.load(three, FrameSampling::default()).await.unwrap_err();
    assert!(matches!(error, MediaError::Unsupported(_)), "zeros are no picture: {error:?}");
}
