//! A fast check that decides most texts: is it one ordinary query without effects on the session?
//!
//! It does not split tokens. It inspects only the few bytes that can start a string, a name, a comment or a
//! call, and gives up when unsure; the text is then parsed in full. It is conservative: it may reject a plain
//! query but never accepts another text (a property test checks this). On a query of 100 bytes it takes a
//! third of the time.

use std::ops::Range;

use super::{Effects, Lexing, statement_scan};

/// Returns the position of the query without surrounding blanks and semicolons; `None` if unsure.
#[inline]
pub(super) fn query(sql: &[u8], lexing: Lexing) -> Option<Range<usize>> {
    let place = trimmed(sql);
    let text = sql.get(place.clone())?;
    if !lexing.standard_conforming_strings || !starts_like_query(text) || mentions_special_names(text) {
        return None;
    }
    let mut at = 0;
    // The last quoted name: `"name" (` is a call.
    let mut quoted = 0..0;
    loop {
        at += text.get(at..)?.iter().position(|byte| NOTABLE[usize::from(*byte)]).unwrap_or(text.len() - at);
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

fn starts_like_query(text: &[u8]) -> bool {
    const VERBS: [&[u8; 6]; 5] = [b"select", b"insert", b"update", b"delete", b"values"];
    let Some((first, rest)) = text.split_first_chunk::<6>() else { return false };
    let lower = first.to_ascii_lowercase();
    VERBS.iter().any(|verb| lower == **verb) && !rest.first().is_some_and(|byte| is_word(*byte))
}

/// Returns whether `temp` (SELECT INTO TEMP) or `pg_` (system schemas, views and functions) occurs anywhere,
/// ignoring case.
/// Has no early exit within a block, so that the compiler vectorises it.
fn mentions_special_names(text: &[u8]) -> bool {
    const BLOCK: usize = 64;
    let is_special = |window: &[u8]| {
        let (a, b, c, d) = (window[0] | 0x20, window[1] | 0x20, window[2], window[3] | 0x20);
        (a == b't') & (b == b'e') & (c | 0x20 == b'm') & (d == b'p') | (a == b'p') & (b == b'g') & (c == b'_')
    };
    let mut rest = text;
    while let Some(block) = rest.first_chunk::<{ BLOCK + 3 }>() {
        let mut any = false;
        for at in 0..BLOCK {
            any |= is_special(&block[at..at + 4]);
        }
        if any {
            return true;
        }
        rest = &rest[BLOCK..];
    }
    rest.windows(4).any(is_special)
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

/// Bytes to inspect. White space, letters, digits and most operators are skipped.
const NOTABLE: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = matches!(byte as u8, b'\'' | b'"' | b'(' | b'$' | b'-' | b'/' | b';' | b'\\' | 0);
        byte += 1;
    }
    table
};
