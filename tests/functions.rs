//! What functions, triggers and code blocks leave behind in their session without the client's text saying so: it stays
//! with the client, or is nobody's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod support;

use support::{Client, Proxy};

/// Everything here leaves something in the session that calls it.
const LEAVING: &str = "
    CREATE TABLE jobs (id int);
    CREATE TABLE parts (id int) PARTITION BY RANGE (id);
    CREATE FUNCTION takes_a_lock() RETURNS int LANGUAGE plpgsql AS 'BEGIN PERFORM pg_advisory_lock(42); RETURN 1; END';
    CREATE FUNCTION by_another() RETURNS int LANGUAGE sql AS 'SELECT takes_a_lock()';
    CREATE FUNCTION by_a_string(t text) RETURNS void LANGUAGE plpgsql AS 'BEGIN EXECUTE t; END';
    CREATE FUNCTION by_a_body() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT takes_a_lock(); END;
    CREATE FUNCTION fires() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM takes_a_lock(); RETURN NEW; END';
    CREATE TRIGGER fires BEFORE INSERT ON jobs FOR EACH ROW EXECUTE FUNCTION fires();
    CREATE FUNCTION fills() RETURNS void LANGUAGE sql AS 'INSERT INTO jobs VALUES (1)';
    CREATE FUNCTION fills_built(t text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE format('INSERT INTO %I VALUES (1)', t); END $$;
    CREATE FUNCTION reads_built(t text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'SELECT * FROM ' || quote_ident(t); END $$;
    CREATE FUNCTION locks_built() RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE format('SELECT pg_advisory_lock(%L)', 42); END $$;
    CREATE FUNCTION temps_built() RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE format('CREATE TEMP TABLE %I (i int)', 'secret'); END $$;
    CREATE FUNCTION sets_built() RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'SET my.secret = ''x'''; END $$;
    CREATE VIEW locking AS SELECT takes_a_lock() AS l;
    CREATE VIEW locking_itself AS SELECT pg_advisory_lock(42)::text AS l;
    CREATE TABLE by_default (i int, l int DEFAULT takes_a_lock());
    CREATE TABLE by_check (i int CHECK (takes_a_lock() = i));
    CREATE DOMAIN locked_int AS int CHECK (takes_a_lock() = value);
    CREATE TABLE by_domain (i locked_int);
    CREATE TABLE a_part PARTITION OF parts FOR VALUES FROM (0) TO (10);
    CREATE TRIGGER fires BEFORE INSERT ON a_part FOR EACH ROW EXECUTE FUNCTION fires();
    CREATE FUNCTION makes_a_table() RETURNS void LANGUAGE plpgsql AS 'BEGIN CREATE TEMP TABLE secret (i int); END';
    CREATE PROCEDURE proceeds() LANGUAGE plpgsql AS 'BEGIN PERFORM takes_a_lock(); COMMIT; END';
    CREATE FUNCTION sets() RETURNS void LANGUAGE plpgsql AS $$ BEGIN SET statement_timeout = 54321; END $$;
    CREATE FUNCTION sets_ours() RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM set_config('my.secret', 'x', false); END $$;
    CREATE FUNCTION sets_some(n text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM set_config(n, 'x', false); END $$;
    CREATE FUNCTION \"Odd, isn't it?\"() RETURNS int LANGUAGE sql AS 'SELECT takes_a_lock()';
    CREATE OPERATOR @!@ (LEFTARG = int, RIGHTARG = int, FUNCTION = two);";

const LOCK: &str = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
const TEMPORARY: &str = "SELECT to_regclass('pg_temp.secret')";
const TIMEOUT: &str = "SHOW statement_timeout";
const OURS: &str = "SELECT coalesce(current_setting('my.secret', true), '')";

/// What is called, what would tell of it, and what a session that did not call it must be told.
const CALLS: [(&str, &str, &str); 29] = [
    ("SELECT takes_a_lock()", LOCK, "0"),
    ("SELECT by_another()", LOCK, "0"),
    ("SELECT by_a_body()", LOCK, "0"),
    ("SELECT \"Odd, isn't it?\"()", LOCK, "0"),
    ("SELECT 1 @!@ 2", LOCK, "0"),
    ("SELECT * FROM locking", LOCK, "0"),
    ("SELECT * FROM locking_itself", LOCK, "0"),
    ("INSERT INTO jobs VALUES (1)", LOCK, "0"),
    ("WITH new AS (INSERT INTO jobs VALUES (2) RETURNING *) SELECT * FROM new", LOCK, "0"),
    ("SELECT fills()", LOCK, "0"),
    ("INSERT INTO by_default VALUES (1)", LOCK, "0"),
    ("INSERT INTO by_check VALUES (1)", LOCK, "0"),
    ("INSERT INTO by_domain VALUES (1)", LOCK, "0"),
    ("INSERT INTO parts VALUES (1)", LOCK, "0"),
    ("CALL proceeds()", LOCK, "0"),
    ("DO 'BEGIN PERFORM takes_a_lock(); END'", LOCK, "0"),
    ("SELECT by_a_string('SELECT pg_advisory_lock(42)')", LOCK, "0"),
    ("SELECT fills_built('jobs')", LOCK, "0"),
    ("SELECT reads_built('locking')", LOCK, "0"),
    ("SELECT locks_built()", LOCK, "0"),
    ("SELECT makes_a_table()", TEMPORARY, ""),
    ("SELECT temps_built()", TEMPORARY, ""),
    ("SELECT sets_built()", OURS, ""),
    ("SELECT by_a_string('CREATE TEMP TABLE secret (i int)')", TEMPORARY, ""),
    ("SELECT sets()", TIMEOUT, "0"),
    ("SELECT by_a_string('SET statement_timeout = 54321')", TIMEOUT, "0"),
    ("SELECT sets_ours()", OURS, ""),
    ("SELECT sets_some('my.secret')", OURS, ""),
    ("SELECT by_a_string($$SET my.secret = 'x'$$)", OURS, ""),
];

async fn start_proxy() -> Proxy {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let acme = proxy.client("acme").connect().await;
    let two = "CREATE FUNCTION two(int, int) RETURNS int LANGUAGE plpgsql AS 'BEGIN PERFORM pg_advisory_lock(42); RETURN 2; END';";
    acme.run(&format!("{two}{LEAVING}")).await;
    acme.leave().await;
    proxy
}

/// How the texts are sent.
#[derive(Clone, Copy, PartialEq)]
enum By {
    SimpleQuery,
    NamedStatement,
    Transaction,
}

async fn call(client: &Client, sql: &str, by: By) {
    match by {
        By::SimpleQuery => drop(client.run(sql).await),
        By::Transaction => drop(client.run(&format!("BEGIN; {sql}; COMMIT")).await),
        By::NamedStatement => {
            let statement = client.prepare(sql).await.unwrap();
            client.execute(&statement, &[]).await.unwrap();
        }
    }
}

async fn stays_with_its_session(by: By) {
    let proxy = start_proxy().await;
    let acme = proxy.client("acme");
    for (sql, question, clean) in CALLS {
        if by == By::Transaction && sql.starts_with("CALL") {
            continue; // it commits by itself, which no transaction block allows
        }
        let (one, other) = (acme.connect().await, acme.connect().await);
        call(&one, sql, by).await;
        for _ in 0..2 {
            let found = other.ask(question).await;
            let expected = if question == LOCK { "1" } else { clean };
            assert_eq!(found, expected, "another session after {sql}");
            // A lock shows who holds it: from elsewhere it is there, and only its holder has it.
            assert_ne!(one.ask(question).await, clean, "the session itself lost it after {sql}");
        }
        one.leave().await;
        let deadline = async { while other.ask(question).await != clean {} };
        support::client::in_time(sql, deadline).await;
        other.leave().await;
    }
}

#[tokio::test]
async fn what_functions_leave_behind_stays_with_its_session_by_simple_queries() {
    stays_with_its_session(By::SimpleQuery).await;
}

#[tokio::test]
async fn what_functions_leave_behind_stays_with_its_session_by_prepared_statements() {
    stays_with_its_session(By::NamedStatement).await;
}

#[tokio::test]
async fn what_functions_leave_behind_stays_with_its_session_in_transactions() {
    stays_with_its_session(By::Transaction).await;
}

/// A function that is replaced, or given to a table as its trigger, by another session a moment ago.
#[tokio::test]
async fn a_function_changed_by_one_session_is_known_to_the_others_at_once() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let acme = proxy.client("acme");
    let (one, other) = (acme.connect().await, acme.connect().await);
    one.run("CREATE TABLE t (i int); CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'").await;
    other.run("SELECT f(); INSERT INTO t VALUES (1)").await;
    let harmful = "CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE plpgsql AS 'BEGIN PERFORM pg_advisory_lock(42); RETURN 1; END'";
    one.run(harmful).await;
    other.run("SELECT f()").await;
    assert_eq!(pins(&proxy).await, ["advisory_lock"]);
    other.run("SELECT pg_advisory_unlock_all()").await;
    assert_eq!(pins(&proxy).await, [""; 0]);

    one.run("CREATE FUNCTION g() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM f(); RETURN NEW; END'")
        .await;
    one.run("BEGIN; CREATE TRIGGER g BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION g(); COMMIT").await;
    other.run("INSERT INTO t VALUES (1)").await;
    assert_eq!(pins(&proxy).await, ["advisory_lock"]);
    other.run("SELECT pg_advisory_unlock_all()").await;

    one.run("CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'").await;
    other.run("INSERT INTO t VALUES (1)").await;
    assert_eq!(pins(&proxy).await, [""; 0]);
}

/// And by somebody who does not come through the proxy: within `functions_check_delay`.
#[tokio::test]
async fn a_function_changed_past_the_proxy_becomes_known() {
    let proxy =
        Proxy::with_tenant("acme").pool_size(2).config("functions_check_delay", "\"100ms\"").start().await;
    let (one, behind) = (proxy.client("acme").connect().await, proxy.behind("acme").await);
    one.run("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'; SELECT f()").await;
    let harmful = "CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE plpgsql AS 'BEGIN PERFORM pg_advisory_lock(42); RETURN 1; END'";
    behind.run(harmful).await;
    support::client::in_time("the change to be known", async {
        while pins(&proxy).await.is_empty() {
            one.run("SELECT f()").await;
        }
    })
    .await;
}

/// A tenant whose database nobody has seen yet was greeted only when its functions had been read, which took three times as
/// long as the login itself. They are read behind the first reply: here by somebody who waits for a table's lock.
#[tokio::test]
async fn a_tenants_first_reply_does_not_wait_until_its_functions_are_read() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let behind = proxy.behind("acme").await;
    behind.run("BEGIN; LOCK TABLE pg_catalog.pg_policy IN ACCESS EXCLUSIVE MODE").await;
    let acme = proxy.client("acme").connect().await;
    assert_eq!(acme.ask("SELECT 1").await, "1");
    let unlocked = async {
        let waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        while behind.ask_all(waits).await.is_empty() {
            behind.run("SELECT pg_stat_clear_snapshot()").await;
        }
        behind.run("COMMIT").await;
    };
    let (second, ()) = tokio::join!(acme.ask("SELECT 2"), support::client::in_time("the reading", unlocked));
    assert_eq!(second, "2");
}

/// Every CREATE TABLE of a migration had all functions read again, which took five times as long as the statement itself. Where
/// none leaves anything behind nothing is read: here somebody who waits for a table's lock would be seen.
#[tokio::test]
async fn a_migration_that_makes_no_functions_has_none_read_again() {
    let proxy = Proxy::with_tenant("acme").start().await;
    let (acme, behind) = (proxy.client("acme").connect().await, proxy.behind("acme").await);
    acme.run("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'").await;
    assert_eq!(acme.ask("SELECT f()").await, "1");
    behind.run("BEGIN; LOCK TABLE pg_catalog.pg_policy IN ACCESS EXCLUSIVE MODE").await;
    let migration = async {
        acme.run("CREATE TABLE t (id serial PRIMARY KEY, x int DEFAULT f())").await;
        acme.run("ALTER TABLE t ADD y text; CREATE VIEW v AS SELECT f() FROM t; CREATE INDEX ON t (y)").await;
        assert_eq!(acme.ask("SELECT count(*) FROM v").await, "0");
    };
    support::client::in_time("a migration", migration).await;
    behind.run("COMMIT").await;
    // One that makes a view which locks has.
    acme.run("CREATE VIEW locking AS SELECT pg_try_advisory_lock(42)").await;
    acme.run("SELECT * FROM locking").await;
    assert_eq!(pins(&proxy).await, ["advisory_lock"]);
}

/// One function with dynamic SQL made every migration read all functions behind each statement. A definition that names nothing
/// with effects has nothing read; others are read while the session goes on, and no definition waits: here for a table's lock.
#[tokio::test]
async fn a_migration_does_not_wait_until_functions_are_read() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let (acme, behind) = (proxy.client("acme").connect().await, proxy.behind("acme").await);
    acme.run("CREATE FUNCTION runs(t text) RETURNS void LANGUAGE plpgsql AS 'BEGIN EXECUTE t; END'").await;
    acme.run("SELECT runs('SELECT 1')").await;
    behind.run("BEGIN; LOCK TABLE pg_catalog.pg_policy IN ACCESS EXCLUSIVE MODE").await;
    let migration = async {
        for number in 0..10 {
            acme.run(&format!("CREATE TABLE t{number} (id int PRIMARY KEY, x int DEFAULT 1)")).await;
            acme.run(&format!("CREATE VIEW v{number} AS SELECT id FROM t{number}")).await;
            acme.run(&format!(
                "CREATE FUNCTION f{number}(t text) RETURNS void LANGUAGE plpgsql AS 'BEGIN EXECUTE t; END'"
            ))
            .await;
        }
    };
    support::client::in_time("a migration", migration).await;
    behind.run("COMMIT").await;
    acme.run("SELECT f7('SELECT pg_advisory_lock(42)')").await;
    assert_eq!(pins(&proxy).await, ["advisory_lock"]);
}

/// Such a text was given any effect instead, while a pause between two loads lasted. What a function sets cannot be asked
/// for without its name: the setting was lost.
#[tokio::test]
async fn a_text_behind_the_definition_of_its_function_waits_until_that_is_read() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let acme = proxy.client("acme").connect().await;
    acme.run("CREATE TABLE notes (note text)").await;
    for number in 0..5 {
        acme.run(&format!(
            "CREATE OR REPLACE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN PERFORM set_config(''my.note{number}'', NEW.note, false); RETURN NEW; END'"
        ))
        .await;
        acme.run(
            "CREATE OR REPLACE TRIGGER keep BEFORE INSERT ON notes FOR EACH ROW EXECUTE FUNCTION keep()",
        )
        .await;
        acme.run(&format!("INSERT INTO notes VALUES ('{number}')")).await;
        let stir = proxy.client("acme").connect().await;
        stir.run("BEGIN").await;
        assert_eq!(acme.ask(&format!("SELECT current_setting('my.note{number}')")).await, number.to_string());
        stir.run("COMMIT").await;
    }
}

/// A view in an open transaction is seen by no other session. Its function becomes harmful meanwhile.
#[tokio::test]
async fn a_view_committed_after_its_function_was_changed_is_known() {
    let proxy = Proxy::with_tenant("acme").pool_size(2).start().await;
    let acme = proxy.client("acme");
    let (one, other) = (acme.connect().await, acme.connect().await);
    one.run("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'").await;
    one.run("BEGIN; CREATE VIEW v AS SELECT f()").await;
    let harmful = "CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE plpgsql AS 'BEGIN PERFORM pg_advisory_lock(42); RETURN 1; END'";
    other.run(harmful).await;
    other.run("SELECT f()").await;
    assert_eq!(pins(&proxy).await, ["advisory_lock"]);
    other.run("SELECT pg_advisory_unlock_all()").await;
    one.run("COMMIT").await;
    other.run("SELECT * FROM v").await;
    assert_eq!(pins(&proxy).await, ["advisory_lock"]);
}

async fn pins(proxy: &Proxy) -> Vec<String> {
    let known = ["advisory_lock", "temporary_object", "untracked_setting", "unread_statement"];
    let rows = proxy.console().await.ask_all("SHOW PINS").await;
    let reasons = rows.into_iter().flatten().flatten();
    let reasons =
        reasons.flat_map(|value| value.split(',').map(|reason| reason.trim().to_owned()).collect::<Vec<_>>());
    reasons.filter(|reason| known.contains(&reason.as_str())).collect()
}
