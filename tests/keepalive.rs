//! Networks that lose packets: two lost probes end no connection, and one that the kernel gives up is logged as such.
//!
//! Each test runs once more in a network namespace of its own, whose loopback device it takes down.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{process::Command, time::Duration};

use support::{
    Client, Proxy,
    client::{in_time, sqlstate},
    proxy::{login_of, password_of},
};

const INSIDE: &str = "PGLOBBY_TEST_NETWORK_NAMESPACE";

/// Whether this is the run in a namespace. Outside, starts that one and waits for it.
fn in_own_network(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        device("up");
        return true;
    }
    let is_root = rustix::process::geteuid().is_root();
    // Others than root may make one within a namespace of users, and keep the right to take its device down.
    let rights: &[_] = if is_root { &[] } else { &["--user", "--map-current-user", "--keep-caps"] };
    let inside = Command::new("unshare")
        .arg("--net")
        .args(rights)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status();
    assert!(inside.unwrap().success(), "failed in its namespace");
    false
}

fn device(state: &str) {
    assert!(Command::new("ip").args(["link", "set", "lo", state]).status().unwrap().success());
}

/// Probes at 1, 3 and 5 seconds; lost at 7.
async fn proxy() -> Proxy {
    let folder = std::env::temp_dir().join(format!("pgl-keepalive-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let mut builder = Proxy::with_tenant("acme").config("unix_socket_dir", &format!("{folder:?}"));
    for side in ["", "server_"] {
        builder = builder
            .config(&format!("{side}tcp_keepidle"), "\"1s\"")
            .config(&format!("{side}tcp_keepintvl"), "\"2s\"");
    }
    builder.start().await
}

/// A client that no network stands in front of.
async fn local(proxy: &Proxy) -> Client {
    let mut config = tokio_postgres::Config::new();
    config
        .host_path(std::env::temp_dir().join(format!("pgl-keepalive-{}", std::process::id())))
        .port(proxy.port())
        .user(login_of("acme"))
        .password(password_of("acme"))
        .dbname("acme");
    Client::connect(&config).await.unwrap()
}

/// With `tcp_user_timeout` below the time of all probes, one lost probe ended every idle client.
#[tokio::test]
async fn two_lost_probes_end_neither_a_client_nor_a_server_and_a_lost_network_is_logged_as_such() {
    if !in_own_network(
        "two_lost_probes_end_neither_a_client_nor_a_server_and_a_lost_network_is_logged_as_such",
    ) {
        return;
    }
    let proxy = proxy().await;
    let remote = proxy.client("acme").connect().await;
    remote.run("SET work_mem = '7MB'").await;
    let near = local(&proxy).await;
    near.run("BEGIN; SET LOCAL work_mem = '8MB'").await;
    remote.run("SELECT 1").await;

    device("down");
    tokio::time::sleep(Duration::from_millis(3500)).await; // How long the fault lasts; nothing waits for it.
    device("up");
    assert_eq!(remote.ask("SHOW work_mem").await, "7MB");
    assert_eq!(near.ask("SHOW work_mem").await, "8MB");
    assert!(!proxy.log().contains("timed out"), "{}", proxy.log());

    device("down");
    proxy.logged("reason=client lost: no answer to TCP").await;
    proxy.logged("cause=no answer to TCP").await;
    // The idle server is asked for the last time a moment later or earlier than the other one.
    tokio::time::sleep(Duration::from_secs(1)).await; // How long the fault lasts; nothing waits for it.
    device("up");
    let error = in_time("the loss", near.try_run("SELECT 1")).await.expect_err("lost");
    assert!(near.is_closed() || sqlstate(&error) == "08006", "{error:?}");
    let log = proxy.log();
    let lost =
        log.lines().find(|line| line.contains("server connection lost")).expect("a line about the server");
    assert!(
        lost.contains(" WARN ") && lost.contains("tenant=\"acme\" login=\"acme_user\" connection="),
        "{lost}"
    );
    assert!(lost.contains("side=\"server\" host=") && lost.contains("in_transaction=true"), "{lost}");
    // Who comes now is served: what idled in the pool is not handed out.
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
    proxy.logged("idle server lost: no answer to TCP").await;
}
