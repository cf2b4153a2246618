//! Prepared statements that follow a client from server to server. Pure: bytes in, bytes out.
//!
//! A client's named statement is known to servers under a name of ours, the same for every client of the tenant that
//! prepares the same text with the same parameter types. A client's own Parse always reaches the server as a real
//! Parse, so that a changed table or type, an error or a notice is what PostgreSQL itself would give; where a later Bind
//! or Describe meets a server that lacks the statement, a Parse is put in front of it, in the same write.
//!
//! What each server has is in `server_statements.rs`.

pub mod client_statements;
pub mod parse_settings;
pub mod row_description;
pub mod server_statements;
pub mod shared_statements;
pub mod sql_prepare_effects;

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

pub use self::{
    client_statements::{ClientStatements, UNNAMED_BYTES_KEPT},
    server_statements::{Capacity, Found, ServerStatements, Tally},
};
use self::{
    parse_settings::ParseSettings,
    row_description::{Shape, is_fixed, is_parsed_once},
    shared_statements::next_id,
    sql_prepare_effects::{Deeds, OUR_PREFIX},
};
use crate::{
    data_path::{
        functions::Seen,
        memory_limit::{Account, Charge, PIECE_BYTES},
        session_state::side_effects::Aftermath,
    },
    wire::frame::{HEADER_BYTES, cstr},
};

/// A statement's text and parameter types, and what executing it may do to a session. Shared by every client of a
/// tenant that prepared the same.
#[derive(Debug)]
pub struct Statement {
    pub(super) id: u64,
    /// What servers call it.
    pub(super) server_name: Box<[u8]>,
    /// A Parse message's body behind the name: the text, a zero, the types.
    pub(super) body: Box<[u8]>,
    /// What it takes.
    pub(super) charge: Charge,
    /// Read once, when it was parsed.
    pub aftermath: Aftermath,
    /// What it calls.
    pub seen: Seen,
    /// Made by PREPARE: `body` is that text, with the server's name for it in it.
    pub(super) in_sql: bool,
    /// Where that is our name, it stands there in place of these bytes.
    pub(super) renamed: Option<(usize, Box<[u8]>)>,
    /// What its own text names in EXECUTE and the like, and does by PREPARE and DEALLOCATE.
    pub naming: Option<Arc<SqlNames>>,
    pub(super) proved: AtomicBool,
    /// Its shape is fixed when it is parsed, and looked at.
    pub(super) is_looked_at: bool,
    /// What its clients were told that it takes and gives, once a server has said so.
    pub(super) shape: OnceLock<Shape>,
    /// The settings under which its client, or the first of them, has had it parsed.
    pub(super) parsed_under: Arc<ParseSettings>,
    /// What it means depends on them.
    pub(super) is_parsed_once: bool,
    /// Whoever has those settings has it too; else it is one client's own.
    pub(super) is_shared: bool,
}

impl Statement {
    pub(super) fn new(
        body: Box<[u8]>,
        aftermath: Aftermath,
        under: &Arc<ParseSettings>,
        memory: &Arc<Account>,
    ) -> Self {
        let id = next_id();
        Self {
            id,
            server_name: format!("pglobby_{id}").into_bytes().into(),
            charge: Charge::new(memory, Self::weight(1, body.len())),
            body,
            aftermath,
            seen: Seen::default(),
            in_sql: false,
            renamed: None,
            naming: None,
            proved: AtomicBool::new(false),
            is_looked_at: false,
            shape: OnceLock::new(),
            parsed_under: under.clone(),
            is_parsed_once: true,
            is_shared: false,
        }
    }

    /// What makes of it what a Parse of the same text makes.
    pub(super) fn parsed(self, naming: Option<Arc<SqlNames>>) -> Self {
        let sql = cstr(&mut &*self.body).unwrap_or_default();
        let (is_looked_at, is_parsed_once) = (naming.is_none() && is_fixed(sql), is_parsed_once(sql));
        Self { naming, is_looked_at, is_parsed_once, ..self }
    }

    /// What so many statements with so much text in all take.
    pub fn weight(count: usize, text: usize) -> usize {
        count * (size_of::<Self>() + 8 * PIECE_BYTES) + text
    }

    /// What this one takes.
    pub fn bytes(&self) -> usize {
        Self::weight(1, self.body.len())
    }

    /// Whether it is that one.
    pub fn is(&self, other: &Self) -> bool {
        self.id == other.id
    }

    /// A server has taken it once.
    pub fn is_proved(&self) -> bool {
        self.proved.load(Ordering::Relaxed)
    }

    /// Its text, a zero, its types.
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    /// What servers call it.
    pub fn server_name(&self) -> &[u8] {
        &self.server_name
    }

    /// Servers call it as its client does; so none has it while another client is there.
    pub fn has_own_name(&self) -> bool {
        !self.server_name.starts_with(OUR_PREFIX)
    }
}

/// A statement that got, or lost, its name by a request that may yet be skipped.
#[derive(Debug, Clone)]
pub struct Naming {
    /// The client's name for it; `None` where only the server's knowledge changed.
    pub client_name: Option<Box<[u8]>>,
    /// The statement.
    pub statement: Arc<Statement>,
}

/// Statements that a text names, and what it does to names.
pub type SqlNames = (Vec<Arc<Statement>>, Deeds);

/// Appends the message (or the first part of it) in `bytes` with the name at `at..at + old` replaced by `new`. Nothing
/// is appended if the range is not in it.
pub fn rename(bytes: &[u8], at: usize, old: usize, new: &[u8], out: &mut Vec<u8>) {
    let (Some((header, _)), Some(before), Some(behind)) =
        (bytes.split_first_chunk::<HEADER_BYTES>(), bytes.get(HEADER_BYTES..at), bytes.get(at + old..))
    else {
        return;
    };
    let [tag, length @ ..] = *header;
    let length = u32::from_be_bytes(length) as usize - old + new.len();
    out.reserve(bytes.len() + new.len());
    out.push(tag);
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(before);
    out.extend_from_slice(new);
    out.extend_from_slice(behind);
}
