//! Sessions that keep their server: how many may, and what `currval` and `lastval` are kept for.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{
    Client, Proxy, Wire,
    client::in_time,
    console::shown,
    wire::{Message, bind, close, execute, parse, rows, sync, tags},
};

/// One client that locked on every connection kept every server of its tenant, and everybody else waited; then it was ended
/// although nobody wanted its server.
#[tokio::test]
async fn the_session_that_keeps_one_server_too_many_is_ended_with_a_clear_error_once_somebody_waits() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).config("max_pinned_servers", "1").start().await;
    let (one, mut two, other) = (
        proxy.client("acme").connect().await,
        proxy.wire("acme").await,
        proxy.client("acme").connect().await,
    );
    one.run("SELECT pg_advisory_lock(1)").await;
    two.query("CREATE TABLE done (x int)").await;
    let answers = two.query("INSERT INTO done VALUES (1); SELECT pg_advisory_lock(2)").await;
    assert_eq!(tags(&answers), "CTDCZ", "what it asked for is done and answered");
    // As long as nobody waits it goes on.
    assert_eq!(tags(&two.query("SELECT pg_advisory_lock(3)").await), "TDCZ");
    assert_eq!(proxy.console().await.ask_all("SHOW PINS").await.len(), 2);
    for _ in 0..3 {
        assert_eq!(other.ask("SELECT count(*) FROM done").await, "1");
    }
    let last = two.until_end().await.pop().expect("a last word");
    assert_eq!((last.field(b'S').unwrap().as_str(), last.sqlstate().as_str()), ("FATAL", "53300"));
    assert!(last.field(b'M').unwrap().contains("advisory_lock"), "{last:?}");
    // What a transaction has left is known before the session's next one begins.
    one.run("SELECT pg_advisory_unlock(1)").await.run("SELECT 1").await;
    other.run("SELECT pg_advisory_lock(1), pg_advisory_lock(2)").await.run("SELECT 1").await;
    assert_eq!(proxy.console().await.ask_all("SHOW PINS").await.len(), 1);
}

/// In a transaction it was told nothing, and found out when it was over.
#[tokio::test]
async fn the_session_that_is_one_too_many_may_end_its_transaction_while_somebody_waits() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).config("max_pinned_servers", "1").start().await;
    let one = proxy.client("acme").connect().await;
    let (mut two, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
    one.run("CREATE TABLE done (x int); SELECT pg_advisory_lock(1)").await;
    two.query("SELECT pg_advisory_lock(2)").await;
    two.query("BEGIN").await;
    other.send(b'Q', b"SELECT count(*) FROM done\0").await;
    shown(&proxy.console().await, "POOLS", "cl_waiting", "1").await;
    two.query("INSERT INTO done VALUES (1)").await;
    assert_eq!(tags(&two.query("COMMIT").await), "CZ");
    assert_eq!(two.until_end().await.pop().expect("a last word").sqlstate(), "53300");
    assert_eq!(rows(&other.until_ready().await), [[Some("1".to_owned())]]);
}

/// PDO's lastInsertId: four clients on two servers waited for each other for ever.
#[tokio::test]
async fn clients_that_read_lastval_after_each_insert_give_way_to_each_other() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let first = proxy.client("acme").connect().await;
    first.run("CREATE TABLE t (id serial, x int); INSERT INTO t (x) VALUES (0); SELECT lastval()").await;
    first.leave().await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(proxy.client("acme").connect().await);
    }
    for round in 0..5 {
        for (number, client) in clients.iter().enumerate() {
            let x = 10 * round + number;
            client.run(&format!("INSERT INTO t (x) VALUES ({x})")).await;
            let id = client.ask("SELECT lastval()").await;
            assert_eq!(client.ask(&format!("SELECT x FROM t WHERE id = {id}")).await, x.to_string());
        }
    }
    // Who inserts and comes back for the value only when others had to have the server gets none, and nobody else's.
    for client in &clients {
        client.run("INSERT INTO t (x) VALUES (0)").await;
    }
    for client in &clients[..2] {
        assert_eq!(client.refusal_of("SELECT lastval()").await, "55000");
    }
}

/// DBD::Pg's last_insert_id and PDO's lastInsertId: the first `lastval` that any client of a tenant asked for found nothing.
#[tokio::test]
async fn the_first_lastval_of_a_tenant_finds_what_was_inserted() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let (one, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    one.run("CREATE TABLE t (id serial, x int)").await;
    one.run("INSERT INTO t (x) VALUES (1)").await;
    // Takes the server that came back last, if any did.
    other.run("BEGIN").await;
    one.run("SELECT pg_get_serial_sequence('t', 'id')").await;
    assert_eq!(one.ask("SELECT lastval()").await, "1");
}

/// Who never asks does not keep servers from others for long.
#[tokio::test]
async fn a_session_that_never_reads_lastval_keeps_no_server_after_a_few_inserts() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let (one, console) = (proxy.client("acme").connect().await, proxy.console().await);
    one.run("CREATE TABLE t (x int)").await;
    for _ in 0..8 {
        one.run("INSERT INTO t VALUES (1)").await;
        assert_eq!(console.ask_all("SHOW PINS").await.len(), 1);
        for _ in 0..3 {
            one.run("SELECT x FROM t").await;
        }
        assert_eq!(console.ask_all("SHOW PINS").await.len(), 0);
    }
    one.run("INSERT INTO t VALUES (1)").await;
    assert_eq!(console.ask_all("SHOW PINS").await.len(), 0);
}

/// Two sessions that took a number in turn on one server waited until the wait was over.
#[tokio::test]
async fn sessions_that_advance_a_sequence_take_turns_on_one_server() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (one, two) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    one.run("CREATE SEQUENCE s; SELECT nextval('s'); SELECT currval('s')").await;
    for _ in 0..5 {
        for client in [&one, &two] {
            client.run("SELECT nextval('s')").await;
        }
        for client in [&one, &two] {
            client.run("DISCARD ALL").await;
        }
    }
}

/// Another session's `nextval` was what a session's `lastval` told.
#[tokio::test]
async fn currval_and_lastval_tell_what_their_own_session_did_or_nothing() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let acme = proxy.client("acme");
    let one = acme.connect().await;
    one.run("CREATE SEQUENCE s; CREATE TABLE t (id serial, x int)").await;
    one.run("SELECT nextval('s')").await;
    let other = acme.connect().await;
    assert_eq!(other.refusal_of("SELECT lastval()").await, "55000");
    assert_eq!(other.refusal_of("SELECT currval('s')").await, "55000");
    other.leave().await;
    one.run("SELECT nextval('s')").await;
    assert_eq!(one.ask("SELECT currval('s') = (SELECT last_value FROM s)").await, "t");
}

/// PostgreSQL's test `constraints`, on a busy machine: a session that came back to a server found there what `nextval` had given it
/// before it gave the last value elsewhere.
#[tokio::test]
async fn currval_never_tells_an_older_value_of_its_own() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let acme = proxy.client("acme");
    let (one, other) = (acme.connect().await, acme.connect().await);
    other.run("CREATE SEQUENCE s; SELECT nextval('s'); SELECT currval('s')").await;
    other.run("DISCARD ALL").await;
    let console = proxy.console().await;
    let advance = async || {
        let server = one.ask("SELECT pg_backend_pid() + 0 * nextval('s')").await;
        let kept = async {
            while !console.ask_all("SHOW PINS").await.is_empty() {
                one.run("SELECT 1").await;
            }
        };
        in_time("a server that is kept in vain", kept).await;
        server
    };
    other.run("BEGIN").await;
    let first = advance().await;
    other.run("COMMIT").await;
    let second = advance().await;
    assert_ne!(first, second, "the server that was given back last is the next to be lent");
    other.run("BEGIN; SELECT 1").await;
    assert_eq!(one.refusal_of("SELECT currval('s')").await, "55000");
}

/// `lastInsertId()`: an INSERT, and `lastval()` in a transaction of its own, while others do the same.
#[tokio::test]
async fn an_insert_keeps_its_server_for_the_lastval_behind_it() {
    let proxy = Proxy::with_tenant("acme").pool_size(4).start().await;
    let (one, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    one.run("CREATE TABLE t (id serial, x int); INSERT INTO t (x) VALUES (0); SELECT lastval()").await;
    one.run("DISCARD ALL").await;
    for number in 1..5 {
        one.run(&format!("INSERT INTO t (x) VALUES ({number})")).await;
        other.run(&format!("INSERT INTO t (x) VALUES ({})", 100 + number)).await;
        for (client, x) in [(&one, number), (&other, 100 + number)] {
            let id = client.ask("SELECT lastval()").await;
            assert_eq!(client.ask(&format!("SELECT x FROM t WHERE id = {id}")).await, x.to_string());
            client.run("DISCARD ALL").await;
        }
    }
    one.run("INSERT INTO t (x) VALUES (9)").await;
    assert_eq!(proxy.console().await.ask_all("SHOW PINS").await.len(), 1);
    for _ in 0..3 {
        one.run("SELECT 1").await;
    }
    assert_eq!(proxy.console().await.ask_all("SHOW PINS").await.len(), 0);
}

/// Two sessions that had sent a text too long to be read, each in a way of its own, stopped a pool of two for as long as they
/// stayed.
#[tokio::test]
async fn a_text_too_long_to_read_keeps_no_server_once_it_has_left_nothing() {
    let proxy =
        Proxy::with_tenant("acme").pool_size(2).config("statement_inspect_max", "\"1kB\"").start().await;
    let long = format!("SELECT 'long' /* {} */", "x".repeat(200 << 10));
    let (mut simple, mut named, mut other) =
        (proxy.wire("acme").await, proxy.wire("acme").await, proxy.wire("acme").await);
    let console = proxy.console().await;
    assert_eq!(tags(&simple.query(&long).await), "TDCZ");
    assert_eq!(tags(&simple.query(&format!("{long}; FROBNICATE")).await), "EZ");
    let run = [parse("q", &long), bind("", "q", &[]), execute("", 0), close(b'S', "q"), sync()];
    assert_eq!(tags(&send(&mut named, &run).await), "12DC3Z");
    assert_eq!(pinned(&console).await, [""; 0]);
    assert_eq!(
        tags(&send(&mut named, &[parse("", &long), bind("", "", &[]), execute("", 0), sync()]).await),
        "12DCZ"
    );
    assert_eq!(pinned(&console).await, [""; 0]);
    // An unnamed statement is there until it has run, or until somebody needs the server: lib/pq binds it in a batch of its own.
    for client in [&mut simple, &mut named] {
        assert_eq!(tags(&send(client, &[parse("", &long), sync()]).await), "1Z");
    }
    assert_eq!(pinned(&console).await, ["unread_unnamed_statement"; 2]);
    assert_eq!(tags(&other.query("SELECT 1").await), "TDCZ");
    assert_eq!(pinned(&console).await, ["unread_unnamed_statement"; 1]);
    // It reads the functions first, and whoever waits for it asks for the other one.
    shown(&console, "POOLS", "sv_idle", "1").await;
    let mut told = Vec::new();
    for client in [&mut simple, &mut named] {
        told.push(tags(&send(client, &[bind("", "", &[]), execute("", 0), sync()]).await));
    }
    told.sort();
    assert_eq!(told, ["2DCZ", "EZ"]);
    assert_eq!(pinned(&console).await, [""; 0]);
    for client in [&mut simple, &mut named] {
        assert_eq!(send(client, &[bind("", "", &[]), sync()]).await[0].sqlstate(), "26000");
    }
    // What it leaves is found as if it had been read.
    let pad = "x".repeat(200 << 10);
    simple.query(&format!("SET TimeZone = 'Asia/Tokyo' /* {pad} */")).await;
    assert_eq!(pinned(&console).await, [""; 0]);
    assert_eq!(rows(&simple.query("SHOW TimeZone").await), [[Some("Asia/Tokyo".to_owned())]]);
    assert_eq!(rows(&other.query("SHOW TimeZone").await), rows(&named.query("SHOW TimeZone").await));
    simple.query(&format!("SELECT pg_advisory_lock(1) /* {pad} */")).await;
    assert_eq!(pinned(&console).await, ["advisory_lock"]);
    simple.query("SELECT pg_advisory_unlock(1)").await;
    assert_eq!(pinned(&console).await, [""; 0]);
}

/// It was kept for ever by a statement that was too long, though that had been closed, deallocated or had never come to be.
#[tokio::test]
async fn a_prepared_statement_too_long_to_keep_keeps_its_server_until_it_is_gone() {
    let proxy =
        Proxy::with_tenant("acme").pool_size(1).config("statement_inspect_max", "\"1kB\"").start().await;
    let (mut one, console) = (proxy.wire("acme").await, proxy.console().await);
    let pad = "x".repeat(200 << 10);
    let long = format!("SELECT set_config('TimeZone', 'Asia/Tokyo', false) /* {pad} */");
    for end in ["CLOSE", "DEALLOCATE q", "DEALLOCATE ALL", "DISCARD ALL"] {
        assert_eq!(tags(&send(&mut one, &[parse("q", &long), sync()]).await), "1Z");
        assert_eq!(tags(&one.query("SELECT 1").await), "TDCZ");
        assert_eq!(pinned(&console).await, ["unread_statement"]);
        assert_eq!(tags(&send(&mut one, &[bind("", "q", &[]), execute("", 0), sync()]).await), "2DCSZ");
        match end {
            "CLOSE" => drop(send(&mut one, &[close(b'S', "q"), sync()]).await),
            _ => drop(one.query(end).await),
        }
        assert_eq!(pinned(&console).await, [""; 0], "{end}");
        let mut other = proxy.wire("acme").await;
        assert_ne!(rows(&other.query("SHOW TimeZone").await), [[Some("Asia/Tokyo".to_owned())]]);
        let zone = rows(&one.query("SHOW TimeZone").await);
        assert_eq!(zone == [[Some("Asia/Tokyo".to_owned())]], end != "DISCARD ALL", "{end}: {zone:?}");
        one.query("RESET TimeZone").await;
    }
    let failing = format!("SELEC /* {pad} */");
    assert_eq!(tags(&send(&mut one, &[parse("q", &failing), sync()]).await), "EZ");
    assert_eq!(pinned(&console).await, [""; 0]);
}

/// Only DISCARD ALL, or the session's end, gave these servers back.
#[tokio::test]
async fn whatever_keeps_a_server_ends_with_what_it_is_kept_for() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (mut one, console) = (proxy.wire("acme").await, proxy.console().await);
    let role = rows(&one.query("SELECT current_user").await)[0][0].clone().unwrap();
    proxy.behind("acme").await.run(&format!("ALTER ROLE \"{role}\" SUPERUSER; CREATE ROLE somebody")).await;
    console.run("RECONNECT acme").await; // its next server is a superuser's
    for (done, reason, undone) in [
        ("SET SESSION AUTHORIZATION somebody", "untracked_setting", "RESET SESSION AUTHORIZATION"),
        ("SET SESSION AUTHORIZATION somebody", "untracked_setting", "SET SESSION AUTHORIZATION DEFAULT"),
        ("SELECT set_config('my.' || 'note', 'x', false)", "untracked_setting", "RESET ALL"),
        ("CREATE TEMP TABLE t ()", "temporary_object", "DROP TABLE t"),
        ("SELECT pg_advisory_lock(1)", "advisory_lock", "SELECT pg_advisory_unlock(1)"),
        ("DECLARE c CURSOR WITH HOLD FOR SELECT 1", "hold_cursor", "CLOSE c"),
        (
            "BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT pg_advisory_lock(1); COMMIT",
            "advisory_lock,hold_cursor",
            "CLOSE c; SELECT pg_advisory_unlock(1)",
        ),
        ("DO $$ BEGIN EXECUTE 'PREPARE p AS SELECT 1'; END $$", "prepare", "DEALLOCATE p"),
    ] {
        one.query(done).await;
        assert_eq!(pinned(&console).await, [reason], "{done}");
        one.query(undone).await;
        assert_eq!(pinned(&console).await, [""; 0], "{undone}");
    }
    for done in [
        "FROBNICATE",
        "BEGIN; DECLARE c CURSOR FOR SELECT set_config('my.note', 'x', false); FETCH c; COMMIT",
        "LOAD 'nosuch'",
        "DO $$ BEGIN PERFORM set_config('work_mem', '8MB', true); END $$",
        "DO $$ BEGIN PERFORM set_config(name, setting, true) FROM pg_settings WHERE name = 'work_mem'; END $$",
        "UPDATE pg_settings SET setting = '8MB' WHERE name = 'statement_timeout' AND false",
    ] {
        one.query(done).await;
        assert_eq!(pinned(&console).await, [""; 0], "{done}");
    }
    assert_eq!(rows(&one.query("SELECT current_setting('my.note')").await), [[Some("x".to_owned())]]);
    // Large objects are called so by libpq.
    one.send(b'F', &[&1299u32.to_be_bytes()[..], &[0; 6]].concat()).await; // now()
    assert_eq!(one.until_ready().await.last().unwrap().tag, b'Z');
    assert_eq!(pinned(&console).await, [""; 0]);
}

/// It kept its server to the session's end, closed or not.
#[tokio::test]
async fn a_named_connection_of_dblink_keeps_its_server_until_it_is_closed() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    let (mut one, console) = (proxy.wire("acme").await, proxy.console().await);
    let role = rows(&one.query("SELECT current_user").await)[0][0].clone().unwrap();
    let superuser = proxy.behind("acme").await;
    superuser.run("CREATE SCHEMA \"dblink's\"; CREATE EXTENSION dblink SCHEMA \"dblink's\"").await;
    superuser.run(&format!("GRANT USAGE ON SCHEMA \"dblink's\" TO \"{role}\"")).await;
    let at = proxy.cluster.url("postgres");
    let (connect, disconnect) = ("\"dblink's\".dblink_connect", "\"dblink's\".dblink_disconnect");
    let body = format!("BEGIN PERFORM {connect}('in function', '{at}'); END");
    for (done, reason) in [
        (format!("SELECT {connect}('a', '{at}')"), "dblink_connection"),
        (format!("SELECT {connect}('b', '{at}')"), "dblink_connection"),
        (format!("SELECT {disconnect}('a')"), "dblink_connection"),
        (format!("BEGIN; SELECT {disconnect}('b'); SELECT 1/0"), "dblink_connection"),
        // It was closed in the transaction that failed, and is closed still.
        ("ROLLBACK".to_owned(), ""),
        (format!("SELECT {connect}('a', 'host=127.0.0.1 port=1')"), ""),
        (format!("SELECT {connect}('a', '{at}'), {disconnect}('a')"), ""),
        (format!("CREATE FUNCTION connects() RETURNS void LANGUAGE plpgsql AS $${body}$$"), ""),
        ("SELECT connects()".to_owned(), "dblink_connection"),
        (format!("SELECT {disconnect}('in function')"), ""),
    ] {
        one.query(&done).await;
        // A text that ran before the functions were loaded is looked up behind its reply.
        in_time(&format!("{reason:?} after {done}"), async {
            while pinned(&console).await.join(",") != reason {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
    // Whoever leaves one behind takes its server along.
    one.query(&format!("SELECT {connect}('left', '{at}')")).await;
    drop(one);
    let open = "SELECT \"dblink's\".dblink_get_connections() IS NULL";
    assert_eq!(proxy.client("acme").connect().await.ask(open).await, "t");
}

/// Code that calls set_config kept the server to the session's end, whatever it set and for however long.
#[tokio::test]
async fn what_code_sets_follows_its_session_and_keeps_no_server() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    proxy.behind("acme").await.run("CREATE EXTENSION pg_trgm").await;
    let (one, other) = (proxy.client("acme").connect().await, proxy.client("acme").connect().await);
    other.run("CREATE FUNCTION updates() RETURNS void LANGUAGE sql AS $$ UPDATE pg_settings SET setting = '7s' WHERE name = 'lock_timeout' $$").await;
    for (done, shown, value, usual) in [
        ("DO $$ BEGIN PERFORM set_config('my.note', 'x', false); END $$", "my.note", "x", ""),
        ("DO $$ BEGIN EXECUTE 'SELECT set_config(''my.other'', ''y'', false)'; END $$", "my.other", "y", ""),
        ("DO 'BEGIN PERFORM set_config(''work_mem'', ''8MB'', false); END'", "work_mem", "8MB", "4MB"),
        (
            "UPDATE pg_settings SET setting = '5s' WHERE name = 'idle_session_timeout'",
            "idle_session_timeout",
            "5s",
            "0",
        ),
        ("SELECT updates()", "lock_timeout", "7s", "0"),
        ("SELECT set_limit(0.5)", "pg_trgm.similarity_threshold", "0.5", "0.3"),
    ] {
        one.run(done).await;
        let shows = format!("SELECT current_setting('{shown}', true)");
        for _ in 0..2 {
            assert_eq!(other.ask(&shows).await, usual, "{done}");
            assert_eq!(one.ask(&shows).await, value, "{done}");
        }
    }
}

/// What a transaction is like is no setting, though PostgreSQL shows it as one that the session has set, and goes on to when it is
/// over: the next session whose code was asked about was ended.
#[tokio::test]
async fn what_a_transaction_was_like_is_taken_for_no_sessions_setting() {
    let proxy = Proxy::with_tenant("acme").pool_size(1).start().await;
    for modes in ["DEFERRABLE", "READ ONLY", "ISOLATION LEVEL SERIALIZABLE, READ ONLY, DEFERRABLE"] {
        for done in [
            format!("BEGIN; SET TRANSACTION {modes}; SELECT 1; COMMIT"),
            format!("BEGIN {modes}; COMMIT"),
            format!("BEGIN; SET TRANSACTION {modes}; SELECT 1; ROLLBACK"),
            "BEGIN; SAVEPOINT a; SET TRANSACTION READ ONLY; ROLLBACK TO a; COMMIT".to_owned(),
            format!("DO $$ BEGIN EXECUTE 'SET TRANSACTION {modes}'; END $$"),
            format!("SET TRANSACTION {modes}"),
            "BEGIN; SELECT set_config('transaction_' || 'read_only', 'on', true); COMMIT".to_owned(),
        ] {
            let (mut one, mut other) = (proxy.wire("acme").await, proxy.wire("acme").await);
            one.query(&done).await;
            for _ in 0..2 {
                let code = "DO $$ BEGIN EXECUTE 'SELECT 1'; END $$";
                assert_eq!(tags(&other.query(code).await), "CZ", "{done}");
                one.query("SET work_mem = '8MB'").await;
                assert_eq!(tags(&other.query("SHOW transaction_read_only").await), "TDCZ", "{done}");
                one.query(code).await;
            }
            let shown = "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only'), current_setting('transaction_deferrable')";
            let usual = [["read committed", "off", "off"].map(|value| Some(value.to_owned()))];
            for client in [&mut one, &mut other] {
                assert_eq!(rows(&client.query(shown).await), usual, "{done}");
            }
        }
    }
}

async fn send(client: &mut Wire, messages: &[Vec<u8>]) -> Vec<Message> {
    client.send_bytes(&messages.concat()).await;
    client.until_ready().await
}

/// Why sessions keep their servers, but for what they may have to ask of sequences.
async fn pinned(console: &Client) -> Vec<String> {
    let shown = console.ask_all("SHOW PINS").await;
    let reasons = shown.into_iter().map(|row| row[6].clone().unwrap());
    let kept = |reasons: String| {
        reasons.split(',').filter(|reason| *reason != "sequence_written").collect::<Vec<_>>().join(",")
    };
    reasons.map(kept).filter(|reasons| !reasons.is_empty()).collect()
}
