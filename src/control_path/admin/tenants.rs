//! Existing tenants: list, show, change, suspend, resume. `onboarding/` creates and drops them.

use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;
use serde_json::json;
use time::OffsetDateTime;
use tokio_postgres::{Client, GenericClient, Row, error::SqlState, types::ToSql};

use super::{
    actor::{Actor, AdminError, server_words},
    fields::{described, from_row},
    hosts::unknown_setting,
};
use crate::{
    config::{PoolMode, units},
    control_path::onboarding::role_attributes,
};

described! {
    /// One row of `pglobby.tenants`, without credentials. `null` means the configuration's default.
    #[derive(Debug, Clone, PartialEq, Eq, Serialize)]
    pub struct TenantSummary {
        /// `tenants.name`.
        pub name: String,
        /// `provisioning`, `active`, `suspended`, `dropping` or `dropped`.
        pub status: String,
        /// The reason of a suspension, if one was given.
        pub status_reason: Option<String>,
        /// Where it lives.
        pub host: String,
        /// Its database there.
        pub database: String,
        /// Its own role there.
        pub username: String,
        /// Its read-only role.
        pub ro_username: Option<String>,
        /// `transaction` or `session`.
        pub pool_mode: Option<String>,
        /// Maximum of server connections.
        pub pool_size: Option<i32>,
        /// Server connections kept open.
        pub min_pool_size: Option<i32>,
        /// Maximum of sessions.
        pub max_clients: Option<i32>,
        /// Part of its host's budget, relative to the other tenants there.
        pub weight: i32,
        /// As `30s`; `null`: none.
        pub statement_timeout: Option<String>,
        /// Networks that may enter; empty: all.
        pub allow_from: Vec<String>,
        /// Whether the database existed before the tenant.
        pub adopted: bool,
        /// Access to its tables is granted when its first pool is made.
        pub grants_pending: bool,
        /// Number of employee logins.
        pub logins: i64,
        /// When it was made.
        #[serde(with = "time::serde::rfc3339")]
        pub created_at: OffsetDateTime,
        /// When its row last changed.
        #[serde(with = "time::serde::rfc3339")]
        pub updated_at: OffsetDateTime,
    }
}

/// Maximum of connections of PostgreSQL.
pub const SERVERS_MAX: u32 = 262_143;
/// More sessions than a machine has file descriptors.
pub const CLIENTS_MAX: u32 = 1_000_000;
/// The schema's limit.
pub const WEIGHT_MAX: u32 = 1000;

/// Keys of `tenant set`.
pub const SETTINGS: [&str; 7] =
    ["pool_mode", "pool_size", "min_pool_size", "max_clients", "weight", "statement_timeout", "allow_from"];

/// The schema of the version before has no column `weight`.
const SUMMARY: &str = "SELECT name, status, status_reason, host, database, username, ro_username, pool_mode,
    pool_size, min_pool_size, max_clients, coalesce((to_jsonb(t) ->> 'weight')::integer, 1) AS weight,
    (extract(epoch FROM statement_timeout) * 1000)::bigint AS statement_timeout_ms,
    allow_from::text[] AS allow_from, adopted, grants_pending,
    (SELECT count(*) FROM pglobby.logins l WHERE l.tenant_id = t.id) AS logins, created_at, updated_at
    FROM pglobby.tenants t";

/// All tenants by name, with tombstones if `dropped_too`.
pub async fn list(actor: &Actor, dropped_too: bool) -> Result<Vec<TenantSummary>, AdminError> {
    let client = actor.central.client().await?;
    let sql = format!("{SUMMARY} WHERE $1 OR status <> 'dropped' ORDER BY name, id");
    Ok(client.query(&sql, &[&dropped_too]).await?.iter().map(summary).collect())
}

/// The living tenant of that name, or its latest tombstone.
pub async fn show(actor: &Actor, name: &str) -> Result<TenantSummary, AdminError> {
    let client = actor.central.client().await?;
    let sql = format!("{SUMMARY} WHERE name = $1 ORDER BY status = 'dropped', id DESC LIMIT 1");
    match client.query_opt(&sql, &[&name]).await? {
        Some(row) => Ok(summary(&row)),
        None => Err(missing(actor, &**client, name).await),
    }
}

fn summary(row: &Row) -> TenantSummary {
    let timeout: Option<i64> = row.get("statement_timeout_ms");
    from_row!(row => TenantSummary {
        name, status, status_reason, host, database, username, ro_username, pool_mode, pool_size,
        min_pool_size, max_clients, weight, allow_from, adopted, grants_pending, logins, created_at, updated_at;
        statement_timeout: timeout.map(in_words)
    })
}

/// In the form that `tenant set` takes.
fn in_words(millis: i64) -> String {
    match millis {
        _ if millis % 60_000 == 0 && millis != 0 => format!("{}min", millis / 60_000),
        _ if millis % 1_000 == 0 => format!("{}s", millis / 1_000),
        _ => format!("{millis}ms"),
    }
}

/// Changes settings of a tenant; an empty value restores the default.
///
/// # Errors
/// Unknown key (naming the nearest), bad value, no such tenant; then nothing is changed.
pub async fn set(
    actor: &Actor,
    name: &str,
    settings: &[(String, String)],
) -> Result<TenantSummary, AdminError> {
    let mut client = actor.central.client().await?;
    let transaction = Client::transaction(&mut client).await?;
    for (key, value) in settings {
        if set_one(&transaction, name, key, value.trim()).await? == 0 {
            return Err(missing(actor, &transaction, name).await);
        }
    }
    let changed: serde_json::Map<_, _> =
        settings.iter().map(|(key, value)| (key.clone(), value.clone().into())).collect();
    actor.commit(transaction, "tenant.set", Some(name), &changed.into()).await?;
    drop(client);
    show(actor, name).await
}

async fn set_one(client: &impl GenericClient, name: &str, key: &str, value: &str) -> Result<u64, AdminError> {
    let given = Some(value).filter(|value| !value.is_empty());
    let run = async |assignment: &str, value: &(dyn ToSql + Sync)| {
        let sql = format!("UPDATE pglobby.tenants SET {assignment} WHERE name = $1 AND status <> 'dropped'");
        client.execute(&sql, &[&name, value]).await.map_err(|error| match error.code() {
            Some(code) if code.code().starts_with("22") || code.code().starts_with("23") => {
                AdminError::Invalid(format!("{key}={value:?} cannot be: {}", server_words(&error)))
            }
            Some(code) if *code == SqlState::UNDEFINED_COLUMN => AdminError::Refused(format!(
                "the central schema has no {key} yet; run `pglobby init` of this version"
            )),
            _ => error.into(),
        })
    };
    match key {
        "pool_mode" => match given {
            Some(word) if word.parse::<PoolMode>().is_err() => {
                let words = PoolMode::WORDS.join(" or ");
                Err(AdminError::Invalid(format!("pool_mode is {words}, not {word:?}")))
            }
            given => run("pool_mode = $2", &given).await,
        },
        "pool_size" | "min_pool_size" | "max_clients" => {
            let least = if key == "min_pool_size" { 0 } else { 1 };
            let most = if key == "max_clients" { CLIENTS_MAX } else { SERVERS_MAX };
            run(&format!("{key} = $2"), &whole_number(key, given, least, most)?).await
        }
        "weight" => {
            let weight = whole_number(key, given, 1, WEIGHT_MAX)?.unwrap_or(1);
            run("weight = $2", &weight).await
        }
        "statement_timeout" => {
            let millis = given.map(parse_timeout).transpose()?;
            run("statement_timeout = $2::bigint * interval '1 millisecond'", &millis).await
        }
        "allow_from" => {
            let networks = parse_networks(value.split(','))?;
            run("allow_from = $2::text[]::cidr[]", &networks).await
        }
        _ => Err(unknown_setting(key, &SETTINGS)),
    }
}

/// `None` takes the default.
fn whole_number(key: &str, given: Option<&str>, least: i32, most: u32) -> Result<Option<i32>, AdminError> {
    let Some(text) = given else { return Ok(None) };
    match text.parse::<i32>() {
        Ok(number) if number >= least && number.unsigned_abs() <= most => Ok(Some(number)),
        _ => Err(AdminError::Invalid(format!(
            "{key} is a whole number from {least} to {most}, not {text:?}; `{key}=` takes the default"
        ))),
    }
}

fn parse_timeout(text: &str) -> Result<i64, AdminError> {
    /// PostgreSQL stores it in milliseconds in 31 bits.
    const LONGEST: Duration = Duration::from_secs(24 * 86_400);
    let wrong = |why: &str| AdminError::Invalid(format!("statement_timeout={text:?} {why}"));
    let duration = units::duration(text).map_err(|why| wrong(&why))?;
    if duration > LONGEST {
        return Err(wrong("is longer than PostgreSQL can count (24d)"));
    }
    i64::try_from(duration.as_millis()).map_err(|_| wrong("is too long"))
}

/// Networks such as `10.0.0.0/8` or single addresses, in the form that `cidr` takes.
pub fn parse_networks<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Vec<String>, AdminError> {
    texts.map(str::trim).filter(|text| !text.is_empty()).map(parse_network).collect()
}

fn parse_network(text: &str) -> Result<String, AdminError> {
    let network: IpNet = text
        .parse()
        .or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from))
        .map_err(|_| AdminError::Invalid(format!("{text:?} is no network (10.0.0.0/8) and no address")))?;
    if network.trunc() != network {
        return Err(AdminError::Invalid(format!(
            "{text:?} is no network; did you mean {}?",
            network.trunc()
        )));
    }
    Ok(network.to_string())
}

/// When the sessions of a suspended tenant end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SuspendSessions {
    /// At once.
    EndNow,
    /// After their transaction.
    EndAfterTransaction,
}

impl SuspendSessions {
    /// From a flag.
    pub fn ending(after_transaction: bool) -> Self {
        if after_transaction { Self::EndAfterTransaction } else { Self::EndNow }
    }
}

/// Suspends a tenant; clients read `reason`. A second call changes the reason or `sessions`.
///
/// # Errors
/// Only an active tenant can be suspended.
pub async fn suspend(
    actor: &Actor,
    name: &str,
    reason: Option<&str>,
    sessions: SuspendSessions,
) -> Result<TenantSummary, AdminError> {
    let drain = sessions == SuspendSessions::EndAfterTransaction;
    let suspended = change_status(actor, name, &["active", "suspended"], "suspended", reason, drain).await?;
    // The roles may not log in at the host either: a client may know a role's password.
    role_attributes::follow_status(actor, name).await;
    Ok(suspended)
}

/// Resumes a suspended tenant; an active one stays active.
pub async fn resume(actor: &Actor, name: &str) -> Result<TenantSummary, AdminError> {
    role_attributes::let_in(actor, name).await;
    change_status(actor, name, &["suspended", "active"], "active", None, false).await
}

async fn change_status(
    actor: &Actor,
    name: &str,
    from: &[&str],
    to: &str,
    reason: Option<&str>,
    drain: bool,
) -> Result<TenantSummary, AdminError> {
    let mut client = actor.central.client().await?;
    let transaction = Client::transaction(&mut client).await?;
    let sql = "UPDATE pglobby.tenants SET status = $2, status_reason = $3, drain = $5
               WHERE name = $1 AND status = ANY ($4)";
    let changed = transaction.execute(sql, &[&name, &to, &reason, &from, &drain]).await?;
    if changed == 0 {
        drop(transaction);
        drop(client);
        let status = show(actor, name).await?.status;
        return Err(AdminError::Refused(format!("tenant {name:?} is {status}, so it cannot become {to}")));
    }
    let action = if to == "active" { "tenant.resume" } else { "tenant.suspend" };
    actor.commit(transaction, action, Some(name), &json!({ "reason": reason, "drain": drain })).await?;
    drop(client);
    show(actor, name).await
}

/// [`AdminError::NotFound`] for a tenant.
pub(in crate::control_path) async fn missing(
    actor: &Actor,
    client: &impl GenericClient,
    name: &str,
) -> AdminError {
    let living = "SELECT name FROM pglobby.tenants WHERE status <> 'dropped'";
    actor.not_found(client, "tenant", name, living).await
}

/// The id of a living tenant.
pub(in crate::control_path) async fn id_of(
    actor: &Actor,
    client: &impl GenericClient,
    name: &str,
) -> Result<i64, AdminError> {
    // Locks the row, so that the tenant cannot be dropped before the reference to it is committed.
    let sql = "SELECT id FROM pglobby.tenants
               WHERE name = $1 AND status NOT IN ('dropping', 'dropped') FOR SHARE";
    match client.query_opt(sql, &[&name]).await? {
        Some(row) => Ok(row.get(0)),
        None => Err(missing(actor, client, name).await),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_shown_as_it_can_be_set() {
        for text in ["30s", "5min", "1500ms", "0s"] {
            assert_eq!(in_words(parse_timeout(text).expect(text)), text);
        }
        assert!(parse_timeout("30").is_err());
        assert!(parse_timeout("25d").is_err());
    }

    #[test]
    fn networks_are_networks() {
        let networks = parse_networks("10.0.0.0/8, ::1,192.168.1.7".split(',')).expect("three");
        assert_eq!(networks, ["10.0.0.0/8", "::1/128", "192.168.1.7/32"]);
        let error = parse_networks(["10.1.2.3/8"].into_iter()).expect_err("host bits").to_string();
        assert!(error.contains("did you mean 10.0.0.0/8"), "{error}");
        assert!(parse_networks(["everywhere"].into_iter()).is_err());
    }
}
