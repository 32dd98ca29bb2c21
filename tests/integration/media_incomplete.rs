//! Videos of which a part is missing or cannot be decoded: refused below the stated share, above it
//! the reply states the loss.

use std::path::{Path, PathBuf};

use base64::{Engine, engine::general_purpose::STANDARD};
use tinyllava::{
    config::MediaConfig,
    media::{FrameSampling, MediaError, VideoInfo, VideoSource, frame_sampling::spread},
};

use crate::media_clips::{Clip, loader, loader_with, numbers, remux};

const H264: &str = "-c:v libx264 -preset superfast -pix_fmt yuv420p -bf 2 -g 20";
const CLIP: Clip = Clip { frames: 200, fps: "25", width: 96, height: 64 };
const FEW: FrameSampling =
    FrameSampling { num_frames: Some(3), fps: None, max_frames: None, start: None, end: Some(0.5) };

fn write(directory: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Samples; frames that come are those that the reply names. At the end of what is there, some may
/// miss between others.
async fn load(path: &Path, sampling: FrameSampling) -> Result<VideoInfo, MediaError> {
    let frames = loader().load(VideoSource::LocalFile(path.to_owned()), sampling).await?;
    let (read, info) = (numbers(&frames), frames.info.clone());
    let slack = if info.decoded_share < 1.0 { 3 } else { 0 };
    for (number, index) in read.iter().zip(&info.sampled_indices) {
        assert!(number.abs_diff(*index) <= slack, "{}: {read:?}, {info:?}", path.display());
    }
    assert!(read.is_sorted() && read.len() == info.num_frames);
    Ok(info)
}

async fn assert_refused(path: &Path, what: &str) {
    for sampling in [FrameSampling::default(), FEW] {
        let error = load(path, sampling).await.expect_err(what);
        assert!(matches!(error, MediaError::Undecodable(_)), "{what}: {error:?}");
        assert!(
            error.to_string().contains("of the video can be decoded; send the whole video"),
            "{what}: {error}"
        );
    }
}

/// (name, bytes) of the clip in containers that can be read from their beginning.
fn containers(directory: &Path) -> Vec<(&'static str, Vec<u8>)> {
    let vp8 = "-c:v libvpx -deadline realtime -cpu-used 8 -b:v 500k -g 20";
    let clips = [
        ("fast.mp4", format!("{H264} -movflags +faststart")),
        ("fast.mov", format!("{H264} -movflags +faststart")),
        ("a.mkv", H264.into()),
        ("a.webm", vp8.into()),
        ("mpeg4.avi", "-c:v mpeg4 -q:v 3 -g 20".into()),
        ("jpeg.avi", "-c:v mjpeg -q:v 3 -pix_fmt yuvj420p".into()),
        ("fragmented.mp4", format!("{H264} -movflags frag_keyframe+empty_moov")),
        ("a.ts", H264.into()),
    ];
    let read = |(name, options): (&'static str, String)| {
        // Noise makes frames larger than what containers write about them.
        let options = format!("-vf noise=alls=12:allf=t {options}");
        (name, std::fs::read(CLIP.encode(directory, name, &options)).unwrap())
    };
    clips.into_iter().map(read).collect()
}

#[tokio::test]
async fn a_part_of_a_download_is_refused_or_its_loss_is_told() {
    let directory = tempfile::tempdir().unwrap();
    for (name, bytes) in containers(directory.path()) {
        for (percent, reserved) in [(85, false), (30, false), (85, true), (10, true)] {
            let mut part = bytes[..bytes.len() * percent / 100].to_vec();
            if reserved {
                part.resize(bytes.len(), 0);
            } else if matches!(name, "a.ts" | "fragmented.mp4") {
                // Nothing in the file says that there was more.
                continue;
            }
            let path = write(directory.path(), &format!("part-{name}"), &part);
            let what = format!("{percent} % of {name}, reserved: {reserved}");
            if percent < 50 {
                assert_refused(&path, &what).await;
                continue;
            }
            let told = load(&path, FrameSampling::default()).await.unwrap_or_else(|e| panic!("{what}: {e}"));
            assert!((170..=230).contains(&told.promised_frames), "{what}: {told:?}");
            assert!((110..=190).contains(&told.decoded_frames), "{what}: {told:?}");
            assert_eq!(
                told.decoded_share,
                told.decoded_frames as f64 / told.promised_frames as f64,
                "{what}"
            );
            assert!(told.decoded_share < 0.95, "{what}: {told:?}");
            assert_eq!(told.sampled_indices, spread(told.source_frames, 16), "{what}");
            let few = load(&path, FEW).await.unwrap();
            assert!(few.promised_frames > few.decoded_frames, "{what}: a fast way hides no loss: {few:?}");
        }
        let whole = load(&write(directory.path(), name, &bytes), FrameSampling::default()).await.unwrap();
        assert_eq!(
            (whole.promised_frames, whole.decoded_frames, whole.decoded_share),
            (200, 200, 1.0),
            "{name}"
        );
    }
}

#[tokio::test]
async fn holes_before_the_index_count_as_missing() {
    let directory = tempfile::tempdir().unwrap();
    let path = CLIP.encode(directory.path(), "slow.mp4", H264);
    let whole = std::fs::read(path).unwrap();
    let index = whole.windows(4).position(|tag| tag == b"moov").unwrap() - 4;
    let hole = |from: usize| {
        let mut bytes = whole.clone();
        bytes[from..index].fill(0);
        write(directory.path(), &format!("{from}.mp4"), &bytes)
    };
    assert_refused(&hole(index / 10), "a tenth").await;
    let told = load(&hole(index * 8 / 10), FEW).await.unwrap();
    assert_eq!(told.promised_frames, 200);
    assert!((140..180).contains(&told.decoded_frames), "{told:?}");
}

#[tokio::test]
async fn the_least_share_is_the_operators_choice() {
    let directory = tempfile::tempdir().unwrap();
    let path = CLIP.encode(directory.path(), "a.mkv", H264);
    let bytes = std::fs::read(&path).unwrap();
    let cut = write(directory.path(), "cut.mkv", &bytes[..bytes.len() * 7 / 10]);
    for (min_decoded_share, accepted) in [(0.1, true), (0.9, false)] {
        let loader = loader_with(MediaConfig { min_decoded_share, ..MediaConfig::default() });
        let frames = loader.load(VideoSource::LocalFile(cut.clone()), FrameSampling::default()).await;
        assert_eq!(frames.is_ok(), accepted, "{min_decoded_share}");
    }
}

#[tokio::test]
async fn encrypted_videos_are_named_so() {
    let directory = tempfile::tempdir().unwrap();
    let key = "-encryption_scheme cenc-aes-ctr -encryption_key 00112233445566778899aabbccddeeff \
               -encryption_kid 00112233445566778899aabbccddeeff";
    let hevc = "-c:v libx265 -preset ultrafast -pix_fmt yuv420p -x265-params log-level=error";
    let mut paths = vec![
        CLIP.encode(directory.path(), "h264.mp4", &format!("{H264} {key}")),
        CLIP.encode(directory.path(), "hevc.mp4", &format!("{hevc} {key}")),
        CLIP.encode(
            directory.path(),
            "fragmented.mp4",
            &format!("{H264} {key} -movflags +frag_keyframe+empty_moov"),
        ),
    ];
    let mut scrambled = std::fs::read(CLIP.encode(directory.path(), "clear.ts", H264)).unwrap();
    for packet in scrambled.chunks_exact_mut(188) {
        let pid = u16::from_be_bytes([packet[1], packet[2]]) & 0x1fff;
        if pid == 0x100 {
            packet[3] |= 0x80;
        }
    }
    paths.push(write(directory.path(), "scrambled.ts", &scrambled));
    for path in &paths {
        let error = load(path, FrameSampling::default()).await.unwrap_err();
        let named = matches!(&error, MediaError::Unsupported(message) if message.contains("encrypted"));
        assert!(named, "{}: {error:?}", path.display());
    }
    // The same samples where nothing says what they are.
    for (encrypted, codec) in [(&paths[0], b"avc1"), (&paths[1], b"hev1"), (&paths[2], b"avc1")] {
        let mut bytes = std::fs::read(encrypted).unwrap();
        let entry = bytes.windows(4).position(|tag| tag == b"encv").unwrap();
        bytes[entry..entry + 4].copy_from_slice(codec);
        let blind = write(directory.path(), "blind.mp4", &bytes);
        let error = load(&blind, FrameSampling::default()).await.unwrap_err();
        assert!(
            matches!(error, MediaError::Undecodable(_)),
            "{} without its mark: {error:?}",
            encrypted.display()
        );
    }
}

#[tokio::test]
async fn frames_that_the_decoder_only_guessed_are_not_decoded() {
    let directory = tempfile::tempdir().unwrap();
    let clip = Clip { width: 320, height: 240, ..CLIP };
    let noisy = "-vf noise=alls=20:allf=t -c:v libx264 -preset superfast -pix_fmt yuv420p -g 20 -slices 4";
    let path = clip.encode(directory.path(), "noisy.mp4", noisy);
    let whole = std::fs::read(&path).unwrap();
    let damaged = |from: usize| {
        let mut bytes = whole.clone();
        let end = bytes.windows(4).position(|tag| tag == b"moov").unwrap() - 4;
        // Keeps the lengths between pieces of a picture: it is shorter than this.
        for place in (from.max(4000)..end).step_by(1500) {
            bytes[place..place + 8].iter_mut().for_each(|byte| *byte ^= 0x5a);
        }
        write(directory.path(), &format!("damaged-{from}.mp4"), &bytes)
    };
    let error = load(&damaged(0), FrameSampling::default()).await.unwrap_err();
    assert!(error.to_string().contains("of 200 frames of the video can be decoded"), "{error}");
    let slightly = damaged(whole.len() * 9 / 10);
    let frames = loader().load(VideoSource::LocalFile(slightly), FrameSampling::default()).await.unwrap();
    let told = &frames.info;
    assert_eq!(told.promised_frames, 200);
    assert!((150..200).contains(&told.decoded_frames), "{told:?}");
}

#[tokio::test]
async fn hidden_frames_and_fields_are_no_loss() {
    let directory = tempfile::tempdir().unwrap();
    let vp8 = "-c:v libvpx -deadline good -cpu-used 8 -auto-alt-ref 1 -lag-in-frames 16 -b:v 300k -g 50";
    let interlaced = "-c:v libx264 -preset superfast -pix_fmt yuv420p -flags +ildct+ilme -x264-params tff=1";
    let fields = "-c:v mpeg2video -q:v 3 -bf 2 -g 12 -flags +ildct+ilme";
    for (name, options) in [("vp8.webm", vp8), ("a.mkv", interlaced), ("a.ts", fields)] {
        let told =
            load(&CLIP.encode(directory.path(), name, options), FrameSampling::default()).await.unwrap();
        assert_eq!((told.promised_frames, told.decoded_frames), (200, 200), "{name}");
    }
    let open = "-c:v libx264 -preset superfast -pix_fmt yuv420p -bf 3 -g 50 -x264-params open-gop=1";
    let path = CLIP.encode(directory.path(), "open.ts", open);
    let joined_midway = remux(&path, "midway.ts", "-ss 3", "-c copy");
    let frames =
        loader().load(VideoSource::LocalFile(joined_midway), FrameSampling::default()).await.unwrap();
    assert!(frames.info.decoded_share > 0.9, "{:?}", frames.info);
}

#[tokio::test]
async fn part_of_a_picture_is_refused_or_its_loss_is_told() {
    let mut jpeg = Vec::new();
    let rgb: Vec<u8> = (0..640 * 480 * 3u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, 90)
        .encode(&rgb, 640, 480, image::ExtendedColorType::Rgb8)
        .unwrap();
    let rgb = image::RgbImage::from_raw(640, 480, rgb).unwrap();
    let png = |picture: image::DynamicImage| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    };
    let picture = image::DynamicImage::from(rgb);
    let pictures =
        [jpeg, png(picture.clone()), png(picture.to_rgba8().into()), png(picture.to_luma8().into())];
    let load = async |bytes: Vec<u8>| {
        let url = format!("data:image/jpeg;base64,{}", STANDARD.encode(bytes));
        loader().load(VideoSource::Image(url), FrameSampling::default()).await
    };
    for (number, picture) in pictures.iter().enumerate() {
        let whole = load(picture.clone()).await.unwrap().info.clone();
        assert_eq!((whole.promised_frames, whole.decoded_frames, whole.decoded_share), (1, 1, 1.0));
        for percent in [3, 30, 80] {
            let cut = picture[..picture.len() * percent / 100].to_vec();
            let reserved = [cut.clone(), vec![0; picture.len() - cut.len()]].concat();
            for bytes in [cut, reserved] {
                let what = format!("{percent} % of picture {number}");
                match load(bytes).await {
                    Ok(frames) => {
                        let share = frames.info.decoded_share;
                        assert!(percent == 80 && (0.7..0.9).contains(&share), "{what}: {share}");
                    }
                    Err(error) => {
                        assert!(
                            percent < 50 && matches!(error, MediaError::Undecodable(_)),
                            "{what}: {error:?}"
                        );
                        let told = error.to_string().contains("% of the picture arrived");
                        assert!(percent == 3 || told, "{what}: {error}");
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn bytes_after_a_whole_file_are_no_promise() {
    let directory = tempfile::tempdir().unwrap();
    let tails: [&[u8]; 5] =
        [b"<html>error</html>\n", &[b'\n'; 16], &[0xff; 300], &[0; 4096], b"TAG and a title"];
    for (name, bytes) in containers(directory.path()) {
        for tail in tails {
            let path = write(directory.path(), &format!("tail-{name}"), &[&bytes[..], tail].concat());
            let told = load(&path, FrameSampling::default()).await.unwrap_or_else(|e| panic!("{name}: {e}"));
            let counts = (told.source_frames, told.promised_frames, told.decoded_frames);
            assert_eq!(counts, (200, 200, 200), "{name} and {:?}", &tail[..4]);
        }
    }
}

#[tokio::test]
async fn an_index_or_a_stated_size_tells_how_much_is_missing() {
    let directory = tempfile::tempdir().unwrap();
    let noisy = "-vf noise=alls=12:allf=t";
    for (name, options, promised) in [
        ("fast.mp4", format!("{noisy} -movflags +faststart {H264}"), 200..=200),
        ("a.flv", format!("{noisy} {H264}"), 150..=250),
        ("a.wmv", format!("{noisy} -c:v wmv2"), 150..=250),
    ] {
        let path = CLIP.encode(directory.path(), name, &options);
        let bytes = std::fs::read(&path).unwrap();
        let part = |percent: usize| {
            write(directory.path(), &format!("{percent}-{name}"), &bytes[..bytes.len() * percent / 100])
        };
        assert_refused(&part(30), name).await;
        let told = load(&part(80), FrameSampling::default()).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(promised.contains(&told.promised_frames) && told.decoded_share < 0.95, "{name}: {told:?}");
        let whole = load(&path, FrameSampling::default()).await.unwrap();
        assert_eq!(whole.decoded_share, 1.0, "{name}");
    }
}
