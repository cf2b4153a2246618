//! Half a message of a client that is gone is nobody's beginning: what one client left unsaid is never completed by the next
//! one's bytes, nor by our own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Client, Proxy, Wire,
    client::in_time,
    wire::{batch, bind, c_string, execute, message, parse, rows, sync, tags},
};

fn query(sql: &str) -> Vec<u8> {
    message(b'Q', &c_string(sql))
}

/// A Bind of one binary value.
fn bind_binary(value: &[u8]) -> Vec<u8> {
    let length = u32::try_from(value.len()).unwrap().to_be_bytes();
    message(b'B', &[b"\0\0\0\x01\0\x01\0\x01".as_slice(), &length, value, b"\0\0"].concat())
}

/// What a victim sends whose value is text to itself and a query to a server that is out of step; and how many bytes are in
/// front of that query.
fn victims_batch() -> (Vec<u8>, usize) {
    let value = query("INSERT INTO stolen VALUES (1)");
    let head = parse("", "SELECT length($1::bytea)");
    let bound = bind_binary(&value);
    let before = head.len() + bound.len() - value.len() - 2;
    ([head, bound, execute("", 0), sync()].concat(), before)
}

/// The beginning of a message that `missing` more bytes would complete.
fn half(tag: u8, body: &[u8], missing: usize) -> Vec<u8> {
    let length = u32::try_from(4 + body.len() + missing).unwrap();
    [&[tag][..], &length.to_be_bytes(), body].concat()
}

async fn leaves(client: Wire, by_reset: bool) {
    if by_reset { client.reset() } else { drop(client) }
}

/// What a client may have said before the half message, and what it is told then, though the message is not whole yet.
fn beginnings() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let failed_copy = [query("COPY t FROM STDIN"), message(b'd', b"no number\n")].concat();
    vec![
        ("a query", query("SELECT 1"), "TDCZ"),
        ("a batch", batch("SELECT 1"), "12DCZ"),
        ("a failed batch", batch("SELECT 1/0"), "1EZ"),
        ("a transaction", query("BEGIN"), "CZ"),
        ("a failed transaction", query("BEGIN; SELECT 1/0"), "CEZ"),
        ("a COPY that failed", failed_copy, "GEZ"),
        ("a pinned server", query("CREATE TEMPORARY TABLE mine (x int)"), "CZ"),
    ]
}

/// A CopyData of chosen length, left half said, made a victim's bound value run as SQL in the victim's session.
async fn nothing_is_completed(mode: &str) {
    let proxy = Proxy::with_tenant("acme").pool_mode(mode).pool_size(1).start().await;
    let behind = proxy.behind("acme").await;
    proxy.client("acme").run("CREATE TABLE t (x int); CREATE TABLE stolen (x int)").then_leave().await;
    let (victims, before) = victims_batch();
    for (what, beginning, answer) in beginnings() {
        for (number, tag) in b"dfcHQF".iter().enumerate() {
            let mut client = proxy.wire("acme").await;
            // In one write, so that the half message meets the server that the beginning borrowed.
            client.send_bytes(&[&beginning[..], &half(*tag, b"", before)].concat()).await;
            assert_eq!(tags(&client.until_ready().await), answer, "{what}");
            leaves(client, number % 2 == 0).await;

            let mut victim = proxy.wire("acme").await;
            let answers = victim.send_bytes(&victims).await.until_ready().await;
            let context = format!("{mode}, {what}, then half a {}", char::from(*tag));
            assert_eq!(tags(&answers), "12DCZ", "{context}");
            assert_eq!(rows(&victim.query("SELECT 'in step'").await)[0][0].as_deref(), Some("in step"));
            victim.send(b'X', b"").await.until_end().await;
            assert_eq!(behind.ask("SELECT count(*) FROM stolen").await, "0", "{context}");
        }
    }
    assert!(!proxy.log().contains("both connections closed"), "{}", proxy.log());
}

#[tokio::test]
async fn half_a_message_of_a_client_that_left_is_not_completed_by_the_next_in_transaction_mode() {
    nothing_is_completed("transaction").await;
}

#[tokio::test]
async fn half_a_message_of_a_client_that_left_is_not_completed_by_the_next_in_session_mode() {
    nothing_is_completed("session").await;
}

/// A COPY that failed while its client streamed on, without malice: what is said behind the failure reaches no server, so that
/// the server need not be closed for it either.
#[tokio::test]
async fn what_streams_on_behind_a_copy_that_failed_reaches_no_server() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let mut other = proxy.wire("acme").await;
    other.query("CREATE TABLE t (x int)").await;
    let pid = rows(&other.query("SELECT pg_backend_pid()").await);
    for by_reset in [true, false] {
        let mut client = proxy.wire("acme").await;
        client.send_bytes(&[query("COPY t FROM STDIN"), message(b'd', b"bad\n")].concat()).await;
        assert_eq!(tags(&client.until_ready().await), "GEZ");
        client.send_bytes(&message(b'd', &vec![b'7'; 300_000])).await;
        client.send_bytes(&half(b'd', &vec![b'8'; 200_000], 1000)).await;
        // While it streams, nobody waits for it.
        assert_eq!(rows(&other.query("SELECT pg_backend_pid()").await), pid);
        leaves(client, by_reset).await;
        assert_eq!(rows(&other.query("SELECT pg_backend_pid()").await), pid);
    }
    assert_eq!(tags(&other.query("SELECT 1").await), "TDCZ");
}

/// The goodbye that we say for a client would be the last five bytes of what it left unsaid: that call would be carried out.
#[tokio::test]
async fn our_own_goodbye_completes_nothing() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let behind = proxy.behind("acme").await;
    proxy.client("acme").run("CREATE SEQUENCE counter").then_leave().await;
    let counter: u32 = behind.ask("SELECT 'counter'::regclass::oid").await.parse().unwrap();
    let setval = 1576u32; // setval(regclass, bigint)
    let mut call = setval.to_be_bytes().to_vec();
    call.extend([0, 1, 0, 1, 0, 2, 0, 0, 0, 4]);
    call.extend(counter.to_be_bytes());
    call.extend([0, 0, 0, 8, 0, 0, 0, 0, 0]); // three more bytes of the value, and two of the result's format
    for beginning in [query("BEGIN"), query("SELECT 1")] {
        let mut client = proxy.wire("acme").await;
        client.send_bytes(&[&beginning[..], &half(b'F', &call, 5)].concat()).await.until_ready().await;
        drop(client);
        assert_eq!(proxy.client("acme").ask("SELECT 'next'").await, "next");
        assert_eq!(behind.ask("SELECT is_called FROM counter").await, "f");
    }
}

/// A client that says goodbye where PostgreSQL waits for more from it: nobody will ever send that, and the server would be lost
/// to the pool for ever.
#[tokio::test]
async fn a_goodbye_where_the_server_waits_for_more_frees_the_server() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let mut other = proxy.wire("acme").await;
    other.query("CREATE TABLE t (x int)").await;
    let unsynced = [parse("", "INSERT INTO t VALUES (2)"), bind("", "", &[]), execute("", 0)].concat();
    let cases: [(&str, Vec<u8>, &str); 5] = [
        ("in a COPY", query("COPY t FROM STDIN"), "0"),
        ("in a COPY with data", [query("COPY t FROM STDIN"), message(b'd', b"1\n")].concat(), "0"),
        ("in a batch", unsynced.clone(), "0"),
        ("behind an error in a batch", [parse("", "unparsable"), bind("", "", &[])].concat(), "0"),
        ("in a batch behind a query", [query("INSERT INTO t VALUES (1)"), unsynced].concat(), "1"),
    ];
    for (what, said, count) in cases {
        let mut client = proxy.wire("acme").await;
        client.send_bytes(&[said, message(b'X', b"")].concat()).await.until_end().await;
        let found = in_time(what, other.query("SELECT count(*) FROM t")).await;
        assert_eq!(rows(&found)[0][0].as_deref(), Some(count), "{what}");
    }
}

/// A client is cut at every byte of what it says, and the server it had serves the next one as if nothing had been.
#[tokio::test]
async fn a_client_may_break_off_at_any_byte() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let next: Client = proxy.client("acme").connect().await;
    next.run("CREATE TABLE t (x int)").await;
    let said = [
        query("COPY t FROM STDIN"),
        message(b'd', b"bad\n"),
        message(b'd', b"behind\n"),
        message(b'c', b""),
        message(b'H', b""),
        batch("SELECT 1/0"),
        query("BEGIN"),
        message(b'f', b"stray\0"),
        [parse("", "INSERT INTO t VALUES ($1)"), bind("", "", &[Some("1")])].concat(),
    ]
    .concat();
    for cut in (1..said.len()).step_by(3) {
        let mut client = proxy.wire("acme").await;
        client.send_bytes(&said[..cut]).await;
        leaves(client, cut % 2 == 0).await;
        assert_eq!(next.ask("SELECT count(*) FROM t").await, "0", "cut at {cut}");
    }
}

/// A Terminate of which only the beginning comes is one all the same. A server that waited for COPY data was kept for ever.
#[tokio::test]
async fn half_a_terminate_in_the_middle_of_a_copy_frees_the_server() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let mut victim = proxy.wire("acme").await;
    victim.query("CREATE TABLE t (x int)").await;
    for beginning in [
        query("COPY t FROM STDIN"),
        [parse("", "COPY t FROM STDIN"), bind("", "", &[]), execute("", 0)].concat(),
    ] {
        let mut client = proxy.wire("acme").await;
        client.send_bytes(&[&beginning[..], &message(b'd', b"1\n"), &half(b'X', b"", 7)].concat()).await;
        client.until_end().await;
        assert_eq!(rows(&victim.query("SELECT count(*) FROM t").await)[0][0].as_deref(), Some("0"));
    }
}
