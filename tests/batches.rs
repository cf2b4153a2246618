//! What the proxy puts in front of a client's request is never between the requests of a batch that the client has begun: it would
//! end what PostgreSQL skips, or commits, as one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Proxy, Wire,
    wire::{bind, c_string, execute, message, parse, rows, sync, tags},
};

fn query(sql: &str) -> Vec<u8> {
    message(b'Q', &c_string(sql))
}

fn batch_of(texts: &[&str]) -> Vec<u8> {
    let parts = texts.iter().map(|sql| [parse("", sql), bind("", "", &[]), execute("", 0)].concat());
    [parts.collect::<Vec<_>>().concat(), sync()].concat()
}

/// The only server comes to `wire` from a session that has read a sequence.
async fn after_another(other: &mut Wire) {
    assert_eq!(tags(&other.query("SELECT nextval('counter'); SELECT lastval()").await), "TDCTDCZ");
}

/// A server that comes from another session forgets its sequences first. That was done in the middle of the client's own batch.
#[tokio::test]
async fn sequences_are_forgotten_in_front_of_a_batch_and_not_within() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    client.query("CREATE SEQUENCE counter; CREATE TABLE made (x int)").await;
    for (texts, answer) in [
        (vec!["BEGIN ISOLATION LEVEL SERIALIZABLE", "SELECT 1", "COMMIT"], "12C12DC12CZ"),
        (vec!["VACUUM made"], "12CZ"),
        (vec!["DISCARD ALL"], "12CZ"),
        (vec!["SELECT lastval()"], "12EZ"),
    ] {
        after_another(&mut other).await;
        let answers = client.send_bytes(&batch_of(&texts)).await.until_ready().await;
        assert_eq!(tags(&answers), answer, "{texts:?}: {answers:?}");
    }
}

/// PostgreSQL skips what comes behind an error up to the client's Sync, a simple query too.
#[tokio::test]
async fn a_query_behind_an_error_of_its_batch_is_not_executed() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    client.query("CREATE SEQUENCE counter; CREATE TABLE made (x int)").await;
    client.query("PREPARE mine AS INSERT INTO made VALUES (1)").await;
    for sql in ["INSERT INTO made VALUES (1)", "EXECUTE mine"] {
        for first in [execute("none", 0), bind("", "none", &[]), batch_of(&["SELECT 1/0"])[..].to_vec()] {
            after_another(&mut other).await;
            // What is prepared is brought to the server anew.
            other.query("DEALLOCATE ALL").await;
            let open = first.strip_suffix(&sync()[..]).unwrap_or(&first);
            client.send_bytes(&[open, &query(sql), &sync()].concat()).await;
            let answers = tags(&client.until_ready().await);
            assert!(answers.ends_with("EZ"), "{sql}: {answers}");
            assert_eq!(
                rows(&client.query("SELECT count(*) FROM made").await)[0][0].as_deref(),
                Some("0"),
                "{sql}"
            );
        }
    }
    // Where nothing fails, it is carried out.
    client
        .send_bytes(&[bind("", "", &[]), parse("", "SELECT 1"), query("EXECUTE mine"), sync()].concat())
        .await;
    client.until_ready().await;
    client
        .send_bytes(
            &[parse("", "SELECT 1"), bind("", "", &[]), execute("", 0), query("EXECUTE mine")].concat(),
        )
        .await;
    assert_eq!(tags(&client.until_ready().await), "12DCCZ");
    assert_eq!(rows(&client.query("SELECT count(*) FROM made").await)[0][0].as_deref(), Some("1"));
}

/// A name that DEALLOCATE takes away may be given anew right behind it. What was parsed under it on the server took the name of a
/// statement that others share, and the new statement was forgotten with the old one.
#[tokio::test]
async fn a_statement_that_is_prepared_right_behind_the_end_of_another_stays() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    for end in ["DEALLOCATE a", "DEALLOCATE ALL", "DISCARD ALL"] {
        for by_batch in [false, true] {
            for wire in [&mut client, &mut other] {
                wire.send_bytes(&[parse("a", "SELECT 'old'"), sync()].concat()).await.until_ready().await;
            }
            let ended = if by_batch { batch_of(&[end]) } else { query(end) };
            client.send_bytes(&[ended, parse("a", "SELECT 'new'"), sync()].concat()).await;
            let answers = [client.until_ready().await, client.until_ready().await].concat();
            assert!(tags(&answers).ends_with("CZ1Z"), "{end}: {answers:?}");
            for (wire, expected) in [(&mut other, "old"), (&mut client, "new")] {
                let used = [bind("", "a", &[]), execute("", 0), sync()].concat();
                let answers = wire.send_bytes(&used).await.until_ready().await;
                assert_eq!(tags(&answers), "2DCZ", "{end}: {answers:?}");
                assert_eq!(rows(&answers)[0][0].as_deref(), Some(expected), "{end}");
            }
            for wire in [&mut client, &mut other] {
                wire.query("DEALLOCATE ALL").await;
            }
        }
    }
    // What is used behind it has gone.
    client.send_bytes(&[parse("a", "SELECT 1"), sync()].concat()).await.until_ready().await;
    client.send_bytes(&[query("DEALLOCATE a"), bind("", "a", &[]), execute("", 0), sync()].concat()).await;
    assert_eq!(tags(&client.until_ready().await), "CZ");
    assert_eq!(tags(&client.until_ready().await), "EZ");
}
