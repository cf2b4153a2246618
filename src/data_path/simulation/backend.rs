//! A model of one PostgreSQL session: settings, transactions, prepared statements, portals, temporary tables,
//! advisory locks, COPY. No I/O and no time: one frame in, its replies out.
//!
//! It runs twice: behind the proxy as a server, shared by many clients, and as the oracle of each client, which
//! has it alone. What a client gets through the proxy must be what its oracle says.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    expressions::{self, Value},
    frames,
    statements::columns,
};
use crate::wire::{
    frame::cstr,
    message::{Severity, append, append_cstr, error_response, parameter_status, ready_for_query},
    message_reader::Message,
};

/// Parameters that a server reports, and their values for a new session.
const REPORTED: [(&str, &str); 9] = [
    ("application_name", ""),
    ("client_encoding", "UTF8"),
    ("DateStyle", "ISO, MDY"),
    ("integer_datetimes", "on"),
    ("is_superuser", "off"),
    ("server_encoding", "UTF8"),
    ("server_version", "17.2"),
    ("standard_conforming_strings", "on"),
    ("TimeZone", "UTC"),
];

/// An error of a statement.
#[derive(Debug, Clone)]
pub struct Failure {
    sqlstate: &'static str,
    message: String,
}

impl Failure {
    pub fn new(sqlstate: &'static str, message: &str) -> Self {
        Self { sqlstate, message: message.to_owned() }
    }

    pub fn cancelled() -> Self {
        Self::new("57014", "canceling statement due to user request")
    }

    fn aborted() -> Self {
        Self::new("25P02", "current transaction is aborted, commands ignored until end of transaction block")
    }

    /// A text that the model does not know.
    pub fn unknown(what: &str) -> Self {
        Self::new("XXSIM", &format!("the model does not know {what}"))
    }

    pub fn is_unknown(&self) -> bool {
        self.sqlstate == "XXSIM"
    }
}

#[derive(Debug, Clone)]
pub struct Statement {
    pub sql: String,
    pub from_sql: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Portal {
    sql: String,
    parameters: Vec<Value>,
    /// It was executed: it has no more rows, and without rows it cannot be executed again.
    has_run: bool,
}

/// What a rollback restores.
#[derive(Debug, Clone, Default)]
pub(super) struct Rolled {
    /// Set for the session.
    pub set: BTreeMap<String, String>,
    pub temporary: BTreeSet<String>,
}

#[derive(Debug, Clone)]
pub(super) struct Transaction {
    pub before: Rolled,
    /// Began with BEGIN; else it ends with the batch.
    pub is_block: bool,
}

/// One session.
#[derive(Debug, Clone, Default)]
pub struct Session {
    startup: BTreeMap<String, String>,
    pub(super) now: Rolled,
    /// SET LOCAL.
    pub(super) local: BTreeMap<String, String>,
    /// Custom parameters that have ever been set: they read as `''`.
    custom: BTreeSet<String>,
    pub(super) transaction: Option<Transaction>,
    pub(super) failed: bool,
    skipping: bool,
    pub(super) copying: bool,
    /// The COPY is part of a batch that a Sync ends.
    copy_in_batch: bool,
    pub(super) copied: usize,
    pub statements: BTreeMap<String, Statement>,
    pub(super) portals: BTreeMap<String, Portal>,
    pub locks: BTreeSet<String>,
    /// The channels that it listens to.
    pub listening: BTreeSet<String>,
    /// LISTEN and UNLISTEN of the transaction; `None`: all channels.
    pub(super) listens: Vec<(bool, Option<String>)>,
    /// Channels and payloads of its NOTIFYs.
    pub notifies: Vec<(String, String)>,
    /// The same, of transactions that have committed.
    pub notified: Vec<(String, String)>,
    reported: BTreeMap<String, String>,
    /// What the proxy has replaced while a statement is parsed.
    pub kept: Vec<(String, String)>,
    pub(super) out: Vec<u8>,
    /// The text of a query that the model does not know.
    pub unknown: Option<String>,
}

impl Session {
    /// A new session; returns what the server sends before its cancel key.
    pub fn start(startup: BTreeMap<String, String>) -> (Self, Vec<u8>) {
        let mut session = Self { startup, ..Self::default() };
        let mut out = Vec::new();
        for (name, _) in REPORTED {
            let value = session.value(name).unwrap_or_default();
            parameter_status(&mut out, name.as_bytes(), value.as_bytes());
            session.reported.insert(name.to_owned(), value);
        }
        (session, out)
    }

    /// A startup parameter.
    pub fn startup(&self, name: &str) -> Value {
        self.startup.get(name).cloned()
    }

    /// The settings of the session.
    pub fn settings(&self) -> impl Iterator<Item = (&str, &str)> {
        self.now.set.iter().map(|(name, value)| (&**name, &**value))
    }

    /// What the session or its transaction has set, without custom parameters.
    pub fn all_set(&self) -> impl Iterator<Item = (&str, &str)> {
        let session = self.now.set.iter().filter(|(name, _)| !self.local.contains_key(*name));
        let all = session.chain(&self.local).filter(|(name, _)| !name.contains('.'));
        all.map(|(name, value)| (&**name, &**value))
    }

    /// Whether the session or its transaction has set it.
    pub fn has_set(&self, name: &str) -> bool {
        self.local.contains_key(name) || self.now.set.contains_key(name)
    }

    pub fn has_no_temporary_table(&self) -> bool {
        self.now.temporary.is_empty()
    }

    /// What is left that another session would find. Statements of PREPARE may be left: they are closed when
    /// another session gets the server.
    pub fn leftovers(&self) -> Vec<&'static str> {
        let all = [
            (self.transaction.is_some(), "an open transaction"),
            (self.copying || self.skipping, "an unfinished batch"),
            (!self.now.temporary.is_empty(), "a temporary table"),
            (!self.locks.is_empty(), "an advisory lock"),
        ];
        all.into_iter().filter(|(holds, _)| *holds).map(|(_, what)| what).collect()
    }

    /// The value of a parameter; `None`: there is no such custom parameter.
    pub fn value(&self, name: &str) -> Value {
        let name = &name.to_ascii_lowercase();
        let set = self.local.get(name).or_else(|| self.now.set.get(name)).cloned();
        set.or_else(|| self.default_value(name)).or_else(|| self.custom.contains(name).then(String::new))
    }

    pub fn default_value(&self, name: &str) -> Value {
        let given = self.startup.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        let built_in =
            || REPORTED.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|known| known.1);
        given.map(|(_, value)| value.clone()).or_else(|| built_in().map(str::to_owned)).or_else(|| match name
        {
            "work_mem" => Some("4MB".to_owned()),
            "role" => Some("none".to_owned()),
            _ => None,
        })
    }

    /// SET, SET LOCAL, or for `None` RESET.
    pub fn set(&mut self, name: &str, value: Option<&str>, local: bool) {
        let name = name.to_ascii_lowercase();
        if name.contains('.') {
            self.custom.insert(name.clone());
        }
        let value = value.map(str::to_owned);
        match (value, local) {
            (Some(value), true) => drop(self.local.insert(name, value)),
            (Some(value), false) => {
                self.local.remove(&name);
                self.now.set.insert(name, value);
            }
            (None, _) => {
                self.local.remove(&name);
                self.now.set.remove(&name);
            }
        }
    }

    /// Whether it is between two transactions: only then it sends notifications.
    pub fn is_idle(&self) -> bool {
        self.transaction.is_none() && !self.skipping && !self.copying
    }

    /// How long the statement of this frame sleeps before it answers, in milliseconds.
    pub fn sleep_ms(&self, message: &Message) -> u64 {
        let (tag, body) = (message.tag(), message.body());
        if self.skipping || self.failed {
            return 0;
        }
        match tag {
            b'Q' => expressions::sleep_ms(&text(&mut &body[..])),
            b'E' => {
                self.portals.get(&text(&mut &body[..])).map_or(0, |portal| expressions::sleep_ms(&portal.sql))
            }
            _ => 0,
        }
    }

    /// Runs one message of a client; `cancelled`: its statement is cancelled. Returns the replies.
    pub fn run(&mut self, message: &Message, cancelled: bool) -> Vec<u8> {
        let (tag, body) = (message.tag(), message.body());
        match tag {
            b'Q' if self.skipping => {}
            b'Q' => {
                self.portals.remove("");
                self.statements.remove("");
                self.query(&text(&mut &body[..]), cancelled);
            }
            b'd' if self.copying => self.copied += 1,
            b'c' | b'f' if self.copying => self.end_copy(tag == b'c'),
            b'd' | b'c' | b'f' => {}
            b'S' => self.sync(),
            b'H' => {}
            _ if self.skipping => {}
            _ => {
                self.begin_if_none();
                let done = match cancelled {
                    true => Err(Failure::cancelled()),
                    false => self.extended(tag, body),
                };
                if let Err(failure) = done {
                    self.fail(&failure);
                    self.skipping = true;
                }
            }
        }
        std::mem::take(&mut self.out)
    }

    fn extended(&mut self, tag: u8, mut body: &[u8]) -> Result<(), Failure> {
        let body = &mut body;
        match tag {
            b'P' => self.parse(text(body), text(body))?,
            b'B' => self.bind(text(body), text(body), parameters(body))?,
            b'D' => self.describe_named(kind(body), &text(body))?,
            b'E' => self.execute(&text(body), body.ends_with(&[1]))?,
            b'C' => {
                match (kind(body), text(body)) {
                    (b'S', name) => drop(self.statements.remove(&name)),
                    (_, name) => drop(self.portals.remove(&name)),
                }
                append(&mut self.out, b'3', |_| {});
            }
            other => return Err(Failure::new("08P01", &format!("invalid frontend message type {other}"))),
        }
        Ok(())
    }

    fn parse(&mut self, name: String, sql: String) -> Result<(), Failure> {
        if sql.starts_with("SELEC ") {
            return Err(Failure::new("42601", "syntax error at or near \"SELEC\""));
        }
        self.refuse_if_failed(&sql)?;
        if !name.is_empty() {
            self.refuse_if_prepared(&name)?;
        }
        self.statements.insert(name, Statement { sql, from_sql: false });
        append(&mut self.out, b'1', |_| {});
        Ok(())
    }

    fn bind(&mut self, portal: String, name: String, parameters: Vec<Value>) -> Result<(), Failure> {
        let sql = self.statement(&name)?.sql.clone();
        self.refuse_if_failed(&sql)?;
        if !portal.is_empty() && self.portals.contains_key(&portal) {
            return Err(Failure::new("42P03", &format!("cursor \"{portal}\" already exists")));
        }
        self.portals.insert(portal, Portal { sql, parameters, has_run: false });
        append(&mut self.out, b'2', |_| {});
        Ok(())
    }

    fn describe_named(&mut self, kind: u8, name: &str) -> Result<(), Failure> {
        let sql = match kind {
            b'S' => self.statement(name)?.sql.clone(),
            _ => self.portal(name)?.sql.clone(),
        };
        let columns = columns(&sql);
        if self.failed && columns > 0 {
            return Err(Failure::aborted());
        }
        if kind == b'S' {
            let count = (1..10).take_while(|number| sql.contains(&format!("${number}"))).count();
            append(&mut self.out, b't', |out| {
                out.extend_from_slice(&(count as u16).to_be_bytes());
                (0..count).for_each(|_| out.extend_from_slice(&25u32.to_be_bytes()));
            });
        }
        self.describe(columns);
        Ok(())
    }

    /// Runs a portal; `limited`: for one row.
    fn execute(&mut self, portal: &str, limited: bool) -> Result<(), Failure> {
        let Portal { sql, parameters, has_run } = self.portal(portal)?.clone();
        self.refuse_if_failed(&sql)?;
        if has_run {
            if columns(&sql) == 0 {
                return Err(Failure::new("55000", &format!("portal \"{portal}\" cannot be run")));
            }
            self.complete("SELECT 0");
            return Ok(());
        }
        let from = self.out.len();
        self.run_statement(&sql, &parameters, false)?;
        if limited && columns(&sql) > 0 {
            self.suspend(from);
        }
        self.portals.entry(portal.to_owned()).and_modify(|portal| portal.has_run = true);
        self.copy_in_batch = self.copying;
        Ok(())
    }

    /// The replies behind `from` were limited to one row: a PortalSuspended takes the place of their end.
    fn suspend(&mut self, from: usize) {
        for reply in frames::all(&self.out.split_off(from)) {
            match reply.tag() {
                b'C' => append(&mut self.out, b's', |_| {}),
                _ => self.out.extend_from_slice(&reply.bytes),
            }
        }
    }

    pub(super) fn statement(&self, name: &str) -> Result<&Statement, Failure> {
        let message = match name {
            "" => "unnamed prepared statement does not exist".to_owned(),
            name => format!("prepared statement \"{name}\" does not exist"),
        };
        self.statements.get(name).ok_or_else(|| Failure::new("26000", &message))
    }

    pub(super) fn refuse_if_prepared(&self, name: &str) -> Result<(), Failure> {
        let message = format!("prepared statement \"{name}\" already exists");
        match self.statements.contains_key(name) {
            true => Err(Failure::new("42P05", &message)),
            false => Ok(()),
        }
    }

    fn portal(&self, name: &str) -> Result<&Portal, Failure> {
        let missing = || Failure::new("34000", &format!("portal \"{name}\" does not exist"));
        self.portals.get(name).ok_or_else(missing)
    }

    fn refuse_if_failed(&self, sql: &str) -> Result<(), Failure> {
        let ends = matches!(sql, "COMMIT" | "ROLLBACK");
        if self.failed && !ends { Err(Failure::aborted()) } else { Ok(()) }
    }

    /// A simple query of statements separated by semicolons.
    fn query(&mut self, sql: &str, cancelled: bool) {
        self.skipping = false;
        if sql.trim().is_empty() {
            append(&mut self.out, b'I', |_| {});
        }
        for sql in sql.split(';').map(str::trim).filter(|sql| !sql.is_empty()) {
            self.begin_if_none();
            let done = match cancelled {
                true => Err(Failure::cancelled()),
                false => self.refuse_if_failed(sql).and_then(|()| self.run_statement(sql, &[], true)),
            };
            if let Err(failure) = done {
                self.fail(&failure);
                break;
            }
            if self.copying {
                self.copy_in_batch = false;
                return;
            }
        }
        self.end_implicit();
        self.ready();
    }

    fn sync(&mut self) {
        if self.copying {
            return;
        }
        self.skipping = false;
        self.end_implicit();
        self.ready();
    }

    fn ready(&mut self) {
        for (name, _) in REPORTED {
            let value = self.value(name).unwrap_or_default();
            if self.reported.get(name) != Some(&value) {
                parameter_status(&mut self.out, name.as_bytes(), value.as_bytes());
                self.reported.insert(name.to_owned(), value);
            }
        }
        let status = match (&self.transaction, self.failed) {
            (None, _) => b'I',
            (Some(_), false) => b'T',
            (Some(_), true) => b'E',
        };
        ready_for_query(&mut self.out, status);
    }

    fn begin_if_none(&mut self) {
        if self.transaction.is_none() {
            self.transaction = Some(Transaction { before: self.now.clone(), is_block: false });
        }
    }

    /// The end of a batch ends a transaction that no BEGIN began.
    fn end_implicit(&mut self) {
        if self.transaction.as_ref().is_some_and(|transaction| !transaction.is_block) {
            self.end_transaction(self.failed);
        }
    }

    pub(super) fn end_transaction(&mut self, rolled_back: bool) {
        if let Some(transaction) = self.transaction.take().filter(|_| rolled_back) {
            self.now = transaction.before;
        }
        let (listens, notifies) = (std::mem::take(&mut self.listens), std::mem::take(&mut self.notifies));
        if !rolled_back {
            for (listens, channel) in listens {
                match (listens, channel) {
                    (true, Some(channel)) => drop(self.listening.insert(channel)),
                    (_, Some(channel)) => drop(self.listening.remove(&channel)),
                    (_, None) => self.listening.clear(),
                }
            }
            self.notified.extend(notifies);
        }
        self.local.clear();
        self.portals.clear();
        self.failed = false;
    }

    fn fail(&mut self, failure: &Failure) {
        error_response(&mut self.out, Severity::Error, failure.sqlstate, &failure.message, &[]);
        self.failed = true;
    }

    pub(super) fn warn(&mut self, sqlstate: &str, message: &str) {
        append(&mut self.out, b'N', |out| {
            for (field, value) in [(b'S', "WARNING"), (b'V', "WARNING"), (b'C', sqlstate), (b'M', message)] {
                out.push(field);
                append_cstr(out, value.as_bytes());
            }
            out.push(0);
        });
    }

    pub(super) fn describe(&mut self, columns: usize) {
        if columns == 0 {
            return append(&mut self.out, b'n', |_| {});
        }
        append(&mut self.out, b'T', |out| {
            out.extend_from_slice(&(columns as u16).to_be_bytes());
            for _ in 0..columns {
                append_cstr(out, b"?column?");
                out.extend_from_slice(&[0; 6]);
                out.extend_from_slice(&25u32.to_be_bytes());
                out.extend_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]);
            }
        });
    }

    pub(super) fn rows(&mut self, rows: &[Vec<Value>]) {
        for row in rows {
            append(&mut self.out, b'D', |out| {
                out.extend_from_slice(&(row.len() as u16).to_be_bytes());
                for value in row {
                    match value {
                        None => out.extend_from_slice(&u32::MAX.to_be_bytes()),
                        Some(value) => {
                            out.extend_from_slice(&(value.len() as u32).to_be_bytes());
                            out.extend_from_slice(value.as_bytes());
                        }
                    }
                }
            });
        }
        self.complete(&format!("SELECT {}", rows.len()));
    }

    pub(super) fn complete(&mut self, tag: &str) {
        append(&mut self.out, b'C', |out| append_cstr(out, tag.as_bytes()));
    }

    fn end_copy(&mut self, done: bool) {
        self.copying = false;
        match done {
            true => self.complete(&format!("COPY {}", self.copied)),
            false => self.fail(&Failure::new("57014", "COPY from stdin failed: no more")),
        }
        if self.copy_in_batch {
            self.skipping = !done;
        } else {
            self.end_implicit();
            self.ready();
        }
    }
}

/// Whether a Describe or Close names a statement (`S`) or a portal (`P`).
fn kind(body: &mut &[u8]) -> u8 {
    let (kind, rest) = body.split_first().unwrap_or((&b'S', &[]));
    *body = rest;
    *kind
}

/// The next zero-terminated string.
fn text(body: &mut &[u8]) -> String {
    String::from_utf8_lossy(cstr(body).unwrap_or_default()).into_owned()
}

/// The parameters of a Bind, behind its names. All are text.
fn parameters(body: &mut &[u8]) -> Vec<Value> {
    let mut take = |count: usize| {
        let (taken, rest) = body.split_at_checked(count).unwrap_or((body, &[]));
        *body = rest;
        taken.to_vec()
    };
    let number = |bytes: &[u8]| bytes.iter().fold(0usize, |number, byte| number << 8 | usize::from(*byte));
    let formats = number(&take(2));
    take(2 * formats);
    let count = number(&take(2));
    (0..count)
        .map(|_| match number(&take(4)) {
            0xffff_ffff => None,
            length => Some(String::from_utf8_lossy(&take(length)).into_owned()),
        })
        .collect()
}
