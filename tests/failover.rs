//! A tenant's host that restarts, crashes, or fails over to its standby under load: clients wait, and every write that was
//! acknowledged is there once. Only what was in flight when the host went may be an error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use rustix::process::{Pid, Signal, kill_process};
use support::{
    Client, Cluster, Proxy,
    client::{in_time, in_words},
    console::{show, shown},
    proxy::{Builder, Caller, login_of, password_of},
    wire::{bind, execute, message, parse, rows, sync, tags},
};
use tokio::{sync::watch, task::JoinSet};

const CLIENTS: usize = 8;
/// Writes that each client is to have acknowledged before and after what happens to the host.
const SOME: usize = 25;

/// The tenant `acme` on a host of its own.
async fn proxy_with(builder: Builder, addresses: &[&Cluster]) -> Proxy {
    let proxy = builder.start().await;
    let list: Vec<String> = addresses.iter().map(|cluster| format!("127.0.0.1:{}", cluster.port())).collect();
    let arguments =
        ["host", "add", "own", "--address", &list.join(","), "--admin-user", "master", "--password-stdin"];
    let added = proxy.command_with(&arguments, support::cluster::MASTER_PASSWORD);
    assert!(added.status.success(), "{}", String::from_utf8_lossy(&added.stderr));
    proxy.command(&["tenant", "create", "acme", "--host", "own"]);
    proxy.create_login(&login_of("acme"), &password_of("acme"), &["--tenant", "acme"]);
    proxy.client("acme").run("CREATE TABLE writes (client int, number int)").then_leave().await;
    proxy
}

/// A primary that acknowledges a commit when its standby has it on disk, and this standby.
async fn replicated() -> (Cluster, Cluster) {
    let primary = Cluster::build().setting("synchronous_commit", "on").start();
    let standby = Cluster::build().start_as_standby_of(&primary).await;
    let master = primary.client("postgres").await;
    master.run("ALTER SYSTEM SET synchronous_standby_names = '*'").await;
    master.run("SELECT pg_reload_conf()").await;
    in_time("synchronous replication", async {
        while master.ask("SELECT sync_state FROM pg_stat_replication").await != "sync" {
            tokio::task::yield_now().await;
        }
    })
    .await;
    (primary, standby)
}

/// What became of a client's write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Acknowledged,
    /// It is not there: its transaction had not been told to commit.
    Refused,
    /// The answer to its commit did not come.
    Unknown,
}

#[derive(Debug)]
struct Write {
    client: usize,
    number: usize,
    began: Instant,
    outcome: Outcome,
    /// The error.
    #[expect(dead_code, reason = "for a test that fails")]
    said: String,
}

/// Clients that insert numbered rows, each on its own, until they are told to stop.
struct Load {
    writes: Arc<Mutex<Vec<Write>>>,
    acknowledged: Arc<[AtomicUsize; CLIENTS]>,
    stop: watch::Sender<bool>,
    clients: JoinSet<()>,
}

impl Load {
    async fn begin(proxy: &Proxy) -> Self {
        let (stop, stopped) = watch::channel(false);
        let mut load =
            Self { writes: Arc::default(), acknowledged: Arc::default(), stop, clients: JoinSet::new() };
        for client in 0..CLIENTS {
            let (caller, writes) = (proxy.client("acme"), load.writes.clone());
            let (acknowledged, stopped) = (load.acknowledged.clone(), stopped.clone());
            load.clients.spawn(async move {
                let mut connection = caller.connect().await;
                for number in 0.. {
                    if *stopped.borrow() {
                        break;
                    }
                    let began = Instant::now();
                    let (outcome, said) = match write(&connection, client, number).await {
                        Ok(()) => (Outcome::Acknowledged, String::new()),
                        Err((outcome, error)) => (outcome, in_words(&error)),
                    };
                    if outcome == Outcome::Acknowledged {
                        acknowledged[client].fetch_add(1, Ordering::Relaxed);
                    } else {
                        connection = again(connection, &caller).await;
                    }
                    writes.lock().unwrap().push(Write { client, number, began, outcome, said });
                }
            });
        }
        load.some_more().await;
        load
    }

    /// Waits until each client has had [`SOME`] more writes acknowledged.
    async fn some_more(&mut self) {
        let now: Vec<usize> = self.acknowledged.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        let more = async {
            let done = |client: usize, before: usize| {
                self.acknowledged[client].load(Ordering::Relaxed) >= before + SOME
            };
            while !now.iter().enumerate().all(|(client, before)| done(client, *before)) {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = in_time("some more writes of each client", more) => {}
            Some(ended) = self.clients.join_next() => ended.unwrap(),
        }
    }

    /// Stops the clients. Checks that what they were told is true, and that no write that began after `gone` was refused.
    async fn end(mut self, proxy: &Proxy, gone: &[(Instant, Instant)]) {
        self.stop.send_replace(true);
        while let Some(ended) = in_time("the clients' end", self.clients.join_next()).await {
            ended.unwrap();
        }
        let mut there: BTreeMap<(usize, usize), usize> = BTreeMap::new();
        let rows = proxy.client("acme").connect().await.ask_all("SELECT client, number FROM writes").await;
        for row in rows {
            let column = |at: usize| row[at].as_deref().unwrap().parse::<usize>().unwrap();
            *there.entry((column(0), column(1))).or_default() += 1;
        }
        let writes = self.writes.lock().unwrap();
        for write in writes.iter() {
            let count = there.remove(&(write.client, write.number)).unwrap_or(0);
            let is_true = match write.outcome {
                Outcome::Acknowledged => count == 1,
                Outcome::Refused => count == 0,
                Outcome::Unknown => count <= 1,
            };
            assert!(is_true, "{write:?} is there {count} times");
            let in_flight = gone
                .iter()
                .any(|(before, after)| write.began <= *after && write.began >= *before - IN_FLIGHT);
            assert!(write.outcome == Outcome::Acknowledged || in_flight, "no server was there: {write:?}");
        }
        assert!(there.is_empty(), "never written: {there:?}");
        let failed: Vec<&Write> =
            writes.iter().filter(|write| write.outcome != Outcome::Acknowledged).collect();
        assert!(failed.len() <= CLIENTS * gone.len(), "{failed:?}");
    }
}

/// Longer than a write takes on a busy machine.
const IN_FLIGHT: std::time::Duration = std::time::Duration::from_secs(5);

/// A statement of its own, or a transaction of three.
async fn write(
    connection: &Client,
    client: usize,
    number: usize,
) -> Result<(), (Outcome, tokio_postgres::Error)> {
    let insert = format!("INSERT INTO writes VALUES ({client}, {number})");
    let outcome = |outcome| move |error| (outcome, error);
    match client % 2 {
        0 => connection.try_run(&insert).await.map_err(outcome(Outcome::Unknown)),
        _ => {
            connection.try_run("BEGIN").await.map_err(outcome(Outcome::Refused))?;
            connection.try_run(&insert).await.map_err(outcome(Outcome::Refused))?;
            connection.try_run("COMMIT").await.map_err(outcome(Outcome::Unknown))
        }
    }
}

/// The same connection where it is open, or a new one, which must not be refused.
async fn again(mut connection: Client, caller: &Caller) -> Client {
    if connection.try_run("ROLLBACK").await.is_ok() {
        return connection;
    }
    connection.closed().await;
    caller.connect().await
}

/// Waits until so many clients wait for a server.
async fn held(proxy: &Proxy, clients: i64) {
    let console = proxy.console().await;
    in_time("clients that wait", async {
        loop {
            let pools = show(&console, "POOLS").await;
            let waiting: i64 = pools.iter().map(|pool| pool["cl_waiting"].parse::<i64>().unwrap()).sum();
            if waiting >= clients {
                return;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// Does something to the host; between which moments.
fn timed(act: impl FnOnce()) -> (Instant, Instant) {
    let before = Instant::now();
    act();
    (before, Instant::now())
}

/// There were 740 errors in 3.7 seconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_a_host_that_restarts_wait_for_it() {
    let mut host = Cluster::build().setting("synchronous_commit", "on").start();
    let proxy = proxy_with(Proxy::build().pool_size(4), &[&host]).await;
    let mut load = Load::begin(&proxy).await;
    let mut gone = Vec::new();
    let stops: [fn(&mut Cluster); 3] = [Cluster::stop, Cluster::stop_at_once, Cluster::kill_9];
    for stop in stops {
        gone.push(timed(|| stop(&mut host)));
        // All but those whose transaction was open: these reconnect, and wait at their login.
        held(&proxy, 1).await;
        assert_eq!(proxy.metric(r#"pglobby_host_away{host="own"}"#).await, 1.0);
        host.start_again();
        load.some_more().await;
    }
    load.end(&proxy, &gone).await;
    assert_eq!(proxy.metric(r#"pglobby_host_away{host="own"}"#).await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_a_host_that_fails_over_go_on_at_its_standby() {
    let (mut primary, standby) = replicated().await;
    let proxy = proxy_with(Proxy::build().pool_size(4), &[&primary, &standby]).await;
    let checked = proxy.command(&["check"]);
    assert!(checked.contains("(primary)") && checked.contains("(standby)"), "{checked}");
    let mut load = Load::begin(&proxy).await;

    let gone = timed(|| primary.stop_at_once());
    held(&proxy, 1).await;
    standby.promote().await;

    load.some_more().await;
    load.end(&proxy, &[gone]).await;
    proxy.logged("another address of the host is its primary").await;
    assert_eq!(proxy.metric(r#"pglobby_host_primary_changes_total{host="own"}"#).await, 1.0);
    let console = proxy.console().await;
    let hosts = show(&console, "HOSTS").await;
    let own = hosts.iter().find(|host| host["name"] == "own").unwrap();
    assert_eq!(own["primary"], format!("127.0.0.1:{}", standby.port()));
    // Operators' commands find it as well.
    proxy.command(&["tenant", "create", "globex", "--host", "own"]);
    let checked = String::from_utf8_lossy(&proxy.command_with(&["check"], "").stdout).into_owned();
    assert!(checked.contains("without it, a failover has one server less to go to"), "{checked}");
}

/// A switch-over: the primary is stopped in order, its standby promoted, and the old one comes back as its standby.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_go_where_the_primary_is_and_back() {
    let (mut first, mut second) = replicated().await;
    let proxy = proxy_with(Proxy::build().pool_size(4), &[&first, &second]).await;
    let mut load = Load::begin(&proxy).await;

    let gone = timed(|| first.stop());
    second.promote().await;
    load.some_more().await;
    first.follow(&second);
    let console = proxy.console().await;
    // Servers that are opened from now on find both, and take the primary.
    console.run("RECONNECT").await;
    load.some_more().await;
    let checked = proxy.command(&["check"]);
    assert!(checked.contains("(primary)") && checked.contains("(standby)"), "{checked}");

    let back = timed(|| second.stop());
    first.promote().await;
    load.some_more().await;
    load.end(&proxy, &[gone, back]).await;
    assert_eq!(proxy.metric(r#"pglobby_host_primary_changes_total{host="own"}"#).await, 2.0);
}

/// A stop that waits for the clients: servers that are open go on, and clients that need another one wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_stops_when_it_is_free_refuses_nobody() {
    let mut host = Cluster::build().setting("synchronous_commit", "on").start();
    let proxy = proxy_with(Proxy::build().pool_size(4), &[&host]).await;
    let mut load = Load::begin(&proxy).await;
    let gone = timed(|| host.begin_smart_stop());
    load.some_more().await;
    // Each server is closed when it comes back.
    proxy.console().await.run("RECONNECT").await;
    host.stopped().await;
    held(&proxy, CLIENTS as i64).await;
    host.start_again();
    load.some_more().await;
    let failed =
        load.writes.lock().unwrap().iter().filter(|write| write.outcome != Outcome::Acknowledged).count();
    assert_eq!(failed, 0);
    load.end(&proxy, &[gone]).await;
}

/// What is wrong with the tenant, and not with the host, is told at once; so is everything where holding is off.
#[tokio::test]
async fn clients_wait_only_for_a_host_that_is_away() {
    let mut host = Cluster::start();
    let builder = Proxy::build().config("hold_during_outage", "false").config("query_wait_timeout", "\"1h\"");
    let proxy = proxy_with(builder, &[&host]).await;
    let client = proxy.client("acme").connect().await;
    host.stop();
    assert_eq!(client.refusal_of("SELECT 1").await, "08006");

    proxy.set_config("hold_during_outage", "true");
    proxy.signal(Signal::HUP);
    proxy.logged("configuration reloaded").await;
    let waits = client.ask("SELECT 1");
    let starts = async {
        held(&proxy, 1).await;
        host.start_again();
    };
    assert_eq!(tokio::join!(waits, starts).0, "1");
    client.run("SELECT 1").await;
    let console = proxy.console().await;
    let master = host.client("postgres").await;
    let database = client.ask("SELECT current_database()").await;
    console.run("RECONNECT").await;
    let end =
        format!("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '{database}'");
    master.run(&end).await;
    master.run(&format!("ALTER DATABASE \"{database}\" RENAME TO elsewhere")).await;
    assert_eq!(client.refusal_of("SELECT 1").await, "3D000");
}

/// The wait has an end, and the client reads why.
#[tokio::test]
async fn a_client_that_waits_too_long_for_its_host_is_told_why() {
    let mut host = Cluster::start();
    let proxy = proxy_with(Proxy::build().config("query_wait_timeout", "\"500ms\""), &[&host]).await;
    let client = proxy.client("acme").connect().await;
    client.run("SELECT 1").await;
    host.stop();
    let error = client.try_run("SELECT 1").await.expect_err("no server");
    assert!(in_words(&error).contains("connection refused"), "{}", in_words(&error));
    host.start_again();
    assert_eq!(client.ask("SELECT 1").await, "1");
}

/// A statement crosses the last words of its server, which never reads it: another server answers. What a server has read is
/// not repeated.
#[tokio::test]
async fn a_statement_that_its_server_has_not_read_is_answered_by_another_one() {
    let builder = Proxy::with_tenant("acme").pool_size(1).config("log.level", "\"debug\"");
    let proxy = builder.start().await;
    proxy.client("acme").run("CREATE TABLE t (x int)").then_leave().await;
    let mut client = proxy.wire("acme").await;
    let console = proxy.console().await;
    let named = [parse("named", "INSERT INTO t VALUES (3)"), sync()].concat();
    client.send_bytes(&named).await;
    assert_eq!(tags(&client.until_ready().await), "1Z");
    let whole = |name: &str| [bind("", name, &[]), execute("", 0), sync()].concat();
    let requests = [
        message(b'Q', b"INSERT INTO t VALUES (1)\0"),
        [parse("", "INSERT INTO t VALUES (2)"), whole("")].concat(),
        whole("named"),
    ];
    for (request, answer) in requests.iter().zip(["CZ", "12CZ", "2CZ"]) {
        // Twice: the second is answered when what the first may have left behind is known.
        client.query("SELECT pg_backend_pid()").await;
        let pid = rows(&client.query("SELECT pg_backend_pid()").await)[0][0].clone().unwrap();
        let signal = |signal| kill_process(Pid::from_raw(pid.parse().unwrap()).unwrap(), signal).unwrap();
        signal(Signal::STOP);
        in_time("a server that is stopped", async {
            let stat = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            while !stat().contains(") T ") {
                tokio::task::yield_now().await;
            }
        })
        .await;
        signal(Signal::TERM);
        client.send_bytes(request).await;
        shown(&console, "SERVERS", "state", "active").await;
        signal(Signal::CONT);
        assert_eq!(tags(&client.until_ready().await), answer);
    }
    assert_eq!(
        rows(&client.query("SELECT count(*), sum(x) FROM t").await)[0],
        [Some("3".into()), Some("6".into())]
    );
    assert_eq!(proxy.log().matches("statement sent again: its server had not read it").count(), 3);
}

/// A session that keeps its server for `currval` only, and nothing of whose is under way, does not end with it.
#[tokio::test]
async fn a_session_that_keeps_a_server_for_its_sequences_outlives_it() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    let mut client = proxy.wire("acme").await;
    client.query("CREATE TABLE t (x serial)").await;
    client.query("INSERT INTO t DEFAULT VALUES").await;
    client.query("SELECT currval('t_x_seq')").await;
    let console = proxy.console().await;
    let pinned =
        async || show(&console, "PINS").await.iter().any(|pin| pin["reasons"].starts_with("sequence"));
    in_time("a session that keeps its server", async { while !pinned().await {} }).await;

    proxy.cluster.restart();

    assert_eq!(tags(&client.query("INSERT INTO t DEFAULT VALUES").await), "CZ");
    assert_eq!(rows(&client.query("SELECT count(*) FROM t").await)[0], [Some("2".into())]);
}
