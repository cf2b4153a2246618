//! Nested texts: DO blocks, function bodies, and strings in them that EXECUTE may run.
//!
//! They may be in any language, and their SQL may be built from pieces, so they are not parsed. The code
//! searches for words, also in strings and quoted names, and assumes the effect that each word may have. This
//! is conservative.

use super::{
    Effects, Lexing, dynamic_sql, identifiers,
    lexer::{Lexer, Token, TokenKind},
    set_config,
    statement_scan::{is_word, runs_text},
};

/// Limit of nested strings; deeper ones may have any effect.
pub(super) const DEPTH_MAX: u32 = 4;

/// Returns the effects that a statement's string literals would have as SQL.
pub(super) fn effects_of_literals(text: &[u8], lexing: Lexing) -> Effects {
    let mut found = Effects::empty();
    let mut lexer = Lexer::new(text, lexing);
    loop {
        let token = lexer.next();
        match token.kind {
            TokenKind::End => break,
            kind if kind.is_string() => found |= inside(&lexer, token, lexing, 1),
            _ => {}
        }
    }
    if found.is_empty() { found } else { found | Effects::HIDDEN }
}

/// Returns the effects of a quoted token's content. Doubled quotes stay: they only separate words.
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

/// Returns the effects of a function with this body. Strings count if the function runs computed text.
pub fn effects_of_body(code: &[u8]) -> Effects {
    let lexing = Lexing::default();
    let plain = effects_of_code(code, lexing, 0, false);
    if !plain.contains(Effects::DYNAMIC) {
        return plain;
    }
    match dynamic_sql::effects(code, lexing) {
        Some(built) => plain.difference(Effects::DYNAMIC) | built,
        None => plain | effects_of_code(code, lexing, 0, true),
    }
}

/// Returns the effects of the words in code; with `strings`, also of the words in its strings.
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
                    // In a nested string all quotes are doubled, so arguments cannot be parsed there.
                    found |= match depth {
                        0 => set_config::effects(&name, &lexer),
                        _ => Effects::of_call(&name),
                    };
                    if !strings && runs_text(&name) {
                        found |= Effects::DYNAMIC;
                    }
                }
            }
            // In other languages `"…"` is a string, which may contain SQL.
            TokenKind::QuotedName | TokenKind::UnicodeName
                if strings && lexer.bytes(token).contains(&b' ') =>
            {
                found |= inside(&lexer, token, lexing, depth + 1);
            }
            kind if strings && kind.is_string() => found |= inside(&lexer, token, lexing, depth + 1),
            _ => {}
        }
        previous = token;
    }
}

/// Returns the effects of a statement that may start at this word.
fn effects_of_word(lexer: &Lexer<'_>, previous: Token, token: Token) -> Effects {
    let word = lexer.bytes(token);
    let follows = |words: &[&[u8]]| words.iter().any(|word| is_word(lexer, previous, word));
    let starts = match previous.kind {
        TokenKind::End | TokenKind::Symbol(b';' | b'>' | b':') => true,
        // A doubled quote may start a nested string.
        kind if kind.is_string() => true,
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
    // It may be an UPDATE of this view.
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
