//! A client's requests, one at a time: what goes to the server in their place, and what is owed for them.

use std::{ops::ControlFlow, sync::Arc};

use super::{
    client_side::{SessionRules, violation},
    ensure_prepared::{AWAITS, Ensured, WaitReason},
    pending_replies::{Origin, Request},
    prepare::describe_parsed,
    return_to_tenant::{CurrentTenant, ReturnState},
    sequences::{SequenceUse, note_sequences},
    server_side::ServerSide,
    sql_prepare::{ParsedUnder, RewrittenText},
    tenant_choice::{is_read_along, kind_and_name},
};
use crate::{
    data_path::{
        functions::FoundEffects,
        prepared::{
            ClientStatements, Statement, StatementName, parse_settings::ParseSettings, rename,
            sql_prepare_effects::escape_client_name,
        },
        session_state::{Settings, side_effects::SideEffects, state_query::StateChecks},
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
pub struct ClientMessages<'a, 'c> {
    pub(super) statements: &'a mut ClientStatements,
    pub(super) rules: &'a SessionRules,
    /// The session's, as they were when the transaction began.
    pub(super) under: &'a Arc<ParseSettings>,
    /// What it began with.
    pub(super) startup: &'a Settings,
    pub(super) unnamed_serial: &'a mut u64,
    pub(super) sequence_use: &'a mut SequenceUse,
    pub(super) return_state: &'a mut ReturnState,
    pub(super) server: &'a mut ServerSide,
    pub(super) out: &'a mut Outgoing<'c>,
}

impl ClientMessages<'_, '_> {
    /// Sends a message on.
    #[inline]
    pub(super) fn message(
        &mut self,
        tag: u8,
        bytes: &[u8],
        whole: bool,
    ) -> Result<ControlFlow<WaitReason>, ClientError> {
        if self.server.checks.pending.is_some() {
            self.startup_again(tag, bytes);
        }
        if self.rules.current_tenant != CurrentTenant::First && !self.is_within_bounds(tag, bytes, whole)? {
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
                self.note(&SideEffects { advances_sequence: true, ..SideEffects::anything() }, false);
                self.ask(Request::FunctionCall);
            }
            b'P' => self.ask(Request::Parse(None)),
            b'B' => self.ask(Request::Bind),
            b'D' => self.ask(Request::Describe),
            b'C' => self.ask(Request::Close(None)),
            b'E' => self.execute(bytes),
            b'S' => self.ask(Request::Sync),
            b'c' | b'f' => self.server.replies.copy_done(),
            _ => {}
        }
        self.out.pass(bytes);
        GOES_ON
    }

    #[inline]
    pub(super) fn ask(&mut self, asked: Request) {
        // What the server skips has no effect and gets no reply; the bytes go to it all the same.
        let _ = self.server.replies.track(asked, Origin::Client);
    }

    /// Whether what was sent before may yet change what the client calls `name`.
    #[inline]
    fn is_doubtful(&mut self, name: &[u8]) -> bool {
        self.server.replies.is_doubtful(name) || (!name.is_empty() && self.server.replies.is_deallocating())
    }

    /// A text with this aftermath goes to the server.
    #[inline]
    pub(super) fn note(&mut self, side_effects: &SideEffects, alone: bool) {
        note(side_effects, alone, self.sequence_use, self.rules, self.server);
    }

    /// And this is the text: what does it call?
    #[inline]
    pub(super) fn note_calls(&mut self, text: &[u8], seen: Option<&FoundEffects>) {
        note_calls(text, seen, self.rules, self.server);
    }

    fn query(&mut self, bytes: &[u8], whole: bool) -> Result<ControlFlow<WaitReason>, ClientError> {
        self.server.unanswered_bytes += bytes.len();
        if self.server.replies.is_skipping() {
            self.out.pass(bytes);
            return GOES_ON;
        }
        if !self.rules.follow {
            self.end_unnamed();
            self.ask(Request::Query(None));
            self.out.pass(bytes);
            return GOES_ON;
        }
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let side_effects = match (whole, cstr(&mut { body })) {
            (true, Ok(sql)) => SideEffects::read(sql, self.server.lexing()),
            _ => SideEffects::of_unstored_text(),
        };
        if side_effects.needs_decision()
            && let Some(flow) = self.guard(b'Q', &side_effects, cstr(&mut { body }).unwrap_or_default())
        {
            return Ok(flow);
        }
        if (side_effects.names_statements || side_effects.inspects) && self.server.replies.may_have_others() {
            return AWAITS;
        }
        if side_effects.names_statements && self.server.replies.is_deallocating() {
            return AWAITS;
        }
        if side_effects.names_statements && self.server.replies.may_yet_skip() {
            // What is brought to the server for it comes in a batch of its own, which would end the client's.
            self.server.replies.wait_for_all();
            return AWAITS;
        }
        if let Err(limit) = self.rules.admit_settings(&self.server.applied, &side_effects) {
            return self.refuse(b'Q', limit);
        }
        self.end_unnamed();
        let settled = self.server.replies.is_settled();
        let alone = settled && self.server.replies.status() == b'I';
        let knew_settings = self.server.parsing(self.under).is_some();
        self.note(&side_effects, alone);
        self.part_sequences(true);
        self.note_calls(body, None);
        self.server.note_resets(&side_effects, self.startup, None);
        if side_effects.inspects {
            self.show_what_is_prepared(settled);
        } else if settled
            && self.statements.has_any_in_sql()
            && self.server.checks.includes(StateChecks::PREPARED)
        {
            self.show_to_code();
        }
        if side_effects.names_statements {
            let sql = cstr(&mut { body }).unwrap_or_default();
            let knows_settings = self.server.parsing(self.under).is_some();
            let settings = match settled && knew_settings == knows_settings {
                true => ParsedUnder::ThisQuery,
                false => ParsedUnder::ItsEnd,
            };
            let rewritten = match self.rewrite_names(sql, settings) {
                Ok(rewritten) => rewritten,
                Err(limit) => return self.refuse(b'Q', limit),
            };
            if let Some(RewrittenText { text, requires, prepare_effects, .. }) = rewritten {
                let mut preparer = self.server.preparer(self.under, self.startup);
                for statement in &requires {
                    preparer.ensure_for_query(statement, self.out);
                }
                preparer.make_room(prepare_effects.prepared(), self.out.build());
                prepare_effects.expect(self.statements, preparer.statements);
                self.ask(Request::Query(Some(Box::new(prepare_effects))));
                append(self.out.build(), b'Q', |out| append_cstr(out, &text));
                return GOES_ON;
            }
        }
        self.ask(Request::Query(None));
        self.out.pass(bytes);
        GOES_ON
    }

    fn parse(&mut self, bytes: &[u8], whole: bool) -> Result<ControlFlow<WaitReason>, ClientError> {
        self.server.unanswered_bytes += bytes.len();
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let name = cstr(&mut body).map_err(violation)?;
        let side_effects = |lexing| match cstr(&mut { body }) {
            Ok(sql) if whole => SideEffects::read(sql, lexing),
            _ => SideEffects::of_unstored_text(),
        };
        let lexing = self.server.lexing();
        if name.is_empty() {
            let side_effects = side_effects(lexing);
            if side_effects.needs_decision()
                && let Some(flow) = self.guard(b'P', &side_effects, cstr(&mut { body }).unwrap_or_default())
            {
                return Ok(flow);
            }
            if side_effects.names_statements && self.server.replies.may_have_others() {
                return AWAITS;
            }
            if let Err(limit) = self.admit_unnamed(if whole { body } else { b"" }, &side_effects) {
                return self.refuse(b'P', limit);
            }
            *self.unnamed_serial += 1;
            match self.rewritten(&side_effects, body) {
                Err(limit) => return self.refuse(b'P', limit),
                Ok(None) => {}
                Ok(Some(text)) => return self.parse_with_server_names(name, body, side_effects, text),
            }
            if self.ask_unnamed(Request::Parse(None)) {
                let (serial, under) = (*self.unnamed_serial, self.server.parsing(self.under));
                match whole {
                    true => self.statements.set_unnamed(serial, body, side_effects, None, under),
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
        if self.server.replies.may_have_others() || self.server.replies.is_deallocating() {
            return AWAITS;
        }
        if let Some(taken) = self.statements.get(name).cloned() {
            // The server has a statement of that name as well, and says what PostgreSQL says.
            self.server.preparer(self.under, self.startup).ensure(&taken, self.out);
            let naming = StatementName { client_name: Some(name.into()), statement: taken.clone() };
            self.ask(Request::ParseTaken(Box::new(naming)));
            rename(bytes, HEADER_BYTES, name.len(), taken.server_name(), self.out.build());
            return GOES_ON;
        }
        let read = side_effects(lexing);
        if read.needs_decision()
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
        if self.server.replies.describes(&statement, name) && self.server.replies.is_awaited() {
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
        let naming = StatementName { client_name: Some(name.into()), statement: statement.clone() };
        if self.server.replies.track(Request::Parse(Some(Box::new(naming))), Origin::Client) {
            self.server.statements.queued(&statement, self.server.replies.batch());
            self.server.statements.counts.client_parses += 1;
            self.statements.insert(name, statement.clone());
        }
        rename(bytes, HEADER_BYTES, name.len(), statement.server_name(), self.out.build());
        let ServerSide { replies, .. } = &mut *self.server;
        describe_parsed(&statement, Some(name), Origin::Prepare, replies, self.out.build());
    }

    fn bind(&mut self, bytes: &[u8], whole: bool) -> Result<ControlFlow<WaitReason>, ClientError> {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let portal = cstr(&mut body).map_err(violation)?;
        let name = cstr(&mut body).map_err(violation)?;
        if name.is_empty() {
            if self.server.replies.is_unnamed_doubtful() {
                return AWAITS;
            }
            let inspects = self.statements.unnamed_side_effects().inspects;
            if self.statements.unnamed_side_effects().needs_decision()
                && let Some(text) = self.statements.unnamed_body().map(<[u8]>::to_vec)
                && let Some(flow) =
                    self.guard_bound(&self.statements.unnamed_side_effects().clone(), &text, whole)?
            {
                return Ok(flow);
            }
            if self.statements.unnamed_sql_names().is_some() && self.server.replies.may_have_others() {
                return AWAITS;
            }
            if let Some(naming) = self.statements.unnamed_sql_names().cloned() {
                self.bind_naming(portal, &naming);
            }
            self.statements.run_unnamed();
            note(self.statements.unnamed_side_effects(), false, self.sequence_use, self.rules, self.server);
            self.part_sequences(false);
            note_calls(self.statements.unnamed_body().unwrap_or_default(), None, self.rules, self.server);
            self.server.note_resets(self.statements.unnamed_side_effects(), self.startup, Some(portal));
            if inspects {
                self.show_what_is_prepared(false);
            }
            self.with_unnamed(Request::Bind, bytes);
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
            self.ask(Request::Bind);
            match escape_client_name(name) {
                Some(other) => rename(bytes, at, name.len(), &other, self.out.build()),
                None => self.out.pass(bytes),
            }
            return GOES_ON;
        };
        if statement.side_effects.needs_decision()
            && let Some(flow) = self.guard_bound(&statement.side_effects, statement.body(), whole)?
        {
            return Ok(flow);
        }
        let statement = match self.alike(name, statement) {
            Ok(Some(statement)) => statement,
            Ok(None) => return AWAITS,
            Err(limit) => return self.refuse_bind(limit, whole),
        };
        if statement.sql_names.is_some() && self.server.replies.may_have_others() {
            return AWAITS;
        }
        match self.ensure_statement(name, &statement) {
            Ensured::Present => {}
            Ensured::Awaited => return AWAITS,
            Ensured::Changed => {
                self.refuse_changed(Request::Bind, bytes, at, name.len());
                return GOES_ON;
            }
        }
        if let Some(naming) = &statement.sql_names {
            self.bind_naming(portal, naming);
        }
        self.server.statements.counts.binds += 1;
        self.note(&statement.side_effects, false);
        self.part_sequences(false);
        self.note_calls(statement.body(), Some(&statement.found_effects));
        self.server.note_resets(&statement.side_effects, self.startup, Some(portal));
        if statement.side_effects.inspects {
            self.show_what_is_prepared(false);
        }
        self.ask(Request::Bind);
        rename(bytes, at, name.len(), statement.server_name(), self.out.build());
        GOES_ON
    }

    fn describe(&mut self, bytes: &[u8]) -> Result<ControlFlow<WaitReason>, ClientError> {
        let (kind, name) = kind_and_name(bytes)?;
        if kind == b'S' && (self.is_doubtful(name) || self.server.replies.is_unnamed_doubtful()) {
            return AWAITS;
        }
        match self.statements.get(name).cloned() {
            _ if kind != b'S' => self.ask(Request::Describe),
            _ if name.is_empty() => {
                let naming = self.statements.unnamed_sql_names().cloned();
                self.ensure_named(naming.as_deref());
                self.with_unnamed(Request::Describe, bytes);
                return GOES_ON;
            }
            None => {
                self.ask(Request::Describe);
                if let Some(other) = escape_client_name(name) {
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
                match self.ensure_statement(name, &statement) {
                    Ensured::Present => {}
                    Ensured::Awaited => return AWAITS,
                    Ensured::Changed => {
                        self.refuse_changed(Request::Describe, bytes, at, name.len());
                        return GOES_ON;
                    }
                }
                self.ensure_named(statement.sql_names.as_deref());
                self.ask(Request::Describe);
                rename(bytes, at, name.len(), statement.server_name(), self.out.build());
                return GOES_ON;
            }
        }
        self.out.pass(bytes);
        GOES_ON
    }

    /// A Close takes the client's name away; the statement stays on the server, for others. What is passed on closes a
    /// name that the server does not have, which PostgreSQL answers like any other.
    fn close(&mut self, bytes: &[u8]) -> Result<ControlFlow<WaitReason>, ClientError> {
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
            statement.map(|statement| Box::new(StatementName { client_name: Some(name.into()), statement }));
        if kind == b'S' && name.is_empty() {
            if self.ask_unnamed(Request::CloseUnnamed) {
                self.statements.forget_unnamed();
                self.server.statements.set_unnamed(0);
            }
        } else if self.server.replies.track(Request::Close(naming), Origin::Client) && kind == b'S' {
            self.statements.remove(name);
        }
        self.out.pass(bytes);
        GOES_ON
    }
}

#[inline]
fn note(
    side_effects: &SideEffects,
    alone: bool,
    advances: &mut SequenceUse,
    rules: &SessionRules,
    server: &mut ServerSide,
) {
    server.checks.note(side_effects, alone);
    note_sequences(side_effects, advances, rules, server);
    server.replies.note(side_effects.commits, side_effects.deallocates);
    server.signals.note(side_effects.signals);
    if rules.functions.may_be_changed_by(side_effects.checks) {
        server.checks.changes_functions(&rules.functions);
    }
}

#[inline]
fn note_calls(text: &[u8], seen: Option<&FoundEffects>, rules: &SessionRules, server: &mut ServerSide) {
    if !rules.functions.is_plain() {
        let words_hidden = server.lexing().characters != Characters::AsciiSafe;
        server.checks.note_calls(&rules.functions, text, words_hidden, seen);
    }
}

/// The message has gone its way.
pub(super) const GOES_ON: Result<ControlFlow<WaitReason>, ClientError> = Ok(ControlFlow::Continue(()));
