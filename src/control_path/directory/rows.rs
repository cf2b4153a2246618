//! Turns rows of the central database into the records that sessions hold. Opens sealed passwords.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use ipnet::IpNet;
use secrecy::SecretString;
use tokio_postgres::types::FromSql;

use super::columns::Columns;
use crate::{
    control_path::{
        admin::{
            host_addresses,
            tenants::{CLIENTS_MAX, SERVERS_MAX, WEIGHT_MAX},
        },
        secrets::{keyring_reload::ReloadableKeyring, seal::SecretLocation},
    },
    data_path::tenant::{Access, Credential, Grant, Host, Login, LoginKind, Tenant, TenantStatus},
};

/// A macro, because `concat!` takes literals only. The schema of the version before has no columns `weight` and
/// `more_addresses`.
macro_rules! tenant_query {
    ($ending:literal) => {
        concat!(
            "SELECT t.id, t.name, t.database, t.username, t.sealed_password, t.ro_username, t.sealed_ro_password,
                t.status, t.status_reason, t.drain, t.pool_mode, t.pool_size, t.min_pool_size, t.max_clients,
                (pg_catalog.to_jsonb(t) ->> 'weight')::integer AS weight,
                (pg_catalog.date_part('epoch', t.statement_timeout) * 1000)::bigint AS statement_timeout_ms,
                t.allow_from::text[] AS allow_from, t.grants_pending, t.generation,
                h.name AS host, h.address, h.port, ARRAY(SELECT
                    pg_catalog.jsonb_array_elements_text(pg_catalog.to_jsonb(h) -> 'more_addresses')) AS more_addresses,
                h.tls_mode, h.tls_root_ca, h.max_connections
            FROM pglobby.tenants t JOIN pglobby.hosts h ON h.name = t.host ",
            $ending
        )
    };
}

/// The living tenant of that name, or its newest tombstone.
pub const TENANT_BY_NAME: &str =
    tenant_query!("WHERE t.name = $1 ORDER BY (t.status = 'dropped'), t.id DESC LIMIT 1");

/// By id.
pub const TENANT_BY_ID: &str = tenant_query!("WHERE t.id = $1");

/// All tenants. A living one comes after the tombstones of its name, and the newest tombstone after the older ones.
pub const ALL_TENANTS: &str = tenant_query!("ORDER BY (t.status <> 'dropped'), t.id");

/// A login with its grants. `SystemTime` has no 'infinity'.
macro_rules! login_query {
    ($ending:literal) => {
        concat!(
            "
            SELECT l.id, l.name, l.kind, l.tenant_id, t.name AS tenant_name, l.access, l.all_tenants, l.verifier,
                CASE WHEN l.valid_until < 'infinity'
                    THEN pg_catalog.date_part('epoch', greatest(l.valid_until, '1970-01-01 UTC')) END AS valid_until_epoch,
                l.disabled_at IS NOT NULL AS disabled, l.allow_from::text[] AS allow_from,
                g.ids, g.accesses, g.living
            FROM pglobby.logins l
            LEFT JOIN pglobby.tenants t ON t.id = l.tenant_id
            CROSS JOIN LATERAL (
                SELECT pg_catalog.array_agg(gt.id ORDER BY gt.id) AS ids,
                    pg_catalog.array_agg(lt.access ORDER BY gt.id) AS accesses,
                    pg_catalog.array_agg(gt.status <> 'dropped' ORDER BY gt.id) AS living
                FROM pglobby.login_tenants lt JOIN pglobby.tenants gt ON gt.id = lt.tenant_id
                WHERE lt.login_id = l.id
            ) g
            ",
            $ending
        )
    };
}

/// By name.
pub const LOGIN_BY_NAME: &str = login_query!("WHERE l.name = $1");

/// All logins.
pub const ALL_LOGINS: &str = login_query!("");

/// Reads a row of [`TENANT_BY_NAME`] or [`TENANT_BY_ID`].
pub fn tenant(row: &impl Columns, keyring: &ReloadableKeyring) -> Result<Tenant, String> {
    let id: i64 = get(row, "id")?;
    let status = tenant_status(get(row, "status")?)?;
    let read_only = match get::<Option<String>>(row, "ro_username")? {
        Some(username) if get::<Option<&[u8]>>(row, "sealed_ro_password")?.is_some() => {
            Some(Credential { username, password: open(row, keyring, id, "sealed_ro_password")? })
        }
        _ => None,
    };
    Ok(Tenant {
        id,
        name: get(row, "name")?,
        host: Arc::new(host(row)?),
        database: get(row, "database")?,
        read_write: Credential {
            username: get(row, "username")?,
            password: open(row, keyring, id, "sealed_password")?,
        },
        read_only,
        status,
        status_reason: get(row, "status_reason")?,
        drain: get(row, "drain")?,
        pool_mode: get::<Option<&str>>(row, "pool_mode")?.map(str::parse).transpose()?,
        pool_size: count(row, "pool_size", SERVERS_MAX)?,
        min_pool_size: count(row, "min_pool_size", SERVERS_MAX)?,
        weight: count(row, "weight", WEIGHT_MAX)?.unwrap_or(1).max(1),
        max_clients: count(row, "max_clients", CLIENTS_MAX)?,
        statement_timeout: get::<Option<i64>>(row, "statement_timeout_ms")?
            .and_then(|millis| u64::try_from(millis).ok())
            .map(Duration::from_millis),
        allow_from: networks(row)?,
        grants_pending: get(row, "grants_pending")?,
        generation: get(row, "generation")?,
    })
}

/// NULL is read as an empty password. It occurs only in rows for which no session can start.
fn open(
    row: &impl Columns,
    keyring: &ReloadableKeyring,
    id: i64,
    column: &'static str,
) -> Result<SecretString, String> {
    match get::<Option<&[u8]>>(row, column)? {
        None => Ok(SecretString::default()),
        Some(blob) => {
            let place = SecretLocation { table: "tenants", row: &id.to_string(), column };
            keyring.open(&place, blob).map_err(|error| error.to_string())
        }
    }
}

fn tenant_status(text: &str) -> Result<TenantStatus, String> {
    Ok(match text {
        "provisioning" => TenantStatus::Provisioning,
        "active" => TenantStatus::Active,
        "suspended" => TenantStatus::Suspended,
        "dropping" => TenantStatus::Dropping,
        "dropped" => TenantStatus::Dropped,
        _ => return Err(format!("unknown status {text:?}")),
    })
}

fn host(row: &impl Columns) -> Result<Host, String> {
    Ok(Host {
        name: get(row, "host")?,
        addresses: host_addresses::of_row(row)?.into(),
        tls_mode: get::<&str>(row, "tls_mode")?.parse()?,
        tls_root_ca: get::<Option<String>>(row, "tls_root_ca")?.map(Into::into),
        max_connections: count(row, "max_connections", SERVERS_MAX)?,
    })
}

/// Reads a row of [`LOGIN_BY_NAME`].
pub fn login(row: &impl Columns) -> Result<Login, String> {
    let access = access(get(row, "access")?)?;
    let kind = match get(row, "kind")? {
        "employee" => LoginKind::Employee {
            tenant_id: get(row, "tenant_id")?,
            tenant_name: get(row, "tenant_name")?,
            access,
        },
        "service" => LoginKind::Service {
            all_tenants: get::<bool>(row, "all_tenants")?.then_some(access),
            granted: grants(row)?,
        },
        "admin" => LoginKind::Admin { read_only: access == Access::ReadOnly },
        other => return Err(format!("unknown kind {other:?}")),
    };
    Ok(Login {
        id: get(row, "id")?,
        name: get(row, "name")?,
        kind,
        verifier: SecretString::from(get::<&str>(row, "verifier")?),
        valid_until: get::<Option<f64>>(row, "valid_until_epoch")?.and_then(time_of_epoch),
        disabled: get(row, "disabled")?,
        allow_from: networks(row)?,
    })
}

fn grants(row: &impl Columns) -> Result<Vec<Grant>, String> {
    let ids: Vec<i64> = get::<Option<_>>(row, "ids")?.unwrap_or_default();
    let accesses: Vec<&str> = get::<Option<_>>(row, "accesses")?.unwrap_or_default();
    let living: Vec<bool> = get::<Option<_>>(row, "living")?.unwrap_or_default();
    let grant = |((tenant_id, word), living)| Ok(Grant { tenant_id, access: access(word)?, living });
    ids.into_iter().zip(accesses).zip(living).map(grant).collect()
}

fn access(text: &str) -> Result<Access, String> {
    match text {
        "read_write" => Ok(Access::ReadWrite),
        "read_only" => Ok(Access::ReadOnly),
        _ => Err(format!("unknown access {text:?}")),
    }
}

/// `None`: too far away; it means never.
fn time_of_epoch(seconds: f64) -> Option<SystemTime> {
    let since = Duration::try_from_secs_f64(seconds.max(0.0)).ok()?;
    SystemTime::UNIX_EPOCH.checked_add(since)
}

fn networks(row: &impl Columns) -> Result<Vec<IpNet>, String> {
    let texts: Vec<&str> = get(row, "allow_from")?;
    texts.into_iter().map(|text| text.parse().map_err(|_| format!("unreadable network {text:?}"))).collect()
}

/// The schema refuses more than `most`. A larger value in an older row counts as `most`.
fn count(row: &impl Columns, column: &str, most: u32) -> Result<Option<u32>, String> {
    get::<Option<i32>>(row, column)?
        .map(|number| u32::try_from(number).map_err(|_| format!("{column} is negative")))
        .map(|number| number.map(|number| number.min(most)))
        .transpose()
}

fn get<'a, T: FromSql<'a>>(row: &'a impl Columns, column: &str) -> Result<T, String> {
    row.column(column)
}
