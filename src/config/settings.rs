//! Pools, limits and timeouts: each setting once, with its key, its default, and whether RELOAD applies a
//! change. What is read from the file and what SHOW CONFIG shows follow from that.

use std::time::Duration;

use super::{Keepalive, PoolMode, machine, meaning::keepalive, written::Written};

/// A key, its present value as SHOW CONFIG shows it, and whether RELOAD applies a change.
pub type Setting = (&'static str, String, bool);

/// Only a restart applies a change.
const AT_START: bool = false;

/// Declares groups of settings: a field, how [`Written`] reads its key, and [`AT_START`] if RELOAD does not
/// apply a change. Fields after the semicolon have several keys.
macro_rules! settings {
    ($($(#[$about:meta])* $group:ident {
        $($(#[$each:meta])* $field:ident: $type:ty = $key:literal $read:ident($($given:expr),*) $($when:ident)?,)+
        $(; $($(#[$more:meta])* $several:ident: $several_type:ty = $read_several:expr,)+)?
    })+) => {$(
        $(#[$about])*
        #[derive(Debug, Clone)]
        pub struct $group {
            $($(#[$each])* pub $field: $type,)+
            $($($(#[$more])* pub $several: $several_type,)+)?
        }

        impl $group {
            pub(super) fn read(w: &mut Written<'_>) -> Self {
                Self {
                    $($field: w.$read($key $(, $given)*),)+
                    $($($several: $read_several(w),)+)?
                }
            }

            /// The settings with one key each.
            pub fn settings(&self) -> Vec<Setting> {
                vec![$(($key, self.$field.shown(), true $(&& $when)?),)+]
            }
        }
    )+};
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

settings! {
    /// Defaults of pools; a tenant's row overrides them.
    PoolConfig {
        /// How long a session keeps a server.
        pool_mode: PoolMode = "pool_mode" choice(PoolMode::ALL, PoolMode::Transaction),
        /// Server connections per (tenant, access).
        default_pool_size: u32 = "default_pool_size" count(20, 1),
        /// Server connections kept open.
        min_pool_size: u32 = "min_pool_size" count(0, 0),
        /// Pinned servers of a pool while others wait; 0 is all but one, and all of a pool of fewer than five.
        max_pinned_servers: usize = "max_pinned_servers" count(0, 0),
        /// Statements that each server keeps for clients.
        max_prepared_statements: usize = "max_prepared_statements" count(200, 1),
        /// Text of prepared statements that each server keeps for clients.
        max_prepared_bytes: usize = "max_prepared_bytes" bytes(16 << 20),
        /// While a host is away, sessions between transactions wait for it; otherwise they get an error at once.
        hold_during_outage: bool = "hold_during_outage" truth(true),
    }

    /// What is too much. Each is refused in clear words, none is a hang.
    Limits {
        /// Connections from clients.
        max_client_conn: usize = "max_client_conn" count(10_000, 1),
        /// Sessions per tenant; 0: no limit.
        max_db_client_connections: usize = "max_db_client_connections" count(0, 0),
        /// Connections that have not logged in.
        max_unauthenticated_conn: usize = "max_unauthenticated_conn" count(10_000, 1),
        /// The same from one address.
        max_unauthenticated_per_address: usize = "max_unauthenticated_per_address" count(5_000, 1),
        /// What connections that have not logged in may take.
        unauthenticated_bytes_max: usize = "max_unauthenticated_memory" bytes(128 << 20),
        /// Logins that run at the same time; others wait.
        logins_at_a_time: usize = "max_logins_at_a_time" count(64, 1),
        /// SQL longer than this is passed on unread and pins the session.
        statement_inspect_bytes_max: usize = "statement_inspect_max" bytes(1 << 20),
        /// If a database has more function text than this, every transaction is asked what it has left behind.
        functions_inspect_bytes_max: usize = "functions_inspect_max" bytes(16 << 20),
        /// Statements one session may have.
        client_prepared_statements_max: usize = "max_client_prepared_statements" count(100_000, 1),
        /// Memory for prepared statements of one session.
        client_prepared_bytes_max: usize = "max_client_prepared_bytes" bytes(64 << 20),
        /// Prepared statements in this process; a tenant may prepare as much as it leaves free for others.
        prepared_bytes_max: usize = "max_prepared_bytes_total" bytes(1 << 30),
        /// Requests of one client that may be unanswered before no more is read from it.
        pipelined_requests_max: usize = "max_pipelined_requests" count(1000, 2),
        /// Parameters one session may have SET.
        tracked_parameters_max: usize = "max_tracked_parameters" count(256, 1),
        /// Bytes of their names and values.
        tracked_bytes_max: usize = "max_tracked_bytes" bytes(256 << 10),
        /// Bytes that are kept for one session, beside its prepared statements.
        client_memory_max: usize = "max_client_memory" bytes(16 << 20),
        /// Bytes that are kept for one tenant.
        tenant_memory_max: usize = "max_tenant_memory" bytes(256 << 20),
        /// Bytes that are kept for all tenants; a quarter of what the process may use, 1 GiB at most.
        memory_max: usize = "max_memory" bytes_or_auto(machine::memory_share),
        /// Channels one session may LISTEN to and still share servers.
        listening_channels_max: usize = "max_listening_channels" count(1000, 1),
        /// Notifications that may wait for one client.
        queued_notifications_bytes_max: usize = "max_queued_notifications" bytes(4 << 20),
        /// Server connections being opened at a time per host, over all its tenants.
        connecting_servers_max: usize = "max_connecting_servers" count(16, 1),
        /// Cancel requests under way at a time, for each pool and to other nodes.
        cancels_max: usize = "max_cancels" count(64, 1),
        /// Logins and tenants kept in memory, each.
        directory_cache_max: u64 = "directory_cache_max" count(100_000, 1) AT_START,
        /// Look-ups of logins and tenants under way at a time.
        directory_look_ups_max: usize = "max_directory_look_ups" count(50, 1) AT_START,
        /// Connections to the central database.
        central_connections_max: usize = "max_central_connections" count(4, 1) AT_START,
        /// HTTP connections open at a time.
        http_connections_max: usize = "http.max_connections" count(64, 1) AT_START,
        /// Management requests under way at a time.
        http_requests_max: usize = "http.max_requests" count(32, 1) AT_START,
        /// Long operations begun over HTTP that are under way at a time.
        http_operations_max: usize = "http.max_operations" count(8, 1) AT_START,
        /// Bytes of a request's body.
        http_body_bytes_max: usize = "http.max_body" bytes(1 << 20) AT_START,
        /// Tenants that metrics name; the rest is summed up as `other`.
        metrics_tenants_max: usize = "metrics_tenants_max" count(100, 0),
        ;
        /// What failed logins cost.
        failed_logins: FailedLoginRules = FailedLoginRules::read,
    }

    /// How failed logins are answered.
    #[derive(Copy, PartialEq, Eq)]
    FailedLoginRules {
        /// Failures of an address, or with a login's name, that delay nothing.
        free: u32 = "failed_logins_free" count(10, 0),
        /// The longest delay of an answer.
        delay_max: Duration = "failed_login_delay_max" duration(seconds(5)),
        /// How long failures are remembered at least.
        remembered: Duration = "failed_logins_remembered" duration(seconds(600)),
        /// For how long at least it is remembered from where a login has succeeded.
        success_remembered: Duration = "login_success_remembered" duration(seconds(86_400)),
        /// Addresses, logins, and pairs of them that are remembered, each.
        tracked_max: usize = "max_failed_logins_tracked" count(20_000, 1),
        /// Lines in the log about failed logins in a second.
        logged_max: u32 = "max_failed_login_lines" count(100, 0),
    }

    /// How long is too long. `None`: no limit.
    Timeouts {
        /// For a client to log in.
        client_login: Duration = "client_login_timeout" duration(seconds(10)),
        /// For a server connection to open.
        server_connect: Duration = "server_connect_timeout" duration(seconds(5)),
        /// The longest pause between two attempts to open a server that fail.
        server_login_retry: Duration = "server_login_retry" duration(seconds(1)),
        /// For a server to become free.
        query_wait: Duration = "query_wait_timeout" duration(seconds(15)),
        /// For a query.
        query: Option<Duration> = "query_timeout" duration_or_off(None),
        /// For a transaction.
        transaction: Option<Duration> = "transaction_timeout" duration_or_off(None),
        /// Between two statements of a transaction.
        idle_transaction: Option<Duration> = "idle_transaction_timeout" duration_or_off(None),
        /// Between two transactions of a client.
        client_idle: Option<Duration> = "client_idle_timeout" duration_or_off(None),
        /// An idle server is closed.
        server_idle: Duration = "server_idle_timeout" duration(seconds(600)),
        /// A server is closed at its next idle moment.
        server_lifetime: Duration = "server_lifetime" duration(seconds(3600)),
        /// A server idle for so long is asked whether it is still there, and again each time it has passed.
        server_check_delay: Duration = "server_check_delay" duration(seconds(30)),
        /// How long functions changed past this proxy may go unnoticed. PostgreSQL's statistics, which tell of
        /// them, come a few seconds late.
        functions_check_delay: Duration = "functions_check_delay" duration(seconds(10)),
        /// An unused pool is closed.
        pool_idle: Duration = "pool_idle_timeout" duration(seconds(600)),
        /// Grace for running transactions on TERM.
        shutdown: Duration = "shutdown_timeout" duration(seconds(30)),
        /// How long a process that was replaced passes on the bytes of clients with TLS; `None`: it does not.
        takeover_tls: Option<Duration> = "takeover_tls_timeout" duration_or_off(Some(seconds(3600))),
        /// A cancel that has not settled is dropped.
        cancel: Duration = "cancel_timeout" duration(seconds(10)),
        /// For a management request to be answered.
        http_request: Duration = "http.request_timeout" duration(seconds(30)),
        /// The longest `?wait=` of a request that follows an operation.
        http_wait: Duration = "http.max_wait" duration(seconds(600)),
        /// For the head of an HTTP request to arrive, also behind an earlier one.
        http_head: Duration = "http.header_timeout" duration(seconds(10)) AT_START,
        /// How long a looked-up login or tenant is used without asking again.
        directory_fresh: Duration = "directory_fresh" duration(seconds(60)) AT_START,
        /// How long it is used while the central database is down.
        directory_stale: Duration = "directory_stale" duration(seconds(600)) AT_START,
        /// How old the snapshot of the directory may be.
        directory_snapshot_max_age: Duration = "directory_snapshot_max_age" duration(seconds(86_400)) AT_START,
        /// For one answer of the central database.
        central: Duration = "central_timeout" duration(seconds(5)) AT_START,
        /// How long `serve` waits for the central database at its start.
        central_start: Duration = "central_start_timeout" duration(seconds(60)) AT_START,
        ;
        /// Of connections from clients.
        client_keepalive: Keepalive =
            |w: &mut _| keepalive(w, ["tcp_keepidle", "tcp_keepintvl", "tcp_user_timeout"], 30, 10),
        /// Of connections to servers and to the central database.
        server_keepalive: Keepalive = |w: &mut _| {
            keepalive(w, ["server_tcp_keepidle", "server_tcp_keepintvl", "server_tcp_user_timeout"], 8, 4)
        },
    }
}

/// A value as SHOW CONFIG shows it.
pub trait Shown {
    /// Durations are seconds as a bare number, as PgBouncer shows them; 0 is none.
    fn shown(&self) -> String;
}

macro_rules! numbers_shown {
    ($($number:ty)+) => {$(
        impl Shown for $number {
            fn shown(&self) -> String {
                self.to_string()
            }
        }
    )+};
}
numbers_shown!(u32 u64 usize);

impl Shown for bool {
    /// As PgBouncer shows it.
    fn shown(&self) -> String {
        u32::from(*self).to_string()
    }
}

impl Shown for Duration {
    fn shown(&self) -> String {
        self.as_secs_f64().to_string()
    }
}

impl Shown for Option<Duration> {
    fn shown(&self) -> String {
        self.map_or("0".to_owned(), |duration| duration.shown())
    }
}

impl Shown for PoolMode {
    fn shown(&self) -> String {
        self.word().to_owned()
    }
}
