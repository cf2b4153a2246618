//! Prepared statements that follow a client from server to server. Pure: bytes in, bytes out.
//!
//! A client's named statement is known to servers under a name of ours, the same for every client of the tenant that
//! prepares the same text with the same parameter types. A client's own Parse always reaches the server as a real
//! Parse, so that a changed table or type, an error or a notice is what PostgreSQL itself would give; where a later Bind
//! or Describe meets a server that lacks the statement, a Parse is put in front of it, in the same write.
//!
//! What each server has is in `server_statements.rs`.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

pub use super::server_statements::{Capacity, Found, ServerStatements, Tally};
use super::{
    aftermath::Aftermath,
    catalogue::Seen,
    deeds::{Deeds, OUR_PREFIX},
    session_state::Settings,
    shape::{Shape, is_fixed},
    weight::{Share, Weight},
};
use crate::wire::{
    frame::{HEADER_BYTES, cstr},
    message::append_cstr,
};

/// A statement's text and parameter types, and what executing it may do to a session. Shared by every client of a
/// tenant that prepared the same.
#[derive(Debug)]
pub struct Statement {
    pub(super) id: u64,
    /// What servers call it.
    server_name: Box<[u8]>,
    /// A Parse message's body behind the name: the text, a zero, the types.
    body: Box<[u8]>,
    /// Its share of what all have.
    _weight: Weight,
    /// Read once, when it was parsed.
    pub aftermath: Aftermath,
    /// What it calls.
    pub seen: Seen,
    /// Made by PREPARE: `body` is that text, with the server's name for it in it.
    pub(super) in_sql: bool,
    /// Where that is our name, it stands there in place of these bytes.
    renamed: Option<(usize, Box<[u8]>)>,
    /// What its own text names in EXECUTE and the like, and does by PREPARE and DEALLOCATE.
    pub naming: Option<Arc<SqlNames>>,
    pub(super) proved: AtomicBool,
    /// Its shape is fixed when it is parsed, and looked at.
    pub(super) is_looked_at: bool,
    /// What its clients were told that it takes and gives, once a server has said so.
    pub(super) shape: OnceLock<Shape>,
}

impl Statement {
    fn new(id: u64, body: Box<[u8]>, aftermath: Aftermath, share: &Arc<Share>) -> Self {
        Self {
            id,
            server_name: format!("pglobby_{id}").into_bytes().into(),
            _weight: Weight::new(share, body.len()),
            body,
            aftermath,
            seen: Seen::default(),
            in_sql: false,
            renamed: None,
            naming: None,
            proved: AtomicBool::new(false),
            is_looked_at: false,
            shape: OnceLock::new(),
        }
    }

    /// Whether it is that one.
    pub fn is(&self, other: &Self) -> bool {
        self.id == other.id
    }

    /// A server has taken it once.
    pub fn is_proved(&self) -> bool {
        self.proved.load(Ordering::Relaxed)
    }

    /// Its text, a zero, its types.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// What servers call it.
    pub fn server_name(&self) -> &[u8] {
        &self.server_name
    }

    /// Servers call it as its client does; so none has it while another client is there.
    pub fn has_own_name(&self) -> bool {
        !self.server_name.starts_with(OUR_PREFIX)
    }
}

/// The statements of one pool, each once.
#[derive(Debug, Default)]
pub struct StatementTable {
    /// Weak: a statement lives as long as a client or a server has it.
    by_meaning: Mutex<HashMap<Vec<u8>, Weak<Statement>>>,
    /// What they weigh.
    pub share: Arc<Share>,
}

/// Of the statement that was made last. One count for the process: servers go by the number, and whoever meets on a server
/// must mean the same by it.
static LAST_ID: AtomicU64 = AtomicU64::new(0);

/// With other values of these the same bytes are another statement: `SELECT * FROM t` finds another table, and a server
/// that had both as one would say "cached plan must not change result type" (0A000) to one of the clients.
const MEANING: [&str; 4] = ["client_encoding", "role", "search_path", "standard_conforming_strings"];

impl StatementTable {
    /// One that is made by PREPARE, for one client: `text` is the whole of it, with the client's name at `named`.
    pub fn in_sql(&self, aftermath: Aftermath, text: &[u8], named: Range<usize>) -> Arc<Statement> {
        let id = LAST_ID.fetch_add(1, Ordering::Relaxed) + 1;
        let mut statement = Statement::new(id, Box::default(), aftermath, &self.share);
        let renamed = text.get(named.clone()).unwrap_or_default();
        let mut body = replaced(text, named.clone(), &statement.server_name);
        body.extend_from_slice(&[0, 0, 0]); // the end, and no parameters
        statement.renamed = Some((named.start, renamed.into()));
        self.with_body(statement, body)
    }

    /// The same statement, for servers to know by its client's own name; `None` if that is so already, or cannot be.
    fn under_own_name(&self, statement: &Statement, name: &[u8]) -> Option<Arc<Statement>> {
        let (at, bytes) = statement.renamed.as_ref().filter(|_| may_be_own(name))?;
        let id = LAST_ID.fetch_add(1, Ordering::Relaxed) + 1;
        let mut own = Statement::new(id, Box::default(), statement.aftermath.clone(), &self.share);
        own.server_name = name.into();
        own.proved = AtomicBool::new(statement.is_proved());
        let body = replaced(&statement.body, *at..*at + statement.server_name.len(), bytes);
        Some(self.with_body(own, body))
    }

    fn with_body(&self, mut statement: Statement, body: Vec<u8>) -> Arc<Statement> {
        statement._weight = Weight::new(&self.share, body.len());
        statement.body = body.into();
        statement.in_sql = true;
        Arc::new(statement)
    }

    /// The statement with this Parse body in a session with these settings; `made` is called where it is new.
    pub fn intern(
        &self,
        body: &[u8],
        settings: &Settings,
        made: impl FnOnce() -> (Aftermath, Option<Arc<SqlNames>>),
    ) -> Arc<Statement> {
        let meaning = meaning(body, settings);
        let mut table = self.by_meaning.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(statement) = table.get(&meaning).and_then(Weak::upgrade) {
            return statement;
        }
        // The dead are swept when the table would have to grow: amortised, and it never holds more than twice the living.
        if table.len() == table.capacity() {
            table.retain(|_, statement| statement.strong_count() > 0);
        }
        let id = LAST_ID.fetch_add(1, Ordering::Relaxed) + 1;
        let (aftermath, naming) = made();
        let is_looked_at = naming.is_none() && cstr(&mut { body }).is_ok_and(is_fixed);
        let statement = Arc::new(Statement {
            naming,
            is_looked_at,
            ..Statement::new(id, body.into(), aftermath, &self.share)
        });
        table.insert(meaning, Arc::downgrade(&statement));
        statement
    }

    /// A client has prepared `before` in a session with these settings, and was told of another shape than its clients
    /// before. Theirs it stays, whose next use PostgreSQL refuses; from now on the text makes another statement.
    #[cold]
    pub fn reshaped(&self, before: &Statement, settings: &Settings, shape: Shape) -> Arc<Statement> {
        let meaning = meaning(&before.body, settings);
        let mut table = self.by_meaning.lock().unwrap_or_else(PoisonError::into_inner);
        let known = table.get(&meaning).and_then(Weak::upgrade);
        if let Some(known) = known.filter(|known| known.shape.get() == Some(&shape)) {
            return known;
        }
        let id = LAST_ID.fetch_add(1, Ordering::Relaxed) + 1;
        let statement = Arc::new(Statement {
            is_looked_at: true,
            shape: shape.into(),
            proved: AtomicBool::new(true),
            ..Statement::new(id, before.body.clone(), before.aftermath.clone(), &self.share)
        });
        table.insert(meaning, Arc::downgrade(&statement));
        statement
    }

    /// The statement with this Parse body in a session with these settings, if a client or a server has it.
    pub fn find(&self, body: &[u8], settings: &Settings) -> Option<Arc<Statement>> {
        let table = self.by_meaning.lock().unwrap_or_else(PoisonError::into_inner);
        table.get(&meaning(body, settings)).and_then(Weak::upgrade)
    }
}

/// Whether servers may know a statement by this name of a client's: one that needs no quotes anywhere, and is none of ours.
fn may_be_own(name: &[u8]) -> bool {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    name.iter().all(is_plain) && !name.is_empty() && !name.starts_with(OUR_PREFIX)
}

fn replaced(text: &[u8], range: Range<usize>, new: &[u8]) -> Vec<u8> {
    let (before, behind) = (text.get(..range.start), text.get(range.end..));
    [before.unwrap_or_default(), new, behind.unwrap_or_default()].concat()
}

/// What makes two statements the same. A body says itself where it ends, and no setting holds a zero.
fn meaning(body: &[u8], settings: &Settings) -> Vec<u8> {
    let mut meaning = body.to_vec();
    for (name, value) in MEANING.iter().filter_map(|name| Some((name, settings.get(name)?))) {
        append_cstr(&mut meaning, name.as_bytes());
        append_cstr(&mut meaning, value.as_bytes());
    }
    meaning
}

/// What one client has prepared.
#[derive(Debug, Default)]
pub struct ClientStatements {
    named: HashMap<Box<[u8]>, Arc<Statement>>,
    /// Of their texts.
    bytes: usize,
    pub(super) unnamed: Unnamed,
    /// What few clients ever need; an idle one is charged for it otherwise.
    rare: Option<Box<Rare>>,
}

#[derive(Debug, Default)]
struct Rare {
    /// Names whose Parse no server has seen yet (see `exchange/postponed.rs`).
    postponed: Vec<Box<[u8]>>,
    /// What was the unnamed statement before; of a pipeline that is under way.
    replaced: VecDeque<Unnamed>,
    /// The names that were taken away last: a server may yet say that there is no such statement.
    lost: VecDeque<(Box<[u8]>, Arc<Statement>)>,
    /// Some named statement has been made by PREPARE.
    any_in_sql: bool,
}

/// Statements that a text names, and what it does to names.
pub type SqlNames = (Vec<Arc<Statement>>, Deeds);

/// The client's unnamed statement. Kept, because Parse and Sync may be followed by a Bind in a later batch, on another
/// server (lib/pq and pg8000 do so).
#[derive(Debug, Default)]
pub(super) struct Unnamed {
    /// Unique over all clients of the process; 0: there is none.
    pub(super) serial: u64,
    /// As in [`Statement::body`]; the buffer is used again and again.
    pub(super) body: Vec<u8>,
    aftermath: Aftermath,
    /// As in [`Statement::naming`].
    naming: Option<Arc<SqlNames>>,
}

/// As many requests may be on their way when a statement fails, and be told of by their names.
const LOST_MAX: usize = 8;

/// As many unnamed statements of one pipeline may be skipped, and the one before them is still known.
const REPLACED_MAX: usize = 16;

/// A buffer for unnamed statements is given back when it grew past this.
const UNNAMED_BYTES_KEPT: usize = 1024;

impl ClientStatements {
    /// How many named statements there are.
    pub fn len(&self) -> usize {
        self.named.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// Bytes of the named statements' texts.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The statement of that name.
    pub fn get(&self, name: &[u8]) -> Option<&Arc<Statement>> {
        self.named.get(name)
    }

    pub(super) fn has(&self, id: u64) -> bool {
        self.named.values().any(|statement| statement.id == id)
    }

    /// The client's name for the statement that servers call `ours`.
    pub fn name_of(&self, ours: &[u8]) -> Option<&[u8]> {
        let lost = self.rare.iter().flat_map(|rare| &rare.lost).map(|(name, statement)| (name, statement));
        self.named
            .iter()
            .chain(lost)
            .find(|(_, statement)| *statement.server_name == *ours)
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

    /// A Parse of the unnamed statement goes to the server.
    pub fn set_unnamed(
        &mut self,
        serial: u64,
        body: &[u8],
        aftermath: Aftermath,
        naming: Option<Arc<SqlNames>>,
    ) {
        self.unnamed.naming = naming;
        if self.unnamed.body.capacity() > UNNAMED_BYTES_KEPT && body.len() <= UNNAMED_BYTES_KEPT {
            self.unnamed.body = Vec::new();
        }
        self.unnamed.body.clear();
        self.unnamed.body.extend_from_slice(body);
        self.unnamed.serial = serial;
        self.unnamed.aftermath = aftermath;
    }

    /// The unnamed statement's text, a zero, its types; `None` if there is none.
    pub fn unnamed_body(&self) -> Option<&[u8]> {
        (self.unnamed.serial != 0).then_some(&*self.unnamed.body)
    }

    /// Every named statement becomes `table`'s. One that is made by PREPARE, or names such, is the client's own and stays.
    pub fn move_to(&mut self, table: &StatementTable, settings: &Settings) {
        let followed = |statement: &&mut Arc<Statement>| !statement.in_sql && statement.naming.is_none();
        for statement in self.named.values_mut().filter(followed) {
            *statement = table.intern(&statement.body, settings, || (statement.aftermath.clone(), None));
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
                self.bytes = self.bytes + own.body.len() - statement.body.len();
                *statement = own;
            }
        }
    }

    /// Every named statement.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Statement>> {
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
    }

    /// DISCARD ALL and DEALLOCATE ALL. The unnamed statement outlives both.
    pub fn forget_all(&mut self) {
        self.named.clear();
        self.bytes = 0;
        if let Some(rare) = self.rare.as_mut() {
            rare.postponed.clear();
        }
    }

    /// The name means this statement from now on.
    pub fn insert(&mut self, name: &[u8], statement: Arc<Statement>) {
        if statement.in_sql {
            self.rare().any_in_sql = true;
        }
        self.bytes += statement.body.len();
        if let Some(before) = self.named.insert(name.into(), statement) {
            self.bytes -= before.body.len();
        }
    }

    /// The name means nothing any more.
    pub fn remove(&mut self, name: &[u8]) -> Option<Arc<Statement>> {
        let removed = self.named.remove(name);
        if let Some(statement) = &removed {
            self.bytes -= statement.body.len();
            let lost = &mut self.rare().lost;
            lost.truncate(LOST_MAX - 1);
            lost.push_front((name.into(), statement.clone()));
        }
        self.take_postponed(name);
        if self.named.is_empty() {
            self.named = HashMap::new();
        }
        removed
    }
}

/// Appends the message (or the first part of it) in `bytes` with the name at `at..at + old` replaced by `new`. Nothing
/// is appended if the range is not in it.
pub fn rename(bytes: &[u8], at: usize, old: usize, new: &[u8], out: &mut Vec<u8>) {
    let (Some((header, _)), Some(before), Some(behind)) =
        (bytes.split_first_chunk::<HEADER_BYTES>(), bytes.get(HEADER_BYTES..at), bytes.get(at + old..))
    else {
        return;
    };
    let [tag, length @ ..] = *header;
    let length = u32::from_be_bytes(length) as usize - old + new.len();
    out.reserve(bytes.len() + new.len());
    out.push(tag);
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(before);
    out.extend_from_slice(new);
    out.extend_from_slice(behind);
}
