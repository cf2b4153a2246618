//! Replies that pglobby makes itself while the session holds no server: for SHOW, SET, BEGIN and similar
//! statements.
//!
//! Source: PostgreSQL documentation, "Message Formats".

use crate::{
    data_path::sql::TransactionModes,
    wire::message::{append, append_cstr},
};

/// The tag of a query with one row.
pub(super) const ONE_ROW: &str = "SELECT 1";

/// The types of columns and parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    Bool,
    Int4,
    Text,
    Void,
}

impl Type {
    fn oid(self) -> u32 {
        match self {
            Self::Bool => 16,
            Self::Int4 => 23,
            Self::Text => 25,
            Self::Void => 2278,
        }
    }

    fn length(self) -> i16 {
        match self {
            Self::Bool => 1,
            Self::Int4 | Self::Void => 4,
            Self::Text => -1,
        }
    }
}

pub(super) fn command_complete(out: &mut Vec<u8>, tag: &str) {
    append(out, b'C', |out| append_cstr(out, tag.as_bytes()));
}

pub(super) fn parameter_description(out: &mut Vec<u8>, types: &[Type]) {
    append(out, b't', |out| {
        out.extend_from_slice(&u16::try_from(types.len()).unwrap_or(0).to_be_bytes());
        for column_type in types {
            out.extend_from_slice(&column_type.oid().to_be_bytes());
        }
    });
}

/// Appends a RowDescription of one column that belongs to no table.
pub(super) fn row_description(out: &mut Vec<u8>, column: &str, column_type: Type, binary: bool) {
    append(out, b'T', |out| {
        out.extend_from_slice(&[0, 1]);
        append_cstr(out, column.as_bytes());
        out.extend_from_slice(&[0; 6]);
        out.extend_from_slice(&column_type.oid().to_be_bytes());
        out.extend_from_slice(&column_type.length().to_be_bytes());
        out.extend_from_slice(&(-1i32).to_be_bytes());
        out.extend_from_slice(&u16::from(binary).to_be_bytes());
    });
}

pub(super) fn data_row(out: &mut Vec<u8>, value: &[u8]) {
    append(out, b'D', |out| {
        out.extend_from_slice(&[0, 1]);
        out.extend_from_slice(&u32::try_from(value.len()).unwrap_or(0).to_be_bytes());
        out.extend_from_slice(value);
    });
}

/// The SET TRANSACTION statement for these modes.
pub(super) fn set_transaction(modes: TransactionModes) -> String {
    let read = |only| if only { "READ ONLY" } else { "READ WRITE" }.to_owned();
    let deferrable = |yes| if yes { "DEFERRABLE" } else { "NOT DEFERRABLE" }.to_owned();
    let all = [
        modes.isolation.map(|level| format!("ISOLATION LEVEL {level}")),
        modes.read_only.map(read),
        modes.deferrable.map(deferrable),
    ];
    format!("SET TRANSACTION {}", all.into_iter().flatten().collect::<Vec<_>>().join(", "))
}
