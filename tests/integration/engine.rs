//! The engine thread with the scripted model.

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use proptest::{
    prelude::Rng,
    test_runner::{RngAlgorithm, TestRng},
};
use tinyllava::{
    config::EngineConfig,
    engine::{
        EngineHandle, EngineOptions, EngineStatus, EngineThread, NewSequence, StepObserver, StepReport,
        TokenEvent, VideoInput,
    },
    model::{
        FrameBatch, VISUAL_TOKEN,
        fake::{END, FakeModel},
    },
    scheduler::{SamplingParams, StopReason},
};

#[derive(Clone, Default)]
struct LastReport(Arc<Mutex<StepReport>>);

impl StepObserver for LastReport {
    fn step(&mut self, report: &StepReport) {
        *self.0.lock().unwrap() = *report;
    }
}

fn start(model: FakeModel, config: EngineConfig) -> (EngineHandle, EngineThread, LastReport) {
    let report = LastReport::default();
    let options = EngineOptions {
        config,
        num_token_ids: END as usize + 1,
        end_token_ids: vec![END],
        observer: Box::new(report.clone()),
        tap: Box::new(()),
    };
    let (handle, thread) = tinyllava::engine::start(Box::new(model), options).unwrap();
    (handle, thread, report)
}

fn text(prompt: &str, max_tokens: usize) -> NewSequence {
    let token_ids = format!("{prompt} ASSISTANT:").bytes().map(u32::from).collect();
    let sampling = SamplingParams::greedy(max_tokens);
    NewSequence { token_ids, videos: vec![], cache_salt: None, sampling, guide: None }
}

fn with_video(prompt: &str, digest: u8, max_tokens: usize) -> NewSequence {
    let mut sequence = text(prompt, max_tokens);
    sequence.token_ids.splice(3..3, [VISUAL_TOKEN; 8]);
    let frames = FrameBatch { rgb: vec![digest; 4 * 28 * 28 * 3].into(), size: 28 };
    sequence.videos = vec![VideoInput { span: 3..11, digest: [digest; 32], frames }];
    sequence
}

async fn reply(handle: &EngineHandle, sequence: NewSequence) -> (String, Result<StopReason, String>) {
    let mut stream = handle.reserve().unwrap().submit(sequence).unwrap();
    let mut bytes = vec![];
    while let Some(event) = stream.next().await {
        match event {
            TokenEvent::Started { .. }
            | TokenEvent::PromptComputed(_)
            | TokenEvent::PromptScored(_)
            | TokenEvent::EndToken { .. } => {}
            TokenEvent::Token { id, .. } => bytes.push(id as u8),
            TokenEvent::Finished(reason) => return (String::from_utf8(bytes).unwrap(), Ok(reason)),
            TokenEvent::Failed(error) => return (String::from_utf8(bytes).unwrap(), Err(error)),
        }
    }
    panic!("the stream ended without an end");
}

async fn until_idle(report: &LastReport) {
    for _ in 0..500 {
        let stats = report.0.lock().unwrap().stats;
        if stats.num_running + stats.num_waiting + stats.num_used_blocks == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the engine holds something: {:?}", report.0.lock().unwrap().stats);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_streams_and_ends_with_its_reason() {
    let (handle, thread, _) = start(FakeModel::saying("<think>x</think>"), EngineConfig::default());
    assert_eq!(
        reply(&handle, text("hi", 100)).await,
        ("<think>x</think>".into(), Ok(StopReason::EndOfSequence))
    );
    assert_eq!(
        reply(&handle, with_video("USER: what?", 1, 5)).await,
        ("<thin".into(), Ok(StopReason::Length))
    );
    drop(handle);
    thread.join();
}

/// As [`FakeModel::saying`], on a device that runs ahead or not.
fn saying(text: &str, runs_ahead: bool) -> FakeModel {
    let mut model = FakeModel::saying(text);
    model.runs_ahead = runs_ahead;
    model
}

#[tokio::test(flavor = "multi_thread")]
async fn many_sequences_with_dropped_streams_leave_nothing_behind() {
    for runs_ahead in [false, true] {
        many_sequences_with_dropped_streams(saying(&"abcdefgh".repeat(20), runs_ahead)).await;
    }
}

async fn many_sequences_with_dropped_streams(model: FakeModel) {
    let config =
        EngineConfig { max_running_sequences: 8, max_waiting_sequences: 64, ..EngineConfig::default() };
    let (handle, _thread, report) = start(model, config);
    let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let mut clients = vec![];
    for client in 0..64u8 {
        let (handle, keep) = (handle.clone(), rng.next_u32() as usize % 200);
        clients.push(tokio::spawn(async move {
            let sequence = with_video("USER: what?", client % 5, 160);
            let mut stream = handle.reserve().unwrap().submit(sequence).unwrap();
            for _ in 0..keep {
                match stream.next().await {
                    Some(TokenEvent::Failed(error)) => panic!("{error}"),
                    Some(_) => {}
                    None => return,
                }
            }
        }));
    }
    for client in clients {
        client.await.unwrap();
    }
    until_idle(&report).await;
    assert_eq!(reply(&handle, text("still there?", 4)).await.0, "abcd");
}

/// Runs three sequences at once on a model that `#` fails: the second one, for this reason, and no other.
async fn only_the_second_fails(sequences: [NewSequence; 3], reason: &str) {
    for runs_ahead in [false, true] {
        let model = saying(&"x".repeat(40), runs_ahead);
        only_the_second_of_this_model_fails(model, sequences.clone(), reason).await;
    }
}

async fn only_the_second_of_this_model_fails(
    mut model: FakeModel,
    [good, bad, late]: [NewSequence; 3],
    reason: &str,
) {
    model.poison = Some(u32::from(b'#'));
    model.step_delay = Duration::from_millis(2);
    let (handle, _thread, report) = start(model, EngineConfig::default());
    let (good, bad, late) = tokio::join!(reply(&handle, good), reply(&handle, bad), reply(&handle, late));
    assert_eq!((good.0.len(), good.1), (40, Ok(StopReason::EndOfSequence)));
    assert_eq!(bad, (String::new(), Err(reason.into())));
    assert_eq!((late.0.len(), late.1), (40, Ok(StopReason::EndOfSequence)));
    until_idle(&report).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_sequence_fails_alone() {
    only_the_second_fails([text("good", 60), text("b#d", 60), text("late", 60)], "a poisoned token").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_video_that_cannot_be_encoded_fails_alone() {
    let sequences = [with_video("good", 1, 60), with_video("bad", b'#', 60), with_video("late", 2, 60)];
    only_the_second_fails(sequences, "a poisoned pixel").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_device_fails_everything_once_and_stops_the_engine() {
    for runs_ahead in [false, true] {
        let mut model = saying(&"x".repeat(400), runs_ahead);
        model.device_poison = Some(u32::from(b'#'));
        model.step_delay = Duration::from_millis(2);
        let (handle, thread, _) = start(model, EngineConfig::default());
        let (good, bad) = tokio::join!(reply(&handle, text("good", 400)), reply(&handle, text("b#d", 60)));
        for (_, end) in [good, bad] {
            assert_eq!(end, Err("the device has failed: an illegal memory access".into()));
        }
        handle.stopped().await;
        assert_eq!(handle.status(), EngineStatus::Failed);
        assert_eq!(handle.reserve().unwrap_err().to_string(), "the engine has stopped");
        thread.join();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_is_lost_in_a_step_that_was_started_ahead() {
    // The model itself says what loses it.
    let mut model = saying("abc#def", true);
    model.device_poison = Some(u32::from(b'#'));
    let (handle, thread, _) = start(model, EngineConfig::default());
    let (said, end) = reply(&handle, text("hi", 400)).await;
    assert_eq!(end, Err("the device has failed: an illegal memory access".into()));
    assert!("abc#".starts_with(&said), "{said}");
    handle.stopped().await;
    thread.join();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_fails_ahead_fails_again_when_it_is_planned() {
    let mut model = saying("abc#def", true);
    model.poison = Some(u32::from(b'#'));
    let (handle, _thread, report) = start(model, EngineConfig::default());
    let end = reply(&handle, text("hi", 400)).await;
    assert_eq!(end, ("abc#".into(), Err("a poisoned token".into())));
    until_idle(&report).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_started_ahead_is_not_computed_again() {
    let sequence = text("hi", 400);
    let needed = sequence.token_ids.len() + REPLY.len();
    const REPLY: &str = "<think>one after the other</think>";
    for (runs_ahead, in_vain) in [(false, 0), (true, 1)] {
        let model = saying(REPLY, runs_ahead);
        let num_rows = model.num_rows.clone();
        let (handle, thread, _) = start(model, EngineConfig::default());
        assert_eq!(reply(&handle, sequence.clone()).await.0, REPLY);
        drop(handle);
        thread.join();
        // The end token is not known before the step after it has begun.
        assert_eq!(num_rows.load(Ordering::Relaxed), needed + in_vain);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_guess_leaves_nothing_in_the_cache() {
    let mut replies = vec![];
    for runs_ahead in [false, true] {
        let mut model = saying("", runs_ahead);
        model.reads_all = true;
        let num_rows = model.num_rows.clone();
        let (handle, thread, _) = start(model, EngineConfig::default());
        let ask = |seed: u64| {
            let mut sequence = text(&format!("USER: {seed}?"), 200);
            // Without a GPU nothing is drawn on the device: it goes on with the largest, the host mostly with another.
            (sequence.sampling.temperature, sequence.sampling.seed) = (2.0, seed);
            sequence.sampling.ignore_eos = true;
            let handle = handle.clone();
            async move {
                let mut stream = handle.reserve().unwrap().submit(sequence).unwrap();
                let mut ids = vec![];
                while let Some(event) = stream.next().await {
                    if let TokenEvent::Token { id, .. } = event {
                        ids.push(id);
                    }
                }
                ids
            }
        };
        let (first, second) = tokio::join!(ask(1), ask(2));
        assert_eq!((first.len(), second.len()), (200, 200));
        replies.push([first, second]);
        drop(handle);
        thread.join();
        let num_needed = 2 * (text("USER: 1?", 1).token_ids.len() + 199);
        let in_vain = num_rows.load(Ordering::Relaxed) - num_needed;
        // Ever fewer steps are started in vain.
        assert!(if runs_ahead { (2..100).contains(&in_vain) } else { in_vain == 0 }, "{in_vain}");
    }
    assert_eq!(replies[0], replies[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_runs_ahead_says_what_others_say_whatever_is_asked_of_it() {
    let told = "all of it, to the end";
    let mut model = saying(told, true);
    model.step_delay = Duration::from_micros(300);
    let config = EngineConfig { max_running_sequences: 6, ..EngineConfig::default() };
    let (handle, _thread, report) = start(model, config);
    let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[9; 32]);
    let mut clients = vec![];
    for client in 0..60 {
        let max_tokens = 1 + rng.next_u32() as usize % 30;
        let mut sequence = match client % 3 {
            0 => with_video("USER: what?", client as u8 % 5, max_tokens),
            _ => text(&format!("USER: {client}?"), max_tokens),
        };
        // Logits are 10 for what is to come, and 0: so cold nothing else is drawn, though without a GPU the device cannot say so.
        match rng.next_u32() % 4 {
            0 => sequence.sampling.temperature = 0.05,
            1 => sequence.sampling.top_logprobs = Some(1),
            _ => {}
        }
        let (handle, pause) = (handle.clone(), Duration::from_micros(u64::from(rng.next_u32() % 20_000)));
        clients.push(tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            let expected = &told[..told.len().min(max_tokens)];
            assert_eq!(reply(&handle, sequence).await.0, expected);
        }));
    }
    for client in clients {
        client.await.unwrap();
    }
    until_idle(&report).await;
}

#[tokio::test]
async fn a_full_queue_refuses_at_once() {
    let config =
        EngineConfig { max_running_sequences: 1, max_waiting_sequences: 1, ..EngineConfig::default() };
    let (handle, _thread, _) = start(FakeModel::saying("x"), config);
    let permits = (handle.reserve().unwrap(), handle.reserve().unwrap());
    assert!(
        handle
            .reserve()
            .unwrap_err()
            .to_string()
            .contains("already holds 2 requests and has no room for 1 more")
    );
    drop(permits);
    assert!(handle.reserve().is_ok());
}

#[tokio::test]
async fn what_can_never_run_is_refused() {
    let (handle, _thread, _) = start(FakeModel::saying("x"), EngineConfig::default());
    let error = handle.reserve().unwrap().submit(text("long", 5000)).unwrap_err();
    assert!(error.to_string().contains("the context holds 4096"), "{error}");
    let mut cut = with_video("USER: what?", 1, 5);
    cut.videos[0].span = 3..9;
    assert!(handle.reserve().unwrap().submit(cut).is_err());
}

#[tokio::test]
async fn joined_engines_take_what_fits_the_smallest_and_as_much_as_all_have_room_for() {
    let config =
        EngineConfig { max_running_sequences: 2, max_waiting_sequences: 1, ..EngineConfig::default() };
    let small = EngineConfig { kv_cache_bytes: 8 << 10, ..config.clone() };
    let alone = [config, small].map(|config| start(FakeModel::saying("x"), config).0).to_vec();
    let blocks: Vec<usize> = alone.iter().map(|handle| handle.limits().num_blocks).collect();
    assert!(blocks[1] < blocks[0], "{blocks:?}");
    let (context, small) = (alone[1].limits().context, alone[1].limits());
    let joined = EngineHandle::joined(alone);
    assert_eq!(joined.limits(), small);
    assert_eq!(joined.num_blocks(), blocks.iter().sum::<usize>());
    assert!(joined.reserve().unwrap().submit(text("long", context)).is_err());
    // Two run on each, and one waits.
    assert!(joined.reserve_many(6).is_err());
    assert!(joined.reserve_many(5).is_ok());
    assert_eq!(reply(&joined, text("hi", 5)).await.0, "x");
}
