//! Siblings: sequences of one request on one prompt, which is computed once for all of them.
//!
//! Used by [`super::Scheduler`]. All full blocks of the prompt but the one with its last token are shared, whether or
//! not there is a prefix cache. The family holds them from the admission of its first sibling until the last one has
//! gone, so a sibling that is admitted late, or is left alone, finds them. Whoever runs first computes them; the
//! others wait and move along. When that one goes, the next goes on where it was.

use std::collections::HashMap;

use super::{
    BlockId, SequenceId,
    block_manager::{BlockName, PrefixMatch},
    sequence::Sequence,
};

/// How far the shared part is computed and registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reached {
    pub num_computed: usize,
    pub num_registered: usize,
    pub registered: BlockName,
}

impl From<&PrefixMatch> for Reached {
    fn from(prefix: &PrefixMatch) -> Self {
        Reached {
            num_computed: prefix.num_tokens,
            num_registered: prefix.num_blocks,
            registered: prefix.last,
        }
    }
}

/// What siblings share.
#[derive(Debug)]
pub(super) struct Family {
    /// Tokens `[0, num_shared)` of the prompt are shared: whole blocks.
    pub num_shared: usize,
    /// Held by the family; none before the first admission.
    blocks: Vec<BlockId>,
    /// `None` before the first admission.
    reached: Option<Reached>,
    /// Waiting or running.
    num_siblings: usize,
}

/// All families, by their first sibling.
#[derive(Debug, Default)]
pub(super) struct Families(HashMap<SequenceId, Family>);

impl Families {
    /// A new family.
    pub(super) fn found(&mut self, first: SequenceId, num_siblings: usize, num_shared: usize) {
        let family = Family { num_shared, blocks: Vec::new(), reached: None, num_siblings };
        self.0.insert(first, family);
    }

    /// The family of a sequence that has one.
    pub(super) fn of(&self, sequence: &Sequence) -> Option<&Family> {
        sequence.family.map(|first| &self.0[&first])
    }

    /// The first sibling was admitted with these `blocks`, of which the family now holds its part.
    pub(super) fn admit(&mut self, first: SequenceId, blocks: &[BlockId], reached: Reached) {
        let family = self.0.get_mut(&first).expect("a family is unknown: this is a bug");
        family.blocks = blocks.to_vec();
        family.reached = Some(reached);
    }

    /// The shared part is computed as far as `reached`.
    pub(super) fn advance(&mut self, first: SequenceId, reached: Reached) {
        self.0.get_mut(&first).expect("a family is unknown: this is a bug").reached = Some(reached);
    }

    /// A sibling has gone. With the last of them, gives the blocks that nobody holds any more.
    pub(super) fn leave(&mut self, first: SequenceId) -> Vec<BlockId> {
        let family = self.0.get_mut(&first).expect("a family is unknown: this is a bug");
        family.num_siblings -= 1;
        if family.num_siblings > 0 {
            return Vec::new();
        }
        self.0.remove(&first).map(|family| family.blocks).unwrap_or_default()
    }

    /// The blocks each family holds.
    pub(super) fn tables(&self) -> impl Iterator<Item = &[BlockId]> {
        self.0.values().map(|family| family.blocks.as_slice())
    }

    pub(super) fn check_integrity<'a>(&self, sequences: impl Iterator<Item = (&'a Sequence, bool)>) {
        let mut num_left: HashMap<SequenceId, usize> =
            self.0.iter().map(|(&first, family)| (first, family.num_siblings)).collect();
        for (sequence, is_running) in sequences {
            let (Some(family), Some(first)) = (self.of(sequence), sequence.family) else { continue };
            *num_left.get_mut(&first).expect("a family is unknown") -= 1;
            if !is_running {
                continue;
            }
            let (table, reached) = (sequence.blocks(), family.reached.expect("nobody was admitted"));
            assert!(table.starts_with(&family.blocks), "a sibling does not share its prompt's blocks");
            let in_shared = sequence.num_computed().min(family.num_shared);
            assert_eq!(in_shared, reached.num_computed, "a sibling was left behind or ran ahead");
        }
        assert!(num_left.values().all(|&left| left == 0), "a family counts siblings that have gone");
    }
}

impl Family {
    /// The shared blocks and how far they are computed; `None` before the first sibling is admitted.
    pub(super) fn shared(&self) -> Option<(&[BlockId], Reached)> {
        self.reached.map(|reached| (self.blocks.as_slice(), reached))
    }
}
