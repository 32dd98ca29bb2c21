//! The same service behind TLS: replies, streams, the drain, and clients that are in no hurry to shake hands.

use std::{path::PathBuf, time::Duration};

use reqwest::{Certificate, Client};
use serde_json::json;
use tempfile::TempDir;
use tinyllava::{
    config::Config,
    http::{Access, AppState, tls},
    model::fake::FakeModel,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::http_setup::*;

/// A self-signed certificate for 127.0.0.1 in files.
pub struct SelfSigned {
    _dir: TempDir,
    pub pem: String,
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl SelfSigned {
    pub fn new() -> Self {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".into()]).unwrap();
        let dir = TempDir::new().unwrap();
        let (certificate, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
        let pem = made.cert.pem();
        std::fs::write(&certificate, &pem).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        SelfSigned { _dir: dir, pem, certificate, key }
    }

    fn access(&self) -> Access {
        Access { tls: Some(tls::load(&self.certificate, &self.key).unwrap()), ..Access::default() }
    }

    /// Trusts this certificate and none else.
    pub fn client(&self) -> Client {
        let root = Certificate::from_pem(self.pem.as_bytes()).unwrap();
        let builder = Client::builder().no_proxy().tls_built_in_root_certs(false);
        builder.add_root_certificate(root).build().unwrap()
    }
}

/// A ready server that speaks TLS, with a client that trusts it.
async fn secure(config: Config, model: FakeModel, certificate: &SelfSigned) -> (Server, AppState) {
    let state = state(config);
    state.set_access(certificate.access());
    load(&state, model);
    let mut server = serve(state.clone()).await;
    server.url = server.url.replace("http://", "https://");
    server.client = certificate.client();
    (server, state)
}

async fn connect(server: &Server) -> TcpStream {
    TcpStream::connect(server.url.strip_prefix("https://").unwrap()).await.unwrap()
}

#[tokio::test]
async fn replies_and_streams_are_the_same_behind_tls() {
    let certificate = SelfSigned::new();
    let (server, _) = secure(config(), FakeModel::saying(REPLY), &certificate).await;
    let reply = server.ask(&about(&clip_url(), json!({}))).await;
    assert_eq!(reply["choices"][0]["message"]["content"], "C");
    let body = about(&clip_url(), json!({"stream": true}));
    let events = Events::of(server.post(&body).send().await.unwrap()).rest().await;
    assert_eq!(text_of(&chunks(&events), "reasoning_content"), "The person bends.");
    assert_eq!(text_of(&chunks(&events), "content"), "C");
    // Larger than a TLS record and than the buffers in between.
    let form = form(&about("", json!({})), vec![b' '; 3 << 20]);
    assert_eq!(server.upload(form).send().await.unwrap().status(), 400);
}

#[tokio::test]
async fn a_client_that_trusts_another_certificate_or_speaks_plain_http_gets_nothing() {
    let certificate = SelfSigned::new();
    let (server, _) = secure(config(), FakeModel::saying(REPLY), &certificate).await;
    let refused = SelfSigned::new().client().get(format!("{}/health", server.url)).send().await;
    assert!(refused.unwrap_err().is_connect());
    let mut plain = connect(&server).await;
    plain.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut rest = vec![];
    // A TLS alert, or nothing.
    let _ = plain.read_to_end(&mut rest).await;
    assert!(!rest.starts_with(b"HTTP"), "{rest:?}");
    assert_eq!(server.get("/health").send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_handshake_that_does_not_come_holds_nobody_up_and_is_ended() {
    let mut config = config();
    config.header_read_timeout = Duration::from_millis(300);
    let certificate = SelfSigned::new();
    let (server, _) = secure(config, FakeModel::saying(REPLY), &certificate).await;
    let mut silent = connect(&server).await;
    assert_eq!(server.get("/health").send().await.unwrap().status(), 200);
    let mut rest = vec![];
    silent.read_to_end(&mut rest).await.unwrap();
    assert!(rest.is_empty());
}

#[tokio::test]
async fn shutdown_lets_streams_behind_tls_end() {
    let certificate = SelfSigned::new();
    let model = slow_model(&"word ".repeat(40), Duration::from_millis(10));
    let (mut server, _) = secure(config(), model, &certificate).await;
    let body = request(json!("Hi"), json!({"stream": true, "max_tokens": 1000}));
    let mut events = Events::of(server.post(&body).send().await.unwrap());
    assert!(matches!(events.next().await, Some(Event::Data(_))));
    let silent = connect(&server).await;
    let ended = server.shut_down();
    eventually("the drain has begun", async || server.get("/ready").send().await.unwrap().status() == 503)
        .await;
    let rest = events.rest().await;
    assert_eq!(text_of(&chunks(&rest), "content").trim(), "word ".repeat(40).trim());
    ended.await.unwrap().unwrap();
    assert!(server.get("/health").send().await.is_err());
    drop(silent);
}

#[tokio::test]
async fn the_certificate_is_replaced_while_the_server_runs() {
    let (old, new) = (SelfSigned::new(), SelfSigned::new());
    let (server, state) = secure(config(), FakeModel::saying(REPLY), &old).await;
    let url = format!("{}/health", server.url);
    assert!(new.client().get(&url).send().await.is_err());
    state.set_access(new.access());
    assert_eq!(new.client().get(&url).send().await.unwrap().status(), 200);
    // What is connected stays connected; who comes anew sees the new one.
    assert!(old.client().get(&url).send().await.is_err());
}

#[test]
fn a_certificate_that_cannot_be_used_is_one_sentence_with_its_file() {
    let (one, other) = (SelfSigned::new(), SelfSigned::new());
    for (certificate, key, said) in [
        (&one.certificate, &other.key, "cannot be used together"),
        (&one.key, &one.key, "has no certificate"),
        (&one.certificate, &one.certificate, "has no private key"),
        (&PathBuf::from("no-such.pem"), &one.key, "from no-such.pem"),
    ] {
        let error = tls::load(certificate, key).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}
