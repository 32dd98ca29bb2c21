//! The one way of a request from its bytes to a running generation, whichever endpoint it came to.
//!
//! receive → validate → reserve places → load the video → build the prompt → submit. Called by the handlers of the
//! generating endpoints, which bring the check of their own wire form and shape the reply. Everything lives in one future
//! (or, later, one stream): when the client leaves, hyper drops it, and with it the download, the decoder and the
//! sequences.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::extract::Request;
use bytes::Bytes;
use futures_util::{
    FutureExt,
    future::{BoxFuture, try_join_all},
};
use tempfile::NamedTempFile;
use tokio::task::spawn_blocking;

use super::{
    auth::ClientKey,
    body::{self, Budget, Received},
    error::ApiError,
    generation::Generation,
    guide,
    progress::Progress,
    record::RequestRecord,
    state::{AppState, Loaded},
    validate::{RawPrompt, Reasoning, ValidChoices, ValidRequest, ValidSampling, ValidVideo},
};
use crate::{
    config::Config,
    engine::{EndThinking, EngineLimits, Guide, NewSequence, Permit, SubmitError, VideoInput},
    media::{Caller, MediaError, Salt, VideoFrames},
    model::FrameBatch,
    output::{OutputAssembler, WatchedLetters},
    prompt::{self, Conversation, Instruction, Prompt, Tokenizer},
    scheduler::SamplingParams,
};

/// A generation that is being prepared: the video is fetched, decoded, and so on.
pub type Preparing = BoxFuture<'static, Result<Generation, ApiError>>;

/// What is to be generated, and what the endpoint keeps for itself.
pub type Checked<T> = Result<(ValidRequest, T), ApiError>;

/// A request on its way.
pub struct Begun<T> {
    pub loaded: Arc<Loaded>,
    pub preparing: Preparing,
    /// Ends the thinking of all its choices.
    pub end_thinking: EndThinking,
    /// What the endpoint's check kept for itself.
    pub shape: T,
}

/// Admits a request and sets its stages going; its end is reported however it ends. `check` is what differs between the
/// endpoints: from the JSON of a body, with the file of a multipart one, to what is to be generated, and `T`, what the
/// endpoint itself has to know to shape the reply. It may take long: it runs where that is fine.
///
/// # Errors
/// Everything that goes wrong before there is any need of the video.
pub async fn begin<T: Send + 'static>(
    state: &AppState,
    record: Arc<RequestRecord>,
    request: Request,
    check: impl FnOnce(&Bytes, Option<NamedTempFile>, &Config, &Loaded) -> Checked<T> + Send + 'static,
) -> Result<Begun<T>, ApiError> {
    let work = state.begin_work().inspect_err(|error| state.metrics().rejection(error.code()))?;
    let mut progress = Progress::new(record, state.config(), work);
    let admitted = progress.deadline().bound(admit(state, request, check)).await;
    match admitted.and_then(|admitted| admitted) {
        Ok((admitted, shape)) => {
            progress.asked(admitted.valid.stream, admitted.valid.num_sequences());
            if let Some(timeout) = admitted.valid.timeout {
                progress.set_timeout(timeout);
            }
            let (loaded, end_thinking) = (admitted.loaded.clone(), admitted.end_thinking.clone());
            let preparing = prepare(admitted, progress, state.config().default_max_tokens).boxed();
            Ok(Begun { loaded, preparing, end_thinking, shape })
        }
        Err(error) => {
            if error.is_rejection() {
                state.metrics().rejection(error.code());
            }
            progress.ended_by(&error);
            Err(error)
        }
    }
}

/// Waits a while for a fault in the video, which then gets its own status; later a stream has begun.
///
/// # Errors
/// The fault.
pub async fn settle(mut preparing: Preparing, patience: Duration) -> Result<Preparing, ApiError> {
    match tokio::time::timeout(patience, &mut preparing).await {
        Ok(soon) => Ok(std::future::ready(Ok(soon?)).boxed()),
        Err(_) => Ok(preparing),
    }
}

/// A request that holds its places in the queue.
struct Admitted {
    loaded: Arc<Loaded>,
    valid: ValidRequest,
    guide: Option<Guide>,
    end_thinking: EndThinking,
    permit: Permit,
    budget: Budget,
    /// API key of the request, where the server has keys.
    client: Option<ClientKey>,
}

async fn admit<T: Send + 'static>(
    state: &AppState,
    request: Request,
    check: impl FnOnce(&Bytes, Option<NamedTempFile>, &Config, &Loaded) -> Checked<T> + Send + 'static,
) -> Result<(Admitted, T), ApiError> {
    let loaded = state.ready()?;
    // Refuse before the body is read; the place itself is taken after, so that slow senders hold none.
    drop(loaded.engine.reserve()?);
    let client = request.extensions().get::<ClientKey>().copied();
    let received = body::receive(state, request).await?;
    let (own_state, own_loaded) = (state.clone(), loaded.clone());
    let checked = body::check(received, move |received| {
        let Received { json, upload, budget } = received;
        Ok((check(&json, upload, own_state.config(), &own_loaded)?, budget))
    });
    let ((valid, shape), budget) = checked.await?;
    let end_thinking = EndThinking::default();
    let guide = guide::make(state, &loaded, &valid, &end_thinking).await?;
    guide::check_room(guide.as_ref(), valid.sampling.max_tokens.unwrap_or(usize::MAX))?;
    let permit = loaded.engine.reserve_many(valid.num_sequences())?;
    Ok((Admitted { loaded, valid, guide, end_thinking, permit, budget, client }, shape))
}

/// Video, prompt, engine: everything up to the first token.
async fn prepare(
    admitted: Admitted,
    mut progress: Progress,
    default_max_tokens: usize,
) -> Result<Generation, ApiError> {
    let Admitted { loaded, valid, guide, permit, budget, client, .. } = admitted;
    let (verbatim, prompt_only) = (guide::verbatim(&valid), valid.prompt_only);
    let ValidRequest { conversation, videos, cache_salt, sampling, choices, stop_strings, .. } = valid;
    let (instruction, reasoning, raw_prompts) = (valid.instruction, valid.reasoning, valid.raw_prompts);
    let min_tokens = sampling.params.min_tokens;
    let deadline = progress.deadline();
    let stages = async {
        check_visual_tokens(videos.len(), loaded.engine.limits())?;
        let caller = progress.caller(cache_salt.clone(), client, Some(Arc::new(budget)));
        let frames = load_videos(&loaded, videos, caller, &mut progress).await?;
        let engine_limits = loaded.engine.limits();
        let started = Instant::now();
        let (tokenizer, num_visual_tokens) = (loaded.tokenizer.clone(), engine_limits.visual_tokens);
        let prompts = match raw_prompts.is_empty() {
            true => vec![build_prompt(conversation, instruction, tokenizer, num_visual_tokens).await?],
            false => raw_tokens(raw_prompts, tokenizer).await?,
        };
        let num_prompt = prompts.iter().map(|prompt| prompt.token_ids.len()).sum();
        let spans = prompts.iter().flat_map(|prompt| &prompt.video_spans);
        progress.prompt_built(num_prompt, spans.map(ExactSizeIterator::len).sum(), started);
        if progress.logs_content() {
            progress.prompt_is(prompt_text(&prompts, &loaded.tokenizer).await?);
        }
        let room = engine_limits.context.saturating_sub(num_prompt);
        let letters = watched_letters(&choices, &loaded.tokenizer).await?;
        let mut sampling = final_sampling(sampling, default_max_tokens.min(room));
        sampling.watched = letters.as_ref().map(WatchedLetters::token_ids).unwrap_or_default();
        guide::check_room(guide.as_ref(), sampling.max_tokens)?;
        let mut groups = Vec::new();
        for prompt in prompts {
            let sequence = sequence(prompt, &frames, cache_salt.clone(), sampling.clone());
            groups.push(siblings(NewSequence { guide: guide.clone(), ..sequence }, choices.count).await?);
        }
        let streams = permit.submit_groups(groups)?;
        progress.submitted();
        Ok((streams, letters, frames.iter().map(|frames| frames.info.clone()).collect()))
    };
    match deadline.bound(stages).await.and_then(|done| done) {
        Ok((streams, letters, videos)) => {
            let raw = reasoning == Reasoning::Raw;
            let assembler = || {
                OutputAssembler::new(loaded.tokenizer.clone(), stop_strings.clone(), raw)
                    .verbatim(verbatim)
                    .min_tokens(min_tokens)
                    .watching(letters.clone())
            };
            let sequences = streams.into_iter().map(|stream| (stream, assembler())).collect();
            let generation = Generation::new(sequences, reasoning, videos, progress);
            Ok(generation.of_prompts(choices.count, prompt_only))
        }
        Err(error) => {
            progress.ended_by(&error);
            Err(error)
        }
    }
}

/// Refuses more videos than the context can hold, before any video is fetched.
fn check_visual_tokens(num_videos: usize, limits: EngineLimits) -> Result<(), ApiError> {
    let (prompt_tokens, context) = (num_videos * limits.visual_tokens, limits.context);
    if prompt_tokens < context {
        return Ok(());
    }
    Err(SubmitError::ContextLengthExceeded { prompt_tokens, max_tokens: 1, context }.into())
}

/// Loads all videos of a request: first those with content, at the same time, then those that are
/// only named, for a request may name what it sends itself. The first error ends the others. The
/// last video to be dropped gives the body's budget back, even if the client has left.
async fn load_videos(
    loaded: &Loaded,
    videos: Vec<ValidVideo>,
    caller: Caller,
    progress: &mut Progress,
) -> Result<Vec<Arc<VideoFrames>>, ApiError> {
    let load = async |(place, video): (usize, ValidVideo)| {
        let ValidVideo { path, knobs_path, source, sampling } = video;
        let frames = loaded.media.load_for(source, sampling, &caller).await;
        let frames =
            frames.map_err(|error| ApiError::Video { param: at_fault(&error, path, &knobs_path), error });
        Ok::<_, ApiError>((place, frames?))
    };
    let videos = videos.into_iter().enumerate();
    let (known, sent): (Vec<_>, Vec<_>) = videos.partition(|(_, video)| video.source.was_sent_before());
    let mut frames = try_join_all(sent.into_iter().map(load)).await?;
    frames.extend(try_join_all(known.into_iter().map(load)).await?);
    frames.sort_by_key(|(place, _)| *place);
    frames.iter().for_each(|(_, frames)| progress.video_loaded(frames));
    Ok(frames.into_iter().map(|(_, frames)| frames).collect())
}

/// The path of the knob that is refused, or of the video.
fn at_fault(error: &MediaError, path: String, knobs_path: &str) -> String {
    match error {
        MediaError::Refused {
            param: param @ ("num_frames" | "fps" | "max_frames" | "start" | "end"),
            ..
        } => {
            format!("{knobs_path}.{param}")
        }
        _ => path,
    }
}

/// Renders and tokenises on the blocking pool; the last turn gets its instruction.
async fn build_prompt(
    conversation: Conversation,
    instruction: Instruction,
    tokenizer: Arc<Tokenizer>,
    num_visual_tokens: usize,
) -> Result<Prompt, ApiError> {
    let built = spawn_blocking(move || {
        prompt::build(&prompt::instructed(conversation, instruction), &tokenizer, num_visual_tokens)
    });
    let built = built.await.map_err(|error| ApiError::Internal(format!("building the prompt: {error}")))?;
    Ok(built?)
}

/// Prompts without template; on the blocking pool.
async fn raw_tokens(raw: Vec<RawPrompt>, tokenizer: Arc<Tokenizer>) -> Result<Vec<Prompt>, ApiError> {
    let encoded = spawn_blocking(move || {
        let prompt = |raw| {
            let token_ids = match raw {
                RawPrompt::Tokens(ids) => ids,
                RawPrompt::Text(text) => tokenizer.encode(&text)?,
            };
            Ok(Prompt { token_ids, ..Prompt::default() })
        };
        raw.into_iter().map(prompt).collect::<Result<_, ApiError>>()
    });
    encoded.await.map_err(|error| ApiError::Internal(format!("encoding the prompt: {error}")))?
}

/// What the model reads, but for its videos; on the blocking pool.
async fn prompt_text(prompts: &[Prompt], tokenizer: &Arc<Tokenizer>) -> Result<String, ApiError> {
    let token_ids: Vec<_> = prompts.iter().map(|prompt| prompt.token_ids.clone()).collect();
    let tokenizer = tokenizer.clone();
    let texts = move || token_ids.iter().map(|ids| tokenizer.decode_named(ids)).collect::<Vec<_>>();
    let text = spawn_blocking(move || texts().join("\n")).await;
    text.map_err(|error| ApiError::Internal(format!("writing the prompt to the log: {error}")))
}

/// The tokens of the options, if their probabilities are wanted; on the blocking pool.
async fn watched_letters(
    choices: &ValidChoices,
    tokenizer: &Arc<Tokenizer>,
) -> Result<Option<WatchedLetters>, ApiError> {
    if !choices.answer_logprobs {
        return Ok(None);
    }
    let (options, tokenizer) = (choices.options.clone().unwrap_or_default(), tokenizer.clone());
    let letters = spawn_blocking(move || WatchedLetters::new(&options, &tokenizer)).await;
    letters.map(Some).map_err(|error| ApiError::Internal(format!("looking through the vocabulary: {error}")))
}

/// `count` sequences that differ in their seeds alone; on the blocking pool, for a guide is large.
async fn siblings(sequence: NewSequence, count: usize) -> Result<Vec<NewSequence>, ApiError> {
    if count == 1 {
        return Ok(vec![sequence]);
    }
    let copies = spawn_blocking(move || {
        let sampling = |index| sequence.sampling.for_choice(index);
        (0..count).map(|index| NewSequence { sampling: sampling(index), ..sequence.clone() }).collect()
    });
    copies.await.map_err(|error| ApiError::Internal(format!("copying a sequence: {error}")))
}

/// Decides what the request left open.
fn final_sampling(valid: ValidSampling, default_max_tokens: usize) -> SamplingParams {
    SamplingParams {
        seed: valid.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().1),
        // A prompt that leaves no room at all is refused by the engine for its length.
        max_tokens: valid.max_tokens.unwrap_or(default_max_tokens.max(1).max(valid.params.min_tokens)),
        ..valid.params
    }
}

fn sequence(
    prompt: Prompt,
    frames: &[Arc<VideoFrames>],
    cache_salt: Salt,
    sampling: SamplingParams,
) -> NewSequence {
    let videos = prompt.video_spans.into_iter().zip(frames).map(|(span, frames)| VideoInput {
        span,
        digest: frames.digest,
        frames: FrameBatch { rgb: frames.rgb.clone(), size: frames.size },
    });
    let videos = videos.collect();
    NewSequence { videos, token_ids: prompt.token_ids, cache_salt, sampling, guide: None }
}
