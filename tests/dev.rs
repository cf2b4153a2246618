//! `pglobby dev` as a new user runs it, and the commands in another terminal that find it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    fs,
    io::{BufRead, BufReader},
    net::TcpListener,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Instant,
};

use pglobby::local_postgres::os_user::ClusterOwner;
use rustix::process::{Pid, Signal};
use support::{
    Client,
    client::{PATIENCE, in_time},
    ports::ReservedPort,
    proxy::pglobby,
};
use tempfile::TempDir;

/// Folders of one test, so that commands do not find a dev of the developer; two ports, for the proxy and HTTP.
struct Home {
    folder: TempDir,
    port: ReservedPort,
}

/// A running dev.
struct Dev {
    process: Child,
    /// Its output until it was ready.
    printed: String,
}

impl Home {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("pgl").tempdir_in("/tmp").unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["here", "elsewhere"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        // HTTP listens 3000 ports above: the reserved range includes that port.
        Self { folder, port: ReservedPort::take_from(13_000, 1000) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn data(&self) -> PathBuf {
        self.path("data")
    }

    fn listen(&self) -> String {
        format!("127.0.0.1:{}", self.port.number)
    }

    fn postgres_port(&self) -> u16 {
        let config = fs::read_to_string(self.data().join("proxy.toml")).unwrap();
        let host_and_port = config.split_once('@').unwrap().1.split_once('/').unwrap().0;
        host_and_port.rsplit_once(':').unwrap().1.parse().unwrap()
    }

    /// `pglobby` typed in the folder `place`.
    fn command(&self, place: &str) -> Command {
        let mut command = pglobby();
        command.current_dir(self.path(place)).env("XDG_STATE_HOME", self.path("state")).stdin(Stdio::null());
        command
    }

    fn dev_command(&self) -> Command {
        let mut command = self.command("here");
        command.args(["dev", "--listen", &self.listen(), "--data-dir"]).arg(self.data());
        command
    }

    /// Starts a dev and waits until it has printed its instructions.
    fn dev(&self) -> Dev {
        let errors = fs::File::create(self.path("stderr")).unwrap();
        let process = self.dev_command().stdout(Stdio::piped()).stderr(errors).spawn().unwrap();
        let mut dev = Dev { process, printed: String::new() };
        let mut lines = BufReader::new(dev.process.stdout.take().unwrap()).lines();
        for line in lines.by_ref() {
            let line = line.unwrap();
            dev.printed += &format!("{line}\n");
            if line.starts_with("Ctrl-C stops everything") {
                // Reads the rest, so that dev never writes to a closed pipe.
                std::thread::spawn(move || lines.for_each(drop));
                return dev;
            }
        }
        let printed = &dev.printed;
        panic!("dev ended:\n{printed}{}", fs::read_to_string(self.path("stderr")).unwrap());
    }

    /// Runs a `dev` that must fail, and returns its error, which is one line.
    fn refusal(&self, more: &[&str]) -> String {
        let output = self.dev_command().args(more).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(said.lines().count(), 1, "{said}");
        said
    }
}

impl Dev {
    /// The URL printed for `login`, password included.
    fn url(&self, login: &str) -> String {
        let start = format!("postgres://{login}:");
        let url = self.printed.split('\'').find(|text| text.starts_with(&start));
        url.unwrap_or_else(|| panic!("no URL for {login} in\n{}", self.printed)).to_owned()
    }

    fn stop(mut self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
        let status = self.process.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn a_tenant_made_in_another_terminal_serves_at_once_and_is_found_again_after_a_restart() {
    let home = Home::new();
    let dev = home.dev();
    let alice = client(&dev.url("alice")).await;
    alice.run("CREATE TABLE kept (x int); INSERT INTO kept VALUES (7)").await;
    assert_eq!(client(&dev.url("bob")).await.ask("SELECT current_database()").await, "globex");

    // Commands find the dev in the folder where it was started and in any other.
    succeeded(home.command("here").args(["tenant", "create", "initech"]).output().unwrap());
    let peter = home
        .command("elsewhere")
        .args(["login", "create", "peter", "--tenant", "initech", "--json"])
        .output()
        .unwrap();
    let peter: serde_json::Value = serde_json::from_str(&succeeded(peter)).unwrap();
    let password = peter["password"].as_str().unwrap();
    let peters = format!("postgres://peter:{password}@{}/initech", home.listen());
    assert_eq!(client(&peters).await.ask("SELECT current_database()").await, "initech");

    let alices = dev.url("alice");
    dev.stop(Signal::INT);
    assert!(!home.data().join("postgres/postmaster.pid").exists(), "PostgreSQL has stopped");

    // The port of its PostgreSQL is taken: dev chooses another, and updates the tenants' host.
    let port = home.postgres_port();
    let _taken = TcpListener::bind(("127.0.0.1", port));
    let begun = Instant::now();
    let again = home.dev();
    assert_ne!(home.postgres_port(), port);
    assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
    assert!(!again.printed.contains("postgres://alice:"), "a password was printed twice:\n{}", again.printed);
    assert_eq!(client(&alices).await.ask("SELECT x FROM kept").await, "7");
    assert_eq!(client(&peters).await.ask("SELECT current_user <> 'peter'").await, "t");
    again.stop(Signal::TERM);
}

#[tokio::test]
async fn an_error_at_start_is_one_line() {
    let home = Home::new();
    let taken = TcpListener::bind(home.listen()).unwrap();
    assert!(home.refusal(&[]).contains(&format!("{} is taken", home.listen())));
    drop(taken);

    let dev = home.dev();
    assert!(home.refusal(&[]).contains("another pglobby dev runs"));
    dev.stop(Signal::TERM);

    fs::write(home.data().join("postgres/PG_VERSION"), "12\n").unwrap();
    assert!(home.refusal(&[]).contains("made by PostgreSQL 12"));
    fs::remove_file(home.data().join("postgres/PG_VERSION")).unwrap();
    assert!(home.refusal(&[]).contains("is not a PostgreSQL data folder"));
    fs::remove_file(home.data().join("proxy.toml")).unwrap();
    assert!(home.refusal(&[]).contains("no proxy.toml"));
}

/// TCP on loopback costs more CPU: dev has Unix sockets to its PostgreSQL and for clients.
#[tokio::test]
async fn unix_sockets_lead_to_postgresql_and_to_dev() {
    let home = Home::new();
    let dev = home.dev();
    // A server that is reached through a socket knows no address of its peer.
    let peer = "SELECT coalesce(inet_client_addr()::text, 'socket')";
    let url: tokio_postgres::Config = dev.url("alice").parse().unwrap();
    assert_eq!(Client::connect(&url).await.unwrap().ask(peer).await, "socket");
    let mut over_socket = tokio_postgres::Config::new();
    over_socket.host_path(home.data()).port(home.port.number).dbname("acme");
    over_socket.user("alice").password(url.get_password().unwrap());
    assert_eq!(Client::connect(&over_socket).await.unwrap().ask(peer).await, "socket");
    assert!(dev.printed.contains(&format!("psql -h '{}'", home.data().display())), "{}", dev.printed);

    let sockets = home.data().join("sockets");
    let hosts = succeeded(home.command("here").args(["host", "list", "--json"]).output().unwrap());
    let hosts: serde_json::Value = serde_json::from_str(&hosts).unwrap();
    assert_eq!(hosts[0]["address"], sockets.display().to_string());
    // For root, PostgreSQL runs as another user, and the folder is that user's.
    let metadata = |path: &Path| fs::metadata(path).unwrap();
    assert_eq!(metadata(&sockets).mode() & 0o777, 0o700);
    assert_eq!(metadata(&sockets).uid(), metadata(&home.data().join("postgres")).uid());
    dev.stop(Signal::TERM);

    // A machine that lost power leaves a lock file, and its process id is of another process of that user by now.
    let mut other = Command::new("sleep");
    let mut other = ClusterOwner::current().unwrap().run_as(other.arg("600")).spawn().unwrap();
    let lock = sockets.join(format!(".s.PGSQL.{}.lock", home.postgres_port()));
    fs::write(&lock, format!("{}\n", other.id())).unwrap();
    let again = home.dev();
    other.kill().unwrap();
    other.wait().unwrap();
    assert_eq!(Client::connect(&over_socket).await.unwrap().ask(peer).await, "socket");
    again.stop(Signal::TERM);
}

/// After kill -9, PostgreSQL stops, commands find no dev, and dev starts again with the same folder.
#[tokio::test]
async fn the_postgresql_of_a_killed_dev_stops_and_dev_starts_again() {
    let home = Home::new();
    let mut dev = home.dev();
    let alices = dev.url("alice");
    dev.process.kill().unwrap();
    dev.process.wait().unwrap();
    let begun = Instant::now();
    while home.data().join("postgres/postmaster.pid").exists() {
        assert!(begun.elapsed() < PATIENCE, "PostgreSQL still runs");
        tokio::task::yield_now().await;
    }
    let unfound = home.command("here").args(["tenant", "list"]).output().unwrap();
    assert!(String::from_utf8_lossy(&unfound.stderr).contains("there is no proxy.toml here"), "{unfound:?}");

    let again = home.dev();
    assert_eq!(client(&alices).await.ask("SELECT 1").await, "1");
    again.stop(Signal::TERM);
}

#[tokio::test]
async fn files_with_secrets_are_readable_by_their_owner_only() {
    let home = Home::new();
    let dev = home.dev();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for name in ["proxy.toml", "keyring.toml"] {
        assert_eq!(mode(&home.data().join(name)), 0o600, "{name}");
    }
    assert_eq!(mode(&home.data().join("postgres")), 0o700);
    let listed = succeeded(Command::new("ps").args(["-eo", "args"]).output().unwrap());
    let config = fs::read_to_string(home.data().join("proxy.toml")).unwrap();
    let password = config.split_once("master:").unwrap().1.split_once('@').unwrap().0;
    assert!(!listed.contains(password), "a password in argv");
    dev.stop(Signal::TERM);
}

async fn client(url: &str) -> Client {
    in_time(url, Client::connect(&url.parse().unwrap()))
        .await
        .unwrap_or_else(|error| panic!("{url}: {error:?}"))
}

fn succeeded(output: Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}
