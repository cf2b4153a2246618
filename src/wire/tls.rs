//! TLS on both sides, with rustls and its ring provider, named wherever a configuration is built: a process
//! default panics as soon as a second provider is linked in.

mod certificate;
pub mod towards_clients;
pub mod towards_servers;

use self::certificate::Certificate;
pub use self::certificate::server_end_point;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    InconsistentKeys, RootCertStore,
    crypto::{CryptoProvider, ring},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};

/// PostgreSQL's protocol in TLS's list of application protocols (IANA), needed where TLS comes without an
/// SSLRequest.
pub const ALPN: &[u8] = b"postgresql";

/// Why a TLS configuration cannot be made. For operators: it names files.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum TlsError {
    /// A file that is missing, unreadable, or holds something else.
    #[error("{}: {cause}", path.display())]
    File { path: PathBuf, cause: String },
    /// The system has no certificate authorities, and the mode needs some.
    #[error("the system has no certificate authorities; name a file, or install ca-certificates")]
    NoSystemRoots,
    /// rustls said no.
    #[error("{0}")]
    Rustls(#[from] rustls::Error),
}

impl TlsError {
    fn file(path: &Path, cause: impl ToString) -> Self {
        Self::File { path: path.to_owned(), cause: cause.to_string() }
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The certificates of a PEM file; at least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| TlsError::file(path, error))?;
    if certificates.is_empty() {
        return Err(TlsError::file(path, "there is no certificate in it"));
    }
    Ok(certificates)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| TlsError::file(path, error))
}

/// A certificate with its intermediates and its key.
///
/// # Errors
/// [`TlsError::File`]: a file cannot be used, or the key is another certificate's.
fn certified_key(certificate: &Path, key: &Path) -> Result<Arc<CertifiedKey>, TlsError> {
    let chain = certificates(certificate)?;
    let wrong_key = |error: rustls::Error| TlsError::file(key, error);
    let signing = provider().key_provider.load_private_key(private_key(key)?).map_err(wrong_key)?;
    // rustls's own comparison takes no certificate of version 1.
    if let (Some(first), Some(public)) = (chain.first(), signing.public_key()) {
        let first = Certificate::parse(first).map_err(|error| TlsError::file(certificate, error))?;
        if !first.has_key(&public) {
            return Err(wrong_key(InconsistentKeys::KeyMismatch.into()));
        }
    }
    Ok(Arc::new(CertifiedKey::new(chain, signing)))
}

fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| TlsError::file(path, error))?;
    }
    Ok(roots)
}
