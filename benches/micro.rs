//! What our own code on the way of a message costs: of the some 14 µs that a transaction takes, this is the part that is
//! not the kernel's. One transaction there and back should stay below a microsecond.
//!
//! The pool's budget is not here: its part of a transaction is one load, the rest happens when servers are opened.
#![allow(clippy::unwrap_used, reason = "a measurement that meets something unexpected ends, loudly")]

use std::sync::Arc;

use divan::{Bencher, black_box, counter::BytesCount};
use pglobby::{
    data_path::{
        exchange::{
            ClientSide, ServerSide, SessionRules,
            pending_replies::{Origin, ReplyTracker, Request},
        },
        functions::FunctionEffects,
        prepared::{PreparedLimits, ServerStatements, shared_statements::SharedStatements},
        session_state::Settings,
    },
    wire::{
        frame::{Framer, Need},
        message::{append, append_cstr},
        outgoing::Outgoing,
    },
};

#[global_allocator]
static ALLOCATOR: divan::AllocProfiler<std::alloc::System> = divan::AllocProfiler::system();

fn main() {
    divan::main();
}

const SELECT: &[u8] = b"SELECT abalance FROM pgbench_accounts WHERE aid = $1";

fn message(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    append(&mut bytes, tag, |out| parts.iter().for_each(|part| out.extend_from_slice(part)));
    bytes
}

fn string(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    append_cstr(&mut bytes, text);
    bytes
}

/// What a client sends and a server answers, as pgbench has it in each of its modes.
struct Conversation {
    request: Vec<u8>,
    reply: Vec<u8>,
}

fn rows_and_end() -> Vec<u8> {
    let row = message(b'D', &[&[0, 1, 0, 0, 0, 4], b"4711"]);
    [row, message(b'C', &[b"SELECT 1\0"]), message(b'Z', &[b"I"])].concat()
}

fn description() -> Vec<u8> {
    message(b'T', &[&[0, 1], b"abalance\0", &[0; 18]])
}

fn simple() -> Conversation {
    Conversation {
        request: message(b'Q', &[&string(b"SELECT abalance FROM pgbench_accounts WHERE aid = 4711;")]),
        reply: [description(), rows_and_end()].concat(),
    }
}

/// Bind, Describe, Execute and Sync of the statement `name`.
fn bound(name: &[u8]) -> Vec<u8> {
    [
        message(b'B', &[b"\0", &string(name), &[0, 0, 0, 1, 0, 0, 0, 4], b"4711", &[0, 0]]),
        message(b'D', &[b"P\0"]),
        message(b'E', &[b"\0", &[0; 4]]),
        message(b'S', &[]),
    ]
    .concat()
}

fn extended() -> Conversation {
    let parse = message(b'P', &[b"\0", &string(SELECT), &[0, 0]]);
    let done = [message(b'1', &[]), message(b'2', &[])].concat();
    Conversation {
        request: [parse, bound(b"")].concat(),
        reply: [done, description(), rows_and_end()].concat(),
    }
}

fn prepared() -> Conversation {
    Conversation {
        request: bound(b"P_0"),
        reply: [message(b'2', &[]), description(), rows_and_end()].concat(),
    }
}

/// A session and the servers it meets.
struct Table {
    client: ClientSide,
    table: Arc<SharedStatements>,
    scratch: Vec<u8>,
}

impl Table {
    fn new() -> Self {
        let table = Arc::new(SharedStatements::default());
        let rules = SessionRules {
            follow: true,
            shared_statements: table.clone(),
            functions: Arc::new(FunctionEffects::without_functions()),
            inspect_bytes_max: 1 << 20,
            statements_max: 1000,
            settings_max: 256,
            ..SessionRules::for_discarded_replies(&table)
        };
        Self { client: ClientSide::new(rules, Arc::default(), 1 << 32), table, scratch: Vec::new() }
    }

    fn server() -> ServerSide {
        ServerSide::new(Default::default(), PreparedLimits { statements: 200, bytes: 1 << 20 })
    }

    /// There and back; the bytes written.
    fn talk(&mut self, server: &mut ServerSide, request: &[u8], reply: &[u8]) -> usize {
        let mut out = Outgoing::new(request, &mut self.scratch);
        self.client.take(request, server, &mut out).unwrap();
        let there = out.finish().len();
        let mut out = Outgoing::new(reply, &mut self.scratch);
        server.take(reply, &mut self.client, &mut out, &|_, _| false).unwrap();
        there + out.finish().len()
    }

    fn prepare(&mut self, server: &mut ServerSide) {
        let parse = [message(b'P', &[b"P_0\0", &string(SELECT), &[0, 0]]), message(b'S', &[])].concat();
        let done = [message(b'1', &[]), message(b'Z', &[b"I"])].concat();
        self.talk(server, &parse, &done);
    }
}

#[divan::bench(args = ["simple", "extended", "prepared"])]
fn transaction(bencher: Bencher<'_, '_>, mode: &str) {
    let (mut table, mut server) = (Table::new(), Table::server());
    let talk = match mode {
        "simple" => simple(),
        "extended" => extended(),
        _ => prepared(),
    };
    table.prepare(&mut server);
    bencher.bench_local(|| table.talk(&mut server, black_box(&talk.request), black_box(&talk.reply)));
}

/// The statement is put in front, and its reply left out.
#[divan::bench]
fn prepared_on_a_server_that_lacks_the_statement(bencher: Bencher<'_, '_>) {
    let (mut table, talk) = (Table::new(), prepared());
    table.prepare(&mut Table::server());
    let reply = [message(b'1', &[]), talk.reply].concat();
    bencher
        .with_inputs(Table::server)
        .bench_local_refs(|server| table.talk(server, black_box(&talk.request), black_box(&reply)));
}

/// Another client prepares what is known already.
#[divan::bench]
fn parse_of_a_known_statement(bencher: Bencher<'_, '_>) {
    let (mut table, mut server) = (Table::new(), Table::server());
    let request = [message(b'P', &[b"\0", &string(SELECT), &[0, 0]]), message(b'S', &[])].concat();
    let reply = [message(b'1', &[]), message(b'Z', &[b"I"])].concat();
    table.prepare(&mut server);
    bencher.bench_local(|| table.talk(&mut server, black_box(&request), black_box(&reply)));
    assert!(Arc::strong_count(&table.table) > 1);
}

/// A statement for which a full server gives up the one used least recently.
#[divan::bench(args = [200, 10_000])]
fn statement_on_a_full_server(bencher: Bencher<'_, '_>, statements: usize) {
    let table = SharedStatements::default();
    let under = table.settings.of(&Settings::default());
    let text = |number| format!("SELECT {number}\0\0\0");
    let all: Vec<_> = (0..=statements)
        .map(|number| table.intern(text(number).as_bytes(), &under, Default::default))
        .collect();
    let mut server = ServerStatements::new(PreparedLimits { statements, bytes: usize::MAX });
    let mut next = all.iter().cycle();
    bencher.bench_local(|| {
        if let Some(oldest) = server.to_evict(1, 0, u64::MAX).and_then(|id| server.get(id).cloned()) {
            server.remove(&oldest);
        }
        server.queued(next.next().unwrap(), 1);
    });
}

/// A new text, a list of values.
#[divan::bench(args = [1_000, 8_000, 16_000, 500_000])]
fn text_of_a_statement(bencher: Bencher<'_, '_>, bytes: usize) {
    let table = SharedStatements::default();
    let under = table.settings.of(&Settings::default());
    let mut text = b"SELECT id FROM orders WHERE id IN (0".to_vec();
    let mut value = 1_u64;
    while text.len() < bytes {
        value = value * 7_919_993 % 10_000_019;
        text.extend_from_slice(format!(", {value}").as_bytes());
    }
    text.extend_from_slice(b")\0\0\0");
    bencher
        .counter(BytesCount::new(text.len()))
        .bench_local(|| table.intern(black_box(&text), &under, Default::default));
}

/// A read full of rows of this many bytes.
#[divan::bench(args = [8, 100, 1000])]
fn rows_through_the_exchange(bencher: Bencher<'_, '_>, row_bytes: usize) {
    let (mut table, mut server) = (Table::new(), Table::server());
    let row = message(b'D', &[&vec![b'x'; row_bytes]]);
    let rows = row.repeat(48 * 1024 / row.len());
    let (request, begin, end) = (simple().request, description(), message(b'C', &[b"SELECT 1\0"]));
    table.talk(&mut server, &request, &begin);
    bencher
        .counter(BytesCount::new(rows.len()))
        .bench_local(|| table.talk(&mut server, &[], black_box(&rows)));
    table.talk(&mut server, &[], &end);
}

#[divan::bench(args = [8, 100, 1000])]
fn frame_scan(bencher: Bencher<'_, '_>, row_bytes: usize) {
    let row = message(b'D', &[&vec![b'x'; row_bytes]]);
    let rows = row.repeat(48 * 1024 / row.len());
    let mut framer = Framer::default();
    bencher.counter(BytesCount::new(rows.len())).bench_local(|| {
        let (mut chunk, mut count) = (black_box(rows.as_slice()), 0);
        while framer.next(&mut chunk, |_, _| Ok(Need::Header)).unwrap().is_some() {
            count += 1;
        }
        count
    });
}

/// A name is changed in a read of several messages: what that makes of the one write.
#[divan::bench(args = [1, 20])]
fn outgoing_with_a_change(bencher: Bencher<'_, '_>, messages: usize) {
    let one = message(b'B', &[b"\0P_0\0", &[0; 40]]);
    let chunk = one.repeat(messages);
    let mut scratch = Vec::new();
    bencher.bench_local(|| {
        let mut out = Outgoing::new(black_box(&chunk), &mut scratch);
        for part in chunk.chunks(one.len()) {
            out.pass(&part[..6]);
            out.build().extend_from_slice(b"pglobby_1");
            out.pass(&part[9..]);
        }
        out.finish().len()
    });
}

#[divan::bench]
fn lease_of_a_simple_query(bencher: Bencher<'_, '_>) {
    let mut lease = ReplyTracker::default();
    bencher.bench_local(|| {
        let lease = black_box(&mut lease);
        let asked = lease.track(Request::Query(None), Origin::Client);
        for tag in [b'T', b'D', b'C'] {
            lease.reply(tag).unwrap();
        }
        (asked, lease.ready(b'I'), lease.is_over())
    });
}

/// What is compared where session and server differ in a setting.
#[divan::bench]
fn settings_compared(bencher: Bencher<'_, '_>) {
    let settings = || {
        let names = ["application_name", "search_path", "TimeZone", "statement_timeout"];
        Arc::new(Settings::new(names.map(|name| (name.to_owned(), "value".to_owned()))))
    };
    let (ours, theirs) = (settings(), settings());
    bencher.bench_local(|| black_box(&ours) == black_box(&theirs));
}
