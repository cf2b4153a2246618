//! Sessions that keep their server: how many may, and what `currval` and `lastval` are kept for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Proxy,
    client::in_time,
    console::shown,
    wire::{rows, tags},
};

/// One client that locked on every connection kept every server of its tenant, and everybody else waited; then it was ended
/// although nobody wanted its server.
#[tokio::test]
async fn the_session_that_keeps_one_server_too_many_is_ended_with_a_clear_error_once_somebody_waits() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).config("max_pinned_servers", "1").start().await;
    let (one, mut two, other) = (
        proxy.client("acme").connect().await,
        proxy.wire("acme").await,
        proxy.client("acme").connect().await,
    );
    one.run("SELECT pg_advisory_lock(1)").await;
    two.query("CREATE TABLE done (x int)").await;
    let answers = two.query("INSERT INTO done VALUES (1); SELECT pg_advisory_lock(2)").await;
    assert_eq!(tags(&answers), "CTDCZ", "what it asked for is done and answered");
    // As long as nobody waits it goes on.
    assert_eq!(tags(&two.query("SELECT pg_advisory_lock(3)").await), "TDCZ");
    assert_eq!(proxy.console().await.ask_all("SHOW PINS").await.len(), 2);
    for _ in 0..3 {
        assert_eq!(other.ask("SELECT count(*) FROM done").await, "1");
    }
    let last = two.until_end().await.pop().expect("a last word");
    assert_eq!((last.field(b'S').unwrap().as_str(), last.sqlstate().as_str()), ("FATAL", "53300"));
    assert!(last.field(b'M').unwrap().contains("advisory_lock"), "{last:?}");
    // What a transaction has left is known before the session's next one begins.
    one.run("SELECT pg_advisory_unlock(1)").await.run("SELECT 1").await;
    other.run("SELECT pg_advisory_lock(1), pg_advisory_lock(2)").await.run("SELECT 1").await;
    assert_eq!(proxy.console().await.ask_all("SHOW PINS").await.len(), 1);
}

/// In a transaction it was told nothing, and found out when it was over.
#[tokio::test]
async fn the_session_that_is_one_too_many_may_end_its_transaction_while_somebody_waits() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).config("max_pinned_servers", "1").start().await;
    let one = proxy.client("acme").connect().await;
    let (mut two, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    one.run("CREATE TABLE done (x int); SELECT pg_advisory_lock(1)").await;
    two.query("SELECT pg_advisory_lock(2)").await;
    two.query("BEGIN").await;
    other.send(b'Q', b"SELECT count(*) FROM done\0").await;
    shown(&proxy.console().await, "POOLS", "cl_waiting", "1").await;
    two.query("INSERT INTO done VALUES (1)").await;
    assert_eq!(tags(&two.query("COMMIT").await), "CZ");
    assert_eq!(two.until_end().await.pop().expect("a last word").sqlstate(), "53300");
    assert_eq!(rows(&other.until_ready().await), [[Some("1".to_owned())]]);
}

/// PDO's lastInsertId: four clients on two servers waited for each other for ever.
#[tokio::test]
async fn clients_that_read_lastval_after_each_insert_give_way_to_each_other() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let first = proxy.client("acme").connect().await;
    first.run("CREATE TABLE t (id serial, x int); INSERT INTO t (x) VALUES (0); SELECT lastval()").await;
    first.leave().await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(proxy.client("acme").connect().await);
    }
    for round in 0..5 {
        for (number, client) in clients.iter().enumerate() {
            let x = 10 * round + number;
            client.run(&format!("INSERT INTO t (x) VALUES ({x})")).await;
            let id = client.ask("SELECT lastval()").await;
            assert_eq!(client.ask(&format!("SELECT x FROM t WHERE id = {id}")).await, x.to_string());
        }
    }
    // Who inserts and comes back for the value only when others had to have the server gets none, and nobody else's.
    for client in &clients {
        client.run("INSERT INTO t (x) VALUES (0)").await;
    }
    for client in &clients[..2] {
        assert_eq!(client.refusal_of("SELECT lastval()").await, "55000");
    }
}

/// DBD::Pg's last_insert_id and PDO's lastInsertId: the first `lastval` that any client of a tenant asked for found nothing.
#[tokio::test]
async fn the_first_lastval_of_a_tenant_finds_what_was_inserted() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let (one, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    one.run("CREATE TABLE t (id serial, x int)").await;
    one.run("INSERT INTO t (x) VALUES (1)").await;
    // Takes the server that came back last, if any did.
    other.run("BEGIN").await;
    one.run("SELECT pg_get_serial_sequence('t', 'id')").await;
    assert_eq!(one.ask("SELECT lastval()").await, "1");
}

/// Who never asks does not keep servers from others for long.
#[tokio::test]
async fn a_session_that_never_reads_lastval_keeps_no_server_after_a_few_inserts() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let (one, console) = (proxy.client("acme").connect().await, proxy.console().await);
    one.run("CREATE TABLE t (x int)").await;
    for _ in 0..8 {
        one.run("INSERT INTO t VALUES (1)").await;
        assert_eq!(console.ask_all("SHOW PINS").await.len(), 1);
        for _ in 0..3 {
            one.run("SELECT x FROM t").await;
        }
        assert_eq!(console.ask_all("SHOW PINS").await.len(), 0);
    }
    one.run("INSERT INTO t VALUES (1)").await;
    assert_eq!(console.ask_all("SHOW PINS").await.len(), 0);
}

/// Two sessions that took a number in turn on one server waited until the wait was over.
#[tokio::test]
async fn sessions_that_advance_a_sequence_take_turns_on_one_server() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (one, two) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    one.run("CREATE SEQUENCE s; SELECT nextval('s'); SELECT currval('s')").await;
    for _ in 0..5 {
        for client in [&one, &two] {
            client.run("SELECT nextval('s')").await;
        }
        for client in [&one, &two] {
            client.run("DISCARD ALL").await;
        }
    }
}

/// Another session's `nextval` was what a session's `lastval` told.
#[tokio::test]
async fn currval_and_lastval_tell_what_their_own_session_did_or_nothing() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let acme = proxy.client("acme");
    let one = acme.connect().await;
    one.run("CREATE SEQUENCE s; CREATE TABLE t (id serial, x int)").await;
    one.run("SELECT nextval('s')").await;
    let other = acme.connect().await;
    assert_eq!(other.refusal_of("SELECT lastval()").await, "55000");
    assert_eq!(other.refusal_of("SELECT currval('s')").await, "55000");
    other.leave().await;
    one.run("SELECT nextval('s')").await;
    assert_eq!(one.ask("SELECT currval('s') = (SELECT last_value FROM s)").await, "t");
}

/// PostgreSQL's test `constraints`, on a busy machine: a session that came back to a server found there what `nextval` had given it
/// before it gave the last value elsewhere.
#[tokio::test]
async fn currval_never_tells_an_older_value_of_its_own() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let acme = proxy.client("acme");
    let (one, other) = (acme.connect().await, acme.connect().await);
    other.run("CREATE SEQUENCE s; SELECT nextval('s'); SELECT currval('s')").await;
    other.run("DISCARD ALL").await;
    let console = proxy.console().await;
    let advance = async || {
        let server = one.ask("SELECT pg_backend_pid() + 0 * nextval('s')").await;
        let kept = async {
            while !console.ask_all("SHOW PINS").await.is_empty() {
                one.run("SELECT 1").await;
            }
        };
        in_time("a server that is kept in vain", kept).await;
        server
    };
    other.run("BEGIN").await;
    let first = advance().await;
    other.run("COMMIT").await;
    let second = advance().await;
    assert_ne!(first, second, "the server that was given back last is the next to be lent");
    other.run("BEGIN; SELECT 1").await;
    assert_eq!(one.refusal_of("SELECT currval('s')").await, "55000");
}

/// `lastInsertId()`: an INSERT, and `lastval()` in a transaction of its own, while others do the same.
#[tokio::test]
async fn an_insert_keeps_its_server_for_the_lastval_behind_it() {
    let proxy = Proxy::with_tenant("acme").pool_size(4).start().await;
    let (one, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    one.run("CREATE TABLE t (id serial, x int); INSERT INTO t (x) VALUES (0); SELECT lastval()").await;
    one.run("DISCARD ALL").await;
    for number in 1..5 {
        one.run(&format!("INSERT INTO t (x) VALUES ({number})")).await;
        other.run(&format!("INSERT INTO t (x) VALUES ({})", 100 + number)).await;
        for (client, x) in [(&one, number), (&other, 100 + number)] {
            let id = client.ask("SELECT lastval()").await;
            assert_eq!(client.ask(&format!("SELECT x FROM t WHERE id = {id}")).await, x.to_string());
            client.run("DISCARD ALL").await;
        }
    }
    one.run("INSERT INTO t (x) VALUES (9)").await;
    assert_eq!(proxy.console().await.ask_all("SHOW PINS").await.len(), 1);
    for _ in 0..3 {
        one.run("SELECT 1").await;
    }
    assert_eq!(proxy.console().await.ask_all("SHOW PINS").await.len(), 0);
}
