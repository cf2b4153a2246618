//! A client's messages: what goes to the server for each of them, and the replies that are then pending.

use std::{
    ops::{ControlFlow, Deref},
    sync::Arc,
};

use super::{
    client_side::{SessionRules, violation},
    ensure_prepared::{AWAIT_REPLIES, Ensured, WaitReason},
    pending_checks::LEXER_SETTINGS,
    pending_replies::{Origin, Request},
    prepare::describe_parsed,
    read_ahead::ReadAhead,
    return_to_tenant::{CurrentTenant, ReturnState},
    sequences::{SequenceUse, record_sequences},
    server_side::ServerSide,
    skipped_messages::has_no_effect,
    sql_prepare::{ParsedUnder, RewrittenText},
    tenant_choice::{kind_and_name, must_be_read},
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
    error::{ClientError, Limit},
    wire::{
        frame::{HEADER_BYTES, cstr, header},
        message::{append, append_cstr},
        outgoing::Outgoing,
    },
};

/// Whether a message was handled, or must wait.
pub(super) type Handled = Result<ControlFlow<WaitReason>, ClientError>;

/// Handles a client's messages one at a time.
pub struct ClientMessages<'a, 'c> {
    pub(super) statements: &'a mut ClientStatements,
    pub(super) rules: &'a SessionRules,
    /// The session's parse settings at the beginning of the transaction.
    pub(super) under: &'a Arc<ParseSettings>,
    pub(super) startup: &'a Settings,
    pub(super) unnamed_serial: &'a mut u64,
    pub(super) sequence_use: &'a mut SequenceUse,
    pub(super) return_state: &'a mut ReturnState,
    pub(super) server: &'a mut ServerSide,
    pub(super) out: &'a mut Outgoing<'c>,
    /// What was read of the message that is handled.
    pub(super) first: ReadAhead,
}

impl ClientMessages<'_, '_> {
    #[inline]
    pub(super) fn message(&mut self, tag: u8, bytes: &[u8], mut whole: bool) -> Handled {
        if self.server.checks.pending.is_some() {
            self.restore_startup(tag, bytes);
        }
        if self.server.lexing_changes && matches!(tag, b'Q' | b'P') && self.may_be_read_otherwise(bytes) {
            // A text must be read as the server will read it, so after the replies. Where they come only after a
            // Sync of the client, it is not read.
            if !self.server.replies.is_unsynced() {
                self.server.replies.wait_for_all();
                return AWAIT_REPLIES;
            }
            whole = false;
        }
        let reads_names = self.rules.follow && self.rules.current_tenant == CurrentTenant::First;
        if !reads_names && is_cut_short(tag, bytes) {
            return self.invalid(bytes);
        }
        if self.rules.current_tenant != CurrentTenant::First && !self.may_run(tag, bytes, whole)? {
            return CONTINUE;
        }
        match tag {
            b'Q' | b'P' if !self.rules.follow && whole && must_be_read(bytes, self.rules) => {
                return self.text_in_session_mode(tag, bytes);
            }
            b'B' | b'D' | b'C' if !self.rules.follow && !self.statements.is_empty() => {
                return self.statement_in_session_mode(tag, bytes, whole);
            }
            b'Q' => return self.query(bytes, whole),
            b'P' if self.rules.follow => return self.parse(bytes, whole),
            b'B' if self.rules.follow => return self.bind(bytes, whole),
            b'D' if self.rules.follow => return self.describe(bytes),
            b'C' if self.rules.follow => return self.close(bytes),
            b'F' => {
                self.record(&SideEffects { advances_sequence: true, ..SideEffects::anything() }, false);
                self.track(Request::FunctionCall);
            }
            b'P' => self.track(Request::Parse(None)),
            b'B' => self.track(Request::Bind),
            b'D' => self.track(Request::Describe),
            b'C' => self.track(Request::Close(None)),
            b'E' => return self.execute(bytes),
            b'H' if bytes.len() > HEADER_BYTES || !whole => return self.invalid(bytes),
            b'S' => self.track(Request::Sync),
            b'c' | b'f' => {
                if let (false, Some((_, length))) =
                    (self.server.replies.is_working(), header(bytes).map_err(violation)?)
                {
                    // In an idle transaction: one that is too long ends the session.
                    has_no_effect(tag, length)?;
                }
                self.server.replies.copy_done();
            }
            _ => {}
        }
        self.out.pass(bytes);
        CONTINUE
    }

    /// A message whose names do not end within it, or a Flush with a body: the server refuses it and goes on.
    #[cold]
    pub(super) fn invalid(&mut self, bytes: &[u8]) -> Handled {
        self.track(Request::Invalid);
        self.out.pass(bytes);
        CONTINUE
    }

    /// Whether pending replies may change what a text means: only one with a backslash or other letters than ASCII's
    /// is read differently.
    #[cold]
    fn may_be_read_otherwise(&self, bytes: &[u8]) -> bool {
        let text = bytes.get(HEADER_BYTES..).unwrap_or_default();
        self.server.replies.pending() > 0 && text.iter().any(|byte| *byte == b'\\' || !byte.is_ascii())
    }

    #[inline]
    pub(super) fn track(&mut self, request: Request) {
        // A request that the server skips gets no reply; its bytes are sent all the same.
        let _ = self.server.replies.track(request, Origin::Client);
    }

    /// Whether pending replies may still change the statement that the client calls `name`.
    #[inline]
    fn may_change_meaning(&mut self, name: &[u8]) -> bool {
        self.server.replies.may_change(name) || (!name.is_empty() && self.server.replies.is_deallocating())
    }

    #[inline]
    pub(super) fn record(&mut self, side_effects: &SideEffects, alone: bool) {
        record_side_effects(side_effects, alone, self.sequence_use, self.rules, self.server);
    }

    #[inline]
    pub(super) fn record_calls<T: Deref<Target = [u8]>>(
        &mut self,
        text: impl Fn() -> T,
        read: &SideEffects,
        cached: Option<&FoundEffects>,
    ) {
        record_calls(text, read, cached, self.rules, self.server);
    }

    /// The side effects of the text of this message.
    #[inline]
    fn read(&self, sql: &[u8]) -> SideEffects {
        let lexing = self.server.lexing();
        match self.first.under(lexing) {
            Some(query) => SideEffects::of_bare(query),
            None => SideEffects::read(sql, lexing),
        }
    }

    fn query(&mut self, bytes: &[u8], whole: bool) -> Handled {
        self.server.unanswered_bytes += bytes.len();
        if self.server.replies.is_skipping() {
            self.out.pass(bytes);
            return CONTINUE;
        }
        if !self.rules.follow {
            self.end_unnamed();
            self.track(Request::Query(None));
            self.out.pass(bytes);
            return CONTINUE;
        }
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let side_effects = match cstr(&mut { body }) {
            Ok(sql) if whole => self.read(sql),
            _ => SideEffects::of_unstored_text(),
        };
        if side_effects.needs_decision()
            && let Some(flow) = self.guard(b'Q', &side_effects, cstr(&mut { body }).unwrap_or_default())
        {
            return Ok(flow);
        }
        if (side_effects.names_statements || side_effects.inspects) && self.server.replies.may_have_others() {
            return AWAIT_REPLIES;
        }
        if side_effects.names_statements && self.server.replies.is_deallocating() {
            return AWAIT_REPLIES;
        }
        if side_effects.names_statements && self.server.replies.may_yet_skip() {
            // Statements are prepared for the query in a batch of their own, whose Sync would end the
            // client's batch.
            self.server.replies.wait_for_all();
            return AWAIT_REPLIES;
        }
        if let Err(limit) = self.rules.admit_settings(&self.server.applied, &side_effects) {
            return self.reject_over_limit(b'Q', limit);
        }
        self.end_unnamed();
        let status_known = self.server.replies.is_status_known();
        let alone = status_known && self.server.replies.status() == b'I';
        let knew_settings = self.server.parsing(self.under).is_some();
        self.record(&side_effects, alone);
        self.discard_sequences_before_text(true);
        self.record_calls(|| body, &side_effects, None);
        self.server.record_resets(&side_effects, self.startup, None);
        if side_effects.inspects {
            self.show_prepared_statements(status_known);
        } else if status_known
            && self.statements.has_any_in_sql()
            && self.server.checks.includes(StateChecks::PREPARED)
        {
            self.show_statements_to_code();
        }
        // One with bytes behind its text fails, and must not be written anew without them.
        if side_effects.names_statements && body.iter().position(|byte| *byte == 0) == Some(body.len() - 1) {
            let sql = cstr(&mut { body }).unwrap_or_default();
            let knows_settings = self.server.parsing(self.under).is_some();
            let settings = match status_known && knew_settings == knows_settings {
                true => ParsedUnder::ThisQuery,
                false => ParsedUnder::ItsEnd,
            };
            if let Some(handled) = self.query_with_names(sql, settings) {
                return handled;
            }
        }
        self.track(Request::Query(None));
        self.out.pass(bytes);
        CONTINUE
    }

    /// Sends a query with the servers' names of the statements that it names; `None`: it needs no change.
    #[cold]
    fn query_with_names(&mut self, sql: &[u8], settings: ParsedUnder) -> Option<Handled> {
        let RewrittenText { text, requires, prepare_effects, .. } = match self.rewrite_names(sql, settings) {
            Ok(rewritten) => rewritten?,
            Err(limit) => return Some(self.reject_over_limit(b'Q', limit)),
        };
        let mut preparer = self.server.preparer(self.under, self.startup).keeping(&requires);
        for statement in &requires {
            preparer.ensure_for_query(statement, self.out);
        }
        preparer.make_room(prepare_effects.prepared(), self.out.build());
        prepare_effects.expect(self.statements, preparer.statements);
        self.track(Request::Query(Some(Box::new(prepare_effects))));
        append(self.out.build(), b'Q', |out| append_cstr(out, &text));
        Some(CONTINUE)
    }

    fn parse(&mut self, bytes: &[u8], whole: bool) -> Handled {
        self.server.unanswered_bytes += bytes.len();
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let Ok(name) = cstr(&mut body) else { return self.invalid(bytes) };
        let side_effects = |messages: &Self| match cstr(&mut { body }) {
            Ok(sql) if whole => messages.read(sql),
            _ => SideEffects::of_unstored_text(),
        };
        if name.is_empty() {
            let side_effects = side_effects(self);
            return self.parse_unnamed(bytes, body, whole, side_effects);
        }
        if !whole {
            return self.parse_unstored(bytes).map(ControlFlow::Continue);
        }
        if self.server.replies.may_have_others() || self.server.replies.is_deallocating() {
            return AWAIT_REPLIES;
        }
        if let Some(taken) = self.statements.get(name).cloned() {
            // The server has a statement of that name as well: its error is PostgreSQL's own.
            self.server.preparer(self.under, self.startup).ensure(&taken, self.out);
            rename(bytes, HEADER_BYTES, name.len(), taken.server_name(), self.out.build());
            let taken = StatementName { client_name: Some(name.into()), statement: taken };
            self.track(Request::ParseTaken(Box::new(taken)));
            return CONTINUE;
        }
        let read = side_effects(self);
        if read.needs_decision()
            && let Some(flow) = self.guard(b'P', &read, cstr(&mut { body }).unwrap_or_default())
        {
            return Ok(flow);
        }
        let admitted = self.rules.admit_text(self.statements, name, body);
        if let Err(limit) = admitted.and_then(|()| self.rules.admit_settings(&self.server.applied, &read)) {
            return self.reject_over_limit(b'P', limit);
        }
        match self.rewritten(&read, body) {
            Err(limit) => return self.reject_over_limit(b'P', limit),
            Ok(None) => {}
            Ok(Some(text)) => return self.parse_with_server_names(name, body, read, text),
        }
        let statement = self.new_statement(body, read, None);
        if self.server.replies.describes(&statement, name) && self.server.replies.is_awaited() {
            // A second Parse may have another row description, and must not be compared with that of the
            // other name.
            return AWAIT_REPLIES;
        }
        self.parse_statement(bytes, name, &statement);
        CONTINUE
    }

    /// `body` is the message after the name.
    fn parse_unnamed(
        &mut self,
        bytes: &[u8],
        body: &[u8],
        whole: bool,
        side_effects: SideEffects,
    ) -> Handled {
        if side_effects.needs_decision()
            && let Some(flow) = self.guard(b'P', &side_effects, cstr(&mut { body }).unwrap_or_default())
        {
            return Ok(flow);
        }
        if side_effects.names_statements && self.server.replies.may_have_others() {
            return AWAIT_REPLIES;
        }
        if let Err(limit) = self.admit_unnamed(if whole { body } else { b"" }, &side_effects) {
            return self.reject_over_limit(b'P', limit);
        }
        *self.unnamed_serial += 1;
        match self.rewritten(&side_effects, body) {
            Err(limit) => return self.reject_over_limit(b'P', limit),
            Ok(None) => {}
            Ok(Some(text)) => return self.parse_with_server_names(b"", body, side_effects, text),
        }
        if self.track_unnamed(Request::Parse(None)) {
            let (serial, under) = (*self.unnamed_serial, self.server.parsing(self.under));
            match whole {
                true => self.statements.set_unnamed(serial, body, side_effects, None, under),
                false => self.set_unnamed_unstored(serial),
            }
            self.server.statements.set_unnamed(*self.unnamed_serial);
        }
        self.out.pass(bytes);
        CONTINUE
    }

    /// Sends a Parse with the proxy's name for the statement.
    pub(super) fn parse_statement(&mut self, bytes: &[u8], name: &[u8], statement: &Arc<Statement>) {
        let statement = statement.clone();
        self.server.preparer(self.under, self.startup).make_room_for(&statement, self.out.build());
        if self
            .server
            .replies
            .track(Request::Parse(Some(Box::new(statement.named(Some(name))))), Origin::Client)
        {
            self.server.statements.queued(&statement, self.server.replies.batch());
            self.server.statements.counts.client_parses += 1;
            self.statements.insert(name, statement.clone());
        }
        rename(bytes, HEADER_BYTES, name.len(), statement.server_name(), self.out.build());
        let ServerSide { replies, .. } = &mut *self.server;
        describe_parsed(&statement, Some(name), Origin::Prepare, replies, self.out.build());
    }

    fn bind(&mut self, bytes: &[u8], whole: bool) -> Handled {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let (Ok(portal), Ok(name)) = (cstr(&mut body), cstr(&mut body)) else { return self.invalid(bytes) };
        // The portal has another text from now on.
        let _ = self.server.bound_portal.take_if(|(bound, _)| **bound == *portal);
        if name.is_empty() {
            return self.bind_unnamed(portal, bytes, whole);
        }
        let at = HEADER_BYTES + portal.len() + 1;
        if self.may_change_meaning(name) {
            return AWAIT_REPLIES;
        }
        let Some(statement) = self.statements.get(name).cloned() else {
            // The server sends the error, with the client's own name for the statement.
            if self.may_be_unstored() {
                self.record_unread_text();
            }
            self.track(Request::Bind);
            match escape_client_name(name) {
                Some(other) => rename(bytes, at, name.len(), &other, self.out.build()),
                None => self.out.pass(bytes),
            }
            return CONTINUE;
        };
        if statement.side_effects.needs_decision()
            && let Some(flow) = self.guard_bound(&statement.side_effects, &statement.body(), whole)?
        {
            return Ok(flow);
        }
        if statement.sql_names.is_some() && self.server.replies.may_have_others() {
            return AWAIT_REPLIES;
        }
        let statement = match self.current_statement(name, statement) {
            Ok(Some(statement)) => statement,
            Ok(None) => return AWAIT_REPLIES,
            Err(limit) => return self.reject_bind(whole, limit),
        };
        match self.ensure_statement(name, &statement) {
            Ensured::Present => {}
            Ensured::Awaited => return AWAIT_REPLIES,
            Ensured::Changed => {
                self.reject_changed(Request::Bind, bytes, at, name.len());
                return CONTINUE;
            }
        }
        if let Some(sql_names) = &statement.sql_names {
            self.bind_with_names(portal, sql_names);
        }
        self.server.statements.counts.binds += 1;
        self.record(&statement.side_effects, false);
        self.discard_sequences_before_text(false);
        self.record_calls(|| statement.body(), &statement.side_effects, Some(&statement.found_effects));
        self.server.record_resets(&statement.side_effects, self.startup, Some(portal));
        if statement.side_effects.inspects {
            self.show_prepared_statements(false);
        }
        self.track(Request::Bind);
        rename(bytes, at, name.len(), statement.server_name(), self.out.build());
        CONTINUE
    }

    /// A Bind that a memory limit forbids, perhaps with a part that is still to come.
    #[cold]
    fn reject_bind(&mut self, whole: bool, limit: Limit) -> Handled {
        self.return_state.rejected |= !whole;
        self.reject_over_limit(b'B', limit)
    }

    fn bind_unnamed(&mut self, portal: &[u8], bytes: &[u8], whole: bool) -> Handled {
        if self.server.replies.unnamed_may_change() {
            return AWAIT_REPLIES;
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
            return AWAIT_REPLIES;
        }
        match self.unnamed_with_current_names() {
            Ok(true) => {}
            Ok(false) => return AWAIT_REPLIES,
            Err(limit) => return self.reject_bind(whole, limit),
        }
        if let Some(sql_names) = self.statements.unnamed_sql_names().cloned() {
            self.bind_with_names(portal, &sql_names);
        }
        self.statements.run_unnamed();
        let side_effects = self.statements.unnamed_side_effects();
        record_side_effects(side_effects, false, self.sequence_use, self.rules, self.server);
        self.discard_sequences_before_text(false);
        let body = self.statements.unnamed_body().unwrap_or_default();
        let read = self.statements.unnamed_side_effects();
        record_calls(|| body, read, None, self.rules, self.server);
        self.server.record_resets(self.statements.unnamed_side_effects(), self.startup, Some(portal));
        if inspects {
            self.show_prepared_statements(false);
        }
        self.with_unnamed(Request::Bind, bytes);
        CONTINUE
    }

    fn describe(&mut self, bytes: &[u8]) -> Handled {
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let Ok((kind, name)) = kind_and_name(body) else { return self.invalid(bytes) };
        if kind == b'S' && (self.may_change_meaning(name) || self.server.replies.unnamed_may_change()) {
            return AWAIT_REPLIES;
        }
        match self.statements.get(name).cloned() {
            _ if kind != b'S' => self.track(Request::Describe),
            _ if name.is_empty() => {
                match self.unnamed_with_current_names() {
                    Ok(true) => {}
                    Ok(false) => return AWAIT_REPLIES,
                    Err(limit) => return self.reject_over_limit(b'D', limit),
                }
                let sql_names = self.statements.unnamed_sql_names().cloned();
                self.ensure_named(sql_names.as_deref());
                self.with_unnamed(Request::Describe, bytes);
                return CONTINUE;
            }
            None => {
                self.track(Request::Describe);
                if let Some(other) = escape_client_name(name) {
                    rename(bytes, HEADER_BYTES + 1, name.len(), &other, self.out.build());
                    return CONTINUE;
                }
            }
            Some(statement) => {
                let statement = match self.current_statement(name, statement) {
                    Ok(Some(statement)) => statement,
                    Ok(None) => return AWAIT_REPLIES,
                    Err(limit) => return self.reject_over_limit(b'D', limit),
                };
                let at = HEADER_BYTES + 1;
                match self.ensure_statement(name, &statement) {
                    Ensured::Present => {}
                    Ensured::Awaited => return AWAIT_REPLIES,
                    Ensured::Changed => {
                        self.reject_changed(Request::Describe, bytes, at, name.len());
                        return CONTINUE;
                    }
                }
                self.ensure_named(statement.sql_names.as_deref());
                self.track(Request::Describe);
                rename(bytes, at, name.len(), statement.server_name(), self.out.build());
                return CONTINUE;
            }
        }
        self.out.pass(bytes);
        CONTINUE
    }

    /// Close. Removes the client's name; the statement stays on the server for other sessions. The name in
    /// the Close is unknown to the server, and PostgreSQL answers such a Close with CloseComplete.
    fn close(&mut self, bytes: &[u8]) -> Handled {
        self.server.unanswered_bytes += bytes.len();
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let Ok((kind, name)) = kind_and_name(body) else { return self.invalid(bytes) };
        if kind == b'S' && self.may_change_meaning(name) {
            return AWAIT_REPLIES;
        }
        let statement = self.statements.get(name).filter(|_| kind == b'S').cloned();
        if kind == b'S' && statement.is_none() && self.may_be_unstored() {
            self.record_unread_text();
        }
        let closed = statement.map(|statement| Box::new(statement.named(Some(name))));
        if kind == b'S' && name.is_empty() {
            if self.track_unnamed(Request::CloseUnnamed) {
                self.statements.forget_unnamed();
                self.server.statements.set_unnamed(0);
            }
        } else if self.server.replies.track(Request::Close(closed), Origin::Client) && kind == b'S' {
            self.statements.remove(name);
        }
        self.out.pass(bytes);
        CONTINUE
    }
}

/// Whether the names in front of a message do not end within it. The server refuses it and goes on.
#[inline]
pub fn is_cut_short(tag: u8, bytes: &[u8]) -> bool {
    let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
    match tag {
        b'P' | b'E' => behind_name(body).is_none(),
        b'B' => behind_name(body).and_then(behind_name).is_none(),
        b'D' | b'C' => body.split_first().and_then(|(_, name)| behind_name(name)).is_none(),
        _ => false,
    }
}

/// What follows a name; most are empty.
#[inline]
fn behind_name(mut bytes: &[u8]) -> Option<&[u8]> {
    if let [0, behind @ ..] = bytes {
        return Some(behind);
    }
    cstr(&mut bytes).ok().map(|_| bytes)
}

#[inline]
fn record_side_effects(
    side_effects: &SideEffects,
    alone: bool,
    sequence_use: &mut SequenceUse,
    rules: &SessionRules,
    server: &mut ServerSide,
) {
    if side_effects.is_bare {
        return record_sequences(side_effects, sequence_use, rules, server);
    }
    server.checks.record(side_effects, alone);
    server.lexing_changes |= changes_lexing(side_effects);
    if let Some(names) = &side_effects.custom_names {
        server.custom.set(rules.shared_statements.custom_names.all(names.iter().map(|name| &**name)));
    }
    server.note_unnamed_custom();
    record_sequences(side_effects, sequence_use, rules, server);
    server.replies.note(side_effects.commits, side_effects.deallocates);
    server.signals.record(side_effects.signals);
    if side_effects.checks.contains(StateChecks::FUNCTIONS) {
        server.checks.changes_functions(&rules.functions, side_effects.only_defines);
    }
}

/// Whether a text names a setting that changes how the server reads string literals.
#[inline]
fn changes_lexing(side_effects: &SideEffects) -> bool {
    let SideEffects { names, resets, .. } = side_effects;
    (names.is_some() || resets.is_some())
        && LEXER_SETTINGS.iter().any(|setting| {
            names.as_ref().is_some_and(|names| names.iter().any(|name| **name == **setting))
                || resets.as_ref().is_some_and(|resets| resets.is_reset(setting))
        })
}

#[inline]
fn record_calls<T: Deref<Target = [u8]>>(
    text: impl Fn() -> T,
    read: &SideEffects,
    cached: Option<&FoundEffects>,
    rules: &SessionRules,
    server: &mut ServerSide,
) {
    let words_hidden = |server: &ServerSide| server.lexing().characters != Characters::AsciiSafe;
    if read.checks.contains(StateChecks::CALLERS) {
        let words_hidden = words_hidden(server);
        server.checks.makes_callers(&rules.functions, &text(), words_hidden);
    }
    if !rules.functions.is_plain() {
        let words_hidden = words_hidden(server);
        server.checks.record_calls(&rules.functions, text, words_hidden, read, cached);
        server.note_unnamed_custom();
    }
}

pub(super) const CONTINUE: Handled = Ok(ControlFlow::Continue(()));
