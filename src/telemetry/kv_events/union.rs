//! What the caches of several engines hold together: a router sends to the server, which itself finds the engine.
//!
//! Called by [`super`] with each engine's events in their order. Pure.

use std::collections::HashMap;

use crate::scheduler::cache_events::{BlockHash, CacheEvent};

/// How many engines hold each block.
#[derive(Debug, Default)]
pub(super) struct Union(HashMap<BlockHash, usize>);

impl Union {
    /// Of what changed in one engine, what changes for the server: the first to hold a block stores it, the last removes it.
    pub fn changes(&mut self, mut events: Vec<CacheEvent>) -> Vec<CacheEvent> {
        events.retain(|event| match event {
            CacheEvent::Stored(block) => {
                let num_holders = self.0.entry(block.hash).or_default();
                *num_holders += 1;
                *num_holders == 1
            }
            CacheEvent::Removed(hash) => {
                let num_holders = self.0.get_mut(hash).expect("nobody held a removed block: this is a bug");
                *num_holders -= 1;
                let is_gone = *num_holders == 0;
                if is_gone {
                    self.0.remove(hash);
                }
                is_gone
            }
        });
        events
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::scheduler::cache_events::StoredBlock;

    proptest! {
        /// Engines store and remove what they please: who hears the union knows what at least one of them holds, and is
        /// told nothing twice.
        #[test]
        fn a_router_knows_what_any_engine_holds(steps in vec((0usize..3, 1u64..8), 0..200)) {
            let mut union = Union::default();
            let (mut engines, mut known) = (vec![HashSet::new(); 3], HashSet::new());
            for (engine, hash) in steps {
                let event = if engines[engine].insert(hash) {
                    CacheEvent::Stored(StoredBlock { hash, parent: None, token_ids: [].into(), visuals: vec![] })
                } else {
                    engines[engine].remove(&hash);
                    CacheEvent::Removed(hash)
                };
                for change in union.changes(vec![event]) {
                    match change {
                        CacheEvent::Stored(block) => prop_assert!(known.insert(block.hash)),
                        CacheEvent::Removed(hash) => prop_assert!(known.remove(&hash)),
                    }
                }
                prop_assert_eq!(&known, &engines.iter().flatten().copied().collect());
                prop_assert_eq!(union.0.len(), known.len());
            }
        }
    }
}
