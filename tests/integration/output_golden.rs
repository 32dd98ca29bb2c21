//! The output stage on tokens of the original: the text it decodes, and replies through the checkpoint's vocabulary.

#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, sync::Arc};

use proptest::prelude::*;
use serde_json::Value;
use tinyllava::{
    output::{OutputAssembler, OutputEvent, Reply, Segment, collect},
    prompt::Tokenizer,
    scheduler::StopReason,
};

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: std::sync::LazyLock<Arc<Tokenizer>> =
        std::sync::LazyLock::new(|| Arc::new(Tokenizer::load(&golden("tiny")).unwrap()));
    TOKENIZER.clone()
}

fn reply(ids: &[u32], raw: bool) -> Reply {
    let mut assembler = OutputAssembler::new(tokenizer(), Vec::new(), raw);
    let mut events: Vec<OutputEvent> = ids.iter().flat_map(|&id| assembler.push(id)).collect();
    events.extend(assembler.finish(StopReason::EndOfSequence));
    collect(events)
}

#[test]
fn greedy_ids_give_the_original_text() {
    let json: Value = serde_json::from_slice(&std::fs::read(golden("tiny/golden.json")).unwrap()).unwrap();
    let ids: Vec<u32> = serde_json::from_value(json["greedy_ids"].clone()).unwrap();
    let raw = reply(&ids, true);
    assert_eq!(raw.content, json["greedy_text"].as_str().unwrap());
    assert_eq!((raw.reasoning_tokens, raw.completion_tokens), (0, 24));
}

#[test]
fn a_reply_through_the_vocabulary_is_thinking_then_answer() {
    let ids =
        tokenizer().encode("<think>\nHe bends. é 😀\n</think>\n<answer>\nC. pick up\n</answer>").unwrap();
    let reply = reply(&ids, false);
    assert_eq!((reply.think.as_str(), reply.content.as_str()), ("He bends. é 😀", "C. pick up"));
    assert!(0 < reply.reasoning_tokens && reply.reasoning_tokens < reply.completion_tokens);
}

#[test]
fn thinking_comes_before_the_answer_and_never_with_it() {
    let ids = tokenizer().encode("<think>a b c</think><answer>d e f</answer>").unwrap();
    let mut assembler = OutputAssembler::new(tokenizer(), Vec::new(), false);
    let mut segments: Vec<Segment> = ids
        .iter()
        .flat_map(|&id| assembler.push(id))
        .filter_map(|event| if let OutputEvent::Delta { segment, .. } = event { Some(segment) } else { None })
        .collect();
    segments.dedup();
    assert_eq!(segments, [Segment::Think, Segment::Answer]);
}

proptest! {
    #[test]
    fn raw_output_of_any_tokens_is_what_the_tokenizer_decodes(ids in proptest::collection::vec(0u32..610, 0..60)) {
        prop_assert_eq!(reply(&ids, true).content, tokenizer().decode(&ids));
    }
}
