//! What `pglobby dev` keeps between two runs, and that only one of them uses it at a time.
//!
//! ```text
//! DIR/proxy.toml     the configuration; the master login's password stands in it, so 0600
//! DIR/keyring.toml   the sealing keys, 0600
//! DIR/postgres       PostgreSQL's data, its user's alone
//! DIR/postgres.log
//! DIR/lock
//! ```
//!
//! `proxy.toml` comes first: an interrupted first run has at most a password for a cluster that is not there yet.

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

/// A data folder that is ours while this lives.
#[derive(Debug)]
pub struct DataFolder {
    path: PathBuf,
    _lock: File,
}

/// Why dev does not start. `Display` is one line that ends in what to do.
#[derive(Debug, thiserror::Error)]
pub enum DevError {
    /// Another dev has the folder.
    #[error("another pglobby dev runs on {0:?}; stop it, or choose another --data-dir")]
    InUse(PathBuf),
    /// Something else lies there.
    #[error("{0:?} is not empty and was not made by pglobby dev; choose a new folder with --data-dir")]
    NotADevFolder(PathBuf),
    /// Somebody listens where the proxy would.
    #[error("{address} is taken ({source}); choose another with --listen")]
    ListenTaken {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The cluster is there and its password is not.
    #[error(
        "{0:?} has a PostgreSQL but no proxy.toml, which held its password; put it back, or remove the folder to begin anew"
    )]
    NoConfig(PathBuf),
    /// Somebody edited `proxy.toml` so that it is no dev's any more.
    #[error(
        "{0:?} does not name a central database on 127.0.0.1 with a password; remove the folder to begin anew"
    )]
    NotOurs(PathBuf),
    /// No port left for PostgreSQL.
    #[error("no port between {FIRST_PORT} and {LAST_PORT} is free on 127.0.0.1 for PostgreSQL")]
    NoPort,
    /// See [`ConfigError`].
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
    /// A file of ours.
    #[error("{path:?}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl DataFolder {
    /// Where dev keeps its data if it is not told: root's in `/var/lib`, since PostgreSQL's user may not pass through
    /// root's home; other users' under their own.
    pub fn default_path() -> PathBuf {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if rustix::process::geteuid().is_root() {
            return "/var/lib/pglobby-dev".into();
        }
        let data = set("XDG_DATA_HOME").or_else(|| Some(set("HOME")?.join(".local/share")));
        data.map_or_else(|| env::temp_dir().join("pglobby-dev"), |data| data.join("pglobby/dev"))
    }

    /// Takes the folder, made if need be, for this process alone.
    pub fn take(path: &Path) -> Result<Self, DevError> {
        let path = std::path::absolute(path).map_err(|source| io_error(path, source))?;
        let owner = ClusterOwner::current()?;
        let there_already = path.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("/"));
        owner.may_enter(there_already)?;
        if there_already == path {
            refuse_a_strangers_folder(&path)?;
        } else {
            // PostgreSQL's user passes through, and sees only what is its own.
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

    /// The configuration, written at the first run and read at later ones; `listen` replaces what it says of the
    /// proxy's address.
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
        // Not the environment: a PGLOBBY_CENTRAL_URL meant for a real installation must not lead dev there.
        Ok(Config::read(&text, Some(&path), &|_| None)?)
    }

    /// Starts this folder's PostgreSQL, made at the first run. Where its port was taken meanwhile it moves to another,
    /// and so does the configuration that is returned with it. Blocks.
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
                // By TCP alone: a socket's path may be too long here, and passwords are asked for everywhere.
                ("unix_socket_directories", ""),
                ("max_connections", "200"),
                ("shared_buffers", "64MB"),
            ]);
            match started {
                Err(ClusterError::DidNotStart { reason, .. })
                    if reason.contains("Address already in use") =>
                {
                    // Ends when no port is left; each round is a port that somebody else has.
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

    /// Port and master password of this folder's own PostgreSQL.
    ///
    /// # Errors
    /// [`DevError::NotOurs`].
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

    /// Written beside and renamed: a reader sees the old one or the new one.
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

/// Refuses an address on which somebody listens, before anything was started.
///
/// # Errors
/// [`DevError::ListenTaken`].
pub fn must_be_free(address: SocketAddr) -> Result<(), DevError> {
    // Bound as an ordinary program binds: with SO_REUSEPORT we would join another pglobby unnoticed.
    TcpListener::bind(address).map(drop).map_err(|source| DevError::ListenTaken { address, source })
}

/// Our lock, or nothing at all: another folder's proxy.toml is not ours to rewrite.
fn refuse_a_strangers_folder(path: &Path) -> Result<(), DevError> {
    let mut entries = fs::read_dir(path).map_err(|source| io_error(path, source))?;
    match path.join(LOCK).exists() || entries.next().is_none() {
        true => Ok(()),
        false => Err(DevError::NotADevFolder(path.to_path_buf())),
    }
}

fn first_config(listen: SocketAddr, postgres_port: u16, password: &SecretString) -> SecretString {
    let password = password.expose_secret();
    SecretString::from(format!(
        "# Made by `pglobby dev`, which reads it at each start. The passwords below are this machine's alone.
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

/// As far from the proxy's port as the defaults are from each other, so that two devs do not meet.
fn http_line(listen: SocketAddr) -> String {
    let port = listen.port().checked_add(HTTP_PORT_DISTANCE);
    port.map_or("listen = \"off\"".to_owned(), |port| format!("listen = \"127.0.0.1:{port}\""))
}

/// The same file with another address for the proxy, and HTTP moved along; what the user added stays.
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

/// Below the ports that outgoing connections are given, so that it is still free at the next start.
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
/// 9432 - 6432.
const HTTP_PORT_DISTANCE: u16 = 3000;
/// 5432 is left to the system's own PostgreSQL.
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
