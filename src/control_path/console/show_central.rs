//! SHOW of the central database's content: tenants, logins, hosts; databases, users and lists as PgBouncer
//! names them.

use std::collections::HashMap;

use super::{
    ConsoleError,
    table::{Cell, Kind, Table},
};
use crate::{
    control_path::{
        admin::{
            actor::{Actor, AdminError},
            hosts, logins, tenants,
        },
        fleet::nodes,
    },
    data_path::{
        pool::TenantPools,
        proxy::Proxy,
        sessions::registry::{Activity, Sessions},
    },
};

const DATABASES: &str = "name host port:int database force_user pool_size:int min_pool_size:int
    reserve_pool_size:int server_lifetime:int pool_mode load_balance_hosts max_connections:int
    current_connections:int max_client_connections:int current_client_connections:int paused:int
    disabled:int status";

const USERS: &str = "name pool_size reserve_pool_size pool_mode max_user_connections:int
    current_connections:int max_user_client_connections:int current_client_connections:int kind tenant";

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
        if let Some(tenant_access) = session.tenant_access() {
            *sessions.entry(tenant_access.tenant.name.clone()).or_insert(0) += 1;
        }
    }
    let mut table = Table::new(DATABASES);
    for tenant in tenants::list(actor, false).await? {
        let host = hosts.get(&tenant.host);
        let size = tenant.pool_size.unwrap_or_else(|| number(config.pool.default_pool_size));
        let pauses = &proxy.pools.pauses;
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
            if pauses.all_paused() { 1 } else { halted(&|id| pauses.is_paused(id)) }.into(),
            halted(&|id| pauses.is_disabled(id)).into(),
            tenant.status.into(),
        ]);
    }
    Ok(table)
}

/// Ids of tenants that are paused or disabled by name.
async fn halted(actor: &Actor, pools: &TenantPools) -> Result<HashMap<String, i64>, ConsoleError> {
    let named: Vec<i64> = pools.pauses.named().into_iter().collect();
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
        *servers += i32::from(!matches!(session.doing().0, Activity::Idle | Activity::Waiting));
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

/// SHOW TENANTS, tombstones included.
pub async fn tenants(actor: &Actor) -> Result<Table, ConsoleError> {
    const COLUMNS: &str = "name status status_reason host database username ro_username pool_mode
        pool_size min_pool_size max_clients weight statement_timeout allow_from adopted logins created_at
        updated_at";
    Ok(Table::of(COLUMNS, &tenants::list(actor, true).await?))
}

/// SHOW LOGINS.
pub async fn logins(actor: &Actor) -> Result<Table, ConsoleError> {
    const COLUMNS: &str = "name kind tenant access tenants valid_until disabled_at allow_from created_at";
    let logins = logins::list(actor, None).await?;
    let mut table = Table::of(COLUMNS, &logins);
    let at = COLUMNS.split_whitespace().position(|column| column == "tenants").unwrap_or_default();
    for (login, row) in logins.iter().zip(&mut table.rows) {
        // Names only, without each one's access.
        let names = || login.tenants.iter().map(|grant| grant.tenant.as_str()).collect::<Vec<_>>().join(",");
        row[at] = if login.all_tenants { "all".into() } else { names().into() };
    }
    Ok(table)
}

/// SHOW HOSTS.
pub async fn hosts(actor: &Actor, pools: &TenantPools) -> Result<Table, ConsoleError> {
    const COLUMNS: &str =
        "name address port tls_mode admin_user accepts_tenants tenants max_connections more_addresses";
    let hosts = hosts::list(actor).await?;
    let mut table = Table::of(COLUMNS, &hosts);
    let more_addresses = table.columns.pop();
    table.columns.push(("current_connections", Kind::Int));
    table.columns.extend(more_addresses);
    table.columns.push(("primary", Kind::Text));
    for (host, row) in hosts.iter().zip(&mut table.rows) {
        let more_addresses = row.pop();
        row.push(pools.live_on(&host.name).into());
        row.extend(more_addresses);
        row.push(pools.primary_of(&host.name).map(|address| address.to_string()).into());
    }
    Ok(table)
}

/// SHOW NODES.
pub async fn nodes(actor: &Actor) -> Result<Table, ConsoleError> {
    Ok(Table::of("", &nodes::list(&actor.central).await?))
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
        // Closed clients and servers are not kept, and DNS is not cached.
        ("free_clients", 0.into()),
        ("used_clients", proxy.connection_limits.count().into()),
        ("login_clients", proxy.connection_limits.unauthenticated().into()),
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
    let mut table = Table::new("list items:int");
    table.rows = lists.into_iter().map(|(list, items)| vec![list.into(), items]).collect();
    Ok(table)
}

fn number(count: impl TryInto<i32>) -> i32 {
    count.try_into().unwrap_or(i32::MAX)
}
