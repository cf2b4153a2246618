//! The configuration: `proxy.toml` is read once as written, then turned into its meaning. All checks happen
//! there.
//!
//! Every limit of the proxy has its name in `settings.rs`. Durations and sizes carry a unit; an unknown key is refused
//! with the nearest known one; `PGLOBBY_` environment variables override.

mod central_url;
mod machine;
mod meaning;
mod modes;
mod settings;
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

pub use self::{
    meaning::UNIX_SOCKET_PATH_BYTES_MAX,
    modes::{PoolMode, TlsMode},
    settings::{FailedLoginRules, Limits, PoolConfig, Setting, Shown, Timeouts},
};

/// The configuration. All checks were made.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where clients connect: `listen_addr` (several, comma separated; `*` for all) and `listen_port` (6432).
    pub listen: Vec<SocketAddr>,
    /// Folder of a Unix socket `.s.PGSQL.<listen_port>` for clients; none by default.
    pub unix_socket_dir: Option<PathBuf>,
    /// Port in the Unix socket's name.
    pub listen_port: u16,
    /// `so_reuseport`: other processes may listen on the same TCP ports; default false.
    pub so_reuseport: bool,
    /// Where a new process asks the running one for its sockets and sessions.
    pub takeover_socket: TakeoverSocket,
    /// `node_name`; `None`: the machine's name, with the port where it is not 6432.
    pub node_name: Option<String>,
    /// `node_address`: what other nodes show; `None`: where clients connect.
    pub node_address: Option<String>,
    /// `worker_threads`, each a `current_thread` runtime; default 0, which means half as many as the machine
    /// has cores.
    pub worker_threads: usize,
    /// `tenant_host_suffixes`, under which a TLS server name's first label names the tenant; lower case, no
    /// dots around them.
    pub tenant_host_suffixes: Vec<String>,
    /// `maintenance_databases`: database names that mean a login's only tenant, unless a tenant has that name.
    pub maintenance_databases: Vec<String>,
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
    /// `directory_snapshot`: the file that logins are admitted from while the central database is away. By default in
    /// the folder that systemd gives the service (`STATE_DIRECTORY`), if there is one; `None` (`off`): no snapshot.
    pub directory_snapshot: Option<PathBuf>,
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

/// `takeover_socket`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TakeoverSocket {
    /// `off`: no process takes over from this one.
    Off,
    /// Not set: in `unix_socket_dir`, or in the folder of the configuration's file. If it cannot be made
    /// there, no process takes over.
    Default(PathBuf),
    /// As written; if it cannot be made, that is an error.
    Path(PathBuf),
}

impl TakeoverSocket {
    /// The path, unless it is off.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Off => None,
            Self::Default(path) | Self::Path(path) => Some(path),
        }
    }
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

    /// As [`Self::load`], from a text and a given environment.
    pub fn read(
        text: &str,
        path: Option<&Path>,
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, ConfigError> {
        meaning::read(text, path, environment)
            .map_err(|problems| ConfigError { path: path.map(Path::to_owned), problems })
    }
}

/// How TCP finds out that the other end is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe.
    pub idle: Duration,
    /// Between two probes.
    pub interval: Duration,
    /// How long sent bytes may stay unacknowledged. On Linux it also replaces the probe count as the
    /// limit for an idle connection, so it is never shorter than [`Self::all_probes`]. `None`: the kernel's
    /// default.
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
