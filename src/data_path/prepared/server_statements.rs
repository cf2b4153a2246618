//! Prepared statements of one server. Pure: bytes in, bytes out.
//!
//! A statement is recorded when its request is queued and removed when the server skips it. Until the server
//! confirms it, it counts only within its batch.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
};

use rustc_hash::FxHashMap;

use super::{ClientStatements, Statement};

/// Prepared statements of one server.
#[derive(Debug, Default)]
pub struct ServerStatements {
    /// By statement number. Clients cannot choose it, so they cannot cause hash collisions.
    statements: FxHashMap<u64, Entry>,
    /// Serial of the unnamed statement (see `client_statements`); 0: none, `u64::MAX`: unknown.
    unnamed: u64,
    /// Size of the texts.
    bytes: usize,
    /// Number of statements under a client's own name.
    client_names: usize,
    capacity: PreparedLimits,
    /// Counts uses, to find the least recently used statement.
    clock: u64,
    /// Statements with the time of their last use when this list was made, oldest first. One that has been
    /// used since is not among the oldest. So a use costs nothing here, and finding the oldest one costs
    /// O(log n) for each statement that was used or closed since.
    oldest: VecDeque<(u64, u64)>,
    /// Counts since they were last collected.
    pub counts: StatementCounts,
}

/// Limits for the prepared statements of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PreparedLimits {
    /// `max_prepared_statements`.
    pub statements: usize,
    /// `max_prepared_bytes`. A longer statement is stored alone.
    pub bytes: usize,
}

/// Counts of prepared statements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StatementCounts {
    /// Parse messages from clients.
    pub client_parses: u32,
    /// Statements prepared on the server, for any reason.
    pub server_parses: u32,
    /// Bind messages from clients.
    pub binds: u32,
}

#[derive(Debug)]
struct Entry {
    statement: Arc<Statement>,
    confirmation: Confirmation,
    used: u64,
}

impl Entry {
    fn new(statement: Arc<Statement>, confirmation: Confirmation, used: u64) -> Self {
        statement.server_added();
        Self { statement, confirmation, used }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.statement.server_removed();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Confirmation {
    /// The server sent ParseComplete.
    Confirmed,
    /// Requested in this batch; if it fails, the server skips the rest of the batch too.
    Within(u32),
    /// Requested by the client's own PREPARE: if it fails, the client has no such statement.
    Expected,
    /// Unknown.
    Unknown,
}

/// Whether a server has a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnServer {
    /// The server has it.
    Present,
    /// Requested earlier in this batch.
    Requested,
    /// Missing or unknown.
    Missing,
}

impl ServerStatements {
    /// Creates the state of a new server.
    pub fn new(capacity: PreparedLimits) -> Self {
        Self { capacity, ..Self::default() }
    }

    /// Returns the number of statements.
    pub fn len(&self) -> usize {
        self.statements.len()
    }

    /// Returns whether there is no statement.
    pub fn is_empty(&self) -> bool {
        self.statements.is_empty()
    }

    /// Handles DISCARD ALL and DEALLOCATE ALL. The unnamed statement outlives both.
    pub fn forget_all(&mut self) {
        self.statements.clear();
        self.oldest.clear();
        (self.bytes, self.client_names) = (0, 0);
    }

    /// Marks the unnamed statement as unknown.
    pub fn set_unnamed_unknown(&mut self) {
        self.unnamed = u64::MAX;
    }

    /// Returns whether the unnamed statement is this client's.
    #[inline]
    pub fn has_unnamed_of(&self, client: &ClientStatements) -> bool {
        self.unnamed == client.unnamed.serial
    }

    /// Records the serial of the unnamed statement; 0 if it was removed.
    pub fn set_unnamed(&mut self, serial: u64) {
        self.unnamed = serial;
    }

    /// Returns whether a statement has a client's own name.
    #[inline]
    pub fn has_client_names(&self) -> bool {
        self.client_names > 0
    }

    /// Returns the clients' own names as a PostgreSQL array.
    pub fn client_names(&self) -> String {
        let all = self.statements.values().map(|entry| &entry.statement);
        array(all.filter(|statement| statement.has_client_name()).map(|statement| statement.server_name()))
    }

    /// Returns the names of all confirmed statements and of `others` as a PostgreSQL array.
    pub fn names(&self, others: impl Iterator<Item = &'static [u8]>) -> String {
        let confirmed =
            self.statements.values().filter(|entry| entry.confirmation == Confirmation::Confirmed);
        array(
            confirmed.map(|entry| entry.statement.server_name()).chain(others.map(|name| -> &[u8] { name })),
        )
    }

    /// Removes statements that code has deallocated. Returns whether none are left.
    #[cold]
    pub fn deallocated_by_code(&mut self, names: &[&[u8]]) -> bool {
        let lost = self.statements.values().map(|entry| &entry.statement);
        let lost: Vec<_> = lost.filter(|entry| names.contains(&entry.server_name())).cloned().collect();
        for statement in &lost {
            self.remove(statement);
        }
        !lost.is_empty() && self.statements.is_empty()
    }

    /// Iterates over all statements that the server may have.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Statement>> {
        self.statements.values().map(|entry| &entry.statement)
    }

    /// Returns the statement with this number if the server may have it.
    pub fn get(&self, id: u64) -> Option<&Arc<Statement>> {
        self.statements.get(&id).map(|entry| &entry.statement)
    }

    /// Returns whether the server has confirmed the statement.
    pub fn has(&self, statement: &Statement) -> bool {
        self.statements.get(&statement.id).is_some_and(|entry| entry.confirmation == Confirmation::Confirmed)
    }

    /// Returns the least recently used statement if `more` statements with `bytes` of text exceed a limit. One that
    /// was used at the time `kept_since` or later stays.
    pub fn to_evict(&mut self, more: usize, bytes: usize, kept_since: u64) -> Option<u64> {
        let PreparedLimits { statements: count_max, bytes: bytes_max } = self.capacity;
        let is_full = self.statements.len() + more > count_max || self.bytes + bytes > bytes_max;
        if is_full { self.oldest().filter(|(used, _)| *used < kept_since).map(|(_, id)| id) } else { None }
    }

    /// Returns the limit of the number of statements.
    pub fn statements_max(&self) -> usize {
        self.capacity.statements
    }

    /// Returns the time of the last use, in uses.
    pub fn clock(&self) -> u64 {
        self.clock
    }

    /// The time of its last use, and its number.
    fn oldest(&mut self) -> Option<(u64, u64)> {
        let is_unused_since =
            |&(used, id): &(u64, u64)| self.statements.get(&id).is_some_and(|entry| entry.used == used);
        let unused = self.oldest.iter().take_while(|entry| !is_unused_since(entry)).count();
        self.oldest.drain(..unused);
        if self.oldest.is_empty() {
            let mut all: Vec<_> = self.statements.iter().map(|(id, entry)| (entry.used, *id)).collect();
            all.sort_unstable();
            self.oldest = all.into();
        }
        self.oldest.front().copied()
    }

    fn insert(&mut self, statement: &Arc<Statement>, confirmation: Confirmation, used: u64) {
        self.bytes += statement.length();
        self.client_names += usize::from(statement.has_client_name());
        let entry = Entry::new(statement.clone(), confirmation, used);
        let before = self.statements.insert(statement.id, entry);
        self.uncount(before);
    }

    /// Removes a statement that the server no longer has.
    pub fn remove(&mut self, statement: &Statement) {
        let before = self.statements.remove(&statement.id);
        self.uncount(before);
    }

    fn uncount(&mut self, removed: Option<Entry>) {
        if let Some(Entry { statement, .. }) = &removed {
            self.bytes -= statement.length();
            self.client_names -= usize::from(statement.has_client_name());
        }
    }

    /// Records a queued Parse.
    pub fn queued(&mut self, statement: &Arc<Statement>, batch: u32) {
        self.enter(statement, Confirmation::Within(batch));
    }

    /// Records a queued PREPARE of the client's own.
    pub fn expected(&mut self, statement: &Arc<Statement>) {
        self.enter(statement, Confirmation::Expected);
    }

    fn enter(&mut self, statement: &Arc<Statement>, confirmation: Confirmation) {
        self.counts.server_parses += 1;
        self.clock += 1;
        self.insert(statement, confirmation, self.clock);
    }

    /// Handles ParseComplete.
    pub fn confirmed(&mut self, statement: &Statement) {
        if let Some(entry) = self.statements.get_mut(&statement.id) {
            entry.confirmation = Confirmation::Confirmed;
        }
        statement.was_parsed.store(true, Ordering::Relaxed);
    }

    /// Handles a failed or skipped Parse.
    pub fn failed(&mut self, statement: &Statement) {
        if let Some(entry) = self.statements.get_mut(&statement.id) {
            entry.confirmation = Confirmation::Unknown;
        }
    }

    /// Handles a skipped Close: the server still has the statement, if it had it before.
    pub fn not_closed(&mut self, statement: &Arc<Statement>) {
        self.insert(statement, Confirmation::Unknown, 0);
    }

    /// Returns whether the server has a statement that is about to be used.
    #[inline]
    pub fn find(&mut self, statement: &Statement, batch: u32) -> OnServer {
        self.clock += 1;
        let Some(entry) = self.statements.get_mut(&statement.id) else { return OnServer::Missing };
        entry.used = self.clock;
        match entry.confirmation {
            Confirmation::Confirmed | Confirmation::Expected => OnServer::Present,
            Confirmation::Within(requested) if requested == batch => OnServer::Requested,
            Confirmation::Within(_) | Confirmation::Unknown => OnServer::Missing,
        }
    }
}

/// Returns a PostgreSQL array of statement names, which contain no character that must be escaped.
fn array<'n>(names: impl Iterator<Item = &'n [u8]>) -> String {
    let names: Vec<_> = names.map(|name| format!("\"{}\"", String::from_utf8_lossy(name))).collect();
    format!("{{{}}}", names.join(","))
}
