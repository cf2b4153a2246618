//! A table: columns with types, rows, and their encoding on the wire.

use bytes::{BufMut as _, BytesMut};
use pgwire::messages::data::{DataRow, FieldDescription, RowDescription};
use serde_json::Value;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::control_path::admin::fields::{Described, Field, FieldKind};

/// A column's type. Where PgBouncer has `numeric` for numbers that grow, the console has `int8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `text`.
    Text,
    /// `int4`.
    Int,
    /// `int8`.
    BigInt,
    /// `bool`.
    Truth,
}

/// A column's name and type.
pub type Column = (&'static str, Kind);

/// Columns written as words: `name` for a text, `name:int` and `name:bigint` for numbers.
pub fn columns(words: &'static str) -> Vec<Column> {
    let column = |word: &'static str| match word.split_once(':') {
        None => (word, Kind::Text),
        Some((name, "int")) => (name, Kind::Int),
        Some((name, _)) => (name, Kind::BigInt),
    };
    words.split_whitespace().map(column).collect()
}

/// Columns for these fields of `T`, all of them if `names` is empty. Whole numbers are `int8` if `wide`.
pub fn columns_of<T: Described>(names: &str, wide: bool) -> Vec<Column> {
    let kind = |kind| match kind {
        FieldKind::Int if !wide => Kind::Int,
        FieldKind::Int | FieldKind::BigInt => Kind::BigInt,
        FieldKind::Truth => Kind::Truth,
        _ => Kind::Text,
    };
    let column = |field: &Field| (field.name, kind(field.kind));
    let named = |name| T::FIELDS.iter().find(|field| field.name == name).map(column);
    match names {
        "" => T::FIELDS.iter().map(column).collect(),
        _ => names.split_whitespace().filter_map(named).collect(),
    }
}

/// One value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cell {
    /// NULL.
    Null,
    /// For [`Kind::Text`].
    Text(String),
    /// For [`Kind::Int`] and [`Kind::BigInt`].
    Number(i64),
    /// For [`Kind::Truth`].
    Truth(bool),
}

/// Columns and rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// In PgBouncer's order where it has the table too; ours follow.
    pub columns: Vec<Column>,
    /// Each as long as `columns`.
    pub rows: Vec<Vec<Cell>>,
}

impl Table {
    /// With [`columns`] written as words, and no rows yet.
    pub fn new(words: &'static str) -> Self {
        Self { columns: columns(words), rows: Vec::new() }
    }

    /// A row for each of `values`, with these fields. A time that is always there is in the past and is shown
    /// as PgBouncer shows times; others may be thousands of years away and are RFC 3339.
    pub fn of<T: Described>(names: &str, values: &[T]) -> Self {
        let mut table = Self { columns: columns_of::<T>(names, false), rows: Vec::new() };
        for value in values {
            let object = serde_json::to_value(value).unwrap_or_default();
            let cell = |(name, _): &Column| {
                let value = object.get(*name).unwrap_or(&Value::Null);
                let past = |field: &&Field| field.kind == FieldKind::Time && !field.optional;
                let is_past = T::FIELDS.iter().filter(past).any(|field| field.name == *name);
                let time = value.as_str().and_then(|text| OffsetDateTime::parse(text, &Rfc3339).ok());
                match time.filter(|_| is_past) {
                    Some(time) => super::show_traffic::timestamp(time.into()).into(),
                    None => Cell::of_json(value, ","),
                }
            };
            table.rows.push(table.columns.iter().map(cell).collect());
        }
        table
    }

    /// One row of one text.
    pub fn of_text(column: &'static str, text: impl Into<String>) -> Self {
        Self { columns: vec![(column, Kind::Text)], rows: vec![vec![Cell::Text(text.into())]] }
    }

    /// RowDescription; `formats` as Bind gives them.
    pub fn description(&self, formats: &Formats) -> RowDescription {
        let field = |(at, (name, kind)): (usize, &Column)| {
            let (type_id, size) = match kind {
                Kind::Text => (25, -1),
                Kind::Int => (23, 4),
                Kind::BigInt => (20, 8),
                Kind::Truth => (16, 1),
            };
            FieldDescription::new((*name).to_owned(), 0, 0, type_id, size, -1, formats.of(at))
        };
        RowDescription::new(self.columns.iter().enumerate().map(field).collect())
    }

    /// DataRow.
    pub fn data_row(&self, row: &[Cell], formats: &Formats) -> DataRow {
        let mut data = BytesMut::new();
        for (at, (cell, (_, kind))) in row.iter().zip(&self.columns).enumerate() {
            cell.encode(*kind, formats.of(at) == 1, &mut data);
        }
        DataRow::new(data, i16::try_from(row.len()).unwrap_or(i16::MAX))
    }
}

/// Text or binary, as a Bind message asks for: nothing (all text), one code for all, or one for each column.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Formats(pub Vec<i16>);

impl Formats {
    fn of(&self, column: usize) -> i16 {
        match self.0.as_slice() {
            [one] => *one,
            each => each.get(column).copied().unwrap_or(0),
        }
    }
}

impl Cell {
    /// A JSON value. The elements of a list are joined with `separator`.
    pub fn of_json(value: &Value, separator: &str) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Bool(truth) => Self::Truth(*truth),
            Value::Number(number) => number.as_i64().map_or(Self::Null, Self::Number),
            other => Self::Text(text_of(other, separator)),
        }
    }

    fn encode(&self, kind: Kind, binary: bool, out: &mut BytesMut) {
        let mut put = |bytes: &[u8]| {
            out.put_i32(i32::try_from(bytes.len()).unwrap_or(i32::MAX));
            out.put_slice(bytes);
        };
        match self {
            Self::Null => out.put_i32(-1),
            Self::Text(text) => put(text.as_bytes()),
            Self::Truth(truth) if binary => put(&[u8::from(*truth)]),
            Self::Truth(truth) => put(if *truth { b"t" } else { b"f" }),
            Self::Number(number) if binary && kind == Kind::Int => {
                put(&i32::try_from(*number).unwrap_or(i32::MAX).to_be_bytes());
            }
            Self::Number(number) if binary => put(&number.to_be_bytes()),
            Self::Number(number) => put(number.to_string().as_bytes()),
        }
    }
}

/// A list's elements; an object's values.
fn text_of(value: &Value, separator: &str) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(list) => {
            list.iter().map(|item| text_of(item, separator)).collect::<Vec<_>>().join(separator)
        }
        Value::Object(object) => {
            object.values().map(|value| text_of(value, separator)).collect::<Vec<_>>().join(" ")
        }
        other => other.to_string(),
    }
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<bool> for Cell {
    fn from(truth: bool) -> Self {
        Self::Truth(truth)
    }
}

macro_rules! cell_from_numbers {
    ($($number:ty)+) => {$(
        impl From<$number> for Cell {
            fn from(number: $number) -> Self {
                Self::Number(i64::try_from(number).unwrap_or(i64::MAX))
            }
        }
    )+};
}
cell_from_numbers!(i32 u16 u32 i64 u64 usize u128);

impl<T: Into<Cell>> From<Option<T>> for Cell {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_look_as_postgresql_writes_them_in_both_formats() {
        let table = Table {
            columns: vec![("a", Kind::Text), ("b", Kind::Int), ("c", Kind::BigInt), ("d", Kind::Truth)],
            rows: vec![],
        };
        let row = [Cell::from("x"), Cell::from(7), Cell::from(-1_i64), Cell::from(true)];
        let text = table.data_row(&row, &Formats::default());
        assert_eq!(text.data.as_ref(), b"\0\0\0\x01x\0\0\0\x017\0\0\0\x02-1\0\0\0\x01t");
        let binary = table.data_row(&row, &Formats(vec![1]));
        assert_eq!(
            binary.data.as_ref(),
            b"\0\0\0\x01x\0\0\0\x04\0\0\0\x07\0\0\0\x08\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\x01\x01"
        );
        assert_eq!(table.data_row(&[Cell::Null], &Formats::default()).data.as_ref(), b"\xff\xff\xff\xff");
        assert_eq!(table.description(&Formats(vec![0, 1, 1, 0])).fields[1].format_code, 1);
    }
}
