//! The one pass every statement gets: where it ends, and what in it concerns the session wherever it stands.

use super::{
    effects::Effects,
    identifiers,
    lexer::{Lexer, Token, TokenKind},
    set_config,
};

/// One statement, as the first pass sees it.
#[derive(Debug)]
pub(super) struct Scan {
    /// Its first token.
    pub first: Token,
    /// Where that starts.
    pub start: usize,
    /// Where its last token ends.
    pub end: usize,
    /// What the functions called in it do, and what else shows without knowing the statement.
    pub calls: Effects,
    /// `INTO` of something temporary, not after INSERT or MERGE.
    pub into_temp: bool,
    /// `pg_settings` is named; an UPDATE of it calls set_config.
    pub names_settings: bool,
    /// A function that runs SQL given as text is called.
    pub runs_text: bool,
}

/// Reads on to the end of the next statement that is not empty.
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
        names_settings: false,
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
                scan.note_call(lexer, previous);
            }
            TokenKind::Symbol(b')') => depth = depth.saturating_sub(1),
            TokenKind::Word => {
                scan.note_word(lexer, previous, token);
                if body != Body::None && depth == 0 {
                    body = body.after_word(lexer, previous, token);
                }
            }
            TokenKind::QuotedName | TokenKind::UnicodeName => scan.note_quoted(lexer, token),
            _ => {}
        }
        scan.end = token.end;
        previous = token;
        token = lexer.next();
    }
}

/// Whether a token is this keyword; `word` in lower case.
#[inline]
pub(super) fn is_word(lexer: &Lexer<'_>, token: Token, word: &[u8]) -> bool {
    token.kind == TokenKind::Word && lexer.bytes(token).eq_ignore_ascii_case(word)
}

impl Scan {
    /// A `(` after `name`.
    #[inline]
    fn note_call(&mut self, lexer: &Lexer<'_>, name: Token) {
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

    /// The few words that matter wherever they stand.
    #[inline]
    fn note_word(&mut self, lexer: &Lexer<'_>, previous: Token, token: Token) {
        let word = lexer.bytes(token);
        match (word.first().map(|first| first | 0x20), word.len()) {
            (Some(b'p'), 7..) => self.note_system_name(lexer, &identifiers::folded(word)),
            (Some(b'i'), 4) if word.eq_ignore_ascii_case(b"into") => {
                let inserts = is_word(lexer, previous, b"insert") || is_word(lexer, previous, b"merge");
                self.into_temp |= !inserts && temp_follows(*lexer);
            }
            _ => {}
        }
    }

    #[inline]
    fn note_quoted(&mut self, lexer: &Lexer<'_>, token: Token) {
        if token.kind == TokenKind::UnicodeName {
            // With an escape character of its own the name cannot be told yet: rare enough to give up.
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
            Some(name) => self.note_system_name(lexer, &name),
            None => self.calls |= Effects::UNKNOWN,
        }
    }

    /// Schemas and views that are about the session.
    fn note_system_name(&mut self, lexer: &Lexer<'_>, name: &[u8]) {
        match name {
            b"pg_settings" => self.names_settings = true,
            b"pg_prepared_statements" | b"pg_cursors" => self.calls |= Effects::INSPECTION,
            _ if name.starts_with(b"pg_temp") && dot_follows(*lexer) => self.calls |= Effects::TEMPORARY,
            _ => {}
        }
    }
}

/// Functions that run what a string argument says.
pub(super) fn runs_text(name: &[u8]) -> bool {
    const NAMES: [&[u8]; 10] = [
        b"query_to_xml",
        b"query_to_xmlschema",
        b"query_to_xml_and_xmlschema",
        b"ts_stat",
        b"ts_rewrite",
        b"crosstab",
        b"crosstab2",
        b"crosstab3",
        b"crosstab4",
        b"xpath_table",
    ];
    matches!(name.first().map(|first| first | 0x20), Some(b'q' | b't' | b'c' | b'x'))
        && (7..27).contains(&name.len())
        && NAMES.iter().any(|known| name.eq_ignore_ascii_case(known))
}

fn dot_follows(mut lexer: Lexer<'_>) -> bool {
    lexer.next().kind == TokenKind::Symbol(b'.')
}

/// After INTO: `[LOCAL | GLOBAL] TEMP[ORARY] …` or `pg_temp.…`.
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

/// The `BEGIN ATOMIC … END` body of a function, within which `;` ends no statement of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    /// Not CREATE FUNCTION or CREATE PROCEDURE.
    None,
    /// It may come.
    Awaited,
    /// We are in it.
    Open,
    /// It has been.
    Closed,
}

impl Body {
    /// `lexer` stands after CREATE.
    #[cold]
    fn of_create(mut lexer: Lexer<'_>) -> Self {
        let mut token = lexer.next();
        if is_word(&lexer, token, b"or") {
            lexer.next();
            token = lexer.next();
        }
        if is_word(&lexer, token, b"function") || is_word(&lexer, token, b"procedure") {
            Self::Awaited
        } else {
            Self::None
        }
    }

    /// END is a reserved word and each statement of the body ends with `;`: only an END that starts a statement
    /// ends the body, that of a CASE never does.
    #[cold]
    fn after_word(self, lexer: &Lexer<'_>, previous: Token, token: Token) -> Self {
        match self {
            Self::Awaited if is_word(lexer, previous, b"begin") && is_word(lexer, token, b"atomic") => {
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
