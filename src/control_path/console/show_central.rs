//! SHOW of what the central database holds: tenants, logins, hosts. Also in PgBouncer's words: databases, users, lists.

use std::collections::HashMap;

use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{
    ConsoleError,
    show_traffic::moment,
    table::{Cell, Column, Kind, Table},
};
use crate::{
    control_path::admin::{
        actor::{Actor, AdminError},
        hosts, logins, tenants,
    },
    data_path::{
        pool::TenantPools,
        proxy::Proxy,
        sessions::registry::{Doing, Sessions},
    },
};

const DATABASES: &[Column] = &[
    ("name", Kind::Text),
    ("host", Kind::Text),
    ("port", Kind::Int),
    ("database", Kind::Text),
    ("force_user", Kind::Text),
    ("pool_size", Kind::Int),
    ("min_pool_size", Kind::Int),
    ("reserve_pool_size", Kind::Int),
    ("server_lifetime", Kind::Int),
    ("pool_mode", Kind::Text),
    ("load_balance_hosts", Kind::Text),
    ("max_connections", Kind::Int),
    ("current_connections", Kind::Int),
    ("max_client_connections", Kind::Int),
    ("current_client_connections", Kind::Int),
    ("paused", Kind::Int),
    ("disabled", Kind::Int),
    ("status", Kind::Text),
];

const USERS: &[Column] = &[
    ("name", Kind::Text),
    ("pool_size", Kind::Text),
    ("reserve_pool_size", Kind::Text),
    ("pool_mode", Kind::Text),
    ("max_user_connections", Kind::Int),
    ("current_connections", Kind::Int),
    ("max_user_client_connections", Kind::Int),
    ("current_client_connections", Kind::Int),
    ("kind", Kind::Text),
    ("tenant", Kind::Text),
];

impl From<AdminError> for ConsoleError {
    fn from(error: AdminError) -> Self {
        let sqlstate = match error {
            AdminError::NotFound { .. } => "42704",
            AdminError::Invalid(_) => "22023",
            AdminError::Central(ref error) if error.is_about_a_value() => "22023",
            AdminError::Name(_) => "42602",
            AdminError::Exists(_) => "42710",
            AdminError::Refused(_) => "55000",
            AdminError::Busy { .. } => "55P03",
            _ => "58000",
        };
        Self::new(sqlstate, error.to_string())
    }
}

/// SHOW DATABASES.
pub async fn databases(actor: &Actor, proxy: &Proxy) -> Result<Table, ConsoleError> {
    let config = proxy.config.load();
    let hosts: HashMap<String, hosts::HostSummary> =
        hosts::list(actor).await?.into_iter().map(|host| (host.name.clone(), host)).collect();
    let (mut servers, mut sessions) = (HashMap::new(), HashMap::new());
    let ids = halted(actor, &proxy.pools).await?;
    for pool in proxy.pools.all().into_iter().chain(proxy.pools.retired()) {
        *servers.entry(pool.tenant.name.clone()).or_insert(0) += pool.live();
    }
    for session in proxy.sessions.all() {
        if let Some(place) = session.place() {
            *sessions.entry(place.tenant.name.clone()).or_insert(0) += 1;
        }
    }
    let mut table = Table::new(DATABASES);
    for tenant in tenants::list(actor, false).await? {
        let host = hosts.get(&tenant.host);
        let size = tenant.pool_size.unwrap_or_else(|| number(config.pool.default_pool_size));
        let halts = &proxy.pools.halts;
        let halted =
            |asked: &dyn Fn(i64) -> bool| i32::from(ids.get(&tenant.name).is_some_and(|id| asked(*id)));
        table.rows.push(vec![
            tenant.name.as_str().into(),
            host.map(|host| host.address.clone()).into(),
            host.map(|host| host.port).into(),
            tenant.database.into(),
            tenant.username.into(),
            size.into(),
            tenant.min_pool_size.unwrap_or_else(|| number(config.pool.min_pool_size)).into(),
            0.into(),
            config.timeouts.server_lifetime.as_secs().into(),
            tenant.pool_mode.into(),
            Cell::Null,
            size.into(),
            servers.get(&tenant.name).copied().unwrap_or(0).into(),
            tenant.max_clients.unwrap_or_else(|| number(config.limits.max_db_client_connections)).into(),
            sessions.get(&tenant.name).copied().unwrap_or(0).into(),
            if halts.all_paused() { 1 } else { halted(&|id| halts.is_paused(id)) }.into(),
            halted(&|id| halts.is_disabled(id)).into(),
            tenant.status.into(),
        ]);
    }
    Ok(table)
}

/// Ids of the tenants that were paused or disabled by name.
async fn halted(actor: &Actor, pools: &TenantPools) -> Result<HashMap<String, i64>, ConsoleError> {
    let named = pools.halts.named();
    if named.is_empty() {
        return Ok(HashMap::new());
    }
    let client = actor.central.client().await.map_err(AdminError::from)?;
    let sql = "SELECT name, id FROM pglobby.tenants WHERE id = ANY ($1)";
    let rows = client.query(sql, &[&named]).await.map_err(AdminError::from)?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// SHOW USERS.
pub async fn users(actor: &Actor, sessions: &Sessions) -> Result<Table, ConsoleError> {
    let mut present: HashMap<String, (i32, i32)> = HashMap::new();
    for session in sessions.all() {
        let (clients, servers) = present.entry(session.login.name.clone()).or_default();
        *clients += 1;
        *servers += i32::from(!matches!(session.doing().0, Doing::Idle | Doing::Waiting));
    }
    let mut table = Table::new(USERS);
    for login in logins::list(actor, None).await? {
        let (clients, servers) = present.get(&login.name).copied().unwrap_or_default();
        table.rows.push(vec![
            login.name.into(),
            Cell::Null,
            Cell::Null,
            Cell::Null,
            0.into(),
            servers.into(),
            0.into(),
            clients.into(),
            login.kind.into(),
            login.tenant.into(),
        ]);
    }
    Ok(table)
}

/// SHOW TENANTS.
pub async fn tenants(actor: &Actor) -> Result<Table, ConsoleError> {
    let mut table = Table::new(&[
        ("name", Kind::Text),
        ("status", Kind::Text),
        ("status_reason", Kind::Text),
        ("host", Kind::Text),
        ("database", Kind::Text),
        ("username", Kind::Text),
        ("ro_username", Kind::Text),
        ("pool_mode", Kind::Text),
        ("pool_size", Kind::Int),
        ("min_pool_size", Kind::Int),
        ("max_clients", Kind::Int),
        ("statement_timeout", Kind::Text),
        ("allow_from", Kind::Text),
        ("adopted", Kind::Truth),
        ("logins", Kind::BigInt),
        ("created_at", Kind::Text),
        ("updated_at", Kind::Text),
    ]);
    for tenant in tenants::list(actor, true).await? {
        table.rows.push(vec![
            tenant.name.into(),
            tenant.status.into(),
            tenant.status_reason.into(),
            tenant.host.into(),
            tenant.database.into(),
            tenant.username.into(),
            tenant.ro_username.into(),
            tenant.pool_mode.into(),
            tenant.pool_size.into(),
            tenant.min_pool_size.into(),
            tenant.max_clients.into(),
            tenant.statement_timeout.into(),
            tenant.allow_from.join(",").into(),
            tenant.adopted.into(),
            tenant.logins.into(),
            moment(tenant.created_at.into()).into(),
            moment(tenant.updated_at.into()).into(),
        ]);
    }
    Ok(table)
}

/// SHOW LOGINS.
pub async fn logins(actor: &Actor) -> Result<Table, ConsoleError> {
    let mut table = Table::new(&[
        ("name", Kind::Text),
        ("kind", Kind::Text),
        ("tenant", Kind::Text),
        ("access", Kind::Text),
        ("tenants", Kind::Text),
        ("valid_until", Kind::Text),
        ("disabled_at", Kind::Text),
        ("allow_from", Kind::Text),
        ("created_at", Kind::Text),
    ]);
    for login in logins::list(actor, None).await? {
        let granted = login.tenants.iter().map(|grant| grant.tenant.as_str()).collect::<Vec<_>>().join(",");
        let written = |at: Option<OffsetDateTime>| at.and_then(|at| at.format(&Rfc3339).ok());
        table.rows.push(vec![
            login.name.into(),
            login.kind.into(),
            login.tenant.into(),
            login.access.into(),
            if login.all_tenants { "all".to_owned() } else { granted }.into(),
            // May be thousands of years away.
            written(login.valid_until).into(),
            written(login.disabled_at).into(),
            login.allow_from.join(",").into(),
            moment(login.created_at.into()).into(),
        ]);
    }
    Ok(table)
}

/// SHOW HOSTS.
pub async fn hosts(actor: &Actor, pools: &TenantPools) -> Result<Table, ConsoleError> {
    let mut table = Table::new(&[
        ("name", Kind::Text),
        ("address", Kind::Text),
        ("port", Kind::Int),
        ("tls_mode", Kind::Text),
        ("admin_user", Kind::Text),
        ("accepts_tenants", Kind::Truth),
        ("tenants", Kind::BigInt),
        ("max_connections", Kind::Int),
        ("current_connections", Kind::Int),
    ]);
    for host in hosts::list(actor).await? {
        let live = pools.live_on(&host.name);
        table.rows.push(vec![
            host.name.into(),
            host.address.into(),
            host.port.into(),
            host.tls_mode.into(),
            host.admin_user.into(),
            host.accepts_tenants.into(),
            host.tenants.into(),
            host.max_connections.into(),
            live.into(),
        ]);
    }
    Ok(table)
}

/// SHOW LISTS.
pub async fn lists(actor: &Actor, proxy: &Proxy) -> Result<Table, ConsoleError> {
    let client = actor.central.client().await.map_err(AdminError::from)?;
    let sql = format!(
        "SELECT (SELECT count(*) FROM pglobby.tenants WHERE status <> 'dropped'),
                (SELECT count(*) FROM pglobby.logins WHERE {living})",
        living = logins::LIVING
    );
    let row = client.query_one(&sql, &[]).await.map_err(AdminError::from)?;
    let pools = proxy.pools.all();
    let retired = proxy.pools.retired();
    let servers: usize = pools.iter().chain(&retired).map(|pool| pool.live()).sum();
    let accounts = &proxy.pools.accounts;
    let lists: [(&str, Cell); 17] = [
        ("databases", row.get::<_, i64>(0).into()),
        ("users", row.get::<_, i64>(1).into()),
        ("peers", 0.into()),
        ("pools", pools.len().into()),
        ("peer_pools", 0.into()),
        // Nothing is kept of clients and servers that have gone, and there is no cache of DNS.
        ("free_clients", 0.into()),
        ("used_clients", proxy.door.clients().into()),
        ("login_clients", proxy.door.unproven().into()),
        ("free_servers", 0.into()),
        ("used_servers", servers.into()),
        ("dns_names", 0.into()),
        ("dns_zones", 0.into()),
        ("dns_queries", 0.into()),
        ("dns_pending", 0.into()),
        ("memory_bytes", accounts.process.used().into()),
        ("memory_max_bytes", accounts.process.max().into()),
        ("prepared_bytes", accounts.statements.used().into()),
    ];
    let mut table = Table::new(&[("list", Kind::Text), ("items", Kind::Int)]);
    table.rows = lists.into_iter().map(|(list, items)| vec![list.into(), items]).collect();
    Ok(table)
}

fn number(count: impl TryInto<i32>) -> i32 {
    count.try_into().unwrap_or(i32::MAX)
}
