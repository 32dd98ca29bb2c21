//! What the HTTP tests share: a server on a loopback socket with the scripted model, clips, and readers of its replies.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::StreamExt;
use reqwest::{
    Client, RequestBuilder, Response, StatusCode,
    multipart::{Form, Part},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tinyllava::{
    config::Config,
    engine::{EngineHandle, EngineOptions},
    http::{AppState, Guides, Loaded, ModelCard, run},
    media::MediaLoader,
    model::{
        VideoLanguageModel,
        checkpoint::{Checkpoint, ModelSpec},
        fake::FakeModel,
        layers::WeightFormat,
        tinyllava::TinyLlava,
    },
    prompt::Tokenizer,
    scheduler::SamplingParams,
    telemetry::{EngineMetrics, Metrics, Traces},
};
use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};

pub const MODEL: &str = "fake";
pub const CHAT: &str = "/v1/chat/completions";
pub const REPLY: &str = "<think>The person bends.</think><answer>C</answer>";

/// A running server; stops when dropped.
pub struct Server {
    pub url: String,
    pub client: Client,
    shutdown: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<std::io::Result<()>>>,
}

/// Small limits that tests of limits can reach, and a server that may fetch from this machine.
pub fn config() -> Config {
    let mut config = Config { served_model_name: MODEL.into(), ..Config::default() };
    config.media.num_frames = 4;
    config.media.allow_private_addresses = true;
    config.engine.kv_cache_bytes = 64 << 20;
    config
}

/// The parts of a server whose model is still to be set by [`load`].
pub fn state(config: Config) -> AppState {
    let traces = Traces::start(&config.traces, MODEL).unwrap();
    AppState::traced(Arc::new(config), Metrics::new(MODEL), traces)
}

/// Starts the engine on `model` and makes `state` ready.
pub fn load(state: &AppState, model: FakeModel) {
    load_all(state, vec![model]);
}

/// Starts an engine on each of `models` and makes `state` ready.
pub fn load_all(state: &AppState, models: Vec<FakeModel>) {
    let boxed = models.into_iter().map(|model| Box::new(model) as Box<dyn VideoLanguageModel>);
    load_any(state, boxed.collect(), Tokenizer::bytes());
}

fn load_any(state: &AppState, models: Vec<Box<dyn VideoLanguageModel>>, tokenizer: Tokenizer) {
    let config = state.config();
    let start = |(index, model)| {
        let options = EngineOptions {
            config: config.engine.clone(),
            num_token_ids: tokenizer.vocab_size(),
            end_token_ids: vec![tokenizer.end_of_text()],
            observer: Box::new(EngineMetrics::new(state.metrics().clone(), index)),
            tap: Box::new(()),
        };
        // The thread ends with the last handle.
        let (engine, _thread) = tinyllava::engine::start(model, options).unwrap();
        engine
    };
    let engine = EngineHandle::joined(models.into_iter().enumerate().map(start).collect());
    let limits = engine.limits();
    state.set_loaded(Loaded {
        media: MediaLoader::new(config.media.clone(), limits.image_size).unwrap(),
        guides: Guides::new(&tokenizer, &[]).unwrap(),
        tokenizer: Arc::new(tokenizer),
        model: ModelCard {
            thinks: true,
            id: config.served_model_name.clone(),
            created: 1,
            max_model_len: limits.context,
            default_sampling: SamplingParams::greedy(1),
            num_frames: config.media.num_frames,
        },
        engine,
    });
}

/// Serves `state` on a free port.
pub async fn serve(state: AppState) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (shutdown, stop) = oneshot::channel();
    let task = tokio::spawn(run(listener, state, async {
        // A dropped sender is a shutdown too.
        let _ = stop.await;
    }));
    let client = Client::builder().no_proxy().build().unwrap();
    Server { url, client, shutdown: Some(shutdown), task: Some(task) }
}

/// A ready server.
pub async fn server(config: Config, model: FakeModel) -> Server {
    let state = state(config);
    load(&state, model);
    serve(state).await
}

/// A ready server on the embedded model, which samples only when a request says so.
pub async fn nano_server(mut config: Config) -> Server {
    let checkpoint = Checkpoint::open(&ModelSpec::Nano).unwrap();
    let model = TinyLlava::load(&checkpoint.weights, &checkpoint.config, WeightFormat::AsStored).unwrap();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano");
    config.media.num_frames = model.shape().num_frames;
    let state = state(config);
    load_any(&state, vec![Box::new(model)], Tokenizer::load(&directory).unwrap());
    serve(state).await
}

/// A question with the video of the embedded model's demo called `name`.
pub fn demo(name: &str, question: &str, more: Value) -> Value {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/nano/demo").join(name);
    let url = format!("data:video/mp4;base64,{}", STANDARD.encode(std::fs::read(path).unwrap()));
    let video = json!({"type": "video_url", "video_url": {"url": url}});
    request(json!([video, {"type": "text", "text": question}]), more)
}

/// A ready server that always says [`REPLY`].
pub async fn simple_server() -> Server {
    server(config(), FakeModel::saying(REPLY)).await
}

/// As [`FakeModel::saying`], with a sleep in every step.
pub fn slow_model(text: &str, step_delay: Duration) -> FakeModel {
    let mut model = FakeModel::saying(text);
    model.step_delay = step_delay;
    model
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

impl Server {
    /// What SIGTERM does. The result completes when the server has ended.
    pub fn shut_down(&mut self) -> JoinHandle<std::io::Result<()>> {
        self.shutdown.take().unwrap().send(()).unwrap();
        self.task.take().unwrap()
    }

    pub fn get(&self, path: &str) -> RequestBuilder {
        self.client.get(format!("{}{path}", self.url))
    }

    pub fn post(&self, body: &Value) -> RequestBuilder {
        self.client.post(format!("{}{CHAT}", self.url)).json(body)
    }

    pub async fn send_json(&self, path: &str, body: &Value) -> Response {
        self.client.post(format!("{}{path}", self.url)).json(body).send().await.unwrap()
    }

    pub async fn send_form(&self, path: &str, form: Form) -> Response {
        self.client.post(format!("{}{path}", self.url)).multipart(form).send().await.unwrap()
    }

    pub async fn delete(&self, path: &str) -> Response {
        self.client.delete(format!("{}{path}", self.url)).send().await.unwrap()
    }

    /// A multipart request of these parts.
    pub fn upload(&self, form: Form) -> RequestBuilder {
        self.client.post(format!("{}{CHAT}", self.url)).multipart(form)
    }

    /// The body of a unary reply that must be a success.
    pub async fn ask(&self, body: &Value) -> Value {
        success(self.post(body).send().await.unwrap()).await
    }

    pub async fn metrics(&self) -> String {
        self.get("/metrics").send().await.unwrap().text().await.unwrap()
    }

    /// The value of a metric with all its labels.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = self.metrics().await;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        value.unwrap_or_else(|| panic!("{name} is not in\n{text}"))
    }

    /// Waits until no sequence runs or waits and no block is held, as `/metrics` tells.
    pub async fn until_idle(&self) {
        let gauges = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"];
        let names = gauges.map(|gauge| format!("vllm:{gauge}{{model_name=\"{MODEL}\"}}"));
        eventually("the engine is idle", async || {
            let mut sum = 0.0;
            for name in &names {
                sum += self.metric(name).await;
            }
            sum == 0.0
        })
        .await;
    }
}

/// Waits for `condition`, which must come true sooner or later.
pub async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    for _ in 0..1000 {
        if condition().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("never came true: {what}");
}

/// A request of one user message.
pub fn request(content: Value, more: Value) -> Value {
    let mut request = json!({"model": MODEL, "messages": [{"role": "user", "content": content}]});
    request.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
    request
}

/// A question about the video at `url`.
pub fn about(url: &str, more: Value) -> Value {
    let parts = json!([{"type": "text", "text": "What?"}, {"type": "video_url", "video_url": {"url": url}}]);
    request(parts, more)
}

/// The parts `request` and `video`.
pub fn form(request: &Value, video: Vec<u8>) -> Form {
    Form::new()
        .part("request", Part::text(request.to_string()))
        .part("video", Part::bytes(video).file_name("clip.mp4"))
}

pub async fn success(response: Response) -> Value {
    let status = response.status();
    let text = response.text().await.unwrap();
    assert_eq!(status, StatusCode::OK, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// Status and `error` of a refused request, whose form is checked.
pub async fn error(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    assert!(response.headers().contains_key("x-request-id"));
    if [429, 503].contains(&status) {
        let after = response.headers()["retry-after"].to_str().unwrap().parse::<u64>().unwrap();
        assert!(after >= 1);
    }
    let text = response.text().await.unwrap();
    let body: Value = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{status}: no JSON: {text}"));
    let error = body["error"].clone();
    let keys: Vec<&String> = error.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["message", "type", "param", "code"], "{body}");
    assert!(error["message"].as_str().is_some_and(|message| message.len() > 10), "{body}");
    (status, error)
}

/// One line group of a stream.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    Data(Value),
    Comment(String),
    Done,
}

/// Reads a stream event by event.
pub struct Events {
    body: futures_util::stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    text: String,
}

impl Events {
    pub fn of(response: Response) -> Self {
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Events { body: response.bytes_stream().boxed(), text: String::new() }
    }

    /// `None` at the end.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let event = match event.strip_prefix("data: ") {
                    Some("[DONE]") => Event::Done,
                    Some(data) => Event::Data(serde_json::from_str(data).unwrap()),
                    None => Event::Comment(event.trim_start_matches(':').trim().into()),
                };
                self.text = rest.into();
                return Some(event);
            }
            let chunk = self.body.next().await?.unwrap();
            self.text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    }

    /// Everything up to the end; comments left out.
    pub async fn rest(mut self) -> Vec<Event> {
        let mut events = vec![];
        while let Some(event) = self.next().await {
            if !matches!(event, Event::Comment(_)) {
                events.push(event);
            }
        }
        events
    }
}

/// The chunks of a stream, its text by segment, and whether `[DONE]` was the last event.
pub fn chunks(events: &[Event]) -> Vec<&Value> {
    let (last, chunks) = events.split_last().expect("a stream has events");
    assert_eq!(*last, Event::Done);
    let data = chunks.iter().map(|event| match event {
        Event::Data(data) => data,
        other => panic!("{other:?} in between"),
    });
    data.collect()
}

/// All text of one field of the deltas.
pub fn text_of(chunks: &[&Value], field: &str) -> String {
    chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"][field].as_str()).collect()
}

/// A real video of two seconds, 20 frames of 64 x 48 pixels; made once.
pub fn clip() -> &'static Path {
    static CLIP: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_dir, path) = CLIP.get_or_init(|| {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("clip.mp4");
        let made = std::process::Command::new("ffmpeg")
            .args(["-v", "error", "-f", "lavfi", "-i", "testsrc=size=64x48:rate=10:duration=2"])
            .args(["-pix_fmt", "yuv420p"])
            .arg(&path)
            .status()
            .expect("ffmpeg runs");
        assert!(made.success());
        (dir, path)
    });
    path
}

pub fn clip_bytes() -> Vec<u8> {
    std::fs::read(clip()).unwrap()
}

/// The clip as a `data:` URL.
pub fn clip_url() -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    format!("data:video/mp4;base64,{}", STANDARD.encode(clip_bytes()))
}

/// A web server that counts how often it is asked and answers with `body` after `delay`, or never.
pub struct VideoHost {
    pub url: String,
    pub hits: Arc<AtomicUsize>,
}

impl VideoHost {
    pub async fn start(body: Vec<u8>, delay: Option<Duration>) -> VideoHost {
        let hits = Arc::new(AtomicUsize::new(0));
        let counter = hits.clone();
        let handler = move || async move {
            counter.fetch_add(1, Ordering::SeqCst);
            match delay {
                Some(delay) => tokio::time::sleep(delay).await,
                None => std::future::pending().await,
            }
            ([("content-type", "video/mp4")], body)
        };
        let app = axum::Router::new().route("/clip.mp4", axum::routing::get(handler));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/clip.mp4", listener.local_addr().unwrap());
        tokio::spawn(async { axum::serve(listener, app).await });
        VideoHost { url, hits }
    }

    pub fn hits(&self) -> usize {
        self.hits.load(Ordering::SeqCst)
    }
}

/// Processes whose command line has `text` in it.
pub fn processes_with(text: &str) -> usize {
    let own = std::process::id().to_string();
    let processes = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let others = processes.filter(|entry| entry.file_name().to_str() != Some(&own));
    let command_lines = others.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    command_lines.filter(|line| String::from_utf8_lossy(line).contains(text)).count()
}
