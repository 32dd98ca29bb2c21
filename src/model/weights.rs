//! Reads checkpoints: which tensors there are, where their bytes lie, and whether all of them fit the config.
//!
//! Called when a model is loaded: everything is checked by [`Weights::open`], before the first tensor is served.
//! Never computes on weights: that is the layers' own `load`.

use std::{collections::HashMap, fmt, path::Path};

use bytes::Bytes;
use thiserror::Error;

pub use super::stored::{Rows, StoredDType, StoredTensor};
use super::{
    config::ModelConfig,
    kernels::panels::{Bits, QuantPanels, VERSION},
    layers::WeightFormat,
    layout::{EMBEDDINGS, HEAD, Role, TensorSpec},
    pytorch_pickle::Pickles,
    shards::Shards,
    synth::{self, Noise},
    tensor_check::{Checked, TiedHead, check},
};

/// What is wrong with a checkpoint's weights: one sentence that names the file and the tensor.
#[derive(Debug, Error)]
pub enum WeightsError {
    #[error("{file}: cannot be read: {source}")]
    Io { file: String, source: std::io::Error },
    #[error(
        "{dir} holds no weights: expected model.safetensors or pytorch_model.bin, or shards of one of them with their \
         .index.json, or the folders language_model, vision_tower and connector with a pytorch_model.bin each"
    )]
    NoWeights { dir: String },
    #[error("{file}: not a valid safetensors file: {reason}")]
    Header { file: String, reason: String },
    #[error(
        "{file}: truncated: tensor {tensor} ends at byte {promised}, the file at byte {len}; download or copy it again"
    )]
    Truncated { file: String, tensor: String, promised: u64, len: u64 },
    #[error("{file}: not a valid index: {reason}")]
    Index { file: String, reason: String },
    #[error("{file}: not a readable PyTorch file: {reason}")]
    Pickle { file: String, reason: String },
    #[error("{file}: tensor {tensor} is missing{}", and_others(*.others))]
    Missing { file: String, tensor: String, others: usize },
    #[error("{file}: tensor {tensor} is not part of this model")]
    Extra { file: String, tensor: String },
    #[error(
        "{file} is a LoRA adapter, which the weights beside it do not contain: merge it into them first (peft: \
         `merge_and_unload`, then `save_pretrained`), or move it away to serve the weights as they are"
    )]
    Adapter { file: String },
    #[error(
        "{file}: tensor {tensor} is part of a LoRA adapter: merge it into the weights first (peft: `merge_and_unload`, then \
         `save_pretrained`)"
    )]
    AdapterTensor { file: String, tensor: String },
    #[error(
        "{file}: tensor {tensor} differs from {EMBEDDINGS}, which `text_config.tie_word_embeddings` in config.json says \
         it is tied to: set that to false to use this head, or remove the tensor"
    )]
    NotTied { file: String, tensor: &'static str },
    #[error("{file}: tensor {tensor} has shape {found:?}, config.json asks for {expected:?}")]
    Shape { file: String, tensor: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("{file}: tensor {tensor} is stored as {found}, only {expected} supported")]
    DType { file: String, tensor: String, found: String, expected: &'static str },
    #[error("tensor {tensor} is not in this checkpoint")]
    Unknown { tensor: String },
    #[error(
        "{file}: quantised in version {found} of the format, this program reads version {VERSION}: run `tinyllava quantize` \
         on the original checkpoint again"
    )]
    Version { file: String, found: String },
    #[error("tensor {tensor} is quantised: give the checkpoint it was made from")]
    Quantised { tensor: String },
    #[error(
        "the weights are quantised to {} already and cannot be kept otherwise: leave out --quant and --dtype, or give the \
         checkpoint they were made from", .0.name()
    )]
    Format(Bits),
    #[error(
        "tensor {tensor}: row {row} holds a weight that is NaN, infinite or too large: the checkpoint is damaged, download \
         or copy it again"
    )]
    NotFinite { tensor: String, row: usize },
    #[error("no memory for the {num_bytes} bytes of tensor {tensor}: {source}")]
    Memory { tensor: String, num_bytes: usize, source: std::io::Error },
}

fn and_others(others: usize) -> String {
    if others == 0 { String::new() } else { format!(" (and {others} more)") }
}

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    Floats(StoredDType),
    /// Quantised, see `kernels/panels.rs`.
    Panels,
}

/// A tensor a checkpoint holds, and where.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// Of the tensor; panels have another.
    pub shape: Vec<usize>,
    pub encoding: Encoding,
    pub role: Role,
    /// Bytes it takes where it is stored.
    pub num_bytes: u64,
    /// Which file, by the source's own count.
    pub file: usize,
    /// Where in it: bytes of a safetensors file; elements, from 0, otherwise.
    pub range: std::ops::Range<usize>,
}

/// A tensor as a file's header tells of it, not yet compared with the config.
pub(super) struct Found {
    pub name: String,
    /// For errors.
    pub file_name: String,
    pub shape: Vec<usize>,
    /// Or what the file calls its unsupported type.
    pub encoding: Result<Encoding, String>,
    pub file: usize,
    pub range: std::ops::Range<usize>,
}

enum Source {
    Shards(Shards),
    Pickles(Pickles),
    Synthetic { seed: u64 },
}

impl Source {
    /// One tensor of floats.
    fn read(&self, name: &str, entry: &Entry, dtype: StoredDType) -> Result<StoredTensor, WeightsError> {
        let data = match self {
            Source::Shards(shards) => shards.bytes(entry),
            Source::Pickles(pickles) => Bytes::from(pickles.read(name, entry, dtype)?),
            Source::Synthetic { seed } => Bytes::from(synth::tensor_bytes(*seed, name, &entry.shape)),
        };
        Ok(StoredTensor { dtype, shape: entry.shape.clone(), data })
    }

    fn release(&self, entry: &Entry) {
        if let Source::Shards(shards) = self {
            shards.release(entry);
        }
    }
}

/// Files of a LoRA adapter, as peft names them.
pub(super) const ADAPTER_FILES: [&str; 3] =
    ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"];

/// All tensors of a checkpoint, complete and of the right shapes.
pub struct Weights {
    source: Source,
    tensors: HashMap<String, Entry>,
    /// What the network reads.
    required: Vec<String>,
    quantised: Option<Bits>,
    on_read: Option<Box<dyn Fn(u64) + Send + Sync>>,
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Weights({} tensors, {} bytes)", self.tensors.len(), self.num_bytes())
    }
}

impl Weights {
    /// Maps the weights of a checkpoint directory, whichever layout it has, and compares every tensor with `config`.
    pub fn open(dir: &Path, config: &ModelConfig) -> Result<Self, WeightsError> {
        if let Some(file) = ADAPTER_FILES.into_iter().map(|name| dir.join(name)).find(|path| path.is_file()) {
            return Err(WeightsError::Adapter { file: file.display().to_string() });
        }
        if let Some((shards, found)) = Shards::open(dir)? {
            return Self::of_shards(shards, found, config);
        }
        let specs = config.tensors();
        if let Some((pickles, found)) = Pickles::open(dir, &specs)? {
            let Checked { tensors, tied_head } = check(&specs, found, |tensor| pickles.home(tensor))?;
            return Self::new(Source::Pickles(pickles), tensors, &specs, None).with_tied_head(tied_head);
        }
        Err(WeightsError::NoWeights { dir: dir.display().to_string() })
    }

    /// A safetensors file that is part of the binary.
    pub fn from_static(bytes: &'static [u8], config: &ModelConfig) -> Result<Self, WeightsError> {
        let (shards, found) = Shards::from_static("the embedded model.safetensors", bytes)?;
        Self::of_shards(shards, found, config)
    }

    fn of_shards(shards: Shards, found: Vec<Found>, config: &ModelConfig) -> Result<Self, WeightsError> {
        let quantised = shards.quantised;
        let specs = quantised.map_or_else(|| config.tensors(), |bits| config.quantised_tensors(bits));
        let Checked { tensors, tied_head } = check(&specs, found, |_| shards.home.clone())?;
        Self::new(Source::Shards(shards), tensors, &specs, quantised).with_tied_head(tied_head)
    }

    /// Random bf16 weights, a function of `seed` and the tensors' names alone; made anew by every [`Weights::get`].
    pub fn synthetic(config: &ModelConfig, seed: u64) -> Self {
        let specs = config.tensors();
        let entry = |spec: &TensorSpec| Entry {
            shape: spec.shape.clone(),
            encoding: Encoding::Floats(StoredDType::Bf16),
            role: spec.role,
            num_bytes: 2 * spec.num_elements() as u64,
            file: 0,
            range: 0..spec.num_elements(),
        };
        let tensors = specs.iter().map(|spec| (spec.name.clone(), entry(spec))).collect();
        Self::new(Source::Synthetic { seed }, tensors, &specs, None)
    }

    fn new(
        source: Source,
        tensors: HashMap<String, Entry>,
        specs: &[TensorSpec],
        quantised: Option<Bits>,
    ) -> Self {
        let required = specs.iter().filter(|spec| spec.required).map(|spec| spec.name.clone()).collect();
        Weights { source, tensors, required, quantised, on_read: None }
    }

    /// Compares a stored head of a tied model with the embeddings, bit for bit. An equal head is
    /// not used; another one is an error.
    fn with_tied_head(self, head: Option<TiedHead>) -> Result<Self, WeightsError> {
        let Some(TiedHead { file_name, entry: head }) = head else { return Ok(self) };
        let table = self.entry(EMBEDDINGS)?;
        if let Source::Pickles(pickles) = &self.source
            && pickles.share_storage((EMBEDDINGS, table.file), (HEAD, head.file))
        {
            return Ok(self);
        }
        let read = |name, entry: &Entry| match entry.encoding {
            Encoding::Floats(dtype) => self.source.read(name, entry, dtype),
            Encoding::Panels => Err(WeightsError::Quantised { tensor: name.into() }),
        };
        let is_equal = read(HEAD, &head)?.has_bits_of(&read(EMBEDDINGS, table)?);
        self.source.release(&head);
        self.source.release(table);
        if is_equal { Ok(self) } else { Err(WeightsError::NotTied { file: file_name, tensor: HEAD }) }
    }

    /// Stored bytes of all tensors the network reads (the unused ones of the published files left out).
    pub fn num_bytes(&self) -> u64 {
        self.required.iter().map(|name| self.tensors[name].num_bytes).sum()
    }

    /// Calls `callback` with the stored bytes of every tensor handed out, so that a loader can show its progress
    /// towards [`Weights::num_bytes`].
    pub fn on_read(&mut self, callback: impl Fn(u64) + Send + Sync + 'static) {
        self.on_read = Some(Box::new(callback));
    }

    /// Whether the checkpoint holds a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// What the matrices are quantised to where they are stored; `None`: they are floats.
    pub fn quantised(&self) -> Option<Bits> {
        self.quantised
    }

    /// The type floats are stored in: that of the token embeddings.
    pub fn dtype(&self) -> StoredDType {
        self.stored_dtype(EMBEDDINGS)
            .expect("every checkpoint has token embeddings, in floats: this is a bug")
    }

    /// The type a tensor of floats is stored in.
    pub(super) fn stored_dtype(&self, name: &str) -> Result<StoredDType, WeightsError> {
        match self.entry(name)?.encoding {
            Encoding::Floats(dtype) => Ok(dtype),
            Encoding::Panels => Err(WeightsError::Quantised { tensor: name.into() }),
        }
    }

    /// Whether matrices can be kept as `format`: what is quantised stays as it is.
    ///
    /// # Errors
    /// One sentence, when they cannot.
    pub fn check_format(&self, format: WeightFormat) -> Result<(), WeightsError> {
        match self.quantised {
            Some(bits) if format != WeightFormat::Quant(bits) => Err(WeightsError::Format(bits)),
            _ => Ok(()),
        }
    }

    /// Bytes that the weights will take in memory, kept as `format`.
    pub fn kept_bytes(&self, format: WeightFormat) -> u64 {
        self.required.iter().map(|name| self.kept_bytes_of(name, &self.tensors[name], format)).sum()
    }

    fn kept_bytes_of(&self, name: &str, entry: &Entry, format: WeightFormat) -> u64 {
        let number = entry.shape.iter().product::<usize>();
        let is_table = name == EMBEDDINGS;
        if is_table && self.contains(HEAD) {
            // Rows are read where they lie, which costs memory only where they had to be unpacked.
            return if matches!(self.source, Source::Pickles(_)) { entry.num_bytes } else { 0 };
        }
        let bytes = match (entry.encoding, entry.role, format) {
            (Encoding::Panels, ..) => return entry.num_bytes,
            (_, Role::Floats, _) if !is_table => 4 * number,
            (Encoding::Floats(dtype), _, WeightFormat::AsStored) => number * dtype.num_bytes(),
            (_, _, WeightFormat::Float(dtype)) => number * dtype.num_bytes(),
            (_, role, WeightFormat::Quant(asked)) => {
                let bits = role.bits(asked).unwrap_or(Bits::Eight);
                bits.shape(entry.shape[0], number / entry.shape[0]).iter().product()
            }
        };
        bytes as u64
    }

    fn entry(&self, name: &str) -> Result<&Entry, WeightsError> {
        self.tensors.get(name).ok_or_else(|| WeightsError::Unknown { tensor: name.into() })
    }

    /// How many bits a tensor that is stored as floats gets when the model is quantised to `asked`.
    pub(super) fn bits(&self, name: &str, asked: Bits) -> Result<Bits, WeightsError> {
        // The embeddings are no matrix, but the head where they are tied.
        Ok(self.entry(name)?.role.bits(asked).unwrap_or(Bits::Eight))
    }

    /// One tensor of floats by its full name.
    pub fn get(&self, name: &str) -> Result<StoredTensor, WeightsError> {
        let entry = self.entry(name)?;
        let dtype = self.stored_dtype(name)?;
        let tensor = self.source.read(name, entry, dtype)?;
        self.tell(tensor.data.len());
        Ok(tensor)
    }

    /// One quantised matrix by its full name, where it is mapped; `None`: it is stored as floats.
    pub(super) fn panels(&self, name: &str) -> Result<Option<QuantPanels>, WeightsError> {
        let (entry, Some(asked), Source::Shards(shards)) = (self.entry(name)?, self.quantised, &self.source)
        else {
            return Ok(None);
        };
        if entry.encoding != Encoding::Panels {
            return Ok(None);
        }
        shards.read_ahead(entry)?;
        let (n, bits) = (entry.shape[0], self.bits(name, asked)?);
        let records = shards.bytes(entry);
        self.tell(records.len());
        let k = entry.shape[1..].iter().product();
        Ok(Some(QuantPanels::from_bytes(n, k, bits, records)))
    }

    /// A table by its full name, to be read a row at a time. Only what a pickle holds is copied.
    pub fn rows(&self, name: &str) -> Result<Rows, WeightsError> {
        match &self.source {
            Source::Synthetic { seed } => {
                Ok(Rows::Synthetic(Noise::of(*seed, name, &self.entry(name)?.shape)))
            }
            _ => self.get(name).map(Rows::Stored),
        }
    }

    /// Gives back the memory that reading a tensor took, where it is part of a mapped file. It can be read again.
    pub fn release(&self, name: &str) {
        if let Some(entry) = self.tensors.get(name) {
            self.source.release(entry);
        }
    }

    fn tell(&self, num_bytes: usize) {
        if let Some(callback) = &self.on_read {
            callback(num_bytes as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        path::PathBuf,
        sync::{
            Arc,
            atomic::{AtomicU64, Ordering},
        },
    };

    use half::bf16;

    use super::*;

    fn golden(name: &str) -> (PathBuf, ModelConfig) {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let config =
            ModelConfig::from_json(&std::fs::read_to_string(dir.join("config.json")).unwrap()).unwrap();
        (dir, config)
    }

    #[test]
    fn shards_hold_the_same_tensors_as_the_single_file() {
        let (dir, config) = golden("tiny");
        let single = Weights::open(&dir, &config).unwrap();
        let (dir, sharded_config) = golden("tiny_bf16_sharded");
        assert_eq!(sharded_config, config);
        let sharded = Weights::open(&dir, &config).unwrap();
        assert_eq!((single.dtype(), sharded.dtype()), (StoredDType::F32, StoredDType::Bf16));
        for spec in config.tensors() {
            let (a, b) = (single.get(&spec.name).unwrap(), sharded.get(&spec.name).unwrap());
            assert_eq!((&a.shape, &b.shape), (&spec.shape, &spec.shape));
            let rounded = |values: Vec<f32>| values.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
            assert!(rounded(a.to_f32()) == rounded(b.to_f32()), "{} differs", spec.name);
        }
    }

    #[test]
    fn a_file_in_the_binary_reads_like_one_on_disk() {
        let (dir, config) = golden("tiny");
        let bytes = include_bytes!("../../tests/golden/tiny/model.safetensors");
        let (embedded, mapped) =
            (Weights::from_static(bytes, &config).unwrap(), Weights::open(&dir, &config).unwrap());
        assert_eq!(embedded.num_bytes(), mapped.num_bytes());
        for spec in config.tensors() {
            let (a, b) = (embedded.get(&spec.name).unwrap(), mapped.get(&spec.name).unwrap());
            assert!(a.data == b.data, "{} differs", spec.name);
        }
        let error = Weights::from_static(&bytes[..3_000_000], &config).unwrap_err().to_string();
        assert!(error.contains("embedded model.safetensors: truncated"), "{error}");
    }

    #[test]
    fn reading_every_required_tensor_reports_all_bytes() {
        let (dir, config) = golden("tiny_bf16_sharded");
        let mut weights = Weights::open(&dir, &config).unwrap();
        let read = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&read);
        weights.on_read(move |bytes| {
            counter.fetch_add(bytes, Ordering::Relaxed);
        });
        for spec in config.tensors().iter().filter(|spec| spec.required) {
            weights.get(&spec.name).unwrap();
        }
        assert_eq!(read.load(Ordering::Relaxed), weights.num_bytes());
        assert!(weights.num_bytes() < 1_640_448, "the unused tensors are not counted");
    }

    #[test]
    fn an_unknown_name_is_an_error() {
        let weights = Weights::synthetic(&ModelConfig::tiny_test(), 0);
        let error = weights.get("language_model.model.layers.9.mlp.fc1.weight").unwrap_err();
        assert!(error.to_string().contains("layers.9"), "{error}");
    }

    #[test]
    fn synthetic_weights_depend_on_seed_and_name_and_are_well_scaled() {
        let config = ModelConfig::tiny_test();
        let (a, same, other) =
            (Weights::synthetic(&config, 1), Weights::synthetic(&config, 1), Weights::synthetic(&config, 2));
        let name = "language_model.model.layers.0.mlp.up_proj.weight";
        let values = a.get(name).unwrap().to_f32();
        assert_eq!(values, same.get(name).unwrap().to_f32());
        assert_ne!(values, other.get(name).unwrap().to_f32());
        assert_ne!(values, a.get("language_model.model.layers.1.mlp.up_proj.weight").unwrap().to_f32());
        let deviation = (values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32).sqrt();
        let expected = (32f32).sqrt().recip();
        assert!((deviation / expected - 1.0).abs() < 0.1, "{deviation} instead of {expected}");
        let norms = a.get("language_model.model.norm.weight").unwrap().to_f32();
        assert!(norms.iter().all(|w| (0.8..1.2).contains(w)), "{norms:?}");
    }
}
