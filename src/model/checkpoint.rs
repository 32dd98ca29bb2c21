//! A checkpoint from anywhere: the embedded one, a random one, a directory, or a downloaded repository.
//!
//! Called by `cli` when a model is loaded, and by tests. Everything is checked here, before serving; nothing is
//! computed. Blocking: not for async threads. Never downloads: see [`super::hub`].

use std::{
    borrow::Cow,
    fmt, fs, io,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde_json::Value;
use thiserror::Error;

use super::{
    config::{ConfigError, ModelConfig},
    embedded,
    hub::{Hub, HubError, Repo},
    presets::{Preset, UnknownPreset},
    synth,
    weights::{Weights, WeightsError},
};

/// Largest JSON file of settings that is read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// What `--model` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSpec {
    /// The embedded checkpoint: `nano`.
    Nano,
    /// Random weights, never on disk: `synth:PRESET[:SEED]`.
    Synthetic { preset: Preset, seed: u64 },
    /// An existing directory.
    Directory(PathBuf),
    /// A repository of the hub: `org/name[@revision]`.
    Hub(Repo),
}

/// Why a `--model` names nothing.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum SpecError {
    #[error(
        "{0:?} is no model: give nano, synth:PRESET[:SEED], a checkpoint directory, or a repository like org/name"
    )]
    Unknown(String),
    #[error("there is no directory {0}")]
    NoDirectory(String),
    #[error("{0} is a file: give the directory it is in")]
    NotADirectory(String),
    #[error(transparent)]
    Preset(#[from] UnknownPreset),
    #[error("{0:?} is not a seed: give a whole number, as in synth:small:7")]
    Seed(String),
}

impl ModelSpec {
    /// Reads the argument of `--model`. An existing directory wins over a repository of the same name.
    pub fn parse(text: &str) -> Result<Self, SpecError> {
        if text == "nano" {
            return Ok(ModelSpec::Nano);
        }
        if let Some(rest) = text.strip_prefix("synth:") {
            let (preset, seed) = rest.split_once(':').unwrap_or((rest, "0"));
            let seed = seed.parse().map_err(|_| SpecError::Seed(seed.into()))?;
            return Ok(ModelSpec::Synthetic { preset: preset.parse()?, seed });
        }
        let path = Path::new(text);
        if path.is_dir() {
            return Ok(ModelSpec::Directory(path.to_owned()));
        }
        if path.is_file() {
            return Err(SpecError::NotADirectory(text.into()));
        }
        if path.is_absolute() || text.starts_with('.') || text.ends_with('/') {
            return Err(SpecError::NoDirectory(text.into()));
        }
        Repo::parse(text).map(ModelSpec::Hub).ok_or_else(|| SpecError::Unknown(text.into()))
    }
}

impl FromStr for ModelSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        ModelSpec::parse(text)
    }
}

impl fmt::Display for ModelSpec {
    /// As `--model` takes it, but a directory by its last name: this becomes the model's name for clients.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelSpec::Nano => f.write_str("nano"),
            ModelSpec::Synthetic { preset, seed: 0 } => write!(f, "synth:{preset}"),
            ModelSpec::Synthetic { preset, seed } => write!(f, "synth:{preset}:{seed}"),
            ModelSpec::Directory(path) => {
                let whole = path.canonicalize().unwrap_or_else(|_| path.clone());
                write!(f, "{}", Path::new(whole.file_name().unwrap_or(path.as_os_str())).display())
            }
            ModelSpec::Hub(repo) => write!(f, "{repo}"),
        }
    }
}

/// Where the tokenizer's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenizerFiles {
    /// A checkpoint directory.
    Directory(PathBuf),
    /// In the binary: [`embedded::TOKENIZER_FILES`].
    Embedded,
}

impl TokenizerFiles {
    /// The bytes of a file by its name, `None` if there is none.
    pub fn read(&self, name: &str) -> io::Result<Option<Cow<'static, [u8]>>> {
        match self {
            TokenizerFiles::Embedded => {
                let file = embedded::TOKENIZER_FILES.iter().find(|(found, _)| *found == name);
                Ok(file.map(|(_, bytes)| Cow::Borrowed(*bytes)))
            }
            TokenizerFiles::Directory(dir) => match fs::read(dir.join(name)) {
                Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            },
        }
    }
}

/// Sampling defaults of a checkpoint (`generation_config.json`).
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    /// False means greedy unless a request says otherwise.
    pub do_sample: bool,
    pub temperature: f32,
    /// 0 means no limit.
    pub top_k: usize,
    pub top_p: f32,
    pub repetition_penalty: f32,
    /// Ids that end a reply; may be empty, then the tokenizer's end of text is the only one.
    pub eos_token_ids: Vec<u32>,
}

impl Default for GenerationConfig {
    /// The class defaults of the original.
    fn default() -> Self {
        GenerationConfig {
            do_sample: false,
            temperature: 1.0,
            top_k: 50,
            top_p: 1.0,
            repetition_penalty: 1.0,
            eos_token_ids: Vec::new(),
        }
    }
}

impl GenerationConfig {
    /// From a `generation_config.json`; the error is the name of the field that is wrong, or the JSON error.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let root: Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let default = GenerationConfig::default();
        let field = |name: &str| root.get(name).filter(|value| !value.is_null());
        let number = |name: &str, default: f32| match field(name) {
            None => Ok(default),
            Some(value) => {
                let number = value.as_f64().filter(|x| (0.0..=1e6).contains(x));
                number.map(|x| x as f32).ok_or_else(|| format!("`{name}` is {value}"))
            }
        };
        let do_sample = field("do_sample").map_or(Some(false), Value::as_bool);
        Ok(GenerationConfig {
            do_sample: do_sample.ok_or("`do_sample` is neither true nor false")?,
            temperature: number("temperature", default.temperature)?,
            top_k: number("top_k", default.top_k as f32)? as usize,
            top_p: number("top_p", default.top_p)?,
            repetition_penalty: number("repetition_penalty", default.repetition_penalty)?,
            eos_token_ids: field("eos_token_id").map_or(Ok(Vec::new()), token_ids)?,
        })
    }

    /// The embedded checkpoint's.
    pub fn embedded() -> Self {
        Self::from_json(embedded::GENERATION_CONFIG).expect("the embedded file is valid: this is a bug")
    }
}

/// One id or a list of them.
fn token_ids(value: &Value) -> Result<Vec<u32>, String> {
    let ids = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    ids.iter().map(id).collect::<Option<_>>().ok_or_else(|| format!("`eos_token_id` is {value}"))
}

/// Everything a model is loaded from.
#[derive(Debug)]
pub struct Checkpoint {
    /// Its name for people and clients.
    pub id: String,
    pub config: ModelConfig,
    /// What `config` was read from; of the three-folder layout with the sections of all folders.
    pub config_json: Value,
    pub weights: Weights,
    pub generation: GenerationConfig,
    pub tokenizer: TokenizerFiles,
}

/// Why a checkpoint cannot be served: one sentence.
#[derive(Debug, Error)]
pub enum CheckpointError {
    #[error("{} has no {file}: is it a checkpoint directory?", dir.display())]
    NoFile { dir: PathBuf, file: &'static str },
    #[error("{} has no tokenizer: expected tokenizer.json, or vocab.json and merges.txt", .0.display())]
    NoTokenizer(PathBuf),
    #[error("{}: cannot be read: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: larger than {MAX_CONFIG_BYTES} bytes", .0.display())]
    TooLarge(PathBuf),
    #[error("{}: {source}", dir.display())]
    Config { dir: PathBuf, source: ConfigError },
    #[error("{}: not a valid generation config: {reason}", path.display())]
    Generation { path: PathBuf, reason: String },
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Hub(#[from] HubError),
}

impl Checkpoint {
    /// Opens what `spec` names. A repository must have been downloaded before, by [`Hub::download`].
    pub fn open(spec: &ModelSpec) -> Result<Self, CheckpointError> {
        match spec {
            ModelSpec::Nano => {
                let config = ModelConfig::preset(Preset::Nano);
                let weights = Weights::from_static(embedded::WEIGHTS, &config)?;
                let json = serde_json::from_str(embedded::CONFIG);
                let json = json.expect("the embedded config is valid: this is a bug");
                Ok(Self::with_embedded_tokenizer(spec, config, json, weights))
            }
            ModelSpec::Synthetic { preset, seed } => {
                let config = ModelConfig::preset(*preset);
                let weights = Weights::synthetic(&config, *seed);
                let json = synth::config_json(&config);
                Ok(Self::with_embedded_tokenizer(spec, config, json, weights))
            }
            ModelSpec::Directory(dir) => Self::open_directory(spec.to_string(), dir),
            ModelSpec::Hub(repo) => {
                let dir = Hub::from_env()?.cached(repo);
                let dir = dir.ok_or_else(|| HubError::NotDownloaded { repo: repo.clone() })?;
                Self::open_directory(spec.to_string(), &dir)
            }
        }
    }

    fn with_embedded_tokenizer(
        spec: &ModelSpec,
        config: ModelConfig,
        config_json: Value,
        weights: Weights,
    ) -> Self {
        Checkpoint {
            id: spec.to_string(),
            config,
            config_json,
            weights,
            generation: GenerationConfig::embedded(),
            tokenizer: TokenizerFiles::Embedded,
        }
    }

    /// Opens a checkpoint directory of either layout under a name of the caller's.
    pub fn open_directory(id: String, dir: &Path) -> Result<Self, CheckpointError> {
        let root = read_config(dir)?;
        let config = ModelConfig::from_json(&root.to_string())
            .map_err(|source| CheckpointError::Config { dir: dir.into(), source })?;
        let mut generation = GenerationConfig::default();
        if let Some(text) = read_small(&dir.join("generation_config.json"))? {
            generation = GenerationConfig::from_json(&text).map_err(|reason| {
                CheckpointError::Generation { path: dir.join("generation_config.json"), reason }
            })?;
        }
        if generation.eos_token_ids.is_empty() {
            let eos = root.pointer("/text_config/eos_token_id").filter(|value| !value.is_null());
            generation.eos_token_ids = eos.and_then(|eos| token_ids(eos).ok()).unwrap_or_default();
        }
        let has = |name: &str| dir.join(name).is_file();
        let has_tokenizer = has("tokenizer.json") || (has("vocab.json") && has("merges.txt"));
        if !has_tokenizer {
            return Err(CheckpointError::NoTokenizer(dir.into()));
        }
        let weights = Weights::open(dir, &config)?;
        let tokenizer = TokenizerFiles::Directory(dir.into());
        Ok(Checkpoint { id, config, config_json: root, weights, generation, tokenizer })
    }
}

/// The root `config.json`; in the three-folder layout its sections may be in the folders instead.
fn read_config(dir: &Path) -> Result<Value, CheckpointError> {
    let invalid = |error: serde_json::Error| CheckpointError::Config {
        dir: dir.into(),
        source: ConfigError::Json(error.to_string()),
    };
    let text = read_small(&dir.join("config.json"))?
        .ok_or_else(|| CheckpointError::NoFile { dir: dir.into(), file: "config.json" })?;
    let mut root: Value = serde_json::from_str(&text).map_err(invalid)?;
    for (section, folder) in [("text_config", "language_model"), ("vision_config", "vision_tower")] {
        if let Some(map) = root.as_object_mut().filter(|map| !map.contains_key(section))
            && let Some(text) = read_small(&dir.join(folder).join("config.json"))?
        {
            map.insert(section.into(), serde_json::from_str(&text).map_err(invalid)?);
        }
    }
    Ok(root)
}

/// A small text file, `None` if there is none.
fn read_small(path: &Path) -> Result<Option<String>, CheckpointError> {
    let io_error = |source| CheckpointError::Io { path: path.into(), source };
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error(error)),
        Ok(metadata) if metadata.len() > MAX_CONFIG_BYTES => Err(CheckpointError::TooLarge(path.into())),
        Ok(_) => fs::read_to_string(path).map(Some).map_err(io_error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_parse_to_what_they_name() {
        let dir = env!("CARGO_MANIFEST_DIR");
        let hub = |text: &str| Ok(ModelSpec::Hub(Repo::parse(text).unwrap()));
        let synth = |preset, seed| Ok(ModelSpec::Synthetic { preset, seed });
        for (text, expected) in [
            ("nano", Ok(ModelSpec::Nano)),
            ("synth:small", synth(Preset::Small, 0)),
            ("synth:r1:42", synth(Preset::R1, 42)),
            ("synth:big", Err(UnknownPreset("big".into()).into())),
            ("synth:nano:x", Err(SpecError::Seed("x".into()))),
            (dir, Ok(ModelSpec::Directory(dir.into()))),
            ("./no/such", Err(SpecError::NoDirectory("./no/such".into()))),
            ("/no/such", Err(SpecError::NoDirectory("/no/such".into()))),
            ("org/name", hub("org/name")),
            ("org/name@v1.0", hub("org/name@v1.0")),
            ("nanoo", Err(SpecError::Unknown("nanoo".into()))),
            ("a/b/c", Err(SpecError::Unknown("a/b/c".into()))),
            ("", Err(SpecError::Unknown(String::new()))),
        ] {
            assert_eq!(ModelSpec::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn generation_config_takes_class_defaults_and_one_or_more_end_tokens() {
        let config = GenerationConfig::from_json(r#"{"eos_token_id": 7}"#).unwrap();
        assert_eq!(config, GenerationConfig { eos_token_ids: vec![7], ..GenerationConfig::default() });
        let text = r#"{"eos_token_id": [1, 2], "do_sample": true, "temperature": 0.1, "top_k": null}"#;
        let config = GenerationConfig::from_json(text).unwrap();
        assert_eq!(
            (config.eos_token_ids.as_slice(), config.top_k, config.do_sample),
            (&[1, 2][..], 50, true)
        );
        for (text, names) in [
            (r#"{"temperature": "hot"}"#, "temperature"),
            (r#"{"eos_token_id": -1}"#, "eos_token_id"),
            (r#"{"do_sample": 1}"#, "do_sample"),
        ] {
            let error = GenerationConfig::from_json(text).unwrap_err();
            assert!(error.contains(names), "{error}");
        }
    }

    #[test]
    fn the_embedded_and_synthetic_models_open() {
        for spec in ["nano", "synth:small:3"] {
            let checkpoint = Checkpoint::open(&ModelSpec::parse(spec).unwrap()).unwrap();
            assert_eq!(checkpoint.id, spec);
            assert!(checkpoint.weights.contains("connector._connector.latents"));
            assert!(checkpoint.tokenizer.read("vocab.json").unwrap().is_some());
            assert!(checkpoint.tokenizer.read("tokenizer.json").unwrap().is_none());
            assert_eq!(checkpoint.generation.eos_token_ids.len(), 1);
        }
    }
}
