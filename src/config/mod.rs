//! The configuration: `proxy.toml` is read once as written, then turned into its meaning. All checks happen
//! there.
//!
//! Every limit of the proxy has its name here. Durations and sizes carry a unit; an unknown key is refused
//! with the nearest known one; `PGLOBBY_` environment variables override.

mod central_url;
mod limits;
mod machine;
mod meaning;
mod modes;
pub mod units;
mod written;

use std::{
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::SecretString;
use zeroize::Zeroizing;

pub use self::modes::{PoolMode, TlsMode};

/// The configuration. All checks were made.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where clients connect: `listen_addr` (several, comma separated; `*` for all) and `listen_port` (6432).
    pub listen: Vec<SocketAddr>,
    /// Folder of a Unix socket `.s.PGSQL.<listen_port>` for clients; none by default.
    pub unix_socket_dir: Option<PathBuf>,
    /// Port in the Unix socket's name.
    pub listen_port: u16,
    /// `worker_threads`, each a `current_thread` runtime; default 0, which means half as many as the machine
    /// has cores.
    pub worker_threads: usize,
    /// `tenant_host_suffixes`, under which a TLS server name's first label names the tenant; lower case, no
    /// dots around them.
    pub tenant_host_suffixes: Vec<String>,
    /// Pools, where the tenant's row says nothing else.
    pub pool: PoolConfig,
    /// What is too much.
    pub limits: Limits,
    /// How long is too long.
    pub timeouts: Timeouts,
    /// TLS towards clients.
    pub client_tls: ClientTls,
    /// TLS towards servers, where the host's row says nothing else.
    pub server_tls: ServerTls,
    /// `server_require_auth`, default `scram-sha-256`: a server must prove over a network that it knows the
    /// role's password.
    pub server_proves_itself: bool,
    /// The central database.
    pub central: Central,
    /// The key ring's file.
    pub keys_file: Option<PathBuf>,
    /// `PGLOBBY_KEYS`: the ring itself; the file is not looked at then.
    pub keys_text: Option<SecretString>,
    /// `[http] listen`: metrics, health, management; default `127.0.0.1:9432`, `None` (`off`): no HTTP.
    pub http_listen: Option<SocketAddr>,
    /// Logs.
    pub log: Log,
    /// `admin_allow_from`: where administrators of the console may come from besides a Unix socket; default:
    /// loopback.
    pub admin_allow_from: Vec<ipnet::IpNet>,
    /// The file this came from, for reload.
    pub path: Option<PathBuf>,
}

/// Everything that is wrong with a configuration, said at once. Quotes no password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    /// The file; `None` where there is only the environment.
    pub path: Option<PathBuf>,
    /// One sentence each, with its line or variable.
    pub problems: Vec<String>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{}: ", path.display())?,
            None => write!(f, "configuration: ")?,
        }
        write!(f, "{}", self.problems.join("; "))
    }
}

impl Config {
    /// Reads `path` (without one: nothing but defaults), lets `PGLOBBY_` variables override, and checks
    /// everything.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let failed =
            |problem: String| ConfigError { path: path.map(Path::to_owned), problems: vec![problem] };
        let text = match path {
            Some(path) => std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?,
            None => String::new(),
        };
        Self::read(&Zeroizing::new(text), path, &|name| std::env::var(name).ok())
    }

    /// The same from text and an environment of the caller's choice.
    pub fn read(
        text: &str,
        path: Option<&Path>,
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        meaning::read(text, path, environment)
            .map_err(|problems| ConfigError { path: path.map(Path::to_owned), problems })
    }
}

/// Defaults of pools; a tenant's row overrides them.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// `pool_mode`, default `transaction`.
    pub pool_mode: PoolMode,
    /// `default_pool_size`, server connections per (tenant, access); default 20.
    pub default_pool_size: u32,
    /// `min_pool_size`, default 0.
    pub min_pool_size: u32,
    /// `max_pinned_servers` of a pool while others wait; default 0, which is all but one, and all of a pool
    /// of fewer than five.
    pub max_pinned_servers: usize,
    /// `max_prepared_statements` each server keeps for clients; default 200.
    pub max_prepared_statements: usize,
    /// `max_prepared_bytes`: text of prepared statements that each server keeps for clients; default 16 MiB.
    pub max_prepared_bytes: usize,
}

/// What is too much. Each is refused in clear words, none is a hang.
#[derive(Debug, Clone)]
pub struct Limits {
    /// `max_client_conn`, default 10000.
    pub max_client_conn: usize,
    /// `max_db_client_connections`: sessions per tenant, default 0 (no limit).
    pub max_db_client_connections: usize,
    /// `max_unauthenticated_conn`: connections that have not logged in, default 10000.
    pub max_unauthenticated_conn: usize,
    /// `max_unauthenticated_per_address`, default 5000.
    pub max_unauthenticated_per_address: usize,
    /// `max_unauthenticated_memory`: what connections that have not logged in may take, default 128 MiB.
    pub unauthenticated_bytes_max: usize,
    /// `max_logins_at_a_time`: logins that have their turn at a time, default 64; others wait for theirs.
    pub logins_at_a_time: usize,
    /// What failed logins cost.
    pub failed_logins: FailedLoginRules,
    /// `statement_inspect_max`: SQL longer than this is passed on unread and pins the session; default 1 MiB.
    pub statement_inspect_bytes_max: usize,
    /// `functions_inspect_max`: where a database has more function text than this, every transaction is asked
    /// what it has left behind; default 16 MiB.
    pub functions_inspect_bytes_max: usize,
    /// `max_client_prepared_statements`: statements one session may have, default 10000.
    pub client_prepared_statements_max: usize,
    /// `max_client_prepared_bytes`: text of prepared statements one session may have, default 16 MiB.
    pub client_prepared_bytes_max: usize,
    /// `max_prepared_bytes_total`: bytes of prepared statements in this process, default 1 GiB; a tenant may
    /// prepare as much as it leaves free for others.
    pub prepared_bytes_max: usize,
    /// `max_pipelined_requests`: requests of one client that may be unanswered before no more is read from
    /// it, default 1000.
    pub pipelined_requests_max: usize,
    /// `max_tracked_parameters`: parameters one session may have SET, default 256.
    pub tracked_parameters_max: usize,
    /// `max_tracked_bytes`: bytes of their names and values, default 256 KiB.
    pub tracked_bytes_max: usize,
    /// `max_client_memory`: bytes that are kept for one session, beside its prepared statements; default 16
    /// MiB.
    pub client_memory_max: usize,
    /// `max_tenant_memory`: bytes that are kept for one tenant, default 256 MiB.
    pub tenant_memory_max: usize,
    /// `max_memory`: bytes that are kept for all tenants; default a quarter of what the process may use, 1
    /// GiB at most.
    pub memory_max: usize,
    /// `max_listening_channels`: channels one session may LISTEN to and still share servers, default 1000.
    pub listening_channels_max: usize,
    /// `max_queued_notifications`: notifications that may wait for one client, default 4 MiB.
    pub queued_notifications_bytes_max: usize,
    /// `max_connecting_servers`: server connections being opened at a time per host, over all its tenants,
    /// default 16.
    pub connecting_servers_max: usize,
    /// `max_cancels`: cancel requests under way at a time, for each pool and to other nodes, default 64.
    pub cancels_max: usize,
    /// `directory_cache_max`: logins and tenants kept in memory, each; default 100000.
    pub directory_cache_max: u64,
    /// `max_directory_look_ups`: look-ups of logins and tenants under way at a time, default 50.
    pub directory_look_ups_max: usize,
    /// `metrics_tenants_max`: tenants that metrics name, the rest is summed up as `other`; default 100.
    pub metrics_tenants_max: usize,
    /// `[http] max_connections`: HTTP connections open at a time, default 64.
    pub http_connections_max: usize,
    /// `[http] max_requests`: management requests under way at a time, default 32.
    pub http_requests_max: usize,
    /// `[http] max_operations`: long operations begun over HTTP that are under way at a time, default 8.
    pub http_operations_max: usize,
    /// `[http] max_body`: bytes of a request's body, default 1 MB.
    pub http_body_bytes_max: usize,
    /// `max_central_connections`: connections to the central database, default 4.
    pub central_connections_max: usize,
}

/// How failed logins are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FailedLoginRules {
    /// `failed_logins_free`: failures of an address, or with a login's name, that delay nothing; default 10.
    pub free: u32,
    /// `failed_login_delay_max`: the longest delay of an answer, default 5 s.
    pub delay_max: Duration,
    /// `failed_logins_remembered`: for how long at least, default 10 min.
    pub remembered: Duration,
    /// `login_success_remembered`: for how long at least it is remembered from where a login has succeeded,
    /// default 1 day.
    pub success_remembered: Duration,
    /// `max_failed_logins_tracked`: addresses, logins, and pairs of them that are remembered, each; default
    /// 20000.
    pub tracked_max: usize,
    /// `max_failed_login_lines`: lines in the log about failed logins in a second, default 100.
    pub logged_max: u32,
}

/// How long is too long. `None`: no limit.
#[derive(Debug, Clone)]
pub struct Timeouts {
    /// `client_login_timeout`, default 10 s.
    pub client_login: Duration,
    /// `server_connect_timeout`, default 5 s.
    pub server_connect: Duration,
    /// `server_login_retry`: the longest pause between two attempts to open a server that fail, default 1 s.
    pub server_login_retry: Duration,
    /// `query_wait_timeout`: for a server to become free, default 15 s.
    pub query_wait: Duration,
    /// `query_timeout`, default off.
    pub query: Option<Duration>,
    /// `transaction_timeout`, default off.
    pub transaction: Option<Duration>,
    /// `idle_transaction_timeout`, default off.
    pub idle_transaction: Option<Duration>,
    /// `client_idle_timeout`, default off.
    pub client_idle: Option<Duration>,
    /// `server_idle_timeout`: an idle server is closed, default 10 min.
    pub server_idle: Duration,
    /// `server_lifetime`: a server is closed at its next idle moment, default 1 h.
    pub server_lifetime: Duration,
    /// `server_check_delay`: a server idle for so long is asked whether it is still there, and again each
    /// time it has passed, default 30 s.
    pub server_check_delay: Duration,
    /// `functions_check_delay`: how long functions changed past this proxy may go unnoticed, default 10 s;
    /// PostgreSQL's statistics, which tell of them, come a few seconds late.
    pub functions_check_delay: Duration,
    /// `pool_idle_timeout`: an unused pool is closed, default 10 min.
    pub pool_idle: Duration,
    /// `shutdown_timeout`: grace for running transactions on TERM, default 30 s.
    pub shutdown: Duration,
    /// `cancel_timeout`: a cancel that has not settled is dropped, default 10 s.
    pub cancel: Duration,
    /// `directory_fresh`: how long a looked-up login or tenant is used without asking again, default 60 s.
    pub directory_fresh: Duration,
    /// `directory_stale`: how long it is used while the central database is down, default 10 min.
    pub directory_stale: Duration,
    /// `central_timeout`: for one answer of the central database, default 5 s.
    pub central: Duration,
    /// `central_start_timeout`: how long `serve` waits for the central database at its start, default 60 s.
    pub central_start: Duration,
    /// `[http] header_timeout`: for the head of an HTTP request to arrive, also behind an earlier one,
    /// default 10 s.
    pub http_head: Duration,
    /// `[http] request_timeout`: for a management request to be answered, default 30 s.
    pub http_request: Duration,
    /// `[http] max_wait`: the longest `?wait=` of a request that follows an operation, default 10 min.
    pub http_wait: Duration,
    /// `tcp_keepidle`, `tcp_keepintvl` and `tcp_user_timeout` of connections from clients; 30 s, 10 s and 60
    /// s by default.
    pub client_keepalive: Keepalive,
    /// `server_tcp_keepidle`, `server_tcp_keepintvl` and `server_tcp_user_timeout` of connections to servers
    /// and to the central database; 8 s, 4 s and 20 s by default.
    pub server_keepalive: Keepalive,
}

/// How TCP finds out that the other end is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe.
    pub idle: Duration,
    /// Between two probes.
    pub interval: Duration,
    /// How long sent bytes may stay unacknowledged. On Linux it also decides, instead of the count of probes,
    /// when a connection with nothing under way is given up: so it is never shorter than
    /// [`Self::all_probes`]. `None`: the kernel's own patience.
    pub user_timeout: Option<Duration>,
}

impl Keepalive {
    /// Probes that get no answer before a connection is given up.
    pub const PROBES: u32 = 3;

    /// From the last sign of life until the last probe counts as lost.
    pub fn all_probes(&self) -> Duration {
        self.idle.saturating_add(self.interval.saturating_mul(Self::PROBES))
    }

    /// Sets it for one socket, or for all that a listening one accepts.
    pub fn apply(&self, socket: &socket2::SockRef<'_>) -> std::io::Result<()> {
        let keepalive = socket2::TcpKeepalive::new()
            .with_time(self.idle)
            .with_interval(self.interval)
            .with_retries(Self::PROBES);
        socket.set_tcp_keepalive(&keepalive)?;
        #[cfg(any(target_os = "linux", target_os = "android"))]
        socket.set_tcp_user_timeout(self.user_timeout)?;
        Ok(())
    }
}

/// `client_tls_sslmode` and its files.
#[derive(Debug, Clone)]
pub struct ClientTls {
    /// Default `prefer` where there is a certificate, else `disable`. `disable`, `allow`/`prefer` (offered)
    /// or `require`; `verify-*` ask for client certificates signed by `ca_file`.
    pub mode: TlsMode,
    /// `client_tls_key_file`.
    pub key_file: Option<PathBuf>,
    /// `client_tls_cert_file`.
    pub cert_file: Option<PathBuf>,
    /// `client_tls_ca_file`.
    pub ca_file: Option<PathBuf>,
}

/// `server_tls_*`.
#[derive(Debug, Clone)]
pub struct ServerTls {
    /// `server_tls_sslmode`, default `prefer`, for hosts registered without one.
    pub mode: TlsMode,
    /// `server_tls_ca_file`.
    pub ca_file: Option<PathBuf>,
    /// `server_tls_cert_file`: a client certificate towards servers.
    pub cert_file: Option<PathBuf>,
    /// `server_tls_key_file`.
    pub key_file: Option<PathBuf>,
}

/// `[central]`.
#[derive(Debug, Clone)]
pub struct Central {
    /// `url` without its password.
    pub url: String,
    /// From the URL, `PGLOBBY_CENTRAL_PASSWORD`, `PGPASSWORD` or a passfile.
    pub password: Option<SecretString>,
    /// The URL taken apart, without its password; `sslmode` and its files are in `tls`.
    pub connection: tokio_postgres::Config,
    /// How to encrypt, with libpq's meaning; never over a Unix socket.
    pub tls: CentralTls,
}

/// `sslmode` and `sslrootcert` of the central URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CentralTls {
    /// `sslmode`, default `prefer`; `allow` is taken as `prefer`.
    pub mode: TlsMode,
    /// `sslrootcert`: a PEM file of certificate authorities; `None`, or the word `system`: the system's.
    pub root_ca: Option<PathBuf>,
}

/// `[log]`.
#[derive(Debug, Clone)]
pub struct Log {
    /// `format = "text" | "json"`.
    pub json: bool,
    /// `level`, a `tracing` filter; default `info`.
    pub filter: String,
    /// `connections`: a line for each login and end, default true.
    pub connections: bool,
}
