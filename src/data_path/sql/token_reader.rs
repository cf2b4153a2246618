//! Goes through one statement token by token, for those whose details matter.

use std::{borrow::Cow, ops::Range};

use super::{
    Lexing, Name, identifiers,
    lexer::{Lexer, Token, TokenKind},
    statement_scan::is_word,
};

/// A statement's tokens with one token of lookahead.
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

    /// The token we stand at.
    pub fn token(&self) -> Token {
        self.token
    }

    /// Its bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.lexer.bytes(self.token)
    }

    pub fn advance(&mut self) {
        self.token = self.lexer.next();
    }

    pub fn at_end(&self) -> bool {
        self.token.kind == TokenKind::End
    }

    /// Whether we stand at this keyword (given in lower case).
    pub fn is(&self, word: &[u8]) -> bool {
        is_word(&self.lexer, self.token, word)
    }

    pub fn is_symbol(&self, symbol: u8) -> bool {
        self.token.kind == TokenKind::Symbol(symbol)
    }

    /// Steps over this keyword if we stand at it.
    pub fn eat(&mut self, word: &[u8]) -> bool {
        let found = self.is(word);
        if found {
            self.advance();
        }
        found
    }

    /// Steps over the first of these keywords that we stand at.
    pub fn eat_any(&mut self, words: &[&[u8]]) -> bool {
        words.iter().any(|word| self.eat(word))
    }

    pub fn eat_symbol(&mut self, symbol: u8) -> bool {
        let found = self.is_symbol(symbol);
        if found {
            self.advance();
        }
        found
    }

    /// Steps over all of these keywords if they come one after another, or over none.
    pub fn eat_all(&mut self, words: &[&[u8]]) -> bool {
        let mut ahead = *self;
        let found = words.iter().all(|word| ahead.eat(word));
        if found {
            *self = ahead;
        }
        found
    }

    /// Steps over a name, keywords not excepted.
    pub fn name(&mut self) -> Option<Cow<'a, [u8]>> {
        let name = identifiers::of_token(&self.lexer, self.token)?;
        self.advance();
        Some(name)
    }

    /// The same, with the place where it is written.
    pub fn placed_name(&mut self) -> Option<Name<'a>> {
        let range = self.token.start..self.token.end;
        self.name().map(|value| Name { value, range })
    }

    /// Steps over `a.b.c`; returns whether the first part is `pg_temp`, and the last part.
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

    /// Steps over a string literal. `None` where we stand at something else or its value cannot be told.
    pub fn literal(&mut self) -> Option<Cow<'a, [u8]>> {
        let text = identifiers::of_literal(&self.lexer, self.token)?;
        self.advance();
        Some(text)
    }

    /// Where we stand to the end.
    pub fn rest(&self) -> Range<usize> {
        self.token.start..self.lexer.sql().len()
    }

    /// The text of a range.
    pub fn text(&self, range: Range<usize>) -> &'a [u8] {
        self.lexer.sql().get(range).unwrap_or_default()
    }

    /// From `(` over its `)`: returns what is between. `None` if there is no `(` here.
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

    /// Goes on to this keyword outside parentheses, and over it. `false`, and at the end, where there is none.
    pub fn skip_past(&mut self, word: &[u8]) -> bool {
        loop {
            if self.is_symbol(b'(') {
                if self.parenthesised().is_none() {
                    return false;
                }
            } else if self.at_end() {
                return false;
            } else if self.eat(word) {
                return true;
            } else {
                self.advance();
            }
        }
    }
}
