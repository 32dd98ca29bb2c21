//! The engine thread: takes submissions in, runs step after step, sends tokens out.
//!
//! Started by `cli` and tests. The only owner of scheduler and runner; nothing else touches them.

use std::{collections::HashMap, sync::PoisonError, thread::JoinHandle, time::Instant};

use rayon::ThreadPoolBuilder;
use tokio::sync::{mpsc, watch};

use super::{
    failure::{Failure, guarded, on_kernel_threads},
    fleet::Member,
    handle::{EngineHandle, EngineLimits, EngineStatus, PromptTimes, Submission, TokenEvent},
    limits::engine_limits,
    next_token::Sampled,
    observer::{StepObserver, StepReport},
    request_table::{Request, RequestTable},
    runner::Runner,
};
use crate::{
    config::{EngineConfig, request_limits::MAX_SCORED_TOKENS},
    model::{KvDType, KvPool, Tap, Tensor, VideoLanguageModel},
    scheduler::{
        ComputeWork, EncodeWork, Scheduler, SchedulerLimits, SequenceId, SequenceUpdate, StepPlan,
        StopReason, TokenId, TokenLogprobs,
    },
};

/// What the engine needs besides a model.
pub struct EngineOptions {
    pub config: EngineConfig,
    /// Ids the tokenizer knows: `[0, n)`.
    pub num_token_ids: usize,
    pub end_token_ids: Vec<TokenId>,
    pub observer: Box<dyn StepObserver>,
    /// Sees intermediate tensors; `Box::new(())` sees none.
    pub tap: Box<dyn Tap>,
}

impl std::fmt::Debug for EngineOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineOptions").field("config", &self.config).finish_non_exhaustive()
    }
}

/// The running thread; ends when the last [`EngineHandle`] is dropped.
#[derive(Debug)]
pub struct EngineThread(Option<JoinHandle<()>>);

impl EngineThread {
    /// Waits for the end. All handles must be gone.
    pub fn join(mut self) {
        if let Some(thread) = self.0.take() {
            // A panic of the thread has been logged and shown in the status.
            let _ = thread.join();
        }
    }
}

/// Starts the engine thread on `model`.
///
/// # Errors
/// When there is no memory for the cache or it cannot hold a single block, or the thread cannot be started.
pub fn start(
    model: Box<dyn VideoLanguageModel>,
    options: EngineOptions,
) -> std::io::Result<(EngineHandle, EngineThread)> {
    let limits = engine_limits(model.as_ref(), &options.config);
    if limits.num_blocks == 0 {
        return Err(std::io::Error::other("the KV cache is too small for one block; give it more memory"));
    }
    let kept = KvDType::new(options.config.kv_cache_in_16_bits);
    let pool = model.new_pool(kept, limits.num_blocks, limits.block_size).map_err(|error| {
        std::io::Error::other(format!("no memory for the KV cache; give it less: {error}"))
    })?;
    let num_own = options.config.own_threads;
    let own_threads = ThreadPoolBuilder::new().num_threads(num_own).thread_name(|_| "engine".into());
    let own_threads =
        (num_own > 0).then(|| own_threads.build()).transpose().map_err(std::io::Error::other)?;
    let (submissions, inbox) = mpsc::channel(limits.max_sequences());
    let (status_sender, status) = watch::channel(EngineStatus::Ready);
    let handle = EngineHandle::new(vec![Member { submissions, status, limits }]);
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || {
        let _failed_at_the_end = FailOnDrop(status_sender);
        let run = move || Worker::new(model, pool, options, limits).run(inbox);
        match own_threads {
            Some(threads) => threads.install(run),
            None => run(),
        }
    })?;
    Ok((handle, EngineThread(Some(thread))))
}

/// Tells the handles that the thread is gone, however it ended.
struct FailOnDrop(watch::Sender<EngineStatus>);

impl Drop for FailOnDrop {
    fn drop(&mut self) {
        self.0.send_replace(EngineStatus::Failed);
    }
}

struct Worker {
    scheduler: Scheduler,
    runner: Runner,
    requests: RequestTable,
    observer: Box<dyn StepObserver>,
    num_blocks: usize,
    /// Why the device can no longer be used.
    lost_device: Option<String>,
}

impl Worker {
    fn new(
        model: Box<dyn VideoLanguageModel>,
        pool: KvPool,
        options: EngineOptions,
        limits: EngineLimits,
    ) -> Self {
        let config = &options.config;
        let mut scheduler = Scheduler::new(SchedulerLimits {
            block_size: config.block_size,
            num_blocks: limits.num_blocks,
            max_running_sequences: config.max_running_sequences,
            max_prefill_tokens: config.prefill_tokens_a_step(),
            max_scored_tokens: MAX_SCORED_TOKENS,
            max_encode_frames: config.encode_frames_a_step(model.shape().image_size),
            max_cached_videos: config.max_cached_videos,
            prefix_cache: config.prefix_cache,
            end_token_ids: options.end_token_ids,
        });
        if let Some(seed) = options.observer.cache_event_seed() {
            scheduler.log_cache_events(seed);
        }
        Worker {
            scheduler,
            runner: Runner::new(model, pool, options.num_token_ids, options.tap),
            requests: RequestTable(HashMap::new()),
            observer: options.observer,
            num_blocks: limits.num_blocks,
            lost_device: None,
        }
    }

    fn run(&mut self, mut inbox: mpsc::Receiver<Vec<Submission>>) {
        loop {
            if !self.scheduler.has_work() {
                // Nothing to do: sleep until someone asks for something, or all handles are gone.
                self.runner.rest();
                match inbox.blocking_recv() {
                    Some(siblings) => self.take_in(siblings),
                    None => return,
                }
            }
            while let Ok(siblings) = inbox.try_recv() {
                self.take_in(siblings);
            }
            self.drop_cancelled();
            self.step();
            if let Some(cause) = self.lost_device.take() {
                return self.give_up(&cause);
            }
        }
    }

    fn take_in(&mut self, siblings: Vec<Submission>) {
        let end_token_ids = self.scheduler.end_token_ids();
        let divided = siblings.into_iter().map(|submission| Request::of(submission, end_token_ids));
        let (specs, requests): (Vec<_>, Vec<_>) = divided.unzip();
        self.requests.0.extend(self.scheduler.add_siblings(specs).into_iter().zip(requests));
    }

    /// A dropped stream is how clients cancel.
    fn drop_cancelled(&mut self) {
        let cancelled = self.requests.0.iter().filter(|(_, request)| request.events.is_closed());
        let cancelled: Vec<SequenceId> = cancelled.map(|(&id, _)| id).collect();
        for id in cancelled {
            self.scheduler.abort(id);
            self.requests.0.remove(&id);
        }
    }

    fn step(&mut self) {
        let plan = self.scheduler.schedule();
        self.observer.before_step(&self.scheduler.stats());
        for (id, cached_tokens) in &plan.admitted {
            self.send(*id, TokenEvent::Started { cached_tokens: *cached_tokens });
        }
        let mut report = StepReport {
            num_encoded_frames: plan.encode.iter().map(|work| work.frames.len()).sum(),
            num_prefill_tokens: plan.compute[plan.num_decodes..]
                .iter()
                .map(|work| work.positions.len())
                .sum(),
            num_decodes: plan.num_decodes,
            ..StepReport::default()
        };
        plan.drop_videos.iter().for_each(|digest| self.runner.drop_video(digest));
        let start = Instant::now();
        self.encode(plan.encode, &plan.next_encode);
        report.encode_seconds = start.elapsed().as_secs_f64();
        let start = Instant::now();
        for work in &plan.compute[plan.num_decodes..] {
            self.note(work.sequence, |times| times.prefilling(start));
        }
        self.compute(plan.compute);
        report.compute_seconds = start.elapsed().as_secs_f64();
        #[cfg(debug_assertions)]
        self.scheduler.check_integrity();
        let changes = self.scheduler.take_cache_events();
        if !changes.is_empty() {
            self.observer.cache_changed(changes);
        }
        self.report(report);
    }

    fn note(&mut self, id: SequenceId, note: impl FnOnce(&mut PromptTimes)) {
        if let Some(times) = self.requests.0.get_mut(&id).and_then(|request| request.times.as_mut()) {
            note(times);
        }
    }

    /// Encodes the frames of all works together. When that fails, each runs alone, so that only the culprits fail.
    fn encode(&mut self, mut works: Vec<EncodeWork>, next: &[EncodeWork]) {
        works.retain(|work| self.scheduler.sequence(work.sequence).is_some());
        if works.is_empty() || self.lost_device.is_some() {
            return;
        }
        let start = Instant::now();
        match on_kernel_threads(|| self.runner.encode(&works, next, &self.requests)) {
            Ok(features) => works
                .into_iter()
                .zip(features)
                .for_each(|(work, features)| self.connect(work, features, start)),
            Err(failure) if works.len() == 1 || failure.is_fatal => {
                self.fail(&StepPlan { encode: works, ..StepPlan::default() }, failure)
            }
            Err(_) => works.into_iter().for_each(|work| self.encode(vec![work], &[])),
        }
    }

    fn connect(&mut self, work: EncodeWork, features: Tensor, start: Instant) {
        // What was encoded with it may have failed it.
        if self.scheduler.sequence(work.sequence).is_none() || self.lost_device.is_some() {
            return;
        }
        let outcome = on_kernel_threads(|| self.runner.connect(&work, features));
        self.note(work.sequence, |times| times.encoded(start));
        let part = StepPlan { encode: vec![work], ..StepPlan::default() };
        match outcome {
            Ok(()) => self.deliver(&part, Vec::new()),
            Err(failure) => self.fail(&part, failure),
        }
    }

    /// Runs all works together. When that fails, each runs alone, so that only the culprits fail: what a step
    /// writes to the cache depends on nothing but its plan and may be written twice.
    fn compute(&mut self, mut works: Vec<ComputeWork>) {
        works.retain(|work| self.scheduler.sequence(work.sequence).is_some());
        if works.is_empty() || self.lost_device.is_some() {
            return;
        }
        let outcome = on_kernel_threads(|| self.runner.compute(&works, &self.scheduler, &self.requests));
        match outcome {
            Ok(sampled) => {
                self.requests.add_scores(self.runner.take_prompt_scores());
                self.deliver(&StepPlan { compute: works, ..StepPlan::default() }, sampled);
            }
            Err(failure) if works.len() == 1 || failure.is_fatal => {
                self.fail(&StepPlan { compute: works, ..StepPlan::default() }, failure)
            }
            Err(_) => works.into_iter().for_each(|work| self.compute(vec![work])),
        }
    }

    /// `sampled`: one for each work of the plan that samples, in order.
    fn deliver(&mut self, plan: &StepPlan, sampled: Vec<Sampled>) {
        let ids: Vec<TokenId> = sampled.iter().map(|sampled| sampled.token).collect();
        let sampling = plan.compute.iter().filter(|work| work.samples).map(|work| work.sequence);
        let mut logprobs: HashMap<_, _> = sampling
            .zip(sampled)
            .filter_map(|(id, sampled)| Some((id, (sampled.token, sampled.logprobs?))))
            .collect();
        for update in self.scheduler.complete(plan, &ids) {
            // The prompt is computed: its pixels are not needed any more.
            if let Some(request) = self.requests.0.get_mut(&update.sequence)
                && let Some(times) = request.times.take()
            {
                request.videos = Vec::new();
                let prompt = std::mem::take(&mut request.prompt);
                if !prompt.is_empty() {
                    self.send(update.sequence, TokenEvent::PromptScored(prompt));
                }
                self.send(update.sequence, TokenEvent::PromptComputed(times.finished()));
            }
            self.send_token(&update, logprobs.remove(&update.sequence));
            let complete = match self.advance_guide(&update) {
                Ok(complete) => complete,
                Err(error) => {
                    self.scheduler.abort(update.sequence);
                    self.send(update.sequence, TokenEvent::Failed(error));
                    self.requests.0.remove(&update.sequence);
                    continue;
                }
            };
            if complete && update.finished.is_none() {
                self.scheduler.abort(update.sequence);
            }
            if let Some(reason) = complete.then_some(StopReason::EndOfSequence).or(update.finished) {
                self.send(update.sequence, TokenEvent::Finished(reason));
                self.requests.0.remove(&update.sequence);
            }
        }
    }

    /// Sends the token of a sequence, or, to whom every token is of interest, the one that ended
    /// it.
    fn send_token(&self, update: &SequenceUpdate, sampled: Option<(TokenId, Box<TokenLogprobs>)>) {
        let scores = |request: &Request| request.sampling.scores_prompt;
        match (update.token, sampled) {
            (Some(id), sampled) => {
                let logprobs = sampled.map(|(_, logprobs)| logprobs);
                self.send(update.sequence, TokenEvent::Token { id, logprobs });
            }
            (None, Some((id, logprobs))) if self.requests.0.get(&update.sequence).is_some_and(scores) => {
                self.send(update.sequence, TokenEvent::EndToken { id, logprobs });
            }
            (None, _) => {}
        }
    }

    /// Tells the guide of a sequence what it got; the answer is whether the reply is complete: then no step is spent on
    /// an end token, and a reply that is whole was not cut off. Grammars are clients' work: a panic over one ends its own
    /// sequence only.
    fn advance_guide(&mut self, update: &SequenceUpdate) -> Result<bool, String> {
        let request = self.requests.0.get_mut(&update.sequence);
        let guide = request.and_then(|request| request.guide.as_mut());
        match (guide, update.token) {
            (Some(guide), Some(token)) => {
                let guide = guide.get_mut().unwrap_or_else(PoisonError::into_inner);
                guarded(|| Ok(guide.advance(token))).map_err(|failure| failure.cause)
            }
            _ => Ok(false),
        }
    }

    fn fail(&mut self, plan: &StepPlan, failure: Failure) {
        if failure.is_fatal {
            // Once: what follows a device's failure is only its echo.
            self.lost_device.get_or_insert(failure.cause);
            return;
        }
        let failed = self.scheduler.fail(plan);
        tracing::error!(error = failure.cause, sequences = failed.len(), "a step failed");
        for id in failed {
            self.send(id, TokenEvent::Failed(failure.cause.clone()));
            self.requests.0.remove(&id);
        }
    }

    /// Tells every sequence that the device has failed. The thread ends after it, and with it the process.
    fn give_up(&mut self, cause: &str) {
        tracing::error!(
            error = cause,
            sequences = self.requests.0.len(),
            "the device has failed; the engine stops"
        );
        for request in self.requests.0.values() {
            let _ = request.events.try_send(TokenEvent::Failed(format!("the device has failed: {cause}")));
        }
        self.requests.0.clear();
    }

    /// The channel has room for all a sequence can produce, so a failure means that the client has gone.
    fn send(&self, id: SequenceId, event: TokenEvent) {
        if let Some(request) = self.requests.0.get(&id) {
            let _ = request.events.try_send(event);
        }
    }

    fn report(&mut self, report: StepReport) {
        self.observer.step(&StepReport {
            stats: self.scheduler.stats(),
            num_blocks: self.num_blocks,
            ..report
        });
    }
}
