//! Prepared statements that follow a client from server to server. Pure: bytes in, bytes out.
//!
//! Servers know a client's named statement under a name of the proxy's. Clients of a tenant that prepare the
//! same text with the same parameter types share the statement. A client's Parse always reaches the server,
//! so that errors, notices and changed tables have the same effect as without a proxy. If a later Bind or
//! Describe reaches a server without the statement, the proxy sends a Parse before it, in the same write.
//!
//! `server_statements.rs` tracks the statements of each server.

pub mod client_statements;
mod packed_statements;
pub mod parse_settings;
pub mod row_description;
pub mod server_statements;
pub mod shared_statements;
pub mod sql_prepare_effects;
pub mod statement_text;

use std::{
    ops::Range,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

pub use self::{
    client_statements::{ClientStatements, UNNAMED_BYTES_KEPT},
    server_statements::{OnServer, PreparedLimits, ServerStatements, StatementCounts},
};
use self::{
    parse_settings::ParseSettings,
    row_description::{RowDescription, has_fixed_description, has_fixed_meaning},
    shared_statements::{next_id, replaced},
    sql_prepare_effects::{OUR_PREFIX, PrepareEffects},
    statement_text::{Body, StoredText},
};
use crate::{
    data_path::{
        functions::FoundEffects,
        lock::locked,
        memory_limit::{Account, Charge, PIECE_BYTES},
        session_state::side_effects::SideEffects,
        sql::NAME_BYTES_MAX,
    },
    wire::frame::{HEADER_BYTES, cstr},
};

/// A statement's text, parameter types and side effects. Shared by a tenant's clients that prepared it.
#[derive(Debug)]
pub struct Statement {
    pub(super) id: u64,
    /// Its name on servers.
    pub(super) server_name: Box<[u8]>,
    kept: Mutex<Kept>,
    /// Length of the text.
    length: usize,
    /// Memory with the text, in bytes.
    bytes: usize,
    /// Side effects of the text.
    pub side_effects: SideEffects,
    /// Side effects of the functions that the text calls.
    pub found_effects: FoundEffects,
    /// Created by SQL PREPARE: its text is that one with the server's name.
    pub(super) in_sql: bool,
    /// Position of the server's name in the text, and the client's bytes that it replaced.
    pub(super) renamed: Option<(usize, Box<[u8]>)>,
    /// Prepared statements that the text itself names in PREPARE, EXECUTE or DEALLOCATE.
    pub sql_names: Option<Arc<SqlNames>>,
    pub(super) was_parsed: AtomicBool,
    /// The row description is fixed at Parse and compared between clients.
    pub(super) is_description_checked: bool,
    /// The description that clients have received, once a server has sent one.
    pub(super) description: OnceLock<RowDescription>,
    /// The settings under which the first client's Parse ran.
    pub(super) parsed_under: Arc<ParseSettings>,
    /// Its meaning depends on these settings.
    pub(super) has_fixed_meaning: bool,
    /// Sessions with the same settings share it; otherwise it belongs to one client.
    pub(super) is_shared: bool,
}

#[derive(Debug)]
struct Kept {
    text: StoredText,
    /// Charge for the statement's memory.
    charge: Charge,
    /// How many servers have the statement.
    servers: usize,
}

impl Statement {
    pub(super) fn new(
        text: StoredText,
        side_effects: SideEffects,
        under: &Arc<ParseSettings>,
        memory: &Arc<Account>,
    ) -> Self {
        Self::numbered(next_id(), text, side_effects, under, memory)
    }

    /// [`Self::new`] with the number `id`, which its text contains.
    pub(super) fn numbered(
        id: u64,
        text: StoredText,
        side_effects: SideEffects,
        under: &Arc<ParseSettings>,
        memory: &Arc<Account>,
    ) -> Self {
        let (length, bytes) = (text.length(), Self::memory_of(1, text.stored_bytes()));
        Self {
            id,
            server_name: server_name(id),
            kept: Mutex::new(Kept { text, charge: Charge::new(memory, bytes), servers: 0 }),
            length,
            bytes,
            side_effects,
            found_effects: FoundEffects::default(),
            in_sql: false,
            renamed: None,
            sql_names: None,
            was_parsed: AtomicBool::new(false),
            is_description_checked: false,
            description: OnceLock::new(),
            parsed_under: under.clone(),
            has_fixed_meaning: true,
            is_shared: false,
        }
    }

    /// Completes a statement that a Parse message with this `body` creates.
    pub(super) fn parsed(self, mut body: &[u8], sql_names: Option<Arc<SqlNames>>) -> Self {
        let sql = cstr(&mut body).unwrap_or_default();
        let (is_description_checked, has_fixed_meaning) =
            (sql_names.is_none() && has_fixed_description(sql), has_fixed_meaning(sql));
        Self { sql_names, is_description_checked, has_fixed_meaning, ..self }
    }

    /// Returns the memory of `count` statements with `text` bytes of text in all.
    pub fn memory_of(count: usize, text: usize) -> usize {
        count * (size_of::<Self>() + 8 * PIECE_BYTES) + text
    }

    /// Returns the memory of this statement in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the statement with a client's name for it.
    pub fn named(self: &Arc<Self>, client_name: Option<&[u8]>) -> StatementName {
        StatementName { client_name: client_name.map(|name| kept_name(name).into()), statement: self.clone() }
    }

    /// Returns whether both are the same statement.
    pub fn is(&self, other: &Self) -> bool {
        self.id == other.id
    }

    /// Returns whether a server has parsed it successfully.
    pub fn was_parsed(&self) -> bool {
        self.was_parsed.load(Ordering::Relaxed)
    }

    /// Returns the text, a zero byte and the types. Decompresses a long text.
    pub fn body(&self) -> Body {
        self.text().body()
    }

    /// Returns the length of [`Self::body`].
    pub fn length(&self) -> usize {
        self.length
    }

    pub(super) fn text(&self) -> StoredText {
        locked(&self.kept).text.clone()
    }

    /// Called after a server got a reference to the statement.
    pub(super) fn server_added(&self) {
        locked(&self.kept).servers += 1;
    }

    /// Called before a server drops its reference to the statement.
    pub(super) fn server_removed(&self) {
        locked(&self.kept).servers -= 1;
    }

    /// Gives up the text if only servers have the statement. Returns whether it has done so. The caller has
    /// locked the table from which clients get statements.
    pub(super) fn give_up_if_unused(self: &Arc<Self>, memory: &Arc<Account>) -> bool {
        let mut kept = locked(&self.kept);
        let references_of_servers_and_caller = kept.servers + 1;
        let is_unused = Arc::strong_count(self) == references_of_servers_and_caller;
        if is_unused {
            kept.text = StoredText::given_up();
            let bytes = Self::memory_of(1, kept.text.stored_bytes());
            kept.charge.set(memory, bytes);
        }
        is_unused
    }

    /// Returns the name on servers.
    pub fn server_name(&self) -> &[u8] {
        &self.server_name
    }

    /// Returns whether its name on servers is the client's own. Such a statement must be deallocated before
    /// another client uses the server.
    pub fn has_client_name(&self) -> bool {
        !self.server_name.starts_with(OUR_PREFIX)
    }
}

/// Returns the name on servers of the statement with this number.
pub(super) fn server_name(id: u64) -> Box<[u8]> {
    format!("pglobby_{id}").into_bytes().into()
}

/// A statement whose name was added or removed by a request that may still be skipped.
#[derive(Debug, Clone)]
pub struct StatementName {
    /// The client's name; `None` if only the server's state changed.
    pub client_name: Option<Box<[u8]>>,
    /// The statement.
    pub statement: Arc<Statement>,
}

impl StatementName {
    /// Whether the client calls the statement by this name.
    pub fn is_called(&self, name: &[u8]) -> bool {
        self.client_name.as_deref() == Some(kept_name(name))
    }
}

/// What PostgreSQL keeps of a statement's name in a message: 63 bytes, also where that cuts a character. Its hash
/// table has fixed keys (`NAMEDATALEN`), so longer names that begin alike are the same.
#[inline]
pub fn kept_name(name: &[u8]) -> &[u8] {
    name.get(..NAME_BYTES_MAX).unwrap_or(name)
}

/// The statement name in a text that runs by Parse, and what it meant when the text was last parsed. A text
/// with several statements fails at its Parse, so there is one name.
#[derive(Debug, Default)]
pub struct SqlNames {
    /// The client's name.
    pub client_name: Box<[u8]>,
    /// The statement that the name meant.
    pub meaning: Option<Arc<Statement>>,
    /// Position and length of the server's name in the text, and the client's bytes that it replaced.
    pub renamed: Option<(Range<usize>, Box<[u8]>)>,
    /// The effects of the PREPARE or DEALLOCATE.
    pub prepare_effects: PrepareEffects,
}

impl SqlNames {
    /// Whether the text still does what the client wrote: its name means the same as before, and a PREPARE
    /// has not run.
    pub fn is_current(&self, client: &ClientStatements, server: &ServerStatements) -> bool {
        let is_same = match (client.get(&self.client_name), &self.meaning) {
            (Some(now), Some(then)) => now.is(then),
            (now, then) => now.is_none() && then.is_none(),
        };
        let may_exist = |made: &Arc<Statement>| made.was_parsed() || server.get(made.id).is_some();
        is_same && !self.prepare_effects.prepared().any(may_exist)
    }

    /// The client's own text with its types, from the `body` that servers get.
    pub fn client_body(&self, body: &[u8]) -> Vec<u8> {
        match &self.renamed {
            Some((range, name)) => replaced(body, range.clone(), name),
            None => body.to_vec(),
        }
    }
}

/// Appends the message in `bytes` (or its first part) with the name at `at..at + old` replaced by `new`.
/// Appends nothing if the range is outside the message.
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
