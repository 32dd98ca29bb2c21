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

/// Samples at several places; how each was reached.
async fn ways_at_places(options: &str, name: &str) -> Vec<Way> {
    let directory = tempfile::tempdir().unwrap();
    let path = LONG.encode(directory.path(), name, options);
    let loader = loader();
    let mut ways = Vec::new();
    for (start, num_frames) in PLACES {
        let sampling =
            FrameSampling { num_frames: Some(num_frames), start: Some(start), ..FrameSampling::default() };
        let read = read(&loader, &path, sampling).await;
        assert_eq!(read[0], (start * 25.0_f64).ceil() as usize, "{name} at {start}");
        assert!(num_frames == 1 || read[num_frames - 1] == 1599, "{name} at {start}");
        // Fails by itself if the ways differ in a single pixel.
        ways.push(loader.benchmark(&path, sampling).await.unwrap().way);
    }
    ways
}

async fn assert_seeks(options: &str, name: &str) {
    let ways = ways_at_places(options, name).await;
    assert!(ways.iter().all(|way| matches!(way, Way::Seeks { .. })), "{name}: {ways:?}");
}

/// How many packets were fed at each place.
async fn packets_fed(options: &str, name: &str) -> Vec<usize> {
    let ways = ways_at_places(options, name).await;
    let fed = ways.iter().map(|way| match way {
        Way::NeededPackets { packets } => *packets,
        other => panic!("{name}: {other:?}"),
    });
    fed.collect()
}

const H264: &str = "-c:v libx264 -preset superfast -pix_fmt yuv420p";

#[tokio::test]
async fn h264_is_reached_by_seeking_in_indexed_containers() {
    assert_seeks(&format!("{H264} -bf 3 -g 50"), "a.mkv").await;
}

#[tokio::test]
async fn h264_in_mp4_is_decoded_without_packets_that_no_sample_needs() {
    let key = "-x264-params scenecut=0:keyint=50:min-keyint=50";
    // Of groups of 50: frames 1, 800 and 1599; 609 and 1599; 1598.
    let alone = packets_fed(&format!("{H264} -bf 0 {key}"), "p.mp4").await;
    assert_eq!(alone, [2 + 1 + 50, 10 + 50, 49]);
    for (name, options) in [
        ("b.mp4", "-bf 3"),
        ("pyramid.mov", "-bf 6 -refs 4 -x264-params b-pyramid=normal:b-adapt=2:keyint=50"),
        ("slices.mp4", "-bf 3 -slices 4"),
        ("cavlc.mp4", "-bf 2 -coder 0 -flags +bitexact"),
        ("interlaced.mp4", "-bf 2 -flags +ildct+ilme -x264-params keyint=50:tff=1"),
        ("fragmented.mp4", "-bf 3 -g 50 -movflags frag_keyframe+empty_moov"),
        ("fast.mp4", "-bf 3 -g 50 -movflags +faststart"),
    ] {
        let options = if options.contains("keyint") { options.into() } else { format!("{options} {key}") };
        let fed = packets_fed(&format!("{H264} {options}"), name).await;
        assert!(fed[2] < alone[2] * 3 / 4, "{name}: {fed:?}");
    }
}

#[tokio::test]
async fn open_gops_and_b_pyramids_are_reached_by_seeking() {
    let open = "-bf 6 -g 50 -x264-params open-gop=1:b-pyramid=normal:b-adapt=2";
    // Groups that lean on the one before are no place to begin at, whatever is left out.
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
    ways_at_places("-c:v mpeg2video -q:v 3 -bf 2 -g 12", "mpeg2.ts").await;
}

#[tokio::test]
async fn doubtful_files_are_decoded_whole_and_exact() {
    // A GIF's pictures are patches; intra refresh has keyframes that are not clean; VP8 hides frames.
    let h264 = format!("{H264} -g 50");
    for (name, options) in [
        ("a.gif", "-pix_fmt rgb8"),
        ("refresh.mp4", &format!("{h264} -x264-params intra-refresh=1")),
        (
            "vp8.webm",
            "-c:v libvpx -deadline good -cpu-used 8 -auto-alt-ref 1 -lag-in-frames 16 -b:v 300k -g 50",
        ),
        ("mpeg4b.avi", "-c:v mpeg4 -q:v 4 -bf 2 -g 48"),
    ] {
        let ways = ways_at_places(options, name).await;
        let whole = ways.iter().all(|way| matches!(way, Way::WholeFile { .. }));
        assert!(whole || !matches!(name, "a.gif" | "mpeg4b.avi"), "{name}: {ways:?}");
    }
}
