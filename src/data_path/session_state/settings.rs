//! The parameters that a session has SET. Pure.

use crate::data_path::memory_limit::PIECE_BYTES;

/// The parameters by which a session differs from a server that has just been opened; sorted by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Settings {
    values: Vec<(Box<str>, Box<str>)>,
}

impl Settings {
    /// From names and values in any order; of a name given twice the last value counts. Names are compared without
    /// regard to case, as PostgreSQL does.
    pub fn new(values: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut settings = Self::default();
        for (name, value) in values {
            settings.set(&name, Some(&value));
        }
        settings
    }

    /// Sets a value or takes it away.
    pub fn set(&mut self, name: &str, value: Option<&str>) {
        let name = name.to_ascii_lowercase().into_boxed_str();
        match (self.values.binary_search_by(|(known, _)| known.cmp(&name)), value) {
            (Ok(at), Some(value)) => self.values[at].1 = value.into(),
            (Ok(at), None) => drop(self.values.remove(at)),
            (Err(at), Some(value)) => self.values.insert(at, (name, value.into())),
            (Err(_), None) => {}
        }
    }

    /// These, with another value of one, or without it.
    pub fn with(&self, name: &str, value: Option<&str>) -> Self {
        let mut settings = self.clone();
        settings.set(name, value);
        settings
    }

    /// The value of a parameter, by its name in lower case.
    pub fn get(&self, name: &str) -> Option<&str> {
        let at = self.values.binary_search_by(|(known, _)| (**known).cmp(name)).ok()?;
        self.values.get(at).map(|(_, value)| &**value)
    }

    /// Every name and value.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.values.iter().map(|(name, value)| (&**name, &**value))
    }

    /// Those whose names are such.
    pub fn only(&self, is_such: impl Fn(&str) -> bool) -> Self {
        Self { values: self.values.iter().filter(|(name, _)| is_such(name)).cloned().collect() }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// What they take.
    pub fn bytes(&self) -> usize {
        let each = size_of::<(Box<str>, Box<str>)>() + 2 * PIECE_BYTES;
        self.values.iter().map(|(name, value)| name.len() + value.len() + each).sum()
    }

    /// What they would take without these, and with so many bytes of text in their place.
    pub fn bytes_with(&self, names: &[Box<str>], text: usize) -> usize {
        let known = |name: &str| self.get(name).map_or(0, |value| name.len() + value.len());
        let replaced: usize = names.iter().map(|name| known(name)).sum();
        (self.bytes() + text).saturating_sub(replaced)
    }

    /// Whether the session is as a server is opened.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}
