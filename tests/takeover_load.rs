//! Take-overs in a row under load: no connection is refused, no session breaks, each transaction counts once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    process::{Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use support::{
    Client, Proxy,
    certificates::Authority,
    client::{in_time, in_words},
    proxy::{Caller, login_of, password_of},
};
use tokio::process::Command;

/// Clients that stay, and clients that come and go, through several take-overs in a row.
#[tokio::test(flavor = "multi_thread")]
async fn no_client_notices_take_overs_under_load() {
    let mut proxy = Proxy::with_tenant("acme").pool_size(4).start().await;
    let setup = proxy.client("acme").connect().await;
    setup.run("CREATE TABLE counted (client int PRIMARY KEY, n int NOT NULL)").await;
    setup.run("INSERT INTO counted SELECT n, 0 FROM generate_series(1, 8) AS n").await;
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut clients = Vec::new();
    for number in 1..=8 {
        let (caller, stop, done) = (proxy.client("acme"), stop.clone(), done.clone());
        clients.push(tokio::spawn(async move { stays(caller, number, &stop, &done).await }));
    }
    for _ in 0..4 {
        let (caller, stop, done) = (proxy.client("acme"), stop.clone(), done.clone());
        clients.push(tokio::spawn(async move { comes_and_goes(caller, &stop, &done).await }));
    }
    for _ in 0..ROUNDS {
        let before = done.load(Ordering::Relaxed);
        let old = proxy.take_over().await;
        assert!(old.ended().await.success());
        in_time("work goes on", async {
            while done.load(Ordering::Relaxed) < before + 500 {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut transactions = 0;
    for client in clients {
        transactions += client.await.unwrap();
    }
    let counted: u64 = setup.ask("SELECT sum(n) FROM counted").await.parse().unwrap();
    assert_eq!(counted, transactions, "each transaction counts once");
}

const ROUNDS: usize = 5;

/// Transactions on one connection, prepared and simple; how many were committed.
async fn stays(caller: Caller, number: i32, stop: &AtomicBool, done: &AtomicU64) -> u64 {
    let client = caller.connect().await;
    client.run(&format!("SET app.number = '{number}'")).await;
    let sql = "UPDATE counted SET n = n + 1 WHERE client = $1 RETURNING current_setting('app.number')";
    let update = client.prepare(sql).await.unwrap();
    let mut committed = 0;
    while !stop.load(Ordering::Relaxed) {
        let told = |error: tokio_postgres::Error| panic!("client {number}: {}", in_words(&error));
        let row = match committed % 2 {
            0 => client.query_one(&update, &[&number]).await.unwrap_or_else(told),
            _ => {
                client.run("BEGIN").await;
                let row = client.query_one(&update, &[&number]).await.unwrap_or_else(told);
                client.run("COMMIT").await;
                row
            }
        };
        assert_eq!(row.get::<_, &str>(0), number.to_string());
        committed += 1;
        done.fetch_add(1, Ordering::Relaxed);
    }
    committed
}

/// A connection for each query.
async fn comes_and_goes(caller: Caller, stop: &AtomicBool, done: &AtomicU64) -> u64 {
    while !stop.load(Ordering::Relaxed) {
        let client: Client = caller.connect().await;
        assert_eq!(client.ask("SELECT 7").await, "7");
        client.leave().await;
        done.fetch_add(1, Ordering::Relaxed);
    }
    0
}

/// Prepared, simple and extended on connections that stay, and a connection for each transaction.
#[tokio::test(flavor = "multi_thread")]
async fn pgbench_notices_nothing() {
    pgbench_through_take_overs(Proxy::with_tenant("acme").pool_size(4).start().await, "disable").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pgbench_notices_nothing_over_tls() {
    let folder = tempfile::tempdir().unwrap();
    Authority::new().write_server_files(folder.path(), &["localhost"]);
    let file = |name: &str| format!("{:?}", folder.path().join(name));
    let proxy = Proxy::with_tenant("acme")
        .pool_size(4)
        .config("client_tls_sslmode", "\"require\"")
        .config("client_tls_cert_file", &file("server.crt"))
        .config("client_tls_key_file", &file("server.key"))
        .start()
        .await;
    pgbench_through_take_overs(proxy, "require").await;
}

async fn pgbench_through_take_overs(mut proxy: Proxy, sslmode: &str) {
    let bench = |options: &[&str]| pgbench(&proxy, sslmode, options);
    let initialised = bench(&["--initialize", "--quiet", "--scale=1"]).output().await.unwrap();
    assert!(initialised.status.success(), "{}", told(&initialised));
    let seconds = format!("--time={LOAD_SECONDS}");
    let load = |options: &[&str]| {
        let stays = ["--no-vacuum", &seconds].into_iter().chain(options.iter().copied());
        tokio::spawn(bench(&stays.collect::<Vec<_>>()).output())
    };
    let runs = [
        load(&["--protocol=prepared", "--client=3", "--jobs=3"]),
        load(&["--protocol=simple", "--client=2", "--jobs=2"]),
        load(&["--protocol=extended", "--client=2", "--jobs=2"]),
        load(&["--select-only", "--connect", "--client=2", "--jobs=2"]),
    ];
    let mut replaced = Vec::new();
    while runs.iter().any(|run| !run.is_finished()) {
        replaced.push(proxy.take_over().await);
    }
    assert!(replaced.len() >= 3, "{} take-overs", replaced.len());
    let mut transactions = 0;
    for (at, run) in runs.into_iter().enumerate() {
        let output = run.await.unwrap().unwrap();
        let told = told(&output);
        assert!(output.status.success() && !told.contains("error:"), "{told}\n{}", proxy.log());
        let processed = told.split("actually processed: ").nth(1).unwrap();
        let count: u64 = processed.split(['\n', '/']).next().unwrap().trim().parse().unwrap();
        transactions += if at < 3 { count } else { 0 };
    }
    for old in replaced {
        assert!(old.ended().await.success());
    }
    let behind = proxy.behind("acme").await;
    let sums =
        "SELECT (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(delta) FROM pgbench_history)";
    assert_eq!(behind.ask(sums).await, "t");
    let counted = behind.ask("SELECT count(*) FROM pgbench_history").await;
    assert_eq!(counted, transactions.to_string());
}

/// Long enough for several take-overs.
const LOAD_SECONDS: u32 = 8;

fn pgbench(proxy: &Proxy, sslmode: &str, options: &[&str]) -> Command {
    let binaries = pglobby::local_postgres::binaries::PostgresBinaries::find(None).unwrap();
    let mut command = Command::new(binaries.program("pgbench"));
    command
        .args(options)
        .env("PGHOST", "127.0.0.1")
        .env("PGPORT", proxy.port().to_string())
        .env("PGUSER", login_of("acme"))
        .env("PGPASSWORD", password_of("acme"))
        .env("PGDATABASE", "acme")
        .env("PGSSLMODE", sslmode)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&[&*output.stderr, &*output.stdout].concat()).into_owned()
}
