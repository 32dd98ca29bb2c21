//! Requests in all their forms: every kind of video part, several videos, conversations, salts and timeouts.

use std::{os::unix::fs::symlink, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use futures_util::future::join_all;
use serde_json::{Value, json};
use tinyllava::{config::Config, model::fake::FakeModel};

use crate::{http_setup::*, server_process};

fn several_videos() -> Config {
    Config { max_videos_per_request: 3, ..config() }
}

/// A question about these parts.
fn parts(parts: Vec<Value>, more: Value) -> Value {
    let mut content = vec![json!({"type": "text", "text": "What?"})];
    content.extend(parts);
    request(json!(content), more)
}

fn video(more: Value) -> Value {
    let mut part = json!({"type": "video_url", "video_url": {"url": clip_url()}});
    part["video_url"].as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
    part
}

fn png(shade: u8) -> String {
    let mut bytes = std::io::Cursor::new(vec![]);
    let picture = image::RgbImage::from_pixel(20, 10, image::Rgb([shade; 3]));
    picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    STANDARD.encode(bytes.into_inner())
}

fn cached(reply: &Value) -> u64 {
    reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

#[tokio::test]
async fn every_form_of_a_video_part_gives_the_same_reply() {
    let mut config = config();
    config.media.allowed_media_dir = clip().parent().map(Into::into);
    let server = server(config, FakeModel::saying(REPLY)).await;
    let host = VideoHost::start(clip_bytes(), Some(Duration::ZERO)).await;
    let bytes = STANDARD.encode(clip_bytes());
    let plain = server.ask(&parts(vec![video(json!({}))], json!({}))).await;
    assert_eq!(cached(&plain), 0);
    for part in [
        json!({"type": "video_url", "video_url": host.url}),
        json!({"type": "video_url", "video_url": {"url": format!("file://{}", clip().display())}, "uuid": "7"}),
        json!({"type": "input_video", "input_video": {"data": bytes}}),
        json!({"type": "input_video", "input_video": {"url": host.url}}),
        json!({"type": "video", "video": host.url}),
        json!({"type": "video", "video": host.url, "num_frames": 4}),
        json!({"type": "file", "file": {"file_data": clip_url(), "filename": "clip.mp4"}}),
        json!({"type": "file", "file": {"file_data": bytes}}),
    ] {
        let reply = server.ask(&parts(vec![part.clone()], json!({}))).await;
        assert_eq!(reply["choices"], plain["choices"], "{part}");
        assert_eq!(reply["video"], plain["video"], "{part}");
        assert!(cached(&reply) > 0, "{part} is the same video to the prefix cache");
    }
    assert_eq!(server.metric("tinyllava_stage_seconds_count{stage=\"decode\"}").await, 1.0);
    assert_eq!(server.metric("tinyllava_step_size_sum{kind=\"encode\"}").await, 4.0);
}

#[tokio::test]
async fn frame_lists_and_stills_say_what_they_were() {
    let server = server(several_videos(), FakeModel::saying(REPLY)).await;
    let frames: Vec<String> = (0..3).map(|i| format!("data:image/png;base64,{}", png(i * 50))).collect();
    let joined = format!("data:video/jpeg;base64,{},{},{}", png(0), png(50), png(100));
    let list = json!({"type": "video", "video": frames, "fps": 2.0});
    let first = server.ask(&parts(vec![list], json!({}))).await;
    assert_eq!(first["video"]["container"], "frames");
    assert_eq!(first["video"]["source_frames"], 3);
    assert_eq!(first["video"]["sampled_indices"], json!([0, 0, 1, 2]), "spread to the model's number");
    assert_eq!(first["video"]["sampled_timestamps"], json!([0.0, 0.0, 0.5, 1.0]));
    assert_eq!((&first["video"]["fps"], &first["video"]["num_frames"]), (&json!(2.0), &json!(4)));
    let joined = json!({"type": "video_url", "video_url": {"url": joined}});
    let second = server
        .ask(&parts(vec![joined.clone()], json!({"media_io_kwargs": {"video": {"num_frames": -1}}})))
        .await;
    assert_eq!(second["video"]["duration"], Value::Null);
    assert_eq!(second["video"]["sampled_indices"], json!([0, 1, 2]));
    let still = json!({"type": "image_url", "image_url": {"url": frames[0], "detail": "auto"}});
    let still = server.ask(&parts(vec![still], json!({}))).await;
    assert_eq!(still["video"]["container"], "image");
    assert_eq!(still["video"]["sampled_indices"], json!([0, 0, 0, 0]));
    let fewer = json!({"media_io_kwargs": {"video": {"num_frames": 2}}});
    let fewer = server.ask(&parts(vec![joined], fewer)).await;
    assert_eq!(fewer["video"]["sampled_indices"], json!([0, 2]));
}

#[tokio::test]
async fn several_videos_have_their_own_knobs_and_share_those_of_the_request() {
    let server = server(several_videos(), FakeModel::saying(REPLY)).await;
    let three = vec![
        video(json!({"num_frames": 2})),
        json!({"type": "image_url", "image_url": format!("data:image/png;base64,{}", png(9))}),
        video(json!({"num_frames": 2})),
    ];
    let body = parts(three, json!({"stream_options": {"include_usage": true}, "stream": true}));
    let events = Events::of(server.post(&body).send().await.unwrap()).rest().await;
    let chunks = chunks(&events);
    assert!(chunks[0].get("video").is_none());
    let videos = chunks[0]["videos"].as_array().unwrap();
    assert_eq!(
        videos.iter().map(|video| video["num_frames"].as_u64().unwrap()).collect::<Vec<_>>(),
        [2, 4, 2]
    );
    assert!(chunks[1..].iter().all(|chunk| chunk.get("videos").is_none()));
    let usage = &chunks.last().unwrap()["usage"];
    assert_eq!(usage["prompt_tokens_details"]["video_tokens"], 24);
    // The same video twice in a request is decoded and encoded once.
    assert_eq!(server.metric("tinyllava_step_size_sum{kind=\"encode\"}").await, 2.0 + 4.0);

    let both = parts(
        vec![video(json!({})), video(json!({"end": 1.0}))],
        json!({"media_io_kwargs": {"video": {"fps": 3}}}),
    );
    let reply = server.ask(&both).await;
    assert_eq!(reply["videos"][0]["num_frames"], 6);
    assert_eq!((&reply["videos"][1]["num_frames"], &reply["videos"][1]["end"]), (&json!(3), &json!(1.0)));
    assert_eq!((&reply["videos"][1]["fps"], &reply["videos"][1]["start"]), (&json!(3.0), &Value::Null));

    let four = parts(vec![video(json!({})); 4], json!({}));
    let (status, refused) = error(server.post(&four).send().await.unwrap()).await;
    assert_eq!((status, &refused["param"]), (400, &json!("messages[0].content[4]")));
    assert!(refused["message"].as_str().unwrap().contains("at most 3"), "{refused}");
}

#[tokio::test]
async fn a_fault_is_told_by_the_path_of_its_video() {
    let server = server(several_videos(), FakeModel::saying(REPLY)).await;
    let good = video(json!({}));
    for (bad, status, param) in [
        (video(json!({"start": 5.0})), 400, ".video_url.start"),
        (json!({"type": "file", "file": {"file_id": "file-1"}}), 400, ".file"),
        (json!({"type": "video_url", "video_url": "data:video/mp4;base64,aGVsbG8="}), 415, ".video_url"),
        (json!({"type": "image_url", "image_url": "data:image/png;base64,aGVsbG8="}), 415, ".image_url"),
        (json!({"type": "input_video", "input_video": {"url": "http://127.0.0.1:9/a"}}), 422, ".input_video"),
    ] {
        let body = parts(vec![good.clone(), bad], json!({}));
        let (got, refused) = error(server.post(&body).send().await.unwrap()).await;
        assert_eq!(
            (got, &refused["param"]),
            (status, &json!(format!("messages[0].content[2]{param}"))),
            "{refused}"
        );
    }
    server.until_idle().await;
}

#[tokio::test]
async fn the_next_question_about_a_video_computes_only_what_is_new() {
    let server = simple_server().await;
    let first = json!({"role": "user", "content": [{"type": "text", "text": "What?"}, video(json!({}))]});
    let told = server.ask(&json!({"model": MODEL, "messages": [first]})).await;
    let answer = told["choices"][0]["message"].clone();
    assert_eq!(answer["reasoning_content"], "The person bends.");
    let next = json!({"role": "user", "content": "Sure?"});
    let echoed = server.ask(&json!({"model": MODEL, "messages": [first, answer, next]})).await;
    assert_eq!(echoed["video"], told["video"]);
    assert!(cached(&echoed) >= 100, "{}", echoed["usage"]);
    // What was thought is not sent to the model again.
    let bare = json!({"role": "assistant", "content": answer["content"]});
    let bare = server.ask(&json!({"model": MODEL, "messages": [first, bare, next]})).await;
    assert_eq!(bare["usage"]["prompt_tokens"], echoed["usage"]["prompt_tokens"]);
    assert!(cached(&bare) > cached(&echoed));
    // A video may come in any turn of the user, after plain text too.
    let plain = json!({"role": "user", "content": "Hi"});
    let later = server.ask(&json!({"model": MODEL, "messages": [plain, answer, first]})).await;
    assert_eq!(later["video"], told["video"]);
    assert_eq!(server.metric("tinyllava_stage_seconds_count{stage=\"decode\"}").await, 1.0);
    assert_eq!(server.metric("tinyllava_step_size_sum{kind=\"encode\"}").await, 4.0);
}

#[tokio::test]
async fn nothing_cached_is_shared_between_salts() {
    let about_video = json!([{"type": "text", "text": "What?"}, video(json!({}))]);
    for (content, about_a_video) in [(json!("A question?"), false), (about_video, true)] {
        let server = simple_server().await;
        for (more, hit) in [
            (json!({}), false),
            (json!({"cache_salt": "a"}), false),
            (json!({"cache_salt": "b"}), false),
            (json!({"cache_salt": "a"}), true),
            (json!({}), true),
        ] {
            let reply = server.ask(&request(content.clone(), more.clone())).await;
            assert_eq!(cached(&reply) > 0, hit, "{more}");
        }
        if about_a_video {
            // Frames and encoded videos neither: their being there would show in the time.
            assert_eq!(server.metric("tinyllava_stage_seconds_count{stage=\"decode\"}").await, 3.0);
            assert_eq!(server.metric("tinyllava_step_size_sum{kind=\"encode\"}").await, 12.0);
        }
    }
}

#[tokio::test]
async fn a_request_may_set_a_shorter_deadline_of_its_own() {
    let server = server(config(), slow_model(REPLY, Duration::from_millis(50))).await;
    let (status, refused) =
        error(server.post(&request(json!("Hi"), json!({"timeout": 0.2}))).send().await.unwrap()).await;
    assert_eq!((status, &refused["code"]), (504, &json!("deadline_exceeded")));
    assert!(refused["message"].as_str().unwrap().contains("0.2 s"), "{refused}");
    let (status, refused) =
        error(server.post(&request(json!("Hi"), json!({"timeout": 601}))).send().await.unwrap()).await;
    assert_eq!((status, &refused["param"]), (400, &json!("timeout")));
    server.until_idle().await;
}

#[tokio::test]
async fn requests_for_one_url_at_the_same_time_download_decode_and_encode_once() {
    let server = simple_server().await;
    let host = VideoHost::start(clip_bytes(), Some(Duration::from_millis(1500))).await;
    let body = about(&host.url, json!({}));
    let replies = join_all((0..6).map(|_| server.ask(&body))).await;
    assert!(replies.iter().all(|reply| reply["video"] == replies[0]["video"]));
    assert_eq!(host.hits(), 1);
    assert_eq!(server.metric("tinyllava_stage_seconds_count{stage=\"decode\"}").await, 1.0);
    assert_eq!(server.metric("tinyllava_step_size_sum{kind=\"encode\"}").await, 4.0);
}

#[tokio::test]
async fn a_known_video_is_answered_without_ffmpeg() {
    let tools = tempfile::tempdir().unwrap();
    let path = std::env::var_os("PATH").unwrap();
    let found = std::env::split_paths(&path).map(|dir| dir.join("ffmpeg")).find(|file| file.is_file());
    let ffmpeg = tools.path().join("ffmpeg");
    symlink(found.unwrap(), &ffmpeg).unwrap();
    let mut config = config();
    config.media.ffmpeg_path = Some(ffmpeg.clone());
    let server = server(config, FakeModel::saying(REPLY)).await;
    let first = server.ask(&about(&clip_url(), json!({}))).await;
    std::fs::remove_file(ffmpeg).unwrap();
    let again = server.ask(&about(&clip_url(), json!({"max_tokens": 3}))).await;
    assert_eq!(again["video"], first["video"]);
    let other = server.post(&about(&clip_url(), json!({"media_io_kwargs": {"video": {"num_frames": 2}}})));
    assert_eq!(error(other.send().await.unwrap()).await.0, 500, "other frames need a decoder");
}

#[tokio::test]
async fn the_model_answers_a_video_and_its_frames_alike() {
    let clip = "models/nano/demo/direction.mp4";
    let question = "In what direction is the red object moving?\nA. up\nB. down";
    let frames = frames_of(clip, 16).await;
    let server = tokio::task::spawn_blocking(|| server_process::Server::start(&[])).await.unwrap();
    let url = format!("{}/v1/chat/completions", server.url);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let ask = async |part: Value| {
        let content = json!([part, {"type": "text", "text": question}]);
        let body = json!({"temperature": 0, "messages": [{"role": "user", "content": content}]});
        success(client.post(&url).json(&body).send().await.unwrap()).await["choices"][0]["message"].clone()
    };
    let bytes = STANDARD.encode(std::fs::read(clip).unwrap());
    let video = ask(json!({"type": "input_video", "input_video": {"data": bytes}})).await;
    assert_eq!(video["content"], "A");
    let listed = ask(json!({"type": "video", "video": frames})).await;
    assert_eq!(listed, video, "lossless frames of a video are the video");
    let still = ask(json!({"type": "image_url", "image_url": {"url": frames[0]}})).await;
    assert!(!still["content"].as_str().unwrap().is_empty(), "{still}");
}

/// The frames that the server samples of a local video, as lossless `data:` URLs.
async fn frames_of(clip: &str, num_frames: usize) -> Vec<String> {
    use tinyllava::{
        config::MediaConfig,
        media::{FrameSampling, MediaLoader},
    };
    let loader = MediaLoader::new(MediaConfig::default(), 32).unwrap();
    let sampling = FrameSampling { num_frames: Some(num_frames), ..FrameSampling::default() };
    let frames = loader.source_frames(clip.as_ref(), sampling).await.unwrap();
    let (width, height) = (frames.info.width as u32, frames.info.height as u32);
    let pictures = frames.rgb.chunks_exact((width * height * 3) as usize).map(|rgb| {
        let mut bytes = std::io::Cursor::new(vec![]);
        let picture = image::RgbImage::from_raw(width, height, rgb.to_vec()).unwrap();
        picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        format!("data:image/png;base64,{}", STANDARD.encode(bytes.into_inner()))
    });
    pictures.collect()
}
