//! Hosts: register, list, change, remove.

use secrecy::SecretString;
use serde::Serialize;
use serde_json::json;
use tokio_postgres::{Client, GenericClient, Row, error::SqlState, types::ToSql};

use super::{
    actor::{Actor, AdminError, nearest},
    fields::{described, from_row},
    host_addresses, host_budget,
    host_connection::HostAdmin,
    tenants::SERVERS_MAX,
};
use crate::{
    config::TlsMode,
    control_path::{
        onboarding::names::{NAME_BYTES_MAX, check_identifier, ident},
        secrets::seal::SecretLocation,
    },
    data_path::host_address::{HostAddress, written},
};

described! {
    /// One row of `pglobby.hosts`, without the password.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize)]
    pub struct HostSummary {
        /// `hosts.name`.
        pub name: String,
        /// DNS name, address, or the folder of a Unix socket.
        pub address: String,
        /// TCP port, or the part of the socket's name.
        pub port: i32,
        /// Further addresses, of its standbys, as `name:port`.
        pub more_addresses: Vec<String>,
        /// libpq's `sslmode`.
        pub tls_mode: String,
        /// PEM file of authorities on every node.
        pub tls_root_ca: Option<String>,
        /// The administrator's role; it may create databases and roles.
        pub admin_user: String,
        /// The database it connects to.
        pub admin_database: String,
        /// Whether a password is stored for it.
        pub has_password: bool,
        /// The budget.
        pub max_connections: Option<i32>,
        /// Whether new tenants may be placed there.
        pub accepts_tenants: bool,
        /// Living tenants.
        pub tenants: i64,
    }
}

/// What to register.
#[derive(Debug, Clone)]
pub struct NewHost {
    /// `hosts.name`.
    pub name: String,
    /// One or several addresses, as libpq writes them: `pg1,pg2:5433`. Each is a DNS name, an address, or the
    /// folder of a Unix socket.
    pub address: String,
    /// Of the addresses that name no port; 5432.
    pub port: u16,
    /// libpq's `sslmode`.
    pub tls_mode: String,
    /// PEM file of authorities on every node.
    pub tls_root_ca: Option<String>,
    /// The administrator's role; it may create databases and roles.
    pub admin_user: String,
    /// The database it connects to.
    pub admin_database: String,
    /// Its password.
    pub admin_password: Option<SecretString>,
    /// The budget. `None`: one that leaves room for others.
    pub max_connections: Option<u32>,
    /// Whether new tenants may be placed there.
    pub accepts_tenants: bool,
}

described! {
    /// The result of checking a host.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize)]
    pub struct HostReport {
        /// `hosts.name`.
        pub name: String,
        /// `server_version_num`.
        pub server_version: i32,
        /// Whether the administrator is a superuser.
        pub superuser: bool,
        /// The budget. A host that is added without one gets one that its PostgreSQL allows.
        pub max_connections: Option<i32>,
        /// Its PostgreSQL's `max_connections`.
        pub server_max_connections: i32,
        /// `superuser_reserved_connections` and `reserved_connections`, which tenants' roles cannot use.
        pub server_reserved_connections: i32,
        /// Connections of other roles than the tenants', now.
        pub other_connections: i32,
        /// Databases that every role of the host may connect to, tenants' roles included; see
        /// [`close_to_public`].
        pub open_to_public: Vec<String>,
    }
}

/// Linux's PATH_MAX.
const PATH_BYTES_MAX: usize = 4096;

/// Keys of `host set`.
const SETTINGS: &str =
    "address port tls_mode tls_root_ca admin_user admin_database max_connections accepts_tenants";

const SUMMARY: &str = "SELECT name, address, port,
    ARRAY(SELECT pg_catalog.jsonb_array_elements_text(pg_catalog.to_jsonb(h) -> 'more_addresses')) AS more_addresses,
    tls_mode, tls_root_ca, admin_user, admin_database,
    sealed_admin_password IS NOT NULL AS has_password, max_connections, accepts_tenants,
    (SELECT count(*) FROM pglobby.tenants t WHERE t.host = h.name AND t.status <> 'dropped') AS tenants
    FROM pglobby.hosts h";

/// All hosts, by name.
pub async fn list(actor: &Actor) -> Result<Vec<HostSummary>, AdminError> {
    let client = actor.central.client().await?;
    let rows = client.query(&format!("{SUMMARY} ORDER BY name"), &[]).await?;
    Ok(rows.iter().map(summary).collect())
}

fn summary(row: &Row) -> HostSummary {
    from_row!(row => HostSummary {
        name, address, port, more_addresses, tls_mode, tls_root_ca, admin_user, admin_database, has_password,
        max_connections, accepts_tenants, tenants
    })
}

/// Registers a host after connecting to it and checking its administrator's privileges.
///
/// # Errors
/// It is there already, cannot be reached, or the rights are missing; then nothing is registered.
pub async fn add(actor: &Actor, host: &NewHost) -> Result<HostReport, AdminError> {
    check_identifier("host", &host.name)?;
    let limit = host.max_connections.map(|limit| limit.to_string());
    let addresses = host_addresses::parse(&host.address, host.port)?;
    for (key, value) in [
        ("tls_mode", Some(host.tls_mode.as_str())),
        ("tls_root_ca", host.tls_root_ca.as_deref()),
        ("admin_user", Some(&host.admin_user)),
        ("admin_database", Some(&host.admin_database)),
        ("max_connections", limit.as_deref()),
    ] {
        checked(key, value)?;
    }
    let mut client = actor.central.client().await?;
    let transaction = Client::transaction(&mut client).await?;
    let max_connections = host.max_connections.and_then(|limit| i32::try_from(limit).ok());
    let inserted = transaction
        .execute(
            "INSERT INTO pglobby.hosts (name, address, tls_mode, tls_root_ca, admin_user, admin_database,
                                        max_connections, accepts_tenants)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
            &[
                &host.name,
                &addresses.first().map(HostAddress::place),
                &host.tls_mode,
                &host.tls_root_ca,
                &host.admin_user,
                &host.admin_database,
                &max_connections,
                &host.accepts_tenants,
            ],
        )
        .await;
    match inserted {
        Err(error) if error.code() == Some(&SqlState::UNIQUE_VIOLATION) => {
            return Err(AdminError::Exists(format!(
                "host {:?} exists already; change it with `pglobby host set`",
                host.name
            )));
        }
        inserted => inserted?,
    };
    host_addresses::store(&transaction, &host.name, &addresses).await?;
    seal_password(actor, &transaction, &host.name, host.admin_password.as_ref()).await?;
    let report = look_at(actor, &transaction, &host.name, true).await?;
    let detail = json!({
        "host": host.name, "address": written(&addresses), "admin_user": host.admin_user,
        "max_connections": report.max_connections,
    });
    actor.commit(transaction, "host.add", None, &detail).await?;
    Ok(report)
}

/// Changes a host; an empty value removes a setting. The host must be reachable with the new settings.
///
/// # Errors
/// Unknown key, bad value, or the host cannot be reached like that.
pub async fn set(
    actor: &Actor,
    name: &str,
    settings: &[(String, String)],
    password: Option<&SecretString>,
) -> Result<HostReport, AdminError> {
    let mut client = actor.central.client().await?;
    let transaction = Client::transaction(&mut client).await?;
    let of_key =
        |wanted: &str| settings.iter().rfind(|(key, _)| key == wanted).map(|(_, value)| value.trim());
    for (key, value) in settings {
        let Some(column) = SETTINGS.split_whitespace().find(|setting| setting == key) else {
            return Err(unknown_setting(key, &SETTINGS.split_whitespace().collect::<Vec<_>>()));
        };
        let value = Some(value.trim()).filter(|value| !value.is_empty());
        if column == "address" {
            let port = match of_key("port") {
                Some(port) => host_addresses::parse_port(port)?,
                None => host_addresses::port_of(&transaction, name).await?,
            };
            let addresses = host_addresses::parse(value.unwrap_or_default(), port)?;
            host_addresses::store(&transaction, name, &addresses).await?;
            continue;
        }
        if column == "port" && of_key("address").is_some() {
            continue; // it is that of the addresses
        }
        let value = checked(column, value)?;
        // `column` is one of SETTINGS.
        let sql = format!("UPDATE pglobby.hosts SET {column} = $2 WHERE name = $1");
        transaction.execute(&sql, &[&name, &*value]).await?;
    }
    if password.is_some() {
        seal_password(actor, &transaction, name, password).await?;
    }
    let report = look_at(actor, &transaction, name, false).await?;
    let changed: Vec<&String> = settings.iter().map(|(key, _)| key).collect();
    let detail = json!({ "host": name, "changed": changed, "password": password.is_some() });
    actor.commit(transaction, "host.set", None, &detail).await?;
    Ok(report)
}

/// A setting as its column stores it; `None` if there is no value.
fn checked(key: &str, value: Option<&str>) -> Result<Box<dyn ToSql + Sync + Send>, AdminError> {
    let wrong = |wanted: &str| {
        let given = value.map_or_else(|| "nothing".to_owned(), |value| format!("{value:?}"));
        AdminError::Invalid(format!("{key} is {wanted}, not {given}"))
    };
    let text = |bytes_max| match value {
        Some(text) if (1..=bytes_max).contains(&text.len()) && !text.contains(char::is_control) => {
            Ok(text.to_owned())
        }
        _ => Err(wrong(&format!("a text of 1 to {bytes_max} bytes without control characters"))),
    };
    Ok(match key {
        "admin_user" | "admin_database" => Box::new(text(NAME_BYTES_MAX)?),
        "tls_mode" => {
            let known = value.filter(|word| word.parse::<TlsMode>().is_ok());
            Box::new(known.ok_or_else(|| wrong(&format!("one of {}", TlsMode::WORDS.join(", "))))?.to_owned())
        }
        "port" => Box::new(i32::from(host_addresses::parse_port(value.unwrap_or_default())?)),
        "accepts_tenants" => match value {
            Some("true" | "yes" | "on" | "1") => Box::new(true),
            Some("false" | "no" | "off" | "0") => Box::new(false),
            _ => return Err(wrong("true or false")),
        },
        "tls_root_ca" => Box::new(value.map(|_| text(PATH_BYTES_MAX)).transpose()?),
        _ => {
            let read = |text: &str| text.parse::<i32>().ok().filter(|limit| *limit > 0);
            let limit = value.map(|text| read(text).filter(|limit| limit.unsigned_abs() <= SERVERS_MAX));
            let wanted = || wrong(&format!("a whole number from 1 to {SERVERS_MAX} (or empty: no limit)"));
            Box::new(limit.map(|limit| limit.ok_or_else(wanted)).transpose()?)
        }
    })
}

/// Removes a host without living tenants, and the tombstones of dropped ones. The cluster itself is not
/// changed.
pub async fn remove(actor: &Actor, name: &str) -> Result<(), AdminError> {
    let mut client = actor.central.client().await?;
    let transaction = Client::transaction(&mut client).await?;
    let locked =
        transaction.query_opt("SELECT 1 FROM pglobby.hosts WHERE name = $1 FOR UPDATE", &[&name]).await?;
    if locked.is_none() {
        return Err(actor.not_found(&transaction, "host", name, "SELECT name FROM pglobby.hosts").await);
    }
    let living =
        "SELECT name FROM pglobby.tenants WHERE host = $1 AND status <> 'dropped' ORDER BY name LIMIT 4";
    let living: Vec<String> =
        transaction.query(living, &[&name]).await?.iter().map(|row| row.get(0)).collect();
    if !living.is_empty() {
        return Err(AdminError::Refused(format!(
            "tenants live on host {name:?} ({}, …); drop or move them first",
            living.join(", ")
        )));
    }
    transaction.execute("DELETE FROM pglobby.tenants WHERE host = $1", &[&name]).await?;
    transaction.execute("DELETE FROM pglobby.hosts WHERE name = $1", &[&name]).await?;
    actor.commit(transaction, "host.remove", None, &json!({ "host": name })).await
}

/// Revokes CONNECT and TEMP from PUBLIC on `postgres`, `template1` and the databases named, which every
/// role may enter by default. Only for a cluster of one's own: roles of other applications lose access too.
/// Returns the databases that were changed.
pub async fn close_to_public(
    actor: &Actor,
    name: &str,
    databases: &[String],
) -> Result<Vec<String>, AdminError> {
    let client = actor.central.client().await?;
    let admin = HostAdmin::load(actor, &**client, name).await?;
    let session = admin.connect().await?;
    let mut closed = Vec::new();
    for database in session.texts("listing databases", OPEN_TO_PUBLIC, &[]).await? {
        if databases.contains(&database) {
            let sql = format!("REVOKE CONNECT, TEMPORARY ON DATABASE {} FROM PUBLIC", ident(&database));
            session.run(format!("closing database {database:?} to PUBLIC"), &sql).await?;
            closed.push(database);
        }
    }
    if !closed.is_empty() {
        actor.audit(&**client, "host.close", None, &json!({ "host": name, "databases": closed })).await?;
    }
    Ok(closed)
}

const OPEN_TO_PUBLIC: &str = "SELECT datname::text FROM pg_catalog.pg_database
    WHERE datallowconn AND EXISTS (
        SELECT FROM pg_catalog.aclexplode(coalesce(datacl, pg_catalog.acldefault('d', datdba))) a
        WHERE a.grantee = 0 AND a.privilege_type = 'CONNECT')
    ORDER BY datname";

/// Connects, and reads what is to be reported. `propose`: sets a budget if there is none.
async fn look_at(
    actor: &Actor,
    client: &impl GenericClient,
    name: &str,
    propose: bool,
) -> Result<HostReport, AdminError> {
    let admin = HostAdmin::load(actor, client, name).await?;
    let session = admin.connect().await?;
    let rights = session.rights().await?;
    if let Some(missing) = rights.missing() {
        return Err(AdminError::Refused(format!(
            "role {:?} on {} lacks {missing}, which making tenants needs; run there: ALTER ROLE {} CREATEDB \
             CREATEROLE",
            admin.user,
            written(&admin.addresses),
            ident(&admin.user)
        )));
    }
    let limits = host_budget::look(client, &session, name).await?;
    if propose {
        let sql = "UPDATE pglobby.hosts SET max_connections = $2 WHERE name = $1 AND max_connections IS NULL";
        client.execute(sql, &[&name, &limits.proposed()]).await?;
    }
    let budget = "SELECT max_connections FROM pglobby.hosts WHERE name = $1";
    Ok(HostReport {
        name: name.to_owned(),
        max_connections: client.query_one(budget, &[&name]).await?.get(0),
        server_max_connections: limits.max_connections,
        server_reserved_connections: limits.reserved,
        other_connections: limits.others,
        server_version: rights.server_version,
        superuser: rights.superuser,
        open_to_public: session.texts("listing databases", OPEN_TO_PUBLIC, &[]).await?,
    })
}

async fn seal_password(
    actor: &Actor,
    client: &impl GenericClient,
    name: &str,
    password: Option<&SecretString>,
) -> Result<(), AdminError> {
    let place = SecretLocation { table: "hosts", row: name, column: "sealed_admin_password" };
    let sealed = password.map(|password| actor.keyring.seal(&place, password)).transpose()?;
    let sql = "UPDATE pglobby.hosts SET sealed_admin_password = $2 WHERE name = $1";
    client.execute(sql, &[&name, &sealed]).await?;
    Ok(())
}

/// The error for a key that is none of `known`.
pub(in crate::control_path) fn unknown_setting(key: &str, known: &[&str]) -> AdminError {
    let near = nearest(key, known.iter().copied()).map(|near| format!("; did you mean {near:?}?"));
    AdminError::Invalid(format!(
        "there is no setting {key:?}{} (there are: {})",
        near.unwrap_or_default(),
        known.join(", ")
    ))
}
