//! Reads the tokenizer files of a checkpoint and assembles Qwen2's byte-level BPE from them.
//!
//! Called by [`super::tokenizer`] when a model is loaded; knows file formats, never text.

use std::{collections::HashMap, io, path::Path};

use serde::Deserialize;
use tokenizers::{
    AddedToken, SplitDelimiterBehavior,
    models::bpe::{BPE, Merges, Vocab},
    normalizers::NFC,
    pre_tokenizers::{
        byte_level::ByteLevel,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

use super::PromptError;

/// The end token of a checkpoint whose `tokenizer_config.json` names none.
pub(super) const DEFAULT_END_OF_TEXT: &str = "<|endoftext|>";

/// Largest tokenizer file that is read: Qwen2.5's own tokenizer.json has 7 MB.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// Qwen2's words: contractions, letters with one leading mark, single digits, marks, line ends, spaces.
const SPLIT_PATTERN: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Bytes of every id (`None`: special, or a hole), and the ids of the special tokens by content.
pub(super) type TokenTables = (Vec<Option<Box<[u8]>>>, HashMap<String, u32>);

fn load_error(file: &str, error: impl std::fmt::Display) -> PromptError {
    PromptError::Load(format!("{file}: {error}"))
}

/// A file's bytes, or `None` when there is no such file.
pub(super) fn read_optional(dir: &Path, name: &str) -> Result<Option<Vec<u8>>, PromptError> {
    let path = dir.join(name);
    match std::fs::metadata(&path) {
        Ok(metadata) if metadata.len() > MAX_FILE_BYTES => {
            Err(load_error(name, format!("larger than {MAX_FILE_BYTES} bytes")))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        _ => std::fs::read(&path).map(Some).map_err(|error| load_error(name, error)),
    }
}

/// A file's bytes.
pub(super) fn read_required(dir: &Path, name: &str) -> Result<Vec<u8>, PromptError> {
    read_optional(dir, name)?.ok_or_else(|| {
        load_error(
            name,
            format!(
                "not in {}; a checkpoint has tokenizer.json, or vocab.json and merges.txt",
                dir.display()
            ),
        )
    })
}

/// The parts of `tokenizer_config.json` that are used.
#[derive(Debug, Default, Deserialize)]
struct TokenizerConfig {
    eos_token: Option<TokenName>,
    #[serde(default)]
    added_tokens_decoder: HashMap<u32, AddedToken>,
}

/// A token is written as a string or as an object.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum TokenName {
    Content(String),
    Token { content: String },
}

fn parse_config(tokenizer_config: Option<&[u8]>) -> Result<TokenizerConfig, PromptError> {
    tokenizer_config.map_or_else(
        || Ok(TokenizerConfig::default()),
        |bytes| serde_json::from_slice(bytes).map_err(|error| load_error("tokenizer_config.json", error)),
    )
}

/// The content of the end token.
pub(super) fn end_of_text(tokenizer_config: Option<&[u8]>) -> Result<String, PromptError> {
    Ok(match parse_config(tokenizer_config)?.eos_token {
        Some(TokenName::Content(content) | TokenName::Token { content }) => content,
        None => DEFAULT_END_OF_TEXT.to_owned(),
    })
}

/// What `Qwen2Tokenizer` computes, from its own files.
pub(super) fn from_vocab_and_merges(
    vocab: &[u8],
    merges: &[u8],
    added_tokens: Option<&[u8]>,
    tokenizer_config: Option<&[u8]>,
) -> Result<tokenizers::Tokenizer, PromptError> {
    let vocab: Vocab = serde_json::from_slice(vocab).map_err(|error| load_error("vocab.json", error))?;
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, parse_merges(merges)?)
        .build()
        .map_err(|error| load_error("merges.txt", error))?;
    let split =
        Split::new(SplitPattern::Regex(SPLIT_PATTERN.to_owned()), SplitDelimiterBehavior::Isolated, false)
            .expect("the split pattern is valid: this is a bug");
    let mut tokenizer = tokenizers::Tokenizer::new(bpe);
    tokenizer.with_normalizer(Some(NFC));
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![
        split.into(),
        ByteLevel::new(false, false, false).into(),
    ])));
    for (id, token) in added_tokens_by_id(added_tokens, tokenizer_config)? {
        let content = token.content.clone();
        tokenizer.add_tokens(&[token]);
        // The library numbers new tokens itself; a file with a hole would silently get other ids.
        if tokenizer.token_to_id(&content) != Some(id) {
            return Err(load_error("added_tokens.json", format!("the id {id} of {content} leaves a gap")));
        }
    }
    Ok(tokenizer)
}

/// Lines of two tokens, the first line being a comment.
fn parse_merges(merges: &[u8]) -> Result<Merges, PromptError> {
    let text = std::str::from_utf8(merges).map_err(|error| load_error("merges.txt", error))?;
    text.lines()
        .enumerate()
        .filter(|(_, line)| !line.is_empty() && !line.starts_with("#version"))
        .map(|(number, line)| {
            let (left, right) = line
                .split_once(' ')
                .filter(|(_, right)| !right.contains(' '))
                .ok_or_else(|| load_error("merges.txt", format!("line {} is not a pair", number + 1)))?;
            Ok((left.to_owned(), right.to_owned()))
        })
        .collect()
}

/// Added tokens in the order of their ids. One that only `added_tokens.json` knows counts as special.
fn added_tokens_by_id(
    added_tokens: Option<&[u8]>,
    tokenizer_config: Option<&[u8]>,
) -> Result<Vec<(u32, AddedToken)>, PromptError> {
    let mut tokens = parse_config(tokenizer_config)?.added_tokens_decoder;
    if let Some(bytes) = added_tokens {
        let ids: HashMap<String, u32> =
            serde_json::from_slice(bytes).map_err(|error| load_error("added_tokens.json", error))?;
        for (content, id) in ids {
            tokens.entry(id).or_insert_with(|| AddedToken::from(content, true));
        }
    }
    let mut tokens: Vec<_> = tokens.into_iter().collect();
    tokens.sort_by_key(|(id, _)| *id);
    Ok(tokens)
}

/// Bytes of each token, and the special ones by content.
pub(super) fn token_tables(tokenizer: &tokenizers::Tokenizer) -> Result<TokenTables, PromptError> {
    let added = tokenizer.get_added_tokens_decoder();
    let vocab = tokenizer.get_vocab(true);
    let size = vocab.values().max().map_or(0, |&id| id as usize + 1);
    if size > vocab.len().saturating_mul(2) + 1024 {
        return Err(PromptError::Load(format!("{} tokens have ids up to {size}", vocab.len())));
    }
    let bytes_of = byte_alphabet();
    let mut table = vec![None; size];
    let mut special = HashMap::new();
    for (content, id) in vocab {
        table[id as usize] = match added.get(&id) {
            Some(token) if token.special => {
                special.insert(content, id);
                None
            }
            Some(_) => Some(content.into_bytes().into_boxed_slice()),
            None => {
                let bytes: Option<Vec<u8>> = content.chars().map(|c| bytes_of.get(&c).copied()).collect();
                let bytes = bytes.ok_or_else(|| {
                    PromptError::Load(format!("token {id} ({content:?}) is not byte-level BPE's"))
                })?;
                Some(bytes.into_boxed_slice())
            }
        };
    }
    Ok((table, special))
}

/// Byte-level BPE writes every byte as one printable character: printable Latin-1 as itself, the others,
/// in order, from U+0100 on.
fn byte_alphabet() -> HashMap<char, u8> {
    let mut next = 0x100;
    (0..=u8::MAX)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => (char::from(byte), byte),
            _ => {
                next += 1;
                (char::from_u32(next - 1).expect("U+0100..U+0144 are characters: this is a bug"), byte)
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCAB: &[u8] = br#"{"a": 0, "b": 1, "ab": 2}"#;

    fn message(result: Result<tokenizers::Tokenizer, PromptError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn every_byte_has_one_character() {
        let alphabet = byte_alphabet();
        let library: std::collections::HashSet<char> = ByteLevel::alphabet().into_iter().collect();
        assert_eq!(alphabet.len(), 256);
        assert_eq!(alphabet.keys().copied().collect::<std::collections::HashSet<_>>(), library);
        assert_eq!(
            (alphabet[&'Ġ'], alphabet[&'Ċ'], alphabet[&'Ń'], alphabet[&'é']),
            (b' ', b'\n', 0xad, 0xe9)
        );
    }

    #[test]
    fn broken_files_are_named() {
        assert!(message(from_vocab_and_merges(b"[]", b"", None, None)).contains("vocab.json"));
        assert!(message(from_vocab_and_merges(VOCAB, b"a b c", None, None)).contains("merges.txt: line 1"));
        assert!(message(from_vocab_and_merges(VOCAB, b"a z", None, None)).contains("merges.txt"));
        assert!(message(from_vocab_and_merges(VOCAB, &[0xff], None, None)).contains("merges.txt"));
        let gap = from_vocab_and_merges(VOCAB, b"a b", Some(br#"{"<|x|>": 9}"#), None);
        assert!(message(gap).contains("added_tokens.json: the id 9 of <|x|>"));
        let config = from_vocab_and_merges(VOCAB, b"a b", None, Some(b"{"));
        assert!(message(config).contains("tokenizer_config.json"));
    }

    #[test]
    fn a_token_only_added_tokens_knows_is_special() {
        let bpe =
            from_vocab_and_merges(VOCAB, b"#version: 0.2\na b\n", Some(br#"{"<|x|>": 3}"#), None).unwrap();
        let (bytes, special) = token_tables(&bpe).unwrap();
        assert_eq!(special, HashMap::from([("<|x|>".to_owned(), 3)]));
        assert_eq!(bytes[2].as_deref(), Some(&b"ab"[..]));
        assert_eq!(bytes[3], None);
    }

    #[test]
    fn the_end_token_is_a_string_or_an_object() {
        assert_eq!(end_of_text(None).unwrap(), "<|endoftext|>");
        assert_eq!(end_of_text(Some(br#"{"eos_token": "<e>"}"#)).unwrap(), "<e>");
        assert_eq!(end_of_text(Some(br#"{"eos_token": {"content": "<e>"}}"#)).unwrap(), "<e>");
        assert_eq!(end_of_text(Some(br#"{"eos_token": null}"#)).unwrap(), "<|endoftext|>");
    }
}
