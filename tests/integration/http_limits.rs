//! Limits: full queue, bodies in flight, slow senders and readers, and the drain at shutdown.

use std::time::Duration;

use serde_json::{Value, json};
use tinyllava::model::fake::FakeModel;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

use crate::http_setup::*;

fn stream_request(max_tokens: usize) -> Value {
    request(json!("Hi"), json!({"stream": true, "max_tokens": max_tokens}))
}

#[tokio::test]
async fn a_full_queue_is_429_before_anything_is_downloaded() {
    let mut config = config();
    config.engine.max_running_sequences = 1;
    config.engine.max_waiting_sequences = 1;
    let server = server(config, slow_model(&"word ".repeat(500), Duration::from_millis(5))).await;
    let mut running = vec![];
    for _ in 0..2 {
        let mut events = Events::of(server.post(&stream_request(2000)).send().await.unwrap());
        assert!(matches!(events.next().await, Some(Event::Data(_))));
        running.push(events);
    }
    let host = VideoHost::start(clip_bytes(), Some(Duration::ZERO)).await;
    for stream in [false, true] {
        let body = about(&host.url, json!({"stream": stream}));
        let (status, refused) = error(server.post(&body).send().await.unwrap()).await;
        assert_eq!((status, &refused["code"]), (429, &json!("queue_full")));
    }
    assert_eq!(host.hits(), 0);
    assert_eq!(server.metric("tinyllava_rejections_total{reason=\"queue_full\"}").await, 2.0);
    drop(running);
    server.until_idle().await;
    eventually("a place is free again", async || {
        server.post(&request(json!("Hi"), json!({"max_tokens": 1}))).send().await.unwrap().status() == 200
    })
    .await;
}

#[tokio::test]
async fn a_body_announced_too_large_is_refused_before_it_is_sent() {
    let mut config = config();
    config.max_body_bytes = 1000;
    let server = server(config, FakeModel::saying(REPLY)).await;
    let mut socket = connect(&server).await;
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n"
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    assert!(read_head(&mut socket).await.starts_with("HTTP/1.1 413"));
}

#[tokio::test]
async fn a_refusal_reaches_a_client_that_sends_its_whole_body_first() {
    let mut config = config();
    config.max_body_bytes = 1000;
    let server = server(config, FakeModel::saying(REPLY)).await;
    let mut socket = connect(&server).await;
    let body = vec![b' '; 20 << 20];
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(&body).await.unwrap();
    assert!(read_head(&mut socket).await.starts_with("HTTP/1.1 413"));
}

#[tokio::test]
async fn bodies_in_flight_share_one_limit() {
    let mut config = config();
    config.max_body_bytes = 256 << 10;
    config.max_inflight_body_bytes = 256 << 10;
    let server = server(config, FakeModel::saying(REPLY)).await;
    let mut slow = connect(&server).await;
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 250000\r\n\r\n"
    );
    slow.write_all(head.as_bytes()).await.unwrap();
    slow.write_all(&vec![b' '; 240_000]).await.unwrap();
    let big = request(json!("Hi"), json!({"metadata": {"a": "x".repeat(160_000)}}));
    eventually("the second large body is refused", async || {
        let response = server.post(&big).send().await.unwrap();
        if response.status() == 200 {
            return false;
        }
        let (status, refused) = error(response).await;
        assert_eq!((status, &refused["code"]), (429, &json!("too_many_uploads")));
        true
    })
    .await;
    server.ask(&request(json!("Hi"), json!({}))).await;
    server.ask(&request(json!("Hi"), json!({"metadata": {"a": "x".repeat(60_000)}}))).await;
    drop(slow);
    eventually("the room is given back", async || server.post(&big).send().await.unwrap().status() == 200)
        .await;
}

#[tokio::test]
async fn json_of_too_many_values_is_refused_whatever_its_length() {
    let server = simple_server().await;
    for num_parts in [10_000, 200_000] {
        let parts = vec![json!({"type": ""}); num_parts];
        let (status, refused) =
            error(server.post(&request(json!(parts), json!({}))).send().await.unwrap()).await;
        assert_eq!((status, &refused["code"]), (400, &json!("too_many_json_values")));
        assert!(refused["message"].as_str().unwrap().contains("20000"), "{refused}");
    }
    // What is large but of few values is parsed and checked on another thread, with the same answers.
    for (more, param) in [(json!({"temperature": 9}), "temperature"), (json!({"stop": 1}), "stop")] {
        let mut body = request(json!("Hi"), more);
        body["metadata"] = json!({"a": "x,".repeat(100_000)});
        let (status, refused) = error(server.post(&body).send().await.unwrap()).await;
        assert_eq!((status, &refused["param"]), (400, &json!(param)));
    }
}

#[tokio::test]
async fn a_body_that_stops_coming_is_ended() {
    let mut config = config();
    config.body_idle_timeout = Duration::from_millis(200);
    let server = server(config, FakeModel::saying(REPLY)).await;
    let kinds = ["application/json", "multipart/form-data; boundary=b"];
    for kind in kinds {
        let mut socket = connect(&server).await;
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: 1000\r\n\r\n"
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        socket.write_all(b"--b\r\ncontent-disposition: form-data; name=\"request\"\r\n\r\n{").await.unwrap();
        let head = read_head(&mut socket).await;
        assert!(head.starts_with("HTTP/1.1 408"), "{kind}: {head}");
    }
}

#[tokio::test]
async fn a_header_that_stops_coming_is_ended() {
    let mut config = config();
    config.header_read_timeout = Duration::from_millis(200);
    let server = server(config, FakeModel::saying(REPLY)).await;
    let mut socket = connect(&server).await;
    socket.write_all(b"GET /health HTTP/1.1\r\nhost:").await.unwrap();
    let mut rest = vec![];
    socket.read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 408"));
}

#[tokio::test]
async fn a_client_that_does_not_read_blocks_nobody_and_is_cut_off() {
    let mut config = config();
    config.write_stall_timeout = Duration::from_millis(500);
    // Large chunks and a small window: the reply does not fit into the kernel's buffers.
    let name = "m".repeat(3000);
    config.served_model_name = name.clone();
    let server = server(config, FakeModel::saying(&"word ".repeat(600))).await;
    let body = request(json!("Hi"), json!({"model": name, "stream": true, "max_tokens": 3000})).to_string();
    let lazy = TcpSocket::new_v4().unwrap();
    lazy.set_recv_buffer_size(4096).unwrap();
    let mut lazy = lazy.connect(server.url.strip_prefix("http://").unwrap().parse().unwrap()).await.unwrap();
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    lazy.write_all(head.as_bytes()).await.unwrap();
    assert!(read_head(&mut lazy).await.starts_with("HTTP/1.1 200"));
    // Its tokens are made and wait in its own channel; others go on, and the engine forgets the sequence.
    server.ask(&request(json!("Hi"), json!({"model": name, "max_tokens": 5}))).await;
    server.until_idle().await;
    let left = "tinyllava_request_seconds_count{outcome=\"client_left\"}";
    eventually("the connection is cut off", async || {
        server.metrics().await.lines().any(|line| line == format!("{left} 1"))
    })
    .await;
}

#[tokio::test]
async fn shutdown_refuses_new_work_and_lets_running_streams_end() {
    let mut server = server(config(), slow_model(&"word ".repeat(40), Duration::from_millis(10))).await;
    let mut events = Events::of(server.post(&stream_request(1000)).send().await.unwrap());
    assert!(matches!(events.next().await, Some(Event::Data(_))));
    let ended = server.shut_down();
    eventually("the drain has begun", async || server.get("/ready").send().await.unwrap().status() == 503)
        .await;
    let (status, refused) = error(server.post(&request(json!("Hi"), json!({}))).send().await.unwrap()).await;
    assert_eq!((status, &refused["code"]), (503, &json!("draining")));
    assert_eq!(success(server.get("/health").send().await.unwrap()).await["status"], "ok");
    let rest = events.rest().await;
    assert_eq!(text_of(&chunks(&rest), "content").trim(), "word ".repeat(40).trim());
    ended.await.unwrap().unwrap();
    assert!(server.get("/health").send().await.is_err());
}

#[tokio::test]
async fn a_leaving_server_is_not_ready_but_serves_until_balancers_have_noticed() {
    let mut config = config();
    config.drain_delay = Duration::from_secs(3);
    let mut server = server(config, FakeModel::saying("word")).await;
    let before = server.get("/ready").send().await.unwrap();
    assert_eq!((before.status().as_u16(), before.headers().get("connection")), (200, None));
    let ended = server.shut_down();
    eventually("it is not ready", async || server.get("/ready").send().await.unwrap().status() == 503).await;
    let metrics = server.metrics().await;
    for line in ["tinyllava_ready 0", "tinyllava_draining 1"] {
        assert!(metrics.lines().any(|known| known == line), "{line} is missing in\n{metrics}");
    }
    let late = server.post(&request(json!("Hi"), json!({}))).send().await.unwrap();
    assert_eq!(late.headers()["connection"], "close", "no further request may come by this connection");
    success(late).await;
    ended.await.unwrap().unwrap();
    assert!(server.get("/health").send().await.is_err());
}

#[tokio::test]
async fn shutdown_is_bounded_by_the_drain_timeout() {
    let mut config = config();
    config.drain_timeout = Duration::from_millis(200);
    let mut server = server(config, slow_model(&"word ".repeat(600), Duration::from_millis(20))).await;
    let mut events = Events::of(server.post(&stream_request(3000)).send().await.unwrap());
    assert!(matches!(events.next().await, Some(Event::Data(_))));
    let ended = server.shut_down();
    // Who is cut off is told so.
    let rest = format!("{:?}", events.rest().await);
    assert!(rest.contains("draining"), "{rest}");
    ended.await.unwrap().unwrap();
    assert!(server.get("/health").send().await.is_err());
}

async fn connect(server: &Server) -> TcpStream {
    TcpStream::connect(server.url.strip_prefix("http://").unwrap()).await.unwrap()
}

/// What comes first, at least a status line.
async fn read_head(socket: &mut TcpStream) -> String {
    let mut head = vec![];
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        let mut byte = [0];
        if socket.read(&mut byte).await.unwrap() == 0 {
            break;
        }
        head.push(byte[0]);
    }
    String::from_utf8(head).unwrap()
}
