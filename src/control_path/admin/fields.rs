//! Describes the fields of what admin commands and listings return. A struct is declared once, in
//! `described!`; JSON, the OpenAPI schema and the console's columns all follow from that.

use secrecy::SecretString;
use serde::Serialize;
use serde_json::Value;
use time::OffsetDateTime;

/// A struct with described fields.
pub trait Described: Serialize {
    /// In the order of the JSON object.
    const FIELDS: &'static [Field];
}

/// One field of a JSON object.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// Its key.
    pub name: &'static str,
    /// The type of its value.
    pub kind: FieldKind,
    /// It may be null or missing.
    pub optional: bool,
}

/// The type of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldKind {
    /// Text.
    Text,
    /// A whole number that fits `int4`.
    Int,
    /// A larger whole number.
    BigInt,
    /// True or false.
    Truth,
    /// RFC 3339.
    Time,
    /// A password or key.
    Secret,
    /// Any JSON object.
    Object,
    /// A list of texts.
    Texts,
    /// A list of objects with this schema.
    List(&'static str),
}

impl Field {
    /// The field `name` of type `T`.
    pub const fn of<T: FieldType>(name: &'static str) -> Self {
        Self { name, kind: T::KIND, optional: T::OPTIONAL }
    }
}

/// A type that a field can have.
pub trait FieldType {
    /// As JSON.
    const KIND: FieldKind;
    /// Whether it may be null.
    const OPTIONAL: bool = false;
}

impl<T: FieldType> FieldType for Option<T> {
    const KIND: FieldKind = T::KIND;
    const OPTIONAL: bool = true;
}

macro_rules! field_types {
    ($($type:ty: $kind:ident,)+) => {$(
        impl FieldType for $type {
            const KIND: FieldKind = FieldKind::$kind;
        }
    )+};
}

field_types! {
    String: Text,
    &'static str: Text,
    i32: Int,
    i64: BigInt,
    u64: BigInt,
    bool: Truth,
    OffsetDateTime: Time,
    SecretString: Secret,
    Value: Object,
    Vec<String>: Texts,
}

/// Declares structs and implements [`Described`] for them.
macro_rules! described {
    ($($(#[$about:meta])* pub struct $name:ident {
        $($(#[$each:meta])* pub $field:ident: $type:ty,)+
    })+) => {$(
        $(#[$about])*
        pub struct $name {
            $($(#[$each])* pub $field: $type,)+
        }

        impl $crate::control_path::admin::fields::Described for $name {
            const FIELDS: &'static [$crate::control_path::admin::fields::Field] =
                &[$($crate::control_path::admin::fields::Field::of::<$type>(stringify!($field)),)+];
        }
    )+};
}
pub(in crate::control_path) use described;

/// A struct whose fields are the columns of the same names; others are given after the semicolon.
macro_rules! from_row {
    ($row:ident => $name:ident { $($field:ident),+ $(; $($other:ident: $value:expr),+)? }) => {
        $name { $($field: $row.get(stringify!($field)),)+ $($($other: $value,)+)? }
    };
}
pub(in crate::control_path) use from_row;
