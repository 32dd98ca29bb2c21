//! Replies of every shape, cut everywhere.

mod stops;

use proptest::prelude::*;

use super::*;
use crate::output::{Answer, Options, Reply, collect};

const TAGS: [&str; 4] = ["<think>", "</think>", "<answer>", "</answer>"];

fn assembler(stop_strings: &[&str], raw: bool) -> OutputAssembler {
    let stop_strings = stop_strings.iter().map(|&stop| stop.to_owned()).collect();
    OutputAssembler::new(Arc::new(Tokenizer::bytes()), stop_strings, raw)
}

/// Every event of a reply whose tokens are these pieces.
fn events<'a>(
    mut assembler: OutputAssembler,
    pieces: impl IntoIterator<Item = &'a [u8]>,
    reason: StopReason,
) -> Vec<OutputEvent> {
    let mut events = Vec::new();
    for piece in pieces {
        let new = assembler.push_bytes(0, piece, None);
        assert!(!new.iter().any(|event| matches!(event, OutputEvent::Finished(_))));
        events.extend(new);
        if assembler.stopped() {
            break;
        }
    }
    events.extend(assembler.finish(reason));
    assert!(assembler.finish(reason).is_empty(), "exactly one end");
    assert!(events.iter().all(|event| !matches!(event, OutputEvent::Delta { text, .. } if text.is_empty())));
    assert!(matches!(events.last(), Some(OutputEvent::Finished(_))));
    events
}

fn whole(text: &str, reason: StopReason) -> Reply {
    collect(events(assembler(&[], false), [text.as_bytes()], reason))
}

fn by_byte(text: &str, reason: StopReason) -> Reply {
    collect(events(assembler(&[], false), text.as_bytes().chunks(1), reason))
}

#[test]
fn replies_of_every_shape() {
    // Text, thinking, content.
    let cases = [
        ("<think> a </think> <answer> A </answer>", "a", "A"),
        (
            "<think>\nHe bends.\n\nSo C.\n</think>\n<answer>\nC. pick up\n</answer>\n",
            "He bends.\n\nSo C.",
            "C. pick up",
        ),
        (" The person sits down. ", "", "The person sits down."),
        ("", "", ""),
        ("A < B <thinking> </x>", "", "A < B <thinking> </x>"),
        // Missing tags.
        ("<think> never closed", "never closed", ""),
        ("<think>a</think>", "a", ""),
        ("<think>a</think> B", "a", "B"),
        ("<think>a <answer>B</answer>", "a", "B"),
        ("<answer>B", "", "B"),
        ("<answer></answer>", "", ""),
        ("never opened </think><answer>B</answer>", "", "never opened\nB"),
        ("B</answer>", "", "B"),
        // Text beside the segments.
        ("Well: <think>a</think> so <answer>B</answer> text </answer>", "a", "Well:\nso\nB\ntext"),
        // Repeated and nested tags.
        ("<answer>A</answer> <answer>B</answer>", "", "A\nB"),
        ("<think>a</think><think> b </think><answer>C</answer>", "a\nb", "C"),
        ("<think>a<think>b</think>c</think><answer>D</answer>", "a\nb", "c\nD"),
        ("<answer>A <think>b</think> C</answer>", "b", "A\nC"),
        ("<think>a </answer> b</think>C", "a\nb", "C"),
        ("<think><think></think></think><answer><answer>", "", ""),
        // Half tags.
        ("<think>a</thin b</think><answer<answer>C</answer", "a</thin b", "<answer\nC</answer"),
        ("<<think>>a<</think>", ">a<", "<"),
    ];
    for (text, think, content) in cases {
        for reply in [whole(text, StopReason::EndOfSequence), by_byte(text, StopReason::EndOfSequence)] {
            assert_eq!((reply.think.as_str(), reply.content.as_str()), (think, content), "{text:?}");
        }
    }
}

#[test]
fn the_paper_replies_lose_their_tags_and_nothing_else() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/parse_cases.json");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let cases = json["cases"].as_array().unwrap();
    assert!(cases.len() > 10);
    let visible = |text: &str| text.split_whitespace().collect::<String>();
    for case in cases {
        let text = case[0].as_str().unwrap();
        let reply = by_byte(text, StopReason::EndOfSequence);
        assert_eq!(
            reply,
            Reply { reasoning_tokens: reply.reasoning_tokens, ..whole_counted(text) },
            "{text:?}"
        );
        let without_tags = TAGS.iter().fold(text.to_owned(), |text, tag| text.replace(tag, ""));
        assert_eq!(visible(&(reply.think + &reply.content)), visible(&without_tags), "{text:?}");
    }
}

/// The whole text as one token, with the number of tokens its bytes would be.
fn whole_counted(text: &str) -> Reply {
    Reply { completion_tokens: text.len(), ..whole(text, StopReason::EndOfSequence) }
}

#[test]
fn a_reply_cut_off_inside_a_tag_does_not_show_it() {
    for reason in [StopReason::Length, StopReason::Aborted] {
        let reply = by_byte("<think>long thought </thi", reason);
        assert_eq!((reply.think.as_str(), reply.content.as_str()), ("long thought", ""));
        assert_eq!((reply.reason, reply.reasoning_tokens), (reason, reply.completion_tokens));
        assert_eq!(by_byte("<thi", reason).content, "");
    }
    assert_eq!(by_byte("a <", StopReason::EndOfSequence).content, "a <");
}

#[test]
fn deltas_come_as_early_as_they_are_certain() {
    let mut assembler = assembler(&[], false);
    let mut shown = |piece: &str| {
        let events = assembler.push_bytes(0, piece.as_bytes(), None);
        let deltas = events.into_iter().map(|event| match event {
            OutputEvent::Delta { segment, text, .. } => (segment, text),
            OutputEvent::Finished(_) => panic!("not the end"),
        });
        deltas.collect::<Vec<_>>()
    };
    assert_eq!(shown("<"), []);
    assert_eq!(shown("think"), []);
    assert_eq!(shown("> He"), [(Segment::Think, "He".into())]);
    assert_eq!(shown(" sits"), [(Segment::Think, " sits".into())]);
    assert_eq!(shown(".\n"), [(Segment::Think, ".".into())]);
    assert_eq!(shown("</"), []);
    assert_eq!(shown("think>\n<answer>B"), [(Segment::Answer, "B".into())]);
    assert_eq!(shown("x</answer><think>y"), [(Segment::Answer, "x".into()), (Segment::Think, "\ny".into())]);
}

#[test]
fn nothing_comes_after_a_stop_string() {
    let mut assembler = assembler(&["b"], false);
    assert_eq!(assembler.push(u32::from(b'a')).len(), 1);
    assert!(assembler.push(u32::from(b'b')).is_empty() && assembler.stopped());
    assert!(assembler.push(u32::from(b'c')).is_empty());
    let expected = Ending {
        reason: StopReason::StopString,
        reasoning_tokens: 0,
        completion_tokens: 2,
        tokens: vec![],
        answer: Answer { text: Some("a".into()), ..Answer::default() },
    };
    assert_eq!(assembler.finish(StopReason::Length), [OutputEvent::Finished(expected)]);
}

#[test]
fn reasoning_tokens_are_those_of_the_thinking_and_its_tags() {
    let count = |pieces: &[&str]| {
        let pieces = pieces.iter().map(|piece| piece.as_bytes());
        let reply = collect(events(assembler(&[], false), pieces, StopReason::EndOfSequence));
        (reply.reasoning_tokens, reply.completion_tokens)
    };
    assert_eq!(
        count(&["<", "think", ">", " He", " sits", ".", "</", "think", ">", "<", "answer", ">", "B"]),
        (9, 13)
    );
    assert_eq!(count(&["Hi", "<", "think", ">", "a"]), (4, 5));
    assert_eq!(count(&["<think>", "a", "</think>", " ", "B", "</answer>"]), (3, 6));
    assert_eq!(count(&["A", " ", "B"]), (0, 3));
    // Special tokens and the first half of a character bring no text; they count all the same.
    let mut assembler = assembler(&[], true);
    "<think>".bytes().for_each(|byte| drop(assembler.push(u32::from(byte))));
    assert!(assembler.push(256).is_empty());
    assert!(assembler.push(0xc3).is_empty());
    assert_eq!(assembler.push(0xa9).len(), 1);
    let reply = collect(assembler.finish(StopReason::EndOfSequence));
    assert_eq!((reply.reasoning_tokens, reply.completion_tokens), (10, 10));
}

/// Every event of a reply whose tokens are these pieces, their ids counted from 0, with log probabilities.
fn scored_events(mut assembler: OutputAssembler, pieces: &[&[u8]]) -> Vec<OutputEvent> {
    let mut events = Vec::new();
    for (id, piece) in pieces.iter().enumerate() {
        // Of the four letters that are watched, the first is the likelier the later the step.
        let watched = vec![-1.0 / (id as f32 + 1.0), f32::NEG_INFINITY, -2.0, -3.0];
        let logprobs = TokenLogprobs { chosen: -(id as f32), top: vec![], watched };
        events.extend(assembler.push_bytes(id as TokenId, piece, Some(Box::new(logprobs))));
    }
    events.extend(assembler.finish(StopReason::EndOfSequence));
    events
}

#[test]
fn tokens_go_out_with_the_text_they_belong_to() {
    let pieces = ["<think>", "a", "</", "think>", "\n", "<answer>", "B", "</answer>"];
    let events = scored_events(assembler(&[], false), &pieces.map(str::as_bytes));
    let ids =
        |tokens: &[ScoredToken]| tokens.iter().map(|token| (token.id, token.thinking)).collect::<Vec<_>>();
    let shown: Vec<_> = events
        .iter()
        .map(|event| match event {
            OutputEvent::Delta { text, tokens, .. } => (text.as_str(), ids(tokens)),
            OutputEvent::Finished(ending) => ("", ids(&ending.tokens)),
        })
        .collect();
    let thinking = vec![(0, true), (1, true)];
    let answer = vec![(2, true), (3, true), (4, false), (5, false), (6, false)];
    assert_eq!(shown, [("a", thinking), ("B", answer), ("", vec![(7, false)])]);
}

#[test]
fn the_options_are_read_where_the_answer_begins() {
    let watching = |pieces: &[&str]| {
        let letters = WatchedLetters::new(&Options::default(), &Tokenizer::bytes());
        assert_eq!(letters.token_ids().len(), 4);
        let pieces: Vec<&[u8]> = pieces.iter().map(|piece| piece.as_bytes()).collect();
        collect(scored_events(assembler(&[], false).watching(Some(letters)), &pieces)).answer
    };
    // The step whose token has the answer's first visible character; the letters' probabilities there.
    for (pieces, text, step) in [
        (vec!["<think>", "A", "</think>", "<answer>", "C", "</answer>"], Some("C"), Some(4)),
        (vec!["<think>A</think>", "<answer>", "\n", " C.", "x</answer>"], Some("C.x"), Some(3)),
        (vec!["<think>A</think>so", "<answer>", "C", "</answer>", "D"], Some("C"), Some(2)),
        (vec!["<answer>", "C", "</answer>", "<answer>", "D"], Some("C"), Some(1)),
        (vec![" ", "B", ". x"], Some("B. x"), Some(1)),
        (vec!["<", "b> is", " no tag"], Some("<b> is no tag"), Some(0)),
        // No spelling of a letter also ends the tag.
        (vec!["<answer", ">C", "</answer>"], Some("C"), None),
        (vec!["<answer", ">", "</answer>"], None, None),
        (vec!["<think>", "never closed"], None, None),
    ] {
        let answer = watching(&pieces);
        assert_eq!(answer.text.as_deref(), text, "{pieces:?}");
        let first = answer.option_logprobs.map(|options| options[0]);
        let expected = step.map(|step| -1.0 / (step as f32 + 1.0));
        assert_eq!(first.map(|(letter, _)| letter), step.map(|_| 'A'), "{pieces:?}");
        assert!(
            first.zip(expected).is_none_or(|((_, got), expected)| (got - expected).abs() < 1e-6),
            "{pieces:?}"
        );
    }
}

/// What the module's documentation says, said of the whole text at once.
fn expected(text: &str) -> (String, String) {
    let mut stretches = vec![(Segment::Plain, String::new())];
    let mut rest = text;
    while let Some((at, tag)) = TAGS.iter().filter_map(|tag| Some((rest.find(tag)?, *tag))).min() {
        let (segment, stretch) = stretches.last_mut().unwrap();
        stretch.push_str(&rest[..at]);
        let next = match tag {
            "<think>" => Segment::Think,
            "</answer>" if *segment == Segment::Think => Segment::Think,
            _ => Segment::Answer,
        };
        stretches.push((next, String::new()));
        rest = &rest[at + tag.len()..];
    }
    stretches.last_mut().unwrap().1.push_str(rest);
    let channel = |think: bool| {
        let of_channel = stretches.iter().filter(|(segment, _)| (*segment == Segment::Think) == think);
        let texts = of_channel.map(|(_, text)| text.trim()).filter(|text| !text.is_empty());
        texts.collect::<Vec<_>>().join("\n")
    };
    (channel(true), channel(false))
}

fn reply_text() -> impl Strategy<Value = String> {
    let unit = prop_oneof![
        3 => proptest::sample::select(TAGS.to_vec()),
        2 => proptest::sample::select(vec!["<", "</", "<thi", "think>", "</answe", ">", "<answer", "<Think>"]),
        3 => proptest::sample::select(vec!["a", "B.", "é", "😀", "no ", " so", "\u{3000}x"]),
        2 => proptest::sample::select(vec![" ", "\n", "\t", "\u{a0}"]),
    ];
    proptest::collection::vec(unit, 0..16).prop_map(|units| units.concat())
}

/// `bytes` as tokens of the given lengths, over and over.
fn cut<'a>(bytes: &'a [u8], lengths: &[usize]) -> Vec<&'a [u8]> {
    let (mut rest, mut pieces) = (bytes, Vec::new());
    for &length in lengths.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (piece, after) = rest.split_at(length.min(rest.len()));
        pieces.push(piece);
        rest = after;
    }
    pieces
}

proptest! {
    #[test]
    fn any_cut_gives_the_same_segments(text in reply_text(), lengths in proptest::collection::vec(1usize..9, 1..6)) {
        let events = events(assembler(&[], false), cut(text.as_bytes(), &lengths), StopReason::EndOfSequence);
        let reply = collect(events);
        prop_assert_eq!((reply.think, reply.content), expected(&text));
        prop_assert!(reply.reasoning_tokens <= reply.completion_tokens);
    }

    #[test]
    fn every_token_goes_out_once_and_in_order(
        text in reply_text(), lengths in proptest::collection::vec(1usize..9, 1..6), raw: bool, stop: bool,
    ) {
        let pieces = cut(text.as_bytes(), &lengths);
        let stops: &[&str] = if stop { &["never </thi"] } else { &[] };
        let reply = collect(scored_events(assembler(stops, raw), &pieces));
        let ids: Vec<TokenId> = reply.tokens.iter().map(|token| token.id).collect();
        prop_assert_eq!(ids, (0..reply.completion_tokens as TokenId).collect::<Vec<_>>());
        let num_thinking = reply.tokens.iter().filter(|token| token.thinking).count();
        prop_assert_eq!(num_thinking, reply.reasoning_tokens);
    }

    #[test]
    fn no_tag_reaches_a_segment(text in reply_text(), reason in proptest::sample::select(vec![
        StopReason::EndOfSequence, StopReason::Length,
    ])) {
        let reply = by_byte(&text, reason);
        for tag in TAGS {
            prop_assert!(!reply.think.contains(tag) && !reply.content.contains(tag));
        }
    }

    #[test]
    fn raw_text_is_the_text_up_to_the_stop_string(
        text in reply_text(),
        stop in proptest::sample::select(vec!["</think>", "a", "> ", "😀", "never"]),
        lengths in proptest::collection::vec(1usize..9, 1..6),
    ) {
        let events = events(assembler(&[stop], true), cut(text.as_bytes(), &lengths), StopReason::Length);
        let reply = collect(events);
        let end = text.find(stop);
        prop_assert_eq!(&reply.content, &text[..end.unwrap_or(text.len())]);
        prop_assert_eq!(reply.reason == StopReason::StopString, end.is_some());
        prop_assert!(reply.think.is_empty());
    }

    #[test]
    fn arbitrary_bytes_lose_nothing_in_raw_mode(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
        let reply = collect(events(assembler(&[], true), bytes.chunks(1), StopReason::EndOfSequence));
        prop_assert_eq!(reply.content, String::from_utf8_lossy(&bytes));
        prop_assert_eq!(reply.completion_tokens, bytes.len());
    }
}
