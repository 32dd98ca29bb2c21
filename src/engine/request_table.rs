//! What the engine keeps of each request while it runs.
//!
//! Owned by the worker; the runner sees it as [`Requests`].

use std::{collections::HashMap, sync::Mutex};

use tokio::sync::mpsc;

use super::{
    guidance::Guide,
    handle::{Place, PromptTimes, TokenEvent, VideoInput},
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
    pub _place: Place,
}

pub(super) struct RequestTable(pub HashMap<SequenceId, Request>);

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
