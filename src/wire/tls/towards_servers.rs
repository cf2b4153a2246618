//! TLS towards servers: verifies the server's certificate and computes its hash for SCRAM's channel binding.

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
    crypto::CryptoProvider,
    server::ParsedCertificate,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use sha2::{Digest as _, Sha256, Sha384, Sha512};

use super::{ALPN, TlsError, authorities, certificates, private_key, provider};

/// The most cached configurations. There is one per (trust, file of authorities); beyond this the cache is
/// cleared.
const CONFIGS_MAX: usize = 256;

/// How much of a server's certificate is verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Trust {
    /// Nothing: the connection is encrypted, the server is not verified (`prefer`, `require` without
    /// authorities).
    Anybody,
    /// The signature of a known authority, not the name (`verify-ca`).
    Authority,
    /// The signature and a subject alternative name (`verify-full`). The common name is not used, unlike in
    /// libpq.
    AuthorityAndName,
}

/// Creates and caches the configurations towards servers. A file is read at its first use; a reload replaces
/// this object.
#[derive(Debug)]
pub struct ServerTlsConfigs {
    default_authorities: Option<PathBuf>,
    identity: Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)>,
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
        let identity = match identity {
            Some((certificate, key)) => Some((certificates(certificate)?, private_key(key)?)),
            None => None,
        };
        let configs = Self { default_authorities, identity, made: Mutex::default() };
        // A key that does not belong to its certificate is found here and not at the first connection.
        configs.get(Trust::Anybody, None)?;
        Ok(configs)
    }

    /// Whether a host has a file of authorities. libpq's `require` then means `verify-ca`.
    pub fn names_authorities(&self, host_authorities: Option<&Path>) -> bool {
        host_authorities.is_some() || self.default_authorities.is_some()
    }

    /// The configuration for a host; `None`: the default authorities, or else the system's.
    pub fn get(&self, trust: Trust, host_authorities: Option<&Path>) -> Result<Arc<ClientConfig>, TlsError> {
        let authorities = match trust {
            Trust::Anybody => None,
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
            Trust::Anybody => None,
            _ => Some(Authorities::new(authorities, &provider, trust == Trust::AuthorityAndName)?),
        };
        let verifier = Arc::new(Verifier { provider: provider.clone(), authorities });
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match &self.identity {
            Some((chain, key)) => config.with_client_auth_cert(chain.clone(), key.clone_key())?,
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
    provider: Arc<CryptoProvider>,
    authorities: Option<Authorities>,
}

/// For `verify-ca` and `verify-full`.
#[derive(Debug)]
struct Authorities {
    web_pki: Arc<WebPkiServerVerifier>,
    /// The authorities' certificates; a server may present one of them as its own.
    pinned: Vec<CertificateDer<'static>>,
    name_matters: bool,
}

impl Authorities {
    fn new(
        path: Option<&Path>,
        provider: &Arc<CryptoProvider>,
        name_matters: bool,
    ) -> Result<Self, TlsError> {
        let (roots, pinned) = match path {
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
        Ok(Self { web_pki, pinned, name_matters })
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
        use rustls::Error::InvalidCertificate;
        let Some(Authorities { web_pki, pinned, name_matters }) = &self.authorities else {
            return Ok(ServerCertVerified::assertion());
        };
        match web_pki.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // The name is looked at last, after the chain.
            Err(InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !name_matters => Ok(ServerCertVerified::assertion()),
            // A self-signed certificate as `openssl req -x509` makes it calls itself an authority, which web
            // PKI refuses at the end of a chain. A configuration that names this very certificate as the
            // authority means it, and libpq takes it.
            Err(InvalidCertificate(CertificateError::Other(_)))
                if pinned.iter().any(|pinned| pinned == end_entity) =>
            {
                if *name_matters {
                    verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                }
                Ok(ServerCertVerified::assertion())
            }
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The `tls-server-end-point` channel binding of a certificate (RFC 5929, section 4.1): its hash, by the hash
/// its signature uses, and SHA-256 instead of MD5 and SHA-1. `None` where the signature names no single hash
/// (Ed25519, RSA-PSS); then there is no channel binding.
pub fn server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    // Certificate ::= SEQUENCE { tbsCertificate SEQUENCE, signatureAlgorithm SEQUENCE { OBJECT IDENTIFIER, …
    // }, … }
    let (0x30, fields, _) = der_element(certificate)? else { return None };
    let (0x30, _, behind_tbs) = der_element(fields)? else { return None };
    let (0x30, algorithm, _) = der_element(behind_tbs)? else { return None };
    let (0x06, oid, _) = der_element(algorithm)? else { return None };
    const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
    const ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04];
    match (oid.strip_prefix(RSA), oid.strip_prefix(ECDSA)) {
        (Some([4 | 5 | 11]), _) | (_, Some([1] | [3, 2])) => Some(Sha256::digest(certificate).to_vec()),
        (Some([12]), _) | (_, Some([3, 3])) => Some(Sha384::digest(certificate).to_vec()),
        (Some([13]), _) | (_, Some([3, 4])) => Some(Sha512::digest(certificate).to_vec()),
        _ => None,
    }
}

/// Splits off a DER element: its tag, its content, and the bytes after it.
fn der_element(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, first], rest) = bytes.split_first_chunk::<2>()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit)), rest)
        }
        _ => return None,
    };
    let (content, behind) = rest.split_at_checked(length)?;
    Some((tag, content, behind))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519};

    use super::*;

    fn certificate(algorithm: &'static rcgen::SignatureAlgorithm) -> Vec<u8> {
        let key = KeyPair::generate_for(algorithm).unwrap();
        CertificateParams::new(vec!["db.test".to_owned()]).unwrap().self_signed(&key).unwrap().der().to_vec()
    }

    #[test]
    fn a_certificate_is_hashed_as_its_signature_is() {
        let p256 = certificate(&PKCS_ECDSA_P256_SHA256);
        assert_eq!(server_end_point(&p256), Some(Sha256::digest(&p256).to_vec()));
        let p384 = certificate(&PKCS_ECDSA_P384_SHA384);
        assert_eq!(server_end_point(&p384), Some(Sha384::digest(&p384).to_vec()));
        assert_eq!(server_end_point(&certificate(&PKCS_ED25519)), None);
    }

    proptest! {
        #[test]
        fn no_certificate_makes_the_hash_panic(
            at in 0usize..400, byte: u8, length in 0usize..400, noise in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let mut bytes = certificate(&PKCS_ECDSA_P256_SHA256);
            bytes.truncate(length.max(at + 1));
            if let Some(there) = bytes.get_mut(at) {
                *there = byte;
            }
            let _ = server_end_point(&bytes);
            let _ = server_end_point(&noise);
        }
    }
}
