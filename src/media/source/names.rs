//! Media with a `uuid`: keeps what was sent, finds it again.
//!
//! Part of `source.rs`. Must never find what a client with another key or salt has sent.

use std::sync::Arc;

use super::{Fetched, SourceReader, blocking, holding, refused, unreadable};
use crate::media::{
    Caller, FileStoreError, MediaError, Picture,
    local_file::LocalFile,
    named_media::{Media, NamedMedia, Owner},
};

/// Most characters of a client's `uuid` in an error.
const MAX_SHOWN_UUID_CHARS: usize = 64;

impl SourceReader {
    /// Returns the files of a list, with and without names. All its downloads share one place.
    pub(super) async fn read_pictures(
        &self,
        pictures: Vec<Picture>,
        caller: &Caller,
    ) -> Result<Fetched, MediaError> {
        self.check_num_pictures(pictures.len())?;
        let urls = pictures.iter().filter_map(|picture| picture.url.clone()).collect();
        let mut sent = self.read_urls(urls, caller).await?.into_iter();
        let mut list = Fetched { files: vec![], is_list: true, to_keep: vec![] };
        for Picture { url, uuid } in pictures {
            let file = if url.is_some() { sent.next() } else { None };
            match (file, uuid) {
                (Some(file), None) => list.files.push(file),
                (Some(file), Some(uuid)) => {
                    let files = vec![file.without_fetch_place()];
                    list.to_keep.push((uuid, Media::Files { files, is_list: false }));
                    list.files.push(file);
                }
                (None, Some(uuid)) => list.files.extend(self.recall(uuid, caller).await?.files),
                (None, None) => return Err(refused("a frame of the list has no URL; send it".into())),
            }
        }
        self.check_num_pictures(list.files.len())?;
        if list.files.iter().map(|file| file.num_bytes).sum::<usize>() > self.max_video_bytes {
            return Err(self.too_large());
        }
        Ok(list)
    }

    /// Returns the files that the client sent with `uuid` before.
    pub(super) async fn recall(&self, uuid: String, caller: &Caller) -> Result<Fetched, MediaError> {
        let (this, owner) = (self.clone(), Owner::of(caller));
        holding(caller.hold.clone(), move || {
            let not_found =
                || MediaError::NotFound { uuid: uuid.chars().take(MAX_SHOWN_UUID_CHARS).collect() };
            let (files, is_list) = match this.named.get(owner, &uuid).ok_or_else(not_found)? {
                Media::FileId(id) => match this.stored_file(&id) {
                    Ok(file) => (vec![file.ok_or_else(|| this.too_large())?], false),
                    Err(FileStoreError::NotFound { .. }) => return Err(not_found()),
                    Err(error) => return Err(unreadable(error)),
                },
                Media::Files { files, is_list } => {
                    let files = files.into_iter().map(|file| this.present(file).ok_or_else(not_found));
                    (files.collect::<Result<_, _>>()?, is_list)
                }
            };
            Ok(Fetched { files, is_list, to_keep: vec![] })
        })
        .await
    }

    /// Returns a kept file as it is now. A file in the operator's directory may have changed or
    /// gone, and some systems clean up temporary files.
    fn present(&self, file: LocalFile) -> Option<LocalFile> {
        if file.is_temporary() {
            return file.path().exists().then_some(file);
        }
        let path = file.path().canonicalize().ok().filter(|path| path == file.path())?;
        self.hashed(path, None).ok()
    }

    /// Keeps what was fetched, if it came with a `uuid`.
    pub async fn keep(&self, fetched: Fetched, caller: &Caller) -> Result<(), MediaError> {
        if fetched.to_keep.is_empty() {
            return Ok(());
        }
        let (named, owner) = (self.named.clone(), Owner::of(caller));
        blocking(move || {
            for (uuid, media) in fetched.to_keep {
                named.put(owner, uuid, media);
            }
            Ok(())
        })
        .await
    }

    /// Media with a `uuid`.
    pub fn named(&self) -> &Arc<NamedMedia> {
        &self.named
    }
}
