//! A client's named statement is brought to the server that it is used on.
//!
//! Where the server lacks it, it is prepared there from the text; and if a table or a type has changed since the client
//! prepared it, it gives other columns than the client was told of. PostgreSQL refuses that (0A000), and so do we: what the
//! client sent waits until the server has told the statement's shape. That is a round trip for each statement and server,
//! and only while the server lacks it.

use std::{ops::ControlFlow, sync::Arc};

use super::{
    client_messages::ClientMessages,
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
    error::{ClientError, Limit, RequestError},
    wire::{frame::cstr, message::append},
};

/// No server has a statement of that name.
const NOBODYS: &[u8] = b"pglobby__";

/// How a server stands to a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ensured {
    /// It has it, or will have it in time.
    Present,
    /// It will say what shape it has there.
    Awaited,
    /// It has another shape there.
    Changed,
}

/// The message waits for answers that are owed.
pub(super) const AWAITS: Result<ControlFlow<WaitReason>, ClientError> =
    Ok(ControlFlow::Break(WaitReason::Replies));

/// Why a message must wait.
#[derive(Debug, Clone, Copy)]
pub(super) enum WaitReason {
    /// It chooses the tenant.
    Choice,
    /// What the server has been sent before it decides on what it means.
    Replies,
    /// So much has been sent that is not answered that no more is taken.
    Room,
}

impl ClientMessages<'_, '_> {
    /// `waits` begins with a message that must wait. Where it is for answers, the server is to send what it has.
    #[cold]
    pub(super) fn hold(&mut self, hold: WaitReason, waits: Vec<u8>) -> Flow {
        match hold {
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

    /// What a Parse of the client's makes: shared with whoever has the same settings, or its own where it has set something in
    /// this transaction. What it has set then the server is asked.
    pub(super) fn made(
        &mut self,
        body: &[u8],
        side_effects: SideEffects,
        naming: Option<Arc<SqlNames>>,
    ) -> Arc<Statement> {
        let is_known = self.server.parsing(self.under).is_some();
        if is_known || !has_fixed_meaning(cstr(&mut { body }).unwrap_or_default()) {
            let statement = self.rules.shared_statements.intern(body, self.under, || (side_effects, naming));
            self.server.checks.prepares(&statement);
            return statement;
        }
        let under = self.settings_now(Origin::Prepare);
        self.rules.shared_statements.own(body, &under, side_effects, naming)
    }

    /// Under what is parsed what comes next; if that is not known, the server is asked in front of it.
    #[cold]
    pub(super) fn settings_now(&mut self, origin: Origin) -> Arc<ParseSettings> {
        let Preparer { replies, context: here, .. } = self.server.preparer(self.under, self.startup);
        match here.under {
            Some(under) => under.clone(),
            None => here.ask(origin, replies, self.out.build()),
        }
    }

    /// The statement of that name that the client may use under its present settings: its own from now on where others use it
    /// under those of the time it was parsed. `None`: that waits for what is owed about it.
    ///
    /// # Errors
    /// The limit that one more copy of the text would exceed.
    #[inline]
    pub(super) fn alike(
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
        if is_same { Ok(Some(statement)) } else { self.part(name, &statement) }
    }

    #[cold]
    fn part(&mut self, name: &[u8], shared: &Statement) -> Result<Option<Arc<Statement>>, Limit> {
        if self.server.replies.is_awaited() {
            return Ok(None);
        }
        self.rules.shared_statements.memory.admits(shared.bytes())?;
        let own = self.rules.shared_statements.unshared(shared, &shared.parsed_under);
        self.statements.insert(name, own.clone());
        Ok(Some(own))
    }

    /// Sees to it that the server has a statement that the client calls `name`.
    #[inline]
    pub(super) fn ensure_statement(&mut self, name: &[u8], statement: &Arc<Statement>) -> Ensured {
        if self.statements.has_deferred() {
            if self.server.replies.may_have_others() {
                return Ensured::Awaited;
            }
            if self.statements.take_deferred(name) {
                self.ensure_postponed(name, statement);
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
        let ServerSide { statements, replies, sought, applied, checks, .. } = &mut *self.server;
        let here = ParseContext::new(self.under, self.startup, applied, checks, replies);
        let (_, changed) = sought.take_if(|(sought, _)| sought.is(statement)).unzip();
        if changed == Some(true) {
            return Ensured::Changed;
        }
        let shows = match statements.find(statement, replies.batch()) {
            // The same text by another of the client's names.
            OnServer::Requested => replies.describes(statement, name),
            // Its client is yet to be told the shape that another must be compared with.
            _ if statement.is_description_checked
                && statement.description.get().is_none()
                && replies.is_awaited() =>
            {
                return Ensured::Awaited;
            }
            _ if replies.may_have_others() => return Ensured::Awaited,
            _ => Preparer { statements, replies: replies, context: here }.prepare(
                statement,
                Origin::Prepare,
                self.out.build(),
            ),
        };
        if !shows || statement.description.get().is_none() || replies.takes_copy_data() {
            return Ensured::Present;
        }
        *sought = Some((statement.clone(), false));
        Ensured::Awaited
    }

    /// The client's Parse of a statement was answered before a server had seen it: it comes to the server now.
    #[cold]
    pub(super) fn ensure_postponed(&mut self, name: &[u8], statement: &Arc<Statement>) {
        let mut preparer = self.server.preparer(self.under, self.startup);
        preparer.prepare_as(statement, Some(name), Origin::Prepare, self.out.build());
    }

    /// The server is made to refuse a Bind or Describe of a statement, and its client hears why in PostgreSQL's words.
    #[cold]
    pub(super) fn refuse_changed(&mut self, asked: Request, bytes: &[u8], at: usize, length: usize) {
        let _ = self.server.replies.track(asked, Origin::Denied(RequestError::ResultChanged));
        rename(bytes, at, length, NOBODYS, self.out.build());
    }

    /// The session is about to look at what is prepared, and must find its own statements and nobody else's. What the server
    /// lacks can only be brought to it while no batch is under way: `settled`.
    #[cold]
    pub(super) fn show_what_is_prepared(&mut self, settled: bool) {
        self.statements.use_client_names(&self.rules.shared_statements);
        let ServerSide { replies, ours, .. } = &mut *self.server;
        ours.hide(replies, self.out.build());
        let mut preparer = self.server.preparer(self.under, self.startup);
        preparer.hide_others(self.statements, self.out.build());
        if settled {
            preparer.show_own(self.statements, false, self.out);
        }
    }

    /// Code is about to run that may EXECUTE, by its name, what the session has made by PREPARE.
    #[cold]
    pub(super) fn show_to_code(&mut self) {
        self.statements.use_client_names(&self.rules.shared_statements);
        let mut preparer = self.server.preparer(self.under, self.startup);
        preparer.show_own(self.statements, true, self.out);
    }
}
