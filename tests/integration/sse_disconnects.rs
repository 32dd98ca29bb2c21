//! Clients that leave at any point: afterwards nothing runs, no block is held and no decoder lives.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::future::join_all;
use proptest::{
    prelude::Rng,
    test_runner::{RngAlgorithm, TestRng},
};
use serde_json::json;
use tinyllava::model::fake::FakeModel;
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::http_setup::*;

/// Links the real ffmpeg into `dir`, so that the process list shows which test started it.
fn own_tools(dir: &Path) {
    let path = std::env::var_os("PATH").unwrap();
    let real =
        std::env::split_paths(&path).map(|dir| dir.join("ffmpeg")).find(|path| path.is_file()).unwrap();
    std::os::unix::fs::symlink(real, dir.join("ffmpeg")).unwrap();
}

const HANGING_DECODER: &str =
    "#!/bin/bash\ncase \"$*\" in *framecrc*) exec ffmpeg \"$@\";; esac\nexec -a \"$0\" sleep 600\n";

/// An ffmpeg that lists packets, but never ends when it is to decode.
fn hanging_tool(dir: &Path) -> PathBuf {
    let hanging = dir.join("hanging-ffmpeg");
    std::fs::write(&hanging, HANGING_DECODER).unwrap();
    std::fs::set_permissions(&hanging, std::fs::Permissions::from_mode(0o755)).unwrap();
    hanging
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thirty_two_streams_left_at_random_points_leave_nothing_behind() {
    let tools = tempfile::tempdir().unwrap();
    own_tools(tools.path());
    let mut config = config();
    config.media.ffmpeg_path = Some(tools.path().join("ffmpeg"));
    config.engine.max_running_sequences = 8;
    let server = server(config, slow_model(&format!("{REPLY} ").repeat(4), Duration::from_millis(1))).await;
    let mut random = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let clients = (0..32u64).map(|i| {
        // Half of them leave while the video is fetched and decoded, or later; a few stay to the end.
        let patience = Duration::from_millis(random.next_u64() % 400);
        let stays = i % 8 == 0;
        let end = 0.5 + i as f64 / 32.0;
        let parts = json!([{"type": "video_url", "video_url": {"url": clip_url(), "end": end}}]);
        let content = if i % 4 == 3 { json!("no video") } else { parts };
        let body = request(content, json!({"stream": true, "seed": i}));
        let sent = server.post(&body).send();
        async move {
            let read = async { Events::of(sent.await.unwrap()).rest().await };
            if stays {
                let events = read.await;
                assert_eq!(events.last(), Some(&Event::Done));
            } else {
                let _ = tokio::time::timeout(patience, read).await;
            }
        }
    });
    join_all(clients).await;
    server.until_idle().await;
    let tools = tools.path().to_str().unwrap();
    eventually("no decoder lives", async || processes_with(tools) == 0).await;
    let left = server.metric("tinyllava_request_seconds_count{outcome=\"client_left\"}").await;
    let completed = server.metric("tinyllava_request_seconds_count{outcome=\"completed\"}").await;
    assert!(completed >= 4.0 && left + completed <= 32.0, "{left} left, {completed} completed");
    // Every place is free again.
    let small = request(json!("Hi"), json!({"max_tokens": 1}));
    join_all((0..32).map(|_| server.ask(&small))).await;
}

#[tokio::test]
async fn leaving_while_the_video_is_decoded_kills_the_decoder() {
    for stream in [false, true] {
        let tools = tempfile::tempdir().unwrap();
        let hanging = hanging_tool(tools.path());
        let mut config = config();
        config.keep_alive_interval = Duration::from_millis(50);
        config.media.ffmpeg_path = Some(hanging.clone());
        let server = server(config, FakeModel::saying(REPLY)).await;
        let body = about(&clip_url(), json!({"stream": stream}));
        let asking = tokio::spawn(server.post(&body).send());
        let hanging = hanging.to_str().unwrap().to_owned();
        eventually("the decoder runs", async || processes_with(&hanging) > 0).await;
        if stream {
            let mut events = Events::of(asking.await.unwrap().unwrap());
            assert!(matches!(events.next().await, Some(Event::Comment(_))));
        } else {
            asking.abort();
        }
        eventually("the decoder is gone", async || processes_with(&hanging) == 0).await;
        server.until_idle().await;
    }
}

#[tokio::test]
async fn leaving_after_a_chunked_upload_kills_the_decoder() {
    let tools = tempfile::tempdir().unwrap();
    let hanging = hanging_tool(tools.path());
    let mut config = config();
    config.media.ffmpeg_path = Some(hanging.clone());
    let server = server(config, FakeModel::saying(REPLY)).await;
    let mut body = format!(
        "--b\r\ncontent-disposition: form-data; name=\"request\"\r\n\r\n{}\r\n\
         --b\r\ncontent-disposition: form-data; name=\"video\"; filename=\"a.mp4\"\r\n\r\n",
        request(json!("What?"), json!({}))
    )
    .into_bytes();
    body.extend(clip_bytes());
    body.extend(b"\r\n--b--\r\n");
    let mut socket = TcpStream::connect(server.url.strip_prefix("http://").unwrap()).await.unwrap();
    let mut sent = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\n\
         transfer-encoding: chunked\r\n\r\n{:x}\r\n",
        body.len()
    )
    .into_bytes();
    sent.extend(body);
    // The last boundary comes in one chunk, the end of the body in another.
    sent.extend(b"\r\n3\r\nend\r\n0\r\n\r\n");
    socket.write_all(&sent).await.unwrap();
    let hanging = hanging.to_str().unwrap();
    eventually("the decoder runs", async || processes_with(hanging) > 0).await;
    drop(socket);
    eventually("the decoder is gone", async || processes_with(hanging) == 0).await;
    server.until_idle().await;
}

#[tokio::test]
async fn leaving_while_the_video_is_downloaded_gives_the_place_back() {
    let mut config = config();
    config.engine.max_running_sequences = 1;
    config.engine.max_waiting_sequences = 0;
    let server = server(config, FakeModel::saying(REPLY)).await;
    let host = VideoHost::start(vec![], None).await;
    let asking = tokio::spawn(server.post(&about(&host.url, json!({}))).send());
    eventually("the download has begun", async || host.hits() == 1).await;
    let (status, _) = error(server.post(&request(json!("Hi"), json!({}))).send().await.unwrap()).await;
    assert_eq!(status, 429);
    asking.abort();
    eventually("the place is free", async || {
        server.post(&request(json!("Hi"), json!({}))).send().await.unwrap().status() == 200
    })
    .await;
}
