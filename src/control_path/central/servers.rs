//! The servers that the URL of the central database names, one by one: which takes writes, which stands by.

use secrecy::ExposeSecret as _;
use tokio_postgres::config::{Host, TargetSessionAttrs};

use super::{causes, tls::CentralTlsConnector};
use crate::config::Config;

/// One server of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CentralServer {
    /// Host and port.
    pub place: String,
    /// Its role and version; otherwise why it cannot be used.
    pub found: Result<Role, String>,
}

/// What a server is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Role {
    /// It takes writes.
    pub is_primary: bool,
    /// `server_version`.
    pub version: String,
}

/// Logs in to each of them. Empty if the URL names one only.
pub async fn look(config: &Config) -> Vec<CentralServer> {
    let given = &config.central.connection;
    let (hosts, ports) = (given.get_hosts(), given.get_ports());
    let mut servers = Vec::new();
    for (at, host) in hosts.iter().enumerate().filter(|_| hosts.len() > 1) {
        let port = ports.get(at).or(ports.first()).copied().unwrap_or(5432);
        let name = match host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(folder) => folder.display().to_string(),
        };
        let mut one = tokio_postgres::Config::new();
        one.host(&name).port(port).application_name("pglobby check");
        if let Some(address) = given.get_hostaddrs().get(at) {
            one.hostaddr(*address);
        }
        one.user(given.get_user().unwrap_or_default()).dbname(given.get_dbname().unwrap_or_default());
        one.ssl_mode(given.get_ssl_mode()).channel_binding(given.get_channel_binding());
        if let Some(password) = &config.central.password {
            one.password(password.expose_secret());
        }
        let limit = config.timeouts.central;
        let found = tokio::time::timeout(limit, ask(&one, config)).await;
        let found = found.unwrap_or_else(|_| Err(format!("no answer within {limit:?} (central_timeout)")));
        servers.push(CentralServer { place: format!("{name}:{port}"), found });
    }
    servers
}

async fn ask(one: &tokio_postgres::Config, config: &Config) -> Result<Role, String> {
    let tls = CentralTlsConnector::new(&config.central.tls).map_err(|error| error.to_string())?;
    let asked = async {
        let (client, driver) = one.connect(tls).await?;
        let driven = tokio::spawn(driver);
        let sql = "SELECT pg_catalog.current_setting('transaction_read_only') = 'off',
            pg_catalog.current_setting('server_version')";
        let row = client.query_one(sql, &[]).await;
        driven.abort();
        let row = row?;
        Ok::<_, tokio_postgres::Error>(Role { is_primary: row.try_get(0)?, version: row.try_get(1)? })
    };
    asked.await.map_err(|error| causes(&error))
}

/// Whether nodes leave out servers that take no writes.
pub fn looks_for_primary(config: &Config) -> bool {
    config.central.connection.get_target_session_attrs() == TargetSessionAttrs::ReadWrite
}
