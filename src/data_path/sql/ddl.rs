//! CREATE, DROP and ALTER (mainly of temporary objects), SELECT INTO, COPY and DO.

use std::borrow::Cow;

use super::{
    Copy, Effects, Kind, Lexing, Object, QualifiedNames, function_body,
    statement_kind::{CallsRun, Reading},
    token_reader::Reader,
};

const OBJECTS: [(&[u8], Object); 3] =
    [(b"table", Object::Table), (b"view", Object::View), (b"sequence", Object::Sequence)];

fn ddl(outside_transaction: bool) -> Effects {
    if outside_transaction { Effects::DDL | Effects::OUTSIDE_TRANSACTION } else { Effects::DDL }
}

/// Classifies SELECT and other queries.
pub(super) fn query<'a>(into_temp: bool) -> Reading<'a> {
    if into_temp {
        let kind = Kind::CreateTemp { what: Object::Table, name: None, drop_on_commit: false };
        Reading::of(kind, Effects::TEMPORARY)
    } else {
        Reading::of(Kind::Query, Effects::empty())
    }
}

pub(super) fn create<'a>(reader: &mut Reader<'a>, lexing: Lexing) -> Option<Reading<'a>> {
    reader.eat_all(&[b"or", b"replace"]);
    let scoped = reader.eat_any(&[b"local", b"global"]);
    let temporary = reader.eat_any(&[b"temp", b"temporary"]);
    if scoped && !temporary {
        return None;
    }
    let recursive = reader.eat(b"recursive");
    let what = match reader.eat_one_of(&OBJECTS) {
        Some(what) => what,
        None if temporary || recursive => return None,
        None => return Some(create_other(reader, lexing)),
    };
    if reader.eat(b"if") {
        reader.eat_all(&[b"not", b"exists"]);
    }
    let (in_pg_temp, name) = reader.qualified_name()?;
    let mut drop_on_commit = false;
    let mut prepared = None;
    // Functions in defaults, constraints and views run when the object is used; those of AS run at once.
    let mut calls = CallsRun::Later;
    if what == Object::Table {
        let mut tail = *reader;
        drop_on_commit = tail.skip_past(b"commit") && tail.is(b"drop");
        if reader.skip_past(b"as") {
            calls = CallsRun::Now;
            if reader.eat(b"execute") {
                prepared = reader.placed_name();
            }
        }
    }
    let mut effects = Effects::DDL;
    let kind = if temporary || in_pg_temp {
        effects |= Effects::TEMPORARY;
        Kind::CreateTemp { what, name: Some(name), drop_on_commit }
    } else {
        Kind::Ddl
    };
    effects.set(Effects::PREPARED, prepared.is_some());
    Some(Reading { prepared, calls, ..Reading::of(kind, effects) })
}

/// CREATE of objects whose grammar has no TEMP; with the schema `pg_temp` they are temporary too.
fn create_other<'a>(reader: &mut Reader<'a>, lexing: Lexing) -> Reading<'a> {
    if reader.eat_any(&[b"function", b"procedure"]) {
        let (kind, effects) = match reader.qualified_name() {
            Some((true, name)) => (temporary_other(name), Effects::DDL | Effects::TEMPORARY),
            _ => (Kind::CreateRoutine, Effects::DDL),
        };
        let deferred = function_body::effects_of_literals(reader.text(reader.rest()), lexing);
        return Reading { deferred, calls: CallsRun::Later, ..Reading::of(kind, effects) };
    }
    if reader.eat_any(&[b"database", b"tablespace", b"subscription"]) {
        return Reading::of(Kind::Ddl, Effects::DDL | Effects::OUTSIDE_TRANSACTION);
    }
    // A materialized view's functions run at once; those of a rule, trigger or default when it is used.
    let calls = if reader.is(b"materialized") { CallsRun::Now } else { CallsRun::Later };
    let mut index = *reader;
    index.eat(b"unique");
    let effects = ddl(index.eat_all(&[b"index", b"concurrently"]));
    reader.advance();
    let (kind, temporary) = match reader.qualified_name() {
        Some((true, name)) => (temporary_other(name), Effects::TEMPORARY),
        _ => (Kind::Ddl, Effects::empty()),
    };
    Reading { calls, ..Reading::of(kind, effects | temporary) }
}

fn temporary_other(name: std::borrow::Cow<'_, [u8]>) -> Kind<'_> {
    Kind::CreateTemp { what: Object::Other, name: Some(name), drop_on_commit: false }
}

pub(super) fn drop<'a>(reader: &mut Reader<'a>, lexing: Lexing) -> Option<Reading<'a>> {
    let outside = reader.is(b"database") || reader.is(b"tablespace") || reader.is(b"subscription");
    let what = if let Some(what) = reader.eat_one_of(&OBJECTS) {
        what
    } else if reader.eat_any(&[b"function", b"procedure", b"routine", b"type", b"domain", b"aggregate"]) {
        Object::Other
    } else {
        let outside = outside || reader.eat_all(&[b"index", b"concurrently"]);
        return Some(Reading::of(Kind::Ddl, ddl(outside) | Effects::DROP));
    };
    reader.eat_all(&[b"if", b"exists"]);
    let names = QualifiedNames::new(reader.text(reader.rest()), lexing);
    Some(Reading::of(Kind::Drop { what, names }, Effects::DDL | Effects::DROP))
}

pub(super) fn alter<'a>(reader: &mut Reader<'a>) -> Option<Reading<'a>> {
    let outside = reader.is(b"system") || reader.is(b"database") || reader.is(b"subscription");
    Some(Reading::of(Kind::Ddl, ddl(outside)))
}

/// Parses the rest of COPY. FROM and TO are reserved: outside parentheses the first of them is the direction.
pub(super) fn copy<'a>(reader: &mut Reader<'a>) -> Option<Reading<'a>> {
    loop {
        if reader.is_symbol(b'(') {
            reader.parenthesised()?;
        } else if reader.at_end() {
            return None;
        } else if reader.is(b"from") || reader.is(b"to") {
            break;
        } else {
            reader.advance();
        }
    }
    let from = reader.is(b"from");
    reader.advance();
    let client = reader.is(b"stdin") || reader.is(b"stdout");
    let (copy, effects) = match (client, from) {
        (true, true) => (Copy::FromClient, Effects::COPY),
        (true, false) => (Copy::ToClient, Effects::COPY),
        (false, _) => (Copy::OnServer, Effects::empty()),
    };
    Some(Reading::of(Kind::Copy(copy), effects))
}

pub(super) fn code_block<'a>(reader: &mut Reader<'a>, lexing: Lexing) -> Option<Reading<'a>> {
    let inner = function_body::effects_of_literals(reader.text(reader.rest()), lexing);
    Some(Reading::of(Kind::Do, Effects::CODE | inner))
}

/// Returns the code of a DO block in PL/pgSQL; `text` is the whole statement.
pub(super) fn code_of_block(text: &[u8], lexing: Lexing) -> Option<Cow<'_, [u8]>> {
    let mut reader = Reader::new(text, lexing);
    reader.eat(b"do").then_some(())?;
    let mut code = None;
    while !reader.at_end() {
        if reader.eat(b"language") {
            let name = reader.literal().or_else(|| reader.name())?;
            name.eq_ignore_ascii_case(b"plpgsql").then_some(())?;
        } else {
            code = Some(reader.literal()?);
        }
    }
    code
}
