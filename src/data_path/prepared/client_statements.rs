//! Prepared statements of one client. Pure.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
};

use rustc_hash::FxHashSet;

use super::{
    SqlNames, Statement, kept_name, parse_settings::ParseSettings, shared_statements::SharedStatements,
};
use crate::{
    data_path::{
        memory_limit::{Account, Charge, PIECE_BYTES},
        session_state::{Settings, side_effects::SideEffects},
    },
    wire::frame::cstr,
};

/// A statement's name.
type Name = Box<[u8]>;

/// Prepared statements of one client.
#[derive(Debug, Default)]
pub struct ClientStatements {
    /// Clients choose the names: the hash has a random key.
    pub(super) named: HashMap<Name, Arc<Statement>, ahash::RandomState>,
    /// Memory of the named statements with their names in bytes; shared statements count fully.
    bytes: usize,
    /// Memory of the names in bytes.
    name_bytes: usize,
    /// Charge for the names, in whole blocks, so that a single statement rarely changes it.
    names: Charge,
    memory: Arc<Account>,
    pub(in crate::data_path) unnamed: UnnamedStatement,
    /// Boxed, because few clients need it and idle clients must stay small.
    pub(super) rare: Option<Box<Rare>>,
}

#[derive(Debug, Default)]
pub(super) struct Rare {
    /// Names whose Parse has not been sent to any server yet (see `exchange/deferred_parse.rs`).
    pub(super) deferred: HashSet<Name>,
    /// Earlier unnamed statements in the current pipeline.
    replaced: VecDeque<UnnamedStatement>,
    /// Recently removed names, with those on servers: a server may still report that the statement does not
    /// exist.
    removed: VecDeque<(Name, Name)>,
    /// A named statement was created by PREPARE.
    any_in_sql: bool,
}

/// The client's unnamed statement. Stored, because a Bind may follow in a later batch and reach another
/// server (lib/pq and pg8000 do this).
#[derive(Debug, Default)]
pub(in crate::data_path) struct UnnamedStatement {
    /// Unique in the process; 0 if there is no unnamed statement.
    pub(in crate::data_path) serial: u64,
    /// As in [`Statement::body`]; the buffer is reused.
    pub(in crate::data_path) body: Vec<u8>,
    side_effects: SideEffects,
    /// As in [`Statement::sql_names`].
    pub(super) sql_names: Option<Arc<SqlNames>>,
    /// The text was too long to be stored. Dropped after the transaction in which it has run.
    is_unstored: bool,
    has_run: bool,
    /// As in [`Statement::parsed_under`]; `None` if unknown.
    pub(in crate::data_path) parsed_under: Option<Arc<ParseSettings>>,
    /// Charge for memory beyond [`UNNAMED_BYTES_KEPT`].
    charge: Charge,
}

/// How many requests may be in flight when a statement fails.
const REMOVED_MAX: usize = 8;

/// How many unnamed statements of a pipeline may be skipped before the previous one is lost.
const REPLACED_MAX: usize = 16;

/// Larger buffers of unnamed statements are freed after use.
pub const UNNAMED_BYTES_KEPT: usize = 1024;

/// Memory of a named statement in its client's table, without the name.
const ENTRY_BYTES: usize = 4 * PIECE_BYTES;

/// Names are charged in blocks of this size.
const NAMES_BLOCK_BYTES: usize = 4096;

impl ClientStatements {
    /// Creates an empty table that charges `memory`.
    pub fn new(memory: Arc<Account>) -> Self {
        Self { memory, ..Self::default() }
    }

    /// Memory of a name; it may also be in the list of deferred names.
    fn name_bytes(name: &[u8]) -> usize {
        ENTRY_BYTES + 2 * name.len()
    }

    /// Updates the charge for the names.
    fn count(&mut self) {
        let bytes = self.name_bytes.next_multiple_of(NAMES_BLOCK_BYTES);
        if bytes != self.names.bytes() {
            self.names.set(&self.memory, bytes);
        }
    }

    /// Returns the number of named statements.
    pub fn len(&self) -> usize {
        self.named.len()
    }

    /// Returns whether there is no named statement.
    pub fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// Returns the memory of the named statements in bytes; shared statements count fully.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the statement with this name.
    pub fn get(&self, name: &[u8]) -> Option<&Arc<Statement>> {
        self.named.get(kept_name(name))
    }

    /// Returns the text of a statement; an empty name is that of the unnamed one.
    pub fn text(&self, name: &[u8]) -> Option<Cow<'_, [u8]>> {
        if name.is_empty() {
            return Some(Cow::Borrowed(cstr(&mut self.unnamed_body()?).ok()?));
        }
        let body = self.get(name)?.body();
        Some(Cow::Owned(cstr(&mut &*body).ok()?.to_vec()))
    }

    /// Returns the numbers of the named statements.
    pub(in crate::data_path) fn ids(&self) -> FxHashSet<u64> {
        self.named.values().map(|statement| statement.id).collect()
    }

    /// Returns the client's name for the statement with this server name.
    pub fn name_of(&self, ours: &[u8]) -> Option<&[u8]> {
        let named = self.named.iter().map(|(name, statement)| (name, statement.server_name()));
        let removed = self.rare.iter().flat_map(|rare| &rare.removed).map(|(name, ours)| (name, &**ours));
        named.chain(removed).find(|(_, found)| *found == ours).map(|(name, _)| &**name)
    }

    fn rare(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    /// Defers the Parse of that name until a server needs it.
    pub fn defer(&mut self, name: &[u8]) {
        self.rare().deferred.insert(kept_name(name).into());
    }

    /// Returns whether a Parse is deferred.
    #[inline]
    pub fn has_deferred(&self) -> bool {
        self.rare.as_ref().is_some_and(|rare| !rare.deferred.is_empty())
    }

    /// Returns whether the Parse of this name was deferred, and clears the mark.
    #[inline]
    pub fn take_deferred(&mut self, name: &[u8]) -> bool {
        self.has_deferred() && self.remove_deferred(name)
    }

    #[cold]
    fn remove_deferred(&mut self, name: &[u8]) -> bool {
        self.rare().deferred.remove(kept_name(name))
    }

    /// Called before a request changes the unnamed statement. `may_be_skipped` means that an earlier request
    /// in the pipeline may fail; the present statement then stays.
    #[inline(always)]
    pub fn begin_unnamed_change(&mut self, may_be_skipped: bool) {
        if !may_be_skipped {
            if let Some(rare) = self.rare.as_mut() {
                rare.replaced.clear();
            }
            return;
        }
        let before = std::mem::take(&mut self.unnamed);
        let replaced = &mut self.rare().replaced;
        if replaced.len() == REPLACED_MAX {
            replaced.pop_front();
        }
        replaced.push_back(before);
    }

    /// Handles a failed or skipped change of the unnamed statement that `later` changes follow.
    pub fn unnamed_skipped(&mut self, failed: bool, later: usize) {
        let replaced = &mut self.rare().replaced;
        let place = replaced.len().checked_sub(later);
        match (failed, later) {
            (true, 0) => self.forget_unnamed(),
            (false, 0) => self.unnamed = replaced.pop_back().unwrap_or_default(),
            (true, _) => {
                if let Some(unnamed) = place.and_then(|place| replaced.get_mut(place)) {
                    *unnamed = UnnamedStatement::default();
                }
            }
            (false, _) => drop(place.map(|place| replaced.remove(place))),
        }
    }

    /// Stores the unnamed statement that a Parse creates on a server with settings `under`.
    pub fn set_unnamed(
        &mut self,
        serial: u64,
        body: &[u8],
        side_effects: SideEffects,
        sql_names: Option<Arc<SqlNames>>,
        under: Option<&Arc<ParseSettings>>,
    ) {
        self.unnamed.sql_names = sql_names;
        if self.unnamed.parsed_under.as_ref().map(Arc::as_ptr) != under.map(Arc::as_ptr) {
            self.unnamed.parsed_under = under.cloned();
        }
        if self.unnamed.body.capacity() > UNNAMED_BYTES_KEPT && body.len() <= UNNAMED_BYTES_KEPT {
            self.unnamed.body = Vec::new();
            self.unnamed.charge.clear();
        }
        (self.unnamed.is_unstored, self.unnamed.has_run) = (false, false);
        self.unnamed.body.clear();
        self.unnamed.body.extend_from_slice(body);
        self.unnamed.serial = serial;
        self.unnamed.side_effects = side_effects;
        if self.unnamed.body.capacity() > UNNAMED_BYTES_KEPT {
            self.unnamed.charge.set(&self.memory, self.unnamed.body.capacity());
        }
    }

    /// Returns the text, a zero byte and the types of the unnamed statement; `None` if there is none.
    pub fn unnamed_body(&self) -> Option<&[u8]> {
        (self.unnamed.serial != 0).then_some(&*self.unnamed.body)
    }

    /// Returns the unnamed statement for a server that lacks it. `None`: there is none with a stored text.
    pub(in crate::data_path) fn stored_unnamed(&self) -> Option<&UnnamedStatement> {
        Some(&self.unnamed).filter(|unnamed| unnamed.serial != 0 && !unnamed.is_unstored)
    }

    /// Records an unnamed statement whose text is too long to be stored.
    pub fn set_unnamed_unstored(&mut self, serial: u64) {
        self.set_unnamed(serial, b"", SideEffects::of_unstored_text(), None, None);
        self.unnamed.is_unstored = true;
    }

    /// Records that the unnamed statement runs.
    #[inline]
    pub fn run_unnamed(&mut self) {
        self.unnamed.has_run = self.unnamed.is_unstored;
    }

    /// Called after a transaction. Returns whether the unnamed statement exists only on the server and has
    /// not run.
    /// `there`: no other request has replaced it.
    pub fn keeps_unnamed_unstored(&mut self, there: bool) -> bool {
        let keeps = self.is_unnamed_unstored() && there && !self.unnamed.has_run;
        if self.is_unnamed_unstored() && !keeps {
            self.forget_unnamed();
        }
        keeps
    }

    /// Returns whether the unnamed statement exists only on the server that parsed it.
    pub fn is_unnamed_unstored(&self) -> bool {
        self.unnamed.serial != 0 && self.unnamed.is_unstored
    }

    /// Replaces all named statements by those of `table`, parsed under `settings`. Statements created by
    /// PREPARE, or that name others, belong to one client and stay.
    pub fn move_to(&mut self, table: &SharedStatements, settings: &Settings, memory: &Arc<Account>) {
        self.memory = memory.clone();
        self.names.set(memory, self.names.bytes());
        self.unnamed.charge.set(memory, self.unnamed.charge.bytes());
        let under = table.settings.of(settings);
        let followed = |statement: &&mut Arc<Statement>| !statement.in_sql && statement.sql_names.is_none();
        for statement in self.named.values_mut().filter(followed) {
            *statement = table.intern(&statement.body(), &under, || statement.side_effects.clone());
        }
    }

    /// Replaces a shared statement by one of this client's own, under all its names.
    pub fn unshare(&mut self, shared: &Statement, table: &SharedStatements) {
        for statement in self.named.values_mut().filter(|statement| statement.is(shared)) {
            *statement = table.unshared(shared, &ParseSettings::unknown());
        }
    }

    /// Returns whether a statement may have been created by PREPARE.
    #[inline]
    pub fn has_any_in_sql(&self) -> bool {
        self.rare.as_ref().is_some_and(|rare| rare.any_in_sql)
    }

    /// Renames statements created by PREPARE on servers to the client's own names, because the session reads
    /// them from a catalog or executes one from code.
    #[cold]
    pub fn use_client_names(&mut self, table: &SharedStatements) {
        for (name, statement) in &mut self.named {
            if let Some(own) = table.with_client_name(statement, name) {
                self.bytes = self.bytes + own.bytes() - statement.bytes();
                *statement = own;
            }
        }
    }

    pub(in crate::data_path) fn all(&self) -> impl Iterator<Item = &Arc<Statement>> {
        self.named.values()
    }

    /// As in [`Statement::sql_names`].
    pub fn unnamed_sql_names(&self) -> Option<&Arc<SqlNames>> {
        self.unnamed.sql_names.as_ref()
    }

    /// Returns the side effects of executing the unnamed statement.
    pub fn unnamed_side_effects(&self) -> &SideEffects {
        &self.unnamed.side_effects
    }

    /// Removes the unnamed statement after a simple query, a Close or a failed Parse.
    pub fn forget_unnamed(&mut self) {
        self.unnamed.serial = 0;
        if self.unnamed.body.capacity() > UNNAMED_BYTES_KEPT {
            self.unnamed = UnnamedStatement::default();
        }
    }

    /// Handles DISCARD ALL and DEALLOCATE ALL. The unnamed statement outlives both.
    pub fn forget_all(&mut self) {
        self.named = HashMap::default();
        (self.bytes, self.name_bytes) = (0, 0);
        self.count();
        if let Some(rare) = self.rare.as_mut() {
            rare.deferred.clear();
        }
    }

    /// Stores a statement under this name.
    pub fn insert(&mut self, name: &[u8], statement: Arc<Statement>) {
        let name = kept_name(name);
        if statement.in_sql {
            self.rare().any_in_sql = true;
        }
        self.bytes += statement.bytes();
        match self.named.insert(name.into(), statement) {
            Some(before) => self.bytes -= before.bytes(),
            None => {
                self.bytes += Self::name_bytes(name);
                self.name_bytes += Self::name_bytes(name);
                self.count();
            }
        }
    }

    /// Removes a name and returns its statement.
    pub fn remove(&mut self, name: &[u8]) -> Option<Arc<Statement>> {
        let name = kept_name(name);
        let removed = self.named.remove(name);
        if let Some(statement) = &removed {
            self.bytes -= statement.bytes() + Self::name_bytes(name);
            self.name_bytes -= Self::name_bytes(name);
            let removed = &mut self.rare().removed;
            removed.truncate(REMOVED_MAX - 1);
            removed.push_front((name.into(), statement.server_name().into()));
        }
        self.take_deferred(name);
        if self.named.is_empty() {
            self.named = HashMap::default();
        }
        self.count();
        removed
    }
}
