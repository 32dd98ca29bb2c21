//! `tinyllava trace`: writes the tensors the model computes for one request, to hold them against the original's.
//!
//! Runs the way requests go: the media stage, the prompt, the engine. Only a [`Tap`] listens.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use anyhow::{Context, anyhow, bail, ensure};
use candle_core::{Device, Tensor};
use clap::Args;

use super::{
    options::{ModelOptions, Quant},
    start::{ensure_ffmpeg, start},
};
use crate::{
    config::{EngineConfig, MediaConfig},
    engine::{NewSequence, TokenEvent, VideoInput},
    media::{FrameSampling, MediaLoader, pixels},
    model::{FrameBatch, Tap},
    prompt::{self, Conversation, Prompt, Tokenizer, Turn},
    scheduler::{SamplingParams, VISUAL_TOKEN},
};

/// What the original's code puts where the video goes.
const IMAGE_TOKEN_INDEX: i64 = -200;
const IMAGE: &str = "<image>";

/// One request to trace.
#[derive(Debug, Args)]
pub struct TraceArgs {
    #[command(flatten)]
    pub model: ModelOptions,
    /// A video file.
    #[arg(long, value_name = "FILE", required_unless_present = "frames", conflicts_with = "frames")]
    pub video: Option<PathBuf>,
    /// Frames instead of a video: a safetensors file with `frames_u8` [T, H, W, 3].
    #[arg(long, value_name = "FILE")]
    pub frames: Option<PathBuf>,
    /// The question; or, when it has an `<image>` and ends with "ASSISTANT:", the whole prompt.
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,
    /// Tokens to generate, greedily.
    #[arg(long, value_name = "N", default_value_t = 24)]
    pub max_tokens: usize,
    /// Where to write the tensors.
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

/// Keeps what the model shows.
#[derive(Debug, Clone, Default)]
struct Recorder(Arc<Mutex<HashMap<&'static str, Vec<Tensor>>>>);

impl Tap for Recorder {
    fn tensor(&mut self, name: &'static str, index: Option<usize>, tensor: &Tensor) {
        if index.is_none() && tensor.elem_count() > 0 {
            let mut tensors = self.0.lock().expect("a recorder panicked: this is a bug");
            tensors.entry(name).or_default().push(tensor.clone());
        }
    }
}

impl Recorder {
    /// All that was recorded under `name`, one call after another.
    fn all(&self, name: &str) -> anyhow::Result<Tensor> {
        let tensors = self.0.lock().expect("a recorder panicked: this is a bug");
        let tensors = tensors.get(name).with_context(|| format!("the model never computed {name}"))?;
        Ok(Tensor::cat(tensors, 0)?)
    }

    /// The first `rows` rows of it: decoding goes on behind the prompt.
    fn rows(&self, name: &str, rows: usize) -> anyhow::Result<Tensor> {
        Ok(self.all(name)?.narrow(0, 0, rows)?)
    }
}

/// Frames of the request at their own size.
struct SourceFrames {
    rgb: Vec<u8>,
    count: usize,
    height: usize,
    width: usize,
}

/// Runs the request and writes its tensors.
///
/// # Errors
/// One sentence: an unreadable model, video or frames file, or one that does not fit.
pub async fn trace(args: TraceArgs) -> anyhow::Result<()> {
    let recorder = Recorder::default();
    // For comparing with the original: floats, unless asked otherwise.
    let quant = if args.model.quant == Quant::Auto { Quant::None } else { args.model.quant };
    let model = ModelOptions { quant, ..args.model.clone() };
    let config = model.engine(EngineConfig { prefix_cache: false, ..EngineConfig::default() });
    let started = start(&model, config, Box::new(()), Box::new(recorder.clone())).await?;
    let size = started.shape.image_size;
    let source = match (&args.frames, &args.video) {
        (Some(file), _) => read_frames(file)?,
        (None, Some(file)) => decode_frames(file, &args.model, started.shape.num_frames, size).await?,
        (None, None) => bail!("give --video or --frames"),
    };
    let resized = pixels::resize(&source.rgb, source.height, source.width, size);
    let prompt = tokenise(&args.prompt, &started.tokenizer, started.shape.visual_tokens)?;
    let span = prompt.video_spans.first().context("the prompt has no place for the video")?.clone();
    let frames = FrameBatch { rgb: resized.clone().into(), size };
    let sequence = NewSequence {
        token_ids: prompt.token_ids.clone(),
        videos: vec![VideoInput { span: span.clone(), digest: [0; 32], frames }],
        cache_salt: None,
        sampling: SamplingParams::greedy(args.max_tokens),
        guide: None,
    };
    let ids = generate(&started.engine, sequence).await?;

    let mut tensors = HashMap::new();
    let shape = (source.count, source.height, source.width, 3);
    tensors.insert("frames_u8", Tensor::from_vec(source.rgb, shape, &Device::Cpu)?);
    tensors.insert("resized_u8", Tensor::from_vec(resized, (source.count, size, size, 3), &Device::Cpu)?);
    tensors.insert("pixel_values", recorder.rows("pixel_values", source.count)?);
    let features = recorder.all("vision_features")?;
    let width = features.dim(1)?;
    tensors.insert("vision_features", features.reshape((source.count, (), width))?);
    for name in ["connector_no_pos", "connector_out"] {
        tensors.insert(name, recorder.all(name)?);
    }
    tensors.insert("inputs_embeds", recorder.rows("inputs_embeds", prompt.token_ids.len())?);
    tensors.insert("logits_last", recorder.rows("logits_last", 1)?.squeeze(0)?);
    tensors.insert("input_ids", int_tensor(original_ids(&prompt))?);
    tensors.insert("greedy_ids", int_tensor(ids.into_iter().map(i64::from).collect())?);
    candle_core::safetensors::save(&tensors, &args.out)
        .with_context(|| format!("cannot write {}", args.out.display()))
}

fn int_tensor(ids: Vec<i64>) -> anyhow::Result<Tensor> {
    let len = ids.len();
    Ok(Tensor::from_vec(ids, len, &Device::Cpu)?)
}

fn read_frames(file: &Path) -> anyhow::Result<SourceFrames> {
    let tensors = candle_core::safetensors::load(file, &Device::Cpu)
        .with_context(|| format!("cannot read {}", file.display()))?;
    let frames = tensors.get("frames_u8").with_context(|| format!("{} has no frames_u8", file.display()))?;
    let (count, height, width, channels) =
        frames.dims4().map_err(|_| anyhow!("frames_u8 must have four dimensions, [T, H, W, 3]"))?;
    ensure!(channels == 3 && frames.elem_count() > 0, "frames_u8 must have three channels, [T, H, W, 3]");
    let rgb = frames.flatten_all()?.to_vec1::<u8>().map_err(|_| anyhow!("frames_u8 must be of type u8"))?;
    Ok(SourceFrames { rgb, count, height, width })
}

async fn decode_frames(
    file: &Path,
    options: &ModelOptions,
    num_frames: usize,
    size: usize,
) -> anyhow::Result<SourceFrames> {
    let config = options.media(MediaConfig { num_frames, ..MediaConfig::default() });
    ensure_ffmpeg(options, &config).await?;
    let media = MediaLoader::new(config, size)?;
    let decoded = media.source_frames(file, FrameSampling::default()).await?;
    let (height, width) = (decoded.info.height, decoded.info.width);
    let mut distinct = decoded.info.sampled_indices.clone();
    distinct.dedup();
    let frame = height * width * 3;
    let rgb = decoded.info.sampled_indices.iter().flat_map(|index| {
        let place = distinct
            .iter()
            .position(|known| known == index)
            .expect("a sampled index is known: this is a bug");
        decoded.rgb[place * frame..][..frame].iter().copied()
    });
    Ok(SourceFrames { rgb: rgb.collect(), count: decoded.info.sampled_indices.len(), height, width })
}

/// The question in the template, or a prompt that is whole already.
fn tokenise(text: &str, tokenizer: &Tokenizer, visual_tokens: usize) -> anyhow::Result<Prompt> {
    if let Some((before, after)) = text.split_once(IMAGE).filter(|_| text.trim_end().ends_with("ASSISTANT:"))
    {
        let mut token_ids = tokenizer.encode(before)?;
        let span = token_ids.len()..token_ids.len() + visual_tokens;
        token_ids.resize(span.end, VISUAL_TOKEN);
        token_ids.extend(tokenizer.encode(after.trim_end())?);
        return Ok(Prompt { token_ids, video_spans: vec![span] });
    }
    let turn = Turn { user: prompt::with_instruction(text), num_videos: 1, assistant: None };
    Ok(prompt::build(&Conversation { system: None, turns: vec![turn] }, tokenizer, visual_tokens)?)
}

/// The prompt as the original writes it: one -200 for the whole video.
fn original_ids(prompt: &Prompt) -> Vec<i64> {
    let mut ids: Vec<i64> = prompt.token_ids.iter().map(|&id| i64::from(id)).collect();
    for span in prompt.video_spans.iter().rev() {
        ids.splice(span.clone(), [IMAGE_TOKEN_INDEX]);
    }
    ids
}

async fn generate(engine: &crate::engine::EngineHandle, sequence: NewSequence) -> anyhow::Result<Vec<u32>> {
    let mut stream = engine.reserve()?.submit(sequence)?;
    let mut ids = Vec::new();
    while let Some(event) = stream.next().await {
        match event {
            TokenEvent::Started { .. }
            | TokenEvent::PromptComputed(_)
            | TokenEvent::PromptScored(_)
            | TokenEvent::EndToken { .. } => {}
            TokenEvent::Token { id, .. } => ids.push(id),
            TokenEvent::Finished(_) => return Ok(ids),
            TokenEvent::Failed(error) => bail!("the model failed: {error}"),
        }
    }
    bail!("the engine has stopped")
}
