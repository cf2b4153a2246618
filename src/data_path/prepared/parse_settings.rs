//! The settings under which PostgreSQL parsed a text. Pure.
//!
//! Parsing evaluates literals and looks up tables, operators and functions, so the meaning of a text depends
//! on settings such as `TimeZone` and `search_path`. Two sessions share a statement on a server only while
//! both have the settings under which it was parsed: PostgreSQL parses a text again when a table or
//! `search_path` changes, under the settings of that moment. A session that uses a statement under other
//! settings gets a statement of its own. If a server must parse a statement for a session whose settings have
//! changed since, the proxy sets the original settings before the Parse and restores the present ones after
//! it, in the same write.

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    sync::{
        Arc, Mutex, OnceLock, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::data_path::{
    lock::locked,
    session_state::{Settings, parameters::affects_parsing},
};

/// Settings under which a text was parsed.
#[derive(Debug, Default)]
pub struct ParseSettings {
    /// Unique in the process.
    pub id: u64,
    /// The relevant settings; empty until they are known.
    values: OnceLock<Settings>,
}

static LAST_ID: AtomicU64 = AtomicU64::new(0);

impl ParseSettings {
    fn new(values: OnceLock<Settings>) -> Arc<Self> {
        Arc::new(Self { id: LAST_ID.fetch_add(1, Ordering::Relaxed) + 1, values })
    }

    /// Creates settings whose values a server has yet to report.
    pub fn unknown() -> Arc<Self> {
        Self::new(OnceLock::new())
    }

    /// Stores the values.
    pub fn set_values(&self, settings: &Settings) {
        let _ = self.values.set(settings.filtered(affects_parsing));
    }

    /// Returns the values if they are known.
    pub fn values(&self) -> Option<&Settings> {
        self.values.get()
    }
}

/// The settings of all sessions, without duplicates, so that two can be compared by address. Weak: settings
/// that no session has are freed.
#[derive(Debug, Default)]
pub struct ParseSettingsTable(Mutex<HashMap<u64, Vec<Weak<ParseSettings>>>>, RandomState);

impl ParseSettingsTable {
    /// Returns the entry for these settings.
    pub fn of(&self, settings: &Settings) -> Arc<ParseSettings> {
        let settings = settings.filtered(affects_parsing);
        let mut table = locked(&self.0);
        if table.len() == table.capacity() {
            table.retain(|_, entry| entry.iter().any(|entry| entry.strong_count() > 0));
        }
        let same = table.entry(self.1.hash_one(&settings)).or_default();
        same.retain(|entry| entry.strong_count() > 0);
        let mut entry = same.iter().filter_map(Weak::upgrade);
        if let Some(entry) = entry.find(|entry| entry.values() == Some(&settings)) {
            return entry;
        }
        let new = ParseSettings::new(settings.into());
        same.push(Arc::downgrade(&new));
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(values: &[(&str, &str)]) -> Settings {
        Settings::new(values.iter().map(|(name, value)| (name.to_string(), value.to_string())))
    }

    #[test]
    fn sessions_with_equal_relevant_settings_share_an_entry() {
        let table = ParseSettingsTable::default();
        let one = table.of(&settings(&[("application_name", "one"), ("TimeZone", "UTC")]));
        let other = table.of(&settings(&[("application_name", "other"), ("TimeZone", "UTC")]));
        assert!(Arc::ptr_eq(&one, &other));
        assert!(!Arc::ptr_eq(&one, &table.of(&settings(&[("TimeZone", "Asia/Tokyo")]))));
        assert!(!Arc::ptr_eq(&one, &table.of(&Settings::default())));
    }

    #[test]
    fn unused_settings_are_freed() {
        let table = ParseSettingsTable::default();
        for number in 0..1000 {
            table.of(&settings(&[("my.note", &number.to_string())]));
        }
        assert!(table.0.lock().unwrap().len() < 20);
    }
}
