//! OpenTelemetry: what a collector gets of requests, and that nobody waits for one.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, http::HeaderMap, routing};
use bytes::Bytes;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value as Any},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use prost::Message;
use serde_json::{Value, json};
use tinyllava::{config::Config, model::fake::FakeModel};
use tokio::net::TcpListener;

use crate::{http_setup::*, server_process};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";
const STAGES: [&str; 10] = [
    "engine.decode",
    "engine.encode",
    "engine.prefill",
    "engine.queue",
    "media.decode",
    "media.decode_wait",
    "media.fetch",
    "media.probe",
    "media.resize",
    "prompt",
];

/// Keeps all spans that it is sent.
struct Collector {
    url: String,
    spans: Arc<Mutex<Vec<Span>>>,
    /// Of the service.
    resource: Arc<Mutex<Vec<KeyValue>>>,
}

impl Collector {
    async fn start() -> Self {
        let (spans, resource) = (Arc::<Mutex<Vec<Span>>>::default(), Arc::<Mutex<Vec<KeyValue>>>::default());
        let kept = (spans.clone(), resource.clone());
        let receive = move |headers: HeaderMap, body: Bytes| async move {
            assert_eq!(headers["content-type"], "application/x-protobuf");
            for all in ExportTraceServiceRequest::decode(body).unwrap().resource_spans {
                *kept.1.lock().unwrap() = all.resource.unwrap().attributes;
                kept.0.lock().unwrap().extend(all.scope_spans.into_iter().flat_map(|scope| scope.spans));
            }
        };
        let app = Router::new().route("/v1/traces", routing::post(receive));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async { axum::serve(listener, app).await });
        Collector { url, spans, resource }
    }

    /// Sends to this one, soon.
    fn config(&self) -> Config {
        let mut config = config();
        config.traces.endpoint = Some(self.url.parse().unwrap());
        config.traces.batch_delay = Duration::from_millis(20);
        config
    }

    /// A request's server span and those under it, once they are here.
    async fn request(&self) -> (Span, Vec<Span>) {
        let server = |span: &&Span| span.kind == SpanKind::Server as i32;
        eventually("the trace is here", async || self.spans.lock().unwrap().iter().any(|span| server(&span)))
            .await;
        let spans = std::mem::take(&mut *self.spans.lock().unwrap());
        let (mut servers, stages): (Vec<_>, Vec<_>) = spans.into_iter().partition(|span| server(&span));
        assert_eq!(servers.len(), 1, "{servers:?}");
        (servers.remove(0), stages)
    }
}

fn attributes(attributes: &[KeyValue]) -> BTreeMap<String, Value> {
    let json = |value: Any| match value {
        Any::StringValue(text) => json!(text),
        Any::IntValue(number) => json!(number),
        Any::DoubleValue(number) => json!(number),
        Any::BoolValue(yes) => json!(yes),
        Any::ArrayValue(values) => json!(format!("{:?}", values.values)),
        other => panic!("{other:?}"),
    };
    let pair = |pair: &KeyValue| (pair.key.clone(), json(pair.value.clone().unwrap().value.unwrap()));
    attributes.iter().map(pair).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn status(span: &Span) -> (StatusCode, String) {
    let status = span.status.clone().unwrap_or_default();
    (StatusCode::try_from(status.code).unwrap(), status.message)
}

fn traceparent(flags: &str) -> String {
    format!("00-{TRACE}-{CALLER}-{flags}")
}

/// A web server that gives the clip away and keeps the headers it was asked with.
async fn header_keeping_host() -> (String, Arc<Mutex<HeaderMap>>) {
    let kept = Arc::<Mutex<HeaderMap>>::default();
    let keeper = kept.clone();
    let give = move |headers: HeaderMap| async move {
        *keeper.lock().unwrap() = headers;
        ([("content-type", "video/mp4")], clip_bytes())
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/clip.mp4", listener.local_addr().unwrap());
    let app = Router::new().route("/clip.mp4", routing::get(give));
    tokio::spawn(async { axum::serve(listener, app).await });
    (url, kept)
}

#[tokio::test]
async fn a_question_is_one_trace_with_a_span_for_each_stage() {
    let collector = Collector::start().await;
    let server = server(collector.config(), FakeModel::saying(REPLY)).await;
    let (url, asked_with) = header_keeping_host().await;
    let body = about(&format!("{url}?key=secret"), json!({}));
    let request =
        server.post(&body).header("traceparent", traceparent("01")).header("tracestate", "vendor=1");
    success(request.send().await.unwrap()).await;
    let (root, stages) = collector.request().await;
    assert_eq!((hex(&root.trace_id), hex(&root.parent_span_id)), (TRACE.into(), CALLER.into()));
    assert_eq!((root.name.as_str(), root.trace_state.as_str()), ("POST /v1/chat/completions", "vendor=1"));
    let mut names: Vec<&str> = stages.iter().map(|span| span.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, STAGES);
    for stage in &stages {
        assert_eq!((hex(&stage.trace_id), &stage.parent_span_id), (TRACE.into(), &root.span_id));
        assert!(root.start_time_unix_nano <= stage.start_time_unix_nano, "{stage:?} before {root:?}");
        assert!(stage.start_time_unix_nano <= stage.end_time_unix_nano);
        assert!(stage.end_time_unix_nano <= root.end_time_unix_nano);
        assert_eq!(status(stage).0, StatusCode::Unset);
    }
    let told = attributes(&root.attributes);
    for (name, value) in [
        ("http.request.method", json!("POST")),
        ("http.route", json!("/v1/chat/completions")),
        ("url.scheme", json!("http")),
        ("http.response.status_code", json!(200)),
        ("gen_ai.operation.name", json!("chat")),
        ("gen_ai.request.model", json!(MODEL)),
        ("gen_ai.usage.output_tokens", json!(REPLY.len())),
        ("tinyllava.video_frames", json!(4)),
        ("tinyllava.outcome", json!("completed")),
    ] {
        assert_eq!(told[name], value, "{name} in {told:?}");
    }
    assert!(told["gen_ai.usage.input_tokens"].as_u64().unwrap() > 8);
    assert!(told["gen_ai.response.finish_reasons"].as_str().unwrap().contains("stop"));
    let all = format!("{root:?}{stages:?}");
    assert!(!all.contains("secret") && !all.contains("What?") && !all.contains("bends"), "{all}");
    assert_eq!(attributes(&collector.resource.lock().unwrap())["service.name"], "tinyllava");
    let asked_with = asked_with.lock().unwrap();
    assert_eq!(asked_with["traceparent"], format!("00-{TRACE}-{}-01", hex(&root.span_id)).as_str());
    assert_eq!(asked_with["tracestate"], "vendor=1");
}

#[tokio::test]
async fn a_fault_is_on_the_span_of_its_stage_and_ours_on_the_request_too() {
    let collector = Collector::start().await;
    let mut model = FakeModel::saying(REPLY);
    model.poison = Some(u32::from(b'#'));
    let server = server(collector.config(), model).await;
    error(server.post(&about("data:video/mp4;base64,AAAA", json!({}))).send().await.unwrap()).await;
    let (root, stages) = collector.request().await;
    assert_eq!(status(&root).0, StatusCode::Unset, "the client's fault");
    assert_eq!(attributes(&root.attributes)["tinyllava.outcome"], "refused");
    let probe = stages.iter().find(|span| span.name == "media.probe").unwrap();
    assert_eq!(status(probe), (StatusCode::Error, "video_unsupported".into()));
    error(server.post(&request(json!("#"), json!({}))).send().await.unwrap()).await;
    let (root, stages) = collector.request().await;
    assert_eq!(status(&root), (StatusCode::Error, "internal_error".into()));
    let told = attributes(&root.attributes);
    assert_eq!(
        (&told["error.type"], &told["http.response.status_code"]),
        (&json!("internal_error"), &json!(500))
    );
    let prefill = stages.iter().find(|span| span.name == "engine.prefill").unwrap();
    assert_eq!(status(prefill), (StatusCode::Error, "internal_error".into()));
}

#[tokio::test]
async fn a_caller_decides_whether_its_trace_is_kept_and_probes_have_none() {
    let collector = Collector::start().await;
    let mut config = collector.config();
    config.traces.sample_ratio = 0.0;
    let server = server(config, FakeModel::saying(REPLY)).await;
    let ask = |flags: Option<&str>| {
        let request = server.post(&request(json!("Hi"), json!({})));
        flags.map_or(request.try_clone().unwrap(), |flags| request.header("traceparent", traceparent(flags)))
    };
    success(ask(None).send().await.unwrap()).await;
    success(ask(Some("00")).send().await.unwrap()).await;
    success(server.get("/health").header("traceparent", traceparent("01")).send().await.unwrap()).await;
    success(ask(Some("01")).send().await.unwrap()).await;
    let (root, _) = collector.request().await;
    assert_eq!(hex(&root.parent_span_id), CALLER);
    assert!(collector.spans.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_binary_sends_its_last_spans_before_it_ends_and_logs_the_trace() {
    let collector = Collector::start().await;
    let (url, spans) = (collector.url.clone(), collector.spans.clone());
    let ended = tokio::task::spawn_blocking(move || {
        let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str()), ("OTEL_SERVICE_NAME", "videos")];
        let server = server_process::Server::start_in(&environment, &["--log-format", "json"]);
        let asked = r#"{"model":"nano","max_tokens":3,"messages":[{"role":"user","content":"Hi"}]}"#;
        assert!(server.post("id-1", asked).wait_with_output().unwrap().status.success());
        server.stop()
    });
    let log = ended.await.unwrap();
    let spans = spans.lock().unwrap();
    let root = spans.iter().find(|span| span.kind == SpanKind::Server as i32).expect("a span was sent");
    let finished = log.iter().find(|line| line.contains("\"finished\"")).unwrap();
    let finished: Value = serde_json::from_str(finished).unwrap();
    assert_eq!(finished["span"]["trace_id"], hex(&root.trace_id), "{finished}");
    assert_eq!(attributes(&collector.resource.lock().unwrap())["service.name"], "videos");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_never_answers_holds_up_neither_replies_nor_the_end() {
    // Connections are accepted by the kernel, and nobody reads.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let ended = tokio::task::spawn_blocking(move || {
        let server = server_process::Server::start(&["--otlp-endpoint", &url]);
        for id in 0..8 {
            let asked = r#"{"model":"nano","max_tokens":2,"messages":[{"role":"user","content":"Hi"}]}"#;
            let reply = server.post(&format!("id-{id}"), asked).wait_with_output().unwrap();
            assert!(String::from_utf8(reply.stdout).unwrap().contains("finish_reason"));
        }
        server.stop()
    });
    let log = tokio::time::timeout(Duration::from_secs(120), ended).await.expect("it ends").unwrap();
    assert!(log.iter().any(|line| line.contains("the last traces were not sent")), "{log:?}");
}
