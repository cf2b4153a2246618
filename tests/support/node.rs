//! A node: a process that serves. A [`Proxy`] is the first one; others serve the tenants of its central database.

use std::{
    fs,
    path::Path,
    process::{Child, ExitStatus},
};

use rustix::process::{Pid, Signal};
use tempfile::TempDir;
use tokio_postgres::Config;

use super::{
    client::{Client, in_time, tail_of},
    ports::ReservedPort,
    proxy::{
        Caller, LOG, LOOK_AGAIN, Proxy, login_of, password_of, spawn_ready, spawn_ready_with, wait_for_log,
    },
};

/// A node that serves. It ends with the test, and before the proxy that it is beside.
pub struct Node {
    /// `None` after it was stopped.
    pub(super) process: Option<Child>,
    pub(super) folder: TempDir,
    pub(super) port: ReservedPort,
    pub(super) http: ReservedPort,
    pub(super) environment: Vec<(String, String)>,
}

impl Node {
    /// The configuration of `proxy`, with other ports and with these keys of proxy.toml (dotted for a key in a section).
    pub async fn beside(proxy: &Proxy, keys: &[(&str, &str)]) -> Self {
        let (port, http) = (ReservedPort::take(), ReservedPort::take());
        let folder = tempfile::Builder::new().prefix("pgl").tempdir_in("/tmp").unwrap();
        let (listen_port, listen) = (port.number.to_string(), format!("\"127.0.0.1:{}\"", http.number));
        let own = [("listen_port", listen_port.as_str()), ("http.listen", listen.as_str())];
        let own = own.iter().filter(|(key, _)| keys.iter().all(|(given, _)| given != key));
        let all: Vec<_> = own.chain(keys).collect();
        let text = fs::read_to_string(proxy.config_file()).unwrap();
        let is_kept = |line: &&str| !all.iter().any(|(key, _)| line.starts_with(&format!("{key} = ")));
        let kept = text.lines().filter(is_kept).map(str::to_owned);
        let lines: Vec<String> =
            kept.chain(all.iter().map(|(key, value)| format!("{key} = {value}"))).collect();
        fs::write(folder.path().join("proxy.toml"), lines.join("\n") + "\n").unwrap();
        let process = spawn_ready(folder.path(), &[]).await;
        Self { process: Some(process), folder, port, http, environment: Vec::new() }
    }

    /// A client of `tenant` that has not connected yet.
    pub fn client(&self, tenant: &str) -> Caller {
        self.caller(&login_of(tenant), &password_of(tenant), tenant)
    }

    /// Anybody who says they are `login` and asks for `database`.
    pub fn caller(&self, login: &str, password: &str, database: &str) -> Caller {
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.port.number).dbname(database);
        config.user(login).password(password);
        Caller { config }
    }

    /// Its console, for the administrator that [`Proxy::console`] has made.
    pub async fn console(&self) -> Client {
        self.caller("console_admin", "console secret", "pglobby").connect().await
    }

    /// Its files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn port(&self) -> u16 {
        self.port.number
    }

    pub fn http_port(&self) -> u16 {
        self.http.number
    }

    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("running").id()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.pid()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Sends `signal` and waits for the end.
    pub async fn stop_with(&mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.ended().await
    }

    /// Waits until the process has ended by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        let mut process = self.process.take().expect("running");
        let waiting = tokio::task::spawn_blocking(move || process.wait());
        in_time("the node's end", waiting).await.unwrap().unwrap()
    }

    pub fn kill_9(&mut self) {
        let mut process = self.process.take().expect("running");
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// After an end: the same configuration, the same ports.
    pub async fn start_again(&mut self) {
        assert!(self.process.is_none(), "still running");
        self.process = Some(spawn_ready(self.folder.path(), &self.environment).await);
    }

    /// Starts another process that takes over from this one, which is returned and ends by itself.
    pub async fn take_over(&mut self) -> Replaced {
        let new = spawn_ready_with(self.folder.path(), &self.environment, &["--take-over"]).await;
        Replaced(self.process.replace(new).expect("running"))
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join(LOG)).unwrap()
    }

    /// Waits until the node has logged `text`.
    pub async fn logged(&self, text: &str) {
        wait_for_log(self.folder.path(), text).await;
    }
}

/// A process from which another one has taken over.
pub struct Replaced(Child);

impl Replaced {
    /// Waits until the process has ended by itself.
    pub async fn ended(mut self) -> ExitStatus {
        let ended = async {
            loop {
                if let Some(status) = self.0.try_wait().unwrap() {
                    return status;
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        in_time("the end of the process before", ended).await
    }

    pub fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Replaced {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
        if std::thread::panicking() {
            let log = tail_of(&self.folder.path().join(LOG));
            eprintln!("--- pglobby's log, port {} ---\n{log}", self.port.number);
        }
    }
}
