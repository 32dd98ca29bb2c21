//! Which videos are encoded, how far, and which are forgotten first. The tensors themselves are the engine's.

use std::collections::HashMap;

use super::{VideoDigest, sequence::Sequence};

#[derive(Debug, Default)]
struct Slot {
    frames_done: usize,
    num_frames: usize,
    num_holders: usize,
    last_used: u64,
}

#[derive(Debug)]
pub(super) struct EncoderSlots {
    capacity: usize,
    slots: HashMap<VideoDigest, Slot>,
    /// To be dropped by the engine before it encodes again.
    evicted: Vec<VideoDigest>,
    clock: u64,
    queries: u64,
    hits: u64,
}

impl EncoderSlots {
    pub(super) fn new(capacity: usize) -> Self {
        EncoderSlots { capacity, slots: HashMap::new(), evicted: Vec::new(), clock: 0, queries: 0, hits: 0 }
    }

    /// Whether all of `videos` (digest, frames) could be held at once, beside those that are held.
    pub(super) fn has_room(&self, videos: &[(VideoDigest, usize)]) -> bool {
        let mut distinct: Vec<VideoDigest> = videos.iter().map(|(digest, _)| *digest).collect();
        distinct.sort_unstable();
        distinct.dedup();
        let others_held =
            self.slots.iter().filter(|(digest, slot)| slot.num_holders > 0 && !distinct.contains(digest));
        others_held.count() + distinct.len() <= self.capacity
    }

    /// Counts for the metrics how many of `videos` are encoded already.
    pub(super) fn count_query(&mut self, videos: &[(VideoDigest, usize)]) {
        let encoded = videos.iter().filter(|(digest, num_frames)| self.frames_done(digest) == *num_frames);
        self.hits += encoded.count() as u64;
        self.queries += videos.len() as u64;
    }

    /// Holds a slot for each of `videos`, for which there must be room.
    pub(super) fn acquire_all(&mut self, videos: &[(VideoDigest, usize)]) {
        for (digest, num_frames) in videos {
            self.clock += 1;
            let slot = self.slots.entry(*digest).or_default();
            slot.num_frames = *num_frames;
            slot.num_holders += 1;
            slot.last_used = self.clock;
        }
        while self.slots.len() > self.capacity {
            let idle = self.slots.iter().filter(|(_, slot)| slot.num_holders == 0);
            let oldest = idle.min_by_key(|(_, slot)| slot.last_used).map(|(digest, _)| *digest);
            let oldest = oldest.expect("all slots are held after the check: this is a bug");
            self.slots.remove(&oldest);
            self.evicted.push(oldest);
        }
    }

    pub(super) fn release(&mut self, digest: &VideoDigest) {
        let slot = self.slots.get_mut(digest).expect("a released video has no slot: this is a bug");
        assert!(slot.num_holders > 0, "a video was released twice: this is a bug");
        slot.num_holders -= 1;
        // Half a video is of no use to later ones, and its features are large.
        if slot.num_holders == 0 && slot.frames_done < slot.num_frames {
            self.slots.remove(digest);
            self.evicted.push(*digest);
        }
    }

    /// Releases the videos that `sequence` has passed since `already_passed` tokens were computed.
    pub(super) fn release_passed(&mut self, sequence: &Sequence, already_passed: usize) {
        for span in sequence.spans() {
            if already_passed < span.range.end && span.range.end <= sequence.num_computed() {
                self.release(&span.digest);
            }
        }
    }

    pub(super) fn frames_done(&self, digest: &VideoDigest) -> usize {
        self.slots.get(digest).map_or(0, |slot| slot.frames_done)
    }

    /// Frames `[0, frames_done)` are encoded. Ignored when the slot is gone (its sequence was aborted).
    pub(super) fn advance(&mut self, digest: &VideoDigest, frames_done: usize) {
        if let Some(slot) = self.slots.get_mut(digest) {
            slot.frames_done = frames_done;
        }
    }

    /// Encoding failed: whoever still wants the video starts over.
    pub(super) fn restart(&mut self, digest: &VideoDigest) {
        self.evicted.push(*digest);
        if let Some(slot) = self.slots.get_mut(digest) {
            slot.frames_done = 0;
        }
    }

    pub(super) fn take_evicted(&mut self) -> Vec<VideoDigest> {
        std::mem::take(&mut self.evicted)
    }

    pub(super) fn queries_and_hits(&self) -> (u64, u64) {
        (self.queries, self.hits)
    }

    pub(super) fn check_integrity(&self, in_use: impl Iterator<Item = VideoDigest>) {
        let mut holders: HashMap<VideoDigest, usize> = HashMap::new();
        in_use.for_each(|digest| *holders.entry(digest).or_default() += 1);
        for (digest, slot) in &self.slots {
            assert_eq!(
                slot.num_holders,
                holders.remove(digest).unwrap_or(0),
                "a video counts other holders than it has"
            );
        }
        assert!(holders.is_empty(), "a running sequence waits for a video without slot");
        assert!(self.slots.len() <= self.capacity, "more videos than slots");
    }
}
