//! A cluster with a central database, and a configuration for it; rows as onboarding writes them, for tests that read them.

use std::{fs, path::PathBuf, process::Output, sync::Arc};

use pglobby::{
    config::Config,
    control_path::{
        central::Central,
        directory::CentralDirectory,
        init::init,
        secrets::{keyring::Keyring, keyring_reload::ReloadableKeyring, seal::SecretLocation},
    },
};
use secrecy::SecretString;
use tempfile::TempDir;

use super::{Client, Cluster, proxy::pglobby};

/// No password matches it.
pub const VERIFIER: &str = "SCRAM-SHA-256$4096:c2FsdA==$c3RvcmVk:c2VydmVy";

/// A cluster, and a folder with the configuration for it.
pub struct Installation {
    pub cluster: Cluster,
    pub folder: TempDir,
}

impl Installation {
    pub fn new() -> Self {
        Self::on(Cluster::start())
    }

    pub fn on(cluster: Cluster) -> Self {
        Self { cluster, folder: tempfile::tempdir().unwrap() }
    }

    pub async fn initialised() -> Self {
        let installation = Self::new();
        init(&installation.config("")).await.unwrap();
        installation
    }

    /// Writes and reads `proxy.toml`; `keys` are lines of TOML before the sections.
    pub fn config(&self, keys: &str) -> Config {
        self.config_with_url(keys, &self.cluster.url("central"))
    }

    pub fn config_with_url(&self, keys: &str, url: &str) -> Config {
        let text = format!("{keys}\n[central]\nurl = {url:?}\n[keys]\nfile = \"keyring.toml\"\n");
        fs::write(self.file(), &text).unwrap();
        Config::read(&text, Some(&self.file()), &|_| None).unwrap()
    }

    pub fn file(&self) -> PathBuf {
        self.folder.path().join("proxy.toml")
    }

    pub async fn central(&self) -> Client {
        self.cluster.client("central").await
    }

    pub fn directory(&self, config: &Config) -> (Arc<CentralDirectory>, Central) {
        let central = Central::open(config).unwrap();
        let keyring = Arc::new(ReloadableKeyring::load(config).unwrap());
        (CentralDirectory::new(central.clone(), keyring, config), central)
    }

    /// Inserts a row as onboarding does; returns the tenant's id.
    pub async fn add_tenant(&self, name: &str) -> i64 {
        let client = self.central().await;
        let insert = format!(
            "INSERT INTO pglobby.tenants (name, host, database, username) VALUES ('{name}', 'default', '{name}', '{name}_owner')
             RETURNING id"
        );
        let id = client.ask(&insert).await;
        let keyring = Keyring::load(&self.config("")).unwrap();
        let place = SecretLocation { table: "tenants", row: &id, column: "sealed_password" };
        let blob = keyring.seal(&place, &SecretString::from(format!("{name}'s password"))).unwrap();
        let update = "UPDATE pglobby.tenants SET sealed_password = $1, status = 'active' WHERE id = $2";
        let id: i64 = id.parse().unwrap();
        client.execute(update, &[&blob, &id]).await.unwrap();
        id
    }

    pub async fn add_login(&self, name: &str, tenant_id: i64) -> i64 {
        let insert = format!(
            "INSERT INTO pglobby.logins (name, kind, tenant_id, verifier) VALUES ('{name}', 'employee', {tenant_id}, '{VERIFIER}')
             RETURNING id"
        );
        self.central().await.ask(&insert).await.parse().unwrap()
    }

    /// Runs the program with this configuration.
    pub fn run(&self, arguments: &[&str]) -> Output {
        pglobby().args(arguments).arg("--config").arg(self.file()).output().unwrap()
    }
}
