//! `POST /v1/chat/completions`: the one file that knows the whole way of a request.
//!
//! receive → validate → reserve a place → load the video → build the prompt → submit → reply.
//! Everything lives in one future (or, later, one stream): when the client leaves, hyper drops it, and with it the
//! download, the decoder and the sequence.

use std::{
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use axum::{
    Extension, Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use futures_util::{FutureExt, future::BoxFuture};
use tokio::task::spawn_blocking;

use super::{
    body::{self, Budget, Received},
    error::ApiError,
    generation::{Generation, finish_reason},
    progress::Progress,
    record::RequestRecord,
    responses::{ChatCompletion, Choice, ReplyHead, ReplyMessage},
    sse,
    state::{AppState, Loaded},
    types::ChatRequest,
    validate::{self, Limits, Reasoning, ValidRequest, ValidSampling, ValidVideo},
};
use crate::{
    config::Config,
    engine::{NewSequence, Permit, VideoInput},
    media::VideoFrames,
    model::FrameBatch,
    output::{OutputAssembler, OutputEvent, Reply},
    prompt::{self, Conversation, Prompt, Tokenizer},
    scheduler::SamplingParams,
};

/// A generation that is being prepared: the video is fetched, decoded, and so on.
pub type Preparing = BoxFuture<'static, Result<Generation, ApiError>>;

/// The handler.
///
/// # Errors
/// Everything that goes wrong before the first byte of the reply.
pub async fn completions(
    State(state): State<AppState>,
    Extension(record): Extension<Arc<RequestRecord>>,
    request: Request,
) -> Result<Response, ApiError> {
    let work = state.begin_work().inspect_err(|error| state.metrics().rejection(error.code()))?;
    let timeout = state.config().request_timeout;
    let mut progress = Progress::new(record, state.metrics().clone(), timeout, work);
    let admitted = progress.deadline().bound(admit(&state, request)).await;
    let Admitted { loaded, valid, permit, budget } = match admitted.and_then(|admitted| admitted) {
        Ok(admitted) => admitted,
        Err(error) => {
            if error.is_rejection() {
                state.metrics().rejection(error.code());
            }
            progress.ended_by(&error);
            return Err(error);
        }
    };
    progress.set_stream(valid.stream);
    let (stream, include_usage) = (valid.stream, valid.include_usage);
    let head = reply_head(&loaded, stream);
    let default_max_tokens = state.config().default_max_tokens;
    let mut preparing =
        prepare(Admitted { loaded, valid, permit, budget }, progress, default_max_tokens).boxed();
    if !stream {
        return Ok(Json(fold(preparing.await?, head).await?).into_response());
    }
    // A fault in the video gets its own status if it is found soon; later the stream has begun.
    let interval = state.config().keep_alive_interval;
    if let Ok(soon) = tokio::time::timeout(interval, &mut preparing).await {
        preparing = std::future::ready(Ok(soon?)).boxed();
    }
    Ok(sse::reply(preparing, head, include_usage, interval))
}

/// A request that holds a place in the queue.
struct Admitted {
    loaded: Arc<Loaded>,
    valid: ValidRequest,
    permit: Permit,
    budget: Budget,
}

async fn admit(state: &AppState, request: Request) -> Result<Admitted, ApiError> {
    let loaded = state.ready()?;
    // Refuse before the body is read; the place itself is taken after, so that slow senders hold none.
    drop(loaded.engine.reserve()?);
    let received = body::receive(state, request).await?;
    let (own_state, own_loaded) = (state.clone(), loaded.clone());
    let (valid, budget) =
        body::check(received, move |received| check(received, own_state.config(), &own_loaded)).await?;
    let permit = loaded.engine.reserve()?;
    Ok(Admitted { loaded, valid, permit, budget })
}

/// From bytes to a valid request.
fn check(received: Received, config: &Config, loaded: &Loaded) -> Result<(ValidRequest, Budget), ApiError> {
    let Received { json, upload, budget } = received;
    let request: ChatRequest = body::parse(&json, config.max_json_values)?;
    drop(json);
    let limits = Limits {
        config,
        model_id: &loaded.model.id,
        default_sampling: &loaded.model.default_sampling,
        vocab_size: loaded.tokenizer.vocab_size(),
    };
    Ok((validate::validate(request, upload, limits)?, budget))
}

/// Video, prompt, engine: everything up to the first token.
async fn prepare(
    admitted: Admitted,
    mut progress: Progress,
    default_max_tokens: usize,
) -> Result<Generation, ApiError> {
    let Admitted { loaded, valid, permit, budget } = admitted;
    let ValidRequest { conversation, video, sampling, stop_strings, thinking, reasoning, .. } = valid;
    let deadline = progress.deadline();
    let stages = async {
        let frames = load_video(&loaded, video, &mut progress).await?;
        drop(budget);
        let engine_limits = loaded.engine.limits();
        let started = Instant::now();
        let prompt =
            build_prompt(conversation, thinking, loaded.tokenizer.clone(), engine_limits.visual_tokens)
                .await?;
        let num_prompt = prompt.token_ids.len();
        let num_visual = prompt.video_spans.iter().map(ExactSizeIterator::len).sum();
        progress.prompt_built(num_prompt, num_visual, started.elapsed());
        let room = engine_limits.context.saturating_sub(num_prompt);
        let sampling = final_sampling(sampling, default_max_tokens.min(room));
        let tokens = permit.submit(sequence(prompt, frames.as_deref(), sampling))?;
        progress.submitted();
        Ok((tokens, frames.map(|frames| frames.info.clone())))
    };
    match deadline.bound(stages).await.and_then(|done| done) {
        Ok((tokens, video)) => {
            let raw = reasoning == Reasoning::Raw;
            let assembler = OutputAssembler::new(loaded.tokenizer.clone(), stop_strings, raw);
            Ok(Generation::new(tokens, assembler, reasoning, video, progress))
        }
        Err(error) => {
            progress.ended_by(&error);
            Err(error)
        }
    }
}

async fn load_video(
    loaded: &Loaded,
    video: Option<ValidVideo>,
    progress: &mut Progress,
) -> Result<Option<Arc<VideoFrames>>, ApiError> {
    let Some(video) = video else { return Ok(None) };
    let started = Instant::now();
    let frames = loaded.media.load(video.source, video.sampling).await?;
    progress.video_loaded(&frames, started.elapsed());
    Ok(Some(frames))
}

/// Renders and tokenises on the blocking pool; the last turn gets the instruction the model was trained with.
async fn build_prompt(
    mut conversation: Conversation,
    thinking: bool,
    tokenizer: Arc<Tokenizer>,
    num_visual_tokens: usize,
) -> Result<Prompt, ApiError> {
    let built = spawn_blocking(move || {
        if let Some(last) = conversation.turns.last_mut() {
            let instruct = if thinking { prompt::with_instruction } else { prompt::with_option_only };
            last.user = instruct(&last.user);
        }
        prompt::build(&conversation, &tokenizer, num_visual_tokens)
    });
    let built = built.await.map_err(|error| ApiError::Internal(format!("building the prompt: {error}")))?;
    Ok(built?)
}

/// Decides what the request left open.
fn final_sampling(valid: ValidSampling, default_max_tokens: usize) -> SamplingParams {
    SamplingParams {
        seed: valid.seed.unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().1),
        // A prompt that leaves no room at all is refused by the engine for its length.
        max_tokens: valid.max_tokens.unwrap_or(default_max_tokens.max(1)),
        ..valid.params
    }
}

fn sequence(prompt: Prompt, frames: Option<&VideoFrames>, sampling: SamplingParams) -> NewSequence {
    let videos = prompt.video_spans.into_iter().zip(frames).map(|(span, frames)| VideoInput {
        span,
        digest: frames.digest,
        frames: FrameBatch { rgb: frames.rgb.clone(), size: frames.size },
    });
    NewSequence { videos: videos.collect(), token_ids: prompt.token_ids, sampling, guide: None }
}

fn reply_head(loaded: &Loaded, stream: bool) -> ReplyHead {
    let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    ReplyHead {
        id: format!("chatcmpl-{}", uuid::Uuid::new_v4().simple()),
        object: if stream { "chat.completion.chunk" } else { "chat.completion" },
        created,
        model: loaded.model.id.clone(),
    }
}

/// The unary reply: the same events as a stream's, put together.
async fn fold(mut generation: Generation, head: ReplyHead) -> Result<ChatCompletion, ApiError> {
    let mut reply = Reply::default();
    loop {
        let event = generation.next().await?;
        let is_last = matches!(event, OutputEvent::Finished { .. });
        reply.add(event);
        if is_last {
            break;
        }
    }
    let reasoning = (!reply.think.is_empty()).then_some(reply.think);
    let message = ReplyMessage {
        role: "assistant",
        content: reply.content,
        reasoning_content: reasoning.clone(),
        reasoning,
        refusal: None,
    };
    Ok(ChatCompletion {
        head,
        choices: [Choice { index: 0, message, logprobs: None, finish_reason: finish_reason(reply.reason) }],
        usage: generation.counts().into(),
        video: generation.video.take(),
    })
}
