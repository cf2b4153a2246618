//! What the reader promises, by example and by property.

use std::borrow::Cow;

use proptest::prelude::*;

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
fn a_plain_quote_minds_backslashes_only_without_standard_conforming_strings() {
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
fn ordinary_statements_leave_no_trace() {
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
fn functions_that_touch_the_session_are_noticed() {
    for (sql, effects) in [
        ("select pg_catalog . set_config ('a', 'b', false)", Effects::SET_CONFIG),
        ("select SET_CONFIG/**/('a', 'b', false)", Effects::SET_CONFIG),
        ("select \"set_config\"('a', 'b', false)", Effects::SET_CONFIG),
        ("select U&\"set\\005fconfig\"('a', 'b', false)", Effects::SET_CONFIG),
        ("select U&\"set!005fconfig\" uescape '!' ('a', 'b', false)", Effects::UNKNOWN),
        ("update pg_settings set setting = 'x'", Effects::SET_CONFIG.union(Effects::HIDDEN)),
        (
            "with x as (update only pg_catalog.pg_settings set setting = 1) select 1",
            Effects::SET_CONFIG.union(Effects::HIDDEN),
        ),
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
fn set_configs_tell_their_arguments() {
    let statement = one(
        "select set_config('Search_Path', '', false), pg_catalog.set_config('a.b', $2::text, 'yes') as x",
    );
    let calls: Vec<_> = statement.set_configs().collect();
    assert!(statement.set_configs().is_all());
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
    assert!(!statement.set_configs().is_all());
    assert_eq!(statement.set_configs().count(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes_are_read_without_panic(sql: Vec<u8>, standard: bool, characters in 0..3) {
        let characters = [Characters::AsciiSafe, Characters::DoubleByte, Characters::ShiftJis][characters as usize];
        let lexing = Lexing { standard_conforming_strings: standard, characters };
        for statement in statements(&sql, lexing) {
            statement.set_configs().count();
        }
    }
}
