//! What runs in the next step: a state machine without clock, randomness, tensors or async.
//!
//! Called by [`crate::engine`] only. Imports `std` only (enforced by a test).
//!
//! One round is [`Scheduler::schedule`] → the engine runs the plan → [`Scheduler::complete`] (or
//! [`Scheduler::fail`]). Invariants, checked by [`Scheduler::check_integrity`]:
//!
//! - a running sequence holds blocks for its prompt and all tokens it may still produce, so it is never
//!   preempted and never runs out of memory;
//! - a block is free, kept for reuse, or held by exactly as many sequences as its count says;
//! - blocks are shared only when every token and every video before them is the same;
//! - siblings (the choices of one request) compute the full blocks of their prompt once.

mod block_manager;
pub mod cache_events;
mod encoder_slots;
mod plan;
pub mod sampling_params;
pub mod sequence;
mod siblings;
pub mod step;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};

use block_manager::BlockManager;
pub use block_manager::{BlockId, PrefixStats};
use cache_events::{BlockHash, CacheEvent};
use encoder_slots::EncoderSlots;
pub use sampling_params::{SamplingParams, TokenLogprobs};
use sequence::Sequence;
pub use sequence::{SequenceId, SequenceSpec, VisualSpan};
use siblings::{Families, Reached};
pub use step::{ComputeWork, EncodeWork, SequenceUpdate, StepPlan};

/// A token of the model's vocabulary.
pub type TokenId = u32;

/// Content address of a sampled video: bytes, every effective sampling parameter, preprocessing version.
pub type VideoDigest = [u8; 32];

/// The id that stands in a prompt for one visual token. No vocabulary reaches it.
pub const VISUAL_TOKEN: TokenId = TokenId::MAX;

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// The model produced one of its end tokens (or one of the request's stop token ids).
    EndOfSequence,
    /// A stop string of the request appeared (decided on the output side).
    StopString,
    /// The completion reached its maximum number of tokens.
    Length,
    /// The client left or the server is stopping.
    Aborted,
}

/// What a step may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerLimits {
    /// Tokens a block.
    pub block_size: usize,
    /// Blocks of the KV cache.
    pub num_blocks: usize,
    /// Sequences in a step.
    pub max_running_sequences: usize,
    /// Prompt tokens computed in one step.
    pub max_prefill_tokens: usize,
    /// Prompt tokens in one step whose logits are all wanted; each takes a row of the vocabulary's
    /// size.
    pub max_scored_tokens: usize,
    /// Frames encoded in one step.
    pub max_encode_frames: usize,
    /// Videos whose encoded tokens are kept (those in use included).
    pub max_cached_videos: usize,
    /// Whether prompts share blocks.
    pub prefix_cache: bool,
    /// Tokens that end a sequence.
    pub end_token_ids: Vec<TokenId>,
}

/// Counts for the metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    pub num_waiting: usize,
    pub num_running: usize,
    pub num_used_blocks: usize,
    /// Held by nobody, kept for prompts that begin alike.
    pub num_cached_blocks: usize,
    pub prefix: PrefixStats,
    pub encoder_queries: u64,
    pub encoder_hits: u64,
}

/// Owner of every sequence; queues and plans hold ids.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    sequences: HashMap<SequenceId, Sequence>,
    /// Not admitted yet, first come first.
    waiting: VecDeque<SequenceId>,
    /// Admitted, in order of admission.
    running: Vec<SequenceId>,
    blocks: BlockManager,
    encoder: EncoderSlots,
    families: Families,
    next_id: u64,
}

impl Scheduler {
    /// An empty scheduler. Every limit must be at least 1.
    pub fn new(limits: SchedulerLimits) -> Self {
        let least = [
            limits.block_size,
            limits.num_blocks,
            limits.max_running_sequences,
            limits.max_prefill_tokens,
            limits.max_scored_tokens,
            limits.max_encode_frames,
            limits.max_cached_videos,
        ];
        assert!(least.iter().all(|&n| n > 0), "every scheduler limit must be at least 1");
        Scheduler {
            blocks: BlockManager::new(limits.num_blocks, limits.block_size, limits.prefix_cache),
            encoder: EncoderSlots::new(limits.max_cached_videos),
            families: Families::default(),
            sequences: HashMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            next_id: 0,
            limits,
        }
    }

    /// From now on, [`Scheduler::take_cache_events`] tells how the prefix cache changes; to be called before the first
    /// sequence. Hashes of blocks begin with `seed`.
    pub fn log_cache_events(&mut self, seed: BlockHash) {
        self.blocks.start_log(seed);
    }

    /// What changed in the prefix cache; to be called after each step. Empty when it was not asked for.
    pub fn take_cache_events(&mut self) -> Vec<CacheEvent> {
        self.blocks.take_events()
    }

    /// Queues a sequence. It must fit the cache as a whole (the engine's handle has checked that).
    pub fn add(&mut self, spec: SequenceSpec) -> SequenceId {
        self.queue(spec, None)
    }

    /// Queues sequences that all have the same prompt, which is then computed only once.
    pub fn add_siblings(&mut self, specs: Vec<SequenceSpec>) -> Vec<SequenceId> {
        let Some(spec) = specs.first() else { return Vec::new() };
        let same = |other: &SequenceSpec| other.token_ids == spec.token_ids && other.spans == spec.spans;
        assert!(specs.iter().all(same), "siblings have different prompts: this is a bug");
        // The last prompt token is left to each of them: its logits are wanted.
        let block_size = self.limits.block_size;
        let num_shared = (spec.token_ids.len().saturating_sub(1)) / block_size * block_size;
        let shares = specs.len() > 1 && num_shared > 0 && !spec.scores_prompt;
        let first = shares.then_some(SequenceId(self.next_id));
        if let Some(first) = first {
            self.families.found(first, specs.len(), num_shared);
        }
        specs.into_iter().map(|spec| self.queue(spec, first)).collect()
    }

    fn queue(&mut self, spec: SequenceSpec, family: Option<SequenceId>) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let sequence = Sequence::new(spec, family);
        assert!(
            sequence.num_reserved_tokens().div_ceil(self.limits.block_size) <= self.limits.num_blocks
                && sequence.spans().len() <= self.limits.max_cached_videos,
            "a sequence that can never be admitted was queued: this is a bug"
        );
        self.sequences.insert(id, sequence);
        self.waiting.push_back(id);
        id
    }

    /// Forgets a sequence at any point and frees what it holds. Unknown ids are ignored: it may just have ended.
    pub fn abort(&mut self, id: SequenceId) {
        if self.sequences.contains_key(&id) {
            self.remove(id);
        }
    }

    /// Whether there is anything to do.
    pub fn has_work(&self) -> bool {
        !self.sequences.is_empty()
    }

    /// A sequence that is waiting or running.
    pub fn sequence(&self, id: SequenceId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// Admits what fits, then plans one step: all decodes, and bounded encoding and prefill.
    pub fn schedule(&mut self) -> StepPlan {
        let mut plan = StepPlan { admitted: self.admit(), ..StepPlan::default() };
        (plan.encode, plan.next_encode) = self.plan_encode();
        plan.compute = self.plan_decode();
        plan.num_decodes = plan.compute.len();
        let prefill = self.plan_prefill();
        plan.compute.extend(prefill);
        plan.drop_videos = self.encoder.take_evicted();
        plan
    }

    /// Takes in what a step computed: `sampled` holds one token for each work of the plan that samples, in order.
    pub fn complete(&mut self, plan: &StepPlan, sampled: &[TokenId]) -> Vec<SequenceUpdate> {
        for work in &plan.encode {
            self.encoder.advance(&work.digest, work.frames.end);
        }
        let mut sampled = sampled.iter().copied();
        let mut updates = Vec::new();
        for work in &plan.compute {
            let token =
                work.samples.then(|| sampled.next().expect("a sampled token is missing: this is a bug"));
            if let Some(update) = self.advance(work, token) {
                updates.push(update);
            }
        }
        debug_assert!(sampled.next().is_none(), "more tokens than sampling works: this is a bug");
        updates
    }

    /// A step failed: its sequences are gone, and what it encoded starts over. Returns the failed ids.
    pub fn fail(&mut self, plan: &StepPlan) -> Vec<SequenceId> {
        let mut failed: Vec<SequenceId> = plan.encode.iter().map(|work| work.sequence).collect();
        failed.extend(plan.compute.iter().map(|work| work.sequence));
        failed.sort_unstable();
        failed.dedup();
        failed.retain(|id| self.sequences.contains_key(id));
        failed.iter().for_each(|&id| self.remove(id));
        plan.encode.iter().for_each(|work| self.encoder.restart(&work.digest));
        failed
    }

    /// Tokens that end a sequence.
    pub fn end_token_ids(&self) -> &[TokenId] {
        &self.limits.end_token_ids
    }

    /// Sequences that are admitted.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Counts for the metrics.
    pub fn stats(&self) -> SchedulerStats {
        let (encoder_queries, encoder_hits) = self.encoder.queries_and_hits();
        SchedulerStats {
            num_waiting: self.waiting.len(),
            num_running: self.running.len(),
            num_used_blocks: self.blocks.num_used(),
            num_cached_blocks: self.blocks.num_reusable(),
            prefix: self.blocks.stats(),
            encoder_queries,
            encoder_hits,
        }
    }

    /// First come first served: the head of the queue waits for room, and nobody passes it.
    fn admit(&mut self) -> Vec<(SequenceId, usize)> {
        let mut admitted = Vec::new();
        while self.running.len() < self.limits.max_running_sequences {
            let Some(&id) = self.waiting.front() else { break };
            let Some(num_known) = self.admit_one(id) else { break };
            admitted.push((id, num_known));
            self.waiting.pop_front();
            self.running.push(id);
        }
        admitted
    }

    /// Gives a sequence all it needs to run, if there is enough; tells how many of its tokens are computed already.
    fn admit_one(&mut self, id: SequenceId) -> Option<usize> {
        let sequence = self.sequences.get_mut(&id).expect("a waiting sequence is unknown: this is a bug");
        let family = self.families.of(sequence);
        let shared = family.and_then(|family| family.shared());
        let num_known = match shared {
            Some((_, reached)) => reached.num_computed,
            None => self.blocks.num_known_tokens(sequence),
        };
        let needs_video = |span: &&VisualSpan| span.range.end > num_known;
        let wanted: Vec<_> =
            sequence.spans().iter().filter(needs_video).map(|s| (s.digest, s.num_frames)).collect();
        if !self.encoder.has_room(&wanted) {
            return None;
        }
        if let Some((blocks, reached)) = shared {
            // What siblings have in common was asked for by the first of them.
            sequence.admit(self.blocks.extend(blocks.to_vec(), sequence)?, reached);
        } else {
            let num_shared = family.map_or(0, |family| family.num_shared);
            let prefix = self.blocks.allocate(sequence)?;
            let reached = Reached::from(&prefix);
            self.blocks.count_query(sequence.num_prompt_tokens(), prefix.num_tokens);
            self.encoder.count_query(&wanted);
            if let Some(first) = sequence.family {
                let blocks = &prefix.blocks[..num_shared / self.limits.block_size];
                self.blocks.hold(blocks);
                self.families.admit(first, blocks, reached);
            }
            sequence.admit(prefix.blocks, reached);
        }
        self.encoder.acquire_all(&wanted);
        Some(num_known)
    }

    /// Moves one sequence past `work`; tells what its client has to hear.
    fn advance(&mut self, work: &ComputeWork, token: Option<TokenId>) -> Option<SequenceUpdate> {
        let id = work.sequence;
        // Aborted while the step ran.
        let sequence = self.sequences.get(&id)?;
        let num_shared = self.families.of(sequence).map_or(0, |family| family.num_shared);
        if sequence.num_computed() < num_shared {
            self.advance_family(id, work.positions.end.min(num_shared));
        }
        self.advance_one(id, work.positions.end);
        let token = token?;
        let sequence = self.sequences.get_mut(&id)?;
        let finished = sequence.push(token, &self.limits.end_token_ids);
        if finished.is_some() {
            self.remove(id);
        }
        let token = (finished != Some(StopReason::EndOfSequence)).then_some(token);
        Some(SequenceUpdate { sequence: id, token, finished })
    }

    /// Tokens up to `num_computed` are in the cache.
    fn advance_one(&mut self, id: SequenceId, num_computed: usize) {
        let sequence = self.sequences.get_mut(&id).expect("a running sequence is unknown: this is a bug");
        let already_passed = sequence.num_computed();
        if already_passed < num_computed {
            sequence.set_computed(num_computed);
            self.blocks.register_full_blocks(sequence);
            self.encoder.release_passed(sequence, already_passed);
        }
    }

    /// A sibling has computed what it shares up to `num_computed`: the others move along.
    fn advance_family(&mut self, id: SequenceId, num_computed: usize) {
        self.advance_one(id, num_computed);
        let (family, reached) = (self.sequences[&id].family, self.sequences[&id].reached());
        if let Some(first) = family {
            self.families.advance(first, reached);
        }
        for other in self.running.iter().filter(|&&other| other != id) {
            let sequence =
                self.sequences.get_mut(other).expect("a running sequence is unknown: this is a bug");
            if sequence.family == family {
                let already_passed = sequence.num_computed();
                sequence.catch_up(reached);
                self.encoder.release_passed(sequence, already_passed);
            }
        }
    }

    fn remove(&mut self, id: SequenceId) {
        let sequence = self.sequences.remove(&id).expect("an unknown sequence was removed: this is a bug");
        if let Some(place) = self.running.iter().position(|&running| running == id) {
            self.running.remove(place);
            for span in sequence.spans().iter().filter(|span| span.range.end > sequence.num_computed()) {
                self.encoder.release(&span.digest);
            }
        } else {
            self.waiting.retain(|&waiting| waiting != id);
        }
        let family = sequence.family;
        self.blocks.release(sequence.into_blocks());
        if let Some(first) = family {
            self.blocks.release(self.families.leave(first));
        }
    }

    /// Panics when an invariant does not hold. Cheap enough to run after each step in tests.
    pub fn check_integrity(&self) {
        assert_eq!(self.sequences.len(), self.waiting.len() + self.running.len());
        let tables = self.running.iter().map(|id| self.sequences[id].blocks());
        self.blocks.check_integrity(tables.chain(self.families.tables()));
        let all = self.sequences.iter().map(|(id, sequence)| (sequence, self.running.contains(id)));
        self.families.check_integrity(all);
        for id in &self.waiting {
            assert!(self.sequences[id].blocks().is_empty(), "a waiting sequence holds blocks");
        }
        for id in &self.running {
            let sequence = &self.sequences[id];
            let reserved = sequence.blocks().len() * self.limits.block_size;
            assert!(reserved >= sequence.num_reserved_tokens(), "a running sequence lacks reserved blocks");
        }
        let in_use = self.running.iter().flat_map(|id| {
            let sequence = &self.sequences[id];
            sequence
                .spans()
                .iter()
                .filter(|span| span.range.end > sequence.num_computed())
                .map(|span| span.digest)
        });
        self.encoder.check_integrity(in_use);
    }
}
