//! The pass over every statement: finds its end and what affects the session anywhere in it.

use super::{
    effects::Effects,
    identifiers,
    lexer::{Lexer, Token, TokenKind},
    set_config,
};

/// Result of the first pass over a statement.
#[derive(Debug)]
pub(super) struct Scan {
    /// The first token.
    pub first: Token,
    /// Start of the first token.
    pub start: usize,
    /// End of the last token.
    pub end: usize,
    /// Effects of the called functions, and other effects that do not depend on the statement type.
    pub calls: Effects,
    /// `INTO` a temporary object, except after INSERT or MERGE.
    pub into_temp: bool,
    /// Names `pg_settings`; an UPDATE of this view calls set_config.
    pub names_pg_settings: bool,
    /// Calls a function that runs an argument as SQL.
    pub runs_text: bool,
}

/// Reads to the end of the next non-empty statement.
#[inline]
pub(super) fn next(lexer: &mut Lexer<'_>) -> Option<Scan> {
    let first = loop {
        let token = lexer.next();
        match token.kind {
            TokenKind::End => return None,
            TokenKind::Symbol(b';') => {}
            _ => break token,
        }
    };
    let mut scan = Scan {
        first,
        start: first.start,
        end: first.end,
        calls: Effects::empty(),
        into_temp: false,
        names_pg_settings: false,
        runs_text: false,
    };
    let mut body = if is_word(lexer, first, b"create") { Body::of_create(*lexer) } else { Body::None };
    let mut depth = 0usize;
    let mut previous = Token { kind: TokenKind::End, ..first };
    let mut token = first;
    loop {
        match token.kind {
            TokenKind::End => return Some(scan),
            TokenKind::Symbol(b';') if depth == 0 && body != Body::Open => return Some(scan),
            TokenKind::Symbol(b'(') => {
                depth += 1;
                scan.add_call(lexer, previous);
            }
            TokenKind::Symbol(b')') => depth = depth.saturating_sub(1),
            TokenKind::Word => {
                scan.add_word(lexer, previous, token);
                if body != Body::None && depth == 0 {
                    body = body.after_word(lexer, previous, token);
                }
            }
            TokenKind::QuotedName | TokenKind::UnicodeName => scan.add_quoted(lexer, token),
            _ => {}
        }
        scan.end = token.end;
        previous = token;
        token = lexer.next();
    }
}

/// Returns whether a token is this keyword (in lower case).
#[inline]
pub(super) fn is_word(lexer: &Lexer<'_>, token: Token, word: &[u8]) -> bool {
    token.kind == TokenKind::Word && lexer.bytes(token).eq_ignore_ascii_case(word)
}

impl Scan {
    /// Handles a `(` after `name`.
    #[inline]
    fn add_call(&mut self, lexer: &Lexer<'_>, name: Token) {
        let bytes = lexer.bytes(name);
        match name.kind {
            TokenKind::Word => {
                self.calls |= set_config::effects(bytes, lexer);
                self.runs_text |= runs_text(bytes);
            }
            TokenKind::QuotedName | TokenKind::UnicodeName => match identifiers::of_token(lexer, name) {
                Some(name) => {
                    self.calls |= set_config::effects(&name, lexer);
                    self.runs_text |= runs_text(&name);
                }
                None => self.calls |= Effects::UNKNOWN,
            },
            _ => {}
        }
    }

    /// Handles the words that matter anywhere in a statement.
    #[inline]
    fn add_word(&mut self, lexer: &Lexer<'_>, previous: Token, token: Token) {
        let word = lexer.bytes(token);
        match (word.first().map(|first| first | 0x20), word.len()) {
            (Some(b'p'), 7..) => self.add_system_name(lexer, &identifiers::folded(word)),
            (Some(b'i'), 4) if word.eq_ignore_ascii_case(b"into") => {
                let inserts = is_word(lexer, previous, b"insert") || is_word(lexer, previous, b"merge");
                self.into_temp |= !inserts && temp_follows(*lexer);
            }
            _ => {}
        }
    }

    #[inline]
    fn add_quoted(&mut self, lexer: &Lexer<'_>, token: Token) {
        if token.kind == TokenKind::UnicodeName {
            // UESCAPE changes the name. It is too rare to be decoded.
            let next = { *lexer }.next();
            if is_word(lexer, next, b"uescape") {
                self.calls |= Effects::UNKNOWN;
            }
        }
        let bytes = lexer.bytes(token);
        if !bytes.starts_with(b"\"pg_") && token.kind == TokenKind::QuotedName {
            return;
        }
        match identifiers::of_token(lexer, token) {
            Some(name) => self.add_system_name(lexer, &name),
            None => self.calls |= Effects::UNKNOWN,
        }
    }

    /// Handles schemas and views that concern the session.
    fn add_system_name(&mut self, lexer: &Lexer<'_>, name: &[u8]) {
        match name {
            b"pg_settings" => self.names_pg_settings = true,
            b"pg_prepared_statements" | b"pg_cursors" => self.calls |= Effects::INSPECTION,
            _ if name.starts_with(b"pg_temp") && dot_follows(*lexer) => self.calls |= Effects::TEMPORARY,
            _ => {}
        }
    }
}

/// Functions that run an argument as SQL.
pub(super) fn runs_text(name: &[u8]) -> bool {
    #[rustfmt::skip]
    const NAMES: [&[u8]; 10] = [
        b"query_to_xml", b"query_to_xmlschema", b"query_to_xml_and_xmlschema", b"ts_stat", b"ts_rewrite",
        b"crosstab", b"crosstab2", b"crosstab3", b"crosstab4", b"xpath_table",
    ];
    matches!(name.first().map(|first| first | 0x20), Some(b'q' | b't' | b'c' | b'x'))
        && (7..27).contains(&name.len())
        && NAMES.iter().any(|listed| name.eq_ignore_ascii_case(listed))
}

fn dot_follows(mut lexer: Lexer<'_>) -> bool {
    lexer.next().kind == TokenKind::Symbol(b'.')
}

/// Matches `[LOCAL | GLOBAL] TEMP[ORARY] …` or `pg_temp.…` after INTO.
fn temp_follows(mut lexer: Lexer<'_>) -> bool {
    let mut token = lexer.next();
    if is_word(&lexer, token, b"local") || is_word(&lexer, token, b"global") {
        token = lexer.next();
    }
    if is_word(&lexer, token, b"temp") || is_word(&lexer, token, b"temporary") {
        return true;
    }
    let schema = if token.kind.is_name() { identifiers::of_token(&lexer, token) } else { None };
    schema.is_some_and(|name| name.starts_with(b"pg_temp")) && dot_follows(lexer)
}

/// State of a function's `BEGIN ATOMIC … END` body, in which `;` does not end the text's statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    /// Not CREATE FUNCTION or CREATE PROCEDURE.
    None,
    Pending,
    Open,
    Closed,
}

impl Body {
    /// `lexer` is after CREATE.
    #[cold]
    fn of_create(mut lexer: Lexer<'_>) -> Self {
        let mut token = lexer.next();
        if is_word(&lexer, token, b"or") {
            lexer.next();
            token = lexer.next();
        }
        if is_word(&lexer, token, b"function") || is_word(&lexer, token, b"procedure") {
            Self::Pending
        } else {
            Self::None
        }
    }

    /// END is reserved and every statement in the body ends with `;`, so only an END at the start of a
    /// statement ends the body. The END of a CASE never starts one.
    #[cold]
    fn after_word(self, lexer: &Lexer<'_>, previous: Token, token: Token) -> Self {
        match self {
            Self::Pending if is_word(lexer, previous, b"begin") && is_word(lexer, token, b"atomic") => {
                Self::Open
            }
            Self::Open
                if is_word(lexer, token, b"end")
                    && (previous.kind == TokenKind::Symbol(b';') || is_word(lexer, previous, b"atomic")) =>
            {
                Self::Closed
            }
            unchanged => unchanged,
        }
    }
}
