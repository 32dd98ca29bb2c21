//! Downloads from a fake hub on the loopback: resume, tokens, revisions, redirects, damage, and life without network.

use std::{path::Path, sync::Mutex, time::Duration};

use tinyllava::model::{
    checkpoint::Checkpoint,
    hub::{Hub, HubConfig, HubError, HubProgress, Repo},
};

use super::{
    checkpoint_forms::with_pickle_shards,
    hub_fake::{COMMIT, Mischief, SHARD, Setup, golden},
};

fn assert_same_as_golden(dir: &Path) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let original = golden().join(path.file_name().unwrap());
        assert!(
            std::fs::read(&path).unwrap() == std::fs::read(original).unwrap(),
            "{} differs",
            path.display()
        );
    }
    Checkpoint::open_directory("org/tiny".into(), dir).unwrap();
}

#[tokio::test]
async fn a_repository_is_downloaded_once_and_opens() {
    let setup = Setup::new(Mischief::default()).await;
    let last = Mutex::new((0, 0));
    let progress = |p: HubProgress<'_>| *last.lock().unwrap() = (p.done_bytes, p.total_bytes);
    let repo = Repo::parse("org/tiny").unwrap();
    let dir = setup.client(None).download(&repo, &progress).await.unwrap();
    assert_same_as_golden(&dir);
    let (done, total) = *last.lock().unwrap();
    assert_eq!(done, total);
    assert!(total > 1_640_448);
    assert!(!dir.join("README.md").exists() && !dir.join("golden.safetensors").exists());
    // The pointers are links into the blobs, as the hub's other tools make them.
    assert!(dir.ends_with(format!("models--org--tiny/snapshots/{COMMIT}")));
    let blob = std::fs::read_link(dir.join(SHARD)).unwrap();
    assert!(blob.starts_with("../../blobs"), "{}", blob.display());

    setup.take_requests("");
    assert_eq!(setup.download("org/tiny").await.unwrap(), dir);
    let second: Vec<_> = setup.take_requests("").into_iter().map(|request| request.path).collect();
    assert_eq!(second, ["list main"]);
}

#[tokio::test]
async fn a_broken_connection_goes_on_where_it_broke_off() {
    let setup = Setup::new(Mischief { cut_after: 100_000, num_cuts: 2, ..Mischief::default() }).await;
    let dir = setup.download("org/tiny").await.unwrap();
    assert_same_as_golden(&dir);
    let requests = setup.take_requests(&format!("cdn {SHARD}"));
    let starts: Vec<_> = requests.into_iter().flat_map(|request| request.range).collect();
    assert_eq!((starts.len(), starts[0].as_str()), (3, "bytes=0-"));
    assert!(starts[1..].iter().all(|start| start != "bytes=0-"), "{starts:?}");
}

#[tokio::test]
async fn a_download_that_was_given_up_resumes_in_the_next_run() {
    let stalled = Mischief { cut_after: 100_000, num_cuts: 1, stall: true, ..Mischief::default() };
    let setup = Setup::new(stalled).await;
    let (client, repo) = (setup.client(None), Repo::parse("org/tiny").unwrap());
    let blobs = setup.cache.path().join("models--org--tiny/blobs");
    let half_a_shard_is_here = async {
        while !std::fs::read_dir(&blobs).is_ok_and(|mut files| {
            files.any(|file| file.unwrap().metadata().is_ok_and(|metadata| metadata.len() == 100_000))
        }) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        result = client.download(&repo, &|_| ()) => panic!("{result:?}"),
        () = half_a_shard_is_here => {}
    }
    assert_eq!(client.cached(&repo), None);
    setup.take_requests("");
    let dir = setup.download("org/tiny").await.unwrap();
    assert_same_as_golden(&dir);
    let resumed = setup.take_requests(&format!("cdn {SHARD}"));
    assert_eq!(resumed.len(), 1);
    assert_eq!(resumed[0].range.as_deref(), Some("bytes=100000-"));
}

#[tokio::test]
async fn a_connection_that_never_brings_anything_is_given_up() {
    let setup = Setup::new(Mischief { cut_after: 0, num_cuts: usize::MAX, ..Mischief::default() }).await;
    let error = setup.download("org/tiny").await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, HubError::Interrupted { .. }), "{text}");
    assert!(text.contains(SHARD) && text.contains("run again"), "{text}");
}

#[tokio::test]
async fn a_server_without_ranges_starts_the_file_again() {
    let mischief = Mischief { cut_after: 100_000, num_cuts: 1, ignore_range: true, ..Mischief::default() };
    let setup = Setup::new(mischief).await;
    assert_same_as_golden(&setup.download("org/tiny").await.unwrap());
}

#[tokio::test]
async fn a_damaged_file_is_thrown_away_and_named() {
    let setup = Setup::new(Mischief { damage: true, ..Mischief::default() }).await;
    let error = setup.download("org/tiny").await.unwrap_err();
    assert!(matches!(&error, HubError::Damaged { file, .. } if file == SHARD), "{error}");
    setup.hub.mischief.lock().unwrap().damage = false;
    assert_same_as_golden(&setup.download("org/tiny").await.unwrap());
}

#[tokio::test]
async fn without_a_token_the_error_says_to_set_one() {
    let setup = Setup::new(Mischief { token: Some("secret"), ..Mischief::default() }).await;
    let error = setup.download("org/tiny").await.unwrap_err().to_string();
    assert!(error.contains("org/tiny") && error.contains("set HF_TOKEN"), "{error}");
    let repo = Repo::parse("org/tiny").unwrap();
    let error = setup.client(Some("wrong")).download(&repo, &|_| ()).await.unwrap_err().to_string();
    assert!(error.contains("the token in HF_TOKEN may not read"), "{error}");
    assert_same_as_golden(&setup.client(Some("secret")).download(&repo, &|_| ()).await.unwrap());
}

#[tokio::test]
async fn the_token_stays_with_the_hub() {
    let setup = Setup::new(Mischief { token: Some("secret"), ..Mischief::default() }).await;
    let repo = Repo::parse("org/tiny").unwrap();
    setup.client(Some("secret")).download(&repo, &|_| ()).await.unwrap();
    let requests = setup.take_requests("");
    for request in &requests {
        let expected = (!request.path.starts_with("cdn")).then_some("Bearer secret");
        assert_eq!(request.token.as_deref(), expected, "{}", request.path);
    }
    assert!(requests.iter().any(|request| request.path.starts_with("cdn")));
}

#[tokio::test]
async fn what_the_hub_does_not_have_is_named() {
    let setup = Setup::new(Mischief::default()).await;
    for repo in ["org/other", "org/tiny@v9"] {
        let error = setup.download(repo).await.unwrap_err();
        assert!(matches!(error, HubError::NotFound { .. }), "{error}");
        assert!(error.to_string().contains(repo), "{error}");
    }
}

#[tokio::test]
async fn a_pinned_revision_is_asked_for_and_a_commit_needs_no_network() {
    let setup = Setup::new(Mischief::default()).await;
    let dir = setup.download("org/tiny@v1").await.unwrap();
    let requests = setup.take_requests("");
    assert_eq!(requests[0].path, "list v1");
    assert!(requests[1..].iter().all(|r| r.path.starts_with("cdn") || r.path.contains(COMMIT)));
    assert_eq!(setup.download(&format!("org/tiny@{COMMIT}")).await.unwrap(), dir);
    assert!(setup.take_requests("").is_empty());
}

#[tokio::test]
async fn a_complete_cache_needs_no_network_and_an_incomplete_one_says_so() {
    let setup = Setup::new(Mischief::default()).await;
    let dir = setup.download("org/tiny").await.unwrap();
    setup.stop();
    assert_eq!(setup.download("org/tiny").await.unwrap(), dir);
    let offline = Hub::new(HubConfig {
        endpoint: setup.endpoint.clone(),
        token: None,
        cache_dir: setup.cache.path().to_owned(),
        offline: true,
    });
    let repo = Repo::parse("org/tiny").unwrap();
    assert_eq!(offline.download(&repo, &|_| ()).await.unwrap(), dir);
    std::fs::remove_file(dir.join(SHARD)).unwrap();
    assert!(matches!(offline.download(&repo, &|_| ()).await, Err(HubError::NotDownloaded { .. })));
    let error = setup.download("org/tiny").await.unwrap_err();
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("HF_ENDPOINT"), "{error}");
}

#[tokio::test]
async fn two_downloads_of_the_same_repository_share_the_work() {
    let setup = Setup::new(Mischief::default()).await;
    let (a, b) = tokio::join!(setup.download("org/tiny"), setup.download("org/tiny"));
    assert_eq!(a.unwrap(), b.unwrap());
    assert_eq!(setup.take_requests(&format!("cdn {SHARD}")).len(), 1);
}

#[tokio::test]
async fn pytorch_shards_are_downloaded_and_need_no_network_afterwards() {
    let source = with_pickle_shards();
    let setup = Setup::with_files_of(source.path(), Mischief::default()).await;
    let dir = setup.download("org/tiny").await.unwrap();
    for name in ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"] {
        assert!(std::fs::read(dir.join(name)).unwrap() == std::fs::read(source.path().join(name)).unwrap());
    }
    Checkpoint::open_directory("org/tiny".into(), &dir).unwrap();
    setup.stop();
    assert_eq!(setup.download("org/tiny").await.unwrap(), dir);
    std::fs::remove_file(dir.join("pytorch_model-00002-of-00002.bin")).unwrap();
    let error = setup.download("org/tiny").await.unwrap_err();
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
}

#[tokio::test]
async fn a_repository_with_an_adapter_is_refused_before_anything_is_downloaded() {
    let source = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, source.path().join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(source.path().join("adapter_config.json"), "{}").unwrap();
    let setup = Setup::with_files_of(source.path(), Mischief::default()).await;
    let error = setup.download("org/tiny").await.unwrap_err();
    assert!(matches!(&error, HubError::Adapter { file, .. } if file == "adapter_config.json"), "{error}");
    let requests: Vec<_> = setup.take_requests("").into_iter().map(|request| request.path).collect();
    assert_eq!(requests, ["list main"]);
}
