//! The choice of the video stream, and files with other streams of any codec.

use std::path::{Path, PathBuf};

use tinyllava::{
    config::MediaConfig,
    media::{FrameSampling, MediaError, VideoSource, frame_sampling::spread},
};

use crate::media_clips::{Clip, loader, loader_with, numbers, remux, sample};

const H264: &str = "-c:v libx264 -preset veryfast -pix_fmt yuv420p -bf 2 -g 30";
const SMALL: Clip = Clip { frames: 97, fps: "25", width: 48, height: 32 };

/// Samples 16 frames of the clip of 97 that is `width` pixels wide.
async fn assert_is_the_clip(path: &Path, width: usize) -> Vec<String> {
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let frames = sample(path).await;
    assert_eq!((frames.info.source_frames, frames.info.width), (97, width), "{name}");
    assert_eq!(numbers(&frames), spread(97, 16), "{name}");
    frames.info.ignored_streams.clone()
}

async fn refusal(path: &Path) -> String {
    let source = VideoSource::LocalFile(path.to_owned());
    let error = loader().load(source, FrameSampling::default()).await.unwrap_err();
    assert!(matches!(error, MediaError::Unsupported(_)), "{error:?}");
    error.to_string()
}

fn write(directory: &Path, name: &str, text: &str) -> String {
    let path = directory.join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

#[tokio::test]
async fn sound_of_any_codec_in_any_container_does_not_matter() {
    let directory = tempfile::tempdir().unwrap();
    let silent = Clip::default().encode(directory.path(), "silent.mp4", H264);
    let cases = [
        ("truehd", "48000", "2", &["mkv", "mp4", "ts"][..]),
        ("wmav2", "48000", "2", &["mkv", "avi", "mov"]),
        ("wavpack", "48000", "2", &["mkv"]),
        ("libgsm_ms", "8000", "1", &["avi", "mkv"]),
        ("pcm_bluray", "48000", "2", &["m2ts"]),
        ("dca", "48000", "2", &["mkv", "ts", "mp4"]),
        ("adpcm_yamaha", "48000", "2", &["avi", "mov"]),
        ("libspeex", "16000", "1", &["mkv", "avi"]),
        ("tta", "48000", "2", &["mkv"]),
        ("g723_1", "8000", "1", &["avi"]),
        ("nellymoser", "8000", "1", &["mov"]),
        ("s302m", "48000", "2", &["ts"]),
        ("sonic", "48000", "2", &["mkv"]),
        ("real_144", "8000", "1", &["mkv"]),
    ];
    for (codec, rate, channels, containers) in cases {
        for container in containers {
            let options =
                format!("-c:v copy -c:a {codec} -strict -2 -ar {rate} -ac {channels} -map 0:a -map 1:v");
            let name = format!("{codec}.{container}");
            let path = remux(&silent, &name, "-f lavfi -i sine=duration=2", &options);
            assert_eq!(assert_is_the_clip(&path, 96).await, ["audio"], "{name}");
        }
    }
}

#[tokio::test]
async fn subtitles_data_fonts_and_covers_do_not_matter() {
    let directory = tempfile::tempdir().unwrap();
    let subtitles = write(directory.path(), "a.srt", "1\n00:00:00,100 --> 00:00:01,000\nHello\n");
    let font = write(directory.path(), "a.ttf", "no font at all");
    let silent = Clip::default().encode(directory.path(), "silent.mp4", H264);
    let cover = "-f lavfi -i color=size=32x32:duration=0.04";
    let in_front = "-map 0:v -map 1:v -c:v:1 copy -disposition:v:0 attached_pic";
    for (name, inputs, options, ignored) in [
        ("ass.mkv", format!("-i {subtitles}"), "-map 0 -map 1 -c:v copy -c:s ass".into(), "subtitle"),
        ("text.mp4", format!("-i {subtitles}"), "-map 0 -map 1 -c:v copy -c:s mov_text".into(), "subtitle"),
        (
            "font.mkv",
            String::new(),
            format!("-map 0 -c copy -attach {font} -metadata:s:t mimetype=application/x-truetype-font"),
            "attachment",
        ),
        ("timecode.mov", String::new(), "-map 0 -c copy -timecode 01:00:00:00".into(), "data"),
        ("png.mp4", cover.into(), format!("{in_front} -c:v:0 png"), "picture"),
        ("jpeg.mp4", cover.into(), format!("{in_front} -c:v:0 mjpeg -pix_fmt:v:0 yuvj420p"), "picture"),
        ("bmp.mp4", cover.into(), format!("{in_front} -c:v:0 bmp"), "picture"),
    ] {
        let path = remux(&silent, name, &inputs, &options);
        assert_eq!(assert_is_the_clip(&path, 96).await, [ignored], "{name}");
    }
}

/// Replaces all occurrences of `from` by `to` of the same length.
fn replace_all(path: &Path, from: &[u8], to: &[u8]) {
    let mut bytes = std::fs::read(path).unwrap();
    let places: Vec<usize> =
        (0..bytes.len() - from.len()).filter(|&at| bytes[at..].starts_with(from)).collect();
    assert!(!places.is_empty());
    for place in places {
        bytes[place..place + to.len()].copy_from_slice(to);
    }
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn sound_of_a_codec_that_nobody_knows_does_not_matter() {
    let directory = tempfile::tempdir().unwrap();
    let silent = Clip::default().encode(directory.path(), "silent.mp4", H264);
    let sound = "-f lavfi -i sine=duration=2";
    let mkv = remux(&silent, "a.mkv", sound, "-c:v copy -c:a flac -map 0 -map 1");
    replace_all(&mkv, b"A_FLAC", b"A_NEW0");
    let mp4 = remux(&silent, "a.mp4", sound, "-c:v copy -c:a aac -map 0 -map 1");
    replace_all(&mp4, b"mp4a", b"zzzz");
    for path in [mkv, mp4] {
        assert_eq!(assert_is_the_clip(&path, 96).await, ["audio"]);
    }
}

/// Replaces the descriptor `BSSD` of the sound in a transport stream's program map by descriptor
/// `tag`.
fn set_descriptor(path: &Path, tag: u8) {
    let mut bytes = std::fs::read(path).unwrap();
    let mut changed = 0;
    for packet in bytes.chunks_exact_mut(188) {
        // Packet id 0x1000: header, pointer, section. The section's last four bytes are its CRC.
        if packet[1] & 0x5f != 0x50 || packet[2] != 0 {
            continue;
        }
        let section = &mut packet[5..];
        let end = 3 + ((usize::from(section[1] & 15) << 8) | usize::from(section[2])) - 4;
        let at = section[..end].windows(6).position(|word| word == b"\x05\x04BSSD").unwrap();
        section[at] = tag;
        let crc = section[..end].iter().fold(u32::MAX, |crc, &byte| {
            (0..8).fold(crc ^ (u32::from(byte) << 24), |crc, _| (crc << 1) ^ ((crc >> 31) * 0x04c1_1db7))
        });
        section[end..end + 4].copy_from_slice(&crc.to_be_bytes());
        changed += 1;
    }
    assert!(changed > 0);
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn subtitles_of_television_do_not_matter() {
    let directory = tempfile::tempdir().unwrap();
    let silent = Clip::default().encode(directory.path(), "silent.mp4", H264);
    // Teletext and DVB subtitles, which ffmpeg cannot make of text.
    for tag in [0x56, 0x59] {
        let name = format!("{tag}.ts");
        let sound = "-c:v copy -c:a s302m -ac 2 -strict -2 -ar 48000 -map 1 -map 0";
        let path = remux(&silent, &name, "-f lavfi -i sine=duration=2", sound);
        set_descriptor(&path, tag);
        assert_eq!(assert_is_the_clip(&path, 96).await, ["subtitle"], "{name}");
    }
}

#[tokio::test]
async fn streams_that_are_ignored_are_told_each_kind_once() {
    let directory = tempfile::tempdir().unwrap();
    let silent = Clip::default().encode(directory.path(), "silent.mp4", H264);
    assert_eq!(sample(&silent).await.info.ignored_streams, [""; 0]);
    let subtitles = write(directory.path(), "a.srt", "1\n00:00:00,100 --> 00:00:01,000\nHello\n");
    let inputs = format!("-f lavfi -i sine=duration=2 -i {subtitles}");
    let options = "-map 0 -map 0 -map 1 -map 2 -c:a flac -c:s srt -c:v copy";
    let path = remux(&silent, "many.mkv", &inputs, options);
    assert_eq!(assert_is_the_clip(&path, 96).await, ["audio", "subtitle"]);
}

#[tokio::test]
async fn the_videos_own_codec_must_be_accepted_and_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let line = "ffmpeg -i input -c:v libx264 -pix_fmt yuv420p output.mp4";
    for (name, options, codec) in [
        ("a.mkv", "-c:v ffv1", "ffv1"),
        ("a.avi", "-c:v huffyuv", "huffyuv"),
        ("raw.avi", "-c:v rawvideo -pix_fmt bgr24", "rawvideo"),
        ("a.mov", "-c:v qtrle", "qtrle"),
        ("cinepak.avi", "-c:v cinepak -vf scale=96:64", "cinepak"),
        ("png.mov", "-c:v png", "png"),
    ] {
        let message = refusal(&Clip::default().encode(directory.path(), name, options)).await;
        assert!(message.contains(&format!("codec {codec} ")) && message.contains(line), "{message}");
    }
    let unknown = Clip::default().encode(directory.path(), "b.avi", "-c:v mpeg4");
    replace_all(&unknown, b"FMP4", b"ZZZZ");
    let message = refusal(&unknown).await;
    assert!(message.contains("codec \"ZZZZ\" ") && message.contains(line), "{message}");
}

/// A file of two videos: the first is the small one.
struct Renditions<'a> {
    name: &'a str,
    small: &'a Path,
    large: &'a Path,
    options: &'a str,
}

impl Renditions<'_> {
    fn make(&self) -> PathBuf {
        let inputs = format!("-i {}", self.small.display());
        remux(self.large, self.name, &inputs, &format!("-map 0:v -map 1:v -c copy {}", self.options))
    }
}

#[tokio::test]
async fn of_several_videos_the_default_or_best_one_is_taken() {
    let directory = tempfile::tempdir().unwrap();
    let large = Clip::default().encode(directory.path(), "large.mp4", H264);
    let small = SMALL.encode(directory.path(), "small.mp4", H264);
    let preview = Clip { frames: 1, ..SMALL };
    let preview = preview.encode(directory.path(), "preview.mp4", "-c:v mjpeg -q:v 2 -pix_fmt yuvj420p");
    let default = |stream: usize| format!("-disposition:v:{stream} default -disposition:v:{} 0", 1 - stream);
    for (name, first, options, width) in [
        ("renditions.mp4", &small, String::new(), 96),
        ("renditions.mov", &small, String::new(), 96),
        ("renditions.ts", &small, String::new(), 96),
        ("default_first.mkv", &small, default(0), 48),
        ("default_last.mkv", &small, default(1), 96),
        ("still_first.mp4", &preview, String::new(), 96),
        ("still_first.mkv", &preview, default(1), 96),
        ("still_first.avi", &preview, String::new(), 96),
    ] {
        let path = Renditions { name, small: first, large: &large, options: &options }.make();
        assert_eq!(assert_is_the_clip(&path, width).await, ["video"], "{name}");
    }
}

#[tokio::test]
async fn of_several_programs_the_better_one_is_taken() {
    let directory = tempfile::tempdir().unwrap();
    let large = Clip::default().encode(directory.path(), "large.mp4", H264);
    let small = SMALL.encode(directory.path(), "small.mp4", H264);
    let options = "-program title=one:st=0 -program title=two:st=1";
    let path = Renditions { name: "programs.ts", small: &small, large: &large, options }.make();
    assert_is_the_clip(&path, 96).await;
}

#[tokio::test]
async fn packets_of_the_chosen_video_are_fed_and_no_others() {
    let directory = tempfile::tempdir().unwrap();
    let long = Clip { frames: 1600, ..Clip::default() };
    let long_gops = "-c:v libx264 -preset superfast -pix_fmt yuv420p -bf 3 -g 50";
    let large = long.encode(directory.path(), "large.mp4", long_gops);
    let small = Clip { frames: 1600, ..SMALL }.encode(directory.path(), "small.mp4", long_gops);
    for name in ["two.mp4", "two.mkv"] {
        let default = "-disposition:v:0 0 -disposition:v:1 default";
        let path = Renditions { name, small: &small, large: &large, options: default }.make();
        let sampling = FrameSampling { num_frames: Some(3), ..FrameSampling::default() };
        let frames = loader().load(VideoSource::LocalFile(path.clone()), sampling).await.unwrap();
        assert_eq!((frames.info.width, numbers(&frames)), (96, vec![0, 799, 1599]), "{name}");
        // Fails by itself if the ways differ in a single pixel.
        let way = loader().benchmark(&path, sampling).await.unwrap().way;
        assert!(!matches!(way, tinyllava::media::Way::WholeFile { .. }), "{name}: {way:?}");
    }
}

/// Sets the length in an MP4's headers to the largest number, as cameras do that were switched off.
fn claim_unknown_length(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    for (tag, offset) in [(b"mvhd", 4 + 16), (b"tkhd", 4 + 20), (b"mdhd", 4 + 16)] {
        let at = bytes.windows(4).position(|word| word == tag).unwrap() + offset;
        bytes[at..at + 4].fill(0xff);
    }
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn the_length_that_a_container_claims_is_no_limit_and_no_answer() {
    let directory = tempfile::tempdir().unwrap();
    let mp4 = |name: &str, options: &str| {
        let path = Clip::default().encode(directory.path(), name, &format!("{H264} {options}"));
        claim_unknown_length(&path);
        path
    };
    let (mp4, no_b_frames) = (mp4("a.mp4", "-use_editlist 0"), mp4("b.mp4", "-bf 0"));
    let webm = Clip::default().encode(directory.path(), "a.mkv", H264);
    // Duration, eight bytes: a float of 4e10 ms.
    let mut bytes = std::fs::read(&webm).unwrap();
    let at = bytes.windows(3).position(|word| word == b"\x44\x89\x88").unwrap();
    bytes[at + 3..at + 11].copy_from_slice(&4e10_f64.to_be_bytes());
    std::fs::write(&webm, bytes).unwrap();
    for path in [mp4, no_b_frames, webm] {
        assert_is_the_clip(&path, 96).await;
        let duration = sample(&path).await.info.duration.unwrap();
        assert!((duration - 97.0 / 25.0).abs() < 0.05, "{path:?}: {duration}");
        let short = loader_with(MediaConfig { max_video_seconds: 3.0, ..MediaConfig::default() });
        let error = short.load(VideoSource::LocalFile(path), FrameSampling::default()).await.unwrap_err();
        assert!(error.to_string().contains("lasts 4 s; at most 3 s"), "{error}");
    }
}

#[tokio::test]
async fn a_recording_that_begins_midway_in_a_packet_is_a_video() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["a.ts", "a.m2ts"] {
        let whole = Clip::default().encode(directory.path(), name, &format!("{H264} -f mpegts"));
        let bytes = std::fs::read(&whole).unwrap();
        for start in [1, 77, 187, 191, 188 * 9 + 100] {
            let cut = directory.path().join(format!("{start}-{name}"));
            std::fs::write(&cut, &bytes[start..]).unwrap();
            let frames = sample(&cut).await;
            let read = numbers(&frames);
            let first = read[0];
            let total = 97 - first;
            assert_eq!(frames.info.source_frames, total, "{name} from {start}");
            let expected: Vec<usize> = spread(total, 16).into_iter().map(|index| first + index).collect();
            assert_eq!(read, expected, "{name} from {start}");
        }
    }
}
