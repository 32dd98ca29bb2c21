//! The engines of a server, one a device, and which of them a request goes to.
//!
//! Used by `handle.rs` when a prompt and its videos are known. Goes by what was sent where, and never asks an engine: a wrong
//! guess costs time, never correctness.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{mpsc, watch};

use super::handle::{EngineLimits, EngineStatus, NewSequence, Submission};
use crate::scheduler::VideoDigest;

/// One engine, as who submits sees it.
#[derive(Debug, Clone)]
pub(super) struct Member {
    pub submissions: mpsc::Sender<Vec<Submission>>,
    pub status: watch::Receiver<EngineStatus>,
    pub limits: EngineLimits,
}

/// Each sequence of an engine holds one: their number is the engine's load.
pub(super) type Presence = Arc<()>;

/// See the module.
#[derive(Debug)]
pub(super) struct Fleet {
    pub members: Vec<Member>,
    /// What fits every one of them.
    pub limits: EngineLimits,
    loads: Vec<Presence>,
    /// None where there is no choice.
    placement: Option<Mutex<Placement>>,
}

impl Fleet {
    /// At least one member; all run the same model.
    pub fn new(members: Vec<Member>) -> Self {
        let limits = members.iter().map(|member| member.limits).reduce(EngineLimits::of_both);
        let limits = limits.expect("a fleet without engines: this is a bug");
        let placement = Placement::new(members.len(), &limits);
        Fleet {
            loads: members.iter().map(|_| Presence::default()).collect(),
            placement: (members.len() > 1).then_some(Mutex::new(placement)),
            members,
            limits,
        }
    }

    /// Most sequences at once: every engine runs its own, and all wait together.
    pub fn num_places(&self) -> usize {
        self.limits.max_running * self.members.len() + self.limits.max_waiting
    }

    /// The engine for these siblings, and what makes each of them count there.
    pub fn place(&self, siblings: &[NewSequence]) -> (&Member, Vec<Presence>) {
        let at = |index: usize| (&self.members[index], vec![self.loads[index].clone(); siblings.len()]);
        let Some((placement, first)) = self.placement.as_ref().zip(siblings.first()) else { return at(0) };
        let keys = keys_of(first, self.limits.block_size);
        // Until the siblings count: else requests that come together would all find the same engine idle.
        let mut placement = placement.lock().unwrap_or_else(PoisonError::into_inner);
        let loads: Vec<usize> = self.loads.iter().map(|load| Arc::strong_count(load) - 1).collect();
        at(placement.place(&keys, &loads))
    }
}

/// Something of a request that an engine may still hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    Video(VideoDigest),
    /// Hash of a full block of the prompt and all before it. Who makes two prompts collide misleads himself only.
    Prefix(u64),
}

/// Fewer prompt tokens are computed anywhere sooner than one would wait for a busier engine's steps.
const SHORT_TEXT: usize = 256;

/// The videos of a request, which cost most by far; of one without, the full blocks of its prompt, unless it is short.
fn keys_of(sequence: &NewSequence, block_size: usize) -> Vec<Key> {
    if !sequence.videos.is_empty() {
        return sequence.videos.iter().map(|video| Key::Video(video.digest)).collect();
    }
    if sequence.token_ids.len() < SHORT_TEXT {
        return Vec::new();
    }
    let mut hasher = DefaultHasher::new();
    sequence.cache_salt.hash(&mut hasher);
    let blocks = sequence.token_ids.chunks_exact(block_size);
    let with_all_before = |block: &[_]| {
        block.hash(&mut hasher);
        Key::Prefix(hasher.finish())
    };
    blocks.map(with_all_before).collect()
}

/// Decides where requests go. Pure: told how many sequences each engine has, it remembers what was sent there.
///
/// Of the engines that are not clearly busier than the least busy one, it takes the one that knows most of the request; of
/// equals the least busy; of those the one that has waited longest.
#[derive(Debug)]
struct Placement {
    engines: Vec<Memory>,
    /// How many more sequences than the least busy engine one may have and still get what it knows.
    max_lead: usize,
    /// Sequences an engine has room for.
    max_load: usize,
    max_keys: usize,
    clock: u64,
}

/// What was sent to an engine.
#[derive(Debug, Default)]
struct Memory {
    last_placed: u64,
    noted_at: HashMap<Key, u64>,
    by_age: BTreeMap<u64, Key>,
}

impl Placement {
    fn new(num_engines: usize, limits: &EngineLimits) -> Self {
        Placement {
            engines: (0..num_engines).map(|_| Memory::default()).collect(),
            // Sharing a step with a quarter more costs less than computing a video again; waiting for a place in a step,
            // while another engine has some, costs more.
            max_lead: limits.max_running / 4,
            max_load: limits.max_sequences(),
            // An engine cannot hold more than its blocks.
            max_keys: limits.num_blocks,
            clock: 0,
        }
    }

    fn place(&mut self, keys: &[Key], loads: &[usize]) -> usize {
        let least = loads.iter().copied().min().unwrap_or(0);
        let most = (least + self.max_lead).min(self.max_load - 1);
        let candidates =
            self.engines.iter().enumerate().filter(|&(index, _)| loads[index] <= most.max(least));
        let best = candidates
            .min_by_key(|&(index, engine)| (Reverse(engine.worth(keys)), loads[index], engine.last_placed));
        let (chosen, _) = best.expect("nobody is least busy: this is a bug");
        self.note(chosen, keys);
        chosen
    }

    fn note(&mut self, engine: usize, keys: &[Key]) {
        let memory = &mut self.engines[engine];
        // Backwards, so that ends of prompts are forgotten before their beginnings.
        for &key in keys.iter().rev() {
            self.clock += 1;
            if let Some(before) = memory.noted_at.insert(key, self.clock) {
                memory.by_age.remove(&before);
            }
            memory.by_age.insert(self.clock, key);
            if memory.by_age.len() > self.max_keys
                && let Some((_, oldest)) = memory.by_age.pop_first()
            {
                memory.noted_at.remove(&oldest);
            }
        }
        self.clock += 1;
        memory.last_placed = self.clock;
    }
}

impl Memory {
    /// How many of `keys` were sent here; less than half are not worth a detour: all prompts begin alike.
    fn worth(&self, keys: &[Key]) -> usize {
        let known = keys.iter().filter(|key| self.noted_at.contains_key(key)).count();
        if 2 * known >= keys.len() { known } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::scheduler::SamplingParams;

    const LIMITS: EngineLimits = EngineLimits {
        context: 64,
        num_blocks: 12,
        block_size: 4,
        max_running: 8,
        max_waiting: 4,
        visual_tokens: 4,
        max_videos: 4,
        image_size: 28,
    };

    fn video(name: u8) -> Key {
        Key::Video([name; 32])
    }

    fn text(token_ids: &[u32], salt: Option<&str>) -> Vec<Key> {
        let sequence = NewSequence {
            token_ids: token_ids.to_vec(),
            videos: vec![],
            cache_salt: salt.map(Into::into),
            sampling: SamplingParams::greedy(1),
            guide: None,
        };
        keys_of(&sequence, LIMITS.block_size)
    }

    #[test]
    fn a_video_goes_where_it_was_and_a_new_one_to_who_waited_longest() {
        let mut placement = Placement::new(3, &LIMITS);
        let idle = [0; 3];
        let chosen: Vec<usize> =
            [1, 2, 3, 4, 3, 2, 1, 5].iter().map(|&name| placement.place(&[video(name)], &idle)).collect();
        assert_eq!(chosen, [0, 1, 2, 0, 2, 1, 0, 2]);
    }

    #[test]
    fn a_holder_with_a_clear_lead_passes_its_video_on_and_then_both_hold_it() {
        let mut placement = Placement::new(2, &LIMITS);
        assert_eq!(placement.place(&[video(1)], &[0, 0]), 0);
        assert_eq!(placement.place(&[video(1)], &[2, 0]), 0);
        assert_eq!(placement.place(&[video(1)], &[3, 0]), 1);
        assert_eq!(placement.place(&[video(1)], &[2, 1]), 1);
        assert_eq!(placement.place(&[video(1)], &[1, 2]), 0);
    }

    #[test]
    fn a_long_text_goes_where_half_of_it_is_known_and_salts_do_not_mix() {
        let limits = EngineLimits { num_blocks: 1000, ..LIMITS };
        let mut placement = Placement::new(2, &limits);
        let one: Vec<u32> = (0..400).collect();
        let begins_alike = |known| [&one[..known], &vec![9; 400 - known]].concat();
        assert_eq!(placement.place(&text(&one, None), &[0, 0]), 0);
        assert_eq!(placement.place(&text(&begins_alike(180), None), &[0, 0]), 1);
        assert_eq!(placement.place(&text(&begins_alike(220), None), &[1, 0]), 0);
        assert_eq!(placement.place(&text(&one[..300], None), &[1, 0]), 0);
        assert_eq!(placement.place(&text(&one[..200], None), &[1, 0]), 1);
        assert_eq!(placement.place(&text(&one, Some("a")), &[1, 0]), 1);
    }

    proptest! {
        /// Requests come and go: whoever gets one is not clearly ahead of the least busy engine and has room, and nobody
        /// as little busy knows more of it. All that is known was sent there, and no more is remembered than may be.
        #[test]
        fn load_stays_balanced_and_holders_are_found(
            num_engines in 1usize..5,
            steps in vec((vec(0u8..30, 0..4), 1usize..4, 0usize..3), 1..120),
        ) {
            let mut placement = Placement::new(num_engines, &LIMITS);
            let mut sent: Vec<HashSet<Key>> = vec![HashSet::new(); num_engines];
            let mut running: Vec<(usize, usize)> = vec![];
            let num_places = LIMITS.max_running * num_engines + LIMITS.max_waiting;
            for (names, num_siblings, num_ending) in steps {
                running.drain(..num_ending.min(running.len()));
                while running.iter().map(|(_, num)| num).sum::<usize>() + num_siblings > num_places {
                    running.remove(running.len() / 2);
                }
                let of = |engine| running.iter().filter(move |(at, _)| *at == engine).map(|(_, num)| num).sum();
                let loads: Vec<usize> = (0..num_engines).map(of).collect();
                let keys: Vec<Key> = names.into_iter().map(video).collect();
                let worth: Vec<usize> = placement.engines.iter().map(|engine| engine.worth(&keys)).collect();

                let chosen = placement.place(&keys, &loads);
                let most = loads.iter().min().unwrap() + LIMITS.max_running / 4;
                prop_assert!(loads[chosen] <= most && loads[chosen] < LIMITS.max_sequences());
                for other in (0..num_engines).filter(|&other| loads[other] <= loads[chosen]) {
                    prop_assert!(worth[other] <= worth[chosen]);
                    prop_assert!(worth[other] < worth[chosen] || loads[other] == loads[chosen]);
                }
                sent[chosen].extend(&keys);
                running.push((chosen, num_siblings));
                for (engine, sent) in placement.engines.iter().zip(&sent) {
                    prop_assert!(engine.noted_at.keys().all(|key| sent.contains(key)));
                    prop_assert!(engine.noted_at.len() == engine.by_age.len());
                    prop_assert!(engine.by_age.len() <= LIMITS.num_blocks);
                }
            }
        }
    }
}
