//! What one server has prepared. Pure: bytes in, bytes out.
//!
//! What a server knows is entered when the request is queued and taken back when the server skips it; until it is
//! confirmed it counts only within the batch that asked for it.

use std::sync::{Arc, atomic::Ordering};

use rustc_hash::FxHashMap;

use super::{ClientStatements, Statement};

/// What one server has prepared.
#[derive(Debug)]
pub struct ServerStatements {
    /// By our own number: nobody can choose it so that others are slow.
    known: FxHashMap<u64, Known>,
    /// Whose unnamed statement it has, by [`Unnamed::serial`]; 0: none; `u64::MAX`, which is no client's: who knows.
    unnamed: u64,
    /// Of their texts.
    bytes: usize,
    /// How many have a client's own name.
    own_names: usize,
    capacity: Capacity,
    /// Counts uses, to find the least recent.
    clock: u64,
    /// What has been done since it was last taken down.
    pub tally: Tally,
}

/// What a server keeps prepared at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// `max_prepared_statements`.
    pub statements: usize,
    /// `max_prepared_bytes`. A longer statement is kept alone.
    pub bytes: usize,
}

/// How often named statements were prepared and used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Prepared by clients.
    pub client_parses: u32,
    /// Prepared on the server, for whichever reason.
    pub server_parses: u32,
    /// Bound by clients.
    pub binds: u32,
}

#[derive(Debug)]
struct Known {
    pub statement: Arc<Statement>,
    pub certainty: Certainty,
    used: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Certainty {
    /// ParseComplete came.
    Confirmed,
    /// Asked for in that batch; if it fails, later requests of the batch are skipped as well.
    Within(u32),
    /// The client itself has asked for it by PREPARE: if that fails, the client has no such statement.
    Expected,
    /// It may be there or not.
    Doubtful,
}

/// How a server stood to a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// It has it.
    Known,
    /// It has been asked for it in this batch.
    Asked,
    /// Or so it may be.
    Missing,
}

impl ServerStatements {
    /// A server that has just been opened.
    pub fn new(capacity: Capacity) -> Self {
        Self {
            known: FxHashMap::default(),
            bytes: 0,
            own_names: 0,
            unnamed: 0,
            capacity,
            clock: 0,
            tally: Tally::default(),
        }
    }

    /// How many it has.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// DISCARD ALL and DEALLOCATE ALL. The unnamed statement outlives both.
    pub fn forget_all(&mut self) {
        self.known.clear();
        (self.bytes, self.own_names) = (0, 0);
    }

    /// The server may have an unnamed statement that is no client's, or not the one it was given last.
    pub fn doubt_unnamed(&mut self) {
        self.unnamed = u64::MAX;
    }

    /// Whether its unnamed statement is that client's.
    #[inline]
    pub fn has_unnamed_of(&self, client: &ClientStatements) -> bool {
        self.unnamed == client.unnamed.serial
    }

    /// The server's unnamed statement is gone, or is the one with this serial.
    pub fn set_unnamed(&mut self, serial: u64) {
        self.unnamed = serial;
    }

    /// Whether some client's own names are among them.
    #[inline]
    pub fn has_own_names(&self) -> bool {
        self.own_names > 0
    }

    /// Those names, as a PostgreSQL array.
    pub fn own_names(&self) -> String {
        let known = self.known.values().map(|known| &known.statement);
        array(known.filter(|known| known.has_own_name()).map(|known| known.server_name()))
    }

    /// The names of all that it certainly has, and of `others`, as a PostgreSQL array.
    pub fn names(&self, others: impl Iterator<Item = &'static [u8]>) -> String {
        let certain = self.known.values().filter(|known| known.certainty == Certainty::Confirmed);
        array(certain.map(|known| known.statement.server_name()).chain(others.map(|name| -> &[u8] { name })))
    }

    /// Code has taken these away past us. Whether nothing is left.
    #[cold]
    pub fn lost(&mut self, names: &[&[u8]]) -> bool {
        let lost = self.known.values().map(|known| &known.statement);
        let lost: Vec<_> = lost.filter(|known| names.contains(&known.server_name())).cloned().collect();
        for statement in &lost {
            self.remove(statement);
        }
        !lost.is_empty() && self.known.is_empty()
    }

    /// All that it may have.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Statement>> {
        self.known.values().map(|known| &known.statement)
    }

    /// The one with that number, if it may have it.
    pub fn get(&self, id: u64) -> Option<&Arc<Statement>> {
        self.known.get(&id).map(|known| &known.statement)
    }

    /// Whether it certainly has it.
    pub fn has(&self, statement: &Statement) -> bool {
        self.known.get(&statement.id).is_some_and(|known| known.certainty == Certainty::Confirmed)
    }

    /// How many more statements, and bytes of their texts, make one too many: the one to close first, which was not used for
    /// longest.
    pub fn one_too_many(&self, more: usize, bytes: usize) -> Option<u64> {
        let Capacity { statements: count_max, bytes: bytes_max } = self.capacity;
        let too_many = self.known.len() + more > count_max || self.bytes + bytes > bytes_max;
        let oldest = self.known.iter().filter(|_| too_many).min_by_key(|(_, known)| known.used);
        oldest.map(|(id, _)| *id)
    }

    /// How many it keeps at most.
    pub fn statements_max(&self) -> usize {
        self.capacity.statements
    }

    fn insert(&mut self, statement: &Arc<Statement>, certainty: Certainty, used: u64) {
        self.bytes += statement.body().len();
        self.own_names += usize::from(statement.has_own_name());
        let known = Known { statement: statement.clone(), certainty, used };
        let before = self.known.insert(statement.id, known);
        self.without(before);
    }

    /// Forgets one that the server has not any more.
    pub fn remove(&mut self, statement: &Statement) {
        let before = self.known.remove(&statement.id);
        self.without(before);
    }

    fn without(&mut self, gone: Option<Known>) {
        if let Some(Known { statement, .. }) = gone {
            self.bytes -= statement.body().len();
            self.own_names -= usize::from(statement.has_own_name());
        }
    }

    /// A Parse of `statement` is queued.
    pub fn queued(&mut self, statement: &Arc<Statement>, batch: u32) {
        self.enter(statement, Certainty::Within(batch));
    }

    /// The client's own PREPARE of `statement` is queued.
    pub fn expected(&mut self, statement: &Arc<Statement>) {
        self.enter(statement, Certainty::Expected);
    }

    fn enter(&mut self, statement: &Arc<Statement>, certainty: Certainty) {
        self.tally.server_parses += 1;
        self.clock += 1;
        self.insert(statement, certainty, self.clock);
    }

    /// ParseComplete, and what shape the statement has is what its client knows.
    pub fn confirmed(&mut self, statement: &Statement) {
        if let Some(known) = self.known.get_mut(&statement.id) {
            known.certainty = Certainty::Confirmed;
        }
        statement.proved.store(true, Ordering::Relaxed);
    }

    /// A queued Parse failed or was skipped.
    pub fn failed(&mut self, statement: &Statement) {
        if let Some(known) = self.known.get_mut(&statement.id) {
            known.certainty = Certainty::Doubtful;
        }
    }

    /// A DEALLOCATE succeeded.
    pub fn deallocated(&mut self, statement: &Statement) {
        self.remove(statement);
    }

    /// A queued Close was skipped: the server still has the statement, if it had it.
    pub fn not_closed(&mut self, statement: &Arc<Statement>) {
        self.insert(statement, Certainty::Doubtful, 0);
    }

    /// How the server stands to `statement`, which is about to be used.
    #[inline]
    pub fn find(&mut self, statement: &Statement, batch: u32) -> Found {
        self.clock += 1;
        let Some(known) = self.known.get_mut(&statement.id) else { return Found::Missing };
        known.used = self.clock;
        match known.certainty {
            Certainty::Confirmed | Certainty::Expected => Found::Known,
            Certainty::Within(asked) if asked == batch => Found::Asked,
            Certainty::Within(_) | Certainty::Doubtful => Found::Missing,
        }
    }
}

/// A PostgreSQL array of names of statements; none has a letter in it that would have to be quoted otherwise.
fn array<'n>(names: impl Iterator<Item = &'n [u8]>) -> String {
    let names: Vec<_> = names.map(|name| format!("\"{}\"", String::from_utf8_lossy(name))).collect();
    format!("{{{}}}", names.join(","))
}
