//! A new process takes over from the running one: no client is refused, and sessions go on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::UnixDatagram,
    },
    path::PathBuf,
    time::Duration,
};

use rustix::process::{Pid, Signal};
use support::{
    Proxy, Wire,
    certificates::Authority,
    client::in_time,
    proxy::login_of,
    tls::connect_tls,
    wire::{PROTOCOL_3_0, bind, execute, message, parse, rows, ssl_request, startup_message, sync, tags},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::oneshot::{self, error::TryRecvError},
};
use tokio_postgres::NoTls;
use tokio_rustls::client::TlsStream;

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

/// Each notification arrives once, in order, whichever process listens at the moment.
#[tokio::test]
async fn a_session_that_listens_misses_no_notification() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    let mut listening = proxy.client("acme").connect().await;
    listening.run("LISTEN news; LISTEN \"Other\"").await;
    let sender = proxy.behind("acme").await;
    let (stop, mut stopped) = oneshot::channel::<()>();
    let sending = tokio::spawn(async move {
        let mut sent = 0;
        while stopped.try_recv() == Err(TryRecvError::Empty) {
            sender.run(&format!("NOTIFY news, '{sent}'")).await;
            sent += 1;
        }
        sent
    });

    for _ in 0..3 {
        assert!(proxy.take_over().await.ended().await.success());
    }

    drop(stop);
    for number in 0..sending.await.unwrap() {
        assert_eq!(listening.notification().await.payload(), number.to_string());
    }
    listening
        .run("NOTIFY news, 'own'; UNLISTEN news; NOTIFY news, 'unheard'; NOTIFY \"Other\", 'heard'")
        .await;
    let heard = listening.notification().await;
    assert_eq!(heard.payload(), "heard");
    assert!(proxy.log().contains("moved to the process that takes over"));
}

/// What is only on a server cannot move.
#[tokio::test]
async fn a_session_that_cannot_move_ends_between_two_transactions() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    let pinned = proxy.client("acme").connect().await;
    pinned.run("CREATE TEMP TABLE t (n int)").await;
    let mut working = proxy.wire("acme").await;
    working.query("CREATE TEMP TABLE t (n int)").await;
    working.query("BEGIN").await;

    let old = proxy.take_over().await;

    assert_eq!(tags(&working.query("COMMIT").await), "CZ");
    let ended = working.until_end().await;
    assert_eq!(ended.last().map(|message| message.sqlstate()).as_deref(), Some("57P01"));
    assert!(pinned.try_run("SELECT 1").await.is_err());
    assert!(old.ended().await.success());
}

#[tokio::test]
async fn sessions_of_a_service_login_stay_at_the_tenant_that_they_chose() {
    let mut proxy = Proxy::with_tenant("acme").and_tenant("shop").start().await;
    proxy.create_login("service", "secret", &["--service", "--tenants", "acme,shop"]);
    let client = proxy.caller("service", "secret", "acme").connect().await;
    client.run("SET pglobby.tenant = 'shop'").await;
    let database = client.ask("SELECT current_database()").await;
    let undecided = proxy.caller("service", "secret", "service").connect().await;
    assert_eq!(undecided.ask("SHOW pglobby.tenant").await, "");

    assert!(proxy.take_over().await.ended().await.success());

    assert_eq!(client.ask("SELECT current_database()").await, database);
    assert_eq!(client.ask("SHOW pglobby.tenant").await, "shop");
    client.run("RESET pglobby.tenant").await;
    assert_eq!(client.ask("SHOW pglobby.tenant").await, "acme");
    undecided.run("SET pglobby.tenant = 'shop'").await;
    assert_eq!(undecided.ask("SELECT current_database()").await, database);
}

/// A proxy with a certificate, and the folder of its authority.
async fn proxy_with_tls(timeout: &str) -> (Proxy, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    Authority::new().write_server_files(folder.path(), &["localhost"]);
    let file = |name: &str| format!("{:?}", folder.path().join(name));
    let proxy = Proxy::with_tenant("acme")
        .config("client_tls_cert_file", &file("server.crt"))
        .config("client_tls_key_file", &file("server.key"))
        .config("takeover_tls_timeout", timeout)
        .start()
        .await;
    (proxy, folder)
}

/// A TLS connection that has sent nothing yet.
async fn open_tls(proxy: &Proxy, folder: &tempfile::TempDir) -> TlsStream<TcpStream> {
    let mut client = Wire::open(proxy.port()).await;
    client.send_bytes(&ssl_request()).await;
    assert_eq!(client.receive_byte().await, b'S');
    connect_tls(client.stream, &folder.path().join("ca.crt"), "localhost", &[]).await.unwrap()
}

/// An ordinary client over TLS.
async fn client_with_tls(proxy: &Proxy, folder: &tempfile::TempDir) -> tokio_postgres::Client {
    let tls = open_tls(proxy, folder).await;
    let config = proxy.client("acme").config;
    let (client, connection) = config.connect_raw(tls, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

async fn ask(client: &tokio_postgres::Client, sql: &str) -> String {
    in_time(sql, client.query_one(sql, &[])).await.unwrap().get(0)
}

/// The process before goes on to encrypt and decrypt, also for a session that moves again.
#[tokio::test]
async fn a_client_with_tls_notices_nothing() {
    let (mut proxy, folder) = proxy_with_tls("\"1h\"").await;
    let client = client_with_tls(&proxy, &folder).await;
    client.batch_execute("SET app.person = 'ann'").await.unwrap();

    let mut first = proxy.take_over().await;
    assert_eq!(ask(&client, "SELECT current_setting('app.person')").await, "ann");
    proxy.logged("passing on the bytes of sessions with TLS").await;
    let second = proxy.take_over().await;
    assert!(second.ended().await.success());
    let long = ask(&client, "SELECT repeat('x', 3000000) || current_setting('app.person')").await;
    assert!(long.len() == 3_000_003 && long.ends_with("ann"));
    assert!(first.is_running());
    let console = proxy.console().await;
    let clients = console.ask_all("SHOW CLIENTS").await;
    let shown = clients.iter().flatten().flatten().any(|value| value.contains("TLS"));
    assert!(shown, "{clients:?}");
    drop(client);
    assert!(first.ended().await.success());
}

#[tokio::test]
async fn a_client_with_tls_ends_between_two_transactions_when_the_time_is_over() {
    let (mut proxy, folder) = proxy_with_tls("\"300ms\"").await;
    let client = client_with_tls(&proxy, &folder).await;
    client.batch_execute("SET app.person = 'ann'").await.unwrap();
    let first = proxy.take_over().await;
    proxy.logged("passing on the bytes of sessions with TLS").await;
    client.batch_execute("BEGIN").await.unwrap();
    assert_eq!(ask(&client, "SELECT pg_sleep(0.5)::text").await, "");
    client.batch_execute("COMMIT").await.unwrap();
    in_time("the connection is closed", async {
        while !client.is_closed() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(first.ended().await.success());
}

#[tokio::test]
async fn a_client_with_tls_ends_at_the_take_over_where_nothing_is_passed_on() {
    let (mut proxy, folder) = proxy_with_tls("\"off\"").await;
    let client = client_with_tls(&proxy, &folder).await;
    client.batch_execute("BEGIN").await.unwrap();
    let old = proxy.take_over().await;
    client.batch_execute("COMMIT").await.unwrap();
    assert!(old.ended().await.success());
    assert!(client.batch_execute("SELECT 1").await.is_err());
}

/// A login that is under way completes at the old process.
#[tokio::test]
async fn a_login_that_is_under_way_is_not_refused() {
    let (mut proxy, folder) = proxy_with_tls("\"1h\"").await;
    let mut tls = open_tls(&proxy, &folder).await;

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
    let mut proxy = Proxy::with_tenant("acme").start().await;
    let place = asking_place(&proxy);
    assert_eq!(place.metadata().unwrap().permissions().mode() & 0o777, 0o600);

    for taken_over in [false, true] {
        if taken_over {
            assert!(proxy.take_over().await.ended().await.success());
        }
        let same = proxy.command_with(&["serve"], "");
        let words = String::from_utf8_lossy(&same.stderr).into_owned();
        let expected = format!("process {} serves this configuration already", proxy.pid());
        assert!(!same.status.success() && words.contains(&expected), "{words}");
    }

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
