//! Splits a text into words, quoted strings and symbols: the tokenizer of the admin console.

use std::borrow::Cow;

use super::{
    Lexing, identifiers,
    lexer::{Lexer, TokenKind},
};

/// A token of a console command. Must not be logged, because it may be a password.
#[derive(Clone, PartialEq, Eq)]
pub enum Piece {
    /// A word as written, including `-`, `.` and `@`: `my-shop` and `bob@example.com` are one word.
    Word(String),
    /// The content of `"…"`, `'…'` or `$$…$$`.
    Quoted(String),
    /// Any other character.
    Symbol(char),
}

/// Splits `text`, without white space and comments. The error is `string` or `comment` that does not end.
pub fn pieces(text: &str) -> Result<Vec<Piece>, &'static str> {
    let mut lexer = Lexer::new(text.as_bytes(), Lexing::default());
    let (mut pieces, mut word_end) = (Vec::new(), None);
    loop {
        let token = lexer.next();
        if token.kind == TokenKind::End {
            return lexer.unterminated().map_or(Ok(pieces), Err);
        }
        let bytes = lexer.bytes(token);
        let content = match token.kind {
            TokenKind::QuotedName => bytes.get(1..).map(|rest| identifiers::doubled(rest, b'"')),
            _ => identifiers::of_literal(&lexer, token),
        };
        if let Some(content) = content {
            pieces.push(Piece::Quoted(owned(content)));
            word_end = None;
        } else if bytes.iter().all(|byte| is_of_word(*byte)) {
            let part = String::from_utf8_lossy(bytes);
            match pieces.last_mut() {
                Some(Piece::Word(word)) if word_end == Some(token.start) => word.push_str(&part),
                _ => pieces.push(Piece::Word(part.into_owned())),
            }
            word_end = Some(token.end);
        } else {
            pieces.extend(String::from_utf8_lossy(bytes).chars().next().map(Piece::Symbol));
        }
    }
}

fn owned(content: Cow<'_, [u8]>) -> String {
    String::from_utf8_lossy(&content).into_owned()
}

fn is_of_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte >= 128 || matches!(byte, b'_' | b'-' | b'.' | b'@' | b'$')
}
