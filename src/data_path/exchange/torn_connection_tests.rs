//! Clients and servers that disconnect at any byte: the rest of a conversation is never taken for the
//! beginning of the next one. The server is the model of `property_tests.rs`; sessions borrow it by a short
//! form of the rules in `relay/mod.rs`.

use std::sync::Arc;

use proptest::{collection::vec, prelude::*, sample::select};

use super::{
    property_tests::{Backend, Message, Pipeline, client, exchange, parts},
    *,
};
use crate::{
    data_path::prepared::{PreparedLimits, shared_statements::SharedStatements},
    wire::outgoing::Outgoing,
};

/// A server that sessions share.
struct Shared {
    server: ServerSide,
    postgres: Backend,
    /// PostgreSQL's bytes that the session has not read.
    unread: Vec<u8>,
    /// A session holds it.
    held: bool,
}

/// A session, and the bytes that its client has received.
struct Session {
    side: ClientSide,
    inbox: Vec<u8>,
    received: Vec<u8>,
}

impl Session {
    /// The client sends bytes. They wait until there are enough to borrow the server.
    fn send(&mut self, bytes: &[u8], shared: &mut Shared) {
        if shared.held {
            return self.pass_on(bytes, shared);
        }
        self.inbox.extend_from_slice(bytes);
        let inbox = std::mem::take(&mut self.inbox);
        let rest = self.side.skip_messages(&inbox, &mut self.received).unwrap();
        if self.side.is_skipping_messages() || self.side.first_message(rest).unwrap() != FirstMessage::Request
        {
            return self.inbox.extend_from_slice(rest);
        }
        shared.held = true;
        self.pass_on(rest, shared);
    }

    fn pass_on(&mut self, bytes: &[u8], shared: &mut Shared) {
        let mut scratch = Vec::new();
        let mut out = Outgoing::new(bytes, &mut scratch);
        let flow = self.side.take(bytes, &mut shared.server, &mut out).unwrap();
        shared.unread.extend(shared.postgres.receive(out.finish()));
        assert_eq!(shared.server.has_whole_messages(), shared.postgres.half.is_empty());
        match flow {
            Flow::AwaitsReplies(rest) => {
                self.receive(usize::MAX, shared);
                self.send(&rest, shared);
            }
            Flow::Continues => self.return_if_free(shared),
            other => panic!("{other:?}"),
        }
    }

    /// The session receives `count` bytes from PostgreSQL.
    fn receive(&mut self, count: usize, shared: &mut Shared) {
        let unread: Vec<u8> = shared.unread.drain(..count.min(shared.unread.len())).collect();
        let mut scratch = Vec::new();
        let mut out = Outgoing::new(&unread, &mut scratch);
        shared.server.take(&unread, &mut self.side, &mut out, &|_, _| false).unwrap();
        self.received.extend_from_slice(out.finish());
        self.return_if_free(shared);
    }

    fn return_if_free(&mut self, shared: &mut Shared) {
        if shared.held && shared.server.replies.is_over() && shared.server.is_between_messages() {
            shared.server.checks.clear(); // as after the check
            shared.held = false;
            self.side.take_held(&mut self.inbox);
        }
    }
}

impl Shared {
    fn new() -> Self {
        let server = ServerSide::new(Default::default(), PreparedLimits { statements: 3, bytes: 100 });
        Self { server, postgres: Backend::default(), unread: Vec::new(), held: false }
    }

    /// The next session gets correct replies.
    fn serve_another_session(&mut self, table: &Arc<SharedStatements>) {
        assert!(self.server.is_reusable() && self.is_idle() && self.postgres.begun.is_none());
        let mut request = Vec::new();
        Message::Query("SELECT 1").write(&mut request);
        let received = exchange(&mut client(table, 77), &mut self.server, &mut self.postgres, &request, &[]);
        assert_eq!(Pipeline(received), Pipeline(Backend::default().receive(&request)));
        self.server.checks.clear();
    }

    fn is_idle(&self) -> bool {
        let Backend { half, copying, skipping, .. } = &self.postgres;
        half.is_empty() && copying.is_none() && !skipping && self.unread.is_empty()
    }

    /// The session has ended at any point: the server is reused, reset or closed.
    fn end(mut self, table: &Arc<SharedStatements>) {
        if self.server.is_reusable() {
            self.serve_another_session(table);
        } else if self.server.is_cleanable() {
            assert!(self.is_idle());
        }
        // Otherwise it is closed; Terminate must not be read as the rest of a message.
        assert_eq!(self.server.has_whole_messages(), self.postgres.half.is_empty());
    }
}

/// A conversation in which the client or the server sends only a part.
fn converse(sent: &[u8], cuts: &[usize], reads: &[usize]) {
    let table = Arc::new(SharedStatements::default());
    let mut shared = Shared::new();
    let mut session = Session { side: client(&table, 0), inbox: Vec::new(), received: Vec::new() };
    let mut reads = reads.iter().cycle();
    for part in parts(sent, cuts) {
        session.send(part, &mut shared);
        session.receive(*reads.next().unwrap_or(&usize::MAX), &mut shared);
        if !shared.held {
            shared.serve_another_session(&table);
        }
    }
    let mut alone = Backend::default();
    let expected = alone.receive(sent);
    assert!(
        expected.starts_with(&session.received),
        "{:?} {:?}",
        Pipeline(expected),
        Pipeline(session.received)
    );
    if shared.unread.is_empty() {
        assert_eq!(Pipeline(session.received), Pipeline(expected));
    }
    shared.end(&table);
}

fn all(sent: &[Message]) -> Vec<u8> {
    let mut bytes = Vec::new();
    sent.iter().for_each(|message| message.write(&mut bytes));
    bytes
}

const COPY: &str = "COPY t FROM STDIN";

/// Every message type, in every state of a session.
fn everything() -> Vec<u8> {
    use Message::*;
    let strays = [Data("stray"), Done, Fail, Flush];
    let copies = |end: Message| {
        let (by_query, by_batch) = ([Query(COPY)], [Parse("", COPY), Bind(""), Execute]);
        let data = [Data("good"), Flush, Data("bad"), Data("behind"), end];
        [&by_query[..], &data, &strays, &by_batch, &data, &[Sync], &by_batch, &[Sync], &data, &[Sync]]
            .concat()
    };
    let batch = [Parse("a", "SELECT 1"), Bind("a"), Describe("a"), Flush, Execute, Close("a"), Sync];
    let failing =
        [Parse("", "SELECT failing"), Bind(""), Execute, Data("stray"), Query("SELECT 1"), Call, Sync];
    let good = [
        Query(COPY),
        Data("good"),
        Data(""),
        Done,
        Parse("", COPY),
        Bind(""),
        Execute,
        Data("good"),
        Done,
        Sync,
    ];
    all(&[
        &strays[..],
        &batch,
        &failing,
        &strays,
        &[Call, Sync],
        &copies(Done),
        &copies(Fail),
        &good,
        &[Query("BEGIN"), Call],
        &strays,
        &[Query("SELECT failing"), Call, Data("stray"), Query("SELECT 1")],
        &[Query("COMMIT")],
        &strays,
        &[Query("BEGIN"), Query(COPY), Data("bad"), Data("behind"), Done, Query("COMMIT")],
        &batch,
    ]
    .concat())
}

#[test]
fn a_client_may_disconnect_at_every_byte() {
    let sent = everything();
    for end in 0..=sent.len() {
        // The last bytes arrive with the rest, or alone.
        let before = end.saturating_sub(3);
        converse(&sent[..end], &[], &[usize::MAX]);
        converse(&sent[..end], &[before], &[usize::MAX]);
        converse(&sent[..end], &[before], &[0]);
        converse(&sent[..end], &[end / 2, end.saturating_sub(20)], &[7, usize::MAX]);
    }
}

#[test]
fn a_server_may_disconnect_at_every_byte() {
    let sent = everything();
    let answered = Backend::default().receive(&sent).len();
    for end in 0..=answered {
        converse(&sent, &[], &[end]);
    }
}

fn group() -> impl Strategy<Value = Vec<Message>> {
    use Message::*;
    let stray = || select(vec![Data("stray"), Data(""), Done, Fail, Flush]);
    let texts = || select(vec!["SELECT 1", "SELECT 2", "SELECT unparsable", "SELECT failing"]);
    let names = || select(vec!["", "a", "b"]);
    let data = || vec(select(vec![Data("good"), Data("good"), Data("bad"), Data(""), Flush]), 0..4);
    let end = || select(vec![Done, Done, Fail]);
    let in_batch = prop_oneof![
        (names(), texts()).prop_map(|(name, sql)| Parse(name, sql)),
        names().prop_map(Bind),
        names().prop_map(Describe),
        names().prop_map(Close),
        Just(Execute),
        stray(),
    ];
    let alone = prop_oneof![texts().prop_map(Query), Just(Call), stray()];
    prop_oneof![
        3 => vec(in_batch, 0..6).prop_map(|sent| [sent, vec![Sync]].concat()),
        1 => vec(alone, 0..3),
        2 => (data(), end()).prop_map(|(data, end)| [vec![Query(COPY)], data, vec![end]].concat()),
        2 => (any::<bool>(), data(), end()).prop_map(|(syncs, data, end)| {
            let sync = if syncs { vec![Sync] } else { Vec::new() };
            [vec![Close("copy"), Parse("copy", COPY), Bind("copy"), Execute], sync, data, vec![end, Sync]].concat()
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn a_disconnect_leaves_no_part_of_a_message_behind(
        groups in vec(group(), 1..8),
        in_transaction in any::<bool>(),
        cuts in vec(any::<usize>(), 0..8),
        reads in vec(prop_oneof![Just(usize::MAX), 0..60usize], 1..6),
        end in any::<usize>(),
    ) {
        let mut sent = groups.concat();
        if in_transaction {
            let is_extended = |message: &Message| matches!(message, Message::Parse(..) | Message::Bind(_) | Message::Describe(_) | Message::Execute);
            if !sent.iter().any(is_extended) {
                sent = [vec![Message::Query("BEGIN")], sent, vec![Message::Query("COMMIT"), Message::Flush]].concat();
            }
        }
        let sent = all(&sent);
        converse(&sent[..end % (sent.len() + 1)], &cuts, &reads);
    }
}
