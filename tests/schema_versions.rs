//! One binary works with the schema of the release before it and with newer ones that say so, in the order that a rollout happens
//! to take.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use rustix::process::Signal;
use support::{
    Proxy,
    console::{show, shown},
};

/// The schema of the release before: what the newer steps have added is gone.
const RELEASE_BEFORE: &str = "
    DROP TABLE pglobby.node_answers, pglobby.node_requests, pglobby.pauses;
    DROP TABLE pglobby.node_leases, pglobby.host_leases, pglobby.nodes;
    DROP FUNCTION pglobby.tell_fleet();
    ALTER TABLE pglobby.migrations DROP COLUMN compatible_from;
    ALTER TABLE pglobby.tenants DROP COLUMN weight;
    ALTER TABLE pglobby.hosts DROP COLUMN more_addresses;
    DELETE FROM pglobby.migrations WHERE number > 4";

/// A rollout that begins with the nodes: every one of them serves, and each command works, before anybody runs `pglobby init`.
#[tokio::test]
async fn a_node_serves_on_the_schema_of_the_release_before() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    proxy.console().await.leave().await;
    proxy.stop_with(Signal::TERM).await;
    let central = proxy.cluster.client("central").await;
    central.run(RELEASE_BEFORE).await;

    proxy.start_again().await;

    proxy.logged("the central schema is older than this pglobby").await;
    let acme = proxy.client("acme").connect().await;
    assert_eq!(acme.ask("SELECT current_database()").await, "acme");
    let console = proxy.console().await;
    console.run("CREATE TENANT globex; CREATE LOGIN bob TENANT globex PASSWORD 'b'").await;
    assert_eq!(proxy.caller("bob", "b", "globex").ask("SELECT 1").await, "1");
    assert_eq!(show(&console, "DATABASES").await.len(), 2);
    assert_eq!(proxy.command_with(&["tenant", "show", "acme"], "").status.code(), Some(0));
    let checked = proxy.command(&["check"]);
    assert!(checked.contains("schema version 4; run `pglobby init` to upgrade it"), "{checked}");
    proxy.command(&["doctor"]);

    for command in [&["node", "list"][..], &["node", "list", "--json"]] {
        let listed = proxy.command_with(command, "");
        let said = String::from_utf8_lossy(&listed.stderr).into_owned();
        assert!(!listed.status.success() && said.contains("run `pglobby init`"), "{said}");
    }
    let mut console = console;
    console.run("PAUSE acme").await;
    let notice = console.notice().await;
    assert!(
        notice.starts_with("PAUSE was done on this node only: ") && notice.contains("pglobby init"),
        "{notice}"
    );
    shown(&console, "DATABASES", "paused", "1").await;
    console.run("RESUME acme").await;
    assert!(console.notice().await.starts_with("RESUME was done on this node only"));
    assert_eq!(console.refusal_of("SHOW POOLS ON ALL NODES").await, "55000");
    assert_eq!(console.refusal_of("SHOW NODES").await, "55000");

    proxy.command(&["init"]);

    assert_eq!(acme.ask("SELECT 1").await, "1");
    shown(&console, "NODES", "state", "serving").await;
    console.run("PAUSE acme; RESUME acme").await;
    let rows = central.ask("SELECT count(*) FROM pglobby.audit_log WHERE action LIKE 'fleet.%'").await;
    assert_eq!(rows, "2", "the fleet's commands are recorded");
    proxy.command(&["tenant", "create", "initech"]);
    let checked = proxy.command(&["check"]);
    assert!(!checked.contains("to upgrade it"), "{checked}");
}

/// A rollout that goes back: the schema stays as the newer release has made it.
#[tokio::test]
async fn a_node_serves_on_a_newer_schema_that_says_it_may() {
    let mut proxy = Proxy::with_tenant("acme").start().await;
    proxy.stop_with(Signal::TERM).await;
    let central = proxy.cluster.client("central").await;
    let ours = central.ask("SELECT max(number) FROM pglobby.migrations").await;
    central.run(&format!("INSERT INTO pglobby.migrations VALUES (999, 'future', now(), {ours})")).await;

    proxy.start_again().await;

    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
    proxy.logged("the central schema is newer than this pglobby, and works with it").await;
    assert_eq!(proxy.json(&["init", "--json"])["schema_version"], 999, "and init leaves it alone");
    let checked = proxy.command(&["check"]);
    assert!(checked.contains("schema version 999"), "{checked}");

    central
        .run(&format!("UPDATE pglobby.migrations SET compatible_from = {ours} + 1 WHERE number = 999"))
        .await;

    refuses(&proxy, "check");
    refuses(&proxy, "init");
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1", "a node that runs goes on");
    proxy.stop_with(Signal::TERM).await;
    refuses(&proxy, "serve");
}

/// The command fails, and says what to do.
fn refuses(proxy: &Proxy, command: &str) {
    let output = proxy.command_with(&[command], "");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.code(), Some(1), "{command}: {said}");
    assert!(said.contains("the central schema has version 999, newer than"), "{command}: {said}");
    assert!(said.contains("upgrade pglobby"), "{command}: {said}");
}

/// The release before the last one: two rollouts at once are none.
#[tokio::test]
async fn a_schema_that_is_too_old_is_refused_in_words() {
    let mut proxy = Proxy::build().start().await;
    proxy.stop_with(Signal::TERM).await;
    let central = proxy.cluster.client("central").await;
    central.run(RELEASE_BEFORE).await;
    central.run("DELETE FROM pglobby.migrations WHERE number > 3; ALTER TABLE pglobby.tenants DROP COLUMN role_given").await;

    let output = proxy.command_with(&["serve"], "");

    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(said.contains("has version 3, this pglobby needs at least 4; run `pglobby init`"), "{said}");
    proxy.command(&["init"]);
    proxy.start_again().await;
}
