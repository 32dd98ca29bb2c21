//! From what a request says about its answer to a grammar of the whole reply, thinking and tags included.
//!
//! Called by `http/guide.rs` when a model is loaded and, on the blocking pool, for each guided request. What comes out
//! speaks tokens only. The effort has limits: llguidance's own, on the size of a grammar and the fuel of its lexer.

use std::sync::Arc;

use llguidance::{
    Logger, ParserFactory, TokenParser,
    api::{GrammarInit, GrammarWithLexer, ParserLimits, TopLevelGrammar},
    earley::SlicedBiasComputer,
    regex_to_lark,
};
use serde_json::{Value, json};
use toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

use super::{PromptError, Tokenizer};

/// The end of a reply in grammars: a token that no model has and no text spells.
const END: &str = "<|end_of_reply|>";
/// A reply up to its answer. The thinking is any text; a model that forgets to close it may answer all the same.
const HEAD: &str = r#"
THOUGHT: /(?s:.*)/ & ~/(?s:.*)(<\/think>|<answer>)(?s:.*)/
HEAD: /[ \n]{0,2}<think>/ THOUGHT /(<\/think>[ \n]{0,3})?<answer>/
"#;
/// Between the parts of JSON: a space, or a line end and what indents the next line.
const JSON_SPACE: &str = r"\x20|\x0A\x20{0,16}";
/// Fuel for building the lexer of a grammar (llguidance: 50,000 take about a millisecond).
const MAX_LEXER_FUEL: u64 = 500_000;
/// Symbols of a grammar's rules.
const MAX_GRAMMAR_SYMBOLS: usize = 100_000;
/// States of a grammar's lexer, one or two kilobytes each.
const MAX_LEXER_STATES: usize = 20_000;

/// Items of the parser, and fuel of its lexer, that the search for an end may take before the reply begins.
const MAX_SEARCH_ITEMS: usize = 4_000_000;
const MAX_SEARCH_FUEL: u64 = 1_000_000;
/// The same for a question while others wait for their tokens; a mask has llguidance's own limits.
const MAX_STEP_ITEMS: usize = 200_000;
const MAX_STEP_FUEL: u64 = 200_000;

/// What an answer must be.
#[derive(Debug, Clone, PartialEq)]
pub enum Constraint {
    /// One of these texts.
    Choice(Vec<String>),
    /// A text that the regular expression matches as a whole.
    Regex(String),
    /// JSON that satisfies the schema.
    Json(Value),
    /// A text of the Lark grammar.
    Grammar(String),
    /// The arguments of a function, or, of several functions, a call of one of them:
    /// [`call_prefix`], its arguments and `}`.
    Calls(Vec<Function>),
}

/// A function that an answer may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Function {
    pub name: String,
    /// JSON schema of its arguments.
    pub parameters: Value,
}

/// Returns the text of a call of one of several functions up to its arguments.
pub fn call_prefix(name: &str) -> String {
    format!("{{\"name\": {}, \"arguments\": ", Value::from(name))
}

/// Why there is no grammar for a constraint; one sentence, after the name of the field.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct GrammarError(String);

/// The grammar of a reply, three times: a parser keeps what it has learnt of its grammar.
pub struct Grammar {
    /// For the masks.
    pub parser: TokenParser,
    /// For questions between two tokens.
    pub probe: TokenParser,
    /// For the search before the reply begins, which may cost more.
    pub search: TokenParser,
}

/// Makes the grammars of one model.
pub struct GrammarCompiler {
    factory: ParserFactory,
    trie: Arc<TokTrie>,
    end: u32,
}

impl GrammarCompiler {
    /// Reads the vocabulary; takes some tenths of a second for a large one.
    ///
    /// # Errors
    /// [`PromptError::Load`] when the vocabulary cannot be used for grammars.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, PromptError> {
        let end = u32::try_from(tokenizer.vocab_size())
            .map_err(|_| PromptError::Load("the vocabulary is too large for grammars".into()))?;
        // Special tokens get no bytes: no grammar can ask for them.
        let mut words: Vec<Vec<u8>> =
            (0..end).map(|id| tokenizer.token_bytes(id).unwrap_or_default().to_vec()).collect();
        words.push([&[TokTrie::SPECIAL_TOKEN_MARKER], END.as_bytes()].concat());
        let trie = TokTrie::from(&TokRxInfo::new(end + 1, tokenizer.end_of_text()), &words);
        // Not "canonical": the model chooses how a text is cut into tokens, also where only one text is possible.
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie.clone()));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
            .map_err(|error| PromptError::Load(format!("the vocabulary is not fit for grammars: {error}")))?;
        let limits = factory.limits_mut();
        limits.verbose_errors = false;
        limits.initial_lexer_fuel = MAX_LEXER_FUEL;
        limits.max_grammar_size = MAX_GRAMMAR_SYMBOLS;
        limits.max_lexer_states = MAX_LEXER_STATES;
        Ok(GrammarCompiler { factory, trie: Arc::new(trie), end })
    }

    /// Bytes of every token; the last one is [`Self::end`].
    pub fn trie(&self) -> &Arc<TokTrie> {
        &self.trie
    }

    /// The token that ends a grammar.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// Accepts a reply up to and with the tag that opens its answer.
    ///
    /// # Errors
    /// None for a vocabulary that has every byte.
    pub fn head(&self) -> Result<TokenParser, GrammarError> {
        let head = vec![GrammarWithLexer::from_lark(format!("start: HEAD\n{HEAD}"))];
        self.parser(head, self.factory.limits().clone())
    }

    /// Accepts whole replies, and then [`Self::end`]. With `thinking`, the answer stands in its tags after the thinking;
    /// without, it is all of the reply but one space before it, for the prompt ends without one.
    ///
    /// # Errors
    /// When the constraint is malformed, is not supported, or is too much.
    pub fn compile(&self, constraint: &Constraint, thinking: bool) -> Result<Grammar, GrammarError> {
        let json = |schema| Ok::<_, GrammarError>(GrammarWithLexer::from_json_schema(with_space(schema)?));
        // Grammars that the rule of an answer names, or a terminal that is all of it.
        let (mut terminal, mut nested, mut rule) = (None, vec![], "@answer0".to_owned());
        match constraint {
            Constraint::Choice(choices) => {
                let choices = choices.iter().map(|choice| literal(choice));
                terminal = Some(choices.collect::<Vec<_>>().join(" | "));
            }
            Constraint::Regex(regex) => {
                self.check_regex(regex)?;
                terminal = Some(format!("/{}/", regex_to_lark(regex, "")));
            }
            Constraint::Json(schema) => nested.push(json(schema)?),
            Constraint::Grammar(grammar) if grammar.contains(END) => {
                return Err(GrammarError(format!("{END} has no place in an answer")));
            }
            Constraint::Grammar(grammar) => nested.push(GrammarWithLexer::from_lark(grammar.clone())),
            Constraint::Calls(functions) => {
                for function in functions {
                    nested.push(json(&function.parameters)?);
                }
                if functions.len() > 1 {
                    rule = format!("({})", calls(functions));
                }
            }
        }
        let (before, after, head) =
            if thinking { ("HEAD", r#""</answer>""#, HEAD) } else { ("\" \"", "", "") };
        // A terminal and the tags are one: else its longest match would take the tag in.
        let reply = match &terminal {
            Some(terminal) => {
                format!("start: REPLY {END}\nANSWER: {terminal}\nREPLY: {before} ANSWER {after}\n{head}")
            }
            None => format!("start: {before} {rule} {after} {END}\n{head}"),
        };
        let mut grammars = vec![GrammarWithLexer::from_lark(reply)];
        let named = |(index, grammar)| GrammarWithLexer { name: Some(format!("answer{index}")), ..grammar };
        grammars.extend(nested.into_iter().enumerate().map(named));
        let limits = self.factory.limits().clone();
        let parser = self.parser(grammars.clone(), limits.clone())?;
        let lexer = parser.parser.grammar().lexer_spec();
        if lexer.token_range_lexemes(&lexer.all_lexemes()).len() > 1 {
            return Err(GrammarError("special tokens have no place in an answer".into()));
        }
        let limited = |step_max_items, step_lexer_fuel| {
            let limits = ParserLimits { step_max_items, step_lexer_fuel, ..limits.clone() };
            self.parser(grammars.clone(), limits)
        };
        let (probe, search) =
            (limited(MAX_STEP_ITEMS, MAX_STEP_FUEL)?, limited(MAX_SEARCH_ITEMS, MAX_SEARCH_FUEL)?);
        Ok(Grammar { parser, probe, search })
    }

    /// Alone first: a stray parenthesis must not change the meaning of what stands around the expression.
    fn check_regex(&self, regex: &str) -> Result<(), GrammarError> {
        if regex.is_empty() {
            return Err(GrammarError(
                "an empty regular expression matches nothing but an empty answer".into(),
            ));
        }
        let alone = vec![GrammarWithLexer::from_regex(regex)];
        self.parser(alone, self.factory.limits().clone()).map(drop)
    }

    fn parser(
        &self,
        grammars: Vec<GrammarWithLexer>,
        limits: ParserLimits,
    ) -> Result<TokenParser, GrammarError> {
        let grammar = GrammarInit::Serialized(TopLevelGrammar { grammars, max_tokens: None });
        let (silent, plain) = (Logger::new(0, 0), InferenceCapabilities::default());
        let parser = self.factory.create_parser_from_init_ext(grammar, silent, plain, limits);
        let mut parser = parser.map_err(|error| GrammarError(first_line(&error.to_string())))?;
        parser.start_without_prompt();
        Ok(parser)
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grammar")
    }
}

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GrammarCompiler({} tokens)", self.end)
    }
}

/// A text in Lark's syntax: JSON's, but for one character.
fn literal(text: &str) -> String {
    Value::from(text).to_string().replace('\x7f', "\\u007f")
}

/// Alternatives of a rule: a call of each function.
fn calls(functions: &[Function]) -> String {
    let call = |(index, function): (usize, &Function)| {
        format!("{} @answer{index} {}", literal(&call_prefix(&function.name)), literal("}"))
    };
    functions.iter().enumerate().map(call).collect::<Vec<_>>().join(" | ")
}

/// The schema with our white space.
fn with_space(schema: &Value) -> Result<Value, GrammarError> {
    let mut schema = match schema {
        Value::Object(schema) => schema.clone(),
        Value::Bool(true) => serde_json::Map::new(),
        _ => return Err(GrammarError("a JSON schema must be an object".into())),
    };
    let ours = json!({"whitespace_pattern": JSON_SPACE});
    match schema.insert("x-guidance".into(), ours) {
        None => Ok(Value::Object(schema)),
        Some(_) => Err(GrammarError("\"x-guidance\" is not supported; remove it".into())),
    }
}

/// Returns the reason of an error in one line; llguidance adds positions and context over many.
fn first_line(error: &str) -> String {
    const MAX_CHARS: usize = 180;
    // The regex parser shows the pattern first and says what is wrong in its last line.
    if let Some((_, reason)) = error.rsplit_once("\nerror: ") {
        let reason = reason.lines().next().unwrap_or_default();
        return format!("invalid regex: {reason}").chars().take(MAX_CHARS).collect();
    }
    if error.contains("'referencing' feature") {
        return "only references within the schema (#/$defs/…) are supported".into();
    }
    let line = error.lines().find(|line| !line.trim().is_empty()).unwrap_or("not understood");
    line.chars().take(MAX_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether `reply` is a whole one.
    fn accepts(constraint: &Constraint, thinking: bool, reply: &str) -> bool {
        let compiler = GrammarCompiler::new(&Tokenizer::bytes()).unwrap();
        let mut parser = compiler.compile(constraint, thinking).unwrap().parser;
        let end = compiler.end();
        reply.bytes().all(|byte| parser.consume_token(u32::from(byte)).is_ok())
            && parser.compute_mask().is_ok_and(|mask| mask.is_allowed(end))
    }

    fn refused(constraint: Constraint) -> String {
        let compiler = GrammarCompiler::new(&Tokenizer::bytes()).unwrap();
        compiler
            .compile(&constraint, true)
            .err()
            .unwrap_or_else(|| panic!("{constraint:?} is fine"))
            .to_string()
    }

    fn choice() -> Constraint {
        Constraint::Choice(vec!["A".into(), "A or \"B\"/\u{7f}".into(), "</answer>".into()])
    }

    #[test]
    fn the_thinking_is_free_and_the_answer_is_not() {
        let answers = ["A", "A or \"B\"/\u{7f}", "</answer>"];
        for answer in answers {
            for before in
                ["<think></think><answer>", " <think> über\n< </thin </think> <answer>", "<think>x<answer>"]
            {
                assert!(accepts(&choice(), true, &format!("{before}{answer}</answer>")), "{before}{answer}");
            }
            assert!(accepts(&choice(), false, &format!(" {answer}")), "{answer}");
        }
        for reply in [
            "<answer>A</answer>",
            "<think></think><answer>B</answer>",
            "<think></think>A",
            "<think></think>x<answer>A</answer>",
        ] {
            assert!(!accepts(&choice(), true, reply), "{reply}");
        }
    }

    #[test]
    fn a_regex_matches_the_whole_answer_and_may_hold_anything() {
        let regex = Constraint::Regex(r"(a|b/)+.*".into());
        assert!(accepts(&regex, true, "<think></think>\n<answer>ab/a anything </answer></answer>"));
        assert!(!accepts(&regex, true, "<think></think>\n<answer>x</answer>"));
        assert!(accepts(&regex, false, " b/"));
    }

    #[test]
    fn json_and_grammars_stand_between_the_tags() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
        let json = Constraint::Json(schema);
        assert!(accepts(&json, true, "<think></think> <answer>{\"a\":1}</answer>"));
        assert!(accepts(&json, true, "<think></think> <answer>{\n  \"a\": 1\n}</answer>"));
        assert!(!accepts(
            &json,
            true,
            &format!("<think></think> <answer>{{{}\"a\":1}}</answer>", " ".repeat(33))
        ));
        assert!(!accepts(&json, true, "<think></think> <answer>{\"a\":\"1\"}</answer>"));
        let grammar = Constraint::Grammar("start: word (\" \" word)*\nword: /[a-z]+/".into());
        assert!(accepts(&grammar, true, "<think>1</think><answer>two words</answer>"));
        assert!(accepts(&grammar, false, " word"));
        assert!(!accepts(&grammar, false, " 1"));
    }

    #[test]
    fn a_call_is_the_arguments_of_one_function_or_names_one_of_several() {
        let function = |name: &str, property: &str| Function {
            name: name.into(),
            // References of each schema are its own.
            parameters: json!({"type": "object", "properties": {property: {"$ref": "#/$defs/N"}}, "required": [property],
                "additionalProperties": false, "$defs": {"N": {"type": "integer"}}}),
        };
        let one = Constraint::Calls(vec![function("turn", "a")]);
        assert!(accepts(&one, true, "<think></think> <answer>{\"a\":1}</answer>"));
        assert!(accepts(&one, false, " {\"a\": 1}"));
        assert!(!accepts(&one, false, " {\"name\": \"turn\", \"arguments\": {\"a\": 1}}"));
        let two = Constraint::Calls(vec![function("turn", "a"), function("turn \"left\"", "b")]);
        for reply in [
            "{\"name\": \"turn\", \"arguments\": {\"a\": 1}}",
            "{\"name\": \"turn \\\"left\\\"\", \"arguments\": {\"b\":\n2}}",
        ] {
            assert!(accepts(&two, true, &format!("<think></think> <answer>{reply}</answer>")), "{reply}");
            assert!(accepts(&two, false, &format!(" {reply}")), "{reply}");
        }
        assert!(!accepts(&two, false, " {\"name\": \"turn\", \"arguments\": {\"b\": 1}}"));
        assert!(!accepts(&two, false, " {\"a\": 1}"));
    }

    #[test]
    fn what_cannot_be_a_grammar_is_refused_in_one_line() {
        for constraint in [
            Constraint::Regex("a)|(b".into()),
            Constraint::Regex("(".into()),
            Constraint::Regex(String::new()),
            Constraint::Regex("(?=a)b".into()),
            Constraint::Grammar("start: nothing".into()),
            Constraint::Grammar("no grammar at all".into()),
            Constraint::Grammar("start: <|endoftext|>".into()),
            Constraint::Grammar("start: <[256]>".into()),
            Constraint::Grammar("start: \"a\" <|end_of_reply|>".into()),
            Constraint::Json(json!({"type": "nonsense"})),
            Constraint::Json(json!({"$ref": "http://example.com/schema"})),
            Constraint::Json(json!({"x-guidance": {}})),
            Constraint::Json(json!(3)),
            Constraint::Json(json!(false)),
        ] {
            let error = refused(constraint.clone());
            assert!(!error.is_empty() && error.lines().count() == 1, "{constraint:?}: {error}");
        }
    }
}
