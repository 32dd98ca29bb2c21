//! The family's other layout: folders `language_model/`, `vision_tower/`, `connector/`, each with a PyTorch pickle.
//!
//! Used by [`super::weights`] alone. Pickles are read by candle, which runs no code of theirs.

use std::{
    any::Any,
    collections::HashSet,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use candle_core::{DType, Tensor, pickle::PthTensors};
use half::{bf16, f16};

use super::{
    layout::{CONNECTOR_PREFIX, TEXT_PREFIX, TensorSpec, VISION_PREFIX},
    stored::StoredDType,
    weights::{Encoding, Entry, Found, WeightsError},
};

/// The pickles, relative to the checkpoint.
pub const PATHS: [&str; 3] =
    ["language_model/pytorch_model.bin", "vision_tower/pytorch_model.bin", "connector/pytorch_model.bin"];

/// For each of them, the prefix of its tensors in the published layout, and what its own keys may leave out of that prefix.
const PARTS: [(&str, &[&str]); 3] = [
    (TEXT_PREFIX, &["", "language_model."]),
    (VISION_PREFIX, &["", "vision_tower._vision_tower.", "vision_tower.", "_vision_tower."]),
    (CONNECTOR_PREFIX, &["", "connector._connector.", "connector.", "_connector."]),
];

struct Part {
    prefix: &'static str,
    file_name: String,
    pickle: PthTensors,
}

/// The three pickles of a checkpoint.
pub(super) struct Folders {
    parts: Vec<Part>,
}

impl Folders {
    /// Reads the pickles' tables of contents; `None` if there is no such folder.
    pub fn open(dir: &Path, specs: &[TensorSpec]) -> Result<Option<(Self, Vec<Found>)>, WeightsError> {
        let paths = PATHS.map(|path| dir.join(path));
        if !paths.iter().any(|path| path.is_file()) {
            return Ok(None);
        }
        let names: HashSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
        let (mut parts, mut found) = (Vec::new(), Vec::new());
        for ((prefix, aliases), path) in PARTS.into_iter().zip(&paths) {
            let pickle = open_pickle(path)?;
            let file_name = path.display().to_string();
            let mut keys: Vec<&String> = pickle.tensor_infos().keys().collect();
            keys.sort();
            for key in keys {
                let name = full_name(key, prefix, aliases, &names);
                found.push(describe(&pickle, key, name, &file_name, parts.len())?);
            }
            parts.push(Part { prefix, file_name, pickle });
        }
        Ok(Some((Folders { parts }, found)))
    }

    /// The file that should hold a tensor.
    pub fn home(&self, tensor: &str) -> String {
        let part = self.parts.iter().find(|part| tensor.starts_with(part.prefix));
        part.expect("every tensor belongs to a part: this is a bug").file_name.clone()
    }

    /// The bytes of one tensor, copied: a pickle's tensors are members of an archive.
    pub fn read(&self, name: &str, entry: &Entry, dtype: StoredDType) -> Result<Vec<u8>, WeightsError> {
        let part = &self.parts[entry.file];
        let bare = name.strip_prefix(part.prefix).expect("checked when the part was read: this is a bug");
        let (_, aliases) = PARTS[entry.file];
        let mut keys = aliases.iter().map(|alias| format!("{alias}{bare}"));
        let key = keys.find(|key| part.pickle.tensor_infos().contains_key(key));
        let failed = |reason: String| WeightsError::Pickle {
            file: part.file_name.clone(),
            reason: format!("tensor {name}: {reason}"),
        };
        let key = key.ok_or_else(|| WeightsError::Unknown { tensor: name.into() })?;
        let tensor = part.pickle.get(&key).map_err(|e| failed(e.to_string()))?;
        let tensor = tensor.ok_or_else(|| WeightsError::Unknown { tensor: name.into() })?;
        little_endian(&tensor, dtype).map_err(|e| failed(e.to_string()))
    }
}

/// A key's name in the published layout; a key that is none stays recognisable for the error.
fn full_name(key: &str, prefix: &str, aliases: &[&str], names: &HashSet<&str>) -> String {
    let candidates = aliases.iter().filter_map(|alias| key.strip_prefix(alias));
    let mut candidates = candidates.map(|bare| format!("{prefix}{bare}"));
    candidates.find(|name| names.contains(name.as_str())).unwrap_or_else(|| format!("{prefix}{key}"))
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
        Ok(Err(error)) => error.to_string(),
        Err(panic) => panic_text(panic.as_ref()),
    };
    Err(WeightsError::Pickle { file, reason })
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
    if !info.layout.is_contiguous() && !info.layout.is_fortran_contiguous() {
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
