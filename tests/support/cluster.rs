//! A real PostgreSQL for one test, running within a third of a second.
//!
//! `initdb` runs once per version and user into a template under the target folder; a test copies it.
//! Durability is off: nothing here outlives the test.

use std::{
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use pglobby::local_postgres::{
    binaries::PostgresBinaries,
    cluster::{LocalCluster, RunningCluster, Stop},
    os_user::ClusterOwner,
};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use secrecy::SecretString;
use tempfile::TempDir;
use tokio_postgres::Config;

use super::{certificates::Authority, client::Client, ports::ReservedPort};

/// The superuser of every test cluster, and its password.
pub const MASTER: &str = "master";
pub const MASTER_PASSWORD: &str = "master of the lobby";

/// A PostgreSQL that ends with the test.
pub struct Cluster {
    /// `None` while it is stopped.
    running: Option<RunningCluster>,
    local: LocalCluster,
    settings: Vec<(String, String)>,
    port: ReservedPort,
    folder: TempDir,
    pub authority: Option<Authority>,
}

/// What a cluster is to be like.
pub struct Builder {
    binaries: PostgresBinaries,
    settings: Vec<(String, String)>,
    hba: Option<String>,
    tls: bool,
    md5: bool,
}

impl Cluster {
    /// The machine's own version, SCRAM, no TLS, on 127.0.0.1 and a Unix socket.
    pub fn start() -> Self {
        Self::build().start()
    }

    /// The machine's own version; 18 where `PGLOBBY_TEST_POSTGRES=18` is set, as `scripts/test` does in its second round.
    pub fn build() -> Builder {
        match std::env::var("PGLOBBY_TEST_POSTGRES").as_deref() {
            Err(_) => {}
            Ok("18") => return Self::postgres_18(),
            Ok(other) => panic!("PGLOBBY_TEST_POSTGRES is {other}: 18 or nothing"),
        }
        Builder::new(
            PostgresBinaries::find(None).expect("run scripts/test, which installs what the tests need"),
        )
    }

    /// PostgreSQL 18, for protocol 3.2, long cancel keys and direct TLS. `scripts/test` installs it under `target/`.
    pub fn postgres_18() -> Builder {
        let programs =
            || PostgresBinaries::in_folder(&reachable_copy(&target_folder().join("postgres-18")).join("bin"));
        let binaries = PostgresBinaries::find_major(None, 18).ok().or_else(programs);
        Builder::new(binaries.expect("PostgreSQL 18 is missing: run scripts/test, which installs it"))
    }

    pub fn port(&self) -> u16 {
        self.port.number
    }

    /// Folder of the Unix socket `.s.PGSQL.<port>`.
    pub fn socket_folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn data(&self) -> &Path {
        self.local.data()
    }

    /// The superuser's URL for `database`, over TCP, password included.
    pub fn url(&self, database: &str) -> String {
        let password = MASTER_PASSWORD.replace(' ', "%20");
        format!("postgres://{MASTER}:{password}@127.0.0.1:{}/{database}", self.port())
    }

    pub fn config(&self, database: &str) -> Config {
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.port()).user(MASTER).password(MASTER_PASSWORD).dbname(database);
        config
    }

    /// The superuser, connected directly.
    pub async fn client(&self, database: &str) -> Client {
        Client::connect(&self.config(database))
            .await
            .unwrap_or_else(|error| panic!("{error}\n{}", self.log_tail()))
    }

    /// An empty database, owned by `owner`, which is made with `password` where it is not the superuser.
    pub async fn create_database(&self, name: &str, owner: &str, password: &str) {
        let master = self.client("postgres").await;
        if owner != MASTER {
            master.run(&format!("CREATE ROLE \"{owner}\" LOGIN PASSWORD '{password}'")).await;
        }
        master.run(&format!("CREATE DATABASE \"{name}\" OWNER \"{owner}\"")).await;
    }

    /// Stops it: everybody is disconnected with 57P01, work in progress rolled back.
    pub fn stop(&mut self) {
        self.running.take().expect("running").stop(Stop::Fast).unwrap();
    }

    /// Stops it as a power failure does: nobody is told more than that, and the next start recovers.
    pub fn stop_at_once(&mut self) {
        self.running.take().expect("running").stop(Stop::Immediate).unwrap();
    }

    /// It takes no new connections, and stops when the last of those that are open has ended.
    pub fn begin_smart_stop(&self) {
        self.signal(Signal::TERM);
    }

    /// Waits until it has stopped by itself.
    pub async fn stopped(&mut self) {
        let running = self.running.as_mut().expect("running");
        super::client::in_time("the end of PostgreSQL", async {
            while running.exited().is_none() {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await; // A process does not wake its parent here.
            }
        })
        .await;
        self.running = None;
    }

    /// After `stop`: starts it as a standby of `primary`, which was its standby.
    pub fn follow(&mut self, primary: &Cluster) {
        let lines = format!(
            "\nprimary_conninfo = 'host=127.0.0.1 port={} user={MASTER} password=''{MASTER_PASSWORD}'' '\n\
             synchronous_standby_names = ''\n",
            primary.port()
        );
        let file = self.data().join("postgresql.auto.conf");
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, text + &lines).unwrap();
        let signal = self.data().join("standby.signal");
        fs::write(&signal, "").unwrap();
        self.local.owner().give(&signal).unwrap();
        self.start_again();
    }

    /// Makes a standby the primary; returns when it accepts writes.
    pub async fn promote(&self) {
        let promoted = self.client("postgres").await.ask("SELECT pg_promote(true, 30)").await;
        assert_eq!(promoted, "t", "{}", self.log_tail());
    }

    /// Kills the postmaster; its children follow.
    pub fn kill_9(&mut self) {
        self.running.take().expect("running").kill().unwrap();
    }

    /// After `stop` or `kill_9`: the same data, the same port.
    pub fn start_again(&mut self) {
        assert!(self.running.is_none(), "still running");
        let settings: Vec<_> =
            self.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        self.running = Some(self.local.start(&settings).unwrap_or_else(|error| panic!("{error}")));
    }

    pub fn restart(&mut self) {
        self.stop();
        self.start_again();
    }

    /// The postmaster hears nothing until `resume`: new connections hang, the ones that are open go on.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Restarts it so that a file may have this many bytes, and whichever session writes on is told so, as on a full disk.
    pub fn restart_with_files_of(&mut self, bytes: Option<u64>) {
        self.stop();
        // The server inherits it, and may not change it where it is another user's.
        let ours = getrlimit(Resource::Fsize);
        setrlimit(Resource::Fsize, Rlimit { current: bytes.or(ours.maximum), ..ours }).unwrap();
        self.start_again();
        setrlimit(Resource::Fsize, ours).unwrap();
    }

    /// Reads pg_hba.conf and postgresql.conf anew, and returns when new connections see it.
    pub async fn reload(&self) {
        let master = self.client("postgres").await;
        let before = master.ask("SELECT pg_conf_load_time()").await;
        self.signal(Signal::HUP);
        while self.client("postgres").await.ask("SELECT pg_conf_load_time()").await == before {
            tokio::task::yield_now().await;
        }
    }

    fn signal(&self, signal: Signal) {
        self.running.as_ref().expect("running").signal(signal).unwrap();
    }

    /// All that it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.local.log()).unwrap()
    }

    pub fn log_tail(&self) -> String {
        super::client::tail_of(self.local.log())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- PostgreSQL's log ---\n{}", self.log_tail());
        }
    }
}

impl Builder {
    fn new(binaries: PostgresBinaries) -> Self {
        let quick = [
            ("fsync", "off"),
            ("full_page_writes", "off"),
            ("synchronous_commit", "off"),
            ("autovacuum", "off"),
            ("shared_buffers", "16MB"),
            ("max_connections", "100"),
        ];
        let settings = quick.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        Self { binaries, settings, hba: None, tls: false, md5: false }
    }

    /// A line of postgresql.conf; a later one wins.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The whole pg_hba.conf instead of `scram-sha-256` for everybody. The superuser must be able to log in.
    pub fn hba(mut self, lines: &str) -> Self {
        self.hba = Some(lines.to_owned());
        self
    }

    /// Every connection is trusted, without a password.
    pub fn trust(self) -> Self {
        self.hba("local all all trust\nhost all all 127.0.0.1/32 trust\n")
    }

    /// New passwords are stored as MD5, and logins that have one authenticate by MD5. (The superuser's is SCRAM, which the
    /// method `md5` accepts as well.)
    pub fn md5(mut self) -> Self {
        self.md5 = true;
        self.setting("password_encryption", "md5").hba("local all all md5\nhost all all 127.0.0.1/32 md5\n")
    }

    /// TLS with a certificate for `localhost` and 127.0.0.1, signed by [`Cluster::authority`].
    pub fn tls(mut self) -> Self {
        self.tls = true;
        self
    }

    pub fn start(self) -> Cluster {
        let binaries = self.binaries.clone();
        self.start_with(|local| copy_template(&binaries, local.data()))
    }

    /// A standby that streams from `primary`, and is up to date when this returns. It has the primary's settings.
    pub async fn start_as_standby_of(mut self, primary: &Cluster) -> Cluster {
        let own = ["port", "unix_socket_directories", "listen_addresses"];
        self.settings =
            primary.settings.iter().filter(|(name, _)| !own.contains(&&**name)).cloned().collect();
        let program = self.binaries.program("pg_basebackup");
        let standby = self.start_with(|local| {
            let mut command = Command::new(&program);
            command
                .args([
                    "--checkpoint=fast",
                    "--no-sync",
                    "--wal-method=stream",
                    "--write-recovery-conf",
                    "--pgdata",
                ])
                .arg(local.data())
                .args(["--host=127.0.0.1", "--username", MASTER, "--port", &primary.port().to_string()])
                .env("PGPASSWORD", MASTER_PASSWORD)
                .current_dir("/");
            let output = local.owner().run_as(&mut command).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        });
        let master = primary.client("postgres").await;
        let streams = "SELECT count(*) FROM pg_stat_replication WHERE replay_lsn >= pg_current_wal_lsn()";
        super::client::in_time("a standby that is up to date", async {
            while master.ask(streams).await == "0" {
                tokio::task::yield_now().await;
            }
        })
        .await;
        standby
    }

    /// `fill` makes the data folder.
    fn start_with(mut self, fill: impl FnOnce(&LocalCluster)) -> Cluster {
        // Short, since a socket's path holds 107 bytes; and open to PostgreSQL's user, as a temporary folder is not.
        let folder = tempfile::Builder::new().prefix("pgl").tempdir_in("/tmp").unwrap();
        let local = LocalCluster::new(self.binaries.clone(), &folder.path().join("data")).unwrap();
        local.owner().give(folder.path()).unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fill(&local);

        let port = ReservedPort::take();
        for (name, value) in [
            ("listen_addresses", "127.0.0.1"),
            ("port", &port.number.to_string()),
            ("unix_socket_directories", folder.path().to_str().unwrap()),
        ] {
            self.settings.push((name.to_owned(), value.to_owned()));
        }
        let authority = self.tls.then(|| self.prepare_tls(&local));
        if let Some(hba) = &self.hba {
            fs::write(local.data().join("pg_hba.conf"), hba).unwrap();
        }
        let mut cluster = Cluster { running: None, local, settings: self.settings, port, folder, authority };
        cluster.start_again();
        cluster
    }

    fn prepare_tls(&mut self, local: &LocalCluster) -> Authority {
        let authority = Authority::new();
        authority.write_server_files(local.data(), &["localhost", "127.0.0.1"]);
        let key = local.data().join("server.key");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        for name in ["server.key", "server.crt", "ca.crt"] {
            local.owner().give(&local.data().join(name)).unwrap();
        }
        self.settings.push(("ssl".into(), "on".into()));
        authority
    }
}

/// What `initdb` makes, once per version and user; a file lock lets the first of many test processes make it.
fn copy_template(binaries: &PostgresBinaries, data: &Path) {
    let folder = template_folder();
    fs::create_dir_all(&folder).unwrap();
    let user = rustix::process::geteuid().as_raw();
    let template = folder.join(format!("cluster-{}-{TEMPLATE_FORMAT}-{user}", binaries.major()));
    let lock = File::create(folder.join("lock")).unwrap();
    lock.lock().unwrap();
    if !template.exists() {
        let cluster = LocalCluster::new(binaries.clone(), &template).unwrap();
        cluster.init(MASTER, &SecretString::from(MASTER_PASSWORD), &["--no-sync"]).unwrap();
    }
    drop(lock);
    let copied = Command::new("cp").arg("-a").arg(&template).arg(data).status().unwrap();
    assert!(copied.success(), "cp -a {template:?} {data:?}");
}

/// Under the target folder, unless PostgreSQL's user cannot go there (a checkout in root's home).
fn template_folder() -> PathBuf {
    let preferred = target_folder().join("tmp/postgres-templates");
    fs::create_dir_all(&preferred).unwrap();
    match ClusterOwner::current().unwrap().may_enter(&preferred) {
        Ok(()) => preferred,
        Err(_) => std::env::temp_dir().join("pglobby-postgres-templates"),
    }
}

/// `folder`, or a copy of it where PostgreSQL's user cannot go.
fn reachable_copy(folder: &Path) -> PathBuf {
    if !folder.exists() || ClusterOwner::current().unwrap().may_enter(folder).is_ok() {
        return folder.to_path_buf();
    }
    let copy = std::env::temp_dir().join("pglobby-postgres-18");
    let lock = File::create(copy.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    if !copy.exists() {
        let unfinished = copy.with_extension("unfinished");
        let copied = Command::new("cp").arg("-a").arg(folder).arg(&unfinished).status().unwrap();
        assert!(copied.success(), "cp -a {folder:?} {unfinished:?}");
        fs::rename(unfinished, &copy).unwrap();
    }
    copy
}

/// `target/`, wherever cargo was told to put it.
pub fn target_folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().to_path_buf()
}

/// Changes when the template would be made differently.
const TEMPLATE_FORMAT: u32 = 1;
