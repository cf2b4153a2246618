//! The statements of one pool, without duplicates. Pure.
//!
//! Clients share a statement if PostgreSQL parses it alike for both: same text and types, same settings.
//! Every other statement belongs to one client.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    ops::Range,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::{
    SqlNames, Statement,
    parse_settings::{ParseSettings, ParseSettingsTable},
    row_description::RowDescription,
    server_name,
    sql_prepare_effects::{END_OF_PREPARE, OUR_PREFIX},
    statement_text::StoredText,
};
use crate::{
    data_path::{
        lock::locked,
        memory_limit::Account,
        session_state::{custom_names::CustomNames, side_effects::SideEffects},
    },
    error::Limit,
};

/// The statements of one pool, without duplicates.
#[derive(Debug, Default)]
pub struct SharedStatements {
    tables: Mutex<Tables>,
    hasher: RandomState,
    /// The settings under which they are parsed.
    pub settings: ParseSettingsTable,
    /// The custom parameters that its sessions have set.
    pub custom_names: CustomNames,
    /// The account for their memory.
    pub memory: Arc<Account>,
}

/// Weak: a statement lives as long as a client or a server has it.
#[derive(Debug, Default)]
struct Tables {
    /// Shared statements by hash of text and settings.
    by_digest: HashMap<u64, Vec<Weak<Statement>>>,
    /// Statements of one client.
    own: Vec<Weak<Statement>>,
    /// How many statements may be searched for unused texts: a search is paid for by what made it necessary.
    searchable: usize,
}

/// How many statements may be searched for each one that was added.
const SEARCHED_PER_STATEMENT: usize = 16;

/// How many statements may be searched for each refused one. Takes some 50 µs.
const SEARCHED_PER_REFUSAL: usize = 1024;

impl Tables {
    /// Gives up the texts of statements that only servers have, and forgets these statements.
    #[cold]
    fn give_up_unused(&mut self, memory: &Arc<Account>) {
        self.searchable = self.searchable.saturating_add(SEARCHED_PER_REFUSAL);
        if self.searchable < self.by_digest.len() + self.own.len() {
            return;
        }
        self.searchable = 0;
        let stays = |entry: &Weak<Statement>| {
            entry.upgrade().is_some_and(|statement| !statement.give_up_if_unused(memory))
        };
        self.by_digest.retain(|_, entries| {
            entries.retain(stays);
            !entries.is_empty()
        });
        self.own.retain(stays);
    }
}

/// The last statement number. Unique in the process: statements of several pools may meet on a server.
static LAST_ID: AtomicU64 = AtomicU64::new(0);

/// Returns the number for a new statement.
pub fn next_id() -> u64 {
    LAST_ID.fetch_add(1, Ordering::Relaxed) + 1
}

impl SharedStatements {
    /// Creates an empty table that charges `memory`.
    pub fn new(memory: Arc<Account>) -> Self {
        Self { memory, ..Self::default() }
    }

    /// Creates a statement for one client from its SQL PREPARE. `text` is the whole statement, with the
    /// client's name at `named`.
    pub fn in_sql(
        &self,
        side_effects: SideEffects,
        text: &[u8],
        named: Range<usize>,
        under: &Arc<ParseSettings>,
    ) -> Arc<Statement> {
        let id = next_id();
        let mut body = replaced(text, named.clone(), &server_name(id));
        body.extend_from_slice(END_OF_PREPARE);
        let renamed = text.get(named.clone()).unwrap_or_default();
        self.add_own(Statement {
            in_sql: true,
            renamed: Some((named.start, renamed.into())),
            ..Statement::numbered(id, StoredText::new(&body), side_effects, under, &self.memory)
        })
    }

    /// Returns a copy of the statement under its client's own name; `None`: it has it, or cannot.
    pub(in crate::data_path) fn with_client_name(
        &self,
        statement: &Statement,
        name: &[u8],
    ) -> Option<Arc<Statement>> {
        let (at, bytes) = statement.renamed.as_ref().filter(|_| may_be_server_name(name))?;
        let body = replaced(&statement.body(), *at..*at + statement.server_name.len(), bytes);
        let (text, side_effects) = (StoredText::new(&body), statement.side_effects.clone());
        Some(self.add_own(Statement {
            server_name: name.into(),
            was_parsed: AtomicBool::new(statement.was_parsed()),
            in_sql: true,
            ..Statement::new(text, side_effects, &statement.parsed_under, &self.memory)
        }))
    }

    /// Adds a statement of one client.
    pub(super) fn add_own(&self, statement: Statement) -> Arc<Statement> {
        let statement = Arc::new(statement);
        let Tables { own, searchable, .. } = &mut *locked(&self.tables);
        *searchable = searchable.saturating_add(SEARCHED_PER_STATEMENT);
        if own.len() == own.capacity() {
            own.retain(|entry| entry.strong_count() > 0);
        }
        own.push(Arc::downgrade(&statement));
        statement
    }

    /// Checks that statements of this size may be added. Where they may not, gives up the texts of those
    /// that only servers have: no session gets them again, and the servers close them in their time.
    pub fn admits(&self, bytes: usize) -> Result<(), Limit> {
        self.memory.admits(bytes).or_else(|_| {
            locked(&self.tables).give_up_unused(&self.memory);
            self.memory.admits(bytes)
        })
    }

    /// Returns the statement with this Parse body and these settings. Calls `side_effects` if it is new.
    pub fn intern(
        &self,
        body: &[u8],
        under: &Arc<ParseSettings>,
        side_effects: impl FnOnce() -> SideEffects,
    ) -> Arc<Statement> {
        let Tables { by_digest: table, searchable, .. } = &mut *locked(&self.tables);
        // Sweeping only before the table grows is amortised O(1), and dead entries are at most half of the
        // table.
        if table.len() == table.capacity() {
            table.retain(|_, entry| entry.iter().any(|entry| entry.strong_count() > 0));
        }
        let candidates = table.entry(self.digest(body, under)).or_default();
        if let Some(statement) = find_live(candidates, body, under) {
            return statement;
        }
        *searchable = searchable.saturating_add(SEARCHED_PER_STATEMENT);
        let statement = self.new_statement(body, under, side_effects(), None);
        let statement = Arc::new(Statement { is_shared: true, ..statement });
        candidates.retain(|entry| entry.strong_count() > 0);
        candidates.push(Arc::downgrade(&statement));
        statement
    }

    /// Creates a statement for one client: it names another one, or the settings under which it is parsed are
    /// unknown.
    pub fn own(
        &self,
        body: &[u8],
        under: &Arc<ParseSettings>,
        side_effects: SideEffects,
        sql_names: Option<Arc<SqlNames>>,
    ) -> Arc<Statement> {
        self.add_own(self.new_statement(body, under, side_effects, sql_names))
    }

    fn new_statement(
        &self,
        body: &[u8],
        under: &Arc<ParseSettings>,
        side_effects: SideEffects,
        sql_names: Option<Arc<SqlNames>>,
    ) -> Statement {
        Statement::new(StoredText::new(body), side_effects, under, &self.memory).parsed(body, sql_names)
    }

    /// Returns a copy for one client that continues to use the statement under other settings.
    #[cold]
    pub fn unshared(&self, shared: &Statement, under: &Arc<ParseSettings>) -> Arc<Statement> {
        let side_effects = shared.side_effects.clone();
        self.add_own(Statement {
            is_description_checked: shared.is_description_checked,
            has_fixed_meaning: shared.has_fixed_meaning,
            description: shared.description.clone(),
            was_parsed: AtomicBool::new(shared.was_parsed()),
            ..Statement::new(shared.text(), side_effects, under, &self.memory)
        })
    }

    /// Returns the statement for a description that differs from the one earlier clients received. Old
    /// clients keep the old statement (its next use fails with 0A000); a new Parse gets a new statement.
    #[cold]
    pub fn with_description(&self, before: &Statement, description: RowDescription) -> Arc<Statement> {
        let under = &before.parsed_under;
        let statement = |description: RowDescription| Statement {
            is_description_checked: true,
            description: description.into(),
            was_parsed: AtomicBool::new(true),
            is_shared: before.is_shared,
            ..Statement::new(before.text(), before.side_effects.clone(), under, &self.memory)
        };
        if !before.is_shared {
            return self.add_own(statement(description));
        }
        let body = before.body();
        let table = &mut locked(&self.tables).by_digest;
        let candidates = table.entry(self.digest(&body, under)).or_default();
        let entry = find_live(candidates, &body, under);
        if let Some(entry) = entry.filter(|entry| entry.description.get() == Some(&description)) {
            return entry;
        }
        let statement = Arc::new(statement(description));
        candidates.retain(|entry| entry.upgrade().is_some_and(|entry| !is_of(&entry, &body, under)));
        candidates.push(Arc::downgrade(&statement));
        statement
    }

    /// Returns the statement with this Parse body and these settings, if a client or server has it.
    pub fn find(&self, body: &[u8], under: &Arc<ParseSettings>) -> Option<Arc<Statement>> {
        find_live(locked(&self.tables).by_digest.get(&self.digest(body, under))?, body, under)
    }

    fn digest(&self, body: &[u8], under: &ParseSettings) -> u64 {
        self.hasher.hash_one((body, under.id))
    }
}

/// Finds a live statement with this Parse body and these settings.
fn find_live(candidates: &[Weak<Statement>], body: &[u8], under: &ParseSettings) -> Option<Arc<Statement>> {
    candidates.iter().filter_map(Weak::upgrade).find(|entry| is_of(entry, body, under))
}

/// Returns whether the statement has this text and these settings.
fn is_of(statement: &Statement, body: &[u8], under: &ParseSettings) -> bool {
    statement.parsed_under.id == under.id && statement.length == body.len() && *statement.body() == *body
}

/// Returns whether servers may use this client's name: it needs no quotes and lacks the proxy's prefix.
fn may_be_server_name(name: &[u8]) -> bool {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    name.iter().all(is_plain) && !name.is_empty() && !name.starts_with(OUR_PREFIX)
}

/// Returns the text with `range` replaced.
pub(super) fn replaced(text: &[u8], range: Range<usize>, new: &[u8]) -> Vec<u8> {
    let (before, behind) = (text.get(..range.start), text.get(range.end..));
    [before.unwrap_or_default(), new, behind.unwrap_or_default()].concat()
}
