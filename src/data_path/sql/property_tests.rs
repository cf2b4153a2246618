//! Properties that hold for any text.

use proptest::prelude::*;

use super::*;

/// A quadratic parser would need minutes for each of these.
#[test]
fn hostile_texts_take_linear_time() {
    const BYTES: usize = 60_000;
    const PREFIXES: [&str; 6] = [
        "",
        "select ",
        "set search_path = ",
        "do $x$ ",
        "create function f() begin atomic ",
        "insert into t ",
    ];
    #[rustfmt::skip]
    const UNITS: [&str; 49] = [
        "(", ")", "'", "\"", "$", "$a", "$a$", "$$", "/*", "*/", "--", ";", "E'\\", "U&\"", "b'", "a'b'", "0x", "1.",
        "_", "explain ", "explain (", "explain analyze ", "prepare a as ", "set_config(", "select set_config('a',",
        "update pg_settings ", "update pg_settings.", "into ", "into temp ", "pg_temp.", "\"pg_temp\".",
        "begin atomic ", "create function a() begin atomic ", "do '", "do $a$ execute '", "do \" \" ", "''''",
        "set a = 'a',", "reset a.", "set a.", "drop table a,", "declare a ", "fetch ", "copy (", "copy a ", "'a'\n",
        "crosstab('' ", "a (", "\u{ff}",
    ];
    for unit in UNITS {
        for prefix in PREFIXES {
            let sql = format!("{prefix}{}", unit.repeat(BYTES / unit.len()));
            let began = std::time::Instant::now();
            for statement in statements(sql.as_bytes(), Lexing::default()) {
                statement.set_configs().count();
                if let Kind::Drop { names, .. } = &statement.kind {
                    names.clone().count();
                }
            }
            let took = began.elapsed();
            assert!(took < std::time::Duration::from_secs(5), "{prefix:?} {unit:?} took {took:?}");
        }
    }
}

/// Random sequences of tokens that matter to the parser.
fn token_sequence() -> impl Strategy<Value = String> {
    #[rustfmt::skip]
    let piece = prop::sample::select(vec![
        "select ", "SELECT ", "insert into ", "update ", "values ", "with ", "set ", "do ", "create ", "function ",
        "begin ", "atomic ", "end ", "into ", "temp ", "t", "pg_temp", "pg_settings ", "set_config", "nextval",
        "NextVal", "pg_advisory_lock", "query_to_xml", "\"set_config\"", "\"pg_temp\".", "\"a\"\"b\"", "U&\"a\"", "U&",
        "uescape ", "E'", "e'\\''", "'a'", "'", "''", "\"", "$$", "$a$", "$1", "$", "1", ".5", "1e5", "(", ")", "( ",
        " (", ";", " ", "\n", "--", "-- x\n", "/*", "*/", "/**/", "-", "/", "*", ",", ".", "\\", "\0", "é", "_",
        "explain ", "analyze ", "prepare a as ", "drop table ", "copy ", "from ", "as ", "b'1'", "x", "n", "\x0b",
    ]);
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

/// Parses without the fast check.
fn read_in_full(sql: &[u8], lexing: Lexing) -> Vec<Statement<'_>> {
    let mut lexer = Lexer::new(sql, lexing);
    std::iter::from_fn(|| {
        let scan = statement_scan::next(&mut lexer)?;
        Some(statement_kind::read(&sql[scan.start..scan.end], scan, lexing))
    })
    .collect()
}

/// PostgreSQL rejects `select (;`: the parsers may differ in whether the semicolon belongs to the statement.
fn without_end(statement: Statement<'_>) -> Statement<'_> {
    let surplus = |byte: &&u8| byte.is_ascii_whitespace() || matches!(byte, b';' | b'\x0b');
    let length = statement.text.len() - statement.text.iter().rev().take_while(surplus).count();
    Statement { text: &statement.text[..length], ..statement }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn the_fast_check_accepts_plain_queries_only(sql in token_sequence(), standard: bool, query: bool) {
        let sql = if query { format!("select {sql}") } else { sql };
        let lexing = Lexing { standard_conforming_strings: standard, ..Lexing::default() };
        if let Some(place) = plain_query::query(sql.as_bytes(), lexing) {
            let in_full = read_in_full(sql.as_bytes(), lexing);
            prop_assert_eq!(in_full.len(), 1);
            let plain = Statement::plain(&sql.as_bytes()[place.clone()], place.start, lexing);
            prop_assert_eq!(without_end(in_full[0].clone()), plain);
        }
    }

    #[test]
    fn a_statement_is_parsed_alike_alone_and_among_others(sql in token_sequence(), standard: bool) {
        let lexing = Lexing { standard_conforming_strings: standard, ..Lexing::default() };
        let mut end = 0;
        for statement in statements(sql.as_bytes(), lexing) {
            prop_assert!(statement.start >= end);
            end = statement.start + statement.text.len();
            let alone: Vec<_> = statements(statement.text, lexing).map(without_end).collect();
            prop_assert_eq!(alone, vec![without_end(Statement { start: 0, ..statement })]);
        }
    }

    #[test]
    fn ranges_lie_within_the_statement(sql in token_sequence()) {
        for statement in statements(sql.as_bytes(), Lexing::default()) {
            let text = statement.text;
            if let Some(name) = statement.prepared {
                prop_assert!(text.get(name.range).is_some());
            }
            if let Kind::Prepare { types, body } = statement.kind {
                prop_assert!(text.get(types).is_some() && text.get(body).is_some());
            }
        }
    }

    #[test]
    fn no_input_panics(sql: Vec<u8>, standard: bool, characters in 0..3) {
        let characters = [Characters::AsciiSafe, Characters::DoubleByte, Characters::ShiftJis][characters as usize];
        let lexing = Lexing { standard_conforming_strings: standard, characters };
        for statement in statements(&sql, lexing) {
            statement.set_configs().count();
            let _ = statement.identity_change();
        }
    }
}
