//! Side effects of the functions, tables and views that a text names. Pure.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::data_path::{
    memory_limit::{Account, Charge, PIECE_BYTES},
    session_state::{pins::Pins, side_effects::SideEffects, state_query::StateChecks},
    sql::{NAME_BYTES_MAX, dotted_names, words},
};

/// Side effects of calling a function or using an object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CallEffects {
    pub checks: StateChecks,
    pub pins: Pins,
    /// Names of the parameters that it may set.
    pub names: BTreeSet<Box<str>>,
}

impl CallEffects {
    pub fn is_empty(&self) -> bool {
        self.checks.is_empty() && self.pins.is_empty()
    }

    /// Returns the memory used by the parameter names, in bytes.
    pub fn bytes(&self) -> usize {
        self.names.iter().map(|name| name.len() + 3 * PIECE_BYTES).sum()
    }

    /// Adds the effects of `other`. Returns whether that changed anything.
    pub fn merge(&mut self, other: &Self) -> bool {
        let before = (self.checks, self.pins, self.names.len());
        self.checks.insert(other.checks);
        self.pins.insert(other.pins);
        for name in &other.names {
            if !self.names.contains(name) {
                self.names.insert(name.clone());
            }
        }
        before != (self.checks, self.pins, self.names.len())
    }
}

impl From<SideEffects> for CallEffects {
    fn from(side_effects: SideEffects) -> Self {
        let names = side_effects.names.into_iter().flatten().collect();
        Self { checks: side_effects.checks, pins: side_effects.pins, names }
    }
}

/// Side effects of the objects with one name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NamedEffects {
    /// Effects of any use.
    pub always: CallEffects,
    /// Effects of texts that write: from triggers, defaults and check constraints.
    pub on_write: CallEffects,
}

impl NamedEffects {
    /// Returns the memory used by the parameter names, in bytes.
    pub fn bytes(&self) -> usize {
        self.always.bytes() + self.on_write.bytes()
    }

    /// Adds the effects of `other`. Returns whether that changed anything.
    pub fn merge(&mut self, other: &Self) -> bool {
        self.always.merge(&other.always) | self.on_write.merge(&other.on_write)
    }
}

/// Side effects by object name, loaded from one database.
#[derive(Debug)]
pub struct EffectsByName {
    /// Unique within the process.
    pub version: u64,
    names: HashMap<Box<[u8]>, NamedEffects>,
    /// Effects of every text (operators, casts and unreadable names).
    any: CallEffects,
    /// Effects of DDL (event triggers).
    ddl: CallEffects,
    /// All effects together: for a text whose words cannot be found.
    all: CallEffects,
    /// Memory charge of this structure.
    charge: Charge,
}

static LAST_VERSION: AtomicU64 = AtomicU64::new(0);

impl EffectsByName {
    /// Creates the structure from object names and the effects of their use.
    pub fn new(
        named: impl IntoIterator<Item = (Vec<u8>, NamedEffects)>,
        any: CallEffects,
        ddl: CallEffects,
    ) -> Self {
        let version = LAST_VERSION.fetch_add(1, Ordering::Relaxed) + 1;
        let charge = Charge::default();
        let mut loaded = Self { version, names: HashMap::new(), all: any.clone(), any, ddl, charge };
        loaded.all.merge(&loaded.ddl);
        for (name, effects) in named {
            loaded.all.merge(&effects.always);
            loaded.all.merge(&effects.on_write);
            match search_word(&name) {
                Some(word) => drop(loaded.names.entry(word).or_default().merge(&effects)),
                None => {
                    loaded.any.merge(&effects.always);
                    loaded.any.merge(&effects.on_write);
                }
            }
        }
        loaded
    }

    /// For a database with too many functions to load: every text may have any side effect.
    pub fn unknown() -> Self {
        Self::new([], SideEffects::anything().into(), CallEffects::default())
    }

    /// Charges the memory used, in place of the charge made while loading.
    pub fn charged(mut self, mut charge: Charge, memory: &Arc<Account>) -> Self {
        let each = size_of::<(Box<[u8]>, NamedEffects)>() + 2 * PIECE_BYTES;
        let names: usize = self.names.iter().map(|(name, effects)| name.len() + effects.bytes() + each).sum();
        charge.set(memory, names + self.any.bytes() + self.ddl.bytes() + self.all.bytes());
        self.charge = charge;
        self
    }

    /// Returns whether no text has other side effects than its own.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty() && self.all.is_empty()
    }

    /// Returns whether a text names an object with side effects, other than those that count for every text.
    pub fn names_any(&self, text: &[u8], words_hidden: bool) -> bool {
        let is_named = |word: &[u8]| self.names.contains_key(&*word.to_ascii_lowercase());
        let hidden = words_hidden || has_unicode_names(text);
        !self.names.is_empty() && (hidden || words(text).any(is_named))
    }

    /// Returns the side effects of the objects that a text names. `words_hidden` means that the text's
    /// encoding may hide word boundaries: then all effects count.
    pub fn find(&self, text: &[u8], words_hidden: bool) -> Option<SideEffects> {
        let mut found = self.any.clone();
        let mut on_write = CallEffects::default();
        let mut writes = false;
        if words_hidden || has_unicode_names(text) {
            found.merge(&self.all);
        } else {
            let mut lower = [0; NAME_BYTES_MAX];
            for word in words(text) {
                let Some(lower) = lower.get_mut(..word.len()) else { continue };
                lower.copy_from_slice(word);
                lower.make_ascii_lowercase();
                if let Some(effects) = self.names.get(&*lower) {
                    found.merge(&effects.always);
                    on_write.merge(&effects.on_write);
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
        if found.checks.contains(StateChecks::UNNAMED) {
            found.names.extend(dotted_names(text)); // called code may run text from an argument
        }
        let names: Vec<Box<str>> = found.names.into_iter().collect();
        if !names.is_empty() {
            found.checks.insert(StateChecks::NAMED_SETTINGS);
        }
        let names = (!names.is_empty()).then(|| names.into());
        Some(SideEffects { checks: found.checks, pins: found.pins, names, ..SideEffects::default() })
    }
}

/// Returns the word to search for a name: its longest word, in lower case, which every text with the name
/// contains, quoted or not.
/// `None` if the name has no readable word.
pub fn search_word(name: &[u8]) -> Option<Box<[u8]>> {
    words(name).max_by_key(|word| word.len()).map(|word| word.to_ascii_lowercase().into())
}

/// Returns whether a lower-case word may start a write to a table.
pub fn is_write(word: &[u8]) -> bool {
    matches!(
        word,
        b"insert" | b"update" | b"delete" | b"merge" | b"copy" | b"truncate" | b"execute" | b"call" | b"do"
    ) || is_ddl(word)
}

/// Returns whether a lower-case word may start DDL.
fn is_ddl(word: &[u8]) -> bool {
    matches!(
        word,
        b"create" | b"alter" | b"drop" | b"into" | b"refresh" | b"import" | b"grant" | b"revoke" | b"comment"
    )
}

/// A name such as `U&"\0066"` hides its letters.
fn has_unicode_names(text: &[u8]) -> bool {
    text.windows(3).any(|window| matches!(window, b"U&\"" | b"u&\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn effects(always: StateChecks, on_write: StateChecks) -> NamedEffects {
        let call = |checks| CallEffects { checks, ..CallEffects::default() };
        NamedEffects { always: call(always), on_write: call(on_write) }
    }

    fn loaded() -> EffectsByName {
        let named = [
            (b"next_job".to_vec(), effects(StateChecks::LOCKS, StateChecks::empty())),
            (b"Odd name".to_vec(), effects(StateChecks::TEMPORARY, StateChecks::empty())),
            (b"orders".to_vec(), effects(StateChecks::empty(), StateChecks::CURSORS)),
        ];
        EffectsByName::new(named, CallEffects::default(), CallEffects::default())
    }

    fn checks(sql: &str) -> StateChecks {
        loaded().find(sql.as_bytes(), false).map(|found| found.checks).unwrap_or_default()
    }

    #[test]
    fn a_name_is_found_in_every_spelling() {
        for sql in
            ["SELECT next_job()", "select public.Next_Job (1)", "call \"next_job\"()", "DO 'x next_job()'"]
        {
            assert_eq!(checks(sql), StateChecks::LOCKS, "{sql}");
        }
        assert_eq!(checks("SELECT \"Odd name\"(1)"), StateChecks::TEMPORARY);
        assert_eq!(checks("SELECT next_jobs(), my_next_job()"), StateChecks::empty());
        assert!(checks("SELECT U&\"\\006eext_job\"()").contains(StateChecks::LOCKS));
    }

    #[test]
    fn effects_of_triggers_count_for_writes_only() {
        assert_eq!(checks("SELECT * FROM orders"), StateChecks::empty());
        assert_eq!(checks("INSERT INTO orders VALUES (1)"), StateChecks::CURSORS);
        assert_eq!(checks("COPY orders FROM STDIN"), StateChecks::CURSORS);
    }

    #[test]
    fn effects_of_an_unreadable_name_count_for_every_text() {
        let loaded = EffectsByName::new(
            [("ß".into(), effects(StateChecks::LOCKS, StateChecks::empty()))],
            CallEffects::default(),
            CallEffects::default(),
        );
        assert!(loaded.find(b"SELECT 1", false).is_some());
        assert!(!loaded.is_empty());
    }
}
