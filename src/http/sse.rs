//! A reply as server-sent events, in the form and order that clients of OpenAI's API expect.
//!
//! Called by the generating endpoints. The stream owns the generation: dropped, it cancels everything under it.

use std::{convert::Infallible, panic::AssertUnwindSafe, time::Duration};

use axum::{
    http::{HeaderName, HeaderValue, header},
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::{FutureExt, StreamExt, stream};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tracing::Instrument;

use super::{
    chat::Shape,
    choices::ChoiceView,
    error::ApiError,
    generation::{Generation, finish_reason_of},
    pipeline::Preparing,
    responses::{Chunk, ChunkChoice, Delta, ReplyHead, Videos},
    tool_calls::CallReader,
    validate::StreamExtras,
};
use crate::{
    output::{Answer, Ending, OutputEvent, ScoredToken, Segment},
    scheduler::StopReason,
};

/// Events made before the socket takes them. Tokens wait in the sequence's own channel, not here.
const EVENTS_AHEAD: usize = 1;

/// A response that streams what `preparing` becomes.
pub fn reply(preparing: Preparing, head: ReplyHead, shape: Shape, interval: Duration) -> Response {
    respond(interval, |events| async move {
        let Shape { view, functions, extras, .. } = shape;
        Writer { events, head, view, functions, calls: vec![], extras }.write_all(preparing).await
    })
}

/// A response of the events that `write` sends, with a comment whenever `interval` passes in silence. An error of
/// `write` is the last event.
pub fn respond<W>(interval: Duration, write: impl FnOnce(EventSink) -> W) -> Response
where
    W: Future<Output = Result<(), ApiError>> + Send + 'static,
{
    let (sender, events) = mpsc::channel(EVENTS_AHEAD);
    let sink = EventSink(sender);
    let work = write_all(write(sink.clone()), sink).in_current_span();
    // The work is polled as a part of the stream itself: it has no life of its own that could outlast the client.
    let work = stream::once(work).filter_map(|()| std::future::ready(None));
    let events = stream::select(ReceiverStream::new(events), work).map(Ok::<_, Infallible>);
    let keep_alive = KeepAlive::new().interval(interval).text("keep-alive");
    let headers = [
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // Reverse proxies must pass each event on at once.
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (headers, Sse::new(events).keep_alive(keep_alive)).into_response()
}

async fn write_all(work: impl Future<Output = Result<(), ApiError>>, sink: EventSink) {
    let outcome = AssertUnwindSafe(work).catch_unwind().await;
    let error = match outcome {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error,
        Err(_) => ApiError::Internal("a panic while streaming".into()),
    };
    sink.send(&error.to_wire()).await;
}

/// Where the events of a stream go.
#[derive(Debug, Clone)]
pub struct EventSink(mpsc::Sender<Event>);

impl EventSink {
    /// An event without a name.
    pub async fn send(&self, data: &impl Serialize) {
        self.push(json(Event::default(), data)).await;
    }

    /// An event with a name.
    pub async fn send_named(&self, name: &str, data: &impl Serialize) {
        self.push(json(Event::default().event(name), data)).await;
    }

    /// What tells clients of OpenAI's older streams that they are over.
    pub async fn send_done(&self) {
        self.push(Event::default().data("[DONE]")).await;
    }

    async fn push(&self, event: Event) {
        // Fails only when the stream is being dropped, and the sender with it.
        let _ = self.0.send(event).await;
    }
}

fn json(event: Event, data: &impl Serialize) -> Event {
    event.json_data(data).expect("wire types are JSON without newlines: this is a bug")
}

/// Padded events differ in size by multiples of this.
const PADDED_BYTES: usize = 64;

/// Returns random text for the `obfuscation` of an event, so that the size of the event does not
/// reveal the length of its text.
pub fn padding(event: &impl Serialize) -> String {
    let num_bytes = serde_json::to_vec(event).map_or(0, |json| json.len());
    let mut random: String = (0..2).map(|_| uuid::Uuid::new_v4().simple().to_string()).collect();
    random.truncate(PADDED_BYTES - num_bytes % PADDED_BYTES);
    random
}

/// Turns pieces into events.
struct Writer {
    events: EventSink,
    head: ReplyHead,
    view: ChoiceView,
    /// Functions one of which each answer calls; empty: the answers are text.
    functions: Vec<String>,
    /// One per choice where the answers are calls.
    calls: Vec<CallReader>,
    extras: StreamExtras,
}

impl Writer {
    async fn write_all(mut self, preparing: Preparing) -> Result<(), ApiError> {
        let mut generation: Generation = preparing.await?;
        let mut videos = std::mem::take(&mut generation.videos);
        if !self.functions.is_empty() {
            self.calls = vec![CallReader::new(self.functions.clone()); generation.num_choices()];
        }
        for index in 0..generation.num_choices() {
            let videos = std::mem::take(&mut videos).into();
            // A call has no content, not even an empty one.
            let content = Some("").filter(|_| self.calls.is_empty());
            let role = ChunkChoice::of(index, Delta { content, ..Delta::role() });
            self.send(Chunk { videos, ..self.chunk(&generation, vec![role]) }).await;
        }
        let mut answers = vec![Answer::default(); generation.num_choices()];
        while let Some((index, event)) = generation.next().await? {
            match &event {
                OutputEvent::Delta { segment, text, tokens }
                    if *segment != Segment::Think && !self.calls.is_empty() =>
                {
                    self.send_call(&generation, index, text, tokens).await;
                }
                OutputEvent::Delta { segment, text, tokens } => {
                    let logprobs = self.view.logprobs(tokens);
                    let delta = Delta::text(*segment, text, self.view.wanted.reasoning_field);
                    let choice = ChunkChoice { logprobs, ..ChunkChoice::of(index, delta) };
                    self.send_choice(&generation, choice).await;
                }
                OutputEvent::Finished(ending) => {
                    answers[index] = ending.answer.clone();
                    self.send_end(&generation, index, ending).await;
                }
            }
        }
        if let Some(vote) = self.view.vote(&answers) {
            self.send(Chunk { vote: Some(vote), ..self.chunk(&generation, vec![]) }).await;
        }
        if self.extras.usage {
            let usage = Some(generation.counts().into());
            self.send(Chunk { usage, ..self.chunk(&generation, vec![]) }).await;
        }
        self.events.send_done().await;
        Ok(())
    }

    /// More of an answer that is a call.
    async fn send_call(&mut self, generation: &Generation, index: usize, text: &str, tokens: &[ScoredToken]) {
        let mut logprobs = self.view.logprobs(tokens);
        for piece in self.calls[index].push(text) {
            let logprobs = logprobs.take();
            let delta = Delta::call(piece.into());
            self.send_choice(generation, ChunkChoice { logprobs, ..ChunkChoice::of(index, delta) }).await;
        }
        // It is open yet what is called, but the tokens are certain.
        if logprobs.is_some() {
            let choice = ChunkChoice { logprobs, ..ChunkChoice::of(index, Delta::default()) };
            self.send_choice(generation, choice).await;
        }
    }

    async fn send_end(&mut self, generation: &Generation, index: usize, ending: &Ending) {
        let mut calls = false;
        if let Some(reader) = self.calls.get_mut(index) {
            calls = reader.has_begun();
            if let Some(piece) = reader.finish(ending.reason == StopReason::EndOfSequence) {
                self.send_choice(generation, ChunkChoice::of(index, Delta::call(piece.into()))).await;
            }
        }
        let last = ChunkChoice {
            logprobs: self.view.logprobs(&ending.tokens),
            finish_reason: Some(finish_reason_of(ending.reason, calls)),
            answer: self.view.answer_scores(&ending.answer),
            ..ChunkChoice::of(index, Delta::default())
        };
        self.send_choice(generation, last).await;
    }

    async fn send_choice(&self, generation: &Generation, choice: ChunkChoice<'_>) {
        self.send(self.chunk(generation, vec![choice])).await;
    }

    fn chunk<'a>(&'a self, generation: &Generation, choices: Vec<ChunkChoice<'a>>) -> Chunk<'a> {
        let usage = self.extras.running_usage.then(|| generation.counts().into());
        Chunk { head: &self.head, choices, usage, videos: Videos::default(), vote: None, obfuscation: None }
    }

    async fn send(&self, mut chunk: Chunk<'_>) {
        chunk.obfuscation = self.extras.obfuscation.then(|| padding(&chunk));
        self.events.send(&chunk).await;
    }
}
