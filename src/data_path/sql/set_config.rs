//! Calls of set_config, with those arguments that are literals or parameters.

use std::borrow::Cow;

use super::{
    Effects, Lexing, identifiers,
    lexer::{Lexer, TokenKind},
    set,
    token_reader::Reader,
};

/// A call of set_config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetConfig<'a> {
    /// The parameter; a literal is in lower case.
    pub name: Argument<'a>,
    /// The value; NULL resets the parameter.
    pub value: Argument<'a>,
    /// For this transaction only. `true`, `false` and `NULL` (false) become [`Argument::Boolean`].
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
    /// `$1`; the value is in Bind.
    Parameter(u16),
    /// Any other expression.
    Opaque,
}

/// Returns the effects of calling `name`; `lexer` is after the `(`. A state check can find a named dblink
/// connection, but not the unnamed one.
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

/// Iterator of [`super::Statement::set_configs`].
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
                // The arguments may contain another call, so continue directly after the name.
                self.reader.advance();
                return Some(found);
            }
            self.reader.advance();
        }
        None
    }
}

/// The parameter that pg_trgm's `set_limit` sets.
const SET_LIMIT: &[u8] = b"pg_trgm.similarity_threshold";

/// Parses `set_config(a, b, c)`.
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
        // The name may be readable although the value is not.
        None => Some(SetConfig { name: name_alone(*reader).unwrap_or(Argument::Opaque), ..opaque }),
    }
}

/// Returns the call if the text is only `SELECT [pg_catalog.]set_config(…)`.
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

/// Returns the first argument if it is a literal followed by a `,`.
fn name_alone(mut reader: Reader<'_>) -> Option<Argument<'_>> {
    match argument(&mut reader)? {
        Argument::Text(name) => reader.eat_symbol(b',').then_some(Argument::Text(set::canonical(name))),
        _ => None,
    }
}

/// Parses three arguments and the `)`. Returns `None` for another number of arguments.
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

/// Parses up to the next `,` or `)`. Returns [`Argument::Opaque`] for other expressions than one value.
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

/// Limits the time for nested calls, which would be quadratic otherwise.
const ARGUMENT_TOKENS_MAX: usize = 100;

/// Parses a literal or a parameter with an optional cast to a one-word type.
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

/// PostgreSQL's `boolin`.
pub(super) fn boolean(text: &[u8]) -> Option<bool> {
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
