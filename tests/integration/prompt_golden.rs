//! The prompt stage against the original's own texts and ids, with the tiny checkpoint's tokenizer files.

#![allow(clippy::unwrap_used)]

use std::{fs, path::PathBuf};

use proptest::prelude::*;
use serde::Deserialize;
use tinyllava::{
    prompt::{Conversation, Tokenizer, Turn, build, template, tokenizer::MAX_TEXT_BYTES},
    scheduler::VISUAL_TOKEN,
};
use tokenizers::{NormalizedString, Normalizer, normalizers::NFC};

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn read<T: for<'de> Deserialize<'de>>(name: &str) -> T {
    serde_json::from_slice(&fs::read(golden(name)).unwrap()).unwrap()
}

/// From `tokenizer.json`, and from `vocab.json` + `merges.txt`.
fn both() -> [Tokenizer; 2] {
    ["tiny", "tiny_bf16_sharded"].map(|name| Tokenizer::load(&golden(name)).unwrap())
}

fn nfc(text: &str) -> String {
    let mut text = NormalizedString::from(text);
    NFC.normalize(&mut text).unwrap();
    text.get().to_owned()
}

#[derive(Deserialize)]
struct TokenizerCase {
    text: String,
    fast: Vec<u32>,
    decoded: String,
}

#[test]
fn tokenizer_cases_have_the_original_ids() {
    let cases: Vec<TokenizerCase> = read("tokenizer_cases.json");
    for tokenizer in both() {
        for case in &cases {
            // The original reads special tokens out of a text; here only the template writes them.
            if case.text.contains("<|") {
                continue;
            }
            let ids = tokenizer.encode(&case.text).unwrap();
            assert_eq!(ids, case.fast, "{:?}", case.text);
            assert_eq!(tokenizer.decode(&ids), case.decoded);
        }
    }
    assert!(cases.len() >= 12);
}

#[test]
fn special_tokens_in_a_text_are_text() {
    let cases: Vec<TokenizerCase> = read("tokenizer_cases.json");
    let case = cases.iter().find(|case| case.text.contains("<|im_start|>")).unwrap();
    for tokenizer in both() {
        let ids = tokenizer.encode(&case.text).unwrap();
        assert!(ids.iter().all(|&id| id < 597), "{ids:?}");
        assert_eq!(tokenizer.decode(&ids), case.text);
        // What the original reads as special tokens, written as such.
        let special = |name| tokenizer.special_token(name).unwrap();
        let mut pieced = vec![special("<|im_start|>")];
        pieced.extend(tokenizer.encode("user\nhi").unwrap());
        pieced.push(special("<|im_end|>"));
        pieced.extend(tokenizer.encode("\n").unwrap());
        assert_eq!(pieced, case.fast);
        assert_eq!(tokenizer.decode(&pieced), "user\nhi\n");
    }
}

#[test]
fn both_tokenizers_have_the_same_tables() {
    let [fast, slow] = both();
    for tokenizer in [&fast, &slow] {
        assert_eq!((tokenizer.vocab_size(), tokenizer.end_of_text()), (600, 597));
    }
    for id in 0..700 {
        assert_eq!(fast.token_bytes(id), slow.token_bytes(id), "{id}");
        assert_eq!(fast.token_bytes(id).is_some(), id < 597, "{id}");
    }
}

#[test]
fn the_embedded_checkpoint_has_a_tokenizer() {
    let nano = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models/nano");
    let tokenizer = Tokenizer::load(&nano).unwrap();
    assert_eq!(Some(tokenizer.end_of_text()), tokenizer.special_token("<|endoftext|>"));
    let text = template::with_instruction("Which way does it move?\nA. left\nB. right");
    assert_eq!(tokenizer.decode(&tokenizer.encode(&text).unwrap()), text);
}

#[test]
fn a_tokenizer_file_cannot_truncate_or_pad_a_prompt() {
    let mut json: serde_json::Value = read("tiny/tokenizer.json");
    json["truncation"] = serde_json::json!({
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
    });
    json["padding"] = serde_json::json!({
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 597, "pad_type_id": 0, "pad_token": "<|endoftext|>"
    });
    let tokenizer = Tokenizer::from_tokenizer_json(json.to_string().as_bytes(), None).unwrap();
    assert_eq!(tokenizer.encode("Hello world").unwrap(), [39, 425, 336, 307, 271, 547]);
}

#[derive(Deserialize)]
struct TemplateCase {
    question: Option<String>,
    turns: Option<Vec<(String, Option<String>)>>,
    prompt: String,
    input_ids: Vec<i64>,
}

/// The original marks the video inside the text; here the turn says so, and the text has no mark.
fn turn(text: &str, assistant: Option<String>) -> Turn {
    let num_videos = usize::from(text.contains("<image>"));
    Turn { user: text.replace("<image>", ""), num_videos, assistant }
}

#[test]
fn template_cases_have_the_original_text_and_ids() {
    let cases: Vec<TemplateCase> = read("template_cases.json");
    for case in &cases {
        let turns = case.turns.clone().unwrap_or_else(|| vec![(case.question.clone().unwrap(), None)]);
        let turns = turns.into_iter().map(|(user, reply)| turn(&user, reply)).collect();
        let conversation = Conversation { system: None, turns };
        assert_eq!(template::render(&conversation).unwrap(), case.prompt);
        for tokenizer in both() {
            let prompt = build(&conversation, &tokenizer, 1).unwrap();
            let ids: Vec<i64> = prompt
                .token_ids
                .iter()
                .map(|&id| if id == VISUAL_TOKEN { -200 } else { i64::from(id) })
                .collect();
            assert_eq!(ids, case.input_ids, "{}", case.prompt);
        }
    }
    assert!(cases.len() >= 6);
}

/// Texts with a typed placeholder and a video part, as the original takes them.
#[test]
fn a_typed_placeholder_beside_a_video_gives_the_original_ids() {
    let cases: Vec<TemplateCase> = read("template_cases.json");
    let mut num_typed = 0;
    for case in &cases {
        let turns = case.turns.clone().unwrap_or_else(|| vec![(case.question.clone().unwrap(), None)]);
        let typed = |(text, assistant): (String, Option<String>)| {
            let num_videos = usize::from(text.contains("<image>"));
            Turn { user: text, num_videos, assistant }
        };
        let conversation = Conversation { system: None, turns: turns.into_iter().map(typed).collect() };
        num_typed += conversation.turns.iter().filter(|turn| turn.num_videos > 0).count();
        for tokenizer in both() {
            let prompt = build(&conversation, &tokenizer, 1).unwrap();
            let ids =
                prompt.token_ids.iter().map(|&id| if id == VISUAL_TOKEN { -200 } else { i64::from(id) });
            assert_eq!(ids.collect::<Vec<_>>(), case.input_ids, "{}", case.prompt);
        }
    }
    assert!(num_typed >= 4, "{num_typed}");
}

#[test]
fn a_typed_placeholder_without_a_video_is_the_ids_of_its_text() {
    for tokenizer in both() {
        let turns = vec![Turn { user: "What is <image>?".into(), num_videos: 0, assistant: None }];
        let system = Some(String::new());
        let prompt = build(&Conversation { system, turns }, &tokenizer, 1).unwrap();
        assert_eq!(prompt.token_ids, tokenizer.encode("USER: What is <image>? ASSISTANT:").unwrap());
        assert!(prompt.video_spans.is_empty());
    }
}

#[test]
fn the_checkpoint_prompt_is_the_instruction_around_the_question() {
    let prompt = fs::read_to_string(golden("tiny/prompt.txt")).unwrap();
    let question = "What is the action performed by the person in the video?\nA. drop\nB. sit down\nC. pick up\nD. squat down";
    let user = template::with_instruction(question);
    let turns = vec![Turn { user, num_videos: 1, assistant: None }];
    assert_eq!(template::render(&Conversation { system: None, turns }).unwrap(), prompt);
}

#[test]
fn the_longest_text_without_spaces_is_tokenised() {
    let [fast, slow] = both();
    for unit in
        ["a", " ", "\n", "\r", "!", "'s", "é", "e\u{301}", "\u{301}", "\u{3000}", "1", "<", "\t ", " \u{a0}x"]
    {
        let text = unit.repeat(MAX_TEXT_BYTES / unit.len());
        let ids = slow.encode(&text).unwrap();
        assert_eq!(slow.decode(&ids), nfc(&text), "{unit:?}");
        assert_eq!(fast.encode(&text).unwrap(), ids, "{unit:?}");
    }
}

#[test]
fn words_after_a_long_run_of_spaces_are_still_split() {
    for tokenizer in both() {
        let spaces = " ".repeat(MAX_TEXT_BYTES - 4);
        let ids = tokenizer.encode(&format!("{spaces}the ")).unwrap();
        // The last space of the run belongs to the word.
        let mut expected = tokenizer.encode(&spaces[1..]).unwrap();
        expected.extend(tokenizer.encode(" the ").unwrap());
        assert_eq!(ids, expected);
    }
}

#[test]
fn a_missing_tokenizer_is_named() {
    let empty = tempfile::tempdir().unwrap();
    let error = Tokenizer::load(empty.path()).unwrap_err().to_string();
    assert!(error.contains("vocab.json"), "{error}");
    fs::write(empty.path().join("tokenizer.json"), "{}").unwrap();
    let error = Tokenizer::load(empty.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
}

/// Text with what tokenizers stumble over: special tokens, tags, marks that combine, spaces of all kinds.
fn text() -> impl Strategy<Value = String> {
    let unit = prop_oneof![
        4 => "\\PC{0,12}",
        2 => "[a-zA-Z ']{0,12}",
        1 => "[\\s\u{a0}\u{3000}]{0,4}",
        1 => proptest::sample::select(vec![
            "<|endoftext|>", "<|im_start|>", "<image>", "<think>", "</answer>", "e\u{301}", "\u{1100}\u{1161}",
            "\0", "\u{feff}", "😀", "\r\n", "\u{212b}", "\u{0344}", "don't", "12345",
        ]).prop_map(str::to_owned),
    ];
    proptest::collection::vec(unit, 0..8).prop_map(|units| units.concat())
}

proptest! {
    #[test]
    fn decoding_gives_the_normalised_text_back(text in text()) {
        let [fast, slow] = &*TOKENIZERS;
        let ids = slow.encode(&text).unwrap();
        prop_assert_eq!(slow.decode(&ids), nfc(&text));
        prop_assert!(ids.iter().all(|&id| slow.token_bytes(id).is_some()));
        prop_assert_eq!(fast.encode(&text).unwrap(), ids);
    }
}

static TOKENIZERS: std::sync::LazyLock<[Tokenizer; 2]> = std::sync::LazyLock::new(both);
