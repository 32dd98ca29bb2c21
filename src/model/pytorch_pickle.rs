//! PyTorch files: one `pytorch_model.bin`, shards of it under a `pytorch_model.bin.index.json`,
//! or the family's three folders `language_model/`, `vision_tower/`, `connector/` with one each.
//!
//! Used by [`super::weights`] alone. candle parses the pickles and runs no code in them. Never
//! maps a file: tensors are members of an archive, and each read copies one.

use std::{
    any::Any,
    collections::{HashMap, HashSet},
    fs::File,
    io::Read,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use candle_core::{DType, Tensor, pickle::PthTensors};
use half::{bf16, f16};

use super::{
    layout::{CONNECTOR_PREFIX, EMBEDDINGS, HEAD, TEXT_PREFIX, TensorSpec, VISION_PREFIX},
    shards::{read_index, read_shards},
    stored::StoredDType,
    tensor_check::is_unused_buffer,
    weights::{Encoding, Entry, Found, WeightsError},
};

/// The single-file name.
pub const SINGLE_FILE: &str = "pytorch_model.bin";
/// The index of the sharded layout.
pub const INDEX_FILE: &str = "pytorch_model.bin.index.json";

/// The pickles of the three folders, relative to the checkpoint.
pub const FOLDER_FILES: [&str; 3] =
    ["language_model/pytorch_model.bin", "vision_tower/pytorch_model.bin", "connector/pytorch_model.bin"];

/// The prefix of a file's tensors in the published layout, and the forms of that prefix in the
/// file's keys.
type KeyPrefixes = (&'static str, &'static [&'static str]);

/// Key prefixes of each of [`FOLDER_FILES`].
const FOLDERS: [KeyPrefixes; 3] = [
    (TEXT_PREFIX, &["", "language_model."]),
    (VISION_PREFIX, &["", "vision_tower._vision_tower.", "vision_tower.", "_vision_tower."]),
    (CONNECTOR_PREFIX, &["", "connector._connector.", "connector.", "_connector."]),
];

/// Key prefixes of a file that holds the whole model.
const WHOLE: KeyPrefixes = ("", &[""]);

struct Part {
    /// The prefix of the tensors in the published layout.
    prefix: &'static str,
    file_name: String,
    pickle: PthTensors,
    /// The key of each tensor by its name in the published layout.
    keys: HashMap<String, String>,
}

/// The pickles of a checkpoint.
pub(super) struct Pickles {
    parts: Vec<Part>,
    /// The path of the index, if the layout has one.
    index: Option<String>,
}

impl Pickles {
    /// Reads the tables of contents of the first layout found: the single file, shards, folders.
    /// Returns `None` if `dir` has none of them.
    pub fn open(dir: &Path, specs: &[TensorSpec]) -> Result<Option<(Self, Vec<Found>)>, WeightsError> {
        let (single, index) = (dir.join(SINGLE_FILE), dir.join(INDEX_FILE));
        let mut pickles = Pickles { parts: Vec::new(), index: None };
        if single.is_file() {
            let found = pickles.add(&single, WHOLE, specs)?;
            return Ok(Some((pickles, found)));
        }
        if index.is_file() {
            let weight_map = read_index(&index)?;
            pickles.index = Some(index.display().to_string());
            let found = read_shards(dir, &weight_map, |path| pickles.add(path, WHOLE, specs))?;
            return Ok(Some((pickles, found)));
        }
        let paths = FOLDER_FILES.map(|path| dir.join(path));
        if !paths.iter().any(|path| path.is_file()) {
            return Ok(None);
        }
        let mut found = Vec::new();
        for (path, prefixes) in paths.iter().zip(FOLDERS) {
            found.extend(pickles.add(path, prefixes, specs)?);
        }
        Ok(Some((pickles, found)))
    }

    /// Adds a file, and returns its tensors by their names in the published layout.
    fn add(
        &mut self,
        path: &Path,
        (prefix, aliases): KeyPrefixes,
        specs: &[TensorSpec],
    ) -> Result<Vec<Found>, WeightsError> {
        let pickle = open_pickle(path)?;
        let file_name = path.display().to_string();
        let names: HashSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
        let mut in_file: Vec<&String> = pickle.tensor_infos().keys().collect();
        in_file.sort();
        let (mut keys, mut found) = (HashMap::new(), Vec::new());
        for key in in_file {
            let name = full_name(key, prefix, aliases, &names);
            found.push(describe(&pickle, key, name.clone(), &file_name, self.parts.len())?);
            if keys.insert(name, key.clone()).is_some() {
                let reason = format!("it holds tensor {key} twice, with and without the name of its part");
                return Err(WeightsError::Pickle { file: file_name, reason });
            }
        }
        self.parts.push(Part { prefix, file_name, pickle, keys });
        Ok(found)
    }

    /// The file that should hold a tensor.
    pub fn home(&self, tensor: &str) -> String {
        let part = self.parts.iter().find(|part| tensor.starts_with(part.prefix));
        let part = part.expect("every tensor belongs to a part: this is a bug");
        self.index.as_ref().unwrap_or(&part.file_name).clone()
    }

    /// The bytes of one tensor, copied.
    pub fn read(&self, name: &str, entry: &Entry, dtype: StoredDType) -> Result<Vec<u8>, WeightsError> {
        let part = &self.parts[entry.file];
        let failed = |reason: String| WeightsError::Pickle {
            file: part.file_name.clone(),
            reason: format!("tensor {name}: {reason}"),
        };
        let key = part.key(name).ok_or_else(|| WeightsError::Unknown { tensor: name.into() })?;
        let tensor = part.pickle.get(key).map_err(|e| failed(e.to_string()))?;
        let tensor = tensor.ok_or_else(|| WeightsError::Unknown { tensor: name.into() })?;
        little_endian(&tensor, dtype).map_err(|e| failed(e.to_string()))
    }

    /// Returns whether two tensors (name and file number) share the bytes of one archive member.
    pub fn share_storage(&self, (a, in_a): (&str, usize), (b, in_b): (&str, usize)) -> bool {
        let info = |name: &str, file: usize| {
            let part = &self.parts[file];
            part.key(name).and_then(|key| part.pickle.tensor_infos().get(key))
        };
        match (info(a, in_a), info(b, in_b)) {
            (Some(a), Some(b)) => {
                let start = |info: &candle_core::pickle::TensorInfo| info.layout.start_offset();
                let same_layout =
                    a.layout.stride() == b.layout.stride() && a.layout.dims() == b.layout.dims();
                in_a == in_b && a.path == b.path && a.dtype == b.dtype && start(a) == start(b) && same_layout
            }
            _ => false,
        }
    }
}

impl Part {
    /// Returns the key of a tensor. Tied embeddings may be stored under the name of the head only.
    fn key(&self, name: &str) -> Option<&String> {
        let tied = || if name == EMBEDDINGS { self.keys.get(HEAD) } else { None };
        self.keys.get(name).or_else(tied)
    }
}

/// A key's name in the published layout; a key that is none stays recognisable for the error.
fn full_name(key: &str, prefix: &str, aliases: &[&str], names: &HashSet<&str>) -> String {
    let candidates = aliases.iter().filter_map(|alias| key.strip_prefix(alias));
    let mut candidates = candidates.map(|bare| format!("{prefix}{bare}"));
    let known = candidates.find(|name| names.contains(name.as_str()) || name == HEAD);
    known.unwrap_or_else(|| format!("{prefix}{key}"))
}

fn open_pickle(path: &Path) -> Result<PthTensors, WeightsError> {
    let file = path.display().to_string();
    if !path.is_file() {
        let source = std::io::ErrorKind::NotFound.into();
        return Err(WeightsError::Io { file, source });
    }
    // The pickle reader indexes into what a damaged file may have left empty.
    let pickle = catch_unwind(AssertUnwindSafe(|| PthTensors::new(path, None)));
    let reason = match pickle {
        Ok(Ok(pickle)) if pickle.tensor_infos().is_empty() => "it holds no tensors".into(),
        Ok(Ok(pickle)) => return Ok(pickle),
        Ok(Err(_)) if !is_archive(path) => {
            "it is not an archive of torch 1.6 or later: load it with torch and save it again".into()
        }
        Ok(Err(error)) => error.to_string(),
        Err(panic) => panic_text(panic.as_ref()),
    };
    Err(WeightsError::Pickle { file, reason })
}

/// Returns whether a file begins as the archives do that torch writes since 1.6.
fn is_archive(path: &Path) -> bool {
    let mut magic = [0; 4];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && magic == *b"PK\x03\x04"
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it is damaged").into()
}

fn describe(
    pickle: &PthTensors,
    key: &str,
    name: String,
    file_name: &str,
    file: usize,
) -> Result<Found, WeightsError> {
    let info = &pickle.tensor_infos()[key];
    let has_gaps = !info.layout.is_contiguous() && !info.layout.is_fortran_contiguous();
    if has_gaps && !is_unused_buffer(&name, info.layout.dims()) {
        let reason = format!("tensor {name} is stored with gaps");
        return Err(WeightsError::Pickle { file: file_name.into(), reason });
    }
    let encoding = match info.dtype {
        DType::F32 => Ok(Encoding::Floats(StoredDType::F32)),
        DType::F16 => Ok(Encoding::Floats(StoredDType::F16)),
        DType::BF16 => Ok(Encoding::Floats(StoredDType::Bf16)),
        other => Err(other.as_str().to_uppercase()),
    };
    let shape = info.layout.dims().to_vec();
    let range = 0..info.layout.shape().elem_count();
    Ok(Found { name, file_name: file_name.into(), shape, encoding, file, range })
}

fn little_endian(tensor: &Tensor, dtype: StoredDType) -> candle_core::Result<Vec<u8>> {
    let flat = tensor.flatten_all()?;
    Ok(match dtype {
        StoredDType::F32 => flat.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
        StoredDType::F16 => flat.to_vec1::<f16>()?.into_iter().flat_map(f16::to_le_bytes).collect(),
        StoredDType::Bf16 => flat.to_vec1::<bf16>()?.into_iter().flat_map(bf16::to_le_bytes).collect(),
    })
}
