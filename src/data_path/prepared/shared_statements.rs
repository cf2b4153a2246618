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
    sql_prepare_effects::OUR_PREFIX,
};
use crate::data_path::{
    lock::locked,
    memory_limit::{Account, Charge},
    session_state::{custom_names::CustomNames, side_effects::SideEffects},
};

/// The statements of one pool, without duplicates.
#[derive(Debug, Default)]
pub struct SharedStatements {
    /// By hash of text and settings. Weak: a statement lives as long as a client or a server has it.
    by_digest: Mutex<HashMap<u64, Vec<Weak<Statement>>>>,
    hasher: RandomState,
    /// The settings under which they are parsed.
    pub settings: ParseSettingsTable,
    /// The custom parameters that its sessions have set.
    pub custom_names: CustomNames,
    /// The account for their memory.
    pub memory: Arc<Account>,
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
        let mut statement = Statement::new(Box::default(), side_effects, under, &self.memory);
        let renamed = text.get(named.clone()).unwrap_or_default();
        let mut body = replaced(text, named.clone(), &statement.server_name);
        body.extend_from_slice(&[0, 0, 0]); // the end, and no parameters
        statement.renamed = Some((named.start, renamed.into()));
        self.with_body(statement, body)
    }

    /// Returns a copy of the statement under its client's own name; `None`: it has it, or cannot.
    pub(in crate::data_path) fn with_client_name(
        &self,
        statement: &Statement,
        name: &[u8],
    ) -> Option<Arc<Statement>> {
        let (at, bytes) = statement.renamed.as_ref().filter(|_| may_be_server_name(name))?;
        let side_effects = statement.side_effects.clone();
        let mut own = Statement::new(Box::default(), side_effects, &statement.parsed_under, &self.memory);
        own.server_name = name.into();
        own.was_parsed = AtomicBool::new(statement.was_parsed());
        let body = replaced(&statement.body, *at..*at + statement.server_name.len(), bytes);
        Some(self.with_body(own, body))
    }

    fn with_body(&self, mut statement: Statement, body: Vec<u8>) -> Arc<Statement> {
        statement.charge = Charge::new(&self.memory, Statement::memory_of(1, body.len()));
        statement.body = body.into();
        statement.in_sql = true;
        Arc::new(statement)
    }

    /// Returns the statement with this Parse body and these settings. Calls `made` if it is new.
    pub fn intern(
        &self,
        body: &[u8],
        under: &Arc<ParseSettings>,
        made: impl FnOnce() -> (SideEffects, Option<Arc<SqlNames>>),
    ) -> Arc<Statement> {
        let mut table = locked(&self.by_digest);
        // Sweeping only before the table grows is amortised O(1), and dead entries are at most half of the
        // table.
        if table.len() == table.capacity() {
            table.retain(|_, entry| entry.iter().any(|entry| entry.strong_count() > 0));
        }
        let candidates = table.entry(self.digest(body, under)).or_default();
        if let Some(statement) = find_live(candidates, body, under) {
            return statement;
        }
        let (side_effects, sql_names) = made();
        let statement = Statement::new(body.into(), side_effects, under, &self.memory).parsed(sql_names);
        let statement = Arc::new(Statement { is_shared: true, ..statement });
        candidates.retain(|entry| entry.strong_count() > 0);
        candidates.push(Arc::downgrade(&statement));
        statement
    }

    /// Creates a statement for one client, because the settings under which it is parsed are unknown.
    pub fn own(
        &self,
        body: &[u8],
        under: &Arc<ParseSettings>,
        side_effects: SideEffects,
        sql_names: Option<Arc<SqlNames>>,
    ) -> Arc<Statement> {
        Arc::new(Statement::new(body.into(), side_effects, under, &self.memory).parsed(sql_names))
    }

    /// Returns a copy for one client that continues to use the statement under other settings.
    #[cold]
    pub fn unshared(&self, shared: &Statement, under: &Arc<ParseSettings>) -> Arc<Statement> {
        let side_effects = shared.side_effects.clone();
        Arc::new(Statement {
            sql_names: shared.sql_names.clone(),
            is_description_checked: shared.is_description_checked,
            has_fixed_meaning: shared.has_fixed_meaning,
            description: shared.description.clone(),
            was_parsed: AtomicBool::new(shared.was_parsed()),
            ..Statement::new(shared.body.clone(), side_effects, under, &self.memory)
        })
    }

    /// Returns the statement for a description that differs from the one earlier clients received. Old
    /// clients keep the old statement (its next use fails with 0A000); a new Parse gets a new statement.
    #[cold]
    pub fn with_description(&self, before: &Statement, description: RowDescription) -> Arc<Statement> {
        let under = &before.parsed_under;
        let mut table = locked(&self.by_digest);
        let mut candidates =
            before.is_shared.then(|| table.entry(self.digest(&before.body, under)).or_default());
        let entry = candidates.as_deref().and_then(|candidates| find_live(candidates, &before.body, under));
        if let Some(entry) = entry.filter(|entry| entry.description.get() == Some(&description)) {
            return entry;
        }
        let (body, side_effects) = (before.body.clone(), before.side_effects.clone());
        let statement = Arc::new(Statement {
            is_description_checked: true,
            description: description.into(),
            was_parsed: AtomicBool::new(true),
            is_shared: before.is_shared,
            ..Statement::new(body, side_effects, under, &self.memory)
        });
        if let Some(candidates) = &mut candidates {
            candidates
                .retain(|entry| entry.upgrade().is_some_and(|entry| !is_of(&entry, &before.body, under)));
            candidates.push(Arc::downgrade(&statement));
        }
        statement
    }

    /// Returns the statement with this Parse body and these settings, if a client or server has it.
    pub fn find(&self, body: &[u8], under: &Arc<ParseSettings>) -> Option<Arc<Statement>> {
        find_live(locked(&self.by_digest).get(&self.digest(body, under))?, body, under)
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
    statement.parsed_under.id == under.id && *statement.body == *body
}

/// Returns whether servers may use this client's name: it needs no quotes and lacks the proxy's prefix.
fn may_be_server_name(name: &[u8]) -> bool {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    name.iter().all(is_plain) && !name.is_empty() && !name.starts_with(OUR_PREFIX)
}

fn replaced(text: &[u8], range: Range<usize>, new: &[u8]) -> Vec<u8> {
    let (before, behind) = (text.get(..range.start), text.get(range.end..));
    [before.unwrap_or_default(), new, behind.unwrap_or_default()].concat()
}
