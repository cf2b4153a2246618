//! Calls whose arguments matter: those of set_config in a statement, with their arguments where the text tells them.

use std::borrow::Cow;

use super::{
    Effects, Lexing, identifiers,
    lexer::{Lexer, TokenKind},
    set,
    token_reader::Reader,
};

/// One call of set_config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetConfig<'a> {
    /// The parameter: a literal is in lower case.
    pub name: Argument<'a>,
    /// Its value; NULL resets it.
    pub value: Argument<'a>,
    /// Whether for this transaction only: `true`, `false` and `NULL` (which is false) come as [`Argument::Boolean`].
    pub local: Argument<'a>,
}

/// An argument of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Argument<'a> {
    /// A string literal.
    Text(Cow<'a, [u8]>),
    /// TRUE or FALSE.
    Boolean(bool),
    /// NULL.
    Null,
    /// `$1`, which Bind says.
    Parameter(u16),
    /// Anything else.
    Opaque,
}

/// What a call of `name` may do, whose `(` has just been read. A connection of dblink that is given a name can be asked about.
#[inline]
pub(super) fn effects(name: &[u8], lexer: &Lexer<'_>) -> Effects {
    let effects = Effects::of_call(name);
    let is_named =
        effects == Effects::FUNCTION_STATE && name.first().is_some_and(|first| first | 0x20 == b'd');
    if is_named && has_two_arguments(*lexer) { Effects::DBLINK } else { effects }
}

#[cold]
fn has_two_arguments(mut lexer: Lexer<'_>) -> bool {
    let (mut depth, mut commas) = (0usize, 0);
    loop {
        match lexer.next().kind {
            TokenKind::End => return false,
            TokenKind::Symbol(b'(' | b'[') => depth += 1,
            TokenKind::Symbol(b')') if depth == 0 => return commas == 1,
            TokenKind::Symbol(b')' | b']') => depth = depth.saturating_sub(1),
            TokenKind::Symbol(b',') if depth == 0 => commas += 1,
            _ => {}
        }
    }
}

/// See [`super::Statement::set_configs`].
#[derive(Debug, Clone)]
pub struct SetConfigs<'a> {
    reader: Reader<'a>,
}

impl<'a> SetConfigs<'a> {
    pub(super) fn new(text: &'a [u8], lexing: Lexing) -> Self {
        Self { reader: Reader::new(text, lexing) }
    }
}

impl<'a> Iterator for SetConfigs<'a> {
    type Item = SetConfig<'a>;

    fn next(&mut self) -> Option<SetConfig<'a>> {
        while !self.reader.at_end() {
            let mut ahead = self.reader;
            if let Some(found) = call(&mut ahead) {
                // Another may be among its arguments: go on behind its name only.
                self.reader.advance();
                return Some(found);
            }
            self.reader.advance();
        }
        None
    }
}

/// What `set_limit` of pg_trgm sets.
const SET_LIMIT: &[u8] = b"pg_trgm.similarity_threshold";

/// `set_config(a, b, c)`, and steps over it.
fn call<'a>(reader: &mut Reader<'a>) -> Option<SetConfig<'a>> {
    let name = reader.name()?;
    if !Effects::of_call(&name).contains(Effects::SET_CONFIG) || !reader.eat_symbol(b'(') {
        return None;
    }
    let opaque = SetConfig { name: Argument::Opaque, value: Argument::Opaque, local: Argument::Opaque };
    if *name != *b"set_config" {
        return Some(SetConfig { name: Argument::Text(SET_LIMIT.into()), ..opaque });
    }
    let mut ahead = *reader;
    let found = arguments(&mut ahead);
    match found {
        Some(found) => {
            *reader = ahead;
            Some(found)
        }
        // The name may be told though the value is not.
        None => Some(SetConfig { name: name_alone(*reader).unwrap_or(Argument::Opaque), ..opaque }),
    }
}

/// `SELECT [pg_catalog.]set_config(…)`, if that is all there is.
pub(super) fn lone<'a>(text: &'a [u8], lexing: Lexing) -> Option<SetConfig<'a>> {
    let mut reader = Reader::new(text, lexing);
    if !reader.eat(b"select") {
        return None;
    }
    if reader.eat(b"pg_catalog") {
        reader.eat_symbol(b'.');
    }
    let found = call(&mut reader)?;
    reader.at_end().then_some(found)
}

/// The first argument, where it is a literal that a `,` follows.
fn name_alone(mut reader: Reader<'_>) -> Option<Argument<'_>> {
    match argument(&mut reader)? {
        Argument::Text(name) => reader.eat_symbol(b',').then_some(Argument::Text(set::canonical(name))),
        _ => None,
    }
}

/// Three arguments and the `)`. `None` if there are others.
fn arguments<'a>(reader: &mut Reader<'a>) -> Option<SetConfig<'a>> {
    let name = match whole_argument(reader)? {
        Argument::Text(name) => Argument::Text(set::canonical(name)),
        other => other,
    };
    let value = reader.eat_symbol(b',').then(|| whole_argument(reader))??;
    let local = match reader.eat_symbol(b',').then(|| whole_argument(reader))?? {
        Argument::Null => Argument::Boolean(false),
        Argument::Text(text) => boolean(&text).map_or(Argument::Opaque, Argument::Boolean),
        other => other,
    };
    reader.eat_symbol(b')').then_some(SetConfig { name, value, local })
}

/// All that is before the next `,` or `)`: opaque if it is more than a literal or a parameter.
fn whole_argument<'a>(reader: &mut Reader<'a>) -> Option<Argument<'a>> {
    let ends = |reader: &Reader<'_>| reader.is_symbol(b',') || reader.is_symbol(b')');
    let mut ahead = *reader;
    if let Some(found) = argument(&mut ahead)
        && ends(&ahead)
    {
        *reader = ahead;
        return Some(found);
    }
    let mut depth = 0usize;
    for _ in 0..ARGUMENT_TOKENS_MAX {
        if depth == 0 && ends(reader) {
            return Some(Argument::Opaque);
        }
        match reader.token().kind {
            TokenKind::End => return None,
            TokenKind::Symbol(b'(' | b'[') => depth += 1,
            TokenKind::Symbol(b')' | b']') => depth = depth.saturating_sub(1),
            _ => {}
        }
        reader.advance();
    }
    None
}

/// Calls may stand within calls: reading each to its end would take time that grows with the square of the text.
const ARGUMENT_TOKENS_MAX: usize = 100;

/// A literal or a parameter, cast to a type of one word perhaps.
fn argument<'a>(reader: &mut Reader<'a>) -> Option<Argument<'a>> {
    let found = if reader.eat(b"null") {
        Argument::Null
    } else if reader.eat(b"true") {
        Argument::Boolean(true)
    } else if reader.eat(b"false") {
        Argument::Boolean(false)
    } else if reader.token().kind == TokenKind::Parameter {
        let digits = std::str::from_utf8(reader.bytes().get(1..)?).ok()?;
        reader.advance();
        Argument::Parameter(digits.parse().ok()?)
    } else {
        Argument::Text(reader.literal()?)
    };
    if reader.eat_symbol(b':') {
        let harmless = reader.eat_symbol(b':') && reader.eat_any(&[b"text", b"varchar", b"bool", b"boolean"]);
        return harmless.then_some(found);
    }
    Some(found)
}

/// What boolin makes of a string.
fn boolean(text: &[u8]) -> Option<bool> {
    let text = identifiers::folded(text.trim_ascii());
    let starts = |whole: &[u8]| !text.is_empty() && whole.starts_with(&text);
    match &*text {
        b"1" | b"on" => Some(true),
        b"0" | b"of" | b"off" => Some(false),
        _ if starts(b"true") || starts(b"yes") => Some(true),
        _ if starts(b"false") || starts(b"no") => Some(false),
        _ => None,
    }
}
