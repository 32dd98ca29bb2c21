//! Where videos may come from: URLs, directories, bodies, and what is refused on the way.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    http::StatusCode,
    response::{IntoResponse, Redirect},
    routing::get,
};
use base64::Engine;
use futures_util::StreamExt;
use tinyllava::{
    config::MediaConfig,
    media::{FrameSampling, MediaError, VideoFrames, VideoSource},
};

use crate::media_clips::{Clip, loader_with, numbers};

fn clip(directory: &Path) -> Vec<u8> {
    let options = "-c:v libx264 -preset superfast -pix_fmt yuv420p";
    std::fs::read(Clip::default().encode(directory, "clip.mp4", options)).unwrap()
}

async fn load(config: &MediaConfig, source: VideoSource) -> Result<Arc<VideoFrames>, MediaError> {
    loader_with(config.clone()).load(source, FrameSampling::default()).await
}

async fn load_url(config: &MediaConfig, url: impl Into<String>) -> Result<Arc<VideoFrames>, MediaError> {
    load(config, VideoSource::Url(url.into())).await
}

fn assert_refused(result: Result<Arc<VideoFrames>, MediaError>, part: &str) {
    match result {
        Err(MediaError::Refused { param: "video_url", message }) => {
            assert!(message.contains(part), "{message}");
        }
        other => panic!("not refused: {other:?}"),
    }
}

/// Serves `clip` under /clip, and what a hostile server would do elsewhere.
async fn serve(clip: Vec<u8>) -> SocketAddr {
    let clip = Bytes::from(clip);
    let endless = || {
        let chunk = futures_util::stream::repeat(Bytes::from(vec![0u8; 10_000]));
        Body::from_stream(chunk.map(Ok::<_, std::io::Error>))
    };
    let broken = || {
        let pieces = [Ok(Bytes::from("half")), Err(std::io::Error::other("gone"))];
        Body::from_stream(futures_util::stream::iter(pieces))
    };
    let slow = || async {
        tokio::time::sleep(Duration::from_secs(30)).await;
        "late"
    };
    let app = Router::new()
        .route("/clip", get(move || async move { clip }))
        .route("/endless", get(move || async move { endless() }))
        .route("/broken", get(move || async move { broken() }))
        .route("/slow", get(slow))
        .route("/redirect", get(|| async { Redirect::temporary("/clip") }))
        .route("/loop", get(|| async { Redirect::temporary("/loop") }))
        .route("/to-file", get(|| async { Redirect::temporary("file:///etc/passwd") }))
        .route("/nowhere", get(|| async { StatusCode::FOUND.into_response() }))
        .route("/missing", get(|| async { StatusCode::NOT_FOUND }));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    address
}

fn open_network() -> MediaConfig {
    MediaConfig { allow_private_addresses: true, ..MediaConfig::default() }
}

#[tokio::test]
async fn every_way_to_send_a_video_gives_the_same_frames() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = clip(directory.path());
    let address = serve(bytes.clone()).await;
    let path = directory.path().join("clip.mp4");
    let text = base64::engine::general_purpose::STANDARD.encode(&bytes);
    let upload = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(upload.path(), &bytes).unwrap();
    let upload_path = upload.path().to_owned();
    let config = MediaConfig { allowed_media_dir: Some(directory.path().into()), ..open_network() };
    let sources = [
        VideoSource::LocalFile(path.clone()),
        VideoSource::Url(format!("http://{address}/clip")),
        VideoSource::Url(format!("http://localhost:{}/redirect", address.port())),
        VideoSource::Url(format!("file://{}", path.display())),
        VideoSource::Url(format!("data:video/mp4;base64,{text}")),
        VideoSource::Bytes(bytes.into()),
        VideoSource::TempFile(upload),
    ];
    let mut digests = std::collections::HashSet::new();
    for source in sources {
        let name = format!("{source:.80?}");
        let frames = load(&config, source).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(numbers(&frames), frames.info.sampled_indices, "{name}");
        digests.insert(frames.digest);
    }
    assert_eq!(digests.len(), 1);
    assert!(!upload_path.exists(), "an upload goes with its request");
}

#[tokio::test]
async fn private_addresses_are_refused_however_they_are_written() {
    let config = MediaConfig::default();
    let port = serve(Vec::new()).await.port();
    for host in [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0x7f.1",
        "2130706433",
        "0",
        "10.0.0.1",
        "169.254.169.254",
        "[64:ff9b::7f00:1]",
        "[fd00:ec2::254]",
    ] {
        assert_refused(load_url(&config, format!("http://{host}:{port}/clip")).await, "not public");
    }
}

#[tokio::test]
async fn redirects_are_checked_like_urls() {
    let config = open_network();
    let address = serve(Vec::new()).await;
    let to_file = load_url(&config, format!("http://{address}/to-file")).await;
    assert_refused(to_file, "other than http");
    for (path, part) in [("loop", "redirects more than 3 times"), ("nowhere", "redirects to nowhere")] {
        let error = load_url(&config, format!("http://{address}/{path}")).await.unwrap_err();
        assert!(matches!(&error, MediaError::FetchFailed(m) if m.contains(part)), "{error:?}");
    }
}

#[tokio::test]
async fn urls_outside_the_policy_are_refused() {
    let address = serve(Vec::new()).await;
    let config = open_network();
    assert_refused(load_url(&config, format!("http://me:secret@{address}/clip")).await, "password");
    let long = format!("http://{address}/{}", "a".repeat(9000));
    assert_refused(load_url(&config, long).await, "too long");
    let closed = MediaConfig { allow_remote_urls: false, ..open_network() };
    assert_refused(load_url(&closed, format!("http://{address}/clip")).await, "does not fetch");
    for url in ["ftp://example.org/a", "gopher://example.org/", "concat:/etc/passwd", "pipe:0"] {
        assert_refused(load_url(&config, url).await, "are not read");
    }
}

#[tokio::test]
async fn the_size_limit_holds_while_streaming() {
    let address = serve(vec![0; 50_000]).await;
    let config = MediaConfig { max_video_bytes: 40_000, ..open_network() };
    for path in ["clip", "endless"] {
        let error = load_url(&config, format!("http://{address}/{path}")).await.unwrap_err();
        assert!(matches!(error, MediaError::TooManyBytes { max_video_bytes: 40_000 }), "{path}: {error:?}");
    }
}

#[tokio::test]
async fn downloads_wait_for_their_place_and_dropped_ones_give_it_back() {
    let directory = tempfile::tempdir().unwrap();
    let address = serve(clip(directory.path())).await;
    let loader = loader_with(MediaConfig { max_concurrent_fetches: 1, ..open_network() });
    let request = |path: &str| {
        let url = VideoSource::Url(format!("http://{address}/{path}"));
        loader.load(url, FrameSampling::default())
    };
    let (mut first, mut second) = (Box::pin(request("slow")), Box::pin(request("clip")));
    assert!(futures_util::poll!(&mut first).is_pending());
    let both = async { tokio::join!(&mut first, &mut second) };
    let waited = tokio::time::timeout(Duration::from_millis(300), both).await;
    assert!(waited.is_err(), "the slow download holds the only place");
    assert!(futures_util::poll!(&mut second).is_pending());
    drop(first);
    assert_eq!(second.await.unwrap().info.source_frames, 97);
    assert!(request("clip").await.is_ok(), "a decoded video gives its place back");
}

#[tokio::test]
async fn failing_servers_are_fetch_errors() {
    let address = serve(Vec::new()).await;
    let config = MediaConfig { fetch_timeout: Duration::from_millis(500), ..open_network() };
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for (url, part) in [
        (format!("http://{address}/missing"), "404"),
        (format!("http://{address}/broken"), "broke off"),
        (format!("http://{address}/slow"), "longer than"),
        (format!("http://{closed}/clip"), "could not be reached"),
        ("http://name.invalid/clip".into(), "could not be reached"),
    ] {
        let error = load_url(&config, url).await.unwrap_err();
        assert!(matches!(&error, MediaError::FetchFailed(m) if m.contains(part)), "{error:?}");
    }
}

#[tokio::test]
async fn file_urls_stay_inside_the_allowed_directory() {
    let outside = tempfile::tempdir().unwrap();
    clip(outside.path());
    let allowed = tempfile::tempdir().unwrap();
    clip(allowed.path());
    std::os::unix::fs::symlink(outside.path().join("clip.mp4"), allowed.path().join("link.mp4")).unwrap();
    std::os::unix::fs::symlink(outside.path(), allowed.path().join("folder")).unwrap();
    std::os::unix::fs::symlink(allowed.path().join("clip.mp4"), allowed.path().join("inner.mp4")).unwrap();
    let config = MediaConfig { allowed_media_dir: Some(allowed.path().into()), ..MediaConfig::default() };
    let inside = allowed.path().display();
    let elsewhere = outside.path().display();
    for path in ["clip.mp4", "inner.mp4", "./clip.mp4"] {
        assert!(load_url(&config, format!("file://{inside}/{path}")).await.is_ok(), "{path}");
    }
    let name = outside.path().file_name().unwrap().to_str().unwrap();
    for url in [
        format!("file://{inside}/link.mp4"),
        format!("file://{inside}/folder/clip.mp4"),
        format!("file://{inside}/../{name}/clip.mp4"),
        format!("file://{inside}/%2e%2e/{name}/clip.mp4"),
        format!("file://{inside}/missing.mp4"),
        format!("file://{inside}"),
        format!("file://{elsewhere}/clip.mp4"),
        format!("file://example.org{inside}/clip.mp4"),
        "file:///etc/passwd".into(),
        "file:///dev/zero".into(),
    ] {
        assert_refused(load_url(&config, url).await, "inside the allowed media directory");
    }
    let none = MediaConfig::default();
    assert_refused(load_url(&none, format!("file://{inside}/clip.mp4")).await, "not read by this server");
}
