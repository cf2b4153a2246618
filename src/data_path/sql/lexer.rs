//! PostgreSQL's tokens, by the rules of `src/backend/parser/scan.l`.
//!
//! The lexer finds token boundaries only. It may split invalid texts (an unterminated string, a stray byte)
//! in any way, because the server rejects them as a whole. It reads each byte a bounded number of times and
//! does not recurse, whatever a client sends.

use super::{Characters, Lexing};

/// A token and its position in the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token {
    pub kind: TokenKind,
    pub start: usize,
    pub end: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// The end of the text.
    End,
    /// A keyword or an unquoted identifier; bytes above 127 count as letters.
    Word,
    /// `"…"`
    QuotedName,
    /// `U&"…"`
    UnicodeName,
    /// `'…'` without backslash escapes.
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
    /// Returns whether the token is a string that may hold SQL.
    pub fn is_string(self) -> bool {
        matches!(self, Self::Text | Self::EscapedText | Self::UnicodeText | Self::DollarText)
    }

    /// Returns whether the token may be a name.
    pub fn is_name(self) -> bool {
        matches!(self, Self::Word | Self::QuotedName | Self::UnicodeName)
    }
}

/// Splits a text into tokens, without white space and comments.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lexer<'a> {
    sql: &'a [u8],
    at: usize,
    lexing: Lexing,
    /// `string` or `comment` if the text ends inside one.
    unterminated: Option<&'static str>,
}

impl<'a> Lexer<'a> {
    pub fn new(sql: &'a [u8], lexing: Lexing) -> Self {
        Self { sql, at: 0, lexing, unterminated: None }
    }

    /// Returns the whole text.
    pub fn sql(&self) -> &'a [u8] {
        self.sql
    }

    /// Returns `string` or `comment` if the text ended inside one.
    pub fn unterminated(&self) -> Option<&'static str> {
        self.unterminated
    }

    /// Returns whether nothing has been read yet.
    pub fn at_start(&self) -> bool {
        self.at == 0
    }

    /// Skips the rest of the text.
    pub fn skip_to_end(&mut self) {
        self.at = self.sql.len();
    }

    /// Returns a token's bytes with its quotes.
    pub fn bytes(&self, token: Token) -> &'a [u8] {
        self.sql.get(token.start..token.end).unwrap_or_default()
    }

    /// Returns the next token; `End` at and after the end.
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
                Class::Dot if self.byte(1).is_ascii_digit() && !self.ends_two_dots() => self.number(),
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

    /// Returns the byte at offset `ahead`; 0 past the end, which no rule matches.
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

    /// Reads a string from after its opening quote to its end, including segments on following lines.
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

    /// Reads from the opening `"` to the closing one.
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

    /// Reads `$1`, `$$…$$`, `$tag$…$tag$` or a lone `$`.
    fn dollar(&mut self) -> TokenKind {
        self.at += 1;
        if self.byte(0).is_ascii_digit() {
            while self.byte(0).is_ascii_digit() {
                self.at += 1;
            }
            return TokenKind::Parameter;
        }
        let rest = self.sql.get(self.at..).unwrap_or_default();
        let tag_length = rest.iter().position(|byte| *byte == b'$' || !in_word(*byte)).unwrap_or(rest.len());
        if rest.get(tag_length) != Some(&b'$') {
            return TokenKind::Symbol(b'$');
        }
        let tag = &self.sql[self.at - 1..self.at + tag_length + 1];
        self.at += tag_length + 1;
        // A tag contains `$` only at its ends, so a failed comparison stops at the next `$`: the search is
        // linear.
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
        let first = 2 + usize::from(self.byte(2) == b'_');
        if based && self.byte(first).is_ascii_hexdigit() {
            self.at += 2;
            while self.byte(0).is_ascii_hexdigit() || self.byte(0) == b'_' {
                self.at += 1;
            }
            return TokenKind::Number;
        }
        self.skip_digits();
        // In PL/pgSQL `1..10` is a range: two numbers and two dots.
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

    /// Returns whether the dot here is the second of `..`, as in `1..10`.
    #[cold]
    fn ends_two_dots(&self) -> bool {
        let before = self.sql.get(..self.at).unwrap_or_default();
        before.iter().rev().take_while(|byte| **byte == b'.').count() % 2 == 1
    }

    fn skip_digits(&mut self) {
        while self.byte(0).is_ascii_digit() || (self.byte(0) == b'_' && self.byte(1).is_ascii_digit()) {
            self.at += 1;
        }
    }

    fn skip_line(&mut self) {
        self.at = end_of_line(self.sql, self.at);
    }

    /// Skips a comment; comments nest.
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

/// Returns the index after the next opening quote if a string continues: `'a'` and `'b'` are one string if
/// the gap has at least one newline and otherwise only white space and `--` comments.
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

/// Returns whether a byte continues an unquoted identifier.
#[inline]
fn in_word(byte: u8) -> bool {
    IN_WORD[usize::from(byte)]
}

/// Class of a token's first byte.
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
