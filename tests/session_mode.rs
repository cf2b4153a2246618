//! What a proxy loses even with a server for each client, and what may not be lost: tried in both modes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Cluster, Proxy, Wire,
    client::in_time,
    proxy::{login_of, password_of},
    wire::{self, Message, PROTOCOL_3_0, bind, execute, parse, rows, sync, tags},
};

const MODES: [&str; 2] = ["session", "transaction"];

async fn proxy(mode: &str) -> Proxy {
    Proxy::with_tenant("acme").pool_mode(mode).pool_size(3).start().await
}

/// Logs in with these parameters; what came before ReadyForQuery, or the refusal.
async fn login(proxy: &Proxy, parameters: &[(&str, &str)]) -> Result<(Wire, Vec<Message>), Message> {
    let mut wire = Wire::open(proxy.port()).await;
    let login = login_of("acme");
    let mut all = vec![("user", login.as_str()), ("database", "acme")];
    all.extend(parameters);
    wire.startup(PROTOCOL_3_0, &all).await;
    let seen = wire.authenticate(&password_of("acme")).await?;
    Ok((wire, seen))
}

async fn value(wire: &mut Wire, sql: &str) -> String {
    let answers = wire.query(sql).await;
    rows(&answers)[0][0].clone().unwrap()
}

/// People hand it to pg_terminate_backend, and compare it with what NOTIFY says.
#[tokio::test]
async fn in_session_mode_the_process_number_is_the_servers_own_and_cancels() {
    let proxy = proxy("session").await;
    let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    let number = client.key.as_ref().unwrap().0.to_string();
    assert_eq!(value(&mut client, "SELECT pg_backend_pid()").await, number);
    let pins = proxy.console().await.ask_all("SHOW PINS").await;
    assert!(
        pins.iter().all(|row| row.contains(&Some("session_mode".to_owned()))) && pins.len() == 2,
        "{pins:?}"
    );
    let answers = client.query("LISTEN news; NOTIFY news").await;
    let notified = answers.iter().find(|message| message.tag == b'A').unwrap();
    assert_eq!(u32::from_be_bytes(notified.body[..4].try_into().unwrap()).to_string(), number);

    client.send(b'Q', b"SELECT pg_sleep(600)\0").await;
    let runs =
        format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {number} AND wait_event = 'PgSleep'");
    let behind = proxy.behind("acme").await;
    in_time("pg_sleep", async { while behind.ask(&runs).await != "1" {} }).await;
    let (_, secret) = client.key.clone().unwrap();
    let mut forged = client.cancel_request();
    let last = forged.len() - 1;
    forged[last] ^= 1;
    let mut wrong = Wire::open(proxy.port()).await;
    wrong.send_bytes(&forged).await.until_end().await;
    assert_eq!(behind.ask(&runs).await, "1", "{} bytes", secret.len());
    let mut right = Wire::open(proxy.port()).await;
    right.send_bytes(&client.cancel_request()).await.until_end().await;
    let answers = client.until_ready().await;
    assert_eq!(answers.iter().find(|message| message.tag == b'E').unwrap().sqlstate(), "57014");

    assert_eq!(tags(&other.query(&format!("SELECT pg_terminate_backend({number})")).await), "TDCZ");
    let end = client.until_end().await;
    assert_eq!(end[0].sqlstate(), "57P01");
    assert_eq!(end[0].field(b'M').unwrap(), "terminating connection due to administrator command");
}

/// Drivers' pools tell connections apart by it; a number that is kept too long must not end a stranger's session.
#[tokio::test]
async fn in_session_mode_the_next_session_has_another_process_number() {
    let proxy = proxy("session").await;
    let mut numbers = Vec::new();
    for _ in 0..3 {
        let mut client = proxy.wire("acme").await;
        numbers.push(value(&mut client, "SELECT pg_backend_pid()").await);
        client.send(b'X', b"").await;
    }
    let mut different = numbers.clone();
    different.sort();
    different.dedup();
    assert_eq!(different.len(), 3, "{numbers:?}");
    let mut fourth = proxy.wire("acme").await;
    let number = value(&mut fourth, "SELECT pg_backend_pid()").await;
    assert!(numbers.contains(&number), "a pool of three has a fourth server");
}

#[tokio::test]
async fn startup_parameters_act_are_reported_and_are_what_reset_goes_back_to() {
    for mode in MODES {
        let proxy = proxy(mode).await;
        let parameters = [
            ("client_encoding", "utf-8"),
            ("DateStyle", "german"),
            ("application_name", "mine"),
            ("search_path", "elsewhere"),
            (
                "options",
                "-c statement_timeout=12s --client-min-messages=error -c work_mem=5MB -c my.note=a\\ b",
            ),
        ];
        let (mut client, _) = login(&proxy, &parameters).await.unwrap();
        let (mut other, _) = login(&proxy, &[("search_path", "third")]).await.unwrap();
        assert_eq!(client.parameters["client_encoding"], "UTF8", "{mode}");
        assert_eq!(client.parameters["DateStyle"], "German, DMY", "{mode}");
        assert_eq!(client.parameters["application_name"], "mine", "{mode}");
        let mut direct = Wire::login(
            proxy.cluster.port(),
            support::cluster::MASTER,
            support::cluster::MASTER_PASSWORD,
            "postgres",
        )
        .await;
        direct.query("SELECT 1").await;
        for name in direct.parameters.keys() {
            assert!(client.parameters.contains_key(name), "{mode}: {name} is not reported");
        }
        const ALL: &str = "SELECT concat_ws(' ', current_setting('DateStyle'), current_setting('search_path'), \
            current_setting('statement_timeout'), current_setting('client_min_messages'), current_setting('work_mem'), \
            current_setting('my.note'), current_setting('application_name'))";
        let asked = "German, DMY elsewhere 12s error 5MB a b mine";
        assert_eq!(value(&mut client, ALL).await, asked, "{mode}");
        for undone in
            ["RESET ALL", "DISCARD ALL", "RESET search_path", "RESET DateStyle", "SET work_mem TO DEFAULT"]
        {
            client.query("SET search_path = x; SET DateStyle = iso; SET work_mem = '6MB'").await;
            client.query(undone).await;
            other.query("SET search_path = y").await;
            if undone.ends_with("ALL") {
                assert_eq!(value(&mut client, ALL).await, asked, "{mode}: {undone}");
            }
            let shown = value(&mut client, "SHOW DateStyle").await;
            assert_eq!(client.parameters["DateStyle"], shown, "{mode}: {undone}");
        }
        client.query("RESET DateStyle; RESET search_path; RESET work_mem").await;
        assert_eq!(value(&mut client, ALL).await, asked, "{mode}");
        // Told with the reply, as PostgreSQL does.
        assert_eq!(tags(&client.query("SET TimeZone = 'Asia/Tokyo'").await), "CSZ", "{mode}");
        assert_eq!(client.parameters["TimeZone"], "Asia/Tokyo");
        assert_eq!(
            tags(&client.query("BEGIN; SET TimeZone = 'UTC'; ROLLBACK").await).matches('Z').count(),
            1
        );
        assert_eq!(client.parameters["TimeZone"], "Asia/Tokyo");
    }
}

#[tokio::test]
async fn bad_startup_parameters_and_bad_passwords_are_refused_in_postgresqls_words() {
    for mode in MODES {
        let proxy = proxy(mode).await;
        for (parameter, sqlstate, message) in [
            (("DateStyle", "nonsense"), "22023", "invalid value for parameter \"DateStyle\": \"nonsense\""),
            (
                ("no_such_parameter", "1"),
                "42704",
                "unrecognized configuration parameter \"no_such_parameter\"",
            ),
            (("options", "-c work_mem=lots"), "22023", "invalid value for parameter \"work_mem\": \"lots\""),
            (
                ("options", "-c shared_buffers=1GB"),
                "55P02",
                "parameter \"shared_buffers\" cannot be changed without restarting the server",
            ),
        ] {
            let refusal = login(&proxy, &[parameter]).await.err().expect("a refusal");
            assert_eq!(
                (refusal.sqlstate().as_str(), refusal.field(b'M').unwrap().as_str()),
                (sqlstate, message),
                "{mode}"
            );
            assert_eq!(refusal.field(b'S').as_deref(), Some("FATAL"));
        }
        let mut wire = Wire::open(proxy.port()).await;
        wire.startup(PROTOCOL_3_0, &[("user", "acme_user"), ("database", "acme")]).await;
        let refusal = wire.authenticate("wrong").await.expect_err("a refusal");
        assert_eq!(refusal.sqlstate(), "28P01");
        assert_eq!(refusal.field(b'M').unwrap(), "password authentication failed for user \"acme_user\"");
        // Refusals leave nothing behind: every server is free.
        for _ in 0..3 {
            assert_eq!(value(&mut proxy.wire("acme").await, "SHOW DateStyle").await, "ISO, MDY", "{mode}");
        }
    }
}

/// lib/pq and pg8000 prepare in one batch and bind in another; a Parse that failed has no name.
#[tokio::test]
async fn a_failed_parse_leaves_its_name_free_and_the_unnamed_statement_lasts() {
    for mode in MODES {
        let proxy = proxy(mode).await;
        let (mut client, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
        for name in ["", "named"] {
            client.send_bytes(&[parse(name, "SELECT nonsense FROM nowhere"), sync()].concat()).await;
            assert_eq!(client.until_ready().await[0].sqlstate(), "42P01", "{mode}");
            client.send_bytes(&[bind("", name, &[]), sync()].concat()).await;
            assert_eq!(client.until_ready().await[0].sqlstate(), "26000", "{mode}");
            client
                .send_bytes(&[parse(name, "SELECT $1::text"), wire::describe(b'S', name), sync()].concat())
                .await;
            assert_eq!(tags(&client.until_ready().await), "1tTZ", "{mode}");
            other.send_bytes(&wire::batch("SELECT 'another'")).await;
            other.until_ready().await;
            for text in ["a", "b"] {
                client.send_bytes(&[bind("", name, &[Some(text)]), execute("", 0), sync()].concat()).await;
                assert_eq!(rows(&client.until_ready().await), [[Some(text.to_owned())]], "{mode}");
            }
        }
    }
}

/// Neither what the proxy has asked the server, nor what the session before has prepared.
#[tokio::test]
async fn a_session_begins_without_an_unnamed_statement() {
    for mode in MODES {
        let proxy = proxy(mode).await;
        for parameters in [&[][..], &[], &[("DateStyle", "German")]] {
            let (mut client, _) = login(&proxy, parameters).await.unwrap();
            for use_of_it in [bind("", "", &[]), bind("", "", &[Some("1")]), wire::describe(b'S', "")] {
                client.send_bytes(&[use_of_it, sync()].concat()).await;
                assert_eq!(client.until_ready().await[0].sqlstate(), "26000", "{mode}");
            }
            client.send_bytes(&wire::batch("SELECT 'what the next must not see'")).await;
            assert_eq!(tags(&client.until_ready().await), "12DCZ", "{mode}");
        }
    }
}

/// A collation that the operating system has changed since the database was made: PostgreSQL warns whoever connects.
#[tokio::test]
async fn what_a_server_says_when_it_starts_reaches_the_client() {
    for mode in MODES {
        let proxy =
            Proxy::with_tenant("acme").cluster(Cluster::start()).pool_mode(mode).pool_size(2).start().await;
        let behind = proxy.behind("acme").await;
        behind
            .run(
                "ALTER DATABASE acme SET client_min_messages = debug1; ALTER DATABASE acme SET my.note = 'x'",
            )
            .await;
        behind.run("UPDATE pg_database SET datcollversion = 'long ago' WHERE datname = 'acme'").await;
        let warned = |seen: &[Message]| {
            seen.iter().any(|message| {
                message.tag == b'N' && message.field(b'M').unwrap().contains("collation version")
            })
        };
        let (mut direct, mut login) =
            (Wire::open(proxy.cluster.port()).await, login(&proxy, &[]).await.unwrap());
        let master = support::cluster::MASTER;
        direct.startup(PROTOCOL_3_0, &[("user", master), ("database", "acme")]).await;
        let seen = direct.authenticate(support::cluster::MASTER_PASSWORD).await.unwrap();
        assert_eq!(warned(&login.1), warned(&seen), "{mode}: {:?}", login.1);
        assert_eq!(tags(&login.0.query("SELECT 1").await), "TDCZ");
    }
}
