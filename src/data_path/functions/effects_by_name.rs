//! The names in a text that say more than the text does. Pure.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::data_path::{
    memory_limit::{Account, Charge, PIECE_BYTES},
    session_state::{pins::Pins, side_effects::Aftermath, state_query::Doubts},
    sql::{NAME_BYTES_MAX, dotted_names, words},
};

/// What may be left behind by something that is called or used by its name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Traces {
    pub doubts: Doubts,
    pub pins: Pins,
    /// Parameters.
    pub names: BTreeSet<Box<str>>,
}

impl Traces {
    pub fn is_empty(&self) -> bool {
        self.doubts.is_empty() && self.pins.is_empty()
    }

    /// What its names take.
    pub fn bytes(&self) -> usize {
        self.names.iter().map(|name| name.len() + 3 * PIECE_BYTES).sum()
    }

    /// Adds `other`'s; whether that made a difference.
    pub fn merge(&mut self, other: &Self) -> bool {
        let before = (self.doubts, self.pins, self.names.len());
        self.doubts.insert(other.doubts);
        self.pins.insert(other.pins);
        for name in &other.names {
            if !self.names.contains(name) {
                self.names.insert(name.clone());
            }
        }
        before != (self.doubts, self.pins, self.names.len())
    }
}

impl From<Aftermath> for Traces {
    fn from(aftermath: Aftermath) -> Self {
        let names = aftermath.names.into_iter().flatten().collect();
        Self { doubts: aftermath.doubts, pins: aftermath.pins, names }
    }
}

/// What a name stands for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Level {
    /// What is left behind however it is used.
    pub always: Traces,
    /// What only a text that writes can bring about: triggers, defaults, checks.
    pub on_write: Traces,
}

impl Level {
    /// What its names take.
    pub fn bytes(&self) -> usize {
        self.always.bytes() + self.on_write.bytes()
    }

    /// Adds `other`'s; whether that made a difference.
    pub fn merge(&mut self, other: &Self) -> bool {
        self.always.merge(&other.always) | self.on_write.merge(&other.on_write)
    }
}

/// What was read from a catalogue.
#[derive(Debug)]
pub struct Known {
    /// Unique over the process.
    pub version: u64,
    names: HashMap<Box<[u8]>, Level>,
    /// What any text may leave behind.
    any: Traces,
    /// What a text that makes, changes or drops objects may leave behind.
    ddl: Traces,
    /// All of it: for a text whose words cannot be told.
    all: Traces,
    /// What it takes.
    charge: Charge,
}

static LAST_VERSION: AtomicU64 = AtomicU64::new(0);

impl Known {
    /// From what things are called and what their use leaves behind.
    pub fn new(named: impl IntoIterator<Item = (Vec<u8>, Level)>, any: Traces, ddl: Traces) -> Self {
        let version = LAST_VERSION.fetch_add(1, Ordering::Relaxed) + 1;
        let charge = Charge::default();
        let mut known = Self { version, names: HashMap::new(), all: any.clone(), any, ddl, charge };
        known.all.merge(&known.ddl);
        for (name, level) in named {
            known.all.merge(&level.always);
            known.all.merge(&level.on_write);
            match key(&name) {
                Some(key) => drop(known.names.entry(key).or_default().merge(&level)),
                None => {
                    known.any.merge(&level.always);
                    known.any.merge(&level.on_write);
                }
            }
        }
        known
    }

    /// There is too much to read: anything may be left behind by anything.
    pub fn nothing() -> Self {
        Self::new([], Aftermath::anything().into(), Traces::default())
    }

    /// Counts what it takes, in the place of what was counted while it was put together.
    pub fn charged(mut self, mut charge: Charge, memory: &Arc<Account>) -> Self {
        let each = size_of::<(Box<[u8]>, Level)>() + 2 * PIECE_BYTES;
        let names: usize = self.names.iter().map(|(name, level)| name.len() + level.bytes() + each).sum();
        charge.set(memory, names + self.any.bytes() + self.ddl.bytes() + self.all.bytes());
        self.charge = charge;
        self
    }

    /// No text leaves behind more than it shows.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && self.all.is_empty()
    }

    /// What a text may leave behind by what it calls.
    pub fn look(&self, text: &[u8], tangled: bool) -> Option<Aftermath> {
        let mut found = self.any.clone();
        let mut on_write = Traces::default();
        let mut writes = false;
        if tangled || has_unicode_names(text) {
            found.merge(&self.all);
        } else {
            let mut lower = [0; NAME_BYTES_MAX];
            for word in words(text) {
                let Some(lower) = lower.get_mut(..word.len()) else { continue };
                lower.copy_from_slice(word);
                lower.make_ascii_lowercase();
                if let Some(level) = self.names.get(&*lower) {
                    found.merge(&level.always);
                    on_write.merge(&level.on_write);
                }
                if is_write(lower) {
                    writes = true;
                }
                if !self.ddl.is_empty() && is_ddl(lower) {
                    found.merge(&self.ddl);
                }
            }
        }
        if writes {
            found.merge(&on_write);
        }
        if found.is_empty() {
            return None;
        }
        if found.doubts.contains(Doubts::UNNAMED) {
            found.names.extend(dotted_names(text)); // what it runs may have come with the call
        }
        let names: Vec<Box<str>> = found.names.into_iter().collect();
        if !names.is_empty() {
            found.doubts.insert(Doubts::NAMED_SETTINGS);
        }
        let names = (!names.is_empty()).then(|| names.into());
        Some(Aftermath { doubts: found.doubts, pins: found.pins, names, ..Aftermath::default() })
    }
}

/// The word to look for where a name is looked for: its longest. Whoever writes the name writes the word, quoted or not.
/// `None` if there is none.
pub fn key(name: &[u8]) -> Option<Box<[u8]>> {
    words(name).max_by_key(|word| word.len()).map(|word| word.to_ascii_lowercase().into())
}

/// Whether a word (in lower case) may make a text write to a table.
pub fn is_write(word: &[u8]) -> bool {
    matches!(
        word,
        b"insert" | b"update" | b"delete" | b"merge" | b"copy" | b"truncate" | b"execute" | b"call" | b"do"
    ) || is_ddl(word)
}

/// Whether a word (in lower case) may make a text change the catalogue.
fn is_ddl(word: &[u8]) -> bool {
    matches!(
        word,
        b"create" | b"alter" | b"drop" | b"into" | b"refresh" | b"import" | b"grant" | b"revoke" | b"comment"
    )
}

/// `U&"\0066"`: a name whose letters are not there to be read.
fn has_unicode_names(text: &[u8]) -> bool {
    text.windows(3).any(|window| matches!(window, b"U&\"" | b"u&\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(always: Doubts, on_write: Doubts) -> Level {
        let traces = |doubts| Traces { doubts, ..Traces::default() };
        Level { always: traces(always), on_write: traces(on_write) }
    }

    fn known() -> Known {
        let named = [
            (b"next_job".to_vec(), level(Doubts::LOCKS, Doubts::empty())),
            (b"Odd name".to_vec(), level(Doubts::TEMPORARY, Doubts::empty())),
            (b"orders".to_vec(), level(Doubts::empty(), Doubts::CURSORS)),
        ];
        Known::new(named, Traces::default(), Traces::default())
    }

    fn doubts(sql: &str) -> Doubts {
        known().look(sql.as_bytes(), false).map(|found| found.doubts).unwrap_or_default()
    }

    #[test]
    fn a_name_is_found_however_it_is_written() {
        for sql in
            ["SELECT next_job()", "select public.Next_Job (1)", "call \"next_job\"()", "DO 'x next_job()'"]
        {
            assert_eq!(doubts(sql), Doubts::LOCKS, "{sql}");
        }
        assert_eq!(doubts("SELECT \"Odd name\"(1)"), Doubts::TEMPORARY);
        assert_eq!(doubts("SELECT next_jobs(), my_next_job()"), Doubts::empty());
        assert!(doubts("SELECT U&\"\\006eext_job\"()").contains(Doubts::LOCKS));
    }

    #[test]
    fn what_a_trigger_does_counts_where_its_table_is_written_to() {
        assert_eq!(doubts("SELECT * FROM orders"), Doubts::empty());
        assert_eq!(doubts("INSERT INTO orders VALUES (1)"), Doubts::CURSORS);
        assert_eq!(doubts("COPY orders FROM STDIN"), Doubts::CURSORS);
    }

    #[test]
    fn a_name_without_a_readable_word_makes_every_text_doubtful() {
        let known = Known::new(
            [("ß".into(), level(Doubts::LOCKS, Doubts::empty()))],
            Traces::default(),
            Traces::default(),
        );
        assert!(known.look(b"SELECT 1", false).is_some());
        assert!(!known.is_empty());
    }
}
