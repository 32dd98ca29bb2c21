//! Writes a checkpoint directory: safetensors shards, their index, and the small files.
//!
//! Used by [`super::synth`] and [`super::quantised`]. Everything is written beside the directory's place under another
//! name and moved there at the end, so that a directory of that name is always complete.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};
use tempfile::TempDir;
use thiserror::Error;

use super::{
    kernels::panels::ALIGNMENT,
    shards::{INDEX_FILE, SINGLE_FILE},
};

/// Largest shard; a checkpoint up to this size is one file. The published one is split so.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

/// Why a checkpoint could not be written.
#[derive(Debug, Error)]
pub enum WriteError {
    #[error("{} is not empty: choose a directory that does not exist yet", .0.display())]
    NotEmpty(PathBuf),
    #[error("{} is no place for a checkpoint: choose a directory that does not exist yet", .0.display())]
    NoName(PathBuf),
    #[error("the disk of {} is full: the checkpoint needs {needed_bytes} bytes", path.display())]
    Full { path: PathBuf, needed_bytes: u64 },
    #[error("{} cannot be written: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// A tensor that is going to be written.
#[derive(Debug, Clone)]
pub(super) struct Planned {
    pub name: String,
    /// As safetensors files call it.
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub num_bytes: u64,
}

/// A checkpoint on its way.
pub(super) struct CheckpointWriter {
    out: PathBuf,
    /// Removed with all that is in it, unless it was moved to `out`.
    staging: TempDir,
    needed_bytes: u64,
}

/// Where a tensor's bytes go.
pub(super) struct TensorSink<'a> {
    writer: &'a CheckpointWriter,
    path: &'a Path,
    file: &'a mut File,
    written: u64,
}

impl TensorSink<'_> {
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.written += bytes.len() as u64;
        self.file.write_all(bytes).map_err(self.writer.failed(self.path))
    }
}

impl CheckpointWriter {
    /// For a directory that does not exist yet, or is empty.
    pub fn new(out: &Path, needed_bytes: u64) -> Result<Self, WriteError> {
        let io_error = |source| WriteError::Io { path: out.to_owned(), source };
        let exists = out.exists();
        if exists && fs::read_dir(out).map_err(io_error)?.next().is_some() {
            return Err(WriteError::NotEmpty(out.to_owned()));
        }
        let out = if exists { out.canonicalize().map_err(io_error)? } else { out.to_owned() };
        let name = out.file_name().ok_or_else(|| WriteError::NoName(out.clone()))?;
        let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(io_error)?;
        let mut staging = tempfile::Builder::new();
        #[cfg(unix)]
        staging.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let prefix = format!(".{}.unfinished-", name.display());
        let staging = staging.prefix(&prefix).tempdir_in(parent).map_err(io_error)?;
        Ok(CheckpointWriter { out, staging, needed_bytes })
    }

    /// Writes a small file whole.
    pub fn small(&self, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        let path = self.staging.path().join(name);
        fs::write(&path, bytes).map_err(self.failed(&path))
    }

    /// Writes all shards, and the index of several. `fill` is called for every tensor, and gives its bytes in order.
    pub fn weights<E: From<WriteError>>(
        &self,
        shards: &[Vec<Planned>],
        metadata: &Value,
        mut fill: impl FnMut(&Planned, &mut TensorSink<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut weight_map = BTreeMap::new();
        for (number, tensors) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => SINGLE_FILE.to_owned(),
                several => format!("model-{:05}-of-{several:05}.safetensors", number + 1),
            };
            let path = self.staging.path().join(&name);
            let mut file = File::create_new(&path).map_err(self.failed(&path))?;
            file.write_all(&header(tensors, metadata)).map_err(self.failed(&path))?;
            for tensor in tensors {
                let mut sink = TensorSink { writer: self, path: &path, file: &mut file, written: 0 };
                fill(tensor, &mut sink)?;
                assert_eq!(sink.written, tensor.num_bytes, "{} has another size: this is a bug", tensor.name);
            }
            // On the disk before the directory gets its name.
            file.sync_all().map_err(self.failed(&path))?;
            weight_map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), name.clone())));
        }
        if shards.len() > 1 {
            let total_size: u64 = shards.iter().flatten().map(|tensor| tensor.num_bytes).sum();
            let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
            self.small(INDEX_FILE, pretty(&index).as_bytes())?;
        }
        Ok(())
    }

    /// Moves everything to its place.
    pub fn finish(self) -> Result<(), WriteError> {
        fs::rename(self.staging.path(), &self.out).map_err(self.failed(&self.out))?;
        // There is nothing left to remove.
        let _ = self.staging.keep();
        Ok(())
    }

    /// Errors name the file at the place it would have got.
    fn failed(&self, path: &Path) -> impl FnOnce(io::Error) -> WriteError {
        let inside = path.strip_prefix(self.staging.path());
        let path = inside.map_or_else(|_| path.to_owned(), |inside| self.out.join(inside));
        let needed_bytes = self.needed_bytes;
        move |source| match source.kind() {
            io::ErrorKind::StorageFull => WriteError::Full { path, needed_bytes },
            _ => WriteError::Io { path, source },
        }
    }
}

/// As the small files of a checkpoint are written.
pub(super) fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

/// Fills one shard after the other in the given order; within a shard quantised matrices come first, where all of them are
/// aligned, then the others, both by name, as the format's own writer does.
pub(super) fn split(tensors: Vec<Planned>, max_shard_bytes: u64) -> Vec<Vec<Planned>> {
    let mut shards: Vec<Vec<Planned>> = vec![Vec::new()];
    let mut filled = 0;
    for tensor in tensors {
        if filled + tensor.num_bytes > max_shard_bytes && filled > 0 {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += tensor.num_bytes;
        shards.last_mut().expect("never empty: this is a bug").push(tensor);
    }
    for shard in &mut shards {
        shard.sort_by(|a, b| (a.dtype != "U8", &a.name).cmp(&(b.dtype != "U8", &b.name)));
    }
    shards
}

/// The safetensors header of a shard, padded so that tensors start where quantised ones must.
fn header(tensors: &[Planned], metadata: &Value) -> Vec<u8> {
    let mut map = Map::new();
    map.insert("__metadata__".into(), metadata.clone());
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.num_bytes;
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]});
        map.insert(tensor.name.clone(), entry);
        start = end;
    }
    let text = Value::from(map).to_string();
    let padded = (8 + text.len()).next_multiple_of(ALIGNMENT) - 8;
    let mut bytes = (padded as u64).to_le_bytes().to_vec();
    bytes.extend(text.into_bytes());
    bytes.resize(8 + padded, b' ');
    bytes
}
