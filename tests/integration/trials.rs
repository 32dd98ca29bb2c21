//! Sends the files of `tests/trials/` over HTTP: small inputs of kinds that users report, each with
//! its right value.
//!
//! The number of each frame is burnt in as a grid of 5 x 4 cells, so a test reads from the pixels
//! that the model was given which frames they are, whatever the reply says.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tinyllava::{media::frame_sampling::spread, model::fake::FakeModel};

use crate::http_setup::{REPLY, Server, config, error, form, request, server, success};

/// Cells of the grid: 16 bits of the number, then the inverted XOR of its four nibbles.
const COLUMNS: usize = 5;
const ROWS: usize = 4;
/// Side of the frames that the fake model is given, pixels.
const SIZE: usize = 28;

/// A server that samples the published model's 16 frames, and the frames that its model is given.
struct Trial {
    server: Server,
    encoded: Arc<Mutex<Vec<u8>>>,
}

/// The right value of a good file.
struct Right {
    file: &'static str,
    /// The numbers burnt into the sampled frames.
    numbers: Vec<usize>,
    /// Frames of the video.
    source_frames: usize,
    /// Seconds; `None`: not checked.
    duration: Option<f64>,
}

impl Right {
    /// The reference's 16 indices of `total` frames.
    fn spread(file: &'static str, total: usize) -> Self {
        Right { file, numbers: spread(total, 16), source_frames: total, duration: None }
    }
}

impl Trial {
    async fn start() -> Trial {
        let encoded = Arc::new(Mutex::new(Vec::new()));
        let mut model = FakeModel::saying(REPLY);
        model.encoded = Some(encoded.clone());
        let mut config = config();
        config.media.num_frames = 16;
        Trial { server: server(config, model).await, encoded }
    }

    /// Uploads `file` with `more` fields. Returns the reply's `video` object and the frames that
    /// the model saw.
    async fn upload(&self, file: &str, more: Value) -> (Value, Vec<Vec<u8>>) {
        let question = request(json!("What happens?"), more);
        self.encoded.lock().unwrap().clear();
        let bytes = std::fs::read(path(file)).unwrap();
        let reply = success(self.server.upload(form(&question, bytes)).send().await.unwrap()).await;
        assert_eq!(reply["choices"][0]["message"]["content"], "C", "{file}");
        (reply["video"].clone(), self.frames())
    }

    /// Sends `file` as a part of type `kind` with a `data:` URL.
    async fn part(&self, kind: &str, mime: &str, file: &str) -> (Value, Vec<Vec<u8>>) {
        let url = format!("data:{mime};base64,{}", STANDARD.encode(std::fs::read(path(file)).unwrap()));
        let part = json!({"type": kind, kind: {"url": url}});
        self.encoded.lock().unwrap().clear();
        let question = request(json!([part, {"type": "text", "text": "What happens?"}]), json!({}));
        let reply = self.server.ask(&question).await;
        (reply["video"].clone(), self.frames())
    }

    fn frames(&self) -> Vec<Vec<u8>> {
        let encoded = self.encoded.lock().unwrap();
        encoded.chunks_exact(SIZE * SIZE * 3).map(<[u8]>::to_vec).collect()
    }
}

fn path(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/trials").join(file)
}

/// The number burnt into a frame `[SIZE, SIZE, 3]`.
fn number(frame: &[u8]) -> usize {
    let white = |cell: usize| {
        let x = (2 * (cell % COLUMNS) + 1) * SIZE / (2 * COLUMNS);
        let y = (2 * (cell / COLUMNS) + 1) * SIZE / (2 * ROWS);
        usize::from(frame[(y * SIZE + x) * 3] > 128)
    };
    let number: usize = (0..16).map(|bit| white(bit) << bit).sum();
    let check: usize = (0..4).map(|bit| white(16 + bit) << bit).sum();
    let nibbles = number ^ number >> 4 ^ number >> 8 ^ number >> 12;
    assert_eq!(check, !nibbles & 15, "a frame cannot be read");
    number
}

fn numbers(frames: &[Vec<u8>]) -> Vec<usize> {
    frames.iter().map(|frame| number(frame)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_good_file_gives_the_models_16_frames_of_its_own_video() {
    let trial = Trial::start().await;
    let cases = [
        Right { duration: Some(16.0), ..Right::spread("size_changes.webm", 400) },
        Right::spread("size_change.ts", 80),
        Right::spread("truehd.mkv", 50),
        Right::spread("wma.avi", 50),
        Right::spread("camcorder_pcm.m2ts", 50),
        Right::spread("wavpack.mkv", 50),
        Right::spread("gsm.avi", 50),
        Right { duration: Some(4.0), ..Right::spread("camera_length_unknown.mp4", 100) },
        Right { duration: Some(4.0), ..Right::spread("length_wrong.webm", 100) },
        Right { duration: Some(32.0), ..Right::spread("two_equal_times.mkv", 90) },
        Right::spread("preview_first.mkv", 100),
        Right::spread("preview_first.mp4", 100),
        Right::spread("two_renditions.mp4", 100),
        Right::spread("varying_rate.mkv", 90),
        Right::spread("burst_then_still.mkv", 220),
        Right::spread("video_starts_late.mkv", 100),
        // Its first whole frame is number 8.
        Right {
            numbers: spread(92, 16).iter().map(|index| index + 8).collect(),
            ..Right::spread("ts_from_mid_packet.ts", 92)
        },
    ];
    let mut faults = Vec::new();
    for Right { file, numbers: right, source_frames, duration } in cases {
        let question = request(json!("What happens?"), json!({}));
        trial.encoded.lock().unwrap().clear();
        let bytes = std::fs::read(path(file)).unwrap();
        let response = trial.server.upload(form(&question, bytes)).send().await.unwrap();
        if response.status() != 200 {
            faults.push(format!("{file}: {}", response.text().await.unwrap()));
            continue;
        }
        let reply = success(response).await;
        let video = &reply["video"];
        let got = numbers(&trial.frames());
        if got != right {
            faults.push(format!("{file}: frames {got:?} instead of {right:?}"));
        }
        if video["source_frames"] != source_frames {
            faults.push(format!("{file}: {video}"));
        }
        if duration.is_some_and(|right| (video["duration"].as_f64().unwrap() - right).abs() > 0.05) {
            faults.push(format!("{file}: lasts {} s", video["duration"]));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_window_begins_where_a_player_would_begin() {
    let trial = Trial::start().await;
    let knobs = |video: Value| json!({"media_io_kwargs": {"video": video}});
    let (video, frames) =
        trial.upload("two_equal_times.mkv", knobs(json!({"start": 20, "end": 30, "num_frames": 4}))).await;
    let times: Vec<f64> = serde_json::from_value(video["sampled_timestamps"].clone()).unwrap();
    assert_eq!(frames.len(), 4);
    assert!(
        (times[0] - 20.0).abs() < 0.4 && times.iter().all(|time| (19.6..30.0).contains(time)),
        "{times:?}"
    );
    let indices: Vec<usize> = serde_json::from_value(video["sampled_indices"].clone()).unwrap();
    assert_eq!(numbers(&frames), indices);

    // The picture begins at 3.007 s: a player shows frame 87 from 6.487 s, and 88 from 6.527 s.
    let (_, frames) = trial.upload("video_starts_late.mkv", knobs(json!({"start": 6.5}))).await;
    let shown = numbers(&frames);
    assert!([87, 88].contains(&shown[0]) && shown.last() == Some(&99), "{shown:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_per_second_are_counted_by_time() {
    let trial = Trial::start().await;
    let (_, frames) =
        trial.upload("burst_then_still.mkv", json!({"media_io_kwargs": {"video": {"fps": 1}}})).await;
    let shown = numbers(&frames);
    // 200 frames in two seconds, then one every two seconds: at most 4 of the first, all 20 others.
    assert!(shown.iter().filter(|&&number| number < 200).count() <= 4, "{shown:?}");
    assert!((200..220).all(|number| shown.contains(&number)), "{shown:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_which_little_can_be_seen_is_refused_with_the_reason() {
    let trial = Trial::start().await;
    let question = request(json!("What happens?"), json!({}));
    for (file, statuses, words) in [
        ("encrypted.mp4", &[415, 422][..], &["encrypted"][..]),
        ("preallocated_tenth.mp4", &[422], &["frames"]),
    ] {
        let bytes = std::fs::read(path(file)).unwrap();
        let (status, error) = error(trial.server.upload(form(&question, bytes)).send().await.unwrap()).await;
        let message = error["message"].as_str().unwrap();
        assert!(statuses.contains(&status), "{file}: {status} {message}");
        assert!(words.iter().all(|word| message.contains(word)), "{file}: {message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recording_that_broke_off_is_answered_and_the_loss_is_told() {
    let trial = Trial::start().await;
    let (video, frames) = trial.upload("recording_broke_off.webm", json!({})).await;
    assert_eq!(numbers(&frames), spread(140, 16), "{video}");
    let (promised, decoded) = (&video["promised_frames"], &video["decoded_frames"]);
    assert!(promised.as_u64() > decoded.as_u64() && video["decoded_share"].as_f64() < Some(1.0), "{video}");
}

#[tokio::test(flavor = "multi_thread")]
async fn transparent_pictures_are_seen_on_white() {
    let trial = Trial::start().await;
    for (file, middle) in [("disc_on_nothing.png", [0, 0, 0]), ("hidden_colour.png", [0, 200, 0])] {
        let (_, frames) = trial.part("image_url", "image/png", file).await;
        let pixel = |x: usize, y: usize| &frames[0][(y * SIZE + x) * 3..][..3];
        assert_eq!(pixel(0, 0), [255, 255, 255], "{file}");
        assert_eq!(pixel(SIZE / 2, SIZE / 2), middle, "{file}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_animated_picture_is_a_video_whatever_part_it_comes_in() {
    for kind in ["image_url", "video_url"] {
        // A new server: a video that was encoded before is not encoded again.
        let trial = Trial::start().await;
        let (video, frames) = trial.part(kind, "image/webp", "animation.webp").await;
        assert_eq!(numbers(&frames), spread(50, 16), "{kind}: {video}");
        assert_eq!(video["source_frames"], 50, "{kind}");
    }
}
