//! Times count from the file's start, as in players, and a requested rate selects by time.

use std::path::{Path, PathBuf};

use tinyllava::media::{FrameSampling, VideoFrames, VideoSource};

use crate::media_clips::{Clip, loader, numbers, remux};

fn trial(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/trials").join(name)
}

async fn load(path: &Path, sampling: FrameSampling) -> std::sync::Arc<VideoFrames> {
    let source = VideoSource::LocalFile(path.to_owned());
    let name = path.display().to_string();
    loader().load(source, sampling).await.unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[tokio::test]
async fn an_asked_rate_is_one_of_time() {
    let sampling = FrameSampling { fps: Some(1.0), ..FrameSampling::default() };
    let info = load(&trial("burst_then_still.mkv"), sampling).await.info.clone();
    let in_burst = info.sampled_timestamps.iter().filter(|&&time| time < 2.0).count();
    assert!((1..=3).contains(&in_burst), "{info:?}");
    // After the burst, each frame (one every 2 s) once.
    assert_eq!(info.num_frames, in_burst + 20, "{info:?}");
    assert!(info.sampled_timestamps.windows(2).all(|pair| pair[1] - pair[0] <= 2.05), "{info:?}");
    // The default number of frames is spread by index.
    let by_index = load(&trial("burst_then_still.mkv"), FrameSampling::default()).await.info.clone();
    assert_eq!(by_index.sampled_indices, tinyllava::media::frame_sampling::spread(info.source_frames, 16));
}

#[tokio::test]
async fn times_count_from_the_sound_where_it_begins_first() {
    let late = trial("video_starts_late.mkv");
    let all = load(&late, FrameSampling { num_frames: Some(64), ..FrameSampling::default() }).await;
    assert!((all.info.sampled_timestamps[0] - 3.0).abs() < 0.05, "{:?}", all.info);
    assert!((all.info.duration.unwrap() - 7.0).abs() < 0.05, "{:?}", all.info);
    assert_eq!(all.info.source_frames, 100);
    let from = FrameSampling { start: Some(6.5), num_frames: Some(4), ..FrameSampling::default() };
    let info = load(&late, from).await.info.clone();
    // The video starts at 3 s, at 25 frames per second.
    assert_eq!(info.sampled_indices, [88, 91, 95, 99], "{info:?}");
    assert!(info.sampled_timestamps.iter().all(|&time| (6.5..7.05).contains(&time)), "{info:?}");
}

#[tokio::test]
async fn every_container_tells_how_late_its_picture_is() {
    let directory = tempfile::tempdir().unwrap();
    let h264 = "-c:v libx264 -preset veryfast -pix_fmt yuv420p -bf 2 -g 25";
    let clip = Clip { frames: 100, ..Clip::default() }.encode(directory.path(), "silent.mp4", h264);
    let sound = "-f lavfi -i sine=duration=7 -itsoffset 3";
    let copy = "-map 1:v -map 0:a -c:v copy";
    for (name, options) in [
        ("late.mkv", format!("{copy} -c:a flac")),
        ("late.mp4", format!("{copy} -c:a aac")),
        ("late.mov", format!("{copy} -c:a pcm_s16le")),
        ("late.ts", format!("{copy} -c:a mp2")),
        ("fragmented.mp4", format!("{copy} -c:a aac -movflags frag_keyframe+delay_moov")),
        ("opus.mkv", format!("{copy} -c:a libopus")),
        (
            "late.webm",
            "-map 1:v -map 0:a -c:v libvpx-vp9 -deadline realtime -cpu-used 8 -c:a libopus -fps_mode passthrough"
                .into(),
        ),
    ] {
        let path = remux(&clip, name, sound, &options);
        let seconds = FrameSampling { fps: Some(1.0), ..FrameSampling::default() };
        let frames = load(&path, seconds).await;
        // Time bases round: a frame on the border may be one off.
        assert!((frames.info.sampled_timestamps[0] - 3.0).abs() < 0.1, "{name}: {:?}", frames.info);
        assert!((frames.info.duration.unwrap() - 7.0).abs() < 0.15, "{name}: {:?}", frames.info);
        let from = FrameSampling { start: Some(6.0), num_frames: Some(1), ..FrameSampling::default() };
        let first = numbers(&*load(&path, from).await)[0];
        assert!((72..=76).contains(&first), "{name}: frame {first} is the first from 6 s on");
    }
}

#[tokio::test]
async fn a_file_that_starts_late_as_a_whole_starts_at_zero() {
    let directory = tempfile::tempdir().unwrap();
    let h264 = "-c:v libx264 -preset veryfast -pix_fmt yuv420p -g 25";
    let clip = Clip { frames: 100, ..Clip::default() }.encode(directory.path(), "silent.mp4", h264);
    for (name, options) in [
        ("copied.mkv", "-c copy -output_ts_offset 1000"),
        ("copied.ts", "-c copy -output_ts_offset 1000"),
        ("lead_in.mkv", "-f lavfi -i sine=duration=4 -map 0:v -map 1:a -c:v copy -c:a libopus"),
    ] {
        let (inputs, outputs) = match options.split_once(" -map") {
            Some((inputs, outputs)) => (inputs.to_owned(), format!("-map{outputs}")),
            None => (String::new(), options.to_owned()),
        };
        let outputs = if inputs.is_empty() {
            outputs
        } else {
            outputs.replace("0:v", "1:v").replace("-map 1:a", "-map 0:a")
        };
        let path = remux(&clip, name, &inputs, &outputs);
        let seconds = FrameSampling { fps: Some(1.0), ..FrameSampling::default() };
        let frames = load(&path, seconds).await;
        assert_eq!(numbers(&frames), [0, 25, 50, 75], "{name}: {:?}", frames.info);
        assert!((frames.info.duration.unwrap() - 4.0).abs() < 0.1, "{name}: {:?}", frames.info);
    }
}
