//! TLS: the certificate from its files, and the handshake of a connection.
//!
//! [`load`] is called by `cli/access.rs` at the start and when the files were replaced, [`accept`] by `http/server.rs`
//! inside the connection's own task.

use std::{io, path::Path, sync::Arc, time::Duration};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        self, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject},
    },
    server::TlsStream,
};

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read the {what} from {file}: {cause}")]
    Read { what: &'static str, file: String, cause: pem::Error },
    #[error("{file} has no {what}; it must be a PEM file with it")]
    Missing { what: &'static str, file: String },
    #[error("the certificate and the key cannot be used together: {0}")]
    Unusable(#[from] rustls::Error),
}

const CERTIFICATE: &str = "certificate";
const KEY: &str = "private key";

/// A certificate, with the chain that leads to its issuer, and its key; both PEM.
///
/// # Errors
/// Files that cannot be read, are no PEM, or do not belong together.
pub fn load(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let fault = |what, file: &Path| {
        let file = file.display().to_string();
        move |cause| match cause {
            pem::Error::NoItemsFound => TlsError::Missing { what, file },
            cause => TlsError::Read { what, file, cause },
        }
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(fault(CERTIFICATE, certificate))?;
    if chain.is_empty() {
        return Err(fault(CERTIFICATE, certificate)(pem::Error::NoItemsFound));
    }
    let key = PrivateKeyDer::from_pem_file(key).map_err(fault(KEY, key))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// The handshake, bounded by `timeout`.
///
/// # Errors
/// A client that speaks no TLS, trusts another certificate, or takes too long.
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    config: Arc<ServerConfig>,
    stream: S,
    timeout: Duration,
) -> io::Result<TlsStream<S>> {
    let handshake = tokio::time::timeout(timeout, TlsAcceptor::from(config).accept(stream));
    handshake.await.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake took too long"))?
}
