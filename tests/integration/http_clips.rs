//! Consecutive pictures of a message are the frames of one video, in the shapes that real clients
//! send; and the limits on the videos of a conversation.

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tinyllava::{config::Config, model::fake::FakeModel};

use crate::http_setup::*;

fn png(shade: u8) -> String {
    let mut bytes = std::io::Cursor::new(vec![]);
    let picture = image::RgbImage::from_pixel(20, 10, image::Rgb([shade; 3]));
    picture.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    format!("data:image/png;base64,{}", STANDARD.encode(bytes.into_inner()))
}

fn url(number: usize) -> String {
    png(number as u8 * 3)
}

fn image_url(number: usize) -> Value {
    json!({"type": "image_url", "image_url": {"url": url(number), "detail": "low"}})
}

fn text(text: &str) -> Value {
    json!({"type": "text", "text": text})
}

/// Replaces each `null` in `parts` by `frames` pictures.
fn content(parts: Value, frames: usize) -> Value {
    let parts = parts.as_array().unwrap().iter().flat_map(|part| match part {
        Value::Null => (0..frames).map(image_url).collect(),
        part => vec![part.clone()],
    });
    parts.collect()
}

async fn refused(server: &Server, body: &Value) -> (u16, Value) {
    error(server.post(body).send().await.unwrap()).await
}

#[tokio::test]
async fn frames_that_clients_send_as_pictures_are_one_video() {
    let server = simple_server().await;
    let urls: Vec<String> = (0..8).map(url).collect();
    let list = json!([text("What?"), {"type": "video", "video": urls}]);
    let list = server.ask(&request(list, json!({}))).await;
    assert_eq!(list["video"]["sampled_indices"], json!([0, 2, 4, 7]), "spread to the model's number");
    for (client, parts) in [
        ("lmms-eval, question last", json!([null, text("What?")])),
        ("VLMEvalKit, instruction first", json!([text(" "), null, text("What?")])),
        ("OpenAI's cookbook, texts as bare strings", json!(["What?", null])),
        ("agents, text after", json!([null, "What?"])),
    ] {
        let reply = server.ask(&request(content(parts, 8), json!({}))).await;
        assert_eq!(reply["video"], list["video"], "{client}");
        assert_eq!(reply["usage"]["prompt_tokens_details"]["video_tokens"], 8, "{client}");
        // The prompts differ at most by a space.
        assert!(reply["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() > Some(100), "{client}");
    }
    let times = (0..8).flat_map(|i| [text(&format!("<{i}.0 seconds>")), image_url(i)]);
    let times: Vec<Value> = times.chain([text("What?")]).collect();
    let captioned = server.ask(&request(json!(times), json!({}))).await;
    assert_eq!(captioned["video"], list["video"], "captions do not separate frames");
    let elements: Vec<Value> = (0..8).map(image_url).collect();
    let elements = json!([text("What?"), {"type": "video", "video": elements}]);
    assert_eq!(server.ask(&request(elements, json!({}))).await["video"], list["video"]);
    // OpenAI's current cookbook uses /v1/responses.
    let frames = (0..8).map(|i| json!({"type": "input_image", "image_url": url(i)}));
    let parts: Vec<Value> =
        [json!({"type": "input_text", "text": "What?"})].into_iter().chain(frames).collect();
    let body = json!({"model": MODEL, "input": [{"role": "user", "content": parts}]});
    let response = success(server.send_json("/v1/responses", &body).await).await;
    assert_eq!(response["video"], list["video"]);
}

#[tokio::test]
async fn pictures_may_have_a_rate_or_times_or_be_stills() {
    let server = simple_server().await;
    let ask = async |image: Value| {
        let more = json!({"media_io_kwargs": {"image": image}});
        server.ask(&request(content(json!([null, text("What?")]), 4), more)).await["video"].clone()
    };
    let plain = ask(json!({})).await;
    assert_eq!((&plain["duration"], &plain["sampled_timestamps"]), (&Value::Null, &json!([])));
    let rate = ask(json!({"fps": 2, "as_video": true})).await;
    assert_eq!((&rate["fps"], &rate["sampled_timestamps"]), (&json!(2.0), &json!([0.0, 0.5, 1.0, 1.5])));
    let timed = ask(json!({"timestamps": [1, 2.5, 4, 10]})).await;
    assert_eq!((&timed["fps"], &timed["sampled_timestamps"]), (&Value::Null, &json!([1.0, 2.5, 4.0, 10.0])));
    let window =
        json!({"media_io_kwargs": {"image": {"fps": 1}, "video": {"fps": 3, "start": 1.0, "end": 3.0}}});
    let window = server.ask(&request(content(json!([null]), 8), window)).await;
    assert_eq!(window["video"]["sampled_indices"], json!([1, 1, 1, 2]), "the rate of videos is another");
    for (image, fault) in [
        (json!({"timestamps": [1, 2, 3]}), "timestamps"),
        (json!({"timestamps": [2, 1, 3, 4]}), "timestamps"),
        (json!({"timestamps": [1, 2, 3, 4], "fps": 1}), "timestamps"),
        (json!({"fps": 0}), "fps"),
        (json!({"odd": 1}), "odd"),
    ] {
        let more = json!({"media_io_kwargs": {"image": image}});
        let (status, refused) = refused(&server, &request(content(json!([null]), 4), more)).await;
        assert_eq!((status, &refused["param"]), (400, &json!(format!("media_io_kwargs.image.{fault}"))));
    }
}

#[tokio::test]
async fn pictures_are_stills_where_asked() {
    let several = Config { max_videos_per_request: 4, ..config() };
    let by_flag = Config { images_as_stills: true, ..several.clone() };
    let parts = content(json!([null, text("What?")]), 3);
    for (config, as_video, stills) in [
        (several.clone(), json!(null), false),
        (several, json!(false), true),
        (by_flag.clone(), json!(null), true),
        (by_flag, json!(true), false),
    ] {
        let server = server(config, FakeModel::saying(REPLY)).await;
        let more = json!({"media_io_kwargs": {"image": {"as_video": as_video}}});
        let reply = server.ask(&request(parts.clone(), more)).await;
        if stills {
            let containers: Vec<&Value> = (0..3).map(|i| &reply["videos"][i]["container"]).collect();
            assert_eq!(containers, [&json!("image"); 3], "{reply}");
        } else {
            assert_eq!(
                (&reply["video"]["container"], &reply["video"]["source_frames"]),
                (&json!("frames"), &json!(3))
            );
        }
    }
    // A sentence separates two pictures, and the default limit is one video per message.
    let server = simple_server().await;
    let parted = json!([image_url(0), text("and then"), image_url(1)]);
    let (status, refused) = refused(&server, &request(parted, json!({}))).await;
    assert_eq!((status, &refused["param"]), (400, &json!("messages[0].content[2]")));
    assert!(refused["message"].as_str().unwrap().contains("consecutive pictures are one video"), "{refused}");
}

#[tokio::test]
async fn a_clip_has_at_most_the_frames_of_a_video() {
    let server = simple_server().await;
    let most = server.ask(&request(content(json!([text("What?"), null]), 64), json!({}))).await;
    assert_eq!(most["video"]["source_frames"], 64);
    let (status, refused) =
        refused(&server, &request(content(json!([text("What?"), null]), 65), json!({}))).await;
    assert_eq!((status, &refused["param"]), (400, &json!("messages[0].content[1]")));
    let message = refused["message"].as_str().unwrap();
    assert!(message.contains("65 pictures") && message.contains("at most 64"), "{message}");
}

#[tokio::test]
async fn a_history_of_videos_is_no_reason_to_refuse_the_next() {
    let server = simple_server().await;
    let about = |number: usize| json!({"role": "user", "content": [text("What?"), image_url(number), image_url(number + 1)]});
    let answer = json!({"role": "assistant", "content": "C"});
    let conversation = |turns: usize| {
        let turns = (0..turns).flat_map(|turn| [answer.clone(), about(turn)]);
        let messages: Vec<Value> = turns.skip(1).collect();
        json!({"model": MODEL, "messages": messages, "max_tokens": 5})
    };
    for turns in [1, 2, 5] {
        let reply = server.ask(&conversation(turns)).await;
        assert_eq!(reply["usage"]["prompt_tokens_details"]["video_tokens"], 8 * turns);
    }
    // Each clip is decoded once over all requests.
    assert_eq!(server.metric("tinyllava_stage_seconds_count{stage=\"decode\"}").await, 5.0);
    let (status, refused) = refused(&server, &conversation(17)).await;
    assert_eq!((status, &refused["param"]), (400, &json!("messages[32].content[1]")));
    assert!(refused["message"].as_str().unwrap().contains("at most 16"), "{refused}");
}

#[tokio::test]
async fn a_history_that_cannot_fit_the_context_is_refused_before_its_videos_are_fetched() {
    let mut config = Config { max_videos_per_request: 4, ..config() };
    config.engine.max_context_tokens = 24;
    let server = server(config, FakeModel::saying(REPLY)).await;
    let host = VideoHost::start(clip_bytes(), None).await;
    let video = json!({"type": "video_url", "video_url": host.url});
    let (status, refused) = refused(&server, &request(json!([video, video, video]), json!({}))).await;
    assert_eq!((status, &refused["code"]), (400, &json!("context_length_exceeded")), "{refused}");
    assert_eq!(host.hits(), 0);
}
