//! A running generation: token events in, output events out. Streams and unary replies read the same ones.
//!
//! Made by `http/chat.rs`; dropped, it cancels the sequence. Knows nothing of JSON.

use std::{collections::VecDeque, time::Instant};

use super::{error::ApiError, progress::Progress, validate::Reasoning};
use crate::{
    engine::{TokenEvent, TokenStream},
    media::VideoInfo,
    output::{OutputAssembler, OutputEvent, Segment},
    scheduler::StopReason,
    telemetry::metrics::TokenCounts,
};

/// See the module.
#[derive(Debug)]
pub struct Generation {
    /// `None` once nothing more is wanted of the engine.
    tokens: Option<TokenStream>,
    assembler: OutputAssembler,
    /// Assembled, not handed out yet.
    ready: VecDeque<OutputEvent>,
    reasoning: Reasoning,
    /// What was sampled of the video.
    pub video: Option<VideoInfo>,
    progress: Progress,
    last_token: Option<Instant>,
}

impl Generation {
    /// `progress` knows the prompt's counts already.
    pub fn new(
        tokens: TokenStream,
        assembler: OutputAssembler,
        reasoning: Reasoning,
        video: Option<VideoInfo>,
        progress: Progress,
    ) -> Self {
        Generation {
            tokens: Some(tokens),
            assembler,
            ready: VecDeque::new(),
            reasoning,
            video,
            progress,
            last_token: None,
        }
    }

    /// The next event; nothing follows [`OutputEvent::Finished`] or an error.
    ///
    /// # Errors
    /// When the deadline passes, the sequence's step fails, or the engine ends.
    pub async fn next(&mut self) -> Result<OutputEvent, ApiError> {
        let event = self.advance().await;
        match &event {
            Ok(OutputEvent::Delta { .. }) => {}
            Ok(OutputEvent::Finished { reason, reasoning_tokens, completion_tokens }) => {
                self.progress.completed(finish_reason(*reason), *completion_tokens, *reasoning_tokens);
            }
            Err(error) => {
                self.tokens = None;
                self.progress.ended_by(error);
            }
        }
        event
    }

    /// What the request cost so far.
    pub fn counts(&self) -> TokenCounts {
        self.progress.tokens()
    }

    async fn advance(&mut self) -> Result<OutputEvent, ApiError> {
        loop {
            while let Some(event) = self.ready.pop_front() {
                let thinking = matches!(event, OutputEvent::Delta { segment: Segment::Think, .. });
                if !(thinking && self.reasoning == Reasoning::Hidden) {
                    return Ok(event);
                }
            }
            let Some(tokens) = &mut self.tokens else {
                return Err(ApiError::Internal("the generation was read after its end".into()));
            };
            let event = self.progress.deadline().bound(tokens.next()).await?;
            self.take(event.ok_or(ApiError::EngineStopped)?)?;
        }
    }

    fn take(&mut self, event: TokenEvent) -> Result<(), ApiError> {
        match event {
            TokenEvent::Started { cached_tokens } => self.progress.started(cached_tokens),
            TokenEvent::Token(id) => {
                let now = Instant::now();
                self.progress.token(self.last_token.replace(now), now);
                self.ready.extend(self.assembler.push(id));
                if self.assembler.stopped() {
                    self.finish(StopReason::StopString);
                }
            }
            TokenEvent::Finished(StopReason::Aborted) => return Err(ApiError::Draining),
            TokenEvent::Finished(reason) => self.finish(reason),
            TokenEvent::Failed(cause) => return Err(ApiError::Internal(cause)),
        }
        Ok(())
    }

    fn finish(&mut self, reason: StopReason) {
        // Dropping the stream tells the engine to stop, if it has not.
        self.tokens = None;
        self.ready.extend(self.assembler.finish(reason));
    }
}

/// OpenAI's names.
pub fn finish_reason(reason: StopReason) -> &'static str {
    match reason {
        StopReason::EndOfSequence | StopReason::StopString | StopReason::Aborted => "stop",
        StopReason::Length => "length",
    }
}
