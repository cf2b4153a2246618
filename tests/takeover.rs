//! A new process takes over from the running one: no client is refused, and sessions without TLS go on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::UnixDatagram,
    },
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use rustix::process::{Pid, Signal};
use support::{
    Client, Proxy, Wire,
    certificates::Authority,
    client::{in_time, in_words},
    proxy::{Caller, login_of},
    tls::connect_tls,
    wire::{PROTOCOL_3_0, bind, execute, message, parse, rows, ssl_request, startup_message, sync, tags},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_postgres::NoTls;

/// The socket at which the next process asks.
fn asking_place(proxy: &Proxy) -> PathBuf {
    proxy.folder().join(format!(".proxy.{}.takeover", proxy.port()))
}

#[tokio::test]
async fn a_session_goes_on_with_its_settings_statements_and_cancel_key() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    let client = proxy.client("acme").options("-c app.note=first").connect().await;
    client.run("SET TimeZone = 'Asia/Tokyo'; SET app.person = 'ann'").await;
    client.run("PREPARE by_sql (int) AS SELECT $1 * 2").await;
    let statement = client.prepare("SELECT $1::int + 1").await.unwrap();
    assert_eq!(client.query_one(&statement, &[&1]).await.unwrap().get::<_, i32>(0), 2);
    let cancel = client.cancel_token();

    let old = proxy.take_over().await;
    assert!(old.ended().await.success());

    assert_eq!(client.ask("SHOW TimeZone").await, "Asia/Tokyo");
    assert_eq!(client.ask("SHOW app.person").await, "ann");
    assert_eq!(client.ask("SHOW app.note").await, "first");
    assert_eq!(client.query_one(&statement, &[&41]).await.unwrap().get::<_, i32>(0), 42);
    assert_eq!(client.ask("EXECUTE by_sql (21)").await, "42");
    client.run("RESET app.note; DEALLOCATE by_sql").await;
    assert_eq!(client.ask("SHOW app.note").await, "first");
    let sleeping = client.refusal_of("SELECT pg_sleep(60)");
    let cancelling = async {
        let behind = proxy.behind("acme").await;
        let sleeps = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        in_time("a query sleeps", async { while behind.ask(sleeps).await == "0" {} }).await;
        cancel.cancel_query(NoTls).await.unwrap();
    };
    let (sqlstate, ()) = tokio::join!(sleeping, cancelling);
    assert_eq!(sqlstate, "57014");
    assert!(proxy.log().contains("moved to the process that takes over"));
}

/// A client may have prepared a statement, or sent half of a message, before the move.
#[tokio::test]
async fn an_unnamed_statement_and_half_a_message_go_along() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    let mut client = proxy.wire("acme").await;
    client.send_bytes(&[parse("", "SELECT 'unnamed'"), sync()].concat()).await;
    assert_eq!(tags(&client.until_ready().await), "1Z");
    let mut half = proxy.wire("acme").await;
    let query = message(b'Q', b"SELECT 'whole'\0");
    let (begin, rest) = query.split_at(7);
    half.send_bytes(begin).await;

    assert!(proxy.take_over().await.ended().await.success());

    client.send_bytes(&[bind("", "", &[]), execute("", 0), sync()].concat()).await;
    let answered = client.until_ready().await;
    assert_eq!(rows(&answered), [[Some("unnamed".to_owned())]]);
    half.send_bytes(rest).await;
    assert_eq!(rows(&half.until_ready().await), [[Some("whole".to_owned())]]);
}

#[tokio::test]
async fn a_transaction_ends_where_it_began_and_its_session_moves_then() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    proxy.client("acme").run("CREATE TABLE t (n int)").then_leave().await;
    let client = proxy.client("acme").connect().await;
    client.run("BEGIN; INSERT INTO t VALUES (1)").await;
    let server = client.server_pid().await;

    let mut old = proxy.take_over().await;

    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1", "the new process serves");
    assert!(old.is_running());
    assert_eq!(client.server_pid().await, server);
    client.run("INSERT INTO t VALUES (2); COMMIT").await;
    assert_eq!(client.ask("SELECT sum(n) FROM t").await, "3");
    assert!(old.ended().await.success());
}

/// What is only on a server, or in the state of TLS, cannot move.
#[tokio::test]
async fn a_session_that_cannot_move_ends_between_two_transactions() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    let pinned = proxy.client("acme").connect().await;
    pinned.run("CREATE TEMP TABLE t (n int)").await;
    let listening = proxy.client("acme").connect().await;
    listening.run("LISTEN news").await;
    let mut working = proxy.wire("acme").await;
    working.query("CREATE TEMP TABLE t (n int)").await;
    working.query("BEGIN").await;

    let old = proxy.take_over().await;

    assert_eq!(tags(&working.query("COMMIT").await), "CZ");
    let ended = working.until_end().await;
    assert_eq!(ended.last().map(|message| message.sqlstate()).as_deref(), Some("57P01"));
    assert!(pinned.try_run("SELECT 1").await.is_err() && listening.try_run("SELECT 1").await.is_err());
    assert!(old.ended().await.success());
}

#[tokio::test]
async fn sessions_of_a_service_login_stay_at_the_tenant_that_they_chose() {
    let mut proxy = Proxy::with_tenant("acme").and_tenant("shop").start().await;
    proxy.create_login("service", "secret", &["--service", "--tenants", "acme,shop"]);
    let client = proxy.caller("service", "secret", "acme").connect().await;
    client.run("SET pglobby.tenant = 'shop'").await;
    let database = client.ask("SELECT current_database()").await;

    assert!(proxy.take_over().await.ended().await.success());

    assert_eq!(client.ask("SELECT current_database()").await, database);
    assert_eq!(client.ask("SHOW pglobby.tenant").await, "shop");
    client.run("RESET pglobby.tenant").await;
    assert_eq!(client.ask("SHOW pglobby.tenant").await, "acme");
}

/// The state of TLS cannot be passed on. A login that is under way completes at the old process.
#[tokio::test]
async fn a_login_that_is_under_way_is_not_refused() {
    let folder = tempfile::tempdir().unwrap();
    Authority::new().write_server_files(folder.path(), &["localhost"]);
    let file = |name: &str| format!("{:?}", folder.path().join(name));
    let mut proxy = Proxy::with_tenant("acme")
        .config("client_tls_cert_file", &file("server.crt"))
        .config("client_tls_key_file", &file("server.key"))
        .start()
        .await;
    let mut client = Wire::open(proxy.port()).await;
    client.send_bytes(&ssl_request()).await;
    assert_eq!(client.receive_byte().await, b'S');
    let authority = folder.path().join("ca.crt");
    let mut tls = connect_tls(client.stream, &authority, "localhost", &[]).await.unwrap();

    let old = proxy.take_over().await;

    let startup = startup_message(PROTOCOL_3_0, &[("user", &login_of("acme")), ("database", "acme")]);
    tls.write_all(&startup).await.unwrap();
    let asked = in_time("the old process asks for the password", tls.read_u8()).await.unwrap();
    assert_eq!(asked, b'R');
    drop(tls);
    assert!(old.ended().await.success());
}

#[tokio::test]
async fn a_take_over_that_fails_changes_nothing() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    let client = proxy.client("acme").connect().await;
    let place = asking_place(&proxy);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let http = format!("\"127.0.0.1:{}\"", proxy.http_port());
    proxy.set_config("http.listen", &format!("\"{}\"", taken.local_addr().unwrap()));

    let failed = proxy.command_with(&["serve", "--take-over"], "");

    let words = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert!(!failed.status.success() && words.contains("for HTTP"), "{words}");
    proxy.logged("take-over failed; this process goes on").await;
    assert_eq!(client.ask("SELECT 1").await, "1");
    assert_eq!(proxy.client("acme").ask("SELECT 2").await, "2");
    assert!(place.metadata().unwrap().file_type().is_socket());
    proxy.set_config("http.listen", &http);
    assert!(proxy.take_over().await.ended().await.success());
    assert_eq!(client.ask("SELECT 3").await, "3");
}

#[tokio::test]
async fn a_second_process_is_refused_and_told_who_listens() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let place = asking_place(&proxy);
    assert_eq!(place.metadata().unwrap().permissions().mode() & 0o777, 0o600);

    let same = proxy.command_with(&["serve"], "");
    let words = String::from_utf8_lossy(&same.stderr).into_owned();
    let expected = format!("process {} serves this configuration already", proxy.pid());
    assert!(!same.status.success() && words.contains(&expected), "{words}");

    // Another installation.
    proxy.set_config("takeover_socket", &format!("{:?}", proxy.folder().join("other")));
    for http in ["\"127.0.0.1:0\"", "\"off\""] {
        proxy.set_config("http.listen", http);
        let other = proxy.command_with(&["serve"], "");
        let words = String::from_utf8_lossy(&other.stderr).into_owned();
        assert!(!other.status.success() && words.contains("Address already in use"), "{words}");
        if rustix::process::geteuid().is_root() {
            assert!(words.contains(&format!("(process {}) listens there", proxy.pid())), "{words}");
        }
    }
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
}

#[tokio::test]
async fn two_processes_may_share_a_port_if_both_are_told_so() {
    let proxy = Proxy::with_tenant("acme").config("so_reuseport", "true").start().await;
    let port = proxy.port().to_string();
    let beside = support::Node::beside(&proxy, &[("listen_port", &port)]).await;
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
    drop(beside);
}

/// The service manager is told the new main process. The new process has the program's arguments.
#[tokio::test]
async fn usr2_starts_a_process_that_takes_over_and_the_service_manager_is_told() {
    let unix = tempfile::Builder::new().prefix("pgl").tempdir_in("/tmp").unwrap();
    let dir = format!("{:?}", unix.path());
    let mut proxy = Proxy::with_tenant("acme").config("unix_socket_dir", &dir).start().await;
    let client = proxy.client("acme").connect().await;
    // Where `start` has listened for READY=1.
    let path = proxy.folder().join("notify");
    std::fs::remove_file(&path).unwrap();
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(30))).unwrap();

    proxy.signal(Signal::USR2);

    let heard = tokio::task::spawn_blocking(move || {
        let mut word = [0; 4096];
        let length = manager.recv(&mut word).unwrap();
        (String::from_utf8_lossy(&word[..length]).into_owned(), manager)
    });
    let (heard, manager) = heard.await.unwrap();
    assert!(heard.contains("READY=1\n"), "{heard}");
    let pid = heard.lines().find_map(|line| line.strip_prefix("MAINPID=")).unwrap().parse().unwrap();
    assert!(proxy.ended().await.success());
    assert_eq!(client.ask("SELECT 1").await, "1");
    let socket = unix.path().join(format!(".s.PGSQL.{}", proxy.port()));
    assert!(socket.exists(), "the socket's file belongs to the new process");
    manager.set_nonblocking(true).unwrap();
    assert!(manager.recv(&mut [0; 64]).is_err(), "the old process says nothing of stopping");
    rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    in_time("the socket's file is removed", async {
        while socket.exists() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

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
