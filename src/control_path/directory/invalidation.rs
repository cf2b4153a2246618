//! Counts changes, and keeps for each changed thing the count at its last change.
//!
//! A cached row carries the count from the start of its look-up. Comparing the two tells in constant time
//! whether the row may still be used, also for a look-up that was running when the change came.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::data_path::tenant::{Change, Login, LoginKind, Tenant, TenantStatus};

/// The count of changes, and the count at each thing's last change.
#[derive(Debug)]
pub struct ChangeCounts {
    counts: Mutex<Counts>,
    /// Maximum of things with a count of their own.
    entries_max: u64,
}

#[derive(Debug, Default)]
struct Counts {
    count: u64,
    /// Count at the last [`Change::Everything`].
    everything: u64,
    /// Details of changes up to this count were dropped: every row older than it counts as changed.
    dropped_up_to: u64,
    changed: HashMap<Change, u64>,
}

/// Whether a cached row may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// Nothing it depends on has changed.
    Unchanged,
    /// It may have changed while no notifications were received.
    Doubtful,
    /// It has changed.
    Changed,
}

impl ChangeCounts {
    /// Keeps `entries_max` counts. Beyond that all are dropped, and every cached row counts as changed.
    pub fn new(entries_max: u64) -> Self {
        Self { counts: Mutex::default(), entries_max }
    }

    /// Counts a change.
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
            counts.dropped_up_to = count;
        }
        counts.changed.insert(change.clone(), count);
    }

    /// The present count; to be read before a look-up begins.
    pub fn count(&self) -> u64 {
        self.counts().count
    }

    /// The validity of a row whose look-up began at count `since`.
    pub fn validity(&self, since: u64, row: &impl DependsOn) -> Validity {
        let counts = self.counts();
        if counts.count <= since {
            return Validity::Unchanged;
        }
        let changed = |on: &Change| counts.changed.get(on).is_some_and(|at| *at > since);
        if counts.dropped_up_to > since || row.depends_on_any(&changed) {
            return Validity::Changed;
        }
        if counts.everything > since { Validity::Doubtful } else { Validity::Unchanged }
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A record read from rows.
pub trait DependsOn {
    /// Whether `changed` is true for any of its rows.
    fn depends_on_any(&self, changed: &dyn Fn(&Change) -> bool) -> bool;

    /// Whether a new row may take its name.
    fn frees_its_name(&self) -> bool {
        false
    }
}

impl DependsOn for Tenant {
    fn depends_on_any(&self, changed: &dyn Fn(&Change) -> bool) -> bool {
        changed(&Change::Tenant(self.id)) || changed(&Change::Host(self.host.name.clone()))
    }

    fn frees_its_name(&self) -> bool {
        self.status == TenantStatus::Dropped
    }
}

impl DependsOn for Login {
    fn depends_on_any(&self, changed: &dyn Fn(&Change) -> bool) -> bool {
        changed(&Change::Login(self.id))
            || match &self.kind {
                // The record contains the tenant's name.
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
