//! What may follow in a grammar, and the shortest way to its end.
//!
//! Called by [`super::answer`] on the engine thread. Asks a parser "what if" and leaves it as it was. Bounded: a search
//! tries no more than so many bytes, and the lexer has the fuel of one mask for each question.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashSet, VecDeque},
    sync::Mutex,
};

use llguidance::{
    TokenParser,
    derivre::NextByte,
    earley::{BiasComputer, ParserRecognizer},
};
use toktrie::{Recognizer, SimpleVob, TokEnv, TokTrie};

/// Bytes a search tries before a reply is begun, on the blocking pool.
pub(super) const MANY_BYTES: usize = 1 << 20;
/// Bytes a search tries while others wait for their tokens: a few milliseconds.
pub(super) const FEW_BYTES: usize = 1 << 17;
/// Ways on from one lexeme that are looked at.
const MAX_WAYS: usize = 8;
/// Longest end that is looked for.
const MAX_BYTES: usize = 16 << 10;

/// Whether `bytes` may follow, all of them in this order.
pub(super) fn can_follow(parser: &mut TokenParser, bytes: &[u8]) -> bool {
    what_if(parser, |grammar| push_all(grammar, bytes))
}

/// Whether anything but `end` may follow.
pub(super) fn goes_on(parser: &mut TokenParser, end: &[u8]) -> bool {
    what_if(parser, |grammar| {
        (0..=u8::MAX).any(|byte| Some(&byte) != end.first() && grammar.byte_allowed(byte))
    })
}

/// Few bytes that stand between `prefix`, which is to follow, and `end`, which is left out: the fewest where the grammar is
/// small enough to tell.
/// `None` when `prefix` may not follow or the search was given up after `max_tries` bytes.
pub(super) fn shortest(
    parser: &mut TokenParser,
    prefix: &[u8],
    end: &[u8],
    max_tries: usize,
) -> Option<Vec<u8>> {
    what_if(parser, |grammar| {
        if !push_all(grammar, prefix) {
            return None;
        }
        let mut search = Search::new(grammar, end, max_tries / 2);
        let found = search.shortest();
        if found.is_some() || search.tries_left > 0 {
            return found;
        }
        // Too many ways to compare them all.
        grammar.trie_finished();
        grammar.trie_started("what if, in short");
        push_all(grammar, prefix);
        Search::new(grammar, end, max_tries / 2).short()
    })
}

/// The answer of `ask`, for which everything it pushes is taken back.
fn what_if<T, F>(parser: &mut TokenParser, ask: F) -> T
where
    T: Default + Send,
    F: FnOnce(&mut ParserRecognizer<'_>) -> T + Send,
{
    let question = Question {
        ask: Mutex::new(Some(ask)),
        answer: Mutex::default(),
        environment: parser.token_env.clone(),
    };
    // Any start but an empty one: that is answered from the mask of before.
    parser.parser.compute_bias(&question, b"?");
    question.answer.into_inner().unwrap_or_default()
}

/// Goes where llguidance computes masks: there the lexer gets its fuel, and the table of the parser its limits.
struct Question<F, T> {
    ask: Mutex<Option<F>>,
    answer: Mutex<T>,
    environment: TokEnv,
}

impl<F, T> BiasComputer for Question<F, T>
where
    T: Send,
    F: FnOnce(&mut ParserRecognizer<'_>) -> T + Send,
{
    fn compute_bias(&self, grammar: &mut ParserRecognizer<'_>, _: &[u8]) -> SimpleVob {
        if let Some(ask) = self.ask.lock().ok().and_then(|mut ask| ask.take()) {
            grammar.trie_started("what if");
            let answer = ask(grammar);
            grammar.trie_finished();
            if let Ok(mut place) = self.answer.lock() {
                *place = answer;
            }
        }
        self.trie().alloc_token_set()
    }

    fn trie(&self) -> &TokTrie {
        self.environment.tok_trie()
    }
}

fn push_all(grammar: &mut ParserRecognizer<'_>, bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| grammar.try_push_byte(byte))
}

/// A place of the grammar, by the bytes that lead there; the fewest come first.
#[derive(Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Node {
    num_bytes: usize,
    path: Vec<u8>,
    /// Lexemes begun on the way.
    rows: usize,
}

/// A search over the bytes. Two ways that begin as many lexemes and stand in the same state of the lexer count as
/// the same place: that keeps it small, for most bytes of a string, a name or a number lead back to where they came from.
struct Search<'a, 'p> {
    grammar: &'a mut ParserRecognizer<'p>,
    end: &'a [u8],
    seen: HashSet<(u32, usize)>,
    open: BinaryHeap<Reverse<Node>>,
    tries_left: usize,
}

impl<'a, 'p> Search<'a, 'p> {
    fn new(grammar: &'a mut ParserRecognizer<'p>, end: &'a [u8], tries_left: usize) -> Self {
        let open = BinaryHeap::from([Reverse(Node::default())]);
        Search { grammar, end, seen: HashSet::new(), open, tries_left }
    }

    /// Dijkstra's: the fewest bytes.
    fn shortest(&mut self) -> Option<Vec<u8>> {
        while self.tries_left > 0 {
            let Reverse(mut node) = self.open.pop()?;
            self.tries_left = self.tries_left.saturating_sub(node.path.len());
            if !push_all(self.grammar, &node.path) {
                return None;
            }
            // Along what is forced without a detour over the queue.
            while !self.at_end() {
                match self.successors(&node).as_mut_slice() {
                    [only] if self.open.peek().is_none_or(|Reverse(next)| *next >= *only) => {
                        node = std::mem::take(only);
                        let last = node.path.last().copied();
                        if !last.is_some_and(|byte| self.grammar.try_push_byte(byte)) {
                            return None;
                        }
                    }
                    many => {
                        self.open.extend(many.iter_mut().map(std::mem::take).map(Reverse));
                        break;
                    }
                }
            }
            if self.at_end() {
                return Some(node.path);
            }
            self.grammar.pop_bytes(node.path.len());
        }
        None
    }

    /// Depth first, lexeme by lexeme, each by its fewest bytes: soon at an end, if not at the nearest.
    fn short(&mut self) -> Option<Vec<u8>> {
        let mut path = Vec::new();
        // Ways on from each lexeme of the path, the best last, and the path's length there.
        let mut ways = vec![(0, self.lexemes(&Node::default())?)];
        while self.tries_left > 0 {
            let (num_bytes, nodes) = ways.last_mut()?;
            self.grammar.pop_bytes(path.len() - *num_bytes);
            path.truncate(*num_bytes);
            let Some(node) = nodes.pop() else {
                ways.pop();
                continue;
            };
            if !push_all(self.grammar, &node.path) {
                return None;
            }
            path.extend_from_slice(&node.path);
            if self.at_end() {
                return Some(path);
            }
            if path.len() < MAX_BYTES {
                let here = Node { rows: node.rows, ..Node::default() };
                let next = self.lexemes(&here)?;
                ways.push((path.len(), next));
            }
        }
        None
    }

    /// Ways to begin the next lexeme, or to the end, the best last. `None` when there are too many to look at.
    fn lexemes(&mut self, from: &Node) -> Option<Vec<Node>> {
        let mut within = VecDeque::from([Node { rows: from.rows, ..Node::default() }]);
        let mut found = Vec::new();
        while let Some(node) = within.pop_front().filter(|_| found.len() < MAX_WAYS) {
            self.tries_left = self.tries_left.checked_sub(node.path.len())?;
            if !push_all(self.grammar, &node.path) {
                return None;
            }
            if node.num_bytes > 0 && self.at_end() {
                found.push(node);
                self.grammar.pop_bytes(found[found.len() - 1].num_bytes);
                break;
            }
            let (same, next): (Vec<_>, Vec<_>) =
                self.successors(&node).into_iter().partition(|next| next.rows == node.rows);
            self.grammar.pop_bytes(node.num_bytes);
            within.extend(same);
            found.extend(next);
        }
        found.sort_by_key(|node| Reverse((node.num_bytes, !closes(node))));
        Some(found)
    }

    fn at_end(&mut self) -> bool {
        let mut pushed = 0;
        let fits = self.end.iter().all(|&byte| {
            let fits = self.grammar.try_push_byte(byte);
            pushed += usize::from(fits);
            fits
        });
        self.grammar.pop_bytes(pushed);
        fits
    }

    /// Places not seen before. White space and unprintable bytes lead on only where nothing else does.
    fn successors(&mut self, node: &Node) -> Vec<Node> {
        if node.path.len() >= MAX_BYTES || self.tries_left == 0 {
            return Vec::new();
        }
        let (mut found, mut any) = (Vec::new(), false);
        let state = self.grammar.lexer_state();
        // The lexer does not answer where a lexeme may be over by its own word (`lazy`, `stop`).
        if !state.has_lowest_match()
            && let NextByte::ForcedByte(byte) = self.grammar.lexer_mut().next_byte(state)
        {
            self.try_byte(node, byte, &mut found);
            return found;
        }
        for byte in b'!'..=b'~' {
            any |= self.try_byte(node, byte, &mut found);
        }
        if !any {
            for byte in (0..=b' ').chain(0x7f..0xff) {
                self.try_byte(node, byte, &mut found);
            }
        }
        found
    }

    fn try_byte(&mut self, node: &Node, byte: u8, found: &mut Vec<Node>) -> bool {
        self.tries_left = self.tries_left.saturating_sub(1);
        let before = num_rows(self.grammar);
        if !self.grammar.try_push_byte(byte) {
            return false;
        }
        let rows = node.rows + (num_rows(self.grammar) - before);
        let place = (self.grammar.lexer_state().as_u32(), rows);
        self.grammar.pop_bytes(1);
        if self.seen.insert(place) {
            let path = [node.path.as_slice(), &[byte]].concat();
            found.push(Node { num_bytes: path.len(), path, rows });
        }
        true
    }
}

/// Whether a way ends in what ends something in most notations.
fn closes(node: &Node) -> bool {
    node.path.last().is_some_and(|last| b"}])>\"';".contains(last))
}

/// Grows with every lexeme begun, new or known.
fn num_rows(grammar: &mut ParserRecognizer<'_>) -> usize {
    let stats = grammar.stats_mut();
    stats.rows + stats.cached_rows
}
