//! One sequence: its tokens, how far it is computed, and the blocks it holds.

use std::{ops::Range, sync::Arc};

use super::{
    BlockId, StopReason, TokenId, VideoDigest,
    block_manager::{BlockName, ROOT},
    siblings::Reached,
    step::ComputeWork,
};

/// Name of a sequence inside the engine; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u64);

/// One video in a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VisualSpan {
    /// Where its visual tokens stand.
    pub range: Range<usize>,
    pub digest: VideoDigest,
    /// Frames to encode for it.
    pub num_frames: usize,
}

/// What the scheduler has to know of a new sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceSpec {
    /// The prompt, visual tokens included.
    pub token_ids: Vec<TokenId>,
    /// In order, not overlapping.
    pub spans: Vec<VisualSpan>,
    /// Blocks are shared with sequences of the same one only.
    pub cache_salt: Option<Arc<str>>,
    /// Most tokens of the completion.
    pub max_tokens: usize,
    /// Go on after an end token.
    pub ignore_eos: bool,
    /// Further ids that end the sequence.
    pub stop_token_ids: Vec<TokenId>,
    /// The logits of all prompt tokens are wanted: no block of the prompt is taken from the cache
    /// or from a sibling.
    pub scores_prompt: bool,
}

/// A sequence that waits or runs.
#[derive(Debug)]
pub struct Sequence {
    spec: SequenceSpec,
    num_prompt_tokens: usize,
    /// Tokens `[0, n)` whose keys and values are in the cache.
    num_computed: usize,
    blocks: Vec<BlockId>,
    /// How many of `blocks` are known to the prefix cache, and the content of the last of them.
    pub(super) num_registered: usize,
    pub(super) registered: BlockName,
    /// The first of the siblings it shares its prompt with, if it has any.
    pub(super) family: Option<SequenceId>,
}

impl Sequence {
    pub(super) fn new(spec: SequenceSpec, family: Option<SequenceId>) -> Self {
        let num_prompt_tokens = spec.token_ids.len();
        assert!(num_prompt_tokens > 0 && spec.max_tokens > 0, "an empty sequence was queued: this is a bug");
        Sequence {
            spec,
            num_prompt_tokens,
            num_computed: 0,
            blocks: Vec::new(),
            num_registered: 0,
            registered: ROOT,
            family,
        }
    }

    /// Prompt and completion so far.
    pub fn token_ids(&self) -> &[TokenId] {
        &self.spec.token_ids
    }

    /// Tokens of prompt and completion so far.
    pub fn num_tokens(&self) -> usize {
        self.spec.token_ids.len()
    }

    pub fn num_prompt_tokens(&self) -> usize {
        self.num_prompt_tokens
    }

    pub fn num_computed(&self) -> usize {
        self.num_computed
    }

    /// The completion so far.
    pub fn completion(&self) -> &[TokenId] {
        &self.spec.token_ids[self.num_prompt_tokens..]
    }

    pub fn spans(&self) -> &[VisualSpan] {
        &self.spec.spans
    }

    pub fn scores_prompt(&self) -> bool {
        self.spec.scores_prompt
    }

    pub(super) fn cache_salt(&self) -> Option<&Arc<str>> {
        self.spec.cache_salt.as_ref()
    }

    /// Block table: entry `i` holds positions `[i * block_size, (i + 1) * block_size)`.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Tokens it may ever have.
    pub(super) fn num_reserved_tokens(&self) -> usize {
        self.num_prompt_tokens + self.spec.max_tokens
    }

    /// Whether prompt tokens are still to be computed.
    pub(super) fn is_prefilling(&self) -> bool {
        self.num_computed < self.num_prompt_tokens
    }

    /// It holds `blocks` now, whose contents are known as far as `reached`.
    pub(super) fn admit(&mut self, blocks: Vec<BlockId>, reached: Reached) {
        self.blocks = blocks;
        self.catch_up(reached);
    }

    /// Its tokens were computed as far as `reached`, by itself or a sibling.
    pub(super) fn catch_up(&mut self, reached: Reached) {
        self.num_computed = reached.num_computed;
        self.num_registered = reached.num_registered;
        self.registered = reached.registered;
    }

    /// How far it is computed and registered.
    pub(super) fn reached(&self) -> Reached {
        Reached {
            num_computed: self.num_computed,
            num_registered: self.num_registered,
            registered: self.registered,
        }
    }

    /// The next `num_tokens` tokens as work.
    pub(super) fn work(&self, id: SequenceId, num_tokens: usize) -> ComputeWork {
        let positions = self.num_computed..self.num_computed + num_tokens;
        ComputeWork { sequence: id, samples: positions.end == self.num_tokens(), positions }
    }

    pub(super) fn set_computed(&mut self, num_computed: usize) {
        debug_assert!(self.num_computed < num_computed && num_computed <= self.num_tokens());
        self.num_computed = num_computed;
    }

    /// Appends a sampled token; tells whether it was the last.
    pub(super) fn push(&mut self, token: TokenId, end_token_ids: &[TokenId]) -> Option<StopReason> {
        let is_end = !self.spec.ignore_eos && end_token_ids.contains(&token);
        if is_end || self.spec.stop_token_ids.contains(&token) {
            return Some(StopReason::EndOfSequence);
        }
        self.spec.token_ids.push(token);
        (self.completion().len() == self.spec.max_tokens).then_some(StopReason::Length)
    }

    pub(super) fn into_blocks(self) -> Vec<BlockId> {
        self.blocks
    }
}
