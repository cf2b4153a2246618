//! A node that ends lets run what runs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use rustix::process::Signal;
use support::{Proxy, client::in_time, wire::tags};

/// The signal that begins a drain reaches a session the way cancels do, and once cancelled what ran.
#[tokio::test]
async fn a_drain_lets_a_running_query_finish_and_cancels_nothing() {
    let mut proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let behind = proxy.behind("acme").await;
    behind.run("SELECT pg_advisory_lock(1)").await;
    let mut client = proxy.wire("acme").await;
    // Runs until the lock behind the proxy is let go, and holds it for its transaction only.
    client.send(b'Q', b"SELECT pg_advisory_xact_lock(1)\0").await;
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory'";
    in_time("a query waits", async { while behind.ask(waits).await == "0" {} }).await;
    let mut idle = proxy.wire("acme").await;

    proxy.signal(Signal::TERM);

    // The drain has begun: whoever is idle has been told.
    let farewell = idle.until_end().await;
    assert_eq!(farewell.last().map(|message| message.sqlstate()).as_deref(), Some("57P01"));
    assert_eq!(behind.ask(waits).await, "1", "the query that ran is no longer running");
    behind.run("SELECT pg_advisory_unlock(1)").await;
    assert_eq!(tags(&client.until_ready().await), "TDCZ");
    let farewell = client.until_end().await;
    assert_eq!(farewell.last().map(|message| message.sqlstate()).as_deref(), Some("57P01"));
    assert!(proxy.ended().await.success());
}

/// With SO_REUSEPORT the kernel hands clients to every socket that listens: one that nobody accepts from any more swallowed
/// them until the drain was over.
#[tokio::test]
async fn a_node_that_drains_no_longer_listens() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    let mut client = proxy.wire("acme").await;
    client.query("BEGIN").await;
    let mut idle = proxy.wire("acme").await;

    proxy.signal(Signal::TERM);
    idle.until_end().await;

    let refused = async {
        while tokio::net::TcpStream::connect(("127.0.0.1", proxy.port())).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    in_time("connections are refused", refused).await;
    client.query("COMMIT").await;
    client.until_end().await;
    assert!(proxy.ended().await.success());
}
