//! How many statements may be prepared, and how long their texts may be: for a session, on a server, and in all.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Proxy, Wire,
    wire::{Message, bind, close, describe, execute, parse, rows, sync, tags},
};

async fn send(client: &mut Wire, messages: &[Vec<u8>]) -> Vec<Message> {
    client.send_bytes(&messages.concat()).await;
    client.until_ready().await
}

fn long(name: &str) -> String {
    format!("SELECT /* {} */ '{name}'", "x".repeat(1200))
}

/// The error that a request gets; the session goes on.
async fn refused(client: &mut Wire, messages: &[Vec<u8>]) -> (String, String) {
    let answers = send(client, messages).await;
    let error = answers
        .iter()
        .find(|message| message.tag == b'E')
        .unwrap_or_else(|| panic!("no error in {answers:?}"));
    assert_eq!(tags(&client.query("SELECT 1").await), "TDCZ", "the session goes on");
    (error.sqlstate(), error.field(b'M').unwrap())
}

#[tokio::test]
async fn a_session_that_prepares_too_much_is_refused_with_the_limits_name_and_goes_on() {
    let proxy =
        Proxy::with_tenant("acme").pool_size(1).config("max_client_prepared_bytes", "\"6kB\"").start().await;
    for in_sql in [false, true] {
        let mut client = proxy.wire("acme").await;
        let prepare = |name: &str| match in_sql {
            false => vec![parse(name, &long(name)), sync()],
            true => {
                vec![support::wire::message(b'Q', format!("PREPARE {name} AS {}\0", long(name)).as_bytes())]
            }
        };
        for name in ["a", "b"] {
            assert!(!tags(&send(&mut client, &prepare(name)).await).contains('E'));
        }
        // What is given up makes room.
        client.query("DEALLOCATE a").await;
        assert!(!tags(&send(&mut client, &prepare("a")).await).contains('E'));
        client.query("DEALLOCATE ALL").await;
        for name in ["a", "b", "c"] {
            assert!(!tags(&send(&mut client, &prepare(name)).await).contains('E'));
        }
        let (sqlstate, message) = refused(&mut client, &prepare("d")).await;
        assert_eq!(sqlstate, "53400");
        assert!(message.contains("max_client_prepared_bytes"), "{message}");
    }
}

#[tokio::test]
async fn a_server_gives_up_what_was_used_least_recently_and_its_client_notices_nothing() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).config("max_prepared_bytes", "\"3kB\"").start().await;
    let mut client = proxy.wire("acme").await;
    let names = ["a", "b", "c", "d"];
    for name in names {
        send(&mut client, &[parse(name, &long(name)), sync()]).await;
    }
    for name in [names, names].concat() {
        let answers = send(&mut client, &[bind("", name, &[]), execute("", 0), sync()]).await;
        assert_eq!(rows(&answers), [[Some(name.to_owned())]]);
    }
    assert_eq!(
        rows(&client.query("SELECT count(*) FROM pg_prepared_statements").await),
        [[Some("2".to_owned())]]
    );
}

#[tokio::test]
async fn all_sessions_together_prepare_no_more_than_the_process_may_keep() {
    let proxy =
        Proxy::with_tenant("acme").pool_size(1).config("max_prepared_bytes_total", "\"11kB\"").start().await;
    let mut clients = Vec::new();
    for name in ["a", "b", "c"] {
        let mut client = proxy.wire("acme").await;
        assert_eq!(tags(&send(&mut client, &[parse("q", &long(name)), sync()]).await), "1Z");
        clients.push(client);
    }
    let mut one_more = proxy.wire("acme").await;
    let (sqlstate, message) = refused(&mut one_more, &[parse("q", &long("d")), sync()]).await;
    assert_eq!(sqlstate, "53400");
    assert!(message.contains("max_prepared_bytes_total"), "{message}");
    assert_eq!(tags(&clients[0].query("SELECT 1").await), "TDCZ");
}

/// The limit was the first tenant's that reached it: from then on no other could prepare anything.
#[tokio::test]
async fn a_tenant_that_prepares_too_much_takes_no_other_tenants_share() {
    let proxy = Proxy::with_tenant("acme")
        .and_tenant("globex")
        .config("max_prepared_bytes_total", "\"13kB\"")
        .start()
        .await;
    let mut greedy = proxy.wire("acme").await;
    for name in ["a", "b", "c"] {
        assert_eq!(tags(&send(&mut greedy, &[parse(name, &long(name)), sync()]).await), "1Z");
    }
    let mut modest = proxy.wire("globex").await;
    assert_eq!(tags(&send(&mut modest, &[parse("q", &long("q")), sync()]).await), "1Z");
    let mut one_more = proxy.wire("acme").await;
    let (sqlstate, _) = refused(&mut one_more, &[parse("q", &long("d")), sync()]).await;
    assert_eq!(sqlstate, "53400");
    assert_eq!(tags(&send(&mut modest, &[parse("r", &long("r")), sync()]).await), "1Z");
    let (sqlstate, _) = refused(&mut modest, &[parse("s", &long("s")), sync()]).await;
    assert_eq!(sqlstate, "53400", "it has its share");
}

/// A session that uses a shared statement under other settings gets a copy of its own, which counts as any other does.
#[tokio::test]
async fn copies_of_a_shared_statement_count_as_well() {
    let proxy =
        Proxy::with_tenant("acme").pool_size(1).config("max_prepared_bytes_total", "\"20kB\"").start().await;
    let text = format!("SELECT '01/02/2026'::date /* {} */", "x".repeat(2500));
    let mut clients = Vec::new();
    for _ in 0..6 {
        let mut client = proxy.wire("acme").await;
        assert_eq!(tags(&send(&mut client, &[parse("q", &text), sync()]).await), "1Z");
        client.query("SET DateStyle = 'ISO, DMY'").await;
        clients.push(client);
    }
    let mut refusals = Vec::new();
    for client in &mut clients {
        for request in
            [[bind("", "q", &[]), execute("", 0), sync()].concat(), [describe(b'S', "q"), sync()].concat()]
        {
            let answers = send(client, &[request]).await;
            refusals.extend(answers.iter().find(|message| message.tag == b'E').map(|error| error.sqlstate()));
        }
        assert_eq!(tags(&client.query("SELECT 1").await), "TDCZ");
    }
    assert!(refusals.len() >= 4 && refusals.iter().all(|code| code == "53400"), "{refusals:?}");
    // Under the settings of its Parse each has what all have.
    for client in &mut clients {
        client.query("RESET DateStyle").await;
        let answers = send(client, &[bind("", "q", &[]), execute("", 0), sync()]).await;
        assert_eq!(tags(&answers), "2DCZ", "{answers:?}");
    }
}

/// A query of this length whose text no other has; its row is `name`.
fn in_list(name: &str, bytes: usize) -> String {
    let mut text = format!("SELECT '{name}' WHERE 1 IN (1");
    let mut state =
        name.bytes().fold(0x9e37_79b9_u64, |state, byte| state.wrapping_mul(31) + u64::from(byte));
    while text.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        text.push_str(&format!(", {}", state % 10_000_000));
    }
    text + ")"
}

fn run(name: &str) -> Vec<u8> {
    [bind("", name, &[]), execute("", 0), sync()].concat()
}

/// Drivers that cache every text kept 20 MB here, and their thirty-fourth statement was refused.
#[tokio::test]
async fn forty_statements_of_half_a_megabyte_follow_their_session() {
    let proxy =
        Proxy::with_tenant("acme").pool_size(2).config("max_client_prepared_bytes", "\"16MB\"").start().await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let names: Vec<_> = (0..40).map(|at| format!("s{at}")).collect();
    for name in &names {
        let answers = send(&mut client, &[parse(name, &in_list(name, 500_000)), sync()]).await;
        assert_eq!(tags(&answers), "1Z", "{answers:?}");
    }
    // The other one holds now this server, now that one, so that the session goes to and fro.
    for (at, name) in names.iter().rev().enumerate() {
        if at % 10 == 0 {
            client.query("BEGIN").await;
            other.query("BEGIN").await;
            client.query("COMMIT").await;
        }
        assert_eq!(rows(&send(&mut client, &[run(name)]).await), [[Some(name.clone())]]);
        if at % 10 == 4 {
            other.query("COMMIT").await;
        }
    }
    // What is read again has the same meaning as before.
    let answers = client.query("PREPARE p AS SELECT 1; EXECUTE p").await;
    assert_eq!(tags(&answers), "CTDCZ", "{answers:?}");
}

/// The ten-thousandth and first was refused.
#[tokio::test]
async fn twelve_thousand_small_statements_follow_their_session() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let mut client = proxy.wire("acme").await;
    let names: Vec<_> = (0..12_000).map(|at| format!("s{at}")).collect();
    for names in names.chunks(500) {
        let mut parses: Vec<_> = names.iter().map(|name| parse(name, &format!("SELECT '{name}'"))).collect();
        parses.push(sync());
        assert_eq!(tags(&send(&mut client, &parses).await), "1".repeat(500) + "Z");
    }
    for name in names.iter().step_by(97) {
        assert_eq!(rows(&send(&mut client, &[run(name)]).await), [[Some(name.clone())]]);
    }
}

#[tokio::test]
async fn long_texts_count_as_what_they_take() {
    let proxy =
        Proxy::with_tenant("acme").pool_size(1).config("max_client_prepared_bytes", "\"64kB\"").start().await;
    let mut client = proxy.wire("acme").await;
    let text = |name: &str| {
        let columns: Vec<_> =
            (0..400).map(|at| format!("'{name}' AS \"reports_report\".\"column_{at}\"")).collect();
        format!("SELECT '{name}' WHERE ('{}') IS NOT NULL", columns.join(", ").replace('\'', "\'\'"))
    };
    assert!(text("s0").len() > 16_000);
    for at in 0..20 {
        let name = format!("s{at}");
        let answers = match at % 2 {
            0 => send(&mut client, &[parse(&name, &text(&name)), sync()]).await,
            _ => client.query(&format!("PREPARE {name} AS {}", text(&name))).await,
        };
        assert!(!tags(&answers).contains('E'), "{answers:?}");
    }
    for at in (0..20).rev() {
        let name = format!("s{at}");
        assert_eq!(rows(&send(&mut client, &[run(&name)]).await), [[Some(name)]]);
    }
}

#[tokio::test]
async fn a_refused_parse_fails_its_batch_and_its_transaction_and_the_session_goes_on() {
    let proxy =
        Proxy::with_tenant("acme").pool_size(1).config("max_client_prepared_bytes", "\"6kB\"").start().await;
    let mut client = proxy.wire("acme").await;
    for name in ["a", "b", "c"] {
        assert_eq!(tags(&send(&mut client, &[parse(name, &long(name)), sync()]).await), "1Z");
    }
    // What was sent behind it is skipped.
    let batch = [parse("d", &long("d")), bind("", "d", &[]), execute("", 0), bind("", "a", &[]), sync()];
    let answers = send(&mut client, &batch).await;
    assert_eq!((tags(&answers).as_str(), answers[0].sqlstate().as_str()), ("EZ", "53400"));
    // A transaction has failed as after any other error.
    client.query("BEGIN").await;
    let answers = send(&mut client, &batch).await;
    assert_eq!((tags(&answers).as_str(), answers[1].body.as_slice()), ("EZ", &b"E"[..]));
    let answers = send(&mut client, &[run("a")]).await;
    assert_eq!(answers[0].sqlstate(), "25P02");
    assert_eq!(client.query("ROLLBACK").await.last().unwrap().body, b"I");
    // There is no such statement, and the others are there.
    let answers = send(&mut client, &[run("d")]).await;
    assert_eq!(answers[0].sqlstate(), "26000");
    for name in ["a", "b", "c"] {
        assert_eq!(rows(&send(&mut client, &[run(name)]).await), [[Some(name.to_owned())]]);
    }
    // What is closed makes room.
    let answers = send(&mut client, &[close(b'S', "b"), parse("d", &long("d")), run("d")]).await;
    assert_eq!(tags(&answers), "312DCZ");
}

/// Servers keep statements that their clients have closed; clients could not prepare anything any more.
#[tokio::test]
async fn texts_that_only_servers_have_leave_room_for_others() {
    let proxy = Proxy::with_tenant("acme")
        .pool_size(1)
        .config("max_prepared_bytes_total", "\"52kB\"")
        .config("max_prepared_statements", "4")
        .start()
        .await;
    let text = |name: &str| format!("SELECT /* {} */ '{name}'", "x".repeat(7000));
    let mut client = proxy.wire("acme").await;
    for round in 0..4 {
        for name in ["a", "b", "c"] {
            let answers =
                send(&mut client, &[parse(name, &text(&format!("{name}{round}"))), run(name)]).await;
            assert_eq!(tags(&answers), "12DCZ", "{answers:?}");
        }
        let (sqlstate, _) = refused(&mut client, &[parse("d", &text("d")), sync()]).await;
        assert_eq!(sqlstate, "53400");
        let closes = [close(b'S', "a"), close(b'S', "b"), close(b'S', "c"), sync()];
        assert_eq!(tags(&send(&mut client, &closes).await), "333Z");
    }
    let mut client = proxy.wire("acme").await;
    let answers = send(&mut client, &[parse("a", &text("a3")), run("a")]).await;
    assert_eq!(rows(&answers), [[Some("a3".to_owned())]]);
}
