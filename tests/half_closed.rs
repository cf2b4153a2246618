//! A client that closes its direction of the connection and reads on: what it has sent whole is served to its end, as
//! PostgreSQL does. A client that is gone is found out all the same.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Proxy, Wire,
    client::in_time,
    comparison::Comparison,
    console::show,
    wire::{Message, batch, bind, c_string, execute, flush, message, parse, rows, tags},
};
use tokio::io::AsyncWriteExt;

fn query(sql: &str) -> Vec<u8> {
    message(b'Q', &c_string(sql))
}

/// Sends this, closes that direction, and reads to the end. Without ParameterStatus: it may come at any time.
async fn says(client: &mut Wire, said: &[u8]) -> Vec<Message> {
    client.send_bytes(said).await;
    in_time("closing one direction", client.stream.shutdown()).await.unwrap();
    let answers = client.until_end().await;
    answers.into_iter().filter(|message| message.tag != b'S').collect()
}

fn sayings() -> Vec<(&'static str, Vec<u8>)> {
    let insert = "INSERT INTO t VALUES (1) RETURNING x + 1";
    let unsynced = |sql| [parse("", sql), bind("", "", &[]), execute("", 0)].concat();
    let copy = |end: &[u8]| [&query("COPY t FROM STDIN")[..], &message(b'd', b"7\n"), end].concat();
    let half = |tag: u8, body: &[u8]| {
        let mut half = message(tag, &[body, b"12345"].concat());
        half.truncate(half.len() - 5);
        half
    };
    let long = "x".repeat(40_000);
    vec![
        ("nothing", Vec::new()),
        ("a query", query(insert)),
        ("a slow query", query("SELECT pg_sleep(0.5), 1")),
        ("a failing query", query("SELECT 1/0")),
        ("a batch", batch(insert)),
        ("pipelined queries", [query(insert), batch("SELECT pg_sleep(0.2)"), query("SELECT 2")].concat()),
        (
            "named statements",
            [parse("s", insert), bind("", "s", &[]), execute("", 0), message(b'S', b"")].concat(),
        ),
        ("a long answer", query("SELECT repeat('x', 1000) FROM generate_series(1, 20000)")),
        ("a setting", [query("SET work_mem = '5MB'"), query("SHOW work_mem")].concat()),
        ("an open transaction", [query("BEGIN"), query(insert)].concat()),
        ("an open transaction that failed", [query("BEGIN; SELECT 1/0"), query(insert)].concat()),
        ("a temporary table", query("CREATE TEMP TABLE mine (x int)")),
        ("a COPY", copy(&message(b'c', b""))),
        ("a COPY and a query", copy(&[message(b'c', b""), query(insert)].concat())),
        ("a COPY that was given up", copy(&message(b'f', b"why\0"))),
        ("a COPY without an end", copy(b"")),
        ("a COPY with half its data", copy(&half(b'd', b"8"))),
        ("a batch without Sync", unsynced(insert)),
        ("a flushed batch without Sync", [unsynced(insert), flush()].concat()),
        (
            "a long answer to a batch without Sync",
            unsynced("SELECT repeat('x', 1000) FROM generate_series(1, 100)"),
        ),
        ("a failed batch without Sync", unsynced("SELECT 1/0")),
        ("a query and a batch without Sync", [query(insert), unsynced(insert)].concat()),
        ("a query and half a query", [query(insert), half(b'Q', b"SELECT 1")].concat()),
        ("a query and half a header", [query(insert), b"Q\0".to_vec()].concat()),
        (
            "a query and half a long Bind",
            [
                query(insert),
                parse("", "SELECT $1"),
                half(b'B', &[b"\0\0\0\0\0\x01\0\0\x9c\x40".as_slice(), long.as_bytes()].concat()),
            ]
            .concat(),
        ),
        ("half a query", half(b'Q', b"SELECT 1")),
        ("a goodbye", message(b'X', b"")),
    ]
}

async fn is_served_as_by_postgresql(mode: &str) {
    let tables = "
                  ALTER TABLE one.t ALTER x TYPE int USING 0; ALTER TABLE two.t ALTER x TYPE int USING 0;
                  GRANT ALL ON one.t, two.t TO PUBLIC";
    let comparison = Comparison::start_in(mode, 1, tables).await;
    let mut checks = comparison.twin("").await;
    for (what, said) in sayings() {
        // In session mode there is one server, and the client before may still have it.
        if mode == "session" {
            checks.proxied.send(b'X', b"").await.until_end().await;
        }
        let mut twin = comparison.twin("").await;
        twin.direct.query("SET search_path = one").await;
        twin.proxied.query("SET search_path = two").await;
        let direct = says(&mut twin.direct, &said).await;
        let proxied = says(&mut twin.proxied, &said).await;
        assert_eq!(tags(&proxied), tags(&direct), "{mode}, {what}: {proxied:?} {direct:?}");
        assert_eq!(proxied, direct, "{mode}, {what}");
        if mode == "session" {
            checks = comparison.twin("").await;
        }
        for count in ["SELECT count(*) FROM one.t", "SELECT count(*) FROM two.t"] {
            // The direct connection's end is the end of its transaction, too: its session may end later.
            in_time(what, async {
                while rows(
                    &checks
                        .proxied
                        .query("SELECT (SELECT count(*) FROM one.t) - (SELECT count(*) FROM two.t)")
                        .await,
                )[0][0]
                    .as_deref()
                    != Some("0")
                {}
            })
            .await;
            assert_eq!(
                rows(&checks.direct.query(count).await),
                rows(&checks.proxied.query(count).await),
                "{what}"
            );
        }
    }
}

#[tokio::test]
async fn what_was_sent_before_a_half_close_is_served_in_transaction_mode() {
    is_served_as_by_postgresql("transaction").await;
}

#[tokio::test]
async fn what_was_sent_before_a_half_close_is_served_in_session_mode() {
    is_served_as_by_postgresql("session").await;
}

/// One server, which somebody else holds.
async fn busy() -> (Proxy, Wire) {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let mut holder = proxy.wire("acme").await;
    holder.query("CREATE TABLE t (x int)").await;
    holder.query("BEGIN").await;
    (proxy, holder)
}

/// Waits until so many clients wait for a server.
async fn waiting(proxy: &Proxy, count: &str) {
    let console = proxy.console().await;
    in_time("clients in the queue", async {
        while !show(&console, "POOLS").await.iter().any(|pool| pool["cl_waiting"] == count) {}
    })
    .await;
    console.leave().await;
}

#[tokio::test]
async fn a_request_of_a_half_closed_client_waits_for_a_server() {
    let (proxy, mut holder) = busy().await;
    let mut client = proxy.wire("acme").await;
    let said = [query("INSERT INTO t VALUES (1) RETURNING x"), batch("SELECT 2")].concat();
    let served = async { says(&mut client, &said).await };
    let released = async {
        waiting(&proxy, "1").await;
        holder.query("COMMIT").await;
    };
    let (answers, ()) = tokio::join!(served, released);
    assert_eq!(tags(&answers), "TDCZ12DCZ");
    assert_eq!(rows(&holder.query("SELECT count(*) FROM t").await)[0][0].as_deref(), Some("1"));
}

/// Closed in both directions, it looks like a client that reads on until something is sent to it.
#[tokio::test]
async fn a_client_that_is_gone_gives_up_its_place_in_the_queue() {
    let (proxy, mut holder) = busy().await;
    for (request, by_reset) in [("INSERT INTO t VALUES (1)", false), ("INSERT INTO t VALUES (2)", true)] {
        let mut client = proxy.wire("acme").await;
        client.send_bytes(&query(request)).await;
        waiting(&proxy, "1").await;
        if by_reset {
            client.reset()
        } else {
            drop(client)
        }
        waiting(&proxy, "0").await;
    }
    holder.query("COMMIT").await;
    assert_eq!(rows(&holder.query("SELECT count(*) FROM t").await)[0][0].as_deref(), Some("0"));
}

/// It reads on for a while, and is told now and then what it knows; then it leaves.
#[tokio::test]
async fn a_half_closed_client_that_leaves_later_frees_its_server() {
    for mode in ["transaction", "session"] {
        let proxy = Proxy::with_tenant("acme").pool_mode(mode).pool_size(1).start().await;
        let mut client = proxy.wire("acme").await;
        client.send_bytes(&query("SELECT pg_sleep(600)")).await.stream.shutdown().await.unwrap();
        for _ in 0..2 {
            assert_eq!(
                client.receive().await,
                Message { tag: b'S', body: b"integer_datetimes\0on\0".to_vec() }
            );
        }
        drop(client);
        assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1", "{mode}");
    }
}

/// Its choice is carried out at a tenant that it has not entered yet.
#[tokio::test]
async fn a_service_logins_session_goes_on_at_the_tenant_it_has_chosen() {
    let proxy = Proxy::with_tenant("acme").and_tenant("beta").pool_size(1).start().await;
    proxy.create_login("api", "one for all", &["--service", "--tenants", "acme,beta"]);
    for at in ["api", "acme"] {
        let mut client = Wire::login(proxy.port(), "api", "one for all", at).await;
        let said = [
            query("SELECT current_database()"),
            query("SET pglobby.tenant = 'beta'"),
            query("SELECT current_database()"),
            batch("SELECT 2"),
        ];
        let from = usize::from(at == "api");
        let answers = says(&mut client, &said[from..].concat()).await;
        assert_eq!(rows(&answers).concat().last(), Some(&Some("2".to_owned())), "{at}: {answers:?}");
        assert!(rows(&answers).contains(&vec![Some("beta".to_owned())]), "{at}: {answers:?}");
    }
}
