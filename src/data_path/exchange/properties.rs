//! Any conversation, cut anywhere, between clients that share servers: each client hears what a server of its own would have
//! said. The server here is a model of what PostgreSQL does with statements and portals; what a real one does is in
//! `tests/model.rs`.

use std::collections::{HashMap, VecDeque};

use proptest::{collection::vec, prelude::*, sample::select};

use super::*;
use crate::{
    data_path::{
        catalogue::Catalogue, channels::messages, choice::Stance, prepared::StatementTable,
        session_state::Settings,
    },
    wire::{
        frame::{HEADER_BYTES, cstr},
        message::{append, append_cstr, ready_for_query},
        outgoing::Outgoing,
    },
};

/// What a client says, one message each.
#[derive(Debug, Clone)]
enum Say {
    Parse(&'static str, &'static str),
    Bind(&'static str),
    Describe(&'static str),
    Execute,
    Close(&'static str),
    Flush,
    Query(&'static str),
}

impl Say {
    fn write(&self, out: &mut Vec<u8>) {
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
            Self::Query(sql) => append(out, b'Q', |out| append_cstr(out, sql.as_bytes())),
        }
    }
}

/// Texts of which some fail when they are parsed, some when they are executed.
const TEXTS: [&str; 4] = ["SELECT 1", "SELECT 2", "SELECT unparsable", "SELECT failing"];
const NAMES: [&str; 4] = ["", "a", "b", "c"];

fn say() -> impl Strategy<Value = Say> {
    prop_oneof![
        3 => (select(&NAMES[..]), select(&TEXTS[..])).prop_map(|(name, sql)| Say::Parse(name, sql)),
        3 => select(&NAMES[..]).prop_map(Say::Bind),
        1 => select(&NAMES[..]).prop_map(Say::Describe),
        3 => Just(Say::Execute),
        1 => select(&NAMES[..]).prop_map(Say::Close),
        1 => Just(Say::Flush),
    ]
}

/// A batch with its Sync, or a simple query.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let batch = vec(say(), 0..8).prop_map(|said| {
        let mut bytes = Vec::new();
        said.iter().for_each(|say| say.write(&mut bytes));
        append(&mut bytes, b'S', |_| {});
        bytes
    });
    let query = select(&TEXTS[..]).prop_map(|sql| {
        let mut bytes = Vec::new();
        Say::Query(sql).write(&mut bytes);
        bytes
    });
    prop_oneof![4 => batch, 1 => query]
}

/// What PostgreSQL does with statements and portals.
#[derive(Debug, Default)]
struct Backend {
    statements: HashMap<Vec<u8>, Vec<u8>>,
    portal: Option<Vec<u8>>,
    skipping: bool,
}

impl Backend {
    fn hear(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for message in messages(bytes) {
            self.message(message[0], &message[HEADER_BYTES..], &mut out);
        }
        out
    }

    fn message(&mut self, tag: u8, mut body: &[u8], out: &mut Vec<u8>) {
        if tag == b'S' {
            (self.skipping, self.portal) = (false, None);
            return ready_for_query(out, b'I');
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
                    self.statements.insert(name, sql);
                    append(out, b'1', |_| {});
                })
            }
            b'B' => {
                cstr(&mut body).unwrap();
                self.portal = self.statements.get(cstr(&mut body).unwrap()).cloned();
                self.portal.as_ref().map(|_| append(out, b'2', |_| {}))
            }
            b'D' => self.statements.get(cstr(&mut &body[1..]).unwrap()).map(|sql| {
                append(out, b't', |out| out.extend_from_slice(sql));
                append(out, b'n', |_| {});
            }),
            b'C' => {
                self.statements.remove(cstr(&mut &body[1..]).unwrap());
                append(out, b'3', |_| {});
                Some(())
            }
            b'E' => self.portal.clone().and_then(|sql| run(&sql, out)),
            b'Q' => {
                self.statements.remove(&b""[..]);
                if run(cstr(&mut body).unwrap(), out).is_none() {
                    error(out);
                }
                return ready_for_query(out, b'I');
            }
            _ => Some(()),
        };
        if done.is_none() {
            error(out);
            self.skipping = true;
        }
    }
}

fn run(sql: &[u8], out: &mut Vec<u8>) -> Option<()> {
    (sql != b"SELECT failing" && sql != b"SELECT unparsable").then(|| {
        append(out, b'D', |out| out.extend_from_slice(sql));
        append(out, b'C', |out| append_cstr(out, b"SELECT 1"));
    })
}

fn error(out: &mut Vec<u8>) {
    append(out, b'E', |out| out.extend_from_slice(b"VERROR\0C00000\0\0"));
}

fn client(table: &std::sync::Arc<StatementTable>, number: u64) -> ClientSide {
    let rules = Rules {
        follow: true,
        chooses: false,
        stance: Stance::AtHome,
        table: table.clone(),
        catalogue: std::sync::Arc::new(Catalogue::without_functions()),
        inspect_bytes_max: 1 << 20,
        statements_max: 100,
        settings_max: 100,
    };
    ClientSide::new(rules, std::sync::Arc::<Settings>::default(), (number + 1) << 32)
}

/// The parts of `bytes` between `cuts`.
fn parts<'b>(bytes: &'b [u8], cuts: &[usize]) -> VecDeque<&'b [u8]> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    cuts.windows(2).map(|part| &bytes[part[0]..part[1]]).filter(|part| !part.is_empty()).collect()
}

/// One client's request to one server, and what the client hears.
fn exchange(
    client: &mut ClientSide,
    server: &mut ServerSide,
    backend: &mut Backend,
    request: &[u8],
    cuts: &[usize],
) -> Vec<u8> {
    let (mut scratch, mut forwarded, mut heard) = (Vec::new(), Vec::new(), Vec::new());
    for part in parts(request, cuts) {
        let mut out = Outgoing::new(part, &mut scratch);
        client.take(part, server, &mut out).unwrap();
        forwarded.extend_from_slice(out.finish());
    }
    let replies = backend.hear(&forwarded);
    for part in parts(&replies, cuts) {
        let mut out = Outgoing::new(part, &mut scratch);
        server.take(part, client, &mut out).unwrap();
        heard.extend_from_slice(out.finish());
    }
    assert!(server.lease.is_over() && server.at_boundary() && !client.mid_message());
    heard
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn clients_that_share_servers_hear_what_a_server_of_their_own_would_say(
        talk in vec((0..3usize, 0..2usize, request(), vec(any::<usize>(), 0..4)), 1..25),
        capacity in 1..4usize,
    ) {
        let table = std::sync::Arc::new(StatementTable::default());
        let mut serial = 0..;
        let mut clients: Vec<_> = (0..3).map(|_| client(&table, serial.next().unwrap())).collect();
        let mut alone: Vec<_> = (0..3).map(|_| Backend::default()).collect();
        let mut servers: Vec<_> =
            (0..2).map(|_| (ServerSide::new(Vec::new(), capacity), Backend::default())).collect();
        for (who, whence, request, cuts) in talk {
            let (server, backend) = &mut servers[whence];
            let heard = exchange(&mut clients[who], server, backend, &request, &cuts);
            prop_assert_eq!(&heard, &alone[who].hear(&request));
            // An unnamed statement that outlives a batch in which its successor was skipped is given up: no driver has it so.
            if messages(&heard).any(|message| message[0] == b'E') {
                let mut query = Vec::new();
                Say::Query("SELECT 1").write(&mut query);
                prop_assert_eq!(exchange(&mut clients[who], server, backend, &query, &[]), alone[who].hear(&query));
            }
            // Nobody else would get this server before the session ends, and then it is cleaned: both begin anew.
            if !server.lease.pins.is_empty() {
                (*server, *backend) = (ServerSide::new(Vec::new(), capacity), Backend::default());
                (clients[who], alone[who]) = (client(&table, serial.next().unwrap()), Backend::default());
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
        let table = std::sync::Arc::new(StatementTable::default());
        let (mut client, mut server) = (client(&table, 0), ServerSide::new(Vec::new(), 2));
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
                drop(server.take(&bytes, &mut client, &mut out));
            }
        }
    }
}
