//! Two clients that share two servers, which keep to PostgreSQL's protocol. The fuzzer chooses the messages, their cuts,
//! and the outcome of each request.
//!
//! What must hold: no reply of such a server is taken for out of step. What the proxy believes of a server is what the
//! server does: which replies it owes, whether it skips, takes COPY data or has an open batch. A server is free only if
//! it is idle, and no client waits for a reply that does not come. Each client gets the replies of its own requests, and
//! no others. How the bytes are cut changes nothing.

use std::sync::Arc;

use super::postgres::Postgres;
use crate::{
    data_path::{
        exchange::{
            ClientSide, ExchangeError, FirstMessage, Flow, ServerSide, SessionRules,
            pending_replies::{Origin, ReplyTracker, Request},
            return_to_tenant::CurrentTenant,
        },
        functions::FunctionEffects,
        prepared::{PreparedLimits, shared_statements::SharedStatements},
        session_state::channels::messages,
    },
    error::TenantSwitchError,
    wire::{
        frame::HEADER_BYTES,
        message::{append, append_cstr},
        outgoing::Outgoing,
        server_error::is_fatal,
    },
};

const NAMES: [&[u8]; 6] = [b"", b"a", b"b", b"A", b"pglobby_1", b"pglobby__"];

#[rustfmt::skip]
const TEXTS: [&[u8]; 48] = [
    b"SELECT 1", b"SELECT 2", b"SELECT * FROM t", b"", b";", b"BEGIN", b"COMMIT", b"ROLLBACK", b"SELECT 1; SELECT 2; SELECT 3",
    b"COPY t FROM STDIN", b"COPY t TO STDOUT", b"SET search_path = a", b"SET LOCAL search_path = a", b"SET a.b = 'c'",
    b"RESET ALL", b"DISCARD ALL", b"DISCARD SEQUENCES", b"SELECT set_config('a.b', 'c', false)", b"SET ROLE x",
    b"PREPARE a AS SELECT 1", b"PREPARE b AS SELECT 2; EXECUTE b", b"EXECUTE a", b"DEALLOCATE a", b"DEALLOCATE ALL",
    b"DEALLOCATE a; PREPARE a AS SELECT 3", b"EXPLAIN EXECUTE a", b"CREATE TABLE t AS EXECUTE a",
    b"SELECT * FROM pg_prepared_statements", b"LISTEN a", b"UNLISTEN *", b"NOTIFY a", b"SELECT nextval('s')",
    b"SELECT currval('s')", b"SELECT lastval()", b"DECLARE c CURSOR WITH HOLD FOR SELECT 1", b"FETCH c",
    b"CREATE TEMP TABLE x ()", b"CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'", b"SELECT f()",
    b"SELECT pg_terminate_backend(1)", b"SET pglobby.tenant = 'acme'", b"RESET pglobby.tenant", b"SHOW pglobby.tenant",
    b"ALTER ROLE CURRENT_USER PASSWORD 'x'", b"BEGIN; SET LOCAL pglobby.tenant = 'acme'", b"INSERT INTO t VALUES ($1)",
    b"DO $$ BEGIN EXECUTE 'DEALLOCATE ALL'; END $$", b"SELECT pg_advisory_lock(1)",
];

/// The flag for servers that keep one statement each.
const FEW_STATEMENTS: u8 = 32;

/// Reads the fuzzer's bytes. After their end all are zero.
struct Choices<'b>(&'b [u8]);

impl<'b> Choices<'b> {
    fn byte(&mut self) -> u8 {
        let Some((byte, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *byte
    }

    fn part(&mut self) -> &'b [u8] {
        let length = usize::from(self.byte());
        let (part, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        part
    }

    fn name(&mut self) -> &'static [u8] {
        NAMES[usize::from(self.byte()) % NAMES.len()]
    }

    /// One of our texts, or one of the fuzzer's own.
    fn text(&mut self) -> &'b [u8] {
        match self.byte() {
            0xff => self.part(),
            known => TEXTS[usize::from(known) % TEXTS.len()],
        }
    }
}

/// What the fuzzer has chosen.
enum Step {
    /// The client writes these bytes.
    Send(Vec<u8>),
    /// The server answers so many messages.
    Answer(u8),
    /// Another client uses another server, if neither is busy.
    Switch(u8),
    /// The session has other settings from now on.
    Set(u8),
    /// The server says something on its own.
    Report(u8),
}

fn message(kind: u8, choices: &mut Choices<'_>, out: &mut Vec<u8>) {
    match kind {
        0 => append(out, b'P', |out| {
            append_cstr(out, choices.name());
            append_cstr(out, choices.text());
            out.extend_from_slice(&[0, 0]);
        }),
        1 => append(out, b'B', |out| {
            append_cstr(out, choices.name());
            append_cstr(out, choices.name());
            out.extend_from_slice(&[0; 6]);
        }),
        2 => append(out, b'E', |out| {
            append_cstr(out, choices.name());
            out.extend_from_slice(&[0, 0, 0, choices.byte()]);
        }),
        3 => append(out, b'S', |_| {}),
        4 => append(out, b'Q', |out| append_cstr(out, choices.text())),
        5 | 6 => append(out, if kind == 5 { b'D' } else { b'C' }, |out| {
            out.push(if choices.byte() & 1 == 0 { b'S' } else { b'P' });
            append_cstr(out, choices.name());
        }),
        7 => append(out, b'H', |_| {}),
        8 => append(out, b'F', |out| out.extend_from_slice(&[0; 10])),
        9 => append(out, b'd', |out| out.extend_from_slice(choices.part())),
        10 => append(out, b'c', |_| {}),
        _ => append(out, b'f', |out| append_cstr(out, b"why")),
    }
}

fn steps(mut choices: Choices<'_>) -> Vec<Step> {
    let (mut steps, mut bytes) = (Vec::new(), Vec::new());
    while !choices.0.is_empty() && steps.len() < 200 {
        let kind = choices.byte();
        match kind & 0x1f {
            kind @ 0..12 => message(kind, &mut choices, &mut bytes),
            // Bodies and types of any kind.
            12 => append(&mut bytes, b"PBDCQEF"[usize::from(choices.byte()) % 7], |out| {
                out.extend_from_slice(choices.part());
            }),
            _ => {}
        }
        // A message that is not sent yet goes out with the next one.
        if kind & 0x80 == 0 || choices.0.is_empty() {
            steps.push(Step::Send(std::mem::take(&mut bytes)));
        }
        match kind & 0x1f {
            13..18 => steps.push(Step::Answer(choices.byte())),
            18 => steps.push(Step::Switch(choices.byte())),
            19 => steps.push(Step::Set(choices.byte())),
            20 => steps.push(Step::Report(choices.byte())),
            _ => {}
        }
    }
    steps
}

/// A client.
struct Session {
    side: ClientSide,
    /// Bytes that wait for a server.
    inbox: Vec<u8>,
    /// The replies that the client expects.
    expects: ReplyTracker,
    /// The bytes that it has received and not read yet, and all before them.
    received: Vec<u8>,
    told: Vec<u8>,
}

/// A server with its proxy's side.
struct Shared {
    side: ServerSide,
    postgres: Postgres,
    received: Vec<u8>,
    held: bool,
}

struct Conversation<'b> {
    sessions: [Session; 2],
    servers: [Shared; 2],
    /// The client and the server that talk now.
    at: (usize, usize),
    outcomes: &'b [u8],
    answered: usize,
    /// Each write and read is cut after so many bytes.
    cut: usize,
    /// Messages of the client wait for replies.
    waits: bool,
}

/// The conversation cannot go on, for a reason that is right.
struct Over;

impl<'b> Conversation<'b> {
    fn new(flags: u8, outcomes: &'b [u8], cut: usize) -> Self {
        let table = Arc::new(SharedStatements::default());
        let functions = Arc::new(match flags & 1 {
            0 => FunctionEffects::without_functions(),
            _ => FunctionEffects::default(),
        });
        let session = |number: u64| {
            let rules = SessionRules {
                follow: flags & 2 == 0,
                may_switch_tenant: flags & 4 != 0,
                current_tenant: match flags >> 6 {
                    0 | 1 => CurrentTenant::First,
                    2 => CurrentTenant::Chosen,
                    _ => CurrentTenant::ForTransaction,
                },
                sees_binds: true,
                shared_statements: table.clone(),
                functions: functions.clone(),
                inspect_bytes_max: 4096,
                statements_max: if flags & 8 != 0 { 2 } else { 20 },
                statements_bytes_max: 1 << 16,
                unanswered_max: if flags & 16 != 0 { 4 } else { 1000 },
                settings_max: 10,
                settings_bytes_max: 1 << 12,
                ..SessionRules::default()
            };
            Session {
                side: ClientSide::new(rules, Arc::default(), (number + 1) << 32),
                inbox: Vec::new(),
                expects: ReplyTracker::default(),
                received: Vec::new(),
                told: Vec::new(),
            }
        };
        let limits =
            PreparedLimits { statements: if flags & FEW_STATEMENTS != 0 { 1 } else { 50 }, bytes: 1 << 12 };
        let server = || Shared {
            side: ServerSide::new(Default::default(), limits),
            postgres: Postgres::default(),
            received: Vec::new(),
            held: false,
        };
        Self {
            sessions: [session(0), session(1)],
            servers: [server(), server()],
            at: (0, 0),
            outcomes,
            answered: 0,
            cut,
            waits: false,
        }
    }

    fn parts(&mut self) -> (&mut Session, &mut Shared) {
        (&mut self.sessions[self.at.0], &mut self.servers[self.at.1])
    }

    fn step(&mut self, step: &Step) -> Result<(), Over> {
        match step {
            Step::Send(bytes) => {
                self.expect(bytes);
                for part in bytes.chunks(self.cut) {
                    self.send(part)?;
                }
                self.check();
                Ok(())
            }
            Step::Answer(count) => self.answer(usize::from(*count)),
            Step::Switch(to) => {
                let (session, server) = self.parts();
                if !server.held && session.inbox.is_empty() && !session.side.is_skipping_messages() {
                    self.at = (usize::from(to & 1), usize::from(to >> 1 & 1));
                }
                Ok(())
            }
            Step::Set(value) => {
                let (session, server) = self.parts();
                if !server.held {
                    let name = ["search_path", "a.b", "role", "default_tablespace"][usize::from(*value) & 3];
                    let value = ["a", "b"].get(usize::from(*value >> 2) % 3).copied();
                    let _ = session.side.keep(Arc::new(session.side.wanted.with(name, value)));
                }
                Ok(())
            }
            Step::Report(what) => {
                let mut bytes = Vec::new();
                match what & 3 {
                    0 => append(&mut bytes, b'N', |out| out.extend_from_slice(b"SNOTICE\0C00000\0Mhi\0\0")),
                    1 => append(&mut bytes, b'A', |out| out.extend_from_slice(b"\0\0\0\x07a\0b\0")),
                    2 => append(&mut bytes, b'S', |out| out.extend_from_slice(b"client_encoding\0SJIS\0")),
                    _ => append(&mut bytes, b'S', |out| {
                        out.extend_from_slice(b"standard_conforming_strings\0on\0")
                    }),
                }
                // PostgreSQL reports nothing in the middle of a batch's messages but between them.
                if self.parts().1.held { self.receive(&bytes) } else { Ok(()) }
            }
        }
    }

    /// Notes the replies that these whole messages of the client must get.
    fn expect(&mut self, bytes: &[u8]) {
        let expects = &mut self.sessions[self.at.0].expects;
        for message in messages(bytes) {
            let request = match message[0] {
                b'P' => Request::ParseAsIs,
                b'B' => Request::Bind,
                b'D' => Request::Describe,
                b'C' => Request::CloseUnnamed,
                b'E' => Request::Execute(None),
                b'S' => Request::Sync,
                b'Q' => Request::Query(None),
                b'F' => Request::FunctionCall,
                b'c' | b'f' => {
                    if !expects.is_over() {
                        expects.copy_done();
                    }
                    continue;
                }
                _ => continue,
            };
            let _ = expects.track(request, Origin::Client);
        }
    }

    /// The client's bytes arrive. Without a server they wait until there are enough of them.
    fn send(&mut self, bytes: &[u8]) -> Result<(), Over> {
        let (session, server) = self.parts();
        if server.held {
            return self.pass_on(bytes, false);
        }
        session.inbox.extend_from_slice(bytes);
        let inbox = std::mem::take(&mut session.inbox);
        let mut replies = Vec::new();
        let rest = session.side.skip_messages(&inbox, &mut replies).map_err(|_| Over)?;
        assert!(replies.is_empty(), "nothing was rejected");
        let waits = session.side.is_skipping_messages();
        if waits || session.side.first_message(rest).map_err(|_| Over)? != FirstMessage::Request {
            session.inbox = rest.to_vec();
            return Ok(());
        }
        assert!(server.side.is_reusable());
        server.held = true;
        let rest = rest.to_vec();
        self.pass_on(&rest, true)
    }

    fn pass_on(&mut self, bytes: &[u8], begins: bool) -> Result<(), Over> {
        let mut scratch = Vec::new();
        let mut out = Outgoing::new(bytes, &mut scratch);
        let (session, server) = self.parts();
        session.side.prepare_server(&mut server.side, begins, &mut out);
        let flow = session.side.take(bytes, &mut server.side, &mut out);
        let out = out.finish();
        server.received.extend_from_slice(out);
        server.postgres.receive(out);
        assert_eq!(server.side.has_whole_messages(), !server.postgres.has_half());
        match flow.map_err(|_| Over)? {
            Flow::Continues => {
                self.return_if_free();
                Ok(())
            }
            Flow::Terminated => Err(Over),
            Flow::AwaitsReplies(rest) => {
                self.answer_all()?;
                let (_, server) = self.parts();
                assert!(!server.side.replies.is_awaited(), "the client waits for a reply that does not come");
                self.send(&rest)
            }
            Flow::Full(rest) => {
                self.answer_all()?;
                let (session, server) = self.parts();
                let unanswered_max = session.side.rules().unanswered_max;
                assert!(server.side.has_room(unanswered_max), "the client waits for room that does not come");
                self.send(&rest)
            }
            Flow::Pauses(rest) => {
                self.answer_all()?;
                self.send(&rest)
            }
            Flow::ChoosesTenant(rest) => {
                self.answer_all()?;
                let (session, server) = self.parts();
                if !server.held {
                    assert!(server.side.is_reusable());
                    server.held = true;
                }
                let mut out = Vec::new();
                let reason = TenantSwitchError::NotAlone;
                let used = session.side.reject(&rest, reason.into(), &mut server.side, &mut out);
                assert!(used > 0, "only a whole message can be rejected");
                server.received.extend_from_slice(&out);
                server.postgres.receive(&out);
                self.send(rest.get(used..).unwrap_or_default())
            }
        }
    }

    /// The server answers all that it has, while messages of the client wait for it.
    fn answer_all(&mut self) -> Result<(), Over> {
        self.waits = true;
        let answered = self.answer(usize::MAX);
        self.waits = false;
        answered
    }

    /// The server answers so many of its messages.
    fn answer(&mut self, count: usize) -> Result<(), Over> {
        for _ in 0..count {
            let choice = match self.outcomes {
                [] => 0,
                outcomes => outcomes[self.answered % outcomes.len()],
            };
            let (_, server) = self.parts();
            if server.postgres.is_done() {
                break;
            }
            let mut replies = Vec::new();
            server.postgres.answer(choice, &mut replies);
            self.answered += 1;
            self.receive(&replies)?;
        }
        self.check();
        self.return_if_free();
        Ok(())
    }

    /// The proxy gets bytes of the server.
    fn receive(&mut self, replies: &[u8]) -> Result<(), Over> {
        let cut = self.cut;
        for part in replies.chunks(cut) {
            let mut scratch = Vec::new();
            let mut out = Outgoing::new(part, &mut scratch);
            let (session, server) = self.parts();
            let taken = server.side.take(part, &mut session.side, &mut out, &|_, _| false);
            if matches!(taken, Err(ExchangeError::RejectedRequest(_))) {
                return Err(Over);
            }
            assert!(taken.is_ok(), "{taken:?}");
            if taken.is_ok_and(|events| events.fatal > 0) {
                return Err(Over);
            }
            session.received.extend_from_slice(out.finish());
        }
        let (session, _) = self.parts();
        // What has arrived in whole by now.
        let received = std::mem::take(&mut session.received);
        session.told.extend_from_slice(&received);
        for message in messages(&received) {
            let fits = match message[0] {
                b'E' if is_fatal(message) => return Err(Over),
                b'E' => session.expects.error(|_, _| {}).is_ok(),
                b'Z' => session.expects.ready(message[5]) == Ok(true),
                b'N' | b'S' | b'A' => true,
                tag => session.expects.reply(tag).is_ok_and(|outcome| outcome.pass),
            };
            assert!(fits, "the client got an unexpected {}", char::from(message[0]));
        }
        Ok(())
    }

    fn return_if_free(&mut self) {
        let (session, server) = self.parts();
        if server.held && server.side.replies.is_over() && server.side.is_between_messages() {
            assert!(server.postgres.is_idle(), "a busy server goes back: {:?}", server.postgres);
            server.side.checks.clear(); // as after the check
            server.held = false;
            session.side.take_held(&mut session.inbox);
        }
    }

    /// What the proxy believes is what the server does.
    fn check(&mut self) {
        let waits = self.waits;
        let (session, server) = self.parts();
        let (replies, postgres) = (&server.side.replies, &server.postgres);
        if !postgres.is_done() || postgres.has_half() || postgres.closed {
            return;
        }
        if postgres.copies.is_none() {
            assert!(!replies.is_working(), "the proxy waits for a reply that does not come: {replies:?}");
        }
        assert_eq!(replies.is_skipping(), postgres.skips, "{replies:?} {postgres:?}");
        assert_eq!(replies.takes_copy_data(), postgres.copies.is_some(), "{replies:?} {postgres:?}");
        // A request of the proxy may begin the batch of a client's message that waits: it counts as open until that
        // message goes.
        if !waits {
            assert_eq!(replies.is_over(), postgres.is_idle(), "{replies:?} {postgres:?}");
        }
        if session.inbox.is_empty() && postgres.copies.is_none() && !waits {
            assert!(!session.expects.is_working(), "the client waits for a reply that does not come");
        }
        let statements = session.side.statements.len();
        assert!(statements <= session.side.rules().statements_max + 1, "{statements} statements");
    }
}

/// Messages without Flush (how many the proxy sends depends on the cuts) and without the numbers of its statements,
/// which are unique in the process.
fn comparable(bytes: &[u8]) -> Vec<String> {
    let text = |message: &[u8]| {
        let text = String::from_utf8_lossy(&message[HEADER_BYTES..]).into_owned();
        let mut parts = text.split("pglobby_");
        let first = format!("{} {}", char::from(message[0]), parts.next().unwrap_or_default());
        parts.fold(first, |text, part| {
            text + "pglobby_" + part.trim_start_matches(|c: char| c.is_ascii_digit())
        })
    };
    messages(bytes).filter(|message| message[0] != b'H').map(text).collect()
}

/// A conversation, once in whole messages and once in pieces.
pub(super) fn converse(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let (flags, cut, outcomes) = (choices.byte(), choices.byte(), choices.part());
    let steps = steps(choices);
    let run = |cut: usize| {
        let mut conversation = Conversation::new(flags, outcomes, cut);
        let mut end = steps.len();
        for (place, step) in steps.iter().enumerate() {
            if conversation.step(step).is_err() {
                end = place;
                break;
            }
        }
        (conversation, end)
    };
    let (whole, whole_end) = run(usize::MAX);
    let (cut, cut_end) = run(usize::from(cut).max(1));
    // Which statement gives way, and in which order several are closed, is the order of a hash map.
    if flags & FEW_STATEMENTS != 0 {
        return;
    }
    assert_eq!(whole_end, cut_end);
    if whole_end < steps.len() {
        return;
    }
    for (whole, cut) in whole.servers.iter().zip(&cut.servers) {
        let (mut whole, mut cut) = (comparable(&whole.received), comparable(&cut.received));
        whole.sort_unstable();
        cut.sort_unstable();
        assert_eq!(whole, cut);
    }
    for (whole, cut) in whole.sessions.iter().zip(&cut.sessions) {
        assert_eq!(comparable(&whole.told), comparable(&cut.told));
    }
}
