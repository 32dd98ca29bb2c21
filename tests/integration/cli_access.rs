//! Keys and certificates of the binary itself: from its options, its environment and its files.

use std::{path::Path, process::Command};

use crate::{http_tls::SelfSigned, server_process::Server};

/// The status of `GET /v1/models` with a key.
fn status(server: &Server, key: &str, more: &[&str]) -> String {
    let curl = Command::new("curl")
        .args(["-sS", "-o", "/dev/null", "-w", "%{http_code}"])
        .args(["-H", &format!("authorization: Bearer {key}")])
        .args(more)
        .arg(format!("{}/v1/models", server.url))
        .output()
        .unwrap();
    String::from_utf8(curl.stdout).unwrap()
}

#[test]
fn keys_come_from_the_environment_and_are_never_logged() {
    let variables = [("TINYLLAVA_API_KEY", "key-of-ann, key-of-bob"), ("RUST_LOG", "trace")];
    let server = Server::start_in(&variables, &["--metrics-port", "0"]);
    assert_eq!(status(&server, "key-of-ann", &[]), "200");
    assert_eq!(status(&server, "key-of-bob", &[]), "200");
    assert_eq!(status(&server, "key-of-eve", &[]), "401");
    let log = server.stop();
    assert!(!log.iter().any(|line| line.contains("key-of-")), "{log:?}");
}

#[test]
fn every_flag_of_the_server_is_in_the_readme() {
    let help = Command::new(env!("CARGO_BIN_EXE_tinyllava")).args(["serve", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let words = help
        .lines()
        .filter_map(|line| line.trim_start().split([' ', '=']).find(|word| word.starts_with("--")));
    let flags: Vec<&str> = words.filter(|flag| *flag != "--help").collect();
    assert!(flags.len() > 30, "{flags:?}");
    let readme = std::fs::read_to_string("README.md").unwrap();
    for flag in flags {
        assert!(readme.contains(&format!("`{flag}`")), "README.md does not tell of {flag}");
    }
}

#[test]
fn files_are_read_again_at_hangup_and_bad_ones_change_nothing() {
    let certificate = SelfSigned::new();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let (cert, key) = (path(&certificate.certificate), path(&certificate.key));
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "# keys\nold-key\n").unwrap();
    let file = path(keys.path());
    let arguments = ["--api-key-file", &file, "--tls-cert", &cert, "--tls-key", &key];
    let mut server = Server::start(&arguments);
    assert!(server.url.starts_with("https://"), "{}", server.url);
    let trust = ["--cacert", &cert];
    assert_eq!(status(&server, "old-key", &trust), "200");
    for (text, logged, old, new) in [
        ("", "stay as they were", "200", "401"),
        ("two words\n", "line 1", "200", "401"),
        ("new-key\n", "again", "401", "200"),
    ] {
        std::fs::write(keys.path(), text).unwrap();
        server.signal("-HUP");
        server.until_logged(logged);
        assert_eq!(
            (status(&server, "old-key", &trust), status(&server, "new-key", &trust)),
            (old.into(), new.into())
        );
    }
    server.stop();
}

#[test]
fn a_server_that_cannot_be_locked_does_not_start() {
    let certificate = SelfSigned::new();
    let (cert, key) = (certificate.certificate.to_str().unwrap(), certificate.key.to_str().unwrap());
    for (arguments, said) in [
        (vec!["--api-key", ""], "visible ASCII"),
        (vec!["--api-key", "two words"], "visible ASCII"),
        (vec!["--api-key-file", "no-such"], "cannot read the API keys from no-such"),
        (vec!["--tls-cert", cert], "--tls-key <FILE>"),
        (vec!["--tls-key", key], "--tls-cert <FILE>"),
        (vec!["--tls-cert", key, "--tls-key", key], "has no certificate"),
        (vec!["--cors-origin", "example.org"], "scheme://host"),
    ] {
        let run = Command::new(env!("CARGO_BIN_EXE_tinyllava"))
            .args(["serve", "--port", "0"])
            .args(&arguments)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&run.stderr);
        assert!(!run.status.success() && stderr.contains(said), "{arguments:?}: {stderr}");
        assert!(!stderr.contains("two words"), "{stderr}");
    }
}
