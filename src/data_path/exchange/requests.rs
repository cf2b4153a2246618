//! A client's requests, one at a time: what goes to the server in their place, and what is owed for them.

use std::{collections::VecDeque, sync::Arc};

use super::{
    client_side::{Rules, violation},
    server_side::ServerSide,
};
use crate::{
    data_path::{
        aftermath::Aftermath,
        catalogue::Seen,
        lease::{Asked, Forgets, Naming, Pins, Whose},
        prepared::{ClientStatements, Statement, rename},
        session_state::Doubts,
        statement::{self, Characters, Kind},
    },
    error::Refusal,
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
    pub(super) server: &'a mut ServerSide,
    pub(super) out: &'a mut Outgoing<'c>,
}

impl Requests<'_, '_> {
    #[inline]
    pub(super) fn message(&mut self, tag: u8, bytes: &[u8], whole: bool) -> Result<(), Refusal> {
        match tag {
            b'Q' => return self.query(bytes, whole),
            b'P' if self.rules.follow => return self.parse(bytes, whole),
            b'B' if self.rules.follow => return self.bind(bytes),
            b'D' if self.rules.follow => return self.describe(bytes),
            b'C' if self.rules.follow => return self.close(bytes),
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
        Ok(())
    }

    #[inline]
    fn ask(&mut self, asked: Asked) {
        // What the server skips has no effect and gets no reply; the bytes go to it all the same.
        let _ = self.server.lease.ask(asked, Whose::Client);
    }

    /// A text with this aftermath goes to the server.
    #[inline]
    fn note(&mut self, aftermath: &Aftermath, alone: bool) {
        note(aftermath, alone, self.rules, self.server);
    }

    /// And this is the text: what does it call?
    #[inline]
    fn note_calls(&mut self, text: &[u8], seen: Option<&Seen>) {
        note_calls(text, seen, self.rules, self.server);
    }

    fn query(&mut self, bytes: &[u8], whole: bool) -> Result<(), Refusal> {
        // A simple query ends the unnamed statement.
        self.statements.forget_unnamed();
        self.server.statements.set_unnamed(0);
        if !self.rules.follow {
            self.ask(Asked::Query(None));
            self.out.pass(bytes);
            return Ok(());
        }
        let mut text = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let aftermath = match (whole, cstr(&mut text)) {
            (true, Ok(sql)) => Aftermath::read(sql, self.server.lexing()),
            _ => Aftermath::unread(),
        };
        let alone = !self.server.lease.is_working() && self.server.lease.status() == b'I';
        self.note(&aftermath, alone);
        self.note_calls(bytes.get(HEADER_BYTES..).unwrap_or_default(), None);
        if aftermath.names_statements
            && let Some((rewritten, forgets)) = self.with_server_names(bytes)
        {
            self.ask(Asked::Query(forgets));
            self.out.build().extend_from_slice(&rewritten);
            return Ok(());
        }
        self.ask(Asked::Query(None));
        self.out.pass(bytes);
        Ok(())
    }

    fn parse(&mut self, bytes: &[u8], whole: bool) -> Result<(), Refusal> {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let name = cstr(&mut body).map_err(violation)?;
        let aftermath = |lexing| match cstr(&mut { body }) {
            Ok(sql) if whole => Aftermath::read(sql, lexing),
            _ => Aftermath::unread(),
        };
        let lexing = self.server.lexing();
        if name.is_empty() {
            *self.unnamed_serial += 1;
            let aftermath = aftermath(lexing);
            if self.server.lease.ask(Asked::Parse(None), Whose::Client) {
                self.statements.set_unnamed(*self.unnamed_serial, if whole { body } else { b"" }, aftermath);
                self.server.statements.set_unnamed(*self.unnamed_serial);
            }
            self.out.pass(bytes);
            return Ok(());
        }
        if !whole || self.statements.get(name).is_some() {
            return self.parse_under_its_own_name(bytes, name, whole);
        }
        if self.statements.len() >= self.rules.statements_max {
            return Err(Refusal::TooManyStatements { limit: self.rules.statements_max });
        }
        let statement = self.rules.table.intern(body, &self.server.applied, || aftermath(lexing));
        self.server.statements.make_room_for(&statement, &mut self.server.lease, self.out.build());
        let naming = Naming { client_name: Some(name.into()), statement: statement.clone() };
        if self.server.lease.ask(Asked::Parse(Some(Box::new(naming))), Whose::Client) {
            self.server.statements.queued(&statement, self.server.lease.batch());
            self.server.statements.tally.client_parses += 1;
            self.statements.insert(name, statement.clone());
        }
        rename(bytes, HEADER_BYTES, name.len(), statement.server_name(), self.out.build());
        Ok(())
    }

    /// A statement that is too long to keep, or whose name is taken: the server gets it as the client calls it, and stays
    /// with this client. A taken name is taken on the server too, so that the error is PostgreSQL's own.
    fn parse_under_its_own_name(&mut self, bytes: &[u8], name: &[u8], whole: bool) -> Result<(), Refusal> {
        self.server.lease.pins.insert(Pins::UNREAD);
        self.server.uncertain.note(&Aftermath::unread(), false);
        if whole && self.server.lease.ask(Asked::Parse(None), Whose::Follow) {
            append(self.out.build(), b'P', |out| {
                append_cstr(out, name);
                out.extend_from_slice(&[0, 0, 0]);
            });
        }
        self.ask(Asked::Parse(None));
        self.out.pass(bytes);
        Ok(())
    }

    fn bind(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let portal = cstr(&mut body).map_err(violation)?;
        let name = cstr(&mut body).map_err(violation)?;
        if name.is_empty() {
            note(self.statements.unnamed_aftermath(), false, self.rules, self.server);
            note_calls(self.statements.unnamed_body(), None, self.rules, self.server);
            return self.with_unnamed(Asked::Bind, bytes);
        }
        let Some(statement) = self.statements.get(name).cloned() else {
            // The server says so itself, under the name the client used.
            self.ask(Asked::Bind);
            self.out.pass(bytes);
            return Ok(());
        };
        self.server.statements.tally.binds += 1;
        self.note(&statement.aftermath, false);
        self.note_calls(statement.body(), Some(&statement.seen));
        self.with_statement(Asked::Bind, bytes, HEADER_BYTES + portal.len() + 1, name.len(), &statement);
        Ok(())
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
            self.note(&statement.aftermath, false);
            self.note_calls(statement.body(), Some(&statement.seen));
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

#[inline]
fn note(aftermath: &Aftermath, alone: bool, rules: &Rules, server: &mut ServerSide) {
    server.uncertain.note(aftermath, alone);
    if aftermath.doubts.contains(Doubts::FUNCTIONS) {
        server.uncertain.changes_functions(&rules.catalogue);
    }
}

#[inline]
fn note_calls(text: &[u8], seen: Option<&Seen>, rules: &Rules, server: &mut ServerSide) {
    if !rules.catalogue.is_plain() {
        let tangled = server.lexing().characters != Characters::AsciiSafe;
        rules.catalogue.note(text, tangled, seen, &mut server.uncertain);
    }
}

fn kind_and_name(bytes: &[u8]) -> Result<(u8, &[u8]), Refusal> {
    let Some((kind, mut rest)) = bytes.get(HEADER_BYTES..).and_then(<[u8]>::split_first) else {
        return Err(violation(FrameError::Strings));
    };
    Ok((*kind, cstr(&mut rest).map_err(violation)?))
}
