//! Who may use the server and how its connections are secured: the options, and the files they name.
//!
//! Called by `serve`, once at the start and again at every SIGHUP.

use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::{Context, bail};
use axum::http::HeaderValue;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::http::{Access, ApiKey, AppState, cors, tls};

/// Keys, browsers and TLS.
#[derive(Debug, Clone, Args)]
pub struct AccessOptions {
    /// API key that clients must send as "Authorization: Bearer KEY"; may be given several times, or several with
    /// commas. Without any key everyone may use the server.
    #[arg(
        long = "api-key",
        value_name = "KEY",
        env = "TINYLLAVA_API_KEY",
        hide_env_values = true,
        value_delimiter = ','
    )]
    api_keys: Vec<KeyText>,
    /// File with an API key a line, and # comments; read again at SIGHUP.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Origin of web pages that may call the server from a browser, as in https://example.org, or * for any; may be
    /// given several times.
    #[arg(long = "cors-origin", value_name = "ORIGIN", value_parser = cors::parse_origin)]
    pub cors_origins: Vec<HeaderValue>,
    /// Certificate for https, PEM, with the chain to its issuer; read again at SIGHUP.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Private key of the certificate, PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

/// A key as it was written, which is never printed, also not in an error.
#[derive(Clone)]
struct KeyText(String);

impl FromStr for KeyText {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(KeyText(text.to_owned()))
    }
}

impl std::fmt::Debug for KeyText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyText")
    }
}

impl AccessOptions {
    /// Whether clients connect by https.
    pub fn is_secure(&self) -> bool {
        self.tls_cert.is_some()
    }

    /// Reads all files.
    ///
    /// # Errors
    /// Files that cannot be read, keys that are none, a certificate and a key that do not fit.
    pub fn load(&self) -> anyhow::Result<Access> {
        let mut keys = vec![];
        for KeyText(text) in &self.api_keys {
            let key = ApiKey::new(text.trim());
            keys.push(key.context(
                "an API key (--api-key, TINYLLAVA_API_KEY) must be 1 to 512 visible ASCII characters",
            )?);
        }
        if let Some(file) = &self.api_key_file {
            keys.extend(read_keys(file)?);
        }
        let tls = match (&self.tls_cert, &self.tls_key) {
            (Some(certificate), Some(key)) => Some(tls::load(certificate, key)?),
            _ => None,
        };
        Ok(Access { keys, tls })
    }

    /// Reads the files again at every SIGHUP; what cannot be used leaves everything as it was. Never completes.
    ///
    /// # Errors
    /// When the handler cannot be installed.
    pub async fn reload_on_hangup(&self, state: &AppState) -> anyhow::Result<()> {
        if self.api_key_file.is_none() && self.tls_cert.is_none() {
            // Nothing to read: a closed terminal may end the server.
            return std::future::pending().await;
        }
        let mut hangup = signal(SignalKind::hangup()).context("cannot install signal handlers")?;
        loop {
            hangup.recv().await;
            let options = self.clone();
            match tokio::task::spawn_blocking(move || options.load()).await? {
                Ok(access) => {
                    tracing::info!(api_keys = access.keys.len(), "read the keys and the certificate again");
                    state.set_access(access);
                }
                Err(error) => tracing::error!("the keys and the certificate stay as they were: {error:#}"),
            }
        }
    }
}

/// A key a line.
fn read_keys(file: &Path) -> anyhow::Result<Vec<ApiKey>> {
    let text = std::fs::read_to_string(file)
        .with_context(|| format!("cannot read the API keys from {}", file.display()))?;
    let mut keys = vec![];
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        keys.push(ApiKey::new(line).with_context(|| {
            let file = file.display();
            format!("line {number} of {file} is no API key: it must be 1 to 512 visible ASCII characters")
        })?);
    }
    if keys.is_empty() {
        // A server that was to be closed must not be open because a file is empty.
        bail!("there is no API key in {}; write one a line", file.display());
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn a_key_file_has_a_key_a_line_and_at_least_one() {
        let keys = file("# of the team\nalpha\n\n  beta  \n#gamma\n");
        assert_eq!(read_keys(keys.path()).unwrap().len(), 2);
        for (text, said) in [("", "no API key"), ("# none\n", "no API key"), ("a\nb c\n", "line 2")] {
            let error = format!("{:#}", read_keys(file(text).path()).unwrap_err());
            assert!(error.contains(said) && !error.contains("b c"), "{error}");
        }
        assert!(format!("{:#}", read_keys(Path::new("no-such")).unwrap_err()).contains("no-such"));
    }
}
