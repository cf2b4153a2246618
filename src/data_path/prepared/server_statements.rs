//! What one server has prepared. Pure: bytes in, bytes out.
//!
//! What a server knows is entered when the request is queued and taken back when the server skips it; until it is
//! confirmed it counts only within the batch that asked for it.

use std::sync::{Arc, atomic::Ordering};

use rustc_hash::FxHashMap;

use super::{
    ClientStatements, Statement,
    parse_settings::Here,
    row_description::is_parsed_once,
    sql_prepare_effects::{Deed, Deeds},
};
use crate::{
    data_path::exchange::pending_replies::{Asked, Lease, Naming, Whose},
    wire::{
        frame::cstr,
        message::{append, append_cstr, bind, close_statement, execute},
        outgoing::Outgoing,
    },
};

/// What one server has prepared.
#[derive(Debug)]
pub struct ServerStatements {
    /// By our own number: nobody can choose it so that others are slow.
    pub(in crate::data_path) known: FxHashMap<u64, Known>,
    /// Whose unnamed statement it has, by [`Unnamed::serial`]; 0: none; `u64::MAX`, which is no client's: who knows.
    unnamed: u64,
    /// Of their texts.
    bytes: usize,
    /// How many have a client's own name.
    pub(in crate::data_path) own_names: usize,
    pub(in crate::data_path) capacity: Capacity,
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
pub(in crate::data_path) struct Known {
    pub statement: Arc<Statement>,
    pub certainty: Certainty,
    used: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::data_path) enum Certainty {
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

    /// Makes the next Parse of `statement` a real one: what the server has of that name is closed first.
    pub fn make_room_for(&mut self, statement: &Arc<Statement>, lease: &mut Lease, out: &mut Vec<u8>) {
        self.close(statement.id, lease, out);
        self.make_room([statement], lease, out);
    }

    /// Closes what has not been used for longest, so that with those to come there are not too many.
    pub fn make_room<'s>(
        &mut self,
        more: impl IntoIterator<Item = &'s Arc<Statement>>,
        lease: &mut Lease,
        out: &mut Vec<u8>,
    ) {
        let (mut count, mut bytes) = (0, 0);
        for statement in more {
            (count, bytes) = (count + 1, bytes + statement.body().len());
            self.free_name_of(statement, lease, out);
        }
        let Capacity { statements: count_max, bytes: bytes_max } = self.capacity;
        while !self.known.is_empty()
            && (self.known.len() + count > count_max || self.bytes + bytes > bytes_max)
        {
            let oldest = self.known.iter().min_by_key(|(_, known)| known.used).map(|(id, _)| *id);
            if !oldest.is_some_and(|id| self.close(id, lease, out)) {
                return;
            }
        }
    }

    /// One that its client had by this name before, and that may or may not be there.
    fn free_name_of(&mut self, statement: &Statement, lease: &mut Lease, out: &mut Vec<u8>) {
        if self.own_names == 0 || !statement.has_own_name() {
            return;
        }
        let mut known = self.known.values().map(|known| &known.statement);
        let before =
            known.find(|known| known.server_name() == statement.server_name() && !known.is(statement));
        if let Some(id) = before.map(|before| before.id) {
            self.close(id, lease, out);
        }
    }

    /// Takes a statement from the server; `false` if it has none of that number, or skips to a Sync and keeps it.
    pub(in crate::data_path) fn close(&mut self, id: u64, lease: &mut Lease, out: &mut Vec<u8>) -> bool {
        let Some(known) = self.known.get(&id) else { return false };
        let statement = known.statement.clone();
        let goes = ask_close(&statement, lease, out);
        if goes {
            self.remove(&statement);
        }
        goes
    }

    fn insert(&mut self, statement: &Arc<Statement>, certainty: Certainty, used: u64) {
        self.bytes += statement.body().len();
        self.own_names += usize::from(statement.has_own_name());
        let known = Known { statement: statement.clone(), certainty, used };
        let before = self.known.insert(statement.id, known);
        self.without(before);
    }

    pub(in crate::data_path) fn remove(&mut self, statement: &Statement) {
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
    pub fn find(&mut self, statement: &Statement, lease: &Lease) -> Found {
        self.clock += 1;
        let Some(known) = self.known.get_mut(&statement.id) else { return Found::Missing };
        known.used = self.clock;
        match known.certainty {
            Certainty::Confirmed | Certainty::Expected => Found::Known,
            Certainty::Within(batch) if batch == lease.batch() => Found::Asked,
            Certainty::Within(_) | Certainty::Doubtful => Found::Missing,
        }
    }

    /// Puts in what is missing so that the server knows `statement`.
    pub fn ensure(
        &mut self,
        statement: &Arc<Statement>,
        here: Here<'_>,
        lease: &mut Lease,
        out: &mut Outgoing<'_>,
    ) {
        if self.find(statement, lease) == Found::Missing {
            self.prepare(statement, here, Whose::Follow, lease, out.build());
        }
    }

    /// The same in front of a simple query, in a batch of its own: a Parse that failed without a Sync behind it would make
    /// the server skip the query and wait for ever. If it fails, the query's EXECUTE says so.
    #[cold]
    pub fn ensure_for_query(
        &mut self,
        statement: &Arc<Statement>,
        here: Here<'_>,
        lease: &mut Lease,
        out: &mut Outgoing<'_>,
    ) {
        let known = self.known.get(&statement.id);
        if known.is_none_or(|known| known.certainty != Certainty::Confirmed)
            && self.prepare(statement, here, Whose::Attempt, lease, out.build())
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
        here: Here<'_>,
        whose: Whose,
        lease: &mut Lease,
        out: &mut Vec<u8>,
    ) -> bool {
        self.prepare_as(statement, None, here, whose, lease, out)
    }

    /// The same; `client_name`: the client has prepared it by that name just now, and takes the shape that it has.
    #[cold]
    pub fn prepare_as(
        &mut self,
        statement: &Arc<Statement>,
        client_name: Option<&[u8]>,
        here: Here<'_>,
        whose: Whose,
        lease: &mut Lease,
        out: &mut Vec<u8>,
    ) -> bool {
        self.make_room_for(statement, lease, out);
        here.parse_under(
            &statement.parsed_under,
            statement.is_parsed_once,
            whose,
            lease,
            out,
            |lease, out| {
                if statement.in_sql {
                    return self.prepare_in_sql(statement, whose, lease, out);
                }
                let naming = Naming { client_name: None, statement: statement.clone() };
                let goes = lease.ask(Asked::Parse(Some(Box::new(naming))), whose);
                if goes {
                    self.queued(statement, lease.batch());
                    parse(statement.server_name(), statement.body(), out);
                    Self::ask_shape(statement, client_name, whose, lease, out);
                }
                goes
            },
        )
    }

    /// Behind a Parse: what shape has the statement now?
    pub fn ask_shape(
        statement: &Arc<Statement>,
        client_name: Option<&[u8]>,
        whose: Whose,
        lease: &mut Lease,
        out: &mut Vec<u8>,
    ) {
        let naming = Naming { client_name: client_name.map(Into::into), statement: statement.clone() };
        if statement.is_looked_at && lease.ask(Asked::Shape(Box::new(naming)), whose) {
            append(out, b'D', |out| {
                out.push(b'S');
                append_cstr(out, statement.server_name());
            });
        }
    }

    /// Runs the PREPARE that made it. That takes the server's unnamed statement.
    #[cold]
    fn prepare_in_sql(
        &mut self,
        statement: &Arc<Statement>,
        whose: Whose,
        lease: &mut Lease,
        out: &mut Vec<u8>,
    ) -> bool {
        let naming = Naming { client_name: None, statement: statement.clone() };
        let deeds = Deeds { list: [Deed::Prepares(naming)].into(), ..Deeds::default() };
        let goes = lease.ask(Asked::Parse(None), whose);
        if goes {
            self.doubt_unnamed();
            let _ = lease.ask(Asked::Bind, whose);
            let _ = lease.ask(Asked::Execute(Some(Box::new(deeds))), whose);
            self.queued(statement, lease.batch());
            parse(b"", statement.body(), out);
            bind(b"", &[], out);
            execute(out);
        }
        goes
    }

    /// Makes the server's unnamed statement the client's own, where it is not: nobody may ever bind another client's.
    #[cold]
    pub fn bring_unnamed(
        &mut self,
        client: &ClientStatements,
        here: Here<'_>,
        lease: &mut Lease,
        out: &mut Vec<u8>,
    ) {
        let unnamed = &client.unnamed;
        if unnamed.serial == 0 || client.is_unnamed_unread() {
            if lease.ask(Asked::CloseUnnamed, Whose::Follow) {
                self.unnamed = 0;
                append(out, b'C', |out| out.extend_from_slice(b"S\0"));
            }
            return;
        }
        let mut parses = |lease: &mut Lease, out: &mut Vec<u8>| {
            let goes = lease.ask(Asked::Parse(None), Whose::Follow);
            if goes {
                self.unnamed = unnamed.serial;
                parse(b"", &unnamed.body, out);
            }
            goes
        };
        let sql = cstr(&mut &*unnamed.body).unwrap_or_default();
        match &unnamed.parsed_under {
            Some(under) => here.parse_under(under, is_parsed_once(sql), Whose::Follow, lease, out, parses),
            None => parses(lease, out),
        };
    }
}

/// A Close goes to the server, if it is not skipped there.
fn ask_close(statement: &Arc<Statement>, lease: &mut Lease, out: &mut Vec<u8>) -> bool {
    let naming = Naming { client_name: None, statement: statement.clone() };
    let goes = lease.ask(Asked::Close(Some(Box::new(naming))), Whose::Follow);
    if goes {
        close_statement(statement.server_name(), out);
    }
    goes
}

fn parse(name: &[u8], body: &[u8], out: &mut Vec<u8>) {
    append(out, b'P', |out| {
        append_cstr(out, name);
        out.extend_from_slice(body);
    });
}
