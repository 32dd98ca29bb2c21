//! What the files in `deploy/` and the Dockerfile say must be true of the binary: flags, times, files.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files_below(&path)) } else { found.push(path) }
    }
    found
}

/// Numbers that stand behind `name`.
fn numbers(text: &str, name: &str) -> Vec<u64> {
    let digits = |rest: &str| rest.chars().take_while(char::is_ascii_digit).collect::<String>();
    text.lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .flat_map(|line| line.split(name).skip(1))
        .filter_map(|rest| digits(rest).parse().ok())
        .collect()
}

fn one_number(text: &str, name: &str) -> u64 {
    let found = numbers(text, name);
    assert!(!found.is_empty() && found.iter().all(|number| *number == found[0]), "{name}: {found:?}");
    found[0]
}

#[test]
fn every_flag_of_the_deployments_is_one_of_the_server() {
    let help = Command::new(env!("CARGO_BIN_EXE_tinyllava")).args(["serve", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let mut seen = 0;
    let mut files = files_below(Path::new("deploy/kubernetes"));
    files
        .extend(["deploy/compose.yaml", "deploy/systemd/tinyllava.service", "Dockerfile"].map(PathBuf::from));
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        // The endpoint picker is another program.
        if file.ends_with("picker.yaml") {
            continue;
        }
        let commands = text.lines().filter(|line| {
            let line = line.trim_start();
            let is_command =
                line.contains("serve, ") || line.contains("\"serve\"") || line.starts_with("Exec");
            line.starts_with("- --") || is_command && !line.starts_with('#')
        });
        for word in commands.flat_map(|line| line.split([' ', '[', ']', ',', '"', '='])) {
            if word.starts_with("--") {
                assert!(
                    help.contains(&format!("{word} ")) || help.contains(&format!("{word}\n")),
                    "{file:?}: {word}"
                );
                seen += 1;
            }
        }
    }
    assert!(seen > 10, "only {seen} flags found");
}

#[test]
fn pods_services_and_containers_are_killed_only_after_the_drain() {
    let pods = std::fs::read_to_string("deploy/kubernetes/base/deployment.yaml").unwrap();
    let longest_stop = |text: &str| one_number(text, "--drain-delay=") + one_number(text, "--drain-timeout=");
    assert_eq!(one_number(&pods, "terminationGracePeriodSeconds: "), longest_stop(&pods) + 10);
    assert!(!pods.contains("preStop"), "a sleep before SIGTERM would come on top");
    let overlay =
        std::fs::read_to_string("deploy/kubernetes/overlays/inference-gateway/deployment.yaml").unwrap();
    assert_eq!(longest_stop(&overlay), longest_stop(&pods), "the overlay has the base's grace period");
    let unit = std::fs::read_to_string("deploy/systemd/tinyllava.service").unwrap();
    assert!(one_number(&unit, "TimeoutStopSec=") >= longest_stop(&unit) + 10);
    let compose = std::fs::read_to_string("deploy/compose.yaml").unwrap();
    assert!(one_number(&compose, "stop_grace_period: ") >= one_number(&compose, "--drain-timeout=") + 10);
}

#[test]
fn the_builder_is_given_every_file_that_the_binary_embeds() {
    let ignore = std::fs::read_to_string(".dockerignore").unwrap();
    let given: Vec<&str> = ignore.lines().filter_map(|line| line.strip_prefix('!')).collect();
    let mut embedded = 0;
    // Files of unit tests alone are no part of the binary.
    let sources = files_below(Path::new("src")).into_iter().filter(|file| !file.ends_with("tests.rs"));
    for file in sources {
        let text = std::fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for include in ["include_str!(\"", "include_bytes!(\""] {
            for rest in code.split(include).skip(1) {
                let path = file.parent().unwrap().join(rest.split('"').next().unwrap());
                let path = path.canonicalize().unwrap();
                let path = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().to_str().unwrap();
                let is_given = given.iter().any(|pattern| match pattern.split_once('*') {
                    Some((before, after)) => path.starts_with(before) && path.ends_with(after),
                    None => path == *pattern || path.starts_with(&format!("{pattern}/")),
                });
                assert!(is_given, ".dockerignore keeps {path} from the builder");
                embedded += 1;
            }
        }
    }
    assert!(embedded > 5, "only {embedded} embedded files found");
}

#[test]
fn the_largest_request_passes_the_ingress() {
    let ingress = std::fs::read_to_string("deploy/kubernetes/components/ingress/ingress.yaml").unwrap();
    // --max-video-mib's default in base64, and 4 MiB beside: as `serve` computes it.
    assert!(one_number(&ingress, "proxy-body-size: ") >= 128 / 3 * 4 + 4);
    for timeout in ["proxy-read-timeout: \"", "proxy-send-timeout: \""] {
        assert!(one_number(&ingress, timeout) > 600, "{timeout}");
    }
}
