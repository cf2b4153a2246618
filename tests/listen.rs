//! LISTEN through transaction mode: everybody hears what PostgreSQL would tell them, and nobody keeps a server for it.
//!
//! PgBouncer, Odyssey and Supavisor lose every notification here; other poolers keep a server for each listener.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use futures_util::future::join_all;
use support::{
    Client, Proxy, Wire,
    client::{PATIENCE, in_time},
    comparison::{Comparison, Twin},
    wire::{Message, batch, parse, sync, tags},
};

async fn two_servers() -> Proxy {
    Proxy::with_tenant("acme").pool_size(2).start().await
}

/// Channel and payload of a NotificationResponse, and who sent it.
fn heard(message: &Message) -> (u32, String, String) {
    assert_eq!(message.tag, b'A', "{message:?}");
    let process_id = u32::from_be_bytes(message.body[..4].try_into().unwrap());
    let mut texts =
        message.body[4..].split(|byte| *byte == 0).map(|it| String::from_utf8_lossy(it).into_owned());
    (process_id, texts.next().unwrap(), texts.next().unwrap())
}

fn payloads(messages: &[Message]) -> Vec<String> {
    messages.iter().filter(|message| message.tag == b'A').map(|message| heard(message).2).collect()
}

/// Connections that listen in the tenant's database, seen from behind the proxy.
async fn ears(behind: &Client) -> String {
    behind.ask("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pglobby listener'").await
}

/// Waits until `sql`, asked behind the proxy, says `answer`.
async fn until(behind: &Client, sql: &str, answer: &str) {
    in_time(sql, async {
        while behind.ask(sql).await != answer {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// Sends something that comes behind everything else, and hands back what came before it.
async fn everything(listener: &mut Wire, notifier: &mut Wire, channel: &str) -> Vec<String> {
    notifier.query(&format!("NOTIFY {channel}, 'the end'")).await;
    let mut seen = Vec::new();
    loop {
        let (_, _, payload) = heard(&listener.receive().await);
        if payload == "the end" {
            return seen;
        }
        seen.push(payload);
    }
}

#[tokio::test]
async fn many_listen_on_two_servers_and_all_hear_everything_in_order() {
    const LISTENERS: usize = 40;
    const NOTIFICATIONS: usize = 200;
    let proxy = two_servers().await;
    let mut listeners = Vec::new();
    for _ in 0..LISTENERS {
        let client = proxy.client("acme").connect().await;
        client.run("LISTEN news").await;
        listeners.push(client);
    }
    let behind = proxy.behind("acme").await;
    assert_eq!(ears(&behind).await, "1");
    let notifier = proxy.client("acme").connect().await;
    for number in 0..NOTIFICATIONS {
        notifier.run(&format!("NOTIFY news, '{number}'; NOTIFY others, 'x'")).await;
    }

    for listener in &mut listeners {
        for number in 0..NOTIFICATIONS {
            let notification = listener.notification().await;
            assert_eq!(
                (notification.channel(), notification.payload()),
                ("news", number.to_string().as_str())
            );
        }
    }
    assert_eq!(proxy.metric(r#"pglobby_pins{reason="listen"}"#).await, 0.0);
    join_all(listeners.into_iter().map(Client::leave)).await;
    until(&behind, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pglobby listener'", "0")
        .await;
}

/// Hangfire, Oban, pgx and others tell themselves apart from others by the order of messages and by the process number.
#[tokio::test]
async fn what_a_client_sends_itself_comes_in_front_of_readyforquery_under_its_own_number() {
    let proxy = two_servers().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let own = client.key.as_ref().unwrap().0;
    assert_eq!(tags(&client.query("LISTEN news; NOTIFY news, 'at once'").await), "CCAZ");
    for round in 0..20 {
        let payload = format!("round {round}");
        let answers = client.query(&format!("NOTIFY news, '{payload}'")).await;
        assert_eq!(tags(&answers), "CAZ");
        assert_eq!(heard(&answers[1]), (own, "news".to_owned(), payload));
        other.query("NOTIFY news, 'from another'").await;
        let (process_id, _, payload) = heard(&client.receive().await);
        assert!(process_id != own && payload == "from another");
    }
    let answers = client.query("BEGIN; NOTIFY news, 'a'; NOTIFY news, 'b'; COMMIT").await;
    assert_eq!(payloads(&answers), ["a", "b"]);
    client.send_bytes(&batch("SELECT pg_notify('news', 'extended')")).await;
    assert_eq!(tags(&client.until_ready().await), "12DCAZ");
    // Nor by its text: a trigger.
    client.query("CREATE FUNCTION tell() RETURNS int LANGUAGE plpgsql AS 'BEGIN NOTIFY news, ''told''; RETURN 1; END'").await;
    assert_eq!(tags(&client.query("SELECT tell()").await), "TDCAZ");
}

/// A transaction that has LISTENed and is not committed listens to nothing; one that is rolled back never did.
#[tokio::test]
async fn listen_and_unlisten_take_effect_at_commit() {
    let proxy = two_servers().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    client.query("LISTEN base").await;
    let listening = "SELECT string_agg(c, ' ' ORDER BY c) FROM pg_listening_channels() c";
    for (sql, channels) in [
        ("BEGIN; LISTEN a; ROLLBACK", "base"),
        ("BEGIN; LISTEN a; SAVEPOINT s; LISTEN b; ROLLBACK TO s; COMMIT", "a base"),
        ("BEGIN; SAVEPOINT s; UNLISTEN a; ROLLBACK TO s; LISTEN c; COMMIT", "a base c"),
        ("BEGIN; UNLISTEN *; ROLLBACK", "a base c"),
        ("UNLISTEN c", "a base"),
        ("BEGIN; UNLISTEN a; LISTEN a; LISTEN d; UNLISTEN d; COMMIT", "a base"),
        ("UNLISTEN *; LISTEN base; LISTEN e", "base e"),
        ("LISTEN f; SELECT 1/0", "base e"),
        ("DO $$ BEGIN EXECUTE 'LISTEN g'; END $$", "base e g"),
        ("SELECT 1", "base e g"),
    ] {
        client.query(sql).await;
        other.query("SELECT 'the other server, perhaps'").await;
        let rows = support::wire::rows(&client.query(listening).await);
        assert_eq!(rows[0][0].as_deref(), Some(channels), "{sql}");
        other
            .query("NOTIFY a, 'a'; NOTIFY b, 'b'; NOTIFY c, 'c'; NOTIFY d, 'd'; NOTIFY e, 'e'; NOTIFY g, 'g'")
            .await;
        let expected: Vec<&str> = channels.split(' ').filter(|name| *name != "base").collect();
        assert_eq!(everything(&mut client, &mut other, "base").await, expected, "{sql}");
    }
    client.query("DISCARD ALL").await;
    assert_eq!(support::wire::rows(&client.query(listening).await)[0][0], None);
    until(
        &proxy.behind("acme").await,
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pglobby listener'",
        "0",
    )
    .await;
    other.query("NOTIFY base, 'nobody hears'").await;
    assert_eq!(tags(&client.query("SELECT 1").await), "TDCZ");
}

/// Never in the middle of one: PostgreSQL tells a listener between its transactions.
#[tokio::test]
async fn a_client_in_a_transaction_is_told_when_it_is_over() {
    let proxy = two_servers().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    client.query("LISTEN news").await;
    client.query("BEGIN").await;
    for number in 0..5 {
        other.query(&format!("NOTIFY news, '{number}'")).await;
        assert_eq!(tags(&client.query("SELECT repeat('x', 100000)").await), "TDCZ");
    }
    client.query("SAVEPOINT s; NOTIFY news, 'never'; ROLLBACK TO s; NOTIFY news, 'own'").await;
    assert_eq!(payloads(&client.query("COMMIT").await), ["0", "1", "2", "3", "4", "own"]);
    // Pinned by something else, it listens all the same.
    client.query("CREATE TEMP TABLE t (i int)").await;
    other.query("NOTIFY news, 'pinned'").await;
    assert_eq!(heard(&client.receive().await).2, "pinned");
    assert_eq!(payloads(&client.query("NOTIFY news, 'pinned too'").await), ["pinned too"]);
    assert_eq!(tags(&client.query("SELECT 'nothing was notified'").await), "TDCZ");
    client.query("BEGIN").await;
    other.query("NOTIFY news, 'later'").await;
    assert_eq!(payloads(&client.query("SELECT 1").await), [""; 0]);
    assert_eq!(payloads(&client.query("COMMIT").await), ["later"]);
    client.query("DROP TABLE t").await;
    other.query("NOTIFY news, 'unpinned'").await;
    assert_eq!(heard(&client.receive().await).2, "unpinned");
}

/// Whoever sees what a transaction has written knows that it listens from then on: nothing may be lost between the commit
/// of a LISTEN and the moment that another connection listens.
#[tokio::test]
async fn nothing_is_lost_or_told_twice_while_a_channel_changes_hands() {
    let proxy = two_servers().await;
    let behind = proxy.behind("acme").await;
    behind.run("CREATE TABLE rounds (n int); GRANT ALL ON rounds TO PUBLIC").await;
    let mut client = proxy.wire("acme").await;
    let talking = async {
        for round in 0..100 {
            until(&behind, "SELECT max(n) FROM rounds", &round.to_string()).await;
            for number in 0..20 {
                behind.run(&format!("NOTIFY round_{round}, '{number}'; NOTIFY base, '{number}'")).await;
            }
        }
    };
    let listening = async {
        client.query("LISTEN base").await;
        for round in 0..100 {
            client
                .send(
                    b'Q',
                    format!("BEGIN; LISTEN round_{round}; INSERT INTO rounds VALUES ({round}); COMMIT\0")
                        .as_bytes(),
                )
                .await;
            let (mut of_round, mut of_base) = (Vec::new(), Vec::new());
            while of_round.len() < 20 || of_base.len() < 20 {
                let message = client.receive().await;
                if message.tag != b'A' {
                    continue;
                }
                match heard(&message) {
                    (_, channel, payload) if channel == "base" => of_base.push(payload),
                    (_, channel, payload) => {
                        assert_eq!(channel, format!("round_{round}"));
                        of_round.push(payload);
                    }
                }
            }
            let numbers: Vec<String> = (0..20).map(|number| number.to_string()).collect();
            assert_eq!((&of_round, &of_base), (&numbers, &numbers));
            if round % 3 == 0 {
                client.query(&format!("UNLISTEN round_{round}")).await;
            }
        }
    };
    in_time("a hundred rounds", async { tokio::join!(talking, listening) }).await;
}

#[tokio::test]
async fn clients_that_listened_are_told_when_the_listening_connection_is_lost() {
    let proxy = two_servers().await;
    let behind = proxy.behind("acme").await;
    let (mut idle, mut busy, mut bystander) =
        (proxy.wire("acme").await, proxy.wire("acme").await, proxy.wire("acme").await);
    idle.query("LISTEN a").await;
    busy.query("LISTEN b").await;
    busy.query("BEGIN").await;

    behind
        .ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pglobby listener'")
        .await;

    let end = idle.until_end().await;
    assert_eq!((tags(&end).as_str(), end[0].sqlstate().as_str()), ("E", "57P01"));
    assert!(end[0].field(b'M').unwrap().contains("LISTEN again"));
    // Its transaction is not lost with it.
    assert_eq!(tags(&busy.query("SELECT 1").await), "TDCZ");
    busy.send(b'Q', b"COMMIT\0").await;
    assert_eq!(tags(&busy.until_end().await), "CZE");
    assert_eq!(tags(&bystander.query("LISTEN c; NOTIFY c").await), "CCAZ");
}

/// A client that reads nothing may not make the proxy remember everything.
#[tokio::test]
async fn a_client_that_takes_no_notifications_is_closed() {
    let proxy =
        Proxy::with_tenant("acme").pool_size(2).config("max_queued_notifications", "\"64kB\"").start().await;
    let (mut slow, mut quick, mut other) =
        (proxy.wire("acme").await, proxy.wire("acme").await, proxy.wire("acme").await);
    slow.query("LISTEN news").await;
    quick.query("LISTEN news").await;
    slow.query("BEGIN").await;
    let long = "x".repeat(7000);
    for number in 0..20 {
        other.query(&format!("NOTIFY news, '{number} {long}'")).await;
        assert!(heard(&quick.receive().await).2.starts_with(&number.to_string()));
    }
    let end = slow.until_end().await;
    assert_eq!((tags(&end).as_str(), end[0].sqlstate().as_str()), ("E", "53400"));
    assert!(end[0].field(b'M').unwrap().contains("max_queued_notifications"));
}

#[tokio::test]
async fn more_channels_than_allowed_keep_their_server_and_are_heard_all_the_same() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).config("max_listening_channels", "3").start().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let pinned = r#"pglobby_pins{reason="listen"}"#;
    for (sql, pins) in [("LISTEN a; LISTEN b", 0.0), ("LISTEN c; LISTEN d", 1.0), ("UNLISTEN d", 0.0)] {
        client.query(sql).await;
        assert_eq!(proxy.metric(pinned).await, pins, "{sql}");
        other.query("NOTIFY a, 'a'; NOTIFY b, 'b'; NOTIFY d, 'd'").await;
        let d: &[&str] = if pins > 0.0 { &["a", "b", "d"] } else { &["a", "b"] };
        for payload in d {
            assert_eq!(heard(&client.receive().await).2, *payload, "{sql}");
        }
        assert_eq!(tags(&client.query("NOTIFY a, 'own'").await), "CAZ");
    }
}

/// The budget has no room for a connection that only listens: its client keeps its server, and hears.
#[tokio::test]
async fn without_room_for_a_listening_connection_a_listener_keeps_its_server() {
    let proxy = two_servers().await;
    proxy.command(&["host", "set", "default", "max_connections=1"]);
    let mut client = proxy.wire("acme").await;
    client.query("LISTEN news").await;
    proxy.behind("acme").await.run("NOTIFY news, 'heard'").await;
    assert_eq!(heard(&client.receive().await).2, "heard");
    assert_eq!(proxy.metric(r#"pglobby_pins{reason="listen"}"#).await, 1.0);
}

/// RECONNECT, `tenant rotate`, a changed row: the pool is another one, and nothing is missed in between.
#[tokio::test]
async fn listeners_notice_nothing_when_their_pool_is_replaced() {
    let proxy = two_servers().await;
    let console = proxy.console().await;
    let behind = proxy.behind("acme").await;
    let mut client = proxy.wire("acme").await;
    client.query("LISTEN news").await;
    let talking = async {
        for number in 0..2000 {
            behind.run(&format!("NOTIFY news, '{number}'")).await;
        }
    };
    let replacing = async {
        for _ in 0..5 {
            console.run("RECONNECT acme").await;
        }
        proxy.command(&["tenant", "rotate", "acme"]);
        proxy.command(&["tenant", "set", "acme", "pool_size=3"]);
    };
    let listening = async {
        for number in 0..2000 {
            assert_eq!(heard(&client.receive().await).2, number.to_string());
        }
    };
    tokio::time::timeout(4 * PATIENCE, async { tokio::join!(talking, replacing, listening) }).await.unwrap();
    until(&behind, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pglobby listener'", "1")
        .await;
    assert_eq!(payloads(&client.query("NOTIFY news, 'own'").await), ["own"]);
}

#[tokio::test]
async fn suspended_and_paused_listeners_are_told_why() {
    let proxy = Proxy::with_tenant("acme").and_tenant("globex").pool_size(2).start().await;
    let (mut paused, mut suspended) = (proxy.wire("acme").await, proxy.wire("globex").await);
    paused.query("LISTEN news").await;
    suspended.query("LISTEN news").await;
    proxy.console().await.run("PAUSE acme").await;
    let end = paused.until_end().await;
    assert!(end[0].field(b'M').unwrap().contains("paused"), "{end:?}");
    proxy.command(&["tenant", "suspend", "globex", "--reason", "unpaid"]);
    let end = suspended.until_end().await;
    assert!(end[0].field(b'M').unwrap().contains("unpaid"), "{end:?}");
    until(
        &proxy.behind("acme").await,
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pglobby listener'",
        "0",
    )
    .await;
}

/// The server of the session stops sending when UNLISTEN commits, though the connection that listens for all of them goes on.
#[tokio::test]
async fn what_unlisten_drops_is_not_delivered() {
    let comparison = Comparison::start(3, "").await;
    // `{a}` and `{b}` are channels of this side alone; `other>` is sent by another session.
    #[rustfmt::skip]
    let conversations: &[&[&str]] = &[
        &["UNLISTEN {a}; NOTIFY {a}, '1'"],
        &["NOTIFY {a}, '1'; UNLISTEN {a}"],
        &["NOTIFY {a}, '1'; NOTIFY {b}, '2'; UNLISTEN {a}; NOTIFY {a}, '3'; NOTIFY {b}, '4'"],
        &["UNLISTEN {a}; NOTIFY {a}, '1'; LISTEN {a}; NOTIFY {a}, '2'"],
        &["NOTIFY {a}, '1'", "UNLISTEN *; NOTIFY {a}, '2'; LISTEN {c}; NOTIFY {c}, '3'"],
        &["BEGIN", "UNLISTEN {a}", "other>NOTIFY {a}, '1'", "other>NOTIFY {b}, '2'", "COMMIT"],
        &["BEGIN", "other>NOTIFY {a}, '1'", "UNLISTEN *", "NOTIFY {a}, '2'", "COMMIT"],
        &["BEGIN", "UNLISTEN {a}", "NOTIFY {a}, '1'", "other>NOTIFY {a}, '2'", "ROLLBACK"],
        &["BEGIN", "SAVEPOINT s", "UNLISTEN {a}", "ROLLBACK TO s", "NOTIFY {a}, '1'", "other>NOTIFY {a}, '2'", "COMMIT"],
        &["BEGIN", "SAVEPOINT s", "UNLISTEN {a}", "RELEASE s", "NOTIFY {a}, '1'", "COMMIT"],
        &["UNLISTEN {a}; NOTIFY {a}, '1'; SELECT 1/0", "NOTIFY {a}, '2'"],
        &["DO 'BEGIN EXECUTE ''UNLISTEN {a}''; NOTIFY {a}, ''1''; END'"],
        &["DISCARD ALL", "NOTIFY {a}, '1'", "other>NOTIFY {b}, '2'"],
        &["other>NOTIFY {a}, '1'", "UNLISTEN {a}"],
        &["other>NOTIFY {a}, '1'", "DISCARD ALL"],
        &["CREATE TEMP TABLE t (a int)", "UNLISTEN {a}; NOTIFY {a}, '1'; NOTIFY {b}, '2'"],
        &["UNLISTEN {a}", "NOTIFY {a}, '1'", "LISTEN {a}", "NOTIFY {a}, '2'", "other>NOTIFY {a}, '3'"],
    ];
    for (number, conversation) in conversations.iter().enumerate() {
        let (Twin { proxied, direct }, others) = (comparison.twin("").await, comparison.twin("").await);
        let mut told = Vec::new();
        for (side, mut listener, mut other) in [("p", proxied, others.proxied), ("d", direct, others.direct)]
        {
            let mine = |sql: &str| {
                ["a", "b", "c"].iter().fold(sql.to_owned(), |sql, name| {
                    sql.replace(&format!("{{{name}}}"), &format!("{name}_{side}_{number}"))
                })
            };
            let mut all = listener.query(&mine("LISTEN {a}; LISTEN {b}")).await;
            for sql in *conversation {
                match sql.strip_prefix("other>") {
                    Some(sql) => drop(other.query(&mine(sql)).await),
                    None => all.extend(listener.query(&mine(sql)).await),
                }
            }
            all.extend(listener.query(&mine("LISTEN {c}")).await);
            other.query(&mine("NOTIFY {c}, 'the end'")).await;
            while payloads(&all).last().is_none_or(|payload| payload != "the end") {
                all.push(listener.receive().await);
            }
            told.push(payloads(&all));
        }
        assert_eq!(told[0], told[1], "{conversation:?}");
    }
}

/// Parse, Sync and a later Bind: what LISTENs is the execution.
#[tokio::test]
async fn a_prepared_listen_listens_when_it_is_executed() {
    let proxy = two_servers().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    client.send_bytes(&[parse("l", "LISTEN news"), sync()].concat()).await;
    client.until_ready().await;
    other.query("NOTIFY news, 'too early'").await;
    client
        .send_bytes(&[support::wire::bind("", "l", &[]), support::wire::execute("", 0), sync()].concat())
        .await;
    assert_eq!(tags(&client.until_ready().await), "2CZ");
    assert_eq!(everything(&mut client, &mut other, "news").await, [""; 0]);
}
