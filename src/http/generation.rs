//! A running generation: token events in, pieces of the reply out. Streams and unary replies read the same pieces.
//!
//! Made by `http/chat.rs`; dropped, it cancels the sequence. Knows nothing of JSON.

use std::{collections::VecDeque, time::Instant};

use super::{
    error::ApiError,
    progress::Progress,
    validate::Reasoning,
};
use crate::{
    engine::{TokenEvent, TokenStream},
    media::VideoInfo,
    output::{OutputAssembler, OutputEvent, Segment},
    scheduler::StopReason,
    telemetry::metrics::TokenCounts,
};

/// Part of a reply.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    /// More text of one segment; never empty.
    Text { segment: Segment, text: String },
    /// The end.
    End { finish_reason: &'static str, tokens: TokenCounts },
}

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

    /// The next piece; nothing follows [`Piece::End`] or an error.
    ///
    /// # Errors
    /// When the deadline passes, the sequence's step fails, or the engine ends.
    pub async fn next(&mut self) -> Result<Piece, ApiError> {
        let piece = self.advance().await;
        match &piece {
            Ok(Piece::Text { .. }) => {}
            Ok(Piece::End { finish_reason, tokens }) => self.progress.completed(finish_reason, *tokens),
            Err(error) => {
                self.tokens = None;
                self.progress.ended_by(error);
            }
        }
        piece
    }

    async fn advance(&mut self) -> Result<Piece, ApiError> {
        loop {
            while let Some(event) = self.ready.pop_front() {
                match event {
                    OutputEvent::Delta { segment: Segment::Think, .. } if self.reasoning == Reasoning::Hidden => {}
                    OutputEvent::Delta { segment, text } => return Ok(Piece::Text { segment, text }),
                    OutputEvent::Finished { reason, reasoning_tokens, completion_tokens } => {
                        let tokens = TokenCounts {
                            completion: completion_tokens,
                            reasoning: reasoning_tokens,
                            ..self.progress.tokens()
                        };
                        return Ok(Piece::End { finish_reason: finish_reason(reason), tokens });
                    }
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

fn finish_reason(reason: StopReason) -> &'static str {
    match reason {
        StopReason::EndOfSequence | StopReason::StopString | StopReason::Aborted => "stop",
        StopReason::Length => "length",
    }
}
