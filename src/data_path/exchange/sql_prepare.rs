//! PREPARE, EXECUTE and DEALLOCATE in a client's text: servers know its statements under names of ours, until the session looks
//! at them (`ensure_prepared.rs`).
//!
//! A PREPARE makes a statement that can be prepared again on another server by the same text; it is the client's alone. Where a
//! name is taken, the text names the statement that has it, so that the error is PostgreSQL's own; in errors our names are
//! the client's again (`sql_prepare_effects.rs`).

use std::{
    collections::{HashMap, HashSet},
    ops::{ControlFlow, Range},
    sync::Arc,
};

use super::{
    client_messages::{ClientMessages, GOES_ON},
    ensure_prepared::WaitReason,
    pending_replies::{Origin, Request},
};
use crate::{
    data_path::{
        prepared::{
            SqlNames, Statement, StatementName,
            parse_settings::ParseSettings,
            sql_prepare_effects::{PrepareEffect, PrepareEffects, escape_client_name},
        },
        session_state::{side_effects::SideEffects, state_query::StateChecks},
        sql::{self, Discard, Kind},
    },
    error::{ClientError, Limit},
    wire::{
        frame::{HEADER_BYTES, cstr},
        message::{append, append_cstr},
    },
};

/// A text as servers get it.
#[derive(Debug, Default)]
pub(super) struct RewrittenText {
    pub text: Vec<u8>,
    /// Statements that the server must know before it runs.
    pub requires: Vec<Arc<Statement>>,
    pub prepare_effects: PrepareEffects,
    /// Characters of `text` as far as names in it are replaced.
    characters: usize,
}

impl RewrittenText {
    /// Behind `between`, which stays, comes `ours` in the place of `length` bytes.
    fn replace(&mut self, between: &[u8], length: usize, ours: &[u8]) {
        self.text.extend_from_slice(between);
        self.text.extend_from_slice(ours);
        // Of what is new only: there may be tens of thousands of names.
        let characters = |bytes| String::from_utf8_lossy(bytes).chars().count();
        self.characters += characters(between) + characters(ours);
        self.prepare_effects.shifts.push((self.characters, ours.len().cast_signed() - length.cast_signed()));
    }
}

/// Which settings PREPARE finds.
#[derive(Debug, Clone, Copy)]
pub(super) enum ParsedUnder {
    /// Those of now; the batch that has begun goes on with the text.
    ThisBatch,
    /// Those of now; a simple query of its own, behind which no batch is under way.
    ThisQuery,
    /// The text itself changes them, and leaves them so perhaps.
    ItsEnd,
}

/// What names mean in the middle of a text, as far as the text itself has changed it.
#[derive(Default)]
struct LocalNames {
    names: HashMap<Box<[u8]>, Option<Arc<Statement>>>,
    all_gone: bool,
    /// Statements that must be there, each once however often it is named.
    required: HashSet<u64>,
}

impl ClientMessages<'_, '_> {
    /// A portal runs; its text may have named statements.
    #[inline]
    pub(super) fn execute(&mut self, bytes: &[u8]) {
        let mut prepare_effects = None;
        if let Some((portal, _)) = &self.server.bound {
            let named = bytes.get(HEADER_BYTES..).is_some_and(|body| body.starts_with(portal));
            prepare_effects =
                self.server.bound.take_if(|_| named).map(|(_, prepare_effects)| Box::new(prepare_effects));
        }
        if let Some(prepare_effects) = &prepare_effects {
            prepare_effects.expect(self.statements, &mut self.server.statements);
        }
        self.ask(Request::Execute(prepare_effects));
    }

    /// Those under which a PREPARE in a text is read.
    fn settings_of(&mut self, which: ParsedUnder) -> Arc<ParseSettings> {
        match which {
            ParsedUnder::ThisBatch => self.settings_now(Origin::Prepare),
            ParsedUnder::ThisQuery => {
                let under = self.settings_now(Origin::TryPrepare);
                if self.server.parsing(self.under).is_none() {
                    let _ = self.server.replies.track(Request::Sync, Origin::Proxy);
                    append(self.out.build(), b'S', |_| {});
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

    /// [`Self::with_server_names`] of a Parse message's body behind the name.
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

    /// Replaces every name of a statement; `None` if nothing need be replaced.
    #[cold]
    pub(super) fn rewrite_names(
        &mut self,
        sql: &[u8],
        settings: ParsedUnder,
    ) -> Result<Option<RewrittenText>, Limit> {
        let mut rewritten = RewrittenText::default();
        let mut local = LocalNames::default();
        let (mut copied, mut followed, mut named, mut bytes) = (0, false, 0, 0);
        for found in sql::statements(sql, self.server.lexing()) {
            if matches!(found.kind, Kind::DeallocateAll | Kind::Discard(Discard::All)) {
                local = LocalNames { all_gone: true, ..LocalNames::default() };
            }
            let Some(name) = &found.prepared else { continue };
            let value = name.value.as_ref();
            let known = match local.names.get(value) {
                Some(known) => known.clone(),
                None if local.all_gone => None,
                None => match self.statements.get(value).cloned() {
                    Some(known) => Some(self.alike(value, known.clone())?.unwrap_or(known)),
                    None => None,
                },
            };
            let made_here = local.names.get(value).is_some_and(Option::is_some);
            let ours = match (&found.kind, known) {
                (Kind::Prepare { body, .. }, None) => {
                    (named, bytes) = (named + 1, bytes + found.text.len());
                    self.rules.admit(self.statements, named, bytes)?;
                    let side_effects = found.text.get(body.clone()).unwrap_or_default();
                    let side_effects = SideEffects::read(side_effects, self.server.lexing());
                    let (text, range) = as_kept(sql, &found, &name.range);
                    let under = self.settings_of(settings);
                    let statement = self.rules.shared_statements.in_sql(side_effects, text, range, &under);
                    let naming =
                        StatementName { client_name: Some(value.into()), statement: statement.clone() };
                    rewritten.prepare_effects.effects.push_back(PrepareEffect::Prepares(naming));
                    let ours = statement.server_name().to_vec();
                    local.names.insert(value.into(), Some(statement));
                    ours
                }
                (kind, Some(statement)) => {
                    followed = true;
                    let ours = statement.server_name().to_vec();
                    if *kind == Kind::Deallocate {
                        let naming =
                            StatementName { client_name: Some(value.into()), statement: statement.clone() };
                        rewritten.prepare_effects.effects.push_back(PrepareEffect::Deallocates(Some(naming)));
                        local.names.insert(value.into(), None);
                    }
                    self.note(&statement.side_effects, false);
                    self.note_calls(statement.body(), Some(&statement.found_effects));
                    if !made_here && local.required.insert(statement.id) {
                        rewritten.requires.push(statement);
                    }
                    ours
                }
                (kind, None) => {
                    // Code may have prepared it: the server is asked, and says so itself if there is none.
                    self.note(
                        &SideEffects { checks: StateChecks::PREPARED, ..SideEffects::default() },
                        false,
                    );
                    if *kind == Kind::Deallocate {
                        rewritten.prepare_effects.effects.push_back(PrepareEffect::Deallocates(None));
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
            rewritten.replace(sql.get(copied..range.start).unwrap_or_default(), range.len(), &ours);
            copied = range.end;
        }
        if copied == 0 && !followed {
            return Ok(None);
        }
        rewritten.text.extend_from_slice(sql.get(copied..).unwrap_or_default());
        Ok(Some(rewritten))
    }

    /// A text that names other statements: as servers get it.
    #[cold]
    pub(super) fn parse_with_server_names(
        &mut self,
        name: &[u8],
        body: &[u8],
        side_effects: SideEffects,
        rewritten: RewrittenText,
    ) -> Result<ControlFlow<WaitReason>, ClientError> {
        let RewrittenText { mut text, requires, mut prepare_effects, .. } = rewritten;
        let types =
            body.iter().position(|byte| *byte == 0).and_then(|end| body.get(end..)).unwrap_or_default();
        text.extend_from_slice(types);
        prepare_effects.shifts = Vec::new();
        let mut message = Vec::new();
        append(&mut message, b'P', |out| {
            append_cstr(out, name);
            out.extend_from_slice(&text);
        });
        if !name.is_empty() {
            let statement = self.made(&text, side_effects, Some(Arc::new((requires, prepare_effects))));
            self.parse_statement(&message, name, &statement);
            return GOES_ON;
        }
        // PREPARE in front of it takes the unnamed statement's place.
        let mut preparer = self.server.preparer(self.under, self.startup);
        for statement in &requires {
            preparer.ensure(statement, self.out);
        }
        if self.ask_unnamed(Request::Parse(None)) {
            let serial = *self.unnamed_serial;
            let under = self.server.parsing(self.under);
            self.statements.set_unnamed(
                serial,
                &text,
                side_effects,
                Some(Arc::new((requires, prepare_effects))),
                under,
            );
            self.server.statements.set_unnamed(serial);
        }
        self.out.build().extend_from_slice(&message);
        GOES_ON
    }

    /// A portal of a text that names statements: they must be there when it runs.
    #[cold]
    pub(super) fn bind_naming(&mut self, portal: &[u8], naming: &SqlNames) {
        let (requires, prepare_effects) = naming;
        for statement in requires {
            self.note(&statement.side_effects, false);
            self.note_calls(statement.body(), Some(&statement.found_effects));
        }
        self.ensure_named(Some(naming));
        if !prepare_effects.effects.is_empty() {
            self.server.bound = Some((portal.into(), prepare_effects.clone()));
        }
    }

    /// What an EXECUTE describes is what it runs: that must be there.
    pub(super) fn ensure_named(&mut self, naming: Option<&SqlNames>) {
        let mut preparer = self.server.preparer(self.under, self.startup);
        for statement in naming.into_iter().flat_map(|names| &names.0) {
            preparer.ensure(statement, self.out);
        }
    }
}

/// What PostgreSQL keeps of a PREPARE, and where the name is in it: the whole of what was sent, to the last semicolon. It would
/// keep other statements that were sent with it, which must not run again.
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
