//! A fast check that decides most texts: is it one ordinary query without effects on the session?
//!
//! Most queries of applications are bare: they have no string, call, comment or special name at all. One look at their
//! bytes says so. In other texts the check does not split tokens. It inspects only the few bytes that can start a string, a name, a comment or a
//! call. It gives up when unsure; the text is then parsed in full. It is conservative: it may reject a plain
//! query but never accepts another text (a property test checks this). On a query of 100 bytes it takes a
//! third of the time.

use std::ops::Range;

use super::{
    Effects, Lexing,
    byte_blocks::{BLOCK_BYTES, any_place},
    statement_scan,
};

/// Bytes that are looked at one by one before whole blocks are.
const NEAR_BYTES: usize = 4;

/// A query in which nothing needs a second look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BareQuery {
    /// It is an INSERT, whose column defaults may advance a sequence.
    pub inserts: bool,
}

/// Conservative: `None` also for a query that is bare, if its text does not show it at once.
#[inline]
pub(super) fn bare(sql: &[u8], lexing: Lexing) -> Option<BareQuery> {
    let text = sql.get(trimmed(sql))?;
    let verb = verb(text)?;
    let is_bare = lexing.standard_conforming_strings && !needs_a_look(text);
    is_bare.then_some(BareQuery { inserts: verb == INSERT })
}

/// Returns the position of the query without surrounding blanks and semicolons; `None` if unsure.
#[inline]
pub(super) fn query(sql: &[u8], lexing: Lexing) -> Option<Range<usize>> {
    let place = trimmed(sql);
    let text = sql.get(place.clone())?;
    if !lexing.standard_conforming_strings || verb(text).is_none() {
        return None;
    }
    if !needs_a_look(text) {
        return Some(place);
    }
    if mentions_special_names(text) {
        return None;
    }
    let mut at = 0;
    // The last quoted name: `"name" (` is a call.
    let mut quoted = 0..0;
    loop {
        at = next_notable(text, at);
        let Some(&byte) = text.get(at) else { return Some(place) };
        let next = text.get(at + 1).copied().unwrap_or(0);
        let before = at.checked_sub(1).and_then(|before| text.get(before)).copied().unwrap_or(b' ');
        match byte {
            // After a letter it is E'', B'', X'' or U&''.
            b'\'' if !is_word(before) && before != b'&' => at = closing(text, at)?,
            b'"' if before != b'&' => {
                let close = closing(text, at)?;
                quoted = at + 1..close;
                at = close;
            }
            b'(' => {
                let name = name_before(text, at, quoted.clone())?;
                if !Effects::of_call(name).is_empty() || statement_scan::runs_text(name) {
                    return None;
                }
            }
            b'$' if next.is_ascii_digit() && !is_word(before) => {}
            b'-' if next != b'-' => {}
            b'/' if next != b'*' => {}
            _ => return None,
        }
        at += 1;
    }
}

/// Strips white space on both sides and semicolons at the end.
fn trimmed(sql: &[u8]) -> Range<usize> {
    let space = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | b'\x0b' | b'\x0c');
    let start = sql.iter().position(|byte| !space(byte)).unwrap_or(sql.len());
    let end = sql.iter().rposition(|byte| !space(byte) && *byte != b';').map_or(start, |last| last + 1);
    start..end
}

/// The verbs that a query begins with.
const SELECT: u64 = letters(b"select");
const INSERT: u64 = letters(b"insert");
const UPDATE: u64 = letters(b"update");
const DELETE: u64 = letters(b"delete");
const VALUES: u64 = letters(b"values");

/// Six letters as a number, which is compared at once, in lower case.
#[inline]
const fn letters(&[a, b, c, d, e, f]: &[u8; 6]) -> u64 {
    u64::from_le_bytes([a, b, c, d, e, f, 0, 0]) | 0x2020_2020_2020
}

/// The verb that a query begins with.
#[inline]
fn verb(text: &[u8]) -> Option<u64> {
    let (first, rest) = text.split_first_chunk::<6>()?;
    let verb = letters(first);
    let is_verb = matches!(verb, SELECT | INSERT | UPDATE | DELETE | VALUES);
    (is_verb && !rest.first().is_some_and(|byte| is_word(*byte))).then_some(verb)
}

/// Whether any byte may start a string, a name in quotes, a comment, a call or another statement, or any name is a
/// special one. A `$` in front of a digit is a parameter or a part of a name, and starts no string.
#[inline]
fn needs_a_look(text: &[u8]) -> bool {
    any_place(text, |[a, b, c, d]| {
        let quote = (a == b'\'') | (a == b'"') | (a == b'\\');
        let other = (a == b'(') | (a == b';') | (a == b'/') | (a == 0);
        let (comment, dollar) = ((a == b'-') & (b == b'-'), (a == b'$') & !b.is_ascii_digit());
        quote | other | comment | dollar | is_special_name([a, b, c, d])
    })
}

/// Returns whether `temp` (SELECT INTO TEMP) or `pg_` (system schemas, views and functions) occurs anywhere,
/// ignoring case.
fn mentions_special_names(text: &[u8]) -> bool {
    any_place(text, is_special_name)
}

#[inline(always)]
fn is_special_name([a, b, c, d]: [u8; 4]) -> bool {
    let (a, b, d) = (a | 0x20, b | 0x20, d | 0x20);
    (a == b't') & (b == b'e') & (c | 0x20 == b'm') & (d == b'p') | (a == b'p') & (b == b'g') & (c == b'_')
}

/// Returns the index of the closing quote. A doubled quote counts as a closing and an opening one.
fn closing(text: &[u8], open: usize) -> Option<usize> {
    let quote = *text.get(open)?;
    text.get(open + 1..)?.iter().position(|byte| *byte == quote).map(|length| open + 1 + length)
}

/// Returns the name before a `(`, empty if there is none; `None` if unsure.
fn name_before(text: &[u8], parenthesis: usize, quoted: Range<usize>) -> Option<&[u8]> {
    let before = text.get(..parenthesis)?;
    let end = before.iter().rposition(|byte| !byte.is_ascii_whitespace() && *byte != b'\x0b')? + 1;
    if before.get(end - 1) == Some(&b'"') {
        return if quoted.end + 1 == end { text.get(quoted) } else { None };
    }
    let start = before[..end].iter().rposition(|byte| !is_word(*byte)).map_or(0, |last| last + 1);
    let name = before.get(start..end)?;
    // A number or a parameter may directly precede a name: `1nextval(`.
    if name.first().is_some_and(|byte| byte.is_ascii_digit() || *byte == b'$') { None } else { Some(name) }
}

/// Returns whether a byte may be part of a name.
pub(super) fn is_word(byte: u8) -> bool {
    matches!(byte, b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'$' | 128..)
}

/// Returns the place of the next byte to inspect from `at` on; the end if there is none. White space, letters,
/// digits and most operators are skipped.
fn next_notable(text: &[u8], at: usize) -> usize {
    let rest = text.get(at..).unwrap_or_default();
    // Such bytes come in groups: the next ones are looked at one by one.
    let near = rest.get(..NEAR_BYTES).unwrap_or(rest);
    if let Some(found) = near.iter().position(|byte| is_notable(*byte)) {
        return at + found;
    }
    let mut passed = near.len();
    while let Some(block) = rest.get(passed..).filter(|rest| !rest.is_empty()) {
        let block = block.get(..BLOCK_BYTES).unwrap_or(block);
        if any_place(block, |[byte, ..]| is_notable(byte)) {
            return at + passed + block.iter().position(|byte| is_notable(*byte)).unwrap_or(block.len());
        }
        passed += block.len();
    }
    text.len()
}

fn is_notable(byte: u8) -> bool {
    (byte == b'\'')
        | (byte == b'"')
        | (byte == b'(')
        | (byte == b'$')
        | (byte == b'-')
        | (byte == b'/')
        | (byte == b';')
        | (byte == b'\\')
        | (byte == 0)
}
