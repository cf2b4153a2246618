//! Cancel requests: they stop the query they are meant for, and nothing else, ever.
//!
//! pgbouncer#717, pgdog#1505, supavisor#1148: a cancel that came late hit whoever had the server by then.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use support::{
    Proxy, Wire,
    client::{PATIENCE, in_time},
    proxy::{login_of, password_of},
    wire::{self, Message, PROTOCOL_3_2, tags},
};

/// Sends a cancel request on a connection of its own and waits until the proxy closes it, as libpq does.
async fn cancel(port: u16, request: &[u8]) {
    let mut wire = Wire::open(port).await;
    wire.send_bytes(request).await;
    assert_eq!(wire.until_end().await, [], "a cancel connection is answered by its end");
}

fn sqlstate(answers: &[Message]) -> Option<String> {
    answers.iter().find(|message| message.tag == b'E').map(Message::sqlstate)
}

/// Returns when a server runs `marker`, seen from behind the proxy.
async fn runs(proxy: &Proxy, marker: &str) {
    let behind = proxy.behind("acme").await;
    let question = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%{marker}%' AND pid <> pg_backend_pid()"
    );
    in_time(marker, async {
        while behind.ask(&question).await == "0" {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_cancel_stops_the_running_query_and_the_session_lives_on() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let mut client = proxy.wire("acme").await;
    client.send(b'Q', b"SELECT pg_sleep(600) AS long\0").await;
    runs(&proxy, "AS long").await;

    cancel(proxy.port(), &client.cancel_request()).await;

    assert_eq!(sqlstate(&client.until_ready().await).as_deref(), Some("57014"));
    assert_eq!(tags(&client.query("SELECT 1").await), "TDCZ");
}

/// PostgreSQL leaves the transaction failed, not gone.
#[tokio::test]
async fn a_cancel_in_a_transaction_leaves_it_failed() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let mut client = proxy.wire("acme").await;
    client.query("BEGIN").await;
    client.send(b'Q', b"SELECT pg_sleep(600) AS long\0").await;
    runs(&proxy, "AS long").await;

    cancel(proxy.port(), &client.cancel_request()).await;

    assert_eq!(client.until_ready().await.last().unwrap().body, b"E");
    assert_eq!(client.query("ROLLBACK").await.last().unwrap().body, b"I");
}

/// A cancel for somebody who runs nothing does nothing: not now, not to the next query, not to the next client.
#[tokio::test]
async fn a_cancel_for_an_idle_session_does_nothing() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (mut idle, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    idle.query("SELECT 1").await;
    for _ in 0..50 {
        cancel(proxy.port(), &idle.cancel_request()).await;
        assert_eq!(tags(&other.query("SELECT pg_sleep(0.001)").await), "TDCZ");
        assert_eq!(tags(&idle.query("SELECT 1").await), "TDCZ");
    }
    idle.query("BEGIN").await;
    cancel(proxy.port(), &idle.cancel_request()).await;
    assert_eq!(tags(&idle.query("SELECT 1").await), "TDCZ");
}

/// A cancel that came while the session's settings were restored, in front of its query, was lost, and the query ran
/// on. Restoring is slow here, because `default_tablespace` is looked up in a locked catalog. Few are lost where
/// PostgreSQL's own session is later than the cancel, as without a proxy.
#[tokio::test]
async fn a_cancel_waits_for_the_query_behind_the_sessions_settings() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    client.query("SET default_tablespace = 'pg_default'").await;
    let admin = proxy.cluster.client("acme").await;
    let sent = Arc::new(AtomicUsize::new(0));
    for _ in 0..4 {
        other.query("SELECT 1").await;
        admin.run("BEGIN; LOCK TABLE pg_catalog.pg_tablespace IN ACCESS EXCLUSIVE MODE").await;
        client.send(b'Q', b"SELECT pg_sleep(600) AS long\0").await;
        let blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        in_time("the lock", async {
            while admin.ask(blocked).await == "0" {
                admin.run("SELECT pg_stat_clear_snapshot()").await;
            }
        })
        .await;
        let cancelling = cancel_again_and_again(&proxy, &client, &sent);
        // The proxy has the cancel when it has served these, which came later.
        for _ in 0..3 {
            proxy.wire("acme").await;
        }

        admin.run("COMMIT").await;

        assert_eq!(sqlstate(&client.until_ready().await).as_deref(), Some("57014"));
        cancelling.abort();
    }
    let sent = sent.load(Ordering::Relaxed);
    assert!(sent <= 6, "{sent} cancels for 4 queries");
    assert_eq!(tags(&client.query("SELECT 1").await), "TDCZ");
}

/// Sends a cancel request; another one half a second after its end: then it was lost.
fn cancel_again_and_again(
    proxy: &Proxy,
    client: &Wire,
    sent: &Arc<AtomicUsize>,
) -> tokio::task::JoinHandle<()> {
    let (port, request, sent) = (proxy.port(), client.cancel_request(), sent.clone());
    tokio::spawn(async move {
        loop {
            sent.fetch_add(1, Ordering::Relaxed);
            cancel(port, &request).await;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    })
}

/// A cancel may be taken before the request that was sent earlier: each was lost then. Few are lost where PostgreSQL's
/// own session is later than the cancel, as without a proxy.
#[tokio::test]
async fn a_cancel_finds_a_query_that_is_not_read_yet() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let mut client = proxy.wire("acme").await;
    let sent = Arc::new(AtomicUsize::new(0));
    for _ in 0..20 {
        client.send(b'Q', b"SELECT pg_sleep(600) AS long\0").await;
        let cancelling = cancel_again_and_again(&proxy, &client, &sent);
        assert_eq!(sqlstate(&client.until_ready().await).as_deref(), Some("57014"));
        cancelling.abort();
    }
    let sent = sent.load(Ordering::Relaxed);
    assert!(sent <= 25, "{sent} cancels for 20 queries");
}

/// While everybody's transactions end and begin, half of the clients are cancelled without pause, and the other half
/// never: these must not see a single error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_never_hits_another_session() {
    let proxy = Arc::new(Proxy::with_tenant("acme").pool_size(3).start().await);
    let over = Arc::new(AtomicBool::new(false));
    let hits = Arc::new(AtomicUsize::new(0));
    let (mut victims, mut bystanders, mut cancellers) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..6 {
        let mut client = proxy.wire("acme").await;
        // Settings of its own, so that most leases begin with bookkeeping, which no cancel may hit (pgbouncer#298).
        client.query(&format!("SET work_mem = '{}kB'", 1000 + number)).await;
        for setting in 0..50 {
            client.query(&format!("SET my.s{setting} = '{number}'")).await;
        }
        let (request, port, done, hit) = (client.cancel_request(), proxy.port(), over.clone(), hits.clone());
        cancellers.push(tokio::spawn(async move {
            while !done.load(Ordering::Relaxed) {
                cancel(port, &request).await;
            }
        }));
        let done = over.clone();
        victims.push(tokio::spawn(async move {
            while !done.load(Ordering::Relaxed) {
                let answers = client.query("SELECT pg_sleep(0), current_setting('work_mem')").await;
                match sqlstate(&answers).as_deref() {
                    None => {
                        let row = &wire::rows(&answers)[0];
                        assert_eq!(row[1].as_deref(), Some(format!("{}kB", 1000 + number).as_str()));
                    }
                    Some("57014") => drop(hit.fetch_add(1, Ordering::Relaxed)),
                    Some(other) => panic!("{other}: {answers:?}"),
                }
            }
        }));
    }
    for number in 0..6 {
        let mut client = proxy.wire("acme").await;
        bystanders.push(async move {
            for round in 0..300 {
                let answers = client.query(&format!("SELECT {number}, {round}, pg_sleep(0.0005)")).await;
                let row = wire::rows(&answers).first().cloned().unwrap_or_else(|| panic!("{answers:?}"));
                assert_eq!(row[..2], [Some(number.to_string()), Some(round.to_string())]);
            }
        });
    }
    join_all(bystanders).await;
    over.store(true, Ordering::Relaxed);
    for task in victims.into_iter().chain(cancellers) {
        in_time("the end", task).await.unwrap();
    }
    assert!(hits.load(Ordering::Relaxed) > 0, "no cancel arrived in time: the test proved nothing");
    assert!(!proxy.log().contains("both connections closed"), "{}", proxy.log());
}

/// The wait for a server is what the client wants to be rid of; the session goes on.
#[tokio::test]
async fn a_cancel_ends_the_wait_for_a_server() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (mut holder, mut waiter) = (proxy.wire("acme").await, proxy.wire("acme").await);
    holder.query("BEGIN").await;
    waiter.send(b'Q', b"SELECT 'waited'\0").await;
    in_time("a waiter", async {
        while !cancelled_before(&proxy, &mut waiter).await {
            tokio::task::yield_now().await;
        }
    })
    .await;
    holder.query("COMMIT").await;
    assert_eq!(tags(&waiter.query("SELECT 1").await), "TDCZ");
    assert_eq!(tags(&holder.query("SELECT 1").await), "TDCZ");
}

/// Whether a cancel sent now found the client waiting. One that comes before the query has arrived does nothing.
async fn cancelled_before(proxy: &Proxy, waiter: &mut Wire) -> bool {
    cancel(proxy.port(), &waiter.cancel_request()).await;
    let patience = std::time::Duration::from_millis(100);
    let Ok(answers) = tokio::time::timeout(patience, waiter.until_ready()).await else { return false };
    assert_eq!(sqlstate(&answers).as_deref(), Some("57014"));
    true
}

/// Guessing is answered like knowing: by silence and the end.
#[tokio::test]
async fn a_cancel_with_a_wrong_key_does_nothing() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let mut client = proxy.wire("acme").await;
    let right = client.cancel_request();
    client.send(b'Q', b"SELECT pg_sleep(600) AS long\0").await;
    runs(&proxy, "AS long").await;

    let mut wrong_secret = right.clone();
    *wrong_secret.last_mut().unwrap() ^= 1;
    let mut wrong_process = right.clone();
    wrong_process[11] ^= 1;
    for request in [&wrong_secret, &wrong_process] {
        cancel(proxy.port(), request).await;
    }
    // Too short, too long, and with no key at all: closed, whatever they are.
    for length in [8, 12, 15, 17, 300] {
        let mut bytes = right.clone();
        bytes.resize(length, 0);
        bytes[..4].copy_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
        let mut wire = Wire::open(proxy.port()).await;
        wire.send_bytes(&bytes).await;
        wire.until_end().await;
    }
    let behind = proxy.behind("acme").await;
    assert_eq!(
        behind
            .ask("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%AS long' AND state = 'active'")
            .await,
        "1"
    );
    cancel(proxy.port(), &right).await;
    assert_eq!(sqlstate(&client.until_ready().await).as_deref(), Some("57014"));
}

/// The key is forgotten with its session: pgbouncer's slots above the limit, and whoever gets the number next.
#[tokio::test]
async fn the_key_of_a_session_that_left_cancels_nobody() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let mut gone = proxy.wire("acme").await;
    gone.query("SELECT 1").await;
    let key = gone.cancel_request();
    gone.send(b'X', b"").await.until_end().await;
    let gate = proxy.behind("acme").await;
    gate.run("SELECT pg_advisory_lock(1)").await;
    let mut next = proxy.wire("acme").await;
    next.send(b'Q', b"SELECT pg_advisory_xact_lock_shared(1) AS held\0").await;
    runs(&proxy, "AS held").await;

    cancel(proxy.port(), &key).await;
    gate.run("SELECT pg_advisory_unlock(1)").await;

    assert_eq!(tags(&next.until_ready().await), "TDCZ");
}

/// PostgreSQL 18: protocol 3.2 has keys of up to 256 bytes. Ours are longer than 4 where the client can take it.
#[tokio::test]
async fn a_client_of_protocol_3_2_has_a_long_key_that_cancels() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let mut client = Wire::open(proxy.port()).await;
    let user = login_of("acme");
    client.startup(PROTOCOL_3_2, &[("user", &user), ("database", "acme")]).await;
    let greeting = client.authenticate(&password_of("acme")).await.unwrap();
    assert!(!greeting.iter().any(|message| message.tag == b'v'), "3.2 is spoken, not negotiated down");
    assert_eq!(client.key.as_ref().unwrap().1.len(), 32);
    client.send(b'Q', b"SELECT pg_sleep(600) AS long\0").await;
    runs(&proxy, "AS long").await;

    let mut wrong = client.cancel_request();
    *wrong.last_mut().unwrap() ^= 1;
    cancel(proxy.port(), &wrong).await;
    let mut short = client.cancel_request()[..16].to_vec();
    short[..4].copy_from_slice(&16u32.to_be_bytes());
    cancel(proxy.port(), &short).await;
    cancel(proxy.port(), &client.cancel_request()).await;

    let answers = client.until_ready().await;
    assert_eq!(tags(&answers).matches('E').count(), 1);
    assert_eq!(sqlstate(&answers).as_deref(), Some("57014"));
}

/// odyssey#84: a crash under many cancels. Here a thousand at once, for one query.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_cancels_is_survived() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let mut client = proxy.wire("acme").await;
    client.send(b'Q', b"SELECT pg_sleep(600) AS long\0").await;
    runs(&proxy, "AS long").await;
    let request = client.cancel_request();
    let flood = (0..300).map(|_| async {
        let mut wire = Wire::open(proxy.port()).await;
        wire.send_bytes(&request).await;
        wire.until_end().await;
    });
    tokio::time::timeout(PATIENCE, join_all(flood)).await.expect("every cancel connection ends");
    assert_eq!(sqlstate(&client.until_ready().await).as_deref(), Some("57014"));
    assert_eq!(tags(&client.query("SELECT 1").await), "TDCZ");
}

/// What the client was told as its process number.
fn number_of(client: &Wire) -> i32 {
    i32::from_be_bytes(client.cancel_request()[8..12].try_into().unwrap())
}

/// Drivers and their pools hand that number to PostgreSQL's own functions.
#[tokio::test]
async fn pg_terminate_backend_of_a_sessions_number_ends_that_session() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let mut caller = proxy.wire("acme").await;
    for idle in [true, false] {
        let mut other = proxy.wire("acme").await;
        other.query(if idle { "SELECT 1" } else { "BEGIN" }).await;

        let answers = caller.query(&format!("SELECT pg_terminate_backend({})", number_of(&other))).await;

        assert_eq!(tags(&answers), "TDCZ", "no warning");
        assert_eq!(wire::rows(&answers), [[Some("t".to_owned())]]);
        let said = other.until_end().await;
        assert_eq!(sqlstate(&said).as_deref(), Some("57P01"));
        // There is no such session any more, and PostgreSQL says so.
        let answers = caller.query(&format!("SELECT pg_terminate_backend({})", number_of(&other))).await;
        assert_eq!((tags(&answers).as_str(), sqlstate(&answers)), ("TNDCZ", None));
        assert_eq!(wire::rows(&answers), [[Some("f".to_owned())]]);
    }
}

/// By parameters as well, and several at once.
#[tokio::test]
async fn a_statement_with_parameters_signals_those_it_names_and_nobody_else() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let (mut one, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let mut caller = proxy.wire("acme").await;
    let numbers = format!("{{{},4194304,{}}}", number_of(&one), number_of(&other));
    let sql = "SELECT pg_terminate_backend(number) FROM unnest($1::int[]) AS number";
    let execute = [
        wire::bind("", "kill", &[Some(&numbers)]),
        wire::describe(b'P', ""),
        wire::execute("", 0),
        wire::sync(),
    ];
    caller.send_bytes(&[wire::parse("kill", sql), execute.concat()].concat()).await;

    let answers = caller.until_ready().await;

    let row = |answer: &str| vec![Some(answer.to_owned())];
    assert_eq!(wire::rows(&answers), [row("t"), row("f"), row("t")]);
    assert_eq!(tags(&answers), "12TDNDDCZ", "PostgreSQL's warning of the one that is nobody's");
    for ended in [&mut one, &mut other] {
        assert_eq!(sqlstate(&ended.until_end().await).as_deref(), Some("57P01"));
    }
    assert_eq!(tags(&caller.query("SELECT 1").await), "TDCZ");
}

#[tokio::test]
async fn pg_cancel_backend_of_a_sessions_number_cancels_what_it_runs() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let (mut caller, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    other.send(b'Q', b"SELECT pg_sleep(600) AS long\0").await;
    runs(&proxy, "AS long").await;

    let answers = caller.query(&format!("SELECT pg_cancel_backend({})", number_of(&other))).await;

    assert_eq!(wire::rows(&answers), [[Some("t".to_owned())]]);
    assert_eq!(sqlstate(&other.until_ready().await).as_deref(), Some("57014"));
    assert_eq!(tags(&other.query("SELECT 1").await), "TDCZ");
}

/// PostgreSQL ends a session that does so to itself before it answers.
#[tokio::test]
async fn a_session_that_terminates_itself_gets_no_answer() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let mut client = proxy.wire("acme").await;
    let itself = format!("SELECT pg_terminate_backend({})\0", number_of(&client));
    client.send(b'Q', itself.as_bytes()).await;

    let said = client.until_end().await;

    assert_eq!((tags(&said).as_str(), sqlstate(&said).as_deref()), ("E", Some("57P01")));
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
}

/// Whoever is another role may not: PostgreSQL's warning stays, and nobody is ended.
#[tokio::test]
async fn sessions_of_another_tenant_or_role_are_not_signalled() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").start().await;
    let (mut caller, mut other) = (proxy.wire("acme").await, proxy.wire("globex").await);

    let answers = caller.query(&format!("SELECT pg_terminate_backend({})", number_of(&other))).await;

    assert_eq!(wire::rows(&answers), [[Some("f".to_owned())]]);
    assert_eq!(tags(&answers), "TNDCZ");
    assert_eq!(tags(&other.query("SELECT 1").await), "TDCZ");
}
