//! Bad videos, limits, cancelling and the frame cache: nothing hangs, nothing is left behind.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tinyllava::{
    config::MediaConfig,
    media::{Caller, FrameSampling, MediaError, VideoFrames, VideoSource, Way},
    telemetry::Stage,
};

use crate::media_clips::{Clip, loader, loader_with, numbers, remux};

const H264: &str = "-c:v libx264 -preset superfast -pix_fmt yuv420p -g 50";

async fn load_with(config: MediaConfig, path: &Path) -> Result<Arc<VideoFrames>, MediaError> {
    loader_with(config).load(VideoSource::LocalFile(path.to_owned()), FrameSampling::default()).await
}

async fn load(path: &Path) -> Result<Arc<VideoFrames>, MediaError> {
    load_with(MediaConfig::default(), path).await
}

fn write(directory: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Processes that have `path` among their arguments.
fn processes_on(path: &Path) -> usize {
    let path = path.to_str().unwrap();
    let commands = std::fs::read_dir("/proc").unwrap().flatten();
    commands
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .filter(|command| String::from_utf8_lossy(command).contains(path))
        .count()
}

/// Waits until nothing runs on `path`; fails the test if something still does after a long while.
async fn assert_no_process_stays(path: &Path) {
    for _ in 0..500 {
        if processes_on(path) == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("a decoder outlived its request");
}

/// A stand-in for ffmpeg that never ends; it keeps its arguments for `processes_on` to see.
fn stuck_tool(directory: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = write(directory, "stuck", b"#!/bin/sh\nwhile :; do sleep 0.05; done\n");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// An ffmpeg that lists packets, but never ends when it is to decode.
fn stuck_decoder(directory: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let script =
        "#!/bin/sh\ncase \"$*\" in *framecrc*) exec ffmpeg \"$@\";; esac\nwhile :; do sleep 0.05; done\n";
    let path = write(directory, "stuck-decoder", script.as_bytes());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test]
async fn what_is_no_video_is_unsupported() {
    let directory = tempfile::tempdir().unwrap();
    let mut noise = vec![0u8; 5000];
    noise.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * i * 31 % 251) as u8);
    for (name, bytes) in [
        ("noise.mp4", noise.as_slice()),
        ("empty.mp4", b""),
        ("text.mp4", b"hello"),
        ("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"),
        ("concat.txt", b"ffconcat version 1.0\nfile /etc/passwd\n"),
        ("concat.mp4", b"file '/etc/passwd'\n"),
        ("page.webm", b"<!DOCTYPE html><html></html>"),
    ] {
        let path = write(directory.path(), name, bytes);
        let error = load(&path).await.unwrap_err();
        assert!(matches!(error, MediaError::Unsupported(_)), "{name}: {error:?}");
    }
    let still = write(directory.path(), "still.mp4", b"\xff\xd8\xff\xe0\0\x10JFIF\0");
    let error = load(&still).await.unwrap_err();
    assert!(matches!(&error, MediaError::Undecodable(m) if m.contains("picture is damaged")), "{error:?}");
}

#[tokio::test]
async fn damaged_videos_are_undecodable() {
    let directory = tempfile::tempdir().unwrap();
    let mp4 = Clip::default().encode(directory.path(), "a.mp4", H264);
    let fast = remux(&mp4, "fast.mp4", "", "-c copy -movflags faststart");
    let mkv = remux(&mp4, "a.mkv", "", "-c copy");
    for path in [&mp4, &fast, &mkv] {
        let bytes = std::fs::read(path).unwrap();
        for length in [64, bytes.len() * 4 / 10, bytes.len() * 9 / 10] {
            let cut = write(directory.path(), "cut", &bytes[..length]);
            match load(&cut).await {
                Err(error) => {
                    assert!(matches!(error, MediaError::Undecodable(_)), "{path:?} at {length}: {error:?}");
                }
                Ok(frames) => {
                    let told = &frames.info;
                    assert!(path != &mp4 && length > bytes.len() / 2, "{path:?} at {length}: {told:?}");
                    assert!(told.decoded_frames < told.promised_frames, "{path:?} at {length}: {told:?}");
                }
            }
        }
    }
    for head in [&b"\x1a\x45\xdf\xa3"[..], b"RIFF\0\0\0\0AVI ", b"GIF89a", b"\0\0\0\x18ftypisom"] {
        let garbage = write(directory.path(), "garbage", &[head, &[0x5a; 3000]].concat());
        let error = load(&garbage).await.unwrap_err();
        assert!(matches!(error, MediaError::Undecodable(_)), "{head:?}: {error:?}");
    }
}

#[tokio::test]
async fn damaged_pictures_give_frames_or_an_error_but_no_hang() {
    let directory = tempfile::tempdir().unwrap();
    let path = Clip::default().encode(directory.path(), "a.ts", H264);
    let mut bytes = std::fs::read(&path).unwrap();
    for place in (3000..bytes.len()).step_by(997) {
        bytes[place] ^= 0x55;
    }
    let damaged = write(directory.path(), "damaged.ts", &bytes);
    match load(&damaged).await {
        Ok(frames) => assert_eq!(frames.info.sampled_indices.len(), 16),
        Err(error) => assert!(matches!(error, MediaError::Undecodable(_)), "{error:?}"),
    }
    assert_no_process_stays(&damaged).await;
}

#[tokio::test]
async fn other_codecs_and_streams_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let ffv1 = Clip::default().encode(directory.path(), "ffv1.mkv", "-c:v ffv1");
    let error = load(&ffv1).await.unwrap_err();
    assert!(matches!(&error, MediaError::Unsupported(message) if message.contains("ffv1")), "{error:?}");
    let sound = directory.path().join("sound.mp4");
    let status = std::process::Command::new("ffmpeg")
        .args(["-loglevel", "error", "-f", "lavfi", "-i", "sine=duration=1", "-c:a", "aac"])
        .arg(&sound)
        .status()
        .unwrap();
    assert!(status.success());
    let error = load(&sound).await.unwrap_err();
    assert!(matches!(&error, MediaError::Undecodable(m) if m.contains("no video stream")), "{error:?}");
}

#[tokio::test]
async fn limits_are_errors_that_name_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = Clip::default().encode(directory.path(), "a.mp4", H264);
    let config = MediaConfig::default;
    let cases = [
        (MediaConfig { max_frame_side: 90, ..config() }, "90"),
        (MediaConfig { max_frame_pixels: 6000, ..config() }, "6000"),
        (MediaConfig { max_video_seconds: 3.0, ..config() }, "at most 3 s"),
        (MediaConfig { max_video_packets: 50, ..config() }, "more than 50 frames"),
    ];
    for (config, part) in cases {
        let error = load_with(config, &path).await.unwrap_err();
        assert!(matches!(error, MediaError::Undecodable(_)), "{error:?}");
        assert!(error.to_string().contains(part), "{error}");
    }
    let error = load_with(MediaConfig { max_video_bytes: 1000, ..config() }, &path).await.unwrap_err();
    assert!(matches!(error, MediaError::TooManyBytes { max_video_bytes: 1000 }));
    let starved = MediaConfig { max_decoder_memory_bytes: 30 << 20, ..config() };
    assert!(load_with(starved, &path).await.is_err());
}

#[tokio::test]
async fn a_missing_ffmpeg_says_how_to_get_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = Clip::default().encode(directory.path(), "a.mp4", H264);
    let config = MediaConfig { ffmpeg_path: Some("/nowhere/ffmpeg".into()), ..MediaConfig::default() };
    let check = tinyllava::media::check_tools(&config).unwrap_err().to_string();
    let loader = loader_with(config);
    let error = loader.load(VideoSource::LocalFile(path), FrameSampling::default()).await.unwrap_err();
    assert!(matches!(error, MediaError::Internal(_)));
    for message in [check, error.to_string()] {
        assert!(
            message.contains("apt-get install ffmpeg") && message.contains("--download-ffmpeg"),
            "{message}"
        );
    }
}

#[tokio::test]
async fn the_time_limit_kills_a_stuck_decoder() {
    let directory = tempfile::tempdir().unwrap();
    let path = Clip::default().encode(directory.path(), "timeout.mp4", H264);
    // One that hangs while it lists packets, and one that hangs while it decodes.
    for stuck in [stuck_tool(directory.path()), stuck_decoder(directory.path())] {
        let config = MediaConfig {
            ffmpeg_path: Some(stuck),
            decode_timeout: Duration::from_millis(1500),
            ..MediaConfig::default()
        };
        let error = load_with(config, &path).await.unwrap_err();
        assert!(matches!(error, MediaError::DecodeTimeout { .. }), "{error:?}");
        assert_no_process_stays(&path).await;
    }
}

#[tokio::test]
async fn dropping_the_request_kills_the_decoder() {
    let directory = tempfile::tempdir().unwrap();
    let path = Clip::default().encode(directory.path(), "dropped.mp4", H264);
    let config = MediaConfig { ffmpeg_path: Some(stuck_tool(directory.path())), ..MediaConfig::default() };
    let loader = loader_with(config);
    let request = async { loader.load(VideoSource::LocalFile(path.clone()), FrameSampling::default()).await };
    let running = async {
        while processes_on(&path) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        result = request => panic!("a stuck decoder ended: {result:?}"),
        () = running => {}
    }
    assert_no_process_stays(&path).await;
}

#[tokio::test]
async fn many_dropped_requests_leave_nothing_and_block_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let path = Clip { frames: 500, ..Clip::default() }.encode(directory.path(), "many.mp4", H264);
    let loader = loader_with(MediaConfig { max_concurrent_decodes: 2, ..MediaConfig::default() });
    let requests = (0..24u64).map(|n| {
        let (loader, path) = (loader.clone(), path.clone());
        tokio::spawn(async move {
            let sampling = FrameSampling { num_frames: Some(1 + n as usize), ..FrameSampling::default() };
            let request = loader.load(VideoSource::LocalFile(path), sampling);
            drop(tokio::time::timeout(Duration::from_millis(n * 23), request).await);
        })
    });
    for request in requests.collect::<Vec<_>>() {
        request.await.unwrap();
    }
    assert_no_process_stays(&path).await;
    let frames = loader.load(VideoSource::LocalFile(path), FrameSampling::default()).await.unwrap();
    assert_eq!(numbers(&frames), frames.info.sampled_indices);
}

/// An ffmpeg that leaves a file `seen-N` for every number N of itself that it saw running.
fn counting_tool(directory: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let (path, running) = (directory.join("ffmpeg"), directory.join("running"));
    std::fs::create_dir(&running).unwrap();
    let script = format!(
        "#!/bin/sh\nmkdir {running}/$$\n: > {seen}-$(ls {running} | wc -l)\nffmpeg \"$@\"\ncode=$?\n\
         rmdir {running}/$$\nexit $code\n",
        running = running.display(),
        seen = directory.join("seen").display(),
    );
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test]
async fn passes_of_all_videos_together_keep_to_the_decoder_limit() {
    let directory = tempfile::tempdir().unwrap();
    let clip = Clip { frames: 1600, ..Clip::default() };
    let path = clip.encode(directory.path(), "long.mkv", H264);
    let loader = loader_with(MediaConfig {
        max_concurrent_decodes: 2,
        ffmpeg_path: Some(counting_tool(directory.path())),
        ..MediaConfig::default()
    });
    let few = FrameSampling { num_frames: Some(3), ..FrameSampling::default() };
    let benchmark = loader.benchmark(&path, few).await.unwrap();
    assert!(matches!(benchmark.way, Way::Seeks { passes: 2.. }), "{:?}", benchmark.way);
    let requests = (0..6).map(|n| {
        let sampling = FrameSampling { start: Some(f64::from(n) / 10.0), ..few };
        loader.load(VideoSource::LocalFile(path.clone()), sampling)
    });
    futures_util::future::try_join_all(requests).await.unwrap();
    let seen = |processes: usize| directory.path().join(format!("seen-{processes}")).exists();
    assert!(seen(1) || seen(2));
    assert!((3..30).all(|processes| !seen(processes)));
}

#[tokio::test]
async fn the_same_frames_are_decoded_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = Clip::default().encode(directory.path(), "a.mp4", H264);
    let copy = write(directory.path(), "copy.mp4", &std::fs::read(&path).unwrap());
    let loader = loader();
    let default = FrameSampling::default();
    let caller = Caller::default();
    let at_once = (0..6).map(|_| loader.load_for(VideoSource::LocalFile(path.clone()), default, &caller));
    let frames = futures_util::future::try_join_all(at_once).await.unwrap();
    let decoded = caller.trail.runs().into_iter().filter(|run| run.stage == Stage::Decode).count();
    assert_eq!(decoded, 1, "one request decodes, the others wait for it");
    assert!(frames.iter().all(|other| Arc::ptr_eq(&other.rgb, &frames[0].rgb)));
    // Another name, the same content.
    let again = loader.load(VideoSource::LocalFile(copy), default).await.unwrap();
    assert!(Arc::ptr_eq(&again.rgb, &frames[0].rgb));
    let other = FrameSampling { num_frames: Some(3), ..default };
    let other = loader.load(VideoSource::LocalFile(path), other).await.unwrap();
    assert_ne!(other.digest, again.digest);
    assert_eq!(numbers(&other), [0, 48, 96]);
}

#[tokio::test]
async fn a_dropped_request_hands_its_decode_to_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let path = Clip { frames: 1500, ..Clip::default() }.encode(directory.path(), "handed.mp4", H264);
    let loader = loader();
    let request = |loader: tinyllava::media::MediaLoader, path: PathBuf| {
        tokio::spawn(async move { loader.load(VideoSource::LocalFile(path), FrameSampling::default()).await })
    };
    let first = request(loader.clone(), path.clone());
    while processes_on(&path) == 0 && !first.is_finished() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let second = request(loader.clone(), path.clone());
    first.abort();
    let frames = second.await.unwrap().unwrap();
    assert_eq!(numbers(&frames), frames.info.sampled_indices);
}

#[tokio::test]
async fn an_ffmpeg_without_fps_mode_is_asked_in_older_words() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let old = "#!/bin/sh\nfor option in \"$@\"; do if [ \"$option\" = -fps_mode ]; then\n\
               echo \"[error] Unrecognized option 'fps_mode'.\" >&2; exit 1; fi; done\nexec ffmpeg \"$@\"\n";
    let tool = write(directory.path(), "ffmpeg", old.as_bytes());
    std::fs::set_permissions(&tool, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = Clip::default().encode(directory.path(), "a.mkv", H264);
    let loader = loader_with(MediaConfig { ffmpeg_path: Some(tool), ..MediaConfig::default() });
    for num_frames in [16, 5] {
        let sampling = FrameSampling { num_frames: Some(num_frames), ..FrameSampling::default() };
        let frames = loader.load(VideoSource::LocalFile(path.clone()), sampling).await.unwrap();
        assert_eq!(numbers(&frames), frames.info.sampled_indices);
    }
}
