//! A running generation: token events of all choices in, output events out. Streams and unary replies read the same ones.
//!
//! Made by [`super::pipeline`]; dropped, it cancels the sequences. Knows nothing of JSON.

use std::{
    collections::VecDeque,
    task::{Context, Poll},
    time::Instant,
};

use super::{error::ApiError, progress::Progress, running::RunningChat, validate::Reasoning};
use crate::{
    engine::{PromptToken, TokenEvent, TokenStream},
    media::VideoInfo,
    output::{Ending, OutputAssembler, OutputEvent, Segment},
    scheduler::StopReason,
    telemetry::TokenCounts,
};

/// See the module.
#[derive(Debug)]
pub struct Generation {
    choices: Vec<Choice>,
    /// Who is listened to first: none can keep the others waiting.
    turn: usize,
    /// Each prompt has so many choices, behind one another.
    choices_per_prompt: usize,
    /// The choices end as soon as their prompts are computed.
    prompt_only: bool,
    /// Assembled, not handed out yet.
    ready: VecDeque<(usize, OutputEvent)>,
    reasoning: Reasoning,
    /// What was sampled of the videos.
    pub videos: Vec<VideoInfo>,
    progress: Progress,
    running: Option<RunningChat>,
}

/// One of the replies to a request.
#[derive(Debug)]
struct Choice {
    /// `None` once nothing more is wanted of the engine.
    tokens: Option<TokenStream>,
    assembler: OutputAssembler,
    last_token: Option<Instant>,
    /// The tokens of its prompt, where they are scored.
    prompt: Vec<PromptToken>,
    /// It has begun its answer, or has ended without one.
    answers: bool,
}

impl Generation {
    /// One choice for each of `sequences`. `progress` knows the prompt's counts already.
    pub fn new(
        sequences: Vec<(TokenStream, OutputAssembler)>,
        reasoning: Reasoning,
        videos: Vec<VideoInfo>,
        progress: Progress,
    ) -> Self {
        let choice = |(tokens, assembler)| Choice {
            tokens: Some(tokens),
            assembler,
            last_token: None,
            prompt: vec![],
            answers: false,
        };
        let choices: Vec<Choice> = sequences.into_iter().map(choice).collect();
        Generation {
            turn: 0,
            choices_per_prompt: choices.len(),
            prompt_only: false,
            choices,
            ready: VecDeque::new(),
            reasoning,
            videos,
            progress,
            running: None,
        }
    }

    /// Divides the choices among several prompts. With `prompt_only` nothing is generated.
    pub fn of_prompts(self, choices_per_prompt: usize, prompt_only: bool) -> Self {
        Generation { choices_per_prompt, prompt_only, ..self }
    }

    /// Takes the scored tokens of the prompt of a choice; they are there before its first event.
    pub fn take_prompt(&mut self, index: usize) -> Vec<PromptToken> {
        self.choices.get_mut(index).map(|choice| std::mem::take(&mut choice.prompt)).unwrap_or_default()
    }

    /// Known to others as `running` until it is over, and there as long as it thinks.
    pub fn listed(self, running: RunningChat) -> Self {
        Generation { running: Some(running), ..self }
    }

    /// The next event and the index of its choice. Each choice ends with one [`OutputEvent::Finished`]; `None` follows
    /// when all have.
    ///
    /// # Errors
    /// When the deadline passes, the step of a sequence fails, or the engine ends. All choices end with it.
    pub async fn next(&mut self) -> Result<Option<(usize, OutputEvent)>, ApiError> {
        let next = self.advance().await;
        match &next {
            Ok(Some(_)) => {}
            Ok(None) => self.progress.completed(),
            Err(error) => {
                self.choices.clear();
                self.progress.ended_by(error);
            }
        }
        next
    }

    /// How many choices there are, those that are over included.
    pub fn num_choices(&self) -> usize {
        self.choices.len()
    }

    /// What the request cost so far.
    pub fn counts(&self) -> TokenCounts {
        let mut counts = self.progress.tokens();
        // Those of the choices that are over are in it already.
        for choice in self.choices.iter().filter(|choice| choice.tokens.is_some()) {
            counts.reasoning += choice.assembler.num_reasoning_tokens();
        }
        counts
    }

    async fn advance(&mut self) -> Result<Option<(usize, OutputEvent)>, ApiError> {
        loop {
            while let Some((index, event)) = self.ready.pop_front() {
                self.note(index, &event);
                let shown =
                    if self.reasoning == Reasoning::Hidden { without_thinking(event) } else { Some(event) };
                if let Some(event) = shown {
                    return Ok(Some((index, event)));
                }
            }
            let deadline = self.progress.deadline();
            let heard = deadline.bound(std::future::poll_fn(|context| self.poll_tokens(context))).await?;
            match heard {
                None => return Ok(None),
                Some((index, event)) => self.take(index, event.ok_or(ApiError::EngineStopped)?)?,
            }
        }
    }

    fn note(&mut self, index: usize, event: &OutputEvent) {
        let OutputEvent::Delta { segment, text, .. } = event else { return };
        self.progress.said(index, text);
        // Where thinking and answer are not told apart, nobody knows when the answer begins.
        if *segment != Segment::Think && self.reasoning != Reasoning::Raw {
            self.progress.answers();
        }
        if *segment == Segment::Answer {
            self.thinks_no_more(index);
        }
    }

    fn thinks_no_more(&mut self, index: usize) {
        let choice = self.choices.get_mut(index).filter(|choice| !choice.answers);
        if let (Some(choice), Some(running)) = (choice, &self.running) {
            choice.answers = true;
            running.answers();
        }
    }

    /// Who has something to say; `None` when all choices are over.
    fn poll_tokens(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, Option<TokenEvent>)>> {
        let num_choices = self.choices.len();
        let mut all_over = true;
        for offset in 0..num_choices {
            let index = (self.turn + offset) % num_choices;
            let Some(tokens) = &mut self.choices[index].tokens else { continue };
            all_over = false;
            if let Poll::Ready(event) = tokens.poll_next(context) {
                self.turn = index + 1;
                return Poll::Ready(Some((index, event)));
            }
        }
        if all_over { Poll::Ready(None) } else { Poll::Pending }
    }

    fn take(&mut self, index: usize, event: TokenEvent) -> Result<(), ApiError> {
        let choice = &mut self.choices[index];
        match event {
            // What the first one found in the cache; the others found what the first one had computed.
            TokenEvent::Started { cached_tokens } if index.is_multiple_of(self.choices_per_prompt) => {
                self.progress.started(cached_tokens);
            }
            TokenEvent::Started { .. } => {}
            TokenEvent::PromptScored(tokens) => choice.prompt = tokens,
            TokenEvent::PromptComputed(times) => {
                if index == 0 {
                    self.progress.prompt_computed(times);
                }
                if self.prompt_only {
                    self.finish(index, StopReason::Length);
                }
            }
            TokenEvent::EndToken { id, logprobs } => choice.assembler.push_end(id, logprobs),
            TokenEvent::Token { id, logprobs } => {
                let now = Instant::now();
                self.progress.token(choice.last_token.replace(now), now);
                let events = choice.assembler.push_scored(id, logprobs);
                let stopped = choice.assembler.stopped();
                self.ready.extend(events.into_iter().map(|event| (index, event)));
                if stopped {
                    self.finish(index, StopReason::StopString);
                }
            }
            TokenEvent::Finished(StopReason::Aborted) => return Err(ApiError::Draining),
            TokenEvent::Finished(reason) => self.finish(index, reason),
            TokenEvent::Failed(cause) => return Err(ApiError::Internal(cause)),
        }
        Ok(())
    }

    fn finish(&mut self, index: usize, reason: StopReason) {
        let choice = &mut self.choices[index];
        // Dropping the stream tells the engine to stop, if it has not.
        choice.tokens = None;
        for event in choice.assembler.finish(reason) {
            if let OutputEvent::Finished(ending) = &event {
                self.progress.choice_completed(finish_reason(ending.reason), ending.reasoning_tokens);
            }
            self.ready.push_back((index, event));
        }
        // One that ends without an answer has nothing left to think either.
        self.thinks_no_more(index);
    }
}

/// What is left of an event when the thinking is hidden, its tokens included.
fn without_thinking(mut event: OutputEvent) -> Option<OutputEvent> {
    let (OutputEvent::Delta { tokens, .. } | OutputEvent::Finished(Ending { tokens, .. })) = &mut event;
    tokens.retain(|token| !token.thinking);
    (!matches!(event, OutputEvent::Delta { segment: Segment::Think, .. })).then_some(event)
}

/// OpenAI's names; `calls`: the answer is a call of a function.
pub fn finish_reason_of(reason: StopReason, calls: bool) -> &'static str {
    match finish_reason(reason) {
        "stop" if calls => "tool_calls",
        reason => reason,
    }
}

/// OpenAI's names.
pub fn finish_reason(reason: StopReason) -> &'static str {
    match reason {
        StopReason::EndOfSequence | StopReason::StopString | StopReason::Aborted => "stop",
        StopReason::Length => "length",
    }
}
