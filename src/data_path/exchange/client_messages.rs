//! A client's requests, one at a time: what goes to the server in their place, and what is owed for them.

use std::{ops::ControlFlow, sync::Arc};

use super::{
    client_side::{Rules, violation},
    ensure_prepared::{AWAITS, Brought, Hold},
    pending_replies::{Asked, Whose},
    prepare::ask_shape,
    return_to_tenant::{Bounds, Stance},
    sequences::{Advances, note_sequences},
    server_side::ServerSide,
    sql_prepare::{Rewritten, SettingsOf},
    tenant_choice::{is_read_along, kind_and_name},
};
use crate::{
    data_path::{
        functions::Seen,
        prepared::{
            ClientStatements, Naming, Statement, parse_settings::ParseSettings, rename,
            sql_prepare_effects::disowned,
        },
        session_state::{Settings, side_effects::Aftermath, state_query::Doubts},
        sql::Characters,
    },
    error::ClientError,
    wire::{
        frame::{HEADER_BYTES, cstr},
        message::{append, append_cstr},
        outgoing::Outgoing,
    },
};

/// One client message at a time.
pub struct Requests<'a, 'c> {
    pub(super) statements: &'a mut ClientStatements,
    pub(super) rules: &'a Rules,
    /// The session's, as they were when the transaction began.
    pub(super) under: &'a Arc<ParseSettings>,
    /// What it began with.
    pub(super) startup: &'a Settings,
    pub(super) unnamed_serial: &'a mut u64,
    pub(super) advances: &'a mut Advances,
    pub(super) bounds: &'a mut Bounds,
    pub(super) server: &'a mut ServerSide,
    pub(super) out: &'a mut Outgoing<'c>,
}

impl Requests<'_, '_> {
    /// Sends a message on.
    #[inline]
    pub(super) fn message(
        &mut self,
        tag: u8,
        bytes: &[u8],
        whole: bool,
    ) -> Result<ControlFlow<Hold>, ClientError> {
        if self.server.uncertain.pending.is_some() {
            self.startup_again(tag, bytes);
        }
        if self.rules.stance != Stance::AtHome && !self.is_within_bounds(tag, bytes, whole)? {
            return GOES_ON;
        }
        match tag {
            b'Q' | b'P' if !self.rules.follow && whole && is_read_along(bytes, self.rules) => {
                return self.in_session_mode(tag, bytes);
            }
            b'B' | b'D' | b'C' if !self.rules.follow && !self.statements.is_empty() => {
                return self.unserved_in_session_mode(tag, bytes, whole);
            }
            b'Q' => return self.query(bytes, whole),
            b'P' if self.rules.follow => return self.parse(bytes, whole),
            b'B' if self.rules.follow => return self.bind(bytes, whole),
            b'D' if self.rules.follow => return self.describe(bytes),
            b'C' if self.rules.follow => return self.close(bytes),
            b'F' => {
                self.note(&Aftermath { advances: true, ..Aftermath::anything() }, false);
                self.ask(Asked::FunctionCall);
            }
            b'P' => self.ask(Asked::Parse(None)),
            b'B' => self.ask(Asked::Bind),
            b'D' => self.ask(Asked::Describe),
            b'C' => self.ask(Asked::Close(None)),
            b'E' => self.execute(bytes),
            b'S' => self.ask(Asked::Sync),
            b'c' | b'f' => self.server.lease.copy_done(),
            _ => {}
        }
        self.out.pass(bytes);
        GOES_ON
    }

    #[inline]
    pub(super) fn ask(&mut self, asked: Asked) {
        // What the server skips has no effect and gets no reply; the bytes go to it all the same.
        let _ = self.server.lease.ask(asked, Whose::Client);
    }

    /// Whether what was sent before may yet change what the client calls `name`.
    #[inline]
    fn is_doubtful(&mut self, name: &[u8]) -> bool {
        self.server.lease.is_doubtful(name) || (!name.is_empty() && self.server.lease.is_forgetting())
    }

    /// A text with this aftermath goes to the server.
    #[inline]
    pub(super) fn note(&mut self, aftermath: &Aftermath, alone: bool) {
        note(aftermath, alone, self.advances, self.rules, self.server);
    }

    /// And this is the text: what does it call?
    #[inline]
    pub(super) fn note_calls(&mut self, text: &[u8], seen: Option<&Seen>) {
        note_calls(text, seen, self.rules, self.server);
    }

    fn query(&mut self, bytes: &[u8], whole: bool) -> Result<ControlFlow<Hold>, ClientError> {
        self.server.unanswered_bytes += bytes.len();
        if self.server.lease.is_skipping() {
            self.out.pass(bytes);
            return GOES_ON;
        }
        if !self.rules.follow {
            self.end_unnamed();
            self.ask(Asked::Query(None));
            self.out.pass(bytes);
            return GOES_ON;
        }
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let aftermath = match (whole, cstr(&mut { body })) {
            (true, Ok(sql)) => Aftermath::read(sql, self.server.lexing()),
            _ => Aftermath::unread(),
        };
        if aftermath.is_guarded()
            && let Some(flow) = self.guard(b'Q', &aftermath, cstr(&mut { body }).unwrap_or_default())
        {
            return Ok(flow);
        }
        if (aftermath.names_statements || aftermath.inspects) && self.server.lease.may_have_others() {
            return AWAITS;
        }
        if aftermath.names_statements && self.server.lease.is_forgetting() {
            return AWAITS;
        }
        if aftermath.names_statements && self.server.lease.may_yet_skip() {
            // What is brought to the server for it comes in a batch of its own, which would end the client's.
            self.server.lease.wait_for_all();
            return AWAITS;
        }
        if let Err(limit) = self.rules.admit_settings(&self.server.applied, &aftermath) {
            return self.refuse(b'Q', limit);
        }
        self.end_unnamed();
        let settled = self.server.lease.is_settled();
        let alone = settled && self.server.lease.status() == b'I';
        let knew_settings = self.server.parsing(self.under).is_some();
        self.note(&aftermath, alone);
        self.part_sequences(true);
        self.note_calls(body, None);
        self.server.note_resets(&aftermath, self.startup, None);
        if aftermath.inspects {
            self.show_what_is_prepared(settled);
        } else if settled
            && self.statements.has_any_in_sql()
            && self.server.uncertain.doubts(Doubts::PREPARED)
        {
            self.show_to_code();
        }
        if aftermath.names_statements {
            let sql = cstr(&mut { body }).unwrap_or_default();
            let knows_settings = self.server.parsing(self.under).is_some();
            let settings = match settled && knew_settings == knows_settings {
                true => SettingsOf::ThisQuery,
                false => SettingsOf::ItsEnd,
            };
            let rewritten = match self.with_server_names(sql, settings) {
                Ok(rewritten) => rewritten,
                Err(limit) => return self.refuse(b'Q', limit),
            };
            if let Some(Rewritten { text, requires, deeds, .. }) = rewritten {
                let mut preparer = self.server.preparer(self.under, self.startup);
                for statement in &requires {
                    preparer.ensure_for_query(statement, self.out);
                }
                preparer.make_room(deeds.prepared(), self.out.build());
                deeds.expect(self.statements, preparer.statements);
                self.ask(Asked::Query(Some(Box::new(deeds))));
                append(self.out.build(), b'Q', |out| append_cstr(out, &text));
                return GOES_ON;
            }
        }
        self.ask(Asked::Query(None));
        self.out.pass(bytes);
        GOES_ON
    }

    fn parse(&mut self, bytes: &[u8], whole: bool) -> Result<ControlFlow<Hold>, ClientError> {
        self.server.unanswered_bytes += bytes.len();
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let name = cstr(&mut body).map_err(violation)?;
        let aftermath = |lexing| match cstr(&mut { body }) {
            Ok(sql) if whole => Aftermath::read(sql, lexing),
            _ => Aftermath::unread(),
        };
        let lexing = self.server.lexing();
        if name.is_empty() {
            let aftermath = aftermath(lexing);
            if aftermath.is_guarded()
                && let Some(flow) = self.guard(b'P', &aftermath, cstr(&mut { body }).unwrap_or_default())
            {
                return Ok(flow);
            }
            if aftermath.names_statements && self.server.lease.may_have_others() {
                return AWAITS;
            }
            if let Err(limit) = self.admit_unnamed(if whole { body } else { b"" }, &aftermath) {
                return self.refuse(b'P', limit);
            }
            *self.unnamed_serial += 1;
            match self.rewritten(&aftermath, body) {
                Err(limit) => return self.refuse(b'P', limit),
                Ok(None) => {}
                Ok(Some(text)) => return self.parse_with_server_names(name, body, aftermath, text),
            }
            if self.ask_unnamed(Asked::Parse(None)) {
                let (serial, under) = (*self.unnamed_serial, self.server.parsing(self.under));
                match whole {
                    true => self.statements.set_unnamed(serial, body, aftermath, None, under),
                    false => self.unnamed_unread(serial),
                }
                self.server.statements.set_unnamed(*self.unnamed_serial);
            }
            self.out.pass(bytes);
            return GOES_ON;
        }
        if !whole {
            return self.parse_under_its_own_name(bytes).map(ControlFlow::Continue);
        }
        if self.server.lease.may_have_others() || self.server.lease.is_forgetting() {
            return AWAITS;
        }
        if let Some(taken) = self.statements.get(name).cloned() {
            // The server has a statement of that name as well, and says what PostgreSQL says.
            self.server.preparer(self.under, self.startup).ensure(&taken, self.out);
            let naming = Naming { client_name: Some(name.into()), statement: taken.clone() };
            self.ask(Asked::ParseTaken(Box::new(naming)));
            rename(bytes, HEADER_BYTES, name.len(), taken.server_name(), self.out.build());
            return GOES_ON;
        }
        let read = aftermath(lexing);
        if read.is_guarded()
            && let Some(flow) = self.guard(b'P', &read, cstr(&mut { body }).unwrap_or_default())
        {
            return Ok(flow);
        }
        let admitted = self.rules.admit(self.statements, 1, name.len() + body.len());
        if let Err(limit) = admitted.and_then(|()| self.rules.admit_settings(&self.server.applied, &read)) {
            return self.refuse(b'P', limit);
        }
        match self.rewritten(&read, body) {
            Err(limit) => return self.refuse(b'P', limit),
            Ok(None) => {}
            Ok(Some(text)) => return self.parse_with_server_names(name, body, read, text),
        }
        let statement = self.made(body, read, None);
        if self.server.lease.shows_shape_of(&statement, name) && self.server.lease.is_awaited() {
            // Parsed again it may have another shape, which must not be taken for that of the other name.
            return AWAITS;
        }
        self.parse_statement(bytes, name, &statement);
        GOES_ON
    }

    /// The Parse of a statement goes to the server under our name for it.
    pub(super) fn parse_statement(&mut self, bytes: &[u8], name: &[u8], statement: &Arc<Statement>) {
        let statement = statement.clone();
        self.server.preparer(self.under, self.startup).make_room_for(&statement, self.out.build());
        let naming = Naming { client_name: Some(name.into()), statement: statement.clone() };
        if self.server.lease.ask(Asked::Parse(Some(Box::new(naming))), Whose::Client) {
            self.server.statements.queued(&statement, self.server.lease.batch());
            self.server.statements.tally.client_parses += 1;
            self.statements.insert(name, statement.clone());
        }
        rename(bytes, HEADER_BYTES, name.len(), statement.server_name(), self.out.build());
        let ServerSide { lease, .. } = &mut *self.server;
        ask_shape(&statement, Some(name), Whose::Follow, lease, self.out.build());
    }

    fn bind(&mut self, bytes: &[u8], whole: bool) -> Result<ControlFlow<Hold>, ClientError> {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let portal = cstr(&mut body).map_err(violation)?;
        let name = cstr(&mut body).map_err(violation)?;
        if name.is_empty() {
            if self.server.lease.is_unnamed_doubtful() {
                return AWAITS;
            }
            let inspects = self.statements.unnamed_aftermath().inspects;
            if self.statements.unnamed_aftermath().is_guarded()
                && let Some(text) = self.statements.unnamed_body().map(<[u8]>::to_vec)
                && let Some(flow) =
                    self.guard_bound(&self.statements.unnamed_aftermath().clone(), &text, whole)?
            {
                return Ok(flow);
            }
            if self.statements.unnamed_naming().is_some() && self.server.lease.may_have_others() {
                return AWAITS;
            }
            if let Some(naming) = self.statements.unnamed_naming().cloned() {
                self.bind_naming(portal, &naming);
            }
            self.statements.run_unnamed();
            note(self.statements.unnamed_aftermath(), false, self.advances, self.rules, self.server);
            self.part_sequences(false);
            note_calls(self.statements.unnamed_body().unwrap_or_default(), None, self.rules, self.server);
            self.server.note_resets(self.statements.unnamed_aftermath(), self.startup, Some(portal));
            if inspects {
                self.show_what_is_prepared(false);
            }
            self.with_unnamed(Asked::Bind, bytes);
            return GOES_ON;
        }
        let at = HEADER_BYTES + portal.len() + 1;
        if self.is_doubtful(name) {
            return AWAITS;
        }
        let Some(statement) = self.statements.get(name).cloned() else {
            // The server says so itself, under the name the client used.
            if self.may_be_unread() {
                self.note_unread();
            }
            self.ask(Asked::Bind);
            match disowned(name) {
                Some(other) => rename(bytes, at, name.len(), &other, self.out.build()),
                None => self.out.pass(bytes),
            }
            return GOES_ON;
        };
        if statement.aftermath.is_guarded()
            && let Some(flow) = self.guard_bound(&statement.aftermath, statement.body(), whole)?
        {
            return Ok(flow);
        }
        let statement = match self.alike(name, statement) {
            Ok(Some(statement)) => statement,
            Ok(None) => return AWAITS,
            Err(limit) => return self.refuse_bind(limit, whole),
        };
        if statement.naming.is_some() && self.server.lease.may_have_others() {
            return AWAITS;
        }
        match self.bring(name, &statement) {
            Brought::Here => {}
            Brought::Awaited => return AWAITS,
            Brought::Changed => {
                self.refuse_changed(Asked::Bind, bytes, at, name.len());
                return GOES_ON;
            }
        }
        if let Some(naming) = &statement.naming {
            self.bind_naming(portal, naming);
        }
        self.server.statements.tally.binds += 1;
        self.note(&statement.aftermath, false);
        self.part_sequences(false);
        self.note_calls(statement.body(), Some(&statement.seen));
        self.server.note_resets(&statement.aftermath, self.startup, Some(portal));
        if statement.aftermath.inspects {
            self.show_what_is_prepared(false);
        }
        self.ask(Asked::Bind);
        rename(bytes, at, name.len(), statement.server_name(), self.out.build());
        GOES_ON
    }

    fn describe(&mut self, bytes: &[u8]) -> Result<ControlFlow<Hold>, ClientError> {
        let (kind, name) = kind_and_name(bytes)?;
        if kind == b'S' && (self.is_doubtful(name) || self.server.lease.is_unnamed_doubtful()) {
            return AWAITS;
        }
        match self.statements.get(name).cloned() {
            _ if kind != b'S' => self.ask(Asked::Describe),
            _ if name.is_empty() => {
                let naming = self.statements.unnamed_naming().cloned();
                self.ensure_named(naming.as_deref());
                self.with_unnamed(Asked::Describe, bytes);
                return GOES_ON;
            }
            None => {
                self.ask(Asked::Describe);
                if let Some(other) = disowned(name) {
                    rename(bytes, HEADER_BYTES + 1, name.len(), &other, self.out.build());
                    return GOES_ON;
                }
            }
            Some(statement) => {
                let statement = match self.alike(name, statement) {
                    Ok(Some(statement)) => statement,
                    Ok(None) => return AWAITS,
                    Err(limit) => return self.refuse(b'D', limit),
                };
                let at = HEADER_BYTES + 1;
                match self.bring(name, &statement) {
                    Brought::Here => {}
                    Brought::Awaited => return AWAITS,
                    Brought::Changed => {
                        self.refuse_changed(Asked::Describe, bytes, at, name.len());
                        return GOES_ON;
                    }
                }
                self.ensure_named(statement.naming.as_deref());
                self.ask(Asked::Describe);
                rename(bytes, at, name.len(), statement.server_name(), self.out.build());
                return GOES_ON;
            }
        }
        self.out.pass(bytes);
        GOES_ON
    }

    /// A Close takes the client's name away; the statement stays on the server, for others. What is passed on closes a
    /// name that the server does not have, which PostgreSQL answers like any other.
    fn close(&mut self, bytes: &[u8]) -> Result<ControlFlow<Hold>, ClientError> {
        self.server.unanswered_bytes += bytes.len();
        let (kind, name) = kind_and_name(bytes)?;
        if kind == b'S' && self.is_doubtful(name) {
            return AWAITS;
        }
        let statement = self.statements.get(name).filter(|_| kind == b'S').cloned();
        if kind == b'S' && statement.is_none() && self.may_be_unread() {
            self.note_unread();
        }
        let naming =
            statement.map(|statement| Box::new(Naming { client_name: Some(name.into()), statement }));
        if kind == b'S' && name.is_empty() {
            if self.ask_unnamed(Asked::CloseUnnamed) {
                self.statements.forget_unnamed();
                self.server.statements.set_unnamed(0);
            }
        } else if self.server.lease.ask(Asked::Close(naming), Whose::Client) && kind == b'S' {
            self.statements.remove(name);
        }
        self.out.pass(bytes);
        GOES_ON
    }
}

#[inline]
fn note(aftermath: &Aftermath, alone: bool, advances: &mut Advances, rules: &Rules, server: &mut ServerSide) {
    server.uncertain.note(aftermath, alone);
    note_sequences(aftermath, advances, rules, server);
    server.lease.committing |= aftermath.commits;
    server.lease.forgetting |= aftermath.forgets_statements;
    server.signalling.note(aftermath.signals);
    if rules.catalogue.may_be_changed_by(aftermath.doubts) {
        server.uncertain.changes_functions(&rules.catalogue);
    }
}

#[inline]
fn note_calls(text: &[u8], seen: Option<&Seen>, rules: &Rules, server: &mut ServerSide) {
    if !rules.catalogue.is_plain() {
        let tangled = server.lexing().characters != Characters::AsciiSafe;
        server.uncertain.note_calls(&rules.catalogue, text, tangled, seen);
    }
}

/// The message has gone its way.
pub(super) const GOES_ON: Result<ControlFlow<Hold>, ClientError> = Ok(ControlFlow::Continue(()));
