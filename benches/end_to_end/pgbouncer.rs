//! PgBouncer in the foreground, as the user that PostgreSQL runs as: the distribution's, and one given by its path.

use std::{
    fs,
    net::{Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use pglobby::local_postgres::os_user::ClusterOwner;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::support::ports::ReservedPort;

/// A program that can be started.
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    /// `PgBouncer 1.25.0`.
    pub version: String,
}

impl Program {
    /// The distribution's, if it is installed.
    pub fn of_distribution() -> Option<Self> {
        let path = PROGRAMS.into_iter().map(PathBuf::from).find(|path| path.exists())?;
        Some(Self::at(&path).unwrap_or_else(|error| panic!("{error}")))
    }

    /// The error says what is wrong with it.
    pub fn at(path: &Path) -> Result<Self, String> {
        let wrong = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let path = fs::canonicalize(path).map_err(|error| wrong(&error))?;
        let owner = ClusterOwner::current().map_err(|error| wrong(&error))?;
        owner
            .may_enter(path.parent().unwrap_or(Path::new("/")))
            .map_err(|_| wrong(&"the user that PostgreSQL runs as may not pass through to it"))?;
        let output = Command::new(&path).arg("--version").output().map_err(|error| wrong(&error))?;
        let words = String::from_utf8_lossy(&output.stdout);
        let version = words.lines().next().filter(|line| line.starts_with("PgBouncer "));
        let version = version.ok_or_else(|| wrong(&"is no PgBouncer"))?.to_owned();
        Ok(Self { path, version })
    }

    /// To compare with another one's.
    pub fn version_number(&self) -> Vec<u32> {
        let number = self.version.trim_start_matches("PgBouncer ");
        number.split('.').map_while(|part| part.parse().ok()).collect()
    }
}

/// Running; ends with this.
pub struct PgBouncer {
    process: Child,
    folder: TempDir,
    port: ReservedPort,
}

/// Usual places: a package installs it where an ordinary user's PATH may not lead.
const PROGRAMS: [&str; 3] = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/usr/local/bin/pgbouncer"];

impl PgBouncer {
    /// `databases` and `settings` are lines of its configuration, `users` its userlist; `certificate` is a
    /// certificate and its key in PEM.
    pub fn start(
        program: &Program,
        databases: &str,
        users: &str,
        settings: &str,
        certificate: &(String, String),
    ) -> Self {
        let folder = tempfile::Builder::new().prefix("pgb").tempdir_in("/tmp").unwrap();
        let port = ReservedPort::take();
        let at = folder.path();
        let ini = format!(
            "[databases]\n{databases}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {}\nunix_socket_dir = {at}\n\
             auth_type = scram-sha-256\nauth_file = {at}/users\n\
             client_tls_sslmode = allow\nclient_tls_cert_file = {at}/server.crt\nclient_tls_key_file = {at}/server.key\n\
             {settings}\n",
            port.number,
            at = at.display(),
        );
        let owner = ClusterOwner::current().unwrap();
        for (name, text) in [
            ("ini", &ini),
            ("users", &users.to_owned()),
            ("server.crt", &certificate.0),
            ("server.key", &certificate.1),
        ] {
            fs::write(at.join(name), text).unwrap();
            owner.give(&at.join(name)).unwrap();
        }
        owner.give(at).unwrap();
        let process = spawn(program, at, &owner);
        let running = Self { process, folder, port };
        running.wait_until_it_listens();
        running
    }

    pub fn port(&self) -> u16 {
        self.port.number
    }

    /// Of its Unix socket.
    pub fn socket_folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    fn wait_until_it_listens(&self) {
        let begun = Instant::now();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, self.port())).is_err() {
            let log = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            assert!(begun.elapsed() < Duration::from_secs(10), "PgBouncer does not listen:\n{log}");
            std::thread::sleep(Duration::from_millis(20)); // Nothing tells when it does.
        }
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(i32::try_from(self.pid()).unwrap()) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.process.wait();
    }
}

fn spawn(program: &Program, folder: &Path, owner: &ClusterOwner) -> Child {
    let log = fs::File::create(folder.join("log")).unwrap();
    let mut command = Command::new(&program.path);
    command.arg(folder.join("ini")).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    owner.run_as(&mut command).spawn().unwrap()
}
