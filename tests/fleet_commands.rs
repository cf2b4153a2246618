//! Commands of one console to all nodes that share a central database, or to one of the others.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::time::Duration;

use rustix::process::Signal;
use support::{
    Client, Cluster, Node, Proxy, Wire,
    client::{in_time, sqlstate},
    console::{show, shown},
    proxy::Caller,
};

/// Nodes `a` (the proxy) and `b`, and their consoles.
struct Two {
    proxy: Proxy,
    b: Node,
    console: Client,
    console_b: Client,
}

async fn two() -> Two {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").config("node_name", "\"a\"").start().await;
    let console = proxy.console().await;
    let b = named(&proxy, "b").await;
    let console_b = b.console().await;
    Two { proxy, b, console, console_b }
}

async fn named(proxy: &Proxy, name: &str) -> Node {
    Node::beside(proxy, &[("node_name", &format!("{name:?}"))]).await
}

/// Connected, and served once.
async fn served(caller: Caller) -> Client {
    let client = caller.connect().await;
    client.run("SELECT 1").await;
    client
}

/// PAUSE at one node of three: the others served on.
#[tokio::test]
async fn a_pause_holds_on_every_node_also_on_one_that_starts_later() {
    let Two { proxy, b, console, console_b } = two().await;
    let (at_a, at_b) = (served(proxy.client("acme")).await, served(b.client("acme")).await);
    let other = served(b.client("globex")).await;

    console.run("PAUSE acme").await;

    for console in [&console, &console_b] {
        let servers = show(console, "SERVERS").await;
        assert!(servers.iter().all(|server| server["database"] != "acme"), "{servers:?}");
        shown(console, "DATABASES", "paused", "1").await;
    }
    other.run("SELECT 1").await;
    let c = named(&proxy, "c").await;
    let console_c = c.console().await;
    let paused = show(&console_c, "DATABASES").await[0]["paused"].clone();
    assert_eq!(paused, "1", "from its first client on");
    let in_central = proxy.cluster.client("central").await;
    let rows = "SELECT string_agg(concat_ws(' ', kind, t.name, made_by), ', ')
        FROM pglobby.pauses p JOIN pglobby.tenants t ON t.id = p.tenant_id";
    assert_eq!(in_central.ask(rows).await, "paused acme login:console_admin");
    let ((), (), ()) = tokio::join!(
        async { assert_eq!(at_a.ask("SELECT 1").await, "1") },
        async { assert_eq!(at_b.ask("SELECT 2").await, "2") },
        async {
            shown(&console, "POOLS", "cl_waiting", "1").await;
            shown(&console_b, "POOLS", "cl_waiting", "1").await;
            console_c.run("RESUME acme").await;
        }
    );
    assert_eq!(c.client("acme").ask("SELECT 3").await, "3");
    assert_eq!(in_central.ask("SELECT count(*) FROM pglobby.pauses").await, "0");
    let left = "SELECT count(*) FROM pglobby.node_requests";
    in_time("no request is left", async { while in_central.ask(left).await != "0" {} }).await;
}

#[tokio::test]
async fn a_pause_waits_for_a_transaction_on_another_node() {
    let Two { proxy, b, console, console_b } = two().await;
    let busy = b.client("acme").connect().await;
    busy.run("BEGIN").await;
    let in_central = proxy.cluster.client("central").await;
    let running = "SELECT count(*) FROM pglobby.node_answers WHERE status = 'running'";

    tokio::join!(console.run("PAUSE"), async {
        in_time("b has begun", async { while in_central.ask(running).await != "1" {} }).await;
        assert_eq!(show(&console_b, "STATE").await[1]["value"], "yes");
        busy.run("COMMIT").await;
    });

    assert!(show(&console_b, "SERVERS").await.is_empty());
    console.run("RESUME").await;
    assert_eq!(show(&console_b, "STATE").await[1]["value"], "no");
    busy.run("SELECT 1").await;
}

/// What another node does for an administrator who has left does not go on there for ever.
#[tokio::test]
async fn a_request_of_an_administrator_who_leaves_is_withdrawn() {
    let Two { proxy, b, console, .. } = two().await;
    let busy = b.client("acme").connect().await;
    busy.run("BEGIN").await;
    let mut leaving = Wire::login(proxy.port(), "console_admin", "console secret", "pglobby").await;
    leaving.send(b'Q', b"PAUSE acme\0").await;
    b.logged("admin command of another node").await;
    drop(leaving);
    b.logged("request of another node withdrawn").await;
    busy.run("COMMIT").await;
    console.run("RESUME acme").await;
    busy.run("SELECT 1").await;
}

#[tokio::test]
async fn sessions_of_all_nodes_are_killed_disabled_and_reconnected() {
    let Two { proxy, b, console, console_b } = two().await;
    let (mut at_a, mut at_b) = (served(proxy.client("acme")).await, served(b.client("acme")).await);
    let before = (at_a.server_pid().await, at_b.server_pid().await);
    console.run("RECONNECT acme; WAIT_CLOSE acme").await;
    let after = (at_a.server_pid().await, at_b.server_pid().await);
    assert!(before.0 != after.0 && before.1 != after.1, "{before:?} {after:?}");

    console.run("DISABLE acme").await;
    assert_eq!(b.client("acme").refusal().await, "57P03");
    at_b.run("SELECT 1").await;
    console_b.run("ENABLE acme").await;
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");

    // The console that is asked is not that of the session's node.
    let id = show(&console_b, "CLIENTS").await[0]["id"].clone();
    console.run(&format!("KILL_CLIENT {id}")).await;
    at_b.closed().await;
    assert_eq!(console.refusal_of(&format!("KILL_CLIENT {id}")).await, "42704");

    let mut at_b = served(b.client("acme")).await;
    console_b.run("KILL acme").await;
    at_a.closed().await;
    at_b.closed().await;
    console.run("RESUME acme").await;
    assert_eq!(b.client("acme").ask("SELECT 1").await, "1");
}

#[tokio::test]
async fn a_command_on_one_node_is_not_for_the_others_and_ends_with_it() {
    let Two { proxy, mut b, console, console_b } = two().await;
    let at_a = served(proxy.client("acme")).await;
    console.run("PAUSE acme ON NODE b").await;
    shown(&console_b, "DATABASES", "paused", "1").await;
    assert!(show(&console, "DATABASES").await.iter().all(|row| row["paused"] == "0"));
    at_a.run("SELECT 1").await;
    console_b.run("RESUME acme ON NODE B").await;
    assert_eq!(b.client("acme").ask("SELECT 1").await, "1");

    // For all nodes: one of them does not leave.
    console.run("PAUSE acme; DISABLE acme").await;
    for command in ["RESUME acme ON NODE b", "ENABLE acme ON NODE b", "RESUME acme ON NODE a"] {
        let refused = console.try_run(command).await.expect_err(command);
        assert_eq!(sqlstate(&refused), "55000", "{command}");
    }
    let named = console.try_run("RESUME acme ON NODE b").await.unwrap_err();
    assert_eq!(named.as_db_error().unwrap().message(), "node \"b\": it is paused on all nodes");
    console.run("RESUME acme; ENABLE acme").await;

    console.run("PAUSE acme ON NODE b; DISABLE globex ON NODE b").await;
    b.stop_with(Signal::TERM).await;
    b.start_again().await;
    assert_eq!(b.client("acme").ask("SELECT 1").await, "1");
    assert_eq!(b.client("globex").ask("SELECT 1").await, "1");
    let unknown = console.try_run("PAUSE acme ON NODE bb").await.unwrap_err();
    let unknown = unknown.as_db_error().unwrap();
    assert_eq!(
        (unknown.code().code(), unknown.message()),
        ("42704", "there is no node \"bb\"; did you mean \"b\"?")
    );
    assert!(show(&console, "DATABASES").await.iter().all(|row| row["paused"] == "0"), "and none is paused");
}

#[tokio::test]
async fn show_of_all_nodes_and_of_one_has_a_column_for_the_node() {
    let Two { proxy, b, console, console_b } = two().await;
    let (_at_a, _at_b) = (served(proxy.client("acme")).await, served(b.client("globex")).await);
    let pools = show(&console, "POOLS ON ALL NODES").await;
    let pairs: Vec<_> = pools.iter().map(|row| (row["node"].as_str(), row["database"].as_str())).collect();
    assert_eq!(pairs, [("a", "acme"), ("b", "globex")]);
    let own = console.query("SHOW POOLS", &[]).await.unwrap();
    let all = console.query("SHOW POOLS ON ALL NODES", &[]).await.unwrap();
    let names = |row: &tokio_postgres::Row| {
        row.columns().iter().map(|column| column.name().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(&own[0]), names(&all[0])[1..], "PgBouncer's columns stay as they are");
    assert_eq!(all[1].get::<_, &str>("node"), "b");
    assert_eq!(all[1].get::<_, i32>("sv_idle"), 1, "types, too");
    assert_eq!(show(&console, "CLIENTS ON NODE b").await.len(), 1);
    assert_eq!(show(&console_b, "POOLS ON NODE b").await[0]["database"], "globex");
    for what in
        ["SERVERS", "STATS", "TOTALS", "DATABASES", "LISTS", "CONFIG", "STATE", "PINS", "HOSTS", "VERSION"]
    {
        let rows = show(&console, &format!("{what} ON ALL NODES")).await;
        assert!(rows.iter().all(|row| ["a", "b"].contains(&row["node"].as_str())), "{what}: {rows:?}");
        let each = show(&console, what).await.len() + show(&console_b, what).await.len();
        assert_eq!(rows.len(), each, "{what}");
    }
    console.run("CREATE LOGIN auditor ADMIN READ ONLY PASSWORD 'a'").await;
    let auditor = proxy.caller("auditor", "a", "pglobby").connect().await;
    assert_eq!(show(&auditor, "POOLS ON ALL NODES").await.len(), 2);
    assert_eq!(auditor.refusal_of("PAUSE acme ON NODE b").await, "42501");
}

#[tokio::test]
async fn nodes_are_listed_with_what_differs() {
    let proxy = Proxy::with_tenant("acme").config("node_name", "\"a\"").start().await;
    let console = proxy.console().await;
    let (ring, copy) = (proxy.folder().join("keyring.toml"), proxy.folder().join("copy.toml"));
    std::fs::copy(&ring, &copy).unwrap();
    let keys = format!("{copy:?}");
    let _b = Node::beside(&proxy, &[("node_name", "\"b\""), ("keys.file", &keys)]).await;
    let nodes = show(&console, "NODES").await;
    let of = |column: &str| nodes.iter().map(|row| row[column].clone()).collect::<Vec<_>>();
    assert_eq!((of("name"), of("state")), (vec!["a".into(), "b".into()], vec!["serving".to_owned(); 2]));
    assert_eq!(of("version"), [env!("CARGO_PKG_VERSION"); 2]);
    assert_eq!(of("differs"), ["", ""]);
    assert_eq!(proxy.json(&["node", "list", "--json"])[1]["differs"], serde_json::json!([]));
    assert!(proxy.command(&["check"]).contains("nodes: 2 serving"));
    proxy.command(&["doctor"]);

    proxy.command(&["key", "generate"]);

    shown(&console, "NODES", "differs", "key_ids").await;
    let checked = proxy.command_with(&["check"], "");
    let said = String::from_utf8(checked.stdout).unwrap();
    assert!(!checked.status.success() && said.contains("give every node the same key ring"), "{said}");
    let doctor = String::from_utf8(proxy.command_with(&["doctor"], "").stdout).unwrap();
    assert!(doctor.contains("nodes_differ") && doctor.contains("same key ring"), "{doctor}");
    std::fs::copy(&ring, &copy).unwrap();
    in_time("the same keys", async {
        while show(&console, "NODES").await.iter().any(|row| !row["differs"].is_empty()) {}
    })
    .await;

    let central = proxy.cluster.client("central").await;
    central.run("UPDATE pglobby.nodes SET version = '0.0.9' WHERE name = 'b'").await;

    shown(&console, "NODES", "differs", "version").await;
    let listed = proxy.command(&["node", "list"]);
    assert!(listed.contains("node \"b\" has version 0.0.9"), "{listed}");
    assert!(proxy.command(&["check"]).contains("node \"b\" has version 0.0.9"), "a rollout passes");
    let doctor = String::from_utf8(proxy.command_with(&["doctor"], "").stdout).unwrap();
    assert!(doctor.contains("nodes_differ") && doctor.contains("finish the rollout"), "{doctor}");
    proxy.logged("nodes differ").await;
}

#[tokio::test]
async fn a_node_that_is_gone_is_not_waited_for_and_one_that_goes_on_is_paused() {
    let Two { proxy, mut b, mut console, .. } = two().await;
    let at_a = served(proxy.client("acme")).await;
    let at_b = served(b.client("acme")).await;
    b.signal(Signal::STOP);

    console.run("PAUSE acme").await;

    assert_eq!(console.notice().await, "node \"b\" does not run any more and was not waited for");
    b.signal(Signal::CONT);
    let console_b = b.console().await;
    shown(&console_b, "DATABASES", "paused", "1").await;
    console.run("RESUME acme").await;
    at_b.run("SELECT 1").await;
    b.kill_9();
    console.run("PAUSE acme").await;
    assert_eq!(console.notice().await, "node \"b\" does not run any more and was not waited for");
    let missing = console.try_run("RECONNECT acme ON NODE b").await;
    assert_eq!(missing.map_err(|error| sqlstate(&error)), Err("58000".to_owned()));
    console.run("RESUME acme").await;
    at_a.run("SELECT 1").await;
}

/// A node that beats and has not begun in time, as a stand-in does here that only beats.
#[tokio::test]
async fn a_node_that_does_not_answer_is_named() {
    let proxy = Proxy::with_tenant("acme").config("central_timeout", "\"1s\"").start().await;
    let console = proxy.console().await;
    let central = proxy.cluster.client("central").await;
    central
        .run(
            "INSERT INTO pglobby.nodes (name, address, version, schema_version, key_ids)
             VALUES ('deaf', 'nowhere', '0', 0, '{}')",
        )
        .await;
    let beating = tokio::spawn(async move {
        loop {
            central
                .run("UPDATE pglobby.nodes SET beat = beat + 1, seen_at = now() WHERE name = 'deaf'")
                .await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });

    let error = console.try_run("PAUSE acme").await.unwrap_err();

    let error = error.as_db_error().unwrap();
    assert_eq!((error.code().code(), error.message()), ("58000", "node \"deaf\" did not answer within 1s"));
    assert!(error.hint().unwrap().contains("The other nodes have done it"), "{error:?}");
    shown(&console, "DATABASES", "paused", "1").await;
    assert_eq!(show(&console, "POOLS ON ALL NODES").await.len(), 0, "with a warning, and what there is");
    assert_eq!(sqlstate(&console.try_run("SHOW POOLS ON NODE deaf").await.unwrap_err()), "58000");
    beating.abort();
}

/// A node that had done its work and could not write that was waited for without end.
#[tokio::test]
async fn an_answer_that_cannot_be_written_is_repeated_or_replaced_by_an_error() {
    let Two { proxy, b, console, .. } = two().await;
    let central = proxy.cluster.client("central").await;
    let refuse = |sqlstate: &str| {
        format!(
            "CREATE OR REPLACE FUNCTION pglobby.refuse() RETURNS trigger LANGUAGE plpgsql AS
             $$ BEGIN RAISE 'not now' USING ERRCODE = '{sqlstate}'; END $$;
             CREATE OR REPLACE TRIGGER refuse BEFORE UPDATE ON pglobby.node_answers
             FOR EACH ROW WHEN (NEW.status = 'done') EXECUTE FUNCTION pglobby.refuse()"
        )
    };
    central.run(&refuse("53000")).await;
    tokio::join!(console.run("RECONNECT acme ON NODE b"), async {
        b.logged("cannot answer a request of another node").await;
        central.run("DROP TRIGGER refuse ON pglobby.node_answers").await;
    });

    central.run(&refuse("22P05")).await;
    let error = console.try_run("RECONNECT acme ON NODE b").await.unwrap_err();
    let message = error.as_db_error().unwrap().message();
    assert!(message.starts_with("node \"b\": the answer cannot be written"), "{message}");
}

#[tokio::test]
async fn without_the_central_database_a_command_is_done_here_and_says_so() {
    let mut proxy =
        Proxy::build().config("central_timeout", "\"1s\"").config("node_name", "\"a\"").start().await;
    let west = Cluster::start();
    proxy.add_host("west", &west);
    let console = proxy.console().await;
    console.run("CREATE TENANT acme HOST west; CREATE LOGIN alice TENANT acme PASSWORD 'x'").await;
    let alice = served(proxy.caller("alice", "x", "acme")).await;
    console.run("PAUSE acme").await;
    proxy.cluster.stop();

    let resumed = console.try_run("RESUME acme").await.unwrap_err();

    let resumed = resumed.as_db_error().unwrap();
    assert_eq!(resumed.code().code(), "58000");
    assert!(
        resumed.message().starts_with("RESUME was done on this node only, other nodes could not be asked: "),
        "{resumed:?}"
    );
    alice.run("SELECT 1").await;
    assert_eq!(console.refusal_of("PAUSE acme").await, "58000");
    assert!(show(&console, "SERVERS").await.is_empty());
    console.run("RESUME acme ON NODE a").await;
    alice.run("SELECT 1").await;

    // Back again, it holds what it held.
    proxy.cluster.start_again();
    shown(&console, "DATABASES", "paused", "1").await;
    console.run("RESUME acme").await;
    alice.run("SELECT 1").await;
}

#[tokio::test]
async fn a_reload_and_a_shutdown_may_be_for_other_nodes() {
    let Two { mut proxy, mut b, console, console_b } = two().await;
    let reloads = |log: &str| log.matches("configuration reloaded").count();
    console.run("RELOAD").await;
    assert_eq!((reloads(&proxy.log()), reloads(&b.log())), (1, 0));
    console.run("RELOAD ON NODE b").await;
    assert_eq!((reloads(&proxy.log()), reloads(&b.log())), (1, 1));
    console.run("RELOAD ON ALL NODES").await;
    assert_eq!((reloads(&proxy.log()), reloads(&b.log())), (2, 2));
    drop(console_b);
    console.run("SHUTDOWN WAIT_FOR_CLIENTS ON NODE b").await;
    assert!(b.ended().await.success());
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
    b.start_again().await;
    console.run("SHUTDOWN WAIT_FOR_CLIENTS ON ALL NODES").await;
    assert!(b.ended().await.success() && proxy.ended().await.success());
}

/// One switch stood for both: RESUME lent servers of the old host in the middle of a move, and the end of a move ended a PAUSE.
#[tokio::test]
async fn a_pause_and_a_move_do_not_end_each_other() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let console = proxy.console().await;
    let central = proxy.cluster.client("central").await;
    let alice = served(proxy.client("acme")).await;
    let moves = async |moves: bool| {
        central.run(&format!("UPDATE pglobby.tenants SET fenced = {moves}")).await;
        proxy.logged(if moves { "tenant paused for move" } else { "tenant resumed after move" }).await;
    };
    moves(true).await;
    console.run("PAUSE acme; RESUME acme").await;
    shown(&console, "DATABASES", "paused", "1").await;
    moves(false).await;
    alice.run("SELECT 1").await;

    console.run("PAUSE acme").await;
    central.run("UPDATE pglobby.tenants SET fenced = true").await;
    central.run("UPDATE pglobby.tenants SET fenced = false").await;
    // The node has applied both when it has applied this.
    console.run("ALTER TENANT acme SET pool_size = 3").await;
    assert_eq!(show(&console, "DATABASES").await[0]["paused"], "1");
    console.run("RESUME acme").await;
    alice.run("SELECT 1").await;
}
