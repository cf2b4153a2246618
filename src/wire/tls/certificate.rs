//! Certificates that OpenSSL accepts and rustls's verifier does not: of X.509 version 1, as PostgreSQL's manual makes
//! them ("Creating Certificates"), with the host's name in the common name only, or of an authority that is the
//! server itself. Reads the fields; the cryptography is rustls's.

use rustls::{
    CertificateError, DigitallySignedStruct, Error, PeerMisbehaved,
    client::danger::HandshakeSignatureValid,
    crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key},
};
use rustls_pki_types::{
    CertificateDer, ServerName, SignatureVerificationAlgorithm, SubjectPublicKeyInfoDer, UnixTime,
};
use sha2::{Digest as _, Sha224, Sha256, Sha384, Sha512};
use x509_parser::{
    certificate::{BasicExtension, X509Certificate},
    extensions::ParsedExtension,
    oid_registry::OID_PKCS1_RSASSAPSS,
    prelude::{FromDer as _, X509Version},
    signature_algorithm::RsaSsaPssParams,
};

/// A certificate whose fields have been read.
pub(super) struct Certificate<'a> {
    der: &'a [u8],
    fields: X509Certificate<'a>,
}

impl<'a> Certificate<'a> {
    /// # Errors
    /// [`CertificateError::BadEncoding`].
    pub fn parse(der: &'a CertificateDer<'_>) -> Result<Self, Error> {
        match X509Certificate::from_der(der) {
            Ok(([], fields)) => Ok(Self { der, fields }),
            _ => Err(CertificateError::BadEncoding.into()),
        }
    }

    /// Whether rustls's verifier takes no certificate of this kind, so that [`Self::verify_directly`] decides.
    pub fn is_unusual(&self) -> bool {
        self.fields.version() == X509Version::V1 || self.is_authority()
    }

    /// Whether the names are in the subject's common name only.
    pub fn has_no_alternative_name(&self) -> bool {
        matches!(self.fields.subject_alternative_name(), Ok(None))
    }

    /// Verifies that the certificate is one of `authorities` or signed by one of them, and is in its time. The
    /// name is not looked at.
    ///
    /// # Errors
    /// [`CertificateError`].
    pub fn verify_directly(
        &self,
        authorities: &[CertificateDer<'_>],
        algorithms: &WebPkiSupportedAlgorithms,
        now: UnixTime,
    ) -> Result<(), Error> {
        self.verify_time(now)?;
        if self.has_unknown_demands() {
            return Err(CertificateError::UnhandledCriticalExtension.into());
        }
        if let Ok(Some(usage)) = self.fields.extended_key_usage()
            && !(usage.value.server_auth || usage.value.any)
        {
            return Err(CertificateError::InvalidPurpose.into());
        }
        let signed_it = |authority: &CertificateDer<'_>| {
            **authority == *self.der
                || Certificate::parse(authority).is_ok_and(|authority| {
                    authority.may_sign()
                        && authority.verify_time(now).is_ok()
                        && authority.has_signed(self, algorithms)
                })
        };
        match authorities.iter().any(signed_it) {
            true => Ok(()),
            false => Err(CertificateError::UnknownIssuer.into()),
        }
    }

    fn verify_time(&self, now: UnixTime) -> Result<(), Error> {
        let (now, validity) = (i64::try_from(now.as_secs()).unwrap_or(i64::MAX), self.fields.validity());
        match now {
            now if now < validity.not_before.timestamp() => Err(CertificateError::NotValidYet.into()),
            now if now > validity.not_after.timestamp() => Err(CertificateError::Expired.into()),
            _ => Ok(()),
        }
    }

    /// Whether a critical extension says something that is not looked at here.
    fn has_unknown_demands(&self) -> bool {
        self.fields.extensions().iter().any(|extension| {
            extension.critical
                && !matches!(
                    extension.parsed_extension(),
                    ParsedExtension::BasicConstraints(_)
                        | ParsedExtension::KeyUsage(_)
                        | ParsedExtension::ExtendedKeyUsage(_)
                        | ParsedExtension::SubjectAlternativeName(_)
                )
        })
    }

    fn is_authority(&self) -> bool {
        self.fields.is_ca()
    }

    /// Whether a certificate that the configuration names as an authority may sign others: it says so, or is of
    /// version 1, which cannot say so, and signed by itself.
    fn may_sign(&self) -> bool {
        let usage = self.fields.key_usage();
        let signs = match usage {
            Ok(Some(BasicExtension { value, .. })) => value.key_cert_sign(),
            Ok(None) => true,
            Err(_) => false,
        };
        let is_own_issuer = self.fields.subject().as_raw() == self.fields.issuer().as_raw();
        signs
            && !self.has_unknown_demands()
            && (self.is_authority() || self.fields.version() == X509Version::V1 && is_own_issuer)
    }

    fn has_signed(&self, other: &Certificate<'_>, algorithms: &WebPkiSupportedAlgorithms) -> bool {
        let Some(signature_algorithm) = other.signature_algorithm() else { return false };
        self.fields.subject().as_raw() == other.fields.issuer().as_raw()
            && algorithms.all.iter().any(|algorithm| {
                *algorithm.signature_alg_id() == *signature_algorithm
                    && self.verifies(
                        *algorithm,
                        other.fields.tbs_certificate.as_ref(),
                        &other.fields.signature_value.data,
                    )
            })
    }

    fn verifies(
        &self,
        algorithm: &dyn SignatureVerificationAlgorithm,
        message: &[u8],
        signature: &[u8],
    ) -> bool {
        let key = self.fields.public_key();
        der_element(key.raw)
            .and_then(|(_, fields, _)| der_element(fields))
            .is_some_and(|(_, id, _)| *algorithm.public_key_alg_id() == *id)
            && algorithm.verify_signature(&key.subject_public_key.data, message, signature).is_ok()
    }

    /// The content of the AlgorithmIdentifier in DER.
    fn signature_algorithm(&self) -> Option<&[u8]> {
        let (_, fields, _) = der_element(self.der)?;
        let (_, _, behind_tbs) = der_element(fields)?;
        let (_, algorithm, _) = der_element(behind_tbs)?;
        Some(algorithm)
    }

    /// Verifies that the other side of a handshake has the certificate's key.
    ///
    /// # Errors
    /// The signature is another key's, or its scheme was not offered.
    pub fn verify_handshake(
        &self,
        is_tls_13: bool,
        message: &[u8],
        signed: &DigitallySignedStruct,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Result<HandshakeSignatureValid, Error> {
        if is_tls_13 {
            let key = SubjectPublicKeyInfoDer::from(self.fields.public_key().raw);
            return verify_tls13_signature_with_raw_key(message, &key, signed, algorithms);
        }
        let offered = algorithms.mapping.iter().find(|(scheme, _)| *scheme == signed.scheme);
        let (_, candidates) = offered.ok_or(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme)?;
        match candidates.iter().any(|algorithm| self.verifies(*algorithm, message, signed.signature())) {
            true => Ok(HandshakeSignatureValid::assertion()),
            false => Err(CertificateError::BadSignature.into()),
        }
    }

    /// Whether the common name is the host's, as libpq compares them: `*.` stands for one label.
    pub fn has_common_name(&self, host: &ServerName<'_>) -> bool {
        let name = self.fields.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
        name.is_some_and(|name| is_host(name, &host.to_str()))
    }

    /// Whether `key` (a SubjectPublicKeyInfo) is the certificate's.
    pub fn has_key(&self, key: &[u8]) -> bool {
        *self.fields.public_key().raw == *key
    }

    /// The hash that its signature uses, and SHA-256 in place of MD5 and SHA-1; `None`: it uses none (Ed25519).
    fn hash(&self) -> Option<Vec<u8>> {
        let algorithm = &self.fields.signature_algorithm;
        let hash = match algorithm.algorithm == OID_PKCS1_RSASSAPSS {
            true => {
                let parameters = RsaSsaPssParams::try_from(algorithm.parameters.as_ref()?).ok()?;
                parameters.hash_algorithm_oid().to_id_string()
            }
            false => algorithm.algorithm.to_id_string(),
        };
        // In each arm: of RSA, of ECDSA, and of the hash itself, which RSA-PSS names.
        match &*hash {
            "1.2.840.113549.1.1.14" | "1.2.840.10045.4.3.1" | "2.16.840.1.101.3.4.2.4" => {
                Some(Sha224::digest(self.der).to_vec())
            }
            // MD5 with RSA, SHA-1, SHA-256.
            "1.2.840.113549.1.1.4"
            | "1.2.840.113549.1.1.5"
            | "1.2.840.10045.4.1"
            | "1.3.14.3.2.26"
            | "1.2.840.113549.1.1.11"
            | "1.2.840.10045.4.3.2"
            | "2.16.840.1.101.3.4.2.1" => Some(Sha256::digest(self.der).to_vec()),
            "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" | "2.16.840.1.101.3.4.2.2" => {
                Some(Sha384::digest(self.der).to_vec())
            }
            "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" | "2.16.840.1.101.3.4.2.3" => {
                Some(Sha512::digest(self.der).to_vec())
            }
            _ => None,
        }
    }
}

/// The `tls-server-end-point` channel binding of a certificate (RFC 5929, section 4.1): its hash, by the hash
/// its signature uses, and SHA-256 instead of MD5 and SHA-1. `None` where the signature names no single hash
/// (Ed25519); then there is no channel binding.
pub fn server_end_point(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    Certificate::parse(certificate).ok()?.hash()
}

/// Whether a certificate's name means the host; `*.` at its start stands for one label, as in libpq.
fn is_host(name: &str, host: &str) -> bool {
    let suffix = name.strip_prefix("*.");
    name.eq_ignore_ascii_case(host)
        || suffix.is_some_and(|suffix| {
            host.split_once('.')
                .is_some_and(|(label, rest)| !label.is_empty() && suffix.eq_ignore_ascii_case(rest))
        })
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

    fn certificate(algorithm: &'static rcgen::SignatureAlgorithm) -> CertificateDer<'static> {
        let key = KeyPair::generate_for(algorithm).unwrap();
        CertificateParams::new(vec!["db.test".to_owned()]).unwrap().self_signed(&key).unwrap().der().clone()
    }

    #[test]
    fn a_certificate_is_hashed_as_its_signature_is() {
        let p256 = certificate(&PKCS_ECDSA_P256_SHA256);
        assert_eq!(server_end_point(&p256), Some(Sha256::digest(&p256).to_vec()));
        let p384 = certificate(&PKCS_ECDSA_P384_SHA384);
        assert_eq!(server_end_point(&p384), Some(Sha384::digest(&p384).to_vec()));
        assert_eq!(server_end_point(&certificate(&PKCS_ED25519)), None);
    }

    #[test]
    fn a_common_name_is_compared_as_in_libpq() {
        for (name, host, expected) in [
            ("db.test", "DB.test", true),
            ("db.test", "a.db.test", false),
            ("*.db.test", "a.db.test", true),
            ("*.db.test", "a.b.db.test", false),
            ("*.db.test", ".db.test", false),
            ("*.db.test", "db.test", false),
            ("*", "db", false),
            ("127.0.0.1", "127.0.0.1", true),
        ] {
            assert_eq!(is_host(name, host), expected, "{name} {host}");
        }
    }

    proptest! {
        #[test]
        fn no_certificate_makes_the_hash_panic(
            at in 0usize..400, byte: u8, length in 0usize..400, noise in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let mut bytes = certificate(&PKCS_ECDSA_P256_SHA256).to_vec();
            bytes.truncate(length.max(at + 1));
            if let Some(there) = bytes.get_mut(at) {
                *there = byte;
            }
            let _ = server_end_point(&bytes.into());
            let _ = server_end_point(&noise.into());
        }
    }
}
