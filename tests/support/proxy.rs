//! The real proxy, as an operator runs it: the `pglobby` program, a `proxy.toml`, tenants and logins made by its own
//! commands, a PostgreSQL underneath.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    ops::{Deref, DerefMut},
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};
use serde_json::Value;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_postgres::Config;

use super::{
    client::{Client, PATIENCE, in_time, tail_of},
    cluster::Cluster,
    node::Node,
    ports::ReservedPort,
    wire::Wire,
};

/// A proxy that serves, with its PostgreSQL. Both end with the test.
pub struct Proxy {
    node: Node,
    pub cluster: Cluster,
}

/// A proxy is used like any other node.
impl Deref for Proxy {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}

impl DerefMut for Proxy {
    fn deref_mut(&mut self) -> &mut Node {
        &mut self.node
    }
}

/// What the proxy is to be like.
pub struct Builder {
    cluster: Option<Cluster>,
    tenants: Vec<String>,
    /// Dotted TOML keys and their values as TOML.
    config: BTreeMap<String, String>,
    environment: Vec<(String, String)>,
}

impl Proxy {
    /// One tenant, and for it the login `<name>_user` with the password [`password_of`].
    pub fn with_tenant(name: &str) -> Builder {
        Self::build().and_tenant(name)
    }

    pub fn build() -> Builder {
        Builder { cluster: None, tenants: Vec::new(), config: BTreeMap::new(), environment: Vec::new() }
    }

    pub fn config_file(&self) -> PathBuf {
        self.node.folder.path().join("proxy.toml")
    }

    /// The tenant's URL, as an application is given it.
    pub fn url(&self, tenant: &str) -> String {
        let (login, password) = (login_of(tenant), password_of(tenant));
        format!("postgres://{login}:{password}@127.0.0.1:{}/{tenant}", self.port())
    }

    /// A logged-in connection on which every byte is ours to choose.
    pub async fn wire(&self, tenant: &str) -> Wire {
        Wire::login(self.port(), &login_of(tenant), &password_of(tenant), tenant).await
    }

    /// The superuser in the tenant's real database, past the proxy.
    pub async fn behind(&self, tenant: &str) -> Client {
        let database =
            self.json(&["tenant", "show", tenant, "--json"])["database"].as_str().unwrap().to_owned();
        self.cluster.client(&database).await
    }

    /// Runs `pglobby ARGUMENTS --config …`, `stdin` given to it.
    pub fn command_with(&self, arguments: &[&str], stdin: &str) -> Output {
        run_command(&self.config_file(), &self.node.environment, arguments, stdin)
    }

    /// Runs `pglobby ARGUMENTS --config …`, which must succeed; what it printed.
    pub fn command(&self, arguments: &[&str]) -> String {
        succeeded(arguments, &self.command_with(arguments, ""))
    }

    /// Runs a command that prints JSON.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let printed = self.command(arguments);
        serde_json::from_str(&printed)
            .unwrap_or_else(|error| panic!("{arguments:?} printed {printed}: {error}"))
    }

    /// Registers a cluster as a host, with its superuser.
    pub fn add_host(&self, name: &str, cluster: &Cluster) {
        self.add_host_at(name, cluster.port());
    }

    /// The same, for a cluster that is reached by this port.
    pub fn add_host_at(&self, name: &str, port: u16) {
        let (port, master) = (port.to_string(), super::cluster::MASTER);
        let arguments = [
            "host",
            "add",
            name,
            "--address",
            "127.0.0.1",
            "--port",
            &port,
            "--admin-user",
            master,
            "--password-stdin",
        ];
        succeeded(&arguments, &self.command_with(&arguments, super::cluster::MASTER_PASSWORD));
    }

    pub fn create_tenant(&self, name: &str) {
        create_tenant(&self.config_file(), &self.node.environment, name);
    }

    /// `pglobby login create NAME OPTIONS…`, with this password.
    pub fn create_login(&self, name: &str, password: &str, options: &[&str]) {
        create_login(&self.config_file(), &self.node.environment, name, password, options);
    }

    /// An administrator's console.
    pub async fn console(&self) -> Client {
        let exists = self.command(&["login", "list", "--json"]).contains("\"console_admin\"");
        if !exists {
            self.create_login("console_admin", "console secret", &["--admin"]);
        }
        self.caller("console_admin", "console secret", "pglobby").connect().await
    }

    /// The body of `GET path` on the HTTP port, and its status.
    pub async fn http_get(&self, path: &str) -> (u16, String) {
        in_time(path, http_get(self.http_port(), path))
            .await
            .unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// The value of a metric, its labels included in `name`, as `pglobby_pools{tenant="acme"}`.
    pub async fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.http_get("/metrics").await;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
    }

    /// The same, where the start waits for something: `then` is done once `waiting` is logged.
    pub async fn start_while(&mut self, then: impl FnOnce(&mut Cluster), waiting: &str) {
        assert!(self.node.process.is_none(), "still running");
        let (folder, environment) = (self.node.folder.path().to_owned(), self.node.environment.clone());
        let here = tokio::runtime::Handle::current();
        let starting = move || here.block_on(spawn_ready(&folder, &environment));
        let started = tokio::task::spawn_blocking(starting);
        self.logged(waiting).await;
        then(&mut self.cluster);
        self.node.process = Some(started.await.unwrap());
    }

    /// Rewrites a key of proxy.toml (a value as TOML writes it). Takes effect at the next HUP or start.
    pub fn set_config(&self, key: &str, value: &str) {
        let text = fs::read_to_string(self.config_file()).unwrap();
        let start = format!("{key} = ");
        let kept = text.lines().filter(|line| !line.starts_with(&start));
        let text: Vec<String> = kept.map(str::to_owned).chain([format!("{key} = {value}")]).collect();
        fs::write(self.config_file(), text.join("\n") + "\n").unwrap();
    }
}

impl Builder {
    pub fn and_tenant(mut self, name: &str) -> Self {
        self.tenants.push(name.to_owned());
        self
    }

    pub fn pool_size(self, servers: u32) -> Self {
        self.config("default_pool_size", &servers.to_string())
    }

    /// `transaction` or `session`.
    pub fn pool_mode(self, mode: &str) -> Self {
        self.config("pool_mode", &format!("{mode:?}"))
    }

    /// A key of proxy.toml (`log.level` for a key in a section) and its value as TOML writes it (`"\"2s\""`).
    pub fn config(mut self, key: &str, value: &str) -> Self {
        self.config.insert(key.to_owned(), value.to_owned());
        self
    }

    /// For the proxy and the commands.
    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Instead of a plain cluster of the machine's version.
    pub fn cluster(mut self, cluster: Cluster) -> Self {
        self.cluster = Some(cluster);
        self
    }

    /// Makes the central database, the tenants and logins, starts the proxy and waits until it serves.
    pub async fn start(self) -> Proxy {
        let cluster = self.cluster.unwrap_or_else(Cluster::start);
        let (port, http) = (ReservedPort::take(), ReservedPort::take());
        let folder = tempfile::Builder::new().prefix("pgl").tempdir_in("/tmp").unwrap();
        let file = folder.path().join("proxy.toml");
        let mut config = BTreeMap::from([
            // So that sessions move from one to another, however many cores there are.
            ("worker_threads".to_owned(), "2".to_owned()),
            // Tests get many passwords wrong on purpose, all from one address.
            ("failed_logins_free".to_owned(), "1000000".to_owned()),
            ("listen_addr".to_owned(), "\"127.0.0.1\"".to_owned()),
            ("listen_port".to_owned(), port.number.to_string()),
            ("http.listen".to_owned(), format!("\"127.0.0.1:{}\"", http.number)),
            ("central.url".to_owned(), format!("{:?}", cluster.url("central"))),
            ("keys.file".to_owned(), format!("{:?}", folder.path().join("keyring.toml"))),
        ]);
        config.extend(self.config);
        let lines: Vec<String> = config.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
        fs::write(&file, lines.concat()).unwrap();

        let environment = self.environment;
        succeeded(&["init"], &run_command(&file, &environment, &["init"], ""));
        for tenant in &self.tenants {
            create_tenant(&file, &environment, tenant);
            create_login(&file, &environment, &login_of(tenant), &password_of(tenant), &["--tenant", tenant]);
        }
        let process = spawn_ready(folder.path(), &environment).await;
        let node = Node { process: Some(process), folder, port, http, environment };
        Proxy { node, cluster }
    }
}

/// A login that may connect. Each method opens a connection of its own.
#[derive(Clone)]
pub struct Caller {
    pub config: Config,
}

impl Caller {
    pub async fn connect(&self) -> Client {
        self.try_connect().await.unwrap_or_else(|error| panic!("{}", super::client::in_words(&error)))
    }

    pub async fn try_connect(&self) -> Result<Client, tokio_postgres::Error> {
        Client::connect(&self.config).await
    }

    /// `options` of the startup message, such as `-c search_path=shop`.
    pub fn options(mut self, options: &str) -> Self {
        self.config.options(options);
        self
    }

    /// Connects, asks, leaves.
    pub async fn ask(&self, sql: &str) -> String {
        let client = self.connect().await;
        let answer = client.ask(sql).await;
        client.leave().await;
        answer
    }

    /// The SQLSTATE with which the connection is refused.
    pub async fn refusal(&self) -> String {
        match self.try_connect().await {
            Ok(_) => panic!("the connection was not refused"),
            Err(error) => super::client::sqlstate(&error),
        }
    }

    /// Connects and runs `sql`; what then becomes of the client is said next.
    pub fn run(&self, sql: &str) -> Running {
        Running { caller: self.clone(), sql: sql.to_owned() }
    }
}

/// What a client did before its end.
pub struct Running {
    caller: Caller,
    sql: String,
}

impl Running {
    /// Cuts the connection without a word.
    pub async fn then_vanish(self) {
        let client = self.caller.connect().await;
        client.run(&self.sql).await;
        client.vanish().await;
    }

    /// Says goodbye.
    pub async fn then_leave(self) {
        let client = self.caller.connect().await;
        client.run(&self.sql).await;
        client.leave().await;
    }
}

/// The login that [`Proxy::with_tenant`] makes.
pub fn login_of(tenant: &str) -> String {
    format!("{tenant}_user")
}

pub fn password_of(tenant: &str) -> String {
    format!("{tenant}-secret")
}

/// `pglobby`, without the configuration of the user that runs the tests.
pub fn pglobby() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pglobby"));
    for (name, _) in
        std::env::vars().filter(|(name, _)| name.starts_with("PGLOBBY_") || name.starts_with("PG"))
    {
        command.env_remove(name);
    }
    command.env_remove("NOTIFY_SOCKET");
    command
}

fn run_command(config: &Path, environment: &[(String, String)], arguments: &[&str], stdin: &str) -> Output {
    let mut command = pglobby();
    command.args(arguments).arg("--config").arg(config).envs(environment.iter().cloned());
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("pglobby runs");
    // A command that reads nothing may have ended before we write.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

fn succeeded(arguments: &[&str], output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "pglobby {arguments:?}: {}\n{err}{out}", output.status);
    out.into_owned()
}

fn create_tenant(config: &Path, environment: &[(String, String)], name: &str) {
    let arguments = ["tenant", "create", name, "--json"];
    succeeded(&arguments, &run_command(config, environment, &arguments, ""));
}

fn create_login(
    config: &Path,
    environment: &[(String, String)],
    name: &str,
    password: &str,
    options: &[&str],
) {
    let mut arguments = vec!["login", "create", name, "--password-stdin", "--json"];
    arguments.extend(options);
    let output = run_command(config, environment, &arguments, &format!("{password}\n"));
    succeeded(&arguments, &output);
}

/// Starts `pglobby serve` and waits for the word it has for service managers: READY=1 on NOTIFY_SOCKET.
pub(super) async fn spawn_ready(folder: &Path, environment: &[(String, String)]) -> Child {
    spawn_ready_with(folder, environment, &[]).await
}

/// The same with options of `serve`.
pub(super) async fn spawn_ready_with(
    folder: &Path,
    environment: &[(String, String)],
    options: &[&str],
) -> Child {
    let socket = folder.join("notify");
    let _ = fs::remove_file(&socket);
    let notifications = UnixDatagram::bind(&socket).unwrap();
    notifications.set_read_timeout(Some(LOOK_AGAIN)).unwrap();
    let log = fs::OpenOptions::new().create(true).append(true).open(folder.join(LOG)).unwrap();
    let mut child = pglobby()
        .args(["serve", "--config"])
        .arg(folder.join("proxy.toml"))
        .args(options)
        .env("NOTIFY_SOCKET", &socket)
        .envs(environment.iter().cloned())
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("pglobby runs");
    let begun = Instant::now();
    let mut word = [0; 4096];
    loop {
        if let Ok(length) = notifications.recv(&mut word)
            && word[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1")
        {
            return child;
        }
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "pglobby serve ended: {ended:?}\n{}", tail_of(&folder.join(LOG)));
        assert!(begun.elapsed() < PATIENCE, "pglobby serve is not ready\n{}", tail_of(&folder.join(LOG)));
    }
}

/// HTTP/1.1 in ten lines: no client library is worth its dependencies here.
async fn http_get(port: u16, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(std::io::ErrorKind::InvalidData)?;
    let status =
        head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or(std::io::ErrorKind::InvalidData)?;
    Ok((status, body.to_owned()))
}

/// Waits until the proxy whose files are in `folder` has logged `text`.
pub(super) async fn wait_for_log(folder: &Path, text: &str) {
    let log = || fs::read_to_string(folder.join(LOG)).unwrap();
    let begun = Instant::now();
    while !log().contains(text) {
        assert!(begun.elapsed() < PATIENCE, "never logged: {text}\n{}", log());
        tokio::time::sleep(LOOK_AGAIN).await; // A file does not wake its reader.
    }
}

pub(super) const LOG: &str = "pglobby.log";
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(20);
