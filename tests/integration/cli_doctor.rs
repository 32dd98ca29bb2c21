//! `doctor` and `health`, through the binary: what is wrong with a machine is found and told.

use std::{
    net::TcpListener,
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;

use crate::{
    checkpoint_damage::edit,
    checkpoint_open::{SINGLE, add_tokenizer, copy_of},
    server_process::Server,
};

fn doctor(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tinyllava"));
    // A port of its own: other tests' servers must not matter.
    command.args(["doctor", "--json", "--port", "0"]).args(arguments);
    command
}

/// Level, what was found, and the fix, of one check.
fn finding(output: &Output, check: &str) -> (String, String, String) {
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let checks = report["checks"].as_array().unwrap();
    let found = checks.iter().find(|found| found["check"] == check);
    let found = found.unwrap_or_else(|| panic!("no {check} in {report}"));
    (text(&found["level"]), text(&found["found"]), text(&found["fix"]))
}

#[test]
fn a_machine_that_can_serve_has_no_problem_and_decodes_every_codec() {
    let output = doctor(&[]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let (level, found, _) = finding(&output, "codecs");
    assert_eq!(level, "ok");
    assert!(found.contains("h264") && found.contains("mpeg4"), "{found}");
    let (level, found, _) = finding(&output, "model");
    assert!(level == "ok" && found.starts_with("nano: "), "{found}");
}

#[test]
fn without_ffmpeg_it_says_how_to_get_it() {
    let output = doctor(&[]).env("PATH", "/nowhere").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let (level, _, fix) = finding(&output, "ffmpeg");
    assert!(level == "problem" && fix.contains("apt-get install ffmpeg"), "{fix}");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("1 problem: the server would not start"), "{stderr}");
}

#[test]
fn a_program_that_is_no_ffmpeg_is_a_problem() {
    let dir = tempfile::tempdir().unwrap();
    let ffmpeg = dir.path().join("ffmpeg");
    std::os::unix::fs::symlink("/bin/false", &ffmpeg).unwrap();
    let output = doctor(&["--ffmpeg", ffmpeg.to_str().unwrap()]).output().unwrap();
    let (level, found, _) = finding(&output, "ffmpeg");
    assert!(level == "problem" && found.contains("does not run"), "{found}");
}

#[test]
fn a_damaged_model_is_found_without_loading_it() {
    let copy = copy_of("tiny");
    add_tokenizer(copy.path());
    let model = copy.path().to_str().unwrap();
    let whole = doctor(&["--model", model]).output().unwrap();
    assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stdout));
    edit(&copy.path().join(SINGLE), |header, _| {
        header.remove("connector._connector.latents");
    });
    let damaged = doctor(&["--model", model]).output().unwrap();
    assert_eq!(damaged.status.code(), Some(1));
    let (level, found, fix) = finding(&damaged, "model");
    assert!(level == "problem" && !fix.is_empty(), "{found}");
}

#[test]
fn a_taken_port_is_a_problem() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = doctor(&["--metrics-port", &port]).output().unwrap();
    let (level, found, fix) = finding(&output, "metrics port");
    assert!(level == "problem" && found.contains(&port) && fix.contains("--metrics-port"), "{found}");
    assert_eq!(finding(&output, "port").0, "ok");
}

#[test]
fn too_little_memory_for_full_caches_is_a_warning_and_so_is_a_small_cache() {
    let huge = ["--model", "synth:r1", "--max-running", "100000", "--kv-cache-mib", "100000000"];
    let output = doctor(&huge).output().unwrap();
    let (level, _, fix) = finding(&output, "memory");
    assert!(level == "warning" && fix.contains("--kv-cache-mib"), "{fix}");
    let output = doctor(&["--model", "synth:r1", "--kv-cache-mib", "64"]).output().unwrap();
    let (level, found, fix) = finding(&output, "kv cache");
    assert!(level == "warning" && fix.contains("--kv-cache-mib 108"), "{found}; {fix}");
}

#[test]
fn a_port_that_two_flags_name_is_a_problem() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let events = format!("bind:tcp://127.0.0.1:{free}");
    let output =
        doctor(&["--metrics-port", &free.to_string(), "--kv-events-endpoint", &events]).output().unwrap();
    assert_eq!(finding(&output, "metrics port").0, "ok");
    let (level, found, fix) = finding(&output, "kv events port");
    assert!(level == "problem" && fix.contains("--kv-events-endpoint"), "{found}");
}

#[test]
fn a_model_that_is_not_here_and_may_not_be_downloaded_is_a_problem() {
    let home = tempfile::tempdir().unwrap();
    let level = |offline: &str| {
        let mut command = doctor(&["--model", "someone/some-model"]);
        let output = command.env("HF_HOME", home.path()).env("HF_HUB_OFFLINE", offline).output().unwrap();
        finding(&output, "model").0
    };
    assert_eq!((level("1").as_str(), level("0").as_str()), ("problem", "warning"));
}

#[test]
fn decoders_that_do_not_start_under_their_limits_are_a_problem() {
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/bin/false", dir.path().join("prlimit")).unwrap();
    let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
    let output = doctor(&[]).env("PATH", path).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(finding(&output, "decoder limits").0, "problem");
    let (level, found, _) = finding(&output, "codecs");
    assert!(level == "problem" && found.contains("h264"), "{found}");
}

#[test]
fn unreadable_keys_and_unwritable_directories_are_problems() {
    let keys = doctor(&["--api-key-file", "/no/such/file"]).output().unwrap();
    assert_eq!(finding(&keys, "access").0, "problem");
    // Also root cannot make files there.
    let files = doctor(&["--files-dir", "/proc/files"]).output().unwrap();
    assert_eq!(finding(&files, "files directory").0, "problem");
    assert!(!Path::new("/proc/files").exists());
}

#[test]
fn lines_for_people_have_one_a_check() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_tinyllava")).args(["doctor", "--port", "0"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().count() >= 10, "{text}");
    for line in text.lines() {
        assert!(["ok ", "warning ", "problem "].iter().any(|level| line.starts_with(level)), "{line}");
    }
}

#[test]
fn health_succeeds_exactly_when_the_server_answers() {
    let health = |more: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_tinyllava")).arg("health").args(more).output().unwrap()
    };
    let server = Server::start(&[]);
    let url = server.url.clone();
    for more in [&["--url", &url][..], &["--url", &url, "--ready"]] {
        let output = health(more);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    server.stop();
    let output = health(&["--url", &url]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && stderr.contains("does not answer"), "{stderr}");
}
