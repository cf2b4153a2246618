//! `pglobby init`: creates or upgrades the central database.
//!
//! Each step checks first whether it is needed, so `init` may be run at any time.

use secrecy::SecretString;
use serde::Serialize;
use tokio_postgres::{Client, config::Host, error::SqlState};

use crate::{
    config::Config,
    control_path::{
        admin::host_budget::{SERVER_LIMITS, ServerLimits},
        central::{Central, CentralError, causes},
        migrations::{self, MigrationError},
        secrets::{
            keyring::{Keyring, KeyringError},
            seal::{SealError, SecretLocation},
        },
    },
    data_path::host_address::{ADDRESSES_MAX, DEFAULT_PORT, HostAddress},
};

/// The database to connect to for CREATE DATABASE.
const MAINTENANCE_DATABASE: &str = "postgres";
/// The name of the central cluster among the hosts.
pub const DEFAULT_HOST: &str = "default";

/// What was found and done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InitReport {
    /// URL of the central database, without a password.
    pub central: String,
    /// Whether it was created.
    pub database_created: bool,
    /// Whether CONNECT was revoked from PUBLIC.
    pub closed_to_public: bool,
    /// Version of the schema.
    pub schema_version: i32,
    /// Names of the migrations that were applied.
    pub migrations_applied: Vec<&'static str>,
    /// The key ring's file, or `PGLOBBY_KEYS`.
    pub keyring: String,
    /// Whether it was created.
    pub keyring_created: bool,
    /// [`DEFAULT_HOST`].
    pub host: &'static str,
    /// Whether it was registered.
    pub host_registered: bool,
    /// Its budget for all nodes (`hosts.max_connections`); `None`: no limit.
    pub host_budget: Option<i32>,
}

/// Why `init` stopped. Steps before the failed one stay done.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum InitError {
    /// The central database.
    #[error(transparent)]
    Central(#[from] CentralError),
    /// Its schema.
    #[error(transparent)]
    Migration(#[from] MigrationError),
    /// The key ring.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// Sealing the master's password.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The master login lacks a privilege.
    #[error("the master login \"{user}\" lacks {missing}; run as a superuser: ALTER ROLE {role} {missing}")]
    Rights { user: String, role: String, missing: String },
    /// `CREATE DATABASE` was refused.
    #[error("could not create the central database \"{database}\": {}", causes(cause))]
    CreateDatabase { database: String, cause: tokio_postgres::Error },
    /// PUBLIC may connect, and only the owner can revoke that.
    #[error(
        "PUBLIC may connect to the central database and \"{user}\" cannot change that; run as its owner: \
         REVOKE CONNECT, TEMPORARY ON DATABASE {database} FROM PUBLIC"
    )]
    OpenToPublic { user: String, database: String },
    /// The ring is missing, and something is sealed with one of its keys.
    #[error(
        "there is no key ring {path}, but stored passwords are sealed with key {key}; put the ring back \
         (a new one could not open them)"
    )]
    KeyringLost { path: String, key: String },
}

/// Creates everything that `serve` and `tenant create` need.
pub async fn init(config: &Config) -> Result<InitReport, InitError> {
    let central = Central::open(config)?;
    let (mut client, database_created) = enter_or_create_database(&central).await?;
    require_rights(&client).await?;
    let applied = migrations::apply(&mut client).await?;
    let closed_to_public = close_to_public(&client, central.user()).await?;
    let (keyring, keyring_created) = load_or_create_keyring(config, &client).await?;
    let (host_registered, host_budget) = register_host(config, &client, &keyring).await?;
    Ok(InitReport {
        central: central.url().to_owned(),
        database_created,
        closed_to_public,
        schema_version: migrations::require_usable(&client).await?,
        migrations_applied: applied.iter().map(|migration| migration.name).collect(),
        keyring: keyring_origin(config),
        keyring_created,
        host: DEFAULT_HOST,
        host_registered,
        host_budget,
    })
}

async fn enter_or_create_database(central: &Central) -> Result<(Client, bool), InitError> {
    match central.connect_to(central.database()).await {
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_DATABASE) => {}
        entered => return Ok((entered?, false)),
    }
    let maintenance = central.connect_to(MAINTENANCE_DATABASE).await?;
    require_rights(&maintenance).await?;
    let database = quote_identifier(central.database());
    // template0 has no connections and no local objects.
    let created = maintenance.batch_execute(&format!("CREATE DATABASE {database} TEMPLATE template0")).await;
    if let Err(cause) = created {
        // Another `init` created it. If both do it at once, the unique index of the catalog reports it.
        let duplicate = [Some(&SqlState::DUPLICATE_DATABASE), Some(&SqlState::UNIQUE_VIOLATION)];
        if !duplicate.contains(&cause.code()) {
            return Err(InitError::CreateDatabase { database: central.database().to_owned(), cause });
        }
        return Ok((central.connect_to(central.database()).await?, false));
    }
    Ok((central.connect_to(central.database()).await?, true))
}

/// The master login creates databases and roles for tenants. A missing privilege is reported now rather
/// than at the first `tenant create`.
async fn require_rights(client: &Client) -> Result<(), InitError> {
    let sql = "SELECT rolname::text, rolsuper OR rolcreatedb, rolsuper OR rolcreaterole
        FROM pg_catalog.pg_roles WHERE rolname = current_user";
    let row = client.query_one(sql, &[]).await.map_err(CentralError::from)?;
    let user: String = row.try_get(0).map_err(CentralError::from)?;
    let mut missing = Vec::new();
    for (column, right) in [(1, "CREATEDB"), (2, "CREATEROLE")] {
        if !row.try_get::<_, bool>(column).map_err(CentralError::from)? {
            missing.push(right);
        }
    }
    match missing.is_empty() {
        true => Ok(()),
        false => Err(InitError::Rights { role: quote_identifier(&user), user, missing: missing.join(" ") }),
    }
}

/// Roles of tenants may be on the same cluster, and by default every role may connect to every database.
async fn close_to_public(client: &Client, user: &str) -> Result<bool, InitError> {
    if !open_to_public(client).await? {
        return Ok(false);
    }
    let sql = "SELECT pg_catalog.quote_ident(pg_catalog.current_database())";
    let row = client.query_one(sql, &[]).await.map_err(CentralError::from)?;
    let database: String = row.try_get(0).map_err(CentralError::from)?;
    // A role that is not the owner gets a warning or an error. The result is checked below.
    let _ =
        client.batch_execute(&format!("REVOKE CONNECT, TEMPORARY ON DATABASE {database} FROM PUBLIC")).await;
    match open_to_public(client).await? {
        false => Ok(true),
        true => Err(InitError::OpenToPublic { user: user.to_owned(), database }),
    }
}

/// Whether any role may connect to the central database.
pub async fn open_to_public(client: &Client) -> Result<bool, CentralError> {
    let sql = "SELECT pg_catalog.has_database_privilege('public', pg_catalog.current_database(), 'CONNECT')
        OR pg_catalog.has_database_privilege('public', pg_catalog.current_database(), 'TEMPORARY')";
    Ok(client.query_one(sql, &[]).await?.try_get(0)?)
}

/// The key ring's file, or `PGLOBBY_KEYS`.
pub fn keyring_origin(config: &Config) -> String {
    match (&config.keys_text, &config.keys_file) {
        (None, Some(path)) => path.display().to_string(),
        _ => "PGLOBBY_KEYS".to_owned(),
    }
}

async fn load_or_create_keyring(config: &Config, client: &Client) -> Result<(Keyring, bool), InitError> {
    let path = match Keyring::load(config) {
        Err(KeyringError::Missing { path }) => path,
        loaded => return Ok((loaded?, false)),
    };
    if let Some(key) = a_key_in_use(client).await? {
        // Another `init` may have created the ring and sealed with it in between.
        return match Keyring::load(config) {
            Err(KeyringError::Missing { path }) => {
                Err(InitError::KeyringLost { path: path.display().to_string(), key })
            }
            loaded => Ok((loaded?, false)),
        };
    }
    let keyring = Keyring::generate();
    match keyring.create_file(&path) {
        // Another `init` created it.
        Err(KeyringError::Exists { .. }) => Ok((Keyring::load(config)?, false)),
        created => created.map(|()| (keyring, true)).map_err(InitError::from),
    }
}

async fn a_key_in_use(client: &Client) -> Result<Option<String>, CentralError> {
    let sql = "SELECT sealed_admin_password FROM pglobby.hosts WHERE sealed_admin_password IS NOT NULL
        UNION ALL SELECT sealed_password FROM pglobby.tenants
            WHERE sealed_password IS NOT NULL AND status <> 'dropped'
        LIMIT 1";
    let Some(row) = client.query_opt(sql, &[]).await? else { return Ok(None) };
    let blob: &[u8] = row.try_get(0)?;
    Ok(Some(Keyring::key_of(blob).unwrap_or("(unreadable)").to_owned()))
}

/// Registers the central cluster as a host, with a budget that it allows, if it is not registered yet. Returns
/// whether it did, and the host's budget.
async fn register_host(
    config: &Config,
    client: &Client,
    keyring: &Keyring,
) -> Result<(bool, Option<i32>), InitError> {
    let no_tenants: &[String] = &[];
    let limits = client.query_one(SERVER_LIMITS, &[&no_tenants]).await;
    let limits = limits.and_then(|row| ServerLimits::of_row(&row)).map_err(CentralError::from)?;
    let connection = &config.central.connection;
    let address = match (connection.get_hosts().first(), connection.get_hostaddrs().first()) {
        (Some(Host::Tcp(name)), _) => name.clone(),
        (Some(Host::Unix(folder)), _) => folder.display().to_string(),
        (None, address) => address.map(ToString::to_string).unwrap_or_default(),
    };
    let port = i32::from(connection.get_ports().first().copied().unwrap_or(DEFAULT_PORT));
    let user = connection.get_user().unwrap_or_default();
    let root_ca = config.central.tls.root_ca.as_ref().map(|path| path.display().to_string());
    let sealed =
        config.central.password.as_ref().map(|password| seal_for_host(keyring, password)).transpose()?;
    let sql = "INSERT INTO pglobby.hosts
            (name, address, port, tls_mode, tls_root_ca, admin_user, admin_database, sealed_admin_password,
             max_connections, more_addresses)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT (name) DO NOTHING";
    let inserted = client
        .execute(
            sql,
            &[
                &DEFAULT_HOST,
                &address,
                &port,
                &config.central.tls.mode.word(),
                &root_ca,
                &user,
                &MAINTENANCE_DATABASE,
                &sealed,
                &limits.proposed(),
                &further_addresses(connection),
            ],
        )
        .await
        .map_err(CentralError::from)?;
    let budget = "SELECT max_connections FROM pglobby.hosts WHERE name = $1";
    let budget = client.query_one(budget, &[&DEFAULT_HOST]).await.and_then(|row| row.try_get(0));
    Ok((inserted == 1, budget.map_err(CentralError::from)?))
}

/// Where a central database of several hosts is besides the first of them.
fn further_addresses(connection: &tokio_postgres::Config) -> Vec<String> {
    let ports = connection.get_ports();
    let port = |at: usize| ports.get(at).or(ports.first()).copied().unwrap_or(DEFAULT_PORT);
    let hosts = connection.get_hosts().iter().enumerate().take(ADDRESSES_MAX).skip(1);
    hosts
        .map(|(at, host)| match host {
            Host::Tcp(name) => HostAddress::of(name, port(at)).to_string(),
            Host::Unix(folder) => HostAddress::of(&folder.display().to_string(), port(at)).to_string(),
        })
        .collect()
}

fn seal_for_host(keyring: &Keyring, password: &SecretString) -> Result<Vec<u8>, SealError> {
    let place = SecretLocation { table: "hosts", row: DEFAULT_HOST, column: "sealed_admin_password" };
    keyring.seal(&place, password)
}

/// For statements that take no parameters. The names come from the configuration.
fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
