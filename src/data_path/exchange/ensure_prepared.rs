//! A client's named statement is brought to the server that it is used on.
//!
//! Where the server lacks it, it is prepared there from the text; and if a table or a type has changed since the client
//! prepared it, it gives other columns than the client was told of. PostgreSQL refuses that (0A000), and so do we: what the
//! client sent waits until the server has told the statement's shape. That is a round trip for each statement and server,
//! and only while the server lacks it.

use std::{ops::ControlFlow, sync::Arc};

use super::{
    client_messages::Requests,
    client_side::Flow,
    parse_under::Here,
    pending_replies::{Asked, Whose},
    prepare::Preparer,
    server_side::ServerSide,
};
use crate::{
    data_path::{
        prepared::{
            Found, SqlNames, Statement, parse_settings::ParseSettings, rename,
            row_description::is_parsed_once,
        },
        session_state::side_effects::Aftermath,
    },
    error::{ClientError, Limit, RequestError},
    wire::{frame::cstr, message::append},
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

/// The message waits for answers that are owed.
pub(super) const AWAITS: Result<ControlFlow<Hold>, ClientError> = Ok(ControlFlow::Break(Hold::Answers));

/// Why a message must wait.
#[derive(Debug, Clone, Copy)]
pub(super) enum Hold {
    /// It chooses the tenant.
    Choice,
    /// What the server has been sent before it decides on what it means.
    Answers,
    /// So much has been sent that is not answered that no more is taken.
    Room,
}

impl Requests<'_, '_> {
    /// `waits` begins with a message that must wait. Where it is for answers, the server is to send what it has.
    #[cold]
    pub(super) fn hold(&mut self, hold: Hold, waits: Vec<u8>) -> Flow {
        match hold {
            Hold::Choice => Flow::Chooses(waits),
            Hold::Answers => {
                append(self.out.build(), b'H', |_| {});
                Flow::Awaits(waits)
            }
            Hold::Room => {
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
        aftermath: Aftermath,
        naming: Option<Arc<SqlNames>>,
    ) -> Arc<Statement> {
        let is_known = self.server.parsing(self.under).is_some();
        if is_known || !is_parsed_once(cstr(&mut { body }).unwrap_or_default()) {
            let statement = self.rules.table.intern(body, self.under, || (aftermath, naming));
            self.server.uncertain.prepares(&statement);
            return statement;
        }
        let under = self.settings_now(Whose::Follow);
        self.rules.table.own(body, &under, aftermath, naming)
    }

    /// Under what is parsed what comes next; if that is not known, the server is asked in front of it.
    #[cold]
    pub(super) fn settings_now(&mut self, whose: Whose) -> Arc<ParseSettings> {
        let Preparer { lease, here, .. } = self.server.preparer(self.under, self.startup);
        match here.under {
            Some(under) => under.clone(),
            None => here.ask(whose, lease, self.out.build()),
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
        let is_alike = !statement.is_shared
            || !statement.is_parsed_once
            || self
                .server
                .parsing(self.under)
                .is_some_and(|under| Arc::ptr_eq(under, &statement.parsed_under));
        if is_alike { Ok(Some(statement)) } else { self.part(name, &statement) }
    }

    #[cold]
    fn part(&mut self, name: &[u8], shared: &Statement) -> Result<Option<Arc<Statement>>, Limit> {
        if self.server.lease.is_awaited() {
            return Ok(None);
        }
        self.rules.table.memory.admits(shared.bytes())?;
        let own = self.rules.table.parted(shared, &shared.parsed_under);
        self.statements.insert(name, own.clone());
        Ok(Some(own))
    }

    /// Sees to it that the server has a statement that the client calls `name`.
    #[inline]
    pub(super) fn bring(&mut self, name: &[u8], statement: &Arc<Statement>) -> Brought {
        if self.statements.is_any_postponed() {
            if self.server.lease.may_have_others() {
                return Brought::Awaited;
            }
            if self.statements.take_postponed(name) {
                self.bring_postponed(name, statement);
                return Brought::Here;
            }
        }
        if self.server.statements.find(statement, self.server.lease.batch()) == Found::Known {
            return Brought::Here;
        }
        self.bring_anew(name, statement)
    }

    #[cold]
    fn bring_anew(&mut self, name: &[u8], statement: &Arc<Statement>) -> Brought {
        let ServerSide { statements, lease, sought, applied, uncertain, .. } = &mut *self.server;
        let here = Here::new(self.under, self.startup, applied, uncertain, lease);
        let (_, changed) = sought.take_if(|(sought, _)| sought.is(statement)).unzip();
        if changed == Some(true) {
            return Brought::Changed;
        }
        let shows = match statements.find(statement, lease.batch()) {
            // The same text by another of the client's names.
            Found::Asked => lease.shows_shape_of(statement, name),
            // Its client is yet to be told the shape that another must be compared with.
            _ if statement.is_looked_at && statement.shape.get().is_none() && lease.is_awaited() => {
                return Brought::Awaited;
            }
            _ if lease.may_have_others() => return Brought::Awaited,
            _ => Preparer { statements, lease, here }.prepare(statement, Whose::Follow, self.out.build()),
        };
        if !shows || statement.shape.get().is_none() || lease.takes_copy_data() {
            return Brought::Here;
        }
        *sought = Some((statement.clone(), false));
        Brought::Awaited
    }

    /// The client's Parse of a statement was answered before a server had seen it: it comes to the server now.
    #[cold]
    pub(super) fn bring_postponed(&mut self, name: &[u8], statement: &Arc<Statement>) {
        let mut preparer = self.server.preparer(self.under, self.startup);
        preparer.prepare_as(statement, Some(name), Whose::Follow, self.out.build());
    }

    /// The server is made to refuse a Bind or Describe of a statement, and its client hears why in PostgreSQL's words.
    #[cold]
    pub(super) fn refuse_changed(&mut self, asked: Asked, bytes: &[u8], at: usize, length: usize) {
        let _ = self.server.lease.ask(asked, Whose::Denied(RequestError::ResultChanged));
        rename(bytes, at, length, NOBODYS, self.out.build());
    }

    /// The session is about to look at what is prepared, and must find its own statements and nobody else's. What the server
    /// lacks can only be brought to it while no batch is under way: `settled`.
    #[cold]
    pub(super) fn show_what_is_prepared(&mut self, settled: bool) {
        self.statements.take_own_names(&self.rules.table);
        let ServerSide { lease, ours, .. } = &mut *self.server;
        ours.hide(lease, self.out.build());
        let mut preparer = self.server.preparer(self.under, self.startup);
        preparer.hide_others(self.statements, self.out.build());
        if settled {
            preparer.show_own(self.statements, false, self.out);
        }
    }

    /// Code is about to run that may EXECUTE, by its name, what the session has made by PREPARE.
    #[cold]
    pub(super) fn show_to_code(&mut self) {
        self.statements.take_own_names(&self.rules.table);
        let mut preparer = self.server.preparer(self.under, self.startup);
        preparer.show_own(self.statements, true, self.out);
    }
}
