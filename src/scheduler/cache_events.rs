//! What became known to the prefix cache and what was given away, for routers that send a prompt to where its blocks are.
//!
//! Written by `super::block_manager` when [`super::Scheduler::log_cache_events`] asked for it, emptied after each step.
//! Chains that begin with a cache salt are never told of: who reads the events could guess the salt from a hash.
//! The cache itself never looks at a hash: its keys are exact. A hash that two contents share would mislead a router,
//! never a reply.

use std::{collections::HashMap, mem::take};

use super::{TokenId, VideoDigest, block_manager::BlockKey};

/// Name of a block's content and of all before it, the same in every server of one model. Never 0.
pub type BlockHash = u64;

/// A change of what a later prompt could share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheEvent {
    Stored(StoredBlock),
    Removed(BlockHash),
}

/// A full block whose content is known from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredBlock {
    pub hash: BlockHash,
    /// The block before it; none for the first of a prompt.
    pub parent: Option<BlockHash>,
    /// As many as a block has; visual tokens are [`super::VISUAL_TOKEN`].
    pub token_ids: Box<[TokenId]>,
    /// Video of each visual span that reaches into the block, and where in the block it begins (before it: negative).
    pub visuals: Vec<(VideoDigest, isize)>,
}

/// Changes since they were last taken. In one step a block is given away at most once and filled at most once, so
/// there are never more than two for each block of the cache.
#[derive(Debug)]
pub(super) struct CacheLog {
    /// Where chains begin: servers of different models do not name the same tokens alike.
    seed: BlockHash,
    events: Vec<CacheEvent>,
    /// More than one only where two contents happen to have one hash.
    num_blocks: HashMap<BlockHash, usize>,
}

impl CacheLog {
    pub(super) fn new(seed: BlockHash) -> Self {
        CacheLog { seed, events: Vec::new(), num_blocks: HashMap::new() }
    }

    /// A block of content `key` is known; `parent` is the hash of the one before it. Gives its hash.
    pub(super) fn stored(&mut self, key: &BlockKey, parent: Option<BlockHash>) -> BlockHash {
        let hash = hash_of(parent.unwrap_or(self.seed), key);
        let num_blocks = self.num_blocks.entry(hash).or_default();
        *num_blocks += 1;
        if *num_blocks == 1 {
            self.events.push(CacheEvent::Stored(StoredBlock {
                hash,
                parent,
                token_ids: key.tokens.clone(),
                visuals: key.visuals.iter().map(|(video, offset)| (*video, -offset)).collect(),
            }));
        }
        hash
    }

    /// A block of this content was given away.
    pub(super) fn removed(&mut self, hash: BlockHash) {
        let num_blocks = self.num_blocks.get_mut(&hash).expect("a block was never stored: this is a bug");
        *num_blocks -= 1;
        if *num_blocks == 0 {
            self.num_blocks.remove(&hash);
            self.events.push(CacheEvent::Removed(hash));
        }
    }

    pub(super) fn take(&mut self) -> Vec<CacheEvent> {
        take(&mut self.events)
    }

    /// `hashes`: of every block of the cache that has content.
    pub(super) fn check_integrity(&self, hashes: impl Iterator<Item = BlockHash>) {
        let mut num_blocks: HashMap<BlockHash, usize> = HashMap::new();
        hashes.for_each(|hash| *num_blocks.entry(hash).or_default() += 1);
        assert_eq!(num_blocks, self.num_blocks, "the log counts other blocks than there are");
    }
}

/// Where the chains of a model of this name begin.
pub fn seed_of(name: &str) -> BlockHash {
    Fnv::new().bytes(name.as_bytes()).finish()
}

fn hash_of(parent: BlockHash, key: &BlockKey) -> BlockHash {
    let mut hash = Fnv::new().bytes(&parent.to_be_bytes());
    for token in &key.tokens {
        hash = hash.bytes(&token.to_be_bytes());
    }
    for (video, offset) in &key.visuals {
        hash = hash.bytes(video).bytes(&(*offset as i64).to_be_bytes());
    }
    hash.finish()
}

/// FNV-1a, 64 bits: written down once and for all, unlike the hashes of the standard library.
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Fnv(0xcbf2_9ce4_8422_2325)
    }

    fn bytes(self, bytes: &[u8]) -> Self {
        Fnv(bytes.iter().fold(self.0, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)))
    }

    fn finish(self) -> BlockHash {
        self.0.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_the_published_one() {
        // Test vectors of FNV-1a.
        assert_eq!(seed_of(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(seed_of("foobar"), 0x8594_4171_f739_67e8);
    }
}
