//! Effects of PREPARE and DEALLOCATE in a client's SQL, applied when they succeed. Pure.

use std::{collections::VecDeque, sync::Arc};

use super::{ClientStatements, ServerStatements, Statement, StatementName};
use crate::wire::{
    frame::{HEADER_BYTES, cstr},
    message::{append, append_cstr},
};

/// The effect of one statement.
#[derive(Debug, Clone)]
pub enum PrepareEffect {
    /// PREPARE.
    Prepares(StatementName),
    /// DEALLOCATE; `None` if the session has no statement of that name.
    Deallocates(Option<StatementName>),
}

/// The effects of a text in order, and where the proxy replaced names in it.
#[derive(Debug, Clone, Default)]
pub struct PrepareEffects {
    /// Effects of statements that have not completed.
    pub effects: VecDeque<PrepareEffect>,
    /// Position of each replaced name, and by how many characters the text after it has become longer.
    pub shifts: Vec<(usize, isize)>,
}

impl PrepareEffects {
    /// Returns the statements that the text prepares.
    pub fn prepared(&self) -> impl Iterator<Item = &Arc<Statement>> {
        self.effects.iter().filter_map(PrepareEffect::prepares).map(|named| &named.statement)
    }

    /// Whether one of the effects is on the statement that the client calls `name`.
    pub fn concerns(&self, name: &[u8]) -> bool {
        self.effects.iter().any(|effect| match effect {
            PrepareEffect::Prepares(named) | PrepareEffect::Deallocates(Some(named)) => named.is_called(name),
            PrepareEffect::Deallocates(None) => false,
        })
    }

    /// Assumes that a PREPARE succeeds if the client does not use the name yet.
    pub fn expect(&self, client: &mut ClientStatements, server: &mut ServerStatements) {
        for named in self.effects.iter().filter_map(PrepareEffect::prepares) {
            server.expected(&named.statement);
            if let Some(name) = named.client_name.as_deref().filter(|name| client.get(name).is_none()) {
                client.insert(name, named.statement.clone());
            }
        }
    }

    /// Applies the next effect when its CommandComplete arrives.
    pub fn done(&mut self, client: &mut ClientStatements, server: &mut ServerStatements) {
        match self.effects.pop_front() {
            Some(PrepareEffect::Prepares(named)) => {
                server.expected(&named.statement);
                server.confirmed(&named.statement);
                if let Some(name) = &named.client_name {
                    client.insert(name, named.statement.clone());
                }
            }
            Some(PrepareEffect::Deallocates(Some(StatementName { client_name: Some(name), statement }))) => {
                client.remove(&name);
                server.remove(&statement);
            }
            _ => {}
        }
    }

    /// Reverts the remaining effects, which failed or were skipped.
    pub fn revert(self, client: &mut ClientStatements, server: &mut ServerStatements) {
        for named in self.effects.iter().filter_map(PrepareEffect::prepares) {
            server.failed(&named.statement);
            if let Some(name) = &named.client_name
                && client.get(name).is_some_and(|current| current.is(&named.statement))
            {
                client.remove(name);
            }
        }
    }
}

impl PrepareEffect {
    fn prepares(&self) -> Option<&StatementName> {
        match self {
            Self::Prepares(named) => Some(named),
            Self::Deallocates(_) => None,
        }
    }
}

/// What follows the text of a PREPARE in a Parse: the text's end, and no parameters.
pub const END_OF_PREPARE: &[u8] = &[0, 0, 0];

/// Prefix of all statement names that the proxy chooses.
pub const OUR_PREFIX: &[u8] = b"pglobby_";

/// Escapes a client's statement name that starts with `pglobby_`.
pub fn escape_client_name(name: &[u8]) -> Option<Vec<u8>> {
    name.strip_prefix(OUR_PREFIX).map(|rest| [OUR_PREFIX, b"_", rest].concat())
}

/// Rewrites an ErrorResponse: restores the client's statement name and its position in the client's text.
/// Returns `None` if nothing changes.
#[cold]
pub fn with_client_names(
    error: &[u8],
    shifts: &[(usize, isize)],
    name_of: impl Fn(&[u8]) -> Option<Vec<u8>>,
) -> Option<Vec<u8>> {
    let mut changed = false;
    let mut body = error.get(HEADER_BYTES..)?;
    let mut fields = Vec::new();
    while let Some((&field, rest)) = body.split_first().filter(|(field, _)| **field != 0) {
        body = rest;
        let value = cstr(&mut body).ok()?;
        let new = match field {
            b'M' => renamed(value, &name_of),
            b'P' if !shifts.is_empty() => moved(value, shifts),
            _ => None,
        };
        changed |= new.is_some();
        fields.push((field, new.unwrap_or_else(|| value.to_vec())));
    }
    changed.then(|| {
        let mut message = Vec::new();
        append(&mut message, b'E', |out| {
            for (field, value) in &fields {
                out.push(*field);
                append_cstr(out, value);
            }
            out.push(0);
        });
        message
    })
}

/// Removes the position from an ErrorResponse about a text that the client did not send.
pub fn without_position(error: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    append(&mut message, b'E', |out| {
        let mut body = error.get(HEADER_BYTES..).unwrap_or_default();
        while let Some((&field, rest)) = body.split_first().filter(|(field, _)| **field != 0) {
            body = rest;
            let Ok(value) = cstr(&mut body) else { break };
            if field != b'P' {
                out.push(field);
                append_cstr(out, value);
            }
        }
        out.push(0);
    });
    message
}

/// Restores the name in a message such as `prepared statement "pglobby_7" does not exist`, in any language.
fn renamed(text: &[u8], name_of: impl Fn(&[u8]) -> Option<Vec<u8>>) -> Option<Vec<u8>> {
    let start = text.windows(OUR_PREFIX.len()).position(|window| window == OUR_PREFIX)?;
    let length = text.get(start..)?.iter().take_while(|byte| !matches!(**byte, b'"' | b' ' | b'\'')).count();
    let ours = text.get(start..start + length)?;
    let name = match ours.strip_prefix(OUR_PREFIX)?.strip_prefix(b"_") {
        Some(rest) => [OUR_PREFIX, rest].concat(),
        None => name_of(ours)?,
    };
    Some([text.get(..start)?, &name, text.get(start + length..)?].concat())
}

fn moved(position: &[u8], shifts: &[(usize, isize)]) -> Option<Vec<u8>> {
    let position: usize = std::str::from_utf8(position).ok()?.parse().ok()?;
    let behind = shifts.iter().filter(|(at, _)| *at < position).map(|(_, by)| by).sum::<isize>();
    Some(position.checked_add_signed(-behind)?.to_string().into_bytes())
}
