//! Custom parameters (`app.user`) that servers and sessions have had. Pure.
//!
//! PostgreSQL never forgets a custom parameter: on a server where any session has set it, also by SET LOCAL,
//! `current_setting('app.user', true)` is `''` from then on, where it is NULL for a session that has not set
//! it. So a session is lent servers that have had no other custom parameters than itself, where that can be
//! arranged (`pool/custom_parameters.rs`).

use std::sync::Mutex;

use super::Settings;
use crate::data_path::lock::locked;

/// A set of custom parameters of a tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CustomSet(u64);

impl CustomSet {
    /// Parameters whose names are not known, or are beyond the limit. Two of them are taken for the same.
    pub const UNNAMED: Self = Self(1 << 63);

    /// Adds those of another set.
    pub fn insert(&mut self, other: Self) {
        self.0 |= other.0;
    }

    /// Whether there are none.
    #[inline]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether the other set has all of these.
    #[inline]
    pub fn is_within(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }
}

/// Longest name that is kept.
const NAME_BYTES_MAX: usize = 128;

/// The names that have a place in a [`CustomSet`]: the first 63 that a tenant's sessions set.
#[derive(Debug, Default)]
pub struct CustomNames(Mutex<Vec<Box<str>>>);

impl CustomNames {
    /// The set of one parameter; empty if it is no custom one, or pglobby's own.
    pub fn one(&self, name: &str) -> CustomSet {
        let name = name.to_ascii_lowercase();
        if !name.contains('.') || name.starts_with("pglobby.") {
            return CustomSet::default();
        }
        let mut names = locked(&self.0);
        let at = names.iter().position(|known| **known == *name).or_else(|| {
            let fits = names.len() < CustomSet::UNNAMED.0.trailing_zeros() as usize;
            (fits && name.len() <= NAME_BYTES_MAX).then(|| {
                names.push(name.into());
                names.len() - 1
            })
        });
        at.map_or(CustomSet::UNNAMED, |at| CustomSet(1 << at))
    }

    /// The custom ones of these parameters.
    pub fn all<'n>(&self, names: impl IntoIterator<Item = &'n str>) -> CustomSet {
        let mut set = CustomSet::default();
        names.into_iter().for_each(|name| set.insert(self.one(name)));
        set
    }

    /// The names in a set, without those in `but`.
    pub fn names(&self, set: CustomSet, but: CustomSet) -> Vec<Box<str>> {
        let is_wanted = |at: usize| set.0 & !but.0 & (1 << at) != 0;
        locked(&self.0)
            .iter()
            .enumerate()
            .filter(|(at, _)| is_wanted(*at))
            .map(|(_, name)| name.clone())
            .collect()
    }

    /// The names in a set, and whether it has others, for another process.
    pub fn pack(&self, set: CustomSet) -> (Vec<String>, bool) {
        let names = self.names(set, CustomSet::default());
        (names.into_iter().map(String::from).collect(), CustomSet::UNNAMED.is_within(set))
    }

    /// The set of these names, and of others if there are any.
    pub fn unpack(&self, names: &[String], has_others: bool) -> CustomSet {
        let mut set = self.all(names.iter().map(String::as_str));
        if has_others {
            set.insert(CustomSet::UNNAMED);
        }
        set
    }

    /// The custom ones of these settings.
    pub fn of(&self, settings: &Settings) -> CustomSet {
        self.all(settings.iter().map(|(name, _)| name))
    }
}

/// The custom parameters that a server has had.
#[derive(Debug, Default)]
pub struct ServerCustomSet {
    /// Since it was opened.
    pub ever: CustomSet,
    /// Set by texts of the session that has it now.
    pub by_session: CustomSet,
}

impl ServerCustomSet {
    /// A text of the present session sets these.
    #[cold]
    pub fn set(&mut self, names: CustomSet) {
        self.ever.insert(names);
        self.by_session.insert(names);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_beyond_the_limit_are_taken_for_the_same() {
        let names = CustomNames::default();
        assert!(names.one("work_mem").is_empty() && names.one("pglobby.tenant").is_empty());
        let first = names.one("App.User");
        assert_eq!(names.one("app.user"), first);
        for number in 0..100 {
            names.one(&format!("app.n{number}"));
        }
        assert_eq!(names.one("app.n99"), CustomSet::UNNAMED);
        assert_eq!(names.one("app.user"), first);
        let both = names.all(["app.user", "app.n1", "search_path"]);
        assert_eq!(*names.names(both, first), [Box::from("app.n1")]);
        assert!(first.is_within(both) && !both.is_within(first) && !both.is_empty());
    }
}
