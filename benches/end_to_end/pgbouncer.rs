//! PgBouncer as Debian packages it, in the foreground, as the user that PostgreSQL runs as.

use std::{
    fs,
    net::{Ipv4Addr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use pglobby::local_postgres::os_user::ClusterOwner;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::support::ports::ReservedPort;

/// Running; ends with this.
pub struct PgBouncer {
    process: Child,
    folder: TempDir,
    port: ReservedPort,
}

/// Usual places: a package installs it where an ordinary user's PATH may not lead.
const PROGRAMS: [&str; 3] = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/usr/local/bin/pgbouncer"];

impl PgBouncer {
    pub fn version() -> String {
        let output = Command::new(program()).arg("--version").output().unwrap();
        String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().to_owned()
    }

    /// `databases` and `settings` are lines of its configuration, `users` its userlist; `certificate` is a
    /// certificate and its key in PEM.
    pub fn start(databases: &str, users: &str, settings: &str, certificate: &(String, String)) -> Self {
        let folder = tempfile::Builder::new().prefix("pgb").tempdir_in("/tmp").unwrap();
        let port = ReservedPort::take();
        let at = folder.path();
        let ini = format!(
            "[databases]\n{databases}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {}\nunix_socket_dir =\n\
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
        let process = spawn(at, &owner);
        let running = Self { process, folder, port };
        running.wait_until_it_listens();
        running
    }

    pub fn port(&self) -> u16 {
        self.port.number
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

fn program() -> &'static str {
    PROGRAMS
        .into_iter()
        .find(|path| Path::new(path).exists())
        .expect("PgBouncer is missing: run scripts/bench, which installs it")
}

fn spawn(folder: &Path, owner: &ClusterOwner) -> Child {
    let log = fs::File::create(folder.join("log")).unwrap();
    let mut command = Command::new(program());
    command.arg(folder.join("ini")).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    owner.run_as(&mut command).spawn().unwrap()
}
