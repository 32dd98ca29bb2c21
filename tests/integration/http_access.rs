//! Who gets in and how: API keys, web pages of other origins, the metrics' own port, and gzip.

use std::process::{Command, Stdio};

use reqwest::Method;
use serde_json::{Value, json};
use tinyllava::{
    http::{self, Access, ApiKey, AppState, cors},
    model::fake::FakeModel,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::http_setup::*;

const PAGE: &str = "https://page.example";

fn access(keys: &[&str]) -> Access {
    Access { keys: keys.iter().map(|key| ApiKey::new(key).unwrap()).collect(), ..Access::default() }
}

/// A ready server that asks for one of `keys`, and its state.
async fn locked(keys: &[&str]) -> (Server, AppState) {
    let mut config = config();
    config.cors_origins = vec![cors::parse_origin(PAGE).unwrap()];
    let state = state(config);
    state.set_access(access(keys));
    load(&state, FakeModel::saying(REPLY));
    (serve(state.clone()).await, state)
}

#[tokio::test]
async fn without_a_known_key_everything_but_the_probes_is_401() {
    let (server, _) = locked(&["one", "two"]).await;
    let hi = request(json!("Hi"), json!({}));
    for asked in [
        server.post(&hi),
        server.post(&hi).bearer_auth("three"),
        server.post(&hi).header("authorization", "Basic b25l"),
        server.get("/v1/models"),
        server.get("/v1/models/fake").bearer_auth("on"),
        server.get(CHAT),
    ] {
        let response = asked.send().await.unwrap();
        assert_eq!(response.headers()["www-authenticate"], "Bearer");
        let (status, refused) = error(response).await;
        assert_eq!((status, &refused["code"]), (401, &json!("invalid_api_key")));
        assert_eq!(refused["type"], "invalid_request_error");
    }
    for open in ["/health", "/ready", "/version", "/metrics", "/openapi.json"] {
        assert_eq!(server.get(open).send().await.unwrap().status(), 200, "{open}");
    }
    assert_eq!(server.get("/nothing").send().await.unwrap().status(), 404);
    for key in ["one", "two"] {
        let reply = success(server.post(&hi).bearer_auth(key).send().await.unwrap()).await;
        assert_eq!(reply["choices"][0]["message"]["content"], "C");
    }
    let counted =
        "tinyllava_http_requests_total{method=\"POST\",route=\"/v1/chat/completions\",status=\"401\"}";
    assert_eq!(server.metric(counted).await, 3.0);
}

#[tokio::test]
async fn a_wrong_key_is_refused_before_the_body_comes() {
    let (server, _) = locked(&["one"]).await;
    let mut socket = TcpStream::connect(server.url.strip_prefix("http://").unwrap()).await.unwrap();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n");
    socket.write_all(head.as_bytes()).await.unwrap();
    let mut start = [0; 12];
    socket.read_exact(&mut start).await.unwrap();
    assert_eq!(&start, b"HTTP/1.1 401");
}

#[tokio::test]
async fn keys_are_replaced_while_the_server_runs() {
    let (server, state) = locked(&["old"]).await;
    let status = async |key| server.get("/v1/models").bearer_auth(key).send().await.unwrap().status();
    assert_eq!(
        (status("old").await, status("new").await),
        (reqwest::StatusCode::OK, 401.try_into().unwrap())
    );
    state.set_access(access(&["new"]));
    assert_eq!(
        (status("old").await, status("new").await),
        (401.try_into().unwrap(), reqwest::StatusCode::OK)
    );
}

#[tokio::test]
async fn a_page_of_an_allowed_origin_may_ask_and_read() {
    let (server, _) = locked(&["one"]).await;
    let preflight = |origin| {
        let request = server.client.request(Method::OPTIONS, format!("{}{CHAT}", server.url));
        request
            .header("origin", origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,x-stainless-os")
    };
    // Browsers send no key with it.
    let response = preflight(PAGE).send().await.unwrap();
    assert_eq!(response.status(), 200);
    let headers = response.headers();
    assert_eq!(headers["access-control-allow-origin"], PAGE);
    assert_eq!(headers["access-control-allow-headers"], "authorization,x-stainless-os");
    assert!(headers["access-control-allow-methods"].to_str().unwrap().contains("POST"));
    assert!(headers.contains_key("x-request-id"));
    let other = preflight("https://other.example").send().await.unwrap();
    assert!(!other.headers().contains_key("access-control-allow-origin"));
    // Also a refusal can be read by the page.
    for (key, status) in [("one", 200), ("two", 401)] {
        let asked = server.post(&request(json!("Hi"), json!({}))).bearer_auth(key).header("origin", PAGE);
        let response = asked.send().await.unwrap();
        assert_eq!(response.status(), status);
        assert_eq!(response.headers()["access-control-allow-origin"], PAGE);
        let exposed = response.headers()["access-control-expose-headers"].to_str().unwrap().to_owned();
        assert!(exposed.contains("x-request-id") && exposed.contains("retry-after"), "{exposed}");
    }
}

#[tokio::test]
async fn pages_of_other_origins_are_kept_out_unless_allowed() {
    let server = simple_server().await;
    let response = server.get("/v1/models").header("origin", PAGE).send().await.unwrap();
    assert!(!response.headers().contains_key("access-control-allow-origin"));
    let options = server.client.request(Method::OPTIONS, format!("{}{CHAT}", server.url));
    assert_eq!(options.send().await.unwrap().status(), 405);
    let mut config = config();
    config.cors_origins = vec![cors::parse_origin("*").unwrap()];
    let server = serve(state(config)).await;
    let response = server.get("/health").header("origin", PAGE).send().await.unwrap();
    assert_eq!(response.headers()["access-control-allow-origin"], "*");
}

#[tokio::test]
async fn metrics_with_a_port_of_their_own_are_there_only() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut config = config();
    config.metrics_listen = Some(address);
    let state = state(config);
    state.set_access(access(&["one"]));
    let server = serve(state.clone()).await;
    let metrics = tokio::spawn(http::run_metrics(listener, state));
    assert_eq!(server.get("/metrics").send().await.unwrap().status(), 404);
    assert_eq!(server.get("/health").send().await.unwrap().status(), 200);
    let there = |path| server.client.get(format!("http://{address}{path}")).send();
    let text = there("/metrics").await.unwrap().text().await.unwrap();
    assert!(text.contains("route=\"/health\""), "{text}");
    for elsewhere in ["/health", "/v1/models", CHAT] {
        assert_eq!(there(elsewhere).await.unwrap().status(), 404, "{elsewhere}");
    }
    metrics.abort();
}

/// What gzip makes of a compressed body.
fn unzipped(body: &[u8]) -> Vec<u8> {
    let mut gzip =
        Command::new("gzip").arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut gzip.stdin.take().unwrap(), body).unwrap();
    gzip.wait_with_output().unwrap().stdout
}

#[tokio::test]
async fn long_replies_are_compressed_for_clients_that_take_it() {
    let server = server(config(), FakeModel::saying(&"word ".repeat(400))).await;
    let body = request(json!("Hi"), json!({"max_tokens": 3000}));
    let plain = server.post(&body).send().await.unwrap();
    assert!(!plain.headers().contains_key("content-encoding"));
    let plain: Value = plain.json().await.unwrap();
    let zipped = server.post(&body).header("accept-encoding", "br, gzip").send().await.unwrap();
    assert_eq!(zipped.headers()["content-encoding"], "gzip");
    assert!(zipped.headers()["vary"].to_str().unwrap().contains("accept-encoding"));
    let zipped = zipped.bytes().await.unwrap();
    assert!(zipped.len() < 1000, "{} bytes", zipped.len());
    let zipped: Value = serde_json::from_slice(&unzipped(&zipped)).unwrap();
    assert_eq!(zipped["choices"], plain["choices"]);
    // Short ones fit into a packet anyway.
    let short = server.get("/health").header("accept-encoding", "gzip").send().await.unwrap();
    assert!(!short.headers().contains_key("content-encoding"));
}

#[tokio::test]
async fn streams_are_never_compressed() {
    let server = server(config(), FakeModel::saying(&"word ".repeat(400))).await;
    let body = request(json!("Hi"), json!({"stream": true, "max_tokens": 3000}));
    let response = server.post(&body).header("accept-encoding", "gzip").send().await.unwrap();
    assert!(!response.headers().contains_key("content-encoding"));
    assert_eq!(response.headers()["x-accel-buffering"], "no");
    assert_eq!(response.headers()["cache-control"], "no-cache");
    let events = Events::of(response).rest().await;
    assert_eq!(text_of(&chunks(&events), "content").trim(), "word ".repeat(400).trim());
}

#[tokio::test]
async fn head_says_what_get_would_and_keeps_the_connection() {
    let server = simple_server().await;
    let whole = server.get("/openapi.json").send().await.unwrap().bytes().await.unwrap();
    let mut socket = TcpStream::connect(server.url.strip_prefix("http://").unwrap()).await.unwrap();
    let head = "HEAD /openapi.json HTTP/1.1\r\nhost: x\r\n";
    let last = "GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let requests = format!("{head}\r\n{head}accept-encoding: gzip\r\n\r\n{last}");
    socket.write_all(requests.as_bytes()).await.unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).await.unwrap();
    let responses: Vec<&str> = text.split("\r\n\r\n").collect();
    let [plain, zipped, health, body] = responses[..] else { panic!("{text}") };
    assert!(plain.contains(&format!("content-length: {}", whole.len())), "{plain}");
    assert!(zipped.starts_with("HTTP/1.1 200") && zipped.contains("content-encoding: gzip"), "{zipped}");
    assert!(health.starts_with("HTTP/1.1 200"), "{health}");
    assert_eq!(body, "{\"status\":\"ok\"}");
}
