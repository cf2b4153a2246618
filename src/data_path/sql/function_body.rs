//! Text within a statement's text: DO blocks, bodies of functions, and the strings in them that EXECUTE may run.
//!
//! Their language may be any, and what they run may be put together from pieces; so nothing is parsed here. Words are
//! looked for, in strings and quoted names too, and what a word might do counts as done: too much rather than too
//! little.

use super::{
    Effects, Lexing, dynamic_sql, identifiers,
    lexer::{Lexer, Token, TokenKind},
    set_config,
    statement_scan::{is_word, runs_text},
};

/// How deep strings within strings are looked into; what is deeper is taken for anything.
pub(super) const DEPTH_MAX: u32 = 4;

/// What the string literals of a statement might do if their text were run.
pub(super) fn effects_of_literals(text: &[u8], lexing: Lexing) -> Effects {
    let mut found = Effects::empty();
    let mut lexer = Lexer::new(text, lexing);
    loop {
        let token = lexer.next();
        match token.kind {
            TokenKind::End => break,
            kind if inner_text(kind) => found |= inside(&lexer, token, lexing, 1),
            _ => {}
        }
    }
    if found.is_empty() { found } else { found | Effects::HIDDEN }
}

fn inner_text(kind: TokenKind) -> bool {
    matches!(kind, TokenKind::Text | TokenKind::EscapedText | TokenKind::UnicodeText | TokenKind::DollarText)
}

/// What is in a quoted token. Quotes doubled in it are left so: they part words, and that is all that counts.
fn inside(lexer: &Lexer<'_>, token: Token, lexing: Lexing, depth: u32) -> Effects {
    let bytes = lexer.bytes(token);
    if depth > DEPTH_MAX {
        return Effects::UNKNOWN;
    }
    let inner = match token.kind {
        TokenKind::DollarText => identifiers::dollar_body(bytes).unwrap_or(bytes),
        _ => {
            let open =
                bytes.iter().position(|byte| matches!(byte, b'\'' | b'"')).map_or(0, |quote| quote + 1);
            bytes.get(open..bytes.len().saturating_sub(1)).unwrap_or_default()
        }
    };
    effects_of_code(inner, lexing, depth, true)
}

/// What a function with this body might do. Strings in it count where it runs text that cannot be told.
pub fn effects_of_body(code: &[u8]) -> Effects {
    let lexing = Lexing::default();
    let plain = effects_of_code(code, lexing, 0, false);
    if !plain.contains(Effects::DYNAMIC) {
        return plain;
    }
    match dynamic_sql::effects(code, lexing) {
        Some(built) => plain.difference(Effects::DYNAMIC) | built,
        None => effects_of_code(code, lexing, 0, true),
    }
}

/// What words in a piece of code might do; with what is in its strings, if `strings`.
pub(super) fn effects_of_code(code: &[u8], lexing: Lexing, depth: u32, strings: bool) -> Effects {
    let mut found = Effects::empty();
    let mut lexer = Lexer::new(code, lexing);
    let mut previous = Token { kind: TokenKind::End, start: 0, end: 0 };
    loop {
        let token = lexer.next();
        match token.kind {
            TokenKind::End => return found,
            TokenKind::Word => found |= effects_of_word(&lexer, previous, token),
            TokenKind::Symbol(b'(') if previous.kind.is_name() => {
                if let Some(name) = identifiers::of_token(&lexer, previous) {
                    // Quotes are doubled in a string within the text: arguments are not told apart there.
                    found |= match depth {
                        0 => set_config::effects(&name, &lexer),
                        _ => Effects::of_call(&name),
                    };
                    if !strings && runs_text(&name) {
                        found |= Effects::DYNAMIC;
                    }
                }
            }
            // In other languages "…" is a string, of SQL perhaps.
            TokenKind::QuotedName | TokenKind::UnicodeName
                if strings && lexer.bytes(token).contains(&b' ') =>
            {
                found |= inside(&lexer, token, lexing, depth + 1);
            }
            kind if strings && inner_text(kind) => found |= inside(&lexer, token, lexing, depth + 1),
            _ => {}
        }
        previous = token;
    }
}

/// What a word starts, or might.
fn effects_of_word(lexer: &Lexer<'_>, previous: Token, token: Token) -> Effects {
    let word = lexer.bytes(token);
    let follows = |words: &[&[u8]]| words.iter().any(|word| is_word(lexer, previous, word));
    let starts = match previous.kind {
        TokenKind::End | TokenKind::Symbol(b';' | b'>' | b':') => true,
        // A doubled quote opens a string within the string.
        kind if inner_text(kind) => true,
        _ => follows(&[b"begin", b"then", b"else", b"loop", b"execute"]),
    };
    let is = |keyword: &[u8]| word.eq_ignore_ascii_case(keyword);
    if is(b"execute") {
        return Effects::DYNAMIC;
    }
    if is(b"hold") && follows(&[b"with"]) {
        return Effects::CURSOR_HOLD;
    }
    if (is(b"temp") || is(b"temporary")) && follows(&[b"create", b"replace", b"local", b"global", b"into"]) {
        return Effects::TEMPORARY;
    }
    if word.get(..7).is_some_and(|start| start.eq_ignore_ascii_case(b"pg_temp")) {
        return Effects::TEMPORARY;
    }
    // An UPDATE of it, perhaps.
    if is(b"pg_settings") {
        return Effects::SETTING;
    }
    if !starts {
        return Effects::empty();
    }
    if is(b"set") {
        let next = { *lexer }.next();
        let local =
            [&b"local"[..], b"transaction", b"constraints"].iter().any(|word| is_word(lexer, next, word));
        return if local { Effects::SETTING_LOCAL } else { Effects::SETTING };
    }
    const STARTS: [(&[u8], Effects); 13] = [
        (b"reset", Effects::SETTING),
        (b"listen", Effects::LISTEN),
        (b"unlisten", Effects::LISTEN),
        (b"notify", Effects::NOTIFY),
        (b"load", Effects::LOAD),
        (b"discard", Effects::DISCARD),
        (b"prepare", Effects::PREPARED),
        (b"deallocate", Effects::PREPARED),
        (b"create", Effects::DDL),
        (b"alter", Effects::DDL),
        (b"drop", Effects::DDL.union(Effects::DROP)),
        (b"commit", Effects::TRANSACTION),
        (b"rollback", Effects::TRANSACTION),
    ];
    STARTS.iter().find(|(keyword, _)| is(keyword)).map_or(Effects::empty(), |(_, effects)| *effects)
}
