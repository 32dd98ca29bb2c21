//! What the engine keeps of each request while it runs.
//!
//! Owned by the worker; the runner sees it as [`Requests`].

use std::{collections::HashMap, sync::Mutex};

use tokio::sync::mpsc;

use super::{
    guidance::Guide,
    handle::{NewSequence, Place, PromptTimes, PromptToken, Submission, TokenEvent, VideoInput},
    prompt_scores::PromptScore,
    runner::Requests,
};
use crate::scheduler::{SamplingParams, SequenceId, SequenceSpec, TokenId, VisualSpan};

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

impl Request {
    /// Divides a submission into the scheduler's part and the engine's. `end_token_ids` are the
    /// model's.
    pub(super) fn of(submission: Submission, end_token_ids: &[TokenId]) -> (SequenceSpec, Request) {
        let Submission { sequence, events, place } = submission;
        let NewSequence { token_ids, videos, cache_salt, mut sampling, guide } = sequence;
        if sampling.min_tokens > 0 {
            sampling.ending_ids.clone_from(&sampling.stop_token_ids);
            if !sampling.ignore_eos {
                sampling.ending_ids.extend(end_token_ids);
            }
        }
        let prompt = match sampling.scores_prompt {
            true => token_ids.iter().map(|&id| PromptToken { id, logprobs: None }).collect(),
            false => Vec::new(),
        };
        let span = |video: &VideoInput| VisualSpan {
            range: video.span.clone(),
            digest: video.digest,
            num_frames: video.frames.num_frames(),
        };
        let spec = SequenceSpec {
            token_ids,
            spans: videos.iter().map(span).collect(),
            cache_salt,
            max_tokens: sampling.max_tokens,
            ignore_eos: sampling.ignore_eos,
            stop_token_ids: sampling.stop_token_ids.clone(),
            scores_prompt: sampling.scores_prompt,
        };
        let (guide, times) = (guide.map(Mutex::new), Some(PromptTimes::default()));
        (spec, Request { sampling, videos, guide, events, times, prompt, _place: place })
    }
}

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
