//! Nodes that share a central database know of each other.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use rustix::process::Signal;
use support::{Client, Node, Proxy, client::in_time};

const NAMES: &str = "SELECT coalesce(string_agg(name, ' ' ORDER BY name), '') FROM pglobby.nodes";

async fn becomes(central: &Client, sql: &str, wanted: &str) {
    in_time(wanted, async { while central.ask(sql).await != wanted {} }).await;
}

#[tokio::test]
async fn each_node_has_a_row_from_its_start_to_its_end_and_beats_meanwhile() {
    let proxy = Proxy::with_tenant("acme").config("node_name", "\"one\"").start().await;
    let central = proxy.cluster.client("central").await;
    becomes(&central, NAMES, "one").await;
    let keys =
        [("node_name", "\"two\""), ("node_address", "\"db.example.com:6432\""), ("worker_threads", "1")];
    let mut two = Node::beside(&proxy, &keys).await;
    becomes(&central, NAMES, "one two").await;
    let address = "SELECT address FROM pglobby.nodes WHERE name = ";
    assert_eq!(central.ask(&format!("{address} 'two'")).await, "db.example.com:6432");
    assert_eq!(central.ask(&format!("{address} 'one'")).await, format!("127.0.0.1:{}", proxy.port()));
    becomes(&central, "SELECT min(beat) > 1 FROM pglobby.nodes", "t").await;

    two.stop_with(Signal::TERM).await;
    assert_eq!(central.ask(NAMES).await, "one");

    // A process that is killed leaves its row, which its successor on this machine removes.
    two.start_again().await;
    becomes(&central, NAMES, "one two").await;
    two.kill_9();
    two.start_again().await;
    becomes(&central, "SELECT count(*) FROM pglobby.nodes WHERE name = 'two' AND beat > 0", "1").await;
    assert_eq!(central.ask(NAMES).await, "one two");

    // A row that somebody deletes is there again.
    central.run("DELETE FROM pglobby.nodes").await;
    becomes(&central, NAMES, "one two").await;
}
