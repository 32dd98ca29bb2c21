//! `/v1/files` over sockets: what is kept, shown, given back and forgotten, and which uploads are refused.

use std::time::Duration;

use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use tempfile::TempDir;
use tinyllava::{
    config::{Config, MediaConfig},
    media::{FrameSampling, MediaError, MediaLoader, VideoSource},
    model::fake::FakeModel,
};

use crate::http_setup::*;

const FILES: &str = "/v1/files";

fn upload_form(name: &str, bytes: Vec<u8>, purpose: &str) -> Form {
    // The purpose first, as openai-python sends it.
    Form::new()
        .text("purpose", purpose.to_owned())
        .part("file", Part::bytes(bytes).file_name(name.to_owned()))
}

async fn upload(server: &Server, name: &str, bytes: Vec<u8>) -> Value {
    success(server.send_form(FILES, upload_form(name, bytes, "user_data")).await).await
}

async fn refused(server: &Server, form: Form) -> (u16, Value) {
    error(server.send_form(FILES, form).await).await
}

fn ids(list: &Value) -> Vec<&str> {
    list["data"].as_array().unwrap().iter().map(|file| file["id"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_file_is_uploaded_shown_listed_read_and_deleted() {
    let server = simple_server().await;
    let file = upload(&server, "clip.mp4", clip_bytes()).await;
    let id = file["id"].as_str().unwrap();
    assert!(id.starts_with("file-"), "{file}");
    assert_eq!(file["object"], "file");
    assert_eq!(file["bytes"], clip_bytes().len());
    assert_eq!(file["filename"], "clip.mp4");
    assert_eq!(file["purpose"], "user_data");
    assert_eq!(file["status"], "processed");
    assert_eq!(file["expires_at"].as_u64(), file["created_at"].as_u64().map(|at| at + 24 * 3600));
    let path = format!("{FILES}/{id}");
    assert_eq!(success(server.get(&path).send().await.unwrap()).await, file);
    assert_eq!(success(server.get(FILES).send().await.unwrap()).await["data"], json!([file]));
    let content = server.get(&format!("{path}/content")).send().await.unwrap();
    assert_eq!(content.headers()["content-length"], clip_bytes().len().to_string().as_str());
    assert_eq!(content.headers()["x-content-type-options"], "nosniff");
    assert_eq!(content.bytes().await.unwrap(), clip_bytes());
    let deleted = success(server.delete(&path).await).await;
    assert_eq!(deleted, json!({"id": id, "object": "file", "deleted": true}));
    for gone in [server.delete(&path).await, server.get(&path).send().await.unwrap()] {
        let (status, refused) = error(gone).await;
        assert_eq!((status, &refused["code"]), (404, &json!("file_not_found")));
    }
}

#[tokio::test]
async fn lists_have_pages_orders_and_purposes() {
    let server = simple_server().await;
    let mut made = vec![];
    for i in 0..5u8 {
        let purpose = if i == 2 { "vision" } else { "user_data" };
        let form = upload_form("a", vec![i; 3], purpose);
        let file = success(server.send_form(FILES, form).await).await;
        made.push(file["id"].as_str().unwrap().to_owned());
        // Files of one millisecond have no order.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let list =
        async |query: &str| success(server.get(&format!("{FILES}?{query}")).send().await.unwrap()).await;
    assert_eq!(ids(&list("order=asc").await), made);
    let first = list("limit=2").await;
    assert_eq!((ids(&first), first["has_more"].as_bool()), (vec![&*made[4], &*made[3]], Some(true)));
    assert_eq!((&first["first_id"], &first["last_id"]), (&json!(made[4]), &json!(made[3])));
    let last = list(&format!("limit=3&after={}", made[3])).await;
    assert_eq!(
        (ids(&last), last["has_more"].as_bool()),
        (vec![&*made[2], &*made[1], &*made[0]], Some(false))
    );
    assert_eq!(ids(&list("purpose=vision").await), [&made[2]]);
    let none = list("purpose=batch").await;
    assert_eq!((ids(&none).len(), &none["first_id"]), (0, &Value::Null));
    for (query, param) in [
        ("limit=0", "limit"),
        ("limit=x", "query"),
        ("order=up", "query"),
        ("after=file-0", "after"),
        ("page=2", "query"),
    ] {
        let (status, refused) = error(server.get(&format!("{FILES}?{query}")).send().await.unwrap()).await;
        assert_eq!((status, &refused["param"]), (400, &json!(param)), "{query}");
    }
}

#[tokio::test]
async fn faulty_uploads_are_refused_with_the_name_of_the_part() {
    let mut config = config();
    config.media.max_video_bytes = 1000;
    config.media.files.max_bytes = 1500;
    config.media.files.max_age = Duration::from_secs(1000);
    let server = server(config, FakeModel::saying(REPLY)).await;
    let form = || upload_form("a", vec![1; 900], "vision");
    for (form, param) in [
        (Form::new().text("purpose", "vision"), "file"),
        (upload_form("a", vec![], "vision"), "file"),
        (Form::new().part("file", Part::bytes(vec![1])), "purpose"),
        (upload_form("a", vec![1], "fun"), "purpose"),
        (form().text("purpose", "vision"), "purpose"),
        (form().text("model", "x"), "file"),
        (form().text("expires_after[anchor]", "now"), "expires_after[anchor]"),
        (form().text("expires_after[seconds]", "soon"), "expires_after[seconds]"),
        (form().text("expires_after[seconds]", "0"), "expires_after[seconds]"),
        (form().text("expires_after[seconds]", "1001"), "expires_after[seconds]"),
        (upload_form(&"x".repeat(300), vec![1], "vision"), "file"),
        (upload_form("a", vec![1], &"x".repeat(100)), "purpose"),
    ] {
        let (status, refused) = refused(&server, form).await;
        assert_eq!((status, &refused["param"]), (400, &json!(param)), "{refused}");
    }
    let (status, too_large) = refused(&server, upload_form("a", vec![1; 1001], "vision")).await;
    assert_eq!((status, &too_large["code"]), (413, &json!("file_too_large")));
    let lasting = form().text("expires_after[anchor]", "created_at").text("expires_after[seconds]", "500");
    let kept = success(server.send_form(FILES, lasting).await).await;
    assert_eq!(kept["expires_at"].as_u64(), kept["created_at"].as_u64().map(|at| at + 500));
    let (status, full) = refused(&server, upload_form("b", vec![2; 900], "vision")).await;
    assert_eq!((status, &full["code"]), (413, &json!("files_full")));
    let json = server.client.post(format!("{}{FILES}", server.url)).json(&json!({}));
    assert_eq!(error(json.send().await.unwrap()).await.0, 415);
    // Nothing but the one that was accepted is left.
    assert_eq!(ids(&success(server.get(FILES).send().await.unwrap()).await), [kept["id"].as_str().unwrap()]);
}

#[tokio::test]
async fn what_is_no_id_names_no_file() {
    let server = simple_server().await;
    for id in ["file-0", "..%2F..%2Fetc%2Fpasswd", "file-%2e%2e%2fx", "file-%00", "FILE-1", "file-%FF"] {
        for path in [format!("{FILES}/{id}"), format!("{FILES}/{id}/content")] {
            assert_eq!(error(server.get(&path).send().await.unwrap()).await.0, 404, "{path}");
        }
    }
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_nothing() {
    use tokio::io::AsyncWriteExt;
    let dir = TempDir::new().unwrap();
    let mut config = config();
    config.media.files.dir = Some(dir.path().into());
    let server = server(config, FakeModel::saying(REPLY)).await;
    let uploads = dir.path().join("uploads");
    let count = || std::fs::read_dir(&uploads).unwrap().count();
    let mut socket =
        tokio::net::TcpStream::connect(server.url.strip_prefix("http://").unwrap()).await.unwrap();
    let head = "POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 9000000\r\n\
        content-type: multipart/form-data; boundary=x\r\n\r\n\
        --x\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(&vec![7; 3 << 20]).await.unwrap();
    eventually("the upload is on disk", async || count() == 1).await;
    drop(socket);
    eventually("the upload is gone", async || count() == 0).await;
    assert_eq!(ids(&success(server.get(FILES).send().await.unwrap()).await).len(), 0);
}

#[tokio::test]
async fn a_server_on_the_same_directory_finds_the_files_again() {
    let dir = TempDir::new().unwrap();
    let with_dir = || {
        let mut config = config();
        config.media.files.dir = Some(dir.path().into());
        config
    };
    let first = server(with_dir(), FakeModel::saying(REPLY)).await;
    let file = upload(&first, "clip.mp4", clip_bytes()).await;
    drop(first);
    let freed = async || MediaLoader::new(with_dir().media, 28).is_ok();
    eventually("the first server is gone", freed).await;
    let second = server(with_dir(), FakeModel::saying(REPLY)).await;
    let path = format!("{FILES}/{}", file["id"].as_str().unwrap());
    assert_eq!(success(second.get(&path).send().await.unwrap()).await, file);
    let content = second.get(&format!("{path}/content")).send().await.unwrap();
    assert_eq!(content.bytes().await.unwrap(), clip_bytes());
}

#[tokio::test]
async fn a_question_names_an_uploaded_video_by_its_id() {
    let server = simple_server().await;
    let ask = async |id: &str| {
        let file = json!([{"type": "text", "text": "What?"}, {"type": "file", "file": {"file_id": id}}]);
        server.post(&request(file, json!({}))).send().await.unwrap()
    };
    let file = upload(&server, "clip.mp4", clip_bytes()).await;
    let id = file["id"].as_str().unwrap();
    let reply = success(ask(id).await).await;
    let direct = server.ask(&about(&clip_url(), json!({}))).await;
    assert_eq!((&reply["video"], &reply["choices"]), (&direct["video"], &direct["choices"]));
    // By its content it is the same video: decoded and encoded once.
    assert_eq!(server.metric("tinyllava_stage_seconds_count{stage=\"decode\"}").await, 1.0);
    assert!(direct["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap() > 0);
    success(server.delete(&format!("{FILES}/{id}")).await).await;
    for id in [id, "file-0", "../../etc/passwd"] {
        let (status, refused) = error(ask(id).await).await;
        assert_eq!(status, 400, "{refused}");
        assert!(refused["param"].as_str().unwrap().starts_with("messages[0].content[1]"), "{refused}");
    }
}

#[tokio::test]
async fn an_uploaded_picture_is_a_still() {
    let server = simple_server().await;
    let mut png = std::io::Cursor::new(vec![]);
    image::RgbImage::from_pixel(20, 10, image::Rgb([200, 30, 30]))
        .write_to(&mut png, image::ImageFormat::Png)
        .unwrap();
    let file = upload(&server, "red.png", png.into_inner()).await;
    let input = json!([{"role": "user", "content": [
        {"type": "input_image", "file_id": file["id"], "detail": "auto"}, {"type": "input_text", "text": "What?"},
    ]}]);
    let response = success(server.send_json("/v1/responses", &json!({"input": input})).await).await;
    assert_eq!(
        (&response["video"]["container"], &response["video"]["codec"]),
        (&json!("image"), &json!("png"))
    );
}

#[tokio::test]
async fn a_stored_video_has_the_frames_of_the_video_itself() {
    let media = MediaLoader::new(MediaConfig { num_frames: 4, ..Config::default().media }, 28).unwrap();
    let mut upload = media.files().begin().unwrap();
    upload.write(&clip_bytes()).unwrap();
    let label =
        tinyllava::media::FileLabel { filename: "a".into(), purpose: "vision".into(), lifetime: None };
    let id = upload.finish(label).unwrap().id;
    let load = |source| media.load(source, FrameSampling::default());
    let stored = load(VideoSource::FileId(id.clone())).await.unwrap();
    let direct = load(VideoSource::Bytes(clip_bytes().into())).await.unwrap();
    assert_eq!((stored.digest, &stored.rgb), (direct.digest, &direct.rgb));
    assert!(std::sync::Arc::ptr_eq(&stored.rgb, &direct.rgb), "the frames of the stored video are known");
    media.files().delete(&id).unwrap();
    let gone = load(VideoSource::FileId(id)).await.unwrap_err();
    assert!(matches!(gone, MediaError::Refused { param: "file_id", .. }), "{gone:?}");
}
