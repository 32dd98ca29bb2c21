//! What every handler shares: the settings, the metrics and, once the model is loaded, the way to it.
//!
//! Made by `cli/serve.rs` before the model is loaded, completed by [`AppState::set_loaded`] after.

use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use tokio::sync::Semaphore;
use tokio_rustls::rustls;

use super::{
    auth::ApiKey, error::ApiError, guide::Guides, responses_api::ResponseStore, running::RunningChats,
};
use crate::{
    config::Config,
    engine::{EngineHandle, EngineStatus},
    media::MediaLoader,
    prompt::Tokenizer,
    scheduler::SamplingParams,
    shutdown::{Drain, WorkGuard},
    telemetry::{Metrics, Traces, metrics::ServerState},
};

/// The model as clients see it.
#[derive(Debug, Clone)]
pub struct ModelCard {
    /// The name clients call it by.
    pub id: String,
    /// Unix time, seconds.
    pub created: u64,
    /// Most tokens of prompt and completion.
    pub max_model_len: usize,
    /// Sampling of a request that says nothing (from `generation_config.json`).
    pub default_sampling: SamplingParams,
    /// Frames a video is sampled to when the request does not say.
    pub num_frames: usize,
    /// Whether a request that does not say is asked to think before it answers.
    pub thinks: bool,
}

/// What exists once the model is loaded.
#[derive(Debug)]
pub struct Loaded {
    pub engine: EngineHandle,
    pub media: MediaLoader,
    pub tokenizer: Arc<Tokenizer>,
    pub guides: Guides,
    pub model: ModelCard,
}

/// Who may use the server, and how connections are secured: as files say that can be replaced while it runs.
#[derive(Debug, Default)]
pub struct Access {
    /// None: everyone may.
    pub keys: Vec<ApiKey>,
    /// None: connections are plain.
    pub tls: Option<Arc<rustls::ServerConfig>>,
}

/// Shared by all handlers; cheap to clone.
#[derive(Debug, Clone)]
pub struct AppState(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: Arc<Config>,
    metrics: Metrics,
    traces: Traces,
    drain: Drain,
    loaded: OnceLock<Arc<Loaded>>,
    access: RwLock<Arc<Access>>,
    body_kib: Arc<Semaphore>,
    responses: Arc<ResponseStore>,
    chats: RunningChats,
    grammar_places: Arc<Semaphore>,
}

impl AppState {
    /// A server whose model is still loading, without traces.
    pub fn new(config: Arc<Config>, metrics: Metrics) -> Self {
        AppState::traced(config, metrics, Traces::default())
    }

    /// A server whose model is still loading.
    pub fn traced(config: Arc<Config>, metrics: Metrics, traces: Traces) -> Self {
        for route in super::GENERATING {
            metrics.expect_responses("POST", route, &super::error::USUAL_STATUSES);
        }
        // A body that is allowed at all must find room when it comes alone.
        let inflight_bytes = config.max_inflight_body_bytes.max(config.max_body_bytes);
        let body_kib = Semaphore::new(inflight_bytes.div_ceil(1024).min(Semaphore::MAX_PERMITS));
        let max_grammars = config.max_concurrent_grammars.max(1);
        AppState(Arc::new(Inner {
            responses: Arc::new(ResponseStore::new(&config.responses)),
            config,
            metrics,
            traces,
            drain: Drain::default(),
            loaded: OnceLock::new(),
            access: RwLock::default(),
            body_kib: Arc::new(body_kib),
            grammar_places: Arc::new(Semaphore::new(max_grammars)),
            chats: RunningChats::default(),
        }))
    }

    /// From now on requests are served. Only the first call counts.
    pub fn set_loaded(&self, loaded: Loaded) {
        let engine = &loaded.engine;
        self.0.metrics.set_cache_config(engine.limits().block_size, engine.num_blocks());
        if self.0.loaded.set(Arc::new(loaded)).is_err() {
            tracing::error!("a model was loaded twice; the first one stays");
        }
    }

    /// The model and the way to it.
    ///
    /// # Errors
    /// 503 while it is loading.
    pub fn loaded(&self) -> Result<Arc<Loaded>, ApiError> {
        self.0.loaded.get().cloned().ok_or(ApiError::Loading)
    }

    /// As [`AppState::loaded`], when new work would also be accepted.
    ///
    /// # Errors
    /// 503 while loading or draining and when an engine has stopped.
    pub fn ready(&self) -> Result<Arc<Loaded>, ApiError> {
        if self.0.drain.is_draining() {
            return Err(ApiError::Draining);
        }
        let loaded = self.loaded()?;
        match loaded.engine.status() {
            EngineStatus::Ready => Ok(loaded),
            EngineStatus::Failed => Err(ApiError::EngineStopped),
        }
    }

    /// Registers a request that a shutdown waits for.
    ///
    /// # Errors
    /// 503 while draining.
    pub fn begin_work(&self) -> Result<WorkGuard, ApiError> {
        self.0.drain.enter().ok_or(ApiError::Draining)
    }

    /// Replaces keys and certificate; requests and connections that have begun keep theirs.
    pub fn set_access(&self, access: Access) {
        *self.0.access.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(access);
    }

    /// Keys and certificate as of now; before [`AppState::set_access`] the server is open and plain.
    pub(super) fn access(&self) -> Arc<Access> {
        self.0.access.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Limits and settings.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// All metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// All metrics as of now, in Prometheus' text format.
    pub(super) fn render_metrics(&self) -> String {
        let loaded = self.0.loaded.get();
        let decoders = loaded.map(|loaded| loaded.media.decoders());
        self.0.metrics.set_state(ServerState {
            model_loaded: loaded.is_some(),
            ready: self.ready().is_ok() && !self.0.drain.is_announced(),
            draining: self.0.drain.is_announced(),
            running_decoders: decoders.map_or(0, |decoders| decoders.running),
            waiting_decoders: decoders.map_or(0, |decoders| decoders.waiting),
            decoder_places: decoders.map_or(0, |decoders| decoders.places),
        });
        self.0.metrics.render()
    }

    /// Where spans go.
    pub(super) fn traces(&self) -> &Traces {
        &self.0.traces
    }

    /// Who still works, and whether new work is refused.
    pub fn drain(&self) -> &Drain {
        &self.0.drain
    }

    /// Responses that may be read again and continued.
    pub(super) fn responses(&self) -> &Arc<ResponseStore> {
        &self.0.responses
    }

    /// Places for grammars that are being compiled.
    pub(super) fn grammar_places(&self) -> &Arc<Semaphore> {
        &self.0.grammar_places
    }

    /// The chats that run now.
    pub(super) fn chats(&self) -> &RunningChats {
        &self.0.chats
    }

    /// Room for bodies that are being received, in KiB.
    pub(super) fn body_kib(&self) -> &Arc<Semaphore> {
        &self.0.body_kib
    }
}
