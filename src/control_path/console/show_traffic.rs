//! SHOW of pools, clients and servers, and of their counters.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use time::OffsetDateTime;

use super::{
    stats_window::StatsWindow,
    table::{Cell, Kind, Table, columns},
    tenant_counts::{self, ALL, Counts, SHARED},
};
use crate::data_path::{
    login::tenant_routing::NO_TENANT_DATABASE,
    pool::{Pool, TenantPools, server_list::ServerEntry},
    proxy::Proxy,
    sessions::registry::{Activity, SessionHandle},
    tenant::{Access, Tenant},
    worker::Clock,
};

const POOLS: &str = "database user cl_active:int cl_waiting:int cl_active_cancel_req:int
    cl_waiting_cancel_req:int sv_active:int sv_active_cancel:int sv_being_canceled:int sv_idle:int
    sv_used:int sv_tested:int sv_login:int maxwait:int maxwait_us:int pool_mode load_balance_hosts access
    host pool_size:int cl_pinned:int workers";

const WORKERS: &str = "worker:int busy_percent:int busy_us:bigint pools:int clients:int";

/// Columns of both clients and servers in PgBouncer.
const SOCKET: &str = "type user database replication state addr port:int local_addr local_port:int
    connect_time request_time wait:int wait_us:int close_needed:int ptr link remote_pid:int tls
    application_name prepared_statements:int id:bigint";

const STATS_TOTALS: &str = "server_assignment_count xact_count query_count bytes_received bytes_sent
    xact_time query_time wait_time client_parse_count server_parse_count bind_count client_login_count";

const TOTALS: &str = "total_server_assignment_count total_xact_count total_query_count
    total_received total_sent total_xact_time total_query_time total_wait_time total_client_parse_count
    total_server_parse_count total_bind_count total_client_login_count";

const AVERAGES: &str = "avg_server_assignment_count avg_xact_count avg_query_count avg_recv avg_sent
    avg_xact_time avg_query_time avg_wait_time avg_client_parse_count avg_server_parse_count avg_bind_count
    avg_client_login_count";

/// Columns that PgBouncer does not have.
const OWN_TOTALS: &str = "total_error_count total_server_opened_count total_server_failed_count
    total_pinned_count total_desync_count";

/// SHOW WORKERS.
pub fn workers(proxy: &Proxy) -> Table {
    let mut table = Table::new(WORKERS);
    table.rows = (proxy.workers.iter())
        .map(|worker| {
            vec![
                worker.index.into(),
                ((proxy.pools.busy(worker.index) * 100.0).round() as usize).into(),
                i64::try_from(worker.busy().as_micros()).unwrap_or(i64::MAX).into(),
                worker.pools().into(),
                worker.sessions().into(),
            ]
        })
        .collect();
    table
}

/// SHOW POOLS.
pub fn pools(proxy: &Proxy) -> Table {
    let mut table = Table::new(POOLS);
    let mut sessions: HashMap<(i64, Access), Vec<Arc<SessionHandle>>> = HashMap::new();
    for session in proxy.sessions.all() {
        if let Some(tenant_access) = session.tenant_access() {
            sessions.entry((tenant_access.tenant.id, tenant_access.access)).or_default().push(session);
        }
    }
    let mut pools = proxy.pools.all();
    pools.sort_by_key(|pool| (pool.tenant.name.clone(), pool.access == Access::ReadOnly));
    for pool in pools {
        let sessions = sessions.remove(&(pool.tenant.id, pool.access)).unwrap_or_default();
        table.rows.push(pool_row(&pool, &sessions));
    }
    table
}

fn pool_row(pool: &Pool, sessions: &[Arc<SessionHandle>]) -> Vec<Cell> {
    let (live, idle, opening) = (pool.live(), pool.idle(), pool.opening());
    let now_ms = present_ms(&pool.clock);
    let waits = sessions.iter().filter_map(|session| waits(session, now_ms));
    let longest = waits.max().unwrap_or_default();
    // A login may wait for a server too, before its session starts.
    let waiting = pool.waiting();
    let in_line = sessions.iter().filter(|session| session.doing().0 == Activity::Waiting).count();
    let pinned = sessions.iter().filter(|session| !session.pins().is_empty()).count();
    let cancelling = pool.cancelling();
    vec![
        pool.tenant.name.as_str().into(),
        role(&pool.tenant, pool.access).into(),
        (sessions.len() - in_line).into(),
        waiting.into(),
        cancelling.into(),
        0.into(),
        live.saturating_sub(idle + opening).into(),
        cancelling.into(),
        0.into(),
        idle.into(),
        0.into(),
        0.into(),
        opening.into(),
        longest.as_secs().into(),
        longest.subsec_micros().into(),
        pool.rules.mode.word().into(),
        Cell::Null,
        access(pool.access).into(),
        pool.tenant.host.name.as_str().into(),
        pool.rules.size.into(),
        pinned.into(),
        pool.placement.workers().iter().map(usize::to_string).collect::<Vec<_>>().join(",").into(),
    ]
}

/// SHOW CLIENTS.
pub fn clients(proxy: &Proxy) -> Table {
    let columns = [columns(SOCKET), columns("access server_pid:int pins")].concat();
    let mut table = Table { columns, rows: Vec::new() };
    let servers = proxy.pools.all().into_iter().chain(proxy.pools.retired());
    let links: HashMap<i32, u64> = servers
        .flat_map(|pool| pool.server_list.all())
        .filter_map(|server| Some((server.borrower()?, server.id)))
        .collect();
    for session in by_id(proxy.sessions.all()) {
        let now_ms = clock_of(proxy);
        let tenant_access = session.tenant_access();
        let wait = waits(&session, now_ms).unwrap_or_default();
        let state = match session.doing().0 {
            Activity::Idle => "idle",
            Activity::Waiting => "waiting",
            Activity::Active | Activity::InTransaction | Activity::Pinned => "active",
        };
        let server_pid = session.server_process_id.load(std::sync::atomic::Ordering::Relaxed);
        let socket = Socket {
            kind: "C",
            user: &session.login.name,
            // The name that clients use when they choose no tenant.
            database: tenant_access
                .as_ref()
                .map_or(NO_TENANT_DATABASE, |tenant_access| &tenant_access.tenant.name),
            state,
            remote: session.addresses.map(|(_, theirs)| theirs),
            local: session.addresses.map(|(ours, _)| ours),
            connected: session.connected_at,
            asked: ago(now_ms, session.asked_ms()),
            wait,
            close_needed: false,
            ptr: format!("{:#x}", session.process_id),
            link: links.get(&session.process_id).map(|id| format!("{id:#x}")).unwrap_or_default(),
            remote_pid: 0,
            tls: session.tls,
            application_name: session.application_name(),
            prepared: session.prepared(),
            id: session.process_id.into(),
        };
        let mut row = socket.row();
        row.extend([
            tenant_access.as_ref().map_or("", |tenant_access| access(tenant_access.access)).into(),
            server_pid.into(),
            session.pins().names().collect::<Vec<_>>().join(",").into(),
        ]);
        table.rows.push(row);
    }
    table
}

/// SHOW SERVERS.
pub fn servers(proxy: &Proxy) -> Table {
    let columns = [columns(SOCKET), columns("access host")].concat();
    let mut table = Table { columns, rows: Vec::new() };
    let sessions: HashMap<i32, Arc<SessionHandle>> =
        proxy.sessions.all().into_iter().map(|session| (session.process_id, session)).collect();
    let current = proxy.pools.all().into_iter().map(|pool| (pool, false));
    let retired = proxy.pools.retired().into_iter().map(|pool| (pool, true));
    for (pool, retired) in current.chain(retired) {
        for server in pool.server_list.all() {
            let session = server.borrower().and_then(|borrower| sessions.get(&borrower));
            table.rows.push(server_row(&pool, retired, &server, session));
        }
    }
    table
}

fn server_row(
    pool: &Pool,
    retired: bool,
    server: &ServerEntry,
    session: Option<&Arc<SessionHandle>>,
) -> Vec<Cell> {
    let state = match (server.borrower(), session) {
        (None, _) if server.is_listening() => "listen",
        (None, _) => "idle",
        (Some(_), Some(_)) => "active",
        // Its session has ended, and the server is being reset.
        (Some(_), None) => "tested",
    };
    let socket = Socket {
        kind: "S",
        user: role(&pool.tenant, pool.access),
        database: &pool.tenant.name,
        state,
        remote: server.addresses.map(|(_, theirs)| theirs),
        local: server.addresses.map(|(ours, _)| ours),
        connected: server.opened_at,
        asked: ago(present_ms(&pool.clock), server.lent_ms()),
        wait: Duration::ZERO,
        close_needed: retired || pool.is_paused(),
        ptr: format!("{:#x}", server.id),
        link: session.map(|session| format!("{:#x}", session.process_id)).unwrap_or_default(),
        remote_pid: server.process_id,
        tls: server.tls,
        application_name: session.map(|session| session.application_name()).unwrap_or_default(),
        prepared: server.prepared(),
        id: i64::try_from(server.id).unwrap_or(i64::MAX),
    };
    let mut row = socket.row();
    row.extend([access(pool.access).into(), pool.tenant.host.name.as_str().into()]);
    row
}

/// SHOW PINS.
pub fn pins(proxy: &Proxy) -> Table {
    let mut table = Table::new(
        "id:bigint database user access application_name server_pid:int reasons state request_time",
    );
    for session in by_id(proxy.sessions.all()) {
        let server_pid = session.server_process_id.load(std::sync::atomic::Ordering::Relaxed);
        let Some(tenant_access) = session.tenant_access().filter(|_| server_pid != 0) else { continue };
        if session.pins().is_empty() {
            continue;
        }
        let state = if session.doing().0 == Activity::Active { "active" } else { "idle" };
        table.rows.push(vec![
            session.process_id.into(),
            tenant_access.tenant.name.as_str().into(),
            session.login.name.as_str().into(),
            access(tenant_access.access).into(),
            String::from(session.application_name()).into(),
            server_pid.into(),
            session.pins().names().collect::<Vec<_>>().join(",").into(),
            state.into(),
            timestamp(ago(clock_of(proxy), session.asked_ms())).into(),
        ]);
    }
    table
}

/// SHOW STATS.
pub fn stats(pools: &TenantPools, window: &StatsWindow) -> Table {
    let names = [TOTALS, AVERAGES, OWN_TOTALS].into_iter().flat_map(str::split_whitespace);
    per_tenant(names, pools, |tenant, totals| {
        let averages = window.averages_of(tenant);
        [&totals[..SHARED], &averages[..SHARED], &totals[SHARED..]].concat()
    })
}

/// SHOW STATS_TOTALS.
pub fn stats_totals(pools: &TenantPools) -> Table {
    let names = STATS_TOTALS.split_whitespace().chain(OWN_TOTALS.split_whitespace());
    per_tenant(names, pools, |_, totals| totals.to_vec())
}

/// SHOW STATS_AVERAGES.
pub fn stats_averages(pools: &TenantPools, window: &StatsWindow) -> Table {
    let names = STATS_TOTALS.split_whitespace().take(8).chain(AVERAGES.split_whitespace().skip(8));
    per_tenant(names, pools, |tenant, _| window.averages_of(tenant)[..SHARED].to_vec())
}

fn per_tenant(
    names: impl Iterator<Item = &'static str>,
    pools: &TenantPools,
    values: impl Fn(i64, &Counts) -> Vec<u64>,
) -> Table {
    let mut columns = vec![("database", Kind::Text)];
    columns.extend(names.map(|name| (name, Kind::BigInt)));
    let mut tenants: Vec<_> = tenant_counts::by_tenant(pools).into_iter().collect();
    tenants.sort_by(|(_, (one, _)), (_, (other, _))| one.cmp(other));
    let rows = tenants.into_iter().map(|(id, (name, totals))| {
        let mut row = vec![Cell::from(name)];
        row.extend(values(id, &totals).into_iter().map(Cell::from));
        row
    });
    Table { columns, rows: rows.collect() }
}

/// SHOW TOTALS.
pub fn totals(pools: &TenantPools, window: &StatsWindow) -> Table {
    let mut totals = [0; ALL];
    for (_, counts) in tenant_counts::by_tenant(pools).values() {
        tenant_counts::add(&mut totals, counts);
    }
    let averages = window.average_of_all();
    let values = [(TOTALS, &totals[..]), (AVERAGES, &averages), (OWN_TOTALS, &totals[SHARED..])];
    let values = values.iter().flat_map(|(names, values)| names.split_whitespace().zip(*values));
    let mut table = Table::new("name value:bigint");
    table.rows = values.map(|(name, value)| vec![name.into(), (*value).into()]).collect();
    table
}

/// SHOW STATE.
pub fn state(pools: &TenantPools) -> Table {
    let paused = pools.pauses.all_paused();
    let word = |truth| Cell::from(if truth { "yes" } else { "no" });
    let mut table = Table::new("key value");
    table.rows = vec![
        vec!["active".into(), word(!paused)],
        vec!["paused".into(), word(paused)],
        vec!["suspended".into(), word(false)],
    ];
    table
}

/// A client or server connection, as PgBouncer shows both.
struct Socket<'a> {
    kind: &'a str,
    user: &'a str,
    database: &'a str,
    state: &'a str,
    remote: Option<SocketAddr>,
    local: Option<SocketAddr>,
    connected: SystemTime,
    asked: SystemTime,
    wait: Duration,
    close_needed: bool,
    ptr: String,
    link: String,
    remote_pid: i32,
    tls: bool,
    application_name: Box<str>,
    prepared: u32,
    id: i64,
}

impl Socket<'_> {
    fn row(self) -> Vec<Cell> {
        let address = |address: Option<SocketAddr>| -> Cell {
            address.map_or("unix".to_owned(), |address| address.ip().to_string()).into()
        };
        let port = |address: Option<SocketAddr>| -> Cell {
            address.map_or(0, |address| i32::from(address.port())).into()
        };
        vec![
            self.kind.into(),
            self.user.into(),
            self.database.into(),
            "none".into(),
            self.state.into(),
            address(self.remote),
            port(self.remote),
            address(self.local),
            port(self.local),
            timestamp(self.connected).into(),
            timestamp(self.asked).into(),
            self.wait.as_secs().into(),
            self.wait.subsec_micros().into(),
            i32::from(self.close_needed).into(),
            self.ptr.into(),
            self.link.into(),
            self.remote_pid.into(),
            if self.tls { "TLS" } else { "" }.into(),
            String::from(self.application_name).into(),
            self.prepared.into(),
            self.id.into(),
        ]
    }
}

fn by_id(mut sessions: Vec<Arc<SessionHandle>>) -> Vec<Arc<SessionHandle>> {
    sessions.sort_by_key(|session| session.process_id);
    sessions
}

/// How long a session has waited for a server, if it waits.
fn waits(session: &SessionHandle, now_ms: u32) -> Option<Duration> {
    let (doing, since) = session.doing();
    (doing == Activity::Waiting).then(|| Duration::from_millis(now_ms.wrapping_sub(since).into()))
}

/// The coarse clock of the workers.
fn clock_of(proxy: &Proxy) -> u32 {
    proxy.workers.first().map_or(0, |worker| present_ms(&worker.clock))
}

fn present_ms(clock: &Clock) -> u32 {
    clock.tick();
    clock.now_ms()
}

/// The wall clock time of a time on a coarse clock.
fn ago(now_ms: u32, then_ms: u32) -> SystemTime {
    SystemTime::now() - Duration::from_millis(now_ms.wrapping_sub(then_ms).into())
}

/// In the format of PgBouncer.
pub fn timestamp(at: SystemTime) -> String {
    let at = OffsetDateTime::from(at);
    let (hour, minute, second) = at.to_hms();
    format!("{} {hour:02}:{minute:02}:{second:02} UTC", at.date())
}

/// The role that a pool's servers log in as.
fn role(tenant: &Tenant, access: Access) -> &str {
    match (access, &tenant.read_only) {
        (Access::ReadOnly, Some(credential)) => &credential.username,
        _ => &tenant.read_write.username,
    }
}

fn access(access: Access) -> &'static str {
    match access {
        Access::ReadWrite => "read_write",
        Access::ReadOnly => "read_only",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_count_has_its_column() {
        for names in [STATS_TOTALS, TOTALS, AVERAGES] {
            assert_eq!(names.split_whitespace().count(), SHARED);
        }
        assert_eq!(OWN_TOTALS.split_whitespace().count(), ALL - SHARED);
    }

    #[test]
    fn moments_are_written_as_pgbouncer_does() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(86_400 + 3_661);
        assert_eq!(timestamp(at), "1970-01-02 01:01:01 UTC");
    }
}
