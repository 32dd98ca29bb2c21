//! The hub's cache on disk, in the layout its other tools use, so that a model is kept once.
//!
//! `models--org--name/{blobs/ID, snapshots/COMMIT/FILE -> blob, refs/REVISION}`. Used by [`super`] alone.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{HubError, RemoteFile};
use crate::model::{pytorch_pickle, shards};

#[derive(Debug)]
pub(super) struct Cache {
    root: PathBuf,
}

/// Whether a revision is a commit, which never changes.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl RemoteFile {
    /// The name its content is kept under: the checksum, as far as the hub tells one.
    pub(super) fn blob_name(&self, commit: &str) -> String {
        let plain = |id: &&String| id.len() >= 8 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        let checksum = self.lfs.as_ref().and_then(|lfs| lfs.sha256.as_ref());
        let id = checksum.or(self.blob_id.as_ref()).filter(plain);
        id.cloned().unwrap_or_else(|| format!("{commit}-{}", self.name.replace('/', "-")))
    }
}

impl Cache {
    pub fn new(root: PathBuf) -> Self {
        Cache { root }
    }

    fn repo_dir(&self, id: &str) -> PathBuf {
        self.root.join(format!("models--{}", id.replace('/', "--")))
    }

    pub fn blob(&self, id: &str, blob_name: &str) -> PathBuf {
        self.repo_dir(id).join("blobs").join(blob_name)
    }

    /// The directory of a revision, if everything a checkpoint needs is there.
    pub fn snapshot(&self, id: &str, revision: &str) -> Option<PathBuf> {
        let repo = self.repo_dir(id);
        let commit = match is_commit(revision) {
            true => revision.to_owned(),
            false => fs::read_to_string(repo.join("refs").join(revision)).ok()?.trim().to_owned(),
        };
        let dir = repo.join("snapshots").join(commit);
        is_complete(&dir).then_some(dir)
    }

    /// Names downloaded blobs as the files of a commit, and the commit as the revision's; returns their directory.
    pub fn link(
        &self,
        id: &str,
        revision: &str,
        commit: &str,
        files: &[RemoteFile],
    ) -> Result<PathBuf, HubError> {
        let dir = self.repo_dir(id).join("snapshots").join(commit);
        for file in files {
            let link = dir.join(&file.name);
            let up = "../".repeat(2 + file.name.matches('/').count());
            let target = format!("{up}blobs/{}", file.blob_name(commit));
            relink(&target, &link).map_err(|source| HubError::Io { path: link, source })?;
        }
        if !is_commit(revision) {
            let path = self.repo_dir(id).join("refs").join(revision);
            replace(&path, |path| fs::write(path, commit)).map_err(|source| HubError::Io { path, source })?;
        }
        Ok(dir)
    }
}

fn relink(target: &str, link: &Path) -> io::Result<()> {
    if fs::read_link(link).is_ok_and(|found| found == Path::new(target)) {
        return Ok(());
    }
    replace(link, |link| symlink(target, link))
}

/// Makes a file beside its place and moves it there, so that nobody sees half of it.
fn replace(path: &Path, make: impl Fn(&Path) -> io::Result<()>) -> io::Result<()> {
    fs::create_dir_all(path.parent().expect("inside the cache: this is a bug"))?;
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".new-{}", std::process::id()));
    let beside = PathBuf::from(beside);
    make(&beside).or_else(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => fs::remove_file(&beside).and_then(|()| make(&beside)),
        _ => Err(error),
    })?;
    fs::rename(&beside, path)
}

/// Whether a directory has a config, a tokenizer and all weights: other tools link single files of a commit.
fn is_complete(dir: &Path) -> bool {
    let has = |name: &str| dir.join(name).is_file();
    let has_shards = |index: &str| -> Option<bool> {
        let index: Value = serde_json::from_slice(&fs::read(dir.join(index)).ok()?).ok()?;
        let map = index.get("weight_map")?.as_object()?;
        Some(map.values().all(|shard| shard.as_str().is_some_and(has)))
    };
    let tokenizer = has("tokenizer.json") || (has("vocab.json") && has("merges.txt"));
    let files = has(shards::SINGLE_FILE) || has(pytorch_pickle::SINGLE_FILE);
    let sharded = || {
        let indexes = [shards::INDEX_FILE, pytorch_pickle::INDEX_FILE];
        indexes.into_iter().any(|index| has_shards(index).unwrap_or(false))
    };
    let folders = || pytorch_pickle::FOLDER_FILES.iter().all(|path| has(path));
    has("config.json") && tokenizer && (files || sharded() || folders())
}
