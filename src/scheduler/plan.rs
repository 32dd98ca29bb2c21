//! What goes into one step: decodes, frames to encode, prompt chunks.
//!
//! Called by [`Scheduler::schedule`]. Changes nothing: the plan takes effect when the step is completed.

use super::{ComputeWork, EncodeWork, Scheduler, VisualSpan};

impl Scheduler {
    /// The next token of everyone whose prompt is computed.
    pub(super) fn plan_decode(&self) -> Vec<ComputeWork> {
        let decoding = self.running.iter().filter(|id| !self.sequences[id].is_prefilling());
        decoding.map(|&id| self.sequences[&id].work(id, 1)).collect()
    }

    /// Frames of the first sequences that wait for them, up to the step's budget; and up to that of the step after it.
    pub(super) fn plan_encode(&self) -> (Vec<EncodeWork>, Vec<EncodeWork>) {
        let mut works: [Vec<EncodeWork>; 2] = Default::default();
        let mut budgets = [self.limits.max_encode_frames; 2];
        let mut planned = Vec::new();
        for &id in &self.running {
            let sequence = &self.sequences[&id];
            for (video, span) in sequence.spans().iter().enumerate() {
                let digest = span.digest;
                if planned.contains(&digest) || span.range.end <= sequence.num_computed() {
                    continue;
                }
                planned.push(digest);
                let mut start = self.encoder.frames_done(&digest);
                for (works, budget) in works.iter_mut().zip(&mut budgets) {
                    let end = span.num_frames.min(start + *budget);
                    if start < end {
                        *budget -= end - start;
                        let is_last = end == span.num_frames;
                        works.push(EncodeWork { sequence: id, video, digest, frames: start..end, is_last });
                        start = end;
                    }
                }
                if budgets == [0; 2] {
                    return works.into();
                }
            }
        }
        works.into()
    }

    /// Prompt chunks in order of admission, up to the step's budget; a chunk never enters a span not yet encoded.
    pub(super) fn plan_prefill(&self) -> Vec<ComputeWork> {
        let mut budget = self.limits.max_prefill_tokens;
        let mut scored_budget = self.limits.max_scored_tokens;
        let mut works = Vec::new();
        // Families whose shared part somebody computes already.
        let mut led = Vec::new();
        for &id in &self.running {
            let sequence = &self.sequences[&id];
            if !sequence.is_prefilling() || budget == 0 {
                continue;
            }
            if self.families.of(sequence).is_some_and(|family| sequence.num_computed() < family.num_shared) {
                if led.contains(&sequence.family) {
                    continue;
                }
                led.push(sequence.family);
            }
            let missing = |span: &&VisualSpan| {
                span.range.end > sequence.num_computed()
                    && self.encoder.frames_done(&span.digest) < span.num_frames
            };
            let limit =
                sequence.spans().iter().find(missing).map_or(sequence.num_tokens(), |span| span.range.start);
            let mut num_tokens = limit.saturating_sub(sequence.num_computed()).min(budget);
            if sequence.scores_prompt() {
                num_tokens = num_tokens.min(scored_budget);
                scored_budget -= num_tokens;
            }
            if num_tokens > 0 {
                budget -= num_tokens;
                works.push(sequence.work(id, num_tokens));
            }
        }
        works
    }
}
