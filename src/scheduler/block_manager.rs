//! Blocks of the KV cache: who holds them, which can be shared, which are given away first.
//!
//! The prefix cache is an exact tree rather than a table of hashes: a block's key is the identity of the block
//! before it (or, of a first block, the request's cache salt), its tokens, and the videos its visual tokens belong to. Equal keys mean equal content, so no
//! collision can ever mix two requests, however adversarial.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use super::{
    TokenId, VideoDigest,
    cache_events::{BlockHash, CacheEvent, CacheLog},
    sequence::Sequence,
};

/// Index of a block in the cache.
pub type BlockId = u32;

/// Identity of registered content; never reused, so a dead parent cannot be mistaken for a live one.
type BlockUid = u64;

/// What registered content is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockName {
    uid: BlockUid,
    /// The block that holds it, as long as its content has this uid.
    id: BlockId,
    /// As routers know it; none when they are not told: nobody listens, or the chain begins with a salt.
    hash: Option<BlockHash>,
}

/// The parent of a sequence's first block.
pub(super) const ROOT: BlockName = BlockName { uid: 0, id: 0, hash: None };

/// Everything the keys and values in a full block depend on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct BlockKey {
    parent: BlockUid,
    /// Of a first block; the others have their parent's.
    pub salt: Option<Arc<str>>,
    pub tokens: Box<[TokenId]>,
    /// Video and offset into it of each visual span that reaches into the block.
    pub visuals: Vec<(VideoDigest, isize)>,
}

/// What an indexed block holds.
#[derive(Debug)]
struct Content {
    key: BlockKey,
    name: BlockName,
    /// The block before it, which is indexed too.
    parent: Option<BlockId>,
}

#[derive(Debug, Default)]
struct Block {
    num_holders: usize,
    /// Set when the content is registered.
    content: Option<Content>,
    /// Indexed blocks whose parent this one is.
    num_children: usize,
    /// When the last holder left; orders reuse.
    freed_at: u64,
}

/// What the prefix cache held of a prompt, and blocks for all of the sequence.
#[derive(Debug)]
pub(super) struct PrefixMatch {
    /// Shared blocks first, then fresh ones.
    pub blocks: Vec<BlockId>,
    pub num_tokens: usize,
    pub num_blocks: usize,
    pub last: BlockName,
}

/// Prefix cache counts, in tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefixStats {
    pub queried_tokens: u64,
    pub hit_tokens: u64,
}

#[derive(Debug)]
pub(super) struct BlockManager {
    block_size: usize,
    sharing: bool,
    blocks: Vec<Block>,
    /// Without holder and content.
    free: VecDeque<BlockId>,
    /// Without holder, with content that may be asked for again; oldest first.
    reusable: BTreeMap<u64, BlockId>,
    index: HashMap<BlockKey, BlockId>,
    clock: u64,
    next_uid: BlockUid,
    stats: PrefixStats,
    /// None when nobody listens.
    log: Option<CacheLog>,
}

impl BlockManager {
    pub(super) fn new(num_blocks: usize, block_size: usize, sharing: bool) -> Self {
        let num_ids = BlockId::try_from(num_blocks).expect("more blocks than block ids: this is a bug");
        BlockManager {
            block_size,
            sharing,
            blocks: (0..num_blocks).map(|_| Block::default()).collect(),
            free: (0..num_ids).collect(),
            reusable: BTreeMap::new(),
            index: HashMap::new(),
            clock: 0,
            next_uid: ROOT.uid + 1,
            stats: PrefixStats::default(),
            log: None,
        }
    }

    /// Blocks for all the sequence may ever hold, shared as far as its prompt is known; `None` when there are too few.
    pub(super) fn allocate(&mut self, sequence: &Sequence) -> Option<PrefixMatch> {
        let (shared, last) = self.lookup(sequence);
        let num_blocks = shared.len();
        let blocks = self.extend(shared, sequence)?;
        Some(PrefixMatch { blocks, num_tokens: num_blocks * self.block_size, num_blocks, last })
    }

    /// `shared` and as many fresh blocks as the sequence needs behind them; `None` when there are too few.
    pub(super) fn extend(&mut self, shared: Vec<BlockId>, sequence: &Sequence) -> Option<Vec<BlockId>> {
        let num_fresh = sequence.num_reserved_tokens().div_ceil(self.block_size) - shared.len();
        let num_shared_idle = shared.iter().filter(|&&id| self.blocks[id as usize].num_holders == 0).count();
        if self.free.len() + self.reusable.len() - num_shared_idle < num_fresh {
            return None;
        }
        self.hold(&shared);
        let mut blocks = shared;
        blocks.extend((0..num_fresh).map(|_| self.take_fresh()));
        Some(blocks)
    }

    /// How many tokens of the prompt [`BlockManager::allocate`] would find.
    pub(super) fn num_known_tokens(&self, sequence: &Sequence) -> usize {
        self.lookup(sequence).0.len() * self.block_size
    }

    /// The longest known chain of full blocks of the prompt. The last prompt token is always left to compute:
    /// its logits are wanted.
    fn lookup(&self, sequence: &Sequence) -> (Vec<BlockId>, BlockName) {
        let (mut shared, mut parent) = (Vec::new(), ROOT);
        let num_full = (sequence.num_prompt_tokens() - 1) / self.block_size;
        if self.sharing && !sequence.scores_prompt() {
            for index in 0..num_full {
                let Some(&id) = self.index.get(&self.key(sequence, index, parent)) else { break };
                parent = self.name(id);
                shared.push(id);
            }
        }
        (shared, parent)
    }

    /// Of a block that is in the index.
    fn name(&self, id: BlockId) -> BlockName {
        self.blocks[id as usize].content.as_ref().expect("an indexed block is bare: this is a bug").name
    }

    fn key(&self, sequence: &Sequence, index: usize, parent: BlockName) -> BlockKey {
        let (start, end) = (index * self.block_size, (index + 1) * self.block_size);
        let touching =
            sequence.spans().iter().filter(|span| span.range.start < end && start < span.range.end);
        let visuals =
            touching.map(|span| (span.digest, start as isize - span.range.start as isize)).collect();
        let salt = sequence.cache_salt().filter(|_| index == 0).cloned();
        BlockKey { parent: parent.uid, salt, tokens: sequence.token_ids()[start..end].into(), visuals }
    }

    /// Makes the sequence's newly filled blocks known. A block whose content is known already stays private, but
    /// the chain goes on from the known one; when that one is given away, no prompt can reach what would follow, and
    /// nothing more of the sequence is made known.
    pub(super) fn register_full_blocks(&mut self, sequence: &mut Sequence) {
        while self.sharing && (sequence.num_registered + 1) * self.block_size <= sequence.num_computed() {
            let parent = sequence.registered;
            let key = self.key(sequence, sequence.num_registered, parent);
            let id = sequence.blocks()[sequence.num_registered];
            sequence.registered = match self.index.get(&key) {
                Some(&known) => self.name(known),
                None if self.is_known(parent) => self.register(key, id, parent),
                None => parent,
            };
            sequence.num_registered += 1;
        }
    }

    /// Whether prompts can still reach it.
    fn is_known(&self, name: BlockName) -> bool {
        let content = self.blocks[name.id as usize].content.as_ref();
        name == ROOT || content.is_some_and(|content| content.name.uid == name.uid)
    }

    fn register(&mut self, key: BlockKey, id: BlockId, parent: BlockName) -> BlockName {
        // Who sees a salted block's hash could find the salt by trying.
        let is_told = if parent == ROOT { key.salt.is_none() } else { parent.hash.is_some() };
        let log = self.log.as_mut().filter(|_| is_told);
        let hash = log.map(|log| log.stored(&key, parent.hash));
        let name = BlockName { uid: self.next_uid, id, hash };
        self.next_uid += 1;
        self.index.insert(key.clone(), id);
        let parent = (parent != ROOT).then_some(parent.id);
        if let Some(parent) = parent {
            self.blocks[parent as usize].num_children += 1;
        }
        self.blocks[id as usize].content = Some(Content { key, name, parent });
        name
    }

    /// Takes a block out of the index, and all that can be reached through it only.
    fn forget(&mut self, id: BlockId) {
        let mut ids = vec![id];
        while let Some(id) = ids.pop() {
            let block = &mut self.blocks[id as usize];
            let content = block.content.take().expect("a bare block is forgotten: this is a bug");
            let num_children = std::mem::take(&mut block.num_children);
            if block.num_holders == 0 && self.reusable.remove(&block.freed_at).is_some() {
                self.free.push_back(id);
            }
            self.index.remove(&content.key);
            if let (Some(log), Some(hash)) = (&mut self.log, content.name.hash) {
                log.removed(hash);
            }
            if let Some(parent) = content.parent {
                // A parent that was forgotten just now counts no children any more.
                let siblings = &mut self.blocks[parent as usize].num_children;
                *siblings = siblings.saturating_sub(1);
            }
            // Rare: whoever holds a block holds those before it too, unless it found them known and has its own.
            if num_children > 0 {
                let children = self.index.iter().filter(|(key, _)| key.parent == content.name.uid);
                ids.extend(children.map(|(_, &child)| child));
            }
        }
    }

    /// Gives blocks back. The last ones of a sequence are reused first: a chain is useless without its beginning.
    pub(super) fn release(&mut self, blocks: Vec<BlockId>) {
        for id in blocks.into_iter().rev() {
            let block = &mut self.blocks[id as usize];
            assert!(block.num_holders > 0, "a free block was released: this is a bug");
            block.num_holders -= 1;
            if block.num_holders > 0 {
                continue;
            }
            if block.content.is_some() {
                self.clock += 1;
                block.freed_at = self.clock;
                self.reusable.insert(self.clock, id);
            } else {
                self.free.push_back(id);
            }
        }
    }

    /// One more holder for each of `blocks`.
    pub(super) fn hold(&mut self, blocks: &[BlockId]) {
        for &id in blocks {
            let block = &mut self.blocks[id as usize];
            if block.num_holders == 0 {
                self.reusable.remove(&block.freed_at);
            }
            block.num_holders += 1;
        }
    }

    fn take_fresh(&mut self) -> BlockId {
        let id = self.free.pop_front().unwrap_or_else(|| {
            let (_, id) = self.reusable.pop_first().expect("no block is left after the check: this is a bug");
            self.forget(id);
            id
        });
        self.blocks[id as usize].num_holders = 1;
        id
    }

    pub(super) fn count_query(&mut self, prompt_tokens: usize, hit_tokens: usize) {
        self.stats.queried_tokens += prompt_tokens as u64;
        self.stats.hit_tokens += hit_tokens as u64;
    }

    /// From now on changes are noted. Nothing may be known yet.
    pub(super) fn start_log(&mut self, seed: BlockHash) {
        assert!(self.index.is_empty(), "the log begins after the first block: this is a bug");
        self.log = Some(CacheLog::new(seed));
    }

    /// What changed since this was last called.
    pub(super) fn take_events(&mut self) -> Vec<CacheEvent> {
        let events = self.log.as_mut().map(CacheLog::take).unwrap_or_default();
        debug_assert!(events.len() <= 2 * self.blocks.len(), "more changes than a step can make");
        events
    }

    /// Of all that prompts without a salt can reach.
    #[cfg(test)]
    pub(super) fn hashes(&self) -> std::collections::HashSet<BlockHash> {
        let (mut found, mut ends) = (std::collections::HashSet::new(), vec![ROOT.uid]);
        while let Some(end) = ends.pop() {
            for (_, &id) in self.index.iter().filter(|(key, _)| key.parent == end && key.salt.is_none()) {
                ends.push(self.name(id).uid);
                found.extend(self.name(id).hash);
            }
        }
        found
    }

    pub(super) fn stats(&self) -> PrefixStats {
        self.stats
    }

    /// Blocks some sequence holds.
    pub(super) fn num_used(&self) -> usize {
        self.blocks.len() - self.free.len() - self.reusable.len()
    }

    /// Blocks without holder whose content may be asked for again.
    pub(super) fn num_reusable(&self) -> usize {
        self.reusable.len()
    }

    pub(super) fn check_integrity<'a>(&self, tables: impl Iterator<Item = &'a [BlockId]>) {
        let mut holders = vec![0usize; self.blocks.len()];
        for table in tables {
            table.iter().for_each(|&id| holders[id as usize] += 1);
        }
        let mut idle = vec![0usize; self.blocks.len()];
        self.free.iter().chain(self.reusable.values()).for_each(|&id| idle[id as usize] += 1);
        for (id, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.num_holders, holders[id], "block {id} counts other holders than it has");
            assert_eq!(idle[id], usize::from(holders[id] == 0), "block {id} is lost or free while held");
        }
        for (key, &id) in &self.index {
            let content = self.blocks[id as usize].content.as_ref();
            let parent = content.and_then(|content| content.parent);
            let indexed_as = content.map(|content| &content.key);
            assert_eq!(indexed_as, Some(key), "block {id} is indexed under another content");
            let parent = parent.map_or(ROOT.uid, |parent| self.name(parent).uid);
            assert_eq!(parent, key.parent, "no prompt can reach block {id}");
        }
        if let Some(log) = &self.log {
            log.check_integrity(self.blocks.iter().filter_map(|block| block.content.as_ref()?.name.hash));
        }
        let num_contents = self.blocks.iter().filter(|block| block.content.is_some()).count();
        assert_eq!(num_contents, self.index.len(), "content outside the index");
        let parents = self.blocks.iter().filter_map(|block| block.content.as_ref()?.parent);
        let num_children = self.blocks.iter().map(|block| block.num_children).sum::<usize>();
        assert_eq!(num_children, parents.count(), "a block counts children that it does not have");
    }
}
