//! PostgreSQL's tokens, as its own `src/backend/parser/scan.l` cuts them.
//!
//! Only where tokens begin and end, not what they mean: a text that scan.l refuses (an unterminated string, a stray
//! byte) is cut somehow, because the server refuses the whole of it and nothing in it runs. Every byte is looked at
//! a bounded number of times and nothing recurses, whatever a client sends.

use super::{Characters, Lexing};

/// One token and where it lies in the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token {
    pub kind: TokenKind,
    pub start: usize,
    pub end: usize,
}

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// The end of the text.
    End,
    /// A keyword or an unquoted identifier; bytes over 127 count as letters.
    Word,
    /// `"…"`
    QuotedName,
    /// `U&"…"`
    UnicodeName,
    /// `'…'` in which a backslash is a backslash.
    Text,
    /// `E'…'`, and `'…'` with standard_conforming_strings off.
    EscapedText,
    /// `U&'…'`
    UnicodeText,
    /// `$tag$…$tag$`
    DollarText,
    /// `B'…'` or `X'…'`
    Bits,
    /// An unsigned number.
    Number,
    /// `$1`
    Parameter,
    /// One byte of punctuation or of an operator.
    Symbol(u8),
}

impl TokenKind {
    /// Whether this may name something: a word or a quoted identifier.
    pub fn is_name(self) -> bool {
        matches!(self, Self::Word | Self::QuotedName | Self::UnicodeName)
    }
}

/// Cuts a text into tokens, skipping white space and comments.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lexer<'a> {
    sql: &'a [u8],
    at: usize,
    lexing: Lexing,
    /// The string or comment that the text ends in.
    unterminated: Option<&'static str>,
}

impl<'a> Lexer<'a> {
    pub fn new(sql: &'a [u8], lexing: Lexing) -> Self {
        Self { sql, at: 0, lexing, unterminated: None }
    }

    /// The whole text, from which tokens are taken by their range.
    pub fn sql(&self) -> &'a [u8] {
        self.sql
    }

    /// `string` or `comment` if the text ended before that did.
    pub fn unterminated(&self) -> Option<&'static str> {
        self.unterminated
    }

    /// Whether nothing has been read yet.
    pub fn at_start(&self) -> bool {
        self.at == 0
    }

    /// Leaves nothing to read.
    pub fn skip_to_end(&mut self) {
        self.at = self.sql.len();
    }

    /// A token's bytes, quotes included.
    pub fn bytes(&self, token: Token) -> &'a [u8] {
        self.sql.get(token.start..token.end).unwrap_or_default()
    }

    /// The next token; `End` for ever after the last.
    #[inline]
    pub fn next(&mut self) -> Token {
        loop {
            let start = self.at;
            let Some(&byte) = self.sql.get(start) else {
                return Token { kind: TokenKind::End, start, end: start };
            };
            let kind = match CLASS[usize::from(byte)] {
                Class::Space => {
                    self.at += 1;
                    continue;
                }
                Class::Letter => self.word(byte),
                Class::Symbol => {
                    self.at += 1;
                    TokenKind::Symbol(byte)
                }
                Class::Digit => self.number(),
                Class::Quote => {
                    self.at += 1;
                    self.text(self.lexing.plain_text())
                }
                Class::DoubleQuote => self.quoted_name(),
                Class::Dollar => self.dollar(),
                Class::Dot if self.byte(1).is_ascii_digit() => self.number(),
                Class::Dash if self.byte(1) == b'-' => {
                    self.skip_line();
                    continue;
                }
                Class::Slash if self.byte(1) == b'*' => {
                    self.skip_comment();
                    continue;
                }
                Class::Dot | Class::Dash | Class::Slash => {
                    self.at += 1;
                    TokenKind::Symbol(byte)
                }
                Class::Nul => TokenKind::End,
            };
            return Token { kind, start, end: self.at };
        }
    }

    /// The byte `ahead` of where we are; 0 past the end, which no rule of the language matches.
    #[inline]
    fn byte(&self, ahead: usize) -> u8 {
        self.sql.get(self.at + ahead).copied().unwrap_or(0)
    }

    #[inline]
    fn word(&mut self, first: u8) -> TokenKind {
        let quoted = match self.byte(1) {
            b'\'' => match first | 0x20 {
                b'e' => Some((2, TokenKind::EscapedText)),
                b'b' | b'x' => Some((2, TokenKind::Bits)),
                _ => None,
            },
            b'&' if first | 0x20 == b'u' => match self.byte(2) {
                b'\'' => Some((3, TokenKind::UnicodeText)),
                b'"' => Some((2, TokenKind::UnicodeName)),
                _ => None,
            },
            _ => None,
        };
        match quoted {
            Some((prefix, TokenKind::UnicodeName)) => {
                self.at += prefix;
                self.quoted_name();
                TokenKind::UnicodeName
            }
            Some((prefix, kind)) => {
                self.at += prefix;
                self.text(kind)
            }
            None => {
                self.skip_word();
                TokenKind::Word
            }
        }
    }

    #[inline]
    fn skip_word(&mut self) {
        let rest = self.sql.get(self.at..).unwrap_or_default();
        let length = rest.iter().position(|byte| !in_word(*byte)).unwrap_or(rest.len());
        if self.lexing.characters == Characters::AsciiSafe {
            self.at += length;
        } else {
            while in_word(self.byte(0)) {
                self.at += self.lexing.characters.width(self.byte(0));
            }
            self.at = self.at.min(self.sql.len());
        }
    }

    /// After the opening quote of a string of this kind: to its end, with the segments that continue it on
    /// following lines.
    fn text(&mut self, kind: TokenKind) -> TokenKind {
        loop {
            match self.byte(0) {
                b'\\' if kind == TokenKind::EscapedText => self.at += 2,
                b'\'' if kind != TokenKind::Bits && self.byte(1) == b'\'' => self.at += 2,
                b'\'' => {
                    self.at += 1;
                    match continued(self.sql, self.at) {
                        Some(next) => self.at = next,
                        None => return kind,
                    }
                }
                high @ 128.. => self.at += self.lexing.characters.width(high),
                _ => self.at += 1,
            }
            if self.at >= self.sql.len() {
                self.at = self.sql.len();
                self.unterminated = Some("string");
                return kind;
            }
        }
    }

    /// From the opening `"` to the closing one.
    fn quoted_name(&mut self) -> TokenKind {
        self.at += 1;
        while self.at < self.sql.len() {
            match (self.byte(0), self.byte(1)) {
                (b'"', b'"') => self.at += 2,
                (b'"', _) => {
                    self.at += 1;
                    return TokenKind::QuotedName;
                }
                _ => self.at += 1,
            }
        }
        self.unterminated = Some("string");
        TokenKind::QuotedName
    }

    /// `$1`, `$$…$$`, `$tag$…$tag$`, or a lone `$`.
    fn dollar(&mut self) -> TokenKind {
        self.at += 1;
        if self.byte(0).is_ascii_digit() {
            self.skip_digits();
            return TokenKind::Parameter;
        }
        let rest = self.sql.get(self.at..).unwrap_or_default();
        let tag_length = rest.iter().position(|byte| *byte == b'$' || !in_word(*byte)).unwrap_or(rest.len());
        if rest.get(tag_length) != Some(&b'$') {
            return TokenKind::Symbol(b'$');
        }
        let tag = &self.sql[self.at - 1..self.at + tag_length + 1];
        self.at += tag_length + 1;
        // A tag holds no `$` but at its ends: a failed comparison reads no further than the next `$`, so that all
        // of them together read the text once.
        while let Some(body) = self.sql.get(self.at..) {
            let Some(dollar) = body.iter().position(|byte| *byte == b'$') else { break };
            if body[dollar..].starts_with(tag) {
                self.at += dollar + tag.len();
                return TokenKind::DollarText;
            }
            self.at += dollar + 1;
        }
        self.at = self.sql.len();
        TokenKind::DollarText
    }

    fn number(&mut self) -> TokenKind {
        let based = self.byte(0) == b'0' && matches!(self.byte(1) | 0x20, b'x' | b'o' | b'b');
        if based && self.byte(2).is_ascii_hexdigit() {
            self.at += 2;
            while self.byte(0).is_ascii_hexdigit() || self.byte(0) == b'_' {
                self.at += 1;
            }
            return TokenKind::Number;
        }
        self.skip_digits();
        // `1..10` is a range in PL/pgSQL: two numbers and two dots.
        if self.byte(0) == b'.' && self.byte(1) != b'.' {
            self.at += 1;
            self.skip_digits();
        }
        if self.byte(0) | 0x20 == b'e' {
            let sign = usize::from(matches!(self.byte(1), b'+' | b'-'));
            if self.byte(1 + sign).is_ascii_digit() {
                self.at += 1 + sign;
                self.skip_digits();
            }
        }
        TokenKind::Number
    }

    fn skip_digits(&mut self) {
        while self.byte(0).is_ascii_digit() || (self.byte(0) == b'_' && self.byte(1).is_ascii_digit()) {
            self.at += 1;
        }
    }

    fn skip_line(&mut self) {
        self.at = end_of_line(self.sql, self.at);
    }

    /// From `/*` to its `*/`; comments nest.
    fn skip_comment(&mut self) {
        let mut depth = 0usize;
        while self.at < self.sql.len() {
            match (self.byte(0), self.byte(1)) {
                (b'/', b'*') => {
                    depth += 1;
                    self.at += 2;
                }
                (b'*', b'/') => {
                    depth -= 1;
                    self.at += 2;
                    if depth == 0 {
                        return;
                    }
                }
                _ => self.at += 1,
            }
        }
        self.unterminated = Some("comment");
    }
}

/// Where a string goes on after its closing quote, just behind the next opening one: `'a'` and `'b'` are one string
/// if at least one newline, and nothing but white space and `--` comments, is between them.
pub(super) fn continued(sql: &[u8], closed: usize) -> Option<usize> {
    let mut at = closed;
    let mut newline = false;
    loop {
        match sql.get(at)? {
            b'\n' | b'\r' => {
                newline = true;
                at += 1;
            }
            b' ' | b'\t' | b'\x0b' | b'\x0c' => at += 1,
            b'-' if sql.get(at + 1) == Some(&b'-') => at = end_of_line(sql, at),
            b'\'' if newline => return Some(at + 1),
            _ => return None,
        }
    }
}

fn end_of_line(sql: &[u8], at: usize) -> usize {
    let rest = sql.get(at..).unwrap_or_default();
    at + rest.iter().position(|byte| matches!(byte, b'\n' | b'\r')).unwrap_or(rest.len())
}

/// Whether a byte continues an unquoted identifier.
#[inline]
fn in_word(byte: u8) -> bool {
    IN_WORD[usize::from(byte)]
}

/// What a token's first byte says about it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Space,
    Letter,
    Digit,
    Symbol,
    Quote,
    DoubleQuote,
    Dollar,
    Dot,
    Dash,
    Slash,
    Nul,
}

const CLASS: [Class; 256] = {
    let mut table = [Class::Symbol; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = match byte as u8 {
            b' ' | b'\t' | b'\n' | b'\r' | b'\x0b' | b'\x0c' => Class::Space,
            b'a'..=b'z' | b'A'..=b'Z' | b'_' | 128.. => Class::Letter,
            b'0'..=b'9' => Class::Digit,
            b'\'' => Class::Quote,
            b'"' => Class::DoubleQuote,
            b'$' => Class::Dollar,
            b'.' => Class::Dot,
            b'-' => Class::Dash,
            b'/' => Class::Slash,
            0 => Class::Nul,
            _ => Class::Symbol,
        };
        byte += 1;
    }
    table
};

const IN_WORD: [bool; 256] = {
    let mut table = [false; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = matches!(CLASS[byte], Class::Letter | Class::Digit | Class::Dollar);
        byte += 1;
    }
    table
};
