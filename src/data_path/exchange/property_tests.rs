//! Random conversations of clients that share servers, cut into random parts: each client gets what its own
//! server would have sent. The server is a model of PostgreSQL's statements and portals; `tests/model.rs`
//! uses a real one.

use std::{
    cell::Cell,
    collections::{HashMap, VecDeque},
    rc::Rc,
};

use proptest::{collection::vec, prelude::*, sample::select};

use super::*;
use crate::{
    data_path::{
        functions::FunctionEffects,
        prepared::{PreparedLimits, shared_statements::SharedStatements},
        session_state::{Settings, channels::messages},
    },
    error::ClientError,
    wire::{
        frame::{HEADER_BYTES, cstr},
        message::{Severity, append, append_cstr, ready_for_query},
        outgoing::Outgoing,
    },
};

#[derive(Debug, Clone)]
pub(super) enum Message {
    Parse(&'static str, &'static str),
    Bind(&'static str),
    Describe(&'static str),
    Execute,
    Close(&'static str),
    Flush,
    Sync,
    Query(&'static str),
    Call,
    Data(&'static str),
    Done,
    Fail,
}

impl Message {
    pub(super) fn write(&self, out: &mut Vec<u8>) {
        match self {
            Self::Parse(name, sql) => append(out, b'P', |out| {
                append_cstr(out, name.as_bytes());
                append_cstr(out, sql.as_bytes());
                out.extend_from_slice(&[0, 0]);
            }),
            Self::Bind(name) => append(out, b'B', |out| {
                append_cstr(out, b"");
                append_cstr(out, name.as_bytes());
                out.extend_from_slice(&[0; 6]);
            }),
            Self::Describe(name) => append(out, b'D', |out| {
                out.push(b'S');
                append_cstr(out, name.as_bytes());
            }),
            Self::Execute => append(out, b'E', |out| out.extend_from_slice(&[0; 5])),
            Self::Close(name) => append(out, b'C', |out| {
                out.push(b'S');
                append_cstr(out, name.as_bytes());
            }),
            Self::Flush => append(out, b'H', |_| {}),
            Self::Sync => append(out, b'S', |_| {}),
            Self::Query(sql) => append(out, b'Q', |out| append_cstr(out, sql.as_bytes())),
            Self::Call => append(out, b'F', |out| out.extend_from_slice(&[0; 10])),
            Self::Data(data) => append(out, b'd', |out| out.extend_from_slice(data.as_bytes())),
            Self::Done => append(out, b'c', |_| {}),
            Self::Fail => append(out, b'f', |out| append_cstr(out, b"why")),
        }
    }
}

/// Some texts fail in Parse, some in Execute.
const TEXTS: [&str; 6] =
    ["SELECT 1", "SELECT 2", "SELECT unparsable", "SELECT failing", "SELECT * FROM t", "ALTER TABLE t"];
const NAMES: [&str; 4] = ["", "a", "b", "c"];

fn message() -> impl Strategy<Value = Message> {
    prop_oneof![
        // An unnamed statement whose table has changed is parsed again before a later batch binds it, which a
        // real server does not do.
        3 => (select(&NAMES[..]), select(&TEXTS[..])).prop_map(|(name, sql)| match (name, sql) {
            ("", "SELECT * FROM t") => Message::Parse(name, "SELECT 1"),
            _ => Message::Parse(name, sql),
        }),
        3 => select(&NAMES[..]).prop_map(Message::Bind),
        1 => select(&NAMES[..]).prop_map(Message::Describe),
        3 => Just(Message::Execute),
        1 => select(&NAMES[..]).prop_map(Message::Close),
        1 => Just(Message::Flush),
        1 => select(&TEXTS[..]).prop_map(Message::Query),
    ]
}

/// A batch with its Sync, or a simple query.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let batch = vec(message(), 0..8).prop_map(|sent| {
        let mut bytes = Vec::new();
        sent.iter().for_each(|message| message.write(&mut bytes));
        append(&mut bytes, b'S', |_| {});
        bytes
    });
    let query = select(&TEXTS[..]).prop_map(|sql| {
        let mut bytes = Vec::new();
        Message::Query(sql).write(&mut bytes);
        bytes
    });
    prop_oneof![4 => batch, 1 => query]
}

/// One or more requests in one write.
#[derive(Clone, PartialEq)]
pub(super) struct Pipeline(pub(super) Vec<u8>);

impl std::fmt::Debug for Pipeline {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sent = messages(&self.0).map(|message| {
            let words = String::from_utf8_lossy(&message[HEADER_BYTES..]).replace('\0', " ");
            format!("{} {}", char::from(message[0]), words.trim())
        });
        f.debug_list().entries(sent).finish()
    }
}

fn pipeline() -> impl Strategy<Value = Pipeline> {
    vec(request(), 1..4).prop_map(|requests| Pipeline(requests.concat()))
}

/// A model of PostgreSQL's statements, portals, transactions and COPY.
#[derive(Debug, Default)]
pub(super) struct Backend {
    /// The received part of a message.
    pub(super) half: Vec<u8>,
    statements: HashMap<Vec<u8>, Prepared>,
    /// The text of each portal.
    portals: HashMap<Vec<u8>, Vec<u8>>,
    pub(super) skipping: bool,
    /// COPY takes data; `true`: a simple query started it.
    pub(super) copying: Option<bool>,
    /// A transaction block is open; `true`: it has failed.
    pub(super) begun: Option<bool>,
    /// The number of changes of the table so far.
    table: Rc<Cell<u32>>,
}

#[derive(Debug, Clone)]
struct Prepared {
    sql: Vec<u8>,
    /// The table's version at the Parse.
    table: u32,
}

impl Backend {
    pub(super) fn receive(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        self.half.extend_from_slice(bytes);
        let received = std::mem::take(&mut self.half);
        let mut used = 0;
        for message in messages(&received) {
            self.message(message[0], &message[HEADER_BYTES..], &mut out);
            used += message.len();
        }
        self.half = received[used..].to_vec();
        out
    }

    fn ready(&self, out: &mut Vec<u8>) {
        ready_for_query(out, self.begun.map_or(b'I', |failed| if failed { b'E' } else { b'T' }));
    }

    fn failed(&mut self, out: &mut Vec<u8>) {
        self.begun = self.begun.map(|_| true);
        error(out);
    }

    fn copy(&mut self, is_query: bool, tag: u8, body: &[u8], out: &mut Vec<u8>) {
        match tag {
            b'd' if body == b"bad" => self.failed(out),
            b'f' => self.failed(out),
            b'c' => append(out, b'C', |out| append_cstr(out, b"COPY 1")),
            b'd' | b'S' | b'H' => return,
            tag => panic!("a {} in the middle of a COPY", char::from(tag)),
        }
        self.copying = None;
        match is_query {
            true => self.ready(out),
            false => self.skipping = tag != b'c',
        }
    }

    fn message(&mut self, tag: u8, mut body: &[u8], out: &mut Vec<u8>) {
        if let Some(is_query) = self.copying {
            return self.copy(is_query, tag, body, out);
        }
        if tag == b'S' {
            self.skipping = false;
            self.portals.clear();
            return self.ready(out);
        }
        if self.skipping {
            return;
        }
        let done = match tag {
            b'P' => {
                let name = cstr(&mut body).unwrap().to_vec();
                let taken = !name.is_empty() && self.statements.contains_key(&name);
                if name.is_empty() {
                    self.statements.remove(&name);
                }
                let sql = cstr(&mut body).unwrap().to_vec();
                (!taken && sql != b"SELECT unparsable").then(|| {
                    self.statements.insert(name, Prepared { sql, table: self.table.get() });
                    append(out, b'1', |_| {});
                })
            }
            b'B' => {
                let portal = cstr(&mut body).unwrap().to_vec();
                self.portals.remove(&portal);
                self.valid(cstr(&mut body).unwrap(), out).map(|bound| {
                    self.portals.insert(portal, bound.sql);
                    append(out, b'2', |_| {});
                })
            }
            b'D' => self.valid(cstr(&mut &body[1..]).unwrap(), out).map(|described| {
                append(out, b't', |out| out.extend_from_slice(&[0, 0]));
                append(out, b'T', |out| {
                    out.extend_from_slice(&[0, 1]);
                    append_cstr(out, &described.sql);
                    out.extend_from_slice(&[0; 6]);
                    out.extend_from_slice(
                        &if described.is_of_table() { described.table } else { 0 }.to_be_bytes(),
                    );
                    out.extend_from_slice(&[0; 8]);
                });
            }),
            b'C' => {
                let name = cstr(&mut &body[1..]).unwrap();
                match body[0] {
                    b'P' => drop(self.portals.remove(name)),
                    _ => drop(self.statements.remove(name)),
                }
                append(out, b'3', |_| {});
                Some(())
            }
            b'E' => {
                let sql = self.portals.get(cstr(&mut body).unwrap()).cloned();
                sql.and_then(|sql| self.run(&sql, false, out))
            }
            b'Q' => {
                self.statements.remove(&b""[..]);
                self.portals.remove(&b""[..]);
                if self.run(cstr(&mut body).unwrap(), true, out).is_none() {
                    self.failed(out);
                }
                return if self.copying.is_none() {
                    self.ready(out)
                };
            }
            b'F' => {
                match self.begun {
                    Some(true) => self.failed(out),
                    _ => append(out, b'V', |out| out.extend_from_slice(&[0xff; 4])),
                }
                return self.ready(out);
            }
            b'H' | b'd' | b'c' | b'f' => Some(()),
            tag => panic!("a message of type {tag}"),
        };
        if done.is_none() {
            if !self.skipping {
                self.failed(out);
            }
            self.skipping = true;
        }
    }

    /// The statement of that name, unless the table has changed since its Parse.
    fn valid(&mut self, name: &[u8], out: &mut Vec<u8>) -> Option<Prepared> {
        let found = self.statements.get(name)?;
        if found.is_of_table() && found.table != self.table.get() {
            ClientError::ResultChanged.write(Severity::Error, out);
            self.skipping = true;
            return None;
        }
        Some(found.clone())
    }

    fn run(&mut self, sql: &[u8], is_query: bool, out: &mut Vec<u8>) -> Option<()> {
        match sql {
            b"COMMIT" => self.begun = None,
            _ if self.begun == Some(true) => return None,
            b"BEGIN" => self.begun = Some(false),
            b"COPY t FROM STDIN" => {
                self.copying = Some(is_query);
                append(out, b'G', |out| out.extend_from_slice(&[0; 3]));
                return Some(());
            }
            b"ALTER TABLE t" => self.table.set(self.table.get() + 1),
            _ => {}
        }
        (sql != b"SELECT failing" && sql != b"SELECT unparsable").then(|| {
            append(out, b'D', |out| out.extend_from_slice(sql));
            append(out, b'C', |out| append_cstr(out, b"SELECT 1"));
        })
    }
}

impl Prepared {
    fn is_of_table(&self) -> bool {
        self.sql == b"SELECT * FROM t"
    }
}

fn error(out: &mut Vec<u8>) {
    append(out, b'E', |out| out.extend_from_slice(b"VERROR\0C00000\0\0"));
}

pub(super) fn client(table: &std::sync::Arc<SharedStatements>, number: u64) -> ClientSide {
    let rules = SessionRules {
        follow: true,
        shared_statements: table.clone(),
        functions: std::sync::Arc::new(FunctionEffects::without_functions()),
        inspect_bytes_max: 1 << 20,
        statements_max: 100,
        statements_bytes_max: 1 << 20,
        unanswered_max: 1000,
        settings_max: 100,
        settings_bytes_max: 1 << 20,
        ..SessionRules::default()
    };
    ClientSide::new(rules, std::sync::Arc::<Settings>::default(), (number + 1) << 32)
}

/// The parts of `bytes` between `cuts`.
pub(super) fn parts<'b>(bytes: &'b [u8], cuts: &[usize]) -> VecDeque<&'b [u8]> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    cuts.windows(2).map(|part| &bytes[part[0]..part[1]]).filter(|part| !part.is_empty()).collect()
}

/// Sends one client's request to one server, and returns what the client gets.
pub(super) fn exchange(
    client: &mut ClientSide,
    server: &mut ServerSide,
    backend: &mut Backend,
    request: &[u8],
    cuts: &[usize],
) -> Vec<u8> {
    let (mut scratch, mut forwarded, mut received) = (Vec::new(), Vec::new(), Vec::new());
    let mut answer = |forwarded: &mut Vec<u8>, client: &mut ClientSide, server: &mut ServerSide| {
        let replies = backend.receive(&std::mem::take(forwarded));
        let mut scratch = Vec::new();
        for part in parts(&replies, cuts) {
            let mut out = Outgoing::new(part, &mut scratch);
            server.take(part, client, &mut out, &|_, _| false).unwrap();
            received.extend_from_slice(out.finish());
        }
        backend.skipping
    };
    let mut sent: VecDeque<_> = parts(request, cuts).into_iter().map(<[u8]>::to_vec).collect();
    while let Some(part) = sent.pop_front() {
        let mut out = Outgoing::new(&part, &mut scratch);
        let flow = client.take(&part, server, &mut out).unwrap();
        forwarded.extend_from_slice(out.finish());
        if let Flow::AwaitsReplies(rest) = flow {
            sent.push_front(rest);
            answer(&mut forwarded, client, server);
            assert!(!server.replies.is_awaited());
        } else if part.len() % 2 == 0 && server.is_between_messages() {
            // Another session could get the server now.
            assert!(!answer(&mut forwarded, client, server) || !server.replies.is_over());
        }
    }
    answer(&mut forwarded, client, server);
    assert!(server.replies.is_over() && server.is_between_messages() && !client.mid_message());
    received
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn clients_that_share_servers_get_the_replies_of_their_own_server(
        requests in vec((0..3usize, 0..2usize, pipeline(), vec(any::<usize>(), 0..4)), 1..25),
        capacity in 1..4usize,
    ) {
        let table = std::sync::Arc::new(SharedStatements::default());
        let mut serial = 0..;
        let mut clients: Vec<_> = (0..3).map(|_| client(&table, serial.next().unwrap())).collect();
        let (own, shared) = (Rc::default(), Rc::default());
        let backend = |table: &Rc<Cell<u32>>| Backend { table: table.clone(), ..Backend::default() };
        let mut alone: Vec<_> = (0..3).map(|_| backend(&own)).collect();
        let mut servers: Vec<_> =
            (0..2).map(|_| (ServerSide::new(Default::default(), PreparedLimits { statements: capacity, bytes: 100 }), backend(&shared))).collect();
        for (who, at, request, cuts) in requests {
            let (server, postgres) = &mut servers[at];
            let received = exchange(&mut clients[who], server, postgres, &request.0, &cuts);
            prop_assert_eq!(Pipeline(received), Pipeline(alone[who].receive(&request.0)));
            // The pool resets this server before another session gets it: both models start again.
            if !server.replies.pins().is_empty() {
                (*server, *postgres) = (ServerSide::new(Default::default(), PreparedLimits { statements: capacity, bytes: 100 }), backend(&shared));
                (clients[who], alone[who]) = (client(&table, serial.next().unwrap()), backend(&own));
            }
        }
    }

    #[test]
    fn bytes_of_any_kind_from_either_side_never_panic(
        requests in vec(request(), 0..4),
        garbage in vec(any::<u8>(), 0..60),
        tags in vec((select(&b"QPBDCESHdcfFX123sntTDCEIZGHVNASKR"[..]), vec(any::<u8>(), 0..20)), 0..6),
        first in any::<bool>(),
    ) {
        let table = std::sync::Arc::new(SharedStatements::default());
        let (mut client, mut server) = (client(&table, 0), ServerSide::new(Default::default(), PreparedLimits { statements: 2, bytes: 100 }));
        let (mut scratch, mut bytes) = (Vec::new(), requests.concat());
        for (tag, body) in tags {
            append(&mut bytes, tag, |out| out.extend_from_slice(&body));
        }
        bytes.extend(garbage);
        for of_client in [first, !first] {
            let mut out = Outgoing::new(&bytes, &mut scratch);
            if of_client {
                drop(client.take(&bytes, &mut server, &mut out));
            } else {
                drop(server.take(&bytes, &mut client, &mut out, &|_, _| false));
            }
        }
    }

    #[test]
    fn rows_that_come_together_are_passed_as_one_by_one(
        requests in vec(request(), 1..4),
        replies in vec((select(&b"TDDDdCCZ12E"[..]), vec(select(&b"DPS\0\x01"[..]), 0..9)), 0..12),
        part in 1..12usize,
    ) {
        let mut stream = Vec::new();
        for (tag, body) in &replies {
            append(&mut stream, *tag, |out| out.extend_from_slice(if *tag == b'Z' { b"I" } else { body }));
        }
        let receive = |parts: &mut dyn Iterator<Item = &[u8]>| {
            let table = std::sync::Arc::new(SharedStatements::default());
            let mut client = client(&table, 0);
            let mut server =
                ServerSide::new(Default::default(), PreparedLimits { statements: 2, bytes: 100 });
            let (mut scratch, bytes) = (Vec::new(), requests.concat());
            let sent = client.take(&bytes, &mut server, &mut Outgoing::new(&bytes, &mut scratch));
            drop(sent);
            let mut received = Vec::new();
            for part in parts {
                let mut out = Outgoing::new(part, &mut scratch);
                if server.take(part, &mut client, &mut out, &|_, _| false).is_err() {
                    return None;
                }
                received.extend_from_slice(out.finish());
            }
            Some((received, server.replies.pending(), server.is_between_messages()))
        };
        prop_assert_eq!(receive(&mut stream.chunks(part)), receive(&mut std::iter::once(&stream[..])));
    }
}
