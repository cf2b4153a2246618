//! Prepared statements of one server. Pure: bytes in, bytes out.
//!
//! A statement is recorded when its request is queued and removed when the server skips it. Until the server
//! confirms it, it counts only within its batch.

use std::sync::{Arc, atomic::Ordering};

use rustc_hash::FxHashMap;

use super::{ClientStatements, Statement};

/// Prepared statements of one server.
#[derive(Debug)]
pub struct ServerStatements {
    /// By statement number. Clients cannot choose it, so they cannot cause hash collisions.
    known: FxHashMap<u64, KnownStatement>,
    /// Serial of the unnamed statement ([`super::client_statements`]); 0 if there is none, `u64::MAX` if
    /// unknown.
    unnamed: u64,
    /// Size of the texts.
    bytes: usize,
    /// Number of statements under a client's own name.
    own_names: usize,
    capacity: PreparedLimits,
    /// Counts uses, to find the least recently used statement.
    clock: u64,
    /// Counts since they were last collected.
    pub tally: StatementCounts,
}

/// Limits for the prepared statements of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
struct KnownStatement {
    pub statement: Arc<Statement>,
    pub certainty: Certainty,
    used: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Certainty {
    /// The server sent ParseComplete.
    Confirmed,
    /// Requested in this batch; if it fails, the server skips the rest of the batch too.
    Within(u32),
    /// Requested by the client's own PREPARE: if it fails, the client has no such statement.
    Expected,
    /// Unknown.
    Doubtful,
}

/// Whether a server has a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnServer {
    /// The server has it.
    Known,
    /// Requested earlier in this batch.
    Requested,
    /// Missing or unknown.
    Missing,
}

impl ServerStatements {
    /// Creates the state of a new server.
    pub fn new(capacity: PreparedLimits) -> Self {
        Self {
            known: FxHashMap::default(),
            bytes: 0,
            own_names: 0,
            unnamed: 0,
            capacity,
            clock: 0,
            tally: StatementCounts::default(),
        }
    }

    /// Returns the number of statements.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Returns whether there is no statement.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Handles DISCARD ALL and DEALLOCATE ALL. The unnamed statement outlives both.
    pub fn forget_all(&mut self) {
        self.known.clear();
        (self.bytes, self.own_names) = (0, 0);
    }

    /// Marks the unnamed statement as unknown.
    pub fn doubt_unnamed(&mut self) {
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
    pub fn has_own_names(&self) -> bool {
        self.own_names > 0
    }

    /// Returns the clients' own names as a PostgreSQL array.
    pub fn own_names(&self) -> String {
        let known = self.known.values().map(|known| &known.statement);
        array(known.filter(|known| known.has_own_name()).map(|known| known.server_name()))
    }

    /// Returns the names of all confirmed statements and of `others` as a PostgreSQL array.
    pub fn names(&self, others: impl Iterator<Item = &'static [u8]>) -> String {
        let certain = self.known.values().filter(|known| known.certainty == Certainty::Confirmed);
        array(certain.map(|known| known.statement.server_name()).chain(others.map(|name| -> &[u8] { name })))
    }

    /// Removes statements that code has deallocated. Returns whether none are left.
    #[cold]
    pub fn lost(&mut self, names: &[&[u8]]) -> bool {
        let lost = self.known.values().map(|known| &known.statement);
        let lost: Vec<_> = lost.filter(|known| names.contains(&known.server_name())).cloned().collect();
        for statement in &lost {
            self.remove(statement);
        }
        !lost.is_empty() && self.known.is_empty()
    }

    /// Iterates over all statements that the server may have.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Statement>> {
        self.known.values().map(|known| &known.statement)
    }

    /// Returns the statement with this number if the server may have it.
    pub fn get(&self, id: u64) -> Option<&Arc<Statement>> {
        self.known.get(&id).map(|known| &known.statement)
    }

    /// Returns whether the server has confirmed the statement.
    pub fn has(&self, statement: &Statement) -> bool {
        self.known.get(&statement.id).is_some_and(|known| known.certainty == Certainty::Confirmed)
    }

    /// Returns the least recently used statement if `more` further statements with `bytes` of text exceed a
    /// limit.
    pub fn one_too_many(&self, more: usize, bytes: usize) -> Option<u64> {
        let PreparedLimits { statements: count_max, bytes: bytes_max } = self.capacity;
        let too_many = self.known.len() + more > count_max || self.bytes + bytes > bytes_max;
        let oldest = self.known.iter().filter(|_| too_many).min_by_key(|(_, known)| known.used);
        oldest.map(|(id, _)| *id)
    }

    /// Returns the limit of the number of statements.
    pub fn statements_max(&self) -> usize {
        self.capacity.statements
    }

    fn insert(&mut self, statement: &Arc<Statement>, certainty: Certainty, used: u64) {
        self.bytes += statement.body().len();
        self.own_names += usize::from(statement.has_own_name());
        let known = KnownStatement { statement: statement.clone(), certainty, used };
        let before = self.known.insert(statement.id, known);
        self.without(before);
    }

    /// Removes a statement that the server no longer has.
    pub fn remove(&mut self, statement: &Statement) {
        let before = self.known.remove(&statement.id);
        self.without(before);
    }

    fn without(&mut self, gone: Option<KnownStatement>) {
        if let Some(KnownStatement { statement, .. }) = gone {
            self.bytes -= statement.body().len();
            self.own_names -= usize::from(statement.has_own_name());
        }
    }

    /// Records a queued Parse.
    pub fn queued(&mut self, statement: &Arc<Statement>, batch: u32) {
        self.enter(statement, Certainty::Within(batch));
    }

    /// Records a queued PREPARE of the client's own.
    pub fn expected(&mut self, statement: &Arc<Statement>) {
        self.enter(statement, Certainty::Expected);
    }

    fn enter(&mut self, statement: &Arc<Statement>, certainty: Certainty) {
        self.tally.server_parses += 1;
        self.clock += 1;
        self.insert(statement, certainty, self.clock);
    }

    /// Handles ParseComplete.
    pub fn confirmed(&mut self, statement: &Statement) {
        if let Some(known) = self.known.get_mut(&statement.id) {
            known.certainty = Certainty::Confirmed;
        }
        statement.proved.store(true, Ordering::Relaxed);
    }

    /// Handles a failed or skipped Parse.
    pub fn failed(&mut self, statement: &Statement) {
        if let Some(known) = self.known.get_mut(&statement.id) {
            known.certainty = Certainty::Doubtful;
        }
    }

    /// Handles a successful DEALLOCATE.
    pub fn deallocated(&mut self, statement: &Statement) {
        self.remove(statement);
    }

    /// Handles a skipped Close: the server still has the statement, if it had it before.
    pub fn not_closed(&mut self, statement: &Arc<Statement>) {
        self.insert(statement, Certainty::Doubtful, 0);
    }

    /// Returns whether the server has a statement that is about to be used.
    #[inline]
    pub fn find(&mut self, statement: &Statement, batch: u32) -> OnServer {
        self.clock += 1;
        let Some(known) = self.known.get_mut(&statement.id) else { return OnServer::Missing };
        known.used = self.clock;
        match known.certainty {
            Certainty::Confirmed | Certainty::Expected => OnServer::Known,
            Certainty::Within(asked) if asked == batch => OnServer::Requested,
            Certainty::Within(_) | Certainty::Doubtful => OnServer::Missing,
        }
    }
}

/// Returns a PostgreSQL array of statement names, which contain no character that must be escaped.
fn array<'n>(names: impl Iterator<Item = &'n [u8]>) -> String {
    let names: Vec<_> = names.map(|name| format!("\"{}\"", String::from_utf8_lossy(name))).collect();
    format!("{{{}}}", names.join(","))
}
