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
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

pub use super::server_statements::{Capacity, Found, ServerStatements, Tally};
use super::{
    aftermath::Aftermath,
    catalogue::Seen,
    deeds::{Deeds, OUR_PREFIX},
    parse_settings::ParseSettings,
    session_state::Settings,
    shape::{Shape, is_fixed, is_parsed_once},
    statement_table::{StatementTable, next_id},
    weight::{Share, Weight},
};
use crate::wire::frame::{HEADER_BYTES, cstr};

/// A statement's text and parameter types, and what executing it may do to a session. Shared by every client of a
/// tenant that prepared the same.
#[derive(Debug)]
pub struct Statement {
    pub(super) id: u64,
    /// What servers call it.
    pub(super) server_name: Box<[u8]>,
    /// A Parse message's body behind the name: the text, a zero, the types.
    pub(super) body: Box<[u8]>,
    /// Its share of what all have.
    pub(super) weight: Weight,
    /// Read once, when it was parsed.
    pub aftermath: Aftermath,
    /// What it calls.
    pub seen: Seen,
    /// Made by PREPARE: `body` is that text, with the server's name for it in it.
    pub(super) in_sql: bool,
    /// Where that is our name, it stands there in place of these bytes.
    pub(super) renamed: Option<(usize, Box<[u8]>)>,
    /// What its own text names in EXECUTE and the like, and does by PREPARE and DEALLOCATE.
    pub naming: Option<Arc<SqlNames>>,
    pub(super) proved: AtomicBool,
    /// Its shape is fixed when it is parsed, and looked at.
    pub(super) is_looked_at: bool,
    /// What its clients were told that it takes and gives, once a server has said so.
    pub(super) shape: OnceLock<Shape>,
    /// The settings under which its client, or the first of them, has had it parsed.
    pub(super) parsed_under: Arc<ParseSettings>,
    /// What it means depends on them.
    pub(super) is_parsed_once: bool,
    /// Whoever has those settings has it too; else it is one client's own.
    pub(super) is_shared: bool,
}

impl Statement {
    pub(super) fn new(
        body: Box<[u8]>,
        aftermath: Aftermath,
        under: &Arc<ParseSettings>,
        share: &Arc<Share>,
    ) -> Self {
        let id = next_id();
        Self {
            id,
            server_name: format!("pglobby_{id}").into_bytes().into(),
            weight: Weight::new(share, body.len()),
            body,
            aftermath,
            seen: Seen::default(),
            in_sql: false,
            renamed: None,
            naming: None,
            proved: AtomicBool::new(false),
            is_looked_at: false,
            shape: OnceLock::new(),
            parsed_under: under.clone(),
            is_parsed_once: true,
            is_shared: false,
        }
    }

    /// What makes of it what a Parse of the same text makes.
    pub(super) fn parsed(self, naming: Option<Arc<SqlNames>>) -> Self {
        let sql = cstr(&mut &*self.body).unwrap_or_default();
        let (is_looked_at, is_parsed_once) = (naming.is_none() && is_fixed(sql), is_parsed_once(sql));
        Self { naming, is_looked_at, is_parsed_once, ..self }
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
    /// Its text was too long to be kept: no other server can have it. And it is gone once the transaction is over in which it
    /// has run.
    is_unread: bool,
    has_run: bool,
    /// As in [`Statement::parsed_under`]; `None`: nobody knows.
    pub(super) parsed_under: Option<Arc<ParseSettings>>,
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
        }
        (self.unnamed.is_unread, self.unnamed.has_run) = (false, false);
        self.unnamed.body.clear();
        self.unnamed.body.extend_from_slice(body);
        self.unnamed.serial = serial;
        self.unnamed.aftermath = aftermath;
    }

    /// The unnamed statement's text, a zero, its types; `None` if there is none.
    pub fn unnamed_body(&self) -> Option<&[u8]> {
        (self.unnamed.serial != 0).then_some(&*self.unnamed.body)
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
    pub fn move_to(&mut self, table: &StatementTable, settings: &Settings) {
        let under = table.settings.of(settings);
        let followed = |statement: &&mut Arc<Statement>| !statement.in_sql && statement.naming.is_none();
        for statement in self.named.values_mut().filter(followed) {
            *statement = table.intern(&statement.body, &under, || (statement.aftermath.clone(), None));
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
