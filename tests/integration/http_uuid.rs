//! Media that a client names by a `uuid`: sent once, asked about again, never another client's.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use reqwest::{
    RequestBuilder,
    multipart::{Form, Part},
};
use serde_json::{Value, json};
use tinyllava::{
    config::Config,
    http::{Access, ApiKey},
    model::fake::FakeModel,
};

use crate::http_setup::*;

fn several() -> Config {
    Config { max_videos_per_request: 3, ..config() }
}

fn ask(part: Value, more: Value) -> Value {
    request(json!([{"type": "text", "text": "What?"}, part]), more)
}

/// The clip, under a name.
fn sent(uuid: &str) -> Value {
    json!({"type": "video_url", "video_url": {"url": clip_url()}, "uuid": uuid})
}

fn named(uuid: &str) -> Value {
    json!({"type": "video_url", "uuid": uuid})
}

fn png(shade: u8) -> String {
    let mut bytes = std::io::Cursor::new(vec![]);
    let picture = image::RgbImage::from_pixel(20, 10, image::Rgb([shade; 3]));
    picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    format!("data:image/png;base64,{}", STANDARD.encode(bytes.into_inner()))
}

/// Holds the reply to one that says: not here.
async fn missing(request: RequestBuilder) {
    let (status, error) = error(request.send().await.unwrap()).await;
    assert_eq!((status, &error["code"]), (404, &json!("media_not_found")), "{error}");
    assert_eq!(error["param"].as_str().unwrap().split('.').next(), Some("messages[0]"));
}

#[tokio::test]
async fn a_name_alone_asks_about_what_was_sent_under_it() {
    let server = simple_server().await;
    let host = VideoHost::start(clip_bytes(), Some(Duration::ZERO)).await;
    missing(server.post(&ask(named("7"), json!({})))).await;
    let first = json!({"type": "video_url", "video_url": {"url": host.url}, "uuid": "7"});
    let first = server.ask(&ask(first, json!({}))).await;
    for part in [
        named("7"),
        json!({"type": "video_url", "video_url": null, "uuid": "7"}),
        json!({"type": "video_url", "video_url": {}, "uuid": "7"}),
        json!({"type": "video_url", "video_url": {"uuid": "7"}}),
        json!({"type": "video_url", "video_url": {"url": null, "uuid": "7"}, "uuid": "7"}),
        json!({"type": "image_url", "uuid": "7"}),
        json!({"type": "image_url", "image_url": null, "uuid": "7"}),
        json!({"type": "image_url", "image_url": {"uuid": "7"}}),
        json!({"type": "input_video", "input_video": {"uuid": "7"}}),
        json!({"type": "input_video", "uuid": "7"}),
        json!({"type": "video", "uuid": "7"}),
        json!({"type": "file", "uuid": "7"}),
    ] {
        let reply = server.ask(&ask(part.clone(), json!({}))).await;
        assert_eq!((&reply["video"], &reply["choices"]), (&first["video"], &first["choices"]), "{part}");
    }
    // Other frames of it, out of the same bytes.
    let two = json!({"type": "video_url", "video_url": {"uuid": "7", "num_frames": 2, "start": 1.0}});
    let reply = server.ask(&ask(two, json!({}))).await;
    assert_eq!((&reply["video"]["num_frames"], &reply["video"]["start"]), (&json!(2), &json!(1.0)));
    assert_eq!(host.hits(), 1, "fetched once");
    let late = json!({"type": "video_url", "video_url": {"uuid": "7", "start": 9.0}});
    let (status, refused) = error(server.post(&ask(late, json!({}))).send().await.unwrap()).await;
    assert_eq!((status, &refused["param"]), (400, &json!("messages[0].content[1].video_url.start")));
}

#[tokio::test]
async fn all_that_can_be_sent_can_be_named() {
    let mut config = several();
    config.media.allowed_media_dir = clip().parent().map(Into::into);
    let server = server(config, FakeModel::saying(REPLY)).await;
    let frames: Vec<String> = (0..3).map(|shade| png(shade * 50)).collect();
    let file = format!("file://{}", clip().display());
    for (number, part) in [
        json!({"type": "video_url", "video_url": clip_url()}),
        json!({"type": "video_url", "video_url": file}),
        json!({"type": "input_video", "input_video": STANDARD.encode(clip_bytes())}),
        json!({"type": "image_url", "image_url": {"url": png(9)}}),
        json!({"type": "video", "video": frames, "fps": 2.0}),
        json!({"type": "file", "file": {"file_data": clip_url()}}),
    ]
    .into_iter()
    .enumerate()
    {
        let mut part = part;
        part["uuid"] = json!(format!("name-{number}"));
        let first = server.ask(&ask(part.clone(), json!({}))).await;
        let knobs = if part.get("fps").is_some() { json!({"fps": 2.0}) } else { json!({}) };
        let mut again = named(&format!("name-{number}"));
        again.as_object_mut().unwrap().extend(knobs.as_object().cloned().unwrap());
        let again = server.ask(&ask(again, json!({}))).await;
        assert_eq!(again["video"], first["video"], "{part:.60}");
        assert!(again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() > Some(0), "{part:.60}");
    }
    // An upload takes the place of the part without a name, else of the one that has one.
    let marked = json!([{"type": "text", "text": "What?"}, named("name-3"), {"type": "video_url"}]);
    let reply =
        success(server.upload(form(&request(marked, json!({})), clip_bytes())).send().await.unwrap()).await;
    assert_eq!(reply["videos"][0]["container"], "image");
    assert_eq!(reply["videos"][1]["source_frames"], 20);
    let reply = server.upload(form(&ask(named("name-3"), json!({})), clip_bytes())).send().await.unwrap();
    assert_eq!(success(reply).await["video"]["source_frames"], 20);
    let reply = server.ask(&ask(named("name-3"), json!({}))).await;
    assert_eq!(reply["video"]["source_frames"], 20, "the upload has the name now");
}

#[tokio::test]
async fn a_request_may_name_what_it_sends_itself() {
    let server = server(several(), FakeModel::saying(REPLY)).await;
    let turns = json!([
        {"role": "user", "content": [named("a"), {"type": "text", "text": "And this?"}]},
        {"role": "assistant", "content": "C"},
        {"role": "user", "content": [sent("a"), {"type": "text", "text": "What?"}]},
    ]);
    let reply = server.ask(&json!({"messages": turns})).await;
    assert_eq!(reply["videos"][0], reply["videos"][1]);
    let input = json!([{"role": "user", "content": [
        {"type": "input_video", "uuid": "a"}, {"type": "input_text", "text": "What?"}]}]);
    let response = success(server.send_json("/v1/responses", &json!({"input": input})).await).await;
    assert_eq!(response["video"], reply["videos"][0]);
    let id = &response["id"];
    let next = json!({"input": "Sure?", "previous_response_id": id});
    assert_eq!(success(server.send_json("/v1/responses", &next).await).await["video"], reply["videos"][0]);
}

#[tokio::test]
async fn a_name_stands_for_what_was_sent_last() {
    let server = simple_server().await;
    let video = server.ask(&ask(sent("a"), json!({}))).await;
    let picture = json!({"type": "image_url", "image_url": png(7), "uuid": "a"});
    let still = server.ask(&ask(picture, json!({}))).await;
    assert_eq!(still["video"]["container"], "image");
    let again = server.ask(&ask(named("a"), json!({}))).await;
    assert_eq!(again["video"], still["video"]);
    assert_ne!(again["video"], video["video"]);
    // What could not be read has no name.
    let broken = json!({"type": "video_url", "video_url": "data:video/mp4;base64,aGVsbG8=", "uuid": "a"});
    assert_eq!(error(server.post(&ask(broken.clone(), json!({}))).send().await.unwrap()).await.0, 415);
    assert_eq!(server.ask(&ask(named("a"), json!({}))).await["video"], still["video"]);
    let mut other = broken;
    other["uuid"] = json!("b");
    assert_eq!(error(server.post(&ask(other, json!({}))).send().await.unwrap()).await.0, 415);
    missing(server.post(&ask(named("b"), json!({})))).await;
}

#[tokio::test]
async fn names_are_never_those_of_another_salt_or_key() {
    let state = state(config());
    let keys = ["one", "two"].map(|key| ApiKey::new(key).unwrap()).to_vec();
    state.set_access(Access { keys, ..Access::default() });
    load(&state, FakeModel::saying(REPLY));
    let server = serve(state).await;
    let send = |part: Value, key: &str, salt: Value| {
        server.post(&ask(part, json!({"cache_salt": salt}))).bearer_auth(key)
    };
    success(send(sent("a"), "one", Value::Null).send().await.unwrap()).await;
    success(send(sent("a"), "two", json!("s")).send().await.unwrap()).await;
    for (key, salt, is_there) in [
        ("one", Value::Null, true),
        ("two", json!("s"), true),
        ("two", Value::Null, false),
        ("one", json!("s"), false),
        ("two", json!("t"), false),
    ] {
        let request = send(named("a"), key, salt.clone());
        if is_there {
            success(request.send().await.unwrap()).await;
        } else {
            missing(request).await;
        }
    }
}

#[tokio::test]
async fn what_is_kept_has_a_limit() {
    let mut config = config();
    let num_bytes = clip_bytes().len() as u64;
    config.media.named_media.max_bytes = 2 * num_bytes + 10;
    let server = server(config, FakeModel::saying(REPLY)).await;
    for name in ["a", "b"] {
        server.ask(&ask(sent(name), json!({}))).await;
    }
    server.ask(&ask(named("a"), json!({}))).await;
    server.ask(&ask(sent("c"), json!({}))).await;
    missing(server.post(&ask(named("b"), json!({})))).await;
    for name in ["a", "c"] {
        server.ask(&ask(named(name), json!({}))).await;
    }
    let (status, refused) = error(
        server
            .post(&ask(json!({"type": "image_url", "uuid": "x".repeat(257)}), json!({})))
            .send()
            .await
            .unwrap(),
    )
    .await;
    assert_eq!((status, &refused["param"]), (400, &json!("messages[0].content[1].uuid")));
}

#[tokio::test]
async fn deleted_and_changed_files_are_not_what_they_were() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.mp4");
    std::fs::write(&path, clip_bytes()).unwrap();
    let mut config = config();
    config.media.allowed_media_dir = Some(directory.path().into());
    let server = server(config, FakeModel::saying(REPLY)).await;
    let file =
        Form::new().part("file", Part::bytes(clip_bytes()).file_name("a.mp4")).text("purpose", "vision");
    let file = success(server.send_form("/v1/files", file).await).await;
    let part = json!({"type": "file", "file": {"file_id": file["id"]}, "uuid": "stored"});
    server.ask(&ask(part, json!({}))).await;
    server.ask(&ask(named("stored"), json!({}))).await;
    success(server.delete(&format!("/v1/files/{}", file["id"].as_str().unwrap())).await).await;
    missing(server.post(&ask(named("stored"), json!({})))).await;

    let url = format!("file://{}", path.display());
    let part = json!({"type": "video_url", "video_url": {"url": url}, "uuid": "local"});
    server.ask(&ask(part, json!({}))).await;
    let picture = STANDARD.decode(png(3).split_once(',').unwrap().1).unwrap();
    std::fs::write(&path, picture).unwrap();
    assert_eq!(server.ask(&ask(named("local"), json!({}))).await["video"]["container"], "image");
    std::fs::remove_file(&path).unwrap();
    missing(server.post(&ask(named("local"), json!({})))).await;
}
