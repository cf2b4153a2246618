//! Parses a server's ErrorResponse.
//!
//! Source: PostgreSQL documentation, "Error and Notice Message Fields".

use crate::wire::frame::{HEADER_BYTES, cstr};

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

/// Whether the server closes the connection after this ErrorResponse. `V` is never translated, but older than
/// 9.6 servers lack it.
pub fn is_fatal(bytes: &[u8]) -> bool {
    let severity = error_field(bytes, b'V').or_else(|| error_field(bytes, b'S'));
    matches!(severity, Some(b"FATAL" | b"PANIC"))
}

/// `program_limit_exceeded`.
const TOO_LONG: &str = "54000";

/// The fields of a server's ErrorResponse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{sqlstate} {message}")]
pub struct ServerError {
    /// Field `C`; empty if the server gave none.
    pub sqlstate: String,
    /// Field `M`.
    pub message: String,
    /// Fields `D` and `H`.
    pub details: Option<Box<ErrorDetails>>,
}

/// What an ErrorResponse says besides its message. Boxed where it is kept, because most have none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ErrorDetails {
    /// Field `D`.
    pub detail: Option<String>,
    /// Field `H`.
    pub hint: Option<String>,
}

impl ErrorDetails {
    /// `None` if there is neither.
    pub fn of(detail: Option<String>, hint: Option<String>) -> Option<Box<Self>> {
        (detail.is_some() || hint.is_some()).then(|| Box::new(Self { detail, hint }))
    }
}

impl ServerError {
    /// The error in place of a reply that takes too much memory. The connection is still usable.
    pub fn too_long() -> Self {
        let message = "the answer takes more memory than it may".to_owned();
        Self { sqlstate: TOO_LONG.to_owned(), message, details: None }
    }

    /// Whether a privilege is missing.
    pub fn is_denied(&self) -> bool {
        self.sqlstate == "42501"
    }

    /// Whether this is the error of [`Self::too_long`].
    pub fn is_too_long(&self) -> bool {
        self.sqlstate == TOO_LONG
    }

    /// Parses an ErrorResponse; every field is optional.
    pub fn read(bytes: &[u8]) -> Self {
        let field = |name| error_field(bytes, name).map(|text| String::from_utf8_lossy(text).into_owned());
        let required = |name| field(name).unwrap_or_default();
        let details = ErrorDetails::of(field(b'D'), field(b'H'));
        Self { sqlstate: required(b'C'), message: required(b'M'), details }
    }
}
