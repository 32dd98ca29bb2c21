//! Invariants over many random operations, with a shadow cache that knows what each slot must hold.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use proptest::prelude::*;

use super::{cache_events::StoredBlock, *};

const BLOCK: usize = 4;

fn limits(num_blocks: usize) -> SchedulerLimits {
    SchedulerLimits {
        block_size: BLOCK,
        num_blocks,
        max_running_sequences: 5,
        max_prefill_tokens: 7,
        max_scored_tokens: 3,
        max_encode_frames: 3,
        max_cached_videos: 2,
        prefix_cache: true,
        end_token_ids: vec![9],
    }
}

fn spec(token_ids: Vec<TokenId>, max_tokens: usize) -> SequenceSpec {
    SequenceSpec {
        token_ids,
        spans: vec![],
        cache_salt: None,
        max_tokens,
        ignore_eos: false,
        stop_token_ids: vec![],
        scores_prompt: false,
    }
}

/// `before` text tokens, videos of six visual tokens each, then `after`.
fn videos_spec(before: &[TokenId], videos: &[u8], after: &[TokenId], max_tokens: usize) -> SequenceSpec {
    let mut token_ids = before.to_vec();
    let mut spans = vec![];
    for video in videos {
        let start = token_ids.len();
        token_ids.extend([VISUAL_TOKEN; 6]);
        spans.push(VisualSpan { range: start..start + 6, digest: [*video; 32], num_frames: 4 });
    }
    token_ids.extend(after);
    SequenceSpec { spans, ..spec(token_ids, max_tokens) }
}

fn video_spec(before: &[TokenId], video: u8, after: &[TokenId], max_tokens: usize) -> SequenceSpec {
    videos_spec(before, &[video], after, max_tokens)
}

/// A token, where it is visual its place in its video, and the salt it was computed under.
type Content = (TokenId, Option<(VideoDigest, usize)>, Option<Arc<str>>);

/// Runs steps the way the engine does, and checks that every position a step relies on holds the right content.
struct Shadow {
    scheduler: Scheduler,
    /// (block, slot) -> the whole prefix written there.
    cache: HashMap<(BlockId, usize), Vec<Content>>,
    /// Frames encoded a video.
    encoded: HashMap<VideoDigest, usize>,
    finished: Vec<(SequenceId, StopReason)>,
    router: Router,
}

/// What a router makes of the events.
#[derive(Default)]
struct Router {
    known: HashSet<BlockHash>,
    /// Of every block that was ever known.
    contents: HashMap<BlockHash, StoredBlock>,
}

impl Router {
    fn hear(&mut self, events: Vec<CacheEvent>) {
        for event in events {
            match event {
                CacheEvent::Stored(block) => {
                    assert_eq!(block.token_ids.len(), BLOCK);
                    assert!(self.known.insert(block.hash), "stored twice");
                    let before = self.contents.insert(block.hash, block.clone());
                    assert!(before.is_none_or(|before| before == block), "one hash for two contents");
                    let parent = block.parent.is_none_or(|parent| self.known.contains(&parent));
                    assert!(parent, "the parent of a block is not there");
                }
                CacheEvent::Removed(hash) => assert!(self.known.remove(&hash), "removed, but never stored"),
            }
        }
    }
}

impl Shadow {
    fn new(num_blocks: usize) -> Self {
        Shadow::with(limits(num_blocks))
    }

    fn with(limits: SchedulerLimits) -> Self {
        let mut scheduler = Scheduler::new(limits);
        scheduler.log_cache_events(7);
        let router = Router::default();
        Shadow { scheduler, cache: HashMap::new(), encoded: HashMap::new(), finished: vec![], router }
    }

    /// Invariants of the scheduler; and a router that heard all events knows exactly the blocks that a prompt
    /// without a salt can reach.
    fn check(&mut self) {
        self.scheduler.check_integrity();
        self.router.hear(self.scheduler.take_cache_events());
        assert_eq!(self.router.known, self.scheduler.blocks.hashes());
    }

    fn prefix(&self, id: SequenceId, end: usize) -> Vec<Content> {
        let sequence = self.scheduler.sequence(id).unwrap();
        let visual = |position: usize| {
            let span = sequence.spans().iter().find(|span| span.range.contains(&position))?;
            Some((span.digest, position - span.range.start))
        };
        let salt = sequence.cache_salt();
        (0..end).map(|position| (sequence.token_ids()[position], visual(position), salt.cloned())).collect()
    }

    fn run(&mut self, plan: &StepPlan) {
        for digest in &plan.drop_videos {
            self.encoded.remove(digest);
        }
        let num_frames = |works: &[EncodeWork]| works.iter().map(|work| work.frames.len()).sum::<usize>();
        assert!(num_frames(&plan.encode) <= 3 && num_frames(&plan.next_encode) <= 3);
        for work in &plan.encode {
            let done = self.encoded.entry(work.digest).or_default();
            assert_eq!(*done, work.frames.start, "frames were skipped or encoded twice");
            *done = work.frames.end;
        }
        for work in &plan.next_encode {
            assert_eq!(num_frames(&plan.encode), 3, "frames wait though there is room");
            assert_eq!(self.encoded.get(&work.digest).copied().unwrap_or(0), work.frames.start);
            assert!(self.scheduler.sequence(work.sequence).is_some());
        }
        let prefill: usize = plan.compute[plan.num_decodes..].iter().map(|work| work.positions.len()).sum();
        assert!(prefill <= 7, "a step prefills more than its budget");
        for work in &plan.compute {
            let table = self.scheduler.sequence(work.sequence).unwrap().blocks().to_vec();
            let at = |position: usize| (table[position / BLOCK], position % BLOCK);
            for position in 0..work.positions.start {
                let held = self.cache.get(&at(position));
                assert_eq!(
                    held,
                    Some(&self.prefix(work.sequence, position + 1)),
                    "wrong content at {position}"
                );
            }
            for position in work.positions.clone() {
                let prefix = self.prefix(work.sequence, position + 1);
                if let Some((digest, _)) = prefix[position].1 {
                    assert_eq!(
                        self.encoded.get(&digest),
                        Some(&4),
                        "visual tokens before their video is encoded"
                    );
                }
                self.cache.insert(at(position), prefix);
            }
        }
    }

    fn step(&mut self, token: impl Fn(usize) -> TokenId) -> StepPlan {
        let plan = self.scheduler.schedule();
        self.scheduler.check_integrity();
        self.run(&plan);
        let num_samples = plan.compute.iter().filter(|work| work.samples).count();
        let tokens: Vec<TokenId> = (0..num_samples).map(token).collect();
        let updates = self.scheduler.complete(&plan, &tokens);
        self.finished.extend(updates.iter().filter_map(|update| Some((update.sequence, update.finished?))));
        self.check();
        plan
    }

    fn drain(&mut self) {
        for _ in 0..10_000 {
            if !self.scheduler.has_work() {
                return;
            }
            assert!(!self.step(|_| 1).is_empty(), "work is waiting, but the step is empty");
        }
        panic!("the scheduler never came to an end");
    }
}

#[derive(Debug, Clone)]
enum Op {
    Add {
        before: Vec<TokenId>,
        videos: Vec<u8>,
        after: Vec<TokenId>,
        max_tokens: usize,
        salt: Option<bool>,
        num_siblings: usize,
    },
    Step {
        token: TokenId,
    },
    FailStep,
    AbortDuringStep {
        nth: usize,
    },
    Abort {
        nth: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let text = |most| prop::collection::vec(0..2u32, 1..most);
    prop_oneof![
        3 => (text(9), prop::collection::vec(0..4u8, 0..=2), text(6), 1..8usize, any::<Option<bool>>(), prop_oneof![3 => Just(1), 2 => 2..8usize]).prop_map(
            |(before, videos, after, max_tokens, salt, num_siblings)| Op::Add { before, videos, after, max_tokens, salt, num_siblings }
        ),
        8 => prop_oneof![5 => 0..2u32, 1 => Just(9u32)].prop_map(|token| Op::Step { token }),
        1 => Just(Op::FailStep),
        1 => (0..8usize).prop_map(|nth| Op::AbortDuringStep { nth }),
        1 => (0..8usize).prop_map(|nth| Op::Abort { nth }),
    ]
}

/// The `nth` last of them.
fn late(ids: &[SequenceId], nth: usize) -> Option<SequenceId> {
    ids.iter().rev().nth(nth).copied()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_block_is_lost_or_wrongly_shared(
        ops in prop::collection::vec(op(), 1..80), num_blocks in 8..20usize, prefix_cache: bool,
    ) {
        let mut shadow = Shadow::with(SchedulerLimits { prefix_cache, ..limits(num_blocks) });
        let mut ids = vec![];
        for op in ops {
            match op {
                Op::Add { before, videos, after, max_tokens, salt, num_siblings } => {
                    let cache_salt = salt.map(|salt| salt.to_string().into());
                    let spec = SequenceSpec { cache_salt, ..videos_spec(&before, &videos, &after, max_tokens) };
                    ids.extend(shadow.scheduler.add_siblings(vec![spec; num_siblings]));
                }
                Op::Step { token } => { shadow.step(|_| token); }
                Op::FailStep => {
                    let plan = shadow.scheduler.schedule();
                    for digest in &plan.drop_videos {
                        shadow.encoded.remove(digest);
                    }
                    let failed = shadow.scheduler.fail(&plan);
                    prop_assert!(failed.iter().all(|id| shadow.scheduler.sequence(*id).is_none()));
                }
                Op::AbortDuringStep { nth } => {
                    let plan = shadow.scheduler.schedule();
                    shadow.run(&plan);
                    if let Some(id) = late(&ids, nth) { shadow.scheduler.abort(id) }
                    let num_samples = plan.compute.iter().filter(|work| work.samples).count();
                    shadow.scheduler.complete(&plan, &vec![1; num_samples]);
                }
                Op::Abort { nth } => if let Some(id) = late(&ids, nth) { shadow.scheduler.abort(id) },
            }
            shadow.check();
        }
        shadow.drain();
        prop_assert_eq!(shadow.scheduler.stats().num_used_blocks, 0);
    }
}

#[test]
fn admission_is_first_come_first_served() {
    let mut shadow = Shadow::new(8);
    let big = shadow.scheduler.add(spec(vec![1; 20], 8));
    let bigger = shadow.scheduler.add(spec(vec![0; 24], 8));
    let small = shadow.scheduler.add(spec(vec![1; 2], 1));
    assert_eq!(shadow.step(|_| 1).admitted, [(big, 0)], "the small one must not pass the one before it");
    shadow.drain();
    let order: Vec<SequenceId> = shadow.finished.iter().map(|(id, _)| *id).collect();
    assert_eq!(order, [big, bigger, small]);
}

#[test]
fn decodes_run_in_every_step_beside_prefill() {
    let mut shadow = Shadow::new(20);
    let first = shadow.scheduler.add(spec(vec![1, 0], 20));
    shadow.step(|_| 1);
    shadow.scheduler.add(spec(vec![0; 30], 2));
    for _ in 0..4 {
        let plan = shadow.step(|_| 1);
        assert_eq!(plan.num_decodes, 1);
        assert_eq!(plan.compute[0].sequence, first);
        assert_eq!(plan.compute[1].positions.len(), 7);
    }
}

#[test]
fn a_repeated_prompt_hits_all_its_full_blocks_but_the_last_token() {
    let mut shadow = Shadow::new(20);
    shadow.scheduler.add(spec(vec![1; 12], 1));
    shadow.drain();
    let again = shadow.scheduler.add(spec(vec![1; 12], 1));
    assert_eq!(shadow.step(|_| 1).admitted, [(again, 8)]);
}

#[test]
fn two_videos_never_share_blocks_and_the_same_video_does() {
    let mut shadow = Shadow::new(20);
    shadow.scheduler.add(video_spec(&[1, 1], 1, &[0, 1, 0], 1));
    shadow.drain();
    let other = shadow.scheduler.add(video_spec(&[1, 1], 2, &[0, 1, 0], 1));
    assert_eq!(shadow.step(|_| 1).admitted, [(other, 0)]);
    let same = shadow.scheduler.add(video_spec(&[1, 1], 1, &[0, 1, 1], 1));
    assert_eq!(shadow.step(|_| 1).admitted, [(same, 8)]);
    shadow.drain();
}

#[test]
fn blocks_are_shared_within_a_salt_only() {
    let mut shadow = Shadow::new(30);
    let salted = |salt: Option<&str>| SequenceSpec {
        cache_salt: salt.map(Into::into),
        ..video_spec(&[1, 1], 1, &[0, 1, 0], 1)
    };
    for (salt, known) in
        [(None, 0), (Some("a"), 0), (Some("b"), 0), (Some("a"), 8), (None, 8), (Some("b"), 8), (Some(""), 0)]
    {
        let id = shadow.scheduler.add(salted(salt));
        assert_eq!(shadow.step(|_| 1).admitted, [(id, known)], "{salt:?}");
        shadow.drain();
    }
}

#[test]
fn what_is_encoded_next_is_said_a_step_before() {
    let mut shadow = Shadow::new(40);
    shadow.scheduler.add(videos_spec(&[1], &[1, 2], &[2], 2));
    let mut announced = vec![];
    for expected in [3, 3, 2] {
        let plan = shadow.step(|_| 1);
        assert_eq!(plan.encode.iter().map(|work| work.frames.len()).sum::<usize>(), expected);
        assert!(announced.is_empty() || announced == plan.encode);
        announced = plan.next_encode;
    }
    assert!(announced.is_empty());
}

#[test]
fn a_video_is_encoded_once_for_all_who_wait_for_it() {
    let mut shadow = Shadow::new(30);
    shadow.scheduler.add(video_spec(&[1], 1, &[0], 1));
    shadow.scheduler.add(video_spec(&[0], 1, &[1], 1));
    let mut num_frames = 0;
    while shadow.scheduler.has_work() {
        num_frames += shadow.step(|_| 1).encode.iter().map(|work| work.frames.len()).sum::<usize>();
    }
    assert_eq!(num_frames, 4);
}

#[test]
fn an_end_token_ends_unless_ignored() {
    let mut shadow = Shadow::new(20);
    let ends = shadow.scheduler.add(spec(vec![1], 5));
    let ignores = shadow.scheduler.add(SequenceSpec { ignore_eos: true, ..spec(vec![0], 5) });
    while shadow.scheduler.has_work() {
        shadow.step(|_| 9);
    }
    assert_eq!(shadow.finished, [(ends, StopReason::EndOfSequence), (ignores, StopReason::Length)]);
}

#[test]
fn abort_frees_everything_at_any_point() {
    for num_steps in 0..8 {
        let mut shadow = Shadow::new(20);
        let id = shadow.scheduler.add(video_spec(&[1, 0, 1], 1, &[0, 1], 8));
        for _ in 0..num_steps {
            shadow.step(|_| 1);
        }
        shadow.scheduler.abort(id);
        shadow.scheduler.check_integrity();
        assert_eq!(shadow.scheduler.stats().num_used_blocks, 0);
        assert!(!shadow.scheduler.has_work());
    }
}

/// Runs to the end; tells how many prompt tokens and frames were computed.
fn cost(shadow: &mut Shadow) -> (usize, usize) {
    let mut cost = (0, 0);
    while shadow.scheduler.has_work() {
        let plan = shadow.step(|_| 1);
        cost.0 += plan.compute[plan.num_decodes..].iter().map(|work| work.positions.len()).sum::<usize>();
        cost.1 += plan.encode.iter().map(|work| work.frames.len()).sum::<usize>();
    }
    cost
}

#[test]
fn siblings_compute_their_prompt_once_with_and_without_prefix_cache() {
    for (prefix_cache, num_blocks, max_running_sequences) in
        [(true, 40, 8), (false, 40, 8), (true, 6, 8), (false, 6, 8), (true, 40, 2), (false, 40, 1)]
    {
        let limits = SchedulerLimits { prefix_cache, max_running_sequences, ..limits(num_blocks) };
        let mut shadow = Shadow::with(limits);
        // 17 tokens: four whole blocks are shared, and each sibling computes the last token.
        let spec = video_spec(&[1, 0, 1], 1, &[0; 8], 5);
        let ids = shadow.scheduler.add_siblings(vec![spec; 6]);
        assert_eq!(cost(&mut shadow), (16 + 6, 4));
        let finished: Vec<SequenceId> = shadow.finished.iter().map(|(id, _)| *id).collect();
        assert_eq!(finished, ids);
        assert_eq!(shadow.scheduler.stats().num_used_blocks, 0);
    }
}

#[test]
fn siblings_of_different_lengths_are_all_served() {
    let mut shadow = Shadow::new(12);
    let specs = (1..=6).map(|max_tokens| spec(vec![1; 10], max_tokens)).collect();
    shadow.scheduler.add_siblings(specs);
    assert_eq!(cost(&mut shadow), (8 + 6 * 2, 0));
}

#[test]
fn the_next_sibling_goes_on_where_an_aborted_one_was() {
    for num_steps in 0..12 {
        let mut shadow = Shadow::with(SchedulerLimits { prefix_cache: false, ..limits(30) });
        let ids = shadow.scheduler.add_siblings(vec![video_spec(&[1, 0, 1], 1, &[0; 8], 20); 3]);
        let mut before = 0;
        for _ in 0..num_steps {
            let plan = shadow.step(|_| 1);
            before += plan.compute[plan.num_decodes..].iter().map(|work| work.positions.len()).sum::<usize>();
        }
        shadow.scheduler.abort(ids[0]);
        shadow.scheduler.check_integrity();
        let (after, _) = cost(&mut shadow);
        assert!(
            (16 + 2..=16 + 3).contains(&(before + after)),
            "{before} and {after} after {num_steps} steps"
        );
        assert_eq!(shadow.finished.len(), 2);
    }
}

#[test]
fn a_failed_step_of_one_sibling_leaves_the_others_their_prompt() {
    let mut shadow = Shadow::with(SchedulerLimits { prefix_cache: false, ..limits(30) });
    let ids = shadow.scheduler.add_siblings(vec![spec(vec![1; 17], 4); 3]);
    shadow.step(|_| 1);
    let plan = shadow.scheduler.schedule();
    assert_eq!(shadow.scheduler.fail(&plan), ids[..1]);
    shadow.scheduler.check_integrity();
    assert_eq!(cost(&mut shadow), (16 - 7 + 2, 0), "the first seven were computed before");
}

#[test]
fn others_pass_through_while_siblings_wait_for_their_prompt() {
    let mut shadow = Shadow::new(40);
    let ids = shadow.scheduler.add_siblings(vec![spec(vec![1; 17], 4); 2]);
    let other = shadow.scheduler.add(spec(vec![0; 2], 1));
    while shadow.finished.is_empty() {
        shadow.step(|_| 1);
    }
    assert_eq!(shadow.finished, [(other, StopReason::Length)]);
    assert!(ids.iter().all(|id| shadow.scheduler.sequence(*id).is_some()));
}

#[test]
fn events_tell_a_chain_of_blocks_and_when_it_goes() {
    let mut shadow = Shadow::new(4);
    let prompt = video_spec(&[1, 1], 1, &[0, 1, 0], 1);
    shadow.scheduler.add(prompt.clone());
    let mut stored = vec![];
    while shadow.scheduler.has_work() {
        let plan = shadow.scheduler.schedule();
        let num_samples = plan.compute.iter().filter(|work| work.samples).count();
        shadow.scheduler.complete(&plan, &vec![1; num_samples]);
        stored.extend(shadow.scheduler.take_cache_events());
    }
    let [CacheEvent::Stored(first), CacheEvent::Stored(second)] = &stored[..] else { panic!("{stored:?}") };
    let v = VISUAL_TOKEN;
    assert_eq!((&first.token_ids[..], &second.token_ids[..]), (&[1, 1, v, v][..], &[v, v, v, v][..]));
    assert_eq!((first.parent, second.parent), (None, Some(first.hash)));
    assert_eq!(first.visuals, [([1; 32], 2)], "the video begins at the third token of the block");
    assert_eq!(second.visuals, [([1; 32], -2)], "the video began two tokens before the block");
    // Another prompt needs all blocks: the end of the chain goes before its beginning.
    shadow.scheduler.add(spec(vec![0; 12], 4));
    shadow.scheduler.schedule();
    let removed = shadow.scheduler.take_cache_events();
    assert_eq!(removed, [CacheEvent::Removed(second.hash), CacheEvent::Removed(first.hash)]);
}

#[test]
fn hashes_are_those_of_every_other_server_of_the_model_and_of_no_other_content() {
    let hashes = |seed, spec: SequenceSpec| {
        let mut scheduler = Scheduler::new(limits(20));
        scheduler.log_cache_events(seed);
        scheduler.add(spec);
        while scheduler.has_work() {
            let plan = scheduler.schedule();
            let num_samples = plan.compute.iter().filter(|work| work.samples).count();
            scheduler.complete(&plan, &vec![1; num_samples]);
        }
        scheduler.blocks.hashes()
    };
    let prompt = || video_spec(&[1, 1], 1, &[0, 1, 0], 1);
    let known = hashes(7, prompt());
    assert_eq!(known, hashes(7, prompt()));
    for (seed, other) in [(8, prompt()), (7, video_spec(&[1, 1], 2, &[0, 1, 0], 1))] {
        assert!(known.is_disjoint(&hashes(seed, other)));
    }
}

/// Runs until `done`; gives the events.
fn events_until(shadow: &mut Shadow, done: impl Fn(&Scheduler) -> bool) -> Vec<CacheEvent> {
    let mut events = vec![];
    while !done(&shadow.scheduler) {
        let plan = shadow.scheduler.schedule();
        let num_samples = plan.compute.iter().filter(|work| work.samples).count();
        shadow.scheduler.complete(&plan, &vec![1; num_samples]);
        shadow.scheduler.check_integrity();
        events.extend(shadow.scheduler.take_cache_events());
    }
    events
}

#[test]
fn nobody_is_told_of_blocks_under_a_salt() {
    let mut shadow = Shadow::new(20);
    let salted = SequenceSpec { cache_salt: Some("a".into()), ..spec(vec![1; 12], 6) };
    shadow.scheduler.add(salted.clone());
    assert_eq!(events_until(&mut shadow, |scheduler| !scheduler.has_work()), []);
    shadow.scheduler.add(salted);
    assert_eq!(shadow.scheduler.schedule().admitted[0].1, 8, "it is cached all the same");
}

#[test]
fn what_follows_a_block_that_is_given_away_is_forgotten_with_it_and_not_made_known_later() {
    for num_known_before in [1, 2] {
        let mut shadow = Shadow::new(8);
        // Computed side by side: the second has its own first block, and goes on from the one of the first.
        shadow.scheduler.add(spec(vec![1; 5], 1));
        let long = shadow.scheduler.add(spec(vec![1; 5], 11));
        let reached =
            |tokens| move |scheduler: &Scheduler| scheduler.sequence(long).unwrap().num_computed() >= tokens;
        let before = events_until(&mut shadow, reached(4 * num_known_before));
        assert_eq!(before.len(), num_known_before);
        // Needs all blocks that the long one does not hold.
        let other = shadow.scheduler.add(spec(vec![0; 12], 4));
        let events = events_until(&mut shadow, |scheduler| scheduler.sequence(other).is_none());
        let removed = events.iter().filter(|event| matches!(event, CacheEvent::Removed(_))).count();
        assert_eq!(removed, num_known_before, "{events:?}");
        let other_parents = events.iter().any(|event| match event {
            CacheEvent::Stored(block) => before.iter().any(|known| match known {
                CacheEvent::Stored(known) => block.parent == Some(known.hash),
                CacheEvent::Removed(_) => false,
            }),
            CacheEvent::Removed(_) => false,
        });
        assert!(!other_parents, "{events:?}");
    }
}

#[test]
fn nothing_is_noted_when_nobody_listens() {
    let mut scheduler = Scheduler::new(limits(20));
    scheduler.add(spec(vec![1; 12], 1));
    let plan = scheduler.schedule();
    scheduler.complete(&plan, &[]);
    assert_eq!(scheduler.take_cache_events(), []);
}
