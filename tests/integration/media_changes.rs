//! Streams that change midway: another size, another pixel format, a clock that repeats or
//! restarts. Frames and times stay those of the video.

use std::path::{Path, PathBuf};

use tinyllava::media::{FrameSampling, VideoSource, Way, frame_sampling::spread};

use crate::{
    media_clips::{Clip, SIZE, loader, number_at, numbers, remux, sample},
    media_frames::set_display_matrix,
};

const H264: &str = "-c:v libx264 -preset superfast -bf 2 -g 20";
const MJPEG: &str = "-c:v mjpeg -q:v 3 -strict unofficial";
const CLIP: Clip = Clip { frames: 120, fps: "25", width: 96, height: 64 };
/// Frames of a part.
const PART: usize = 40;

/// The frames of one part, in this format and size.
fn part(directory: &Path, name: &str, part: usize, format: &str, options: &str) -> PathBuf {
    let (from, to) = (part * PART, (part + 1) * PART - 1);
    let filters = format!("select='between(n,{from},{to})',setpts=N,{format}");
    CLIP.encode(directory, name, &format!("-vf {filters} -fps_mode passthrough {options}"))
}

/// All parts one after the other in one stream, with `formats` each.
fn joined(directory: &Path, name: &str, formats: &[&str], options: &str, between: &str) -> PathBuf {
    let mut list = String::new();
    for (number, format) in formats.iter().enumerate() {
        let path = part(directory, &format!("{number}-{name}.{between}"), number, format, options);
        list += &format!("file {}\n", path.display());
    }
    let list_path = directory.join("list.txt");
    std::fs::write(&list_path, list).unwrap();
    remux(&list_path, name, "-f concat -safe 0", "-c copy")
}

/// The default sampling, and single frames that are reached by other ways, are the frames of the
/// video.
async fn assert_exact(path: &Path, total: usize) {
    let name = path.display();
    let frames = sample(path).await;
    assert_eq!(frames.info.source_frames, total, "{name}");
    assert_eq!(numbers(&frames), spread(total, 16), "{name}");
    assert_eq!((frames.info.width, frames.info.height), (96, 64), "{name}");
    assert_eq!((frames.info.promised_frames, frames.info.decoded_frames), (total, total), "{name}");
    for start in [1.0, 2.0, 3.2] {
        let sampling = FrameSampling { num_frames: Some(2), start: Some(start), ..FrameSampling::default() };
        let source = VideoSource::LocalFile(path.to_owned());
        let read = numbers(&loader().load(source, sampling).await.unwrap());
        assert_eq!(read, [(start * 25.0) as usize, total - 1], "{name} from {start} s");
        // Fails by itself if the ways differ in a single pixel.
        loader().benchmark(path, sampling).await.unwrap();
    }
}

#[tokio::test]
async fn frames_stay_the_same_when_size_or_format_change() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let sizes = ["format=yuv420p", "scale=64:96,format=yuv420p", "scale=160:128,format=yuv420p"];
    let formats = ["format=yuv420p", "format=yuv444p", "format=yuv420p10le"];
    let both = ["format=yuv420p", "scale=128:96,setsar=4/3,format=yuv422p", "format=yuv420p"];
    let jpeg = ["format=yuvj420p", "scale=64:48,format=yuvj422p", "format=yuvj444p"];
    let webm = ["null", "scale=48:96", "scale=160:64"];
    for (name, formats, options, between) in [
        ("sizes.ts", sizes, H264, "ts"),
        ("sizes.mkv", sizes, H264, "ts"),
        ("formats.ts", formats, H264, "ts"),
        ("formats.mkv", formats, H264, "ts"),
        ("both.ts", both, H264, "ts"),
        ("sizes.mp4", sizes, H264, "ts"),
        ("jpeg.avi", jpeg, MJPEG, "avi"),
        ("jpeg.mkv", jpeg, MJPEG, "mkv"),
        ("vp8.webm", webm, "-c:v libvpx -deadline realtime -cpu-used 8 -b:v 500k -g 20", "webm"),
        ("vp9.webm", webm, "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -b:v 500k -g 20", "webm"),
    ] {
        assert_exact(&joined(directory, name, &formats, options, between), 120).await;
    }
}

#[tokio::test]
async fn turned_videos_may_change_their_size() {
    let directory = tempfile::tempdir().unwrap();
    let sizes = ["scale=96:64", "scale=32:48", "scale=192:160"];
    let path = joined(directory.path(), "turned.mp4", &sizes, &format!("{H264} -pix_fmt yuv420p"), "ts");
    for (matrix, sides) in [([-1, 0, 0, -1], (96, 64)), ([0, 1, -1, 0], (64, 96))] {
        set_display_matrix(&path, matrix);
        let frames = sample(&path).await;
        assert_eq!((frames.info.width, frames.info.height), sides);
        let read: Vec<usize> = frames
            .rgb
            .chunks_exact(SIZE * SIZE * 3)
            .map(|frame| {
                let place = |x: f64, y: f64| if sides.0 == 96 { (1.0 - x, 1.0 - y) } else { (1.0 - y, x) };
                number_at(frame, SIZE, place).expect("an unreadable frame")
            })
            .collect();
        assert_eq!(read, spread(120, 16), "{matrix:?}");
    }
}

#[tokio::test]
async fn a_restarted_clock_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let options = format!("{H264} -pix_fmt yuv420p");
    for (name, offsets) in
        [("restart", ["0", "0", "0"]), ("back", ["9", "5", "5.6"]), ("jump", ["0", "3000", "9"])]
    {
        let mut bytes = Vec::new();
        for (number, offset) in offsets.iter().enumerate() {
            let options = format!("{options} -output_ts_offset {offset}");
            let path = part(directory.path(), &format!("{name}{number}.ts"), number, "null", &options);
            bytes.extend(std::fs::read(path).unwrap());
        }
        let path = directory.path().join(format!("{name}.ts"));
        std::fs::write(&path, bytes).unwrap();
        let frames = sample(&path).await;
        assert_eq!(numbers(&frames), spread(120, 16), "{name}");
        let duration = frames.info.duration.unwrap();
        assert!((duration - 4.8).abs() < 0.05, "{name} lasts {duration} s");
        for (index, time) in spread(120, 16).into_iter().zip(&frames.info.sampled_timestamps) {
            assert!((time - index as f64 / 25.0).abs() < 0.05, "{name}: frame {index} at {time} s");
        }
        let window = FrameSampling {
            num_frames: Some(3),
            start: Some(2.0),
            end: Some(2.99),
            ..FrameSampling::default()
        };
        let read = numbers(&loader().load(VideoSource::LocalFile(path), window).await.unwrap());
        assert_eq!(read, [50, 62, 74], "{name}");
    }
}

#[tokio::test]
async fn equal_times_change_no_other_time() {
    let directory = tempfile::tempdir().unwrap();
    // Frames 40 ms apart, but 30 and 31 with the time of 29; from 60 on there is one a second.
    let stamps = "setts=ts=40*(N-eq(N\\,30)-2*eq(N\\,31))+gt(N\\,60)*960*(N-60)";
    let vp8 = "-c:v libvpx -deadline realtime -cpu-used 8 -b:v 500k";
    for (name, options) in [("a.mkv", MJPEG), ("a.webm", vp8)] {
        let options = format!("-pix_fmt yuv420p -color_range pc {options}");
        let clip = Clip { frames: 90, ..CLIP }.encode(directory.path(), &format!("even-{name}"), &options);
        let path = remux(&clip, name, "", &format!("-c copy -bsf:v {stamps}"));
        let frames = sample(&path).await;
        assert_eq!(numbers(&frames), spread(90, 16), "{name}");
        let duration = frames.info.duration.unwrap();
        assert!((31.0..33.0).contains(&duration), "{name} lasts {duration} s");
        let at = async |start, end, num_frames| {
            let sampling = FrameSampling {
                num_frames: Some(num_frames),
                start: Some(start),
                end: Some(end),
                ..FrameSampling::default()
            };
            let frames = loader().load(VideoSource::LocalFile(path.clone()), sampling).await.unwrap();
            assert_eq!(numbers(&frames), frames.info.sampled_indices, "{name}");
            frames.info.clone()
        };
        let late = at(20.0, 30.0, 4).await;
        assert_eq!(late.sampled_indices, [78, 81, 84, 87], "{name}");
        assert!((late.sampled_timestamps[0] - 20.4).abs() < 0.01, "{name}: {late:?}");
        let equal = at(1.15, 1.25, 5).await;
        assert_eq!(equal.sampled_indices, [29, 30, 31], "{name}: each of equal times, in order");
    }
}

#[tokio::test]
async fn a_changed_stream_is_reached_by_seeking() {
    let directory = tempfile::tempdir().unwrap();
    let sizes = ["null", "scale=48:96", "scale=160:64"];
    let long = Clip { frames: 1200, ..CLIP };
    let options = "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -b:v 300k -g 25";
    let mut list = String::new();
    for (number, format) in sizes.iter().enumerate() {
        let (from, to) = (number * 400, number * 400 + 399);
        let filters = format!("select='between(n,{from},{to})',setpts=N,{format}");
        let options = format!("-vf {filters} -fps_mode passthrough {options}");
        let path = long.encode(directory.path(), &format!("{number}.webm"), &options);
        list += &format!("file {}\n", path.display());
    }
    let list_path = directory.path().join("list.txt");
    std::fs::write(&list_path, list).unwrap();
    let path = remux(&list_path, "long.webm", "-f concat -safe 0", "-c copy");
    let sampling =
        FrameSampling { num_frames: Some(2), start: Some(15.2), end: Some(40.0), ..FrameSampling::default() };
    let benchmark = loader().benchmark(&path, sampling).await.unwrap();
    assert!(matches!(benchmark.way, Way::Seeks { .. }), "{:?}", benchmark.way);
    let frames = loader().load(VideoSource::LocalFile(path), sampling).await.unwrap();
    assert_eq!(numbers(&frames), [380, 999]);
}
