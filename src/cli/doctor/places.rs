//! Ports, directories, keys and certificates.
//!
//! Called by `doctor`. Binds all ports together until it has tried them and writes an empty temporary file to each directory.

use std::{
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
};

use super::Finding;
use crate::{
    cli::serve::ServeArgs,
    config::Config,
    model::{checkpoint::ModelSpec, hub::HubConfig},
};

pub fn check(args: &ServeArgs, config: &Config) -> Vec<Finding> {
    let mut findings = ports(args, config);
    findings.push(access(args, config.listen));
    findings.push(directory("temp directory", &std::env::temp_dir(), "set TMPDIR to a writable directory"));
    if let Some(dir) = &config.media.files.dir {
        findings.push(directory("files directory", dir, "give another --files-dir, or its owner's rights"));
    }
    if let Some(dir) = &config.media.allowed_media_dir {
        findings.push(if dir.is_dir() {
            Finding::ok("media directory", dir.display().to_string())
        } else {
            let found = format!("{} is no directory", dir.display());
            Finding::warning(
                "media directory",
                found,
                "every file: URL is refused: give another --allowed-media-dir",
            )
        });
    }
    if let (ModelSpec::Hub(_), Some(dir)) = (&args.model.model, model_cache()) {
        findings.push(directory("model cache", &dir, "set HF_HOME to a writable directory"));
    }
    findings
}

fn model_cache() -> Option<PathBuf> {
    HubConfig::from_variables(|name| std::env::var(name).ok()).ok().map(|config| config.cache_dir)
}

/// All are held until the last was tried: two flags may name one port.
fn ports(args: &ServeArgs, config: &Config) -> Vec<Finding> {
    let mut wanted = vec![("port", "--port", config.listen)];
    wanted.extend(config.metrics_listen.map(|address| ("metrics port", "--metrics-port", address)));
    wanted.extend(args.kv_events.listeners().map(|(flag, address)| ("kv events port", flag, address)));
    let (mut held, mut findings) = (vec![], vec![]);
    for (check, flag, address) in wanted {
        findings.push(match TcpListener::bind(address) {
            Ok(listener) => {
                held.push(listener);
                Finding::ok(check, format!("{address} is free"))
            }
            Err(error) => {
                let fix = format!("stop who listens there, or choose another {flag}");
                Finding::problem(check, format!("cannot listen on {address}: {error}"), fix)
            }
        });
    }
    findings
}

fn access(args: &ServeArgs, listen: SocketAddr) -> Finding {
    let tls = if args.access.is_secure() { "https" } else { "http" };
    match args.access.load() {
        Err(error) => Finding::problem("access", format!("{error:#}"), "correct the file or the key"),
        Ok(access) if access.keys.is_empty() && !listen.ip().is_loopback() => Finding::warning(
            "access",
            format!("{tls}, and whoever reaches {listen} may use the server"),
            "give --api-key-file, or let a gateway ask for keys",
        ),
        Ok(access) => Finding::ok("access", format!("{tls}, {} keys", access.keys.len())),
    }
}

/// Whether files can be made in it; a directory that does not exist yet is made by the server in its nearest parent.
fn directory(check: &'static str, dir: &Path, fix: &str) -> Finding {
    let existing = dir.ancestors().find(|parent| parent.exists() && !parent.as_os_str().is_empty());
    match tempfile::tempfile_in(existing.unwrap_or(Path::new("."))) {
        Ok(_) => Finding::ok(check, format!("{} is writable", dir.display())),
        Err(error) => Finding::problem(check, format!("{} is not writable: {error}", dir.display()), fix),
    }
}
