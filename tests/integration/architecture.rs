//! The rules of the house that a machine can check: import directions, file sizes, headers.

use std::path::{Path, PathBuf};

/// Which modules of the crate a module may use (besides itself).
const IMPORTS: [(&str, &[&str]); 11] = [
    (
        "http",
        &["config", "engine", "media", "model", "output", "prompt", "scheduler", "shutdown", "telemetry"],
    ),
    ("media", &["config", "telemetry"]),
    ("prompt", &["scheduler"]),
    ("scheduler", &[]),
    ("engine", &["config", "model", "scheduler"]),
    ("model", &["scheduler"]),
    ("output", &["prompt", "scheduler"]),
    ("telemetry", &["config", "engine", "scheduler"]),
    ("config", &[]),
    ("shutdown", &[]),
    (
        "cli",
        &[
            "config",
            "engine",
            "http",
            "media",
            "model",
            "output",
            "prompt",
            "scheduler",
            "shutdown",
            "telemetry",
        ],
    ),
];

/// Where the unit tests of a file begin.
const UNIT_TESTS: &str = "#[cfg(test)]\nmod tests";
/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 5] = ["util", "common", "helper", "core", "misc"];
/// Longest file without its unit tests, lines.
const MAX_LINES: usize = 400;

fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut found = vec![];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(&root).unwrap().to_owned(), text));
            }
        }
    }
    assert!(found.len() > 30, "only {} files found", found.len());
    found
}

/// The module a file belongs to: its folder, or its own name.
fn module(path: &Path) -> &str {
    path.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs")
}

/// Whether a whole file is unit tests.
fn is_tests(path: &Path) -> bool {
    path.file_stem().is_some_and(|name| name == "tests")
}

/// The code of a file without comments and without its unit tests.
fn code(text: &str) -> String {
    let before_tests = text.split(UNIT_TESTS).next().unwrap_or_default();
    before_tests.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// The first names of all paths that follow `prefix`, single (`crate::a::b`) or grouped (`crate::{a::b, c}`).
fn used_after(prefix: &str, code: &str) -> Vec<String> {
    let mut names = vec![];
    for (at, _) in code.match_indices(prefix) {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        let name = |text: &str| {
            text.trim().split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap().to_owned()
        };
        match rest.strip_prefix('{') {
            None => names.push(name(rest)),
            Some(group) => {
                let (mut depth, mut item) = (0, String::new());
                for c in group.chars() {
                    match c {
                        '}' if depth == 0 => break,
                        ',' if depth == 0 => names.push(name(&std::mem::take(&mut item))),
                        _ => {
                            depth += i32::from(c == '{') - i32::from(c == '}');
                            item.push(c);
                        }
                    }
                }
                names.push(name(&item));
            }
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

#[test]
fn imports_go_one_way() {
    for (path, text) in sources() {
        let own = module(&path);
        if own == "main" || own == "lib" || is_tests(&path) {
            continue;
        }
        let (_, allowed) =
            IMPORTS.iter().find(|(name, _)| *name == own).unwrap_or_else(|| panic!("{own} is new"));
        for used in used_after("crate::", &code(&text)) {
            let fine = used == own || allowed.contains(&used.as_str());
            assert!(fine, "{} uses {used}, but {own} may use only {allowed:?}", path.display());
        }
    }
}

#[test]
fn the_scheduler_uses_std_only() {
    let scheduler = |path: &Path| module(path) == "scheduler" && !is_tests(path);
    for (path, text) in sources().into_iter().filter(|(path, _)| scheduler(path)) {
        let code = code(&text);
        for line in code.lines().map(str::trim) {
            let Some(used) = line.strip_prefix("use ").or_else(|| line.strip_prefix("pub use ")) else {
                continue;
            };
            let first = used.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
            let own = first.chars().next().is_some_and(char::is_lowercase) && is_scheduler_file(first);
            assert!(
                ["std", "crate", "super", "self"].contains(&first) || own,
                "{}: {line}: the scheduler uses std only",
                path.display()
            );
        }
        for clock in ["Instant", "SystemTime", "async fn", "rand"] {
            let words = code.split(|c: char| !c.is_alphanumeric() && c != '_' && c != ' ');
            assert!(!words.into_iter().any(|word| word.trim() == clock), "{}: {clock}", path.display());
        }
    }
}

fn is_scheduler_file(name: &str) -> bool {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/scheduler").join(format!("{name}.rs")).exists()
}

#[test]
fn every_file_opens_by_saying_what_it_is() {
    for (path, text) in sources() {
        assert!(text.starts_with("//! "), "{} has no header", path.display());
    }
}

#[test]
fn files_are_short_and_named_for_what_they_hold() {
    for (path, text) in sources() {
        let lines = text.split(UNIT_TESTS).next().unwrap_or_default().lines().count();
        assert!(is_tests(&path) || lines <= MAX_LINES, "{} has {lines} lines", path.display());
        let name = path.file_stem().unwrap().to_str().unwrap();
        assert!(!EMPTY_NAMES.contains(&name), "{} is named {name}", path.display());
    }
}

#[test]
fn status_codes_are_chosen_in_one_file() {
    for (path, text) in sources() {
        if module(&path) == "http" && path != Path::new("http/error.rs") {
            let code = code(&text);
            let chosen = code.match_indices("StatusCode::").any(|(at, _)| {
                // Comparing with a status is not choosing one.
                !code[..at].trim_end().ends_with("==") && !code[..at].ends_with("http::")
            });
            assert!(!chosen, "{} chooses a status", path.display());
        }
    }
}

#[test]
fn wire_forms_stay_in_http() {
    for (path, text) in sources() {
        let engine_side = ["engine", "scheduler", "model"].contains(&module(&path));
        assert!(!(engine_side && code(&text).contains("Serialize")), "{} has a wire form", path.display());
    }
}

#[test]
fn metric_names_are_in_one_file() {
    for (path, text) in sources() {
        if path != Path::new("telemetry/metrics.rs") {
            let code = code(&text);
            assert!(!code.contains("\"tinyllava_") && !code.contains("\"vllm:"), "{}", path.display());
        }
    }
}
