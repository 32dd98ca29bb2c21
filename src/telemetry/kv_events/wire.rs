//! Encodes batches of KV events in msgpack, in the two forms that vLLM has had.
//!
//! Called by [`super`] off the engine thread. Fields and values are those of
//! `vllm/distributed/kv_events.py`. A batch is the array `[time, events, rank]` in both forms; see
//! [`KvEventsFormat`] for its events. Must never put a cache salt on the wire.

use rmp::encode::{
    ByteBuf, write_array_len, write_f64, write_map_len, write_nil, write_sint, write_str, write_u64,
    write_uint,
};

use crate::scheduler::cache_events::{BlockHash, CacheEvent, StoredBlock};

/// A server is one rank, however many engines it has: requests cannot be sent to one of them.
const DATA_PARALLEL_RANK: u64 = 0;
/// vLLM's name of the engine's own cache, on every device. Some readers of maps require it.
const MEDIUM: &str = "GPU";
/// The one group of layers that share block tables: all of them, with full attention.
const CACHE_GROUP: u64 = 0;
const CACHE_KIND: &str = "full_attention";

/// The form of the events in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvEventsFormat {
    /// Maps with field names and the tag `type`, as vLLM 0.26 and later.
    #[default]
    Map,
    /// Arrays without field names that begin with the tag, as older versions.
    Array,
}

/// Consecutive cache events that one event on the wire carries.
enum Run<'a> {
    /// Each is the parent of the next.
    Stored(Vec<&'a StoredBlock>),
    Removed(Vec<BlockHash>),
}

impl KvEventsFormat {
    /// Encodes `events` as a batch of time `unix_seconds`.
    pub fn changed(self, unix_seconds: f64, events: &[CacheEvent]) -> Vec<u8> {
        let runs = runs(events);
        let mut writer = Writer::batch(self, unix_seconds, runs.len());
        for run in &runs {
            match run {
                Run::Stored(blocks) => writer.stored(blocks),
                Run::Removed(hashes) => writer.removed(hashes),
            }
        }
        writer.end()
    }

    /// Encodes a batch that says that nothing is cached.
    pub fn cleared(self, unix_seconds: f64) -> Vec<u8> {
        let mut writer = Writer::batch(self, unix_seconds, 1);
        writer.event("AllBlocksCleared", 0);
        writer.end()
    }
}

/// Merges stored blocks that form a chain, and removals.
fn runs(events: &[CacheEvent]) -> Vec<Run<'_>> {
    let mut runs = Vec::new();
    for event in events {
        match (event, runs.last_mut()) {
            (CacheEvent::Removed(hash), Some(Run::Removed(run))) => run.push(*hash),
            (CacheEvent::Removed(hash), _) => runs.push(Run::Removed(vec![*hash])),
            (CacheEvent::Stored(block), Some(Run::Stored(run)))
                if run.last().is_some_and(|last| block.parent == Some(last.hash)) =>
            {
                run.push(block);
            }
            (CacheEvent::Stored(block), _) => runs.push(Run::Stored(vec![block])),
        }
    }
    runs
}

/// Writes one batch into memory.
struct Writer {
    out: ByteBuf,
    format: KvEventsFormat,
}

impl Writer {
    /// Begins a batch of `num_events` events.
    fn batch(format: KvEventsFormat, unix_seconds: f64, num_events: usize) -> Self {
        let mut writer = Writer { out: ByteBuf::new(), format };
        writer.array(3);
        infallible(write_f64(&mut writer.out, unix_seconds));
        writer.array(num_events);
        writer
    }

    fn end(mut self) -> Vec<u8> {
        self.unsigned(DATA_PARALLEL_RANK);
        self.out.into_vec()
    }

    /// Begins an event; `num_fields` calls of [`Self::field`] follow, each with its value.
    fn event(&mut self, tag: &str, num_fields: usize) {
        match self.format {
            KvEventsFormat::Map => {
                infallible(write_map_len(&mut self.out, length(num_fields + 1)));
                self.string("type");
            }
            KvEventsFormat::Array => self.array(num_fields + 1),
        }
        self.string(tag);
    }

    /// Begins a field; its value is written next. In arrays, fields have the order of the calls.
    fn field(&mut self, name: &str) {
        if self.format == KvEventsFormat::Map {
            self.string(name);
        }
    }

    /// Writes a chain of blocks, the first of them first.
    fn stored(&mut self, blocks: &[&StoredBlock]) {
        let has_visuals = blocks.iter().any(|block| !block.visuals.is_empty());
        let num_cache_fields = match self.format {
            KvEventsFormat::Map => 2,
            KvEventsFormat::Array => 0,
        };
        // `extra_keys` has a default, and fields at their default are left out.
        self.event("BlockStored", 7 + usize::from(has_visuals) + num_cache_fields);
        self.field("block_hashes");
        self.array(blocks.len());
        for block in blocks {
            self.hash(block.hash);
        }
        self.field("parent_block_hash");
        match blocks[0].parent {
            Some(parent) => self.hash(parent),
            None => self.nil(),
        }
        self.field("token_ids");
        self.array(blocks.iter().map(|block| block.token_ids.len()).sum());
        for &token in blocks.iter().flat_map(|block| block.token_ids.iter()) {
            self.unsigned(u64::from(token));
        }
        self.field("block_size");
        self.unsigned(blocks[0].token_ids.len() as u64);
        self.field("lora_id");
        self.nil();
        self.medium();
        self.field("lora_name");
        self.nil();
        if has_visuals {
            self.field("extra_keys");
            self.array(blocks.len());
            for block in blocks {
                self.extra_keys(block);
            }
        }
        if self.format == KvEventsFormat::Map {
            self.cache_group();
            self.field("kv_cache_spec_kind");
            self.string(CACHE_KIND);
        }
    }

    fn removed(&mut self, hashes: &[BlockHash]) {
        self.event("BlockRemoved", if self.format == KvEventsFormat::Map { 3 } else { 2 });
        self.field("block_hashes");
        self.array(hashes.len());
        for &hash in hashes {
            self.hash(hash);
        }
        self.medium();
        if self.format == KvEventsFormat::Map {
            self.cache_group();
        }
    }

    fn medium(&mut self) {
        self.field("medium");
        match self.format {
            KvEventsFormat::Map => self.string(MEDIUM),
            KvEventsFormat::Array => self.nil(),
        }
    }

    fn cache_group(&mut self) {
        self.field("group_idx");
        self.unsigned(CACHE_GROUP);
    }

    /// Writes identifier and offset of each video of a block; nil for a block without video.
    fn extra_keys(&mut self, block: &StoredBlock) {
        if block.visuals.is_empty() {
            return self.nil();
        }
        self.array(block.visuals.len());
        for (video, begins_at) in &block.visuals {
            self.array(2);
            self.string(&video.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
            infallible(write_sint(&mut self.out, *begins_at as i64));
        }
    }

    fn array(&mut self, len: usize) {
        infallible(write_array_len(&mut self.out, length(len)));
    }

    fn string(&mut self, text: &str) {
        infallible(write_str(&mut self.out, text));
    }

    fn unsigned(&mut self, value: u64) {
        infallible(write_uint(&mut self.out, value));
    }

    /// Always as nine bytes: readers in Go tell a hash from small integers by its type.
    fn hash(&mut self, hash: BlockHash) {
        infallible(write_u64(&mut self.out, hash));
    }

    fn nil(&mut self) {
        infallible(write_nil(&mut self.out));
    }
}

fn length(len: usize) -> u32 {
    u32::try_from(len).expect("an event is larger than a cache: this is a bug")
}

/// Memory takes everything.
fn infallible<T, E: std::fmt::Debug>(written: Result<T, E>) {
    written.expect("writing to memory failed: this is a bug");
}

#[cfg(test)]
mod tests {
    use rmpv::Value;

    use super::*;

    fn block(hash: BlockHash, parent: Option<BlockHash>, visuals: Vec<([u8; 32], isize)>) -> CacheEvent {
        CacheEvent::Stored(StoredBlock { hash, parent, token_ids: vec![1, u32::MAX].into(), visuals })
    }

    fn decoded(payload: &[u8]) -> String {
        rmpv::decode::read_value(&mut &payload[..]).unwrap().to_string()
    }

    fn chain_and_removals() -> [CacheEvent; 4] {
        let [first, second] = [block(5, None, vec![]), block(6, Some(5), vec![])];
        [first, second, CacheEvent::Removed(9), CacheEvent::Removed(8)]
    }

    fn second_block_has_a_video() -> [CacheEvent; 2] {
        [block(5, Some(4), vec![]), block(6, Some(5), vec![([0xab; 32], -3)])]
    }

    #[test]
    fn a_chain_of_blocks_is_one_map_with_vllm_s_names_and_values() {
        let expected = "[1.5, [\
            {\"type\": \"BlockStored\", \"block_hashes\": [5, 6], \"parent_block_hash\": nil, \
            \"token_ids\": [1, 4294967295, 1, 4294967295], \"block_size\": 2, \"lora_id\": nil, \
            \"medium\": \"GPU\", \"lora_name\": nil, \"group_idx\": 0, \
            \"kv_cache_spec_kind\": \"full_attention\"}, \
            {\"type\": \"BlockRemoved\", \"block_hashes\": [9, 8], \"medium\": \"GPU\", \"group_idx\": 0}], 0]";
        assert_eq!(decoded(&KvEventsFormat::Map.changed(1.5, &chain_and_removals())), expected);
    }

    #[test]
    fn a_chain_of_blocks_is_one_array_with_its_fields_in_place() {
        let expected = "[1.5, [\
            [\"BlockStored\", [5, 6], nil, [1, 4294967295, 1, 4294967295], 2, nil, nil, nil], \
            [\"BlockRemoved\", [9, 8], nil]], 0]";
        assert_eq!(decoded(&KvEventsFormat::Array.changed(1.5, &chain_and_removals())), expected);
    }

    #[test]
    fn videos_are_extra_keys_of_their_blocks_in_both_forms() {
        let id = "ab".repeat(32);
        let expected = format!(
            "[2, [[\"BlockStored\", [5, 6], 4, [1, 4294967295, 1, 4294967295], 2, nil, nil, nil, \
             [nil, [[\"{id}\", -3]]]]], 0]"
        );
        assert_eq!(decoded(&KvEventsFormat::Array.changed(2.0, &second_block_has_a_video())), expected);
        let expected = format!(
            "[2, [{{\"type\": \"BlockStored\", \"block_hashes\": [5, 6], \"parent_block_hash\": 4, \
             \"token_ids\": [1, 4294967295, 1, 4294967295], \"block_size\": 2, \"lora_id\": nil, \
             \"medium\": \"GPU\", \"lora_name\": nil, \"extra_keys\": [nil, [[\"{id}\", -3]]], \
             \"group_idx\": 0, \"kv_cache_spec_kind\": \"full_attention\"}}], 0]"
        );
        assert_eq!(decoded(&KvEventsFormat::Map.changed(2.0, &second_block_has_a_video())), expected);
    }

    #[test]
    fn a_block_of_another_chain_begins_another_event() {
        let events = [block(5, None, vec![]), block(6, None, vec![]), CacheEvent::Removed(5)];
        let batch = KvEventsFormat::Map.changed(0.0, &events);
        let batch = rmpv::decode::read_value(&mut &batch[..]).unwrap();
        let events = batch[1].as_array().unwrap();
        let tags: Vec<_> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
        assert_eq!(tags, ["BlockStored", "BlockStored", "BlockRemoved"]);
        assert_eq!(events[1]["parent_block_hash"], Value::Nil);
    }

    #[test]
    fn a_hash_takes_nine_bytes_however_small_it_is() {
        for format in [KvEventsFormat::Map, KvEventsFormat::Array] {
            let batch = format.changed(0.0, &[CacheEvent::Removed(5)]);
            let hash = [0xcf, 0, 0, 0, 0, 0, 0, 0, 5];
            assert!(batch.windows(hash.len()).any(|bytes| bytes == hash), "{batch:02x?}");
        }
    }

    #[test]
    fn the_first_batch_clears_the_cache_in_both_forms() {
        assert_eq!(decoded(&KvEventsFormat::Map.cleared(1.0)), "[1, [{\"type\": \"AllBlocksCleared\"}], 0]");
        assert_eq!(decoded(&KvEventsFormat::Array.cleared(1.0)), "[1, [[\"AllBlocksCleared\"]], 0]");
    }
}
