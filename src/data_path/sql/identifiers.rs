//! Values of identifiers and string literals.

use std::borrow::Cow;

use super::{
    Lexing,
    lexer::{Lexer, Token, TokenKind, continued},
    words::NAME_BYTES_MAX,
};

/// Returns the name of a word or quoted identifier: folded to lower case unless quoted, truncated to 63
/// bytes. `None` for other tokens and for invalid escapes.
pub(super) fn of_token<'a>(lexer: &Lexer<'a>, token: Token) -> Option<Cow<'a, [u8]>> {
    let bytes = lexer.bytes(token);
    let whole = match token.kind {
        TokenKind::Word => folded(bytes),
        TokenKind::QuotedName => doubled(bytes.get(1..)?, b'"'),
        TokenKind::UnicodeName => Cow::Owned(unicode_escapes(&doubled(bytes.get(3..)?, b'"'))?),
        _ => return None,
    };
    Some(cut(whole))
}

/// Returns the value of a string literal. `None` for other tokens, for invalid escapes or those whose meaning
/// depends on the PostgreSQL version, and for `U&'…'` (its escape character may follow later).
pub(super) fn of_literal<'a>(lexer: &Lexer<'a>, token: Token) -> Option<Cow<'a, [u8]>> {
    let bytes = lexer.bytes(token);
    match token.kind {
        TokenKind::Text => Some(text_segments(bytes.get(1..)?)),
        TokenKind::EscapedText => {
            let quote = bytes.iter().position(|byte| *byte == b'\'')?;
            backslash_escapes(bytes.get(quote + 1..)?)
        }
        TokenKind::DollarText => Some(Cow::Borrowed(dollar_body(bytes)?)),
        _ => None,
    }
}

/// Returns the content of a dollar-quoted string.
pub(super) fn dollar_body(bytes: &[u8]) -> Option<&[u8]> {
    let tag = 2 + bytes.get(1..)?.iter().position(|byte| *byte == b'$')?;
    bytes.get(tag..bytes.len().checked_sub(tag)?)
}

/// Folds ASCII letters to lower case, as a server does in a UTF-8 database.
pub(super) fn folded(bytes: &[u8]) -> Cow<'_, [u8]> {
    if bytes.iter().any(u8::is_ascii_uppercase) {
        Cow::Owned(bytes.to_ascii_lowercase())
    } else {
        Cow::Borrowed(bytes)
    }
}

/// Truncates a name at a character boundary, as the server does (assumes UTF-8).
fn cut(name: Cow<'_, [u8]>) -> Cow<'_, [u8]> {
    if name.len() <= NAME_BYTES_MAX {
        return name;
    }
    let mut end = NAME_BYTES_MAX;
    while end > 0 && name[end] & 0xC0 == 0x80 {
        end -= 1;
    }
    match name {
        Cow::Borrowed(name) => Cow::Borrowed(&name[..end]),
        Cow::Owned(mut name) => {
            name.truncate(end);
            Cow::Owned(name)
        }
    }
}

/// Returns the text up to the closing quote, doubled ones decoded. `bytes` starts after the opening quote.
pub(super) fn doubled(bytes: &[u8], quote: u8) -> Cow<'_, [u8]> {
    let body = bytes.strip_suffix(&[quote]).unwrap_or(bytes);
    if !body.contains(&quote) {
        return Cow::Borrowed(body);
    }
    let mut name = Vec::with_capacity(body.len());
    let mut rest = body.iter();
    while let Some(byte) = rest.next() {
        name.push(*byte);
        if *byte == quote {
            rest.next();
        }
    }
    Cow::Owned(name)
}

/// Decodes `'…'` without escapes, in one or more segments. `bytes` starts after the first quote.
fn text_segments(bytes: &[u8]) -> Cow<'_, [u8]> {
    match bytes.iter().position(|byte| *byte == b'\'') {
        Some(end) if end + 1 == bytes.len() => Cow::Borrowed(&bytes[..end]),
        None => Cow::Borrowed(bytes),
        _ => {
            let mut text = Vec::with_capacity(bytes.len());
            let mut at = 0;
            while let Some(&byte) = bytes.get(at) {
                if byte != b'\'' {
                    text.push(byte);
                    at += 1;
                } else if bytes.get(at + 1) == Some(&b'\'') {
                    text.push(byte);
                    at += 2;
                } else {
                    let Some(next) = continued(bytes, at + 1) else { break };
                    at = next;
                }
            }
            Cow::Owned(text)
        }
    }
}

/// Decodes `E'…'`. `bytes` starts after the first quote.
fn backslash_escapes(bytes: &[u8]) -> Option<Cow<'_, [u8]>> {
    if !bytes.contains(&b'\\') {
        return Some(text_segments(bytes));
    }
    let mut text = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        match byte {
            b'\'' if bytes.get(at) == Some(&b'\'') => {
                text.push(byte);
                at += 1;
            }
            b'\'' => match continued(bytes, at) {
                Some(next) => at = next,
                None => break,
            },
            b'\\' => at = one_escape(bytes, at, &mut text)?,
            _ => text.push(byte),
        }
    }
    Some(Cow::Owned(text))
}

/// Decodes one escape, starting after the backslash. Returns the index of its end.
fn one_escape(bytes: &[u8], at: usize, text: &mut Vec<u8>) -> Option<usize> {
    let digits = |from: usize, most: usize, radix: u32| {
        let rest = bytes.get(from..)?;
        let length = rest.iter().take(most).take_while(|byte| char::from(**byte).is_digit(radix)).count();
        let digits = std::str::from_utf8(&rest[..length]).ok()?;
        Some((u32::from_str_radix(digits, radix).ok()?, length))
    };
    let byte = *bytes.get(at)?;
    match byte {
        b'b' => text.push(8),
        b'f' => text.push(12),
        b'n' => text.push(10),
        b'r' => text.push(13),
        b't' => text.push(9),
        // Means `v` before PostgreSQL 18 and a vertical tab since.
        b'v' => return None,
        b'0'..=b'7' => {
            let (value, length) = digits(at, 3, 8)?;
            // As in scan.l: only the lower eight bits count.
            text.push(value.to_le_bytes()[0]);
            return Some(at + length);
        }
        b'x' if bytes.get(at + 1).is_some_and(u8::is_ascii_hexdigit) => {
            let (value, length) = digits(at + 1, 2, 16)?;
            text.push(value.to_le_bytes()[0]);
            return Some(at + 1 + length);
        }
        b'u' | b'U' => {
            let wanted = if byte == b'u' { 4 } else { 8 };
            let (value, length) = digits(at + 1, wanted, 16)?;
            // Surrogate pairs are not decoded: they do not occur in parameter values.
            let character = char::from_u32(value).filter(|_| length == wanted)?;
            text.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
            return Some(at + 1 + wanted);
        }
        _ => text.push(byte),
    }
    Some(at + 1)
}

/// Decodes the escapes of `U&"…"`: `\0041`, `\+000041` and `\\`.
fn unicode_escapes(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut name = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        if byte != b'\\' {
            name.push(byte);
            continue;
        }
        let (from, length) = match bytes.get(at)? {
            b'\\' => {
                name.push(b'\\');
                at += 1;
                continue;
            }
            b'+' => (at + 1, 6),
            _ => (at, 4),
        };
        let digits = std::str::from_utf8(bytes.get(from..from + length)?).ok()?;
        let character = char::from_u32(u32::from_str_radix(digits, 16).ok()?)?;
        name.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
        at = from + length;
    }
    Some(name)
}

/// Iterates over the object names of a DROP.
#[derive(Debug, Clone)]
pub struct QualifiedNames<'a> {
    lexer: Lexer<'a>,
}

/// A name with an optional schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QualifiedName<'a> {
    /// The schema, if written.
    pub schema: Option<Cow<'a, [u8]>>,
    /// The name.
    pub name: Cow<'a, [u8]>,
}

impl<'a> QualifiedNames<'a> {
    pub(super) fn new(text: &'a [u8], lexing: Lexing) -> Self {
        Self { lexer: Lexer::new(text, lexing) }
    }
}

impl<'a> Iterator for QualifiedNames<'a> {
    type Item = QualifiedName<'a>;

    fn next(&mut self) -> Option<QualifiedName<'a>> {
        let mut schema = None;
        let token = self.lexer.next();
        let mut name = of_token(&self.lexer, token)?;
        loop {
            match self.lexer.next().kind {
                TokenKind::Symbol(b'.') => {
                    let token = self.lexer.next();
                    schema = Some(std::mem::replace(&mut name, of_token(&self.lexer, token)?));
                }
                TokenKind::Symbol(b',') => break,
                _ => {
                    // CASCADE, RESTRICT, an argument list or the end.
                    self.lexer = Lexer::new(&[], Lexing::default());
                    break;
                }
            }
        }
        Some(QualifiedName { schema, name })
    }
}

impl PartialEq for QualifiedNames<'_> {
    fn eq(&self, other: &Self) -> bool {
        Iterator::eq(self.clone(), other.clone())
    }
}

impl Eq for QualifiedNames<'_> {}
