//! `pglobby check`: finds out whether `serve` would work. Changes nothing.

use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;
use tokio_postgres::{Client, Row, config::SslMode};

use crate::{
    config::{CentralTls, Config, TlsMode},
    control_path::{
        admin::{
            actor::AdminError,
            host_addresses,
            host_budget::{SERVER_LIMITS, ServerLimits, TENANT_ROLES},
        },
        central::{
            Central, CentralError, causes,
            servers::{self, CentralServer, Role},
            tls::CentralTlsConnector,
        },
        directory::snapshot,
        fleet::nodes,
        init::{keyring_origin, open_to_public},
        migrations,
        secrets::{keyring::Keyring, keyring_reload::ReloadableKeyring, seal::SecretLocation},
    },
    data_path::host_address::HostAddress,
    wire::tls::{
        towards_clients::{CertificateFiles, ClientTlsAcceptor},
        towards_servers::{ServerTlsConfigs, Trust},
    },
};

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was checked: `configuration`, `key ring`, `host default`, …
    pub check: String,
    /// Whether it passed.
    pub ok: bool,
    /// The finding, and how to fix it.
    pub detail: String,
}

impl Check {
    /// A check that passed.
    pub fn passed(check: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { check: check.into(), ok: true, detail: detail.into() }
    }

    /// A check that failed.
    pub fn failed(check: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { check: check.into(), ok: false, detail: detail.into() }
    }

    fn of<E: std::fmt::Display>(check: impl Into<String>, outcome: Result<String, E>) -> Self {
        match outcome {
            Ok(detail) => Self::passed(check, detail),
            Err(error) => Self::failed(check, error.to_string()),
        }
    }
}

/// Runs all checks, also after a failure where possible.
pub async fn check(config: &Config) -> Vec<Check> {
    let origin = config.path.as_ref().map_or("the environment".to_owned(), |path| path.display().to_string());
    let mut checks = vec![Check::passed("configuration", origin)];
    checks.extend(certificates(config));

    let keyring = Keyring::load(config);
    checks.push(Check::of(
        "key ring",
        keyring.as_ref().map(|ring| {
            let keys = ring.key_ids().count();
            format!("{}: {keys} key(s), seals with {}", keyring_origin(config), ring.writing_key())
        }),
    ));

    checks.extend(snapshot(config));
    checks.extend(central_servers(config).await);
    let (central, client, version) = match enter(config).await {
        Ok(entered) => entered,
        Err(detail) => {
            checks.push(Check::failed("central database", detail));
            return checks;
        }
    };
    let update = if version < migrations::latest() { "; run `pglobby init` to upgrade it" } else { "" };
    let found = format!("{}, schema version {version}{update}", config.central.url);
    checks.push(Check::passed("central database", found));
    checks.push(match open_to_public(&client).await {
        Ok(false) => Check::passed("central database access", "PUBLIC may not connect"),
        Ok(true) => {
            Check::failed("central database access", "PUBLIC may connect; run `pglobby init` to revoke that")
        }
        Err(error) => Check::failed("central database access", error.to_string()),
    });
    checks.extend(check_nodes(&central).await);
    if let Ok(keyring) = &keyring {
        checks.push(
            tenants_open(&client, keyring)
                .await
                .unwrap_or_else(|error| Check::failed("tenants' credentials", error.to_string())),
        );
        match hosts(&client, keyring, config).await {
            Ok(found) => checks.extend(found),
            Err(error) => checks.push(Check::failed("hosts", error.to_string())),
        }
    }
    checks
}

/// The central database, a connection to it, and the version of its schema.
async fn enter(config: &Config) -> Result<(Central, Client, i32), String> {
    let central = Central::open(config).map_err(|error| error.to_string())?;
    let client = central.connect_to(central.database()).await.map_err(|error| error.to_string())?;
    let version = migrations::require_usable(&client).await.map_err(|error| error.to_string())?;
    Ok((central, client, version))
}

/// Where the URL names several servers: the one that takes writes, and those that stand by.
async fn central_servers(config: &Config) -> Vec<Check> {
    let servers = servers::look(config).await;
    let looks_for_primary = servers::looks_for_primary(config);
    let check = |server: &CentralServer| {
        let name = format!("central server {}", server.place);
        match &server.found {
            Ok(Role { is_primary: true, version }) => {
                Check::passed(name, format!("takes writes, PostgreSQL {version}"))
            }
            Ok(Role { version, .. }) if looks_for_primary => {
                Check::passed(name, format!("stands by, PostgreSQL {version}"))
            }
            Ok(_) => Check::failed(
                name,
                "stands by, and nodes would use it; add target_session_attrs=read-write to central.url",
            ),
            Err(error) => Check::failed(name, error.clone()),
        }
    };
    servers.iter().map(check).collect()
}

/// The file that `serve` would begin with if the central database were away.
fn snapshot(config: &Config) -> Option<Check> {
    let path = config.directory_snapshot.as_ref()?;
    let keyring = ReloadableKeyring::load(config).ok()?;
    let database = config.central.connection.get_dbname().unwrap_or_default();
    let name = "directory snapshot";
    Some(match snapshot::examine(config, database, keyring) {
        Ok(found) => Check::passed(
            name,
            format!(
                "{}: {} s old, {} logins, {} tenants, {} changed since; taken by {}",
                path.display(),
                found.age.as_secs(),
                found.logins,
                found.tenants,
                found.changed,
                found.origin
            ),
        ),
        Err(refused) if refused.is_missing() => {
            Check::passed(name, format!("{}: not there yet; `pglobby serve` writes it", path.display()))
        }
        Err(refused) => Check::failed(name, refused.to_string()),
    })
}

/// Nodes of two versions are part of every rollout; with two key rings, one cannot open what another seals. An
/// older schema has no list of nodes.
async fn check_nodes(central: &Central) -> Option<Check> {
    let nodes = match nodes::list(central).await {
        Ok(nodes) => nodes,
        Err(AdminError::Refused(_)) => return None,
        Err(error) => return Some(Check::failed("nodes", error.to_string())),
    };
    let serving = nodes.iter().filter(|node| node.is_serving()).count();
    Some(match nodes::differences(&nodes) {
        None => Check::passed("nodes", format!("{serving} serving")),
        Some(differences) if nodes::keys_differ(&nodes) => Check::failed(
            "nodes",
            format!("{serving} serving; {differences}; give every node the same key ring"),
        ),
        Some(differences) => Check::passed("nodes", format!("{serving} serving; {differences}")),
    })
}

/// Loads the files as `serve` does: a file may contain the certificate of another key.
fn certificates(config: &Config) -> Vec<Check> {
    let (client, server) = (&config.client_tls, &config.server_tls);
    let mut checks = Vec::new();
    if let (Some(certificate), Some(key)) = (&client.cert_file, &client.key_file) {
        let asks_clients = client.mode.verifies();
        let client_authorities = client.ca_file.as_deref().filter(|_| asks_clients);
        let files = CertificateFiles { certificate, key, client_authorities };
        let loaded = ClientTlsAcceptor::load(files).map(|_| certificate.display().to_string());
        checks.push(Check::of("TLS towards clients", loaded));
    }
    let identity = server.cert_file.as_deref().zip(server.key_file.as_deref());
    if identity.is_some() || server.ca_file.is_some() {
        // Does not load the system's authorities, which may be missing where they are not used.
        let trust = if server.ca_file.is_some() { Trust::Authority } else { Trust::AnyCertificate };
        let loaded = ServerTlsConfigs::new(server.ca_file.clone(), identity).and_then(|configs| {
            configs.get(trust, None).map(|_| "certificates and authorities can be used".to_owned())
        });
        checks.push(Check::of("TLS towards servers", loaded));
    }
    checks
}

async fn tenants_open(client: &Client, keyring: &Keyring) -> Result<Check, CentralError> {
    let sql = "SELECT id, name, sealed_password, sealed_ro_password FROM pglobby.tenants
        WHERE status <> 'dropped' ORDER BY name";
    let rows = client.query(sql, &[]).await?;
    let (mut opened, mut problems) = (0, Vec::new());
    for row in &rows {
        let (id, name): (i64, &str) = (row.try_get("id")?, row.try_get("name")?);
        for column in ["sealed_password", "sealed_ro_password"] {
            let Some(blob) = row.try_get::<_, Option<&[u8]>>(column)? else { continue };
            match keyring.open(&SecretLocation { table: "tenants", row: &id.to_string(), column }, blob) {
                Ok(_) => opened += 1,
                Err(error) => problems.push(format!("tenant {name:?}: {error}")),
            }
        }
    }
    Ok(match problems.is_empty() {
        true => Check::passed("tenants' credentials", format!("{opened} open, of {} tenant(s)", rows.len())),
        false => Check::failed("tenants' credentials", problems.join("; ")),
    })
}

async fn hosts(client: &Client, keyring: &Keyring, config: &Config) -> Result<Vec<Check>, CentralError> {
    let sql =
        "SELECT name, address, port, ARRAY(SELECT
                  pg_catalog.jsonb_array_elements_text(pg_catalog.to_jsonb(h) -> 'more_addresses')) AS more_addresses,
                tls_mode, tls_root_ca, admin_user, admin_database, sealed_admin_password, max_connections
        FROM pglobby.hosts h ORDER BY name";
    let mut checks = Vec::new();
    for row in client.query(sql, &[]).await? {
        let name: String = row.try_get("name")?;
        let roles: Vec<String> = client
            .query(TENANT_ROLES, &[&name])
            .await?
            .iter()
            .map(|row| row.try_get(0))
            .collect::<Result<_, _>>()?;
        let budget: Option<i32> = row.try_get("max_connections")?;
        match reach_host(&name, &row, &roles, keyring, config).await {
            Ok((found, limits)) => {
                checks.extend(found);
                checks.push(check_budget(&name, budget, &limits));
            }
            Err(detail) => checks.push(Check::failed(format!("host {name}"), detail)),
        }
    }
    Ok(checks)
}

/// A host without a budget works, though not well.
fn check_budget(name: &str, budget: Option<i32>, limits: &ServerLimits) -> Check {
    let (check, server, remedy) = (format!("budget of host {name}"), limits.in_words(), limits.remedy(name));
    match (budget, limits.trouble(budget)) {
        (Some(budget), None) => {
            Check::passed(check, format!("{budget} for all nodes; the server has {server}"))
        }
        (None, _) => Check::passed(check, format!("none; the server has {server}. To set one: {remedy}")),
        (Some(budget), Some(_)) => {
            Check::failed(check, format!("{budget} for all nodes, but the server has {server}; {remedy}"))
        }
    }
}

/// What logging in at one address of a host has shown.
struct Reached {
    version: String,
    is_standby: bool,
    limits: ServerLimits,
}

/// Logs in as the host's administrator at each of its addresses. What was found, and the limits of its primary.
async fn reach_host(
    name: &str,
    row: &Row,
    roles: &[String],
    keyring: &Keyring,
    config: &Config,
) -> Result<(Vec<Check>, ServerLimits), String> {
    let unreadable = |error: tokio_postgres::Error| causes(&error);
    let text = |column: &str| row.try_get::<_, String>(column).map_err(unreadable);
    let addresses = host_addresses::of_row(row)?;
    let mode: TlsMode = text("tls_mode")?.parse()?;
    let root_ca = row.try_get::<_, Option<String>>("tls_root_ca").map_err(unreadable)?.map(Into::into);
    let tls = CentralTls { mode, root_ca };
    let mut connection = tokio_postgres::Config::new();
    connection
        .user(text("admin_user")?)
        .dbname(text("admin_database")?)
        .application_name("pglobby check")
        .ssl_mode(mode.for_tokio_postgres());
    if let Some(blob) = row.try_get::<_, Option<&[u8]>>("sealed_admin_password").map_err(unreadable)? {
        let place = SecretLocation { table: "hosts", row: name, column: "sealed_admin_password" };
        let password: SecretString = keyring.open(&place, blob).map_err(|error| error.to_string())?;
        connection.password(password.expose_secret());
    }
    let limit = config.timeouts.server_connect;
    let mut reached = Vec::new();
    for address in &addresses {
        let looked = tokio::time::timeout(limit, look_at(address, &connection, &tls, roles)).await;
        let silent = |_| Err(format!("did not answer within {limit:?} (server_connect_timeout)"));
        reached.push((address, looked.unwrap_or_else(silent)));
    }
    in_words(name, reached)
}

/// `Ok`: there is one primary. A standby that cannot be reached is a failed check of its own.
fn in_words(
    name: &str,
    reached: Vec<(&HostAddress, Result<Reached, String>)>,
) -> Result<(Vec<Check>, ServerLimits), String> {
    let one = reached.len() == 1;
    let (mut found, mut failed, mut checks) = (Vec::new(), Vec::new(), Vec::new());
    let mut primaries = Vec::new();
    for (address, looked) in reached {
        match looked {
            Ok(server) => {
                let role = if server.is_standby { "standby" } else { "primary" };
                let role = if one { String::new() } else { format!(" ({role})") };
                found.push(format!("{address}{role}, PostgreSQL {}", server.version));
                if one || !server.is_standby {
                    primaries.push(server.limits);
                }
            }
            Err(error) => {
                failed.push(format!("{address}: {error}"));
                let detail = format!("{error}; without it, a failover has one server less to go to");
                checks.push(Check::failed(format!("address {address} of host {name}"), detail));
            }
        }
    }
    let all = found.join("; ");
    if primaries.len() > 1 {
        return Err(format!("several of its addresses accept writes; stop all but the primary: {all}"));
    }
    match primaries.pop() {
        Some(limits) => {
            checks.insert(0, Check::passed(format!("host {name}"), all));
            Ok((checks, limits))
        }
        None if one => Err(failed.join("; ")),
        None => Err(format!("none of its addresses is a primary: {}", [found, failed].concat().join("; "))),
    }
}

async fn look_at(
    address: &HostAddress,
    connection: &tokio_postgres::Config,
    tls: &CentralTls,
    roles: &[String],
) -> Result<Reached, String> {
    let tls = CentralTlsConnector::new(tls).map_err(|error| error.to_string())?;
    let mut connection = connection.clone();
    connection.host(address.place()).port(address.port());
    if matches!(address, HostAddress::Unix { .. }) {
        connection.ssl_mode(SslMode::Disable);
    }
    let look = async {
        let (client, driver) = connection.connect(tls).await?;
        let driven = tokio::spawn(driver);
        let sql = "SELECT pg_catalog.current_setting('server_version'), pg_catalog.pg_is_in_recovery()";
        let server = client.query_one(sql, &[]).await;
        let limits = client.query_one(SERVER_LIMITS, &[&roles]).await;
        driven.abort();
        let server = server?;
        Ok(Reached {
            version: server.try_get(0)?,
            is_standby: server.try_get(1)?,
            limits: ServerLimits::of_row(&limits?)?,
        })
    };
    look.await.map_err(|error: tokio_postgres::Error| causes(&error))
}
