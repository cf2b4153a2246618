//! Servers, clients and networks that fail: who is told what, and that nobody else notices.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use rustix::process::Signal;
use support::{
    Client, Cluster, Forwarder, Proxy, Wire,
    client::in_time,
    forwarder::Fault,
    wire::{Message, batch, bind, c_string, execute, message, parse, rows, sync, tags},
};

async fn servers(count: u32) -> Proxy {
    Proxy::with_tenant("acme").pool_size(count).start().await
}

/// Waits until `sql` answers `wanted`.
async fn until(client: &Client, sql: &str, wanted: &str) {
    in_time(sql, async {
        while client.ask(sql).await != wanted {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

const RUNNING: &str = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%marker%' AND state = 'active' AND pid <> pg_backend_pid()";
const SERVERS: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()";
const KILL: &str = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()";

fn last_word(answers: &[Message]) -> (char, String) {
    let last = answers.last().expect("a last word");
    (char::from(last.tag), last.sqlstate())
}

#[tokio::test]
async fn a_server_that_is_ended_tells_its_client_in_its_own_words_and_nobody_else() {
    let proxy = servers(2).await;
    let behind = proxy.behind("acme").await;
    for begin in ["SELECT 1", "BEGIN", "BEGIN; SELECT 1"] {
        let (mut victim, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
        victim.query(begin).await;
        other.query("SELECT 1").await;
        victim.send(b'Q', b"SELECT pg_sleep(600) AS marker\0").await;
        until(&behind, RUNNING, "1").await;
        behind.run("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE query LIKE '%marker%' AND pid <> pg_backend_pid()").await;
        assert_eq!(last_word(&victim.until_end().await), ('E', "57P01".into()));
        assert_eq!(tags(&other.query("SELECT 1").await), "TDCZ");
    }
    // A transaction that idles hears of it at once as well.
    let mut victim = proxy.wire("acme").await;
    victim.query("BEGIN").await;
    behind.run(KILL).await;
    assert_eq!(last_word(&victim.until_end().await), ('E', "57P01".into()));
}

/// In transaction mode a session that holds no server has lost nothing.
#[tokio::test]
async fn idle_sessions_do_not_notice_that_idle_servers_end() {
    let proxy = servers(2).await;
    let behind = proxy.behind("acme").await;
    let clients = [proxy.client("acme").connect().await, proxy.client("acme").connect().await];
    clients[0].run("SET my.note = 'kept'").await;
    for _ in 0..10 {
        clients[1].run("SELECT 1").await;
        // Again, if one was still being opened when the others were ended.
        while behind.ask(SERVERS).await != "0" {
            behind.run(KILL).await;
        }
        assert_eq!(clients[0].ask("SELECT current_setting('my.note')").await, "kept");
    }
}

/// A fast restart and a crash, with a prepared statement, a setting and an idle session: the first query succeeds.
#[tokio::test]
async fn idle_sessions_survive_a_restart_of_the_cluster() {
    let mut proxy = servers(2).await;
    let client = proxy.client("acme").connect().await;
    client.run("SET my.note = 'kept'").await;
    let statement = in_time("preparing", client.prepare("SELECT current_setting('my.note')")).await.unwrap();
    proxy.cluster.restart();
    assert_eq!(
        in_time("asking", client.query_one(&statement, &[])).await.unwrap().get::<_, String>(0),
        "kept"
    );
    proxy.cluster.kill_9();
    proxy.cluster.start_again();
    assert_eq!(
        in_time("asking", client.query_one(&statement, &[])).await.unwrap().get::<_, String>(0),
        "kept"
    );
}

/// The real reason, as a request's error: the session goes on and works when the host is back.
#[tokio::test]
async fn a_host_that_is_down_is_an_error_of_the_request_and_says_why() {
    let builder = Proxy::with_tenant("acme").pool_size(1).config("hold_during_outage", "false");
    let mut proxy = builder.start().await;
    let mut client = proxy.wire("acme").await;
    // The second is answered when what the first may have left behind is known: from then on it keeps no server.
    client.query("SELECT 1").await;
    client.query("SELECT 1").await;
    proxy.cluster.stop();
    let answers = client.query("SELECT 1").await;
    assert_eq!(tags(&answers), "EZ");
    let (state, words) = (answers[0].sqlstate(), answers[0].field(b'M').unwrap());
    assert!(["08001", "08006", "57P03"].contains(&state.as_str()), "{state} {words}");
    assert!(words.contains("refused"), "{words}");
    assert!(!words.contains("127.0.0.1") && !words.contains("owner"), "{words}");
    client.send_bytes(&batch("SELECT 1")).await;
    assert_eq!(tags(&client.until_ready().await), "EZ");
    proxy.cluster.start_again();
    assert_eq!(tags(&client.query("SELECT 1").await), "TDCZ");
}

/// A host without a budget, or one that others use as well: the idle servers of a few tenants took all that it has, and every
/// other tenant was refused.
#[tokio::test]
async fn a_full_host_serves_the_next_tenant_with_the_room_of_one_that_idles() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let small = Cluster::build().setting("max_connections", "8").start();
    proxy.add_host("small", &small);
    proxy.command(&["host", "set", "small", "max_connections="]);
    proxy.create_login("api", "a good password", &["--service", "--all-tenants"]);
    let tenants: Vec<String> = (0..9).map(|number| format!("t{number}")).collect();
    for tenant in &tenants {
        proxy.command(&["tenant", "create", tenant, "--host", "small"]);
    }
    let mut clients = Vec::new();
    for tenant in &tenants {
        let client = proxy.caller("api", "a good password", tenant).connect().await;
        assert_eq!(&client.ask("SELECT current_database()").await, tenant);
        clients.push(client);
    }
    // Those that gave their room away, and all at once.
    let asked = clients.iter().map(|client| client.ask("SELECT 1"));
    assert_eq!(futures_util::future::join_all(asked).await, ["1"; 9]);
    for client in &clients[..4] {
        client.run("BEGIN; SELECT 1").await;
    }
    assert_eq!(clients[8].ask("SELECT 1").await, "1");
}

/// A tenant could not be made on a host whose connections idle servers had: its first login, by which it is proved, was refused.
#[tokio::test]
async fn a_full_host_has_room_for_an_operator() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let small = Cluster::build().setting("max_connections", "8").start();
    proxy.add_host("small", &small);
    proxy.command(&["host", "set", "small", "max_connections="]);
    proxy.command(&["tenant", "create", "globex", "--host", "small"]);
    proxy.create_login("api", "a good password", &["--service", "--all-tenants"]);
    let mut clients = Vec::new();
    // PostgreSQL keeps three of the eight for superusers.
    for _ in 0..5 {
        let client = proxy.caller("api", "a good password", "globex").connect().await;
        client.run("BEGIN; SELECT 1").await;
        clients.push(client);
    }
    for client in &clients {
        client.run("COMMIT").await;
    }
    let full = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'globex'";
    assert_eq!(small.client("postgres").await.ask(full).await, "5");

    proxy.command(&["tenant", "create", "initech", "--host", "small"]);

    let initech = proxy.caller("api", "a good password", "initech").connect().await;
    assert_eq!(initech.ask("SELECT current_database()").await, "initech");
}

#[tokio::test]
async fn an_exhausted_pool_refuses_the_request_and_not_the_session() {
    let proxy =
        Proxy::with_tenant("acme").pool_size(1).config("query_wait_timeout", "\"300ms\"").start().await;
    let (mut holder, mut waiter) = (proxy.wire("acme").await, proxy.wire("acme").await);
    holder.query("BEGIN").await;
    let answers = waiter.query("SELECT 1").await;
    assert_eq!((tags(&answers).as_str(), answers[0].sqlstate().as_str()), ("EZ", "57014"));
    // Two batches and a query at once: each refused request has its one error and its one ReadyForQuery.
    waiter
        .send_bytes(&[batch("SELECT 1"), batch("SELECT 2"), message(b'Q', &c_string("SELECT 3"))].concat())
        .await;
    for _ in 0..3 {
        assert_eq!(tags(&waiter.until_ready().await), "EZ");
    }
    holder.query("COMMIT").await;
    assert_eq!(tags(&waiter.query("SELECT 1").await), "TDCZ");
    holder.query("BEGIN").await;
    // A waiter that leaves frees its place.
    waiter.send(b'Q', b"SELECT 1\0").await;
    waiter.reset();
    holder.query("COMMIT").await;
    assert_eq!(tags(&holder.query("SELECT 1").await), "TDCZ");
}

/// Whoever is gone runs nothing and locks nothing, however it went.
#[tokio::test]
async fn a_client_that_is_gone_leaves_a_server_that_is_rolled_back_and_free() {
    let proxy = servers(1).await;
    let behind = proxy.behind("acme").await;
    proxy.client("acme").run("CREATE TABLE t (x int)").then_leave().await;
    for (begin, then) in [
        ("BEGIN; LOCK t", None),
        ("BEGIN; INSERT INTO t VALUES (1)", Some("SELECT pg_sleep(600) AS marker")),
        ("BEGIN; SELECT 1/0", None),
        ("SELECT 1", Some("SELECT pg_sleep(600) AS marker")),
        ("SELECT 1", Some("SELECT repeat('x', 1000000), 'marker' FROM generate_series(1, 10000)")),
    ] {
        for by_reset in [false, true] {
            let mut client = proxy.wire("acme").await;
            client.query(begin).await;
            if let Some(sql) = then {
                client.send(b'Q', &c_string(sql)).await;
                until(&behind, RUNNING, "1").await;
            }
            if by_reset {
                client.reset();
            } else {
                drop(client);
            }
            let mut next = proxy.wire("acme").await;
            assert_eq!(tags(&next.query("BEGIN; LOCK t; COMMIT").await), "CCCZ", "{begin}, {then:?}");
            assert_eq!(rows(&next.query("SELECT count(*) FROM t").await)[0][0].as_deref(), Some("0"));
            until(&behind, RUNNING, "0").await;
        }
    }
}

/// A tenant whose host is a forwarder; and the forwarder.
async fn behind_a_forwarder(count: u32) -> (Proxy, Forwarder) {
    let proxy = servers(count).await;
    let forwarder = Forwarder::to(proxy.cluster.port()).await;
    let central = proxy.cluster.client("central").await;
    central.run(&format!("UPDATE pglobby.hosts SET address = '127.0.0.1', port = {}", forwarder.port)).await;
    in_time("the new port", async {
        while forwarder.connections() == 0 {
            proxy.client("acme").ask("SELECT 1").await;
        }
    })
    .await;
    (proxy, forwarder)
}

/// Never a silent cut, never the last transaction's answer: 08006, and the end.
#[tokio::test]
async fn a_server_that_breaks_off_or_talks_nonsense_costs_its_client_the_session_and_nobody_else_anything() {
    let (proxy, forwarder) = behind_a_forwarder(1).await;
    let nonsense: [(&str, Vec<u8>); 8] = [
        ("not the protocol", b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
        ("an unknown type", message(b'!', b"")),
        ("a length below four", vec![b'D', 0, 0, 0, 0]),
        ("a reply to nothing", message(b'1', b"")),
        (
            "a ReadyForQuery too many",
            [message(b'C', b"SELECT 0\0"), message(b'Z', b"I"), message(b'Z', b"I")].concat(),
        ),
        ("an unknown status", message(b'Z', b"?")),
        ("an error without fields", message(b'E', b"\0")),
        ("an error that never ends", message(b'E', b"C")),
    ];
    for (what, words) in nonsense {
        let mut client = proxy.wire("acme").await;
        // So that it is the answer to the client that is nonsense, and not one to a question of ours.
        client.query("SELECT 1").await;
        forwarder.set(Fault::Say(words));
        client.send(b'Q', b"SELECT 'real'\0").await;
        if !what.starts_with("an error") {
            let end = client.until_end().await;
            assert_eq!(last_word(&end), ('E', "08006".into()), "{what}: {end:?}");
        } else {
            drop(client);
        }
        forwarder.set(Fault::None);
        let next = proxy.client("acme").connect().await;
        assert_eq!(next.ask("SELECT 'next'").await, "next", "after {what}");
    }
    let mut client = proxy.wire("acme").await;
    client.query("SELECT 1").await;
    forwarder.set(Fault::CutAfter(0));
    client.send(b'Q', b"SELECT 1\0").await;
    assert_eq!(last_word(&client.until_end().await), ('E', "08006".into()));
    forwarder.set(Fault::None);
    assert_eq!(proxy.client("acme").ask("SELECT 'next'").await, "next");
}

/// A server lost in the middle of a row: what we have to say must not become the rest of the row.
#[tokio::test]
async fn an_end_in_the_middle_of_a_row_is_not_filled_up_with_words_of_ours() {
    let (proxy, forwarder) = behind_a_forwarder(1).await;
    for cut in [40, 60, 100, 150, 200] {
        let mut client = proxy.wire("acme").await;
        client.query("SELECT 1").await;
        forwarder.set(Fault::CutAfter(cut));
        client.send(b'Q', &c_string("SELECT repeat('x', 150)")).await;
        for answer in client.until_end().await.iter().filter(|message| message.tag == b'D') {
            assert_eq!(answer.values(), [Some("x".repeat(150))], "cut after {cut}");
        }
        forwarder.set(Fault::None);
        assert_eq!(proxy.client("acme").ask("SELECT 'next'").await, "next");
    }
}

/// What became of a COMMIT whose answer was lost nobody knows: the client must not be told that it worked.
#[tokio::test]
async fn a_commit_without_an_answer_is_no_success() {
    let (proxy, forwarder) = behind_a_forwarder(1).await;
    proxy.client("acme").connect().await.run("CREATE TABLE t (x int)").await;
    let batched = [parse("", "COMMIT"), bind("", "", &[]), execute("", 0), sync()].concat();
    for commit in [message(b'Q', b"COMMIT\0"), batched] {
        let mut client = proxy.wire("acme").await;
        client.query("BEGIN; INSERT INTO t VALUES (1)").await;
        forwarder.set(Fault::CutAfter(0));
        client.send_bytes(&commit).await;
        assert_eq!(last_word(&client.until_end().await), ('E', "08007".into()));
        forwarder.set(Fault::None);
    }
    assert_eq!(proxy.client("acme").ask("SELECT count(*) FROM t").await, "2");
    // Before it, the transaction is lost for certain.
    let mut client = proxy.wire("acme").await;
    client.query("BEGIN").await;
    forwarder.set(Fault::CutAfter(0));
    client.send(b'Q', b"INSERT INTO t VALUES (1)\0").await;
    assert_eq!(last_word(&client.until_end().await), ('E', "08006".into()));
}

/// A network that stalls and goes on: nothing but time is lost.
#[tokio::test]
async fn a_stall_is_only_a_delay() {
    let (proxy, forwarder) = behind_a_forwarder(2).await;
    let mut clients = [proxy.wire("acme").await, proxy.wire("acme").await];
    // Twice: two servers are open then, and none reads the database's functions any more.
    for sql in ["BEGIN", "COMMIT", "BEGIN", "COMMIT"] {
        for client in &mut clients {
            client.query(sql).await;
        }
    }
    forwarder.set(Fault::Stall);
    for client in &mut clients {
        client.send(b'Q', b"SELECT 'late'\0").await;
    }
    let behind = proxy.behind("acme").await;
    until(
        &behind,
        "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT ''late''' AND state = 'idle'",
        "2",
    )
    .await;
    forwarder.set(Fault::None);
    for client in &mut clients {
        assert_eq!(rows(&client.until_ready().await)[0][0].as_deref(), Some("late"));
    }
}

/// A host's budget of two servers, and three tenants that all want one: idle servers of one make room for another's.
#[tokio::test]
async fn the_budget_of_a_host_is_kept_over_tenants_and_everybody_is_served() {
    let proxy = Proxy::with_tenant("acme").and_tenant("blue").and_tenant("coop").pool_size(2).start().await;
    let central = proxy.cluster.client("central").await;
    central.run("UPDATE pglobby.hosts SET max_connections = 2").await;
    let count = "SELECT count(*) FROM pg_stat_activity WHERE datname IN ('acme', 'blue', 'coop')";
    in_time("the new budget", async {
        while !proxy.json(&["host", "list", "--json"]).to_string().contains("\"max_connections\":2,") {}
    })
    .await;
    let work = |tenant: &'static str| {
        let proxy = &proxy;
        async move {
            for round in 0..15 {
                let mut client: Wire = proxy.wire(tenant).await;
                let answers = client.query(&format!("BEGIN; SELECT '{tenant}{round}'; COMMIT")).await;
                assert_eq!(rows(&answers)[0][0].as_deref(), Some(format!("{tenant}{round}").as_str()));
            }
        }
    };
    let watch = async {
        for _ in 0..200 {
            let open: u32 = central.ask(count).await.parse().unwrap();
            assert!(open <= 2, "{open} servers");
        }
    };
    in_time("everybody's turn", async { tokio::join!(work("acme"), work("blue"), work("coop"), watch) })
        .await;
}

/// A failover or a forgetful firewall swallows connections without a word. The pool finds that out while nobody waits, and
/// no client is lent such a server.
#[tokio::test]
async fn an_idle_server_that_fell_silent_is_found_out_before_a_client_gets_it() {
    let (proxy, forwarder) = behind_a_forwarder(1).await;
    proxy.set_config("server_check_delay", "\"1s\"");
    proxy.set_config("server_connect_timeout", "\"1s\"");
    proxy.signal(Signal::HUP);
    proxy.logged("configuration reloaded").await;
    let client = proxy.client("acme").connect().await;
    client.run("SET my.note = 'kept'").await;
    let silent = client.server_pid().await;
    forwarder.set(Fault::Stall);
    proxy.logged("idle server lost").await;
    forwarder.set(Fault::None);
    assert_ne!(client.server_pid().await, silent);
    assert_eq!(client.ask("SELECT current_setting('my.note')").await, "kept");
}
