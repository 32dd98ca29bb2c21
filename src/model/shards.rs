//! Safetensors files: one `model.safetensors`, or shards under a `model.safetensors.index.json`, memory-mapped.
//!
//! Used by [`super::weights`] alone, which compares what is found with the config. Never trusts a header, an index
//! or a file's length.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    path::Path,
};

use memmap2::Mmap;
use safetensors::{
    Dtype, SafeTensors,
    tensor::{Metadata, SafeTensorError, TensorInfo},
};
use serde::Deserialize;

use super::weights::{Entry, Found, StoredDType, WeightsError};

/// The single-file name.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The index of the sharded layout.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Length of the number a safetensors file starts with: the bytes of its header.
const PREFIX_BYTES: usize = 8;
/// An index is some 100 bytes a tensor.
const MAX_INDEX_BYTES: u64 = 16 << 20;

enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
        }
    }
}

/// The files of a checkpoint.
pub(super) struct Shards {
    files: Vec<Bytes>,
    /// The file that lists all tensors: the index, or the only file.
    pub home: String,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    /// Maps the files of `dir`; `None` if it has neither layout. The single file wins over an index.
    pub fn open(dir: &Path) -> Result<Option<(Self, Vec<Found>)>, WeightsError> {
        let (single, index) = (dir.join(SINGLE_FILE), dir.join(INDEX_FILE));
        if single.is_file() {
            let home = single.display().to_string();
            let bytes = map_file(&single)?;
            let found = read_header(&home, bytes.as_slice(), 0)?;
            return Ok(Some((Shards { files: vec![bytes], home }, found)));
        }
        if !index.is_file() {
            return Ok(None);
        }
        let home = index.display().to_string();
        let weight_map = read_index(&index)?;
        let mut shards = Shards { files: Vec::new(), home };
        let mut found = Vec::new();
        for shard in weight_map.values().collect::<std::collections::BTreeSet<_>>() {
            let path = dir.join(shard);
            let bytes = map_file(&path)?;
            let file_name = path.display().to_string();
            let tensors = read_header(&file_name, bytes.as_slice(), shards.files.len())?;
            shards.files.push(bytes);
            for tensor in tensors {
                // A tensor in two files, or in one the index does not send us to, is nobody's.
                if weight_map.get(&tensor.name) != Some(shard) {
                    return Err(WeightsError::Extra { file: file_name, tensor: tensor.name });
                }
                found.push(tensor);
            }
        }
        shards.check_index(dir, &weight_map, &found)?;
        Ok(Some((shards, found)))
    }

    /// One file that is part of the binary.
    pub fn from_static(file_name: &str, bytes: &'static [u8]) -> Result<(Self, Vec<Found>), WeightsError> {
        let found = read_header(file_name, bytes, 0)?;
        Ok((Shards { files: vec![Bytes::Static(bytes)], home: file_name.into() }, found))
    }

    /// The bytes of one tensor.
    pub fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.files[entry.file].as_slice()[entry.range.clone()]
    }

    /// Every tensor of the index must be in the shard it names.
    fn check_index(
        &self,
        dir: &Path,
        weight_map: &BTreeMap<String, String>,
        found: &[Found],
    ) -> Result<(), WeightsError> {
        let names: std::collections::HashSet<&str> =
            found.iter().map(|tensor| tensor.name.as_str()).collect();
        let mut missing = weight_map.iter().filter(|(tensor, _)| !names.contains(tensor.as_str()));
        let Some((tensor, shard)) = missing.next() else { return Ok(()) };
        Err(WeightsError::Missing {
            file: dir.join(shard).display().to_string(),
            tensor: tensor.clone(),
            others: missing.count(),
        })
    }
}

/// Reads an index; every shard it names is a plain name of an existing file in the same directory.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, WeightsError> {
    let file = path.display().to_string();
    let io_error = |source| WeightsError::Io { file: file.clone(), source };
    let invalid = |reason: String| WeightsError::Index { file: file.clone(), reason };
    if std::fs::metadata(path).map_err(io_error)?.len() > MAX_INDEX_BYTES {
        return Err(invalid(format!("it is larger than {MAX_INDEX_BYTES} bytes")));
    }
    let text = std::fs::read(path).map_err(io_error)?;
    let index: Index = serde_json::from_slice(&text).map_err(|e| invalid(e.to_string()))?;
    if index.weight_map.is_empty() {
        return Err(invalid("it lists no tensor".into()));
    }
    for (tensor, shard) in &index.weight_map {
        // `..`, a separator or a drive would lead out of the checkpoint.
        let plain = Path::new(shard).file_name().is_some_and(|name| name == shard.as_str());
        if !plain || shard.contains('\\') {
            return Err(invalid(format!(
                "tensor {tensor} is said to be in {shard:?}, which is not a file name"
            )));
        }
        if !path.with_file_name(shard).is_file() {
            return Err(invalid(format!("tensor {tensor} is said to be in {shard}, which does not exist")));
        }
    }
    Ok(index.weight_map)
}

fn map_file(path: &Path) -> Result<Bytes, WeightsError> {
    let io_error = |source| WeightsError::Io { file: path.display().to_string(), source };
    let file = File::open(path).map_err(io_error)?;
    // SAFETY: the map is read-only and private to this process. The one way to break it is another process that
    // shortens the file while it is mapped, which faults on access; a checkpoint that is being served is not to be
    // written to (the hub cache replaces files by renaming, which leaves the map whole).
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file) }.map_err(io_error)?;
    Ok(Bytes::Mapped(map))
}

/// What a file's header says, after the format's own checks: sizes fit shapes, no gap, no overlap, nothing left over.
fn read_header(file_name: &str, bytes: &[u8], file: usize) -> Result<Vec<Found>, WeightsError> {
    let (header_bytes, metadata) =
        SafeTensors::read_metadata(bytes).map_err(|error| header_error(file_name, bytes, &error))?;
    let data_start = PREFIX_BYTES + header_bytes;
    let found = metadata.tensors().into_iter().map(|(name, info)| Found {
        name,
        file_name: file_name.into(),
        shape: info.shape.clone(),
        dtype: stored_dtype(info),
        file,
        range: data_start + info.data_offsets.0..data_start + info.data_offsets.1,
    });
    let mut found: Vec<_> = found.collect();
    // The library's order is that of a hash map; errors must not depend on it.
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn stored_dtype(info: &TensorInfo) -> Result<StoredDType, String> {
    match info.dtype {
        Dtype::F32 => Ok(StoredDType::F32),
        Dtype::F16 => Ok(StoredDType::F16),
        Dtype::BF16 => Ok(StoredDType::Bf16),
        other => Err(format!("{other:?}")),
    }
}

/// The library says only that lengths differ; find the first tensor that the file does not hold whole.
fn header_error(file_name: &str, bytes: &[u8], error: &SafeTensorError) -> WeightsError {
    let file = file_name.to_owned();
    if matches!(error, SafeTensorError::MetadataIncompleteBuffer)
        && let Some((tensor, promised)) = first_cut_tensor(bytes)
    {
        return WeightsError::Truncated { file, tensor, promised, len: bytes.len() as u64 };
    }
    let reason = match error {
        SafeTensorError::HeaderTooSmall => format!("it has only {} bytes", bytes.len()),
        SafeTensorError::HeaderTooLarge => "its header claims to be larger than 100 MB".into(),
        SafeTensorError::InvalidHeaderLength => "its header claims to be longer than the file".into(),
        SafeTensorError::MetadataIncompleteBuffer => "bytes follow its last tensor".into(),
        other => other.to_string(),
    };
    WeightsError::Header { file, reason }
}

/// Name and end, in bytes of the file, of the first tensor that reaches beyond the end of the file.
fn first_cut_tensor(bytes: &[u8]) -> Option<(String, u64)> {
    let (prefix, rest) = bytes.split_first_chunk::<PREFIX_BYTES>()?;
    let header_bytes = usize::try_from(u64::from_le_bytes(*prefix)).ok()?;
    let metadata: Metadata = serde_json::from_slice(rest.get(..header_bytes)?).ok()?;
    let tensors: HashMap<String, &TensorInfo> = metadata.tensors();
    let ends =
        tensors.into_iter().map(|(name, info)| (PREFIX_BYTES + header_bytes + info.data_offsets.1, name));
    ends.filter(|(end, _)| *end > bytes.len()).min().map(|(end, name)| (name, end as u64))
}
