//! What PREPARE and DEALLOCATE in a client's text do to its statements, once they have succeeded. Pure.

use std::{collections::VecDeque, sync::Arc};

use super::{ClientStatements, Naming, ServerStatements, Statement};
use crate::wire::{
    frame::{HEADER_BYTES, cstr},
    message::{append, append_cstr},
};

/// One statement's.
#[derive(Debug, Clone)]
pub enum Deed {
    /// PREPARE.
    Prepares(Naming),
    /// DEALLOCATE; `None` where the name is no statement of the session's.
    Forgets(Option<Naming>),
}

/// Those of a text, in order, and where names in it were replaced.
#[derive(Debug, Clone, Default)]
pub struct Deeds {
    /// What is yet to succeed.
    pub list: VecDeque<Deed>,
    /// Places behind which the text that the server got is so much longer than the client's, in characters.
    pub shifts: Vec<(usize, isize)>,
}

impl Deeds {
    /// The statements that it prepares.
    pub fn prepared(&self) -> impl Iterator<Item = &Arc<Statement>> {
        self.list.iter().filter_map(Deed::prepares).map(|naming| &naming.statement)
    }

    /// The PREPAREs, as far as the client has no statement of that name: it has now, unless they fail.
    pub fn expect(&self, client: &mut ClientStatements, server: &mut ServerStatements) {
        for naming in self.list.iter().filter_map(Deed::prepares) {
            server.expected(&naming.statement);
            if let Some(name) = naming.client_name.as_deref().filter(|name| client.get(name).is_none()) {
                client.insert(name, naming.statement.clone());
            }
        }
    }

    /// A PREPARE or a DEALLOCATE has succeeded, by its command tag.
    pub fn done(&mut self, client: &mut ClientStatements, server: &mut ServerStatements) {
        match self.list.pop_front() {
            Some(Deed::Prepares(naming)) => {
                server.expected(&naming.statement);
                server.confirmed(&naming.statement);
                if let Some(name) = &naming.client_name {
                    client.insert(name, naming.statement.clone());
                }
            }
            Some(Deed::Forgets(Some(Naming { client_name: Some(name), statement }))) => {
                client.remove(&name);
                server.deallocated(&statement);
            }
            _ => {}
        }
    }

    /// The rest failed or was skipped.
    pub fn undone(self, client: &mut ClientStatements, server: &mut ServerStatements) {
        for naming in self.list.iter().filter_map(Deed::prepares) {
            server.failed(&naming.statement);
            if let Some(name) = &naming.client_name
                && client.get(name).is_some_and(|known| known.is(&naming.statement))
            {
                client.remove(name);
            }
        }
    }
}

impl Deed {
    fn prepares(&self) -> Option<&Naming> {
        match self {
            Self::Prepares(naming) => Some(naming),
            Self::Forgets(_) => None,
        }
    }
}

/// How all our names for statements begin.
pub const OUR_PREFIX: &[u8] = b"pglobby_";

/// A name of the client's that no statement has, and that must not be taken for one of ours: what servers call it instead.
pub fn disowned(name: &[u8]) -> Option<Vec<u8>> {
    name.strip_prefix(OUR_PREFIX).map(|rest| [OUR_PREFIX, b"_", rest].concat())
}

/// An ErrorResponse in which our name for a statement is the client's again, and the position is one in the client's text;
/// `None` if there is nothing to change.
#[cold]
pub fn in_the_clients_words(
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

/// An ErrorResponse about a text that the client did not send: a place in it means nothing to the client.
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

/// `prepared statement "pglobby_7" does not exist`, in any language.
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
