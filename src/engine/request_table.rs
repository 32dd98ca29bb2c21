//! What the engine keeps of each request while it runs.
//!
//! Owned by the worker; the runner sees it as [`Requests`].

use std::{collections::HashMap, sync::Mutex};

use tokio::sync::mpsc;

use super::{
    guidance::Guide,
    handle::{Place, PromptTimes, PromptToken, TokenEvent, VideoInput},
    prompt_scores::PromptScore,
    runner::Requests,
};
use crate::scheduler::{SamplingParams, SequenceId};

pub(super) struct Request {
    pub sampling: SamplingParams,
    pub videos: Vec<VideoInput>,
    pub guide: Option<Mutex<Guide>>,
    pub events: mpsc::Sender<TokenEvent>,
    /// Until they are told.
    pub times: Option<PromptTimes>,
    /// The prompt's tokens and what is known of them, where they are scored.
    pub prompt: Vec<PromptToken>,
    pub _place: Place,
}

pub(super) struct RequestTable(pub HashMap<SequenceId, Request>);

impl RequestTable {
    /// Keeps the scores of a step until their prompts are computed.
    pub(super) fn add_scores(&mut self, scores: Vec<PromptScore>) {
        for PromptScore { sequence, position, logprobs } in scores {
            let request = self.0.get_mut(&sequence);
            if let Some(token) = request.and_then(|request| request.prompt.get_mut(position)) {
                token.logprobs = Some(logprobs);
            }
        }
    }
}

impl Requests for RequestTable {
    fn sampling(&self, id: SequenceId) -> &SamplingParams {
        &self.0[&id].sampling
    }

    fn videos(&self, id: SequenceId) -> &[VideoInput] {
        &self.0[&id].videos
    }

    fn guide(&self, id: SequenceId) -> Option<&Mutex<Guide>> {
        self.0[&id].guide.as_ref()
    }
}
