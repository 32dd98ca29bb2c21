//! What the HTTP side costs: tokens a second with nothing behind it, latency it adds to a token, stalls of `/health`.
//!
//! `cargo bench --bench http_layer`. Server, engine and clients are in one process and share its cores. The model costs
//! nothing: each step says which step it is, so that a client knows when what it reads was made.

use std::{
    io::Write,
    ops::Range,
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use candle_core::{DType, Device};
use serde_json::json;
use tinyllava::{
    config::Config,
    engine::EngineOptions,
    http::{AppState, Guides, Loaded, ModelCard, run},
    media::MediaLoader,
    model::{
        FrameBatch, KvCache, KvDType, KvPool, ModelShape, Result, StepInput, Tap, Tensor, VideoLanguageModel,
    },
    prompt::Tokenizer,
    scheduler::SamplingParams,
    telemetry::{EngineMetrics, Metrics, Traces},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
};

/// As the machines of BENCHMARKS.md.
const SERVER_THREADS: usize = 2;
const TOKENS: usize = 256;
/// Steps are told apart by a letter: this many, then the first one again.
const LETTERS: u8 = 50;
/// Token ids, bytes and an end.
const VOCAB: usize = 257;

/// When each step ended, latest last.
type Steps = Arc<Mutex<Vec<Instant>>>;

/// Says the letter of the step, to all sequences alike.
struct Scripted {
    shape: ModelShape,
    steps: Steps,
    /// Time from one step to the next.
    pace: Duration,
    next: Instant,
}

fn letter(step: usize) -> u8 {
    b'A' + (step % usize::from(LETTERS)) as u8
}

impl VideoLanguageModel for Scripted {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn block_bytes(&self, kept: KvDType, block_size: usize) -> usize {
        KvCache::block_bytes(&self.shape, kept, block_size)
    }

    fn new_pool(&self, kept: KvDType, num_blocks: usize, block_size: usize) -> Result<KvPool> {
        Ok(KvPool::Host(KvCache::new(&self.shape, kept, num_blocks, block_size)))
    }

    fn encode_frames(&mut self, _: &FrameBatch, frames: Range<usize>, _: &mut dyn Tap) -> Result<Tensor> {
        Tensor::zeros((frames.len(), 1), DType::F32, &Device::Cpu)
    }

    fn connect(&mut self, _: &Tensor, _: &mut dyn Tap) -> Result<Tensor> {
        Tensor::zeros((self.shape.visual_tokens, self.shape.hidden_size), DType::F32, &Device::Cpu)
    }

    fn forward(&mut self, input: &StepInput, _: &mut KvPool, _: &mut dyn Tap) -> Result<Tensor> {
        if let Some(wait) = self.next.checked_duration_since(Instant::now()) {
            std::thread::sleep(wait);
        }
        self.next = Instant::now() + self.pace;
        let rows = input.logit_rows.len();
        let mut logits = vec![0.0f32; rows * VOCAB];
        let mut steps = self.steps.lock().expect("no panic while held");
        let said = usize::from(letter(steps.len()));
        logits.chunks_mut(VOCAB).for_each(|row| row[said] = 1.0);
        steps.push(Instant::now());
        Tensor::from_vec(logits, (rows, VOCAB), &Device::Cpu)
    }
}

/// A server on a free port; its address and when its steps ended.
async fn serve(pace: Duration) -> (String, Steps) {
    let mut config = Config { served_model_name: "scripted".into(), ..Config::default() };
    config.engine.max_running_sequences = 256;
    config.engine.max_waiting_sequences = 256;
    config.engine.kv_cache_bytes = 64 << 20;
    let steps = Steps::default();
    let shape = ModelShape {
        vocab_size: VOCAB,
        hidden_size: 4,
        context: 4096,
        image_size: 384,
        visual_tokens: 8,
        num_frames: 16,
        num_layers: 1,
        num_kv_heads: 1,
        head_dim: 4,
    };
    let model = Scripted { shape, steps: steps.clone(), pace, next: Instant::now() };
    let traces = Traces::start(&config.traces, "scripted").expect("none are sent");
    let state = AppState::traced(Arc::new(config), Metrics::new("scripted"), traces);
    let tokenizer = Tokenizer::bytes();
    let config = state.config();
    let options = EngineOptions {
        config: config.engine.clone(),
        num_token_ids: tokenizer.vocab_size(),
        end_token_ids: vec![tokenizer.end_of_text()],
        observer: Box::new(EngineMetrics::new(state.metrics().clone(), 0)),
        tap: Box::new(()),
    };
    let (engine, _ends_with_its_handles) =
        tinyllava::engine::start(Box::new(model), options).expect("starts");
    let limits = engine.limits();
    state.set_loaded(Loaded {
        media: MediaLoader::new(config.media.clone(), limits.image_size).expect("ffmpeg is there"),
        guides: Guides::new(&tokenizer, &[]).expect("a tokenizer of bytes"),
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
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    tokio::spawn(run(listener, state, std::future::pending()));
    (address, steps)
}

async fn send(address: &str, head: &str, body: &str) -> BufReader<TcpStream> {
    let mut socket = TcpStream::connect(address).await.expect("the server listens");
    let request = format!(
        "{head} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(request.as_bytes()).await.expect("the server reads");
    socket.write_all(body.as_bytes()).await.expect("the server reads");
    BufReader::new(socket)
}

fn question(content: serde_json::Value, max_tokens: usize) -> String {
    json!({"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, "ignore_eos": true, "stream": true})
        .to_string()
}

/// Streams one reply; calls `read` with the text of each event that has some.
async fn stream(address: &str, mut read: impl FnMut(&[u8])) {
    const CONTENT: &[u8] = b"\"content\":\"";
    let mut reply = send(address, "POST /v1/chat/completions", &question(json!("?"), TOKENS)).await;
    let mut line = Vec::new();
    while !line.starts_with(b"data: [DONE]") {
        line.clear();
        assert_ne!(
            reply.read_until(b'\n', &mut line).await.expect("the server writes"),
            0,
            "a stream broke off"
        );
        if let Some(at) = line.windows(CONTENT.len()).position(|window| window == CONTENT) {
            let text = &line[at + CONTENT.len()..];
            let text = &text[..text.iter().position(|&byte| byte == b'"').expect("a string ends")];
            // The first event only says whose turn it is.
            if !text.is_empty() {
                read(text);
            }
        }
    }
}

/// Runs `num_streams` at once; gives each read's number of tokens and age of the newest one.
async fn stream_all(address: String, steps: Steps, num_streams: usize) -> Vec<(usize, Duration)> {
    let client = |_| {
        let (address, steps) = (address.clone(), steps.clone());
        tokio::spawn(async move {
            let mut reads = Vec::with_capacity(TOKENS);
            stream(&address, |text| {
                let steps = steps.lock().expect("no panic while held");
                let newest = *text.last().expect("text");
                // The latest step of that letter.
                let made =
                    (0..steps.len()).rev().find(|&step| letter(step) == newest).expect("a step said it");
                reads.push((text.len(), steps[made].elapsed()));
            })
            .await;
            reads
        })
    };
    let clients: Vec<_> = (0..num_streams).map(client).collect();
    let mut all = Vec::new();
    for client in clients {
        all.extend(client.await.expect("a client's panic"));
    }
    all
}

fn quantiles(mut times: Vec<Duration>) -> String {
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    format!("median {:.2} ms, p99 {:.2} ms, longest {:.2} ms", at(0.5), at(0.99), at(1.0))
}

/// Half a minute of 1280 x 720, as base64 in a URL.
fn clip(number: usize) -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let source = format!("testsrc2=size=1280x720:rate=25:duration={}", 30 + number);
    let file = tempfile::Builder::new().suffix(".mp4").tempfile().expect("a temporary file");
    let made = Command::new("ffmpeg")
        .args([
            "-v",
            "error",
            "-y",
            "-f",
            "lavfi",
            "-i",
            &source,
            "-preset",
            "ultrafast",
            "-pix_fmt",
            "yuv420p",
        ])
        .arg(file.path())
        .stdin(Stdio::null())
        .status()
        .expect("ffmpeg is there");
    assert!(made.success());
    format!("data:video/mp4;base64,{}", STANDARD.encode(std::fs::read(file.path()).expect("was written")))
}

/// Asks for `/health` every millisecond while videos are decoded. Gives the time of each reply.
async fn health_while_decoding(address: String, videos: Vec<String>) -> Vec<Duration> {
    let over = Arc::new(AtomicBool::new(false));
    let poll = tokio::spawn({
        let (address, over) = (address.clone(), over.clone());
        async move {
            let (mut times, mut reply) = (Vec::new(), [0; 1024]);
            let mut socket = TcpStream::connect(&address).await.expect("the server listens");
            while !over.load(Ordering::Relaxed) {
                let asked = Instant::now();
                socket
                    .write_all(b"GET /health HTTP/1.1\r\nhost: bench\r\n\r\n")
                    .await
                    .expect("the server reads");
                assert_ne!(socket.read(&mut reply).await.expect("the server writes"), 0);
                times.push(asked.elapsed());
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            times
        }
    });
    let ask = |video: String| {
        let address = address.clone();
        tokio::spawn(async move {
            let content =
                json!([{"type": "video_url", "video_url": {"url": video}}, {"type": "text", "text": "?"}]);
            let mut reply = send(&address, "POST /v1/chat/completions", &question(content, 1)).await;
            let mut line = String::new();
            while !line.starts_with("data: [DONE]") {
                line.clear();
                assert_ne!(
                    reply.read_line(&mut line).await.expect("the server writes"),
                    0,
                    "a stream broke off"
                );
                assert!(!line.contains("\"error\""), "{line}");
            }
        })
    };
    for asked in videos.into_iter().map(ask).collect::<Vec<_>>() {
        asked.await.expect("a client's panic");
    }
    over.store(true, Ordering::Relaxed);
    poll.await.expect("the poller's panic")
}

fn runtime(threads: usize) -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().expect("threads")
}

fn say(text: std::fmt::Arguments<'_>) {
    // Whoever closed the pipe does not want to know.
    let _ = writeln!(std::io::stdout(), "{text}");
}

fn main() {
    // Clients on a runtime of their own: what they cost delays them, not the server.
    let (server, clients) = (runtime(SERVER_THREADS), runtime(1));
    let (address, steps) = server.block_on(serve(Duration::ZERO));
    for num_streams in [1, 64, 256] {
        let started = Instant::now();
        let reads = clients.block_on(stream_all(address.clone(), steps.clone(), num_streams));
        let tokens: usize = reads.iter().map(|(tokens, _)| tokens).sum();
        let rate = tokens as f64 / started.elapsed().as_secs_f64();
        say(format_args!(
            "{num_streams} streams, no pause: {rate:.0} tokens/s, {tokens} in {} events",
            reads.len()
        ));
    }
    for (num_streams, pace) in [(64, 20), (256, 50), (256, 20)] {
        let (address, steps) = server.block_on(serve(Duration::from_millis(pace)));
        let reads = clients.block_on(stream_all(address, steps, num_streams));
        let ages = reads.into_iter().map(|(_, age)| age).collect();
        say(format_args!("{num_streams} streams, a token each {pace} ms: added {}", quantiles(ages)));
    }
    let videos = (0..8).map(clip).collect();
    let times = clients.block_on(health_while_decoding(address, videos));
    say(format_args!("/health while 8 videos are decoded, {} times: {}", times.len(), quantiles(times)));
}
