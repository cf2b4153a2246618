//! Statements that define functions, views and other objects: whether their text shows all that the objects
//! may do, and whether they run anything themselves. Conservative: the answer may be `false` for no reason.

use super::{
    Effects, Kind, Lexing, Statement, function_body, identifiers,
    lexer::{Lexer, TokenKind},
    token_reader::Reader,
    words,
};

/// Effects that a body may have although calls of its function leave nothing in the session.
const HARMLESS: Effects = Effects::TRANSACTION
    .union(Effects::NOTIFY)
    .union(Effects::COPY)
    .union(Effects::SEQUENCE_WRITE)
    .union(Effects::CODE)
    .union(Effects::CANCEL)
    .union(Effects::TERMINATE);

/// Returns whether a use of what the statement defines leaves nothing in the session, except by objects that
/// the statement names.
pub(super) fn is_harmless(statement: &Statement<'_>) -> bool {
    let is_readable = match statement.kind {
        Kind::CreateRoutine => has_readable_language(statement) && has_harmless_bodies(statement),
        Kind::Ddl => !words(statement.text).any(brings_functions),
        _ => false,
    };
    is_readable && words(statement.text).all(|word| HARMLESS.contains(Effects::of_call(word)))
}

/// CREATE EXTENSION, EVENT TRIGGER and LANGUAGE.
fn brings_functions(word: &[u8]) -> bool {
    [&b"extension"[..], b"event", b"language"].iter().any(|brings| word.eq_ignore_ascii_case(brings))
}

fn has_readable_language(statement: &Statement<'_>) -> bool {
    let (mut reader, mut found) = (Reader::new(statement.text, statement.lexing), false);
    while !reader.at_end() {
        if reader.eat(b"language") {
            let language = reader.name().or_else(|| reader.literal());
            found = language.is_some_and(|name| matches!(&*name, b"sql" | b"plpgsql"));
            if !found {
                return false;
            }
        } else {
            reader.advance();
        }
    }
    found
}

/// One of the strings is the body. `BEGIN ATOMIC … END` is not read.
fn has_harmless_bodies(statement: &Statement<'_>) -> bool {
    let mut lexer = Lexer::new(statement.text, statement.lexing);
    loop {
        let token = lexer.next();
        let is_harmless = match token.kind {
            TokenKind::End => return true,
            TokenKind::Word => !lexer.bytes(token).eq_ignore_ascii_case(b"atomic"),
            TokenKind::UnicodeName => false,
            kind if kind.is_string() => identifiers::of_literal(&lexer, token)
                .is_some_and(|body| HARMLESS.contains(function_body::effects_of_body(&body))),
            _ => true,
        };
        if !is_harmless {
            return false;
        }
    }
}

/// Returns whether the statement defines an object and runs no function of the database meanwhile, unless an
/// event trigger does.
pub(super) fn only_defines(statement: &Statement<'_>) -> bool {
    is_definition(statement) && !has_container(statement.text, statement.lexing, 0)
}

/// Returns whether a string may be an array, a row or a range. PostgreSQL reads such a constant at once, and
/// checks the domains of its elements. In the body of a function in SQL too.
fn has_container(text: &[u8], lexing: Lexing, depth: u32) -> bool {
    let mut lexer = Lexer::new(text, lexing);
    loop {
        let token = lexer.next();
        match token.kind {
            TokenKind::End => return false,
            kind if kind.is_string() => {
                let Some(value) = identifiers::of_literal(&lexer, token) else { return true };
                let first = value.iter().find(|byte| !matches!(byte, b'\t'..=b'\r' | b' '));
                let is_container = matches!(first, Some(b'{' | b'(' | b'['));
                if is_container || depth >= 2 || has_container(&value, Lexing::default(), depth + 1) {
                    return true;
                }
            }
            _ => {}
        }
    }
}

fn is_definition(statement: &Statement<'_>) -> bool {
    let reader = &mut Reader::new(statement.text, statement.lexing);
    match statement.kind {
        Kind::Begin(_) => true,
        // To check a new function, other languages may run code of it.
        Kind::CreateRoutine => has_readable_language(statement),
        Kind::Ddl if reader.eat(b"create") => {
            reader.eat_all(&[b"or", b"replace"]);
            if reader.eat_any(&[b"table", b"unlogged"]) {
                return is_plain_table(*reader);
            }
            if reader.eat(b"schema") {
                return !reader.skip_past(b"create");
            }
            reader.eat(b"constraint");
            reader.eat_any(&[
                b"view",
                b"trigger",
                b"rule",
                b"policy",
                b"domain",
                b"type",
                b"sequence",
                b"operator",
                b"cast",
            ])
        }
        Kind::Ddl if reader.eat(b"alter") => sets_owner_or_default(*reader),
        Kind::Ddl => reader.eat_any(&[b"comment", b"grant", b"revoke"]),
        _ => false,
    }
}

/// The query of AS and the bounds of a partition are computed at once, and so are constants in generated
/// columns and in the indexes of LIKE and EXCLUDE.
fn is_plain_table(mut reader: Reader<'_>) -> bool {
    let mut depth = 0usize;
    while !reader.at_end() {
        if reader.is_symbol(b'(') {
            depth += 1;
        } else if reader.is_symbol(b')') {
            depth = depth.saturating_sub(1);
        }
        let computes = depth == 0 && (reader.is(b"partition") || reader.is(b"of"))
            || depth <= 1 && (reader.is(b"like") || reader.is(b"exclude"));
        let is_as = reader.is(b"as");
        reader.advance();
        if computes || is_as && (depth == 0 || reader.is_symbol(b'(')) {
            return false;
        }
    }
    true
}

/// Matches `ALTER … OWNER TO …` and `ALTER TABLE … ALTER … SET DEFAULT …`, which are frequent in dumps.
fn sets_owner_or_default(mut reader: Reader<'_>) -> bool {
    if { reader }.skip_past_symbol(b',') {
        return false;
    }
    let mut table = reader;
    if table.eat(b"table") {
        table.eat_all(&[b"if", b"exists"]);
        table.eat(b"only");
        let is_named = table.qualified_name().is_some();
        if table.eat(b"alter") {
            table.eat(b"column");
            return is_named && table.name().is_some() && table.eat_all(&[b"set", b"default"]);
        }
    }
    reader.skip_past(b"owner") && reader.eat(b"to") && reader.name().is_some() && reader.at_end()
}

#[cfg(test)]
mod tests {
    use super::{super::statements, Lexing, Statement};

    fn one(sql: &str) -> Statement<'_> {
        statements(sql.as_bytes(), Lexing::default()).next().unwrap()
    }

    #[test]
    fn harmless_definitions_are_recognised() {
        for sql in [
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "create or replace function s.f(x text default 'a') returns trigger as $$begin new.at = now(); return new; end$$ language plpgsql",
            "CREATE FUNCTION f() RETURNS int LANGUAGE 'plpgsql' AS 'BEGIN RAISE NOTICE ''set a; reset all''; RETURN nextval(''s''); END'",
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql RETURN g(1)",
            "CREATE DOMAIN d AS int CHECK (value > 0)",
            "CREATE TYPE t AS ENUM ('a')",
            "CREATE AGGREGATE a (int) (SFUNC = f, STYPE = int)",
            "ALTER FUNCTION f() RENAME TO g",
        ] {
            assert!(one(sql).defines_harmless(), "{sql}");
        }
    }

    #[test]
    fn definitions_that_may_have_effects_are_not_harmless() {
        for sql in [
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT pg_advisory_lock(1)'",
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql RETURN pg_advisory_lock(1)",
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql BEGIN ATOMIC SELECT 1; END",
            "CREATE FUNCTION f(x bigint DEFAULT pg_advisory_lock(1)) RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "CREATE FUNCTION f(t text) RETURNS void LANGUAGE plpgsql AS 'BEGIN EXECUTE t; END'",
            "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$BEGIN EXECUTE format('INSERT INTO %I VALUES (1)', t); END$$",
            "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS 'BEGIN SET LOCAL search_path = a; END'",
            "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS 'BEGIN CREATE VIEW v AS SELECT 1; END'",
            "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS E'BEGIN PERFORM \\x70g_advisory_lock(1); END'",
            "CREATE FUNCTION f() RETURNS void LANGUAGE sql AS 'SELECT pg_advisory_'\n'lock(1)'",
            "CREATE FUNCTION f() RETURNS void LANGUAGE sql AS U&'SELECT 1'",
            "CREATE FUNCTION f(q text) RETURNS xml LANGUAGE sql AS $$SELECT query_to_xml(q, true, true, '')$$",
            "CREATE FUNCTION f() RETURNS void LANGUAGE plpython3u AS ''",
            "CREATE FUNCTION f(language sql) RETURNS void LANGUAGE c AS 'lib'",
            "CREATE FUNCTION f() RETURNS void AS 'SELECT 1'",
            "CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "CREATE DOMAIN d AS bool CHECK (pg_try_advisory_lock(1))",
            "CREATE EXTENSION dblink",
            "CREATE EVENT TRIGGER e ON ddl_command_end EXECUTE FUNCTION f()",
            "CREATE OR REPLACE TRUSTED LANGUAGE plperl",
            "DO 'BEGIN CREATE DOMAIN d AS int; END'",
        ] {
            assert!(!one(sql).defines_harmless(), "{sql}");
        }
    }

    #[test]
    fn statements_that_only_define_run_nothing() {
        for sql in [
            "CREATE TABLE t (id serial PRIMARY KEY, x text DEFAULT f(), y int CHECK (z LIKE 'a%'))",
            "CREATE UNLOGGED TABLE t (id int GENERATED ALWAYS AS IDENTITY, x int DEFAULT CAST('1' AS int))",
            "CREATE OR REPLACE VIEW v AS SELECT f()",
            "CREATE FUNCTION f(t text) RETURNS void LANGUAGE plpgsql AS 'BEGIN EXECUTE t; END'",
            "CREATE TRIGGER g BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION g()",
            "CREATE CONSTRAINT TRIGGER g AFTER INSERT ON t EXECUTE FUNCTION g()",
            "CREATE DOMAIN d AS int DEFAULT f()",
            "CREATE SCHEMA s AUTHORIZATION x",
            "ALTER TABLE ONLY s.t ALTER COLUMN id SET DEFAULT nextval('s')",
            "ALTER FUNCTION s.f(int, text) OWNER TO x",
            "ALTER TABLE t OWNER TO x",
            "COMMENT ON TABLE t IS 'create'",
            "GRANT ALL ON t TO x",
            "BEGIN",
        ] {
            assert!(one(sql).only_defines(), "{sql}");
        }
    }

    #[test]
    fn statements_that_may_run_functions_do_not_only_define() {
        for sql in [
            "CREATE TABLE t AS SELECT f()",
            "CREATE TABLE t (x) AS EXECUTE q",
            "CREATE TABLE t PARTITION OF p FOR VALUES IN (f(1))",
            "CREATE TABLE t (x int) PARTITION BY RANGE (f(1))",
            "CREATE TABLE t (x int GENERATED ALWAYS AS (f(1)) STORED)",
            "CREATE TABLE t (LIKE u INCLUDING ALL)",
            "CREATE TABLE t (x int, EXCLUDE USING gist (f(1) WITH =))",
            "CREATE TEMP TABLE t (x int)",
            "CREATE MATERIALIZED VIEW v AS SELECT f()",
            "CREATE FUNCTION f(language sql) RETURNS void LANGUAGE plperlu AS ''",
            "CREATE SCHEMA s CREATE TABLE t (x int GENERATED ALWAYS AS (f(1)) STORED)",
            "CREATE INDEX ON t (f(x))",
            "CREATE VIEW v AS SELECT '{5}'::a_domain[]",
            "CREATE TABLE t (x a_row DEFAULT ' (5)')",
            "CREATE FUNCTION f() RETURNS a_domain[] LANGUAGE sql AS $$SELECT '{5}'::a_domain[]$$",
            "CREATE EXTENSION dblink",
            "CREATE EVENT TRIGGER e ON ddl_command_end EXECUTE FUNCTION f()",
            "ALTER TABLE t ALTER x SET DEFAULT 1, ADD y int DEFAULT f()",
            "ALTER TABLE t ADD y int DEFAULT f()",
            "ALTER DOMAIN d ADD CHECK (f(value))",
            "DROP TABLE t",
            "COMMIT",
            "DO ''",
            "SELECT f()",
        ] {
            assert!(!one(sql).only_defines(), "{sql}");
        }
    }
}
