//! A client's requests, one at a time: what goes to the server in their place, and what is owed for them.

use std::{collections::VecDeque, ops::ControlFlow, sync::Arc};

use super::{
    away::Bounds,
    client_side::{Rules, violation},
    server_side::ServerSide,
};
use crate::{
    data_path::{
        aftermath::Aftermath,
        choice::{Stance, Talk},
        lease::{Asked, Forgets, Naming, Pins, Whose},
        prepared::{ClientStatements, Statement, rename},
        session_state::hide_setter,
        statement::{self, Kind},
    },
    error::{NoChoice, Refusal},
    wire::{
        frame::{FrameError, HEADER_BYTES, cstr},
        message::{append, append_cstr},
        outgoing::Outgoing,
    },
};

/// One client message at a time.
pub struct Requests<'a, 'c> {
    pub(super) statements: &'a mut ClientStatements,
    pub(super) rules: &'a Rules,
    pub(super) unnamed_serial: &'a mut u64,
    pub(super) bounds: &'a mut Bounds,
    pub(super) server: &'a mut ServerSide,
    pub(super) out: &'a mut Outgoing<'c>,
}

impl Requests<'_, '_> {
    /// Sends a message on. It stops at one that chooses the tenant: that one must wait, and nothing has been done about it.
    #[inline]
    pub(super) fn message(&mut self, tag: u8, bytes: &[u8], whole: bool) -> Result<ControlFlow<()>, Refusal> {
        if self.rules.stance != Stance::AtHome && !self.is_within_bounds(tag, bytes, whole)? {
            return GOES_ON;
        }
        match tag {
            b'Q' | b'P' if self.rules.chooses && !self.rules.follow && whole => {
                return self.in_session_mode(tag, bytes);
            }
            b'Q' => return self.query(bytes, whole),
            b'P' if self.rules.follow => return self.parse(bytes, whole),
            b'B' if self.rules.follow => return self.bind(bytes, whole),
            b'D' if self.rules.follow => return self.describe(bytes).map(ControlFlow::Continue),
            b'C' if self.rules.follow => return self.close(bytes).map(ControlFlow::Continue),
            b'F' => {
                self.server.uncertain.note(&Aftermath::unread(), false);
                self.ask(Asked::FunctionCall);
            }
            b'P' => self.ask(Asked::Parse(None)),
            b'B' => self.ask(Asked::Bind),
            b'D' => self.ask(Asked::Describe),
            b'C' => self.ask(Asked::Close(None)),
            b'E' => self.ask(Asked::Execute),
            b'S' => self.ask(Asked::Sync),
            b'c' | b'f' => self.server.lease.copy_done(),
            _ => {}
        }
        self.out.pass(bytes);
        GOES_ON
    }

    /// A text that chooses the tenant. It waits where nothing else of its transaction has gone to the server; elsewhere the
    /// server is made to refuse it, so that what comes behind it fails with it as with any other error.
    #[cold]
    fn choice(&mut self, tag: u8) -> ControlFlow<()> {
        let lease = &self.server.lease;
        if !self.rules.chooses {
            self.deny(tag, NoChoice::Employee);
        } else if lease.is_unsynced() || lease.takes_copy_data() {
            self.deny(tag, NoChoice::TransactionBegun);
        } else {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    /// In place of a message the server gets one that it cannot read, and its error goes to the client in words of ours.
    #[cold]
    pub(super) fn deny(&mut self, tag: u8, reason: NoChoice) {
        if self.server.lease.takes_copy_data() {
            // Whatever it is: the COPY fails of it.
            append(self.out.build(), b'Q', |out| append_cstr(out, UNREADABLE));
        } else if tag == b'Q' {
            self.end_unnamed();
            let _ = self.server.lease.ask(Asked::Query(None), Whose::Denied(reason));
            append(self.out.build(), b'Q', |out| append_cstr(out, UNREADABLE));
        } else {
            self.server.statements.doubt_unnamed();
            let _ = self.server.lease.ask(Asked::Parse(None), Whose::Denied(reason));
            append(self.out.build(), b'P', |out| {
                append_cstr(out, b"");
                append_cstr(out, UNREADABLE);
                out.extend_from_slice(&[0, 0]);
            });
        }
    }

    /// A service login's session that keeps its server reads along for one thing only.
    fn in_session_mode(&mut self, tag: u8, bytes: &[u8]) -> Result<ControlFlow<()>, Refusal> {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        if tag == b'P' {
            cstr(&mut body).map_err(violation)?;
        }
        let talk = cstr(&mut body).map(|sql| Aftermath::read(sql, self.server.lexing()).talk);
        if matches!(talk, Ok(Talk::Resets)) {
            self.server.uncertain.note_reset();
        }
        match (tag, talk) {
            (b'Q', Ok(Talk::Chooses)) => return Ok(self.choice(tag)),
            (_, Ok(Talk::Chooses)) => self.deny(tag, NoChoice::SessionMode),
            (b'Q', _) => {
                self.end_unnamed();
                self.ask(Asked::Query(None));
                self.out.pass(bytes);
            }
            _ => {
                self.ask(Asked::Parse(None));
                self.out.pass(bytes);
            }
        }
        GOES_ON
    }

    #[inline]
    fn ask(&mut self, asked: Asked) {
        // What the server skips has no effect and gets no reply; the bytes go to it all the same.
        let _ = self.server.lease.ask(asked, Whose::Client);
    }

    fn query(&mut self, bytes: &[u8], whole: bool) -> Result<ControlFlow<()>, Refusal> {
        if !self.rules.follow {
            self.end_unnamed();
            self.ask(Asked::Query(None));
            self.out.pass(bytes);
            return GOES_ON;
        }
        let mut text = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let aftermath = match (whole, cstr(&mut text)) {
            (true, Ok(sql)) => Aftermath::read(sql, self.server.lexing()),
            _ => Aftermath::unread(),
        };
        if aftermath.talk == Talk::Chooses {
            return Ok(self.choice(b'Q'));
        }
        self.end_unnamed();
        let settled = self.server.lease.is_settled();
        let alone = settled && self.server.lease.status() == b'I';
        self.server.uncertain.note(&aftermath, alone);
        if aftermath.inspects {
            self.show_what_is_prepared(settled);
        }
        if aftermath.names_statements
            && let Some((rewritten, forgets)) = self.with_server_names(bytes)
        {
            self.ask(Asked::Query(forgets));
            self.out.build().extend_from_slice(&rewritten);
            return GOES_ON;
        }
        self.ask(Asked::Query(None));
        self.out.pass(bytes);
        GOES_ON
    }

    /// A simple query ends the unnamed statement.
    fn end_unnamed(&mut self) {
        self.statements.forget_unnamed();
        self.server.statements.set_unnamed(0);
    }

    fn parse(&mut self, bytes: &[u8], whole: bool) -> Result<ControlFlow<()>, Refusal> {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let name = cstr(&mut body).map_err(violation)?;
        let aftermath = |lexing| match cstr(&mut { body }) {
            Ok(sql) if whole => Aftermath::read(sql, lexing),
            _ => Aftermath::unread(),
        };
        let lexing = self.server.lexing();
        if name.is_empty() {
            let aftermath = aftermath(lexing);
            if aftermath.talk == Talk::Chooses {
                return Ok(self.choice(b'P'));
            }
            *self.unnamed_serial += 1;
            if self.server.lease.ask(Asked::Parse(None), Whose::Client) {
                self.statements.set_unnamed(*self.unnamed_serial, if whole { body } else { b"" }, aftermath);
                self.server.statements.set_unnamed(*self.unnamed_serial);
            }
            self.out.pass(bytes);
            return GOES_ON;
        }
        if !whole || self.statements.get(name).is_some() {
            return self.parse_under_its_own_name(bytes, name, whole).map(ControlFlow::Continue);
        }
        if self.statements.len() >= self.rules.statements_max {
            return Err(Refusal::TooManyStatements { limit: self.rules.statements_max });
        }
        let statement = self.rules.table.intern(body, &self.server.applied, || aftermath(lexing));
        if statement.aftermath.talk == Talk::Chooses {
            return Ok(self.choice(b'P'));
        }
        self.server.statements.make_room_for(&statement, &mut self.server.lease, self.out.build());
        let naming = Naming { client_name: Some(name.into()), statement: statement.clone() };
        if self.server.lease.ask(Asked::Parse(Some(Box::new(naming))), Whose::Client) {
            self.server.statements.queued(&statement, self.server.lease.batch());
            self.server.statements.tally.client_parses += 1;
            self.statements.insert(name, statement.clone());
        }
        rename(bytes, HEADER_BYTES, name.len(), statement.server_name(), self.out.build());
        GOES_ON
    }

    /// A statement that is too long to keep, or whose name is taken: the server gets it as the client calls it. The one stays
    /// with this client, and so does its server. For the other the name is taken on the server too, until the transaction is
    /// over, so that the error is PostgreSQL's own.
    fn parse_under_its_own_name(&mut self, bytes: &[u8], name: &[u8], whole: bool) -> Result<(), Refusal> {
        self.server.uncertain.note(&Aftermath::unread(), false);
        if !whole {
            self.server.lease.pins.insert(Pins::UNREAD);
        } else if !self.server.statements.taken.iter().any(|taken| **taken == *name)
            && self.server.lease.ask(Asked::ParseAsIs, Whose::Follow)
        {
            self.server.statements.taken.push(name.into());
            append(self.out.build(), b'P', |out| {
                append_cstr(out, name);
                out.extend_from_slice(&[0, 0, 0]);
            });
        }
        self.ask(Asked::ParseAsIs);
        self.out.pass(bytes);
        Ok(())
    }

    fn bind(&mut self, bytes: &[u8], whole: bool) -> Result<ControlFlow<()>, Refusal> {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let portal = cstr(&mut body).map_err(violation)?;
        let name = cstr(&mut body).map_err(violation)?;
        if name.is_empty() {
            let aftermath = self.statements.unnamed_aftermath();
            if aftermath.talk == Talk::Chooses && self.statements.unnamed_body().is_some() {
                return self.choice_bound(whole);
            }
            let inspects = aftermath.inspects;
            self.server.uncertain.note(aftermath, false);
            if inspects {
                self.show_what_is_prepared(false);
            }
            return self.with_unnamed(Asked::Bind, bytes).map(ControlFlow::Continue);
        }
        let Some(statement) = self.statements.get(name).cloned() else {
            // The server says so itself, under the name the client used.
            self.ask(Asked::Bind);
            self.out.pass(bytes);
            return GOES_ON;
        };
        if statement.aftermath.talk == Talk::Chooses {
            return self.choice_bound(whole);
        }
        self.server.statements.tally.binds += 1;
        self.server.uncertain.note(&statement.aftermath, false);
        if statement.aftermath.inspects {
            self.show_what_is_prepared(false);
        }
        self.with_statement(Asked::Bind, bytes, HEADER_BYTES + portal.len() + 1, name.len(), &statement);
        GOES_ON
    }

    /// A Bind whose rest is yet to come is too long to name a tenant, and cannot be taken back.
    #[cold]
    fn choice_bound(&mut self, whole: bool) -> Result<ControlFlow<()>, Refusal> {
        if whole { Ok(self.choice(b'B')) } else { Err(NoChoice::NotAlone.into()) }
    }

    fn describe(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let (kind, name) = kind_and_name(bytes)?;
        match self.statements.get(name).cloned() {
            _ if kind != b'S' => self.ask(Asked::Describe),
            _ if name.is_empty() => return self.with_unnamed(Asked::Describe, bytes),
            None => self.ask(Asked::Describe),
            Some(statement) => {
                self.with_statement(Asked::Describe, bytes, HEADER_BYTES + 1, name.len(), &statement);
                return Ok(());
            }
        }
        self.out.pass(bytes);
        Ok(())
    }

    /// A Close takes the client's name away; the statement stays on the server, for others. What is passed on closes a
    /// name that the server does not have, which PostgreSQL answers like any other.
    fn close(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let (kind, name) = kind_and_name(bytes)?;
        let statement = self.statements.get(name).filter(|_| kind == b'S').cloned();
        let unnamed = kind == b'S' && name.is_empty();
        let naming =
            statement.map(|statement| Box::new(Naming { client_name: Some(name.into()), statement }));
        if self.server.lease.ask(Asked::Close(naming), Whose::Client) && kind == b'S' {
            self.statements.remove(name);
            if unnamed {
                self.statements.forget_unnamed();
                self.server.statements.set_unnamed(0);
            }
        }
        self.out.pass(bytes);
        Ok(())
    }

    fn with_unnamed(&mut self, asked: Asked, bytes: &[u8]) -> Result<(), Refusal> {
        self.server.statements.ensure_unnamed(self.statements, &mut self.server.lease, self.out);
        self.ask(asked);
        self.out.pass(bytes);
        Ok(())
    }

    #[inline]
    fn with_statement(
        &mut self,
        asked: Asked,
        bytes: &[u8],
        at: usize,
        length: usize,
        statement: &Arc<Statement>,
    ) {
        let name = bytes.get(at..at + length).unwrap_or_default();
        let ServerSide { statements: servers, lease, .. } = &mut *self.server;
        if self.statements.take_postponed(name) {
            servers.prepare(statement, Whose::Follow, lease, self.out.build());
        } else {
            servers.ensure(statement, lease, self.out);
        }
        self.ask(asked);
        rename(bytes, at, length, statement.server_name(), self.out.build());
    }

    /// The session is about to look at what is prepared, and must find its own statements and nobody else's. What the server
    /// lacks can only be brought to it while no batch is under way: `settled`.
    #[cold]
    fn show_what_is_prepared(&mut self, settled: bool) {
        let ServerSide { statements, lease, has_setter, .. } = &mut *self.server;
        hide_setter(has_setter, lease, self.out.build());
        statements.hide_others(self.statements, lease, self.out.build());
        if settled {
            statements.show_own(self.statements, lease, self.out);
        }
    }

    /// The query with every name of a protocol-level statement in EXECUTE or DEALLOCATE replaced by what servers call it.
    /// A DEALLOCATE takes the statement from its server, too: other clients have it prepared again.
    #[cold]
    fn with_server_names(&mut self, bytes: &[u8]) -> Option<(Vec<u8>, Forgets)> {
        let sql = cstr(&mut bytes.get(HEADER_BYTES..)?).ok()?;
        let mut rewritten = Vec::new();
        let mut copied = 0;
        let mut forgets = VecDeque::new();
        for found in statement::statements(sql, self.server.lexing()) {
            let Some(name) = found.prepared.filter(|_| !matches!(found.kind, Kind::Prepare { .. })) else {
                continue;
            };
            let statement = self.statements.get(&name.value).cloned();
            if found.kind == Kind::Deallocate {
                let client_name = Some(name.value.as_ref().into());
                forgets.push_back(statement.clone().map(|statement| Naming { client_name, statement }));
            }
            let Some(statement) = statement else { continue };
            self.server.uncertain.note(&statement.aftermath, false);
            let range = found.start + name.range.start..found.start + name.range.end;
            self.server.statements.ensure_for_query(&statement, &mut self.server.lease, self.out);
            rewritten.extend_from_slice(sql.get(copied..range.start)?);
            rewritten.extend_from_slice(statement.server_name());
            copied = range.end;
        }
        if copied == 0 {
            return None;
        }
        rewritten.extend_from_slice(sql.get(copied..)?);
        let mut message = Vec::new();
        append(&mut message, b'Q', |out| {
            append_cstr(out, &rewritten);
        });
        Some((message, Some(Box::new(forgets)).filter(|forgets| !forgets.is_empty())))
    }
}

/// The message has gone its way.
const GOES_ON: Result<ControlFlow<()>, Refusal> = Ok(ControlFlow::Continue(()));

/// What no server takes for a statement.
const UNREADABLE: &[u8] = b"pglobby.tenant";

fn kind_and_name(bytes: &[u8]) -> Result<(u8, &[u8]), Refusal> {
    let Some((kind, mut rest)) = bytes.get(HEADER_BYTES..).and_then(<[u8]>::split_first) else {
        return Err(violation(FrameError::Strings));
    };
    Ok((*kind, cstr(&mut rest).map_err(violation)?))
}
