//! Guides alone, driven by random picks: whatever a model says, the reply is well formed and in time.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::prompt::{
    Constraint, Function, Grammar, GrammarCompiler, Tokenizer, call_prefix,
    template::{TAG_END, THINK_CLOSING, THINK_OPENING},
};

/// The end token of the byte tokenizer.
const END: TokenId = 256;

pub(in crate::engine) struct Setup {
    compiler: GrammarCompiler,
    tokenizer: Tokenizer,
}

impl Setup {
    pub(in crate::engine) fn bytes() -> Self {
        let tokenizer = Tokenizer::bytes();
        Setup { compiler: GrammarCompiler::new(&tokenizer).unwrap(), tokenizer }
    }

    /// The tokenizer of the embedded model: tokens of several bytes.
    fn nano() -> Self {
        let read = |name: &str| std::fs::read(format!("models/nano/{name}")).unwrap();
        let (vocab, merges) = (read("vocab.json"), read("merges.txt"));
        let (added, config) = (read("added_tokens.json"), read("tokenizer_config.json"));
        let tokenizer = Tokenizer::from_files(&vocab, &merges, Some(&added), Some(&config)).unwrap();
        Setup { compiler: GrammarCompiler::new(&tokenizer).unwrap(), tokenizer }
    }

    fn end(&self) -> TokenId {
        self.tokenizer.end_of_text()
    }

    fn tokens(&self) -> GuideTokens {
        let (trie, end) = (self.compiler.trie().clone(), self.compiler.end());
        GuideTokens { trie, end, end_token_ids: vec![self.end()] }
    }

    pub(in crate::engine) fn thinking(&self, budget: Option<usize>, end: EndThinking) -> ThinkingGuide {
        ThinkingGuide {
            head: self.compiler.head().unwrap(),
            opening: self.tokenizer.encode(THINK_OPENING).unwrap(),
            closing: self.tokenizer.encode(THINK_CLOSING).unwrap(),
            after_closing: Arc::new(self.tokens().after_tag(TAG_END.as_bytes())),
            budget,
            end,
        }
    }

    fn answer(&self, constraint: &Constraint, thinking: bool) -> AnswerGuide {
        let Grammar { parser, probe, search } = self.compiler.compile(constraint, thinking).unwrap();
        AnswerGuide {
            tokens: self.tokens(),
            parser,
            probe,
            search,
            ends_at_once: thinking,
            num_reserved: None,
        }
    }

    pub(in crate::engine) fn guide(
        &self,
        constraint: &Constraint,
        thinking: bool,
        budget: Option<usize>,
    ) -> Guide {
        let watched = thinking.then(|| self.thinking(budget, EndThinking::default()));
        Guide::new(watched, Some(self.answer(constraint, thinking))).unwrap()
    }

    /// Text of a reply whose tokens are picked by `pick` among those allowed, and whether it came to its end.
    fn run(
        &self,
        guide: &mut Guide,
        max_tokens: usize,
        pick: &mut dyn FnMut(&[TokenId]) -> TokenId,
    ) -> (String, bool) {
        let mut completion = vec![];
        let pick = std::cell::RefCell::new(pick);
        let all: Vec<TokenId> = (0..self.compiler.end()).collect();
        while completion.len() < max_tokens {
            let num_left = max_tokens - completion.len();
            let told = |allowed: Allowed<'_>| match allowed {
                Allowed::All => ("all", vec![]),
                Allowed::Only(token) => ("only", vec![token]),
                Allowed::Mask(mask) => ("mask", mask.as_slice().to_vec()),
                Allowed::MaskAgain(mask) => ("again", mask.as_slice().to_vec()),
            };
            let first_told = told(guide.ask(&completion, num_left));
            let first_asked = std::cell::OnceCell::new();
            let sample = |allowed: Allowed<'_>| {
                first_asked.get_or_init(|| told(allowed));
                match allowed {
                    Allowed::Only(token) => token,
                    Allowed::All => pick.borrow_mut()(&all),
                    Allowed::Mask(mask) | Allowed::MaskAgain(mask) => {
                        let allowed: Vec<TokenId> = mask
                            .iter()
                            .map(|id| id as TokenId)
                            .filter(|&id| id < self.compiler.end())
                            .collect();
                        assert!(
                            !allowed.is_empty(),
                            "nothing is allowed after {:?}",
                            self.tokenizer.decode(&completion)
                        );
                        pick.borrow_mut()(&allowed)
                    }
                }
            };
            let token = guide.choose(&completion, num_left, sample);
            assert_eq!(first_asked.into_inner(), Some(first_told), "what was told before was not asked for");
            if token == self.end() {
                return (self.tokenizer.decode(&completion), true);
            }
            completion.push(token);
            if guide.advance(token) {
                return (self.tokenizer.decode(&completion), true);
            }
        }
        (self.tokenizer.decode(&completion), false)
    }
}

/// Picks that depend on nothing but the seed; now and then a run of the same kind of token.
fn picks(seed: u64) -> impl FnMut(&[TokenId]) -> TokenId {
    let mut state = seed | 1;
    move |allowed| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        allowed[(state >> 11) as usize % allowed.len()]
    }
}

/// What stands in the answer's tags, or after the space of a reply without thinking.
fn answer_of(reply: &str, thinking: bool) -> &str {
    if !thinking {
        return reply.strip_prefix(' ').unwrap();
    }
    assert!(reply.trim_start().starts_with("<think>"), "{reply}");
    let (_, answer) = reply.split_once("<answer>").unwrap_or_else(|| panic!("no answer in {reply:?}"));
    answer.strip_suffix("</answer>").unwrap_or_else(|| panic!("an open answer in {reply:?}"))
}

fn schemas() -> Vec<Value> {
    vec![
        json!({"type": "object"}),
        json!({"type": "object", "properties": {
            "letter": {"enum": ["A", "B", "none of them"]}, "why": {"type": "string"},
            "sure": {"type": "boolean"}, "score": {"type": "number", "minimum": 0, "maximum": 10}},
            "required": ["letter", "why", "score"], "additionalProperties": false}),
        json!({"type": "array", "items": {"type": "integer"}, "minItems": 2}),
        json!({"$defs": {"tree": {"type": "object", "properties": {
            "name": {"type": "string", "minLength": 2}, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
            "required": ["name", "children"], "additionalProperties": false}}, "$ref": "#/$defs/tree"}),
        json!({"anyOf": [{"type": "null"}, {"type": "object", "properties": {"a": {"type": "string", "format": "date"},
            "b": {"type": "array", "items": {"type": "string"}, "minItems": 3}}, "required": ["a", "b"]}]}),
    ]
}

fn satisfies(constraint: &Constraint, answer: &str) -> bool {
    match constraint {
        Constraint::Choice(choices) => choices.iter().any(|choice| choice == answer),
        Constraint::Regex(regex) => {
            let mut regex = llguidance::derivre::Regex::new(regex).unwrap();
            regex.is_match(answer)
        }
        Constraint::Json(_) => serde_json::from_str::<Value>(answer).is_ok(),
        Constraint::Calls(functions) if functions.len() == 1 => serde_json::from_str::<Value>(answer).is_ok(),
        Constraint::Calls(functions) => functions.iter().any(|function| {
            let arguments = answer.strip_prefix(&call_prefix(&function.name));
            let arguments = arguments.and_then(|rest| rest.strip_suffix('}'));
            arguments.is_some_and(|arguments| serde_json::from_str::<Value>(arguments).is_ok())
        }),
        Constraint::Grammar(_) => answer.split(' ').all(|word| word.bytes().all(|b| b.is_ascii_lowercase())),
    }
}

fn constraints() -> impl Strategy<Value = Constraint> {
    prop_oneof![
        proptest::collection::vec("[A-D]|[a-z<>/ ]{1,9}|ü\"\\\\{1,3}", 1..5).prop_map(Constraint::Choice),
        proptest::sample::select(vec![
            r"[A-D]",
            r"[a-z]+@[a-z]+\.com",
            r"\d{3}-\d{4}",
            r".*",
            r"(yes|no)( because [^<]{1,20})?",
            r"é+|ß{2}x",
            r"(?s:.*)</answer>.",
            r"[01]{40}",
        ])
        .prop_map(|regex| Constraint::Regex(regex.into())),
        proptest::sample::select(schemas()).prop_map(Constraint::Json),
        proptest::collection::vec(proptest::sample::select(schemas()), 1..4).prop_map(|schemas| {
            let function = |(i, parameters)| Function { name: format!("call \"{i}\""), parameters };
            Constraint::Calls(schemas.into_iter().enumerate().map(function).collect())
        }),
        Just(Constraint::Grammar("start: word (\" \" word)*\nword: /[a-z]{2,9}/".into())),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any budget that can hold a reply at all does.
    #[test]
    fn a_guided_reply_is_well_formed_under_any_budget(
        constraint in constraints(), seed: u64, thinking: bool, more in 0..120usize, nano: bool,
        budget in proptest::option::of(0..40usize),
    ) {
        let setup = if nano { Setup::nano() } else { Setup::bytes() };
        let mut guide = setup.guide(&constraint, thinking, budget);
        let max_tokens = guide.min_tokens() + more;
        let (reply, _) = setup.run(&mut guide, max_tokens, &mut picks(seed));
        prop_assert!(satisfies(&constraint, answer_of(&reply, thinking)), "{constraint:?}: {reply:?}");
    }
}

#[test]
fn the_thinking_is_closed_when_the_answer_needs_the_rest() {
    let setup = Setup::bytes();
    let constraint = Constraint::Choice(vec!["A".into(), "B".into()]);
    let mut text = " <think>".bytes().chain(std::iter::repeat(b'x')).map(u32::from);
    let mut pick = |allowed: &[TokenId]| match text.next() {
        Some(token) if allowed.contains(&token) => token,
        _ => u32::from(b'B'),
    };
    let (reply, complete) = setup.run(&mut setup.guide(&constraint, true, None), 200, &mut pick);
    assert!(complete && reply.ends_with(&format!("x{THINK_CLOSING}{TAG_END}B</answer>")), "{reply}");
    assert!(reply.len() > 100, "most of the budget is for thinking: {reply}");
}

#[test]
fn a_budget_closes_the_thinking_with_and_without_a_grammar() {
    let setup = Setup::bytes();
    let said = " <think>one two three</think> <answer>free</answer>";
    for budget in [0, 3, 12, 1000] {
        let mut guide = Guide::new(Some(setup.thinking(Some(budget), EndThinking::default())), None).unwrap();
        let mut text = said.bytes().map(u32::from).chain([END]);
        let mut pick = |allowed: &[TokenId]| match allowed {
            [only] => *only,
            _ => text.next().unwrap(),
        };
        let (reply, _) = setup.run(&mut guide, 300, &mut pick);
        let expected = match budget {
            0 => format!("{THINK_OPENING}{THINK_CLOSING}{TAG_END}{said}"),
            // Amid the tag nothing can be closed: it is as soon as it can.
            3 => format!("{THINK_OPENING}{THINK_CLOSING}{TAG_END}{}", &said[8..]),
            12 => format!("{}{THINK_CLOSING}{TAG_END}{}", &said[..12], &said[12..]),
            _ => said.to_owned(),
        };
        assert_eq!(reply, expected);
    }
}

#[test]
fn thinking_ends_on_demand_once() {
    let setup = Setup::bytes();
    let end = EndThinking::default();
    let mut guide = Guide::new(Some(setup.thinking(None, end.clone())), None).unwrap();
    let mut other = guide.clone();
    let mut text = " <think>one two".bytes().map(u32::from).enumerate();
    let (reply, _) = setup.run(&mut guide, 15 + THINK_CLOSING.len(), &mut |_| {
        let (index, token) = text.next().unwrap();
        if index == 10 {
            end.request();
        }
        token
    });
    assert_eq!(reply, format!(" <think>one{THINK_CLOSING} two"));
    let mut rest = "plain".bytes().map(u32::from);
    let (reply, _) = setup.run(&mut other, 60, &mut |_| rest.next().unwrap_or(END));
    assert_eq!(reply, format!("{THINK_OPENING}{THINK_CLOSING}plain"), "it is asked of every sequence");
}

#[test]
fn a_reply_without_tags_is_left_alone() {
    let setup = Setup::bytes();
    let mut guide = Guide::new(Some(setup.thinking(Some(3), EndThinking::default())), None).unwrap();
    let mut text = "no tags, much text".bytes().map(u32::from).chain([END]);
    let (reply, complete) = setup.run(&mut guide, 300, &mut |_| text.next().unwrap());
    assert_eq!((reply.as_str(), complete), ("no tags, much text", true));
}

/// Thirty required fields of all kinds: the search for an end must not drown in them.
#[test]
fn a_large_schema_has_an_end_in_reach() {
    let kinds = [
        json!({"type": "string", "minLength": 3}),
        json!({"enum": ["one", "two", "three"]}),
        json!({"type": "array", "items": {"type": "number"}, "minItems": 2}),
        json!({"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "boolean"}}, "required": ["y"]}),
        json!({"anyOf": [{"type": "null"}, {"type": "string"}]}),
    ];
    let names: Vec<String> = (0..30).map(|index| format!("a field with the number {index}")).collect();
    let fields: serde_json::Map<String, Value> =
        names.iter().zip(kinds.iter().cycle()).map(|(name, kind)| (name.clone(), kind.clone())).collect();
    let schema =
        json!({"type": "object", "properties": fields, "required": names, "additionalProperties": false});
    let (setup, constraint) = (Setup::nano(), Constraint::Json(schema));
    let first = setup.guide(&constraint, true, Some(0));
    for seed in 0..8 {
        let mut guide = first.clone();
        let max_tokens = first.min_tokens() + 20 * seed as usize;
        let (reply, _) = setup.run(&mut guide, max_tokens, &mut picks(seed * 77 + 1));
        let value: Value = serde_json::from_str(answer_of(&reply, true)).unwrap();
        assert_eq!(value.as_object().unwrap().len(), 30);
    }
}

#[test]
fn a_grammar_without_end_is_refused() {
    let setup = Setup::bytes();
    let endless = Constraint::Grammar("start: /.+/".into());
    let guide = |thinking| Guide::new(None, Some(setup.answer(&endless, thinking))).map(drop);
    assert_eq!((guide(true), guide(false)), (Err(NoEnd), Ok(())));
    let huge = setup.answer(&Constraint::Regex("((a{900}){900}){900}".into()), true);
    assert_eq!(Guide::new(None, Some(huge)).map(drop), Err(NoEnd));
    let long = setup.answer(&Constraint::Regex("(ab){300}".into()), false);
    assert_eq!(Guide::new(None, Some(long)).unwrap().min_tokens(), 601);
}
