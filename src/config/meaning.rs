//! From the configuration as written to its meaning: each key once, with its default; then the checks
//! across keys.

#[cfg(test)]
mod tests;

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _},
    path::{Path, PathBuf},
    thread::available_parallelism,
    time::Duration,
};

use secrecy::SecretString;

use crate::config::{
    Central, CentralTls, ClientTls, Config, Keepalive, Limits, Log, PoolConfig, ServerTls, TakeoverSocket,
    Timeouts, TlsMode, central_url,
    written::{Environment, Written},
};

/// `sun_path` has 108 bytes, one for the NUL.
pub const UNIX_SOCKET_PATH_BYTES_MAX: usize = 107;

/// As long as a host's name can be (RFC 1035).
const NODE_WORD_BYTES_MAX: usize = 255;

/// Reads the whole configuration.
pub fn read(text: &str, path: Option<&Path>, environment: Environment<'_>) -> Result<Config, Vec<String>> {
    let mut written = Written::parse(text, path.and_then(Path::parent), environment);
    let config = everything(&mut written, path, environment);
    if let Some(config) = &config {
        check_agreement(&mut written, config);
    }
    let (_, problems) = written.finish();
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        _ => Err(problems),
    }
}

/// `None` if there is no central database. All other keys have defaults.
fn everything(w: &mut Written<'_>, path: Option<&Path>, environment: Environment<'_>) -> Option<Config> {
    let listen_port = w.count("listen_port", 6432_u16, 0);
    let listen = w.text("listen_addr", |text| listen_addresses(text, listen_port));
    let listen_default = vec![SocketAddr::from((Ipv4Addr::LOCALHOST, listen_port))];
    let worker_threads = match w.count("worker_threads", 0_usize, 0) {
        0 => available_parallelism().map_or(1, |cores| cores.get().div_ceil(2)),
        threads => threads,
    };
    let suffixes = w.list("tenant_host_suffixes").unwrap_or_default();
    let unix_socket_dir = w.path("unix_socket_dir");
    let config = Config {
        listen: listen.unwrap_or(listen_default),
        takeover_socket: takeover_socket(w, unix_socket_dir.as_deref(), path, listen_port),
        unix_socket_dir,
        listen_port,
        so_reuseport: w.truth("so_reuseport", false),
        node_name: w.text("node_name", node_word),
        node_address: w.text("node_address", node_word),
        worker_threads,
        tenant_host_suffixes: suffixes
            .iter()
            .map(|name| name.trim_matches('.').to_ascii_lowercase())
            .collect(),
        maintenance_databases: w.list("maintenance_databases").unwrap_or_default(),
        pool: PoolConfig::read(w),
        limits: Limits::read(w),
        timeouts: Timeouts::read(w),
        client_tls: client_tls(w),
        server_tls: server_tls(w),
        server_proves_itself: w.choice(
            "server_require_auth",
            &[("scram-sha-256", true), ("any", false)],
            true,
        ),
        admin_allow_from: w.networks("admin_allow_from").unwrap_or_else(loopback),
        central: Central {
            url: String::new(),
            password: None,
            connection: tokio_postgres::Config::new(),
            tls: CentralTls { mode: TlsMode::Disable, root_ca: None },
        },
        directory_snapshot: directory_snapshot(w, environment),
        keys_file: w.path("keys.file"),
        keys_text: environment("PGLOBBY_KEYS").filter(|text| !text.trim().is_empty()).map(SecretString::from),
        http_listen: http_listen(w),
        log: log(w),
        path: path.map(Path::to_owned),
    };
    let mut given = false;
    let central = w.text("central.url", |url| {
        given = true;
        central_url::parse(url, environment)
    });
    if !given {
        w.problem("central.url is missing: where the central database is, as postgres://master@127.0.0.1:5432/central");
    }
    central.map(|central| Config { central, ..config })
}

/// The default is the same for every process with the same configuration. A path that is too long for a socket
/// is no default.
fn takeover_socket(
    w: &mut Written<'_>,
    unix_socket_dir: Option<&Path>,
    file: Option<&Path>,
    port: u16,
) -> TakeoverSocket {
    match w.path("takeover_socket") {
        Some(path) if path.file_name().is_some_and(|name| name == "off") => TakeoverSocket::Off,
        Some(path) => TakeoverSocket::Path(path),
        None => {
            let beside_file = || {
                let (folder, stem) = file.and_then(|file| Some((file.parent()?, file.file_stem()?)))?;
                Some(folder.join(format!(".{}.{port}.takeover", stem.display())))
            };
            let default = match unix_socket_dir {
                Some(folder) => Some(folder.join(format!(".pglobby.{port}.takeover"))),
                None => beside_file(),
            };
            let fits = default.filter(|path| path.as_os_str().len() <= UNIX_SOCKET_PATH_BYTES_MAX);
            fits.map_or(TakeoverSocket::Off, TakeoverSocket::Default)
        }
    }
}

/// If TCP_USER_TIMEOUT were shorter than all probes together, one lost probe would end an idle connection.
pub(super) fn keepalive(
    w: &mut Written<'_>,
    keys: [&'static str; 3],
    idle_s: u64,
    interval_s: u64,
) -> Keepalive {
    let [idle, interval, user_timeout] = keys;
    let mut keepalive = Keepalive {
        idle: w.duration(idle, Duration::from_secs(idle_s)),
        interval: w.duration(interval, Duration::from_secs(interval_s)),
        user_timeout: None,
    };
    for (key, value) in [(idle, keepalive.idle), (interval, keepalive.interval)] {
        // The kernel counts in seconds up to this maximum.
        if value.subsec_nanos() != 0 || !(1..=32_767).contains(&value.as_secs()) {
            w.problem(format!("{key} must be whole seconds, from 1s to 32767s"));
        }
    }
    let probes = keepalive.all_probes();
    keepalive.user_timeout = w.duration_or_off(user_timeout, Some(probes));
    if keepalive.user_timeout.is_some_and(|timeout| timeout < probes) {
        w.problem(format!(
            "{user_timeout} must be {probes:?} or longer ({idle} + {} x {interval}), or off: a shorter one ends idle connections when \
             one probe is lost",
            Keepalive::PROBES
        ));
    }
    keepalive
}

fn client_tls(w: &mut Written<'_>) -> ClientTls {
    let (key_file, cert_file) = (w.path("client_tls_key_file"), w.path("client_tls_cert_file"));
    // A configured certificate is meant to be used.
    let default = if cert_file.is_some() { TlsMode::Prefer } else { TlsMode::Disable };
    ClientTls {
        mode: w.choice("client_tls_sslmode", TlsMode::ALL, default),
        key_file,
        cert_file,
        ca_file: w.path("client_tls_ca_file"),
    }
}

fn server_tls(w: &mut Written<'_>) -> ServerTls {
    ServerTls {
        mode: w.choice("server_tls_sslmode", TlsMode::ALL, TlsMode::Prefer),
        ca_file: w.path("server_tls_ca_file"),
        cert_file: w.path("server_tls_cert_file"),
        key_file: w.path("server_tls_key_file"),
    }
}

/// systemd names several folders with colons between them; the first one is ours.
fn directory_snapshot(w: &mut Written<'_>, environment: Environment<'_>) -> Option<PathBuf> {
    let of_service = || {
        let folders = environment("STATE_DIRECTORY")?;
        let first = folders.split(':').next().filter(|folder| !folder.is_empty())?;
        Some(Path::new(first).join("directory.snapshot"))
    };
    w.path_or_off("directory_snapshot").unwrap_or_else(of_service)
}

/// A column of tables that people read.
fn node_word(text: &str) -> Result<String, String> {
    let is_readable = text.len() <= NODE_WORD_BYTES_MAX && !text.chars().any(char::is_control);
    let problem = || format!("must have at most {NODE_WORD_BYTES_MAX} bytes, and no control characters");
    is_readable.then(|| text.to_owned()).ok_or_else(problem)
}

fn http_listen(w: &mut Written<'_>) -> Option<SocketAddr> {
    let read = |text: &str| match text {
        "off" => Ok(None),
        address => address.parse().map(Some).map_err(|_| "must be ADDRESS:PORT, or off".to_owned()),
    };
    w.text("http.listen", read).unwrap_or(Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 9432))))
}

fn log(w: &mut Written<'_>) -> Log {
    let filter = w.text("log.level", |text| {
        let valid = tracing_subscriber::EnvFilter::try_new(text);
        valid.map(|_| text.to_owned()).map_err(|error| format!("is not a level or a filter: {error}"))
    });
    Log {
        json: w.choice("log.format", &[("text", false), ("json", true)], false),
        filter: filter.unwrap_or_else(|| "info".to_owned()),
        connections: w.truth("log.connections", true),
    }
}

fn loopback() -> Vec<ipnet::IpNet> {
    vec![
        ipnet::Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8).into(),
        ipnet::Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128).into(),
    ]
}

/// `*`, or names and addresses separated by commas; `none`: no TCP.
fn listen_addresses(text: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    let mut addresses = Vec::new();
    for name in text.split(',').map(str::trim).filter(|name| !name.is_empty() && *name != "none") {
        if name == "*" {
            addresses.push((Ipv6Addr::UNSPECIFIED, port).into());
            addresses.push((Ipv4Addr::UNSPECIFIED, port).into());
        } else {
            let bare = name.trim_start_matches('[').trim_end_matches(']');
            let found =
                (bare, port).to_socket_addrs().map_err(|error| format!("holds \"{name}\": {error}"))?;
            addresses.extend(found);
        }
    }
    // In order, because the first is shown.
    let mut seen = std::collections::HashSet::new();
    addresses.retain(|address| seen.insert(*address));
    Ok(addresses)
}

fn check_agreement(w: &mut Written<'_>, config: &Config) {
    if config.listen.is_empty() && config.unix_socket_dir.is_none() {
        w.problem("no client could connect: listen_addr is none and unix_socket_dir is not set");
    }
    if let Some(folder) = &config.unix_socket_dir {
        let bytes = folder.join(format!(".s.PGSQL.{}", config.listen_port)).as_os_str().len();
        if bytes > UNIX_SOCKET_PATH_BYTES_MAX {
            w.problem(format!(
                "unix_socket_dir is too long: the socket's path has {bytes} bytes of {UNIX_SOCKET_PATH_BYTES_MAX}"
            ));
        }
    }
    if let TakeoverSocket::Path(path) = &config.takeover_socket
        && path.as_os_str().len() > UNIX_SOCKET_PATH_BYTES_MAX
    {
        let bytes = path.as_os_str().len();
        w.problem(format!(
            "takeover_socket is too long: it has {bytes} bytes of {UNIX_SOCKET_PATH_BYTES_MAX}"
        ));
    }
    if config.http_listen.is_some_and(|http| http.port() != 0 && config.listen.contains(&http)) {
        w.problem("http.listen and listen_addr are the same address and port");
    }
    if config.pool.min_pool_size > config.pool.default_pool_size {
        w.problem("min_pool_size is larger than default_pool_size");
    }
    if config.timeouts.directory_stale < config.timeouts.directory_fresh {
        w.problem("directory_stale is shorter than directory_fresh");
    }
    check_tls(w, config);
}

fn check_tls(w: &mut Written<'_>, config: &Config) {
    let ClientTls { mode, key_file, cert_file, ca_file } = &config.client_tls;
    match (cert_file, key_file) {
        (Some(_), None) => w.problem("client_tls_cert_file is given without client_tls_key_file"),
        (None, Some(_)) => w.problem("client_tls_key_file is given without client_tls_cert_file"),
        (None, None) if *mode != TlsMode::Disable => {
            w.problem("client_tls_sslmode needs client_tls_cert_file and client_tls_key_file");
        }
        _ => {}
    }
    if mode.verifies() && ca_file.is_none() {
        w.problem("client_tls_sslmode asks for client certificates, and there is no client_tls_ca_file to verify them");
    }
    match (&config.server_tls.cert_file, &config.server_tls.key_file) {
        (Some(_), None) => w.problem("server_tls_cert_file is given without server_tls_key_file"),
        (None, Some(_)) => w.problem("server_tls_key_file is given without server_tls_cert_file"),
        _ => {}
    }
}
