//! TLS towards clients: a certificate that can be swapped while old connections live on.
//!
//! Everything that belongs to a certificate (the rustls configuration and the channel-binding hash of SCRAM-SHA-256-PLUS)
//! is one value, of which a handshake takes one snapshot: a swap in the middle cannot mix two certificates.

use std::{fs, io, path::Path, sync::Arc};

use arc_swap::ArcSwap;
use pgwire::api::auth::sasl::scram::ScramServerAuth;
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    server::{NoClientAuth, WebPkiClientVerifier, danger::ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use tokio_rustls::TlsAcceptor;

use super::stream::{Socket, Stream};

/// PostgreSQL's ALPN name; a direct TLS connection must use it.
pub const ALPN: &[u8] = b"postgresql";

/// Why a certificate cannot be served. The one before stays.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {cause}")]
pub struct CertificateError {
    /// The file or step.
    pub what: String,
    /// What is wrong with it.
    pub cause: String,
}

fn wrong(what: impl ToString, cause: impl ToString) -> CertificateError {
    CertificateError { what: what.to_string(), cause: cause.to_string() }
}

/// The server end of TLS.
#[derive(Debug)]
pub struct TlsDoor {
    identity: ArcSwap<Identity>,
}

/// A certificate and all that depends on it.
struct Identity {
    config: Arc<ServerConfig>,
    scram: ScramServerAuth,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("channel_binding", &self.scram.supports_channel_binding()).finish_non_exhaustive()
    }
}

/// What a handshake found out.
#[derive(Clone)]
pub struct TlsFacts {
    /// The server name that the client asked for.
    pub server_name: Option<String>,
    /// SCRAM as this connection's certificate has it.
    pub scram: ScramServerAuth,
}

impl std::fmt::Debug for TlsFacts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsFacts").field("server_name", &self.server_name).finish_non_exhaustive()
    }
}

impl TlsDoor {
    /// Reads certificate chain and key, and, to ask clients for certificates, the authorities that sign them.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn open(certificate: &Path, key: &Path, client_ca: Option<&Path>) -> Result<Self, CertificateError> {
        Ok(Self { identity: ArcSwap::from_pointee(Identity::read(certificate, key, client_ca)?) })
    }

    /// Serves another certificate from the next handshake on.
    ///
    /// # Errors
    /// [`CertificateError`]; the old one stays.
    pub fn swap(&self, certificate: &Path, key: &Path, client_ca: Option<&Path>) -> Result<(), CertificateError> {
        self.identity.store(Arc::new(Identity::read(certificate, key, client_ca)?));
        Ok(())
    }

    /// Shakes hands. `direct`: without an SSLRequest before, where ALPN is a must.
    ///
    /// # Errors
    /// The client's, or its connection's.
    pub async fn shake_hands(&self, socket: Socket, direct: bool) -> io::Result<(Stream, TlsFacts)> {
        let identity = self.identity.load_full();
        let tls = Box::pin(TlsAcceptor::from(identity.config.clone()).accept(socket)).await?;
        let connection = tls.get_ref().1;
        if direct && connection.alpn_protocol() != Some(ALPN) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "direct TLS without the ALPN protocol postgresql"));
        }
        let server_name = connection.server_name().map(str::to_owned);
        Ok((Stream::Tls(Box::new(tls.into())), TlsFacts { server_name, scram: identity.scram.clone() }))
    }
}

impl Identity {
    fn read(certificate: &Path, key: &Path, client_ca: Option<&Path>) -> Result<Self, CertificateError> {
        let pem = fs::read(certificate).map_err(|error| wrong(certificate.display(), error))?;
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&pem)
            .collect::<Result<_, _>>()
            .map_err(|error| wrong(certificate.display(), error))?;
        if chain.is_empty() {
            return Err(wrong(certificate.display(), "no certificate in it"));
        }
        let key_der = PrivateKeyDer::from_pem_file(key).map_err(|error| wrong(key.display(), error))?;
        let provider = Arc::new(ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| wrong("TLS", error))?
            .with_client_cert_verifier(client_verifier(client_ca, provider)?)
            .with_single_cert(chain, key_der)
            .map_err(|error| wrong(format!("{} and {}", certificate.display(), key.display()), error))?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        let mut scram = ScramServerAuth::new();
        // A certificate whose signature has no hash defined for channel binding (Ed25519): then -PLUS is not offered.
        let _ = scram.configure_certificate(&pem);
        Ok(Self { config: Arc::new(config), scram })
    }
}

fn client_verifier(
    ca: Option<&Path>,
    provider: Arc<rustls::crypto::CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, CertificateError> {
    let Some(ca) = ca else { return Ok(Arc::new(NoClientAuth)) };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca).map_err(|error| wrong(ca.display(), error))? {
        let certificate = certificate.map_err(|error| wrong(ca.display(), error))?;
        roots.add(certificate).map_err(|error| wrong(ca.display(), error))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
    Ok(verifier.map_err(|error| wrong(ca.display(), error))?)
}
