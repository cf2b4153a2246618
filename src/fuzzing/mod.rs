//! What `fuzz/` runs with bytes of its own choice: one function for each place where a network, a file or a tenant
//! may bring any bytes. None may panic, loop or use memory without limit. The tests replay `fuzz/corpus`.

mod conversation;
mod postgres;

use std::sync::Arc;

use crate::{
    config::Config,
    control_path::http::read_any_body,
    data_path::{
        exchange::{ClientSide, ServerSide, SessionRules},
        functions::function_effects::{self, Function},
        login::{scram_proof::Verifier, startup},
        prepared::PreparedLimits,
        server::{answer_scram, dial_error},
        session_state::{identity::Identity, side_effects::SideEffects},
        sql::{
            self as reader, Characters, Effects, Kind, Lexing, Statement, is_plain_query, pieces, statements,
            words,
        },
    },
    wire::{
        message::{append, append_cstr, bind, execute, parse},
        outgoing::Outgoing,
        server_error::ServerError,
    },
};

/// A function that takes any bytes.
pub type Target = fn(&[u8]);

/// Every target with the name of its folder in `fuzz/corpus`.
pub const TARGETS: [(&str, Target); 9] = [
    ("client_frames", client_frames),
    ("server_frames", server_frames),
    ("exchange", exchange),
    ("startup", startup),
    ("scram_of_clients", scram_of_clients),
    ("scram_of_servers", scram_of_servers),
    ("sql", sql),
    ("config", config),
    ("http_body", http_body),
];

/// A session and a server in transaction mode.
fn sides() -> (ClientSide, ServerSide) {
    let rules = SessionRules {
        follow: true,
        may_switch_tenant: true,
        sees_binds: true,
        inspect_bytes_max: 4096,
        statements_max: 20,
        statements_bytes_max: 1 << 16,
        unanswered_max: 100,
        settings_max: 10,
        settings_bytes_max: 1 << 12,
        ..SessionRules::default()
    };
    let server = ServerSide::new(Default::default(), PreparedLimits { statements: 3, bytes: 1 << 12 });
    (ClientSide::new(rules, Arc::default(), 1 << 32), server)
}

/// Whether both sides may go on.
fn take(bytes: &[u8], of_server: bool, client: &mut ClientSide, server: &mut ServerSide) -> bool {
    let mut scratch = Vec::new();
    let mut out = Outgoing::new(bytes, &mut scratch);
    let goes_on = match of_server {
        true => server.take(bytes, client, &mut out, &|_, _| false).is_ok(),
        false => client.take(bytes, server, &mut out).is_ok(),
    };
    out.finish();
    goes_on
}

/// Any bytes of a client, in two parts.
pub fn client_frames(bytes: &[u8]) {
    let (mut client, mut server) = sides();
    let (first, rest) = bytes.split_at(bytes.len() / 2);
    let _ = take(first, false, &mut client, &mut server) && take(rest, false, &mut client, &mut server);
}

/// Any bytes of a server that owes replies of all kinds, in two parts.
pub fn server_frames(bytes: &[u8]) {
    let (mut client, mut server) = sides();
    let mut request = Vec::new();
    for name in [&b""[..], b"a"] {
        parse(name, b"SELECT * FROM t WHERE a = $1", &mut request);
        bind(name, &["1"], &mut request);
        append(&mut request, b'D', |out| {
            out.push(b'S');
            append_cstr(out, name);
        });
        execute(&mut request);
    }
    append(&mut request, b'S', |_| {});
    for sql in ["SET a.b = 1; SELECT pg_advisory_lock(1)", "LISTEN a", "COPY t FROM STDIN"] {
        append(&mut request, b'Q', |out| append_cstr(out, sql.as_bytes()));
    }
    let (first, rest) = bytes.split_at(bytes.len() / 2);
    let _ = take(&request, false, &mut client, &mut server)
        && take(first, true, &mut client, &mut server)
        && take(rest, true, &mut client, &mut server);
}

/// Two clients that share two servers; see `conversation.rs`.
pub fn exchange(bytes: &[u8]) {
    self::conversation::converse(bytes);
}

/// A startup packet, and an error response of a server's start.
pub fn startup(bytes: &[u8]) {
    if let Some((version, body)) = bytes.split_first_chunk::<4>() {
        let _ = startup::read_startup_packet(u32::from_be_bytes(*version), body, &mut Default::default());
    }
    let _ = dial_error::StartupError::parse(bytes).code();
    let _ = ServerError::read(bytes);
}

/// A stored verifier, a client's first and its last message, each to the next zero byte.
pub fn scram_of_clients(bytes: &[u8]) {
    let mut parts = bytes.splitn(3, |byte| *byte == 0).map(Some).chain(std::iter::repeat(None));
    let mut next = || parts.next().flatten().unwrap_or_default();
    let (stored, first, last) = (next(), next(), next());
    let (verifier, _) = Verifier::of(std::str::from_utf8(stored).ok(), "user", b"salt");
    for end_point in [None, Some(&b"hash"[..])] {
        assert!(verifier.server_final(first, "r=nonce,s=salt,i=4096", last, end_point).is_none());
    }
}

/// A server's challenge behind the client's nonce, and its last message, parted by a zero byte.
pub fn scram_of_servers(bytes: &[u8]) {
    let at = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    answer_scram(&bytes[..at], bytes.get(at + 1..).unwrap_or_default());
}

/// A text as a query and as a function's body. A text that is plain at a glance is plain.
pub fn sql(bytes: &[u8]) {
    for standard_conforming_strings in [true, false] {
        for encoding in ["UTF8", "SJIS", "BIG5", "GB18030"] {
            let lexing =
                Lexing { standard_conforming_strings, characters: Characters::of_client_encoding(encoding) };
            let found = SideEffects::read(bytes, lexing);
            assert!(!is_plain_query(bytes, lexing) || statements(bytes, lexing).count() <= 1);
            let _ = Identity::default().decide(bytes, lexing);
            let _ = found.needs_decision();
        }
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = pieces(text);
    }
    let _ = words(bytes).count();
    for language in [&b"sql"[..], b"plpgsql", b"c", b"plpython3u"] {
        let _ = function_effects::read(&Function { language, body: bytes, library: b"" });
    }
}

/// The ranges of a text's tokens, for the comparison with PostgreSQL's own scanner.
pub fn tokens(sql: &str) -> Vec<std::ops::Range<usize>> {
    reader::tokens(sql.as_bytes(), Lexing::default())
}

/// A statement as the SQL reader has read it, for the comparison with PostgreSQL's own parser.
#[derive(Debug)]
pub struct ReadStatement {
    /// The name of its [`Kind`].
    pub kind: String,
    /// The name of what it sets, prepares, executes, listens to, declares or saves.
    pub name: Option<String>,
    /// Conservative: the reader takes it for a statement that may do anything.
    pub may_do_anything: bool,
}

/// The statements of a text.
pub fn read_statements(sql: &str) -> Vec<ReadStatement> {
    let read = |statement: Statement<'_>| {
        let name = match &statement.kind {
            Kind::Set { name, .. }
            | Kind::Reset(name)
            | Kind::Savepoint(name)
            | Kind::Release(name)
            | Kind::RollbackTo(name)
            | Kind::Listen(name)
            | Kind::Notify(name)
            | Kind::DeclareCursor { name, .. }
            | Kind::Fetch(name) => Some(&**name),
            Kind::Unlisten(name) | Kind::CloseCursor(name) => name.as_deref(),
            Kind::Prepare { .. } | Kind::Execute { .. } | Kind::Deallocate => {
                statement.prepared.as_ref().map(|name| &*name.value)
            }
            _ => None,
        };
        let kind = format!("{:?}", statement.kind);
        ReadStatement {
            kind: kind.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned(),
            name: name.map(|name| String::from_utf8_lossy(name).into_owned()),
            may_do_anything: statement.effects.contains(Effects::UNKNOWN),
        }
    };
    statements(sql.as_bytes(), Lexing::default()).map(read).collect()
}

/// A configuration file.
pub fn config(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = Config::read(text, None, &|_| None);
    }
}

/// A body of each request of the management API.
pub fn http_body(bytes: &[u8]) {
    read_any_body(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Findings are added there with the name of the fault.
    #[test]
    fn the_corpus_runs_without_a_panic() {
        let scanner: (&str, Target) = ("scanner", sql);
        for (name, target) in TARGETS.into_iter().chain([scanner]) {
            let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
            let files: Vec<_> =
                std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect();
            assert!(!files.is_empty(), "{name}");
            for file in files {
                target(&std::fs::read(&file).unwrap());
            }
        }
    }
}
