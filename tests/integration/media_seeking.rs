//! On long videos only the parts around the samples are decoded, and the frames are those of a full decode.

use std::path::Path;

use tinyllava::media::{FrameSampling, MediaLoader, VideoSource, Way};

use crate::media_clips::{Clip, loader, numbers};

/// 64 s of small frames.
const LONG: Clip = Clip { frames: 1600, fps: "25", width: 96, height: 64 };
/// What requests of few frames ask for at several places: (start, number of frames).
const PLACES: [(f64, usize); 3] = [(0.04, 3), (24.33, 2), (63.9, 1)];

async fn read(loader: &MediaLoader, path: &Path, sampling: FrameSampling) -> Vec<usize> {
    let frames = loader.load(VideoSource::LocalFile(path.to_owned()), sampling).await.unwrap();
    assert_eq!(numbers(&frames), frames.info.sampled_indices, "{}", path.display());
    numbers(&frames)
}

/// Samples at several places; true for each that was reached by seeking.
async fn seeks_at_places(options: &str, name: &str) -> Vec<bool> {
    let directory = tempfile::tempdir().unwrap();
    let path = LONG.encode(directory.path(), name, options);
    let loader = loader();
    let mut seeks = Vec::new();
    for (start, num_frames) in PLACES {
        let sampling =
            FrameSampling { num_frames: Some(num_frames), start: Some(start), ..FrameSampling::default() };
        let read = read(&loader, &path, sampling).await;
        assert_eq!(read[0], (start * 25.0_f64).ceil() as usize, "{name} at {start}");
        assert!(num_frames == 1 || read[num_frames - 1] == 1599, "{name} at {start}");
        // Fails by itself if the ways differ in a single pixel.
        let benchmark = loader.benchmark(&path, sampling).await.unwrap();
        seeks.push(matches!(benchmark.way, Way::Seeks { .. }));
    }
    seeks
}

async fn assert_seeks(options: &str, name: &str) {
    assert_eq!(seeks_at_places(options, name).await, [true; 3], "{name}");
}

const H264: &str = "-c:v libx264 -preset superfast -pix_fmt yuv420p";

#[tokio::test]
async fn h264_is_reached_by_seeking_in_indexed_containers() {
    for name in ["a.mp4", "a.mkv"] {
        assert_seeks(&format!("{H264} -bf 3 -g 50"), name).await;
    }
}

#[tokio::test]
async fn open_gops_and_b_pyramids_are_reached_by_seeking() {
    let open = "-bf 6 -g 50 -x264-params open-gop=1:b-pyramid=normal:b-adapt=2";
    for name in ["open.mp4", "open.mkv"] {
        assert_seeks(&format!("{H264} {open}"), name).await;
    }
    let hevc = "-c:v libx265 -preset ultrafast -pix_fmt yuv420p";
    for name in ["hevc.mp4", "hevc.mkv"] {
        let options = "-x265-params open-gop=1:bframes=4:b-pyramid=1:keyint=50:log-level=error";
        assert_seeks(&format!("{hevc} {options}"), name).await;
    }
}

#[tokio::test]
async fn other_codecs_are_reached_by_seeking() {
    assert_seeks("-c:v mpeg4 -q:v 4 -bf 2 -g 48", "mpeg4.mp4").await;
    assert_seeks("-c:v mpeg4 -q:v 4 -g 48", "mpeg4.avi").await;
    assert_seeks("-c:v mjpeg -q:v 4 -pix_fmt yuvj420p", "mjpeg.mov").await;
    assert_seeks("-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -g 50", "vp9.webm").await;
    assert_seeks("-c:v libaom-av1 -cpu-used 8 -usage realtime -pix_fmt yuv420p -g 50", "av1.mp4").await;
}

#[tokio::test]
async fn transport_streams_are_exact() {
    assert_seeks(&format!("{H264} -bf 3 -g 50"), "a.ts").await;
    seeks_at_places("-c:v mpeg2video -q:v 3 -bf 2 -g 12", "mpeg2.ts").await;
}

#[tokio::test]
async fn doubtful_files_are_decoded_whole_and_exact() {
    // A GIF's pictures are patches; intra refresh has keyframes that are not clean; fragments without an index
    // cannot be sought; VP8 hides frames.
    let h264 = format!("{H264} -g 50");
    for (name, options) in [
        ("a.gif", "-pix_fmt rgb8"),
        ("refresh.mp4", &format!("{h264} -x264-params intra-refresh=1")),
        ("fragmented.mp4", &format!("{h264} -movflags frag_keyframe+empty_moov")),
        (
            "vp8.webm",
            "-c:v libvpx -deadline good -cpu-used 8 -auto-alt-ref 1 -lag-in-frames 16 -b:v 300k -g 50",
        ),
        ("mpeg4b.avi", "-c:v mpeg4 -q:v 4 -bf 2 -g 48"),
    ] {
        let seeks = seeks_at_places(options, name).await;
        assert!(!matches!(name, "a.gif" | "mpeg4b.avi") || seeks == [false; 3], "{name}");
    }
}
