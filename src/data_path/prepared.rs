//! Prepared statements that follow a client from server to server. Pure: bytes in, bytes out.
//!
//! A client's named statement is known to servers under a name of ours, the same for every client of the tenant that
//! prepares the same text with the same parameter types. A client's own Parse always reaches the server as a real
//! Parse, so that a changed table or type, an error or a notice is what PostgreSQL itself would give; where a later Bind
//! or Describe meets a server that lacks the statement, a Parse is put in front of it, in the same write.
//!
//! What a server knows is entered when the request is queued and taken back when the server skips it; until it is
//! confirmed it counts only within the batch that asked for it.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::{
    aftermath::Aftermath,
    catalogue::Seen,
    lease::{Asked, Lease, Naming, Whose},
    session_state::Settings,
};
use crate::wire::{
    frame::HEADER_BYTES,
    message::{append, append_cstr},
    outgoing::Outgoing,
};

/// A statement's text and parameter types, and what executing it may do to a session. Shared by every client of a
/// tenant that prepared the same.
#[derive(Debug)]
pub struct Statement {
    id: u64,
    /// What servers call it.
    server_name: Box<[u8]>,
    /// A Parse message's body behind the name: the text, a zero, the types.
    body: Box<[u8]>,
    /// Read once, when it was parsed.
    pub aftermath: Aftermath,
    /// What it calls.
    pub seen: Seen,
    proved: AtomicBool,
}

impl Statement {
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
}

/// The statements of one pool, each once.
#[derive(Debug, Default)]
pub struct StatementTable {
    /// Weak: a statement lives as long as a client or a server has it.
    by_meaning: Mutex<HashMap<Vec<u8>, Weak<Statement>>>,
}

/// Of the statement that was made last. One count for the process: servers go by the number, and whoever meets on a server
/// must mean the same by it.
static LAST_ID: AtomicU64 = AtomicU64::new(0);

/// With other values of these the same bytes are another statement: `SELECT * FROM t` finds another table, and a server
/// that had both as one would say "cached plan must not change result type" (0A000) to one of the clients.
const MEANING: [&str; 4] = ["client_encoding", "role", "search_path", "standard_conforming_strings"];

impl StatementTable {
    /// The statement with this Parse body in a session with these settings; `aftermath` is called where it is new.
    pub fn intern(
        &self,
        body: &[u8],
        settings: &Settings,
        aftermath: impl FnOnce() -> Aftermath,
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
        let statement = Arc::new(Statement {
            id,
            server_name: format!("pglobby_{id}").into_bytes().into(),
            body: body.into(),
            aftermath: aftermath(),
            seen: Seen::default(),
            proved: AtomicBool::new(false),
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
    /// Names whose Parse no server has seen yet (see `exchange/postponed.rs`).
    postponed: Vec<Box<[u8]>>,
    unnamed: Unnamed,
}

/// The client's unnamed statement. Kept, because Parse and Sync may be followed by a Bind in a later batch, on another
/// server (lib/pq and pg8000 do so).
#[derive(Debug, Default)]
struct Unnamed {
    /// Unique over all clients of the process; 0: there is none.
    serial: u64,
    /// As in [`Statement::body`]; the buffer is used again and again.
    body: Vec<u8>,
    aftermath: Aftermath,
}

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

    /// The statement of that name.
    pub fn get(&self, name: &[u8]) -> Option<&Arc<Statement>> {
        self.named.get(name)
    }

    /// The Parse of that name is yet to reach a server.
    pub fn postpone(&mut self, name: &[u8]) {
        self.postponed.push(name.into());
    }

    /// Whether the Parse of that name must reach a server before the name is used; `true` once.
    #[inline]
    pub fn take_postponed(&mut self, name: &[u8]) -> bool {
        !self.postponed.is_empty() && self.is_postponed(name)
    }

    #[cold]
    fn is_postponed(&mut self, name: &[u8]) -> bool {
        let found = self.postponed.iter().position(|postponed| **postponed == *name);
        found.map(|at| self.postponed.swap_remove(at)).is_some()
    }

    /// A Parse of the unnamed statement goes to the server.
    pub fn set_unnamed(&mut self, serial: u64, body: &[u8], aftermath: Aftermath) {
        if self.unnamed.body.capacity() > UNNAMED_BYTES_KEPT && body.len() <= UNNAMED_BYTES_KEPT {
            self.unnamed.body = Vec::new();
        }
        self.unnamed.body.clear();
        self.unnamed.body.extend_from_slice(body);
        self.unnamed.serial = serial;
        self.unnamed.aftermath = aftermath;
    }

    /// What executing the unnamed statement may do.
    pub fn unnamed_aftermath(&self) -> &Aftermath {
        &self.unnamed.aftermath
    }

    /// The unnamed statement's text, a zero, its types.
    pub fn unnamed_body(&self) -> &[u8] {
        &self.unnamed.body
    }

    /// The unnamed statement is gone: a simple query, a Close or a failed Parse.
    pub fn forget_unnamed(&mut self) {
        self.unnamed.serial = 0;
    }

    /// DISCARD ALL and DEALLOCATE ALL. The unnamed statement outlives both.
    pub fn forget_all(&mut self) {
        self.named.clear();
        self.postponed.clear();
    }

    /// The name means this statement from now on.
    pub fn insert(&mut self, name: &[u8], statement: Arc<Statement>) {
        self.named.insert(name.into(), statement);
    }

    /// The name means nothing any more.
    pub fn remove(&mut self, name: &[u8]) -> Option<Arc<Statement>> {
        let removed = self.named.remove(name);
        self.take_postponed(name);
        if self.named.is_empty() {
            self.named = HashMap::new();
        }
        removed
    }
}

/// What one server has prepared.
#[derive(Debug)]
pub struct ServerStatements {
    known: HashMap<u64, Known>,
    /// Whose unnamed statement it has, by [`Unnamed::serial`]; 0: none; `u64::MAX`, which is no client's: who knows.
    unnamed: u64,
    /// `max_prepared_statements`.
    capacity: usize,
    /// Counts uses, to find the least recent.
    clock: u64,
    /// What has been done since it was last taken down.
    pub tally: Tally,
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
    statement: Arc<Statement>,
    certainty: Certainty,
    used: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Certainty {
    /// ParseComplete came.
    Confirmed,
    /// Asked for in that batch; if it fails, later requests of the batch are skipped as well.
    Within(u32),
}

impl ServerStatements {
    /// A server that has just been opened.
    pub fn new(capacity: usize) -> Self {
        Self {
            known: HashMap::new(),
            unnamed: 0,
            capacity: capacity.max(1),
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
    }

    /// The server may have an unnamed statement that is no client's, or not the one it was given last.
    pub fn doubt_unnamed(&mut self) {
        self.unnamed = u64::MAX;
    }

    /// The server's unnamed statement is gone, or is the one with this serial.
    pub fn set_unnamed(&mut self, serial: u64) {
        self.unnamed = serial;
    }

    /// Makes the next Parse of `statement` a real one: what the server has of that name is closed first.
    pub fn make_room_for(&mut self, statement: &Arc<Statement>, lease: &mut Lease, out: &mut Vec<u8>) {
        if self.known.remove(&statement.id).is_some() {
            close(statement, lease, out);
        }
        while self.known.len() >= self.capacity {
            let Some(oldest) = self.known.iter().min_by_key(|(_, known)| known.used).map(|(id, _)| *id)
            else {
                return;
            };
            if let Some(known) = self.known.remove(&oldest) {
                close(&known.statement, lease, out);
            }
        }
    }

    /// A Parse of `statement` is queued.
    pub fn queued(&mut self, statement: &Arc<Statement>, batch: u32) {
        self.tally.server_parses += 1;
        self.clock += 1;
        let known =
            Known { statement: statement.clone(), certainty: Certainty::Within(batch), used: self.clock };
        self.known.insert(statement.id, known);
    }

    /// ParseComplete.
    pub fn confirmed(&mut self, statement: &Statement) {
        if let Some(known) = self.known.get_mut(&statement.id) {
            known.certainty = Certainty::Confirmed;
        }
        statement.proved.store(true, Ordering::Relaxed);
    }

    /// A queued Parse failed or was skipped, or a DEALLOCATE succeeded.
    pub fn unqueued(&mut self, statement: &Statement) {
        self.known.remove(&statement.id);
    }

    /// A queued Close was skipped: the server still has the statement.
    pub fn not_closed(&mut self, statement: &Arc<Statement>) {
        let known = Known { statement: statement.clone(), certainty: Certainty::Confirmed, used: 0 };
        self.known.insert(statement.id, known);
    }

    /// Puts in what is missing so that the server knows `statement`.
    #[inline]
    pub fn ensure(&mut self, statement: &Arc<Statement>, lease: &mut Lease, out: &mut Outgoing<'_>) {
        self.clock += 1;
        if let Some(known) = self.known.get_mut(&statement.id) {
            known.used = self.clock;
            if known.certainty == Certainty::Confirmed || known.certainty == Certainty::Within(lease.batch())
            {
                return;
            }
        }
        self.prepare(statement, Whose::Follow, lease, out.build());
    }

    /// The same in front of a simple query, in a batch of its own: a Parse that failed without a Sync behind it would make
    /// the server skip the query and wait for ever. If it fails, the query's EXECUTE says so.
    #[cold]
    pub fn ensure_for_query(
        &mut self,
        statement: &Arc<Statement>,
        lease: &mut Lease,
        out: &mut Outgoing<'_>,
    ) {
        let known = self.known.get(&statement.id);
        if known.is_none_or(|known| known.certainty != Certainty::Confirmed)
            && self.prepare(statement, Whose::Attempt, lease, out.build())
        {
            let _ = lease.ask(Asked::Sync, Whose::Ours);
            append(out.build(), b'S', |_| {});
        }
    }

    /// Prepares `statement` anew, whether the server knows it or not.
    #[cold]
    pub fn prepare(
        &mut self,
        statement: &Arc<Statement>,
        whose: Whose,
        lease: &mut Lease,
        out: &mut Vec<u8>,
    ) -> bool {
        self.make_room_for(statement, lease, out);
        let naming = Naming { client_name: None, statement: statement.clone() };
        let goes = lease.ask(Asked::Parse(Some(Box::new(naming))), whose);
        if goes {
            self.queued(statement, lease.batch());
            parse(&statement.server_name, &statement.body, out);
        }
        goes
    }

    /// Makes the server's unnamed statement the client's own: nobody may ever bind another client's.
    #[inline]
    pub fn ensure_unnamed(&mut self, client: &ClientStatements, lease: &mut Lease, out: &mut Outgoing<'_>) {
        if self.unnamed == client.unnamed.serial {
            return;
        }
        let asked = if client.unnamed.serial == 0 { Asked::Close(None) } else { Asked::Parse(None) };
        if lease.ask(asked, Whose::Follow) {
            self.unnamed = client.unnamed.serial;
            match self.unnamed {
                0 => append(out.build(), b'C', |out| out.extend_from_slice(b"S\0")),
                _ => parse(b"", &client.unnamed.body, out.build()),
            }
        }
    }
}

fn parse(name: &[u8], body: &[u8], out: &mut Vec<u8>) {
    append(out, b'P', |out| {
        append_cstr(out, name);
        out.extend_from_slice(body);
    });
}

fn close(statement: &Arc<Statement>, lease: &mut Lease, out: &mut Vec<u8>) {
    let naming = Naming { client_name: None, statement: statement.clone() };
    if lease.ask(Asked::Close(Some(Box::new(naming))), Whose::Follow) {
        append(out, b'C', |out| {
            out.push(b'S');
            append_cstr(out, &statement.server_name);
        });
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
