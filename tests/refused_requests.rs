//! A request that is refused is left out to its last byte, however long it is, with one error and one ReadyForQuery; and what
//! asks for nothing waits for no server.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{fs, time::Duration};

use rustix::process::Signal;
use support::{
    Proxy, Wire,
    client::in_time,
    wire::{batch, bind, c_string, execute, message, parse, rows, sync, tags},
};
use tokio::{io::AsyncWriteExt, net::TcpStream};

fn query(sql: &str) -> Vec<u8> {
    message(b'Q', &c_string(sql))
}

/// Requests of about this length, by every message that may be long: each has one error and one ReadyForQuery to come.
fn requests_of(length: usize) -> Vec<(&'static str, Vec<u8>)> {
    let long = "x".repeat(length);
    let ended =
        |value| [parse("", "SELECT $1"), bind("", "", &[Some(value)]), execute("", 0), sync()].concat();
    vec![
        ("a query", query(&format!("SELECT '{long}'"))),
        ("a bound value", ended(&long)),
        ("a text that is parsed", batch(&format!("SELECT '{long}'"))),
        ("a call", message(b'F', &[&1397u32.to_be_bytes()[..], long.as_bytes()].concat())),
    ]
}

const LENGTHS: [usize; 4] = [10, 20_000, 200_000, 5_000_000];

/// Sends each request in two halves, the second one when the error is in.
async fn are_refused(client: &mut Wire, sqlstate: &str) {
    for length in LENGTHS {
        for (what, request) in requests_of(length) {
            let (first, second) = request.split_at(request.len() / 2);
            client.send_bytes(first).await.send_bytes(second).await;
            let answers = client.until_ready().await;
            assert_eq!(tags(&answers), "EZ", "{what} of {length} bytes: {answers:?}");
            assert_eq!(answers[0].sqlstate(), sqlstate, "{what} of {length} bytes");
        }
    }
}

/// One server, which somebody else holds, and a client that will not wait for long.
async fn busy() -> (Proxy, Wire, Wire) {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    proxy.client("acme").run("CREATE TABLE t (x int); INSERT INTO t VALUES (0)").then_leave().await;
    let mut holder = proxy.wire("acme").await;
    // The second is answered when what the first may have left behind is known: from then on it keeps no server.
    holder.query("SELECT 1").await;
    holder.query("SELECT 1").await;
    let client = impatient(&proxy).await;
    holder.query("BEGIN").await;
    (proxy, holder, client)
}

/// A client that does not wait for long, once it is in.
async fn impatient(proxy: &Proxy) -> Wire {
    proxy.set_config("query_wait_timeout", "\"50ms\"");
    proxy.signal(Signal::HUP);
    proxy.logged("configuration reloaded").await;
    proxy.wire("acme").await
}

#[tokio::test]
async fn a_request_of_any_length_that_waited_in_vain_is_refused_whole_and_the_session_goes_on() {
    let (_proxy, mut holder, mut client) = busy().await;
    are_refused(&mut client, "57014").await;
    holder.query("COMMIT").await;
    assert_eq!(tags(&client.query("SELECT 1").await), "TDCZ");
}

#[tokio::test]
async fn a_request_of_any_length_to_a_host_that_is_down_is_refused_whole_and_the_session_goes_on() {
    let builder = Proxy::with_tenant("acme").pool_size(1).config("hold_during_outage", "false");
    let mut proxy = builder.start().await;
    let mut client = proxy.wire("acme").await;
    client.query("SELECT 1").await;
    client.query("SELECT 1").await;
    proxy.cluster.stop();
    for (_, request) in [requests_of(200_000), requests_of(2_000_000)].concat() {
        client.send_bytes(&request).await;
        assert_eq!(tags(&client.until_ready().await), "EZ");
    }
    proxy.cluster.start_again();
    assert_eq!(tags(&client.query("SELECT 1").await), "TDCZ");
}

#[tokio::test]
async fn a_request_of_any_length_to_a_paused_tenant_is_refused_whole_and_the_session_goes_on() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    proxy.wire("acme").await.query("SELECT 1").await;
    let mut client = impatient(&proxy).await;
    let console = proxy.console().await;
    console.run("PAUSE acme").await;
    are_refused(&mut client, "57014").await;
    console.run("RESUME acme").await;
    assert_eq!(tags(&client.query("SELECT 1").await), "TDCZ");
}

/// Sends a cancel until somebody has heard of it.
async fn cancelled(proxy: &Proxy, client: &mut Wire) {
    in_time("a cancel", async {
        loop {
            let mut other = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
            other.write_all(&client.cancel_request()).await.unwrap();
            let patience = Duration::from_millis(100);
            let Ok(answers) = tokio::time::timeout(patience, client.until_ready()).await else { continue };
            assert_eq!((tags(&answers).as_str(), answers[0].sqlstate().as_str()), ("EZ", "57014"));
            return;
        }
    })
    .await;
}

#[tokio::test]
async fn a_request_of_any_length_that_is_cancelled_while_it_waits_is_refused_whole() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (mut holder, mut client) = (proxy.wire("acme").await, proxy.wire("acme").await);
    holder.query("BEGIN").await;
    for (_, request) in [requests_of(10), requests_of(90_000)].concat() {
        client.send_bytes(&request).await;
        cancelled(&proxy, &mut client).await;
    }
    // Longer than what is taken in while it waits: the rest comes behind its refusal.
    let mut request = query(&format!("SELECT '{}'", "x".repeat(1_000_000)));
    let rest = request.split_off(500_000);
    client.send_bytes(&request).await;
    let mut other = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
    let error = in_time("an error", async {
        loop {
            other.write_all(&client.cancel_request()).await.unwrap();
            let patience = Duration::from_millis(100);
            if let Ok(error) = tokio::time::timeout(patience, client.receive()).await {
                return error;
            }
            other = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
        }
    });
    assert_eq!(error.await.sqlstate(), "57014");
    client.send_bytes(&rest).await;
    assert_eq!(tags(&client.until_ready().await), "Z");
    holder.query("COMMIT").await;
    assert_eq!(tags(&client.query("SELECT 1").await), "TDCZ");
}

/// What is behind a refused request has its own answer, and the first error does not wait for the second.
#[tokio::test]
async fn requests_behind_a_long_one_that_is_refused_have_answers_of_their_own() {
    let (_proxy, mut holder, mut client) = busy().await;
    let long = query(&format!("SELECT '{}'", "x".repeat(300_000)));
    client.send_bytes(&[long.clone(), batch("SELECT 1"), long, query("SELECT 2")].concat()).await;
    for _ in 0..4 {
        assert_eq!(tags(&client.until_ready().await), "EZ");
    }
    client.send_bytes(&[query("SELECT 1"), query("SELECT 2")].concat()).await;
    assert_eq!(tags(&client.until_ready().await), "EZ");
    holder.query("COMMIT").await;
    assert!(["TDCZ", "EZ"].contains(&tags(&client.until_ready().await).as_str()));
    assert_eq!(tags(&client.query("SELECT 1").await), "TDCZ");
}

/// The answer to the first request was sent when the wait for the second one was over.
#[tokio::test]
async fn an_answer_does_not_wait_for_the_server_that_the_next_request_waits_for() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (mut holder, mut client) = (proxy.wire("acme").await, proxy.wire("acme").await);
    holder.query("BEGIN").await;
    client.send_bytes(&[query("SELECT 'first'"), query("SELECT 'second'")].concat()).await;
    cancelled(&proxy, &mut client).await;
    holder.query("COMMIT").await;
    assert_eq!(tags(&client.until_ready().await), "TDCZ");
}

fn resident_bytes(proxy: &Proxy) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", proxy.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

#[tokio::test]
async fn nothing_of_a_refused_request_is_kept() {
    let (proxy, _holder, mut client) = busy().await;
    are_refused(&mut client, "57014").await;
    let before = resident_bytes(&proxy);
    for (_, request) in requests_of(64_000_000) {
        client.send_bytes(&request).await;
        assert_eq!(tags(&client.until_ready().await), "EZ");
    }
    let grown = resident_bytes(&proxy).saturating_sub(before);
    assert!(grown < 16_000_000, "{grown} bytes more");
}

/// Drivers send what belongs to a COPY that failed behind its end. Each of these was a request that waited for a server, was
/// answered by an error that nobody asked for, and took the statement behind it along, unexecuted.
#[tokio::test]
async fn what_asks_for_nothing_waits_for_no_server_and_takes_nothing_along() {
    let (_proxy, mut holder, mut client) = busy().await;
    let strays = |length: usize| {
        [
            // PostgreSQL closes the connection for a longer one.
            message(b'f', &c_string(&"x".repeat(length.min(9_000)))),
            message(b'c', b""),
            message(b'd', &vec![b'7'; length]),
            message(b'H', b""),
        ]
    };
    let mut number = 0;
    for length in [10, 20_000, 300_000] {
        for stray in strays(length).iter().chain([&strays(length).concat()]) {
            for together in [false, true] {
                number += 1;
                let update = query(&format!("UPDATE t SET x = x + 1 /* {number} */"));
                // A Sync behind it is answered, and nothing else is.
                client.send_bytes(&[&stray[..], &sync()].concat()).await;
                assert_eq!(tags(&client.until_ready().await), "Z");
                if together {
                    client.send_bytes(&[&stray[..], &update].concat()).await;
                } else {
                    let (first, second) = stray.split_at(stray.len() / 2);
                    client.send_bytes(first).await.send_bytes(second).await.send_bytes(&update).await;
                }
                assert_eq!(tags(&client.until_ready().await), "EZ", "of the UPDATE");
                // And where it gets its server, it is executed.
                holder.query("COMMIT").await;
                client.send_bytes(&[&stray[..], &update].concat()).await;
                let answers = client.until_ready().await;
                assert_eq!(tags(&answers), "CZ", "{number} {} {answers:?}", stray.len());
                assert_eq!(tags(&holder.query("BEGIN").await), "CZ");
            }
        }
    }
    holder.query("COMMIT").await;
    let count = rows(&holder.query("SELECT x FROM t").await);
    assert_eq!(count[0][0], Some(number.to_string()));
}

/// A COPY that is refused, and all that its client sends for it before it knows.
#[tokio::test]
async fn the_data_of_a_copy_that_was_refused_is_left_out() {
    let (_proxy, mut holder, mut client) = busy().await;
    let data = message(b'd', &b"7\n".repeat(150_000));
    let by_query = [query("COPY t FROM STDIN"), data.clone(), data.clone(), message(b'c', b"")].concat();
    client.send_bytes(&by_query).await;
    assert_eq!(tags(&client.until_ready().await), "EZ");
    let begun = [parse("", "COPY t FROM STDIN"), bind("", "", &[]), execute("", 0)].concat();
    client.send_bytes(&[begun.clone(), data.clone(), message(b'c', b""), sync()].concat()).await;
    assert_eq!(tags(&client.until_ready().await), "EZ");
    // As PostgreSQL answers it where the COPY fails: the second Sync is not part of the data.
    client.send_bytes(&[begun, sync(), data, message(b'f', b"why\0"), sync()].concat()).await;
    assert_eq!(tags(&client.until_ready().await), "EZ");
    assert_eq!(tags(&client.until_ready().await), "Z");
    holder.query("COMMIT").await;
    assert_eq!(rows(&client.query("SELECT count(*) FROM t").await)[0][0].as_deref(), Some("1"));
}

/// A service login's session without a tenant, with one, and in a transaction of no tenant's that has failed.
#[tokio::test]
async fn a_service_logins_request_of_any_length_is_refused_whole_where_no_server_is_to_get_it() {
    let proxy = Proxy::with_tenant("acme").and_tenant("beta").pool_size(1).start().await;
    proxy.create_login("api", "one for all", &["--service", "--tenants", "acme,beta"]);
    let mut client = Wire::login(proxy.port(), "api", "one for all", "api").await;
    let strays = [message(b'd', &vec![b'7'; 200_000]), message(b'c', b""), message(b'f', &[b'x'; 9_000])];
    are_refused(&mut client, "55000").await;
    client.send_bytes(&strays.concat()).await;
    assert_eq!(tags(&client.query("BEGIN").await), "CZ");
    assert_eq!(tags(&client.query("SET pglobby.tenant = 'nobody'").await), "EZ");
    are_refused(&mut client, "25P02").await;
    client.send_bytes(&strays.concat()).await;
    assert_eq!(client.query("ROLLBACK").await[0].command(), "ROLLBACK");

    assert_eq!(tags(&client.query("SET pglobby.tenant = 'acme'").await), "CZ");
    assert_eq!(tags(&client.query("BEGIN").await), "CZ");
    assert_eq!(tags(&client.query("SET pglobby.tenant = 'nobody'").await), "EZ");
    are_refused(&mut client, "25P02").await;
    assert_eq!(client.query("ROLLBACK").await[0].command(), "ROLLBACK");
    client.send_bytes(&strays.concat()).await;
    assert!(tags(&client.query("SELECT 1, 2").await).ends_with("TDCZ"));
}

/// Where a server is made to refuse what must not be done, the rest of a long message is not taken for another one.
#[tokio::test]
async fn what_a_server_is_made_to_refuse_is_refused_whole() {
    let proxy = Proxy::with_tenant("acme").and_tenant("beta").pool_size(2).start().await;
    proxy.create_login("api", "one for all", &["--service", "--tenants", "acme,beta"]);
    let mut client = Wire::login(proxy.port(), "api", "one for all", "acme").await;
    // No tenant has a name of that length.
    let choice = [
        parse("", "SELECT set_config('pglobby.tenant', $1, false)"),
        bind("", "", &[Some(&"x".repeat(200_000))]),
        execute("", 0),
        sync(),
    ];
    client.send_bytes(&choice.concat()).await;
    let answers = client.until_ready().await;
    assert!(tags(&answers).ends_with("EZ"), "{answers:?}");
    assert_eq!(tags(&client.query("SELECT 1").await), "TDCZ");

    let long = "x".repeat(2_000_000);
    let bound = [parse("", "SELECT $1"), bind("", "", &[Some(&long)]), execute("", 0)].concat();
    for (behind, answer) in [
        (query(&format!("SELECT '{long}'")), "EZ"),
        (message(b'F', &[&1397u32.to_be_bytes()[..], long.as_bytes()].concat()), "EZ"),
        (bound, "1E"),
    ] {
        client.query("BEGIN").await;
        assert_eq!(tags(&client.query("SET LOCAL pglobby.tenant = 'beta'").await), "CZ");
        let answers = client.query("SELECT 1").await;
        assert!(tags(&answers).ends_with("TDCZ"), "{answer} {answers:?}");
        let commit = [parse("", "COMMIT"), bind("", "", &[]), execute("", 0)].concat();
        client.send_bytes(&[commit, behind, sync()].concat()).await;
        let mut answers = client.until_ready().await;
        if answer.ends_with('Z') {
            answers.extend(client.until_ready().await);
        }
        assert_eq!(tags(&answers), format!("12C{answer}Z"), "{answers:?}");
        assert_eq!(rows(&client.query("SELECT current_database()").await)[0][0].as_deref(), Some("acme"));
    }
}
