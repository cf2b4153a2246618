//! TLS towards servers: verifies the server's certificate as libpq's `sslmode` does.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, WebPkiSupportedAlgorithms},
    server::ParsedCertificate,
    sign::{CertifiedKey, SingleCertAndKey},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{ALPN, TlsError, authorities, certificate::Certificate, certificates, certified_key, provider};

/// The most cached configurations. There is one per (trust, file of authorities); beyond this the cache is
/// cleared.
const CONFIGS_MAX: usize = 256;

/// How much of a server's certificate is verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Trust {
    /// Nothing: the connection is encrypted, the server is not verified (`prefer`, `require` without
    /// authorities).
    AnyCertificate,
    /// The signature of a known authority, not the name (`verify-ca`).
    Authority,
    /// The signature and the name (`verify-full`): a subject alternative name, or the common name of a certificate
    /// without any.
    AuthorityAndName,
}

/// Creates and caches the configurations towards servers. A file is read at its first use; a reload replaces
/// this object.
#[derive(Debug)]
pub struct ServerTlsConfigs {
    default_authorities: Option<PathBuf>,
    identity: Option<Arc<CertifiedKey>>,
    made: Mutex<Made>,
}

type Made = HashMap<(Trust, Option<PathBuf>), Arc<ClientConfig>>;

impl ServerTlsConfigs {
    /// `default_authorities` is for hosts without a file of their own; `identity` is the certificate and key
    /// for servers that ask for one.
    pub fn new(
        default_authorities: Option<PathBuf>,
        identity: Option<(&Path, &Path)>,
    ) -> Result<Self, TlsError> {
        // A key that does not belong to its certificate is found here and not at the first connection.
        let identity = identity.map(|(certificate, key)| certified_key(certificate, key)).transpose()?;
        Ok(Self { default_authorities, identity, made: Mutex::default() })
    }

    /// Whether a host has a file of authorities. libpq's `require` then means `verify-ca`.
    pub fn names_authorities(&self, host_authorities: Option<&Path>) -> bool {
        host_authorities.is_some() || self.default_authorities.is_some()
    }

    /// The configuration for a host; `None`: the default authorities, or else the system's.
    pub fn get(&self, trust: Trust, host_authorities: Option<&Path>) -> Result<Arc<ClientConfig>, TlsError> {
        let authorities = match trust {
            Trust::AnyCertificate => None,
            _ => host_authorities.or(self.default_authorities.as_deref()).map(Path::to_owned),
        };
        let key = (trust, authorities);
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = made.get(&key) {
            return Ok(config.clone());
        }
        let config = Arc::new(self.make(trust, key.1.as_deref())?);
        if made.len() >= CONFIGS_MAX {
            made.clear();
        }
        made.insert(key, config.clone());
        Ok(config)
    }

    fn make(&self, trust: Trust, authorities: Option<&Path>) -> Result<ClientConfig, TlsError> {
        let provider = provider();
        let authorities = match trust {
            Trust::AnyCertificate => None,
            _ => Some(Authorities::new(authorities, &provider, trust == Trust::AuthorityAndName)?),
        };
        let verifier =
            Arc::new(Verifier { algorithms: provider.signature_verification_algorithms, authorities });
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match &self.identity {
            Some(identity) => {
                config.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(identity.clone())))
            }
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(config)
    }
}

/// Verifies signatures always; the certificate only by its authorities. Without them (`allow`, `prefer`,
/// `require`) the connection is encrypted and no more.
#[derive(Debug)]
struct Verifier {
    algorithms: WebPkiSupportedAlgorithms,
    authorities: Option<Authorities>,
}

/// For `verify-ca` and `verify-full`.
#[derive(Debug)]
struct Authorities {
    web_pki: Arc<WebPkiServerVerifier>,
    /// The same authorities, for certificates that rustls does not take; empty for those of the system.
    named: Vec<CertificateDer<'static>>,
    name_matters: bool,
}

impl Authorities {
    fn new(
        path: Option<&Path>,
        provider: &Arc<CryptoProvider>,
        name_matters: bool,
    ) -> Result<Self, TlsError> {
        let (roots, named) = match path {
            Some(path) => (authorities(path)?, certificates(path)?),
            None => {
                let mut roots = RootCertStore::empty();
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                (roots, Vec::new())
            }
        };
        if roots.is_empty() {
            return Err(TlsError::NoSystemRoots);
        }
        let web_pki = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        Ok(Self { web_pki, named, name_matters })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(Authorities { web_pki, named, name_matters }) = &self.authorities else {
            return Ok(ServerCertVerified::assertion());
        };
        let verified = web_pki.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        let Err(error) = verified else { return verified };
        // The name is looked at last, after the chain.
        let is_signed = matches!(
            error,
            rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }
            )
        );
        let certificate = Certificate::parse(end_entity)?;
        if !is_signed {
            if !certificate.is_unusual() {
                return Err(error);
            }
            certificate.verify_directly(named, &self.algorithms, now)?;
        }
        let is_named = || match certificate.has_no_alternative_name() {
            true => certificate.has_common_name(server_name),
            false => ParsedCertificate::try_from(end_entity)
                .is_ok_and(|parsed| verify_server_name(&parsed, server_name).is_ok()),
        };
        match !name_matters || is_named() {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(CertificateError::NotValidForName.into()),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Certificate::parse(cert)?.verify_handshake(false, message, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Certificate::parse(cert)?.verify_handshake(true, message, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
