//! TLS towards clients: one certificate, which can be replaced while connections stay open.

use std::{io, path::Path, sync::Arc};

use arc_swap::ArcSwap;
use rustls::{
    ServerConfig,
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    sign::SingleCertAndKey,
};

use super::{ALPN, TlsError, authorities, certified_key, provider, server_end_point};
use crate::wire::stream::{Socket, Stream};

/// The PEM files of a certificate, and of the authorities for client certificates.
#[derive(Debug, Clone, Copy)]
pub struct CertificateFiles<'a> {
    /// The certificate, followed by its intermediates.
    pub certificate: &'a Path,
    /// Its key.
    pub key: &'a Path,
    /// The authorities that sign client certificates. `None`: clients need no certificate.
    pub client_authorities: Option<&'a Path>,
}

/// The certificate of one handshake and of its SCRAM exchange. Both have to use the same one, or channel
/// binding would fail while a certificate is being renewed.
#[derive(Debug)]
pub struct TlsSnapshot {
    config: Arc<ServerConfig>,
    end_point: Option<Vec<u8>>,
}

/// Answers TLS handshakes of clients.
#[derive(Debug)]
pub struct ClientTlsAcceptor {
    current: ArcSwap<TlsSnapshot>,
}

/// A client after its TLS handshake.
#[derive(Debug)]
pub struct Accepted {
    /// The encrypted stream, with empty buffers.
    pub stream: Stream,
    /// The server name that the client sent (SNI).
    pub server_name: Option<String>,
    /// Whether ALPN selected PostgreSQL's protocol.
    pub alpn: bool,
    /// The certificate of the handshake.
    pub snapshot: Arc<TlsSnapshot>,
}

impl ClientTlsAcceptor {
    /// Loads the files.
    pub fn load(files: CertificateFiles<'_>) -> Result<Self, TlsError> {
        Ok(Self { current: ArcSwap::from_pointee(TlsSnapshot::load(files)?) })
    }

    /// Loads the files again, for the next handshakes. Open connections do not change.
    ///
    /// # Errors
    /// [`TlsError`]; the old certificate stays in use.
    pub fn reload(&self, files: CertificateFiles<'_>) -> Result<(), TlsError> {
        self.current.store(Arc::new(TlsSnapshot::load(files)?));
        Ok(())
    }

    /// Runs a handshake.
    ///
    /// # Errors
    /// The socket's, and rustls's under [`io::ErrorKind::InvalidData`]; the client has been sent the alert.
    pub async fn accept(&self, socket: Socket) -> io::Result<Accepted> {
        let snapshot = self.current.load_full();
        let tls = tokio_rustls::TlsAcceptor::from(snapshot.config.clone()).accept(socket).await?;
        let session = tls.get_ref().1;
        let server_name = session.server_name().map(str::to_owned);
        let alpn = session.alpn_protocol() == Some(ALPN);
        let stream = Stream::Tls(Box::new(tls.into()));
        Ok(Accepted { stream, server_name, alpn, snapshot })
    }
}

impl TlsSnapshot {
    fn load(files: CertificateFiles<'_>) -> Result<Self, TlsError> {
        let provider = provider();
        let certified = certified_key(files.certificate, files.key)?;
        let end_point = certified.cert.first().and_then(server_end_point);

        let verifier: Arc<dyn ClientCertVerifier> = match files.client_authorities {
            Some(path) => {
                let roots = Arc::new(authorities(path)?);
                WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
                    .build()
                    .map_err(|error| TlsError::file(path, error))?
            }
            None => WebPkiClientVerifier::no_client_auth(),
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
        config.alpn_protocols = vec![ALPN.to_vec()];
        // Connections are long-lived, and resumption gave no measurable gain.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});

        if end_point.is_none() {
            tracing::info!(
                file = %files.certificate.display(),
                "no channel binding (SCRAM-SHA-256-PLUS) with this certificate: its signature has no hash of its own"
            );
        }
        Ok(Self { config: Arc::new(config), end_point })
    }

    /// The hash of the certificate for SCRAM-SHA-256-PLUS (`tls-server-end-point`, RFC 5929). `None`: its
    /// signature defines no hash, and the mechanism is not offered.
    pub fn end_point(&self) -> Option<&[u8]> {
        self.end_point.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use rcgen::{CertificateParams, KeyPair};
    use rustls_pki_types::ServerName;
    use tokio::net::UnixStream;

    use super::*;
    use crate::wire::tls::towards_servers::{ServerTlsConfigs, Trust};

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        /// A self-signed certificate for `name`, and its key.
        fn write(&self, name: &str, algorithm: &'static rcgen::SignatureAlgorithm) {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let certificate =
                CertificateParams::new(vec![name.to_owned()]).unwrap().self_signed(&key).unwrap();
            std::fs::write(self.path("cert.pem"), certificate.pem()).unwrap();
            std::fs::write(self.path("key.pem"), key.serialize_pem()).unwrap();
        }

        fn acceptor(&self) -> Result<ClientTlsAcceptor, TlsError> {
            let (certificate, key) = (self.path("cert.pem"), self.path("key.pem"));
            let files = CertificateFiles { certificate: &certificate, key: &key, client_authorities: None };
            ClientTlsAcceptor::load(files)
        }

        fn reload(&self, acceptor: &ClientTlsAcceptor) -> Result<(), TlsError> {
            let (certificate, key) = (self.path("cert.pem"), self.path("key.pem"));
            acceptor.reload(CertificateFiles {
                certificate: &certificate,
                key: &key,
                client_authorities: None,
            })
        }
    }

    /// Connects with `trust` in the folder's own certificate.
    async fn handshake(
        acceptor: &ClientTlsAcceptor,
        folder: &Folder,
        trust: Trust,
        name: &'static str,
    ) -> io::Result<Accepted> {
        let configs = ServerTlsConfigs::new(Some(folder.path("cert.pem")), None).unwrap();
        let connector = tokio_rustls::TlsConnector::from(configs.get(trust, None).unwrap());
        let (near, far) = UnixStream::pair().unwrap();
        let connect = connector.connect(ServerName::try_from(name).unwrap(), far);
        let (accepted, connected) = tokio::join!(acceptor.accept(Socket::Unix(near)), connect);
        connected?;
        accepted
    }

    #[tokio::test]
    async fn a_handshake_tells_the_name_and_the_protocol() {
        let folder = Folder::new();
        folder.write("acme.db.test", &rcgen::PKCS_ECDSA_P256_SHA256);
        let acceptor = folder.acceptor().unwrap();
        let accepted = handshake(&acceptor, &folder, Trust::AuthorityAndName, "acme.db.test").await.unwrap();
        assert_eq!(accepted.server_name.as_deref(), Some("acme.db.test"));
        assert!(accepted.alpn && accepted.snapshot.end_point().is_some());
    }

    #[tokio::test]
    async fn verify_full_minds_the_name_and_verify_ca_does_not() {
        let folder = Folder::new();
        folder.write("acme.db.test", &rcgen::PKCS_ECDSA_P256_SHA256);
        let acceptor = folder.acceptor().unwrap();
        assert!(handshake(&acceptor, &folder, Trust::AuthorityAndName, "other.test").await.is_err());
        assert!(handshake(&acceptor, &folder, Trust::Authority, "other.test").await.is_ok());

        // Another authority altogether.
        let stranger = Folder::new();
        stranger.write("acme.db.test", &rcgen::PKCS_ECDSA_P256_SHA256);
        assert!(handshake(&acceptor, &stranger, Trust::Authority, "acme.db.test").await.is_err());
        assert!(handshake(&acceptor, &stranger, Trust::AnyCertificate, "acme.db.test").await.is_ok());
    }

    #[tokio::test]
    async fn a_self_signed_authority_may_be_the_server_itself() {
        let folder = Folder::new();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["db.test".to_owned()]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        std::fs::write(folder.path("cert.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        std::fs::write(folder.path("key.pem"), key.serialize_pem()).unwrap();
        let acceptor = folder.acceptor().unwrap();
        assert!(handshake(&acceptor, &folder, Trust::AuthorityAndName, "db.test").await.is_ok());
        assert!(handshake(&acceptor, &folder, Trust::AuthorityAndName, "other.test").await.is_err());
        assert!(handshake(&acceptor, &folder, Trust::Authority, "other.test").await.is_ok());
    }

    #[tokio::test]
    async fn a_renewed_certificate_is_served_and_a_broken_one_is_not() {
        let folder = Folder::new();
        folder.write("old.test", &rcgen::PKCS_ECDSA_P256_SHA256);
        let acceptor = folder.acceptor().unwrap();

        folder.write("new.test", &rcgen::PKCS_ECDSA_P256_SHA256);
        assert!(handshake(&acceptor, &folder, Trust::AuthorityAndName, "new.test").await.is_err());
        folder.reload(&acceptor).unwrap();
        assert!(handshake(&acceptor, &folder, Trust::AuthorityAndName, "new.test").await.is_ok());

        // A key of another certificate, a file cut short, no file: refused by name, and the old one stays.
        let good = std::fs::read(folder.path("cert.pem")).unwrap();
        std::fs::write(folder.path("key.pem"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        assert!(folder.reload(&acceptor).unwrap_err().to_string().contains("key.pem"));
        std::fs::write(folder.path("cert.pem"), &good[..good.len() / 2]).unwrap();
        assert!(folder.reload(&acceptor).unwrap_err().to_string().contains("cert.pem"));
        std::fs::remove_file(folder.path("cert.pem")).unwrap();
        assert!(folder.reload(&acceptor).unwrap_err().to_string().contains("cert.pem"));

        std::fs::write(folder.path("cert.pem"), good).unwrap();
        assert!(handshake(&acceptor, &folder, Trust::AuthorityAndName, "new.test").await.is_ok());
    }

    #[test]
    fn a_certificate_without_a_hash_of_its_own_is_served_without_channel_binding() {
        let folder = Folder::new();
        folder.write("db.test", &rcgen::PKCS_ED25519);
        let acceptor = folder.acceptor().unwrap();
        assert!(acceptor.current.load().end_point().is_none());
    }
}
