//! Parameters that a session has set. Pure.

use crate::data_path::{memory_limit::PIECE_BYTES, packed_session::PackedSettings};

/// The parameters in which a session differs from a new server; sorted by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Settings {
    values: Vec<(Box<str>, Box<str>)>,
}

impl Settings {
    /// Creates settings from names and values in any order. If a name is repeated, its last value counts.
    /// Names are case-insensitive, as in PostgreSQL.
    pub fn new(values: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut settings = Self::default();
        for (name, value) in values {
            settings.set(&name, Some(&value));
        }
        settings
    }

    /// Names and values, for another process.
    pub fn pack(&self) -> PackedSettings {
        self.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// Sets a value, or removes it for `None`.
    pub fn set(&mut self, name: &str, value: Option<&str>) {
        let name = name.to_ascii_lowercase().into_boxed_str();
        match (self.values.binary_search_by(|(stored, _)| stored.cmp(&name)), value) {
            (Ok(at), Some(value)) => self.values[at].1 = value.into(),
            (Ok(at), None) => drop(self.values.remove(at)),
            (Err(at), Some(value)) => self.values.insert(at, (name, value.into())),
            (Err(_), None) => {}
        }
    }

    /// Returns a copy with one value changed or removed.
    pub fn with(&self, name: &str, value: Option<&str>) -> Self {
        let mut settings = self.clone();
        settings.set(name, value);
        settings
    }

    /// Returns the value of a parameter; `name` is in lower case.
    pub fn get(&self, name: &str) -> Option<&str> {
        let at = self.values.binary_search_by(|(stored, _)| (**stored).cmp(name)).ok()?;
        self.values.get(at).map(|(_, value)| &**value)
    }

    /// Iterates over names and values, in the order of the names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.values.iter().map(|(name, value)| (&**name, &**value))
    }

    /// Returns only the settings whose names pass `filter`.
    pub fn filtered(&self, filter: impl Fn(&str) -> bool) -> Self {
        Self { values: self.values.iter().filter(|(name, _)| filter(name)).cloned().collect() }
    }

    /// Returns the number of settings.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Returns the memory used in bytes.
    pub fn bytes(&self) -> usize {
        let each = size_of::<(Box<str>, Box<str>)>() + 2 * PIECE_BYTES;
        self.values.iter().map(|(name, value)| name.len() + value.len() + each).sum()
    }

    /// Returns the memory in bytes after `names` are replaced by `text` bytes of new values.
    pub fn bytes_with(&self, names: &[Box<str>], text: usize) -> usize {
        let stored_bytes = |name: &str| self.get(name).map_or(0, |value| name.len() + value.len());
        let replaced: usize = names.iter().map(|name| stored_bytes(name)).sum();
        (self.bytes() + text).saturating_sub(replaced)
    }

    /// Returns whether the session has the settings of a new server.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}
