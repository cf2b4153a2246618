//! Nothing a client did reaches the next one on the same server, and what a client set follows it to every server.
//!
//! One server for everybody makes sharing certain. The random version of the same promise is `tests/model.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{Client, Proxy, client::in_time, wire};

/// What a client does, what would tell the next one of it, and what that one must be told.
const TRACES: [(&str, &str, &str); 15] = [
    ("SET statement_timeout = '54321ms'", "SHOW statement_timeout", "0"),
    ("SET search_path = elsewhere", "SHOW search_path", "\"$user\", public"),
    ("SET my.secret = 'x'", "SELECT current_setting('my.secret', true)", ""),
    ("SELECT set_config('my.secret', 'x', false)", "SELECT current_setting('my.secret', true)", ""),
    (
        "DO $$ BEGIN PERFORM set_config('my.' || 'secret', 'x', false); END $$",
        "SELECT current_setting('my.secret', true)",
        "",
    ),
    ("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY", "SHOW transaction_read_only", "off"),
    ("SET ROLE visitor", "SELECT current_user = 'visitor'", "f"),
    ("BEGIN; SET ROLE visitor", "SELECT current_user = 'visitor'", "f"),
    ("CREATE TEMP TABLE secret AS SELECT 1", "SELECT to_regclass('pg_temp.secret')", ""),
    ("SELECT pg_advisory_lock(42)", "SELECT pg_advisory_xact_lock(42)", ""),
    ("PREPARE secret AS SELECT 1", "SELECT count(*) FROM pg_prepared_statements WHERE name = 'secret'", "0"),
    (
        "DECLARE secret CURSOR WITH HOLD FOR SELECT 1",
        "SELECT count(*) FROM pg_cursors WHERE is_holdable",
        "0",
    ),
    ("LISTEN secret", "SELECT count(*) FROM pg_listening_channels()", "0"),
    ("BEGIN; SELECT pg_advisory_xact_lock(42)", "SELECT pg_advisory_xact_lock(42)", ""),
    ("BEGIN; CREATE TABLE half_done()", "SELECT to_regclass('half_done')", ""),
];

async fn start_proxy(mode: &str, servers: u32) -> Proxy {
    let proxy = Proxy::with_tenant("acme").pool_mode(mode).pool_size(servers).start().await;
    let role = proxy.client("acme").ask("SELECT current_user").await;
    proxy.behind("acme").await.run(&format!("CREATE ROLE visitor; GRANT visitor TO \"{role}\"")).await;
    proxy
}

#[tokio::test]
async fn nothing_of_a_client_that_left_or_vanished_is_seen_by_the_next_in_transaction_mode() {
    leaves_no_trace(start_proxy("transaction", 1).await).await;
}

#[tokio::test]
async fn nothing_of_a_client_that_left_or_vanished_is_seen_by_the_next_in_session_mode() {
    leaves_no_trace(start_proxy("session", 1).await).await;
}

async fn leaves_no_trace(proxy: Proxy) {
    let acme = proxy.client("acme");
    for (done, question, clean) in TRACES {
        acme.run(done).then_leave().await;
        assert_eq!(acme.ask(question).await, clean, "after a client that left: {done}");
        acme.run(done).then_vanish().await;
        assert_eq!(acme.ask(question).await, clean, "after a client that vanished: {done}");
    }
}

/// The same traces while their client is still there: another session must see none, and the client must find them.
#[tokio::test]
async fn nothing_of_a_client_that_stays_is_seen_by_others_but_by_itself() {
    let proxy = start_proxy("transaction", 2).await;
    let acme = proxy.client("acme");
    for (done, question, clean) in TRACES {
        let (one, other) = (acme.connect().await, acme.connect().await);
        one.run(done).await;
        if !question.contains("lock") {
            assert_eq!(other.ask(question).await, clean, "{done}");
        }
        if !done.starts_with("BEGIN") && !question.contains("lock") {
            assert_ne!(one.ask(question).await, clean, "the session lost what it did: {done}");
        }
        one.leave().await;
        other.leave().await;
    }
}

/// `RESET ALL` resets no session authorisation: it came back to the pool with the server, and the next client was
/// somebody else. It cannot be set again from what it shows, so it pins.
#[tokio::test]
async fn a_session_authorization_stays_with_its_client() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let role = proxy.json(&["tenant", "show", "acme", "--json"])["username"].as_str().unwrap().to_owned();
    proxy.behind("acme").await.run(&format!("ALTER ROLE \"{role}\" SUPERUSER; CREATE ROLE visitor")).await;
    let (one, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);

    one.run("SET SESSION AUTHORIZATION visitor").await;
    for _ in 0..3 {
        assert_eq!(other.ask("SELECT session_user").await, role);
        assert_eq!(one.ask("SELECT session_user").await, "visitor");
    }
    one.vanish().await;
    assert_eq!(other.ask("SELECT session_user").await, role);
}

/// Elsewhere it would have to be set by the login, which may not: the session ended with an error of ours.
#[tokio::test]
async fn a_parameter_that_only_a_role_may_set_keeps_its_server() {
    let proxy = start_proxy("transaction", 2).await;
    let role = proxy.client("acme").ask("SELECT current_user").await;
    let granted = "GRANT SET ON PARAMETER session_replication_role TO visitor";
    proxy.behind("acme").await.run(&format!("{granted}; ALTER ROLE \"{role}\" NOINHERIT")).await;
    let (one, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);

    one.run("SET ROLE visitor").await;
    one.run("SET session_replication_role = replica").await;
    one.run("RESET ROLE").await;
    let its_own = one.server_pid().await;
    for _ in 0..3 {
        other.run("SET work_mem = '5MB'").await;
        assert_eq!(other.ask("SHOW session_replication_role").await, "origin");
        assert_eq!(
            one.ask(
                "SELECT current_setting('session_replication_role') || ' ' || (current_user = 'visitor')"
            )
            .await,
            "replica false"
        );
        assert_eq!(one.server_pid().await, its_own);
    }
}

/// What was pipelined behind the role was executed without it, by a login that may do more.
#[tokio::test]
async fn what_was_asked_under_a_role_is_never_done_without_it() {
    let proxy = start_proxy("transaction", 1).await;
    let (one, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    let role = other.ask("SELECT current_user").await;
    one.run("CREATE TABLE done (by text); GRANT ALL ON done TO visitor; SET ROLE visitor").await;
    one.run("INSERT INTO done SELECT current_user").await;
    other.run("INSERT INTO done SELECT 'other'").await;
    proxy.behind("acme").await.run(&format!("REVOKE visitor FROM \"{role}\"")).await;

    // The server has been in other hands, and does not take the role any more.
    assert_eq!(one.refusal_of("INSERT INTO done SELECT current_user").await, "42501");
    assert_eq!(other.ask("SELECT string_agg(by, ' ' ORDER BY by) FROM done").await, "other visitor");
}

/// The sequence values of one session are nobody else's business.
#[tokio::test]
async fn last_sequence_values_leave_with_their_session_in_session_mode() {
    let proxy = start_proxy("session", 1).await;
    let acme = proxy.client("acme");
    acme.run("CREATE SEQUENCE counter").then_leave().await;
    acme.run("SELECT nextval('counter')").then_leave().await;
    let next = acme.connect().await;
    assert_eq!(next.refusal_of("SELECT lastval()").await, "55000");
}

/// pgbouncer before 1.20: `SET search_path` stayed with the server, and the client found itself elsewhere.
#[tokio::test]
async fn settings_follow_their_client_while_others_stir_the_pool() {
    let proxy = start_proxy("transaction", 1).await;
    let mut clients = Vec::new();
    for number in 0..5 {
        let client = proxy.client("acme").connect().await;
        client.run(&format!("SET search_path = s{number}; SET my.number = '{number}'")).await;
        client.run(&format!("SELECT set_config('work_mem', '{}kB', false)", 1000 + number)).await;
        if number % 2 == 0 {
            client.run("SET ROLE visitor").await;
        }
        clients.push(client);
    }
    for _ in 0..3 {
        for (number, client) in clients.iter().enumerate() {
            let found = client
                .ask("SELECT concat_ws(' ', current_setting('search_path'), current_setting('my.number'), current_setting('work_mem'), current_user = 'visitor')")
                .await;
            let visitor = if number % 2 == 0 { 't' } else { 'f' };
            assert_eq!(found, format!("s{number} {number} {}kB {visitor}", 1000 + number));
        }
    }
}

/// PostgreSQL's own rules: LOCAL ends with the transaction, ROLLBACK takes a SET back, RESET finds the startup's value.
#[tokio::test]
async fn set_local_rollback_and_reset_mean_what_they_mean_without_a_proxy() {
    let proxy = start_proxy("transaction", 1).await;
    let caller = proxy.client("acme").options("-c search_path=shop -c work_mem=5MB");
    let (one, other) = (caller.connect().await, proxy.client("acme").connect().await);
    let expect = async |path: &str| {
        other.run("SET search_path = stirred").await;
        assert_eq!(one.ask("SHOW search_path").await, path);
    };
    expect("shop").await;
    one.run("BEGIN; SET LOCAL search_path = local; COMMIT").await;
    expect("shop").await;
    one.run("BEGIN; SET search_path = lost; ROLLBACK").await;
    expect("shop").await;
    one.run("BEGIN; SET search_path = kept; SAVEPOINT s; SET search_path = lost; ROLLBACK TO s; COMMIT")
        .await;
    expect("kept").await;
    assert_eq!(one.refusal_of("SET search_path = lost; SELECT 1/0").await, "22012");
    expect("kept").await;
    one.run("RESET search_path").await;
    expect("shop").await;
    one.run("SET search_path = other; RESET ALL").await;
    expect("shop").await;
    one.run("SET search_path = other").await;
    one.run("DISCARD ALL").await;
    expect("shop").await;
    assert_eq!(one.ask("SHOW work_mem").await, "5MB");
}

/// PostgreSQL's own test `tablespace`: `SET` of what only a superuser may set was refused, its value taken down all the
/// same, and both connections were closed when the next server refused it as well.
#[tokio::test]
async fn a_set_that_was_refused_is_not_repeated_elsewhere() {
    let proxy = start_proxy("transaction", 2).await;
    let (client, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    for refused in [
        "SET session_replication_role = replica",
        "RESET session_replication_role",
        "SELECT set_config('session_replication_role', 'replica', false)",
        "BEGIN; SET work_mem = '7MB'; SET session_replication_role = replica",
    ] {
        assert_eq!(client.refusal_of(refused).await, "42501", "{refused}");
        client.run("ROLLBACK").await;
        other.run("BEGIN").await; // on the server that the client had
        assert_eq!(client.ask("SHOW session_replication_role").await, "origin", "{refused}");
        assert_eq!(client.ask("SHOW work_mem").await, "4MB", "{refused}");
        other.run("ROLLBACK").await;
    }
}

/// What was SET and RESET is as it was: nothing of it is sent to other servers.
#[tokio::test]
async fn a_parameter_that_was_reset_is_nothing_to_carry() {
    let proxy = start_proxy("transaction", 2).await;
    let (client, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    for reset in ["RESET work_mem", "SET work_mem TO DEFAULT"] {
        client.run("SET work_mem = '7MB'").await;
        client.run(reset).await;
        other.run("BEGIN").await;
        let source = "SELECT source FROM pg_settings WHERE name = 'work_mem'";
        assert_eq!(client.ask(source).await, "default", "{reset}");
        other.run("ROLLBACK").await;
    }
}

/// Settings and statements are read in their client's own encoding, whatever the client before it used.
#[tokio::test]
async fn an_encoding_of_one_client_does_not_garble_what_another_one_said() {
    let proxy = start_proxy("transaction", 2).await;
    let (one, mut latin, mut pinned) =
        (proxy.client("acme").connect().await, proxy.wire("acme").await, proxy.wire("acme").await);
    one.run("SET a.note = 'déjà vu'").await;
    latin.query("SET client_encoding = 'LATIN1'").await;
    pinned.query("SET client_encoding = 'LATIN1'").await;
    pinned.send(b'Q', b"SET my.note = 'caf\xe9'\0").await.until_ready().await;
    let question = "SELECT length('é')"; // two letters, if these two bytes are LATIN1
    let mine = in_time("preparing", one.prepare(question)).await.unwrap();
    latin.send_bytes(&[wire::parse("s", question), wire::sync()].concat()).await.until_ready().await;
    for _ in 0..3 {
        assert_eq!(one.ask("SELECT current_setting('a.note')").await, "déjà vu");
        assert_eq!(in_time("one", one.query_one(&mine, &[])).await.unwrap().get::<_, i32>(0), 1);
        latin.send_bytes(&[wire::bind("", "s", &[]), wire::execute("", 0), wire::sync()].concat()).await;
        assert_eq!(wire::rows(&latin.until_ready().await)[0][0].as_deref(), Some("2"));
        let answer = pinned.query("SELECT current_setting('my.note')").await;
        let row = answer.iter().find(|message| message.tag == b'D').expect("a row");
        assert!(row.body.ends_with(b"caf\xe9"), "{:?}", String::from_utf8_lossy(&row.body));
    }
}

/// yugabyte#33914: SQL PREPARE, the client left, and the next tenant client could EXECUTE it. Named, unnamed and SQL.
#[tokio::test]
async fn prepared_statements_of_all_three_kinds_are_their_clients_own() {
    let proxy = start_proxy("transaction", 1).await;
    let (mut one, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    for (client, text) in [(&mut one, "SELECT 'one'"), (&mut other, "SELECT 'other'")] {
        client.send_bytes(&[wire::parse("s", text), wire::parse("", text), wire::sync()].concat()).await;
        assert_eq!(wire::tags(&client.until_ready().await), "11Z");
    }
    for _ in 0..3 {
        for (client, text) in [(&mut one, "one"), (&mut other, "other")] {
            let bound = ["s", ""].map(|name| [wire::bind("", name, &[]), wire::execute("", 0)].concat());
            client.send_bytes(&[bound.concat(), wire::sync()].concat()).await;
            let answers = client.until_ready().await;
            assert_eq!(wire::rows(&answers), vec![vec![Some(text.to_owned())]; 2], "{answers:?}");
        }
    }
    let mut third = proxy.wire("acme").await;
    for name in ["s", ""] {
        third.send_bytes(&[wire::bind("", name, &[]), wire::sync()].concat()).await;
        let answers = third.until_ready().await;
        assert_eq!((wire::tags(&answers).as_str(), answers[0].sqlstate().as_str()), ("EZ", "26000"));
    }
    one.query("PREPARE in_sql AS SELECT 1").await;
    drop(one);
    assert_eq!(other.query("EXECUTE in_sql").await[0].sqlstate(), "26000");
}

/// The same text means something else in another search_path: PostgreSQL would say "cached plan must not change result
/// type" to a client that never changed anything.
#[tokio::test]
async fn clients_in_different_schemas_may_prepare_the_same_text() {
    let proxy = start_proxy("transaction", 1).await;
    let acme = proxy.client("acme");
    acme.run("CREATE SCHEMA a; CREATE SCHEMA b; CREATE TABLE a.t AS SELECT 1 AS x; CREATE TABLE b.t AS SELECT 'b'::text AS x, 2 AS y")
        .then_leave()
        .await;
    let in_a = acme.clone().options("-c search_path=a").connect().await;
    let in_b = acme.options("-c search_path=b").connect().await;
    let (of_a, of_b) = (prepared(&in_a).await, prepared(&in_b).await);
    for _ in 0..3 {
        let row = in_time("a", in_a.query_one(&of_a, &[])).await.unwrap();
        assert_eq!((row.len(), row.get::<_, i32>(0)), (1, 1));
        let row = in_time("b", in_b.query_one(&of_b, &[])).await.unwrap();
        assert_eq!((row.len(), row.get::<_, String>(0)), (2, "b".to_owned()));
    }
}

async fn prepared(client: &Client) -> tokio_postgres::Statement {
    in_time("preparing", client.prepare("SELECT * FROM t")).await.unwrap()
}

/// One client's strange settings must not break what the proxy does for the next: here every statement of more than a
/// millisecond fails, transactions are read-only and serializable, and an error ends the session.
#[tokio::test]
async fn settings_that_hinder_do_not_hinder_others() {
    let proxy = start_proxy("transaction", 1).await;
    let (one, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    other.run("SET my.note = 'here'; CREATE SCHEMA hostile; CREATE FUNCTION hostile.eq(text, text) RETURNS bool LANGUAGE sql AS 'SELECT false'").await;
    other.run("CREATE OPERATOR hostile.= (LEFTARG = text, RIGHTARG = text, FUNCTION = hostile.eq)").await;
    let hindering = [
        "SET statement_timeout = 1",
        "SET default_transaction_read_only = on; SET default_transaction_isolation = serializable",
        "SET exit_on_error = on",
        "SET client_min_messages = debug5",
        "SET search_path = hostile, pg_catalog",
        "SET idle_in_transaction_session_timeout = '30s'; SET lock_timeout = 1",
        "SET standard_conforming_strings = off; SET backslash_quote = off; SET escape_string_warning = on",
        "SET plan_cache_mode = force_generic_plan; SET row_security = off",
        "SET client_encoding = 'SQL_ASCII'",
        "SET DateStyle = 'German'; SET IntervalStyle = 'iso_8601'; SET bytea_output = 'escape'",
    ];
    for setting in hindering {
        for _ in 0..5 {
            let _ = one.try_run(setting).await;
            assert_eq!(other.ask("SELECT current_setting('my.note')").await, "here", "after {setting}");
        }
    }
    one.leave().await;
    assert_eq!(proxy.client("acme").ask("SELECT 1").await, "1");
}

/// `max_tracked_parameters`: a session that has set more than that keeps its server, and what it set.
#[tokio::test]
async fn a_session_with_too_many_parameters_keeps_its_server_until_it_discards_them() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).config("max_tracked_parameters", "3").start().await;
    let (client, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    let console = proxy.console().await;
    for number in 1..=8 {
        client.run(&format!("SET my.number_{number} = '{number}'")).await;
        other.run("SELECT 1").await;
    }
    assert_eq!(console.ask_all("SHOW PINS").await.len(), 1);
    for number in 1..=8 {
        let sql = format!("SELECT current_setting('my.number_{number}')");
        assert_eq!(client.ask(&sql).await, number.to_string());
    }
    client.run("DISCARD ALL").await;
    client.run("SELECT 1").await; // Not read before what DISCARD ALL left has been taken down.
    assert_eq!(console.ask_all("SHOW PINS").await.len(), 0);
}
