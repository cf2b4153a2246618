//! What one client has prepared. Pure.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use super::{SqlNames, Statement, parse_settings::ParseSettings, shared_statements::StatementTable};
use crate::data_path::{
    memory_limit::{Account, Charge, PIECE_BYTES},
    session_state::{Settings, side_effects::Aftermath},
};

/// What one client has prepared.
#[derive(Debug, Default)]
pub struct ClientStatements {
    named: HashMap<Box<[u8]>, Arc<Statement>>,
    /// What they take, each as if nobody shared it, and their names.
    bytes: usize,
    /// What their names take.
    name_bytes: usize,
    /// Of that, what counts for the session: whole blocks, so that a statement more or less is not felt.
    names: Charge,
    memory: Arc<Account>,
    pub(in crate::data_path) unnamed: Unnamed,
    /// What few clients ever need; an idle one is charged for it otherwise.
    rare: Option<Box<Rare>>,
}

#[derive(Debug, Default)]
struct Rare {
    /// Names whose Parse no server has seen yet (see `exchange/deferred_parse.rs`).
    postponed: Vec<Box<[u8]>>,
    /// What was the unnamed statement before; of a pipeline that is under way.
    replaced: VecDeque<Unnamed>,
    /// The names that were taken away last: a server may yet say that there is no such statement.
    lost: VecDeque<(Box<[u8]>, Arc<Statement>)>,
    /// Some named statement has been made by PREPARE.
    any_in_sql: bool,
}

/// The client's unnamed statement. Kept, because Parse and Sync may be followed by a Bind in a later batch, on another
/// server (lib/pq and pg8000 do so).
#[derive(Debug, Default)]
pub(in crate::data_path) struct Unnamed {
    /// Unique over all clients of the process; 0: there is none.
    pub(in crate::data_path) serial: u64,
    /// As in [`Statement::body`]; the buffer is used again and again.
    pub(in crate::data_path) body: Vec<u8>,
    aftermath: Aftermath,
    /// As in [`Statement::naming`].
    naming: Option<Arc<SqlNames>>,
    /// Its text was too long to be kept: no other server can have it. And it is gone once the transaction is over in which it
    /// has run.
    is_unread: bool,
    has_run: bool,
    /// As in [`Statement::parsed_under`]; `None`: nobody knows.
    pub(in crate::data_path) parsed_under: Option<Arc<ParseSettings>>,
    /// What it takes beyond [`UNNAMED_BYTES_KEPT`], which every session may have.
    charge: Charge,
}

/// As many requests may be on their way when a statement fails, and be told of by their names.
const LOST_MAX: usize = 8;

/// As many unnamed statements of one pipeline may be skipped, and the one before them is still known.
const REPLACED_MAX: usize = 16;

/// A buffer for unnamed statements is given back when it grew past this.
pub const UNNAMED_BYTES_KEPT: usize = 1024;

/// What a named statement takes in its client's own table, beside its name.
const ENTRY_BYTES: usize = 4 * PIECE_BYTES;

/// Names count in blocks of so many bytes.
const NAMES_BLOCK_BYTES: usize = 4096;

impl ClientStatements {
    /// None yet; what is kept for them counts there.
    pub fn new(memory: Arc<Account>) -> Self {
        Self { memory, ..Self::default() }
    }

    /// What a name takes: it may stand among those that are postponed, too.
    fn name_bytes(name: &[u8]) -> usize {
        ENTRY_BYTES + 2 * name.len()
    }

    /// Counts the names.
    fn count(&mut self) {
        let bytes = self.name_bytes.next_multiple_of(NAMES_BLOCK_BYTES);
        if bytes != self.names.bytes() {
            self.names.set(&self.memory, bytes);
        }
    }

    /// How many named statements there are.
    pub fn len(&self) -> usize {
        self.named.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// Bytes that the named statements take, each as if nobody shared it.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The statement of that name.
    pub fn get(&self, name: &[u8]) -> Option<&Arc<Statement>> {
        self.named.get(name)
    }

    pub(in crate::data_path) fn has(&self, id: u64) -> bool {
        self.named.values().any(|statement| statement.id == id)
    }

    /// The client's name for the statement that servers call `ours`.
    pub fn name_of(&self, ours: &[u8]) -> Option<&[u8]> {
        let lost = self.rare.iter().flat_map(|rare| &rare.lost).map(|(name, statement)| (name, statement));
        self.named
            .iter()
            .chain(lost)
            .find(|(_, statement)| *statement.server_name() == *ours)
            .map(|(name, _)| &**name)
    }

    fn rare(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    /// The Parse of that name is yet to reach a server.
    pub fn postpone(&mut self, name: &[u8]) {
        self.rare().postponed.push(name.into());
    }

    /// Whether there is any such.
    #[inline]
    pub fn is_any_postponed(&self) -> bool {
        self.rare.as_ref().is_some_and(|rare| !rare.postponed.is_empty())
    }

    /// Whether the Parse of that name must reach a server before the name is used; `true` once.
    #[inline]
    pub fn take_postponed(&mut self, name: &[u8]) -> bool {
        self.is_any_postponed() && self.is_postponed(name)
    }

    #[cold]
    fn is_postponed(&mut self, name: &[u8]) -> bool {
        let postponed = &mut self.rare().postponed;
        let found = postponed.iter().position(|postponed| **postponed == *name);
        found.map(|at| postponed.swap_remove(at)).is_some()
    }

    /// What changes the unnamed statement goes to the server. `may_be_skipped`: where what came before fails, the one
    /// that there is stays.
    #[inline(always)]
    pub fn succeed_unnamed(&mut self, may_be_skipped: bool) {
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

    /// A request that was to change the unnamed statement was skipped, or has failed; so many that came after it may not.
    pub fn unnamed_skipped(&mut self, failed: bool, later: usize) {
        let replaced = &mut self.rare().replaced;
        let place = replaced.len().checked_sub(later);
        match (failed, later) {
            (true, 0) => self.forget_unnamed(),
            (false, 0) => self.unnamed = replaced.pop_back().unwrap_or_default(),
            (true, _) => {
                if let Some(unnamed) = place.and_then(|place| replaced.get_mut(place)) {
                    *unnamed = Unnamed::default();
                }
            }
            (false, _) => drop(place.map(|place| replaced.remove(place))),
        }
    }

    /// A Parse of the unnamed statement goes to the server, which has these settings.
    pub fn set_unnamed(
        &mut self,
        serial: u64,
        body: &[u8],
        aftermath: Aftermath,
        naming: Option<Arc<SqlNames>>,
        under: Option<&Arc<ParseSettings>>,
    ) {
        self.unnamed.naming = naming;
        if self.unnamed.parsed_under.as_ref().map(Arc::as_ptr) != under.map(Arc::as_ptr) {
            self.unnamed.parsed_under = under.cloned();
        }
        if self.unnamed.body.capacity() > UNNAMED_BYTES_KEPT && body.len() <= UNNAMED_BYTES_KEPT {
            self.unnamed.body = Vec::new();
            self.unnamed.charge.clear();
        }
        (self.unnamed.is_unread, self.unnamed.has_run) = (false, false);
        self.unnamed.body.clear();
        self.unnamed.body.extend_from_slice(body);
        self.unnamed.serial = serial;
        self.unnamed.aftermath = aftermath;
        if self.unnamed.body.capacity() > UNNAMED_BYTES_KEPT {
            self.unnamed.charge.set(&self.memory, self.unnamed.body.capacity());
        }
    }

    /// The unnamed statement's text, a zero, its types; `None` if there is none.
    pub fn unnamed_body(&self) -> Option<&[u8]> {
        (self.unnamed.serial != 0).then_some(&*self.unnamed.body)
    }

    /// The unnamed statement as it can be parsed elsewhere: its serial, its text, a zero and its types, and the settings under
    /// which it was parsed. `None` if there is none, or its text was not kept.
    pub fn readable_unnamed(&self) -> Option<(u64, &[u8], Option<&Arc<ParseSettings>>)> {
        let unnamed = &self.unnamed;
        let is_there = unnamed.serial != 0 && !unnamed.is_unread;
        is_there.then(|| (unnamed.serial, &*unnamed.body, unnamed.parsed_under.as_ref()))
    }

    /// A Parse of the unnamed statement goes to the server that is too long to be kept.
    pub fn set_unnamed_unread(&mut self, serial: u64) {
        self.set_unnamed(serial, b"", Aftermath::unread(), None, None);
        self.unnamed.is_unread = true;
    }

    /// The unnamed statement runs, if it is such.
    #[inline]
    pub fn run_unnamed(&mut self) {
        self.unnamed.has_run = self.unnamed.is_unread;
    }

    /// A transaction is over; whether the unnamed statement is one that only the server has, and may yet run. `there`: it was not
    /// asked anything that has taken its place.
    pub fn keeps_unnamed_unread(&mut self, there: bool) -> bool {
        let keeps = self.is_unnamed_unread() && there && !self.unnamed.has_run;
        if self.is_unnamed_unread() && !keeps {
            self.forget_unnamed();
        }
        keeps
    }

    /// Whether the unnamed statement is one that only the server has that it was parsed on.
    pub fn is_unnamed_unread(&self) -> bool {
        self.unnamed.serial != 0 && self.unnamed.is_unread
    }

    /// Every named statement becomes `table`'s, to be parsed under the settings that the session has there. One that is made by
    /// PREPARE, or names such, is the client's own and stays.
    pub fn move_to(&mut self, table: &StatementTable, settings: &Settings, memory: &Arc<Account>) {
        self.memory = memory.clone();
        self.names.set(memory, self.names.bytes());
        self.unnamed.charge.set(memory, self.unnamed.charge.bytes());
        let under = table.settings.of(settings);
        let followed = |statement: &&mut Arc<Statement>| !statement.in_sql && statement.naming.is_none();
        for statement in self.named.values_mut().filter(followed) {
            *statement = table.intern(statement.body(), &under, || (statement.aftermath.clone(), None));
        }
    }

    /// A statement that was to be shared becomes the client's own, by whichever names it has it.
    pub fn part_with(&mut self, shared: &Statement, table: &StatementTable) {
        for statement in self.named.values_mut().filter(|statement| statement.is(shared)) {
            *statement = table.parted(shared, &ParseSettings::unknown());
        }
    }

    /// Whether there may be one that was made by PREPARE.
    #[inline]
    pub fn has_any_in_sql(&self) -> bool {
        self.rare.as_ref().is_some_and(|rare| rare.any_in_sql)
    }

    /// From now on servers know what PREPARE has made by its own names: the session looks at them, or runs one by its name in
    /// code.
    #[cold]
    pub fn take_own_names(&mut self, table: &StatementTable) {
        for (name, statement) in &mut self.named {
            if let Some(own) = table.under_own_name(statement, name) {
                self.bytes = self.bytes + own.bytes() - statement.bytes();
                *statement = own;
            }
        }
    }

    /// Every named statement.
    pub(in crate::data_path) fn all(&self) -> impl Iterator<Item = &Arc<Statement>> {
        self.named.values()
    }

    /// As in [`Statement::naming`].
    pub fn unnamed_naming(&self) -> Option<&Arc<SqlNames>> {
        self.unnamed.naming.as_ref()
    }

    /// What executing the unnamed statement may do.
    pub fn unnamed_aftermath(&self) -> &Aftermath {
        &self.unnamed.aftermath
    }

    /// The unnamed statement is gone: a simple query, a Close or a failed Parse.
    pub fn forget_unnamed(&mut self) {
        self.unnamed.serial = 0;
        if self.unnamed.body.capacity() > UNNAMED_BYTES_KEPT {
            self.unnamed = Unnamed::default();
        }
    }

    /// DISCARD ALL and DEALLOCATE ALL. The unnamed statement outlives both.
    pub fn forget_all(&mut self) {
        self.named = HashMap::new();
        (self.bytes, self.name_bytes) = (0, 0);
        self.count();
        if let Some(rare) = self.rare.as_mut() {
            rare.postponed.clear();
        }
    }

    /// The name means this statement from now on.
    pub fn insert(&mut self, name: &[u8], statement: Arc<Statement>) {
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

    /// The name means nothing any more.
    pub fn remove(&mut self, name: &[u8]) -> Option<Arc<Statement>> {
        let removed = self.named.remove(name);
        if let Some(statement) = &removed {
            self.bytes -= statement.bytes() + Self::name_bytes(name);
            self.name_bytes -= Self::name_bytes(name);
            let lost = &mut self.rare().lost;
            lost.truncate(LOST_MAX - 1);
            lost.push_front((name.into(), statement.clone()));
        }
        self.take_postponed(name);
        if self.named.is_empty() {
            self.named = HashMap::new();
        }
        self.count();
        removed
    }
}
