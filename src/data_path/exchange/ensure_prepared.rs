//! Prepares a client's named statement on the server that uses it.
//!
//! A statement that the server lacks is prepared again from its text. If a table or type has changed in the
//! meantime, its columns may differ from those that the client was told. PostgreSQL rejects that with 0A000,
//! and so does the proxy: the client's message waits until the server has described the statement. That costs
//! one round trip per statement and server, and only while the server lacks the statement.

use std::{ops::ControlFlow, sync::Arc};

use super::{
    client_messages::{ClientMessages, Handled},
    client_side::Flow,
    parse_under::ParseContext,
    pending_replies::{Origin, Request},
    prepare::Preparer,
    server_side::ServerSide,
};
use crate::{
    data_path::{
        prepared::{
            OnServer, SqlNames, Statement, parse_settings::ParseSettings, rename,
            row_description::has_fixed_meaning,
        },
        session_state::side_effects::SideEffects,
    },
    error::{Limit, RequestError},
    wire::{frame::cstr, message::append},
};

/// A name that no server has a statement for.
const MISSING_STATEMENT: &[u8] = b"pglobby__";

/// Whether a server has a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ensured {
    /// It has it, or a Parse is on its way.
    Present,
    /// The server is about to send its row description.
    Awaited,
    /// It has another row description there.
    Changed,
}

/// The message waits for pending replies.
pub(super) const AWAIT_REPLIES: Handled = Ok(ControlFlow::Break(WaitReason::Replies));

#[derive(Debug, Clone, Copy)]
pub(super) enum WaitReason {
    /// It chooses the tenant.
    Choice,
    /// Its meaning depends on pending replies.
    Replies,
    /// Too many replies are pending.
    Room,
}

impl ClientMessages<'_, '_> {
    /// `waits` are the bytes from the waiting message on. A Flush makes the server send its replies.
    #[cold]
    pub(super) fn hold(&mut self, reason: WaitReason, waits: Vec<u8>) -> Flow {
        match reason {
            WaitReason::Choice => Flow::ChoosesTenant(waits),
            WaitReason::Replies => {
                append(self.out.build(), b'H', |_| {});
                Flow::AwaitsReplies(waits)
            }
            WaitReason::Room => {
                append(self.out.build(), b'H', |_| {});
                Flow::Full(waits)
            }
        }
    }

    /// The statement of a client's Parse: shared with all sessions that have the same settings, unless it names
    /// another statement. Where the transaction has changed settings, it gets its own statement and the server
    /// is asked for its settings.
    pub(super) fn new_statement(
        &mut self,
        body: &[u8],
        side_effects: SideEffects,
        sql_names: Option<Arc<SqlNames>>,
    ) -> Arc<Statement> {
        let table = &self.rules.shared_statements;
        let is_known = self.server.parsing(self.under).is_some();
        if is_known || !has_fixed_meaning(cstr(&mut { body }).unwrap_or_default()) {
            let statement = match sql_names {
                // The same text can do something else: "PREPARE pglobby_7 …" first makes a statement, and is then
                // sent for PostgreSQL's error.
                Some(_) => table.own(body, self.under, side_effects, sql_names),
                None => table.intern(body, self.under, || side_effects),
            };
            self.server.checks.prepares(&statement);
            return statement;
        }
        let under = self.settings_now(Origin::Prepare);
        self.rules.shared_statements.own(body, &under, side_effects, sql_names)
    }

    /// The settings under which the next text is parsed. If they are unknown, the server is asked first.
    #[cold]
    pub(super) fn settings_now(&mut self, origin: Origin) -> Arc<ParseSettings> {
        let Preparer { replies, context, .. } = self.server.preparer(self.under, self.startup);
        match context.under {
            Some(under) => under.clone(),
            None => context.request_settings(origin, replies, self.out.build()),
        }
    }

    /// The statement `name` for use under the present settings. A shared statement whose settings have
    /// changed since its Parse becomes the session's own. `None`: the message must wait for pending replies.
    /// The error is the limit that one more copy of the text would exceed.
    #[inline]
    pub(super) fn usable_statement(
        &mut self,
        name: &[u8],
        statement: Arc<Statement>,
    ) -> Result<Option<Arc<Statement>>, Limit> {
        let is_same = !statement.is_shared
            || !statement.has_fixed_meaning
            || self
                .server
                .parsing(self.under)
                .is_some_and(|under| Arc::ptr_eq(under, &statement.parsed_under));
        if is_same { Ok(Some(statement)) } else { self.unshare(name, &statement) }
    }

    #[cold]
    fn unshare(&mut self, name: &[u8], shared: &Statement) -> Result<Option<Arc<Statement>>, Limit> {
        if self.server.replies.is_awaited() {
            return Ok(None);
        }
        self.rules.shared_statements.admits(shared.bytes())?;
        let own = self.rules.shared_statements.unshared(shared, &shared.parsed_under);
        self.statements.insert(name, own.clone());
        Ok(Some(own))
    }

    /// Prepares the statement on the server if it is not there. `name` is the client's name for it.
    #[inline]
    pub(super) fn ensure_statement(&mut self, name: &[u8], statement: &Arc<Statement>) -> Ensured {
        if self.statements.has_deferred() {
            if self.server.replies.may_have_others() {
                return Ensured::Awaited;
            }
            // The proxy answered its Parse before any server had received it.
            if self.statements.take_deferred(name) {
                let mut preparer = self.server.preparer(self.under, self.startup);
                preparer.prepare(statement, Some(name), Origin::Prepare, self.out.build());
                return Ensured::Present;
            }
        }
        if self.server.statements.find(statement, self.server.replies.batch()) == OnServer::Present {
            return Ensured::Present;
        }
        self.ensure_absent(name, statement)
    }

    #[cold]
    fn ensure_absent(&mut self, name: &[u8], statement: &Arc<Statement>) -> Ensured {
        let ServerSide { statements, replies, awaited_description, applied, checks, role, .. } =
            &mut *self.server;
        let context = ParseContext::new(self.under, self.startup, applied, checks, role, replies);
        let (_, changed) = awaited_description.take_if(|(awaited, _)| awaited.is(statement)).unzip();
        if changed == Some(true) {
            return Ensured::Changed;
        }
        let is_described = match statements.find(statement, replies.batch()) {
            // The same text under another name of the client.
            OnServer::Requested => replies.describes(statement, name),
            // The client does not know the description yet that another one would be compared with.
            _ if statement.is_description_checked
                && statement.description.get().is_none()
                && replies.is_awaited() =>
            {
                return Ensured::Awaited;
            }
            _ if replies.may_have_others() => return Ensured::Awaited,
            _ => {
                let mut preparer = Preparer::new(statements, replies, context);
                preparer.prepare(statement, None, Origin::Prepare, self.out.build())
            }
        };
        if !is_described || statement.description.get().is_none() || replies.takes_copy_data() {
            return Ensured::Present;
        }
        *awaited_description = Some((statement.clone(), false));
        Ensured::Awaited
    }

    /// Makes the server reject a Bind or Describe; the client gets PostgreSQL's error for a changed result.
    #[cold]
    pub(super) fn reject_changed(&mut self, request: Request, bytes: &[u8], at: usize, length: usize) {
        let _ = self.server.replies.track(request, Origin::Denied(RequestError::ResultChanged));
        rename(bytes, at, length, MISSING_STATEMENT, self.out.build());
    }

    /// Called before the session reads the list of prepared statements: the server gets exactly the session's
    /// own statements. Missing ones can be prepared only while no batch is open: `no_batch_open`.
    #[cold]
    pub(super) fn show_prepared_statements(&mut self, no_batch_open: bool) {
        self.statements.use_client_names(&self.rules.shared_statements);
        let ServerSide { replies, ours, .. } = &mut *self.server;
        ours.hide(replies, self.out.build());
        let mut preparer = self.server.preparer(self.under, self.startup);
        preparer.close_foreign_statements(self.statements, self.out.build());
        if no_batch_open {
            preparer.ensure_own(self.statements, false, self.out);
        }
    }

    /// Called before code runs that may EXECUTE the session's SQL PREPARE statements by name.
    #[cold]
    pub(super) fn show_statements_to_code(&mut self) {
        self.statements.use_client_names(&self.rules.shared_statements);
        let mut preparer = self.server.preparer(self.under, self.startup);
        preparer.ensure_own(self.statements, true, self.out);
    }
}
