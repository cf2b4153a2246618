//! COPY in both directions, with both protocols and every exit.
//!
//! pgbouncer#1025: COPY FROM leaked memory and statements; pg_doorman: connections leaked on errors in COPY.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Proxy, Wire,
    client::in_time,
    wire::{Message, bind, c_string, execute, message, parse, rows, sync, tags},
};

/// A proxy with one server, a client, and another that shares the server; both know `t (x int)`.
async fn table() -> (Proxy, Wire, Wire) {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (mut client, other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    assert_eq!(tags(&client.query("CREATE TABLE t (x int)").await), "CZ");
    (proxy, client, other)
}

async fn count(client: &mut Wire) -> String {
    let answers = client.query("SELECT count(*) FROM t").await;
    rows(&answers)[0][0].clone().unwrap()
}

fn sqlstate(answers: &[Message]) -> String {
    answers.iter().find(|message| message.tag == b'E').expect("an error").sqlstate()
}

fn copy_by_batch() -> Vec<u8> {
    [parse("", "COPY t FROM STDIN"), bind("", "", &[]), execute("", 0)].concat()
}

#[tokio::test]
async fn copy_in_by_simple_query_ends_done_failed_or_with_the_servers_error() {
    let (_proxy, mut client, mut other) = table().await;
    let copy = message(b'Q', &c_string("COPY t FROM STDIN"));

    client.send_bytes(&copy).await.until(b'G').await;
    client.send(b'd', b"1\n2\n").await.send(b'd', b"3\n").await.send(b'c', b"").await;
    assert_eq!(tags(&client.until_ready().await), "CZ");
    assert_eq!(count(&mut other).await, "3");

    client.send_bytes(&copy).await.until(b'G').await;
    client.send(b'd', b"4\n").await.send(b'f', b"changed my mind\0").await;
    assert_eq!(sqlstate(&client.until_ready().await), "57014");
    assert_eq!(count(&mut other).await, "3");

    client.send_bytes(&copy).await.until(b'G').await;
    client.send(b'd', b"no number\n").await;
    assert_eq!(sqlstate(&client.until_ready().await), "22P02");
    // The server has said ReadyForQuery, and the client goes on for a while: PostgreSQL ignores it.
    client.send(b'd', b"5\n").await.send(b'd', b"6\n").await.send(b'c', b"").await;
    assert_eq!(count(&mut other).await, "3");
    assert_eq!(count(&mut client).await, "3");
}

/// libpq sends Sync only behind CopyDone; other drivers send it with Execute, and the server ignores it while it copies.
#[tokio::test]
async fn copy_in_by_extended_query_ends_in_step_wherever_its_sync_is() {
    let (_proxy, mut client, mut other) = table().await;
    for (rows_before, sync_first) in [(0, false), (2, true)] {
        client.send_bytes(&copy_by_batch()).await;
        if sync_first {
            client.send_bytes(&sync()).await;
        } else {
            client.send(b'H', b"").await;
        }
        assert_eq!(tags(&client.until(b'G').await), "12G");
        client.send(b'd', b"1\n2\n").await.send(b'c', b"").await.send_bytes(&sync()).await;
        assert_eq!(tags(&client.until_ready().await), "CZ");
        assert_eq!(count(&mut other).await, (rows_before + 2).to_string());
    }
    client.send_bytes(&[copy_by_batch(), message(b'd', b"7\n"), message(b'c', b""), sync()].concat()).await;
    assert_eq!(tags(&client.until_ready().await), "12GCZ");
    assert_eq!(count(&mut other).await, "5");
    client
        .send_bytes(&[copy_by_batch(), message(b'd', b"8\n"), message(b'f', b"no\0"), sync()].concat())
        .await;
    assert_eq!(tags(&client.until_ready().await), "12GEZ");
    client
        .send_bytes(
            &[copy_by_batch(), message(b'd', b"bad\n"), message(b'd', b"9\n"), message(b'c', b""), sync()]
                .concat(),
        )
        .await;
    assert_eq!(tags(&client.until_ready().await), "12GEZ");
    client
        .send_bytes(&[copy_by_batch(), sync(), message(b'd', b"bad\n"), message(b'c', b""), sync()].concat())
        .await;
    assert_eq!(tags(&client.until_ready().await), "12GEZ");
    assert_eq!(count(&mut other).await, "5");
    assert_eq!(count(&mut client).await, "5");
}

/// Everything in one packet, and a query behind it.
#[tokio::test]
async fn copies_are_pipelined_with_queries() {
    let (_proxy, mut client, mut other) = table().await;
    let whole = [
        message(b'Q', &c_string("COPY t FROM STDIN")),
        message(b'd', b"1\n"),
        message(b'c', b""),
        message(b'Q', &c_string("COPY t TO STDOUT; SELECT 'behind'")),
        copy_by_batch(),
        message(b'd', b"2\n"),
        message(b'c', b""),
        sync(),
        message(b'Q', &c_string("SELECT count(*) FROM t")),
    ]
    .concat();
    client.send_bytes(&whole).await;
    other.send(b'Q', &c_string("SELECT 'other'")).await;
    for expected in ["GCZ", "HdcCTDCZ", "12GCZ", "TDCZ"] {
        assert_eq!(tags(&client.until_ready().await), expected);
    }
    assert_eq!(tags(&other.until_ready().await), "TDCZ");
}

/// The client is gone in mid-COPY: nothing of it is in the table, and the next client finds a server.
#[tokio::test]
async fn a_client_that_vanishes_in_copy_leaves_nothing_behind() {
    for reset in [false, true] {
        let (proxy, mut client, mut other) = table().await;
        client.send(b'Q', &c_string("COPY t FROM STDIN")).await.until(b'G').await;
        client.send(b'd', b"1\n").await;
        // The beginning of a message that will never be whole.
        client.send_bytes(&[b'd', 0, 0, 1, 0, b'2']).await;
        if reset {
            client.reset();
        } else {
            drop(client);
        }
        assert_eq!(count(&mut other).await, "0");

        let mut reader = proxy.wire("acme").await;
        reader
            .send(
                b'Q',
                &c_string("COPY (SELECT repeat('x', 1000) FROM generate_series(1, 100000)) TO STDOUT"),
            )
            .await;
        reader.until(b'd').await;
        drop(reader);
        assert_eq!(count(&mut other).await, "0");
    }
}

/// A server that is ended in mid-COPY takes the client with it, with the server's own words.
#[tokio::test]
async fn a_server_that_ends_in_copy_is_told() {
    let (proxy, mut client, mut other) = table().await;
    client.send(b'Q', &c_string("COPY t FROM STDIN")).await.until(b'G').await;
    client.send(b'd', b"1\n").await;
    let behind = proxy.behind("acme").await;
    behind.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'COPY%'").await;
    let end = client.until_end().await;
    assert_eq!(end.last().expect("a last word").sqlstate(), "57P01");
    assert_eq!(in_time("another server", count(&mut other)).await, "0");
}

#[tokio::test]
async fn a_large_copy_passes_both_ways() {
    let (_proxy, mut client, mut other) = table().await;
    client.send(b'Q', &c_string("COPY t FROM STDIN")).await.until(b'G').await;
    let rows: String = (0..1000).map(|number| format!("{number}\n")).collect();
    for _ in 0..200 {
        client.send(b'd', rows.as_bytes()).await;
    }
    client.send(b'c', b"").await;
    assert_eq!(client.until_ready().await[0].command(), "COPY 200000");
    let out = other.query("COPY t TO STDOUT").await;
    assert_eq!(out.iter().filter(|message| message.tag == b'd').count(), 200_000);
}
