//! Finds a statement's type by its first keyword, and the details of statements about transactions, prepared
//! statements, cursors and notifications. [`super::ddl`] parses DDL and COPY, [`super::set`] SET and RESET.

use std::ops::Range;

use super::{
    Discard, Effects, Kind, Lexing, Name, Statement, TransactionModes, ddl, function_body,
    lexer::{Token, TokenKind},
    set,
    statement_scan::Scan,
    statements,
    token_reader::Reader,
};

/// A statement's type and the effects of its keyword. The effects of function calls are added later.
pub(super) struct Reading<'a> {
    pub kind: Kind<'a>,
    pub effects: Effects,
    pub deferred: Effects,
    pub prepared: Option<Name<'a>>,
    /// When the functions called in the statement run.
    pub calls: CallsRun,
}

/// When the functions called in a statement run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum CallsRun {
    Now,
    Later,
    /// A cursor: at DECLARE and at FETCH.
    NowAndLater,
    Never,
}

impl<'a> Reading<'a> {
    pub fn of(kind: Kind<'a>, effects: Effects) -> Self {
        Self { kind, effects, deferred: Effects::empty(), prepared: None, calls: CallsRun::Now }
    }
}

/// Parses the statement `text` that `scan` found.
#[inline]
pub(super) fn read(text: &[u8], scan: Scan, lexing: Lexing) -> Statement<'_> {
    let first = Token { end: scan.first.end - scan.start, start: 0, ..scan.first };
    let plain = scan.calls.is_empty() && !scan.into_temp && !scan.names_pg_settings && !scan.runs_text;
    if plain && is_query(text, first) {
        return Statement::plain(text, scan.start, lexing);
    }
    read_details(text, first, scan, lexing)
}

fn read_details(text: &[u8], first: Token, scan: Scan, lexing: Lexing) -> Statement<'_> {
    let mut calls = scan.calls;
    if scan.names_pg_settings && updates_settings(text, lexing) {
        calls |= Effects::SETTING;
    }
    if scan.runs_text {
        calls |= function_body::effects_of_literals(text, lexing);
    }
    let mut reader = Reader::new(text, lexing);
    reader.advance();
    let reading = if is_query(text, first) {
        ddl::query(scan.into_temp)
    } else {
        by_keyword(text.get(..first.end).unwrap_or_default(), reader, lexing)
            .unwrap_or_else(|| Reading::of(Kind::Other, Effects::UNKNOWN))
    };
    let (now, later) = match reading.calls {
        CallsRun::Now => (calls, Effects::empty()),
        CallsRun::Later => (calls & Effects::UNKNOWN, calls),
        CallsRun::NowAndLater => (calls, calls),
        CallsRun::Never => (calls & Effects::UNKNOWN, Effects::empty()),
    };
    Statement {
        kind: reading.kind,
        text,
        start: scan.start,
        effects: reading.effects | now,
        deferred: reading.deferred | later,
        prepared: reading.prepared,
        lexing,
    }
}

/// Returns whether a statement that starts with this token is a [`Kind::Query`].
#[inline]
fn is_query(text: &[u8], first: Token) -> bool {
    const VERBS: [&[u8]; 8] =
        [b"select", b"insert", b"update", b"delete", b"with", b"values", b"table", b"merge"];
    match first.kind {
        TokenKind::Symbol(b'(') => true,
        TokenKind::Word => {
            let word = text.get(..first.end).unwrap_or_default();
            VERBS.iter().any(|verb| word.eq_ignore_ascii_case(verb))
        }
        _ => false,
    }
}

/// `reader` is after the keyword. Returns `None` if the statement does not match its keyword.
fn by_keyword<'a>(keyword: &'a [u8], mut reader: Reader<'a>, lexing: Lexing) -> Option<Reading<'a>> {
    let reader = &mut reader;
    let mut lower = [0; 12];
    let lower = lower.get_mut(..keyword.len())?;
    lower.copy_from_slice(keyword);
    lower.make_ascii_lowercase();
    let plain = |kind, effects| Some(Reading::of(kind, effects));
    match &*lower {
        b"begin" | b"start" | b"commit" | b"end" | b"rollback" | b"abort" | b"savepoint" | b"release" => {
            transaction(lower, reader).map(|kind| Reading::of(kind, Effects::TRANSACTION))
        }
        b"set" => set::set(reader),
        b"reset" => set::reset(reader),
        b"show" => plain(Kind::Show(set::show(reader)), Effects::empty()),
        b"discard" => discard(reader),
        b"prepare" => prepare(reader, lexing),
        b"execute" => execute(reader),
        b"deallocate" => deallocate(reader),
        b"listen" => plain(Kind::Listen(reader.name()?), Effects::LISTEN),
        b"unlisten" => {
            let channel = if reader.eat_symbol(b'*') { None } else { Some(reader.name()?) };
            plain(Kind::Unlisten(channel), Effects::LISTEN)
        }
        b"notify" => plain(Kind::Notify(reader.name()?), Effects::NOTIFY),
        b"declare" => declare(reader),
        b"fetch" | b"move" => fetch(reader),
        b"close" => {
            let name = if reader.is(b"all") { None } else { Some(reader.name()?) };
            plain(Kind::CloseCursor(name), Effects::CURSOR)
        }
        b"explain" => explain(reader, lexing),
        b"create" => ddl::create(reader, lexing),
        b"drop" => ddl::drop(reader, lexing),
        b"copy" => ddl::copy(reader),
        b"do" => ddl::code_block(reader, lexing),
        b"call" => plain(Kind::Call, Effects::CODE),
        b"load" => plain(Kind::Load, Effects::LOAD),
        b"lock" => plain(Kind::LockTable, Effects::empty()),
        b"analyze" | b"analyse" | b"checkpoint" => plain(Kind::Maintenance, Effects::empty()),
        b"vacuum" | b"cluster" | b"reindex" => plain(Kind::Maintenance, Effects::OUTSIDE_TRANSACTION),
        b"alter" => ddl::alter(reader),
        b"comment" | b"grant" | b"import" | b"reassign" | b"refresh" | b"revoke" | b"security"
        | b"truncate" => plain(Kind::Ddl, Effects::DDL),
        _ => None,
    }
}

fn transaction<'a>(keyword: &[u8], reader: &mut Reader<'a>) -> Option<Kind<'a>> {
    match keyword {
        b"savepoint" => return reader.name().map(Kind::Savepoint),
        b"release" => return savepoint(reader).map(Kind::Release),
        b"start" if !reader.is(b"transaction") => return None,
        b"commit" | b"rollback" if reader.is(b"prepared") => return Some(Kind::FinishPrepared),
        _ => {}
    }
    reader.eat_any(&[b"work", b"transaction"]);
    if keyword == b"begin" || keyword == b"start" {
        return modes(reader).map(Kind::Begin);
    }
    if keyword == b"rollback" && reader.eat(b"to") {
        return savepoint(reader).map(Kind::RollbackTo);
    }
    let chain = reader.eat_all(&[b"and", b"chain"]);
    Some(match keyword {
        b"commit" | b"end" => Kind::Commit { chain },
        _ => Kind::Rollback { chain },
    })
}

/// Parses `[SAVEPOINT] name`, where the name may be `savepoint`.
fn savepoint<'a>(reader: &mut Reader<'a>) -> Option<std::borrow::Cow<'a, [u8]>> {
    let first = reader.name()?;
    if *first == *b"savepoint" && !reader.at_end() { reader.name() } else { Some(first) }
}

/// Parses `ISOLATION LEVEL …, READ ONLY, NOT DEFERRABLE` with optional commas, up to the end.
pub(super) fn modes(reader: &mut Reader<'_>) -> Option<TransactionModes> {
    let mut modes = TransactionModes::default();
    while !reader.at_end() {
        if reader.eat_all(&[b"isolation", b"level"]) {
            const LEVELS: [(&[&[u8]], &str); 4] = [
                (&[b"serializable"], "serializable"),
                (&[b"repeatable", b"read"], "repeatable read"),
                (&[b"read", b"committed"], "read committed"),
                (&[b"read", b"uncommitted"], "read uncommitted"),
            ];
            modes.isolation = Some(LEVELS.iter().find(|(words, _)| reader.eat_all(words))?.1);
        } else if reader.eat_all(&[b"read", b"only"]) {
            modes.read_only = Some(true);
        } else if reader.eat_all(&[b"read", b"write"]) {
            modes.read_only = Some(false);
        } else if reader.eat(b"deferrable") {
            modes.deferrable = Some(true);
        } else if reader.eat_all(&[b"not", b"deferrable"]) {
            modes.deferrable = Some(false);
        } else if !reader.eat_symbol(b',') {
            return None;
        }
    }
    Some(modes)
}

fn discard<'a>(reader: &mut Reader<'a>) -> Option<Reading<'a>> {
    let what = reader.eat_one_of(&[
        (b"all", Discard::All),
        (b"plans", Discard::Plans),
        (b"sequences", Discard::Sequences),
        (b"temp", Discard::Temp),
        (b"temporary", Discard::Temp),
    ]);
    what.map(|what| Reading::of(Kind::Discard(what), Effects::DISCARD))
}

fn prepare<'a>(reader: &mut Reader<'a>, lexing: Lexing) -> Option<Reading<'a>> {
    // `PREPARE transaction AS …` prepares a statement of that name.
    let mut ahead = *reader;
    if ahead.eat(b"transaction") && !ahead.is(b"as") && !ahead.is_symbol(b'(') {
        return Some(Reading::of(Kind::PrepareTransaction, Effects::TRANSACTION));
    }
    let name = reader.placed_name()?;
    let types = if reader.is_symbol(b'(') { reader.parenthesised()? } else { 0..0 };
    if !reader.eat(b"as") {
        return None;
    }
    let body = reader.rest();
    let inner = inner_statement(reader, lexing)?;
    let deferred = inner.effects | inner.deferred;
    Some(Reading {
        deferred,
        prepared: Some(name),
        calls: CallsRun::Later,
        ..Reading::of(Kind::Prepare { types, body }, Effects::PREPARED)
    })
}

fn execute<'a>(reader: &mut Reader<'a>) -> Option<Reading<'a>> {
    let name = reader.placed_name()?;
    let arguments = name.range.end..reader.rest().end;
    Some(Reading { prepared: Some(name), ..Reading::of(Kind::Execute { arguments }, Effects::PREPARED) })
}

fn deallocate<'a>(reader: &mut Reader<'a>) -> Option<Reading<'a>> {
    let mut ahead = *reader;
    if ahead.eat(b"prepare") && !ahead.at_end() {
        *reader = ahead;
    }
    if reader.is(b"all") {
        return Some(Reading::of(Kind::DeallocateAll, Effects::PREPARED));
    }
    let name = reader.placed_name()?;
    Some(Reading { prepared: Some(name), ..Reading::of(Kind::Deallocate, Effects::PREPARED) })
}

fn declare<'a>(reader: &mut Reader<'a>) -> Option<Reading<'a>> {
    let name = reader.name()?;
    while !reader.eat(b"cursor") {
        if !reader.eat_any(&[b"binary", b"insensitive", b"asensitive", b"no", b"scroll"]) {
            return None;
        }
    }
    let hold = reader.eat_all(&[b"with", b"hold"]);
    let effects = if hold { Effects::CURSOR | Effects::CURSOR_HOLD } else { Effects::CURSOR };
    Some(Reading { calls: CallsRun::NowAndLater, ..Reading::of(Kind::DeclareCursor { name, hold }, effects) })
}

/// In all forms the cursor's name comes last.
fn fetch<'a>(reader: &mut Reader<'a>) -> Option<Reading<'a>> {
    loop {
        let mut next = *reader;
        next.advance();
        if next.at_end() {
            return Some(Reading::of(Kind::Fetch(reader.name()?), Effects::CURSOR));
        }
        *reader = next;
    }
}

/// Parses `EXPLAIN [ANALYZE] [VERBOSE] statement` or `EXPLAIN (option [value], …) statement`.
fn explain<'a>(reader: &mut Reader<'a>, lexing: Lexing) -> Option<Reading<'a>> {
    let analyze = if let Some(options) = explain_options(reader) {
        is_analyze_set(Reader::new(reader.text(options), lexing))
    } else {
        let analyze = reader.eat_any(&[b"analyze", b"analyse"]);
        reader.eat(b"verbose");
        analyze
    };
    let inner = reader.rest();
    let statement = inner_statement(reader, lexing)?;
    let prepared = statement
        .prepared
        .map(|name| Name { range: name.range.start + inner.start..name.range.end + inner.start, ..name });
    let shown = if prepared.is_some() { Effects::PREPARED } else { Effects::empty() };
    Some(Reading {
        prepared,
        calls: if analyze { CallsRun::Now } else { CallsRun::Never },
        ..Reading::of(
            Kind::Explain { analyze, inner },
            if analyze { statement.effects | shown } else { shown },
        )
    })
}

/// A `(` starts options, unless a query follows: `EXPLAIN (SELECT 1)`.
fn explain_options(reader: &mut Reader<'_>) -> Option<Range<usize>> {
    let mut ahead = *reader;
    ahead.eat_symbol(b'(');
    if ahead.is_symbol(b'(')
        || [&b"select"[..], b"with", b"values", b"table"].iter().any(|word| ahead.is(word))
    {
        return None;
    }
    reader.parenthesised()
}

/// The last ANALYZE counts; without a value it means true.
fn is_analyze_set(mut options: Reader<'_>) -> bool {
    let mut analyze = false;
    while !options.at_end() {
        if options.eat_any(&[b"analyze", b"analyse"]) {
            let no = matches!(options.bytes(), b"0" | b"'0'")
                || [&b"false"[..], b"off", b"'false'", b"'off'"]
                    .iter()
                    .any(|word| options.bytes().eq_ignore_ascii_case(word));
            analyze = !no;
        }
        options.advance();
    }
    analyze
}

/// Returns the statement that EXPLAIN or PREPARE contains. That cannot be EXPLAIN or PREPARE itself, so
/// clients cannot cause deep recursion.
fn inner_statement<'a>(reader: &Reader<'a>, lexing: Lexing) -> Option<Statement<'a>> {
    if reader.is(b"explain") || reader.is(b"prepare") {
        return None;
    }
    statements(reader.text(reader.rest()), lexing).next()
}

/// Returns whether the text contains `UPDATE [ONLY] [schema.]pg_settings`.
fn updates_settings(text: &[u8], lexing: Lexing) -> bool {
    let mut reader = Reader::new(text, lexing);
    while !reader.at_end() {
        if reader.eat(b"update") {
            reader.eat(b"only");
            reader.eat_symbol(b'(');
            let mut table = reader;
            if table.qualified_name().is_some_and(|(_, name)| *name == *b"pg_settings") {
                return true;
            }
        } else {
            reader.advance();
        }
    }
    false
}
