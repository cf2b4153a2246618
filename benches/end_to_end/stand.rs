//! PostgreSQL, PgBouncer (one or two versions) and pglobby on this machine, with equal settings.
//!
//! Loopback TCP, transaction pooling, 20 servers for each tenant, SCRAM-SHA-256 towards clients (from a stored verifier)
//! and towards servers, no TLS to servers, TLS offered to clients with the same certificate, no log lines for
//! connections. All else is each program's default, pglobby's worker threads among them, where a scenario's
//! [`Layout`] says nothing else. Clients have the login of an employee, as most applications do: it belongs to one
//! tenant. Durability of PostgreSQL is off.

use std::{fmt::Write as _, fs, path::PathBuf};

use pglobby::{
    config::Config,
    control_path::secrets::{keyring::Keyring, scram_verifier::scram_verifier, seal::SecretLocation},
    local_postgres::binaries::PostgresBinaries,
};
use secrecy::{ExposeSecret as _, SecretString};
use tempfile::TempDir;

use crate::{
    pgbouncer::{PgBouncer, Program},
    support::{Cluster, Proxy, certificates::Authority},
};

/// Of everybody, everywhere.
const PASSWORD: &str = "bench-secret";
/// The login that may enter every tenant.
const SERVICE: &str = "service";
/// Has pgbench's tables.
pub const DATABASE: &str = "bench";
const SCALE: &str = "10";
const LOOPBACK: &str = "127.0.0.1";

/// What stands between client and PostgreSQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pooler {
    Direct,
    /// The distribution's.
    PgBouncer,
    /// The one given by its path.
    GivenPgBouncer,
    Pglobby,
}

impl Pooler {
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::PgBouncer => "PgBouncer",
            Self::GivenPgBouncer => "PgBouncer, given",
            Self::Pglobby => "pglobby",
        }
    }
}

/// Where a client connects, and as whom.
#[derive(Debug, Clone)]
pub struct Target {
    pooler: Pooler,
    /// A name, or the folder of a Unix socket.
    pub host: String,
    pub port: u16,
    /// Of the pooler.
    pub pid: Option<u32>,
    pub user: String,
    pub password: String,
    pub database: String,
}

impl Target {
    /// The same, at another tenant.
    pub fn at(&self, database: &str) -> Self {
        let user = match self.pooler {
            Pooler::Direct => owner_of(database),
            _ => employee_of(database),
        };
        Self { database: database.to_owned(), user, ..self.clone() }
    }

    /// The same, with the login that may enter every tenant.
    pub fn as_service(&self) -> Self {
        match self.pooler {
            Pooler::Direct => self.clone(),
            _ => Self { user: SERVICE.to_owned(), ..self.clone() },
        }
    }
}

fn employee_of(database: &str) -> String {
    format!("{database}_employee")
}

fn owner_of(database: &str) -> String {
    format!("{database}_owner")
}

/// What differs between scenarios in how the poolers are set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    Usual,
    /// pglobby has one worker thread: tenants of one node share it, however many cores the machine has.
    OneWorker,
    /// pglobby has two.
    TwoWorkers,
    /// Servers are reached through their Unix socket.
    UnixServers,
    /// Servers and poolers are.
    UnixEverywhere,
    /// Servers and pools that nobody uses are gone within a few seconds.
    ShortPools,
}

pub struct Stand {
    proxy: Proxy,
    pgbouncers: Vec<Column>,
    binaries: PostgresBinaries,
    pub authority: Authority,
    certificate: (String, String),
    layout: Layout,
    /// One for each database.
    tenants: Vec<String>,
    /// Of every role and of the line in PgBouncer's user list: PgBouncer 1.18 logs in to servers with the keys that its
    /// client has proved, which fit no other salt.
    verifier: String,
    /// Has the certificate, and pglobby's Unix socket.
    folder: TempDir,
}

/// A PgBouncer, and its place in the table.
struct Column {
    pooler: Pooler,
    program: Program,
    /// `None` only while it is started anew.
    running: Option<PgBouncer>,
}

impl Stand {
    /// With the distribution's PgBouncer, if there is one, and with `given`.
    pub async fn start(given: Option<Program>) -> Self {
        let distribution = Program::of_distribution().map(|program| (Pooler::PgBouncer, program));
        let given = given.map(|program| (Pooler::GivenPgBouncer, program));
        let pgbouncers: Vec<Column> = distribution
            .into_iter()
            .chain(given)
            .map(|(pooler, program)| Column { pooler, program, running: None })
            .collect();
        assert!(!pgbouncers.is_empty(), "PgBouncer is missing: run scripts/bench, which installs it");
        let binaries =
            PostgresBinaries::find(None).expect("run scripts/bench, which installs what is needed");
        let authority = Authority::new();
        let certificate = authority.certify(&["localhost", "127.0.0.1"]);
        // Short, since a socket's path holds 107 bytes.
        let folder = tempfile::Builder::new().prefix("pgl").tempdir_in("/tmp").unwrap();
        let (certificate_file, key_file) =
            (folder.path().join("server.crt"), folder.path().join("server.key"));
        fs::write(&certificate_file, &certificate.0).unwrap();
        fs::write(&key_file, &certificate.1).unwrap();
        // A thousand tenants with a server each, of all poolers and directly.
        let cluster = Cluster::build()
            .setting("max_connections", "4500")
            .setting("shared_buffers", "256MB")
            .setting("max_wal_size", "8GB")
            .setting("checkpoint_timeout", "1h")
            .tls()
            .start();
        let proxy = Proxy::build()
            .cluster(cluster)
            .pool_size(20)
            .config("max_client_conn", "20000")
            .config("unix_socket_dir", &format!("{:?}", folder.path()))
            .config("server_tls_sslmode", "\"disable\"")
            .config("client_tls_cert_file", &format!("{certificate_file:?}"))
            .config("client_tls_key_file", &format!("{key_file:?}"))
            .config("log.connections", "false")
            .config("log.level", "\"warn\"")
            .start()
            .await;
        let mut stand = Self {
            proxy,
            pgbouncers,
            binaries,
            authority,
            certificate,
            layout: Layout::Usual,
            tenants: Vec::new(),
            verifier: scram_verifier(&SecretString::from(PASSWORD)).expose_secret().to_owned(),
            folder,
        };
        let central = stand.proxy.cluster.client("central").await;
        central.run("UPDATE pglobby.hosts SET tls_mode = 'disable'").await;
        stand.proxy.create_login(SERVICE, PASSWORD, &["--service", "--all-tenants"]);
        for name in [DATABASE, "noisy", "other", "quiet"] {
            stand.add_tenant(name).await;
        }
        stand.fill_tables().await;
        stand.restart().await;
        stand
    }

    pub fn target(&self, pooler: Pooler) -> Target {
        let pgbouncer = self.pgbouncers.iter().find(|it| it.pooler == pooler);
        let (folder, port, pid) = match (pooler, pgbouncer.and_then(|it| it.running.as_ref())) {
            (_, Some(running)) => (running.socket_folder(), running.port(), Some(running.pid())),
            (Pooler::Pglobby, _) => (self.folder.path(), self.proxy.port(), Some(self.proxy.pid())),
            _ => (self.proxy.cluster.socket_folder(), self.proxy.cluster.port(), None),
        };
        let host = match self.layout {
            Layout::UnixEverywhere => folder.display().to_string(),
            _ => LOOPBACK.to_owned(),
        };
        let password = PASSWORD.to_owned();
        let nobody =
            Target { pooler, host, port, pid, user: String::new(), password, database: String::new() };
        nobody.at(DATABASE)
    }

    /// What is measured beside each other.
    pub fn poolers(&self) -> Vec<Pooler> {
        let pgbouncers = self.pgbouncers.iter().map(|it| it.pooler);
        [Pooler::Direct].into_iter().chain(pgbouncers).chain([Pooler::Pglobby]).collect()
    }

    /// Columns and versions.
    pub fn pgbouncer_versions(&self) -> Vec<(Pooler, &str)> {
        self.pgbouncers.iter().map(|it| (it.pooler, it.program.version.as_str())).collect()
    }

    /// The one that pglobby is compared with.
    pub fn newest_pgbouncer(&self) -> Pooler {
        let newest = self.pgbouncers.iter().max_by_key(|it| it.program.version_number());
        newest.map_or(Pooler::PgBouncer, |it| it.pooler)
    }

    /// One of PostgreSQL's programs.
    pub fn program(&self, name: &str) -> PathBuf {
        let beside = self.binaries.program(name);
        if beside.exists() { beside } else { PathBuf::from(name) }
    }

    pub fn postgres_major(&self) -> u32 {
        self.binaries.major()
    }

    /// Makes databases t0, t1, … until there are `count` of them.
    pub async fn need_tenants(&mut self, count: usize) {
        let existing = self.tenants.iter().filter(|name| is_numbered(name)).count();
        if existing >= count {
            return;
        }
        eprintln!("  (making {} databases)", count - existing);
        for number in existing..count {
            self.add_tenant(&numbered(number)).await;
        }
        self.restart().await;
    }

    /// Makes this database, unless it is there. Returns whether it is new.
    pub async fn need_tenant(&mut self, name: &str) -> bool {
        let is_new = !self.tenants.iter().any(|existing| existing == name);
        if is_new {
            self.add_tenant(name).await;
            self.restart().await;
        }
        is_new
    }

    /// A database, its owner, and the row that `pglobby tenant create` would leave.
    async fn add_tenant(&mut self, name: &str) {
        let (owner, password) = (owner_of(name), SecretString::from(PASSWORD));
        let postgres = self.proxy.cluster.client("postgres").await;
        let verifier = &self.verifier;
        postgres.run(&format!("CREATE ROLE {owner} LOGIN PASSWORD '{verifier}'")).await;
        postgres.run(&format!("CREATE DATABASE {name} OWNER {owner}")).await;
        let central = self.proxy.cluster.client("central").await;
        let insert = format!(
            "INSERT INTO pglobby.tenants (name, host, database, username)
             VALUES ('{name}', 'default', '{name}', '{owner}') RETURNING id"
        );
        let id = central.ask(&insert).await;
        let file = self.proxy.config_file();
        let config = Config::read(&fs::read_to_string(&file).unwrap(), Some(&file), &|_| None).unwrap();
        let place = SecretLocation { table: "tenants", row: &id, column: "sealed_password" };
        let blob = Keyring::load(&config).unwrap().seal(&place, &password).unwrap();
        let update = "UPDATE pglobby.tenants SET sealed_password = $1, status = 'active' WHERE id = $2";
        let id = id.parse::<i64>().unwrap();
        central.execute(update, &[&blob, &id]).await.unwrap();
        let insert = "INSERT INTO pglobby.logins (name, kind, tenant_id, verifier)
             VALUES ($1, 'employee', $2, $3)";
        central.execute(insert, &[&employee_of(name), &id, verifier]).await.unwrap();
        self.tenants.push(name.to_owned());
    }

    async fn fill_tables(&self) {
        let target = self.target(Pooler::Direct);
        let made = std::process::Command::new(self.program("pgbench"))
            .args(["--initialize", "--quiet", "--scale", SCALE, "--host", &target.host])
            .args(["--port", &target.port.to_string(), "--username", &target.user, DATABASE])
            .env("PGPASSWORD", PASSWORD)
            .output()
            .expect("pgbench runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let owner = owner_of(DATABASE);
        let bench = self.proxy.cluster.client(DATABASE).await;
        bench
            .run(&format!("CREATE UNLOGGED TABLE sink (line text); ALTER TABLE sink OWNER TO {owner}"))
            .await;
    }

    /// Sets the poolers up in another way, if they are not.
    pub async fn become_like(&mut self, layout: Layout) {
        if self.layout != layout {
            self.layout = layout;
            self.restart().await;
        }
    }

    /// Starts both poolers anew: no server, no cache, no memory that an earlier load left.
    pub async fn restart(&mut self) {
        for at in 0..self.pgbouncers.len() {
            self.pgbouncers[at].running = None;
            self.pgbouncers[at].running = Some(self.start_pgbouncer(&self.pgbouncers[at].program));
        }
        self.proxy.kill_9();
        let address = self.server_address();
        let central = self.proxy.cluster.client("central").await;
        central.run(&format!("UPDATE pglobby.hosts SET address = '{address}'")).await;
        let (server, pool) = match self.layout {
            Layout::ShortPools => ("\"1s\"", "\"1s\""),
            _ => ("\"10min\"", "\"10min\""),
        };
        let workers = match self.layout {
            Layout::OneWorker => "1",
            Layout::TwoWorkers => "2",
            _ => "0",
        };
        self.proxy.set_config("worker_threads", workers);
        self.proxy.set_config("server_idle_timeout", server);
        self.proxy.set_config("pool_idle_timeout", pool);
        self.proxy.start_again().await;
    }

    fn server_address(&self) -> String {
        match self.layout {
            Layout::UnixServers | Layout::UnixEverywhere => {
                self.proxy.cluster.socket_folder().display().to_string()
            }
            _ => LOOPBACK.to_owned(),
        }
    }

    fn start_pgbouncer(&self, program: &Program) -> PgBouncer {
        let (address, port) = (self.server_address(), self.proxy.cluster.port());
        let mut databases = String::new();
        let mut users = format!("\"{SERVICE}\" \"{}\"\n", self.verifier);
        for name in &self.tenants {
            let owner = owner_of(name);
            let _ = writeln!(users, "\"{}\" \"{}\"", employee_of(name), self.verifier);
            let _ = writeln!(
                databases,
                "{name} = host={address} port={port} dbname={name} user={owner} password={PASSWORD}"
            );
        }
        let idle = if self.layout == Layout::ShortPools { 1 } else { 600 };
        let settings = format!(
            "pool_mode = transaction\ndefault_pool_size = 20\nmax_client_conn = 20000\n\
             server_tls_sslmode = disable\nserver_idle_timeout = {idle}\n\
             log_connections = 0\nlog_disconnections = 0\nlog_stats = 0"
        );
        PgBouncer::start(program, &databases, &users, &settings, &self.certificate)
    }

    /// Waits until no server is connected to the numbered databases.
    pub async fn servers_are_gone(&self) {
        let postgres = self.proxy.cluster.client("postgres").await;
        let left = "SELECT count(*) FROM pg_stat_activity WHERE datname ~ '^t[0-9]+$'";
        while postgres.ask(left).await != "0" {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await; // Nothing tells when it is so.
        }
    }

    /// For a look by hand.
    pub fn wait_for_enter(&self) {
        for pooler in self.poolers() {
            let target = self.target(pooler);
            println!(
                "{:16} PGPASSWORD={PASSWORD} psql -h {} -p {} -U {} {DATABASE}   (pid {:?})",
                pooler.name(),
                target.host,
                target.port,
                target.user,
                target.pid
            );
        }
        println!("Enter ends it.");
        let _ = std::io::stdin().read_line(&mut String::new());
    }
}

pub fn numbered(number: usize) -> String {
    format!("t{number}")
}

fn is_numbered(name: &str) -> bool {
    name.strip_prefix('t').is_some_and(|number| number.parse::<usize>().is_ok())
}
