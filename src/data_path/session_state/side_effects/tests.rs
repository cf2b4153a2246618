use super::*;

/// Read in full, as texts are that are not bare.
fn read(sql: &str) -> SideEffects {
    let in_full = SideEffects::parse(sql.as_bytes(), Lexing::default());
    let read = SideEffects::read(sql.as_bytes(), Lexing::default());
    if read.is_bare {
        assert_eq!(read.checks, in_full.checks, "{sql}");
        assert!(in_full.advances_sequence || !read.advances_sequence, "{sql}");
    } else {
        assert_eq!(read, in_full, "{sql}");
    }
    in_full
}

#[test]
fn a_bare_query_shows_at_once() {
    let is_bare = |sql: &str| SideEffects::read(sql.as_bytes(), Lexing::default()).is_bare;
    for sql in [
        "SELECT abalance FROM accounts WHERE aid = 12345;",
        "  select a, b from c where d=$1 and e = $2 and f > -1 and g[$3] = h.i;; ",
        "UPDATE t SET v = v - 1 WHERE id = $1",
        "DELETE FROM t",
        "SELECT a$1 FROM c",
        "INSERT INTO t SELECT a FROM b",
        "VALUES $1,$22",
    ] {
        assert!(is_bare(sql), "{sql}");
    }
    for sql in [
        "",
        "BEGIN",
        "SELECTED a",
        "SELECT 'a'",
        "SELECT \"a\" FROM b",
        "SELECT now() FROM c",
        "SELECT a; SELECT b",
        "SELECT a -- b",
        "SELECT a /* b */ FROM c",
        "SELECT a INTO TEMP b",
        "SELECT a FROM pg_settings WHERE name = $1",
        "SELECT $a$ b $a$ FROM c",
        "SELECT a\\ FROM c",
        "SELECT a$",
        "WITH a AS b SELECT c",
    ] {
        assert!(!is_bare(sql), "{sql}");
    }
    let insert = SideEffects::read(b"insert into t select a from b", Lexing::default());
    assert!(insert.is_bare && insert.advances_sequence);
}

#[test]
fn an_ordinary_transaction_has_no_side_effects() {
    for sql in [
        "SELECT 1",
        "BEGIN; SET LOCAL work_mem = '1MB'; UPDATE t SET x = 1; ROLLBACK",
        "BEGIN ISOLATION LEVEL SERIALIZABLE; SET TRANSACTION READ ONLY; SET CONSTRAINTS ALL DEFERRED",
        "SELECT pg_advisory_xact_lock(1)",
        "TRUNCATE t; CREATE INDEX i ON t (x); GRANT SELECT ON t TO x; NOTIFY x",
    ] {
        assert_eq!(read(sql), SideEffects::default(), "{sql}");
    }
}

#[test]
fn local_settings_that_affect_parsing_are_found() {
    for sql in [
        "BEGIN; SET LOCAL search_path = a",
        "SET LOCAL ROLE x",
        "SELECT set_config('app.user', 'a', true)",
        "SELECT set_config('TimeZone', $1, true)",
        "DO 'BEGIN SET LOCAL DateStyle = german; END'",
    ] {
        assert_eq!(read(sql).checks, StateChecks::LOCAL_SETTINGS, "{sql}");
    }
    assert_eq!(read("SELECT set_config('work_mem', $1, true)"), SideEffects::default());
}

#[test]
fn texts_that_may_advance_a_sequence_are_found() {
    for sql in [
        "INSERT INTO t VALUES (1)",
        "select NextVal('s')",
        "WITH new AS (INSERT INTO t DEFAULT VALUES RETURNING id) SELECT * FROM new",
        "SELECT 1; insert into t values (1)",
        "CALL p()",
        "DO ''",
    ] {
        assert!(read(sql).advances_sequence, "{sql}");
    }
    for sql in ["SELECT x FROM t;", "UPDATE t SET value = 1", "DELETE FROM t", "BEGIN", ""] {
        assert!(!read(sql).advances_sequence, "{sql}");
    }
}

#[test]
fn texts_that_may_commit_are_found() {
    assert!(
        read("COMMIT").commits && read(" end;").commits && read("INSERT INTO t VALUES (1);Commit").commits
    );
    assert!(!read("BEGIN").commits && !read("ROLLBACK").commits && !read("SELECT 'commit'").commits);
}

#[test]
fn ddl_of_functions_and_their_callers_requires_checks() {
    for (sql, checks) in [
        ("CREATE OR REPLACE FUNCTION f() RETURNS int LANGUAGE sql AS ''", StateChecks::CALLERS),
        (
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT pg_try_advisory_lock(1)'",
            StateChecks::FUNCTIONS,
        ),
        ("CREATE FUNCTION f() RETURNS int LANGUAGE c AS 'library'", StateChecks::FUNCTIONS),
        ("CREATE EXTENSION postgis", StateChecks::FUNCTIONS),
        ("ALTER TABLE t ADD x int DEFAULT f()", StateChecks::CALLERS),
        ("CREATE TABLE t (x int); ALTER FUNCTION f() STABLE", StateChecks::CALLERS),
        ("CREATE TABLE t (x int); CREATE EXTENSION postgis", StateChecks::CALLERS | StateChecks::FUNCTIONS),
        ("CREATE VIEW v AS SELECT Setseed(0.5)", StateChecks::FUNCTIONS),
    ] {
        assert_eq!(read(sql).checks, checks, "{sql}");
    }
}

#[test]
fn changes_of_role_and_database_settings_require_a_check() {
    for sql in ["ALTER ROLE ALL SET work_mem = '8MB'", "SELECT 1; alter database acme reset all"] {
        assert_eq!(read(sql).checks, StateChecks::SESSION_START, "{sql}");
    }
}

#[test]
fn named_parameters_are_checked_by_name() {
    let names = |sql: &str| read(sql).names.map(|names| names.join(" "));
    assert_eq!(names("SET Search_Path = a; RESET work_mem").as_deref(), Some("search_path work_mem"));
    assert_eq!(names("SELECT set_config('my.id', $1, false)").as_deref(), Some("my.id"));
    assert_eq!(names("SET ROLE x").as_deref(), Some("role"));
}

#[test]
fn readable_parameter_names_in_code_are_checked_and_do_not_pin() {
    for (sql, named) in [
        ("DO $$BEGIN PERFORM set_config('work_mem', '8MB', true); END$$", None),
        ("DO $$BEGIN PERFORM set_config(k, v, true) FROM t; END$$", None),
        ("DO $$BEGIN PERFORM set_config('my.id', '7', false); END$$", Some("my.id")),
        ("DO $$BEGIN EXECUTE 'SELECT set_config(''my.id'', ''7'', false)'; END$$", Some("my.id")),
        ("UPDATE pg_settings SET setting = '8MB' WHERE name = 'work_mem'", None),
        ("SELECT set_limit(0.5)", Some("pg_trgm.similarity_threshold")),
    ] {
        let read = read(sql);
        assert_eq!(read.pins, Pins::empty(), "{sql}");
        let names = read.names.unwrap_or_default();
        assert!(named.is_none_or(|named| names.iter().any(|name| **name == *named)), "{sql}");
        assert!(read.checks.intersects(StateChecks::ANY_SETTING | StateChecks::NAMED_SETTINGS), "{sql}");
    }
}

#[test]
fn state_that_no_query_detects_pins() {
    assert_eq!(read("SELECT set_config($1, $2, false)").pins, Pins::SETTINGS);
    assert_eq!(read("DO $$BEGIN PERFORM set_config(k, v, false); END$$").pins, Pins::SETTINGS);
    assert_eq!(
        read("SELECT query_to_xml('select set_config(k, v, false)', true, true, '')").pins,
        Pins::SETTINGS
    );
    assert_eq!(read("LOAD 'x'").pins, Pins::LOAD);
    assert_eq!(read("SELECT lastval()").pins, Pins::SEQUENCE);
    assert_eq!(read("FROBNICATE").checks, SideEffects::anything().checks);
}

#[test]
fn driver_resets_are_recognised() {
    let asyncpg = "SELECT pg_advisory_unlock_all();\nCLOSE ALL;\nUNLISTEN *;\nRESET ALL;";
    assert_eq!(read(asyncpg).driver_reset, Some(DriverReset::ResetsSettings));
    assert_eq!(read("DISCARD ALL").driver_reset, Some(DriverReset::DiscardsAll));
    let npgsql = "CLOSE ALL;UNLISTEN *;SELECT pg_advisory_unlock_all();DISCARD SEQUENCES;DISCARD TEMP";
    assert_eq!(read(npgsql).driver_reset, Some(DriverReset::KeepsSettings));
    for other in
        ["RESET ALL; SET a = 1", "ROLLBACK; RESET ALL", "SELECT pg_advisory_unlock_all(), f()", "RESET x"]
    {
        assert_eq!(read(other).driver_reset, None, "{other}");
    }
}
