//! A certificate authority and certificates signed by it, made anew for each test.

use std::{fs, path::Path};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SigningKey as _};

pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "pglobby test authority");
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// For `sslrootcert`.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate for `names`, DNS names or addresses; returns (certificate, key) in PEM.
    pub fn certify(&self, names: &[&str]) -> (String, String) {
        let mut params =
            CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>()).unwrap();
        params.distinguished_name.push(DnType::CommonName, names[0]);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// Writes `server.crt`, `server.key` (for `names`) and `ca.crt` into `folder`.
    pub fn write_server_files(&self, folder: &Path, names: &[&str]) {
        let (certificate, key) = self.certify(names);
        fs::write(folder.join("server.crt"), certificate).unwrap();
        fs::write(folder.join("server.key"), key).unwrap();
        fs::write(folder.join("ca.crt"), self.pem()).unwrap();
    }

    /// As [`Self::certify`], of X.509 version 1 and with one name in the subject only: what `openssl x509 -req` makes
    /// in PostgreSQL's manual.
    pub fn certify_as_version_1(&self, name: &str) -> (String, String) {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let [fields, algorithm, _] = elements(content(certificate.der())).try_into().unwrap();
        // [0] is the version, [3] the extensions.
        let kept: Vec<_> =
            elements(content(fields)).into_iter().filter(|field| ![0xa0, 0xa3].contains(&field[0])).collect();
        let fields = element(0x30, &kept.concat());
        let signature = element(0x03, &[&[0], &*self.issuer.key().sign(&fields).unwrap()].concat());
        let certificate = element(0x30, &[&fields, algorithm, &signature].concat());
        let text = BASE64_STANDARD.encode(certificate);
        (format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n"), key.serialize_pem())
    }
}

/// A DER element.
fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap().to_be_bytes();
    let length = if content.len() < 0x80 { vec![length[1]] } else { [&[0x82], &length[..]].concat() };
    [&[tag], &*length, content].concat()
}

/// The content of the first DER element.
fn content(bytes: &[u8]) -> &[u8] {
    let (head, length) = head_and_length(bytes);
    &bytes[head..head + length]
}

fn head_and_length(bytes: &[u8]) -> (usize, usize) {
    match bytes[1] {
        short @ 0..0x80 => (2, usize::from(short)),
        long => {
            let digits = usize::from(long & 0x7f);
            (
                2 + digits,
                bytes[2..2 + digits].iter().fold(0, |length, digit| length << 8 | usize::from(*digit)),
            )
        }
    }
}

/// The DER elements in a row.
fn elements(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let (head, length) = head_and_length(bytes);
        let (first, rest) = bytes.split_at(head + length);
        found.push(first);
        bytes = rest;
    }
    found
}
