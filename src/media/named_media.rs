//! A bounded store of media that clients sent with a `uuid`, so that a later request may send the
//! `uuid` alone.
//!
//! Called by `source.rs`, on the blocking pool. Must never give one client the media of another:
//! names belong to an owner, which is made of the API key and the cache salt. A name stands for
//! what was sent under it last.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};

use super::{Caller, local_file::LocalFile};
use crate::config::NamedMediaConfig;

/// The owner of names. Clients with another key or salt are other owners.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner([u8; 32]);

impl Owner {
    pub fn of(caller: &Caller) -> Self {
        let mut hash = Sha256::new();
        // Each part with its length or its absence: no two owners are the same bytes.
        match &caller.client {
            Some(client) => hash.update([&[1][..], client].concat()),
            None => hash.update([0]),
        }
        if let Some(salt) = &caller.salt {
            hash.update([1]);
            hash.update(salt.as_bytes());
        }
        Owner(hash.finalize().into())
    }
}

/// The media that a name stands for.
#[derive(Debug, Clone)]
pub enum Media {
    /// The files themselves. Files that are not temporary belong to the operator and may change.
    Files { files: Vec<LocalFile>, is_list: bool },
    /// A file of the store, which keeps its bytes or deletes them.
    FileId(String),
}

impl Media {
    /// Disk space that only this store holds.
    fn num_bytes(&self) -> u64 {
        match self {
            Media::Files { files, .. } => {
                files.iter().filter(|file| file.is_temporary()).map(|file| file.num_bytes as u64).sum()
            }
            Media::FileId(_) => 0,
        }
    }
}

type Name = (Owner, String);

/// See the module.
#[derive(Debug)]
pub struct NamedMedia {
    max_bytes: u64,
    max_entries: usize,
    max_idle: Duration,
    kept: Mutex<Kept>,
}

#[derive(Debug)]
struct Entry {
    media: Media,
    /// Time of the last use, and its key in `by_use`.
    used: Instant,
    use_number: u64,
}

#[derive(Debug, Default)]
struct Kept {
    entries: HashMap<Name, Entry>,
    /// Names in the order of their last use.
    by_use: BTreeMap<u64, Name>,
    num_uses: u64,
    num_bytes: u64,
}

impl NamedMedia {
    pub fn new(config: &NamedMediaConfig) -> Self {
        NamedMedia {
            max_bytes: config.max_bytes,
            max_entries: config.max_entries,
            max_idle: config.max_idle,
            kept: Mutex::default(),
        }
    }

    /// Keeps `media` under a name and drops what had the name before. Evicts the least recently
    /// used entries to make room. Media that is larger than the store is not kept.
    pub fn put(&self, owner: Owner, uuid: String, media: Media) {
        let name = (owner, uuid);
        let num_bytes = media.num_bytes();
        self.change(Instant::now(), |kept, removed| {
            removed.extend(kept.remove(&name));
            if num_bytes > self.max_bytes || self.max_entries == 0 {
                return;
            }
            while kept.num_bytes + num_bytes > self.max_bytes || kept.entries.len() >= self.max_entries {
                removed.extend(kept.remove_oldest());
            }
            kept.insert(name, media);
        });
    }

    /// Returns the media of a name, and marks it as used.
    pub fn get(&self, owner: Owner, uuid: &str) -> Option<Media> {
        let name = (owner, uuid.to_owned());
        let mut found = None;
        self.change(Instant::now(), |kept, _| {
            if let Some(entry) = kept.remove(&name) {
                found = Some(entry.media.clone());
                kept.insert(name, entry.media);
            }
        });
        found
    }

    /// Drops media that was not used for a long time.
    pub fn remove_idle(&self) {
        self.change(Instant::now(), |_, _| {});
    }

    /// Drops old entries, then runs `work`. Removed entries are dropped, which deletes their files,
    /// after the lock is released.
    fn change(&self, now: Instant, work: impl FnOnce(&mut Kept, &mut Vec<Entry>)) {
        let mut removed = Vec::new();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        while kept.oldest_use().is_some_and(|used| now.duration_since(used) >= self.max_idle) {
            removed.extend(kept.remove_oldest());
        }
        work(&mut kept, &mut removed);
        drop(kept);
        drop(removed);
    }
}

impl Kept {
    fn insert(&mut self, name: Name, media: Media) {
        self.num_uses += 1;
        self.num_bytes += media.num_bytes();
        self.by_use.insert(self.num_uses, name.clone());
        self.entries.insert(name, Entry { media, used: Instant::now(), use_number: self.num_uses });
    }

    fn remove(&mut self, name: &Name) -> Option<Entry> {
        let entry = self.entries.remove(name)?;
        self.by_use.remove(&entry.use_number);
        self.num_bytes -= entry.media.num_bytes();
        Some(entry)
    }

    fn remove_oldest(&mut self) -> Option<Entry> {
        let name = self.by_use.first_key_value()?.1.clone();
        self.remove(&name)
    }

    fn oldest_use(&self) -> Option<Instant> {
        let (_, name) = self.by_use.first_key_value()?;
        self.entries.get(name).map(|entry| entry.used)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use proptest::prelude::*;
    use tempfile::NamedTempFile;

    use super::*;
    use crate::media::local_file::Hashed;

    fn owner(client: Option<u8>, salt: Option<&str>) -> Owner {
        let caller =
            Caller { client: client.map(|byte| [byte; 32]), salt: salt.map(Into::into), ..Caller::default() };
        Owner::of(&caller)
    }

    fn media(num_bytes: usize) -> (Media, PathBuf) {
        let file = NamedTempFile::new().unwrap().into_temp_path();
        let path = file.to_path_buf();
        let hashed = Hashed { content_hash: [0; 32], num_bytes };
        let files = vec![LocalFile::new(path.clone(), hashed, Some(file))];
        (Media::Files { files, is_list: false }, path)
    }

    fn store(max_bytes: u64, max_entries: usize) -> NamedMedia {
        NamedMedia::new(&NamedMediaConfig { max_bytes, max_entries, ..NamedMediaConfig::default() })
    }

    #[test]
    fn names_belong_to_their_key_and_salt() {
        let owners = [
            owner(None, None),
            owner(None, Some("")),
            owner(None, Some("a")),
            owner(Some(1), None),
            owner(Some(2), None),
            owner(Some(1), Some("a")),
        ];
        let store = store(100, 100);
        for (number, owner) in owners.iter().enumerate() {
            assert!(store.get(*owner, "7").is_none(), "{number}");
            store.put(*owner, "7".into(), Media::FileId(number.to_string()));
        }
        for (number, owner) in owners.iter().enumerate() {
            let found = store.get(*owner, "7");
            assert!(matches!(found, Some(Media::FileId(id)) if id == number.to_string()));
        }
    }

    #[test]
    fn the_least_recently_used_makes_room_and_its_file_goes() {
        let (store, me) = (store(10, 3), owner(None, None));
        let (first, first_path) = media(4);
        let (second, second_path) = media(4);
        store.put(me, "a".into(), first);
        store.put(me, "b".into(), second);
        assert!(store.get(me, "a").is_some());
        let (third, third_path) = media(4);
        store.put(me, "c".into(), third);
        assert!(store.get(me, "b").is_none() && !second_path.exists());
        assert!(first_path.exists() && third_path.exists());
        let (large, large_path) = media(11);
        store.put(me, "a".into(), large);
        assert!(store.get(me, "a").is_none(), "what is not kept does not leave the old one under its name");
        assert!(!large_path.exists() && !first_path.exists());
        for name in ["d", "e", "f"] {
            store.put(me, name.into(), Media::FileId(name.into()));
        }
        assert!(store.get(me, "c").is_none(), "three entries at most");
    }

    #[test]
    fn what_nobody_asks_for_goes() {
        let config = NamedMediaConfig { max_idle: Duration::ZERO, ..NamedMediaConfig::default() };
        let store = NamedMedia::new(&config);
        let (kept, path) = media(1);
        store.put(owner(None, None), "a".into(), kept);
        assert!(path.exists());
        store.remove_idle();
        assert!(!path.exists());
    }

    proptest! {
        /// The store never holds more than it may, and its counts are those of its entries.
        #[test]
        fn limits_hold_whatever_is_put(puts in prop::collection::vec((0u8..6, 0usize..8, any::<bool>()), 0..60)) {
            let (store, me) = (store(12, 4), owner(None, None));
            for (name, num_bytes, is_get) in puts {
                let name = name.to_string();
                if is_get {
                    store.get(me, &name);
                } else {
                    store.put(me, name, media(num_bytes).0);
                }
                let kept = store.kept.lock().unwrap();
                let sum: u64 = kept.entries.values().map(|entry| entry.media.num_bytes()).sum();
                prop_assert!(sum == kept.num_bytes && sum <= 12 && kept.entries.len() <= 4);
                prop_assert_eq!(kept.by_use.len(), kept.entries.len());
            }
        }
    }
}
