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
    generation::{Generation, finish_reason},
    pipeline::Preparing,
    responses::{Chunk, ChunkChoice, Delta, ReplyHead, Videos},
    validate::StreamExtras,
};
use crate::output::{Answer, OutputEvent};

/// Events made before the socket takes them. Tokens wait in the sequence's own channel, not here.
const EVENTS_AHEAD: usize = 1;

/// A response that streams what `preparing` becomes.
pub fn reply(preparing: Preparing, head: ReplyHead, shape: Shape, interval: Duration) -> Response {
    respond(interval, |events| async move {
        let writer = Writer { events, head, view: shape.view, extras: shape.extras };
        writer.write_all(preparing).await
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
    extras: StreamExtras,
}

impl Writer {
    async fn write_all(&self, preparing: Preparing) -> Result<(), ApiError> {
        let mut generation: Generation = preparing.await?;
        let mut videos = std::mem::take(&mut generation.videos);
        for index in 0..generation.num_choices() {
            let videos = std::mem::take(&mut videos).into();
            let chunk = self.chunk(&generation, vec![ChunkChoice::of(index, Delta::role())]);
            self.send(Chunk { videos, ..chunk }).await;
        }
        let mut answers = vec![Answer::default(); generation.num_choices()];
        while let Some((index, event)) = generation.next().await? {
            let chunk = match &event {
                OutputEvent::Delta { segment, text, tokens } => ChunkChoice {
                    logprobs: self.view.logprobs(tokens),
                    ..ChunkChoice::of(index, Delta::text(*segment, text, self.view.wanted.reasoning_field))
                },
                OutputEvent::Finished(ending) => {
                    answers[index] = ending.answer.clone();
                    ChunkChoice {
                        logprobs: self.view.logprobs(&ending.tokens),
                        finish_reason: Some(finish_reason(ending.reason)),
                        answer: self.view.answer_scores(&ending.answer),
                        ..ChunkChoice::of(index, Delta::default())
                    }
                }
            };
            self.send(self.chunk(&generation, vec![chunk])).await;
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

    fn chunk<'a>(&'a self, generation: &Generation, choices: Vec<ChunkChoice<'a>>) -> Chunk<'a> {
        let usage = self.extras.running_usage.then(|| generation.counts().into());
        Chunk { head: &self.head, choices, usage, videos: Videos::default(), vote: None, obfuscation: None }
    }

    async fn send(&self, mut chunk: Chunk<'_>) {
        chunk.obfuscation = self.extras.obfuscation.then(|| padding(&chunk));
        self.events.send(&chunk).await;
    }
}
