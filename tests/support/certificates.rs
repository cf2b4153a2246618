//! A certificate authority and certificates signed by it, made anew for each test.

use std::{fs, path::Path};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

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
}
