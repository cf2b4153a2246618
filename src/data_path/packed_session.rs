//! A session in a form that another process can read, and the way there. Sessions move to the process that takes over,
//! between two transactions: `relay/move_to_successor.rs` packs them, `session_arrival.rs` unpacks them.
//!
//! The form is JSON with a version. A process that does not know the version, or a field, refuses the session, which
//! then ends as in any other shutdown.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

/// Names and values of parameters.
pub type PackedSettings = Vec<(String, String)>;

/// A session, by the version of its form. Has no `Debug`: it contains a cancel key and a client's bytes.
#[derive(Serialize, Deserialize)]
#[serde(tag = "version")]
pub enum PackedSession {
    /// The first.
    #[serde(rename = "1")]
    V1(Box<SessionV1>),
}

/// The first form.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionV1 {
    /// A process whose hash functions differ cannot compare the row descriptions of statements.
    pub hash_sample: u64,
    /// The client's cancel key.
    pub process_id: i32,
    #[serde(with = "base64_text")]
    pub secret: Vec<u8>,
    /// When it began, in milliseconds since 1970.
    pub connected_at_ms: u64,
    pub peer: Option<IpAddr>,
    /// The proxy's address and the client's.
    pub addresses: Option<(SocketAddr, SocketAddr)>,
    pub tls: bool,
    /// The socket leads to a process that passes on what it decrypts, until then (milliseconds since 1970).
    pub forwarded_until_ms: Option<u64>,
    pub login: PackedLogin,
    /// `None`: no tenant is chosen.
    pub tenant: Option<PackedTenant>,
    pub application_name: String,
    /// Bytes from the client that no server has got, and bytes that the client has not taken.
    #[serde(with = "base64_text")]
    pub inbox: Vec<u8>,
    #[serde(with = "base64_text")]
    pub unsent: Vec<u8>,
    pub transactions: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    /// The channels that it listens to, if there are any.
    pub listening: Option<PackedListening>,
    /// Of a service login's session.
    pub switcher: Option<PackedSwitcher>,
    pub side: PackedSide,
}

/// The login that a session has proved.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedLogin {
    pub id: i64,
    pub name: String,
    /// SHA-256 of the verifiers that the login's row may have for this session to stay.
    pub verifier_digests: Vec<String>,
}

/// A tenant and the rights there.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedTenant {
    pub id: i64,
    pub read_only: bool,
}

/// Channels that a session listens to.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedListening {
    pub channels: Vec<String>,
    /// Notifications before this mark are the old process's to deliver, those behind it the new one's. The new process
    /// sends it.
    pub mark: String,
}

/// How a session came to its tenant.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedSwitcher {
    pub first: Option<i64>,
    pub chosen: Option<i64>,
    /// It has held no server of its tenant.
    pub is_new: bool,
    /// The parameters reported at login.
    pub first_reported: Vec<PackedReport>,
}

/// A reported parameter.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedReport {
    pub name: String,
    #[serde(with = "base64_text")]
    pub value: Vec<u8>,
}

/// The client's side of an exchange.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedSide {
    pub startup: PackedSettings,
    pub wanted: PackedSettings,
    /// Custom parameters that it has had, and whether there are others without a name.
    pub custom: Vec<String>,
    pub has_unnamed_custom: bool,
    pub reported: Vec<PackedReport>,
    /// The settings of role and database at its start, if they are known.
    pub start: Option<PackedStart>,
    pub statements: Vec<PackedStatement>,
    pub unnamed: Option<PackedUnnamed>,
    pub sequence_trials: u8,
    pub reads_sequences: bool,
    pub sees_binds: bool,
}

/// The settings of a role and a database when a session started.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedStart {
    pub named: Vec<String>,
    pub values: PackedSettings,
    pub built_in: PackedSettings,
    pub idle_session_timeout_ms: Option<u64>,
}

/// A prepared statement.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedStatement {
    /// The client's name.
    #[serde(with = "base64_text")]
    pub name: Vec<u8>,
    /// The text, a zero byte and the types; of one made by PREPARE, the statement as the client wrote it.
    #[serde(with = "base64_text")]
    pub body: Vec<u8>,
    /// Made by PREPARE: where the name is in the text.
    pub in_sql: Option<(usize, usize)>,
    /// The settings under which it was parsed, if they are known.
    pub parsed_under: Option<PackedSettings>,
    /// Sessions with the same settings share it.
    pub is_shared: bool,
    /// A server has parsed it.
    pub was_parsed: bool,
    /// No server has got its Parse.
    pub is_deferred: bool,
    /// Hash of the row description that the client has got.
    pub description: Option<u64>,
}

/// The unnamed statement.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedUnnamed {
    #[serde(with = "base64_text")]
    pub body: Vec<u8>,
    pub parsed_under: Option<PackedSettings>,
}

/// A session on its way to the process that takes over.
pub struct MovingSession {
    /// The packed session.
    pub packed: Vec<u8>,
    /// The client's connection, or with TLS one to this process.
    pub socket: OwnedFd,
    /// Gets what became of it. Dropped without: the link to the other process is lost, which may have the session.
    pub outcome: oneshot::Sender<MoveOutcome>,
    /// Of a session that listens: what it was sent up to the mark. The other process waits for it.
    pub notifications: Option<oneshot::Receiver<Vec<u8>>>,
}

/// What became of a session that was to move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MoveOutcome {
    /// The other process serves it.
    Moved,
    /// The other process does not take it.
    Refused(String),
}

/// Bytes as text.
mod base64_text {
    use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD_NO_PAD.encode(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD_NO_PAD.decode(text).map_err(D::Error::custom)
    }
}
