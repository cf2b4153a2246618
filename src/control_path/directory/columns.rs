//! Rows by column, as a query has returned them or as a snapshot keeps them: the records are read from both in the
//! same way (`rows.rs`).
//!
//! A snapshot keeps the values as PostgreSQL has sent them, in its binary format, with the names and types of the columns.

use std::error::Error;

use tokio_postgres::{
    Row,
    types::{FromSql, Type},
};
use zeroize::Zeroizing;

use crate::control_path::central::causes;

/// A row of named columns.
pub trait Columns {
    /// The value of a column.
    fn column<'a, T: FromSql<'a>>(&'a self, name: &str) -> Result<T, String>;
}

impl Columns for Row {
    fn column<'a, T: FromSql<'a>>(&'a self, name: &str) -> Result<T, String> {
        self.try_get(name).map_err(|error| causes(&error))
    }
}

/// Rows that were read from the central database. Zeroised on drop: they contain verifiers.
pub struct Table {
    columns: Vec<(String, Type)>,
    /// Of each cell its length, or [`NULL`], and its bytes.
    cells: Zeroizing<Vec<u8>>,
    /// Where each row begins in `cells`.
    rows: Vec<usize>,
}

/// The length of a cell that is null, as in PostgreSQL's protocol.
const NULL: i32 = -1;

/// Why bytes are no table.
#[derive(Debug, thiserror::Error)]
#[error("its rows cannot be read")]
pub struct NoTable;

/// One row of a [`Table`].
#[derive(Clone, Copy)]
pub struct StoredRow<'a> {
    columns: &'a [(String, Type)],
    cells: &'a [u8],
}

impl Table {
    /// The rows of an answer.
    pub fn of(rows: &[Row]) -> Self {
        let columns = rows.first().map_or(&[][..], Row::columns);
        let columns = columns.iter().map(|column| (column.name().to_owned(), column.type_().clone()));
        let mut table = Self { columns: columns.collect(), cells: Zeroizing::default(), rows: Vec::new() };
        for row in rows {
            table.rows.push(table.cells.len());
            for at in 0..row.len() {
                // A value of any type can be taken as bytes.
                let bytes = row.try_get::<_, Bytes<'_>>(at).map_or(None, |Bytes(bytes)| bytes);
                let length = bytes.map_or(NULL, |bytes| i32::try_from(bytes.len()).unwrap_or(NULL));
                table.cells.extend_from_slice(&length.to_be_bytes());
                table.cells.extend_from_slice(bytes.unwrap_or_default());
            }
        }
        table
    }

    /// Its rows, in order.
    pub fn rows(&self) -> impl Iterator<Item = StoredRow<'_>> {
        (0..self.rows.len()).filter_map(|at| self.row(at))
    }

    /// One row.
    pub fn row(&self, at: usize) -> Option<StoredRow<'_>> {
        let cells = self.cells.get(*self.rows.get(at)?..)?;
        Some(StoredRow { columns: &self.columns, cells })
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Appends the table to `bytes`, to be read by [`Self::read`].
    pub fn write(&self, bytes: &mut Vec<u8>) {
        write_number(bytes, self.columns.len());
        for (name, of_type) in &self.columns {
            write_number(bytes, name.len());
            bytes.extend_from_slice(name.as_bytes());
            bytes.extend_from_slice(&of_type.oid().to_be_bytes());
        }
        write_number(bytes, self.rows.len());
        write_number(bytes, self.cells.len());
        bytes.extend_from_slice(&self.cells);
    }

    /// Takes a table from the front of `bytes`.
    pub fn read(bytes: &mut &[u8]) -> Result<Self, NoTable> {
        let mut columns = Vec::new();
        for _ in 0..read_number(bytes)? {
            let length = read_number(bytes)?;
            let name = std::str::from_utf8(take(bytes, length)?).map_err(|_| NoTable)?;
            let oid = u32::from_be_bytes(take_array(bytes)?);
            columns.push((name.to_owned(), Type::from_oid(oid).unwrap_or(Type::UNKNOWN)));
        }
        let (count, length) = (read_number(bytes)?, read_number(bytes)?);
        // Rows without columns would take no bytes, however many they are.
        if columns.is_empty() && count > 0 {
            return Err(NoTable);
        }
        let cells = Zeroizing::new(take(bytes, length)?.to_vec());
        let (mut rows, mut rest) = (Vec::new(), cells.as_slice());
        for _ in 0..count {
            rows.push(cells.len() - rest.len());
            for _ in &columns {
                read_cell(&mut rest)?;
            }
        }
        Ok(Self { columns, cells, rows })
    }
}

impl Columns for StoredRow<'_> {
    /// A column that the snapshot does not have is null: a version before this one has written it.
    fn column<'a, T: FromSql<'a>>(&'a self, name: &str) -> Result<T, String> {
        let failed = |error: Box<dyn Error + Sync + Send>| format!("column {name}: {error}");
        let Some(at) = self.columns.iter().position(|(column, _)| column == name) else {
            return T::from_sql_null(&Type::UNKNOWN).map_err(failed);
        };
        let of_type = &self.columns.get(at).ok_or("no such column")?.1;
        if !T::accepts(of_type) {
            return Err(format!("column {name} has the type {of_type}"));
        }
        let mut rest = self.cells;
        for _ in 0..at {
            read_cell(&mut rest).map_err(|error| error.to_string())?;
        }
        let value = read_cell(&mut rest).map_err(|error| error.to_string())?;
        T::from_sql_nullable(of_type, value).map_err(failed)
    }
}

/// The bytes of a value, as they came.
struct Bytes<'a>(Option<&'a [u8]>);

impl<'a> FromSql<'a> for Bytes<'a> {
    fn from_sql(_: &Type, bytes: &'a [u8]) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(Some(bytes)))
    }

    fn from_sql_null(_: &Type) -> Result<Self, Box<dyn Error + Sync + Send>> {
        Ok(Self(None))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

fn write_number(bytes: &mut Vec<u8>, number: usize) {
    bytes.extend_from_slice(&(number as u64).to_be_bytes());
}

fn read_number(bytes: &mut &[u8]) -> Result<usize, NoTable> {
    usize::try_from(u64::from_be_bytes(take_array(bytes)?)).map_err(|_| NoTable)
}

fn read_cell<'a>(bytes: &mut &'a [u8]) -> Result<Option<&'a [u8]>, NoTable> {
    match i32::from_be_bytes(take_array(bytes)?) {
        NULL => Ok(None),
        length => take(bytes, usize::try_from(length).map_err(|_| NoTable)?).map(Some),
    }
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> Result<&'a [u8], NoTable> {
    let (taken, rest) = bytes.split_at_checked(length).ok_or(NoTable)?;
    *bytes = rest;
    Ok(taken)
}

fn take_array<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], NoTable> {
    let (taken, rest) = bytes.split_first_chunk().ok_or(NoTable)?;
    *bytes = rest;
    Ok(*taken)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Two columns, `id` and `name`.
    fn table(rows: &[(i64, Option<&str>)]) -> Table {
        let columns = vec![("id".to_owned(), Type::INT8), ("name".to_owned(), Type::TEXT)];
        let mut table = Table { columns, cells: Zeroizing::default(), rows: Vec::new() };
        for (id, name) in rows {
            table.rows.push(table.cells.len());
            table.cells.extend_from_slice(&8_i32.to_be_bytes());
            table.cells.extend_from_slice(&id.to_be_bytes());
            let length = name.map_or(NULL, |name| i32::try_from(name.len()).unwrap());
            table.cells.extend_from_slice(&length.to_be_bytes());
            table.cells.extend_from_slice(name.unwrap_or_default().as_bytes());
        }
        table
    }

    #[test]
    fn a_column_is_found_by_its_name_and_a_missing_one_is_null() {
        let table = table(&[(1, Some("acme")), (2, None)]);
        let (first, second) = (table.row(0).unwrap(), table.row(1).unwrap());
        assert_eq!(first.column::<&str>("name").unwrap(), "acme");
        assert_eq!(second.column::<i64>("id").unwrap(), 2);
        assert_eq!(second.column::<Option<&str>>("name").unwrap(), None);
        assert!(second.column::<&str>("name").is_err());
        assert_eq!(first.column::<Option<i32>>("added_later").unwrap(), None);
        assert!(first.column::<&str>("id").unwrap_err().contains("int8"));
        assert!(table.row(2).is_none());
    }

    proptest! {
        #[test]
        fn a_table_read_back_has_the_same_rows(rows in prop::collection::vec((any::<i64>(), prop::option::of(".{0,9}")), 0..20)) {
            let rows: Vec<_> = rows.iter().map(|(id, name)| (*id, name.as_deref())).collect();
            let mut bytes = Vec::new();
            table(&rows).write(&mut bytes);
            bytes.extend_from_slice(b"more");
            let mut rest = bytes.as_slice();
            let read = Table::read(&mut rest).unwrap();
            prop_assert_eq!(rest, b"more");
            let found: Vec<(i64, Option<&str>)> = (0..read.len())
                .map(|at| {
                    let row = read.row(at).unwrap();
                    let name = row.column::<Option<&str>>("name").unwrap().map(|name| &*Box::leak(name.into()));
                    (row.column("id").unwrap(), name)
                })
                .collect();
            prop_assert_eq!(found, rows);
        }

        #[test]
        fn other_bytes_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Table::read(&mut bytes.as_slice());
        }
    }
}
