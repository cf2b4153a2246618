//! Ordinary drivers and two object-relational mappers, each with a day's ordinary work, on a pool smaller than the number of connections.
//!
//! The programs in `tests/drivers/` know nothing of a proxy; here they are given its URL. A driver that is not
//! installed fails its test: `scripts/test` installs them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;
#[path = "drivers/tokio_postgres_day.rs"]
mod tokio_postgres_day;

use std::{
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use futures_util::future::join_all;
use support::{
    Cluster, Proxy,
    cluster::{MASTER, MASTER_PASSWORD, target_folder},
    proxy::{login_of, password_of},
};
use tokio::process::Command;

/// Where a driver is sent.
struct Target {
    port: u16,
    user: String,
    password: String,
    database: String,
}

/// The programs must be right before they can say anything about the proxy.
#[tokio::test]
async fn every_driver_has_a_good_day_without_the_proxy() {
    let cluster = Cluster::start();
    for database in ["psycopg", "asyncpg", "sqlalchemy", "django", "node", "jdbc", "tokio", "tools"] {
        cluster.create_database(database, MASTER, "").await;
    }
    let target = |database: &str| Target {
        port: cluster.port(),
        user: MASTER.to_owned(),
        password: MASTER_PASSWORD.to_owned(),
        database: database.to_owned(),
    };
    tokio::join!(
        psycopg(target("psycopg")),
        asyncpg(target("asyncpg")),
        sqlalchemy(target("sqlalchemy")),
        django(target("django")),
        node_postgres(target("node")),
        jdbc(target("jdbc")),
        tokio_postgres(target("tokio")),
        command_line_tools(target("tools")),
    );
}

/// Two servers for six connections: each server works for all of them in turn.
macro_rules! through_both_pool_modes {
    ($($driver:ident),+) => {$(
        mod $driver {
            #[tokio::test]
            async fn on_two_servers_in_transaction_mode() {
                let proxy = super::Proxy::with_tenant("acme").pool_mode("transaction").pool_size(2).start().await;
                super::$driver(super::tenant_of(&proxy)).await;
            }

            /// A session keeps its server, so there are as many as connections.
            #[tokio::test]
            async fn in_session_mode() {
                let proxy = super::Proxy::with_tenant("acme").pool_mode("session").pool_size(16).start().await;
                super::$driver(super::tenant_of(&proxy)).await;
            }
        }
    )+};
}

through_both_pool_modes!(
    psycopg,
    asyncpg,
    sqlalchemy,
    django,
    node_postgres,
    jdbc,
    tokio_postgres,
    command_line_tools
);

/// What others have reported of poolers: every case has the outcome that it has without a proxy.
async fn field_reports(mode: &str, servers: u32) {
    let proxy = Proxy::with_tenant("acme").pool_mode(mode).pool_size(servers).start().await;
    proxy.cluster.create_database("direct", "direct", "direct").await;
    let direct = Target {
        port: proxy.cluster.port(),
        user: "direct".to_owned(),
        password: "direct".to_owned(),
        database: "direct".to_owned(),
    };
    let binaries = pglobby::local_postgres::binaries::PostgresBinaries::find(None).unwrap();
    let folder = binaries.program("psql").parent().unwrap().display().to_string();
    let mut command = Command::new(installed("drivers/python/bin/python"));
    command.arg(program("field_reports.py")).args([direct.url(), tenant_of(&proxy).url()]);
    good(command.env("PATH", format!("{folder}:{}", std::env::var("PATH").unwrap_or_default()))).await;
}

#[tokio::test]
async fn what_others_reported_does_not_happen_on_two_servers_in_transaction_mode() {
    field_reports("transaction", 2).await;
}

#[tokio::test]
async fn what_others_reported_does_not_happen_in_session_mode() {
    field_reports("session", 16).await;
}

fn tenant_of(proxy: &Proxy) -> Target {
    Target {
        port: proxy.port(),
        user: login_of("acme"),
        password: password_of("acme"),
        database: "acme".to_owned(),
    }
}

async fn psycopg(target: Target) {
    let python = installed("drivers/python/bin/python");
    good_day(Command::new(python).arg(program("psycopg_day.py")).arg(target.url())).await;
}

async fn asyncpg(target: Target) {
    let python = installed("drivers/python/bin/python");
    good_day(Command::new(python).arg(program("asyncpg_day.py")).arg(target.url())).await;
}

async fn sqlalchemy(target: Target) {
    let python = installed("drivers/python/bin/python");
    good_day(Command::new(python).arg(program("sqlalchemy_day.py")).arg(target.url())).await;
}

async fn django(target: Target) {
    let python = installed("drivers/python/bin/python");
    good_day(Command::new(python).arg(program("django_day.py")).arg(target.url())).await;
}

async fn node_postgres(target: Target) {
    let modules = installed("drivers/node/node_modules");
    good_day(
        Command::new("node").env("NODE_PATH", modules).arg(program("node_postgres_day.js")).arg(target.url()),
    )
    .await;
}

async fn jdbc(target: Target) {
    let driver = installed("drivers/jdbc/postgresql.jar");
    let place = format!("127.0.0.1:{}/{}", target.port, target.database);
    good_day(
        Command::new("java")
            // A short program: compiling it well would take longer than running it.
            .args(["-XX:TieredStopAtLevel=1", "-cp"])
            .arg(driver)
            .arg(program("JdbcDay.java"))
            .args([&place, &target.user, &target.password]),
    )
    .await;
}

async fn tokio_postgres(target: Target) {
    let config: ::tokio_postgres::Config = target.url().parse().unwrap();
    join_all((0..6).map(|worker| tokio_postgres_day::day(&config, worker))).await;
}

/// What an operator or a load test types. pgbench in all three modes, six clients at once.
async fn command_line_tools(target: Target) {
    psql_scripts(&target).await;
    dump_and_restore(&target).await;
    good(tool("pgbench", &target).args(["--initialize", "--quiet", "--scale=1"])).await;
    for mode in ["simple", "extended", "prepared"] {
        // As many threads as clients: pgbench waits for PREPARE without serving the others of its thread, which may be
        // the ones that hold the servers.
        let load = ["--client=6", "--jobs=6", "--transactions=50", "--no-vacuum"];
        let output = good(tool("pgbench", &target).args(load).arg(format!("--protocol={mode}"))).await;
        let told = text(&output.stdout);
        assert!(told.contains("number of transactions actually processed: 300/300"), "{mode}: {told}");
        assert!(
            !told.contains("failed transactions: ") || told.contains("failed transactions: 0 "),
            "{told}"
        );
    }
    // Every transaction adds the same to a branch, a teller, an account and the history.
    let sums =
        "SELECT (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(delta) FROM pgbench_history),
                       (SELECT count(*) FROM pgbench_history)";
    assert_eq!(psql(&target, sums).await, "t|900");
}

async fn psql_scripts(target: &Target) {
    assert_eq!(psql(target, "SELECT 'naïve – 漢字 – 🦀'").await, "naïve – 漢字 – 🦀");
    let copied = psql(
        target,
        "CREATE TABLE notes (id int, note text);
         \\copy notes FROM PROGRAM 'printf \"1\\tone\\n2\\ttwo\\n\"'
         BEGIN; DELETE FROM notes; ROLLBACK;
         SELECT count(*) FROM notes \\gset
         SELECT :count * 10;
         \\copy (SELECT note FROM notes ORDER BY id) TO STDOUT
         \\pset footer off
         \\d notes",
    )
    .await;
    assert!(copied.contains("20\none\ntwo\n"), "{copied}");
    assert!(copied.contains("note|text"), "{copied}");
    let failed = run(tool("psql", target).args(["-v", "ON_ERROR_STOP=1", "-c", "SELECT 1/0"])).await;
    assert!(text(&failed.stderr).contains("division by zero"), "{}", text(&failed.stderr));
}

async fn dump_and_restore(target: &Target) {
    psql(target, "CREATE SCHEMA shop; CREATE TABLE shop.items (id serial PRIMARY KEY, raw bytea, at timestamptz);
                  CREATE INDEX ON shop.items (at);
                  INSERT INTO shop.items (raw, at) SELECT sha256(i::text::bytea), now() FROM generate_series(1, 5000) i").await;
    let checksum = "SELECT md5(string_agg(items::text, ',' ORDER BY id)) FROM shop.items";
    let before = psql(target, checksum).await;
    let folder = tempfile::tempdir().unwrap();
    for format in ["custom", "directory"] {
        let dump = folder.path().join(format);
        good(tool("pg_dump", target).args(["--schema=shop", "--format", format]).arg("--file").arg(&dump))
            .await;
        psql(target, "SET client_min_messages = warning; DROP SCHEMA shop CASCADE").await;
        let database = target.database.as_str();
        good(
            tool("pg_restore", target)
                .args(["--exit-on-error", "--no-owner", "--dbname", database])
                .arg(&dump),
        )
        .await;
        assert_eq!(psql(target, checksum).await, before, "{format}");
    }
}

async fn psql(target: &Target, script: &str) -> String {
    let mut command = tool("psql", target);
    command.args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-f", "-"]).stdin(Stdio::piped());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stdin, script.as_bytes()).await.unwrap();
    drop(stdin);
    let output = support::client::in_time(script, child.wait_with_output()).await.unwrap();
    assert!(output.status.success(), "psql: {}{}", text(&output.stderr), text(&output.stdout));
    text(&output.stdout).trim().to_owned()
}

/// One of PostgreSQL's own clients, told where to go by libpq's environment.
fn tool(name: &str, target: &Target) -> Command {
    let binaries = pglobby::local_postgres::binaries::PostgresBinaries::find(None).unwrap();
    let beside_the_server = binaries.program(name);
    let mut command =
        Command::new(if beside_the_server.exists() { beside_the_server } else { PathBuf::from(name) });
    command
        .env("PGHOST", "127.0.0.1")
        .env("PGPORT", target.port.to_string())
        .env("PGUSER", &target.user)
        .env("PGPASSWORD", &target.password)
        .env("PGDATABASE", &target.database);
    command
}

impl Target {
    fn url(&self) -> String {
        let password = self.password.replace(' ', "%20");
        format!("postgres://{}:{password}@127.0.0.1:{}/{}", self.user, self.port, self.database)
    }
}

async fn good_day(command: &mut Command) {
    let output = good(command).await;
    assert!(text(&output.stdout).contains("a good day"), "{}", text(&output.stdout));
}

async fn good(command: &mut Command) -> Output {
    let output = run(command).await;
    assert!(output.status.success(), "{command:?}:\n{}{}", text(&output.stderr), text(&output.stdout));
    output
}

async fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(DAY_MAX, command.output()).await;
    output.unwrap_or_else(|_| panic!("{command:?} did not end within {DAY_MAX:?}")).unwrap_or_else(|error| {
        panic!("{command:?}: {error}; run scripts/test, which installs what the tests need")
    })
}

fn installed(path: &str) -> PathBuf {
    let path = target_folder().join(path);
    assert!(path.exists(), "{path:?} is missing: run scripts/test, which installs what the tests need");
    path
}

fn program(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/drivers").join(name)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A day takes a few seconds; on a machine with other work, some more.
const DAY_MAX: std::time::Duration = std::time::Duration::from_secs(80);
