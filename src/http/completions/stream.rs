//! Streams the replies of `/v1/completions` as server-sent events.
//!
//! Called by `completions.rs`. Must never send a chunk after `[DONE]`.

use super::{
    super::{
        error::ApiError,
        generation::Generation,
        pipeline::Preparing,
        responses::{ReplyHead, Usage},
        sse::{self, EventSink},
        validate::StreamExtras,
    },
    PROMPT_TOKENS_A_CHUNK, Shape, TextChoice, TextCompletion,
};

/// Writes the events of a streamed reply.
///
/// # Errors
/// Failures after the first byte, for the stream to tell.
pub(super) async fn write(
    events: EventSink,
    preparing: Preparing,
    head: ReplyHead,
    shape: Shape,
) -> Result<(), ApiError> {
    let mut generation = preparing.await?;
    let writer = Writer { events, head, extras: shape.extras };
    let mut offsets = vec![0; generation.num_choices()];
    // Prompts that are scored come when they are computed, others at once.
    let scores_prompt = !shape.echo.is_empty() && shape.scorer.is_some();
    let mut awaits_prompt = vec![scores_prompt; generation.num_choices()];
    if !scores_prompt && !shape.echo.is_empty() {
        for index in 0..generation.num_choices() {
            let choice = TextChoice { index, text: shape.echo(index), ..TextChoice::default() };
            writer.send(&generation, choice).await;
        }
    }
    while let Some((index, event)) = generation.next().await? {
        if std::mem::take(&mut awaits_prompt[index]) {
            let mut text = shape.echo(index);
            for tokens in generation.take_prompt(index).chunks(PROMPT_TOKENS_A_CHUNK) {
                let text = std::mem::take(&mut text);
                let logprobs = shape.prompt_logprobs(tokens, &mut offsets[index]);
                let choice = TextChoice { index, text, logprobs, finish_reason: None };
                writer.send(&generation, choice).await;
            }
        }
        writer.send(&generation, shape.choice(index, event, &mut offsets[index])).await;
    }
    if shape.extras.usage {
        writer.send_chunk(vec![], Some(generation.counts().into())).await;
    }
    writer.events.send_done().await;
    Ok(())
}

/// Turns choices into events.
struct Writer {
    events: EventSink,
    head: ReplyHead,
    extras: StreamExtras,
}

impl Writer {
    async fn send(&self, generation: &Generation, choice: TextChoice) {
        let usage = self.extras.running_usage.then(|| generation.counts().into());
        self.send_chunk(vec![choice], usage).await;
    }

    async fn send_chunk(&self, choices: Vec<TextChoice>, usage: Option<Usage>) {
        let mut chunk = TextCompletion { head: self.head.clone(), choices, usage, obfuscation: None };
        chunk.obfuscation = self.extras.obfuscation.then(|| sse::padding(&chunk));
        self.events.send(&chunk).await;
    }
}
