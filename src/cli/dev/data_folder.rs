//! The data folder of `pglobby dev`, which one process uses at a time.
//!
//! ```text
//! DIR/proxy.toml     the configuration, 0600: it has the master login's password
//! DIR/keyring.toml   the sealing keys, 0600
//! DIR/postgres       PostgreSQL's data, 0700
//! DIR/postgres.log
//! DIR/sockets        PostgreSQL's Unix socket, 0700: pglobby connects through it
//! DIR/.s.PGSQL.6432  pglobby's own, for clients
//! DIR/lock
//! ```
//!
//! The path of a Unix socket is short: in a folder with a long path PostgreSQL is reached over TCP.
//!
//! `proxy.toml` is written first: a first run that is interrupted leaves a password without a cluster, and
//! never a cluster without its password.

use std::{
    env,
    fs::{self, File, TryLockError},
    io::{self, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::config::Host;

use crate::{
    config::{Config, ConfigError, UNIX_SOCKET_PATH_BYTES_MAX},
    control_path::secrets::scram_verifier::generate_password,
    local_postgres::{
        binaries::{NoBinaries, PostgresBinaries},
        cluster::{ClusterError, LocalCluster, RunningCluster},
        os_user::{ClusterOwner, OwnerError},
    },
};

/// A data folder, locked while this value lives.
#[derive(Debug)]
pub struct DataFolder {
    path: PathBuf,
    _lock: File,
}

/// Why dev does not start. The message is one line that ends with what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the message names what a field is")]
pub enum DevError {
    /// Another dev uses the folder.
    #[error("another pglobby dev runs with {0:?}; stop it, or choose another --data-dir")]
    InUse(PathBuf),
    /// The folder has other files.
    #[error("{0:?} is not empty and is not a folder of pglobby dev; choose another with --data-dir")]
    NotADevFolder(PathBuf),
    /// Another process listens on the proxy's address.
    #[error("{address} is taken ({source}); choose another with --listen")]
    ListenTaken { address: SocketAddr, source: io::Error },
    /// The cluster exists, but `proxy.toml` with its password does not.
    #[error(
        "{0:?} has a PostgreSQL but no proxy.toml with its password; restore the file, or remove the \
         folder to start again"
    )]
    NoConfig(PathBuf),
    /// `proxy.toml` was edited so that dev cannot use it.
    #[error(
        "{0:?} does not name this folder's PostgreSQL and its password as dev wrote them; restore \
         that, or remove the folder to start again"
    )]
    NotOurs(PathBuf),
    /// No port is free for PostgreSQL.
    #[error("no port between {FIRST_PORT} and {LAST_PORT} is free on 127.0.0.1 for PostgreSQL")]
    NoPort,
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// See [`ClusterError`].
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// See [`NoBinaries`].
    #[error(transparent)]
    Binaries(#[from] NoBinaries),
    /// See [`OwnerError`].
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// A file cannot be read or written.
    #[error("{path:?}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

impl DataFolder {
    /// The default data folder: for root in `/var/lib`, because PostgreSQL's user cannot enter root's home;
    /// for others in their home.
    pub fn default_path() -> PathBuf {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if rustix::process::geteuid().is_root() {
            return "/var/lib/pglobby-dev".into();
        }
        let data = set("XDG_DATA_HOME").or_else(|| Some(set("HOME")?.join(".local/share")));
        data.map_or_else(|| env::temp_dir().join("pglobby-dev"), |data| data.join("pglobby/dev"))
    }

    /// Locks the folder for this process, and creates it if it does not exist.
    pub fn take(path: &Path) -> Result<Self, DevError> {
        let path = std::path::absolute(path).map_err(|source| io_error(path, source))?;
        let owner = ClusterOwner::current()?;
        let there_already = path.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
        owner.may_enter(there_already)?;
        if there_already == path {
            refuse_other_folders(&path)?;
        } else {
            // PostgreSQL's user must pass through to its data, and cannot list the folder.
            let mode = if owner == ClusterOwner::Ourselves { 0o700 } else { 0o711 };
            fs::create_dir_all(&path)
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
                .map_err(|source| io_error(&path, source))?;
            owner.may_enter(&path)?;
        }
        let lock_path = path.join(LOCK);
        let lock = File::create(&lock_path).map_err(|source| io_error(&lock_path, source))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path, _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(DevError::InUse(path)),
            Err(TryLockError::Error(source)) => Err(io_error(&lock_path, source)),
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its `proxy.toml`.
    pub fn config_path(&self) -> PathBuf {
        self.path.join("proxy.toml")
    }

    /// Reads the configuration, and writes it in the first run. `listen` replaces the proxy's address in it.
    pub fn config(&self, listen: Option<SocketAddr>) -> Result<Config, DevError> {
        let path = self.config_path();
        match fs::read_to_string(&path) {
            Ok(text) => {
                if let Some(listen) = listen {
                    self.write_config(&with_listen(&text, listen))?;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if self.postgres_data().exists() {
                    return Err(DevError::NoConfig(self.path.clone()));
                }
                self.write_config(&first_config(
                    listen.unwrap_or(DEFAULT_LISTEN),
                    &self.postgres_host(),
                    free_port()?,
                    &generate_password(),
                    has_room_for_socket(&self.path),
                ))?;
            }
            Err(source) => return Err(io_error(&path, source)),
        }
        let text = fs::read_to_string(&path).map_err(|source| io_error(&path, source))?;
        // Without the environment: dev must not use a PGLOBBY_CENTRAL_URL of another installation.
        Ok(Config::read(&text, Some(&path), &|_| None)?)
    }

    /// Starts the folder's PostgreSQL, and creates it in the first run. If its port is in use, it gets
    /// another one. The configuration that is returned has its port and its socket. Blocks.
    pub fn start_postgres(
        &self,
        mut config: Config,
        binaries: Option<&Path>,
    ) -> Result<(RunningCluster, Config), DevError> {
        let data = self.postgres_data();
        let binaries = match LocalCluster::made_by(&data)? {
            Some(major) => PostgresBinaries::find_major(binaries, major)?,
            None => PostgresBinaries::find(binaries)?,
        };
        let cluster = LocalCluster::new(binaries, &data)?;
        if !data.exists() {
            cluster.init(MASTER, self.central(&config)?.password, &[])?;
        }
        let host = self.postgres_host();
        let socket_folder = match &host {
            Host::Unix(folder) => self.empty_socket_folder(folder, cluster.owner())?,
            Host::Tcp(_) => "",
        };
        // The folder has been moved, or is from a version that used TCP.
        let port = self.central(&config)?.port;
        config = self.reach_postgres_at(config, &host, port)?;
        loop {
            let port = self.central(&config)?.port.to_string();
            let started = cluster.start(&[
                ("listen_addresses", "127.0.0.1"),
                ("port", &port),
                ("unix_socket_directories", socket_folder),
                ("max_connections", "200"),
                ("shared_buffers", "64MB"),
            ]);
            match started {
                Err(ClusterError::DidNotStart { reason, .. })
                    if reason.contains("Address already in use") =>
                {
                    // Ends with NoPort at the latest: each round tries another port.
                    config = self.reach_postgres_at(config, &host, free_port()?)?;
                }
                started => return Ok((started?, config)),
            }
        }
    }

    /// How pglobby reaches this folder's PostgreSQL: through its Unix socket, which needs less CPU
    /// than loopback TCP, unless the socket's path would be too long.
    fn postgres_host(&self) -> Host {
        let folder = self.path.join(SOCKETS);
        match has_room_for_socket(&folder) && folder.to_str().is_some() {
            true => Host::Unix(folder),
            false => Host::Tcp(LOOPBACK.to_owned()),
        }
    }

    /// Only PostgreSQL's user, and root, may connect. What a killed PostgreSQL has left is removed: the
    /// process id in its lock file may be of another process by now, and PostgreSQL would not start.
    fn empty_socket_folder<'a>(&self, folder: &'a Path, owner: &ClusterOwner) -> Result<&'a str, DevError> {
        match fs::remove_dir_all(folder) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => return Err(io_error(folder, source)),
            _ => {}
        }
        owner.make_folder(folder)?;
        folder.to_str().ok_or_else(|| DevError::NotOurs(self.config_path()))
    }

    /// Writes host and port of PostgreSQL into the configuration, unless they are there.
    fn reach_postgres_at(&self, config: Config, host: &Host, port: u16) -> Result<Config, DevError> {
        let old = self.central(&config)?;
        if (old.host, old.port) == (host, port) {
            return Ok(config);
        }
        let path = self.config_path();
        let text = fs::read_to_string(&path).map_err(|source| io_error(&path, source))?;
        let (old, new) = (authority(old.host, old.port), authority(host, port));
        self.write_config(&SecretString::from(text.replace(&old, &new)))?;
        let config = self.config(None)?;
        let written = self.central(&config)?;
        match (written.host, written.port) == (host, port) {
            true => Ok(config),
            false => Err(DevError::NotOurs(path)),
        }
    }

    /// Returns where the folder's PostgreSQL is, and its master password.
    pub fn central<'a>(&self, config: &'a Config) -> Result<CentralAddress<'a>, DevError> {
        let central = &config.central;
        match (central.connection.get_hosts(), central.connection.get_ports(), &central.password) {
            ([host], [port], Some(password)) if is_ours(host) => {
                Ok(CentralAddress { host, port: *port, password })
            }
            _ => Err(DevError::NotOurs(self.config_path())),
        }
    }

    fn postgres_data(&self) -> PathBuf {
        self.path.join("postgres")
    }

    /// Writes another file and renames it: a reader sees the old text or the new one.
    fn write_config(&self, text: &SecretString) -> Result<(), DevError> {
        let path = self.config_path();
        let unfinished = path.with_extension("unfinished");
        File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&unfinished)
            .and_then(|mut file| {
                file.write_all(text.expose_secret().as_bytes()).and_then(|()| file.sync_all())
            })
            .and_then(|()| fs::rename(&unfinished, &path))
            .map_err(|source| io_error(&path, source))
    }
}

/// The PostgreSQL that a configuration of dev names.
#[derive(Debug)]
pub struct CentralAddress<'a> {
    host: &'a Host,
    /// TCP port, and the number in the name of the Unix socket.
    pub port: u16,
    password: &'a SecretString,
}

impl CentralAddress<'_> {
    /// As a tenants' host has it in `hosts.address`.
    pub fn host_address(&self) -> String {
        match self.host {
            Host::Tcp(name) => name.clone(),
            Host::Unix(folder) => folder.display().to_string(),
        }
    }
}

/// The socket's folder may be another one than today's: DIR can be moved.
fn is_ours(host: &Host) -> bool {
    match host {
        Host::Tcp(name) => name == LOOPBACK,
        Host::Unix(folder) => folder.ends_with(SOCKETS),
    }
}

/// `@HOST:PORT/` of a URL.
fn authority(host: &Host, port: u16) -> String {
    match host {
        Host::Tcp(name) => format!("@{name}:{port}/"),
        Host::Unix(folder) => format!("@{}:{port}/", percent_encoded(folder)),
    }
}

/// Everything but letters, digits and `-._~`, so that a path is a host in a URL and needs no care in TOML.
fn percent_encoded(path: &Path) -> String {
    let mut text = String::new();
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                text.push(char::from(*byte));
            }
            _ => text += &format!("%{byte:02X}"),
        }
    }
    text
}

/// Whether the path of a socket in this folder is short enough, whatever its port is. Two bytes are spare
/// for the "." that a relative path in `proxy.toml` adds.
fn has_room_for_socket(folder: &Path) -> bool {
    folder.join(".s.PGSQL.65535").as_os_str().len() + 2 <= UNIX_SOCKET_PATH_BYTES_MAX
}

/// Checks, before anything is started, that no process listens on `address`.
pub fn must_be_free(address: SocketAddr) -> Result<(), DevError> {
    // Without SO_REUSEPORT: with it, the proxy would share the port with another pglobby.
    TcpListener::bind(address).map(drop).map_err(|source| DevError::ListenTaken { address, source })
}

/// Refuses a folder that has files but no lock file of dev: dev must not rewrite a `proxy.toml` of other
/// origin.
fn refuse_other_folders(path: &Path) -> Result<(), DevError> {
    let mut entries = fs::read_dir(path).map_err(|source| io_error(path, source))?;
    match path.join(LOCK).exists() || entries.next().is_none() {
        true => Ok(()),
        false => Err(DevError::NotADevFolder(path.to_path_buf())),
    }
}

fn first_config(
    listen: SocketAddr,
    postgres_host: &Host,
    postgres_port: u16,
    password: &SecretString,
    with_socket: bool,
) -> SecretString {
    let password = password.expose_secret();
    SecretString::from(format!(
        "# `pglobby dev` wrote this file and reads it at each start.
{}
{}
[central]
url = \"postgres://{MASTER}:{password}{}{CENTRAL_DATABASE}\"

[keys]
file = \"keyring.toml\"

[http]
{}
",
        listen_lines(listen),
        // Relative to this file.
        if with_socket { "unix_socket_dir = \".\"\n" } else { "" },
        authority(postgres_host, postgres_port),
        http_line(listen),
    ))
}

fn listen_lines(listen: SocketAddr) -> String {
    format!("listen_addr = \"{}\"\nlisten_port = {}", listen.ip(), listen.port())
}

/// HTTP listens 3000 ports above the proxy, as the default ports do, so that two devs do not use the same
/// port.
fn http_line(listen: SocketAddr) -> String {
    let port = listen.port().checked_add(HTTP_PORT_DISTANCE);
    port.map_or("listen = \"off\"".to_owned(), |port| format!("listen = \"127.0.0.1:{port}\""))
}

/// Replaces the addresses of proxy and HTTP in the file; what the user added stays.
fn with_listen(text: &str, listen: SocketAddr) -> SecretString {
    let mut section = "";
    let mut lines: Vec<String> = vec![listen_lines(listen)];
    for line in text.lines() {
        let key = line.split('=').next().unwrap_or_default().trim();
        if line.starts_with('[') {
            section = line.trim();
        }
        match (section, key) {
            ("", "listen_addr" | "listen_port") => {}
            ("[http]", "listen") => lines.push(http_line(listen)),
            _ => lines.push(line.to_owned()),
        }
    }
    SecretString::from(lines.join("\n") + "\n")
}

/// Finds a free port below those of outgoing connections, so that it is probably free at the next start too.
fn free_port() -> Result<u16, DevError> {
    let free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    (FIRST_PORT..=LAST_PORT).find(free).ok_or(DevError::NoPort)
}

fn io_error(path: &Path, source: io::Error) -> DevError {
    DevError::Io { path: path.to_path_buf(), source }
}

const LOCK: &str = "lock";
const SOCKETS: &str = "sockets";
const LOOPBACK: &str = "127.0.0.1";
const MASTER: &str = "master";
const CENTRAL_DATABASE: &str = "central";
const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 6432);
/// 9432 - 6432, the default ports.
const HTTP_PORT_DISTANCE: u16 = 3000;
/// Not 5432: the system's PostgreSQL uses it.
const FIRST_PORT: u16 = 5433;
const LAST_PORT: u16 = 5532;

#[cfg(test)]
mod tests {
    use super::*;

    fn first(listen: &str) -> SecretString {
        let host = Host::Unix("/d e/sockets".into());
        first_config(listen.parse().unwrap(), &host, 5440, &SecretString::from("s3cret"), true)
    }

    #[test]
    fn the_first_configuration_is_one_that_pglobby_reads() {
        let text = first("127.0.0.1:7000");
        let config = Config::read(text.expose_secret(), Some(Path::new("/d/proxy.toml")), &|_| None).unwrap();
        assert_eq!(config.listen, ["127.0.0.1:7000".parse().unwrap()]);
        assert_eq!(config.http_listen, Some("127.0.0.1:10000".parse().unwrap()));
        assert_eq!(config.unix_socket_dir, Some("/d/.".into()));
        assert_eq!(config.central.connection.get_hosts(), [Host::Unix("/d e/sockets".into())]);
        assert_eq!(config.central.connection.get_ports(), [5440]);
        assert_eq!(config.central.password.unwrap().expose_secret(), "s3cret");
        assert_eq!(config.keys_file, Some("/d/keyring.toml".into()));
    }

    #[test]
    fn another_address_replaces_the_old_one_and_keeps_what_the_user_added() {
        let first = first("127.0.0.1:6432");
        let edited = first.expose_secret().replace("listen_port", "default_pool_size = 3\nlisten_port");
        let moved = with_listen(&edited, "0.0.0.0:7432".parse().unwrap());
        let config = Config::read(moved.expose_secret(), None, &|_| None).unwrap();
        assert_eq!(config.listen, ["0.0.0.0:7432".parse().unwrap()]);
        assert_eq!(config.http_listen, Some("127.0.0.1:10432".parse().unwrap()));
        assert_eq!(config.pool.default_pool_size, 3);
    }

    #[test]
    fn one_dev_at_a_time_has_a_folder() {
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let path = folder.path().join("dev");
        let first = DataFolder::take(&path).unwrap();
        assert!(matches!(DataFolder::take(&path), Err(DevError::InUse(_))));
        drop(first);
        DataFolder::take(&path).unwrap();
    }

    #[test]
    fn a_folder_with_other_things_in_it_is_left_alone() {
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(folder.path().join("proxy.toml"), "precious").unwrap();
        assert!(matches!(DataFolder::take(folder.path()), Err(DevError::NotADevFolder(_))));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert_eq!(fs::metadata(folder.path()).unwrap().permissions().mode() & 0o777, 0o755);
    }

    #[test]
    fn the_configuration_is_kept_private_and_the_same() {
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let data = DataFolder::take(&folder.path().join("dev")).unwrap();
        let first = data.config(None).unwrap();
        let again = data.config(Some("127.0.0.1:7432".parse().unwrap())).unwrap();
        assert_eq!(fs::metadata(data.config_path()).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(
            first.central.password.unwrap().expose_secret(),
            again.central.password.as_ref().unwrap().expose_secret()
        );
        assert_eq!(again.listen, ["127.0.0.1:7432".parse().unwrap()]);

        fs::create_dir(data.postgres_data()).unwrap();
        fs::remove_file(data.config_path()).unwrap();
        assert!(matches!(data.config(None), Err(DevError::NoConfig(_))));
    }

    #[test]
    fn a_folder_that_was_moved_or_has_a_long_path_reaches_its_postgresql() {
        let folder = tempfile::tempdir_in("/tmp").unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (before, after) = (folder.path().join("before"), folder.path().join("after"));
        let data = DataFolder::take(&before).unwrap();
        let config = data.config(None).unwrap();
        let address = data.central(&config).unwrap().host_address();
        assert_eq!(address, before.join("sockets").display().to_string());
        drop(data);

        fs::rename(&before, &after).unwrap();
        let data = DataFolder::take(&after).unwrap();
        let config = data.config(None).unwrap();
        let config = data.reach_postgres_at(config, &data.postgres_host(), 5450).unwrap();
        let central = data.central(&config).unwrap();
        assert_eq!((central.host, central.port), (&Host::Unix(after.join("sockets")), 5450));

        let data = DataFolder::take(&folder.path().join("long".repeat(30))).unwrap();
        let config = data.config(None).unwrap();
        assert_eq!(data.central(&config).unwrap().host_address(), "127.0.0.1");
        assert_eq!(config.unix_socket_dir, None);
    }

    #[test]
    fn an_address_in_use_is_refused_by_name() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let error = must_be_free(address).unwrap_err().to_string();
        assert!(error.contains(&address.to_string()) && error.contains("--listen"), "{error}");
    }
}
