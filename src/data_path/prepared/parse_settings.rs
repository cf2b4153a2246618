//! Under which settings PostgreSQL has parsed a text. Pure.
//!
//! It reads literals and finds tables, operators and functions when it parses, so the same text is another statement under
//! another `TimeZone` or `search_path`. Two sessions share a statement on a server only while both have the settings under
//! which it was parsed: PostgreSQL parses anew when a table or `search_path` changes, and goes by the settings of that
//! moment. A statement that its session uses under other settings is the session's own from then on. Where a server has to
//! parse a statement for a session that has other settings by now, those of the first time are put in place for that
//! moment, and what was there before is put back, all in the same write (`ENTER`, `LEAVE`).

use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::data_path::session_state::{Settings, parameters::matters};

/// Settings under which a text was parsed.
#[derive(Debug, Default)]
pub struct ParseSettings {
    /// Unique over the process.
    pub id: u64,
    /// Those that matter; empty while nobody has said what they were.
    known: OnceLock<Settings>,
}

static LAST_ID: AtomicU64 = AtomicU64::new(0);

impl ParseSettings {
    fn new(known: OnceLock<Settings>) -> Arc<Self> {
        Arc::new(Self { id: LAST_ID.fetch_add(1, Ordering::Relaxed) + 1, known })
    }

    /// Those of a moment, which the server is yet to tell.
    pub fn unknown() -> Arc<Self> {
        Self::new(OnceLock::new())
    }

    /// They were these.
    pub fn are(&self, settings: &Settings) {
        let _ = self.known.set(settings.only(matters));
    }

    /// What they were, if that is known.
    pub fn known(&self) -> Option<&Settings> {
        self.known.get()
    }
}

/// Those that sessions have now, each once, so that comparing two costs no more than comparing where they are. Weak, and found
/// by a digest: what no session has any more takes no memory.
#[derive(Debug, Default)]
pub struct ParseSettingsTable(Mutex<HashMap<u64, Vec<Weak<ParseSettings>>>>, RandomState);

impl ParseSettingsTable {
    /// Those of a session with these settings.
    pub fn of(&self, settings: &Settings) -> Arc<ParseSettings> {
        let settings = settings.only(matters);
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.len() == table.capacity() {
            table.retain(|_, known| known.iter().any(|known| known.strong_count() > 0));
        }
        let same = table.entry(self.1.hash_one(&settings)).or_default();
        same.retain(|known| known.strong_count() > 0);
        let mut known = same.iter().filter_map(Weak::upgrade);
        if let Some(known) = known.find(|known| known.known() == Some(&settings)) {
            return known;
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
    fn sessions_that_agree_on_what_matters_have_the_same() {
        let table = ParseSettingsTable::default();
        let one = table.of(&settings(&[("application_name", "one"), ("TimeZone", "UTC")]));
        let other = table.of(&settings(&[("application_name", "other"), ("TimeZone", "UTC")]));
        assert!(Arc::ptr_eq(&one, &other));
        assert!(!Arc::ptr_eq(&one, &table.of(&settings(&[("TimeZone", "Asia/Tokyo")]))));
        assert!(!Arc::ptr_eq(&one, &table.of(&Settings::default())));
    }

    #[test]
    fn settings_that_no_session_has_are_forgotten() {
        let table = ParseSettingsTable::default();
        for number in 0..1000 {
            table.of(&settings(&[("my.note", &number.to_string())]));
        }
        assert!(table.0.lock().unwrap().len() < 20);
    }
}
