//! The data folder of `pglobby dev`, which one process uses at a time.
//!
//! ```text
//! DIR/proxy.toml     the configuration, 0600: it has the master login's password
//! DIR/keyring.toml   the sealing keys, 0600
//! DIR/postgres       PostgreSQL's data, 0700
//! DIR/postgres.log
//! DIR/lock
//! ```
//!
//! `proxy.toml` is written first: a first run that is interrupted leaves a password without a cluster, and
//! never a cluster without its password.

use std::{
    env,
    fs::{self, File, TryLockError},
    io::{self, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::config::Host;

use crate::{
    config::{Config, ConfigError},
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
        "{0:?} does not name a central database on 127.0.0.1 with a password; restore that, or remove \
         the folder to start again"
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
                    free_port()?,
                    &generate_password(),
                ))?;
            }
            Err(source) => return Err(io_error(&path, source)),
        }
        let text = fs::read_to_string(&path).map_err(|source| io_error(&path, source))?;
        // Without the environment: dev must not use a PGLOBBY_CENTRAL_URL of another installation.
        Ok(Config::read(&text, Some(&path), &|_| None)?)
    }

    /// Starts the folder's PostgreSQL, and creates it in the first run. If its port is in use, it gets
    /// another one; the configuration that is returned has it. Blocks.
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
            cluster.init(MASTER, self.central(&config)?.1, &[])?;
        }
        loop {
            let (port, _) = self.central(&config)?;
            let port = port.to_string();
            let started = cluster.start(&[
                ("listen_addresses", "127.0.0.1"),
                ("port", &port),
                // TCP only: the path of a socket in this folder may be too long.
                ("unix_socket_directories", ""),
                ("max_connections", "200"),
                ("shared_buffers", "64MB"),
            ]);
            match started {
                Err(ClusterError::DidNotStart { reason, .. })
                    if reason.contains("Address already in use") =>
                {
                    // Ends with NoPort at the latest: each round tries another port.
                    config = self.move_postgres(&config)?;
                }
                started => return Ok((started?, config)),
            }
        }
    }

    fn move_postgres(&self, config: &Config) -> Result<Config, DevError> {
        let (old, _) = self.central(config)?;
        let new = free_port()?;
        let path = self.config_path();
        let text = fs::read_to_string(&path).map_err(|source| io_error(&path, source))?;
        let moved = text.replace(&format!("@127.0.0.1:{old}/"), &format!("@127.0.0.1:{new}/"));
        self.write_config(&SecretString::from(moved))?;
        self.config(None)
    }

    /// Returns port and master password of the folder's PostgreSQL.
    pub fn central<'a>(&self, config: &'a Config) -> Result<(u16, &'a SecretString), DevError> {
        let central = &config.central;
        let local = matches!(central.connection.get_hosts(), [Host::Tcp(name)] if name == "127.0.0.1");
        match (central.connection.get_ports(), &central.password) {
            ([port], Some(password)) if local => Ok((*port, password)),
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

fn first_config(listen: SocketAddr, postgres_port: u16, password: &SecretString) -> SecretString {
    let password = password.expose_secret();
    SecretString::from(format!(
        "# `pglobby dev` wrote this file and reads it at each start.
{}

[central]
url = \"postgres://{MASTER}:{password}@127.0.0.1:{postgres_port}/{CENTRAL_DATABASE}\"

[keys]
file = \"keyring.toml\"

[http]
{}
",
        listen_lines(listen),
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

    #[test]
    fn the_first_configuration_is_one_that_pglobby_reads() {
        let text = first_config("127.0.0.1:7000".parse().unwrap(), 5440, &SecretString::from("s3cret"));
        let config = Config::read(text.expose_secret(), Some(Path::new("/d/proxy.toml")), &|_| None).unwrap();
        assert_eq!(config.listen, ["127.0.0.1:7000".parse().unwrap()]);
        assert_eq!(config.http_listen, Some("127.0.0.1:10000".parse().unwrap()));
        assert_eq!(config.central.connection.get_ports(), [5440]);
        assert_eq!(config.central.password.unwrap().expose_secret(), "s3cret");
        assert_eq!(config.keys_file, Some("/d/keyring.toml".into()));
    }

    #[test]
    fn another_address_replaces_the_old_one_and_keeps_what_the_user_added() {
        let first = first_config("127.0.0.1:6432".parse().unwrap(), 5440, &SecretString::from("s3cret"));
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
    fn an_address_in_use_is_refused_by_name() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let error = must_be_free(address).unwrap_err().to_string();
        assert!(error.contains(&address.to_string()) && error.contains("--listen"), "{error}");
    }
}
