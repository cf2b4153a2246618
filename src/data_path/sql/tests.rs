//! Examples of SQL texts and their analysis.

use std::borrow::Cow;

use super::*;

fn all(sql: &str) -> Vec<Statement<'_>> {
    statements(sql.as_bytes(), Lexing::default()).collect()
}

/// The only statement of a text.
fn one(sql: &str) -> Statement<'_> {
    let mut found = all(sql);
    assert_eq!(found.len(), 1, "{sql}: {found:?}");
    found.remove(0)
}

fn texts(sql: &str) -> Vec<&str> {
    all(sql).into_iter().map(|statement| std::str::from_utf8(statement.text).unwrap()).collect()
}

fn name(name: &str) -> Cow<'_, [u8]> {
    Cow::Borrowed(name.as_bytes())
}

#[test]
fn statements_end_where_postgresql_ends_them() {
    assert_eq!(texts(""), [""; 0]);
    assert_eq!(texts(" ; -- nothing\n;/* ; */;"), [""; 0]);
    assert_eq!(texts("select 1;select 2 ;"), ["select 1", "select 2"]);
    assert_eq!(texts("select ';' ; b"), ["select ';'", "b"]);
    assert_eq!(texts(r"select '\'; b"), [r"select '\'", "b"]);
    assert_eq!(texts(r"select E'\';' ; b"), [r"select E'\';'", "b"]);
    assert_eq!(texts("select E'a'\n'\\';' ; b"), ["select E'a'\n'\\';'", "b"]);
    assert_eq!(texts("select E'a' '\\' ; b"), ["select E'a' '\\'", "b"]);
    assert_eq!(texts("select \";\"\";\" ; b"), ["select \";\"\";\"", "b"]);
    assert_eq!(texts("select $$;$$ ; b"), ["select $$;$$", "b"]);
    assert_eq!(texts("select $a$;$$;$b$;$a$ ; b"), ["select $a$;$$;$b$;$a$", "b"]);
    assert_eq!(texts("select a$$;$$"), ["select a$$", "$$"]);
    assert_eq!(texts("select $1;$2"), ["select $1", "$2"]);
    assert_eq!(texts("/* /* ; */ ; */ a;/**/b"), ["a", "b"]);
    assert_eq!(texts("a --;\n;b"), ["a", "b"]);
    assert_eq!(texts("a */*;*/;b"), ["a *", "b"]);
    assert_eq!(texts("create rule r as on insert to t do (select 1; select 2); b").len(), 2);
    assert_eq!(texts("select U&'\\0041;' ; b").len(), 2);
    assert_eq!(texts("select xe'\\';b"), ["select xe'\\'", "b"]);
    assert_eq!(texts("select b'01''\\;' ; b").len(), 2);
}

#[test]
fn standard_conforming_strings_decides_whether_a_backslash_escapes() {
    let lexing = Lexing { standard_conforming_strings: false, ..Lexing::default() };
    let first = |sql, lexing| statements(sql, lexing).next().unwrap().text;
    assert_eq!(first(br"select '\';' ; b", lexing), br"select '\';'");
    assert_eq!(first(br"select b'\';' ; b", lexing), br"select b'\'");
    assert_eq!(first(br"select '\';' ; b", Lexing::default()), br"select '\'");
}

#[test]
fn the_body_of_a_function_is_part_of_its_statement() {
    let function = "create or replace function f() returns int begin atomic select case when true then 1 end; \
                    select 2 as end; end";
    assert_eq!(texts(&format!("{function}; select 3")), [function, "select 3"]);
    assert_eq!(texts("create view v as select begin atomic; select end").len(), 2);
    assert_eq!(texts("create procedure p() begin atomic end; b").len(), 2);
    assert_eq!(texts("begin; atomic; end").len(), 3);
}

#[test]
fn ordinary_statements_have_no_effects() {
    for sql in [
        "select a, count(*) from t where b = $1 and c = 'x' group by 1",
        "insert into temp values (1)",
        "insert into t (a) values (lower('A')) on conflict do nothing returning a",
        "with x as (select 1) insert into temp select * from x",
        "update t set a = 1",
        "delete from t",
        "values (1)",
        "(select 1)",
        "table t",
        "show all",
        "lock table t",
        "analyze t",
        "select 'set_config(1)' as \"nextval\" from pg_settings",
        "select pg_advisory_xact_lock(1)",
        "set_config",
        "select into_temp from pg_temporal",
    ] {
        let statement = one(sql);
        let expected = if sql == "set_config" { Effects::UNKNOWN } else { Effects::empty() };
        assert_eq!(statement.effects, expected, "{sql}");
    }
}

#[test]
fn calls_that_affect_the_session_are_found() {
    for (sql, effects) in [
        ("select pg_catalog . set_config ('a', 'b', false)", Effects::SET_CONFIG),
        ("select SET_CONFIG/**/('a', 'b', false)", Effects::SET_CONFIG),
        ("select \"set_config\"('a', 'b', false)", Effects::SET_CONFIG),
        ("select U&\"set\\005fconfig\"('a', 'b', false)", Effects::SET_CONFIG),
        ("select U&\"set!005fconfig\" uescape '!' ('a', 'b', false)", Effects::UNKNOWN),
        ("update pg_settings set setting = 'x'", Effects::SETTING),
        ("with x as (update only pg_catalog.pg_settings set setting = 1) select 1", Effects::SETTING),
        (
            "select pg_advisory_lock(1), pg_advisory_unlock(2)",
            Effects::ADVISORY_LOCK.union(Effects::ADVISORY_UNLOCK),
        ),
        ("select nextval('s'), lastval()", Effects::SEQUENCE_WRITE.union(Effects::SEQUENCE_READ)),
        ("select * from pg_temp.t", Effects::TEMPORARY),
        ("select 1 into temp t", Effects::TEMPORARY),
        ("select 1 into pg_temp.t", Effects::TEMPORARY),
        (
            "select query_to_xml('select set_config($$a$$, $$b$$, false)', true, true, '')",
            Effects::SET_CONFIG.union(Effects::HIDDEN),
        ),
        ("select dblink_connect('c', 'dbname=' || f(1, 2))", Effects::DBLINK),
        ("select ext.\"dblink_connect_u\"($1, $2), dblink_disconnect('c')", Effects::DBLINK),
        ("select dblink_connect('dbname=a,b'), (1, 2)", Effects::FUNCTION_STATE),
        ("select dblink_connect('dbname=' || f(1, 2))", Effects::FUNCTION_STATE),
        ("explain select nextval('s')", Effects::empty()),
        ("explain analyze select nextval('s')", Effects::SEQUENCE_WRITE),
    ] {
        assert_eq!(one(sql).effects, effects, "{sql}");
    }
}

#[test]
fn transactions() {
    let modes =
        TransactionModes { isolation: Some("serializable"), read_only: Some(true), deferrable: Some(false) };
    for (sql, kind) in [
        ("begin", Kind::Begin(TransactionModes::default())),
        ("BEGIN WORK", Kind::Begin(TransactionModes::default())),
        ("start transaction isolation level serializable, read only not deferrable", Kind::Begin(modes)),
        ("commit and chain", Kind::Commit { chain: true }),
        ("end transaction and no chain", Kind::Commit { chain: false }),
        ("abort", Kind::Rollback { chain: false }),
        ("rollback work and chain", Kind::Rollback { chain: true }),
        ("rollback to savepoint A", Kind::RollbackTo(name("a"))),
        ("rollback transaction to \"A\"", Kind::RollbackTo(name("A"))),
        ("release savepoint", Kind::Release(name("savepoint"))),
        ("release savepoint x", Kind::Release(name("x"))),
        ("savepoint x", Kind::Savepoint(name("x"))),
        ("prepare transaction 'x'", Kind::PrepareTransaction),
        ("commit prepared 'x'", Kind::FinishPrepared),
        ("rollback prepared 'x'", Kind::FinishPrepared),
    ] {
        let statement = one(sql);
        assert_eq!(statement.kind, kind, "{sql}");
        assert_eq!(statement.effects, Effects::TRANSACTION, "{sql}");
    }
}

#[test]
fn prepared_statements_are_found_by_name_and_place() {
    for (sql, written, value) in [
        ("PREPARE Foo (int, text) AS select 1", "Foo", "foo"),
        ("prepare transaction as select 1", "transaction", "transaction"),
        ("execute \"A\"\"b\" (1)", "\"A\"\"b\"", "A\"b"),
        ("deallocate prepare x", "x", "x"),
        ("deallocate prepare", "prepare", "prepare"),
        ("explain analyze verbose execute x (1)", "x", "x"),
        ("explain (analyze, buffers) execute x", "x", "x"),
        ("create table t as execute x", "x", "x"),
        ("create temp table if not exists a.t (a, b) on commit drop as execute x(1) with no data", "x", "x"),
    ] {
        let statement = one(sql);
        let prepared = statement.prepared.clone().unwrap();
        assert_eq!(std::str::from_utf8(&statement.text[prepared.range.clone()]).unwrap(), written, "{sql}");
        assert_eq!(*prepared.value, *value.as_bytes(), "{sql}");
        assert!(statement.effects.contains(Effects::PREPARED), "{sql}");
    }
    assert_eq!(one("deallocate all").kind, Kind::DeallocateAll);
    let prepare = one("prepare p (int) as select nextval('s')");
    assert_eq!(prepare.deferred, Effects::SEQUENCE_WRITE);
    assert_eq!(prepare.effects, Effects::PREPARED);
    let Kind::Prepare { types, body } = prepare.kind else { panic!() };
    assert_eq!((&prepare.text[types], &prepare.text[body]), (&b"int"[..], &b"select nextval('s')"[..]));
}

#[test]
fn set_config_arguments_are_read() {
    let statement = one(
        "select set_config('Search_Path', '', false), pg_catalog.set_config('a.b', $2::text, 'yes') as x",
    );
    let calls: Vec<_> = statement.set_configs().collect();
    assert_eq!(
        calls,
        [
            SetConfig {
                name: Argument::Text(name("search_path")),
                value: Argument::Text(name("")),
                local: Argument::Boolean(false)
            },
            SetConfig {
                name: Argument::Text(name("a.b")),
                value: Argument::Parameter(2),
                local: Argument::Boolean(true)
            },
        ]
    );
    let statement = one("select set_config('a', set_config('b', 'c', null), true) where false");
    assert_eq!(statement.set_configs().count(), 2);
}

/// PostgreSQL 15 ran each of these: `current_setting` is the same after `set_config(name, value, false)`.
#[test]
fn the_value_of_a_set_is_that_of_the_equivalent_set_config() {
    for (sql, parameter, value) in [
        ("set search_path = a, \"B c\", 'd'", "search_path", "a, \"B c\", d"),
        ("set search_path to '\"$user\", public'", "search_path", "\"\"\"$user\"\", public\""),
        ("set search_path = ''", "search_path", "\"\""),
        (
            "set search_path = \"user\", time, none, absent",
            "search_path",
            "\"user\", \"time\", \"none\", absent",
        ),
        ("set search_path = 1, on", "search_path", "1, \"on\""),
        ("set search_path = E'a\\tb', $q$z$$y$q$, 'a'\n'b'", "search_path", "\"a\tb\", \"z$$y\", ab"),
        ("set schema 'X y'", "search_path", "\"X y\""),
        ("SET SESSION Work_Mem = '4MB'", "work_mem", "4MB"),
        ("set sort_mem = 00333", "work_mem", "333"),
        ("set work_mem to + 4000", "work_mem", "4000"),
        ("set application_name = -007", "application_name", "-7"),
        ("set application_name = -0", "application_name", "0"),
        ("set application_name = -0.0", "application_name", "-0.0"),
        ("set application_name = -99999999999", "application_name", "-99999999999"),
        ("set application_name = -2147483648", "application_name", "-2147483648"),
        ("set application_name = 00000000000000001", "application_name", "1"),
        ("set application_name = .5e3", "application_name", ".5e3"),
        ("set application_name = Foo", "application_name", "foo"),
        ("set application_name = \"Foo\"", "application_name", "Foo"),
        ("set application_name = E'\\x41\\102\\u0043\\U00000044\\q'''", "application_name", "ABCDq'"),
        ("set application_name = true", "application_name", "true"),
        ("set U&\"application\\005fname\" to x", "application_name", "x"),
        ("set datestyle = ISO, DMY", "datestyle", "iso, dmy"),
        ("set time zone 'Europe/Rome'", "timezone", "Europe/Rome"),
        ("set time zone -7", "timezone", "-7"),
        ("set time zone interval '-08:00' hour to minute", "timezone", "INTERVAL '-08:00'"),
        ("set names 'latin1'", "client_encoding", "latin1"),
        ("set xml option document", "xmloption", "DOCUMENT"),
        ("set Foo.\"Bar\" = 'x'", "foo.bar", "x"),
        ("set session.x = 1", "session.x", "1"),
        ("set session session.x = 1", "session.x", "1"),
        ("set transaction.x = 1", "transaction.x", "1"),
        ("set local.x to 1", "local.x", "1"),
    ] {
        let statement = one(sql);
        let expected = Kind::Set { local: false, name: name(parameter), value: SetValue::Text(name(value)) };
        assert_eq!(statement.kind, expected, "{sql}");
        assert_eq!(statement.effects, Effects::SETTING, "{sql}");
    }
}

#[test]
fn forms_of_set_and_reset() {
    let text = |value| SetValue::Text(name(value));
    let set = |local, parameter, value| Kind::Set { local, name: name(parameter), value };
    let authorization = |local, role| Kind::SetSessionAuthorization { local, role };
    for (sql, kind) in [
        ("set local work_mem = 1", set(true, "work_mem", text("1"))),
        ("set local local.x = 1", set(true, "local.x", text("1"))),
        ("set work_mem to default", set(false, "work_mem", SetValue::Default)),
        ("set time zone local", set(false, "timezone", SetValue::Default)),
        ("set names", set(false, "client_encoding", SetValue::Default)),
        ("set work_mem from current", set(false, "work_mem", SetValue::Opaque)),
        ("set application_name = U&'a'", set(false, "application_name", SetValue::Opaque)),
        ("set time zone interval '8' hour", set(false, "timezone", SetValue::Opaque)),
        ("set role none", Kind::SetRole { local: false, role: text("none") }),
        ("set local role 'Bob'", Kind::SetRole { local: true, role: text("Bob") }),
        ("set role to default", Kind::SetRole { local: false, role: SetValue::Default }),
        ("set session authorization bob", authorization(false, text("bob"))),
        ("set session session authorization default", authorization(false, SetValue::Default)),
        ("set session_authorization = bob", authorization(false, text("bob"))),
        ("set local session authorization bob", authorization(true, text("bob"))),
        ("set transaction read only", Kind::SetTransaction),
        ("set transaction_isolation = 'serializable'", Kind::SetTransaction),
        ("set constraints all deferred", Kind::SetConstraints),
        ("reset work_mem", Kind::Reset(name("work_mem"))),
        ("reset time zone", Kind::Reset(name("timezone"))),
        ("reset role", Kind::Reset(name("role"))),
        ("reset session authorization", Kind::Reset(name("session_authorization"))),
        ("reset foo.Bar", Kind::Reset(name("foo.bar"))),
        ("reset all", Kind::ResetAll),
    ] {
        assert_eq!(one(sql).kind, kind, "{sql}");
    }
    let modes =
        TransactionModes { isolation: Some("repeatable read"), read_only: Some(true), deferrable: None };
    assert_eq!(
        one("set session characteristics as transaction isolation level repeatable read, read only").kind,
        Kind::SetSessionCharacteristics { local: false, modes }
    );
    assert_eq!(one("set seed = 0.5").effects, Effects::SEED);
}

#[test]
fn names_are_folded_unquoted_and_truncated() {
    let long = format!("savepoint \"{}é\"", "X".repeat(62));
    for (sql, expected) in [
        ("savepoint FooBar", "foobar".to_owned()),
        ("savepoint \"Foo\"\"Bar\"", "Foo\"Bar".to_owned()),
        ("savepoint U&\"d\\0061t\\+000061\\\\\"", "data\\".to_owned()),
        (&long, "X".repeat(62)),
    ] {
        assert_eq!(one(sql).kind, Kind::Savepoint(name(&expected)), "{sql}");
    }
}

#[test]
fn cursors_and_notifications() {
    let cursor = |hold| Kind::DeclareCursor { name: name("c"), hold };
    for (sql, kind) in [
        ("declare c cursor for select 1", cursor(false)),
        ("declare c binary insensitive no scroll cursor with hold for select 1", cursor(true)),
        ("declare c cursor without hold for select 1", cursor(false)),
        ("fetch c", Kind::Fetch(name("c"))),
        ("fetch forward 5 from \"C\"", Kind::Fetch(name("C"))),
        ("move all in c", Kind::Fetch(name("c"))),
        ("close c", Kind::CloseCursor(Some(name("c")))),
        ("close all", Kind::CloseCursor(None)),
        ("listen Chan", Kind::Listen(name("chan"))),
        ("unlisten chan", Kind::Unlisten(Some(name("chan")))),
        ("unlisten *", Kind::Unlisten(None)),
        ("notify chan, 'x'", Kind::Notify(name("chan"))),
        ("discard all", Kind::Discard(Discard::All)),
        ("discard plans", Kind::Discard(Discard::Plans)),
        ("discard temporary", Kind::Discard(Discard::Temp)),
        ("discard sequences", Kind::Discard(Discard::Sequences)),
        ("load 'x'", Kind::Load),
    ] {
        let statement = one(sql);
        assert_eq!(statement.kind, kind, "{sql}");
        assert!(!statement.effects.is_empty(), "{sql}");
    }
    let held = one("declare c cursor with hold for select nextval('s')");
    assert_eq!(held.effects, Effects::CURSOR | Effects::CURSOR_HOLD | Effects::SEQUENCE_WRITE);
    assert_eq!(held.deferred, Effects::SEQUENCE_WRITE);
}

#[test]
fn temporary_objects() {
    let temp =
        |what, object, drop_on_commit| Kind::CreateTemp { what, name: Some(name(object)), drop_on_commit };
    for (sql, kind) in [
        ("create temp table T (a int)", temp(Object::Table, "t", false)),
        ("create local temporary table if not exists t () on commit drop", temp(Object::Table, "t", true)),
        ("create temp table t on commit drop as select 1", temp(Object::Table, "t", true)),
        ("create temp table t as select 1", temp(Object::Table, "t", false)),
        ("create temp table t (a int) on commit delete rows", temp(Object::Table, "t", false)),
        ("create table pg_temp.t (a int)", temp(Object::Table, "t", false)),
        ("create or replace temp view v as select 1", temp(Object::View, "v", false)),
        ("create temp recursive view v (a) as select 1", temp(Object::View, "v", false)),
        ("create temp sequence s", temp(Object::Sequence, "s", false)),
        (
            "create function pg_temp.f() returns int language sql as 'select 1'",
            temp(Object::Other, "f", false),
        ),
        ("create type pg_temp.t as (a int)", temp(Object::Other, "t", false)),
        (
            "select 1 as a into temp t",
            Kind::CreateTemp { what: Object::Table, name: None, drop_on_commit: false },
        ),
    ] {
        let statement = one(sql);
        assert_eq!(statement.kind, kind, "{sql}");
        assert!(statement.effects.contains(Effects::TEMPORARY), "{sql}");
    }
    for sql in [
        "create table t (temp int, pg_temp int)",
        "create table t as select 1 as temp",
        "create function f() returns int language sql set search_path = a, pg_temp as 'select 1'",
        "set search_path = a, pg_temp",
    ] {
        assert!(!one(sql).effects.contains(Effects::TEMPORARY), "{sql}");
    }
    let Kind::Drop { what: Object::Table, names } = one("drop table if exists a, pg_temp.\"B\" cascade").kind
    else {
        panic!()
    };
    assert_eq!(
        names.collect::<Vec<_>>(),
        [
            QualifiedName { schema: None, name: name("a") },
            QualifiedName { schema: Some(name("pg_temp")), name: name("B") }
        ]
    );
}

#[test]
fn the_direction_of_copy_is_found() {
    for (sql, copy) in [
        ("copy t from stdin", Copy::FromClient),
        ("copy a.t (x, y) from stdin with (format csv)", Copy::FromClient),
        ("copy (select 1 from t) to stdout", Copy::ToClient),
        ("copy t to program 'cat'", Copy::OnServer),
        ("copy t from '/tmp/x'", Copy::OnServer),
    ] {
        assert_eq!(one(sql).kind, Kind::Copy(copy), "{sql}");
    }
}

#[test]
fn nested_code_is_searched() {
    for (sql, found) in [
        ("do $$ begin perform set_config('a', 'b', false); end $$", Effects::SET_CONFIG),
        ("do $$ begin update t set a = 1; end $$", Effects::empty()),
        ("do $$ begin set work_mem = 1; end $$", Effects::SETTING),
        ("do $$ begin if true then set local work_mem = 1; end if; end $$", Effects::SETTING_LOCAL),
        ("do $x$ begin execute 'set work_mem = 1'; end $x$", Effects::SETTING | Effects::DYNAMIC),
        (
            "do 'begin execute ''create temp table t()''; end'",
            Effects::TEMPORARY | Effects::DYNAMIC | Effects::DDL,
        ),
        (
            "do language plpython3u $$plpy.execute(\"select pg_advisory_lock(1)\")$$",
            Effects::ADVISORY_LOCK | Effects::DYNAMIC,
        ),
        ("do $$ begin commit; end $$", Effects::TRANSACTION),
    ] {
        let hidden = if found.is_empty() { found } else { Effects::HIDDEN };
        assert_eq!(one(sql).effects, Effects::CODE | hidden | found, "{sql}");
    }
    let function = one("create function f() returns void language plpgsql as $$ begin listen x; end $$");
    assert_eq!(function.kind, Kind::CreateRoutine);
    assert_eq!((function.effects, function.deferred), (Effects::DDL, Effects::LISTEN | Effects::HIDDEN));
}

#[test]
fn the_code_of_a_do_block_is_returned_if_it_is_plpgsql() {
    for (sql, code) in [
        ("do $$begin end$$", Some("begin end")),
        ("DO LANGUAGE plpgsql 'begin perform ''x''; end'", Some("begin perform 'x'; end")),
        ("do $a$x$a$ language 'PLpgSQL'", Some("x")),
        ("do $a$x$a$ language plpython3u", None),
        ("select $$do$$", None),
    ] {
        assert_eq!(one(sql).code_block().as_deref(), code.map(str::as_bytes), "{sql}");
    }
}

#[test]
fn explain_runs_its_statement_only_with_analyze() {
    for (sql, analyze) in [
        ("explain select 1", false),
        ("explain (select 1)", false),
        ("explain analyze verbose select 1", true),
        ("explain (costs off, analyze) select 1", true),
        ("explain (analyze off) select 1", false),
        ("explain (analyze 'on', verbose) select 1", true),
    ] {
        let Kind::Explain { analyze: found, inner } = one(sql).kind else { panic!("{sql}") };
        assert_eq!(found, analyze, "{sql}");
        assert!(sql[inner].contains("select 1"), "{sql}");
    }
    assert_eq!(
        one("explain analyze create temp table t as select 1").effects,
        Effects::TEMPORARY | Effects::DDL
    );
}

#[test]
fn reads_of_session_state_are_found() {
    for sql in [
        "select * from pg_prepared_statements",
        "select name from \"pg_cursors\"",
        "select pg_listening_channels()",
    ] {
        assert_eq!(one(sql).effects, Effects::INSPECTION, "{sql}");
    }
}

/// Found by the fuzz target `scanner`.
#[test]
fn numbers_and_parameters_end_where_postgresqls_scanner_ends_them() {
    let split = |sql: &str| {
        let tokens = tokens(sql.as_bytes(), Lexing::default()).into_iter();
        tokens.map(|range| sql[range].to_owned()).collect::<Vec<_>>().join(" ")
    };
    for (sql, expected) in [
        ("1..10", "1 . . 10"),
        ("a..5", "a . . 5"),
        ("a...5", "a . . .5"),
        ("1.5..5", "1.5 . . 5"),
        (".5.5", ".5 .5"),
        ("$1_0", "$1 _0"),
        ("0x_1F", "0x_1F"),
        ("0x1_F", "0x1_F"),
        ("1_000", "1_000"),
    ] {
        assert_eq!(split(sql), expected, "{sql}");
    }
}
