//! The options of a multiple-choice question: which there are, which one an answer means, which tokens spell them.
//!
//! Used by `http` and [`super::answer`]. The rules of extraction are those of the paper's scripts.

use crate::{prompt::Tokenizer, scheduler::TokenId};

/// Letters from A on, two or more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    letters: Vec<char>,
}

impl Default for Options {
    /// A to D.
    fn default() -> Self {
        Options { letters: ('A'..='D').collect() }
    }
}

impl Options {
    /// The options of `question`: lines that begin with "A.", "A:", "A)" or "(A)", then B, and so on; `None` when there
    /// are not at least two.
    pub fn of_question(question: &str) -> Option<Self> {
        let mut letters = Vec::new();
        for line in question.lines() {
            // At most 26: no letter follows Z.
            let next = (b'A' + letters.len() as u8) as char;
            if option_letter(line.trim_start()) == Some(next) {
                letters.push(next);
            }
        }
        (letters.len() > 1).then_some(Options { letters })
    }

    /// The option that `text` means: its first character in either case, else the first option that stands in it as
    /// "(X)" or "(x)". Text that is not `tagged` as an answer may be any sentence: there the first letter must stand alone.
    pub fn letter_of(&self, text: &str, tagged: bool) -> Option<char> {
        let mut characters = text.chars();
        let first = characters.next()?.to_ascii_uppercase();
        let stands_alone = characters.next().is_none_or(|next| ".:),\n".contains(next));
        if self.letters.contains(&first) && (tagged || stands_alone) {
            return Some(first);
        }
        let in_brackets = |letter: char| {
            text.contains(&format!("({letter})"))
                || text.contains(&format!("({})", letter.to_ascii_lowercase()))
        };
        self.letters.iter().copied().find(|&letter| in_brackets(letter))
    }
}

/// The letter of a line that is an option.
fn option_letter(line: &str) -> Option<char> {
    let (line, opened) = line.strip_prefix('(').map_or((line, false), |rest| (rest, true));
    let mut characters = line.chars();
    let letter = characters.next().filter(char::is_ascii_uppercase)?;
    let mark = characters.next()?;
    let marks = if opened { ")" } else { ".:)" };
    marks.contains(mark).then_some(letter)
}

/// A token that spells an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Spelling {
    id: TokenId,
    /// Which of the letters.
    letter: usize,
    /// Whether it also closes the tag before the answer: `>C`.
    closes_tag: bool,
}

/// The letters of a question as tokens, so that their probabilities can be asked for.
#[derive(Debug, Clone)]
pub struct WatchedLetters {
    letters: Vec<char>,
    spellings: Vec<Spelling>,
}

impl WatchedLetters {
    /// Looks through the whole vocabulary: some milliseconds, for the blocking pool. The tokens of a letter X are "X",
    /// " X" and ">X", also with punctuation behind the letter, as far as they exist.
    pub fn new(options: &Options, tokenizer: &Tokenizer) -> Self {
        let letters = options.letters.clone();
        let mut spellings = Vec::new();
        for id in 0..tokenizer.vocab_size() as TokenId {
            let Some(bytes) = tokenizer.token_bytes(id) else { continue };
            let (bytes, closes_tag) = bytes.strip_prefix(b">").map_or((bytes, false), |rest| (rest, true));
            if let Some(letter) = spelled(bytes).and_then(|letter| letters.iter().position(|&l| l == letter))
            {
                spellings.push(Spelling { id, letter, closes_tag });
            }
        }
        WatchedLetters { letters, spellings }
    }

    /// The tokens to watch.
    pub fn token_ids(&self) -> Vec<TokenId> {
        self.spellings.iter().map(|spelling| spelling.id).collect()
    }

    /// Log probability of each letter, from those of [`Self::token_ids`] at the step that wrote the first character of
    /// the answer. `tag_bytes` of the chosen token belonged to the tag before it: spellings that do not close the tag
    /// where that one did are no way to begin the answer. `None` when no spelling fits.
    pub fn option_logprobs(&self, watched: &[f32], tag_bytes: usize) -> Option<Vec<(char, f32)>> {
        if tag_bytes > 1 || watched.len() != self.spellings.len() {
            return None;
        }
        let mut sums = vec![0f64; self.letters.len()];
        for (spelling, &logprob) in self.spellings.iter().zip(watched) {
            if spelling.closes_tag == (tag_bytes == 1) {
                sums[spelling.letter] += f64::from(logprob).exp();
            }
        }
        let fits = sums.iter().any(|&sum| sum > 0.0);
        fits.then(|| self.letters.iter().zip(sums).map(|(&letter, sum)| (letter, sum.ln() as f32)).collect())
    }
}

/// The letter that a token spells: perhaps white space, the letter, perhaps punctuation.
fn spelled(bytes: &[u8]) -> Option<char> {
    let text = bytes.trim_ascii_start();
    let (&letter, rest) = text.split_first()?;
    let is_option = letter.is_ascii_uppercase() && rest.first().is_none_or(|next| b".:),<\n".contains(next));
    is_option.then_some(letter as char)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(letters: &str) -> Options {
        Options { letters: letters.chars().collect() }
    }

    #[test]
    fn options_are_lines_in_order_from_a() {
        for (question, letters) in [
            ("What?\nA. drop\nB. sit\nC. pick", Some("ABC")),
            ("What?\nOptions:\n  A: drop\nB: sit", Some("AB")),
            ("What?\n(A) drop\n(B) sit", Some("AB")),
            ("What?\nA) drop\nB) sit\nD) skip", Some("AB")),
            ("A. only one", None),
            ("A person sits.\nBoth do.", None),
            ("B. first\nC. second", None),
            ("", None),
        ] {
            assert_eq!(Options::of_question(question), letters.map(options), "{question}");
        }
        let many: String = (0..40u8).map(|i| format!("{}. x\n", (b'A' + i % 26) as char)).collect();
        assert_eq!(Options::of_question(&many).unwrap().letters.len(), 26);
    }

    #[test]
    fn an_answer_means_the_option_the_papers_scripts_say() {
        for (text, tagged, letter) in [
            ("C", true, Some('C')),
            ("c. pick up", true, Some('C')),
            ("drop it (B)", true, Some('D')),
            ("it is (b)", true, Some('B')),
            ("(A) and (B)", true, Some('A')),
            ("Eat", true, None),
            ("A person sits", true, Some('A')),
            ("A person sits", false, None),
            ("B) sit", false, Some('B')),
            ("A person sits (C)", false, Some('C')),
            ("", true, None),
        ] {
            assert_eq!(options("ABCD").letter_of(text, tagged), letter, "{text}");
        }
    }

    #[test]
    fn tokens_that_spell_a_letter_are_known_by_their_bytes() {
        for (bytes, letter) in
            [("C", Some('C')), (" C", Some('C')), ("C.", Some('C')), ("Cat", None), ("c", None), (" ", None)]
        {
            assert_eq!(spelled(bytes.as_bytes()), letter, "{bytes:?}");
        }
        let watched = WatchedLetters::new(&options("AB"), &Tokenizer::bytes());
        assert_eq!(watched.token_ids(), [u32::from(b'A'), u32::from(b'B')]);
    }

    #[test]
    fn spellings_of_a_letter_add_up_where_they_fit() {
        let spelling = |id, letter, closes_tag| Spelling { id, letter, closes_tag };
        let watched = WatchedLetters {
            letters: vec!['A', 'B'],
            spellings: vec![
                spelling(1, 0, false),
                spelling(2, 0, false),
                spelling(3, 1, false),
                spelling(4, 1, true),
            ],
        };
        let logprobs = [0.25f32.ln(), 0.125f32.ln(), 0.5f32.ln(), 0.0625f32.ln()];
        let close = |found: Option<Vec<(char, f32)>>, expected: [f32; 2]| {
            let found = found.expect("some spelling fits");
            found.iter().zip(expected).all(|((_, logprob), expected)| (logprob.exp() - expected).abs() < 1e-6)
        };
        assert!(close(watched.option_logprobs(&logprobs, 0), [0.375, 0.5]));
        assert!(close(watched.option_logprobs(&logprobs, 1), [0.0, 0.0625]));
        assert_eq!(watched.option_logprobs(&logprobs, 2), None);
    }
}
