//! Stop strings in replies of every shape, cut everywhere.

use proptest::prelude::*;

use super::*;

/// Thinking, content, reason and number of tokens of a reply whose tokens are bytes.
fn stopped_reply(assembler: OutputAssembler, text: &str) -> (String, String, StopReason, usize) {
    let reply = collect(events(assembler, text.as_bytes().chunks(1), StopReason::EndOfSequence));
    (reply.think, reply.content, reply.reason, reply.completion_tokens)
}

#[test]
fn stop_strings_end_the_answer_and_never_the_thinking() {
    let stop = StopReason::StopString;
    let end = StopReason::EndOfSequence;
    let text = "<think>One. Two\nthree.</think>\n\n<answer>\nB. four\nfive</answer> six";
    let thinking = "One. Two\nthree.";
    let whole = "B. four\nfive\nsix";
    for (stops, content, reason) in [
        (&["."][..], "B", stop),
        (&["\n"], "B. four", stop),
        (&["\n\n"], whole, end),
        (&["three", "four"], "B.", stop),
        (&["five<", "never"], "B. four", stop),
        (&["</answer>"], "B. four\nfive", stop),
        (&["<"], "B. four\nfive", stop),
        (&["answer>"], "B. four\nfive", stop),
        (&["e</answer>"], "B. four\nfiv", stop),
        (&["six"], "B. four\nfive", stop),
        (&["<think>", "</think>", "<answer>"], whole, end),
        (&["Two", "One."], whole, end),
        (&["B"], "", stop),
    ] {
        let reply = stopped_reply(assembler(stops, false), text);
        assert_eq!((reply.0.as_str(), reply.1.as_str(), reply.2), (thinking, content, reason), "{stops:?}");
    }
    // Raw text is cut wherever a stop string stands.
    let raw = |stops: &[&str]| stopped_reply(assembler(stops, true), text).1;
    assert_eq!(raw(&["</answer>"]), text.split_once("</answer>").unwrap().0);
    assert_eq!(raw(&["."]), "<think>One");
    assert_eq!(raw(&["</think>"]), "<think>One. Two\nthree.");
    assert_eq!(raw(&["never"]), text);
}

#[test]
fn stop_strings_cut_replies_of_every_shape_in_their_content() {
    for (text, stops, think, content) in [
        // Without tags it is all content.
        (" The person. sits", &["."][..], "", "The person"),
        ("\n\nOne\n\ntwo", &["\n\n"], "", "One"),
        // The answer without its tags, the thinking without its end.
        ("<think>a. b</think> C. d", &["."], "a. b", "C"),
        ("<think>a. b<answer>C. d", &["."], "a. b", "C"),
        ("<think>a. b. never closed.", &[".", "<think>"], "a. b. never closed.", ""),
        // A stray closing tag in the thinking is none of the answer's.
        ("<think>a</answer>. b</think>C", &["</answer>", "."], "a\n. b", "C"),
        ("<answer></answer><answer>C</answer>", &["</answer>"], "", "C"),
        // Second stretches of content are joined by a line end, which stops as any other.
        ("<answer>A</answer> <answer>B</answer>", &["\n"], "", "A"),
        ("<answer>A <think>b. c</think> C. d</answer>", &["."], "b. c", "A\nC"),
        // No stop string reaches over a tag, and half of one is text.
        ("<answer>A<think>b</think>C</answer>", &["AC", "A\nC"], "b", "A\nC"),
        ("<answer>do not sto</answer>", &["stop"], "", "do not sto"),
        ("a <", &["<"], "", "a"),
    ] {
        let (thought, told, ..) = stopped_reply(assembler(stops, false), text);
        assert_eq!((thought.as_str(), told.as_str()), (think, content), "{text:?} {stops:?}");
    }
}

#[test]
fn a_guided_answer_is_never_cut() {
    let answer = "{\"a\": \"x. y\"}";
    let text = format!("<think>so. then</think> <answer>{answer}</answer>");
    let guided = |raw| assembler(&[".", "\"}", "</answer>"], raw).verbatim(Verbatim::Answer);
    let (think, content, reason, _) = stopped_reply(guided(false), &text);
    assert_eq!((think.as_str(), content.as_str()), ("so. then", answer));
    assert_eq!(reason, StopReason::EndOfSequence);
    assert_eq!(stopped_reply(guided(true), &text).1, "<think>so");
}

#[test]
fn a_stop_string_counts_tokens_up_to_itself() {
    let text = "<think>one.</think><answer>two. three</answer>";
    let reply = collect(events(assembler(&["."], false), text.as_bytes().chunks(1), StopReason::Length));
    assert_eq!(reply.completion_tokens, "<think>one.</think><answer>two.".len());
    assert_eq!(reply.reasoning_tokens, "<think>one.</think>".len());
    assert_eq!(reply.answer, Answer { text: Some("two".into()), is_tagged: true, option_logprobs: None });
}

#[test]
fn a_stop_string_before_the_fewest_tokens_is_text() {
    let reply = |min_tokens, text: &str, raw| {
        let (_, content, reason, num) =
            stopped_reply(assembler(&["ab", "b."], raw).min_tokens(min_tokens), text);
        (content, reason == StopReason::StopString, num)
    };
    for raw in [false, true] {
        assert_eq!(reply(0, "xab.ab", raw), ("x".into(), true, 3));
        assert_eq!(reply(3, "xab.ab", raw), ("x".into(), true, 3));
        // It may begin before.
        assert_eq!(reply(4, "xab.ab", raw), ("xa".into(), true, 4));
        assert_eq!(reply(5, "xab.ab", raw), ("xab.".into(), true, 6));
        assert_eq!(reply(7, "xab.ab", raw), ("xab.ab".into(), false, 6));
    }
}

/// Stop strings that stand in texts of [`reply_text`], alone or over the end of a stretch.
const STOPS: [&str; 12] =
    ["a", ".", "\n", "no ", " so", "o B", "<", "</answer>", "a</answer>", "er>", "<think>", "😀"];

/// The module's documentation of stop strings applied to the whole text at once; also whether one
/// of them ended it.
fn expected_stopped(text: &str, stops: &[&str]) -> (String, String, bool) {
    let (mut segment, mut rest) = (Segment::Plain, text);
    let mut channels = [vec![], vec![]];
    let mut stopped = false;
    while !stopped {
        let next = TAGS.iter().filter_map(|tag| Some((rest.find(tag)?, *tag))).min();
        let stretch = &rest[..next.map_or(rest.len(), |(at, _)| at)];
        let thinks = segment == Segment::Think;
        let mut shown = stretch.trim_start();
        let content: &Vec<&str> = &channels[1];
        let has_content = !content.is_empty();
        if !thinks && has_content && !shown.is_empty() && stops.contains(&"\n") {
            break;
        }
        // The closing tag of an answer may complete a stop string.
        let ends_answer =
            next.is_some_and(|(_, tag)| tag == "</answer>") && (has_content || !shown.is_empty());
        let searched = format!("{shown}{}", if ends_answer { "</answer>" } else { "" });
        let ends = searched.char_indices().map(|(i, c)| i + c.len_utf8());
        let longest = |end: usize| {
            stops.iter().filter(|stop| searched[..end].ends_with(*stop)).map(|stop| stop.len()).max()
        };
        if !thinks && let Some((end, len)) = ends.filter_map(|end| Some((end, longest(end)?))).next() {
            shown = &shown[..shown.len().min(end - len)];
            stopped = true;
        }
        if !shown.trim().is_empty() {
            channels[usize::from(!thinks)].push(shown.trim());
        }
        let Some((at, tag)) = next.filter(|_| !stopped) else {
            let [think, content] = channels.map(|texts| texts.join("\n"));
            return (think, content, stopped);
        };
        segment = match (tag, segment) {
            ("<think>", _) | ("</answer>", Segment::Think) => Segment::Think,
            _ => Segment::Answer,
        };
        rest = &rest[at + tag.len()..];
    }
    let [think, content] = channels.map(|texts| texts.join("\n"));
    (think, content, true)
}

proptest! {
    #[test]
    fn a_stop_string_cuts_the_content_wherever_tokens_end(
        text in reply_text(),
        stops in proptest::collection::vec(proptest::sample::select(STOPS.to_vec()), 1..4),
        lengths in proptest::collection::vec(1usize..9, 1..6),
    ) {
        let pieces = cut(text.as_bytes(), &lengths);
        let reply = collect(events(assembler(&stops, false), pieces, StopReason::EndOfSequence));
        let (think, content, stopped) = expected_stopped(&text, &stops);
        prop_assert_eq!((&reply.think, &reply.content), (&think, &content), "{:?}", stops);
        prop_assert_eq!(reply.reason == StopReason::StopString, stopped);
        // The thinking before it is that of the whole reply.
        prop_assert!(expected(&text).0.starts_with(&reply.think));
    }
}
