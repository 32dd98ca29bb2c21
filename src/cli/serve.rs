//! `tinyllava serve`: the HTTP server; and the private one behind `tinyllava ask`.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, bail};
use clap::Args;
use tokio::{net::TcpListener, task::spawn_blocking};
use url::Url;

use super::{
    access::AccessOptions,
    kv_events::KvEventsOptions,
    observing::ObservingOptions,
    options::{ModelOptions, reasoning_field_parser},
    start::{Started, ensure_ffmpeg, own_threads, start},
};
use crate::{
    config::{
        Config, EngineConfig, FilesConfig, MediaConfig, NamedMediaConfig, ReasoningField, ResponsesConfig,
    },
    engine::EngineHandle,
    http::{self, Access, AppState},
    model::placement::Placement,
    shutdown,
    telemetry::{EngineMetrics, KvEventPublisher, Metrics, Traces},
};

/// Settings of the server; what is not here has the default of [`Config`].
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub model: ModelOptions,
    /// Several devices in place of one, each with the whole model and caches of its own: cuda:0,cuda:1. A request goes
    /// where its video is cached, or where least is to do.
    #[arg(
        long,
        value_name = "DEVICE,...",
        value_delimiter = ',',
        conflicts_with = "device",
        env = "TINYLLAVA_DEVICES"
    )]
    pub devices: Vec<Placement>,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1", env = "TINYLLAVA_HOST")]
    pub host: std::net::IpAddr,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value_t = 8000, env = "TINYLLAVA_PORT")]
    pub port: u16,
    /// Port of its own for /metrics, always plain http; 0 takes a free one [default: --port answers it].
    #[arg(long, value_name = "PORT")]
    pub metrics_port: Option<u16>,
    #[command(flatten)]
    pub access: AccessOptions,
    /// Name clients call the model by [default: its own].
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Directory that file: URLs may point into; without it they are refused.
    #[arg(long, value_name = "DIR")]
    pub allowed_media_dir: Option<PathBuf>,
    /// Refuse all http(s) URLs.
    #[arg(long)]
    pub no_remote_urls: bool,
    /// Let URLs point to private, loopback and link-local addresses.
    #[arg(long)]
    pub allow_private_addresses: bool,
    /// Largest video, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    pub max_video_mib: usize,
    /// Longest video, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 10_800.0)]
    pub max_video_seconds: f64,
    /// Videos in one message; consecutive pictures are one video.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub max_videos_per_request: usize,
    /// Videos in one request, all messages of a conversation together.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub max_videos_per_conversation: usize,
    /// Treat consecutive pictures as separate still images instead of the frames of one video.
    #[arg(long)]
    pub images_as_stills: bool,
    /// Most frames a video.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub max_frames: usize,
    /// Longest time for probing and decoding one video, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub decode_timeout: u64,
    /// Directory for uploaded files, which then survive a restart [default: a temporary one that goes with the server].
    #[arg(long, value_name = "DIR", env = "TINYLLAVA_FILES_DIR")]
    pub files_dir: Option<PathBuf>,
    /// Disk space for all uploaded files together, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    pub files_max_mib: u64,
    /// Disk space for media that clients send with a uuid and may name by it later, MiB; 0 keeps
    /// none.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    pub media_cache_mib: u64,
    /// How long uploaded files are kept, hours.
    #[arg(long, value_name = "HOURS", default_value_t = 24)]
    pub files_max_age_hours: u64,
    /// Responses kept for previous_response_id; the oldest go first.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub responses_max: usize,
    /// Memory for kept responses, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    pub responses_max_mib: usize,
    /// How long responses are kept, hours.
    #[arg(long, value_name = "HOURS", default_value_t = 24)]
    pub responses_max_age_hours: u64,
    /// Videos decoded at the same time.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub max_concurrent_decodes: usize,
    /// Requests that run at the same time, on each device.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub max_running: usize,
    /// Requests that wait, for all devices together; more are answered 429.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_waiting: usize,
    /// Prompt tokens computed in one step: less is smoother for running streams, more starts new ones sooner [default: 512, or 2048
    /// on a GPU].
    #[arg(long, value_name = "N")]
    pub max_prefill_tokens: Option<usize>,
    /// Frames encoded in one step [default: two of 384 x 384, more of smaller ones].
    #[arg(long, value_name = "N")]
    pub max_encode_frames: Option<usize>,
    /// Turn the prefix cache off.
    #[arg(long)]
    pub no_prefix_cache: bool,
    /// Longest reply when a request does not say, tokens.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub default_max_tokens: usize,
    /// Most replies to one request (n).
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub max_n: usize,
    /// Field of chat replies that holds the thinking, unless a request names another.
    #[arg(
        long,
        value_name = "FIELD",
        default_value_t = ReasoningField::Both,
        value_parser = reasoning_field_parser(),
        env = "TINYLLAVA_REASONING_FIELD"
    )]
    pub reasoning_field: ReasoningField,
    /// Longest time for one request, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub request_timeout: u64,
    /// How long new requests are still taken on after SIGTERM, while /ready says no already: as long as a balancer
    /// takes to notice, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub drain_delay: u64,
    /// How long running requests may go on after that, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub drain_timeout: u64,
    #[command(flatten)]
    pub observing: ObservingOptions,
    #[command(flatten)]
    pub kv_events: KvEventsOptions,
}

impl ServeArgs {
    fn served_name(&self) -> String {
        self.served_model_name.clone().unwrap_or_else(|| self.model.model.to_string())
    }

    /// Returns the most videos that one request may have.
    fn max_videos(&self) -> usize {
        self.max_videos_per_conversation.max(self.max_videos_per_request)
    }

    /// The model on each device.
    ///
    /// # Errors
    /// When a GPU is named twice: its memory holds one model and its cache.
    pub fn models(&self) -> anyhow::Result<Vec<ModelOptions>> {
        if self.devices.is_empty() {
            return Ok(vec![self.model.clone()]);
        }
        let mut devices = Vec::new();
        for device in self.devices.iter().map(|device| device.resolved()) {
            if device != Placement::Cpu && devices.contains(&device) {
                bail!("--devices names {device} twice: give each GPU once");
            }
            devices.push(device);
        }
        Ok(devices.into_iter().map(|device| ModelOptions { device, ..self.model.clone() }).collect())
    }

    /// The settings of the server, with what was said on the command line.
    pub fn config(&self) -> Config {
        let media = MediaConfig {
            allowed_media_dir: self.allowed_media_dir.clone(),
            allow_remote_urls: !self.no_remote_urls,
            allow_private_addresses: self.allow_private_addresses,
            max_video_bytes: self.max_video_mib << 20,
            max_video_seconds: self.max_video_seconds,
            max_frames: self.max_frames,
            decode_timeout: Duration::from_secs(self.decode_timeout),
            max_concurrent_decodes: self.max_concurrent_decodes,
            files: FilesConfig {
                dir: self.files_dir.clone(),
                max_bytes: self.files_max_mib << 20,
                max_age: Duration::from_secs(self.files_max_age_hours.saturating_mul(3600)),
                ..FilesConfig::default()
            },
            named_media: NamedMediaConfig {
                max_bytes: self.media_cache_mib << 20,
                ..NamedMediaConfig::default()
            },
            ..MediaConfig::default()
        };
        let defaults = EngineConfig::default();
        let engine = EngineConfig {
            // One request must find room for all of its videos.
            max_cached_videos: defaults.max_cached_videos.max(self.max_videos()),
            max_running_sequences: self.max_running.max(1),
            max_waiting_sequences: self.max_waiting,
            max_prefill_tokens: self
                .max_prefill_tokens
                .map_or(defaults.max_prefill_tokens, |tokens| tokens.max(1)),
            max_encode_frames: self
                .max_encode_frames
                .map_or(defaults.max_encode_frames, |frames| frames.max(1)),
            prefix_cache: !self.no_prefix_cache,
            ..defaults
        };
        let responses = ResponsesConfig {
            max_responses: self.responses_max,
            max_bytes: self.responses_max_mib << 20,
            max_age: Duration::from_secs(self.responses_max_age_hours.saturating_mul(3600)),
            ..ResponsesConfig::default()
        };
        Config {
            responses,
            log_content: self.observing.log_content,
            traces: self.observing.traces(),
            max_videos_per_request: self.max_videos_per_request,
            max_videos_per_conversation: self.max_videos(),
            images_as_stills: self.images_as_stills,
            listen: SocketAddr::new(self.host, self.port),
            metrics_listen: self.metrics_port.map(|port| SocketAddr::new(self.host, port)),
            cors_origins: self.access.cors_origins.clone(),
            served_model_name: self.served_name(),
            default_max_tokens: self.default_max_tokens.max(1),
            max_choices: self.max_n.max(1),
            reasoning_field: self.reasoning_field,
            request_timeout: Duration::from_secs(self.request_timeout),
            drain_delay: Duration::from_secs(self.drain_delay),
            drain_timeout: Duration::from_secs(self.drain_timeout),
            media: self.model.media(media),
            engine: self.model.engine(engine),
            // Base64 in JSON takes four thirds of the video.
            max_body_bytes: (self.max_video_mib << 20) / 3 * 4 + (4 << 20),
            ..Config::default()
        }
    }
}

/// Listens at once, loads the model, serves until SIGTERM, drains.
///
/// # Errors
/// When a port is taken, the model cannot be loaded, keys or certificate cannot be read, ffmpeg is missing, or an
/// engine dies.
pub async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let config = Arc::new(args.config());
    let models = args.models()?;
    let stop = shutdown::requested().context("cannot install signal handlers")?;
    let traces = Traces::start(&config.traces, &config.served_model_name)?;
    let metrics = Metrics::new(&config.served_model_name);
    let state = AppState::traced(config.clone(), metrics, traces.clone());
    args.observing.warn_of_content();
    let access = args.access.load()?;
    warn_if_open(&access, config.listen);
    state.set_access(access);
    let listener = bind(config.listen, "--port").await?;
    let address = listener.local_addr()?;
    let metrics = serve_metrics(&state).await?;
    let kv_events = args.kv_events.start(&state).await?;
    tracing::info!(%address, model = %args.model.model, "listening; loading the model");
    let served = http::run(listener, state.clone(), stop);
    let running = async {
        let engine = load_into(&state, models, kv_events).await?;
        let scheme = if args.access.is_secure() { "https" } else { "http" };
        tracing::info!("ready: {scheme}://{address}");
        engine.stopped().await;
        bail!("the engine has stopped; the log above says why")
    };
    let outcome = tokio::select! {
        served = served => served.map_err(anyhow::Error::from),
        broken = running => broken,
        broken = args.access.reload_on_hangup(&state) => broken,
        () = metrics => Ok(()),
    };
    spawn_blocking(move || traces.shut_down()).await?;
    outcome
}

/// What answers at the port of the metrics, if there is one. Never completes.
async fn serve_metrics(state: &AppState) -> anyhow::Result<impl Future<Output = ()>> {
    let listener = match state.config().metrics_listen {
        Some(address) => Some(bind(address, "--metrics-port").await?),
        None => None,
    };
    if let Some(listener) = &listener {
        tracing::info!("metrics: http://{}/metrics", listener.local_addr()?);
    }
    let state = state.clone();
    Ok(async move {
        match listener {
            Some(listener) => http::run_metrics(listener, state).await,
            None => std::future::pending().await,
        }
    })
}

/// Nobody should serve the whole network by accident.
fn warn_if_open(access: &Access, listen: SocketAddr) {
    if access.keys.is_empty() && !listen.ip().is_loopback() {
        tracing::warn!(address = %listen, "whoever reaches this address may use the server; --api-key asks for a key");
    }
}

/// Runs `client` against a server of this process on a free loopback port.
///
/// # Errors
/// When the model cannot be loaded, or whatever the client fails with.
pub async fn with_private_server(
    options: &ModelOptions,
    timeout_s: u64,
    client: impl AsyncFnOnce(Url) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let config = Config {
        served_model_name: options.model.to_string(),
        request_timeout: Duration::from_secs(timeout_s),
        media: options.media(MediaConfig::default()),
        engine: options.engine(EngineConfig::default()),
        ..Config::default()
    };
    let listener = bind(([127, 0, 0, 1], 0).into(), "--port").await?;
    let url = Url::parse(&format!("http://{}", listener.local_addr()?))?;
    let state = AppState::new(Arc::new(config), Metrics::new(&options.model.to_string()));
    load_into(&state, vec![options.clone()], None).await?;
    tokio::select! {
        served = http::run(listener, state, std::future::pending()) => Ok(served?),
        answered = client(url) => answered,
    }
}

/// Loads the model, once for each of `models`, into a server that listens already.
async fn load_into(
    state: &AppState,
    models: Vec<ModelOptions>,
    kv_events: Option<KvEventPublisher>,
) -> anyhow::Result<EngineHandle> {
    let config = state.config();
    let mut started = Vec::new();
    for (engine, options) in models.iter().enumerate() {
        ensure_ffmpeg(options, &config.media).await?;
        let observer = EngineMetrics::new(state.metrics().clone(), engine).publishing(kv_events.clone());
        let config =
            EngineConfig { own_threads: own_threads(options, models.len()), ..config.engine.clone() };
        started.push(start(options, config, Box::new(observer), Box::new(())).await?);
    }
    let config = config.clone();
    // Opening the file store reads the disk.
    let loaded = spawn_blocking(move || Started::joined(started).into_loaded(&config));
    let loaded = loaded.await.context("opening the files")??;
    let engine = loaded.engine.clone();
    state.set_loaded(loaded);
    Ok(engine)
}

async fn bind(address: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}; is another server running? choose another {flag}")
    })
}
