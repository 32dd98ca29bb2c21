//! Batches of events as vLLM writes them: msgpack arrays without field names, read by position.
//!
//! Called by [`super`] off the engine thread. Field for field as `vllm/distributed/kv_events.py` has them in the versions
//! whose structs are `array_like`, which is what llm-d's indexer reads. Must never put a cache salt on the wire.

use rmp::encode::{
    ByteBuf, write_array_len, write_f64, write_nil, write_sint, write_str, write_u64, write_uint,
};

use crate::scheduler::cache_events::{BlockHash, CacheEvent, StoredBlock};

/// A server is one rank, however many engines it has: requests cannot be sent to one of them.
const DATA_PARALLEL_RANK: u64 = 0;

/// Consecutive events that one message event says.
enum Run<'a> {
    /// Each is the parent of the next.
    Stored(Vec<&'a StoredBlock>),
    Removed(Vec<BlockHash>),
}

/// `[time, events, rank]`
pub fn changed(unix_seconds: f64, events: &[CacheEvent]) -> Vec<u8> {
    let runs = runs(events);
    batch(unix_seconds, runs.len(), |out| runs.iter().for_each(|run| put_run(out, run)))
}

/// A batch that says that nothing is cached.
pub fn cleared(unix_seconds: f64) -> Vec<u8> {
    batch(unix_seconds, 1, |out| {
        array(out, 1);
        string(out, "AllBlocksCleared");
    })
}

fn batch(unix_seconds: f64, num_events: usize, put_events: impl FnOnce(&mut ByteBuf)) -> Vec<u8> {
    let mut out = ByteBuf::new();
    array(&mut out, 3);
    infallible(write_f64(&mut out, unix_seconds));
    array(&mut out, num_events);
    put_events(&mut out);
    unsigned(&mut out, DATA_PARALLEL_RANK);
    out.into_vec()
}

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

fn put_run(out: &mut ByteBuf, run: &Run<'_>) {
    match run {
        Run::Stored(blocks) => put_stored(out, blocks),
        // tag, block_hashes, medium
        Run::Removed(hashes) => {
            array(out, 3);
            string(out, "BlockRemoved");
            array(out, hashes.len());
            hashes.iter().for_each(|&hash| hash_of(out, hash));
            nil(out);
        }
    }
}

/// tag, block_hashes, parent_block_hash, token_ids, block_size, lora_id, medium, lora_name, extra_keys
fn put_stored(out: &mut ByteBuf, blocks: &[&StoredBlock]) {
    let has_visuals = blocks.iter().any(|block| !block.visuals.is_empty());
    // The last field has a default, and such fields are left out.
    array(out, if has_visuals { 9 } else { 8 });
    string(out, "BlockStored");
    array(out, blocks.len());
    blocks.iter().for_each(|block| hash_of(out, block.hash));
    match blocks[0].parent {
        Some(parent) => hash_of(out, parent),
        None => nil(out),
    }
    array(out, blocks.iter().map(|block| block.token_ids.len()).sum());
    let tokens = blocks.iter().flat_map(|block| block.token_ids.iter());
    tokens.for_each(|&token| unsigned(out, u64::from(token)));
    unsigned(out, blocks[0].token_ids.len() as u64);
    // No adapters, and one medium, which need not be told from others.
    (0..3).for_each(|_| nil(out));
    if has_visuals {
        array(out, blocks.len());
        blocks.iter().for_each(|block| put_extra_keys(out, block));
    }
}

/// Of one block: identifier and offset of each video in it.
fn put_extra_keys(out: &mut ByteBuf, block: &StoredBlock) {
    if block.visuals.is_empty() {
        return nil(out);
    }
    array(out, block.visuals.len());
    for (video, begins_at) in &block.visuals {
        array(out, 2);
        string(out, &video.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
        infallible(write_sint(out, *begins_at as i64));
    }
}

fn array(out: &mut ByteBuf, len: usize) {
    infallible(write_array_len(
        out,
        u32::try_from(len).expect("an event is larger than a cache: this is a bug"),
    ));
}

fn string(out: &mut ByteBuf, text: &str) {
    infallible(write_str(out, text));
}

fn unsigned(out: &mut ByteBuf, value: u64) {
    infallible(write_uint(out, value));
}

/// Always as nine bytes: readers in Go tell a hash from small integers by its type.
fn hash_of(out: &mut ByteBuf, hash: BlockHash) {
    infallible(write_u64(out, hash));
}

fn nil(out: &mut ByteBuf) {
    infallible(write_nil(out));
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

    #[test]
    fn a_chain_of_blocks_is_one_event_with_its_fields_in_place() {
        let events = [
            block(5, None, vec![]),
            block(6, Some(5), vec![]),
            CacheEvent::Removed(9),
            CacheEvent::Removed(8),
        ];
        let expected = "[1.5, [\
            [\"BlockStored\", [5, 6], nil, [1, 4294967295, 1, 4294967295], 2, nil, nil, nil], \
            [\"BlockRemoved\", [9, 8], nil]], 0]";
        assert_eq!(decoded(&changed(1.5, &events)), expected);
    }

    #[test]
    fn videos_are_extra_keys_of_their_blocks() {
        let events = [block(5, Some(4), vec![]), block(6, Some(5), vec![([0xab; 32], -3)])];
        let id = "ab".repeat(32);
        let expected = format!(
            "[2, [[\"BlockStored\", [5, 6], 4, [1, 4294967295, 1, 4294967295], 2, nil, nil, nil, \
             [nil, [[\"{id}\", -3]]]]], 0]"
        );
        assert_eq!(decoded(&changed(2.0, &events)), expected);
    }

    #[test]
    fn a_block_of_another_chain_begins_another_event() {
        let batch = changed(0.0, &[block(5, None, vec![]), block(6, None, vec![]), CacheEvent::Removed(5)]);
        let batch = rmpv::decode::read_value(&mut &batch[..]).unwrap();
        let events = batch[1].as_array().unwrap();
        let tags: Vec<_> = events.iter().map(|event| event[0].as_str().unwrap()).collect();
        assert_eq!(tags, ["BlockStored", "BlockStored", "BlockRemoved"]);
        assert_eq!(events[1][2], Value::Nil);
    }

    #[test]
    fn an_empty_cache_is_said_too() {
        assert_eq!(decoded(&cleared(1.0)), "[1, [[\"AllBlocksCleared\"]], 0]");
    }
}
