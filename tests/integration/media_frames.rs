//! Sampled frames of real files are exactly the reference's frames, in every container and codec.

use std::path::Path;

use tinyllava::{
    config::{HwAccel, MediaConfig},
    media::{FrameSampling, VideoSource, frame_sampling::spread, pixels},
};

use crate::media_clips::{Clip, SIZE, loader, loader_with, numbers, remux, sample};

const H264: &str = "-c:v libx264 -preset veryfast -pix_fmt yuv420p -bf 3 -g 30";
const HEVC: &str =
    "-c:v libx265 -preset ultrafast -pix_fmt yuv420p -x265-params bframes=3:keyint=30:log-level=error";
const VP9: &str = "-c:v libvpx-vp9 -deadline realtime -cpu-used 8 -auto-alt-ref 1 -lag-in-frames 16 -g 30";
const VP8: &str = "-c:v libvpx -deadline good -cpu-used 8 -auto-alt-ref 1 -lag-in-frames 16 -b:v 500k -g 30";
const AV1: &str = "-c:v libaom-av1 -cpu-used 8 -usage realtime -pix_fmt yuv420p -g 30";
const MPEG4: &str = "-c:v mpeg4 -q:v 3 -g 12";

/// All frames, by ffmpeg with nothing said about how.
fn decoded_by_ffmpeg(path: &Path) -> Vec<u8> {
    let mut ffmpeg = std::process::Command::new("ffmpeg");
    ffmpeg.args(["-loglevel", "error", "-i"]).arg(path).args(["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]);
    ffmpeg.output().unwrap().stdout
}

/// Samples 16 frames and reads their numbers back.
async fn assert_exact(path: &Path, total: usize) {
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let frames = sample(path).await;
    assert_eq!(frames.info.source_frames, total, "{name}");
    assert_eq!(frames.info.sampled_indices, spread(total, 16), "{name}");
    assert_eq!(numbers(&frames), spread(total, 16), "{name}");
    assert!(frames.info.sampled_timestamps.is_sorted(), "{name}");
    assert_eq!(frames.rgb.len(), 16 * SIZE * SIZE * 3, "{name}");
}

async fn assert_all_exact(clips: &[(&str, String)]) {
    let directory = tempfile::tempdir().unwrap();
    for (name, options) in clips {
        let clip = Clip::default();
        assert_exact(&clip.encode(directory.path(), name, options), clip.frames).await;
    }
}

#[tokio::test]
async fn h264_and_hevc_with_b_frames_are_exact_in_every_container() {
    assert_all_exact(&[
        ("a.mp4", H264.into()),
        ("a.mov", H264.into()),
        ("a.mkv", H264.into()),
        ("a.avi", H264.into()),
        ("a.ts", H264.into()),
        ("fragmented.mp4", format!("{H264} -movflags frag_keyframe+empty_moov")),
        ("live.mkv", format!("{H264} -f matroska -live 1")),
        ("hevc.mp4", format!("{HEVC} -tag:v hvc1")),
        ("hevc.mkv", HEVC.into()),
        ("hevc.ts", HEVC.into()),
    ])
    .await;
}

#[tokio::test]
async fn open_codecs_are_exact_with_hidden_frames() {
    assert_all_exact(&[
        ("vp9.webm", VP9.into()),
        ("vp8.webm", VP8.into()),
        ("av1.webm", AV1.into()),
        ("av1.mp4", AV1.into()),
        ("vp9.mp4", VP9.into()),
    ])
    .await;
}

#[tokio::test]
async fn older_codecs_are_exact() {
    assert_all_exact(&[
        ("mpeg4.mp4", format!("{MPEG4} -bf 2")),
        ("mpeg4.avi", MPEG4.into()),
        ("mpeg4b.avi", format!("{MPEG4} -bf 2")),
        ("mjpeg.avi", "-c:v mjpeg -q:v 3 -pix_fmt yuvj420p".into()),
        ("mjpeg.mov", "-c:v mjpeg -q:v 3 -pix_fmt yuvj422p".into()),
        ("mpeg2.ts", "-c:v mpeg2video -q:v 3 -bf 2 -g 12".into()),
        ("a.gif", "-pix_fmt rgb8".into()),
    ])
    .await;
}

#[tokio::test]
async fn containers_and_codecs_of_older_devices_are_exact() {
    let in_asf = "-c:v libx264 -preset veryfast -pix_fmt yuv420p -bf 0 -f asf";
    assert_all_exact(&[
        ("mpeg1.mpg", "-c:v mpeg1video -q:v 3 -bf 2 -g 12".into()),
        ("mpeg2.mpg", "-c:v mpeg2video -q:v 3 -bf 2 -g 12".into()),
        ("mpeg2.vob", "-c:v mpeg2video -q:v 3 -bf 2 -g 12 -f vob".into()),
        ("h264.mpg", format!("{H264} -f mpeg")),
        ("mpeg1.ts", "-c:v mpeg1video -q:v 3 -g 12".into()),
        ("mpeg1.mkv", "-c:v mpeg1video -q:v 3 -bf 2 -g 12".into()),
        ("sorenson.flv", "-c:v flv -q:v 3".into()),
        ("h264.flv", H264.into()),
        ("mpeg4.3gp", MPEG4.into()),
        ("wmv1.wmv", "-c:v wmv1 -q:v 3".into()),
        ("wmv2.wmv", "-c:v wmv2 -q:v 3".into()),
        ("wmv2.avi", "-c:v wmv2 -q:v 3".into()),
        ("h264.asf", in_asf.into()),
        ("divx2.avi", "-c:v msmpeg4v2 -q:v 3".into()),
        ("divx3.avi", "-c:v msmpeg4 -q:v 3".into()),
        ("divx3.wmv", "-c:v msmpeg4 -q:v 3".into()),
        ("theora.ogv", "-c:v libtheora -q:v 9 -g 30 -pix_fmt yuv420p".into()),
        ("theora.mkv", "-c:v libtheora -q:v 9 -g 30 -pix_fmt yuv420p".into()),
        ("vp8.ogv", "-c:v libvpx -f ogg".into()),
        ("prores.mov", "-c:v prores_ks -pix_fmt yuv422p10".into()),
        ("prores4444.mkv", "-c:v prores_ks -pix_fmt yuva444p10".into()),
    ])
    .await;
    let directory = tempfile::tempdir().unwrap();
    let h263 = Clip { width: 176, height: 144, ..Clip::default() };
    assert_exact(&h263.encode(directory.path(), "h263.3gp", "-c:v h263 -q:v 3"), 97).await;
    let dnxhr = Clip { width: 256, height: 128, ..Clip::default() };
    let options = "-c:v dnxhd -profile:v dnxhr_lb -pix_fmt yuv422p";
    assert_exact(&dnxhr.encode(directory.path(), "dnxhr.mov", options), 97).await;
}

#[tokio::test]
async fn sound_subtitles_and_covers_do_not_matter() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let subtitles = write("a.srt", "1\n00:00:00,100 --> 00:00:01,000\nHello\n");
    let silent = Clip::default().encode(directory.path(), "silent.mp4", H264);
    let sound = "-f lavfi -i sine=duration=4";
    let cover = "-f lavfi -i color=size=32x32:duration=0.04";
    for (name, inputs, options) in [
        ("aac.mp4", sound.to_owned(), "-c:v copy -c:a aac -map 1:v -map 0:a"),
        ("pcm.mov", sound.into(), "-c:v copy -c:a pcm_s16le -map 0:a -map 1:v"),
        (
            "opus.webm",
            sound.into(),
            "-c:v libvpx-vp9 -cpu-used 8 -deadline realtime -c:a libopus -map 0 -map 1",
        ),
        ("mp3.avi", sound.into(), "-c:v mpeg4 -q:v 3 -c:a libmp3lame -map 0 -map 1"),
        ("mp2.ts", sound.into(), "-c:v copy -c:a mp2 -map 0 -map 1"),
        ("srt.mkv", format!("{sound} -i {subtitles}"), "-c:v copy -c:a flac -c:s srt -map 0 -map 1 -map 2"),
        ("cover.mp4", cover.into(), "-map 1:v -map 0:v -c:v:0 copy -c:v:1 png -disposition:v:1 attached_pic"),
    ] {
        assert_exact(&remux(&silent, name, &inputs, options), 97).await;
    }
}

#[tokio::test]
async fn variable_frame_rates_are_sampled_by_index() {
    let directory = tempfile::tempdir().unwrap();
    // Frames come 70, 90 or 20 ms apart.
    let irregular =
        "-vf settb=1/1000,setpts='60*N+10*mod(N,3)*mod(N,3)' -fps_mode passthrough -enc_time_base 1/1000";
    for name in ["vfr.mp4", "vfr.mkv", "vfr.ts", "vfr.mov"] {
        let path = Clip::default().encode(directory.path(), name, &format!("{irregular} {H264}"));
        assert_exact(&path, 97).await;
        let times = sample(&path).await.info.sampled_timestamps.clone();
        let expected = |index: usize| (60 * index + 10 * (index % 3).pow(2)) as f64 / 1000.0;
        for (index, time) in spread(97, 16).into_iter().zip(times) {
            assert!((time - expected(index)).abs() < 2e-3, "{name}: frame {index} at {time}");
        }
    }
}

#[tokio::test]
async fn odd_sizes_and_rates_are_exact() {
    let directory = tempfile::tempdir().unwrap();
    let clip = Clip { width: 95, height: 65, fps: "30000/1001", frames: 61 };
    for (name, options) in
        [("odd.mp4", "-c:v libx264 -preset veryfast -pix_fmt yuv444p"), ("odd.webm", VP9), ("odd.avi", MPEG4)]
    {
        let path = clip.encode(directory.path(), name, options);
        let frames = sample(&path).await;
        assert_eq!((frames.info.width, frames.info.height), (95, 65), "{name}");
        let duration = frames.info.duration.unwrap();
        assert!((duration - 61.0 * 1.001 / 30.0).abs() < 2e-3, "{name} {duration}");
        assert_exact(&path, 61).await;
    }
}

/// Writes the display matrix `[a b; c d]` into an mp4's track header.
pub fn set_display_matrix(path: &Path, [a, b, c, d]: [i32; 4]) {
    let mut file = std::fs::read(path).unwrap();
    let header = file.windows(4).position(|tag| tag == b"tkhd").unwrap();
    // Past the tag, version, times, ids, duration, layer and volume.
    let matrix = header + 4 + 40;
    for (place, value) in [(0, a), (1, b), (3, c), (4, d)] {
        file[matrix + place * 4..][..4].copy_from_slice(&(value * 65536).to_be_bytes());
    }
    std::fs::write(path, file).unwrap();
}

#[tokio::test]
async fn turned_and_mirrored_videos_look_as_in_a_player() {
    let directory = tempfile::tempdir().unwrap();
    let clip = Clip { frames: 12, ..Clip::default() };
    let path = clip.encode(directory.path(), "upright.mp4", H264);
    let all = FrameSampling { num_frames: Some(12), ..FrameSampling::default() };
    let matrices = [
        [1, 0, 0, 1],
        [0, 1, -1, 0],
        [-1, 0, 0, -1],
        [0, -1, 1, 0], // quarter turns
        [-1, 0, 0, 1],
        [1, 0, 0, -1],
        [0, 1, 1, 0],
        [0, -1, -1, 0], // the same, mirrored
    ];
    for matrix in matrices {
        set_display_matrix(&path, matrix);
        let ours = loader().source_frames(&path, all).await.unwrap();
        let sides = if matrix[0] == 0 { (64, 96) } else { (96, 64) };
        assert_eq!((ours.info.width, ours.info.height), sides, "{matrix:?}");
        assert!(ours.rgb == decoded_by_ffmpeg(&path), "{matrix:?}");
    }
}

#[tokio::test]
async fn frames_cut_by_an_edit_list_do_not_count() {
    let directory = tempfile::tempdir().unwrap();
    let whole = Clip::default().encode(directory.path(), "whole.mp4", H264);
    // Cutting at 1.5 s without encoding keeps the GOP from frame 30 on, and an edit list that starts at 1.5 s.
    let cut = remux(&whole, "cut.mp4", "-ss 1.5", "-c copy");
    let frames = sample(&cut).await;
    let read = numbers(&frames);
    let total = frames.info.source_frames;
    assert!(total < 97 - 30, "{total}");
    let first = 97 - total;
    assert_eq!(read, spread(total, 16).into_iter().map(|index| first + index).collect::<Vec<_>>());
    assert_eq!(first, 38, "the frame shown at 1.5 s is the first");
}

#[tokio::test]
async fn without_the_gpu_asked_for_the_processor_decodes() {
    let directory = tempfile::tempdir().unwrap();
    let path = Clip::default().encode(directory.path(), "a.mp4", H264);
    let loader = loader_with(MediaConfig { hwaccel: HwAccel::Cuda(99), ..MediaConfig::default() });
    assert_eq!(loader.gpu_decodes(), Some(true), "not tried yet");
    for num_frames in [16, 4] {
        let source = VideoSource::LocalFile(path.clone());
        let sampling = FrameSampling { num_frames: Some(num_frames), ..FrameSampling::default() };
        let frames = loader.load(source, sampling).await.unwrap();
        assert_eq!(numbers(&frames), frames.info.sampled_indices);
        assert_eq!(loader.gpu_decodes(), Some(false));
    }
}

#[tokio::test]
async fn short_videos_repeat_frames() {
    let directory = tempfile::tempdir().unwrap();
    for total in [1, 2, 5] {
        let clip = Clip { frames: total, ..Clip::default() };
        let path = clip.encode(directory.path(), &format!("{total}.mp4"), H264);
        assert_exact(&path, total).await;
        let asked = FrameSampling { num_frames: Some(10), ..FrameSampling::default() };
        let frames = loader().load(VideoSource::LocalFile(path), asked).await.unwrap();
        assert_eq!(numbers(&frames), (0..total).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn windows_and_rates_choose_the_frames_in_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = Clip::default().encode(directory.path(), "a.mp4", H264);
    let read = async |sampling| {
        let source = VideoSource::LocalFile(path.clone());
        numbers(&loader().load(source, sampling).await.unwrap())
    };
    let none = FrameSampling::default();
    let window = FrameSampling { num_frames: Some(5), start: Some(1.0), end: Some(2.0), ..none };
    assert_eq!(read(window).await, [25, 31, 37, 43, 49]);
    assert_eq!(read(FrameSampling { fps: Some(1.0), ..none }).await, [0, 25, 50, 75]);
    let from = FrameSampling { fps: Some(2.0), start: Some(1.01), end: Some(2.6), ..none };
    assert_eq!(read(from).await, [25, 37, 50, 62]);
    assert_eq!(read(FrameSampling { fps: Some(4.0), max_frames: Some(2), ..none }).await, [0, 93]);
}

#[tokio::test]
async fn source_frames_resized_are_the_served_frames() {
    let directory = tempfile::tempdir().unwrap();
    let path = Clip::default().encode(directory.path(), "a.mp4", H264);
    let served = sample(&path).await;
    let source = loader().source_frames(&path, FrameSampling::default()).await.unwrap();
    assert_eq!((source.info.width, source.info.height), (96, 64));
    assert_eq!(pixels::resize(&source.rgb, 64, 96, SIZE), served.rgb[..]);
    assert_eq!(source.info, served.info);
}

#[tokio::test]
async fn colours_are_those_of_a_plain_decoder() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bars.mp4");
    let status = std::process::Command::new("ffmpeg")
        .args(["-loglevel", "error", "-f", "lavfi", "-i", "testsrc2=size=128x96:rate=10", "-t", "1"])
        .args(["-c:v", "libx264", "-pix_fmt", "yuv420p"])
        .arg(&path)
        .status()
        .unwrap();
    assert!(status.success());
    let all = FrameSampling { num_frames: Some(10), ..FrameSampling::default() };
    let ours = loader().source_frames(&path, all).await.unwrap();
    assert_eq!(ours.info.sampled_indices, (0..10).collect::<Vec<_>>());
    assert!(ours.rgb == decoded_by_ffmpeg(&path), "frames differ from ffmpeg's own conversion");
}
