//! A tenant's life under open sessions: what plain SQL on the central database changes takes effect at once, and what
//! happens to the central database itself does not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use rustix::process::Signal;
use support::{
    Proxy, Wire,
    client::in_time,
    proxy::{login_of, password_of},
    wire::tags,
};

/// The last word to a session that ends.
async fn end_of(wire: &mut Wire) -> String {
    wire.until_end().await.last().expect("a last word").sqlstate()
}

async fn two_tenants() -> Proxy {
    Proxy::with_tenant("acme").and_tenant("blue").pool_size(2).start().await
}

#[tokio::test]
async fn suspending_a_tenant_by_plain_sql_ends_its_sessions_and_nobody_elses() {
    let proxy = two_tenants().await;
    let central = proxy.cluster.client("central").await;
    let (mut idle, mut open, mut other) =
        (proxy.wire("acme").await, proxy.wire("acme").await, proxy.wire("blue").await);
    idle.query("SELECT 1").await;
    open.query("BEGIN").await;
    other.query("BEGIN").await;

    central.run("UPDATE pglobby.tenants SET status = 'suspended' WHERE name = 'acme'").await;

    assert_eq!(end_of(&mut idle).await, "57P01");
    assert_eq!(end_of(&mut open).await, "57P01");
    assert_eq!(tags(&other.query("COMMIT").await), "CZ");
    assert_eq!(proxy.client("acme").refusal().await, "57P03");

    central.run("UPDATE pglobby.tenants SET status = 'active' WHERE name = 'acme'").await;
    in_time("the tenant's return", async { while proxy.client("acme").try_connect().await.is_err() {} })
        .await;
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_revoked_login_ends_its_sessions_and_logs_in_no_more() {
    let changes = [
        "UPDATE pglobby.logins SET disabled_at = now() WHERE name = 'second'",
        "UPDATE pglobby.logins SET valid_until = now() - interval '1 second' WHERE name = 'second'",
        "DELETE FROM pglobby.logins WHERE name = 'second'",
    ];
    for change in changes {
        let proxy = two_tenants().await;
        proxy.create_login("second", "second secret", &["--tenant", "acme"]);
        let mut second = Wire::login(proxy.port(), "second", "second secret", "acme").await;
        second.query("SELECT 1").await;
        let mut first = proxy.wire("acme").await;
        proxy.cluster.client("central").await.run(change).await;
        assert_eq!(end_of(&mut second).await, "57P01", "{change}");
        assert_eq!(proxy.caller("second", "second secret", "acme").refusal().await, "28P01", "{change}");
        assert_eq!(tags(&first.query("SELECT 1").await), "TDCZ");
    }
}

/// A changed limit or password concerns new transactions; whoever is connected stays.
#[tokio::test]
async fn rotating_the_password_and_changing_the_pool_keep_sessions_and_their_state() {
    let proxy = two_tenants().await;
    let client = proxy.client("acme").connect().await;
    let open = proxy.client("acme").connect().await;
    client.run("SET my.note = 'kept'").await;
    let statement = in_time("preparing", client.prepare("SELECT current_setting('my.note')")).await.unwrap();
    open.run("BEGIN; CREATE TABLE t (x int)").await;
    let mut servers = Vec::new();
    for change in 0..3 {
        match change {
            0 => drop(proxy.command(&["tenant", "rotate", "acme"])),
            1 => drop(proxy.command(&["tenant", "set", "acme", "pool_size=1"])),
            _ => drop(proxy.command(&["tenant", "set", "acme", "pool_mode=transaction"])),
        }
        if change == 0 {
            // The transaction that was open ends as it was meant to.
            open.run("INSERT INTO t VALUES (1); COMMIT").await;
        }
        let note: String = in_time("asking", client.query_one(&statement, &[])).await.unwrap().get(0);
        assert_eq!(note, "kept");
        servers.push(client.server_pid().await);
    }
    assert_eq!(open.ask("SELECT count(*) FROM t").await, "1");
}

/// Sessions, and logins that are known, do not need the central database.
#[tokio::test]
async fn without_the_central_database_whoever_is_known_goes_on() {
    let proxy = two_tenants().await;
    let mut open = proxy.wire("acme").await;
    open.query("BEGIN").await;
    let master = proxy.cluster.client("postgres").await;
    master.run("ALTER DATABASE central ALLOW_CONNECTIONS false").await;
    master
        .run("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = 'central'")
        .await;

    assert_eq!(tags(&open.query("COMMIT").await), "CZ");
    assert_eq!(proxy.client("acme").ask("SELECT 'known'").await, "known");
    let begun = std::time::Instant::now();
    let unknown = proxy.client("blue").refusal().await;
    assert!(["57P03", "08006"].contains(&unknown.as_str()), "{unknown}");
    assert!(begun.elapsed() < std::time::Duration::from_secs(10));

    master.run("ALTER DATABASE central ALLOW_CONNECTIONS true").await;
    in_time("the central database's return", async {
        while proxy.client("blue").try_connect().await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // Changes are heard of again, those made meanwhile as well.
    let central = proxy.cluster.client("central").await;
    central.run("UPDATE pglobby.tenants SET status = 'suspended' WHERE name = 'acme'").await;
    assert_eq!(end_of(&mut open).await, "57P01");
}

/// HUP under load, a hundred times: no error, and no pool starts anew whose settings did not change.
#[tokio::test]
async fn reloading_a_hundred_times_under_load_is_not_noticed() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let client = proxy.client("acme").connect().await;
    let server = client.server_pid().await;
    for _ in 0..100 {
        proxy.signal(Signal::HUP);
        assert_eq!(client.server_pid().await, server);
    }
    proxy.set_config("max_client_conn", "1");
    proxy.signal(Signal::HUP);
    in_time("the new limit", async { while proxy.client("acme").try_connect().await.is_ok() {} }).await;
    assert_eq!(proxy.client("acme").refusal().await, "53300");
    assert_eq!(client.server_pid().await, server);
}

/// Sessions that may write and sessions that may not have a pool each, and were counted apart.
#[tokio::test]
async fn the_limit_on_a_tenants_clients_counts_all_of_them() {
    let proxy = Proxy::with_tenant("acme").start().await;
    proxy.create_login("reader", "reader-secret", &["--tenant", "acme", "--read-only"]);
    proxy.command(&["tenant", "set", "acme", "max_clients=1"]);
    let (writer, reader) = (proxy.client("acme"), proxy.caller("reader", "reader-secret", "acme"));
    in_time("the limit", async { while writer.try_connect().await.is_err() {} }).await;
    let held = writer.connect().await;
    assert_eq!((writer.refusal().await, reader.refusal().await), ("53300".into(), "53300".into()));
    held.leave().await;
    in_time("the place", async { while reader.try_connect().await.is_err() {} }).await;
}

#[tokio::test]
async fn dropping_a_tenant_ends_its_sessions_and_late_clients_hear_why() {
    let proxy = two_tenants().await;
    let (mut acme, mut blue) = (proxy.wire("acme").await, proxy.wire("blue").await);
    acme.query("BEGIN").await;
    let central = proxy.cluster.client("central").await;
    central.run("UPDATE pglobby.tenants SET status = 'dropping' WHERE name = 'acme'").await;
    assert_eq!(end_of(&mut acme).await, "57P01");
    assert_eq!(proxy.client("acme").refusal().await, "3D000");
    assert_eq!(tags(&blue.query("SELECT 1").await), "TDCZ");
}

/// TERM: who idles is told at once, what runs may finish, and the process ends with 0 when the last one has.
#[tokio::test]
async fn a_drain_tells_the_idle_and_waits_for_transactions() {
    let mut proxy = two_tenants().await;
    let (mut idle, mut open) = (proxy.wire("acme").await, proxy.wire("blue").await);
    idle.query("SELECT 1").await;
    open.query("BEGIN").await;
    proxy.signal(Signal::TERM);
    assert_eq!(end_of(&mut idle).await, "57P01");
    assert_eq!(tags(&open.query("CREATE TABLE t (x int)").await), "CZ");
    assert_eq!(tags(&open.query("COMMIT").await), "CZ");
    assert_eq!(end_of(&mut open).await, "57P01");
    assert!(proxy.ended().await.success());
    assert_eq!(proxy.behind("blue").await.ask("SELECT count(*) FROM t").await, "0");
}

/// A second TERM: now. It used to cut off whoever had a transaction open, without a word.
#[tokio::test]
async fn a_second_term_ends_everybody() {
    let mut proxy = two_tenants().await;
    let (mut idle, mut open) = (proxy.wire("acme").await, proxy.wire("blue").await);
    idle.query("SELECT 1").await;
    open.query("BEGIN; CREATE TABLE t (x int)").await;
    proxy.signal(Signal::TERM);
    assert_eq!(end_of(&mut idle).await, "57P01");
    proxy.signal(Signal::TERM);
    assert_eq!(end_of(&mut open).await, "57P01");
    assert!(proxy.ended().await.success());
    let behind = proxy.behind("blue").await;
    assert_eq!(behind.ask("SELECT to_regclass('t')").await, "");
}

/// kill -9 of the proxy: servers roll back by themselves, a new one serves, nothing needs repair.
#[tokio::test]
async fn a_proxy_that_is_killed_leaves_nothing_that_needs_repair() {
    let mut proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let behind = proxy.behind("acme").await;
    let mut open = proxy.wire("acme").await;
    open.query("CREATE TABLE t (x int)").await;
    open.query("BEGIN; LOCK t; SELECT pg_advisory_lock(1)").await;
    proxy.kill_9();
    open.until_end().await;
    in_time("the lock", behind.try_run("BEGIN; LOCK t; COMMIT; SELECT pg_advisory_xact_lock(1)"))
        .await
        .unwrap();
    proxy.start_again().await;
    let client = Wire::login(proxy.port(), &login_of("acme"), &password_of("acme"), "acme").await;
    drop(client);
    assert_eq!(proxy.client("acme").ask("SELECT count(*) FROM t").await, "0");
}
