//! How many statements may be prepared, and how long their texts may be: for a session, on a server, and in all.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Proxy, Wire,
    wire::{Message, bind, describe, execute, parse, rows, sync, tags},
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
        .config("max_prepared_bytes_total", "\"11kB\"")
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
