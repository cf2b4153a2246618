//! A client's named statement is brought to the server that it is used on.
//!
//! Where the server lacks it, it is prepared there from the text; and if a table or a type has changed since the client
//! prepared it, it gives other columns than the client was told of. PostgreSQL refuses that (0A000), and so do we: what the
//! client sent waits until the server has told the statement's shape. That is a round trip for each statement and server,
//! and only while the server lacks it.

use std::sync::Arc;

use super::{requests::Requests, server_side::ServerSide};
use crate::{
    data_path::{
        lease::{Asked, Whose},
        prepared::{Found, Statement, rename},
        session_state::hide_setter,
    },
    error::Objection,
    wire::message::append,
};

/// No server has a statement of that name.
const NOBODYS: &[u8] = b"pglobby__";

/// How a server stands to a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Brought {
    /// It has it, or will have it in time.
    Here,
    /// It will say what shape it has there.
    Awaited,
    /// It has another shape there.
    Changed,
}

impl Requests<'_, '_> {
    /// Sees to it that the server has a statement that the client calls `name`.
    #[inline]
    pub(super) fn bring(&mut self, name: &[u8], statement: &Arc<Statement>) -> Brought {
        let ServerSide { statements: servers, lease, awaited, .. } = &mut *self.server;
        if self.statements.take_postponed(name) {
            servers.prepare_as(statement, Some(name), Whose::Follow, lease, self.out.build());
            return Brought::Here;
        }
        if awaited.is_some() {
            let (_, changed) = awaited.take_if(|(awaited, _)| awaited.is(statement)).unzip();
            if changed == Some(true) {
                return Brought::Changed;
            }
        }
        let shows = match servers.ensure(statement, lease, self.out) {
            Found::Known => return Brought::Here,
            // The same text by another of the client's names.
            Found::Asked => lease.shows_shape_of(statement, name),
            Found::Missing => true,
        };
        if !shows || statement.shape.get().is_none() || lease.takes_copy_data() {
            return Brought::Here;
        }
        *awaited = Some((statement.clone(), false));
        append(self.out.build(), b'H', |_| {});
        Brought::Awaited
    }

    /// The server is made to refuse a Bind or Describe of a statement, and its client hears why in PostgreSQL's words.
    #[cold]
    pub(super) fn refuse_changed(&mut self, asked: Asked, bytes: &[u8], at: usize, length: usize) {
        let _ = self.server.lease.ask(asked, Whose::Denied(Objection::ResultChanged));
        rename(bytes, at, length, NOBODYS, self.out.build());
    }

    /// The session is about to look at what is prepared, and must find its own statements and nobody else's. What the server
    /// lacks can only be brought to it while no batch is under way: `settled`.
    #[cold]
    pub(super) fn show_what_is_prepared(&mut self, settled: bool) {
        let ServerSide { statements, lease, has_setter, .. } = &mut *self.server;
        hide_setter(has_setter, lease, self.out.build());
        statements.hide_others(self.statements, lease, self.out.build());
        if settled {
            statements.show_own(self.statements, lease, self.out);
        }
    }
}
