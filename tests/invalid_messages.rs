//! Messages that break the protocol get what PostgreSQL gives them: an error where it goes on, and the end where it does not.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Proxy, Wire,
    comparison::Comparison,
    wire::{Message, batch, bind, c_string, close, describe, execute, message, parse, sync, tags},
};

fn query(sql: &str) -> Vec<u8> {
    message(b'Q', &c_string(sql))
}

/// The message, with these bytes more in its body.
fn with_more(whole: &[u8], more: &[u8]) -> Vec<u8> {
    message(whole[0], &[&whole[5..], more].concat())
}

/// The header of a message that announces this body, and 100 bytes of it.
fn announced(tag: u8, body: usize) -> Vec<u8> {
    let length = u32::try_from(body + 4).unwrap();
    [&[tag][..], &length.to_be_bytes(), &[b'x'; 100]].concat()
}

/// What is invalid, or looks so; with a Sync or a query behind it, so that it is answered.
fn messages() -> Vec<(String, Vec<u8>)> {
    let mut messages: Vec<(String, Vec<u8>)> = Vec::new();
    let mut add = |what: &str, said: &[&[u8]]| messages.push((what.to_owned(), said.concat()));
    let (flush, synced) = (message(b'H', b""), sync());
    add("Sync with a body", &[&message(b'S', b"junk")]);
    add("Sync with a long body", &[&message(b'S', &[b'x'; 9000])]);
    add("Sync with a body in a batch", &[&parse("", "SELECT 1"), &message(b'S', b"junk"), &synced]);
    add(
        "Sync with a body behind an error",
        &[&parse("", "SELECT"), &bind("", "none", &[]), &message(b'S', b"junk")],
    );
    add("Flush with a body", &[&message(b'H', b"junk"), &synced]);
    add("Flush with a long body", &[&message(b'H', &[b'x'; 9000]), &synced]);
    add("Flush with a body before a batch", &[&message(b'H', b"junk"), &batch("SELECT 1")]);
    add("Flush with a body and a query", &[&message(b'H', b"junk"), &query("SELECT 1"), &synced]);
    add(
        "Flush with a body in a batch",
        &[&parse("", "SELECT 1"), &bind("", "", &[]), &message(b'H', b"junk"), &execute("", 0), &synced],
    );
    add("Flush with a body behind an error", &[&parse("", "nonsense"), &message(b'H', b"junk"), &synced]);
    add("Flush", &[&flush, &synced]);
    add(
        "Flush with a body in a COPY",
        &[
            &query("COPY c FROM STDIN"),
            &message(b'H', b"junk"),
            &message(b'S', b"junk"),
            &message(b'c', b"junk"),
            &query("SELECT 1"),
        ],
    );
    add(
        "Flush with a body in a COPY of a batch",
        &[
            &parse("", "COPY c FROM STDIN"),
            &bind("", "", &[]),
            &execute("", 0),
            &message(b'H', b"junk"),
            &message(b'd', b"1\n"),
            &message(b'c', b""),
            &synced,
        ],
    );
    let bound = [parse("", "SELECT 1"), bind("", "", &[])].concat();
    for (what, whole) in [
        ("Parse", parse("p", "SELECT 1")),
        ("unnamed Parse", parse("", "SELECT 1")),
        ("Bind", bind("", "", &[])),
        ("Describe of a statement", describe(b'S', "")),
        ("Describe of a portal", describe(b'P', "")),
        ("Close of a statement", close(b'S', "")),
        ("Close of a portal", close(b'P', "")),
        ("Execute", execute("", 0)),
        ("Describe of nothing", describe(b'X', "")),
        ("Close of nothing", close(b'X', "")),
    ] {
        add(
            &format!("{what} with more"),
            &[&bound, &with_more(&whole, b"junk"), &synced, &query("SELECT 2")],
        );
        for cut in [0, 1, 3] {
            let short = message(whole[0], &whole[5..5 + cut.min(whole.len() - 5)]);
            add(&format!("{what} cut after {cut}"), &[&bound, &short, &synced, &query("SELECT 2")]);
        }
        let unterminated = message(whole[0], b"Sxxxxxxx");
        add(&format!("{what} without an end"), &[&bound, &unterminated, &synced, &query("SELECT 2")]);
    }
    add(
        "a named Parse with more, and its use",
        &[&with_more(&parse("later", "SELECT 1"), b"junk"), &synced, &bind("", "later", &[]), &synced],
    );
    add(
        "Close with more keeps the statement",
        &[
            &parse("kept", "SELECT 1"),
            &with_more(&close(b'S', "kept"), b"x"),
            &synced,
            &bind("", "kept", &[]),
            &synced,
        ],
    );
    add("a Bind without names", &[&message(b'B', &[b'x'; 20_000]), &synced]);
    add("a query with more", &[&message(b'Q', b"SELECT 1\0junk")]);
    add("a query without an end", &[&message(b'Q', b"SELECT 1")]);
    add("an empty query message", &[&message(b'Q', b"")]);
    add("EXECUTE with more", &[&query("PREPARE q AS SELECT 1"), &message(b'Q', b"EXECUTE q\0junk")]);
    let call = |more: &[u8]| {
        message(b'F', &[&1397u32.to_be_bytes()[..], b"\0\0\0\x01\0\0\0\x04\0\0\0\x07\0\0", more].concat())
    };
    add("a call", &[&call(b"")]);
    add("a call with more", &[&call(b"junk"), &query("SELECT 1")]);
    add("a call cut short", &[&message(b'F', b"\0\0"), &query("SELECT 1")]);
    add("Terminate with a body", &[&message(b'X', b"junk")]);
    add("CopyFail", &[&message(b'f', b"why\0"), &query("SELECT 1")]);
    add("CopyFail without an end", &[&message(b'f', b"why"), &query("SELECT 1")]);
    add("CopyDone with a body", &[&message(b'c', b"why"), &query("SELECT 1")]);
    for length in [9000, 9_996] {
        for tag in *b"fcd" {
            add(
                &format!("{} of {length} bytes", char::from(tag)),
                &[&message(tag, &vec![b'x'; length]), &query("SELECT 1")],
            );
        }
    }
    let name = |length: usize| "n".repeat(length);
    for length in [64, 8_000, 9_000, 20_000, 29_000, 60_000] {
        let name = name(length);
        add(
            &format!("a statement's name of {length} bytes"),
            &[&parse(&name, "SELECT 1"), &bind("", &name, &[]), &execute("", 0), &synced],
        );
        add(
            &format!("a statement's name of {length} bytes, later"),
            &[
                &parse(&name, "SELECT 1"),
                &synced,
                &query("SELECT 1"),
                &bind("", &name, &[]),
                &execute("", 0),
                &synced,
            ],
        );
        add(
            &format!("a portal's name of {length} bytes"),
            &[&parse("", "SELECT 1"), &bind(&name, "", &[]), &synced],
        );
        add(&format!("an unknown name of {length} bytes"), &[&bind("", &name, &[]), &synced]);
        if length < 9_900 {
            add(
                &format!("Describe and Close of a name of {length} bytes"),
                &[&parse(&name, "SELECT 1"), &describe(b'S', &name), &close(b'S', &name), &synced],
            );
            add(
                &format!("Execute of a name of {length} bytes"),
                &[
                    &parse("", "SELECT 1"),
                    &bind(&name, "", &[]),
                    &describe(b'P', &name),
                    &execute(&name, 0),
                    &close(b'P', &name),
                    &synced,
                ],
            );
        }
    }
    messages
}

/// What ends the connection without an answer.
fn ends() -> Vec<(String, Vec<u8>)> {
    let mut ends: Vec<(String, Vec<u8>)> = b"SHXcfDCE"
        .iter()
        .map(|tag| (format!("{} of 10,000 bytes", char::from(*tag)), announced(*tag, 10_000)))
        .collect();
    ends.extend(
        b"QPBFd".iter().map(|tag| (format!("{} of a gigabyte", char::from(*tag)), announced(*tag, 1 << 30))),
    );
    ends.extend(
        b"QSHdf".iter().map(|tag| (format!("{} of three bytes", char::from(*tag)), vec![*tag, 0, 0, 0, 3])),
    );
    ends
}

/// All answers to the message and to two more queries, or up to the end of the connection. No ParameterStatus: it may come at
/// any time.
async fn answers(client: &mut Wire, said: &[u8]) -> Vec<Message> {
    client.send_bytes(said).await;
    client.send_bytes(&[query("ROLLBACK"), query("SELECT 'last'")].concat()).await;
    let mut seen = Vec::new();
    while let Some(message) = client.receive_or_end().await {
        let is_last = message.tag == b'D' && message.values() == [Some("last".to_owned())];
        if message.tag != b'S' {
            seen.push(message);
        }
        if is_last {
            break;
        }
    }
    seen
}

/// Without the names of the server's functions and files.
fn shown(message: &Message) -> String {
    match message.tag {
        b'E' | b'N' => {
            let field = |letter| message.field(letter).unwrap_or_default();
            let text: String = [b'S', b'C', b'M', b'D', b'H'].map(field).join(" ");
            format!("{} {}", char::from(message.tag), text.get(..200).unwrap_or(&text))
        }
        b'T' => "T".to_owned(),
        tag => format!("{} {:?}", char::from(tag), String::from_utf8_lossy(&message.body)),
    }
}

async fn is_answered_as_by_postgresql(mode: &str, before: &str) {
    let table = "CREATE TABLE public.c (x text); GRANT ALL ON c TO PUBLIC";
    let comparison = Comparison::start_in(mode, 4, table).await;
    let mut differing = Vec::new();
    for (what, said) in messages() {
        let mut twin = comparison.twin("").await;
        for client in [&mut twin.direct, &mut twin.proxied] {
            if !before.is_empty() {
                client.query(before).await;
            }
        }
        let direct: Vec<_> = answers(&mut twin.direct, &said).await.iter().map(shown).collect();
        let proxied: Vec<_> = answers(&mut twin.proxied, &said).await.iter().map(shown).collect();
        if direct != proxied {
            differing.push(format!("{what}:\n  direct  {direct:?}\n  proxied {proxied:?}"));
        }
    }
    assert!(differing.is_empty(), "{mode}, {before}\n{}", differing.join("\n"));
}

#[tokio::test]
async fn invalid_messages_in_transaction_mode() {
    is_answered_as_by_postgresql("transaction", "").await;
}

#[tokio::test]
async fn invalid_messages_in_a_transaction() {
    is_answered_as_by_postgresql("transaction", "BEGIN").await;
}

#[tokio::test]
async fn invalid_messages_in_session_mode() {
    is_answered_as_by_postgresql("session", "").await;
}

#[tokio::test]
async fn messages_of_an_impossible_length_end_the_connection() {
    for mode in ["transaction", "session"] {
        let comparison = Comparison::start_in(mode, 4, "").await;
        for (what, said) in ends() {
            for before in [None, Some("SELECT 1"), Some("BEGIN")] {
                let mut twin = comparison.twin("").await;
                for (whose, client) in [("direct", &mut twin.direct), ("proxied", &mut twin.proxied)] {
                    if let Some(sql) = before {
                        client.query(sql).await;
                    }
                    client.send_bytes(&said).await;
                    let last = client.until_end().await;
                    assert!(last.len() <= 1, "{mode}, {what}, {before:?}, {whose}: {last:?}");
                    assert!(
                        last.iter().all(|word| word.sqlstate() == "08P01"),
                        "{mode}, {what}, {whose}: {last:?}"
                    );
                }
            }
        }
    }
}

/// Where the proxy answers by itself: without a tenant, in front of the first statement at one, and behind a refused batch.
#[tokio::test]
async fn invalid_messages_of_a_service_logins_session_fail_alone() {
    let proxy = Proxy::with_tenant("acme").and_tenant("beta").pool_size(1).start().await;
    proxy.create_login("api", "one for all", &["--service", "--tenants", "acme,beta"]);
    for at in ["api", "acme"] {
        let mut client = Wire::login(proxy.port(), "api", "one for all", at).await;
        let cut = message(b'B', b"no end");
        let show = batch("SHOW pglobby.tenant");
        for (what, said) in [
            ("Sync", message(b'S', b"junk")),
            ("Flush", [message(b'H', b"junk"), sync()].concat()),
            ("Bind", [cut.clone(), sync()].concat()),
            ("a query", message(b'Q', b"SELECT 1")),
            (
                "behind a refused batch",
                [parse("", "SET pglobby.tenant = 'beta'; SELECT 1"), cut, sync()].concat(),
            ),
        ] {
            client.send_bytes(&said).await;
            let answers = client.until_ready().await;
            assert!(tags(&answers).ends_with("EZ"), "{at}, {what}: {answers:?}");
            client.send_bytes(&show).await;
            assert!(tags(&client.until_ready().await).ends_with("12DCZ"), "{at}, {what}");
        }
        client
            .send_bytes(
                &[parse("", "SET pglobby.tenant = 'beta'; SELECT 1"), message(b'S', b"junk")].concat(),
            )
            .await;
        let errors: Vec<_> =
            client.until_ready().await.iter().filter(|m| m.tag == b'E').map(Message::sqlstate).collect();
        assert_eq!(errors.last().map(String::as_str), Some("08P01"), "{at}: {errors:?}");
    }
}
