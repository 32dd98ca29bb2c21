//! What the store keeps, forgets, refuses, and finds again.

use std::io::Read;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::config::FilesConfig;

fn config(dir: &TempDir, files: FilesConfig) -> MediaConfig {
    MediaConfig { files: FilesConfig { dir: Some(dir.path().into()), ..files }, ..MediaConfig::default() }
}

fn store(dir: &TempDir) -> Arc<FileStore> {
    FileStore::open(&config(dir, FilesConfig::default())).unwrap()
}

fn label(filename: &str) -> FileLabel {
    FileLabel { filename: filename.into(), purpose: "user_data".into(), lifetime: None }
}

fn put(store: &Arc<FileStore>, bytes: &[u8]) -> Result<FileRecord, FileStoreError> {
    let mut upload = store.begin()?;
    upload.write(bytes)?;
    upload.finish(label("a.mp4"))
}

fn content(store: &FileStore, id: &str) -> Vec<u8> {
    let (record, mut file) = store.read(id).unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, record.num_bytes);
    bytes
}

/// Names in a folder of the directory.
fn names(dir: &TempDir, folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(dir.path().join(folder)).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn the_same_bytes_are_stored_once_and_go_with_the_last_file() {
    let dir = TempDir::new().unwrap();
    let store = store(&dir);
    let (first, second) = (put(&store, b"hello").unwrap(), put(&store, b"hello").unwrap());
    assert_ne!(first.id, second.id);
    assert_eq!(first.content_hash, <[u8; 32]>::from(Sha256::digest(b"hello")));
    assert_eq!(names(&dir, "blobs").len(), 1);
    assert!(names(&dir, "uploads").is_empty());
    store.delete(&first.id).unwrap();
    assert_eq!(content(&store, &second.id), b"hello");
    assert!(matches!(store.delete(&first.id), Err(FileStoreError::NotFound { id }) if id == first.id));
    store.delete(&second.id).unwrap();
    assert!(names(&dir, "blobs").is_empty() && names(&dir, "records").is_empty());
}

#[test]
fn files_survive_a_restart_and_a_directory_has_one_server() {
    let dir = TempDir::new().unwrap();
    let first = store(&dir);
    let record = put(&first, b"hello").unwrap();
    let again = FileStore::open(&config(&dir, FilesConfig::default()));
    assert!(matches!(again, Err(FileStoreError::InUse(_))));
    drop(first);
    let second = store(&dir);
    assert_eq!(second.list(), std::slice::from_ref(&record));
    assert_eq!(content(&second, &record.id), b"hello");
}

#[test]
fn damaged_entries_and_leftovers_of_a_crash_are_forgotten() {
    let dir = TempDir::new().unwrap();
    let first = store(&dir);
    let [whole, cut, lost, garbled] = [b"a", b"b", b"c", b"d"].map(|bytes| put(&first, bytes).unwrap());
    std::mem::forget(first.begin().unwrap().file.into_temp_path().keep());
    drop(first);
    let record_path = |record: &FileRecord| dir.path().join(format!("records/{}.json", record.id));
    let blob_path = |record: &FileRecord| {
        let hex: String = record.content_hash.iter().map(|byte| format!("{byte:02x}")).collect();
        dir.path().join("blobs").join(hex)
    };
    std::fs::write(blob_path(&cut), b"").unwrap();
    std::fs::remove_file(blob_path(&lost)).unwrap();
    std::fs::write(record_path(&garbled), b"{\"id\":").unwrap();
    std::fs::copy(record_path(&whole), dir.path().join("records/file-other.json")).unwrap();
    std::fs::write(dir.path().join("records/odd.json"), b"{}").unwrap();
    std::fs::write(dir.path().join("blobs/notes.txt"), b"the operator's own").unwrap();
    let second = store(&dir);
    assert_eq!(second.list(), [whole]);
    assert_eq!(names(&dir, "records").len(), 2, "the whole one and the operator's own");
    assert_eq!(names(&dir, "blobs").len(), 2, "the whole one and the operator's own");
    assert!(names(&dir, "uploads").is_empty());
}

#[test]
fn what_cannot_be_read_now_is_no_reason_to_forget_it() {
    let dir = TempDir::new().unwrap();
    let first = store(&dir);
    let record = put(&first, b"hello").unwrap();
    drop(first);
    // A folder opens but cannot be read as a file.
    let path = dir.path().join(format!("records/{}.json", record.id));
    let aside = dir.path().join("aside");
    std::fs::rename(&path, &aside).unwrap();
    std::fs::create_dir(&path).unwrap();
    let refused = FileStore::open(&config(&dir, FilesConfig::default()));
    assert!(matches!(refused, Err(FileStoreError::Disk { .. })), "{refused:?}");
    std::fs::remove_dir(&path).unwrap();
    std::fs::rename(&aside, &path).unwrap();
    assert_eq!(content(&store(&dir), &record.id), b"hello");
}

#[test]
fn bytes_whose_record_cannot_be_written_are_removed_again() {
    let dir = TempDir::new().unwrap();
    let store = store(&dir);
    let kept = put(&store, b"kept").unwrap();
    let (records, aside) = (dir.path().join("records"), dir.path().join("aside"));
    std::fs::rename(&records, &aside).unwrap();
    for bytes in [b"gone", b"kept"] {
        assert!(matches!(put(&store, bytes), Err(FileStoreError::Disk { .. })));
        assert_eq!(names(&dir, "blobs").len(), 1);
    }
    std::fs::rename(&aside, &records).unwrap();
    assert_eq!(content(&store, &kept.id), b"kept");
}

#[test]
fn every_limit_is_held_and_given_back() {
    let dir = TempDir::new().unwrap();
    let limits = FilesConfig { max_bytes: 10, max_files: 2, ..FilesConfig::default() };
    let media = MediaConfig { max_video_bytes: 8, ..config(&dir, limits) };
    let store = FileStore::open(&media).unwrap();
    assert!(matches!(put(&store, &[0; 9]), Err(FileStoreError::TooLarge { max_file_bytes: 8 })));
    let kept = put(&store, &[1; 8]).unwrap();
    assert!(matches!(put(&store, &[2; 3]), Err(FileStoreError::Full { max_bytes: 10 })));
    let mut running = store.begin().unwrap();
    running.write(&[3; 2]).unwrap();
    assert!(matches!(store.begin(), Err(FileStoreError::TooMany { max_files: 2 })));
    assert!(matches!(running.write(&[3]), Err(FileStoreError::Full { .. })));
    drop(running);
    assert!(names(&dir, "uploads").is_empty());
    put(&store, &[2; 2]).unwrap();
    store.delete(&kept.id).unwrap();
    put(&store, &[4; 8]).unwrap();
}

#[test]
fn files_expire_and_none_is_promised_to_stay_longer() {
    let dir = TempDir::new().unwrap();
    let limits = FilesConfig { max_age: Duration::from_secs(100), ..FilesConfig::default() };
    let store = FileStore::open(&config(&dir, limits)).unwrap();
    let lasting = |seconds| {
        let lifetime = Some(Duration::from_secs(seconds));
        store.begin().unwrap().finish(FileLabel { lifetime, ..label("a") })
    };
    assert!(matches!(lasting(101), Err(FileStoreError::LifetimeTooLong { max_seconds: 100 })));
    let (short, long) = (lasting(50).unwrap(), lasting(100).unwrap());
    assert_eq!(short.expires_ms, short.created_ms + 50_000);
    let mut shelf = store.shelf();
    shelf.remove_expired(short.expires_ms - 1);
    assert_eq!(shelf.files.len(), 2);
    shelf.remove_expired(short.expires_ms);
    assert_eq!(shelf.files.keys().collect::<Vec<_>>(), [&long.id]);
    drop(shelf);
    let gone = lasting(0).unwrap();
    assert!(matches!(store.get(&gone.id), Err(FileStoreError::NotFound { .. })));
}

#[test]
fn a_file_in_use_stays_readable_when_it_is_deleted() {
    let dir = TempDir::new().unwrap();
    let store = store(&dir);
    let record = put(&store, b"hello").unwrap();
    let (_, path) = store.borrow(&record.id).unwrap();
    let (_, mut open) = store.read(&record.id).unwrap();
    store.delete(&record.id).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"hello");
    let mut bytes = Vec::new();
    open.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"hello");
    drop(path);
    assert!(names(&dir, "uploads").is_empty() && names(&dir, "blobs").is_empty());
}

#[test]
fn without_a_directory_files_go_with_the_store() {
    let store = FileStore::open(&MediaConfig::default()).unwrap();
    assert!(store.list().is_empty());
    assert!(store.shelf().directory.is_none(), "nothing is made before the first upload");
    let record = put(&store, b"hello").unwrap();
    let (_, path) = store.borrow(&record.id).unwrap();
    let root = path.parent().unwrap().parent().unwrap().to_owned();
    drop((path, store));
    assert!(!root.exists());
}

proptest! {
    /// Only what was made here names a file, and nothing else ever becomes a path.
    #[test]
    fn ids_are_short_and_plain(text in "(file-)?[a-z0-9./\\\\\u{0}A-Z_-]{0,70}") {
        if is_id(&text) {
            let rest = text.strip_prefix("file-").unwrap();
            prop_assert!(rest.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()));
            prop_assert!((1..=64).contains(&rest.len()));
        }
    }
}
