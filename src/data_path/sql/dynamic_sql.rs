//! EXECUTE in a function, if its text consists of literals and of `format`, `quote_ident` and `quote_literal`
//! calls only.
//! Those calls add a single name or value each, so the text can be analysed.

use super::{
    Effects, Lexing, function_body::effects_of_code, identifiers, plain_query::is_word,
    statement_scan::runs_text, token_reader::Reader,
};

/// Placeholder for an unknown name.
const NAME: &[u8] = b"pglobby_built";
const VALUE: &[u8] = b"'x'";

/// Returns the effects of all EXECUTEs in a body; `None` if the text of one is unknown.
pub(super) fn effects(code: &[u8], lexing: Lexing) -> Option<Effects> {
    let mut found = Effects::empty();
    let mut reader = Reader::new(code, lexing);
    while !reader.at_end() {
        if reader.eat(b"execute") {
            let is_literal = { reader }.literal().is_some();
            let (text, pieces) = text(&mut reader, lexing)?;
            let does = effects_of_code(&text, lexing, 1, true);
            // The parameter's name must stand in the body in one piece, because the state check searches it
            // there.
            let sets = does.contains(Effects::SETTING) && !(is_literal && pieces == 1);
            if sets || does.contains(Effects::SET_CONFIG) || calls_unknown(&text, lexing) {
                return None;
            }
            found |= does;
            if has_built_name(&text) {
                found |= Effects::ANY_RELATION;
            }
            continue;
        }
        let mut ahead = reader;
        if ahead.name().is_some_and(|name| runs_text(&name)) && ahead.is_symbol(b'(') {
            return None;
        }
        reader.advance();
    }
    (!found.intersects(Effects::DYNAMIC | Effects::UNKNOWN)).then_some(found)
}

/// Parses the expression after EXECUTE. Returns the text and the number of its pieces.
fn text(reader: &mut Reader<'_>, lexing: Lexing) -> Option<(Vec<u8>, usize)> {
    let (mut text, mut pieces) = (Vec::new(), 0);
    loop {
        let end = text.len();
        piece(reader, lexing, &mut text)?;
        pieces += 1;
        // A name split between pieces cannot be found in the body.
        let is_word_at = |at: usize| text.get(at).is_some_and(|byte| is_word(*byte));
        if end.checked_sub(1).is_some_and(is_word_at) && is_word_at(end) {
            return None;
        }
        if !reader.eat_symbol(b'|') {
            break;
        }
        reader.eat_symbol(b'|').then_some(())?;
    }
    let ends = [&b"into"[..], b"using", b"loop"].iter().any(|word| reader.is(word));
    (ends || reader.is_symbol(b';') || reader.at_end()).then_some((text, pieces))
}

fn piece(reader: &mut Reader<'_>, lexing: Lexing, text: &mut Vec<u8>) -> Option<()> {
    if let Some(literal) = reader.literal() {
        text.extend_from_slice(&literal);
        return Some(());
    }
    let function = identifiers::folded(&reader.name()?).into_owned();
    let arguments = reader.parenthesised()?;
    match &*function {
        b"quote_ident" => text.extend_from_slice(NAME),
        b"quote_literal" | b"quote_nullable" => text.extend_from_slice(VALUE),
        b"format" => formatted(Reader::new(reader.text(arguments), lexing), text)?,
        _ => return None,
    }
    Some(())
}

/// Parses `format('…', …)` with names (`%I`, `%1$I`) and values (`%L`) only.
fn formatted(mut arguments: Reader<'_>, text: &mut Vec<u8>) -> Option<()> {
    let pattern = arguments.literal()?;
    if !arguments.at_end() && !arguments.is_symbol(b',') {
        return None;
    }
    let mut rest = &*pattern;
    while let Some(at) = rest.iter().position(|byte| *byte == b'%') {
        let (before, behind) = rest.split_at_checked(at)?;
        text.extend_from_slice(before);
        let behind = behind.get(1..)?;
        let digits = behind.iter().position(|byte| !byte.is_ascii_digit())?;
        let behind = match behind.get(digits) {
            Some(b'$') if digits > 0 => behind.get(digits + 1..)?,
            _ if digits > 0 => return None,
            _ => behind,
        };
        match behind.first()? {
            b'I' => text.extend_from_slice(NAME),
            b'L' => text.extend_from_slice(VALUE),
            b'%' => text.push(b'%'),
            _ => return None,
        }
        rest = behind.get(1..)?;
    }
    text.extend_from_slice(rest);
    Some(())
}

fn has_built_name(text: &[u8]) -> bool {
    text.windows(NAME.len()).any(|window| window == NAME)
}

/// Returns whether the text may call a function with an unknown name: `(` and no column list follow.
fn calls_unknown(text: &[u8], lexing: Lexing) -> bool {
    const COLUMNS_FOLLOW: [&[u8]; 6] = [b"into", b"table", b"exists", b"with", b"as", b"copy"];
    let mut reader = Reader::new(text, lexing);
    let creates = reader.is(b"create");
    let mut before = Vec::new();
    while !reader.at_end() {
        let Some(mut last) = reader.name() else {
            before.clear();
            reader.advance();
            continue;
        };
        while reader.eat_symbol(b'.') {
            match reader.name() {
                Some(part) => last = part,
                None => break,
            }
        }
        let columns = COLUMNS_FOLLOW.contains(&&*before) || creates && before == b"on";
        if has_built_name(&last) && reader.is_symbol(b'(') && !columns {
            return true;
        }
        before = identifiers::folded(&last).into_owned();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data_path::sql::effects_of_body;

    #[test]
    fn dynamic_sql_of_readable_pieces_is_analysed() {
        let any = Effects::ANY_RELATION;
        for (body, does) in [
            ("begin execute 'select $1 + 1' into r using x; end", Effects::empty()),
            ("begin execute format('insert into %I (a, b) values ($1, %L)', t, v) using x; end", any),
            ("begin execute format('insert into %1$I.%2$I select 100 %% 3', s, t); end", any),
            (
                "begin return query execute 'select * from ' || quote_ident(t) || ' where a = $1' using x; end",
                any,
            ),
            (
                "begin for r in execute 'select ''it''''s ' || quote_literal(x) || '''' loop null; end loop; end",
                Effects::empty(),
            ),
            ("begin execute format('create index %I on %I.%I (a)', i, s, t); end", any | Effects::DDL),
            ("begin execute format('create table if not exists %I (a int)', t); end", any | Effects::DDL),
            ("begin execute 'set search_path = a'; end", Effects::SETTING),
            ("begin execute 'select pg_advisory_lock(1)'; end", Effects::ADVISORY_LOCK),
            ("begin execute 'create temp table t (a int)'; end", Effects::TEMPORARY | Effects::DDL),
            ("begin execute $q$ deallocate all; $q$; end", Effects::PREPARED),
            ("begin execute 'select 1'; perform pg_advisory_lock(1); end", Effects::ADVISORY_LOCK),
        ] {
            assert_eq!(effects_of_body(body.as_bytes()), does, "{body}");
        }
    }

    #[test]
    fn other_dynamic_sql_may_have_any_effect() {
        for body in [
            "begin execute q; end",
            "begin execute 'select ' || q; end",
            "begin execute format('select %s', q); end",
            "begin execute format('select %10I', q); end",
            "begin execute format(q, 'x'); end",
            "begin execute format('select ' || q, 'x'); end",
            "begin execute format('select %I($1)', f) using x; end",
            "begin execute format('select * from %I.%I(1)', s, f); end",
            "begin execute 'select * from a join b on ' || quote_ident(f) || ' (a.x)'; end",
            "begin execute format('select of_%I($1)', f) using x; end",
            "begin execute 'select take_' || 'lock()'; end",
            "begin execute 'select * from part_' || quote_ident(t); end",
            "begin execute 'execute q'; end",
            "begin execute 'select 1'; execute q; end",
            "begin execute 'select 1'; perform query_to_xml(q, true, true, ''); end",
            "begin execute replace('select x', 'x', q); end",
            "begin execute upper('select 1') || q; end",
            "begin execute (q); end",
            "begin execute format('set %I = 1', q); end",
            "begin execute 'set my.' || 'a = 1'; end",
            "begin execute 'select set_config(''my.a'', ''1'', false)'; end",
            "begin execute 'select set_config(' || quote_literal(q) || ', ''1'', false)'; end",
            "begin execute",
        ] {
            assert!(effects_of_body(body.as_bytes()).contains(Effects::DYNAMIC), "{body}");
        }
    }
}
