//! What changed when: a count of changes, and for each thing the count at which it last changed.
//!
//! A remembered row carries the count at which its look-up began. Comparing the two tells, in constant time and without
//! searching any cache, whether the row may still be used, and it tells it of look-ups that were under way too.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::data_path::tenant::{Change, Login, LoginKind, Tenant, TenantStatus};

/// The count and the changes.
#[derive(Debug)]
pub struct Ledger {
    pages: Mutex<Pages>,
    /// Changes kept one by one.
    entries_max: u64,
}

#[derive(Debug, Default)]
struct Pages {
    count: u64,
    /// The last [`Change::Everything`].
    everything: u64,
    /// All that was noted up to here is known only in sum: every row older than this counts as changed.
    summed_up: u64,
    changed: HashMap<Change, u64>,
}

/// What a remembered row is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nothing it depends on changed since.
    Unchanged,
    /// Something may have changed while nobody listened.
    Doubtful,
    /// It did change.
    Changed,
}

impl Ledger {
    /// Keeps `entries_max` changes one by one; beyond that, everything remembered is looked up anew.
    pub fn new(entries_max: u64) -> Self {
        Self { pages: Mutex::default(), entries_max }
    }

    /// Writes a change down.
    pub fn note(&self, change: &Change) {
        let mut pages = self.pages();
        pages.count += 1;
        let count = pages.count;
        if *change == Change::Everything {
            pages.everything = count;
            return;
        }
        if pages.changed.len() as u64 >= self.entries_max {
            pages.changed.clear();
            pages.summed_up = count;
        }
        pages.changed.insert(change.clone(), count);
    }

    /// The count now; to be taken before a look-up begins.
    pub fn count(&self) -> u64 {
        self.pages().count
    }

    /// What a row is worth whose look-up began at `since`.
    pub fn standing(&self, since: u64, row: &impl DependsOn) -> Standing {
        let pages = self.pages();
        if pages.count <= since {
            return Standing::Unchanged;
        }
        let changed = |on: &Change| pages.changed.get(on).is_some_and(|at| *at > since);
        if pages.summed_up > since || row.depends_on_any(&changed) {
            return Standing::Changed;
        }
        if pages.everything > since { Standing::Doubtful } else { Standing::Unchanged }
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A record that was made of rows.
pub trait DependsOn {
    /// Whether `changed` is true of any row it was made of.
    fn depends_on_any(&self, changed: &dyn Fn(&Change) -> bool) -> bool;

    /// Whether another row, that does not exist yet, would take its place under its name.
    fn has_gone(&self) -> bool {
        false
    }
}

impl DependsOn for Tenant {
    fn depends_on_any(&self, changed: &dyn Fn(&Change) -> bool) -> bool {
        changed(&Change::Tenant(self.id)) || changed(&Change::Host(self.host.name.clone()))
    }

    fn has_gone(&self) -> bool {
        self.status == TenantStatus::Dropped
    }
}

impl DependsOn for Login {
    fn depends_on_any(&self, changed: &dyn Fn(&Change) -> bool) -> bool {
        changed(&Change::Login(self.id))
            || match &self.kind {
                // The names of tenants are in it.
                LoginKind::Employee { tenant_id, .. } => changed(&Change::Tenant(*tenant_id)),
                LoginKind::Service { granted, .. } => {
                    granted.iter().any(|grant| changed(&Change::Tenant(grant.tenant_id)))
                }
                LoginKind::Admin { .. } => false,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Row(i64);

    impl DependsOn for Row {
        fn depends_on_any(&self, changed: &dyn Fn(&Change) -> bool) -> bool {
            changed(&Change::Tenant(self.0))
        }
    }

    #[test]
    fn a_change_counts_for_rows_looked_up_before_it_only() {
        let ledger = Ledger::new(10);
        let before = ledger.count();
        ledger.note(&Change::Tenant(1));
        ledger.note(&Change::Login(2));

        assert_eq!(ledger.standing(before, &Row(1)), Standing::Changed);
        assert_eq!(ledger.standing(before, &Row(2)), Standing::Unchanged);
        assert_eq!(ledger.standing(ledger.count(), &Row(1)), Standing::Unchanged);
    }

    #[test]
    fn everything_is_a_doubt_and_a_known_change_stays_one() {
        let ledger = Ledger::new(10);
        let before = ledger.count();
        ledger.note(&Change::Tenant(1));
        ledger.note(&Change::Everything);

        assert_eq!(ledger.standing(before, &Row(1)), Standing::Changed);
        assert_eq!(ledger.standing(before, &Row(2)), Standing::Doubtful);
    }

    #[test]
    fn a_full_ledger_forgets_nothing_but_the_details() {
        let ledger = Ledger::new(2);
        let before = ledger.count();
        for id in 1..=5 {
            ledger.note(&Change::Tenant(id));
        }
        assert!(ledger.pages().changed.len() <= 2);
        for id in 1..=6 {
            assert_eq!(ledger.standing(before, &Row(id)), Standing::Changed);
        }
        assert_eq!(ledger.standing(ledger.count(), &Row(5)), Standing::Unchanged);
    }
}
