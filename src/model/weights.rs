//! Reads checkpoints: which tensors there are, where their bytes lie, and whether all of them fit the config.
//!
//! Called when a model is loaded: everything is checked by [`Weights::open`], before the first tensor is served.
//! Never computes on weights: that is the layers' own `load`.

use std::{borrow::Cow, collections::HashMap, fmt, path::Path};

use half::{bf16, f16};
use rayon::prelude::*;
use thiserror::Error;

use super::{config::ModelConfig, folders::Folders, layout::TensorSpec, shards::Shards, synth};

/// Stored element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredDType {
    F32,
    F16,
    Bf16,
}

impl StoredDType {
    /// Bytes of one element.
    pub fn num_bytes(self) -> usize {
        match self {
            StoredDType::F32 => 4,
            StoredDType::F16 | StoredDType::Bf16 => 2,
        }
    }
}

/// One tensor as stored: little-endian, row-major.
#[derive(Debug)]
pub struct StoredTensor<'a> {
    pub dtype: StoredDType,
    pub shape: Vec<usize>,
    /// Borrowed from the mapped file, or made (synthetic checkpoints).
    pub data: Cow<'a, [u8]>,
}

impl StoredTensor<'_> {
    /// The elements as f32, row-major.
    pub fn to_f32(&self) -> Vec<f32> {
        self.convert(|x| x)
    }

    /// The elements as bf16, row-major; exact when stored as bf16.
    pub fn to_bf16(&self) -> Vec<bf16> {
        self.convert(bf16::from_f32)
    }

    /// The elements as f16, row-major; exact when stored as f16.
    pub fn to_f16(&self) -> Vec<f16> {
        self.convert(f16::from_f32)
    }

    /// Elements `[start, start + out.len())` as f32.
    pub fn copy_f32(&self, start: usize, out: &mut [f32]) {
        let width = self.dtype.num_bytes();
        let bytes = &self.data[start * width..(start + out.len()) * width];
        match self.dtype {
            StoredDType::F32 => copy(bytes, out, f32::from_le_bytes),
            StoredDType::F16 => copy(bytes, out, |bytes| f16::from_le_bytes(bytes).to_f32()),
            StoredDType::Bf16 => copy(bytes, out, |bytes| bf16::from_le_bytes(bytes).to_f32()),
        }
    }

    fn convert<T: Default + Copy + Send>(&self, to: impl Fn(f32) -> T + Sync) -> Vec<T> {
        match self.dtype {
            StoredDType::F32 => convert(&self.data, |bytes| to(f32::from_le_bytes(bytes))),
            StoredDType::F16 => convert(&self.data, |bytes| to(f16::from_le_bytes(bytes).to_f32())),
            StoredDType::Bf16 => convert(&self.data, |bytes| to(bf16::from_le_bytes(bytes).to_f32())),
        }
    }
}

/// Elements of `N` bytes each, which need not be aligned.
fn copy<const N: usize, T>(bytes: &[u8], out: &mut [T], element: impl Fn([u8; N]) -> T) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *out = element(*bytes);
    }
}

/// Elements of `N` bytes each, in parallel. The bytes of a mapped file need not be aligned.
fn convert<const N: usize, T: Default + Copy + Send>(
    bytes: &[u8],
    element: impl Fn([u8; N]) -> T + Sync,
) -> Vec<T> {
    const ELEMENTS_A_TASK: usize = 1 << 16;
    let mut out = vec![T::default(); bytes.len() / N];
    let tasks = out.par_chunks_mut(ELEMENTS_A_TASK).zip(bytes.par_chunks(ELEMENTS_A_TASK * N));
    tasks.for_each(|(out, bytes)| copy(bytes, out, &element));
    out
}

/// What is wrong with a checkpoint's weights: one sentence that names the file and the tensor.
#[derive(Debug, Error)]
pub enum WeightsError {
    #[error("{file}: cannot be read: {source}")]
    Io { file: String, source: std::io::Error },
    #[error(
        "{dir} holds no weights: expected model.safetensors, or model.safetensors.index.json with its shards, \
         or the folders language_model, vision_tower and connector with a pytorch_model.bin each"
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
    #[error("{file}: tensor {tensor} has shape {found:?}, config.json asks for {expected:?}")]
    Shape { file: String, tensor: String, found: Vec<usize>, expected: Vec<usize> },
    #[error("{file}: tensor {tensor} is stored as {found}, only F32, F16 and BF16 are supported")]
    DType { file: String, tensor: String, found: String },
    #[error("tensor {tensor} is not in this checkpoint")]
    Unknown { tensor: String },
}

fn and_others(others: usize) -> String {
    if others == 0 { String::new() } else { format!(" (and {others} more)") }
}

/// A tensor a checkpoint holds, and where.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub shape: Vec<usize>,
    pub dtype: StoredDType,
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
    pub dtype: Result<StoredDType, String>,
    pub file: usize,
    pub range: std::ops::Range<usize>,
}

enum Source {
    Shards(Shards),
    Folders(Folders),
    Synthetic { seed: u64 },
}

/// All tensors of a checkpoint, complete and of the right shapes.
pub struct Weights {
    source: Source,
    tensors: HashMap<String, Entry>,
    num_bytes: u64,
    on_read: Option<Box<dyn Fn(u64) + Send + Sync>>,
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Weights({} tensors, {} bytes)", self.tensors.len(), self.num_bytes)
    }
}

impl Weights {
    /// Maps the weights of a checkpoint directory, whichever layout it has, and compares every tensor with `config`.
    pub fn open(dir: &Path, config: &ModelConfig) -> Result<Self, WeightsError> {
        let specs = config.tensors();
        if let Some((shards, found)) = Shards::open(dir)? {
            let home = shards.home.clone();
            let tensors = check(&specs, found, |_| home.clone())?;
            return Ok(Self::new(Source::Shards(shards), tensors, &specs));
        }
        if let Some((folders, found)) = Folders::open(dir, &specs)? {
            let tensors = check(&specs, found, |tensor| folders.home(tensor))?;
            return Ok(Self::new(Source::Folders(folders), tensors, &specs));
        }
        Err(WeightsError::NoWeights { dir: dir.display().to_string() })
    }

    /// A safetensors file that is part of the binary.
    pub fn from_static(bytes: &'static [u8], config: &ModelConfig) -> Result<Self, WeightsError> {
        let specs = config.tensors();
        let (shards, found) = Shards::from_static("the embedded model.safetensors", bytes)?;
        let tensors = check(&specs, found, |_| shards.home.clone())?;
        Ok(Self::new(Source::Shards(shards), tensors, &specs))
    }

    /// Random bf16 weights, a function of `seed` and the tensors' names alone; made anew by every [`Weights::get`].
    pub fn synthetic(config: &ModelConfig, seed: u64) -> Self {
        let specs = config.tensors();
        let entry = |spec: &TensorSpec| Entry {
            shape: spec.shape.clone(),
            dtype: StoredDType::Bf16,
            file: 0,
            range: 0..spec.num_elements(),
        };
        let tensors = specs.iter().map(|spec| (spec.name.clone(), entry(spec))).collect();
        Self::new(Source::Synthetic { seed }, tensors, &specs)
    }

    fn new(source: Source, tensors: HashMap<String, Entry>, specs: &[TensorSpec]) -> Self {
        let required = specs.iter().filter(|spec| spec.required).filter_map(|spec| tensors.get(&spec.name));
        let bytes = required.map(|e| (e.shape.iter().product::<usize>() * e.dtype.num_bytes()) as u64);
        Weights { source, num_bytes: bytes.sum(), tensors, on_read: None }
    }

    /// Stored bytes of all tensors the network reads (the unused ones of the published files left out).
    pub fn num_bytes(&self) -> u64 {
        self.num_bytes
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

    /// The type the weights are stored in: that of the token embedding.
    pub fn dtype(&self) -> StoredDType {
        let embedding = self.tensors.get("language_model.model.embed_tokens.weight");
        embedding.expect("every checkpoint has a token embedding: this is a bug").dtype
    }

    /// One tensor by its full name.
    pub fn get(&self, name: &str) -> Result<StoredTensor<'_>, WeightsError> {
        let entry = self.tensors.get(name).ok_or_else(|| WeightsError::Unknown { tensor: name.into() })?;
        let data = match &self.source {
            Source::Shards(shards) => Cow::Borrowed(shards.bytes(entry)),
            Source::Folders(folders) => Cow::Owned(folders.read(name, entry)?),
            Source::Synthetic { seed } => Cow::Owned(synth::tensor_bytes(*seed, name, &entry.shape)),
        };
        if let Some(callback) = &self.on_read {
            callback(data.len() as u64);
        }
        Ok(StoredTensor { dtype: entry.dtype, shape: entry.shape.clone(), data })
    }
}

/// Compares what files hold with what the config asks for. `home` names the file a missing tensor is missing from.
fn check(
    specs: &[TensorSpec],
    found: Vec<Found>,
    home: impl Fn(&str) -> String,
) -> Result<HashMap<String, Entry>, WeightsError> {
    let by_name: HashMap<&str, &TensorSpec> = specs.iter().map(|spec| (spec.name.as_str(), spec)).collect();
    let mut tensors = HashMap::with_capacity(found.len());
    for Found { name, file_name, shape, dtype, file, range } in found {
        let Some(spec) = by_name.get(name.as_str()) else {
            return Err(WeightsError::Extra { file: file_name, tensor: name });
        };
        if shape != spec.shape {
            let expected = spec.shape.clone();
            return Err(WeightsError::Shape { file: file_name, tensor: name, found: shape, expected });
        }
        let dtype =
            dtype.map_err(|found| WeightsError::DType { file: file_name, tensor: name.clone(), found })?;
        tensors.insert(name, Entry { shape, dtype, file, range });
    }
    let mut missing = specs.iter().filter(|spec| spec.required && !tensors.contains_key(&spec.name));
    match missing.next() {
        None => Ok(tensors),
        Some(first) => Err(WeightsError::Missing {
            file: home(&first.name),
            tensor: first.name.clone(),
            others: missing.count(),
        }),
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
            assert!(matches!(a.data, Cow::Borrowed(_)));
            assert!(a.to_bf16() == b.to_bf16(), "{} differs", spec.name);
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
    fn conversions_read_unaligned_bytes_of_every_type() {
        let values = [0.0f32, -1.5, 3.25, 65_504.0];
        let stored = |dtype, bytes: Vec<u8>| {
            let padded: Vec<u8> = std::iter::once(0).chain(bytes).collect();
            StoredTensor { dtype, shape: vec![4], data: Cow::Borrowed(&padded[1..]) }.to_f32()
        };
        assert_eq!(stored(StoredDType::F32, values.iter().flat_map(|x| x.to_le_bytes()).collect()), values);
        let f16s = values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
        assert_eq!(stored(StoredDType::F16, f16s), values);
        let bf16s = values[..3].iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
        assert_eq!(stored(StoredDType::Bf16, bf16s), values[..3]);
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
