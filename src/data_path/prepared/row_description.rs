//! Parameter types and result columns of a prepared statement, from its Describe. Pure.
//!
//! A server fixes them at Parse. If a table or type changes, it rejects the statement with "cached plan must
//! not change result type" (0A000). So two clients may share a server's statement only if both have received
//! the same description.

use std::hash::{DefaultHasher, Hash, Hasher};

use crate::{
    data_path::sql::{Effects, Kind, Lexing, statements},
    wire::frame::{HEADER_BYTES, cstr},
};

/// A hash of parameter types and result columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowDescription(u64);

impl RowDescription {
    /// For another process whose [`Self::sample`] is the same.
    pub fn to_bits(self) -> u64 {
        self.0
    }

    /// From another process whose [`Self::sample`] is the same.
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Differs between builds whose hash functions differ.
    pub fn sample() -> u64 {
        let mut hasher = DefaultHasher::default();
        b"pglobby".as_slice().hash(&mut hasher);
        hasher.finish()
    }
}

/// Reads the reply to one Describe.
#[derive(Debug, Default)]
pub struct DescriptionReader {
    hasher: DefaultHasher,
    /// A message could not be parsed.
    incomplete: bool,
}

impl DescriptionReader {
    /// Adds a ParameterDescription, RowDescription or NoData.
    pub fn add(&mut self, message: &[u8]) {
        let read = match message.first() {
            Some(b't') => message.get(HEADER_BYTES..).map(|types| types.hash(&mut self.hasher)),
            Some(b'T') => self.columns(message),
            _ => Some(()),
        };
        self.incomplete |= read.is_none();
    }

    /// Hashes names, types and type modifiers. The source table does not count: a recreated table with the
    /// same columns is equivalent.
    fn columns(&mut self, message: &[u8]) -> Option<()> {
        let (count, mut rest) = message.get(HEADER_BYTES..)?.split_first_chunk::<2>()?;
        for _ in 0..u16::from_be_bytes(*count) {
            cstr(&mut rest).ok()?.hash(&mut self.hasher);
            let (_table_and_column, behind) = rest.split_at_checked(6)?;
            let (type_and_modifier, behind) = behind.split_at_checked(10)?;
            type_and_modifier.hash(&mut self.hasher);
            rest = behind.get(2..)?; // the format, which is unknown before Bind
        }
        Some(())
    }

    /// Ends the reply. Returns `None` if it could not be parsed.
    pub fn finish(&mut self) -> Option<RowDescription> {
        let Self { hasher, incomplete } = std::mem::take(self);
        (!incomplete).then(|| RowDescription(hasher.finish()))
    }
}

/// Returns whether the description is fixed at Parse. FETCH, EXECUTE and EXPLAIN determine it later.
pub fn has_fixed_description(sql: &[u8]) -> bool {
    let mut found = statements(sql, Lexing::default());
    matches!(found.next().map(|statement| statement.kind), Some(Kind::Query)) && found.next().is_none()
}

/// Returns whether the meaning of a text is determined at Parse rather than at execution. Other
/// statements return false: setting parameters before them could fail, because some must come first in a
/// transaction or run in a failed one.
pub fn has_fixed_meaning(sql: &[u8]) -> bool {
    statements(sql, Lexing::default()).next().is_some_and(|statement| match statement.kind {
        Kind::Query
        | Kind::Explain { .. }
        | Kind::DeclareCursor { .. }
        | Kind::Call
        | Kind::CreateTemp { .. } => true,
        Kind::Ddl => !statement.effects.contains(Effects::OUTSIDE_TRANSACTION),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::message::{append, append_cstr};

    fn description(columns: &[(&str, u32, u32)], parameters: &[u8]) -> Option<RowDescription> {
        let mut reader = DescriptionReader::default();
        let mut message = Vec::new();
        append(&mut message, b't', |out| out.extend_from_slice(parameters));
        reader.add(&message);
        message.clear();
        append(&mut message, b'T', |out| {
            out.extend_from_slice(&u16::try_from(columns.len()).unwrap().to_be_bytes());
            for (name, table, of_type) in columns {
                append_cstr(out, name.as_bytes());
                out.extend_from_slice(&table.to_be_bytes());
                out.extend_from_slice(&[0, 1]);
                out.extend_from_slice(&of_type.to_be_bytes());
                out.extend_from_slice(&[0, 4, 255, 255, 255, 255, 0, 0]);
            }
        });
        reader.add(&message);
        reader.finish()
    }

    #[test]
    fn a_description_depends_on_names_and_types_but_not_on_the_table() {
        let before = description(&[("id", 1, 23)], &[0, 0]);
        assert!(before.is_some());
        assert_eq!(before, description(&[("id", 2, 23)], &[0, 0]));
        assert_ne!(before, description(&[("id", 1, 25)], &[0, 0]));
        assert_ne!(before, description(&[("ID", 1, 23)], &[0, 0]));
        assert_ne!(before, description(&[("id", 1, 23), ("x", 1, 23)], &[0, 0]));
        assert_ne!(before, description(&[("id", 1, 23)], &[0, 1, 0, 0, 0, 23]));
    }

    #[test]
    fn a_truncated_message_gives_no_description() {
        let mut reader = DescriptionReader::default();
        reader.add(b"T\0\0\0\x07\0\x01x");
        assert_eq!(reader.finish(), None);
    }

    #[test]
    fn transaction_statements_have_no_fixed_meaning() {
        for sql in
            ["SELECT 1", "DECLARE c CURSOR FOR SELECT 1", "EXPLAIN SELECT 1", "CREATE TABLE t AS SELECT 1"]
        {
            assert!(has_fixed_meaning(sql.as_bytes()), "{sql}");
        }
        for sql in ["BEGIN", "ROLLBACK", "SET TimeZone = 'UTC'", "VACUUM", "SHOW all", "DISCARD ALL", ""] {
            assert!(!has_fixed_meaning(sql.as_bytes()), "{sql}");
        }
    }

    #[test]
    fn only_plain_queries_have_a_fixed_description() {
        assert!(
            has_fixed_description(b"-- all\nSELECT * FROM t")
                && has_fixed_description(b"insert into t values (1) returning *")
        );
        assert!(
            !has_fixed_description(b"FETCH c")
                && !has_fixed_description(b"SHOW x")
                && !has_fixed_description(b"EXPLAIN SELECT 1")
                && !has_fixed_description(b"")
        );
    }
}
