//! A server that keeps to PostgreSQL's protocol. It does not run a text: the fuzzer chooses among the outcomes that the
//! text may have.
//!
//! Source: `src/backend/tcop/postgres.c`, `src/backend/commands/copyfromparse.c`; PostgreSQL documentation, "Message
//! Flow".

use std::collections::{HashMap, VecDeque};

use crate::{
    data_path::{
        session_state::channels::messages,
        sql::{Discard, Kind, Lexing, Statement, statements},
    },
    wire::{
        frame::{HEADER_BYTES, cstr},
        message::{append, append_cstr, parameter_status, ready_for_query},
    },
};

/// One connection of PostgreSQL.
#[derive(Debug, Default)]
pub(super) struct Postgres {
    /// The received part of a message.
    half: Vec<u8>,
    /// Received messages that are not answered yet.
    queue: VecDeque<Vec<u8>>,
    statements: HashMap<Vec<u8>, Vec<u8>>,
    portals: HashMap<Vec<u8>, Vec<u8>>,
    /// An error has occurred in a batch: everything is skipped up to its Sync.
    pub skips: bool,
    /// COPY takes data; `true`: a simple query started it.
    pub copies: Option<bool>,
    /// A transaction block is open; `true`: it has failed.
    block: Option<bool>,
    /// A batch has begun and has had no Sync.
    pub in_batch: bool,
    /// It has closed the connection.
    pub closed: bool,
}

/// What the text of a statement makes the server do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Fails,
    Rows,
    Empty,
    CopyIn,
    CopyOut,
}

impl Postgres {
    /// Takes bytes, which are answered later.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.half.extend_from_slice(bytes);
        let received = std::mem::take(&mut self.half);
        let mut used = 0;
        for message in messages(&received) {
            self.queue.push_back(message.to_vec());
            used += message.len();
        }
        self.half = received[used..].to_vec();
    }

    /// Whether a message has arrived in part.
    pub fn has_half(&self) -> bool {
        !self.half.is_empty()
    }

    /// Whether all whole messages are answered.
    pub fn is_done(&self) -> bool {
        self.queue.is_empty()
    }

    /// Whether it waits for a new transaction. Outside of a COPY it ignores what may be left.
    pub fn is_idle(&self) -> bool {
        let is_done = self.queue.iter().all(|message| matches!(message[0], b'd' | b'c' | b'f' | b'H'));
        is_done
            && !self.has_half()
            && !self.skips
            && self.copies.is_none()
            && !self.in_batch
            && self.block.is_none()
    }

    /// Answers the next message. `choice` selects the outcome; 0 is success.
    pub fn answer(&mut self, choice: u8, out: &mut Vec<u8>) {
        let Some(message) = self.queue.pop_front() else { return };
        let (tag, mut body) = (message[0], &message[HEADER_BYTES..]);
        // What is ignored may arrive when the client has no server any more.
        if choice & 0x40 != 0 && !matches!(tag, b'd' | b'c' | b'f' | b'H') {
            parameter_status(out, b"application_name", &[b'a' + (choice & 7)]);
        }
        if let Some(of_query) = self.copies {
            return self.copy(of_query, tag, choice, out);
        }
        if tag == b'S' {
            (self.skips, self.in_batch) = (false, false);
            if self.block.is_none() {
                self.portals.clear();
            }
            return self.ready(out);
        }
        if self.skips {
            return;
        }
        if matches!(tag, b'P' | b'B' | b'D' | b'E' | b'C') {
            self.in_batch = true;
        }
        let done = match tag {
            b'P' => self.parse(body, choice, out),
            b'B' => self.bind(body, choice, out),
            b'D' => self.describe(body, choice, out),
            b'C' => self.close_named(body, out),
            b'E' => {
                let portal = cstr(&mut body).unwrap_or_default();
                let row_limit = body.iter().any(|byte| *byte != 0);
                match self.portals.get(portal).cloned() {
                    Some(sql) => self.execute(&sql, row_limit, choice, out),
                    None => false,
                }
            }
            b'Q' => return self.query(cstr(&mut body).unwrap_or_default(), choice, out),
            b'F' => {
                self.in_batch = false;
                match choice & 3 {
                    3 => self.error(out),
                    _ => append(out, b'V', |out| out.extend_from_slice(&[0xff; 4])),
                }
                return self.ready(out);
            }
            b'H' | b'd' | b'c' | b'f' => true,
            _ => return self.close(out),
        };
        if !done {
            self.error(out);
            self.skips = true;
        }
    }

    fn parse(&mut self, mut body: &[u8], choice: u8, out: &mut Vec<u8>) -> bool {
        let (name, sql) = (cstr(&mut body).unwrap_or_default(), cstr(&mut body).unwrap_or_default());
        let taken = !name.is_empty() && self.statements.contains_key(name);
        if name.is_empty() {
            self.statements.remove(name);
        }
        let parses = !taken && outcome(sql, choice & 0x2f) != Outcome::Fails;
        if parses {
            self.statements.insert(name.to_vec(), sql.to_vec());
            append(out, b'1', |_| {});
        }
        parses
    }

    fn bind(&mut self, mut body: &[u8], choice: u8, out: &mut Vec<u8>) -> bool {
        let (portal, name) = (cstr(&mut body).unwrap_or_default(), cstr(&mut body).unwrap_or_default());
        let sql = self.statements.get(name).filter(|sql| outcome(sql, choice & 0x2f) != Outcome::Fails);
        if let Some(sql) = sql {
            self.portals.insert(portal.to_vec(), sql.clone());
            append(out, b'2', |_| {});
        }
        sql.is_some()
    }

    fn close_named(&mut self, body: &[u8], out: &mut Vec<u8>) -> bool {
        if let Some((kind, mut name)) = body.split_first() {
            let name = cstr(&mut name).unwrap_or_default();
            match kind {
                b'P' => drop(self.portals.remove(name)),
                _ => drop(self.statements.remove(name)),
            }
        }
        append(out, b'3', |_| {});
        true
    }

    fn describe(&self, body: &[u8], choice: u8, out: &mut Vec<u8>) -> bool {
        let Some((kind, mut name)) = body.split_first() else { return false };
        let name = cstr(&mut name).unwrap_or_default();
        let of_statement = *kind == b'S';
        let found = if of_statement { self.statements.get(name) } else { self.portals.get(name) };
        if found.is_none() {
            return false;
        }
        if of_statement {
            append(out, b't', |out| out.extend_from_slice(&[0, 0]));
        }
        match choice & 7 {
            7 => append(out, b'n', |_| {}),
            column => append(out, b'T', |out| {
                out.extend_from_slice(&[0, 1, b'a' + column, 0]);
                out.extend_from_slice(&[0; 18]);
            }),
        }
        true
    }

    /// A simple query.
    fn query(&mut self, sql: &[u8], choice: u8, out: &mut Vec<u8>) {
        self.in_batch = false;
        self.statements.remove(&b""[..]);
        self.portals.remove(&b""[..]);
        match outcome(sql, choice & 0x2f) {
            Outcome::Fails => self.error(out),
            Outcome::Empty => append(out, b'I', |_| {}),
            Outcome::CopyIn => {
                self.copies = Some(true);
                return append(out, b'G', |out| out.extend_from_slice(&[0; 3]));
            }
            Outcome::CopyOut => copy_out(choice, out),
            Outcome::Rows => {
                let fails_after = if choice & 8 != 0 { choice & 3 } else { u8::MAX };
                for (statement, number) in statements(sql, Lexing::default()).zip(0..) {
                    let fails = number == fails_after || !self.runs(&statement);
                    if fails {
                        self.error(out);
                        break;
                    }
                    if matches!(statement.kind, Kind::Query) {
                        append(out, b'T', |out| out.extend_from_slice(&[0, 0]));
                        append(out, b'D', |out| out.extend_from_slice(&[0, 1, 0, 0, 0, 1, b't']));
                    }
                    self.complete(&statement.kind, out);
                }
            }
        }
        self.ready(out);
    }

    fn execute(&mut self, sql: &[u8], row_limit: bool, choice: u8, out: &mut Vec<u8>) -> bool {
        match outcome(sql, choice & 0x2f) {
            Outcome::Fails => return false,
            Outcome::Empty => append(out, b'I', |_| {}),
            Outcome::CopyIn => {
                self.copies = Some(false);
                append(out, b'G', |out| out.extend_from_slice(&[0; 3]));
            }
            Outcome::CopyOut => copy_out(choice, out),
            Outcome::Rows => {
                let Some(statement) = statements(sql, Lexing::default()).next() else { return false };
                if !self.runs(&statement) {
                    return false;
                }
                for _ in 0..choice & 1 {
                    append(out, b'D', |out| out.extend_from_slice(b"\0\x02\0\0\0\x01a\0\0\0\x01b"));
                }
                match row_limit && choice & 2 != 0 {
                    true => append(out, b's', |_| {}),
                    false => self.complete(&statement.kind, out),
                }
            }
        }
        true
    }

    /// PREPARE, EXECUTE and DEALLOCATE. `false`: the statement exists, or does not.
    fn runs(&mut self, statement: &Statement<'_>) -> bool {
        let Some(name) = &statement.prepared else { return true };
        let exists = self.statements.contains_key(&*name.value);
        match &statement.kind {
            Kind::Prepare { body, .. } => {
                let text = statement.text.get(body.clone()).unwrap_or_default();
                !exists && self.statements.insert(name.value.to_vec(), text.to_vec()).is_none()
            }
            Kind::Deallocate => self.statements.remove(&*name.value).is_some(),
            _ => exists,
        }
    }

    fn complete(&mut self, kind: &Kind<'_>, out: &mut Vec<u8>) {
        let tag: &[u8] = match kind {
            Kind::Begin(_) => b"BEGIN",
            Kind::Commit { .. } => b"COMMIT",
            Kind::Rollback { .. } => b"ROLLBACK",
            Kind::Prepare { .. } => b"PREPARE",
            Kind::Deallocate => b"DEALLOCATE",
            Kind::DeallocateAll => b"DEALLOCATE ALL",
            Kind::Discard(Discard::All) => b"DISCARD ALL",
            Kind::Discard(Discard::Sequences) => b"DISCARD SEQUENCES",
            Kind::Set { .. } => b"SET",
            Kind::Listen(_) => b"LISTEN",
            _ => b"SELECT 1",
        };
        match kind {
            Kind::Begin(_) => self.block = Some(self.block.unwrap_or(false)),
            Kind::Commit { chain: false } | Kind::Rollback { chain: false } => self.block = None,
            Kind::DeallocateAll | Kind::Discard(Discard::All) => self.statements.clear(),
            _ => {}
        }
        append(out, b'C', |out| append_cstr(out, tag));
    }

    /// A message while COPY takes data.
    fn copy(&mut self, of_query: bool, tag: u8, choice: u8, out: &mut Vec<u8>) {
        let fails = match tag {
            b'd' => choice & 15 == 15,
            b'f' => true,
            b'c' => {
                append(out, b'C', |out| append_cstr(out, b"COPY 1"));
                false
            }
            b'S' | b'H' => return,
            _ => return self.close(out),
        };
        if tag == b'd' && !fails {
            return;
        }
        self.copies = None;
        // PostgreSQL answers a Sync within COPY data only if the data has failed before it. The proxy does not keep
        // the order of the two, and ends such a session: no driver sends a Sync there.
        let ends_first = self.queue.iter().find(|message| matches!(message[0], b'S' | b'c' | b'f'));
        if fails && tag == b'd' && ends_first.is_some_and(|message| message[0] == b'S') {
            return self.close(out);
        }
        if fails {
            self.error(out);
        }
        if of_query {
            self.ready(out);
        } else {
            self.skips = fails;
        }
    }

    fn ready(&self, out: &mut Vec<u8>) {
        ready_for_query(out, self.block.map_or(b'I', |failed| if failed { b'E' } else { b'T' }));
    }

    fn error(&mut self, out: &mut Vec<u8>) {
        self.block = self.block.map(|_| true);
        append(out, b'E', |out| out.extend_from_slice(b"SERROR\0VERROR\0C22000\0Mno\0\0"));
    }

    /// The client broke the protocol.
    fn close(&mut self, out: &mut Vec<u8>) {
        self.closed = true;
        append(out, b'E', |out| out.extend_from_slice(b"SFATAL\0VFATAL\0C08P01\0Mno\0\0"));
    }
}

/// What a text does. The proxy's own texts do not fail.
fn outcome(sql: &[u8], choice: u8) -> Outcome {
    let has = |word: &[u8]| sql.windows(word.len()).any(|window| window.eq_ignore_ascii_case(word));
    let of_proxy = has(b"pg_catalog.") || has(b"reset role");
    if sql == b"pglobby.tenant" || !of_proxy && choice & 0x27 == 0x27 {
        return Outcome::Fails;
    }
    if statements(sql, Lexing::default()).next().is_none() {
        return Outcome::Empty;
    }
    match () {
        () if has(b"copy") && has(b"stdin") => Outcome::CopyIn,
        () if has(b"copy") && has(b"stdout") => Outcome::CopyOut,
        () => Outcome::Rows,
    }
}

fn copy_out(choice: u8, out: &mut Vec<u8>) {
    append(out, b'H', |out| out.extend_from_slice(&[0; 3]));
    for _ in 0..choice & 1 {
        append(out, b'd', |out| out.push(b'x'));
    }
    append(out, b'c', |_| {});
    append(out, b'C', |out| append_cstr(out, b"COPY 1"));
}
