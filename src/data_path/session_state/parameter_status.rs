//! Reported parameters (ParameterStatus) of servers and clients. Pure.
//!
//! The proxy never forwards ParameterStatus directly. In front of a reply it sends the difference between the
//! values that the client has and those of the replying server. Both agree whatever caused the change: this
//! client, another client of the same server, a configuration reload or a promotion.

use std::{
    hash::{BuildHasher, RandomState},
    sync::{Arc, LazyLock},
};

use crate::{data_path::packed_session::PackedReport, wire::message::parameter_status};

/// PostgreSQL 18 reports 15 parameters, and extensions add a few. Lookup is linear.
pub const PARAMETERS_MAX: usize = 128;
/// Limit for all names and values: twice the size of the largest ParameterStatus.
const BYTES_MAX: usize = 128 * 1024;

/// Reported parameters and their values, in the order of their first report.
#[derive(Debug, Clone, Default)]
pub struct ReportedParameters {
    /// `Arc`: a clone allocates nothing per value.
    values: Vec<(Arc<str>, Arc<[u8]>)>,
    /// Hash of all names and values, independent of their order.
    fingerprint: u64,
    /// Size of all names and values.
    bytes: usize,
}

impl PartialEq for ReportedParameters {
    fn eq(&self, other: &Self) -> bool {
        self.fingerprint == other.fingerprint
    }
}

/// A keyed hash, so that clients cannot construct collisions.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

fn fingerprint_of(name: &str, value: &[u8]) -> u64 {
    HASHER.hash_one((name, value))
}

impl ReportedParameters {
    /// Creates the list. If a name is repeated, its last value counts.
    pub fn new<'v>(values: impl IntoIterator<Item = (&'v str, &'v [u8])>) -> Self {
        let mut reported = Self::default();
        for (name, value) in values {
            reported.set(name, value);
        }
        reported
    }

    /// Stores a value and returns whether it changed. At a limit it stores nothing and returns `false`.
    pub fn set(&mut self, name: &str, value: &[u8]) -> bool {
        let count = self.values.len();
        let stored = self.values.iter_mut().find(|(stored, _)| **stored == *name).map(|(_, value)| value);
        let before = stored.as_ref().map_or(0, |stored| name.len() + stored.len());
        let bytes = self.bytes - before + name.len() + value.len();
        if bytes > BYTES_MAX || stored.as_ref().is_some_and(|stored| ***stored == *value) {
            return false;
        }
        match stored {
            Some(stored) => {
                self.fingerprint ^= fingerprint_of(name, stored);
                *stored = value.into();
            }
            None if count == PARAMETERS_MAX => return false,
            None => self.values.push((name.into(), value.into())),
        }
        self.bytes = bytes;
        self.fingerprint ^= fingerprint_of(name, value);
        true
    }

    /// Returns whether the parameter is stored already or can be added.
    pub fn has_room_for(&self, name: &str) -> bool {
        self.values.len() < PARAMETERS_MAX || self.values.iter().any(|(stored, _)| **stored == *name)
    }

    /// Returns the name as the server spells it and the value. Ignores case.
    pub fn find(&self, name: &str) -> Option<(&str, &[u8])> {
        let found = self.values.iter().find(|(stored, _)| stored.eq_ignore_ascii_case(name));
        found.map(|(stored, value)| (&**stored, &**value))
    }

    /// Returns the value if it is valid UTF-8.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.find(name).and_then(|(_, value)| std::str::from_utf8(value).ok())
    }

    /// Iterates over names and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.values.iter().map(|(name, value)| (&**name, &**value))
    }

    /// All values, for another process.
    pub fn pack(&self) -> Vec<PackedReport> {
        self.iter()
            .map(|(name, value)| PackedReport { name: name.to_owned(), value: value.to_vec() })
            .collect()
    }

    /// The values that a client got from another process.
    pub fn unpack(packed: &[PackedReport]) -> Arc<Self> {
        Arc::new(Self::new(packed.iter().map(|report| (&*report.name, &*report.value))))
    }

    /// Appends a ParameterStatus for each parameter.
    pub fn write(&self, out: &mut Vec<u8>) {
        for (name, value) in self.iter() {
            parameter_status(out, name.as_bytes(), value);
        }
    }

    /// Appends a ParameterStatus for each value that differs from `client`, and updates `client`. Parameters
    /// that the server does not report keep their value, because the protocol cannot withdraw a parameter.
    #[cold]
    pub fn write_changes(&self, client: &mut Arc<Self>, out: &mut Vec<u8>) {
        for (at, (name, value)) in self.iter().enumerate() {
            let stored = client.value_near(at, name);
            // Non-ASCII role names in two encodings count as equal, because the proxy does not convert
            // encodings.
            let foreign = |value: &[u8]| !value.is_ascii();
            if stored == Some(value) || stored.is_some_and(|stored| foreign(stored) && foreign(value)) {
                continue;
            }
            parameter_status(out, name.as_bytes(), value);
            Arc::make_mut(client).set(name, value);
        }
    }

    /// Looks at index `at` first, because servers report in the same order.
    fn value_near(&self, at: usize, name: &str) -> Option<&[u8]> {
        let has_name = |(stored, _): &&(Arc<str>, _)| **stored == *name;
        let found = self.values.get(at).filter(has_name).or_else(|| self.values.iter().find(has_name));
        found.map(|(_, value)| &**value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[(&str, &str)]) -> ReportedParameters {
        ReportedParameters::new(values.iter().map(|(name, value)| (*name, value.as_bytes())))
    }

    #[test]
    fn equality_ignores_the_order_of_parameters() {
        let (mut one, two) = (of(&[("a", "1"), ("b", "2")]), of(&[("b", "2"), ("a", "1")]));
        assert_eq!(one, two);
        assert!(one.set("a", b"3") && one != two);
        assert!(one.set("a", b"1") && one == two && !one.set("a", b"1"));
    }

    #[test]
    fn a_server_cannot_exceed_the_limits_of_stored_parameters() {
        let mut reported = ReportedParameters::default();
        let long = vec![b'x'; BYTES_MAX / 2];
        assert!(reported.set("one", &long) && !reported.set("two", &long) && reported.set("one", b"1"));
        assert!(reported.set("two", &long) && !reported.set("one", &long));
        assert_eq!(reported.text("one"), Some("1"));
        for number in 0..2000 {
            reported.set(&number.to_string(), b"");
        }
        assert!(reported.has_room_for("one") && !reported.has_room_for("another"));
        assert_eq!(reported.iter().count(), PARAMETERS_MAX);
    }

    #[test]
    fn a_client_receives_each_difference_once() {
        let mut client =
            Arc::new(of(&[("TimeZone", "UTC"), ("DateStyle", "ISO, MDY"), ("search_path", "a")]));
        let now = of(&[("DateStyle", "ISO, MDY"), ("TimeZone", "Asia/Tokyo"), ("in_hot_standby", "off")]);
        let mut out = Vec::new();
        now.write_changes(&mut client, &mut out);
        let mut expected = Vec::new();
        parameter_status(&mut expected, b"TimeZone", b"Asia/Tokyo");
        parameter_status(&mut expected, b"in_hot_standby", b"off");
        assert_eq!(out, expected);
        assert_eq!((client.text("timezone"), client.text("search_path")), (Some("Asia/Tokyo"), Some("a")));
        now.write_changes(&mut client, &mut out);
        assert_eq!(out, expected, "sent twice");
    }

    #[test]
    fn a_name_in_another_encoding_is_not_sent_again() {
        let mut client = Arc::new(ReportedParameters::new([("session_authorization", &b"\xe9"[..])]));
        let mut out = Vec::new();
        ReportedParameters::new([("session_authorization", "é".as_bytes())])
            .write_changes(&mut client, &mut out);
        assert_eq!(out, b"");
    }
}
