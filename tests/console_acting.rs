//! What an administrator does to a running node through the console.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::time::Instant;

use support::{
    Proxy, Wire,
    client::PATIENCE,
    console::{show, shown},
};

#[tokio::test]
async fn a_client_is_killed_by_its_id() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let console = proxy.console().await;
    let mut victim = proxy.client("acme").connect().await;
    victim.run("BEGIN").await;
    let id = show(&console, "CLIENTS").await[0]["id"].clone();
    console.run(&format!("KILL_CLIENT {id}")).await;
    victim.closed().await;
    let begun = Instant::now();
    while !show(&console, "CLIENTS").await.is_empty() {
        assert!(begun.elapsed() < PATIENCE);
    }
    assert_eq!(console.refusal_of(&format!("KILL_CLIENT {id}")).await, "42704");
}

#[tokio::test]
async fn a_paused_tenant_has_no_server_until_it_is_resumed() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").start().await;
    let console = proxy.console().await;
    let client = proxy.client("acme").connect().await;
    client.run("SELECT 1").await;
    console.run("PAUSE acme").await;
    assert_eq!(proxy.behind("acme").await.ask("SELECT count(*) FROM pg_stat_activity WHERE usename = (SELECT rolname FROM pg_roles r JOIN pg_database d ON d.datdba = r.oid WHERE d.datname = current_database())").await, "0");
    assert!(show(&console, "SERVERS").await.is_empty());
    let databases = show(&console, "DATABASES").await;
    assert_eq!((databases[0]["paused"].as_str(), databases[1]["paused"].as_str()), ("1", "0"));
    assert_eq!(proxy.client("globex").ask("SELECT 1").await, "1", "others are served");

    let (answer, ()) = tokio::join!(client.ask("SELECT 2"), async {
        shown(&console, "POOLS", "cl_waiting", "1").await;
        console.run("RESUME acme").await;
    });
    assert_eq!(answer, "2");
}

#[tokio::test]
async fn a_pause_waits_for_the_transaction_that_runs() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let (console, other) = (proxy.console().await, proxy.console().await);
    let client = proxy.client("acme").connect().await;
    client.run("BEGIN").await;
    tokio::join!(console.run("PAUSE"), async {
        shown(&other, "SERVERS", "close_needed", "1").await;
        client.run("COMMIT").await;
    });
    assert!(show(&console, "SERVERS").await.is_empty());
    console.run("RESUME").await;
    client.run("SELECT 1").await;
}

/// A PAUSE that nobody waits for any more does not go on for ever.
#[tokio::test]
async fn an_administrator_who_leaves_while_waiting_is_gone() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let other = proxy.console().await;
    let client = proxy.client("acme").connect().await;
    client.run("BEGIN").await;
    let mut console = Wire::login(proxy.port(), "console_admin", "console secret", "pglobby").await;
    console.send(b'Q', b"PAUSE\0").await;
    while show(&other, "STATE").await[1]["value"] != "yes" {}
    drop(console);
    proxy.logged("console closed").await;
    assert_eq!(client.ask("SELECT 1").await, "1");
    other.run("RESUME").await;
}

#[tokio::test]
async fn a_disabled_tenant_takes_in_nobody_new() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let console = proxy.console().await;
    let early = proxy.client("acme").connect().await;
    console.run("DISABLE acme").await;
    assert_eq!(proxy.client("acme").refusal().await, "57P03");
    early.run("SELECT 1").await;
    shown(&console, "DATABASES", "disabled", "1").await;
    console.run("ENABLE acme").await;
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
    assert_eq!(console.refusal_of("DISABLE nobody").await, "3D000");
}

#[tokio::test]
async fn after_reconnect_every_transaction_has_a_new_server() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let (console, other) = (proxy.console().await, proxy.console().await);
    let (idle, busy) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    let before = idle.server_pid().await;
    busy.run("BEGIN").await;
    console.run("RECONNECT acme").await;
    assert_ne!(idle.server_pid().await, before);
    tokio::join!(console.run("WAIT_CLOSE acme"), async {
        shown(&other, "SERVERS", "close_needed", "1").await;
        busy.run("COMMIT").await;
    });
    assert!(show(&console, "SERVERS").await.iter().all(|server| server["close_needed"] == "0"));
}

#[tokio::test]
async fn killing_a_tenant_ends_its_sessions_and_no_others() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").start().await;
    let console = proxy.console().await;
    // Nobody has been served there yet.
    console.run("PAUSE globex").await;
    shown(&console, "DATABASES", "paused", "1").await;
    console.run("RESUME globex").await;
    let (mut acme, globex) = (proxy.client("acme").connect().await, proxy.client("globex").connect().await);
    console.run("KILL acme").await;
    acme.closed().await;
    globex.run("SELECT 1").await;
    console.run("RESUME acme").await;
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
}

#[tokio::test]
async fn reload_takes_over_the_file_or_says_what_is_wrong_with_it() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let console = proxy.console().await;
    let size = async || {
        let config = show(&console, "CONFIG").await;
        config.iter().find(|row| row["key"] == "default_pool_size").unwrap()["value"].clone()
    };
    assert_eq!(size().await, "20");
    proxy.set_config("default_pool_size", "7");
    // The file's sections are dotted keys, so a key may be appended.
    console.run("RELOAD").await;
    assert_eq!(size().await, "7");
    proxy.set_config("default_pool_size", "0");
    assert_eq!(console.refusal_of("RELOAD").await, "F0000");
    assert_eq!(size().await, "7");
}

/// Sessions that were open when the file was read again went on to wait for as long as before.
#[tokio::test]
async fn a_reload_says_how_long_open_sessions_wait_for_a_server() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).config("query_wait_timeout", "\"1h\"").start().await;
    let (holder, waiter) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    waiter.run("SELECT 1").await;
    holder.run("BEGIN").await;
    proxy.set_config("query_wait_timeout", "\"200ms\"");
    proxy.console().await.run("RELOAD").await;
    assert_eq!(waiter.refusal_of("SELECT 1").await, "57014");
    holder.run("COMMIT").await;
    assert_eq!(waiter.ask("SELECT 1").await, "1");
}

#[tokio::test]
async fn shutdown_ends_the_process() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    let console = proxy.console().await;
    console.run("SHUTDOWN WAIT_FOR_SERVERS").await;
    assert!(proxy.ended().await.success());
}
