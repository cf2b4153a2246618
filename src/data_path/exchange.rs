//! What passes between one client and the server it borrowed: bytes in, bytes out. Pure; the engine is `relay.rs`.
//!
//! Messages are looked at by their five-byte headers; of a few (names in Parse, Bind, Describe and Close, the text of a
//! query, the status in ReadyForQuery) more is read. Everything else goes from one buffer to the other side unread.
//!
//! Source: PostgreSQL documentation, "Message Formats" and "Message Flow".

use std::sync::Arc;

use super::{
    lease::{Asked, Desync, Lease, Naming, Whose},
    prepared::{ClientStatements, ServerStatements, Statement, StatementTable, rename},
    session_state::{Aftermath, Settings, Uncertain},
    statement::{Characters, Kind, Lexing},
};
use crate::{
    error::Refusal,
    wire::{
        frame::{FrameError, Framer, HEADER_BYTES, Need, Piece, cstr},
        outgoing::Outgoing,
    },
};

/// The longest ErrorResponse or ParameterStatus that is read whole; PostgreSQL itself stays below 30 000 bytes.
const REPORT_BYTES_MAX: usize = 64 * 1024;

/// What outlives a lease: the client's side.
#[derive(Debug)]
pub struct ClientSide {
    framer: Framer,
    /// What it has prepared.
    pub statements: ClientStatements,
    /// What it has SET.
    pub wanted: Arc<Settings>,
    rules: Rules,
    /// Of the last unnamed statement; unique over the process.
    unnamed_serial: u64,
    refusing: Refusing,
}

/// How far a request that was refused goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusing {
    No,
    /// Its first message is yet to be looked at.
    Begun,
    /// A simple query, of which more is to come.
    ThisMessage,
    /// A batch.
    UntilSync,
}

/// What holds for a session from its first to its last byte.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Statements and settings follow the client from server to server: `pool_mode = "transaction"`.
    pub follow: bool,
    /// The pool's statements.
    pub table: Arc<StatementTable>,
    /// `statement_inspect_bytes_max`.
    pub inspect_bytes_max: usize,
    /// `client_prepared_statements_max`.
    pub statements_max: usize,
}

impl Rules {
    /// For replies that nobody wants any more.
    pub fn nobody(table: &Arc<StatementTable>) -> Self {
        Self { follow: false, table: table.clone(), inspect_bytes_max: 0, statements_max: 0 }
    }
}

/// What lives with a server: its side, and the lease of whoever holds it.
#[derive(Debug)]
pub struct ServerSide {
    framer: Framer,
    /// The rest of the message that is coming in is left out.
    hiding: bool,
    /// Who waits for what.
    pub lease: Lease,
    /// What it has prepared.
    pub statements: ServerStatements,
    /// What it has SET, as far as we know.
    pub applied: Arc<Settings>,
    /// What may have changed since.
    pub uncertain: Uncertain,
    /// Our own statement is prepared (see `session_state::prelude`).
    pub has_setter: bool,
    /// Every reported parameter, as last reported.
    pub reported: Vec<(Box<str>, Box<str>)>,
    lexing: Lexing,
}

/// What a chunk of the server's brought, beside bytes to pass on.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// ReadyForQuery messages that the client gets.
    pub ready: u32,
    /// The last of them ended a transaction.
    pub transaction_ended: bool,
    /// The server says that it closes the connection.
    pub fatal: bool,
    /// Errors that the client gets.
    pub errors: u32,
}

/// Why a server cannot be used, nor its client be served, any longer.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// Bytes that are not the protocol.
    #[error("the server broke the protocol: {0}")]
    Frame(#[from] FrameError),
    /// A reply to nothing.
    #[error(transparent)]
    Desync(#[from] Desync),
    /// What had to be put in did not work.
    #[error("the server refused our own bookkeeping: {0}")]
    Bookkeeping(ServerError),
}

/// Whether the client goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// It does.
    Goes,
    /// It said Terminate.
    Terminated,
}

impl ClientSide {
    /// A session that has just logged in. `first_serial` is unique over the process, with 32 bits of room above it.
    pub fn new(rules: Rules, wanted: Arc<Settings>, first_serial: u64) -> Self {
        Self {
            framer: Framer::default(),
            statements: ClientStatements::default(),
            wanted,
            rules,
            unnamed_serial: first_serial,
            refusing: Refusing::No,
        }
    }

    /// What holds for the session.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Statements and settings follow the client from server to server.
    pub fn follows(&self) -> bool {
        self.rules.follow
    }

    /// A message has gone to the server in part; the rest must reach the same server.
    #[inline]
    pub fn mid_message(&self) -> bool {
        self.framer.mid_message()
    }

    /// Moves the beginning of a message that no server has got to the end of `inbox`.
    #[inline]
    pub fn take_held(&mut self, inbox: &mut Vec<u8>) {
        self.framer.take_held(inbox);
    }

    /// Whether what the client sends is being left out up to the end of a request that was refused.
    #[inline]
    pub fn is_refusing(&self) -> bool {
        self.refusing != Refusing::No
    }

    /// The request that comes next was answered with an error of ours: it is left out.
    pub fn begin_refusing(&mut self) {
        self.refusing = Refusing::Begun;
    }

    /// Leaves out the refused request, a simple query or a batch up to its Sync, and answers its end with ReadyForQuery.
    /// What is behind it is handed back. Called only while the session holds no server.
    ///
    /// # Errors
    /// The client broke the protocol.
    pub fn refuse<'c>(&mut self, mut chunk: &'c [u8], replies: &mut Vec<u8>) -> Result<&'c [u8], Refusal> {
        while self.is_refusing() {
            let before = chunk;
            let piece = self.framer.next(&mut chunk, |_, _| Ok(Need::Header)).map_err(violation)?;
            let (tag, ended) = match piece {
                None => break,
                Some(Piece::Whole { tag, .. }) => (tag, true),
                Some(Piece::First { tag, .. }) => (tag, false),
                Some(Piece::Rest { last, .. }) => (b'r', last),
            };
            self.refusing = match (self.refusing, tag) {
                (_, b'X') => {
                    self.refusing = Refusing::No;
                    return Ok(before);
                }
                (_, b'S') => Refusing::No,
                (Refusing::Begun, b'Q' | b'F') if ended => Refusing::No,
                (Refusing::Begun, b'Q' | b'F') => Refusing::ThisMessage,
                (Refusing::ThisMessage, b'r') if ended => Refusing::No,
                (Refusing::Begun, b'P' | b'B' | b'D' | b'C' | b'E') => Refusing::UntilSync,
                (going_on, _) => going_on,
            };
            if !self.is_refusing() {
                crate::wire::message::ready_for_query(replies, b'I');
            }
        }
        Ok(chunk)
    }

    /// Takes what the client sent; `out` gets what goes to the server.
    ///
    /// # Errors
    /// The client broke the protocol or a limit; the session ends.
    pub fn take(
        &mut self,
        mut chunk: &[u8],
        server: &mut ServerSide,
        out: &mut Outgoing<'_>,
    ) -> Result<Flow, Refusal> {
        let Self { framer, statements, rules, unnamed_serial, .. } = self;
        let mut context = Context { statements, rules, unnamed_serial, server, out };
        loop {
            let piece = framer.next(&mut chunk, |tag, length| need_of_client(tag, length, context.rules));
            match piece.map_err(violation)? {
                None => return Ok(Flow::Goes),
                Some(Piece::Rest { bytes, .. }) => context.out.pass(bytes),
                Some(Piece::Whole { tag: b'X', .. } | Piece::First { tag: b'X', .. }) => {
                    return Ok(Flow::Terminated);
                }
                Some(Piece::Whole { tag, bytes }) => context.message(tag, bytes, true)?,
                Some(Piece::First { tag, bytes }) => context.message(tag, bytes, false)?,
            }
        }
    }
}

/// What a client that broke the protocol is told.
pub fn violation(error: FrameError) -> Refusal {
    Refusal::ProtocolViolation(match error {
        FrameError::Type(tag) => format!("invalid frontend message type {tag}"),
        other => other.to_string(),
    })
}

/// How much of a client's message must be seen; also where a first header is judged before a server is borrowed.
#[inline]
pub fn need_of_client(tag: u8, length: usize, rules: &Rules) -> Result<Need, FrameError> {
    Ok(match tag {
        b'Q' if rules.follow && length <= rules.inspect_bytes_max => Need::Whole,
        b'P' if rules.follow && length <= rules.inspect_bytes_max => Need::Whole,
        b'P' => Need::Strings(1),
        b'B' => Need::Strings(2),
        b'D' | b'C' if length <= crate::wire::frame::NAMES_BYTES_MAX => Need::Whole,
        b'D' | b'C' => return Err(FrameError::Strings),
        b'S' | b'H' | b'c' | b'X' if length > 10_000 => return Err(FrameError::Length),
        b'Q' | b'E' | b'S' | b'H' | b'F' | b'd' | b'c' | b'f' | b'X' => Need::Header,
        other => return Err(FrameError::Type(other)),
    })
}

/// One client message at a time.
struct Context<'a, 'c> {
    statements: &'a mut ClientStatements,
    rules: &'a Rules,
    unnamed_serial: &'a mut u64,
    server: &'a mut ServerSide,
    out: &'a mut Outgoing<'c>,
}

impl Context<'_, '_> {
    #[inline]
    fn message(&mut self, tag: u8, bytes: &[u8], whole: bool) -> Result<(), Refusal> {
        match tag {
            b'Q' => return self.query(bytes, whole),
            b'P' if self.rules.follow => return self.parse(bytes, whole),
            b'B' if self.rules.follow => return self.bind(bytes),
            b'D' if self.rules.follow => return self.describe(bytes),
            b'C' if self.rules.follow => return self.close(bytes),
            b'F' => {
                self.server.uncertain.note(&Aftermath::unread());
                self.ask(Asked::FunctionCall);
            }
            b'P' => self.ask(Asked::Parse(None)),
            b'B' => self.ask(Asked::Bind),
            b'D' => self.ask(Asked::Describe),
            b'C' => self.ask(Asked::Close(None)),
            b'E' => self.ask(Asked::Execute),
            b'S' => self.ask(Asked::Sync),
            b'c' | b'f' => self.server.lease.copy_done(),
            _ => {}
        }
        self.out.pass(bytes);
        Ok(())
    }

    #[inline]
    fn ask(&mut self, asked: Asked) {
        // What the server skips has no effect and gets no reply; the bytes go to it all the same.
        let _ = self.server.lease.ask(asked, Whose::Client);
    }

    fn query(&mut self, bytes: &[u8], whole: bool) -> Result<(), Refusal> {
        // A simple query ends the unnamed statement.
        self.statements.forget_unnamed();
        self.server.statements.set_unnamed(0);
        if !self.rules.follow {
            self.ask(Asked::Query);
            self.out.pass(bytes);
            return Ok(());
        }
        let mut text = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let aftermath = match (whole, cstr(&mut text)) {
            (true, Ok(sql)) => Aftermath::read(sql, self.server.lexing()),
            _ => Aftermath::unread(),
        };
        self.server.uncertain.note(&aftermath);
        if aftermath.names_statements
            && let Some(rewritten) = self.with_server_names(bytes)
        {
            self.ask(Asked::Query);
            self.out.build().extend_from_slice(&rewritten);
            return Ok(());
        }
        self.ask(Asked::Query);
        self.out.pass(bytes);
        Ok(())
    }

    fn parse(&mut self, bytes: &[u8], whole: bool) -> Result<(), Refusal> {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let name = cstr(&mut body).map_err(violation)?;
        let aftermath = |lexing| match cstr(&mut { body }) {
            Ok(sql) if whole => Aftermath::read(sql, lexing),
            _ => Aftermath::unread(),
        };
        let lexing = self.server.lexing();
        if name.is_empty() {
            *self.unnamed_serial += 1;
            let aftermath = aftermath(lexing);
            if self.server.lease.ask(Asked::Parse(None), Whose::Client) {
                self.statements.set_unnamed(*self.unnamed_serial, if whole { body } else { b"" }, aftermath);
                self.server.statements.set_unnamed(*self.unnamed_serial);
            }
            self.out.pass(bytes);
            return Ok(());
        }
        if !whole || self.statements.get(name).is_some() {
            return self.parse_under_its_own_name(bytes, name, whole);
        }
        if self.statements.len() >= self.rules.statements_max {
            return Err(Refusal::TooManyStatements { limit: self.rules.statements_max });
        }
        let statement = self.rules.table.intern(body, || aftermath(lexing));
        self.server.statements.make_room_for(&statement, &mut self.server.lease, self.out.build());
        let naming = Naming { client_name: Some(name.into()), statement: statement.clone() };
        if self.server.lease.ask(Asked::Parse(Some(Box::new(naming))), Whose::Client) {
            self.server.statements.queued(&statement, self.server.lease.batch());
            self.server.statements.tally.client_parses += 1;
            self.statements.insert(name, statement.clone());
        }
        rename(bytes, HEADER_BYTES, name.len(), statement.server_name(), self.out.build());
        Ok(())
    }

    /// A statement that is too long to keep, or whose name is taken: the server gets it as the client calls it, and stays
    /// with this client. A taken name is taken on the server too, so that the error is PostgreSQL's own.
    fn parse_under_its_own_name(&mut self, bytes: &[u8], name: &[u8], whole: bool) -> Result<(), Refusal> {
        self.server.uncertain.note(&Aftermath::unread());
        if whole && self.server.lease.ask(Asked::Parse(None), Whose::Follow) {
            crate::wire::message::append(self.out.build(), b'P', |out| {
                crate::wire::message::append_cstr(out, name);
                out.extend_from_slice(&[0, 0, 0]);
            });
        }
        self.ask(Asked::Parse(None));
        self.out.pass(bytes);
        Ok(())
    }

    fn bind(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let mut body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        let portal = cstr(&mut body).map_err(violation)?;
        let name = cstr(&mut body).map_err(violation)?;
        if name.is_empty() {
            self.server.uncertain.note(self.statements.unnamed_aftermath());
            return self.with_unnamed(Asked::Bind, bytes);
        }
        let Some(statement) = self.statements.get(name).cloned() else {
            // The server says so itself, under the name the client used.
            self.ask(Asked::Bind);
            self.out.pass(bytes);
            return Ok(());
        };
        self.server.statements.tally.binds += 1;
        self.server.uncertain.note(&statement.aftermath);
        self.with_statement(Asked::Bind, bytes, HEADER_BYTES + portal.len() + 1, name.len(), &statement);
        Ok(())
    }

    fn describe(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let (kind, name) = kind_and_name(bytes)?;
        match self.statements.get(name).cloned() {
            _ if kind != b'S' => self.ask(Asked::Describe),
            _ if name.is_empty() => return self.with_unnamed(Asked::Describe, bytes),
            None => self.ask(Asked::Describe),
            Some(statement) => {
                self.with_statement(Asked::Describe, bytes, HEADER_BYTES + 1, name.len(), &statement);
                return Ok(());
            }
        }
        self.out.pass(bytes);
        Ok(())
    }

    /// A Close takes the client's name away; the statement stays on the server, for others. What is passed on closes a
    /// name that the server does not have, which PostgreSQL answers like any other.
    fn close(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let (kind, name) = kind_and_name(bytes)?;
        let statement = self.statements.get(name).filter(|_| kind == b'S').cloned();
        let unnamed = kind == b'S' && name.is_empty();
        let naming =
            statement.map(|statement| Box::new(Naming { client_name: Some(name.into()), statement }));
        if self.server.lease.ask(Asked::Close(naming), Whose::Client) && kind == b'S' {
            self.statements.remove(name);
            if unnamed {
                self.statements.forget_unnamed();
                self.server.statements.set_unnamed(0);
            }
        }
        self.out.pass(bytes);
        Ok(())
    }

    fn with_unnamed(&mut self, asked: Asked, bytes: &[u8]) -> Result<(), Refusal> {
        self.server.statements.ensure_unnamed(self.statements, &mut self.server.lease, self.out);
        self.ask(asked);
        self.out.pass(bytes);
        Ok(())
    }

    #[inline]
    fn with_statement(
        &mut self,
        asked: Asked,
        bytes: &[u8],
        at: usize,
        length: usize,
        statement: &Arc<Statement>,
    ) {
        self.server.statements.ensure(statement, &mut self.server.lease, self.out);
        self.ask(asked);
        rename(bytes, at, length, statement.server_name(), self.out.build());
    }

    /// The query with every name of a protocol-level statement in EXECUTE or DEALLOCATE replaced by what servers call it.
    #[cold]
    fn with_server_names(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let sql = cstr(&mut bytes.get(HEADER_BYTES..)?).ok()?;
        let mut rewritten = Vec::new();
        let mut copied = 0;
        for found in super::statement::statements(sql, self.server.lexing()) {
            let Some(name) = found.prepared.filter(|_| !matches!(found.kind, Kind::Prepare { .. })) else {
                continue;
            };
            let Some(statement) = self.statements.get(&name.value).cloned() else { continue };
            let range = found.start + name.range.start..found.start + name.range.end;
            self.server.statements.ensure(&statement, &mut self.server.lease, self.out);
            rewritten.extend_from_slice(sql.get(copied..range.start)?);
            rewritten.extend_from_slice(statement.server_name());
            copied = range.end;
        }
        if copied == 0 {
            return None;
        }
        rewritten.extend_from_slice(sql.get(copied..)?);
        let mut message = Vec::new();
        crate::wire::message::append(&mut message, b'Q', |out| {
            crate::wire::message::append_cstr(out, &rewritten);
        });
        Some(message)
    }
}

fn kind_and_name(bytes: &[u8]) -> Result<(u8, &[u8]), Refusal> {
    let Some((kind, mut rest)) = bytes.get(HEADER_BYTES..).and_then(<[u8]>::split_first) else {
        return Err(violation(FrameError::Strings));
    };
    Ok((*kind, cstr(&mut rest).map_err(violation)?))
}

impl ServerSide {
    /// A server that has just been opened, with what it reported.
    pub fn new(reported: Vec<(Box<str>, Box<str>)>, prepared_max: usize) -> Self {
        Self {
            framer: Framer::default(),
            hiding: false,
            lease: Lease::default(),
            statements: ServerStatements::new(prepared_max),
            applied: Arc::default(),
            uncertain: Uncertain::default(),
            has_setter: false,
            lexing: lexing(&reported),
            reported,
        }
    }

    /// Nothing of a message is missing or left over.
    pub fn at_boundary(&self) -> bool {
        self.framer.at_boundary()
    }

    /// A message has come in part: nothing of our own can be put behind it.
    pub fn mid_message(&self) -> bool {
        self.framer.mid_message()
    }

    /// How this server reads string literals now.
    #[inline]
    pub fn lexing(&self) -> Lexing {
        self.lexing
    }

    /// Everything prepared and set is gone: DISCARD ALL has succeeded.
    pub fn discarded(&mut self) {
        self.statements.forget_all();
        self.has_setter = false;
        self.applied = Arc::default();
        self.uncertain.clear();
        self.lease.pins = super::lease::Pins::default();
    }

    /// Takes what the server sent; `out` gets what goes to the client.
    ///
    /// # Errors
    /// [`Broken`]: the server and its client must both be closed.
    pub fn take(
        &mut self,
        mut chunk: &[u8],
        client: &mut ClientSide,
        out: &mut Outgoing<'_>,
    ) -> Result<Heard, Broken> {
        let mut heard = Heard::default();
        // Taken out for the loop, so that a piece may borrow it while the rest of `self` is at work.
        let mut framer = std::mem::take(&mut self.framer);
        let result = loop {
            match framer.next(&mut chunk, need_of_server) {
                Ok(None) => break Ok(heard),
                Ok(Some(Piece::Rest { bytes, .. })) => {
                    if !self.hiding {
                        out.pass(bytes);
                    }
                }
                Ok(Some(Piece::Whole { tag, bytes } | Piece::First { tag, bytes })) => {
                    match self.message(tag, bytes, client, &mut heard) {
                        Ok(pass) => {
                            self.hiding = !pass;
                            if pass {
                                out.pass(bytes);
                            }
                        }
                        Err(broken) => break Err(broken),
                    }
                }
                Err(error) => break Err(error.into()),
            }
        };
        self.framer = framer;
        result
    }

    #[inline]
    fn message(
        &mut self,
        tag: u8,
        bytes: &[u8],
        client: &mut ClientSide,
        heard: &mut Heard,
    ) -> Result<bool, Broken> {
        match tag {
            b'Z' => {
                let status = bytes.get(HEADER_BYTES).copied().unwrap_or(0);
                let pass = self.lease.ready(status)?;
                heard.ready += u32::from(pass);
                heard.transaction_ended = status == b'I';
                Ok(pass)
            }
            b'E' => self.error(bytes, client, heard),
            b'S' => Ok(self.parameter_status(bytes)),
            b'N' => Ok(self.lease.whose() != Some(Whose::Ours)),
            b'A' => Ok(true),
            _ => {
                let settled = self.lease.reply(tag)?;
                match settled.done {
                    Some(Asked::Parse(Some(naming))) => self.statements.confirmed(&naming.statement),
                    _ if tag == b'C' => self.command_complete(bytes, client),
                    _ => {}
                }
                Ok(settled.pass)
            }
        }
    }

    fn error(&mut self, bytes: &[u8], client: &mut ClientSide, heard: &mut Heard) -> Result<bool, Broken> {
        if is_fatal(bytes) {
            heard.fatal = true;
            return Ok(true);
        }
        let Self { lease, statements, .. } = self;
        let whose = lease.error(|asked| match asked {
            Asked::Parse(Some(naming)) => {
                statements.unqueued(&naming.statement);
                if let Some(name) = &naming.client_name {
                    client.statements.remove(name);
                }
            }
            Asked::Parse(None) => {
                statements.set_unnamed(0);
                client.statements.forget_unnamed();
            }
            Asked::Close(Some(naming)) => match &naming.client_name {
                Some(name) => client.statements.insert(name, naming.statement.clone()),
                None => statements.not_closed(&naming.statement),
            },
            _ => {}
        })?;
        if whose == Whose::Ours {
            return Err(Broken::Bookkeeping(ServerError::read(bytes)));
        }
        heard.errors += 1;
        Ok(true)
    }

    /// ParameterStatus; `true` if the client gets it. What the client's own statements changed is to be asked about.
    fn parameter_status(&mut self, bytes: &[u8]) -> bool {
        let ours = self.lease.whose() == Some(Whose::Ours);
        if let (Some(name), false) = (self.note_parameter(bytes), ours) {
            self.uncertain.name(&name);
        }
        !ours
    }

    /// Takes down what the server reports; the parameter's name in lower case.
    pub fn note_parameter(&mut self, bytes: &[u8]) -> Option<String> {
        let mut body = bytes.get(HEADER_BYTES..)?;
        let (name, value) = (cstr(&mut body).ok()?, cstr(&mut body).ok()?);
        let (name, value) = (String::from_utf8_lossy(name), String::from_utf8_lossy(value));
        match self.reported.iter().position(|(known, _)| **known == *name) {
            Some(at) => self.reported[at].1 = value.into(),
            // A server reports some fifteen; one that reports a thousand is not PostgreSQL.
            None if self.reported.len() < 1000 => self.reported.push((name.clone().into(), value.into())),
            None => {}
        }
        self.lexing = lexing(&self.reported);
        Some(name.to_ascii_lowercase())
    }

    #[inline]
    fn command_complete(&mut self, bytes: &[u8], client: &mut ClientSide) {
        let tag = bytes.get(HEADER_BYTES..).unwrap_or_default();
        if tag.starts_with(b"D") && (tag.starts_with(b"DISCARD ALL") || tag.starts_with(b"DEALLOCATE ALL")) {
            self.statements.forget_all();
            client.statements.forget_all();
            self.has_setter = false;
            if tag.starts_with(b"DISCARD") {
                // What PostgreSQL itself undoes need not be remembered; what it does not is asked for.
                self.lease.pins.remove(super::lease::Pins::SEQUENCE);
                self.lease.pins.remove(super::lease::Pins::UNREAD);
            }
        }
    }
}

fn lexing(reported: &[(Box<str>, Box<str>)]) -> Lexing {
    let value = |wanted: &str| reported.iter().find(|(name, _)| **name == *wanted).map(|(_, value)| &**value);
    Lexing {
        standard_conforming_strings: value("standard_conforming_strings") != Some("off"),
        characters: Characters::of_client_encoding(value("client_encoding").unwrap_or_default().as_bytes()),
    }
}

fn need_of_server(tag: u8, length: usize) -> Result<Need, FrameError> {
    Ok(match tag {
        b'D' | b'd' | b'T' => Need::Header,
        b'Z' if length == 5 => Need::Whole,
        b'Z' => return Err(FrameError::Length),
        b'E' | b'S' | b'C' if length <= REPORT_BYTES_MAX => Need::Whole,
        _ => Need::Header,
    })
}

/// The value of a field of an ErrorResponse or NoticeResponse.
pub fn error_field(bytes: &[u8], wanted: u8) -> Option<&[u8]> {
    let mut body = bytes.get(HEADER_BYTES..)?;
    while let Some((field, rest)) = body.split_first() {
        body = rest;
        if *field == 0 {
            return None;
        }
        let value = cstr(&mut body).ok()?;
        if *field == wanted {
            return Some(value);
        }
    }
    None
}

/// Whether the server closes the connection after this ErrorResponse. `V` is never translated, but older than 9.6
/// servers lack it.
fn is_fatal(bytes: &[u8]) -> bool {
    let severity = error_field(bytes, b'V').or_else(|| error_field(bytes, b'S'));
    matches!(severity, Some(b"FATAL" | b"PANIC"))
}

/// What a server's ErrorResponse says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{sqlstate} {message}")]
pub struct ServerError {
    /// Field `C`; empty if the server gave none.
    pub sqlstate: String,
    /// Field `M`.
    pub message: String,
}

impl ServerError {
    /// Reads an ErrorResponse; every field is optional.
    pub fn read(bytes: &[u8]) -> Self {
        let field =
            |name| error_field(bytes, name).map(String::from_utf8_lossy).unwrap_or_default().into_owned();
        Self { sqlstate: field(b'C'), message: field(b'M') }
    }
}
