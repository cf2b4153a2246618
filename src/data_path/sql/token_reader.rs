//! Reads one statement token by token.

use std::{borrow::Cow, ops::Range};

use super::{
    Lexing, Name, identifiers,
    lexer::{Lexer, Token, TokenKind},
    statement_scan::is_word,
};

/// The tokens of a statement, with one token of lookahead.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a> {
    lexer: Lexer<'a>,
    token: Token,
}

impl<'a> Reader<'a> {
    pub fn new(text: &'a [u8], lexing: Lexing) -> Self {
        let mut lexer = Lexer::new(text, lexing);
        let token = lexer.next();
        Self { lexer, token }
    }

    /// Returns the current token.
    pub fn token(&self) -> Token {
        self.token
    }

    /// Returns the bytes of the current token.
    pub fn bytes(&self) -> &'a [u8] {
        self.lexer.bytes(self.token)
    }

    pub fn advance(&mut self) {
        self.token = self.lexer.next();
    }

    pub fn at_end(&self) -> bool {
        self.token.kind == TokenKind::End
    }

    /// Returns whether the current token is this keyword (in lower case).
    pub fn is(&self, word: &[u8]) -> bool {
        is_word(&self.lexer, self.token, word)
    }

    pub fn is_symbol(&self, symbol: u8) -> bool {
        self.token.kind == TokenKind::Symbol(symbol)
    }

    /// Consumes this keyword. Returns `false` if another token comes.
    pub fn eat(&mut self, word: &[u8]) -> bool {
        let found = self.is(word);
        if found {
            self.advance();
        }
        found
    }

    /// Consumes one of these keywords. Returns `false` if none comes.
    pub fn eat_any(&mut self, words: &[&[u8]]) -> bool {
        words.iter().any(|word| self.eat(word))
    }

    /// Consumes one of these keywords and returns what stands for it.
    pub fn eat_one_of<T: Copy>(&mut self, words: &[(&[u8], T)]) -> Option<T> {
        words.iter().find(|(word, _)| self.eat(word)).map(|(_, meant)| *meant)
    }

    pub fn eat_symbol(&mut self, symbol: u8) -> bool {
        let found = self.is_symbol(symbol);
        if found {
            self.advance();
        }
        found
    }

    /// Consumes all of these keywords in order, or none.
    pub fn eat_all(&mut self, words: &[&[u8]]) -> bool {
        let mut ahead = *self;
        let found = words.iter().all(|word| ahead.eat(word));
        if found {
            *self = ahead;
        }
        found
    }

    /// Consumes a name, which may be a keyword.
    pub fn name(&mut self) -> Option<Cow<'a, [u8]>> {
        let name = identifiers::of_token(&self.lexer, self.token)?;
        self.advance();
        Some(name)
    }

    /// Consumes a name and returns its place too.
    pub fn placed_name(&mut self) -> Option<Name<'a>> {
        let range = self.token.start..self.token.end;
        self.name().map(|value| Name { value, range })
    }

    /// Consumes `a.b.c`. Returns whether the schema is temporary, and the last part.
    pub fn qualified_name(&mut self) -> Option<(bool, Cow<'a, [u8]>)> {
        let first = self.name()?;
        let mut last = None;
        while self.eat_symbol(b'.') {
            last = Some(self.name()?);
        }
        match last {
            Some(last) => Some((first.starts_with(b"pg_temp"), last)),
            None => Some((false, first)),
        }
    }

    /// Consumes a string literal. Returns `None` for other tokens and for values that cannot be decoded.
    pub fn literal(&mut self) -> Option<Cow<'a, [u8]>> {
        let text = identifiers::of_literal(&self.lexer, self.token)?;
        self.advance();
        Some(text)
    }

    /// Returns the range from the current token to the end.
    pub fn rest(&self) -> Range<usize> {
        self.token.start..self.lexer.sql().len()
    }

    /// Returns the text of a range.
    pub fn text(&self, range: Range<usize>) -> &'a [u8] {
        self.lexer.sql().get(range).unwrap_or_default()
    }

    /// Consumes `(…)` and returns the range between the parentheses; `None` if no `(` comes.
    pub fn parenthesised(&mut self) -> Option<Range<usize>> {
        if !self.eat_symbol(b'(') {
            return None;
        }
        let start = self.token.start;
        let mut depth = 1usize;
        loop {
            match self.token.kind {
                TokenKind::End => return None,
                TokenKind::Symbol(b'(') => depth += 1,
                TokenKind::Symbol(b')') => depth -= 1,
                _ => {}
            }
            let end = self.token.start;
            self.advance();
            if depth == 0 {
                return Some(start..end);
            }
        }
    }

    /// Consumes up to and including this keyword outside parentheses. Returns `false` if it does not occur.
    pub fn skip_past(&mut self, word: &[u8]) -> bool {
        self.skip_until(|reader| reader.eat(word))
    }

    /// The same for a symbol.
    pub fn skip_past_symbol(&mut self, symbol: u8) -> bool {
        self.skip_until(|reader| reader.eat_symbol(symbol))
    }

    fn skip_until(&mut self, found: impl Fn(&mut Self) -> bool) -> bool {
        loop {
            if self.is_symbol(b'(') {
                if self.parenthesised().is_none() {
                    return false;
                }
            } else if self.at_end() {
                return false;
            } else if found(self) {
                return true;
            } else {
                self.advance();
            }
        }
    }
}
