//! PREPARE, EXECUTE and DEALLOCATE in a client's text. The text is sent with the proxy's statement names,
//! until the session reads the list of prepared statements (`ensure_prepared.rs`).
//!
//! A statement made by PREPARE can be prepared on another server by the same text. It is never shared between
//! sessions. A PREPARE of a name that exists is sent with that statement's name, so that PostgreSQL reports
//! the error; `sql_prepare_effects.rs` puts the client's names back into errors.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    sync::Arc,
};

use super::{
    client_messages::{CONTINUE, ClientMessages, Handled},
    pending_replies::{Origin, Request},
};
use crate::{
    data_path::{
        prepared::{
            SqlNames, Statement,
            parse_settings::ParseSettings,
            sql_prepare_effects::{PrepareEffect, PrepareEffects, escape_client_name},
            statement_text::stored_bytes,
        },
        session_state::{side_effects::SideEffects, state_query::StateChecks},
        sql::{self, Discard, Kind},
    },
    error::Limit,
    wire::{
        frame::{HEADER_BYTES, cstr},
        message::{append, append_cstr},
    },
};

/// The text and types of a Parse, with the proxy's statement names, and what the name means.
type ParseBody = (Vec<u8>, Arc<SqlNames>);

/// A text with the proxy's statement names.
#[derive(Debug, Default)]
pub(super) struct RewrittenText {
    pub text: Vec<u8>,
    /// Statements that the server must have before it runs.
    pub requires: Vec<Arc<Statement>>,
    pub prepare_effects: PrepareEffects,
    /// The first name, without its effects.
    first_name: Option<SqlNames>,
    /// Number of characters of `text` up to the last replaced name.
    characters: usize,
}

impl RewrittenText {
    /// Appends `between` unchanged, then `ours` in place of the client's `name`.
    fn replace(&mut self, between: &[u8], name: &[u8], ours: &[u8]) {
        self.text.extend_from_slice(between);
        let start = self.text.len();
        self.text.extend_from_slice(ours);
        if let Some(first) = &mut self.first_name {
            first.renamed.get_or_insert_with(|| (start..self.text.len(), name.into()));
        }
        // Counts only the new part: a text may have tens of thousands of names.
        let characters = |bytes| String::from_utf8_lossy(bytes).chars().count();
        self.characters += characters(between) + characters(ours);
        self.prepare_effects
            .shifts
            .push((self.characters, ours.len().cast_signed() - name.len().cast_signed()));
    }

    /// The text with the types of `body`, which is a Parse after the name.
    fn into_body(self, body: &[u8]) -> ParseBody {
        let Self { mut text, prepare_effects, first_name, .. } = self;
        let end = body.iter().position(|byte| *byte == 0);
        text.extend_from_slice(end.and_then(|end| body.get(end..)).unwrap_or_default());
        (text, Arc::new(SqlNames { prepare_effects, ..first_name.unwrap_or_default() }))
    }
}

/// The settings under which a PREPARE parses its statement.
#[derive(Debug, Clone, Copy)]
pub(super) enum ParsedUnder {
    /// The present ones; the text continues an open batch.
    ThisBatch,
    /// The present ones; the text is a simple query and no batch is open.
    ThisQuery,
    /// The text may change them: those at its end.
    ItsEnd,
}

/// The meaning of names within a text, after its own PREPARE and DEALLOCATE statements.
#[derive(Default)]
struct LocalNames {
    names: HashMap<Box<[u8]>, Option<Arc<Statement>>>,
    all_gone: bool,
    /// Statements that must be prepared, each listed once.
    required: HashSet<u64>,
}

impl ClientMessages<'_, '_> {
    /// Execute. The portal's text may prepare or deallocate statements.
    #[inline]
    pub(super) fn execute(&mut self, bytes: &[u8]) -> Handled {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let Ok(executed) = cstr(&mut body) else { return self.invalid(bytes) };
        let bound = self.server.bound_portal.take_if(|(portal, _)| **portal == *executed);
        let prepare_effects = bound.map(|(_, prepare_effects)| Box::new(prepare_effects));
        if let Some(prepare_effects) = &prepare_effects {
            prepare_effects.expect(self.statements, &mut self.server.statements);
        }
        self.track(Request::Execute(prepare_effects));
        self.out.pass(bytes);
        CONTINUE
    }

    /// The settings under which a PREPARE in the text parses its statement.
    fn settings_of(&mut self, which: ParsedUnder) -> Arc<ParseSettings> {
        match which {
            ParsedUnder::ThisBatch => self.settings_now(Origin::Prepare),
            ParsedUnder::ThisQuery => {
                let under = self.settings_now(Origin::TryPrepare);
                if self.server.parsing(self.under).is_none() {
                    self.server.replies.end_own_batch(self.out.build());
                }
                under
            }
            ParsedUnder::ItsEnd => {
                let under = ParseSettings::unknown();
                self.server.checks.parses(&under);
                under
            }
        }
    }

    /// [`Self::rewrite_names`] for a Parse message's body after the name.
    pub(super) fn rewritten(
        &mut self,
        read: &SideEffects,
        mut body: &[u8],
    ) -> Result<Option<RewrittenText>, Limit> {
        match read.names_statements {
            true => self.rewrite_names(cstr(&mut body).unwrap_or_default(), ParsedUnder::ThisBatch),
            false => Ok(None),
        }
    }

    /// Replaces the statement names in a text; `None` if it has none.
    #[cold]
    pub(super) fn rewrite_names(
        &mut self,
        sql: &[u8],
        settings: ParsedUnder,
    ) -> Result<Option<RewrittenText>, Limit> {
        let mut rewritten = RewrittenText::default();
        let mut local = LocalNames::default();
        let (mut copied, mut named, mut bytes) = (0, 0, 0);
        for found in sql::statements(sql, self.server.lexing()) {
            if matches!(found.kind, Kind::DeallocateAll | Kind::Discard(Discard::All)) {
                local = LocalNames { all_gone: true, ..LocalNames::default() };
            }
            let Some(name) = &found.prepared else { continue };
            let value = name.value.as_ref();
            let known = self.meaning(value, &local)?;
            rewritten.first_name.get_or_insert_with(|| SqlNames {
                client_name: value.into(),
                meaning: known.clone(),
                ..SqlNames::default()
            });
            let made_here = local.names.get(value).is_some_and(Option::is_some);
            let effects = &mut rewritten.prepare_effects.effects;
            let ours = match (&found.kind, known) {
                (Kind::Prepare { body, .. }, None) => {
                    (named, bytes) = (named + 1, bytes + stored_bytes(found.text));
                    self.rules.admit(self.statements, named, bytes)?;
                    let prepared = found.text.get(body.clone()).unwrap_or_default();
                    let statement = self.new_in_sql(prepared, as_kept(sql, &found, &name.range), settings);
                    effects.push_back(PrepareEffect::Prepares(statement.named(Some(value))));
                    let ours = statement.server_name().to_vec();
                    local.names.insert(value.into(), Some(statement));
                    ours
                }
                (kind, Some(statement)) => {
                    let ours = statement.server_name().to_vec();
                    if *kind == Kind::Deallocate {
                        effects.push_back(PrepareEffect::Deallocates(Some(statement.named(Some(value)))));
                        local.names.insert(value.into(), None);
                    }
                    self.record_named(&statement);
                    if !made_here && local.required.insert(statement.id) {
                        rewritten.requires.push(statement);
                    }
                    ours
                }
                (kind, None) => {
                    self.record_unknown_name();
                    if *kind == Kind::Deallocate {
                        effects.push_back(PrepareEffect::Deallocates(None));
                    }
                    match escape_client_name(value) {
                        Some(ours) => ours,
                        None => continue,
                    }
                }
            };
            if ours == value {
                continue;
            }
            let range = found.start + name.range.start..found.start + name.range.end;
            let between = sql.get(copied..range.start).unwrap_or_default();
            rewritten.replace(between, sql.get(range.clone()).unwrap_or_default(), &ours);
            copied = range.end;
        }
        if rewritten.first_name.is_none() {
            return Ok(None);
        }
        rewritten.text.extend_from_slice(sql.get(copied..).unwrap_or_default());
        Ok(Some(rewritten))
    }

    /// The statement that a name means at this place of a text.
    fn meaning(&mut self, name: &[u8], local: &LocalNames) -> Result<Option<Arc<Statement>>, Limit> {
        if let Some(known) = local.names.get(name) {
            return Ok(known.clone());
        }
        let known = self.statements.get(name).filter(|_| !local.all_gone).cloned();
        let Some(known) = known else { return Ok(None) };
        Ok(Some(self.usable_statement(name, known.clone())?.unwrap_or(known)))
    }

    /// A new statement of a PREPARE: the text of what it `prepared`, and what PostgreSQL keeps with the name's
    /// place in it.
    fn new_in_sql(
        &mut self,
        prepared: &[u8],
        (text, name): (&[u8], Range<usize>),
        settings: ParsedUnder,
    ) -> Arc<Statement> {
        let side_effects = SideEffects::read(prepared, self.server.lexing());
        let under = self.settings_of(settings);
        self.rules.shared_statements.in_sql(side_effects, text, name, &under)
    }

    /// Sends the Parse of a text with statement names.
    #[cold]
    pub(super) fn parse_with_server_names(
        &mut self,
        name: &[u8],
        body: &[u8],
        side_effects: SideEffects,
        rewritten: RewrittenText,
    ) -> Handled {
        let (text, sql_names) = rewritten.into_body(body);
        let mut message = Vec::new();
        append(&mut message, b'P', |out| {
            append_cstr(out, name);
            out.extend_from_slice(&text);
        });
        if !name.is_empty() {
            let statement = self.new_statement(&text, side_effects, Some(sql_names));
            self.parse_statement(&message, name, &statement);
            return CONTINUE;
        }
        // A PREPARE sent later would replace the unnamed statement: the required statement comes first.
        self.ensure_named(Some(&sql_names));
        if self.track_unnamed(Request::Parse(None)) {
            let serial = *self.unnamed_serial;
            let under = self.server.parsing(self.under);
            self.statements.set_unnamed(serial, &text, side_effects, Some(sql_names), under);
            self.server.statements.set_unnamed(serial);
        }
        self.out.build().extend_from_slice(&message);
        CONTINUE
    }

    /// [`Self::usable_statement`] for a Bind or Describe. PostgreSQL looks up the name in a text each time that
    /// the text runs. So if the name has another meaning than before, or is free again for a PREPARE, the
    /// client's text is rewritten anew, and the client has a new statement.
    #[inline]
    pub(super) fn current_statement(
        &mut self,
        name: &[u8],
        statement: Arc<Statement>,
    ) -> Result<Option<Arc<Statement>>, Limit> {
        let Some(statement) = self.usable_statement(name, statement)? else { return Ok(None) };
        match self.is_current(statement.sql_names.as_deref(), &statement.side_effects) {
            true => Ok(Some(statement)),
            false => self.rewrite_statement(name, statement),
        }
    }

    /// Whether a text still does what the client wrote. One that names a statement was not rewritten if its Parse
    /// was answered without a server.
    fn is_current(&self, names: Option<&SqlNames>, side_effects: &SideEffects) -> bool {
        match names {
            Some(names) => names.is_current(self.statements, &self.server.statements),
            None => !side_effects.names_statements,
        }
    }

    #[cold]
    fn rewrite_statement(
        &mut self,
        name: &[u8],
        statement: Arc<Statement>,
    ) -> Result<Option<Arc<Statement>>, Limit> {
        if self.server.replies.is_awaited() {
            return Ok(None);
        }
        self.rules.shared_statements.admits(statement.bytes())?;
        let names = statement.sql_names.as_deref();
        let Some((text, names)) =
            self.rewrite_anew(names, &statement.side_effects, statement.body().to_vec())?
        else {
            return Ok(Some(statement));
        };
        let new = self.new_statement(&text, statement.side_effects.clone(), Some(names));
        self.statements.insert(name, new.clone());
        Ok(Some(new))
    }

    /// [`Self::current_statement`] for the unnamed statement. `false`: the message must wait.
    pub(super) fn unnamed_with_current_names(&mut self) -> Result<bool, Limit> {
        let names = self.statements.unnamed_sql_names().cloned();
        if self.is_current(names.as_deref(), self.statements.unnamed_side_effects())
            || self.statements.stored_unnamed().is_none()
        {
            return Ok(true);
        }
        if self.server.replies.is_awaited() {
            return Ok(false);
        }
        let body = self.statements.unnamed_body().unwrap_or_default().to_vec();
        let side_effects = self.statements.unnamed_side_effects().clone();
        if let Some((text, names)) = self.rewrite_anew(names.as_deref(), &side_effects, body)? {
            *self.unnamed_serial += 1;
            let under = self.server.parsing(self.under);
            self.statements.set_unnamed(*self.unnamed_serial, &text, side_effects, Some(names), under);
        }
        Ok(true)
    }

    /// The client's own text, rewritten with what its name means now. `body`: what servers got.
    fn rewrite_anew(
        &mut self,
        names: Option<&SqlNames>,
        side_effects: &SideEffects,
        body: Vec<u8>,
    ) -> Result<Option<ParseBody>, Limit> {
        let body = match names {
            Some(names) => names.client_body(&body),
            None => body,
        };
        Ok(self.rewritten(side_effects, &body)?.map(|rewritten| rewritten.into_body(&body)))
    }

    /// Bind of a text with a statement name: prepares the statement that it requires.
    #[cold]
    pub(super) fn bind_with_names(&mut self, portal: &[u8], sql_names: &SqlNames) {
        if let Some(statement) = &sql_names.meaning {
            self.record_named(statement);
        }
        self.ensure_named(Some(sql_names));
        let PrepareEffects { effects, shifts } = &sql_names.prepare_effects;
        if !effects.is_empty() || !shifts.is_empty() {
            self.server.bound_portal = Some((portal.into(), sql_names.prepare_effects.clone()));
        }
    }

    /// A text runs this statement by its name.
    fn record_named(&mut self, statement: &Statement) {
        self.record(&statement.side_effects, false);
        self.record_calls(|| statement.body(), &statement.side_effects, Some(&statement.found_effects));
    }

    /// A text names a statement that the client does not have. Code may have prepared it: the check after the
    /// transaction asks the server. If there is none, the server sends the error.
    fn record_unknown_name(&mut self) {
        let checks = StateChecks::PREPARED;
        self.record(&SideEffects { checks, ..SideEffects::default() }, false);
    }

    /// Prepares the statement that a text names, for an EXECUTE or its Describe.
    pub(super) fn ensure_named(&mut self, sql_names: Option<&SqlNames>) {
        if let Some(statement) = sql_names.and_then(|names| names.meaning.as_ref()) {
            self.server.preparer(self.under, self.startup).keeping_last().ensure(statement, self.out);
        }
    }
}

/// The text that PostgreSQL keeps for a PREPARE, and the position of the name in it. PostgreSQL keeps the
/// whole text that was sent. If that has other statements, only the PREPARE is kept here, since the others
/// must not run again.
fn as_kept<'a>(sql: &'a [u8], prepare: &sql::Statement<'a>, name: &Range<usize>) -> (&'a [u8], Range<usize>) {
    let start = prepare.start;
    let empty = |text: Option<&[u8]>| {
        text.is_some_and(|text| text.iter().all(|byte| byte.is_ascii_whitespace() || *byte == b';'))
    };
    match empty(sql.get(..start)) && empty(sql.get(start + prepare.text.len()..)) {
        true => (sql, start + name.start..start + name.end),
        false => (prepare.text, name.clone()),
    }
}
