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
pub struct ChangeCounts {
    counts: Mutex<Counts>,
    /// Changes kept one by one.
    entries_max: u64,
}

#[derive(Debug, Default)]
struct Counts {
    count: u64,
    /// The last [`Change::Everything`].
    everything: u64,
    /// All that was noted up to here is known only in sum: every row older than this counts as changed.
    summed_up: u64,
    changed: HashMap<Change, u64>,
}

/// What a remembered row is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// Nothing it depends on changed since.
    Unchanged,
    /// Something may have changed while nobody listened.
    Doubtful,
    /// It did change.
    Changed,
}

impl ChangeCounts {
    /// Keeps `entries_max` changes one by one; beyond that, everything remembered is looked up anew.
    pub fn new(entries_max: u64) -> Self {
        Self { counts: Mutex::default(), entries_max }
    }

    /// Writes a change down.
    pub fn note(&self, change: &Change) {
        let mut counts = self.counts();
        counts.count += 1;
        let count = counts.count;
        if *change == Change::Everything {
            counts.everything = count;
            return;
        }
        if counts.changed.len() as u64 >= self.entries_max {
            counts.changed.clear();
            counts.summed_up = count;
        }
        counts.changed.insert(change.clone(), count);
    }

    /// The count now; to be taken before a look-up begins.
    pub fn count(&self) -> u64 {
        self.counts().count
    }

    /// What a row is worth whose look-up began at `since`.
    pub fn validity(&self, since: u64, row: &impl DependsOn) -> Validity {
        let counts = self.counts();
        if counts.count <= since {
            return Validity::Unchanged;
        }
        let changed = |on: &Change| counts.changed.get(on).is_some_and(|at| *at > since);
        if counts.summed_up > since || row.depends_on_any(&changed) {
            return Validity::Changed;
        }
        if counts.everything > since { Validity::Doubtful } else { Validity::Unchanged }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
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
        let changes = ChangeCounts::new(10);
        let before = changes.count();
        changes.note(&Change::Tenant(1));
        changes.note(&Change::Login(2));

        assert_eq!(changes.validity(before, &Row(1)), Validity::Changed);
        assert_eq!(changes.validity(before, &Row(2)), Validity::Unchanged);
        assert_eq!(changes.validity(changes.count(), &Row(1)), Validity::Unchanged);
    }

    #[test]
    fn everything_is_a_doubt_and_a_known_change_stays_one() {
        let changes = ChangeCounts::new(10);
        let before = changes.count();
        changes.note(&Change::Tenant(1));
        changes.note(&Change::Everything);

        assert_eq!(changes.validity(before, &Row(1)), Validity::Changed);
        assert_eq!(changes.validity(before, &Row(2)), Validity::Doubtful);
    }

    #[test]
    fn a_full_ledger_forgets_nothing_but_the_details() {
        let changes = ChangeCounts::new(2);
        let before = changes.count();
        for id in 1..=5 {
            changes.note(&Change::Tenant(id));
        }
        assert!(changes.counts().changed.len() <= 2);
        for id in 1..=6 {
            assert_eq!(changes.validity(before, &Row(id)), Validity::Changed);
        }
        assert_eq!(changes.validity(changes.count(), &Row(5)), Validity::Unchanged);
    }
}
