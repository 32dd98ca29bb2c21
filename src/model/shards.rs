//! Safetensors files: one `model.safetensors`, or shards under a `model.safetensors.index.json`, memory-mapped.
//!
//! Used by [`super::weights`], which compares the tensors with the config, and by
//! [`super::pytorch_pickle`] for its index. Never trusts a header, an index or a file's length.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    path::Path,
    sync::Arc,
};

use bytes::Bytes;
#[cfg(target_os = "linux")]
use memmap2::Advice;
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::{
    Dtype, SafeTensors,
    tensor::{Metadata, SafeTensorError, TensorInfo},
};
use serde::Deserialize;

use super::{
    kernels::panels::{Bits, VERSION},
    stored::StoredDType,
    weights::{Encoding, Entry, Found, WeightsError},
};

/// The single-file name.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The index of the sharded layout.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// What `format` in the metadata of a quantised file says; an ordinary one says "pt".
pub const PANELS_FORMAT: &str = "tinyllava-panels";

/// Length of the number a safetensors file starts with: the bytes of its header.
const PREFIX_BYTES: usize = 8;
/// An index is some 100 bytes a tensor.
const MAX_INDEX_BYTES: u64 = 16 << 20;

/// A file whose bytes live as long as anybody has a part of them.
struct File {
    name: String,
    bytes: Bytes,
    /// `None`: part of the binary.
    map: Option<Arc<Mmap>>,
}

/// The files of a checkpoint.
pub(super) struct Shards {
    files: Vec<File>,
    /// The file that lists all tensors: the index, or the only file.
    pub home: String,
    /// `Some`: written by `tinyllava quantize`.
    pub quantised: Option<Bits>,
}

/// A map that several own.
struct Shared(Arc<Mmap>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
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
            let file = map_file(&single)?;
            let (found, quantised) = read_header(&file, 0)?;
            return Ok(Some((Shards { files: vec![file], home, quantised }, found)));
        }
        if !index.is_file() {
            return Ok(None);
        }
        let home = index.display().to_string();
        let weight_map = read_index(&index)?;
        let mut shards = Shards { files: Vec::new(), home, quantised: None };
        let found = read_shards(dir, &weight_map, |path| {
            let file = map_file(path)?;
            let (tensors, quantised) = read_header(&file, shards.files.len())?;
            // Where files differ, some tensor is not what the others ask for.
            shards.quantised = shards.quantised.or(quantised);
            shards.files.push(file);
            Ok(tensors)
        })?;
        Ok(Some((shards, found)))
    }

    /// One file that is part of the binary.
    pub fn from_static(file_name: &str, bytes: &'static [u8]) -> Result<(Self, Vec<Found>), WeightsError> {
        let file = File { name: file_name.into(), bytes: Bytes::from_static(bytes), map: None };
        let (found, quantised) = read_header(&file, 0)?;
        Ok((Shards { files: vec![file], home: file_name.into(), quantised }, found))
    }

    /// The bytes of one tensor, not copied.
    pub fn bytes(&self, entry: &Entry) -> Bytes {
        self.files[entry.file].bytes.slice(entry.range.clone())
    }

    /// Reads a tensor from the disk now, so that its first use does not wait for it.
    pub fn read_ahead(&self, entry: &Entry) -> Result<(), WeightsError> {
        let file = &self.files[entry.file];
        let Some(map) = &file.map else { return Ok(()) };
        #[cfg(target_os = "linux")]
        match map.advise_range(Advice::PopulateRead, entry.range.start, entry.range.len()) {
            // A kernel before 5.14: pages come when they are used.
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {}
            Err(source) => return Err(WeightsError::Io { file: file.name.clone(), source }),
            Ok(()) => {}
        }
        Ok(())
    }

    /// Says that nobody will read a tensor soon: its pages are the system's again, and counted here no more.
    pub fn release(&self, entry: &Entry) {
        if let Some(map) = &self.files[entry.file].map {
            // SAFETY: the map is read-only and of a file: a page that is read again comes from the file again.
            #[allow(unsafe_code)]
            // It is advice: where it is not taken, pages stay until memory is short.
            let _ = unsafe {
                map.unchecked_advise_range(UncheckedAdvice::DontNeed, entry.range.start, entry.range.len())
            };
        }
    }
}

/// Calls `read` for every file in an index, and returns all tensors.
///
/// # Errors
/// A tensor is in another file than the index says, in two files, or in none.
pub(super) fn read_shards(
    dir: &Path,
    weight_map: &BTreeMap<String, String>,
    mut read: impl FnMut(&Path) -> Result<Vec<Found>, WeightsError>,
) -> Result<Vec<Found>, WeightsError> {
    let mut all = Vec::new();
    for shard in weight_map.values().collect::<BTreeSet<_>>() {
        for tensor in read(&dir.join(shard))? {
            if weight_map.get(&tensor.name) != Some(shard) {
                return Err(WeightsError::Extra { file: tensor.file_name, tensor: tensor.name });
            }
            all.push(tensor);
        }
    }
    let names: HashSet<&str> = all.iter().map(|tensor| tensor.name.as_str()).collect();
    let mut missing = weight_map.iter().filter(|(tensor, _)| !names.contains(tensor.as_str()));
    if let Some((tensor, shard)) = missing.next() {
        return Err(WeightsError::Missing {
            file: dir.join(shard).display().to_string(),
            tensor: tensor.clone(),
            others: missing.count(),
        });
    }
    Ok(all)
}

/// Reads an index; every shard it names is a plain name of an existing file in the same directory.
pub(super) fn read_index(path: &Path) -> Result<BTreeMap<String, String>, WeightsError> {
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

fn map_file(path: &Path) -> Result<File, WeightsError> {
    let name = path.display().to_string();
    let io_error = |source| WeightsError::Io { file: path.display().to_string(), source };
    let file = std::fs::File::open(path).map_err(io_error)?;
    // SAFETY: the map is read-only and private to this process. The one way to break it is another process that
    // shortens the file while it is mapped, which faults on access; a checkpoint that is being served is not to be
    // written to (the hub cache replaces files by renaming, which leaves the map whole).
    #[allow(unsafe_code)]
    let map = Arc::new(unsafe { Mmap::map(&file) }.map_err(io_error)?);
    Ok(File { name, bytes: Bytes::from_owner(Shared(Arc::clone(&map))), map: Some(map) })
}

/// What a file's header says, after the format's own checks: sizes fit shapes, no gap, no overlap, nothing left over; and
/// what its tensors are quantised to, if they are.
fn read_header(file: &File, index: usize) -> Result<(Vec<Found>, Option<Bits>), WeightsError> {
    let (header_bytes, metadata) = SafeTensors::read_metadata(&file.bytes)
        .map_err(|error| header_error(&file.name, &file.bytes, &error))?;
    let quantised = quantisation(&file.name, metadata.metadata().as_ref())?;
    let data_start = PREFIX_BYTES + header_bytes;
    let found = metadata.tensors().into_iter().map(|(name, info)| Found {
        name,
        file_name: file.name.clone(),
        shape: info.shape.clone(),
        encoding: encoding(info, quantised.is_some()),
        file: index,
        range: data_start + info.data_offsets.0..data_start + info.data_offsets.1,
    });
    let mut found: Vec<_> = found.collect();
    // The library's order is that of a hash map; errors must not depend on it.
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((found, quantised))
}

/// What a file written by `tinyllava quantize` is quantised to.
fn quantisation(
    file: &str,
    metadata: Option<&HashMap<String, String>>,
) -> Result<Option<Bits>, WeightsError> {
    let field = |name: &str| metadata.and_then(|metadata| metadata.get(name)).map(String::as_str);
    if field("format") != Some(PANELS_FORMAT) {
        return Ok(None);
    }
    let (version, quant) = (field("version").unwrap_or("none"), field("quant").unwrap_or("nothing"));
    if version != VERSION.to_string() {
        return Err(WeightsError::Version { file: file.into(), found: version.into() });
    }
    let bits = [Bits::Eight, Bits::Four].into_iter().find(|bits| bits.name() == quant);
    let reason = || format!("it says to be quantised to {quant:?}");
    bits.map(Some).ok_or_else(|| WeightsError::Header { file: file.into(), reason: reason() })
}

fn encoding(info: &TensorInfo, quantised: bool) -> Result<Encoding, String> {
    match info.dtype {
        Dtype::F32 => Ok(Encoding::Floats(StoredDType::F32)),
        Dtype::F16 => Ok(Encoding::Floats(StoredDType::F16)),
        Dtype::BF16 => Ok(Encoding::Floats(StoredDType::Bf16)),
        Dtype::U8 if quantised => Ok(Encoding::Panels),
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
