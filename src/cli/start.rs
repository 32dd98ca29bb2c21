//! From the command line to a loaded model: download, open, read the weights, start the engine.
//!
//! Called by `serve`, `ask` (in-process), `trace` and `quantize`. Everything slow runs on the blocking pool.

use std::{
    path::Path,
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, anyhow};
use indicatif::{ProgressBar, ProgressStyle};

use super::{options::ModelOptions, target::Target};
use crate::{
    config::{Config, EngineConfig, MediaConfig},
    engine::{self, EngineHandle, EngineOptions, StepObserver},
    http::{Guides, Loaded, ModelCard},
    media::{self, MediaLoader, ffmpeg},
    model::{
        self, ModelShape, Tap, VideoLanguageModel,
        checkpoint::{Checkpoint, GenerationConfig, ModelSpec, TokenizerFiles},
        device::{self, DeviceModel},
        hub::{Hub, HubProgress},
        tinyllava::{self, TinyLlava},
    },
    prompt::Tokenizer,
    scheduler::SamplingParams,
};

/// A model whose engine runs.
pub struct Started {
    pub engine: EngineHandle,
    pub tokenizer: Arc<Tokenizer>,
    pub shape: ModelShape,
    pub generation: GenerationConfig,
    /// Whether a question that does not say is to be thought about.
    pub thinks: bool,
    /// Bytes of weights that one decode step reads.
    pub decode_bytes: usize,
    /// The GPU it runs on, if it runs on one.
    pub target: Option<Target>,
}

/// Sets the number of threads of the kernels; without it there are as many as affinity and the quota of the cgroup leave.
/// Only the first call counts.
pub fn use_threads(threads: Option<usize>) {
    if let Some(threads) = threads {
        // An error means that the pool runs already; then its size stays.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
}

/// Threads for the kernels of one of `num_engines`, which share the machine; 0: all, for the only one.
pub fn own_threads(options: &ModelOptions, num_engines: usize) -> usize {
    use_threads(options.threads);
    if num_engines > 1 { (rayon::current_num_threads() / num_engines).max(1) } else { 0 }
}

/// Downloads what has to be, then loads the model and starts its engine.
///
/// # Errors
/// One sentence: a bad checkpoint, a failed download, too little memory.
pub async fn start(
    options: &ModelOptions,
    config: EngineConfig,
    observer: Box<dyn StepObserver>,
    tap: Box<dyn Tap>,
) -> anyhow::Result<Started> {
    use_threads(options.threads);
    download(&options.model).await?;
    let options = options.clone();
    let load = move || load(&options, config, observer, tap);
    tokio::task::spawn_blocking(load).await.context("loading the model panicked")?
}

/// Brings a repository of the hub onto this machine; anything else is there.
///
/// # Errors
/// When it cannot be had.
pub async fn download(model: &ModelSpec) -> anyhow::Result<()> {
    if let ModelSpec::Hub(repo) = model {
        let bar = progress_bar(&format!("downloading {repo}"));
        let progress = |progress: HubProgress<'_>| {
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.done_bytes);
        };
        Hub::from_env()?.download(repo, &progress).await?;
        bar.finish_and_clear();
    }
    Ok(())
}

fn load(
    options: &ModelOptions,
    config: EngineConfig,
    observer: Box<dyn StepObserver>,
    tap: Box<dyn Tap>,
) -> anyhow::Result<Started> {
    let started = Instant::now();
    let mut checkpoint = Checkpoint::open(&options.model)?;
    let tokenizer = Arc::new(load_tokenizer(&checkpoint.tokenizer)?);
    let bar = progress_bar(&format!("loading {}", checkpoint.id));
    bar.set_length(checkpoint.weights.num_bytes());
    let on_read = bar.clone();
    checkpoint.weights.on_read(move |bytes| on_read.inc(bytes));
    let target = Target::of(options)?;
    let (model, decode_bytes) = load_model(&checkpoint, options, target.as_ref())
        .map_err(|error| anyhow!("cannot load {}: {}", checkpoint.id, device::describe(&error)))?;
    bar.finish_and_clear();
    let config = match &target {
        Some(target) => target.engine(options, config)?,
        None => config,
    };
    let threads = match config.own_threads {
        0 => rayon::current_num_threads(),
        own => own,
    };
    let mut end_token_ids = checkpoint.generation.eos_token_ids.clone();
    end_token_ids.push(tokenizer.end_of_text());
    let engine_options =
        EngineOptions { config, num_token_ids: tokenizer.vocab_size(), end_token_ids, observer, tap };
    let (engine, _thread) = engine::start(model, engine_options)?;
    let device = target.as_ref().map_or_else(|| Ok("cpu".into()), Target::describe)?;
    tracing::info!(
        model = checkpoint.id,
        device,
        variant = options.variant().map(tracing::field::display),
        parameters = checkpoint.config.num_parameters(),
        seconds = started.elapsed().as_secs_f64(),
        kv_tokens = engine.limits().num_blocks * engine.limits().block_size,
        threads,
        "model loaded"
    );
    let shape = tinyllava::shape(&checkpoint.config);
    let (generation, thinks) = (checkpoint.generation, options.thinks());
    Ok(Started { engine, tokenizer, shape, generation, thinks, decode_bytes, target })
}

/// The model on its device, and the bytes of weights that one decode step reads.
fn load_model(
    checkpoint: &Checkpoint,
    options: &ModelOptions,
    target: Option<&Target>,
) -> model::Result<(Box<dyn VideoLanguageModel>, usize)> {
    let (weights, config) = (&checkpoint.weights, &checkpoint.config);
    Ok(match target {
        None => {
            let model = TinyLlava::load(weights, config, options.weight_format(weights))?;
            let bytes = model.decode_bytes();
            (Box::new(model), bytes)
        }
        Some(Target { device, dtype, quant }) => {
            let model = DeviceModel::load(weights, config, (device, *dtype), *quant)?;
            let bytes = model.decode_bytes();
            (Box::new(model), bytes)
        }
    })
}

fn load_tokenizer(files: &TokenizerFiles) -> anyhow::Result<Tokenizer> {
    if let TokenizerFiles::Directory(dir) = files {
        return Ok(Tokenizer::load(Path::new(dir))?);
    }
    let read =
        |name: &str| files.read(name).map_err(|error| anyhow!("cannot read the tokenizer's {name}: {error}"));
    let required = |name: &str| read(name)?.ok_or_else(|| anyhow!("the tokenizer has no {name}"));
    let (vocab, merges) = (required("vocab.json")?, required("merges.txt")?);
    let (added, config) = (read("added_tokens.json")?, read("tokenizer_config.json")?);
    Ok(Tokenizer::from_files(&vocab, &merges, added.as_deref(), config.as_deref())?)
}

impl Started {
    /// One model on the engines of all of them: the same model, started several times.
    pub fn joined(all: Vec<Started>) -> Self {
        let engine = EngineHandle::joined(all.iter().map(|started| started.engine.clone()).collect());
        let first = all.into_iter().next().expect("no engine was started: this is a bug");
        Started { engine, ..first }
    }

    /// What the HTTP side needs, with the media stage for this model's input.
    ///
    /// # Errors
    /// When the media stage cannot be set up.
    pub fn into_loaded(self, config: &Config) -> anyhow::Result<Loaded> {
        let num_frames = self.shape.num_frames;
        let media =
            MediaLoader::new(MediaConfig { num_frames, ..config.media.clone() }, self.shape.image_size)?;
        let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let model = ModelCard {
            id: config.served_model_name.clone(),
            created,
            max_model_len: self.engine.limits().context,
            default_sampling: default_sampling(&self.generation, config.default_max_tokens),
            num_frames,
            thinks: self.thinks,
        };
        let guides = Guides::new(&self.tokenizer, &self.generation.eos_token_ids)?;
        Ok(Loaded { engine: self.engine, media, tokenizer: self.tokenizer, guides, model })
    }
}

/// Sampling of a request that says nothing.
fn default_sampling(generation: &GenerationConfig, max_tokens: usize) -> SamplingParams {
    let greedy = SamplingParams::greedy(max_tokens);
    let repetition_penalty = generation.repetition_penalty;
    if !generation.do_sample {
        return SamplingParams { repetition_penalty, ..greedy };
    }
    let GenerationConfig { temperature, top_k, top_p, .. } = *generation;
    SamplingParams { temperature, top_k, top_p, repetition_penalty, ..greedy }
}

/// Says early, and how to help it, when ffmpeg is missing; fetches it when asked to.
///
/// # Errors
/// When it is still missing.
pub async fn ensure_ffmpeg(options: &ModelOptions, media: &MediaConfig) -> anyhow::Result<()> {
    if options.download_ffmpeg && media::check_tools(media).is_err() {
        let bar = progress_bar("downloading ffmpeg");
        let progress = move |received, total| {
            bar.set_length(total);
            bar.set_position(received);
        };
        tokio::task::spawn_blocking(move || ffmpeg::download_ffmpeg(progress)).await??;
    }
    Ok(media::check_tools(media)?)
}

/// On stderr, where that is a terminal.
pub fn progress_bar(message: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}");
    ProgressBar::new(0)
        .with_style(style.expect("a constant template: this is a bug").progress_chars("=> "))
        .with_message(message.to_string())
}
